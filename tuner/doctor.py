"""What can be measured here, what stands in the way, and the command that mends it.

Every check looks and reports; none changes anything, none prints. The RAPL reader is checked against
pyRAPL, which shares no code with it. pyRAPL runs in a process of its own: it installs a log handler
when imported, warns on newer Pythons, and takes half a second where pandas is there.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuner import machine
from tuner.control import pending
from tuner.meters import NAMES, Availability, MeterOptions, Unavailable, probe
from tuner.trial import MeterError

State = Literal["ok", "missing", "warning"]

KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY")

BUSY = 0.1
"""Load average per logical CPU above which other work is a visible part of what a counter counts."""

AGREEMENT = 0.10
"""How far the two RAPL readers may differ over one second. Their reads lie a few milliseconds apart."""

SECOND_READER_SECONDS = 60.0
"""How long pyRAPL may take to be imported: it pulls in pandas."""

SECOND_READER = """
import json, sys
import pyRAPL
sensor = pyRAPL.Sensor([pyRAPL.Device.PKG])
for _ in sys.stdin:
    print(json.dumps(sensor.energy()[0::2]), flush=True)
"""
"""Answers each line on its input with the microjoules of every package; -1 stands for an absent one."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    reason: str
    """What was found; a sentence without its full stop."""
    remedy: str
    """The command that mends it, one a line; empty when nothing has to be mended."""


NO_WALL = Check(
    "meter wall",
    "ok",
    "not in use; --meter wall reads a smart plug, a PDU or a BMC through --wall-command CMD or --wall-url URL",
    "",
)


def examine(options: MeterOptions) -> list[Check]:
    """Look at everything that a study depends on. Takes about two seconds where RAPL can be read.

    A wall meter is a thing that one has or has not, and zeus is for machines that few have: without them
    nothing is missing. zeus is looked at where it is installed.
    """
    unasked = {"zeus"} if importlib.util.find_spec("zeus") is None else set()
    if options.wall is None:
        unasked.add("wall")
    available = {name: probe(name, options) for name in NAMES if name not in unasked}
    return [
        *(_meter(availability) for availability in available.values()),
        *([] if "wall" in available else [NO_WALL]),
        *([second_opinion()] if available["rapl"].ok else []),
        surroundings(),
        governor(),
        load(),
        *left_changed(),
        engine(),
        *(key(name, os.environ) for name in KEYS),
    ]


def _meter(availability: Availability) -> Check:
    state: State = "ok" if availability.ok else "missing"
    return Check(f"meter {availability.name}", state, availability.reason, availability.remedy)


def left_changed() -> list[Check]:
    """GPU settings that a killed run left behind; nothing where there are none."""
    return [Check("GPU settings", "warning", sentence, "tune restore") for sentence in pending()]


# --- the second opinion ----------------------------------------------------------------------


def second_opinion(seconds: float = 1.0) -> Check:
    """Read the packages with our reader and with pyRAPL at the same moments, `seconds` apart."""
    from tuner.meters.rapl import RaplMeter

    name = "rapl against pyRAPL"
    try:
        with (
            contextlib.closing(RaplMeter()) as meter,
            contextlib.closing(_SecondReader()) as other,
        ):
            packages = [domain for domain in meter.domains() if domain.startswith("cpu")]
            theirs, ours = other.joules(), meter.read()
            time.sleep(seconds)
            theirs_after, ours_after = other.joules(), meter.read()
    except _NoSecondReader as error:
        return Check(name, "warning", f"pyRAPL cannot be asked: {error}", error.remedy)
    except (MeterError, Unavailable) as error:
        return Check(name, "warning", f"the counters could not be read for {seconds:g} s: {error}", "tune doctor")
    return compare(
        sum(ours_after[domain].microjoules - ours[domain].microjoules for domain in packages) / 1e6,
        sum(theirs_after) - sum(theirs),
    )


def compare(ours: float, theirs: float) -> Check:
    """Whether two readers saw the same joules. pyRAPL does not know that counters wrap."""
    name = "rapl against pyRAPL"
    both = f"the packages used {ours:.2f} J by our reading and {theirs:.2f} J by pyRAPL's"
    if theirs < 0:
        return Check(name, "warning", f"{both}: a counter began anew meanwhile", "tune doctor  # look once more")
    if abs(ours - theirs) > AGREEMENT * max(ours, theirs) or ours <= 0:
        return Check(name, "warning", f"{both}: they should agree within {AGREEMENT:.0%}", "tune run --meter estimate")
    return Check(name, "ok", both, "")


