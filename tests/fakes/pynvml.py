"""A `pynvml` without a GPU: the functions, units and errors of nvidia-ml-py that tune uses.

Put this folder first on `sys.path`, or on `PYTHONPATH` for a subprocess. `TUNE_FAKE_NVML` names a JSON file
that is read anew at every call, so that a test can pull a GPU out in the middle of a window:

    {"driver": "580.1", "init_error": 12, "gpus": [{
        "uuid": "GPU-...", "name": "NVIDIA H100", "pci": [0, 1, 0], "mig": 0,
        "watts": 100, "millijoules": 5000, "errors": {"nvmlDeviceGetTotalEnergyConsumption": 15}}]}

`TUNE_FAKE_NVML_STATE` names the file in which a power limit or a locked clock that was set is kept, like in a
driver, whatever happens to the process that set it. Facts for these, in W and MHz: `limit`, `default_limit`,
`limit_range`, `sm_clocks`, `application_clock`; `enforces` caps what the board enforces, `deaf` makes it take
settings without doing anything, `slow_seconds` lets it take its time over them.

Without it there is one GPU of 100 W. A counter stands at `millijoules` plus `watts` since boot, like the
real one, which counts since the driver was loaded.
"""

# ruff: noqa: N802, PLW0603 - names, counting of users and class attributes are those of nvidia-ml-py

import json
import os
import string
import sys
import time
from pathlib import Path
from types import SimpleNamespace

NVML_TEMPERATURE_GPU = 0
NVML_CLOCK_GRAPHICS = 0
NVML_CLOCK_SM = 1
NVML_CLOCK_MEM = 2

NVML_ERROR_UNINITIALIZED = 1
NVML_ERROR_INVALID_ARGUMENT = 2
NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_NO_PERMISSION = 4
NVML_ERROR_NOT_FOUND = 6
NVML_ERROR_DRIVER_NOT_LOADED = 9
NVML_ERROR_TIMEOUT = 10
NVML_ERROR_LIBRARY_NOT_FOUND = 12
NVML_ERROR_FUNCTION_NOT_FOUND = 13
NVML_ERROR_GPU_IS_LOST = 15
NVML_ERROR_RESET_REQUIRED = 16
NVML_ERROR_OPERATING_SYSTEM = 17
NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18
NVML_ERROR_MEMORY = 20
NVML_ERROR_UNKNOWN = 999

DEFAULT = {"gpus": [{"uuid": "GPU-11111111-0000-0000-0000-000000000000", "watts": 100}]}

_users = 0


class NVMLError(Exception):
    """As in nvidia-ml-py: `NVMLError(15)` makes an `NVMLError_GpuIsLost` whose `value` is 15."""

    _by_code = {}

    def __new__(cls, value):
        chosen = NVMLError._by_code.get(value, cls) if cls is NVMLError else cls
        error = Exception.__new__(chosen)
        error.value = value
        return error

    def __str__(self):
        return f"NVML Error with code {self.value}"


def _error_classes():
    module = sys.modules[__name__]
    for constant in [name for name in dir(module) if name.startswith("NVML_ERROR_")]:
        value = getattr(module, constant)
        words = string.capwords(constant.removeprefix("NVML_ERROR_"), "_").replace("_", "")

        def new(cls, *_, value=value):
            return NVMLError.__new__(cls, value)

        kind = type(f"NVMLError_{words}", (NVMLError,), {"__new__": new, "__module__": __name__})
        setattr(module, kind.__name__, kind)
        NVMLError._by_code[value] = kind


_error_classes()


def _nvmlGetFunctionPointer(name):
    raise NVMLError(NVML_ERROR_FUNCTION_NOT_FOUND)


def _config():
    path = os.environ.get("TUNE_FAKE_NVML")
    return json.loads(Path(path).read_text()) if path else DEFAULT


def _gpu(handle, function):
    if _users < 1:
        raise NVMLError(NVML_ERROR_UNINITIALIZED)
    for gpu in _config()["gpus"]:
        if gpu["uuid"] == handle:
            if code := gpu.get("errors", {}).get(function):
                raise NVMLError(code)
            return gpu
    raise NVMLError(NVML_ERROR_GPU_IS_LOST)


def nvmlInit():
    global _users
    if code := _config().get("init_error"):
        raise NVMLError(code)
    _users += 1


def nvmlShutdown():
    global _users
    if _users < 1:
        raise NVMLError(NVML_ERROR_UNINITIALIZED)
    _users -= 1


