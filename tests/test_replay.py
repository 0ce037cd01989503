"""Replay of recorded tables: what is shipped is what was recorded, and a table is right or it is not used."""

import csv
import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.files import names
from tuner.replay import Limit, Replay, Table, anonymise, catalogue, problem, space, step_of
from tuner.space import Refused
from tuner.trial import History, Proposal

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "results" / "recorded"
SHIPPED = [
    "anl-1024-meta-llama-3-8b",
    "mle2-llm-chat-mixtral-8x22b-instruct-v0.1",
    "mle3-gpqa-gpt-oss-120b",
    "mle3-lm-arena-chat-qwen3-32b",
    "mle3-text-to-image-hunyuandit-v1.2-diffusers",
    "mle3-text-to-image-pixart-sigma-xl-2-1024-ms",
    "mle3-text-to-image-stable-diffusion-3.5-medium",
    "mle3x-image-chat-qwen3-vl-235b-a22b-instruct-anyprec",
    "mle3x-lm-arena-chat-llama-3.1-405b-instruct-anyprec",
    "tx2-inceptionv3-400px",
    "zeus-a40-squad-bert-base-uncased",
    "zeus-v100-cifar100-shufflenetv2",
]


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def shipped(name):
    return Table.load(RECORDED / f"{name}.csv")


TABLES = {name: shipped(name) for name in SHIPPED}
every_table = pytest.mark.parametrize("name", SHIPPED)


def by_hand(name):
    """The lines of a table and what its metadata says, with nothing of tune in between."""
    about = json.loads((RECORDED / f"{name}.json").read_text())
    with (RECORDED / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file)), about


def within(line, limits):
    for limit in limits:
        column, sign, bound = limit.partition("<=" if "<=" in limit else ">=")
        value = float(line[column])
        if (value > float(bound)) if sign == "<=" else (value < float(bound)):
            return False
    return True


def propose(config, source="random"):
    return Proposal(config=dict(config), source=source)


# --- what is shipped ---


def test_every_shipped_table_can_be_named_from_any_folder():
    assert names("recorded") == SHIPPED
    assert [s.name for s in catalogue()] == SHIPPED
    assert Table.named("tx2-inceptionv3-400px").name == "tx2-inceptionv3-400px"


@every_table
def test_the_optimum_of_a_shipped_table_is_what_its_csv_says(name):
    lines, about = by_hand(name)
    feasible = [line for line in lines if within(line, about["limits"])]
    best = min(feasible, key=lambda line: float(line[about["objective"]]))
    table = TABLES[name]
    assert table.best.joules_per_unit == float(best[about["objective"]])
    assert {n: str(v) for n, v in table.best.config.items()} == {n: best[n] for n in about["parameters"]}
    assert (len(table.rows), len(table.feasible)) == (len(lines), len(feasible))
    said = problem(table)
    assert said.best_joules_per_unit == table.best.joules_per_unit
    assert (said.configurations, said.feasible, list(said.limits)) == (len(lines), len(feasible), about["limits"])


@every_table
def test_the_default_of_a_shipped_table_is_a_feasible_row_and_not_near_the_optimum(name):
    table = TABLES[name]
    assert table.default.feasible
    assert table.default.joules_per_unit > 1.1 * table.best.joules_per_unit
    assert table.about.default_note
    assert problem(table).default_joules_per_unit == table.default.joules_per_unit


