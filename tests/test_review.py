from dataclasses import replace

import pytest
from records import SPACE, trial

from tuner.proposers.review import Review, forbidden, in_batch
from tuner.space import Refused
from tuner.trial import Decision, History, Lost, Proposal

STARTED = History(trials=(trial(0),))


def proposed(**changes):
    return Proposal(config=SPACE.complete(changes), source="rules")


class Inner:
    """Proposes the first candidate that the space allows: a function of the trials alone, as classical ones are."""

    name = "rules"

    def __init__(self, *candidates):
        self.candidates = candidates
        self.asked = []

    def propose(self, space, history):
        self.asked.append((space, history))
        return next((c for c in self.candidates if not space.broken(c.config)), None)


class Person:
    """Answers each question with the next of `actions`; remembers what was shown, and what was noted before what."""

    def __init__(self, *actions):
        self.actions = list(actions)
        self.shown = []
        self.noted = []

    def decide(self, space, history, proposal, trial_seconds):
        self.shown.append((proposal, history, trial_seconds, len(self.noted)))
        action = self.actions.pop(0)
        return action(proposal) if callable(action) else says(action)(proposal)

    def reviewing(self, inner):
        return Review(inner, self.decide, self.noted.append)


def says(action, **more):
    return lambda proposal: Decision(**{"action": action, "before_trial": 1, "proposal": proposal, **more})


A, B, C = proposed(threads=1), proposed(threads=3), proposed(parallel=8)


def test_an_accepted_proposal_runs_as_it_is():
    person = Person("accept")
    assert person.reviewing(Inner(A)).propose(SPACE, STARTED) is A
    assert [d.action for d in person.noted] == ["accept"]


def test_an_edited_proposal_runs_as_edited():
    person = Person(says("edit", edited=B))
    assert person.reviewing(Inner(A)).propose(SPACE, STARTED) is B


def test_a_rejected_configuration_does_not_come_back_from_a_proposer_that_sees_only_trials():
    person = Person(says("reject", remark="too slow"), "accept")
    inner = Inner(A, B)
    assert person.reviewing(inner).propose(SPACE, STARTED) is B
    assert inner.asked[-1][1].decisions[-1].remark == "too slow", "the reason reaches the next prompt"


def test_a_remark_keeps_the_proposal_and_reaches_the_next_prompt():
    person = Person(says("remark", remark="try fewer threads"), "reject", "accept")
    inner = Inner(A, B)
    assert person.reviewing(inner).propose(SPACE, STARTED) is B
    assert [p for p, *_ in person.shown] == [A, A, B]
    assert len(inner.asked) == 2, "a remark alone asks nobody"
    assert [d.action for d in inner.asked[-1][1].decisions] == ["remark", "reject"]


def test_a_forbidden_value_is_out_of_the_space_that_is_asked_next():
    person = Person(says("forbid", parameter="threads", value=1), "accept")
    inner = Inner(A, B)
    assert person.reviewing(inner).propose(SPACE, STARTED) is B
    with pytest.raises(Refused, match=r"threads is not 1 \(forbidden by the person\)"):
        inner.asked[-1][0].check(A.config)
    assert person.noted[0].proposal is A, "its prompts are counted as spent"


def test_forbidding_a_value_that_is_not_proposed_keeps_the_proposal():
    person = Person(says("forbid", parameter="threads", value=4), "accept")
    inner = Inner(A, B)
    assert person.reviewing(inner).propose(SPACE, STARTED) is A
    assert len(inner.asked) == 1
    assert person.noted[0].proposal is None


def test_every_decision_is_noted_before_the_next_question():
    person = Person(says("remark", remark="x"), "reject", "accept")
    person.reviewing(Inner(A, B)).propose(SPACE, STARTED)
    assert [noted for *_, noted in person.shown] == [0, 1, 2]
    assert [d.action for d in person.noted] == ["remark", "reject", "accept"]


def test_stop_ends_the_study_and_is_noted():
    person = Person("stop")
    assert person.reviewing(Inner(A)).propose(SPACE, STARTED) is None
    assert [d.action for d in person.noted] == ["stop"]


def test_batch_runs_this_proposal_and_asks_no_more():
    person = Person("batch")
    review = person.reviewing(Inner(A))
    assert review.propose(SPACE, STARTED) is A
    assert review.propose(SPACE, STARTED.add(person.noted[0])) is A
    assert len(person.shown) == 1


def decisions(*actions):
    return [Decision(action=action, before_trial=1) for action in actions]


@pytest.mark.parametrize(
    ("actions", "batch"),
    [
        ((), False),
        (("batch",), True),
        (("batch", "remark"), True),
        (("batch", "resume"), False),
        (("resume", "batch"), True),
    ],
)
def test_batch_lasts_until_the_study_is_resumed(actions, batch):
    assert in_batch(decisions(*actions)) is batch


@pytest.mark.parametrize(("actions", "asked"), [(("stop",), 0), (("stop", "resume"), 1)])
def test_a_stop_lasts_until_the_study_is_resumed(actions, asked):
    person = Person("accept")
    person.reviewing(Inner(A)).propose(SPACE, History(STARTED.trials, tuple(decisions(*actions))))
    assert len(person.shown) == asked


def test_the_default_configuration_is_not_asked_about():
    default = Proposal(config=SPACE.default(), source="default")
    person = Person()
    assert person.reviewing(Inner(default)).propose(SPACE, History()) is default


def test_nothing_left_to_try_is_passed_on():
    person = Person("reject")
    assert person.reviewing(Inner(A)).propose(SPACE, STARTED) is None


def test_the_person_is_told_what_a_trial_takes():
    person = Person("accept")
    person.reviewing(Inner(A)).propose(SPACE, STARTED)
    assert person.shown[0][2] == 10.0


def test_it_is_named_after_the_proposer_it_wraps():
    assert Person().reviewing(Inner()).name == "rules"


def test_decisions_apply_once_however_often_they_are_applied():
    made = [
        Decision(action="forbid", before_trial=1, parameter="threads", value=4),
        Decision(action="reject", before_trial=1, proposal=A),
        Decision(action="reject", before_trial=1, proposal=proposed()),
    ]
    once = forbidden(SPACE, made)
    assert [c.sentence for c in once.constraints[1:]] == [
        "threads is not 4 (forbidden by the person)",
        "not threads=1 with all else at its default (rejected by the person)",
        "not the default configuration (rejected by the person)",
    ]
    assert forbidden(once, made) == once
    assert not once.broken(C.config)
    assert len(once.broken(A.config)) == 1


def test_decisions_about_another_engine_are_passed_over():
    other = Proposal(config={"batch": 3}, source="rules")
    made = [
        Decision(action="forbid", before_trial=1, parameter="batch", value=4),
        Decision(action="reject", before_trial=1, proposal=other),
    ]
    assert not forbidden(SPACE, made).broken(SPACE.default())


def test_prompts_are_not_forgotten_when_the_person_leaves_at_the_question():
    noted = []

    def leave(*_):
        raise KeyboardInterrupt

    asked = replace(A, exchanges=("one",))
    with pytest.raises(KeyboardInterrupt):
        Review(Inner(asked), leave, noted.append).propose(SPACE, STARTED)
    assert noted == [Lost(before_trial=1, exchanges=("one",))]
