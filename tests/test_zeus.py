import contextlib
import json
import sys
from pathlib import Path

import pytest
from contracts.meter_contract import HandleContract
from hypothesis import given
from hypothesis import strategies as st

from tuner.meters import Unavailable
from tuner.meters import zeus as adapter
from tuner.meters.zeus import ZeusMeter, boards, probe
from tuner.trial import MeterError, Reading

PACKAGE = Path(__file__).parent / "fakes/zeus_package"

APPLE = {"cpu_total_mj": 5, "efficiency_cores_mj": [1, 1], "gpu_mj": 0, "gpu_sram_mj": 0, "dram_mj": 7, "ane_mj": 0}


class Zeus:
    """The devices as the fake `zeus` sees them; every change is seen at the next call."""

    def __init__(self, file):
        self.file = file
        self.say()

    def say(self, **config):
        self.file.write_text(json.dumps(config))

    def apple(self, **millijoules):
        self.say(soc="AppleSilicon", millijoules=APPLE | millijoules)

    def jetson(self, **millijoules):
        self.say(soc="Jetson", millijoules=millijoules)

    def amd(self, *boards, **config):
        self.say(
            gpus="AMDGPUs", boards=[{"name": "AMD Instinct MI300X", "millijoules": 0} | b for b in boards], **config
        )


def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "zeus"]:
        del sys.modules[name]


@pytest.fixture
def zeus(tmp_path, monkeypatch):
    forget()
    monkeypatch.syspath_prepend(PACKAGE)
    monkeypatch.setenv("TUNE_FAKE_ZEUS", str(tmp_path / "zeus.json"))
    yield Zeus(tmp_path / "zeus.json")
    forget()


# --- three kinds of device -------------------------------------------------------------------


class TestAmdKeepsTheMeterContract(HandleContract):
    @pytest.fixture
    def meter(self, zeus):
        self.zeus, self.total = zeus, 4000.0
        self.use(0)
        return ZeusMeter()

    def use(self, joules):
        self.total += 1000 * joules
        self.zeus.amd({"millijoules": round(self.total)}, {"millijoules": round(self.total) + 99})


class TestJetsonKeepsTheMeterContract(HandleContract):
    @pytest.fixture
    def meter(self, zeus):
        self.zeus, self.total = zeus, 4000.0
        self.use(0)
        return ZeusMeter()

    def use(self, joules):
        self.total += 1000 * joules
        self.zeus.jetson(total_energy_mj=self.total, cpu_energy_mj=self.total / 3, gpu_energy_mj=self.total / 3)


class TestAppleKeepsTheMeterContract(HandleContract):
    @pytest.fixture
    def meter(self, zeus):
        self.zeus, self.total = zeus, 4000
        self.use(0)
        return ZeusMeter()

    def use(self, joules):
        self.total += round(1000 * joules)
        self.zeus.apple(**dict.fromkeys(("cpu_total_mj", "gpu_mj", "dram_mj", "ane_mj"), self.total))


def test_amd_boards_are_measured_and_cpus_are_not_in_it(zeus):
    zeus.amd({}, {"name": "AMD Instinct MI250X"})
    found = probe()
    assert (found.ok, found.domains, found.quality, found.how) == (True, ("gpu0", "gpu1"), "measured", "")
    assert found.reason == "gpu0 of AMD Instinct MI300X; gpu1 of AMD Instinct MI250X"
    assert ZeusMeter().blind_to == {"offload"}
    assert boards() == {"gpu0": "AMD Instinct MI300X", "gpu1": "AMD Instinct MI250X"}


def test_of_a_jetson_the_whole_module_is_read(zeus):
    zeus.jetson(total_energy_mj=5.25, cpu_energy_mj=1.0, gpu_energy_mj=1.0)
    found = probe()
    assert (found.domains, found.quality, found.how) == (("soc0",), "sampled", "every 0.1 s")
    assert ZeusMeter().blind_to == set()
    assert ZeusMeter().update_seconds == 0.1


@pytest.mark.parametrize(
    ("rails", "domains", "blind"),
    [
        ({"cpu_energy_mj": 1.0, "gpu_energy_mj": 2.0}, ("cpu0", "gpu0"), set()),
        ({"gpu_energy_mj": 2.0}, ("gpu0",), {"offload"}),
    ],
)
def test_a_jetson_without_that_rail_has_its_parts(zeus, rails, domains, blind):
    zeus.jetson(**rails)
    meter = ZeusMeter()
    assert (meter.domains(), meter.blind_to) == (domains, blind)


def test_apples_numbers_are_said_to_be_a_model(zeus):
    zeus.apple()
    found = probe()
    assert (found.domains, found.quality) == (("cpu0", "gpu0", "dram0", "ane0"), "sampled")
    assert found.how == "by Apple's own model"
    assert found.reason == "cpu0, gpu0, dram0, ane0 of Apple Silicon"
    assert ZeusMeter().blind_to == set()


