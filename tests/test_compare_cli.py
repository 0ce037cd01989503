"""`tune tables`, `tune compare` and `tune record` as a person types them; in a process where a claim is about one."""

import contextlib
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pexpect
import psutil
import pytest
from commands import TUNE, in_a_process, settle_in
from commands import typed as tune
from fakes.providers import Provider, answer, failure

from tuner.calls import read_calls
from tuner.compare import read_question, read_runs
from tuner.journal import NAME as JOURNAL
from tuner.journal import read
from tuner.replay import Table

ENGINE = Path(__file__).parent / "fakes" / "engine.py"
LOAD = ["--windows", "2", "--window", "0.02s", "--prompts", "2", "--output-tokens", "2"]
QUICK = [*LOAD, "--warm-up", "0.01s..0.1s", "--most-others", "1"]
LIVE = ["--workload", ENGINE, *QUICK]

SMALL = "anl-1024-meta-llama-3-8b"
LIMITED = "zeus-a40-squad-bert-base-uncased"


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    settle_in(tmp_path, monkeypatch)


def compare(*arguments, name="c", **more):
    return tune("compare", *arguments, "--name", name, **more)


def runs(name="c"):
    found = read_runs(Path("results") / f"compare-{name}")
    return {key: replace(run, seconds=0.0, started_unix=0.0) for key, run in found.items()}


# --- tables ---


def test_tables_lists_every_problem_with_its_size_limits_and_licence():
    done = tune("tables")
    assert done.returncode == 0, done.stderr
    for words in (SMALL, LIMITED, "36 within the limits", "time_per_epoch<=1030.065", "Apache-2.0", "A40"):
        assert words in done.stdout


def test_one_table_is_shown_with_its_parameters_and_without_its_energies():
    done = tune("tables", LIMITED)
    assert done.returncode == 0
    for words in ("batch_size", "power_limit", "GPU power limit, W", "revision", f"tune compare --table {LIMITED}"):
        assert words in done.stdout
    best = Table.named(LIMITED).best.joules_per_unit
    assert f"{best:.0f}" not in done.stdout


def test_an_unknown_table_is_one_sentence_and_exit_code_2():
    done = in_a_process("tables", "zeus-a40-squad-bert-base")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"did you mean {LIMITED}?" in done.stderr


# --- comparing on tables ---


def test_a_comparison_says_who_needs_how_many_proposals_and_keeps_every_run():
    what = ["--table", f"{SMALL},{LIMITED}", "--methods", "rules,random", "--seeds", 6, "--trials", 8]
    done = in_a_process("compare", *what, "--name", "c")
    assert done.returncode == 0, done.stderr
    assert len(runs()) == 24
    for words in (
        SMALL,
        LIMITED,
        "over all 2 problems",
        "share",
        "median",
        "regret",
        "failed",
        "Within 5 % of the best:",
    ):
        assert words in done.stdout
    header = read_question(Path("results/compare-c"))
    assert (header.methods, header.seeds, header.trials) == (("rules", "random"), 6, 8)
    assert {"python", "optuna"} < set(header.versions)


def test_everything_goes_to_files_when_it_is_asked_for():
    files = [f"--{kind}={kind}.out" for kind in ("csv", "steps", "json", "html")]
    done = compare("--table", SMALL, "--methods", "sobol,grid", "--seeds", 2, "--trials", 3, *files)
    assert done.returncode == 0, done.stderr
    cells = list(csv.DictReader(io.StringIO(Path("csv.out").read_text())))
    assert {(row["method"], row["target"]) for row in cells} == {
        (m, f"within {t} % of the best") for m in ("sobol", "grid") for t in (5, 10)
    }
    assert len(list(csv.DictReader(io.StringIO(Path("steps.out").read_text())))) == 2 * 2 * 4
    everything = json.loads(Path("json.out").read_text())
    assert len(everything["runs"]) == 4
    assert everything["problems"][0]["name"] == SMALL
    page = Path("html.out").read_text()
    assert page.startswith("<!doctype html>")
    assert SMALL in page


def test_methods_can_be_compared_with_one_of_them_only():
    asked = ["--table", SMALL, "--methods", "rules,random,sobol", "--seeds", 6, "--trials", 4]
    done = compare(*asked, "--against", "random")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("Within")]
    assert len(said) == 4
    assert all("random" in line for line in said)


