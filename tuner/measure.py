"""The measured window.

A window holds whole passes of the load, on an engine that is loaded and warm: what happens before
and after is not in it. Energy is one difference of each counter per window, never a sum of many
small differences. A window counts, or it has a cause that makes it invalid; then it is kept with its
cause and measured again, a few times at most. No window is ever dropped for its value.

Clocks: `perf_counter` for lengths; the boot clock beside it shows whether the machine slept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tuner.journal import Plan
from tuner.trial import Energy, Engine, Measurement, Meter, MeterError, Reading, Work

LARGEST_WATTS = 20_000.0
"""No single domain draws more: the largest accelerator modules are below 2 kW (2026), a node below 15 kW."""

SLEEP_SECONDS = 0.5
"""How far the boot clock may run ahead of the monotonic clock before the machine is said to have slept."""


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """Where time comes from; tests put their own in."""

    seconds: Callable[[], float] = time.perf_counter
    boot_seconds: Callable[[], float] = field(
        default=lambda: time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
    )
    cpu_seconds: Callable[[], float] = time.process_time
    busy_cpu_seconds: Callable[[], float | None] = field(default=lambda: None)
    """CPU time of the whole machine, whoever used it; None where the system does not say."""
    peak_memory_bytes: Callable[[], int | None] = field(default=lambda: None)


def measure(
    engine: Engine, meter: Meter, plan: Plan, clocks: Clocks, report: Callable[[str], None]
) -> Iterator[Measurement]:
    """Measure `plan.windows` valid windows of a warm engine.

    Args:
        engine: sends its whole load once for each call of `run_pass`.
        meter: read once before and once after each window.
        plan: number and least length of the windows, and how often an invalid one is repeated.
        clocks: time sources.
        report: told before each window what comes, for the live view.

    Yields:
        All windows in the order they happened, invalid ones included. Fewer than `plan.windows` valid
        ones when `plan.retries` repeats were used up.

    Raises:
        RuntimeError: the engine reported work that cannot be.
    """
    valid, repeats = 0, 0
    while valid < plan.windows:
        report(f"measuring {valid + 1}/{plan.windows}")
        window = _window(engine, meter, plan.window_seconds or 0.0, clocks)
        yield window
        if window.valid:
            valid += 1
            continue
        repeats += 1
        if repeats > plan.retries:
            return


def _window(engine: Engine, meter: Meter, least_seconds: float, clocks: Clocks) -> Measurement:
    faults: list[str] = []
    works: list[Work] = []
    cpu, busy = _cpu(clocks, faults), clocks.busy_cpu_seconds()
    before = _read(meter, faults)
    boot, start = clocks.boot_seconds(), clocks.seconds()
    while not works or clocks.seconds() - start < least_seconds:
        work = engine.run_pass()
        if work.units <= 0:
            raise RuntimeError(f"the engine reported {work.units} {work.unit}s for a pass; expected at least one")
        works.append(work)
    seconds = clocks.seconds() - start
    slept = clocks.boot_seconds() - boot - seconds
    after = _read(meter, faults)
    cpu_seconds = _since(cpu, _cpu(clocks, faults))
    busy_seconds = _since(busy, clocks.busy_cpu_seconds())
    if slept > SLEEP_SECONDS:
        faults.append(f"the machine was suspended for {slept:.1f} s inside the window")
    energy = {} if faults else difference(before, after)
    if not faults:
        faults = implausible(energy, seconds, measured=meter.quality == "measured")
    return Measurement(
        work=together(works),
        seconds=seconds,
        energy={} if faults else energy,
        quality=meter.quality,
        meter=meter.name,
        cpu_seconds=cpu_seconds,
        # The two clocks tick differently: a small negative difference is nothing, not less than nothing.
        other_cpu_seconds=None if (rest := _since(cpu_seconds, busy_seconds)) is None else max(rest, 0.0),
        peak_memory_bytes=clocks.peak_memory_bytes(),
        invalid=tuple(dict.fromkeys(faults)),
    )


def _read(meter: Meter, faults: list[str]) -> Mapping[str, Reading]:
    try:
        return meter.read()
    except MeterError as error:
        faults.append(str(error))
        return {}


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


def implausible(energy: Mapping[str, Energy], seconds: float, *, measured: bool) -> list[str]:
    """Why these joules cannot be true; empty when they can.

    Only what no machine can do is refused: an unusual value is not a cause. Energy of exactly 0 J
    means that a counter did not move, not that nothing was used.
    """
    faults = []
    for domain, used in energy.items():
        watts = used.joules / seconds
        if used.joules < 0:
            faults.append(f"{domain}: the counter went back by {-used.joules:g} J")
        elif used.joules == 0 and measured:
            faults.append(f"{domain}: the counter did not move in {seconds:.2f} s")
        elif watts > LARGEST_WATTS:
            faults.append(f"{domain}: {watts:.0f} W is more than any device draws (limit {LARGEST_WATTS:.0f} W)")
    if not energy:
        faults.append("the meter has no domain")
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
    )
