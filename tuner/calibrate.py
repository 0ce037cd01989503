"""The noise of a machine: one configuration launched again and again, and what its counters are worth.

A search judges launches by how far two launches of one configuration lie apart, and a saving below that is
not seen. So that figure is measured, with the load, the windows and the meter that a study will use, and
kept for the studies that fit. Whatever an A/A comparison shows is an error of the method or of the machine.

What is kept are the launches themselves, the failed ones too. Sigma, drift and the A/A check follow from
them and are never stored as a truth of their own. Drift is reported and stays in sigma: a search suffers it.

Glossary
    launch    one start of the engine in a fresh process, measured over several windows
    sigma     standard deviation of ln(joules per unit) between launches of one configuration
    A/A       both sides of a comparison are the same configuration
    period    time between two changes of a domain's energy counter
    suspect   a domain whose counter and whose power, added up over time, disagree
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import msgspec

from tuner import __version__, machine
from tuner.assemble import Bench
from tuner.checks import PERIODS_IN_A_WINDOW
from tuner.control import split
from tuner.evaluate import Launcher
from tuner.files import state_folder
from tuner.intervals import CONFIDENCE, LEAST_VALUES, SIGN_FLIP_BELOW, paired_interval, student_t
from tuner.journal import Header
from tuner.meters import MeterOptions, open_meter
from tuner.space import Config, Refused, Value
from tuner.summary import (
    FIT_FREEDOM,
    joules_text,
    launch_text,
    number_text,
    percent_text,
    quality_text,
    seconds_of_next,
    seconds_text,
)
from tuner.trial import Idle, Meter, MeterError, Noise, Proposal, Target, Trial

# Version 1: one calibration a file.
FORMAT = 1

LEAST_LAUNCHES = FIT_FREEDOM + 1
"""Of fewer the noise is not believed (`tuner.summary.noise`): of three launches the ends of sigma's 95 % interval lie
a factor of 12 apart (chi-square)."""

FAILURES_IN_A_ROW = 3

DRIFT = 0.03
"""Change between the halves of a calibration from which a machine is said to drift, if noise does not explain it."""

POWER = 0.8
"""The share of confirmations that show a saving of the size that is called visible."""

CONFIRMATION_PAIRS = 8
SAVINGS = (0.05, 0.02, 0.01)
MOST_PAIRS = 1000
"""Beyond that nobody waits for the answer."""

POLL_SECONDS = 2.0
LOOKS_PER_UPDATE = 20
POLLED_UPDATES = 5
"""A counter is polled for this many of its declared updates where `POLL_SECONDS` hold fewer."""
LONGEST_POLL_SECONDS = 30.0

CHECK_SECONDS = 10.0
LEAST_CHECK_SECONDS = 5.0
"""Shorter than that, one update of a counter at each end is no longer small beside the tolerance."""
SAMPLE_SECONDS = 0.1
TOLERANCE = 0.10
"""Counter and integrated power agree on sound boards within a few per cent; zeus#181 reports 187 J against 327 J."""

NEARLY = 2
"""A calibration that differs in more than this many facts is one of something else."""

NOTHING = "none"
"""What stands for a fact that is not known, or an option that was not given."""

State = Literal["idle", "load"]
Report = Callable[[int, str], None]
Say = Callable[[str], None]


class CalibrationError(Exception):
    """Too little could be measured, or it cannot be kept. The message is one sentence."""


