"""Runs a person's commands one after the other, and ends each with all that it started.

The worker starts a process of its own, the keeper, and speaks to it through a pipe, one JSON line a command. The
keeper takes in what a command leaves behind, also daemons, and ends all of it when it is told to or when the worker
has gone, whoever killed it. `tuner.supervise` is the simpler way for one server that stays in its process group.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tuner.space import excerpt
from tuner.supervise import PR_SET_PDEATHSIG, adopt_orphans, out_of_memory_kills, prctl, signal_name

MOST_OUTPUT_BYTES = 16 * 2**20
"""A pass that prints more has failed: the figures may stand in what nobody reads."""

MOST_LOG_BYTES = 256 * 2**10
TAIL_BYTES = 8 * 2**10
"""Of each run, so much goes into the trial's log at once, and so much of the end of each stream."""

LINGER_SECONDS = 2.0
"""How long the children of a command may outlive it before it is said to have left them behind."""

GRACE_SECONDS = 3.0
"""Between asking a command to end and killing it."""

KILL_SECONDS = 5.0
"""How long a killed process is waited for: one that is stuck in a driver may never go."""

POLL_SECONDS = 0.05

# --- seen from the worker --------------------------------------------------------------------

_NO_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|\bMemoryError\b|Cannot allocate memory|std::bad_alloc|failed to allocate",
    re.IGNORECASE,
)


def ending(text: str) -> str:
    """The last line of an output, to close a sentence with; nothing where there is none."""
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    last = "".join(c if c.isprintable() else " " for c in last).strip()
    return f"; its last line is {excerpt(last, 200)}" if last else "; it printed nothing"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int | None
    """Exit status; negative: the signal's number; None where it did not start."""
    fault: str = ""
    """Why it did not start, or was ended."""
    left: tuple[str, ...] = ()
    """Processes that outlived it; they were ended."""
    tail: str = ""
    """The end of what it printed."""
    lack_of_memory: bool = field(default=False, compare=False)
    """Whether the kernel killed a process for lack of memory meanwhile."""

    @property
    def is_its_own(self) -> bool:
        """Whether the command, and neither a signal nor a lack of memory, brought about this end."""
        if self.status is None or self.fault:
            return True
        return self.status >= 0 and not _NO_MEMORY.search(self.tail)

    def cause(self, label: str) -> str | None:
        """Why this run does not count, in a sentence; None where it does."""
        if self.status is None or self.fault:
            return f"{label} {self.fault or 'did not start'}"
        if self.status == 0 and self.left:
            return (
                f"{label} ended and left {', '.join(self.left)} running: energy of work that goes on after a pass is in"
                " no window; let the command wait for what it starts"
            )
        if self.status == 0:
            return None
        if self.lack_of_memory and self.status == -signal.SIGKILL:
            return f"out of memory: the kernel killed {label}{ending(self.tail)}"
        if self.status < 0:
            return f"{label} was killed by {signal_name(-self.status)}{ending(self.tail)}"
        memory = "out of memory: " if _NO_MEMORY.search(self.tail) else ""
        return f"{memory}{label} ended with exit status {self.status}, expected 0{ending(self.tail)}"


