"""Limits: what a configuration must keep to, whatever energy it saves.

A limit is a metric, `<=` or `>=`, and a number. A configuration that breaks one is measured and shown, and can never
be the best. What is typed is read by one expression and looked up by name; nothing is evaluated.

Glossary
    metric      a figure of a trial, by a name that says its unit: `ttft_p95_s`, `tokens_per_s`
    quantile    `p95`: the smallest value that 95 % of the values do not exceed
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tuner.space import Refused, closest, excerpt
from tuner.trial import Unit

QUANTILES = (50, 95, 99)

QUALITY_LOSS = "quality_loss"
"""How far the output is from the default's: nats per token above its negative log-likelihood, or 1 - SSIM."""


def names(unit: Unit) -> tuple[str, ...]:
    """The metrics that any engine may report; which ones a particular engine does, its trials show."""
    kinds = ("latency", "ttft", "itl") if unit == "token" else ("latency",)
    stats = ("mean", *(f"p{percent}" for percent in QUANTILES))
    return (f"{unit}s_per_s", *(f"{kind}_{stat}_s" for kind in kinds for stat in stats), QUALITY_LOSS)


@dataclass(frozen=True)
class Limit:
    """What a configuration must keep to."""

    column: str
    most: bool
    """Whether `bound` is the most that is allowed; else it is the least."""
    bound: float

    _GRAMMAR = re.compile(r"\s*([^<>=\s]+)\s*(<=|>=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")

    @classmethod
    def parse(cls, text: str, columns: Iterable[str]) -> Limit:
        """`latency_s<=0.5` or `throughput>=10`, of a column of numbers."""
        known = list(columns)
        match = cls._GRAMMAR.fullmatch(text)
        if match is None or not math.isfinite(float(match[3])):
            raise Refused(f"limit {excerpt(text)}: expected METRIC<=NUMBER or METRIC>=NUMBER")
        if match[1] not in known:
            raise Refused(
                f"limit {excerpt(text)}: no metric is called {excerpt(match[1])}{closest(match[1], known)}"
                f" (the metrics are {', '.join(known)})"
            )
        return cls(column=match[1], most=match[2] == "<=", bound=float(match[3]))

    def broken(self, metrics: Mapping[str, float]) -> str | None:
        """`over the limit: latency_s 0.73 > 0.5`, or None when it holds."""
        value = metrics[self.column]
        if (value <= self.bound) if self.most else (value >= self.bound):
            return None
        # Six digits, unless they hide the difference.
        told, bound = (f"{n:g}" if f"{value:g}" != f"{self.bound:g}" else repr(n) for n in (value, self.bound))
        side, sign = ("over", ">") if self.most else ("under", "<")
        return f"{side} the limit: {self.column} {told} {sign} {bound}"

    def __str__(self) -> str:
        return f"{self.column}{'<=' if self.most else '>='}{self.bound:.12g}"


def parse_limits(texts: Iterable[str], columns: Iterable[str]) -> tuple[Limit, ...]:
    """What a person typed behind `--limit`. Raises `Refused` with the first one that is none."""
    known = tuple(columns)
    try:
        return tuple(Limit.parse(text, known) for text in texts)
    except Refused as fault:
        raise Refused(f"--{fault}") from None


def columns_of(texts: Iterable[str]) -> tuple[str, ...]:
    """The metrics that these limits, which were read before, are set on."""
    return tuple(dict.fromkeys(re.split("[<>]=", text)[0].strip() for text in texts))


def broken(limits: Iterable[Limit], metrics: Mapping[str, float]) -> str | None:
    """Which limits these metrics break and by how much, or None when all hold."""
    return "; ".join(fault for limit in limits if (fault := limit.broken(metrics))) or None
