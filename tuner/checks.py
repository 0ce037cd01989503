"""Doubts about a measurement, as sentences: what was seen, why it matters, what to type next.

A doubt never changes a number and never takes a trial out. What is the same for every trial of a
study (short windows, an estimate) is said at the first trial that shows it and not again.
"""

from __future__ import annotations

from collections.abc import Callable

from tuner.repeats import stretch_of
from tuner.space import show
from tuner.summary import grouped, joules_text, number_text, percent_text, seconds_text, unit
from tuner.trial import History, Trial

COUNTER_PERIODS = {"gpu": 0.1, "cpu": 0.001, "dram": 0.001}
"""Seconds between two updates of an energy counter, by the domain's kind.

gpu: NVML's total-energy counter (ml.energy, "Measuring GPU energy: best practices"). cpu, dram: RAPL
(Intel SDM volume 3B, 16.10.1: about 1 ms)."""

PERIODS_IN_A_WINDOW = 100
"""A window begins and ends inside a period: over 100 of them the two ends are off by 1 % at most."""

LEAST_WINDOW_SECONDS = 2.0
SAMPLED_WINDOW_SECONDS = 30.0
"""Power that is sampled about once a second: thirty samples."""

LEAST_WINDOWS = 3
LARGEST_SPREAD = 0.05
LEAST_CPUS_BUSY = 0.05
MOST_CPUS_OF_OTHERS = 0.25
LARGEST_STEP = 0.01
"""Half the distance between the ends of a reading, as a share of it."""

LONGEST_LOAD = 20
"""Times the measured seconds."""


def doubts(trial: Trial, history: History) -> list[str]:
    """Why `trial` may be doubted, each a sentence with the next command; empty for a failed trial.

    `history` holds the trials before it, and may hold the trial itself.
    """
    if not trial.valid:
        return []
    earlier = [t for t in history.trials if t.number < trial.number and t.segment == trial.segment and t.valid]
    standing = [said for rule in _STANDING if (said := rule(trial)) and not any(rule(t) for t in earlier)]
    drift = _drift(trial, history)
    return standing + [said for rule in _OF_ONE_TRIAL if (said := rule(trial))] + ([drift] if drift else [])


Rule = Callable[[Trial], str | None]


def _short_windows(trial: Trial) -> str | None:
    if trial.quality in ("replayed", "simulated"):
        return None
    shortest = min(m.seconds for m in trial.valid)
    periods = {
        domain: period
        for m in trial.valid
        if m.quality == "measured"
        for domain in m.energy
        if (period := COUNTER_PERIODS.get(domain.rstrip("0123456789-")))
    }
    slowest = max(periods, key=lambda d: periods[d], default=None)
    if slowest is not None and shortest < PERIODS_IN_A_WINDOW * periods[slowest]:
        return (
            f"windows of {seconds_text(shortest)} hold {shortest / periods[slowest]:.0f} updates of the {slowest}"
            f" counter, so each reading may be off by {percent_text(periods[slowest] / shortest)};"
            f" measure longer: --window {PERIODS_IN_A_WINDOW * periods[slowest]:g}s"
        )
    if trial.quality == "sampled" and shortest < SAMPLED_WINDOW_SECONDS:
        return (
            f"windows of {seconds_text(shortest)} hold few samples of power; measure longer:"
            f" --window {SAMPLED_WINDOW_SECONDS:g}s"
        )
    if shortest < LEAST_WINDOW_SECONDS:
        return (
            f"windows of {seconds_text(shortest)} are short, one disturbance weighs much in them;"
            f" measure longer: --window {LEAST_WINDOW_SECONDS:g}s"
        )
    return None


def _few_windows(trial: Trial) -> str | None:
    count = len(trial.valid)
    if count >= LEAST_WINDOWS or trial.quality == "replayed":
        return None
    windows = "1 window says" if count == 1 else f"{count} windows say"
    return f"{windows} little about the spread; measure more of them: --windows 5"


def _estimate(trial: Trial) -> str | None:
    if trial.quality != "estimated" or trial.joules_per_unit_bounds is None:
        return None
    low, high = trial.joules_per_unit_bounds
    return (
        f"the energy is estimated from CPU time, not measured: anything from {joules_text(low)} to"
        f" {joules_text(high)} per {unit(trial)} is possible; `tune doctor` says what can be measured here"
    )


def _spread(trial: Trial) -> str | None:
    if trial.relative_sd is None or trial.relative_sd <= LARGEST_SPREAD:
        return None
    return (
        f"the windows differ by {percent_text(trial.relative_sd)} (standard deviation), so something else may be"
        f" running; close it, or measure more: --windows {max(2 * len(trial.valid), 5)}"
    )