class _NoSecondReader(Exception):
    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


class _SecondReader:
    """pyRAPL in a process of its own. Raises `_NoSecondReader`."""

    def __init__(self) -> None:
        if importlib.util.find_spec("pyRAPL") is None:
            raise _NoSecondReader("it is not installed", "pip install pyRAPL")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SECOND_READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def joules(self) -> list[float]:
        """Joules of each package, as pyRAPL reads them now."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(file=process.stdin, flush=True)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(SECOND_READER_SECONDS):
                raise _NoSecondReader(f"no answer within {SECOND_READER_SECONDS:g} s")
        line = process.stdout.readline()
        if not line:
            raise _NoSecondReader(self._last_words())
        values = json.loads(line)
        if not values or min(values) < 0:
            raise _NoSecondReader(f"it reads {values}, where -1 stands for a package without a counter")
        return [value / 1e6 for value in values]

    def close(self) -> None:
        try:
            self._process.communicate(timeout=1.0)  # closes its input, at which it ends
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _last_words(self) -> str:
        _, errors = self._process.communicate()
        lines = errors.strip().splitlines()
        # It raises most of its errors without a message; their names then say what is known.
        return lines[-1].removeprefix("pyRAPL.exception.") if lines else f"exit status {self._process.returncode}"


# --- the machine -----------------------------------------------------------------------------


def surroundings(root: Path = Path("/")) -> Check:
    """Whether something between this process and the hardware hides its counters."""
    virtual_machine, container = machine.virtual_machine(root), machine.container(root)
    if virtual_machine:
        inside = f" with a container ({container})" if container else ""
        return Check(
            "machine",
            "warning",
            f"a virtual machine ({virtual_machine}){inside}: it has no CPU energy counters, and others share its CPU",
            "tune run --cpu-watts LOW..HIGH  # narrows the estimate; only the host can measure",
        )
    if container:
        return Check(
            "machine",
            "warning",
            f"a container ({container}): it hides the CPU's energy counters unless they are mounted",
            "docker run -v /sys/devices/virtual/powercap:/powercap:ro -e TUNE_POWERCAP_ROOT=/powercap ...",
        )
    return Check("machine", "ok", f"{machine.cpu_model(root)}, no virtual machine and no container seen", "")


def governor(root: Path = Path("/")) -> Check:
    """Whether the CPU's frequency policy is known, and the same on every CPU."""
    found = machine.governor(root)
    if not found:
        return Check(
            "frequency governor",
            "missing",
            "not readable, so a change of it between two studies goes unnoticed",
            "ls /sys/devices/system/cpu/cpu0/cpufreq",
        )
    if "," in found:
        return Check(
            "frequency governor",
            "warning",
            f"CPUs differ ({found}): threads cost more or less by where they run",
            f"sudo cpupower frequency-set -g {found.split(', ')[0]}",
        )
    return Check("frequency governor", "ok", f"{found} on every CPU", "")


def load(average: float | None = None, logical_cpus: int | None = None) -> Check:
    """Whether other work runs now: counters count the whole package, not one process."""
    average = machine.load_average() if average is None else average
    logical_cpus = logical_cpus or os.cpu_count() or 1
    found = f"load average {average:.2f} on {logical_cpus} logical CPUs"
    if average > BUSY * logical_cpus:
        return Check(
            "other load", "warning", f"{found}: other work adds to what counters count", "top  # shows what runs"
        )
    return Check("other load", "ok", found, "")


# --- engines and chats -----------------------------------------------------------------------


def engine() -> Check:
    """Whether the workload `llama` can run."""
    versions = {}
    for package in ("xllamacpp", "gguf"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    lacking = [package for package in ("xllamacpp", "gguf") if package not in versions]
    if lacking:
        return Check("engine llama", "missing", f"{' and '.join(lacking)} not installed", "pip install xllamacpp gguf")
    return Check("engine llama", "ok", ", ".join(f"{p} {v}" for p, v in versions.items()), "")


def key(name: str, environment: Mapping[str, str]) -> Check:
    """Whether an API key is set; its value is looked at by nobody."""
    if environment.get(name, "").strip():
        return Check(f"key {name}", "ok", "set", "")
    return Check(
        f"key {name}", "missing", "not set; rules, classical methods and --llm paste work without", f"export {name}=..."
    )
