"""Power control against a fake driver whose settings outlive the processes that made them.

`python tests/test_control.py [ROUNDS] [SEED]` kills a tuner at random moments and prints what became of the GPU.
"""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuner import control
from tuner.control import (
    AUTO,
    CLOCK,
    POWER,
    ControlError,
    Ledger,
    PowerControl,
    commands,
    knobs,
    pending,
    restore,
    split,
    spread,
)
from tuner.files import state_folder
from tuner.space import Refused, SearchSpace

FAKES = Path(__file__).parent / "fakes"

SM_CLOCKS = list(range(1980, 209, -15))
FACTS = {
    "name": "NVIDIA H100",
    "watts": 100,
    "limit": 300.25,
    "default_limit": 350,
    "limit_range": [100, 350],
    "sm_clocks": SM_CLOCKS,
    "sm_mhz": 345,
    "utilization": 0,
    "reasons": 1,
    "persistence": 1,
}


def unmeasured():
    """The environment of processes that are killed or cannot write: half of a coverage file is none."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COV")}


class Gpus:
    """The machine as the fake driver sees it; every change is seen at the next call."""

    def __init__(self, folder):
        self.folder = folder
        self.facts = {"gpus": []}
        self.environment = {
            "PYTHONPATH": str(FAKES),
            "TUNE_FAKE_NVML": str(folder / "nvml.json"),
            "TUNE_FAKE_NVML_STATE": str(folder / "settings.json"),
            "TUNE_STATE": str(folder / "state"),
        }

    def add(self, uuid="GPU-aaaa", **facts):
        self.facts["gpus"].append({"uuid": uuid, "pci": [0, len(self.facts["gpus"]) + 1, 0], **FACTS, **facts})
        return self.write()

    def change(self, index=0, **facts):
        self.facts["gpus"][index] |= facts
        return self.write()

    def fail(self, index=0, **codes):
        return self.change(index, errors={f"nvmlDevice{name}": code for name, code in codes.items()})

    def write(self):
        (self.folder / "nvml.json").write_text(json.dumps(self.facts))
        return self

    def settings(self, uuid="GPU-aaaa"):
        """Power limit in W and locked clock in MHz, as the driver keeps them."""
        path = self.folder / "settings.json"
        own = json.loads(path.read_text()).get(uuid, {}) if path.exists() else {}
        limit = next(g["limit"] for g in self.facts["gpus"] if g["uuid"] == uuid)
        locked = own.get("locked_mhz")
        return own.get("limit_mw", 1000 * limit) / 1000, locked[0] if locked else None

    def calls(self, uuid="GPU-aaaa"):
        path = self.folder / "settings.json"
        return json.loads(path.read_text()).get(uuid, {}).get("calls", {}) if path.exists() else {}

    def somebody_sets(self, watts, uuid="GPU-aaaa"):
        path = self.folder / "settings.json"
        state = json.loads(path.read_text()) if path.exists() else {}
        state.setdefault(uuid, {})["limit_mw"] = 1000 * watts
        path.write_text(json.dumps(state))

    def ledger(self, uuid="GPU-aaaa"):
        return self.folder / "state" / "power" / f"{uuid}.json"

    def leave_changed(self, uuid="GPU-aaaa", watts=200, **changes):
        """What a run leaves that is killed together with its watchdog."""
        parts = {"model": "NVIDIA H100", "observed_milliwatts": 300_250, "pid": 4, "started_unix": 1.0}
        parts |= {"set_milliwatts": (300_250, 1000 * watts)}
        control._write(Ledger(uuid=uuid, **(parts | changes)))
        self.somebody_sets(watts, uuid)

    def start(self, code, *arguments, environment=None):
        """A process that uses the same GPUs."""
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=(unmeasured() if environment is None else environment) | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    gpus = Gpus(tmp_path).write()
    monkeypatch.syspath_prepend(FAKES)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    for name, value in gpus.environment.items():
        monkeypatch.setenv(name, value)
    yield gpus
    sys.modules.pop("pynvml", None)


@pytest.fixture
def gpu(gpus):
    return gpus.add()


@pytest.fixture
def said():
    return []


@pytest.fixture
def without_coverage(monkeypatch):
    for name in os.environ.keys() - unmeasured().keys():
        monkeypatch.delenv(name)


def nothing(_):
    pass


def held(said=None, parameters=None):
    return PowerControl(knobs() if parameters is None else parameters, nothing if said is None else said.append)


def eventually(true, seconds=20):
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.01)


# --- knobs -----------------------------------------------------------------------------------


def test_the_limit_is_asked_from_the_device_and_its_default_is_what_is_set_now(gpu):
    limit = knobs()[0]
    assert (limit.name, limit.low, limit.high, limit.default) == (POWER, 100, 350, 300)
    assert (limit.lever, limit.scope, limit.effect) == ("power", "live", "exact")


@given(
    least=st.integers(1000, 500_000),
    width=st.integers(2000, 500_000),
    share=st.floats(0, 1),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_value_of_the_limit_lies_within_what_the_device_takes(gpu, least, width, share):
    gpu.change(limit_range=[least / 1000, (least + width) / 1000], limit=(least + share * width) / 1000)
    limit = knobs()[0]
    assert least - 1 <= 1000 * limit.low  # the fake cuts W to mW
    assert 1000 * limit.high <= least + width
    assert limit.low <= limit.default <= limit.high


def test_the_clock_is_one_of_a_few_supported_ones_and_auto_above_them(gpu):
    clock = knobs()[1]
    assert (clock.name, clock.default, clock.ordered) == (CLOCK, AUTO, True)
    assert (clock.values[0], clock.values[-2:], len(clock.values)) == (210, (1980, AUTO), 13)
    assert set(clock.values[:-1]) <= set(SM_CLOCKS)
    assert (clock.lever, clock.scope, clock.effect) == ("clock", "live", "exact")
    assert clock.neighbours(AUTO) == (1980,)
    assert clock.narrow("1665..auto").values == (1665, 1815, 1980, AUTO)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=200, unique=True).map(sorted), st.integers(2, 20))
def test_a_spread_keeps_order_and_both_ends(values, most):
    chosen = spread(values, most)
    assert len(chosen) == min(most, len(values))
    assert list(chosen) == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (values[0], values[-1])


def test_a_space_takes_the_knobs_as_they_are(gpu):
    space = SearchSpace(knobs())
    assert space.default() == {POWER: 300, CLOCK: AUTO}
    assert space.check({POWER: 200, CLOCK: 1980}) == {POWER: 200, CLOCK: 1980}
    assert space.pin(CLOCK, "auto")[CLOCK].size == 1


def test_several_gpus_have_the_values_that_all_of_them_take(gpus):
    gpus.add("GPU-aaaa").add("GPU-bbbb", limit_range=[150.5, 320.9], sm_clocks=[1800, 1200, 345])
    limit, clock = knobs()
    assert (limit.low, limit.high) == (151, 320)
    assert clock.values == (345, 1200, 1800, AUTO)


def test_only_the_gpus_that_the_engine_sees_are_asked(gpus, monkeypatch):
    gpus.add("GPU-aaaa", limit=100).add("GPU-bbbb")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert knobs()[0].default == 300


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        (
            {"limit": 250},
            r"different power limits \(300 W on .*GPU-aaaa.*, 250 W on .*GPU-bbbb.*sudo nvidia-smi .*-pl 300",
        ),
        ({"limit_range": [400, 500]}, r"no power limit suits all GPUs \(100 to 350 W on .*400 to 500 W on"),
        ({"sm_clocks": [1234]}, "no SM clock is supported by all"),
        (
            {"errors": {"nvmlDeviceGetPowerManagementLimit": 15}},
            "GPU-bbbb.*cannot read its power limit.*fell off the bus",
        ),
    ],
)
def test_gpus_that_cannot_be_tuned_together_are_refused(gpus, facts, sentence):
    gpus.add("GPU-aaaa").add("GPU-bbbb", **facts)
    with pytest.raises(Refused, match=sentence):
        knobs()


@pytest.mark.parametrize(("missing", "left"), [("limit_range", CLOCK), ("sm_clocks", POWER)])
def test_a_knob_that_a_gpu_lacks_is_left_out_and_said_to_be(gpu, said, missing, left):
    gpu.change(**{missing: None})
    assert [p.name for p in knobs(said.append)] == [left]
    assert len(said) == 1
    assert said[0].startswith("not tuned: NVIDIA H100 (GPU-aaaa): cannot")


def test_a_gpu_without_any_knob_is_refused(gpu):
    gpu.change(limit_range=None, sm_clocks=None)
    with pytest.raises(Refused, match=r"power limit.*does not support it; .*clocks.*leave --allow-power-control out"):
        knobs()


def test_without_gpu_or_driver_the_next_step_is_named(gpus, monkeypatch):
    with pytest.raises(Refused, match="no GPU; nvidia-smi -L"):
        knobs()
    gpus.facts["init_error"] = 12
    gpus.write()
    with pytest.raises(Refused, match="no NVIDIA driver"):
        knobs()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(Refused, match=r"nvidia-ml-py cannot be imported.*pip install"):
        knobs()


def test_what_a_killed_run_left_is_put_back_before_it_is_taken_for_the_default(gpu, said):
    gpu.leave_changed(watts=200)
    assert knobs(said.append)[0].default == 300
    assert said == [
        "after a run that was killed (process 4): NVIDIA H100 (GPU-aaaa): its power limit is back at 300.25 W"
    ]


def test_the_engine_never_sees_what_is_set_on_the_gpus():
    assert split({"threads": 4, POWER: 200, "batch": 1, CLOCK: AUTO}) == (
        {"threads": 4, "batch": 1},
        {POWER: 200, CLOCK: AUTO},
    )


def test_what_is_set_on_the_gpus_can_be_typed_by_a_person():
    assert commands({POWER: 200, CLOCK: 1335}, ["GPU-aaaa", "GPU-bbbb"]) == [
        "sudo nvidia-smi -i GPU-aaaa,GPU-bbbb -pl 200",
        "sudo nvidia-smi -i GPU-aaaa,GPU-bbbb -lgc 1335,1335",
    ]
    assert commands({CLOCK: AUTO}, ["GPU-aaaa"]) == []


# --- setting and putting back ----------------------------------------------------------------


def test_a_limit_and_a_clock_are_set_and_what_was_observed_is_put_back(gpu, said):
    """Observed are 300.25 W, which are neither whole watts nor the device's default."""
    with held(said) as control:
        control.apply({POWER: 200, CLOCK: 1335})
        assert gpu.settings() == (200, 1335)
        assert gpu.ledger().exists()
    assert gpu.settings() == (300.25, None)
    assert not gpu.ledger().exists()
    assert said == [
        "NVIDIA H100 (GPU-aaaa): its power limit is back at 300.25 W",
        "NVIDIA H100 (GPU-aaaa): its clock is unlocked",
    ]


