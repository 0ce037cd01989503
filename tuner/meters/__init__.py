"""Sources of energy readings; each file is one meter.

    nvml      NVIDIA GPUs: the driver's total-energy counter
    rapl      CPU packages and their memory: the kernel's powercap counters
    estimate  no counter at all: CPU time x a power range, always an interval

A meter is probed and chosen once, by whoever plans a study, and opened in each worker. What is taken
and what is missing is said in one line, and a meter that was named is never replaced by another one.
Importing this package imports none of the meters.

Glossary
    domain     one counter: `gpu0`, `cpu0`, `dram0`, or `cpu` for the estimate
    measured   every domain is a hardware counter; the boundary is the board or the package, not the wall
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from tuner.space import Lever, Refused, closest, excerpt
from tuner.trial import QUALITIES, Meter, MeterError, Quality, Reading

NAMES = ("nvml", "rapl", "estimate")
SPECS = ("auto", "nvml", "rapl", "nvml+rapl", "estimate")

UNSEEN = {"nvml": "GPU", "rapl": "CPU"}
"""Whose energy is missing when this meter is."""


@dataclass(frozen=True)
class Availability:
    """Whether a meter can be read here."""

    name: str
    ok: bool
    domains: tuple[str, ...]
    """What it would read; empty when it cannot."""
    quality: Quality
    reason: str
    """What was found, or what stands in the way; a sentence without its full stop."""
    remedy: str
    """The command that mends it, one a line; empty when nothing has to be mended."""


class Unavailable(Exception):
    """A meter cannot be read here: why, and the command that mends it. Never leaves this package."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class MeterOptions:
    """What a person may tell the meters. Kept in a study's header as `record()`."""

    cpu_watts: tuple[float, float] | None = None
    """Power of all CPU packages together at full load, in watts: the range that the estimate uses."""

    def __post_init__(self) -> None:
        if self.cpu_watts is None:
            return
        low, high = self.cpu_watts
        if not (math.isfinite(low) and math.isfinite(high) and 0 < low <= high):
            raise Refused(f"--cpu-watts {low:g}..{high:g}: expected watts with 0 < low <= high, such as 15..65")

    @classmethod
    def parse(cls, cpu_watts: str | None = None) -> Self:
        """From the command line: `15..65`, or one number where it is known exactly."""
        if cpu_watts is None:
            return cls()
        found = re.fullmatch(r"([0-9.]+?)(?:\.\.([0-9.]+))?", cpu_watts.strip())
        try:
            if found is None:
                raise ValueError
            low = float(found[1])
            high = low if found[2] is None else float(found[2])
        except ValueError:
            raise Refused(f"--cpu-watts {excerpt(cpu_watts)}: expected LOW..HIGH in watts, such as 15..65") from None
        return cls(cpu_watts=(low, high))

    def record(self) -> dict[str, object]:
        """Plain JSON values; `from_record` is the way back."""
        return {"cpu_watts": None if self.cpu_watts is None else list(self.cpu_watts)}

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> Self:
        """From a study's header. An option this version does not know is refused, not ignored."""
        unknown = sorted(set(record) - {"cpu_watts"})
        if unknown:
            raise Refused(f"meter option {excerpt(unknown[0])}: expected cpu_watts; was it written by a newer tune?")
        watts = record.get("cpu_watts")
        match watts:
            case None:
                return cls()
            case [int() | float() as low, int() | float() as high]:
                return cls(cpu_watts=(float(low), float(high)))
        raise Refused(f"meter option cpu_watts={excerpt(watts)}: expected two numbers of watts")


@dataclass(frozen=True)
class MeterChoice:
    """The meters that a study is measured with."""

    names: tuple[str, ...]
    quality: Quality
    blind_to: frozenset[Lever]
    domains: tuple[str, ...]
    sentence: str
    """One line: what was taken, what is missing and why."""


def probe(name: str, options: MeterOptions) -> Availability:
    """Whether the meter called `name` can be read here and now. Never raises for a name in `NAMES`."""
    match name:
        case "nvml":
            from tuner.meters import nvml

            return nvml.probe()
        case "rapl":
            from tuner.meters import rapl

            return rapl.probe()
        case "estimate":
            from tuner.meters import estimate

            return estimate.probe(options)
    raise _unknown(name, NAMES)


