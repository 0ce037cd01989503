"""The engine's own setting comes first: every saving is a saving against it."""

from __future__ import annotations

from dataclasses import replace

from tuner.proposers.untried import Untried
from tuner.space import SearchSpace
from tuner.trial import History, Proposal, Proposer


class DefaultFirst:
    """Proposes the default configuration while nothing is there to compare with, then asks `inner`.

    A new segment starts with an empty `History.current`, so it measures the default again.
    """

    def __init__(self, inner: Proposer) -> None:
        self.inner = inner
        self.name = inner.name

    def propose(self, space: SearchSpace, history: History) -> Proposal | None:
        """The default as the first trial of a segment, and once more when that failed (not when it broke a limit).

        A default that is forbidden, or that breaks a constraint, is not run: `inner` is asked at once
        and its reason says so. One that the person turned down is passed over without a word.
        """
        default = space.default()
        if (
            len(history.current) == 1
            and history.default is None
            and (before := history.find(default))
            # A default that breaks a limit breaks it again.
            and not before.over_limit
            and not space.broken(default)
        ):
            # Everything is held against the default, so one hiccup must not cost the study its base.
            return Proposal(
                config=default, source="default", reason="the default failed; once more, in case that was an accident"
            )
        if history.current:
            return self.inner.propose(space, history)
        if default in Untried.of(space, history):
            return Proposal(
                config=space.check(default), source="default", reason="the setting that the others are held against"
            )
        proposal = self.inner.propose(space, history)
        if proposal and (faults := space.broken(default)):
            why = f"the default is not legal here ({'; '.join(faults)}), so there is nothing to compare with; "
            return replace(proposal, reason=why + proposal.reason)
        return proposal
