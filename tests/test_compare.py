import csv
import io
import json
import math
import os
import threading
from dataclasses import replace

import msgspec
import pytest
from fakes.chats import QueueChat
from hypothesis import given
from hypothesis import strategies as st

from tuner.calls import NAME as CALLS
from tuner.calls import Call, CallError, Calls, CappedChat, StoredChat, call_key, read_calls
from tuner.compare import (
    HEADER,
    MOVED,
    RUNS,
    Job,
    Store,
    batch_name,
    jobs_of,
    load_table,
    make_runs,
    method_name,
    parse_methods,
    parse_tables,
    question,
    read_question,
    read_runs,
    replayed,
    run_one,
    unsuited,
    view_of,
)
from tuner.convergence import Target
from tuner.files import find
from tuner.journal import JournalError
from tuner.live import latin_order
from tuner.outcome import Outcome, parse_targets
from tuner.proposers import open_classical
from tuner.proposers.llm import Llm, read_template, render
from tuner.replay import Replay, problem
from tuner.runs import Run, Step
from tuner.space import Refused
from tuner.trial import ChatError, History, Message, Proposal, Reply

SMALL = "anl-1024-meta-llama-3-8b"
LIMITED = "zeus-a40-squad-bert-base-uncased"
SPARSE = "mle3-gpqa-gpt-oss-120b"
"""39 of 64 combinations were measured, 20 of them within the limit."""


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def ran(name=LIMITED, method="random", seed=0, budget=8, **more):
    return run_one(load_table(name), open_classical(method, seed), method=method, seed=seed, budget=budget, **more)


def without_clock(run):
    return replace(run, seconds=0.0, started_unix=0.0)


def asked(**more):
    usual = {"name": "c", "tables": (LIMITED,), "methods": ("rules", "random"), "seeds": 2, "trials": 4}
    return question(**{**usual, **more})


class Scripted:
    """Proposes from a list, then whatever the space's default is."""

    name = "scripted"

    def __init__(self, *configs, fails_at=None):
        self.configs, self.fails_at = configs, fails_at
        self.histories = []

    def propose(self, space, history):
        self.histories.append(history)
        number = len(history) - 1
        if number == self.fails_at:
            raise ChatError("it stays away; everything measured is kept, and `tune run --resume` goes on")
        return Proposal(config=self.configs[number], source=self.name) if number < len(self.configs) else None


# --- one run ---


@pytest.mark.parametrize("method", ["rules", "sobol", "tpe", "cmaes", "grid", "largest"])
def test_every_method_starts_from_the_same_trial_0(method):
    first = ran(method=method).steps[0]
    assert first == ran(method="random").steps[0]
    assert dict(first.config) == load_table(LIMITED).about.default


def test_a_run_makes_so_many_proposals_after_the_default():
    assert [step.number for step in ran(budget=8).steps] == list(range(9))


def test_a_run_ends_when_every_row_was_measured():
    run = ran(SMALL, budget=100)
    assert (len(run.steps), run.exhausted, run.complete) == (20, True, True)
    assert len({tuple(step.config.items()) for step in run.steps}) == 20


def test_a_run_is_the_same_whoever_makes_it_and_whenever():
    job = Job(
        table=LIMITED, twin=False, problem=LIMITED, method="tpe", seed=3, budget=8, noise_sigma=0.05, resample=False
    )
    alone = without_clock(replayed(job))
    ran(method="tpe", seed=1)
    assert without_clock(replayed(job)) == alone


def test_methods_with_one_seed_meet_the_same_noise_in_the_same_row():
    noisy = [ran(method=m, seed=4, budget=40, noise_sigma=0.1) for m in ("random", "grid")]
    seen = [{tuple(s.config.items()): s.joules_per_unit for s in run.steps if s.feasible} for run in noisy]
    shared = seen[0].keys() & seen[1].keys()
    assert len(shared) > 5
    assert all(seen[0][row] == seen[1][row] for row in shared)


def test_noise_differs_from_seed_to_seed_and_the_truth_does_not():
    one, other = (ran(seed=seed, budget=0, noise_sigma=0.1).steps[0] for seed in (0, 1))
    assert one.joules_per_unit != other.joules_per_unit
    assert one.true_joules_per_unit == other.true_joules_per_unit


