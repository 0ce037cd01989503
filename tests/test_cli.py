"""The real command line, with an engine that burns a few milliseconds; in a process where a claim is about one."""

import contextlib
import csv
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from commands import TUNE, in_a_process, settle_in
from commands import typed as tune
from fakes.providers import Provider, answer, failure

from tuner.cli import _reached
from tuner.journal import NAME, End, read
from tuner.study import Threshold

ENGINE = Path(__file__).parent / "fakes" / "engine.py"
LOAD = ["--workload", str(ENGINE), "--windows", "2", "--window", "0.02s", "--prompts", "2", "--output-tokens", "2"]
CALM = [*LOAD, "--warm-up", "0.01s..0.1s", "--most-others", "1"]
"""As users run it, but short, and beside whatever else runs on this machine."""
QUICK = [*CALM, "--fast"]


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    settle_in(tmp_path, monkeypatch)


def run(*arguments, trials=4, pairs=0, name="s", by=tune, **more):
    options = [*CALM, "--confirm-pairs", pairs] if pairs else QUICK
    return by("run", *options, "--batch", "--trials", trials, "--name", name, *arguments, **more)


def study(name="s"):
    return read(Path("results") / name)


def configs(name="s"):
    return [(t.number, t.proposal.source, t.config) for t in study(name).history.trials]


# --- the main road ---


def test_a_batch_run_tunes_confirms_and_ends_with_what_was_shown():
    done = run("--proposer", "rules", pairs=6, by=in_a_process)
    assert done.returncode == 0, done.stderr
    found = study()
    assert len(found.history) == 4
    assert found.history.default.number == 0
    assert len(found.pairs) == 6
    assert found.ends[-1].reason == "all 4 trials are done"
    assert "95 % CI" in done.stdout
    assert "estimated" in done.stdout
    assert "fake --cost" in done.stdout


@pytest.mark.parametrize("proposer", ["sobol", "random", "tpe", "cmaes"])
def test_every_classical_proposer_runs_a_study(proposer):
    assert run("--proposer", proposer, trials=3).returncode == 0
    assert [source for _, source, _ in configs()] == ["default", proposer, proposer]


def test_without_an_llm_a_batch_run_says_loudly_that_none_is_in_use():
    done = run(trials=2)
    assert done.returncode == 0
    assert "NO LLM IS IN USE" in done.stderr
    assert study().header.proposer == "rules"


def test_after_the_default_the_time_of_a_trial_and_of_what_follows_is_said():
    done = run("--proposer", "rules", trials=3)
    assert re.search(r"^a trial takes about \S+ s; what follows takes \S+ s$", done.stderr, re.MULTILINE)


def test_a_threshold_that_is_reached_ends_with_code_0_and_one_that_is_not_with_code_3():
    assert run("--proposer", "rules", "--threshold", "1000J", name="easy").returncode == 0
    assert study("easy").ends[-1].kind == "goal"
    assert len(study("easy").history) == 1
    assert run("--proposer", "rules", "--threshold", "0.0001x", name="hard", trials=2).returncode == 3


def test_a_time_limit_alone_is_the_whole_budget():
    done = tune("run", *QUICK, "--proposer", "sobol", "--batch", "--time", "2s", "--confirm-pairs", 0, "--name", "s")
    assert done.returncode == 0, done.stderr
    assert study().header.trials is None
    assert study().ends[-1].reason == "the 2.0 s for trials are over"


def test_a_pinned_parameter_never_moves_and_a_narrowed_one_stays_inside():
    run("--proposer", "random", "--pin", "batch=2", "--range", "cost=16..32", trials=5)
    assert all(c["batch"] == 2 and 16 <= c["cost"] <= 32 for _, _, c in configs())


def test_an_engine_that_always_fails_ends_the_study_with_code_1_and_the_cause():
    done = run("--proposer", "rules", "--size", "wild", "--pin", "mode=raise", trials=9)
    assert done.returncode == 1
    assert len(study().history) == 3
    assert "the engine is on fire" in done.stdout + done.stderr


