"""Constraints as text: the grammar against Python's own reading, and faults that point at their column."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.expression import MOST_RULE_CHARACTERS, RuleFault, rule

KINDS = {"a": "number", "b": "number", "on": "truth", "kind": "text"}


def holds(text, **config):
    return rule(text, KINDS)({"a": 1, "b": 2, "on": True, "kind": "f16", **config})


def numbers(depth=3):
    leaf = st.sampled_from(["a", "b", "0", "3", "2.5", "1e2"])
    return st.recursive(
        leaf,
        lambda inner: (
            st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
            | st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"{t[0]} {t[1]} {t[2]}")
            | inner.map(lambda t: f"-({t})")
        ),
        max_leaves=6,
    )


COMPARISONS = st.tuples(numbers(), st.sampled_from(["<", "<=", "==", "!=", ">=", ">"]), numbers()).map(" ".join)
RULES = st.recursive(
    COMPARISONS | st.sampled_from(["on", "true", "false", "kind == 'f16'"]),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(" ".join)
        | inner.map(lambda t: f"not ({t})")
        | inner.map(lambda t: f"({t})")
    ),
    max_leaves=5,
)
"""What Python writes alike: its own reading of the same text is the expected value."""


def pythons(text, config):
    try:
        return bool(eval(text, {"true": True, "false": False}, config))  # noqa: S307 - our own text, made above
    except ArithmeticError:
        return False


@given(RULES, st.integers(-3, 9), st.integers(-3, 9), st.booleans())
def test_a_rule_means_what_python_reads_in_it(text, a, b, on):
    if len(text) > MOST_RULE_CHARACTERS:
        return
    config = {"a": a, "b": b, "on": on, "kind": "f16"}
    assert rule(text, KINDS)(config) == pythons(text, config)


@given(RULES, RULES, st.integers(-3, 9), st.integers(-3, 9))
def test_an_implication_is_broken_only_where_the_first_holds_and_the_second_does_not(left, right, a, b):
    text = f"({left}) -> ({right})"
    if len(text) > MOST_RULE_CHARACTERS or "/" in text:
        return
    config = {"a": a, "b": b, "on": True, "kind": "f16"}
    assert rule(text, KINDS)(config) == (not pythons(left, config) or pythons(right, config))


@given(st.text(alphabet="ab on()<>=!+-*/'\"1.e&|_x\n", max_size=40))
def test_any_text_is_a_rule_or_a_fault_with_a_column_inside_it(text):
    column = 1
    try:
        rule(text, KINDS)
    except RuleFault as fault:
        column = fault.column
    assert 1 <= column <= len(text) + 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 <= a <= b", True),
        ("1 < a <= b", False),
        ("a -> b -> a", None),
        ("on -> a == 1 -> b == 3", False),
        ("false -> false -> false", True),
        ("not on or on", True),
        ("a + b * 2 == 5", True),
        ("a - b - 1 == -2", True),
        ("b / b / 2 == 0.5", True),
        ("kind != 'f16' -> on", True),
        ("a / 0 == a / 0", False),
        ("on == true", True),
        ("--a == 1", True),
    ],
)
def test_precedence_and_grouping(text, expected):
    if expected is None:
        with pytest.raises(RuleFault):
            holds(text)
    else:
        assert holds(text) is expected


@pytest.mark.parametrize(
    ("text", "column", "sentence"),
    [
        ("", 1, "expected a parameter, a number, a 'text' or (, got the end"),
        ("a <", 4, "got the end"),
        ("a = 1", 3, '"=" means nothing here; equality is written =='),
        ("a <== 1", 5, '"=" means nothing here'),
        ("(a < 1", 7, "expected an operator or ), got the end"),
        ("a < 1)", 6, 'expected an operator or the end, got ")"'),
        ("aa < 1", 1, 'no parameter is called "aa"'),
        ("a + 1", 1, "expected true or false, got a number"),
        ("a and on", 1, "expected true or false, got a number"),
        ("on < on", 4, "< compares two numbers, got true or false and true or false"),
        ("kind == 1", 6, "== compares two values of one kind, got a text and a number"),
        ("a + on < 1", 5, "expected a number, got true or false"),
        ("kind == 'f16", 9, "a text ends with the quote that it begins with"),
        ("a < 1 and or", 11, 'got "or"'),
        ("a.b < 1", 2, '"." means nothing here'),
        ("__import__('os')", 1, "no parameter is called"),
        ("a ** 2 > 1", 4, 'got "*"'),
        ("(" * 60, 51, "expected at most 50 levels"),
        ("not " * 60 + "on", 201, "expected at most 50 levels"),
        ("-" * 60 + "a > 1", 51, "expected at most 50 levels"),
        ("a < 1 or " * 100, 500, "expected at most 500 characters"),
    ],
)
def test_a_fault_of_a_rule_points_at_its_column(text, column, sentence):
    with pytest.raises(RuleFault) as raised:
        holds(text)
    assert raised.value.column == column
    assert sentence in str(raised.value)