def test_what_was_there_before_the_first_change_is_told_for_the_record(gpus):
    gpus.add("GPU-aaaa").add("GPU-bbbb", limit=300, persistence=None)
    with held() as control:
        assert control.observed == {
            "gpu0": "NVIDIA H100 (GPU-aaaa), power limit 300.25 W, clock not locked, persistence mode on",
            "gpu1": "NVIDIA H100 (GPU-bbbb), power limit 300 W, clock not locked",
        }


def test_each_visible_gpu_is_set_and_put_back_to_its_own_limit(gpus):
    gpus.add("GPU-aaaa").add("GPU-bbbb", limit=299.75)
    with held() as control:
        control.apply({POWER: 200, CLOCK: 1335})
        assert [gpus.settings(uuid) for uuid in ("GPU-aaaa", "GPU-bbbb")] == [(200, 1335), (200, 1335)]
    assert [gpus.settings(uuid) for uuid in ("GPU-aaaa", "GPU-bbbb")] == [(300.25, None), (299.75, None)]


def test_the_default_stands_for_the_observed_limit_and_for_an_unlocked_clock(gpu):
    with held() as control:
        control.apply({POWER: 200, CLOCK: 1335})
        control.apply({POWER: 300, CLOCK: AUTO})
        assert gpu.settings() == (300.25, None)


