"""The Ollama runner: against a stand-in that speaks its variables, its log and its native API."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import psutil
import pytest
from contracts.runner_contract import RunnerContract
from printed import noted, typed_at_a_shell

from tuner.apply import Launch, render
from tuner.models import gguf
from tuner.serving import free_port
from tuner.space import Refused
from tuner.trial import Target

RUNNER = Path(__file__).parents[1] / "runners" / "ollama.py"
FAKES = Path(__file__).parent / "fakes"
LOAD = Target(model="tiny", prompts=4, prompt_tokens=16, output_tokens=4)
LOSSY = replace(LOAD, allow_lossy=True)
STAND_IN = f"import runpy, sys\nrunpy.run_path({str(FAKES / 'ollama_server.py')!r}, run_name='__main__')"


@pytest.fixture(scope="session")
def ollama():
    spec = importlib.util.spec_from_file_location("ollama_runner_under_test", RUNNER)
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
    """One for all tests that change nothing about it: the runner asks each program once."""
    return script(tmp_path_factory.mktemp("shared") / "ollama")


@pytest.fixture(autouse=True)
def stand_in(executable, ollama, monkeypatch):
    """An `ollama` that is found, no GPU, and nothing else of this machine's."""
    for name in [name for name in os.environ if name.startswith("OLLAMA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TUNE_OLLAMA", str(executable))
    monkeypatch.setattr(ollama, "gpus_here", tuple)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """An executable of this test's own, which nobody has asked yet."""
    path = script(tmp_path / "bin" / "ollama")
    monkeypatch.setenv("TUNE_OLLAMA", str(path))
    return path


def written():
    """What stands on standard error, a file while a test runs."""
    return Path("/proc/self/fd/2").read_text()


@pytest.fixture
def gpu(ollama, monkeypatch):
    def put(mib):
        monkeypatch.setattr(ollama, "gpus_here", lambda: (SimpleNamespace(name="NVIDIA L4", bytes=mib * 2**20),))

    return put


class TestOllama(RunnerContract):
    # Ollama wants a number of layers; the space of a CPU does not offer it at all.
    unloadable: ClassVar = {"num_gpu": "all"}

    @pytest.fixture
    def runner(self, ollama):
        return ollama

    @pytest.fixture
    def target(self):
        return LOAD


# --- the program and the model


def test_without_ollama_it_is_said_how_to_get_it(ollama, monkeypatch):
    monkeypatch.delenv("TUNE_OLLAMA")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Refused, match=r"finds no ollama on the PATH; install it .*set TUNE_OLLAMA="):
        ollama.space(LOAD)


def test_a_wrong_tune_ollama_is_named(ollama, monkeypatch):
    monkeypatch.setenv("TUNE_OLLAMA", "/no/such/ollama")
    with pytest.raises(Refused, match=r"TUNE_OLLAMA=/no/such/ollama: expected the ollama executable"):
        ollama.space(LOAD)


def test_an_ollama_on_the_path_is_taken(own, ollama, monkeypatch):
    monkeypatch.delenv("TUNE_OLLAMA")
    monkeypatch.setenv("PATH", f"{own.parent}:{os.environ['PATH']}")
    assert ollama.PROGRAM.path() == str(own)


@pytest.mark.parametrize("mode", ["never-runs", None])
def test_one_that_does_not_run_is_refused_with_its_reason(own, ollama, monkeypatch, mode):
    if mode:
        monkeypatch.setenv("FAKE_OLLAMA", mode)
    else:
        monkeypatch.setenv("TUNE_OLLAMA", shutil.which("true"))
    reason = "could not create directory mkdir /models: permission denied" if mode else "it wrote nothing to its log"
    with pytest.raises(Refused, match=rf"Ollama does not run here \(ollama ended while loading \(.*\): {reason}"):
        ollama.space(LOAD)


def test_asking_leaves_no_process_and_writes_nothing_to_the_terminal(own, ollama, log):
    before, told = set(psutil.Process().children(recursive=True)), written()
    ollama.space(LOAD)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert written() == told


