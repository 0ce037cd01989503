"""Recording a table with real processes: an engine that burns milliseconds, and a driver that can be killed."""

import csv
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import SPACE

from tuner import record as module
from tuner.assemble import prepare
from tuner.journal import NAME, Header, Journal, JournalError, Plan, read
from tuner.meters import MeterOptions
from tuner.record import RecordError, Sample, default_name, differences, plan, record
from tuner.replay import Replay, Table
from tuner.space import Choice, Float, Int, Refused, SearchSpace
from tuner.trial import Proposal, Target

ENGINE = Path(__file__).parent / "fakes" / "engine.py"
PINS = ("cost=4",)
"""Leaves `batch`, of which 1 to 4 are legal then: five configurations with a wild mode, four without."""


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def bench(**changes):
    header = Header(
        name="",
        workload=str(ENGINE),
        target=changes.pop("target", Target(prompts=2, prompt_tokens=2, output_tokens=2)),
        proposer="",
        pins=changes.pop("pins", PINS),
        plan=Plan(windows=2, window_seconds=0.02, warm_up_seconds=(0.01, 0.1), most_others=1.0, timeout_seconds=60),
        **changes,
    )
    return prepare(header, meter="estimate", options=MeterOptions(), say=lambda _: None)


def recorded(sample="grid", repeats=1, name="mine", options=None, **more):
    return record(*bench(**(options or {})), sample=Sample.parse(sample), repeats=repeats, name=name, **more)


def lines(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- which configurations ---


@pytest.mark.parametrize("text", ["grid", "sobol:64", "random:8"])
def test_a_sample_is_read_as_it_is_written(text):
    assert str(Sample.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "grid:4", "sobol", "sobol:", "sobol:0", "sobol:-1", "tpe:4", "random:1e3", "random:999999"]
)
def test_a_sample_of_another_form_is_refused(text):
    with pytest.raises(Refused, match=r"--sample .*: expected grid, sobol:N or random:N"):
        Sample.parse(text)


def test_a_grid_is_every_legal_configuration_once_with_the_default_first():
    """32 x 4 x 3 of the space, less those with threads > parallel: (1+2+3) x 3."""
    drawn = Sample.parse("grid").draw(SPACE, 0)
    assert drawn[0] == SPACE.default()
    assert len({SPACE.key(c) for c in drawn}) == len(drawn) == 32 * 4 * 3 - 6 * 3
    assert not any(SPACE.broken(c) for c in drawn)


@given(st.sampled_from(["sobol", "random"]), st.integers(1, 30), st.integers(0, 5))
def test_a_sample_has_so_many_legal_configurations_and_the_default_first(method, size, seed):
    drawn = Sample(method, size).draw(SPACE, seed)
    assert drawn[0] == SPACE.default()
    assert len({SPACE.key(c) for c in drawn}) == len(drawn) == size
    assert not any(SPACE.broken(c) for c in drawn)
    assert drawn == Sample(method, size).draw(SPACE, seed)


def test_a_sample_larger_than_the_space_is_the_space():
    small = SearchSpace((Int(name="n", meaning="m", default=1, low=1, high=3),))
    assert len(Sample.parse("random:10").draw(small, 0)) == 3


@pytest.mark.parametrize(
    ("parameter", "size"),
    [
        (Float(name="x", meaning="m", default=0.5, low=0.0, high=1.0), "no end of"),
        (Int(name="x", meaning="m", default=1, low=1, high=20_000), "20000"),
    ],
)
def test_a_grid_that_nobody_can_measure_is_refused(parameter, size):
    with pytest.raises(Refused, match=f"this space has {size} configurations"):
        Sample.parse("grid").draw(SearchSpace((parameter,)), 0)


def test_a_range_of_one_number_is_part_of_a_grid():
    space = SearchSpace(
        (
            Float(name="x", meaning="m", default=0.5, low=0.5, high=0.5),
            Choice(name="y", meaning="m", default=1, values=(1, 2)),
        )
    )
    assert Sample.parse("grid").draw(space, 0) == [{"x": 0.5, "y": 1}, {"x": 0.5, "y": 2}]


