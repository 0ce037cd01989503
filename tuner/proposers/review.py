"""The person as a proposer: one that wraps another and may change its mind.

Every decision is written down before anything follows from it, and then belongs to the history that
the wrapped proposer is asked with. What a person forbids or rejects leaves the search space for the
rest of the study: as a constraint, so that a proposer that looks at trials alone moves on too.

Nothing is kept between two calls: whether the study runs in batch, and what is forbidden, is read
from the decisions each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tuner.space import Config, Constraint, SearchSpace, show
from tuner.summary import typical_trial_seconds
from tuner.trial import Decision, History, Lost, Proposal, Proposer

Decide = Callable[[SearchSpace, History, Proposal, float | None], Decision]
"""The dialogue: the space, what has happened, the proposal, and what a trial costs in seconds."""


def forbidden(space: SearchSpace, decisions: Sequence[Decision]) -> SearchSpace:
    """`space` without the values that the person forbade and the configurations that they rejected.

    Applying the same decisions twice changes nothing. Decisions about parameters that the space does
    not have (a segment on another engine) are passed over.
    """
    for decision in decisions:
        narrower = _applied(space, decision)
        if narrower.constraints[-1:] and narrower.constraints[-1].sentence not in {
            c.sentence for c in space.constraints
        }:
            space = narrower
    return space


def _applied(space: SearchSpace, decision: Decision) -> SearchSpace:
    match decision:
        case Decision(action="forbid", parameter=str(name), value=value) if name in space.names and value is not None:
            return space.forbid(name, value)
        case Decision(action="reject", proposal=Proposal(config=config)):
            return replace(space, constraints=(*space.constraints, _not_this(space, config)))
    return space


def _not_this(space: SearchSpace, config: Config) -> Constraint:
    changes = [
        f"{p.name}={show(config[p.name])}" for p in space.parameters if config.get(p.name, p.default) != p.default
    ]
    named = f"{', '.join(changes)} with all else at its default" if changes else "the default configuration"
    return Constraint(f"not {named} (rejected by the person)", lambda candidate: dict(candidate) != config)


def in_batch(decisions: Sequence[Decision]) -> bool:
    """Whether the person switched to batch, and nothing has ended that since."""
    return _last_mode(decisions) == "batch"


def _last_mode(decisions: Sequence[Decision]) -> str | None:
    return next((d.action for d in reversed(decisions) if d.action in ("batch", "stop", "resume")), None)


@dataclass(frozen=True)
class Review:
    """Shows each proposal of `inner` to a person.

    `decide` is the dialogue, `note` writes a decision to the journal. The default configuration
    (trial 0) is not asked about: everything is held against it.
    """

    inner: Proposer
    decide: Decide
    note: Callable[[Decision | Lost], object]
    trial_seconds: Callable[[History], float | None] = typical_trial_seconds

    @property
    def name(self) -> str:
        return self.inner.name

    def propose(self, space: SearchSpace, history: History) -> Proposal | None:
        """The proposal that the person lets run; None when they stop, or when nothing is left to try."""
        if _last_mode(history.decisions) == "stop":
            return None
        proposal = self.inner.propose(forbidden(space, history.decisions), history)
        while proposal is not None and proposal.source != "default" and not in_batch(history.decisions):
            legal = forbidden(space, history.decisions)
            try:
                decision = self.decide(legal, history, proposal, self.trial_seconds(history))
            except BaseException:
                # Left at the question: the prompts that led to it were paid for.
                if proposal.exchanges:
                    self.note(Lost(before_trial=len(history), exchanges=proposal.exchanges))
                raise
            if decision.action == "forbid" and not _forbids(decision, proposal):
                # A decision that keeps its proposal turned it down: so its prompts are counted once.
                decision = replace(decision, proposal=None)
            self.note(decision)
            history = history.add(decision)
            match decision.action:
                case "accept" | "batch":
                    return proposal
                case "edit":
                    return decision.edited
                case "stop":
                    return None
                case "reject":
                    proposal = self._ask_again(space, history)
                case "forbid" if _forbids(decision, proposal):
                    proposal = self._ask_again(space, history)
                case _:
                    pass  # a remark, or a value that this proposal does not use: the same proposal stands
        return proposal

    def _ask_again(self, space: SearchSpace, history: History) -> Proposal | None:
        return self.inner.propose(forbidden(space, history.decisions), history)


def _forbids(decision: Decision, proposal: Proposal) -> bool:
    return decision.parameter is not None and proposal.config.get(decision.parameter) == decision.value
