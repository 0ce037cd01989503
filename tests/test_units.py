"""What says image where images are made, from the header line to the money, and still reads what said nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from records import SPACE, trial
from test_display import Desk

from tuner.assemble import llm_proposer, prepare, view_of
from tuner.cost import CostOptions, assess
from tuner.evaluate import Launcher
from tuner.files import load_runner, unit_of
from tuner.journal import Header, Journal, Plan, Study, read
from tuner.live import _ground, _problem
from tuner.meters import MeterOptions
from tuner.record import Sample, record
from tuner.space import Refused
from tuner.summary import load_text
from tuner.trial import History, Proposal, Target, Work

RUNNER = """
from tuner.space import Int, SearchSpace
from tuner.trial import Work
from contextlib import contextmanager
def unit(target): return UNIT
def space(target): return SearchSpace((Int(name="batch", meaning="Images together.", default=1, low=1, high=8),))
def identity(target): return {"engine": "e", "engine_version": "1", "model": "m"}
def command(config, target): return "e"
class Painter:
    effective = {}
    def run_pass(self):
        sum(range(100_000))
        return Work(units=MADE, unit="image")
@contextmanager
def launch(config, target): yield Painter()
"""

IMAGES = Target(prompts=3, pixels=64)


@pytest.fixture
def runner(tmp_path):
    def write(unit='"image"', made=3):
        path = tmp_path / "painter.py"
        path.write_text(RUNNER.replace("UNIT", unit).replace("MADE", str(made)))
        return path

    return write


def ready(path, **more):
    header = Header(name="s", workload=str(path), target=IMAGES, proposer="rules", **more)
    return prepare(header, meter="estimate", options=MeterOptions(), say=lambda _: None)


def painted(number, **more):
    made = trial(number, **more)
    windows = tuple(replace(w, work=Work(units=100, unit="image")) for w in made.measurements)
    return replace(made, measurements=windows)


# --- who says what the unit is


def test_a_runner_says_what_its_unit_is_and_one_that_says_nothing_counts_tokens(runner, tmp_path):
    assert unit_of(load_runner(runner()), IMAGES) == "image"
    silent = tmp_path / "silent.py"
    silent.write_text(runner().read_text().replace("def unit(", "def other("))
    assert unit_of(load_runner(silent), IMAGES) == "token"


@pytest.mark.parametrize("said", ['"picture"', "None", "1"])
def test_a_unit_that_there_is_not_is_refused_with_those_that_there_are(runner, said):
    with pytest.raises(Refused, match=r"unit\(\) says .*: expected token, image, epoch"):
        ready(runner(said))


def test_a_unit_function_that_fails_is_a_sentence_that_names_it(runner):
    with pytest.raises(Refused, match=r"painter\.py: its unit\(\) failed \(ZeroDivisionError"):
        ready(runner("1 / 0"))


def test_the_header_knows_the_unit_before_the_first_trial(runner):
    header, bench = ready(runner())
    assert (header.unit, bench.unit) == ("image", "image")


def test_a_journal_from_before_units_is_read_as_one_of_tokens(tmp_path):
    Journal.create(tmp_path, Header(name="s", workload="w", target=Target(), proposer="p", unit="image")).close()
    path = tmp_path / "journal.jsonl"
    head = json.loads(path.read_text())
    assert head["body"].pop("unit") == "image"
    path.write_text(json.dumps(head) + "\n")
    assert read(tmp_path).header.unit == "token"


# --- the load and the prompts


@pytest.mark.parametrize(
    ("target", "unit", "text"),
    [
        (Target(), "token", "8 requests x (96 prompt + 32 output) tokens"),
        (IMAGES, "image", "3 images of 64 x 64 pixels"),
        (Target(prompts=1, pixels=512), "image", "1 image of 512 x 512 pixels"),
        (Target(), "epoch", "epochs, as many as the workload says"),
    ],
)
def test_the_load_is_told_in_its_own_unit(target, unit, text):
    assert load_text(target, unit) == text


def test_a_template_is_told_of_images_and_of_no_token(runner):
    header, bench = ready(runner())
    view = view_of(header, bench).of(bench.space, History())
    assert view["workload"]["unit"] == "image"
    assert view["workload"]["load"] == (
        "3 images of 64 x 64 pixels, each from a prompt and a seed of its own, the same in every trial"
    )


@pytest.mark.parametrize("template", ["enhanced", "baseline"])
def test_the_prompt_asks_for_joules_per_image_and_says_no_token(runner, template):
    header, bench = ready(runner())
    header = replace(header, template=template)

    class Silent:
        name = "none"

    history = History().add(painted(0))
    text = llm_proposer(header, bench, Silent()).messages(SPACE, history)[-1].content
    assert "predicted_joules_per_image" in text
    assert "token" not in text
    assert "decode or" not in text


# --- what a person sees


def test_the_heading_of_a_study_whose_first_trial_failed_says_image():
    desk = Desk(live=True)
    desk.screen.study_started("s", None, None, History().add(trial(0, error="x")), "image")
    desk.screen.close()
    assert "J/image" in desk.err
    assert "J/token" not in desk.err


def test_a_prediction_before_anything_was_measured_is_one_per_image():
    desk = Desk("s\n")
    desk.screen.study_started("s", None, None, None, "image")
    proposal = Proposal(config=SPACE.default(), source="llm", predicted_joules_per_unit=2.0)
    desk.decide(proposal, history=History())
    assert "2.00 J/image" in desk.out + desk.err


def study_of(header, *trials):
    history = History()
    for one in trials:
        history = history.add(one)
    return Study(folder=Path("results/s"), header=header, history=history)


HEADER = Header(name="s", workload="diffusion", target=IMAGES, proposer="rules", unit="image")


def test_costs_of_a_study_in_which_nothing_was_measured_are_per_image():
    assert assess(study_of(HEADER, trial(0, error="x")), None, CostOptions()).unit == "image"


def test_a_report_of_a_study_in_which_nothing_was_measured_says_image():
    desk = Desk()
    desk.screen.report(study_of(HEADER, trial(0, error="x")))
    assert "J/image" in desk.out


def test_a_comparison_names_the_images_and_their_size():
    problem = _problem(study_of(HEADER, trial(0, error="x")), "workload")
    assert problem.unit == "image"
    assert problem.facts["task"] == "3 images of 64 x 64 pixels"


def test_studies_of_images_of_another_size_are_not_compared():
    other = replace(HEADER, target=replace(IMAGES, pixels=128))
    differing = {k for k, v in _ground(study_of(HEADER)).items() if _ground(study_of(other))[k] != v}
    assert differing == {"load pixels"}


# --- what counts


@pytest.mark.parametrize(("made", "counts"), [(3, True), (2, False)])
def test_a_worker_holds_a_pass_against_the_images_it_was_asked_for(runner, tmp_path, made, counts):
    header, bench = ready(runner(made=made))
    launcher = Launcher(
        folder=tmp_path,
        runner=bench.runner_path,
        target=IMAGES,
        meters=("estimate",),
        meter_options=dict(header.meter_options),
        plan=Plan(windows=1, window_seconds=0.05, retries=0, warm_up_seconds=(0.0, 0.0), most_others=1.0),
    )
    found = launcher(0, Proposal(config=bench.space.default(), source="default"))
    if counts:
        assert found.error is None
        assert found.metrics["images_per_s"] > 0
    else:
        assert "a pass brought 2 images, 3 were asked for" in str(found.error)


def test_a_table_of_images_names_their_size(runner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = Plan(windows=1, window_seconds=0.02, warm_up_seconds=(0.01, 0.1), most_others=1.0, timeout_seconds=60)
    path = record(*ready(runner(), plan=plan), sample=Sample.parse("random:1"), repeats=1, name="mine")
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["task"] == "3 images of 64 x 64 pixels"
    assert "load: 3 images of 64 x 64 pixels" in about["notes"]
    assert about["objective"] == "energy_per_image_j"
