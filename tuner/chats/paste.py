"""A person carries the prompt to whatever chat they use, and its answer back.

The chat asks through one callback, `ask(prompt) -> answer`, and prints nothing itself: whoever owns
the terminal shows the prompt, writes `osc52(prompt)` to copy it, and reads the answer with `pasted`.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from tuner.trial import Message, Reply

END = "."
"""The line that ends a pasted answer; the end of the input (Ctrl-D) does so too."""

_MOST_BYTES = 74_994
"""Terminals limit the sequence, hterm the tightest: 100 000 characters, of which base64 takes 4 for 3 bytes."""


class PasteChat:
    """The chat named `paste`."""

    name = "paste"

    def __init__(self, ask: Callable[[str], str]) -> None:
        """`ask` shows a prompt and returns the pasted answer, empty when the person gave none."""
        self._ask = ask
        self._carried: tuple[Message, ...] = ()
        """The turns that the person's chat has already seen, its own answers included."""

    def __repr__(self) -> str:
        return "PasteChat()"

    def reply(self, messages: Sequence[Message], schema: Mapping[str, object] | None) -> Reply:
        """Answer the last message. The prompt itself tells the form of the answer; `schema` cannot be enforced."""
        turns = tuple(messages)
        started = time.monotonic()
        answer = self._ask(_as_text(turns, self._carried)).encode("utf-8", "replace").decode("utf-8").strip()
        self._carried = (*turns, Message("assistant", answer))
        return Reply(text=answer, model=self.name, seconds=time.monotonic() - started)


def _as_text(turns: tuple[Message, ...], carried: tuple[Message, ...]) -> str:
    """What the person has to carry: only the new turns where the conversation goes on, else all of them.

    The person's chat keeps its own answers. They are told to it only where it may not know them,
    as after a resume.
    """
    if carried and len(turns) > len(carried) and turns[: len(carried)] == carried:
        turns = turns[len(carried) :]
    return "\n\n".join(f"You answered:\n{m.content}" if m.role == "assistant" else m.content for m in turns)


def pasted(lines: Iterable[str]) -> str:
    """The answer in `lines` (a terminal, a file): up to a line that holds a single `.`, or to their end."""
    answer = []
    for line in lines:
        if line.strip() == END:
            break
        answer.append(line.rstrip("\r\n"))
    return "\n".join(answer)


def osc52(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The escape sequence that copies `text` to the clipboard of the terminal; empty when it is too long for that.

    Terminals without OSC 52 ignore it. tmux passes it on in its own wrapping, with every escape doubled
    (and `set -g allow-passthrough on`).

    Source: https://invisible-island.net/xterm/ctlseqs/ctlseqs.html, "Manipulate Selection Data".
    """
    data = text.encode("utf-8", "replace")
    if len(data) > _MOST_BYTES:
        return ""
    sequence = f"\x1b]52;c;{base64.b64encode(data).decode('ascii')}\x07"
    if environ.get("TMUX"):
        doubled = sequence.replace("\x1b", "\x1b\x1b")
        return f"\x1bPtmux;{doubled}\x1b\\"
    return sequence
