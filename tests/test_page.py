import html
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import browser
import comparisons
import pytest

from tuner import figures
from tuner.convergence import analyse
from tuner.page import _between, _number, page, write
from tuner.runs import Problem
from tuner.space import Refused

needs_browser = pytest.mark.skipif(
    browser.found() is None, reason="no Chromium here; install `chromium`, or name one in $CHROMIUM"
)

NASTY = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>{{ 7919 * 7 }}'&\"\x1b[31m"

HEADER = {
    "title": "Proposals to convergence",
    "command": "tune compare --table all --methods rules,sobol --seeds 4 --html report.html",
    "started_unix": 1_790_000_000.0,
    "machine": {"cpu": "Example CPU", "cores_logical": "2"},
    "versions": {"tune": "0.4.0", "python": "3.11.9"},
    "methods": {"rules": "an expert’s first moves", "enhanced": "a language model with the enhanced template"},
    "costs": {"enhanced": "1.20 USD"},
    "notes": ["largest is left out on one table: it has no limit"],
}


@pytest.fixture(scope="module")
def many():
    of = comparisons.problems(12)
    runs = comparisons.runs(of, seeds=4)
    return of, runs, analyse(of, runs, bootstrap=100)


@pytest.fixture(scope="module")
def text(many):
    return page(HEADER, *many)


@pytest.fixture(scope="module")
def small():
    of = comparisons.problems(1)
    runs = comparisons.runs(of, ("rules", "sobol", "tpe"), seeds=8)
    return page({}, of, runs, analyse(of, runs, bootstrap=100))


class Shape(HTMLParser):
    """Which elements there are, and whether each is closed."""

    VOID = frozenset({"meta", "br", "link", "img", "wbr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.words = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("href", "src") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


# --- what it says ----------------------------------------------------------------------------


def test_every_element_is_closed_and_no_id_is_used_twice(text, small):
    for one in (text, small):
        shape = Shape(one)
        assert shape.open == []
        assert len(shape.ids) == len(set(shape.ids))


def test_the_page_refers_to_nothing_but_itself(text):
    shape = Shape(text)
    assert all(link.startswith("#") and link[1:] in shape.ids for link in shape.links)
    assert not re.search(r"@import|url\((?!#)|https?:(?!//www\.w3)", text)


def test_it_names_methods_problems_limits_licences_machine_versions_models_and_the_command(text, many):
    said = html.unescape(" ".join(Shape(text).words))
    wanted = [
        *comparisons.METHODS,
        *comparisons.NAMES,
        "Apache-2.0",
        "Trust A",
        "Example CPU",
        "0.4.0",
        "example-chat-1",
    ]
    wanted += ["2026-09-21", "1.20 USD", "an expert’s first moves", "Example GPU x 8", "max_num_seqs"]
    flat = re.sub(r"_ ", "_", said)
    assert [word for word in wanted if word not in flat] == []
    assert " ".join(said.split()).find(HEADER["command"]) > 0


def test_every_assumption_note_and_conclusion_of_the_analysis_is_on_the_page(text, many):
    said = html.unescape(text)
    analysis = many[2]
    told = [c.sentence for c in analysis.comparisons if c.problem is None]
    assert [
        one for one in (*analysis.assumptions, *analysis.notes, *HEADER["notes"], *told) if one.rstrip(".") not in said
    ] == []


def test_no_number_that_is_none_is_shown(text, small):
    for one in (text, small):
        assert not re.search(r"\b(?:nan|inf|infinity|None|undefined)\b", " ".join(Shape(one).words), re.IGNORECASE)


def test_a_run_that_ended_early_is_listed_with_its_reason_and_marked_in_its_row():
    of = comparisons.problems(2)
    runs = comparisons.runs(of, ("enhanced", "sobol"), seeds=6)
    runs[0] = comparisons.run(of[0], "enhanced", 0, stop=3, error="the provider said 503 <later>")
    said = page({}, of, runs, analyse(of, runs, bootstrap=100))
    assert "the provider said 503 &lt;later&gt;" in said
    assert "1 incomplete" in said


def test_where_every_run_is_complete_it_says_so(text):
    assert "Every run went to its end." in text


def test_very_many_incomplete_runs_are_counted():
    of = comparisons.problems(1)
    runs = [comparisons.run(of[0], "enhanced", seed, stop=2, error="gone") for seed in range(120)]
    said = page({}, of, runs, analyse(of, runs, bootstrap=100))
    assert "And 20 more." in said


def test_what_the_header_does_not_hold_is_left_out(small):
    words = " ".join(Shape(small).words)
    assert "Machine" not in words
    assert "Versions" not in words
    assert "money" not in words


def test_a_comparison_without_a_run_is_a_page_that_says_so():
    of = comparisons.problems(1)
    assert "There is no run." in page({}, of, [], analyse(of, []))


def test_a_live_workload_whose_best_nobody_knows_has_a_page():
    table = comparisons.problem("p")
    of = [Problem(name="llama", kind="workload", facts={"machine": "this one", "meter": "rapl"})]
    runs = [replace(comparisons.run(table, m, seed), problem="llama") for m in ("rules", "sobol") for seed in range(3)]
    said = page({}, of, runs, analyse(of, runs, bootstrap=100))
    assert "workload" in said
    assert "nobody knows the best" in said


def test_what_twins_show_has_a_heading_of_its_own():
    of = comparisons.problems(6)
    twins = [comparisons.problem(p.name, anonymised=True, twin_of=p.name) for p in of]
    named = [replace(t, name=f"twin-{t.name}") for t in twins]
    runs = comparisons.runs(of, ("enhanced",), seeds=3)
    again = [replace(r, problem=f"twin-{r.problem}") for r in runs]
    text = page({"title": "t"}, [*of, *named], [*runs, *again], analyse([*of, *named], [*runs, *again]))
    assert "Tables against their twins without names" in text
    assert "enhanced without names" in text


def test_a_twin_with_noise_and_other_names_says_so():
    of = [comparisons.problem("p", anonymised=True, noise_sigma=0.05)]
    runs = comparisons.runs(of, ("rules", "sobol"), seeds=3)
    assert "names and categories replaced, noise 5.0 %" in page({}, of, runs, analyse(of, runs, bootstrap=100))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
        (0.0, "0"),
        (0.012345, "0.01235"),
        (4409.97, "4,410"),
        (3.0, "3.000"),
    ],
)
def test_a_number_has_four_digits_and_what_is_none_is_a_dash(value, text):
    assert _number(value) == text


