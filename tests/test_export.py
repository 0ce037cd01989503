import io
import json
import math
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import SPACE, trial, window

from tuner import export
from tuner.journal import Header, Pair, Segment, Study
from tuner.space import Refused
from tuner.trial import Energy, Exchange, History, Proposal, Reply, Target

CHAT = Proposal(
    config=SPACE.complete({"threads": 1}),
    source="rules",
    in_place_of="llm",
    predicted_joules_per_unit=0.7,
    exchanges=(
        Exchange(prompt="p", reply=Reply(text="", model="m-1", input_tokens=100, output_tokens=7), fault="no JSON"),
        Exchange(prompt="q", reply=Reply(text="", model="m-1", input_tokens=None, output_tokens=9)),
    ),
)


def study(*trials, **more):
    header = Header(
        name="s-1",
        workload="llama",
        target=Target(),
        proposer="llm",
        machine={"cpu": "Xeon"},
        identity={"engine": "llama.cpp"},
    )
    return Study(folder=Path("results/s-1"), header=header, history=History(trials=trials), **more)


def csv(found, tmp_path):
    export.to_csv(found, tmp_path / "t.csv")
    return pd.read_csv(tmp_path / "t.csv")


def test_there_is_one_row_for_each_window_and_one_for_a_failed_trial(tmp_path):
    table = csv(study(trial(0, joules=(1.0, 1.1)), trial(1, error="killed by SIGKILL")), tmp_path)
    assert list(zip(table.trial, table.window.fillna(0), strict=True)) == [(0, 1), (0, 2), (1, 0)]
    assert table.error[2] == "killed by SIGKILL"


def test_a_row_tells_all_about_its_measurement(tmp_path):
    ran = trial(1, joules=(0.5,), proposal=CHAT, effective={"threads": 2}, load_seconds=3.5)
    row = csv(study(ran), tmp_path).iloc[0].dropna().to_dict()
    expected = {
        "study": "s-1", "stage": "search", "trial": 1, "segment": 0, "source": "rules", "in_place_of": "llm",
        "window": 1, "valid": True, "param_parallel": 4, "param_threads": 2, "param_flash": "auto",
        "effective_threads": 2, "joules_cpu0": 50.0, "joules": 50.0, "joules_low": 50.0, "joules_high": 50.0,
        "units": 100, "unit": "token", "joules_per_unit": 0.5, "seconds": 2.0, "units_per_second": 50.0,
        "cpu_seconds": 3.0, "prompt_tokens": 300, "prefill_seconds": 1.0, "decode_seconds": 3.0,
        "quality": "measured", "meter": "rapl", "trial_seconds": 10.0, "load_seconds": 3.5,
        "predicted_joules_per_unit": 0.7, "prompts": 2, "llm_model": "m-1", "llm_input_tokens": 100,
        "llm_output_tokens": 16, "machine_cpu": "Xeon", "identity_engine": "llama.cpp",
    }  # fmt: skip
    assert row == expected


