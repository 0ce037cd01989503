"""The measured window.

A window holds whole passes of the load, on an engine that is loaded and has warmed up until its throughput
and its temperature stay: what happens before and after is not in it. Energy is one difference of each
counter per window, never a sum of many small differences. A window counts, or it has a cause that makes it
invalid; then it is kept with all its causes and measured again, a few times at most. No window is ever
dropped for its value.

Where a counter moves in steps, both ends of a window are put on a step of the slowest one, so that seconds
and joules are those of the same stretch. What that costs: up to one period after the last pass, in which
the engine waits, belongs to the window. At a hundred periods a window this is 1 % of its time at most, at
idle power, and it is the same for every configuration. Power that is sampled and added up grows without
steps: there is nothing to wait for, and such a window is not called aligned.

Clocks: `perf_counter` for lengths; the boot clock beside it shows whether the machine slept.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tuner.journal import Plan
from tuner.limits import QUANTILES
from tuner.telemetry import Sampler
from tuner.trial import Energy, Engine, Measurement, Meter, MeterError, Reading, Target, Telemetry, Unit, WarmUp, Work

LARGEST_WATTS = 20_000.0
"""No single domain draws more: the largest accelerator modules are below 2 kW (2026), a node below 15 kW."""

LIMIT_MARGIN = 1.3
"""A GPU's mean power stays within its limit; times this it is no reading."""

LEAST_IDLE_SHARE = 0.5
"""Nothing that works draws less than this share of what the idle machine drew on the same meter."""

SLEEP_SECONDS = 0.5
"""How far the boot clock may run ahead of the monotonic clock before the machine is said to have slept."""

ALIGN_FROM_SECONDS = 0.005
"""Counters that move more often are read as they are: their step is nothing in a window."""

ALIGN_PERIODS = 3
POLLS_IN_A_PERIOD = 20

SLICES = 3
SLICE_AGREEMENT = 0.02
STEADY_CELSIUS_PER_SECOND = 0.1
"""An engine is steady when its last slices agree within this share, and no device warms faster than this."""

MOST_SETTLING_SECONDS = 5.0
"""How long clocks and power are left to fall after the load has ended, before idle power is measured."""

UNITS_TOLERANCE = 0.005
"""How far a pass may be from the tokens or images it was asked for."""

TICK_SECONDS = 0.05
"""Error of the kernel's CPU time: five kinds of it, each in ticks of 10 ms (`CLK_TCK`, proc(5))."""


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """Where time comes from; tests put their own in."""

    seconds: Callable[[], float] = time.perf_counter
    boot_seconds: Callable[[], float] = field(
        default=lambda: time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
    )
    unix_seconds: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    cpu_seconds: Callable[[], float] = time.process_time
    busy_cpu_seconds: Callable[[], float | None] = field(default=lambda: None)
    """CPU time of the whole machine, whoever used it; None where the system does not say."""
    logical_cpus: int = field(default_factory=lambda: os.cpu_count() or 1)
    """CPUs that `busy_cpu_seconds` adds up."""
    peak_memory_bytes: Callable[[], int | None] = field(default=lambda: None)


# --- before the first window -----------------------------------------------------------------


def warm_up(
    engine: Engine,
    meter: Meter,
    plan: Plan,
    clocks: Clocks,
    report: Callable[[str], None],
    sampler: Sampler | None = None,
) -> WarmUp | None:
    """Run the load until the engine is steady: the last slices agree and no device warms any more.

    A slice is whole passes, of a quarter of the least time at least. It takes `plan.warm_up_seconds` at
    least and at most, but for the last slice, which is finished. None where the plan asks for none.

    Temperature is looked at where a device shows one and `meter` reads the hardware: the energy of a warmer
    chip is higher, an estimate is not. Only what was seen since the load began counts, so that a device which
    was idle while the model was read is not called steady; as long as that is too little, it is not steady.

    Raises:
        RuntimeError: the engine reported work that cannot be.
    """
    if plan.warm_up_seconds is None:
        return None
    report("warming up")
    least, most = plan.warm_up_seconds
    thermometer = sampler if sampler and meter.quality in ("measured", "sampled") and sampler.celsius() else None
    start = clocks.seconds()
    rates: list[float] = []
    while True:
        rates.append(_slice(engine, least / (SLICES + 1), clocks))
        elapsed = clocks.seconds() - start
        steady = (thermometer is None or _stays(thermometer.celsius_per_second(start))) and agree(rates)
        if elapsed >= most or (steady and elapsed >= least):
            return WarmUp(seconds=elapsed, units_per_second=tuple(rates), steady=steady)


