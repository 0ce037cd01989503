"""The llama-server runner: against a stand-in, against llama.cpp's own HTTP server behind it, and against itself."""

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

import psutil
import pytest
from contracts.runner_contract import RunnerContract
from printed import noted, typed_at_a_shell

from tuner.files import find, names
from tuner.models import gguf
from tuner.serving import free_port
from tuner.space import Refused
from tuner.trial import Target

RUNNER = Path(__file__).parents[1] / "runners" / "llama_server.py"
FAKES = Path(__file__).parent / "fakes"
LOAD = Target(size="tiny", prompts=4, prompt_tokens=16, output_tokens=4)
LOSSY = replace(LOAD, allow_lossy=True)
REAL = os.environ.get("TUNE_LLAMA_SERVER")
H100 = (
    "  CUDA0: NVIDIA H100 80GB HBM3 (81559 MiB, 80994 MiB free)\n  CUDA1: NVIDIA H100 80GB HBM3 (81559 MiB, 5 MiB free)"
)
STAND_IN = (
    f"import runpy, sys\nsys.argv[0] = 'llama-server'\n"
    f"runpy.run_path({str(FAKES / 'llama_server.py')!r}, run_name='__main__')"
)


@pytest.fixture(scope="session")
def llama_server():
    spec = importlib.util.spec_from_file_location("llama_server_runner_under_test", RUNNER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def executable(tmp_path_factory):
    """One for all tests that change nothing about it: the runner asks each program once."""
    return script(tmp_path_factory.mktemp("shared") / "llama-server")


def script(path):
    path.write_text(f"#!{sys.executable}\n{STAND_IN}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the generated model is kept: it is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def stand_in(executable, cache, monkeypatch, request):
    if request.node.get_closest_marker("slow"):
        return
    monkeypatch.setenv("TUNE_LLAMA_SERVER", str(executable))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """An executable of this test's own, which nobody has asked yet."""
    path = script(tmp_path / "llama-server")
    monkeypatch.setenv("TUNE_LLAMA_SERVER", str(path))
    return path


class TestLlamaServer(RunnerContract):
    # The engine refuses a quantised cache without flash attention; the space does not offer it here at all.
    unloadable: ClassVar = {"cache_type_v": "q8_0", "flash_attention": "off"}
    # The log does not name it.
    unreadable: ClassVar = frozenset({"continuous_batching"})

    @pytest.fixture
    def runner(self, llama_server):
        return llama_server

    @pytest.fixture
    def target(self):
        return LOAD


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="TUNE_LLAMA_SERVER names none: the runner was tested against a stand-in only")
class TestLlamaServerItself(TestLlamaServer):
    """The same, where there is a real one."""


def test_the_workload_is_named_with_a_dash_or_an_underscore(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("runners", "llama-server") == find("runners", "llama_server") == RUNNER
    assert "llama-server" in names("runners")


# --- the program


def test_without_llama_server_it_is_said_how_to_get_it(llama_server, monkeypatch):
    monkeypatch.delenv("TUNE_LLAMA_SERVER")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Refused, match=r"finds no llama-server on the PATH; .*set TUNE_LLAMA_SERVER="):
        llama_server.space(LOAD)


def test_a_wrong_tune_llama_server_is_named(llama_server, monkeypatch):
    monkeypatch.setenv("TUNE_LLAMA_SERVER", "/no/such/server")
    with pytest.raises(Refused, match=r"TUNE_LLAMA_SERVER=/no/such/server: expected the llama-server executable"):
        llama_server.space(LOAD)


def test_a_llama_server_on_the_path_is_taken(own, llama_server, monkeypatch):
    monkeypatch.delenv("TUNE_LLAMA_SERVER")
    monkeypatch.setenv("PATH", f"{own.parent}:{os.environ['PATH']}")
    assert llama_server._build().program == str(own)
    assert llama_server.identity(LOAD)["engine_version"] == "10434 (7e4c0a9)"


def test_one_that_does_not_run_is_refused_with_its_last_line(own, llama_server, monkeypatch):
    broken = "error while loading shared libraries: libcudart.so.12: cannot open shared object file"
    monkeypatch.setenv("FAKE_LLAMA_BROKEN", broken)
    with pytest.raises(Refused, match=r"llama-server does not run here \(error while loading shared libraries: libcud"):
        llama_server.space(LOAD)


def test_another_program_is_refused(llama_server, monkeypatch):
    monkeypatch.setenv("TUNE_LLAMA_SERVER", shutil.which("true"))
    with pytest.raises(Refused, match="expected llama-server, but its --help lists no --parallel"):
        llama_server.space(LOAD)


def test_the_help_is_read_with_every_name_of_a_flag(llama_server):
    flags = llama_server.parse_help((FAKES / "llama_server_help.txt").read_text())
    assert flags["-np"] is flags["--parallel"]
    assert flags["-ngl"] is flags["--gpu-layers"] is flags["--n-gpu-layers"]
    assert flags["-nocb"] is flags["--cont-batching"]
    assert "[on|off|auto]" in flags["--flash-attn"]
    # Named inside an explanation only.
    assert "--lookup" not in flags


# --- the space


def test_a_cpu_gets_what_a_cpu_can(llama_server):
    space = llama_server.space(LOAD)
    assert space.names == (
        "concurrency",
        "parallel",
        "threads_batch",
        "threads",
        "repack",
        "flash_attention",
        "n_ubatch",
        "n_batch",
        "continuous_batching",
        "kv_unified",
        "mmap",
    )
    assert space["threads"].default == 2
    assert llama_server.notes(LOAD) == [
        "poll is left out: this build computes with OpenMP, whose threads do not heed --poll"
    ]
    assert llama_server.identity(LOAD)["device"] == "cpu"


def test_a_build_without_openmp_heeds_polling(own, llama_server, monkeypatch, tmp_path, log):
    monkeypatch.setenv("FAKE_LLAMA_OPENMP", "0")
    monkeypatch.setenv("FAKE_LLAMA_NOTE", str(tmp_path / "note"))
    space = llama_server.space(LOAD)
    assert space["poll"].default == 50
    with llama_server.launch(space.complete({"poll": 0}), LOAD):
        assert "--poll 0" in (tmp_path / "note").read_text()


def test_layers_go_to_a_gpu_only_where_one_is_shown(own, llama_server, monkeypatch):
    monkeypatch.setenv("FAKE_LLAMA_DEVICES", H100)
    space = llama_server.space(LOAD)
    assert (space["n_gpu_layers"].default, space["n_gpu_layers"].lever) == (3, "offload")
    assert "NVIDIA H100 80GB HBM3" in space["n_gpu_layers"].meaning
    assert llama_server.identity(LOAD)["device"] == "NVIDIA H100 80GB HBM3, NVIDIA H100 80GB HBM3"
    assert "--n-gpu-layers 1" in llama_server.command(space.complete({"n_gpu_layers": 1}), LOAD)
    service = llama_server.service(space.default(), LOAD)
    assert (service.gpus, service.image) == (True, "ghcr.io/ggml-org/llama.cpp:server-cuda")


def test_what_does_not_fit_a_gpu_is_answered_without_a_launch(own, llama_server, monkeypatch):
    monkeypatch.setenv("FAKE_LLAMA_DEVICES", "  CUDA0: a small one (1 MiB, 1 MiB free)")
    space = llama_server.space(LOAD)
    # The whole is about 2 MB: a third of it and more stays on the CPU.
    assert 0 <= space["n_gpu_layers"].default < 3
    assert not space.broken(space.default())
    assert "fewer n_gpu_layers or less parallel" in space.broken({**space.default(), "n_gpu_layers": 3})[0]


def test_what_does_not_fit_main_memory_is_answered_without_a_launch(llama_server, monkeypatch):
    monkeypatch.setattr(llama_server, "memory_bytes", lambda: 10**6)
    space = llama_server.space(LOAD)
    assert "fit into the 0.000931 GiB of main memory" in space.broken(space.default())[0]


@pytest.mark.parametrize(
    ("words", "fits"),
    [([], False), (["-ctk=q4_0", "-ctv=q4_0"], True), (["-np=1", "-b=256"], True), (["-np=-1"], False)],
    ids=str,
)
def test_what_an_argument_says_of_the_cache_counts(llama_server, monkeypatch, words, fits):
    monkeypatch.setattr(llama_server, "memory_bytes", lambda: 10**6)
    space = llama_server.space(replace(LOAD, engine_args=tuple(words)))
    assert bool(space.broken(space.default())) is not fits


def test_the_context_is_that_of_the_slots_that_an_argument_asks_for(llama_server):
    target = replace(LOAD, engine_args=("-np", "16"))
    assert "--ctx-size 4096 " in llama_server.command(llama_server.space(target).default(), target)


@pytest.mark.parametrize(("layers", "fits"), [("0", True), ("3", False), ("all", False), ("auto", False)])
def test_layers_that_an_argument_moves_to_a_gpu_count(own, llama_server, monkeypatch, layers, fits):
    monkeypatch.setenv("FAKE_LLAMA_DEVICES", "  CUDA0: a small one (1 MiB, 1 MiB free)")
    space = llama_server.space(replace(LOAD, engine_args=("-ngl", layers)))
    assert bool(space.broken(space.default())) is not fits


def test_weights_that_an_argument_moves_elsewhere_are_not_counted_and_that_is_said(own, llama_server, monkeypatch):
    monkeypatch.setenv("FAKE_LLAMA_DEVICES", "  CUDA0: a small one (1 MiB, 1 MiB free)")
    target = replace(LOAD, engine_args=("--cpu-moe",))
    space = llama_server.space(target)
    assert not space.broken({**space.default(), "n_gpu_layers": 3})
    assert llama_server.notes(target)[-1].endswith("shows only when it is launched: --engine-arg --cpu-moe changes it")


@pytest.mark.parametrize("device", ["  CUDA0: a small one (1 MiB, 1 MiB free)", "  CUDA0: one (80000 MiB, 1 MiB free)"])
def test_the_command_always_names_the_layers_on_a_gpu(own, llama_server, monkeypatch, device):
    monkeypatch.setenv("FAKE_LLAMA_DEVICES", device)
    default = llama_server.space(LOAD).default()
    assert f"--n-gpu-layers {default['n_gpu_layers']}" in llama_server.command(default, LOAD)


def test_the_cache_is_counted_from_the_files_header(llama_server):
    model = gguf.read(LOAD)
    # 2 layers, 64 wide: keys and values.
    assert model.cache_values_per_token == 2 * 2 * 64
    default = llama_server.space(LOAD).default()
    assert llama_server._needed_bytes(model, default, LOAD) == model.bytes + 2048 * 256 * 2
    quantised = {**default, "cache_type_k": "q8_0", "cache_type_v": "q8_0"}
    assert llama_server._needed_bytes(model, quantised, LOAD) == model.bytes + 2048 * 256 * 34 / 32


def test_lossy_parameters_are_those_of_the_cache(llama_server):
    lossy = {p.name for p in llama_server.space(LOSSY).parameters if p.effect == "lossy"}
    assert lossy == {"cache_type_k", "cache_type_v"}


BROKEN = [
    ({"n_ubatch": 512, "n_batch": 256}, "n_ubatch <= n_batch"),
    ({"cache_type_v": "q8_0"}, "a quantised cache_type_v needs flash_attention on"),
    ({"cache_type_v": "q4_0", "flash_attention": "off"}, "a quantised cache_type_v needs flash_attention on"),
]


@pytest.mark.parametrize(("changes", "sentence"), BROKEN)
def test_what_the_engine_would_refuse_is_answered_without_a_launch(llama_server, changes, sentence):
    with pytest.raises(Refused, match=sentence):
        llama_server.space(LOSSY).complete(changes)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"prompts": 0}, "--prompts 0: expected at least 1"),
        ({"prompt_tokens": 5000}, "expected at most 4096 tokens together"),
        ({"size": "7b"}, "--size 7b: expected one of 160m, tiny"),
        ({"model": "m.gguf"}, "leave one of them out"),
        ({"size": None, "model": "/no/such.gguf"}, "--model /no/such.gguf: no such file"),
        ({"size": None, "model": __file__}, "expected a GGUF language model"),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_way_on(llama_server, changes, refusal):
    with pytest.raises(Refused) as refused:
        llama_server.space(replace(LOAD, **changes))
    assert refusal in str(refused.value)


