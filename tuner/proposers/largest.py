"""The rule of thumb of the field: the largest batch that meets the limit.

Sequences that are computed together share each read of the weights, so energy per unit falls with the
batch until a limit on latency or memory is broken. A method that does not beat this rule has found
nothing that an operator does not know. The rule, step by step, read off the history each time:

1. All else at its default, the largest batch; while a limit is broken, the next smaller one.
2. From the best trial, the next larger batch: what was changed since may have made room for it.
3. From the best trial, one other parameter to its next value, in the order of the space, the batch kept.
4. The same with the next smaller batch, and so on: a change that breaks the limit may pay with less batch.

After that, and in a space without a batch, a random configuration stands in, visibly. The seed is used
there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tuner.proposers.random import instead_of
from tuner.proposers.untried import Untried, inside
from tuner.space import Choice, Config, Int, Parameter, SearchSpace, Value, show
from tuner.trial import History, Proposal

BATCHES = (
    "max_num_seqs",
    "max_running_requests",
    "max_batch_size",
    "batch_size",
    "num_images_per_prompt",
    "parallel",
    "concurrency",
    "batch",
)
"""What engines call the number of sequences (or images) computed together; the first that is free is the batch."""


def batch_of(space: SearchSpace, names: Sequence[str] = BATCHES) -> Parameter | None:
    """The parameter that is the batch; None where none of `names` is free and a number."""
    for name in names:
        for parameter in space.free:
            if parameter.name == name and (isinstance(parameter, Int) or _is_scale(parameter)):
                return parameter
    return None


def _is_scale(parameter: Parameter) -> bool:
    return isinstance(parameter, Choice) and all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in parameter.values
    )


class Largest:
    """The largest batch that meets the limit, then one change at a time from there."""

    name = "largest"

    def __init__(self, seed: int, batch: str | None = None) -> None:
        """Only the last resort, a random configuration, depends on `seed`.

        `batch` names the parameter where its name is none of `BATCHES`.
        """
        self.seed = seed
        self._batches = (batch,) if batch else BATCHES

    def propose(self, space: SearchSpace, history: History) -> Proposal | None:
        """The first step of the rule that leads to an untried configuration."""
        batch = batch_of(space, self._batches)
        if batch is None:
            return instead_of(self.name, "no parameter is a batch", space, history, self.seed)
        untried = Untried.of(space, history)
        for config, why in _steps(space, batch, history):
            if config in untried:
                return Proposal(config=space.check(config), source=self.name, reason=why)
        return instead_of(self.name, "the rule has nothing left to say", space, history, self.seed)


def _steps(space: SearchSpace, batch: Parameter, history: History) -> Iterator[tuple[Config, str]]:
    """Configurations in the order of the rule, also spent and illegal ones."""
    sizes = _sizes(batch)
    measured = [
        (joules, trial.number, config)
        for trial in history.measured
        if (joules := trial.joules_per_unit) is not None and (config := inside(space, trial.config)) is not None
    ]
    meets = {space.key(config) for _, _, config in measured}
    for size in sizes:
        config = {**space.default(), batch.name: size}
        if space.key(config) in meets:
            break
        yield config, f"the largest {batch.name} that is left, {show(size)}, with all else at its default"
    if not measured:
        return
    _, number, best = min(measured, key=lambda m: m[:2])
    larger = [size for size in sizes if size > best[batch.name]]  # type: ignore[operator]  # numbers, by `batch_of`
    if larger:
        yield {**best, batch.name: larger[-1]}, f"trial {number} with the next larger {batch.name}"
    for size in (size for size in sizes if size <= best[batch.name]):  # type: ignore[operator]
        smaller = "" if size == best[batch.name] else f" and {batch.name} {show(size)}"
        for parameter in space.free:
            if parameter.name == batch.name:
                continue
            for value in parameter.neighbours(best[parameter.name]):
                changed = {**best, parameter.name: value, batch.name: size}
                yield changed, f"trial {number} with {parameter.name} {show(value)}{smaller}"


MOST_SIZES = 64
"""A range of integers is stepped down by halves: from 4096 in ones would take all day."""


def _sizes(batch: Parameter) -> Sequence[Value]:
    """The batch's values to step through, the largest first."""
    if isinstance(batch, Choice):
        return sorted(batch.values, key=float, reverse=True)
    assert isinstance(batch, Int)
    if batch.size <= MOST_SIZES:
        return range(batch.high, batch.low - 1, -1)
    halves = [batch.high >> step for step in range(batch.high.bit_length()) if batch.high >> step > batch.low]
    return [*halves, batch.low]
