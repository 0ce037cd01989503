"""A printed launch, typed at a shell: what `tune apply` promises is that it does what was measured."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from tuner.serving import Endpoint
from tuner.supervise import alive


@contextlib.contextmanager
def typed_at_a_shell(command, port, log, *, ready="/health", seconds=60):
    """The server that `command` starts, once it answers; its output goes to the file `log`. Ended afterwards."""
    endpoint = Endpoint.parse(f"http://127.0.0.1:{port}")
    # vLLM leaves its sockets behind; not below a test's own folder, whose path is too long for them.
    scratch = tempfile.TemporaryDirectory()
    with Path(log).open("wb") as output:
        shell = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "TMPDIR": scratch.name},
        )
    deadline = time.monotonic() + seconds
    try:
        while not answers(endpoint, ready):
            said = Path(log).read_text(errors="replace")
            assert shell.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        yield endpoint
    finally:
        # vLLM takes its sockets and its shared memory away where it is asked to end.
        for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, number)
            give_up = time.monotonic() + patience
            while alive(shell.pid) and time.monotonic() < give_up:
                time.sleep(0.05)
        shell.wait()
        scratch.cleanup()


def answers(endpoint, path):
    with contextlib.suppress(OSError):
        return endpoint.get(path)[0] == 200
    return False


def noted(path):
    """Words and variables of a stand-in that has left its note there (`fakes/launcher.py`)."""
    _, _, words, *variables = Path(path).read_text().split("\n")
    pairs = (line.partition("=") for line in variables)
    return SimpleNamespace(words=words.split(), env={name: value for name, _, value in pairs})
