import importlib.util
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest

from tuner import doctor, machine
from tuner.doctor import Check, compare, engine, examine, governor, key, load, second_opinion, surroundings
from tuner.meters import MeterOptions

# Sends the paths below /sys that pyRAPL has written into it to a folder of the test. Everything else in
# that process, pyRAPL included, is the real thing.
SITECUSTOMIZE = """
import builtins, os, os.path
really_open, really_exists = builtins.open, os.path.exists
def moved(path):
    return os.environ["FAKE_SYS"] + path[4:] if isinstance(path, str) and path.startswith("/sys/") else path
builtins.open = lambda path, *rest, **named: really_open(moved(path), *rest, **named)
os.path.exists = lambda path: really_exists(moved(path))
"""


class Sockets:
    """Packages that draw power, as files: fixed width and written in place, because pyRAPL keeps them open."""

    def __init__(self, sys_folder, names=("package-0",), watts=40.0):
        self.watts = watts
        self.start = time.monotonic()
        self.root = sys_folder / "class/powercap"
        self.zones = []
        for number, name in enumerate(names):
            zone = self.root / f"intel-rapl/intel-rapl:{number}"
            zone.mkdir(parents=True)
            (zone / "name").write_text(f"{name}\n")
            (zone / "max_energy_range_uj").write_text("262143328850\n")
            topology = sys_folder / f"devices/system/cpu/cpu{number}/topology"
            topology.mkdir(parents=True)
            (topology / "physical_package_id").write_text(f"{name.split('-')[1]}\n")
            self.zones.append(zone)
        last = len(names) - 1
        (sys_folder / "devices/system/cpu/present").write_text(f"0-{last}\n" if last else "0\n")
        self.tick()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def tick(self):
        for number, zone in enumerate(self.zones):
            joules = 1000 + 100 * number + self.watts * (time.monotonic() - self.start)
            descriptor = os.open(zone / "energy_uj", os.O_WRONLY | os.O_CREAT)
            os.pwrite(descriptor, b"%011d\n" % round(1e6 * joules), 0)
            os.close(descriptor)

    def run(self):
        while not self.stopped.wait(0.002):
            self.tick()

    def stop(self):
        self.stopped.set()
        self.thread.join()


@pytest.fixture
def sockets(tmp_path, monkeypatch):
    """`sockets(...)` builds a fake /sys that both readers see; `theirs` gives pyRAPL one of its own."""
    running = []
    (tmp_path / "path").mkdir()
    (tmp_path / "path/sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))

    def sockets(*names, watts=40.0, theirs=False):
        folder = tmp_path / ("theirs" if theirs else "sys")
        running.append(Sockets(folder, names or ("package-0",), watts))
        monkeypatch.setenv("FAKE_SYS", str(folder))
        if not theirs:
            monkeypatch.setenv("TUNE_POWERCAP_ROOT", str(running[-1].root))
        return running[-1]

    yield sockets
    for socket in running:
        socket.stop()


def joules(check):
    words = check.reason.split()
    return [float(words[i - 1]) for i, word in enumerate(words) if word == "J"]


# --- the second opinion: pyRAPL itself, in a process of its own ------------------------------


def test_pyrapl_and_our_reader_agree(sockets):
    sockets("package-0", "package-1", watts=30)
    check = second_opinion(seconds=0.25)
    assert check.state == "ok", check
    assert joules(check) == pytest.approx([2 * 30 * 0.25] * 2, rel=0.4)


def test_a_reader_that_sees_something_else_is_a_warning_with_both_numbers(sockets):
    sockets(watts=40)
    sockets(watts=80, theirs=True)
    check = second_opinion(seconds=0.25)
    assert check.state == "warning"
    ours, theirs = joules(check)
    assert theirs == pytest.approx(2 * ours, rel=0.2)


def test_a_machine_that_pyrapl_cannot_read_is_named_with_its_own_error(sockets):
    sockets("package-0-die-0", "package-0-die-1")
    check = second_opinion(seconds=0.01)
    assert check.state == "warning"
    assert "pyRAPL cannot be asked: PyRAPLCantRecordEnergyConsumption" in check.reason


def test_without_pyrapl_its_installation_is_the_remedy(sockets, monkeypatch):
    sockets()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert second_opinion().remedy == "pip install pyRAPL"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("print(input() or '[1e6, -1]')", "where -1 stands for a package without a counter"),
        ("print(input() or '[]')", r"it reads \[\]"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import time; time.sleep(60)", "no answer within 0.3 s"),
    ],
    ids=["absent package", "no package", "silent end", "hangs"],
)
def test_a_second_reader_that_gives_no_number_is_not_believed(sockets, monkeypatch, answer, reason):
    sockets()
    monkeypatch.setattr(doctor, "SECOND_READER", answer)
    monkeypatch.setattr(doctor, "SECOND_READER_SECONDS", 0.3 if "sleep" in answer else 20.0)
    check = second_opinion(seconds=0.01)
    assert check.state == "warning"
    assert re.search(reason, check.reason)