def test_a_model_is_known_with_and_without_its_tag(ollama):
    assert ollama.identity(LOAD) == ollama.identity(replace(LOAD, model="tiny:latest"))
    identity = ollama.identity(LOAD)
    assert (identity["model"], identity["engine_version"], identity["device"]) == ("tiny:latest", "0.40.16", "cpu")
    assert identity["model_sha256"].startswith("b0cddd6b")
    assert ollama.describe(LOAD) == "Ollama 0.40.16, model: tiny:latest (Q4_0, 2 layers, 2 MB)"


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (
            {"model": "tny"},
            "--model tny: Ollama has no such model (there is tiny:latest); get it with: ollama pull tny",
        ),
        ({"model": None}, "name it, --model NAME (there is tiny:latest)"),
        ({"model": "a b; rm"}, "get it with: ollama pull 'a b; rm'"),
        ({"size": "160m"}, "--size 160m: the ollama workload has no use for it"),
        ({"dummy_weights": True}, "--dummy-weights: the ollama workload has no use for it"),
        ({"engine_args": ("--x",)}, "variables such as OLLAMA_SCHED_SPREAD reach Ollama from the environment"),
        ({"prompts": 0}, "--prompts 0: expected at least 1"),
        ({"prompt_tokens": 5000}, "expected at most 4096 tokens together, the context of tiny:latest"),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_way_on(ollama, changes, refusal):
    with pytest.raises(Refused) as refused:
        ollama.space(replace(LOAD, **changes))
    assert refusal in str(refused.value)


def test_an_ollama_without_models_says_what_to_pull(own, ollama, monkeypatch):
    monkeypatch.setenv("FAKE_OLLAMA", "empty")
    with pytest.raises(Refused, match=r"Ollama has no such model \(there is none\); get it with: ollama pull tiny"):
        ollama.space(LOAD)


def test_models_of_the_systems_service_are_pointed_to(ollama, monkeypatch, tmp_path):
    monkeypatch.setattr(ollama, "SYSTEM_MODELS", tmp_path)
    with pytest.raises(Refused, match=rf"keeps its own in {tmp_path}: set OLLAMA_MODELS to that folder"):
        ollama.space(replace(LOAD, model="other"))


# --- the space


def test_a_cpu_gets_what_a_cpu_can(ollama):
    space = ollama.space(LOAD)
    assert space.names == ("concurrency", "num_parallel", "num_thread", "num_batch", "flash_attention")
    assert {n: v for n, v in space.default().items() if n != "concurrency"} == {
        name: value for name, value in ollama.USUAL.items() if name in space.names
    }
    assert "concurrency" not in ollama.space(replace(LOAD, request_rate=5.0)).names


def test_layers_go_to_a_gpu_only_where_one_is_shown(ollama, gpu):
    gpu(23034)
    space = ollama.space(LOAD)
    assert (space["num_gpu"].default, space["num_gpu"].high, space["num_gpu"].lever) == (3, 3, "offload")
    assert ollama.identity(LOAD)["device"] == "NVIDIA L4"
    assert ollama.service(space.default(), LOAD).gpus


def test_what_does_not_fit_is_answered_without_a_launch(ollama, gpu, monkeypatch):
    gpu(1)
    space = ollama.space(LOAD)
    assert not space.broken(space.default())
    assert "lower num_gpu or num_parallel" in space.broken({**space.default(), "num_gpu": 3})[0]
    monkeypatch.setattr(ollama, "memory_bytes", lambda: 10**6)
    assert "fit into the 0 GiB of main memory" in ollama.space(LOAD).broken({**space.default(), "num_gpu": 0})[0]


def test_each_slot_takes_a_context_of_its_own(ollama):
    model = ollama._model(LOAD)
    # 2 layers, 64 wide: keys and values of 16 bits, 256 tokens a slot.
    assert ollama._needed_bytes(model, {"num_parallel": 3}, LOAD) == 2_000_000 + 3 * 256 * 2 * 2 * 64 * 2
    assert gguf.cache_values_per_token({"block_count": 2, "attention.head_count_kv": [1, 2]}) == 0


@pytest.mark.parametrize("flash", ["auto", "off"])
def test_a_quantised_cache_needs_flash_attention(ollama, flash):
    space = ollama.space(LOSSY)
    with pytest.raises(Refused, match="a quantised kv_cache_type needs flash_attention on"):
        space.complete({"kv_cache_type": "q8_0", "flash_attention": flash})
    assert space.complete({"kv_cache_type": "q8_0", "flash_attention": "on"})


# --- running it