def test_what_stays_the_same_is_not_set_again(gpu):
    with held() as control:
        before = gpu.calls()
        control.apply({POWER: 300, CLOCK: AUTO})
        assert gpu.calls() == before
        control.apply({POWER: 200, CLOCK: 1335})
        once = gpu.calls()
        control.apply({POWER: 200, CLOCK: 1335})
        control.apply({})
        assert gpu.calls() == once
        assert gpu.settings() == (200, 1335)


def test_a_run_that_changed_nothing_puts_nothing_back(gpu, said):
    with held(said):
        before = gpu.calls()
    assert gpu.calls() == before
    assert said == []


def test_an_exception_inside_puts_back_as_well(gpu):
    def fail():
        with held() as control:
            control.apply({POWER: 200, CLOCK: 1335})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert gpu.settings() == (300.25, None)


def test_a_pinned_clock_is_left_alone_even_where_it_looks_locked(gpu):
    gpu.change(reasons=0, sm_mhz=1335)
    with held(parameters=SearchSpace(knobs()).pin(CLOCK, "auto").parameters) as control:
        control.apply({POWER: 200, CLOCK: AUTO})
        assert gpu.settings() == (200, None)
    assert "nvmlDeviceResetGpuLockedClocks" not in gpu.calls()


def test_a_clock_can_be_tuned_where_the_limit_cannot(gpu):
    gpu.change(limit_range=None)
    with held() as control:
        control.apply({CLOCK: 1335})
        assert control.observed == {"gpu0": "NVIDIA H100 (GPU-aaaa), clock not locked, persistence mode on"}
        assert gpu.settings()[1] == 1335
    assert gpu.settings()[1] is None


def test_a_driver_that_forgets_settings_when_it_unloads_is_said_once(gpus, said):
    gpus.add("GPU-aaaa", persistence=0).add("GPU-bbbb", persistence=0)
    with held(said):
        pass
    assert len(said) == 1
    assert "persistence mode is off on NVIDIA H100 (GPU-aaaa), NVIDIA H100 (GPU-bbbb)" in said[0]
    assert "sudo nvidia-smi -pm 1" in said[0]


