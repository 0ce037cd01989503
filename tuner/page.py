"""A comparison as one HTML file that needs nothing else: no network, no script, no font.

Everything from outside (names of problems and models, facts of a table, errors of a provider) reaches the
page through Jinja's escaping. Its one script sorts tables; the page's own policy allows that one and
nothing else, so that even markup that got through could load nothing and run nothing. What there is no number
for is a dash.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from tuner import figures
from tuner.convergence import SHOWN, Analysis, Cell, Comparison, p_text
from tuner.export import write as write_whole
from tuner.runs import Problem, Run
from tuner.summary import clean, joules_text

NONE = "–"

SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows].flatMap(row => [...row.cells]);
  const taken = [], place = new Map();
  [...table.tHead.rows].forEach((row, y) => { let x = 0; for (const cell of row.cells) {
    while (taken[y + "," + x]) x++;
    for (let i = 0; i < cell.rowSpan; i++) for (let j = 0; j < cell.colSpan; j++) taken[(y + i) + "," + (x + j)] = true;
    if (cell.colSpan === 1) place.set(cell, x); x += cell.colSpan; } });
  const value = (row, x) => { const cell = row.cells[x], text = cell.dataset.v ?? cell.textContent.trim();
    return text !== "" && !isNaN(text) ? Number(text) : cell.classList.contains("n") ? Infinity : text; };
  for (const [head, x] of place) {
    const button = document.createElement("button"); button.className = "sort"; button.title = "Sort";
    button.append(...head.childNodes); head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...[...body.rows].sort((a, b) => { const p = value(a, x), q = value(b, x);
        return (p < q ? -1 : p > q ? 1 : 0) * (down ? -1 : 1); }));
    });
  }
}
"""


def page(header: Mapping[str, Any], problems: Sequence[Problem], runs: Sequence[Run], analysis: Analysis) -> str:
    """The whole page.

    `header` may hold `title`, `command` (as it was typed), `started_unix`, `machine` and `versions` (name to
    value), `methods` (name to what it is), `costs` (method to a text) and `notes` (sentences, such as what was
    left out and why). What it does not hold is left out.
    """
    import jinja2
    from markupsafe import Markup, escape

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = lambda text: escape(text).replace("_", Markup("_<wbr>"))
    template = environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))
    shown = [one for one in problems if one.name in analysis.problems]
    order = figures.ranked(analysis)
    where = None if analysis.overall else next(iter(analysis.problems), None)
    drawn = [
        {"name": name, "svg": Markup(figures.svg(figure, name, caption)), "caption": caption}  # noqa: S704  # our own SVG
        for name, figure, caption in _figures(shown, runs, analysis)
    ]
    return template.render(
        title=clean(str(header.get("title") or "Comparison of methods")),
        lead=_lead(header, shown, runs, analysis),
        results_title="Results over all problems" if analysis.overall else "Results",
        results_note=_results_note(analysis),
        targets=[target.name for target in analysis.targets],
        shown=_shown(analysis),
        overall=_rows(analysis, where, order, shown),
        sentences=_sentences(analysis),
        overall_pairs=_pairs(analysis, where, order),
        notes=[clean(str(note)) for note in (*analysis.notes, *(header.get("notes") or ()))],
        figures=drawn,
        each=[_each(one, analysis, order, shown) for one in shown] if analysis.overall else [],
        problems=[_problem(one) for one in shown],
        methods=[_method(method, header, runs) for method in order],
        costs=bool(header.get("costs")),
        assumptions=analysis.assumptions,
        incomplete=[clean(one.sentence) for one in analysis.incomplete],
        command=clean(str(header.get("command") or "")),
        machine=_facts(header.get("machine")),
        versions=_facts(header.get("versions")),
        light=figures.COLOURS,
        dark=figures.DARK_COLOURS,
        methods_count=len(analysis.methods),
        script=Markup(SORT),  # noqa: S704  # no value from outside is in it
        script_hash=base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode(),
    )


def write(path: Path | str, text: str) -> None:
    """The whole page or nothing; `-` is standard output."""
    write_whole(path, text)