def test_a_default_that_is_refused_ends_the_study_with_code_2_and_a_resume_tries_it_again():
    done = run("--proposer", "rules", "--size", "wild", "--pin", "mode=refuse", trials=9)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "tune: mode=refuse: expected a mode that loads"
    assert "once that is mended, `tune run --resume results/s` goes on with the same options; other op" in done.stderr
    # However often it is tried before it is mended, it is not given up.
    for _ in range(3):
        assert tune("run", "--resume", "results/s", "--batch").returncode == 2
    assert len(study().history) == 0
    assert study().pending is not None


def test_nothing_is_left_running_after_a_study():
    run("--proposer", "random", "--size", "wild", "--range", "mode=ok,segv,kill", trials=5, by=in_a_process)
    here = str(Path.cwd())
    left = [p for p in psutil.process_iter(["cmdline", "cwd"]) if p.info["cwd"] == here and p.pid != os.getpid()]
    assert not [p for p in left if "tuner.worker" in (p.info["cmdline"] or [])]


# --- a chat model over real HTTP ---


def reply(**changes):
    return json.dumps({"reason": "less work", "predicted_joules_per_token": 0.01, "changes": changes})


KEY = "sk-test-0123456789abcdef"


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
@pytest.mark.parametrize("template", ["enhanced", "baseline"])
def test_a_chat_model_tunes_over_http_and_every_prompt_and_answer_is_kept(provider, template):
    with Provider([answer(reply(cost=10)), answer("what?"), answer(reply(cost=9))]) as server:
        base = f"{server.url}" if provider == "openai" else server.url.removesuffix("/v1")
        done = run(
            "--llm",
            f"{provider}:some-model",
            "--template",
            template,
            trials=3,
            env={**os.environ, f"{provider.upper()}_API_KEY": KEY, f"{provider.upper()}_BASE_URL": base},
        )
        assert done.returncode == 0, done.stderr
        assert len(server.requests) == 3
    trials = study().history.trials
    assert [t.config["cost"] for t in trials] == [20, 10, 9]
    assert [len(t.proposal.exchanges) for t in trials] == [0, 1, 2]
    folder = Path("results/s/trials/0002")
    assert folder.joinpath("prompt.md").read_text() == trials[2].proposal.exchanges[0].prompt
    assert folder.joinpath("reply.md").read_text() == "what?"
    assert folder.joinpath("reply-2.md").read_text() == reply(cost=9)
    assert "3" in done.stdout
    assert trials[1].proposal.exchanges[0].reply.input_tokens == 11


def test_a_key_is_nowhere_in_the_study_or_the_output():
    with Provider([failure(401, "bad key {authorization}")]) as server:
        keyed = {**os.environ, "OPENAI_API_KEY": KEY}
        done = run("--llm", "openai:m", "--base-url", server.url, trials=2, env=keyed, by=in_a_process)
    assert done.returncode == 1
    everything = (
        done.stdout
        + done.stderr
        + "".join(p.read_text(errors="replace") for p in Path("results").rglob("*") if p.is_file())
    )
    assert "401" in done.stderr + done.stdout
    assert KEY not in everything
    assert KEY[3:] not in everything


def test_a_provider_that_stays_away_ends_the_study_and_resuming_goes_on_where_it_was():
    with Provider([answer(reply(cost=10)), failure(404, "no such model")]) as server:
        done = run("--llm", "openai:m", "--base-url", server.url, trials=3)
    assert done.returncode == 1
    assert "--resume" in done.stdout + done.stderr
    assert len(study().history) == 2
    with Provider([answer(reply(cost=9))]) as server:
        again = tune("run", "--resume", "results/s", "--batch", "--base-url", server.url)
    assert again.returncode == 0, again.stderr
    assert [c["cost"] for _, _, c in configs()] == [20, 10, 9]


