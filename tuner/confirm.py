"""The only source of a claim: default and best measured again, in pairs, after the search is over.

The best of many noisy trials looks better than it is: of twenty equal configurations measured once
with a spread of 2 %, the best seems to save 3.7 %. So the figures of the search are never a claim.
Fresh pairs are: each pair runs the default and the best in new processes, in ABBA order, so that a
machine that warms up or slows down steadily favours neither. The sentence at the end of a run follows
from the pairs alone.

What is confirmed may change more than it must. `prune` then asks, by pairs of their own, whether changes
can go back to their defaults without losing the gain.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tuner.evaluate import NO_VALID_WINDOW, Launcher
from tuner.intervals import CONFIDENCE, LEAST_VALUES, paired_interval
from tuner.journal import Header, Journal, Pair, Prune, Study
from tuner.meters import MeterOptions
from tuner.space import Config, Refused, SearchSpace, Value
from tuner.study import FAILURES_IN_A_ROW
from tuner.summary import effects, loss_text, percent_text, quality_loss, ratio_text
from tuner.trial import QUALITIES, History, Proposal, Quality, Trial

Worth = Callable[[Trial], float | None]
"""Joules per unit of a launch, or None."""

Sides = Sequence[tuple[Trial, Trial]]
"""Reference and candidate of each pair in which both were measured."""

LEAST_PAIRS = LEAST_VALUES

MATTERS = 0.01
"""A change that is worth less than this goes back to its default."""

BOUND = 0.95
"""Probability with which dropping a change costs less than `MATTERS`, one-sided."""

POWER_AND_BOUND = 1.645 + 0.842
"""Normal quantiles: 95 % one-sided, and 80 % to get there when a change does nothing."""

MOST_PRUNE_PAIRS = 16
MOST_PRUNE_TESTS = 6


# --- what pairs show -------------------------------------------------------------------------


@dataclass(frozen=True)
class Saving:
    """What the pairs show.

    `ratio` is best over default, with the ends of its two-sided 95 % interval: by sign flips below eight
    pairs, by Student's t from there (`tuner.intervals.paired_interval`). Assumes that the logarithms of the
    pairs' ratios are independent, and symmetric or near normal. Where the energy is an estimate, the
    interval spans those at both ends of the power range as well.
    """

    ratio: float
    low: float | None
    """None, like `high`, where the pairs are too few for any interval."""
    high: float | None
    pairs: int
    quality: Quality
    """The worst among the runs."""
    best_joules_per_unit: float
    """Geometric mean of the best's fresh runs."""
    confidence: float = CONFIDENCE
    """Of the interval: higher for a second confirmation, whose chance to err adds to that of the first."""
    steps: float | None = None
    """How far the steps of a coarse counter alone may move the ratio (in ln); part of the interval."""
    quality_loss: float | None = None
    """Mean over the best's fresh runs, in nats per token or as 1 - SSIM; None where they did not measure it."""
    loss: str = ""
    """The same as a clause; empty where the best changes no parameter that can cost quality."""

    @property
    def shown(self) -> bool:
        """Whether the whole interval lies below the default."""
        return self.high is not None and self.high < 1


def pair_order(number: int) -> bool:
    """Whether the default comes first in pair `number`: ABBA, so that steady drift cancels over two pairs."""
    return number % 2 == 0


def saving(pairs: Sequence[Pair], header: Header, confidence: float = CONFIDENCE) -> Saving | None:
    """The saving that `pairs` show; None where no pair was measured on both sides."""
    sides = [(p.default, p.best) for p in pairs if p.default.joules_per_unit and p.best.joules_per_unit]
    if not sides:
        return None
    mean, low, high = _compared(sides, header, confidence)
    best = [b for _, b in sides]
    return Saving(
        ratio=math.exp(mean),
        low=None if low is None else math.exp(low),
        high=None if high is None else math.exp(high),
        pairs=len(sides),
        quality=_quality(sides),
        best_joules_per_unit=statistics.geometric_mean([b.joules_per_unit or 0.0 for b in best]),
        confidence=confidence,
        steps=_steps(sides),
        quality_loss=quality_loss(best),
        loss=loss_text(header.space, best),
    )