# --- what is kept ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Counter:
    """How often the counter of one domain moves."""

    domain: str
    declared_seconds: float
    """What the meter takes its period to be; 0.0 where it has no counter that ticks."""
    period_seconds: float | None = None
    """Median time between two changes; None where it does not tick or moved less than three times."""
    looks: int = 0
    changes: int = 0

    @property
    def bound(self) -> bool:
        """Whether it had moved at nearly every look, so that the period may be shorter than was seen."""
        return self.changes > 0.9 * self.looks


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The counter of one domain against the integral of its sampled power over the same seconds."""

    domain: str
    state: State
    """idle: before any engine was started; load: while an engine was being measured."""
    seconds: float
    counter_joules: float
    power_joules: float

    @property
    def difference(self) -> float:
        """How much more the counter says, as a share of what the power adds up to."""
        if self.power_joules == 0:
            return 0.0 if self.counter_joules == 0 else math.inf
        return self.counter_joules / self.power_joules - 1

    @property
    def suspect(self) -> bool:
        return abs(self.difference) > TOLERANCE


@dataclass(frozen=True)
class Drift:
    """ln of the energy in the last half of the launches over that in the first, with half its 95 % interval."""

    change: float
    half_width: float

    @property
    def beyond_noise(self) -> bool:
        return abs(self.change) > self.half_width

    @property
    def shown(self) -> bool:
        """Whether the machine changed, and by enough to matter."""
        return self.beyond_noise and abs(math.expm1(self.change)) > DRIFT


@dataclass(frozen=True)
class AaCheck:
    """The method of a confirmation, applied to one configuration: it must show no difference.

    `low` and `high` are the ends of the 95 % interval of the ratio of the sides; None with too few pairs.
    """

    pairs: int
    low: float | None = None
    high: float | None = None

    @property
    def passed(self) -> bool | None:
        return None if self.low is None or self.high is None else self.low <= 1 <= self.high


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """All launches of one configuration, and under which circumstances they hold."""

    started_unix: float
    workload: str
    machine: Mapping[str, str]
    identity: Mapping[str, str]
    meters: tuple[str, ...]
    meter_options: Mapping[str, object]
    target: Target
    windows: int
    """Of one launch."""
    window_seconds: float
    config: Config
    """The default, with what was pinned."""
    planned: int
    """Launches that were asked for."""
    trials: tuple[Trial, ...] = ()
    """Every launch in order, also those that failed; numbered from 0."""
    counters: tuple[Counter, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    notes: tuple[str, ...] = ()
    """Checks that could not be made, and why."""
    interrupted: bool = False
    tune_version: str = __version__

    @property
    def date(self) -> str:
        return time.strftime("%Y-%m-%d", time.localtime(self.started_unix))

    @property
    def launches(self) -> tuple[Trial, ...]:
        """Those that were measured. An estimate may read 0 J, which has no logarithm."""
        return tuple(t for t in self.trials if t.launch_joules_per_unit)

    @property
    def logs(self) -> list[float]:
        """ln(joules per unit) of each launch that was measured."""
        return [math.log(v) for t in self.launches if (v := t.launch_joules_per_unit)]

    @property
    def sigma(self) -> float:
        return statistics.stdev(self.logs)

    @property
    def degrees(self) -> int:
        return len(self.launches) - 1

    @property
    def window_sigma(self) -> float | None:
        """Standard deviation of ln(joules per unit) between the windows of one launch, pooled over the launches."""
        scatter, degrees = 0.0, 0
        for launch in self.launches:
            logs = [math.log(v) for m in launch.valid if (v := m.joules_per_unit)]
            if len(logs) > 1:
                scatter += statistics.variance(logs) * (len(logs) - 1)
                degrees += len(logs) - 1
        return math.sqrt(scatter / degrees) if degrees else None

    @property
    def drift(self) -> Drift | None:
        return drift(self.logs)

    @property
    def aa_check(self) -> AaCheck:
        return aa_check(self.launches)

    @property
    def suspects(self) -> tuple[str, ...]:
        """Domains whose counter and power disagree."""
        return tuple(dict.fromkeys(a.domain for a in self.agreements if a.suspect))

    @property
    def idle(self) -> Idle | None:
        return next((t.idle for t in self.trials if t.idle is not None), None)

    @property
    def noise(self) -> Noise:
        """What a study that fits may take over."""
        return Noise(self.sigma, self.degrees, f"calibration {self.date}")


# --- what follows from it --------------------------------------------------------------------


def _chi_square_exceeds(value: float, degrees: int) -> float:
    """P(X > value) for chi-square with integer degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions (1964), equations 26.4.4 (odd) and 26.4.5
    (even): finite sums, exact. Each term is taken through its logarithm, so that none overflows.
    """
    half = value / 2
    odd = degrees % 2
    first = 0.5 if odd else 0.0
    terms = (first + r for r in range(degrees // 2))
    total = math.fsum(math.exp(a * math.log(half) - half - math.lgamma(a + 1)) for a in terms)
    return math.erfc(math.sqrt(half)) + total if odd else total


@lru_cache(maxsize=256)
def chi_square(probability: float, degrees: int) -> float:
    """The quantile of chi-square: P(X <= result) = `probability`, for `probability` in (0, 1). By bisection."""
    if not (0 < probability < 1 and degrees >= 1):
        raise ValueError(f"expected probability in (0, 1) and degrees >= 1, got {probability} and {degrees}")
    low, high = 0.0, 1.0
    while 1 - _chi_square_exceeds(high, degrees) < probability:
        low, high = high, high * 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if 1 - _chi_square_exceeds(middle, degrees) < probability else (low, middle)
    return high


def sigma_interval(sigma: float, degrees: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of a standard deviation: degrees * s^2 / sigma^2 is chi-square for independent normal values."""
    tail = (1 - confidence) / 2
    low, high = (math.sqrt(degrees / chi_square(p, degrees)) for p in (1 - tail, tail))
    return sigma * low, sigma * high


