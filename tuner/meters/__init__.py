"""Sources of energy readings; each file is one meter.

    nvml      NVIDIA GPUs: the driver's total-energy counter
    rapl      CPU packages and their memory: the kernel's powercap counters
    zeus      AMD GPUs, Apple Silicon, Jetson: what the package `zeus` reads there
    wall      the whole machine: a plug, PDU or BMC that a command or an address reads
    estimate  no counter at all: CPU time x a power range, always an interval

A meter is probed and chosen once, by whoever plans a study, and opened in each worker. What is taken
and what is missing is said in one line, and a meter that was named is never replaced by another one.
Importing this package imports none of the meters.

Glossary
    domain     one counter: `gpu0`, `cpu0`, `dram0`, `soc0`, `wall0`, or `cpu` for the estimate
    measured   every domain is a hardware counter; its boundary is that of its domain
    sampled    power was read now and then and added up, or the counter is the vendor's own model
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

from tuner.space import Lever, Refused, closest, excerpt
from tuner.trial import QUALITIES, Meter, MeterError, Quality, Reading

if TYPE_CHECKING:
    from tuner.meters.wall import WallSource

NAMES = ("nvml", "rapl", "zeus", "wall", "estimate")
SPECS = ("auto", "nvml", "rapl", "nvml+rapl", "zeus", "rapl+zeus", "wall", "estimate")

Processor = Literal["cpu", "gpu"]

COUNTED_IN: dict[Processor, tuple[str, ...]] = {"cpu": ("cpu", "soc", "wall"), "gpu": ("gpu", "soc", "wall")}
"""How the domains begin that hold a processor's energy."""


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
    how: str = ""
    """What follows the quality in a sentence, where that word alone says too little: `every 1 s`."""


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
    wall: WallSource | None = None
    """Where the wall meter is read; None unless it is the one that is used."""

    def __post_init__(self) -> None:
        if self.cpu_watts is None:
            return
        low, high = self.cpu_watts
        if not (math.isfinite(low) and math.isfinite(high) and 0 < low <= high):
            raise Refused(f"--cpu-watts {low:g}..{high:g}: expected watts with 0 < low <= high, such as 15..65")

    @classmethod
    def parse(
        cls,
        cpu_watts: str | None = None,
        *,
        wall_command: str | None = None,
        wall_url: str | None = None,
        wall_unit: str | None = None,
        wall_field: str | None = None,
        wall_interval: float | None = None,
    ) -> Self:
        """From the command line.

        Args:
            cpu_watts: `15..65`, or one number where it is known exactly.
            wall_command: see `WallSource` for this and the following.
            wall_url: an HTTP address, in place of the command.
            wall_unit: of a number without one.
            wall_field: which number, where there are several.
            wall_interval: seconds between two samples; one second when left out.

        Raises:
            Refused: for a value that cannot be meant, and for a wall option without command and address.
        """
        return cls(
            cpu_watts=None if cpu_watts is None else _watts(cpu_watts),
            wall=_wall(wall_command, wall_url, wall_unit, wall_field, wall_interval),
        )

    def record(self) -> dict[str, object]:
        """Plain JSON values; `from_record` is the way back. No wall, no key: other versions can read it."""
        watts = None if self.cpu_watts is None else list(self.cpu_watts)
        return {"cpu_watts": watts} | ({} if self.wall is None else {"wall": self.wall.record()})

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> Self:
        """From a study's header. An option this version does not know is refused, not ignored."""
        unknown = sorted(set(record) - {"cpu_watts", "wall"})
        if unknown:
            raise Refused(
                f"meter option {excerpt(unknown[0])}: expected cpu_watts or wall; was it written by a newer tune?"
            )
        wall = None
        if record.get("wall") is not None:
            from tuner.meters.wall import WallSource

            wall = WallSource.from_record(record["wall"])
        watts = record.get("cpu_watts")
        match watts:
            case None:
                return cls(wall=wall)
            case [int() | float() as low, int() | float() as high]:
                return cls(cpu_watts=(float(low), float(high)), wall=wall)
        raise Refused(f"meter option cpu_watts={excerpt(watts)}: expected two numbers of watts")


def _watts(text: str) -> tuple[float, float]:
    found = re.fullmatch(r"([0-9.]+?)(?:\.\.([0-9.]+))?", text.strip())
    try:
        if found is None:
            raise ValueError
        low = float(found[1])
        return low, low if found[2] is None else float(found[2])
    except ValueError:
        raise Refused(f"--cpu-watts {excerpt(text)}: expected LOW..HIGH in watts, such as 15..65") from None