def test_a_row_that_breaks_a_limit_costs_a_proposal_and_says_which():
    broken = [step for step in ran(budget=20).steps if not step.feasible]
    assert broken
    assert all(step.joules_per_unit is None and "over the limit: time_per_epoch" in step.error for step in broken)
    assert all(step.true_joules_per_unit for step in broken)


def test_a_default_that_breaks_the_limit_is_not_run_twice(tmp_path):
    table = load_table(LIMITED)
    bad = next(row for row in table.rows if not row.feasible)
    about = msgspec.structs.replace(table.about, default=bad.config)
    run = run_one(replace(table, about=about), open_classical("random", 0), method="random", seed=0, budget=3)
    assert not run.steps[0].feasible
    assert dict(run.steps[1].config) != dict(bad.config)


def unmeasured(table):
    return next(
        config
        for config in (table.space.at([u / 64, v / 64, w / 2]) for u in range(64) for v in range(64) for w in range(2))
        if table.row(config) is None
    )


def test_a_proposal_that_was_never_measured_is_moved_and_the_method_is_told():
    table = load_table(SPARSE)
    wanted = unmeasured(table)
    method = Scripted(wanted, wanted)
    run = run_one(table, method, method="scripted", seed=0, budget=2)
    assert dict(run.steps[1].proposed) == wanted
    assert table.row(run.steps[1].config) is not None
    told = method.histories[1]
    assert dict(told.trials[1].config) == dict(run.steps[1].config)
    assert (told.decisions[0].remark, told.decisions[0].proposal.config) == (MOVED, wanted)


@pytest.mark.parametrize("method", ["rules", "sobol", "random", "grid", "largest", "tpe", "cmaes"])
def test_no_method_proposes_twice_what_was_moved(method):
    run = ran(SPARSE, method=method, budget=30)
    moved = [tuple(step.proposed.items()) for step in run.steps if step.proposed is not None]
    assert len(moved) == len(set(moved))


def test_a_chat_that_stays_away_ends_the_run_and_keeps_its_steps():
    configs = [row.config for row in load_table(LIMITED).rows[:2]]
    run = run_one(load_table(LIMITED), Scripted(*configs, fails_at=2), method="scripted", seed=0, budget=9)
    assert (len(run.steps), run.complete, run.error) == (3, False, "it stays away")


def test_random_is_a_draw_without_repetition():
    """After n draws from N rows of which k are good, none is found with probability C(N-k, n) / C(N, n)."""
    table = load_table(LIMITED)
    target = table.best.joules_per_unit * 1.1
    good = {tuple(r.config.items()) for r in table.feasible if r.joules_per_unit <= target}
    # The default is measured first and is none of the good ones: 71 rows are left to draw from.
    left, draws, runs = len(table.rows) - 1, 10, 400
    expected = 1 - math.comb(left - len(good), draws) / math.comb(left, draws)
    found = sum(
        any(tuple(step.config.items()) in good for step in ran(seed=seed, budget=draws).steps) for seed in range(runs)
    )
    assert abs(found / runs - expected) < 3.5 * math.sqrt(expected * (1 - expected) / runs)


# --- what is asked ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rulez", ['"rulez"', "did you mean rules?", "sobol", "enhanced"]),
        ("enhance", ["did you mean enhanced?"]),
        ("", ["expected names"]),
        (" , ", ["expected names"]),
        ("rules,rules", ["rules is named twice"]),
        ("./none.md.j2", ["no such prompt file"]),
    ],
)
def test_methods_that_cannot_be_compared_are_refused_with_what_there_is(text, words):
    with pytest.raises(Refused) as refusal:
        parse_methods(text)
    assert all(word in str(refusal.value) for word in words)


def test_a_template_of_ones_own_is_a_method_by_its_file_name(tmp_path):
    mine = tmp_path / "mine.md.j2"
    mine.write_text("{{ goal }}")
    (found,) = parse_methods(str(mine))
    assert (found, method_name(found)) == (str(mine), "mine")


def test_two_templates_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.md.j2").write_text("x")
    with pytest.raises(Refused, match="mine is named twice"):
        parse_methods("a/mine.md.j2,b/mine.md.j2")


