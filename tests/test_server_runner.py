"""The runner for a server that runs already: llama.cpp's own HTTP server, and one that misbehaves."""

import importlib.util
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from contracts.runner_contract import RunnerContract
from fakes.openai_server import Engine

from tuner.meters.estimate import TreeCpu, count_also
from tuner.serving import Endpoint, free_port
from tuner.space import Refused
from tuner.trial import Changeable, MeterError, Target
from tuner.worker import count_engine

RUNNER = Path(__file__).parents[1] / "runners" / "server.py"
FAKES = Path(__file__).parent / "fakes"
LOAD = Target(prompts=4, prompt_tokens=16, output_tokens=4)
LOSSY = replace(LOAD, allow_lossy=True)


@pytest.fixture(scope="session")
def runner():
    spec = importlib.util.spec_from_file_location("server_runner_under_test", RUNNER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "TUNE_SERVER_KEY", "TUNE_REMOTE_SERVER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """The address of a real server, in a process of its own."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's server is in the package xllamacpp")
    port, log = free_port(), tmp_path_factory.mktemp("llama") / "log"
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "passive",
        "XDG_CACHE_HOME": str(log.parent),
        "PYTHONPATH": str(RUNNER.parents[1]),
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(FAKES / "llama_http.py"), str(port)], env=environment, stdout=file, stderr=file
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        try:
            if Endpoint.parse(url).get("/health")[0] == 200:
                break
        except OSError:
            pass
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.05)
    yield url, process.pid
    process.kill()
    process.wait()


class TestServer(RunnerContract):
    # More tokens than the context that the server was started with.
    unloadable: ClassVar = {"max_tokens": 100_000}
    starts_none: ClassVar = True

    @pytest.fixture
    def runner(self, runner):
        return runner

    @pytest.fixture
    def target(self, llama):
        return replace(LOAD, url=llama[0])


def target_of(engine, **changes):
    return replace(LOAD, url=engine.url, **changes)


# --- a real server


def test_a_real_server_is_known_by_engine_model_and_process(runner, llama):
    url, pid = llama
    target = replace(LOAD, url=url)
    identity = runner.identity(target)
    assert identity["engine"] == "server (llama.cpp)"
    assert identity["model"].endswith(".gguf")
    assert identity["url"] == f"{url}/v1"
    assert identity["device"].startswith("this machine, process python")
    # A restarted server is the same server: results of before and after may meet.
    assert str(pid) not in json.dumps(identity)
    assert f"in process {pid} (python" in runner.describe(target)
    with runner.launch(runner.space(target).default(), target) as engine:
        assert engine.pids == (pid,)
        assert engine.effective == {"concurrency": 4, "max_tokens": 4, "prompts_as": "token ids"}


def test_a_real_server_runs_on_after_the_launch(runner, llama):
    target = replace(LOAD, url=llama[0])
    for _ in range(2):
        with runner.launch(runner.space(target).default(), target) as engine:
            assert engine.run_pass().units == 16
    assert psutil.pid_exists(llama[1])


def test_what_changes_without_a_restart_is_changed(runner, llama):
    target = replace(LOSSY, url=llama[0])
    space = runner.space(target)
    assert {p.scope for p in space.parameters} == {"request"}
    assert space["max_tokens"].values == (1, 2, 4, 8)
    with runner.launch(space.default(), target) as engine:
        assert isinstance(engine, Changeable)
        assert (engine.expected_units, engine.run_pass().units) == (16, 16)
        engine.change({"concurrency": 1, "max_tokens": 8})
        assert (engine.expected_units, engine.run_pass().units) == (32, 32)
        assert (engine.effective["concurrency"], engine.effective["max_tokens"]) == (1, 8)


