"""Constraints as a person writes them: `threads * 2 <= 8`, `repack -> threads > 1`. Read by a grammar, never by `eval`.

rule       = either [ "->" rule ]                     a -> b: where a holds, b must hold
either     = both { "or" both }
both       = negation { "and" negation }
negation   = "not" negation | comparison
comparison = sum { ( "<" | "<=" | "==" | "!=" | ">=" | ">" ) sum }      1 <= a <= b holds where both do
sum        = product { ( "+" | "-" ) product }
product    = sign { ( "*" | "/" ) sign }
sign       = "-" sign | atom
atom       = number | 'text' | "true" | "false" | name | "(" rule ")"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from tuner.space import Parameter, Value, closest, excerpt

MOST_RULE_CHARACTERS = 500
MOST_RULE_DEPTH = 50

Kind = Literal["number", "truth", "text"]
_KINDS: Mapping[Kind, str] = {"number": "a number", "truth": "true or false", "text": "a text"}
KEYWORDS = ("and", "or", "not", "true", "false")
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

    def _deeper(self, part: Callable[[], _Node]) -> _Node:
        """A part inside of a part: Python's own stack has an end too."""
        self._depth += 1
        if self._depth > MOST_RULE_DEPTH:
            raise RuleFault(self._next.column, f"expected at most {MOST_RULE_DEPTH} levels")
        node = part()
        self._depth -= 1
        return node

    def _rule(self) -> _Node:
        return self._deeper(self._implication)

    def _implication(self) -> _Node:
        left = self._either()
        if not self._take("->"):
            return left
        a, b = self._truth(left), self._truth(self._rule())
        return _Node("truth", a.column, lambda c: not a.of(c) or b.of(c))

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

    # Functions, not lambdas in the loops: each closes over the operands of its own turn.

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
        if token.kind != "name" or token.text in KEYWORDS:
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


def kind_of(parameter: Parameter) -> Kind:
    """What a parameter is in a constraint."""
    if isinstance(parameter.default, bool):
        return "truth"
    return "text" if isinstance(parameter.default, str) else "number"
