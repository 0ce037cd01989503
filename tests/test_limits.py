"""What a configuration must keep to: the grammar, the figures that it is set on, and what breaking it means."""

import csv
import io
import math
import re
import sys
from pathlib import Path

import pytest
from commands import settle_in
from commands import typed as tune
from fakes.openai_server import Engine as Server
from hypothesis import given
from hypothesis import strategies as st

from tuner.journal import read
from tuner.limits import Limit, broken, columns_of, names, parse_limits
from tuner.measure import metrics_of
from tuner.space import Refused
from tuner.trial import Work

ENGINE = Path(__file__).parent / "fakes" / "engine.py"
QUICK = ["--windows", "2", "--window", "0.02s", "--prompts", "2", "--output-tokens", "2", "--warm-up", "0.01s..0.1s"]
RUN = [
    "run",
    "--workload",
    ENGINE,
    *QUICK,
    "--most-others",
    "1",
    "--batch",
    "--proposer",
    "rules",
    "--confirm-pairs",
    "0",
]


def run(*arguments, name="s", folder="results"):
    return tune(*RUN, "--repeats", "1", "--name", name, "--results", folder, *arguments)


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    settle_in(tmp_path, monkeypatch)


# --- the grammar ---


@pytest.mark.parametrize("text", ["ttft_p95_s<=0.5", " ttft_p95_s <= 5e-1 ", "ttft_p95_s<=.5"])
def test_a_limit_is_a_metric_a_sign_and_a_number(text):
    assert Limit.parse(text, names("token")) == Limit("ttft_p95_s", most=True, bound=0.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ttft_p95_s",
        "ttft_p95_s<0.5",
        "ttft_p95_s=0.5",
        "0.5>=ttft_p95_s",
        "ttft_p95_s<=1e999",
        "a<=b<=1",
        "x<=__import__('os')",
    ],
)
def test_anything_else_is_refused_in_the_words_of_the_option(text):
    with pytest.raises(Refused, match=r"^--limit .*expected METRIC<=NUMBER"):
        parse_limits([text], names("token"))


def test_an_unknown_metric_is_refused_with_the_nearest_one():
    with pytest.raises(Refused, match="did you mean ttft_p95_s"):
        parse_limits(["ttft_p95<=1"], names("token"))


@pytest.mark.parametrize(
    ("workload", "limit", "told"),
    [
        ("llama", "images_per_s>=1", "no metric is called"),
        ("llama", "ttft_p95_s<=1", "tune with --workload llama-server"),
        ("diffusion", "tokens_per_s>=1", "no metric is called"),
        ("diffusion", "ttft_p95_s<=1", "no metric is called"),
    ],
)
def test_a_figure_that_the_engine_never_reports_is_refused_before_a_launch(workload, limit, told):
    needed = {"llama": "xllamacpp", "diffusion": "diffusers"}[workload]
    pytest.importorskip(needed)
    done = tune("run", "--workload", workload, "--size", "tiny", "--limit", limit, "--batch", "--proposer", "rules")
    assert done.returncode == 2
    assert told in " ".join(done.stderr.split())
    reported = "images_per_s" if workload == "diffusion" else "tokens_per_s"
    assert reported in done.stderr
    assert not Path("results").exists()


@given(st.text(max_size=40))
def test_no_text_is_anything_but_a_limit_or_a_refusal(text):
    try:
        limit = Limit.parse(text, names("token"))
    except Refused:
        return
    assert limit.column in names("token")
    assert math.isfinite(limit.bound)


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.booleans())
def test_a_limit_is_broken_beyond_its_bound_only(value, bound, most):
    fault = Limit("m", most=most, bound=bound).broken({"m": value})
    assert (fault is None) == (value <= bound if most else value >= bound)


