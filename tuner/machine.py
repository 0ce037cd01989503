"""What this machine is: the facts that a result depends on, and which of them must agree.

Every value is text, as people and journals read it. A fact that cannot be found out is left out, so that
a record never says something that nobody saw. Nothing here needs rights, and nothing takes long.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import platform
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tuner import __version__

MUST_MATCH: tuple[str, ...] = (
    "host",
    "os",
    "cpu",
    "cores_physical",
    "cores_logical",
    "cpus_allowed",
    "governor",
    "virtual_machine",
    "gpus",
    "gpu_driver",
    "gpu_power_limit_w",
    "cuda_visible_devices",
)
"""Facts that must agree before results may be compared. The rest (kernel, memory, versions) is for readers."""


def describe(root: Path = Path("/")) -> dict[str, str]:
    """The identity of this machine. `root` is where `/proc` and `/sys` are looked for."""
    facts = {
        "host": socket.gethostname(),
        "os": platform.system(),
        "kernel": platform.release(),
        "cpu": cpu_model(root),
        "cores_physical": str(_cores_physical(root) or ""),
        "cores_logical": str(os.cpu_count() or ""),
        "cpus_allowed": f"{cpus_allowed(root):g}",
        "sockets": str(_sockets(root) or ""),
        "smt": {"0": "off", "1": "on"}.get(_text(root / "sys/devices/system/cpu/smt/active"), ""),
        "microcode": _microcode(root),
        "memory_gib": _memory_gib(root),
        "governor": governor(root),
        "power_supply": power_supply(root),
        "virtual_machine": virtual_machine(root),
        "container": container(root),
        **_gpus(),
        "python": platform.python_version(),
        "tune": __version__,
        "tune_commit": commit(),
    }
    return {key: value for key, value in facts.items() if value}


def differences(recorded: Mapping[str, str], here: Mapping[str, str], keys: Sequence[str] = MUST_MATCH) -> list[str]:
    """One sentence for each key on which the two disagree; empty when results may meet."""

    def said(facts: Mapping[str, str], key: str) -> str:
        return repr(facts[key]) if key in facts else "nothing"

    return [
        f"{key}: recorded {said(recorded, key)}, here {said(here, key)}"
        for key in keys
        if recorded.get(key) != here.get(key)
    ]


# --- CPU and memory --------------------------------------------------------------------------


def cpu_model(root: Path = Path("/")) -> str:
    """`AMD EPYC 9654`; the architecture where the kernel gives no name."""
    info = _text(root / "proc/cpuinfo")
    named = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", info, re.MULTILINE)
    return " ".join(named[1].split()) if named else platform.machine()


def cpus_allowed(root: Path = Path("/")) -> float:
    """How many CPUs this process may keep busy: its affinity, cut down by the quota of its cgroup (v2)."""
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    quota, _, period = _text(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:
        return min(allowed, round(int(quota) / int(period), 2))
    return allowed


def governor(root: Path = Path("/")) -> str:
    """The frequency governor of every CPU, `performance` or `powersave, schedutil`; empty when unreadable."""
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return ", ".join(sorted({_text(file) for file in files} - {""}))


def _cores_physical(root: Path) -> int:
    """Distinct pairs of package and core among the CPUs that are online; 0 where the kernel does not say."""
    cores = set()
    for topology in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology"):
        core = (_text(topology / "physical_package_id"), _text(topology / "die_id"), _text(topology / "core_id"))
        if core[-1]:
            cores.add(core)
    return len(cores)


def _sockets(root: Path) -> int:
    """Distinct packages among the CPUs that are online; 0 where the kernel does not say."""
    packages = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/physical_package_id")
    return len({_text(file) for file in packages} - {"", "-1"})


def _microcode(root: Path) -> str:
    """`0x2b000590`, or several where the packages differ."""
    found = re.findall(r"^microcode\s*:\s*(\S+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return ", ".join(sorted(set(found)))


def power_supply(root: Path = Path("/")) -> str:
    """`AC` or `battery`; empty where the machine has no choice. The batteries of mice and keyboards are none."""
    supplies = sorted((root / "sys/class/power_supply").glob("*"))
    batteries = [s for s in supplies if _text(s / "type") == "Battery" and _text(s / "scope") != "Device"]
    if any(_text(supply / "online") == "1" for supply in supplies if supply not in batteries):
        return "AC"
    if any(_text(battery / "status") == "Discharging" for battery in batteries):
        return "battery"
    return "AC" if batteries else ""


def _memory_gib(root: Path) -> str:
    total = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return f"{int(total[1]) / 2**20:.1f}" if total else ""


# --- where it runs ---------------------------------------------------------------------------


def virtual_machine(root: Path = Path("/")) -> str:
    """What kind of virtual machine this is, `KVM` or `unknown hypervisor`; empty on bare metal."""
    if "microsoft" in _text(root / "proc/version").lower():
        return "WSL"
    guest = re.search(r"^flags\s*:.*\bhypervisor\b", _text(root / "proc/cpuinfo"), re.MULTILINE) is not None
    vendor = f"{_text(root / 'sys/class/dmi/id/sys_vendor')} {_text(root / 'sys/class/dmi/id/product_name')}"
    for pattern, name in (
        ("KVM|QEMU|Google Compute|OpenStack|DigitalOcean|Hetzner", "KVM"),
        ("VMware", "VMware"),
        ("VirtualBox|innotek", "VirtualBox"),
        ("Xen", "Xen"),
        ("Microsoft Corporation Virtual", "Hyper-V"),
        ("Parallels", "Parallels"),
        ("Firecracker", "Firecracker"),
    ):
        if re.search(pattern, vendor):
            return name
    # A cloud's own vendor name is on its bare-metal machines too, so it takes the CPU's flag to tell.
    return (" ".join(vendor.split()) or "unknown hypervisor") if guest else ""


def container(root: Path = Path("/")) -> str:
    """`Docker`, `Podman` or what systemd names; empty outside of a container."""
    if (root / ".dockerenv").exists():
        return "Docker"
    if (root / "run/.containerenv").exists():
        return "Podman"
    return _text(root / "run/systemd/container")


# --- GPUs ------------------------------------------------------------------------------------


def _gpus() -> dict[str, str]:
    """Every NVIDIA GPU, whether it is visible to CUDA or not; nothing where there is no driver."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    found = {}
    with contextlib.suppress(pynvml.NVMLError):
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        # By UUID: the order in which NVML lists them may change with every boot.
        gpus = sorted((pynvml.nvmlDeviceGetUUID(h), pynvml.nvmlDeviceGetName(h), h) for h in handles)
        if gpus:
            found["gpus"] = "; ".join(f"{name} ({uuid})" for uuid, name, _ in gpus)
            found["gpu_driver"] = pynvml.nvmlSystemGetDriverVersion()
            found["cuda_visible_devices"] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
            found |= _gpu_settings(pynvml, {uuid: handle for uuid, _, handle in gpus})
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlShutdown()
    return found