def test_a_counter_that_is_lost_meanwhile_is_a_warning(sockets, monkeypatch):
    socket = sockets()
    monkeypatch.setattr(
        time, "sleep", lambda seconds: (socket.stop(), (socket.zones[0] / "energy_uj").write_text("x\n"))
    )
    monkeypatch.setattr(doctor, "SECOND_READER", "while True: print(input() or '[1e6]', flush=True)")
    check = second_opinion()
    assert check.state == "warning"
    assert "could not be read" in check.reason


@pytest.mark.parametrize(
    ("ours", "theirs", "state"),
    [
        (40.0, 40.0, "ok"),
        (40.0, 36.1, "ok"),
        (36.1, 40.0, "ok"),
        (40.0, 35.9, "warning"),
        (35.9, 40.0, "warning"),
        (0.0, 0.0, "warning"),
        (0.0, 5.0, "warning"),
        (40.0, -262104.0, "warning"),
    ],
)
def test_readers_agree_within_a_tenth_or_not_at_all(ours, theirs, state):
    check = compare(ours, theirs)
    assert check.state == state
    assert joules(check) == [ours, theirs]
    assert bool(check.remedy) == (state != "ok")


def test_a_wrap_that_pyrapl_does_not_know_is_said_to_be_one():
    assert "a counter began anew" in compare(40.0, -262104.0).reason


# --- the whole -------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """Nothing to measure with, on any machine."""
    monkeypatch.setenv("TUNE_POWERCAP_ROOT", str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "zeus", None)
    for name in doctor.KEYS:
        monkeypatch.delenv(name, raising=False)


def test_everything_is_looked_at_in_a_fixed_order(bare):
    assert [check.name for check in examine(MeterOptions())] == [
        "meter nvml",
        "meter rapl",
        "meter estimate",
        "meter wall",
        "machine",
        "frequency governor",
        "other load",
        "engine llama",
        "key OPENAI_API_KEY",
        "key ANTHROPIC_API_KEY",
    ]


def test_every_check_that_is_not_ok_says_why_and_what_to_type(bare):
    for check in examine(MeterOptions()):
        assert check.reason
        assert bool(check.remedy) == (check.state != "ok"), check


def test_the_doctor_prints_nothing(bare, capfd):
    examine(MeterOptions())
    assert capfd.readouterr() == ("", "")


def test_readers_are_compared_where_rapl_can_be_read(sockets, monkeypatch, tmp_path):
    sockets()
    monkeypatch.setattr(doctor, "second_opinion", lambda: Check("rapl against pyRAPL", "ok", "asked", ""))
    found = {check.name: check for check in examine(MeterOptions())}
    assert found["meter rapl"].state == "ok"
    assert found["rapl against pyRAPL"].reason == "asked"