def test_every_limit_that_is_broken_is_named():
    limits = (Limit("a", most=True, bound=1), Limit("b", most=False, bound=1), Limit("c", most=True, bound=1))
    assert broken(limits, {"a": 2, "b": 0.5, "c": 1}) == "over the limit: a 2 > 1; under the limit: b 0.5 < 1"


def test_the_metrics_of_limits_are_named_once_each():
    assert columns_of(["a<=1", "b >= 2", "a>=0"]) == ("a", "b")


# --- the metrics ---


def test_a_window_has_throughput_and_quantiles_of_whatever_was_timed():
    work = Work(units=40, request_seconds=(4.0, 1.0, 3.0, 2.0), ttft_seconds=(0.2,), itl_seconds=(0.1, 0.3))
    found = metrics_of(work, 8.0)
    assert found["tokens_per_s"] == 5
    assert (found["latency_mean_s"], found["latency_p50_s"], found["latency_p95_s"]) == (2.5, 2.0, 4.0)
    assert found["ttft_p99_s"] == 0.2
    assert (found["itl_p50_s"], found["itl_p99_s"]) == (0.1, 0.3)
    assert set(found) <= set(names("token"))


def test_what_was_not_timed_has_no_metric_and_images_are_called_images():
    assert metrics_of(Work(units=2, unit="image"), 4.0) == {"images_per_s": 0.5}
    assert metrics_of(Work(units=0, request_seconds=(math.nan,)), 4.0) == {}


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=300))
def test_a_quantile_is_a_value_that_occurred_and_enough_values_do_not_exceed_it(values):
    found = metrics_of(Work(units=1, request_seconds=tuple(values)), 1.0)
    for percent in (50, 95, 99):
        quantile = found[f"latency_p{percent}_s"]
        assert quantile in values
        assert sum(v <= quantile for v in values) >= percent / 100 * len(values)


# --- a study with limits ---


def test_a_setting_over_a_limit_is_shown_with_its_energy_and_never_the_best():
    # `rules` doubles the cost of the default, 20, and then halves it.
    done = run("--trials", 3, "--pin", "batch=1", "--limit", "cost_ms<=10")
    assert done.returncode == 0, done.stderr
    history = read(Path("results/s")).history
    assert [(t.config["cost"], t.over_limit) for t in history.trials] == [(20, True), (40, True), (10, False)]
    assert history.best.number == 2
    assert re.search(r"over the limit: cost_ms 40 > 10 \(it used .*J/token\)", done.stderr)
    assert "2 of them broke a limit" in done.stdout
    assert "the default breaks a limit (over the limit: cost_ms 20 > 10)" in done.stdout
    report = tune("report", "results/s")
    assert "cost_ms<=10" in report.stdout
    assert len(re.findall(r"\([\d.]+ [mµ]?J\)", report.stdout)) == 2


def test_a_default_that_breaks_a_limit_is_not_run_again_and_stops_nothing():
    done = run("--trials", 4, "--limit", "tokens_per_s>=1e9")
    assert done.returncode == 1
    history = read(Path("results/s")).history
    assert [t.proposal.source for t in history.trials].count("default") == 1
    assert len(history.trials) == 4
    assert "no setting that was tried keeps to the limits" in done.stdout


def test_limits_hold_when_a_study_goes_on():
    run("--trials", 1, "--limit", "tokens_per_s>=1e9")
    done = tune("run", "--resume", "results/s", "--batch", "--trials", 2)
    assert "under the limit" in done.stderr
    assert all(t.over_limit for t in read(Path("results/s")).history.trials)


def test_a_limit_on_what_the_engine_does_not_report_is_one_sentence_and_exit_code_2():
    done = run("--limit", "ttft_p95_s<=1")
    assert done.returncode == 2
    assert "this engine reports no ttft_p95_s" in done.stderr
    # The same options would end there again.
    assert "stopped; other options need a new study, of another --name" in done.stderr
    assert "--resume" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["ttft<=1", "ttft_p95_s", "tokens_per_s>=fast"])
