"""What engines behind HTTP share: a supervised process, a readiness check, and the load over a streaming API.

`start_server` runs an engine in a process group of its own that ends with the worker, however the worker dies
(docs/design/serving.md). `wait_ready` waits for it, or says what its log says. `Client` sends the fixed load to an
OpenAI-compatible API and brings back a `Work`: tokens as the server counted them, times as the client saw them.

The client is in the measured window: plain sockets and threads, one per request in flight, and no library that
takes seconds to import. The prompts of a pass are a function of seed, pass and request, so they are the same for
every trial and new in every pass: a prefix cache finds nothing to reuse.

Every failure is one sentence. It is a `Refused` where a person must act and no other configuration would help, else a
`RuntimeError`. A failed request is only counted where the engine runs on and answered others; whatever would fail
again for every request ends the pass.

Glossary
    closed loop   as many requests in flight as the concurrency says; the next one waits for an answer
    open loop     requests leave at moments drawn beforehand, whether or not earlier ones are answered
    leash         a pipe that the worker alone holds; the engine is stopped when it ends
"""

from __future__ import annotations

import abc
import array
import contextlib
import errno
import functools
import http.client
import importlib.util
import itertools
import json
import math
import os
import random
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from tuner.quality import TEXT, Passage, drawn, judge, of_text
from tuner.space import Config, Int, Parameter, Refused, Value
from tuner.supervise import KILL_SECONDS, REAP_SECONDS, STOP_SECONDS, alive, out_of_memory_kills, signal_name
from tuner.trial import TRIAL_SECONDS, EngineError, Target, Work

# --- the process -----------------------------------------------------------------------------

POLL_SECONDS = 0.1

LATE_SECONDS = 2.0
"""How long after a broken connection an engine's end may become known."""

LONGEST_CAUSE = 300

NOT_STARTED = "cannot be started"

_SUPERVISOR = Path(__file__).with_name("supervise.py")


@dataclass(frozen=True, kw_only=True)
class Symptoms:
    """How an engine's log says why it ended. The first pattern that is found anywhere wins; then the next."""

    out_of_memory: Sequence[str] = ()
    """Regular expressions; the line that holds one follows `out of memory:`."""
    telling: Sequence[str] = ()
    """Of lines that name a cause, tried before the general ones."""


# What most programs print: Python's last line of a traceback, argparse's, and a C++ logger's. An error in quotes is one
# that a warning speaks of: vLLM's on the number of open files is in the log of nearly every start.
_TELLING = (
    r"(?<![`'\".])\b(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Refused)\b: .+",
    r"\berror: .+",
    r"(?i)\b(?:fatal|panic|abort)\w*\b.*: .+",
)

# How argparse (of Python and of Rust) and llama.cpp say that they do not take an argument.
_REJECTED = re.compile(
    r"\berror: (?:unrecognized arguments?|argument|ambiguous option|unexpected argument|invalid argument)\b.*"
    r"|error while handling argument .*"
)

_PORT_TAKEN = r"(?i)address already in use|EADDRINUSE|couldn't bind|\bport \S+ (?:is )?(?:already in use|not available)"

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


