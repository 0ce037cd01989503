"""Energy where there is no counter: CPU time x a power range.

    E = P_base T + (P_max - P_base) C / n

T is wall time, C the CPU time of the calling process and everything below it, n the number of logical
CPUs, P_base the power of all packages at rest and P_max at full load. This is the linear model of
Cloud Carbon Footprint (`ComputeEstimator.ts`). Neither power is known, so every reading is an interval:
the low end takes both low ends, the high end both high ends (E grows with each as long as C <= n T).

What it cannot see: clocks, power limits, vector units, memory stalls, other processes, any GPU. Threads
that spin look like work. A ranking made with it is a ranking by CPU time and by wall time, no more.

A server that ran before, and is no child of the calling process, is counted from the moment at which `count_also`
names it.

Invariant: CPU time that was counted is never lost. A child that ends leaves its time with the parent
that waited for it, and it is taken from there, once; a process whose parent died is followed further.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]  # psutil ships no type information

from tuner.meters import Availability, MeterOptions
from tuner.space import Lever
from tuner.trial import MeterError, Quality, Reading

ATTEMPTS = 50
"""How often a process tree is read until no process came or went meanwhile."""

DOMAIN = "cpu"


@dataclass(frozen=True)
class Watts:
    """A power that is only known as a range."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class PowerModel:
    """Power of all CPU packages together, in watts."""

    base: Watts
    full: Watts
    logical_cpus: int

    @classmethod
    def of(cls, options: MeterOptions, logical_cpus: int) -> PowerModel:
        """From `--cpu-watts`, or from averages over many machines.

        Averages: Cloud Carbon Footprint's coefficients from SPECpower_ssj2008 are 0.71 (GCP), 0.74 (AWS)
        and 0.78 W (Azure) per logical CPU at rest and 4.26, 3.5 and 3.76 W at full load. Their middle is
        the middle reading here; the range is widened to 0.4..1.5 and 2..8 W, because those are servers:
        laptops lie below and desktop CPUs with few, fast cores above.

        With `--cpu-watts LOW..HIGH` only the power at rest stays unknown; it is taken as 0.1 to 0.3 of
        the power at full load.
        """
        n = logical_cpus
        if options.cpu_watts is None:
            return cls(Watts(0.4 * n, 0.7 * n, 1.5 * n), Watts(2.0 * n, 3.9 * n, 8.0 * n), n)
        low, high = options.cpu_watts
        mid = (low + high) / 2
        return cls(Watts(0.1 * low, 0.2 * mid, 0.3 * high), Watts(low, mid, high), n)

    def reading(self, wall_seconds: float, cpu_seconds: float) -> Reading:
        """Energy in microjoules since both clocks began. Never decreases when neither clock does."""

        def microjoules(base: float, full: float) -> int:
            return int(1e6 * (base * wall_seconds + (full - base) * cpu_seconds / self.logical_cpus))

        return Reading(
            microjoules(self.base.mid, self.full.mid),
            low=microjoules(self.base.low, self.full.low),
            high=microjoules(self.base.high, self.full.high),
        )

    def extremes(self) -> tuple[PowerModel, PowerModel]:
        """The two ends of what is unknown about ratios: least and most power at rest for the power at full load.

        The energy of one configuration over that of another depends on base / full alone, so what holds at
        both ends holds for every power in the range.
        """

        def with_powers(base: float, full: float) -> PowerModel:
            return PowerModel(Watts(base, base, base), Watts(full, full, full), self.logical_cpus)

        return with_powers(self.base.low, self.full.high), with_powers(self.base.high, self.full.low)

    def __str__(self) -> str:
        return f"CPU time x power range {self.base.low:g}..{self.full.high:g} W on {self.logical_cpus} logical CPUs"


def probe(options: MeterOptions) -> Availability:
    """Available wherever processes may be looked at."""
    try:
        EstimateMeter(options).close()
    except MeterError as error:
        return Availability(
            "estimate",
            ok=False,
            domains=(),
            quality="estimated",
            reason=str(error),
            remedy="ls /proc/self/stat /sys/devices/system/cpu",
        )
    return Availability(
        "estimate", ok=True, domains=(DOMAIN,), quality="estimated", reason=str(_model(options)), remedy=""
    )


def _model(options: MeterOptions) -> PowerModel:
    logical_cpus = os.cpu_count()
    if logical_cpus is None:
        raise MeterError("the number of CPUs is unknown")
    return PowerModel.of(options, logical_cpus)