# --- a GPU that does not do it ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "config", "sentence"),
    [
        ({"deaf": True}, {POWER: 200}, "was set to 200 W, it keeps to 300.25 W"),
        ({"enforces": 150}, {POWER: 200}, "was set to 200 W, it keeps to 150 W"),
        ({"deaf": True, "sm_mhz": 1980}, {CLOCK: 1335}, "was locked at 1335 MHz, it runs at 1980 MHz"),
        ({"errors": {"nvmlDeviceSetPowerManagementLimit": 999}}, {POWER: 200}, "cannot set its power limit to 200 W"),
        ({"errors": {"nvmlDeviceSetGpuLockedClocks": 3}}, {CLOCK: 1335}, "cannot lock its SM clock at 1335 MHz"),
        ({"errors": {"nvmlDeviceSetGpuLockedClocks": 20}}, {CLOCK: 1335}, "NVML reports: NVML Error with code 20"),
        ({}, {POWER: 50}, "50 W: the driver does not take this value"),
    ],
)
def test_a_gpu_that_does_not_do_what_it_is_told_is_named_and_put_back(gpu, monkeypatch, facts, config, sentence):
    monkeypatch.setattr(control, "READ_BACK_SECONDS", 0.1)
    with held() as power:
        gpu.change(**facts)
        with pytest.raises(ControlError, match=rf"NVIDIA H100 \(GPU-aaaa\): .*{sentence}"):
            power.apply(config)
        gpu.change(deaf=False, errors={})
    assert gpu.settings() == (300.25, None)
    assert not gpu.ledger().exists()


def test_a_setting_that_fails_on_the_second_gpu_is_put_back_on_the_first(gpus):
    gpus.add("GPU-aaaa").add("GPU-bbbb")
    with held() as control:
        gpus.fail(1, SetPowerManagementLimit=15)
        with pytest.raises(ControlError, match="GPU-bbbb"):
            control.apply({POWER: 200})
        assert gpus.settings("GPU-aaaa") == (200, None)
        gpus.fail(1)
        control.apply({POWER: 250})
    assert [gpus.settings(uuid)[0] for uuid in ("GPU-aaaa", "GPU-bbbb")] == [300.25, 300.25]


def test_a_limit_that_somebody_else_sets_is_neither_overridden_nor_put_back(gpu, said):
    with held(said) as control:
        control.apply({POWER: 200, CLOCK: 1335})
        gpu.somebody_sets(270)
        with pytest.raises(ControlError, match="is 270 W, which tune did not set"):
            control.apply({POWER: 250})
    assert gpu.settings() == (270, None)
    limit, clock = said
    assert "its power limit is 270 W, which tune did not set, so it stays (before tune it was 300.25 W)" in limit
    assert "its clock is unlocked" in clock
    assert not gpu.ledger().exists()


def test_a_gpu_that_cannot_be_put_back_keeps_its_ledger_and_the_commands_are_said(gpu, said):
    with held(said) as control:
        control.apply({POWER: 200, CLOCK: 1335})
        gpu.fail(SetPowerManagementLimit=15)
    assert gpu.settings() == (200, None)  # the clock could be unlocked
    assert gpu.ledger().exists()
    assert "cannot set its power limit to 300.25 W: the GPU fell off the bus" in said[0]
    assert "its clock is unlocked" in said[0]
    assert 'sudo -E env "PATH=$PATH" tune restore' in said[0]
    assert "`sudo nvidia-smi -i GPU-aaaa -pl 300.25` and `sudo nvidia-smi -i GPU-aaaa -rgc`" in said[0]
    gpu.fail()
    assert restore(nothing)[0].endswith("its power limit is back at 300.25 W")
    assert (gpu.settings(), gpu.ledger().exists()) == ((300.25, None), False)


def test_a_limit_that_does_not_go_back_is_no_success(gpu, said):
    with held(said) as control:
        control.apply({POWER: 200})
        gpu.change(deaf=True)
    assert "was set to 300.25 W and reads 200 W" in said[0]
    assert gpu.ledger().exists()


# --- before anything is changed --------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "code", "sentence"),
    [
        (
            "SetPowerManagementLimit",
            4,
            r"only root may do that.*sudo -E env \"PATH=\$PATH\" tune run .*--allow-power-control",
        ),
        ("ResetGpuLockedClocks", 4, "unlock its SM clock: only root may do that"),
        ("SetPowerManagementLimit", 3, "power limit to 300.25 W: this GPU does not support it; leave --allow-power"),
        ("ResetGpuLockedClocks", 3, "clock: this GPU does not support it; --pin gpu_sm_clock_mhz=auto"),
    ],
)
def test_missing_rights_are_found_before_the_first_change_and_leave_nothing_behind(gpu, function, code, sentence):
    gpu.fail(**{function: code})
    with pytest.raises(Refused, match=sentence), held():
        pytest.fail("entered")
    assert gpu.settings() == (300.25, None)
    assert not gpu.ledger().exists()
    gpu.fail()
    with held():
        pass