class Server:
    """A running engine, with the process group that holds it and the part of the log that it wrote."""

    def __init__(
        self,
        supervisor: subprocess.Popen[bytes],
        leash: int,
        status: int,
        log_start: int | None,
        name: str,
        symptoms: Symptoms,
        scratch: str,
        output: int = 2,
        given: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._given = given
        self._kills = out_of_memory_kills()
        self._output = output
        self._supervisor = supervisor
        self._leash = leash
        self._status = status
        self._log_start = log_start
        self._symptoms = symptoms
        self._scratch = scratch
        self._end: str | None = None
        self._stopped = False

    @property
    def pid(self) -> int:
        """The supervisor's, and the number of the process group."""
        return self._supervisor.pid

    def end(self, wait_seconds: float = 0.0) -> str | None:
        """How the engine ended, `exit status 1` or `SIGKILL`; None while it runs."""
        give_up = time.monotonic() + wait_seconds
        while self._end is None:
            if select.select([self._status], [], [], 0)[0]:
                self._end = _read_end(os.read(self._status, 64))
            elif time.monotonic() >= give_up:
                return None
            else:
                time.sleep(0.02)
        return self._end

    def log(self) -> str:
        """What was written to the log since the engine was started; empty where that is no file."""
        if self._log_start is None:
            return ""
        with Path(f"/proc/self/fd/{self._output}").open("rb") as file:
            file.seek(self._log_start)
            return _CONTROL.sub("", file.read().decode(errors="replace"))

    def lack_of_memory(self) -> str | None:
        """The line of the log that tells of too little memory; None where there is none."""
        return first_line(self.log(), self._symptoms.out_of_memory)

    def cause(self) -> str:
        """Why the engine ended, as its log says it: `out of memory: ...`, the first telling line, or the last one."""
        return self._told() or last_line(self.log()) or "it wrote nothing to its log"

    def _told(self) -> str | None:
        """The line of the log that names a cause; None where none does."""
        if lack := self.lack_of_memory():
            return f"out of memory: {lack}"
        return first_line(self.log(), (*self._symptoms.telling, *_TELLING))

    def _rejected(self) -> str | None:
        """The word of a person's that the log says was not taken; None where it says so of none."""
        if self.lack_of_memory():
            # Advice on memory names flags too.
            return None
        said = [found[0] for found in map(_REJECTED.search, self.log().splitlines()) if found]
        words = [word for word in self._given if word.startswith("-")]
        # A name may have been cut short, and stands in the message as it is in full.
        for ends in (r"(?![\w-])", ""):
            for word in words:
                flag = re.escape(word.partition("=")[0]) + ends
                if any(re.search(rf"(?<![\w-]){flag}", line) for line in said):
                    return word
        return None

    def ended(self, when: str, *, loading: bool = False) -> RuntimeError | Refused:
        """Why an engine that has ended did so `when` (`while loading`), to be raised.

        A signal says nothing of its reason, so that a line of the log then stands beside it and not in its place.
        It is a `Refused` where the engine ended `loading`, because of an argument that a person gave it.
        """
        name, end, starved = self.name, self.end() or "no status", out_of_memory_kills() > self._kills
        if end.startswith(NOT_STARTED):
            return RuntimeError(f"{name} {end}")
        if end.startswith(("SIG", "signal ")):
            said, last = self._told(), last_line(self.log())
            beside = (
                f"its log says: {said}" if said else f"the last line of its log: {last}" if last else "its log is empty"
            )
            if starved and end == "SIGKILL":
                return RuntimeError(f"out of memory: the kernel killed {name} {when} (SIGKILL); {beside}")
            return RuntimeError(f"{name} was killed by {end} {when}; {beside}")
        if word := self._rejected() if loading else None:
            return Refused(
                f"--engine-arg={word}: {name} does not take it ({self.cause()}); leave it out, or correct it"
            )
        cause = self.cause()
        # Which process it was is not known: an engine's worker is as likely as a stranger's program.
        beside = "; the kernel killed a process for lack of memory meanwhile" if starved else ""
        return RuntimeError(f"{name} ended {when} ({end}): {cause}{beside}")

    def port_is_taken(self) -> bool:
        """Whether it has ended because somebody else listens on its port."""
        return self.end() is not None and first_line(self.log(), (_PORT_TAKEN,)) is not None

    def stop(self, grace_seconds: float = STOP_SECONDS) -> None:
        """End the engine and everything in its group; its port is free afterwards. May be called twice.

        It takes `STOPPED_SECONDS` at most. Who is interrupted here leaves once the engine has ended in order; a second
        interruption does not wait for that.
        """
        if self._stopped:
            return
        self._stopped = True
        give_up = time.monotonic() + grace_seconds
        try:
            # The supervisor is not reaped before: until then nobody else can be given the group's number.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGTERM)
            try:
                self._see_out(give_up)
            except BaseException:
                self._see_out(give_up)
                raise
        finally:
            os.close(self._leash)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._supervisor.wait(KILL_SECONDS)
            os.close(self._status)
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _see_out(self, give_up: float) -> None:
        """Wait until an engine that was asked to end has, then end what is left of its group.

        `give_up`: when it is killed, by `time.monotonic`.
        """
        if self.end(wait_seconds=give_up - time.monotonic()) is None:
            # The engine alone: what it leaves running may still take its shared memory away.
            with contextlib.suppress(BrokenPipeError):
                os.write(self._leash, b"k")
        if self.end(wait_seconds=KILL_SECONDS) is not None:
            _until(lambda: _has_exited(self.pid), REAP_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        _until(lambda: not alive(self.pid), KILL_SECONDS)


def start_server(
    argv: Sequence[str],
    *,
    name: str,
    env: Mapping[str, str] | None = None,
    symptoms: Symptoms | None = None,
    cwd: Path | None = None,
    output: int = 2,
    given: Sequence[str] = (),
) -> Server:
    """Start an engine whose output goes to this process's standard error, or to another open file.

    Args:
        argv: the command, word by word; no shell sees it.
        name: the engine's, for error messages.
        env: variables beside those of this process.
        symptoms: how its log names what went wrong.
        cwd: the folder that it runs in.
        output: file descriptor of its log, which stays open while the engine runs.
        given: those of its words that a person asked for with --engine-arg.

    A program that does not exist is known to `wait_ready`, like any other that ends at once.
    """
    told = os.fstat(output)
    log_start = told.st_size if stat.S_ISREG(told.st_mode) else None
    # Engines leave sockets and caches in their temporary folder when they are killed. No prefix: the path of a socket
    # has 107 characters at most.
    scratch = tempfile.mkdtemp(prefix="")
    leash_end, leash = os.pipe()
    status, status_end = os.pipe()
    try:
        supervisor = subprocess.Popen(
            [sys.executable, "-I", str(_SUPERVISOR), str(leash_end), str(status_end), *argv],
            env={**os.environ, "TMPDIR": scratch, **(env or {}), "TUNE_SCRATCH": scratch},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(leash_end, status_end),
            start_new_session=True,
        )
    except BaseException:
        os.close(leash)
        os.close(status)
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    finally:
        os.close(leash_end)
        os.close(status_end)
    return Server(supervisor, leash, status, log_start, name, symptoms or Symptoms(), scratch, output, given)


PORTS_TRIED = 3


def started(
    start: Callable[[int], Server], *, timeout_seconds: float = 1800.0, path: str = "/health"
) -> tuple[Server, Endpoint]:
    """An engine that can take requests, and where; the caller stops it.

    The port is chosen here, and another one where a stranger took it before the engine listened there.

    Args:
        start: starts the engine on the port that it is given.
        timeout_seconds: as of `wait_ready`.
        path: as of `wait_ready`.

    Raises:
        RuntimeError: the engine ended, is not ready in time, or found no port that was free; the sentence says why.
        Refused: it did not take an argument that a person gave it.
    """
    left = PORTS_TRIED
    while True:
        port, left = free_port(), left - 1
        server = start(port)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_ready(url, server, timeout_seconds=timeout_seconds, path=path)
            return server, replace(Endpoint.parse(url), engine=server.name)
        except BaseException as error:
            again = isinstance(error, RuntimeError) and server.port_is_taken()
            server.stop()
            if not again:
                raise
            if not left:
                raise RuntimeError(
                    f"{server.name} found its port taken, {PORTS_TRIED} times in a row and each time another one; "
                    f"the last time: {error}"
                ) from error


def beside(file: str, name: str) -> ModuleType:
    """The module in `NAME.py` beside `file`: a runner that shares its engine or its models with another one."""
    own = f"tuner_runner_{name}_beside"
    if own not in sys.modules:
        spec = importlib.util.spec_from_file_location(own, Path(file).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        # Dataclasses look their own module up in sys.modules while the class body runs.
        sys.modules[own] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[own]
            raise
    return sys.modules[own]


def _until(holds: Callable[[], bool], seconds: float) -> None:
    """Wait until `holds`, at most so long."""
    give_up = time.monotonic() + seconds
    while not holds() and time.monotonic() < give_up:
        time.sleep(0.005)


def _read_end(told: bytes) -> str:
    kind, _, number = told.decode().partition(" ")
    if kind == "signal":
        return signal_name(int(number))
    if kind == "failed":
        return f"{NOT_STARTED}: {os.strerror(int(number))}"
    return f"exit status {number}" if kind == "exit" else "its supervisor was killed"


def _has_exited(pid: int) -> bool:
    """Whether a child has ended; it stays unreaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def first_line(log: str, patterns: Sequence[str]) -> str | None:
    """The first line that the first of `patterns` occurs in, from there on; None where none occurs.

    Of a pattern with a group, only what the group matches.
    """
    for pattern in patterns:
        if found := re.search(pattern, log, re.MULTILINE):
            if found.lastindex:
                return cut(found[1])
            line_end = log.find("\n", found.start())
            return cut(log[found.start() : line_end if line_end >= 0 else len(log)])
    return None


def cut(text: str, limit: int = LONGEST_CAUSE) -> str:
    """Foreign text on one line, without control characters, no longer than `limit`."""
    line = " ".join(_CONTROL.sub(" ", text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def last_line(log: str) -> str | None:
    """The last line that is not blank, cut; None where there is none."""
    return next((cut(line) for line in reversed(log.splitlines()) if line.strip()), None)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


STRANGER_SECONDS = 60.0
"""How long an answer that no process of the engine's group can have given is taken for a stranger's: an engine in a
container is outside the group."""


def _listens(group: int, port: int) -> bool:
    """Whether a process of this group listens on a TCP port; True where the system does not say who does."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                # Address and port in hexadecimal, state 0A for one that listens, and the inode (proc(5)).
                _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
                if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{inode}]")
    if not sockets:
        return True
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(entry.name)) == group:
                for descriptor in (entry / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        if str(descriptor.readlink()) in sockets:
                            return True
    return False


def wait_ready(url: str, server: Server, *, timeout_seconds: float = 1800.0, path: str = "/health") -> None:
    """Ask for `path` until the answer is 200.

    Args:
        url: of the server, `http://127.0.0.1:8000`; a `/v1` at its end is left out.
        server: watched meanwhile.
        timeout_seconds: after which it is given up. A trial's own timeout usually comes first.
        path: what the engine answers with 200 only once it can take requests.

    Raises:
        RuntimeError: the engine ended first, or the time is over; the sentence says why.
        Refused: it ended because of an argument that a person gave it.
    """
    endpoint = Endpoint.parse(url)
    give_up = time.monotonic() + timeout_seconds
    answer, stranger_until = "nothing", 0.0
    while True:
        if server.end() is not None:
            raise server.ended("while loading", loading=True)
        try:
            status, _ = endpoint.get(path, timeout_seconds=5.0)
        except OSError:
            answer = "nothing"
        except http.client.HTTPException:
            answer = "no HTTP"
        else:
            answer = f"HTTP {status}"
            # Somebody else may listen here, who would have answered: the engine then ends, as soon as it tries to.
            if status == http.HTTPStatus.OK and server.end(POLL_SECONDS) is None:
                stranger_until = stranger_until or time.monotonic() + STRANGER_SECONDS
                if _listens(server.pid, endpoint.port) or time.monotonic() > stranger_until:
                    return
        if time.monotonic() > give_up:
            raise RuntimeError(
                f"{server.name} was not ready after {timeout_seconds:g} s: GET {path} brought {answer}; "
                f"the last line of its log: {last_line(server.log()) or 'none'}"
            )
        time.sleep(POLL_SECONDS)


# --- addresses -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where an OpenAI-compatible API is found."""

    tls: bool
    host: str
    port: int
    prefix: str
    """The path before `/completions`, usually `/v1`."""
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token; in no message."""
    engine: str | None = None
    """The name of the engine that was started there; None for a server that runs already."""

    @classmethod
    def parse(cls, url: str, key: str | None = None) -> Endpoint:
        """`http://localhost:8000` or `http://localhost:8000/v1`."""
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
            # What no name server can be asked for, such as an empty part between two dots.
            (parts.hostname or "").encode("idna")
        except ValueError:
            parts, port = urllib.parse.urlsplit(""), None
        odd = port == 0 or parts.query or parts.fragment or not re.fullmatch("[!-~]*", parts.path)
        if parts.scheme not in ("http", "https") or not parts.hostname or odd:
            shown = url if parts.password is None else "the address given"
            raise Refused(f"--url {cut(shown, 100)}: expected an address such as http://localhost:8000/v1")
        if parts.username or parts.password:
            raise Refused("--url: expected no user name or password in it; put a key into TUNE_SERVER_KEY")
        tls = parts.scheme == "https"
        return cls(
            tls=tls,
            host=parts.hostname,
            port=(443 if tls else 80) if port is None else port,
            prefix=parts.path.rstrip("/") or "/v1",
            key=key,
        )

    @property
    def root(self) -> str:
        """The path that `/health` is appended to."""
        return self.prefix.removesuffix("/v1")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{self.prefix}"

    def connect(self, timeout_seconds: float) -> http.client.HTTPConnection:
        """A connection, opened with the first request. Proxies are not asked: they would be measured too."""
        kind = http.client.HTTPSConnection if self.tls else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=timeout_seconds)

    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {"Connection": "close"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})

    def wants_key(self, told: str) -> Refused:
        """That the server did not take the key that was sent, or that there was none."""
        if self.engine:
            way_on = "tune sends none to an engine that it starts: leave out --api-key and unset its variable"
        elif self.key:
            way_on = "it does not take the key that was sent; put its own into TUNE_SERVER_KEY"
        else:
            way_on = "put its key into TUNE_SERVER_KEY"
        return Final(f"{told}; {way_on}")

    def listens(self) -> bool:
        """Whether somebody still takes connections there."""
        try:
            with socket.create_connection((self.host, self.port), timeout=1.0):
                return True
        except ConnectionRefusedError:
            return False
        except OSError:
            return True

    def get(self, path: str, *, timeout_seconds: float = 30.0, below: str | None = None) -> tuple[int, bytes]:
        """Status and first megabyte of `path`, which stands below `root` unless said otherwise."""
        connection = self.connect(timeout_seconds)
        try:
            connection.request("GET", (self.root if below is None else below) + path, headers=self.headers())
            with connection.getresponse() as response:
                return response.status, response.read(1 << 20)
        finally:
            connection.close()

    def ask(
        self, path: str, body: Mapping[str, object] | None = None, *, timeout_seconds: float = 300.0
    ) -> dict[str, Any]:
        """The answer to a request that is no part of the load, as a JSON object.

        Args:
            path: below the host, `/v1/completions` or `/tokenize`.
            body: of a POST; without one it is a GET.
            timeout_seconds: without a byte from the server.

        Raises:
            RuntimeError: nobody answers, the request is refused, or the answer is no JSON object.
        """
        connection = self.connect(timeout_seconds)
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        headers = {"Content-Type": "application/json", **self.headers()}
        try:
            connection.request(method, path, data, headers)
            with connection.getresponse() as response:
                status, said = response.status, response.read(MOST_ANSWER_BYTES)
        except TimeoutError as error:
            raise RuntimeError(f"{method} {path} was accepted and brought nothing for {timeout_seconds:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise RuntimeError(f"{method} {path} brought no answer: {_said(error)}") from error
        finally:
            connection.close()
        if status != http.HTTPStatus.OK:
            raise RuntimeError(f"{method} {path} brought HTTP {status}: {_message(said)}")
        if not isinstance(answer := _json(said), dict):
            raise RuntimeError(f"{method} {path} brought no JSON object: {cut(said.decode(errors='replace'), 80)}")
        return answer


MOST_ANSWER_BYTES = 1 << 28
"""Of an answer that is not streamed: whoever sends more does not send what was asked for."""


def concurrency(target: Target, beyond: str, default: int | None = None) -> list[Parameter]:
    """The client's own parameter; none where requests leave at a given rate.

    Args:
        target: the load.
        beyond: what becomes of requests beyond the engine's own limit, as the end of a meaning.
        default: how many are in flight where nothing else is said: all, if it is None.
    """
    if target.request_rate is not None:
        return []
    return [
        Int(
            name="concurrency",
            meaning=f"requests that the client keeps in flight: {beyond}",
            default=target.prompts if default is None else min(default, target.prompts),
            low=1,
            high=target.prompts,
            log=True,
            scope="request",
        )
    ]


def models(endpoint: Endpoint) -> tuple[str, ...]:
    """The names that `GET /v1/models` lists.

    Raises:
        RuntimeError: nobody answers there, or not as an OpenAI-compatible server does.
        Refused: it wants a key.
    """
    try:
        status, body = endpoint.get("/models", below=endpoint.prefix)
    except TimeoutError as error:
        raise RuntimeError(f"{endpoint} hangs: GET /models brought nothing for 30 s") from error
    except (OSError, http.client.HTTPException) as error:
        reset = isinstance(error, ConnectionResetError) and not endpoint.tls
        hint = "; if it speaks TLS, its address begins with https" if reset else ""
        verb = "reached" if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else "used"
        raise RuntimeError(f"{endpoint} cannot be {verb}: {_said(error)}{hint}") from error
    if status in _WANTS_KEY:
        raise endpoint.wants_key(f"GET {endpoint}/models brought HTTP {status}: {_message(body)}")
    if status != http.HTTPStatus.OK:
        raise RuntimeError(f"GET {endpoint}/models brought HTTP {status}: {_message(body)}")
    try:
        names = tuple(str(entry["id"]) for entry in _json(body)["data"])
    except (ValueError, TypeError, LookupError) as error:
        shown = cut(body.decode(errors="replace"), 80)
        raise RuntimeError(f"{endpoint} is not an OpenAI-compatible server: GET /models brought {shown}") from error
    return names


# --- the load --------------------------------------------------------------------------------

ANY_TOKENS = range(500, 1000)
"""Ids that are ordinary pieces in every vocabulary seen: above the specials and bytes, below the smallest's end."""

WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "hand", "part", "place", "case", "week", "work", "number", "night", "point", "home", "water", "room"),
    *(
        "mother",
        "area",
        "money",
        "story",
        "fact",
        "month",
        "lot",
        "right",
        "study",
        "book",
        "eye",
        "job",
        "word",
        "side",
    ),
)
"""Of text prompts: short and common, so that most tokenizers have a token for each."""


