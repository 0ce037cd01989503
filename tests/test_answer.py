"""Reading a language model's answer: tolerant of the wrapping, strict about the content."""

from __future__ import annotations

import json
import time
import typing
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tuner.proposers.answer import Answer, answer_form, answer_schema, read_answer
from tuner.space import Choice, Constraint, Float, Int, Refused, SearchSpace, Value
from tuner.trial import Unit

patiently = settings(deadline=None)
"""A busy machine is no fault of the parser."""

SPACE = SearchSpace(
    (
        Int(name="threads", meaning="Threads of the engine.", default=4, low=1, high=16),
        Int(name="n_batch", meaning="Prompt tokens in one pass.", default=512, low=32, high=2048, log=True),
        Float(name="clock", meaning="Share of the top clock.", default=1.0, low=0.5, high=1.0, scope="live"),
        Choice(name="type_k", meaning="Type of the K cache.", default="f16", values=("f16", "q8_0"), effect="numerics"),
        Choice(name="flash", meaning="Flash attention.", default=False, values=(False, True)),
        Choice(name="split", meaning="Pinned.", default=1, values=(1,)),
        Choice(name="mode", meaning="Mixed kinds.", default="auto", values=("auto", 1, 0.5, True)),
    ),
    (Constraint("n_batch >= threads", lambda config: config["n_batch"] >= config["threads"]),),  # type: ignore[operator] # a constraint knows the types of its parameters
)

GOOD = '{"reason": "fewer threads wait less", "predicted_joules_per_token": 0.41, "changes": {"threads": 2}}'
ANSWER = Answer(changes={"threads": 2}, reason="fewer threads wait less", predicted_joules_per_unit=0.41)


def proposed(text: str) -> dict[str, Value]:
    """What a proposer makes of a text."""
    return SPACE.complete(read_answer(text).changes)


# --- wrapping is tolerated


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n\n  {GOOD}\n",
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}\n```",
        f"```json\n{GOOD}",
        f'Sure! "Here" it is:\n\n```json\n{GOOD}\n```\nHope {{this}} helps. Don\'t "worry.',
        f"The best move is {GOOD} because of the cache.",
        f"Take {{n_batch}} and {{threads}}: {GOOD}",
        f"A brace {{ that never closes. {GOOD}",
        f"[{GOOD}]",
        f'{{"answer": 1}} {GOOD}',
        f"<think>maybe {GOOD.replace('2', '3')}? no.</think>\n{GOOD}",
        f"maybe {GOOD.replace('2', '3')}? no.</think>{GOOD}",
        f"{GOOD}\n\nAs said:\n```json\n{GOOD}\n```",
        f"{GOOD}{GOOD}",
        GOOD.replace("2}}", "2,},\n}"),
        GOOD.replace('"changes"', '// what to change {\n"changes"').replace("2}}", '2 # not 4 "\n}}'),
        GOOD.replace('"threads": 2', '"threads": 2, "type_k": null, "flash": None'),
        GOOD.replace("0.41", "41e-2"),
        f"\ufeff{GOOD}",
    ],
)
def test_the_answer_is_found_in_any_wrapping(text: str) -> None:
    assert read_answer(text) == ANSWER


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("True", True),
        ("False", False),
        ("true", True),
        ('"True"', "True"),
        ("2.0", 2.0),
        ("-1", -1),
        ('"a // b"', "a // b"),
    ],
)
def test_a_value_keeps_its_type(literal: str, value: object) -> None:
    (read,) = read_answer(f'{{"changes": {{"flash": {literal}}}}}').changes.values()
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"changes": {}}', Answer({}, "", None)),
        ('{"changes": null, "reason": null, "predicted_joules_per_token": null}', Answer({}, "", None)),
        ('{"changes": {"threads": null}}', Answer({}, "", None)),
        ('{"changes": {}, "reason": "two\nlines", "predicted_joules_per_token": 3}', Answer({}, "two\nlines", 3.0)),
        (
            '{"changes": {}, "reason": "tab\\tquote\\" brace } fence ```"}',
            Answer({}, 'tab\tquote" brace } fence ```', None),
        ),
    ],
)
def test_what_is_left_out_or_null_is_left_at_the_default(text: str, answer: Answer) -> None:
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("\\u001b[2Jgone", "[2Jgone"),
        ("a\\u0000b", "a b"),
        ("a\\r\\nb", "a \nb"),
        ("\\ud800half", "half"),
        ("abc\\u202edcba", "abc dcba"),
        ("größer \\ud83d\\udd0b", "größer 🔋"),
    ],
    ids=["escape", "zero", "carriage return", "lone surrogate", "right to left", "unicode"],
)
def test_a_reason_holds_nothing_that_a_terminal_or_a_file_would_choke_on(written: str, shown: str) -> None:
    reason = read_answer(f'{{"reason": "{written}", "changes": {{}}}}').reason
    assert reason == shown


