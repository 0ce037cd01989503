"""The parent of an engine that runs as a process of its own: it ends with whoever started it, and leaves nothing.

Run as `python -I supervise.py LEASH STATUS WORD...`. It leads a process group, runs WORD... inside it, and reads
LEASH, a pipe whose other end the worker alone holds. At end of file the worker is gone, however it died, and the
whole group is killed. When the engine ends first, how it ended is written to STATUS (`exit 3`, `signal 9`, or
`failed 2`, an errno, where it could not be started), and what is left of the group is killed.

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

PASSED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def supervise(leash: int, status: int, words: list[str]) -> None:
    """Run `words` until they end or the leash does."""
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
    while True:
        ready, _, _ = select.select([leash, woken], [], [])
        if leash in ready and not os.read(leash, 1):
            return
        if woken in ready:
            os.read(woken, 512)
            pid, ended = os.waitpid(engine, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(ended)
                say(status, f"signal {-code}" if code < 0 else f"exit {code}")
                return


def say(status: int, words: str) -> None:
    """Tell the worker, which may be gone."""
    with contextlib.suppress(BrokenPipeError):
        os.write(status, words.encode())


if __name__ == "__main__":
    try:
        supervise(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    finally:
        # Its own group and no other: it leads one, so that 0 cannot mean the worker's.
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
