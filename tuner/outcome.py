"""What came out of a comparison: its targets, its analysis, and the files that hold it.

The analysis knows runs alone, so that a stored comparison is analysed again by giving its folder once more,
also to other targets.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from tuner.compare import METHODS, Question, method_name
from tuner.convergence import Analysis, Target, analyse
from tuner.export import write as write_whole
from tuner.runs import Problem, Run
from tuner.space import Refused, excerpt
from tuner.study import Threshold

WITHIN = "5%,10%"


def parse_targets(within: str | None, threshold: str | None) -> tuple[Target, ...]:
    """`--within 5%,10%` of the best, and `--threshold 0.8x` or `0.45J`; both shares where nothing is given."""
    found = []
    for part in (within or ("" if threshold else WITHIN)).split(","):
        if not part.strip() and not within:
            continue
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*", part)
        share = float(match[1]) / 100 if match else -1.0
        if not 0 <= share <= 10:
            raise Refused(f"--within {excerpt(within)}: expected shares above the best, such as 5% or 5%,10%")
        found.append(Target("within", share))
    if threshold:
        parsed = Threshold.parse(threshold)
        found.append(Target("ratio" if parsed.relative else "absolute", parsed.value))
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A comparison and what it shows."""

    title: str
    problems: tuple[Problem, ...]
    runs: tuple[Run, ...]
    analysis: Analysis
    expected: int
    """Runs that were asked for."""
    left_out: tuple[str, ...] = ()
    asked: Question | None = None
    """None for studies that existed already."""
    prices: tuple[float, float] | None = None
    """Of a million input and output tokens."""

    @classmethod
    def of(
        cls,
        title: str,
        problems: Sequence[Problem],
        runs: Iterable[Run],
        targets: Sequence[Target],
        *,
        expected: int,
        against: str | None = None,
        asked: Question | None = None,
        prices: tuple[float, float] | None = None,
    ) -> Outcome:
        """Analyse the runs, brought into one order, so that the order in which they ended changes nothing.

        `against`: the only method that the others are compared with, which leaves fewer comparisons to correct for.
        """
        places = {p.name: place for place, p in enumerate(problems)}
        ordered = sorted(runs, key=lambda r: (places[r.problem], r.method, r.seed))
        if not ordered:
            raise Refused("nothing to analyse: no run has ended yet")
        return cls(
            title=title,
            problems=tuple(problems),
            runs=tuple(ordered),
            analysis=analyse(problems, ordered, targets, against=against),
            expected=expected,
            left_out=asked.left_out if asked else (),
            asked=asked,
            prices=prices,
        )

    @property
    def missing(self) -> int:
        """Runs that were asked for and are not there, or ended early."""
        return self.expected - sum(run.complete for run in self.runs)

    @property
    def methods(self) -> tuple[str, ...]:
        """The best first: least restricted mean to the first target, over all problems or on the only one."""
        where = None if self.analysis.overall else self.analysis.problems[0]
        means = {
            m: cell.mean
            for m in self.analysis.methods
            if (cell := self.analysis.cell(where, m, self.analysis.targets[0]))
        }
        return tuple(sorted(self.analysis.methods, key=lambda m: (means.get(m, float("inf")), m)))

    @property
    def costs(self) -> dict[str, str]:
        """What each method's prompts cost, where a price is given and tokens were counted."""
        found = {}
        for method in self.analysis.methods:
            mine = [r for r in self.runs if r.method == method and r.prompts]
            read, written = sum(r.input_tokens or 0 for r in mine), sum(r.output_tokens or 0 for r in mine)
            if self.prices and (read or written):
                cost = (read * self.prices[0] + written * self.prices[1]) / 1e6
                found[method] = f"{cost:.2f} for {read + written:,} tokens in {len(mine)} runs".replace(",", " ")
        return found

    @property
    def chats(self) -> dict[str, list[str]]:
        """Who answered, and when (`MODEL, 2026-11-25`, UTC): the methods that it proposed for."""
        found: dict[str, list[str]] = {}
        for method in self.methods:
            mine = [r for r in self.runs if r.method == method and r.llm]
            days = sorted({f"{datetime.fromtimestamp(r.started_unix, UTC):%Y-%m-%d}" for r in mine if r.started_unix})
            period = " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "date not told"
            for name in sorted({r.llm for r in mine if r.llm}):
                found.setdefault(f"{name}, {period}", []).append(method)
        return found

    # --- files ---

    def to_csv(self) -> str:
        """One row a method, problem (`all`: over all of them) and target."""
        return _csv(self.analysis.to_rows())

    def steps_to_csv(self) -> str:
        """One row a proposal, of every run."""
        return _csv(_step_rows(self.runs))

    def to_json(self) -> str:
        """Everything: what was asked, the problems, all runs, and what they show."""
        everything = {
            "asked": self.asked,
            "problems": self.problems,
            "cells": self.analysis.to_rows(),
            "comparisons": self.analysis.comparison_rows(),
            "sentences": self.analysis.sentences,
            "assumptions": self.analysis.assumptions,
            "left_out": self.left_out,
            "costs": self.costs,
            "runs": self.runs,
        }
        return json.dumps(msgspec.to_builtins(everything), indent=1, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """The report as one page."""
        from tuner.page import page

        asked = self.asked
        header: Mapping[str, Any] = {
            "title": self.title,
            "command": asked.command if asked else None,
            "started_unix": asked.started_unix if asked else None,
            "machine": asked.machine if asked else {},
            "versions": asked.versions if asked else {},
            "methods": {method_name(m): WHAT[m] for m in METHODS if m in self.analysis.methods},
            "costs": self.costs,
        }
        return page({k: v for k, v in header.items() if v}, self.problems, self.runs, self.analysis)


WHAT: Mapping[str, str] = {
    "rules": "an expert's usual moves, then one change at a time from the best; no learning",
    "sobol": "the points of a scrambled Sobol sequence",
    "random": "uniform draws without repetition",
    "tpe": "Optuna's tree-structured Parzen estimator, 5 start-up trials",
    "gp": "Optuna's Gaussian process with expected improvement, 5 start-up trials",
    "cmaes": "Optuna's CMA-ES",
    "grid": "full grids of growing resolution, corners first, each in a drawn order",
    "largest": "the largest batch that meets the limits, then one change at a time",
}
"""What stands behind each name."""


def _step_rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    return [
        {
            "problem": run.problem,
            "method": run.method,
            "seed": run.seed,
            "proposal": step.number,
            "config": json.dumps(dict(step.config)),
            "proposed": None if step.proposed is None else json.dumps(dict(step.proposed)),
            "joules_per_unit": step.joules_per_unit,
            "true_joules_per_unit": step.true_joules_per_unit,
            "units_per_second": step.units_per_second,
            "feasible": int(step.feasible),
            "error": step.error,
        }
        for run in runs
        for step in run.steps
    ]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(destination: Path | str, text: str) -> None:
    """The whole text or nothing; `-` is standard output."""
    write_whole(destination, text)
