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
from tuner.journal import Header, Pair, Plan, Prune, Segment, Study
from tuner.space import Refused
from tuner.trial import (
    Energy,
    Exchange,
    History,
    Idle,
    Noise,
    Proposal,
    Repeat,
    Reply,
    Span,
    Target,
    Telemetry,
    WarmUp,
)

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
        "study": "s-1", "stage": "search", "trial": 1, "launch": 1, "segment": 0,
        "source": "rules", "in_place_of": "llm", "window": 1, "valid": True,
        "mean_joules_per_unit": 0.5, "mean_low": pytest.approx(0.4807795), "mean_high": pytest.approx(0.5199889),
        "mean_launches": 1, "indistinguishable_from_best": False, "drifted": False,
        "param_parallel": 4, "param_threads": 2, "param_flash": "auto",
        "effective_threads": 2, "joules_cpu0": 50.0, "joules": 50.0, "joules_low": 50.0, "joules_high": 50.0,
        "units": 100, "unit": "token", "joules_per_unit": 0.5, "seconds": 2.0, "units_per_second": 50.0,
        "cpu_seconds": 3.0, "prompt_tokens": 300, "prefill_seconds": 1.0, "decode_seconds": 3.0,
        "quality": "measured", "meter": "rapl", "passes": 1, "aligned": False, "failed_requests": 0,
        "trial_seconds": 10.0, "load_seconds": 3.5, "over_limit": False, "reused": False,
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