def test_flags_that_a_build_lacks_are_left_out_and_said_so(own, llama_server, monkeypatch, log):
    lacks = "--no-repack,-nr,--load-mode,-lm,--cache-ram,-cram,--no-kv-unified,-no-kvu,--fit,-fit,--no-ui,--no-slots"
    monkeypatch.setenv("FAKE_LLAMA_LACKS", lacks)
    space = llama_server.space(LOAD)
    assert "repack" not in space.names
    assert llama_server.notes(LOAD)[0] == "repack is left out: llama-server 10434 (7e4c0a9) has no --no-repack"
    assert llama_server.describe(LOAD).endswith("do not heed --poll")
    with llama_server.launch(space.complete({"mmap": False, "kv_unified": False}), LOAD) as engine:
        assert engine.run_pass().units == 16
        assert (engine.effective["mmap"], engine.effective["kv_unified"]) == (False, False)


def test_a_flag_that_engine_args_fix_is_not_tuned_by_whatever_name(llama_server):
    fixed = replace(LOAD, engine_args=("-np", "2", "--no-repack"))
    assert not {"parallel", "repack"} & set(llama_server.space(fixed).names)
    assert "parallel is left out: --engine-arg -np fixes it" in llama_server.notes(fixed)
    assert llama_server.identity(fixed)["engine_args"] == "-np 2 --no-repack"
    assert "-np 2 --no-repack" in llama_server.command(llama_server.space(fixed).default(), fixed)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--no-mmap"], "mmap"),
        (["--mmap"], "mmap"),
        (["-lm", "none"], "mmap"),
        (["-nocb"], "continuous_batching"),
        (["--no_kv_unified"], "kv_unified"),
        (["-kvu"], "kv_unified"),
        (["--repack"], "repack"),
    ],
    ids=" ".join,
)
def test_every_name_of_a_flag_takes_its_parameter_out_of_the_space(llama_server, words, name):
    fixed = replace(LOAD, engine_args=tuple(words))
    assert set(llama_server.space(LOAD).names) - set(llama_server.space(fixed).names) == {name}
    assert f"{name} is left out: --engine-arg {words[0]} fixes it" in llama_server.notes(fixed)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--port", "9000"], "--engine-arg --port: tune chooses the port itself; leave it out"),
        (["--host", "0.0.0.0"], "--engine-arg --host: tune chooses the host itself; leave it out"),  # noqa: S104 - refused
        (["-m", "m.gguf"], "--engine-arg -m: tune names the model itself, by its own --model; leave it out"),
        (["--model=m.gguf"], "--engine-arg --model: tune names the model itself, by its own --model; leave it out"),
        (["--hf-repo", "a/b"], "--engine-arg --hf-repo: tune names the model itself, by its own --model; leave it out"),
        (["-c", "9"], "--engine-arg -c: tune sets it to what the load needs; leave it out"),
        (["-fit", "on"], "--engine-arg -fit: tune sets it itself; leave it out"),
        (["--verbosity", "1"], "--engine-arg --verbosity: tune sets it itself; leave it out"),
        (["--cache_ram", "1"], "--engine-arg --cache_ram: tune sets it itself; leave it out"),
        (["--slots"], "--engine-arg --slots: tune sets it itself; leave it out"),
        (["--webui"], "--engine-arg --webui: tune sets it itself; leave it out"),
    ],
    ids=str,
)
def test_what_tune_sets_itself_is_refused(llama_server, words, sentence):
    with pytest.raises(Refused) as raised:
        llama_server.space(replace(LOAD, engine_args=tuple(words)))
    assert str(raised.value) == sentence


