"""Any command: the person's own benchmark or engine, described by a TOML file (`Target.spec`).

The file says which command runs, what may be changed in it, and where its output says how many tokens or
images it made (docs/engines/command.md). It is data: argument lists reach no shell, `{name}` is replaced by
a value that the search space has checked, and constraints are read by a grammar of their own.

Two modes. In `run` each pass starts the command and waits for its end; start-up and loading are then inside
every window and cannot be told apart from the work. In `server` the command stays, and each pass runs a
second one, `[load]`, against it.

A process of its own, the keeper, starts the commands. It takes in what they leave behind, also daemons, and
ends all of it when it is told to or when the worker has gone, whoever killed it.

Glossary
    spec       the TOML file, read and checked
    word       one argument of a command; a placeholder never makes two of one
    placeholder `{threads}`: the value of a parameter, or of the load; `{{threads}}` is the text itself
    keeper     the process between the worker and a command
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import http.client
import json
import math
import os
import re
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, cast, get_args
from urllib.parse import urlsplit

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
from tuner.trial import Service, Target, Unit, Work, refuse_unused

PASS_SECONDS = 300.0
READY_SECONDS = 120.0
"""How long a pass and a server's start may take where the file does not say."""

MOST_OUTPUT_BYTES = 16 * 2**20
"""A pass that prints more has failed: the figures may stand in what nobody reads."""

MOST_LOG_BYTES = 256 * 2**10
TAIL_BYTES = 8 * 2**10
"""Of each run, so much goes into the trial's log at once, and so much of its end."""

LINGER_SECONDS = 2.0
"""How long the children of a command may outlive it before it is said to have left them behind."""

GRACE_SECONDS = 3.0
"""Between asking a command to end and killing it."""

KILL_SECONDS = 5.0
"""How long a killed process is waited for: one that is stuck in a driver may never go."""

POLL_SECONDS = 0.05

SERVICE_PORT = 8080

MOST_RULE_CHARACTERS = 500
MOST_RULE_DEPTH = 50

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_METRIC = re.compile(r"[a-z][a-z0-9_]*")

# --- constraints -----------------------------------------------------------------------------
#
#   rule       = either [ "->" rule ]                     a -> b: where a holds, b must hold
#   either     = both { "or" both }
#   both       = negation { "and" negation }
#   negation   = "not" negation | comparison
#   comparison = sum { ( "<" | "<=" | "==" | "!=" | ">=" | ">" ) sum }      1 <= a <= b holds where both do
#   sum        = product { ( "+" | "-" ) product }
#   product    = sign { ( "*" | "/" ) sign }
#   sign       = "-" sign | atom
#   atom       = number | 'text' | "true" | "false" | name | "(" rule ")"

Kind = Literal["number", "truth", "text"]
_KINDS: Mapping[Kind, str] = {"number": "a number", "truth": "true or false", "text": "a text"}
_WORDS = ("and", "or", "not", "true", "false")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<text>'[^']*'|\"[^\"]*\")|(?P<sign>->|<=|>=|==|!=|[<>+\-*/()]))"
)
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    ">=": lambda a, b: a >= b,
    ">": lambda a, b: a > b,
}
_ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


class RuleFault(ValueError):
    """A constraint that cannot be read: what is wrong, and at which column (from 1)."""

    def __init__(self, column: int, sentence: str) -> None:
        super().__init__(f"column {column}: {sentence}")
        self.column = column


@dataclass(frozen=True)
class _Node:
    """A part of a rule: what kind of value it has, where it begins, and how it is worked out."""

    kind: Kind
    column: int
    of: Callable[[Mapping[str, Value]], Any]


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    column: int


def _tokens(text: str) -> list[_Token]:
    found, end = [], 0
    while text[end:].strip():
        match = _TOKEN.match(text, end)
        if match is None or match.lastgroup is None:
            column = len(text) - len(text[end:].lstrip()) + 1
            odd = text[column - 1]
            quotes = "; a text ends with the quote that it begins with"
            hint = {"=": "; equality is written ==", "'": quotes, '"': quotes}.get(odd, "")
            raise RuleFault(column, f"{excerpt(odd)} means nothing here{hint}")
        found.append(_Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup) + 1))
        end = match.end()
    return [*found, _Token("end", "", len(text.rstrip()) + 1)]