def _quality(sides: Sides) -> Quality:
    return max((q for side in sides for t in side if (q := t.quality)), key=QUALITIES.index)


def _compared(sides: Sides, header: Header, confidence: float) -> tuple[float, float | None, float | None]:
    """Mean of ln(candidate / reference) and the ends of its two-sided interval.

    For an estimate the interval spans both ends of the power range; for a counter that moves in coarse
    steps it is widened by what the steps may hide, which repeating does not average out.
    """
    values: list[Worth] = [lambda t: t.joules_per_unit]
    if _quality(sides) == "estimated":
        values += _at_the_ends(header)
    logs = [_logs(sides, value) for value in values]
    found = [paired_interval(each, confidence) for each in logs]
    known = [ends for ends in found if ends is not None]
    mean = statistics.fmean(logs[0])
    if len(known) < len(values):
        return mean, None, None
    steps = _steps(sides) or 0.0
    return mean, min(low for low, _ in known) - steps, max(high for _, high in known) + steps


def _steps(sides: Sides) -> float | None:
    """How far the steps of a counter may move the mean of ln(candidate / reference); None where it has none.

    Equal settings meet the same steps each time, so the errors are taken as shared by all pairs, and as opposed
    on the two sides.
    """
    if _quality(sides) == "estimated":
        return None
    moved = statistics.fmean(sum(_relative_bound(t) for t in side) for side in sides)
    return moved or None


def _relative_bound(trial: Trial) -> float:
    ends, value = trial.joules_per_unit_bounds, trial.joules_per_unit
    return (ends[1] - ends[0]) / 2 / value if ends and value else 0.0


def _logs(sides: Sides, value: Worth) -> list[float]:
    return [math.log(b / a) for first, second in sides if (a := value(first)) and (b := value(second))]


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


# --- saying it -------------------------------------------------------------------------------


def verdict(
    found: Saving | None, done: int, planned: int, trial: int | None = None, failures: Failures | None = None
) -> str:
    """The last sentence of a study, from `done` of `planned` pairs of trial `trial` and the default."""
    if not planned:
        return "Not confirmed, so no saving is claimed."
    failures = failures or Failures()
    who = "The best setting" if trial is None else f"Trial {trial}"
    last = f" The last launch that failed: {failures.last}." if failures.last else ""
    if done < planned:
        return f"No saving is claimed: {done} of {planned} fresh pairs are done.{last}"
    if failures.of_best:
        return (
            f"No saving is claimed: {who[0].lower()}{who[1:]} failed in {failures.of_best} of {done} fresh launches"
            f" ({failures.last_of_best}). A setting that fails now and then is none to run."
        )
    if found is None:
        return f"No saving shown: the confirmation could not be measured.{last}"
    label = {
        "measured": "",
        "estimated": ", estimated from CPU time over the whole power range and not measured",
    }.get(found.quality, f", {found.quality}")
    if found.steps is not None and found.steps > MATTERS / 10:
        label += f", of which the counter's own steps are ± {percent_text(math.expm1(found.steps))}"
    pairs = f"{found.pairs} pairs" if found.pairs == done else f"{found.pairs} of {done} pairs, the others unmeasured"
    level = f"{100 * found.confidence:.3g} %"
    if found.low is None or found.high is None:
        return f"No saving shown: {pairs} are too few for an interval of {level}{label}.{last}"
    beside = f"{level} CI {interval_text(found.low, found.high)}, {pairs}{label}"
    if not found.shown:
        return f"No saving shown: that of {who[0].lower()}{who[1:]} has the {beside}."
    estimated = "an estimated " if found.quality == "estimated" else ""
    lost = f"; {found.loss}" if found.loss else ""
    return f"{who} saves {estimated}{percent_text(1 - found.ratio)} ({beside}){lost}."


