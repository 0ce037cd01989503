"""The SGLang runner: against a stand-in that speaks its flags and its API. SGLang itself needs a GPU."""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import psutil
import pytest
from contracts.runner_contract import RunnerContract
from fakes.openai_server import Engine
from printed import noted, typed_at_a_shell

from tuner.installed import Program
from tuner.models import hugging_face
from tuner.quality import TEXT
from tuner.serving import free_port
from tuner.space import Refused
from tuner.trial import Judged, Target

RUNNER = Path(__file__).parents[1] / "runners" / "sglang.py"
FAKES = Path(__file__).parent / "fakes"
CPU = ("--device", "cpu")
LOAD = Target(prompts=4, prompt_tokens=16, output_tokens=4, engine_args=CPU)
ON_GPU = replace(LOAD, engine_args=())
LOSSY = replace(ON_GPU, allow_lossy=True)
H100 = ("NVIDIA H100 80GB HBM3", 81559)
L4 = ("NVIDIA L4", 23034)
STAND_IN = f"import runpy, sys\nrunpy.run_path({str(FAKES / 'sglang_server.py')!r}, run_name='__main__')"


@pytest.fixture(scope="session")
def sglang():
    spec = importlib.util.spec_from_file_location("sglang_runner_under_test", RUNNER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def script(path, code=STAND_IN):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def executable(tmp_path_factory):
    """One for all tests that change nothing about it: the runner asks each program for its help once."""
    home = tmp_path_factory.mktemp("env")
    (home / "lib" / "python3.12" / "site-packages" / "sglang-0.5.23.dist-info").mkdir(parents=True)
    return script(home / "bin" / "python")


@pytest.fixture(autouse=True)
def stand_in(executable, tmp_path, monkeypatch):
    """An environment with SGLang, a cache that is empty, and nothing else of this machine's."""
    monkeypatch.setenv("TUNE_SGLANG", str(executable))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_HOME", "HF_HUB_CACHE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A program of this test's own, which nobody has asked yet."""
    path = script(tmp_path / "bin" / "sglang")
    monkeypatch.setenv("TUNE_SGLANG", str(path))
    return path


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A machine with GPUs, as nvidia-smi shows it."""

    def put(*gpus):
        lines = "".join(f"{i}, GPU-{i}, {name}, {mib}\n" for i, (name, mib) in enumerate(gpus))
        script(tmp_path / "smi" / "nvidia-smi", f"print({lines!r}, end='')")
        monkeypatch.setenv("PATH", f"{tmp_path / 'smi'}:{os.environ['PATH']}")

    return put


def model_folder(folder, **changes):
    """A folder as Hugging Face's models are."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
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
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


class TestSglang(RunnerContract):
    # A size of a chunk that is no whole number of pages; the CPU's space has no pages.
    unloadable: ClassVar = {"page_size": 48}
    one_clock: ClassVar = "a server's client sees only the first token, queue and all"

    @pytest.fixture
    def runner(self, sglang):
        return sglang

    @pytest.fixture
    def target(self):
        return LOAD


# --- the program


def test_without_sglang_it_is_said_how_to_install_it(sglang, monkeypatch):
    monkeypatch.delenv("TUNE_SGLANG")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Refused, match=r"finds no sglang on the PATH; install it .*set TUNE_SGLANG="):
        sglang.space(LOAD)


def test_a_wrong_tune_sglang_is_named(sglang, monkeypatch):
    monkeypatch.setenv("TUNE_SGLANG", "/no/such/python")
    with pytest.raises(Refused, match=r"TUNE_SGLANG=/no/such/python: expected a python that has SGLang, or sglang"):
        sglang.space(LOAD)


def test_a_python_starts_the_module_and_the_executable_serves(sglang, executable, own, monkeypatch):
    assert sglang._program() == (str(own), "serve")
    monkeypatch.setenv("TUNE_SGLANG", str(executable))
    assert sglang._program() == (str(executable), "-m", "sglang.launch_server")
    monkeypatch.delenv("TUNE_SGLANG")
    monkeypatch.setenv("PATH", f"{own.parent}:{os.environ['PATH']}")
    assert sglang._program() == (str(own), "serve")
    assert sglang.identity(LOAD)["engine_version"] == "not said"


