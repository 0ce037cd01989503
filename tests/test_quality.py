"""The likelihood of fixed tokens against the default's: what is judged, what is kept, and what counts as broken."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.quality import LEAST_TEXT_TOKENS, ROWS, TEXT, TOKENS, Passage, drawn, judge, of_text

PASSAGE = Passage(source="a test", rows=[[1, 2, 3, 4], [5, 6, 7, 8]], context=1)


def flat(nats):
    return lambda passage: [nats] * sum(map(len, passage.judged))


def never():
    pytest.fail("asked again")


@pytest.fixture
def reference(tmp_path):
    return tmp_path / "reference"


def test_a_passage_is_what_is_given_and_what_is_judged():
    assert PASSAGE.openings == [[1], [5]]
    assert PASSAGE.judged == [[2, 3, 4], [6, 7, 8]]


@given(st.integers(LEAST_TEXT_TOKENS, 2000), st.integers(2, 200))
def test_a_text_becomes_rows_of_one_length_in_its_own_order(count, most):
    passage = of_text(range(count), most)
    (length,) = {len(row) for row in passage.rows}
    assert length == min(TOKENS, most, count)
    assert 1 <= len(passage.rows) <= ROWS
    assert [token for row in passage.rows for token in row] == list(range(length * len(passage.rows)))
    assert 1 <= passage.context < length


def test_a_text_of_too_few_tokens_is_none():
    assert of_text(range(LEAST_TEXT_TOKENS - 1)) is None


def test_the_fixed_text_fills_three_rows_with_the_coarsest_tokens_there_are():
    assert 3 * TOKENS <= len(TEXT.split()) <= ROWS * TOKENS


def test_what_the_default_says_follows_openings_that_the_seed_draws():
    asked = []

    def go_on(openings, count):
        asked.append((openings, count))
        return [[0] * count for _ in openings]

    first, again, other = (drawn(range(100, 200), seed, go_on) for seed in (1, 1, 2))
    assert first == again != other
    assert asked[0] == (first.openings, TOKENS - TOKENS // 4)
    assert all(100 <= token < 200 for opening in first.openings for token in opening)
    assert first.judged == [[0] * 72] * ROWS


def test_the_default_loses_nothing_and_the_others_what_they_are_above_it(reference):
    assert judge(reference, lambda: PASSAGE, flat(2.0)) == {"nll_nats_per_token": 2.0, "quality_loss": 0.0}
    assert judge(reference, never, flat(2.5)) == {"nll_nats_per_token": 2.5, "quality_loss": 0.5}
    assert judge(reference, never, flat(1.5))["quality_loss"] == -0.5


def test_all_configurations_are_judged_by_the_tokens_that_the_default_kept(reference):
    seen = []

    def nats(passage):
        seen.append(passage)
        return flat(1.0)(passage)

    judge(reference, lambda: PASSAGE, nats)
    judge(reference, never, nats)
    assert seen == [PASSAGE, PASSAGE]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 9999.0, 3.4e38])
def test_a_probability_of_nothing_is_broken_output_and_no_loss(reference, broken):
    with pytest.raises(RuntimeError, match="no finite number: the output is broken"):
        judge(reference, lambda: PASSAGE, lambda _: [1.0, 1.0, 1.0, 1.0, 1.0, broken])
    assert list(reference.parent.iterdir()) == []


@pytest.mark.parametrize("count", [0, 5, 7])
def test_every_token_is_judged_or_none(reference, count):
    with pytest.raises(RuntimeError, match=f"judged {count} tokens of the reference instead of 6"):
        judge(reference, lambda: PASSAGE, lambda _: [1.0] * count)


@pytest.mark.parametrize(
    "damage",
    ["", "{}", "[1]", "null", '{"rows": [[1, 2]], "context": 1}', '{"rows": 3, "context": 1}', '{"rows": [["x"]]}'],
)
def test_a_damaged_reference_is_one_sentence(reference, damage):
    reference.write_text(damage)
    with pytest.raises(RuntimeError, match=r"^the reference reference cannot be read"):
        judge(reference, never, flat(1.0))


def test_the_reference_says_what_it_is(reference):
    judge(reference, lambda: PASSAGE, flat(2.0))
    assert json.loads(reference.read_text()) == {
        "source": "a test",
        "context": 1,
        "nll_nats_per_token": 2.0,
        "rows": [[1, 2, 3, 4], [5, 6, 7, 8]],
    }
