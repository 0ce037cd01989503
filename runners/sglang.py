"""SGLang: its server as a process of its own, reached over HTTP.

The tuned flags are named; what the engine works out from the GPU's size (`auto`) is left to it, so that the default
configuration is the engine's own. What it runs with is read back from its `/server_info`. Flags come and go between
versions: the installed one is asked for its help once, the answer is kept on disk, a flag that it lacks is left out,
and the values of a flag that lists them are read from there.

Without a model the one that the `vllm` workload writes is served with weights drawn by the engine
(`--load-format dummy`): speed and energy are those of that shape, what it says has no meaning.

Neither SGLang nor torch is imported here: SGLang lives in an environment of its own (TUNE_SGLANG names that
environment's python, or the `sglang` executable in it).

Glossary
    radix cache   prompts that begin alike share the cache of their beginning
    page          tokens whose keys and values are kept together in the cache
    chunk         a long prompt's part that is computed in one step
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
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
    first_known,
    given_flags,
    given_values,
    gpus_here,
    memory_bytes,
    names_of,
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
MODULE = ("-m", "sglang.launch_server")

# --- the program -----------------------------------------------------------------------------

ENVIRONMENT: Mapping[str, str] = {
    # A trial downloads nothing and reports to nobody.
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
}

PROGRAM = Program(
    name="sglang",
    title="SGLang",
    variable="TUNE_SGLANG",
    install="install it in an environment of its own (python -m venv sglang-env; sglang-env/bin/pip install sglang) "
    "and set TUNE_SGLANG=sglang-env/bin/python",
    expected="a python that has SGLang, or sglang",
    environment=ENVIRONMENT,
    # It imports torch to print its help.
    ask_seconds=600.0,
)


def _program() -> tuple[str, ...]:
    """The words that start the server: what TUNE_SGLANG or the PATH names, else the module of this Python."""
    if found := PROGRAM.find():
        return (found, *MODULE) if Path(found).name.startswith("python") else (found, "serve")
    if importlib.util.find_spec("sglang") is not None:
        return (sys.executable, *MODULE)
    raise PROGRAM.missing()


@dataclass(frozen=True)
class _Build:
    """The installed SGLang."""

    version: str
    flags: Mapping[str, Flag]

    @property
    def title(self) -> str:
        return f"SGLang {self.version}"

    def listed(self, flag: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `wanted` that the help lists for a flag."""
        return tuple(v for v in wanted if flag in self.flags and v in self.flags[flag].choices)


