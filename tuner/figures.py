"""What a comparison looks like: figures drawn once for the page, for print and for slides.

A method has one colour, one dash and one marker, the same in every figure, so that a figure printed in
grey can still be read. The hues are those of M. Okabe and K. Ito (Color Universal Design, 2008); on white,
orange, sky blue and yellow are darkened until they stand out 3:1 (WCAG 2.2, 1.4.11). An SVG keeps its text
as text and has no background.

Nothing is drawn that was not measured: a run that failed ends where it failed, and a median begins
where more than half of the runs have found a configuration within the limits.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from tuner.convergence import Analysis, Cell, Comparison, Target, incumbents
from tuner.runs import Problem, Run, Step
from tuner.summary import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

WIDTH_INCHES = 7.5
"""So wide that A4 with margins of 10 mm prints it at its own size."""

POINTS = 8.5
"""Size of all text."""

INK, MUTED, RULE, PAPER = "#1b1c1e", "#62666c", "#d3d6da", "#fefefe"
"""Text; axes and what explains; grid; what lies behind. A page puts colours of its own in their place."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#bf7e00", "#2a8fcc", INK, "#8a7f00")
"""Of the methods, on white."""

DARK_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, "#f0e442")
"""Of the methods, on a dark page."""

DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1.2)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (9, 2)),
    (0, (2.5, 1)),
    (0, (1, 3)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

Key = tuple[tuple[str, str], ...]
"""A configuration as something that can be counted."""


class Look(NamedTuple):
    """How one method is drawn everywhere."""

    number: int
    colour: str
    dash: Any
    marker: str


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """One look a method, in their order. Up to 64 methods no two share dash and colour, nor marker and colour."""
    n = len(COLOURS)
    return {
        method: Look(k, COLOURS[k % n], DASHES[(k + k // n) % n], MARKERS[(k + 3 * (k // n)) % n])
        for k, method in enumerate(dict.fromkeys(methods))
    }


# --- over the proposals ----------------------------------------------------------------------

MOST_BANDS = 4
"""With more methods, bands lie over each other until nothing can be read: bars after the last proposal say the same."""


def progress_figure(analysis: Analysis) -> Figure:
    """Energy of what a method would pick over the least, after each proposal: median and middle half of the runs.

    One panel a problem, on a logarithmic scale; dotted lines where the targets within a share of the best lie.
    """
    style = looks(analysis.methods)
    rows: list[str | None] = [*([None] if analysis.overall else []), *analysis.problems]
    with _drawing():
        figure, panels = _panels(
            [_title(name) for name in rows], _method_handles(style), below="proposals", beside="energy over the least"
        )
        for axes, name in zip(panels, rows, strict=True):
            cells = [cell for m in style if (cell := analysis.cell(name, m, analysis.targets[0]))]
            _progress(axes, cells, [t.value for t in analysis.targets if t.kind == "within"], style)
    return figure


def _progress(axes: Axes, cells: Sequence[Cell], shares: Sequence[float], style: Mapping[str, Look]) -> None:
    medians = [1 + r.median for cell in cells for r in cell.regrets if r.median is not None]
    if not medians:
        _say(axes, "nothing within the limits was found, or the best is not known")
        return
    # The upper quartile of a few bad starts would press everything else onto the axis: it is cut.
    top = max(*medians, 1.2) * 1.08
    last = max(cell.horizon for cell in cells)
    for place, cell in enumerate(cells):
        look = style[cell.method]
        known = [(r.proposals, 1 + r.median, r.low, r.high) for r in cell.regrets if r.median is not None]
        number = [n for n, *_ in known]
        low = [top if r is None else 1 + r for _, _, r, _ in known]
        high = [top if r is None else min(1 + r, top) for *_, r in known]
        _band(axes, number, low, high, look, shown=len(style) <= MOST_BANDS)
        _steps(axes, number, [middle for _, middle, _, _ in known], look, last)
        if len(style) > MOST_BANDS and known and number[-1] == cell.horizon:
            at = last * (1.05 + 0.03 * place)
            axes.plot([at, at], [low[-1], high[-1]], color=look.colour, linewidth=1.6, gid=f"m{look.number} bar")
            axes.plot(
                [at],
                [known[-1][1]],
                linestyle="",
                marker=look.marker,
                markersize=3.6,
                color=look.colour,
                markeredgewidth=0,
                gid=f"m{look.number} bar",
            )
    axes.set_yscale("log")
    axes.set_ylim(0.98, top)
    _ticks(axes.yaxis, 1.0, top, RATIOS, lambda value: f"{value:g}×")
    for share in shares:
        axes.axhline(1 + share, color=MUTED, linewidth=0.7, linestyle=LIMIT_DASH, zorder=1)
    _count_axis(axes, last, 0.05 + 0.03 * len(cells) if len(style) > MOST_BANDS else 0)


def converged_figure(analysis: Analysis, target: Target | None = None) -> Figure:
    """Share of the runs that got to the target, over the proposals (one minus Kaplan and Meier's curve).

    Of one target, a panel for each problem; without one, a panel for each target, over all problems.
    """
    style = looks(analysis.methods)
    if target is None:
        rows = [(None if analysis.overall else name, one) for one in analysis.targets for name in analysis.problems[:1]]
        titles = [one.name for _, one in rows]
    else:
        rows = [(name, target) for name in analysis.problems]
        titles = [_title(name) for name, _ in rows]
    with _drawing():
        figure, panels = _panels(titles, _method_handles(style), below="proposals", beside="share converged, %")
        for axes, (name, one) in zip(panels, rows, strict=True):
            cells = [cell for m in style if (cell := analysis.cell(name, m, one))]
            for cell in cells:
                look = style[cell.method]
                number = list(range(len(cell.curve)))
                if cell.curve_low and cell.curve_high:
                    _band(axes, number, cell.curve_low, cell.curve_high, look, shown=len(style) <= MOST_BANDS)
                _steps(axes, number, cell.curve, look, cell.horizon)
            axes.set_ylim(0, 1.02)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
            _count_axis(axes, max((cell.horizon for cell in cells), default=1))
    return figure


def _title(problem: str | None) -> str:
    return "all problems" if problem is None else problem


def _band(
    axes: Axes, x: Sequence[float], low: Sequence[float], high: Sequence[float], look: Look, *, shown: bool
) -> None:
    """Between two step curves. One that is not shown is there for the page, which shows it when it is pointed at."""
    axes.fill_between(
        x,
        low,
        high,
        step="post",
        color=look.colour,
        alpha=0.14 if shown else 0,
        linewidth=0,
        gid=f"m{look.number} band",
    )


# --- throughput against energy ---------------------------------------------------------------


def measured_rows(runs: Sequence[Run]) -> dict[Key, Step]:
    """Each configuration that some run measured, once; without those that have no joules or no throughput."""
    found: dict[Key, Step] = {}
    for run in runs:
        for step in run.steps:
            if _joules(step) and step.units_per_second:
                found.setdefault(_key(step), step)
    return found


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (throughput, joules) that no other beats in one and matches in the other, by falling throughput."""
    front: list[tuple[float, float]] = []
    for speed, joules in sorted(points, key=lambda point: (-point[0], point[1])):
        if not front or joules < front[-1][1]:
            front.append((speed, joules))
    return front


def picks(runs: Sequence[Run]) -> Counter[Key]:
    """How many runs ended with each configuration as the one they would pick."""
    last = ((run, incumbents(run)[-1:]) for run in runs)
    return Counter(_key(run.steps[at[0]]) for run, at in last if at and at[0] is not None)


def least_throughput(problem: Problem) -> float | None:
    """Units a second that the problem's limits ask for; None where they ask for none."""
    asked = (re.fullmatch(r"\s*\w*throughput\w*\s*>=\s*(\d[\d.eE+-]*)\s*", limit) for limit in problem.limits)
    return next((float(found[1]) for found in asked if found), None)


def throughput_figure(problems: Sequence[Problem], runs: Sequence[Run], analysis: Analysis) -> Figure:
    """Throughput against energy of every row that was measured, and the row that each method ended with most often.

    Where several methods ended with one row, their markers stand around it.
    """
    style = looks(analysis.methods)
    shown = [one for one in problems if one.name in analysis.problems]
    with _drawing():
        rows = [
            *_method_handles(style, dashes=False),
            _handle("measured row", marker="o", markersize=3, color=MUTED, linestyle=""),
            _handle("outside the limits", marker="o", markersize=3, color=MUTED, linestyle="", fillstyle="none"),
            _handle("Pareto front", color=MUTED),
            _handle("limit on throughput", color=INK, linewidth=1, linestyle=LIMIT_DASH),
        ]
        figure, panels = _panels([one.name for one in shown], rows, labelled=True)
        for axes, one in zip(panels, shown, strict=True):
            axes.set_xlabel(f"throughput ({one.unit}s/s)", labelpad=1)
            axes.set_ylabel(f"J/{one.unit}", labelpad=1)
            _throughput(axes, one, [run for run in runs if run.problem == one.name], style)
    return figure


LIMIT_DASH = (0, (2, 1.5))


def _throughput(axes: Axes, problem: Problem, runs: Sequence[Run], style: Mapping[str, Look]) -> None:
    rows = measured_rows(runs)
    at = {key: (step.units_per_second or 0.0, _joules(step) or 0.0) for key, step in rows.items()}
    if not rows:
        _say(axes, "no throughput was recorded")
        return
    axes.set_xscale("log")
    axes.set_yscale("log")
    for feasible, fill in ((False, "none"), (True, "full")):
        some = [at[key] for key, step in rows.items() if step.feasible is feasible]
        axes.plot(
            [speed for speed, _ in some],
            [joules for _, joules in some],
            linestyle="",
            marker="o",
            markersize=2.6,
            markeredgewidth=0.6,
            color=MUTED,
            fillstyle=fill,
            alpha=0.7,
        )
    front = pareto([at[key] for key, step in rows.items() if step.feasible])
    axes.step([speed for speed, _ in front], [joules for _, joules in front], where="post", color=MUTED, linewidth=1)
    limit = least_throughput(problem)
    speeds = [speed for speed, _ in at.values()]
    if limit is not None and limit > 0:
        axes.axvline(limit, color=INK, linewidth=1, linestyle=LIMIT_DASH)
        speeds.append(limit)
    for axis, place, values in (
        (axes.xaxis, axes.set_xlim, speeds),
        (axes.yaxis, axes.set_ylim, [j for _, j in at.values()]),
    ):
        # Room below for the markers that stand around the best row.
        low, high = min(values) / 1.3, max(values) * 1.12
        place(low, high)
        _ticks(axis, low, high, None, _short)
    beside: Counter[Key] = Counter()
    for method, look in style.items():
        for key, _ in picks([run for run in runs if run.method == method]).most_common(1):
            if key in at:
                _pick(axes, at[key], look, beside[key])
                beside[key] += 1


def _pick(axes: Axes, at: tuple[float, float], look: Look, nth: int) -> None:
    """A method's marker on its row, or beside those that are there already."""
    from matplotlib.transforms import ScaledTranslation

    turn, radius = math.radians(60 * (nth - 1) + 90), 0 if nth == 0 else 7 if nth <= 6 else 14
    figure = axes.figure
    assert figure is not None
    moved = ScaledTranslation(radius * math.cos(turn) / 72, radius * math.sin(turn) / 72, figure.dpi_scale_trans)
    axes.plot(
        [at[0]],
        [at[1]],
        transform=axes.transData + moved,
        linestyle="",
        marker=look.marker,
        markersize=_size(look.marker),
        color=look.colour,
        markeredgecolor=PAPER,
        markeredgewidth=0.6,
        zorder=5,
        clip_on=False,
        gid=f"m{look.number} pick",
    )


def _size(marker: str) -> float:
    """Points, so that all look equally large."""
    return {"*": 8.5, "D": 5.0, "o": 5.5, "s": 5.5}.get(marker, 6.0)


def _joules(step: Step) -> float | None:
    return step.joules_per_unit if step.true_joules_per_unit is None else step.true_joules_per_unit


def _key(step: Step) -> Key:
    return tuple(sorted((name, repr(value)) for name, value in step.config.items()))


# --- methods against each other --------------------------------------------------------------


def heat_figure(analysis: Analysis, target: Target | None = None) -> Figure:
    """Restricted mean of the proposals to a target: problems x methods, the least of each problem in bold."""
    target = target or analysis.targets[0]
    rows: list[str | None] = [*analysis.problems, *([None] if analysis.overall else [])]
    cells = {(row, m): analysis.cell(row, m, target) for row in rows for m in analysis.methods}
    most = max((cell.horizon for cell in cells.values() if cell), default=1) or 1
    columns = [_wrapped(method, 11) for method in analysis.methods]
    with _drawing():
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        beside, each, line = 2.5, min((WIDTH_INCHES - 2.5) / max(len(columns), 1), 0.9), 0.3
        head, foot = max((len(lines) for lines in columns), default=1) * 0.14 + 0.12, 0.52
        apart = 0.25  # of a line, between the problems and what is over all of them
        tall = len(rows) + (apart if analysis.overall else 0)
        width, height = beside + each * len(columns), head + tall * line + foot
        figure = Figure(figsize=(max(width, 5.6), height))
        across = max(width, 5.6)
        axes = figure.add_axes((beside / across, foot / height, (width - beside) / across, tall * line / height))
        axes.set(xlim=(0, len(columns)), ylim=(tall, 0), yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labeltop=True, labelbottom=False, pad=3)
        axes.set_xticks([k + 0.5 for k in range(len(columns))], ["\n".join(lines) for lines in columns])
        scale = mpl.colormaps["YlGnBu_r"]
        for k, row in enumerate(rows):
            y = k + (apart if row is None else 0)
            label = "\n".join(shortened(_title(row), _characters(beside - 0.2), 2))
            axes.text(-0.08 * 0.9 / each, y + 0.5, label, ha="right", va="center", linespacing=1.0)
            here = [cell.mean for m in analysis.methods if (cell := cells[row, m])]
            for column, method in enumerate(analysis.methods):
                cell = cells[row, method]
                if cell is None:
                    axes.text(column + 0.5, y + 0.5, "no run", ha="center", va="center", color=MUTED)
                    continue
                shade = scale(min(cell.mean / most, 1.0))
                axes.add_patch(
                    Rectangle(
                        (column + 0.015, y + 0.03), 0.97, 0.94, facecolor=shade, linewidth=0, gid=f"m{column} cell"
                    )
                )
                axes.text(
                    column + 0.5,
                    y + 0.5,
                    f"{cell.mean:.1f}",
                    ha="center",
                    va="center",
                    color=_readable(shade),
                    weight="bold" if round(cell.mean, 1) == round(min(here), 1) else "normal",
                )
        bar = figure.add_axes((beside / across, 0.3 / height, min(2.2, width - beside) / across, 0.1 / height))
        bar.bar(
            [(k + 0.5) * most / 50 for k in range(50)],
            1,
            width=most / 50 * 1.05,
            color=[scale(k / 49) for k in range(50)],
        )
        bar.set(yticks=[], xticks=[0, most / 2, most], xlim=(0, most), ylim=(0, 1))
        bar.spines[:].set_visible(False)
        bar.set_xticklabels([f"{value:g}" for value in (0, most / 2, most)])
        bar.grid(visible=False)
        figure.text(
            (beside + min(2.2, width - beside) + 0.15) / across, 0.35 / height, "proposals", ha="left", va="center"
        )
    return figure


def _wrapped(method: str, characters: int) -> list[str]:
    return shortened(method, characters, 3)


def _readable(shade: tuple[float, float, float, float]) -> str:
    """Of almost black and almost white, the one that stands out more (WCAG 2.2's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shade[:3]]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#000000" if luminance > 0.179 else "#ffffff"


MOST_PAIRS = 45


def differences_figure(analysis: Analysis) -> Figure:
    """Paired differences of the proposals to convergence between methods, with their 95 % intervals.

    Over all problems where there are several. Filled: told apart. The method with the least mean comes first;
    with more than `MOST_PAIRS` pairs, only those with that method are drawn.
    """
    over_all = bool(analysis.overall)
    shown = [c for c in analysis.comparisons if (c.problem is None) is over_all]
    order = ranked(analysis)
    pairs = [(a, b) for k, a in enumerate(order) for b in order[k + 1 :]]
    if len(pairs) > MOST_PAIRS:
        pairs = [pair for pair in pairs if order[0] in pair]
    found = {(c.target, frozenset((c.method, c.other))): c for c in shown}
    with _drawing():
        from matplotlib.figure import Figure

        names = [" − ".join(shortened(m, 16)[0] for m in pair) for pair in pairs] or ["no two methods"]
        beside = min(max(map(len, names)) * POINTS * 0.57 / 72 + 0.2, 3.2)
        line, head, foot, gap = 0.18, 0.26, 0.5, 0.2
        height = head + max(len(pairs), 1) * line + foot
        each = (WIDTH_INCHES - beside - 0.1 - gap * (len(analysis.targets) - 1)) / len(analysis.targets)
        figure = Figure(figsize=(WIDTH_INCHES, height))
        for k, target in enumerate(analysis.targets):
            left = beside + k * (each + gap)
            axes = figure.add_axes(
                (left / WIDTH_INCHES, foot / height, each / WIDTH_INCHES, (height - head - foot) / height)
            )
            axes.set_title(target.name, loc="left", pad=4)
            axes.axvline(0, color=INK, linewidth=0.8)
            axes.set_ylim(max(len(pairs), 1) - 0.4, -0.6)
            axes.set_yticks(range(len(names)), names if k == 0 else [""] * len(names))
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False, axis="y")
            axes.spines["left"].set_visible(False)
            for y, (first, second) in enumerate(pairs):
                if comparison := found.get((target, frozenset((first, second)))):
                    _difference(axes, y, comparison, first)
            low, high = axes.get_xlim()
            axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= high])
            axes.set_xlim(low, high)
        figure.text(
            (beside + (WIDTH_INCHES - 0.1 - beside) / 2) / WIDTH_INCHES,
            0.04 / height,
            "difference in proposals (below 0: the first needs fewer)",
            ha="center",
            va="bottom",
        )
    return figure


def ranked(analysis: Analysis) -> list[str]:
    """The methods by their restricted mean to the first target: over all problems, or on the only one."""
    target = analysis.targets[0]
    where = None if analysis.overall else next(iter(analysis.problems), None)
    means = {m: cell.mean for m in analysis.methods if (cell := analysis.cell(where, m, target))}
    return sorted(analysis.methods, key=lambda m: (means.get(m, math.inf), m))


def _difference(axes: Axes, y: float, comparison: Comparison, first: str) -> None:
    sign = 1 if comparison.method == first else -1
    if comparison.difference is None:
        return
    if comparison.low is not None and comparison.high is not None:
        axes.plot([sign * comparison.low, sign * comparison.high], [y, y], color=INK, linewidth=1.2)
    axes.plot(
        [sign * comparison.difference],
        [y],
        marker="o",
        markersize=4.2,
        color=INK,
        markerfacecolor=INK if comparison.distinct else PAPER,
        markeredgewidth=0.9,
    )


# --- the parts of a figure -------------------------------------------------------------------

LEGEND_LINE_INCHES = 0.17

RATIOS = (1, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


@contextmanager
def _drawing() -> Iterator[None]:
    """With none of this user's settings of matplotlib, and without a word on standard error."""
    import matplotlib as mpl

    fonts = logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    with warnings.catch_warnings(), mpl.rc_context():
        # A name in a script that the font lacks: the reader of an SVG has other fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        fonts.setLevel(logging.ERROR)
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "font.family": "sans-serif",
                "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
                "font.size": POINTS,
                **dict.fromkeys(("axes.titlesize", "axes.labelsize", "legend.fontsize"), POINTS),
                **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), POINTS),
                **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
                **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
                **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
                **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2.5),
                **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
                **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": RULE,
                "grid.linewidth": 0.5,
                "legend.frameon": False,
                "lines.linewidth": 1.3,
                # A dollar in somebody's name is a dollar.
                "text.parse_math": False,
                "svg.fonttype": "none",
                "svg.hashsalt": "tune",
                "pdf.fonttype": 42,
            }
        )
        try:
            yield
        finally:
            fonts.setLevel(level)