def test_an_open_loop_has_no_concurrency(llama_server):
    assert "concurrency" not in llama_server.space(replace(LOAD, request_rate=5.0)).names


def test_prompts_are_of_ordinary_tokens_only(llama_server):
    assert llama_server._ordinary((1, 2, 5, 6, 7, 9)) == range(5, 8)


def test_only_a_generated_model_is_kept_from_single_bytes(llama_server):
    assert llama_server._whole_characters(LOAD, (2, 3, 5)) == {"logit_bias": [[0, False], [1, False], [4, False]]}
    assert llama_server._whole_characters(replace(LOAD, model="m.gguf"), (2, 3, 5)) == {}


# --- running it


def test_every_tuned_flag_is_named_and_read_back(llama_server, monkeypatch, tmp_path, log):
    monkeypatch.setenv("FAKE_LLAMA_NOTE", str(tmp_path / "note"))
    changes = {
        "concurrency": 2,
        "parallel": 2,
        "threads_batch": 1,
        "threads": 1,
        "repack": False,
        "flash_attention": "on",
        "n_ubatch": 64,
        "n_batch": 128,
        "continuous_batching": False,
        "kv_unified": False,
        "cache_type_k": "q8_0",
        "cache_type_v": "q4_0",
        "mmap": False,
    }
    space = llama_server.space(LOSSY)
    assert set(changes) == set(space.names)
    with llama_server.launch(space.complete(changes), LOSSY) as engine:
        effective = dict(engine.effective)
        engine.change({**changes, "concurrency": 3})
        assert engine.effective["concurrency"] == 3
    del changes["continuous_batching"]
    assert effective == {**changes, "n_ctx": 512}
    _, scratch, words, *_ = (tmp_path / "note").read_text().splitlines()
    assert not Path(scratch).exists()
    for flag in ("--fit off", "--no-cont-batching", "--host 127.0.0.1", "--port ", "--cache-ram 0", "--ctx-size 512"):
        assert flag in words


