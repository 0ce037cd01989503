"""Performance, measured by command: nothing here is a test, and no test depends on a clock.

    python tests/bench.py startup                 `tune --help` against a typer program that does nothing
    python tests/bench.py parent                  the tuner's own CPU seconds for each trial, beside a real engine
    python tests/bench.py methods [--seeds 5]     best against default on the generated model, by method
    python tests/bench.py compare                 a replayed trial without its sampler; Sobol and random on all tables

`methods` runs real studies one after the other and takes a while; leave the machine alone meanwhile.
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tuner.compare import load_table, parse_tables, run_one
from tuner.journal import read
from tuner.trial import Proposal

TUNE = [sys.executable, "-m", "tuner.cli"]
EMPTY = "import typer\napp = typer.Typer()\n@app.command()\ndef nothing(): ...\napp()\n"


def seconds(command):
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def startup(options):
    """Alternating, so that a slow moment hits both."""
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.py"
        empty.write_text(EMPTY)
        pairs = [
            (seconds([*TUNE, "--help"]), seconds([sys.executable, str(empty), "--help"]))
            for _ in range(options.repeats)
        ]
    tune, typer = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"tune --help {tune:.3f} s, empty typer program --help {typer:.3f} s, ratio {tune / typer:.2f}")


def parent(options):
    """CPU time of the tuner itself, its workers not counted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *TUNE,
            "run",
            "--proposer",
            "rules",
            "--batch",
            "--trials",
            str(options.trials),
            "--fast",
        ]
        process = subprocess.Popen(
            [*command, "--results", folder, "--name", "s"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        spent = 0.0
        while process.poll() is None:
            times = psutil.Process(process.pid).cpu_times()
            spent = times.user + times.system
            time.sleep(0.1)
        trials = read(Path(folder) / "s").history.trials
        whole = statistics.median(t.seconds for t in trials)
    print(f"{spent:.2f} CPU s for {len(trials)} trials: {spent / len(trials):.3f} s each, beside {whole:.1f} s a trial")


def methods(options):
    """Best of the search over default, by the search's own figures: they rank methods, they claim no saving."""
    print(f"{'method':8} {'ratio best/default (geometric mean)':36} {'each seed':40} trials to within 5 % of own best")
    for method in options.methods.split(","):
        ratios, firsts = [], []
        for seed in range(options.seeds):
            folder = Path(options.results)
            name = f"{method}-{seed}"
            if not (folder / name).exists():
                command = [*TUNE, "run", "--proposer", method, "--batch", "--seed", str(seed), "--fast"]
                quick = ["--windows", "3", "--window", "0.5s", "--prompt-tokens", "64", "--output-tokens", "16"]
                budget = ["--trials", str(options.trials), "--results", str(folder), "--name", name]
                subprocess.run([*command, *quick, *budget], check=True, capture_output=True)
            history = read(folder / name).history
            best, default = history.best.joules_per_unit, history.default.joules_per_unit
            ratios.append(best / default)
            firsts.append(next(n for n, t in enumerate(history.measured) if t.joules_per_unit <= 1.05 * best))
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        each = " ".join(f"{r:.3f}" for r in ratios)
        print(f"{method:8} {mean:<36.3f} {each:40} {' '.join(map(str, firsts))}", flush=True)


class Listed:
    """Proposes a table's rows one after the other, and so costs nothing itself."""

    name = "listed"

    def __init__(self, table):
        self.rows = [row.config for row in table.rows if row is not table.default]

    def propose(self, space, history):
        number = len(history.trials) - 1
        return Proposal(config=self.rows[number], source=self.name) if number < len(self.rows) else None


def compare(options):
    """Everything but the sampler for each replayed trial, and the whole of a comparison."""
    each = []
    for name in parse_tables("all"):
        table = load_table(name)
        budget = min(20, len(table.rows) - 1)
        runs = [run_one(table, Listed(table), method="listed", seed=seed, budget=budget) for seed in range(50)]
        each.append(statistics.median(run.seconds / (budget + 1) for run in runs))
    print(f"{1000 * statistics.median(each):.3f} ms a trial without its sampler, {1000 * max(each):.3f} ms at most")
    with tempfile.TemporaryDirectory() as folder:
        what = ["--table", "all", "--methods", options.methods, "--seeds", "50", "--trials", "20"]
        print(f"{seconds([*TUNE, 'compare', *what, '--results', folder]):.1f} s for {options.methods} on all tables")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("startup")
    one.add_argument("--repeats", type=int, default=15)
    one.set_defaults(run=startup)
    one = commands.add_parser("parent")
    one.add_argument("--trials", type=int, default=5)
    one.set_defaults(run=parent)
    one = commands.add_parser("methods")
    one.add_argument("--methods", default="rules,sobol,tpe,random")
    one.add_argument("--seeds", type=int, default=5)
    one.add_argument("--trials", type=int, default=15)
    one.add_argument("--results", default="results/bench")
    one.set_defaults(run=methods)
    one = commands.add_parser("compare")
    one.add_argument("--methods", default="sobol,random")
    one.set_defaults(run=compare)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
