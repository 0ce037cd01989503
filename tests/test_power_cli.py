"""Power and clock as knobs on the command line, over a fake driver that keeps its settings in a file."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import TUNE, settle_in
from commands import typed as tune
from fakes.openai_server import Engine
from test_cli import CALM, study
from test_control import gpus, running  # noqa: F401 - a fixture is used by its name

NO_PERMISSION = 4
ON_GPU = [*CALM, "--fast", "--meter", "nvml", "--batch", "--proposer", "random", "--name", "s", "--cool-down", "0"]
ALLOWED = [*ON_GPU, "--allow-power-control", "--range", "cost=1..8"]


@pytest.fixture(autouse=True)
def gpu(gpus, tmp_path, monkeypatch):  # noqa: F811 - the imported fixture
    settle_in(tmp_path, monkeypatch)
    return gpus.add()


def test_power_and_clock_are_tuned_and_put_back(gpu):
    done = tune("run", *ALLOWED, "--trials", 5)
    assert done.returncode == 0, done.stderr
    tried = study().history.trials
    assert {"gpu_power_limit_w", "gpu_sm_clock_mhz"} <= set(tried[0].config)
    assert len({t.config["gpu_power_limit_w"] for t in tried}) > 1
    assert gpu.calls()["nvmlDeviceSetPowerManagementLimit"] > 2
    assert gpu.settings() == (300.25, None)
    assert not gpu.ledger().exists()


def test_what_the_gpus_were_set_to_is_in_the_journal_before_the_first_trial(gpu):
    tune("run", *ALLOWED, "--trials", 1)
    assert "300.25" in study().header.machine["before_gpu0"]


def test_the_recommended_command_sets_the_gpu_too():
    # Only the GPU's settings are left to tune, so the best differs from the default in them or not at all.
    pins = [option for name in ("cost=4", "batch=2") for option in ("--pin", name)]
    done = tune("run", *ON_GPU, "--allow-power-control", *pins, "--trials", 6)
    best = study().history.best
    changed = best.config["gpu_power_limit_w"] != study().history.default.config["gpu_power_limit_w"]
    assert ("sudo nvidia-smi -i GPU-aaaa -pl" in done.stdout) is changed
    assert "fake --cost 4 --batch 2" in done.stdout


def test_limits_come_back_when_the_tuner_is_killed(gpu):
    process = subprocess.Popen(
        [*TUNE, "run", *ALLOWED, "--trials", "99"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while gpu.settings()[0] == 300.25 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    while gpu.ledger().exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gpu.settings() == (300.25, None)


def test_limits_come_back_on_ctrl_c(gpu):
    process = subprocess.Popen(
        [*TUNE, "run", *ALLOWED, "--trials", "99"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while gpu.settings()[0] == 300.25 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert gpu.settings() == (300.25, None)


def test_without_rights_power_control_is_refused_and_nothing_is_written(gpu):
    gpu.fail(SetPowerManagementLimit=NO_PERMISSION)
    done = tune("run", *ALLOWED)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()[-1].split(";")) >= 2
    assert "sudo" in done.stderr
    assert not Path("results").exists()


def test_a_meter_that_does_not_count_the_gpu_cannot_tune_its_power():
    done = tune("run", *[o if o != "nvml" else "estimate" for o in ALLOWED])
    assert done.returncode == 2
    assert "--allow-power-control: the estimate meter does not count the GPU" in done.stderr


def test_without_the_option_neither_is_touched(gpu):
    tune("run", *ON_GPU, "--trials", 2)
    assert "gpu_power_limit_w" not in study().history.trials[0].config
    assert not gpu.calls()


def test_restore_puts_back_what_a_killed_run_left(gpu):
    gpu.leave_changed()
    done = tune("restore")
    assert done.returncode == 0, done.stderr
    assert "300.25" in done.stdout
    assert gpu.settings() == (300.25, None)
    assert tune("restore").returncode == 0


def test_a_run_says_that_something_waits_to_be_put_back(gpu):
    gpu.leave_changed()
    done = tune("run", *ON_GPU, "--trials", 1)
    assert "tune restore" in done.stderr


def test_a_run_warns_that_another_tuner_changes_the_gpu_meanwhile(gpu):
    with running(gpu):
        done = tune("run", *ON_GPU, "--trials", 1)
    assert "another tune changes power and clock of GPU-aaaa at this moment" in done.stderr


def test_doctor_says_that_something_waits_to_be_put_back(gpu):
    gpu.leave_changed()
    assert "$ tune restore" in tune("doctor").stdout


def test_the_next_run_with_power_control_puts_back_first(gpu):
    gpu.leave_changed()
    assert tune("run", *ALLOWED, "--trials", 1).returncode == 0
    assert study().history.default.config["gpu_power_limit_w"] == 300
    assert gpu.settings() == (300.25, None)


def test_a_resumed_study_holds_the_gpus_again(gpu):
    tune("run", *ALLOWED, "--trials", 1)
    done = tune("run", "--resume", "results/s", "--batch", "--trials", 3)
    assert done.returncode == 0, done.stderr
    assert len(study().history) == 3
    assert gpu.settings() == (300.25, None)


SERVED = ["run", *ON_GPU, "--workload", "server", "--prompt-tokens", 4, "--trials", 3]


def test_power_and_clock_of_a_server_that_runs_already_are_tuned_beside_the_load(gpu):
    with Engine() as engine:
        done = tune(*SERVED, "--url", engine.url, "--allow-power-control")
    assert done.returncode == 0, done.stderr
    tried = study().history.trials
    assert list(tried[0].config) == ["concurrency", "gpu_power_limit_w", "gpu_sm_clock_mhz"]
    assert len({t.config["gpu_power_limit_w"] for t in tried}) > 1
    assert gpu.settings() == (300.25, None)


def test_in_an_open_loop_power_and_clock_are_what_is_left_to_tune_of_a_server():
    with Engine() as engine:
        done = tune(*SERVED, "--url", engine.url, "--request-rate", 200, "--allow-power-control")
    assert done.returncode == 0, done.stderr
    assert {t.error for t in study().history.trials} == {None}
    assert list(study().history.trials[0].config) == ["gpu_power_limit_w", "gpu_sm_clock_mhz"]


def test_in_an_open_loop_without_them_nothing_is_left_and_the_rate_is_named():
    with Engine() as engine:
        done = tune(*SERVED, "--url", engine.url, "--request-rate", 200)
    assert done.returncode == 2
    assert "nothing is left to tune" in done.stderr
    assert "--request-rate 200 decides how many requests are in flight: leave it out" in done.stderr
    assert not Path("results").exists()
