import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.meters.nvml import REASONS, SLOWDOWNS
from tuner.telemetry import Sample, Sampler, slowdowns, thermometers
from tuner.trial import Span, Telemetry

GPU = "GPU-aaaa"


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Sysfs:
    """The files below `/` that a CPU's state is read from."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, path, text):
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
        return self

    def sensor(self, number, name, *inputs):
        folder = f"sys/class/hwmon/hwmon{number}"
        self.write(f"{folder}/name", name)
        for i, (label, millidegrees) in enumerate(inputs, start=1):
            self.write(f"{folder}/temp{i}_input", millidegrees)
            if label:
                self.write(f"{folder}/temp{i}_label", label)
        return self

    def throttled(self, cpu, *, core=0, package=0):
        folder = f"sys/devices/system/cpu/cpu{cpu}/thermal_throttle"
        return self.write(f"{folder}/core_throttle_count", core).write(f"{folder}/package_throttle_count", package)

    def process(self, pid, name="python", maps="/usr/lib/libcuda.so.1 /dev/nvidia0"):
        return self.write(f"proc/{pid}/comm", name).write(f"proc/{pid}/maps", maps)


@pytest.fixture
def sysfs(tmp_path):
    return Sysfs(tmp_path)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watch(sysfs, clock):
    """Makes samplers that are closed afterwards; they sample when told."""
    made = []

    def make(*meters, **more):
        made.append(Sampler(meters, root=sysfs.folder, seconds=clock, **{"period": None, **more}))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """The one GPU that the fake driver shows; every change is seen at the next call."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "fakes")
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("TUNE_FAKE_NVML", str(tmp_path / "nvml.json"))
    facts = {"uuid": GPU}

    def change(**more):
        facts.update(more)
        (tmp_path / "nvml.json").write_text(json.dumps({"gpus": [facts]}))

    change(celsius=50, sm_mhz=1980, memory_mhz=2619, watts=300, utilization=50, reasons=0, limit=700)
    yield change
    sys.modules.pop("pynvml", None)


def taken(sampler, clock, at):
    clock.now = at
    sampler.sample()


# --- samples ---------------------------------------------------------------------------------


def test_a_window_has_least_mean_and_largest_of_every_gauge(gpu, watch, clock):
    sampler = watch("nvml")
    for at, celsius in ((1.0, 50), (2.0, 52), (3.0, 57)):
        gpu(celsius=celsius)
        taken(sampler, clock, at)
    seen = sampler.between(0.5, 3.5)
    assert seen.samples == 3
    assert seen.spans == {
        "gpu0_celsius": Span(50, 53, 57),
        "gpu0_sm_mhz": Span(1980, 1980, 1980),
        "gpu0_memory_mhz": Span(2619, 2619, 2619),
        "gpu0_watts": Span(300, 300, 300),
        "gpu0_busy": Span(0.5, 0.5, 0.5),
    }


def test_only_the_samples_of_the_window_are_in_it(gpu, watch, clock):
    sampler = watch("nvml")
    for at in range(10):
        gpu(celsius=at)
        taken(sampler, clock, float(at))
    assert sampler.between(3.0, 5.5).spans["gpu0_celsius"] == Span(3, 4, 5)


def test_a_window_between_two_samples_says_nothing(gpu, watch, clock):
    sampler = watch("nvml")
    taken(sampler, clock, 1.0)
    assert sampler.between(1.2, 1.8) == Telemetry()


@given(st.lists(st.floats(-50, 150), min_size=1, max_size=50))
def test_a_span_holds_its_mean(values):
    sampler = Sampler(root=Path("/nowhere"), period=None)
    sampler._samples = [Sample(float(i), {"cpu_celsius": v}, ()) for i, v in enumerate(values)]
    span = sampler.between(0, len(values)).spans["cpu_celsius"]
    assert (span.low, span.high) == (min(values), max(values))
    assert span.low - 1e-9 <= span.mean <= span.high + 1e-9


def test_a_machine_that_tells_nothing_has_no_gauges(watch, clock):
    sampler = watch("rapl")
    taken(sampler, clock, 1.0)
    assert sampler.between(0, 2) == Telemetry(samples=1)
    assert (sampler.celsius(), sampler.celsius_per_second(), sampler.limit_watts()) == ({}, None, {})