def test_what_an_apple_chip_does_not_have_is_no_domain(zeus):
    zeus.apple(ane_mj=None, dram_mj=None)
    assert ZeusMeter().domains() == ("cpu0", "gpu0")


@given(steps=st.lists(st.integers(0, 10**9), max_size=20))
def test_millijoules_become_microjoules_without_loss(steps):
    with pytest.MonkeyPatch.context() as patch:
        total = 10**12
        device = adapter.Device({"gpu0": "x"}, lambda: {"gpu0": total}, "measured", "", 0.1)
        patch.setattr(adapter, "_device", lambda: device)
        meter = ZeusMeter()
        for step in steps:
            total += step
            assert meter.read() == {"gpu0": Reading.exact(1000 * (total - 10**12))}


# --- what cannot be read ---------------------------------------------------------------------


def test_without_the_package_its_installation_is_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeus", None)
    found = probe()
    assert not found.ok
    assert "the Python package zeus cannot be imported" in found.reason
    assert found.remedy.startswith("pip install")


@pytest.mark.parametrize(
    ("config", "reason", "remedy"),
    [
        ({}, "ZeusGPUInitError: NVML and AMDSMI unavailable", "python -m zeus.show_env"),
        ({"gpus": "NVIDIAGPUs"}, "these are NVIDIA GPUs, which nvml reads without zeus", "tune run --meter nvml"),
        ({"gpus": "AMDGPUs", "boards": []}, "zeus finds no AMD GPU", "amd-smi list"),
        (
            {"gpus": "AMDGPUs", "init_error": "ZeusGPUInitError"},
            "ZeusGPUInitError: HIP_VISIBLE_DEVICES is set but empty",
            "python -m zeus.show_env",
        ),
        ({"gpus": "AMDGPUs", "init_error": "ValueError"}, "zeus reads no device here: ValueError", "python -m zeus"),
        (
            {"gpus": "AMDGPUs", "boards": [{"name": "AMD Instinct MI250X", "supported": False}]},
            "gpu0 (AMD Instinct MI250X) has no energy counter that agrees with its power",
            "export HIP_VISIBLE_DEVICES=0",
        ),
        (
            {"gpus": "AMDGPUs", "boards": [{"name": "A", "error": "ZeusGPUNotSupportedError"}]},
            "zeus: ZeusGPUNotSupportedError: the GPU is gone",
            "python -m zeus.show_env",
        ),
        ({"gpus": "AMDGPUs", "boards": [{"name": "A", "millijoules": None}]}, "gpu0: zeus read None", "python -m zeus"),
        ({"soc": "Jetson", "millijoules": {}}, "no power sensor of this NVIDIA Jetson", "python -m zeus.show_env"),
        ({"soc": "Jetson", "soc_error": "OSError"}, "zeus reads no device here: OSError", "python -m zeus.show_env"),
        ({"soc": "Unheard"}, "zeus found Unheard, which this version does not know", "tune run --meter wall"),
    ],
)
def test_a_device_that_cannot_be_read_is_unavailable_with_the_reason(zeus, config, reason, remedy):
    zeus.say(**config)
    found = probe()
    assert (found.ok, found.domains) == (False, ())
    assert reason in found.reason
    assert "\n" not in found.reason
    assert found.remedy.startswith(remedy)


def test_a_gpu_that_is_lost_makes_the_window_invalid_and_comes_back(zeus):
    zeus.amd({"millijoules": 1000})
    meter = ZeusMeter()
    zeus.amd({"millijoules": 1000, "error": "ZeusGPULostError"})
    with pytest.raises(MeterError, match=r"zeus: ZeusGPULostError: the GPU is gone$"):
        meter.read()
    zeus.amd({"millijoules": 3000})
    assert meter.read() == {"gpu0": Reading.exact(2_000_000)}


def test_a_counter_that_goes_back_is_an_error_and_the_next_window_starts_there(zeus):
    zeus.amd({"millijoules": 5000}, {"millijoules": 5000})
    meter = ZeusMeter()
    zeus.amd({"millijoules": 100}, {"millijoules": 6000})
    with pytest.raises(MeterError, match=r"gpu0: the energy counter went back by 4\.9 J"):
        meter.read()
    zeus.amd({"millijoules": 1100}, {"millijoules": 6000})
    assert meter.read() == {"gpu0": Reading.exact(1_000_000), "gpu1": Reading.exact(1_000_000)}


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "5"])
def test_what_is_no_number_of_millijoules_is_no_reading(zeus, value):
    zeus.jetson(total_energy_mj=5.0)
    meter = ZeusMeter()
    zeus.jetson(total_energy_mj=value)
    with pytest.raises(MeterError, match=r"soc0: zeus read .*, expected millijoules"):
        meter.read()
    zeus.jetson(total_energy_mj=6.0)
    assert meter.read() == {"soc0": Reading.exact(1000)}


def test_a_device_that_is_gone_leaves_no_record_of_boards(zeus):
    with contextlib.suppress(Unavailable):
        boards()
        pytest.fail("there is no device")
