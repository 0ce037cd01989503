"""Every prompt of a comparison that was answered, on disk: asked once, told again as often as needed.

A call is known by its run, its place in the run and all messages that were sent. So a comparison that goes
on is not charged twice, another one can be made from the stored answers alone (`--replay-llm`), and an
answer is never told to a prompt that it was not the answer to.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tuner.space import Refused
from tuner.trial import Chat, ChatError, Message, Reply

NAME = "calls.jsonl"


class CallError(ChatError):
    """There is no answer, and nobody may be asked for one: the cap is reached, or it is a replay."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One prompt and its answer."""

    problem: str
    method: str
    seed: int
    position: int
    """Its place in the run, from 0."""
    key: str
    """Of run, place and messages."""
    prompt: str
    """The last message; what a conversation repeats before it is in the calls before this one."""
    reply: Reply
    asked_unix: float = 0.0
    """When the answer came, for people."""


def read_calls(folder: Path) -> dict[str, Call]:
    """The calls in `folder` by key; none where there is no file. A torn last line is passed over."""
    path = folder / NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    found: dict[str, Call] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            call = msgspec.json.decode(line, type=Call)
        except msgspec.MsgspecError as error:
            raise Refused(f"{path}: line {number} is damaged ({error})") from error
        found[call.key] = call
    return found


class Calls:
    """The open store of a comparison's calls; safe among threads."""

    def __init__(self, folder: Path, *, others: Mapping[str, Call] | None = None, most: int | None = None) -> None:
        """Open the store in `folder`, cutting off what a crash left half-written.

        Args:
            folder: of the comparison; it is this process's own.
            others: stored answers of another comparison; given, nobody is asked.
            most: calls that may be made in all, those of earlier sittings included; None for no cap.
        """
        self._known = read_calls(folder)
        self._others = others
        self._most = most
        self._used = len(self._known)
        self._lock = threading.Lock()
        self._descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._descriptor, _whole(folder / NAME))
        os.lseek(self._descriptor, 0, os.SEEK_END)

    def find(self, key: str) -> Call | None:
        """The stored answer; None when somebody has to be asked. Raises `CallError` when nobody may be."""
        with self._lock:
            if (call := self._known.get(key)) is not None or self._others is None:
                return call
            call = self._others.get(key)
        if call is None:
            raise CallError("no stored answer fits this prompt: the problem, the template or the run before it differs")
        self.keep(call)
        return call

    def reserve(self) -> None:
        """Take one call from what is left of the cap. Raises `CallError` when nothing is."""
        with self._lock:
            if self._most is not None and self._used >= self._most:
                raise CallError(f"the cap of {self._most} prompts is reached (--max-prompts)")
            self._used += 1

    def give_back(self) -> None:
        """A reserved call got no answer."""
        with self._lock:
            self._used -= 1

    def keep(self, call: Call) -> None:
        """Write a call so that it survives a crash."""
        line = msgspec.json.encode(call) + b"\n"
        with self._lock:
            self._known[call.key] = call
            os.write(self._descriptor, line)
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Give the file back."""
        with self._lock:
            os.close(self._descriptor)


def _whole(path: Path) -> int:
    """Bytes up to and including the last newline."""
    return path.read_bytes().rfind(b"\n") + 1


@dataclass
class StoredChat:
    """The chat of one run: answers from the store, and asks only for what is not there."""

    calls: Calls
    inner: Chat | None
    """Who is asked; None in a replay."""
    problem: str
    method: str
    seed: int
    name: str
    replies: list[Reply] = field(default_factory=list)
    """Of this run, in order."""
    clock: Callable[[], float] = time.time

    def reply(self, messages: Sequence[Message], schema: Mapping[str, object] | None) -> Reply:
        """The stored answer to these messages, or a new one, which is stored first. Raises `ChatError`."""
        position = len(self.replies)
        key = call_key(self.problem, self.method, self.seed, position, messages)
        call = self.calls.find(key)
        if call is None:
            call = Call(
                problem=self.problem,
                method=self.method,
                seed=self.seed,
                position=position,
                key=key,
                prompt=messages[-1].content,
                reply=self._ask(messages, schema),
                asked_unix=round(self.clock(), 3),
            )
            self.calls.keep(call)
        self.replies.append(call.reply)
        return call.reply

    def _ask(self, messages: Sequence[Message], schema: Mapping[str, object] | None) -> Reply:
        assert self.inner is not None, "without a chat the store refuses what it does not hold"
        self.calls.reserve()
        try:
            return self.inner.reply(messages, schema)
        except BaseException:
            self.calls.give_back()
            raise


def call_key(problem: str, method: str, seed: int, position: int, messages: Sequence[Message]) -> str:
    """SHA-256 of what a call is known by."""
    known_by = [problem, method, seed, position, [[m.role, m.content] for m in messages]]
    return hashlib.sha256(json.dumps(known_by).encode()).hexdigest()


@dataclass
class CappedChat:
    """A chat that may be asked so many times in all, for live studies, whose journals keep their calls."""

    inner: Chat
    left: list[int]
    """One number, shared by the chats of a comparison: how many prompts may still be sent."""

    @property
    def name(self) -> str:
        return self.inner.name

    def reply(self, messages: Sequence[Message], schema: Mapping[str, object] | None) -> Reply:
        """The inner chat's answer. Raises `CallError` once nothing is left."""
        if self.left[0] <= 0:
            raise CallError("the cap on prompts is reached (--max-prompts)")
        reply = self.inner.reply(messages, schema)
        self.left[0] -= 1
        return reply