def test_the_prediction_is_asked_for_in_the_unit_of_the_load() -> None:
    text = '{"predicted_joules_per_image": 12, "changes": {}}'
    assert read_answer(text, "image").predicted_joules_per_unit == 12.0
    with pytest.raises(Refused, match='unknown keys "predicted_joules_per_image"'):
        read_answer(text, "token")


# --- content is not


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "the answer is empty"),
        (" \n\t", "the answer is empty"),
        ("I would use fewer threads.", "the answer holds no JSON object"),
        ("[1, 2]", "the answer holds no JSON object"),
        ('"changes"', "the answer holds no JSON object"),
        ("<think>hm</think>", "the answer holds no JSON object"),
        (GOOD[:-1], "never ends (was the answer cut off?)"),
        (GOOD[:40], "never ends (was the answer cut off?)"),
        ("{}", "has no `changes` (it is empty)"),
        ('{"threads": 2}', 'has no `changes` (it has "threads")'),
        ('{"config": {"threads": 2}}', 'has no `changes` (it has "config")'),
        ("{threads: 2}", "cannot be read: expecting property name"),
        ("{'changes': {'threads': 2}}", "cannot be read: expecting property name"),
        ('{"changes": {"threads": }}', "cannot be read: expecting value at character 25"),
        ('I take {n_batch}: {"changes": {"threads" 2}}', "cannot be read: expecting ':' delimiter"),
        ('{"changes": {"threads": os.cpu_count()}}', "cannot be read"),
        ('{"changes": {"threads": 2 + 2}}', "cannot be read"),
        ('{"changes": {"threads": NaN}}', "NaN is no number"),
        ('{"changes": {"threads": -Infinity}}', "-Infinity is no number"),
        ('{"changes": {"clock": 1e999}}', "1e999 is too large for a number"),
        ('{"changes": {"threads": ' + "9" * 5000 + "}}", "is too long for a number"),
        ('{"changes": {"threads": 2, "threads": 3}}', 'it names "threads" twice'),
        ('{"changes": {}, "changes": {"threads": 3}}', 'it names "changes" twice'),
        ('{"changes": ' + "[" * 100 + "]" * 100 + "}", "nested more than 16 levels deep"),
        (GOOD + GOOD.replace("2}", "3}"), "holds 2 different JSON objects"),
        ('{"changes": {"flash": true}} {"changes": {"flash": 1}}', "holds 2 different JSON objects"),
        ('{"changes": [1]}', "changes=[1]: expected an object"),
        ('{"changes": "threads=2"}', 'changes="threads=2": expected an object'),
        ('{"changes": {}, "reason": 3}', "reason=3: expected text"),
        ('{"changes": {}, "reason": ["a"]}', 'reason=["a"]: expected text'),
        ('{"changes": {}, "reason": "' + "a" * 4001 + '"}', "reason: expected at most 4000 characters, got 4001"),
        ('{"changes": {}, "predicted_joules_per_token": "low"}', 'predicted_joules_per_token="low": expected a number'),
        ('{"changes": {}, "predicted_joules_per_token": true}', "predicted_joules_per_token=true: expected a number"),
        ('{"changes": {}, "predicted_joules_per_token": 0}', "predicted_joules_per_token=0: expected a number above 0"),
        (
            '{"changes": {}, "predicted_joules_per_token": -1}',
            "predicted_joules_per_token=-1: expected a number above 0",
        ),
        (
            '{"changes": {}, "resaon": "x", "threads": 2}',
            'unknown keys "resaon", "threads" (parameters go into `changes`)',
        ),
        ('{"changes": {' + ", ".join(f'"p{i}": 1' for i in range(65)) + "}}", "at most 64 parameters, got 65"),
    ],
)
def test_what_is_wrong_is_refused_by_name(text: str, fault: str) -> None:
    with pytest.raises(Refused) as caught:
        read_answer(text)
    assert fault in str(caught.value)
    assert answer_form() in str(caught.value)


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(Refused) as caught:
        read_answer('{"reason": 3, "predicted_joules_per_token": -1, "changes": 7, "more": 1}')
    for fault in ("reason=3", "predicted_joules_per_token=-1", "changes=7", 'unknown keys "more"'):
        assert fault in str(caught.value)


