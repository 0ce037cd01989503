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

# Coverage in a child process costs as much as starting it twice more, and a child that is killed leaves half of a
# file. So it is taken in the tests of what runs nowhere but in such processes, by file.
MEASURED_CHILDREN = {
    "test_evaluate.py",  # tuner/worker.py
    "test_serving.py",  # tuner/supervise.py
    "test_control.py",  # the watchdog of tuner/control.py
}

# No test depends on a clock; and a machine that only says yes or no should say the same each time.
settings.register_profile("tune", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tune")


@pytest.fixture(autouse=True)
def _coverage_of_children(request, monkeypatch):
    if request.path.name not in MEASURED_CHILDREN:
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture
def untraced():
    """Simulations and fits take three to four times longer under coverage, and run no line that no other test runs."""
    tracer = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracer)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a folder into the library's own cache, as the model `me/small` of a hub."""

    def hold(folder):
        import huggingface_hub

        home = tmp_path / "models--me--small"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("0" * 40)
        (home / "snapshots").mkdir()
        (home / "snapshots" / ("0" * 40)).symlink_to(folder)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    return hold


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
