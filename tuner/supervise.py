"""The parent of an engine that runs as a process of its own: it ends with whoever started it, and leaves nothing.

Run as `python -I supervise.py LEASH STATUS WORD...`. It leads a process group, runs WORD... inside it, and reads LEASH,
a pipe whose other end the worker alone holds. At end of file the worker is gone, however it died: the group is asked to
end, and the engine killed where it does not; a byte on LEASH has it killed at once. When the engine ends, how it ended
is written to STATUS (`exit 3`, `signal 9`, or `failed 2`, an errno, where it could not be started); what is left of the
group has a moment to tidy up and is killed. The folder that TUNE_SCRATCH names, the engine's temporary files, goes
last.

It is a program of its own because the worker may be dead, hung or busy by then, and it imports nothing but what it
needs because it lives as long as the engine. Signals meant for the group pass it by: it must outlive them to say
how the engine took them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

PASSED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

STOP_SECONDS = 10.0
"""From asking an engine to end (SIGTERM) to killing it."""

KILL_SECONDS = 2.0
"""From SIGKILL to giving up."""

TIDY_SECONDS = 2.0
"""For what an engine leaves running: Python's resource tracker takes shared memory away once its parent is gone."""

REAP_SECONDS = TIDY_SECONDS + 1.0
"""From the end of an engine to that of its supervisor."""

STOPPED_SECONDS = STOP_SECONDS + KILL_SECONDS + REAP_SECONDS + 2 * KILL_SECONDS
"""What `Server.stop` in tuner/serving.py takes at most: its waits, one after the other."""


def supervise(leash: int, status: int, words: list[str]) -> None:
    """Run `words` until they end, or the leash does and they are stopped."""
    for descriptor in (leash, status):
        os.set_inheritable(descriptor, False)
    for number in PASSED_BY:
        signal.signal(number, signal.SIG_IGN)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        # Python ignores SIGPIPE, and an engine would inherit that.
        engine = os.posix_spawnp(
            words[0], words, os.environ, setsigdef=[*PASSED_BY, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ]
        )
    except OSError as error:
        say(status, f"failed {error.errno}")
        return
    watched, give_up, killed = [leash, woken], float("inf"), False
    while not (ended := os.waitpid(engine, os.WNOHANG))[0]:
        left_seconds = max(0.0, give_up - time.monotonic())
        ready, _, _ = select.select(watched, [], [], None if give_up == float("inf") else left_seconds)
        if woken in ready:
            os.read(woken, 512)
        if leash in ready and not os.read(leash, 1):
            ask_to_end(engine)
            watched, give_up = [woken], time.monotonic() + STOP_SECONDS
        elif leash in ready or not ready:
            if killed:
                return
            os.kill(engine, signal.SIGKILL)
            watched, give_up, killed = [woken], time.monotonic() + KILL_SECONDS, True
    code = os.waitstatus_to_exitcode(ended[1])
    say(status, f"signal {-code}" if code < 0 else f"exit {code}")
    give_up = time.monotonic() + TIDY_SECONDS
    while alive(os.getpgrp(), but=os.getpid()) and time.monotonic() < give_up:
        time.sleep(0.02)


PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""prctl(2): the signal for the death of the parent; orphans below this process become its children."""


def prctl(option: int, value: int) -> None:
    """Nothing where the system has no such call: what leaves the process group is then not found again."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def adopt_orphans() -> None:
    """Make what the processes below this one leave behind its children."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def reap() -> None:
    """Take every child that has ended: in a container there is often nobody else who would."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def ask_to_end(engine: int) -> None:
    """SIGTERM for the engine and all that it started, as far as a group of their own tells them apart."""
    with contextlib.suppress(ProcessLookupError):
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGTERM)
        else:
            os.kill(engine, signal.SIGTERM)


def alive(group: int, but: int = 0) -> bool:
    """Whether a process of this group, beside `but`, still holds anything. A zombie that nobody reaps holds nothing."""
    for entry in os.listdir("/proc"):  # noqa: PTH208 - pathlib would double what this process imports
        if entry.isdigit() and int(entry) != but:
            with contextlib.suppress(OSError, IndexError, ValueError), open(f"/proc/{entry}/stat") as stat:  # noqa: PTH123 - as above
                # The name, in parentheses, may hold anything; then state, parent and group (proc(5)).
                state, _, of_group = stat.read().rpartition(")")[2].split()[:3]
                if int(of_group) == group and state not in "ZX":
                    return True
    return False


def signal_name(number: int) -> str:
    """`SIGKILL`; `signal 40` of one without a name, such as the real-time ones."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def out_of_memory_kills() -> int:
    """How many processes the kernel has killed for lack of memory since boot; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat") as counts:  # noqa: PTH123 - as above
        for line in counts:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def say(status: int, words: str) -> None:
    """Tell the worker, which may be gone."""
    with contextlib.suppress(BrokenPipeError):
        os.write(status, words.encode())


if __name__ == "__main__":
    adopt_orphans()
    try:
        supervise(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    finally:
        if scratch := os.environ.get("TUNE_SCRATCH"):
            import shutil  # the supervisor stays small while the engine runs

            shutil.rmtree(scratch, ignore_errors=True)
        reap()
        # Its own group and no other: it leads one, so that 0 cannot mean the worker's.
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
