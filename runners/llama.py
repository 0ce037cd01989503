"""llama.cpp: its own server, inside the trial's process, through `xllamacpp`.

One engine, one load: `Target.prompts` requests of random tokens are sent at once, each waits for a
free slot, and slots that are busy at the same time share one decoding step. The engine counts the
tokens; an answer of another length, or one that came out of a prompt cache, is an error and never
a measurement. What the engine runs with is read back from its own log after loading: it clamps
batches to the context, resolves `auto`, and repacks only weights that it can repack.

Without a model file the runner makes one: a Llama of 160 million random weights. It costs what a
trained model of that shape costs and says nothing (docs/design/generated-model.md).

Everything that loads the engine stays out of the tuner's own process: `space` asks it for devices
and defaults in a short-lived child, so that no GPU context is open between trials.

Glossary
    slot      a sequence that the server decodes; requests wait until one is free
    batch     tokens handed to the engine in one call (`n_batch`), computed `n_ubatch` at a time
    repack    rearranging weights at load time for the CPU's matrix instructions
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import re
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.installed import Program, library, memory_bytes
from tuner.models import gguf
from tuner.quality import TEXT, TOKENS, Passage, drawn, judge, of_text
from tuner.serving import Endpoint, cut
from tuner.space import Choice, Config, Constraint, Int, Parameter, Refused, SearchSpace, Value, powers_of_two
from tuner.trial import Service, Target, Work, refuse_empty_load, refuse_long_load, refuse_unused

ENVIRONMENT: Mapping[str, str] = {
    # On a failed assertion ggml would start a debugger on itself.
    "GGML_NO_BACKTRACE": "1",
}

SERVER = Program(
    name="llama-server",
    title="llama-server",
    variable="TUNE_LLAMA_SERVER",
    install="build it or download a release of the llama.cpp project, and put it on the PATH or set "
    "TUNE_LLAMA_SERVER=/path/to/llama-server",
    expected="the llama-server executable",
    environment=ENVIRONMENT,
    # A build with a GPU opens its driver first.
    ask_seconds=120.0,
)
"""The same engine as its project builds it: the command of this workload, the engine of `llama-server`."""


def describe(target: Target) -> str:
    """One line that says what is being run, shown before a study starts."""
    model = gguf.read(target)
    size = f"{model.bytes / 1e9:.1f} GB" if model.bytes >= 1e9 else f"{math.ceil(model.bytes / 1e6)} MB"
    if target.model is not None:
        return f"model: {model.path.name} ({model.architecture}, {model.layers} layers, {size})"
    label = gguf.shape_of(target).label
    return (
        f"model: generated Llama {label} with random weights ({gguf.DEFAULT_WEIGHTS}, {size}): "
        f"speed and energy are those of a real {label} model, its text is meaningless"
    )


# --- the engine, asked from outside ----------------------------------------------------------


def _version() -> str:
    try:
        return importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError as error:
        raise Refused(
            "the llama workload needs the packages xllamacpp and gguf; install them with: pip install xllamacpp gguf"
        ) from error


@dataclass(frozen=True)
class _Build:
    """What the installed engine says about itself on this machine."""

    threads: int
    """The thread count it chooses by itself: physical cores, without the efficiency cores of a hybrid CPU."""
    offload_devices: tuple[str, ...]
    """GPUs that it can move layers to."""


# A server without a model fails, but not before it has logged the threads that it would have used.
_PROBE = """
import json, xllamacpp
print(json.dumps([d["name"] for d in xllamacpp.get_device_info() if "GPU" in d["type"].name]), flush=True)
params = xllamacpp.CommonParams()
params.model.path = "/dev/null"
params.fit_params = params.ui = False
params.verbosity = 4
try:
    xllamacpp.Server(params)
except RuntimeError:
    pass
