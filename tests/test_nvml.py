import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from contracts.meter_contract import HandleContract
from hypothesis import given
from hypothesis import strategies as st

from tuner.meters import Unavailable
from tuner.meters.nvml import (
    FAULTS,
    GAUGES,
    REASONS,
    Gauges,
    Gpu,
    NvmlMeter,
    boards,
    probe,
    used_memory_bytes,
    visible,
)
from tuner.trial import MeterError

FAKES = Path(__file__).parent / "fakes"


class Nvml:
    """The driver as the fake `pynvml` sees it; every change is seen at the next call."""

    def __init__(self, path):
        self.path = path
        self.state = {"driver": "580.65.06", "gpus": []}

    def add(self, uuid, **facts):
        self.state["gpus"].append({"uuid": uuid, "pci": [0, len(self.state["gpus"]) + 1, 0], **facts})
        return self.write()

    def write(self, **facts):
        self.state |= facts
        self.path.write_text(json.dumps(self.state))
        return self

    def use(self, joules):
        for gpu in self.state["gpus"]:
            gpu["millijoules"] = gpu.get("millijoules", 0) + round(1000 * joules)
        self.write()

    def fail(self, index, function, code):
        self.state["gpus"][index]["errors"] = {function: code}
        self.write()


@pytest.fixture
def nvml(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FAKES)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setenv("TUNE_FAKE_NVML", str(tmp_path / "nvml.json"))
    yield Nvml(tmp_path / "nvml.json").write()
    sys.modules.pop("pynvml", None)


@pytest.fixture
def two(nvml):
    return nvml.add("GPU-aaaa").add("GPU-bbbb", millijoules=77_000)


class TestNvmlKeepsTheMeterContract(HandleContract):
    @pytest.fixture
    def meter(self, two):
        self.nvml = two
        return NvmlMeter()

    def use(self, joules):
        self.nvml.use(joules)


def library():
    return sys.modules["pynvml"]


# --- reading ---------------------------------------------------------------------------------


def test_every_gpu_is_counted_apart_and_known_by_its_uuid(two):
    meter = NvmlMeter()
    two.state["gpus"][1]["millijoules"] += 5
    two.write()
    assert {domain: reading.microjoules for domain, reading in meter.read().items()} == {"gpu0": 0, "gpu1": 5000}
    assert {domain: gpu.uuid for domain, gpu in meter.gpus.items()} == {"gpu0": "GPU-aaaa", "gpu1": "GPU-bbbb"}


def test_a_gpu_that_nvml_lists_in_another_place_is_still_the_same(two):
    meter = NvmlMeter()
    two.state["gpus"].reverse()
    two.state["gpus"][0]["millijoules"] += 8  # GPU-bbbb
    two.write()
    assert meter.read()["gpu1"].microjoules == 8000


def test_a_counter_that_goes_back_spoils_its_window_and_only_that(two):
    meter = NvmlMeter()
    two.use(50)
    before = meter.read()
    two.state["gpus"][1]["millijoules"] = 1000  # the driver was loaded anew
    two.write()
    with pytest.raises(MeterError, match=r"gpu1: the energy counter went back by 126 J"):
        meter.read()
    two.use(2)
    after = meter.read()
    assert [after[d].microjoules - before[d].microjoules for d in ("gpu0", "gpu1")] == [2_000_000, 2_000_000]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(15, "fell off the bus"), (16, "needs a reset"), (4, "denies access"), (10, "did not answer"), (20, "code 20")],
)
def test_an_error_in_the_middle_is_named_and_keeps_its_origin(two, code, sentence):
    meter = NvmlMeter()
    two.fail(1, "nvmlDeviceGetTotalEnergyConsumption", code)
    with pytest.raises(MeterError, match=f"gpu1: .*{sentence}") as caught:
        meter.read()
    assert caught.value.__cause__.value == code


def test_a_gpu_that_is_gone_is_no_zero(two):
    meter = NvmlMeter()
    two.state["gpus"].pop()
    two.write()
    with pytest.raises(MeterError, match="fell off the bus"):
        meter.read()


