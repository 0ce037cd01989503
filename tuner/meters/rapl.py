"""CPU and memory energy from the kernel's powercap counters (RAPL).

Each counter is an integer of microjoules that starts again at 0 after `max_energy_range_uj`, which a
busy server reaches within minutes. A thread reads every counter long before it can do so twice, and
adds up the differences: what `read` returns only ever grows. A sample that cannot be read, comes so
late that two wraps could hide behind one, or means more power than the package can draw, makes the
window that it falls into invalid. It is never taken as 0 and never corrected.

Files: https://docs.kernel.org/power/powercap/powercap.html

Glossary
    zone      a folder with `name`, `energy_uj` and `max_energy_range_uj`
    package   one CPU socket, or one die of it; `cpu0`, `cpu1`, `cpu0_die1`
    dram      the memory at one socket, beside the package and not part of it; `dram0`
    core, uncore, psys   parts of a package, or the whole board: never added, they would count twice
"""

from __future__ import annotations

import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner import machine
from tuner.meters import Availability, Unavailable
from tuner.space import Lever
from tuner.trial import MeterError, Quality, Reading

ROOT_VARIABLE = "TUNE_POWERCAP_ROOT"
"""Environment variable that names another powercap folder: a container that mounts the host's, or a test."""

ROOT = Path("/sys/class/powercap")

LEAST_LIMIT_WATTS = 1000.0
"""What one zone may draw where the kernel names no limit: above every CPU package sold (500 W in 2026).

A smaller limit that the kernel names is not believed: firmware that manages power by itself leaves it at
a value that the package exceeds all day, and every good window would be called invalid.
"""

LIMIT_MARGIN = 2.0
"""Short bursts lie above the power limits that the kernel names; twice the largest does not occur."""

UPDATE_SECONDS = 0.001
"""Intel SDM volume 3B, 16.10.1: about 1 ms."""

SLOWEST_POLL_SECONDS = 10.0

JITTER_SECONDS = 0.1
"""Two reads may be this much further apart for the counter than for the clock beside it."""

_FOLDER = re.compile(r"[a-z-]*rapl[a-z-]*(:\d+)*")
_PACKAGE = re.compile(r"package-(\d+)(?:-die-(\d+))?")


@dataclass(frozen=True)
class Zone:
    """One counter."""

    domain: str
    folder: Path
    range_microjoules: int
    """The largest value; the counter goes on at 0."""
    limit_watts: float
    """More than this, averaged between two reads, is no reading."""

    @property
    def socket(self) -> str:
        """The domain without its die: `cpu0` for `cpu0_die1`."""
        return self.domain.partition("_die")[0]

    @property
    def poll_seconds(self) -> float:
        """Four reads or more within the shortest time in which the counter can wrap."""
        return min(SLOWEST_POLL_SECONDS, 0.25 * self.shortest_wrap_seconds)

    @property
    def shortest_wrap_seconds(self) -> float:
        return self.range_microjoules / 1e6 / self.limit_watts

    def microjoules(self) -> int:
        """The counter as it stands. Raises `MeterError`."""
        return _counter(self.folder / "energy_uj")


# --- finding the counters --------------------------------------------------------------------


def root() -> Path:
    """Where the powercap tree is: `TUNE_POWERCAP_ROOT`, or `/sys/class/powercap`."""
    return Path(os.environ.get(ROOT_VARIABLE) or ROOT)


def probe(folder: Path | None = None) -> Availability:
    """Whether packages can be read, and the commands that allow it."""
    try:
        zones = discover(folder or root())
    except Unavailable as error:
        return Availability("rapl", ok=False, domains=(), quality="measured", reason=error.reason, remedy=error.remedy)
    domains = tuple(zone.domain for zone in zones)
    without = "" if any(d.startswith("dram") for d in domains) else " (no counter for memory)"
    return Availability(
        "rapl",
        ok=True,
        domains=domains,
        quality="measured",
        reason=f"{', '.join(domains)} readable in {folder or root()}{without}",
        remedy="",
    )


def discover(folder: Path) -> tuple[Zone, ...]:
    """Every package and every dram zone once, packages first. Raises `Unavailable`."""
    try:
        found = _select(_zone_folders(folder)) if folder.is_dir() else {}
    except OSError as error:
        raise Unavailable(f"{folder} cannot be listed: {error.strerror}", f"ls -l {folder}") from error
    if not any(domain.startswith("cpu") for domain in found):
        raise Unavailable(*_why_absent(folder))
    zones: list[tuple[Zone, int]] = []
    for domain, path in found.items():
        try:
            now = _counter(path / "energy_uj")
        except MeterError as error:
            if isinstance(error.__cause__, PermissionError):
                raise Unavailable(*_why_locked(folder, path)) from error
            raise Unavailable(str(error), f"ls -l {path}") from error
        # Some CPUs without a memory counter list one that never leaves 0; a real one never is there again.
        if now == 0 and domain.startswith("dram"):
            continue
        zones.append((Zone(domain, path, _range(path), _limit_watts(path)), now))
    return _without_mirrors(zones)