def test_a_rate_limit_is_waited_out():
    with Provider([failure(429, retry_after=0.1), answer(reply(cost=10))]) as server:
        done = run("--llm", "openai:m", "--base-url", server.url, trials=2)
    assert done.returncode == 0, done.stderr
    assert configs()[1][2]["cost"] == 10


def test_answers_that_cannot_be_used_are_replaced_visibly():
    with Provider([answer("no idea")]) as server:
        done = run("--llm", "openai:m", "--base-url", server.url, trials=2)
    assert done.returncode == 0
    (_, first) = study().history.trials
    assert (first.proposal.source, first.proposal.in_place_of) == ("rules", "llm")
    assert "rules for llm" in done.stdout + done.stderr


# --- looking at a study ---


def test_report_csv_has_one_row_a_measurement_with_the_same_energies():
    run("--proposer", "sobol", "--size", "wild", "--range", "mode=ok,raise", trials=5)
    shown = tune("report", "results/s", "--csv", "-")
    assert shown.returncode == 0, shown.stderr
    rows = list(csv.DictReader(io.StringIO(shown.stdout)))
    trials = study().history.trials
    assert len(rows) == sum(len(t.measurements) or 1 for t in trials)
    for row in rows:
        trial = trials[int(row["trial"])]
        assert row["param_cost"] == str(trial.config["cost"])
        assert (row["joules"] == "") == (trial.error is not None)
    assert tune("report", "results/s", "--csv", "a.csv").returncode == 0
    assert Path("a.csv").read_text() == shown.stdout


def test_report_json_is_strict_json():
    run("--proposer", "sobol", trials=2)
    shown = tune("report", "results/s", "--json", "-")

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(shown.stdout, parse_constant=refuse)


def test_report_shows_a_table_with_every_trial_and_the_label():
    run("--proposer", "sobol", "--repeats", "1", "--no-prune", trials=3, pairs=6)
    shown = tune("report", "results/s")
    assert shown.returncode == 0
    assert "estimated" in shown.stdout
    assert shown.stdout.count("sobol") >= 2
    assert "6 pairs" in shown.stdout or "No saving shown" in shown.stdout


def test_prompt_prints_what_the_next_call_sends_and_sends_nothing():
    with Provider([answer(reply(cost=10)), answer(reply(cost=9))]) as server:
        run("--llm", "openai:m", "--base-url", server.url, trials=2)
        shown = tune("prompt", "results/s")
        assert len(server.requests) == 1
        tune("run", "--resume", "results/s", "--batch", "--base-url", server.url, "--trials", 3)
        sent = server.requests[1].body["messages"][-1]["content"]
    # `--trials 3` leaves one more proposal than the study that was asked for its prompt.
    assert shown.stdout.strip().replace("Proposals left: 0", "Proposals left: 1") == sent.strip()


def test_prompt_takes_another_template():
    run("--proposer", "sobol", trials=2)
    assert "Which values should I try next?" in tune("prompt", "results/s", "--template", "baseline").stdout


def test_doctor_names_every_meter_and_how_to_mend_it():
    shown = in_a_process("doctor")
    assert shown.returncode == 0
    for word in ("nvml", "rapl", "estimate", "llama"):
        assert word in shown.stdout


def test_version():
    assert in_a_process("--version").stdout.startswith("tune ")


# --- what is wrong is one sentence, exit code 2, and nothing written ---