def test_the_version_is_read_from_the_installed_packages_records(sglang):
    assert sglang.identity(LOAD)["engine_version"] == "0.5.23"


def test_one_that_does_not_run_is_refused_with_its_last_line(own, sglang, monkeypatch):
    monkeypatch.setenv("FAKE_SGLANG_BROKEN", "ModuleNotFoundError: No module named 'sgl_kernel'")
    with pytest.raises(Refused, match=r"SGLang does not run here \(ModuleNotFoundError: No module named 'sgl_kernel'"):
        sglang.space(LOAD)


def test_another_program_is_refused(sglang, monkeypatch):
    monkeypatch.setenv("TUNE_SGLANG", shutil.which("true"))
    with pytest.raises(Refused, match="expected SGLang, but its help lists no --max-running-requests"):
        sglang.space(LOAD)


def test_the_help_is_asked_for_once_and_kept(own, sglang, monkeypatch):
    first = sglang.space(LOAD).record()
    sglang._asked.cache_clear()
    monkeypatch.setattr(Program, "run", lambda *_: pytest.fail("asked again"))
    assert sglang.space(LOAD).record() == first


# --- the space


def test_a_cpu_has_to_be_asked_for(sglang, monkeypatch):
    monkeypatch.setattr(sglang, "gpus_here", tuple)
    with pytest.raises(Refused, match=r"nvidia-smi shows none here; .*--engine-arg --device=cpu"):
        sglang.space(ON_GPU)
    assert sglang.identity(LOAD)["device"] == "cpu"
    assert sglang.space(replace(LOAD, engine_args=("--device=cpu",))).names == (
        "concurrency",
        "max_running_requests",
        "chunked_prefill_size",
        "max_prefill_tokens",
        "schedule_policy",
        "schedule_conservativeness",
        "radix_cache",
        "stream_interval",
    )


@pytest.mark.parametrize(("gpu", "chunk"), [(H100, 8192), (L4, 4096), (("T4", 15360), 2048), (("B200", 183359), 16384)])
def test_a_gpu_gets_the_engines_chunk_for_its_size(sglang, gpus, gpu, chunk):
    gpus(gpu)
    space = sglang.space(ON_GPU)
    assert space["chunked_prefill_size"].default == chunk
    assert {"mem_fraction_static", "disable_cuda_graph", "cuda_graph_max_bs", "attention_backend", "page_size"} <= set(
        space.names
    )
    assert "tp_size" not in space.names


def test_tensor_parallel_sizes_do_not_exceed_the_gpus(sglang, gpus, tmp_path):
    gpus(*[L4] * 8)
    big = replace(ON_GPU, model=model_folder(tmp_path / "m"), dummy_weights=True)
    assert sglang.space(big)["tp_size"].values == (1, 2, 4, 8)


def test_gpus_that_cannot_share_the_heads_are_answered_with_the_reason(sglang, gpus):
    gpus(*[L4] * 8)
    with pytest.raises(Refused, match="tp_size divides the 4 attention heads of generated llama 15M"):
        sglang.space(ON_GPU).complete({"tp_size": 8})


def test_a_share_of_memory_that_an_argument_fixes_counts(sglang, gpus, tmp_path):
    gpus(L4, L4)
    target = replace(ON_GPU, model=model_folder(tmp_path / "m"), dummy_weights=True)
    for arguments, fits in ((("--mem-fraction-static=0.6",), False), (("--mem-fraction-static", "0.9"), True)):
        space = sglang.space(replace(target, engine_args=arguments))
        assert bool(space.broken(space.default())) is not fits


# 70.6G weights in 16 bits are 131 GiB.
SEVENTY = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        ([], False),
        (["--pp-size=4"], True),
        (["--pipeline-parallel-size", "4"], True),
        (["--cpu-offload-gb=100"], True),
        (["--tensor-parallel=4"], True),
        (["--tp-size=2", "--mem-f=0.5"], False),
        (["--json-model-override-args={}"], True),
        (["--tp-size=4", "--dp-size=3", "--enable-dp-attention"], True),
    ],
    ids=str,
)
def test_what_an_argument_says_of_memory_counts_by_whatever_name(sglang, gpus, tmp_path, words, fits):
    gpus(*[("NVIDIA H100 80GB HBM3", 81559)] * 4)
    trained = replace(ON_GPU, model=model_folder(tmp_path / "m", **SEVENTY), dummy_weights=True)
    space = sglang.space(replace(trained, engine_args=tuple(words)))
    assert bool(space.broken(space.default())) is not fits