def test_a_template_in_the_current_folder_goes_before_the_shipped_one(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "enhanced.md.j2").write_text("x")
    assert parse_methods("enhanced,baseline") == (str(tmp_path / "prompts" / "enhanced.md.j2"), "baseline")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zeus-a40-squad-bert-base", ["unknown table", "did you mean"]),
        ("", ["expected names"]),
        (f"{SMALL},{SMALL}", ["named twice"]),
    ],
)
def test_tables_that_are_not_there_are_refused(text, words):
    with pytest.raises(Refused) as refusal:
        parse_tables(text)
    assert all(word in str(refusal.value) for word in words)


def test_all_tables_are_those_that_are_shipped():
    assert {SMALL, LIMITED, SPARSE} < set(parse_tables("all"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"seeds": 0}, "--seeds 0"),
        ({"trials": 0}, "--trials 0"),
        ({"trials": 10**6}, "--trials 1000000"),
        ({"methods": ()}, "--methods"),
        ({"methods": ("largest",), "tables": (SMALL,)}, "has a limit and a batch"),
        ({"noise_sigma": 7.0}, "noise 7"),
        ({"resample": True}, "no repeats to resample"),
    ],
)
def test_a_comparison_of_nothing_is_refused_before_it_begins(more, words):
    with pytest.raises(Refused, match=words):
        asked(**more)


def test_a_broken_template_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "mine.md.j2").write_text("{{ secrets }}")
    with pytest.raises(Refused, match="secrets"):
        asked(methods=(str(tmp_path / "mine.md.j2"),))


def test_largest_is_left_out_where_there_is_no_limit_and_says_so():
    found = asked(tables=(SMALL, LIMITED), methods=("largest", "random"))
    assert len(found.left_out) == 1
    assert SMALL in found.left_out[0]
    assert {(j.problem, j.method) for j in jobs_of(found, {})} == {
        (SMALL, "random"),
        (LIMITED, "random"),
        (LIMITED, "largest"),
    }


def test_a_limited_table_without_a_batch_has_no_largest():
    table = load_table(LIMITED)
    parameters = {"power_limit": table.about.parameters["power_limit"]}
    about = msgspec.structs.replace(table.about, parameters=parameters, batch=None)
    assert "is a batch" in unsuited("largest", replace(table, about=about))


def test_an_anonymised_twin_keeps_its_batch_and_is_a_problem_of_its_own():
    found = asked(anonymised=True)
    assert [p.anonymised for p in found.problems] == [False, True]
    twin = load_table(LIMITED, twin=True)
    assert batch_name(twin) in twin.about.parameters
    assert len(jobs_of(found, {})) == 8


def test_rules_of_position_do_the_same_on_a_table_and_its_twin():
    jobs = jobs_of(asked(anonymised=True, methods=("largest",), seeds=1), {})
    table, twin = (replayed(job) for job in jobs)
    scale = twin.steps[0].true_joules_per_unit / table.steps[0].true_joules_per_unit
    assert [s.true_joules_per_unit * scale for s in table.steps] == pytest.approx(
        [s.true_joules_per_unit for s in twin.steps]
    )


@pytest.mark.parametrize(
    ("more", "command"),
    [
        ({}, f"tune compare --table {LIMITED} --methods rules,random --seeds 2 --trials 4"),
        ({"noise_sigma": 0.04, "anonymised": True}, "--trials 4 --noise 0.04 --anonymise"),
        ({"tables": tuple(parse_tables("all")), "max_prompts": 9, "llm": "openai:m"}, "--llm openai:m --max-prompts 9"),
        ({"replay_llm": "a b", "llm": "openai:m", "threshold": "0.8x"}, "--threshold 0.8x --replay-llm 'a b'"),
    ],
)
def test_the_command_makes_the_same_runs_again(more, command):
    assert command in asked(**more).command


def test_jobs_go_seed_by_seed_so_that_what_is_done_is_paired():
    assert [(j.seed, j.method) for j in jobs_of(asked(), {})] == [
        (0, "rules"),
        (0, "random"),
        (1, "rules"),
        (1, "random"),
    ]


def test_only_missing_runs_and_those_that_ended_early_are_jobs():
    done = Run(problem=LIMITED, method="rules", seed=0)
    early = Run(problem=LIMITED, method="random", seed=0, error="it stayed away")
    left = jobs_of(asked(), {(r.problem, r.method, r.seed): r for r in (done, early)})
    assert [(j.seed, j.method) for j in left] == [(0, "random"), (1, "rules"), (1, "random")]


