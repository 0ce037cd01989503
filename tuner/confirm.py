"""The only source of a claim: default and best measured again, in pairs, after the search is over.

The best of many noisy trials looks better than it is: of twenty equal configurations measured once
with a spread of 2 %, the best seems to save 3.7 %. So the figures of the search are never a claim.
Fresh pairs are: each pair runs the default and the best in new processes, in ABBA order, so that a
machine that warms up or slows down steadily favours neither. The sentence at the end of a run follows
from the pairs alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tuner.evaluate import Launcher
from tuner.journal import Journal, Pair, Study
from tuner.space import Value
from tuner.summary import percent_text, student_t
from tuner.trial import Proposal, Quality, Trial


@dataclass(frozen=True)
class Saving:
    """What the pairs show.

    `ratio` is best over default, with the ends of its two-sided 95 % interval. Assumes that the logarithms
    of the pairs' ratios are independent and near normal: Student's t over the pairs.
    """

    ratio: float
    low: float
    high: float
    pairs: int
    quality: Quality

    @property
    def shown(self) -> bool:
        return self.high < 1


def pair_order(number: int) -> bool:
    """Whether the default comes first in pair `number`: ABBA, so that steady drift cancels."""
    return number % 2 == 0


def saving(pairs: Sequence[Pair]) -> Saving | None:
    """The saving that `pairs` show; None below two pairs in which both sides were measured."""
    logs = [math.log(best / default) for pair in pairs if (ends := _ends(pair)) for default, best in [ends]]
    if len(logs) < 2:
        return None
    mean = statistics.fmean(logs)
    half = student_t(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    qualities = [q for p in pairs for t in (p.default, p.best) if (q := t.quality)]
    return Saving(
        ratio=math.exp(mean),
        low=math.exp(mean - half),
        high=math.exp(mean + half),
        pairs=len(logs),
        quality="measured" if all(q == "measured" for q in qualities) else "estimated",
    )


def _ends(pair: Pair) -> tuple[float, float] | None:
    default, best = pair.default.joules_per_unit, pair.best.joules_per_unit
    return (default, best) if default and best else None


def verdict(found: Saving | None, done: int, planned: int) -> str:
    """The last sentence of a study, from `done` of `planned` pairs."""
    if not planned:
        return "Not confirmed, so no saving is claimed."
    if done < planned:
        return f"No saving is claimed: {done} of {planned} fresh pairs are done."
    if found is None:
        return "No saving shown: the confirmation could not be measured."
    interval = f"95 % CI {percent_text(1 - found.high)} to {percent_text(1 - found.low)}"
    label = "" if found.quality == "measured" else ", estimated from CPU time and not measured"
    beside = f"({interval}, {found.pairs} fresh pairs{label})"
    if not found.shown:
        return f"No saving shown {beside}."
    verb = "Saves" if found.quality == "measured" else "Saves an estimated"
    return f"{verb} {percent_text(1 - found.ratio)} {beside}."


def concluded(study: Study) -> str | None:
    """The last sentence of a recorded study; None where nothing was confirmed."""
    if not study.pairs:
        return None
    last = study.pairs[-1]
    pairs = pairs_of(study, last.config, last.planned)
    return verdict(saving(pairs), len(pairs), last.planned)


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
    return saving(done)


def _again(trial: Trial) -> Proposal:
    return Proposal(config=trial.config, source=trial.proposal.source, reason=f"confirms trial {trial.number}")