def _repeated(trial: Trial) -> str | None:
    invalid = [m for m in trial.measurements if not m.valid]
    if not invalid:
        return None
    causes = "; ".join(grouped(cause for m in invalid for cause in m.invalid))
    return (
        f"{len(invalid)} of {len(trial.measurements)} windows did not count ({causes});"
        " if that goes on, `tune doctor` shows the state of each meter"
    )


def _failed_again(trial: Trial) -> str | None:
    failed = [r for r in trial.repeats if r.launch_joules_per_unit is None]
    if not failed:
        return None
    return (
        f"{len(failed)} of {1 + len(trial.repeats)} launches failed ({failed[-1].error}):"
        " a setting that fails now and then is none to run; --range keeps it out"
    )


def _not_steady(trial: Trial) -> str | None:
    warm_up = trial.warm_up
    if warm_up is None or warm_up.steady:
        return None
    longer = max(warm_up.seconds, 1.0)
    return (
        f"the engine was not steady after {seconds_text(warm_up.seconds)} of warm-up (its throughput or its"
        f" temperature still changed, or could not be watched for 5 s);"
        f" give it longer: --warm-up {longer:.0f}s..{3 * longer:.0f}s"
    )


def _bounds(trial: Trial) -> str | None:
    """A wall counter that moves in coarse steps, as far as that is told by its readings' bounds."""
    ends, value = trial.joules_per_unit_bounds, trial.joules_per_unit
    if trial.quality not in ("measured", "sampled") or not ends or not value:
        return None
    share = (ends[1] - ends[0]) / 2 / value
    if share <= LARGEST_STEP:
        return None
    return (
        f"the counter moves in steps, so each reading may be off by {percent_text(share)};"
        " measure longer windows with --window, or let the meter print watts"
    )


def _drift(trial: Trial, history: History) -> str | None:
    stretch = stretch_of(trial, history)
    if stretch is None:
        return None
    return stretch.sentence


def _not_as_asked(trial: Trial) -> str | None:
    # `auto` leaves the choice to the engine: what it chose is no doubt.
    other = [n for n, asked in trial.config.items() if asked not in (trial.effective.get(n, asked), "auto")]
    if not other:
        return None
    changed = [f"{n} is {show(trial.effective[n])}, asked for was {show(trial.config[n])}" for n in other]
    first = other[0]
    return (
        f"the engine runs something else than asked: {'; '.join(changed)};"
        f" keep it at what runs: --pin {first}={show(trial.effective[first])}"
    )


def _idle(trial: Trial) -> str | None:
    cpu_seconds = [m.cpu_seconds for m in trial.valid if m.cpu_seconds is not None]
    seconds = sum(m.seconds for m in trial.valid)
    on_gpu = any(domain.startswith(("gpu", "soc", "wall")) for m in trial.valid for domain in m.energy)
    if on_gpu or len(cpu_seconds) < len(trial.valid) or seconds <= 0:
        return None
    busy = sum(cpu_seconds) / seconds
    if busy >= LEAST_CPUS_BUSY:
        return None
    return (
        f"the engine kept {number_text(busy)} CPUs busy: the work is done where this meter does not look;"
        " `tune doctor` shows the meters, --meter chooses one"
    )


def _others(trial: Trial) -> str | None:
    others = [m.other_cpu_seconds for m in trial.valid if m.other_cpu_seconds is not None]
    if len(others) < len(trial.valid):
        return None
    busy = sum(others) / sum(m.seconds for m in trial.valid)
    if busy <= MOST_CPUS_OF_OTHERS:
        return None
    return (
        f"other processes kept {number_text(busy)} CPUs busy meanwhile: a counter counts them too, and the engine's"
        " threads that spin while they wait use several times the CPU; stop them (`top` shows which) and measure again"
    )


def _long_load(trial: Trial) -> str | None:
    measured = sum(m.seconds for m in trial.valid)
    if trial.load_seconds is None or trial.load_seconds <= LONGEST_LOAD * measured:
        return None
    return (
        f"loading took {seconds_text(trial.load_seconds)} for {seconds_text(measured)} measured;"
        f" longer windows cost little: --window {max(trial.load_seconds / 10, LEAST_WINDOW_SECONDS):.0f}s"
    )


_STANDING: tuple[Rule, ...] = (_short_windows, _few_windows, _estimate)
_OF_ONE_TRIAL: tuple[Rule, ...] = (
    _spread,
    _not_steady,
    _bounds,
    _others,
    _repeated,
    _failed_again,
    _not_as_asked,
    _idle,
    _long_load,
)
