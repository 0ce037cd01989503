"""What may be tuned.

A parameter is a named, typed quantity with a default, a scope (when it can change) and an effect
(what it does to the output). A search space is an ordered set of parameters plus the constraints
among them. Everything that reaches an engine has passed `SearchSpace.check`; everything that a
sampler draws comes out of `SearchSpace.at`. Nothing here ever moves a value into range: what does
not fit is refused with a sentence that a person and a language model can both act on.

Glossary
    config      one value for every parameter of the space, in the order of the space
    point       one number in [0, 1) for every free parameter; `at` turns it into a config
    free        a parameter that still has more than one legal value
"""

from __future__ import annotations

import difflib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Value = bool | int | float | str
Config = dict[str, Value]

Scope = Literal["launch", "live", "request", "token"]
"""launch: needs a restart of the engine; live: changes on a running engine; request: per request;
token: chosen anew at each decoding step."""

Effect = Literal["exact", "numerics", "lossy"]
"""exact: same tokens up to batching; numerics: other rounding; lossy: can change quality."""

Lever = Literal["work", "offload", "clock", "power"]
"""Through what a parameter moves energy. Meters name the levers they cannot see (`Meter.blind_to`):
an estimate from CPU seconds cannot tell what moving layers to a GPU or lowering a clock does."""


class Refused(ValueError):
    """What was asked for cannot be done; the message is the whole answer and says what can be."""


class RefusedForGood(Refused):
    """One that the same options would meet again, whatever is mended."""


def show(value: Value | None) -> str:
    """A value as a person types it: `true`, `4`, `q8_0`."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def excerpt(value: object, limit: int = 60) -> str:
    """An untrusted value, quoted and cut, so that no answer can flood a terminal or a prompt."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def closest(name: str, choices: Sequence[str]) -> str:
    """`; did you mean threads?`, or nothing when no choice resembles `name`."""
    near = difflib.get_close_matches(name[:80], choices, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def powers_of_two(low: float, high: float) -> tuple[int, ...]:
    """Every power of two from `low` to `high`, both counted."""
    return tuple(2**n for n in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1))


def power_of_two(least: float) -> int:
    """The smallest one that is `least` or more, and 1 at least."""
    return 1 << max(0, math.ceil(math.log2(least)))


@dataclass(frozen=True, kw_only=True)
class Parameter(ABC):
    """One thing that may be tuned. `meaning` is the sentence that prompts and tables show."""

    name: str
    meaning: str
    default: Value
    scope: Scope = "launch"
    effect: Effect = "exact"
    lever: Lever = "work"

    @property
    @abstractmethod
    def size(self) -> float:
        """How many legal values there are; `math.inf` for a continuous range."""

    @property
    @abstractmethod
    def range(self) -> str:
        """The legal values as a person would type them: `1..16` or `f16, q8_0`."""

    @abstractmethod
    def check(self, value: object) -> Value:
        """The value in its own type; `Refused` says what was expected."""

    @abstractmethod
    def at(self, u: float) -> Value:
        """The value at `u` in [0, 1)."""

    @abstractmethod
    def position(self, value: Value) -> float:
        """The `u` in the middle of the cell that `at` maps to `value`."""

    @abstractmethod
    def neighbours(self, value: Value) -> tuple[Value, ...]:
        """The values one natural step away: next below and above, doubled and halved, or all others."""

    @abstractmethod
    def parse(self, text: str) -> Value:
        """The value that a person typed; `Refused` when it is none."""

    @abstractmethod
    def narrow(self, text: str) -> Parameter:
        """The same parameter with its legal values cut down to `text` (`1..8` or `f16,q8_0`)."""

    def pin(self, value: Value) -> Choice:
        """The same parameter with `value` as its only legal value."""
        return Choice(
            name=self.name,
            meaning=self.meaning,
            default=value,
            scope=self.scope,
            effect=self.effect,
            lever=self.lever,
            values=(self.check(value),),
        )

    def _refuse(self, value: object) -> Refused:
        return Refused(f"{self.name}={excerpt(value)}: expected {self.expected}")

    @property
    @abstractmethod
    def expected(self) -> str:
        """What `check` accepts, for an error sentence: `an integer from 1 to 16`."""


@dataclass(frozen=True, kw_only=True)
class _Range(Parameter):
    """A range of numbers. `log` draws in equal ratios instead of equal steps."""

    default: int | float
    low: int | float
    high: int | float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise Refused(f"{self.name}: expected finite low <= high, got {self.low}..{self.high}")
        if self.log and self.low <= 0:
            raise Refused(f"{self.name}: a log range starts above 0, got {self.low}")

    @property
    def range(self) -> str:
        return f"{show(self.low)}..{show(self.high)}"

    def narrow(self, text: str) -> Parameter:
        low_text, dots, high_text = text.partition("..")
        if not dots:
            raise Refused(f"--range {self.name}={excerpt(text)}: expected LOW..HIGH within {self.range}")
        low, high = self.parse(low_text), self.parse(high_text)
        assert not isinstance(low, str)
        assert not isinstance(high, str)
        if low > high:
            raise Refused(f"--range {self.name}={text}: the low end is above the high end")
        return replace(self, low=low, high=high, default=min(max(self.default, low), high))