def _gpu_settings(pynvml: ModuleType, boards: Mapping[str, Any]) -> dict[str, str]:
    """What each board is set to: one value where all agree, else one for each UUID."""

    def asked(function: str, said: Callable[[Any], str], *arguments: Any) -> str:
        try:
            return said(getattr(pynvml, function)(*arguments))
        except pynvml.NVMLError:
            return ""

    def switch(state: Any) -> str:
        # ECC and MIG come with the state that the next boot brings; what holds now stands first.
        return "on" if (state[0] if isinstance(state, list | tuple) else state) else "off"

    def watts(milliwatts: int) -> str:
        return f"{milliwatts / 1000:g}"

    def limit(handle: Any) -> str:
        enforced = asked("nvmlDeviceGetEnforcedPowerLimit", watts, handle)
        default = asked("nvmlDeviceGetPowerManagementDefaultLimit", watts, handle)
        return f"{enforced} (default {default})" if enforced and default not in ("", enforced) else enforced

    facts: dict[str, Callable[[Any], str]] = {
        "gpu_power_limit_w": limit,
        "gpu_vbios": lambda handle: asked("nvmlDeviceGetVbiosVersion", str, handle),
        "gpu_ecc": lambda handle: asked("nvmlDeviceGetEccMode", switch, handle),
        "gpu_mig": lambda handle: asked("nvmlDeviceGetMigMode", switch, handle),
        "gpu_persistence": lambda handle: asked("nvmlDeviceGetPersistenceMode", switch, handle),
    }
    found = {}
    for key, fact in facts.items():
        values = {uuid: value for uuid, handle in boards.items() if (value := fact(handle))}
        one = len(set(values.values())) == 1 and len(values) == len(boards)
        found[key] = next(iter(values.values())) if one else "; ".join(f"{uuid} {v}" for uuid, v in values.items())
    # 1000 x major + 10 x minor (NVML, nvmlSystemGetCudaDriverVersion).
    found["cuda"] = asked("nvmlSystemGetCudaDriverVersion", lambda n: f"{n // 1000}.{n % 1000 // 10}")
    return found


# --- this program ----------------------------------------------------------------------------


def commit(checkout: Path = Path(__file__).parent.parent) -> str:
    """The git commit that `checkout` stands at, from git's own files; empty where it is no checkout.

    Files: gitrepository-layout(5). Whether something was changed since is not told.
    """
    git = checkout / ".git"
    if link := re.match(r"gitdir: (.+)", _text(git) if git.is_file() else ""):
        git = checkout / link[1]  # of a worktree, whose branches are in the repository that it belongs to
    head = _text(git / "HEAD")
    if (branch := head.removeprefix("ref: ")) != head:
        common = git / (_text(git / "commondir") or ".")
        packed = re.search(rf"^([0-9a-f]+) {re.escape(branch)}$", _text(common / "packed-refs"), re.MULTILINE)
        head = _text(common / branch) or (packed[1] if packed else "")
    return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else ""


def load_average() -> float:
    """Runnable and waiting threads, averaged over one minute; NaN where the system has no such number."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return math.nan


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
