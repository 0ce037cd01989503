"""`tune run`, `tune report` and `tune apply` on each engine: real ones, as small as they are made.

An engine is tuned once, and each test looks at one side of what came of it. `STAND_INS` are executables that speak an
engine's flags and API (tests/test_vllm_runner.py has vLLM itself, which takes a minute to start).
"""

import contextlib
import fcntl
import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from printed import noted

from tuner.journal import read
from tuner.serving import Endpoint, free_port

ROOT = Path(__file__).parents[1]
FAKES = Path(__file__).parent / "fakes"
TUNE = [sys.executable, "-m", "tuner.cli"]
LOAD = ["--prompts", "2", "--prompt-tokens", "8", "--output-tokens", "4"]
MARK = "TUNE_END_TO_END"
"""A variable that everything below a run inherits, by which what it left behind is found."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux has it

BENCH = """
import hashlib, json, sys, tempfile
tempfile.mkstemp()
for _ in range(int(sys.argv[1])):
    hashlib.sha256(bytes(1_000_000))
print(json.dumps({"tokens": 64}))
"""
SPEC = """
[command]
argv = [PYTHON, "-S", "bench.py", "{work}"]
[parameters.work]
type = "int"
low = 1
high = 40
default = 20
meaning = "hashes computed for the same tokens"
[units]
json = "tokens"
"""


def needs(*packages):
    """Why this engine cannot be run here; None where it can."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def transformers(folder, environment):
    yield ["--workload", "transformers", "--size", "tiny", *LOAD]


def diffusion(folder, environment):
    yield ["--workload", "diffusion", "--size", "tiny", "--prompts", "1", "--pixels", "64"]


def llama(folder, environment):
    yield ["--workload", "llama", "--size", "tiny", *LOAD]


def command(folder, environment):
    (folder / "bench.py").write_text(BENCH)
    (folder / "bench.toml").write_text(SPEC.replace("PYTHON", json.dumps(sys.executable)))
    yield ["--workload", "bench.toml"]


def stand_in(name, *words):
    """An engine's executable that is a file of `tests/fakes`: it leaves a note and has a segment of shared memory."""

    def engine(folder, environment):
        short = name.removesuffix("-server")
        fake = str(FAKES / f"{short}_server.py")
        code = f"import runpy, sys\nsys.argv[0] = {name!r}\nrunpy.run_path({fake!r}, run_name='__main__')"
        (folder / name).write_text(f"#!{sys.executable}\n{code}\n")
        (folder / name).chmod(0o755)
        environment[f"TUNE_{name.replace('-', '_').upper()}"] = str(folder / name)
        environment[f"FAKE_{short.upper()}_NOTE"] = str(folder / "note")
        environment["FAKE_SHARED_MEMORY"] = f"psm_{environment[MARK]}"
        yield ["--workload", name, *words, *LOAD]

    return engine


def server(folder, environment):
    """llama.cpp's own server, which is there before the run and after it."""
    port, log = free_port(), folder / "log"
    plain = {name: value for name, value in environment.items() if name != MARK}
    with log.open("wb") as file:
        running = subprocess.Popen(
            [sys.executable, str(FAKES / "llama_http.py"), str(port)], env=plain, stdout=file, stderr=file
        )
    try:
        until(lambda: answers(port) or running.poll() is not None, 60)
        assert running.poll() is None, log.read_text()[-2000:]
        yield ["--workload", "server", "--url", f"http://127.0.0.1:{port}/v1", *LOAD]
        assert running.poll() is None, "the server did not outlive the run"
    finally:
        running.kill()
        running.wait()


SLOW = {"transformers", "diffusion"}

ENGINES = {
    "transformers": (transformers, "token", needs("torch", "transformers")),
    "diffusion": (diffusion, "image", needs("torch", "diffusers", "skimage")),
    "llama": (llama, "token", needs("xllamacpp")),
    "server": (server, "token", needs("xllamacpp")),
    "command": (command, "token", None),
    "vllm": (stand_in("vllm"), "token", None),
    "llama-server": (stand_in("llama-server", "--size", "tiny"), "token", None),
    "sglang": (stand_in("sglang", "--engine-arg=--device=cpu"), "token", None),
    "ollama": (stand_in("ollama", "--model", "tiny"), "token", None),
}

STAND_INS = ("vllm", "llama-server", "sglang", "ollama")


def answers(port):
    try:
        return Endpoint.parse(f"http://127.0.0.1:{port}").get("/health")[0] == 200
    except OSError:
        return False


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


def until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def port_of(note):
    """Where the stand-in that left this note listened."""
    last = noted(note)
    given = dict(itertools.pairwise(last.words)) | {"--host": last.env.get("OLLAMA_HOST", "")}
    return int(given.get("--port") or given["--host"].rpartition(":")[2])


