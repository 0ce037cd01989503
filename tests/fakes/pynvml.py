"""A `pynvml` without a GPU: the functions, units and errors of nvidia-ml-py that tune uses.

Put this folder first on `sys.path`, or on `PYTHONPATH` for a subprocess. `TUNE_FAKE_NVML` names a JSON file
that is read anew at every call, so that a test can pull a GPU out in the middle of a window:

    {"driver": "580.1", "init_error": 12, "gpus": [{
        "uuid": "GPU-...", "name": "NVIDIA H100", "pci": [0, 1, 0], "mig": 0,
        "watts": 100, "millijoules": 5000, "errors": {"nvmlDeviceGetTotalEnergyConsumption": 15}}]}

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


def nvmlDeviceGetTotalEnergyConsumption(handle):
    """Millijoules since some moment before this process began."""
    gpu = _gpu(handle, "nvmlDeviceGetTotalEnergyConsumption")
    return int(gpu.get("millijoules", 0) + 1000 * gpu.get("watts", 0) * time.monotonic())


def nvmlDeviceGetMemoryInfo(handle):
    """Bytes, as in version 1 of the real structure."""
    gpu = _gpu(handle, "nvmlDeviceGetMemoryInfo")
    used = gpu.get("used_memory", 0)
    return SimpleNamespace(total=80 << 30, used=used, free=(80 << 30) - used)
