"""One answer from a provider over HTTP: asked again until it comes, is refused, or time is up.

The providers' files know the wire (what to send, where the text is in the body); everything that
they share is here: the retry loop, the fallback to a request without a schema, and the sentences.
The SDKs' own retries are off, so that there is one loop, one time limit and one place to read.

Invariants: no method outlasts the time limit, whatever the server does; a key never leaves this
process but in its own header; Ctrl-C passes through at once.
"""

from __future__ import annotations

import json
import math
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Protocol
from urllib.parse import urlsplit

from tuner.space import excerpt
from tuner.trial import ChatError, Message, Reply

PLACEHOLDER_KEY = "no-key"
"""Sent to a server that needs no key, because the SDKs insist on one."""

_MOST_ATTEMPTS = 8
"""With the waits below about 70 s of back-off: past a provider's per-minute window, short of a long
wait for a server that is not running."""

_LONGEST_WAIT_SECONDS = 30.0
_CONNECT_SECONDS = 10.0

_SHORTEST_SECRET = 8
"""Shorter keys are placeholders for local servers (`x`, `EMPTY`); taking them out would garble answers."""

_CHECK = {
    400: "the request itself is at fault",
    401: "check the key in {variable}",
    402: "check the account's balance",
    403: "check that the key in {variable} may use this model",
    404: "check the model's name{address}",
    413: "the prompt is too long for this server",
}
"""What to look at, by HTTP status."""


class Sdk(Protocol):
    """What the two SDKs, which come out of one generator, have in common."""

    APIStatusError: type[Exception]
    APITimeoutError: type[Exception]
    APIConnectionError: type[Exception]


@dataclass(frozen=True)
class Fault:
    """An attempt that gave no answer. A value, not an exception: an exception would drag the SDK's own
    along as its context, with the request and its headers.
    """

    what: str
    """For a person: `HTTP 429 "slow down"`."""
    status: int | None = None
    """The HTTP status; None where no usable answer came at all."""
    retry_after_seconds: float | None = None
    """How long the server asked to wait."""
    names_schema: bool = False
    """The server's words are about structured output."""
    spent: bool = False
    """The account has no quota left: the one 429 that waiting does not mend."""

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later."""
        if self.status is None:
            return True
        return not self.spent and (self.status in (408, 409, 425, 429) or (self.status >= 500 and self.status != 501))


class RemoteChat(ABC):
    """A chat model behind an HTTP address."""

    def __init__(
        self,
        name: str,
        *,
        sdk: Sdk,
        address: str,
        variable: str,
        key: str | None,
        timeout_seconds: float,
        notify: Callable[[str], None] | None,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        """`address` is the full base URL, `variable` the environment variable that holds the key."""
        self.name = name
        self._sdk = sdk
        self._address = urlsplit(address)
        self._variable = variable
        self._scrub = _scrubber(key)
        self._timeout_seconds = timeout_seconds
        self._notify = notify or (lambda sentence: None)
        self._clock = clock
        self._sleep = sleep
        self._takes_schema: bool | None = None
        """Whether the server takes a schema; None until it was asked."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @abstractmethod
    def _send(self, messages: Sequence[Message], schema: Mapping[str, object] | None, seconds: float) -> bytes:
        """One request through the SDK; the body of a successful answer. Raises the SDK's exceptions."""

    @abstractmethod
    def _read(self, body: Mapping[str, object]) -> Reply | None:
        """The reply in a body; None when the body is not in the provider's format."""

    def reply(self, messages: Sequence[Message], schema: Mapping[str, object] | None) -> Reply:
        """Answer the last message. `Reply.seconds` is the whole wait, retries included.

        Raises:
            ChatError: the provider refuses, or did not answer within the time limit.
        """
        # A lone surrogate (a remark typed in a broken locale) cannot be sent as UTF-8.
        messages = [replace(m, content=_encodable(m.content)) for m in messages]
        started = self._clock()
        attempts = 0
        while True:
            asked = None if self._takes_schema is False else schema
            seconds_left = self._timeout_seconds - (self._clock() - started)
            outcome = self._attempt(messages, asked, seconds_left)
            if isinstance(outcome, Reply):
                if asked is not None:
                    self._takes_schema = True
                return replace(outcome, seconds=self._clock() - started)
            if asked is not None and self._refuses_schema(outcome):
                self._takes_schema = False
                continue
            attempts += 1
            wait = _wait_seconds(attempts, outcome, seed=f"{self.name} {messages[-1].content if messages else ''}")
            elapsed = self._clock() - started
            if not outcome.passing or attempts == _MOST_ATTEMPTS or elapsed + wait >= self._timeout_seconds:
                raise ChatError(self._sentence(outcome, attempts, elapsed))
            self._notify(f"{self._who}: {outcome.what}; trying again in {wait:.0f} s")
            self._sleep(wait)

    def _attempt(
        self, messages: Sequence[Message], schema: Mapping[str, object] | None, seconds: float
    ) -> Reply | Fault:
        """One request. Everything that comes back has been cleared of the key."""
        try:
            content = _within(seconds, lambda: self._send(messages, schema, seconds))
        except (TimeoutError, self._sdk.APITimeoutError):
            return Fault(f"no answer within {seconds:.0f} s")
        except self._sdk.APIConnectionError as error:
            return Fault(f"no connection ({self._quote(str(error.__cause__ or error))})")
        except self._sdk.APIStatusError as error:
            return self._status_fault(
                getattr(error, "status_code", 0), getattr(error, "body", None), _headers(error), str(error)
            )
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            return Fault(f"an answer that is no JSON ({self._quote(content[:2000].decode('utf-8', 'replace'))})")
        reply = self._read(body) if isinstance(body, Mapping) else None
        if reply is not None:
            return replace(reply, text=self._scrub(_encodable(reply.text)), model=self._scrub(_encodable(reply.model)))
        # Some gateways wrap a failure into a success: {"error": {"code": 429, "message": ...}}.
        match body:
            case {"error": {"code": int(status)}} if 400 <= status < 600:
                return self._status_fault(status, body, {}, "")
            case {"error": _}:
                return Fault(f"an error in place of an answer ({self._quote(_message(body))})")
            case _:
                return Fault(f"an answer in an unknown form ({self._quote(_flat(body))})")

    def _status_fault(self, status: int, body: object, headers: Mapping[str, str], otherwise: str) -> Fault:
        text = _message(body) or otherwise
        everything = f"{text} {_flat(body)}".lower()
        return Fault(
            f"HTTP {status} {self._quote(text)}",
            status=status,
            retry_after_seconds=_retry_after_seconds(headers),
            names_schema=any(
                word in everything for word in ("schema", "response_format", "output_config", "structured")
            ),
            spent=status == 429 and "insufficient_quota" in everything,
        )

    def _refuses_schema(self, fault: Fault) -> bool:
        """Whether to ask without a schema. Servers refuse it in many ways: vLLM and llama.cpp with 400,
        strict proxies with 422, routers with 404 where no host of the model offers it, others with 500 or
        501. Until a schema has once been taken, any 400 or 422 may mean it.
        """
        if fault.status is None or fault.status in (401, 403, 408, 409, 429):
            return False
        return fault.names_schema or (self._takes_schema is None and fault.status in (400, 422))

    @property
    def _who(self) -> str:
        # Not `netloc`: it may hold a user and a password.
        host = self._address.hostname or ""
        port = f":{self._address.port}" if self._address.port else ""
        return f"{self.name} at {host}{port}"

    def _sentence(self, fault: Fault, attempts: int, elapsed: float) -> str:
        kept = "everything measured is kept, and `tune run --resume` goes on"
        if fault.passing:
            times = "once" if attempts == 1 else f"{attempts} times"
            asked = (
                f", and it asks to wait {fault.retry_after_seconds:.0f} s"
                if fault.retry_after_seconds is not None
                else ""
            )
            return f"{self._who} gave no answer: {fault.what}, tried {times} in {elapsed:.0f} s{asked}; {kept}"
        assert fault.status is not None
        path = self._address.path.rstrip("/")
        address = "" if path.endswith("/v1") else " and --base-url (most servers want /v1 at its end)"
        default = (
            "check --base-url: the server lives elsewhere" if fault.status < 400 else "it will not take this request"
        )
        check = "the account's quota is used up" if fault.spent else _CHECK.get(fault.status, default)
        check = check.format(variable=self._variable, address=address)
        return f"{self._who} refused: {fault.what}; {check}; {kept}"

    def _quote(self, text: str) -> str:
        """The server's words: cleared of the key first, then cut, so that no half of it can stay."""
        return excerpt(" ".join(self._scrub(text).split()), 200)