@pytest.mark.parametrize("era", ["new", "old"])
def test_settings_are_variables_and_options_and_are_read_back(ollama, gpu, monkeypatch, tmp_path, log, era):
    gpu(23034)
    monkeypatch.setenv("FAKE_OLLAMA_NOTE", str(tmp_path / "note"))
    monkeypatch.setenv("FAKE_OLLAMA_ERA", era)
    changes = {
        "concurrency": 2,
        "num_parallel": 2,
        "num_gpu": 1,
        "num_thread": 1,
        "num_batch": 64,
        "flash_attention": "on",
        "kv_cache_type": "q8_0",
    }
    space = ollama.space(LOSSY)
    assert set(changes) == set(space.names)
    with ollama.launch(space.complete(changes), LOSSY) as engine:
        effective = dict(engine.effective)
        engine.change({**changes, "concurrency": 3})
        assert engine.effective["concurrency"] == 3
        # Loaded once: each request carries the same options.
        started = written()
        assert started.count('msg="starting llama-server"') + started.count("msg=load request") == 1
    if era == "old":
        del changes["num_gpu"]
    assert effective == {**changes, "n_ctx": 512}
    _, scratch, words, *variables = (tmp_path / "note").read_text().splitlines()
    assert words.endswith("serve")
    assert not Path(scratch).exists()
    for variable in (
        "OLLAMA_NUM_PARALLEL=2",
        "OLLAMA_FLASH_ATTENTION=1",
        "OLLAMA_KV_CACHE_TYPE=q8_0",
        "OLLAMA_CONTEXT_LENGTH=256",
        "OLLAMA_KEEP_ALIVE=-1",
        "OLLAMA_NOPRUNE=1",
    ):
        assert variable in variables
    assert any(v.startswith("OLLAMA_HOST=127.0.0.1:") for v in variables)


def test_what_is_left_to_the_engine_has_neither_variable_nor_option(ollama, monkeypatch, tmp_path, log):
    monkeypatch.setenv("FAKE_OLLAMA_NOTE", str(tmp_path / "note"))
    # The person's own setting: `auto` would be another configuration than it says.
    monkeypatch.setenv("OLLAMA_FLASH_ATTENTION", "1")
    with ollama.launch(ollama.space(LOAD).default(), LOAD) as engine:
        assert (engine.effective["flash_attention"], engine.effective["num_thread"]) == ("auto", 2)
    assert "OLLAMA_FLASH_ATTENTION=" in (tmp_path / "note").read_text().splitlines()
    assert ollama._options({"num_thread": "auto", "num_batch": 512}) == {"num_batch": 512}


def test_prompts_are_words_new_in_every_pass_and_end_in_a_count(ollama):
    load = ollama._Load.of(LOAD, "tiny:latest", concurrency=1, token_ids=None, options={"num_batch": 64})
    one, two = load.body(0, 0).decode(), load.body(1, 0).decode()
    assert one != two == load.body(1, 0).decode()
    for part in ('"raw": true', '"num_predict": 4', '"num_batch": 64', '"keep_alive": -1', '1 2 3 4 5 6"'):
        assert part in one


FAILURES = {
    "port-in-use": r"^Ollama found its port taken, 3 times in a row .*ended while loading",
    "crash-loading": r"^Ollama was killed by SIGSEGV while loading; ",
    "no-memory": r"^out of memory: model requires more system memory \(2.7 GiB\) than is available \(2.3 GiB\)$",
    "gpu-memory": r"^out of memory: cudaMalloc failed: out of memory$",
    "bad-model": r"^Ollama cannot load tiny:latest: POST /api/generate brought HTTP 500: llama-server process has",
    "dies-loading": r"^Ollama ended while loading the model \(exit status 2\): out of memory: fatal error: runtime",
    "500": r"^Ollama answered HTTP 500: ",
    "out-of-memory:5": r"^Ollama ended in the middle of a pass \(exit status 1\): out of memory: cudaMalloc failed",
    "killed:1": r"^Ollama was killed by SIGKILL in the middle of a pass; ",
    "killed:5": r"^Ollama was killed by SIGKILL in the middle of a pass; ",
    "cut": r"^Ollama: the stream was cut off before its last line$",
    "error-line": r"^Ollama broke off with an error: an error was encountered while running the model: unexpected EOF$",
    "stops-early": r"^tiny:latest ended an answer after 1 of 4 tokens, and Ollama cannot ignore an end of sequence; ",
    "short": r"^Ollama generated 3 tokens for a request instead of 4; it does not heed num_predict; ",
    "garbage": r"^Ollama is not Ollama's native API: it streamed hello$",
}