def test_the_estimate_counts_the_cpu_time_of_a_server_that_ran_before(runner, llama, monkeypatch):
    monkeypatch.setattr("tuner.meters.estimate._also", [])
    url, _ = llama
    # As a worker does: the server is no child of the process that counts.
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(RUNNER.parents[1])!r})\n"
        "from pathlib import Path\nfrom tuner.files import load_runner\nfrom tuner.trial import Target\n"
        "from tuner.meters.estimate import TreeCpu\nfrom tuner.worker import count_engine\n"
        f"runner = load_runner(Path({str(RUNNER)!r}))\n"
        f"target = Target(url={url!r}, prompts=8, prompt_tokens=200, output_tokens=60)\n"
        "alone, both = TreeCpu(), TreeCpu()\n"
        "with runner.launch(runner.space(target).default(), target) as engine:\n"
        "    import psutil\n"
        "    spent = lambda: sum(psutil.Process(engine.pids[0]).cpu_times()[:2])\n"
        "    first = alone.seconds()\n"
        "    count_engine(engine, ('estimate',))\n"
        "    start, server = both.seconds(), spent()\n"
        "    for _ in range(3): engine.run_pass()\n"
        "    print(both.seconds() - start, spent() - server)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    counted, used = map(float, done.stdout.split())
    assert used > 0.05
    assert counted > used - 0.02


# --- which server


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({}, "name it, --url http://localhost:8000/v1"),
        ({"url": "localhost"}, "expected an address such as http://localhost:8000/v1"),
        (
            {"url": "http://localhost:1/v1"},
            "cannot be reached: Connection refused; start the server, or check the address",
        ),
        ({"url": "http://no-such-host.invalid/v1"}, "the host no-such-host.invalid is unknown"),
        ({"url": "http://localhost:1", "prompts": 0}, "--prompts 0: expected at least 1"),
        (
            {"url": "http://192.0.2.1:8000"},
            "expected a server on this machine, because only this machine's energy can be",
        ),
    ],
)
def test_what_cannot_be_tuned_is_refused_with_a_way_on(runner, changes, refusal):
    with pytest.raises(Refused) as refused:
        runner.space(replace(LOAD, **changes))
    assert refusal in str(refused.value)


@pytest.mark.parametrize(
    ("mode", "model", "refusal"),
    [
        ("two-models", None, "expected one model, it offers m, n; choose one with --model"),
        ("no-model", None, "expected one model, it offers none"),
        ("ok", "mm", "the server has no such model; did you mean m? (it offers m)"),
        ("no-api", None, "is not an OpenAI-compatible server"),
    ],
)
def test_a_model_that_is_not_clear_is_refused(runner, mode, model, refusal):
    with Engine(mode) as engine, pytest.raises(Refused) as refused:
        runner.space(target_of(engine, model=model))
    assert refusal in str(refused.value)


def test_the_model_that_is_named_is_asked_for(runner):
    with Engine("two-models") as engine:
        assert runner.identity(target_of(engine, model="n"))["model"] == "n"


def test_this_machines_own_name_is_this_machine(runner):
    assert runner._is_here(socket.gethostname())
    assert runner._is_here("localhost")
    assert runner._is_here("::1")
    assert not runner._is_here("192.0.2.1")


def test_another_machine_is_allowed_where_a_wall_meter_stands(runner, monkeypatch):
    monkeypatch.setenv("TUNE_REMOTE_SERVER", "1")
    with Engine() as engine:
        monkeypatch.setattr(runner, "_is_here", lambda _: False)
        target = target_of(engine)
        assert runner.identity(target)["device"] == "another machine, by a wall meter"
        assert "its energy is only in a wall meter's reading" in runner.describe(target)
        with runner.launch(runner.space(target).default(), target) as served:
            assert served.pids == ()