class _Rule:
    """A recursive-descent reader, one method for each line of the grammar above."""

    def __init__(self, text: str, kinds: Mapping[str, Kind]) -> None:
        if len(text) > MOST_RULE_CHARACTERS:
            raise RuleFault(MOST_RULE_CHARACTERS, f"expected at most {MOST_RULE_CHARACTERS} characters")
        self._tokens = _tokens(text)
        self._kinds = kinds
        self._at = 0
        self._depth = 0

    def read(self) -> _Node:
        node = self._truth(self._rule())
        if self._next.kind != "end":
            self._refuse("an operator or the end")
        return node

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self, *texts: str) -> _Token | None:
        token = self._next
        if token.kind in ("sign", "name") and token.text in texts:
            self._at += 1
            return token
        return None

    def _refuse(self, expected: str) -> NoReturn:
        got = "the end" if self._next.kind == "end" else excerpt(self._next.text)
        raise RuleFault(self._next.column, f"expected {expected}, got {got}")

    def _of_kind(self, node: _Node, kind: Kind) -> _Node:
        if node.kind != kind:
            raise RuleFault(node.column, f"expected {_KINDS[kind]}, got {_KINDS[node.kind]}")
        return node

    def _truth(self, node: _Node) -> _Node:
        return self._of_kind(node, "truth")

    def _rule(self) -> _Node:
        self._depth += 1
        if self._depth > MOST_RULE_DEPTH:
            raise RuleFault(self._next.column, f"expected at most {MOST_RULE_DEPTH} levels")
        left = self._either()
        if self._take("->"):
            a, b = self._truth(left), self._truth(self._rule())
            left = _Node("truth", a.column, lambda c: not a.of(c) or b.of(c))
        self._depth -= 1
        return left

    def _either(self) -> _Node:
        left = self._both()
        while self._take("or"):
            left = self._or(self._truth(left), self._truth(self._both()))
        return left

    def _both(self) -> _Node:
        left = self._negation()
        while self._take("and"):
            left = self._and(self._truth(left), self._truth(self._negation()))
        return left

    @staticmethod
    def _or(a: _Node, b: _Node) -> _Node:
        return _Node("truth", a.column, lambda c: a.of(c) or b.of(c))

    @staticmethod
    def _and(a: _Node, b: _Node) -> _Node:
        return _Node("truth", a.column, lambda c: a.of(c) and b.of(c))

    def _negation(self) -> _Node:
        if word := self._take("not"):
            node = self._truth(self._deeper(self._negation))
            return _Node("truth", word.column, lambda c: not node.of(c))
        return self._comparison()

    def _comparison(self) -> _Node:
        left = self._sum()
        found: _Node | None = None
        while sign := self._take(*_COMPARE):
            right = self._sum()
            if right.kind != left.kind or (left.kind != "number" and sign.text not in ("==", "!=")):
                allowed = "two numbers" if sign.text not in ("==", "!=") else "two values of one kind"
                kinds = f"{_KINDS[left.kind]} and {_KINDS[right.kind]}"
                raise RuleFault(sign.column, f"{sign.text} compares {allowed}, got {kinds}")
            link = self._compare(_COMPARE[sign.text], left, right)
            found = link if found is None else self._and(found, link)
            left = right
        return found or left

    @staticmethod
    def _compare(holds: Callable[[Any, Any], bool], a: _Node, b: _Node) -> _Node:
        return _Node("truth", a.column, lambda c: holds(a.of(c), b.of(c)))

    def _sum(self) -> _Node:
        return self._chain(self._product, "+", "-")

    def _product(self) -> _Node:
        return self._chain(self._sign, "*", "/")

    def _chain(self, part: Callable[[], _Node], *signs: str) -> _Node:
        left = part()
        while sign := self._take(*signs):
            left = self._calculate(
                _ARITHMETIC[sign.text], self._of_kind(left, "number"), self._of_kind(part(), "number")
            )
        return left

    @staticmethod
    def _calculate(result: Callable[[Any, Any], Any], a: _Node, b: _Node) -> _Node:
        return _Node("number", a.column, lambda c: result(a.of(c), b.of(c)))

    def _sign(self) -> _Node:
        if sign := self._take("-"):
            node = self._of_kind(self._deeper(self._sign), "number")
            return _Node("number", sign.column, lambda c: -node.of(c))
        return self._atom()

    def _deeper(self, part: Callable[[], _Node]) -> _Node:
        self._depth += 1
        if self._depth > MOST_RULE_DEPTH:
            raise RuleFault(self._next.column, f"expected at most {MOST_RULE_DEPTH} levels")
        node = part()
        self._depth -= 1
        return node

    def _atom(self) -> _Node:
        token = self._next
        if self._take("("):
            node = self._rule()
            if not self._take(")"):
                self._refuse("an operator or )")
            return node
        if token.kind == "number":
            number = float(token.text) if re.search(r"[.eE]", token.text) else int(token.text)
            return self._constant("number", token, number)
        if token.kind == "text":
            return self._constant("text", token, token.text[1:-1])
        if token.kind == "name" and token.text in ("true", "false"):
            return self._constant("truth", token, token.text == "true")
        if token.kind != "name" or token.text in _WORDS:
            self._refuse("a parameter, a number, a 'text' or (")
        if token.text not in self._kinds:
            near = closest(token.text, list(self._kinds))
            raise RuleFault(token.column, f"no parameter is called {excerpt(token.text)}{near}")
        self._at += 1
        return _Node(self._kinds[token.text], token.column, lambda c: c[token.text])

    def _constant(self, kind: Kind, token: _Token, value: Value) -> _Node:
        self._at += 1
        return _Node(kind, token.column, lambda _: value)


