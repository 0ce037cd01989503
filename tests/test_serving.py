"""What engines behind HTTP share: real processes that die, and a real server that misbehaves."""

import contextlib
import itertools
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from fakes.openai_server import CUDA_OUT_OF_MEMORY, Engine

from tuner import supervise
from tuner.serving import (
    Client,
    Endpoint,
    Load,
    Server,
    Symptoms,
    beside,
    cut,
    first_line,
    free_port,
    models,
    start_server,
    wait_ready,
)
from tuner.space import Refused
from tuner.trial import TRIAL_SECONDS, Target

ROOT = Path(__file__).parents[1]
LOAD = Load(model="m", prompts=4, prompt_tokens=8, output_tokens=6, concurrency=2, timeout_seconds=30)
MEMORY = Symptoms(out_of_memory=("CUDA out of memory.*",))


def python(code, **more):
    return start_server([sys.executable, "-c", code], name="engine", **more)


def until(holds):
    """Whether it comes to hold; the time is what a loaded machine may take, and no claim."""
    deadline = time.monotonic() + 30
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid):
    """A zombie is dead; who reaps it is not this project's business."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def raised(mode, load=LOAD, **engine):
    """The sentence that a pass ends with."""
    with Engine(mode, **engine) as served, pytest.raises((RuntimeError, Refused)) as caught:
        Client(Endpoint.parse(served.url), load).run_pass()
    return str(caught.value)


# --- the process


def test_a_module_beside_another_is_loaded_once_and_a_broken_one_not_kept(tmp_path):
    (tmp_path / "good_neighbour.py").write_text("VALUE = object()")
    (tmp_path / "bad_neighbour.py").write_text("raise ValueError('no')")
    own = str(tmp_path / "own.py")
    assert beside(own, "good_neighbour") is beside(own, "good_neighbour")
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            beside(own, "bad_neighbour")


def test_a_log_may_go_to_another_file_than_standard_error(tmp_path):
    with (tmp_path / "log").open("w+b") as log:
        server = python("print('hello', flush=True)", output=log.fileno())
        try:
            assert until(lambda: server.log() == "hello\n")
        finally:
            server.stop()


def test_an_engine_leads_no_group_of_the_worker_and_its_supervisor_leads_its_own(log):
    server = python("import time; time.sleep(60)")
    try:
        assert os.getpgid(server.pid) == server.pid != os.getpgrp()
        assert until(lambda: psutil.Process(server.pid).children())
        assert os.getpgid(psutil.Process(server.pid).children()[0].pid) == server.pid
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("import sys; sys.exit(3)", "exit status 3"),
        ("pass", "exit status 0"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
        ("import signal; signal.raise_signal(signal.SIGSEGV)", "SIGSEGV"),
        ("import os; os.kill(os.getpid(), 40)", "signal 40"),
    ],
)
def test_how_an_engine_ended_is_passed_on(log, code, end):
    server = python(code)
    assert server.end(10) == end
    assert server.end() == end
    server.stop()


def test_a_running_engine_has_no_end(log):
    server = python("import time; print('here', flush=True); time.sleep(60)")
    assert until(lambda: server.log() == "here\n")
    assert server.end(0.1) is None
    server.stop()
    assert server.end() == "SIGTERM"


@pytest.mark.parametrize(
    ("word", "reason"), [("/nonexistent/engine", "No such file or directory"), ("/etc", "Permission denied")]
)
def test_a_program_that_cannot_be_started_is_said_so(log, word, reason):
    server = start_server([word], name="engine")
    with pytest.raises(RuntimeError, match=f"^engine cannot be started: {reason}$"):
        wait_ready("http://127.0.0.1:1", server)
    server.stop()


def test_stopping_kills_what_ignores_sigterm_and_frees_the_port(log, tmp_path):
    port, note = free_port(), tmp_path / "pids"
    code = (
        "import os, signal, socket, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"s = socket.create_server(('127.0.0.1', {port}))\n"
        "c = subprocess.Popen([sys.executable, '-c', 'import signal; signal.signal(15, 1); signal.pause()'])\n"
        f"open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{c.pid}}')\n"
        "signal.pause()"
    )
    server = python(code)
    assert until(lambda: note.exists() and len(note.read_text().split()) == 2)
    server.stop(grace_seconds=0.2)
    server.stop()
    assert not any(alive(int(pid)) for pid in note.read_text().split())
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_an_engine_whose_stopping_is_interrupted_is_asked_once_and_ends_in_order(log):
    class Interrupted(BaseException):
        pass

    def interrupt(*_):
        raise Interrupted

    code = (
        "import os, signal, sys, time\n"
        "def leave(*_):\n"
        "    os.write(1, b'asked\\n'); time.sleep(1); os.write(1, b'gone\\n'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, leave)\nos.write(1, b'up\\n')\ntime.sleep(60)"
    )
    server = python(code)
    assert until(lambda: server.log() == "up\n")

    def watch():
        until(lambda: "asked" in server.log())
        os.kill(os.getpid(), signal.SIGUSR1)

    before, watching = signal.signal(signal.SIGUSR1, interrupt), threading.Thread(target=watch)
    try:
        watching.start()
        with pytest.raises(Interrupted):
            server.stop()
        assert server.log() == "up\nasked\ngone\n"
        assert server.end() == "exit status 0"
    finally:
        watching.join()
        signal.signal(signal.SIGUSR1, before)


def test_what_an_ended_engine_left_running_is_killed_with_its_group(log, tmp_path):
    note = tmp_path / "pid"
    code = f"import subprocess\np = subprocess.Popen(['sleep', '60'])\nopen({str(note)!r}, 'w').write(str(p.pid))"
    server = python(code)
    assert server.end(10) == "exit status 0"
    assert until(lambda: not alive(int(note.read_text())))
    server.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_engine_ends_in_order_with_its_worker_however_the_worker_dies(tmp_path, number):
    note, tidied = tmp_path / "pids", tmp_path / "tidied"
    engine = (
        "import os, subprocess, signal, sys, time\n"
        f"signal.signal(15, lambda *_: (open({str(tidied)!r}, 'w').close(), sys.exit()))\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}} ' + os.environ['TMPDIR'])\n"
        "time.sleep(60)"
    )
    code = (
        "import sys, time\n"
        "from tuner.serving import start_server\n"
        f"server = start_server([sys.executable, '-c', {engine!r}], name='engine')\n"
        "print(server.pid, flush=True)\ntime.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    supervisor = int(worker.stdout.readline())
    assert until(lambda: note.exists() and len(note.read_text().split()) == 3)
    worker.send_signal(number)
    worker.wait(10)
    worker.stdout.close()
    assert until(lambda: not any(alive(pid) for pid in [supervisor, *map(int, note.read_text().split()[:2])]))
    assert not Path(note.read_text().split()[2]).exists()
    assert tidied.exists()


@pytest.mark.parametrize("stubborn", [False, True])
def test_what_an_engine_leaves_has_a_moment_to_tidy_up(log, tmp_path, stubborn):
    note = tmp_path / "tidied"
    # As Python's resource tracker does: ignore SIGTERM, and take shared memory away when the parent is gone.
    tidier = (
        "import signal, sys, time\nsignal.signal(15, 1)\nprint(flush=True)\nsys.stdin.read()\n"
        f"time.sleep(0.2)\nopen({str(note)!r}, 'w').close()"
    )
    code = (
        "import signal, subprocess, sys, time\n"
        f"signal.signal(15, {int(stubborn)})\n"
        f"p = subprocess.Popen([sys.executable, '-c', {tidier!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "p.stdout.readline()\nprint('up', flush=True)\ntime.sleep(60)"
    )
    server = python(code)
    assert until(lambda: server.log() == "up\n")
    server.stop(grace_seconds=0.2)
    assert note.exists()


def test_a_pass_that_is_left_breaks_its_connections_off(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(
            Endpoint.parse(f"http://127.0.0.1:{silent.getsockname()[1]}"), replace(LOAD, timeout_seconds=60)
        )
        connections = []

        def interrupt():
            connections.extend(silent.accept()[0] for _ in range(LOAD.concurrency))
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            client.run_pass()
        for connection in connections:
            with connection:
                connection.settimeout(5)
                while connection.recv(1 << 16):
                    pass


def test_an_engine_whose_supervisor_is_killed_is_still_stopped(log, tmp_path):
    note = tmp_path / "pid"
    server = python(f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    assert until(lambda: note.exists() and note.read_text())
    os.kill(server.pid, signal.SIGKILL)
    assert server.end(5) == "its supervisor was killed"
    server.stop()
    assert not alive(int(note.read_text()))


def test_an_engine_inherits_neither_pipe_nor_ignored_signals(log):
    code = (
        "import os, signal\n"
        "print(sorted(os.listdir('/proc/self/fd')), signal.getsignal(15) == signal.SIG_DFL, os.read(0, 1))\n"
    )
    server = python(code, env={"PYTHONUNBUFFERED": "1"})
    assert server.end(10) == "exit status 0"
    # 3 is the folder that is being listed.
    assert server.log() == "['0', '1', '2', '3'] True b''\n"
    server.stop()


def test_an_error_that_a_warning_quotes_is_not_the_cause(log):
    warning = "failed to increase it. This can cause errors like `OSError: [Errno 24] Too many open files`."
    server = python(f"print({warning!r}, flush=True); raise ValueError('ipc path is too long')")
    server.end(10)
    assert server.cause() == "ValueError: ipc path is too long"
    server.stop()


def test_an_engine_runs_in_the_folder_and_with_the_variables_given(log, tmp_path):
    server = python("import os; print(os.getcwd(), os.environ['OWN'])", env={"OWN": "yes"}, cwd=tmp_path)
    server.end(10)
    assert server.log() == f"{tmp_path} yes\n"
    server.stop()


@pytest.fixture
def pipes():
    """A leash and a status pipe, in a process whose signals are put back afterwards."""
    handlers = {number: signal.getsignal(number) for number in (*supervise.PASSED_BY, signal.SIGCHLD)}
    leash_end, leash = os.pipe()
    status, status_end = os.pipe()
    yield leash_end, leash, status, status_end
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for descriptor in (leash_end, leash, status, status_end):
        with contextlib.suppress(OSError):
            os.close(descriptor)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([sys.executable, "-c", "raise SystemExit(3)"], b"exit 3"),
        ([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], b"signal 9"),
        (["/nonexistent/engine"], b"failed 2"),
    ],
)
def test_the_supervisor_tells_how_the_engine_ended(pipes, words, told):
    leash_end, _, status, status_end = pipes
    supervise.supervise(leash_end, status_end, words)
    assert os.read(status, 64) == told


def test_the_supervisor_asks_the_engine_to_end_when_its_leash_ends(pipes):
    leash_end, leash, status, status_end = pipes
    os.close(leash)
    supervise.supervise(leash_end, status_end, [sys.executable, "-c", "import time; time.sleep(60)"])
    assert os.read(status, 64) == b"signal 15"


def test_the_supervisor_kills_an_engine_that_does_not_end_when_asked(pipes, monkeypatch, tmp_path):
    monkeypatch.setattr(supervise, "STOP_SECONDS", 0.2)
    leash_end, leash, status, status_end = pipes
    deaf = tmp_path / "deaf"

    def close():
        until(deaf.exists)
        os.close(leash)

    threading.Thread(target=close).start()
    supervise.supervise(leash_end, status_end, ["sh", "-c", f"trap '' TERM; touch {deaf}; exec sleep 60"])
    assert os.read(status, 64) == b"signal 9"


def test_the_supervisor_kills_the_engine_at_once_when_told_to(pipes):
    leash_end, leash, status, status_end = pipes
    os.write(leash, b"k")
    supervise.supervise(leash_end, status_end, ["sleep", "60"])
    assert os.read(status, 64) == b"signal 9"


def test_the_supervisor_says_to_nobody_without_failing():
    reader, writer = os.pipe()
    os.close(reader)
    supervise.say(writer, "exit 0")
    os.close(writer)


# --- being ready


def test_an_engine_is_ready_once_its_health_is_200(log):
    port = free_port()
    server = start_server([sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"], name="engine")
    try:
        wait_ready(f"http://127.0.0.1:{port}", server, timeout_seconds=20, path="/")
        with pytest.raises(RuntimeError, match=r"^engine was not ready after 1 s: GET /health brought HTTP 404; "):
            wait_ready(f"http://127.0.0.1:{port}", server, timeout_seconds=1)
    finally:
        server.stop()


def test_a_strangers_answer_on_its_port_does_not_make_an_engine_ready(log):
    with Engine() as stranger:
        port = urlsplit(stranger.url).port
        # As engines do that bind their port last: it loads, and finds the port taken.
        server = python(f"import socket, time; time.sleep(0.6); socket.create_server(('127.0.0.1', {port}))")
        try:
            with pytest.raises(RuntimeError, match="Address already in use"):
                wait_ready(stranger.url, server, timeout_seconds=20)
            assert server.port_is_taken()
        finally:
            server.stop()


CAUSES = {
    "nothing written": ("pass", "exit status 0", "it wrote nothing to its log"),
    "only chatter": ("print('loading'); print('still loading')", "exit status 0", "still loading"),
    "a traceback": ("print('hello'); raise ValueError('no such head')", "exit status 1", "ValueError: no such head"),
    "argparse": (
        "import argparse; argparse.ArgumentParser('serve').parse_args(['--odd'])",
        "exit status 2",
        "error: unrecognized arguments: --odd",
    ),
    "memory before all else": (
        f"print('KeyError: 1'); print({CUDA_OUT_OF_MEMORY!r}); raise SystemExit(1)",
        "exit status 1",
        "out of memory: CUDA out of memory. Tried to allocate 50.00 MiB",
    ),
    "colours": (r"print('\x1b[31mOSError: red\x1b[0m'); raise SystemExit(4)", "exit status 4", "OSError: red"),
}


@pytest.mark.parametrize(("code", "end", "cause"), CAUSES.values(), ids=CAUSES)
def test_an_engine_that_ends_while_loading_is_named_with_its_cause(log, code, end, cause):
    server = python(code, symptoms=MEMORY)
    with pytest.raises(RuntimeError) as caught:
        wait_ready("http://127.0.0.1:1", server, timeout_seconds=20)
    server.stop()
    assert str(caught.value).startswith(f"engine ended while loading ({end}): {cause}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_signal_is_named_and_the_last_line_of_the_log_stands_beside_it(log, number):
    server = python(f"import os; print('loaded', flush=True); os.kill(os.getpid(), {number:d})")
    with pytest.raises(RuntimeError) as caught:
        wait_ready("http://127.0.0.1:1", server, timeout_seconds=20)
    server.stop()
    assert str(caught.value) == f"engine was killed by {number.name} while loading; the last line of its log: loaded"


def test_an_engine_that_the_kernel_killed_for_lack_of_memory_is_named_so(log, monkeypatch):
    # The kernel's count is the outermost edge: no test fills this machine's memory.
    kills = iter([7])
    monkeypatch.setattr("tuner.serving.out_of_memory_kills", lambda: next(kills, 8))
    server = python("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(RuntimeError, match=r"^out of memory: the kernel killed engine while loading \(SIGKILL\); its"):
        wait_ready("http://127.0.0.1:1", server, timeout_seconds=20)
    server.stop()


def test_an_argument_that_the_engine_rejects_is_refused_with_its_option(log):
    code = "import argparse; argparse.ArgumentParser('serve').parse_args(['--odd'])"
    server = python(code, given=("--even", "--odd"))
    with pytest.raises(Refused, match=r"^--engine-arg=--odd: engine does not take it \(error: unrecognized .*leave it"):
        wait_ready("http://127.0.0.1:1", server, timeout_seconds=20)
    server.stop()


REJECTIONS = {
    "a name that was cut short": (
        "serve: error: argument --tensor-parallel-size/-tp: invalid int value: 'x'",
        "--tensor-parallel=x",
    ),
    "llama.cpp's": ("error: invalid argument: --odd", "--odd"),
    "llama.cpp's, of a value": ('error while handling argument "-fa": error: unknown value', "-fa"),
}


@pytest.mark.parametrize(("said", "word"), REJECTIONS.values(), ids=REJECTIONS)
def test_an_argument_is_refused_in_whatever_words_the_engine_does_not_take_it(log, said, word):
    server = python(f"import sys; sys.exit({said!r})", given=("--even", word))
    with pytest.raises(Refused, match=rf"^--engine-arg={re.escape(word)}: engine does not take it"):
        wait_ready("http://127.0.0.1:1", server, timeout_seconds=20)
    server.stop()


MEMORY_ADVICE = "Not enough memory. Please try to increase --mem-fraction-static."

NO_REJECTIONS = {
    "advice on memory": (MEMORY_ADVICE, "out of memory: Not enough memory."),
    "advice on memory beside a rejection": (
        f"{MEMORY_ADVICE}\nerror: argument --mem-fraction-static: x",
        "out of memory",
    ),
    "another cause that names it": ("ValueError: --mem-fraction-static is odd here", "ValueError: --mem"),
    "another flag's": ("error: argument --page-size: odd", "error: argument --page-size"),
}


@pytest.mark.parametrize(("said", "cause"), NO_REJECTIONS.values(), ids=NO_REJECTIONS)
def test_what_names_an_argument_and_rejects_none_is_a_failure_of_this_configuration(log, said, cause):
    symptoms = Symptoms(out_of_memory=("Not enough memory.*",))
    server = python(f"import sys; sys.exit({said!r})", given=("--mem-fraction-static=0.9",), symptoms=symptoms)
    with pytest.raises(RuntimeError, match=re.escape(f"engine ended while loading (exit status 1): {cause}")):
        wait_ready("http://127.0.0.1:1", server, timeout_seconds=20)
    server.stop()


def test_no_argument_is_to_blame_once_the_engine_has_served(log):
    server = python("import sys; sys.exit('error: argument --odd: odd')", given=("--odd",))
    assert until(lambda: server.end() is not None)
    assert type(server.ended("in the middle of a pass")) is RuntimeError
    assert type(server.ended("while loading", loading=True)) is Refused
    server.stop()


def test_only_this_engines_part_of_the_log_is_read(log):
    sys.stderr.flush()
    os.write(2, b"ValueError: of an earlier engine\n")
    server = python("raise OSError('mine')")
    server.end(10)
    assert server.cause() == "OSError: mine"
    server.stop()


def test_without_a_log_file_the_end_alone_is_told():
    code = (
        "from tuner.serving import start_server, wait_ready\n"
        "s = start_server(['false'], name='engine')\n"
        "try:\n    wait_ready('http://127.0.0.1:1', s)\n"
        "except RuntimeError as error:\n    print(error)\n"
        "s.stop()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "engine ended while loading (exit status 1): it wrote nothing to its log\n"


def test_nobody_on_the_port_is_nothing_and_a_stranger_is_no_http(log):
    server = python("import time; time.sleep(60)")
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with pytest.raises(RuntimeError, match="GET /health brought nothing; the last line of its log: none"):
            wait_ready(f"http://127.0.0.1:{port}", server, timeout_seconds=0.2)
        with Engine() as engine:
            assert Endpoint.parse(engine.url).get("/health")[0] == 200
    finally:
        server.stop()


# --- addresses


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("https://example.org", "https://example.org:443/v1"),
        ("http://[::1]:8080/api/v1", "http://[::1]:8080/api/v1"),
    ],
)
def test_an_address_may_be_given_with_or_without_v1(url, shown):
    assert str(Endpoint.parse(url)) == shown


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8000", "ftp://localhost", "http://", "http://h:port", "http://h/v1?x=1", "http://h:99999"),
        *("http://h:0", "http://a..b:80/", f"http://{'a' * 70}", "http://h/caf\u00e9", "http://h/a b"),
    ],
)
def test_what_is_no_address_is_refused_with_an_example(url):
    with pytest.raises(Refused, match=r"expected an address such as http://localhost:8000/v1"):
        Endpoint.parse(url)


def test_a_password_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(Refused) as refused:
        Endpoint.parse("http://me:hidden@localhost:8000")
    assert "hidden" not in str(refused.value)
    with pytest.raises(Refused) as refused:
        Endpoint.parse("ftp://me:hidden@localhost:8000")
    assert "hidden" not in str(refused.value)


def test_the_key_is_sent_and_shown_nowhere():
    with Engine("401") as engine:
        endpoint = Endpoint.parse(engine.url, key="sk-hidden")
        with pytest.raises(
            Refused, match="HTTP 401: Unauthorized; it does not take the key that was sent; put its"
        ) as caught:
            Client(endpoint, LOAD).run_pass()
    assert engine.headers[0]["Authorization"] == "Bearer sk-hidden"
    assert "hidden" not in f"{caught.value}{endpoint}{endpoint!r}"


def test_an_engine_of_our_own_that_wants_a_key_is_refused_with_another_way_on():
    with Engine("401") as engine:
        endpoint = replace(Endpoint.parse(engine.url), engine="vLLM")
        with pytest.raises(Refused, match="HTTP 401: Unauthorized; tune sends none to an engine that it starts: leave"):
            Client(endpoint, LOAD).run_pass()


def test_models_lists_what_is_offered_and_says_what_is_no_such_server():
    with Engine("two-models") as engine:
        assert models(Endpoint.parse(engine.url)) == ("m", "n")
    with Engine("no-api") as engine, pytest.raises(RuntimeError, match=r"is not an OpenAI-compatible server: .*<html>"):
        models(Endpoint.parse(engine.url))
    with pytest.raises(RuntimeError, match="cannot be reached: Connection refused"):
        models(Endpoint.parse(engine.url))
    with Engine() as engine, pytest.raises(RuntimeError, match="brought HTTP 404: Not Found"):
        models(Endpoint.parse(engine.url.replace("/v1", "/other")))


@contextlib.contextmanager
def answering(answer):
    """The port of a server that is none of HTTP: `answer` speaks with each connection."""

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with contextlib.suppress(OSError), connection:
                    connection.recv(65536)
                    answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_another_protocol_than_http_is_named():
    with (
        answering(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")) as port,
        pytest.raises(RuntimeError, match=r"cannot be used: it does not speak HTTP, it answered SSH-2.0-OpenSSH_9.6$"),
    ):
        models(Endpoint.parse(f"http://127.0.0.1:{port}"))


def test_tls_where_plain_http_was_asked_for_is_named():
    # A fatal alert, 40: handshake failure (RFC 8446, section 6).
    with (
        answering(lambda connection: connection.sendall(b"\x15\x03\x03\x00\x02\x02\x28")) as port,
        pytest.raises(RuntimeError, match="does not speak HTTP, it answered TLS; its address begins with https"),
    ):
        models(Endpoint.parse(f"http://127.0.0.1:{port}"))


def test_plain_http_where_tls_was_asked_for_is_named():
    with Engine() as engine, pytest.raises(RuntimeError) as caught:
        models(Endpoint.parse(engine.url.replace("http:", "https:")))
    assert "cannot be used: it does not speak TLS as expected (" in str(caught.value)
    assert str(caught.value).endswith("if it has none, its address begins with http")


# --- the load


def test_a_pass_counts_what_the_server_counted_and_times_every_token():
    with Engine() as engine:
        work = Client(Endpoint.parse(engine.url), LOAD).run_pass()
    assert (work.units, work.prompt_tokens, work.failed_requests) == (24, 32, 0)
    assert len(work.request_seconds) == len(work.ttft_seconds) == 4
    assert len(work.itl_seconds) == 4 * 5
    assert all(0 < first <= whole for first, whole in zip(work.ttft_seconds, work.request_seconds, strict=True))
    assert (work.prefill_seconds, work.decode_seconds) == (None, None)


def test_the_request_asks_for_a_fixed_length_and_its_usage():
    with Engine() as engine:
        Client(Endpoint.parse(engine.url), replace(LOAD, prompts=1, fields={"cache_prompt": False})).run_pass()
    (asked,) = engine.requests
    assert len(asked.pop("prompt")) == 8
    asked.pop("at")
    assert asked == {
        "path": "/v1/completions",
        "model": "m",
        "max_tokens": 6,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "cache_prompt": False,
    }


def prompts_of(passes, load=LOAD):
    with Engine() as engine:
        client = Client(Endpoint.parse(engine.url), load)
        for _ in range(passes):
            client.run_pass()
    return {tuple(asked["prompt"]) for asked in engine.requests}


def test_no_prompt_is_ever_sent_twice_and_every_trial_sends_the_same_ones():
    first = prompts_of(3)
    assert len(first) == 12
    assert prompts_of(3) == first
    assert not prompts_of(3, replace(LOAD, seed=1)) & first
    assert not prompts_of(3, replace(LOAD, salt="launch")) & first


def test_a_failed_pass_is_not_sent_again():
    with Engine("500") as engine:
        client = Client(Endpoint.parse(engine.url), LOAD)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                client.run_pass()
    prompts = [tuple(asked["prompt"]) for asked in engine.requests]
    assert len(set(prompts)) == len(prompts)


def test_token_ids_come_from_the_range_given():
    assert {i for prompt in prompts_of(2, replace(LOAD, token_ids=range(7, 11))) for i in prompt} == {7, 8, 9, 10}


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_a_closed_loop_keeps_as_many_requests_in_flight_as_it_is_told(concurrency):
    # The more of them, the longer an answer takes: the last one leaves before the first is answered.
    with Engine(token_seconds=0.01 * concurrency) as engine:
        Client(Endpoint.parse(engine.url), replace(LOAD, prompts=8, concurrency=concurrency)).run_pass()
    assert engine.most_in_flight == concurrency
    assert len(engine.requests) == 8


def test_an_open_loop_sends_at_the_moments_drawn_whether_or_not_earlier_ones_are_answered():
    load = replace(LOAD, prompts=6, request_rate=10.0, concurrency=1)
    with Engine(token_seconds=0.2) as engine:
        Client(Endpoint.parse(engine.url), load).run_pass()
    assert engine.most_in_flight > 1
    arrived = [asked["at"] - engine.requests[0]["at"] for asked in engine.requests]
    assert arrived == pytest.approx(load.offsets(0), abs=0.25)


def test_gaps_between_requests_are_exponential_with_the_rate_asked_for():
    offsets = replace(LOAD, prompts=4001, request_rate=5.0).offsets(0)
    gaps = [b - a for a, b in itertools.pairwise(offsets)]
    # An exponential distribution's mean and standard deviation are both 1 / rate; 4000 draws are within 5 % of it.
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.1)
    assert offsets[0] == 0
    assert offsets == replace(LOAD, prompts=4001, request_rate=5.0).offsets(0)
    assert replace(LOAD, prompts=3).offsets(0) == [0, 0, 0]


def test_an_open_loops_waiting_counts_from_when_the_request_should_have_left():
    with Engine(token_seconds=0.02, seats=1) as engine:
        work = Client(Endpoint.parse(engine.url), replace(LOAD, request_rate=1000.0, timeout_seconds=5)).run_pass()
    # Four answers of 0.12 s, one after the other: the last one has waited for three.
    assert max(work.ttft_seconds) > 0.36


def test_tokens_that_come_in_one_piece_have_no_gap_between_them():
    with Engine("pairs", token_seconds=0.1) as engine:
        work = Client(Endpoint.parse(engine.url), replace(LOAD, prompts=1)).run_pass()
    assert len(work.itl_seconds) == 5
    assert sorted(work.itl_seconds)[:3] == [0, 0, 0]
    assert min(sorted(work.itl_seconds)[3:]) > 0.02


def test_prefill_and_decode_are_known_where_the_server_times_them():
    with Engine("timings") as engine:
        work = Client(Endpoint.parse(engine.url), LOAD).run_pass()
    assert work.prefill_seconds == pytest.approx(4 * 0.0125)
    assert work.decode_seconds == pytest.approx(4 * 0.03)


@pytest.mark.parametrize(
    "changes",
    [{"token_ids": None}, {"token_ids": None, "chat": True}, {"token_ids": None, "chat": True, "ignore_eos": False}],
)
def test_text_and_chats_are_asked_as_such_and_fitted_to_the_length_wanted(changes):
    with Engine() as engine:
        client = Client(Endpoint.parse(engine.url), replace(LOAD, prompt_tokens=27, **changes))
        client.fit_words()
        work = client.run_pass()
    # A word is two tokens here, and the chat's template adds seven.
    assert client.load.words == (10 if "chat" in changes else 14)
    assert work.prompt_tokens == 4 * (27 if "chat" in changes else 28)
    assert engine.requests[-1]["path"] == ("/v1/chat/completions" if "chat" in changes else "/v1/completions")
    assert ("ignore_eos" in engine.requests[-1]) == changes.get("ignore_eos", True)
    assert len(work.ttft_seconds) == 4


def test_trying_once_sends_one_request_that_no_pass_sends_again():
    with Engine() as engine:
        client = Client(Endpoint.parse(engine.url), LOAD)
        client.try_once()
        client.run_pass()
    prompts = [tuple(asked["prompt"]) for asked in engine.requests]
    assert len(prompts) == len(set(prompts)) == 5


def test_a_load_takes_its_size_from_the_target():
    target = Target(prompts=3, prompt_tokens=5, output_tokens=7, request_rate=2.0, seed=9)
    load = Load.of(target, "m", concurrency=2)
    sizes = (load.prompts, load.prompt_tokens, load.output_tokens, load.request_rate, load.seed)
    assert sizes == (3, 5, 7, 2.0, 9)


# --- what goes wrong

WRONG = {
    "500": "answered HTTP 500: EngineCore encountered an issue. See stack trace (above) for the root cause",
    "400": "HTTP 400: This model's maximum context length is 48 tokens; ask for less with --prompt-tokens (",
    "html": "is not an OpenAI-compatible server that streams: POST /v1/completions brought text/html: <html>It works!",
    "not-streaming": "is not an OpenAI-compatible server that streams: POST /v1/completions brought application/json",
    "garbage": "is not an OpenAI-compatible server: it streamed hello",
    "hang": "hangs: it accepted the request and sent nothing for 0.5 s",
    "reset": "broke off: Remote end closed connection without response",
    "cut": "the stream was cut off before [DONE]",
    "broken-chunk": "the stream was cut off before its end",
    "error-event": "broke off with an error: EngineCore died",
    "no-usage": 'streams no usage block, so its tokens cannot be counted; expected it to know "stream_options"',
    "dict-choices": 'is not an OpenAI-compatible server: it streamed {"choices": {"text": "x"}}',
    "text-choices": 'is not an OpenAI-compatible server: it streamed {"choices": "x"}',
    "number-choice": 'is not an OpenAI-compatible server: it streamed {"choices": [7]}',
    "nested": "is not an OpenAI-compatible server: it streamed [[[",
    "text-usage": 'streams counts that cannot be read: ["many", {}]',
    "list-details": 'streams counts that cannot be read: [{"completion_tokens": 6',
    "infinite": 'streams counts that cannot be read: [{"completion_tokens": Infinity',
    "no-time": "streams counts that cannot be read: [{",
    "endless": "does not end an answer: 269 pieces came for a request of 6 tokens, so it does not heed max_tokens",
    "stall": "hangs: it began an answer and sent no more of it for 0.5 s",
    "403": "answered HTTP 403: Forbidden; put its key into TUNE_SERVER_KEY",
    "odd-usage": "streams counts that cannot be read",
    "short": "generated 5 tokens for a request instead of 6; it does not heed max_tokens or ignore_eos",
    "miscounts": "counted 9 prompt tokens instead of 8",
    "cached": "took 7 of 8 prompt tokens from a cache, though no prompt is sent twice; start it without one",
}


@pytest.mark.parametrize(("mode", "told"), WRONG.items(), ids=WRONG)
def test_what_a_server_does_wrong_is_one_sentence(mode, told):
    sentence = raised(mode, replace(LOAD, timeout_seconds=0.5) if told.endswith("for 0.5 s") else LOAD)
    assert told in sentence
    assert sentence.startswith("http://127.0.0.1:")
    assert "\n" not in sentence
    assert len(sentence) < 400


@pytest.mark.parametrize("prompt_tokens", [96, 76])
def test_a_chats_template_in_a_cache_is_no_prompt_in_a_cache(prompt_tokens):
    """A system prompt of 70 tokens stays in the cache of every server that has one."""
    with Engine("template-cached", template_tokens=70) as engine:
        load = replace(LOAD, prompt_tokens=prompt_tokens, token_ids=None, chat=True)
        client = Client(Endpoint.parse(engine.url), load)
        client.fit_words()
        assert client.run_pass().prompt_tokens == 4 * prompt_tokens


def test_a_chats_prompt_in_a_cache_is_told():
    with Engine("chat-cached", template_tokens=70) as engine:
        client = Client(Endpoint.parse(engine.url), replace(LOAD, prompt_tokens=96, token_ids=None, chat=True))
        client.fit_words()
        with pytest.raises(Refused, match="took 95 of 96 prompt tokens from a cache"):
            client.run_pass()


def test_prompts_shorter_than_the_chats_template_are_refused():
    with Engine(template_tokens=70) as engine:
        client = Client(Endpoint.parse(engine.url), replace(LOAD, prompt_tokens=70, token_ids=None, chat=True))
        with pytest.raises(
            Refused, match=r"^--prompt-tokens 70: the chat template of http://.* takes 70 by itself; ask"
        ):
            client.fit_words()


def test_nobody_listening_is_said_so():
    with Engine() as engine:
        endpoint = Endpoint.parse(engine.url)
    with pytest.raises(Refused, match=r"connection refused; nothing listens at http://127.*start it again"):
        Client(endpoint, LOAD).run_pass()


def test_a_wrong_model_is_answered_with_those_that_are_offered():
    told = raised("ok", replace(LOAD, model="gpt"))
    assert told.endswith("HTTP 404: The model `gpt` does not exist; the models that it offers are m")


def test_a_failed_request_is_counted_where_others_are_answered(capsys):
    with Engine("every-other") as engine:
        work = Client(Endpoint.parse(engine.url), LOAD).run_pass()
    assert (work.failed_requests, work.units, len(work.request_seconds)) == (2, 12, 4)
    # Said once, where the engine's log is.
    assert capsys.readouterr().err.count("answered HTTP 500") == 1


def test_a_server_of_somebody_elses_that_ends_in_the_middle_is_said_to_have_ended():
    server, client = serving("killed:2")
    somebody_elses = Client(client.endpoint, LOAD)
    try:
        with pytest.raises(Refused, match=r"the server has ended in the middle of a pass, .*; start it again$"):
            somebody_elses.run_pass()
    finally:
        server.stop()


def test_the_cause_of_a_failed_request_goes_with_the_pass():
    with Engine("every-other") as engine:
        work = Client(Endpoint.parse(engine.url), LOAD).run_pass()
    assert "answered HTTP 500: EngineCore encountered an issue" in work.failure


def test_a_server_is_said_to_hang_before_its_trial_is_given_up(monkeypatch):
    monkeypatch.setenv(TRIAL_SECONDS, "60")
    assert Load.of(Target(), "m", concurrency=1).timeout_seconds == 30
    monkeypatch.delenv(TRIAL_SECONDS)
    assert Load.of(Target(), "m", concurrency=1).timeout_seconds == 300


def test_a_fault_that_every_request_would_meet_ends_the_pass_at_once():
    with Engine("short") as engine, pytest.raises(Refused):
        Client(Endpoint.parse(engine.url), replace(LOAD, prompts=64, concurrency=1)).run_pass()
    assert len(engine.requests) == 1


def serving(mode):
    """An engine in a process of its own."""
    port = free_port()
    code = f"from fakes.openai_server import Engine\nimport signal\nwith Engine({mode!r}, port={port}): signal.pause()"
    server = python(code, env={"PYTHONPATH": str(Path(__file__).parent)}, symptoms=MEMORY)
    endpoint = Endpoint.parse(f"http://127.0.0.1:{port}")
    wait_ready(str(endpoint), server, timeout_seconds=20)
    return server, Client(endpoint, LOAD, server)


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("killed:2", "engine was killed by SIGKILL in the middle of a pass; "),
        (
            "out-of-memory:2",
            "engine ended in the middle of a pass (exit status 1): out of memory: CUDA out of memory. Tried",
        ),
    ],
)
def test_an_engine_that_ends_in_the_middle_is_named_with_its_cause(log, mode, told):
    server, client = serving(mode)
    try:
        with pytest.raises(RuntimeError) as caught:
            client.run_pass()
    finally:
        server.stop()
    assert str(caught.value).startswith(told)


def test_too_little_memory_is_named_also_where_the_engine_runs_on(log, monkeypatch):
    monkeypatch.setattr("tuner.serving.LATE_SECONDS", 0.1)
    server, client = serving("500")
    try:
        os.write(2, f"{CUDA_OUT_OF_MEMORY}\n".encode())
        with pytest.raises(RuntimeError, match=r"^out of memory: CUDA out of memory"):
            client.run_pass()
    finally:
        server.stop()


def test_foreign_text_is_cut_to_one_line_without_control_characters():
    assert cut("a\x1b[31mb\n\n  c\x07") == "a b c"
    assert cut("x" * 400, 10) == "xxxxxxx..."


def test_the_first_pattern_that_occurs_decides_and_a_group_is_what_is_told():
    log = "one: 1\ntwo: 2 and more\nthree: 3"
    assert first_line(log, ("none", "three: .*", "one: .*")) == "three: 3"
    assert first_line(log, (r"two: (\d)",)) == "2"
    assert first_line(log, ("two",)) == "two: 2 and more"
    assert first_line(log, ("four",)) is None


def test_a_server_is_what_start_server_gives(log):
    server = python("pass")
    assert isinstance(server, Server)
    server.stop()
