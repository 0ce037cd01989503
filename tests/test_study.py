import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import SPACE, trial

from tuner.journal import End, Header, Journal, Pending, Plan, read
from tuner.proposers import open_classical
from tuner.proposers.first import DefaultFirst
from tuner.repeats import due
from tuner.space import Refused
from tuner.study import (
    STARTS_BEFORE_GIVING_UP,
    Again,
    Threshold,
    at_most,
    first_reason,
    resumed,
    run_study,
    stopped_by_person,
    three_failures,
    within,
)
from tuner.trial import Decision, History, Proposal, Repeat, Target


class Walk:
    """Proposes one value of `parallel` after the other: a function of the history alone."""

    name = "walk"

    def __init__(self, values=range(5, 33)):
        self.values = values

    def propose(self, space, history):
        tried = {t.config["parallel"] for t in history.trials}
        left = [v for v in self.values if v not in tried and not space.broken({**space.default(), "parallel": v})]
        if not left:
            return None
        return Proposal(config=space.check({**space.default(), "parallel": left[0]}), source="walk")


def evaluate(number, proposal):
    """Energy falls with `parallel`."""
    made = trial(number, {"parallel": proposal.config["parallel"]}, joules=(4 / proposal.config["parallel"],) * 3)
    return trial(
        number, {"parallel": proposal.config["parallel"]}, [m.joules_per_unit for m in made.valid], proposal=proposal
    )


@pytest.fixture
def journal(tmp_path):
    with Journal.create(tmp_path, Header(name="s", workload="w", target=Target(), proposer="walk")) as opened:
        yield opened


def go(journal, *, goals, proposer=None, evaluate=evaluate, ended=lambda trial, history: None):
    return run_study(journal, SPACE, DefaultFirst(proposer or Walk()), evaluate, goals, ended)


def test_the_default_configuration_is_trial_0(journal):
    go(journal, goals={"budget": [at_most(1)]})
    (only,) = journal.study.history.trials
    assert (only.number, only.proposal.source, only.config) == (0, "default", SPACE.default())


def test_a_study_ends_when_the_threshold_is_reached_and_says_which_trial_did_it(journal):
    end = go(journal, goals={"goal": [Threshold.parse("0.7x")], "budget": [at_most(20)]})
    assert end == End(kind="goal", reason="trial 2 is at or below the threshold")


def test_a_study_ends_when_its_trials_are_used_up(journal):
    end = go(journal, goals={"budget": [at_most(4)]})
    assert end == End(kind="budget", reason="all 4 trials are done")
    assert [t.number for t in journal.study.history.trials] == [0, 1, 2, 3]


def test_a_study_ends_when_nothing_is_left_to_try(journal):
    end = go(journal, goals={}, proposer=Walk(values=[5, 6]))
    assert end.kind == "exhausted"
    assert len(journal.study.history) == 3


def test_three_failures_in_a_row_end_a_study_with_the_last_cause(journal):
    def fail(number, proposal):
        return trial(number, error="out of memory", proposal=proposal)

    end = go(journal, goals={"failures": [three_failures]}, evaluate=fail)
    assert end.kind == "failures"
    assert "out of memory" in end.reason
    assert len(journal.study.history) == 3


def test_two_failures_a_success_and_two_failures_do_not():
    history = History()
    for number, error in enumerate(["x", "x", None, "x", "x"]):
        history = history.add(trial(number, error=error))
    assert three_failures(history) is None


def test_a_trial_is_on_disk_before_anybody_is_told_of_it(journal):
    on_disk = []
    go(
        journal,
        goals={"budget": [at_most(2)]},
        ended=lambda ended, _: on_disk.append(read(journal.folder).history.trials[-1] == ended),
    )
    assert on_disk == [True, True]


def test_a_proposal_is_on_disk_before_its_trial_starts(journal):
    seen = []

    def watch(number, proposal):
        seen.append(read(journal.folder).pending)
        return evaluate(number, proposal)

    go(journal, goals={"budget": [at_most(2)]}, evaluate=watch)
    assert [(p.number, p.proposal.source) for p in seen] == [(0, "default"), (1, "walk")]


