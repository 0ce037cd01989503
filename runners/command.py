"""Any command: the person's own benchmark or engine, described by a TOML file (`Target.spec`).

The file says which command runs, what may be changed in it, and where its output says how many tokens or
images it made (docs/engines/command.md). It is data: argument lists reach no shell, `{name}` is replaced by
a value that the search space has checked, and constraints are read by a grammar of their own
(`tuner.expression`).

Two modes. In `run` each pass starts the command and waits for its end; start-up and loading are then inside
every window and cannot be told apart from the work. In `server` the command stays, and each pass runs a
second one, `[load]`, against it.

A process of its own, the keeper (`tuner.keeper`), starts the commands and ends all that they leave behind.

Glossary
    spec         the TOML file, read and checked
    word         one argument of a command; a placeholder never makes two of one
    placeholder  `{threads}`: the value of a parameter, or of the load; `{{threads}}` is the text itself
    keeper       the process between the worker and a command
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args
from urllib.parse import urlsplit

from tuner.expression import KEYWORDS, MOST_RULE_CHARACTERS, Kind, RuleFault, kind_of, rule
from tuner.keeper import Keeper, ending
from tuner.serving import cut, free_port
from tuner.space import (
    Choice,
    Config,
    Constraint,
    Effect,
    Float,
    Int,
    Lever,
    Parameter,
    Refused,
    Scope,
    SearchSpace,
    Value,
    closest,
    excerpt,
    show,
)
from tuner.trial import EngineError, Service, Target, Unit, Work, refuse_unused

PASS_SECONDS = 300.0
READY_SECONDS = 120.0
"""How long a pass and a server's start may take where the file does not say."""

POLL_SECONDS = 0.05

REGEX_SECONDS = 5.0
"""How long a regular expression may search what a command printed: one with nested repeats may never end."""

MOST_UNITS = 2**53
"""Beyond it, not every whole number is a float."""

SERVICE_PORT = 8080

LABEL_CHARACTERS = 60
"""Of a command, so much names it in a sentence."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_METRIC = re.compile(r"[a-z][a-z0-9_]*")

# --- placeholders ----------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"\{\{(?P<literal>[A-Za-z_][A-Za-z0-9_]*)\}\}|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)\}")


def shown(value: Value) -> str:
    """A value as the command gets it: as tables show it, but with every digit."""
    text = show(value)
    return repr(value) if isinstance(value, float) and float(text) != value else text


def placeholders(word: str) -> list[str]:
    """The names that stand in a word, in order."""
    return [match["name"] for match in _PLACEHOLDER.finditer(word) if match["name"]]


def fill(word: str, values: Mapping[str, str]) -> str:
    """`word` with each `{name}` replaced, once: what a value holds is never looked at again."""
    return _PLACEHOLDER.sub(lambda m: values[m["name"]] if m["name"] else f"{{{m['literal']}}}", word)


# --- the file --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """Where a number stands in what a command prints."""

    where: str
    """The key of the file that says so."""
    json: tuple[str, ...] = ()
    regex: re.Pattern[str] | None = None
    fixed: float | None = None
    scale: float = 1.0

    def __str__(self) -> str:
        if self.regex:
            return f"a match of {excerpt(self.regex.pattern)}"
        return f"a JSON line with {excerpt('.'.join(self.json))}"


@dataclass(frozen=True)
class Step:
    """One command of the file."""

    table: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    folder: Path
    timeout_seconds: float

    def words(self) -> Iterator[str]:
        yield from self.argv
        yield from self.env.values()


@dataclass(frozen=True)
class Ready:
    """How one knows that a server serves."""

    regex: re.Pattern[str] | None
    url: str | None
    timeout_seconds: float


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A file that has been read and has no fault."""

    path: Path
    sha256: str
    mode: Literal["run", "server"]
    command: Step
    load: Step | None
    ready: Ready | None
    flags: Mapping[str, Mapping[str, tuple[str, ...]]]
    """By parameter and shown value: the words that its placeholder stands for."""
    output: tuple[str, ...]
    """The streams in which figures are looked for."""
    parameters: tuple[Parameter, ...]
    rules: tuple[Constraint, ...]
    unit: Unit
    units: Figure
    expected: int | None
    prompt_tokens: Figure | None
    timings: Mapping[str, Figure]
    metrics: Mapping[str, Figure]
    effective: Mapping[str, Figure]
    identity: Mapping[str, str]
    files: tuple[Path, ...]
    service: Mapping[str, Any]

    @property
    def work(self) -> Step:
        """The command that does the work of a pass."""
        return self.load or self.command

    def steps(self) -> Iterator[Step]:
        yield self.command
        if self.load:
            yield self.load


LOAD = ("prompts", "prompt_tokens", "output_tokens", "seed", "model")
"""Placeholders of the load, the same for every trial. `{port}` is a free port, in server mode."""

RESERVED = frozenset({*LOAD, *KEYWORDS, "port", "gpu_power_limit_w", "gpu_sm_clock_mhz"})

OWN_METRICS = re.compile(r"(tokens|images)_per_s|(latency|ttft|itl)_(mean|p\d+)_s|quality_loss")
"""Figures that tune works out itself."""

_TIMINGS = ("request_seconds", "ttft_seconds", "itl_seconds", "prefill_seconds", "decode_seconds")


