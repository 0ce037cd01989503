"""One run of a study, from the header line to the last sentence.

Connects the parts that know nothing of each other: the loop tells the screen what happens, the
launcher tells it the phase, the LLM's prompts and answers go to files beside the journal. The order of
things: search until a goal is met, confirm the best against the default, say what that showed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tuner.assemble import Bench, launch_text, open_proposer, own_load, thorough
from tuner.checks import doubts
from tuner.confirm import (
    MOST_PRUNE_PAIRS,
    Saving,
    concluded,
    confirm,
    pairs_of,
    prune,
    prune_pairs,
    shortened,
    verdict,
)
from tuner.control import PowerControl, commands, split
from tuner.display import Screen
from tuner.evaluate import Known, Launcher, trial_folder
from tuner.journal import End, Header, Journal, StopKind
from tuner.proposers.review import Review
from tuner.repeats import Due, drifts, due
from tuner.space import Config, Refused, RefusedForGood, SearchSpace
from tuner.study import Again, Threshold, at_most, run_study, stopped_by_person, three_failures, within
from tuner.summary import changes_text, load_text, seconds_of_next, seconds_text, typical_trial_seconds, usage
from tuner.trial import Chat, ChatError, Decision, Goal, History, Proposal, Proposer, Repeat, Trial

GPU_IDLE_SECONDS = 10.0
CPU_IDLE_SECONDS = 2.0


def idle_seconds(meters: Sequence[str]) -> float:
    """How long idle power is measured: a GPU's counter moves every 0.1 s, and its clock takes seconds to fall."""
    return GPU_IDLE_SECONDS if any(name in meters for name in ("nvml", "zeus", "wall")) else CPU_IDLE_SECONDS


