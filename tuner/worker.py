"""One trial in a process of its own: load a runner, launch the engine, measure, write one result.

Run as `python -m tuner.worker JOB`, where JOB is a file that `evaluate.py` wrote. The process leads a
session of its own, so that ending its group ends everything that it started. It ends itself when its
parent dies: standard input is a pipe that the parent holds open and never writes to.

Whatever the engine does, this process leaves either a result file or an exit status, never both.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import msgspec

from tuner.files import load_runner
from tuner.journal import Plan
from tuner.measure import Clocks, measure
from tuner.meters import MeterOptions, open_meter
from tuner.space import Config, Refused, Value
from tuner.trial import Measurement, Target

PR_SET_PDEATHSIG = 1  # prctl(2)


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


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a worker found out. `error` is None when the engine ran to the end."""

    measurements: tuple[Measurement, ...] = ()
    effective: Mapping[str, Value] = field(default_factory=dict)
    load_seconds: float | None = None
    error: str | None = None


def run(job: Job, report: Phases) -> Result:
    """Launch the engine once and measure it."""
    runner = load_runner(Path(job.runner))
    with contextlib.closing(open_meter(job.meters, MeterOptions.from_record(job.meter_options))) as meter:
        report("loading and warming up")
        started = time.perf_counter()
        with runner.launch(job.config, job.target) as engine:
            load_seconds = time.perf_counter() - started
            effective = dict(engine.effective)
            windows = measure(engine, meter, job.plan, process_clocks(), report)
            report("stopping")
        return Result(measurements=windows, effective=effective, load_seconds=load_seconds)


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
    """End this process group as soon as the parent is gone, also when it was killed by SIGKILL."""
    if sys.platform == "linux":
        # The thread below needs the interpreter's lock; the kernel's own signal does not.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(0, 1)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=wait, name="parent watch", daemon=True).start()


def attempt(job: Job, report: Phases) -> Result:
    """`run`, with whatever goes wrong as a sentence: the one place where every exception is an outcome."""
    try:
        return run(job, report)
    except MemoryError:
        return Result(error="out of memory while the engine was loading or running")
    except Exception as error:  # noqa: BLE001 - an engine may raise anything; a failed trial is a result
        traceback.print_exc(limit=-2)
        told = " ".join(str(error).split())
        return Result(error=told if isinstance(error, Refused) else f"{type(error).__name__}: {told}")


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
