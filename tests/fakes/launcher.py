"""What the stand-ins for engines' executables share: the note that they leave, ways to fail, and their last signal."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

SHARED = []


def leave_note(variable):
    """Process, temporary folder, words and environment, for a test that looks afterwards; shared memory, if asked."""
    if path := os.environ.get(variable):
        lines = [str(os.getpid()), os.environ.get("TMPDIR", ""), " ".join(sys.argv)]
        lines += sorted(f"{name}={value}" for name, value in os.environ.items())
        Path(path).write_text("\n".join(lines))
    if name := os.environ.get("FAKE_SHARED_MEMORY"):
        # As vLLM's are, it is taken away by Python's resource tracker, which must outlive this process for that.
        SHARED.append(shared_memory.SharedMemory(f"{name}_{os.getpid()}", create=True, size=1))


def say(*lines):
    for line in lines:
        sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def fail(mode, own):
    """Fail while loading: as `own` says by mode (status, then the log's lines), or as every program can."""
    if mode in own:
        status, *lines = own[mode]
        say(*lines)
        raise SystemExit(status)
    if mode == "crash-loading":
        signal.raise_signal(signal.SIGSEGV)
    if mode == "hang-loading":
        time.sleep(600)


def serve(engine, mode, variable):
    """Until SIGTERM; a stubborn one ignores it, and so does its child."""
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(15, 1); signal.pause()"])
        Path(os.environ[variable]).write_text(f"{os.getpid()} {child.pid}")
    with engine:
        if mode != "stubborn":
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        while True:
            signal.pause()