def test_the_providers_key_stays_away_from_this_machine(runner, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-provider")
    with Engine() as engine:
        target = target_of(engine)
        with runner.launch(runner.space(target).default(), target):
            pass
        assert not any("Authorization" in headers for headers in engine.headers)
        monkeypatch.setenv("TUNE_SERVER_KEY", "sk-own")
        with runner.launch(runner.space(target).default(), target):
            pass
        assert engine.headers[-1]["Authorization"] == "Bearer sk-own"
        monkeypatch.setenv("TUNE_REMOTE_SERVER", "1")
        monkeypatch.delenv("TUNE_SERVER_KEY")
        monkeypatch.setattr(runner, "_is_here", lambda _: False)
        with runner.launch(runner.space(target).default(), target):
            pass
        assert engine.headers[-1]["Authorization"] == "Bearer sk-provider"
        assert "sk-" not in runner.describe(target)


@pytest.mark.parametrize(
    ("elsewhere", "keys", "sent"),
    [
        (False, {"OPENAI_API_KEY": "sk-provider"}, None),
        (False, {"OPENAI_API_KEY": "sk-provider", "TUNE_SERVER_KEY": "sk-own"}, "Bearer sk-own"),
        (True, {"OPENAI_API_KEY": "sk-provider"}, "Bearer sk-provider"),
        (True, {"OPENAI_API_KEY": "sk-provider", "TUNE_SERVER_KEY": "sk-own"}, "Bearer sk-own"),
        (True, {"OPENAI_API_KEY": ""}, None),
    ],
)
def test_the_printed_client_sends_the_key_that_the_study_sent(runner, monkeypatch, elsewhere, keys, sent):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name, key in keys.items():
        monkeypatch.setenv(name, key)
    if elsewhere:
        monkeypatch.setenv("TUNE_REMOTE_SERVER", "1")
        monkeypatch.setattr(runner, "_is_here", lambda _: False)
    with Engine() as engine:
        target = target_of(engine)
        with runner.launch(runner.space(target).default(), target):
            pass
        assert engine.headers[-1].get("Authorization") == sent
        command = runner.client({"concurrency": 1}, target, runner.identity(target)).command()
        assert "sk-" not in command
        sent_by(command, engine, "a\n")
        assert engine.headers[-1].get("Authorization") == sent


def test_the_printed_client_shows_no_key_that_no_header_can_hold(runner):
    with Engine() as engine:
        command = runner.client({"concurrency": 1}, target_of(engine), {"model": "m"}).command()
        done = piped(command, "a\n", env={**os.environ, "TUNE_SERVER_KEY": "sk-a\nb"})
        assert engine.requests == []
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "TUNE_SERVER_KEY: expected a key of printable ASCII characters on one line; set it anew\n"


@pytest.mark.parametrize(
    ("mode", "asked_as"), [("ok", "token ids"), ("text-only", "text"), ("chat-only", "chat"), ("strict", "chat")]
)
def test_how_the_server_takes_prompts_is_found_out(runner, mode, asked_as):
    with Engine(mode) as engine:
        target = target_of(engine, prompt_tokens=27)
        with runner.launch(runner.space(target).default(), target) as served:
            assert served.effective["prompts_as"] == asked_as
            work = served.run_pass()
    assert work.units == 16
    assert work.prompt_tokens / 4 == pytest.approx(27, abs=1)


def test_two_launches_share_no_prompt(runner):
    with Engine() as engine:
        target = target_of(engine)
        for _ in range(2):
            with runner.launch(runner.space(target).default(), target):
                pass
    prompts = [tuple(asked["prompt"]) for asked in engine.requests]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize(
    ("mode", "told"),
    [("500", "HTTP 500"), ("short", "it does not heed max_tokens"), ("html", "not an OpenAI-compatible")],
)
def test_a_server_that_does_not_do_the_work_is_named(runner, mode, told):
    with Engine(mode) as engine:
        target = target_of(engine)
        with pytest.raises(Refused, match=told), runner.launch(runner.space(target).default(), target):
            pytest.fail("an engine was yielded")


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("hang", "hangs: it accepted the request and sent nothing for 0.5 s; its own log may say why"),
        ("reset", "broke off: Remote end closed connection without response; its own log may say"),
        ("endless", "does not end an answer: 259 pieces"),
    ],
)
def test_a_server_that_does_not_answer_to_the_end_is_asked_in_no_other_way(runner, monkeypatch, mode, told):
    monkeypatch.setenv("TUNE_TRIAL_SECONDS", "1")
    with Engine(mode) as engine:
        target = target_of(engine)
        with pytest.raises(Refused, match=told), runner.launch(runner.space(target).default(), target):
            pytest.fail("an engine was yielded")
    assert len(engine.requests) == 1


