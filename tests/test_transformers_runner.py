"""The transformers runner: the real library on very small models, on the CPU."""

import contextlib
import gc
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest
from contracts.runner_contract import RunnerContract

from tuner.measure import metrics_of
from tuner.space import Int, Refused
from tuner.trial import Changeable, Explained, Judged, Target

for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install transformers torch", allow_module_level=True)

# OpenMP's threads spin while they wait, which tests that share two CPUs must not do. Read when libgomp loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# torch's compiler imports torch.jit, which warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

ROOT = Path(__file__).parents[1]
RUNNER = ROOT / "runners" / "transformers.py"
TINY = Target(size="tiny", prompts=5, prompt_tokens=16, output_tokens=4)
LOSSY = Target(size="tiny", prompts=5, prompt_tokens=16, output_tokens=4, allow_lossy=True, quality=True)
GPU = {"device": "cuda", "name": "a GPU", "memory_bytes": 24 * 10**9, "threads": 8, "bfloat16": True}


def load_runner():
    """Under another name: the file is called like the library."""
    spec = importlib.util.spec_from_file_location("transformers_runner_under_test", RUNNER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def hf():
    return load_runner()


@pytest.fixture
def on_gpu(hf, monkeypatch):
    """What is said of a machine with a GPU; nothing can be loaded on it."""
    monkeypatch.setattr(hf, "_machine", lambda: hf._Machine(**GPU))
    return hf


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved Llama with a tokenizer of whole words."""
    import tokenizers
    import torch
    import transformers

    path = tmp_path_factory.mktemp("models") / "small"
    words = [
        "a",
        "the",
        "of",
        "and",
        "is",
        "was",
        "it",
        "to",
        "in",
        "energy",
        "water",
        "machine",
        "one",
        "more",
        "meter",
    ]
    vocabulary = {word: n for n, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - no secret
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, **special).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64,
        max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def of(folder, **more):
    return Target(model=str(folder), prompts=3, prompt_tokens=8, output_tokens=3, **more)


def in_a_process(code, stdin=""):
    """Run `code` with the runner loaded as `hf`, in a process of its own."""
    opening = (
        "import sys\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(ROOT)]!r}\n"
        "from test_transformers_runner import LOSSY, TINY, load_runner\n"
        "hf = load_runner()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", opening + code], input=stdin, capture_output=True, text=True, timeout=300
    )


class TestTransformers(RunnerContract):
    unloadable: ClassVar = {"attention": "flash_attention_2"}

    @pytest.fixture
    def runner(self, hf):
        return hf

    @pytest.fixture
    def target(self):
        return TINY


# --- the tuner's own process


def test_asking_for_the_space_the_identity_and_the_command_imports_neither_torch_nor_transformers():
    done = in_a_process(
        "space = hf.space(LOSSY)\n"
        "hf.identity(LOSSY), hf.describe(LOSSY)\n"
        "hf.command(space.default(), LOSSY), hf.service(space.default(), LOSSY)\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert done.stdout == "set()\n", done.stderr


def test_a_torch_that_does_not_start_is_one_sentence(hf, monkeypatch):
    monkeypatch.setattr(hf, "_PROBE", "import os; os.abort()")
    hf._machine.cache_clear()
    with pytest.raises(Refused, match=r"torch does not run on this machine \(SIGABRT\); try: pip install"):
        hf._machine()


def test_a_missing_library_is_named_with_the_command_that_installs_it(hf, monkeypatch):
    def absent(name):
        raise hf.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(hf.importlib.metadata, "version", absent)
    with pytest.raises(
        Refused, match=r"needs the package transformers; install it with: pip install 'transformers>=5'"
    ):
        hf.space(TINY)


def test_a_folder_that_is_called_like_a_package_does_not_pass_for_it(hf, tmp_path, monkeypatch):
    (tmp_path / "torchao").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not hf._installed("torchao") or importlib.util.find_spec("torchao").origin


# --- the space


@pytest.mark.parametrize(
    ("name", "scope", "effect"),
    [("batch_size", "request", "exact"), ("threads", "live", "numerics"), ("attention", "launch", "numerics")],
)
def test_a_parameter_says_when_it_can_change_and_what_it_does_to_the_output(hf, name, scope, effect):
    parameter = hf.space(TINY)[name]
    assert (parameter.scope, parameter.effect) == (scope, effect)


def test_batches_are_as_large_as_the_load_and_the_default_is_the_librarys(hf):
    batch = hf.space(TINY)["batch_size"]
    assert isinstance(batch, Int)
    assert (batch.default, batch.low, batch.high, batch.log) == (1, 1, 5, True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"compile": "default"}, "compile other than none needs cache=static"),
        ({"compile": "default", "cache": "static", "quantization": "dynamic-int8"}, "needs quantization none"),
        ({"quantization": "dynamic-int8", "dtype": "bfloat16"}, "quantization=dynamic-int8 needs dtype=float32"),
    ],
)
def test_what_the_library_cannot_run_is_refused_before_a_launch(hf, changes, sentence):
    space = hf.space(LOSSY)
    for name in changes:
        if name not in space.names:
            pytest.skip(f"{name} is not offered on this machine")
    with pytest.raises(Refused, match=sentence):
        space.complete(changes)


def test_a_model_that_does_not_fit_the_memory_is_refused_before_a_launch(hf, monkeypatch):
    monkeypatch.setattr(hf, "_machine", lambda: hf._Machine("cpu", "the CPU", 10 * 10**9, 2, True))
    space = hf.space(Target(size="8b"))
    with pytest.raises(Refused, match=r"weights and cache fit into 9.5 GB of the CPU: about 8.03 GB of weights"):
        space.check(space.default())


@pytest.mark.parametrize("beside", [0, 1000])
def test_weights_that_are_drawn_are_counted_from_the_shape_whatever_lies_beside_it(hf, tmp_path, beside):
    settings = dict(hf._model(Target(size="8b")).settings)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "torch_dtype": "bfloat16"}))
    (tmp_path / "model.safetensors").write_bytes(b"x" * beside)
    model = hf._model(Target(model=str(tmp_path), dummy_weights=True))
    assert model.weight_bytes == pytest.approx(2 * hf.SIZES["8b"].parameters, rel=1e-3)


def test_a_cache_that_does_not_fit_the_memory_is_refused_and_a_smaller_batch_is_not(hf, monkeypatch):
    monkeypatch.setattr(hf, "_machine", lambda: hf._Machine("cpu", "the CPU", 6 * 10**9, 2, True))
    space = hf.space(Target(size="1b", prompts=64, prompt_tokens=4096))
    assert space.complete({"batch_size": 8})
    with pytest.raises(Refused, match="for each prompt of a batch"):
        space.complete({"batch_size": 64})


def test_eager_attention_counts_the_scores_that_it_stores(hf):
    target = Target(size="160m", prompts=8, prompt_tokens=4096)
    model = hf._model(target)
    need = {
        kind: hf._need_bytes({"batch_size": 8, "attention": kind, "cache": "dynamic"}, target, model)
        for kind in ("sdpa", "eager")
    }
    # 8 prompts x 12 heads x 4096^2 scores, in float32 twice.
    assert need["eager"] - need["sdpa"] == 8 * 12 * 4096**2 * 8


@pytest.mark.parametrize("size", ["tiny", "15m", "160m", "1b", "8b"])
def test_the_parameters_of_a_shape_are_those_of_the_librarys_model(hf, size):
    import torch
    import transformers

    settings = dict(hf._model(Target(size=size)).settings)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert hf.SIZES[size].parameters == sum(p.numel() for p in model.parameters())


def test_without_a_cpp_compiler_compiling_is_not_offered(hf, monkeypatch):
    monkeypatch.setattr(hf.shutil, "which", lambda name: None)
    assert "compile" not in hf.space(TINY).names


def test_what_is_already_quantised_is_not_quantised_again(hf, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    (tmp_path / "model.safetensors").write_bytes(b"0" * 64)
    assert "quantization" not in hf.space(of(tmp_path, allow_lossy=True)).names


# --- what is said of a GPU, without one


def test_on_a_gpu_threads_are_not_tuned_and_the_cache_may_stay_in_the_hosts_memory(on_gpu):
    space = on_gpu.space(TINY)
    assert "threads" not in space.names
    assert space["cache_offload"].lever == "offload"


def test_on_a_gpu_a_generated_model_is_bfloat16_and_float16_is_offered(on_gpu):
    dtype = on_gpu.space(LOSSY)["dtype"]
    assert (dtype.default, dtype.values) == ("bfloat16", ("float32", "bfloat16", "float16"))


def test_on_a_gpu_the_identity_says_so(on_gpu):
    assert on_gpu.identity(TINY)["device"] == "cuda"


def test_where_its_packages_are_installed_a_gpu_offers_flash_attention_and_bitsandbytes(on_gpu, monkeypatch):
    monkeypatch.setattr(on_gpu, "_installed", lambda *names: True)
    monkeypatch.setattr(on_gpu, "_holds", lambda *where: True)
    space = on_gpu.space(LOSSY)
    assert space["attention"].values == ("eager", "sdpa", "flash_attention_2")
    assert space["quantization"].values == ("none", "bnb-8bit", "bnb-4bit", "torchao-int8")
    assert space["compile"].values == ("none", "default", "reduce-overhead")
    assert space["cache"].values == ("dynamic", "static", "quantized-fp8", "quantized-quanto", "quantized-hqq")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention": "flash_attention_2", "dtype": "float32"}, "flash_attention_2 needs dtype=float16"),
        ({"cache_offload": True, "cache": "quantized-fp8"}, "cache_offload needs cache=dynamic"),
        ({"cache_offload": True, "cache": "static", "compile": "default"}, "cache_offload needs compile=none"),
        ({"quantization": "bnb-4bit", "cache": "static", "compile": "default"}, "needs quantization none or torchao"),
    ],
)
def test_on_a_gpu_what_excludes_each_other_is_refused(on_gpu, monkeypatch, changes, sentence):
    monkeypatch.setattr(on_gpu, "_installed", lambda *names: True)
    monkeypatch.setattr(on_gpu, "_holds", lambda *where: True)
    with pytest.raises(Refused, match=sentence):
        on_gpu.space(LOSSY).complete(changes)


def test_fewer_bits_make_room_on_a_gpu(on_gpu, monkeypatch):
    monkeypatch.setattr(on_gpu, "_installed", lambda *names: True)
    monkeypatch.setattr(on_gpu, "_machine", lambda: on_gpu._Machine(**{**GPU, "memory_bytes": 12 * 10**9}))
    space = on_gpu.space(Target(size="8b", allow_lossy=True))
    assert space.complete({"quantization": "bnb-4bit"})
    with pytest.raises(Refused, match=r"weights and cache fit into 11\.4 GB of a GPU"):
        space.check(space.default())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization": "bnb-4bit"}, "BitsAndBytesConfig(load_in_4bit=True"),
        ({"quantization": "bnb-8bit"}, "BitsAndBytesConfig(load_in_8bit=True)"),
        ({"quantization": "torchao-int8"}, "TorchAoConfig(Int8DynamicActivationInt8WeightConfig())"),
        ({"cache_offload": True}, "cache_implementation='offloaded'"),
        ({"cache_offload": True, "cache": "static"}, "cache_implementation='offloaded_static'"),
        ({"cache": "quantized-fp8"}, "cache_implementation='quantized', cache_config={'backend': 'fp8'}"),
        ({"compile": "reduce-overhead", "cache": "static"}, "CompileConfig(mode='reduce-overhead')"),
    ],
)
def test_the_script_says_what_the_configuration_says(on_gpu, monkeypatch, changes, said):
    monkeypatch.setattr(on_gpu, "_installed", lambda *names: True)
    monkeypatch.setattr(on_gpu, "_holds", lambda *where: True)
    config = on_gpu.space(LOSSY).complete(changes)
    service = on_gpu.service(config, LOSSY)
    assert said in service.python
    assert said in service.argv[2]
    assert service.gpus
    compile(service.python, "script", "exec")
    compile(service.argv[2], "command", "exec")


# --- a model that somebody brings


@pytest.mark.parametrize(
    ("model", "more", "sentence"),
    [
        ("no/such-model", {}, r"no model of this name in the Hugging Face cache .*hf download no/such-model"),
        ("./no/such/folder", {}, "no such folder, and no hub id looks like this"),
        ("{tmp}/empty", {}, "expected a folder with a config.json"),
        ("{tmp}/file", {}, "expected a folder or a hub id, got a file; try --model {tmp}"),
        ("{tmp}/broken", {}, "config.json cannot be read"),
        ("{tmp}/bert", {}, 'expected a decoder-only language model, got "BertForMaskedLM"'),
        ("{tmp}/t5", {}, "expected a decoder-only language model"),
        ("{tmp}/shape", {}, r"no weights .*add --dummy-weights"),
        ("{tmp}/nameless", {}, "names no vocab_size"),
        ("{tmp}/shape", {"size": "tiny"}, "--size tiny makes a model and --model .* names one"),
        (None, {"size": "70b"}, "--size 70b: expected one of tiny, 15m, 160m, 1b, 8b"),
        (None, {"size": "tiny", "prompts": 0}, "--prompts 0: expected at least 1"),
        (None, {"size": "tiny", "output_tokens": 5000}, "at most 4096 tokens together"),
        (None, {"size": "tiny", "request_rate": 2.0}, r"--request-rate 2: .*leave it out"),
        (
            None,
            {"size": "tiny", "engine_args": ("--x",)},
            "--engine-arg --x: the transformers workload has no use for it",
        ),
    ],
)
def test_what_cannot_be_run_is_one_sentence(hf, tmp_path, model, more, sentence):
    shape = {"vocab_size": 64, "max_position_embeddings": 512}
    files = {
        "empty": None,
        "broken": "{",
        "bert": json.dumps({**shape, "architectures": ["BertForMaskedLM"]}),
        "t5": json.dumps({**shape, "is_encoder_decoder": True}),
        "shape": json.dumps({**shape, "architectures": ["LlamaForCausalLM"]}),
        "nameless": json.dumps({"architectures": ["LlamaForCausalLM"]}),
    }
    for name, text in files.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "file").write_text("")
    place = None if model is None else model.replace("{tmp}", str(tmp_path))
    with pytest.raises(Refused, match=sentence.replace("{tmp}", str(tmp_path))) as raised:
        hf.space(Target(**{"model": place, **more}))
    assert "\n" not in str(raised.value)


def test_a_hub_id_is_taken_from_the_librarys_own_cache(hf, folder, hub):
    hub(folder)
    target = of("me/small")
    assert hf.identity(target)["model"] == "me/small"
    with hf.launch(hf.space(target).default(), target) as engine:
        assert engine.run_pass().units == 9
    assert "from_pretrained('me/small'" in shlex.split(hf.command(hf.space(target).default(), target))[2]


def test_a_saved_model_runs_in_the_dtype_it_was_saved_in(hf, folder):
    target = of(folder)
    with hf.launch(hf.space(target).default(), target) as engine:
        assert engine.effective["dtype"] == "float32"
        assert engine.run_pass().prompt_tokens == 24


def test_prompts_hold_no_token_that_begins_or_ends_a_text(hf, folder):
    assert {1, 2}.isdisjoint(hf._model(of(folder)).tokens)


def test_only_the_shape_of_a_model_is_needed_for_random_weights(hf, folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    target = of(tmp_path, dummy_weights=True)
    with hf.launch(hf.space(target).default(), target) as engine:
        assert engine.run_pass().units == 9


def test_damaged_weights_are_one_sentence(hf, folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    target = of(tmp_path)
    with (
        pytest.raises(RuntimeError, match="transformers cannot load this configuration") as raised,
        hf.launch(hf.space(target).default(), target),
    ):
        pytest.fail("an engine was yielded")
    assert "\n" not in str(raised.value)


def test_other_weights_are_another_model(hf, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    same = hf.identity(of(tmp_path))["model_sha256"]
    assert same == hf.identity(of(folder))["model_sha256"]
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert hf.identity(of(tmp_path))["model_sha256"] != same


def test_another_seed_is_another_generated_model(hf):
    assert hf.identity(TINY)["model_sha256"] != hf.identity(Target(size="tiny", seed=1))["model_sha256"]


def test_the_same_seed_gives_the_same_weights_in_every_dtype_but_for_rounding(hf):
    import torch
    import transformers

    settings = dict(hf._model(TINY).settings)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    _, exact = hf._random_weights(config, 0, torch.float32, "cpu")
    _, again = hf._random_weights(config, 0, torch.float32, "cpu")
    _, short = hf._random_weights(config, 0, torch.bfloat16, "cpu")
    for name, weight in exact.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight.bfloat16(), short[name])
    assert float(exact["lm_head.weight"].std()) == pytest.approx(64**-0.5, rel=0.02)
    assert float(exact["model.embed_tokens.weight"].std()) == pytest.approx(0.02, rel=0.02)


# --- a pass


@pytest.fixture
def engine(hf):
    with hf.launch(hf.space(LOSSY).complete({"batch_size": 2}), LOSSY) as loaded:
        yield loaded


def test_the_engine_keeps_the_protocols_it_is_made_for(engine):
    assert isinstance(engine, Changeable)
    assert isinstance(engine, Judged)
    assert isinstance(engine, Explained)


def test_every_request_has_a_first_token_and_gaps_between_the_others(engine):
    work = engine.run_pass()
    assert len(work.ttft_seconds) == 5
    assert len(work.itl_seconds) == 5 * 3
    assert all(0 < first < whole for first, whole in zip(work.ttft_seconds, work.request_seconds, strict=True))
    assert min(work.itl_seconds) > 0
    assert {"ttft_p95_s", "itl_mean_s", "latency_p50_s"} <= set(metrics_of(work, 1.0))


def test_prefill_and_decode_and_what_follows_make_up_the_requests(engine):
    work = engine.run_pass()
    assert work.prefill_seconds == pytest.approx(sum(work.ttft_seconds))
    assert work.decode_seconds == pytest.approx(sum(work.itl_seconds))


def test_requests_of_one_batch_take_as_long_as_it(engine):
    first, second, third, fourth, alone = engine.run_pass().request_seconds
    assert first == second
    assert third == fourth
    assert alone not in (first, third)


@pytest.mark.parametrize("prompts", [1, 4])
def test_a_model_that_ends_its_sequences_is_not_let_off_early(hf, folder, tmp_path, prompts):
    # Every token ends a sequence, and the checkpoint samples: both must not reach the load.
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own = {"do_sample": True, "temperature": 5.0, "eos_token_id": list(range(64))}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    target = Target(model=str(tmp_path), prompts=prompts, prompt_tokens=8, output_tokens=6)
    with hf.launch(hf.space(target).default(), target) as engine:
        first = engine._generate(engine._prompts, 6).sequences.tolist()
        assert engine.run_pass().units == 6 * prompts
        assert engine._generate(engine._prompts, 6).sequences.tolist() == first


def test_the_same_tokens_come_out_whatever_the_batch_attention_and_cache(hf):
    seen = {}
    for changes in ({}, {"attention": "eager"}, {"cache": "static"}):
        with hf.launch(hf.space(TINY).complete(changes), TINY) as engine:
            seen[str(changes)] = engine._generate(engine._prompts, 4).sequences.tolist()
            single = [engine._generate([p], 4).sequences.tolist()[0] for p in engine._prompts]
            assert single == seen[str(changes)]
    assert len({json.dumps(rows) for rows in seen.values()}) == 1


class Short:
    """A model whose `generate` forgets the last token."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def generate(self, ids, generation_config, **more):
        generation_config.max_new_tokens -= 1
        generation_config.min_new_tokens -= 1
        return self._model.generate(ids, generation_config=generation_config, **more)


def test_fewer_tokens_than_asked_for_are_an_error_and_no_measurement(engine):
    engine._model = Short(engine._model)
    with pytest.raises(RuntimeError, match=r"2 sequences of 19 tokens in 3 steps came back; asked for 2 of 16\+4"):
        engine.run_pass()


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has",
            "out of memory: CUDA out of memory; try a smaller",
        ),
        ("", "out of memory: the machine has no more"),
    ],
)
def test_a_gpu_that_runs_out_of_memory_is_named(engine, monkeypatch, raised, sentence):
    import torch

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError(raised)

    monkeypatch.setattr(engine._model, "generate", full)
    with pytest.raises(RuntimeError, match=sentence):
        engine.run_pass()


