"""One trial in a process of its own: load a runner, launch the engine, measure, write one result.

Run as `python -m tuner.worker JOB`, where JOB is a file that `evaluate.py` wrote. The process leads a
session of its own, so that ending its group ends everything that it started. It ends itself when its
parent dies: standard input is a pipe that the parent holds open and never writes to.

Whatever the engine does, this process leaves either a result file or an exit status, never both.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import msgspec

from tuner.files import load_runner, unit_of
from tuner.journal import Plan
from tuner.measure import Clocks, difference, expected_units, idle_watts, measure, settling_seconds, warm_up
from tuner.meters import MeterOptions, open_meter
from tuner.space import Config, Lever, Refused, Value
from tuner.telemetry import Sampler
from tuner.trial import Energy, Idle, Measurement, Meter, MeterError, Quality, Reading, Target, WarmUp


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is asked to do."""

    runner: str
    """Path of the runner's file."""
    config: Config
    target: Target
    meters: tuple[str, ...]
    meter_options: Mapping[str, object]
    plan: Plan
    result: str
    """Path where the result is written, at once or not at all."""
    phases: int
    """An open pipe: one line each time a phase begins."""
    idle_seconds: float = 0.0
    """Length of the two windows in which idle power is measured; 0 for none."""
    idle_watts: float | None = None
    """What the idle machine drew in an earlier trial with these meters; None when it is not known."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a worker found out. `error` is None when the engine ran to the end."""

    measurements: tuple[Measurement, ...] = ()
    effective: Mapping[str, Value] = field(default_factory=dict)
    load_seconds: float | None = None
    warm_up: WarmUp | None = None
    idle: Idle | None = None
    spent: Mapping[str, Energy] = field(default_factory=dict)
    """Energy since the meter was opened, by domain; empty when one reading of it failed."""
    error: str | None = None


@dataclass
class Found:
    """What is known so far; it outlives the exception that ends a trial."""

    windows: list[Measurement] = field(default_factory=list)
    effective: Mapping[str, Value] = field(default_factory=dict)
    load_seconds: float | None = None
    warm_up: WarmUp | None = None
    idle: Idle | None = None
    spent: Mapping[str, Energy] = field(default_factory=dict)

    def result(self, error: str | None = None) -> Result:
        """As the parent reads it. The windows of a trial that failed later are kept, and do not count."""
        windows = self.windows
        if error is not None:
            windows = [replace(w, energy={}, invalid=(*w.invalid, "the trial failed later")) for w in windows]
        return Result(
            measurements=tuple(windows),
            effective=self.effective,
            load_seconds=self.load_seconds,
            warm_up=self.warm_up,
            idle=self.idle,
            spent=self.spent,
            error=error,
        )


def run(job: Job, report: Phases, found: Found) -> None:
    """Launch the engine once and measure it."""
    runner = load_runner(Path(job.runner))
    unit = unit_of(runner, job.target)
    with (
        contextlib.closing(open_meter(job.meters, MeterOptions.from_record(job.meter_options))) as opened,
        contextlib.closing(Sampler(job.meters)) as sampler,
        spending(opened, found) as meter,
    ):
        clocks, plan = process_clocks(), job.plan

        def idle() -> float | None:
            report("measuring idle power")
            try:
                return idle_watts(meter, job.idle_seconds, plan, clocks, sampler)
            except MeterError as error:
                sys.stderr.write(f"idle power was not measured: {error}\n")
                return None

        machine_watts = idle() if job.idle_seconds else None
        report("loading")
        started = time.perf_counter()
        with runner.launch(job.config, job.target) as engine:
            found.load_seconds = time.perf_counter() - started
            found.effective = dict(engine.effective)
            found.warm_up = warm_up(engine, meter, plan, clocks, report, sampler)
            if machine_watts is not None:
                report("letting the clocks fall")
                clocks.sleep(settling_seconds(job.idle_seconds))
                loaded_watts = idle()
                # The device has cooled and its clocks are down: the windows need the steady state anew.
                found.warm_up = warm_up(engine, meter, plan, clocks, report, sampler)
                if loaded_watts is not None:
                    found.idle = Idle(
                        machine_watts=machine_watts,
                        loaded_watts=loaded_watts,
                        seconds=job.idle_seconds,
                        quality=meter.quality,
                    )
            meter.forget_fault()
            for window in measure(
                engine,
                meter,
                plan,
                clocks,
                report,
                sampler=sampler,
                expected_units=expected_units(job.target, unit),
                unit=unit,
                least_watts=job.idle_watts if machine_watts is None else machine_watts,
            ):
                found.windows.append(window)
            report("stopping")