REFUSED = [
    (["run", "--workload", "lama", "--batch"], 'unknown runner "lama"; did you mean llama?'),
    (["run", *QUICK, "--template", "enhancd", "--batch"], 'unknown prompt "enhancd"; did you mean enhanced?'),
    (["run", *QUICK, "--proposer", "sobl", "--batch"], 'unknown proposer "sobl"'),
    (["run", *QUICK, "--proposer", "sobol", "--template", "enhanced", "--batch"], "uses no LLM"),
    (["run", *QUICK, "--proposer", "rules", "--meter", "watt", "--batch"], "nvml"),
    (["run", *QUICK, "--proposer", "rules", "--meter", "rapl", "--batch"], "rapl"),
    (["run", *QUICK, "--proposer", "rules", "--require-measured", "--batch"], "--require-measured"),
    (["run", *QUICK, "--proposer", "rules", "--pin", "cots=3", "--batch"], "did you mean cost?"),
    (["run", *QUICK, "--proposer", "rules", "--pin", "cost=999", "--batch"], "expected an integer from 1 to 64"),
    (["run", *QUICK, "--proposer", "rules", "--pin", "cost", "--batch"], "expected NAME=VALUE"),
    (["run", *QUICK, "--proposer", "rules", "--range", "cost=1..999", "--batch"], "expected an integer from 1 to 64"),
    (["run", *QUICK, "--proposer", "rules", "--range", "cost=9..3", "--batch"], "the low end is above the high end"),
    (["run", *QUICK, "--proposer", "rules", "--threshold", "80%", "--batch"], "0.8x"),
    (["run", *QUICK, "--proposer", "rules", "--time", "soon", "--batch"], "90s, 20m or 2h"),
    (["run", *QUICK, "--proposer", "rules", "--name", "../up", "--batch"], "expected letters, digits"),
    (["run", *QUICK, "--proposer", "rules", "--size", "refused", "--batch"], "size 'refused'"),
    (["run", *QUICK, "--llm", "gpt", "--batch"], "openai:MODEL, anthropic:MODEL or paste"),
    (["run", *QUICK, "--llm", "openai:m", "--batch"], "OPENAI_API_KEY"),
    (["run", *QUICK, "--proposer", "rules", "--pin", "cost=1", "--pin", "batch=4", "--batch"], "batch <= cost"),
    (
        ["run", *QUICK, "--proposer", "rules", "--pin", "cost=9", "--pin", "batch=4", "--batch"],
        "nothing is left to tune",
    ),
    (["run", "--resume", "results/none"], "no study here"),
    (["run", "--force", *QUICK], "--resume"),
    (["run", *QUICK, "--proposer", "rules"], "nobody can be asked"),
    (["run", *QUICK, "--llm", "paste", "--batch"], "--llm paste needs a person at a terminal"),
    (["run", *CALM, "--proposer", "rules", "--batch", "--confirm-pairs", "7"], "expected an even number"),
    (["run", *CALM, "--proposer", "rules", "--batch", "--confirm-pairs", "4"], "6 or more"),
    (["run", *QUICK, "--proposer", "rules", "--batch", "--confirm-pairs", "6"], "fast mode launches once"),
    (["run", *CALM, "--proposer", "rules", "--batch", "--repeats", "some"], "expected auto"),
    (["run", *LOAD, "--proposer", "rules", "--batch", "--warm-up", "9s..1s"], "smaller time first"),
    (["confirm", "results/none"], "no study here"),
    (["confirm", "results/none", "--pairs", "4"], "6 or more"),
    (["calibrate", *LOAD, "--launches", "3"], "expected 4 or more"),
    (["run", *QUICK, "--proposer", "llm", "--batch"], "--proposer llm: which one"),
    (["run", *QUICK, "--proposer", "rules", "--batch", "--base-url", "http://127.0.0.1:1/v1"], "--base-url"),
    (["run", *QUICK, "--proposer", "rules", "--batch", "--timeout", "9" * 400], "90s, 20m or 2h"),
    (["report", "results/none"], "no study here"),
    (["prompt", "results/none"], "no study here"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[s for _, s in REFUSED])
def test_what_cannot_be_done_is_refused_in_one_sentence_and_writes_nothing(arguments, sentence):
    done = tune(*arguments)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith(("running the code of", str(ENGINE)))]
    assert len(said) == 1
    assert said[0].startswith("tune: ")
    assert sentence in said[0]
    assert "Traceback" not in done.stderr
    assert not Path("results").exists()


