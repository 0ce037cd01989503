"""When one launch is not enough: contenders, sentinels, drift.

One launch of each of twenty equal configurations makes the best of them look better than it is. So a
trial that would become the best is launched again until its interval is narrow, or until it is the best
no more; and every few trials the default or the best runs again, to see whether the machine still is
what it was. All of it is a function of the history: what is due after a crash is what was due before.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tuner.intervals import CONFIDENCE
from tuner.journal import Plan
from tuner.summary import half_width, noise, noise_quantile, percent_text, pooled
from tuner.trial import History, Repeat, Trial

LARGEST_DRIFT = 0.03
"""A change of the same configuration's energy (in ln) over time that marks the trials in between."""


@dataclass(frozen=True)
class Due:
    """A launch to make before the next proposal."""

    trial: Trial
    purpose: Literal["contender", "sentinel"]


def due(history: History, plan: Plan) -> Due | None:
    """The next launch that the search owes, or None.

    A trial is launched `plan.launches` times at most, failures included. A sentinel gets one launch more
    than that each time, because its point is the moment, not the number.
    """
    best = history.best
    if best is not None and best is not history.default and _unsettled(best, history, plan):
        return Due(best, "contender")
    if not _sentinel_time(history, plan):
        return None
    now = [r for r in history.repeats if r.purpose == "sentinel" and r.after == len(history)]
    subject = _newest(history, now[0]) if now else _sentinel(history)
    if subject is not None and (not now or _unsettled(subject, history, plan)):
        return Due(subject, "sentinel")
    return None


def _unsettled(trial: Trial, history: History, plan: Plan) -> bool:
    half = half_width(trial, noise(history))
    return 1 + len(trial.repeats) < plan.launches and half is not None and half > plan.precision


def _sentinel_time(history: History, plan: Plan) -> bool:
    count = len(history.current)
    return plan.sentinel_every > 0 and count > 0 and count % plan.sentinel_every == 0


def _sentinel(history: History) -> Trial | None:
    """The default or the best: whichever has been launched less often."""
    subjects = [t for t in (history.default, history.best) if t is not None]
    return min(subjects, key=lambda t: len(t.repeats), default=None)


def _newest(history: History, repeat: Repeat) -> Trial | None:
    return next((t for t in history.measured if t.number == repeat.trial.number), None)


# --- drift -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """Trials during which the machine changed: their figures and the others' are not quite comparable."""

    first: int
    last: int
    """Numbers of the trials in it, both included."""
    sentinel: int
    """The trial whose configuration was launched before and after."""
    ratio: float
    """Its energy afterwards over that before."""

    @property
    def sentence(self) -> str:
        """What happened, and what it is worth."""
        change = f"{percent_text(abs(self.ratio - 1))} {'more' if self.ratio > 1 else 'less'}"
        trials = (
            f"trials {self.first} to {self.last} compare" if self.last > self.first else f"trial {self.first} compares"
        )
        return (
            f"the machine drifted: trial {self.sentinel} used {change} when it ran again, so {trials} badly with the"
            " others; see what else runs or heats up, the confirmation is not touched by it"
        )


def drifts(history: History) -> list[Stretch]:
    """Where a configuration's energy changed by more than `LARGEST_DRIFT` and by more than noise explains.

    Noise is taken within occasions here: between them it would hold the very drift that is looked for. The 5 %
    with which noise alone is called drift are those of the whole study, shared by all its comparisons (Bonferroni).
    """
    occasions = {trial.number: _occasions(trial, history) for trial in history.measured}
    known = pooled((logs for one in occasions.values() for _, logs in one), history.noise)
    steps = [(number, *step) for number, one in occasions.items() for step in itertools.pairwise(one)]
    found = []
    for number, (before, earlier), (after, later) in steps:
        change = statistics.fmean(later) - statistics.fmean(earlier)
        quantile = noise_quantile(known, 1 - (1 - CONFIDENCE) / 2 / len(steps))
        margin = quantile * known.sigma * math.sqrt(1 / len(earlier) + 1 / len(later))
        if abs(change) > max(LARGEST_DRIFT, margin):
            found.append(Stretch(before, after - 1, number, math.exp(change)))
    return sorted(found, key=lambda s: (s.first, s.last))


def _occasions(trial: Trial, history: History) -> list[tuple[int, Sequence[float]]]:
    """(how many trials were done, ln J/unit of the launches made then), oldest first."""
    own = trial.launch_joules_per_unit
    found: dict[int, list[float]] = {trial.number + 1: [math.log(own)]} if own else {}
    for repeat in history.repeats:
        value = repeat.trial.launch_joules_per_unit
        if repeat.trial.number == trial.number and repeat.trial.segment == trial.segment and value:
            found.setdefault(repeat.after, []).append(math.log(value))
    return sorted(found.items())


def stretch_of(trial: Trial, history: History) -> Stretch | None:
    """The stretch that `trial` was measured in, if it was in one."""
    return next((s for s in drifts(history) if s.first <= trial.number <= s.last), None)
