import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tuner.evaluate import Launcher, cause_of_death, end_group, has_exited, judged, last_lines, out_of_memory_kills
from tuner.journal import JournalError, Plan
from tuner.trial import Measurement, Proposal, Target, Work
from tuner.worker import Result

ENGINE = Path(__file__).parent / "fakes" / "engine.py"
QUICK = Plan(windows=2, window_seconds=0.02, timeout_seconds=30)


def launcher(folder: Path, **changes) -> Launcher:
    parts = {
        "folder": folder,
        "runner": ENGINE,
        "target": Target(prompts=2, output_tokens=3),
        "meters": ("estimate",),
        "meter_options": {},
        "plan": QUICK,
    }
    return Launcher(**{**parts, **changes})


def proposal(mode: str = "ok", **values) -> Proposal:
    return Proposal(config={"cost": 8, "batch": 1, "mode": mode, **values}, source="rules")


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_trial_is_measured_in_a_process_of_its_own(tmp_path):
    trial = launcher(tmp_path)(3, proposal())
    assert trial.error is None
    assert [m.valid for m in trial.measurements] == [True, True]
    assert trial.valid[0].work.units % 6 == 0
    assert trial.quality == "estimated"
    assert trial.effective == {"cost": 8, "batch": 1}
    assert 0 < trial.load_seconds < trial.seconds
    assert trial.joules_per_unit_bounds[0] < trial.joules_per_unit < trial.joules_per_unit_bounds[1]


def test_twice_the_work_for_each_unit_costs_more_energy_for_each_unit(tmp_path):
    light, heavy = launcher(tmp_path)(0, proposal(cost=8)), launcher(tmp_path)(1, proposal(cost=32))
    assert heavy.joules_per_unit > 2 * light.joules_per_unit


def test_the_phases_of_a_trial_are_reported_with_its_number(tmp_path):
    seen = []
    launcher(tmp_path, report=lambda number, phase: seen.append((number, phase)))(5, proposal(cost=64))
    assert {number for number, _ in seen} == {5}
    assert any("measuring" in phase for _, phase in seen)


@pytest.mark.parametrize(
    ("mode", "cause"),
    [
        ("raise", "RuntimeError: the engine is on fire"),
        ("refuse", "mode=refuse: expected a mode that loads"),
        ("segv", "killed by SIGSEGV (it crashed)"),
        ("kill", "killed by SIGKILL"),
        ("abort", "killed by SIGABRT (it gave up: see the log)"),
        ("exit", "exit status 7"),
        ("memory", "out of memory"),
        ("nothing", "the engine reported 0 tokens for a pass"),
        ("nan", "the runner reported what cannot be recorded"),
    ],
)
def test_what_an_engine_does_to_itself_is_the_cause_of_a_failed_trial(tmp_path, mode, cause):
    trial = launcher(tmp_path)(0, proposal(mode))
    assert cause in trial.error
    assert trial.joules_per_unit is None


def test_a_failed_trial_carries_the_last_lines_of_its_log_without_control_characters(tmp_path):
    trial = launcher(tmp_path)(0, proposal("log"))
    assert any("failed to allocate buffer of size 42" in line for line in trial.log)
    assert not any("\x1b" in line for line in trial.log)


@pytest.mark.parametrize("mode", ["hang", "hang-loading"])
def test_an_engine_that_hangs_is_ended_when_its_time_is_over(tmp_path, mode):
    started = time.monotonic()
    trial = launcher(tmp_path, plan=Plan(windows=1, timeout_seconds=1.5))(0, proposal(mode))
    assert "took longer than 1.5 s" in trial.error
    assert "raise --timeout" in trial.error
    assert time.monotonic() - started < 6


def test_a_process_that_the_engine_started_does_not_outlive_the_trial(tmp_path):
    note = tmp_path / "pid"
    trial = launcher(tmp_path, target=Target(model=str(note)))(0, proposal("child"))
    assert "SIGKILL" in trial.error
    pid = int(note.read_text())
    for _ in range(100):
        if not alive(pid):
            break
        time.sleep(0.02)
    assert not alive(pid)


