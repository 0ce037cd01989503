"""SoCs: `get_soc` gives Apple's or NVIDIA's."""

from dataclasses import dataclass

from zeus import _config, _raise
from zeus.exception import ZeusBaseError


class ZeusBaseSoCError(ZeusBaseError):
    """As in zeus."""


class ZeusSoCInitError(ZeusBaseSoCError):
    """No SoC, or none that can be read."""


@dataclass
class AppleSiliconMeasurement:
    """Millijoules; None for what this chip does not have."""

    cpu_total_mj: int | None = None
    efficiency_cores_mj: list[int] | None = None
    performance_cores_mj: list[int] | None = None
    efficiency_cluster_mj: list[int] | None = None
    performance_cluster_mj: list[int] | None = None
    efficiency_core_manager_mj: int | None = None
    performance_core_manager_mj: int | None = None
    dram_mj: int | None = None
    gpu_mj: int | None = None
    gpu_sram_mj: int | None = None
    ane_mj: int | None = None


@dataclass
class JetsonMeasurement:
    """Millijoules; None for a rail that this board does not have."""

    cpu_energy_mj: float | None = None
    gpu_energy_mj: float | None = None
    total_energy_mj: float | None = None


class SoC:
    """One chip."""

    def get_total_energy_consumption(self):
        """Cumulative from an arbitrary moment."""
        _raise(_config().get("soc_error"), "")
        return self.measurement(**_config()["millijoules"])


class AppleSilicon(SoC):
    """Counters of IOReport."""

    measurement = AppleSiliconMeasurement


class Jetson(SoC):
    """Power of the INA3221, polled."""

    measurement = JetsonMeasurement

    def get_total_energy_consumption(self, timeout=15.0):
        return super().get_total_energy_consumption()


class Unheard(SoC):
    """What a later zeus may bring."""


def get_soc():
    kind = _config().get("soc")
    if kind is None:
        raise ZeusSoCInitError("No observable SoC was found on the current machine.")
    return globals()[kind]()