def _zone_folders(folder: Path) -> list[Path]:
    """Every zone below `folder`, each once, whether it lists them flat (/sys/class) or nested (/sys/devices)."""
    found: dict[Path, None] = {}
    waiting = [folder]
    while waiting:
        for entry in sorted(waiting.pop().iterdir()):
            if _FOLDER.fullmatch(entry.name) and entry.is_dir() and (path := entry.resolve()) not in found:
                found[path] = None
                waiting.append(path)
    # The control types themselves (`intel-rapl`) are folders without a number and no zones.
    return [path for path in found if ":" in path.name]


def _select(folders: Iterable[Path]) -> dict[str, Path]:
    """The folder to read for each domain, in the order `cpu0`, `cpu1`, `dram0`, ...

    `intel-rapl-mmio` shows a package that `intel-rapl` shows too. Both are the same energy, so one is taken.
    """
    names = {folder.name: _text(folder / "name") for folder in folders}
    chosen: dict[str, Path] = {}
    for folder in sorted(folders, key=lambda f: (f.name.partition(":")[0] != "intel-rapl", _numbers(f.name))):
        name = names[folder.name]
        above = names.get(folder.name.rpartition(":")[0], "")
        package = _PACKAGE.fullmatch(above if name == "dram" else name)
        if package is not None:
            kind = "dram" if name == "dram" else "cpu"
            die = "" if package[2] is None else f"_die{package[2]}"
            chosen.setdefault(f"{kind}{package[1]}{die}", folder)
    return dict(sorted(chosen.items(), key=lambda item: (item[0].startswith("dram"), _numbers(item[0]))))


def _without_mirrors(zones: Sequence[tuple[Zone, int]]) -> tuple[Zone, ...]:
    """Leave out dies that show the counter of another die of their package.

    Some CPUs have one counter for the socket and show it at every die; adding them would multiply the
    energy. Counters of separate dies drift apart within seconds of boot, so two that agree within 1 J or
    one millionth are one counter (the rule of codecarbon 3.3.2, `rapl.py`).
    """
    kept: list[tuple[Zone, int]] = []
    for zone, now in zones:
        if not any(other.socket == zone.socket and _equal(now, then) for other, then in kept):
            kept.append((zone, now))
    return tuple(zone for zone, _ in kept)


def _equal(a: int, b: int) -> bool:
    return abs(a - b) <= max(1_000_000, 1e-6 * max(a, b))


def _range(folder: Path) -> int:
    path = folder / "max_energy_range_uj"
    try:
        limit = _counter(path)
    except MeterError as error:
        raise Unavailable(f"{error}: without it a wrap of the counter cannot be told", f"cat {path}") from error
    if limit == 0:
        raise Unavailable(f"{path} is 0: without it a wrap of the counter cannot be told", f"cat {path}")
    return limit


def _limit_watts(folder: Path) -> float:
    named = [
        int(text) / 1e6
        for path in sorted(folder.glob("constraint_*_*_uw"))
        if path.name.endswith(("_max_power_uw", "_power_limit_uw")) and (text := _text(path)).isdecimal()
    ]
    return max(LEAST_LIMIT_WATTS, LIMIT_MARGIN * max(named, default=0.0))