# --- what is in it ---------------------------------------------------------------------------


THROUGHPUT = (
    "Throughput against energy of every row that some run measured (logarithmic scales), and the limit where it is on"
    " throughput. A method’s marker stands on the row that most of its runs ended with; where several share a row,"
    " they stand around it."
)
DIFFERENCES = (
    "Paired differences of the proposals to convergence, with 95 % bootstrap intervals. Filled: told apart after"
    " Holm’s correction; hollow: not."
)


def _figures(problems: Sequence[Problem], runs: Sequence[Run], analysis: Analysis) -> Iterable[tuple[str, Any, str]]:
    """Name, figure and caption of each."""
    if not analysis.cells:
        return
    several = bool(analysis.overall)
    crowded = len(analysis.methods) > figures.MOST_BANDS
    spread = (
        "Bars after the last proposal: the middle half of the runs."
        if crowded
        else "Bands: the middle half of the runs."
    )
    point = " Point at a method in the legend to see it alone." if len(analysis.methods) > 1 else ""
    yield (
        "progress",
        figures.progress_figure(analysis),
        "Energy of the configuration that a method would pick so far, over the least within the limits, after each"
        f" proposal (median, logarithmic scale). {spread} Dashed: {_list(t.name for t in analysis.targets)}."
        " A line begins where more than half of the runs have something within the limits." + point,
    )
    every = ", every problem counting the same" if several else ""
    interval = "" if crowded else " Bands: pointwise 95 % intervals."
    yield (
        "converged",
        figures.converged_figure(analysis),
        f"Share of the runs that got to the target{every} (one minus Kaplan and Meier’s curve).{interval}",
    )
    if several:
        for k, target in enumerate(analysis.targets):
            yield (
                f"converged-{k}",
                figures.converged_figure(analysis, target),
                f"Share of the runs that have got {target.name}, problem by problem.{interval}",
            )
    yield (
        "throughput",
        figures.throughput_figure(problems, runs, analysis),
        THROUGHPUT,
    )
    yield (
        "heat",
        figures.heat_figure(analysis),
        f"Mean proposals until {analysis.targets[0].name}, restricted at the budget. Bold: the least of its row.",
    )
    if len(analysis.methods) > 1:
        yield (
            "differences",
            figures.differences_figure(analysis),
            DIFFERENCES,
        )


def _lead(header: Mapping[str, Any], problems: Sequence[Problem], runs: Sequence[Run], analysis: Analysis) -> str:
    seeds = {run.seed for run in runs}
    budgets = sorted({cell.horizon for cell in analysis.cells})
    parts = [
        f"{_count(len(analysis.methods), 'method')} on {_count(len(problems), 'problem')}",
        _count(len(seeds), "seed"),
        f"{_count(len(runs), 'run')}",
    ]
    if budgets:
        parts.append(f"up to {_count(budgets[-1], 'proposal')} each")
    if started := _day(header.get("started_unix")):
        parts.append(started)
    return ", ".join(parts)


def _results_note(analysis: Analysis) -> str:
    every = "Every problem counts the same. " if analysis.overall else ""
    return f"{every}Small figures: 95 % confidence intervals of shares and means, quartiles of regret."


def _shown(analysis: Analysis) -> list[int]:
    most = max((cell.horizon for cell in analysis.cells), default=0)
    return [n for n in SHOWN if n <= most]


def _rows(
    analysis: Analysis, where: str | None, order: Sequence[str], problems: Sequence[Problem]
) -> list[dict[str, Any]]:
    """The table of results of one problem, or over all of them."""
    found = []
    unit = next((one.unit for one in problems if one.name == where), "")
    for method in order:
        cells = [cell for target in analysis.targets if (cell := analysis.cell(where, method, target))]
        if len(cells) != len(analysis.targets):
            continue
        first = cells[0]
        found.append(
            {
                "method": clean(method),
                "unit": unit,
                "incomplete": first.incomplete,
                "targets": [_target(cell, analysis, where) for cell in cells],
                "regrets": [_regret(first, n) for n in _shown(analysis)],
                "final": where
                and _cell(_number(first.final), first.final, _between(first.final_low, first.final_high)),
                "failed": f"{first.failed_per_run:.1f}",
                "infeasible": f"{first.infeasible_per_run:.1f}",
            }
        )
    return found


