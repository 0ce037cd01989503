import math
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from xml.etree.ElementTree import fromstring

import comparisons
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner import figures
from tuner.convergence import analyse
from tuner.runs import Problem, Run, Step

FEW = ("rules", "sobol", "tpe")
NASTY = "<script>alert(1)</script>$\\frac{x}$\x1b[31m\x00"


@pytest.fixture(scope="module")
def many():
    of = comparisons.problems(12)
    runs = comparisons.runs(of, seeds=4)
    return of, runs, analyse(of, runs, bootstrap=100)


@pytest.fixture(scope="module")
def one():
    of = comparisons.problems(1)
    runs = comparisons.runs(of, FEW, seeds=8)
    return of, runs, analyse(of, runs, bootstrap=100)


def drawn(comparison):
    of, runs, analysis = comparison
    return {
        "progress": figures.progress_figure(analysis),
        "converged": figures.converged_figure(analysis),
        "each": figures.converged_figure(analysis, analysis.targets[0]),
        "throughput": figures.throughput_figure(of, runs, analysis),
        "heat": figures.heat_figure(analysis),
        "differences": figures.differences_figure(analysis),
    }


def words(figure):
    return " ".join(parsed(figures.svg(figure, "f")).itertext())


def parsed(text):
    return fromstring(text)  # noqa: S314  # drawn by us


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in bytes_of(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def bytes_of(colour):
    return [value / 255 for value in bytes.fromhex(colour[1:])]


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# --- looks -----------------------------------------------------------------------------------


def test_no_two_of_64_methods_look_the_same_in_grey():
    style = figures.looks([f"m{k}" for k in range(64)]).values()
    assert len({(str(look.dash), look.colour) for look in style}) == 64
    assert len({(look.marker, look.colour) for look in style}) == 64
    first = list(style)[:8]
    assert len({str(look.dash) for look in first}) == len({look.marker for look in first}) == 8


@pytest.mark.parametrize(("colours", "page"), [(figures.COLOURS, "#ffffff"), (figures.DARK_COLOURS, "#15171a")])
def test_every_method_stands_out_from_the_page_as_wcag_asks_of_graphics(colours, page):
    assert all(contrast(colour, page) >= 3 for colour in colours if colour != figures.INK)


@pytest.mark.parametrize("colour", [figures.INK, figures.MUTED])
def test_text_stands_out_from_white_as_wcag_asks_of_text(colour):
    assert contrast(colour, "#ffffff") >= 4.5


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_the_number_in_a_cell_can_be_read_on_every_shade(shade):
    colour = "#" + bytes(round(255 * part) for part in shade).hex()
    assert contrast(figures._readable((*bytes_of(colour), 1.0)), colour) >= 4.5


# --- what is drawn ---------------------------------------------------------------------------


@pytest.mark.parametrize("figure", ["progress", "converged", "each", "throughput", "heat", "differences"])
def test_every_method_is_named_in_every_figure(many, figure):
    said = words(drawn(many)[figure])
    assert [method for method in comparisons.METHODS if method not in said] == []


@pytest.mark.parametrize("figure", ["progress", "each", "throughput", "heat"])
def test_every_problem_is_named_in_full_where_there_is_a_panel_or_a_line_for_it(many, figure):
    said = words(drawn(many)[figure]).replace(" ", "")
    assert [name for name in comparisons.NAMES if name not in said] == []


@pytest.mark.parametrize("comparison", ["many", "one"])
def test_no_text_lies_over_another_and_none_leaves_the_figure(comparison, request):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for name, figure in drawn(request.getfixturevalue(comparison)).items():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        shown = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
        boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in shown]
        edge = figure.bbox.padded(1)
        for text, box in boxes:
            assert edge.x0 <= box.x0 <= box.x1 <= edge.x1, (name, text)
            assert edge.y0 <= box.y0 <= box.y1 <= edge.y1, (name, text)
        for k, (text, box) in enumerate(boxes):
            inner = box.padded(-1)
            assert [(name, text, other) for other, its in boxes[k + 1 :] if inner.overlaps(its)] == []


def test_text_is_at_least_eight_points(many):
    from matplotlib.text import Text

    sizes = {t.get_fontsize() for figure in drawn(many).values() for t in figure.findobj(Text) if t.get_text().strip()}
    assert min(sizes) >= 8