def rule(text: str, kinds: Mapping[str, Kind]) -> Callable[[Mapping[str, Value]], bool]:
    """The check that a constraint stands for; `kinds` has the parameters that it may name.

    A configuration for which it cannot be worked out (a division by 0) breaks it.

    Raises:
        RuleFault: it cannot be read, names what there is not, or compares what does not compare.
    """
    node = _Rule(text, kinds).read()

    def holds(config: Mapping[str, Value]) -> bool:
        try:
            return bool(node.of(config))
        except ArithmeticError:
            return False

    return holds


def _kind(parameter: Parameter) -> Kind:
    if isinstance(parameter.default, bool):
        return "truth"
    return "text" if isinstance(parameter.default, str) else "number"


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

RESERVED = frozenset({*LOAD, *_WORDS, "port", "gpu_power_limit_w", "gpu_sm_clock_mhz"})

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
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
                declared[name] = _kind(parameter)
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


def command(config: Config, target: Target) -> str:
    """The command of the file with `config`, in its folder and with its variables; a server has its usual port."""
    spec = spec_of(target)
    values = _values(spec, config, target, spec.service.get("port", SERVICE_PORT))
    env = [f"{name}={value}" for name, value in _env(spec.command, values).items()]
    folder = ["-C", str(spec.command.folder)] if spec.command.folder != Path.cwd() else []
    before = ["env", *folder, *env] if folder or env else []
    # A line break in a word is legal and would make two lines of one command.
    return shlex.join([*before, *_argv(spec, spec.command.argv, values)]).replace("\n", "'$'\\n''")