FAILURES = {
    "oom-loading": r"^llama-server ended while loading \(exit status 1\): out of memory: allocating 4403.49 MiB on",
    "bad-model": r"^llama-server ended while loading \(exit status 1\): llama_model_load: error loading model: missing",
    "port-in-use": r"^llama-server found its port taken, 3 times in a row .*ended while loading",
    "crash-loading": r"^llama-server was killed by SIGSEGV while loading; ",
    "500": r"^llama-server answered HTTP 500: ",
    "out-of-memory:2": r"^llama-server ended in the middle of a pass \(exit status 1\): out of memory: Device memory",
    "killed:1": r"^llama-server was killed by SIGKILL in the middle of a pass; ",
    "cut": r"^llama-server: the stream was cut off before \[DONE\]$",
    "short": r"^llama-server generated 3 tokens for a request instead of 4",
    "cached": r"^llama-server took 15 of 16 prompt tokens from a cache, though no prompt is sent twice; start",
}


@pytest.mark.parametrize(("mode", "sentence"), FAILURES.items(), ids=FAILURES)
def test_a_launch_that_fails_is_one_sentence_and_leaves_nothing(
    llama_server, monkeypatch, tmp_path, log, mode, sentence
):
    monkeypatch.setattr("tuner.serving.LATE_SECONDS", 1.0)
    monkeypatch.setenv("FAKE_LLAMA_SERVER", mode)
    monkeypatch.setenv("FAKE_LLAMA_NOTE", str(tmp_path / "note"))
    before = set(psutil.Process().children(recursive=True))
    with (
        pytest.raises((RuntimeError, Refused), match=sentence) as caught,
        llama_server.launch(llama_server.space(LOAD).default(), LOAD),
    ):
        pytest.fail("an engine was yielded")
    assert "\n" not in str(caught.value)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not Path((tmp_path / "note").read_text().splitlines()[1]).exists()