def _stays(celsius_per_second: float | None) -> bool:
    """Whether no device warms any more; what is not known yet is not yet so."""
    return celsius_per_second is not None and celsius_per_second < STEADY_CELSIUS_PER_SECOND


def agree(rates: Sequence[float]) -> bool:
    """Whether the last slices are within 2 % of each other."""
    last = rates[-SLICES:]
    return len(last) == SLICES and max(last) - min(last) <= SLICE_AGREEMENT * statistics.fmean(last) and min(last) > 0


def _slice(engine: Engine, least_seconds: float, clocks: Clocks) -> float:
    """Units per second over whole passes."""
    start, units = clocks.seconds(), 0
    while True:
        units += _pass(engine).units
        elapsed = clocks.seconds() - start
        if elapsed >= least_seconds:
            return units / elapsed if elapsed > 0 else 0.0


def settling_seconds(idle_seconds: float) -> float:
    """How long a loaded engine waits before its idle power is measured for `idle_seconds`.

    A GPU takes seconds to leave the clocks that it computed with; measured at once, they would be its idle power.
    """
    return min(idle_seconds / 2, MOST_SETTLING_SECONDS)


def idle_watts(meter: Meter, seconds: float, plan: Plan, clocks: Clocks, sampler: Sampler | None = None) -> float:
    """Power of all domains together while nothing is asked of the machine.

    Raises:
        MeterError: the reading does not count; the causes are in the message.
    """
    stretch = _stretch(meter, plan, clocks, sampler, lambda _start: clocks.sleep(seconds))
    if stretch.faults:
        raise MeterError("; ".join(dict.fromkeys(stretch.faults)))
    return sum(used.joules for used in stretch.energy.values()) / stretch.seconds


# --- windows ---------------------------------------------------------------------------------


def measure(
    engine: Engine,
    meter: Meter,
    plan: Plan,
    clocks: Clocks,
    report: Callable[[str], None],
    *,
    sampler: Sampler | None = None,
    expected_units: int | None = None,
    unit: Unit = "token",
    least_watts: float | None = None,
) -> Iterator[Measurement]:
    """Measure `plan.windows` valid windows of a warm engine.

    Args:
        engine: sends its whole load once for each call of `run_pass`.
        meter: read at both ends of each window.
        plan: number and least length of the windows, and how often an invalid one is repeated.
        clocks: time sources.
        report: told before each window what comes, for the live view.
        sampler: what watches the hardware meanwhile; None for a machine that nothing is known of.
        expected_units: units that every pass was asked for; None where the engine decides.
        unit: of those; a pass that counts in another one is not compared with them.
        least_watts: what the idle machine drew on this meter; None when it was not measured.

    Yields:
        All windows in the order they happened, invalid ones included. Fewer than `plan.windows` valid
        ones when `plan.retries` repeats were used up.

    Raises:
        RuntimeError: the engine reported work that cannot be.
    """
    valid, repeats = 0, 0
    while valid < plan.windows:
        report(f"measuring {valid + 1}/{plan.windows}")
        window = _window(engine, meter, plan, clocks, sampler, (expected_units, unit), least_watts)
        yield window
        if window.valid:
            valid += 1
            continue
        repeats += 1
        if repeats > plan.retries:
            return