@every_table
def test_where_no_source_names_a_default_it_is_the_middle_one_of_the_feasible_rows(name):
    lines, about = by_hand(name)
    if not about["default_note"].startswith("Our choice, the source names none: of the rows"):
        assert name.startswith(("zeus-", "tx2-"))
        return
    feasible = [line for line in lines if within(line, about["limits"])]
    middle = sorted(float(line[about["objective"]]) for line in feasible)[len(feasible) // 2]
    assert TABLES[name].default.joules_per_unit == middle


@every_table
def test_a_shipped_table_says_where_it_is_from_and_under_which_licence(name):
    said = next(s for s in catalogue() if s.name == name)
    assert all((said.hardware, said.model, said.engine, said.source, said.licence, said.trust))
    assert said.combinations >= said.configurations
    notice = (RECORDED / "NOTICE").read_text()
    assert name in notice


@every_table
def test_every_row_of_a_shipped_table_is_replayed_exactly(name):
    table = TABLES[name]
    replay = Replay(table)
    for number, row in enumerate(table.rows):
        trial = replay(number, propose(row.config))
        assert trial.config == row.config
        assert trial.error == row.fault
        assert trial.joules_per_unit == (row.joules_per_unit if row.feasible else None)
        if row.feasible:
            assert trial.quality == "replayed"
            assert trial.units_per_second == pytest.approx(1 / row.seconds)
    assert replay.left == 0


@every_table
def test_every_value_of_a_shipped_table_was_measured(name):
    table = TABLES[name]
    for parameter in table.space.parameters:
        assert set(parameter.values) == {row.config[parameter.name] for row in table.rows}


# --- a small table ---

META = {
    "format": 1,
    "name": "small",
    "parameters": {
        "gpu": {"type": "category", "values": ["A", "B"], "meaning": "GPU type"},
        "batch": {"type": "integer", "values": [1, 8, 64], "meaning": "items together"},
        "fused": {"type": "boolean", "values": [False, True], "meaning": "fused kernels"},
    },
    "default": {"gpu": "A", "batch": 1, "fused": False},
    "default_note": "ours",
    "objective": "joules",
    "unit": "token",
    "throughput": "speed",
    "latency": "wait",
    "metrics": {"speed": "tokens per second", "wait": "s"},
    "others": {"degree": "never changes"},
    "limits": ["wait<=0.5"],
    "batch": "batch",
    "hardware": "h",
    "model": "m",
    "engine": "e",
    "task": "t",
    "kind": "inference",
    "source": "s",
    "revision": "r",
    "licence": "MIT",
    "trust": "A",
    "notes": "",
}
LINES = """gpu,batch,fused,joules,speed,wait,degree,failed
A,1,false,8.0,10,0.1,1,0
A,8,false,4.0,20,0.2,1,0
A,64,false,2.0,40,0.73,1,0
B,1,true,6.0,10,0.1,1,0
B,8,true,3.0,20,0.5,1,0
B,64,true,,,,1,1
"""


def made(folder, text=LINES, **changes):
    """A table on disk; None as a change leaves the key out."""
    about = {name: value for name, value in {**META, **changes}.items() if value is not None}
    (folder / "small.json").write_text(json.dumps(about))
    (folder / "small.csv").write_text(text)
    return folder / "small.csv"


def small(folder, text=LINES, **changes):
    return Table.load(made(folder, text, **changes))


def config(gpu, batch, fused):
    return {"gpu": gpu, "batch": batch, "fused": fused}


def test_the_space_holds_numbers_as_scales_and_all_else_as_choices(tmp_path):
    table = small(tmp_path)
    assert [(p.name, p.ordered, p.values, p.default) for p in space(table).parameters] == [
        ("gpu", False, ("A", "B"), "A"),
        ("batch", True, (1, 8, 64), 1),
        ("fused", False, (False, True), False),
    ]


def test_a_row_over_a_limit_costs_a_trial_says_why_and_can_never_be_the_best(tmp_path):
    table = small(tmp_path)
    replay = Replay(table)
    history = History()
    for number, row in enumerate(table.rows[:5]):
        history = history.add(replay(number, propose(row.config)))
    over = history.trials[2]
    assert over.error == "over the limit: wait 0.73 > 0.5"
    assert history.best.joules_per_unit == 3.0
    step = step_of(over, table)
    assert (step.joules_per_unit, step.true_joules_per_unit, step.feasible) == (None, 2.0, False)
    assert step.units_per_second == pytest.approx(40)


def test_a_row_that_failed_is_a_failed_trial_without_energy(tmp_path):
    table = small(tmp_path)
    trial = Replay(table)(1, propose(config("B", 64, True)))
    assert trial.error == "it failed when the table was recorded"
    step = step_of(trial, table)
    assert (step.joules_per_unit, step.true_joules_per_unit, step.units_per_second) == (None, None, None)


def test_the_reason_of_a_failure_is_told_where_the_table_has_one(tmp_path):
    text = LINES.replace("failed\n", "failed,error\n").replace(",0\n", ",0,\n").replace("1,1\n", "1,1,out of memory\n")
    assert small(tmp_path, text).rows[5].fault == "out of memory"


def test_what_was_never_measured_is_answered_with_the_nearest_row_and_both_are_told(tmp_path):
    table = small(tmp_path)
    # A/8/true: one category from A/8/false (row 1) and from B/8/true (row 4); the lower one is taken.
    trial = Replay(table)(1, propose(config("A", 8, True)))
    assert trial.config == config("A", 8, False)
    step = step_of(trial, table)
    assert step.proposed == config("A", 8, True)
    assert step.config == config("A", 8, False)
    assert step_of(Replay(table)(1, propose(config("A", 8, False))), table).proposed is None


def test_a_rank_step_counts_by_its_share_of_the_scale(tmp_path):
    """From B/1/false: B/1/true differs in one category (1), A/1/false in one (1); B/8/true is 1 + 1/2."""
    table = small(tmp_path)
    asked = config("B", 1, False)
    assert table.nearest(asked, [1, 4]).number == 1  # both 1.5
    assert table.nearest(asked, [4, 5]).number == 4  # 1.5 against 2
    assert table.nearest(asked, [2, 3]).number == 3  # 2 against 1


def test_a_row_that_was_measured_is_not_taken_again_while_another_is_left(tmp_path):
    table = small(tmp_path)
    replay = Replay(table)
    trials = [replay(n, propose(table.default.config)) for n in range(8)]
    numbers = [table.row(t.config).number for t in trials]
    assert sorted(numbers[:6]) == list(range(6))
    assert numbers[0] == numbers[6] == numbers[7] == 0


def test_the_number_of_a_trial_that_was_measured_launches_its_row_again(tmp_path):
    table = small(tmp_path)
    replay = Replay(table, noise_sigma=0.1)
    first, again = (replay(3, propose(table.default.config)) for _ in range(2))
    assert first.config == again.config
    assert first.joules_per_unit != again.joules_per_unit
    assert replay.left == 5


def test_an_illegal_proposal_is_refused(tmp_path):
    with pytest.raises(Refused, match="batch=7: expected one of 1, 8, 64"):
        Replay(small(tmp_path))(1, propose(config("A", 7, True)))


def test_training_tables_tell_their_speed_by_its_inverse(tmp_path):
    table = TABLES["zeus-a40-squad-bert-base-uncased"]
    trial = Replay(table)(0, propose(table.default.config))
    assert trial.measurements[0].work.unit == "epoch"
    assert trial.measurements[0].seconds == table.default.metrics["time_per_epoch"]


# --- noise ---


def test_noise_depends_on_seed_row_and_count_and_not_on_the_way_there(tmp_path):
    table = small(tmp_path)
    here, there = (Replay(table, noise_sigma=0.05, seed=7) for _ in range(2))
    a = [here(n, propose(table.rows[n].config)) for n in (0, 1, 3)]
    b = [there(n, propose(table.rows[n].config)) for n in (3, 1, 0)]
    assert [t.joules_per_unit for t in a] == [t.joules_per_unit for t in reversed(b)]
    other = Replay(table, noise_sigma=0.05, seed=8)(0, propose(table.rows[0].config))
    assert other.joules_per_unit != a[0].joules_per_unit


def test_noise_has_the_sigma_that_was_asked_for_and_the_truth_is_kept(tmp_path):
    """2000 draws: the standard error of a standard deviation is sigma / sqrt(4000), 1.6 %; five of them are 8 %."""
    table = small(tmp_path)
    replay = Replay(table, noise_sigma=0.05, seed=1)
    trials = [replay(0, propose(table.default.config)) for _ in range(2000)]
    logs = [math.log(t.joules_per_unit / 8.0) for t in trials]
    assert statistics.stdev(logs) == pytest.approx(0.05, rel=0.08)
    assert abs(statistics.fmean(logs)) < 5 * 0.05 / math.sqrt(2000)
    assert step_of(trials[0], table).true_joules_per_unit == 8.0
    assert problem(table, noise_sigma=0.05).noise_sigma == 0.05


REPEATED = """gpu,batch,fused,joules,speed,wait,degree,failed,repeat
A,1,false,8.0,10,0.1,1,0,0
A,1,false,2.0,30,0.3,1,0,1
A,8,false,4.0,20,0.2,1,0,0
A,8,false,,,,1,1,1
"""


def test_repeats_are_one_row_with_the_geometric_mean_of_their_energies(tmp_path):
    table = small(tmp_path, REPEATED)
    assert [row.joules for row in table.rows] == [(8.0, 2.0), (4.0,)]
    assert table.rows[0].joules_per_unit == pytest.approx(4.0)
    assert table.rows[0].metrics == {"speed": 20.0, "wait": 0.2}
    assert table.relative_sd == pytest.approx(math.log(4) / math.sqrt(2))


def test_resampling_answers_with_the_recorded_repeats_and_nothing_else(tmp_path):
    table = small(tmp_path, REPEATED)
    replay = Replay(table, resample=True)
    seen = [replay(0, propose(table.default.config)).joules_per_unit for _ in range(40)]
    assert set(seen) == {8.0, 2.0}
    assert problem(table, resample=True).noise_sigma == table.relative_sd


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"noise_sigma": -0.1}, "noise -0.1: expected a standard deviation from 0 to 1"),
        ({"noise_sigma": math.nan}, "noise nan: expected"),
        ({"noise_sigma": 2.0}, "noise 2: expected"),
        ({"resample": True}, "small: it has no repeats to resample"),
    ],
)
def test_noise_that_cannot_be_made_is_refused(tmp_path, options, sentence):
    with pytest.raises(Refused, match=sentence):
        Replay(small(tmp_path), **options)