@pytest.mark.parametrize(("mode", "answer"), [("hang-loading", "nothing"), ("unhealthy", "HTTP 503")])
def test_an_engine_that_never_serves_is_given_up(llama_server, monkeypatch, log, mode, answer):
    monkeypatch.setenv("FAKE_LLAMA_SERVER", mode)
    monkeypatch.setattr(llama_server, "START_SECONDS", 1.0)
    with (
        pytest.raises(RuntimeError, match=rf"^llama-server was not ready after 1 s: GET /health brought {answer}"),
        llama_server.launch(llama_server.space(LOAD).default(), LOAD),
    ):
        pytest.fail("an engine was yielded")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--no-such-flag",),
            r"^--engine-arg=--no-such-flag: .*error: invalid argument: --no-such-flag\); leave",
        ),
        (
            ("-fa", "maybe"),
            r'^--engine-arg=-fa: .*"-fa": error: unknown value for --flash-attn: \'maybe\'\); leave it out',
        ),
    ],
)
def test_a_flag_that_it_rejects_is_told_in_its_own_words(llama_server, log, words, sentence):
    target = replace(LOAD, engine_args=words)
    with (
        pytest.raises(Refused, match=sentence),
        llama_server.launch(llama_server.space(target).default(), target),
    ):
        pytest.fail("an engine was yielded")


