r"""Reading a language model's answer.

An answer is untrusted text. It is taken apart by a scanner and `json`, never evaluated, never
formatted, never run; its values stay plain data until `SearchSpace.complete` has checked them. The
reading is tolerant of the wrapping (prose, code fences, thinking, comments, trailing commas, Python's
literals) and strict about the content: nothing is moved into range, no key is guessed, and between two
different answers none is chosen.

Invariants: `read_answer` returns or raises `Refused`, whatever the text; its time is linear in the
length of the text; what it returns holds no control character that a terminal would obey.

The form:

    {"reason": "...", "predicted_joules_per_token": 0.41, "changes": {"threads": 4}}

`changes` are the differences from the default configuration.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from tuner.space import Choice, Int, Parameter, Refused, SearchSpace, Value, excerpt, show
from tuner.trial import Unit

_MOST_CHANGES = 64
"""More than any space has free parameters that a model could change in one answer with a reason."""

_LONGEST_REASON = 4000
"""Characters. The reason is shown to a person and goes into the next prompt."""

_MOST_DIGITS = 300
"""Of an integer: about what a float holds."""

_DEEPEST = 16
"""Levels of braces and brackets. The form has 2; `json` would run out of stack near 1000."""


@dataclass(frozen=True)
class Answer:
    """What a model proposed, in the right form but with its values still unchecked."""

    changes: dict[str, object]
    """Differences from the default configuration; empty proposes the default itself."""
    reason: str
    predicted_joules_per_unit: float | None


def answer_form(unit: Unit = "token") -> str:
    """The form of the answer, as prompts and error sentences show it."""
    return f'{{"reason": "...", "{_predicted(unit)}": NUMBER or null, "changes": {{"PARAMETER": VALUE, ...}}}}'


def read_answer(text: str, unit: Unit = "token") -> Answer:
    """The answer in a model's reply.

    Raises:
        Refused: with one sentence that names every fault, for a person and for the model.
    """
    if not text.strip():
        raise Refused(f"the answer is empty; expected {answer_form(unit)}")
    answers = _answers(text, unit)
    # As text: `==` takes true for 1.
    different = {json.dumps(answer, sort_keys=True) for answer in answers}
    if len(different) > 1:
        raise Refused(f"the answer holds {len(different)} different JSON objects; expected one, {answer_form(unit)}")
    return _checked(answers[0], unit)


def answer_schema(space: SearchSpace, unit: Unit = "token") -> dict[str, object]:
    """The JSON schema of an answer for `space`, within what OpenAI and Anthropic both take.

    Strict mode wants every property required and no others; null then stands for "leave it at the
    default". Ranges stand in the descriptions: Anthropic refuses `minimum` and `maximum`.

    Source: https://platform.openai.com/docs/guides/structured-outputs (supported schemas),
    https://platform.claude.com/docs/en/build-with-claude/structured-outputs (JSON schema limitations).
    """
    return _object(
        {
            "reason": {"type": "string", "description": "why this configuration: one to three sentences"},
            _predicted(unit): {"type": ["number", "null"], "description": f"the joules per {unit} you expect; or null"},
            "changes": _object({p.name: _property(p) for p in space.free}),
        }
    )


def _predicted(unit: Unit) -> str:
    return f"predicted_joules_per_{unit}"


def _object(properties: Mapping[str, object]) -> dict[str, object]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _property(parameter: Parameter) -> dict[str, object]:
    description = f"{parameter.meaning} Range: {parameter.range}. null keeps the default, {show(parameter.default)}."
    if not isinstance(parameter, Choice):
        kind = "integer" if isinstance(parameter, Int) else "number"
        return {"type": [kind, "null"], "description": description}
    by_kind: dict[str, list[Value]] = {}
    for value in parameter.values:
        by_kind.setdefault(_json_type(value), []).append(value)
    if len(by_kind) == 1:
        ((kind, values),) = by_kind.items()
        return {"type": [kind, "null"], "enum": [*values, None], "description": description}
    variants: list[dict[str, object]] = [{"type": kind, "enum": values} for kind, values in by_kind.items()]
    return {"anyOf": [*variants, {"type": "null"}], "description": description}


def _json_type(value: Value) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    return "number" if isinstance(value, float) else "string"


# --- from text to objects --------------------------------------------------------------------

_THINKING = "</think>"
"""What reasoning models put behind their drafts, when the server leaves the drafts in the text."""

_TOKEN = re.compile(
    r"""
      (?P<string> " (?: [^"\\]++ | \\. )*+ (?: " | \\?\Z ) )   # an unfinished one reaches to the end of the text
    | (?P<comment> (?: // | \# ) [^\n]*+ )
    | (?P<open> [{\[] )
    | (?P<close> [}\]] )
    | (?P<comma> , )
    | (?P<word> [A-Za-z_]++ )
    | (?P<other> [^"/\#{}\[\],A-Za-z_]++ | . )
    """,
    re.VERBOSE | re.DOTALL,
)
# Possessive (`++`, `*+`): each character is looked at once, so that no text takes quadratic time.

_PYTHON = {"None": "null", "True": "true", "False": "false"}


class _Unreadable(Exception):
    """An object that is no JSON, not even with the usual slips mended."""


def _answers(text: str, unit: Unit) -> list[dict[str, object]]:
    """The objects in the answer's form: those in code fences, else those anywhere. At least one."""
    text = text.rpartition(_THINKING)[2]
    # What is wrong with the first object that looks like an answer, and with the first that does not.
    fault = aside = ""
    # The odd parts lie inside of fences. A language tag stays in front, as prose.
    for region in ("\n".join(text.split("```")[1::2]), text):
        found = []
        candidates, unfinished = _objects(region)
        for candidate in candidates:
            looks_right = '"changes"' in candidate
            # A text of a hundred thousand `{}` is not parsed a hundred thousand times.
            if aside and not looks_right:
                continue
            try:
                value = _parse(candidate)
            except _Unreadable as error:
                what = f"{excerpt(candidate)} cannot be read: {error}"
            else:
                if "changes" in value:
                    found.append(value)
                    continue
                what = f"the JSON object has no `changes` ({f'it has {_listed(value)}' if value else 'it is empty'})"
            if looks_right:
                fault = fault or what
            else:
                aside = aside or what
        if found:
            return found
        if unfinished:
            fault = fault or "the JSON object never ends (was the answer cut off?)"
    raise Refused(f"{fault or aside or 'the answer holds no JSON object'}; expected {answer_form(unit)}")


def _objects(text: str) -> tuple[list[str], bool]:
    """The outermost balanced `{...}` of a text in order, and whether a brace stays open at its end.

    Strings and comments are respected inside of braces; outside there is prose, where a quote opens
    nothing. One pass. A brace that never closes hides nothing that closes inside of it.
    """
    spans: list[tuple[int, int]] = []
    opened: list[int] = []
    position = text.find("{")
    while 0 <= position < len(text):
        token = _TOKEN.match(text, position)
        assert token is not None, "the last alternative matches any character"
        if token.group() == "{":
            opened.append(position)
        elif token.group() == "}":
            start = opened.pop()
            while spans and spans[-1][0] > start:
                spans.pop()
            spans.append((start, token.end()))
        position = token.end() if opened else text.find("{", token.end())
    return [text[start:end] for start, end in spans], bool(opened)


def _parse(candidate: str) -> dict[str, object]:
    """The JSON object in a balanced `{...}`, with the slips mended that do not change its meaning.

    Mended: comments, trailing commas, None, True and False, and line breaks inside of strings.
    """
    parts: list[str] = []
    comma: int | None = None
    depth = 0
    for token in _TOKEN.finditer(candidate):
        kind, part = token.lastgroup, token.group()
        if kind == "comment":
            continue
        if kind == "open":
            depth += 1
            if depth > _DEEPEST:
                raise _Unreadable(f"it is nested more than {_DEEPEST} levels deep")
        elif kind == "close":
            depth -= 1
            if comma is not None:
                parts[comma] = ""
        elif kind == "word":
            part = _PYTHON.get(part, part)
        if kind == "comma":
            comma = len(parts)
        elif part.strip():
            comma = None
        parts.append(part)
    twice: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        value: dict[str, object] = {}
        for name, item in pairs:
            if name in value:
                twice.append(name)
            value[name] = item
        return value

    try:
        value = json.loads(
            "".join(parts),
            strict=False,
            object_pairs_hook=unique,
            parse_constant=_refuse_number,
            parse_float=_finite,
            parse_int=_whole,
        )
    except json.JSONDecodeError as error:
        raise _Unreadable(f"{error.msg.lower()} at character {error.pos + 1}") from None
    if twice:
        raise _Unreadable(f"it names {_listed(dict.fromkeys(twice))} twice")
    assert isinstance(value, dict), "it starts with a brace"
    return value


def _refuse_number(text: str) -> float:
    raise _Unreadable(f"{text} is no number")


def _whole(text: str) -> int:
    # Python itself refuses to convert from 4300 digits on, with a sentence about its own settings.
    if len(text) > _MOST_DIGITS:
        raise _Unreadable(f"{text[:30]}... is too long for a number")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Unreadable(f"{text[:30]} is too large for a number")
    return number


# --- from an object to an answer -------------------------------------------------------------


def _checked(value: Mapping[str, object], unit: Unit) -> Answer:
    faults = []
    known = ("reason", _predicted(unit), "changes")
    if unknown := [key for key in value if key not in known]:
        faults.append(f"unknown keys {_listed(unknown)} (parameters go into `changes`)")

    reason = value.get("reason")
    if reason is None:
        reason = ""
    if not isinstance(reason, str):
        faults.append(f"reason={excerpt(reason)}: expected text")
        reason = ""
    if len(reason) > _LONGEST_REASON:
        faults.append(f"reason: expected at most {_LONGEST_REASON} characters, got {len(reason)}")

    predicted = value.get(_predicted(unit))
    if predicted is not None and not _is_energy(predicted):
        faults.append(f"{_predicted(unit)}={excerpt(predicted)}: expected a number above 0, or null")

    changes = value["changes"]
    if changes is None:
        changes = {}
    if not isinstance(changes, dict):
        faults.append(f"changes={excerpt(changes)}: expected an object of parameters and their values")
        changes = {}
    elif len(changes) > _MOST_CHANGES:
        faults.append(f"changes: expected at most {_MOST_CHANGES} parameters, got {len(changes)}")

    if faults:
        raise Refused(f"{'; '.join(faults)}; expected {answer_form(unit)}")
    return Answer(
        changes={name: new for name, new in changes.items() if new is not None},
        reason=_printable(reason),
        predicted_joules_per_unit=float(predicted) if isinstance(predicted, int | float) else None,
    )


def _is_energy(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300


def _listed(names: Iterable[str]) -> str:
    """Untrusted names, the first few of them."""
    shown = [excerpt(name, 30) for name in islice(names, 9)]
    return ", ".join([*shown[:8], "..."] if len(shown) > 8 else shown)


def _printable(text: str) -> str:
    """`text` for a terminal, a prompt and a UTF-8 file.

    Controls (an escape sequence can rewrite the screen), directional overrides (they reorder what is
    read) and lone surrogates (no file takes them) become spaces; line breaks and tabs stay.
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else " " for c in text).strip()
