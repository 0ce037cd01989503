"""GPUs: `get_gpus` gives NVIDIA's where there are any, else AMD's."""

import sys

from zeus import _config, _raise
from zeus.exception import ZeusBaseError


class ZeusBaseGPUError(ZeusBaseError):
    """As in zeus."""


class ZeusGPUInitError(ZeusBaseGPUError):
    """No library could be initialised."""


class ZeusGPUNotSupportedError(ZeusBaseGPUError):
    """This GPU lacks the function."""


class ZeusGPULostError(ZeusBaseGPUError):
    """It fell off the bus."""


class GPUs:
    """By index, as HIP or CUDA counts them."""

    def __len__(self):
        return len(self._boards())

    def _boards(self):
        return _config().get("boards", [])

    def get_name(self, gpu_index):
        return self._boards()[gpu_index]["name"]

    def supports_get_total_energy_consumption(self, gpu_index):
        return self._boards()[gpu_index].get("supported", True)

    def get_total_energy_consumption(self, gpu_index):
        """Millijoules since the driver was loaded, an int."""
        board = self._boards()[gpu_index]
        _raise(board.get("error"), "the GPU is gone. More about it:\nhttps://ml.energy", sys.modules[__name__])
        return board["millijoules"]


class NVIDIAGPUs(GPUs):
    """Read with NVML."""


class AMDGPUs(GPUs):
    """Read with amdsmi."""


def get_gpus(ensure_homogeneous=False):
    kind = _config().get("gpus")
    _raise(
        _config().get("init_error"), "HIP_VISIBLE_DEVICES is set but empty. It should be unset.", sys.modules[__name__]
    )
    if kind is None:
        raise ZeusGPUInitError("NVML and AMDSMI unavailable. Failed to initialize GPU management library.")
    return globals()[kind]()
