"""A model as Hugging Face's libraries keep it, a folder with a `config.json`: what it says about its size.

For engines that load such folders themselves (vLLM, SGLang). Nothing is downloaded, and neither torch nor transformers
is imported. Without a model a folder with the configuration and the tokenizer of a small Llama is written, whose
weights the engine draws itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.installed import cache_folder
from tuner.serving import cut
from tuner.space import Constraint, Refused, Value, powers_of_two
from tuner.trial import Target

GIB = 2**30

OVERHEAD_BYTES = GIB
"""What a GPU holds beside weights and cache: the CUDA context and the activations of a step, at least."""


@dataclass(frozen=True)
class Shape:
    """The shape of a generated Llama model. Heads are 64 wide: every attention kernel takes that."""

    label: str
    width: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    context: int = 4096


SIZES: Mapping[str, Shape] = {
    "15m": Shape("15M", width=256, layers=8, heads=4, feed_forward=768, vocabulary=16000),
    "160m": Shape("160M", width=768, layers=12, heads=12, feed_forward=3072, vocabulary=32000),
}
"""The models that `--size` can name."""

DEFAULT_SIZE = "15m"

RECIPE = 1
"""Part of a generated folder's name. Raise it when its files change."""

BYTES_OF: Mapping[str, int] = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


@dataclass(frozen=True)
class Model:
    """What a model's configuration says about its size."""

    name: str
    folder: Path
    generated: Shape | None
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    cache_values_per_token: int
    """Numbers that one token leaves in the cache, over all layers and heads."""
    weights: int
    """Number of weights, from the files' size or the shape; quantised, as many of `dtype` as its room takes."""
    dtype: str
    quantised: str | None
    """The method that its weights are quantised with already."""
    latent: bool = False
    """Whether its cache is a compressed one for all heads (multi-head latent attention)."""
    experts: bool = False
    """Whether a token passes through some of its feed-forward parts only."""


def read(target: Target) -> Model:
    """The model to load, written first where it is a generated one and not there yet.

    Raises:
        Refused: there is no such model here, or its `config.json` describes none.
    """
    if target.model is None:
        size = target.size or DEFAULT_SIZE
        if size not in SIZES:
            raise Refused(f"--size {size}: expected one of {', '.join(SIZES)}")
        return _read_model(f"generated llama {SIZES[size].label}", _generated(SIZES[size]), SIZES[size], dummy=True)
    if target.size is not None:
        raise Refused(f"--size {target.size} makes a model and --model {target.model} names one: leave one of them out")
    return _read_model(target.model, _folder(target.model), None, dummy=target.dummy_weights)


def _folder(name: str) -> Path:
    """A folder with a config.json: the one that is named, or the one in Hugging Face's cache."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise Refused(f"--model {name}: expected a folder with a config.json or a model's id, got a file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise Refused(f"--model {name}: no such folder; leave --model out to tune with a generated model")
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    with suppress(OSError):
        snapshot = hub / "snapshots" / (hub / "refs" / "main").read_text().strip()
        if (snapshot / "config.json").exists():
            return snapshot
    # A download inside a trial would take its time limit, and the model's size would not be known before.
    raise Refused(f"--model {name}: it is not in {hub.parent}; download it first: hf download {name}")


def _read_model(name: str, folder: Path, generated: Shape | None, *, dummy: bool) -> Model:
    path = folder / "config.json"
    try:
        whole: dict[str, Any] = json.loads(path.read_text())
        of = _text(whole)
        layers, heads, width = (int(of[key]) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
        kv_heads = int(of.get("num_key_value_heads") or heads)
        head_width = int(of.get("head_dim") or width // heads)
        per_layer = 2 * kv_heads * head_width
        if of.get("kv_lora_rank"):
            # Multi-head latent attention keeps one compressed vector and one rotary key for all heads.
            per_layer = int(of["kv_lora_rank"]) + int(of.get("qk_rope_head_dim") or 0)
        dtype = str(of.get("dtype") or of.get("torch_dtype") or "float32").removeprefix("torch.")
        quantisation = of.get("quantization_config") or {}
        vocabulary = int(of["vocab_size"])
        # Drawn weights have the shape's number, whatever lies beside it.
        stored = 0 if dummy else sum(path.stat().st_size for path in weight_files(folder))
        stored = stored or round(parameters(whole) * stored_bytes(whole, dtype))
        return Model(
            name=name,
            folder=folder,
            generated=generated,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            vocabulary=vocabulary,
            context=int(of.get("max_position_embeddings") or 0),
            cache_values_per_token=layers * per_layer,
            weights=stored // BYTES_OF.get(dtype, 2),
            latent=bool(of.get("kv_lora_rank")),
            experts=bool(_number(of, *EXPERTS)),
            dtype=dtype,
            quantised=str(quantisation.get("quant_method")) if quantisation else None,
        )
    except FileNotFoundError as error:
        raise Refused(f"--model {name}: expected a config.json in {folder}, there is none") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise Refused(f"--model {name}: {path} does not describe a language model ({cut(str(error), 80)})") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that an engine loads: those that the index names, else all safetensors, else pickles.

    Some models come twice in one folder, `consolidated.safetensors` beside the shards of the index.
    """
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            named = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            if found := [folder / name for name in named if (folder / name).is_file()]:
                return found
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


