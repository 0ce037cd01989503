"""How many proposals a method needs, how sure that is, and which methods can be told apart.

Everything is computed from runs alone (`tuner.runs`), in any order, and nothing is imputed: a run that did
not get there is censored at its budget, one that ended early is censored where it ended and listed.
What is assumed and what the figures cannot show is part of the result (`ASSUMPTIONS`); docs/statistics.md
explains the choices.

Glossary
    target      an energy per unit to get to: within a share of the best, a ratio of the default, absolute
    incumbent   the feasible step that the method itself would pick so far, by what it saw
    converged   the incumbent's true energy is at or below the target; counted in proposals, 0 is the default
    censored    not converged when observation ended: all that is known is that it takes longer
    regret      true energy of the incumbent over the best feasible of the problem, minus 1
    horizon     proposals up to which runs are compared: the least budget among them
    cell        one method on one problem, or over all of them, for one target
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import combinations, product
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from tuner.intervals import LEAST_VALUES, student_t
from tuner.runs import Problem, Run, Step
from tuner.space import Refused

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

CONFIDENCE = 0.95
SIGNIFICANT = 0.05
MOST_CENSORED = 0.2
"""Above this share of censored runs the signed ranks are mostly ties, and the log-rank test takes over."""

SHOWN = (1, 3, 5, 10, 20)
"""Proposals after which the tables show the regret."""

BOOTSTRAP = 2000

MOST_EXACT = 200
"""Differences up to which all sign flips are counted; so many take milliseconds."""

LEAST_PROBLEMS = LEAST_VALUES
"""With fewer no test over problems reaches 5 %; then seeds are resampled, and only these problems are spoken of."""

ASSUMPTIONS = (
    (
        "A run counts as converged at the first proposal at which the setting it would pick by what it saw truly"
        " meets the target; proposal 0, the default, is the same for every method."
    ),
    (
        "Runs that did not get there are censored, not dropped: means are restricted at the budget, the area"
        " under the Kaplan-Meier curve, so they say nothing about what a larger budget would bring."
    ),
    (
        "A run that ended early (a provider that failed) is censored where it ended, which assumes that the"
        " failure had nothing to do with its progress; it is left out of paired differences, and listed."
    ),
    (
        "Over all problems the problem is the unit: each counts the same, and intervals resample problems. They"
        " hold for problems drawn like these; tables of one source or one model family are alike, so that the"
        " intervals are rather too narrow."
    ),
    (
        "On one problem seeds are paired and resampled: that tells chance from method on this problem and says"
        " nothing about others."
    ),
    (
        "A method that does the same for every seed (rules, grid without noise) gives one result, not many:"
        " repeating it adds no evidence. Two such methods are not tested on a problem, only over problems."
    ),
    (
        "The signed-rank test assumes differences that scatter symmetrically when there is no difference; the"
        " log-rank test, which takes over where more than 20 % are censored, ignores the pairing and sees crossing"
        " curves badly."
    ),
    (
        "p-values are corrected by Holm over all comparisons of the same table: those over all problems are one"
        " family, those per problem another, tables against their twins a third, each over all targets."
    ),
    "“Cannot be told apart” is not “equal”: the interval says how large a difference may still be.",
)


# --- targets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What a run has to get to."""

    kind: Literal["within", "ratio", "absolute"]
    """`within`: (1 + value) times the best feasible; `ratio`: value times the default; `absolute`: joules per unit."""
    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and (self.value > 0 or (self.kind == "within" and self.value == 0))):
            raise Refused(f"A target must be a positive number; got {self.value} for {self.kind!r}.")

    @property
    def name(self) -> str:
        if self.kind == "within":
            return f"within {100 * self.value:g} % of the best"
        if self.kind == "ratio":
            return f"at most {self.value:g} times the default"
        return f"at most {self.value:g} J per unit"

    def threshold(self, best: float | None, default: float | None) -> float | None:
        """Joules per unit to get to; None where that which it is relative to is not known."""
        if self.kind == "absolute":
            return self.value
        if self.kind == "within":
            return None if best is None else best * (1 + self.value)
        return None if default is None else default * self.value


TARGETS = (Target("within", 0.05), Target("within", 0.10))


def check_targets(problems: Iterable[Problem], targets: Iterable[Target]) -> None:
    """Refuse a target that no configuration of a problem reaches, before anything is run."""
    targets = tuple(targets)
    for problem in problems:
        for target in targets:
            best, default = problem.best_joules_per_unit, problem.default_joules_per_unit
            threshold = target.threshold(best, default)
            if target.kind == "ratio" and default is None and problem.kind == "table":
                raise Refused(
                    f"{problem.name}: the default breaks a limit, so nothing can be a ratio of it;"
                    " use a target within a share of the best."
                )
            if threshold is not None and best is not None and not _reaches(best, threshold):
                raise Refused(
                    f"{problem.name}: nobody can get to {threshold:.4g} J/{problem.unit} ({target.name}):"
                    f" its best feasible configuration uses {best:.4g} J/{problem.unit}."
                )


def _reaches(joules: float, threshold: float) -> bool:
    # A best that is read back from text may differ from the row's own figure in its last digit.
    return joules <= threshold * (1 + 1e-12)


# --- one run ---------------------------------------------------------------------------------


def incumbents(run: Run) -> tuple[int | None, ...]:
    """For each step, the index of the best feasible step so far by what the method saw; None while there is none.

    The first of equals stays. A step without a positive, finite figure is no candidate.
    """
    found: list[int | None] = []
    best: int | None = None
    least = math.inf
    for index, step in enumerate(run.steps):
        seen = _worth(step.joules_per_unit)
        if step.feasible and seen is not None and seen < least:
            best, least = index, seen
        found.append(best)
    return tuple(found)


def _worth(joules: float | None) -> float | None:
    return joules if joules is not None and math.isfinite(joules) and joules > 0 else None


def _true(step: Step) -> float:
    """The table's own figure; where there is none, what was measured."""
    return _worth(step.true_joules_per_unit) or step.joules_per_unit or math.inf


def proposals_made(run: Run) -> int:
    """Proposals after the default."""
    return max((step.number for step in run.steps), default=0)