def _cell(text: str, value: float | None, between: str, *, least: bool = False) -> dict[str, Any]:
    return {"text": text, "value": _plain(value), "between": between, "least": least}


def _target(cell: Cell, analysis: Analysis, where: str | None) -> dict[str, Any]:
    others = [other for m in analysis.methods if (other := analysis.cell(where, m, cell.target))]
    most = max(round(100 * other.share) for other in others)
    least = min(round(other.mean, 1) for other in others)
    several = len(others) > 1
    return {
        "share": _cell(
            f"{100 * cell.share:.0f} %",
            cell.share,
            _between(_percent(cell.share_low), _percent(cell.share_high), decimals=0),
            least=several and round(100 * cell.share) == most,
        ),
        "mean": _cell(
            f"{cell.mean:.1f}",
            cell.mean,
            _between(cell.mean_low, cell.mean_high, decimals=1),
            least=several and round(cell.mean, 1) == least,
        ),
        "median": NONE if cell.median is None else cell.median,
    }


def _regret(cell: Cell, proposals: int) -> dict[str, Any]:
    found = cell.regret_at(proposals)
    if found is None or found.median is None:
        return _cell(NONE, None, "")
    ends = (_percent(found.low), _percent(found.high))
    return _cell(f"{100 * found.median:.1f}", found.median, _between(*ends, decimals=1))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _sentences(analysis: Analysis) -> list[dict[str, Any]]:
    """Those over all problems where there are several; told apart first."""
    groups = []
    for target in analysis.targets:
        said = [c for c in analysis.comparisons if c.target == target and (c.problem is None) is bool(analysis.overall)]
        other = [_said(c) for c in said if not c.distinct]
        if said:
            groups.append(
                {
                    "title": target.name.capitalize(),
                    "apart": [_said(c) for c in said if c.distinct],
                    "other": other,
                    "other_title": f"{_count(len(other), 'pair')} that cannot be told apart, or not tested",
                }
            )
    if analysis.recall:
        told = [(c, f"{clean(c.target.name)}: {_said(c)}") for c in analysis.recall]
        other = [said for c, said in told if not c.distinct]
        groups.append(
            {
                "title": "Tables against their twins without names",
                "apart": [said for c, said in told if c.distinct],
                "other": other,
                "other_title": f"{_count(len(other), 'difference')} that cannot be told from none, or not tested",
            }
        )
    return groups


def _said(comparison: Comparison) -> str:
    return clean(comparison.sentence).rstrip(".")


def _each(one: Problem, analysis: Analysis, order: Sequence[str], problems: Sequence[Problem]) -> dict[str, Any]:
    facts = [one.facts.get(name, "") for name in ("model", "hardware", "engine")]
    facts += [f"limits: {_list(one.limits)}" if one.limits else "no limits"]
    return {
        "name": clean(one.name),
        "facts": ", ".join(clean(fact) for fact in facts if fact),
        "rows": _rows(analysis, one.name, order, problems),
        "pairs": _pairs(analysis, one.name, order),
    }


def _pairs(analysis: Analysis, where: str | None, order: Sequence[str]) -> list[dict[str, Any]]:
    """Every two methods, the one with the smaller mean first, and how they differ for each target."""
    found = {(c.target, frozenset((c.method, c.other))): c for c in analysis.comparisons if c.problem == where}
    rows = []
    for method, other in combinations(order, 2):
        mine = [found.get((target, frozenset((method, other)))) for target in analysis.targets]
        if any(mine):
            rows.append(
                {"method": clean(method), "other": clean(other), "targets": [_difference(c, method) for c in mine]}
            )
    return rows