def drift(logs: Sequence[float]) -> Drift | None:
    """The last half of the launches against the first; of an odd number the middle one is left out.

    Student's t for two samples with one pooled variance. None below two launches in each half.
    """
    half = len(logs) // 2
    if half < 2:
        return None
    first, last = logs[:half], logs[-half:]
    pooled = math.sqrt((statistics.variance(first) + statistics.variance(last)) / 2)
    return Drift(
        change=statistics.fmean(last) - statistics.fmean(first),
        half_width=student_t((1 + CONFIDENCE) / 2, 2 * half - 2) * pooled * math.sqrt(2 / half),
    )


def aa_check(launches: Sequence[Trial]) -> AaCheck:
    """Launches 0 and 1 are a pair, 2 and 3 the next, and the sides change places with each: ABBA ABBA ...

    A pair that lacks a launch does not count.
    """
    logs = {t.number: math.log(v) for t in launches if (v := t.launch_joules_per_unit)}
    numbers = [n for n in sorted(logs) if n % 2 == 0 and n + 1 in logs]
    differences = [(logs[n + 1] - logs[n]) * (-1 if n % 4 else 1) for n in numbers]
    if not differences or (interval := paired_interval(differences)) is None:
        return AaCheck(len(differences))
    return AaCheck(len(differences), *map(math.exp, interval))


def least_saving(pairs: int, sigma: float) -> float | None:
    """The least saving that `pairs` pairs will show with a probability of 80 %; None where they can show none.

    The ln of a pair's ratio scatters by sd = sqrt(2) sigma, having two launches. A 95 % interval by Student's t
    over n pairs then lies on one side of 0 with probability 80 % where the effect in ln is

        (t(.975, n - 1) + t(.8, n - 1)) sd / sqrt(n)

    (with sd 2 %: 4, 6, 10 and 34 pairs for effects of 5, 3, 2 and 1 %, as simulated). Below `SIGN_FLIP_BELOW`
    pairs all of them have to agree in sign, which they do with 80 % where Phi(effect / sd)^n = 0.8: exact for
    6 pairs, a little too cautious for 7.
    """
    effect = _least_effect(pairs, sigma)
    return None if effect is None else -math.expm1(-effect)


def _least_effect(pairs: int, sigma: float) -> float | None:
    if pairs < LEAST_VALUES:
        return None
    spread = math.sqrt(2) * sigma
    if pairs < SIGN_FLIP_BELOW:
        return spread * statistics.NormalDist().inv_cdf(POWER ** (1 / pairs))
    quantiles = student_t((1 + CONFIDENCE) / 2, pairs - 1) + student_t(POWER, pairs - 1)
    return quantiles * spread / math.sqrt(pairs)


def pairs_needed(saving: float, sigma: float) -> int:
    """The least even number of pairs that show `saving` with a probability of 80 %. Even, so that drift cancels."""
    effect = -math.log1p(-saving)
    # The normal distribution needs fewer pairs than Student's t: a place to start from.
    normal = statistics.NormalDist()
    quantiles = normal.inv_cdf((1 + CONFIDENCE) / 2) + normal.inv_cdf(POWER)
    start = max(LEAST_VALUES, 2 * math.floor(quantiles**2 * 2 * sigma**2 / effect**2 / 2))
    return next(n for n in itertools.count(start, 2) if (_least_effect(n, sigma) or 0.0) <= effect)


# --- counters --------------------------------------------------------------------------------


@runtime_checkable
class PowerMeter(Meter, Protocol):
    """A meter whose domains also tell their power, which the counters can be held against."""

    def watts(self) -> Mapping[str, float]:
        """Power of each domain now, in watts. A domain that has no such reading is left out. Raises `MeterError`."""


