"""What every proposer keeps.

A test file inherits the suite and says how its proposer is opened. A proposer is asked against a
synthetic engine whose energy is a product of effects, and which fails where it is told to.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from tuner.space import Choice, Config, Constraint, Float, Int, SearchSpace, Value
from tuner.trial import Decision, Energy, History, Measurement, Proposal, Proposer, Trial, Work

Energies = Callable[[Mapping[str, Value]], float | None]
"""Joules per token of a configuration; None where the engine fails."""

SPACE = SearchSpace(
    (
        Int(name="parallel", meaning="Sequences decoded together.", default=4, low=1, high=32, log=True),
        Int(name="threads", meaning="Threads that compute.", default=4, low=1, high=8),
        Choice(name="n_ubatch", meaning="Piece.", default=128, values=(32, 64, 128, 256, 512), ordered=True),
        Choice(name="n_batch", meaning="Batch.", default=128, values=(32, 64, 128, 256, 512), ordered=True),
        Choice(name="flash_attention", meaning="Fused attention.", default="auto", values=("off", "on", "auto")),
        Choice(name="mmap", meaning="Map the file.", default=True, values=(False, True)),
        Float(name="memory_share", meaning="Share of memory.", default=0.9, low=0.5, high=0.95),
        Choice(name="device", meaning="Pinned.", default="cpu", values=("cpu",)),
    ),
    (Constraint("n_ubatch <= n_batch", lambda c: c["n_ubatch"] <= c["n_batch"]),),
)

SMALL = SearchSpace(
    (
        Int(name="batch", meaning="Batch.", default=1, low=1, high=4),
        Choice(name="kind", meaning="Kind.", default="a", values=("a", "b", "c")),
        Choice(name="fast", meaning="Fast.", default=True, values=(True, False)),
    ),
    (Constraint("c is not for batches", lambda c: c["kind"] != "c" or c["batch"] == 1),),
)
"""24 configurations, 18 of them legal."""


def energy(config: Mapping[str, Value]) -> float | None:
    """An engine that runs out of memory with many sequences and large pieces."""
    if config["parallel"] * config["n_ubatch"] > 8192:
        return None
    return math.exp(
        -0.2 * math.log2(config["parallel"])
        + 0.1 * abs(config["threads"] - 3)
        - 0.05 * math.log2(config["n_ubatch"])
        + 0.2 * (config["flash_attention"] == "off")
    )


def run(number: int, proposal: Proposal, joules: float | None, segment: int = 0) -> Trial:
    """The trial of `proposal` with this energy per token; a failed one where it is None."""
    if joules is None:
        return Trial(number=number, config=proposal.config, proposal=proposal, error="out of memory", segment=segment)
    window = Measurement(
        work=Work(units=100),
        seconds=1.0,
        energy={"cpu0": Energy(100 * joules, 100 * joules, 100 * joules)},
        quality="simulated",
        meter="synthetic",
    )
    return Trial(number=number, config=proposal.config, proposal=proposal, measurements=(window,), segment=segment)


def ran(space: SearchSpace, *outcomes: tuple[Config, float | None], segment: int = 0) -> History:
    """A history of these changes from the default, each with its energy (None: it failed)."""
    history = History()
    for number, (changes, joules) in enumerate(outcomes):
        proposal = Proposal(config={**space.default(), **changes}, source="human" if number else "default")
        history = history.add(run(number, proposal, joules, segment))
    return history


def study(proposer: Proposer, space: SearchSpace, energies: Energies, trials: int, history: History) -> History:
    """`history` and what `proposer` makes of it in up to so many further trials."""
    for _ in range(trials):
        proposal = proposer.propose(space, history)
        if proposal is None:
            break
        history = history.add(run(len(history), proposal, energies(proposal.config)))
    return history


START = ran(SPACE, ({}, energy(SPACE.default())))


class ProposerContract(ABC):
    """Inherit it, and say how the proposer is opened."""

    trials = 25
    """How far a study goes in these tests."""

    @abstractmethod
    def open(self, seed: int) -> Proposer:
        """A new proposer."""

    def test_asking_twice_gives_the_same_answer(self) -> None:
        proposer = self.open(7)
        history = study(proposer, SPACE, energy, 8, START)
        again = proposer.propose(SPACE, history)
        assert again is not None
        assert proposer.propose(SPACE, history) == again
        assert self.open(7).propose(SPACE, history) == again

    def test_a_resumed_study_goes_on_as_the_uninterrupted_one(self) -> None:
        whole = study(self.open(1), SPACE, energy, 9, START)
        half = study(self.open(1), SPACE, energy, 5, START)
        resumed = study(self.open(1), SPACE, energy, 4, half)
        assert [t.config for t in resumed.trials] == [t.config for t in whole.trials]

    def test_every_proposal_is_legal_new_and_says_where_it_comes_from(self) -> None:
        proposer = self.open(3)
        history = study(proposer, SPACE, energy, self.trials, START)
        assert len(history) == self.trials + 1
        assert all(SPACE.check(t.config) == t.config for t in history.trials)
        assert len({SPACE.key(t.config) for t in history.trials}) == len(history)
        for trial in history.trials[1:]:
            assert trial.proposal.reason
            assert proposer.name in (trial.proposal.source, trial.proposal.in_place_of)

    def test_it_goes_on_while_every_trial_fails(self) -> None:
        history = study(self.open(0), SPACE, lambda _: None, 12, History())
        assert len({SPACE.key(t.config) for t in history.trials}) == 12

    def test_a_small_space_is_proposed_completely_and_then_nothing(self) -> None:
        history = study(self.open(2), SMALL, lambda c: 1.0 / c["batch"], 30, History())
        every = [
            {"batch": b, "kind": k, "fast": f} for b, k, f in itertools.product((1, 2, 3, 4), "abc", (True, False))
        ]
        legal = {SMALL.key(c) for c in every if not SMALL.broken(c)}
        assert sorted(SMALL.key(t.config) for t in history.trials) == sorted(legal)

    def test_a_forbidden_value_is_not_proposed(self) -> None:
        space = SPACE.forbid("flash_attention", "auto").forbid("mmap", True)
        history = study(self.open(4), space, energy, 10, START)
        assert len(history) == 11
        assert {t.config["flash_attention"] for t in history.trials[1:]} <= {"on", "off"}
        assert {t.config["mmap"] for t in history.trials[1:]} == {False}

    @pytest.mark.parametrize("action", ["reject", "edit"])
    def test_what_a_person_turned_down_is_not_proposed_again(self, action: str) -> None:
        first = self.open(5).propose(SPACE, START)
        decided = START.add(Decision(action=action, before_trial=1, proposal=first))
        second = self.open(5).propose(SPACE, decided)
        assert second is not None
        assert second.config != first.config

    def test_trials_of_other_spaces_are_survived(self) -> None:
        narrow = SPACE.pin("flash_attention", "on").narrow("parallel", "1..8").narrow("n_ubatch", "64..256")
        strange = [
            {**SPACE.default(), "parallel": 32},
            {**SPACE.default(), "parallel": "many", "flash_attention": True},
            {"threads": 1},
            {**SPACE.default(), "unknown": 1},
            {**narrow.default(), "n_ubatch": 256, "n_batch": 64},
        ]
        history = History()
        for number, (config, joules) in enumerate(itertools.product(strange, (0.5, None))):
            history = history.add(run(number, Proposal(config=config, source="human"), joules))
        grown = study(self.open(6), narrow, energy, 8, history)
        assert len(grown) == len(history) + 8
        assert all(narrow.check(t.config) == t.config for t in grown.trials[len(history) :])

    def test_an_earlier_segment_neither_counts_nor_hinders(self) -> None:
        everything = study(self.open(2), SMALL, lambda _: 1.0, 30, History())
        elsewhere = replace(everything.trials[0], number=len(everything), segment=1)
        history = everything.add(elsewhere)
        proposal = self.open(2).propose(SMALL, history)
        assert proposal is not None
        assert proposal.config != elsewhere.config

    def test_a_needle_in_a_haystack_is_found_at_bounded_cost(self) -> None:
        checks = 0

        def holds(config: Mapping[str, Value]) -> bool:
            nonlocal checks
            checks += 1
            return (
                sum(v != 0 for v in config.values()) <= 1
                and config["e"] + config["f"] in (0, 7)
                and config["a"] + config["b"] + config["c"] + config["d"] == 0
            )

        parameters = tuple(Int(name=n, meaning="A digit.", default=0, low=0, high=9) for n in "abcdef")
        space = SearchSpace(parameters, (Constraint("three of a million", holds),))
        history = study(self.open(8), space, lambda _: 1.0, 3, History())
        assert len({space.key(t.config) for t in history.trials}) == 3
        assert self.open(8).propose(space, history) is None
        assert checks < 400_000

    def test_with_everything_pinned_only_the_default_is_left(self) -> None:
        space = SMALL
        for name, value in (("batch", "2"), ("kind", "b"), ("fast", "true")):
            space = space.pin(name, value)
        first = self.open(0).propose(space, History())
        assert first is not None
        assert first.config == space.default()
        assert self.open(0).propose(space, ran(space, ({}, 1.0))) is None

    def test_it_does_not_mistake_true_for_one(self) -> None:
        space = SearchSpace((Choice(name="level", meaning="Level.", default=1, values=(1, True, 0, False)),))
        history = study(self.open(0), space, lambda _: 1.0, 9, History())
        assert sorted(space.key(t.config) for t in history.trials) == sorted(
            space.key({"level": v}) for v in (0, 1, False, True)
        )
