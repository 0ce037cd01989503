import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.intervals import LEAST_VALUES, SIGN_FLIP_BELOW, paired_interval, sign_flip_interval, student_t, t_interval

VALUES = st.lists(st.floats(-2, 2), min_size=LEAST_VALUES, max_size=7)


# --- Student's t ---


def test_student_t_agrees_with_scipy():
    from scipy import stats

    for degrees in (*range(1, 40), 99, 100, 1000):
        for probability in (0.5, 0.9, 0.95, 0.975, 0.995, 0.99975):
            assert student_t(probability, degrees) == pytest.approx(
                stats.t.ppf(probability, degrees), abs=1e-9, rel=1e-9
            )


@pytest.mark.parametrize(("probability", "degrees"), [(0.4, 3), (1.0, 3), (0.975, 0)])
def test_student_t_refuses_what_has_no_quantile(probability, degrees):
    with pytest.raises(ValueError, match="expected probability"):
        student_t(probability, degrees)


@given(values=st.lists(st.floats(-2, 2), min_size=2, max_size=20, unique=True), confidence=st.sampled_from((0.9, 0.95)))
def test_the_t_interval_agrees_with_scipy(values, confidence):
    from scipy import stats

    low, high = stats.t.interval(
        confidence, len(values) - 1, statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    )
    assert t_interval(values, confidence) == pytest.approx((low, high), abs=1e-9)


def test_the_t_interval_of_normal_values_holds_their_mean_as_often_as_it_says():
    """4000 samples of 8: 3 standard deviations of the share are 1.03 %."""
    draw = random.Random(1)
    held = 0
    for _ in range(4000):
        low, high = t_interval([draw.gauss(0, 1) for _ in range(8)])
        held += low <= 0 <= high
    assert held / 4000 == pytest.approx(0.95, abs=0.0104)


# --- sign flips ---


def flips_reject(values, centre, level):
    """The two-sided sign-flip test of `centre`, over all 2^n flips, with the mean as its statistic."""
    apart = [v - centre for v in values]
    seen = abs(math.fsum(apart))
    as_far = sum(
        # Sums that are equal in theory differ by rounding.
        abs(math.fsum(sign * d for sign, d in zip(signs, apart, strict=True))) >= seen - 1e-12
        for signs in itertools.product((1, -1), repeat=len(values))
    )
    return as_far / 2 ** len(values) <= level


@pytest.mark.parametrize("confidence", [0.95, 0.9, 0.8])
@pytest.mark.parametrize("count", [6, 7, 8])
@pytest.mark.parametrize("seed", range(5))
def test_the_sign_flip_interval_holds_just_the_centres_that_the_permutation_test_does_not_reject(
    count, confidence, seed
):
    draw = random.Random(seed)
    values = [draw.gauss(0.1, 1) for _ in range(count)]
    low, high = sign_flip_interval(values, confidence)
    near = 1e-6
    assert [flips_reject(values, c, 1 - confidence) for c in (low - near, low + near)] == [True, False]
    assert [flips_reject(values, c, 1 - confidence) for c in (high - near, high + near)] == [False, True]
    assert not any(flips_reject(values, low + (high - low) * k / 10, 1 - confidence) for k in range(1, 10))


@pytest.mark.parametrize("count", range(LEAST_VALUES))
def test_fewer_than_six_values_have_no_sign_flip_interval(count):
    assert sign_flip_interval([0.1 * n for n in range(count)]) is None


def test_five_values_have_one_at_ninety_percent():
    """Of 2^5 parts of the line the two outer ones are left out: 93.75 %."""
    assert sign_flip_interval([1.0, 2.0, 3.0, 4.0, 5.0], 0.9) == (1.0, 5.0)


@pytest.mark.parametrize(("count", "left_out"), [(6, 1), (7, 3), (8, 6), (9, 12), (10, 25)])
def test_the_interval_leaves_out_as_many_parts_of_the_line_as_the_level_allows(count, left_out):
    """floor(0.025 * 2^n) on either side; the powers of two have no two subsets of the same mean."""
    values = [float(3**n) for n in range(count)]
    subsets = itertools.chain.from_iterable(itertools.combinations(values, size) for size in range(1, count + 1))
    means = sorted(statistics.fmean(subset) for subset in subsets)
    low, high = sign_flip_interval(values)
    assert sum(mean < low for mean in means) == left_out - 1
    assert sum(mean > high for mean in means) == left_out - 1


def uniform(draw):
    return draw.uniform(-1, 1)


def heavy(draw):
    """Student's t with 2 degrees of freedom."""
    return draw.gauss(0, 1) / math.sqrt(draw.expovariate(1))


def two_sided(draw):
    return draw.choice((-1, 1)) * draw.lognormvariate(0, 2)


@pytest.mark.parametrize("shape", [uniform, heavy, two_sided])
@pytest.mark.parametrize(("count", "level"), [(6, 1 - 2 / 64), (7, 1 - 6 / 128)])
def test_whatever_the_symmetric_shape_the_level_is_exact(shape, count, level):
    """3000 samples: 3.3 standard deviations of the share, for one failure in a thousand such tests."""
    draw = random.Random(f"{shape.__name__} {count}")
    held = 0
    for _ in range(3000):
        low, high = sign_flip_interval([shape(draw) for _ in range(count)])
        held += low <= 0 <= high
    assert held / 3000 == pytest.approx(level, abs=3.3 * math.sqrt(level * (1 - level) / 3000))


@given(VALUES, st.floats(-3, 3))
def test_shifting_the_values_shifts_the_interval(values, shift):
    low, high = sign_flip_interval(values)
    assert sign_flip_interval([v + shift for v in values]) == pytest.approx((low + shift, high + shift), abs=1e-9)


@given(VALUES, st.floats(0.1, 10))
def test_scaling_the_values_scales_the_interval(values, factor):
    low, high = sign_flip_interval(values)
    assert sign_flip_interval([v * factor for v in values]) == pytest.approx((low * factor, high * factor), abs=1e-9)


@given(VALUES)
def test_the_interval_of_the_negative_values_is_the_negative_interval(values):
    low, high = sign_flip_interval(values)
    assert sign_flip_interval([-v for v in values]) == (-high, -low)


@given(VALUES, st.randoms(use_true_random=False))
def test_the_order_of_the_values_does_not_matter(values, shuffler):
    shuffled = shuffler.sample(values, len(values))
    assert sign_flip_interval(shuffled) == sign_flip_interval(values)


@given(VALUES)
def test_the_interval_holds_the_mean_and_lies_between_the_values(values):
    low, high = sign_flip_interval(values)
    # A mean of equal values may be off by one unit in the last place.
    slack = 1e-12 * max(map(abs, values))
    assert min(values) - slack <= low <= statistics.fmean(values) + slack
    assert statistics.fmean(values) - slack <= high <= max(values) + slack


@given(VALUES)
def test_more_confidence_never_narrows_the_interval(values):
    (wide_low, wide_high), (low, high) = sign_flip_interval(values), sign_flip_interval(values, 0.8)
    assert wide_low <= low <= high <= wide_high


# --- pairs ---


@pytest.mark.parametrize("count", range(2, 13))
def test_pairs_are_judged_by_sign_flips_below_eight_and_by_student_from_there(count):
    values = [math.sin(3 * n) for n in range(count)]
    expected = (sign_flip_interval if count < SIGN_FLIP_BELOW else t_interval)(values)
    assert paired_interval(values) == expected
    assert (expected is None) == (count < LEAST_VALUES)
