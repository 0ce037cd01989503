"""A scrambled Sobol sequence: points that cover the space more evenly than random ones.

The next proposal is the first point of the sequence whose configuration is untried. Points that are
illegal or fall into the cell of an earlier one are passed over, so the history alone says how far
the sequence has come.

I. M. Sobol', USSR Comput. Math. Math. Phys. 7 (1967) 86; scrambling: A. B. Owen, J. Complexity 14 (1998) 466.
"""

from __future__ import annotations

from collections.abc import Iterator

from tuner.proposers.random import instead_of
from tuner.proposers.untried import Untried
from tuner.space import SearchSpace
from tuner.trial import History, Proposal

FIRST_BLOCK = 6
BLOCKS = 9
"""2**6 points, doubled eight times: 16,384 points at most, about 0.2 s."""


class Sobol:
    """The first untried point of one scrambled sequence."""

    name = "sobol"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def propose(self, space: SearchSpace, history: History) -> Proposal | None:
        """The next point; a random one, visibly, where the sequence finds nothing that is untried."""
        untried = Untried.of(space, history)
        for number, point in enumerate(_points(len(space.free), self.seed)):
            config = space.at(point)
            if config in untried:
                return Proposal(config=space.check(config), source=self.name, reason=f"point {number} of the sequence")
        return instead_of(self.name, "no point of the sequence is untried and legal", space, history, self.seed)


def _points(dimensions: int, seed: int) -> Iterator[list[float]]:
    if not dimensions:
        yield []
        return
    from scipy.stats import qmc  # type: ignore[import-untyped]  # scipy ships no types; takes 0.75 s to import

    sequence = qmc.Sobol(dimensions, scramble=True, seed=seed)
    for block in range(BLOCKS):
        # The sequence is balanced at powers of two only: 64 points, then as many again as there are.
        yield from sequence.random_base2(FIRST_BLOCK + max(block - 1, 0)).tolist()
