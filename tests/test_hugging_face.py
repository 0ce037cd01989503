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
    "llama4_text": {**LLAMA, "num_local_experts": 8, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 16384},
    "qwen2_moe": {
        **LLAMA,
        "num_experts": 8,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1, 3],
        "moe_intermediate_size": 768,
        "shared_expert_intermediate_size": 1024,
    },
    "deepseek_v2": {**LLAMA, "num_key_value_heads": 32, "n_routed_experts": 8, "first_k_dense_replace": 3},
    "glm4_moe": {"num_hidden_layers": 3, "first_k_dense_replace": 2},
    "ernie4_5_moe": {**LLAMA, "moe_layer_interval": 2, "moe_layer_start_index": 3},
    "gpt_oss": {"num_hidden_layers": 2},
    "minimax_m2": {**LLAMA, "num_local_experts": 8},
    "qwen3_next": {"num_hidden_layers": 4, "mlp_only_layers": [0]},
    "olmoe": {},
    "phimoe": {**LLAMA},
    "granitemoe": {**LLAMA, "num_local_experts": 8},
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
    # Biases of experts and linear attention are left out too.
    least = {"gpt_oss": 0.98, "qwen3_next": 0.98}.get(kind, 0.998)
    assert least * there <= parameters(written) <= there


MAVERICK = {
    **LLAMA, "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "num_hidden_layers": 48,
    "intermediate_size_mlp": 16384, "interleave_moe_layer_step": 2, "num_local_experts": 128, "head_dim": 128,
    "num_attention_heads": 40, "vocab_size": 202048,
}  # fmt: skip


def test_of_interleaved_experts_only_those_that_are_there_are_counted():
    # Its model card: 400B in total.
    whole = parameters({"model_type": "llama4", "text_config": MAVERICK})
    assert round(whole / 1e9) == 401
    layers = list(range(1, 48, 2))
    assert parameters({**MAVERICK, "interleave_moe_layer_step": 1, "moe_layers": layers}) == whole


DEEPSEEK = {**LLAMA, "model_type": "deepseek_v3", "n_routed_experts": 8, "moe_intermediate_size": 1024}


@pytest.mark.parametrize(
    ("fields", "sparse"),
    [
        ({}, 16),
        ({"first_k_dense_replace": 3}, 13),
        ({"moe_layer_freq": 2}, 8),
        ({"first_k_dense_replace": 3, "moe_layer_freq": 2}, 6),
        ({"moe_layer_freq": [0] * 10 + [1] * 6}, 6),
        ({"mlp_layer_types": ["dense"] * 12 + ["sparse"] * 4}, 4),
        ({"mlp_only_layers": [0, 5]}, 14),
    ],
)
def test_layers_with_experts_are_those_that_the_fields_say(fields, sparse):
    def counted(layers):
        return parameters({**DEEPSEEK, "first_k_dense_replace": 16 - layers})

    assert parameters({**DEEPSEEK, **fields}) == (counted(sparse) if sparse < 16 else parameters(DEEPSEEK))


def test_of_experts_in_unknown_layers_no_more_is_counted_than_is_surely_there():
    known = {**LLAMA, "num_local_experts": 8}
    few = parameters({**known, "model_type": "somebodys_moe"})
    assert few == parameters(LLAMA) < parameters({**known, "model_type": "mixtral"})


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


def test_stages_of_a_pipeline_share_the_layers_and_offloaded_weights_leave_the_gpu():
    of = model(weights=10**10)

    def beside_overhead(**fixed):
        return needed_bytes(of, fixed, 1000) - hugging_face.OVERHEAD_BYTES

    whole, cache = beside_overhead(), cache_bytes(of, {}, 1000)
    assert beside_overhead(pipeline_parallel_size=4) == whole / 4
    assert beside_overhead(pipeline_parallel_size=4, tensor_parallel_size=2) == whole / 8
    assert beside_overhead(cpu_offload_gb=2.0) == whole - 2 * 2**30
    assert beside_overhead(cpu_offload_gb=1000.0) == cache
    assert beside_overhead(pipeline_parallel_size=0, tensor_parallel_size=0) == whole


def test_stages_and_copies_leave_fewer_gpus_to_share_a_layer():
    def widths(**fixed):
        return hugging_face.tensor_widths(model(), 8, fixed)

    assert widths() == (1, 2, 4, 8)
    assert widths(pipeline_parallel_size=2) == (1, 2, 4)
    assert widths(pipeline_parallel_size=2, data_parallel_size=4) == (1,)
