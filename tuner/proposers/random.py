"""Uniform random search: the yardstick that any other proposer has to beat."""

from __future__ import annotations

from tuner.proposers.untried import Untried, generator
from tuner.space import SearchSpace
from tuner.trial import History, Proposal


class Random:
    """Draws uniformly among the legal configurations that are not spent."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def propose(self, space: SearchSpace, history: History) -> Proposal | None:
        """A draw that depends on the number of trials, so that a resumed study goes on alike."""
        config = Untried.of(space, history).draw(generator(self.seed, history))
        if config is None:
            return None
        return Proposal(config=space.check(config), source=self.name, reason="drawn at random")


def instead_of(name: str, why: str, space: SearchSpace, history: History, seed: int) -> Proposal | None:
    """The random proposal that stands in for `name`, visibly; None when nothing is left."""
    config = Untried.of(space, history).draw(generator(seed, history))
    if config is None:
        return None
    reason = f"{why}; drawn at random instead"
    return Proposal(config=space.check(config), source="random", reason=reason, in_place_of=name)