def nvmlSystemGetDriverVersion():
    return _config().get("driver", "580.65.06")


def nvmlDeviceGetCount():
    if _users < 1:
        raise NVMLError(NVML_ERROR_UNINITIALIZED)
    return len(_config()["gpus"])


def nvmlDeviceGetHandleByIndex(index):
    gpus = _config()["gpus"]
    if not 0 <= index < len(gpus):
        raise NVMLError(NVML_ERROR_INVALID_ARGUMENT)
    _gpu(gpus[index]["uuid"], "nvmlDeviceGetHandleByIndex")
    return gpus[index]["uuid"]


def nvmlDeviceGetHandleByUUID(uuid):
    if uuid not in [gpu["uuid"] for gpu in _config()["gpus"]]:
        raise NVMLError(NVML_ERROR_NOT_FOUND)
    return _gpu(uuid, "nvmlDeviceGetHandleByUUID")["uuid"]


def nvmlDeviceGetUUID(handle):
    return _gpu(handle, "nvmlDeviceGetUUID")["uuid"]


def nvmlDeviceGetName(handle):
    return _gpu(handle, "nvmlDeviceGetName").get("name", "NVIDIA Fake 100")


def nvmlDeviceGetPciInfo(handle):
    domain, bus, device = _gpu(handle, "nvmlDeviceGetPciInfo").get("pci", [0, 1, 0])
    return SimpleNamespace(domain=domain, bus=bus, device=device)


def nvmlDeviceGetMigMode(handle):
    mode = _gpu(handle, "nvmlDeviceGetMigMode").get("mig")
    if mode is None:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return [mode, mode]


def _known(handle, function, key, default=None):
    """A fact of the board; NotSupported where the state names none."""
    value = _gpu(handle, function).get(key, default)
    if value is None:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return value


def nvmlSystemGetCudaDriverVersion():
    """1000 x major + 10 x minor."""
    return _config().get("cuda", 13000)


def nvmlDeviceGetVbiosVersion(handle):
    return _known(handle, "nvmlDeviceGetVbiosVersion", "vbios")


def nvmlDeviceGetEccMode(handle):
    mode = _known(handle, "nvmlDeviceGetEccMode", "ecc")
    return [mode, mode]


def nvmlDeviceGetPersistenceMode(handle):
    return _known(handle, "nvmlDeviceGetPersistenceMode", "persistence")


def nvmlDeviceGetTemperature(handle, sensor):
    return _known(handle, "nvmlDeviceGetTemperature", "celsius")


def nvmlDeviceGetClockInfo(handle, clock):
    """MHz."""
    locked = _set(handle).get("locked_mhz")
    if locked and clock == NVML_CLOCK_SM and _gpu(handle, "nvmlDeviceGetClockInfo"):
        return locked[1]
    return _known(handle, "nvmlDeviceGetClockInfo", {NVML_CLOCK_SM: "sm_mhz", NVML_CLOCK_MEM: "memory_mhz"}[clock])


def nvmlDeviceGetPowerUsage(handle):
    """Milliwatts."""
    gpu = _gpu(handle, "nvmlDeviceGetPowerUsage")
    return int(1000 * gpu.get("watts", 0))


def nvmlDeviceGetUtilizationRates(handle):
    """Per cent."""
    return SimpleNamespace(gpu=_known(handle, "nvmlDeviceGetUtilizationRates", "utilization"), memory=0)


def nvmlDeviceGetCurrentClocksEventReasons(handle):
    return _known(handle, "nvmlDeviceGetCurrentClocksEventReasons", "reasons")


def nvmlDeviceGetCurrentClocksThrottleReasons(handle):
    return _known(handle, "nvmlDeviceGetCurrentClocksThrottleReasons", "old_reasons")


def nvmlDeviceGetComputeRunningProcesses(handle):
    pids = _gpu(handle, "nvmlDeviceGetComputeRunningProcesses").get("processes", [])
    return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in pids]


def nvmlDeviceGetGraphicsRunningProcesses(handle):
    pids = _gpu(handle, "nvmlDeviceGetGraphicsRunningProcesses").get("graphics", [])
    return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in pids]