def _build() -> _Build:
    program = _program()
    return _asked(program, Path(program[0]).stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _asked(program: tuple[str, ...], _changed_ns: int) -> _Build:
    found = packaged(program[0], "sglang")
    version = found[1] if found else "not said"
    text = PROGRAM.help(program, [("--help",)], marker="--max-running-requests", version=version)
    return _Build(version, parse_help(text))


# --- the machine and the model ---------------------------------------------------------------


def _given(target: Target, build: _Build, reserved: Mapping[str, str] | None = None) -> dict[str, Given]:
    return given_flags(target.engine_args, {*build.flags, *(reserved or RESERVED)}, argparse=True)


def _gpus(target: Target) -> tuple[Gpu, ...]:
    """The GPUs to run on; none where the user asks for the CPU."""
    asked = _given(target, _build()).get("--device")
    if asked and asked.value == "cpu":
        return ()
    if gpus := gpus_here():
        return gpus
    raise Refused(
        "SGLang runs on GPUs, and nvidia-smi shows none here; a build of it for CPUs is asked for with "
        "--engine-arg --device=cpu"
    )


def _context(target: Target, model: hugging_face.Model) -> int:
    """Tokens that a request may have. The engine keeps a few of them to itself."""
    wanted = math.ceil((target.prompt_tokens + target.output_tokens + SPARE_TOKENS) / 16) * 16
    return min(wanted, model.context) if model.context else wanted


SPARE_TOKENS = 8


def describe(target: Target) -> str:
    """One line that says what is being run, and which flags this version lacks."""
    return hugging_face.describe(target, _build().title, notes(target))


# --- what may be tuned -----------------------------------------------------------------------

FLAGS: Mapping[str, tuple[str, ...]] = {
    "max_running_requests": ("--max-running-requests",),
    "chunked_prefill_size": ("--chunked-prefill-size",),
    "max_prefill_tokens": ("--max-prefill-tokens",),
    "schedule_policy": ("--schedule-policy",),
    "schedule_conservativeness": ("--schedule-conservativeness",),
    "radix_cache": ("--disable-radix-cache",),
    "stream_interval": ("--stream-interval",),
    "mem_fraction_static": ("--mem-fraction-static",),
    "disable_cuda_graph": ("--disable-cuda-graph", "--disable-decode-cuda-graph"),
    "cuda_graph_max_bs": ("--cuda-graph-max-bs-decode", "--cuda-graph-max-bs"),
    "attention_backend": ("--attention-backend",),
    "page_size": ("--page-size",),
    "tp_size": ("--tp-size", "--tensor-parallel-size"),
    "kv_cache_dtype": ("--kv-cache-dtype",),
    "quantization": ("--quantization",),
}
"""The flags behind each parameter of the engine: the first one that the installed version has is used."""

RESERVED: Mapping[str, str] = {
    "--port": "tune chooses the port itself",
    "--host": "tune chooses the host itself",
    "--model-path": "tune names the model itself, by its own --model",
    "--model": "tune names the model itself, by its own --model",
    "--context-length": "tune sets it to what the load needs",
    "--random-seed": "tune sets it, by its own --seed",
    "--sampling-defaults": "tune sets it itself",
    "--config": "tune does not see what the file sets; name its flags one by one",
}
"""Flags that every launch has (`_fixed_words`) or that none can have, and why nobody else may give them."""

DUMMY: Mapping[str, str] = {"--load-format": "tune sets it, to let SGLang draw the weights"}

AUTO = "auto"
"""What the engine works out itself; no flag is given."""

NO_LIMIT = 2048
"""Running requests that the engine allows at least when it is told nothing (0.5)."""

NEED_RADIX_CACHE = ("lpm", "dfs-weight")
"""Policies that go by it: without one the engine falls back to another policy without a word."""


def space(target: Target) -> SearchSpace:
    """Flags of the installed SGLang for this machine, model and load, most influential first.

    Raises:
        Refused: SGLang or the model is not there, or the load does not fit it.
    """
    return _space(target)[0]


def notes(target: Target) -> list[str]:
    """What was left out of the space, and why."""
    return _space(target)[1]


def _space(target: Target) -> tuple[SearchSpace, list[str]]:
    refuse_unused(target, "sglang")
    refuse_empty_load(target)
    build, model = _build(), hugging_face.read(target)
    gpus = _gpus(target)
    refuse_long_load(target, max(0, model.context - SPARE_TOKENS), f"of {model.name} less {SPARE_TOKENS}")
    reserved = {**RESERVED, **(DUMMY if hugging_face.is_dummy(target) else {})}
    given = _given(target, build, reserved)
    refuse_reserved(given, reserved, build.flags)
    fixed = given_values(given, SIZE_FLAGS, build.flags, SIZE_NUMBERS)
    if shared := names_of(("--enable-dp-attention",), build.flags) & given.keys():
        # The copies are then of attention only, and on the GPUs of tp_size, which no longer share its heads.
        fixed.pop("data_parallel_size", None)
    offered = _parameters(target, build, model, gpus, fixed)
    kept, said = tunable(offered, FLAGS, engine=build.title, known=build.flags, given=given)
    rules = _constraints({p.name for p in kept}, target)
    if gpus and not shared and ("tp_size" in fixed or any(p.name == "tp_size" for p in kept)):
        rules.append(hugging_face.heads_rule(model, "tp_size", int(fixed.get("tp_size", 1))))
    if not (unchecked := uncounted(UNCOUNTED, build.flags, given)):
        rules.append(_memory_rule(target, model, gpus, fixed))
    return SearchSpace(kept, tuple(rules)), [*said, *unchecked]


def _parameters(
    target: Target, build: _Build, model: hugging_face.Model, gpus: Sequence[Gpu], fixed: Mapping[str, Value]
) -> list[Parameter]:
    """Every parameter that could be offered here, whether this version has its flag or not."""
    parameters = concurrency(
        target, "beyond max_running_requests they wait in the queue, and with fewer the steps are not full"
    )
    powers = powers_of_two
    parameters += [
        Choice(
            name="max_running_requests",
            meaning="requests that share a step: each step reads all weights once for all of them, so more share that "
            "cost until arithmetic or the cache's size becomes the limit",
            default=NO_LIMIT,
            values=tuple(sorted({*powers(1, min(NO_LIMIT, power_of_two(target.prompts))), NO_LIMIT})),
            ordered=True,
        ),
        Choice(
            name="chunked_prefill_size",
            meaning="prompt tokens computed in a step, -1 for whole prompts: large chunks are efficient, small ones "
            "need less working memory and keep the wait between two tokens short",
            default=_usual_chunk(gpus),
            values=(*powers(512, 16384), -1),
            ordered=True,
        ),
        Choice(
            name="max_prefill_tokens",
            meaning="prompt tokens of all requests that are admitted to a step together",
            default=16384,
            values=powers(1024, 65536),
            ordered=True,
        ),
        Choice(
            name="schedule_policy",
            meaning="which waiting request is taken next: fcfs the oldest, lpm the one with the longest cached "
            "beginning, lof the one with the longest answer",
            default="fcfs",
            values=build.listed("--schedule-policy", ("fcfs", "lpm", "dfs-weight", "lof", "random")) or ("fcfs",),
        ),
        Choice(
            name="schedule_conservativeness",
            meaning="how much cache is kept free for running requests before new ones are admitted: low fills the "
            "steps, too low takes requests back when the cache runs out",
            default=1.0,
            values=(0.3, 0.5, 0.8, 1.0, 1.3),
            ordered=True,
        ),
        Choice(
            name="radix_cache",
            meaning="keep the cache of prompts that begin alike: the prompts of this load never do, so what is "
            "measured is what the bookkeeping costs",
            default=True,
            values=(False, True),
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
        parameters += _gpu_parameters(build, model, gpus, fixed)
    return parameters + (_lossy(build, model, gpus) if target.allow_lossy else [])


def _gpu_parameters(
    build: _Build, model: hugging_face.Model, gpus: Sequence[Gpu], fixed: Mapping[str, Value]
) -> list[Parameter]:
    backends = build.listed("--attention-backend", ("flashinfer", "fa3", "triton", "torch_native"))
    parameters: list[Parameter] = [
        Choice(
            name="mem_fraction_static",
            meaning="share of the GPU's memory for weights and cache: more cache holds more requests, and memory that "
            "is too tight fails under load; auto keeps back what the engine expects to need",
            default=AUTO,
            values=(AUTO, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
        ),
        Choice(
            name="disable_cuda_graph",
            meaning="start each kernel of a step by itself instead of replaying a recorded graph: a faster start, and "
            "slower small steps",
            default=False,
            effect="numerics",
            values=(False, True),
        ),
        Choice(
            name="cuda_graph_max_bs",
            meaning="largest number of requests in a step for which a graph is recorded: larger steps run without one, "
            "and each recorded size takes memory; auto goes by the GPU's size",
            default=AUTO,
            effect="numerics",
            values=(AUTO, 8, 16, 32, 64, 128, 256, 512),
        ),
        Choice(
            name="attention_backend",
            meaning="kernels that compute attention; auto takes the engine's choice for this GPU and model",
            default=AUTO,
            effect="numerics",
            values=(AUTO, *backends),
        ),
        Choice(
            name="page_size",
            meaning="tokens in a page of the cache: small pages waste less memory, large ones are found faster; auto "
            "takes what the attention kernels need",
            default=AUTO,
            effect="numerics",
            values=(AUTO, 1, 16, 32, 64),
        ),
    ]
    widths = hugging_face.tensor_widths(model, len(gpus), fixed)
    if len(widths) > 1:
        parameters.append(
            Choice(
                name="tp_size",
                meaning="GPUs that share each layer: more of them finish a step sooner, draw power together and "
                "exchange results after every layer",
                default=1,
                effect="numerics",
                lever="offload",
                values=widths,
                ordered=True,
            )
        )
    return parameters


def _lossy(build: _Build, model: hugging_face.Model, gpus: Sequence[Gpu]) -> list[Parameter]:
    """Parameters that can cost quality."""
    parameters: list[Parameter] = []
    cache = build.listed("--kv-cache-dtype", (AUTO, "fp8_e5m2", "fp8_e4m3", "bf16"))
    if gpus and len(cache) > 1:
        parameters.append(
            Choice(
                name="kv_cache_dtype",
                meaning="precision of the cached keys and values: 8 bits hold twice the requests and move half the "
                "bytes, and can cost quality",
                default=AUTO,
                effect="lossy",
                values=cache,
            )
        )
    if gpus and model.quantised is None and build.listed("--quantization", ("fp8",)):
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


def _usual_chunk(gpus: Sequence[Gpu]) -> int:
    """What the engine takes by itself (`handle_gpu_memory_settings`, SGLang 0.5.23)."""
    gib = gpus[0].bytes / GIB if gpus else 0.0
    for below, chunk in ((20, 2048), (60, 4096), (160, 8192)):
        if 0 < gib < below:
            return chunk
    return 16384 if gpus else 4096


SIZE_FLAGS: Mapping[str, tuple[str, ...]] = {
    "tp_size": ("--tp-size", "--tensor-parallel-size", "--tp"),
    "pipeline_parallel_size": ("--pp-size", "--pipeline-parallel-size", "--pp"),
    "data_parallel_size": ("--dp-size", "--data-parallel-size", "--dp"),
    "cpu_offload_gb": ("--cpu-offload-gb",),
    "mem_fraction_static": ("--mem-fraction-static",),
    "dtype": ("--dtype",),
    "quantization": ("--quantization",),
    "kv_cache_dtype": ("--kv-cache-dtype",),
}
"""What memory and heads depend on; it is not tuned where `--engine-arg` fixes it, and counts all the same."""

SIZE_NUMBERS: Mapping[str, type[int | float]] = {
    **hugging_face.SIZE_NUMBERS,
    "tp_size": int,
    "mem_fraction_static": float,
}

UNCOUNTED = (
    *("--attn-cp-size", "--attention-context-parallel-size", "--nnodes", "--offload-group-size", "--offload-mode"),
    *("--torchao-config", "--json-model-override-args", "--model-impl", "--kt-weight-path", "--kt-method"),
    *("--language-only", "--encoder-only"),
)
"""What makes less memory do, by how much is not worked out here. What needs more, such as adapters, is not listed:
the rule is a lower bound. Copies of the model (`--dp-size`) hold as much each; with `--enable-dp-attention` they share
the GPUs of `--tp-size`."""


def _constraints(names: set[str], target: Target) -> list[Constraint]:
    rules = []
    if {"schedule_policy", "radix_cache"} <= names:
        rules.append(
            Constraint(
                f"schedule_policy {' and '.join(NEED_RADIX_CACHE)} need radix_cache",
                lambda c: bool(c["radix_cache"]) or c["schedule_policy"] not in NEED_RADIX_CACHE,
            )
        )
    if {"disable_cuda_graph", "cuda_graph_max_bs"} <= names:
        rules.append(
            Constraint(
                "with disable_cuda_graph there is no cuda_graph_max_bs but auto",
                lambda c: not c["disable_cuda_graph"] or c["cuda_graph_max_bs"] == AUTO,
            )
        )
    if {"page_size", "chunked_prefill_size"} <= names:
        rules.append(
            Constraint(
                "a chunk is a whole number of pages: chunked_prefill_size is a multiple of page_size",
                lambda c: (
                    c["page_size"] == AUTO or int(c["chunked_prefill_size"]) % int(c["page_size"]) == 0
                    if c["chunked_prefill_size"] != -1
                    else True
                ),
            )
        )
    if target.quality and {"kv_cache_dtype", "radix_cache"} <= names:
        rules.append(
            Constraint(
                "what a kv_cache_dtype but auto costs is judged through the cache of prompts: it needs radix_cache",
                lambda c: c["kv_cache_dtype"] == AUTO or bool(c["radix_cache"]),
            )
        )
    return rules


def _memory_rule(
    target: Target, model: hugging_face.Model, gpus: Sequence[Gpu], fixed: Mapping[str, Value]
) -> Constraint:
    context = _context(target, model)
    memory = float(min(gpu.bytes for gpu in gpus)) if gpus else float(memory_bytes())

    def fits(config: Mapping[str, Value]) -> bool:
        whole = {**config, **fixed}
        asked = whole.get("mem_fraction_static", AUTO)
        share = MOST_SHARE if asked == AUTO else float(asked)
        alike = {**whole, "tensor_parallel_size": whole.get("tp_size", 1)}
        return hugging_face.needed_bytes(model, alike, context) <= share * memory

    where = "the GPU's" if gpus else "main memory's"
    return Constraint(
        f"weights ({model.weights / 1e9:.1f}G of them), the cache of one request ({context} tokens) and "
        f"1 GiB of working memory fit into mem_fraction_static of {where} {memory / GIB:.0f} GiB",
        fits,
    )


MOST_SHARE = 0.95
"""Of a GPU's memory, or of the machine's, where the engine chooses the share."""


metrics = hugging_face.metrics


def lacks(target: Target) -> dict[str, str]:
    """Figures that it never reports, and why."""
    return hugging_face.lacks(target, "SGLang")


def identity(target: Target) -> dict[str, str]:
    """Engine, version, model and device: what must agree before results may meet."""
    build, model = _build(), hugging_face.read(target)
    return {
        "engine": "SGLang",
        "engine_version": build.version,
        "model": model.name,
        "model_sha256": hugging_face.fingerprint(model),
        "weights": "drawn at random" if hugging_face.is_dummy(target) else "the model's own",
        "device": ", ".join(gpu.name for gpu in _gpus(target)) or "cpu",
        **({"engine_args": shlex.join(target.engine_args)} if target.engine_args else {}),
    }


# --- running it ------------------------------------------------------------------------------

SYMPTOMS = Symptoms(
    out_of_memory=(
        r"(?:torch\.(?:cuda\.)?OutOfMemoryError: )?(?:CUDA|HIP) out of memory.*",
        r"Not enough memory\. Please try to increase --mem-fraction-static.*",
        r"(?:Prefill|Decode) out of memory\. .*",
        r"alloc_req_slots runs out of memory.*",
        r"(?:CUDA error|Triton Error \[CUDA\]): out of memory.*",
        r"DefaultCPUAllocator: (?:can't|not enough) .*memory.*",
        r"\bstd::bad_alloc\b.*",
    ),
    telling=(r"(\[Errno \d+\] error while attempting to bind .*)", r"\berror: (?:unrecognized|argument) .*"),
)

START_SECONDS = 1800.0
"""Loading a large model and recording its graphs."""


def _words(config: Mapping[str, Value], build: _Build) -> list[str]:
    """The flags for `config`; what is left to the engine has none."""
    words: list[str] = []
    for name, value in config.items():
        flag = first_known(FLAGS.get(name, ()), build.flags)
        if flag is None or value in (AUTO, "none"):
            continue
        if isinstance(value, bool):
            words += [flag] if value == (not flag.endswith("radix-cache")) else []
        else:
            words += [flag, show(value)]
    return words


def _fixed_words(target: Target, build: _Build, model: hugging_face.Model) -> list[str]:
    """Flags that every trial of a target shares."""
    words = ["--context-length", str(_context(target, model)), "--random-seed", str(target.seed % 2**31)]
    if hugging_face.is_dummy(target):
        words += ["--load-format", "dummy"]
    # A model's own generation settings may reshape its output.
    if "--sampling-defaults" in build.flags:
        words += ["--sampling-defaults", "openai"]
    return [*words, *target.engine_args]


@contextmanager
def launch(config: Config, target: Target) -> Iterator[ServedEngine]:
    """Start the engine, wait until it serves, send the load once to warm up, yield; stop it afterwards.

    Raises:
        Refused: SGLang or the model is not there.
        RuntimeError: the engine cannot run this configuration, or the warm-up failed; the message holds the line of
            its log that says why.
    """
    build, model = _build(), hugging_face.read(target)

    def start(port: int) -> Server:
        argv = [
            *(*_program(), "--model-path", str(model.folder), "--host", "127.0.0.1", "--port", str(port)),
            *_words(config, build),
            *_fixed_words(target, build, model),
        ]
        return start_server(argv, name="SGLang", env=ENVIRONMENT, symptoms=SYMPTOMS, given=target.engine_args)

    server, endpoint = started(start, timeout_seconds=START_SECONDS)
    try:
        load = Load.of(
            target,
            models(endpoint)[0],
            concurrency=int(config.get("concurrency", target.prompts)),
            token_ids=hugging_face.ordinary(model),
        )
        client, said = Client(endpoint, load, server), read_back(_server_info(endpoint), config)
        engine = ServedEngine(client, said)
        if not hugging_face.is_dummy(target):
            engine = JudgedSglang(client, said, server, target, model, config)
        engine.run_pass()
        yield engine
    finally:
        server.stop()


class JudgedSglang(JudgedServer):
    """One whose weights mean something; those that the engine draws itself predict every token alike, as vLLM's do.

    The likelihood is the engine's own for prompts, but not of a whole row at once: in one step the attention of Triton
    and FlashInfer takes keys and values as they were computed, not as the cache keeps them, and a cache of 8 bits would
    lose nothing (`forward_extend` of both, 0.5.23). So a row grows by one token a request, and all before it is read
    back from the radix cache, as it is when the engine generates.
    """

    def __init__(
        self,
        client: Client,
        said: Mapping[str, Value],
        server: Server,
        target: Target,
        model: hugging_face.Model,
        config: Config,
    ) -> None:
        super().__init__(client, said, server, target, _context(target, model) - SPARE_TOKENS)
        self._vocabulary: int = model.vocabulary
        self._cache = str(config.get("kv_cache_dtype", AUTO))

    def _go_on(self, openings: list[list[int]], count: int) -> list[list[int]]:
        whole = {"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "ignore_eos": True}
        answers = [self._generate(opening, {**whole, "max_new_tokens": count}) for opening in openings]
        return [self._of(answer, "output_ids") for answer in answers]

    def _nats(self, passage: Passage) -> list[float]:
        nats: list[float] = []
        for row in passage.rows:
            # Brings what is given into the cache.
            self._generate(row[: passage.context], {"temperature": 0, "max_new_tokens": 1})
            for end in range(passage.context + 1, len(row) + 1):
                # Figures are for the tokens after the first of those asked for, and no cache is read beyond it.
                start = end - 2
                meta = self._generate(
                    row[:end],
                    {"temperature": 0, "max_new_tokens": 1},
                    return_logprob=True,
                    logprob_start_len=start,
                ).get("meta_info")
                nats.append(self._read(self._of(meta, "input_token_logprobs"), row[end - 1]))
            if self._cache != AUTO and not _number(meta, "cached_tokens") * 2 >= start:
                raise RuntimeError(
                    f"SGLang read {_number(meta, 'cached_tokens')} of {start} tokens back from its cache, so what "
                    f"kv_cache_dtype {self._cache} costs cannot be judged; it needs radix_cache and a small page_size"
                )
        return nats

    def _read(self, told: list[Any], token: int) -> float:
        try:
            logprob, said = told[-1][:2]
            # The last id of the vocabulary is shown as 0 (`_process_input_token_logprobs`, 0.5.23).
            if said != (token if token < self._vocabulary - 1 else 0):
                raise ValueError(f"token {said} instead of {token}")
            # JSON has no NaN; the engine writes null.
            return math.nan if logprob is None else -float(logprob)
        except (LookupError, TypeError, ValueError) as error:
            raise RuntimeError(
                f"SGLang gave log-probabilities of a prompt that cannot be read ({cut(str(error), 80)})"
            ) from error

    def _generate(self, ids: Sequence[int], sampling: Mapping[str, object], **fields: object) -> dict[str, Any]:
        """One at a time: requests that share a step round differently."""
        endpoint = self._client.endpoint
        return endpoint.ask(
            f"{endpoint.root}/generate", {"input_ids": list(ids), "sampling_params": dict(sampling), **fields}
        )

    def _of(self, answer: Any, name: str) -> list[Any]:
        found = answer.get(name) if isinstance(answer, dict) else None
        if not isinstance(found, list):
            raise RuntimeError(f"this SGLang gives no {name}, so its output cannot be judged")
        return found


def _number(meta: Any, name: str) -> int:
    """A count of the answer's; 0 where there is none."""
    found = meta.get(name) if isinstance(meta, dict) else None
    return found if isinstance(found, int) else 0


# --- what the engine says --------------------------------------------------------------------


def _server_info(endpoint: Endpoint) -> Mapping[str, Any]:
    """The newer path first; the older one still answers, with a warning."""
    for path in ("/server_info", "/get_server_info"):
        with suppress(OSError, ValueError):
            status, body = endpoint.get(path)
            if status == 200 and isinstance(said := json.loads(body), dict):
                return said
    return {}


def read_back(info: Mapping[str, Any], config: Config) -> dict[str, Value]:
    """The parameters of `config` as `/server_info` gives them, and the cache that it found room for.

    What is not said is absent. For what was left to the engine it is the engine's choice.
    """
    said: dict[str, Any] = {name: info.get(name) for name in config}
    if isinstance(off := info.get("disable_radix_cache"), bool):
        said["radix_cache"] = not off
    graphs = info.get("cuda_graph_config")
    decode = graphs.get("decode") if isinstance(graphs, dict) else None
    if isinstance(decode, dict):
        said["cuda_graph_max_bs"] = decode.get("max_bs")
        if "backend" in decode:
            said["disable_cuda_graph"] = decode["backend"] == "disabled"
    if "quantization" in config and "quantization" in info:
        said["quantization"] = info["quantization"] or "none"
    said = {name: value for name, value in said.items() if name in config}
    said["kv_cache_tokens"] = info.get("max_total_num_tokens")
    return {name: value for name, value in said.items() if isinstance(value, bool | int | float | str)}


# --- the same without tuner ------------------------------------------------------------------

PORT = 30000
"""The engine's own default."""


def command(config: Config, target: Target) -> str:
    """The command that runs `config`, naming what differs from the engine's defaults."""
    return service(config, target).command()


def service(config: Config, target: Target) -> Service:
    """How to run `config` for good: alone it listens to this machine only, in a container to its network.

    The image has no entry point of the engine's: its words are the whole command.
    """
    build, known, default = _build(), hugging_face.read(target), space(target).default()
    changed = {name: value for name, value in config.items() if value != default.get(name)}
    model = str(known.folder) if known.generated or Path(known.name).expanduser().is_dir() else known.name
    dummy = ["--load-format", "dummy"] if hugging_face.is_dummy(target) else []
    words = ["--model-path", model, *dummy, *_words(changed, build), *target.engine_args, "--port", str(PORT), "--host"]
    gpus = bool(_gpus(target))
    released = gpus and re.fullmatch(r"\d[\w.]*", build.version)
    network = "0.0.0.0"  # noqa: S104 - the container's own
    return Service(
        argv=(*_program(), *words, "127.0.0.1"),
        port=PORT,
        image=f"lmsysorg/sglang:v{build.version}" if released else None,
        image_argv=("python3", *MODULE, *words, network) if released else (),
        paths=(model,) if Path(model).is_absolute() else (),
        gpus=gpus,
    )