def _panels(
    names: Sequence[str],
    legend: Sequence[Line2D],
    *,
    below: str = "",
    beside: str = "",
    labelled: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Axes for each name, three in a line, all sizes in inches so that no text meets another.

    `labelled`: whether each panel has labels on its axes, instead of one pair for all.
    """
    from matplotlib.figure import Figure

    columns = min(len(names), 3) or 1
    lines = max(math.ceil(len(names) / columns), 1)
    width, height = {1: (5.6, 2.6), 2: (WIDTH_INCHES, 1.9)}.get(columns, (WIDTH_INCHES, 1.4 if lines < 5 else 1.1))
    left, gap, right = 0.62, 0.7 if labelled else 0.56, 0.12
    under, foot = (0.46, 0.0) if labelled else (0.26, 0.2)
    each = (width - left - right - gap * (columns - 1)) / columns
    titles = [shortened(name, _characters(each), 2) for name in names]
    heads = [0.09 + 0.135 * max(map(len, titles[at : at + columns])) for at in range(0, len(names), columns)] or [0.0]
    top, legend_columns = _legend_size(legend, width - left)
    total = top + sum(heads) + lines * (height + under) + foot
    figure = Figure(figsize=(width, total))
    drawn = figure.legend(
        handles=list(legend),
        loc="upper left",
        bbox_to_anchor=(left / width, 1 - 0.04 / total),
        ncols=legend_columns,
        borderaxespad=0,
        borderpad=0,
        handlelength=3,
        columnspacing=1.5,
        labelspacing=0.3,
    )
    for handle, text, shown in zip(legend, drawn.get_texts(), drawn.legend_handles, strict=True):
        if gid := handle.get_gid():
            text.set_gid(f"{gid} legend-text")
            if shown is not None:
                shown.set_gid(f"{gid} legend-line")
    made = []
    for k, title in enumerate(titles):
        line, column = divmod(k, columns)
        x = left + column * (each + gap)
        y = total - top - sum(heads[: line + 1]) - line * (height + under) - height
        axes = figure.add_axes((x / width, y / total, each / width, height / total))
        axes.set_title("\n".join(title), loc="left", pad=4, linespacing=1.05)
        made.append(axes)
    if below:
        figure.text((left + (width - left - right) / 2) / width, 0.03 / total, below, ha="center", va="bottom")
    if beside:
        figure.text(0.06 / width, (total - top) / 2 / total, beside, ha="left", va="center", rotation="vertical")
    return figure, made


def _legend_size(legend: Sequence[Line2D], inches: float) -> tuple[float, int]:
    """Height in inches, and how many columns fit; they are filled downwards."""
    widths = [len(str(handle.get_label())) * POINTS * 0.6 / 72 + 0.62 for handle in legend]
    for columns in range(len(widths), 0, -1):
        lines, longer = divmod(len(widths), columns)
        ends = [column * lines + min(column, longer) for column in range(columns + 1)]
        if sum(max(widths[a:b]) for a, b in pairwise(ends)) <= inches or columns == 1:
            return (lines + (longer > 0)) * LEGEND_LINE_INCHES + 0.14, columns
    return 0.0, 1


def _method_handles(style: Mapping[str, Look], *, dashes: bool = True) -> list[Line2D]:
    return [
        _handle(
            shortened(method, 32)[0],
            color=look.colour,
            marker=look.marker,
            linestyle=look.dash if dashes else "",
            markersize=4 if dashes else _size(look.marker),
            gid=f"m{look.number}",
        )
        for method, look in style.items()
    ]


def _handle(label: str, **properties: Any) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **properties)


def _steps(axes: Axes, x: Sequence[float], y: Sequence[float], look: Look, last: int) -> None:
    """A step curve with few markers, which stand elsewhere for every method."""
    every = max(round(last / 4), 1)
    axes.step(
        x,
        y,
        where="post",
        color=look.colour,
        linestyle=look.dash,
        marker=look.marker,
        markersize=3.6,
        markeredgewidth=0,
        markevery=(look.number % every, every),
        gid=f"m{look.number} line",
    )


def _count_axis(axes: Axes, last: int, beyond: float = 0) -> None:
    """`beyond`: room after the last proposal, as a share."""
    axes.set_xlim(0, max(last, 1) * (1 + beyond))
    if beyond:
        axes.axvline(last, color=RULE, linewidth=0.6, zorder=1)
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if last / s <= 5), max(last // 5, 1))
    axes.set_xticks(range(0, last + 1, step))


def _ticks(
    axis: Axis, low: float, high: float, candidates: Sequence[float] | None, text: Callable[[float], str]
) -> None:
    """At most six labels on a logarithmic axis, none nearer to the next than a fifth of it."""
    from matplotlib.ticker import FixedLocator, NullLocator

    if candidates is None:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        finest = (1, 2, 5) if math.log10(high / low) > 0.75 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
        candidates = [first * 10.0**power for power in decades for first in finest]
    chosen: list[float] = []
    for value in candidates:
        if low <= value <= high and (not chosen or math.log(value / chosen[-1]) >= 0.19 * math.log(high / low)):
            chosen.append(value)
    axis.set_major_locator(FixedLocator(chosen))
    axis.set_minor_locator(NullLocator())
    axis.set_ticklabels([text(value) for value in chosen])


def _short(value: float) -> str:
    """`0.25`, `400`, `12k`."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if prefix == 'k' else size):g}{prefix}"
    return f"{value:g}"


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED, wrap=True)
    axes.set(xticks=[], yticks=[])


