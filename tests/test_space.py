import json
import math
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tuner.space import (
    Choice,
    Constraint,
    Float,
    Int,
    Parameter,
    Refused,
    SearchSpace,
    closest,
    excerpt,
    power_of_two,
    powers_of_two,
    show,
)

# --- strategies ------------------------------------------------------------------------------

units = st.floats(min_value=0, max_value=1, exclude_max=True)


@st.composite
def ints(draw, name="n"):
    log = draw(st.booleans())
    low = draw(st.integers(1 if log else -50, 50))
    high = draw(st.integers(low, low + 5000))
    return Int(name=name, meaning="m", default=draw(st.integers(low, high)), low=low, high=high, log=log)


@st.composite
def floats(draw, name="x"):
    log = draw(st.booleans())
    low = draw(st.floats(1e-3 if log else -1e3, 1e3))
    high = low + draw(st.sampled_from([0.0, 0.5, 1.0, 1e3]))
    return Float(name=name, meaning="m", default=low, low=low, high=high, log=log)


@st.composite
def choices(draw, name="c"):
    pool = ["f16", "q8_0", 0, 1, 2, 2.5, True, False]
    values = draw(
        st.lists(st.sampled_from(range(len(pool))), min_size=1, unique=True).map(lambda i: [pool[k] for k in i])
    )
    return Choice(name=name, meaning="m", default=values[0], values=tuple(values), ordered=draw(st.booleans()))


parameters = st.one_of(ints(), floats(), choices())
spaces = st.tuples(ints("n"), floats("x"), choices("c")).map(SearchSpace)
anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.lists(st.integers(), max_size=2)
)


def identical(a: object, b: object) -> bool:
    return type(a) is type(b) and a == b


def level(low=1, high=16, default=4, *, log=False, name="level") -> Int:
    return Int(name=name, meaning="A level.", default=default, low=low, high=high, log=log)


def kind(*values, default=None, ordered=False, name="kind") -> Choice:
    values = values or ("f16", "q8_0", "q4_0")
    return Choice(
        name=name, meaning="A kind.", default=values[0] if default is None else default, values=values, ordered=ordered
    )


def ratio(low=0.0, high=1.0, default=0.5, *, log=False) -> Float:
    return Float(name="ratio", meaning="A ratio.", default=default, low=low, high=high, log=log)


SPACE = SearchSpace(
    (level(name="ubatch"), level(name="batch"), kind(), kind(False, True, name="fast")),
    (Constraint("ubatch <= batch", lambda c: c["ubatch"] <= c["batch"]),),
)


def outcome(call):
    """What `call` returns, or the refusal that it raises."""
    try:
        return call()
    except Refused as refusal:
        return refusal


# --- points and values -----------------------------------------------------------------------


@given(parameters, units)
def test_every_point_has_a_legal_value(parameter: Parameter, u):
    value = parameter.at(u)
    assert identical(parameter.check(value), value)


@given(st.one_of(ints(), choices()), units)
def test_at_undoes_position_exactly(parameter: Parameter, u):
    value = parameter.at(u)
    assert 0 <= parameter.position(value) < 1
    assert identical(parameter.at(parameter.position(value)), value)


@given(floats(), units)
def test_at_undoes_position_of_a_real_number_to_rounding(parameter: Float, u):
    value = parameter.at(u)
    assert 0 <= parameter.position(value) < 1
    assert parameter.at(parameter.position(value)) == pytest.approx(value, rel=1e-9, abs=1e-9)


@given(parameters, units, units)
def test_a_larger_u_never_gives_a_smaller_position(parameter: Parameter, u, v):
    below, above = sorted((u, v))
    assert parameter.position(parameter.at(below)) <= parameter.position(parameter.at(above)) + 1e-12


@pytest.mark.parametrize("parameter", [level(1, 7, 1), level(-3, 3, 0), kind(*"abcdefg"), kind(1, 2, 3, 4, 5, 6, 7)])
def test_equal_cells_give_every_value_the_same_share(parameter):
    counts = Counter(parameter.at((i + 0.5) / 7000) for i in range(7000))
    assert set(counts.values()) == {1000}


def test_a_log_range_gives_equal_ratios_equal_shares():
    parameter = level(1, 63, 1, log=True)
    octaves = Counter(int(math.log2(parameter.at((i + 0.5) / 6000))) for i in range(6000))
    assert octaves == dict.fromkeys(range(6), 1000)