@pytest.mark.parametrize(("mode", "sentence"), FAILURES.items(), ids=FAILURES)
def test_a_launch_that_fails_is_one_sentence_and_leaves_nothing(ollama, monkeypatch, tmp_path, log, mode, sentence):
    default = ollama.space(LOAD).default()
    monkeypatch.setattr("tuner.serving.LATE_SECONDS", 1.0)
    monkeypatch.setenv("FAKE_OLLAMA", mode)
    monkeypatch.setenv("FAKE_OLLAMA_NOTE", str(tmp_path / "note"))
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises((RuntimeError, Refused), match=sentence) as caught, ollama.launch(default, LOAD):
        pytest.fail("an engine was yielded")
    assert "\n" not in str(caught.value)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not Path((tmp_path / "note").read_text().splitlines()[1]).exists()


@pytest.mark.parametrize(("mode", "answer"), [("hang-loading", "nothing"), ("unhealthy", "HTTP 503")])
def test_an_engine_that_never_serves_is_given_up(ollama, monkeypatch, log, mode, answer):
    default = ollama.space(LOAD).default()
    monkeypatch.setenv("FAKE_OLLAMA", mode)
    monkeypatch.setattr(ollama, "START_SECONDS", 1.0)
    with (
        pytest.raises(RuntimeError, match=rf"^Ollama was not ready after 1 s: GET /api/version brought {answer}"),
        ollama.launch(default, LOAD),
    ):
        pytest.fail("an engine was yielded")


def test_one_that_ignores_sigterm_and_its_children_are_killed(ollama, monkeypatch, tmp_path, log):
    default = ollama.space(LOAD).default()
    monkeypatch.setattr("tuner.serving.Server.stop.__defaults__", (0.3,))
    monkeypatch.setenv("FAKE_OLLAMA", "stubborn")
    monkeypatch.setenv("FAKE_OLLAMA_NOTE", str(tmp_path / "note"))
    with ollama.launch(default, LOAD):
        pids = [int(pid) for pid in (tmp_path / "note").read_text().split()]
    for pid in pids:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- for good


def test_the_command_names_the_servers_variables(ollama, executable, monkeypatch):
    default = ollama.space(LOAD).default()
    start = "env OLLAMA_HOST=127.0.0.1:11434 OLLAMA_NUM_PARALLEL"
    assert ollama.command(default, LOAD) == f"{start}=1 {executable} serve"
    assert ollama.command({**default, "num_parallel": 4}, LOAD) == f"{start}=4 {executable} serve"
    # A setting of the shell's own would be another one than was measured.
    monkeypatch.setenv("OLLAMA_FLASH_ATTENTION", "1")
    monkeypatch.setenv("OLLAMA_MODELS", "/models")
    start = "env OLLAMA_HOST=127.0.0.1:11434 OLLAMA_MODELS=/models OLLAMA_NUM_PARALLEL=1 OLLAMA_FLASH_ATTENTION="
    assert ollama.command(default, LOAD) == f"{start} {executable} serve"


@pytest.mark.parametrize(("mib", "named"), [(1, True), (80000, False)])
def test_layers_on_a_gpu_are_named_unless_they_are_all(ollama, gpu, mib, named):
    gpu(mib)
    default = ollama.space(LOAD).default()
    assert (f"PARAMETER num_gpu {default['num_gpu']}" in ollama.command(default, LOAD)) is named


def test_the_printed_command_serves_what_was_measured_and_makes_the_model(ollama, log, tmp_path, monkeypatch):
    """Started by a shell, the server has the launch's variables, and the model beside the old one its options."""
    tuned = {"num_parallel": 2, "flash_attention": "on", "kv_cache_type": "q8_0", "num_batch": 64, "num_thread": 1}
    config = ollama.space(LOSSY).complete(tuned)
    monkeypatch.setenv("FAKE_OLLAMA_NOTE", str(tmp_path / "measured"))
    with ollama.launch(config, LOSSY) as engine:
        assert {name: engine.effective[name] for name in tuned} == tuned
    monkeypatch.setenv("FAKE_OLLAMA_NOTE", str(tmp_path / "printed"))
    port, folder = free_port(), tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    command = ollama.command(config, LOSSY).replace(":11434", f":{port}")
    with typed_at_a_shell(command, port, tmp_path / "printed-log", ready="/api/version") as endpoint:
        deadline = time.monotonic() + 20
        while "tiny-tuned:latest" not in (names := [m["name"] for m in endpoint.ask("/api/tags")["models"]]):
            assert time.monotonic() < deadline, names
            time.sleep(0.05)
        shown = endpoint.ask("/api/show", {"model": "tiny-tuned:latest"})
    assert sorted(shown["parameters"].splitlines()) == ["num_batch 64", "num_thread 1"]
    measured, printed = noted(tmp_path / "measured"), noted(tmp_path / "printed")
    for name in ollama.VARIABLES.values():
        assert printed.env[name] == measured.env[name]
    assert list(folder.iterdir()) == []