def test_one_that_ignores_sigterm_and_its_children_are_killed(llama_server, monkeypatch, tmp_path, log):
    monkeypatch.setattr("tuner.serving.Server.stop.__defaults__", (0.3,))
    monkeypatch.setenv("FAKE_LLAMA_SERVER", "stubborn")
    monkeypatch.setenv("FAKE_LLAMA_NOTE", str(tmp_path / "note"))
    with llama_server.launch(llama_server.space(LOAD).default(), LOAD):
        pids = [int(pid) for pid in (tmp_path / "note").read_text().split()]
    for pid in pids:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_llama_cpps_own_server_answers_behind_the_stand_in(llama_server, monkeypatch, log):
    pytest.importorskip("xllamacpp", reason="llama.cpp's server is in the package xllamacpp")
    monkeypatch.setenv("FAKE_LLAMA_ENGINE", "xllamacpp")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    changes = {"parallel": 2, "n_ubatch": 64, "n_batch": 128, "flash_attention": "off", "kv_unified": False}
    with llama_server.launch(llama_server.space(LOAD).complete(changes), LOAD) as engine:
        effective = dict(engine.effective)
        work = engine.run_pass()
    assert {name: effective[name] for name in changes} == changes
    assert (work.units, work.prompt_tokens, work.failed_requests) == (16, 64, 0)
    assert work.prefill_seconds > 0
    assert len(work.itl_seconds) == 4 * 3


# --- how good it is


JUDGED = replace(LOSSY, quality=True)
FEWER_BITS = {"cache_type_k": "q4_0", "cache_type_v": "q4_0", "flash_attention": "on"}


def judged(llama_server, target, reference, **changes):
    with llama_server.launch(llama_server.space(target).complete(changes), target) as engine:
        return engine.quality(reference)


def trained(llama_server):
    """A model file, as one of the person's own is."""
    return replace(JUDGED, size=None, model=str(gguf.read(LOAD).path))


def test_given_tokens_are_judged_and_held_against_the_default(llama_server, tmp_path, log):
    reference = tmp_path / "reference"
    assert judged(llama_server, JUDGED, reference) == {"nll_nats_per_token": 6.5, "quality_loss": 0.0}
    assert judged(llama_server, JUDGED, reference)["quality_loss"] == 0
    assert judged(llama_server, JUDGED, reference, **FEWER_BITS)["quality_loss"] == pytest.approx(0.005)


def test_a_generated_model_is_judged_by_what_the_default_says(llama_server, tmp_path, log):
    judged(llama_server, JUDGED, tmp_path / "reference")
    kept = json.loads((tmp_path / "reference").read_text())
    assert kept["source"] == "sampled from the default configuration"
    assert {tuple(row[kept["context"] :]) for row in kept["rows"]} == {tuple(range(400, 472))}


def test_a_model_file_is_judged_by_a_fixed_text(llama_server, tmp_path, log):
    judged(llama_server, trained(llama_server), tmp_path / "reference")
    assert json.loads((tmp_path / "reference").read_text())["source"] == "a fixed text"


def test_each_row_is_asked_for_alone_with_a_grammar_that_names_its_tokens(llama_server, tmp_path, log):
    reference = {"rows": [[7, 8, 9, 10], [11, 12, 13, 14]], "context": 2, "nll_nats_per_token": 6.0}
    (tmp_path / "reference").write_text(json.dumps(reference))
    with llama_server.launch(llama_server.space(JUDGED).default(), JUDGED) as engine:
        answer, asked = engine._forced.ask, []
        object.__setattr__(engine._forced, "ask", lambda request: asked.append(request) or answer(request))
        assert engine.quality(tmp_path / "reference")["quality_loss"] == 0.5
    assert [(a["prompt"], a["grammar"]) for a in asked] == [
        ([7, 8], "root ::= <[9]> <[10]>"),
        ([11, 12], "root ::= <[13]> <[14]>"),
    ]
    assert {a["cache_prompt"] for a in asked} == {False}


UNJUDGED = {
    "no-logprobs": "llama-server gave log-probabilities that cannot be read",
    "nan": "llama-server gave log-probabilities that cannot be read",
    "impossible": "no finite number: the output is broken",
    "short-answer": "llama-server generated 71 tokens to be judged instead of 72",
    "other-tokens": "llama-server did not follow the reference, so its output cannot be judged",
    "reset-unstreamed": "POST /v1/completions brought no answer: ",
}


@pytest.mark.parametrize(("mode", "sentence"), UNJUDGED.items(), ids=UNJUDGED)
def test_output_that_cannot_be_judged_is_one_sentence_and_leaves_no_reference(
    llama_server, tmp_path, log, monkeypatch, mode, sentence
):
    monkeypatch.setattr("tuner.serving.LATE_SECONDS", 0.1)
    monkeypatch.setenv("FAKE_LLAMA_SERVER", mode)
    with pytest.raises((RuntimeError, Refused), match=sentence) as caught:
        judged(llama_server, JUDGED, tmp_path / "reference")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("reference*")) == []


