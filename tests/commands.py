"""`tune` as a person types it: in this process, or in one of its own where the claim is about processes.

Starting a process takes a hundred times longer than what most commands do. `typed` calls what the command calls and
looks at the same three things: exit code, standard output, standard error. Engines run in workers of their own either
way.
"""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from tuner import session
from tuner.cli import main

KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "TUNE_LLM")
TUNE = [sys.executable, "-m", "tuner.cli"]


def settle_in(folder, monkeypatch):
    """Work in a folder of one's own and without keys. The idle machine is watched for a moment only, not for 5 s."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(session, "CPU_IDLE_SECONDS", 0.1)
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)


def typed(*arguments, env=None, cwd=None):
    """What `tune ARGUMENTS` does, without a process of its own; nobody is at the keyboard."""
    words, out, err = ["tune", *map(str, arguments)], _stream(), _stream()
    code = 0
    with (
        mock.patch.object(sys, "argv", words),
        mock.patch.object(sys, "stdin", io.StringIO()),
        mock.patch.dict(os.environ, os.environ.copy() if env is None else env, clear=True),
        contextlib.chdir(Path.cwd() if cwd is None else cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as left:
            code = left.code or 0
    return SimpleNamespace(returncode=code, stdout=_text(out), stderr=_text(err))


def in_a_process(*arguments, **more):
    """What `tune ARGUMENTS` does in a process of its own."""
    return subprocess.run(
        [*TUNE, *map(str, arguments)], capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL, **more
    )


def _stream():
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def _text(stream):
    return stream.buffer.getvalue().decode()
