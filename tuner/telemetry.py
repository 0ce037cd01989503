"""What the hardware says of itself while it is measured: heat, clocks, reasons to run slower, who else is there.

A thread takes a sample about once a second, beside the measurement and never in its way: after each one it
waits a hundred times as long as the sample took of a CPU, so it uses less than 1 % of one. What cannot be
read here is absent, never 0, and never a reason to stop.

Telemetry explains a window and names causes that make one invalid. It is never the objective: watts that
are sampled here are not added up.

Files: https://docs.kernel.org/hwmon/sysfs-interface.html, https://docs.kernel.org/admin-guide/pm/cpufreq.html,
`thermal_throttle` in Documentation/ABI/testing/sysfs-devices-system-cpu.

Glossary
    gauge       one figure of one device: `gpu0_celsius`, `cpu_mhz`
    slowdown    the hardware runs slower than asked, for heat or for lack of power
    stranger    a process on a measured GPU that does not belong to the trial
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.meters.nvml import SLOWDOWNS
from tuner.trial import Span, Telemetry

if TYPE_CHECKING:
    from tuner.meters.nvml import Gauges

WATCHES_GPUS = frozenset({"nvml", "wall"})
"""Meters that count an NVIDIA GPU's energy: its own, and the one of the whole machine."""

PERIOD_SECONDS = 1.0

LARGEST_SHARE = 0.01
"""Of one CPU, for the thread that samples."""

SLOPE_SECONDS = 10.0
"""How far back the temperature's slope looks; less than half of it says nothing."""

CPUS_READ = 8
"""CPUs whose clock is read, spread evenly. Reading one wakes it up, so not every CPU of a large machine is asked."""

SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
"""Drivers that show a CPU's temperature: Intel, AMD (two), most ARM boards."""

ZONES = ("x86_pkg_temp", "cpu-thermal", "cpu_thermal")
"""Types of thermal zones that are a CPU, for kernels without one of `SENSORS`."""

WHOLE_CPU = ("Package", "Tctl", "Tdie")
"""Beginnings of the labels under which a driver shows a package; its cores are below it."""

HEAT = "thermal throttling"
"""What a CPU's count of throttling stands for."""


@dataclass(frozen=True)
class Sample:
    """All gauges at one moment."""

    at: float
    gauges: Mapping[str, float]
    reasons: tuple[tuple[str, str], ...]
    """Device and why it runs at the clock at which it runs."""


@dataclass(frozen=True)
class Begun:
    """What must be compared with the end of a window."""

    throttles: Mapping[Path, int]
    strangers: Mapping[tuple[str, int], str]