@pytest.mark.parametrize("meter", ["rapl", "estimate", "zeus"])
def test_a_meter_that_counts_no_nvidia_gpu_leaves_them_alone(gpu, watch, clock, meter):
    taken(sampler := watch(meter), clock, 1.0)
    assert sampler.between(0, 2).spans == {}


def test_gpus_are_watched_at_the_wall_too_and_the_cpu_with_them(gpu, watch, sysfs, clock):
    sysfs.sensor(0, "coretemp", ("Package id 0", 61_000)).process(NOBODY, "blender")
    sampler = watch("wall")
    gpu(reasons=64, processes=[NOBODY])
    taken(sampler, clock, 1.0)
    seen, slow, strangers = sampler.end(sampler.begin(), 0.0, 2.0)
    assert sampler.celsius() == {"gpu0_celsius": 50, "cpu_celsius": 61}
    assert seen.spans["gpu0_sm_mhz"].mean == 1980
    assert slow[0].startswith("gpu0: the hardware ran slower than asked (hardware thermal slowdown)")
    assert strangers[0].startswith(f"gpu0: process {NOBODY} (blender) is on it too")


@pytest.mark.parametrize("meter", ["nvml", "wall"])
def test_without_a_driver_there_are_no_gpus(gpu, watch, monkeypatch, clock, meter):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    taken(sampler := watch(meter), clock, 1.0)
    assert sampler.between(0, 2).spans == {}


def test_a_gauge_that_a_board_lacks_is_absent_and_not_asked_again(gpu, watch, clock):
    gpu(errors={"nvmlDeviceGetUtilizationRates": 3, "nvmlDeviceGetPowerUsage": 13})
    sampler = watch("nvml")
    taken(sampler, clock, 1.0)
    gpu(errors={})
    taken(sampler, clock, 2.0)
    assert not {"gpu0_busy", "gpu0_watts"} & set(sampler.between(0, 3).spans)


def test_a_gauge_that_fails_once_is_absent_once(gpu, watch, clock):
    sampler = watch("nvml")
    gpu(errors={"nvmlDeviceGetTemperature": 999})
    taken(sampler, clock, 1.0)
    gpu(errors={}, celsius=61)
    taken(sampler, clock, 2.0)
    assert sampler.between(0, 3).spans["gpu0_celsius"] == Span(61, 61, 61)
    assert sampler.between(0, 3).samples == 2


def test_a_gpu_that_is_lost_stops_nothing(gpu, watch, clock):
    sampler = watch("nvml")
    gpu(uuid="GPU-other")
    taken(sampler, clock, 1.0)
    assert sampler.between(0, 2) == Telemetry(samples=1)
    assert (sampler.strangers(), sampler.limit_watts()) == ({}, {})


def test_the_limit_that_is_in_force_is_read_anew(gpu, watch):
    sampler = watch("nvml")
    assert sampler.limit_watts() == {"gpu0": 700}
    gpu(limit=300)
    assert sampler.limit_watts() == {"gpu0": 300}


# --- the CPU ---------------------------------------------------------------------------------


def test_a_package_has_the_temperature_of_its_driver_and_not_of_a_disk(sysfs, watch):
    sysfs.sensor(0, "nvme", ("Composite", 70_000)).sensor(
        1, "coretemp", ("Package id 0", 51_000), ("Core 0", 65_000)
    ).sensor(2, "coretemp", ("Package id 1", 55_500))
    assert watch("rapl").celsius() == {"cpu_celsius": 55.5}


@pytest.mark.parametrize(
    ("name", "inputs", "celsius"),
    [
        ("k10temp", [("Tctl", 61_250), ("Tccd1", 70_000)], 61.25),
        ("zenpower", [("Tdie", 48_000)], 48.0),
        ("cpu_thermal", [("", 55_000)], 55.0),
    ],
)
def test_every_kind_of_cpu_names_its_sensor_in_its_own_way(sysfs, watch, name, inputs, celsius):
    sysfs.sensor(3, name, *inputs)
    assert watch().celsius() == {"cpu_celsius": celsius}