def test_the_cpu_may_be_asked_for_by_the_beginning_of_the_flag(sglang):
    assert sglang.identity(replace(LOAD, engine_args=("--dev", "cpu")))["device"] == "cpu"


@pytest.mark.parametrize(("gib", "fits"), [(20, True), (16, False)])
def test_weights_and_cache_fit_a_cpus_memory(sglang, monkeypatch, tmp_path, gib, fits):
    monkeypatch.setattr(sglang, "memory_bytes", lambda: gib * 2**30)
    # 8.03G weights in 16 bits are 15.0 GiB.
    space = sglang.space(replace(LOAD, model=model_folder(tmp_path / "m"), dummy_weights=True))
    told = space.broken(space.default())
    assert (told == []) is fits
    assert fits or "fit into mem_fraction_static of main memory's 16 GiB" in told[0]


def test_lossy_parameters_take_their_values_from_the_help(sglang, gpus, tmp_path):
    gpus(H100)
    lossy = {p.name: p.values for p in sglang.space(LOSSY).parameters if p.effect == "lossy"}
    assert lossy == {"kv_cache_dtype": ("auto", "fp8_e5m2", "fp8_e4m3", "bf16"), "quantization": ("none", "fp8")}
    quantised = replace(LOSSY, model=model_folder(tmp_path / "m", quantization_config={"quant_method": "awq"}))
    assert "quantization" not in sglang.space(quantised).names


def test_a_flag_that_another_version_has_not_is_left_out_or_replaced(own, sglang, monkeypatch, gpus):
    gpus(H100)
    monkeypatch.setenv("FAKE_SGLANG_LACKS", "--stream-interval,--disable-cuda-graph,--sampling-defaults")
    space = sglang.space(ON_GPU)
    assert "stream_interval" not in space.names
    assert sglang.notes(ON_GPU) == ["stream_interval is left out: SGLang not said has no --stream-interval"]
    assert sglang.describe(ON_GPU).endswith("has no --stream-interval")
    assert "--disable-decode-cuda-graph" in sglang.command(space.complete({"disable_cuda_graph": True}), ON_GPU)


def test_a_flag_that_engine_args_fix_is_not_tuned(sglang, gpus):
    gpus(H100, H100)
    fixed = replace(ON_GPU, engine_args=("--tp", "2", "--max-running-requests=8"))
    assert not {"tp_size", "max_running_requests"} & set(sglang.space(fixed).names)
    assert "tp_size is left out: --engine-arg --tp fixes it" in sglang.notes(fixed)


def test_an_open_loop_has_no_concurrency(sglang):
    assert "concurrency" not in sglang.space(replace(LOAD, request_rate=5.0)).names


BROKEN = [
    ({"schedule_policy": "lpm", "radix_cache": False}, "schedule_policy lpm and dfs-weight need radix_cache"),
    ({"disable_cuda_graph": True, "cuda_graph_max_bs": 8}, "there is no cuda_graph_max_bs but auto"),
]


@pytest.mark.parametrize(("changes", "sentence"), BROKEN)
def test_what_the_engine_would_pass_over_is_answered_without_a_launch(sglang, gpus, changes, sentence):
    gpus(H100)
    with pytest.raises(Refused, match=sentence):
        sglang.space(ON_GPU).complete(changes)


def test_a_chunk_of_whole_prompts_and_pages_of_any_size_go_together(sglang, gpus):
    gpus(H100)
    assert not sglang.space(ON_GPU).broken(sglang.space(ON_GPU).complete({"chunked_prefill_size": -1, "page_size": 64}))


