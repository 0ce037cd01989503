"""The command runner: real commands and real processes that misbehave."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from commands import settle_in, typed
from contracts.runner_contract import RunnerContract
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.journal import read
from tuner.keeper import MOST_LOG_BYTES, TAIL_BYTES, Ended
from tuner.measure import metrics_of, together
from tuner.space import Refused
from tuner.trial import Changeable, Service, Target, Work

ROOT = Path(__file__).parents[1]
RUNNER = ROOT / "runners" / "command.py"


def load_runner():
    spec = importlib.util.spec_from_file_location("command_under_test", RUNNER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


command = load_runner()

BENCH = """
import json, sys
threads, prompts, prompt_tokens, output_tokens = map(int, sys.argv[1:5])
if threads > 3:
    sys.exit("no more than three threads here")
print("warming up")
print(json.dumps({
    "run": {"tokens": prompts * output_tokens, "prompt": prompts * prompt_tokens, "threads": threads,
            "repack": "--repack" in sys.argv, "mode": sys.argv[5].partition("=")[2]},
    "latencies_ms": [2.5] * prompts, "ttft": 0.25,
}))
"""

SPEC = """
constraints = ["threads * 2 <= 8", "repack -> threads >= 1"]
[command]
argv = [PYTHON, "-S", "bench.py", "{threads}", "{prompts}", "{prompt_tokens}", "{output_tokens}", "--mode={mode}",
        "{repack}"]