def _characters(inches: float) -> int:
    return int(inches * 72 / (POINTS * 0.57))


def shortened(name: str, characters: int, lines: int = 1) -> list[str]:
    """The name on so many lines at most, broken after `-`, `_`, `/` or a blank; its end is left out where it must."""
    broken = [""]
    for piece in re.findall(r"[^-_/ ]*[-_/ ]|[^-_/ ]+", clean(name) or "(no name)"):
        for part in (piece[at : at + characters] for at in range(0, len(piece), characters)):
            if len(broken[-1] + part.rstrip()) > characters:
                broken.append("")
            broken[-1] += part
    shown = [line.strip() for line in broken[:lines]]
    if len(broken) > lines:
        shown[-1] = f"{shown[-1][: characters - 1]}…"
    return shown


# --- files -----------------------------------------------------------------------------------


def image(figure: Figure, kind: str) -> bytes:
    """The figure as a file: `svg`, `pdf` or `png`, on nothing. The same figure gives the same bytes."""
    file = io.BytesIO()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with _drawing():
        figure.savefig(file, format=kind, dpi=200, transparent=True, metadata=dates[kind])
    return file.getvalue()


def svg(figure: Figure, name: str, label: str = "") -> str:
    """The figure as an element of a page, whose style sheet gives it its colours.

    `name`: what every id in it begins with, so that the figures of one page do not mix. The page sets
    `--muted`, `--rule`, `--paper` and `--m0` to `--m7`; without them the colours are those on white.
    """
    # Our own SVG of a line ago; ElementTree keeps names that hold markup as the text they are.
    root = ElementTree.fromstring(image(figure, "svg"))  # noqa: S314
    colours = {INK: "currentColor", MUTED: f"var(--muted, {MUTED})", RULE: f"var(--rule, {RULE})"}
    colours |= {PAPER: f"var(--paper, {PAPER})"}
    colours |= {c: f"var(--m{k}, {c})" for k, c in enumerate(COLOURS) if c != INK}
    _bare(root)
    referred = {one for element in root.iter() for value in element.attrib.values() for one in _REFERRED.findall(value)}
    for element in root.iter():
        gid = element.attrib.pop("id", "")
        if re.fullmatch(r"m\d+ .*", gid):
            element.set("class", f"method {gid}")
        elif gid in referred:
            element.set("id", f"{name}-{gid}")
        for attribute, value in element.items():
            if attribute == "href":
                element.set(attribute, value.replace("#", f"#{name}-", 1))
            elif attribute in ("style", "clip-path"):
                own = value.replace("url(#", f"url(#{name}-")
                element.set(attribute, re.sub(r"#[0-9a-f]{6}\b", lambda found: colours.get(found[0], found[0]), own))
            elif attribute == "d":
                element.set(attribute, compact(value))
            elif attribute in ("x", "y", "transform"):
                element.set(attribute, re.sub(r"(\.\d\d)\d+", r"\1", value))
    _share_styles(root, name)
    width, height = figure.get_size_inches()
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    # A third larger than in print: a screen is further away.
    root.set("style", f"width: {width * 96 * 1.3:.0f}px; aspect-ratio: {width:.3f} / {height:.3f}")
    root.set("role", "img")
    root.set("aria-label", clean(label) or name)
    return ElementTree.tostring(root, encoding="unicode")