@pytest.mark.slow
def test_a_machine_that_runs_out_of_memory_is_named():
    done = in_a_process(
        "import psutil, resource\n"
        "from tuner.trial import Target\n"
        "target = Target(size='tiny', prompts=16, prompt_tokens=1024, output_tokens=1)\n"
        "default = hf.space(target).complete({'attention': 'eager'})\n"
        "with hf.launch(default, target) as engine:\n"
        "    limit = psutil.Process().memory_info().vms + 100 * 2**20\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "    try:\n"
        "        engine.change({**default, 'batch_size': 16})\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    assert done.stdout.startswith("out of memory: "), (done.stdout, done.stderr)
    assert done.stdout.endswith("try a smaller batch_size\n")


# --- changing it while it runs


def test_batch_size_and_threads_change_without_loading_again(hf, engine):
    import torch

    config = hf.space(LOSSY).complete({"batch_size": 5, "threads": 1})
    model = engine._model
    engine.change(config)
    assert engine._model is model
    assert (engine.effective["batch_size"], engine.effective["threads"]) == (5, 1)
    assert torch.get_num_threads() == 1
    assert len(set(engine.run_pass().request_seconds)) == 1


def test_what_needs_a_launch_is_refused_by_name_and_nothing_is_changed(hf, engine):
    config = hf.space(LOSSY).complete({"cache": "static", "batch_size": 5})
    with pytest.raises(RuntimeError, match=r"^cache: needs a new launch$"):
        engine.change(config)
    assert engine.effective["batch_size"] == 2


def test_the_thread_count_of_the_process_is_given_back(hf):
    import torch

    before = torch.get_num_threads()
    with hf.launch(hf.space(TINY).complete({"threads": 1}), TINY) as engine:
        assert engine.effective["threads"] == 1
    assert torch.get_num_threads() == before


def test_the_environment_of_the_process_is_given_back(hf):
    before = dict(os.environ)
    with hf.launch(hf.space(TINY).default(), TINY):
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"} == before


# --- precision, and what it costs


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"quantization": "dynamic-int8"}, "quantization"),
        ({"quantization": "torchao-int8"}, "quantization"),
        ({"cache": "static"}, "cache"),
        ({"cache": "quantized-fp8"}, "cache"),
        ({"cache": "quantized-quanto"}, "cache"),
        ({"attention": "eager"}, "attention"),
    ],
)
def test_what_was_asked_for_is_what_the_loaded_model_says(hf, changes, name):
    space = hf.space(LOSSY)
    if name not in space.names or changes[name] not in space[name].values:
        pytest.skip(f"{changes[name]} is not offered here: its package is not installed")
    with hf.launch(space.complete(changes), LOSSY) as engine:
        assert engine.effective[name] == changes[name]
        assert engine.run_pass().units == 20


