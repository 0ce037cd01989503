"""AMD GPUs, Apple Silicon and Jetson, as the optional package `zeus` reads them (`pip install zeus`).

Only the cumulative millijoules of `zeus.device` are taken, never its monitor: that one adds up GPUs alone,
measures time with a clock that can be set, and leaves a CPU out without a word. NVIDIA GPUs are left to
`nvml`, which finds them by UUID. A device that zeus cannot read is refused with its reason.

    AMD GPU        `gpu0`, ... in HIP's order; counters of the boards, `measured`. Counters that disagree
                   with the board's own power are not supported (zeus compares them when it starts)
    Jetson         `soc0`, the module's input; without that rail `cpu0` and `gpu0`. zeus reads power every
                   0.1 s in a process of its own and adds it up: `sampled`
    Apple Silicon  `cpu0`, `gpu0`, `dram0`, `ane0`: counters of Apple's own energy model, `sampled`

Apple's numbers are neither measured nor estimated in this program's sense. An estimate here is CPU time
times a range of power, is blind to the GPU, and is printed as a range that is computed anew from CPU time;
Apple's counters tell CPU, GPU and memory apart and come without a range. So they stand between the two,
and the sentence about the meter names the model.

Checked against zeus 0.16.0; nothing here was run on such a device.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tuner.meters import Availability, Unavailable, blind_to
from tuner.trial import MeterError, Quality, Reading

APPLE_FIELDS = {"cpu0": "cpu_total_mj", "gpu0": "gpu_mj", "dram0": "dram_mj", "ane0": "ane_mj"}
"""Fields of `AppleSiliconMeasurement` that lie beside each other; the others are parts of `cpu_total_mj`, or
(`gpu_sram_mj`) not documented to be beside the GPU or in it."""

JETSON_FIELDS = {"soc0": "total_energy_mj", "cpu0": "cpu_energy_mj", "gpu0": "gpu_energy_mj"}
"""Fields of `JetsonMeasurement`; the first one contains the others."""

AMD_UPDATE_SECONDS = 0.1
"""Not documented by AMD. As long as NVML's, which is certainly not too short."""

JETSON_UPDATE_SECONDS = 0.1
"""zeus/device/soc/jetson.py: its polling process waits 0.1 s for a command."""

_INSTALL = "pip install 'zeus[apple]'" if platform.system() == "Darwin" else "pip install zeus"
_LOOK = "python -m zeus.show_env  # shows what zeus finds"


@dataclass(frozen=True)
class Device:
    """What zeus found, as the meter needs it."""

    models: Mapping[str, str]
    """What stands behind each domain."""
    millijoules: Callable[[], dict[str, Any]]
    """All domains, cumulative."""
    quality: Quality
    how: str
    update_seconds: float


def probe() -> Availability:
    """Whether zeus finds a device that is not NVIDIA's."""
    try:
        meter = ZeusMeter()
    except Unavailable as error:
        return Availability("zeus", ok=False, domains=(), quality="sampled", reason=error.reason, remedy=error.remedy)
    with contextlib.closing(meter):
        by_model: dict[str, list[str]] = {}
        for domain, model in meter.models.items():
            by_model.setdefault(model, []).append(domain)
        reason = "; ".join(f"{', '.join(domains)} of {model}" for model, domains in by_model.items())
        return Availability(
            "zeus", ok=True, domains=meter.domains(), quality=meter.quality, reason=reason, remedy="", how=meter.how
        )


class ZeusMeter:
    """Energy of the device that zeus reads, since this object was made. Raises `Unavailable`."""

    name = "zeus"

    def __init__(self) -> None:
        device = _device()
        self.models = device.models
        """What stands behind each domain."""
        self.quality: Quality = device.quality
        self.how = device.how
        self.update_seconds = device.update_seconds
        self.blind_to = blind_to((self.name,), tuple(device.models))
        self._device = device
        self._closed = False
        try:
            self._last = self._millijoules()
        except MeterError as error:
            raise Unavailable(str(error), _LOOK) from error
        self._total = dict.fromkeys(self._last, 0.0)

    def domains(self) -> tuple[str, ...]:
        return tuple(self.models)

    def read(self) -> dict[str, Reading]:
        if self._closed:
            raise MeterError("zeus: the meter is closed")
        now, before = self._millijoules(), self._last
        self._last = now
        back = {domain: before[domain] - value for domain, value in now.items() if value < before[domain]}
        for domain, value in now.items():
            self._total[domain] += max(0.0, value - before[domain])
        if back:
            domain, millijoules = next(iter(back.items()))
            raise MeterError(f"{domain}: the energy counter went back by {millijoules / 1000:g} J")
        return {domain: Reading.exact(int(1000 * total)) for domain, total in self._total.items()}

    def close(self) -> None:
        """Nothing is held: zeus keeps its devices for the life of the process."""
        self._closed = True

    def _millijoules(self) -> dict[str, float]:
        try:
            now = self._device.millijoules()
        except Exception as error:  # the vendors' libraries below zeus raise classes of their own
            raise MeterError(f"zeus: {_sentence(error)}") from error
        for domain, value in now.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise MeterError(f"{domain}: zeus read {value!r}, expected millijoules")
        return now


