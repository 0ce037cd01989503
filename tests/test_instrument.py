"""The instrument against others: exact probabilities, Optuna by itself, and Kernel Tuner's simulation mode.

All on recorded tables that are full grids, where every proposal is a row and nothing is moved. Seeds are fixed, so
that a result here is the same every time; the bounds are those of chance, four standard errors.
"""

import json
import math
import random
import statistics
import warnings
from functools import cache
from importlib.util import find_spec
from math import comb
from pathlib import Path

import optuna
import pytest

from tuner.compare import run_one
from tuner.convergence import TARGETS, analyse, incumbent_energies
from tuner.proposers import open_classical
from tuner.proposers.optuna_samplers import STARTUP
from tuner.replay import Table, problem
from tuner.runs import Run, Step

RECORDED = Path(__file__).parent.parent / "results" / "recorded"
GRIDS = ["zeus-v100-cifar100-shufflenetv2", "zeus-a40-squad-bert-base-uncased", "tx2-inceptionv3-400px"]
BUDGET = 20
SIGMAS = 4

pytestmark = pytest.mark.usefixtures("untraced")


@cache
def table(name):
    return Table.load(RECORDED / f"{name}.csv")


@cache
def ours(name, method, seeds, budget=BUDGET):
    return [
        run_one(table(name), open_classical(method, seed), method=method, seed=seed, budget=budget)
        for seed in range(seeds)
    ]


def run_of(rows, *, name, seed):
    """What another program looked at, as a run of ours: the default, then each new row once, up to the budget."""
    fresh = list(dict.fromkeys([table(name).default.number, *rows]))[: BUDGET + 1]
    steps = tuple(
        Step(
            number=n,
            config=row.config,
            joules_per_unit=row.joules_per_unit if row.feasible else None,
            true_joules_per_unit=row.joules_per_unit,
            feasible=row.feasible,
        )
        for n, row in enumerate(table(name).rows[number] for number in fresh)
    )
    return Run(problem=name, method="theirs", seed=seed, steps=steps, budget=BUDGET)


def agree(name, mine, theirs):
    """The statistics do not tell the two apart, and the mean regret is the same at every proposal."""
    found = analyse([problem(table(name))], [*mine, *theirs])
    assert [c.distinct for c in found.comparisons] == [False] * len(TARGETS)
    best = table(name).best.joules_per_unit
    for n in range(1, BUDGET + 1):
        a, b = ([math.log(incumbent_energies(r)[n] / best) for r in runs] for runs in (mine, theirs))
        spread = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
        assert abs(statistics.fmean(a) - statistics.fmean(b)) <= SIGMAS * spread, f"after {n} proposals"


# --- exact probabilities -----------------------------------------------------------------------


def survival(name, n):
    """For each feasible row that beats the default, the probability that none as good is among n drawn of the others.

    Hypergeometric: of M other rows, i are as good or better; C(M - i, n) / C(M, n).
    """
    rows, default = table(name).rows, table(name).default
    others = len(rows) - 1
    better = sorted(r.joules_per_unit for r in rows if r.feasible and r.joules_per_unit < default.joules_per_unit)
    return [(joules, comb(others - i, n) / comb(others, n)) for i, joules in enumerate(better, start=1)]


def expected_best(name, n):
    """Mean energy of the best so far after the default and n others, drawn without putting back."""
    total, before = 0.0, 1.0
    for joules, none in survival(name, n):
        total += joules * (before - none)
        before = none
    return total + before * table(name).default.joules_per_unit


@pytest.mark.parametrize("name", GRIDS)
def test_these_tables_are_full_grids_with_a_feasible_default(name):
    assert table(name).default.feasible
    assert len(table(name).rows) == math.prod(len(p.values) for p in table(name).about.parameters.values())
    assert all(step.proposed is None for run in ours(name, "random", 400) for step in run.steps)


@pytest.mark.parametrize("name", GRIDS)
def test_the_best_of_random_search_has_the_hypergeometric_expectation(name):
    curves = [incumbent_energies(run) for run in ours(name, "random", 400)]
    for n in range(1, BUDGET + 1):
        found = [curve[n] for curve in curves]
        error = statistics.stdev(found) / math.sqrt(len(found))
        assert statistics.fmean(found) == pytest.approx(expected_best(name, n), abs=SIGMAS * error)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_random_search_converges_with_the_hypergeometric_probability(name, target):
    cell = analyse([problem(table(name))], ours(name, "random", 400), [target]).cells[0]
    threshold = table(name).best.joules_per_unit * (1 + target.value)
    unconverged = [1.0]
    for n in range(1, BUDGET + 1):
        # The last row within the target decides; none at all is probability 1 only where the default is within it.
        none = min(p for joules, p in survival(name, n) if joules <= threshold)
        unconverged.append(none)
        error = math.sqrt(none * (1 - none) / cell.runs)
        assert cell.curve[n] == pytest.approx(1 - none, abs=SIGMAS * error)
    assert cell.mean_low <= sum(unconverged[:-1]) <= cell.mean_high