class Whole:
    """A meter that remembers whether any of its readings failed: what a failed one left out is in no later one."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.name: str = meter.name
        self.quality: Quality = meter.quality
        self.blind_to: frozenset[Lever] = meter.blind_to
        self.update_seconds: float = meter.update_seconds
        self.failed = False

    def domains(self) -> tuple[str, ...]:
        return self._meter.domains()

    def read(self) -> dict[str, Reading]:
        try:
            return self._meter.read()
        except MeterError:
            self.failed = True
            raise

    @property
    def wraps(self) -> Mapping[str, int]:
        """How often each counter has started again at 0; nothing where the meter has none that do."""
        return getattr(self._meter, "wraps", {})

    def forget_fault(self) -> None:
        """Read once, so that what went wrong while the engine was loading is not held against a window."""
        with contextlib.suppress(MeterError):
            self.read()

    def close(self) -> None:
        self._meter.close()


@contextlib.contextmanager
def spending(meter: Meter, found: Found) -> Iterator[Whole]:
    """Add up what is used from here on, also when the engine fails meanwhile."""
    whole = Whole(meter)
    first: Mapping[str, Reading] = {}
    with contextlib.suppress(MeterError):
        first = whole.read()
    try:
        yield whole
    finally:
        with contextlib.suppress(MeterError):
            last = whole.read()
            if not whole.failed:
                found.spent = difference(first, last)


def process_clocks() -> Clocks:
    """Time and memory of this process and everything below it."""
    import resource

    from tuner.meters.estimate import TreeCpu, busy_cpu_seconds

    tree = TreeCpu()
    return Clocks(
        cpu_seconds=tree.seconds,
        busy_cpu_seconds=busy_cpu_seconds,
        # ru_maxrss is in KiB on Linux (getrusage(2)); children count once they were waited for.
        peak_memory_bytes=lambda: (
            1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        ),
    )


class Phases:
    """Tells the parent what is happening, one line a phase."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(self, phase: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._descriptor, phase.encode() + b"\n")


def die_with_parent() -> None:
    """End this whole process group as soon as the parent is gone, also when it was killed by SIGKILL.

    A process of its own watches, because this one may be busy, hung or dead by then. It belongs to the
    group and ends with it. Called before anything else is running.
    """
    if os.fork():
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.closerange(1, min(1 << 16, os.sysconf("SC_OPEN_MAX")))
    with contextlib.suppress(OSError):
        os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def attempt(job: Job, report: Phases) -> Result:
    """`run`, with whatever goes wrong as a sentence: the one place where every exception is an outcome."""
    found = Found()
    try:
        run(job, report, found)
    except MemoryError:
        return found.result("out of memory while the engine was loading or running")
    except Exception as error:  # noqa: BLE001 - an engine may raise anything; a failed trial is a result
        traceback.print_exc(limit=-2)
        told = " ".join(str(error).split())
        return found.result(told if isinstance(error, Refused) else f"{type(error).__name__}: {told}")
    return found.result()


def main() -> NoReturn:
    """Read the job named on the command line, do it, leave the result."""
    die_with_parent()
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Job)
    report = Phases(job.phases)
    result = attempt(job, report)
    finished = Path(job.result)
    part = finished.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(result))
    part.replace(finished)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: an engine's threads and destructors must not be able to change the outcome or hang it.
    os._exit(0)


if __name__ == "__main__":
    main()