"""


@functools.cache
def _build() -> _Build:
    """Ask the engine in a child process: there, a GPU context ends with it and a crash is a sentence."""
    if importlib.util.find_spec("xllamacpp") is None:
        _version()
    environment = {**os.environ, **ENVIRONMENT}
    child = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    threads = _LOG["threads"].search(child.stderr)
    if child.returncode != 0 or threads is None:
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        cause = signal.Signals(-child.returncode).name if child.returncode < 0 else last
        # The wheels take OpenMP from the system, and slim containers come without it.
        remedy = "apt-get install libgomp1" if "libgomp" in cause else "pip install --force-reinstall xllamacpp"
        raise Refused(f"xllamacpp does not run on this machine ({cause}); try: {remedy}")
    return _Build(threads=int(threads[1]), offload_devices=tuple(json.loads(child.stdout)))


# --- what may be tuned -----------------------------------------------------------------------

MOST_SLOTS = 256
"""LLAMA_MAX_SEQ: the engine refuses more sequences."""

CONTEXT_STEP = 256
"""The engine rounds the context of a slot up to a multiple of this."""


def space(target: Target) -> SearchSpace:
    """Launch parameters of llama.cpp's server for this machine, model and load, most influential first.

    Left out on purpose: `poll` (the published wheels are built with OpenMP, whose threads ignore it)
    and the number of HTTP threads (the load does not use HTTP).

    Raises:
        Refused: the model cannot be used, the load does not fit it, or the engine is not installed.
    """
    refuse_unused(target, "llama")
    refuse_empty_load(target)
    _version()
    model = gguf.read(target)
    refuse_long_load(target, model.context, f"{model.path.name} was trained on")
    build = _build()
    cpus = max(len(os.sched_getaffinity(0)), build.threads)
    prompt_batch = 2 ** math.ceil(math.log2(target.prompts * target.prompt_tokens))
    parameters: list[Parameter] = [
        # llama-server's own `-np -1` is 4 slots with a unified cache.
        Int(
            name="parallel",
            meaning="slots decoded together: each decoding step reads all weights once for all busy slots, so more "
            "slots share that cost, until computing rather than reading becomes the limit; requests beyond it wait",
            default=4,
            low=1,
            high=min(MOST_SLOTS, max(4, target.prompts)),
        )
    ]
    if target.allow_lossy and target.model is None:
        parameters.append(
            Choice(
                name="weights",
                meaning="precision of the weights: fewer bits are fewer bytes read for each token and can cost quality",
                default=gguf.DEFAULT_WEIGHTS,
                effect="lossy",
                values=tuple(gguf.BYTES_PER_WEIGHT),
                ordered=True,
            )
        )
    if build.offload_devices:
        parameters.append(
            Int(
                name="gpu_layers",
                meaning=f"layers computed on {', '.join(build.offload_devices)} instead of the CPU; "
                f"{model.layers + 1} is all of them and the output layer",
                default=model.layers + 1,
                low=0,
                high=model.layers + 1,
                effect="numerics",
                lever="offload",
            )
        )
    parameters += [
        # llama_context::graph_compute takes threads_batch as soon as a step carries two tokens, so with
        # several busy slots generation runs on it too.
        Int(
            name="threads_batch",
            meaning="CPU threads while prompts are processed and while several slots generate together, that is, "
            "whenever one step computes more than one token; prompts are limited by arithmetic and usually want every "
            "core",
            default=build.threads,
            low=1,
            high=cpus,
        ),
        Int(
            name="threads",
            meaning="CPU threads while a single slot generates alone, a phase that waits for memory: beyond what "
            "saturates the memory bus, threads burn power without speed; no effect while several slots are busy",
            default=build.threads,
            low=1,
            high=cpus,
        ),
        Choice(
            name="repack",
            meaning="rearrange the weights at load time for the CPU's matrix instructions: faster multiplication for a "
            "longer start; it has no effect on weights that have no such layout",
            default=True,
            effect="numerics",
            values=(False, True),
        ),
        Choice(
            name="flash_attention",
            meaning="fused attention that never stores the score matrix: fewer bytes moved, more so with long context; "
            "auto turns it on where the device supports it",
            default="auto",
            effect="numerics",
            values=("off", "on", "auto"),
        ),
        Choice(
            name="n_ubatch",
            meaning="prompt tokens computed at a time: small values read the weights again and again, large ones need "
            "larger buffers that may fall out of the cache",
            default=512,
            effect="numerics",
            values=powers_of_two(8, max(512, prompt_batch)),
            ordered=True,
        ),
        Choice(
            name="n_batch",
            meaning="tokens accepted in one engine call, split into n_ubatch pieces: with several slots it bounds how "
            "long new prompts hold up the slots that are generating",
            default=2048,
            values=powers_of_two(32, max(2048, prompt_batch)),
            ordered=True,
        ),
        Choice(
            name="continuous_batching",
            meaning="let a new prompt join while other slots are generating; off, it waits until all of them are done "
            "and then starts together with the others that wait",
            default=True,
            values=(False, True),
        ),
        Choice(
            name="kv_unified",
            meaning="one cache shared by all slots instead of one for each: attention then passes over the cells of "
            "the other slots too",
            default=True,
            effect="numerics",
            values=(False, True),
        ),
    ]
    if target.allow_lossy and model.head_width % CACHE_BLOCK == 0:
        parameters += [
            Choice(
                name=f"cache_type_{side}",
                meaning=f"precision of the cached {what}: fewer bits are fewer bytes read at long context, but cost "
                "time to convert at short context, and can cost quality",
                default="f16",
                effect="lossy",
                values=CACHE_TYPES,
                ordered=True,
            )
            for side, what in (("k", "keys"), ("v", "values"))
        ]
    parameters.append(
        Choice(
            name="mmap",
            meaning="map the model file into memory instead of reading it into a buffer: a faster start and, for "
            "weights that are not repacked, pages shared with the file cache",
            default=True,
            values=(False, True),
        )
    )
    return SearchSpace(tuple(parameters), _constraints([p.name for p in parameters], target, model))


CACHE_TYPES = ("f16", "q8_0", "q4_0")

CACHE_BLOCK = 32
"""Quantised cache types hold 32 values a block: a head of another width cannot use them."""


def _constraints(names: list[str], target: Target, model: gguf.Model) -> tuple[Constraint, ...]:
    """That the context holds every slot's tokens is no constraint: `_context` sees to it."""
    rules = [
        # The engine clamps silently: the configuration would be another one than it says.
        Constraint("n_ubatch <= n_batch", lambda c: int(c["n_ubatch"]) <= int(c["n_batch"])),
        # With fewer, llama.cpp b11549 aborts: GGML_ASSERT(n_outputs_max <= cparams.n_outputs_max).
        Constraint(
            "parallel <= n_batch (each slot adds a token to a decoding step)",
            lambda c: int(c["parallel"]) <= int(c["n_batch"]),
        ),
    ]
    if "cache_type_v" in names:
        rules.append(
            Constraint(
                "a quantised cache_type_v needs flash_attention on",
                lambda c: c["cache_type_v"] == "f16" or c["flash_attention"] == "on",
            )
        )
    rules.append(
        gguf.memory_rule(
            model,
            memory_bytes(),
            lambda c: context(c, target),
            lambda c: int(c.get("gpu_layers", 0)) / (model.layers + 1),
        )
    )
    return tuple(rules)