@given(st.integers(1, 5), st.integers(0, 9))
def test_each_round_launches_every_configuration_once_in_an_order_of_its_own(repeats, seed):
    launches = plan(SPACE, Sample("random", 6), repeats, seed)
    assert launches[0] == (0, SPACE.default())
    assert [repeat for repeat, _ in launches] == [r for r in range(repeats) for _ in range(6)]
    rounds = [[SPACE.key(c) for r, c in launches if r == repeat] for repeat in range(repeats)]
    assert len({frozenset(keys) for keys in rounds}) == 1
    assert launches == plan(SPACE, Sample("random", 6), repeats, seed)


@pytest.mark.parametrize("repeats", [0, -1, 101])
def test_repeats_that_make_no_sense_are_refused(repeats):
    with pytest.raises(Refused, match=f"--repeats {repeats}: expected 1 to 100"):
        plan(SPACE, Sample("grid"), repeats, 0)


def test_a_table_without_a_name_is_called_after_what_it_holds():
    assert default_name("llama", Sample.parse("sobol:64")) == "llama-sobol-64"
    assert default_name("/x/mine.py", Sample.parse("grid")) == "mine-grid"


# --- from the engine to the table ---


def test_a_recorded_table_can_be_loaded_by_name_and_replayed():
    said, seen = [], []
    path = recorded(repeats=2, say=said.append, ended=lambda t, done, planned: seen.append((t.number, done, planned)))
    table = Table.named("mine")
    assert table.path == path.resolve()
    assert table.rows[0].config == {"batch": 2}
    assert {row.config["batch"] for row in table.rows} == {1, 2, 3, 4}
    assert all(len(row.joules) == 2 for row in table.rows)
    assert table.relative_sd > 0
    assert said == ["8 launches: 4 configurations, 2 each"]
    assert seen == [(n, n + 1, 8) for n in range(8)]
    trial = Replay(table)(0, Proposal(config={"batch": 3}, source="x"))
    assert (trial.error, trial.quality) == (None, "replayed")


def test_every_figure_of_the_table_is_that_of_its_launch():
    path = recorded(repeats=2)
    trials = read(path.parent / "mine.recording").history.trials
    for line in lines(path):
        trial = trials[int(line["launch"])]
        assert trial.config["batch"] == int(line["batch"])
        assert trial.launch_joules_per_unit == float(line["energy_per_token_j"])
        assert trial.units_per_second == float(line["throughput_tokens_per_sec"])
        assert float(line["energy_per_token_low_j"]) < trial.launch_joules_per_unit
        assert trial.launch_joules_per_unit < float(line["energy_per_token_high_j"])
        assert trial.relative_sd == float(line["window_relative_sd"])
    assert [(line["batch"], line["repeat"]) for line in lines(path)[:2]] == [("2", "0"), ("2", "1")]


def test_the_metadata_say_how_it_was_measured_and_not_on_whose_machine():
    path = recorded()
    about = json.loads(path.with_suffix(".json").read_text())
    text = path.with_suffix(".json").read_text()
    assert about["engine"] == "fake 1"
    assert about["trust"].startswith("C (estimated")
    assert "fixed: cost=4" in about["notes"]
    assert "2 requests x (2 prompt + 2 output) tokens" in about["notes"]
    assert about["default"] == {"batch": 2}
    assert about["parameters"]["batch"]["meaning"] == "Requests handled together."
    assert read(path.parent / "mine.recording").header.machine["host"] not in text.split(" ")


def test_launches_that_failed_are_rows_with_their_reasons():
    path = recorded(
        options={
            "target": Target(prompts=2, output_tokens=2, size="wild"),
            "pins": ("cost=4", "batch=2"),
            "ranges": ("mode=ok,raise,segv",),
        }
    )
    table = Table.load(path)
    faults = {row.config["mode"]: row.fault for row in table.rows}
    assert faults["ok"] is None
    assert "the engine is on fire" in faults["raise"]
    assert "SIGSEGV" in faults["segv"]
    assert [line["failed"] for line in lines(path)] == ["0", "1", "1"]
    assert [row.joules for row in table.rows][1:] == [(), ()]