@pytest.mark.parametrize(("arguments", "sentence"), [REFUSED[0], REFUSED[-1]], ids=["run", "prompt"])
def test_a_refusal_is_one_sentence_and_exit_code_2_of_a_real_process_too(arguments, sentence):
    done = in_a_process(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tune: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unknown_option_is_a_usage_error():
    done = in_a_process("run", "--nonsense")
    assert done.returncode == 2
    assert "--nonsense" in done.stderr


def test_a_study_is_not_overwritten():
    run("--proposer", "rules", trials=1)
    done = run("--proposer", "rules", trials=1)
    assert done.returncode == 2
    assert "tune run --resume results/s" in done.stderr


def test_what_a_resume_changes_holds_for_later_resumes_and_reports():
    run("--proposer", "sobol", trials=2)
    assert tune("run", "--resume", "results/s", "--batch", "--trials", 3).returncode == 0
    assert len(study().history) == 3
    assert study().header.trials == 3
    refused = tune("run", "--resume", "results/s", "--batch", "--threshold", "80%")
    assert refused.returncode == 2
    refused = tune("run", "--resume", "results/s", "--batch", "--template", "baseline")
    assert refused.returncode == 2
    assert "a study of sobol, which uses no LLM" in refused.stderr
    assert study().header.trials == 3


def test_a_runner_of_the_current_folder_runs_only_when_it_is_named_and_its_path_is_printed_first():
    Path("runners").mkdir()
    Path("runners/llama.py").write_text("raise RuntimeError('mine')")
    named = tune("run", "--workload", "llama", "--proposer", "rules", "--batch")
    assert f"running the code of {Path('runners/llama.py').absolute()}" in named.stderr
    assert "RuntimeError: mine" in named.stderr
    unnamed = tune("run", "--size", "none", "--proposer", "rules", "--batch")
    assert "mine" not in unnamed.stderr
    assert "--size none" in unnamed.stderr


def test_a_study_is_resumed_from_another_folder(tmp_path):
    shutil.copy(ENGINE, "mine.py")
    assert (
        tune(
            "run",
            *["./mine.py" if a == str(ENGINE) else a for a in QUICK],
            "--proposer",
            "rules",
            "--batch",
            "--trials",
            2,
            "--confirm-pairs",
            0,
            "--name",
            "s",
        ).returncode
        == 0
    )
    Path("elsewhere").mkdir()
    again = tune("run", "--resume", "../results/s", "--batch", "--trials", 3, cwd="elsewhere")
    assert again.returncode == 0, again.stderr
    assert len(study().history) == 3


def test_a_study_in_which_nothing_could_be_measured_ends_with_code_1():
    assert run("--proposer", "rules", "--size", "wild", "--pin", "mode=raise", trials=2).returncode == 1


def test_a_hang_up_that_is_ignored_stays_ignored():
    process = start(
        "--proposer",
        "rules",
        "--trials",
        3,
        "--name",
        "s",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    wait_for_trials(1)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(study().history) == 3


def test_an_option_that_a_resumed_study_cannot_change_is_refused():
    run("--proposer", "rules", trials=1)
    done = tune("run", "--resume", "results/s", "--batch", "--prompts", "9")
    assert done.returncode == 2
    assert "--prompts: a resumed study keeps" in done.stderr


# --- faults ---


def start(*arguments, **more):
    return subprocess.Popen(
        [*TUNE, "run", *QUICK, "--batch", "--confirm-pairs", "0", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def wait_for_trials(count, name="s", timeout=60.0):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        path = Path("results") / name / NAME
        if path.exists() and path.read_bytes().count(b'"kind":"trial"') >= count:
            return
        time.sleep(0.02)
    raise AssertionError("the study did not get that far")


def workers_of(process):
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one too
                found += [child] if "tuner.worker" in child.cmdline() else []
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_keeps_finished_trials_and_says_how_to_go_on(number, code):
    # Whoever runs these tests may ignore SIGHUP, as nohup does, and that is inherited.
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731 - one line for one call
    process = start("--proposer", "rules", "--trials", 50, "--name", "s", preexec_fn=heard)
    wait_for_trials(1)
    time.sleep(0.2)
    workers = workers_of(process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert "tune run --resume results/s" in errors
    assert "Traceback" not in errors
    assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]
    assert 1 <= len(study().history) < 50


@pytest.mark.parametrize("proposer", ["rules", "sobol"])
def test_killed_at_random_moments_and_resumed_a_study_ends_as_an_uninterrupted_one(proposer):
    # Energies are noisy, and rules follows them: what is compared are sobol's configurations, and for both
    # that no trial is lost, none is run twice, and the end is the same.
    whole = run("--proposer", proposer, trials=6, name="whole")
    assert whole.returncode == 0
    moments = random.Random(5)
    process = start("--proposer", proposer, "--trials", 6, "--name", "s")
    wait_for_trials(1)
    for _ in range(4):
        time.sleep(moments.uniform(0.05, 0.9))
        workers = workers_of(process) if process.poll() is None else []
        process.kill()
        process.communicate()
        psutil.wait_procs(workers, timeout=5)
        assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]
        process = subprocess.Popen(
            [*TUNE, "run", "--resume", "results/s", "--batch"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert [n for n, _, _ in configs()] == [0, 1, 2, 3, 4, 5]
    assert study().ends[-1] == study("whole").ends[-1]
    if proposer == "sobol":
        assert configs() == configs("whole")


def test_a_full_disk_keeps_finished_trials_and_is_one_sentence():
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    process = start("--proposer", "sobol", "--trials", 200, "--name", "s", preexec_fn=small_files)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "finished trials are kept" in errors
    kept = len(study().history)
    assert kept >= 1
    again = tune("run", "--resume", "results/s", "--batch", "--trials", kept + 1)
    assert again.returncode == 0, again.stderr
    assert len(study().history) == kept + 1


def test_a_results_folder_that_cannot_be_made_is_refused():
    Path("results").write_text("in the way")
    done = run("--proposer", "rules")
    assert done.returncode == 2
    assert "--results" in done.stderr


def test_a_results_folder_deleted_in_the_middle_is_written_again():
    process = start("--proposer", "sobol", "--trials", 5, "--name", "s")
    wait_for_trials(2)
    while Path("results/s").exists():  # the engine may be writing its log into it
        shutil.rmtree("results/s", ignore_errors=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert [n for n, _, _ in configs()] == [0, 1, 2, 3, 4]


def test_two_processes_do_not_run_one_study():
    process = start("--proposer", "rules", "--trials", 50, "--name", "s")
    wait_for_trials(1)
    second = tune("run", "--resume", "results/s", "--batch")
    process.terminate()
    process.communicate()
    assert second.returncode == 2
    assert "is running this study" in second.stderr


def test_resuming_on_another_engine_is_refused_and_force_goes_on_as_a_segment_that_is_not_compared():
    run("--proposer", "rules", trials=2)
    other = {**os.environ, "FAKE_ENGINE_VERSION": "2"}
    refused = tune("run", "--resume", "results/s", "--batch", "--trials", 3, env=other)
    assert refused.returncode == 2
    assert "engine_version: recorded '1', here '2'" in refused.stderr
    forced = tune("run", "--resume", "results/s", "--batch", "--trials", 3, "--force", env=other)
    assert forced.returncode == 0, forced.stderr
    trials = study().history.trials
    assert [t.segment for t in trials] == [0, 0, 1, 1, 1]
    assert trials[2].proposal.source == "default"
    assert all(t.segment == 1 for t in study().history.measured)
    assert "segment" in tune("report", "results/s").stdout


@pytest.mark.parametrize(("confirmed", "reached"), [(False, True), (True, False)])
def test_fresh_runs_that_show_nothing_reach_no_threshold(confirmed, reached):
    goal = End(kind="goal", reason="trial 1 is at or below the threshold")
    assert _reached(Threshold.parse("0.8x"), goal, None, confirmed=confirmed) is reached