def test_a_thermal_zone_stands_in_where_there_is_no_driver(sysfs):
    sysfs.write("sys/class/thermal/thermal_zone0/type", "acpitz").write("sys/class/thermal/thermal_zone0/temp", 1)
    sysfs.write("sys/class/thermal/thermal_zone1/type", "x86_pkg_temp")
    sysfs.write("sys/class/thermal/thermal_zone1/temp", 44_000)
    assert thermometers(sysfs.folder) == [sysfs.folder / "sys/class/thermal/thermal_zone1/temp"]


@pytest.mark.parametrize("text", ["", "N/A", "51 C"])
def test_a_sensor_that_shows_no_number_shows_nothing(sysfs, watch, text):
    sysfs.sensor(0, "coretemp", ("Package id 0", text))
    assert watch().celsius() == {}


def test_the_clock_is_the_mean_over_eight_cpus_spread_over_the_machine(sysfs, watch, clock):
    for cpu in range(64):
        sysfs.write(f"sys/devices/system/cpu/cpu{cpu:02}/cpufreq/scaling_cur_freq", 1000 * (1000 + cpu))
    sampler = watch()
    taken(sampler, clock, 1.0)
    mean = 1000 + sum(range(0, 64, 8)) / 8
    assert sampler.between(0, 2).spans["cpu_mhz"] == Span(mean, mean, mean)


def test_a_cpu_that_goes_offline_no_longer_counts(sysfs, watch, clock):
    for cpu in range(2):
        sysfs.write(f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq", 1_000_000 * (cpu + 1))
    sampler = watch()
    (sysfs.folder / "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq").unlink()
    taken(sampler, clock, 1.0)
    assert sampler.between(0, 2).spans["cpu_mhz"].mean == 1000


def test_a_gpu_meter_alone_does_not_wait_for_the_cpu_to_cool(gpu, sysfs, watch):
    sysfs.sensor(0, "coretemp", ("Package id 0", 90_000))
    assert watch("nvml").celsius() == {"gpu0_celsius": 50}
    assert watch("nvml", "rapl").celsius() == {"gpu0_celsius": 50, "cpu_celsius": 90}


# --- how fast it warms -----------------------------------------------------------------------


def warming(watch, *series, meters=("rapl",)):
    sampler = watch(*meters)
    sampler._samples = [Sample(at, gauges, ()) for at, gauges in series]
    return sampler.celsius_per_second()


def test_the_slope_is_that_of_a_line_through_whole_degrees(watch):
    series = [(float(t), {"cpu_celsius": float(int(50 + 0.4 * t))}) for t in range(31)]
    assert warming(watch, *series) == pytest.approx(0.4, abs=0.05)


def test_the_device_that_warms_fastest_counts(watch):
    series = [(float(t), {"gpu0_celsius": 50.0, "gpu1_celsius": 50.0 + t, "cpu_celsius": 90.0 - t}) for t in range(11)]
    assert warming(watch, *series) == pytest.approx(1.0)


def test_only_the_last_ten_seconds_count(watch):
    series = [(float(t), {"cpu_celsius": float(min(t, 20))}) for t in range(40)]
    assert warming(watch, *series) == pytest.approx(0.0)


def test_what_was_seen_before_the_load_began_says_nothing_of_the_slope(watch):
    sampler = watch("rapl")
    sampler._samples = [Sample(float(t), {"cpu_celsius": 50.0 + max(t - 20, 0)}, ()) for t in range(25)]
    assert sampler.celsius_per_second(since=20.0) is None
    sampler._samples.append(Sample(25.0, {"cpu_celsius": 55.0}, ()))
    assert sampler.celsius_per_second(since=20.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "series",
    [
        [],
        [(0.0, {"cpu_celsius": 50.0})],
        [(0.0, {"cpu_celsius": 50.0}), (4.9, {"cpu_celsius": 80.0})],
        [(0.0, {"cpu_mhz": 1.0}), (9.0, {"cpu_mhz": 2.0})],
        [(0.0, {}), (9.0, {"cpu_celsius": 50.0})],
    ],
    ids=["nothing", "one sample", "too short", "no thermometer", "one reading"],
)
def test_too_little_says_nothing_of_the_slope(watch, series):
    assert warming(watch, *series) is None


def test_the_cpu_says_nothing_of_a_gpus_slope(gpu, watch):
    series = [(float(t), {"gpu0_celsius": 50.0, "cpu_celsius": 50.0 + t}) for t in range(11)]
    assert warming(watch, *series, meters=("nvml",)) == pytest.approx(0.0)


# --- slowdowns -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "harmful"),
    [*((bits, False) for bits in (0, 1, 2, 4, 16, 256)), *((bits, True) for bits in (8, 32, 64, 128, 4 | 64))],
)
def test_heat_and_lack_of_power_are_causes_and_settings_are_not(gpu, watch, clock, bits, harmful):
    sampler = watch("nvml")
    begun = sampler.begin()
    gpu(reasons=bits)
    taken(sampler, clock, 1.0)
    seen, causes, _ = sampler.end(begun, 0.0, 2.0)
    assert len(seen.throttled) == bits.bit_count()
    assert bool(causes) == harmful