def boards() -> dict[str, str]:
    """Model behind each domain, for the record. zeus does not tell serial numbers."""
    with contextlib.closing(ZeusMeter()) as meter:
        return dict(meter.models)


# --- what zeus finds -------------------------------------------------------------------------


def _device() -> Device:
    try:
        socs, gpus = importlib.import_module("zeus.device.soc"), importlib.import_module("zeus.device.gpu")
        fault = importlib.import_module("zeus.exception").ZeusBaseError
    except ImportError as error:
        raise Unavailable(f"the Python package zeus cannot be imported ({error})", _INSTALL) from error
    soc = None
    try:
        # First the SoC: a Jetson may have NVML too, and `get_gpus` would stop there.
        with contextlib.suppress(fault):
            soc = socs.get_soc()
        if soc is None:
            found = gpus.get_gpus()
            if isinstance(found, gpus.NVIDIAGPUs):
                raise Unavailable("these are NVIDIA GPUs, which nvml reads without zeus", "tune run --meter nvml")
            return _amd(found)
        if isinstance(soc, socs.AppleSilicon):
            # How often Apple's model is brought up to date is not documented, so no window is put on its ticks.
            return _soc(soc, APPLE_FIELDS, "Apple Silicon", "by Apple's own model", update_seconds=0.0)
        if isinstance(soc, socs.Jetson):
            return _soc(soc, JETSON_FIELDS, "NVIDIA Jetson", "every 0.1 s", update_seconds=JETSON_UPDATE_SECONDS)
    except Unavailable:
        raise
    except Exception as error:  # amdsmi's own classes, ValueError for an index that is none, queue.Empty
        raise Unavailable(f"zeus reads no device here: {_sentence(error)}", _LOOK) from error
    raise Unavailable(f"zeus found {type(soc).__name__}, which this version does not know", "tune run --meter wall")


def _amd(gpus: Any) -> Device:
    models = {f"gpu{index}": str(gpus.get_name(index)) for index in range(len(gpus))}
    if not models:
        raise Unavailable("zeus finds no AMD GPU", "amd-smi list")
    for index, (domain, model) in enumerate(models.items()):
        if not gpus.supports_get_total_energy_consumption(index):
            raise Unavailable(
                f"{domain} ({model}) has no energy counter that agrees with its power (ROCm/amdsmi issue 38),"
                " or it is the second half of a board whose first half counts both",
                "export HIP_VISIBLE_DEVICES=0  # the GPUs whose counters can be read",
            )

    def millijoules() -> dict[str, Any]:
        return {f"gpu{index}": gpus.get_total_energy_consumption(index) for index in range(len(models))}

    return Device(models, millijoules, "measured", "", AMD_UPDATE_SECONDS)


def _soc(soc: Any, fields: Mapping[str, str], model: str, how: str, *, update_seconds: float) -> Device:
    first = soc.get_total_energy_consumption()
    present = {domain: name for domain, name in fields.items() if getattr(first, name) is not None}
    if "soc0" in present:
        present = {"soc0": present["soc0"]}
    if not present:
        raise Unavailable(f"zeus finds no power sensor of this {model}", _LOOK)

    def millijoules() -> dict[str, Any]:
        now = soc.get_total_energy_consumption()
        return {domain: getattr(now, name) for domain, name in present.items()}

    return Device(dict.fromkeys(present, model), millijoules, "sampled", how, update_seconds)


def _sentence(error: Exception) -> str:
    """The first sentence; zeus explains at length, over several lines."""
    return f"{type(error).__name__}: {error}".partition("\n")[0].split(". ")[0].rstrip(" .:")
