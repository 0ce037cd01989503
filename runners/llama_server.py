"""llama.cpp's `llama-server` as a process of its own, reached over HTTP: the engine as its project builds it.

The `llama` workload runs the same server inside the trial's process and sends its requests as function calls; here an
installed executable is started (on the PATH, or named by TUNE_LLAMA_SERVER), so that a GPU build, a distribution's
build or a patched one is what is tuned. Every tuned flag is named, `--fit off` keeps it from changing the others, and
what it runs with is read back from its log. Flags come and go between builds: the installed one is asked for its help,
and a flag that it lacks is left out.

Without a model file the generated one of the `llama` workload is loaded (docs/design/generated-model.md).

Glossary
    slot      a sequence that the server decodes; requests wait until one is free
    batch     tokens handed to the engine in one call (`n_batch`), computed `n_ubatch` at a time
    repack    rearranging weights at load time for the CPU's matrix instructions
"""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.installed import (
    Given,
    Program,
    first_known,
    given_flags,
    given_values,
    memory_bytes,
    refuse_reserved,
    tunable,
    uncounted,
)
from tuner.models import gguf
from tuner.quality import TOKENS, Passage
from tuner.serving import (
    Client,
    JudgedServer,
    Load,
    Server,
    Symptoms,
    beside,
    concurrency,
    cut,
    free_port,
    models,
    start_server,
    started,
)
from tuner.space import Choice, Config, Constraint, Int, Parameter, Refused, SearchSpace, Value, powers_of_two
from tuner.trial import EngineError, Service, Target, refuse_empty_load, refuse_long_load, refuse_unused

_llama: Any = beside(__file__, "llama")
"""Its generated model, its reading of GGUF headers and of llama.cpp's log: they are the same engine's."""

GIB = 2**30
MIB = 2**20

# --- the program -----------------------------------------------------------------------------


LOG_LEVEL = "4"
"""What the engine runs with stands in its log from here on; during a pass it is a dozen lines a request."""

ENVIRONMENT: Mapping[str, str] = _llama.ENVIRONMENT

PROGRAM: Program = _llama.SERVER


@dataclass(frozen=True)
class _Device:
    """A GPU that layers can be moved to, as `--list-devices` shows it."""

    name: str
    bytes: int


@dataclass(frozen=True)
class _Build:
    """What the installed executable says about itself on this machine."""

    program: str
    version: str
    flags: Mapping[str, str]
    """Each flag's entry in the help, by every name that it has."""
    devices: tuple[_Device, ...]
    threads: int
    """The thread count that it chooses by itself."""
    openmp: bool
    """Whether OpenMP's threads compute: they do not heed `--poll`."""