def test_a_slowdown_is_told_with_its_device_and_reason():
    assert slowdowns(["gpu1: hardware thermal slowdown", "gpu0: software power cap"]) == [
        "gpu1: the hardware ran slower than asked (hardware thermal slowdown); let it cool, or lower its power limit"
    ]


def test_a_reason_is_told_once_however_often_it_was_seen(gpu, watch, clock):
    sampler = watch("nvml")
    gpu(reasons=4)
    for at in range(3):
        taken(sampler, clock, float(at))
    assert sampler.between(0, 3).throttled == ("gpu0: software power cap",)


def test_an_old_driver_is_asked_by_the_old_name(gpu, watch, clock):
    gpu(reasons=None, old_reasons=64)
    taken(sampler := watch("nvml"), clock, 1.0)
    assert sampler.between(0, 2).throttled == ("gpu0: hardware thermal slowdown",)


def test_a_board_without_reasons_has_none(gpu, watch, clock):
    gpu(reasons=None)
    taken(sampler := watch("nvml"), clock, 1.0)
    assert sampler.between(0, 2).throttled == ()


@pytest.mark.parametrize("which", ["core", "package"])
def test_a_cpus_count_that_grew_is_a_slowdown(sysfs, watch, which):
    sysfs.throttled(0, core=5, package=5).throttled(1, core=2, package=5)
    sampler = watch("rapl")
    begun = sampler.begin()
    sysfs.throttled(1, **{"core": 2, "package": 5, which: 6})
    seen, causes, _ = sampler.end(begun, 0.0, 1.0)
    assert seen.throttled == ("cpu: thermal throttling",)
    assert causes == [
        "cpu: the hardware ran slower than asked (thermal throttling); let it cool, or lower its power limit"
    ]


def test_a_cpu_that_throttled_before_the_window_did_not_in_it(sysfs, watch):
    sysfs.throttled(0, core=5)
    sampler = watch("rapl")
    assert sampler.end(sampler.begin(), 0.0, 1.0) == (Telemetry(), [], [])


def test_a_count_that_can_no_longer_be_read_says_nothing(sysfs, watch):
    sysfs.throttled(0, core=5)
    sampler = watch("rapl")
    begun = sampler.begin()
    sysfs.throttled(0, core="gone", package="gone")
    assert sampler.end(begun, 0.0, 1.0) == (Telemetry(), [], [])


def test_every_slowdown_is_a_reason():
    assert set(REASONS.values()) >= SLOWDOWNS
    assert len(SLOWDOWNS) == 4


# --- strangers -------------------------------------------------------------------------------

NOBODY = 4_194_305
"""One more than the largest process id that Linux gives (`PID_MAX_LIMIT`, 64 bit)."""


def test_whoever_was_on_the_gpu_before_the_engine_is_a_stranger_as_long_as_it_stays(gpu, watch):
    gpu(processes=[NOBODY])
    sampler = watch("nvml")
    assert list(sampler.strangers()) == [("gpu0", NOBODY)]
    gpu(processes=[])
    assert sampler.strangers() == {}


def test_a_process_that_came_later_and_cannot_be_seen_from_here_may_be_the_engine(gpu, watch):
    sampler = watch("nvml")
    gpu(processes=[NOBODY], graphics=[NOBODY])
    assert sampler.strangers() == {}