@pytest.mark.parametrize("name", ["walk", "rules", "sobol"])
@given(survivors=st.integers(0, 5))
@settings(max_examples=12)
def test_a_study_cut_short_at_any_trial_and_resumed_ends_as_an_uninterrupted_one(tmp_path_factory, name, survivors):
    def proposer():
        return Walk() if name == "walk" else open_classical(name, seed=3)

    def to_the_end(folder, cut):
        header = Header(name="s", workload="w", target=Target(), proposer="walk")
        Journal.create(folder, header).close()
        if cut is not None:

            def dies(number, proposal):
                if number == cut:
                    raise KeyboardInterrupt
                return evaluate(number, proposal)

            with Journal.resume(folder) as journal, pytest.raises(KeyboardInterrupt):
                go(journal, goals={"budget": [at_most(6)]}, proposer=proposer(), evaluate=dies)
        with Journal.resume(folder) as journal:
            go(journal, goals={"budget": [at_most(6)]}, proposer=proposer())
            return [(t.number, t.config, t.joules_per_unit, t.proposal) for t in journal.study.history.trials]

    whole = to_the_end(tmp_path_factory.mktemp("whole"), None)
    assert to_the_end(tmp_path_factory.mktemp("cut"), survivors) == whole


def test_a_proposal_that_a_crash_interrupted_is_run_without_asking_again(journal):
    class Once(Walk):
        def __init__(self):
            self.asked = 0

        def propose(self, space, history):
            self.asked += 1
            return super().propose(space, history) if self.asked == 1 else None

    once = Once()
    once.values = [9, 10]

    def die(number, proposal):
        if number == 1:
            raise KeyboardInterrupt
        return evaluate(number, proposal)

    with pytest.raises(KeyboardInterrupt):
        go(journal, goals={"budget": [at_most(2)]}, proposer=once, evaluate=die)
    end = go(journal, goals={"budget": [at_most(2)]}, proposer=once)
    assert end.kind == "budget"
    assert journal.study.history.trials[1].config["parallel"] == 9
    assert once.asked == 1


def test_a_configuration_that_takes_tune_down_each_time_becomes_a_failed_trial(journal):
    pending = Pending(number=0, proposal=Proposal(config=SPACE.default(), source="default"))
    for _ in range(STARTS_BEFORE_GIVING_UP):
        journal.append(pending)
    go(journal, goals={"budget": [at_most(1)]})
    assert "stopped 3 times while this configuration ran" in journal.study.history.trials[0].error


def test_a_forbidden_value_is_never_proposed_again(journal):
    journal.append(Decision(action="forbid", before_trial=1, parameter="parallel", value=5))
    go(journal, goals={"budget": [at_most(2)]})
    assert journal.study.history.trials[1].config["parallel"] == 6


def test_a_stop_ends_the_study_until_it_is_resumed(journal):
    journal.append(Decision(action="stop", before_trial=0))
    end = go(journal, goals={"person": [stopped_by_person]})
    assert end == End(kind="person", reason="stopped by the person")
    resumed(journal)
    assert stopped_by_person(journal.study.history) is None


def test_time_counts_what_the_trials_took_and_not_who_was_thinking():
    goal = within(15.0)
    history = History().add(trial(0))
    assert goal(history) is None
    assert goal(history.add(trial(1))) == "the 15 s for trials are over"


def test_after_a_resume_failures_are_counted_anew():
    history = History()
    for number in range(3):
        history = history.add(trial(number, error="no driver"))
    assert three_failures(history) is not None
    assert three_failures(history.add(Decision(action="resume", before_trial=3))) is None


def test_of_two_goals_that_are_met_the_first_kind_is_the_reason():
    history = History().add(trial(0))
    end = first_reason({"goal": [lambda _: "a"], "budget": [at_most(1)]}, history)
    assert end == End(kind="goal", reason="a")


@pytest.mark.parametrize(
    ("text", "threshold"),
    [
        ("0.8x", Threshold(0.8, relative=True)),
        ("0.45J", Threshold(0.45, relative=False)),
        ("450 mJ", Threshold(0.45, relative=False)),
        (".5x", Threshold(0.5, relative=True)),
        ("1e-3J", Threshold(0.001, relative=False)),
    ],
)
def test_a_threshold_is_a_ratio_of_the_default_or_joules(text, threshold):
    parsed = Threshold.parse(text)
    assert parsed.relative == threshold.relative
    assert math.isclose(parsed.value, threshold.value)


