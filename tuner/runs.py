"""What a comparison is made of: problems, and what each method did on them.

A run is one method on one problem with one seed. Runs are facts; what they say about the methods is
computed from them alone (`tuner.convergence`), so that a comparison can be analysed again without
running anything, and so that recorded tables, live workloads and existing studies are analysed alike.

Glossary
    problem    a recorded table or a workload, with its limits
    step       one proposal and what was measured; step 0 is the default, the same for every method
    feasible   measured, and within every limit of the problem; an infeasible step costs a proposal
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tuner.space import Value
from tuner.trial import Unit


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the methods are compared on."""

    name: str
    kind: Literal["table", "workload", "study"] = "table"
    unit: Unit = "token"
    objective: str = ""
    """The column that is minimised, as its source calls it."""
    parameters: tuple[str, ...] = ()
    configurations: int | None = None
    """Rows of the table; None for a live workload."""
    feasible: int | None = None
    """Rows within the limits."""
    best_joules_per_unit: float | None = None
    """Of the best feasible row. No method ever sees it; None where it is not known."""
    default_joules_per_unit: float | None = None
    """Of step 0; None when it is infeasible or differs from run to run."""
    limits: tuple[str, ...] = ()
    noise_sigma: float = 0.0
    """Standard deviation of the replayed ln(joules per unit); 0 for exact replay."""
    anonymised: bool = False
    twin_of: str | None = None
    """The name of the table that an anonymised twin was made from."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """`hardware`, `model`, `engine`, `source`, `licence`, `trust`, `notes`; `machine` and `meter` of live ones."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One proposal of a run."""

    number: int
    """0 is the default; so it is also how many proposals were made by then."""
    config: Mapping[str, Value]
    """What was measured."""
    proposed: Mapping[str, Value] | None = None
    """What was proposed, where a table held no such row and the nearest one was measured."""
    joules_per_unit: float | None = None
    """As the method saw it; None when it failed."""
    true_joules_per_unit: float | None = None
    """The table's own figure, without replayed noise; None where only measurements are known."""
    feasible: bool = False
    error: str | None = None
    """Why it failed or which limit it broke."""
    units_per_second: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one method did on one problem."""

    problem: str
    method: str
    """As tables call it: `rules`, `sobol`, `enhanced`, ..."""
    seed: int
    steps: tuple[Step, ...] = ()
    budget: int = 0
    """Proposals that were allowed, step 0 not counted."""
    prompts: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    llm: str | None = None
    """The model as the provider names it."""
    error: str | None = None
    """Why it ended before its budget: a provider that failed. Steps up to then are kept, nothing is imputed."""
    exhausted: bool = False
    """It ended before its budget because nothing was left to try."""
    seconds: float = 0.0
    started_unix: float = 0.0

    @property
    def complete(self) -> bool:
        return self.error is None