def test_every_opened_library_is_shut_down_again(two, monkeypatch):
    NvmlMeter().close()
    probe()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not probe().ok
    two.fail(0, "nvmlDeviceGetTotalEnergyConsumption", 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert not probe().ok
    assert library()._users == 0


# --- what stands in the way ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason", "remedy"),
    [
        (12, "no NVIDIA driver", "--gpus all"),
        (9, "installed but not loaded", "sudo modprobe nvidia"),
        (18, "of different versions", "sudo reboot"),
        (4, "denies access", "ls -l /dev/nvidia"),
        (999, "unknown error", "nvidia-smi"),
    ],
)
def test_a_driver_that_does_not_start_comes_with_its_remedy(nvml, code, reason, remedy):
    nvml.write(init_error=code)
    found = probe()
    assert not found.ok
    assert reason in found.reason
    assert remedy in found.remedy


def test_an_old_gpu_without_the_counter_is_told_by_asking_it(two):
    two.fail(1, "nvmlDeviceGetTotalEnergyConsumption", 3)
    found = probe()
    assert not found.ok
    assert "no energy counter (Pascal and older" in found.reason


def test_a_gpu_cut_into_slices_is_refused(nvml):
    nvml.add("GPU-aaaa", mig=1)
    assert "MIG slices" in probe().reason
    assert probe().remedy == "sudo nvidia-smi -mig 0"


def test_a_gpu_that_could_be_cut_but_is_not_is_fine(nvml):
    nvml.add("GPU-aaaa", mig=0)
    assert probe().ok


def test_an_unexpected_error_while_asking_about_slices_is_not_swallowed(two):
    two.fail(0, "nvmlDeviceGetMigMode", 999)
    assert "unknown error" in probe().reason