TIED = frozenset(
    {
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "opt",
        "bloom",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "cohere",
        "mpt",
    }
)
"""Kinds whose output layer is the embedding where the file does not say; it names only what differs from the kind's own
default."""

PLAIN = frozenset(
    {
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "opt",
        "bloom",
        "falcon",
        "phi",
        "starcoder2",
        "codegen",
        "mpt",
    }
)
"""Kinds whose feed-forward has two matrices; all others are taken to have the three of a gated one."""


LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

SPARSE = frozenset(
    {
        "mixtral",
        "llama4",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "deepseek_v2",
        "deepseek_v3",
        # Moonshot's name for DeepSeek's.
        "kimi_k2",
        "glm4_moe",
        "ernie4_5_moe",
        "gpt_oss",
        "granitemoe",
        "olmoe",
        "phimoe",
        "minimax_m2",
    }
)
"""Kinds with experts whose layers are known."""


def parameters(settings: Mapping[str, Any]) -> int:
    """Weights of a decoder-only language model, counted from its `config.json`; 0 where that names no shape.

    Embeddings and matrices: attention with grouped heads or a compressed cache (multi-head latent attention),
    feed-forward, experts and what they share. Norms and biases, some thousandths, are left out, and so is a vision
    part: what is counted is there. Where it is not known which layers have experts, one expert a layer is counted.
    """
    of = _text(settings)
    width, layers = _number(of, "hidden_size", "n_embd", "d_model"), _number(of, *LAYERS)
    heads = _number(of, "num_attention_heads", "n_head", "num_heads", "n_heads")
    vocabulary = _number(of, "vocab_size")
    if not (width and layers and heads and vocabulary):
        return 0
    kind = str(of.get("model_type") or settings.get("model_type")).removesuffix("_text")
    one_head = of.get("multi_query") and not of.get("new_decoder_architecture")
    kv_heads = 1 if one_head else _number(of, "num_key_value_heads", "num_kv_heads") or heads
    head = _number(of, "head_dim") or width // heads
    attention = 2 * width * heads * head + 2 * width * kv_heads * head
    if latent := _number(of, "kv_lora_rank"):
        rotary, plain = _number(of, "qk_rope_head_dim"), _number(of, "qk_nope_head_dim")
        value, query = _number(of, "v_head_dim"), _number(of, "q_lora_rank")
        queries = heads * (plain + rotary)
        attention = (query * (width + queries) if query else width * queries) + width * (latent + rotary)
        attention += heads * (latent * (plain + value) + value * width)
    feed_forward = layers * (2 if kind in PLAIN else 3) * width * _inner(of, width)
    if experts := _number(of, *EXPERTS):
        feed_forward = _with_experts(of, kind, width, layers, experts)
    tied = of.get("tie_word_embeddings", settings.get("tie_word_embeddings", kind in TIED))
    learned = kind in ("gpt2", "gpt_bigcode", "gpt_neo", "opt")
    positions = _number(of, "n_positions", "max_position_embeddings") if learned else 0
    return (1 if tied else 2) * vocabulary * width + positions * width + layers * attention + feed_forward


def _with_experts(of: Mapping[str, Any], kind: str, width: int, layers: int, experts: int) -> int:
    """Weights of the feed-forward parts of a model of which some or all layers have experts."""
    dense = _inner(of, width)
    each = _number(of, "moe_intermediate_size") or dense
    if kind not in SPARSE:
        return layers * 3 * width * min(each, dense)
    shared = _number(of, "shared_expert_intermediate_size")
    shared = shared or _number(of, "n_shared_experts", "moe_num_shared_experts") * each
    if kind == "llama4":
        dense, shared = _number(of, "intermediate_size_mlp") or dense, each
    sparse = _sparse_layers(of, layers)
    return width * (sparse * (3 * (experts * each + shared) + experts) + (layers - sparse) * 3 * dense)