flags.repack = { true = ["--repack"], false = [] }
timeout = 30
[parameters.threads]
type = "int"
low = 1
high = 4
default = 2
meaning = "threads that do the work of a pass"
[parameters.mode]
type = "choice"
values = ["slow", "fast mode"]
default = "slow"
meaning = "how the work of a pass is done"
effect = "numerics"
[parameters.repack]
type = "bool"
default = false
meaning = "rearrange the weights before the work begins"
[units]
json = "run.tokens"
prompt_tokens = { json = "run.prompt" }
[timings]
request_seconds = { json = "latencies_ms", scale = 0.001 }
[metrics]
own_ttft_s = { json = "ttft" }
[effective]
threads = { json = "run.threads" }
repack = { json = "run.repack" }
mode = { json = "run.mode" }
[identity]
engine = "bench"
version = "2"
files = ["bench.py"]
"""


@pytest.fixture
def own_children():
    """The processes started since the test began: others may belong to fixtures that stay for the session."""
    before = set(psutil.Process().children(recursive=True))
    return lambda: set(psutil.Process().children(recursive=True)) - before


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, spec=SPEC, bench=BENCH, **load):
    (folder / "bench.py").write_text(textwrap.dedent(bench))
    (folder / "bench.toml").write_text(spec.replace("PYTHON", json.dumps(sys.executable)))
    return Target(spec=str(folder / "bench.toml"), **load)


class TestCommand(RunnerContract):
    unloadable: ClassVar = {"threads": 4}
    one_clock: ClassVar = "a command is timed from outside"

    @pytest.fixture
    def runner(self):
        return command

    @pytest.fixture
    def target(self, folder):
        return write(folder, prompts=3, prompt_tokens=7, output_tokens=5)


def minimal(bench, *, units='json = "tokens"', more="", argv='"{n}"', parameters="", options="timeout = 20"):
    """A file with one parameter, for a benchmark given as Python."""
    return (
        f'[command]\nargv = [PYTHON, "-S", "bench.py", {argv}]\n{options}\n'
        '[parameters.n]\ntype = "int"\nlow = 1\nhigh = 9\ndefault = 2\nmeaning = "a number that the benchmark gets"\n'
        f"{parameters}[units]\n{units}\n{more}"
    ), bench


def run_once(folder, bench, config=None, **more):
    target = write(folder, *minimal(bench, **more))
    with command.launch(config or command.space(target).default(), target) as engine:
        return engine.run_pass()


def cause(folder, bench, **more):
    with pytest.raises((RuntimeError, Refused)) as raised:
        run_once(folder, bench, **more)
    return str(raised.value)


def faults(folder, spec, **load):
    target = write(folder, spec, **load)
    with pytest.raises(Refused) as raised:
        command.space(target)
    return str(raised.value)


# --- what a pass did


def test_work_carries_units_metrics_and_times_that_the_command_reports(folder):
    target = write(folder, prompts=4)
    with command.launch(command.space(target).default(), target) as engine:
        work = engine.run_pass()
        assert engine.expected_units is None
        assert isinstance(engine, Changeable)
    assert (work.units, work.unit, work.prompt_tokens) == (128, "token", 384)
    assert work.request_seconds == (0.0025,) * 4
    assert work.metrics == {"own_ttft_s": 0.25}
    assert metrics_of(work, 2.0)["own_ttft_s"] == 0.25
    assert metrics_of(work, 2.0)["tokens_per_s"] == 64


def test_a_windows_metric_is_the_mean_over_its_passes():
    works = [Work(units=1, metrics={"a_s": 1.0}), Work(units=1, metrics={"a_s": 3.0, "b_s": 5.0})]
    assert together(works).metrics == {"a_s": 2.0, "b_s": 5.0}


def test_a_measured_figure_wins_over_a_reported_one_of_its_name():
    assert metrics_of(Work(units=4, metrics={"tokens_per_s": 9.0, "x": float("nan")}), 2.0) == {"tokens_per_s": 2.0}


def test_a_choice_or_bool_stands_for_the_words_listed_for_its_value(folder):
    target = write(folder)
    config = command.space(target).complete({"repack": True, "mode": "fast mode"})
    assert shlex.split(command.command(config, target))[-2:] == ["--mode=fast mode", "--repack"]
    with command.launch(config, target) as engine:
        assert engine.effective == {"threads": 2, "repack": True, "mode": "fast mode"}


def test_a_change_holds_from_the_next_pass_on(folder):
    target = write(folder)
    default = command.space(target).default()
    with command.launch(default, target) as engine:
        engine.change({**default, "threads": 3})
        engine.run_pass()
        assert engine.effective["threads"] == 3


@pytest.mark.parametrize(
    ("units", "line", "expected"),
    [
        ('regex = "generated ([\\\\d,]+) tokens"', "generated 3 tokens\\ngenerated 1,024 tokens", 1024),
        ("fixed = 4096", "nothing of interest", 4096),
        ('json = "a.1.n"', '{"a": [0, {"n": 7}]}', 7),
        ('json = "n"', '{"n": 7.0}', 7),
        ('json = "n"', '{\\n  "n": 7\\n}', 7),
        ('json = "n"', '{"other": 1}\\n{"n": 7}\\n{broken', 7),
        ('unit = "image"\njson = "n"\nexpected = 7', '{"n": 7}', 7),
    ],
)
def test_units_are_read_as_the_file_says(folder, units, line, expected):
    assert run_once(folder, f"print('{line}')", units=units).units == expected


def test_figures_may_stand_on_standard_error(folder):
    bench = "import sys; print('n=3'); print('n=4', file=sys.stderr)"
    assert run_once(folder, bench, units='regex = "n=(\\\\d+)"', options='output = "stderr"').units == 4
    assert run_once(folder, bench, units='regex = "n=(3)"', options='output = "both"').units == 3


def test_env_and_folder_are_those_of_the_file(folder):
    (folder / "sub").mkdir()
    bench = """
    import os, json
    print(json.dumps({"tokens": int(os.environ["N"]), "m": int(os.path.basename(os.getcwd()) == "sub")}))
    """
    more = '[metrics]\nsub = { json = "m" }\n'
    options = 'cwd = "sub"\nenv = { N = "{n}1", X = 3 }'
    target = write(folder, *minimal(bench, argv="", options=options, more=more))
    (folder / "bench.py").rename(folder / "sub" / "bench.py")
    default = command.space(target).default()
    with command.launch(default, target) as engine:
        work = engine.run_pass()
    assert (work.units, work.metrics) == (21, {"sub": 1.0})
    assert command.command(default, target).startswith(f"env -C {folder / 'sub'} N=21 X=3 ")


def test_the_example_of_the_documentation_runs(folder):
    page = (ROOT / "docs" / "engines" / "command.md").read_text()
    blocks = re.findall(r"```(?:python|toml)\n(# (bench\.\w+): .*?)```", page, re.DOTALL)
    assert [name for _, name in blocks] == ["bench.py", "bench.toml"]
    for text, name in blocks:
        (folder / name).write_text(text.replace('"python3"', json.dumps(sys.executable)))
    target = Target(spec="bench.toml")
    config = command.space(target).complete({"batch": 32, "threads": 1, "check": False})
    with command.launch(config, target) as engine:
        work = engine.run_pass()
        assert engine.effective == {"threads": 1}
    assert work.units == 512
    assert 0 < work.metrics["step_s"] < 5


def test_the_server_of_the_documentation_is_a_legal_file():
    page = (ROOT / "docs" / "engines" / "command.md").read_text()
    (text,) = re.findall(r"```toml\n(\[command\]\nmode = \"server\".*?)```", page, re.DOTALL)
    parameter = "type = 'int'\nlow = 1\nhigh = 9\ndefault = 2\nmeaning = 'slots of the server'\n"
    whole = f"{text}[parameters.slots]\n{parameter}[units]\njson = 'tokens'\n"
    whole = whole.replace('"my-server"', json.dumps(sys.executable)).replace('"my-client"', json.dumps(sys.executable))
    assert command._read(Path("any.toml").absolute(), whole.encode()).service["port"] == 8080


# --- commands that misbehave


@pytest.mark.parametrize(
    ("bench", "units", "sentence"),
    [
        ("raise SystemExit(3)", 'json = "tokens"', "ended with exit status 3, expected 0; it printed nothing"),
        (
            "raise SystemExit('no such model')",
            "fixed = 1",
            'exit status 1, expected 0; its last line is "no such model"',
        ),
        ("print('hello')", 'json = "tokens"', 'printed no JSON line with "tokens" (units); its last line is "hello"'),
        ("print('hello')", 'regex = "(\\\\d+) tokens"', 'printed no match of "(\\\\d+) tokens" (units)'),
        ("print('\\x00\\xff\\x1b[31m{' * 9)", 'json = "tokens"', 'printed no JSON line with "tokens"'),
        ("print('[' * 100000)", 'json = "tokens"', 'printed no JSON line with "tokens"'),
        ('print(\'{"tokens": "many"}\')', 'json = "tokens"', 'printed "many" as units, expected a number from 0'),
        ("print('{\"tokens\": true}')", 'json = "tokens"', "printed true as units"),
        ("print('{\"tokens\": NaN}')", 'json = "tokens"', "printed NaN as units"),
        ("print('{\"tokens\": -4}')", 'json = "tokens"', "printed -4 as units"),
        ("print('{\"tokens\": 0}')", 'json = "tokens"', "printed 0 tokens (units), expected a whole number above 0"),
        ("print('{\"tokens\": 2.5}')", 'json = "tokens"', "printed 2.5 tokens (units)"),
        ("print('{\"tokens\": ' + '9' * 5000 + '}')", 'json = "tokens"', 'printed "99999'),
        ("print('9' * 5000, 'tokens')", 'regex = "(\\\\d+) tokens"', 'printed "99999'),
        ("print('{\"tokens\": ' + '9' * 400 + '}')", 'json = "tokens"', "printed 99999"),
        ("print('{\"tokens\": 1e300}')", 'json = "tokens"', "above 0 and at most 9007199254740992"),
        ("print('a' * 40)", 'regex = "((?:a+)+)b"', 'units.regex "((?:a+)+)b" takes longer than 0.5 s to search what'),
        (
            'print(\'{"tokens": 10}\\n{"tokens": 20}\')',
            'json = "tokens"',
            'printed 2 JSON lines with "tokens" (units): 10, ..., 20; expected one',
        ),
        ("print('{\"tokens\": 9}')", 'json = "tokens"\nexpected = 10', "made 9 tokens, units.expected is 10"),
        ("import os; os.kill(os.getpid(), 11)", "fixed = 1", "was killed by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 40)", "fixed = 1", "was killed by signal 40"),
        ("raise MemoryError", "fixed = 1", "out of memory: "),
        ("raise SystemExit('CUDA out of memory. Tried to')", "fixed = 1", "out of memory: "),
    ],
)
def test_a_pass_that_fails_says_why_in_one_sentence(folder, monkeypatch, bench, units, sentence):
    monkeypatch.setattr(command, "REGEX_SECONDS", 0.5)
    told = cause(folder, bench, units=units)
    assert sentence in told
    assert "\n" not in told
    assert told.isprintable()


def test_defaults_that_do_not_run_are_refused_with_the_command_to_try_by_hand(folder):
    with pytest.raises(Refused) as refused:
        run_once(folder, "raise SystemExit(3)", units="fixed = 1")
    by_hand = f"env -C {folder} {sys.executable} -S bench.py 2"
    assert str(refused.value).endswith(f"expected 0; it printed nothing; try by hand: {by_hand}")
    assert subprocess.run(["/bin/sh", "-c", by_hand], check=False, cwd="/").returncode == 3


def test_a_command_that_one_line_does_not_hold_is_written_to_the_log(folder, capfd):
    bench = "import sys; sys.exit(sys.argv[1])"
    told = cause(folder, bench, units="fixed = 1", argv='"a\\nb  c", "{n}"')
    assert told.endswith("; its log has the command, to try by hand")
    assert "\n" not in told
    typed = capfd.readouterr().err.partition("env -C ")
    done = subprocess.run(["/bin/sh", "-c", "".join(typed[1:])], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "a\nb  c\n")


def test_a_server_and_its_load_are_both_tried_in_their_folder(folder):
    target = served(folder, server="raise SystemExit(4)")
    default = command.space(target).default()
    with pytest.raises(Refused) as refused, command.launch(default, target):
        pytest.fail("an engine was yielded")
    server, load = str(refused.value).partition("try by hand: ")[2].split(" & ")
    assert server.startswith(f"env -C {folder} {sys.executable} bench.py ")
    assert load.startswith(f"env -C {folder} {sys.executable} client.py ")


TUNED = ("run", "--workload", "bench.toml", "--proposer", "grid", "--batch", "--trials", "2", "--name", "s", "--fast")


def test_a_command_that_never_works_ends_the_study_where_a_parameter_is_pinned(folder, monkeypatch):
    settle_in(folder, monkeypatch)
    more = '[parameters.m]\ntype = "bool"\ndefault = false\nmeaning = "another thing that the benchmark gets"\n'
    write(folder, *minimal("raise SystemExit(3)", units="fixed = 1", argv='"{n}", "{m}"', parameters=more))
    done = typed(*TUNED, "--pin", "n=5")
    assert done.returncode == 2
    by_hand = f"env -C {folder} {sys.executable} -S bench.py 5 false"
    assert done.stderr.endswith(f"expected 0; it printed nothing; try by hand: {by_hand}\n")


def test_other_values_that_do_not_run_are_a_failed_trial(folder, monkeypatch):
    settle_in(folder, monkeypatch)
    write(folder, *minimal("import sys; sys.exit(3 * (sys.argv[1] != '2'))", units="fixed = 1"))
    done = typed(*TUNED, "--window", "0.1s", "--warm-up", "0.1s..0.2s", "--most-others", "1")
    assert done.returncode == 0, done.stderr
    assert [t.number for t in read(Path("results/s")).history.failed] == [1]


def test_defaults_that_lack_memory_are_a_failed_trial():
    assert not Ended(1, tail="CUDA out of memory").is_its_own
    assert not Ended(-9).is_its_own
    assert Ended(1, tail="no such model").is_its_own


def test_a_server_that_answers_otherwise_than_it_should_is_named_with_its_status(folder):
    target = served(folder, ready='url = "http://127.0.0.1:{port}/other"')
    path = Path(target.spec)
    path.write_text(path.read_text().replace("timeout = 20", "timeout = 2", 1))
    default = command.space(target).default()
    with (
        pytest.raises(RuntimeError, match=r"/other answers HTTP 404, expected 200 to 299; "),
        command.launch(default, target),
    ):
        pass


def test_a_command_that_is_gone_when_it_is_started_is_named(folder):
    target = write(folder, *minimal("", units="fixed = 1"))
    (folder / "prog").write_text("no program\n")
    (folder / "prog").chmod(0o755)
    (folder / "bench.toml").write_text(
        (folder / "bench.toml").read_text().replace(json.dumps(sys.executable), '"./prog"')
    )
    default = command.space(target).default()
    with (
        pytest.raises(Refused, match=r"^\./prog -S bench\.py 2 cannot be started: Exec format error; try by"),
        command.launch(default, target),
    ):
        pass


def test_a_command_that_never_ends_is_ended_in_time(folder):
    began = time.monotonic()
    bench = "import time; print('still here', flush=True); time.sleep(60)"
    told = cause(folder, bench, units="fixed = 1", options="timeout = 3")
    assert "did not end within 3 s (command.timeout)" in told
    assert 'its last line is "still here"' in told
    assert time.monotonic() - began < 40


def test_a_command_that_floods_its_output_is_ended(folder):
    told = cause(folder, "while True: print('x' * 1000)", units="fixed = 1")
    assert "printed more than 16 MiB, the most that is read" in told


def test_the_log_of_a_flood_holds_its_beginning_and_its_end(folder, capfd):
    bench = "print('first')\nfor i in range(9000): print('x' * 100)\nprint('last')"
    run_once(folder, bench, units="fixed = 1")
    logged = capfd.readouterr().err
    assert logged.startswith("first\n")
    assert logged.endswith("last\n")
    assert "[what came here was left out]" in logged
    assert len(logged) < 2 * (MOST_LOG_BYTES + 2 * TAIL_BYTES + 100)


DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open("pid", "w") as file:
            file.write(str(os.getpid()))
        os.closerange(0, 3)
        time.sleep(60)
    os._exit(0)
while not os.path.exists("pid"):
    time.sleep(0.01)
print("done")
"""


