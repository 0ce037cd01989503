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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.installed import cache_folder
from tuner.serving import cut
from tuner.space import Refused, Value
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
    """Number of weights, from the files' size or the shape."""
    dtype: str
    quantised: str | None
    """The method that its weights are quantised with already."""


def read(target: Target) -> Model:
    """The model to load, written first where it is a generated one and not there yet.

    Raises:
        Refused: there is no such model here, or its `config.json` describes none.
    """
    if target.model is None:
        size = target.size or DEFAULT_SIZE
        if size not in SIZES:
            raise Refused(f"--size {size}: expected one of {', '.join(SIZES)}")
        return _read_model(f"generated llama {SIZES[size].label}", _generated(SIZES[size]), SIZES[size])
    if target.size is not None:
        raise Refused(f"--size {target.size} makes a model and --model {target.model} names one: leave one of them out")
    return _read_model(target.model, _folder(target.model), None)


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


def _read_model(name: str, folder: Path, generated: Shape | None) -> Model:
    path = folder / "config.json"
    try:
        whole: dict[str, Any] = json.loads(path.read_text())
        # Models that see keep the language model's shape one level down.
        of: dict[str, Any] = {**whole, **whole.get("text_config", {})}
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
        files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
        weights = sum(p.stat().st_size for p in files) // BYTES_OF.get(dtype, 2) or _weights(of, width, layers)
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
            weights=weights,
            dtype=dtype,
            quantised=str(quantisation.get("quant_method")) if quantisation else None,
        )
    except FileNotFoundError as error:
        raise Refused(f"--model {name}: expected a config.json in {folder}, there is none") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise Refused(f"--model {name}: {path} does not describe a language model ({cut(str(error), 80)})") from error


def _weights(of: Mapping[str, Any], width: int, layers: int) -> int:
    """Weights of a Llama-like transformer, from its shape: embedding, output, attention, gated feed-forward."""
    experts = int(of.get("num_local_experts") or of.get("num_experts") or of.get("n_routed_experts") or 1)
    feed_forward = int(of.get("moe_intermediate_size") or of.get("intermediate_size") or 4 * width)
    embeddings = (1 if of.get("tie_word_embeddings") else 2) * int(of["vocab_size"]) * width
    return embeddings + layers * (4 * width * width + 3 * width * feed_forward * experts)


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
    for path in sorted([*model.folder.glob("*.safetensors"), *model.folder.glob("*.bin")]):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()


def is_dummy(target: Target) -> bool:
    """Whether the engine draws the weights itself."""
    return target.dummy_weights or target.model is None


def needed_bytes(model: Model, config: Mapping[str, Value], context: int) -> float:
    """What one GPU must hold at least."""
    dtype = str(config.get("dtype", "auto"))
    width = BYTES_OF.get(model.dtype, 2) if dtype == "auto" else BYTES_OF[dtype]
    # `auto` runs 32-bit models with 16 bits.
    width = 2 if dtype == "auto" and width == 4 else width
    weights = model.weights * (1 if config.get("quantization") == "fp8" else width)
    if model.quantised is not None:
        # The number was counted from the files' bytes, as if each weight had the model's own width.
        weights = model.weights * BYTES_OF.get(model.dtype, 2)
    cached = 1 if str(config.get("kv_cache_dtype", "auto")).startswith("fp8") else width
    cache = model.cache_values_per_token * cached * context
    return (weights + cache) / int(config.get("tensor_parallel_size", 1)) + OVERHEAD_BYTES


def ordinary(model: Model) -> range:
    """Ids of ordinary tokens: specials and bytes come first in a vocabulary, added tokens last."""
    return range(min(500, model.vocabulary // 2), max(model.vocabulary * 9 // 10, model.vocabulary // 2 + 1))