@pytest.mark.parametrize(
    ("facts", "locked"),
    [
        ({"reasons": 0, "sm_mhz": 1335}, True),  # nothing runs, and no reason is given
        ({"reasons": None, "old_reasons": 0, "sm_mhz": 1335}, True),
        ({"reasons": 2, "sm_mhz": 1335, "utilization": 90}, True),  # a setting holds it, under load
        ({"reasons": 2, "sm_mhz": 1335, "application_clock": 1335}, False),  # and it is the application clock
        ({"reasons": 0, "sm_mhz": 1335, "default_application_clock": 1335}, False),
        ({"reasons": 1, "sm_mhz": 345}, False),  # idle
        ({"reasons": 0, "sm_mhz": 1335, "utilization": 90}, False),  # busy: may be anything
        ({"reasons": 0, "sm_mhz": 1335, "processes": [7]}, False),
        ({"reasons": 4, "sm_mhz": 1335}, False),  # the power cap
        ({"reasons": 0, "sm_mhz": 1980}, False),
        ({"reasons": 0, "sm_mhz": 210}, False),
        ({"reasons": 0, "sm_mhz": None}, False),
        ({"reasons": None}, False),
    ],
)
def test_a_clock_that_looks_locked_already_is_refused_because_it_could_not_be_put_back(gpu, facts, locked):
    gpu.change(**facts)
    if locked:
        with pytest.raises(Refused, match=r"looks locked at 1335 MHz.*sudo nvidia-smi -i GPU-aaaa -rgc.*--pin"), held():
            pytest.fail("entered")
    else:
        with held():
            pass


def test_a_clock_that_moves_is_not_locked(gpu, monkeypatch):
    gpu.change(reasons=0, sm_mhz=1335)
    clocks = iter(range(1335, 1980, 15))
    monkeypatch.setattr(control.time, "sleep", lambda _: gpu.change(sm_mhz=next(clocks)))
    with control._driver() as nvml:
        assert control._visible(nvml)[0].held_clock() is None


WAITING = """
import time
from tuner.control import PowerControl, knobs
with PowerControl(knobs(), lambda _: None) as control:
    control.apply({"gpu_power_limit_w": 200, "gpu_sm_clock_mhz": 1335})
    print("in", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def running(gpus, code=WAITING, environment=None):
    """Another tuner, which has set its GPUs."""
    process = gpus.start(code, environment=environment)
    with process:
        try:
            assert process.stdout.readline() == "in\n", process.stderr.read()
            yield process
        finally:
            process.kill()
    eventually(lambda: not watchdogs(gpus))


def watchdogs(gpus):
    """The watchdogs of this test's GPUs."""
    state = str(gpus.folder / "state")
    return [p for p in psutil.process_iter(["cmdline"]) if {"tuner.control", state} <= set(p.info["cmdline"] or ())]


def test_a_second_tuner_is_refused_with_the_number_of_the_first(gpu, monkeypatch):
    monkeypatch.setattr(control, "LOCK_SECONDS", 0.1)
    parameters = knobs()
    with running(gpu) as first:
        for start in (knobs, held(parameters=parameters).__enter__, lambda: restore(nothing)):
            with pytest.raises(Refused, match=f"GPU-aaaa: process {first.pid} is tuning this GPU; wait for it"):
                start()
        assert gpu.settings() == (200, 1335)
        assert pending() == []


def test_two_tuners_on_two_gpus_do_not_meet(gpus, monkeypatch):
    gpus.add("GPU-aaaa").add("GPU-bbbb")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    gpus.environment["CUDA_VISIBLE_DEVICES"] = "0"
    with running(gpus), held() as control:
        control.apply({POWER: 250})
        assert [gpus.settings(uuid)[0] for uuid in ("GPU-aaaa", "GPU-bbbb")] == [200, 250]


def test_a_start_right_after_a_kill_waits_for_the_watchdog(gpu):
    with running(gpu) as first:
        first.kill()
        with held():
            assert gpu.settings() == (300.25, None)


def test_a_killed_runs_ledger_that_appears_between_asking_and_starting_is_settled_first(gpu, said):
    parameters = knobs()
    gpu.leave_changed(watts=200, clock_locked=True)
    with held(said, parameters) as control:
        assert "300.25 W" in control.observed["gpu0"]
    assert said == [
        f"after a run that was killed (process 4): NVIDIA H100 (GPU-aaaa): {what}"
        for what in ("its power limit is back at 300.25 W", "its clock is unlocked")
    ]


@pytest.mark.parametrize("content", [b"", b"garbage", b'{"uuid": 3}', b"\xff\xfe", None])
def test_a_ledger_that_cannot_be_read_is_refused_with_what_to_do(gpu, content):
    gpu.leave_changed(uuid="GPU-other")
    written = gpu.ledger("GPU-other").read_bytes()
    gpu.ledger("GPU-other").unlink()
    gpu.ledger().write_bytes(written if content is None else content)
    parameters = (control.Int(name=POWER, meaning="", default=300, low=100, high=350),)
    for start in (knobs, held(parameters=parameters).__enter__, lambda: restore(nothing)):
        with pytest.raises(Refused, match=r"GPU-aaaa.json: cannot be read .*nvidia-smi -i GPU-aaaa .*rm "):
            start()
    assert gpu.ledger().exists()


