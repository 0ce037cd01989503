"""Trials in a process of their own: load a runner, launch the engine, measure, write one result a trial.

Run as `python -m tuner.worker JOB SCRATCH`, where JOB is a file that `evaluate.py` wrote and SCRATCH a folder that
goes with the worker. The process leads a session of its own, so that ending its group ends everything that it
started. It ends itself when its parent dies: standard input is a pipe that the parent holds open and never writes to.
SIGTERM makes it stop its engine, and leave.

One launch serves one trial, or several that differ in nothing that needs a restart: then the process waits for
the next job when a trial is done (`Job.following`). Whatever the engine does, each job leaves either a result
file or an exit status, never both.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from tuner.files import load_runner, unit_of
from tuner.journal import Plan
from tuner.measure import Clocks, difference, expected_units, idle_watts, measure, settling_seconds, warm_up
from tuner.meters import MeterOptions, open_meter
from tuner.space import Config, Lever, Refused, Value
from tuner.supervise import STOPPED_SECONDS
from tuner.telemetry import Sampler
from tuner.trial import (
    TRIAL_SECONDS,
    Changeable,
    Energy,
    Engine,
    EngineError,
    Explained,
    Idle,
    Judged,
    Measurement,
    Meter,
    MeterError,
    Quality,
    Reading,
    Target,
    Unit,
    WarmUp,
)

LEAVE_SECONDS = STOPPED_SECONDS + 5.0
"""How long a worker may take to leave: what the slowest engine takes to stop, and a moment to close meters."""

STOPPING = "stopping"
"""The phase in which the engine is stopped, whatever the reason."""


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
    following: int | None = None
    """An open pipe: after this trial the path of the next job comes through it, or its end; None for the only trial."""
    reference: str | None = None
    """Where the quality of the default's output is kept; None where quality is not measured."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a worker found out. `error` is None when the engine ran to the end."""

    measurements: tuple[Measurement, ...] = ()
    effective: Mapping[str, Value] = field(default_factory=dict)
    load_seconds: float | None = None
    warm_up: WarmUp | None = None
    idle: Idle | None = None
    spent: Mapping[str, Energy] = field(default_factory=dict)
    """Energy since the meter was opened, or since the trial before, until the engine is stopped, by domain.

    Empty when a reading of it failed."""
    load_energy: Mapping[str, Energy] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    reused: bool = False
    error: str | None = None
    refused: bool = False
    """Whether a person has to act, and no other configuration would help (`Refused`)."""


@dataclass
class Found:
    """What is known so far; it outlives the exception that ends a trial."""

    windows: list[Measurement] = field(default_factory=list)
    effective: Mapping[str, Value] = field(default_factory=dict)
    load_seconds: float | None = None
    warm_up: WarmUp | None = None
    idle: Idle | None = None
    spent: Mapping[str, Energy] = field(default_factory=dict)
    load_energy: Mapping[str, Energy] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    reused: bool = False

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
            load_energy=self.load_energy,
            figures=self.figures,
            reused=self.reused,
            error=error,
        )


@dataclass
class Desk:
    """The job in hand and what is known of it; the next one takes its place."""

    job: Job
    found: Found = field(default_factory=Found)
    leaving: bool = False
    """Whether the engine is being stopped, which nothing may interrupt."""

    @contextlib.contextmanager
    def open(self, account: contextlib.AbstractContextManager[object], report: Phases) -> Iterator[None]:
        """While the engine is worked with, and `account` kept.

        The result is left before the engine is stopped: whatever happens then takes nothing of it away.
        """
        try:
            with account:
                yield
            leave(self.job, self.found.result())
        except Exception as error:
            leave(self.job, failed(self.found, error))
            raise
        finally:
            self.leaving = True
            report(STOPPING)

    def next(self) -> bool:
        """Leave the result of this job and wait for another one; False when there is none."""
        if self.job.following is None:
            return False
        leave(self.job, self.found.result())
        path = b""
        while not path.endswith(b"\n"):
            part = os.read(self.job.following, 4096)
            if not part:
                return False
            path += part
        asked = msgspec.json.decode(Path(path.decode().rstrip("\n")).read_bytes(), type=Job)
        # The pipes are this process's own, whatever the next job says of them.
        self.job = replace(asked, phases=self.job.phases, following=self.job.following)
        self.found = Found(reused=True)
        return True


