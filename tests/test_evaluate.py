import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fakes.meters import Script

from tuner.evaluate import (
    Known,
    Launcher,
    cause_of_death,
    end_group,
    has_exited,
    judged,
    last_lines,
    out_of_memory_kills,
)
from tuner.journal import JournalError, Plan
from tuner.limits import Limit, names
from tuner.meters import MeterOptions
from tuner.meters.rapl import ROOT_VARIABLE
from tuner.space import Refused
from tuner.telemetry import Sampler
from tuner.trial import Energy, Idle, Measurement, Meter, Proposal, Target, Work
from tuner.worker import Found, Result, spending

ENGINE = Path(__file__).parent / "fakes" / "engine.py"
QUICK = Plan(windows=2, window_seconds=0.02, timeout_seconds=60, most_others=1.0)

PATIENCE_SECONDS = 30.0
"""For what happens at once on a machine that is not busy."""


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
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one too
            found += [child] if "tuner.worker" in child.cmdline() else []
    return found


def dies(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def once(happens, act):
    """A report that acts the first time that `happens` holds."""
    done = []

    def report(_number, phase):
        if not done and happens(phase):
            done.append(phase)
            act()

    return report


@pytest.fixture
def time_passes(monkeypatch):
    """Lets the time of a trial go by in a moment: no machine is too slow to come as far as the test wants before."""
    clock, passed = time.monotonic, []
    monkeypatch.setattr(time, "monotonic", lambda: clock() + sum(passed))
    return lambda: passed.append(QUICK.timeout_seconds)


def test_a_trial_is_measured_in_a_process_of_its_own(tmp_path):
    trial = launcher(tmp_path)(3, proposal())
    assert trial.error is None
    assert [m.valid for m in trial.measurements] == [True, True]
    assert trial.valid[0].work.units % 6 == 0
    assert trial.quality == "estimated"
    assert (trial.effective["cost"], trial.effective["batch"]) == (8, 1)
    assert trial.effective["pid"] != os.getpid()
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
        ("bug", "KeyError: 'n_layer'"),
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


def test_a_cause_that_the_runner_names_is_told_without_the_name_of_a_class(tmp_path):
    assert launcher(tmp_path)(0, proposal("raise")).error == "the engine is on fire"


def default(mode):
    return replace(proposal(mode), source="default")


def test_a_default_that_is_refused_from_the_start_is_no_trial(tmp_path):
    with pytest.raises(Refused, match=r"^mode=refuse: expected a mode that loads$"):
        launcher(tmp_path)(0, default("refuse"))


def test_a_default_that_fails_otherwise_is_a_failed_trial(tmp_path):
    assert launcher(tmp_path)(0, default("raise")).error == "the engine is on fire"


def test_what_is_refused_after_something_was_measured_is_a_failed_trial(tmp_path):
    launch = launcher(tmp_path)
    assert launch(0, default("ok")).error is None
    assert launch(0, default("refuse")).error == "mode=refuse: expected a mode that loads"


def test_a_failed_trial_carries_the_last_lines_of_its_log_without_control_characters(tmp_path):
    trial = launcher(tmp_path)(0, proposal("log"))
    assert any("failed to allocate buffer of size 42" in line for line in trial.log)
    assert not any("\x1b" in line for line in trial.log)


@pytest.mark.parametrize("mode", ["hang", "hang-loading"])
def test_an_engine_that_hangs_is_ended_when_its_time_is_over(tmp_path, mode):
    started = time.monotonic()
    trial = launcher(tmp_path, plan=replace(QUICK, windows=1, timeout_seconds=1.5))(0, proposal(mode))
    assert "took longer than 1.5 s" in trial.error
    assert "raise --timeout" in trial.error
    assert time.monotonic() - started < 60


def test_a_process_that_the_engine_started_does_not_outlive_the_trial(tmp_path):
    note = tmp_path / "pid"
    trial = launcher(tmp_path, target=Target(model=str(note)))(0, proposal("child"))
    assert "SIGKILL" in trial.error
    assert dies(int(note.read_text()))


def test_a_worker_ends_itself_when_the_tuner_is_killed(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_evaluate import launcher, proposal
launcher(Path({str(tmp_path)!r}))(0, proposal("hang"))
"""
    tuner = subprocess.Popen([sys.executable, "-c", code])
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not workers and time.monotonic() < deadline:
        workers = workers_of(psutil.Process(tuner.pid))
        time.sleep(0.02)
    assert workers
    time.sleep(0.5)
    tuner.kill()
    tuner.wait()
    gone, left = psutil.wait_procs(workers, timeout=PATIENCE_SECONDS)
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
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = int(note.read_text())
    assert alive(pid)
    tuner.kill()
    tuner.wait()
    assert dies(pid)


def test_windows_that_were_measured_before_the_engine_failed_are_kept_and_do_not_count(tmp_path):
    trial = launcher(tmp_path, plan=replace(QUICK, windows=50, window_seconds=0.0))(0, proposal("late"))
    assert "the engine tired" in trial.error
    assert len(trial.measurements) == 3
    assert all("the trial failed later" in m.invalid and not m.energy for m in trial.measurements)
    assert trial.joules_per_unit is None


def test_ctrl_c_ends_the_worker_before_it_leaves(tmp_path):
    seen: list[psutil.Process] = []
    others = set(psutil.Process().children())  # left by tests before this one, such as multiprocessing's tracker

    def interrupt(_number, phase):
        if "measuring" in phase and not seen:
            seen.extend(set(psutil.Process().children()) - others)
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


def test_a_cause_that_came_back_with_other_numbers_is_told_once_and_each_device_apart():
    def window(*causes):
        return Measurement(work=Work(units=1), seconds=1, energy={}, quality="measured", meter="nvml", invalid=causes)

    windows = (window("1.52 of 2 CPUs", "gpu0: 3 W"), window("1.4 of 2 CPUs", "gpu1: 3 W"))
    assert judged(Result(measurements=windows)).error == "no valid window in 2: 1.52 of 2 CPUs; gpu0: 3 W; gpu1: 3 W"


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

    phases, silent = os.pipe()
    patience, module.GRACE_SECONDS = module.GRACE_SECONDS, 0.2
    try:
        assert end_group(stubborn, phases) == -9
    finally:
        module.GRACE_SECONDS = patience
        os.close(phases)
        os.close(silent)


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


@pytest.mark.parametrize("meter", ["nvml", "wall"])
def test_the_next_trial_waits_until_the_gpus_memory_is_back(tmp_path, monkeypatch, meter):
    levels, waited = iter([1 << 30, 9 << 30, 9 << 30, 1 << 30]), []
    monkeypatch.setattr("tuner.meters.nvml.used_memory_bytes", lambda: next(levels))
    run = launcher(tmp_path, meters=(meter,), report=lambda number, phase: waited.append(phase))
    run(0, proposal("segv"))
    assert [phase for phase in waited if phase == "waiting for GPU memory"] == ["waiting for GPU memory"] * 2


# --- around the windows ----------------------------------------------------------------------


def test_an_engine_is_warmed_up_where_the_plan_says_so(tmp_path):
    seen = []
    plan = replace(QUICK, warm_up_seconds=(0.2, 2.0))
    trial = launcher(tmp_path, plan=plan, report=lambda _, phase: seen.append(phase))(0, proposal())
    assert 0.2 <= trial.warm_up.seconds < 5
    assert len(trial.warm_up.units_per_second) >= 3
    assert "warming up" in seen


def test_without_a_warm_up_in_the_plan_there_is_none_on_record(tmp_path):
    assert launcher(tmp_path)(0, proposal()).warm_up is None


def test_the_energy_of_the_whole_trial_is_more_than_that_of_its_windows(tmp_path):
    trial = launcher(tmp_path)(0, proposal())
    assert set(trial.spent) == {"cpu"}
    assert trial.spent["cpu"].joules > sum(m.joules for m in trial.valid) > 0
    assert trial.spent["cpu"].low < trial.spent["cpu"].joules < trial.spent["cpu"].high


@pytest.mark.parametrize(("mode", "known"), [("raise", True), ("late", True), ("segv", False), ("exit", False)])
def test_what_a_failed_trial_cost_is_known_when_its_process_survived(tmp_path, mode, known):
    trial = launcher(tmp_path, plan=replace(QUICK, windows=50))(0, proposal(mode))
    assert trial.error
    assert bool(trial.spent) == known


def test_idle_power_is_measured_with_the_trials_it_is_asked_for(tmp_path):
    seen = []
    run = launcher(
        tmp_path,
        idle_seconds_for=lambda number: 0.2 if number == 3 else 0.0,
        report=lambda _, phase: seen.append(phase),
    )
    trial, other = run(3, proposal()), run(4, proposal())
    # At rest the estimate is its range's power at rest, plus what Python used; nothing is loaded here.
    assert trial.idle.machine_watts > 0
    assert trial.idle.loaded_watts > 0
    assert (trial.idle.seconds, trial.idle.quality, other.idle) == (0.2, "estimated", None)
    assert "measuring idle power" in seen


def test_around_the_loaded_idle_window_clocks_fall_and_the_engine_gets_warm_again(tmp_path):
    seen = []
    plan = replace(QUICK, windows=1, warm_up_seconds=(0.6, 30.0))
    run = launcher(tmp_path, plan=plan, idle_seconds_for=lambda _: 1.0, report=lambda _, phase: seen.append(phase))
    trial = run(0, proposal())
    phases = [phase for phase, _ in itertools.groupby(seen)]
    around = phases[phases.index("warming up") :]
    assert around[:4] == ["warming up", "letting the clocks fall", "measuring idle power", "warming up"]
    # The one that the windows follow is on record.
    assert trial.warm_up.seconds >= 0.6
    assert trial.seconds >= 2 * 1.0 + 0.5 + 2 * 0.6


def test_idle_power_that_does_not_count_is_no_reason_to_fail(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOT_VARIABLE, str(rapl_tree(tmp_path)))
    run = launcher(tmp_path, meters=("rapl",), idle_seconds_for=lambda _: 0.1)
    trial = run(0, proposal())
    assert "the counter did not move" in trial.error
    assert trial.idle is None
    assert (
        "idle power was not measured: cpu0: the counter did not move"
        in (tmp_path / "trials/0000/engine.log").read_text()
    )


def rapl_tree(folder):
    """One package whose counter stands still."""
    zone = folder / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in {"name": "package-0", "energy_uj": "1000", "max_energy_range_uj": "262143328850"}.items():
        (zone / name).write_text(f"{text}\n")
    return zone.parent


def test_the_idle_machines_power_is_told_to_later_trials(tmp_path, monkeypatch):
    told = []
    idle = Idle(machine_watts=42.0, loaded_watts=50.0, seconds=10.0, quality="measured")

    def instead(self, number, *_):
        told.append((number, self.known.idle_watts))
        return Result(error="stands for an engine", idle=idle if number == 0 else None)

    monkeypatch.setattr(Launcher, "_run", instead)
    run = launcher(tmp_path)
    run(0, proposal())
    replace(run, log_name="confirm-1.log")(1, proposal())
    assert told == [(0, None), (1, 42.0)]


def test_a_trial_that_draws_less_than_half_of_the_idle_machine_does_not_count(tmp_path):
    trial = launcher(tmp_path, known=Known(idle_watts=1e6))(0, proposal())
    assert "is less than half of the 1000000.0 W of the idle machine" in trial.error


def test_waiting_for_idle_power_is_not_held_against_the_engine(tmp_path):
    plan = replace(QUICK, windows=1, timeout_seconds=3.7)
    trial = launcher(tmp_path, plan=plan, idle_seconds_for=lambda _: 1.5)(0, proposal())
    assert trial.error is None
    assert trial.seconds > 3.7


@pytest.mark.parametrize(
    ("idle", "warm_up", "allowance"),
    [(0.0, (10.0, 120.0), 0.0), (10.0, (10.0, 120.0), 145.0), (2.0, None, 5.0)],
)
def test_what_idle_power_takes_is_two_windows_a_wait_and_a_warm_up(tmp_path, idle, warm_up, allowance):
    assert launcher(tmp_path, plan=replace(QUICK, warm_up_seconds=warm_up))._allowance(idle) == allowance


def test_an_engine_that_makes_too_few_tokens_measures_nothing(tmp_path):
    trial = launcher(tmp_path)(0, proposal("short"))
    assert trial.error == "no valid window in 4: a pass brought 5 tokens, 6 were asked for (prompts x output tokens)"


# --- cooling down ----------------------------------------------------------------------------


class Thermometer:
    """What the devices show, reading by reading."""

    def __init__(self, *readings):
        self.readings = list(readings)

    def celsius(self):
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]


@pytest.fixture
def cooling(tmp_path, monkeypatch):
    """Runs trials that do nothing, and says how often each had to wait."""

    def run(trials, *readings, known=None, **plan):
        thermometer, waits = Thermometer(*readings), []
        monkeypatch.setattr(Sampler, "celsius", lambda _: thermometer.celsius())
        monkeypatch.setattr(Launcher, "_run", lambda *_: Result(error="stands for an engine"))
        monkeypatch.setattr("tuner.evaluate.COOL_PERIOD_SECONDS", 0.01)
        launch = launcher(
            tmp_path,
            plan=replace(QUICK, **{"cool_down_seconds": 60.0, **plan}),
            report=lambda n, phase: waits.append((n, phase)),
            known=known or Known(),
        )
        run.trials = [launch(number, proposal()) for number in range(trials)]
        return waits

    return run


def test_a_trial_waits_until_the_devices_are_as_cool_as_before_the_first_one(cooling):
    hot, warm, cool = {"gpu0_celsius": 70.0}, {"gpu0_celsius": 43.0}, {"gpu0_celsius": 42.0}
    assert cooling(2, {"gpu0_celsius": 40.0}, hot, warm, cool) == [(1, "cooling down")] * 2


def test_each_device_must_be_cool(cooling):
    first, second = {"gpu0_celsius": 40.0, "gpu1_celsius": 60.0}, {"gpu0_celsius": 55.0, "gpu1_celsius": 60.0}
    assert cooling(2, first, second, first) == [(1, "cooling down")]


def test_a_device_that_stays_warm_is_not_waited_for_for_ever(cooling):
    waits = cooling(2, {"gpu0_celsius": 40.0}, {"gpu0_celsius": 70.0}, cool_down_seconds=0.5)
    assert 1 <= len(waits) <= 50


@pytest.mark.parametrize(
    ("readings", "plan"),
    [
        ([{}, {"gpu0_celsius": 90.0}], {}),
        ([{"gpu0_celsius": 40.0}, {}], {}),
        ([{"gpu0_celsius": 40.0}, {"gpu0_celsius": 90.0}], {"cool_down_seconds": 0.0}),
    ],
    ids=["unknown at first", "unknown later", "not asked for"],
)
def test_without_a_temperature_or_the_wish_there_is_no_wait(cooling, readings, plan):
    assert cooling(3, *readings, **plan) == []


def test_a_trial_records_the_temperatures_that_it_starts_with(cooling):
    hot, cool = {"gpu0_celsius": 70.0}, {"gpu0_celsius": 41.0}
    cooling(2, {"gpu0_celsius": 40.0}, hot, cool)
    assert [t.start_celsius for t in cooling.trials] == [{"gpu0_celsius": 40.0}, cool]


def test_a_cool_down_that_was_not_reached_shows_in_the_record(cooling):
    cooling(2, {"gpu0_celsius": 40.0}, {"gpu0_celsius": 70.0}, cool_down_seconds=0.05)
    assert cooling.trials[1].start_celsius == {"gpu0_celsius": 70.0}


def test_a_trial_that_does_not_cool_down_records_its_temperatures_all_the_same(cooling):
    cooling(1, {"gpu0_celsius": 40.0}, cool_down_seconds=0.0)
    assert cooling.trials[0].start_celsius == {"gpu0_celsius": 40.0}


def test_a_resumed_study_cools_down_to_where_its_first_trial_began(cooling):
    hot, cool = {"gpu0_celsius": 70.0}, {"gpu0_celsius": 40.0}
    assert cooling(1, hot, cool, known=Known(celsius={"gpu0_celsius": 40.0})) == [(0, "cooling down")]


# --- with a GPU's counter --------------------------------------------------------------------


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU that the driver's stand-in shows to this process and to the worker."""
    fakes = Path(__file__).parent / "fakes"
    monkeypatch.syspath_prepend(fakes)
    monkeypatch.setenv("PYTHONPATH", str(fakes), prepend=os.pathsep)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("TUNE_FAKE_NVML", str(tmp_path / "nvml.json"))
    facts = {"uuid": "GPU-a", "watts": 200, "celsius": 60, "sm_mhz": 1980, "limit": 700, "reasons": 4}

    def change(**more):
        facts.update(more)
        (tmp_path / "nvml.json").write_text(json.dumps({"gpus": [facts]}))

    change()
    yield change
    sys.modules.pop("pynvml", None)


def test_a_gpus_trial_has_edges_on_ticks_telemetry_and_idle_power(tmp_path, gpu):
    plan = replace(QUICK, windows=1, window_seconds=1.3)
    trial = launcher(tmp_path, meters=("nvml",), plan=plan, idle_seconds_for=lambda _: 0.3)(0, proposal())
    assert trial.error is None
    (window,) = trial.valid
    assert window.aligned
    assert window.telemetry.spans["gpu0_sm_mhz"].mean == 1980
    assert window.telemetry.throttled == ("gpu0: software power cap",)
    start, end = window.readings["gpu0"]
    assert window.energy["gpu0"].joules == pytest.approx((end - start) / 1e6)
    assert trial.idle.machine_watts == pytest.approx(200, rel=0.02)
    assert trial.idle.loaded_watts == pytest.approx(200, rel=0.02)


@pytest.mark.parametrize(
    ("facts", "most_others", "cause"),
    [
        ({"reasons": 64}, 1.0, "gpu0: the hardware ran slower than asked (hardware thermal slowdown)"),
        ({"processes": [4194305]}, 0.99, "gpu0: process 4194305 is on it too"),
        ({"limit": 100}, 1.0, "gpu0: 200 W is far above its power limit of 100 W"),
    ],
    ids=["throttled", "not alone", "implausible"],
)
def test_what_a_gpu_says_makes_windows_invalid(tmp_path, gpu, facts, most_others, cause):
    gpu(**facts)
    plan = replace(QUICK, windows=1, window_seconds=1.3, retries=0, most_others=most_others)
    trial = launcher(tmp_path, meters=("nvml",), plan=plan)(0, proposal())
    assert trial.error.startswith(f"no valid window in 1: {cause}")
    assert trial.spent["gpu0"].joules > 200


AT_THE_WALL = {
    "meters": ("wall",),
    "meter_options": MeterOptions.parse(wall_command="echo 300 W", wall_interval=0.5).record(),
}


def test_what_a_gpu_says_makes_windows_at_the_wall_invalid_too(tmp_path, gpu):
    gpu(processes=[4194305])
    plan = replace(QUICK, windows=1, window_seconds=0.1, retries=0, most_others=0.99)
    trial = launcher(tmp_path, plan=plan, **AT_THE_WALL)(0, proposal())
    assert trial.error.startswith("no valid window in 1: gpu0: process 4194305 is on it too")
    assert trial.start_celsius["gpu0_celsius"] == 60


def test_a_window_of_sampled_power_is_not_called_aligned(tmp_path):
    plan = replace(QUICK, windows=1, window_seconds=1.3)
    (window,) = launcher(tmp_path, plan=plan, **AT_THE_WALL)(0, proposal()).valid
    assert (window.quality, window.aligned) == ("sampled", False)
    assert window.joules / window.seconds == pytest.approx(300, rel=0.01)


def test_a_trial_whose_meter_cannot_be_opened_cost_nobody_knows_what(tmp_path, gpu):
    gpu(errors={"nvmlDeviceGetTotalEnergyConsumption": 15})
    trial = launcher(tmp_path, meters=("nvml",))(0, proposal())
    assert "fell off the bus" in trial.error
    assert trial.spent == {}


# --- what a trial cost -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readings", "microjoules"),
    [
        ((5, 9, 30), 25),
        (("cpu0: unreadable", 9, 30), None),
        ((5, "cpu0: came too late", 30), None),
        ((5, 9, "cpu0: gone"), None),
    ],
    ids=["good", "first", "in the middle", "last"],
)
def test_the_whole_energy_is_known_when_every_reading_was_good(readings, microjoules):
    found = Found()
    with spending(Script(*readings), found) as meter:
        meter.forget_fault()
    assert found.spent == ({} if microjoules is None else {"cpu0": Energy(*[microjoules / 1e6] * 3)})


def test_the_meter_that_is_watched_is_still_that_meter():
    script = Script(5, 9, 30)
    script.wraps = {"cpu0": 2}
    with spending(script, Found()) as meter:
        assert isinstance(meter, Meter)
        assert (meter.name, meter.domains(), meter.wraps) == ("script", ("cpu0",), {"cpu0": 2})
        meter.close()


# --- what an engine leaves ---------------------------------------------------------------------


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """A launcher of engines with a file that only their own end takes away, and a check that nothing is left."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    target = Target(prompts=2, output_tokens=3, model=str(tmp_path / "held"))
    run = launcher(tmp_path, target=target, changeable=frozenset({"batch"}))
    yield run
    run.known.close()


def left(folder):
    """What is there of an engine's resource and of the temporary files."""
    return [path.name for path in (folder / "held", *(folder / "scratch").rglob("*")) if path.exists()]


def nothing_left(folder):
    """Whether all of it goes; the time is what a loaded machine may take, and no claim."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while left(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not left(folder)


def test_a_held_engine_ends_in_order_when_it_is_given_back(serving, tmp_path):
    assert serving(0, proposal("served")).error is None
    assert "held" in left(tmp_path)
    serving.known.close()
    assert left(tmp_path) == []


def test_a_held_engine_ends_in_order_before_another_one_is_launched(serving, tmp_path):
    assert serving(0, proposal("served")).error is None
    assert serving(1, proposal()).error is None
    assert not (tmp_path / "held").exists()


@pytest.mark.parametrize(
    ("mode", "error"),
    [("served-raise", "on fire"), ("served-unready", "answers with nonsense"), ("served-segv", "SIGSEGV")],
)
def test_an_engine_ends_in_order_after_a_failed_trial(serving, tmp_path, mode, error):
    assert error in serving(0, proposal(mode)).error
    assert nothing_left(tmp_path)


@pytest.fixture
def hanging(serving, tmp_path, time_passes):
    """As `serving`, but the time of a trial is over once its engine has begun to hang."""
    told = []

    def report(_number, phase):
        if "measuring" in phase:
            told.append(phase)
            # Told at each tick: by the fourth the pass has begun.
            if len(told) == 4:
                assert "held" in left(tmp_path)
                time_passes()

    return replace(serving, report=report)


def test_an_engine_ends_in_order_when_the_time_of_its_trial_is_over(hanging, tmp_path):
    assert "took longer than" in hanging(0, proposal("served-hang")).error
    assert left(tmp_path) == []


@pytest.fixture
def slow(serving, monkeypatch):
    """As `serving`, but nothing is held and the engine takes 2 s to stop; a worker that says nothing has half of it."""
    monkeypatch.setenv("FAKE_ENGINE_STOP_SECONDS", "2")
    monkeypatch.setattr("tuner.evaluate.GRACE_SECONDS", 1.0)
    monkeypatch.setattr("tuner.evaluate.SILENT_SECONDS", 0.2)
    return replace(serving, changeable=frozenset())


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["served", "served-raise", "served-unready"])
def test_ctrl_c_while_an_engine_is_being_stopped_lets_it_end_in_order(slow, tmp_path, mode):
    report = once(lambda _: (tmp_path / "asked").exists(), interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace(slow, report=report)(0, proposal(mode))
    assert left(tmp_path) == []
    assert (tmp_path / "asked").read_text() == "asked;"


def test_ctrl_c_while_an_engine_that_was_held_is_being_stopped_lets_it_end_in_order(slow, tmp_path):
    report = once(lambda phase: phase == "stopping the engine", interrupt)
    holding = replace(slow, changeable=frozenset({"batch"}), report=report)
    assert holding(0, proposal("served")).error is None
    with pytest.raises(KeyboardInterrupt):
        holding(1, proposal())
    assert left(tmp_path) == []


def test_a_trial_is_in_time_whose_engine_takes_long_to_stop(slow, tmp_path, monkeypatch, time_passes):
    monkeypatch.setattr("tuner.evaluate.LEAVE_SECONDS", 2 * QUICK.timeout_seconds)
    seen = []

    def stopping():
        seen.append(left(tmp_path))
        time_passes()

    run = replace(slow, report=once(lambda _: (tmp_path / "asked").exists(), stopping))
    assert run(0, proposal("served")).error is None
    assert "held" in seen[0]
    assert left(tmp_path) == []


def test_what_was_measured_counts_also_where_its_worker_is_killed_while_the_engine_stops(slow, tmp_path):
    def kill():
        for worker in workers():
            worker.kill()

    run = replace(slow, report=once(lambda _: (tmp_path / "asked").exists(), kill))
    trial = run(0, proposal("served"))
    assert (trial.error, len(trial.valid)) == (None, 2)
    assert nothing_left(tmp_path)


def workers():
    return workers_of(psutil.Process())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_engine_ends_in_order_when_its_worker_is_sent_a_signal(serving, tmp_path, number):
    sent = []

    def send(_number, phase):
        if "measuring" in phase and not sent:
            sent.extend(workers())
            for worker in sent:
                worker.send_signal(number)

    run = replace(serving, report=send)
    assert f"the engine was killed by {signal.Signals(number).name}" in run(0, proposal("served-hang")).error
    assert nothing_left(tmp_path)


def test_ctrl_c_waits_for_the_engine_to_end_in_order(serving, tmp_path):
    def interrupt(_number, phase):
        if "measuring" in phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(serving, report=interrupt)(0, proposal("served-hang"))
    assert left(tmp_path) == []


def test_a_worker_that_hears_nothing_is_killed_and_its_engine_still_ends_in_order(hanging, tmp_path, monkeypatch):
    monkeypatch.setattr("tuner.evaluate.GRACE_SECONDS", 0.2)
    monkeypatch.setattr("tuner.evaluate.LEAVE_SECONDS", 600.0)
    started = time.perf_counter()
    assert "took longer than" in hanging(0, proposal("served-deaf")).error
    assert time.perf_counter() - started < 60
    assert nothing_left(tmp_path)


def test_who_waits_for_an_engine_to_end_is_told_so(serving, monkeypatch):
    monkeypatch.setattr("tuner.evaluate.SILENT_SECONDS", 0.0)
    told = []
    replace(serving, report=lambda _, phase: told.append(phase))(0, proposal("served"))
    serving.known.close()
    assert told[-1] == "stopping the engine"


def test_a_second_ctrl_c_does_not_wait(serving, tmp_path, monkeypatch):
    monkeypatch.setattr("tuner.evaluate.SILENT_SECONDS", 0.0)
    monkeypatch.setattr("tuner.evaluate.GRACE_SECONDS", 600.0)
    seen = []

    def interrupt(_number, phase):
        if phase == "stopping the engine" or "measuring" in phase:
            seen.append((phase, time.monotonic(), workers()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(serving, report=interrupt)(0, proposal("served-deaf"))
    (_, _, running), (phase, asked, _) = seen
    assert phase == "stopping the engine"
    assert time.monotonic() - asked < 60
    assert running
    assert not any(alive(p.pid) for p in running)
    assert nothing_left(tmp_path)


KILLED = """
import sys, time; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_evaluate import Target, launcher, proposal
folder, mode = Path(sys.argv[2]), sys.argv[3]
run = launcher(
    folder,
    target=Target(prompts=2, output_tokens=3, model=str(folder / "held")),
    changeable=frozenset({"batch"}),
    report=lambda _, phase: print(phase, flush=True) if "measuring" in phase else None,
)
run(0, proposal(mode))
time.sleep(60)
"""


@pytest.mark.parametrize("mode", ["served", "served-hang"], ids=["held", "at work"])
def test_an_engine_ends_in_order_and_its_files_go_when_the_tuner_is_killed(tmp_path, mode):
    (tmp_path / "scratch").mkdir()
    tuner = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), mode],
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
        stdout=subprocess.PIPE,
    )
    assert tuner.stdout.readline().startswith(b"measuring")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while mode == "served" and not list(tmp_path.glob("scratch/*/result-0.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "held" in left(tmp_path)
    tuner.kill()
    tuner.wait()
    tuner.stdout.close()
    assert nothing_left(tmp_path)


ORPHANS = """
import ctypes, sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import psutil
from test_evaluate import Target, launcher, proposal
# What nobody waits for becomes this process's child instead of the first one's (PR_SET_CHILD_SUBREAPER, prctl(2)).
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
folder = Path(sys.argv[2])
run = launcher(folder, target=Target(prompts=2, output_tokens=3, model=str(folder / "held")))
assert run(0, proposal(sys.argv[3])).error is None
print([child.status() for child in psutil.Process().children()])
"""


@pytest.mark.parametrize("mode", ["ok", "served"])
def test_a_trial_leaves_no_zombie(tmp_path, mode):
    words = [sys.executable, "-c", ORPHANS, str(Path(__file__).parent), str(tmp_path), mode]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "[]\n"


# --- an engine that is held between trials ---------------------------------------------------


@pytest.fixture
def holding(tmp_path):
    run = launcher(tmp_path, changeable=frozenset({"batch"}))
    yield run
    run.known.close()


def pid_of(trial):
    return trial.effective["pid"]


def test_what_needs_no_restart_is_measured_on_the_engine_that_runs(holding):
    trials = [holding(n, proposal(batch=b)) for n, b in enumerate((1, 2, 4))]
    assert [t.error for t in trials] == [None] * 3
    assert len({pid_of(t) for t in trials}) == 1
    assert [t.reused for t in trials] == [False, True, True]
    assert [t.effective["batch"] for t in trials] == [1, 2, 4]
    assert [len(t.valid) for t in trials] == [2, 2, 2]
    assert trials[2].joules_per_unit < trials[0].joules_per_unit


def test_loading_is_timed_and_metered_where_there_was_any(holding):
    first, second = (holding(n, proposal(batch=n + 1)) for n in range(2))
    assert first.load_seconds > 0
    assert first.load_energy["cpu"].joules > 0
    assert second.load_seconds is None
    assert second.load_energy == {}
    assert second.spent["cpu"].joules > sum(m.joules for m in second.valid)


def test_another_launch_parameter_starts_another_engine_and_ends_the_one_before(holding):
    first = holding(0, proposal(cost=8))
    second = holding(1, proposal(cost=16))
    assert not second.reused
    assert not alive(pid_of(first))
    assert alive(pid_of(second))


def test_nothing_is_left_running_once_the_engine_is_given_back(holding):
    pid = pid_of(holding(0, proposal()))
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    assert alive(pid)
    holding.known.close()
    assert not alive(pid)
    assert len(list(Path("/proc/self/fd").iterdir())) < descriptors
    holding.known.close()


def test_an_engine_that_refuses_a_change_is_a_failed_trial_and_the_next_one_is_launched_anew(holding):
    first = holding(0, proposal(batch=1))
    refused = holding(1, proposal(batch=7))
    assert "seven is refused while running" in refused.error
    after = holding(2, proposal(batch=2))
    assert after.error is None
    assert not after.reused
    assert pid_of(after) != pid_of(first)


def test_an_engine_that_died_while_it_was_held_is_launched_anew(holding):
    pid = pid_of(holding(0, proposal(batch=1)))
    psutil.Process(pid).kill()
    while alive(pid):
        time.sleep(0.01)
    after = holding(1, proposal(batch=2))
    assert after.error is None
    assert not after.reused


def test_an_engine_that_dies_as_it_is_given_its_next_job_is_not_held_against_that_job(holding, monkeypatch):
    pid = pid_of(holding(0, proposal(batch=1)))
    hand_on = Launcher._hand_on

    def killed_before(self, held, *job):
        psutil.Process(pid).kill()
        hand_on(self, held, *job)

    monkeypatch.setattr(Launcher, "_hand_on", killed_before)
    after = holding(1, proposal(batch=2))
    assert after.error is None
    assert not after.reused


def test_an_engine_that_crashes_in_a_later_trial_says_so_in_that_trial(holding):
    assert holding(0, proposal()).error is None
    crashed = replace(holding, changeable=frozenset({"batch", "mode"}))(1, proposal("segv"))
    assert "SIGSEGV" in crashed.error
    assert crashed.measurements == ()


def test_a_held_engine_that_hangs_is_ended_when_its_time_is_over(tmp_path, time_passes):
    run = launcher(tmp_path, changeable=frozenset({"mode"}))
    pid = pid_of(run(0, proposal()))
    hangs = replace(run, report=once(lambda phase: "measuring" in phase, time_passes))
    assert "took longer than 60 s" in hangs(1, proposal("hang")).error
    assert not alive(pid)


def test_a_launcher_that_holds_nothing_never_measures_on_a_held_engine(holding):
    pid = pid_of(holding(0, proposal(batch=1)))
    fresh = replace(holding, changeable=frozenset())(1, proposal(batch=1))
    assert not fresh.reused
    assert pid_of(fresh) != pid
    assert not alive(pid)
    assert not alive(pid_of(fresh))


def test_a_held_engine_ends_when_the_tuner_is_killed(tmp_path):
    script = (
        "import sys, time; sys.path[:0] = [sys.argv[1]]\n"
        "from pathlib import Path\n"
        "from test_evaluate import launcher, proposal\n"
        "trial = launcher(Path(sys.argv[2]), changeable=frozenset({'batch'}))(0, proposal())\n"
        "print(trial.effective['pid'], flush=True); time.sleep(60)\n"
    )
    here = str(Path(__file__).parent)
    tuner = subprocess.Popen([sys.executable, "-c", script, here, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pid = int(tuner.stdout.readline())
    assert alive(pid)
    tuner.kill()
    tuner.wait()
    tuner.stdout.close()
    assert dies(pid)


# --- limits and quality ----------------------------------------------------------------------


def limits(*texts):
    return tuple(Limit.parse(text, (*names("token"), "compile_seconds")) for text in texts)


def test_a_configuration_that_breaks_a_limit_is_measured_shown_and_has_no_energy_to_be_the_best(tmp_path):
    trial = launcher(tmp_path, limits=limits("tokens_per_s>=1e9"))(0, proposal())
    assert trial.over_limit
    assert trial.error.startswith("under the limit: tokens_per_s ")
    assert trial.joules_per_unit is None
    assert trial.shown_joules_per_unit > 0
    assert trial.launches == ()
    assert len(trial.valid) == 2


def test_a_configuration_within_its_limits_is_a_trial_like_any_other(tmp_path):
    trial = launcher(tmp_path, limits=limits("tokens_per_s>=1", "compile_seconds<=2"))(0, proposal())
    assert (trial.error, trial.over_limit) == (None, False)


def test_a_limit_on_what_the_engine_does_not_report_is_refused_with_what_it_does(tmp_path):
    with pytest.raises(Refused, match=r"this engine reports no ttft_p95_s.*it reports tokens_per_s"):
        launcher(tmp_path, limits=limits("ttft_p95_s<=1"))(0, proposal())


def test_an_engine_that_failed_broke_no_limit(tmp_path):
    trial = launcher(tmp_path, limits=limits("ttft_p95_s<=1"))(0, proposal("raise"))
    assert not trial.over_limit
    assert "on fire" in trial.error


def test_quality_is_measured_against_what_the_default_put_out(tmp_path):
    run = launcher(tmp_path, target=Target(prompts=2, output_tokens=3, quality=True))
    default, worse = run(0, default_proposal(batch=2)), run(1, proposal(batch=5))
    assert default.metrics["quality_loss"] == 0
    assert worse.metrics["quality_loss"] == pytest.approx(0.03)
    assert worse.figures["compile_seconds"] == 1.5


def default_proposal(**values):
    return replace(proposal(**values), source="default")


def test_without_the_defaults_output_nothing_is_held_against_itself(tmp_path):
    target = Target(prompts=2, output_tokens=3, quality=True)
    assert "quality_loss" not in launcher(tmp_path, target=target)(1, proposal(batch=5)).metrics
    limited = launcher(tmp_path, target=target, limits=limits("quality_loss<=0.01"))(2, proposal(batch=5))
    assert "cannot be judged" in limited.error
    assert not limited.over_limit


def test_another_segment_is_not_held_against_the_output_of_the_one_before(tmp_path):
    run = launcher(tmp_path, target=Target(prompts=2, output_tokens=3, quality=True))
    run(0, default_proposal(batch=2))
    elsewhere = replace(run, segment=1)(1, default_proposal(batch=5))
    assert elsewhere.metrics["quality_loss"] == 0


def test_quality_is_not_measured_where_nobody_asked_for_it(tmp_path):
    assert "quality_loss" not in launcher(tmp_path)(0, proposal()).metrics


def test_a_limit_on_quality_makes_a_lossy_configuration_fail(tmp_path):
    target = Target(prompts=2, output_tokens=3, quality=True)
    run = launcher(tmp_path, target=target, limits=limits("quality_loss<=0.01"))
    assert run(0, default_proposal(batch=2)).error is None
    assert run(1, proposal(batch=5)).error == "over the limit: quality_loss 0.03 > 0.01"