# --- properties of the rule ---


@st.composite
def proposals(draw):
    table = TABLES[draw(st.sampled_from(SHIPPED))]
    one = st.fixed_dictionaries({p.name: st.sampled_from(p.values) for p in table.space.parameters})
    return table, draw(st.lists(one, min_size=1, max_size=40))


@given(proposals())
def test_no_row_is_measured_twice_while_another_is_left(case):
    table, asked = case
    replay = Replay(table)
    numbers = [table.row(replay(n, propose(c)).config).number for n, c in enumerate(asked)]
    most = min(len(asked), len(table.rows))
    assert len(set(numbers[:most])) == most


@given(proposals())
def test_replay_is_a_function_of_table_seed_and_proposals(case):
    table, asked = case
    here, there = Replay(table, noise_sigma=0.05, seed=3), Replay(table, noise_sigma=0.05, seed=3)
    assert [here(n, propose(c)) for n, c in enumerate(asked)] == [there(n, propose(c)) for n, c in enumerate(asked)]


@given(proposals())
def test_a_row_that_is_left_answers_for_itself_and_else_the_nearest_one_does(case):
    """The distance by its definition, in fractions of one, against the whole numbers that the table counts in."""
    table, asked = case
    replay, had = Replay(table), set()
    for number, wanted in enumerate(asked):
        got = table.row(replay(number, propose(wanted)).config)
        left = [row for row in table.rows if row.number not in had] or list(table.rows)

        def distance(row, wanted=wanted):
            far = 0.0
            for p in table.space.parameters:
                a, b = p.values.index(row.config[p.name]), p.values.index(wanted[p.name])
                far += abs(a - b) / max(len(p.values) - 1, 1) if p.ordered else float(a != b)
            return far

        assert distance(got) == pytest.approx(min(map(distance, left)))
        exact = table.row(wanted)
        if exact is not None and exact in left:
            assert got is exact
        had.add(got.number)


