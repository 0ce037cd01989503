"""A runner that misbehaves on demand, so that real processes can be watched dying."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tuner.serving import start_server
from tuner.space import Choice, Constraint, Int, Refused, SearchSpace
from tuner.trial import Work

DEATHS = ("segv", "kill", "abort", "exit", "child")
WAITS = ("hang", "hang-loading", "parent")
FAULTS = ("raise", "bug", "refuse", "memory", "log", "late", "nothing", "nan", "short")
MODES = ("ok", *FAULTS, *DEATHS, *WAITS)


def space(target):
    if target.size == "refused":
        raise Refused("size 'refused': expected a size that works")
    modes = MODES if target.size == "wild" else ("ok",)
    return SearchSpace(
        (
            Int(name="cost", meaning="Milliseconds of CPU that one pass burns.", default=20, low=1, high=64, log=True),
            Int(
                name="batch",
                meaning="Requests handled together.",
                default=2,
                low=1,
                high=8,
                scope="request" if target.size == "live" else "launch",
            ),
            Choice(name="mode", meaning="How the engine behaves.", default="ok", values=modes, effect="numerics"),
        ),
        (Constraint("batch <= cost", lambda c: c["batch"] <= c["cost"]),),
    )


def metrics(target):
    return ("compile_seconds", "cost_ms")


def identity(target):
    return {
        "engine": "fake",
        "engine_version": os.environ.get("FAKE_ENGINE_VERSION", "1"),
        "model": target.model or "none",
    }


def command(config, target):
    return f"fake --cost {config['cost']} --batch {config['batch']}"


class Engine:
    """`quality` is worse the larger the batch: as if the batch were lossy."""

    def __init__(self, config, target):
        self.target, self.passes = target, 0
        self.change(config)

    def change(self, config):
        if config["batch"] == 7:
            raise RuntimeError("seven is refused while running")
        self.config = config
        self.figures = {"compile_seconds": 1.5, "cost_ms": config["cost"]}
        self.effective = {"cost": config["cost"], "batch": config["batch"], "pid": os.getpid()}

    def quality(self, reference):
        if not reference.exists():
            reference.write_text(str(self.config["batch"]))
        return {"quality_loss": 0.01 * (self.config["batch"] - int(reference.read_text()))}

    def run_pass(self):
        misbehave(self.config["mode"])
        until = time.process_time() + self.config["cost"] / 1000 / self.config["batch"]
        while time.process_time() < until:
            pass
        self.passes += 1
        if self.config["mode"] == "late" and self.passes > 3:
            raise RuntimeError("the engine tired")
        units = self.target.prompts * self.target.output_tokens - (self.config["mode"] == "short")
        units = 0 if self.config["mode"] == "nothing" else units
        seconds = (float("nan"),) if self.config["mode"] == "nan" else ()
        return Work(units=units, prompt_tokens=self.target.prompts, request_seconds=seconds)


def misbehave(mode):
    match mode.removeprefix("served-"):
        case "deaf":
            # As in a library's own code, which no signal handler of Python's interrupts.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            time.sleep(3600)
        case "raise":
            raise RuntimeError("the engine is on fire")
        case "bug":
            raise KeyError("n_layer")
        case "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "abort":
            os.abort()
        case "hang":
            time.sleep(3600)
        case "exit":
            os._exit(7)
        case "memory":
            raise MemoryError
        case "log":
            sys.stderr.write("loading tensors\nfailed to allocate buffer of size 42 \x1b[31mred\x1b[0m\n")
            raise RuntimeError("could not load")


SERVER = """
import os, signal, sys, time
from pathlib import Path

held = Path(sys.argv[1])

def leave(*_):
    with held.with_name("asked").open("a") as file:
        file.write("asked;")
    time.sleep(float(os.environ.get("FAKE_ENGINE_STOP_SECONDS", "0.2")))
    held.unlink()
    sys.exit()

signal.signal(signal.SIGTERM, leave)
held.touch()
while True:
    signal.pause()
"""


@contextlib.contextmanager
def served(path, mode):
    """A process of its own with a file that, like shared memory, only its own end takes away.

    Each time it is asked to end, `asked` beside that file gets a word; the end takes FAKE_ENGINE_STOP_SECONDS.
    """
    server = start_server([sys.executable, "-c", SERVER, str(path)], name="engine")
    try:
        while not path.exists():
            time.sleep(0.02)
        if mode == "served-unready":
            raise RuntimeError("the engine answers with nonsense")
        yield
    finally:
        server.stop()


@contextlib.contextmanager
def launch(config, target):
    if config["mode"] == "refuse":
        raise Refused("mode=refuse: expected a mode that loads")
    if config["mode"] == "hang-loading":
        time.sleep(3600)
    if config["mode"] in ("child", "parent"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        Path(target.model).write_text(str(child.pid))
        if config["mode"] == "child":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)
    if slow := os.environ.get("FAKE_ENGINE_LOAD_SECONDS"):
        time.sleep(float(slow))
    mode = config["mode"]
    with served(Path(target.model), mode) if mode.startswith("served") else contextlib.nullcontext():
        yield Engine(config, target)