class Sampler:
    """Watches the devices behind `meters` from now on.

    Args:
        meters: names of the meters in use; GPUs are watched where one is in `WATCHES_GPUS` and there is a driver.
        root: where `/sys` and `/proc` are looked for.
        seconds: the clock that windows are timed with.
        cpu_seconds: CPU time of the calling thread.
        period: between two samples, in seconds; None leaves sampling to the caller.
    """

    def __init__(
        self,
        meters: Sequence[str] = (),
        *,
        root: Path = Path("/"),
        seconds: Callable[[], float] = time.perf_counter,
        cpu_seconds: Callable[[], float] = time.thread_time,
        period: float | None = PERIOD_SECONDS,
    ) -> None:
        self._root, self._seconds, self._cpu_seconds, self._period = root, seconds, cpu_seconds, period
        self._gpus = _gauges() if WATCHES_GPUS.intersection(meters) else None
        self._with_cpu = self._gpus is None or set(meters) != {"nvml"}
        self._thermometers = thermometers(root)
        self._clocks = _spread(sorted(_cpus(root, "cpufreq/scaling_cur_freq")), CPUS_READ)
        self._throttles = sorted(_cpus(root, "thermal_throttle/*_throttle_count"))
        self._there_before = self._processes()
        self._samples: list[Sample] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True) if period else None
        if self._thread:
            self._thread.start()

    # --- sampling ---

    def sample(self) -> None:
        """Read every gauge once."""
        gauges = self._gpus.read() if self._gpus else {}
        reasons = tuple(self._gpus.reasons()) if self._gpus else ()
        gauges |= self._cpu_celsius()
        if clocks := [kilohertz / 1000 for path in self._clocks if (kilohertz := _number(path)) is not None]:
            gauges["cpu_mhz"] = statistics.fmean(clocks)
        self._samples.append(Sample(self._seconds(), gauges, reasons))

    def celsius(self) -> dict[str, float]:
        """The temperatures of what is measured, now."""
        found = self._gpus.read(("celsius",)) if self._gpus else {}
        return found | self._cpu_celsius() if self._with_cpu else found

    def celsius_per_second(self, since: float = float("-inf")) -> float | None:
        """How fast the device warms that warms fastest, over the last ten seconds; None when that cannot be said.

        A straight line through the samples (least squares): sensors show whole degrees, and the difference
        of two samples would be 0 or a jump.

        Args:
            since: what was seen earlier, on the clock of the windows, does not count.
        """
        samples = [s for s in list(self._samples) if s.at >= since]
        if not samples:
            return None
        last = samples[-1].at
        recent = [s for s in samples if last - s.at <= SLOPE_SECONDS]
        if last - recent[0].at < SLOPE_SECONDS / 2:
            return None
        slopes = []
        for gauge in recent[-1].gauges:
            if gauge.endswith("_celsius") and (self._with_cpu or not gauge.startswith("cpu")):
                points = [(s.at, s.gauges[gauge]) for s in recent if gauge in s.gauges]
                if len(points) > 1:
                    slopes.append(statistics.linear_regression(*zip(*points, strict=True)).slope)
        return max(slopes, default=None)

    def limit_watts(self) -> dict[str, float]:
        """The power limit that each measured GPU keeps to now."""
        return self._gpus.limit_watts() if self._gpus else {}

    # --- one window ---

    def begin(self) -> Begun:
        """Call before a window; give what it returns to `end`."""
        return Begun(self._throttle_counts(), self.strangers())

    def end(self, begun: Begun, start: float, end: float) -> tuple[Telemetry, list[str], list[str]]:
        """What was seen from `start` to `end`, slowdowns as causes, and strangers as causes."""
        seen = self.between(start, end)
        after = self._throttle_counts()
        # Both counts only grow, so what grew did so between `begin` and now.
        if any(count > begun.throttles.get(path, count) for path, count in after.items()):
            seen = Telemetry(samples=seen.samples, spans=seen.spans, throttled=(*seen.throttled, f"cpu: {HEAT}"))
        strangers = {**begun.strangers, **self.strangers()}
        return seen, slowdowns(seen.throttled), list(dict.fromkeys(strangers.values()))

    def between(self, start: float, end: float) -> Telemetry:
        """The samples of that time; none when it was shorter than the period."""
        samples = [s for s in list(self._samples) if start <= s.at <= end]
        spans = {}
        for gauge in dict.fromkeys(g for s in samples for g in s.gauges):
            values = [s.gauges[gauge] for s in samples if gauge in s.gauges]
            spans[gauge] = Span(min(values), statistics.fmean(values), max(values))
        reasons = dict.fromkeys(f"{device}: {reason}" for s in samples for device, reason in s.reasons)
        return Telemetry(samples=len(samples), spans=spans, throttled=tuple(reasons))

    def strangers(self) -> dict[tuple[str, int], str]:
        """Processes on a measured GPU that are not of this trial, by GPU and process id, each with a sentence.

        Whoever was there before this object was made is none of ours. Of those that came later, a process
        that can be seen from here and is not below this one is a stranger; one that cannot be seen may be
        the engine itself, under the number that it has outside of this container.
        """
        now = self._processes()
        ours = _own_processes() if now else set()
        return {
            (gpu, pid): f"{gpu}: process {pid}{_called(self._root, pid)} is on it too; end it,"
            " or let such windows count with --most-others 1"
            for gpu, pid in sorted(now)
            if (gpu, pid) in self._there_before or (pid not in ours and _seen_on_a_gpu(self._root, pid))
        }

    def close(self) -> None:
        """End the thread and let go of the driver; may be called twice."""
        self._closed.set()
        if self._thread:
            self._thread.join()
        if self._gpus:
            self._gpus.close()

    def _run(self) -> None:
        wait = 0.0
        while not self._closed.wait(wait):
            before = self._cpu_seconds()
            self.sample()
            wait = max(self._period or 0.0, (self._cpu_seconds() - before) / LARGEST_SHARE)

    def _cpu_celsius(self) -> dict[str, float]:
        found = [millidegrees / 1000 for path in self._thermometers if (millidegrees := _number(path)) is not None]
        return {"cpu_celsius": max(found)} if found else {}

    def _throttle_counts(self) -> dict[Path, int]:
        return {path: count for path in self._throttles if (count := _number(path)) is not None}

    def _processes(self) -> set[tuple[str, int]]:
        return self._gpus.processes() if self._gpus else set()