_REFERRED = re.compile(r"(?:^|url\()#([^)]+)")


def compact(path: str) -> str:
    """The same line to a tenth of a point, less than anyone can see, with a step written as one number."""
    found: list[str] = []
    at: tuple[str, str] | None = None
    for command, numbers in re.findall(r"([A-Za-z])([^A-Za-z]*)", path):
        points = [f"{round(float(number), 1):g}" for number in numbers.split()]
        to = (points[-2], points[-1]) if len(points) >= 2 else None
        if command == "L" and to and at and (to[0] == at[0] or to[1] == at[1]):
            if to != at:
                found.append(f"V{to[1]}" if to[0] == at[0] else f"H{to[0]}")
        else:
            found.append(command + " ".join(points))
        at = to
    return "".join(found)


def _share_styles(root: ElementTree.Element, name: str) -> None:
    """Styles that occur often, said once: they are half of a figure with many points."""
    often = [style for style, count in Counter(e.get("style", "") for e in root.iter()).items() if style and count > 3]
    for element in root.iter():
        if (style := element.get("style", "")) in often:
            del element.attrib["style"]
            element.set("class", f"{element.get('class', '')} s{often.index(style)}".strip())
    sheet = ElementTree.Element("style")
    sheet.text = "".join(f"#{name}-figure .s{k}{{{style}}}" for k, style in enumerate(often))
    root.insert(0, sheet)
    root.set("id", f"{name}-figure")


def _bare(root: ElementTree.Element) -> None:
    """Without name spaces, which HTML gives by itself, and without what would act on the whole page."""
    for element in root.iter():
        for child in list(element):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                element.remove(child)
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.items()}
        if element.text and not element.text.strip():
            element.text = None
        if element.tail and not element.tail.strip():
            element.tail = None