def patience_seconds() -> float:
    """How long a server may be silent in the middle of a request before it is said to hang.

    Less where half of a trial's time is: a trial is some passes, and ends before its cause is known otherwise.
    """
    return min(300.0, float(os.environ.get(TRIAL_SECONDS, "inf")) / 2)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the server in every pass."""

    model: str
    prompts: int
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    request_rate: float | None = None
    """Requests a second in an open loop; None for a closed one."""
    seed: int = 0
    salt: str = ""
    """Part of the seed, for a server that outlives the trial and would find the last one's prompts in its cache."""
    token_ids: range | None = ANY_TOKENS
    """Prompts are lists of these ids; None where the server takes only text."""
    words: int | None = None
    """Words of a text prompt; None for one per token."""
    template_tokens: int | None = None
    """What the server puts around a text prompt, the same every time; None where that is not known."""
    chat: bool = False
    """`/chat/completions`, for servers without `/completions`; its prompts are text."""
    fields: Mapping[str, object] = field(default_factory=dict)
    """Further fields of every request."""
    ignore_eos: bool = True
    timeout_seconds: float = field(default_factory=patience_seconds)
    """Without a piece of an answer from the server."""

    @classmethod
    def of(cls, target: Target, model: str, **others: Any) -> Load:
        """The load that a target asks for."""
        return cls(
            model=model,
            prompts=target.prompts,
            prompt_tokens=target.prompt_tokens,
            output_tokens=target.output_tokens,
            request_rate=target.request_rate,
            seed=target.seed,
            **others,
        )

    @property
    def exact_prompts(self) -> bool:
        """Whether the number of prompt tokens is known beforehand."""
        return self.token_ids is not None and not self.chat

    def draw(self, number: int, request: int | str) -> random.Random:
        """Random numbers of one request of one pass."""
        return random.Random(f"{self.seed}/{self.salt}/{number}/{request}")  # noqa: S311 - a load, no secret

    def body(self, number: int, request: int) -> bytes:
        """The JSON text of one request. The prompt is written without a JSON encoder: long ones take it a while."""
        draw = self.draw(number, request)
        if self.exact_prompts:
            assert self.token_ids is not None
            names, span = _names(self.token_ids), len(self.token_ids)
            ids = array.array("I", draw.randbytes(4 * self.prompt_tokens))
            prompt = f"[{','.join([names[i % span] for i in ids])}]"
        else:
            prompt = json.dumps(" ".join(draw.choices(WORDS, k=self.words or self.prompt_tokens)))
        what = f'"messages":[{{"role":"user","content":{prompt}}}]' if self.chat else f'"prompt":{prompt}'
        return f"{self._opening}{what}}}".encode()

    @functools.cached_property
    def _opening(self) -> str:
        asked: dict[str, object] = {
            "model": self.model,
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            asked["ignore_eos"] = True
        return f"{json.dumps(asked | dict(self.fields))[:-1]}, "

    def offsets(self, number: int) -> list[float]:
        """When each request of a pass leaves, in seconds from its start; all zeros in a closed loop.

        Gaps are exponential: a Poisson process, the usual model of many users who know nothing of each other.
        """
        if self.request_rate is None:
            return [0.0] * self.prompts
        draw = self.draw(number, "gaps")
        return list(
            itertools.accumulate((draw.expovariate(self.request_rate) for _ in range(self.prompts - 1)), initial=0.0)
        )


@functools.lru_cache(maxsize=4)
def _names(ids: range) -> tuple[str, ...]:
    return tuple(map(str, ids))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One streamed answer. Seconds count from the moment at which the request was to leave."""

    seconds: float
    output_tokens: int
    prompt_tokens: int
    arrivals: Sequence[float]
    """When each piece of text came."""
    prefill_seconds: float | None
    decode_seconds: float | None
    """Where the server says how long it took for each (llama.cpp)."""

    @property
    def gaps(self) -> list[float]:
        """Between tokens. Those that came in one piece have none between them, so that the mean is true."""
        between = [later - earlier for earlier, later in itertools.pairwise(self.arrivals)]
        return between + [0.0] * (self.output_tokens - len(self.arrivals))


class RequestFailed(EngineError):
    """One request brought no answer; the next one may.

    `status` is that of an answer in HTTP which was no success; None where the server did not answer to the end.
    """

    def __init__(self, sentence: str, status: int | None = None) -> None:
        super().__init__(sentence)
        self.status = status


class RequestRefused(EngineError):
    """The server does not take requests of this form; another one it may."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class Final(Refused):
    """A refusal that no other form of request mends: a key is missing, or answers do not end."""


class Client:
    """Sends the load to a server, pass after pass. A server with another API overrides `path`, `streams` and `read`."""

    streams = "text/event-stream"
    """Content type of an answer that is streamed."""
    api = "an OpenAI-compatible server"
    heeds = "max_tokens or ignore_eos"
    """What the number of tokens of an answer hangs on."""

    def __init__(self, endpoint: Endpoint, load: Load, server: Server | None = None) -> None:
        self.endpoint = endpoint
        self.load = load
        self._server = server
        self._name = server.name if server else str(endpoint)
        self._pass = 0
        self._lines: set[socket.socket] = set()
        self._left = False

    def run_pass(self) -> Work:
        """Send every request of the next pass and wait for the last answer.

        Raises:
            RuntimeError: the engine ended, answered no request, or did other work than was asked for.
            Refused: no request of this load would do; the sentence says what a person can do.
        """
        load, number = self.load, self._pass
        # Counted before the pass: also what a failed one sent must not be sent again.
        self._pass += 1
        offsets = load.offsets(number)
        outcomes: list[Answer | RequestFailed | None] = [None] * load.prompts
        broken: list[BaseException] = []
        todo = iter(range(load.prompts))
        lock = threading.Lock()
        start = time.perf_counter()

        def take(own: Iterator[int]) -> None:
            while not broken:
                with lock:
                    request = next(own, None)
                if request is None:
                    return
                try:
                    outcomes[request] = self._send(load.body(number, request), start + offsets[request])
                except RequestFailed as error:
                    outcomes[request] = error
                except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
                    broken.append(error)

        if load.request_rate is None:
            hands = [threading.Thread(target=take, args=(todo,)) for _ in range(min(load.concurrency, load.prompts))]
        else:
            hands = [threading.Thread(target=take, args=(iter((request,)),)) for request in range(load.prompts)]
        try:
            for hand in hands:
                hand.start()
            for hand in hands:
                hand.join()
        except BaseException as leaving:
            # vLLM does not end before its connections do.
            broken.append(leaving)
            self._hang_up()
            raise
        if broken:
            raise broken[0]
        return self._work([o for o in outcomes if o is not None], time.perf_counter() - start)

    def _hang_up(self) -> None:
        """Break every connection off, also those that other threads wait at or are about to have."""
        self._left = True
        for line in tuple(self._lines):
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def try_once(self) -> None:
        """Send one request of a pass of its own, to learn whether the server takes this form of it."""
        load = replace(self.load, salt=f"{self.load.salt}/try")
        self._send(load.body(0, 0), time.perf_counter(), load)

    def fit_words(self) -> None:
        """Choose the words of a text prompt so that it has about as many tokens as asked for.

        Tokenizers differ, and a chat template adds its own tokens: two requests of one output token tell how
        many tokens a word takes. The same server gives the same number every time.

        Raises:
            Refused: a chat's template alone has as many.
        """
        wanted = self.load.prompt_tokens
        few, many = max(1, wanted // 2), max(2, wanted)
        counts = [self._prompt_tokens_of(words) for words in (few, many)]
        per_word = (counts[1] - counts[0]) / (many - few)
        extra = counts[0] - per_word * few
        if per_word <= 0:
            self.load = replace(self.load, words=many)
            return
        if self.load.chat and extra >= wanted:
            raise Final(
                f"--prompt-tokens {wanted}: the chat template of {self._name} takes {extra:.0f} by itself; ask for more"
            )
        words = max(1, round((wanted - extra) / per_word))
        self.load = replace(self.load, words=words, template_tokens=max(0, round(extra)))

    def _prompt_tokens_of(self, words: int) -> int:
        load = replace(self.load, words=words, output_tokens=1, salt=f"{self.load.salt}/words")
        return self._send(load.body(0, words), time.perf_counter(), load).prompt_tokens

    def _work(self, outcomes: Sequence[Answer | RequestFailed], seconds: float) -> Work:
        answers = [o for o in outcomes if isinstance(o, Answer)]
        failures = [o for o in outcomes if isinstance(o, RequestFailed)]
        if failures:
            self._tell(failures, bool(answers))
        prefill = [a.prefill_seconds for a in answers if a.prefill_seconds is not None]
        decode = [a.decode_seconds for a in answers if a.decode_seconds is not None]
        return Work(
            units=sum(a.output_tokens for a in answers),
            prompt_tokens=sum(a.prompt_tokens for a in answers),
            prefill_seconds=sum(prefill) if len(prefill) == len(answers) else None,
            decode_seconds=sum(decode) if len(decode) == len(answers) else None,
            # A failed request lasted, at most, as long as the pass; the window does not count anyway.
            request_seconds=(*(a.seconds for a in answers), *(seconds for _ in failures)),
            ttft_seconds=tuple(a.arrivals[0] for a in answers if a.arrivals),
            itl_seconds=tuple(gap for a in answers for gap in a.gaps),
            failed_requests=len(failures),
            failure=str(failures[0]) if failures else None,
        )

    def _tell(self, failures: Sequence[RequestFailed], others_answered: bool) -> None:
        """Say in the log why requests failed; raise where the engine ended or answered none."""
        server, first = self._server, str(failures[0])
        if server is not None:
            if server.end(LATE_SECONDS) is not None:
                raise server.ended("in the middle of a pass")
            if not others_answered and (lack := server.lack_of_memory()):
                raise RuntimeError(f"out of memory: {lack}")
        elif any(f.status is None for f in failures) and not self._stays():
            ended = "the server has ended in the middle of a pass, nothing listens there any more"
            never = not others_answered and all(isinstance(f.__cause__, ConnectionRefusedError) for f in failures)
            told = first if never else f"{self.endpoint}: {ended}"
            raise Refused(f"{told}; its own log says why; start it again")
        if not others_answered:
            raise RuntimeError(first)
        for told in dict.fromkeys(map(str, failures)):
            sys.stderr.write(f"{told}\n")

    def _stays(self) -> bool:
        """Whether a server that is not this process's own still listens a moment after a connection broke."""
        give_up = time.monotonic() + LATE_SECONDS / 4
        while time.monotonic() < give_up:
            if not self.endpoint.listens():
                return False
            time.sleep(POLL_SECONDS)
        return True

    # --- one request

    def _send(self, body: bytes, at: float, load: Load | None = None) -> Answer:
        """Wait until `at`, send, and read the answer as it comes."""
        load = load or self.load
        if (early := at - time.perf_counter()) > 0:
            time.sleep(early)
        else:
            # Open loop: a request that leaves late has waited since it should have left.
            at = at if load.request_rate is not None else time.perf_counter()
        connection = self.endpoint.connect(load.timeout_seconds)
        path, name, reached = self.path(load), self._name, "took no connection"
        line: socket.socket | None = None
        try:
            connection.connect()
            self._lines.add(line := connection.sock)
            if self._left:
                raise RequestFailed(f"{name}: the pass was left")
            reached = "accepted the request and sent nothing"
            connection.request("POST", path, body, {"Content-Type": "application/json", **self.endpoint.headers()})
            # The connection gives its socket away to the response, which has to be closed as well.
            with connection.getresponse() as response:
                if response.status != http.HTTPStatus.OK:
                    raise self._refusal(response.status, response.read(1 << 16), load)
                reached = "began an answer and sent no more of it"
                kind = response.headers.get_content_type()
                if kind != self.streams:
                    raise Refused(
                        f"{name} is not {self.api} that streams: POST {path} brought {kind}: "
                        f"{cut(response.read(4096).decode(errors='replace'), 80)}; name the engine itself, not what "
                        "stands before it and gathers its answers"
                    )
                return self.read(response, at, load)
        except TimeoutError as error:
            raise RequestFailed(f"{name} hangs: it {reached} for {load.timeout_seconds:g} s") from error
        except ConnectionRefusedError as error:
            raise RequestFailed(f"{name}: connection refused; nothing listens at {self.endpoint}") from error
        except http.client.IncompleteRead as error:
            raise RequestFailed(f"{name}: the stream was cut off before its end") from error
        except (http.client.HTTPException, OSError) as error:
            raise RequestFailed(f"{name} broke off: {_said(error)}") from error
        finally:
            self._lines.discard(line)
            connection.close()

    def path(self, load: Load) -> str:
        """Where requests are sent."""
        return f"{self.endpoint.prefix}/{'chat/' if load.chat else ''}completions"

    def read(self, response: http.client.HTTPResponse, at: float, load: Load) -> Answer:
        """Server-sent events up to `[DONE]`."""
        arrivals: list[float] = []
        usage: Mapping[str, Any] | None = None
        timings: Mapping[str, Any] = {}
        done, pieces = False, itertools.count(1)
        for now, line in streamed(response, at, load.timeout_seconds):
            if not line.startswith(b"data:"):
                continue
            event = line[5:].strip()
            if event == b"[DONE]":
                done = True
                break
            piece = self.piece(event, next(pieces), load)
            if self._carries_text(piece, load.chat):
                arrivals.append(now)
            usage = piece.get("usage") or usage
            timings = piece.get("timings") or timings
        seconds = time.perf_counter() - at
        if not done:
            raise RequestFailed(f"{self._name}: the stream was cut off before [DONE]")
        if usage is None:
            raise Refused(
                f"{self._name} streams no usage block, so its tokens cannot be counted; expected it to know "
                '"stream_options": {"include_usage": true}: take a newer version of it, or one that does'
            )
        return self.answer(usage, timings, arrivals, seconds, load)

    def piece(self, event: bytes, number: int, load: Load) -> dict[str, Any]:
        """Piece `number` of a streamed answer, from 1. Raises where it is none, is an error, or one too many."""
        piece = _json(event)
        if not isinstance(piece, dict):
            raise self._foreign(event)
        if piece.get("error"):
            raise RequestFailed(f"{self._name} broke off with an error: {_message(event)}")
        # Some pieces bring no token, but never so many.
        if number > 2 * load.output_tokens + SPARE_PIECES:
            raise Final(
                f"{self._name} does not end an answer: {number} pieces came for a request of {load.output_tokens} "
                f"tokens, so it does not heed {self.heeds.partition(' ')[0]}; tune another engine"
            )
        return piece

    def _foreign(self, event: bytes) -> RuntimeError:
        return RuntimeError(f"{self._name} is not {self.api}: it streamed {cut(event.decode(errors='replace'), 80)}")

    def _carries_text(self, piece: Mapping[str, Any], chat: bool) -> bool:
        """Whether a piece brings tokens: not a role, not a mere end, not the usage block."""
        choices = piece.get("choices")
        if not choices:
            return False
        first = choices[0] if isinstance(choices, list) else None
        delta = (first.get("delta") or {}) if chat and isinstance(first, dict) else first
        if not isinstance(first, dict) or not isinstance(delta, dict):
            raise self._foreign(json.dumps(piece).encode())
        if chat:
            return any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls"))
        # A token may have no text of its own: half a character, or a special one.
        return bool(first.get("text")) or first.get("finish_reason") is None

    def answer(
        self,
        usage: Mapping[str, Any],
        timings: Mapping[str, Any],
        arrivals: Sequence[float],
        seconds: float,
        load: Load,
    ) -> Answer:
        """The answer, where it is the work that was asked for; counts as OpenAI names them, times as llama.cpp does."""
        try:
            output, prompt = int(usage["completion_tokens"]), int(usage["prompt_tokens"])
            cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            prefill, decode = (
                _seconds(timings[key]) if key in timings else None for key in ("prompt_ms", "predicted_ms")
            )
            if output < 0 or prompt < 0 or cached < 0:
                raise ValueError("a count below 0")
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RuntimeError(
                f"{self._name} streams counts that cannot be read: {cut(json.dumps([usage, timings]), 120)}"
            ) from error
        if output != load.output_tokens:
            raise Refused(
                f"{self._name} generated {output} tokens for a request instead of {load.output_tokens}; "
                f"it does not heed {self.heeds}; ask for fewer --output-tokens, or tune another engine"
            )
        if load.exact_prompts and prompt != load.prompt_tokens:
            raise RuntimeError(f"{self._name} counted {prompt} prompt tokens instead of {load.prompt_tokens}")
        # A template is the same in every prompt, and a few words may be so by chance. More was asked for before.
        template = 0 if load.exact_prompts else load.template_tokens
        if template is not None and cached - template > max((prompt - template) // 2, 1) and prompt > 1:
            raise Refused(
                f"{self._name} took {cached} of {prompt} prompt tokens from a cache, though no prompt is sent twice; "
                "start it without one (vLLM: --no-enable-prefix-caching, SGLang: --disable-radix-cache)"
            )
        return Answer(
            seconds=seconds,
            output_tokens=output,
            prompt_tokens=prompt,
            arrivals=arrivals,
            prefill_seconds=prefill,
            decode_seconds=decode,
        )

    def _refusal(self, status: int, body: bytes, load: Load) -> RuntimeError | Refused:
        message = _message(body).rstrip(".")
        told = f"{self._name} answered HTTP {status}: {message}"
        if status == http.HTTPStatus.NOT_FOUND:
            with contextlib.suppress(RuntimeError):
                offered = models(self.endpoint)
                if load.model not in offered:
                    return Refused(f"{told}; the models that it offers are {cut(', '.join(offered) or 'none', 200)}")
        if status in _WANTS_KEY:
            return self.endpoint.wants_key(told)
        # Too many requests, or a failure of the server's own: the next one may be answered.
        if status == http.HTTPStatus.TOO_MANY_REQUESTS or status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            return RequestFailed(told, status)
        if _TOO_LONG.search(message):
            return Refused(f"{told}; ask for less with --prompt-tokens (it is {load.prompt_tokens}) or --output-tokens")
        return RequestRefused(told, status)


_WANTS_KEY = (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)

_TOO_LONG = re.compile(r"(?i)\bcontext\b|\btoo long\b|\bmaximum .{0,40}(?:length|tokens)")
"""How servers say that a prompt with its answer does not fit."""

SPARE_PIECES = 256
"""Of an answer, beside those that bring tokens."""

MOST_LINE_BYTES = 1 << 20


class ServedEngine:
    """An engine behind a client: of what a person may tune, only the requests in flight change while it runs."""

    def __init__(self, client: Client, said: Mapping[str, Value]) -> None:
        """`said`: the parameters as the engine names them after it has started."""
        self._client = client
        self._said = said

    @property
    def effective(self) -> Mapping[str, Value]:
        """The parameters as the engine named them; `concurrency` is the client's."""
        return {"concurrency": self._client.load.concurrency, **self._said}

    def change(self, config: Config) -> None:
        """Go on with another `concurrency`, the only parameter that is the client's."""
        load = self._client.load
        self._client.load = replace(load, concurrency=int(config.get("concurrency", load.prompts)))

    def run_pass(self) -> Work:
        """Send the whole load once and wait for the last answer.

        Raises:
            RuntimeError: the engine ended, refused requests, or did other work than was asked for.
        """
        return self._client.run_pass()


class JudgedServer(ServedEngine, abc.ABC):
    """One whose output is held against the default's (docs/design/limits.md).

    What all servers share stands here: which tokens are judged, what is kept of them, and how an engine's end is told.
    How the engine brings about their likelihood is said by its runner, in `_go_on` and `_nats`.
    """

    def __init__(self, client: Client, said: Mapping[str, Value], server: Server, target: Target, most: int) -> None:
        """`most`: tokens that a row of the passage may have."""
        super().__init__(client, said)
        self._server, self._target, self._most = server, target, most

    def quality(self, reference: Path) -> Mapping[str, float]:
        """Mean negative log-likelihood of fixed tokens, and how far it is above the default's.

        Raises:
            RuntimeError: the engine ended or refused, `reference` is damaged, or the likelihood is no number.
        """
        try:
            return judge(reference, self._passage, self._nats)
        except RuntimeError as error:
            if self._server.end(LATE_SECONDS) is not None:
                raise self._server.ended("while its output was judged") from error
            raise

    def _passage(self) -> Passage:
        text = of_text(self._text_ids(), self._most)
        return text or drawn(self._ordinary(), self._target.seed, self._go_on, self._most)

    def _text_ids(self) -> list[int]:
        """The fixed text in the model's own tokens; empty where the engine has no tokenizer. vLLM's form of it."""
        body = {"model": self._client.load.model, "prompt": TEXT, "add_special_tokens": False}
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            ids = self._client.endpoint.ask(f"{self._client.endpoint.root}/tokenize", body).get("tokens")
            if isinstance(ids, list):
                return [int(i) for i in ids]
        return []

    def _ordinary(self) -> Sequence[int]:
        """Tokens that openings are drawn from."""
        return self._client.load.token_ids or ()

    @abc.abstractmethod
    def _go_on(self, openings: list[list[int]], count: int) -> Sequence[Sequence[int]]:
        """What the engine says after each opening: so many tokens, at temperature 1 from the whole vocabulary."""

    @abc.abstractmethod
    def _nats(self, passage: Passage) -> Sequence[float]:
        """Of each judged token, in the configuration that runs."""


def streamed(
    response: http.client.HTTPResponse, at: float, patience_seconds: float = math.inf
) -> Iterator[tuple[float, bytes]]:
    """Each line of an answer, with the seconds from `at` to the moment that it came.

    Raises:
        TimeoutError: for so long came nothing but comments, blank lines and parts of lines.
        OSError: a line does not end.
    """
    rest, heard = b"", time.perf_counter()
    while data := response.read1(1 << 16):
        now = time.perf_counter()
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > MOST_LINE_BYTES:
            raise OSError(f"a line of more than {MOST_LINE_BYTES >> 20} MiB")
        for line in lines:
            if line.strip() and not line.startswith(b":"):
                heard = now
            yield now - at, line
        if now - heard > patience_seconds:
            raise TimeoutError


def _message(body: bytes) -> str:
    """The message of an error as servers word it, cut."""
    text = body.decode(errors="replace")
    found = _json(body)
    if found is not None:
        for key in ("error", "detail", "message"):
            if isinstance(found, dict) and found.get(key):
                found = found[key]
        text = found if isinstance(found, str) else json.dumps(found)
    return cut(text) or "no message"


def _json(text: bytes) -> Any:
    """What a text says; None where it is no JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _seconds(milliseconds: Any) -> float:
    if not math.isfinite(seconds := float(milliseconds) / 1e3) or seconds < 0:
        raise ValueError("no time")
    return seconds


def _said(error: Exception) -> str:
    """What went wrong on the way to a server and back."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message}); SSL_CERT_FILE names a file of those that are"
    # Its number is OpenSSL's and no errno.
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "no reason given").replace("_", " ").lower()
        return f"it does not speak TLS as expected ({reason}); if it has none, its address begins with http"
    if isinstance(error, socket.gaierror):
        return f"its host is unknown ({error.strerror})"
    if isinstance(error, ConnectionError | TimeoutError) and error.errno is None:
        return cut(str(error)) or type(error).__name__
    if isinstance(error, http.client.BadStatusLine | http.client.UnknownProtocol | http.client.LineTooLong):
        line = str(error)
        told = "TLS; its address begins with https" if line.startswith(_TLS_ALERT) else cut(line, 80)
        return f"it does not speak HTTP, it answered {told}"
    if isinstance(error, OSError) and error.errno:
        return errno_text(error.errno)
    return cut(str(error)) or type(error).__name__


_TLS_ALERT = "\x15\x03"
"""How a TLS server's answer to anything else begins (RFC 8446, section 5.1)."""


def errno_text(number: int) -> str:
    """`Connection refused`."""
    return os.strerror(number) if number in errno.errorcode else f"error {number}"
