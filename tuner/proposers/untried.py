"""What may still be proposed, and how to find it when a proposer's own way leads nowhere.

Glossary
    spent       run in this segment, with whatever outcome, or turned down by the person
    untried     legal and not spent

A configuration from elsewhere (a narrowed space, another machine, a person's own edit) is spent only
if it is one of this space: `inside` decides, and everything else in a history is passed over.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product

from tuner.space import Choice, Config, Int, Parameter, Refused, SearchSpace, Value
from tuner.trial import History

DRAWS = 1_000
"""Uniform draws before giving up on luck: one legal configuration in 200 is missed once in 150 times."""

ENUMERABLE = 2**16
"""Spaces up to this size are searched completely; it takes about half a second."""

STEPS = 20_000
"""Configurations looked at on a walk through a space that is too large to search completely."""


def generator(seed: int, history: History) -> random.Random:
    """Random numbers that depend on the seed and on how many trials there are, and on nothing else."""
    # A text as seed is hashed by SHA-512: neighbouring seeds give unrelated sequences.
    return random.Random(f"{seed}/{len(history)}")  # noqa: S311  a search keeps no secrets


def inside(space: SearchSpace, config: Mapping[str, Value]) -> Config | None:
    """`config` in the types of `space`, or None when it is none of its; constraints are not applied."""
    try:
        return replace(space, constraints=()).check(config)
    except Refused:
        return None


@dataclass(frozen=True)
class Untried:
    """The legal configurations of `space` that are not spent: `config in untried`."""

    space: SearchSpace
    spent: frozenset[str]
    """Keys of the spent configurations."""
    known: tuple[Config, ...]
    """Where a walk starts: the default and what was run. They need not be legal any more."""

    @classmethod
    def of(cls, space: SearchSpace, history: History) -> Untried:
        """What is left after `history`."""
        run = [t.config for t in history.current]
        # An edit spends the original too: the person wanted another one.
        declined = [d.proposal.config for d in history.decisions if d.action in {"reject", "edit"} and d.proposal]
        ours = [own for config in (*run, *declined) if (own := inside(space, config)) is not None]
        return cls(space, frozenset(map(space.key, ours)), (space.default(), *ours))

    def __contains__(self, config: Mapping[str, Value]) -> bool:
        return self.space.key(config) not in self.spent and not self.space.broken(config)

    def draw(self, rng: random.Random) -> Config | None:
        """One of them at random, or None.

        Uniform while luck or a complete search finds one; where legal configurations are rare in a
        large space, one that is close to a known configuration. None is the whole truth in spaces of
        up to `ENUMERABLE` configurations, and the end of a bounded search in larger ones.
        """
        dimensions = len(self.space.free)
        draws = (self.space.at([rng.random() for _ in range(dimensions)]) for _ in range(DRAWS))
        if (found := next((c for c in draws if c in self), None)) is not None:
            return found
        if self.space.size <= ENUMERABLE:
            left = [c for c in _every(self.space) if c in self]
            return rng.choice(left) if left else None
        return next((c for c in islice(self._walk(rng), STEPS) if c in self), None)

    def _walk(self, rng: random.Random) -> Iterator[Config]:
        """Single changes of the known configurations, then two or three changes at once."""
        free = self.space.free
        for base in rng.sample(self.known, len(self.known)):
            around = [{**base, p.name: v} for p in free for v in _others(p, base[p.name], rng)]
            rng.shuffle(around)
            yield from around
        while len(free) > 1:
            changed = rng.sample(free, rng.randint(2, min(3, len(free))))
            yield {**rng.choice(self.known), **{p.name: p.at(rng.random()) for p in changed}}


def _every(space: SearchSpace) -> Iterator[Config]:
    for values in product(*map(_values, space.parameters)):
        yield dict(zip(space.names, values, strict=True))


def _values(parameter: Parameter) -> Sequence[Value]:
    match parameter:
        case Choice():
            return parameter.values
        case Int():
            return range(parameter.low, parameter.high + 1)
        case _:
            return (parameter.default,)  # the one value of a continuous range in a finite space


def _others(parameter: Parameter, value: Value, rng: random.Random) -> list[Value]:
    """Other values of a parameter: all of a few, some of many."""
    if parameter.size <= 32:
        return [v for v in _values(parameter) if v != value]
    return [*parameter.neighbours(value), *(parameter.at(rng.random()) for _ in range(16))]