# --- what a template sees ---


def test_a_template_sees_limits_and_hardware_and_neither_the_best_nor_the_table_name():
    table = load_table(LIMITED)
    seen = view_of(problem(table), 20, None).of(table.space, after_the_default(table))
    text = json.dumps(seen, default=str)
    assert "A40" in text
    assert "time_per_epoch<=1030.065" in text
    assert f"{table.best.joules_per_unit:g}"[:6] not in text
    assert table.name not in text
    assert seen["goal"]["trials_left"] == 20


def test_a_template_sees_the_figures_that_limits_are_set_on_of_what_keeps_to_them():
    table = load_table(LIMITED)
    seen = view_of(problem(table), 20, None).of(table.space, after_the_default(table))
    metrics = seen["history"]["results"][0]["metrics"]
    assert metrics == {"time_per_epoch": table.default.metrics["time_per_epoch"]}


def test_a_prompt_of_a_recorded_problem_never_says_that_it_is_replayed():
    table = load_table(LIMITED)
    view = view_of(problem(table), 20, None).of(table.space, after_the_default(table))
    for name in ("enhanced", "baseline"):
        path = find("prompts", name)
        assert "replay" not in render(read_template(path), path, view)


def test_a_repeated_answer_is_refused_without_a_word_of_replay():
    table = load_table(LIMITED)
    again = '{"reason": "stay", "changes": {}}'
    chat = QueueChat(*[again] * 4)
    view = view_of(problem(table), 20, None)
    llm = Llm(chat=chat, template=find("prompts", "baseline"), fallback=open_classical("rules", 0), view=view)
    proposal = llm.propose(table.space, after_the_default(table))
    assert "already trial 0" in proposal.exchanges[0].fault
    assert not [e for e in proposal.exchanges if "replay" in e.prompt + e.fault]


@pytest.mark.parametrize("name", ["enhanced", "baseline"])
def test_both_shipped_prompts_tell_the_limits(name):
    table = load_table(LIMITED)
    view = view_of(problem(table), 20, None).of(table.space, after_the_default(table))
    path = find("prompts", name)
    assert "time_per_epoch<=1030.065" in render(read_template(path), path, view)


def after_the_default(table):
    default = Proposal(config=dict(table.about.default), source="default")
    return History().add(Replay(table)(0, default))


def test_a_template_on_a_twin_is_told_no_hardware_model_or_engine():
    table = load_table(LIMITED, twin=True)
    view = view_of(problem(table), 20, "0.8x")
    assert view.machine == {}
    assert "not told" not in json.dumps(dict(view.workload))
    assert view.threshold(after_the_default(table)) == pytest.approx(0.8 * table.default.joules_per_unit)


# --- targets ---


@pytest.mark.parametrize(
    ("within", "threshold", "found"),
    [
        (None, None, (Target("within", 0.05), Target("within", 0.10))),
        ("2.5 %", None, (Target("within", 0.025),)),
        (None, "0.8x", (Target("ratio", 0.8),)),
        ("5%,5%", "450mJ", (Target("within", 0.05), Target("absolute", 0.45))),
    ],
)
def test_targets_are_read_as_they_are_typed(within, threshold, found):
    assert parse_targets(within, threshold) == found


@pytest.mark.parametrize("within", ["5", "-5%", "x", "5%,", "1001%", "5%;10%"])
def test_a_share_that_is_none_is_refused(within):
    with pytest.raises(Refused, match="--within"):
        parse_targets(within, None)


# --- the folder ---


def stored(folder, *runs, tail=b""):
    with Store.create(folder, asked()) as store:
        for run in runs:
            store.add(run)
    with (folder / RUNS).open("ab") as file:
        file.write(tail)


RUN = Run(
    problem=LIMITED,
    method="random",
    seed=0,
    steps=(Step(number=0, config={"a": True, "b": 1, "c": 0.5, "d": "x"}, joules_per_unit=1.5, feasible=True),),
    budget=4,
)


def test_what_was_asked_and_every_run_come_back_as_they_were(tmp_path):
    these = asked()
    with Store.create(tmp_path, these) as store:
        store.add(RUN)
    assert read_question(tmp_path) == these
    assert read_runs(tmp_path) == {(LIMITED, "random", 0): RUN}
    assert type(read_runs(tmp_path)[LIMITED, "random", 0].steps[0].config["a"]) is bool