def test_a_text_that_is_answered_with_no_tokens_is_one_sentence(llama_server, tmp_path, log, monkeypatch):
    monkeypatch.setattr("tuner.serving.LATE_SECONDS", 0.1)
    monkeypatch.setenv("FAKE_LLAMA_SERVER", "odd-tokens")
    with pytest.raises(RuntimeError, match="POST /tokenize brought no list of tokens: none"):
        judged(llama_server, trained(llama_server), tmp_path / "reference")


def test_an_engine_that_ends_while_it_is_judged_is_named_with_its_cause(llama_server, tmp_path, log):
    with llama_server.launch(llama_server.space(JUDGED).default(), JUDGED) as engine:
        os.killpg(engine._server.pid, signal.SIGTERM)
        assert engine._server.end(5)
        with pytest.raises(RuntimeError, match=r"llama-server ended while its output was judged \(.+\): "):
            engine.quality(tmp_path / "reference")


def test_limits_may_be_set_on_the_likelihood_itself(llama_server):
    assert (llama_server.metrics(JUDGED), llama_server.metrics(LOSSY)) == (("nll_nats_per_token",), ())


# --- for good


def test_the_command_names_only_what_differs_from_the_default(llama_server, executable):
    default = llama_server.space(LOAD).default()
    start = f"{executable} --model {shlex.quote(str(gguf.read(LOAD).path))} --ctx-size 2048 --fit off"
    end = "--port 8080 --host 127.0.0.1"
    assert llama_server.command(default, LOAD) == f"{start} {end}"
    changed = {**default, "parallel": 2, "threads": 1, "mmap": False, "repack": False}
    assert llama_server.command(changed, LOAD) == (
        f"{start} --parallel 2 --threads 1 --no-repack --load-mode none --kv-unified --threads-batch 2 {end}"
    )


TUNED = {"parallel": 2, "threads": 1, "threads_batch": 1, "n_batch": 64, "n_ubatch": 32, "flash_attention": "on"}
TUNED |= {"kv_unified": False, "repack": False, "mmap": False, "cache_type_k": "q8_0", "cache_type_v": "q8_0"}


@pytest.mark.parametrize("changes", [TUNED, {"parallel": 2}, {"threads": 1}, {}], ids=str)
def test_the_printed_command_runs_what_was_measured(llama_server, log, tmp_path, monkeypatch, changes):
    """Started by a shell, the program of the launch says in its log what the launch's said."""
    config = llama_server.space(LOSSY).complete(changes)
    monkeypatch.setenv("FAKE_LLAMA_NOTE", str(tmp_path / "measured"))
    with llama_server.launch(config, LOSSY) as engine:
        effective = dict(engine.effective)
    monkeypatch.setenv("FAKE_LLAMA_NOTE", str(tmp_path / "printed"))
    port = free_port()
    command = llama_server.command(config, LOSSY).replace("--port 8080", f"--port {port}")
    with typed_at_a_shell(command, port, tmp_path / "log"):
        said = llama_server.read_back((tmp_path / "log").read_text(), config)
    assert effective == {"concurrency": config["concurrency"], **said}
    assert set(changes) <= effective.keys()
    assert noted(tmp_path / "printed").words[:3] == noted(tmp_path / "measured").words[:3]


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="TUNE_LLAMA_SERVER names none: no printed command was typed for a real one")
@pytest.mark.parametrize("changes", [TUNED, {}], ids=str)
def test_the_printed_command_starts_llama_server_itself(llama_server, log, tmp_path, changes):
    config = llama_server.space(LOSSY).complete(changes)
    with llama_server.launch(config, LOSSY) as engine:
        effective = dict(engine.effective)
    port = free_port()
    command = llama_server.command(config, LOSSY).replace("--port 8080", f"--log-verbosity 4 --port {port}")
    with typed_at_a_shell(command, port, tmp_path / "log"):
        said = llama_server.read_back((tmp_path / "log").read_text(), config)
    assert effective == {"concurrency": config["concurrency"], **said}


def test_the_service_listens_to_this_machine_alone_and_in_a_container_to_its_network(llama_server, executable):
    service = llama_server.service(llama_server.space(LOAD).default(), LOAD)
    path = str(gguf.read(LOAD).path)
    assert service.argv[0] == str(executable)
    assert service.argv[-4:] == ("--port", "8080", "--host", "127.0.0.1")
    assert service.image_argv[:2] == ("--model", path)
    assert service.image_argv[-1] == "0.0.0.0"  # noqa: S104 - the container's own network
    assert (service.port, service.gpus, service.paths) == (8080, False, (path,))
    assert service.image == "ghcr.io/ggml-org/llama.cpp:server"


