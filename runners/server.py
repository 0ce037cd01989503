"""A server that runs already: any OpenAI-compatible endpoint, tuned through what a client decides.

The server is neither started nor stopped. What can be tuned is the load that reaches it: how many requests are in
flight at a time and, where lossy parameters are allowed, how long an answer may be. Both change without a restart.

The energy that is read is this machine's, so the server has to be on it. An address elsewhere is refused, unless
TUNE_REMOTE_SERVER=1 says that a wall meter stands there. CPU time is that of the process that listens on the port, with
everything below it.

How the server takes prompts is found out by asking: as token ids, as text, or as a chat. Prompts are drawn anew for
each launch, because the server outlives it and would find those of the last one in its cache.

Glossary
    in flight   a request that was sent and is not answered yet
"""

from __future__ import annotations

import importlib
import ipaddress
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from tuner.serving import Client, Endpoint, Final, Load, RequestFailed, RequestRefused, concurrency, cut, models
from tuner.space import Choice, Config, Refused, SearchSpace, Value, closest
from tuner.trial import Service, Target, Work, python_forms, refuse_empty_load, refuse_unused

USUAL_CONCURRENCY = 8
"""Requests in flight in the default configuration."""

FORWARDERS = frozenset({"docker-proxy", "rootlessport", "slirp4netns", "pasta", "ssh", "sshd", "socat", "haproxy"})
"""Programs that listen for somebody else: their CPU time is not the engine's."""


# --- which server ----------------------------------------------------------------------------


def _endpoint(target: Target) -> Endpoint:
    """Where the server is, with a key where one is meant for it."""
    if target.url is None:
        raise Refused("the server workload tunes a server that runs already: name it, --url http://localhost:8000/v1")
    endpoint = Endpoint.parse(target.url)
    here = _is_here(endpoint.host)
    if not here and os.environ.get("TUNE_REMOTE_SERVER") != "1":
        raise Refused(
            f"--url {endpoint}: expected a server on this machine, because only this machine's energy can be read; run "
            "tune there, or set TUNE_REMOTE_SERVER=1 if a wall meter (--meter wall) measures that machine"
        )
    # OPENAI_API_KEY is a provider's: a server on this machine has no business with it.
    name = "TUNE_SERVER_KEY" if here or os.environ.get("TUNE_SERVER_KEY") else "OPENAI_API_KEY"
    key = os.environ.get(name) or None
    if key and not (key.isascii() and key.isprintable()):
        raise Refused(f"{name}: expected a key of printable ASCII characters on one line; set it anew")
    return replace(endpoint, key=key)


def _is_here(host: str) -> bool:
    """Whether an address belongs to this machine: only then can a socket be bound to it."""
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Refused(f"--url: the host {cut(host, 80)} is unknown ({error.strerror}); check its name") from error
    for family, kind, protocol, _, address in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind((address[0], 0))
            return True
    return False


def _model(endpoint: Endpoint, target: Target) -> str:
    """The model to ask for: the one that was named, or the only one that is offered."""
    try:
        offered = models(endpoint)
    except RuntimeError as error:
        raise Refused(f"--url: {error}; start the server, or check the address with: curl {endpoint}/models") from error
    if target.model is None:
        if len(offered) != 1:
            listed = cut(", ".join(offered) or "none", 200)
            raise Refused(f"--url {endpoint}: expected one model, it offers {listed}; choose one with --model")
        return offered[0]
    if target.model not in offered:
        raise Refused(
            f"--model {cut(target.model, 80)}: the server has no such model{closest(target.model, offered)} "
            f"(it offers {cut(', '.join(offered) or 'none', 200)})"
        )
    return target.model


VERSIONS = (
    ("llama.cpp", "/props", "build_info"),
    ("sglang", "/get_server_info", "version"),
    ("ollama", "/api/version", "version"),
    ("vllm", "/version", "version"),
)
"""Where an engine says its version: its name, the path, the key. vLLM's path is the commonest, so it comes last."""


def _engine(endpoint: Endpoint) -> tuple[str, str]:
    """The engine behind the endpoint and its version; `OpenAI-compatible` and `not said` where it tells neither."""
    for name, path, key in VERSIONS:
        with suppress(Exception):  # whatever a stranger answers here, it only means that it is another engine
            status, body = endpoint.get(path, timeout_seconds=5.0)
            if status == 200 and (version := json.loads(body).get(key)):
                return name, cut(str(version), 80)
    return "OpenAI-compatible", "not said"


@dataclass(frozen=True)
class _Listener:
    """The process that a local server lives in."""

    pid: int
    name: str


