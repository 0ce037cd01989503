import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tuner import __version__, machine
from tuner.machine import MUST_MATCH, describe, differences


class Root:
    """The files below `/` that a machine is known by."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, path, text):
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
        return self

    def cpu(self, number, *, package=0, core=0, governor=None):
        folder = f"sys/devices/system/cpu/cpu{number}"
        self.write(f"{folder}/topology/physical_package_id", package).write(f"{folder}/topology/core_id", core)
        if governor:
            self.write(f"{folder}/cpufreq/scaling_governor", governor)
        return self


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path)


@pytest.fixture
def fake_nvml(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "fakes")
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setenv("TUNE_FAKE_NVML", str(tmp_path / "nvml.json"))
    yield lambda state: (tmp_path / "nvml.json").write_text(json.dumps(state))
    sys.modules.pop("pynvml", None)


# --- describing ------------------------------------------------------------------------------


def test_this_machine_is_described_in_text():
    facts = describe()
    assert {"host", "os", "kernel", "cpu", "cores_logical", "cpus_allowed", "python", "tune"} <= set(facts)
    assert all(isinstance(value, str) and value for value in facts.values())
    assert facts["tune"] == __version__
    assert facts["cores_logical"] == str(os.cpu_count())


def test_what_nobody_can_see_is_left_out(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    facts = describe(root.folder)
    assert not {"governor", "virtual_machine", "container", "memory_gib", "cores_physical", "gpus"} & set(facts)
    assert facts["cpu"] == os.uname().machine


def test_two_descriptions_of_one_machine_agree():
    assert differences(describe(), describe()) == []


def test_describing_takes_less_than_a_twentieth_of_a_second_once_libraries_are_loaded():
    describe()
    start = time.process_time()
    describe()
    assert time.process_time() - start < 0.05


def test_cores_are_counted_by_package_and_core(root):
    for number, (package, core) in enumerate([(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 1)]):
        root.cpu(number, package=package, core=core)
    assert describe(root.folder)["cores_physical"] == "4"


@pytest.mark.parametrize(
    ("info", "model"),
    [
        ("processor\t: 0\nmodel name\t: AMD Ryzen 7  5800X 8-Core\nflags\t: fpu", "AMD Ryzen 7 5800X 8-Core"),
        ("processor\t: 0\nBogoMIPS\t: 108.00\n\nModel\t\t: Raspberry Pi 5 Model B", "Raspberry Pi 5 Model B"),
    ],
)
def test_a_cpu_has_the_name_that_the_kernel_gives(root, info, model):
    root.write("proc/cpuinfo", info)
    assert describe(root.folder)["cpu"] == model


def test_memory_is_in_gib(root):
    root.write("proc/meminfo", "MemTotal:       32768000 kB\nMemFree: 1 kB")
    assert describe(root.folder)["memory_gib"] == "31.2"


@pytest.mark.parametrize(
    ("limit", "share"), [("max 100000", 1), ("50000 100000", 0.5), ("900000 100000", 1), ("", 1), ("5 0", 1)]
)
def test_the_quota_of_a_container_limits_the_cpus(root, monkeypatch, limit, share):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    root.write("sys/fs/cgroup/cpu.max", limit)
    assert machine.cpus_allowed(root.folder) == share


def test_one_governor_is_named_once_and_several_all(root):
    for number in range(3):
        root.cpu(number, governor="performance")
    assert machine.governor(root.folder) == "performance"
    root.cpu(3, governor="powersave")
    assert machine.governor(root.folder) == "performance, powersave"


def test_sockets_are_counted_by_package(root):
    for number, package in enumerate([0, 0, 1, 1]):
        root.cpu(number, package=package, core=number)
    assert describe(root.folder)["sockets"] == "2"


@pytest.mark.parametrize(("active", "smt"), [("1", "on"), ("0", "off"), ("", None)])
def test_hyperthreading_is_on_off_or_unknown(root, active, smt):
    root.write("sys/devices/system/cpu/smt/active", active)
    assert describe(root.folder).get("smt") == smt


def test_microcode_is_named_once_for_each_kind(root):
    cpus = ["0xb", "0xa", "0xb"]
    root.write("proc/cpuinfo", "\n".join(f"processor : {n}\nmicrocode\t: {code}" for n, code in enumerate(cpus)))
    assert describe(root.folder)["microcode"] == "0xa, 0xb"


@pytest.mark.parametrize(
    ("supplies", "found"),
    [
        ({}, None),
        ({"AC": {"type": "Mains", "online": "1"}, "BAT0": {"type": "Battery", "status": "Charging"}}, "AC"),
        ({"AC": {"type": "Mains", "online": "0"}, "BAT0": {"type": "Battery", "status": "Discharging"}}, "battery"),
        ({"BAT0": {"type": "Battery", "status": "Not charging"}}, "AC"),
        ({"hid-mouse": {"type": "Battery", "scope": "Device", "status": "Discharging"}}, None),
        ({"ucsi": {"type": "USB", "online": "1"}, "BAT0": {"type": "Battery", "status": "Full"}}, "AC"),
    ],
    ids=["desktop", "plugged in", "on battery", "no adapter seen", "mouse", "USB-C"],
)
def test_it_is_known_whether_a_laptop_is_plugged_in(root, supplies, found):
    for name, facts in supplies.items():
        for key, text in facts.items():
            root.write(f"sys/class/power_supply/{name}/{key}", text)
    assert describe(root.folder).get("power_supply") == found


# --- where it runs ---------------------------------------------------------------------------

GUEST = {"proc/cpuinfo": "flags\t\t: fpu vme hypervisor lahf_lm"}
HOST = {"proc/cpuinfo": "flags\t\t: fpu vme lahf_lm"}


def dmi(vendor, product):
    return {"sys/class/dmi/id/sys_vendor": vendor, "sys/class/dmi/id/product_name": product}


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, ""),
        (HOST | dmi("LENOVO", "20XW"), ""),
        (GUEST, "unknown hypervisor"),
        (GUEST | dmi("QEMU", "Standard PC (Q35 + ICH9, 2009)"), "KVM"),
        (GUEST | dmi("Amazon EC2", "m7i.large"), "Amazon EC2 m7i.large"),
        (HOST | dmi("Amazon EC2", "m7i.metal-24xl"), ""),
        (GUEST | dmi("VMware, Inc.", "VMware7,1"), "VMware"),
        (GUEST | dmi("Microsoft Corporation", "Virtual Machine"), "Hyper-V"),
        (HOST | dmi("Microsoft Corporation", "Surface Laptop"), ""),
        ({"proc/version": "Linux version 6.6.87.2-microsoft-standard-WSL2"}, "WSL"),
    ],
)
def test_a_virtual_machine_is_told_by_its_marks(root, files, found):
    for path, text in files.items():
        root.write(path, text)
    assert machine.virtual_machine(root.folder) == found


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (".dockerenv", "Docker"),
        ("run/.containerenv", "Podman"),
        ("run/systemd/container", "lxc"),
        ("etc/os-release", ""),
    ],
)
def test_a_container_is_told_by_its_marks(root, path, found):
    root.write(path, "lxc")
    assert machine.container(root.folder) == found


# --- GPUs ------------------------------------------------------------------------------------


def test_gpus_are_listed_by_uuid_with_the_driver(fake_nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    fake_nvml(
        {"driver": "580.1", "gpus": [{"uuid": "GPU-b", "name": "NVIDIA T4"}, {"uuid": "GPU-a", "name": "NVIDIA H100"}]}
    )
    facts = describe()
    assert facts["gpus"] == "NVIDIA H100 (GPU-a); NVIDIA T4 (GPU-b)"
    assert (facts["gpu_driver"], facts["cuda_visible_devices"]) == ("580.1", "1")
    assert sys.modules["pynvml"]._users == 0


@pytest.mark.parametrize(
    "state",
    [
        {"init_error": 12, "gpus": []},
        {"gpus": []},
        {"gpus": [{"uuid": "GPU-a", "errors": {"nvmlDeviceGetUUID": 15}}]},
    ],
    ids=["no driver", "no GPU", "lost GPU"],
)
def test_no_gpu_is_made_up(fake_nvml, state):
    fake_nvml(state)
    assert not {"gpus", "gpu_driver", "cuda_visible_devices"} & set(describe())


def test_what_a_gpu_is_set_to_is_part_of_the_record(fake_nvml):
    settings = {"limit": 300, "default_limit": 350, "vbios": "96.00", "ecc": 1, "mig": 0, "persistence": 1}
    fake_nvml({"cuda": 13010, "gpus": [{"uuid": "GPU-a", **settings}]})
    facts = describe()
    assert {key: facts[key] for key in facts if key.startswith("gpu_")} == {
        "gpu_driver": "580.65.06",
        "gpu_power_limit_w": "300 (default 350)",
        "gpu_vbios": "96.00",
        "gpu_ecc": "on",
        "gpu_mig": "off",
        "gpu_persistence": "on",
    }
    assert facts["cuda"] == "13.1"


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ([{"limit": 350, "default_limit": 350}] * 2, "350"),
        ([{"limit": 350}] * 2, "350"),
        ([{"limit": 300, "default_limit": 350}, {"limit": 350, "default_limit": 350}], None),
        ([{}, {"limit": 350}], "GPU-b 350"),
        ([{"default_limit": 350}] * 2, ""),
    ],
    ids=["alike", "no default", "different", "one silent", "none enforced"],
)
def test_boards_that_are_set_alike_are_said_once(fake_nvml, limits, said):
    fake_nvml({"gpus": [{"uuid": f"GPU-{'ab'[i]}", **facts} for i, facts in enumerate(limits)]})
    expected = "GPU-a 300 (default 350); GPU-b 350" if said is None else said
    assert describe().get("gpu_power_limit_w", "") == expected


def test_a_limit_that_was_changed_parts_results(fake_nvml):
    fake_nvml({"gpus": [{"uuid": "GPU-a", "limit": 350}]})
    before = describe()
    fake_nvml({"gpus": [{"uuid": "GPU-a", "limit": 300}]})
    assert differences(before, describe()) == ["gpu_power_limit_w: recorded '350', here '300'"]


def test_a_setting_that_the_driver_does_not_tell_is_left_out(fake_nvml):
    fake_nvml({"gpus": [{"uuid": "GPU-a", "errors": {"nvmlDeviceGetVbiosVersion": 999}}]})
    facts = describe()
    assert facts["gpus"] == "NVIDIA Fake 100 (GPU-a)"
    assert not {"gpu_power_limit_w", "gpu_vbios", "gpu_ecc", "gpu_mig", "gpu_persistence"} & set(facts)


# --- this program ----------------------------------------------------------------------------


GIT = shutil.which("git")


def git(folder, *words):
    if GIT is None:
        pytest.skip("git is not installed")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run([GIT, *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    return tmp_path


def test_the_commit_is_the_one_that_git_names(checkout):
    assert machine.commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_a_packed_branch_is_found(checkout):
    git(checkout, "pack-refs", "--all")
    assert machine.commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_a_detached_head_is_its_own_commit(checkout):
    git(checkout, "checkout", "-q", "--detach")
    assert machine.commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_a_worktree_has_the_commit_of_its_own_branch(checkout):
    git(checkout, "worktree", "add", "-q", "-b", "side", "tree")
    git(checkout / "tree", "commit", "-q", "--allow-empty", "-m", "second")
    assert machine.commit(checkout / "tree") == git(checkout / "tree", "rev-parse", "HEAD")
    assert machine.commit(checkout / "tree") != machine.commit(checkout)


@pytest.mark.parametrize("head", [None, "", "ref: refs/heads/main", "garbage"])
def test_what_is_no_commit_is_left_out(tmp_path, head):
    if head is not None:
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git" / "HEAD").write_text(f"{head}\n")
    assert machine.commit(tmp_path) == ""


# --- comparing -------------------------------------------------------------------------------


def test_a_difference_names_the_key_and_both_values():
    assert differences({"cpu": "A", "host": "h"}, {"cpu": "B", "host": "h"}) == ["cpu: recorded 'A', here 'B'"]


def test_a_fact_that_only_one_side_knows_is_a_difference():
    assert differences({}, {"gpus": "G"}) == ["gpus: recorded nothing, here 'G'"]
    assert differences({"gpus": "G"}, {}) == ["gpus: recorded 'G', here nothing"]


@pytest.mark.parametrize("key", ["kernel", "memory_gib", "python", "tune", "container", "gpu_vbios"])
def test_what_changes_with_every_update_does_not_part_results(key):
    assert differences({key: "1"}, {key: "2"}) == []


@pytest.mark.parametrize("key", MUST_MATCH)
def test_every_other_fact_does(key):
    assert len(differences({key: "1"}, {key: "2"})) == 1


def test_other_keys_may_be_asked_for():
    assert differences({"python": "3.11"}, {"python": "3.12"}, keys=("python",))


# --- load ------------------------------------------------------------------------------------


def test_a_system_without_a_load_average_has_none(monkeypatch):
    def missing():
        raise OSError

    monkeypatch.setattr(os, "getloadavg", missing)
    assert math.isnan(machine.load_average())


def test_importing_it_is_cheap():
    code = "import sys, tuner.machine; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pynvml", "psutil", "tuner.meters"} & set(modules)