# --- the twin ---


@every_table
def test_a_twin_is_the_same_landscape_under_other_names(name):
    table = TABLES[name]
    twin = anonymise(table, 5)
    assert twin.anonymised
    assert problem(twin).anonymised
    assert not problem(table).anonymised
    pairs = list(zip(table.rows, twin.rows, strict=True))
    # One name for each name, one value for each value, and no two the same.
    for (own, p), (label, q) in zip(table.about.parameters.items(), twin.about.parameters.items(), strict=True):
        renamed = {(a.config[own], b.config[label]) for a, b in pairs}
        assert len(renamed) == len(p.values) == len({v for v, _ in renamed}) == len({v for _, v in renamed})
        if p.ordered:
            assert sorted(renamed) == list(zip(p.values, range(1, len(p.values) + 1), strict=True))
            assert q.values == tuple(range(1, len(p.values) + 1))
    ratios = {b.joules_per_unit / a.joules_per_unit for a, b in pairs if a.joules}
    assert len(ratios) == 1
    assert [a.feasible for a, _ in pairs] == [b.feasible for _, b in pairs]
    assert (table.default.number, table.best.number) == (twin.default.number, twin.best.number)


@every_table
def test_a_twin_names_nothing_that_the_table_is_known_by(name):
    table = TABLES[name]
    twin = anonymise(table, 5)
    told = json.dumps(
        [twin.space.record(), problem(twin).limits, [*problem(twin).facts.values()], twin.name, twin.about.objective]
    )
    words = [name, table.about.model, table.about.hardware, table.about.engine, *table.about.parameters]
    words += [str(v) for p in table.about.parameters.values() if not p.ordered for v in p.values]
    words += list(table.about.metrics)
    assert not [w for w in words if f'"{w}"' in told or (len(w) > 3 and w in told)]