def context(config: Mapping[str, Value], target: Target) -> int:
    """Tokens of context to allocate, for all slots together.

    llama-server's own `-c 0` takes the whole context the model was trained on, gigabytes for a
    recent model, and then lets `--fit` shrink it to what is free. Here each slot gets what one
    request needs. Without a unified cache the engine divides the context by the slots and rounds
    each part up to a multiple of 256; with one, all slots draw from the same pool: the same total
    serves both. It is no smaller than `n_batch`, which the engine would cut down to it.
    """
    one_slot = math.ceil((target.prompt_tokens + target.output_tokens) / CONTEXT_STEP) * CONTEXT_STEP
    return max(int(config["parallel"]) * one_slot, int(config["n_batch"]))


def identity(target: Target) -> dict[str, str]:
    """Engine, version and model: what must agree before results may meet. Cheap when asked again."""
    model = gguf.read(target)
    return {
        "engine": "llama.cpp (xllamacpp)",
        "engine_version": _version(),
        "model": model.path.name if target.model is not None else f"generated llama {gguf.shape_of(target).label}",
        "model_sha256": gguf.fingerprint(model),
        "device": "gpu" if _build().offload_devices else "cpu",
    }


def metrics(target: Target) -> tuple[str, ...]:
    """Figures of its own that limits may be set on."""
    return ("nll_nats_per_token",) if target.quality else ()