def test_a_torn_last_line_is_forgiven_and_cut_off(tmp_path):
    stored(tmp_path, RUN, tail=b'{"problem": "z')
    assert len(read_runs(tmp_path)) == 1
    with Store(tmp_path) as store:
        store.add(replace(RUN, seed=1))
    assert set(read_runs(tmp_path)) == {(LIMITED, "random", 0), (LIMITED, "random", 1)}


def test_a_torn_line_in_the_middle_is_named(tmp_path):
    stored(tmp_path, RUN, tail=b"{}\n")
    with pytest.raises(Refused, match="line 2 is damaged"):
        read_runs(tmp_path)


def test_a_run_that_was_made_again_takes_the_place_of_the_one_that_ended_early(tmp_path):
    stored(tmp_path, replace(RUN, error="it stayed away"), RUN)
    assert read_runs(tmp_path)[LIMITED, "random", 0].complete


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no comparison here"), (b"[]", "no header"), (b"{", "no header"), (b'{"format": 99}', "format 99")],
)
def test_a_folder_that_is_no_comparison_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / HEADER).write_bytes(content)
    with pytest.raises(Refused, match=words):
        read_question(tmp_path)


def test_a_disk_that_is_full_is_a_sentence_and_keeps_whole_lines(tmp_path, monkeypatch):
    store = Store.create(tmp_path, asked())
    store.add(RUN)
    store.flush()
    monkeypatch.setattr(os, "fsync", lambda _descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    store.add(replace(RUN, seed=1))
    with pytest.raises(JournalError, match=r"No space left.*tune compare --resume"):
        store.flush()
    monkeypatch.undo()
    store.__exit__(None, None, None)
    assert list(read_runs(tmp_path)) == [(LIMITED, "random", 0)]


# --- stored calls ---


class Talker:
    """Answers with a number that goes up; every second time it stays away, when it is told to."""

    name = "talker"

    def __init__(self, *, fails=False):
        self.asked = 0
        self.fails = fails

    def reply(self, messages, schema):
        self.asked += 1
        if self.fails:
            raise ChatError("no")
        return Reply(text=str(self.asked), model="talker-1", input_tokens=3, output_tokens=1)


def chat(calls, inner, seed=0):
    return StoredChat(calls=calls, inner=inner, problem="p", method="m", seed=seed, name="talker", clock=lambda: 1.0)


ASK = [Message("user", "what now?")]


@pytest.fixture
def calls(tmp_path):
    store = Calls(tmp_path)
    yield store
    store.close()


def test_an_answer_is_stored_and_told_again_to_the_same_prompt_at_the_same_place(tmp_path, calls):
    inner = Talker()
    first = chat(calls, inner).reply(ASK, None)
    calls.close()
    again = Calls(tmp_path)
    assert chat(again, inner).reply(ASK, None) == first
    assert inner.asked == 1
    again.close()
    calls._descriptor = os.open(os.devnull, os.O_RDONLY)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"position": 1},
        {"messages": [Message("user", "what else?")]},
        {"messages": [Message("assistant", "what now?")]},
        {"problem": "q"},
        {"method": "n"},
    ],
)
def test_a_call_is_known_by_its_run_its_place_and_every_message(other):
    usual = {"problem": "p", "method": "m", "seed": 0, "position": 0, "messages": ASK}
    assert call_key(**usual) != call_key(**{**usual, **other})


def test_in_a_replay_a_prompt_without_an_answer_is_not_asked(tmp_path):
    store = Calls(tmp_path, others={})
    with pytest.raises(CallError, match="no stored answer"):
        chat(store, None).reply(ASK, None)
    store.close()


def test_a_replay_keeps_the_answers_that_it_told(tmp_path, calls):
    first = chat(calls, Talker()).reply(ASK, None)
    (tmp_path / "new").mkdir()
    replay = Calls(tmp_path / "new", others=read_calls(tmp_path))
    assert chat(replay, None).reply(ASK, None) == first
    replay.close()
    assert read_calls(tmp_path / "new") == read_calls(tmp_path)


