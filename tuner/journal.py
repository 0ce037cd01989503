"""The study on disk: append-only JSON lines, one event a line.

The first line is the header; every later line is something that happened. An event is written,
flushed and synced before anything else happens, so that whatever kills the program leaves every
finished trial behind. A torn last line is what a crash leaves: it is forgiven, and cut off before
the next append. A torn line anywhere else is damage, and its number is named.

The journal is the only memory of a study: resuming reads it and goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec

from tuner.space import Refused, Value
from tuner.trial import Decision, History, Lost, Noise, Proposal, Repeat, Target, Trial, Unit

StopKind = Literal["goal", "budget", "failures", "person", "exhausted", "chat"]

# Version 1: header, changes, proposal, trial, decision, lost, segment, pair, end.
# Version 2: adds repeat, prune; a trial may hold its warm-up, idle power and whole energy. Reads version 1.
# Version 3: adds limits; a trial may break one, hold metrics and figures, or share its engine. Reads versions 1 and 2.
FORMAT = 3

NAME = "journal.jsonl"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one configuration is measured."""

    windows: int = 5
    """Measured windows in one trial."""
    window_seconds: float | None = None
    """A window holds whole passes of the load and lasts at least this long; None until the meter is known."""
    retries: int = 3
    """How often an invalid window is measured again."""
    timeout_seconds: float = 600.0
    """A trial that takes longer is ended, and has failed."""
    warm_up_seconds: tuple[float, float] | None = None
    """At least and at most so long until the engine is steady; None until the meter is known."""
    cool_down_seconds: float | None = None
    """At most so long is waited before a trial for the temperature of the first one; None until the meter is known."""
    most_others: float = 0.25
    """Share of all CPUs above which other processes make a window invalid; 1 leaves it to the reader."""
    launches: int = 4
    """At most so many launches of a configuration that matters, until its 95 % interval is within `precision`."""
    precision: float = 0.02
    """Half-width of that interval, as a share."""
    sentinel_every: int = 4
    """After so many trials default or best runs again, to see drift; 0 for never."""
    fast: bool = False
    """Short windows, single launches: it may rank, it may not claim."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a study is: everything that must be known to go on with it, and to read it years later."""

    name: str
    workload: str
    """The runner, by name or path."""
    target: Target
    proposer: str
    """`llm` or the name of a classical proposer."""
    template: str | None = None
    """The prompt, by name or path, where an LLM proposes."""
    llm: str | None = None
    """`openai:MODEL`, `anthropic:MODEL` or `paste`; never a key."""
    base_url: str | None = None
    seed: int = 0
    pins: tuple[str, ...] = ()
    ranges: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    """As typed: `ttft_p95_s<=0.5`. What breaks one is measured, and can never be the best."""
    threshold: str | None = None
    """As typed: `0.8x` of the default, or `0.45J` per unit."""
    trials: int | None = None
    time_seconds: float | None = None
    confirm_pairs: int = 0
    prune: bool = True
    """Whether changes that do not matter are sought once a saving is confirmed."""
    plan: Plan = Plan()
    require_measured: bool = False
    """Whether estimated energy is refused, also when the study is resumed."""
    meters: tuple[str, ...] = ()
    meter_options: Mapping[str, object] = field(default_factory=dict)
    meter_sentence: str = ""
    blind: tuple[str, ...] = ()
    """Parameters held at their default because the meter cannot see what they do."""
    noise: Noise | None = None
    """From the calibration that fits this machine, engine, model, load, plan and meter; None without one."""
    power_control: bool = False
    """Whether the GPU's power limit and clock were allowed to be tuned."""
    space: tuple[Mapping[str, object], ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    """Engine, version and model, as the runner names them."""
    unit: Unit = "token"
    """What energy is divided by, as the runner says."""
    tune_version: str = ""
    started_unix: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a resumed study does differently from here on; None leaves it as it was."""

    trials: int | None = None
    time_seconds: float | None = None
    threshold: str | None = None
    confirm_pairs: int | None = None
    prune: bool | None = None
    llm: str | None = None
    base_url: str | None = None
    template: str | None = None

    def made_to(self, header: Header) -> Header:
        """The header with these changes; it is what later resumes and reports go by."""
        given = {name: value for name in self.__dataclass_fields__ if (value := getattr(self, name)) is not None}
        return replace(header, **given)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A forced resume elsewhere: trials from here on are not compared with those before."""

    number: int
    differences: tuple[str, ...]
    machine: Mapping[str, str]
    identity: Mapping[str, str]
    meters: tuple[str, ...] = ()
    meter_sentence: str = ""
    space: tuple[Mapping[str, object], ...] = ()
    noise: Noise | None = None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Default and best, measured freshly one after the other: the only ground for a claim."""

    number: int
    default: Trial
    best: Trial
    default_first: bool
    config: Mapping[str, Value]
    """The configuration that is confirmed."""
    planned: int
    """How many pairs were decided on beforehand. Looking at four and then asking for more is another plan."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    """A pair that asks whether changes may go back to their defaults without losing the gain."""

    number: int
    kept: Trial
    shorter: Trial
    """With fewer changes from the default."""
    kept_first: bool
    config: Mapping[str, Value]
    """The shorter configuration."""
    dropped: tuple[str, ...]
    """Parameters that are back at their defaults in it."""
    planned: int


@dataclass(frozen=True, kw_only=True)
class End:
    """The reason why a run stopped; a resumed study goes on after it."""

    kind: StopKind
    reason: str


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A proposal whose trial has not ended: what a crash interrupts."""

    number: int
    proposal: Proposal


Event = Trial | Repeat | Decision | Lost | Pending | Changes | Segment | Pair | Prune | End

_KINDS: dict[str, type[Event]] = {
    "proposal": Pending,
    "trial": Trial,
    "repeat": Repeat,
    "decision": Decision,
    "lost": Lost,
    "changes": Changes,
    "segment": Segment,
    "pair": Pair,
    "prune": Prune,
    "end": End,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


@dataclass(frozen=True, kw_only=True)
class Study:
    """A journal's content, event by event added up."""

    folder: Path
    header: Header
    history: History = field(default_factory=History)
    segments: tuple[Segment, ...] = ()
    pairs: tuple[Pair, ...] = ()
    prunes: tuple[Prune, ...] = ()
    ends: tuple[End, ...] = ()
    pending: Pending | None = None
    pending_starts: int = 0
    """How often the pending proposal's trial was started and never ended."""

    def add(self, event: Event) -> Study:
        """The study after `event`."""
        match event:
            case Trial():
                return replace(self, history=self.history.add(event), pending=None, pending_starts=0)
            case Decision():
                # A stop that was asked for says nothing against the configuration that it cut short.
                starts = 0 if event.action == "stop" else self.pending_starts
                return replace(self, history=self.history.add(event), pending_starts=starts)
            case Lost() | Repeat():
                return replace(self, history=self.history.add(event))
            case Changes():
                return replace(self, header=event.made_to(self.header))
            case Pending():
                return replace(self, pending=event, pending_starts=self.pending_starts + 1)
            case Segment():
                return replace(
                    self,
                    history=replace(self.history, segment=event.number, noise=event.noise),
                    segments=(*self.segments, event),
                    pending=None,
                    pending_starts=0,
                )
            case Pair():
                return replace(self, pairs=(*self.pairs, event))
            case Prune():
                return replace(self, prunes=(*self.prunes, event))
            case End():
                return replace(self, ends=(*self.ends, event))

    @property
    def segment(self) -> int:
        """The number of the newest segment; 0 unless a resume was forced."""
        return self.segments[-1].number if self.segments else 0

    @property
    def machine(self) -> Mapping[str, str]:
        """The machine of the newest segment."""
        return self.segments[-1].machine if self.segments else self.header.machine

    @property
    def identity(self) -> Mapping[str, str]:
        """Engine and model of the newest segment."""
        return self.segments[-1].identity if self.segments else self.header.identity

    @property
    def space(self) -> tuple[Mapping[str, object], ...]:
        """The search space of the newest segment, as its runner recorded it."""
        return self.segments[-1].space if self.segments else self.header.space


class JournalError(Exception):
    """The journal cannot be written. What was written before is kept."""


class _Line(msgspec.Struct):
    kind: str
    body: msgspec.Raw
    at: float = 0.0


class _Head(msgspec.Struct):
    format: int
    kind: str
    body: msgspec.Raw


def _encode(kind: str, body: object, **more: object) -> bytes:
    return msgspec.json.encode({**more, "kind": kind, "at": round(time.time(), 3), "body": body}) + b"\n"


def _whole_lines(content: bytes) -> list[bytes]:
    """The lines that end in a newline: a line without one was being written when something stopped it."""
    return content.split(b"\n")[:-1]


def read(folder: Path) -> Study:
    """The study in `folder`.

    Raises:
        Refused: there is no journal, it is of a newer format, or a line before the last one is damaged.
    """
    path = folder / NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        nearby = folder if folder.is_dir() else folder.parent
        raise Refused(f"{folder}: no study here (expected {NAME}); see `ls {nearby}`") from None
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    return _parse(folder, content)


def _parse(folder: Path, content: bytes) -> Study:
    path = folder / NAME
    lines = _whole_lines(content)
    if not lines:
        raise Refused(f"{path}: the header was never finished; start the study anew")
    try:
        head = msgspec.json.decode(lines[0], type=_Head)
        if head.format > FORMAT:
            raise Refused(
                f"{path}: written in format {head.format}, this tune reads up to format {FORMAT};"
                " use the version that wrote it, or a newer one"
            )
        header = msgspec.json.decode(head.body, type=Header)
        study = Study(folder=folder, header=header, history=History(noise=header.noise))
    except msgspec.MsgspecError as error:
        raise Refused(f"{path}: line 1 is no study header ({error})") from error
    for number, line in enumerate(lines[1:], start=2):
        try:
            event = msgspec.json.decode(line, type=_Line)
            study = study.add(msgspec.json.decode(event.body, type=_KINDS[event.kind]))
        except KeyError as error:
            raise Refused(
                f"{path}: line {number} holds {error}, which this tune does not know; use a newer one"
            ) from error
        except msgspec.MsgspecError as error:
            raise Refused(
                f"{path}: line {number} is damaged ({error}); the lines before it are intact:"
                f" keep them with `head -n {number - 1} {path}`"
            ) from error
    return study


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the study for this process. The kernel drops the lock when the process dies, however it dies.

    Raises:
        Refused: another process holds it.
    """
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(20).strip()
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise Refused(f"{folder}: {who} is running this study; wait for it, or stop it first") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class Journal:
    """The open journal of a study that this process holds the lock of."""

    def __init__(self, folder: Path, content: bytes) -> None:
        self.folder = folder
        self.study = _parse(folder, content)
        self._content = content
        self._descriptor = os.open(folder / NAME, os.O_RDWR)

    @classmethod
    def create(cls, folder: Path, header: Header) -> Self:
        """Start a study in `folder`, which exists and is locked."""
        content = _encode("study", header, format=FORMAT)
        try:
            descriptor = os.open(folder / NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                _write(descriptor, content, 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise JournalError(f"{folder / NAME}: {error.strerror}; nothing was started") from error
        return cls(folder, content)

    @classmethod
    def resume(cls, folder: Path) -> Self:
        """Open an existing journal, cutting off what a crash left half-written."""
        study = read(folder)
        path = study.folder / NAME
        content = path.read_bytes()
        first, *rest = _whole_lines(content)
        head = msgspec.json.decode(first, type=_Head)
        if head.format < FORMAT:
            # From here on it holds what an older tune cannot read, and that one must be told so.
            first = msgspec.json.encode({**msgspec.json.decode(first), "format": FORMAT})
        intact = b"".join(line + b"\n" for line in (first, *rest))
        try:
            if intact != content[: len(intact)]:
                _replace(path, intact)
            elif intact != content:
                os.truncate(path, len(intact))
            return cls(folder, intact)
        except OSError as error:
            raise JournalError(f"{path}: {error.strerror}; the study can be read but not continued") from error

    def append(self, event: Event) -> Study:
        """Write `event` so that it survives a crash, and return the study with it.

        Raises:
            JournalError: the disk is full, read-only or gone. The journal keeps its earlier lines whole.
        """
        line = _encode(_NAMES[type(event)], event)
        before = self._content, self.study
        after = self._content + line, self.study.add(event)
        try:
            if not self._still_there():
                self._write_again()
            try:
                self._content, self.study = after
                _write(self._descriptor, line, len(before[0]))
            except OSError:
                # Half a line must not stay: the next append would make it a torn middle.
                self._content, self.study = before
                os.ftruncate(self._descriptor, len(self._content))
                raise
            except BaseException:
                # Ctrl-C in the middle: what has happened has happened, so the line is finished first.
                self._content, self.study = after
                _write(self._descriptor, self._content, 0)
                raise
        except OSError as error:
            cause = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise JournalError(
                f"{self.folder / NAME}: {cause}; {len(self.study.history)} finished trials are kept."
                f" Mend that, then go on with `tune run --resume {self.folder}`"
            ) from error
        return self.study

    def _still_there(self) -> bool:
        """Whether the file on disk is ours and holds exactly what was written to it."""
        try:
            there = (self.folder / NAME).stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(self._descriptor), there) and there.st_size == len(self._content)

    def _write_again(self) -> None:
        """Somebody deleted or cut the file while the study runs: all lines are still here, so put them back."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(self.folder / NAME, self._content)
        os.close(self._descriptor)
        self._descriptor = os.open(self.folder / NAME, os.O_RDWR)

    def close(self) -> None:
        """Give the file back; the study stays readable."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _replace(path: Path, content: bytes) -> None:
    """Put `content` in the place of the file, whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _write(descriptor, content, 0)
    finally:
        os.close(descriptor)
    part.replace(path)


def _write(descriptor: int, content: bytes, offset: int) -> None:
    """All of `content` at `offset`, on the disk before this returns."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
    os.fsync(descriptor)