def test_a_model_that_cannot_fit_is_answered_without_a_launch(sglang, gpus, tmp_path):
    gpus(L4, L4)
    # 8.0G weights in 16 bits are 16.1 GB of this GPU's 24.2 GB.
    target = replace(LOSSY, model=model_folder(tmp_path / "m"), dummy_weights=True)
    space = sglang.space(target)
    assert not space.broken(space.default())
    tight = {**space.default(), "mem_fraction_static": 0.6}
    assert "the cache of one request (32 tokens)" in space.broken(tight)[0]
    for mended in ({"quantization": "fp8"}, {"tp_size": 2}):
        assert not space.broken({**tight, **mended})


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"prompts": 0}, "--prompts 0: expected at least 1"),
        ({"prompt_tokens": 5000}, "expected at most 4088 tokens together"),
        ({"size": "7b"}, "--size 7b: expected one of 15m, 160m"),
        ({"model": "/no/such/folder"}, "--model /no/such/folder: no such folder"),
        ({"model": "org/model"}, "download it first: hf download org/model"),
        ({"model": str(FAKES)}, "expected a config.json in"),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_way_on(sglang, changes, refusal):
    with pytest.raises(Refused) as refused:
        sglang.space(replace(LOAD, **changes))
    assert refusal in str(refused.value)


# --- running it


def test_every_tuned_flag_is_named_and_read_back(sglang, gpus, monkeypatch, tmp_path, log):
    gpus(H100, H100)
    monkeypatch.setenv("FAKE_SGLANG_NOTE", str(tmp_path / "note"))
    changes = {
        "concurrency": 2,
        "max_running_requests": 2,
        "chunked_prefill_size": 2048,
        "max_prefill_tokens": 4096,
        "schedule_policy": "lof",
        "schedule_conservativeness": 0.5,
        "radix_cache": False,
        "stream_interval": 4,
        "mem_fraction_static": 0.8,
        "disable_cuda_graph": False,
        "cuda_graph_max_bs": 16,
        "attention_backend": "triton",
        "page_size": 16,
        "tp_size": 2,
        "kv_cache_dtype": "fp8_e5m2",
        "quantization": "fp8",
    }
    space = sglang.space(LOSSY)
    assert set(changes) == set(space.names)
    with sglang.launch(space.complete(changes), LOSSY) as engine:
        effective = dict(engine.effective)
        engine.change({**changes, "concurrency": 3})
        assert engine.effective["concurrency"] == 3
    assert effective == {**changes, "kv_cache_tokens": 77568}
    _, scratch, words, *_ = (tmp_path / "note").read_text().splitlines()
    assert not Path(scratch).exists()
    for flag in ("--load-format dummy", "--context-length 32", "--sampling-defaults openai", "--host 127.0.0.1"):
        assert flag in words


def test_what_is_left_to_the_engine_has_no_flag_and_its_choice_is_read_back(sglang, gpus, monkeypatch, tmp_path, log):
    gpus(H100)
    monkeypatch.setenv("FAKE_SGLANG_NOTE", str(tmp_path / "note"))
    monkeypatch.setenv("FAKE_SGLANG_INFO", "/get_server_info")
    with sglang.launch(sglang.space(ON_GPU).complete({"disable_cuda_graph": True}), ON_GPU) as engine:
        effective = engine.effective
    words = (tmp_path / "note").read_text().splitlines()[2]
    for flag in ("--mem-fraction-static", "--cuda-graph-max-bs", "--attention-backend", "--page-size"):
        assert flag not in words
    assert (effective["attention_backend"], effective["mem_fraction_static"]) == ("fa3", 0.878)
    assert effective["disable_cuda_graph"] is True


FAILURES = {
    "oom-loading": r"^SGLang ended while loading \(exit status 1\): out of memory: torch.OutOfMemoryError: CUDA out of",
    "no-cache": r"^SGLang ended while loading \(exit status 1\): out of memory: Not enough memory. Please try to incr",
    "bad-backend": r"^SGLang ended while loading \(exit status 1\): AssertionError: FlashAttention v3 Backend requires",
    "port-in-use": r"^SGLang found its port taken, 3 times in a row .*ended while loading",
    "crash-loading": r"^SGLang was killed by SIGSEGV while loading; ",
    "500": r"^SGLang answered HTTP 500: ",
    "out-of-memory:2": r"^SGLang ended in the middle of a pass \(exit status 1\): out of memory: Decode out of memory",
    "killed:1": r"^SGLang was killed by SIGKILL in the middle of a pass; ",
    "cut": r"^SGLang: the stream was cut off before \[DONE\]$",
    "no-usage": r"^SGLang streams no usage block",
    "short": r"^SGLang generated 3 tokens for a request instead of 4",
}