def periods(
    meter: Meter,
    *,
    seconds: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Counter, ...]:
    """How often each counter of `meter` moves, by looking often for about 2 s. Raises `MeterError`.

    A meter that computes its readings when it is asked, from CPU time or from sampled power, has no counter.
    """
    declared = meter.update_seconds if meter.quality == "measured" else 0.0
    if declared == 0:
        return tuple(Counter(domain=domain, declared_seconds=0.0) for domain in meter.domains())
    length = min(max(POLL_SECONDS, POLLED_UPDATES * declared), LONGEST_POLL_SECONDS)
    began = seconds()
    last = {domain: reading.microjoules for domain, reading in meter.read().items()}
    moved: dict[str, list[float]] = {domain: [] for domain in last}
    looks = 0
    while (now := seconds()) - began < length:
        sleep(declared / LOOKS_PER_UPDATE)
        looks += 1
        for domain, reading in meter.read().items():
            if reading.microjoules != last[domain]:
                last[domain] = reading.microjoules
                moved[domain].append(now)
    return tuple(
        Counter(
            domain=domain,
            declared_seconds=declared,
            period_seconds=statistics.median(b - a for a, b in itertools.pairwise(times)) if len(times) > 2 else None,
            looks=looks,
            changes=len(times),
        )
        for domain, times in moved.items()
    )


def compare(
    meter: PowerMeter,
    state: State,
    wait: Callable[[float], bool],
    *,
    seconds: Callable[[], float] = time.perf_counter,
) -> tuple[Agreement, ...]:
    """Counters against power for `CHECK_SECONDS`, or until `wait` says that it is over.

    Power is read ten times a second and integrated by trapezoids.

    Args:
        meter: open, and read by nobody else.
        state: what the machine does meanwhile.
        wait: sleeps for so many seconds; true ends the comparison.
        seconds: the clock.

    Raises:
        MeterError: something could not be read.
    """
    before, watts = meter.read(), meter.watts()
    began = at = seconds()
    joules = dict.fromkeys(watts, 0.0)
    over = False
    while not over and at - began < CHECK_SECONDS:
        over = wait(SAMPLE_SECONDS)
        power, now = meter.watts(), seconds()
        # A domain that fell silent once has no integral.
        joules = {d: j + (watts[d] + power[d]) / 2 * (now - at) for d, j in joules.items() if d in power}
        watts, at = power, now
    after = meter.read()
    return tuple(
        Agreement(
            domain=domain,
            state=state,
            seconds=at - began,
            counter_joules=(after[domain].microjoules - before[domain].microjoules) / 1e6,
            power_joules=power_joules,
        )
        for domain, power_joules in joules.items()
    )


