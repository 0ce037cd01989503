"""The interactive command in a pseudo-terminal, key by key."""

import json
import os
import sys
from pathlib import Path

import pexpect
import pytest

from tuner.journal import read

ENGINE = Path(__file__).parent / "fakes" / "engine.py"
LOAD = ["--workload", str(ENGINE), "--windows", "1", "--window", "0.01s", "--prompts", "2", "--output-tokens", "2"]
QUICK = [*LOAD, "--fast", "--warm-up", "0.01s..0.1s", "--most-others", "1"]
ASK = r"\[s\]top \[\?\] >"


@pytest.fixture
def tune(tmp_path):
    started = []

    def start(*arguments, trials=3, columns=100):
        environment = {
            k: v
            for k, v in os.environ.items()
            if k not in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "TUNE_LLM", "NO_COLOR", "COLUMNS", "LINES")
        }
        process = pexpect.spawn(
            sys.executable,
            [
                "-m",
                "tuner.cli",
                "run",
                *QUICK,
                "--trials",
                str(trials),
                "--confirm-pairs",
                "0",
                "--name",
                "s",
                *arguments,
            ],
            cwd=tmp_path,
            env={**environment, "TERM": "xterm-256color"},
            encoding="utf-8",
            timeout=30,
            dimensions=(40, columns),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.close(force=True)


@pytest.fixture
def study(tmp_path):
    return lambda: read(tmp_path / "results" / "s")


def finish(process):
    process.expect(pexpect.EOF)
    process.close()
    return process.exitstatus


def answer(**changes):
    return json.dumps({"reason": "a \x1b[31mred\x1b[0m hunch", "predicted_joules_per_token": 0.01, "changes": changes})


def test_accepting_runs_what_was_proposed(tune, study):
    tuned = tune("--proposer", "sobol")
    for _ in range(2):
        tuned.expect(ASK)
        tuned.sendline("a")
    assert finish(tuned) == 0
    assert [t.proposal.source for t in study().history.trials] == ["default", "sobol", "sobol"]
    assert [d.action for d in study().history.decisions] == ["accept", "accept"]


def test_the_default_is_run_without_asking_and_each_proposal_shows_what_changes(tune, study):
    tuned = tune("--proposer", "rules")
    tuned.expect("trial 1, proposed by rules")
    tuned.expect("default.*best so far.*proposed")
    tuned.expect("costs")
    tuned.expect(ASK)
    assert len(study().history) == 1
    tuned.sendline("s")
    assert finish(tuned) == 0
    assert study().ends[-1].reason == "stopped by the person"


def test_an_edit_is_checked_and_runs_as_the_persons_own(tune, study):
    tuned = tune("--proposer", "sobol", trials=2)
    tuned.expect(ASK)
    tuned.sendline("e cost=99")
    tuned.expect("expected an integer from 1 to 64")
    tuned.expect("change >")
    tuned.sendline("cost=9 batch=3")
    tuned.expect("change >")
    tuned.sendline("")
    assert finish(tuned) == 0
    edited = study().history.trials[1]
    assert (edited.config["cost"], edited.config["batch"]) == (9, 3)
    assert (edited.proposal.source, edited.proposal.in_place_of) == ("human", "sobol")


def test_a_rejected_proposal_is_not_run_and_another_one_comes(tune, study):
    tuned = tune("--proposer", "sobol", trials=2)
    tuned.expect(ASK)
    tuned.sendline("r too bold")
    tuned.expect(ASK)
    tuned.sendline("a")
    assert finish(tuned) == 0
    rejected = study().history.decisions[0]
    assert (rejected.action, rejected.remark) == ("reject", "too bold")
    assert study().history.trials[1].config != rejected.proposal.config


def test_a_forbidden_value_never_comes_again(tune, study):
    tuned = tune("--proposer", "sobol", "--range", "batch=1..2", trials=4)
    tuned.expect(ASK)
    tuned.sendline("f batch=2")
    for _ in range(3):
        tuned.expect(ASK)
        tuned.sendline("a")
    assert finish(tuned) == 0
    assert {t.config["batch"] for t in study().history.trials[1:]} == {1}


def test_batch_asks_no_more(tune, study):
    tuned = tune("--proposer", "sobol", trials=4)
    tuned.expect(ASK)
    tuned.sendline("b")
    assert finish(tuned) == 0
    assert len(study().history) == 4


def test_a_wrong_key_and_a_question_mark_explain_the_keys(tune):
    tuned = tune("--proposer", "sobol")
    tuned.expect(ASK)
    tuned.sendline("x")
    tuned.expect("no such key")
    tuned.expect(ASK)
    tuned.sendline("?")
    tuned.expect("forbid")
    tuned.expect(ASK)
    tuned.sendline("s")
    assert finish(tuned) == 0


def test_ctrl_c_at_the_question_leaves_at_once_and_says_how_to_go_on(tune, study):
    tuned = tune("--proposer", "sobol")
    tuned.expect(ASK)
    tuned.sendintr()
    tuned.expect("tune run --resume results/s")
    assert finish(tuned) == 130
    assert len(study().history) == 1


def test_the_end_of_the_input_stops_the_study(tune, study):
    tuned = tune("--proposer", "sobol")
    tuned.expect(ASK)
    tuned.sendeof()
    assert finish(tuned) == 0
    assert study().history.decisions[-1].action == "stop"


def test_without_an_llm_the_person_is_offered_paste_or_rules(tune, study):
    tuned = tune(trials=2)
    tuned.expect(r"\[p\]aste or \[r\]ules >")
    tuned.sendline("r")
    tuned.expect(ASK)
    tuned.sendline("a")
    assert finish(tuned) == 0
    assert study().header.proposer == "rules"


def test_a_pasted_answer_is_a_proposal_whose_prompt_was_shown_and_copied(tune, study):
    tuned = tune("--llm", "paste", "--template", "enhanced", trials=2)
    tuned.expect("You tune the runtime configuration")
    tuned.expect(r"\x1b\]52;c;")
    tuned.expect("a line that holds only")
    tuned.sendline("Sure! Here it is:")
    tuned.sendline(answer(cost=10))
    tuned.sendline(".")
    tuned.expect("trial 1, proposed by llm")
    tuned.expect(ASK)
    tuned.sendline("a")
    assert finish(tuned) == 0
    trial = study().history.trials[1]
    assert trial.config["cost"] == 10
    assert trial.proposal.exchanges[0].reply.model == "paste"


def test_control_characters_in_an_answer_do_not_reach_the_terminal(tune):
    tuned = tune("--llm", "paste", trials=2)
    tuned.expect("a line that holds only")
    tuned.setecho(False)
    tuned.sendline(json.dumps({"reason": "\x1b]0;owned\x07\x1b[2J hunch", "changes": {"cost": 10}}))
    tuned.sendline(".")
    tuned.expect("proposed by llm")
    tuned.expect(ASK)
    assert "hunch" in tuned.before
    assert "\x1b]0;owned" not in tuned.before
    assert "\x1b[2J" not in tuned.before
    tuned.sendline("s")
    assert finish(tuned) == 0


def test_a_remark_goes_word_for_word_into_the_next_prompt(tune, study):
    tuned = tune("--llm", "paste", trials=3)
    tuned.expect("a line that holds only")
    tuned.sendline(answer(cost=10))
    tuned.sendline(".")
    tuned.expect(ASK)
    tuned.sendline("m keep `batch` small")
    tuned.expect(ASK)
    tuned.sendline("a")
    tuned.expect("keep `batch` small")
    tuned.expect("a line that holds only")
    tuned.sendline(answer(cost=11))
    tuned.sendline(".")
    tuned.expect(ASK)
    tuned.sendline("a")
    assert finish(tuned) == 0
    assert "keep `batch` small" in study().history.trials[2].proposal.exchanges[0].prompt


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_dialogue_fits_the_terminals_width(tune, columns):
    import re

    tuned = tune("--proposer", "rules", columns=columns)
    tuned.expect("proposed by rules")
    tuned.expect(ASK)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", tuned.before)
    # A carriage return alone goes back to the start of a line that is then written over.
    assert max(len(line.rstrip()) for line in re.split(r"\r\n|\r", plain) if "--" not in line) <= columns
    tuned.sendline("s")
    finish(tuned)