@given(proposals(), st.integers(0, 3))
def test_a_twin_answers_as_its_table_does(case, seed):
    table, asked = case
    twin = anonymise(table, seed)
    rename = {
        name: {a.config[name]: b.config[label] for a, b in zip(table.rows, twin.rows, strict=True)}
        for name, label in zip(table.about.parameters, twin.about.parameters, strict=True)
    }
    here, there = Replay(table, noise_sigma=0.05), Replay(twin, noise_sigma=0.05)
    for number, wanted in enumerate(asked):
        own = here(number, propose(wanted))
        other = there(
            number,
            propose(
                {
                    label: rename[name][wanted[name]]
                    for name, label in zip(table.about.parameters, twin.about.parameters, strict=True)
                }
            ),
        )
        assert table.row(own.config).number == twin.row(other.config).number
        assert (own.error is None) == (other.error is None)


def test_the_categories_of_a_twin_stand_in_another_order_for_another_seed(tmp_path):
    table = small(tmp_path)
    orders = {tuple(row.config["p1"] for row in anonymise(table, seed).rows) for seed in range(20)}
    assert len(orders) == 2
    assert len({anonymise(table, seed).name for seed in range(20)}) == 20


def test_a_twin_keeps_the_parameter_that_sets_the_batch_and_tells_no_reasons(tmp_path):
    table = small(tmp_path)
    twin = anonymise(table, 1)
    assert (table.about.batch, twin.about.batch) == ("batch", "p2")
    assert twin.rows[5].fault == "it failed when the table was recorded"
    assert twin.rows[2].fault.startswith("over the limit: m2 ")


def test_more_than_26_categories_have_labels_of_their_own(tmp_path):
    values = [f"v{n:02d}" for n in range(30)]
    text = "gpu,joules,speed,wait,degree\n" + "".join(f"{v},1,1,0.1,1\n" for v in values)
    parameters = {"gpu": {"type": "category", "values": values, "meaning": "m"}}
    twin = anonymise(small(tmp_path, text, parameters=parameters, default={"gpu": "v00"}, batch=None), 1)
    labels = twin.space["p1"].values
    assert labels[:2] + labels[25:28] == ("a", "b", "z", "aa", "ab")
    assert {row.config["p1"] for row in twin.rows} == set(labels)


# --- limits ---


@pytest.mark.parametrize(
    ("text", "value", "fault"),
    [
        ("wait<=0.5", 0.5, None),
        ("wait <= 0.5", 0.73, "over the limit: wait 0.73 > 0.5"),
        ("wait>=1e1", 9.5, "under the limit: wait 9.5 < 10"),
        ("wait>=-.5", -0.5, None),
        ("wait<=1", 1.00000001, "over the limit: wait 1.00000001 > 1.0"),
    ],
)
def test_a_limit_is_a_column_a_sign_and_a_number(text, value, fault):
    assert Limit.parse(text, ["wait"]).broken({"wait": value}) == fault


@pytest.mark.parametrize(
    "text",
    [
        "wait",
        "wait<0.5",
        "wait=0.5",
        "wait<=",
        "<=0.5",
        "wait<=x",
        "wait<=1e999",
        "wait<=__import__('os')",
        "0.5>=wait",
    ],
)
def test_a_limit_of_another_form_is_refused(text):
    with pytest.raises(Refused, match="expected METRIC<=NUMBER or METRIC>=NUMBER"):
        Limit.parse(text, ["wait"])