def _difference(comparison: Comparison | None, method: str) -> dict[str, Any]:
    if comparison is None or comparison.difference is None:
        return {"difference": _cell(NONE, None, ""), "p": NONE, "p_value": "", "wins": NONE}
    ours = comparison.method == method
    sign = 1 if ours else -1
    ends = [None if end is None else sign * end for end in (comparison.low, comparison.high)][::sign]
    value, p = sign * comparison.difference, comparison.p_holm
    wins = (comparison.wins, comparison.ties, comparison.losses)[::sign]
    return {
        "difference": _cell(
            f"{value:+.1f}" if round(value, 1) else "0.0", value, _between(*ends, decimals=1), least=comparison.distinct
        ),
        "p": NONE if p is None else p_text(p).removeprefix("p = ").removeprefix("p "),
        "p_value": _plain(p),
        "wins": ", ".join(map(str, wins)),
    }


def _problem(one: Problem) -> dict[str, Any]:
    facts = {name: clean(value) for name, value in one.facts.items()}
    sources = [
        _list(filter(None, (facts.get("source"), facts.get("revision")))),
        facts.get("licence"),
        f"Trust {facts['trust']}" if facts.get("trust") else None,
        facts.get("notes"),
    ]
    remarks = [
        "names and categories replaced" if one.anonymised else "",
        f"noise {100 * one.noise_sigma:.1f} %" if one.noise_sigma else "",
        "" if one.kind == "table" else one.kind,
    ]
    return {
        "name": clean(one.name),
        "remark": ", ".join(filter(None, remarks)),
        **{name: facts.get(name, "") for name in ("hardware", "model", "engine")},
        "source": ". ".join(filter(None, sources)),
        "parameters": _list(map(clean, one.parameters)),
        "limits": [clean(limit) for limit in one.limits],
        "rows": NONE
        if one.configurations is None
        else f"{one.configurations}"
        if one.feasible is None
        else f"{one.feasible} of {one.configurations}",
        "best": _energy(one.best_joules_per_unit, one),
        "default": _energy(one.default_joules_per_unit, one),
    }


def _energy(joules: float | None, problem: Problem) -> str:
    return NONE if joules is None or not math.isfinite(joules) else f"{joules_text(joules)}/{problem.unit}"


def _method(method: str, header: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    mine = [run for run in runs if run.method == method]
    prompts = sum(run.prompts for run in mine)
    counts = [
        [run.input_tokens for run in mine if run.input_tokens is not None],
        [run.output_tokens for run in mine if run.output_tokens is not None],
    ]
    days = sorted({day for run in mine if run.started_unix and (day := _day(run.started_unix))})
    return {
        "name": clean(method),
        "what": clean(str((header.get("methods") or {}).get(method, ""))),
        "llm": _list(sorted({clean(run.llm) for run in mine if run.llm})) or NONE,
        "runs": len(mine),
        "prompts": f"{prompts:,}" if prompts else NONE,
        "tokens": ", ".join(f"{sum(some):,}" if some else NONE for some in counts) if any(counts) else NONE,
        "cost": clean(str((header.get("costs") or {}).get(method, NONE))),
        "when": " to ".join(dict.fromkeys([days[0], days[-1]])) if days else NONE,
    }


def _facts(given: object) -> list[tuple[str, str]]:
    if not isinstance(given, Mapping):
        return []
    return [(clean(str(name)), clean(str(value))) for name, value in given.items() if value not in (None, "")]


# --- numbers and words -----------------------------------------------------------------------


def _number(value: float | None) -> str:
    """Four significant digits without an exponent; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    decimals = min(max(3 - math.floor(math.log10(abs(value))), 0), 9) if value else 0
    return f"{value:,.{decimals}f}"


def _plain(value: float | None) -> str:
    """What a table is sorted by; empty where there is no number."""
    return "" if value is None or not math.isfinite(value) else f"{value:.9g}"


def _between(low: float | None, high: float | None, *, decimals: int | None = None) -> str:
    """`4.1 to 6.3`; empty where an end is not known."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return " to ".join(_number(end) if decimals is None else f"{end:.{decimals}f}" for end in (low, high))


def _count(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _day(unix: object) -> str:
    if not isinstance(unix, int | float) or not math.isfinite(unix):
        return ""
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d")