def service(config: Config, target: Target) -> Service:
    """A server's command as a service; a benchmark that runs to its end is none."""
    spec = spec_of(target)
    if spec.mode == "run":
        return Service()
    about = spec.service
    port = about.get("port", SERVICE_PORT)
    values = _values(spec, config, target, port)
    return Service(
        argv=_argv(spec, spec.command.argv, values),
        env=_env(spec.command, values),
        folder=str(spec.command.folder),
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
    """
    with contextlib.ExitStack() as stack:
        engine = CommandEngine(spec_of(target), config, target, stack)
        engine.start()
        # Files come into the cache, and what the output lacks is said before anything is measured.
        engine.run_pass()
        yield engine


class CommandEngine:
    """The command of a file with one configuration."""

    expected_units: int | None = None
    """The load is the command's own, not the target's; `units.expected` of the file is checked in every pass."""

    def __init__(self, spec: Spec, config: Config, target: Target, stack: contextlib.ExitStack) -> None:
        self._spec = spec
        self._config = dict(config)
        self._target = target
        self._stack = stack
        self._port = _free_port() if spec.mode == "server" else 0
        self._server: Keeper | None = None
        self._keeper = stack.enter_context(Keeper())
        self.effective: Mapping[str, Value] = {}
        self.starts_each_pass = spec.mode == "run"

    def start(self) -> None:
        """Start the server and wait until it serves; nothing where there is none."""
        spec, ready = self._spec, self._spec.ready
        if ready is None:
            return
        values = self._filled()
        url = fill(ready.url, values) if ready.url else None
        if url and _answers(url):
            raise RuntimeError(
                f"{url} answers already, before the server is started: another program listens there;"
                " write {port} for a free port"
            )
        self._server = self._stack.enter_context(Keeper())
        self._server.start(
            _argv(spec, spec.command.argv, values),
            spec.command.folder,
            _env(spec.command, values),
            ("stdout", "stderr"),
            endless=True,
        )
        give_up = time.monotonic() + ready.timeout_seconds
        seen = ""
        while True:
            self._check_server("before it was ready")
            if url:
                if _answers(url):
                    return
            elif ready.regex and (text := self._server.output()) != seen:
                seen = text
                if ready.regex.search(text):
                    return
            if time.monotonic() > give_up:
                pattern = excerpt(ready.regex.pattern) if ready.regex else ""
                sign = f"{url} does not answer" if url else f"nothing that it prints matches {pattern}"
                raise RuntimeError(
                    f"the server was not ready after {ready.timeout_seconds:g} s (ready.timeout):"
                    f" {sign}{_ending(self._server.output())}"
                )
            time.sleep(POLL_SECONDS)

    def _check_server(self, when: str) -> None:
        if self._server and (ended := self._server.wait(0.0)) is not None:
            label = self._label(self._spec.command)
            cause = ended.cause(label) or f"{label} ended with exit status 0"
            raise RuntimeError(f"the server ended {when}: {cause}")

    def _filled(self) -> dict[str, str]:
        return _values(self._spec, self._config, self._target, self._port)

    def _label(self, step: Step) -> str:
        words = shlex.join(_argv(self._spec, step.argv, self._filled()))
        return words if len(words) <= 60 else f"{words[:57]}..."

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
        values = self._filled()
        label = self._label(step)
        self._keeper.start(_argv(spec, step.argv, values), step.folder, _env(step, values), spec.output)
        ended = self._keeper.wait(step.timeout_seconds)
        if ended is None:
            raise RuntimeError(
                f"{label} did not end within {step.timeout_seconds:g} s ({step.table}.timeout); raise it if that is its"
                f" normal speed{_ending(self._keeper.output())}"
            )
        if cause := ended.cause(label):
            self._check_server(f"while the load ran, and then {cause}")
            raise RuntimeError(cause)
        said = Said(label, self._keeper.output())
        self._check_server("during a pass")
        units = said.units(spec.units, spec.unit)
        if spec.expected is not None and units != spec.expected:
            raise RuntimeError(f"{label} made {units} {spec.unit}s, units.expected is {spec.expected}")
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


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _answers(url: str) -> bool:
    """Whether there is an answer of 200 to 299. Not through a proxy: the server is here."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=1.0)
    try:
        connection.request("GET", f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}")
        return 200 <= connection.getresponse().status < 300
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()


def _ending(text: str) -> str:
    """The last line of an output, to close a sentence with; nothing where there is none."""
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    last = "".join(c if c.isprintable() else " " for c in last).strip()
    return f"; its last line is {excerpt(last, 200)}" if last else "; it printed nothing"


# --- what a command says ---------------------------------------------------------------------


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
            matches = figure.regex.findall(self._text)
            if matches:
                return matches[-1]
            raise self._missing(figure)
        holding = [value for d in self._documents if (value := _at(d, figure.json)) is not None]
        if not holding and (whole := _json(self._text)) is not None:
            holding = [value for value in [_at(whole, figure.json)] if value is not None]
        if not holding:
            raise self._missing(figure)
        if len(holding) > 1:
            path = excerpt(".".join(figure.json))
            raise RuntimeError(
                f"{self._label} printed {len(holding)} JSON lines with {path} ({figure.where}):"
                f" {excerpt(holding[0], 30)}, ..., {excerpt(holding[-1], 30)}; expected one"
            )
        return holding[0]

    def _missing(self, figure: Figure) -> RuntimeError:
        return RuntimeError(
            f"{self._label} printed no {str(figure).removeprefix('a ')} ({figure.where}){_ending(self._text)}"
        )

    def _number(self, figure: Figure, value: Any) -> float:
        """As a number, scaled. A regex finds text; JSON brings numbers, and `true` is none."""
        number: Any = value
        if figure.regex is not None:
            with contextlib.suppress(ValueError):
                number = float(value.replace(",", "").replace("_", ""))
        if not _is_number(number) or number < 0:
            raise RuntimeError(f"{self._label} printed {excerpt(value)} as {figure.where}, expected a number from 0")
        return float(number) * figure.scale

    def number(self, figure: Figure) -> float:
        return figure.fixed * figure.scale if figure.fixed is not None else self._number(figure, self._found(figure))

    def numbers(self, figure: Figure) -> tuple[float, ...]:
        """Several: a JSON list, or every match of a regex."""
        if figure.fixed is not None:
            return (figure.fixed * figure.scale,)
        found = self._found(figure)
        if figure.regex is not None:
            found = figure.regex.findall(self._text)
        return tuple(self._number(figure, value) for value in (found if isinstance(found, list) else [found]))

    def units(self, figure: Figure, unit: str) -> int:
        """A count. Raises `RuntimeError` where it is none, or 0."""
        number = self.number(figure)
        if number != int(number) or number <= 0:
            raise RuntimeError(
                f"{self._label} printed {number:g} {unit}s ({figure.where}), expected a whole number above 0"
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
                    if math.isfinite(number := kind(text)):
                        return number
            return text
        if isinstance(found, bool) or _is_number(found):
            return cast("Value", found)
        raise RuntimeError(f"{self._label} printed {excerpt(found)} as {figure.where}, expected a single value")


def _json(text: str) -> Any:
    """What a text says, or None where it is no JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


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


# --- the keeper, seen from the worker --------------------------------------------------------

_NO_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|\bMemoryError\b|Cannot allocate memory|std::bad_alloc|failed to allocate",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int | None
    """Exit status; negative: the signal's number; None where it did not start."""
    fault: str = ""
    """Why it did not start, or was ended."""
    left: tuple[str, ...] = ()
    """Processes that outlived it; they were ended."""
    tail: str = ""
    """The end of what it printed."""
    lack_of_memory: bool = field(default=False, compare=False)
    """Whether the kernel killed a process for lack of memory meanwhile."""

    def cause(self, label: str) -> str | None:
        """Why this run does not count, in a sentence; None where it does."""
        if self.status is None or self.fault:
            return f"{label} {self.fault or 'did not start'}"
        if self.status == 0 and self.left:
            return (
                f"{label} ended and left {', '.join(self.left)} running: energy of work that goes on after a pass is in"
                " no window; let the command wait for what it starts"
            )
        if self.status == 0:
            return None
        if self.lack_of_memory and self.status == -signal.SIGKILL:
            return f"out of memory: the kernel killed {label}{_ending(self.tail)}"
        if self.status < 0:
            return f"{label} was killed by {_signal_name(-self.status)}{_ending(self.tail)}"
        memory = "out of memory: " if _NO_MEMORY.search(self.tail) else ""
        return f"{memory}{label} ended with exit status {self.status}, expected 0{_ending(self.tail)}"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


class Keeper:
    """A process that runs one command after the other, and ends it with all that it started.

    It sits in a session of its own, so that a signal for the worker's group does not end it before its
    command, and reads from a pipe that this process alone holds: the end of the file is the worker's death.
    """

    def __init__(self) -> None:
        # Without a name: nothing is left on the disk, whoever dies.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the keeper
        self._buffer = b""
        self._kills = 0
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).resolve()), str(self._output.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(self._output.fileno(),),
                start_new_session=True,
            )
        except BaseException:
            self._output.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self, argv: Sequence[str], folder: Path, env: Mapping[str, str], keep: Sequence[str], *, endless: bool = False
    ) -> None:
        """Start a command. `keep`: the streams of which the text is kept; `endless`: it may print without end."""
        job = {"argv": list(argv), "folder": str(folder), "env": dict(env), "keep": list(keep), "endless": endless}
        self._kills = _kills()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise RuntimeError("the process that watches over the command has gone; see the log") from error

    def wait(self, seconds: float) -> Ended | None:
        """How the command ended; None where it has not, after so long."""
        assert self._process.stdout is not None
        give_up = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, give_up - time.monotonic())):
                    return None
                chunk = os.read(self._process.stdout.fileno(), 65536)
                if not chunk:
                    raise RuntimeError("the process that watches over the command has gone; see the log")
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        told = json.loads(line)
        return Ended(told["status"], told["fault"], tuple(told["left"]), told["tail"], _kills() > self._kills)

    def output(self) -> str:
        """What the command printed, as far as it is kept."""
        return os.pread(self._output.fileno(), MOST_OUTPUT_BYTES, 0).decode(errors="replace")

    def close(self) -> None:
        """End the command and everything that it started; may be called twice."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(GRACE_SECONDS + 2 * KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._output.close()


def _kills() -> int:
    """How many processes the kernel has killed for lack of memory since boot; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