@pytest.mark.parametrize(
    ("low", "high", "text"), [(None, 1.0, ""), (1.0, None, ""), (math.nan, 1.0, ""), (4.08, 6.31, "4.1 to 6.3")]
)
def test_an_interval_has_both_ends_or_is_not_shown(low, high, text):
    assert _between(low, high, decimals=1) == text


# --- what comes from outside -----------------------------------------------------------------


@pytest.fixture(scope="module")
def nasty():
    plain = comparisons.problem("p")
    facts = dict.fromkeys(("hardware", "model", "engine", "source", "licence", "trust", "notes"), NASTY)
    of = [replace(plain, name=name, facts=facts, limits=(NASTY,), parameters=(NASTY,)) for name in (NASTY, "q" + NASTY)]
    runs = [
        replace(comparisons.run(plain, method, seed), problem=one.name, method=method + NASTY, llm=NASTY)
        for one in of
        for method in ("a", "b")
        for seed in range(3)
    ]
    runs.append(replace(comparisons.run(plain, "c", 0, stop=2, error=NASTY), problem=NASTY))
    header = {"title": NASTY, "command": NASTY, "machine": {NASTY: NASTY}, "versions": {NASTY: NASTY}}
    header |= {"methods": {"a" + NASTY: NASTY}, "costs": {"a" + NASTY: NASTY}}
    return page(header, of, runs, analyse(of, runs, bootstrap=100))


def test_markup_in_names_stays_text(nasty):
    shape = Shape(nasty)
    assert "img" not in shape.tags
    assert shape.tags.count("script") == 1
    assert "55433" not in nasty
    assert "\x1b" not in nasty


@needs_browser
def test_markup_in_names_runs_nothing_in_a_browser(nasty, tmp_path, chromium):
    write(tmp_path / "page.html", nasty)
    chromium.open(tmp_path / "page.html")
    assert chromium.evaluate("document.title") != "run"
    assert chromium.evaluate("document.images.length") == 0
    assert (chromium.console, chromium.requests[1:]) == ([], [])


# --- the file --------------------------------------------------------------------------------