class Keeper:
    """A process that runs one command after the other, and ends it with all that it started.

    It sits in a session of its own, so that a signal for the worker's group does not end it before its
    command, and reads from a pipe that this process alone holds: the end of the file is the worker's death.
    """

    def __init__(self) -> None:
        # Without a name: nothing is left on the disk, whoever dies.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the keeper
        self._buffer = b""
        self._kills = 0
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).resolve()), str(self._output.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(self._output.fileno(),),
                start_new_session=True,
            )
        except BaseException:
            self._output.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self, argv: Sequence[str], folder: Path, env: Mapping[str, str], keep: Sequence[str], *, endless: bool = False
    ) -> None:
        """Start a command. `keep`: the streams of which the text is kept; `endless`: it may print without end."""
        job = {"argv": list(argv), "folder": str(folder), "env": dict(env), "keep": list(keep), "endless": endless}
        self._kills = out_of_memory_kills()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise RuntimeError("the process that watches over the command has gone; see the log") from error

    def wait(self, seconds: float) -> Ended | None:
        """How the command ended; None where it has not, after so long."""
        assert self._process.stdout is not None
        give_up = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, give_up - time.monotonic())):
                    return None
                chunk = os.read(self._process.stdout.fileno(), 65536)
                if not chunk:
                    raise RuntimeError("the process that watches over the command has gone; see the log")
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        told = json.loads(line)
        return Ended(
            told["status"], told["fault"], tuple(told["left"]), told["tail"], out_of_memory_kills() > self._kills
        )

    def output(self) -> str:
        """What the command printed, as far as it is kept."""
        return os.pread(self._output.fileno(), MOST_OUTPUT_BYTES, 0).decode(errors="replace")

    def close(self) -> None:
        """End the command and everything that it started; may be called twice."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(GRACE_SECONDS + 2 * KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._output.close()


# --- the keeper itself -----------------------------------------------------------------------


@dataclass
class _Stream:
    """One of a command's two streams."""

    keep: bool
    """Whether figures are looked for in it."""
    tail: bytes = b""


