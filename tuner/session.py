"""One run of a study, from the header line to the last sentence.

Connects the parts that know nothing of each other: the loop tells the screen what happens, the
launcher tells it the phase, the LLM's prompts and answers go to files beside the journal. The order of
things: search until a goal is met, confirm the best against the default, say what that showed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.assemble import Bench, asked, open_proposer
from tuner.checks import doubts
from tuner.confirm import Saving, concluded, confirm, verdict
from tuner.display import Screen
from tuner.evaluate import Launcher, trial_folder
from tuner.journal import End, Header, Journal, StopKind
from tuner.proposers.review import Review
from tuner.study import Threshold, at_most, run_study, stopped_by_person, three_failures, within
from tuner.summary import seconds_text, usage
from tuner.trial import Chat, ChatError, Decision, Goal, History, Proposer, Trial


@dataclass(frozen=True, kw_only=True)
class Session:
    """The parts of one run."""

    screen: Screen
    journal: Journal
    header: Header
    bench: Bench
    chat: Chat | None
    batch: bool

    def run(self) -> tuple[End, Saving | None]:
        """Search, confirm, report. The journal holds all of it, wherever this is cut short.

        Returns why the search stopped, and what the confirmation showed.
        """
        self._introduce()
        try:
            end = run_study(
                self.journal, self.bench.space, self._proposer(), self._launcher(), self._goals(), self._ended
            )
            found = self._confirm(end)
        except ChatError as error:
            end = End(kind="chat", reason=str(error))
            self.journal.append(end)
            found = None
        except BaseException as leaving:
            if not isinstance(leaving, Exception):
                self._interrupted()
            raise
        self._conclude(end, found)
        return end, found

    # --- before ---

    def _introduce(self) -> None:
        header, bench = self.header, self.bench
        load = header.target
        proposer = f"{header.llm}, template {header.template}" if header.llm else header.proposer
        rows = [
            ("workload", f"{header.workload} ({bench.runner_path})"),
            ("engine", f"{bench.identity.get('engine', '')} {bench.identity.get('engine_version', '')}".strip()),
            ("model", self._model()),
            ("load", f"{load.prompts} requests x ({load.prompt_tokens} prompt + {load.output_tokens} output) tokens"),
            ("meter", bench.meters.sentence.removeprefix("meter: ")),
            ("proposer", proposer if header.llm else f"{proposer} (no LLM)"),
            ("goal", self._goal_text()),
            ("study", str(self.journal.folder)),
        ]
        self.screen.header(rows)
        for note in bench.notes:
            self.screen.say(note)
        self.screen.study_started(
            self.journal.folder.name, self.header.trials, self._threshold(), self.journal.study.history
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
        return Launcher(
            folder=self.journal.folder,
            runner=self.bench.runner_path,
            target=self.header.target,
            meters=self.bench.meters.names,
            meter_options=dict(self.header.meter_options),
            plan=self.header.plan,
            segment=self.journal.study.segment,
            report=self.screen.phase,
        )

    def _keep(self, number: int, prompt: str, reply: str | None) -> None:
        if reply is None:
            self.screen.phase(number, "asking the LLM")
        keep_transcript(self.journal.folder, number, prompt, reply)

    def _ended(self, trial: Trial, history: History) -> None:
        self.screen.trial_ended(trial, history, doubts(trial, history))
        if trial is history.default and self.header.trials:
            runs = self.header.trials - len(history.current) + 2 * self.header.confirm_pairs
            self.screen.say(
                f"a run takes about {seconds_text(trial.seconds)}; all that may follow, the confirmation included,"
                f" takes about {seconds_text(runs * trial.seconds)}"
            )

    def _interrupted(self) -> None:
        """Ctrl-C or a signal: the trial that was cut short is not held against its configuration."""
        history = self.journal.study.history
        self.journal.append(Decision(action="stop", before_trial=len(history), remark="interrupted"))
        self.screen.close()
        self.screen.warn(
            f"stopped; {len(history)} finished trials are kept. Go on with `tune run --resume {self.journal.folder}`"
        )

    # --- after ---

    def _confirm(self, end: End) -> Saving | None:
        history = self.journal.study.history
        default, best, pairs = history.default, history.best, self.header.confirm_pairs
        if default is None or best is None or best.config == default.config or not pairs or end.kind == "person":
            return None
        return confirm(
            self.journal,
            self._launcher(),
            default,
            best,
            pairs,
            lambda number: self.screen.confirming(number + 1, pairs),
        )

    def _verdict(self, end: End, found: Saving | None) -> str:
        study, planned = self.journal.study, self.header.confirm_pairs
        default, best = study.history.default, study.history.best
        if best is None:
            return "No saving shown: nothing could be measured."
        if default is None:
            return "No saving shown: the default was not measured, so there is nothing to compare with."
        if best.config == default.config:
            return "No saving shown: no setting used less energy than the default."
        if end.kind in ("person", "chat") or not planned:
            return verdict(None, 0, 0)
        return concluded(study) or verdict(found, 0, planned)

    def _conclude(self, end: End, found: Saving | None) -> None:
        history = self.journal.study.history
        best = history.best
        runner, target = self.bench.runner, self.header.target
        self.screen.summary(
            end=end,
            history=history,
            space=self.bench.space,
            used=usage(history),
            command=asked(self.bench.runner_path, "command", lambda: runner.command(best.config, target))
            if best
            else None,
            verdict=self._verdict(end, found),
            folder=self.journal.folder,
        )


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