def allowed(run: Run) -> int:
    """Proposals the run was allowed; a study that states no budget was allowed what it made."""
    return run.budget or proposals_made(run)


def observed(run: Run) -> int:
    """Proposals up to which the run is known.

    A run with nothing left to try keeps its incumbent, so it is known up to its budget; one that was cut
    short is known up to its last step.
    """
    if run.exhausted and run.complete:
        return allowed(run)
    return min(proposals_made(run), allowed(run))


def incumbent_energies(run: Run) -> tuple[float | None, ...]:
    """True joules per unit of the incumbent after 0, 1, 2, ... proposals, as far as the run is known."""
    energies: list[float | None] = [None] * (observed(run) + 1)
    for step, index in zip(run.steps, incumbents(run), strict=True):
        if index is not None and step.number < len(energies):
            energies[step.number] = _true(run.steps[index])
    # A number without a step, and all after the last step, keep the incumbent.
    for n in range(1, len(energies)):
        if energies[n] is None:
            energies[n] = energies[n - 1]
    return tuple(energies)


def regret(run: Run, problem: Problem, n: int) -> float | None:
    """Regret after `n` proposals; None while nothing feasible is known, or where the run or the best is not known."""
    energies = incumbent_energies(run)
    best = problem.best_joules_per_unit
    if best is None or n >= len(energies):
        return None
    energy = energies[n]
    return None if energy is None else energy / best - 1


def converged_at(run: Run, problem: Problem, target: Target) -> int | None:
    """Proposals until the incumbent's true energy is at or below the target; None where the run is censored."""
    default = _default_of(run, problem)
    threshold = target.threshold(problem.best_joules_per_unit, default)
    return None if threshold is None else _first(incumbent_energies(run), threshold)


def _default_of(run: Run, problem: Problem) -> float | None:
    """The problem's default, or the run's own where each run measured it itself."""
    if problem.default_joules_per_unit is not None:
        return problem.default_joules_per_unit
    first = next((s for s in run.steps if s.number == 0 and s.feasible and _worth(s.joules_per_unit)), None)
    return None if first is None else _true(first)


def _first(energies: Iterable[float | None], threshold: float) -> int | None:
    return next((n for n, e in enumerate(energies) if e is not None and _reaches(e, threshold)), None)


# --- what the analysis holds -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Regret:
    """Regret over runs after so many proposals; a run with nothing feasible yet ranks worst."""

    proposals: int
    median: float | None
    """None, as the quartiles, where so many runs have nothing feasible yet, or the best is not known."""
    low: float | None
    """Lower quartile."""
    high: float | None
    """Upper quartile."""
    mean: float | None
    """Over the runs that have something feasible."""
    share_without: float
    """Of the runs known so far, those with nothing feasible yet."""
    runs: int
    """Runs known up to here."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method on one problem, or over all of them, for one target. Intervals are two-sided, 95 %."""

    problem: str | None
    """None: over all problems."""
    method: str
    target: Target
    problems: int
    """1, or how many problems it is over."""
    runs: int
    incomplete: int
    """Runs that ended early without getting there: censored where they ended."""
    converged: int
    horizon: int
    """Proposals up to which this row looks."""
    share: float
    """Converged by then, by Kaplan-Meier; over all problems, the mean of theirs."""
    share_low: float | None
    """None, like every interval's end, where runs (problems) are too few, or all runs are the same."""
    share_high: float | None
    mean: float
    """Restricted mean number of proposals: no run counts more than `horizon`."""
    mean_low: float | None
    mean_high: float | None
    median: int | None
    """Proposals by which half have converged; None where half never do."""
    curve: tuple[float, ...]
    """Share converged after 0, 1, ... `horizon` proposals."""
    curve_low: tuple[float, ...] | None
    """Pointwise."""
    curve_high: tuple[float, ...] | None
    regrets: tuple[Regret, ...]
    """After 0, 1, ... `horizon` proposals."""
    final: float | None
    """Median true joules per unit of the last incumbent; None over all problems, whose units differ."""
    final_low: float | None
    """Lower quartile."""
    final_high: float | None
    """Upper quartile."""
    failed_per_run: float
    """Proposals that gave no figure."""
    infeasible_per_run: float
    """Proposals that were measured and broke a limit."""
    prompts_per_run: float
    input_tokens_per_run: float | None
    """None where no run reports any."""
    output_tokens_per_run: float | None
    same_for_every_seed: bool
    """The method did exactly the same in two or more runs: one result, not many."""
    llm: str | None = None

    def regret_at(self, proposals: int) -> Regret | None:
        return self.regrets[proposals] if proposals < len(self.regrets) else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two methods, paired by seed on one problem, or paired by problem over all."""

    problem: str | None
    """None: over all problems."""
    target: Target
    method: str
    other: str
    unit: Literal["pairs", "problems"]
    """What is counted, resampled and tested."""
    problems: int
    pairs: int
    """How many of `unit`."""
    missing: int
    """Pairs of runs left out because one ended early, not having got there."""
    difference: float | None
    """Mean of `method`'s proposals to convergence minus `other`'s, restricted; negative: `method` needs fewer."""
    low: float | None
    high: float | None
    p: float | None
    """Two-sided; None where nothing is tested, for the reason in `note`."""
    p_holm: float | None
    test: Literal["signed-rank", "log-rank", ""]
    wins: int
    """Of `pairs`, those in which `method` needs fewer."""
    ties: int
    losses: int
    a12: float | None
    """Vargha and Delaney's: the probability that a run of `method` needs fewer than one of `other`, ties half."""
    censored: float
    """Share of the runs that did not get there."""
    horizon: int
    alone: tuple[int, int] | None = None
    """Over all problems: on how many of them `method` is better, and worse, told apart on that problem by itself."""
    note: str = ""

    @property
    def distinct(self) -> bool:
        """Whether test and interval both tell the methods apart."""
        if self.p_holm is None or self.low is None or self.high is None:
            return False
        return self.p_holm < SIGNIFICANT and (self.low > 0 or self.high < 0)

    @property
    def sentence(self) -> str:
        """As a person would say it, the better method first."""
        if self.difference is None:
            return f"{self.method} and {self.other} cannot be compared: {self.note}"
        if self.difference > 0:
            return self._turned.sentence
        said = []
        if self.low is not None and self.high is not None:
            # `-0.0` where an end is 0.
            said.append(f"95 % CI {0.0 - self.high:.1f} to {0.0 - self.low:.1f}")
        said.append("not tested" if self.p_holm is None else f"{p_text(self.p_holm)} after Holm")
        worse = "" if self.distinct else f", worse in {self.losses}"
        said.append(f"better in {self.wins}{worse} of {_count(self.pairs, self.unit)}")
        if self.alone:
            said.append(f"taken one by one, shown better on {self.alone[0]} and worse on {self.alone[1]}")
        fewer = f"{0.0 - self.difference:.1f} proposals"
        beside = ", ".join(said) + (f"; {self.note}" if self.note else "")
        if not self.distinct and self.p_holm is None and fewer == "0.0 proposals":
            return f"{self.method} and {self.other} need the same number of proposals ({beside})"
        if self.distinct or self.p_holm is None:
            return f"{self.method} needs {fewer} fewer than {self.other} ({beside})"
        return f"{self.method} and {self.other} cannot be told apart (difference {fewer}, {beside})"

    @property
    def _turned(self) -> Comparison:
        """The same, said of the other method."""
        return replace(
            self,
            method=self.other,
            other=self.method,
            difference=None if self.difference is None else -self.difference,
            low=None if self.high is None else -self.high,
            high=None if self.low is None else -self.low,
            wins=self.losses,
            losses=self.wins,
            a12=None if self.a12 is None else 1 - self.a12,
            alone=None if self.alone is None else self.alone[::-1],
        )