@pytest.mark.parametrize("kind", ["processes", "graphics"])
def test_a_process_that_came_later_and_is_not_ours_is_a_stranger(gpu, watch, sysfs, kind):
    sampler = watch("nvml")
    sysfs.process(NOBODY, "blender")
    gpu(**{kind: [NOBODY]})
    assert list(sampler.strangers().values()) == [
        f"gpu0: process {NOBODY} (blender) is on it too; end it, or let such windows count with --most-others 1"
    ]


def test_what_this_process_started_is_ours(gpu, watch, sysfs):
    sampler = watch("nvml")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        sysfs.process(child.pid).process(os.getpid())
        gpu(processes=[child.pid, os.getpid()])
        assert sampler.strangers() == {}
    finally:
        child.communicate(b"\n")


def test_whatever_is_in_this_session_is_ours_also_when_its_parent_is_gone(gpu, watch, sysfs):
    sampler = watch("nvml")
    parent = (
        "import subprocess, sys; "
        "print(subprocess.Popen([sys.executable, '-c', 'input()'], stdout=subprocess.DEVNULL).pid, flush=True)"
    )
    orphan = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        pid = int(orphan.stdout.readline())
        orphan.wait()
        sysfs.process(pid)
        gpu(processes=[pid])
        assert sampler.strangers() == {}
    finally:
        orphan.communicate("\n")


def test_a_number_that_belongs_to_somebody_without_a_gpu_here_is_one_from_elsewhere(gpu, watch, sysfs):
    sampler = watch("nvml")
    sysfs.process(NOBODY, "sshd", maps="/usr/lib/libc.so.6")
    gpu(processes=[NOBODY])
    assert sampler.strangers() == {}


def test_a_process_that_may_not_be_looked_into_is_taken_for_a_stranger(gpu, watch, sysfs):
    sampler = watch("nvml")
    (sysfs.folder / f"proc/{NOBODY}").mkdir(parents=True)
    gpu(processes=[NOBODY])
    assert f"process {NOBODY} is on it too" in sampler.strangers()["gpu0", NOBODY]


@pytest.mark.parametrize(("before", "after"), [([NOBODY], []), ([], [NOBODY])], ids=["left", "came"])
def test_a_stranger_at_either_end_of_a_window_is_a_cause(gpu, watch, sysfs, before, after):
    sysfs.process(NOBODY)
    sampler = watch("nvml")
    gpu(processes=before)
    begun = sampler.begin()
    gpu(processes=after)
    _, _, strangers = sampler.end(begun, 0.0, 1.0)
    assert [said.split(";")[0] for said in strangers] == [f"gpu0: process {NOBODY} (python) is on it too"]


# --- the thread ------------------------------------------------------------------------------


def test_samples_come_by_themselves_and_end_with_the_sampler(sysfs):
    sysfs.sensor(0, "coretemp", ("Package id 0", 51_000))
    sampler = Sampler(root=sysfs.folder, period=0.001)
    give_up = time.monotonic() + 10
    while sampler.between(0, time.perf_counter()).samples < 3 and time.monotonic() < give_up:
        time.sleep(0.002)
    sampler.close()
    sampler.close()
    samples = sampler.between(0, time.perf_counter()).samples
    assert samples >= 3
    assert "telemetry" not in {thread.name for thread in threading.enumerate()}
    assert sampler.between(0, time.perf_counter()).samples == samples


class Waits:
    """Stands for the event that ends the thread: notes how long it would wait, and ends it after some rounds."""

    def __init__(self, rounds):
        self.rounds, self.seconds = rounds, []

    def wait(self, seconds):
        self.seconds.append(seconds)
        return len(self.seconds) > self.rounds


@pytest.mark.parametrize(("cost", "wait"), [(0.001, 1.0), (0.01, 1.0), (0.05, 5.0), (2.0, 200.0)])
def test_a_sampler_waits_long_enough_to_use_less_than_a_hundredth_of_a_cpu(sysfs, cost, wait):
    used = iter(range(100))
    sampler = Sampler(root=sysfs.folder, period=None, cpu_seconds=lambda: next(used) * cost)
    sampler._period, sampler._closed = 1.0, Waits(3)
    sampler._run()
    assert sampler._closed.seconds == [0.0, *[pytest.approx(wait)] * 3]