def _listener(endpoint: Endpoint) -> _Listener | None:
    """The process that listens on the endpoint's port; None where it is elsewhere, another user's or a forwarder.

    A server may fork processes that listen for it. The process taken is the one that started them, as far up as
    its own process group goes: below it are the engine's workers too.
    """
    psutil: Any = importlib.import_module("psutil")
    if not _is_here(endpoint.host):
        return None
    with suppress(psutil.Error, OSError):
        listening = [
            c.pid
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.laddr.port == endpoint.port and c.pid
        ]
        if listening:
            process = psutil.Process(min(listening))
            own = {p.pid for p in psutil.Process().parents()} | {os.getpid()}
            group = os.getpgid(process.pid)
            while (parent := process.parent()) and os.getpgid(parent.pid) == group and parent.pid not in own:
                process = parent
            return None if process.name() in FORWARDERS else _Listener(process.pid, process.name())
    return None


# --- what may be tuned -----------------------------------------------------------------------


def space(target: Target) -> SearchSpace:
    """What a client decides: requests in flight and, where it is allowed, the length of the answers.

    Nothing in an open loop without lossy parameters: then only the GPU's power limit and clock are left, which are no
    runner's.

    Raises:
        Refused: no address, one that is not this machine's, or nobody answers there.
    """
    refuse_unused(target, "server")
    refuse_empty_load(target)
    endpoint = _endpoint(target)
    _model(endpoint, target)
    parameters = concurrency(
        target,
        "more of them share each step of the engine, up to the number of sequences that it takes; those beyond wait",
        USUAL_CONCURRENCY,
    )
    if target.allow_lossy:
        parameters.append(
            Choice(
                name="max_tokens",
                meaning="tokens generated for each request: shorter answers share the cost of reading the prompt among "
                "fewer tokens, longer ones keep a larger cache, and a cut answer is a worse one",
                default=target.output_tokens,
                values=tuple(sorted({max(1, round(target.output_tokens * part)) for part in (0.25, 0.5, 1, 2)})),
                ordered=True,
                scope="request",
                effect="lossy",
            )
        )
    return SearchSpace(tuple(parameters))


def identity(target: Target) -> dict[str, str]:
    """Engine, version, model and where it runs. Not its process number: a restarted server is the same server."""
    endpoint = _endpoint(target)
    engine, version = _engine(endpoint)
    listener = _listener(endpoint)
    if listener:
        device = f"this machine, process {listener.name}"
    else:
        device = "this machine, process not visible" if _is_here(endpoint.host) else "another machine, by a wall meter"
    return {
        "engine": f"server ({engine})",
        "engine_version": version,
        "model": _model(endpoint, target),
        "url": str(endpoint),
        "device": device,
    }


def lacks(target: Target) -> dict[str, str]:
    """Figures that it never reports, and why."""
    return {
        "quality_loss": "not every server tells the likelihood of given tokens, so the output of one that runs already "
        "is not judged; leave the limit out, or let tune start the engine with --workload llama-server, vllm or sglang"
    }


def describe(target: Target) -> str:
    """One line that says what is being tuned, and whose energy is read."""
    endpoint = _endpoint(target)
    engine, version = _engine(endpoint)
    listener = _listener(endpoint)
    where = f"in process {listener.pid} ({listener.name})" if listener else "in a process that cannot be seen from here"
    if not _is_here(endpoint.host):
        where = "on another machine: its energy is only in a wall meter's reading of that machine"
    return f"server: {engine} {version} at {endpoint}, model {_model(endpoint, target)}, {where}"


# --- running it ------------------------------------------------------------------------------


@contextmanager
def launch(config: Config, target: Target) -> Iterator[RunningServer]:
    """Find out how the server takes prompts, send the load once, yield. Nothing is started, so nothing is stopped.

    Raises:
        Refused: the server is not there, or has no such model.
        RuntimeError: it failed at the work that is asked for.
    """
    endpoint = _endpoint(target)
    load = Load.of(
        target,
        _model(endpoint, target),
        concurrency=1,
        # The server outlives this process and would have the last launch's prompts in its cache.
        salt=str(time.time_ns()),
    )
    listener = _listener(endpoint)
    engine = RunningServer(Client(endpoint, load), (listener.pid,) if listener else (), target.output_tokens)
    engine.learn_to_ask()
    engine.change(config)
    engine.run_pass()
    yield engine