def test_the_cap_holds_over_all_runs_and_sittings(tmp_path):
    inner = Talker()
    for sitting, allowed in enumerate((2, 1)):
        store = Calls(tmp_path, most=2 + sitting)
        for _ in range(allowed):
            chat(store, inner, seed=inner.asked).reply(ASK, None)
        with pytest.raises(CallError, match="cap of"):
            chat(store, inner, seed=99).reply(ASK, None)
        store.close()
    assert inner.asked == 3


def test_a_call_that_failed_does_not_count_towards_the_cap(tmp_path):
    store = Calls(tmp_path, most=1)
    with pytest.raises(ChatError, match="no"):
        chat(store, Talker(fails=True)).reply(ASK, None)
    assert chat(store, Talker()).reply(ASK, None).text == "1"
    store.close()


def test_the_cap_holds_among_threads(tmp_path):
    store, inner = Calls(tmp_path, most=5), Talker()
    refused = []

    def talk(seed):
        try:
            chat(store, inner, seed=seed).reply(ASK, None)
        except CallError as error:
            refused.append(error)

    threads = [threading.Thread(target=talk, args=(seed,)) for seed in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    assert (inner.asked, len(refused), len(read_calls(tmp_path))) == (5, 15, 5)


def test_a_torn_last_call_is_forgiven_and_one_before_it_is_named(tmp_path, calls):
    chat(calls, Talker()).reply(ASK, None)
    path = tmp_path / CALLS
    with path.open("ab") as file:
        file.write(b'{"problem"')
    assert len(read_calls(tmp_path)) == 1
    reopened = Calls(tmp_path)
    reopened.close()
    assert path.read_bytes().endswith(b"}\n")
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(Refused, match="line 1 is damaged"):
        read_calls(tmp_path)


def test_the_cap_of_live_studies_is_shared_by_their_chats():
    left = [1]
    one, other = (CappedChat(Talker(), left) for _ in range(2))
    assert (one.reply(ASK, None).text, one.name) == ("1", "talker")
    with pytest.raises(CallError):
        other.reply(ASK, None)


# --- making runs ---


def test_runs_made_by_many_processes_are_those_made_alone(tmp_path):
    reports = []
    with Store.create(tmp_path, asked(methods=("random", "largest"))) as store:
        make_runs(
            asked(methods=("random", "largest")),
            store,
            chat=None,
            others=None,
            report=lambda done, total, left: reports.append((done, total)),
        )
    made = read_runs(tmp_path)
    assert reports == [(n, 4) for n in range(5)]
    assert {k: without_clock(r) for k, r in made.items()} == {
        job.key: without_clock(replayed(job)) for job in jobs_of(asked(methods=("random", "largest")), {})
    }


class Answering:
    """A model that changes one thing after another, and leaves after so many answers."""

    name = "answering"

    def __init__(self, leaves_after=10**9):
        self.prompts, self.leaves_after = [], leaves_after
        self.lock = threading.Lock()

    def reply(self, messages, schema):
        with self.lock:
            if len(self.prompts) >= self.leaves_after:
                raise ChatError("gone; everything measured is kept, and `tune run --resume` goes on")
            self.prompts.append(messages[-1].content)
        rows = load_table(LIMITED).rows
        # The same prompt gets the same answer, another one most likely another.
        row = rows[sum(map(ord, messages[-1].content)) % len(rows)]
        return Reply(text=json.dumps({"changes": row.config}), model="answering-1", input_tokens=10, output_tokens=2)


TALKS = {"methods": ("enhanced", "baseline"), "llm": "openai:m", "seeds": 3}


def talked(folder, chat, others=None, inline=False, **more):
    these = asked(**{**TALKS, **more})
    folder.mkdir(exist_ok=True)
    with Store(folder) if (folder / HEADER).exists() else Store.create(folder, these) as store:
        make_runs(these, store, chat=chat, others=others, report=lambda *_: None, inline_chat=inline)
    return {k: without_clock(r) for k, r in read_runs(folder).items()}


def test_conversations_are_held_and_every_call_is_kept(tmp_path):
    model = Answering()
    runs = talked(tmp_path / "a", model)
    assert len(runs) == 6
    assert sum(run.prompts for run in runs.values()) == len(model.prompts) == len(read_calls(tmp_path / "a"))
    assert {run.llm for run in runs.values()} == {"answering-1"}
    assert all(run.input_tokens == 10 * run.prompts for run in runs.values())
    kept = next(iter(read_calls(tmp_path / "a").values()))
    assert isinstance(kept, Call)
    assert kept.prompt in model.prompts


@pytest.mark.parametrize("inline", [False, True])
def test_a_replay_of_stored_answers_makes_identical_runs_and_asks_nobody(tmp_path, inline):
    first = talked(tmp_path / "a", Answering())
    assert talked(tmp_path / "b", None, others=read_calls(tmp_path / "a"), inline=inline) == first


@pytest.mark.parametrize("inline", [False, True])
def test_a_chat_that_leaves_half_way_keeps_what_is_measured_and_the_resume_pays_for_the_rest_alone(tmp_path, inline):
    whole = talked(tmp_path / "whole", Answering())
    part = talked(tmp_path / "part", Answering(leaves_after=7), inline=inline)
    ended = [run for run in part.values() if not run.complete]
    assert ended
    assert len(part) < 6
    assert {run.error for run in ended} == {"gone"}
    assert any(len(run.steps) > 1 for run in ended)
    model = Answering()
    assert talked(tmp_path / "part", model) == whole
    assert len(model.prompts) == sum(run.prompts for run in whole.values()) - 7


def test_the_cap_ends_conversations_and_nothing_stands_in_for_them(tmp_path):
    model = Answering()
    runs = talked(tmp_path / "a", model, max_prompts=5)
    assert len(model.prompts) == 5
    assert any("cap of 5 prompts" in run.error for run in runs.values() if run.error)
    assert not all(run.complete for run in runs.values())


def test_what_breaks_in_a_conversation_breaks_the_comparison_and_is_not_hidden(tmp_path):
    class Broken(Answering):
        def reply(self, messages, schema):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        talked(tmp_path / "a", Broken())


# --- the order of live studies ---


@given(st.integers(1, 9), st.integers(1, 20))
def test_every_method_runs_once_in_each_round(count, seeds):
    order = latin_order([f"m{n}" for n in range(count)], seeds)
    assert sorted(order) == sorted((f"m{m}", s) for m in range(count) for s in range(seeds))
    assert [seed for _, seed in order] == [s for s in range(seeds) for _ in range(count)]


@given(st.integers(1, 9))
def test_over_as_many_rounds_as_methods_each_stands_in_each_place_once(count):
    order = latin_order([f"m{n}" for n in range(count)], count)
    places = {(method, index % count) for index, (method, _) in enumerate(order)}
    assert len(places) == count * count


# --- what came out ---


def outcome(*runs, **more):
    these = replace(asked(), started_unix=0.0)
    return Outcome.of("t", these.problems, runs, parse_targets(None, None), expected=4, asked=these, **more)


def test_the_outcome_does_not_depend_on_the_order_in_which_runs_ended():
    runs = [ran(method=m, seed=s) for m in ("random", "grid") for s in range(3)]
    assert outcome(*runs).to_csv() == outcome(*reversed(runs)).to_csv()
    assert outcome(*runs).to_json() == outcome(*reversed(runs)).to_json()


def test_runs_that_are_not_there_or_ended_early_are_missing():
    assert outcome(ran(), ran(seed=1), replace(ran(seed=2), error="gone")).missing == 2


def test_nothing_to_analyse_is_said():
    with pytest.raises(Refused, match="nothing to analyse"):
        outcome()


def test_prompts_are_priced_where_tokens_were_counted():
    talk = replace(ran(), prompts=4, input_tokens=1_000_000, output_tokens=500_000)
    assert outcome(talk, ran(method="grid"), prices=(2.0, 8.0)).costs == {
        "random": "6.00 for 1 500 000 tokens in 1 runs"
    }
    assert outcome(talk).costs == {}


def test_the_best_method_comes_first():
    found = outcome(*(ran(method=m, seed=s, budget=20) for m in ("random", "rules", "grid") for s in range(2)))
    means = [found.analysis.cell(LIMITED, m, found.analysis.targets[0]).mean for m in found.methods]
    assert means == sorted(means)


def test_the_steps_are_a_row_a_proposal():
    rows = list(csv.DictReader(io.StringIO(outcome(ran(LIMITED, budget=3)).steps_to_csv())))
    assert [(row["method"], row["proposal"]) for row in rows] == [("random", str(n)) for n in range(4)]
    assert json.loads(rows[0]["config"]) == load_table(LIMITED).about.default
