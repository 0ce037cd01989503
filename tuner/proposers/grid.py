"""Grid search: full grids of growing resolution, each in an order drawn from the seed.

The first grid has two levels of each parameter, the ends of its range; the next ones 3, 5, 9, 17 and
33, evenly spaced where the range is (in ratios on a logarithmic one). A choice without an order has all
its values in every grid, for it has no ends. So the corners come first, as in a factorial design, and
what a finer grid repeats is passed over. Going through a grid row by row would leave the parameter that
is listed first at one value for the whole budget; drawn orders are what Optuna's `GridSampler` takes too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from tuner.proposers.random import instead_of
from tuner.proposers.untried import STEPS, Untried, generator
from tuner.space import Choice, Config, Parameter, SearchSpace, Value
from tuner.trial import History, Proposal

LEVELS = (2, 3, 5, 9, 17, 33)


class Grid:
    """The first untried point of the coarsest grid that has one."""

    name = "grid"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def propose(self, space: SearchSpace, history: History) -> Proposal | None:
        """The next point; a random one, visibly, where the grids hold nothing that is untried."""
        untried = Untried.of(space, history)
        looked_at = 0
        for levels in LEVELS:
            for config in _points(space, levels, self.seed):
                if config in untried:
                    reason = f"of the grid with {levels} levels of each parameter"
                    return Proposal(config=space.check(config), source=self.name, reason=reason)
                looked_at += 1
                if looked_at == STEPS:
                    return instead_of(self.name, "the next point of the grid is far away", space, history, self.seed)
        return instead_of(self.name, "nothing on the grids is untried and legal", space, history, self.seed)


def _points(space: SearchSpace, levels: int, seed: int) -> Iterator[Config]:
    """Every point of one grid once, in an order that the seed draws.

    A walk by a fixed stride that shares no factor with the size visits every index once and needs no
    list of them: a grid over ten parameters has more points than memory.
    """
    axes = [_levels(parameter, levels) for parameter in space.parameters]
    size = math.prod(map(len, axes))
    rng = generator(seed, History())
    index = rng.randrange(size)
    stride = next(s for s in iter(lambda: rng.randint(1, size), None) if math.gcd(s, size) == 1)
    for _ in range(size):
        config, rest = {}, index
        for name, values in zip(space.names, axes, strict=True):
            rest, place = divmod(rest, len(values))
            config[name] = values[place]
        yield config
        index = (index + stride) % size


def _levels(parameter: Parameter, levels: int) -> list[Value]:
    """So many values of a parameter, its ends among them; all of them where it has no more."""
    if parameter.size == 1:
        return [parameter.default]
    if isinstance(parameter, Choice) and not parameter.ordered:
        return list(parameter.values)
    inside = math.nextafter(1.0, 0.0)
    return list(dict.fromkeys(parameter.at(min(step / (levels - 1), inside)) for step in range(levels)))