@pytest.mark.parametrize(("mode", "sentence"), FAILURES.items(), ids=FAILURES)
def test_a_launch_that_fails_is_one_sentence_and_leaves_nothing(sglang, monkeypatch, tmp_path, log, mode, sentence):
    monkeypatch.setattr("tuner.serving.LATE_SECONDS", 1.0)
    monkeypatch.setenv("FAKE_SGLANG", mode)
    monkeypatch.setenv("FAKE_SGLANG_NOTE", str(tmp_path / "note"))
    before = set(psutil.Process().children(recursive=True))
    with (
        pytest.raises((RuntimeError, Refused), match=sentence) as caught,
        sglang.launch(sglang.space(LOAD).default(), LOAD),
    ):
        pytest.fail("an engine was yielded")
    assert "\n" not in str(caught.value)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not Path((tmp_path / "note").read_text().splitlines()[1]).exists()


def test_a_port_that_somebody_took_before_it_listened_is_changed_for_another(sglang, monkeypatch, log):
    with Engine() as stranger:
        free, taken = free_port(), urlsplit(stranger.url).port
        ports = iter([taken, free])
        monkeypatch.setattr("tuner.serving.free_port", lambda: next(ports))
        with sglang.launch(sglang.space(LOAD).default(), LOAD) as engine:
            assert engine.run_pass().units == 16
        assert stranger.requests == []


@pytest.mark.parametrize(("mode", "answer"), [("hang-loading", "nothing"), ("unhealthy", "HTTP 503")])
def test_an_engine_that_never_serves_is_given_up(sglang, monkeypatch, log, mode, answer):
    monkeypatch.setenv("FAKE_SGLANG", mode)
    monkeypatch.setattr(sglang, "START_SECONDS", 1.0)
    with (
        pytest.raises(RuntimeError, match=rf"^SGLang was not ready after 1 s: GET /health brought {answer}"),
        sglang.launch(sglang.space(LOAD).default(), LOAD),
    ):
        pytest.fail("an engine was yielded")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--no-such-flag",),
            r"^--engine-arg=--no-such-flag: SGLang does not take it \(error: unrec.*\); leave",
        ),
        (
            ("--dtype", "int3"),
            r"^--engine-arg=--dtype: .*error: argument --dtype: invalid choice: 'int3' \(choose",
        ),
    ],
)
def test_a_flag_that_it_rejects_is_told_in_its_own_words(sglang, log, words, sentence):
    target = replace(LOAD, engine_args=(*CPU, *words))
    with pytest.raises(Refused, match=sentence), sglang.launch(sglang.space(target).default(), target):
        pytest.fail("an engine was yielded")


def test_one_that_ignores_sigterm_and_its_children_are_killed(sglang, monkeypatch, tmp_path, log):
    monkeypatch.setattr("tuner.serving.Server.stop.__defaults__", (0.3,))
    monkeypatch.setenv("FAKE_SGLANG", "stubborn")
    monkeypatch.setenv("FAKE_SGLANG_NOTE", str(tmp_path / "note"))
    with sglang.launch(sglang.space(LOAD).default(), LOAD):
        pids = [int(pid) for pid in (tmp_path / "note").read_text().split()]
    for pid in pids:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- how good it is


@pytest.fixture
def trained(gpus, tmp_path):
    """A target whose weights are the model's own, so that its output can be judged."""
    gpus(H100)
    return replace(LOSSY, model=model_folder(tmp_path / "m"), quality=True, prompt_tokens=90)


def judged(sglang, target, reference, **changes):
    with sglang.launch(sglang.space(target).complete(changes), target) as engine:
        return engine.quality(reference)