def _window(
    engine: Engine,
    meter: Meter,
    plan: Plan,
    clocks: Clocks,
    sampler: Sampler | None,
    expected: tuple[int | None, Unit],
    least_watts: float | None,
) -> Measurement:
    works: list[Work] = []

    def load(start: float) -> None:
        while not works or clocks.seconds() - start < (plan.window_seconds or 0.0):
            works.append(_pass(engine))
            # The window no longer counts, and requests that fail at once would be sent without end.
            if works[-1].failed_requests:
                return

    stretch = _stretch(meter, plan, clocks, sampler, load, least_watts)
    faults = [*stretch.faults, *unfinished(works, *expected)]
    work = together(works)
    return Measurement(
        # Every gap between two tokens would be most of the journal; its quantiles are in the metrics.
        work=replace(work, itl_seconds=(), metrics={}, failure=None),
        seconds=stretch.seconds,
        energy={} if faults else stretch.energy,
        quality=meter.quality,
        meter=meter.name,
        cpu_seconds=stretch.cpu_seconds,
        other_cpu_seconds=stretch.other_cpu_seconds,
        peak_memory_bytes=clocks.peak_memory_bytes(),
        passes=len(works),
        started_unix=stretch.started_unix,
        readings=stretch.readings,
        aligned=stretch.aligned,
        wraps=stretch.wraps,
        telemetry=stretch.telemetry,
        metrics=metrics_of(work, stretch.seconds),
        invalid=tuple(dict.fromkeys(faults)),
    )


def metrics_of(work: Work, seconds: float) -> dict[str, float]:
    """What limits may be set on, of one window: throughput, mean and quantiles of each latency that was timed, and
    what the engine itself reports; a name that both know is the measured one.

    `latency` is a whole request's, `ttft` the time to its first token, `itl` the time between two of its tokens.
    Quantiles are the smallest value that so many percent do not exceed: no value is made up between two of them.
    """
    found = {f"{work.unit}s_per_s": work.units / seconds} if seconds > 0 and work.units else {}
    timed = {"latency": work.request_seconds, "ttft": work.ttft_seconds, "itl": work.itl_seconds}
    for name, values in timed.items():
        if values and all(math.isfinite(v) for v in values):
            ordered = sorted(values)
            found[f"{name}_mean_s"] = statistics.fmean(ordered)
            for percent in QUANTILES:
                found[f"{name}_p{percent}_s"] = ordered[math.ceil(percent / 100 * len(ordered)) - 1]
    return {**{name: value for name, value in work.metrics.items() if math.isfinite(value)}, **found}


def _pass(engine: Engine) -> Work:
    work = engine.run_pass()
    if work.units <= 0 and not work.failed_requests:
        raise RuntimeError(f"the engine reported {work.units} {work.unit}s for a pass; expected at least one")
    return work


_ASKED: Mapping[Unit, str] = {"token": " (prompts x output tokens)"}


def expected_units(target: Target, unit: Unit) -> int | None:
    """Units that a pass of this load brings; None where only the workload itself knows."""
    return {"token": target.prompts * target.output_tokens, "image": target.prompts}.get(unit)


def unfinished(works: Sequence[Work], expected_units: int | None, unit: Unit = "token") -> list[str]:
    """Why the engine did not do what it was asked to; empty when it did.

    A configuration that emits fewer tokens, makes fewer images, or loses requests, must not win by doing less.
    """
    faults = []
    failed, requests = sum(w.failed_requests for w in works), sum(len(w.request_seconds) for w in works)
    if failed:
        of = f" of {requests}" if requests >= failed else ""
        why = next((f": {w.failure}" for w in works if w.failure), "; the engine's log says why")
        faults.append(f"{failed}{of} requests brought no answer{why}")
    for work in works:
        if expected_units is None or work.unit != unit or work.failed_requests:
            continue
        if abs(work.units - expected_units) > UNITS_TOLERANCE * expected_units:
            faults.append(f"a pass brought {work.units} {unit}s, {expected_units} were asked for{_ASKED.get(unit, '')}")
            break
    return faults


# --- between two readings --------------------------------------------------------------------


