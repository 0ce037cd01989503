"""GPU energy from the NVIDIA driver's own counter.

`nvmlDeviceGetTotalEnergyConsumption` counts millijoules since the driver was loaded, on Volta and newer.
It is one number for the board (GPU, memory, regulators), it moves about every 100 ms, and short
differences of it are wrong, so one difference is taken over a whole window. Power is never sampled and
integrated: its reading is an average over up to a second, or sees a quarter of the time.

Counters are found by UUID, because the order of NVML may change with every boot and need not be CUDA's.
Measured are the GPUs that `CUDA_VISIBLE_DEVICES` leaves to the engine, called `gpu0`, `gpu1`, ... in that
order. The library is `nvidia-ml-py`; the package called `pynvml` is another one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tuner.meters import Availability, Unavailable
from tuner.space import Lever, excerpt
from tuner.trial import MeterError, Quality, Reading

FAULTS: dict[str, tuple[str, str]] = {
    "LIBRARY_NOT_FOUND": (
        "no NVIDIA driver (libnvidia-ml.so.1 is not installed)",
        "nvidia-smi  # works once the driver is installed; a container needs: docker run --gpus all",
    ),
    "DRIVER_NOT_LOADED": ("the NVIDIA driver is installed but not loaded", "sudo modprobe nvidia"),
    "LIB_RM_VERSION_MISMATCH": (
        "the loaded NVIDIA driver and its library are of different versions, as after an update",
        "sudo reboot",
    ),
    "NO_PERMISSION": ("the NVIDIA driver denies access to this user", "ls -l /dev/nvidia*"),
    "NOT_SUPPORTED": (
        "this GPU has no energy counter (Pascal and older, or a virtual GPU)",
        "tune run --meter rapl  # or estimate; GPU energy is then not counted",
    ),
    "FUNCTION_NOT_FOUND": ("the NVIDIA driver is too old to have an energy counter", "nvidia-smi  # shows its version"),
    "GPU_IS_LOST": ("the GPU fell off the bus", "sudo reboot"),
    "RESET_REQUIRED": ("the GPU needs a reset", "sudo nvidia-smi --gpu-reset"),
    "TIMEOUT": ("the NVIDIA driver did not answer in time", "nvidia-smi"),
    "OPERATING_SYSTEM": ("the operating system blocked the request", "ls -l /dev/nvidia*"),
    "UNINITIALIZED": ("NVML is not initialised", "nvidia-smi"),
    "UNKNOWN": ("the NVIDIA driver reports an unknown error", "nvidia-smi"),
}
"""What each `NVML_ERROR_*` means to a person, and the command that mends it."""

UPDATE_SECONDS = 0.1
"""The total-energy counter moves about every 100 ms (ml.energy, "Measuring GPU energy: best practices")."""

_FIX_LIBRARY = "pip install --force-reinstall nvidia-ml-py"


@dataclass(frozen=True)
class Gpu:
    """One board."""

    uuid: str
    model: str
    pci: tuple[int, int, int]
    """Domain, bus and device."""


def probe() -> Availability:
    """Whether every GPU that CUDA would show has an energy counter that can be read."""
    try:
        meter = NvmlMeter()
    except Unavailable as error:
        return Availability("nvml", ok=False, domains=(), quality="measured", reason=error.reason, remedy=error.remedy)
    with contextlib.closing(meter):
        reason = ", ".join(f"{domain} is {gpu.model} ({gpu.uuid})" for domain, gpu in meter.gpus.items())
        return Availability("nvml", ok=True, domains=meter.domains(), quality="measured", reason=reason, remedy="")


class NvmlMeter:
    """Energy of the visible GPUs since this object was made. Raises `Unavailable`."""

    name = "nvml"
    quality: Quality = "measured"
    blind_to: frozenset[Lever] = frozenset({"offload"})
    update_seconds = UPDATE_SECONDS

    def __init__(self) -> None:
        self._nvml = library()
        self._closed = False
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise _unavailable(self._nvml, error) from error
        try:
            self.gpus: dict[str, Gpu] = {f"gpu{i}": gpu for i, gpu in enumerate(_visible(self._nvml, os.environ))}
            """The board behind each domain."""
            self._handles = {
                domain: self._nvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for domain, gpu in self.gpus.items()
            }
            for handle in self._handles.values():
                _refuse_slices(self._nvml, handle)
            self._last = {domain: self._millijoules(handle) for domain, handle in self._handles.items()}
        except self._nvml.NVMLError as error:
            self.close()
            raise _unavailable(self._nvml, error) from error
        except Unavailable:
            self.close()
            raise
        self._total = dict.fromkeys(self.gpus, 0)

    def domains(self) -> tuple[str, ...]:
        return tuple(self.gpus)

    def read(self) -> dict[str, Reading]:
        if self._closed:
            raise MeterError("nvml: the meter is closed")
        fault: MeterError | None = None
        for domain, handle in self._handles.items():
            try:
                now = self._millijoules(handle)
            except self._nvml.NVMLError as error:
                raise MeterError(f"{domain}: {_meaning(self._nvml, error)[0]}") from error
            step, self._last[domain] = now - self._last[domain], now
            if step < 0:
                # The driver was loaded anew. This window is lost; the next one starts from here.
                fault = MeterError(f"{domain}: the energy counter went back by {-step / 1000:g} J")
            else:
                self._total[domain] += 1000 * step
        if fault is not None:
            raise fault
        return {domain: Reading.exact(total) for domain, total in self._total.items()}

    def watts(self) -> dict[str, float]:
        """What each board says it draws; on most of them an average over the last second. Raises `MeterError`."""
        try:
            return {d: self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000 for d, handle in self._handles.items()}
        except self._nvml.NVMLError as error:
            raise MeterError(f"GPU power: {_meaning(self._nvml, error)[0]}") from error

    def used_memory_bytes(self) -> int:
        """Memory in use on all boards, whoever uses it."""
        try:
            return sum(int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in self._handles.values())
        except self._nvml.NVMLError as error:
            raise MeterError(f"GPU memory: {_meaning(self._nvml, error)[0]}") from error

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _millijoules(self, handle: Any) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle))


GAUGES: dict[str, tuple[str, tuple[str, ...], Callable[[Any], float]]] = {
    "celsius": ("nvmlDeviceGetTemperature", ("NVML_TEMPERATURE_GPU",), float),
    "sm_mhz": ("nvmlDeviceGetClockInfo", ("NVML_CLOCK_SM",), float),
    "memory_mhz": ("nvmlDeviceGetClockInfo", ("NVML_CLOCK_MEM",), float),
    "watts": ("nvmlDeviceGetPowerUsage", (), lambda milliwatts: float(milliwatts) / 1000),
    "busy": ("nvmlDeviceGetUtilizationRates", (), lambda rates: float(rates.gpu) / 100),
}
"""Name of a gauge, the function that reads it, the constants it takes, and its value in the gauge's unit."""