class EstimateMeter:
    """Estimated energy of the CPU since this object was made, while the calling process worked."""

    name = "estimate"
    quality: Quality = "estimated"
    blind_to: frozenset[Lever] = frozenset({"offload", "clock", "power"})
    update_seconds = 0.0

    def __init__(
        self,
        options: MeterOptions,
        *,
        seconds: Callable[[], float] = time.perf_counter,
        cpu_seconds: Callable[[], float] | None = None,
    ) -> None:
        self._model = _model(options)
        self._seconds = seconds
        self._cpu_seconds = TreeCpu().seconds if cpu_seconds is None else cpu_seconds
        self._start = seconds()

    def domains(self) -> tuple[str, ...]:
        return (DOMAIN,)

    def read(self) -> dict[str, Reading]:
        return {DOMAIN: self._model.reading(self._seconds() - self._start, self._cpu_seconds())}

    def close(self) -> None:
        """Nothing is held."""


class _Spent(NamedTuple):
    """CPU seconds of one process: its own, and those of the children it has waited for."""

    own: float
    reaped: float
    bequeaths: bool
    """Whether a process that is counted waits for it and inherits its time when it ends."""

    @property
    def total(self) -> float:
        return self.own + self.reaped


_also: list[int] = []


def count_also(pids: Iterable[int]) -> None:
    """From now on, every `TreeCpu` of this process counts these processes too, and everything below them.

    For an engine that somebody else started and that works for this process.
    """
    _also.extend(pid for pid in pids if pid not in _also)


class TreeCpu:
    """CPU time of the calling process and everything below it, since this object was made.

    Processes that start and end between two calls are in it too: their time is with the parent that
    waited for them (times(2), `tms_cutime`). Lost is only the time since the last call of a process
    that nobody waits for: its parent ignores SIGCHLD, or it is a daemon that began and ended unseen.
    """

    def __init__(self) -> None:
        self._root = psutil.Process()
        self._last: dict[psutil.Process, _Spent] = {}
        self._joined: set[int] = set()
        self._last = self._snapshot()
        self._seconds = 0.0

    def seconds(self) -> float:
        """CPU seconds so far, never decreasing. Raises `MeterError` when the processes cannot be read."""
        self._let_join()
        now = self._snapshot()
        own = reaped = 0.0
        for process, spent in now.items():
            before = self._last.get(process, _Spent(0.0, 0.0, bequeaths=True))
            own += max(0.0, spent.own - before.own)
            reaped += max(0.0, spent.reaped - before.reaped)
        # What a parent inherits from a child that ended was partly counted while that child lived.
        reaped -= sum(spent.total for process, spent in self._last.items() if spent.bequeaths and process not in now)
        self._last = now
        self._seconds += own + max(0.0, reaped)
        return self._seconds

    def _let_join(self) -> None:
        """Take what `count_also` named into the last snapshot: what they used before is not counted."""
        for pid in _also:
            if pid not in self._joined:
                try:
                    root = psutil.Process(pid)
                    for process in (root, *root.children(recursive=True)):
                        self._last.setdefault(process, self._spent(process, bequeaths=process != root))
                except psutil.NoSuchProcess:
                    raise MeterError(f"process {pid}, whose CPU time was to be counted, has ended") from None
                self._joined.add(pid)

    def _snapshot(self) -> dict[psutil.Process, _Spent]:
        # A child that is reaped between the reading of its own times and of its parent's would be counted
        # twice or not at all, so a snapshot holds only when the same processes were there before and after.
        for _ in range(ATTEMPTS):
            try:
                members = self._members()
                spent = {process: self._spent(process, bequeaths) for process, bequeaths in members.items()}
                if self._members() == members:
                    return spent
            except psutil.NoSuchProcess:
                continue
            except (psutil.Error, OSError) as error:
                raise MeterError(f"the CPU time of this process tree cannot be read: {error}") from error
        raise MeterError(f"processes come and go too fast to read their CPU time ({ATTEMPTS} attempts)")

    def _members(self) -> dict[psutil.Process, bool]:
        """The processes that are counted, and whether each leaves its time to another one of them."""
        members = dict.fromkeys([self._root, *self._root.children(recursive=True)], True)
        for known in self._last:
            # Its parent died and it now hangs below init, but it is still ours.
            if known not in members and known.is_running():
                members |= {known: False} | dict.fromkeys(known.children(recursive=True), True)
        return members

    def _spent(self, process: psutil.Process, bequeaths: bool) -> _Spent:
        if process == self._root:
            # Nanoseconds and microseconds, where /proc/PID/stat counts in ticks of 10 ms.
            children = resource.getrusage(resource.RUSAGE_CHILDREN)
            return _Spent(time.process_time(), children.ru_utime + children.ru_stime, bequeaths)
        times = process.cpu_times()
        return _Spent(times.user + times.system, times.children_user + times.children_system, bequeaths)


def busy_cpu_seconds() -> float:
    """CPU time that the whole machine has used since boot, in seconds.

    Without idling and waiting for disks, and without guests, which count as `user` already (proc(5)).
    """
    times = psutil.cpu_times()
    return sum(float(getattr(times, kind, 0.0)) for kind in ("user", "nice", "system", "irq", "softirq"))