def judged(hf, target, changes, reference):
    with hf.launch(hf.space(target).complete(changes), target) as engine:
        return engine.quality(reference)


def test_the_default_has_no_loss_and_the_likelihood_of_a_model_that_knows_nothing(hf, tmp_path):
    figures = judged(hf, LOSSY, {}, tmp_path / "reference")
    assert figures["quality_loss"] == 0
    # A uniform guess among 1024 tokens costs ln 1024 nats; logits of variance 1 know half a nat more.
    assert figures["nll_nats_per_token"] == pytest.approx(math.log(1024) - 0.5, abs=0.2)


def test_the_same_configuration_again_has_no_loss_and_fewer_bits_have_one(hf, tmp_path):
    reference = tmp_path / "reference"
    judged(hf, LOSSY, {}, reference)
    assert abs(judged(hf, LOSSY, {"batch_size": 5}, reference)["quality_loss"]) < 1e-6
    assert abs(judged(hf, LOSSY, {"quantization": "dynamic-int8"}, reference)["quality_loss"]) > 1e-3


def test_a_quantised_cache_is_judged_through_the_cache(hf, tmp_path):
    if "quantized-fp8" not in hf.space(LOSSY)["cache"].values:
        pytest.skip("this transformers has no fp8 cache")
    judged(hf, LOSSY, {}, tmp_path / "reference")
    assert abs(judged(hf, LOSSY, {"cache": "quantized-fp8"}, tmp_path / "reference")["quality_loss"]) > 1e-4