def test_the_file_is_written_whole_or_not_at_all(tmp_path):
    write(tmp_path / "page.html", "whole\n")
    with pytest.raises(Refused, match="cannot be written"):
        write(tmp_path / "no" / "page.html", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "whole\n"


def test_the_same_comparison_gives_the_same_page(many, text):
    assert page(HEADER, *many) == text


# --- in a browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    one = browser.Browser()
    yield one
    one.close()


@pytest.fixture(scope="module")
def path(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write(path, text)
    return path


CONTRAST = """(() => {
  const channel = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => 0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
  const page = luminance(parse(getComputedStyle(document.documentElement).backgroundColor));
  const seen = {};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const at = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || at.closest("script, style, #heat, pre")) continue;
    const style = getComputedStyle(at), colour = at.closest("svg") ? style.fill : style.color;
    const own = luminance(parse(colour));
    seen[colour] = (Math.max(own, page) + 0.05) / (Math.min(own, page) + 0.05);
  }
  return seen;
})()"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_opens_without_a_complaint_or_a_request(chromium, path, dark):
    chromium.open(path, dark=dark)
    assert chromium.console == []
    assert chromium.requests == [path.as_uri()]


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_all_text_can_be_read_in_both_schemes(chromium, path, dark):
    chromium.open(path, dark=dark)
    background = chromium.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert background == ("rgb(21, 23, 26)" if dark else "rgb(255, 255, 255)")
    found = chromium.evaluate(CONTRAST)
    assert len(found) >= 3
    assert {colour: ratio for colour, ratio in found.items() if ratio < 4.5} == {}


@needs_browser
@pytest.mark.parametrize("width", [1100, 420])
def test_every_figure_has_a_box_within_the_window(chromium, path, width):
    chromium.open(path, width=width)
    boxes = chromium.evaluate(
        "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect()).map(b => [b.width, b.height])"
    )
    assert len(boxes) == 7
    assert all(200 < across <= width and tall > 60 for across, tall in boxes)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width


@needs_browser
def test_every_method_is_named_in_every_figure_of_the_page(chromium, path):
    chromium.open(path)
    said = chromium.evaluate("[...document.querySelectorAll('figure svg')].map(s => s.textContent)")
    assert [(k, method) for k, one in enumerate(said) for method in comparisons.METHODS if method not in one] == []


@needs_browser
def test_no_two_texts_of_a_figure_meet_in_the_browsers_own_font(chromium, path):
    chromium.open(path)
    met = chromium.evaluate("""[...document.querySelectorAll('figure svg')].flatMap(svg => {
      const all = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
      return all.flatMap(([a, p], k) => all.slice(k + 1).filter(([, q]) =>
        p.left + 1 < q.right - 1 && q.left + 1 < p.right - 1 && p.top + 3 < q.bottom - 3 && q.top + 3 < p.bottom - 3)
        .map(([b]) => [svg.id, a, b])); })""")
    assert met == []


@needs_browser
def test_pointing_at_a_method_in_a_legend_shows_it_alone(chromium, path):
    chromium.open(path)
    place = chromium.evaluate("""(() => { const t = document.querySelector('#progress g.m1.legend-text');
      t.scrollIntoView(); const b = t.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()""")
    chromium.point(*place)
    opacity = "getComputedStyle(document.querySelector('#progress g.m{}.line')).opacity"
    assert (chromium.evaluate(opacity.format(1)), chromium.evaluate(opacity.format(0))) == ("1", "0.12")


@needs_browser
def test_a_table_is_sorted_by_the_column_that_is_pressed_and_back(chromium, path):
    chromium.open(path)
    table = "document.querySelector('#results table')"
    column = f"[...{table}.tBodies[0].rows].map(row => parseFloat(row.cells[2].textContent))"
    press = f"{table}.tHead.rows[1].cells[1].querySelector('button').click()"
    chromium.evaluate(press)
    up = chromium.evaluate(column)
    chromium.evaluate(press)
    down = chromium.evaluate(column)
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert up != down


@needs_browser
def test_it_prints_on_white_whatever_the_scheme(chromium, path, tmp_path):
    chromium.open(path, dark=True, media="print")
    assert chromium.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert min(chromium.evaluate(CONTRAST).values()) >= 4.5
    assert chromium.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    chromium.pdf(tmp_path / "page.pdf", dark=True)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_the_colours_of_both_schemes_are_those_of_the_figures(text):
    assert all(text.count(f"--m{k}: {colour};") >= 2 for k, colour in enumerate(figures.COLOURS))
    assert all(f"--m{k}: {colour};" in text for k, colour in enumerate(figures.DARK_COLOURS))