def test_a_file_on_standard_output_is_alone_there():
    what = ["--table", SMALL, "--methods", "random", "--seeds", 1, "--trials", 2]
    done = in_a_process("compare", *what, "--csv", "-")
    assert done.returncode == 0
    assert len(list(csv.DictReader(io.StringIO(done.stdout)))) == 2


def test_largest_is_left_out_without_a_limit_and_its_line_says_over_how_many_problems_it_is():
    done = compare("--table", f"{SMALL},{LIMITED}", "--methods", "largest,random", "--seeds", 1, "--trials", 3)
    assert done.returncode == 0, done.stderr
    assert f"largest is left out on {SMALL}" in done.stderr
    assert "largest (1)" in done.stdout


def test_the_twin_of_a_table_is_a_problem_beside_it():
    done = compare(
        "--table", LIMITED, "--methods", "random", "--seeds", 2, "--trials", 2, "--anonymise", "--noise", "3%"
    )
    assert done.returncode == 0, done.stderr
    assert len({problem for problem, _, _ in runs()}) == 2
    assert "replayed noise 3.0 %" in done.stdout


def started(*arguments):
    return subprocess.Popen(
        [*TUNE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)


MANY = ["--table", f"{SMALL},{LIMITED}", "--methods", "tpe,random", "--seeds", "20", "--trials", "15"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The runs of a comparison that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        assert compare(*MANY, name="whole").returncode == 0
        return runs("whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_comparison_that_is_stopped_goes_on_to_the_runs_of_the_uninterrupted_one(number, uninterrupted):
    process = started("compare", *MANY, "--name", "part")
    written = Path("results/compare-part/runs.jsonl")
    wait_for(lambda: written.exists() and written.stat().st_size)
    children = psutil.Process(process.pid).children(recursive=True)
    # A terminal sends Ctrl-C to the whole group.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert out == ""
    assert "Go on with `tune compare --resume results/compare-part`" in err
    assert "Traceback" not in err
    wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
    before = runs("part")
    assert 0 < len(before) < 80
    assert tune("compare", "--resume", "results/compare-part").returncode == 0
    assert runs("part") == uninterrupted
    assert before.items() <= uninterrupted.items()


def test_a_finished_comparison_is_shown_again_without_running_anything():
    compare("--table", LIMITED, "--methods", "random,grid", "--seeds", 2, "--trials", 3)
    written = Path("results/compare-c/runs.jsonl").read_bytes()
    done = tune("compare", "--resume", "results/compare-c", "--within", "50%")
    assert done.returncode == 0, done.stderr
    assert "50 %" in done.stdout
    assert Path("results/compare-c/runs.jsonl").read_bytes() == written


def test_a_killed_comparison_leaves_whole_lines_and_goes_on():
    what = ["--table", LIMITED, "--methods", "tpe", "--seeds", "30", "--trials", "15", "--name", "k"]
    process = started("compare", *what)
    written = Path("results/compare-k/runs.jsonl")
    wait_for(lambda: written.exists() and written.stat().st_size)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    with written.open("ab") as file:
        file.write(b'{"problem": "torn')
    assert tune("compare", "--resume", "results/compare-k").returncode == 0
    assert len(runs("k")) == 30


# --- bad input ---

TABLE = ["--table", SMALL]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "what is compared?"),
        (["--table", "nothing"], "unknown table"),
        ([*TABLE, "--methods", "tpo"], "did you mean tpe?"),
        ([*TABLE, "--seeds", "0"], "--seeds 0"),
        ([*TABLE, "--trials", "0"], "--trials 0"),
        ([*TABLE, "--workload", "llama"], "--table and --workload"),
        ([*TABLE, "results/a"], "STUDY and --table"),
        ([*TABLE, "--resume", "x"], "--table and --resume"),
        ([*TABLE, "--model", "x"], "a recorded table runs no engine"),
        (["--workload", "llama", "--anonymise"], "a live engine is measured"),
        (["--workload", "llama", "--methods", "largest"], "no limit"),
        (["--resume", "x", "--seeds", "3"], "goes on as it was begun"),
        (["--resume", "nowhere"], "no comparison here"),
        (["a", "b", "--seeds", "3"], "existing studies are what they are"),
        (["a"], "one study is no comparison"),
        (["a", "b"], "no study here"),
        ([*TABLE, "--within", "5"], "--within"),
        ([*TABLE, "--threshold", "0.001x"], "nobody can get to"),
        ([*TABLE, "--threshold", "1e-9J"], "nobody can get to"),
        ([*TABLE, "--threshold", "0.8"], "expected a ratio"),
        ([*TABLE, "--noise", "much"], "--noise"),
        ([*TABLE, "--noise", "500%"], "noise 5"),
        ([*TABLE, "--methods", "enhanced"], "which model?"),
        ([*TABLE, "--methods", "enhanced", "--base-url", "http://x/v1"], "name the model of that server too"),
        ([*TABLE, "--methods", "enhanced", "--llm", "openai:m"], "needs a key"),
        ([*TABLE, "--methods", "enhanced", "--llm", "paste"], "needs a person at a terminal"),
        ([*TABLE, "--llm", "openai:m"], "none of these methods asks a model"),
        ([*TABLE, "--methods", "enhanced", "--replay-llm", "nowhere"], "no comparison here"),
        ([*TABLE, "--name", "../x"], "--name"),
        ([*TABLE, "--llm-price", "dear"], "--llm-price"),
        ([*TABLE, "--against", "tpo"], "expected one of the methods compared: rules, sobol, random, tpe"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence_and_exit_code_2_and_leaves_nothing(arguments, words):
    done = tune("compare", *arguments)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not Path("results").exists()


def test_a_name_that_is_taken_is_refused_with_the_way_on():
    compare(*TABLE, "--methods", "random", "--seeds", 1, "--trials", 1)
    done = compare(*TABLE, "--methods", "random", "--seeds", 1, "--trials", 1)
    assert done.returncode == 2
    assert "tune compare --resume results/compare-c" in done.stderr


# --- with a model ---


def proposals(table=LIMITED, count=12):
    return [answer(json.dumps({"reason": "r", "changes": row.config})) for row in Table.named(table).rows[::5]][:count]


def talk(provider, *arguments, name="c", methods="enhanced", trials=5, **more):
    chat = ["--llm", "openai:m", "--base-url", provider.url]
    asked = ["--table", LIMITED, "--methods", methods, "--trials", trials, *chat]
    return compare(*asked, *arguments, name=name, **more)


def test_a_template_is_compared_beside_the_others_and_every_call_is_stored():
    with Provider(proposals()) as provider:
        done = talk(provider, "--seeds", 1, "--llm-price", "2,8/M", methods="enhanced,sobol")
        asked = len(provider.requests)
    assert done.returncode == 0, done.stderr
    run = runs()[LIMITED, "enhanced", 0]
    assert (run.prompts, run.llm, run.input_tokens, run.output_tokens) == (asked, "m-2026", 11 * asked, 7 * asked)
    assert len(read_calls(Path("results/compare-c"))) == asked
    assert "prompts" in done.stdout
    assert "cost of enhanced" in done.stdout
    header = read_question(Path("results/compare-c"))
    assert header.llm == "openai:m"
    assert header.started_unix > 0


def test_the_table_says_which_model_answered_and_when():
    with Provider(proposals()) as provider:
        done = talk(provider, "--seeds", 1, methods="enhanced")
    assert re.search(r"^enhanced: answered by \S+, \d{4}-\d\d-\d\d$", done.stdout, re.MULTILINE)


def test_stored_answers_make_identical_runs_with_the_server_off():
    with Provider(proposals()) as provider:
        assert talk(provider, "--seeds", 1, methods="enhanced").returncode == 0
    asked = ["--table", LIMITED, "--methods", "enhanced", "--trials", 5, "--seeds", 1]
    done = compare(*asked, "--replay-llm", "results/compare-c", name="again")
    assert done.returncode == 0, done.stderr
    assert runs("again") == runs("c")


def test_a_prompt_that_was_never_answered_is_missing_in_a_replay():
    with Provider(proposals()) as provider:
        talk(provider, "--seeds", 1, methods="enhanced")
    asked = ["--table", LIMITED, "--methods", "enhanced", "--trials", 9, "--seeds", 1]
    done = compare(*asked, "--replay-llm", "results/compare-c", name="again")
    assert done.returncode == 1
    assert "no stored answer fits this prompt" in done.stdout


def test_a_cap_on_prompts_is_kept_and_what_it_cuts_off_is_listed():
    with Provider(proposals()) as provider:
        done = talk(provider, "--seeds", 3, "--max-prompts", 4, methods="enhanced")
        assert len(provider.requests) == 4
    assert done.returncode == 1
    assert "cap of 4 prompts" in done.stdout
    assert "runs are missing or ended early" in done.stderr


def test_a_provider_that_fails_half_way_keeps_what_is_measured_and_a_resume_goes_on():
    script = proposals()
    with Provider([*script[:3], failure(401, "no such key")]) as provider:
        done = talk(provider, "--seeds", 1, methods="enhanced,random")
    assert done.returncode == 1
    part = runs()
    assert part[LIMITED, "random", 0].complete
    broken = part[LIMITED, "enhanced", 0]
    assert (len(broken.steps), broken.prompts) == (4, 3)
    assert "401" in broken.error
    assert "ended after 3 of 5 proposals" in done.stdout
    with Provider(script[3:]) as provider:
        # The address is part of what was asked; the server comes back at the same one.
        header = Path("results/compare-c/header.json")
        asked = json.loads(header.read_text())
        header.write_text(json.dumps({**asked, "base_url": provider.url}))
        done = tune("compare", "--resume", "results/compare-c")
        assert len(provider.requests) == 2
    assert done.returncode == 0, done.stderr
    assert runs()[LIMITED, "enhanced", 0].complete


def test_ctrl_c_does_not_wait_for_a_model_that_thinks():
    with Provider([*proposals()[:2], answer("{}", delay=600)]) as provider:
        chat = ["--llm", "openai:m", "--base-url", provider.url]
        process = started("compare", "--table", LIMITED, "--methods", "enhanced", "--seeds", "1", "--name", "c", *chat)
        wait_for(lambda: len(provider.requests) == 3)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "--resume" in err
    assert len(read_calls(Path("results/compare-c"))) == 2


def test_a_person_at_a_terminal_can_carry_the_prompts():
    arguments = ["compare", "--table", LIMITED, "--methods", "enhanced,random", "--seeds", "1", "--trials", "2"]
    process = pexpect.spawn(
        sys.executable,
        ["-m", "tuner.cli", *arguments, "--llm", "paste", "--name", "c"],
        env={**os.environ, "TERM": "xterm-256color"},
        encoding="utf-8",
        timeout=30,
        dimensions=(60, 100),
    )
    for batch_size in (48, 56):
        process.expect("end with a line that holds only")
        changes = {"batch_size": batch_size, "power_limit": 150}
        process.sendline(json.dumps({"reason": "r", "changes": changes}))
        process.sendline(".")
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 0
    run = runs()[LIMITED, "enhanced", 0]
    assert [step.config["batch_size"] for step in run.steps] == [32, 48, 56]
    assert (run.llm, run.prompts, run.input_tokens) == ("paste", 2, None)


# --- on a live engine ---


def live(*arguments, name="c"):
    return compare(*LIVE, *arguments, name=name)


def test_a_live_comparison_is_a_study_for_each_method_and_seed_in_a_latin_square():
    done = live("--methods", "rules,random", "--seeds", 2, "--trials", 2)
    assert done.returncode == 0, done.stderr
    folder = Path("results/compare-c/studies")
    order = sorted(folder.iterdir(), key=lambda f: read(f).history.trials[0].started_unix)
    assert [f.name for f in order] == ["rules-0", "random-0", "random-1", "rules-1"]
    assert all(len(read(f).history.trials) == 3 for f in order)
    assert {(r.method, r.seed, len(r.steps)) for r in runs().values()} == {
        (m, s, 3) for m in ("rules", "random") for s in (0, 1)
    }
    assert "nobody knows the best" in done.stdout


def test_a_live_comparison_that_is_stopped_goes_on_with_the_study_it_was_at():
    what = [*LIVE, "--methods", "rules,random", "--seeds", "2", "--trials", "3", "--name", "c"]
    process = started("compare", *what)
    second = Path("results/compare-c/studies/random-0") / JOURNAL
    wait_for(lambda: second.exists() and second.read_bytes().count(b'"kind":"trial"') >= 1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    done = tune("compare", "--resume", "results/compare-c")
    assert done.returncode == 0, done.stderr
    assert all(len(run.steps) == 4 and run.complete for run in runs().values())
    assert len(runs()) == 4


def test_templates_on_a_live_engine_keep_the_cap():
    changes = [answer(json.dumps({"changes": {"cost": n}})) for n in (10, 11, 12, 13)]
    with Provider(changes) as provider:
        chat = ["--llm", "openai:m", "--base-url", provider.url]
        done = live("--methods", "enhanced", "--seeds", 2, "--trials", 2, "--max-prompts", 3, *chat)
        assert len(provider.requests) == 3
    assert done.returncode == 1
    assert {s: r.error is None for (_, _, s), r in runs().items()} == {0: True, 1: False}


# --- studies that exist ---


def studied(name, *arguments, trials=3, load=QUICK):
    options = ["--workload", ENGINE, *load, "--fast", "--batch", "--trials", trials, "--name", name]
    done = tune("run", *options, *arguments)
    assert done.returncode == 0, done.stderr


def test_studies_that_somebody_ran_are_compared():
    studied("a", "--proposer", "rules")
    studied("b", "--proposer", "random", "--seed", 1)
    studied("c", "--proposer", "random", "--seed", 1)
    done = tune("compare", "results/a", "results/b", "results/c", "--json", "all.json")
    assert done.returncode == 0, done.stderr
    assert "results/c: counted as seed 2" in done.stderr
    found = json.loads(Path("all.json").read_text())["runs"]
    assert {(r["method"], r["seed"]) for r in found} == {("rules", 0), ("random", 1), ("random", 2)}
    assert "engine" in done.stdout


def test_a_study_that_was_not_finished_is_listed_and_compared_as_far_as_it_goes():
    studied("a", "--proposer", "rules")
    studied("b", "--proposer", "random")
    path = Path("results/b") / JOURNAL
    path.write_bytes(b"".join(line + b"\n" for line in path.read_bytes().split(b"\n")[:-2]))
    done = tune("compare", "results/a", "results/b")
    assert done.returncode == 1
    assert "it was not finished" in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"engine_version":"1"', b'"engine_version":"2"', ["identity engine_version", '"1"', '"2"']),
        (b'"meters":["estimate"]', b'"meters":["rapl"]', ["meter", '"estimate"', '"rapl"']),
        (b'"prompt_tokens":96', b'"prompt_tokens":128', ["load prompt tokens", "96", "128"]),
        (b'"range":"1..8"', b'"range":"1..4"', ["search space", "1..8", "1..4"]),
    ],
)
def test_studies_that_measured_different_things_are_refused_with_the_key_and_both_values(old, new, words):
    studied("a", "--proposer", "rules")
    Path("results/b").mkdir()
    content = (Path("results/a") / JOURNAL).read_bytes()
    assert old in content
    (Path("results/b") / JOURNAL).write_bytes(content.replace(old, new, 1))
    done = tune("compare", "results/a", "results/b")
    assert done.returncode == 2, done.stdout
    assert all(word.replace('"', '\\"') in done.stderr or word in done.stderr for word in words), done.stderr


def test_a_study_of_another_machine_is_refused():
    studied("a", "--proposer", "rules")
    Path("results/b").mkdir()
    content = (Path("results/a") / JOURNAL).read_text()
    cores = read(Path("results/a")).header.machine["cores_logical"]
    (Path("results/b") / JOURNAL).write_text(content.replace(f'"cores_logical":"{cores}"', '"cores_logical":"999"', 1))
    done = tune("compare", "results/a", "results/b")
    assert done.returncode == 2
    assert "machine cores_logical" in done.stderr
    assert "999" in done.stderr


# --- recording ---


def test_a_table_of_ones_own_machine_is_made_and_compared_on():
    done = tune("record", *LIVE, "--sample", "sobol:3", "--repeats", 2, "--name", "mine")
    assert done.returncode == 0, done.stderr
    assert "launch 6 of 6" in done.stderr
    assert "mine" in tune("tables").stdout
    done = compare("--table", "mine", "--methods", "random", "--seeds", 2, "--trials", 2, "--noise", "resample")
    assert done.returncode == 0, done.stderr
    assert len(runs()) == 2