def _wall(
    command: str | None, url: str | None, unit: str | None, field: str | None, interval: float | None
) -> WallSource | None:
    if command is None and url is None:
        for option, value in (("unit", unit), ("field", field), ("interval", interval)):
            if value is not None:
                raise Refused(f"--wall-{option}: it goes with --wall-command CMD or --wall-url URL")
        return None
    from tuner.meters.wall import WallSource

    source = WallSource(command=command, url=url, unit=unit, field=field)
    return source if interval is None else replace(source, interval_seconds=interval)


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
        case "zeus":
            from tuner.meters import zeus

            return zeus.probe()
        case "wall":
            from tuner.meters import wall

            return wall.probe(options.wall)
        case "estimate":
            from tuner.meters import estimate

            return estimate.probe(options)
    raise _unknown(name, NAMES)


def choose(spec: str, options: MeterOptions, *, require_measured: bool) -> MeterChoice:
    """The meters that `--meter SPEC` means on this machine.

    Args:
        spec: `auto` takes every counter that can be read (nvml, rapl) and the estimate when there is none;
            any other value is taken as it stands. `wall` and `zeus` are only ever taken by name: what they
            see is for a person to say.
        options: see `MeterOptions`.
        require_measured: refuse the estimate.

    Raises:
        Refused: for an unknown meter, for a named one that cannot be read, for an estimate where a
            measurement is required, and for wall options beside another meter. The message holds the
            command that mends it.
    """
    names = tuple(sorted(spec.split("+"), key=_rank))
    if "wall" in names and len(names) > 1:
        raise Refused(f"--meter {excerpt(spec)}: the wall holds what the others count; name it alone: --meter wall")
    if "+".join(names) not in SPECS:
        raise _unknown(spec, SPECS)
    if options.wall is not None and names != ("wall",):
        raise Refused(f"{options.wall.option}: it goes with --meter wall, not with --meter {spec}")
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
        domains = [d for a in taken for d in a.domains]
        missing = [f"{p.upper()} energy is not counted" for p in COUNTED_IN if not counts(domains, p)]
    choice = _choice(taken, "")
    how = " ".join((choice.quality, *(a.how for a in taken if a.how)))
    without = f"; {'; '.join(missing)}" if missing else ""
    return replace(choice, sentence=f"meter: {'+'.join(choice.names)} ({', '.join(choice.domains)}), {how}{without}.")


def counts(domains: Sequence[str], processor: Processor) -> bool:
    """Whether the energy of this kind of processor is in one of these domains."""
    return any(domain.startswith(COUNTED_IN[processor]) for domain in domains)


def open_meter(names: Sequence[str], options: MeterOptions) -> Meter:
    """Open what `choose` named; several meters become one that keeps their domains apart.

    The estimate counts the CPU time of the calling process and of everything below it from now on.

    Raises:
        Refused: for a name that is no meter.
        MeterError: when a meter that was chosen can no longer be read.
    """
    if not names or set(names) - set(NAMES) or ("wall" in names and len(names) > 1):
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
        self.blind_to = blind_to([p.name for p in parts], self.domains())
        self.update_seconds = max(p.update_seconds for p in parts)

    def domains(self) -> tuple[str, ...]:
        return tuple(domain for part in self._parts for domain in part.domains())

    def read(self) -> dict[str, Reading]:
        return {domain: reading for part in self._parts for domain, reading in part.read().items()}

    def close(self) -> None:
        with contextlib.ExitStack() as closing:
            for part in self._parts:
                closing.callback(part.close)


def blind_to(names: Sequence[str], domains: Sequence[str]) -> frozenset[Lever]:
    """The levers whose effect these meters cannot see together, with the domains that they have.

    Offloading moves energy from one device to the other, so whoever counts only one of them sees a
    saving that is none. CPU time is the same at any clock and under any power limit, so an estimate
    sees none of these three.
    """
    if "estimate" in names:
        return frozenset({"offload", "clock", "power"})
    return frozenset() if all(counts(domains, p) for p in COUNTED_IN) else frozenset({"offload"})


def _open(name: str, options: MeterOptions) -> Meter:
    match name:
        case "nvml":
            from tuner.meters.nvml import NvmlMeter

            return NvmlMeter()
        case "rapl":
            from tuner.meters.rapl import RaplMeter

            return RaplMeter()
        case "zeus":
            from tuner.meters.zeus import ZeusMeter

            return ZeusMeter()
        case "wall":
            from tuner.meters.wall import WallMeter

            return WallMeter(options.wall)
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
    names, domains = tuple(a.name for a in taken), tuple(d for a in taken for d in a.domains)
    return MeterChoice(
        names=names,
        quality=max((a.quality for a in taken), key=QUALITIES.index),
        blind_to=blind_to(names, domains),
        domains=domains,
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
