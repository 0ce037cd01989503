import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Fakes and contracts are shared by tests and by the processes that tests start.
sys.path.insert(0, str(Path(__file__).parent))

# What this machine's user has calibrated or left changed is none of the tests' business.
_STATE = tempfile.TemporaryDirectory(prefix="tune-state-")
os.environ["TUNE_STATE"] = _STATE.name

# OpenMP's threads spin while they wait; where tests share two cores, the spinning is all that happens.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# No test depends on a clock; and a machine that only says yes or no should say the same each time.
settings.register_profile("tune", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tune")


@pytest.fixture
def log(tmp_path):
    """Standard error is a file while an engine runs, as in a worker."""
    path = tmp_path / "log"
    kept = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield path
    finally:
        os.dup2(kept, 2)
        os.close(kept)