def test_many_methods_get_bars_and_few_get_bands(many, one):
    def gids(comparison):
        return [a.get_gid() or "" for a in figures.progress_figure(comparison[2]).findobj()]

    assert any(gid.endswith(" bar") for gid in gids(many))
    assert not any(gid.endswith(" bar") for gid in gids(one))
    bands = [a for a in figures.progress_figure(one[2]).findobj() if (a.get_gid() or "").endswith(" band")]
    assert [band.get_alpha() for band in bands] == [0.14] * len(FEW)


def test_a_median_begins_where_more_than_half_of_the_runs_have_something_within_the_limits():
    of = comparisons.problem("p")
    runs = [late(of, "sobol", seed, first) for seed, first in enumerate([0, 2, 2, 4, 4])]
    figure = figures.progress_figure(analyse([of], runs, bootstrap=100))
    (line,) = [a for a in figure.axes[0].lines if a.get_gid() == "m0 line"]
    assert min(line.get_xdata()) == 2


def late(of, method, seed, first):
    joules = of.best_joules_per_unit
    steps = [Step(number=n, config={"n": n}, joules_per_unit=joules * (9 - n), feasible=n >= first) for n in range(6)]
    return Run(problem=of.name, method=method, seed=seed, steps=tuple(steps), budget=5)


def test_nothing_within_the_limits_is_said_and_not_drawn():
    of = comparisons.problem("p")
    runs = [late(of, method, seed, 99) for method in FEW for seed in range(3)]
    analysis = analyse([of], runs, bootstrap=100)
    assert "nothing within the limits was found" in words(figures.progress_figure(analysis))
    assert "no throughput was recorded" in words(figures.throughput_figure([of], runs, analysis))


def test_a_method_without_a_run_on_a_problem_has_an_empty_cell():
    of = comparisons.problems(2)
    runs = [r for r in comparisons.runs(of, FEW, seeds=3) if (r.problem, r.method) != (of[0].name, "tpe")]
    assert "no run" in words(figures.heat_figure(analyse(of, runs, bootstrap=100)))


def test_one_method_has_figures_too():
    of = comparisons.problems(1)
    runs = comparisons.runs(of, ("sobol",), seeds=3)
    assert all("<svg" in figures.svg(figure, name) for name, figure in drawn((of, runs, analyse(of, runs))).items())


def test_with_very_many_methods_only_pairs_with_the_best_are_drawn():
    of = comparisons.problems(1)
    methods = [f"method-{k}" for k in range(11)]
    analysis = analyse(of, comparisons.runs(of, methods, seeds=6, budget=4), bootstrap=100)
    labels = [t.get_text() for t in figures.differences_figure(analysis).axes[0].get_yticklabels()]
    assert len(labels) == 10
    assert all(label.startswith(f"{figures.ranked(analysis)[0]} ") for label in labels)


# --- throughput ------------------------------------------------------------------------------

positive = st.floats(0.1, 1e3)


@given(st.lists(st.tuples(positive, positive), max_size=30))
def test_nothing_beats_the_pareto_front_and_everything_else_is_beaten_or_matched(points):
    front = figures.pareto(points)
    for speed, joules in points:
        assert any(s >= speed and j <= joules for s, j in front)
    for one in front:
        assert not any(s >= one[0] and j <= one[1] and (s, j) != one for s, j in points)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((), None),
        (("p95_itl_ms<=124.5",), None),
        (("batch_latency_s<=9.4", "throughput_images_per_sec>=0.351504"), 0.351504),
        (("output_throughput_tokens_per_sec >= 1e3",), 1000.0),
        (("throughput_images_per_sec<=3",), None),
        (("throughput>=many",), None),
    ],
)
def test_the_limit_is_a_line_where_it_is_on_throughput(limits, expected):
    assert figures.least_throughput(Problem(name="p", limits=limits)) == expected


def test_a_row_that_many_runs_measured_is_one_point(one):
    _, runs, _ = one
    rows = figures.measured_rows(runs)
    assert len(rows) == len({s.config["row"] for r in runs for s in r.steps if s.units_per_second})


def test_the_picks_of_a_method_are_what_its_runs_would_use(one):
    _, runs, _ = one
    mine = [run for run in runs if run.method == "rules"]
    best = [
        min((s for s in run.steps if s.feasible), key=lambda s: (s.joules_per_unit, s.number)).config["row"]
        for run in mine
    ]
    assert figures.picks(mine) == {(("row", repr(row)),): best.count(row) for row in set(best)}