def _line_numbers(text: str) -> dict[tuple[str, ...], int]:
    """The line of each table and key. `tomllib` does not say; a key inside an inline table has its table's line."""
    found: dict[tuple[str, ...], int] = {}
    part = r"(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')"
    dotted = rf"{part}(?:\s*\.\s*{part})*"
    table: tuple[str, ...] = ()
    depth, quote = 0, ""

    def keys(name: str) -> tuple[str, ...]:
        return tuple(key.strip("\"'") for key in re.findall(part, name))

    for number, line in enumerate(text.splitlines(), 1):
        rest = line
        if quote:
            if quote not in rest:
                continue
            rest, quote = rest.split(quote, 1)[1], ""
        elif depth == 0:
            if header := re.match(rf"\s*\[\[?\s*({dotted})\s*\]", line):
                table = keys(header[1])
                found.setdefault(table, number)
                continue
            if key := re.match(rf"\s*({dotted})\s*=", line):
                path = keys(key[1])
                for length in range(1, len(path) + 1):
                    found.setdefault((*table, *path[:length]), number)
                rest = line[key.end() :]
        for mark in ('"""', "'''"):
            if rest.count(mark) % 2:
                quote, rest = mark, rest.split(mark, 1)[0]
        bare = re.sub(r"\"(?:\\.|[^\"\\])*\"|'[^']*'|#.*", "", rest)
        depth = max(0, depth + sum(bare.count(c) for c in "[{") - sum(bare.count(c) for c in "]}"))
    return found


class _Faults:
    """What is wrong with a file, all of it."""

    def __init__(self, lines: Mapping[tuple[str, ...], int]) -> None:
        self._lines = lines
        self.found: list[tuple[int, str]] = []

    def add(self, key: tuple[str, ...], sentence: str) -> None:
        line = next((self._lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self._lines), 0)
        at = f"line {line}, " if line else ""
        self.found.append((line, f"{at}{'.'.join(key)}: {sentence}"))


class _Table:
    """A table of the file, read key by key; what nobody asked for is a fault at the end."""

    def __init__(self, values: Mapping[str, Any], key: tuple[str, ...], faults: _Faults) -> None:
        self._values, self.key, self._faults = values, key, faults
        self._known: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def peek(self, name: str) -> Any:
        """The value as it stands there, unchecked."""
        return self._values.get(name)

    def fault(self, name: str, sentence: str) -> None:
        self._faults.add((*self.key, name) if name else self.key, sentence)

    def take(self, name: str, expected: str, fits: Callable[[Any], bool], *, needed: bool = False) -> Any:
        """The value of a key, or None where it is absent or of another kind, which is then a fault."""
        self._known.append(name)
        if name not in self._values:
            if needed:
                self.fault(name, f"missing; expected {expected}")
            return None
        value = self._values[name]
        if not fits(value):
            self.fault(name, f"expected {expected}, got {excerpt(value)}")
            return None
        return value

    def text(self, name: str, expected: str = "a text", *, needed: bool = False) -> str | None:
        return cast("str | None", self.take(name, expected, _is_text, needed=needed))

    def truth(self, name: str) -> bool:
        return bool(self.take(name, "true or false", lambda v: isinstance(v, bool)))

    def number(self, name: str, *, needed: bool = False, above: float = -math.inf) -> float | None:
        expected = "a number" if above == -math.inf else f"a number above {above:g}"
        return cast("float | None", self.take(name, expected, lambda v: _is_number(v) and v > above, needed=needed))

    def integer(self, name: str, *, needed: bool = False, above: float = -math.inf) -> int | None:
        expected = "a whole number" if above == -math.inf else f"a whole number above {above:g}"
        fits = lambda v: isinstance(v, int) and not isinstance(v, bool) and v > above  # noqa: E731 - a predicate in place
        return cast("int | None", self.take(name, expected, fits, needed=needed))

    def one_of(self, name: str, choices: Sequence[str], usual: str) -> str:
        found = self.take(name, f"one of {', '.join(choices)}", lambda v: v in choices)
        return usual if found is None else str(found)

    def words(self, name: str, *, needed: bool = False) -> tuple[str, ...]:
        expected = 'a list of words, ["python", "bench.py"]'
        found = self.take(name, expected, _is_words, needed=needed)
        if found == [] and needed:
            self.fault(name, f"expected {expected}, got an empty list")
        return tuple(found or ())

    def table(self, name: str, *, needed: bool = False) -> _Table | None:
        found = self.take(name, "a table", lambda v: isinstance(v, dict), needed=needed)
        if found is None:
            return None
        return _Table(found, (*self.key, name), self._faults)

    def names(self) -> list[str]:
        self._known += list(self._values)
        return list(self._values)

    def close(self) -> None:
        for name in self._values:
            if name not in self._known:
                wanted = f" (there is {', '.join(self._known)})" if self._known else ""
                self.fault(name, f"no such key{closest(name, self._known)}{wanted}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _is_number(value: Any) -> bool:
    # A whole number beyond every float is none that anything here could do with.
    with contextlib.suppress(OverflowError):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return False


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) and "\0" not in word for word in value)


def spec_of(target: Target) -> Spec:
    """The file of this target, read and checked.

    Raises:
        Refused: there is none, it cannot be read, it is no TOML, or it has faults: all of them, each with its line.
    """
    if target.spec is None:
        raise Refused(
            "the command workload needs a file that describes it: --workload bench.toml (docs/engines/command.md)"
        )
    path = Path(target.spec).expanduser().absolute()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused(
            f"--spec {target.spec}: {error.strerror or error}; expected a TOML file that describes a command"
        ) from error
    spec = _read(path, content)
    unused = [
        f"--{name.replace('_', '-')} {getattr(target, name)}: {path.name} has no {{{name}}}, so it would change nothing"
        for name in LOAD
        if name != "seed" and getattr(target, name) != getattr(Target(), name) and name not in _used(spec)
    ]
    if target.model is None and "model" in _used(spec):
        unused.append(f"{path.name} has {{model}}: say which with --model")
    if unused:
        raise Refused("; ".join(unused))
    return spec