def interval_text(low: float, high: float) -> str:
    """A ratio's interval as that of the saving: `27 to 35 %`; a saving below -1000 % has no figure."""
    worst, most = 1 - high, 1 - low
    if most < -10:
        return "below -1000 %"
    ends = [percent_text(worst), percent_text(most)]
    if ends[0] == ends[1]:
        ends = [f"{100 * worst:.1f} %", f"{100 * most:.1f} %"]
    return f"{'below -1000' if worst < -10 else ends[0].removesuffix(' %')} to {ends[1]}"


@dataclass(frozen=True)
class Failures:
    """Launches of a confirmation that were not measured."""

    of_best: int = 0
    """Crashes of the best where the default of the same pair ran: they speak against it."""
    last_of_best: str = ""
    last: str = ""
    """The newest cause, also of the default and of windows that did not count."""

    @classmethod
    def among(cls, pairs: Sequence[Pair]) -> Failures:
        """Count them."""
        crashes = [p.best.error for p in pairs if crashed(p.best) and not crashed(p.default)]
        causes = [t.error for p in pairs for t in (p.default, p.best) if t.error is not None]
        return cls(len(crashes), crashes[-1] or "" if crashes else "", causes[-1] if causes else "")


def crashed(launch: Trial) -> bool:
    """Whether the engine failed; windows that did not count are the machine's fault and not the setting's."""
    return launch.error is not None and not launch.error.startswith(NO_VALID_WINDOW)


def concluded(study: Study) -> str | None:
    """The last sentences of a recorded study; None where nothing was confirmed."""
    if not study.pairs:
        return None
    last = study.pairs[-1]
    pairs = pairs_of(study, last.config, last.planned)
    found, done = shown_by(study)
    said = verdict(found, done, last.planned, last.best.number, Failures.among(pairs))
    best = study.history.best
    if best and best.config != last.config:
        said += f" Trial {best.number} is better in the search and was not confirmed."
    if (count := len(_plans(study))) > 1:
        said += f" This is confirmation {count} of this study; its interval is wider, because each is one more chance."
    for attempt in shortened(study)[1]:
        if attempt.keeps_the_gain and attempt.bound is not None:
            most = percent_text(max(attempt.bound - 1, 0.0))
            said += (
                f" {', '.join(attempt.dropped)} can stay at default: at most {most} more{_regained(study, attempt)}."
            )
    return said


def _regained(study: Study, attempt: Shortened) -> str:
    """What a shorter setting still loses in quality, as a clause; empty where it put back nothing that can cost any."""
    if not {str(p["name"]) for p in study.space if p.get("effect") == "lossy"}.intersection(attempt.dropped):
        return ""
    runs = [p.shorter for p in study.prunes if p.config == attempt.config and p.shorter.segment == study.segment]
    return f", {loss_text(study.space, runs) or 'and no quality lost'}"


def _plans(study: Study) -> set[str]:
    """What was confirmed so far: each look at fresh pairs counts once."""
    return {json.dumps([p.config, p.planned, p.best.segment], sort_keys=True) for p in study.pairs}


def shown_by(study: Study) -> tuple[Saving | None, int]:
    """What the newest confirmation shows, and how many of its pairs are done; no claim while some are missing.

    The first has the confidence 95 %, each further one half the chance to err of the one before: all of them
    together call equal settings a saving in at most 5 % of studies, however often somebody looks again.
    """
    if not study.pairs:
        return None, 0
    last = study.pairs[-1]
    pairs = pairs_of(study, last.config, last.planned)
    if len(pairs) < last.planned or Failures.among(pairs).of_best:
        return None, len(pairs)
    return saving(pairs, here(study), 1 - (1 - CONFIDENCE) / 2 ** (len(_plans(study)) - 1)), len(pairs)


def here(study: Study) -> Header:
    """The header as it holds for the newest segment: its pairs ran on that segment's machine, in its space."""
    return replace(study.header, machine=study.machine, space=study.space)