def test_fixed_tokens_are_judged_and_held_against_the_default(sglang, trained, tmp_path, log):
    reference = tmp_path / "reference"
    assert judged(sglang, trained, reference) == {"nll_nats_per_token": 9.5, "quality_loss": 0.0}
    assert judged(sglang, trained, reference)["quality_loss"] == 0
    assert judged(sglang, trained, reference, kv_cache_dtype="fp8_e5m2")["quality_loss"] == pytest.approx(0.02)


def test_a_row_grows_by_one_token_a_request_so_that_the_cache_is_read_back(sglang, tmp_path):
    asked = []

    class Asks(sglang.JudgedSglang):
        def _generate(self, ids, sampling, **fields):
            asked.append((len(ids), fields.get("logprob_start_len")))
            return {"meta_info": {"input_token_logprobs": [[None, 0, None], [-1.0, ids[-1], None]]}}

    engine = Asks(None, {}, None, Target(), hugging_face.read(LOAD), {})
    assert engine._nats(sglang.Passage(source="", rows=[list(range(8))], context=5)) == [1.0, 1.0, 1.0]
    assert asked == [(5, None), (6, 4), (7, 5), (8, 6)]


def test_every_configuration_is_judged_by_the_very_tokens_that_the_default_kept(sglang, trained, tmp_path, log):
    reference = tmp_path / "reference"
    judged(sglang, trained, reference)
    kept = json.loads(reference.read_text())
    kept["rows"] = [[*row[:-1], 7] for row in kept["rows"]]
    reference.write_text(json.dumps(kept))
    with sglang.launch(sglang.space(trained).default(), trained) as engine:
        ask, asked = engine._generate, []
        engine._generate = lambda ids, *others, **fields: asked.append(ids) or ask(ids, *others, **fields)
        engine.quality(reference)
    assert [ids for ids in asked if len(ids) == 96] == kept["rows"]


def test_a_text_of_the_models_own_tokens_is_judged_in_rows_that_fit_the_context(sglang, trained, tmp_path, log):
    judged(sglang, replace(trained, prompt_tokens=20, output_tokens=8), tmp_path / "reference")
    kept = json.loads((tmp_path / "reference").read_text())
    assert kept["source"] == "a fixed text"
    assert {len(row) for row in kept["rows"]} == {40}
    assert len(TEXT.split()) > 4 * 40


@pytest.mark.parametrize("mode", ["no-tokenizer", "few-tokens"])
def test_without_a_tokenizer_the_default_says_what_is_judged(sglang, trained, tmp_path, log, monkeypatch, mode):
    monkeypatch.setenv("FAKE_SGLANG", mode)
    assert judged(sglang, trained, tmp_path / "reference")["quality_loss"] == 0
    kept = json.loads((tmp_path / "reference").read_text())
    assert kept["source"] == "sampled from the default configuration"
    assert kept["rows"][0][kept["context"] :] == list(range(2000, 2000 + 72))


def test_the_last_id_of_the_vocabulary_is_known_by_the_id_that_sglang_shows_for_it(sglang):
    model = hugging_face.read(LOAD)
    engine = sglang.JudgedSglang(None, {}, None, Target(), model, {})
    assert engine._read([[None, 3, None], [-2.0, 0, None]], model.vocabulary - 1) == 2.0
    with pytest.raises(RuntimeError, match="token 0 instead of 5"):
        engine._read([[-2.0, 0, None]], 5)


UNJUDGED = {
    "no-logprobs": "this SGLang gives no input_token_logprobs, so its output cannot be judged",
    "odd-logprobs": "SGLang gave log-probabilities of a prompt that cannot be read",
    "other-tokens": r"SGLang gave log-probabilities of a prompt that cannot be read \(token 1 instead of \d+\)",
    "nan": "no finite number: the output is broken",
    "impossible": "no finite number: the output is broken",
    "reset-unstreamed": "POST /generate brought no answer: ",
}


@pytest.mark.parametrize(("mode", "sentence"), UNJUDGED.items(), ids=UNJUDGED)
def test_output_that_cannot_be_judged_is_one_sentence_and_leaves_no_reference(
    sglang, trained, tmp_path, log, monkeypatch, mode, sentence
):
    monkeypatch.setattr("tuner.serving.LATE_SECONDS", 0.1)
    monkeypatch.setenv("FAKE_SGLANG", mode)
    with pytest.raises((RuntimeError, Refused), match=sentence) as caught:
        judged(sglang, trained, tmp_path / "reference")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("reference*")) == []