def lacks(target: Target) -> dict[str, str]:
    """Figures that it never reports, and why."""
    why = (
        "requests are function calls here, whose tokens arrive together; leave the limit out, or tune with --workload "
        "llama-server, which streams them"
    )
    return {f"{kind}_{stat}_s": why for kind in ("ttft", "itl") for stat in ("mean", "p50", "p95", "p99")}


# --- running it ------------------------------------------------------------------------------


@contextmanager
def launch(config: Config, target: Target) -> Iterator[LlamaServer]:
    """Load, send the load once to warm up, yield; shut down afterwards.

    Raises:
        Refused: the model cannot be used or the engine is not installed.
        RuntimeError: the engine cannot load this configuration, or the warm-up failed; the message is
            the first error in the engine's log, which goes to standard error.
    """
    xllamacpp = library("xllamacpp", workload="llama", install=gguf.INSTALL)
    model = gguf.read(target, str(config.get("weights", gguf.DEFAULT_WEIGHTS)))
    # On a failed assertion ggml starts a debugger on this very process and prints to standard output.
    os.environ.update(ENVIRONMENT)
    requests = _requests(target, model.tokens)
    parameters = _parameters(xllamacpp, config, target, model)
    log = _Log()
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        cause = log.first_error() or str(error)
        step = gguf.next_step(cause, "pip install --upgrade xllamacpp")
        raise RuntimeError(f"llama.cpp cannot load this configuration: {cause}{step}") from error
    engine = LlamaServer(server, target, requests, model, parameters.api_keys[0])
    del server
    try:
        # Buffers and threads come with the first work. It also makes closing safe: a server that is
        # destroyed before its loop has started waits forever (xllamacpp 2026.10), so nothing that can
        # fail stands between loading and this.
        engine.run_pass()
        engine.effective = log.read_back()
        yield engine
    finally:
        engine.close()


