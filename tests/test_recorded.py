"""The comparisons that are shipped hold together: results follow from runs, and runs from stored answers."""

import csv
import io
import re
from pathlib import Path

import pytest

from tuner.calls import read_calls
from tuner.compare import read_question, read_runs
from tuner.outcome import Outcome, parse_targets
from tuner.summary import joules_text

RECORDED = Path(__file__).parents[1] / "results" / "recorded"
CHAT = RECORDED / "chat"
TEMPLATES = ("enhanced", "baseline")


def cells(text):
    """The rows of a CSV, numbers as numbers."""

    def read(cell):
        try:
            return float(cell)
        except ValueError:
            return cell

    return [[read(cell) for cell in row] for row in csv.reader(io.StringIO(text))]


@pytest.mark.parametrize("name", ["chat", "chat-twins", "live-llama"])
def test_the_results_of_a_shipped_comparison_follow_from_its_runs(name):
    asked, runs = read_question(RECORDED / name), read_runs(RECORDED / name)
    outcome = Outcome.of(
        asked.name, asked.problems, runs.values(), parse_targets(None, None), expected=len(runs), asked=asked
    )
    shipped, again = cells((RECORDED / name / "results.csv").read_text()), cells(outcome.to_csv())
    assert [[c for c in row if isinstance(c, str)] for row in again] == [
        [c for c in row if isinstance(c, str)] for row in shipped
    ]
    # The last digits of a mean are the machine's.
    numbers = [[c for row in rows for c in row if isinstance(c, float)] for rows in (again, shipped)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-6, abs=1e-12)


def test_every_problem_with_a_limit_was_put_to_the_chat_model_three_times_with_each_template():
    asked, runs = read_question(CHAT), read_runs(CHAT)
    limited = {p.name for p in asked.problems if p.limits}
    assert len(limited) == 8
    for problem in limited:
        for template in TEMPLATES:
            assert [s for s in range(9) if (run := runs.get((problem, template, s))) and run.complete] == [0, 1, 2]


def test_every_proposal_of_the_chat_model_stands_in_an_answer_that_was_kept():
    calls = read_calls(CHAT).values()
    for (problem, method, seed), run in read_runs(CHAT).items():
        if method in TEMPLATES:
            mine = [c for c in calls if (c.problem, c.method, c.seed) == (problem, method, seed)]
            assert len(mine) == run.prompts
            assert len(mine) >= len(run.steps) - 1
            assert {c.reply.model for c in mine} == {run.llm}


def test_the_first_prompt_names_no_energy_but_the_defaults_and_its_interval():
    default = {p.name: joules_text(p.default_joules_per_unit) for p in read_question(CHAT).problems}
    first = [c for c in read_calls(CHAT).values() if c.position == 0]
    assert first
    for call in first:
        energies = set(re.findall(r"\d[\d.]* [mkM]?J\b", call.prompt))
        assert len(energies) == 3
        assert default[call.problem] in energies
