"""The loop: ask a proposer, run the trial, write it down, until a goal says that it is enough.

The journal is the only state. A proposal is written before its trial starts, so that a crash in the
middle of a trial asks nobody again; a trial is written before anything looks at it. Goals are small
functions of the history, combined by `first_reason`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tuner.evaluate import Evaluate
from tuner.journal import End, Journal, Pending, StopKind
from tuner.proposers.review import forbidden
from tuner.repeats import Due
from tuner.space import Refused, SearchSpace
from tuner.summary import seconds_text
from tuner.trial import Decision, Goal, History, Proposal, Proposer, Repeat, Trial

FAILURES_IN_A_ROW = 3

STARTS_BEFORE_GIVING_UP = 3
"""A configuration whose trial was cut short this often is not started again: it may be what kills us."""


# --- goals -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """The energy to get down to: joules per unit, or a share of what the default uses."""

    value: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """`0.8x` is a ratio of the default, `0.45J` (or `450mJ`) is absolute, per output unit."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\s*(x|J|mJ|kJ)\s*", text)
        scale = {"x": 1.0, "J": 1.0, "mJ": 1e-3, "kJ": 1e3}
        value = float(match[1]) * scale[match[2]] if match else 0.0
        if not match or not 0 < value < math.inf:
            raise Refused(
                f"--threshold {text!r}: expected a ratio of the default such as 0.8x,"
                " or joules per unit such as 0.45J or 450mJ"
            )
        return cls(value=value, relative=match[2] == "x")

    def joules_per_unit(self, history: History) -> float | None:
        """The threshold in joules per unit; None while a ratio waits for the default to be measured."""
        if not self.relative:
            return self.value
        default = history.default
        return self.value * default.joules_per_unit if default and default.joules_per_unit else None

    def reached(self, ratio: float, joules_per_unit: float) -> bool:
        """Whether fresh runs got there: `ratio` to the default, `joules_per_unit` of the setting itself."""
        return (ratio if self.relative else joules_per_unit) <= self.value

    def __call__(self, history: History) -> str | None:
        best, limit = history.best, self.joules_per_unit(history)
        if best is None or best.joules_per_unit is None or limit is None or best.joules_per_unit > limit:
            return None
        return f"trial {best.number} is at or below the threshold"


def at_most(trials: int) -> Goal:
    """Stop after so many trials, the default among them."""

    def goal(history: History) -> str | None:
        return f"all {trials} trials are done" if len(history.current) >= trials else None

    return goal


def within(seconds: float) -> Goal:
    """Stop when the trials have taken so long together; thinking, of people and models, does not count."""

    def goal(history: History) -> str | None:
        spent = sum(t.seconds + sum(r.seconds for r in t.repeats) for t in history.current)
        return f"the {seconds_text(seconds)} for trials are over" if spent >= seconds else None

    return goal


def three_failures(history: History) -> str | None:
    """Stop when three trials failed in a row: something other than the configuration is wrong.

    A resume starts the count anew: the cause may have been mended.
    """
    resumed_at = max((d.before_trial for d in history.decisions if d.action == "resume"), default=0)
    last = [t for t in history.current if t.number >= resumed_at][-FAILURES_IN_A_ROW:]
    # What breaks a limit ran, and says where the limit is.
    if len(last) == FAILURES_IN_A_ROW and all(t.joules_per_unit is None and not t.over_limit for t in last):
        return f"three trials failed in a row; the last one: {last[-1].error}"
    return None


def stopped_by_person(history: History) -> str | None:
    """Stop when a person said so, until the study is resumed."""
    for decision in reversed(history.decisions):
        if decision.action == "resume":
            return None
        if decision.action == "stop":
            return "stopped by the person"
    return None


def first_reason(goals: Mapping[StopKind, Sequence[Goal]], history: History) -> End | None:
    """The first goal that is met, in the order given."""
    for kind, alternatives in goals.items():
        for goal in alternatives:
            if reason := goal(history):
                return End(kind=kind, reason=reason)
    return None


# --- the loop --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Again:
    """How the search makes sure of what it found; without it each configuration is launched once."""

    owed: Callable[[History], Due | None]
    """What to launch again before anything else is proposed."""
    launch: Callable[[Due], Trial]
    ended: Callable[[Repeat, History], None]
    """Told each repeat once it is on disk."""


def run_study(
    journal: Journal,
    space: SearchSpace,
    proposer: Proposer,
    evaluate: Evaluate,
    goals: Mapping[StopKind, Sequence[Goal]],
    ended: Callable[[Trial, History], None],
    again: Again | None = None,
) -> End:
    """Run trials until a goal is met or nothing is left to try.

    Args:
        journal: the open journal; every event goes through it.
        space: what may be tuned; what the person forbids is taken out of it as the study goes.
        proposer: asked with everything that has happened.
        evaluate: runs one configuration.
        goals: by the kind of stop that they mean.
        ended: told each trial once it is on disk.
        again: repeats what one launch does not settle.

    Returns:
        Why it stopped; it is the journal's last line.
    """
    _repeat(journal, goals, again)
    while (end := first_reason(goals, journal.study.history)) is None:
        proposal = _pending(journal) or proposer.propose(
            forbidden(space, journal.study.history.decisions), journal.study.history
        )
        if proposal is None:
            end = first_reason(goals, journal.study.history) or End(
                kind="exhausted", reason="nothing is left to try in this search space"
            )
            break
        number = len(journal.study.history)
        journal.append(Pending(number=number, proposal=proposal))
        if journal.study.pending_starts > STARTS_BEFORE_GIVING_UP:
            trial = _given_up(number, proposal, journal.study.segment)
        else:
            trial = evaluate(number, proposal)
        journal.append(trial)
        ended(trial, journal.study.history)
        _repeat(journal, goals, again)
    journal.append(end)
    return end


def _repeat(journal: Journal, goals: Mapping[StopKind, Sequence[Goal]], again: Again | None) -> None:
    """Launch again what is owed, before any goal is judged by a single launch.

    Not when a person stopped the study or trials keep failing: what is owed then waits for the resume.
    """
    urgent: dict[StopKind, Sequence[Goal]] = {kind: goals.get(kind, ()) for kind in ("person", "failures")}
    while again is not None and first_reason(urgent, journal.study.history) is None:
        due = again.owed(journal.study.history)
        if due is None:
            return
        repeat = Repeat(trial=again.launch(due), purpose=due.purpose, after=len(journal.study.history))
        journal.append(repeat)
        again.ended(repeat, journal.study.history)


def _pending(journal: Journal) -> Proposal | None:
    pending = journal.study.pending
    return pending.proposal if pending else None


def _given_up(number: int, proposal: Proposal, segment: int) -> Trial:
    return Trial(
        number=number,
        config=proposal.config,
        proposal=proposal,
        error=f"tune or the machine stopped {STARTS_BEFORE_GIVING_UP} times while this configuration ran",
        started_unix=time.time(),
        segment=segment,
    )


def resumed(journal: Journal) -> None:
    """Note that the study goes on: a stop or a switch to batch that a person asked for is over."""
    journal.append(Decision(action="resume", before_trial=len(journal.study.history)))