def _parameters(xllamacpp: Any, config: Config, target: Target, model: gguf.Model) -> Any:
    """The server's parameters: each tuned one set, and nothing left for the engine to adjust."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model.path)
    params.fit_params = False
    params.ui = False
    # The engine logs what it runs with at level 4; during a pass that is a dozen lines a request.
    params.verbosity = 4
    # It listens on a free port of 127.0.0.1 whether asked to or not; nobody else may add work to the window.
    params.port = 0
    params.api_keys = [secrets.token_hex(16)]
    # Nothing may be carried from one pass to the next; the requests, too, ask for no cached prompt.
    params.cache_ram_mib = 0

    params.n_ctx = context(config, target)
    params.n_parallel = config["parallel"]
    params.kv_unified = config["kv_unified"]
    params.cont_batching = config["continuous_batching"]
    params.n_batch = config["n_batch"]
    params.n_ubatch = config["n_ubatch"]
    params.cpuparams.n_threads = config["threads"]
    params.cpuparams_batch.n_threads = config["threads_batch"]
    params.no_extra_bufts = not config["repack"]
    flash = {"off": "DISABLED", "on": "ENABLED", "auto": "AUTO"}[str(config["flash_attention"])]
    params.flash_attn_type = xllamacpp.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{flash}"]
    # AUTO maps the file except on devices that cannot.
    params.load_mode = xllamacpp.llama_load_mode[f"LLAMA_LOAD_MODE_{'AUTO' if config['mmap'] else 'NONE'}"]
    params.cache_type_k = _cache_type(xllamacpp, config.get("cache_type_k", "f16"))
    params.cache_type_v = _cache_type(xllamacpp, config.get("cache_type_v", "f16"))
    params.n_gpu_layers = config.get("gpu_layers", 0)
    return params


def _cache_type(xllamacpp: Any, name: Value) -> Any:
    return xllamacpp.ggml_type[f"GGML_TYPE_{str(name).upper()}"]


class LlamaServer:
    """A loaded server and the requests of one pass; `key` opens its port."""

    def __init__(
        self, server: Any, target: Target, requests: list[dict[str, object]], model: gguf.Model, key: str
    ) -> None:
        self._server = server
        self._target = target
        self._requests = requests
        self._model = model
        self._key = key
        self._forced = Forced(self._answer, "llama.cpp", model.tokens, target.seed)
        self.effective: Mapping[str, Value] = {}

    def run_pass(self) -> Work:
        """Send every request at once, each from a thread of its own, and wait for the last answer.

        Raises:
            RuntimeError: the engine refused a request, or did other work than was asked for.
        """
        clients, wait = ThreadPoolExecutor(max_workers=len(self._requests)), True
        try:
            answers = list(clients.map(self._complete, self._requests))
        except BaseException as leaving:
            # Who is told to leave in the middle of a pass does not wait for its end.
            wait = isinstance(leaving, Exception)
            raise
        finally:
            clients.shutdown(wait=wait, cancel_futures=not wait)
        timings = [timing for timing, _ in answers]
        return Work(
            units=sum(t["predicted_n"] for t in timings),
            prompt_tokens=sum(t["prompt_n"] for t in timings),
            prefill_seconds=sum(t["prompt_ms"] for t in timings) / 1e3,
            decode_seconds=sum(t["predicted_ms"] for t in timings) / 1e3,
            request_seconds=tuple(seconds for _, seconds in answers),
        )

    def close(self) -> None:
        """Stop the server, its threads and its port; may be called twice."""
        self._server = None
        # The server ends with its last reference, and a failed request's traceback may hold one in a cycle.
        gc.collect()

    def quality(self, reference: Path) -> Mapping[str, float]:
        """Mean negative log-likelihood of fixed tokens, decoded along them through this cache and attention.

        Raises:
            RuntimeError: the engine refused, `reference` is damaged, or the likelihood is no number.
        """
        return judge(reference, self._passage, self._forced.nats)

    def _passage(self) -> Passage:
        most = self._model.context or TOKENS
        endpoint = Endpoint.parse(self._server.listening_address, self._key)
        text = None if self._target.model is None else of_text(text_ids(endpoint), most)
        return text or drawn(self._model.tokens, self._target.seed, self._forced.go_on, most)

    def _answer(self, request: Mapping[str, object]) -> dict[str, Any]:
        answer: dict[str, Any] = self._server.handle_completions(request)
        if "error" in answer:
            raise RuntimeError(f"llama.cpp refused a request: {answer['error'].get('message', answer['error'])}")
        return answer

    def _complete(self, request: Mapping[str, object]) -> tuple[dict[str, Any], float]:
        """The engine's counts for one request, checked, and the wall seconds it took."""
        started = time.perf_counter()
        answer = self._answer(request)
        seconds = time.perf_counter() - started
        timings: dict[str, Any] = answer["timings"]
        usage = answer["usage"]
        did = {
            "prompt tokens": (timings["prompt_n"], self._target.prompt_tokens),
            "output tokens": (timings["predicted_n"], self._target.output_tokens),
            "completion tokens": (usage["completion_tokens"], self._target.output_tokens),
            "tokens taken from a prompt cache": (usage["prompt_tokens_details"]["cached_tokens"], 0),
        }
        wrong = [f"{got} {what} instead of {asked}" for what, (got, asked) in did.items() if got != asked]
        if wrong:
            raise RuntimeError(f"llama.cpp did other work than was asked for: {', '.join(wrong)}")
        return timings, seconds


def text_ids(endpoint: Endpoint) -> list[int]:
    """The fixed text in the tokens of the model that a llama.cpp server has loaded.

    Raises:
        RuntimeError: the server does not answer, or with something else.
    """
    ids = endpoint.ask(f"{endpoint.root}/tokenize", {"content": TEXT, "add_special": False}).get("tokens")
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise RuntimeError(f"POST /tokenize brought no list of tokens: {cut(str(ids), 80)}")
    return ids


