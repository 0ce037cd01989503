"""A `zeus` without a device: the modules, classes, units and errors of zeus 0.16.0 that tune uses.

Put the folder above this package first on `sys.path`. `TUNE_FAKE_ZEUS` names a JSON file that is read anew
at every call, so that a test can pull a device out in the middle of a window:

    {"soc": "AppleSilicon", "soc_error": "RuntimeError", "millijoules": {"cpu_total_mj": 5, "gpu_mj": 0}}
    {"soc": "Jetson", "millijoules": {"total_energy_mj": 5.25}}
    {"gpus": "AMDGPUs", "init_error": "ValueError", "boards": [
        {"name": "AMD Instinct MI300X", "millijoules": 5000, "supported": true, "error": "ZeusGPULostError"}]}
    {"gpus": "NVIDIAGPUs"}

Each error is named by its class, in this package or built in. Without the file there is no device at all.
"""

import builtins
import json
import os
from pathlib import Path

__version__ = "0.16.0"


def _config():
    path = os.environ.get("TUNE_FAKE_ZEUS")
    return json.loads(Path(path).read_text()) if path else {}


def _raise(name, message, *modules):
    if name is not None:
        raise next(getattr(m, name) for m in (*modules, builtins) if hasattr(m, name))(message)