def marked(mark):
    """Processes that carry the mark of a run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.info["cmdline"])
        except psutil.Error:
            continue
    return found


def tune(folder, environment, *arguments):
    return subprocess.run(
        [*TUNE, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )


def tuned(name, folder):
    """Tune, report and apply once, and write down what came of it."""
    mark = uuid.uuid4().hex
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TUNE_STATE": str(folder / "state"),
        "TMPDIR": str(folder / "tmp"),
    }
    (folder / "tmp").mkdir()
    environment[MARK] = mark
    options = ["--batch", "--proposer", "rules", "--trials", "2", "--fast", "--windows", "2", "--window", "0.2s"]
    options += ["--warm-up", "0.1s..0.5s", "--most-others", "1", "--meter", "estimate", "--name", "s"]
    for words in ENGINES[name][0](folder, environment):
        started = time.monotonic()
        done = tune(folder, environment, "run", *options, *words)
        seconds = time.monotonic() - started
        until(lambda: not marked(mark), 5)
        left = marked(mark)
        said = {"code": done.returncode, "out": done.stdout, "err": done.stderr, "left": left, "seconds": seconds}
        said["shared_memory"] = [path.name for path in SHARED_MEMORY.iterdir() if mark in path.name]
        if name in STAND_INS:
            said["port"] = port_of(folder / "note")
            said["listens"] = listens(said["port"])
        for verb, more in (("report", []), ("apply", ["--unconfirmed"])):
            then = tune(folder, environment, verb, "results/s", *more)
            said[verb] = {"code": then.returncode, "out": then.stdout, "err": then.stderr}
    said["files"] = sorted(path.name for path in (folder / "tmp").iterdir())
    (folder / "said.json").write_text(json.dumps(said))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder for all workers of this run of the tests, so that an engine is tuned by one of them only."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "end-to-end"
    folder.mkdir(exist_ok=True)
    return folder


class Run:
    """What came of tuning one engine."""

    def __init__(self, name, folder):
        self.name, self.unit = name, ENGINES[name][1]
        self.said = json.loads((folder / "said.json").read_text())
        self.folder = folder / "results" / "s"

    @property
    def trials(self):
        return read(self.folder).history.trials


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ENGINES])
def run(request, shared):
    return run_of(request.param, shared)


@pytest.fixture(params=STAND_INS)
def of_stand_in(request, shared):
    return run_of(request.param, shared)


def run_of(name, shared):
    if why := ENGINES[name][2]:
        pytest.skip(why)
    folder = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            tuned(name, folder)
    assert (folder / "said.json").exists(), "tuning it broke off; the first test that failed says how"
    return Run(name, folder)


def test_a_run_ends_well(run):
    assert run.said["code"] == 0, run.said["err"]
    assert "Traceback" not in run.said["err"]


def test_every_trial_has_energy_and_the_engine_counted_its_work(run):
    assert [t.error for t in run.trials] == [None, None]
    for trial in run.trials:
        assert trial.joules_per_unit > 0
        assert {w.work.unit for w in trial.measurements} == {run.unit}
        assert all(w.joules > 0 and w.work.units > 0 for w in trial.measurements if w.valid)


def test_the_second_trial_tries_something_else(run):
    first, second = run.trials
    assert first.proposal.source == "default"
    assert second.config != first.config


def test_loading_is_told_apart_unless_each_pass_starts_the_engine(run):
    assert (run.trials[0].load_seconds is None) == (run.name == "command")
    assert ("each to load" in run.said["out"]) == (run.name != "command")


def test_nothing_is_left_running(run):
    assert run.said["left"] == []


def test_no_temporary_file_is_left(run):
    assert run.said["files"] == []


def test_the_port_is_free_again(of_stand_in):
    assert of_stand_in.said["port"] > 1023
    assert not of_stand_in.said["listens"]


def test_the_engines_shared_memory_is_gone(of_stand_in):
    assert of_stand_in.said["shared_memory"] == []


def test_the_journal_and_everything_that_is_said_use_the_engines_unit(run):
    assert read(run.folder).header.unit == run.unit
    other = {"token": "J/image", "image": "J/token"}[run.unit]
    for text in (run.said["out"] + run.said["err"], run.said["report"]["out"]):
        assert f"J/{run.unit}" in text
        assert other not in text


def test_the_report_shows_both_trials(run):
    assert run.said["report"]["code"] == 0, run.said["report"]["err"]
    assert "default" in run.said["report"]["out"]
    assert "rules" in run.said["report"]["out"]


def test_apply_writes_down_how_the_best_one_is_started(run):
    applied = run.said["apply"]
    assert applied["code"] == 0, applied["err"]
    assert applied["out"].strip()
    assert "no saving is confirmed" in applied["err"]