def _used(spec: Spec) -> set[str]:
    found = {name for step in spec.steps() for word in step.words() for name in placeholders(word)}
    return found | (set(placeholders(spec.ready.url)) if spec.ready and spec.ready.url else set())


@functools.lru_cache(maxsize=8)
def _read(path: Path, content: bytes) -> Spec:
    try:
        text = content.decode()
        document = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: expected UTF-8 text, byte {error.start} is none") from error
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{path}: this is no TOML: {error}") from error
    except RecursionError as error:
        raise Refused(f"{path}: this is nested too deeply for any description of a command") from error
    faults = _Faults(_line_numbers(text))
    found = _checked(path, content, document, faults)
    if faults.found or found is None:
        told = [sentence for _, sentence in sorted(faults.found, key=lambda fault: fault[0])]
        if len(told) == 1:
            raise Refused(f"{path}: {told[0]}")
        raise Refused("\n  ".join([f"{path}: {len(told)} faults", *told]))
    return found


def _checked(path: Path, content: bytes, document: Mapping[str, Any], faults: _Faults) -> Spec | None:
    top = _Table(document, (), faults)
    command = top.table("command", needed=True)
    mode: Any = command.one_of("mode", ("run", "server"), "run") if command else "run"
    server = mode == "server"
    output = command.one_of("output", ("stdout", "stderr", "both"), "stdout") if command else "stdout"
    flags = _flags(command)
    main = _step(command, path) if command else None
    load_table = top.table("load", needed=server)
    load = _step(load_table, path) if load_table else None
    ready = _ready(top, needed=server)
    if not server:
        for name in ("load", "ready"):
            if name in top:
                top.fault(name, 'it goes with [command] mode = "server"')
    parameters, declared = _parameters(top)
    rules = _rules(top, parameters, declared)
    unit, units, expected, prompt_tokens = _units(top)
    timings = _figures(top, "timings", faults, known=_TIMINGS)
    metrics = _figures(top, "metrics", faults)
    for name in metrics:
        if not _METRIC.fullmatch(name):
            faults.add(("metrics", name), "expected small letters, digits and underscores: ttft_p95_s")
        elif OWN_METRICS.fullmatch(name) and (name.endswith("_per_s") or _timed(name, timings)):
            faults.add(("metrics", name), "tune works this figure out itself; give yours another name")
    effective = _figures(top, "effective", faults)
    identity, files = _identity(top, path)
    service = _service(top, server=server)
    for table in (command, load_table):
        if table:
            table.close()
    top.close()
    if main is None:
        return None
    spec = Spec(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        mode=mode,
        command=main,
        load=load if server else None,
        ready=ready if server else None,
        flags=flags,
        output=("stdout", "stderr") if output == "both" else (output,),
        parameters=parameters,
        rules=rules,
        unit=unit,
        units=units or Figure("units"),
        expected=expected,
        prompt_tokens=prompt_tokens,
        timings=timings,
        metrics=metrics,
        effective=effective,
        identity=identity,
        files=files,
        service=service,
    )
    _check_placeholders(spec, tuple(declared), faults)
    return spec


def _timed(metric: str, timings: Mapping[str, Figure]) -> bool:
    """Whether tune works a latency out, because its times are given."""
    kind = {"latency": "request", "ttft": "ttft", "itl": "itl"}.get(metric.partition("_")[0], "")
    return f"{kind}_seconds" in timings or metric == "quality_loss"


def _step(table: _Table, path: Path) -> Step | None:
    argv = table.words("argv", needed=True)
    env: dict[str, str] = {}
    if (pairs := table.table("env")) is not None:
        for name in pairs.names():
            value = pairs.take(
                name, "a text, a number, or true or false", lambda v: isinstance(v, str | bool | int | float)
            )
            if not name or "=" in name or "\0" in name:
                pairs.fault(name, "expected the name of a variable")
            env[name] = value if isinstance(value, str) else shown(value if value is not None else "")
            if "\0" in env[name]:
                pairs.fault(name, "no variable can hold a NUL")
    folder = (path.parent / (table.text("cwd", "a folder, from that of this file") or ".")).resolve()
    if not folder.is_dir():
        table.fault("cwd", f"there is no folder {folder}")
        return None
    timeout = table.number("timeout", above=0)
    if not argv:
        return None
    path_variable = env.get("PATH", os.environ.get("PATH"))
    if not placeholders(argv[0]) and not _program(argv[0], folder, path_variable):
        table.fault(
            "argv", f"there is no program {excerpt(argv[0])} (looked in {folder if '/' in argv[0] else 'PATH'})"
        )
    return Step(
        table=table.key[0],
        argv=argv,
        env=env,
        folder=folder,
        timeout_seconds=PASS_SECONDS if timeout is None else float(timeout),
    )


def _program(name: str, folder: Path, path: str | None) -> bool:
    return bool(name) and shutil.which(str(folder / name) if "/" in name else name, path=path) is not None