def nvmlDeviceGetEnforcedPowerLimit(handle):
    """Milliwatts; `limit` and `enforces` in the state are in watts."""
    gpu = _gpu(handle, "nvmlDeviceGetEnforcedPowerLimit")
    limit = _limit_milliwatts(handle, "nvmlDeviceGetEnforcedPowerLimit")
    return min(limit, int(1000 * gpu.get("enforces", 1e6)))


def nvmlDeviceGetPowerManagementDefaultLimit(handle):
    """Milliwatts; `default_limit` in the state is in watts."""
    return int(1000 * _known(handle, "nvmlDeviceGetPowerManagementDefaultLimit", "default_limit"))


def nvmlDeviceGetTotalEnergyConsumption(handle):
    """Millijoules since some moment before this process began."""
    gpu = _gpu(handle, "nvmlDeviceGetTotalEnergyConsumption")
    return int(gpu.get("millijoules", 0) + 1000 * gpu.get("watts", 0) * time.monotonic())


def nvmlDeviceGetMemoryInfo(handle):
    """Bytes, as in version 1 of the real structure."""
    gpu = _gpu(handle, "nvmlDeviceGetMemoryInfo")
    used = gpu.get("used_memory", 0)
    return SimpleNamespace(total=80 << 30, used=used, free=(80 << 30) - used)


# --- what can be set: kept in a file of its own, which outlives the process that set it ---


def _state():
    path = os.environ.get("TUNE_FAKE_NVML_STATE")
    return json.loads(Path(path).read_text()) if path and Path(path).exists() else {}


def _set(handle):
    return _state().get(handle, {})


def _keep(handle, function, **changes):
    """A change takes place at once or not at all; `calls` counts how often anything was set."""
    time.sleep(_gpu(handle, function).get("slow_seconds", 0))
    state = _state()
    own = state.setdefault(handle, {})
    own.setdefault("calls", {})[function] = own.setdefault("calls", {}).get(function, 0) + 1
    if not _gpu(handle, function).get("deaf"):
        own |= changes
    path = Path(os.environ["TUNE_FAKE_NVML_STATE"])
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(state))
    part.replace(path)


def _limit_milliwatts(handle, function):
    return _set(handle).get("limit_mw") or int(1000 * _known(handle, function, "limit"))


def nvmlDeviceGetPowerManagementLimit(handle):
    """Milliwatts."""
    return _limit_milliwatts(handle, "nvmlDeviceGetPowerManagementLimit")


def nvmlDeviceGetPowerManagementLimitConstraints(handle):
    """Least and largest, in milliwatts."""
    limits = _known(handle, "nvmlDeviceGetPowerManagementLimitConstraints", "limit_range")
    return [int(1000 * watts) for watts in limits]


def nvmlDeviceSetPowerManagementLimit(handle, limit):
    least, largest = nvmlDeviceGetPowerManagementLimitConstraints(handle)
    _gpu(handle, "nvmlDeviceSetPowerManagementLimit")
    if not least <= limit <= largest:
        raise NVMLError(NVML_ERROR_INVALID_ARGUMENT)
    _keep(handle, "nvmlDeviceSetPowerManagementLimit", limit_mw=limit)


def nvmlDeviceGetSupportedMemoryClocks(handle):
    """MHz, largest first."""
    return _known(handle, "nvmlDeviceGetSupportedMemoryClocks", "memory_clocks", [2619, 1593])


def nvmlDeviceGetSupportedGraphicsClocks(handle, memory_clock):
    """MHz, largest first; the slower memory clock has one only."""
    clocks = _known(handle, "nvmlDeviceGetSupportedGraphicsClocks", "sm_clocks")
    return clocks if memory_clock == nvmlDeviceGetSupportedMemoryClocks(handle)[0] else clocks[-1:]


def nvmlDeviceGetApplicationsClock(handle, clock):
    return _known(handle, "nvmlDeviceGetApplicationsClock", "application_clock")


def nvmlDeviceGetDefaultApplicationsClock(handle, clock):
    return _known(handle, "nvmlDeviceGetDefaultApplicationsClock", "default_application_clock")


def nvmlDeviceSetGpuLockedClocks(handle, least, largest):
    _gpu(handle, "nvmlDeviceSetGpuLockedClocks")
    _keep(handle, "nvmlDeviceSetGpuLockedClocks", locked_mhz=[least, largest])


def nvmlDeviceResetGpuLockedClocks(handle):
    _gpu(handle, "nvmlDeviceResetGpuLockedClocks")
    _keep(handle, "nvmlDeviceResetGpuLockedClocks", locked_mhz=None)