def test_the_likelihood_is_that_of_one_forward_pass(hf, tmp_path):
    import torch

    with hf.launch(hf.space(LOSSY).default(), LOSSY) as engine:
        found = engine.quality(tmp_path / "reference")["nll_nats_per_token"]
        kept = json.loads((tmp_path / "reference").read_text())
        rows, context = torch.tensor(kept["rows"]), kept["context"]
        with torch.no_grad():
            logits = engine._model(rows).logits[:, context - 1 : -1].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, context:].flatten())
    assert found == pytest.approx(float(expected), abs=1e-5)


def test_a_model_with_a_tokenizer_is_judged_by_a_fixed_text(hf, folder, tmp_path):
    target = of(folder, allow_lossy=True, quality=True)
    assert judged(hf, target, {}, tmp_path / "reference")["quality_loss"] == 0
    kept = json.loads((tmp_path / "reference").read_text())
    assert kept["source"] == "a fixed text"
    assert len({len(row) for row in kept["rows"]}) == 1


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"rows": [[1, 2]], "context": 1}'])
def test_a_damaged_reference_is_one_sentence(engine, tmp_path, damage):
    (tmp_path / "reference").write_text(damage)
    with pytest.raises(RuntimeError, match="the reference reference cannot be read"):
        engine.quality(tmp_path / "reference")