def _counter(path: Path) -> int:
    """A file that holds one unsigned number and a line end; anything else is not a reading."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise MeterError(f"{path} cannot be read: {error.strerror}") from error
    if re.fullmatch(rb"[0-9]{1,20}\n", text) is None:
        raise MeterError(f"{path} holds {text[:40]!r}: expected a number and a line end")
    return int(text)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _numbers(name: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", name)]


def _why_absent(folder: Path) -> tuple[str, str]:
    if platform.system() != "Linux":
        return f"RAPL is read from Linux's sysfs, this is {platform.system()}", "tune run --meter estimate"
    what = f"{folder} holds no CPU package" if folder.is_dir() else f"{folder} is absent"
    container, virtual_machine = machine.container(), machine.virtual_machine()
    if virtual_machine:
        return (
            f"{what}: a virtual machine ({virtual_machine}) has no energy counters",
            "tune run --cpu-watts LOW..HIGH  # narrows the estimate; only the host can measure",
        )
    if container:
        return (
            f"{what}: {container} hides it",
            f"docker run -v /sys/devices/virtual/powercap:/powercap:ro -e {ROOT_VARIABLE}=/powercap ...",
        )
    return what, "sudo modprobe intel_rapl_msr  # also for AMD; Linux 5.8 or newer"


def _why_locked(folder: Path, zone: Path) -> tuple[str, str]:
    # The kernel made the counters readable by root alone because they leak secrets through their exact
    # course (PLATYPUS, CVE-2020-8694), so the remedy says whom each command lets in.
    pattern = f"{folder if (folder / zone.name).exists() else ROOT}/*/energy_uj"
    until_boot = f"sudo chmod a+r {pattern}  # until the next boot; every local user may then read it (PLATYPUS)"
    for_good = (
        f'echo "z {pattern} 0440 root $(id -gn)" | sudo tee /etc/tmpfiles.d/tune-rapl.conf'
        " && sudo systemd-tmpfiles --create tune-rapl.conf  # for good, and for your group only"
    )
    reason = f"{zone / 'energy_uj'} is readable by root only, as on every Linux since 5.10 (CVE-2020-8694)"
    return reason, f"{until_boot}\n{for_good}"


# --- reading them ----------------------------------------------------------------------------


class Counter:
    """One zone's energy since this object was made: no wraps, no files, no threads."""

    def __init__(self, zone: Zone, microjoules: int, at: float) -> None:
        self.zone = zone
        self.total = 0
        """Microjoules."""
        self.wraps = 0
        self._last = microjoules
        self._at = at

    def advance(self, microjoules: int, at: float) -> None:
        """Take the counter's value at the time `at` in seconds.

        Raises:
            MeterError: when the step cannot be trusted. Nothing is added, and the next step starts here.
        """
        domain, limit = self.zone.domain, self.zone.limit_watts
        if microjoules > self.zone.range_microjoules:
            raise MeterError(f"{domain}: the counter reads {microjoules} uJ, above its range")
        elapsed, step = at - self._at, microjoules - self._last
        self._last, self._at = microjoules, at
        wrapped = step < 0
        if wrapped:
            step += self.zone.range_microjoules + 1
        if elapsed > self.zone.shortest_wrap_seconds:
            raise MeterError(f"{domain}: {elapsed:.0f} s passed between two reads, the counter may have wrapped twice")
        if step > 1e6 * limit * (elapsed + JITTER_SECONDS):
            watts = step / 1e6 / max(elapsed, JITTER_SECONDS)
            raise MeterError(f"{domain}: the counter jumped, {watts:.0f} W is above the limit of {limit:.0f} W")
        self.total += step
        self.wraps += wrapped


def boot_seconds() -> float:
    """A clock that goes on while the machine sleeps, so that a sleep counts as a late read."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class RaplMeter:
    """Energy of every package and its memory since this object was made. Raises `Unavailable`."""

    name = "rapl"
    quality: Quality = "measured"
    blind_to: frozenset[Lever] = frozenset({"offload"})
    update_seconds = UPDATE_SECONDS

    def __init__(
        self,
        folder: Path | None = None,
        *,
        seconds: Callable[[], float] = boot_seconds,
        poll_seconds: float | None = None,
    ) -> None:
        zones = discover(folder or root())
        self._seconds = seconds
        self._lock = threading.Lock()
        self._fault: MeterError | None = None
        self._closed = threading.Event()
        try:
            self._counters = [Counter(zone, zone.microjoules(), seconds()) for zone in zones]
        except MeterError as error:
            raise Unavailable(str(error), "tune doctor") from error
        self._poll_seconds = min(z.poll_seconds for z in zones) if poll_seconds is None else poll_seconds
        self._thread = threading.Thread(target=self._poll, name="rapl", daemon=True)
        self._thread.start()

    def domains(self) -> tuple[str, ...]:
        return tuple(counter.zone.domain for counter in self._counters)

    def read(self) -> dict[str, Reading]:
        if self._closed.is_set():
            raise MeterError("rapl: the meter is closed")
        self._sample()
        with self._lock:
            fault, self._fault = self._fault, None
            if fault is not None:
                raise fault
            return {counter.zone.domain: Reading.exact(counter.total) for counter in self._counters}

    @property
    def wraps(self) -> dict[str, int]:
        """How often each counter has started again at 0."""
        with self._lock:
            return {counter.zone.domain: counter.wraps for counter in self._counters}

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._closed.wait(self._poll_seconds):
            self._sample()

    def _sample(self) -> None:
        """Advance every counter; the first fault is kept for the next `read`, whose window it falls into."""
        with self._lock:
            for counter in self._counters:
                try:
                    counter.advance(counter.zone.microjoules(), self._seconds())
                except MeterError as fault:
                    self._fault = self._fault or fault