def test_where_the_port_is_taken_the_other_server_is_given_no_model(ollama, tmp_path, monkeypatch):
    config = ollama.space(LOAD).complete({"num_batch": 64})
    port = free_port()
    monkeypatch.setenv("OLLAMA_CONTEXT_LENGTH", "256")
    command = ollama.command(config, LOAD).replace(":11434", f":{port}")
    plain = ollama.command(ollama.space(LOAD).default(), LOAD).replace(":11434", f":{port}")
    with typed_at_a_shell(plain, port, tmp_path / "log", ready="/api/version") as endpoint:
        monkeypatch.setenv("FAKE_OLLAMA", "port-in-use")
        assert subprocess.run(["/bin/sh", "-c", command], capture_output=True, timeout=20).returncode == 1
        assert [m["name"] for m in endpoint.ask("/api/tags")["models"]] == ["tiny:latest"]


def test_the_modelfile_has_the_options_and_names_the_servers_variables(ollama, executable):
    config = {**ollama.space(LOAD).default(), "num_batch": 64, "num_thread": 1, "num_parallel": 4}
    service = ollama.service(config, LOAD)
    assert service.env == {"OLLAMA_HOST": "127.0.0.1:11434", "OLLAMA_NUM_PARALLEL": "4"}
    launch = Launch(name="x", about=("tuned",), command="", settings=(), gpus=0, service=service)
    assert render("modelfile", launch) == (
        "# tuned\n\n"
        "# ollama create tiny-tuned -f Modelfile\n"
        "# the server needs OLLAMA_NUM_PARALLEL=4 in its environment\n"
        "FROM tiny:latest\n"
        "PARAMETER num_batch 64\n"
        "PARAMETER num_thread 1\n"
    )
    unit = render("systemd", launch)
    assert "Environment=OLLAMA_NUM_PARALLEL=4" in unit
    assert f"{executable} create tiny-tuned" in unit
    with pytest.raises(Refused, match="this engine offers command, systemd, modelfile"):
        render("compose", launch)


# --- what the engine says


def test_what_is_not_said_is_absent(ollama):
    assert ollama.read_back("", ollama.space(LOSSY).default()) == {}


def test_the_newest_start_of_the_inference_process_counts(ollama):
    start = 'msg="starting llama-server" cmd="x"\nsrv load_model: initializing, n_slots = {}\n'
    assert ollama.read_back(start.format(1) + start.format(4), {"num_parallel": 1}) == {"num_parallel": 4}


REAL_LOG = """\
time=2026-11-25T11:00:19.001Z level=INFO source=llama_server.go:433 msg="starting llama-server" cmd="/usr/lib/..."
cmn  common_param: system_info: n_threads = 1 (n_threads_batch = 1) / 2 | CPU : SSE3 = 1 | OPENMP = 1 | REPACK = 1
load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
llama_context: n_ctx                 = 512
llama_context: n_batch               = 64
llama_context: n_ubatch              = 64
llama_context: flash_attn            = enabled
llama_context: kv_unified            = false
llama_kv_cache:        CPU KV buffer size =     0.13 MiB
llama_kv_cache: size =    0.13 MiB (   256 cells,   2 layers,  2/2 seqs), K (q8_0):    0.07 MiB, V (q8_0):    0.07 MiB
srv    load_model: initializing, n_slots = 2, n_ctx_slot = 256, kv_unified = 'false'
"""


def test_the_log_of_a_real_llama_server_with_ollamas_words_is_read(ollama):
    asked = dict.fromkeys(ollama.space(LOSSY).names, 0)
    assert ollama.read_back(REAL_LOG, asked) == {
        "num_parallel": 2,
        "num_thread": 1,
        "num_batch": 64,
        "kv_cache_type": "q8_0",
        "flash_attention": "on",
        "n_ctx": 512,
    }
