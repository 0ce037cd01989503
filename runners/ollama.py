"""Ollama: `ollama serve` as a process of its own, reached over its native API.

The server's settings are variables (`OLLAMA_NUM_PARALLEL`, ...), fixed when it starts; batch, threads and GPU layers
are options of each request, and a change of them loads the model again. The OpenAI-compatible API cannot carry
options, so the load goes through `/api/generate`: raw prompts, a fixed `num_predict`, tokens as the engine counts
them. What the engine runs with is read back from its log, where the llama-server behind it speaks.

The model has to be there (`ollama pull NAME`). What there is, and of which shape, is asked of a server that runs for
that moment only, on a port of its own: the person's own server is left alone.

Ollama cannot ignore an end of sequence. Each prompt therefore ends in the beginning of a count, which models go on
with; a model that stops earlier all the same is an error and never a measurement.

Glossary
    slot    a request that is being generated; `num_parallel` of them share a step, each with a context of its own
"""

from __future__ import annotations

import functools
import http.client
import itertools
import json
import math
import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.installed import Program, gpus_here, memory_bytes
from tuner.models import gguf
from tuner.serving import (
    WORDS,
    Answer,
    Client,
    Endpoint,
    Load,
    RequestFailed,
    ServedEngine,
    Server,
    Symptoms,
    beside,
    concurrency,
    cut,
    first_line,
    start_server,
    started,
    streamed,
)
from tuner.space import Choice, Config, Constraint, Int, Refused, SearchSpace, Value, closest, powers_of_two
from tuner.trial import Service, Target, refuse_empty_load, refuse_long_load, refuse_unused

_llama: Any = beside(__file__, "llama")
"""Its reading of llama.cpp's log, which is in Ollama's."""

GIB = 2**30

# --- the program -----------------------------------------------------------------------------

READY = "/api/version"

PROGRAM = Program(
    name="ollama",
    title="Ollama",
    variable="TUNE_OLLAMA",
    install="install it from the Ollama project and put it on the PATH, or set TUNE_OLLAMA=/path/to/ollama",
    expected="the ollama executable",
    # Of a server that only answers questions; it looks for GPUs first.
    ask_seconds=60.0,
)


@dataclass(frozen=True)
class _Model:
    """What Ollama says about a model, and its own version."""

    version: str
    name: str
    digest: str
    bytes: int
    quantisation: str
    layers: int
    context: int
    """Tokens it was trained on; 0 where that is not said."""
    cache_values_per_token: int
    """Numbers that one token leaves in the cache, over all layers; 0 where that is not said."""


def _model(target: Target) -> _Model:
    refuse_unused(
        target,
        "ollama",
        {"engine_args": "variables such as OLLAMA_SCHED_SPREAD reach Ollama from the environment"},
    )
    program = PROGRAM.path()
    return _asked(program, Path(program).stat().st_mtime_ns, target.model, os.environ.get("OLLAMA_MODELS"))


@functools.lru_cache(maxsize=8)
def _asked(program: str, _changed_ns: int, name: str | None, _folder: str | None) -> _Model:
    """Ask a server that runs for this moment only."""
    with tempfile.TemporaryFile() as log:

        def start(port: int) -> Server:
            return start_server(
                [program, "serve"], name="ollama", env=_environment(port), symptoms=SYMPTOMS, output=log.fileno()
            )

        try:
            server, endpoint = started(start, timeout_seconds=PROGRAM.ask_seconds, path=READY)
            try:
                return _describe(endpoint, name)
            finally:
                server.stop()
        except RuntimeError as error:
            raise Refused(f"{program}: Ollama does not run here ({cut(str(error), 250)}); {PROGRAM.install}") from error