@dataclass(frozen=True)
class _Stretch:
    """Everything that is known of the time between two readings."""

    started_unix: float
    seconds: float
    readings: Mapping[str, tuple[int, int]]
    energy: Mapping[str, Energy]
    """Empty when there is a fault."""
    aligned: bool
    wraps: Mapping[str, int]
    cpu_seconds: float | None
    other_cpu_seconds: float | None
    telemetry: Telemetry | None
    faults: Sequence[str]


def _stretch(
    meter: Meter,
    plan: Plan,
    clocks: Clocks,
    sampler: Sampler | None,
    load: Callable[[float], None],
    least_watts: float | None = None,
) -> _Stretch:
    """Read, run `load` (told when it begins), read; then say what speaks against it."""
    faults: list[str] = []
    begun = sampler.begin() if sampler else None
    cpu_start, cpu, busy = clocks.seconds(), _cpu(clocks, faults), clocks.busy_cpu_seconds()
    before, start, on_tick = _edge(meter, clocks, faults)
    wraps = _wraps(meter)
    boot, started_unix = clocks.boot_seconds(), clocks.unix_seconds()
    load(start)
    after, end, on_tick_too = _edge(meter, clocks, faults)
    slept = clocks.boot_seconds() - boot - (end - start)
    cpu_seconds = _since(cpu, _cpu(clocks, faults))
    busy_seconds, cpu_span = _since(busy, clocks.busy_cpu_seconds()), clocks.seconds() - cpu_start
    # The two clocks tick differently: a small negative difference is nothing, not less than nothing.
    others = None if (rest := _since(cpu_seconds, busy_seconds)) is None else max(rest, 0.0)
    if slept > SLEEP_SECONDS:
        faults.append(f"the machine was suspended for {slept:.1f} s inside the window")
    seen = None
    here = meter.quality not in ("replayed", "simulated")
    if sampler and begun:
        seen, slow, strangers = sampler.end(begun, start, end)
        faults += slow if here else []
        faults += strangers if here and plan.most_others < 1 else []
    if here and others is not None:
        faults += crowded(others, cpu_span, clocks.logical_cpus, plan.most_others)
    energy = difference(before, after) if before and after else {}
    if not faults:
        limits = sampler.limit_watts() if sampler else {}
        measured = meter.quality == "measured"
        faults += implausible(energy, end - start, measured=measured, limits=limits, least_watts=least_watts)
    return _Stretch(
        started_unix=started_unix,
        seconds=end - start,
        readings={d: (first.microjoules, after[d].microjoules) for d, first in before.items() if d in after},
        energy={} if faults else energy,
        aligned=on_tick and on_tick_too,
        wraps={d: grown for d, count in _wraps(meter).items() if (grown := count - wraps.get(d, 0))},
        cpu_seconds=cpu_seconds,
        other_cpu_seconds=others,
        telemetry=seen,
        faults=faults,
    )


def _edge(meter: Meter, clocks: Clocks, faults: list[str]) -> tuple[Mapping[str, Reading], float, bool]:
    """A reading, when it was made, and whether that was on a tick of the slowest counter.

    The slowest counter is the last to move after the waiting began, so all are waited for. One that
    stands still for `ALIGN_PERIODS` of its periods is not waited for any longer, and nothing is wrong yet.
    Only a counter has ticks: sampled power differs at every reading, and that is no tick.
    """
    try:
        first, at = meter.read(), clocks.seconds()
        if meter.quality != "measured" or meter.update_seconds < ALIGN_FROM_SECONDS:
            return first, at, False
        give_up = at + ALIGN_PERIODS * meter.update_seconds
        while True:
            clocks.sleep(meter.update_seconds / POLLS_IN_A_PERIOD)
            now, at = meter.read(), clocks.seconds()
            if all(now[domain] != reading for domain, reading in first.items()):
                return now, at, True
            if at >= give_up:
                return now, at, False
    except MeterError as error:
        faults.append(str(error))
        return {}, clocks.seconds(), False


def _wraps(meter: Meter) -> Mapping[str, int]:
    """How often each counter has started again at 0; nothing where the meter has none that do."""
    return getattr(meter, "wraps", {})