@dataclass(frozen=True)
class Forced:
    """The likelihood of given tokens, from a llama.cpp server, whichever way its completions are reached.

    It tells nothing of a prompt's likelihood (ggml-org/llama.cpp#15189), but of every token that it generates, whatever
    rules it was chosen by: a softmax over all logits as the model gave them. So each row is generated under a grammar
    that allows one token at a time, the wanted one.
    """

    ask: Callable[[Mapping[str, object]], Mapping[str, Any]]
    """The answer to the body of an OpenAI-compatible completion."""
    name: str
    """The engine's, for error messages."""
    tokens: Sequence[int]
    """Ordinary ones."""
    seed: int

    def go_on(self, openings: list[list[int]], count: int) -> list[list[int]]:
        """What it says after each opening."""
        # A grammar cannot ask for tokens without a text, such as the byte 0: only ordinary ones are drawn.
        ordinary = set(self.tokens)
        never = [[i, False] for i in range(max(ordinary)) if i not in ordinary]
        drawing = {"temperature": 1, "samplers": ["temperature"], "ignore_eos": True, "logit_bias": never}
        return [[i for i, _ in row] for row in self.generated(openings, [drawing] * len(openings), count)]

    def nats(self, passage: Passage) -> list[float]:
        """Of each judged token."""
        wanted = passage.judged
        forced = [{"grammar": f"root ::= {' '.join(f'<[{i}]>' for i in row)}"} for row in wanted]
        found = self.generated(passage.openings, forced, len(wanted[0]))
        if [[i for i, _ in row] for row in found] != wanted:
            raise RuntimeError(f"{self.name} did not follow the reference, so its output cannot be judged")
        return [-logprob for row in found for _, logprob in row]

    def generated(
        self, prompts: Sequence[Sequence[int]], fields: Sequence[Mapping[str, object]], count: int
    ) -> list[list[tuple[int, float]]]:
        """`count` tokens after each prompt, each with its log-probability before any rule of sampling."""
        requests = [
            {"prompt": prompt, "n_predict": count, "seed": self.seed, "cache_prompt": False, "logprobs": 1}
            | {"temperature": 0, **own}
            for prompt, own in zip(prompts, fields, strict=True)
        ]
        # One at a time: which of them share a step would be chance, and rounds differently each time.
        answers = [self.ask(request) for request in requests]
        try:
            tokens = [
                [(int(t["id"]), float(t["logprob"])) for t in answer["choices"][0]["logprobs"]["content"]]
                for answer in answers
            ]
        except (LookupError, TypeError, ValueError) as error:
            raise RuntimeError(f"{self.name} gave log-probabilities that cannot be read ({error})") from error
        if any(len(row) != count for row in tokens):
            raise RuntimeError(f"{self.name} generated {min(map(len, tokens))} tokens to be judged instead of {count}")
        return tokens


def _requests(target: Target, tokens: tuple[int, ...]) -> list[dict[str, object]]:
    """The fixed load: prompts of ordinary tokens drawn uniformly, greedy output of fixed length."""
    draw = random.Random(target.seed)  # noqa: S311 - a reproducible load, no secret
    return [
        {
            "prompt": draw.choices(tokens, k=target.prompt_tokens),
            "n_predict": target.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "seed": target.seed,
            "cache_prompt": False,
        }
        for _ in range(target.prompts)
    ]


# --- what the engine says --------------------------------------------------------------------

# Lines of llama.cpp's log at level 4. Two things are not in it: whether continuous batching is on
# (nothing exposes it, so `effective` does not name it), and, on a build without GPU, any layer count.
_LOG: Mapping[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "parallel": r"initializing, n_slots = (\d+)",
        "weights": r"print_info: file type\s+= (\w+)",
        "gpu_layers": r"offloaded (\d+)/\d+ layers",
        "threads": r"system_info: n_threads = (\d+)",
        "threads_batch": r"system_info: .*\(n_threads_batch = (\d+)\)",
        "repack": r"_REPACK model buffer size =\s+([\d.]+)",
        "flash_attention": r"llama_context: flash_attn\s+= (\w+)",
        "n_ubatch": r"llama_context: n_ubatch\s+= (\d+)",
        "n_batch": r"llama_context: n_batch\s+= (\d+)",
        "kv_unified": r"llama_context: kv_unified\s+= (\w+)",
        "cache_type_k": r"llama_kv_cache: size = .*K \((\w+)\)",
        "cache_type_v": r"llama_kv_cache: size = .*V \((\w+)\)",
        "mmap": r"\(load_mode = ([\w+]+)\)",
        "n_ctx": r"llama_context: n_ctx\s+= (\d+)",
    }.items()
}
_COUNTS = frozenset({"parallel", "gpu_layers", "threads", "threads_batch", "n_ubatch", "n_batch", "n_ctx"})
_LOADED = re.compile(r"init: model loaded$", re.MULTILINE)
_FLASH_RESOLVED = re.compile(r"Flash Attention (?:not supported, set to )?(enabled|disabled)")
_ERROR = re.compile(r"^[\d.]+ E (?:\w+ +)?(.+)$", re.MULTILINE)