def _describe(endpoint: Endpoint, name: str | None) -> _Model:
    """The model of that name, as this server knows it."""
    offered = {str(m["name"]): m for m in endpoint.ask("/api/tags").get("models") or [] if "name" in m}
    listed = cut(", ".join(offered) or "none", 200)
    if name is None:
        raise Refused(f"the ollama workload tunes a model of Ollama's: name it, --model NAME (there is {listed})")
    found = offered.get(name) or offered.get(f"{name}:latest")
    if found is None:
        hint = f"; the system's service keeps its own in {SYSTEM_MODELS}: set OLLAMA_MODELS to that folder"
        elsewhere = hint if SYSTEM_MODELS.is_dir() and "OLLAMA_MODELS" not in os.environ else ""
        raise Refused(
            f"--model {cut(name, 80)}: Ollama has no such model{closest(name, list(offered))} (there is {listed}); "
            f"get it with: ollama pull {shlex.quote(cut(name, 80))}{elsewhere}"
        )
    shown = endpoint.ask("/api/show", {"model": found["name"]})
    about = shown.get("model_info") or {}
    own = {key.removeprefix(f"{about.get('general.architecture')}."): value for key, value in about.items()}
    return _Model(
        version=cut(str(endpoint.ask(READY).get("version", "not said")), 80),
        name=str(found["name"]),
        digest=str(found.get("digest", "not said")),
        bytes=int(found.get("size") or 0),
        quantisation=cut(str((found.get("details") or {}).get("quantization_level") or "not said"), 40),
        layers=_number(own.get("block_count")),
        context=_number(own.get("context_length")),
        cache_values_per_token=gguf.cache_values_per_token(own),
    )


SYSTEM_MODELS = Path("/usr/share/ollama/.ollama/models")