def _cpu(clocks: Clocks, faults: list[str]) -> float | None:
    try:
        return clocks.cpu_seconds()
    except MeterError as error:
        faults.append(str(error))
        return None


def _since(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def difference(before: Mapping[str, Reading], after: Mapping[str, Reading]) -> dict[str, Energy]:
    """Joules per domain between two readings of one meter."""
    return {
        domain: Energy(
            joules=(after[domain].microjoules - first.microjoules) / 1e6,
            low=(after[domain].low - first.low) / 1e6,
            high=(after[domain].high - first.high) / 1e6,
        )
        for domain, first in before.items()
    }


def crowded(other_cpu_seconds: float, seconds: float, logical_cpus: int, most: float) -> list[str]:
    """Whether other processes used more than the share `most` of all CPUs; 1 and above allows everything."""
    if most >= 1 or other_cpu_seconds - TICK_SECONDS <= most * logical_cpus * seconds:
        return []
    busy, limit = f"{other_cpu_seconds / seconds:.3g} of {logical_cpus} CPUs", f"{most * logical_cpus:.3g}"
    said = f"other processes kept {busy} busy, at most {limit} are allowed (--most-others {most:g})"
    return [f"{said}; stop them (`top` shows which), or raise it"]


def implausible(
    energy: Mapping[str, Energy],
    seconds: float,
    *,
    measured: bool,
    limits: Mapping[str, float] | None = None,
    least_watts: float | None = None,
) -> list[str]:
    """Why these joules cannot be true; empty when they can.

    Only what no machine can do is refused: an unusual value is not a cause. Energy of exactly 0 J
    means that a counter did not move, not that nothing was used.

    Args:
        energy: by domain.
        seconds: in which it was used.
        measured: whether the domains are counters.
        limits: the power limit in watts of each domain that has one.
        least_watts: what the idle machine drew on the same domains together.
    """
    faults = []
    for domain, used in energy.items():
        watts = used.joules / seconds
        if used.joules < 0:
            faults.append(f"{domain}: the counter went back by {-used.joules:g} J")
        elif used.joules == 0 and measured:
            faults.append(f"{domain}: the counter did not move in {seconds:.2f} s")
        elif limits and domain in limits and watts > LIMIT_MARGIN * limits[domain]:
            faults.append(f"{domain}: {watts:.0f} W is far above its power limit of {limits[domain]:.0f} W")
        elif watts > LARGEST_WATTS:
            faults.append(f"{domain}: {watts:.0f} W is more than any device draws (limit {LARGEST_WATTS:.0f} W)")
    if not energy:
        faults.append("the meter has no domain")
    total = sum(used.joules for used in energy.values()) / seconds
    if not faults and least_watts is not None and total < LEAST_IDLE_SHARE * least_watts:
        faults.append(f"{total:.1f} W under load is less than half of the {least_watts:.1f} W of the idle machine")
    return faults


def together(works: Sequence[Work]) -> Work:
    """Several passes as one: sums. A split that one pass lacks is lacking in the sum."""

    def total(parts: Sequence[float | None]) -> float | None:
        known = [p for p in parts if p is not None]
        return sum(known) if len(known) == len(parts) else None

    return Work(
        units=sum(w.units for w in works),
        unit=works[0].unit,
        prompt_tokens=sum(w.prompt_tokens for w in works),
        prefill_seconds=total([w.prefill_seconds for w in works]),
        decode_seconds=total([w.decode_seconds for w in works]),
        request_seconds=tuple(s for w in works for s in w.request_seconds),
        ttft_seconds=tuple(s for w in works for s in w.ttft_seconds),
        itl_seconds=tuple(s for w in works for s in w.itl_seconds),
        failed_requests=sum(w.failed_requests for w in works),
        failure=next((w.failure for w in works if w.failure), None),
        metrics={
            name: statistics.fmean(known)
            for name in dict.fromkeys(name for w in works for name in w.metrics)
            if (known := [w.metrics[name] for w in works if name in w.metrics])
        },
    )