def read_back(log: str) -> dict[str, Value]:
    """The parameters named in a log of llama.cpp, in this runner's names and types; what is not said is absent."""
    said = {name: match[1] for name, pattern in _LOG.items() if (match := pattern.search(log))}
    values: dict[str, Value] = {name: int(said[name]) for name in said if name in _COUNTS}
    values |= {name: said[name] for name in ("weights", "cache_type_k", "cache_type_v") if name in said}
    if "kv_unified" in said:
        values["kv_unified"] = said["kv_unified"] == "true"
    if "mmap" in said:
        values["mmap"] = "mmap" in said["mmap"]
        # The engine speaks of repacking only where it did: an F16 model with repacking on has none.
        values["repack"] = "repack" in said
    if flash := said.get("flash_attention"):
        if flash == "auto" and (resolved := _FLASH_RESOLVED.search(log)):
            flash = resolved[1]
        values["flash_attention"] = {"enabled": "on", "disabled": "off"}.get(flash, flash)
    return values


class _Log:
    """What the engine writes to standard error from now on.

    A worker's standard error is a file, and the file is read where it lies: a copy made on the way
    would lose the last lines of a crash. On a terminal or a pipe nothing is read back.
    """

    def __init__(self) -> None:
        status = os.fstat(2)
        self._start = status.st_size if stat.S_ISREG(status.st_mode) else None

    def read_back(self) -> dict[str, Value]:
        """What the engine says it runs with."""
        return read_back(self._once(_LOADED))

    def first_error(self) -> str | None:
        """The first line of level E; those that follow it say that loading failed."""
        found = _ERROR.search(self._once(_ERROR))
        return " ".join(found[1].split()) if found else None

    def _once(self, line: re.Pattern[str]) -> str:
        """The log once it holds `line`: a thread of the engine's own writes it, a little later than it happens."""
        deadline = time.monotonic() + 2
        while not line.search(text := self._text()) and self._start is not None and time.monotonic() < deadline:
            time.sleep(0.005)
        return text

    def _text(self) -> str:
        if self._start is None:
            return ""
        with Path("/proc/self/fd/2").open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")


# --- the same without tuner ------------------------------------------------------------------


def command(config: Config, target: Target) -> str:
    """The `llama-server` command that runs `config`, naming what differs from the engine's defaults.

    Flags: tools/server/README.md of ggml-org/llama.cpp at 00dc8057ab. The conditions of the
    measurement (no prompt cache, fixed output length) are not part of it.
    """
    return service(config, target).command()