REASONS: dict[int, str] = {
    0x001: "idle",
    0x002: "applications clock setting",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clock setting",
}
"""Why a GPU runs at the clock it runs at: bits of `nvmlDeviceGetCurrentClocksEventReasons` (nvml.h)."""

SLOWDOWNS = frozenset(REASONS[bit] for bit in (0x008, 0x020, 0x040, 0x080))
"""Reasons that come from heat or from the power supply: not asked for by anybody, and not the same the next time.

A power cap is none of them: it is a setting, the same for every trial, and what is tuned may be just that.
"""


class Gauges:
    """What the visible GPUs say of themselves beside their energy. Raises `Unavailable` when it is made.

    Afterwards nothing raises: a gauge that a board lacks is not asked again, one that fails is absent that once.
    """

    def __init__(self) -> None:
        self._meter = NvmlMeter()
        self._lacking: set[tuple[str, str, tuple[int, ...]]] = set()

    def read(self, gauges: Sequence[str] = tuple(GAUGES)) -> dict[str, float]:
        """`gpu0_celsius`, `gpu0_sm_mhz`, `gpu0_memory_mhz`, `gpu0_watts`, `gpu0_busy` (a share) of every board."""
        found = {}
        for domain in self._meter.domains():
            for gauge in gauges:
                function, constants, unit = GAUGES[gauge]
                value = self._ask(domain, function, *(getattr(self._meter._nvml, name) for name in constants))
                if value is not None:
                    found[f"{domain}_{gauge}"] = unit(value)
        return found

    def reasons(self) -> list[tuple[str, str]]:
        """Domain and reason, for everything that holds a GPU's clock where it is now."""
        found = []
        for domain in self._meter.domains():
            bits = self._ask(domain, "nvmlDeviceGetCurrentClocksEventReasons")
            if bits is None:
                # The name it had before driver 535 (NVML change log).
                bits = self._ask(domain, "nvmlDeviceGetCurrentClocksThrottleReasons")
            found += [(domain, reason) for bit, reason in REASONS.items() if (bits or 0) & bit]
        return found

    def limit_watts(self) -> dict[str, float]:
        """The power limit that each board keeps to now; absent where it does not say."""
        limits = {d: self._ask(d, "nvmlDeviceGetEnforcedPowerLimit") for d in self._meter.domains()}
        return {domain: milliwatts / 1000 for domain, milliwatts in limits.items() if milliwatts is not None}

    def processes(self) -> set[tuple[str, int]]:
        """Domain and process id of whoever computes or draws on a board, in the driver's numbering."""
        return {
            (domain, int(process.pid))
            for domain in self._meter.domains()
            for function in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
            for process in self._ask(domain, function) or ()
        }

    def close(self) -> None:
        self._meter.close()

    def _ask(self, domain: str, function: str, *arguments: int) -> Any:
        """What the driver answers, or None."""
        if (domain, function, arguments) in self._lacking:
            return None
        nvml = self._meter._nvml
        try:
            return getattr(nvml, function)(self._meter._handles[domain], *arguments)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
            self._lacking.add((domain, function, arguments))
        except nvml.NVMLError:
            pass
        return None