@pytest.mark.parametrize("parameter", [level(3, 9, 3), level(3, 9, 3, log=True), kind("a", "b", "c")])
def test_both_ends_are_reached(parameter):
    first, last = parameter.at(0.0), parameter.at(math.nextafter(1.0, 0.0))
    assert (first, last) == ((3, 9) if isinstance(parameter, Int) else ("a", "c"))


def test_a_range_of_one_value_has_a_position_inside():
    assert ratio(0.5, 0.5).position(0.5) == 0.5
    assert ratio(0.5, 0.5).size == 1
    assert 0 < level(4, 4).position(4) < 1
    assert 0 < level(4, 4, log=True).position(4) < 1


def test_a_point_has_one_number_for_each_free_parameter():
    space = SearchSpace((level(name="a"), kind("only", name="b"), level(name="c")))
    assert space.at([0.0, 0.99]) == {"a": 1, "b": "only", "c": 16}
    assert [p.name for p in space.free] == ["a", "c"]


@given(spaces, st.lists(units, min_size=3, max_size=3))
def test_a_spaces_at_undoes_its_position(space: SearchSpace, point):
    config = space.at(point[: len(space.free)])
    again = space.at(space.position(config))
    assert identical(again["n"], config["n"])
    assert identical(again["c"], config["c"])
    assert space.check(config) == config


def test_at_leaves_constraints_to_whoever_asks():
    config = SPACE.at([0.99, 0.0, 0.0, 0.0])
    assert SPACE.broken(config) == ["broken constraint: ubatch <= batch"]


# --- check -----------------------------------------------------------------------------------


@given(parameters, anything)
def test_check_never_moves_a_value(parameter: Parameter, value):
    result = outcome(lambda: parameter.check(value))
    if isinstance(result, Refused):
        assert str(result).startswith(f"{parameter.name}=")
        assert parameter.expected in str(result)
    else:
        assert result == value
        assert isinstance(result, bool) == isinstance(value, bool)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        (level(), True),
        (level(), 4.5),
        (level(), "4"),
        (level(), 0),
        (level(), 17),
        (level(), None),
        (level(), math.nan),
        (level(), math.inf),
        (level(), [4]),
        (ratio(), True),
        (ratio(), "0.5"),
        (ratio(), math.nan),
        (ratio(), math.inf),
        (ratio(), -0.001),
        (ratio(), 10**400),
        (kind(False, True), 1),
        (kind(False, True), 0),
        (kind(False, True), "true"),
        (kind(0, 1, 2), True),
        (kind(), "F16"),
        (kind(), ["f16"]),
    ],
)
def test_what_is_not_a_value_is_refused(parameter, value):
    with pytest.raises(Refused, match=f"{parameter.name}=.*expected"):
        parameter.check(value)


@pytest.mark.parametrize(
    ("parameter", "value", "own"),
    [
        (level(), 4.0, 4),
        (ratio(), 1, 1.0),
        (kind(1, 2), 1.0, 1),
        (kind(True, 1), 1, 1),
        (kind(1, True), True, True),
    ],
)
def test_a_number_is_taken_in_the_parameters_own_type(parameter, value, own):
    assert identical(parameter.check(value), own)


def test_every_fault_is_named_at_once():
    with pytest.raises(Refused) as refusal:
        SPACE.check({"ubatch": 99, "kid": "f16", "kind": "f64", "fast": 1})
    assert str(refusal.value) == (
        '"kid": no such parameter; did you mean kind?; ubatch=99: expected an integer from 1 to 16; batch: missing; '
        'kind="f64": expected one of f16, q8_0, q4_0; fast=1: expected one of false, true'
    )


def test_broken_constraints_are_named_once_the_values_are_legal():
    space = SearchSpace(SPACE.parameters, (*SPACE.constraints, Constraint("never", lambda _: False)))
    with pytest.raises(Refused, match="broken constraint: ubatch <= batch; broken constraint: never"):
        space.check({**space.default(), "ubatch": 5})


def test_a_checked_config_is_in_the_order_of_the_space():
    shuffled = dict(reversed(SPACE.default().items()))
    assert list(SPACE.check(shuffled)) == list(SPACE.names)


@given(spaces, st.dictionaries(st.sampled_from(["n", "x", "c", "m", ""]), anything))
def test_check_answers_or_refuses_whatever_it_is_given(space: SearchSpace, config):
    result = outcome(lambda: space.check(config))
    if isinstance(result, Refused):
        assert str(result)
    else:
        assert result == {name: config[name] for name in space.names}