def test_a_launch_that_was_recorded_in_full_gives_all_of_it(tmp_path):
    telemetry = Telemetry(
        samples=30,
        spans={"gpu0_celsius": Span(61.0, 63.5, 66.0), "gpu0_busy": Span(0.9, 0.95, 1.0)},
        throttled=("gpu0: software power cap", "gpu0: hardware thermal slowdown"),
    )
    made = replace(
        window(0.5, units=200),
        passes=3,
        aligned=True,
        started_unix=1.75e9,
        readings={"gpu0": (7, 100_000_007), "cpu0": (3, 5)},
        wraps={"cpu0": 1},
        telemetry=telemetry,
        other_cpu_seconds=0.25,
    )
    ran = replace(
        trial(0),
        measurements=(made,),
        idle=Idle(machine_watts=20.0, loaded_watts=25.0, seconds=2.0, quality="measured"),
        warm_up=WarmUp(seconds=12.5, units_per_second=(90.0, 100.0), steady=True),
        spent={"gpu0": Energy(300.0, 290.0, 310.0), "cpu0": Energy(30.0, 20.0, 40.0)},
    )
    row = csv(study(ran), tmp_path).iloc[0]
    expected = {
        "passes": 3, "aligned": True, "window_started_unix": 1.75e9, "failed_requests": 0, "other_cpu_seconds": 0.25,
        "counter_start_uj_gpu0": 7, "counter_end_uj_gpu0": 100_000_007, "counter_wraps_gpu0": 0,
        "counter_start_uj_cpu0": 3, "counter_end_uj_cpu0": 5, "counter_wraps_cpu0": 1, "telemetry_samples": 30,
        "gpu0_celsius_low": 61.0, "gpu0_celsius_mean": 63.5, "gpu0_celsius_high": 66.0, "gpu0_busy_mean": 0.95,
        "throttled": "gpu0: software power cap; gpu0: hardware thermal slowdown", "idle_machine_watts": 20.0,
        "idle_loaded_watts": 25.0, "idle_quality": "measured", "warm_up_seconds": 12.5, "warm_up_steady": True,
        "trial_joules": 330.0, "trial_joules_low": 310.0, "trial_joules_high": 350.0,
        "joules_dynamic_per_unit": (100.0 - 20.0 * 2.0) / 200,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected


IDLE = Idle(machine_watts=20.0, loaded_watts=25.0, seconds=2.0, quality="measured")


def test_idle_power_stands_in_every_row_of_its_segment_and_in_no_other(tmp_path):
    later = Segment(number=1, differences=("cpu",), machine={}, identity={})
    first = replace(trial(0, joules=(1.0,)), idle=IDLE)
    found = study(first, trial(1, joules=(1.0,)), trial(2, joules=(1.0,), segment=1), segments=(later,))
    assert csv(found, tmp_path).idle_machine_watts.fillna(-1).tolist() == [20.0, 20.0, -1]


def test_idle_power_that_a_repeat_measured_counts_too(tmp_path):
    again = Repeat(trial=replace(trial(0, joules=(1.0,)), idle=IDLE), purpose="sentinel", after=1)
    found = study(trial(0, joules=(1.0,)))
    table = csv(replace(found, history=found.history.add(again)), tmp_path)
    assert table.joules_dynamic_per_unit.tolist() == [(100 - 40) / 100] * 2


def test_dynamic_energy_needs_an_idle_of_the_same_quality_and_a_window_that_counts(tmp_path):
    windows = (window(1.0, quality="estimated"), window(1.0, invalid=["x"]), window(1.0))
    ran = replace(trial(0), measurements=windows, idle=IDLE)
    assert csv(study(ran), tmp_path).joules_dynamic_per_unit.fillna(-1).tolist() == [-1, -1, 0.6]
    assert csv(study(replace(ran, idle=None)), tmp_path).joules_dynamic_per_unit.isna().all()


def test_less_energy_than_idle_stays_below_zero(tmp_path):
    ran = replace(trial(0, joules=(0.1,)), idle=IDLE)
    assert csv(study(ran), tmp_path).joules_dynamic_per_unit[0] == pytest.approx(-0.3)


def test_an_invalid_window_keeps_the_readings_that_show_it(tmp_path):
    bad = replace(window(1.0, invalid=["cpu0: the counter went back"]), readings={"cpu0": (500, 400)})
    row = csv(study(replace(trial(0), measurements=(bad,))), tmp_path).iloc[0]
    assert (row.counter_start_uj_cpu0, row.counter_end_uj_cpu0) == (500, 400)


def test_nothing_reported_and_nothing_asked_are_told_apart(tmp_path):
    asked = replace(window(1.0), telemetry=Telemetry(samples=3))
    table = csv(study(replace(trial(0), measurements=(asked, window(1.0)))), tmp_path)
    assert table.throttled.isna().all()
    assert table.telemetry_samples.fillna(-1).tolist() == [3, -1]


def test_repeats_stand_after_the_trial_they_followed_and_count_the_launches(tmp_path):
    found = study(trial(0, joules=(1.0,)), trial(1, {"parallel": 8}, (0.5,)), trial(2, {"parallel": 9}, (0.7,)))
    history = found.history
    for number, changes, purpose, after in (
        (1, {"parallel": 8}, "contender", 2),
        (1, {"parallel": 8}, "contender", 2),
        (0, {}, "sentinel", 3),
    ):
        history = history.add(Repeat(trial=trial(number, changes, (0.5,)), purpose=purpose, after=after))
    table = csv(replace(found, history=history), tmp_path)
    columns = (table.stage, table.role.fillna(""), table.trial, table.launch, table.after_trial.fillna(-1))
    assert list(zip(*columns, strict=True)) == [
        ("search", "", 0, 1, -1),
        ("search", "", 1, 1, -1),
        ("repeat", "contender", 1, 2, 1),
        ("repeat", "contender", 1, 3, 1),
        ("search", "", 2, 1, -1),
        ("repeat", "sentinel", 0, 2, 2),
    ]


def test_pruning_pairs_are_rows_of_their_own_stage(tmp_path):
    prune = Prune(
        number=0,
        kept=trial(3, {"parallel": 8, "threads": 1}, (0.5,)),
        shorter=trial(3, {"parallel": 8}, (0.5,)),
        kept_first=True,
        config={},
        dropped=("threads",),
        planned=6,
    )
    table = csv(study(trial(3, {"parallel": 8, "threads": 1}, (0.5,)), prunes=(prune,)), tmp_path)
    assert list(zip(table.stage, table.role.fillna(""), table.launch, table.param_threads, strict=True)) == [
        ("search", "", 1, 1), ("prune", "kept", 2, 1), ("prune", "shorter", 1, 2),
    ]  # fmt: skip


finite = st.floats(allow_nan=False, allow_infinity=False)
microjoules = st.integers(min_value=0, max_value=2**70)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    span=st.tuples(finite, finite, finite),
    counter=st.tuples(microjoules, microjoules),
    spent=numbers,
    watts=numbers,
    started=numbers,
)
def test_the_new_columns_come_back_to_the_last_bit_as_csv_and_as_json(tmp_path, span, counter, spent, watts, started):
    made = replace(
        window(1.0),
        started_unix=started,
        readings={"gpu0": counter},
        telemetry=Telemetry(samples=1, spans={"gpu0_watts": Span(*span)}),
    )
    ran = replace(
        trial(0),
        measurements=(made,),
        spent={"gpu0": Energy(spent, spent, spent)},
        idle=Idle(machine_watts=watts, loaded_watts=watts, seconds=1.0, quality="measured"),
    )
    found = study(ran, trial(1, error="x"))
    expected = {
        "gpu0_watts_low": span[0], "gpu0_watts_mean": span[1], "gpu0_watts_high": span[2], "trial_joules": spent,
        "idle_machine_watts": watts, "window_started_unix": started, "counter_start_uj_gpu0": counter[0],
        "counter_end_uj_gpu0": counter[1], "joules_dynamic_per_unit": (100.0 - watts * 2.0) / 100,
    }  # fmt: skip
    export.to_csv(found, tmp_path / "t.csv")
    table = pd.read_csv(tmp_path / "t.csv", dtype=str)
    assert {name: type(value)(table[name][0]) for name, value in expected.items()} == expected
    assert table.loc[1, ["gpu0_watts_mean", "counter_start_uj_gpu0", "trial_joules"]].isna().all()
    export.to_json(found, tmp_path / "t.json")
    row = json.loads((tmp_path / "t.json").read_text())["measurements"][0]
    assert {name: row[name] for name in expected} == expected