def boards() -> dict[str, str]:
    """Model and UUID behind each domain, for the record: `gpu0` is not the same board on every machine."""
    with contextlib.closing(NvmlMeter()) as meter:
        return {domain: f"{gpu.model} ({gpu.uuid})" for domain, gpu in meter.gpus.items()}


def used_memory_bytes() -> int | None:
    """Memory in use on the measured GPUs together; None where the driver does not say."""
    try:
        with contextlib.closing(NvmlMeter()) as meter:
            return meter.used_memory_bytes()
    except (Unavailable, MeterError):
        return None


def library() -> ModuleType:
    """`nvidia-ml-py`. Raises `Unavailable` when it is missing or another package has taken its name."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise Unavailable(f"the Python package nvidia-ml-py cannot be imported ({error})", _FIX_LIBRARY) from error
    # The sign by which Zeus tells them apart (zeus/device/gpu/nvidia.py).
    if not hasattr(nvml, "_nvmlGetFunctionPointer"):
        raise Unavailable(
            "the package called pynvml is installed in the place of nvidia-ml-py",
            f"pip uninstall -y pynvml && {_FIX_LIBRARY}",
        )
    return nvml


# --- which GPUs ------------------------------------------------------------------------------


def visible(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that a CUDA program sees, in its order.

    Args:
        gpus: every GPU of this machine.
        environment: `CUDA_VISIBLE_DEVICES` (unset: all; a list of indices or of UUIDs and their beginnings,
            which ends at the first entry that fits nothing) and `CUDA_DEVICE_ORDER`.

    Raises:
        Unavailable: when nothing is visible, when slices of a GPU are asked for, and when it cannot be
            known which GPU is meant.

    Rules: CUDA programming guide, "CUDA environment variables"; for what it leaves open (an entry named
    twice hides all, `1x` counts as 1) what PyTorch does (`torch/cuda/__init__.py`, `_parse_visible_devices`).
    """
    boards = sorted(gpus, key=lambda gpu: gpu.pci)
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        chosen = boards
    elif wanted.strip().startswith("MIG-"):
        raise Unavailable(
            "CUDA_VISIBLE_DEVICES names a MIG slice, and NVML counts energy for whole GPUs only",
            "export CUDA_VISIBLE_DEVICES=0  # after: sudo nvidia-smi -i 0 -mig 0",
        )
    elif wanted.strip().startswith("GPU-"):
        chosen = _by_uuid(boards, wanted)
    else:
        chosen = _by_index(boards, wanted)
        _refuse_ambiguous_order(boards, chosen, environment)
    if not chosen:
        what = "this machine has no GPU" if wanted is None else f"CUDA_VISIBLE_DEVICES={excerpt(wanted)} shows no GPU"
        raise Unavailable(what, "nvidia-smi -L" if wanted is None else "unset CUDA_VISIBLE_DEVICES")
    return chosen