def choose(spec: str, options: MeterOptions, *, require_measured: bool) -> MeterChoice:
    """The meters that `--meter SPEC` means on this machine.

    Args:
        spec: `auto` takes every counter that can be read and the estimate when there is none; any
            other value is taken as it stands.
        options: see `MeterOptions`.
        require_measured: refuse the estimate.

    Raises:
        Refused: for an unknown meter, for a named one that cannot be read, and for an estimate where
            a measurement is required. The message holds the command that mends it.
    """
    names = tuple(sorted(spec.split("+"), key=_rank))
    if "+".join(names) not in SPECS:
        raise _unknown(spec, SPECS)
    if names == ("estimate",) and require_measured:
        raise Refused("--meter estimate: an estimate is no measurement; leave out --require-measured or name a counter")
    counters = ("nvml", "rapl")
    if names == ("auto",):
        found = [probe(name, options) for name in counters]
        if not any(a.ok for a in found):
            return _fall_back(found, options, require_measured=require_measured)
        taken, missing = [a for a in found if a.ok], [_absence(a) for a in found if not a.ok]
    else:
        taken = [probe(name, options) for name in names]
        for availability in taken:
            if not availability.ok:
                raise Refused(_refusal(availability))
        if names == ("estimate",):
            return _choice(taken, f"meter: estimate ({taken[0].reason}). Numbers are estimated, see `tune doctor`.")
        missing = [f"{UNSEEN[name]} energy is not counted" for name in counters if name not in names]
    domains = ", ".join(d for a in taken for d in a.domains)
    without = f"; {'; '.join(missing)}" if missing else ""
    return _choice(taken, f"meter: {'+'.join(a.name for a in taken)} ({domains}), measured{without}.")


def open_meter(names: Sequence[str], options: MeterOptions) -> Meter:
    """Open what `choose` named; several meters become one that keeps their domains apart.

    The estimate counts the CPU time of the calling process and of everything below it from now on.

    Raises:
        Refused: for a name that is no meter.
        MeterError: when a meter that was chosen can no longer be read.
    """
    if not names or set(names) - set(NAMES):
        raise _unknown("+".join(names), SPECS[1:])
    with contextlib.ExitStack() as opened:
        parts: list[Meter] = []
        for name in sorted(set(names), key=_rank):
            try:
                part = _open(name, options)
            except Unavailable as error:
                raise MeterError(f"{name}: {error.reason}") from error
            opened.callback(part.close)
            parts.append(part)
        opened.pop_all()
    return parts[0] if len(parts) == 1 else Together(parts)


class Together:
    """Several meters read as one, one after the other."""

    def __init__(self, parts: Sequence[Meter]) -> None:
        self._parts = tuple(parts)
        self.name = "+".join(p.name for p in parts)
        self.quality: Quality = max((p.quality for p in parts), key=QUALITIES.index)
        self.blind_to = blind_to([p.name for p in parts])
        self.update_seconds = max(p.update_seconds for p in parts)

    def domains(self) -> tuple[str, ...]:
        return tuple(domain for part in self._parts for domain in part.domains())

    def read(self) -> dict[str, Reading]:
        return {domain: reading for part in self._parts for domain, reading in part.read().items()}

    def close(self) -> None:
        with contextlib.ExitStack() as closing:
            for part in self._parts:
                closing.callback(part.close)


def blind_to(names: Sequence[str]) -> frozenset[Lever]:
    """The levers whose effect these meters cannot see together.

    Offloading moves energy from one device to the other, so whoever counts only one of them sees a
    saving that is none. CPU time is the same at any clock and under any power limit, so an estimate
    sees none of these three.
    """
    if "estimate" in names:
        return frozenset({"offload", "clock", "power"})
    return frozenset() if {"nvml", "rapl"} <= set(names) else frozenset({"offload"})


def _open(name: str, options: MeterOptions) -> Meter:
    match name:
        case "nvml":
            from tuner.meters.nvml import NvmlMeter

            return NvmlMeter()
        case "rapl":
            from tuner.meters.rapl import RaplMeter

            return RaplMeter()
    from tuner.meters.estimate import EstimateMeter

    return EstimateMeter(options)


def _fall_back(found: Sequence[Availability], options: MeterOptions, *, require_measured: bool) -> MeterChoice:
    absences = "; ".join(_absence(a) for a in found)
    if require_measured:
        raise Refused(
            f"--require-measured: nothing can be measured here ({absences}); `tune doctor` says how to mend it"
        )
    estimate = probe("estimate", options)
    if not estimate.ok:
        raise Refused(_refusal(estimate))
    return _choice(
        [estimate], f"meter: estimate ({estimate.reason}; {absences}). Numbers are estimated, see `tune doctor`."
    )


def _choice(taken: Sequence[Availability], sentence: str) -> MeterChoice:
    names = tuple(a.name for a in taken)
    return MeterChoice(
        names=names,
        quality=max((a.quality for a in taken), key=QUALITIES.index),
        blind_to=blind_to(names),
        domains=tuple(d for a in taken for d in a.domains),
        sentence=sentence,
    )


def _absence(availability: Availability) -> str:
    return f"no {availability.name.upper()}: {availability.reason}"


def _refusal(availability: Availability) -> str:
    first = availability.remedy.splitlines()[0] if availability.remedy else "--meter auto takes what there is"
    return f"--meter {availability.name}: {availability.reason}; {first}"


def _unknown(name: str, choices: Sequence[str]) -> Refused:
    return Refused(f"meter {excerpt(name)}: expected {', '.join(choices)}{closest(name, choices)}")


def _rank(name: str) -> int:
    return NAMES.index(name) if name in NAMES else len(NAMES)
