"""Confidence intervals, exact and without scipy, whose import takes 1 to 2 s.

Everything here works on logarithms of energies: a ratio is what people ask for, spread grows with the
mean, and the logarithm of a ratio has a symmetric interval. All intervals are two-sided.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from functools import lru_cache

CONFIDENCE = 0.95

SIGN_FLIP_BELOW = 8
"""Below so many values Student's t leans on a normal shape that nobody can check; above, it hardly matters."""

LEAST_VALUES = 6
"""With fewer values no sign-flip interval reaches 95 %: of n values it can reach 1 - 2 / 2^n at most."""


# --- Student's t -----------------------------------------------------------------------------


def _t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t) for Student's T with integer degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions (1964), equations 26.7.3 (odd) and
    26.7.4 (even): finite sums in theta = atan(t / sqrt(degrees)), exact.
    """
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


@lru_cache(maxsize=256)
def student_t(probability: float, degrees: int) -> float:
    """The quantile of Student's t: P(T <= result) = `probability`, for `probability` in [0.5, 1).

    `student_t(0.975, 4)` is the 2.776 of a two-sided 95 % interval over five values. By bisection
    on the exact distribution.
    """
    if not (0.5 <= probability < 1 and degrees >= 1):
        raise ValueError(f"expected probability in [0.5, 1) and degrees >= 1, got {probability} and {degrees}")
    central = 2 * probability - 1
    low, high = 0.0, 1.0
    while _t_probability(high, degrees) < central:
        low, high = high, high * 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _t_probability(middle, degrees) < central else (low, middle)
    return high


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of the mean of two or more independent, near normal values."""
    degrees = len(values) - 1
    half = student_t((1 + confidence) / 2, degrees) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


# --- sign flips ------------------------------------------------------------------------------


def sign_flip_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The interval of the centre of a few independent values that scatter symmetrically, whatever their shape.

    All centres that a two-sided sign-flip permutation test would not reject. The means of the 2^n - 1
    non-empty subsets of n such values cut the line into 2^n parts, each of which holds the centre with the
    same probability (J. A. Hartigan, Using Subsample Values as Typical Values, JASA 64 (1969), 1303-1317,
    theorem 2), so the interval lies between the k-th smallest and the k-th largest of them, with the
    largest k for which 1 - 2 k / 2^n is still the confidence asked for.

    Returns:
        None where n is too small: with 5 values 93.75 % is the most that can be had.
    """
    cut = math.floor((1 - confidence) / 2 * 2 ** len(values) + 1e-9)
    if cut < 1:
        return None
    means = sorted(
        statistics.fmean(subset)
        for size in range(1, len(values) + 1)
        for subset in itertools.combinations(values, size)
    )
    return means[cut - 1], means[-cut]


def paired_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The interval for the differences of pairs: sign flips below `SIGN_FLIP_BELOW` of them, Student's t from there.

    None below `LEAST_VALUES`: so few pairs can show nothing.
    """
    if len(values) < SIGN_FLIP_BELOW:
        return sign_flip_interval(values, confidence)
    return t_interval(values, confidence)