@dataclass(frozen=True)
class _Counters:
    """What the counters were found to be before anything runs."""

    counters: tuple[Counter, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    notes: tuple[str, ...] = ()
    with_power: tuple[str, ...] = ()
    """Meters that can be compared under load too."""


def _look(names: Sequence[str], options: MeterOptions, report: Report) -> _Counters:
    found = _Counters()
    for name in names:
        try:
            with contextlib.closing(open_meter((name,), options)) as meter:
                report(0, f"looking at the counters of {name}")
                found = replace(found, counters=(*found.counters, *periods(meter)))
                if meter.quality == "estimated":
                    note = f"{name}: computed from CPU time; there is no counter to check"
                elif meter.quality == "sampled":
                    note = f"{name}: adds up power itself; there is no counter to hold against it"
                elif not isinstance(meter, PowerMeter):
                    note = f"{name}: has no reading of power to hold its counters against"
                else:
                    report(0, f"comparing {name} with its power, idle")
                    agreements = compare(meter, "idle", threading.Event().wait)
                    found = replace(
                        found, agreements=(*found.agreements, *agreements), with_power=(*found.with_power, name)
                    )
                    continue
        except MeterError as error:
            note = f"{name}: its counters could not be checked: {str(error).removeprefix(f'{name}: ')}"
        found = replace(found, notes=(*found.notes, note))
    return found


@dataclass
class _UnderLoad:
    """Compares counters with power beside a launch, from when it begins to measure. Takes the place of its report.

    The meter is opened here a second time; the worker's own is not touched. Ten readings a second are what a
    study's telemetry takes as well, only more of them.
    """

    names: tuple[str, ...]
    options: MeterOptions
    report: Report
    agreements: tuple[Agreement, ...] = ()
    notes: tuple[str, ...] = ()
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __call__(self, number: int, phase: str) -> None:
        # Not `measuring idle power`, during which nothing is asked of the engine.
        measuring = re.match(r"measuring \d", phase) is not None
        if measuring and self._thread is None:
            self._thread = threading.Thread(target=self._compare, name="calibrate", daemon=True)
            self._thread.start()
        elif not measuring and self._thread is not None:
            self._over.set()
        self.report(number, phase)

    def end(self) -> None:
        """Nothing is read after this returns."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _compare(self) -> None:
        for name in self.names:
            try:
                with contextlib.closing(open_meter((name,), self.options)) as meter:
                    assert isinstance(meter, PowerMeter)
                    found = compare(meter, "load", self._over.wait)
            except MeterError as error:
                self.notes += (f"{name}: its counters could not be checked under load: {error}",)
                continue
            if found and found[0].seconds < LEAST_CHECK_SECONDS:
                note = (
                    f"{name}: not compared with its power under load: the launch measured for"
                    f" {seconds_text(found[0].seconds)} and {seconds_text(LEAST_CHECK_SECONDS)} are needed;"
                    " use more windows or longer ones"
                )
                self.notes += (note,)
            else:
                self.agreements += found


# --- running it ------------------------------------------------------------------------------


def run_calibration(
    bench: Bench,
    header: Header,
    launcher: Launcher,
    launches: int,
    *,
    report: Report = lambda _number, _phase: None,
    say: Say = lambda _text: None,
    keep: Callable[[Calibration], None] = lambda _calibration: None,
) -> Calibration:
    """Launch the default configuration `launches` times, each in a fresh worker.

    Three failures in a row end it: something other than noise is wrong.

    Args:
        bench: as `prepare` made it.
        header: as `prepare` completed it.
        launcher: measures one launch; its `report` is replaced, and idle power is asked of it until it is known.
        launches: at least 4.
        report: told the launch's number and phase.
        say: told a sentence after each launch.
        keep: called once, with the calibration; also before an interruption goes on its way, when what was
            measured by then is enough to keep.

    Raises:
        Refused: `launches` is too small.
        CalibrationError: fewer than 4 launches could be measured.
    """
    if launches < LEAST_LAUNCHES:
        raise Refused(f"--launches {launches}: expected {LEAST_LAUNCHES} or more, since fewer show no spread")
    options = MeterOptions.from_record(header.meter_options)
    found = Calibration(
        started_unix=time.time(),
        workload=header.workload,
        machine=dict(bench.machine),
        identity=dict(bench.identity),
        meters=header.meters,
        meter_options=dict(header.meter_options),
        target=header.target,
        windows=header.plan.windows,
        window_seconds=header.plan.window_seconds or 0.0,
        config=bench.space.default(),
        planned=launches,
    )
    try:
        looked = _look(header.meters, options, report)
        found = replace(found, counters=looked.counters, agreements=looked.agreements, notes=looked.notes)
        if looked.with_power:
            # A launch of its own, which counts for nothing else: asking for power ten times a second disturbs it.
            say("one launch more, to hold the counter against its power")
            beside = _UnderLoad(looked.with_power, options, report)
            tried = _launch(replace(launcher, idle_seconds_for=lambda _number: 0.0), 0, found, beside)
            if not beside.agreements and not beside.notes:
                names = " and ".join(looked.with_power)
                beside.notes += (
                    f"{names}: not compared with power under load: the launch for it {launch_text(tried)}",
                )
            found = replace(
                found, agreements=(*found.agreements, *beside.agreements), notes=(*found.notes, *beside.notes)
            )
        for number in range(launches):
            trial = _launch(launcher, number, found, _UnderLoad((), options, report))
            found = replace(found, trials=(*found.trials, trial))
            say(f"launch {number + 1} of {launches}: {launch_text(trial)}")
            if number == 0 and trial.launch_joules_per_unit:
                say(f"the others take about {seconds_text((launches - 1) * seconds_of_next(trial))} together")
            last = found.trials[-FAILURES_IN_A_ROW:]
            if len(last) == FAILURES_IN_A_ROW and not any(t.launch_joules_per_unit for t in last):
                say(f"{FAILURES_IN_A_ROW} launches failed in a row: no more are started")
                break
    except BaseException:
        # Whatever it was, a signal or a full disk: what was measured is not thrown away for it.
        _cut_short(found, say, keep)
        raise
    if len(found.launches) < LEAST_LAUNCHES:
        raise CalibrationError(
            f"{len(found.launches)} of {len(found.trials)} launches were measured, and {LEAST_LAUNCHES} are needed to"
            f" see how far they scatter: {_failures_text(found)}"
        )
    keep(found)
    return found


def _launch(launcher: Launcher, number: int, found: Calibration, beside: _UnderLoad) -> Trial:
    proposal = Proposal(config=found.config, source="default", reason="calibration")
    if found.idle is not None:
        launcher = replace(launcher, idle_seconds_for=lambda _number: 0.0)
    try:
        return replace(launcher, report=beside)(number, proposal)
    finally:
        beside.end()


def _cut_short(found: Calibration, say: Say, keep: Callable[[Calibration], None]) -> None:
    count = len(found.launches)
    if count < LEAST_LAUNCHES:
        say(f"stopped; {count} measured launches are too few to keep ({LEAST_LAUNCHES} are needed)")
        return
    say(f"stopped; {count} of {found.planned} launches are kept as a calibration of {count - 1} degrees of freedom")
    keep(replace(found, interrupted=True))


# --- what is said of it ----------------------------------------------------------------------


def sentences(calibration: Calibration) -> list[tuple[str, str]]:
    """Rows for the screen: what each says about, and what it says."""
    c = calibration
    rows = [
        ("launches", _count_text(c)),
        ("energy", f"{_energy_text(c)}, geometric mean"),
        ("noise", _sigma_text(c)),
        ("drift", _drift_text(c.drift)),
        ("A/A check", _aa_text(c.aa_check)),
        (f"{CONFIRMATION_PAIRS} pairs show", _least_text(c.sigma)),
        ("pairs needed", ", ".join(f"{_pairs_text(s, c.sigma)} for a saving of {100 * s:g} %" for s in SAVINGS)),
    ]
    rows += [(f"counter {counter.domain}", text) for counter in c.counters if (text := _counter_text(counter))]
    if advice := _window_advice(c):
        rows.append(("windows", advice))
    rows += [(f"{a.domain} {a.state}", _agreement_text(a)) for a in c.agreements]
    rows += [("not checked", note) for note in c.notes]
    if idle := c.idle:
        label = "" if idle.quality == "measured" else f", {idle.quality}"
        powers = f"{number_text(idle.machine_watts)} W without an engine, {number_text(idle.loaded_watts)} W with one"
        rows.append(("idle power", f"{powers} loaded and waiting{label}"))
    return rows


def _failures_text(c: Calibration) -> str:
    failed = [t for t in c.trials if not t.launch_joules_per_unit]
    return "; ".join(f"launch {t.number + 1} {launch_text(t)}" for t in failed)


def _count_text(c: Calibration) -> str:
    text = f"{len(c.launches)} of {c.planned} measured"
    if c.interrupted:
        text += f", interrupted after {len(c.trials)}"
    return f"{text}; {failures}" if (failures := _failures_text(c)) else text


def _energy_text(c: Calibration) -> str:
    first = c.launches[0]
    mean = joules_text(math.exp(statistics.fmean(c.logs)))
    return " ".join(filter(None, (f"{mean}/{first.valid[0].work.unit}", quality_text(first))))


def _sigma_text(c: Calibration) -> str:
    low, high = sigma_interval(c.sigma, c.degrees)
    text = (
        f"{percent_text(c.sigma)} between launches (standard deviation, 95 % CI {percent_text(low)} to"
        f" {percent_text(high)}, {c.degrees} degrees of freedom)"
    )
    return text if c.window_sigma is None else f"{text}, {percent_text(c.window_sigma)} between windows of one launch"


def _change_text(change: float) -> str:
    """A difference in ln as people say it."""
    return f"{percent_text(abs(math.expm1(change)))} {'more' if change > 0 else 'less'}"


def _drift_text(found: Drift | None) -> str:
    if found is None:
        return "too few launches to tell (4 are needed)"
    ends = [percent_text(math.expm1(found.change + sign * found.half_width)) for sign in (-1, 1)]
    text = (
        f"the last half of the launches took {_change_text(found.change)} than the first (95 % CI {' to '.join(ends)})"
    )
    if found.shown:
        return (
            f"THIS MACHINE DRIFTS: {text}. The noise above holds it; let the machine warm up or calm down, then"
            " calibrate again"
        )
    return f"{text}: {'more than noise, but little' if found.beyond_noise else 'no drift shown'}"


def _aa_text(check: AaCheck) -> str:
    if check.low is None or check.high is None:
        few = "1 pair is" if check.pairs == 1 else f"{check.pairs} pairs are"
        return f"{few} too few to check; --launches {2 * LEAST_VALUES} makes {LEAST_VALUES}"
    ends = f"95 % CI of the difference {percent_text(check.low - 1)} to {percent_text(check.high - 1)}"
    if check.passed:
        return f"passed: one configuration against itself shows no difference ({ends}, {check.pairs} pairs)"
    return (
        f"FAILED: one configuration against itself shows a difference ({ends}, {check.pairs} pairs), which chance"
        " alone does once in 20 calibrations; repeat it, and claim nothing here if it fails again"
    )


def _least_text(sigma: float) -> str:
    least = least_saving(CONFIRMATION_PAIRS, sigma)
    return f"a saving of {percent_text(least or 0.0)} or more, in 4 of 5 confirmations"


def _pairs_text(saving: float, sigma: float) -> str:
    pairs = pairs_needed(saving, sigma)
    return str(pairs) if pairs <= MOST_PAIRS else f"more than {MOST_PAIRS}"


def _counter_text(counter: Counter) -> str:
    if counter.declared_seconds == 0:
        return ""
    if counter.period_seconds is None:
        return f"moved {counter.changes} times in {counter.looks} looks, too seldom to know its period"
    milliseconds = number_text(1000 * counter.period_seconds)
    at_most = "at most " if counter.bound else ""
    return f"updates every {at_most}{milliseconds} ms ({number_text(1000 * counter.declared_seconds)} ms expected)"


def _window_advice(c: Calibration) -> str:
    slowest = max((counter.period_seconds or 0.0 for counter in c.counters), default=0.0)
    needed = math.ceil(PERIODS_IN_A_WINDOW * slowest)
    # Half a second of grace: a median that is found by polling is not exact.
    if PERIODS_IN_A_WINDOW * slowest <= c.window_seconds + 0.5:
        return ""
    return (
        f"one of {number_text(c.window_seconds)} s holds {c.window_seconds / slowest:.0f} updates of the slowest"
        f" counter; --window {needed}s holds {PERIODS_IN_A_WINDOW}"
    )


def _agreement_text(a: Agreement) -> str:
    text = (
        f"counter {joules_text(a.counter_joules)}, power {joules_text(a.power_joules)} over {seconds_text(a.seconds)}"
    )
    if not a.suspect:
        return f"{text}: they agree within {percent_text(TOLERANCE)}"
    return (
        f"{text}: SUSPECT, they should agree within {percent_text(TOLERANCE)}. Update the driver and calibrate again;"
        " until they agree, take no saving on this domain for real that another meter has not confirmed"
    )


# --- on disk ---------------------------------------------------------------------------------


class _File(msgspec.Struct, kw_only=True):
    format: int
    sigma: float | None = None
    """For people who look into the file; computed anew when it is read."""
    degrees: int | None = None
    calibration: msgspec.Raw


def calibrations_folder() -> Path:
    """Where calibrations are kept."""
    return state_folder() / "calibrations"


def store(calibration: Calibration, folder: Path | None = None) -> Path:
    """Write a calibration to a file of its own, whole or not at all, and on the disk before this returns.

    Raises:
        CalibrationError: it cannot be written.
    """
    where = folder or calibrations_folder()
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(calibration.workload).stem).strip(".-") or "calibration"
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(calibration.started_unix))
    content = msgspec.json.format(
        msgspec.json.encode(
            _File(
                format=FORMAT,
                sigma=calibration.sigma,
                degrees=calibration.degrees,
                calibration=msgspec.Raw(msgspec.json.encode(calibration)),
            )
        ),
        indent=1,
    )
    try:
        where.mkdir(parents=True, exist_ok=True)
        names = itertools.chain([f"{stem}-{stamp}"], (f"{stem}-{stamp}-{n}" for n in itertools.count(2)))
        return next(path for name in names if (path := _written(where / f"{name}.json", content)))
    except OSError as error:
        raise CalibrationError(
            f"{where}: the calibration cannot be written: {error.strerror};"
            f" set TUNE_STATE to another folder and calibrate again"
        ) from error


def _written(path: Path, content: bytes) -> Path | None:
    """`path` once it holds `content`; None where the name is taken, or is being taken by another process."""
    part = path.with_name(f"{path.name}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    try:
        with os.fdopen(descriptor, "wb") as file:
            if path.exists():
                return None
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    # The name is on the disk only when its folder is.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def read(path: Path) -> Calibration:
    """The calibration in a file.

    Raises:
        Refused: there is none, or it is of a newer format.
    """
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
        if file.format > FORMAT:
            raise Refused(f"{path}: written in format {file.format}, this tune reads up to format {FORMAT}")
        found = msgspec.json.decode(file.calibration, type=Calibration)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise Refused(f"{path}: no calibration ({error})") from error
    if len(found.launches) < LEAST_LAUNCHES:
        raise Refused(f"{path}: holds {len(found.launches)} measured launches, expected {LEAST_LAUNCHES} or more")
    return found


def find(header: Header, folder: Path | None = None) -> tuple[Noise | None, str | None]:
    """The noise of the newest calibration that fits a study, and what a person should know about it.

    Args:
        header: as `prepare` completed it.
        folder: where calibrations are kept; left out, `calibrations_folder()`.

    Returns:
        The noise, or None where no calibration fits; and a sentence, or None: how one that nearly fits
        differs, which files are damaged, and what speaks against the one that fits.
    """
    said: list[str] = []
    kept: list[Calibration] = []
    for path in sorted((folder or calibrations_folder()).glob("*.json")):
        try:
            kept.append(read(path))
        except Refused as fault:
            said.append(f"{fault}; it was skipped")
    # Newest first; of two at one moment, the later name.
    kept.sort(key=lambda c: c.started_unix)
    wanted = _conditions_of_header(header)
    compared = [(_differences(_conditions(c), wanted), c) for c in reversed(kept)]
    fitting = next((c for differences, c in compared if not differences), None)
    if fitting is not None:
        said += _caveats(fitting)
    elif compared:
        differences, nearest = min(compared, key=lambda pair: len(pair[0]))
        if len(differences) <= NEARLY:
            said.append(
                f"a calibration of {nearest.date} exists for {' and '.join(differences)};"
                " `tune calibrate` with the options of this run makes one that fits"
            )
    return None if fitting is None else fitting.noise, "; ".join(said) or None


def _caveats(c: Calibration) -> list[str]:
    found = [f"the counter of {', '.join(c.suspects)} is suspect"] if c.suspects else []
    if (change := c.drift) and change.shown:
        found.append(f"the machine drifted: {_change_text(change.change)} in the last half of the launches")
    if c.aa_check.passed is False:
        found.append("its A/A check failed")
    return [f"of the calibration of {c.date}: {', '.join(found)}"] if found else []


def _conditions(c: Calibration) -> dict[tuple[str, str], str]:
    """All that must agree, each under its group and the words that a person reads."""
    boards = sorted(key for key in c.machine if re.fullmatch(r"gpu\d+", key))
    load = {
        "--prompts": c.target.prompts,
        "--prompt-tokens": c.target.prompt_tokens,
        "--output-tokens": c.target.output_tokens,
        "--pixels": c.target.pixels,
        "--seed": c.target.seed,
        "--size": c.target.size,
        "--model": c.target.model,
        # Not --allow-lossy: it widens the search and leaves the load as it is.
    }
    groups: dict[str, Mapping[str, object]] = {
        "machine": {key.replace("_", " "): c.machine.get(key) for key in (*machine.MUST_MATCH, *boards)},
        "engine": {key.replace("_", " "): c.identity[key] for key in sorted(c.identity)},
        "meter": {
            "--meter": "+".join(c.meters),
            **{f"--{key.replace('_', '-')}": c.meter_options[key] for key in sorted(c.meter_options)},
        },
        "load": load,
        # Noise is taken to be the same share for every setting, but a setting that was pinned is another engine.
        # Power and clock of a GPU are none: a calibration never tunes them.
        "setting": {f"--pin {name}": value for name, value in sorted(split(c.config)[0].items())},
        "plan": {"--windows": c.windows, "windows of": f"{c.window_seconds:g} s"},
    }
    return {(group, key): _said(value) for group, facts in groups.items() for key, value in facts.items()}


def _said(value: object) -> str:
    return NOTHING if value is None else value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _conditions_of_header(header: Header) -> dict[tuple[str, str], str]:
    return _conditions(
        Calibration(
            started_unix=header.started_unix,
            workload=header.workload,
            machine=header.machine,
            identity=header.identity,
            meters=header.meters,
            meter_options=header.meter_options,
            target=header.target,
            windows=header.plan.windows,
            window_seconds=header.plan.window_seconds or 0.0,
            config={str(p["name"]): v for p in header.space if isinstance(v := p.get("default"), Value)},
            planned=0,
        )
    )


def _differences(there: Mapping[tuple[str, str], str], here: Mapping[tuple[str, str], str]) -> list[str]:
    """`windows of 2 s, here 5 s` for each condition on which the two disagree."""
    return [
        f"{key[1]} {there.get(key, NOTHING)}, here {here.get(key, NOTHING)}"
        for key in dict.fromkeys([*there, *here])
        if there.get(key, NOTHING) != here.get(key, NOTHING)
    ]