def test_a_missing_library_is_installed_by_one_command(nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = probe()
    assert "nvidia-ml-py cannot be imported" in found.reason
    assert found.remedy == "pip install --force-reinstall nvidia-ml-py"


def test_the_other_package_of_the_same_name_is_recognised(nvml, monkeypatch):
    probe()
    monkeypatch.delattr(library(), "_nvmlGetFunctionPointer")
    found = probe()
    assert "in the place of nvidia-ml-py" in found.reason
    assert found.remedy.startswith("pip uninstall -y pynvml && pip install")


def test_a_found_gpu_is_named_with_its_uuid(nvml):
    nvml.add("GPU-aaaa", name="NVIDIA H100")
    found = probe()
    assert (found.ok, found.domains, found.reason, found.remedy) == (
        True,
        ("gpu0",),
        "gpu0 is NVIDIA H100 (GPU-aaaa)",
        "",
    )


def real_library(code, **environment):
    """Run `code` in a process where `pynvml` is the real nvidia-ml-py."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_the_real_library_is_taken_for_what_it_is():
    assert real_library("from tuner.meters.nvml import library; print(library().__name__)") == "pynvml\n"


def test_every_code_in_the_table_exists_in_the_real_library():
    names = real_library("import pynvml; print(*(n for n in dir(pynvml) if n.startswith('NVML_ERROR_')))").split()
    assert {f"NVML_ERROR_{name}" for name in FAULTS} <= set(names)


def test_the_fake_has_the_names_codes_and_error_classes_of_the_real_library(nvml):
    probe()
    fake = library()
    real = json.loads(
        real_library(
            """
            import json, pynvml
            print(json.dumps({n: v if isinstance(v, int) else None for n, v in vars(pynvml).items()}))
            """
        )
    )
    names = [n for n in vars(fake) if n.startswith(("nvml", "NVML", "_nvml"))]
    assert len(names) > 30
    assert {n: getattr(fake, n) for n in names if n.startswith("NVML_ERROR")}.items() <= real.items()
    assert not set(names) - set(real)


# --- which GPUs ------------------------------------------------------------------------------

A, B, C = (Gpu(f"GPU-{letter * 4}", "NVIDIA H100", (0, bus, 0)) for letter, bus in (("a", 1), ("b", 2), ("c", 3)))
TWIN = Gpu("GPU-aaab", "NVIDIA H100", (1, 1, 0))


@pytest.mark.parametrize(
    ("wanted", "seen"),
    [
        (None, [A, B, C]),
        ("0", [A]),
        ("2,0", [C, A]),
        (" 1 , 2 ", [B, C]),
        ("0,2,-1,1", [A, C]),
        ("0,9,1", [A]),
        ("1,x,0", [B]),
        ("1x,0", [B, A]),
        ("0,,1", [A]),
        ("GPU-bbbb", [B]),
        ("GPU-c,GPU-a", [C, A]),
        ("GPU-a,nonsense,GPU-b", [A]),
        ("GPU-a,1", [A]),
        ("GPU-a,", [A]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(wanted, seen):
    environment = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    assert visible([C, A, B], environment) == seen


@pytest.mark.parametrize(
    "wanted", ["", " ", "-1", "-1,0", "NoDevFiles", "7", "0,0", "1,0,1", "GPU-z", "GPU-a,GPU-aaaa"]
)
def test_a_list_that_shows_nothing_is_refused_with_the_way_out(wanted):
    with pytest.raises(Unavailable, match="shows no GPU") as caught:
        visible([A, B, C], {"CUDA_VISIBLE_DEVICES": wanted})
    assert caught.value.remedy == "unset CUDA_VISIBLE_DEVICES"


def test_a_machine_without_gpus_is_said_to_have_none():
    with pytest.raises(Unavailable, match="this machine has no GPU"):
        visible([], {})


@pytest.mark.parametrize("wanted", ["MIG-1234", "MIG-GPU-aaaa/1/0", "MIG-1234,0"])
def test_a_slice_is_refused_because_it_has_no_counter(wanted):
    with pytest.raises(Unavailable, match="names a MIG slice"):
        visible([A], {"CUDA_VISIBLE_DEVICES": wanted})


def test_the_beginning_of_two_uuids_names_neither():
    with pytest.raises(Unavailable, match='"GPU-aaa" is the beginning of 2 UUIDs'):
        visible([A, TWIN], {"CUDA_VISIBLE_DEVICES": "GPU-aaa"})


SLOW = Gpu("GPU-dddd", "NVIDIA T4", (0, 0, 0))


def test_an_index_among_different_models_means_nothing_without_an_order():
    with pytest.raises(Unavailable, match="of different models") as caught:
        visible([SLOW, A], {"CUDA_VISIBLE_DEVICES": "0"})
    assert caught.value.remedy == "export CUDA_DEVICE_ORDER=PCI_BUS_ID"


def test_by_the_bus_an_index_is_clear():
    assert visible([A, SLOW], {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == [SLOW]


def test_all_of_them_is_clear_in_any_order():
    assert set(visible([A, SLOW], {"CUDA_VISIBLE_DEVICES": "1,0"})) == {A, SLOW}


def test_ten_gpus_are_counted_by_number_and_not_by_letter():
    many = [Gpu(f"GPU-{i:04}", "NVIDIA H100", (0, i, 0)) for i in range(16)]
    assert visible(many, {"CUDA_VISIBLE_DEVICES": "10,2"}) == [many[10], many[2]]


@given(text=st.text(alphabet="0123456789,-+ xGPU-abcMIG\t²", max_size=20))
def test_no_text_makes_more_of_the_gpus_than_there_are(text):
    try:
        seen = visible([A, B, C], {"CUDA_VISIBLE_DEVICES": text})
    except Unavailable:
        return
    assert seen
    assert len(set(seen)) == len(seen) <= 3


def test_the_record_says_which_board_each_domain_is(two):
    assert boards() == {"gpu0": "NVIDIA Fake 100 (GPU-aaaa)", "gpu1": "NVIDIA Fake 100 (GPU-bbbb)"}


def test_memory_in_use_is_that_of_all_measured_boards(nvml):
    nvml.add("GPU-aaaa", used_memory=5 << 30).add("GPU-bbbb", used_memory=1 << 30)
    assert used_memory_bytes() == 6 << 30


@pytest.mark.parametrize("fault", [3, 15])
def test_memory_that_the_driver_does_not_tell_is_unknown_and_not_0(two, nvml, fault):
    nvml.fail(0, "nvmlDeviceGetMemoryInfo", fault)
    assert used_memory_bytes() is None


# --- beside the energy -----------------------------------------------------------------------


@pytest.fixture
def gauges(two):
    made = Gauges()
    yield made
    made.close()


def test_power_is_in_watts_for_every_board(nvml):
    nvml.add("GPU-aaaa", watts=71.5).add("GPU-bbbb", watts=300)
    meter = NvmlMeter()
    assert meter.watts() == {"gpu0": 71.5, "gpu1": 300.0}
    meter.close()


@pytest.mark.parametrize(("code", "sentence"), [(15, "fell off the bus"), (3, "GPU power: "), (999, "unknown error")])
def test_power_that_cannot_be_read_is_no_zero(two, code, sentence):
    meter = NvmlMeter()
    two.fail(1, "nvmlDeviceGetPowerUsage", code)
    with pytest.raises(MeterError, match=sentence):
        meter.watts()
    meter.close()


def test_gauges_are_named_after_their_board_and_unit(two, gauges):
    two.state["gpus"][1] |= {"celsius": 61, "sm_mhz": 1980, "memory_mhz": 2619, "watts": 50.5, "utilization": 12}
    two.write()
    assert {name: value for name, value in gauges.read().items() if name.startswith("gpu1")} == {
        "gpu1_celsius": 61.0,
        "gpu1_sm_mhz": 1980.0,
        "gpu1_memory_mhz": 2619.0,
        "gpu1_watts": 50.5,
        "gpu1_busy": 0.12,
    }


def test_only_the_gauges_that_are_wanted_are_read(two, gauges):
    two.state["gpus"][0]["celsius"] = 40
    two.write()
    assert gauges.read(("celsius",)) == {"gpu0_celsius": 40.0}


def test_one_clock_that_a_board_lacks_does_not_hide_the_other(two, gauges):
    assert not {"gpu0_sm_mhz", "gpu0_memory_mhz"} & set(gauges.read())
    two.add("GPU-cccc", sm_mhz=1000)
    more = Gauges()
    assert more.read(("sm_mhz", "memory_mhz")) == {"gpu2_sm_mhz": 1000.0}
    more.close()


def test_a_board_says_with_whom_it_is_shared(two, gauges):
    two.state["gpus"][0]["processes"] = [7, 8]
    two.state["gpus"][1]["graphics"] = [8]
    two.write()
    assert gauges.processes() == {("gpu0", 7), ("gpu0", 8), ("gpu1", 8)}


def test_a_limit_that_one_board_does_not_tell_is_absent(two, gauges):
    two.state["gpus"][1]["limit"] = 350
    two.write()
    assert gauges.limit_watts() == {"gpu1": 350.0}


@given(bits=st.integers(0, 0x1FF))
def test_every_bit_of_the_reasons_is_one_reason(bits):
    assert len([reason for bit, reason in REASONS.items() if bits & bit]) == bits.bit_count()


def test_the_bits_of_the_reasons_are_those_of_the_real_library():
    real = json.loads(
        real_library(
            """
            import json, pynvml
            prefix = "nvmlClocksEventReason"
            print(json.dumps({n.removeprefix(prefix): v for n, v in vars(pynvml).items() if n.startswith(prefix)}))
            """
        )
    )
    names = {
        0x001: "GpuIdle",
        0x002: "ApplicationsClocksSetting",
        0x004: "SwPowerCap",
        0x008: "HwSlowdown",
        0x010: "SyncBoost",
        0x020: "SwThermalSlowdown",
        0x040: "HwThermalSlowdown",
        0x080: "HwPowerBrakeSlowdown",
        0x100: "DisplayClockSetting",
    }
    assert {bit: real[name] for bit, name in names.items()} == {bit: bit for bit in REASONS}


def test_every_function_of_a_gauge_exists_in_the_real_library():
    asked = [function for function, _, _ in GAUGES.values()] + [
        name for _, names, _ in GAUGES.values() for name in names
    ]
    asked += ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"]
    asked += ["nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"]
    asked += ["nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPowerUsage"]
    assert real_library(f"import pynvml; print(all(hasattr(pynvml, name) for name in {asked!r}))") == "True\n"