@pytest.mark.parametrize(
    ("value", "text"), [(0.25, "0.25"), (400.0, "400"), (12000.0, "12k"), (2e6, "2M"), (3e9, "3G")]
)
def test_a_tick_is_short(value, text):
    assert figures._short(value) == text


# --- names -----------------------------------------------------------------------------------


@given(st.text(), st.integers(4, 40), st.integers(1, 3))
def test_a_name_fits_its_room(name, characters, lines):
    shown = figures.shortened(name, characters, lines)
    assert 1 <= len(shown) <= lines
    assert all(len(line) <= characters for line in shown)


def test_a_name_that_fits_is_whole():
    assert "".join(figures.shortened("image-chat-vl-235b-a22b", 12, 2)) == "image-chat-vl-235b-a22b"


def test_a_name_with_markup_dollars_and_control_characters_is_text():
    of = [replace(comparisons.problem("p"), name=NASTY)]
    runs = [replace(comparisons.run(comparisons.problem("p"), "sobol", seed), problem=NASTY) for seed in range(3)]
    runs += [replace(run, method="<b>&\"'$x$") for run in runs]
    for figure in drawn((of, runs, analyse(of, runs, bootstrap=100))).values():
        text = figures.svg(figure, "f")
        assert "<script" not in text
        assert "<b>" not in text
        parsed(text)


def test_a_name_in_a_script_that_the_font_lacks_is_drawn_without_a_word(capfd):
    of = [replace(comparisons.problem("p"), name="能效")]
    runs = [replace(comparisons.run(comparisons.problem("p"), "索博尔", seed), problem="能效") for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = words(figures.progress_figure(analyse(of, runs, bootstrap=100)))
    assert "能效" in text
    assert "索博尔" in text
    assert capfd.readouterr().err == ""


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
def test_a_figure_is_a_file_of_each_format_and_the_same_bytes_each_time(one, kind, start):
    first, second = (figures.image(figures.progress_figure(one[2]), kind) for _ in range(2))
    assert first.startswith(start)
    assert first == second


def test_a_png_has_no_background(one):
    import io

    from matplotlib.image import imread

    pixels = imread(io.BytesIO(figures.image(figures.progress_figure(one[2]), "png")))
    assert pixels[0, -1, 3] == 0


@pytest.mark.parametrize("figure", ["progress", "converged", "each", "throughput", "heat", "differences"])
def test_an_svg_has_no_background_and_reads_its_colours_from_the_page(many, figure):
    text = figures.svg(drawn(many)[figure], "f")
    assert "currentColor" in text
    assert "background" not in text
    # What a variable falls back to stands behind a comma.
    assert not re.search(r"(?<!, )#(?:fefefe|1b1c1e|62666c|d3d6da)", text)
    assert not re.search(r"<(?:path|rect|use)[^>]*#ffffff", text)


def test_the_ids_of_two_figures_of_a_page_never_meet(one):
    figure = figures.progress_figure(one[2])
    first, second = (set(re.findall(r'\bid="([^"]+)"', figures.svg(figure, name))) for name in ("a", "b"))
    assert first
    assert not first & second


def test_what_an_svg_refers_to_is_in_it(many):
    for name, figure in drawn(many).items():
        text = figures.svg(figure, name)
        assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', text)) <= set(re.findall(r'\bid="([^"]+)"', text))


def test_a_compacted_path_goes_through_the_same_points():
    assert figures.compact("M 1 2 L 3 2 L 3 2 L 3 4.04 L 5 6 z") == "M1 2H3V4L5 6z"
    assert figures.compact("M 0 0 C 1 1 2 2 3 3 L 3 5") == "M0 0C1 1 2 2 3 3V5"


def test_a_users_matplotlib_settings_change_nothing(one):
    import matplotlib as mpl

    plain = figures.image(figures.progress_figure(one[2]), "svg")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert figures.image(figures.progress_figure(one[2]), "svg") == plain
        assert mpl.rcParams["font.size"] == 30


def test_matplotlib_is_loaded_only_for_drawing():
    code = "import sys, tuner.figures, tuner.page; print('matplotlib' in sys.modules, 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


def test_a_band_is_finite(many):
    for axes in figures.progress_figure(many[2]).axes:
        for path in (p for c in axes.collections for p in c.get_paths()):
            assert all(math.isfinite(v) for v in path.vertices.ravel())