def test_a_limit_that_is_none_is_refused_before_anything_runs(text):
    done = run("--limit", text)
    assert done.returncode == 2
    assert "--limit" in done.stderr
    assert not Path("results").exists()


def test_metrics_and_what_broke_a_limit_are_in_the_export():
    run("--trials", 2, "--limit", "tokens_per_s>=1e9", "--allow-lossy")
    rows = list(csv.DictReader(io.StringIO(tune("report", "results/s", "--csv", "-").stdout)))
    assert {row["over_limit"] for row in rows} == {"True"}
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)
    assert {row["quality_loss"] for row in rows} == {"0.0"}
    assert all(float(row["load_joules"]) >= 0 for row in rows)


def test_the_next_prompt_says_which_limit_was_broken_by_how_much_and_what_it_used():
    run("--trials", 2, "--limit", "tokens_per_s>=1e9")
    prompt = tune("prompt", "results/s", "--template", "enhanced").stdout
    assert "limits: tokens_per_s>=1e9" in prompt
    assert "per token, but" in prompt
    assert "under the limit: tokens_per_s" in prompt


def test_a_limit_on_quality_allows_what_is_lossy_and_measures_it():
    run("--trials", 1, "--limit", "quality_loss<=0.01")
    study = read(Path("results/s"))
    assert study.header.target.allow_lossy
    assert study.header.target.quality
    assert study.history.default.metrics["quality_loss"] == 0


NEVER = {
    "ollama": "Ollama tells the likelihood of tokens that it generates, not of given ones, .*; leave the limit out, or",
    "server": "not every server tells the likelihood of given tokens, .*; leave the limit out, or let tune start ",
    "command": "tune cannot judge what a command puts out; leave the limit out, or let the command print ",
}


@pytest.mark.parametrize("engine", NEVER)
def test_a_limit_on_quality_that_an_engine_never_reports_is_refused_before_anything_is_launched(
    engine, tmp_path, monkeypatch
):
    note = tmp_path / "launched"
    if engine == "ollama":
        stand_in = tmp_path / "ollama"
        code = f"import runpy\nrunpy.run_path({str(ENGINE.with_name('ollama_server.py'))!r}, run_name='__main__')"
        stand_in.write_text(f"#!{sys.executable}\n{code}\n")
        stand_in.chmod(0o755)
        monkeypatch.setenv("TUNE_OLLAMA", str(stand_in))
    spec = tmp_path / "bench.toml"
    spec.write_text(
        f'''[command]
argv = ["{sys.executable}", "-c", "open('{note}', 'w')", "{{n}}", "{{prompts}}", "{{output_tokens}}"]
[parameters.n]
type = "int"
low = 1
high = 2
default = 1
meaning = "how much is done in a pass of it"
[units]
fixed = 3
'''
    )
    with Server() as served:
        words = {
            "ollama": ["--workload", "ollama", "--model", "tiny"],
            "server": ["--workload", "server", "--url", served.url],
            "command": ["--workload", spec],
        }[engine]
        done = tune("run", *words, *QUICK, "--batch", "--trials", "2", "--name", "s", "--limit", "quality_loss<=0.01")
        assert served.requests == []
    assert done.returncode == 2, done.stderr
    assert re.search(rf"--limit quality_loss<=0.01: {NEVER[engine]}", " ".join(done.stderr.split()))
    assert "Traceback" not in done.stderr
    assert not Path("results").exists()
    assert not note.exists()


def test_what_changes_on_a_running_engine_is_told_to_the_model_with_what_a_restart_costs():
    done = run("--trials", 3, "--size", "live", "--pin", "cost=8")
    assert done.returncode == 0, done.stderr
    history = read(Path("results/s")).history
    assert [t.reused for t in history.trials] == [False, True, True]
    assert "2 trials on an engine that ran already" in done.stdout
    prompt = tune("prompt", "results/s", "--template", "enhanced").stdout
    assert "batch changes while it runs" in prompt