def test_what_is_not_said_is_absent(llama_server):
    assert llama_server.read_back("", llama_server.space(LOSSY).default()) == {}


def test_an_older_builds_word_for_mapping_is_understood(llama_server):
    log = "load_tensors: loading model tensors, this can take a while... (mmap = false)"
    assert llama_server.read_back(log, {"mmap": True}) == {"mmap": False}


# --- llama-server itself


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="TUNE_LLAMA_SERVER names none: the runner was tested against a stand-in only")
def test_llama_server_itself_runs_the_load_and_reads_back_what_it_was_told(llama_server, log):
    changes = {"parallel": 2, "n_ubatch": 64, "n_batch": 128, "flash_attention": "on", "kv_unified": False}
    changes |= {"threads": 1, "mmap": False, "cache_type_k": "q8_0", "cache_type_v": "q8_0"}
    space = llama_server.space(LOSSY)
    with llama_server.launch(space.complete(changes), LOSSY) as engine:
        effective = dict(engine.effective)
        works = [engine.run_pass() for _ in range(2)]
    assert {name: effective[name] for name in changes} == changes
    assert [(w.units, w.prompt_tokens, w.failed_requests) for w in works] == [(16, 64, 0)] * 2
    assert set(space.names) - set(effective) <= TestLlamaServer.unreadable
    config = {**space.default(), "cache_type_v": "q8_0", "flash_attention": "off"}
    with pytest.raises(RuntimeError, match="V cache"), llama_server.launch(config, LOSSY):
        pytest.fail("an engine was yielded")


itself = pytest.mark.skipif(
    REAL is None, reason="TUNE_LLAMA_SERVER names none: no output of a real llama-server was judged"
)


@pytest.mark.slow
@itself
def test_llama_server_itself_loses_nothing_against_itself_and_something_with_fewer_bits(llama_server, tmp_path, log):
    reference = tmp_path / "reference"
    first = judged(llama_server, JUDGED, reference)["nll_nats_per_token"]
    assert judged(llama_server, JUDGED, reference) == {"nll_nats_per_token": first, "quality_loss": 0.0}
    # Another shape of the steps rounds differently: 0.0004 nats were seen.
    assert abs(judged(llama_server, JUDGED, reference, parallel=1)["quality_loss"]) < 2e-3
    # 0.0052 nats were seen, the same as in the `llama` workload.
    assert 2e-3 < judged(llama_server, JUDGED, reference, **FEWER_BITS)["quality_loss"] < 2e-2


@pytest.mark.slow
@itself
def test_llama_server_itself_judges_a_model_file_by_a_fixed_text(llama_server, tmp_path, log):
    reference = tmp_path / "reference"
    target = trained(llama_server)
    assert judged(llama_server, target, reference)["quality_loss"] == 0
    assert json.loads(reference.read_text())["source"] == "a fixed text"
    assert judged(llama_server, target, reference)["quality_loss"] == 0
    assert abs(judged(llama_server, target, reference, **FEWER_BITS)["quality_loss"]) > 1e-4


@pytest.mark.slow
@itself
def test_a_token_that_llama_server_itself_was_made_to_say_has_the_likelihood_that_it_has_freely(
    llama_server, tmp_path, log
):
    with llama_server.launch(llama_server.space(JUDGED).default(), JUDGED) as engine:
        engine.quality(tmp_path / "reference")
        kept = json.loads((tmp_path / "reference").read_text())
        row, context = kept["rows"][0], kept["context"]
        nats = engine._nats(llama_server.Passage(source="", rows=[row], context=context))
        for at in (0, 7, 71):
            asked = {"prompt": row[: context + at], "n_predict": 1, "logprobs": 1024, "cache_prompt": False}
            asked |= {"ignore_eos": True, "temperature": 0, **llama_server._whole_characters(JUDGED, engine._tokens)}
            content = engine._answer(asked)["choices"][0]["logprobs"]["content"][0]
            free = {top["id"]: top["logprob"] for top in content["top_logprobs"]}
            # Prompts are computed in batches and answers one by one, which rounds differently.
            assert -nats[at] == pytest.approx(free[row[context + at]], abs=0.02)