# --- measuring pairs -------------------------------------------------------------------------


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

    Each pair is written as soon as it is complete: a confirmation that was cut short goes on. It ends early when
    a side failed in three pairs in a row: then something else is wrong.
    """
    made = 0
    while (number := len(done := pairs_of(journal.study, best.config, pairs))) < pairs:
        failed = [p.default.error or p.best.error for p in done[-min(made, FAILURES_IN_A_ROW) :] if made]
        if len(failed) == FAILURES_IN_A_ROW and all(failed):
            break
        made += 1
        began(number)
        default_first = pair_order(number)
        runs = _both(launcher, f"confirm-{number + 1}.log", default, best, first=default_first)
        journal.append(
            Pair(
                number=number,
                default=runs[0],
                best=runs[1],
                default_first=default_first,
                config=best.config,
                planned=pairs,
            )
        )
    return shown_by(journal.study)[0]


def _both(launcher: Launcher, log: str, a: Trial, b: Trial, *, first: bool) -> tuple[Trial, Trial]:
    """Fresh launches of `a` and `b`; `first`: `a` runs first."""
    fresh = replace(launcher, log_name=log)
    if first:
        of_a = fresh(a.number, _again(a))
        return of_a, fresh(b.number, _again(b))
    of_b = fresh(b.number, _again(b))
    return fresh(a.number, _again(a)), of_b


def _again(trial: Trial) -> Proposal:
    return Proposal(config=trial.config, source=trial.proposal.source, reason=f"confirms trial {trial.number}")


# --- the shortest setting that keeps the gain --------------------------------------------------


@dataclass(frozen=True)
class Shortened:
    """What became of one attempt to put changes back to their defaults."""

    dropped: tuple[str, ...]
    ratio: float | None
    """Energy without these changes over that with them."""
    bound: float | None
    """With 95 % probability it is no more than this; None where it could not be measured."""
    pairs: int
    config: Config

    @property
    def keeps_the_gain(self) -> bool:
        return self.bound is not None and self.bound <= 1 + MATTERS

    @property
    def sentence(self) -> str:
        names = ", ".join(self.dropped)
        if self.ratio is None or self.bound is None:
            return f"{names}: kept, because it could not be measured without"
        places = 3 if self.bound < 1.1 else 2
        figures = (
            f"{ratio_text(self.ratio, places)} the energy, at most {ratio_text(self.bound, places)}"
            f" (95 %, {self.pairs} pairs)"
        )
        verb = "back at default" if self.keeps_the_gain else "kept"
        return f"{names}: {verb}; without: {figures}"


def shortened(study: Study) -> tuple[Config | None, tuple[Shortened, ...]]:
    """The shortest confirmed configuration, and every complete attempt that led to it; None without a saving."""
    found, _ = shown_by(study)
    if found is None or not found.shown:
        return None, ()
    config: Config = dict(study.pairs[-1].config)
    attempts = []
    for pairs in _attempts(study):
        if pairs[0].kept.config != config or len(pairs) < pairs[0].planned:
            continue
        attempt = _judged(pairs, here(study))
        attempts.append(attempt)
        if attempt.keeps_the_gain:
            config = dict(attempt.config)
    return config, tuple(attempts)


def _attempts(study: Study) -> Iterator[list[Prune]]:
    """The pairs of the newest segment, attempt by attempt, in the order they began."""
    found: dict[str, list[Prune]] = {}
    for pair in study.prunes:
        if pair.shorter.segment == study.segment:
            key = json.dumps([pair.kept.config, pair.config, pair.planned], sort_keys=True)
            found.setdefault(key, []).append(pair)
    yield from found.values()


def _judged(pairs: Sequence[Prune], header: Header) -> Shortened:
    sides = [(p.kept, p.shorter) for p in pairs if p.kept.joules_per_unit and p.shorter.joules_per_unit]
    last = pairs[-1]
    if not sides or any(crashed(p.shorter) for p in pairs):
        return Shortened(last.dropped, None, None, 0, dict(last.config))
    # The upper end of a two-sided 90 % interval is a one-sided 95 % bound.
    mean, _, high = _compared(sides, header, confidence=2 * BOUND - 1)
    bound = None if high is None else math.exp(high)
    return Shortened(last.dropped, math.exp(mean), bound, len(sides), dict(last.config))


def prune_pairs(study: Study) -> int | None:
    """How many pairs tell 1 % at the noise of the confirmation's own pairs, even; None where none were measured.

    n = ((z_0.95 + z_0.80) s / 0.01)^2, with s the standard deviation of the pairs' ln ratios: the bound then
    lies below 1 % in four of five attempts when a change does nothing.
    """
    if not study.pairs:
        return None
    last = study.pairs[-1]
    pairs = pairs_of(study, last.config, last.planned)
    logs = _logs([(p.default, p.best) for p in pairs], lambda t: t.joules_per_unit)
    if len(logs) < 2:
        return None
    needed = math.ceil((POWER_AND_BOUND * statistics.stdev(logs) / math.log1p(MATTERS)) ** 2)
    return max(LEAST_PAIRS, needed + needed % 2)


def prune(
    journal: Journal, launcher: Launcher, space: SearchSpace, pairs: int, began: Callable[[tuple[str, ...], int], None]
) -> None:
    """Ask of the changes in a confirmed setting whether they matter, until the journal holds the answer.

    `MOST_PRUNE_TESTS` attempts at most. What cannot be told to be worth less than 1 % stays.
    """
    while True:
        study = journal.study
        config, attempts = shortened(study)
        best = next((t for t in study.history.measured if t.config == study.pairs[-1].config), None)
        if config is None or best is None or len(attempts) >= MOST_PRUNE_TESTS:
            return
        names = _next_to_drop(space, study.history, config, attempts)
        if names is None:
            return
        kept = replace(best, config=config, repeats=())
        shorter = replace(kept, config={**config, **{name: space[name].default for name in names}})
        asked = (study.segment, config, shorter.config, pairs)
        done = [p for p in study.prunes if (p.shorter.segment, p.kept.config, p.config, p.planned) == asked]
        for number in range(len(done), pairs):
            began(names, number)
            kept_first = pair_order(number)
            log = f"prune-{len(attempts) + 1}-{number + 1}.log"
            runs = _both(launcher, log, kept, shorter, first=kept_first)
            journal.append(
                Prune(
                    number=number,
                    kept=runs[0],
                    shorter=runs[1],
                    kept_first=kept_first,
                    config=shorter.config,
                    dropped=names,
                    planned=pairs,
                )
            )


def _next_to_drop(
    space: SearchSpace, history: History, config: Config, attempts: Sequence[Shortened]
) -> tuple[str, ...] | None:
    """The parameters to put back next, or None when there is nothing more to ask.

    What the search saw a clear effect of is left alone. Of what it saw no effect of, or could not single out,
    first all together where they are several and not all of the changes, then one by one.
    """
    changed = [name for name in space.names if config[name] != space[name].default]
    if len(changed) < 2:
        return None
    worth = {e.parameter: e.ratio for e in effects(space, history) if e.value == config.get(e.parameter)}
    doubtful = [n for n in sorted(changed, key=lambda n: -worth.get(n, 1.0)) if worth.get(n, 1.0) > 1 - 2 * MATTERS]
    asked = {attempt.dropped for attempt in attempts}
    together = [tuple(doubtful)] if 2 <= len(doubtful) < len(changed) and not attempts else []
    alone = [(name,) for name in doubtful]
    return next((names for names in [*together, *alone] if names not in asked and _legal(space, config, names)), None)


def _legal(space: SearchSpace, config: Config, names: Sequence[str]) -> bool:
    try:
        space.check({**config, **{name: space[name].default for name in names}})
    except Refused:
        return False
    return True