# --- the keeper itself -----------------------------------------------------------------------

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
"""prctl(2): the signal for the death of the parent; orphans below this process become its children."""


def _prctl(option: int, value: int) -> None:
    """Nothing where the system has no such call: there, only the command's process group is ended."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


@dataclass
class _Stream:
    """One of a command's two streams."""

    keep: bool
    seen: int = 0
    tail: bytes = b""


class _Watch:
    """Runs commands for a worker that speaks through standard input, one JSON line each."""

    def __init__(self, output: int) -> None:
        self._output = output
        self._jobs = b""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._woken, waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._status: dict[int, int] = {}
        self._logged = 0

    def serve(self) -> None:
        """Until the worker closes the pipe, or dies."""
        while self._more():
            while b"\n" in self._jobs:
                line, _, self._jobs = self._jobs.partition(b"\n")
                told = self._run(json.loads(line))
                if told is None:
                    return
                with contextlib.suppress(BrokenPipeError):
                    os.write(1, json.dumps(told).encode() + b"\n")

    def _more(self) -> bool:
        chunk = os.read(0, 65536)
        self._jobs += chunk
        return bool(chunk)

    def _run(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """One command from its start to its end. None where the worker has gone meanwhile."""
        os.ftruncate(self._output, 0)
        os.lseek(self._output, 0, os.SEEK_SET)
        told: dict[str, Any] = {"status": None, "fault": "", "left": [], "tail": ""}
        try:
            child = subprocess.Popen(
                job["argv"],
                cwd=job["folder"],
                env={**os.environ, **job["env"]},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_fresh,  # noqa: PLW1509 - this process has one thread
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            return {**told, "fault": f"cannot be started: {getattr(error, 'strerror', None) or error}"}
        streams = {
            child.stdout.fileno(): _Stream("stdout" in job["keep"]),  # type: ignore[union-attr]  # it is a pipe
            child.stderr.fileno(): _Stream("stderr" in job["keep"]),  # type: ignore[union-attr]  # it is a pipe
        }
        try:
            here, fault = self._follow(child.pid, streams, endless=job["endless"])
            left = _living() if here and not fault else []
            if not here or fault or left:
                self._end(child.pid)
        finally:
            child.returncode = self._status.pop(child.pid, -signal.SIGKILL)
            for pipe in (child.stdout, child.stderr):
                pipe.close()  # type: ignore[union-attr]  # it is a pipe
        if not here:
            return None
        return {
            "status": child.returncode,
            "fault": fault,
            "left": [name for _, name in left],
            "tail": _tail(streams).decode(errors="replace"),
        }

    def _follow(self, pid: int, streams: dict[int, _Stream], *, endless: bool) -> tuple[bool, str]:
        """Read what a command prints until it and all its children have ended.

        Returns whether the worker is still there, and why the command has to be ended.
        """
        self._logged, kept = 0, 0
        give_up = math.inf
        with selectors.DefaultSelector() as selector:
            for source in (0, self._woken, *streams):
                selector.register(source, selectors.EVENT_READ)
            while True:
                # Once the command has ended, what it left may go at any moment, without a signal to this process.
                for key, _ in selector.select(None if give_up == math.inf else POLL_SECONDS):
                    source = key.fd
                    if source == 0:
                        if not self._more():
                            return False, ""
                    elif source == self._woken:
                        with contextlib.suppress(BlockingIOError):
                            os.read(source, 4096)
                    elif chunk := os.read(source, 65536):
                        kept += self._take(streams[source], chunk, kept)
                        if kept > MOST_OUTPUT_BYTES and not endless:
                            most = f"{MOST_OUTPUT_BYTES // 2**20} MiB"
                            return True, f"printed more than {most}, the most that is read; let it print less"
                    else:
                        selector.unregister(source)
                self._reap()
                if pid in self._status:
                    give_up = min(give_up, time.monotonic() + LINGER_SECONDS)
                    open_streams = any(fd in streams for fd in selector.get_map())
                    if (not open_streams and not _living()) or time.monotonic() > give_up:
                        self._close_log(streams)
                        return True, ""

    def _take(self, stream: _Stream, chunk: bytes, kept: int) -> int:
        """Keep it, up to the most that is kept, and log its beginning. Returns how much counts against the most."""
        stream.seen += len(chunk)
        stream.tail = (stream.tail + chunk)[-TAIL_BYTES:]
        if stream.keep and kept < MOST_OUTPUT_BYTES:
            os.write(self._output, chunk[: MOST_OUTPUT_BYTES - kept])
        if self._logged < MOST_LOG_BYTES:
            with contextlib.suppress(OSError):
                os.write(2, chunk[: MOST_LOG_BYTES - self._logged])
        self._logged += len(chunk)
        return len(chunk)

    def _close_log(self, streams: Mapping[int, _Stream]) -> None:
        """The end of what was too long for the log: there stands why it failed."""
        if self._logged > MOST_LOG_BYTES:
            with contextlib.suppress(OSError):
                os.write(2, b"\n[what came here was left out]\n" + _tail(streams))

    def _reap(self) -> None:
        """Take the exit status of every child that has ended, adopted ones too."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._status[pid] = os.waitstatus_to_exitcode(status)

    def _end(self, pid: int) -> None:
        """Ask everything below this process to end, then kill it. What a killed one leaves is found a turn later."""
        for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            give_up = time.monotonic() + seconds
            asked: set[int] = set()
            while True:
                self._reap()
                living = [p for p, _ in _living()] or ([] if pid in self._status else [pid])
                if not living or time.monotonic() > give_up:
                    break
                for one in living:
                    if number == signal.SIGKILL or one not in asked:
                        asked.add(one)
                        with contextlib.suppress(ProcessLookupError, PermissionError):
                            os.kill(one, number)
                time.sleep(0.01)


def _tail(streams: Mapping[int, _Stream]) -> bytes:
    """The end of both streams, standard error last: there stands why it failed."""
    return b"\n".join(stream.tail for stream in streams.values() if stream.tail)


def _fresh() -> None:
    """In the child, before it becomes the command: signals as usual, and death with the keeper."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _living() -> list[tuple[int, str]]:
    """The processes below this one that have not ended, with their names (proc(5), `stat`)."""
    parents: dict[int, list[tuple[int, str]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            head, _, rest = path.read_text(errors="replace").rpartition(")")
            pid, _, name = head.partition(" (")
            state, parent = rest.split()[:2]
            parents.setdefault(int(parent), []).append((int(pid), "" if state in "ZX" else f"{name} (process {pid})"))
    found, below = [], [os.getpid()]
    while below:
        children = parents.get(below.pop(), [])
        below += [pid for pid, _ in children]
        found += [child for child in children if child[1]]
    return found


if __name__ == "__main__":
    _Watch(int(sys.argv[1])).serve()