def test_a_worker_ends_itself_when_the_tuner_is_killed(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_evaluate import launcher, proposal
launcher(Path({str(tmp_path)!r}))(0, proposal("hang"))
"""
    tuner = subprocess.Popen([sys.executable, "-c", code])
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 10
    while not workers and time.monotonic() < deadline:
        workers = [c for c in psutil.Process(tuner.pid).children() if "tuner.worker" in c.cmdline()]
        time.sleep(0.02)
    assert workers
    time.sleep(0.5)
    tuner.kill()
    tuner.wait()
    gone, left = psutil.wait_procs(workers, timeout=5)
    assert gone
    assert not left


def test_the_engines_own_processes_end_when_the_tuner_is_killed(tmp_path):
    note = tmp_path / "pid"
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_evaluate import launcher, proposal, Target
launcher(Path({str(tmp_path)!r}), target=Target(model={str(note)!r}))(0, proposal("parent"))
"""
    tuner = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 10
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = int(note.read_text())
    assert alive(pid)
    tuner.kill()
    tuner.wait()
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_windows_that_were_measured_before_the_engine_failed_are_kept_and_do_not_count(tmp_path):
    trial = launcher(tmp_path, plan=Plan(windows=50, window_seconds=0.0, timeout_seconds=30))(0, proposal("late"))
    assert "the engine tired" in trial.error
    assert len(trial.measurements) == 3
    assert all("the trial failed later" in m.invalid and not m.energy for m in trial.measurements)
    assert trial.joules_per_unit is None


def test_ctrl_c_ends_the_worker_before_it_leaves(tmp_path):
    seen: list[psutil.Process] = []

    def interrupt(_number, phase):
        if "measuring" in phase and not seen:
            seen.extend(psutil.Process().children())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launcher(tmp_path, report=interrupt)(0, proposal("hang"))
    assert seen
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in seen)


def test_no_descriptor_is_left_open_by_a_trial(tmp_path):
    run = launcher(tmp_path)
    run(0, proposal())
    before = len(list(Path("/proc/self/fd").iterdir()))
    run(1, proposal("raise"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_no_temporary_file_is_left_behind(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    launcher(tmp_path)(0, proposal("segv"))
    assert list(scratch.iterdir()) == []


def test_a_folder_named_tuner_where_the_person_stands_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "tuner").mkdir()
    (tmp_path / "tuner" / "__init__.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    assert launcher(tmp_path)(0, proposal()).error is None


def test_a_trial_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "trials").write_text("in the way")
    with pytest.raises(JournalError, match="go on with `tune run --resume"):
        launcher(tmp_path)(0, proposal())


def test_a_result_without_a_valid_window_is_a_failure_with_the_windows_causes():
    window = Measurement(
        work=Work(units=1), seconds=1, energy={}, quality="measured", meter="rapl", invalid=("cpu0: unreadable",)
    )
    judgement = judged(Result(measurements=(window, window)))
    assert judgement.error == "no valid window in 2: cpu0: unreadable"


@pytest.mark.parametrize(
    ("status", "lack", "cause"),
    [
        (-9, True, "out of memory: the kernel killed the engine (SIGKILL, phase: loading)"),
        (-9, False, "the engine was killed by SIGKILL (phase: loading)"),
        (-11, True, "the engine was killed by SIGSEGV (it crashed) (phase: loading)"),
        (3, False, "the engine ended its process with exit status 3 (phase: loading)"),
    ],
)
def test_a_death_is_named_after_its_signal_and_what_the_kernel_counted(status, lack, cause):
    assert cause_of_death(status, "loading", lack_of_memory=lack) == cause


def test_the_kernels_count_of_kills_for_memory_is_a_number():
    assert out_of_memory_kills() >= 0


def test_the_end_of_a_long_log_is_cut_to_lines_that_can_be_shown(tmp_path):
    log = tmp_path / "engine.log"
    log.write_bytes(b"x" * 200_000 + b"\n" + b"\xff\x00 last\n")
    assert list(last_lines(log))[-1].endswith("last")
    assert all(len(line) <= 300 for line in last_lines(log))
    assert list(last_lines(tmp_path / "absent")) == []


def test_ending_a_group_that_ignores_sigterm_kills_it():
    stubborn = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal,time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    stubborn.stdout.readline()
    stubborn.stdout.close()
    assert not has_exited(stubborn)
    import tuner.evaluate as module

    patience, module.GRACE_SECONDS = module.GRACE_SECONDS, 0.2
    try:
        assert end_group(stubborn) == -9
    finally:
        module.GRACE_SECONDS = patience


def test_two_trials_at_once_do_not_disturb_each_other(tmp_path):
    trials = []
    threads = [
        threading.Thread(target=lambda n=n, m=m: trials.append(launcher(tmp_path)(n, proposal(m))))
        for n, m in enumerate(["ok", "segv"])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcome = {t.number: t.error for t in trials}
    assert outcome[0] is None
    assert "SIGSEGV" in outcome[1]


def test_the_next_trial_waits_until_the_gpus_memory_is_back(tmp_path, monkeypatch):
    levels, waited = iter([1 << 30, 9 << 30, 9 << 30, 1 << 30]), []
    monkeypatch.setattr("tuner.meters.nvml.used_memory_bytes", lambda: next(levels))
    run = launcher(tmp_path, meters=("nvml",), report=lambda number, phase: waited.append(phase))
    monkeypatch.setattr(Launcher, "_run", lambda *_: Result(error="stands for an engine on a GPU"))
    run(0, proposal())
    assert waited == ["waiting for GPU memory"] * 2