def slowdowns(throttled: Iterable[str]) -> list[str]:
    """The causes among what a `Telemetry` calls throttled: heat and lack of power, not settings or idling."""
    return [
        f"{device}: the hardware ran slower than asked ({reason}); let it cool, or lower its power limit"
        for device, _, reason in (said.partition(": ") for said in throttled)
        if reason in SLOWDOWNS or reason == HEAT
    ]


# --- where the numbers are -------------------------------------------------------------------


def thermometers(root: Path) -> list[Path]:
    """The files that hold a temperature of each CPU package, in thousandths of a degree Celsius."""
    found: list[Path] = []
    for sensor in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if _text(sensor / "name") in SENSORS:
            inputs = sorted(sensor.glob("temp*_input"))
            labels = {path: _text(path.with_name(path.name.replace("_input", "_label"))) for path in inputs}
            found += [path for path in inputs if labels[path].startswith(WHOLE_CPU)] or inputs
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    return found or [zone / "temp" for zone in zones if _text(zone / "type") in ZONES]


def _cpus(root: Path, files: str) -> list[Path]:
    return list((root / "sys/devices/system/cpu").glob(f"cpu[0-9]*/{files}"))


def _spread(paths: Sequence[Path], most: int) -> list[Path]:
    return [paths[i * len(paths) // most] for i in range(most)] if len(paths) > most else list(paths)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _gauges() -> Gauges | None:
    from tuner.meters import Unavailable
    from tuner.meters.nvml import Gauges

    try:
        return Gauges()
    except Unavailable:
        return None


# --- whose processes -------------------------------------------------------------------------


def _own_processes() -> set[int]:
    """The calling process and everything below it."""
    import psutil  # type: ignore[import-untyped]  # psutil ships no type information

    pids = {os.getpid()}
    with contextlib.suppress(psutil.Error):
        pids |= {child.pid for child in psutil.Process().children(recursive=True)}
    return pids


def _seen_on_a_gpu(root: Path, pid: int) -> bool:
    """Whether `pid` is a process here, outside of this session, and not just a number that is in use elsewhere too.

    A container may see the driver's numbers without the processes behind them. Whoever works with a GPU has
    the driver's library or device mapped; where that cannot be looked up, the number is taken at its word.
    """
    if not (root / f"proc/{pid}").is_dir():
        return False
    with contextlib.suppress(OSError):
        if os.getsid(pid) == os.getsid(0):
            return False
    try:
        return "nvidia" in (root / f"proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return True


def _called(root: Path, pid: int) -> str:
    name = _text(root / f"proc/{pid}/comm")
    return f" ({name})" if name else ""