@dataclass(frozen=True, kw_only=True)
class Incomplete:
    """What is missing; nothing stands in for it."""

    problem: str
    method: str
    seed: int | None
    """None: there is no run at all."""
    proposals: int
    budget: int
    reason: str

    @property
    def sentence(self) -> str:
        if self.seed is None:
            return f"{self.method} on {self.problem}: no run."
        return (
            f"{self.method} on {self.problem}, seed {self.seed}: ended after {self.proposals} of"
            f" {_count(self.budget, 'proposals')}: {self.reason}."
        )


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What the runs show."""

    targets: tuple[Target, ...]
    problems: tuple[str, ...]
    methods: tuple[str, ...]
    cells: tuple[Cell, ...]
    """Problem x method x target, in the order of the problems and methods given."""
    overall: tuple[Cell, ...]
    """Method x target; empty where there is one problem."""
    comparisons: tuple[Comparison, ...]
    """Of every two methods: first those over all problems, then per problem."""
    recall: tuple[Comparison, ...]
    """Of each chat model's method on the tables with itself on their twins, over all problems that have one."""
    incomplete: tuple[Incomplete, ...]
    notes: tuple[str, ...]
    """What holds for these runs in particular."""
    assumptions: tuple[str, ...] = ASSUMPTIONS

    def cell(self, problem: str | None, method: str, target: Target) -> Cell | None:
        """The cell of a method on a problem (None: over all); None where it has no run."""
        return self._index.get((problem, method, target))

    @cached_property
    def _index(self) -> dict[tuple[str | None, str, Target], Cell]:
        return {(c.problem, c.method, c.target): c for c in (*self.cells, *self.overall)}

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the comparisons say, those over all problems where there are several; then what is missing."""
        headline = [c for c in self.comparisons if c.problem is None] or list(self.comparisons)
        said = [f"{c.target.name[0].upper()}{c.target.name[1:]}: {c.sentence}." for c in (*headline, *self.recall)]
        return (*said, *(i.sentence for i in self.incomplete), *self.notes)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row a cell, for CSV and JSON; None is a missing value. `problem` is `all` over all problems."""
        return [_cell_row(cell) for cell in (*self.cells, *self.overall)]

    def comparison_rows(self) -> list[dict[str, Any]]:
        """One row a comparison, with its sentence."""
        return [
            {
                "problem": c.problem or "all",
                "target": c.target.name,
                "method": c.method,
                "other": c.other,
                "unit": c.unit,
                "pairs": c.pairs,
                "pairs_missing": c.missing,
                "difference": c.difference,
                "difference_low": c.low,
                "difference_high": c.high,
                "p": c.p,
                "p_holm": c.p_holm,
                "test": c.test or None,
                "wins": c.wins,
                "ties": c.ties,
                "losses": c.losses,
                "a12": c.a12,
                "share_censored": c.censored,
                "horizon": c.horizon,
                "told_apart": c.distinct,
                "problems_better": c.alone[0] if c.alone else None,
                "problems_worse": c.alone[1] if c.alone else None,
                "note": c.note or None,
                "sentence": c.sentence,
            }
            for c in (*self.comparisons, *self.recall)
        ]