def test_broken_output_is_an_error_and_no_quality(engine, tmp_path):
    engine._model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"no finite number|cannot judge its output"):
        engine.quality(tmp_path / "reference")
    assert list(tmp_path.glob("reference*")) == []


# --- compiling


@pytest.mark.slow
def test_compiling_happens_before_the_windows_is_reported_and_leaves_nothing(hf):
    if "compile" not in hf.space(TINY).names:
        pytest.skip("no C++ compiler")
    before = set(Path(tempfile.gettempdir()).iterdir())
    config = hf.space(TINY).complete({"cache": "static", "compile": "default", "batch_size": 3})
    with hf.launch(config, TINY) as engine:
        assert engine.effective["compile"] == "default"
        assert engine.figures["compile_seconds"] > 1
        graphs = hf._graphs()
        assert engine.run_pass().units == 20
        assert hf._graphs() == graphs, "something was compiled inside a window"
        with pytest.raises(RuntimeError, match="a compiled model is made for its batch size"):
            engine.change({**config, "batch_size": 5})
    left = {p.name for p in set(Path(tempfile.gettempdir()).iterdir()) - before}
    assert not [name for name in left if "torchinductor" in name or name.startswith("tune-compiled")]


def test_what_is_not_compiled_takes_no_time_to_compile(engine):
    assert engine.figures == {"compile_seconds": 0.0}
    assert engine.effective["compile"] == "none"