class _Watch:
    """Runs commands for a worker that speaks through standard input, one JSON line each."""

    def __init__(self, output: int) -> None:
        self._output = output
        self._jobs = b""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._woken, waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        adopt_orphans()
        self._status: dict[int, int] = {}
        """Of children that were reaped, by process."""
        self._printed = 0
        """Bytes of the running command, on both streams."""

    def serve(self) -> None:
        """Until the worker closes the pipe, or dies."""
        while self._more():
            while b"\n" in self._jobs:
                line, _, self._jobs = self._jobs.partition(b"\n")
                told = self._run(json.loads(line))
                if told is None:
                    return
                with contextlib.suppress(BrokenPipeError):
                    os.write(1, json.dumps(told).encode() + b"\n")

    def _more(self) -> bool:
        """Read what the worker has written; False where it has gone."""
        chunk = os.read(0, 65536)
        self._jobs += chunk
        return bool(chunk)

    def _run(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """One command from its start to its end. None where the worker has gone meanwhile."""
        os.ftruncate(self._output, 0)
        os.lseek(self._output, 0, os.SEEK_SET)
        told: dict[str, Any] = {"status": None, "fault": "", "left": [], "tail": ""}
        try:
            child = subprocess.Popen(
                job["argv"],
                cwd=job["folder"],
                env={**os.environ, **job["env"]},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_fresh,  # noqa: PLW1509 - this process has one thread
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            return {**told, "fault": f"cannot be started: {getattr(error, 'strerror', None) or error}"}
        streams = {
            child.stdout.fileno(): _Stream("stdout" in job["keep"]),  # type: ignore[union-attr]  # it is a pipe
            child.stderr.fileno(): _Stream("stderr" in job["keep"]),  # type: ignore[union-attr]  # it is a pipe
        }
        try:
            here, fault = self._follow(child.pid, streams, endless=job["endless"])
            left = _living() if here and not fault else []
            if not here or fault or left:
                self._end(child.pid)
        finally:
            # Reaped already, which Popen would take for exit status 0.
            child.returncode = self._status.pop(child.pid, -signal.SIGKILL)
            for pipe in (child.stdout, child.stderr):
                pipe.close()  # type: ignore[union-attr]  # it is a pipe
        if not here:
            return None
        return {
            "status": child.returncode,
            "fault": fault,
            "left": [name for _, name in left],
            "tail": _tail(streams).decode(errors="replace"),
        }

    def _follow(self, pid: int, streams: dict[int, _Stream], *, endless: bool) -> tuple[bool, str]:
        """Read what a command prints until it and all its children have ended.

        Returns whether the worker is still there, and why the command has to be ended.
        """
        self._printed = 0
        give_up = math.inf
        with selectors.DefaultSelector() as selector:
            for source in (0, self._woken, *streams):
                selector.register(source, selectors.EVENT_READ)
            while True:
                # Once the command has ended, what it left may go at any moment, without a signal to this process.
                for key, _ in selector.select(None if give_up == math.inf else POLL_SECONDS):
                    source = key.fd
                    if source == 0:
                        if not self._more():
                            return False, ""
                    elif source == self._woken:
                        with contextlib.suppress(BlockingIOError):
                            os.read(source, 4096)
                    elif chunk := os.read(source, 65536):
                        self._take(streams[source], chunk)
                        if self._printed > MOST_OUTPUT_BYTES and not endless:
                            most = f"{MOST_OUTPUT_BYTES // 2**20} MiB"
                            return True, f"printed more than {most}, the most that is read; let it print less"
                    else:
                        selector.unregister(source)
                self._reap()
                if pid in self._status:
                    give_up = min(give_up, time.monotonic() + LINGER_SECONDS)
                    open_streams = any(fd in streams for fd in selector.get_map())
                    if (not open_streams and not _living()) or time.monotonic() > give_up:
                        self._close_log(streams)
                        return True, ""

    def _take(self, stream: _Stream, chunk: bytes) -> None:
        """Keep it, up to the most that is kept, and log the beginning of all that is printed."""
        stream.tail = (stream.tail + chunk)[-TAIL_BYTES:]
        if stream.keep and self._printed < MOST_OUTPUT_BYTES:
            os.write(self._output, chunk[: MOST_OUTPUT_BYTES - self._printed])
        if self._printed < MOST_LOG_BYTES:
            with contextlib.suppress(OSError):
                os.write(2, chunk[: MOST_LOG_BYTES - self._printed])
        self._printed += len(chunk)

    def _close_log(self, streams: Mapping[int, _Stream]) -> None:
        """The end of what was too long for the log: there stands why it failed."""
        if self._printed > MOST_LOG_BYTES:
            with contextlib.suppress(OSError):
                os.write(2, b"\n[what came here was left out]\n" + _tail(streams))

    def _reap(self) -> None:
        """Take the exit status of every child that has ended, adopted ones too."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._status[pid] = os.waitstatus_to_exitcode(status)

    def _end(self, pid: int) -> None:
        """Ask everything below this process to end, then kill it. What a killed one leaves is found a turn later."""
        for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            give_up = time.monotonic() + seconds
            asked: set[int] = set()
            while True:
                self._reap()
                living = [p for p, _ in _living()] or ([] if pid in self._status else [pid])
                if not living or time.monotonic() > give_up:
                    break
                for one in living:
                    if number == signal.SIGKILL or one not in asked:
                        asked.add(one)
                        with contextlib.suppress(ProcessLookupError, PermissionError):
                            os.kill(one, number)
                time.sleep(0.01)


def _tail(streams: Mapping[int, _Stream]) -> bytes:
    """The end of both streams, standard error last: there stands why it failed."""
    return b"\n".join(stream.tail for stream in streams.values() if stream.tail)


def _fresh() -> None:
    """In the child, before it becomes the command: signals as usual, and death with the keeper."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _living() -> list[tuple[int, str]]:
    """The processes below this one that have not ended, with their names (proc(5), `stat`)."""
    parents: dict[int, list[tuple[int, str]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            head, _, rest = path.read_text(errors="replace").rpartition(")")
            pid, _, name = head.partition(" (")
            state, parent = rest.split()[:2]
            parents.setdefault(int(parent), []).append((int(pid), "" if state in "ZX" else f"{name} (process {pid})"))
    found, below = [], [os.getpid()]
    while below:
        children = parents.get(below.pop(), [])
        below += [pid for pid, _ in children]
        found += [child for child in children if child[1]]
    return found


if __name__ == "__main__":
    _Watch(int(sys.argv[1])).serve()