def test_json_begins_with_how_it_was_measured(tmp_path):
    later = Segment(
        number=1, differences=("cpu",), machine={}, identity={}, meter_sentence="meter: rapl", noise=Noise(0.03, 7, "c")
    )
    found = study(segments=(later,))
    header = replace(
        found.header,
        meter_sentence="meter: \x1b[1mnvml",
        plan=Plan(windows=7, warm_up_seconds=(1.0, 2.0), timeout_seconds=math.inf),
        noise=Noise(0.021, 9, "calibration here"),
    )
    export.to_json(replace(found, header=header), tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["meter"] == "meter: nvml"
    assert document["noise"] == {"sigma": 0.021, "degrees": 9, "source": "calibration here"}
    assert document["segments"] == [
        {"segment": 1, "meter": "meter: rapl", "noise": {"sigma": 0.03, "degrees": 7, "source": "c"}}
    ]
    plan = document["plan"]
    assert (plan["windows"], plan["warm_up_seconds"], plan["timeout_seconds"]) == (7, [1.0, 2.0], None)


def test_without_a_calibration_the_noise_is_null(tmp_path):
    export.to_json(study(trial(0)), tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text())
    assert (document["noise"], document["meter"], document["segments"]) == (None, None, [])


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


def test_a_frame_has_a_gap_where_something_is_missing():
    table = export.frame(study(trial(0, joules=(1.0,)), trial(1, error="x")))
    assert table.joules[0] == 100.0
    assert table.joules[1] is pd.NA


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


def test_the_rows_of_a_configuration_hold_its_mean_its_interval_and_what_it_cannot_be_told_from():
    history = History(noise=Noise(0.01, 7, "calibration"))
    for number, joules in enumerate((1.0, 0.50, 0.505)):
        history = history.add(trial(number, {"parallel": 4 + number}, joules=(joules,)))
    history = history.add(Repeat(trial=trial(1, {"parallel": 5}, joules=(0.52,)), purpose="contender", after=3))
    found = list(export.rows(replace(study(), history=history)))
    best = [r for r in found if r["trial"] == 1]
    mean = math.sqrt(0.50 * 0.52)
    assert len(best) == 2
    assert [r["mean_joules_per_unit"] for r in best] == pytest.approx([mean, mean])
    assert {r["mean_launches"] for r in best} == {2}
    assert all(r["mean_low"] < mean < r["mean_high"] for r in best)
    assert {r["trial"]: r["indistinguishable_from_best"] for r in found} == {0: False, 1: True, 2: False}


def test_a_pair_has_no_mean_of_the_search():
    pair = Pair(number=0, default=trial(0), best=trial(1), default_first=True, config={}, planned=6)
    found = list(export.rows(study(trial(0), pairs=(pair,))))
    assert [r["mean_launches"] for r in found if r["stage"] == "confirm"] == [None] * 6


def sentinel(joules, after, segment=0):
    return Repeat(trial=trial(0, joules=(joules,), segment=segment), purpose="sentinel", after=after)


def test_launches_between_two_that_show_a_drift_are_marked_and_those_two_are_not():
    history = History(noise=Noise(0.005, 20, "calibration"))
    for number in range(3):
        history = history.add(trial(number, {"parallel": 4 + number}, joules=(1.0,)))
    history = history.add(sentinel(1.0, 3))
    history = history.add(trial(3, {"parallel": 7}, joules=(1.1,)))
    history = history.add(Repeat(trial=trial(3, {"parallel": 7}, joules=(1.1,)), purpose="contender", after=4))
    history = history.add(trial(4, {"parallel": 8}, joules=(1.1,)))
    history = history.add(sentinel(1.2, 5))
    history = history.add(trial(5, {"parallel": 9}, joules=(1.1,)))
    found = list(export.rows(replace(study(), history=history)))
    assert [(r["stage"], r["trial"], r["drifted"]) for r in found] == [
        ("search", 0, False),
        ("search", 1, False),
        ("search", 2, False),
        ("repeat", 0, False),
        ("search", 3, True),
        ("repeat", 3, True),
        ("search", 4, True),
        ("repeat", 0, False),
        ("search", 5, False),
    ]


def test_a_drift_marks_the_launches_of_its_own_segment_alone():
    history = History(noise=Noise(0.005, 20, "calibration"))
    history = history.add(trial(0, joules=(1.0,))).add(trial(1, {"parallel": 8}, joules=(1.0,)))
    history = history.add(sentinel(1.2, 2))
    history = history.add(trial(2, joules=(1.0,), segment=1)).add(trial(3, {"parallel": 8}, joules=(1.0,), segment=1))
    later = Segment(number=1, differences=("cpu",), machine={}, identity={})
    found = list(export.rows(replace(study(segments=(later,)), history=history)))
    # The first segment has no calibration by now; its only repeat drifted by 18 %, far beyond the assumed noise.
    assert [(r["segment"], r["trial"], r["drifted"]) for r in found] == [
        (0, 0, False), (0, 1, True), (0, 0, False), (1, 2, False), (1, 3, False),
    ]  # fmt: skip


def test_a_pair_is_in_no_stretch_of_the_search():
    pair = Pair(number=0, default=trial(0), best=trial(1), default_first=True, config={}, planned=6)
    found = list(export.rows(study(trial(0), pairs=(pair,))))
    assert {r["drifted"] for r in found if r["stage"] == "confirm"} == {None}


def test_json_holds_the_saving_and_the_costs_where_they_are_given(tmp_path):
    given_saving, given_costs = {"ratio": 0.7, "sentence": "s"}, {"default": {"per_year": None}}
    export.to_json(study(trial(0)), tmp_path / "t.json", saving=given_saving, costs=given_costs)
    document = json.loads((tmp_path / "t.json").read_text())
    assert (document["saving"], document["costs"]) == (given_saving, given_costs)
    export.to_json(study(trial(0)), tmp_path / "t.json")
    assert not {"saving", "costs"} & set(json.loads((tmp_path / "t.json").read_text()))