def test_a_closed_engine_may_be_closed_again_and_holds_no_weights(hf):
    import torch

    def weights():
        gc.collect()
        return sum(issubclass(type(o), torch.nn.Linear) for o in gc.get_objects())

    before = weights()
    with hf.launch(hf.space(TINY).default(), TINY) as engine:
        assert weights() > before
    engine.close()
    assert weights() == before


# --- the same without tuner


@pytest.mark.slow
def test_the_command_generates_for_the_lines_it_reads(hf, folder):
    command = hf.command(hf.space(of(folder)).complete({"batch_size": 2}), of(folder))
    words = shlex.split(command)
    done = subprocess.run(
        [sys.executable, *words[1:]], input="the water is\none machine\nenergy\n", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    texts = done.stdout.splitlines()
    assert [text.split()[0] for text in texts] == ["the", "one", "energy"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"batch_size": 2, "dtype": "bfloat16"}, {"quantization": "dynamic-int8"}])
def test_the_script_of_a_generated_model_runs_as_it_is_written(hf, tmp_path, changes):
    script = tmp_path / "generate.py"
    script.write_text(hf.service(hf.space(LOSSY).complete(changes), LOSSY).python)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("20])") == math.ceil(5 / changes.get("batch_size", 1))


def test_a_name_with_quotes_stays_a_text_in_the_script(hf, folder, tmp_path):
    place = tmp_path / "it's \"a\" folder'); print('no"
    place.symlink_to(folder)
    script = hf.service(hf.space(of(place)).default(), of(place)).python
    with contextlib.suppress(SystemExit):
        compile(script, "script", "exec")
    assert repr(str(place)) in script