def test_a_limit_of_an_unknown_metric_names_those_there_are():
    with pytest.raises(
        Refused, match=r"no metric is called .wiat.; did you mean wait\? \(the metrics are speed, wait\)"
    ):
        Limit.parse("wiat<=1", ["speed", "wait"])


@given(st.floats(0.001, 1e6), st.sampled_from(["<=", ">="]))
def test_a_limit_is_read_back_from_how_it_is_written(bound, sign):
    limit = Limit.parse(f"x{sign}{bound!r}", ["x"])
    again = Limit.parse(str(limit), ["x"])
    assert again.bound == pytest.approx(bound, rel=1e-11)
    assert (again.column, again.most) == ("x", sign == "<=")


# --- bad input ---


def parameters(**changes):
    return {**META["parameters"], **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"licence": None, "unit": None}, "small.json: missing: unit, licence"),
        ({"format": 2}, "written in format 2, this tune reads up to format 1"),
        ({"unit": "page"}, 'unit "page": expected token, image, epoch'),
        ({"unit": ["token"]}, "unit .* expected token, image, epoch"),
        ({"colour": "red"}, "colour"),
        ({"parameters": {}}, "expected at least one parameter"),
        ({"parameters": parameters(gpu={"type": "colour", "values": ["A"], "meaning": ""})}, "colour"),
        ({"parameters": parameters(gpu={"type": "category", "values": [], "meaning": ""})}, "gpu: expected values"),
        ({"parameters": parameters(gpu={"type": "category", "values": ["A", "A"], "meaning": ""})}, "each one once"),
        ({"parameters": parameters(gpu={"type": "integer", "values": ["A"], "meaning": ""})}, "of type integer"),
        ({"parameters": parameters(gpu={"type": "integer", "values": [True], "meaning": ""})}, "of type integer"),
        ({"parameters": parameters(gpu={"type": "integer", "values": [8, 1], "meaning": ""})}, "ascending order"),
        ({"metrics": {"speed": "", "wait": "", "gpu": ""}}, "gpu: described twice"),
        ({"metrics": {"speed": "", "wait": "", "failed": ""}}, "failed: a column of that name has a meaning"),
        ({"throughput": "pace"}, 'throughput="pace": expected one of the metrics'),
        ({"throughput": None}, "expected `throughput` or `seconds_per_unit`"),
        ({"batch": "size"}, 'batch="size": expected one of the parameters'),
        ({"default": {"gpu": "A"}}, "the default has no value for batch, fused"),
        ({"default": {**config("A", 1, False), "x": 1}}, "the default is no configuration of the table: .x.: no such"),
        ({"default": config("C", 1, False)}, "the default is no configuration of the table: gpu=.C.: expected one of"),
        ({"default": config("A", 8, True)}, r"the default \(gpu=A, batch=8, fused=true\) was not measured"),
        ({"default": config("B", 64, True)}, "was not measured"),
        ({"limits": ["wait<=0.01"]}, r"no row is within the limits \(wait<=0.01\)"),
        ({"limits": ["wait=1"]}, "limit .wait=1.: expected METRIC<=NUMBER"),
        ({"limits": ["joules<=1"]}, "no metric is called"),
    ],
)
def test_metadata_that_does_not_fit_is_refused_in_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(Refused, match=sentence) as refused:
        small(tmp_path, **changes)
    assert "\n" not in str(refused.value)
    assert "small." in str(refused.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "missing columns: gpu, batch"),
        (LINES.splitlines()[0] + "\n", "it has no rows"),
        (LINES.replace("degree", "degre"), "unknown columns: .degre.; did you mean degree"),
        (LINES.replace(",degree", "").replace(",1,0\n", ",0\n").replace(",1,1\n", ",1\n"), "missing columns: degree"),
        (LINES.replace("degree", "wait"), "two columns called wait"),
        (LINES.replace("8.0", "nan"), r"line 2: joules=.nan.: expected a finite number"),
        (LINES.replace("8.0", "inf"), r"line 2: joules=.inf.: expected a finite number"),
        (LINES.replace("8.0", "much"), r"line 2: joules=.much.: expected a finite number"),
        (LINES.replace("8.0", ""), r"line 2: joules=..: expected a finite number"),
        (LINES.replace("8.0", "0"), "line 2: joules=0: expected a number above 0"),
        (LINES.replace("8.0", "-8"), "line 2: joules=-8: expected a number above 0"),
        (LINES.replace("8.0,10", "8.0,0"), "line 2: speed=0: expected a number above 0"),
        (LINES.replace("8.0,10", "8.0,"), "line 2: speed: empty, in a row that did not fail"),
        (LINES.replace("8.0,10,0.1", "8.0,10,"), "line 2: wait: empty, in a row that did not fail"),
        (LINES.replace("A,64", "A,65"), r"line 4: batch=.65.: expected one of 1, 8, 64"),
        (LINES.replace("A,64", "A,many"), r"line 4: batch=.many.: expected one of 1, 8, 64"),
        (LINES.replace("A,64", "C,64"), r"line 4: gpu=.C.: expected one of A, B"),
        (LINES.replace("B,1,true", "B,1,1"), r"line 5: fused=.1.: expected one of false, true"),
        (LINES + "A,1,false,9,10,0.1,1,0\n", r"line 8: the same row as line 2 \(gpu=A, batch=1, fused=false\)"),
        (REPEATED + "A,8,false,4,20,0.2,1,0,0\n", "line 6: the same row as line 4 .*, repeat 0"),
        (REPEATED.replace("1,0,1", "1,0,-1"), r"line 3: repeat=.-1.: expected a whole number"),
        (
            LINES.replace("A,1,false,8.0,10,0.1,1,0", "A,1,false,8.0,10,0.1,1,no"),
            r"line 2: failed=.no.: expected 0 or 1",
        ),
        (LINES.replace("A,1,false,8.0,10,0.1,1,0", "A,1,false,8.0"), "line 2: expected 8 cells, got 4"),
        (LINES.replace("A,1", '"A"x,1'), "line 2: not CSV"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused_in_one_sentence(tmp_path, text, sentence):
    with pytest.raises(Refused, match=sentence) as refused:
        small(tmp_path, text)
    assert "\n" not in str(refused.value)
    assert "small.csv" in str(refused.value)


def test_a_table_whose_every_row_failed_is_refused(tmp_path):
    text = LINES.splitlines()[0] + "\nA,1,false,,,,1,1\n"
    with pytest.raises(Refused, match="was not measured"):
        small(tmp_path, text, limits=[])


def test_a_table_without_metadata_is_refused_and_not_listed(tmp_path):
    (tmp_path / "results" / "recorded").mkdir(parents=True)
    path = tmp_path / "results" / "recorded" / "lonely.csv"
    path.write_text(LINES)
    with pytest.raises(Refused, match=r"the metadata is missing: expected lonely\.json beside it"):
        Table.load(path)
    assert "lonely" not in names("recorded")


@pytest.mark.parametrize(
    ("content", "sentence"), [("{", "not JSON"), ("[]", "expected an object"), ("\xff", "not JSON")]
)
def test_metadata_that_is_no_object_is_refused(tmp_path, content, sentence):
    path = made(tmp_path)
    path.with_suffix(".json").write_bytes(content.encode("latin-1"))
    with pytest.raises(Refused, match=sentence):
        Table.load(path)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    path = made(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(Refused, match="it is not UTF-8"):
        Table.load(path)
    path.unlink()
    with pytest.raises(Refused, match="No such file"):
        Table.load(path)
    path.with_suffix(".json").unlink()
    path.with_suffix(".json").mkdir()
    with pytest.raises(Refused, match="Is a directory"):
        Table.load(path)
    with pytest.raises(Refused, match="expected a table's CSV file"):
        Table.load(path.with_suffix(".txt"))


def test_an_unknown_table_is_refused_with_what_there_is():
    with pytest.raises(Refused, match=r'unknown table "tx2-inceptionv3"; did you mean tx2-inceptionv3-400px\?'):
        Table.named("tx2-inceptionv3")


def test_a_table_of_ones_own_is_found_by_name_and_by_path(tmp_path):
    folder = tmp_path / "results" / "recorded"
    folder.mkdir(parents=True)
    path = made(folder)
    assert Table.named("small").path == path
    assert Table.named(str(path)).name == "small"
    assert "small" in [s.name for s in catalogue()]


def test_a_byte_order_mark_and_blank_lines_are_no_obstacle(tmp_path):
    assert len(small(tmp_path, "\ufeff" + LINES.replace("\nB", "\n\nB")).rows) == 6