numbers = st.floats(min_value=1e-12, max_value=1e12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(joules=numbers, seconds=numbers)
def test_numbers_come_back_to_the_last_bit(tmp_path, joules, seconds):
    made = replace(window(1.0, seconds=seconds), energy={"gpu0": Energy(joules, joules, joules)})
    export.to_csv(study(replace(trial(0), measurements=(made,))), tmp_path / "t.csv")
    row = pd.read_csv(tmp_path / "t.csv", dtype=str).iloc[0]  # as text: how pandas parses floats depends on its version
    read = (float(row.joules_gpu0), float(row.seconds), float(row.joules_per_unit))
    assert read == (joules, seconds, made.joules_per_unit)


def test_an_invalid_window_has_its_causes_and_no_energy(tmp_path):
    bad = window(1.0, invalid=["cpu0: the counter went back", "the machine slept"])
    row = csv(study(replace(trial(0), measurements=(bad, window(1.0)))), tmp_path).iloc[0]
    assert not row.valid
    assert row.invalid_reasons == "cpu0: the counter went back; the machine slept"
    assert row[["joules", "joules_cpu0", "joules_low", "joules_high", "joules_per_unit"]].isna().all()


def test_what_is_missing_is_empty_and_never_a_word(tmp_path):
    infinite = replace(window(1.0), energy={"cpu0": Energy(math.inf, math.nan, math.inf)}, cpu_seconds=math.nan)
    found = study(replace(trial(0), measurements=(infinite,)), trial(1, error="x"))
    csv(found, tmp_path)
    text = (tmp_path / "t.csv").read_text()
    assert not any(word in text.lower() for word in ("nan", "inf,", "none", "<na>"))
    failed = dict(zip(*(line.split(",") for line in (text.splitlines()[0], text.splitlines()[-1])), strict=True))
    assert failed["joules"] == failed["units"] == failed["valid"] == ""


def test_a_gap_does_not_turn_counts_into_floats(tmp_path):
    csv(study(trial(0, joules=(1.0,)), trial(1, error="x")), tmp_path)
    header, first, *_ = (line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines())
    assert first[header.index("units")] == "100"
    assert first[header.index("window")] == "1"


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_a_cell_from_outside_never_starts_a_formula(tmp_path, start):
    table = csv(study(trial(0, error=f"{start}cmd|'/C calc'!A1")), tmp_path)
    assert table.error[0] == f"'{start}cmd|'/C calc'!A1"


def test_an_error_does_nothing_to_a_terminal_that_shows_the_file(tmp_path):
    assert csv(study(trial(0, error='\x1b[31m"red",\nand more')), tmp_path).error[0] == '"red", and more'


def test_a_forced_resume_keeps_each_segments_own_machine(tmp_path):
    later = Segment(number=1, differences=("cpu",), machine={"cpu": "EPYC"}, identity={"engine": "llama.cpp"})
    table = csv(study(trial(0, joules=(1.0,)), trial(1, joules=(1.0,), segment=1), segments=(later,)), tmp_path)
    assert list(table.machine_cpu) == ["Xeon", "EPYC"]


def test_confirming_pairs_are_rows_of_their_own_stage(tmp_path):
    pair = Pair(
        number=0,
        default=trial(0, joules=(1.0,)),
        best=trial(3, joules=(0.5,)),
        default_first=True,
        planned=2,
        config=SPACE.default(),
    )
    table = csv(study(trial(0, joules=(1.0,)), pairs=(pair,)), tmp_path)
    assert list(zip(table.stage, table.pair.fillna(-1), table.trial, strict=True)) == [
        ("search", -1, 0), ("confirm", 0, 0), ("confirm", 0, 3),
    ]  # fmt: skip


def test_json_is_strict_and_has_the_same_numbers(tmp_path):
    found = study(trial(0, joules=(0.1, 0.2)), trial(1, error="x"))
    export.to_json(found, tmp_path / "t.json")

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads((tmp_path / "t.json").read_text(), parse_constant=refuse)
    table = csv(found, tmp_path)
    assert document["study"] == "s-1"
    assert [r["joules_per_unit"] for r in document["measurements"]] == [*table.joules_per_unit[:2], None]
    assert {tuple(r) for r in document["measurements"]} == {tuple(table.columns)}


def test_a_study_without_trials_gives_an_empty_table(tmp_path):
    export.to_csv(study(), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().strip() == ""
    export.to_json(study(), tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["measurements"] == []


def test_a_dash_is_standard_output(capsys):
    export.to_csv(study(trial(0)), "-")
    assert len(pd.read_csv(io.StringIO(capsys.readouterr().out))) == 3


def test_a_file_that_cannot_be_written_is_refused_and_what_was_there_stays(tmp_path):
    with pytest.raises(Refused, match=r"no/such/t\.csv: cannot be written \(No such file or directory\)"):
        export.to_csv(study(trial(0)), tmp_path / "no/such/t.csv")
    with pytest.raises(Refused, match="cannot be written"):
        export.to_csv(study(trial(0)), tmp_path)


def test_a_full_disk_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refused, match="No space left on device"):
        export.to_csv(study(trial(0)), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["t.csv"]


def test_the_file_has_the_rights_of_any_new_file(tmp_path):
    umask = os.umask(0o022)
    try:
        export.to_csv(study(trial(0)), tmp_path / "t.csv")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "t.csv").stat().st_mode) == 0o644


def test_a_link_still_points_to_the_file_afterwards(tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "t.csv")
    export.to_csv(study(trial(0)), tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "t.csv").read_text().startswith("study,")


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    export.to_csv(study(trial(0)), pipe)
    reader.join(2)
    assert pipe.is_fifo()
    assert got[0].startswith("study,")