def _command(config: Config, target: Target, model: gguf.Model) -> list[str]:
    default, program = space(target).default(), "llama-server"
    # A variable that names something else is no reason not to say what was found.
    with suppress(Refused):
        program = SERVER.find() or program
    words = [program, "-m", str(model.path), "-c", str(context(config, target)), "--fit", "off"]

    def changed(name: str) -> bool:
        return name in config and config[name] != default.get(name)

    # Naming a number of slots, even the automatic one, turns the automatic unified cache off.
    if changed("parallel") or changed("kv_unified"):
        words += ["-np", str(config["parallel"]), "--kv-unified" if config["kv_unified"] else "--no-kv-unified"]
    # Left out, and with nothing fitted, it is all of them.
    if "gpu_layers" in config:
        words += ["-ngl", str(config["gpu_layers"])]
    if changed("threads"):
        words += ["-t", str(config["threads"])]
    # Left out, the batch phase takes the threads of generation, whatever their default.
    if config["threads_batch"] != config["threads"]:
        words += ["-tb", str(config["threads_batch"])]
    if changed("repack"):
        words += ["--no-repack"]
    if changed("flash_attention"):
        words += ["-fa", str(config["flash_attention"])]
    if changed("n_ubatch"):
        words += ["-ub", str(config["n_ubatch"])]
    if changed("n_batch"):
        words += ["-b", str(config["n_batch"])]
    if changed("continuous_batching"):
        words += ["--no-cont-batching"]
    if changed("cache_type_k"):
        words += ["-ctk", str(config["cache_type_k"])]
    if changed("cache_type_v"):
        words += ["-ctv", str(config["cache_type_v"])]
    if changed("mmap"):
        words += ["--load-mode", "none"]
    return words


SERVICE_PORT = 8080
"""llama-server's own default."""

IMAGES = {False: "ghcr.io/ggml-org/llama.cpp:server", True: "ghcr.io/ggml-org/llama.cpp:server-cuda"}
"""Without and with GPU layers: docs/docker.md of ggml-org/llama.cpp. Their entry point is llama-server."""


def service(config: Config, target: Target) -> Service:
    """`llama-server` with `config`: alone it listens to this machine only, in a container to its network.

    The Python form is the engine that was measured, `xllamacpp`; the others are the same server built by its project.
    """
    model = gguf.read(target, str(config.get("weights", gguf.DEFAULT_WEIGHTS)))
    words = _command(config, target, model)
    gpus = bool(config.get("gpu_layers", 0))
    listen = ("--port", str(SERVICE_PORT), "--host")
    return Service(
        argv=(*words, *listen, "127.0.0.1"),
        port=SERVICE_PORT,
        image=IMAGES[gpus],
        image_argv=(*words[1:], *listen, "0.0.0.0"),  # noqa: S104 - the container's own network
        paths=(str(model.path),),
        gpus=gpus,
        python=_script(config, target, model),
    )


def _script(config: Config, target: Target, model: gguf.Model) -> str:
    """`_parameters` as a script: the tuned ones, without the conditions of the measurement."""
    flash = {"off": "DISABLED", "on": "ENABLED", "auto": "AUTO"}[str(config["flash_attention"])]
    load_mode = "AUTO" if config["mmap"] else "NONE"
    cache = {side: str(config.get(f"cache_type_{side}", "f16")).upper() for side in ("k", "v")}
    settings = {
        "model.path": repr(str(model.path)),
        "port": repr(SERVICE_PORT),
        "fit_params": "False",
        "n_ctx": repr(context(config, target)),
        "n_parallel": repr(config["parallel"]),
        "kv_unified": repr(config["kv_unified"]),
        "cont_batching": repr(config["continuous_batching"]),
        "n_batch": repr(config["n_batch"]),
        "n_ubatch": repr(config["n_ubatch"]),
        "cpuparams.n_threads": repr(config["threads"]),
        "cpuparams_batch.n_threads": repr(config["threads_batch"]),
        "no_extra_bufts": repr(not config["repack"]),
        "flash_attn_type": f'xllamacpp.llama_flash_attn_type["LLAMA_FLASH_ATTN_TYPE_{flash}"]',
        "load_mode": f'xllamacpp.llama_load_mode["LLAMA_LOAD_MODE_{load_mode}"]',
        "cache_type_k": f'xllamacpp.ggml_type["GGML_TYPE_{cache["k"]}"]',
        "cache_type_v": f'xllamacpp.ggml_type["GGML_TYPE_{cache["v"]}"]',
        "n_gpu_layers": repr(config.get("gpu_layers", 0)),
    }
    lines = "\n".join(f"params.{name} = {value}" for name, value in settings.items())
    return f"""\
import signal
import threading

import xllamacpp

params = xllamacpp.CommonParams()
{lines}

asked_to_end = threading.Event()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: asked_to_end.set())

server = xllamacpp.Server(params)
print(f"serving on {{server.listening_address}}", flush=True)
asked_to_end.wait()
"""