def gone(pid, seconds=8):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
                continue
        return True
    return False


def test_a_daemon_that_is_left_behind_is_named_and_ended(folder):
    told = cause(folder, DAEMON, units="fixed = 1")
    pid = int((folder / "pid").read_text())
    assert f"(process {pid}) running: energy of work that goes on after a pass is in no window" in told
    assert gone(pid)


def test_a_child_that_ends_soon_after_its_parent_is_nothing_to_complain_of(folder):
    bench = "import subprocess; subprocess.Popen(['sleep', '0.3'])"
    assert run_once(folder, bench, units="fixed = 1").units == 1


def in_a_worker(folder, target, then):
    """A process that launches the command, says so, and goes on with `then`."""
    code = f"""
import importlib.util, sys, time, os
sys.path.insert(0, {str(ROOT)!r})
spec = importlib.util.spec_from_file_location("command_in_a_worker", {str(RUNNER)!r})
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
from tuner.trial import Target
target = Target(spec={target.spec!r})
with module.launch(module.space(target).default(), target) as engine:
    print("launched", flush=True)
    {then}
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("group", [False, True])
def test_a_worker_killed_by_sigkill_leaves_neither_command_nor_daemon(folder, group):
    bench = DAEMON + "time.sleep(60)\n"
    target = write(folder, *minimal(bench, units="fixed = 1"))
    worker = in_a_worker(folder, target, "pass")
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        time.sleep(0.02)
    below = psutil.Process(worker.pid).children(recursive=True)
    assert len(below) >= 3
    os.killpg(worker.pid, signal.SIGKILL) if group else worker.kill()
    worker.wait()
    worker.stdout.close()
    assert all(gone(process.pid) for process in below)


def test_a_command_that_ignores_sigterm_is_killed(folder, own_children):
    bench = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    assert "did not end" in cause(folder, bench, units="fixed = 1", options="timeout = 3")
    assert not [p for p in own_children() if p.status() != psutil.STATUS_ZOMBIE]


def test_a_command_gets_signals_and_descriptors_as_a_shell_gives_them(folder):
    bench = """
    import json, os, signal
    usual = all(signal.getsignal(n) == signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD))
    print(json.dumps({"tokens": 1 + usual, "fds": len(os.listdir("/proc/self/fd"))}))
    """
    work = run_once(folder, bench, more='[metrics]\nfds = { json = "fds" }\n')
    assert work.units == 2
    assert work.metrics["fds"] == 4  # three streams, and the folder that is being listed


# --- server mode

SERVER = """
import http.server, sys, json
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            import os; os._exit(9)
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
        self.wfile.write(sys.argv[2].encode())
    def log_message(self, *a): pass
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer)
print("serving", flush=True)
server.serve_forever()
"""

CLIENT = """
import json, sys, urllib.request
slots = urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health").read()
print(json.dumps({"tokens": int(slots) * int(sys.argv[2])}))
"""

SERVED = """
[command]
mode = "server"
argv = [PYTHON, "bench.py", "{port}", "{slots}"]
[ready]
READY
timeout = 20
[load]
argv = [PYTHON, "client.py", "{port}", "{clients}"]
timeout = 20
[parameters.slots]
type = "int"
low = 1
high = 9
default = 2
meaning = "slots that the server decodes together"
[parameters.clients]
type = "int"
low = 1
high = 9
default = 1
scope = "live"
meaning = "requests that are sent at the same time"
[units]
json = "tokens"
"""


def served(folder, *, ready='url = "http://127.0.0.1:{port}/health"', server=SERVER, client=CLIENT, more=""):
    (folder / "client.py").write_text(client)
    return write(folder, SERVED.replace("READY", ready) + more, server)


@pytest.mark.parametrize("ready", ['url = "http://127.0.0.1:{port}/health"', 'regex = "^serving$"'])
def test_a_server_stays_while_each_pass_runs_the_load(folder, ready, own_children):
    target = served(folder, ready=ready)
    config = command.space(target).complete({"slots": 3})
    with command.launch(config, target) as engine:
        assert [engine.run_pass().units for _ in range(2)] == [3, 3]
        engine.change({**config, "clients": 2})
        assert engine.run_pass().units == 6
        with pytest.raises(RuntimeError, match=r"^slots: the server is started with it$"):
            engine.change({**config, "slots": 5})
    assert not own_children()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"server": "raise SystemExit(4)"}, "the server ended before it was ready: "),
        ({"server": "pass"}, "ended with exit status 0"),
        (
            {"server": "import time; time.sleep(60)", "ready": 'regex = "up"\ntimeout = 0.5 #'},
            'nothing that it prints matches "up"',
        ),
        ({"client": "raise SystemExit(5)"}, "ended with exit status 5"),
        ({"client": CLIENT.replace("/health", "/die")}, "the server ended while the load ran, and then "),
    ],
)
def test_a_server_or_a_load_that_fails_says_which_and_why(folder, changes, sentence, own_children):
    if "timeout" in changes.get("ready", ""):
        changes["ready"] = changes["ready"].partition("\n")[0]
    target = served(folder, **changes)
    path = Path(target.spec)
    path.write_text(
        path.read_text().replace("timeout = 20", "timeout = 1.5", 1) if "ready" in changes else path.read_text()
    )
    default = command.space(target).default()
    with pytest.raises((RuntimeError, Refused)) as raised, command.launch(default, target):
        pass
    assert sentence in str(raised.value)
    assert not own_children()


def test_another_server_on_the_same_address_is_not_measured_by_mistake(folder):
    other = subprocess.Popen([sys.executable, "-c", SERVER, "0", "1"], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        port = psutil.Process(other.pid).net_connections()[0].laddr.port
        target = served(folder, ready=f'url = "http://127.0.0.1:{port}/health"')
        with (
            pytest.raises(Refused, match="answers already, before the server is started"),
            command.launch(command.space(target).default(), target),
        ):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_a_server_is_a_service_and_a_benchmark_is_none(folder):
    more = (
        '[service]\nimage = "example/engine:1"\nargv = ["--port", "{port}", "{slots}"]\n'
        'port = 9000\npaths = ["m"]\ngpus = true\n'
    )
    target = served(folder, more=more)
    found = command.service(command.space(target).default(), target)
    assert found == Service(
        argv=(sys.executable, "bench.py", "9000", "2"),
        folder=str(folder),
        port=9000,
        image="example/engine:1",
        image_argv=("--port", "9000", "2"),
        paths=(str(folder / "m"),),
        gpus=True,
    )
    assert command.service({}, write(folder)) == Service()


# --- the file


def test_every_fault_of_a_file_is_told_at_once_with_its_line_and_what_was_expected(folder):
    told = faults(
        folder,
        """
        constraints = ["threads <== 4", "thread > 1", "threads"]
        [command]
        argv = ["no-such-program", "{thread}"]
        timeout = -1
        colour = "red"
        [parameters.threads]
        type = "int"
        low = 1
        high = "many"
        default = 2
        [units]
        json = "tokens"
        fixed = 3
        """,
    )
    assert told.splitlines()[0].endswith("bench.toml: 10 faults")
    for line, sentence in [
        (2, 'constraints: column 11: "=" means nothing here; equality is written =='),
        (2, 'constraints: column 1: no parameter is called "thread"'),
        (4, 'command.argv: there is no program "no-such-program" (looked in PATH)'),
        (5, "command.timeout: expected a number above 0, got -1"),
        (6, "command.colour: no such key"),
        (10, 'parameters.threads.high: expected a whole number, got "many"'),
        (7, "parameters.threads.meaning: missing; expected a sentence that says what it does"),
        (12, "units: expected one of json"),
    ]:
        assert f"line {line}, {sentence}" in told, (sentence, told)


GOOD = (
    '[command]\nargv = [PYTHON, "{n}"]\n[parameters.n]\ntype = "int"\nlow = 1\nhigh = 9\ndefault = 2\n'
    'meaning = "a number that the command gets"\n[units]\nfixed = 1\n'
)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"{n}"', '"{m}"', "{m}: no parameter is called so"),
        ('"{n}"', '"{n}", "{threds}"', "{threds}: no parameter is called so (the text itself is {{threds}})"),
        ('"{n}"', '"x"', "parameters.n: {n} stands in no argv or env, so it would change nothing"),
        ('argv = [PYTHON, "{n}"]', 'argv = "python {n}"', "expected a list of words"),
        ('argv = [PYTHON, "{n}"]', "argv = []", "got an empty list"),
        ('argv = [PYTHON, "{n}"]', 'argv = [PYTHON, "\\u0000{n}"]', "expected a list of words"),
        ('argv = [PYTHON, "{n}"]', 'argv = [PYTHON, "{n}"]\nmode = "daemon"', "expected one of run, server"),
        ('argv = [PYTHON, "{n}"]', 'argv = [PYTHON, "{n}"]\ncwd = "nowhere"', "there is no folder"),
        (
            'argv = [PYTHON, "{n}"]',
            'argv = [PYTHON, "{n}"]\nenv = { A = [1] }',
            "command.env.A: expected a text, a number",
        ),
        ('argv = [PYTHON, "{n}"]', 'argv = [PYTHON, "{n}"]\nflags.n = { 1 = ["a"] }', "expected a bool or a choice"),
        ('argv = [PYTHON, "{n}"]', 'argv = [PYTHON, "{n}"]\nflags.m = { true = [] }', "no parameter is called so"),
        ('argv = [PYTHON, "{n}"]', 'argv = [PYTHON, "{n}", "{port}"]', "{port}: no parameter is called so"),
        ('"int"', '"integer"', "expected one of int, float, choice, bool"),
        ("low = 1", "low = 10", "expected finite low <= high"),
        ("low = 1", "low = 0\nlog = true", "a log range starts above 0"),
        ("default = 2", "default = 20", "n=20: expected an integer from 1 to 9"),
        ("default = 2", "default = true", "n=true: expected an integer from 1 to 9"),
        ("default = 2", 'default = 2\nscope = "token"', "expected one of launch, live, request"),
        ("default = 2", 'default = 2\neffect = "none"', "expected one of exact, numerics, lossy"),
        ("default = 2", 'default = 2\nlever = "none"', "expected one of work, offload, clock, power"),
        ("[parameters.n]", "[parameters.model]", "expected another name: has a meaning of its own"),
        ("[parameters.n]", '[parameters."a b"]', "letters, digits and underscores make a name"),
        (
            "[units]",
            "[parameters.m]\ntype = 'choice'\nvalues = [1, 'a']\ndefault = 1\nmeaning='x'\n[units]",
            "values of one kind",
        ),
        ("[units]", "[other]\n[units]", "other: no such key"),
        ("[units]", "[load]\nargv = [PYTHON]\n[units]", 'it goes with [command] mode = "server"'),
        ("[units]\nfixed = 1", "", "units: missing"),
        ("fixed = 1", "fixed = 1.5", "expected a whole number above 0"),
        ("fixed = 1", "fixed = 0", "expected a number above 0"),
        ("fixed = 1", 'regex = "tokens"', "expected one group in parentheses"),
        ("fixed = 1", 'regex = "(tokens"', "this is no regular expression"),
        ("fixed = 1", 'fixed = 1\nunit = "word"', "expected one of token, image"),
        ("fixed = 1", "fixed = 1\n[metrics]\ntokens_per_s = { fixed = 1 }", "tune works this figure out itself"),
        ("fixed = 1", "fixed = 1\n[metrics]\nTTFT = { fixed = 1 }", "expected small letters"),
        ("fixed = 1", "fixed = 1\n[metrics]\nttft = 3", "metrics.ttft: expected a table"),
        (
            "fixed = 1",
            "fixed = 1\n[timings]\nttft = { fixed = 1 }",
            "timings.ttft: no such key (there is request_seconds, ",
        ),
        ("fixed = 1", 'fixed = 1\n[identity]\nfiles = ["gone"]', "there is no file"),
        ("fixed = 1", 'fixed = 1\n[identity]\ndevice = "tpu"', "expected one of cpu, gpu"),
        ("fixed = 1", 'fixed = 1\n[service]\nimage = "x"', "what runs to its end is no service"),
        ("[command]", 'constraints = ["n > 5"]\n[command]', "the defaults break 'n > 5'"),
        ("[command]", "[command", "this is no TOML"),
    ],
)
def test_a_fault_of_the_file_says_what_was_expected(folder, old, new, sentence):
    assert old in GOOD
    assert sentence in faults(folder, GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('mode = "server"', "", "ready: it goes with"),
        ("[ready]", "[redy]", "ready: missing"),
        ('url = "http', 'regex = "x"\nurl = "http', "expected either a regex"),
        ("http://127", "https://127", "expected http://HOST:PORT/PATH"),
        ('"{slots}"]', '"{slots}", "{clients}"]', 'parameters.clients.scope: expected "launch"'),
    ],
)
def test_a_fault_of_a_servers_file_says_what_was_expected(folder, old, new, sentence):
    (folder / "client.py").touch()
    spec = SERVED.replace("READY", 'url = "http://127.0.0.1:{port}/health"')
    assert old in spec
    assert sentence in faults(folder, spec.replace(old, new))


@pytest.mark.parametrize(
    ("load", "sentence"),
    [
        ({"prompts": 9}, "--prompts 9: bench.toml has no {prompts}, so it would change nothing"),
        ({"model": "m.gguf"}, "--model m.gguf: bench.toml has no {model}, so it would change nothing"),
    ],
)
def test_an_option_of_the_load_that_the_file_does_not_use_is_refused(folder, load, sentence):
    assert sentence in faults(folder, GOOD, **load)


def test_a_model_that_the_file_uses_must_be_named(folder):
    assert "say which with --model" in faults(folder, GOOD.replace('"{n}"', '"{n}", "{model}"'))


@pytest.mark.parametrize("spec", [None, "gone.toml", "."])
def test_a_file_that_cannot_be_read_is_refused(folder, spec):
    with pytest.raises(Refused):
        command.space(Target(spec=spec))


def test_bytes_that_are_no_text_are_refused(folder):
    (folder / "bench.toml").write_bytes(b"\xff\xfe[command]")
    with pytest.raises(Refused, match="expected UTF-8 text"):
        command.space(Target(spec="bench.toml"))


@given(st.text(max_size=200))
@settings(max_examples=200)
def test_no_text_makes_the_reader_fail_otherwise_than_with_a_sentence(text):
    with contextlib.suppress(Refused):
        command._read(Path("any.toml"), text.encode("utf-8", "replace"))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda t: (
            st.lists(t, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "command",
                        "argv",
                        "flags",
                        "units",
                        "json",
                        "regex",
                        "parameters",
                        "n",
                        "type",
                        "ready",
                        "load",
                        "metrics",
                        "service",
                    ]
                ),
                t,
                max_size=4,
            )
        ),
        max_leaves=20,
    )
)
@settings(max_examples=300)
def test_no_shape_of_document_makes_the_reader_fail(document):
    document = document if isinstance(document, dict) else {"command": document}
    command._checked(Path("any.toml"), b"", document, command._Faults({}))


def test_lossy_parameters_are_left_out_and_keep_their_default_unless_allowed(folder):
    lossy = SPEC.replace('effect = "numerics"', 'effect = "lossy"').replace(
        '"repack -> threads >= 1"', "\"mode == 'slow' or threads < 3\""
    )
    target = write(folder, lossy)
    space = command.space(target)
    assert space.names == ("threads", "repack")
    assert "--mode=slow" in command.command(space.default(), target)
    assert space.check({**space.default(), "threads": 3})
    assert "mode" in command.space(dataclasses.replace(target, allow_lossy=True)).names


def test_another_file_or_another_benchmark_is_another_engine(folder):
    first = command.identity(write(folder))
    assert (first["engine"], first["engine_version"], first["model"]) == ("bench", "2", "not named")
    assert command.identity(write(folder, SPEC + "\n"))["spec_sha256"] != first["spec_sha256"]
    assert command.identity(write(folder, bench=BENCH + "\n"))["files_sha256"] != first["files_sha256"]


def test_the_file_says_model_load_and_figures_in_words(folder):
    target = write(folder)
    assert command.describe(target) == (
        "model: not named; each pass starts the command anew, so its start-up and loading are inside every window"
    )
    assert command.load(target).startswith(f"bench.toml: {sys.executable} -S bench.py ")
    assert command.metrics(target) == ("own_ttft_s",)
    assert command.unit(target) == "token"
    assert (
        command.unit(write(folder, SPEC.replace('json = "run.tokens"', 'unit = "image"\njson = "run.tokens"')))
        == "image"
    )
    assert "stays loaded" in command.describe(served(folder))


# --- placeholders

NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True)


@given(st.lists(st.tuples(st.text(alphabet="ab{} $%\\", max_size=6), NAMES), max_size=5), st.text(max_size=8))
def test_a_placeholder_is_replaced_and_all_else_stays(parts, value):
    """Built from pieces that hold no placeholder of their own, so what must come out is known."""
    parts = [(text.replace("{", "(").replace("}", ")"), name) for text, name in parts]
    word = "".join(f"{text}{{{name}}}" for text, name in parts)
    assert command.placeholders(word) == [name for _, name in parts]
    filled = command.fill(word, {name: value for _, name in parts})
    assert filled == "".join(f"{text}{value}" for text, _ in parts)


@given(NAMES, NAMES)
def test_a_value_that_looks_like_a_placeholder_is_not_looked_at_again(name, other):
    assert command.fill(f"{{{name}}}", {name: f"{{{other}}}", other: "x"} | {name: f"{{{other}}}"}) == f"{{{other}}}"


@given(NAMES)
def test_doubled_braces_are_the_text_itself(name):
    assert command.fill(f"a{{{{{name}}}}}b", {}) == f"a{{{name}}}b"


@given(st.text(alphabet="{}:!.[]0a ", max_size=12))
def test_no_word_is_ever_a_format_string(word):
    names = command.placeholders(word)
    command.fill(word, dict.fromkeys(names, ""))
    assert all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in names)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_reaches_the_command_with_every_digit(number):
    assert float(command.shown(number)) == number
