"""Repeats, confirmation, calibration and money on the command line, with an engine that burns milliseconds."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import TUNE, settle_in
from commands import typed as tune
from test_cli import CALM, run, study

from tuner.journal import NAME


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    settle_in(tmp_path, monkeypatch)
    monkeypatch.setenv("TUNE_STATE", str(tmp_path / "state"))


# --- the search ---


def test_a_contender_and_every_fourth_trial_are_launched_again():
    done = run("--proposer", "rules", "--repeats", "2", pairs=6, trials=4)
    assert done.returncode == 0, done.stderr
    history = study().history
    assert {r.purpose for r in history.repeats} == {"contender", "sentinel"}
    assert [r.after for r in history.repeats if r.purpose == "sentinel"] == [4]
    assert all(len(t.repeats) <= 1 for t in history.trials if t is not history.default)
    assert f"4, and {len(history.repeats)} launched again" in done.stdout


def test_one_launch_is_asked_for_with_repeats_1_and_no_sentinel_comes_either():
    assert run("--proposer", "rules", "--repeats", "1", pairs=6, trials=4).returncode == 0
    assert not study().history.repeats


def test_a_resumed_study_of_too_few_pairs_makes_six():
    run("--proposer", "rules", pairs=6, trials=1)
    path = Path("results/s") / NAME
    path.write_bytes(path.read_bytes().replace(b'"confirm_pairs":6', b'"confirm_pairs":4', 1))
    assert study().header.confirm_pairs == 4
    done = tune("run", "--resume", "results/s", "--batch")
    assert "4 pairs show nothing with 95 % confidence: 6 are made" in done.stderr
    assert study().header.confirm_pairs == 6


def test_a_resumed_study_still_owes_what_it_owed():
    run("--proposer", "rules", "--repeats", "2", pairs=6, trials=4)
    path = Path("results/s") / NAME
    lines = path.read_bytes().splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if b'"kind":"repeat"' in line)
    path.write_bytes(b"".join(lines[:first]))
    assert tune("run", "--resume", "results/s", "--batch", "--confirm-pairs", 0).returncode == 0
    assert study().history.repeats


def test_idle_power_and_the_whole_energy_of_a_trial_are_recorded():
    run("--proposer", "rules", pairs=6, trials=2)
    first, second = study().history.trials
    assert first.idle.machine_watts > 0
    assert first.idle.quality == "estimated"
    assert second.idle is None
    assert first.spent["cpu"].joules > sum(m.joules for m in first.measurements)


def test_fast_mode_claims_nothing_and_says_what_does():
    done = run("--proposer", "rules")
    assert "Fast mode ranks and claims nothing: `tune confirm results/s`" in done.stdout
    assert not study().history.repeats


# --- tune confirm ---

CONFIRM = ["confirm", "results/s", "--pairs", 6, "--no-prune"]


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """The folder of a fast study that was made once."""
    folder = tmp_path_factory.mktemp("ranked")
    with pytest.MonkeyPatch.context() as patch:
        settle_in(folder, patch)
        assert run("--proposer", "rules").returncode == 0
    return folder


@pytest.fixture(scope="module")
def confirmed(ranked, tmp_path_factory):
    """The same study with its confirmation, the study as it was before, and what `tune confirm` said."""
    folder = shutil.copytree(ranked, tmp_path_factory.mktemp("confirmed"), dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        settle_in(folder, patch)
        before = study()
        return folder, before, tune(*CONFIRM)


def copied(folder):
    """A copy of those results in the current folder."""
    shutil.copytree(folder / "results", "results")


def test_a_fast_study_is_confirmed_with_longer_windows(confirmed):
    folder, _, done = confirmed
    copied(folder)
    assert done.returncode == 0, done.stderr
    found = study()
    assert len(found.pairs) == 6
    assert min(m.seconds for p in found.pairs for m in p.best.measurements) >= 0.04
    assert "6 pairs, estimated" in done.stdout
    assert tune("report", "results/s").stdout.rstrip().endswith(done.stdout.rstrip().splitlines()[-1])


def test_a_confirmation_says_what_it_will_do_before_it_begins(confirmed):
    _, before, done = confirmed
    first = next(line for line in done.stderr.splitlines() if "against the default" in line)
    assert first.startswith(f"trial {before.history.best.number} (")
    assert ") against the default, 6 pairs, about " in first


def test_a_confirmation_leaves_the_settings_of_the_study_alone(confirmed):
    folder, before, done = confirmed
    copied(folder)
    assert done.returncode in (0, 3)
    assert study().header == before.header
    assert b'"kind":"changes"' not in (Path("results/s") / NAME).read_bytes()


def test_a_confirmation_that_was_interrupted_goes_on(ranked):
    copied(ranked)
    process = subprocess.Popen([*TUNE, *map(str, CONFIRM)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not study().pairs and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "tune confirm results/s" in said
    begun = len(study().pairs)
    assert 1 <= begun < 6
    assert tune(*CONFIRM).returncode in (0, 3)
    assert [p.number for p in study().pairs] == list(range(6))


def test_a_confirmation_that_is_complete_is_not_measured_again(confirmed):
    copied(confirmed[0])
    again = tune(*CONFIRM)
    assert len(study().pairs) == 6
    assert "are in the journal and nothing is measured" in again.stderr


def test_where_the_default_is_the_best_there_is_nothing_to_confirm():
    run("--proposer", "rules", trials=1)
    done = tune("confirm", "results/s")
    assert done.returncode == 2
    assert "nothing to confirm" in done.stderr


def test_a_confirmation_on_another_engine_is_refused(ranked):
    copied(ranked)
    done = tune("confirm", "results/s", env={**os.environ, "FAKE_ENGINE_VERSION": "2"})
    assert done.returncode == 2
    assert "engine_version" in done.stderr


# --- tune calibrate ---


@contextlib.contextmanager
def calibrated(*more):
    done = tune("calibrate", *CALM, "--launches", 4, *more)
    assert done.returncode == 0, done.stderr
    yield done.stdout


def test_a_study_takes_its_noise_from_the_calibration_that_fits():
    with calibrated() as shown:
        assert "between launches" in shown
    run("--proposer", "rules", pairs=6, trials=1)
    assert study().header.noise.degrees == 3
    assert "calibration" in study().header.noise.source


def test_a_calibration_of_other_windows_is_not_used_and_named():
    with calibrated("--windows", 4):
        done = run("--proposer", "rules", pairs=6, trials=1)
    assert study().header.noise is None
    assert "exists for --windows 4, here 2" in done.stderr


def test_an_engine_that_cannot_be_measured_cannot_be_calibrated():
    done = tune("calibrate", *CALM, "--launches", 4, "--size", "wild", "--pin", "mode=raise")
    assert done.returncode == 1
    assert "the engine is on fire" in done.stderr


# --- money ---


def test_a_report_says_what_energy_costs_where_a_price_is_given(ranked):
    copied(ranked)
    plain = tune("report", "results/s").stdout
    assert "EUR" not in plain
    assert "kWh" in plain
    priced = tune("report", "results/s", "--price", "0.25EUR/kWh", "--carbon", "380g/kWh").stdout
    assert "EUR" in priced
    assert "gCO2e" in priced


@pytest.mark.parametrize("option", [["--price", "cheap"], ["--carbon", "0"], ["--pue", "0.5"]])
def test_a_price_that_is_none_is_refused(option):
    done = tune("report", "results/s", *option)
    assert done.returncode == 2
    assert option[0] in done.stderr