def test_a_flood_in_an_answer_is_cut():
    with pytest.raises(Refused) as refusal:
        SPACE.check({**SPACE.default(), "kind": "x" * 10**6, "\x1b[2J" + "y" * 10**6: 1})
    assert len(str(refusal.value)) < 400
    assert "\x1b" not in str(refusal.value)


def test_complete_fills_in_the_defaults_and_checks():
    assert SPACE.complete({"batch": 8}) == {**SPACE.default(), "batch": 8}
    with pytest.raises(Refused, match="broken constraint"):
        SPACE.complete({"batch": 1})


# --- what a person types ---------------------------------------------------------------------


@given(st.one_of(ints(), choices()), units)
def test_a_shown_value_is_read_back(parameter: Parameter, u):
    value = parameter.at(u)
    # `true` and `1` differ as texts, and so do all values of a choice.
    assert identical(parameter.parse(show(value)), value)


@given(parameters, st.text(max_size=20))
def test_parse_answers_or_refuses_whatever_is_typed(parameter: Parameter, text):
    result = outcome(lambda: parameter.parse(text))
    if isinstance(result, Refused):
        assert parameter.expected in str(result)
    else:
        assert identical(parameter.check(result), result)


@pytest.mark.parametrize(
    ("parameter", "text"),
    [(level(), "17"), (level(), "4.0"), (level(), ""), (level(), "9" * 5000), (ratio(), "nan"), (kind(), "q8")],
)
def test_what_was_typed_wrongly_is_refused(parameter, text):
    with pytest.raises(Refused, match="expected"):
        parameter.parse(text)


@pytest.mark.parametrize(
    ("parameter", "text", "span", "default"),
    [
        (level(), "2..8", "2..8", 4),
        (level(), "8..8", "8..8", 8),
        (level(), "1..2", "1..2", 2),
        (ratio(), "0.6..0.9", "0.6..0.9", 0.6),
        (kind(), "q8_0,q4_0", "q8_0, q4_0", "q8_0"),
        (kind(), "q4_0, f16", "f16, q4_0", "f16"),
        (kind(32, 64, 128, 256, default=256, ordered=True), "64..128", "64, 128", 128),
        (kind(32, 64, 128, ordered=True), "128", "128", 128),
    ],
)
def test_narrowing_keeps_a_part_and_the_nearest_default(parameter, text, span, default):
    narrow = parameter.narrow(text)
    assert (narrow.range, narrow.default) == (span, default)


@pytest.mark.parametrize(
    ("parameter", "text", "words"),
    [
        (level(), "8", "expected LOW..HIGH within 1..16"),
        (level(), "0..4", "expected an integer from 1 to 16"),
        (level(), "8..4", "the low end is above the high end"),
        (level(), "..", "expected an integer"),
        (kind(), "f16..q4_0", "expected one of"),
        (kind(), "f64", "expected one of f16, q8_0, q4_0"),
        (kind(1, 2, 3, ordered=True), "3..1", "the low end comes after the high end"),
    ],
)
def test_a_range_that_cannot_be_is_refused(parameter, text, words):
    with pytest.raises(Refused, match=words.replace(".", r"\.")):
        parameter.narrow(text)


def test_narrowing_changes_one_parameter_and_leaves_the_space_alone():
    narrow = SPACE.narrow("batch", "4..8")
    assert narrow["batch"].range == "4..8"
    assert SPACE["batch"].range == "1..16"
    assert narrow.constraints == SPACE.constraints


def test_a_pinned_parameter_keeps_one_value_and_is_no_longer_free():
    space = SPACE.pin("batch", "8")
    assert space.default()["batch"] == 8
    assert [p.name for p in space.free] == ["ubatch", "kind", "fast"]
    with pytest.raises(Refused, match=r"batch=4: expected 8 \(it is pinned\)"):
        space.check({**space.default(), "batch": 4})


def test_a_frozen_parameter_keeps_its_default():
    assert SPACE.freeze("kind")["kind"].range == "f16"


def test_a_forbidden_value_is_a_broken_constraint_even_when_it_is_the_default():
    space = SPACE.forbid("kind", "f16")
    assert space.broken(space.default()) == ["broken constraint: kind is not f16 (forbidden by the person)"]
    assert space.check({**space.default(), "kind": "q8_0"})
    assert SPACE.broken(SPACE.default()) == []