def test_a_fault_that_looks_like_the_answer_is_named_before_braces_in_the_prose() -> None:
    with pytest.raises(Refused, match=r"threads.*cannot be read"):
        read_answer('with {n_batch} fixed: {"changes": {"threads": ?}}')


def test_an_object_in_a_fence_counts_before_one_in_the_prose() -> None:
    assert read_answer(f"Not {GOOD.replace('2', '3')} but\n```json\n{GOOD}\n```") == ANSWER


@pytest.mark.parametrize(
    "value",
    [
        "$(rm -rf ~)",
        "; reboot",
        "../../etc/passwd",
        "{0.__class__}",
        "%s%n",
        "{{ 7*7 }}",
        "\x1b]52;c;eA==\x07",
        "x" * 10_000,
    ],
)
def test_commands_and_paths_in_values_are_plain_text_that_no_parameter_takes(value: str) -> None:
    text = json.dumps({"reason": value[:4000], "changes": {"type_k": value, value: 1}})
    assert read_answer(text).changes["type_k"] == value
    with pytest.raises(Refused) as caught:
        proposed(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


# --- time


def outcome(text: str) -> str | tuple[Answer, dict[str, Value]]:
    """The refusal's sentence, or the answer with its configuration. Any other exception fails the test."""
    try:
        answer = read_answer(text)
        return answer, SPACE.complete(answer.changes)
    except Refused as refusal:
        return str(refusal)


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "text",
    [
        "{" * MEGABYTE,
        "}" * MEGABYTE,
        "{}" * (MEGABYTE // 2),
        "{" + '"' * MEGABYTE,
        "{" + '"\\' * (MEGABYTE // 2),
        '{"' + "\\" * (MEGABYTE + 1),
        "{" + "/" * MEGABYTE,
        "{" + "[" * MEGABYTE + "}",
        '{"a":' * (MEGABYTE // 5),
        '{"changes":{' * (MEGABYTE // 12),
        '{"changes":{}}' * (MEGABYTE // 14),
        '{"changes":{"threads":}}' * (MEGABYTE // 24),
        '{"changes":{' + '"a":1,' * (MEGABYTE // 6) + "}}",
        '{"changes":{' + ",".join(f'"p{i}":1' for i in range(MEGABYTE // 12)) + "}}",
        "```" * (MEGABYTE // 3),
        "```{" * (MEGABYTE // 4),
        "</think>" * (MEGABYTE // 8),
        " " * MEGABYTE,
        "a" * MEGABYTE,
        '{"changes":{"a":' + "9" * MEGABYTE + "}}",
        '{"changes":{},"reason":"' + "a" * MEGABYTE + '"}',
    ],
    ids=lambda text: text[:12],
)
def test_a_megabyte_of_anything_takes_a_moment(text: str) -> None:
    started = time.process_time()
    result = outcome(text)
    assert not isinstance(result, str) or len(result) < 1000
    # Linear: about half a second at most. Quadratic would be hours.
    assert time.process_time() - started < 20


def test_an_answer_behind_a_megabyte_of_prose_is_found() -> None:
    assert read_answer('so "it { goes } on\n' * 50_000 + GOOD) == ANSWER


# --- any text


def _json_values() -> st.SearchStrategy[Any]:
    names = st.sampled_from([*SPACE.names, "changes", "reason", "predicted_joules_per_token"]) | st.text(max_size=5)
    leaves = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.integers(0, 20)
        | st.floats()
        | st.text(max_size=8)
        | st.sampled_from(["f16", "q8_0", "auto"])
    )
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5))


def _answers() -> st.SearchStrategy[dict[str, Any]]:
    legal: dict[str, st.SearchStrategy[Any]] = {
        "threads": st.integers(1, 16),
        "n_batch": st.integers(32, 2048),
        "clock": st.floats(0.5, 1.0),
        "type_k": st.sampled_from(["f16", "q8_0"]),
        "flash": st.booleans(),
        "mode": st.sampled_from(["auto", 1, 0.5, True]),
    }
    optional = {name: values | st.none() for name, values in legal.items()}
    return st.fixed_dictionaries(
        {
            "reason": st.text(max_size=30),
            "predicted_joules_per_token": st.none() | st.floats(1e-6, 1e6),
            "changes": st.fixed_dictionaries({}, optional=optional),
        }
    )


FRAGMENTS = [
    *("{", "}", "[", "]", '"', "'", "\\", ",", ":", "//", "#", "\n", "```", "```json\n", "</think>"),
    *("None", "True", "NaN", "-Infinity", "1e999", "0.5", "4", "null", "\x1b", "\x00", "\ud800", "\u2028", "é"),
    *('"changes"', '"reason"', '"threads"', '"changes": {', GOOD),
]


def check_that_it_is_refused_or_legal(text: str) -> None:
    result = outcome(text)
    if isinstance(result, str):
        assert result.isprintable()
        return
    answer, config = result
    assert SPACE.check(config) == config
    assert answer.predicted_joules_per_unit is None or answer.predicted_joules_per_unit > 0
    answer.reason.encode("utf-8")
    assert not set(answer.reason) & {"\x1b", "\x00", "\r", "\x9b"}


@patiently
@given(st.text())
def test_any_text_is_refused_or_a_legal_configuration(text: str) -> None:
    check_that_it_is_refused_or_legal(text)


@patiently
@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=40).map("".join))
@example('{"changes": {"mode": 1.0}}')
@example('{"changes": {"threads": 1e300}}')
def test_any_broken_json_is_refused_or_a_legal_configuration(text: str) -> None:
    check_that_it_is_refused_or_legal(text)


@patiently
@given(_json_values(), st.booleans())
def test_any_json_is_refused_or_a_legal_configuration(value: Any, ascii_only: bool) -> None:
    check_that_it_is_refused_or_legal(json.dumps({"changes": value}, ensure_ascii=ascii_only))
    check_that_it_is_refused_or_legal(json.dumps(value, ensure_ascii=ascii_only))


@patiently
@given(_answers(), st.data())
def test_a_good_answer_with_a_random_cut_or_insertion_is_refused_or_legal(value: Any, data: st.DataObject) -> None:
    text = json.dumps(value)
    at, to = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=2)))
    check_that_it_is_refused_or_legal(text[:at] + data.draw(st.sampled_from(FRAGMENTS) | st.just("")) + text[to:])


@patiently
@given(_answers(), st.sampled_from(["{}", "Sure: {}.", "```json\n{}\n```", 'a "quoted {{x}}" word\n{}']), st.booleans())
def test_a_good_answer_comes_out_as_it_was_meant(value: Any, wrapping: str, indented: bool) -> None:
    text = wrapping.replace("{}", json.dumps(value, indent=2 if indented else None))
    answer = read_answer(text)
    assert answer.changes == {name: new for name, new in value["changes"].items() if new is not None}
    assert answer.predicted_joules_per_unit == value["predicted_joules_per_token"]
    if value["reason"].isprintable():
        assert answer.reason == value["reason"].strip()


# --- the schema


def objects_in(schema: Any) -> typing.Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for inner in schema.values():
            yield from objects_in(inner)


def test_every_object_of_the_schema_is_closed_and_requires_all_it_names() -> None:
    # OpenAI's strict mode, and Anthropic's structured outputs.
    objects = list(objects_in(answer_schema(SPACE)))
    assert len(objects) == 2
    for schema in objects:
        assert schema["additionalProperties"] is False
        assert schema["required"] == list(schema["properties"])


def test_the_schema_uses_only_the_keywords_that_both_providers_take() -> None:
    allowed = {"type", "properties", "required", "additionalProperties", "description", "enum", "anyOf"}

    def keywords(schema: Any) -> set[str]:
        found = set(schema) - {"properties"}
        for inner in [*schema.get("properties", {}).values(), *schema.get("anyOf", [])]:
            found |= keywords(inner)
        return found

    assert keywords(answer_schema(SPACE)) <= allowed


def test_the_anthropic_sdk_would_change_nothing_in_the_schema_but_types_beside_an_enum() -> None:
    from anthropic import transform_schema

    def without_types_of_enums(schema: Any) -> Any:
        if isinstance(schema, dict):
            return {k: without_types_of_enums(v) for k, v in schema.items() if not (k == "type" and "enum" in schema)}
        return [without_types_of_enums(v) for v in schema] if isinstance(schema, list) else schema

    space = SearchSpace(tuple(p for p in SPACE.parameters if isinstance(p, Choice)))
    changes = answer_schema(space)["properties"]["changes"]  # type: ignore[index] # a schema is nested
    assert transform_schema(changes) == without_types_of_enums(changes)


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("threads", {"type": ["integer", "null"]}),
        ("clock", {"type": ["number", "null"]}),
        ("type_k", {"type": ["string", "null"], "enum": ["f16", "q8_0", None]}),
        ("flash", {"type": ["boolean", "null"], "enum": [False, True, None]}),
        (
            "mode",
            {
                "anyOf": [
                    {"type": "string", "enum": ["auto"]},
                    {"type": "integer", "enum": [1]},
                    {"type": "number", "enum": [0.5]},
                    {"type": "boolean", "enum": [True]},
                    {"type": "null"},
                ]
            },
        ),
    ],
)
def test_each_kind_of_parameter_has_its_type_and_may_be_null(name: str, schema: dict[str, object]) -> None:
    changes: Any = answer_schema(SPACE)["properties"]
    own = changes["changes"]["properties"][name]
    assert {k: v for k, v in own.items() if k != "description"} == schema


def test_a_property_tells_meaning_range_and_default() -> None:
    changes: Any = answer_schema(SPACE)["properties"]
    own = changes["changes"]["properties"]["threads"]
    assert own["description"] == "Threads of the engine. Range: 1..16. null keeps the default, 4."


def test_a_pinned_parameter_is_not_asked_for() -> None:
    changes: Any = answer_schema(SPACE)["properties"]
    assert "split" not in changes["changes"]["properties"]


@pytest.mark.parametrize("unit", typing.get_args(Unit))
def test_form_and_schema_name_the_same_keys_in_the_same_order(unit: Unit) -> None:
    form = answer_form(unit).replace("NUMBER or null", "null").replace("VALUE, ...", "1")
    assert list(json.loads(form)) == list(answer_schema(SPACE, unit)["properties"])  # type: ignore[call-overload] # a schema is nested


def test_an_answer_that_fits_the_schema_is_read() -> None:
    changes = dict.fromkeys(("threads", "n_batch", "clock", "type_k", "flash", "mode"))
    answer = {"reason": "r", "predicted_joules_per_token": None, "changes": {**changes, "threads": 3}}
    assert proposed(json.dumps(answer)) == {**SPACE.default(), "threads": 3}