def run(desk: Desk, report: Phases) -> None:
    """Launch the engine once and measure it, again after each change that needs no other launch."""
    job = desk.job
    os.environ[TRIAL_SECONDS] = str(job.plan.timeout_seconds)
    runner = load_runner(Path(job.runner))
    unit = unit_of(runner, job.target)
    with (
        contextlib.closing(open_meter(job.meters, MeterOptions.from_record(job.meter_options))) as opened,
        contextlib.closing(Sampler(job.meters)) as sampler,
        contextlib.ExitStack() as account,
    ):
        meter = account.enter_context(spending(opened, desk.found))
        clocks, plan, found = process_clocks(), job.plan, desk.found

        def idle() -> float | None:
            report("measuring idle power")
            try:
                return idle_watts(meter, job.idle_seconds, plan, clocks, sampler)
            except MeterError as error:
                sys.stderr.write(f"idle power was not measured: {error}\n")
                return None

        machine_watts = idle() if job.idle_seconds else None
        report("loading")
        before, started = reading(meter), time.perf_counter()
        with runner.launch(job.config, job.target) as engine, desk.open(account, report):
            # Where each pass starts the engine, this was a pass, and what loading takes is inside every window.
            if not getattr(engine, "starts_each_pass", False):
                found.load_seconds = time.perf_counter() - started
                found.load_energy = between(before, reading(meter))
            found.effective = dict(engine.effective)
            count_engine(engine, job.meters)
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
            least_watts = job.idle_watts if machine_watts is None else machine_watts
            windows(desk, engine, meter, clocks, report, sampler, least_watts, unit)
            while job.following is not None:
                account.close()
                if not desk.next():
                    break
                meter = account.enter_context(spending(opened, desk.found))
                report("changing what needs no restart")
                change(engine, desk.job.config)
                desk.found.effective = dict(engine.effective)
                desk.found.warm_up = warm_up(engine, meter, desk.job.plan, clocks, report, sampler)
                windows(desk, engine, meter, clocks, report, sampler, desk.job.idle_watts, unit)


def change(engine: Engine, config: Config) -> None:
    """Set what can be set on a running engine."""
    if not isinstance(engine, Changeable):
        raise RuntimeError("the runner offers parameters that need no restart, and its engine has no change()")
    engine.change(config)


def windows(
    desk: Desk,
    engine: Engine,
    meter: Whole,
    clocks: Clocks,
    report: Phases,
    sampler: Sampler,
    least_watts: float | None,
    unit: Unit,
) -> None:
    """Measure the engine as it is, then what is asked of it outside the windows."""
    job, found = desk.job, desk.found
    meter.forget_fault()
    for window in measure(
        engine,
        meter,
        job.plan,
        clocks,
        report,
        sampler=sampler,
        # An engine whose length of output is tuned says how much it was asked for.
        expected_units=getattr(engine, "expected_units", expected_units(job.target, unit)),
        unit=unit,
        least_watts=least_watts,
    ):
        found.windows.append(window)
    figures = dict(engine.figures) if isinstance(engine, Explained) else {}
    if job.reference is not None and isinstance(engine, Judged):
        report("measuring quality")
        figures |= engine.quality(Path(job.reference))
    if wrong := [name for name, value in figures.items() if not math.isfinite(value)]:
        raise RuntimeError(f"the engine reported figures that are no numbers: {', '.join(wrong)}")
    found.figures = {name: float(value) for name, value in figures.items()}


def reading(meter: Meter) -> Mapping[str, Reading]:
    """The counters; nothing where they cannot be read."""
    with contextlib.suppress(MeterError):
        return meter.read()
    return {}


def between(before: Mapping[str, Reading], after: Mapping[str, Reading]) -> dict[str, Energy]:
    """Energy between two readings; nothing where one of them failed."""
    return difference(before, after) if before and after else {}