def test_an_engine_without_ids_of_what_it_says_cannot_be_judged_without_a_tokenizer(sglang):
    engine = sglang.JudgedSglang(None, {}, None, Target(), hugging_face.read(LOAD), {})
    with pytest.raises(RuntimeError, match="this SGLang gives no output_ids, so its output cannot be judged"):
        engine._of({"text": "x"}, "output_ids")


def test_an_engine_that_ends_while_it_is_judged_is_named_with_its_cause(sglang, trained, tmp_path, log):
    with sglang.launch(sglang.space(trained).default(), trained) as engine:
        os.killpg(engine._server.pid, signal.SIGTERM)
        assert engine._server.end(5)
        with pytest.raises(RuntimeError, match=r"SGLang ended while its output was judged \(.+\): "):
            engine.quality(tmp_path / "reference")


def test_a_cache_of_8_bits_that_is_not_read_back_is_no_finding(sglang, trained, tmp_path, log):
    fixed = replace(trained, engine_args=("--disable-radix-cache",))
    with pytest.raises(
        RuntimeError, match="SGLang read 0 of 94 tokens back from its cache, so what kv_cache_dtype fp8"
    ):
        judged(sglang, fixed, tmp_path / "reference", kv_cache_dtype="fp8_e5m2")


def test_a_cache_of_8_bits_without_a_radix_cache_is_answered_without_a_launch(sglang, trained):
    changes = {"kv_cache_dtype": "fp8_e5m2", "radix_cache": False}
    with pytest.raises(Refused, match="it needs radix_cache"):
        sglang.space(trained).complete(changes)
    assert sglang.space(replace(trained, quality=False)).complete(changes)


def test_weights_that_the_engine_draws_are_not_judged_and_the_line_on_the_model_says_so(sglang, log):
    drawn = replace(LOAD, allow_lossy=True, quality=True)
    with sglang.launch(sglang.space(drawn).default(), drawn) as engine:
        assert not isinstance(engine, Judged)
    assert "no quality_loss: weights that SGLang draws predict every token alike" in sglang.describe(drawn)
    assert "quality_loss" not in sglang.describe(LOAD)
    assert sglang.metrics(drawn) == ()


def test_limits_may_be_set_on_the_likelihood_itself(sglang, trained):
    assert sglang.metrics(trained) == ("nll_nats_per_token",)
    assert sglang.metrics(replace(trained, quality=False)) == ()


# --- for good


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--tensor-parallel-size=2"], "tp_size"),
        (["--cuda-graph-max-bs-d", "8"], "cuda_graph_max_bs"),
        (["--disable-cuda-graph"], "disable_cuda_graph"),
        (["--disable-decode-cuda-graph"], "disable_cuda_graph"),
    ],
    ids=" ".join,
)
def test_whatever_a_flag_is_called_it_takes_its_parameter_out_of_the_space(sglang, gpus, words, name):
    gpus(H100, H100)
    fixed = replace(ON_GPU, engine_args=tuple(words))
    assert set(sglang.space(ON_GPU).names) - set(sglang.space(fixed).names) == {name}
    assert sglang.notes(fixed) == [f"{name} is left out: --engine-arg {words[0].partition('=')[0]} fixes it"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--port", "9000"], "--engine-arg --port: tune chooses the port itself; leave it out"),
        (["--host=0.0.0.0"], "--engine-arg --host: tune chooses the host itself; leave it out"),
        (["--model", "m"], "--engine-arg --model: tune names the model itself, by its own --model; leave it out"),
        (
            ["--model-path=m"],
            "--engine-arg --model-path: tune names the model itself, by its own --model; leave it out",
        ),
        (["--context-len", "9"], "--engine-arg --context-len: tune sets it to what the load needs; leave it out"),
        (["--random-seed=1"], "--engine-arg --random-seed: tune sets it, by its own --seed; leave it out"),
        (["--sampling-defaults=model"], "--engine-arg --sampling-defaults: tune sets it itself; leave it out"),
        (
            ["--load-format=auto"],
            "--engine-arg --load-format: tune sets it, to let SGLang draw the weights; leave it out",
        ),
    ],
    ids=str,
)
def test_what_tune_sets_itself_is_refused(sglang, words, sentence):
    with pytest.raises(Refused) as raised:
        sglang.space(replace(LOAD, engine_args=(*CPU, *words)))
    assert str(raised.value) == sentence