def _number(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0


def describe(target: Target) -> str:
    """One line that says what is being run."""
    model = _model(target)
    size = f"{model.bytes / 1e9:.1f} GB" if model.bytes >= 1e9 else f"{math.ceil(model.bytes / 1e6)} MB"
    return f"Ollama {model.version}, model: {model.name} ({model.quantisation}, {model.layers} layers, {size})"


# --- what may be tuned -----------------------------------------------------------------------

VARIABLES: Mapping[str, str] = {
    "num_parallel": "OLLAMA_NUM_PARALLEL",
    "flash_attention": "OLLAMA_FLASH_ATTENTION",
    "kv_cache_type": "OLLAMA_KV_CACHE_TYPE",
}
"""The server's settings."""

OPTIONS = ("num_batch", "num_thread", "num_gpu")
"""Options of each request; where one changes, the model is loaded again."""

USUAL: Mapping[str, Value] = {
    "num_parallel": 1,
    "flash_attention": "auto",
    "kv_cache_type": "f16",
    "num_batch": 512,
    "num_thread": "auto",
}
"""Ollama's own (docs/faq.mdx and api/types.go)."""

MOST_SLOTS = 64

MEMORY_SHARE = 0.9
"""Of a GPU's memory, for weights and cache."""


def space(target: Target) -> SearchSpace:
    """Settings of the server and options of the requests, most influential first.

    Raises:
        Refused: Ollama or the model is not there, or the load does not fit it.
    """
    refuse_empty_load(target)
    model, gpus = _model(target), gpus_here()
    refuse_long_load(target, model.context, f"of {model.name}")
    cpus = len(os.sched_getaffinity(0))
    parameters = concurrency(target, "beyond num_parallel they wait in the queue, and with fewer some slots stay empty")
    parameters.append(
        Int(
            name="num_parallel",
            meaning="requests decoded together (OLLAMA_NUM_PARALLEL): each step reads all weights once for all of "
            "them, so more share that cost, until computing becomes the limit; each takes a context of memory",
            default=1,
            low=1,
            high=min(MOST_SLOTS, max(4, target.prompts)),
        )
    )
    if gpus and model.layers:
        whole = model.layers + 1
        share = sum(g.bytes for g in gpus) * MEMORY_SHARE / max(_needed_bytes(model, {}, target), 1.0)
        parameters.append(
            Int(
                name="num_gpu",
                meaning=f"layers computed on {', '.join(g.name for g in gpus)} instead of the CPU; {whole} is all of "
                "them and the output layer",
                default=min(whole, math.floor(share * whole)),
                low=0,
                high=whole,
                effect="numerics",
                lever="offload",
            )
        )
    parameters += [
        Choice(
            name="num_thread",
            meaning="CPU threads that compute: beyond what saturates the memory bus they burn power without speed; "
            "auto takes as many as the engine chooses",
            default="auto",
            values=("auto", *sorted({*powers_of_two(1, cpus), cpus})),
        ),
        Choice(
            name="num_batch",
            meaning="prompt tokens computed at a time: small values read the weights again and again, large ones need "
            "larger buffers",
            default=512,
            effect="numerics",
            values=(32, 64, 128, 256, 512, 1024, 2048),
            ordered=True,
        ),
        Choice(
            name="flash_attention",
            meaning="fused attention that never stores the score matrix (OLLAMA_FLASH_ATTENTION): fewer bytes moved, "
            "more so with long context; auto turns it on where the device supports it",
            default="auto",
            effect="numerics",
            values=("off", "on", "auto"),
        ),
    ]
    if target.allow_lossy:
        parameters.append(
            Choice(
                name="kv_cache_type",
                meaning="precision of the cached keys and values (OLLAMA_KV_CACHE_TYPE): fewer bits are fewer bytes "
                "read at long context, but cost time to convert, and can cost quality",
                default="f16",
                effect="lossy",
                values=tuple(gguf.CACHE_BYTES),
                ordered=True,
            )
        )
    return SearchSpace(tuple(parameters), _constraints({p.name for p in parameters}, target, model, gpus))


def _constraints(names: set[str], target: Target, model: _Model, gpus: Sequence[Any]) -> tuple[Constraint, ...]:
    rules = []
    if "kv_cache_type" in names:
        rules.append(
            Constraint(
                "a quantised kv_cache_type needs flash_attention on",
                lambda c: c["kv_cache_type"] == "f16" or c["flash_attention"] == "on",
            )
        )
    memory, size = memory_bytes(), model.bytes / GIB

    def offloaded(config: Mapping[str, Value]) -> float:
        return int(config.get("num_gpu", 0)) / (model.layers + 1)

    rules.append(
        Constraint(
            f"weights ({size:.2g} GiB) and num_parallel contexts of {_context(target)} tokens fit into the "
            f"{memory / GIB:.0f} GiB of main memory, as far as they are not on a GPU",
            lambda c: (1 - offloaded(c)) * _needed_bytes(model, c, target) <= memory,
        )
    )
    if "num_gpu" in names:
        total = sum(g.bytes for g in gpus)
        rules.append(
            Constraint(
                f"the share of weights ({size:.2g} GiB) and contexts on the GPU fits into {MEMORY_SHARE:.0%} of its "
                f"{total / GIB:.0f} GiB: lower num_gpu or num_parallel",
                lambda c: offloaded(c) * _needed_bytes(model, c, target) <= total * MEMORY_SHARE,
            )
        )
    return tuple(rules)


def lacks(target: Target) -> dict[str, str]:
    """Figures that it never reports, and why."""
    return {
        "quality_loss": "Ollama tells the likelihood of tokens that it generates, not of given ones, so its output "
        "cannot be judged; leave the limit out, or judge the model's GGUF file with --workload llama-server"
    }


def _needed_bytes(model: _Model, config: Mapping[str, Value], target: Target) -> float:
    """Weights, and a context for each slot."""
    tokens = int(config.get("num_parallel", 1)) * _context(target)
    return (
        model.bytes + tokens * model.cache_values_per_token * gguf.CACHE_BYTES[str(config.get("kv_cache_type", "f16"))]
    )


def _context(target: Target) -> int:
    """Tokens of a slot's context: a prompt of words is only about as long as asked for."""
    return math.ceil((1.25 * target.prompt_tokens + target.output_tokens + 64) / 256) * 256


def identity(target: Target) -> dict[str, str]:
    """Engine, version, model and device: what must agree before results may meet."""
    model = _model(target)
    return {
        "engine": "Ollama",
        "engine_version": model.version,
        "model": model.name,
        "model_sha256": model.digest,
        "device": ", ".join(gpu.name for gpu in gpus_here()) or "cpu",
    }


# --- running it ------------------------------------------------------------------------------

SYMPTOMS = Symptoms(
    out_of_memory=(
        r"(model requires more (?:system )?memory [^\"\n]*)",
        r"(llama-server reported out-of-memory during startup[^\"\n]*)",
        r"(cudaMalloc failed: out of memory.*)",
        r"(CUDA error: out of memory.*)",
        r"(failed to allocate .*buffer.*)",
        r"(unable to allocate \S+ buffer.*)",
        r"\bstd::bad_alloc\b.*",
        r"(fatal error: runtime: (?:cannot allocate|out of) memory.*)",
    ),
    telling=(r"^Error: (.+)$", r"(?:llama-server|llama runner) process has terminated: ([^\"\n]+)"),
)

START_SECONDS = 1800.0
"""Loading a large model from a slow disk."""

SAID_SECONDS = 2.0
"""The log's last lines may come a little later than what they tell."""

COUNT = "1 2 3 4 5 6"
"""The end of each prompt: what comes next is clear, and there is no end of it."""


def _environment(port: int, config: Mapping[str, Value] | None = None, target: Target | None = None) -> dict[str, str]:
    """Variables of the server; those of the user that are not named here reach it too."""
    names = {
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        # Nothing is unloaded, deleted, or sent elsewhere while it is measured.
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_MAX_LOADED_MODELS": "1",
        "OLLAMA_MAX_QUEUE": "4096",
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_LOAD_TIMEOUT": "30m",
    }
    if target is not None:
        names["OLLAMA_CONTEXT_LENGTH"] = str(_context(target))
    return names | _variables(config or {})


def _variables(config: Mapping[str, Value]) -> dict[str, str]:
    """The variables behind the server's settings; what is `auto` is empty, which is the same as not set."""
    values = {name: str(config[name]) for name in VARIABLES if name in config}
    return {VARIABLES[name]: {"on": "1", "off": "0", "auto": ""}.get(value, value) for name, value in values.items()}


def _options(config: Mapping[str, Value]) -> dict[str, Value]:
    """The requests' options; `auto` is none."""
    return {name: config[name] for name in OPTIONS if config.get(name, "auto") != "auto"}


@contextmanager
def launch(config: Config, target: Target) -> Iterator[ServedEngine]:
    """Start the server, load the model, send the load once to warm up, yield; stop it afterwards.

    Raises:
        Refused: Ollama or the model is not there.
        RuntimeError: the engine cannot run this configuration, or the warm-up failed; the message says why.
    """
    model = _model(target)

    def start(port: int) -> Server:
        environment = _environment(port, config, target)
        return start_server([PROGRAM.path(), "serve"], name="Ollama", env=environment, symptoms=SYMPTOMS)

    server, endpoint = started(start, timeout_seconds=START_SECONDS, path=READY)
    try:
        load = _Load.of(
            target,
            model.name,
            concurrency=int(config.get("concurrency", target.prompts)),
            token_ids=None,
            options={**_options(config), "num_ctx": _context(target)},
        )
        client = _Client(endpoint, load, server)
        _load_model(client, server)
        client.measure_words()
        engine = ServedEngine(client, _said(server, config))
        engine.run_pass()
        yield engine
    finally:
        server.stop()


def _load_model(client: _Client, server: Server) -> None:
    """A request without a prompt loads the model and generates nothing.

    Raises:
        RuntimeError: it cannot be loaded; the sentence says why.
    """
    load = client.load
    body = {"model": load.model, "keep_alive": -1, "stream": False, "options": load.options}
    try:
        client.endpoint.ask("/api/generate", body, timeout_seconds=START_SECONDS)
    except RuntimeError as error:
        if server.end(1.0) is not None:
            raise server.ended("while loading the model") from error
        if lack := first_line(str(error), SYMPTOMS.out_of_memory) or server.lack_of_memory():
            raise RuntimeError(f"out of memory: {lack}") from error
        step = gguf.next_step(str(error), "install a newer Ollama")
        raise RuntimeError(f"Ollama cannot load {load.model}: {error}{step}") from error


@dataclass(frozen=True, kw_only=True)
class _Load(Load):
    """The load in the words of `/api/generate`."""

    options: Mapping[str, Value] = field(default_factory=dict)

    def body(self, number: int, request: int) -> bytes:
        words = self.draw(number, request).choices(WORDS, k=self.words or self.prompt_tokens)
        options: dict[str, object] = {
            "temperature": 0,
            "seed": self.seed % 2**31,
            # A penalty for what was said before would work against the count.
            "repeat_penalty": 1.0,
            "stop": [],
            **self.options,
            "num_predict": self.output_tokens,
        }
        asked = {"model": self.model, "prompt": f"{' '.join(words)} {COUNT}", "raw": True, "stream": True}
        return json.dumps(asked | {"keep_alive": -1, "options": options}).encode()


class _Client(Client):
    """Speaks Ollama's native API: one JSON object a line, the last one with the counts."""

    load: _Load
    streams = "application/x-ndjson"
    api = "Ollama's native API"
    heeds = "num_predict"

    def measure_words(self) -> None:
        """`fit_words`, after which a server that died meanwhile is told as in a pass."""
        try:
            self.fit_words()
        except RequestFailed as error:
            self._tell([error], others_answered=False)

    def path(self, load: Load) -> str:
        """Where requests are sent."""
        return f"{self.endpoint.root}/api/generate"

    def read(self, response: http.client.HTTPResponse, at: float, load: Load) -> Answer:
        """Lines up to the one that is `done`."""
        arrivals: list[float] = []
        last: Mapping[str, Any] | None = None
        pieces = itertools.count(1)
        for now, line in streamed(response, at, load.timeout_seconds):
            if not line.strip():
                continue
            piece = self.piece(line, next(pieces), load)
            if piece.get("done"):
                last = piece
                break
            arrivals.append(now)
        seconds = time.perf_counter() - at
        if last is None:
            raise RequestFailed("Ollama: the stream was cut off before its last line")
        counts = {"prompt_tokens": last.get("prompt_eval_count"), "completion_tokens": last.get("eval_count")}
        if last.get("done_reason") == "stop" and _number(counts["completion_tokens"]) < load.output_tokens:
            raise Refused(
                f"{load.model} ended an answer after {counts['completion_tokens']} of {load.output_tokens} tokens, and "
                "Ollama cannot ignore an end of sequence; ask for fewer --output-tokens, or tune with a base model"
            )
        nanoseconds = {"prompt_ms": last.get("prompt_eval_duration", 0), "predicted_ms": last.get("eval_duration")}
        times = {name: value / 1e6 if isinstance(value, int) else value for name, value in nanoseconds.items()}
        return self.answer(counts, times, arrivals, seconds, load)


# --- what the engine says --------------------------------------------------------------------

_STARTED = 'msg="starting llama-server"'
_RUNNER = re.compile(
    r"Parallel:(?P<num_parallel>\d+) BatchSize:(?P<num_batch>\d+) FlashAttention:(?P<flash_attention>\w+) "
    r"KvSize:(?P<n_ctx>\d+) KvCacheType:(?P<kv_cache_type>\w*) NumThreads:(?P<num_thread>\d+)"
)
"""The line of versions that computed in a runner of their own (before 0.30)."""

_NAMES: Mapping[str, str] = {
    "parallel": "num_parallel",
    "n_ubatch": "num_batch",
    "threads": "num_thread",
    "gpu_layers": "num_gpu",
    "cache_type_k": "kv_cache_type",
    "flash_attention": "flash_attention",
    "n_ctx": "n_ctx",
}


def _said(server: Server, config: Config) -> dict[str, Value]:
    """What the log says once it is complete, waited for at most a moment."""
    give_up = time.monotonic() + SAID_SECONDS
    while "num_parallel" not in (values := read_back(server.log(), config)) and time.monotonic() < give_up:
        time.sleep(0.01)
    return values


def read_back(log: str, config: Config) -> dict[str, Value]:
    """The parameters of `config` as the newest start of the inference process names them; what is not said is absent.

    `n_ctx` is the context of all slots together.
    """
    said: dict[str, Value] = {}
    if runner := list(_RUNNER.finditer(log)):
        words = runner[-1].groupdict()
        said = {name: int(word) for name, word in words.items() if word.isdigit()}
        flash = {"auto": "auto", "enabled": "on", "disabled": "off"}
        said["flash_attention"] = flash.get(words["flash_attention"].lower(), words["flash_attention"])
        said["kv_cache_type"] = words["kv_cache_type"] or "f16"
    newest = log[max(log.rfind(_STARTED), 0) :]
    said |= {_NAMES[name]: value for name, value in _llama.read_back(newest).items() if name in _NAMES}
    return {name: value for name, value in said.items() if name in config or name == "n_ctx"}


# --- the same without tuner ------------------------------------------------------------------

PORT = 11434
"""Ollama's own default."""


def command(config: Config, target: Target) -> str:
    """The command that serves `config`."""
    return service(config, target).command()


def _tuned(model: str) -> str:
    return f"{model.removesuffix(':latest').replace(':', '-')}-tuned"


def service(config: Config, target: Target) -> Service:
    """How to run `config` for good: the server with its variables, and a Modelfile with what belongs to the model.

    Options are not the server's: where they differ, its command makes a model with them beside the old one, NAME-tuned.
    """
    default, known, program = space(target).default(), _model(target), PROGRAM.path()
    model, changed = known.name, {name: value for name, value in config.items() if value != default.get(name)}
    # Left out, it is what Ollama takes for the memory that is free at that moment.
    if int(config.get("num_gpu", known.layers + 1)) <= known.layers:
        changed["num_gpu"] = config["num_gpu"]
    options = _options(changed)
    # A variable of the shell's own would win over a default, so all are named; of those that are empty, only where
    # the shell has one.
    variables = {name: value for name, value in _variables(config).items() if value or os.environ.get(name)}
    where = {name: os.environ[name] for name in ("OLLAMA_MODELS",) if os.environ.get(name)}
    recipe = [f"FROM {model}", *(f"PARAMETER {name} {value}" for name, value in options.items())]
    head = [f"# ollama create {_tuned(model)} -f Modelfile"]
    head += [f"# the server needs {name}={value} in its environment" for name, value in variables.items()]
    return Service(
        argv=("sh", "-c", _script(program, _tuned(model), recipe)) if options else (program, "serve"),
        env={"OLLAMA_HOST": f"127.0.0.1:{PORT}", **where, **variables},
        port=PORT,
        gpus=bool(gpus_here()),
        modelfile="\n".join([*head, *recipe]),
    )


def _script(program: str, model: str, recipe: Sequence[str]) -> str:
    """Serve, make the model as soon as the server answers, and end with it."""
    ollama = shlex.quote(program)
    return (
        f"{ollama} serve & server=$!; trap 'kill $server' INT TERM; "
        # Where the port is taken, another server would answer, and be given the model.
        f"while sleep 1; do kill -0 $server 2> /dev/null || exit 1; {ollama} list > /dev/null 2>&1 && break; done; "
        f"recipe=$(mktemp); printf '%s\\n' {shlex.join(recipe)} > \"$recipe\"; "
        f'{ollama} create {shlex.quote(model)} -f "$recipe"; rm "$recipe"; wait $server'
    )