def _by_uuid(boards: Sequence[Gpu], wanted: str) -> list[Gpu]:
    chosen: list[Gpu] = []
    for entry in wanted.split(","):
        fitting = [gpu for gpu in boards if entry.strip() and gpu.uuid.startswith(entry.strip())]
        if len(fitting) > 1:
            raise Unavailable(
                f"CUDA_VISIBLE_DEVICES: {excerpt(entry)} is the beginning of {len(fitting)} UUIDs", "nvidia-smi -L"
            )
        if not fitting:
            break
        if fitting[0] in chosen:
            return []
        chosen += fitting
    return chosen


def _by_index(boards: Sequence[Gpu], wanted: str) -> list[Gpu]:
    chosen: list[Gpu] = []
    for entry in wanted.split(","):
        number = re.match(r"\s*\+?(\d+)", entry, re.ASCII)
        if number is None or int(number[1]) >= len(boards):
            break
        gpu = boards[int(number[1])]
        if gpu in chosen:
            return []
        chosen.append(gpu)
    return chosen


def _refuse_ambiguous_order(boards: Sequence[Gpu], chosen: Sequence[Gpu], environment: Mapping[str, str]) -> None:
    """CUDA counts from the fastest GPU unless told otherwise, and only CUDA knows which one that is."""
    if (
        environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
        and 0 < len(chosen) < len(boards)
        and len({gpu.model for gpu in boards}) > 1
    ):
        raise Unavailable(
            "CUDA_VISIBLE_DEVICES holds indices, the GPUs are of different models, and CUDA counts the fastest first",
            "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )


def _visible(nvml: ModuleType, environment: Mapping[str, str]) -> list[Gpu]:
    gpus = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        pci = nvml.nvmlDeviceGetPciInfo(handle)
        gpus.append(
            Gpu(
                uuid=nvml.nvmlDeviceGetUUID(handle),
                model=nvml.nvmlDeviceGetName(handle),
                pci=(pci.domain, pci.bus, pci.device),
            )
        )
    return visible(gpus, environment)


def _refuse_slices(nvml: ModuleType, handle: Any) -> None:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return
    if current:
        raise Unavailable(
            "a GPU is cut into MIG slices, and NVML counts energy for whole GPUs only", "sudo nvidia-smi -mig 0"
        )


# --- what went wrong -------------------------------------------------------------------------


def _meaning(nvml: ModuleType, error: Exception) -> tuple[str, str]:
    code = getattr(error, "value", None)
    for name, meaning in FAULTS.items():
        if getattr(nvml, f"NVML_ERROR_{name}", None) == code:
            return meaning
    return f"NVML reports: {error}", "nvidia-smi"


def _unavailable(nvml: ModuleType, error: Exception) -> Unavailable:
    return Unavailable(*_meaning(nvml, error))