class RunningServer:
    """Somebody else's server, as its client sees it."""

    def __init__(self, client: Client, pids: tuple[int, ...], output_tokens: int) -> None:
        self._client = client
        self._output_tokens = output_tokens
        self.pids = pids
        """The server's process: it is no child of this one, and its CPU time counts."""
        self.effective: Mapping[str, Value] = {}

    @property
    def expected_units(self) -> int:
        """Tokens that a pass asks for."""
        return self._client.load.prompts * self._client.load.output_tokens

    def learn_to_ask(self) -> None:
        """Take the first way of asking that the server answers: prompts of an exact length before others.

        Raises:
            Refused: it takes none, or does not answer to the end; then no other way is tried, each might hang as long.
        """
        usual, faults = self._client.load, list[RuntimeError | Refused]()
        for changes in _WAYS:
            self._client.load = replace(usual, output_tokens=1, **changes)
            try:
                self._client.try_once()
                self._client.load = replace(usual, **changes)
                if not self._client.load.exact_prompts:
                    self._client.fit_words()
                return
            except Final:
                raise
            except RequestFailed as fault:
                if fault.status is None:
                    raise Refused(f"{fault}; its own log may say why; start it again") from fault
                # Some answer HTTP 500 to a form of prompt that they do not know.
                faults.append(fault)
            except (RuntimeError, Refused) as fault:
                faults.append(fault)
        # What came with an answer says more than that another form was not taken.
        told = next((f for f in faults if not isinstance(f, RequestFailed | RequestRefused)), faults[0])
        if isinstance(told, RequestFailed):
            raise Refused(f"{told}; its own log says why") from told
        raise Refused(str(told)) from told

    def change(self, config: Config) -> None:
        """Send the next passes with `config`; the server itself stays as it is."""
        load = replace(
            self._client.load,
            concurrency=int(config.get("concurrency", self._client.load.prompts)),
            output_tokens=int(config.get("max_tokens", self._output_tokens)),
        )
        self._client.load = load
        asked_as = "chat" if load.chat else "text" if load.token_ids is None else "token ids"
        self.effective = {
            "concurrency": load.concurrency,
            "max_tokens": load.output_tokens,
            "prompts_as": asked_as,
        }

    def run_pass(self) -> Work:
        """Send the whole load once.

        Raises:
            RuntimeError: the server refused it, or did other work than was asked for.
        """
        return self._client.run_pass()


_CACHE = {"cache_prompt": False}
"""llama.cpp's server keeps prompts unless told otherwise; others pass over the field, or refuse it."""

_WAYS: tuple[Mapping[str, Any], ...] = (
    {"fields": _CACHE},
    {},
    {"fields": _CACHE, "token_ids": None},
    {"token_ids": None},
    {"token_ids": None, "chat": True},
    {"token_ids": None, "chat": True, "ignore_eos": False},
)


# --- the same without tuner ------------------------------------------------------------------


def command(config: Config, target: Target) -> str:
    """A command that sends the lines of its input as `config` says."""
    return client(config, target, {"model": _model(_endpoint(target), target)}).command()


def client(config: Config, target: Target, said: Mapping[str, Value]) -> Service:
    """What a client has to do, as Python that needs no package: each line of standard input is a prompt.

    The server is not asked: it may have been stopped since.
    """
    assert target.url is not None
    chat = said.get("prompts_as") == "chat"
    url = f"{Endpoint.parse(target.url)}/{'chat/' if chat else ''}completions"
    body = {
        "model": str(target.model or said["model"]),
        "max_tokens": int(config.get("max_tokens", target.output_tokens)),
    }
    prompt = "'messages': [{'role': 'user', 'content': prompt}]" if chat else "'prompt': prompt"
    text = "['message']['content']" if chat else "['text']"
    imports = [
        "import json, os, sys",
        "from concurrent.futures import ThreadPoolExecutor",
        "from urllib.request import ProxyHandler, Request, build_opener",
    ]
    statements = [
        f"url = {url!r}",
        f"body = {body!r}",
        "headers = {'Content-Type': 'application/json'}",
        "key = os.environ.get('TUNE_SERVER_KEY')",
        "headers |= {'Authorization': 'Bearer ' + key} if key else {}",
        f"data = lambda prompt: json.dumps(body | {{{prompt}}}).encode()",
        "send = build_opener(ProxyHandler({})).open",
        f"ask = lambda prompt: json.load(send(Request(url, data(prompt), headers)))['choices'][0]{text}",
        f"in_flight = ThreadPoolExecutor({int(config.get('concurrency', target.prompts))})",
        "[print(answer, flush=True) for answer in in_flight.map(ask, filter(None, map(str.strip, sys.stdin)))]",
    ]
    about = f"Sends each line of standard input as a prompt to {url}."
    line, script = python_forms(about, imports, statements)
    return Service(argv=("python3", "-c", line), python=script)