def test_a_state_folder_that_cannot_be_made_is_named_before_anything_changes(gpu):
    (gpu.folder / "state").write_text("a file")
    with pytest.raises(Refused, match=r"Not a directory.*TUNE_STATE"), held(parameters=()):
        pytest.fail("entered")
    for ask in (pending, lambda: restore(nothing)):
        with pytest.raises(Refused, match=r"Not a directory.*TUNE_STATE"):
            ask()


@contextlib.contextmanager
def full_disk():
    """RLIMIT_FSIZE stops every write as a full disk does, with EFBIG in place of ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_without_room_for_the_ledger_nothing_is_changed(gpu):
    with held() as control:
        with full_disk(), pytest.raises(ControlError, match="without this record nothing was changed on NVIDIA H100"):
            control.apply({POWER: 200})
        assert gpu.settings() == (300.25, None)
        with full_disk(), pytest.raises(ControlError, match="without this record"):
            control.apply({CLOCK: 1335})
        assert gpu.settings() == (300.25, None)
        control.apply({POWER: 200, CLOCK: 1335})
    assert gpu.settings() == (300.25, None)


@pytest.mark.usefixtures("without_coverage")
def test_without_room_for_the_ledger_nothing_is_started(gpu):
    power = held()
    with full_disk(), pytest.raises(Refused, match="without this record"):
        power.__enter__()
    assert "nvmlDeviceSetPowerManagementLimit" not in gpu.calls()
    assert not gpu.ledger().exists()


def test_no_space_left_is_called_a_full_disk():
    assert control._cause(OSError(28, "No space left on device")) == "the disk is full"


def test_a_ledger_that_cannot_be_deleted_is_said(gpu, said):
    with held(said) as control:
        control.apply({POWER: 200})
        gpu.ledger().unlink()
        gpu.ledger().mkdir()
        (gpu.ledger() / "in the way").touch()
    assert gpu.settings()[0] == 300.25
    assert "its power limit is back at 300.25 W; " in said[0]
    assert "delete it: sudo rm" in said[0]


def test_a_state_folder_that_is_deleted_meanwhile_costs_nothing_while_the_tuner_lives(gpu):
    with held() as control:
        control.apply({POWER: 200})
        gpu.ledger().unlink()
        (gpu.ledger().parent / "GPU-aaaa.lock").unlink()
        gpu.ledger().parent.rmdir()
        control.apply({POWER: 250})
        assert gpu.ledger().exists()
    assert gpu.settings()[0] == 300.25


# --- the watchdog ----------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["/bin/false", "/nonexistent"])
def test_without_a_watchdog_nothing_is_changed(gpu, monkeypatch, program):
    power = held()
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(Refused, match="the process that watches over the GPUs did not start"):
        power.__enter__()
    assert gpu.calls() == {}


def test_a_watchdog_without_a_driver_says_so_and_does_not_start(gpu, monkeypatch, capfd):
    power = held()
    start = power._start_watchdog

    def lose_the_driver():
        gpu.facts["init_error"] = 9
        gpu.write()
        start()

    monkeypatch.setattr(power, "_start_watchdog", lose_the_driver)
    with pytest.raises(Refused, match="did not start; nothing was changed"):
        power.__enter__()
    assert "tune: power control: the NVIDIA driver is installed but not loaded" in capfd.readouterr().err


def test_a_watchdog_that_is_asked_to_end_stays_until_its_work_is_done(gpu):
    with running(gpu) as tuner:
        (watchdog,) = psutil.Process(tuner.pid).children()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            watchdog.send_signal(number)
        assert os.getsid(watchdog.pid) == watchdog.pid
        tuner.kill()
        tuner.wait()
        eventually(lambda: not gpu.ledger().exists())
        assert gpu.settings() == (300.25, None)
        told = tuner.stderr.read()
    assert f"tune: after a run that was killed (process {tuner.pid}): NVIDIA H100 (GPU-aaaa): its clock" in told


@pytest.mark.usefixtures("without_coverage")
def test_a_watchdog_that_was_killed_is_replaced_before_the_next_change(gpu, said):
    with held(said) as control:
        control.apply({POWER: 200})
        first = control._watchdog.pid
        os.kill(first, signal.SIGKILL)
        eventually(lambda: control._watchdog.poll() is not None)
        control.apply({POWER: 250})
        assert control._watchdog.pid != first
        assert control._watchdog.poll() is None
    assert "starting another" in said[0]
    assert gpu.settings()[0] == 300.25


@pytest.mark.usefixtures("without_coverage")
def test_a_watchdog_that_hangs_is_ended(gpu, monkeypatch):
    monkeypatch.setattr(control, "WATCHDOG_SECONDS", 0.1)
    with held() as power:
        power.apply({POWER: 200})
        os.kill(power._watchdog.pid, signal.SIGSTOP)
    assert gpu.settings()[0] == 300.25


def test_a_restore_that_fails_in_the_watchdog_too_keeps_the_ledger_and_is_said(gpu, capfd):
    with held() as control:
        control.apply({POWER: 200})
        gpu.fail(SetPowerManagementLimit=15)
    assert gpu.ledger().exists()
    assert "tune: NVIDIA H100 (GPU-aaaa): cannot set its power limit to 300.25 W" in capfd.readouterr().err


INTERRUPTED = """
import signal, time
from tuner.control import PowerControl, knobs