def count_engine(engine: Engine, meters: Sequence[str]) -> None:
    """Count the CPU time of an engine that ran before this process did; it says so by its `pids`.

    Raises:
        RuntimeError: its process cannot be seen, and a meter lives on CPU time.
    """
    pids = getattr(engine, "pids", None)
    if pids is None:
        return
    if not pids and "estimate" in meters:
        raise RuntimeError(
            "the server's process cannot be seen from here (another user's, or in a container), and an estimate is "
            "made from its CPU time; run as its user or as root, or use a counter (--meter rapl, nvml or wall)"
        )
    from tuner.meters.estimate import count_also

    count_also(pids)


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


class Ended(BaseException):
    """SIGTERM: no failure of the engine, so nothing that handles those may hold it up."""


def die_with_parent(scratch: Path) -> int:
    """End this whole process group as soon as the parent is gone, also when it was killed by SIGKILL.

    A process of its own watches, because this one may be busy, hung or dead by then. It asks first, so that an
    engine can be stopped in order, and takes `scratch` away, which nobody else would. It belongs to the group and
    ends with it. Called before anything else is running. Returns the watching process.
    """
    worker = os.getpid()
    if watcher := os.fork():
        return watcher
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.closerange(1, min(1 << 16, os.sysconf("SC_OPEN_MAX")))
    with contextlib.suppress(OSError):
        os.read(0, 1)
    os.killpg(0, signal.SIGTERM)
    give_up = time.monotonic() + LEAVE_SECONDS
    while os.getppid() == worker and time.monotonic() < give_up:
        time.sleep(0.05)
    shutil.rmtree(scratch, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


def dismiss(watcher: int) -> None:
    """Take the watching process away, so that no zombie stays where nobody reaps orphans.

    It stays where the parent is gone: there it has something left to do.
    """
    if not select.select([0], [], [], 0)[0]:
        os.kill(watcher, signal.SIGKILL)
        os.waitpid(watcher, 0)


def leave_when_asked(desk: Desk, report: Phases) -> None:
    """From here on SIGTERM ends what is being done with `Ended`, unless the engine is being stopped anyway.

    Either way it is answered with `STOPPING`: whoever sent it waits for a worker that still heeds signals.
    """

    def leave(_number: int, _frame: FrameType | None) -> None:
        report(STOPPING)
        if not desk.leaving:
            desk.leaving = True
            raise Ended

    signal.signal(signal.SIGTERM, leave)


def attempt(desk: Desk, report: Phases) -> Result:
    """`run`, with whatever goes wrong as a sentence: the one place where every exception is an outcome."""
    try:
        run(desk, report)
    except Exception as error:  # noqa: BLE001 - an engine may raise anything; a failed trial is a result
        if not isinstance(error, MemoryError):
            traceback.print_exc(limit=-2)
        return failed(desk.found, error)
    return desk.found.result()


def failed(found: Found, error: Exception) -> Result:
    """What was found before `error`, and its cause in a sentence."""
    if isinstance(error, MemoryError):
        return found.result("out of memory while the engine was loading or running")
    told = " ".join(str(error).split())
    # These hold a whole sentence. Anything else nobody foresaw, and its kind may say more than its text.
    named = isinstance(error, Refused | EngineError | MeterError) or type(error) is RuntimeError
    result = found.result(told if named and told else f"{type(error).__name__}: {told}")
    return replace(result, refused=isinstance(error, Refused))


def leave(job: Job, result: Result) -> None:
    """Write a job's result, whole or not at all. Only the first one counts."""
    finished = Path(job.result)
    if finished.exists():
        return
    part = finished.with_suffix(".part")
    # The folder is gone where nothing more was wanted: the job in hand had left its result.
    with contextlib.suppress(FileNotFoundError):
        part.write_bytes(msgspec.json.encode(result))
        part.replace(finished)


def main() -> NoReturn:
    """Do the job named on the command line and those that follow it; leave a result for each."""
    watcher = die_with_parent(Path(sys.argv[2]))
    desk = Desk(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Job))
    report = Phases(desk.job.phases)
    leave_when_asked(desk, report)
    result = None
    with contextlib.suppress(Ended):
        result = attempt(desk, report)
        desk.leaving = True
    if result is not None:
        leave(desk.job, result)
    sys.stdout.flush()
    sys.stderr.flush()
    dismiss(watcher)
    if result is None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    # Not sys.exit: an engine's threads and destructors must not be able to change the outcome or hang it.
    os._exit(0)


if __name__ == "__main__":
    main()
