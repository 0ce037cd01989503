"""Optuna's samplers, rebuilt from the history at each call.

What the sampler minimises is ln(joules per unit): energies multiply, so that a parameter which
halves them does so everywhere. A failed trial is told as bad as the worst tenth of what was measured:
a sampler that never hears of failures proposes them again (optuna/optuna#2864), and one that hears a
huge number models the penalty instead of the energy. Trials of configurations that are not of this
space are not told.

    tpe     J. Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011; multivariate
    gp      Gaussian process with expected improvement; needs torch
    cmaes   N. Hansen, The CMA Evolution Strategy: A Tutorial, arXiv:1604.00772
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, TPESampler

from tuner.proposers.random import instead_of
from tuner.proposers.untried import Untried, generator, inside
from tuner.space import Choice, Config, Float, Int, Parameter, SearchSpace, Value
from tuner.trial import History, Proposal

Name = Literal["tpe", "gp", "cmaes"]

STARTUP = 5
"""Trials before the model is used, the default among them. Optuna's 10 suit its usual 100 trials; a
study here has about 15, and the start-up of 10 would leave a third of them to the method itself."""

ASKS: Mapping[Name, int] = {"tpe": 50, "gp": 4, "cmaes": 50}
"""Suggestions before a random one: each takes a millisecond, a Gaussian process's a large part of a second."""


class OptunaSampler:
    """One of Optuna's samplers, without memory of its own."""

    def __init__(self, name: Name, seed: int) -> None:
        self.name: str = name
        self._name: Name = name
        self.seed = seed

    def propose(self, space: SearchSpace, history: History) -> Proposal | None:
        """The sampler's suggestion; a random one, visibly, where all it suggests is spent or illegal."""
        with _one_thread() if self._name == "gp" else contextlib.nullcontext():
            return self._propose(space, history)

    def _propose(self, space: SearchSpace, history: History) -> Proposal | None:
        untried = Untried.of(space, history)
        if not space.free:
            return instead_of(self.name, "nothing is free to tune", space, history, self.seed)
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # it reports each study on stderr
        told = _told(space, history)
        distributions = {p.name: _distribution(p, self._name) for p in space.free}
        study = self._study(distributions, space, history, told)
        for _ in range(ASKS[self._name]):
            # What is refused stays pending: TPE and the Gaussian process keep away from pending trials.
            asked = study.ask(distributions)
            config = {p.name: _decode(p, asked.params[p.name]) if p.size > 1 else p.default for p in space.parameters}
            if config in untried:
                return Proposal(config=space.check(config), source=self.name, reason=self._reason(len(told)))
        why = f"{self.name} suggested only configurations that are illegal or spent, {ASKS[self._name]} times"
        return instead_of(self.name, why, space, history, self.seed)

    def _study(
        self,
        distributions: dict[str, BaseDistribution],
        space: SearchSpace,
        history: History,
        told: list[tuple[Config, float]],
    ) -> optuna.Study:
        """A study in memory that has seen the trials."""
        study = optuna.create_study(sampler=self._sampler(history))
        for config, value in told:
            params = {p.name: _encode(p, config[p.name]) for p in space.free}
            if self._name == "cmaes":
                # This sampler keeps its state in the trials that it was asked for, and none in trials
                # that are added: added ones would leave it at its initial distribution for ever. So
                # each trial is asked for again, with the parameters that were run.
                study.enqueue_trial(params)
                trial = study.ask(distributions)
                trial.relative_params  # noqa: B018  computed when first read; this is what moves the state on
                study.tell(trial, value)
            else:
                study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=value))
        return study

    def _sampler(self, history: History) -> BaseSampler:
        seed = generator(self.seed, history).getrandbits(32)
        match self._name:
            case "tpe":
                return TPESampler(n_startup_trials=STARTUP, seed=seed)
            case "gp":
                return GPSampler(n_startup_trials=STARTUP, seed=seed)
            case "cmaes":
                return CmaEsSampler(seed=seed)

    def _reason(self, told: int) -> str:
        startup = 1 if self._name == "cmaes" else STARTUP
        if told < startup:
            return f"a random start: {self.name} has seen {told} of the {startup} trials that it needs"
        return f"suggested by {self.name} after {told} trials"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices of a dozen rows: threads that wait for each other make a suggestion take up to eight times as long."""
    torch: Any = importlib.import_module("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _told(space: SearchSpace, history: History) -> list[tuple[Config, float]]:
    """What the sampler hears: configurations of this space with ln(joules per unit), a penalty for failures."""
    energies = sorted(e for t in history.measured if (e := t.joules_per_unit))
    if not energies:
        return []
    # Nearest rank: the worst of up to ten, the second worst of twenty.
    penalty = energies[math.ceil(0.9 * len(energies)) - 1]
    return [
        (config, math.log(trial.joules_per_unit or penalty))
        for trial in history.current
        if (config := inside(space, trial.config)) is not None
    ]


def _distribution(parameter: Parameter, name: Name) -> BaseDistribution:
    if isinstance(parameter, Int):
        return IntDistribution(parameter.low, parameter.high, log=parameter.log)
    if isinstance(parameter, Float):
        return FloatDistribution(parameter.low, parameter.high, log=parameter.log)
    assert isinstance(parameter, Choice)
    # CMA-ES knows no categories; left to itself it would draw them at random for ever.
    if parameter.ordered or name == "cmaes":
        return IntDistribution(0, len(parameter.values) - 1)
    return CategoricalDistribution(range(len(parameter.values)))


def _encode(parameter: Parameter, value: Value) -> Value:
    """The value as its distribution knows it: a choice by its index, so that true and 1 stay apart."""
    if isinstance(parameter, Choice):
        return math.floor(parameter.position(value) * len(parameter.values))
    return value


def _decode(parameter: Parameter, encoded: Value) -> Value:
    return parameter.values[int(encoded)] if isinstance(parameter, Choice) else encoded