def _flags(command: _Table | None) -> dict[str, dict[str, tuple[str, ...]]]:
    table = command.table("flags") if command else None
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in table.names() if table else ():
        assert table is not None
        if (values := table.table(name)) is not None:
            found[name] = {value: values.words(value) for value in values.names()}
    return found


def _ready(top: _Table, *, needed: bool) -> Ready | None:
    table = top.table("ready", needed=needed)
    if table is None:
        return None
    regex, url = _regex(table, "regex", groups=None), table.text("url", "an HTTP address")
    timeout = table.number("timeout", above=0)
    table.close()
    if url is not None:
        parts = urlsplit(_PLACEHOLDER.sub("1", url))
        try:
            good = parts.scheme == "http" and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            good = False
        if not good:
            table.fault("url", f"expected http://HOST:PORT/PATH, got {excerpt(url)}")
    if ("regex" in table) == ("url" in table):
        table.fault(
            "", "expected either a regex to find in what the server prints, or a url that answers when it serves"
        )
    return Ready(regex, url, READY_SECONDS if timeout is None else float(timeout))


def _regex(table: _Table, name: str, groups: int | None) -> re.Pattern[str] | None:
    text = table.text(name, "a regular expression")
    if text is None:
        return None
    try:
        found = re.compile(text, re.MULTILINE)
    except (re.error, OverflowError, RecursionError) as error:
        table.fault(name, f"this is no regular expression of Python's: {error}")
        return None
    if groups is not None and found.groups != groups:
        table.fault(name, f"expected one group in parentheses around the number, got {found.groups}")
        return None
    return found


_SCOPES: tuple[str, ...] = tuple(scope for scope in get_args(Scope) if scope != "token")


def _parameters(top: _Table) -> tuple[tuple[Parameter, ...], dict[str, Kind]]:
    """The parameters without a fault, and the names of all: a faulty one is not a missing one in a rule as well."""
    table = top.table("parameters", needed=True)
    found = []
    declared: dict[str, Kind] = {}
    for name in table.names() if table else ():
        assert table is not None
        one = table.table(name)
        if not _NAME.fullmatch(name) or name in RESERVED:
            taken = "has a meaning of its own" if name in RESERVED else "letters, digits and underscores make a name"
            table.fault(name, f"expected another name: {taken}")
        elif one is not None:
            declared[name] = _declared_kind(one)
            if (parameter := _parameter(name, one)) is not None:
                found.append(parameter)
                declared[name] = kind_of(parameter)
    if table is not None and not table.names():
        top.fault("parameters", "expected at least one parameter")
    return tuple(found), declared


def _declared_kind(table: _Table) -> Kind:
    """The kind that a parameter seems to have, whatever else is wrong with it."""
    default = table.peek("default")
    if table.peek("type") == "bool" or isinstance(default, bool):
        return "truth"
    return "text" if isinstance(default, str) and table.peek("type") == "choice" else "number"


def _parameter(name: str, table: _Table) -> Parameter | None:
    kind = table.take(
        "type", "one of int, float, choice, bool", lambda v: v in ("int", "float", "choice", "bool"), needed=True
    )
    meaning = table.text("meaning", "a sentence that says what it does", needed=True)
    scope: Any = table.one_of("scope", _SCOPES, "launch")
    effect: Any = table.one_of("effect", get_args(Effect), "exact")
    lever: Any = table.one_of("lever", get_args(Lever), "work")
    default = table.take("default", "a value", lambda v: isinstance(v, bool | int | float | str), needed=True)
    if kind in ("int", "float"):
        take = table.integer if kind == "int" else table.number
        low, high, log = take("low", needed=True), take("high", needed=True), table.truth("log")
    elif kind == "choice":
        values = table.take("values", "a list of values of one kind, each once", _are_choices, needed=True)
        ordered = table.truth("ordered")
    if kind is not None:
        table.close()
    if kind is None or meaning is None or default is None:
        return None
    about: dict[str, Any] = {
        "name": name,
        "meaning": " ".join(meaning.split()).rstrip("."),
        "scope": scope,
        "effect": cast("Effect", effect),
        "lever": cast("Lever", lever),
        "default": default,
    }
    try:
        if kind == "bool":
            parameter: Parameter = Choice(**about, values=(False, True))
        elif kind == "choice":
            if values is None:
                return None
            parameter = Choice(**about, values=tuple(values), ordered=ordered)
        else:
            if low is None or high is None:
                return None
            bounds: dict[str, Any] = {"low": low, "high": high, "log": log}
            parameter = Int(**about, **bounds) if kind == "int" else Float(**about, **bounds)
        # A default of another type than its range (1 for 1.0) is that of the range from here on.
        return replace(parameter, default=parameter.check(default))
    except Refused as refused:
        table.fault("default" if str(refused).startswith(f"{name}=") else "low", str(refused))
        return None