def test_what_an_answer_lacks_is_told_before_that_another_form_is_unknown(runner):
    # Way after way is answered 400 here, but for the last one.
    with Engine("strict-no-usage") as engine:
        target = target_of(engine)
        with pytest.raises(Refused, match="no usage block"), runner.launch(runner.space(target).default(), target):
            pytest.fail("an engine was yielded")
    assert len(engine.requests) == 6


@pytest.mark.parametrize("key", ["sk-\u00e9", "sk-a\nb"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(runner, monkeypatch, key):
    monkeypatch.setenv("TUNE_SERVER_KEY", key)
    with Engine() as engine, pytest.raises(Refused, match="TUNE_SERVER_KEY: expected a key of printable") as refused:
        runner.space(target_of(engine))
    assert "sk-" not in str(refused.value)


def test_an_open_loop_leaves_only_the_length_to_tune(runner):
    with Engine() as engine:
        open_loop = target_of(engine, request_rate=100.0)
        assert runner.space(open_loop).names == ()
        lossy = replace(open_loop, allow_lossy=True)
        assert runner.space(lossy).names == ("max_tokens",)
        with runner.launch(runner.space(lossy).default(), lossy) as served:
            assert served.run_pass().units == 16
        config = runner.space(lossy).complete({"max_tokens": 2})
        command = runner.client(config, lossy, runner.identity(lossy)).command()
        assert [asked["max_tokens"] for asked in sent_by(command, engine, "one\ntwo\n")] == [2, 2]


def piped(command, lines, **more):
    return subprocess.run(["/bin/sh", "-c", command], input=lines, capture_output=True, text=True, timeout=60, **more)


def sent_by(command, engine, lines):
    """The requests that a printed command sends when a person types it and its prompts."""
    before = len(engine.requests)
    done = piped(command, lines)
    assert (done.returncode, done.stderr) == (0, "")
    sent = engine.requests[before:]
    # The stand-in answers with an x for each token.
    assert done.stdout.splitlines() == ["x" * asked["max_tokens"] for asked in sent]
    return sent


@pytest.mark.parametrize(
    ("mode", "path"),
    [("ok", "/v1/completions"), ("text-only", "/v1/completions"), ("chat-only", "/v1/chat/completions")],
)
def test_the_printed_client_asks_as_the_server_takes_it_and_as_many_at_a_time(runner, mode, path):
    with Engine(mode, token_seconds=0.02) as engine:
        target = target_of(engine)
        with runner.launch(runner.space(target).default(), target) as served:
            said = {"model": "m", **served.effective}
        service = runner.client({"concurrency": 3}, target, said)
        engine.most_in_flight = 0
        prompts = [f"prompt {n}: it's" for n in range(9)]
        sent = sent_by(service.command(), engine, "\n".join(prompts) + "\n\n")
        assert engine.most_in_flight == 3
    assert {(asked["path"], asked["model"], asked["max_tokens"]) for asked in sent} == {(path, "m", 4)}
    told = [asked["messages"][0]["content"] if "messages" in asked else asked["prompt"] for asked in sent]
    assert sorted(told) == prompts


def test_the_printed_client_as_a_file_does_the_same(runner, tmp_path):
    with Engine() as engine:
        target = target_of(engine, model="m")
        (tmp_path / "client.py").write_text(runner.client({"concurrency": 2}, target, {}).python)
        sent = sent_by(shlex.join([sys.executable, str(tmp_path / "client.py")]), engine, "a\nb\nc\n")
    assert len(sent) == 3


def test_the_printed_client_tells_a_failed_line_and_goes_on(runner):
    with Engine("every-other") as engine:
        command = runner.client({"concurrency": 1}, target_of(engine), {"model": "m"}).command()
        done = piped(command, "a\n\nb\nc\nd\n")
    assert done.stdout == "xxxx\n" * 2
    told = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in told] == ["line 3", "line 5"]
    assert all("HTTP Error 500: " in line and "EngineCore encountered an issue" in line for line in told)
    assert done.returncode == 1


def test_the_printed_client_answers_while_its_pipe_stays_open_and_in_order(runner):
    with Engine(token_seconds=0.05) as engine:
        command = runner.client({"concurrency": 2}, target_of(engine, output_tokens=1), {"model": "m"}).command()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(["/bin/sh", "-c", command], text=True, bufsize=1, **pipes) as shell:
            shell.stdin.write("one\n")
            assert shell.stdout.readline() == "x\n"
            shell.stdin.write("two\nthree\nfour\nfive\n")
            assert [shell.stdout.readline() for _ in range(4)] == ["x\n"] * 4
            assert shell.poll() is None
            shell.stdin.close()
            assert shell.wait(10) == 0
    assert engine.most_in_flight == 2


def test_the_printed_client_keeps_the_order_of_its_lines(runner):
    """The stand-in answers with as many letters as it was asked for tokens; here each line has an answer of its own."""
    echo = Engine("ok")
    served = echo.server.RequestHandlerClass
    served.at_once = lambda handler, asked, prompt, _: (
        time.sleep(0.3 / len(prompt)),
        handler.reply(200, {"choices": [{"text": f"to {prompt}"}]}),
    )
    with echo:
        command = runner.client({"concurrency": 4}, target_of(echo), {"model": "m"}).command()
        done = piped(command, "a\nbb\ncccc\ndddddddd\n")
    assert done.stdout.split("\n") == ["to a", "to bb", "to cccc", "to dddddddd", ""]


def test_the_printed_client_ends_quietly_where_nobody_reads_on(runner):
    with Engine() as engine:
        command = runner.client({"concurrency": 1}, target_of(engine), {"model": "m"}).command()
        done = piped(f"{command} | head -n 1", "a\nb\nc\n")
    assert (done.stdout, done.stderr) == ("xxxx\n", "")


def test_a_forwarder_is_not_the_server(runner, monkeypatch):
    with Engine() as engine:
        endpoint = Endpoint.parse(engine.url)
        assert runner._listener(endpoint).pid == os.getpid() or runner._listener(endpoint)
        monkeypatch.setattr(psutil.Process, "name", lambda _: "docker-proxy")
        assert runner._listener(endpoint) is None
        assert runner.identity(target_of(engine))["device"] == "this machine, process not visible"


# --- whose CPU time it is


class Served:
    def __init__(self, *pids):
        self.pids = pids


def test_an_estimate_of_a_server_that_cannot_be_seen_is_refused():
    with pytest.raises(RuntimeError, match=r"the server's process cannot be seen from here .*--meter rapl"):
        count_engine(Served(), ("estimate",))
    count_engine(Served(), ("rapl",))
    count_engine(object(), ("estimate",))


def test_only_what_is_used_from_then_on_is_counted(monkeypatch):
    monkeypatch.setattr("tuner.meters.estimate._also", [])
    burn = "import time\nt = time.process_time\nwhile t() < {}: pass\nprint('done', flush=True)\ninput()\n"
    code = burn.format(0.5) + "\nwhile t() < 0.8: pass\nprint('done', flush=True)\ninput()"
    # Its parent ends at once, so that it is no child of this process.
    shell = f"exec 3<&0; {shlex.join([sys.executable, '-c', code])} <&3 & echo $!"
    launched = subprocess.Popen(
        ["/bin/sh", "-c", shell], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    pid = int(launched.stdout.readline())
    assert launched.stdout.readline() == "done\n"
    launched.wait()
    tree = TreeCpu()
    before = tree.seconds()
    count_also([pid, pid])
    assert tree.seconds() - before < 0.2
    start = tree.seconds()
    launched.stdin.write("\n")
    launched.stdin.flush()
    assert launched.stdout.readline() == "done\n"
    assert 0.25 < tree.seconds() - start < 0.6
    launched.stdin.close()
    launched.stdout.close()


def test_a_server_that_has_ended_is_a_meter_error(monkeypatch):
    monkeypatch.setattr("tuner.meters.estimate._also", [])
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    tree = TreeCpu()
    count_also([child.pid])
    with pytest.raises(MeterError, match=f"process {child.pid}, whose CPU time was to be counted, has ended"):
        tree.seconds()