def test_words_booleans_and_numbers_come_back_as_what_they_were(tmp_path, monkeypatch):
    """An engine of several kinds of parameters, whose values stand in the table and come back from it."""
    runner = tmp_path / "kinds.py"
    runner.write_text(
        "import contextlib\n"
        f"import sys; sys.path.insert(0, {str(ENGINE.parent)!r})\n"
        "import engine\n"
        "from engine import identity, command\n"
        "from tuner.space import Choice, Float, SearchSpace\n"
        "def space(target):\n"
        "    return SearchSpace((\n"
        "        Choice(name='layers', meaning='l', default='auto', values=('auto', 0, 8)),\n"
        "        Choice(name='flash', meaning='f', default=True, values=(True, False)),\n"
        "        Choice(name='scale', meaning='s', default=0.5, values=(0.5, 1, 0.25)),\n"
        "        Float(name='x', meaning='x', default=0.5, low=0.0, high=1.0),\n"
        "    ))\n"
        "@contextlib.contextmanager\n"
        "def launch(config, target):\n"
        "    with engine.launch({'cost': 4, 'batch': 2, 'mode': 'ok'}, target) as running:\n"
        "        yield running\n"
    )
    header = Header(
        name="",
        workload=str(runner),
        target=Target(prompts=2, output_tokens=2),
        proposer="",
        plan=Plan(windows=1, window_seconds=0.01, warm_up_seconds=(0.01, 0.1), most_others=1.0),
    )
    header, kinds = prepare(header, meter="estimate", options=MeterOptions(), say=lambda _: None)
    path = record(header, kinds, sample=Sample.parse("random:4"), repeats=1, name="kinds")
    table = Table.load(path)
    assert {n: p.type for n, p in table.about.parameters.items()} == {
        "layers": "category",
        "flash": "boolean",
        "scale": "number",
        "x": "number",
    }
    trials = read(path.parent / "kinds.recording").history.trials
    assert [{**t.config, "layers": str(t.config["layers"])} for t in trials] == [
        r.config for r in sorted(table.rows, key=lambda r: int(lines(path)[r.number]["launch"]))
    ]
    assert table.default.config == {"layers": "auto", "flash": True, "scale": 0.5, "x": 0.5}


# --- what goes wrong ---


def test_a_default_that_cannot_be_measured_ends_it_and_is_tried_again(monkeypatch):
    wild = {
        "target": Target(prompts=2, output_tokens=2, size="wild"),
        "pins": (*PINS, "batch=2"),
        "ranges": ("mode=raise,segv",),
    }
    with pytest.raises(RecordError, match=r"the default cannot be measured, .*: .*the engine is on fire"):
        recorded(options=wild)
    assert not list(Path("results/recorded").glob("*.csv"))
    assert len(read(Path("results/recorded/mine.recording")).history) == 0


@pytest.mark.parametrize("name", ["", "../x", "a b", ".x", "x" * 101])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(Refused, match=r"--name .*: expected letters, digits"):
        recorded(name=name)


def test_a_table_is_never_overwritten():
    path = recorded()
    before = path.read_bytes()
    with pytest.raises(Refused, match="there is a table of that name; choose another --name"):
        recorded()
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_refused():
    Path("results").write_text("a file")
    with pytest.raises(Refused, match="choose another folder for the table"):
        recorded()


def stopped_after(number):
    def ended(trial, done, planned):
        if done == number:
            raise KeyboardInterrupt

    return ended


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on():
    said = []
    with pytest.raises(KeyboardInterrupt):
        recorded(say=said.append, ended=stopped_after(2))
    assert said[-1] == "stopped; 2 of 4 launches are kept. Give the same command again to go on"
    assert not Path("results/recorded/mine.csv").exists()
    first = read(Path("results/recorded/mine.recording")).history.trials
    path = recorded(say=said.append)
    assert said[-1] == "4 launches: 4 configurations, 1 each; 2 are done"
    trials = read(Path("results/recorded/mine.recording")).history.trials
    assert trials[:2] == first
    assert len(Table.load(path).rows) == 4


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"sample": "random:3"}, "proposer: then .grid., now .random:3."),
        ({"repeats": 2}, "plan: then"),
        ({"options": {"pins": ("cost=2",)}}, "pins: then .*search space"),
        ({"options": {"seed": 1}}, "seed: then 0, now 1"),
    ],
)
def test_a_recording_does_not_go_on_as_another_one(more, sentence):
    with pytest.raises(KeyboardInterrupt):
        recorded(ended=stopped_after(1))
    with pytest.raises(Refused, match=f"a recording of that name was begun otherwise: .*{sentence}.*another --name"):
        recorded(**more)


