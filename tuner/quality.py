"""How good the text of a configuration is: the likelihood of fixed tokens, less that under the default.

The tokens are a fixed text where the model has a tokenizer and weights that were trained. Else the default draws them
itself, at temperature 1: the expected loss of another configuration is then the Kullback-Leibler divergence of its
predictions from the default's, zero at best. They are the same tokens for all, so the difference is no sampling noise.

Runners say how their engine brings about the likelihood of given tokens; what it is compared with is the same for
all and stands here (docs/design/limits.md).

Glossary
    nats        -ln of the probability that the model gave to the token that comes next
    passage     rows of tokens of one length; the first ones of each row are given, the others are judged
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENS, ROWS, LEAST_TEXT_TOKENS = 96, 4, 16

MOST_NATS = 1000.0
"""What no token costs. Servers write a probability of 0 as a number: vLLM as 9999 nats, llama.cpp as 3.4e38."""

TEXT = """\
A kettle of water takes about as much energy to boil as a bright lamp uses in an evening. The water does not care how
the energy arrives: a small flame for an hour and a large one for five minutes end in the same cup of tea, except that
the small flame also heats the kitchen all the while. Machines that compute are much the same. A processor that works
slowly draws less power at each moment, but it keeps the memory, the fans and the power supply awake for longer, and
in the end it may have used more than a fast one that finished early and went to sleep.

Whoever wants to know which is better has to measure. The meter is read before and after, the work is counted, and one
number is divided by the other. This sounds simple, and most mistakes are simple too: the work was not the same, the
machine was still cold, somebody else was using it, or the first of two readings was taken before the model had been
loaded. A careful person writes down what was done, does it again on another day, and is not surprised when the second
number differs a little from the first. The question is then whether the difference between two settings is larger
than the difference between two days.

Sometimes it is not. Then the honest answer is that nothing was found, and the setting that everybody uses is as good
as any other. That answer has a value of its own, because it saves the next person the search. More often a few
settings matter a great deal and the rest hardly at all. The number of requests that are handled together is usually
one of the few: reading the weights of a large model from memory costs the same for one reader as for eight, and eight
who share the cost pay little each. Beyond some point the arithmetic takes over, and there is nothing left to share.
"""
"""What models with a tokenizer are judged by: ordinary prose, about 400 tokens, written for this file."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """The tokens whose likelihood is taken."""

    source: str
    """Where they are from."""
    rows: Sequence[Sequence[int]]
    context: int
    """Tokens at the beginning of each row that are given."""

    @property
    def openings(self) -> list[list[int]]:
        """What is given."""
        return [list(row[: self.context]) for row in self.rows]

    @property
    def judged(self) -> list[list[int]]:
        """What is judged."""
        return [list(row[self.context :]) for row in self.rows]


def of_text(ids: Sequence[int], most: int = TOKENS) -> Passage | None:
    """The fixed text, given as the model's own tokens, in rows of at most `most`; None where it is too short."""
    if len(ids) < LEAST_TEXT_TOKENS:
        return None
    length = min(TOKENS, most, len(ids))
    rows = [list(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)][:ROWS]
    return Passage(source="a fixed text", rows=rows, context=max(1, length // 4))


def drawn(
    tokens: Sequence[int],
    seed: int,
    go_on: Callable[[list[list[int]], int], Sequence[Sequence[int]]],
    most: int = TOKENS,
) -> Passage:
    """What the running configuration, which is the default, says itself.

    Args:
        tokens: ordinary ones, to draw openings from.
        seed: of the openings.
        go_on: draws so many tokens after each opening, at temperature 1 from the whole vocabulary.
        most: tokens of a row.
    """
    length = min(TOKENS, most)
    context = max(1, length // 4)
    draw = random.Random(seed)  # noqa: S311 - a reproducible text, no secret
    openings = [draw.choices(tokens, k=context) for _ in range(ROWS)]
    rows = [[*opening, *more] for opening, more in zip(openings, go_on(openings, length - context), strict=True)]
    return Passage(source="sampled from the default configuration", rows=rows, context=context)


def judge(
    reference: Path, choose: Callable[[], Passage], nats: Callable[[Passage], Sequence[float]]
) -> dict[str, float]:
    """`Judged.quality` of an engine that makes text.

    Args:
        reference: what the default left; written by the first call, which is the default's.
        choose: the passage, asked for once.
        nats: of each judged token under the running configuration, in any order.

    Raises:
        RuntimeError: `reference` is damaged, or the likelihood is no number.
    """
    if reference.exists():
        passage, theirs = _kept(reference)
        nll = _mean(passage, nats)
        return {"nll_nats_per_token": nll, "quality_loss": nll - theirs}
    passage = choose()
    nll = _mean(passage, nats)
    record = {
        "source": passage.source,
        "context": passage.context,
        "nll_nats_per_token": nll,
        "rows": [list(row) for row in passage.rows],
    }
    part = reference.with_name(f"{reference.name}.part")
    part.write_text(json.dumps(record), encoding="utf-8")
    part.replace(reference)
    return {"nll_nats_per_token": nll, "quality_loss": 0.0}


def _kept(reference: Path) -> tuple[Passage, float]:
    try:
        kept: dict[str, Any] = json.loads(reference.read_text(encoding="utf-8"))
        rows = [[int(token) for token in row] for row in kept["rows"]]
        passage = Passage(source=str(kept.get("source")), rows=rows, context=int(kept["context"]))
        return passage, float(kept["nll_nats_per_token"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RuntimeError(f"the reference {reference.name} cannot be read ({error})") from error


def _mean(passage: Passage, nats: Callable[[Passage], Sequence[float]]) -> float:
    found = nats(passage)
    wanted = sum(map(len, passage.judged))
    if len(found) != wanted or not wanted:
        raise RuntimeError(f"the engine judged {len(found)} tokens of the reference instead of {wanted}")
    # Written so that a NaN is broken too.
    if not all(abs(n) < MOST_NATS for n in found):
        raise RuntimeError("the likelihood of the reference is no finite number: the output is broken")
    return math.fsum(found) / wanted