def _cell_row(cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {
        "problem": cell.problem or "all",
        "method": cell.method,
        "target": cell.target.name,
        "problems": cell.problems,
        "runs": cell.runs,
        "incomplete": cell.incomplete,
        "converged": cell.converged,
        "horizon": cell.horizon,
        "share_converged": cell.share,
        "share_low": cell.share_low,
        "share_high": cell.share_high,
        "mean_proposals": cell.mean,
        "mean_low": cell.mean_low,
        "mean_high": cell.mean_high,
        "median_proposals": cell.median,
    }
    for n in SHOWN:
        found = cell.regret_at(n)
        row |= {
            f"regret_{n}_median": found and found.median,
            f"regret_{n}_low": found and found.low,
            f"regret_{n}_high": found and found.high,
            f"regret_{n}_mean": found and found.mean,
            f"regret_{n}_share_without": found and found.share_without,
        }
    return row | {
        "final_joules_per_unit": cell.final,
        "final_low": cell.final_low,
        "final_high": cell.final_high,
        "failed_per_run": cell.failed_per_run,
        "infeasible_per_run": cell.infeasible_per_run,
        "prompts_per_run": cell.prompts_per_run,
        "input_tokens_per_run": cell.input_tokens_per_run,
        "output_tokens_per_run": cell.output_tokens_per_run,
        "same_for_every_seed": cell.same_for_every_seed,
        "llm": cell.llm,
    }


def p_text(p: float) -> str:
    """`p = 0.003`; a smaller one than 0.001 is not told apart from others like it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _count(count: int, unit: str) -> str:
    return f"{count} {unit if count != 1 else unit.removesuffix('s')}"


# --- survival --------------------------------------------------------------------------------


def kaplan_meier(times: Sequence[int], events: Sequence[bool], horizon: int) -> tuple[float, ...]:
    """Share converged after 0, 1, ... `horizon` proposals.

    E. L. Kaplan and P. Meier, Nonparametric Estimation from Incomplete Observations, JASA 53 (1958), 457-481:
    S(n) is the product over t <= n of 1 - d_t / r_t, with d_t runs that converge at t of the r_t that were
    neither converged nor censored before; a run censored at t was seen not to converge at t. After the last
    observation the curve stays where it is.
    """
    import numpy as np

    survival = _survival(times, events, np.ones((1, len(times))), horizon)[0]
    return tuple(float(1 - s) for s in survival)


def _survival(times: Sequence[int], events: Sequence[bool], weights: Array, horizon: int) -> Array:
    """S after 0, 1, ... `horizon` proposals (columns) for each row of weights of the runs."""
    import numpy as np

    when, event = np.asarray(times, dtype=int), np.asarray(events, dtype=bool)
    grid = np.arange(horizon + 1)
    converged = weights @ ((when[:, None] == grid) & event[:, None]).astype(float)
    at_risk = weights @ (when[:, None] >= grid).astype(float)
    hazard = np.divide(converged, at_risk, out=np.zeros_like(converged), where=at_risk > 0)
    survival: Array = np.cumprod(1 - hazard, axis=1)
    return survival


def share_band(
    times: Sequence[int], events: Sequence[bool], horizon: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pointwise 95 % interval of the Kaplan-Meier curve of the share converged.

    Wilson's score interval at the effective number of runs, S (1 - S) / Var(S) with Greenwood's variance: K. J.
    Rothman, Estimation of Confidence Limits for the Cumulative Probability of Survival in Life Table Analysis,
    J. Chronic Dis. 31 (1978), 557-560. With nothing censored before `horizon` it is Wilson's interval of a
    proportion, which has a width where all or none converged.
    """
    z2 = 1.959964**2
    low, high = [], []
    survival, greenwood = 1.0, 0.0
    at_risk_before = len(times)
    for n in range(horizon + 1):
        at_risk = sum(t >= n for t in times)
        events_here = sum(t == n and e for t, e in zip(times, events, strict=True))
        if at_risk:
            at_risk_before = at_risk
            survival *= 1 - events_here / at_risk
            if at_risk > events_here:
                greenwood += events_here / (at_risk * (at_risk - events_here))
        # Before the first event, and once all have converged, the variance is 0; runs still seen count instead.
        effective = (
            (1 - survival) / (survival * greenwood)
            if greenwood and survival
            else float(len(times) if not survival else at_risk_before)
        )
        share = 1 - survival
        centre = (share + z2 / (2 * effective)) / (1 + z2 / effective)
        half = math.sqrt(z2 * (share * survival / effective + z2 / (4 * effective**2))) / (1 + z2 / effective)
        low.append(max(0.0, centre - half))
        high.append(min(1.0, centre + half))
    return tuple(low), tuple(high)


def restricted_mean(times: Sequence[int], events: Sequence[bool], horizon: int) -> float:
    """Mean of min(proposals, horizon): the area under the Kaplan-Meier curve up to `horizon`.

    P. Royston and M. K. B. Parmar, Restricted mean survival time, BMC Med. Res. Methodol. 13 (2013), 152. With
    whole proposals the area is the sum of S(0), ..., S(horizon - 1).
    """
    return sum(1 - share for share in kaplan_meier(times, events, horizon)[:horizon])


# --- intervals and tests ---------------------------------------------------------------------


@lru_cache(maxsize=64)
def _weights(values: int, draws: int, seed: int, stratum: int = 0) -> Array:
    """How often each of `values` values is drawn, in each of `draws` resamples."""
    import numpy as np

    rng = np.random.default_rng([seed, values, stratum])
    return rng.multinomial(values, [1 / values] * values, size=draws).astype(float)


def expanded_tail(values: int, strata: int = 1) -> float:
    """Probability to cut off at each end of the bootstrap distribution of a mean of so many values.

    The plain percentile interval of n values is too narrow by sqrt((n - 1) / n) and by z / t. Phi(-sqrt(n /
    (n - 1)) t(0.975, n - 1)) makes up for both: T. C. Hesterberg, What Teachers Should Know About the
    Bootstrap, Am. Stat. 69 (2015), 371-386, "expanded percentile interval". Each stratum takes its own mean,
    and with it one degree of freedom.
    """
    degrees = values - strata
    wide = math.sqrt(values / degrees) * student_t((1 + CONFIDENCE) / 2, degrees)
    return math.erfc(wide / math.sqrt(2)) / 2


def _ends(draws: Array, values: int, strata: int = 1) -> tuple[Array, Array] | None:
    """Interval ends, column by column, from bootstrap draws of means of so many values; None of too few."""
    import numpy as np

    if values - strata < LEAST_VALUES - 1:
        return None
    tail = expanded_tail(values, strata)
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def mean_interval(values: Sequence[float], bootstrap: int = BOOTSTRAP, seed: int = 0) -> tuple[float, float] | None:
    """Bootstrap 95 % interval of a mean, by expanded percentiles; None below six values."""
    import numpy as np

    if len(values) < LEAST_VALUES:
        return None
    return _pair(_ends(_weights(len(values), bootstrap, seed) @ np.asarray(values, float) / len(values), len(values)))


def _pair(ends: tuple[Array, Array] | None) -> tuple[float, float] | None:
    return None if ends is None else (float(ends[0]), float(ends[1]))


def signed_rank(differences: Sequence[float]) -> float:
    """Two-sided p of the signed-rank test: F. Wilcoxon, Biometrics Bulletin 1 (1945), 80-83.

    Zeros are ranked and then left out (J. W. Pratt, JASA 54 (1959), 655-667). Over all sign flips of the ranks that
    are left, so exact with ties too, up to `MOST_EXACT` values; normal with the tie correction above (scipy).
    """
    import numpy as np

    # Differences of means carry rounding errors that would break ties apart.
    rounded = [round(d, 9) for d in differences]
    if not any(rounded):
        return 1.0
    if len(rounded) > MOST_EXACT:
        from scipy.stats import wilcoxon  # type: ignore[import-untyped]  # takes 1 s to import

        return float(wilcoxon(rounded, zero_method="pratt").pvalue)
    sizes = sorted(map(abs, rounded))
    # Twice the mid-rank is whole: ranks i to j are shared by equals, their mean is (i + j) / 2.
    doubled = {size: bisect_left(sizes, size) + 1 + bisect_right(sizes, size) for size in sizes}
    ranks = [doubled[abs(d)] for d in rounded if d]
    total = sum(ranks)
    chances = np.zeros(total + 1)
    chances[0] = 1.0
    for rank in ranks:
        chances[rank:] += chances[:-rank].copy()
        chances /= 2
    off = abs(2 * sum(doubled[d] for d in rounded if d > 0) - total)
    return min(1.0, float(chances[np.abs(2 * np.arange(total + 1) - total) >= off].sum()))


Survivors = tuple[Sequence[int], Sequence[bool]]
"""Times and whether each is an event."""


def log_rank(strata: Sequence[tuple[Survivors, Survivors]]) -> float:
    """Two-sided p of the log-rank test, stratified: observed minus expected events and variances summed.

    N. Mantel, Evaluation of survival data, Cancer Chemother. Rep. 50 (1966), 163-170; ties by the hypergeometric
    variance.
    """
    excess = variance = 0.0
    for (times_a, events_a), (times_b, events_b) in strata:
        for t in sorted({t for t, e in zip((*times_a, *times_b), (*events_a, *events_b), strict=True) if e}):
            risk_a, risk_b = sum(x >= t for x in times_a), sum(x >= t for x in times_b)
            dead_a = sum(x == t and e for x, e in zip(times_a, events_a, strict=True))
            dead_b = sum(x == t and e for x, e in zip(times_b, events_b, strict=True))
            risk, dead = risk_a + risk_b, dead_a + dead_b
            excess += dead_a - dead * risk_a / risk
            if risk > 1:
                variance += dead * (risk - dead) * risk_a * risk_b / (risk**2 * (risk - 1))
    return math.erfc(abs(excess) / math.sqrt(2 * variance)) if variance > 0 else 1.0


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjusted p-values: S. Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scand. J. Stat. 6 (1979)."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return tuple(adjusted)


def a12(mine: Sequence[float], other: Sequence[float]) -> float:
    """Probability that one of `mine` is less than one of `other`, ties half.

    A. Vargha and H. D. Delaney, A Critique and Improvement of the CL Common Language Effect Size Statistics of
    McGraw and Wong, J. Educ. Behav. Stat. 25 (2000), 101-132; here less is better.
    """
    wins = sum((a < b) + (a == b) / 2 for a in mine for b in other)
    return wins / (len(mine) * len(other))


# --- one method on one problem ---------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """A run as the statistics see it."""

    run: Run
    energies: tuple[float | None, ...]
    default: float | None

    def time(self, threshold: float | None, horizon: int) -> tuple[int, bool]:
        """Proposals until convergence, or until observation ended; and whether it converged."""
        at = None if threshold is None else _first(self.energies[: horizon + 1], threshold)
        return (min(len(self.energies) - 1, horizon), False) if at is None else (at, True)

    @property
    def fingerprint(self) -> tuple[object, ...]:
        return tuple(
            (json.dumps(dict(s.config), sort_keys=True, default=str), s.joules_per_unit, s.feasible)
            for s in self.run.steps
        )


@dataclass(frozen=True)
class _Group:
    """The runs of one method on one problem, by seed."""

    problem: Problem
    method: str
    best: float | None
    known: tuple[_Known, ...]

    @cached_property
    def same(self) -> bool:
        return len(self.known) > 1 and len({k.fingerprint for k in self.known}) == 1

    @property
    def horizon(self) -> int:
        return min(allowed(k.run) for k in self.known)

    def times(self, target: Target, horizon: int) -> tuple[list[int], list[bool]]:
        found = [k.time(target.threshold(self.best, k.default), horizon) for k in self.known]
        return [t for t, _ in found], [e for _, e in found]

    def restricted(self, target: Target, horizon: int) -> dict[int, float | None]:
        """By seed, proposals restricted at the horizon; None where the run ended before, not having got there."""
        times, events = self.times(target, horizon)
        return {
            k.run.seed: float(t) if e or t >= horizon else None
            for k, t, e in zip(self.known, times, events, strict=True)
        }


def _quantile(ordered: Sequence[float], q: float) -> float | None:
    """Linear between neighbours; None where it falls on what is not known (infinite)."""
    at = (len(ordered) - 1) * q
    below = math.floor(at)
    part = at - below
    value = ordered[below]
    if part:
        value += part * (ordered[below + 1] - value) if math.isfinite(ordered[below + 1]) else math.inf
    return value if math.isfinite(value) else None


def _regrets(groups: Sequence[_Group], horizon: int) -> tuple[Regret, ...]:
    """Pooled over problems: for the median every run counts, for the mean every problem counts the same."""
    found = []
    for n in range(horizon + 1):
        values, means, without = [], [], []
        for group in groups:
            at = [k.energies[n] for k in group.known if n < len(k.energies)]
            best = group.best
            here = [math.inf if e is None or best is None else e / best - 1 for e in at]
            values += here
            finite = [v for v in here if math.isfinite(v)]
            means += [fmean(finite)] if finite else []
            without += [fmean(e is None for e in at)] if at else []
        values.sort()
        low, median, high = (_quantile(values, q) for q in (0.25, 0.5, 0.75)) if values else (None, None, None)
        found.append(
            Regret(
                proposals=n,
                median=median,
                low=low,
                high=high,
                mean=fmean(means) if means else None,
                share_without=fmean(without) if without else 0.0,
                runs=len(values),
            )
        )
    return tuple(found)


def _median(shares: Sequence[float]) -> int | None:
    # 1 - S of 25 in 50 runs may come out as 0.49999999999999994.
    return next((n for n, share in enumerate(shares) if share >= 0.5 - 1e-9), None)


def _cell(group: _Group, target: Target, horizon: int, bootstrap: int, seed: int) -> Cell:
    times, events = group.times(target, horizon)
    mean = band = None
    if not group.same and len(times) >= LEAST_VALUES:
        draws = _survival(times, events, _weights(len(times), bootstrap, seed), horizon)
        mean = _pair(_ends(draws[:, :horizon].sum(axis=1), len(times)))
        band = share_band(times, events, horizon)
    finals = sorted(math.inf if (e := k.energies[-1]) is None else e for k in group.known)
    return Cell(
        problem=group.problem.name,
        problems=1,
        converged=sum(events),
        final=_quantile(finals, 0.5),
        final_low=_quantile(finals, 0.25),
        final_high=_quantile(finals, 0.75),
        same_for_every_seed=group.same,
        **_shape(kaplan_meier(times, events, horizon), mean, band),
        **_counts([group], target, horizon),
    )


def _shape(
    curve: tuple[float, ...],
    mean: tuple[float, float] | None,
    band: tuple[tuple[float, ...], tuple[float, ...]] | None,
) -> dict[str, Any]:
    """What a cell says of its curve."""
    return {
        "share": curve[-1],
        "share_low": band[0][-1] if band else None,
        "share_high": band[1][-1] if band else None,
        "mean": sum(1 - share for share in curve[:-1]),
        "mean_low": mean[0] if mean else None,
        "mean_high": mean[1] if mean else None,
        "median": _median(curve),
        "curve": curve,
        "curve_low": band[0] if band else None,
        "curve_high": band[1] if band else None,
    }


def _counts(groups: Sequence[_Group], target: Target, horizon: int) -> dict[str, Any]:
    """What a cell counts over runs, whichever problems they are on."""
    runs = [k.run for g in groups for k in g.known]
    steps = [s for r in runs for s in r.steps if s.number > 0]
    # Of a row that breaks a limit the method hears no figure; the table has one.
    failed = sum(_worth(s.joules_per_unit) is None and _worth(s.true_joules_per_unit) is None for s in steps)
    named = sorted({r.llm for r in runs if r.llm})
    restricted = [v for g in groups for v in g.restricted(target, horizon).values()]
    read = [r.input_tokens for r in runs if r.input_tokens is not None]
    written = [r.output_tokens for r in runs if r.output_tokens is not None]
    return {
        "method": groups[0].method,
        "target": target,
        "runs": len(runs),
        "incomplete": sum(v is None for v in restricted),
        "horizon": horizon,
        "regrets": _regrets(groups, horizon),
        "failed_per_run": failed / len(runs),
        "infeasible_per_run": (sum(not s.feasible for s in steps) - failed) / len(runs),
        "prompts_per_run": fmean(r.prompts for r in runs),
        "input_tokens_per_run": fmean(read) if read else None,
        "output_tokens_per_run": fmean(written) if written else None,
        "llm": ", ".join(named) or None,
    }


def _over_all(groups: Sequence[_Group], target: Target, horizon: int, bootstrap: int, seed: int) -> Cell:
    """A method over problems: each counts the same; intervals resample problems, or seeds where those are few."""
    import numpy as np

    each = [g.times(target, horizon) for g in groups]
    curves = np.array([kaplan_meier(times, events, horizon) for times, events in each])
    if len(groups) >= LEAST_PROBLEMS:
        values, strata = len(groups), 1
        draws = _weights(values, bootstrap, seed) @ curves / values
    else:
        varied = [len(g.known) for g in groups if not g.same]
        values, strata = sum(varied), len(varied)
        draws = np.zeros((bootstrap, horizon + 1))
        for stratum, (group, (times, events)) in enumerate(zip(groups, each, strict=True)):
            weights = np.ones((1, len(times))) if group.same else _weights(len(times), bootstrap, seed, stratum)
            draws += (1 - _survival(times, events, weights, horizon)) / len(groups)
    ends = _ends(draws, values, strata)
    return Cell(
        problem=None,
        problems=len(groups),
        converged=sum(sum(events) for _, events in each),
        final=None,
        final_low=None,
        final_high=None,
        same_for_every_seed=all(g.same for g in groups),
        **_shape(
            tuple(map(float, curves.mean(axis=0))),
            _pair(_ends((1 - draws[:, :horizon]).sum(axis=1), values, strata)),
            (tuple(map(float, ends[0])), tuple(map(float, ends[1]))) if ends else None,
        ),
        **_counts(groups, target, horizon),
    )


# --- two methods -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Paired:
    """Two methods on one problem, paired by seed."""

    differences: tuple[float, ...]
    """Restricted proposals of the one minus the other's; a single one where both are the same for every seed."""
    missing: int
    censored: float
    a12: float | None
    survivors: tuple[Survivors, Survivors]
    one_is_the_same: bool


def _paired(mine: _Group, other: _Group, target: Target, horizon: int) -> _Paired:
    a, b = mine.restricted(target, horizon), other.restricted(target, horizon)
    seeds = sorted(a.keys() & b.keys())
    if mine.same and other.same:
        seeds = seeds[:1]
    both = [(x, y) for seed in seeds if (x := a[seed]) is not None and (y := b[seed]) is not None]
    (times_a, events_a), (times_b, events_b) = mine.times(target, horizon), other.times(target, horizon)
    full_a, full_b = [v for v in a.values() if v is not None], [v for v in b.values() if v is not None]
    return _Paired(
        differences=tuple(x - y for x, y in both),
        missing=len(seeds) - len(both),
        censored=1 - fmean((*events_a, *events_b)),
        a12=a12(full_a, full_b) if full_a and full_b else None,
        survivors=((times_a, events_a), (times_b, events_b)),
        one_is_the_same=mine.same or other.same,
    )


def _compare(
    pairs: Sequence[tuple[_Group, _Group]], target: Target, horizon: int, bootstrap: int, seed: int
) -> Comparison:
    """Compare two methods on the problems that both ran on."""
    import numpy as np

    found = [_paired(mine, other, target, horizon) for mine, other in pairs]
    usable = [p for p in found if p.differences]
    a12s = [p.a12 for p in found if p.a12 is not None]
    blank = Comparison(
        problem=pairs[0][0].problem.name,
        target=target,
        method=pairs[0][0].method,
        other=pairs[0][1].method,
        unit="pairs",
        problems=len(usable),
        pairs=0,
        missing=sum(p.missing for p in found),
        difference=None,
        low=None,
        high=None,
        p=None,
        p_holm=None,
        test="",
        wins=0,
        ties=0,
        losses=0,
        a12=fmean(a12s) if a12s else None,
        censored=fmean(p.censored for p in found),
        horizon=horizon,
    )
    if not usable:
        return replace(blank, note="no pair of runs is complete")
    means = [fmean(p.differences) for p in usable]
    over_problems = len(usable) >= LEAST_PROBLEMS
    values = means if over_problems else [d for p in usable for d in p.differences]
    filled = replace(
        blank,
        unit="problems" if over_problems else "pairs",
        pairs=len(values),
        difference=fmean(means),
        wins=sum(v < -1e-9 for v in values),
        ties=sum(abs(v) <= 1e-9 for v in values),
        losses=sum(v > 1e-9 for v in values),
    )
    if over_problems:
        low, high = mean_interval(means, bootstrap, seed) or (None, None)
        return replace(filled, low=low, high=high, p=signed_rank(means), test="signed-rank")
    if all(len(p.differences) == 1 for p in usable):
        few = "both do the same for every seed" if any(p.one_is_the_same for p in found) else "one seed"
        return replace(filled, note=f"{few}: one result a problem, and fewer than {LEAST_PROBLEMS} problems")
    if len(values) < LEAST_VALUES:
        return replace(filled, note=f"fewer than {LEAST_VALUES} pairs can show nothing at 5 %")
    # Problems are fixed here: each keeps its weight, and only its seeds are resampled.
    draws = np.zeros(bootstrap)
    for stratum, p in enumerate(usable):
        n = len(p.differences)
        draws += _weights(n, bootstrap, seed, stratum) @ np.array(p.differences) / n / len(usable)
    sizes = [len(p.differences) for p in usable if len(p.differences) > 1]
    low, high = _pair(_ends(draws, sum(sizes), len(sizes))) or (None, None)
    # Copies of one result are no sample of times, so a method that never varies is a constant to the signed ranks.
    if filled.censored > MOST_CENSORED and not any(p.one_is_the_same for p in usable):
        return replace(filled, low=low, high=high, p=log_rank([p.survivors for p in usable]), test="log-rank")
    return replace(filled, low=low, high=high, p=signed_rank(values), test="signed-rank")


def _corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """With Holm's p-values over these comparisons; those that are not tested take no part."""
    tested = [c.p for c in comparisons if c.p is not None]
    adjusted = iter(holm(tested))
    return [c if c.p is None else replace(c, p_holm=next(adjusted), note=_too_few(c, len(tested))) for c in comparisons]


def _too_few(c: Comparison, tested: int) -> str:
    """Says so where not even winning every time would have been significant: of n signs, 2 / 2^n is the least p."""
    if c.test != "signed-rank" or 2.0 ** (1 - c.pairs) * tested < SIGNIFICANT:
        return ""
    return f"{c.pairs} {c.unit} are too few to tell apart in {_count(tested, 'comparisons')}, even with a win in each"


def _with_problems(c: Comparison, per_problem: Sequence[Comparison]) -> Comparison:
    """With the count of problems that tell the two apart by themselves."""
    same = [o for o in per_problem if (o.target, o.method, o.other) == (c.target, c.method, c.other) and o.distinct]
    better = sum((o.difference or 0.0) < 0 for o in same)
    return replace(c, alone=(better, len(same) - better))


# --- everything ------------------------------------------------------------------------------


def analyse(
    problems: Sequence[Problem],
    runs: Iterable[Run],
    targets: Sequence[Target] = TARGETS,
    *,
    against: str | None = None,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
) -> Analysis:
    """What `runs` on `problems` show; the same whatever their order.

    Methods appear in the order of their names; who shows them may choose another.

    Args:
        problems: in the order to show them.
        runs: of any methods, with the same seeds or not.
        targets: what to get to; shown side by side, and corrected for together.
        against: compare every method with this one only, which leaves fewer comparisons to correct for;
            every two methods when left out.
        bootstrap: resamples.
        seed: of the resamples.

    Raises:
        Refused: two runs of one method on one problem with the same seed, a run on an unknown problem, or a
            target that is relative to something nobody knows.
    """
    by_name = {p.name: p for p in problems}
    groups = _grouped(by_name, runs)
    methods = tuple(sorted({method for _, method in groups}))
    names = tuple(n for n in by_name if any((n, m) in groups for m in methods))
    for (name, _), group in groups.items():
        for target in targets:
            if all(target.threshold(group.best, k.default) is None for k in group.known) and any(
                k.energies[-1] is not None for k in group.known
            ):
                raise Refused(f"{name}: its default gave no figure within the limits, so nothing can be {target.name}.")
    horizons = {n: min(groups[n, m].horizon for m in methods if (n, m) in groups) for n in names}
    counted = _counted(by_name, names)
    common = min((horizons[n] for n in counted), default=0)

    if against is not None and against not in methods:
        raise Refused(f"No run is of {against!r}, to compare with; the methods are {', '.join(methods)}.")
    couples = [pair for pair in combinations(methods, 2) if against is None or against in pair]
    cells, overall, over_all, per_problem = [], [], [], []
    for target in targets:
        for name in names:
            here = [groups[name, m] for m in methods if (name, m) in groups]
            cells += [_cell(g, target, horizons[name], bootstrap, seed) for g in here]
            per_problem += [
                _compare([(groups[name, a], groups[name, b])], target, horizons[name], bootstrap, seed)
                for a, b in couples
                if (name, a) in groups and (name, b) in groups
            ]
        if len(counted) > 1:
            for m in methods:
                mine = [groups[n, m] for n in counted if (n, m) in groups]
                overall += [_over_all(mine, target, common, bootstrap, seed)] if mine else []
            for a, b in couples:
                if shared := [n for n in counted if (n, a) in groups and (n, b) in groups]:
                    pairs = [(groups[n, a], groups[n, b]) for n in shared]
                    over_all.append(replace(_compare(pairs, target, common, bootstrap, seed), problem=None))
    corrected = _corrected(per_problem)
    return Analysis(
        targets=tuple(targets),
        problems=names,
        methods=methods,
        cells=tuple(cells),
        overall=tuple(overall),
        comparisons=(*(_with_problems(c, corrected) for c in _corrected(over_all)), *corrected),
        recall=_recall(by_name, groups, methods, horizons, targets, bootstrap, seed),
        incomplete=_missing(names, methods, groups),
        notes=_notes(by_name, names, counted, groups, horizons),
    )


WITHOUT_NAMES = "without names"


def _recall(
    problems: Mapping[str, Problem],
    groups: Mapping[tuple[str, str], _Group],
    methods: Sequence[str],
    horizons: Mapping[str, int],
    targets: Sequence[Target],
    bootstrap: int,
    seed: int,
) -> tuple[Comparison, ...]:
    """Each method that asks a chat model, on tables against their twins; a family of its own for Holm.

    What a model does better where it reads the names it remembered, or it used what the names mean.
    """
    twins = {p.twin_of: name for name, p in problems.items() if p.twin_of is not None}
    found = []
    for method, target in product(methods, targets):
        both = [
            (name, twin)
            for name, twin in twins.items()
            if (name, method) in groups and (twin, method) in groups and _talked(groups[name, method])
        ]
        if both:
            pairs = [(groups[name, method], groups[twin, method]) for name, twin in both]
            horizon = min(horizons[name] for pair in both for name in pair)
            compared = _compare(pairs, target, horizon, bootstrap, seed)
            found.append(replace(compared, problem=None, other=f"{method} {WITHOUT_NAMES}"))
    return tuple(_corrected(found))


def _talked(group: _Group) -> bool:
    return any(k.run.prompts for k in group.known)


def _grouped(problems: Mapping[str, Problem], runs: Iterable[Run]) -> dict[tuple[str, str], _Group]:
    found: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        if run.problem not in problems:
            raise Refused(f"A run of {run.method} is on {run.problem!r}, which is not among the problems.")
        seeds = found.setdefault((run.problem, run.method), {})
        if run.seed in seeds:
            raise Refused(f"{run.method} on {run.problem}: two runs with seed {run.seed}; each pair needs its own.")
        seeds[run.seed] = run
    order = sorted(found, key=lambda key: (list(problems).index(key[0]), key[1]))
    known = {
        key: tuple(
            _Known(run, incumbent_energies(run), _default_of(run, problems[key[0]]))
            for _, run in sorted(found[key].items())
        )
        for key in order
    }
    return {key: _Group(problems[key[0]], key[1], _best(problems[key[0]], known), known[key]) for key in order}


def _best(problem: Problem, known: Mapping[tuple[str, str], Sequence[_Known]]) -> float | None:
    """The best feasible of the table; where nobody knows it, the best that any run of any method measured."""
    if problem.best_joules_per_unit is not None:
        return problem.best_joules_per_unit
    seen = [
        energy
        for (name, _), each in known.items()
        if name == problem.name
        for k in each
        for step in k.run.steps
        if step.feasible and _worth(step.joules_per_unit) and math.isfinite(energy := _true(step))
    ]
    return min(seen, default=None)


def _counted(problems: Mapping[str, Problem], names: Sequence[str]) -> list[str]:
    """Problems that count over all: an anonymised twin is no further problem where its original is there."""
    originals = [n for n in names if not problems[n].anonymised]
    return originals or list(names)


def _missing(
    names: Sequence[str], methods: Sequence[str], groups: Mapping[tuple[str, str], _Group]
) -> tuple[Incomplete, ...]:
    found = []
    for name, method in product(names, methods):
        group = groups.get((name, method))
        if group is None:
            found.append(Incomplete(problem=name, method=method, seed=None, proposals=0, budget=0, reason="no run"))
            continue
        found += [_ended_early(k.run) for k in group.known if not k.run.complete or observed(k.run) < allowed(k.run)]
    return tuple(found)


def _ended_early(run: Run) -> Incomplete:
    return Incomplete(
        problem=run.problem,
        method=run.method,
        seed=run.seed,
        proposals=proposals_made(run),
        budget=allowed(run),
        reason=(run.error or "cut short").rstrip("."),
    )


def _notes(
    problems: Mapping[str, Problem],
    names: Sequence[str],
    counted: Sequence[str],
    groups: Mapping[tuple[str, str], _Group],
    horizons: Mapping[str, int],
) -> tuple[str, ...]:
    notes = []
    if 1 < len(counted) < LEAST_PROBLEMS:
        notes.append(
            f"{len(counted)} problems are too few to speak of others: what is said over all holds for these problems,"
            " with the seeds resampled."
        )
    for method in sorted({m for _, m in groups}):
        ran = sum((n, method) in groups for n in counted)
        if ran < len(counted):
            notes.append(
                f"{method} ran on {ran} of {len(counted)} problems: its row over all is of these, and its comparisons"
                " are on those that both ran on."
            )
    unknown = [n for n in names if problems[n].best_joules_per_unit is None]
    if unknown:
        notes.append(
            f"{', '.join(unknown)}: nobody knows the best, so the best that any method measured stands in for it."
        )
    if len({horizons[n] for n in counted}) > 1:
        notes.append(
            f"Budgets differ: over all problems runs are looked at up to {min(horizons[n] for n in counted)} proposals."
        )
    if len(counted) < len(names):
        notes.append("Anonymised twins stand by themselves and do not count over all problems.")
    same = sorted({method for (_, method), group in groups.items() if group.same})
    if same:
        notes.append(
            f"{', '.join(same)} {'does' if len(same) == 1 else 'do'} the same for every seed on at least one problem:"
            " there it is one result, without an interval."
        )
    return tuple(notes)