def test_a_recording_does_not_go_on_with_another_engine(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        recorded(ended=stopped_after(1))
    monkeypatch.setenv("FAKE_ENGINE_VERSION", "2")
    with pytest.raises(Refused, match="engine_version: recorded '1', here '2'"):
        recorded()


def test_a_recording_does_not_go_on_on_another_machine():
    header, _ = bench()
    assert differences(header, header) == []
    assert differences(header, replace(header, machine={**header.machine, "cpu": "other"}))[0].startswith(
        "cpu: recorded"
    )


def test_two_processes_do_not_record_one_table():
    def ended(trial, done, planned):
        with pytest.raises(Refused, match="is running this study"):
            recorded()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorded(ended=ended)


def test_a_journal_that_cannot_go_on_is_closed(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        recorded(ended=stopped_after(1))

    def full(journal, event):
        raise JournalError("the disk is full")

    monkeypatch.setattr(Journal, "append", full)
    with pytest.raises(JournalError, match="the disk is full"):
        recorded()


def test_a_full_disk_says_what_is_kept_and_how_to_go_on(monkeypatch):
    before = Journal.append

    def append(journal, event):
        if len(journal.study.history) == 2:
            raise JournalError("journal.jsonl: the disk is full; 2 finished trials are kept. Mend that")
        return before(journal, event)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        with pytest.raises(
            JournalError, match=r"^journal.jsonl: the disk is full; 2 of 4 launches are kept in .* again$"
        ):
            recorded()
    assert len(Table.load(recorded()).rows) == 4


def test_a_table_that_cannot_be_written_is_written_by_the_same_command_later(monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module, "_replace", full)
        with pytest.raises(RecordError, match="No space left on device; every launch is kept"):
            recorded()
    trials = read(Path("results/recorded/mine.recording")).history.trials
    assert len(Table.load(recorded()).rows) == 4
    assert read(Path("results/recorded/mine.recording")).history.trials == trials


# --- killed ---

DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from test_record import recorded
print(recorded(repeats=2, ended=lambda t, done, planned: print(done, flush=True)))
"""


def driver(**more):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(tests=str(Path(__file__).parent))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_recording_that_was_killed_goes_on_where_it_stopped(number):
    with driver() as process:
        children = []
        for line in process.stdout:
            if line.strip() == "3":
                break
        give_up = time.monotonic() + 30
        while not children and time.monotonic() < give_up:
            children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode != 0
    # The worker notices that nobody waits for it any more.
    assert not psutil.wait_procs(children, timeout=30)[1]
    kept = read(Path("results/recorded/mine.recording")).history.trials
    assert len(kept) >= 3
    with (Path("results/recorded/mine.recording") / NAME).open("ab") as journal:
        journal.write(b'{"kind":"trial","bo')  # a torn last line is what a power failure leaves
    with driver() as process:
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    table = Table.load(Path("results/recorded/mine.csv"))
    assert [len(row.joules) for row in table.rows] == [2, 2, 2, 2]
    after = read(Path("results/recorded/mine.recording")).history.trials
    assert after[: len(kept)] == kept
    assert len(after) == 8
    assert out.split()[:-1] == [str(n) for n in range(len(kept) + 1, 9)]


def test_the_table_is_never_there_in_part():
    """Between the metadata and the CSV a kill leaves a table that is not listed, and the next command ends it."""
    path = recorded()
    path.unlink()
    with pytest.raises(Refused, match="unknown table"):
        Table.named("mine")
    assert len(Table.load(recorded()).rows) == 4


def test_energies_of_a_recorded_table_are_positive_and_finite():
    table = Table.load(recorded())
    assert all(0 < j < math.inf for row in table.rows for j in row.joules)