@pytest.mark.parametrize(
    "change", [lambda: SPACE.pin("kid", "1"), lambda: SPACE.narrow("kid", "1"), lambda: SPACE["kid"]]
)
def test_an_unknown_parameter_is_refused_with_the_closest_name(change):
    with pytest.raises(Refused, match=r'unknown parameter "kid"; did you mean kind\? \(the parameters are ubatch'):
        change()


# --- neighbours, sizes, keys -----------------------------------------------------------------


@given(parameters, units)
def test_neighbours_are_other_legal_values(parameter: Parameter, u):
    value = parameter.at(u)
    assume(not isinstance(parameter, Float) or parameter.high - parameter.low > 1e-6)
    for other in parameter.neighbours(value):
        assert identical(parameter.check(other), other)
        assert not identical(other, value)


@pytest.mark.parametrize(
    ("parameter", "value", "others"),
    [
        (level(1, 16), 4, {3, 5, 2, 8}),
        (level(1, 16), 16, {15, 8}),
        (level(1, 16), 1, {2}),
        (level(1, 32, log=True), 4, {2, 8}),
        (kind(1, 2, 3, 4, ordered=True), 2, {1, 3}),
        (kind("a", "b", "c"), "b", {"a", "c"}),
        (kind(False, True), True, {False}),
    ],
)
def test_neighbours_are_one_natural_step_away(parameter, value, others):
    assert set(parameter.neighbours(value)) == others


@pytest.mark.parametrize(
    ("space", "size"),
    [
        (SearchSpace(()), 1),
        (SearchSpace((level(), kind())), 48),
        (SearchSpace((level(), ratio())), math.inf),
        (SearchSpace((level(), ratio(0.5, 0.5))), 16),
    ],
)
def test_the_size_counts_combinations(space, size):
    assert space.size == size


def test_a_key_tells_true_from_one_and_ignores_the_order():
    space = SearchSpace((kind(1, True, name="a"), kind(0, 1, name="b")))
    assert space.key({"a": 1, "b": 1}) == space.key({"b": 1, "a": 1})
    assert space.key({"a": 1, "b": 1}) != space.key({"a": True, "b": 1})


def test_changes_are_what_differs_from_the_default():
    assert SPACE.changes({**SPACE.default(), "batch": 8, "fast": True}) == {"batch": 8, "fast": True}


def test_the_record_of_a_space_is_plain_json_and_tells_spaces_apart():
    assert json.loads(json.dumps(SPACE.record())) == SPACE.record()
    assert SPACE.record() != SPACE.narrow("batch", "4..8").record()


# --- what cannot be built --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: level(5, 4), "expected finite low <= high"),
        (lambda: ratio(0.0, math.inf), "expected finite low <= high"),
        (lambda: ratio(math.nan, 1.0), "expected finite low <= high"),
        (lambda: level(0, 4, log=True), "a log range starts above 0"),
        (lambda: Choice(name="kind", meaning="m", default="a", values=()), "at least one value"),
        (lambda: SearchSpace((level(), level())), "names each parameter once"),
    ],
)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(Refused, match=words):
        make()


# --- words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"), [(True, "true"), (False, "false"), (4, "4"), (0.5, "0.5"), ("q8_0", "q8_0"), (None, "-")]
)
def test_values_are_shown_as_a_person_types_them(value, text):
    assert show(value) == text


def test_an_excerpt_is_quoted_and_short():
    assert excerpt('a"b') == r'"a\"b"'
    assert len(excerpt("x" * 10**6)) == 60
    assert excerpt("\x1b[31mred") == r'"\u001b[31mred"'
    assert excerpt({1, 2}) == '"{1, 2}"'


def test_only_a_similar_name_is_suggested():
    assert closest("thread", ["threads", "parallel"]) == "; did you mean threads?"
    assert closest("zebra", ["threads", "parallel"]) == ""


@given(low=st.integers(1, 5000), high=st.integers(1, 5000))
def test_powers_of_two_are_all_those_between_two_numbers(low, high):
    assert powers_of_two(low, high) == tuple(2**n for n in range(20) if low <= 2**n <= high)


@given(st.integers(1, 10**6))
def test_a_power_of_two_is_the_smallest_that_is_enough(least):
    found = power_of_two(least)
    assert found >= least > found // 2