def test_meters_are_found_where_they_are(bare, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.syspath_prepend(Path(__file__).parent / "fakes")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvml.json").write_text(json.dumps({"gpus": [{"uuid": "GPU-a", "name": "NVIDIA H100"}]}))
    monkeypatch.setenv("TUNE_FAKE_NVML", str(tmp_path / "nvml.json"))
    found = {check.name: check for check in examine(MeterOptions())}
    sys.modules.pop("pynvml")
    assert found["meter nvml"] == Check("meter nvml", "ok", "gpu0 is NVIDIA H100 (GPU-a)", "")


def test_no_wall_meter_is_no_fault(bare):
    found = {check.name: check for check in examine(MeterOptions())}
    assert found["meter wall"].state == "ok"
    assert "not in use; --meter wall reads" in found["meter wall"].reason


@pytest.mark.parametrize(
    ("command", "state", "reason"),
    [("echo 42 W", "ok", 'wall0 is 42 W by "echo 42 W"'), ("echo hello", "missing", "expected a number with a unit")],
)
def test_a_wall_meter_that_is_named_is_tried(bare, command, state, reason):
    checks = [c for c in examine(MeterOptions.parse(wall_command=command)) if c.name == "meter wall"]
    assert [check.state for check in checks] == [state]
    assert reason in checks[0].reason


def test_zeus_is_looked_at_where_it_is_installed(bare, monkeypatch):
    monkeypatch.delitem(sys.modules, "zeus")
    monkeypatch.syspath_prepend(Path(__file__).parent / "fakes/zeus_package")
    monkeypatch.delenv("TUNE_FAKE_ZEUS", raising=False)
    found = {check.name: check for check in examine(MeterOptions())}
    for name in [name for name in sys.modules if name.partition(".")[0] == "zeus"]:
        del sys.modules[name]
    assert found["meter zeus"].state == "missing"
    assert "NVML and AMDSMI unavailable" in found["meter zeus"].reason


# --- one by one ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("virtual", "container", "state", "reason"),
    [
        ("", "", "ok", "no virtual machine and no container"),
        ("KVM", "", "warning", r"a virtual machine (KVM): it has no CPU energy counters"),
        ("KVM", "Docker", "warning", r"a virtual machine (KVM) with a container (Docker)"),
        ("", "Docker", "warning", r"a container (Docker): it hides"),
    ],
)
def test_surroundings_explain_why_counters_are_missing(monkeypatch, virtual, container, state, reason):
    monkeypatch.setattr(machine, "virtual_machine", lambda root: virtual)
    monkeypatch.setattr(machine, "container", lambda root: container)
    check = surroundings()
    assert check.state == state
    assert reason in check.reason


@pytest.mark.parametrize(
    ("governors", "state"),
    [([], "missing"), (["performance", "performance"], "ok"), (["performance", "powersave"], "warning")],
)
def test_the_governor_should_be_known_and_one(tmp_path, governors, state):
    for number, name in enumerate(governors):
        file = tmp_path / f"sys/devices/system/cpu/cpu{number}/cpufreq/scaling_governor"
        file.parent.mkdir(parents=True)
        file.write_text(f"{name}\n")
    assert governor(tmp_path).state == state


@pytest.mark.parametrize(
    ("average", "cpus", "state"),
    [(0.0, 8, "ok"), (0.8, 8, "ok"), (0.81, 8, "warning"), (0.3, 2, "warning"), (float("nan"), 8, "ok")],
)
def test_load_is_judged_against_the_number_of_cpus(average, cpus, state):
    assert load(average, cpus).state == state


def test_the_load_of_this_machine_is_the_default(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1234.5, 0, 0))
    assert "1234.50" in load().reason


def test_the_engine_is_named_with_its_version(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: {"xllamacpp": "2026.10", "gguf": "0.19"}[package])
    assert engine() == Check("engine llama", "ok", "xllamacpp 2026.10, gguf 0.19", "")


def test_a_missing_engine_comes_with_its_installation(monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert engine() == Check(
        "engine llama", "missing", "xllamacpp and gguf not installed", "pip install xllamacpp gguf"
    )


def test_a_key_is_said_to_be_there_and_never_shown():
    check = key("OPENAI_API_KEY", {"OPENAI_API_KEY": "sk-7f3a"})
    assert check.state == "ok"
    assert "7f3a" not in repr(check)


@pytest.mark.parametrize("environment", [{}, {"OPENAI_API_KEY": ""}, {"OPENAI_API_KEY": "  "}])
def test_an_empty_key_is_none(environment):
    assert key("OPENAI_API_KEY", environment).state == "missing"
