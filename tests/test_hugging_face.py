"""What a model's folder says about its size: weights counted from its shape, files that are loaded, heads."""

import importlib.util
import json

import pytest

from tuner.models import hugging_face
from tuner.models.hugging_face import Model, cache_bytes, divides, needed_bytes, parameters, stored_bytes, weight_files

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
}


SHAPES = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 128, "tie_word_embeddings": True},
    "gemma": {**LLAMA, "num_key_value_heads": 1, "head_dim": 256},
    "mixtral": {**LLAMA, "num_local_experts": 8},
    "qwen3_moe": {**LLAMA, "num_experts": 64, "moe_intermediate_size": 768},
    "deepseek_v3": {"num_hidden_layers": 6},
    "phi": {**LLAMA, "num_key_value_heads": 32},
    "gpt_neox": {**LLAMA, "num_key_value_heads": 32},
    "gpt2": {},
    "opt": {},
    "falcon": {},
    "bloom": {"hidden_size": 1024, "n_layer": 24, "n_head": 16},
}
"""Kinds of models, with what differs from the library's own default shape of that kind."""


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SHAPES)
def test_the_weights_of_a_shape_are_those_of_the_librarys_model(kind):
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(kind, **{k: v for k, v in SHAPES[kind].items() if k != "model_type"})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    there = sum(p.numel() for p in model.parameters())
    # A file as save_pretrained writes it names tied embeddings only where the kind's own default is another.
    written = {k: v for k, v in config.to_dict().items() if k != "tie_word_embeddings" or k in config.to_diff_dict()}
    assert 0.998 * there <= parameters(written) <= there


def test_the_language_part_of_a_model_that_sees_is_counted():
    assert parameters({"model_type": "llava", "text_config": LLAMA}) == parameters(LLAMA)


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_file_that_names_no_shape_counts_nothing(missing):
    assert parameters({name: value for name, value in LLAMA.items() if name != missing}) == 0


@pytest.mark.parametrize(
    ("quantised", "expected"),
    [
        (None, 2),
        ({"quant_method": "gptq", "bits": 4}, 0.5),
        ({"quant_method": "fp8"}, 1),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 1),
        ({"quant_method": "awq"}, 0.5),
    ],
)
def test_a_quantised_weight_takes_the_bits_that_the_file_says(quantised, expected):
    assert stored_bytes({**LLAMA, "quantization_config": quantised}, "bfloat16") == expected


@pytest.mark.parametrize(
    ("there", "loaded"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["a-1.safetensors", "a-2.safetensors", "pytorch_model.bin"], ["a-1.safetensors", "a-2.safetensors"]),
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (["training_args.bin"], []),
    ],
)
def test_only_files_that_are_loaded_count(tmp_path, there, loaded):
    for name in there:
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in weight_files(tmp_path)] == loaded


def test_the_index_says_which_files_are_loaded(tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]


def model(**changes):
    whole = {
        "name": "m", "folder": None, "generated": None, "layers": 1, "heads": 32, "kv_heads": 8, "vocabulary": 100,
        "context": 0, "cache_values_per_token": 64, "weights": 1000, "dtype": "bfloat16", "quantised": None,
    }  # fmt: skip
    return Model(**{**whole, **changes})


@pytest.mark.parametrize(
    ("heads", "kv_heads", "gpus", "possible"),
    [(32, 8, 4, True), (32, 8, 16, True), (32, 8, 3, False), (24, 6, 4, False), (7, 7, 2, False), (12, 12, 6, True)],
)
def test_gpus_share_whole_heads(heads, kv_heads, gpus, possible):
    assert divides(model(heads=heads, kv_heads=kv_heads), gpus) is possible


def test_gpus_beyond_the_key_value_heads_hold_the_same_ones():
    def needed(gpus, **changes):
        of = model(weights=0, **changes)
        return needed_bytes(of, {"tensor_parallel_size": gpus}, 1000) - hugging_face.OVERHEAD_BYTES

    whole = cache_bytes(model(), {}, 1000)
    assert (needed(8), needed(16)) == (whole / 8, whole / 8)
    assert needed(8, latent=True) == whole
