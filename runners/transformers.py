"""Hugging Face transformers: `generate` on batches, inside the trial's process.

One engine, one load: `Target.prompts` prompts of equal length (random token ids, so nothing is padded) are generated
`batch_size` at a time, greedily and to a fixed length. A request begins when its batch does. Every step of a batch
gives one token to each of its sequences, and a streamer stamps each step once its tokens have reached the host: the
first stamp ends the prefill. Compiling happens in warm-up passes and is reported apart.

Without `--model` the runner makes a Llama of random weights in memory: no file, no download, no tokenizer. It costs
what a trained model of that shape costs and says nothing.

torch and transformers take seconds to import and may open a GPU context, so the tuner's own process never imports
them: `space` asks a short-lived child for the device, and reads versions and configurations as files.

Glossary
    step        one forward pass that gives one token to every sequence of a batch
    cache       keys and values of the tokens so far, of one batch; made anew for each batch
    forced      decoding along given tokens, to see how likely they were, through the same code as the load
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.installed import library, memory_bytes, passing_files, torch_threads
from tuner.models import hugging_face
from tuner.quality import TEXT, TOKENS, Passage, drawn, judge, of_text
from tuner.space import Choice, Config, Constraint, Effect, Int, Parameter, Refused, SearchSpace, Value, excerpt
from tuner.trial import Service, Target, Work, python_forms, refuse_empty_load, refuse_long_load, refuse_unused

# --- the model -------------------------------------------------------------------------------

INSTALL = "pip install 'transformers>=5' 'torch>=2.5'"

_library = functools.partial(library, workload="transformers", install=INSTALL)
"""By name: this file is called like one of them."""


@dataclass(frozen=True)
class Shape:
    """The shape of a generated Llama."""

    label: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    context: int
    tied: bool = False
    """Whether the output layer is the embedding itself."""
    dtype: str = "float32"
    """What models of this size are published in."""

    @property
    def parameters(self) -> int:
        """All weights, norms included."""
        kv_width = self.width // self.heads * self.kv_heads
        attention = 2 * self.width * self.width + 2 * self.width * kv_width
        layer = attention + 3 * self.width * self.feed_forward + 2 * self.width
        return (1 if self.tied else 2) * self.vocabulary * self.width + self.layers * layer + self.width


SIZES: Mapping[str, Shape] = {
    "tiny": Shape("tiny", 64, 2, 2, 2, 192, vocabulary=1024, context=4096),
    # karpathy/tinyllamas stories15M.
    "15m": Shape("15M", 288, 6, 6, 6, 768, vocabulary=32000, context=4096, tied=True),
    # JackFram/llama-160m with a longer context.
    "160m": Shape("160M", 768, 12, 12, 12, 3072, vocabulary=32000, context=32768),
    # Llama 3.2 1B.
    "1b": Shape("1B", 2048, 16, 32, 8, 8192, vocabulary=128256, context=131072, tied=True, dtype="bfloat16"),
    # Llama 3.1 8B.
    "8b": Shape("8B", 4096, 32, 32, 8, 14336, vocabulary=128256, context=131072, dtype="bfloat16"),
}
"""The models that `--size` can name."""

DEFAULT_SIZE = "160m"

BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

FIRST_ORDINARY_TOKEN = 3
"""Ids below stand for unknown, begin and end in a Llama's vocabulary; a generated model has no others."""