def _are_choices(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    kinds = {
        bool if isinstance(v, bool) else str if isinstance(v, str) else float if _is_number(v) else None for v in value
    }
    return len(kinds) == 1 and None not in kinds and len({shown(v) for v in value}) == len(value)


def _rules(top: _Table, parameters: Sequence[Parameter], kinds: Mapping[str, Kind]) -> tuple[Constraint, ...]:
    texts = top.take("constraints", 'a list of rules, ["n_ubatch <= n_batch"]', _is_words) or []
    default = {p.name: p.default for p in parameters}
    found = []
    for text in texts:
        try:
            holds = rule(text, kinds)
        except RuleFault as fault:
            top.fault("constraints", f"{fault}\n    {text[:MOST_RULE_CHARACTERS]}\n    {' ' * (fault.column - 1)}^")
            continue
        if len(default) == len(kinds) and not holds(default):
            top.fault("constraints", f"the defaults break {text!r}, and the search begins with them")
        # A parameter that is left out of the space keeps its default.
        found.append(Constraint(text, lambda config, holds=holds: holds({**default, **config})))  # type: ignore[misc]  # binds this turn's rule
    return tuple(found)


def _figure(table: _Table) -> Figure | None:
    """Reads `json`, `regex`, `fixed` and `scale` of a table; exactly one of the first three."""
    where = ".".join(table.key)
    path = table.text("json", 'a dotted path, "results.tokens"')
    regex = _regex(table, "regex", groups=1)
    fixed = table.number("fixed", above=0)
    scale = table.number("scale", above=0)
    given = [name for name in ("json", "regex", "fixed") if name in table]
    if len(given) != 1:
        got = f"got {' and '.join(given)}" if given else "got none"
        table.fault("", f'expected one of json = "path", regex = "(\\\\d+)" and fixed = NUMBER, {got}')
        return None
    if path is None and regex is None and fixed is None:
        return None
    return Figure(where, tuple(path.split(".")) if path else (), regex, fixed, 1.0 if scale is None else float(scale))


def _units(top: _Table) -> tuple[Unit, Figure | None, int | None, Figure | None]:
    table = top.table("units", needed=True)
    if table is None:
        return "token", None, None, None
    unit = cast("Unit", table.one_of("unit", ("token", "image"), "token"))
    expected = table.integer("expected", above=0)
    prompt = table.table("prompt_tokens")
    prompt_tokens = _figure(prompt) if prompt else None
    if prompt:
        prompt.close()
    figure = _figure(table)
    if figure and figure.fixed is not None and figure.fixed != int(figure.fixed):
        table.fault("fixed", f"expected a whole number above 0, got {figure.fixed:g}")
    table.close()
    return unit, figure, expected, prompt_tokens


def _figures(top: _Table, name: str, faults: _Faults, known: Sequence[str] | None = None) -> dict[str, Figure]:
    table = top.table(name)
    found: dict[str, Figure] = {}
    for key in table.names() if table else ():
        assert table is not None
        if known is not None and key not in known:
            faults.add((name, key), f"no such key{closest(key, known)} (there is {', '.join(known)})")
        elif (one := table.table(key)) is not None:
            if (figure := _figure(one)) is not None:
                found[key] = figure
            one.close()
    return found


def _identity(top: _Table, path: Path) -> tuple[dict[str, str], tuple[Path, ...]]:
    table = top.table("identity")
    if table is None:
        return {}, ()
    found = {name: text for name in ("engine", "version", "model") if (text := table.text(name)) is not None}
    if (device := table.one_of("device", ("cpu", "gpu"), "")) != "":
        found["device"] = device
    files = tuple(path.parent / name for name in table.words("files"))
    for file in files:
        if not file.is_file():
            table.fault("files", f"there is no file {file}")
    table.close()
    return found, files


def _service(top: _Table, *, server: bool) -> dict[str, Any]:
    table = top.table("service")
    if table is None:
        return {}
    if not server:
        top.fault("service", 'it goes with [command] mode = "server": what runs to its end is no service')
    found = {
        "image": table.text("image", "the name of a container image"),
        "argv": table.words("argv"),
        "port": table.integer("port", above=0) or SERVICE_PORT,
        "paths": table.words("paths"),
        "gpus": table.truth("gpus"),
    }
    table.close()
    return found


def _check_placeholders(spec: Spec, declared: Sequence[str], faults: _Faults) -> None:
    """Every placeholder means something, every parameter is used, every flag has words for each of its values."""
    parameters = {p.name: p for p in spec.parameters}
    known = [*declared, *LOAD, *(["port"] if spec.mode == "server" else [])]
    places: list[tuple[tuple[str, ...], str]] = [
        ((step.table, "argv"), word) for step in spec.steps() for word in step.argv
    ]
    places += [((step.table, "env", name), word) for step in spec.steps() for name, word in step.env.items()]
    places += [(("ready", "url"), spec.ready.url)] if spec.ready and spec.ready.url else []
    places += [(("service", "argv"), word) for word in spec.service.get("argv", ())]
    used, restart = set(), set()
    for key, word in places:
        for name in placeholders(word):
            used.add(name)
            if key[0] in ("command", "ready"):
                restart.add(name)
            if name not in known:
                faults.add(
                    key,
                    f"{{{name}}}: no parameter is called so{closest(name, known)} (the text itself is {{{{{name}}}}})",
                )
            elif name in spec.flags and (word != f"{{{name}}}" or key[-1] != "argv"):
                faults.add(
                    key,
                    f"{excerpt(word)}: {{{name}}} stands for a list, so it must be a word of its own in an argv",
                )
    for name, words in spec.flags.items():
        if name not in declared:
            faults.add(("command", "flags", name), f"no parameter is called so{closest(name, declared)}")
        if name not in parameters:
            continue
        parameter = parameters[name]
        wanted = [shown(v) for v in parameter.values] if isinstance(parameter, Choice) else []
        if not wanted:
            faults.add(("command", "flags", name), "expected a bool or a choice: words are listed for each value")
        elif set(words) != set(wanted):
            faults.add(
                ("command", "flags", name),
                f"expected a list for each of {', '.join(wanted)}, got {', '.join(words) or 'none'}",
            )
    for name, parameter in parameters.items():
        if name not in used:
            faults.add(("parameters", name), f"{{{name}}} stands in no argv or env, so it would change nothing")
        elif spec.mode == "server" and parameter.scope != "launch" and name in restart:
            faults.add(("parameters", name, "scope"), 'expected "launch": the server is started with it')


# --- what may be tuned -----------------------------------------------------------------------


def space(target: Target) -> SearchSpace:
    """The parameters of the file; lossy ones only where they are allowed.

    Raises:
        Refused: the file has faults.
    """
    refuse_unused(target, "command")
    spec = spec_of(target)
    offered = tuple(p for p in spec.parameters if p.effect != "lossy" or target.allow_lossy)
    if not offered:
        raise Refused(f"{spec.path}: every parameter is lossy; add --allow-lossy to tune them")
    return SearchSpace(offered, spec.rules)


def identity(target: Target) -> dict[str, str]:
    """What the file says of engine, version and model, and the digests of the file and of those it names."""
    spec = spec_of(target)
    said = spec.identity
    found = {
        "engine": said.get("engine", Path(spec.command.argv[0]).name),
        "engine_version": said.get("version", "not named"),
        "model": said.get("model") or target.model or "not named",
        "spec_sha256": spec.sha256,
    }
    if spec.files:
        found["files_sha256"] = _digest(spec.files)
    if "device" in said:
        found["device"] = said["device"]
    return found


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise Refused(f"{path}: {error.strerror or error}; identity.files names it") from error
    return digest.hexdigest()


def describe(target: Target) -> str:
    """What the file says of the model, and what stands inside every window."""
    spec = spec_of(target)
    model = spec.identity.get("model") or target.model or "not named"
    inside = (
        "each pass starts the command anew, so its start-up and loading are inside every window"
        if spec.mode == "run"
        else "the server stays loaded, each pass runs the load against it"
    )
    return f"model: {model}; {inside}"


def unit(target: Target) -> Unit:
    """What the file counts: tokens or images."""
    return spec_of(target).unit


def load(target: Target) -> str:
    """The load in one sentence: it is the file's, not that of the options."""
    return f"{spec_of(target).path.name}: {shlex.join(spec_of(target).work.argv)}"


def metrics(target: Target) -> tuple[str, ...]:
    """The figures that the command reports of itself, which limits may be set on."""
    return tuple(spec_of(target).metrics)


def lacks(target: Target) -> dict[str, str]:
    """Figures that it never reports, and why."""
    return {
        "quality_loss": "tune cannot judge what a command puts out; leave the limit out, or let the command print a "
        "figure of its own, read it in [metrics] under another name, and limit that"
    }


def _values(spec: Spec, config: Mapping[str, Value], target: Target, port: int) -> dict[str, str]:
    """What each placeholder stands for."""
    load = {name: str(getattr(target, name)) for name in LOAD if getattr(target, name) is not None}
    own = {p.name: shown(config.get(p.name, p.default)) for p in spec.parameters}
    return {**load, "port": str(port), **own}


def _argv(spec: Spec, argv: Sequence[str], values: Mapping[str, str]) -> tuple[str, ...]:
    found: list[str] = []
    for word in argv:
        names = placeholders(word)
        if len(names) == 1 and names[0] in spec.flags:
            found += spec.flags[names[0]][values[names[0]]]
        else:
            found.append(fill(word, values))
    return tuple(found)


def _env(step: Step, values: Mapping[str, str]) -> dict[str, str]:
    return {name: fill(word, values) for name, word in step.env.items()}


def _filled(spec: Spec, step: Step, values: Mapping[str, str]) -> Service:
    """The command of a step, with what its placeholders stand for."""
    return Service(argv=_argv(spec, step.argv, values), env=_env(step, values), folder=str(step.folder))


def command(config: Config, target: Target) -> str:
    """The command of the file with `config`, in its folder and with its variables; a server has its usual port."""
    spec = spec_of(target)
    values = _values(spec, config, target, spec.service.get("port", SERVICE_PORT))
    filled = _filled(spec, spec.command, values)
    return (replace(filled, folder=None) if spec.command.folder == Path.cwd() else filled).command()


def service(config: Config, target: Target) -> Service:
    """A server's command as a service; a benchmark that runs to its end is none."""
    spec = spec_of(target)
    if spec.mode == "run":
        return Service()
    about = spec.service
    port = about.get("port", SERVICE_PORT)
    values = _values(spec, config, target, port)
    return replace(
        _filled(spec, spec.command, values),
        port=port,
        image=about.get("image"),
        image_argv=_argv(spec, about.get("argv", ()), values),
        paths=tuple(str((spec.path.parent / p).resolve()) for p in about.get("paths", ())),
        gpus=about.get("gpus", False),
    )


# --- running it ------------------------------------------------------------------------------


@contextmanager
def launch(config: Config, target: Target) -> Iterator[CommandEngine]:
    """Start the server, where there is one; run the load once to warm up, yield; end everything afterwards.

    Raises:
        RuntimeError: a command failed, or did not say what it did.
        Refused: the command failed by itself. With the configuration that the search begins with this ends the study,
            with any other it is a failed trial.
    """
    spec = spec_of(target)
    with contextlib.ExitStack() as stack:
        engine = CommandEngine(spec, config, target, stack)
        try:
            engine.start()
            # Files come into the cache, and what the output lacks is said before anything is measured.
            engine.run_pass()
        except Misfit as misfit:
            raise Refused(f"{misfit}; {engine.by_hand()}") from misfit
        yield engine


class Misfit(EngineError):
    """The command and its file do not fit: it ended as it should not, or does not print what the file says."""


class CommandEngine:
    """The command of a file with one configuration."""

    expected_units: int | None = None
    """The load is the command's own, not the target's; `units.expected` of the file is checked in every pass."""

    def __init__(self, spec: Spec, config: Config, target: Target, stack: contextlib.ExitStack) -> None:
        self._spec = spec
        self._config = dict(config)
        self._target = target
        self._stack = stack
        self._port = free_port() if spec.mode == "server" else 0
        self._server: Keeper | None = None
        self._keeper = stack.enter_context(Keeper())
        self.effective: Mapping[str, Value] = {}
        self.starts_each_pass = spec.mode == "run"

    def start(self) -> None:
        """Start the server and wait until it serves; nothing where there is none."""
        spec, ready = self._spec, self._spec.ready
        if ready is None:
            return
        url = fill(ready.url, self._values()) if ready.url else None
        if url and _good(_status(url)):
            raise Refused(
                f"{url} answers already, before the server is started: another program listens there;"
                " write {port} for a free port"
            )
        self._server = self._stack.enter_context(Keeper())
        filled = self._filled(spec.command)
        self._server.start(filled.argv, spec.command.folder, filled.env, ("stdout", "stderr"), endless=True)
        give_up = time.monotonic() + ready.timeout_seconds
        seen, status = "", None
        while True:
            self._check_server("before it was ready", Misfit)
            if url:
                if _good(status := _status(url)):
                    return
            elif ready.regex and (text := self._server.output()) != seen:
                seen = text
                with bounded(ready.regex, "ready.regex"):
                    if ready.regex.search(text):
                        return
            if time.monotonic() > give_up:
                pattern = excerpt(ready.regex.pattern) if ready.regex else ""
                answer = f"answers HTTP {status}, expected 200 to 299" if status else "does not answer"
                sign = f"{url} {answer}" if url else f"nothing that it prints matches {pattern}"
                raise RuntimeError(
                    f"the server was not ready after {ready.timeout_seconds:g} s (ready.timeout):"
                    f" {sign}{ending(self._server.output())}"
                )
            time.sleep(POLL_SECONDS)

    def _check_server(self, when: str, if_its_own: type[RuntimeError] = RuntimeError) -> None:
        """Raise where the server has ended; `if_its_own` where it did so by itself."""
        if self._server and (ended := self._server.wait(0.0)) is not None:
            label = self._label(self._spec.command)
            cause = ended.cause(label) or f"{label} ended with exit status 0"
            kind = if_its_own if ended.is_its_own else RuntimeError
            raise kind(f"the server ended {when}: {cause}")

    def _values(self) -> dict[str, str]:
        return _values(self._spec, self._config, self._target, self._port)

    def _filled(self, step: Step) -> Service:
        return _filled(self._spec, step, self._values())

    def _label(self, step: Step) -> str:
        return cut(shlex.join(self._filled(step).argv), LABEL_CHARACTERS)

    def by_hand(self) -> str:
        """The end of a sentence: the commands of this configuration for a shell, a server's before its load.

        A sentence has one line and single blanks. A command that has others is written to the log.
        """
        typed = " & ".join(self._filled(step).command() for step in self._spec.steps())
        if typed == " ".join(typed.split()):
            return f"try by hand: {typed}"
        sys.stderr.write(f"{typed}\n")
        return "its log has the command, to try by hand"

    def change(self, config: Config) -> None:
        """Go on with `config`: the next pass starts its command with it. A server's own parameters need a launch."""
        spec = self._spec
        if spec.mode == "server":
            own = {
                name
                for word in (*spec.command.words(), *([spec.ready.url] if spec.ready and spec.ready.url else []))
                for name in placeholders(word)
            }
            if fixed := [n for n in own if n in config and config[n] != self._config.get(n)]:
                raise RuntimeError(f"{', '.join(sorted(fixed))}: the server is started with it")
        self._config = {**self._config, **config}

    def run_pass(self) -> Work:
        """Run the load once, to its end, and read what it says it did.

        Raises:
            RuntimeError: it failed, took too long, or did not say what it did.
        """
        spec, step = self._spec, self._spec.work
        self._check_server("between two passes")
        filled, label = self._filled(step), self._label(step)
        self._keeper.start(filled.argv, step.folder, filled.env, spec.output)
        ended = self._keeper.wait(step.timeout_seconds)
        if ended is None:
            raise RuntimeError(
                f"{label} did not end within {step.timeout_seconds:g} s ({step.table}.timeout); raise it if that is its"
                f" normal speed{ending(self._keeper.output())}"
            )
        if cause := ended.cause(label):
            self._check_server(f"while the load ran, and then {cause}")
            raise Misfit(cause) if ended.is_its_own else RuntimeError(cause)
        said = Said(label, self._keeper.output())
        self._check_server("during a pass")
        units = said.units(spec.units, spec.unit)
        if spec.expected is not None and units != spec.expected:
            raise Misfit(f"{label} made {units} {spec.unit}s, units.expected is {spec.expected}")
        self.effective = {name: said.value(figure) for name, figure in spec.effective.items()}
        timings = spec.timings
        several: dict[str, Any] = {name: said.numbers(timings[name]) for name in _TIMINGS[:3] if name in timings}
        single: dict[str, Any] = {name: said.number(timings[name]) for name in _TIMINGS[3:] if name in timings}
        return Work(
            units=units,
            unit=spec.unit,
            prompt_tokens=said.units(spec.prompt_tokens, "prompt token") if spec.prompt_tokens else 0,
            metrics={name: said.number(figure) for name, figure in spec.metrics.items()},
            **several,
            **single,
        )


def _status(url: str) -> int | None:
    """The status of the answer; None where there is none in HTTP. Not through a proxy: the server is here."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=1.0)
    try:
        connection.request("GET", f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


def _good(status: int | None) -> bool:
    return status is not None and 200 <= status < 300


# --- what a command says ---------------------------------------------------------------------


@contextmanager
def bounded(regex: re.Pattern[str], where: str) -> Iterator[None]:
    """A search that is given up after `REGEX_SECONDS`.

    The search itself looks for signals, so that an alarm ends it. Only the main thread has them, and a worker's
    commands run there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: object) -> NoReturn:
        raise Misfit(
            f"{where} {excerpt(regex.pattern)} takes longer than {REGEX_SECONDS:g} s to search what was printed;"
            r" write it without a repeat inside a repeat, such as (\d+)+"
        )

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, REGEX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Said:
    """The output of one run, and the figures in it."""

    def __init__(self, label: str, text: str) -> None:
        self._label = label
        self._text = text

    @functools.cached_property
    def _documents(self) -> list[Any]:
        """The lines that are JSON objects."""
        lines = [line for line in self._text.splitlines() if line.lstrip().startswith("{")]
        return [document for line in lines if (document := _json(line)) is not None]

    def _found(self, figure: Figure) -> Any:
        """What stands where the figure is looked for."""
        if figure.regex is not None:
            if matches := self._matches(figure):
                return matches[-1]
            raise self._missing(figure)
        holding = [value for d in self._documents if (value := _at(d, figure.json)) is not None]
        if not holding and (whole := _json(self._text)) is not None:
            holding = [value for value in [_at(whole, figure.json)] if value is not None]
        if not holding:
            raise self._missing(figure)
        if len(holding) > 1:
            path = excerpt(".".join(figure.json))
            raise Misfit(
                f"{self._label} printed {len(holding)} JSON lines with {path} ({figure.where}):"
                f" {excerpt(holding[0], 30)}, ..., {excerpt(holding[-1], 30)}; expected one"
            )
        return holding[0]

    def _matches(self, figure: Figure) -> list[str]:
        assert figure.regex is not None
        with bounded(figure.regex, f"{figure.where}.regex"):
            return figure.regex.findall(self._text)

    def _missing(self, figure: Figure) -> Misfit:
        return Misfit(f"{self._label} printed no {str(figure).removeprefix('a ')} ({figure.where}){ending(self._text)}")

    def _number(self, figure: Figure, value: Any) -> float:
        """As a number, scaled. A regex finds text; JSON brings numbers, and `true` is none."""
        number: Any = value
        if figure.regex is not None:
            with contextlib.suppress(ValueError):
                number = float(value.replace(",", "").replace("_", ""))
        scaled = float(number) * figure.scale if _is_number(number) else -1.0
        if not 0 <= scaled < math.inf:
            raise Misfit(f"{self._label} printed {excerpt(value)} as {figure.where}, expected a number from 0")
        return scaled

    def number(self, figure: Figure) -> float:
        return figure.fixed * figure.scale if figure.fixed is not None else self._number(figure, self._found(figure))

    def numbers(self, figure: Figure) -> tuple[float, ...]:
        """Several: a JSON list, or every match of a regex."""
        if figure.fixed is not None:
            return (figure.fixed * figure.scale,)
        found = self._found(figure)
        if figure.regex is not None:
            found = self._matches(figure)
        return tuple(self._number(figure, value) for value in (found if isinstance(found, list) else [found]))

    def units(self, figure: Figure, unit: str) -> int:
        """A count. Raises `RuntimeError` where it is none, or 0."""
        number = self.number(figure)
        if number > MOST_UNITS or number != int(number) or number <= 0:
            most = f" and at most {MOST_UNITS}" if number > MOST_UNITS else ""
            raise Misfit(
                f"{self._label} printed {number:g} {unit}s ({figure.where}), expected a whole number above 0{most}"
            )
        return int(number)

    def value(self, figure: Figure) -> Value:
        """A value that the command says it runs with."""
        found = figure.fixed if figure.fixed is not None else self._found(figure)
        if isinstance(found, str):
            text = found.strip()[:200]
            if text in ("true", "false"):
                return text == "true"
            for kind in (int, float):
                with contextlib.suppress(ValueError):
                    if _is_number(number := kind(text)) and abs(number) <= MOST_UNITS:
                        return number
            return text
        if isinstance(found, bool) or (_is_number(found) and abs(found) <= MOST_UNITS):
            return cast("Value", found)
        raise Misfit(f"{self._label} printed {excerpt(found)} as {figure.where}, expected a single value")


def _json(text: str) -> Any:
    """What a text says, or None where it is no JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text, parse_int=_whole)
    return None


def _whole(digits: str) -> int | str:
    """A whole number; one that Python does not read (of more than 4300 digits) stays the text that it is."""
    try:
        return int(digits)
    except ValueError:
        return digits


def _at(document: Any, path: Sequence[str]) -> Any:
    """What stands at a dotted path; None where there is nothing. A number in the path counts in a list, from 0."""
    for key in path:
        if isinstance(document, dict):
            document = document.get(key)
        elif isinstance(document, list) and key.isascii() and key.isdigit() and int(key[:9]) < len(document):
            document = document[int(key)]
        else:
            return None
    return document