@pytest.mark.parametrize(
    "text", ["", "0.8", "80%", "9" * 400 + "x", "-1x", "0x", "0J", "x", "nanJ", "infJ", "1 W", "0.8x; rm -rf /"]
)
def test_what_is_no_threshold_is_refused_with_both_forms(text):
    with pytest.raises(Refused, match=r"0\.8x.*0\.45J"):
        Threshold.parse(text)


def test_a_ratio_waits_for_the_default_to_be_measured():
    history = History().add(trial(0, error="it crashed")).add(trial(1, {"parallel": 8}, (0.1,)))
    assert Threshold.parse("0.8x")(history) is None
    assert Threshold.parse("0.2J")(history) == "trial 1 is at or below the threshold"


def test_trials_of_an_earlier_segment_reach_no_threshold_and_fill_no_budget():
    history = History().add(trial(0)).add(trial(1, {"parallel": 8}, (0.1,))).add(trial(2, segment=1))
    assert Threshold.parse("0.8x")(history) is None
    assert at_most(2)(history) is None


# --- launching again ---


PLAN = Plan(launches=3, sentinel_every=2)


def careful(journal, goals, relaunch=None, told=None):
    """A study that repeats what matters; each relaunch gives the energy of the first launch, or what is asked for."""

    def launch(owed):
        return (relaunch or evaluate)(owed.trial.number, Proposal(config=owed.trial.config, source="again"))

    again = Again(
        owed=lambda history: due(history, PLAN),
        launch=launch,
        ended=lambda repeat, history: (told if told is not None else []).append(repeat),
    )
    return run_study(journal, SPACE, DefaultFirst(Walk()), evaluate, goals, lambda trial, history: None, again)


def test_a_threshold_that_one_lucky_launch_reached_is_not_reached(journal):
    # Trial 1 seems to use 0.8 J; launched again, it uses twice that.
    end = careful(
        journal,
        {"goal": [Threshold.parse("0.85J")], "budget": [at_most(2)]},
        relaunch=lambda number, proposal: trial(number, {"parallel": 5}, (1.6,) * 3),
    )
    assert end.kind == "budget"


def test_a_repeat_is_on_disk_before_anybody_is_told_of_it(journal):
    class Told(list):
        def append(self, repeat):
            assert read(journal.folder).history.repeats[-1] == repeat
            super().append(repeat)

    told = Told()
    careful(journal, {"budget": [at_most(4)]}, told=told)
    assert told == list(journal.study.history.repeats)
    assert told


def test_nothing_is_launched_again_once_the_person_stopped(journal):
    careful(journal, {"budget": [at_most(2)]})
    before = len(journal.study.history.repeats)
    journal.append(Decision(action="stop", before_trial=2))
    careful(journal, {"person": [stopped_by_person], "budget": [at_most(9)]})
    assert len(journal.study.history.repeats) == before


def test_a_study_cut_short_in_any_repeat_owes_the_same_after_the_resume(tmp_path_factory):
    def to_the_end(cut):
        folder = tmp_path_factory.mktemp("study")
        Journal.create(folder, Header(name="s", workload="w", target=Target(), proposer="walk")).close()
        made = []

        def dies(number, proposal):
            made.append(number)
            if len(made) == cut:
                raise KeyboardInterrupt
            return evaluate(number, proposal)

        while True:
            with Journal.resume(folder) as journal:
                try:
                    careful(journal, {"budget": [at_most(5)]}, relaunch=dies)
                except KeyboardInterrupt:
                    continue
                return [(r.trial.number, r.purpose, r.after) for r in journal.study.history.repeats]

    whole = to_the_end(None)
    assert len(whole) >= 4
    assert all(to_the_end(cut) == whole for cut in range(1, len(whole) + 1))


def test_time_counts_repeats_too():
    history = History().add(trial(0)).add(Repeat(trial=trial(0), purpose="sentinel", after=1))
    assert within(20.0)(history)
    assert within(20.1)(history) is None