def _within(seconds: float, call: Callable[[], bytes]) -> bytes:
    """The result of `call`, or `TimeoutError` after `seconds`, whatever it hangs in.

    A socket's timeout counts from byte to byte: a server that trickles never meets it. A name lookup
    has none, and holds Ctrl-C back. So the request runs beside, in a thread that dies with the process.
    """
    future: Future[bytes] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 raised again in the caller's thread, by the future
            future.set_exception(error)

    threading.Thread(target=run, name="chat request", daemon=True).start()
    return future.result(seconds)


def _wait_seconds(attempt: int, fault: Fault, seed: str) -> float:
    """How long to wait after the failed attempt number `attempt`, from 1.

    What the server asks for; else 1, 2, 4, ... 30 s, of which the upper half is jitter, so that studies that were
    turned away together do not come back together. The jitter is a hash, not a draw: a run can be repeated.
    """
    if fault.retry_after_seconds:
        return fault.retry_after_seconds
    full = min(_LONGEST_WAIT_SECONDS, 2.0 ** (attempt - 1))
    share = zlib.crc32(f"{attempt} {seed}".encode()) / 2**32
    return full * (0.5 + share / 2)


def _headers(error: Exception) -> Mapping[str, str]:
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", {})
    return headers


def _retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """The wait in `retry-after-ms` or `retry-after` (seconds or a date, RFC 9110 section 10.2.3); None without."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError):
        return None


def _message(body: object) -> str:
    """The sentence in an error body, of whichever shape; the whole body where there is none."""
    match body:
        case {"error": {"message": str(text)}} | {"error": str(text)} | {"message": str(text)} | str(text):
            return text
        case None:
            return ""
        case _:
            return _flat(body)


def _flat(body: object) -> str:
    """A body as text, also one that is nested too deep to be written."""
    try:
        return json.dumps(body, default=str)
    except RecursionError:
        return "(deeply nested)"


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which no file and no socket takes as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _scrubber(key: str | None) -> Callable[[str], str]:
    """A function that takes `key` out of a text. A closure: nothing that prints an object prints it."""
    if key is None or len(key) < _SHORTEST_SECRET:
        return lambda text: text
    return lambda text: text.replace(key, "[key]")


def connect_seconds(seconds: float) -> float:
    """The part of a time limit that may go into connecting: a dead host is found out soon and tried again."""
    return min(_CONNECT_SECONDS, seconds)


def count(value: object) -> int | None:
    """A token count as the provider gave it; None where it gave none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