@dataclass(frozen=True, kw_only=True)
class Int(_Range):
    """An integer from `low` to `high`, both included."""

    default: int
    low: int
    high: int

    @property
    def size(self) -> float:
        return self.high - self.low + 1

    @property
    def expected(self) -> str:
        return f"an integer from {self.low} to {self.high}"

    def check(self, value: object) -> int:
        # JSON has one number type: 4.0 is the integer 4. True is not the integer 1.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise self._refuse(value)
        return value

    def at(self, u: float) -> int:
        if self.log:
            # Cells of equal ratio over [low, high + 1): floor keeps both ends as likely as the rest.
            value = math.floor(self.low * math.pow((self.high + 1) / self.low, u))
        else:
            value = self.low + math.floor(u * self.size)
        return min(value, self.high)

    def position(self, value: Value) -> float:
        middle = float(value) + 0.5
        if self.log:
            return math.log(middle / self.low) / math.log((self.high + 1) / self.low)
        return (middle - self.low) / self.size

    def neighbours(self, value: Value) -> tuple[Value, ...]:
        number = int(value)
        steps = (number // 2, number * 2) if self.log else (number - 1, number + 1, number // 2, number * 2)
        return tuple(n for n in dict.fromkeys(steps) if self.low <= n <= self.high and n != number)

    def parse(self, text: str) -> int:
        try:
            return self.check(int(text))
        except ValueError:
            raise self._refuse(text) from None


@dataclass(frozen=True, kw_only=True)
class Float(_Range):
    """A real number from `low` to `high`, both included."""

    default: float
    low: float
    high: float

    @property
    def size(self) -> float:
        return math.inf if self.high > self.low else 1

    @property
    def expected(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def check(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            raise self._refuse(value)
        return float(value)

    def at(self, u: float) -> float:
        if self.log:
            return min(max(self.low * math.pow(self.high / self.low, u), self.low), self.high)
        return min(self.low + u * (self.high - self.low), self.high)

    def position(self, value: Value) -> float:
        if self.high == self.low:
            return 0.5
        if self.log:
            u = math.log(float(value) / self.low) / math.log(self.high / self.low)
        else:
            u = (float(value) - self.low) / (self.high - self.low)
        return min(u, math.nextafter(1.0, 0.0))

    def neighbours(self, value: Value) -> tuple[Value, ...]:
        u = self.position(value)
        return tuple(self.at(v) for v in (u - 0.1, u + 0.1) if 0 <= v < 1)

    def parse(self, text: str) -> float:
        try:
            return self.check(float(text))
        except ValueError:
            raise self._refuse(text) from None


@dataclass(frozen=True, kw_only=True)
class Choice(Parameter):
    """One of `values`. `ordered`: the values form a scale, so that a step up or down has a meaning."""

    values: tuple[Value, ...]
    ordered: bool = False

    def __post_init__(self) -> None:
        if not self.values:
            raise Refused(f"{self.name}: expected at least one value")

    @property
    def size(self) -> float:
        return len(self.values)

    @property
    def range(self) -> str:
        return ", ".join(show(v) for v in self.values)

    @property
    def expected(self) -> str:
        return f"one of {self.range}" if len(self.values) > 1 else f"{self.range} (it is pinned)"

    def _index(self, value: object) -> int:
        # Not `in`: True == 1 and 4 == 4.0, and a bool must not pass for a number.
        for index, own in enumerate(self.values):
            same_kind = isinstance(own, bool) == isinstance(value, bool)
            if same_kind and isinstance(value, bool | int | float | str) and own == value:
                return index
        raise self._refuse(value)

    def check(self, value: object) -> Value:
        return self.values[self._index(value)]

    def at(self, u: float) -> Value:
        return self.values[min(math.floor(u * len(self.values)), len(self.values) - 1)]

    def position(self, value: Value) -> float:
        return (self._index(value) + 0.5) / len(self.values)

    def neighbours(self, value: Value) -> tuple[Value, ...]:
        index = self._index(value)
        if self.ordered:
            return tuple(self.values[i] for i in (index - 1, index + 1) if 0 <= i < len(self.values))
        return tuple(v for i, v in enumerate(self.values) if i != index)

    def parse(self, text: str) -> Value:
        for own in self.values:
            if show(own) == text.strip():
                return own
        raise self._refuse(text)

    def narrow(self, text: str) -> Parameter:
        low_text, dots, high_text = text.partition("..")
        if dots and self.ordered:
            low, high = self._index(self.parse(low_text)), self._index(self.parse(high_text))
            if low > high:
                raise Refused(f"--range {self.name}={text}: the low end comes after the high end")
            kept = self.values[low : high + 1]
        else:
            asked = [self.parse(part) for part in text.split(",")]
            kept = tuple(v for v in self.values if any(v is a or v == a for a in asked))
        if any(k == self.default for k in kept):
            return replace(self, values=kept)
        own = self.values.index(self.default)
        nearest = min(kept, key=lambda v: abs(self.values.index(v) - own))
        return replace(self, values=kept, default=nearest)


@dataclass(frozen=True)
class Constraint:
    """A rule among parameters: the sentence that people and prompts read, and its check."""

    sentence: str
    holds: Callable[[Mapping[str, Value]], bool]


@dataclass(frozen=True)
class SearchSpace:
    """Parameters and the constraints among them. Immutable: every change gives a new space."""

    parameters: tuple[Parameter, ...]
    constraints: tuple[Constraint, ...] = ()

    def __post_init__(self) -> None:
        names = [p.name for p in self.parameters]
        if len(set(names)) != len(names):
            raise Refused(f"a search space names each parameter once, got {', '.join(names)}")

    def __getitem__(self, name: str) -> Parameter:
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise Refused(
            f"unknown parameter {excerpt(name)}{closest(name, self.names)} (the parameters are {', '.join(self.names)})"
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    @property
    def free(self) -> tuple[Parameter, ...]:
        """The parameters with more than one legal value."""
        return tuple(p for p in self.parameters if p.size > 1)

    @property
    def size(self) -> float:
        """Legal combinations before constraints; `math.inf` with a continuous parameter."""
        return math.prod(p.size for p in self.parameters)

    def check(self, config: Mapping[str, object]) -> Config:
        """`config` in the order and the types of the space.

        Raises:
            Refused: naming every fault at once: unknown and missing parameters, wrong types, values
                out of range, and, where the values themselves are legal, each constraint that is broken.
        """
        faults = [
            f"{excerpt(name)}: no such parameter{closest(str(name), self.names)}"
            for name in config
            if name not in self.names
        ]
        checked: Config = {}
        for parameter in self.parameters:
            if parameter.name not in config:
                faults.append(f"{parameter.name}: missing")
                continue
            try:
                checked[parameter.name] = parameter.check(config[parameter.name])
            except Refused as fault:
                faults.append(str(fault))
        if not faults:
            faults = self.broken(checked)
        if faults:
            raise Refused("; ".join(faults))
        return checked

    def broken(self, config: Mapping[str, Value]) -> list[str]:
        """The sentences of the constraints that `config` breaks, each with the values that break it."""
        return [f"broken constraint: {c.sentence}" for c in self.constraints if not c.holds(config)]

    def complete(self, changes: Mapping[str, object]) -> Config:
        """The default configuration with `changes` made to it, checked."""
        return self.check({**self.default(), **changes})

    def at(self, point: Sequence[float]) -> Config:
        """The configuration at `point`, one number in [0, 1) for each free parameter in order.

        Cells have equal width (`floor(u * n)`): rounding would give the two end values half the
        chance of the others. Constraints are not applied; ask `broken`.
        """
        coordinates = iter(point)
        return {p.name: p.at(next(coordinates)) if p.size > 1 else p.default for p in self.parameters}

    def position(self, config: Mapping[str, Value]) -> list[float]:
        """The point in the middle of the cell of `config`: the inverse of `at`."""
        return [p.position(config[p.name]) for p in self.free]

    def default(self) -> Config:
        """The engine's own setting: trial 0 of every study."""
        return {p.name: p.default for p in self.parameters}

    def changes(self, config: Mapping[str, Value]) -> Config:
        """What `config` changes from the default, in the order of the space."""
        return {p.name: config[p.name] for p in self.parameters if config[p.name] != p.default}

    def key(self, config: Mapping[str, Value]) -> str:
        """One string for one configuration, whatever the order of its keys."""
        return json.dumps({name: config[name] for name in self.names})

    def pin(self, name: str, text: str) -> SearchSpace:
        """`--pin threads=2`: the parameter keeps this one value."""
        parameter = self[name]
        return self._with(parameter.pin(parameter.parse(text)))

    def narrow(self, name: str, text: str) -> SearchSpace:
        """`--range parallel=1..8`: fewer legal values. A default outside moves to the nearest end."""
        return self._with(self[name].narrow(text))

    def freeze(self, name: str) -> SearchSpace:
        """The parameter stays at its default."""
        return self._with(self[name].pin(self[name].default))

    def forbid(self, name: str, value: Value) -> SearchSpace:
        """The same space in which `name` may not be `value`; a default that it forbids is kept out too."""
        rule = Constraint(f"{name} is not {show(value)} (forbidden by the person)", lambda c: c[name] != value)
        return replace(self, constraints=(*self.constraints, rule))

    def record(self) -> list[dict[str, object]]:
        """The space as the journal's header keeps it; two spaces with the same record are the same."""
        return [
            {
                "name": p.name,
                "kind": type(p).__name__,
                "range": p.range,
                "default": p.default,
                "scope": p.scope,
                "effect": p.effect,
                "meaning": p.meaning,
            }
            for p in self.parameters
        ]

    def _with(self, parameter: Parameter) -> SearchSpace:
        changed = tuple(parameter if p.name == parameter.name else p for p in self.parameters)
        return replace(self, parameters=changed)