def stop(number, frame):
    raise KeyboardInterrupt(number)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, stop)
try:
    with PowerControl(knobs(), lambda sentence: None) as control:
        control.apply({"gpu_power_limit_w": 200, "gpu_sm_clock_mhz": 1335})
        print("in", flush=True)
        time.sleep(600)
except KeyboardInterrupt:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("out", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_during_the_restore_do_not_leave_it_half_done(gpu, number):
    with running(gpu, INTERRUPTED, dict(os.environ)) as tuner:
        gpu.change(slow_seconds=0.6)
        for _ in range(4):
            tuner.send_signal(number)
            time.sleep(0.1)
        assert tuner.stdout.readline() == "out\n"
        assert gpu.settings() == (300.25, None)
        assert not gpu.ledger().exists()
        assert tuner.wait() == 0


# --- killed ----------------------------------------------------------------------------------

BUSY = """
import itertools
from tuner.control import PowerControl, knobs
clocks = itertools.cycle([1335, "auto", 1980])
with PowerControl(knobs(), lambda _: None) as control:
    print("in", flush=True)
    for watts in itertools.cycle(range(100, 351, 7)):
        control.apply({"gpu_power_limit_w": watts, "gpu_sm_clock_mhz": next(clocks)})
"""


def killed_at_random_moments(gpus, rounds, seed):
    """Kill a tuner that changes a GPU in a tight loop; how often, what it had changed, and whether it was put back.

    Four of five are killed within half a second of their first change, the fifth anywhere from its very start.
    """
    draw = random.Random(seed)
    counts = {"killed": 0, "limit was changed": 0, "clock was locked": 0, "ledger was there": 0}
    counts |= {"limit back": 0, "clock unlocked": 0, "ledger gone": 0, "GPU free": 0, "slowest seconds": 0.0}
    for number in range(rounds):
        with gpus.start(BUSY) as tuner:
            if number % 5:
                tuner.stdout.readline()
                time.sleep(draw.uniform(0, 0.5))
            else:
                time.sleep(draw.uniform(0, 1.5))
            # Stopped first, so that what it leaves can be seen before the watchdog has mended it.
            tuner.send_signal(signal.SIGSTOP)
            limit, clock = gpus.settings()
            counts["limit was changed"] += limit != FACTS["limit"]
            counts["clock was locked"] += clock is not None
            counts["ledger was there"] += gpus.ledger().exists()
            tuner.kill()
            killed = time.monotonic()
            counts["killed"] += tuner.wait() == -signal.SIGKILL
            while (gpus.ledger().exists() or control._is_held("GPU-aaaa")) and time.monotonic() < killed + 10:
                time.sleep(0.005)
            counts["slowest seconds"] = max(counts["slowest seconds"], round(time.monotonic() - killed, 3))
        limit, clock = gpus.settings()
        counts["limit back"] += limit == FACTS["limit"]
        counts["clock unlocked"] += clock is None
        counts["ledger gone"] += not gpus.ledger().exists()
        counts["GPU free"] += not control._is_held("GPU-aaaa")
    return counts


@pytest.mark.slow
def test_a_tuner_killed_at_fifty_random_moments_leaves_the_gpu_as_it_was_fifty_times(gpu):
    counts = killed_at_random_moments(gpu, 50, seed=3)
    assert counts["killed"] == 50
    assert counts["limit was changed"] > 25
    assert counts["clock was locked"] > 10
    assert {counts[what] for what in ("limit back", "clock unlocked", "ledger gone", "GPU free")} == {50}


@pytest.mark.parametrize("then", ["the next start", "tune restore"])
def test_where_the_watchdog_is_killed_as_well_the_ledger_stays_for(gpu, said, then):
    with running(gpu) as tuner:
        (watchdog,) = psutil.Process(tuner.pid).children()
        for process in (watchdog, psutil.Process(tuner.pid)):
            process.suspend()
        watchdog.kill()
        tuner.kill()
        tuner.wait()
        eventually(lambda: not control._is_held("GPU-aaaa"))
    assert (gpu.settings(), gpu.ledger().exists()) == ((200, 1335), True)
    (sentence,) = pending()
    assert sentence.startswith("NVIDIA H100 (GPU-aaaa): a run that was killed may have left")
    if then == "tune restore":
        assert restore(said.append) == said
        assert said == [
            f"after a run that was killed (process {tuner.pid}): NVIDIA H100 (GPU-aaaa): {what}"
            for what in ("its power limit is back at 300.25 W", "its clock is unlocked")
        ]
    else:
        with held() as power:
            assert "power limit 300.25 W" in power.observed["gpu0"]
    assert (gpu.settings(), gpu.ledger().exists()) == ((300.25, None), False)
    assert pending() == []


# --- somebody else's GPU ---------------------------------------------------------------------


def test_a_gpu_that_another_tuner_changes_is_named_while_it_does(gpu):
    assert control.held() == []
    with running(gpu):
        assert control.held() == [
            "another tune changes power and clock of GPU-aaaa at this moment: what is measured on it means nothing"
        ]
    eventually(lambda: not control._is_held("GPU-aaaa"))
    assert control.held() == []


def test_a_state_folder_that_cannot_be_had_holds_no_gpu(monkeypatch):
    monkeypatch.setattr(control, "_folder", lambda: (_ for _ in ()).throw(Refused("no home folder")))
    assert control.held() == []


def test_the_gpus_that_are_held_are_known_by_their_uuids_in_order(gpus):
    gpus.add("GPU-bbbb").add("GPU-aaaa")
    with held() as power:
        assert power.uuids == ("GPU-bbbb", "GPU-aaaa")


# --- tune restore ----------------------------------------------------------------------------


def test_nothing_to_put_back_is_a_sentence_too(gpus):
    assert pending() == []
    assert restore(nothing) == ["nothing to put back: no run has left a GPU's power limit or clock changed"]


def test_what_can_be_put_back_is_and_the_rest_is_refused_together(gpus, said):
    gpus.add("GPU-aaaa").add("GPU-bbbb").add("GPU-cccc")
    for uuid in ("GPU-aaaa", "GPU-bbbb", "GPU-cccc", "GPU-gone"):
        if uuid == "GPU-gone":
            gpus.add(uuid)
        gpus.leave_changed(uuid)
    gpus.facts["gpus"].pop()
    gpus.fail(0, SetPowerManagementLimit=4)
    gpus.ledger("GPU-bbbb").write_text("garbage")
    assert [sentence.partition(":")[0] for sentence in pending()] == [
        "NVIDIA H100 (GPU-aaaa)",
        "GPU-bbbb",
        "NVIDIA H100 (GPU-cccc)",
        "NVIDIA H100 (GPU-gone)",
    ]
    with pytest.raises(Refused) as refused:
        restore(said.append)
    assert "GPU-aaaa): cannot set its power limit to 300.25 W: only root may do that" in str(refused.value)
    assert "GPU-bbbb.json: cannot be read" in str(refused.value)
    assert "GPU-gone): this machine has no such GPU" in str(refused.value)
    assert [s.rpartition("): ")[2] for s in said] == ["its power limit is back at 300.25 W"]
    assert gpus.settings("GPU-cccc") == (300.25, None)


def test_a_ledger_of_a_run_that_had_changed_nothing_is_only_deleted(gpu):
    gpu.leave_changed(set_milliwatts=())
    assert restore(nothing) == [
        "after a run that was killed (process 4): NVIDIA H100 (GPU-aaaa): nothing had been changed yet"
    ]
    assert gpu.settings()[0] == 200
    assert not gpu.ledger().exists()


def test_a_ledger_that_another_process_settles_first_is_no_fault(gpu, monkeypatch):
    gpu.leave_changed()
    path = gpu.ledger()
    monkeypatch.setattr(control, "_ledgers", lambda: [path])
    path.unlink()
    assert restore(nothing) == ["GPU-aaaa: was put back meanwhile"]


def test_whether_something_is_left_is_known_without_the_driver(gpu):
    gpu.leave_changed()
    code = "import sys; from tuner.control import pending; print(len(pending()), 'pynvml' in sys.modules)"
    with gpu.start(code) as process:
        assert process.stdout.read() == "1 False\n"


def test_the_state_folder_is_the_one_that_was_named_or_the_persons_own(monkeypatch):
    monkeypatch.setenv("TUNE_STATE", "here")
    assert state_folder() == Path.cwd() / "here"
    monkeypatch.setenv("TUNE_STATE", "~/here")
    monkeypatch.setenv("HOME", "/home/me")
    assert state_folder() == Path("/home/me/here")
    monkeypatch.delenv("TUNE_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert state_folder() == Path("/home/me/.local/state/tune")
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert state_folder() == Path("/var/state/tune")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state_folder() == Path("/home/me/.local/state/tune")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
    with pytest.raises(Refused, match=r"no home folder.*export TUNE_STATE"):
        state_folder()


if __name__ == "__main__":
    rounds, seed = (int(text) for text in (*sys.argv[1:], *("50", "3")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TUNE_STATE"] = str(Path(scratch) / "state")
        print(json.dumps(killed_at_random_moments(Gpus(Path(scratch)).add(), rounds, seed), indent=1))