def _build() -> _Build:
    program = PROGRAM.path()
    return _asked(program, Path(program).stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _asked(program: str, _changed_ns: int) -> _Build:
    def said(*words: str, may_fail: bool = False) -> str:
        # Builds differ in which of both outputs they write to.
        return PROGRAM.run((program, *words), with_errors=True, may_fail=may_fail)

    flags = parse_help(said("--help"))
    if not {"--model", "--port", "--ctx-size", "--parallel"} <= set(flags):
        raise Refused(f"{program}: expected llama-server, but its --help lists no --parallel; {PROGRAM.install}")
    version = re.search(r"^version: (.+)$", said("--version"), re.MULTILINE)
    listed = said("--list-devices") if "--list-devices" in flags else ""
    devices = [
        _Device(cut(name, 80), int(mib) * MIB)
        for name, mib in re.findall(r"^\s+\w+: (.+) \((\d+) MiB, \d+ MiB free\)", listed, re.MULTILINE)
    ]
    # Without a model it fails, but not before it has logged the threads that it would have used.
    aloud = ("--log-verbosity", LOG_LEVEL) if "--log-verbosity" in flags else ()
    where = ("--host", "127.0.0.1", "--port", str(free_port()))
    log = said("--model", os.devnull, *where, *aloud, may_fail=True)
    threads = re.search(r"n_threads = (\d+)", log)
    return _Build(
        program=program,
        version=cut(version[1], 80) if version else "not said",
        flags=flags,
        devices=tuple(devices),
        threads=int(threads[1]) if threads else len(os.sched_getaffinity(0)),
        openmp="OPENMP = 1" in log,
    )


def parse_help(text: str) -> dict[str, str]:
    """Each flag's entry in the output of `llama-server --help`, by every name of the flag."""
    flags: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        if line.startswith("-") and not line.startswith("----"):
            # The explanation begins after two spaces; between two names there may be as many.
            head = re.split(r"\s{2,}(?=[^-\s])", line)[0]
            names = re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", head)
            entry = line
        elif names and line.startswith(" "):
            entry = f"{flags[names[0]]}\n{line}"
        else:
            names = []
        flags.update(dict.fromkeys(names, entry if names else ""))
    return flags


# --- the model -------------------------------------------------------------------------------


def _needed_bytes(model: gguf.Model, config: Mapping[str, Value], target: Target) -> float:
    """Weights and cache."""
    return gguf.needed_bytes(model, config, _context(config, target))


def _context(config: Mapping[str, Value], target: Target) -> int:
    """Tokens of context for all slots together (`_context` of the `llama` workload says why)."""
    return int(_llama.context({"parallel": 4, "n_batch": 2048, **config}, target))


def describe(target: Target) -> str:
    """One line that says what is being run, and which flags this build lacks."""
    said = f"llama-server {_build().version}, {_llama.describe(target)}"
    lacking = notes(target)
    return f"{said}; {'; '.join(lacking)}" if lacking else said


# --- what may be tuned -----------------------------------------------------------------------

FLAGS: Mapping[str, tuple[str, ...]] = {
    "parallel": ("--parallel",),
    "threads": ("--threads",),
    "threads_batch": ("--threads-batch",),
    "n_batch": ("--batch-size",),
    "n_ubatch": ("--ubatch-size",),
    "flash_attention": ("--flash-attn",),
    "continuous_batching": ("--no-cont-batching",),
    "kv_unified": ("--kv-unified",),
    "n_gpu_layers": ("--n-gpu-layers",),
    "cache_type_k": ("--cache-type-k",),
    "cache_type_v": ("--cache-type-v",),
    "repack": ("--no-repack",),
    "mmap": ("--load-mode", "--no-mmap"),
    "poll": ("--poll",),
}
"""The flags behind each parameter of the engine: the first one that the installed build has is used."""

_ITSELF = "tune sets it itself"
_MODEL = "tune names the model itself, by its own --model"
RESERVED: Mapping[str, str] = {
    "--port": "tune chooses the port itself",
    "--host": "tune chooses the host itself",
    **dict.fromkeys(("--model", "--model-url", "--hf-repo", "--docker-repo"), _MODEL),
    "--ctx-size": "tune sets it to what the load needs",
    **dict.fromkeys(("--fit", "--log-verbosity", "--cache-ram", "--offline", "--no-slots", "--no-ui"), _ITSELF),
    "--no-webui": _ITSELF,
}
"""Flags that every launch has (`_fixed_words`) or that name a model, and why nobody else may give them."""

CACHE_TYPES = ("f16", "q8_0", "q4_0")


def space(target: Target) -> SearchSpace:
    """Flags of the installed llama-server for this machine, model and load, most influential first.

    Raises:
        Refused: llama-server or the model is not there, or the load does not fit it.
    """
    return _space(target)[0]


def notes(target: Target) -> list[str]:
    """What was left out of the space, and why."""
    return _space(target)[1]


def _space(target: Target) -> tuple[SearchSpace, list[str]]:
    refuse_unused(target, "llama-server")
    refuse_empty_load(target)
    build, model = _build(), gguf.read(target)
    refuse_long_load(target, model.context, f"{model.path.name} was trained on")
    given = _given(target, build)
    refuse_reserved(given, RESERVED, build.flags)
    fixed, engine = _fixed(target, build, model), f"llama-server {build.version}"
    barred = {}
    if "auto" not in build.flags.get("--flash-attn", ""):
        barred["flash_attention"] = f"--flash-attn of {engine} takes no on, off or auto"
    if build.openmp:
        barred["poll"] = "this build computes with OpenMP, whose threads do not heed --poll"
    offered = _parameters(target, build, model, fixed)
    kept, said = tunable(offered, FLAGS, engine=engine, known=build.flags, given=given, barred=barred)
    names = {p.name for p in kept}
    rules = _constraints(names)
    if not (unchecked := uncounted(UNCOUNTED, build.flags, given)):
        rules += _memory_rules(names, target, build, model, fixed)
    return SearchSpace(kept, tuple(rules)), [*said, *unchecked]


def _given(target: Target, build: _Build) -> dict[str, Given]:
    return given_flags(target.engine_args, {*build.flags, *RESERVED}, argparse=False)


SIZE_FLAGS = ("parallel", "n_batch", "n_gpu_layers", "cache_type_k", "cache_type_v")
"""What the context and memory depend on; it is not tuned where `--engine-arg` fixes it, and counts all the same."""

UNCOUNTED = ("--override-tensor", "--cpu-moe", "--n-cpu-moe", "--no-kv-offload", "--device", "--rpc", "--override-kv")
"""What moves weights or cache elsewhere than `--n-gpu-layers` says, or changes the model."""


def _fixed(target: Target, build: _Build, model: gguf.Model) -> dict[str, Value]:
    """What `--engine-arg` says of the context and memory; what it leaves to the engine is absent."""
    flags = {name: FLAGS[name] for name in SIZE_FLAGS}
    found = given_values(_given(target, build), flags, build.flags, {"parallel": int, "n_batch": int})
    if "n_gpu_layers" in found:
        text, whole = str(found["n_gpu_layers"]), model.layers + 1
        # `auto`, `all` and what is below 0 are all of them, where nothing is fitted.
        found["n_gpu_layers"] = min(int(text), whole) if text.isdigit() else whole
    return {name: value for name, value in found.items() if isinstance(value, str) or value >= 0}


def _parameters(target: Target, build: _Build, model: gguf.Model, fixed: Mapping[str, Value]) -> list[Parameter]:
    """Every parameter that could be offered here, whether this build has its flag or not."""
    cpus = max(len(os.sched_getaffinity(0)), build.threads)
    prompt_batch = 2 ** math.ceil(math.log2(target.prompts * target.prompt_tokens))
    parameters = concurrency(
        target, "beyond the number of slots they wait in the queue, and with fewer some slots stay empty"
    )
    # The engine's own `-np -1` is 4 slots with a unified cache.
    parameters.append(
        Int(
            name="parallel",
            meaning="slots decoded together: each decoding step reads all weights once for all busy slots, so more "
            "slots share that cost, until computing rather than reading becomes the limit; requests beyond it wait",
            default=4,
            low=1,
            high=min(_llama.MOST_SLOTS, max(4, target.prompts)),
        )
    )
    if build.devices:
        whole = model.layers + 1
        share = sum(d.bytes for d in build.devices) * GPU_SHARE / _needed_bytes(model, fixed, target)
        parameters.append(
            Int(
                name="n_gpu_layers",
                meaning=f"layers computed on {', '.join(d.name for d in build.devices)} instead of the CPU; "
                f"{whole} is all of them and the output layer",
                default=min(whole, math.floor(share * whole)),
                low=0,
                high=whole,
                effect="numerics",
                lever="offload",
            )
        )
    parameters += [
        # A step of two tokens or more takes threads_batch (llama_context::graph_compute).
        Int(
            name="threads_batch",
            meaning="CPU threads while prompts are processed and while several slots generate together, that is, "
            "whenever one step computes more than one token",
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
            "larger buffers",
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
            meaning="let a new prompt join while other slots are generating; off, it waits until all of them are done",
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
        Choice(
            name="poll",
            meaning="how long idle compute threads spin before they sleep, 0 for not at all: spinning saves wake-up "
            "time and burns power",
            default=50,
            values=(0, 25, 50, 75, 100),
            ordered=True,
        ),
    ]
    if target.allow_lossy and model.head_width % _llama.CACHE_BLOCK == 0:
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
    return parameters


GPU_SHARE = 0.9
"""Of a GPU's memory, for weights and cache; the rest is for compute buffers and the driver."""


def _constraints(names: set[str]) -> list[Constraint]:
    rules = []
    if {"n_ubatch", "n_batch"} <= names:
        # The engine clamps silently: the configuration would be another one than it says.
        rules.append(Constraint("n_ubatch <= n_batch", lambda c: int(c["n_ubatch"]) <= int(c["n_batch"])))
    if {"parallel", "n_batch"} <= names:
        rules.append(
            Constraint(
                "parallel <= n_batch (each slot adds a token to a decoding step)",
                lambda c: int(c["parallel"]) <= int(c["n_batch"]),
            )
        )
    if {"cache_type_v", "flash_attention"} <= names:
        rules.append(
            Constraint(
                "a quantised cache_type_v needs flash_attention on",
                lambda c: c["cache_type_v"] == "f16" or c["flash_attention"] == "on",
            )
        )
    return rules


def _memory_rules(
    names: set[str], target: Target, build: _Build, model: gguf.Model, fixed: Mapping[str, Value]
) -> list[Constraint]:
    def offloaded(config: Mapping[str, Value]) -> float:
        return int(config.get("n_gpu_layers", 0)) / (model.layers + 1) if build.devices else 0.0

    rules = [gguf.memory_rule(model, memory_bytes(), lambda c: _context(c, target), offloaded, fixed)]
    if build.devices and "n_gpu_layers" in {*names, *fixed}:
        total = sum(d.bytes for d in build.devices)
        rules.append(
            Constraint(
                f"the share of weights ({model.bytes / GIB:.2g} GiB) and cache on the GPU fits into {GPU_SHARE:.0%} "
                f"of its {total / GIB:.0f} GiB: fewer n_gpu_layers or less parallel",
                lambda c: offloaded({**c, **fixed}) * _needed_bytes(model, {**c, **fixed}, target) <= total * GPU_SHARE,
            )
        )
    return rules


def identity(target: Target) -> dict[str, str]:
    """Engine, version, model and device: what must agree before results may meet."""
    build, model = _build(), gguf.read(target)
    return {
        "engine": "llama.cpp (llama-server)",
        "engine_version": build.version,
        "model": model.path.name if target.model is not None else f"generated llama {gguf.shape_of(target).label}",
        "model_sha256": gguf.fingerprint(model),
        "device": ", ".join(d.name for d in build.devices) or "cpu",
        **({"engine_args": shlex.join(target.engine_args)} if target.engine_args else {}),
    }


def metrics(target: Target) -> tuple[str, ...]:
    """Figures of its own that limits may be set on."""
    return ("nll_nats_per_token",) if target.quality else ()


# --- running it ------------------------------------------------------------------------------

SYMPTOMS = Symptoms(
    out_of_memory=(
        r"(allocating [\d.]+ MiB on device \d+: \w+ failed: out of memory.*)",
        r"(Device memory allocation of size \d+ failed.*)",
        r"\bErrorOutOf(?:Device|Host)Memory\b.*",
        r"\b(?:CUDA|HIP|MUSA) error: out of memory.*",
        r"(failed to allocate .*buffer.*)",
        r"(unable to allocate \S+ buffer.*)",
        r"(insufficient memory \(attempted to allocate .*)",
        r"\bstd::bad_alloc\b.*",
    ),
    telling=(
        r"(couldn't bind .*)",
        r"error while handling argument .*",
        # Lines of level E; the first one is the cause, those that follow say that loading failed.
        r"^[\d.]+ E (?:\w+ +)?(.+)$",
    ),
)

START_SECONDS = 1800.0
"""Reading a large model from a slow disk."""

SAID_SECONDS = 2.0
"""The log is written by a thread of the engine's own, a little later than it happens."""


def _words(config: Mapping[str, Value], build: _Build) -> list[str]:
    """The flags for `config`, each of them named."""
    words: list[str] = []
    for name, value in config.items():
        flag = first_known(FLAGS.get(name, ()), build.flags)
        if flag is None:
            continue
        if name == "kv_unified":
            # Builds without the second flag have a cache for each slot unless they are told otherwise.
            off = ["--no-kv-unified"] if "--no-kv-unified" in build.flags else []
            words += [flag] if value else off
        elif name == "mmap" and flag == "--load-mode":
            words += [flag, "auto" if value else "none"]
        elif flag.startswith("--no-"):
            words += [] if value else [flag]
        else:
            words += [flag, str(value)]
    return words


def _fixed_words(config: Mapping[str, Value], target: Target, build: _Build) -> list[str]:
    """What every trial of a target shares: nothing is adjusted, kept from earlier passes, or served beside it."""
    wanted = [("--fit", "off"), ("--log-verbosity", LOG_LEVEL), ("--cache-ram", "0"), ("--offline",), ("--no-slots",)]
    wanted.append(("--no-ui",) if "--no-ui" in build.flags else ("--no-webui",))
    given = [word for words in wanted if words[0] in build.flags for word in words]
    context = _context({**config, **_fixed(target, build, gguf.read(target))}, target)
    return ["--ctx-size", str(context), *given, *target.engine_args]


@contextmanager
def launch(config: Config, target: Target) -> Iterator[JudgedLlama]:
    """Start the engine, wait until it serves, send the load once to warm up, yield; stop it afterwards.

    Raises:
        Refused: llama-server or the model is not there.
        RuntimeError: the engine cannot run this configuration, or the warm-up failed; the message holds the line of
            its log that says why.
    """
    build, model = _build(), gguf.read(target)

    def start(port: int) -> Server:
        argv = [
            *(build.program, "--model", str(model.path), "--host", "127.0.0.1", "--port", str(port)),
            *_words(config, build),
            *_fixed_words(config, target, build),
        ]
        return start_server(argv, name="llama-server", env=ENVIRONMENT, symptoms=SYMPTOMS, given=target.engine_args)

    try:
        server, endpoint = started(start, timeout_seconds=START_SECONDS)
    except RuntimeError as error:
        raise EngineError(f"{error}{gguf.next_step(str(error), 'install a newer llama.cpp')}") from error
    try:
        load = Load.of(
            target,
            models(endpoint)[0],
            concurrency=int(config.get("concurrency", target.prompts)),
            token_ids=_ordinary(model.tokens),
            fields={"cache_prompt": False, **_whole_characters(target, model.tokens)},
        )
        engine = JudgedLlama(Client(endpoint, load, server), _said(server, config), server, target, model)
        engine.run_pass()
        yield engine
    finally:
        server.stop()


class JudgedLlama(JudgedServer):
    """Its likelihood of given tokens is brought about as in the `llama` workload, over HTTP: decoded along them."""

    def __init__(
        self, client: Client, said: Mapping[str, Value], server: Server, target: Target, model: gguf.Model
    ) -> None:
        super().__init__(client, said, server, target, model.context or TOKENS)
        self._tokens: tuple[int, ...] = model.tokens
        self._forced = _llama.Forced(self._answer, server.name, model.tokens, target.seed)

    def _answer(self, request: Mapping[str, object]) -> dict[str, Any]:
        endpoint = self._client.endpoint
        return endpoint.ask(f"{endpoint.prefix}/completions", {"model": self._client.load.model, **request})

    def _text_ids(self) -> list[int]:
        # A generated model has a vocabulary that can spell the text, and no likelihood of it that would mean anything.
        return [] if self._target.model is None else _llama.text_ids(self._client.endpoint)

    def _ordinary(self) -> Sequence[int]:
        return self._tokens

    def _go_on(self, openings: list[list[int]], count: int) -> list[list[int]]:
        said: list[list[int]] = self._forced.go_on(openings, count)
        return said

    def _nats(self, passage: Passage) -> list[float]:
        nats: list[float] = self._forced.nats(passage)
        return nats


def _whole_characters(target: Target, tokens: tuple[int, ...]) -> dict[str, object]:
    """A field that keeps a generated model from single bytes: random ones are no UTF-8, and builds of 2026 (b10400)
    answer such a text with `does not match the expected Content-only format`.
    """
    if target.model is not None:
        return {}
    ordinary = set(tokens)
    return {"logit_bias": [[token, False] for token in range(max(tokens)) if token not in ordinary]}


def _ordinary(tokens: tuple[int, ...]) -> range:
    """The longest run of ids that are all ordinary tokens."""
    best = run = range(tokens[0], tokens[0] + 1)
    for token in tokens[1:]:
        run = range(run.start, token + 1) if token == run.stop else range(token, token + 1)
        best = run if len(run) > len(best) else best
    return best


# --- what the engine says --------------------------------------------------------------------


def _said(server: Server, config: Config) -> dict[str, Value]:
    """What the log says once it is complete, waited for at most a moment."""
    give_up = time.monotonic() + SAID_SECONDS
    while not (values := read_back(server.log(), config)).keys() >= {"parallel"} & config.keys():
        if time.monotonic() > give_up:
            break
        time.sleep(0.01)
    return values


_MAPPED = re.compile(r"\(mmap = (true|false)")


def read_back(log: str, config: Config) -> dict[str, Value]:
    """The parameters of `config` that the log names, and the context; what is not said is absent.

    Neither continuous batching nor polling is in it.
    """
    said: dict[str, Value] = _llama.read_back(log)
    if "gpu_layers" in said:
        said["n_gpu_layers"] = said.pop("gpu_layers")
    if "mmap" not in said and (mapped := _MAPPED.search(log)):
        said["mmap"] = mapped[1] == "true"
        said["repack"] = "_REPACK model buffer size" in log
    return {name: value for name, value in said.items() if name in config or name == "n_ctx"}


# --- the same without tuner ------------------------------------------------------------------


def command(config: Config, target: Target) -> str:
    """The `llama-server` command that runs `config`, naming what differs from the engine's defaults.

    The conditions of the measurement (no prompt cache, fixed output length) are not part of it.
    """
    return service(config, target).command()


def _command(config: Config, target: Target) -> list[str]:
    build, model, default = _build(), gguf.read(target), space(target).default()
    changed = {name: value for name, value in config.items() if value != default.get(name)}
    # Naming a number of slots, even the automatic one, turns the automatic unified cache off.
    if {"parallel", "kv_unified"} & changed.keys():
        changed |= {name: config[name] for name in ("parallel", "kv_unified") if name in config}
    # Left out, the batch phase takes the threads of generation, whatever their default.
    if "threads" in changed and "threads_batch" in config:
        changed["threads_batch"] = config["threads_batch"]
    # Left out, and with nothing fitted, it is all of them.
    if "n_gpu_layers" in config:
        changed["n_gpu_layers"] = config["n_gpu_layers"]
    fit = ["--fit", "off"] if "--fit" in build.flags else []
    context = _context({**config, **_fixed(target, build, model)}, target)
    words = [build.program, "--model", str(model.path), "--ctx-size", str(context), *fit]
    return [*words, *_words(changed, build), *target.engine_args]


def service(config: Config, target: Target) -> Service:
    """How to run `config` for good: alone it listens to this machine only, in a container to its network."""
    words, build = _command(config, target), _build()
    whole = {**config, **_fixed(target, build, gguf.read(target))}
    gpus = bool(build.devices) and bool(whole.get("n_gpu_layers", 0))
    listen = ("--port", str(_llama.SERVICE_PORT), "--host")
    return Service(
        argv=(*words, *listen, "127.0.0.1"),
        port=_llama.SERVICE_PORT,
        image=_llama.IMAGES[gpus],
        image_argv=(*words[1:], *listen, "0.0.0.0"),  # noqa: S104 - the container's own network
        paths=(words[2],),
        gpus=gpus,
    )