# --- Optuna by itself --------------------------------------------------------------------------


def optuna_alone(name, sampler):
    """Rows that Optuna's own loop looks at, in its order; one it asks for again costs nothing and tells it the same."""
    space, seen = table(name).space, {}
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial({p.name: p.values.index(p.default) for p in space.parameters})
    while len(seen) <= BUDGET:
        trial = study.ask()
        config = {
            p.name: p.values[
                trial.suggest_int(p.name, 0, len(p.values) - 1)
                if p.ordered
                else trial.suggest_categorical(p.name, range(len(p.values)))
            ]
            for p in space.parameters
        }
        row = table(name).row(config)
        if row.number in seen:
            continue  # as ours does: what is refused stays pending
        energies = sorted(e for e in [*seen.values(), row.joules_per_unit if row.feasible else None] if e)
        worst_tenth = energies[math.ceil(0.9 * len(energies)) - 1]
        seen[row.number] = row.joules_per_unit if row.feasible else None
        study.tell(trial, math.log(seen[row.number] or worst_tenth))
    return list(seen)


@pytest.fixture
def quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.mark.parametrize("name", GRIDS)
def test_optunas_random_sampler_by_itself_gives_the_curve_of_ours(name, quiet):
    theirs = [
        run_of(optuna_alone(name, optuna.samplers.RandomSampler(seed=seed)), name=name, seed=seed)
        for seed in range(100)
    ]
    agree(name, ours(name, "random", 100), theirs)


@pytest.mark.parametrize("name", GRIDS)
def test_optunas_tpe_by_itself_gives_the_curve_of_ours(name, quiet):
    theirs = [
        run_of(
            optuna_alone(name, optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=1000 + seed)),
            name=name,
            seed=seed,
        )
        for seed in range(40)
    ]
    agree(name, ours(name, "tpe", 40), theirs)


# --- Kernel Tuner's simulation mode --------------------------------------------------------------


def kernel_tuner_cache(name, path):
    """The table as a cache file of Kernel Tuner; a row that breaks a limit is a configuration that failed to run."""
    parameters = {n: list(p.values) for n, p in table(name).about.parameters.items()}
    entries = {
        ",".join(map(str, row.config.values())): {
            **row.config,
            "number": row.number,
            "time": row.joules_per_unit if row.feasible else "RuntimeFailedConfig",
            "compile_time": 0,
            "verification_time": 0,
            "benchmark_time": 0,
            **({} if row.feasible else {"__error__": "RuntimeFailedConfig"}),
        }
        for row in table(name).rows
    }
    cache = {
        "device_name": "recorded",
        "kernel_name": "recorded",
        "problem_size": 1,
        "tune_params_keys": list(parameters),
        "tune_params": parameters,
        "objective": "time",
        "cache": entries,
    }
    path.write_text(json.dumps(cache))
    return parameters


def kernel_tuner_rows(name, folder, strategy, seed):
    """Rows that Kernel Tuner looks at in its simulation mode, in its order."""
    import kernel_tuner
    import numpy as np

    path = folder / f"{name}.json"
    parameters = kernel_tuner_cache(name, path)
    random.seed(seed)
    np.random.seed(seed)  # it draws from the global generator
    results, _ = kernel_tuner.tune_kernel(
        "recorded",
        "",
        1,
        [],
        parameters,
        simulation_mode=True,
        cache=str(path),
        strategy=strategy,
        # One more than the budget: the default, which ours starts with, may be among them.
        strategy_options={"max_fevals": BUDGET + 1},
        lang="C",
        quiet=True,
    )
    assert len(results) == BUDGET + 1, "those that failed are among them"
    return [r["number"] for r in results]


needs_kernel_tuner = pytest.mark.skipif(
    find_spec("kernel_tuner") is None, reason="kernel_tuner is not installed: pip install kernel_tuner"
)


@needs_kernel_tuner
@pytest.mark.parametrize("name", GRIDS)
def test_kernel_tuners_random_sample_by_itself_gives_the_curve_of_ours(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        theirs = [
            run_of(kernel_tuner_rows(name, tmp_path, "random_sample", seed), name=name, seed=seed)
            for seed in range(100)
        ]
    agree(name, ours(name, "random", 100), theirs)


# --- the check itself ----------------------------------------------------------------------------


def test_a_search_that_is_a_little_better_does_not_agree():
    # Random search with one look at the best tenth first: the bounds above are no rubber stamp.
    name = GRIDS[0]
    order = sorted(table(name).feasible, key=lambda row: row.joules_per_unit)
    tenth = [row.number for row in order[: len(table(name).rows) // 10]]
    cheats = []
    for seed in range(100):
        rng = random.Random(seed)
        rows = [rng.choice(tenth), *rng.sample(range(len(table(name).rows)), BUDGET + 1)]
        cheats.append(run_of(rows, name=name, seed=seed))
    with pytest.raises(AssertionError):
        agree(name, ours(name, "random", 100), cheats)