def test_the_command_names_only_what_differs_from_the_default(sglang, executable):
    default = sglang.space(LOAD).default()
    folder = shlex.quote(str(hugging_face.read(LOAD).folder))
    start = f"{executable} -m sglang.launch_server --model-path {folder} --load-format dummy"
    end = "--device cpu --port 30000 --host 127.0.0.1"
    assert sglang.command(default, LOAD) == f"{start} {end}"
    changed = {**default, "max_running_requests": 4, "radix_cache": False}
    assert sglang.command(changed, LOAD) == f"{start} --max-running-requests 4 --disable-radix-cache {end}"


def test_the_printed_command_runs_what_was_measured(sglang, gpus, tmp_path, monkeypatch):
    """Started by a shell, it is the launch's program, and `/server_info` says the launch's settings."""
    gpus(H100, H100)
    target = replace(LOSSY, model=model_folder(tmp_path / "m"))
    tuned = {"max_running_requests": 4, "chunked_prefill_size": 1024, "max_prefill_tokens": 4096, "tp_size": 2}
    tuned |= {"schedule_policy": "lof", "schedule_conservativeness": 0.5, "radix_cache": False, "stream_interval": 4}
    tuned |= {"mem_fraction_static": 0.7, "cuda_graph_max_bs": 64, "attention_backend": "triton", "page_size": 16}
    tuned |= {"kv_cache_dtype": "fp8_e5m2", "quantization": "fp8"}
    config = sglang.space(target).complete(tuned)
    monkeypatch.setenv("FAKE_SGLANG_NOTE", str(tmp_path / "measured"))
    with sglang.launch(config, target) as engine:
        effective = {name: engine.effective[name] for name in tuned}
    monkeypatch.setenv("FAKE_SGLANG_NOTE", str(tmp_path / "printed"))
    port = free_port()
    command = sglang.command(config, target).replace("--port 30000", f"--port {port}")
    with typed_at_a_shell(command, port, tmp_path / "log") as endpoint:
        said = sglang.read_back(sglang._server_info(endpoint), config)
    assert {name: said[name] for name in tuned} == effective == tuned
    assert noted(tmp_path / "printed").words[:3] == noted(tmp_path / "measured").words[:3]


def test_the_service_is_the_official_image_on_a_gpu(sglang, gpus, executable, tmp_path):
    gpus(H100)
    model = model_folder(tmp_path / "m")
    target = replace(ON_GPU, model=model)
    service = sglang.service(sglang.space(target).complete({"stream_interval": 8}), target)
    words = ("-m", "sglang.launch_server", "--model-path", model, "--stream-interval", "8", "--port", "30000", "--host")
    assert service.image == "lmsysorg/sglang:v0.5.23"
    assert service.argv == (str(executable), *words, "127.0.0.1")
    assert service.image_argv == ("python3", *words, "0.0.0.0")  # noqa: S104 - the container's own
    assert (service.port, service.gpus, service.paths) == (30000, True, (model,))


def test_an_executable_of_sglangs_is_printed_as_it_is_started(sglang, own):
    assert shlex.split(sglang.command(sglang.space(LOAD).default(), LOAD))[:3] == [str(own), "serve", "--model-path"]


def test_the_service_of_a_cpu_is_a_command(sglang):
    service = sglang.service(sglang.space(LOAD).default(), LOAD)
    assert (service.image, service.image_argv, service.gpus) == (None, (), False)


def test_what_is_not_said_is_absent(sglang, gpus):
    gpus(H100)
    config = sglang.space(LOSSY).default()
    assert sglang.read_back({}, config) == {}
    assert sglang.read_back({"cuda_graph_config": None, "quantization": None}, config) == {"quantization": "none"}