@dataclass(frozen=True)
class Model:
    """What is known of a model before it is loaded."""

    name: str
    """As tables and `identity` show it."""
    settings: Mapping[str, Any]
    """Its configuration: `config.json`, or that of a generated Llama."""
    folder: Path | None
    """Where its files are; None for a generated model."""
    random: bool
    """Whether its weights are made in memory."""
    weight_bytes: int
    """Bytes of its weights as they are stored, or would be; 0 where the files do not say."""
    dtype: str
    """What it is stored in, and the default to run it in."""

    @property
    def text(self) -> Mapping[str, Any]:
        """The settings of its language part, where it has others."""
        inner = self.settings.get("text_config")
        return inner if isinstance(inner, dict) else self.settings

    def number(self, *names: str) -> int:
        """The first of these settings that is a positive number; 0 where the file names none."""
        found = (self.text.get(name) for name in names)
        return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), 0)

    @property
    def context(self) -> int:
        return self.number("max_position_embeddings", "n_positions")

    @property
    def kv_width(self) -> int:
        """Values that one layer caches for one token, keys and values together; 0 where it is not known."""
        heads = self.number("num_attention_heads", "n_head")
        width = self.number("head_dim") or (self.number("hidden_size", "n_embd") // heads if heads else 0)
        return 2 * width * (self.number("num_key_value_heads") or heads)

    @property
    def layers(self) -> int:
        return self.number("num_hidden_layers", "n_layer")

    @property
    def parameters(self) -> float:
        """How many weights it has, if all are stored in `dtype`."""
        return self.weight_bytes / BYTES[self.dtype]

    @property
    def quantized(self) -> bool:
        """Whether its files are quantised already."""
        return "quantization_config" in self.settings

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids to draw prompts from: the vocabulary without the tokens that begin, end and pad."""
        if self.folder is None:
            return tuple(range(FIRST_ORDINARY_TOKEN, self.number("vocab_size")))
        special: set[object] = set()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            for value in (self.settings.get(name), self.text.get(name)):
                special.update(value if isinstance(value, list) else [value])
        return tuple(n for n in range(self.number("vocab_size")) if n not in special)


def _model(target: Target) -> Model:
    """The model that `target` names, from its files alone."""
    if target.model is None:
        return _generated(target)
    if target.size is not None:
        raise Refused(f"--size {target.size} makes a model and --model {target.model} names one: leave one of them out")
    folder = _folder(target.model)
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not an object")
    except FileNotFoundError as error:
        raise Refused(
            f"--model {target.model}: expected a folder with a config.json, as save_pretrained writes it; "
            "leave --model out to tune with a generated model"
        ) from error
    except (OSError, ValueError) as error:
        raise Refused(f"--model {target.model}: {folder / 'config.json'} cannot be read ({error})") from error
    _check_kind(target.model, settings)
    weights = hugging_face.weight_files(folder)
    stored = settings.get("dtype") or settings.get("torch_dtype")
    dtype = str(stored) if stored in BYTES else "float32"
    # Drawn weights have the shape's number, whatever lies beside it.
    counted = round(hugging_face.parameters(settings) * hugging_face.stored_bytes(settings, dtype))
    found = sum(path.stat().st_size for path in weights)
    model = Model(
        name=folder.name if Path(target.model).expanduser().is_dir() else target.model,
        settings=settings,
        folder=folder,
        random=target.dummy_weights,
        weight_bytes=counted or found if target.dummy_weights else found,
        dtype=dtype,
    )
    if model.number("vocab_size") < 8:
        raise Refused(f"--model {target.model}: {folder / 'config.json'} names no vocab_size")
    if not weights and not target.dummy_weights:
        raise Refused(
            f"--model {target.model}: no weights (*.safetensors or *.bin) in {folder}; download all of the model, or "
            "add --dummy-weights to run its shape with random ones"
        )
    return model


def _generated(target: Target) -> Model:
    size = target.size or DEFAULT_SIZE
    if size not in SIZES:
        raise Refused(f"--size {size}: expected one of {', '.join(SIZES)}")
    shape = SIZES[size]
    dtype = "bfloat16" if _machine().device == "cuda" and _machine().bfloat16 else shape.dtype
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.feed_forward,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied,
    }
    return Model(f"generated llama {shape.label}", settings, None, True, shape.parameters * BYTES[dtype], dtype)


def _folder(name: str) -> Path:
    """The folder with the model's files: itself, or a hub model's newest one in the library's own cache.

    Nothing is ever downloaded: a trial that fetches gigabytes would be measured by its network.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise Refused(f"--model {name}: expected a folder or a hub id, got a file; try --model {path.parent}")
    hub = _library("huggingface_hub")
    try:
        found = hub.try_to_load_from_cache(name, "config.json")
    except ValueError as error:  # HFValidationError: no id could look like this
        raise Refused(f"--model {excerpt(name)}: no such folder, and no hub id looks like this") from error
    if not isinstance(found, str):
        raise Refused(
            f"--model {name}: no such folder here, and no model of this name in the Hugging Face cache "
            f"({hub.constants.HF_HUB_CACHE}); download it first with: hf download {name}"
        )
    return Path(found).parent


def _check_kind(name: str, settings: Mapping[str, Any]) -> None:
    kinds = settings.get("architectures") or []
    generates = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if settings.get("is_encoder_decoder") or (kinds and not any(str(k).endswith(generates) for k in kinds)):
        raise Refused(
            f"--model {name}: expected a decoder-only language model, got "
            f"{excerpt(kinds[0]) if kinds else 'an encoder and decoder'}"
        )


def _fingerprint(model: Model, seed: int) -> str:
    """A digest of the configuration, and of the weights: their names, sizes and both ends of each file.

    The first MiB of a safetensors file holds its table, the last one weights: another model differs there, and 100
    GB are not read before each study. Random weights are made from the shape and the seed.
    """
    digest = hashlib.sha256(json.dumps(model.settings, sort_keys=True).encode())
    if model.random:
        digest.update(f"random {RECIPE} {seed}".encode())
        return digest.hexdigest()
    assert model.folder is not None
    for path in hugging_face.weight_files(model.folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return f"ends:{digest.hexdigest()}"


def describe(target: Target) -> str:
    """One line that says what is being run, shown before a study starts."""
    model = _model(target)
    size = f"{model.weight_bytes / 1e9:.1f} GB" if model.weight_bytes >= 1e9 else f"{model.weight_bytes / 1e6:.0f} MB"
    where = _machine().name
    if model.folder is None:
        return (
            f"model: {model.name} with random weights ({model.dtype}, {size}) on {where}: speed and energy are those "
            "of a trained model of this shape, its text is meaningless"
        )
    weights = f"random weights, {size}" if model.random else size
    kind = model.settings.get("model_type", "unknown kind")
    return f"model: {model.name} ({kind}, {model.layers} layers, {model.dtype}, {weights}) on {where}"


# --- the machine and the libraries, asked from outside ---------------------------------------


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise Refused(f"the transformers workload needs the package {name}; install it with: {INSTALL}") from error


def _installed(*names: str) -> bool:
    """Whether these distributions are there; nothing is imported. A folder of the same name is none."""
    try:
        return all(importlib.metadata.version(name) for name in names)
    except importlib.metadata.PackageNotFoundError:
        return False


def _holds(package: str, file: str, text: str = "") -> bool:
    """Whether an installed package has a file, and `text` in it: what the library can do, without importing it."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / file
        if path.is_file() and text in path.read_text(encoding="utf-8"):
            return True
    return False


@dataclass(frozen=True)
class _Machine:
    """What torch says about this machine."""

    device: str
    """`cuda` where torch can use a GPU, else `cpu`."""
    name: str
    memory_bytes: int
    """Of the device: the GPU's, or what this process may use of the machine's."""
    threads: int
    """The thread count torch chooses by itself: physical cores."""
    bfloat16: bool
    """Whether the device computes in bfloat16."""


_PROBE = """
import json, torch
said = {"threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()}
if said["cuda"]:
    device = torch.cuda.get_device_properties(0)
    said.update(name=device.name, memory_bytes=device.total_memory, bfloat16=torch.cuda.is_bf16_supported())
print(json.dumps(said))
"""


@functools.cache
def _machine() -> _Machine:
    """Ask torch in a child process: a GPU context ends with it, and a crash is a sentence."""
    _version("torch")
    words = [sys.executable, "-c", _PROBE]
    with passing_files() as environment:
        child = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
    try:
        said = json.loads(child.stdout.strip().splitlines()[-1]) if child.returncode == 0 else {}
        threads, cuda = int(said["threads"]), bool(said["cuda"])
    except (ValueError, LookupError) as error:
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        cause = signal.Signals(-child.returncode).name if child.returncode < 0 else last
        raise Refused(
            f"torch does not run on this machine ({cause}); try: pip install --force-reinstall torch"
        ) from error
    if cuda:
        return _Machine("cuda", said["name"], said["memory_bytes"], threads, said["bfloat16"])
    return _Machine("cpu", "the CPU", memory_bytes(), threads, bfloat16=True)


def _compiler() -> str | None:
    """The compiler that torch.compile needs for its kernels on this device, or None: then it is not offered.

    On a CPU they are C++; on a GPU Triton makes them, and compiles a launcher in C.
    """
    if _machine().device == "cuda":
        names = [os.environ.get("CC"), "gcc", "cc", "clang"] if _installed("triton") else []
    else:
        names = [os.environ.get("CXX"), "g++", "c++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


# --- what may be tuned -----------------------------------------------------------------------

QUANTIZED_CACHES: Mapping[str, str] = {
    "quantized-fp8": "Fp8QuantizedLayer",
    "quantized-quanto": "QuantoQuantizedLayer",
    "quantized-hqq": "HQQQuantizedLayer",
}
"""Caches of less precision, and the class in transformers' `cache_utils.py` that is each one's layer."""

_CACHE_GROUP = 64
"""quanto and HQQ share one scale among so many values (`q_group_size`)."""

LARGEST_SHARE = 0.95
"""Of the device's memory that weights and caches may take: the rest is the driver's and the libraries'."""


def space(target: Target) -> SearchSpace:
    """What may be tuned on this machine, for this model and load, most influential first.

    Left out on purpose: `use_cache` (without a cache every step computes all tokens again), `interop` threads (one
    model has no branches that could run side by side), assistant models (they change what is run, not how).

    Raises:
        Refused: the model cannot be used, the load does not fit it, or a library is not installed.
    """
    refuse_unused(target, "transformers")
    _version("transformers")
    machine, model = _machine(), _model(target)
    _check_load(target, model)
    parameters: list[Parameter] = [
        Int(
            name="batch_size",
            meaning="prompts generated together: each step reads all weights once for the whole batch, so larger "
            "batches share that cost until arithmetic is the limit; the others wait, and the cache grows with it",
            default=1,
            low=1,
            high=target.prompts,
            log=True,
            scope="request",
            effect="exact",
        )
    ]
    if target.allow_lossy:
        parameters.append(
            Choice(
                name="dtype",
                meaning="number format of weights and arithmetic: fewer bits are fewer bytes read for each token, "
                "faster only where the device computes in it, and can cost quality",
                default=model.dtype,
                effect="lossy",
                values=_dtypes(machine, model),
            )
        )
        ways = _quantizations(machine, model)
        if len(ways) > 1:
            parameters.append(
                Choice(
                    name="quantization",
                    meaning="weights in fewer bits than dtype has, converted while loading: less memory to read for "
                    "each token, more work to convert it back, and a cost in quality",
                    default="none",
                    effect="lossy",
                    values=ways,
                )
            )
    if machine.device == "cpu":
        parameters.append(
            torch_threads(
                machine.threads,
                "CPU threads that share one operation: beyond what keeps memory or arithmetic busy, threads "
                "burn power without speed",
            )
        )
    flash = ("flash_attention_2",) if machine.device == "cuda" and _installed("flash-attn") else ()
    caches = _caches(target, model)
    parameters += [
        Choice(
            name="attention",
            meaning="how attention is computed: eager stores the whole score matrix, sdpa and flash_attention_2 are "
            "fused kernels that never do",
            default="sdpa",
            effect="numerics",
            values=("eager", "sdpa", *flash),
        ),
        Choice(
            name="cache",
            meaning="how keys and values of earlier tokens are kept: dynamic grows at each step, static is allocated "
            "once at full length and can be compiled, quantised ones hold fewer bits and convert at each step",
            default="dynamic",
            effect=_cache_effect(caches),
            values=caches,
        ),
    ]
    if machine.device == "cuda":
        parameters.append(
            Choice(
                name="cache_offload",
                meaning="keep the cache in the host's memory and bring each layer's part to the GPU when it is due: "
                "room for larger batches, paid with a copy at each step",
                default=False,
                values=(False, True),
                lever="offload",
            )
        )
    if _compiler():
        modes = ("default", "reduce-overhead") if machine.device == "cuda" else ("default",)
        parameters.append(
            Choice(
                name="compile",
                meaning="translate the model into fused kernels before the first window (torch.compile), which takes "
                "a minute or more at each launch; reduce-overhead also replays recorded GPU work without the host",
                default="none",
                effect="numerics",
                values=("none", *modes),
            )
        )
    return SearchSpace(tuple(parameters), _constraints(target, model, machine, {p.name for p in parameters}))


def _dtypes(machine: _Machine, model: Model) -> tuple[Value, ...]:
    """float16 is for GPUs: CPUs without its arithmetic convert each number. A model that comes in it keeps it."""
    offered = {
        "float32": True,
        "bfloat16": machine.bfloat16,
        "float16": machine.device == "cuda",
    }
    return tuple(name for name, on in offered.items() if on or name == model.dtype)


def _quantizations(machine: _Machine, model: Model) -> tuple[str, ...]:
    if model.quantized:
        return ("none",)
    offered = {
        "none": True,
        # bitsandbytes computes on GPUs, and transformers loads it through accelerate.
        "bnb-8bit": machine.device == "cuda" and _installed("bitsandbytes", "accelerate"),
        "bnb-4bit": machine.device == "cuda" and _installed("bitsandbytes", "accelerate"),
        "torchao-int8": _installed("torchao"),
        # Deprecated in torch and still there in 2.13; asked for as a file so that its end is no error here.
        "dynamic-int8": machine.device == "cpu" and _holds("torch", "ao/quantization/quantize.py"),
    }
    return tuple(name for name, on in offered.items() if on)


def _caches(target: Target, model: Model) -> tuple[str, ...]:
    if not target.allow_lossy:
        return ("dynamic", "static")
    grouped = model.kv_width // 2 % _CACHE_GROUP == 0
    there = {
        "quantized-fp8": True,
        "quantized-quanto": grouped and _installed("optimum-quanto"),
        "quantized-hqq": grouped and _installed("hqq"),
    }
    quantized = (n for n, on in there.items() if on and _holds("transformers", "cache_utils.py", QUANTIZED_CACHES[n]))
    return ("dynamic", "static", *quantized)


def _cache_effect(caches: Sequence[str]) -> Effect:
    return "lossy" if any(c.startswith("quantized") for c in caches) else "numerics"


def _check_load(target: Target, model: Model) -> None:
    refuse_empty_load(target)
    refuse_long_load(target, model.context, f"of {model.name}")


def _dtype(config: Mapping[str, Value], model: Model) -> str:
    return str(config.get("dtype", model.dtype))


def _constraints(target: Target, model: Model, machine: _Machine, names: set[str]) -> tuple[Constraint, ...]:
    rules: list[Constraint] = []
    if "compile" in names:
        # `generate` compiles for caches of a fixed size only; with another one it skips compiling in silence.
        rules.append(
            Constraint(
                "compile other than none needs cache=static (only a cache of fixed size can be compiled)",
                lambda c: c["compile"] == "none" or c["cache"] == "static",
            )
        )
        if "quantization" in names:
            rules.append(
                Constraint(
                    "compile other than none needs quantization none or torchao-int8 (the others cannot be compiled)",
                    lambda c: c["compile"] == "none" or c["quantization"] in ("none", "torchao-int8"),
                )
            )
    if "quantization" in names and "dtype" in names:
        rules.append(
            Constraint(
                "quantization=dynamic-int8 needs dtype=float32 (it keeps activations in float32)",
                lambda c: c["quantization"] != "dynamic-int8" or c["dtype"] == "float32",
            )
        )
    if "cache_offload" in names:
        rules += [
            Constraint(
                "cache_offload needs cache=dynamic or cache=static",
                lambda c: c["cache"] in ("dynamic", "static") or not c["cache_offload"],
            ),
        ]
        if "compile" in names:
            rules.append(
                Constraint(
                    "cache_offload needs compile=none (the cache moves between the steps)",
                    lambda c: c["compile"] == "none" or not c["cache_offload"],
                )
            )
    rules.append(
        Constraint(
            "attention=flash_attention_2 needs dtype=float16 or dtype=bfloat16",
            lambda c: c["attention"] != "flash_attention_2" or _dtype(c, model) != "float32",
        )
    )
    room = LARGEST_SHARE * machine.memory_bytes
    one = _cache_bytes(target, model, 1) / 1e9
    rules.append(
        Constraint(
            f"weights and cache fit into {room / 1e9:.1f} GB of {machine.name}: about "
            f"{model.parameters / 1e9:.2f} GB of weights for each byte of a number, and a cache of "
            f"{one:.3g} GB for each prompt of a batch in {model.dtype}",
            lambda c: _need_bytes(c, target, model) <= room,
        )
    )
    return tuple(rules)


def _cache_bytes(target: Target, model: Model, batch: int, dtype: str | None = None) -> float:
    tokens = batch * (target.prompt_tokens + target.output_tokens)
    return float(tokens * model.layers * model.kv_width * BYTES[dtype or model.dtype])


def _need_bytes(config: Mapping[str, Value], target: Target, model: Model) -> float:
    """The least memory `config` can do with on the device: what is below may still not fit.

    Weights, the cache of one batch, and with eager attention one layer's scores over the prompt, which are computed
    in the model's dtype and once more in float32.
    """
    dtype, batch = _dtype(config, model), int(config["batch_size"])
    per_weight = {"bnb-8bit": 1.0, "bnb-4bit": 0.5, "torchao-int8": 1.0}.get(str(config.get("quantization")))
    weights = model.weight_bytes if model.quantized else model.parameters * (per_weight or BYTES[dtype])
    share = 0.25 if str(config["cache"]).startswith("quantized") else 0.0 if config.get("cache_offload") else 1.0
    scores = 0.0
    if config["attention"] == "eager":
        heads = model.number("num_attention_heads", "n_head")
        scores = float(batch * heads * target.prompt_tokens**2 * (BYTES[dtype] + 4))
    return weights + share * _cache_bytes(target, model, batch, dtype) + scores


def identity(target: Target) -> dict[str, str]:
    """Engine, versions and model: what must agree before results may meet."""
    model = _model(target)
    return {
        "engine": "transformers",
        "engine_version": f"{_version('transformers')}, torch {_version('torch')}",
        "model": model.name,
        "model_sha256": _fingerprint(model, target.seed),
        "device": _machine().device,
    }


def metrics(target: Target) -> tuple[str, ...]:
    """Figures of its own that limits may be set on."""
    return ("compile_seconds", *(("nll_nats_per_token",) if target.quality else ()))


# --- loading ---------------------------------------------------------------------------------

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # The files are here (`_folder` saw to it): no trial waits for a network.
    "HF_HUB_OFFLINE": "1",
    # Compiling in this process, so that no pool of compilers sits beside the engine during a window.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}

_LIBRARY_ERRORS = (ImportError, LookupError, OSError, RuntimeError, ValueError, TypeError, AttributeError, MemoryError)


@contextmanager
def _named_causes(doing: str) -> Iterator[None]:
    """Whatever the libraries raise in the block, as one sentence; running out of memory is called so."""
    try:
        yield
    except Refused:
        raise
    except (*_LIBRARY_ERRORS, _library("safetensors").SafetensorError) as error:
        raise RuntimeError(_cause(error, doing)) from error


def _cause(error: BaseException, doing: str) -> str:
    told = " ".join(str(error).split())
    # torch.cuda.OutOfMemoryError is torch.OutOfMemoryError since torch 2.5; a CPU's allocator has no class of its own.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in told:
        first = told.split(". ")[0]
        return f"out of memory: {first or 'the machine has no more'}; try a smaller batch_size"
    if len(told) > 400:
        told = f"{told[:397]}..."
    return f"transformers cannot {doing}: {told or type(error).__name__}"


@contextmanager
def launch(config: Config, target: Target) -> Iterator[Generator]:
    """Load, generate the load once to warm up (twice when it is compiled), yield; give everything back afterwards.

    Raises:
        Refused: the model cannot be used or a library is not installed.
        RuntimeError: the libraries cannot load or run this configuration, or ran out of memory; the message is
            theirs, in one sentence.
    """
    with ExitStack() as stack:
        if config.get("compile", "none") != "none":
            # A folder of its own: what compiling takes does not depend on earlier trials, and nothing is left.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tune-compiled-"))
            stack.enter_context(_environment({"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}))
        stack.enter_context(_environment(QUIET))
        torch, transformers = _library("torch"), _library("transformers")
        transformers.utils.logging.disable_progress_bar()
        model = _model(target)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        engine = Generator(config, target, model)
        stack.callback(engine.close)
        with _named_causes("load this configuration"):
            engine.load()
        engine.warm_up()
        yield engine


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables in the block only."""
    kept = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


RECIPE = 1
"""Part of a random model's fingerprint. Raise it when the same seed gives other weights."""

_CHUNK = 2**24
"""Random numbers made at a time: 64 MB of float32, whatever the matrix."""


def _random_weights(config: Any, seed: int, dtype: Any, device: str) -> tuple[Any, dict[str, Any]]:
    """The model's class, and its weights by name: norms 1, biases 0, embeddings N(0, 0.02^2), matrices N(0, 1/inputs).

    Drawn in float32 and rounded, so that every dtype holds the same numbers as well as it can: what a smaller dtype
    costs in quality shows. They are made on `device`: a CPU and a GPU draw other numbers.
    """
    torch, transformers = _library("torch"), _library("transformers")
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    bits = torch.Generator(device=device).manual_seed(seed)
    weights: dict[str, Any] = {}
    for name, parameter in empty.named_parameters():
        if parameter.dim() < 2:
            fill = 0.0 if name.endswith("bias") else 1.0
            weights[name] = torch.full(parameter.shape, fill, dtype=dtype, device=device)
            continue
        sigma = 0.02 if "embed" in name else parameter.shape[-1] ** -0.5
        made = torch.empty(parameter.shape, dtype=dtype, device=device)
        flat = made.view(-1)
        for start in range(0, flat.numel(), _CHUNK):
            part = flat[start : start + _CHUNK]
            part.copy_(torch.randn(part.shape, generator=bits, device=device).mul_(sigma))
        weights[name] = made
    return type(empty), weights


def _quantization_config(name: str, dtype: Any) -> Any:
    """The library's own record of how to quantise while loading; None for what is done otherwise or not at all."""
    transformers = _library("transformers")
    if name == "bnb-8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if name == "bnb-4bit":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if name == "torchao-int8":
        torchao = _library("torchao.quantization")
        return transformers.TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig())
    return None


class _Stamps:
    """A streamer that notes when each step's tokens have reached the host. The prompt comes first and is no step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, tokens: Any) -> None:
        if tokens.dim() == 1:
            self.seconds.append(time.perf_counter())

    def end(self) -> None:
        """The protocol of streamers wants it."""


@dataclass
class _Forced:
    """A logits processor that decodes along given tokens and notes how likely each one was."""

    wanted: Any
    """One row a sequence: the tokens to follow."""
    context: int
    """Tokens of the prompt before them."""
    nats: list[float] = field(default_factory=list)
    """Negative log-likelihood of each token, step by step."""

    def __call__(self, so_far: Any, scores: Any) -> Any:
        torch = _library("torch")
        tokens = self.wanted[:, so_far.shape[1] - self.context].unsqueeze(1)
        likely = torch.log_softmax(scores.double(), dim=-1).gather(1, tokens)
        self.nats += (-likely).flatten().tolist()
        return torch.full_like(scores, -math.inf).scatter_(1, tokens, 0.0)


# --- running it ------------------------------------------------------------------------------


class Generator:
    """A loaded model and the prompts of one pass."""

    def __init__(self, config: Config, target: Target, model: Model) -> None:
        self._config, self._target, self._about = dict(config), target, model
        self._model: Any = None
        self.effective: Mapping[str, Value] = {}
        self.figures: Mapping[str, float] = {}
        draw = random.Random(target.seed)  # noqa: S311 - a reproducible load, no secret
        self._prompts = [draw.choices(model.tokens, k=target.prompt_tokens) for _ in range(target.prompts)]

    # --- before and after

    def load(self) -> None:
        """Put the weights on the device, in the form that the configuration asks for.

        Raises whatever the libraries raise.
        """
        torch, transformers = _library("torch"), _library("transformers")
        about, device = self._about, _machine().device
        dtype = getattr(torch, _dtype(self._config, about))
        quantization = str(self._config.get("quantization", "none"))
        if "threads" in self._config:
            torch.set_num_threads(int(self._config["threads"]))
        how: dict[str, Any] = {"dtype": dtype, "attn_implementation": self._config["attention"]}
        if (quantizer := _quantization_config(quantization, dtype)) is not None:
            how["quantization_config"] = quantizer
        # Straight onto the GPU, where accelerate is there to do it; else by way of the host's memory.
        if device == "cuda" and _installed("accelerate"):
            how["device_map"] = {"": "cuda:0"}
        if about.random:
            settings = dict(about.settings)
            config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
            # transformers' own loader, not the model's constructor: it is what quantises.
            kind, weights = _random_weights(config, self._target.seed, dtype, device)
            self._model = kind.from_pretrained(None, config=config, state_dict=weights, **how)
            del weights
        else:
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                str(about.folder), local_files_only=True, **how
            )
        if device == "cuda" and "device_map" not in how:
            self._model.to("cuda")
        self._model.eval()
        if quantization == "dynamic-int8":
            with warnings.catch_warnings():
                # Both say that torch.ao will go one day; `_quantizations` looks whether it is still there.
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
                torch.ao.quantization.quantize_dynamic(self._model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
        # `generate` fills gaps from here: a checkpoint's own sampling would be mixed in.
        self._model.generation_config = transformers.GenerationConfig()

    def warm_up(self) -> None:
        """Generate the load once, and see what really runs; compile first where that is asked for.

        What compiling takes is what the first pass takes longer than the second one.
        """
        graphs = _graphs()
        started = time.perf_counter()
        self.run_pass()
        first, compiled = time.perf_counter() - started, 0.0
        if self._config.get("compile", "none") != "none":
            started = time.perf_counter()
            self.run_pass()
            compiled = max(0.0, first - (time.perf_counter() - started))
        self.figures = {"compile_seconds": compiled}
        self.effective = self._read_back(compiled_graphs=_graphs() - graphs)

    def close(self) -> None:
        """Forget the model and what was compiled of it; may be called twice."""
        torch = _library("torch")
        self._model = None
        if self._config.get("compile", "none") != "none":
            _library("torch._dynamo").reset()
        # Modules refer to each other in cycles.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- the load

    def run_pass(self) -> Work:
        """Generate for every prompt, a batch after the other.

        Raises:
            RuntimeError: out of memory, or the engine did other work than was asked for.
        """
        prefill = decode = 0.0
        requests: list[float] = []
        firsts: list[float] = []
        gaps: list[float] = []
        units = read = 0
        size = int(self._config["batch_size"])
        with _named_causes("generate"):
            for start in range(0, len(self._prompts), size):
                batch = self._prompts[start : start + size]
                stamps = _Stamps()
                began = time.perf_counter()
                done = self._generate(batch, self._target.output_tokens, streamer=stamps)
                ended = time.perf_counter()
                rows, length = done.sequences.shape
                if (rows, length, len(stamps.seconds)) != (
                    len(batch),
                    self._target.prompt_tokens + self._target.output_tokens,
                    self._target.output_tokens,
                ):
                    raise RuntimeError(
                        f"{rows} sequences of {length} tokens in {len(stamps.seconds)} steps came back; asked for "
                        f"{len(batch)} of {self._target.prompt_tokens}+{self._target.output_tokens} tokens"
                    )
                units += rows * len(stamps.seconds)
                read += rows * (length - len(stamps.seconds))
                first = stamps.seconds[0] - began
                prefill += rows * first
                decode += rows * (stamps.seconds[-1] - stamps.seconds[0])
                requests += [ended - began] * rows
                firsts += [first] * rows
                steps = zip(stamps.seconds, stamps.seconds[1:], strict=False)
                gaps += [after - before for before, after in steps for _ in range(rows)]
        return Work(
            units=units,
            prompt_tokens=read,
            prefill_seconds=prefill,
            decode_seconds=decode,
            request_seconds=tuple(requests),
            ttft_seconds=tuple(firsts),
            itl_seconds=tuple(gaps),
        )

    def change(self, config: Config) -> None:
        """Go on with another batch size or thread count.

        Raises:
            RuntimeError: more than these differ, or the model is compiled, which fixes both: launch anew.
        """
        differ = {name for name in config if config[name] != self._config.get(name)}
        if not differ <= {"batch_size", "threads"}:
            raise RuntimeError(f"{', '.join(sorted(differ - {'batch_size', 'threads'}))}: needs a new launch")
        if differ and self._config.get("compile", "none") != "none":
            raise RuntimeError("a compiled model is made for its batch size and threads: needs a new launch")
        if "threads" in differ:
            _library("torch").set_num_threads(int(config["threads"]))
        self._config = dict(config)
        self.effective = {**self.effective, **_live(self._config)}
        if differ:
            # Buffers of the new size come with the first work.
            self.run_pass()

    def _generate(self, prompts: Any, output_tokens: int, **more: Any) -> Any:
        torch, transformers = _library("torch"), _library("transformers")
        ids = torch.tensor(prompts, device=self._model.device)
        how = {"do_sample": False, **more.pop("sampling", {})}
        settings = transformers.GenerationConfig(
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            # No end of sequence: nothing stops early. Nothing is padded either, but some id is wanted.
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
            return_dict_in_generate=True,
            **how,
            **_cache_settings(self._config),
            **self._compile_settings(),
        )
        return self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, **more)

    def _compile_settings(self) -> dict[str, Any]:
        """On a GPU `generate` compiles for a static cache unless told not to; on a CPU it has to be told to."""
        mode = self._config.get("compile", "none")
        if mode == "none":
            return {"disable_compile": True}
        wanted = _library("transformers").CompileConfig(mode=mode)
        wanted._compile_all_devices = True
        return {"compile_config": wanted}

    def _read_back(self, compiled_graphs: int) -> dict[str, Value]:
        """What the loaded model says of itself, and which cache a short run of it used."""
        with _named_causes("generate"):
            output = self._generate(self._prompts[:1], 1)
        # `past_key_values` until transformers 5.2x, `cache` since.
        cache = next((v for k, v in output.items() if k in ("cache", "past_key_values")), None)
        compiled = self._config.get("compile", "none") if compiled_graphs else "none"
        said: dict[str, Value] = {
            **_live(self._config),
            "device": self._model.device.type,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "attention": str(self._model.config._attn_implementation),
            "cache": _cache_name(cache),
            "quantization": _quantization_of(self._model),
            "compile": compiled,
        }
        if "cache_offload" in self._config:
            said["cache_offload"] = bool(getattr(cache, "offloading", False))
        return said

    # --- how good it is

    def quality(self, reference: Path) -> Mapping[str, float]:
        """Mean negative log-likelihood of fixed tokens, decoded along them with this cache, attention and dtype.

        Raises:
            RuntimeError: `reference` is damaged, or the likelihood is no number.
        """
        return judge(reference, self._passage, self._nats)

    def _nats(self, passage: Passage) -> list[float]:
        with _named_causes("judge its output"):
            wanted = _library("torch").tensor(passage.judged, device=self._model.device)
            forced = _Forced(wanted, passage.context)
            self._generate(passage.openings, wanted.shape[1], logits_processor=[forced])
        return forced.nats

    def _passage(self) -> Passage:
        most = self._about.context or TOKENS
        return of_text(self._text_ids(), most) or drawn(self._about.tokens, self._target.seed, self._go_on, most)

    def _go_on(self, openings: list[list[int]], count: int) -> list[list[int]]:
        with _named_causes("judge its output"):
            _library("torch").manual_seed(self._target.seed)
            sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            output = self._generate(openings, count, sampling=sampling)
        rows: list[list[int]] = output.sequences[:, len(openings[0]) :].tolist()
        return rows

    def _text_ids(self) -> list[int]:
        """The fixed text in the model's own tokens; empty where it has no tokenizer."""
        if self._about.random or self._about.folder is None:
            return []
        if not any((self._about.folder / name).exists() for name in TOKENIZER_FILES):
            return []
        with _named_causes("load its tokenizer"):
            tokenizer = _library("transformers").AutoTokenizer.from_pretrained(
                str(self._about.folder), local_files_only=True
            )
            ids: list[int] = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        return ids


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def _live(config: Mapping[str, Value]) -> dict[str, Value]:
    """What can change while the model is loaded."""
    said: dict[str, Value] = {"batch_size": config["batch_size"]}
    if "threads" in config:
        said["threads"] = int(_library("torch").get_num_threads())
    return said


def _cache_settings(config: Mapping[str, Value]) -> dict[str, Any]:
    name = str(config["cache"])
    if name.startswith("quantized-"):
        return {"cache_implementation": "quantized", "cache_config": {"backend": name.removeprefix("quantized-")}}
    if config.get("cache_offload"):
        return {"cache_implementation": {"dynamic": "offloaded", "static": "offloaded_static"}[name]}
    return {"cache_implementation": name}


def _cache_name(cache: Any) -> str:
    kind = type(cache).__name__
    if kind == "QuantizedCache":
        layer = type(cache.layers[0]).__name__
        return next((name for name, own in QUANTIZED_CACHES.items() if own == layer), layer)
    return {"DynamicCache": "dynamic", "StaticCache": "static"}.get(kind, kind)


def _quantization_of(model: Any) -> str:
    """From the layers that the model really has."""
    kinds = {f"{type(m).__module__}.{type(m).__name__}" for m in model.modules()}
    weights = {type(p).__module__ for p in model.parameters()}
    if any(k.endswith("Linear8bitLt") for k in kinds):
        return "bnb-8bit"
    if any(k.endswith("Linear4bit") for k in kinds):
        return "bnb-4bit"
    if any(k.startswith("torch.ao.nn.quantized.dynamic") for k in kinds):
        return "dynamic-int8"
    if any(module.startswith("torchao") for module in weights):
        return "torchao-int8"
    return "none"


def _graphs() -> int:
    """How many graphs have been compiled in this process so far."""
    if "torch._dynamo" not in sys.modules:
        return 0
    return int(_library("torch._dynamo.utils").counters["stats"]["unique_graphs"])


# --- the same without tuner ------------------------------------------------------------------


def _statements(config: Mapping[str, Value], target: Target) -> tuple[list[str], list[str]]:
    """Imports and simple statements of a script that reads a prompt from each line and prints what follows it.

    Texts become Python literals by `repr`: a model's name cannot end a string. A generated model has no tokenizer, so
    its script makes the weights anew and generates for random prompts. No statement is compound: they also make
    one line.
    """
    model, device = _model(target), _machine().device
    quantization = str(config.get("quantization", "none"))
    dtype = f"torch.{_dtype(config, model)}"
    how = [f"dtype={dtype}", f"attn_implementation={config['attention']!r}"]
    names = ["AutoModelForCausalLM", "GenerationConfig"]
    imports = ["import torch"] if model.random else ["import sys", "import torch"]
    if quantization.startswith("bnb"):
        names.append("BitsAndBytesConfig")
        bits = (
            "load_in_8bit=True"
            if quantization == "bnb-8bit"
            else f"load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype={dtype}"
        )
        how.append(f"quantization_config=BitsAndBytesConfig({bits})")
    if quantization == "torchao-int8":
        names.append("TorchAoConfig")
        imports.append("from torchao.quantization import Int8DynamicActivationInt8WeightConfig")
        how.append("quantization_config=TorchAoConfig(Int8DynamicActivationInt8WeightConfig())")
    body = [f"torch.set_num_threads({config['threads']})"] if "threads" in config else []
    if model.random:
        names.append("AutoConfig")
        settings = {k: v for k, v in model.settings.items() if k not in ("architectures", "model_type")}
        kind = str(model.settings.get("model_type", "llama"))
        if model.folder is None:
            body.append(f"config = AutoConfig.for_model({kind!r}, **{settings!r})")
        else:
            body.append(f"config = AutoConfig.from_pretrained({target.model!r})")
        plain = [word for word in how if not word.startswith("quantization_config")]
        body.append(f"model = AutoModelForCausalLM.from_config(config, {', '.join(plain)})")
        if len(plain) < len(how):
            # Weights are quantised by the loader only; it takes them from memory too.
            body.append(f"loaded = {{'config': config, 'state_dict': model.state_dict(), {', '.join(_pairs(how))}}}")
            body.append("model = type(model).from_pretrained(None, **loaded)")
        if not quantization.startswith("bnb"):
            body[-1] += f".to({device!r})"
    else:
        names.append("AutoTokenizer")
        place = repr(str(model.folder) if Path(str(target.model)).expanduser().is_dir() else target.model)
        body += [
            f"tokenizer = AutoTokenizer.from_pretrained({place}, padding_side='left')",
            "tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token",
            f"model = AutoModelForCausalLM.from_pretrained({place}, {', '.join(how)})",
        ]
        if not quantization.startswith("bnb"):
            body[-1] += f".to({device!r})"
    body.append("model.eval()")
    if quantization == "dynamic-int8":
        body.append("torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8, inplace=True)")
    generation = [f"max_new_tokens={target.output_tokens}", "do_sample=False"]
    generation += [f"{key}={value!r}" for key, value in _cache_settings(config).items()]
    if config.get("compile", "none") == "none":
        generation.append("disable_compile=True")
    else:
        names.append("CompileConfig")
        body.append(f"compiled = CompileConfig(mode={config['compile']!r})")
        if device == "cpu":
            body.append("compiled._compile_all_devices = True")
        generation.append("compile_config=compiled")
    generation.append("pad_token_id=0" if model.random else "pad_token_id=tokenizer.pad_token_id")
    body.append(f"settings = GenerationConfig({', '.join(generation)})")
    size = config["batch_size"]
    if model.random:
        low, high = model.tokens[0], model.tokens[-1]
        body += [
            f"prompts = torch.randint({low}, {high}, ({target.prompts}, {target.prompt_tokens}), device={device!r})",
            "mask = torch.ones_like(prompts)",
            "generate = lambda ids: model.generate(ids, attention_mask=mask[:len(ids)], generation_config=settings)",
            f"outputs = [generate(batch).shape for batch in prompts.split({size})]",
            "print(outputs)",
        ]
    else:
        body += [
            "prompts = sys.stdin.read().splitlines()",
            f"batches = [prompts[i : i + {size}] for i in range(0, len(prompts), {size})]",
            f"encode = lambda batch: tokenizer(batch, return_tensors='pt', padding=True).to({device!r})",
            "generate = lambda batch: model.generate(**encode(batch), generation_config=settings)",
            "texts = [t for b in batches for t in tokenizer.batch_decode(generate(b), skip_special_tokens=True)]",
            r"print(*texts, sep='\n')",
        ]
    imports.append(f"from transformers import {', '.join(sorted(names))}")
    return imports, body


def _pairs(arguments: Sequence[str]) -> list[str]:
    """`name=value` as the item of a dictionary's literal."""
    return [f"{name!r}: {value}" for name, _, value in (word.partition("=") for word in arguments)]


def command(config: Config, target: Target) -> str:
    """A `python -c` command that runs `config`: prompts come in as lines, what follows them goes out.

    `transformers serve` has no words for batch size and cache, so it cannot stand for a configuration. The conditions
    of the measurement (no end of sequence, prompts of equal length) are not part of it.
    """
    return shlex.join(service(config, target).argv)


def service(config: Config, target: Target) -> Service:
    """A script for good, and the same as a command."""
    model = _model(target)
    reads = "random prompts, with random weights" if model.random else "the prompts on standard input, one a line"
    line, python = python_forms(f"Generates for {reads}.", *_statements(config, target))
    return Service(
        argv=(sys.executable, "-c", line),
        env={"HF_HUB_DISABLE_TELEMETRY": "1"},
        paths=(str(model.folder),) if model.folder else (),
        gpus=_machine().device == "cuda",
        python=python,
    )