@dataclass(frozen=True, kw_only=True)
class Session:
    """The parts of one run."""

    screen: Screen
    journal: Journal
    header: Header
    bench: Bench
    chat: Chat | None
    batch: bool
    control: PowerControl | None = None
    """Held around the whole session, where power and clock may be tuned."""
    known: Known = field(default_factory=Known)
    """What earlier launches tell later ones."""

    def run(self) -> tuple[End, Saving | None]:
        """Search, confirm, report. The journal holds all of it, wherever this is cut short.

        Returns why the search stopped, and what the confirmation showed.
        """
        self._introduce()
        try:
            end = run_study(
                self.journal,
                self.bench.space,
                self._proposer(),
                self._launcher(),
                self._goals(),
                self._ended,
                Again(owed=self._owed, launch=self._launch_again, ended=self._repeated),
            )
            found = self._confirm(end)
        except ChatError as error:
            end = End(kind="chat", reason=str(error))
            self.journal.append(end)
            found = None
        except Refused as refused:
            # What a person has to mend first says nothing against the configuration that it cut short.
            self.journal.append(Decision(action="stop", before_trial=len(self.journal.study.history), remark="refused"))
            # Before the live view is gone: an engine may take its time, and is seen to.
            self.known.close()
            self.screen.close()
            resumed = f"once that is mended, `tune run --resume {self.journal.folder}` goes on with the same options; "
            for_good = isinstance(refused, RefusedForGood)
            self.screen.warn(f"stopped; {'' if for_good else resumed}other options need a new study, of another --name")
            raise
        except BaseException as leaving:
            try:
                self.known.close()
            finally:
                if not isinstance(leaving, Exception):
                    self._interrupted()
            raise
        finally:
            self.known.close()
        self._conclude(end)
        return end, found

    def confirm(self) -> Saving | None:
        """Nothing but the confirmation of what a study found, and what it showed."""
        study, pairs = self.journal.study, self.header.confirm_pairs
        best = study.history.best
        self.screen.study_started(
            self.journal.folder.name, None, self._threshold(), replace(study.history, trials=()), self.header.unit
        )
        if best is not None:
            made = len(pairs_of(study, best.config, pairs))
            changes = changes_text(best.config, self.bench.space.default(), best.config)
            if made < pairs:
                took = 2 * (pairs - made) * (typical_trial_seconds(study.history) or 0.0)
                self.screen.say(
                    f"trial {best.number} ({changes}) against the default, {pairs - made} pairs,"
                    f" about {seconds_text(took)}"
                )
            else:
                self.screen.say(
                    f"all {pairs} pairs of trial {best.number} are in the journal and nothing is measured;"
                    " another number of --pairs is a new confirmation"
                )
        try:
            found = self._confirm(None)
        except BaseException as leaving:
            if not isinstance(leaving, Exception):
                self.screen.close()
                self.screen.warn(f"stopped; finished pairs are kept. Go on with `tune confirm {self.journal.folder}`")
            raise
        self._conclude(None)
        return found

    # --- before ---

    def _introduce(self) -> None:
        header, bench = self.header, self.bench
        proposer = f"{header.llm}, template {header.template}" if header.llm else header.proposer
        rows = [
            ("workload", f"{header.workload} ({bench.runner_path})"),
            ("engine", f"{bench.identity.get('engine', '')} {bench.identity.get('engine_version', '')}".strip()),
            ("model", self._model()),
            ("load", own_load(bench, header.target) or load_text(header.target, bench.unit)),
            ("meter", bench.meters.sentence.removeprefix("meter: ")),
            ("proposer", proposer if header.llm else f"{proposer} (no LLM)"),
            ("goal", self._goal_text()),
            *([("limits", ", ".join(map(str, bench.limits)))] if bench.limits else []),
            ("study", str(self.journal.folder)),
        ]
        self.screen.header(rows)
        for note in bench.notes:
            self.screen.say(note)
        self.screen.study_started(
            self.journal.folder.name,
            self.header.trials,
            self._threshold(),
            self.journal.study.history,
            self.header.unit,
        )

    def _model(self) -> str:
        describe = getattr(self.bench.runner, "describe", None)
        return (
            str(describe(self.header.target)).removeprefix("model: ")
            if describe
            else self.bench.identity.get("model", "")
        )

    def _goal_text(self) -> str:
        parts = [f"{self.header.threshold} or less"] if self.header.threshold else ["the least energy"]
        if self.header.trials:
            parts.append(f"at most {self.header.trials} trials")
        if self.header.time_seconds:
            parts.append(f"at most {seconds_text(self.header.time_seconds)} of trials")
        return ", ".join(parts)

    # --- during ---

    def _threshold(self) -> Threshold | None:
        return Threshold.parse(self.header.threshold) if self.header.threshold else None

    def _goals(self) -> Mapping[StopKind, Sequence[Goal]]:
        threshold, header = self._threshold(), self.header
        budget = [at_most(header.trials)] if header.trials else []
        budget += [within(header.time_seconds)] if header.time_seconds else []
        return {
            "goal": [threshold] if threshold else [],
            "person": [stopped_by_person],
            "failures": [three_failures],
            "budget": budget,
        }

    def _proposer(self) -> Proposer:
        proposer = open_proposer(self.header, self.bench, self.chat, self._keep, self.journal.append)
        if self.batch:
            return proposer
        return Review(proposer, self.screen.decide, self.journal.append)

    def _launcher(self) -> Launcher:
        if self.known.idle_watts is None:
            idle = next((t.idle for t in self.journal.study.history.current if t.idle), None)
            self.known.idle_watts = idle.machine_watts if idle else None
        if self.known.celsius is None:
            # Where the study began, also when it goes on on a machine that is warm by now.
            self.known.celsius = next(
                (dict(t.start_celsius) for t in self.journal.study.history.current if t.start_celsius), None
            )
        return Launcher(
            folder=self.journal.folder,
            runner=self.bench.runner_path,
            target=self.header.target,
            meters=self.bench.meters.names,
            meter_options=dict(self.header.meter_options),
            plan=self.header.plan,
            segment=self.journal.study.segment,
            report=self.screen.phase,
            idle_seconds_for=self._idle_seconds,
            known=self.known,
            control=self.control,
            limits=self.bench.limits,
            changeable=changeable(self.bench.space),
        )

    def _idle_seconds(self, _number: int) -> float:
        """Idle power is measured once, with the first trial that gets so far."""
        if self.header.plan.fast or any(t.idle for t in self.journal.study.history.current):
            return 0.0
        return idle_seconds(self.bench.meters.names)

    def _owed(self, history: History) -> Due | None:
        time_is_over = self.header.time_seconds is not None and within(self.header.time_seconds)(history)
        return None if time_is_over else due(history, self.header.plan)

    def _launch_again(self, owed: Due) -> Trial:
        trial = owed.trial
        # A repeat is to show what another launch does.
        launcher = replace(self._launcher(), log_name=f"repeat-{len(trial.repeats) + 1}.log", changeable=frozenset())
        why = "would be the best" if owed.purpose == "contender" else "has the machine drifted?"
        proposal = Proposal(
            config=trial.config, source=trial.proposal.source, reason=f"trial {trial.number} again: {why}"
        )
        return launcher(trial.number, proposal)

    def _repeated(self, repeat: Repeat, history: History) -> None:
        self.screen.repeated(repeat, history)
        for stretch in drifts(history):
            if stretch.last == repeat.after - 1 and stretch.sentinel == repeat.trial.number:
                self.screen.warn(stretch.sentence)

    def _keep(self, number: int, prompt: str, reply: str | None) -> None:
        if reply is None:
            self.screen.phase(number, "asking the LLM")
        keep_transcript(self.journal.folder, number, prompt, reply)

    def _ended(self, trial: Trial, history: History) -> None:
        self.screen.trial_ended(trial, history, doubts(trial, history), [limit.column for limit in self.bench.limits])
        if trial is history.default and self.header.trials:
            left, plan = self.header.trials - len(history.current), self.header.plan
            once = seconds_of_next(trial)
            least = left + 2 * self.header.confirm_pairs
            most = least + (left // plan.sentinel_every if plan.sentinel_every else 0) + left * (plan.launches - 1)
            more = f", or up to {seconds_text(most * once)} where launches are repeated" if most > least else ""
            after = "what follows, the confirmation included," if self.header.confirm_pairs else "what follows"
            self.screen.say(
                f"a trial takes about {seconds_text(once)}; {after} takes {seconds_text(least * once)}{more}"
            )

    def _interrupted(self) -> None:
        """Ctrl-C or a signal: the trial that was cut short is not held against its configuration."""
        history = self.journal.study.history
        self.journal.append(Decision(action="stop", before_trial=len(history), remark="interrupted"))
        self.screen.close()
        made = len(self.journal.study.pairs) + len(self.journal.study.prunes)
        pairs = f" and {made} pairs" if made else ""
        self.screen.warn(
            f"stopped; {len(history)} finished trials{pairs} are kept."
            f" Go on with `tune run --resume {self.journal.folder}`"
        )

    # --- after ---

    def _confirm(self, end: End | None) -> Saving | None:
        history = self.journal.study.history
        default, best, pairs = history.default, history.best, self.header.confirm_pairs
        if (
            default is None
            or best is None
            or best.config == default.config
            or not pairs
            or (end and end.kind == "person")
        ):
            return None
        launcher = replace(
            self._launcher(),
            plan=thorough(self.header.plan, self.bench.meters),
            idle_seconds_for=lambda _number: 0.0,
            changeable=frozenset(),
        )
        found = confirm(
            self.journal,
            launcher,
            default,
            best,
            pairs,
            lambda number: self.screen.confirming(number + 1, pairs),
        )
        if found is not None and found.shown and self.header.prune:
            self._prune(launcher)
        return found

    def _prune(self, launcher: Launcher) -> None:
        """Put back what does not matter, where this machine is quiet enough to tell."""
        pairs = prune_pairs(self.journal.study)
        if pairs is None:
            return
        if pairs > MOST_PRUNE_PAIRS:
            self.screen.say(
                f"all changes stay: to tell whether one of them is worth less than 1 % would take about {pairs} pairs"
                f" at this machine's noise, and at most {MOST_PRUNE_PAIRS} are made"
            )
            return
        prune(
            self.journal,
            launcher,
            self.bench.space,
            pairs,
            lambda names, number: self.screen.pruning(names, number + 1, pairs),
        )

    def _verdict(self, end: End | None) -> str:
        study, planned = self.journal.study, self.header.confirm_pairs
        default, best = study.history.default, study.history.best
        if best is None and any(t.over_limit for t in study.history.current):
            return "No saving shown: no setting that was tried keeps to the limits."
        if best is None:
            return "No saving shown: nothing could be measured."
        if (
            default is None
            and (over := next((t for t in study.history.current if t.over_limit), None))
            and (over.proposal.source == "default")
        ):
            return (
                f"No saving shown: the default breaks a limit ({over.error}), so there is nothing to compare with."
                f" Trial {best.number} uses the least energy of those that keep to it."
            )
        if default is None:
            return "No saving shown: the default was not measured, so there is nothing to compare with."
        if best.config == default.config:
            return "No saving shown: no setting used less energy than the default."
        if said := concluded(study):
            return said
        if self.header.plan.fast:
            return f"Fast mode ranks and claims nothing: `tune confirm {self.journal.folder}` measures the best."
        left_out = end is None or end.kind in ("person", "chat")
        return verdict(None, 0, 0 if left_out else planned)

    def _conclude(self, end: End | None) -> None:
        history = self.journal.study.history
        best = history.best
        shortest, attempts = shortened(self.journal.study)
        config = shortest or (best.config if best else None)
        self.screen.summary(
            end=end,
            history=history,
            space=self.bench.space,
            used=usage(history),
            limits=self.header.limits,
            pruned=[attempt.sentence for attempt in attempts],
            shown=shortest is not None,
            pairs=self.journal.study.pairs,
            command=self._command(config) if config else None,
            verdict=self._verdict(end),
            folder=self.journal.folder,
        )

    def _command(self, config: Config) -> str:
        """What a person types to launch `config`: the GPU's settings, where they were tuned, and the engine."""
        engine, settings = split(config)
        changed = {name: value for name, value in settings.items() if name in self.bench.space.changes(config)}
        typed = commands(changed, self.control.uuids if self.control else ())
        return "\n".join([*typed, launch_text(self.bench.runner_path, self.bench.runner, engine, self.journal.study)])


def changeable(space: SearchSpace) -> frozenset[str]:
    """The parameters that change on a running engine; none where all that are free need a restart."""
    engine, _ = split(space.default())
    names = frozenset(p.name for p in space.parameters if p.scope in ("request", "live") and p.name in engine)
    return names if any(p.name in names for p in space.free) else frozenset()


def keep_transcript(folder: Path, number: int, prompt: str, reply: str | None) -> None:
    """Write a prompt before it is sent, and its answer when it has come, as `trials/0007/prompt.md` and `reply.md`.

    Further prompts for the same trial are `prompt-2.md`, and so on. The journal holds the same text.
    """
    trial = trial_folder(folder, number)
    sent = len(list(trial.glob("prompt*.md")))
    if reply is None:
        (trial / _numbered("prompt", sent + 1)).write_text(prompt, encoding="utf-8")
    else:
        (trial / _numbered("reply", sent)).write_text(reply, encoding="utf-8")


def _numbered(stem: str, number: int) -> str:
    return f"{stem}.md" if number == 1 else f"{stem}-{number}.md"
