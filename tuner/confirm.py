"""The only source of a claim: default and best measured again, in pairs, after the search is over.

The best of many noisy trials looks better than it is: of twenty equal configurations measured once
with a spread of 2 %, the best seems to save 3.7 %. So the figures of the search are never a claim.
Fresh pairs are: each pair runs the default and the best in new processes, in ABBA order, so that a
machine that warms up or slows down steadily favours neither. The sentence at the end of a run follows
from the pairs alone.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tuner.evaluate import Launcher
from tuner.journal import Header, Journal, Pair, Study
from tuner.meters import MeterOptions
from tuner.space import Value
from tuner.summary import percent_text, student_t
from tuner.trial import QUALITIES, Proposal, Quality, Trial

Worth = Callable[[Trial], float | None]
"""Joules per unit of a trial, or None."""


@dataclass(frozen=True)
class Saving:
    """What the pairs show.

    `ratio` is best over default, with the ends of its two-sided 95 % interval. Assumes that the logarithms
    of the pairs' ratios are independent and near normal: Student's t over the pairs. Where the energy is an
    estimate, the interval spans those at both ends of the power range as well.
    """

    ratio: float
    low: float
    high: float
    pairs: int
    quality: Quality
    """The worst among the runs."""
    best_joules_per_unit: float
    """Geometric mean of the best's fresh runs."""

    @property
    def shown(self) -> bool:
        """Whether the whole interval lies below the default."""
        return self.high < 1


def pair_order(number: int) -> bool:
    """Whether the default comes first in pair `number`: ABBA, so that steady drift cancels over two pairs."""
    return number % 2 == 0


def saving(pairs: Sequence[Pair], header: Header) -> Saving | None:
    """The saving that `pairs` show; None below two pairs in which both sides were measured."""
    sides = [(p.default, p.best) for p in pairs if p.default.joules_per_unit and p.best.joules_per_unit]
    if len(sides) < 2:
        return None
    quality = max((q for side in sides for t in side if (q := t.quality)), key=QUALITIES.index)
    values: list[Worth] = [lambda t: t.joules_per_unit]
    if quality == "estimated":
        values += _at_the_ends(header)
    intervals = [_interval(sides, value) for value in values]
    return Saving(
        ratio=intervals[0][0],
        low=min(low for _, low, _ in intervals),
        high=max(high for _, _, high in intervals),
        pairs=len(sides),
        quality=quality,
        best_joules_per_unit=statistics.geometric_mean([b.joules_per_unit or 0.0 for _, b in sides]),
    )


def _interval(sides: Sequence[tuple[Trial, Trial]], value: Worth) -> tuple[float, float, float]:
    """Ratio of best over default with the ends of its 95 % interval."""
    logs = [math.log(b / d) for default, best in sides if (d := value(default)) and (b := value(best))]
    mean = statistics.fmean(logs)
    half = student_t(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def _at_the_ends(header: Header) -> list[Worth]:
    """Joules per unit at both ends of an estimate's power range, from each window's wall and CPU seconds."""
    from tuner.meters.estimate import PowerModel

    model = PowerModel.of(MeterOptions.from_record(header.meter_options), int(header.machine.get("cores_logical", "1")))

    def worth(end: PowerModel) -> Worth:
        def of(trial: Trial) -> float | None:
            windows = [(m, m.cpu_seconds) for m in trial.valid if m.cpu_seconds is not None]
            if len(windows) < len(trial.valid):
                return trial.joules_per_unit
            joules = sum(end.reading(m.seconds, cpu).microjoules for m, cpu in windows) / 1e6
            return joules / sum(m.work.units for m, _ in windows)

        return of

    return [worth(end) for end in model.extremes()]


def verdict(found: Saving | None, done: int, planned: int, trial: int | None = None) -> str:
    """The last sentence of a study, from `done` of `planned` pairs of trial `trial` and the default."""
    if not planned:
        return "Not confirmed, so no saving is claimed."
    if done < planned:
        return f"No saving is claimed: {done} of {planned} fresh pairs are done."
    if found is None:
        return "No saving shown: the confirmation could not be measured."
    interval = f"95 % CI {percent_text(1 - found.high)} to {percent_text(1 - found.low)}"
    label = {
        "measured": "",
        "estimated": ", estimated from CPU time over the whole power range and not measured",
    }.get(found.quality, f", {found.quality}")
    beside = f"({interval}, {found.pairs} fresh pairs{label})"
    who = "The best setting" if trial is None else f"Trial {trial}"
    if not found.shown:
        return f"No saving shown: {who[0].lower()}{who[1:]} against the default {beside}."
    verb = (
        "saves"
        if found.quality == "measured"
        else f"saves {'an' if found.quality == 'estimated' else 'a'} {found.quality}"
    )
    return f"{who} {verb} {percent_text(1 - found.ratio)} {beside}."


def concluded(study: Study) -> str | None:
    """The last sentence of a recorded study; None where nothing was confirmed."""
    if not study.pairs:
        return None
    last = study.pairs[-1]
    pairs = pairs_of(study, last.config, last.planned)
    said = verdict(saving(pairs, here(study)), len(pairs), last.planned, last.best.number)
    best = study.history.best
    if best and best.config != last.config:
        said += f" Trial {best.number} is better in the search and was not confirmed."
    plans = {(json.dumps(p.config, sort_keys=True), p.planned) for p in study.pairs}
    if len(plans) > 1:
        said += f" This is confirmation {len(plans)} of this study: each is one more chance to see what is not there."
    return said


def here(study: Study) -> Header:
    """The header as it holds for the newest segment: its pairs ran on that segment's machine."""
    return replace(study.header, machine=study.machine)


def pairs_of(study: Study, config: Mapping[str, Value], planned: int) -> list[Pair]:
    """The pairs of this plan that the study holds for `config` in its newest segment.

    Pairs of another plan do not count: who looks at four and then asks for eight has looked twice,
    and twice the chances to see a saving are not in the interval.
    """
    return [p for p in study.pairs if p.config == config and p.planned == planned and p.best.segment == study.segment]


def confirm(
    journal: Journal, launcher: Launcher, default: Trial, best: Trial, pairs: int, began: Callable[[int], None]
) -> Saving | None:
    """Measure fresh pairs until the journal holds `pairs` of them, and say what they show.

    Each pair is written as soon as it is complete: a confirmation that was cut short goes on.
    """
    while (number := len(done := pairs_of(journal.study, best.config, pairs))) < pairs:
        began(number)
        fresh = replace(launcher, log_name=f"confirm-{number + 1}.log")
        first, second = (default, best) if pair_order(number) else (best, default)
        runs = {t.number: fresh(t.number, _again(t)) for t in (first, second)}
        journal.append(
            Pair(
                number=number,
                default=runs[default.number],
                best=runs[best.number],
                default_first=first is default,
                config=best.config,
                planned=pairs,
            )
        )
    return saving(done, here(journal.study))


def _again(trial: Trial) -> Proposal:
    return Proposal(config=trial.config, source=trial.proposal.source, reason=f"confirms trial {trial.number}")