def _sparse_layers(of: Mapping[str, Any], layers: int) -> int:
    """How many layers have experts, by whatever fields the kind says it with (transformers 5, DeepSeek's own code)."""
    if listed := of.get("mlp_layer_types"):
        return sum(kind == "sparse" for kind in listed)
    if listed := of.get("moe_layers"):
        return len(listed)
    every = of.get("moe_layer_freq")
    if isinstance(every, list):
        return sum(bool(flag) for flag in every)
    step = _number(of, "interleave_moe_layer_step", "decoder_sparse_step", "moe_layer_interval") or 1
    first = _number(of, "first_k_dense_replace", "moe_layer_start_index")
    last = _number(of, "moe_layer_end_index") or layers - 1
    dense = frozenset(of.get("mlp_only_layers") or ())
    every = _number(of, "moe_layer_freq") or 1
    return sum((i + 1) % step == 0 and i % every == 0 and i not in dense for i in range(first, min(last + 1, layers)))


def _inner(of: Mapping[str, Any], width: int) -> int:
    """Width inside a layer's feed-forward part."""
    return _number(of, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * width


def _number(of: Mapping[str, Any], *names: str) -> int:
    """The first of these fields that is a positive integer; 0 where none is."""
    found = (of.get(name) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), 0)


def _text(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the language part: models that see keep them one level down."""
    inner = settings.get("text_config")
    return {**settings, **(inner if isinstance(inner, Mapping) else {})}


def stored_bytes(settings: Mapping[str, Any], dtype: str) -> float:
    """Bytes of one weight as the configuration says it is kept: in its type, or in the bits it is quantised to."""
    quantised = settings.get("quantization_config") or {}
    if not quantised:
        return BYTES_OF.get(dtype, 2)
    bits = quantised.get("bits") or quantised.get("weight_bits")
    bits = bits or (8 if quantised.get("load_in_8bit") or "8" in str(quantised.get("quant_method")) else 4)
    return float(bits) / 8


def _generated(shape: Shape) -> Path:
    """The folder of a generated model, written first unless it is there.

    The tokenizer is a list of words: prompts go out as token ids, and of the output only its length counts.
    """
    folder = cache_folder() / "models" / f"vllm-llama-{shape.label.lower()}-r{RECIPE}"
    if (folder / "config.json").exists():
        return folder
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"\u2581w{i}": 3 + i for i in range(shape.vocabulary - 3)}
    spaces = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    files = {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": text, **special} for text, i in list(vocabulary.items())[:3]],
            "normalizer": None,
            "pre_tokenizer": spaces,
            "post_processor": None,
            "decoder": spaces,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": shape.context,
        },
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": shape.width,
            "intermediate_size": shape.feed_forward,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": shape.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        },
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
        try:
            for name, content in files.items():
                (part / name).write_text(json.dumps(content))
            with suppress(FileExistsError, OSError):  # somebody else has written the same files meanwhile
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        (folder / "config.json").stat()
    except OSError as error:
        raise Refused(
            f"the generated model needs 1 MB in {folder.parent}, which cannot be written ({error.strerror}); make room "
            "there or set XDG_CACHE_HOME to another folder"
        ) from error
    return folder


def fingerprint(model: Model) -> str:
    """SHA-256 over the configuration and, of each file of weights, name, size and first MiB."""
    digest = hashlib.sha256((model.folder / "config.json").read_bytes())
    for path in weight_files(model.folder):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()


def is_dummy(target: Target) -> bool:
    """Whether the engine draws the weights itself."""
    return target.dummy_weights or target.model is None


def weight_bytes(model: Model, config: Mapping[str, Value]) -> float:
    """Of all weights under `config`."""
    # The number was counted from the files' bytes, as if each weight had the model's own width.
    if model.quantised is not None:
        return model.weights * BYTES_OF.get(model.dtype, 2)
    method = config.get("quantization", "none")
    # Other methods than the one that is tuned can be named by --engine-arg; none leaves less than four bits.
    return model.weights * (_width(model, config) if method == "none" else 1 if method == "fp8" else 0.5)


def cache_bytes(model: Model, config: Mapping[str, Value], tokens: int) -> float:
    """Of keys and values of so many tokens under `config`."""
    whole = config.get("kv_cache_dtype", "auto") in ("auto", "bf16", *BYTES_OF)
    return model.cache_values_per_token * (_width(model, config) if whole else 1) * tokens


def _width(model: Model, config: Mapping[str, Value]) -> int:
    """Bytes of a number. `auto` runs 32-bit models with 16 bits."""
    dtype = str(config.get("dtype", "auto"))
    if dtype == "auto":
        return min(2, BYTES_OF.get(model.dtype, 2))
    return BYTES_OF.get(dtype, 2)


def needed_bytes(model: Model, config: Mapping[str, Value], context: int) -> float:
    """What one GPU must hold at least: its part of the weights, and of the cache of one request.

    GPUs share a cache by its heads; where they are more than it has heads, some hold the same ones. Stages of a
    pipeline share the layers; of each GPU's part of the weights `cpu_offload_gb` GiB may stay in main memory.
    """
    # An engine says itself that it takes no 0.
    gpus = max(1, int(config.get("tensor_parallel_size", 1)))
    stages = max(1, int(config.get("pipeline_parallel_size", 1)))
    parts = 1 if model.latent else min(gpus, model.kv_heads)
    weights = max(0.0, weight_bytes(model, config) / gpus / stages - float(config.get("cpu_offload_gb", 0)) * GIB)
    return weights + cache_bytes(model, config, context) / parts / stages + OVERHEAD_BYTES


SIZE_NUMBERS: Mapping[str, type[int | float]] = {
    "tensor_parallel_size": int,
    "pipeline_parallel_size": int,
    "data_parallel_size": int,
    "cpu_offload_gb": float,
}
"""What a model's room on a GPU depends on and is a number."""


def tensor_widths(model: Model, gpus: int, fixed: Mapping[str, Value]) -> tuple[int, ...]:
    """Numbers of GPUs that may share each layer; 1 alone where no other could.

    Args:
        model: what is loaded.
        gpus: those of the machine.
        fixed: what `--engine-arg` says: each stage of a pipeline and each copy of the model takes as many.
    """
    each = max(1, int(fixed.get("pipeline_parallel_size", 1))) * max(1, int(fixed.get("data_parallel_size", 1)))
    widths = powers_of_two(1, max(1, gpus // each))
    return widths if any(divides(model, width) for width in widths[1:]) else (1,)


def divides(model: Model, gpus: int) -> bool:
    """Whether so many GPUs can share the model's heads.

    Each has as many query heads as the others, and whole key-value heads or the same one as some others
    (`QKVParallelLinear` of vLLM and SGLang).
    """
    shared = model.kv_heads % gpus == 0 or gpus % model.kv_heads == 0
    return model.heads % gpus == 0 and (model.latent or shared)


def heads_rule(model: Model, name: str, given: int) -> Constraint:
    """That the GPUs of parameter `name`, where it is not tuned `given`, can share the model's heads."""
    kv = f" and {model.kv_heads} key-value heads" if model.kv_heads != model.heads and not model.latent else ""
    return Constraint(
        f"{name} divides the {model.heads} attention heads{kv} of {model.name} into equal whole parts",
        lambda c: int(c.get(name, given)) > 0 and divides(model, int(c.get(name, given))),
    )


def describe(target: Target, engine: str, notes: Sequence[str]) -> str:
    """One line that says what is being run.

    Args:
        target: what to run.
        engine: its name and version.
        notes: what is left out, and why.
    """
    model = read(target)
    size = f"{model.weights / 1e9:.1f}G" if model.weights >= 1e9 else f"{round(model.weights / 1e6)}M"
    said = f"{engine}, model: {model.name} ({size} weights, {model.layers} layers"
    if is_dummy(target):
        said += ", drawn at random: speed and energy are those of its shape, its text is meaningless"
        if target.quality:
            notes = [*notes, f"no quality_loss: {not_judged(engine)}"]
    return "; ".join([f"{said})", *notes])


def not_judged(engine: str) -> str:
    """Why what an engine says with weights that it draws is not judged."""
    return f"weights that {engine.split()[0]} draws predict every token alike, so judge with a trained --model"


def metrics(target: Target) -> tuple[str, ...]:
    """Figures of an engine's own that limits may be set on."""
    return ("nll_nats_per_token",) if target.quality and not is_dummy(target) else ()


def lacks(target: Target, engine: str) -> dict[str, str]:
    """Figures that an engine never reports, and why."""
    return {"quality_loss": f"{not_judged(engine)} or leave the limit out"} if is_dummy(target) else {}


def ordinary(model: Model) -> range:
    """Ids of ordinary tokens: specials and bytes come first in a vocabulary, added tokens last."""
    return range(min(500, model.vocabulary // 2), max(model.vocabulary * 9 // 10, model.vocabulary // 2 + 1))
