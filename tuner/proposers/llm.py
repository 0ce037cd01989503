"""A chat model as a proposer.

The prompt is a template that a person can edit; it sees five things (`space`, `history`, `goal`,
`machine`, `workload`) and nothing else. Every number in it was computed by code. The answer is
untrusted: it is read as data, checked against the space, and refused with a sentence that names every
fault. After three refusals a classical proposal takes its place and says so.

A template decides how it remembers: with `{# conversation #}` in its first line the earlier prompts
and answers are sent again as a conversation, as in arXiv 2604.27032; otherwise each prompt stands alone
and carries the history itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tuner import summary
from tuner.proposers.answer import Answer, answer_form, answer_schema, read_answer
from tuner.repeats import drifts
from tuner.space import Config, Refused, SearchSpace, show
from tuner.trial import Chat, Decision, Exchange, History, Lost, Message, Noise, Proposal, Proposer, Trial, Unit

if TYPE_CHECKING:
    from jinja2 import Template

REFUSALS = 3
"""How often an answer is sent back before a classical proposal takes its place."""

BEST_SHOWN = 12
FAILURES_SHOWN = 5
LOG_LINES_SHOWN = 4

ANSWER_REMEMBERED = 4000
"""Characters of an answer that are sent back to the model; a flood is not answered with a flood."""

Keep = Callable[[int, str, str | None], None]
"""Told the trial's number and the prompt before it is sent, and again with the reply's text."""


Lose = Callable[[Lost], object]
"""Told what was asked and answered when no proposal came of it."""


def nobody(_lost: Lost) -> None:
    """Tell nobody."""


def forget(_number: int, _prompt: str, _reply: str | None) -> None:
    """Keep nothing."""


@dataclass(frozen=True, kw_only=True)
class Llm:
    """Proposes what a chat model answers."""

    chat: Chat
    template: Path
    fallback: Proposer
    """Takes over, visibly, when the model's answers are refused."""
    view: View
    keep: Keep = forget
    lose: Lose = nobody
    name: str = "llm"

    def propose(self, space: SearchSpace, history: History) -> Proposal | None:
        """Ask until an answer can be used, `REFUSALS` times again at most. Raises `ChatError`."""
        number = len(history)
        exchanges: list[Exchange] = []
        try:
            found = self._ask(space, history, exchanges)
        except BaseException:
            # The chat stays away, or the person leaves: what was paid for is not forgotten.
            if exchanges:
                self.lose(Lost(before_trial=number, exchanges=tuple(exchanges)))
            raise
        if found is not None:
            return replace(found, exchanges=tuple(exchanges))
        stand_in = self.fallback.propose(space, history)
        if stand_in is None:
            self.lose(Lost(before_trial=number, exchanges=tuple(exchanges)))
            return None
        return replace(
            stand_in,
            in_place_of=self.name,
            reason=f"{len(exchanges)} answers of {self.chat.name} were refused, the last one because of:"
            f" {exchanges[-1].fault}. Instead: {stand_in.reason}",
            exchanges=tuple(exchanges),
        )

    def _ask(self, space: SearchSpace, history: History, exchanges: list[Exchange]) -> Proposal | None:
        """The first usable answer as a proposal, or None; each prompt and answer is added to `exchanges`."""
        number = len(history)
        conversation = self.messages(space, history)
        while len(exchanges) <= REFUSALS:
            prompt = conversation[-1].content
            self.keep(number, prompt, None)
            reply = self.chat.reply(conversation, answer_schema(space, self.view.unit))
            exchanges.append(Exchange(prompt=prompt, reply=reply))
            self.keep(number, prompt, reply.text)
            try:
                answer = read_answer(reply.text, self.view.unit)
                config = self._usable(space, history, answer)
            except Refused as fault:
                exchanges[-1] = replace(exchanges[-1], fault=str(fault))
                conversation.append(Message("assistant", _cut(reply.text)))
                conversation.append(Message("user", again(str(fault), self.view.unit)))
                continue
            return Proposal(
                config=config,
                source=self.name,
                reason=answer.reason,
                predicted_joules_per_unit=answer.predicted_joules_per_unit,
            )
        return None

    def messages(self, space: SearchSpace, history: History) -> list[Message]:
        """The conversation up to and including the next prompt."""
        text = read_template(self.template)
        prompt = render(text, self.template, self.view.of(space, history))
        earlier = conversation_so_far(history) if remembers(text) else []
        return [*earlier, Message("user", prompt)]

    def _usable(self, space: SearchSpace, history: History, answer: Answer) -> Config:
        config = space.complete(answer.changes)
        known = history.find(config)
        if known is not None:
            outcome = (
                f"failed: {known.error}"
                if known.joules_per_unit is None
                else summary.energy_text(known, summary.noise(history), self.view.label)
            )
            raise Refused(
                f"this configuration was already trial {known.number} ({outcome});"
                " propose one that is not in the results"
            )
        return config


def again(fault: str, unit: Unit) -> str:
    """The prompt that follows an answer that cannot be used."""
    return (
        f"Your answer was not used: {fault}.\n\nAnswer again with one JSON object and nothing else: {answer_form(unit)}"
    )


def _cut(text: str) -> str:
    if len(text) <= ANSWER_REMEMBERED:
        return text or "(empty)"
    return f"{text[:ANSWER_REMEMBERED]}\n[cut: {len(text)} characters in all]"


def conversation_so_far(history: History) -> list[Message]:
    """All prompts and answers of the study, in order, as one conversation."""
    turns: list[Message] = []
    for exchange in summary.exchanges(replace(history, trials=history.current)):
        turns += [Message("user", exchange.prompt), Message("assistant", _cut(exchange.reply.text))]
    return turns


# --- templates -------------------------------------------------------------------------------


def read_template(path: Path) -> str:
    """The template's text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: the prompt cannot be read ({error})") from error


def remembers(template: str) -> bool:
    """Whether the template asks for the earlier prompts and answers to be sent again."""
    return template.lstrip().split("\n", 1)[0].replace("-", "").replace(" ", "") == "{#conversation#}"


def render(template: str, path: Path, view: Mapping[str, object]) -> str:
    """The prompt. Raises `Refused` naming the template's line when it asks for something that there is not."""
    import jinja2

    try:
        return _compiled(template).render(view).strip() + "\n"
    except jinja2.TemplateSyntaxError as error:
        raise Refused(f"{path}: line {error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise Refused(
            f"{path}: {error.message}; a template sees space, history, goal, machine and workload,"
            " see docs/templates.md"
        ) from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise Refused(f"{path}: {error}; see docs/templates.md") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    """The same for each prompt of a study; compiling takes ten times as long as filling in."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["show"] = show
    environment.filters["joules"] = summary.joules_text
    environment.filters["fence"] = fence
    return environment.from_string(template)


def fence(text: str) -> str:
    """Somebody's words as a fenced block that the words themselves cannot close."""
    longest = run = 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}text\n{text}\n{ticks}"


# --- what a template sees --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class View:
    """Turns a study into the five things that a template sees. Plain text, numbers, lists and mappings."""

    machine: Mapping[str, str]
    workload: Mapping[str, object]
    """Engine, model and load; see docs/templates.md."""
    unit: Unit = "token"
    threshold: Callable[[History], float | None] = field(default=lambda _history: None)
    """Joules per unit to get down to; None while there is none."""
    trials: int | None = None

    @property
    def label(self) -> str | None:
        """What an energy is called beside its figure: nothing where it was measured; None where nobody said."""
        quality = self.workload.get("quality")
        return "" if quality == "measured" else str(quality) if quality else None

    def of(self, space: SearchSpace, history: History) -> dict[str, object]:
        """The variables of a template, for the next proposal."""
        return {
            "space": self._space(space),
            "history": self._history(space, history),
            "goal": self._goal(history),
            "machine": dict(self.machine),
            "workload": {**self.workload, "unit": self.unit},
        }

    def _space(self, space: SearchSpace) -> dict[str, object]:
        return {
            "parameters": [
                {
                    "name": p.name,
                    "range": p.range,
                    "default": show(p.default),
                    "scope": p.scope,
                    "effect": p.effect,
                    "meaning": p.meaning,
                }
                for p in space.free
            ],
            "fixed": {p.name: show(p.default) for p in space.parameters if p.size == 1},
            "constraints": [c.sentence for c in space.constraints],
            "changeable": [p.name for p in space.free if p.scope in ("request", "live")],
        }

    def _goal(self, history: History) -> dict[str, object]:
        limit, best = self.threshold(history), history.best
        known = best.joules_per_unit if best else None
        return {
            "threshold_joules_per_unit": limit,
            "distance": known / limit - 1 if known and limit else None,
            "trials_left": None if self.trials is None else max(self.trials - len(history.current), 0),
        }

    def _history(self, space: SearchSpace, history: History) -> dict[str, object]:
        best, default, known = history.best, history.default, summary.noise(history)
        drifted = {n for s in drifts(history) for n in range(s.first, s.last + 1)}

        def row(trial: Trial) -> dict[str, object]:
            return {**self._row(space, trial, history, known), "drifted": trial.number in drifted}

        ranked = sorted(history.measured, key=lambda t: (t.joules_per_unit or 0.0, t.number))
        return {
            "trials": len(history.current),
            "next_trial": len(history),
            "prompts": len(summary.exchanges(replace(history, trials=history.current))),
            "default": row(default) if default else None,
            "best": row(best) if best else None,
            "last": row(history.current[-1]) if history.current else None,
            "results": [row(t) for t in ranked[:BEST_SHOWN]],
            "results_left_out": max(len(ranked) - BEST_SHOWN, 0),
            "failures": [
                {
                    "number": t.number,
                    "changes": summary.differences(space, t.config, space.default()),
                    "cause": t.error,
                    "joules_per_unit": t.shown_joules_per_unit,
                    "log": "\n".join(line for line in t.log[-LOG_LINES_SHOWN:] if line),
                }
                for t in history.failed[-FAILURES_SHOWN:]
            ],
            "noise": summary.noise_text(known),
            "restart_seconds": summary.restart_seconds(history),
            "restart_joules": summary.restart_joules(history),
            "effects": [e.sentence for e in summary.effects(space, history)],
            "energy": dict(summary.where_energy_goes(best, str(self.workload.get("quality") or ""))) if best else {},
            "remarks": [remark_view(space, d) for d in history.decisions if told(d)],
            "new_remarks": [remark_view(space, d) for d in untold(history)],
        }

    def _row(self, space: SearchSpace, trial: Trial, history: History, known: Noise) -> dict[str, object]:
        best, default = history.best, history.default
        ratio = summary.against(trial, default, known) if default else None
        beside = summary.against(trial, best, known) if best and best.number != trial.number else None
        return {
            "number": trial.number,
            "source": trial.proposal.source,
            "config": {name: show(trial.config[name]) for name in space.names if name in trial.config},
            "changes": summary.differences(space, trial.config, space.default()),
            "joules_per_unit": trial.joules_per_unit,
            "interval": summary.interval(trial, known),
            "launches": len(trial.launches),
            "bounds": trial.joules_per_unit_bounds if trial.quality == "estimated" else None,
            "relative_sd": trial.relative_sd,
            "windows": len(trial.valid),
            "ratio_to_default": ratio.ratio if ratio else None,
            "ratio_interval": (ratio.low, ratio.high) if ratio and trial is not default else None,
            "within_noise_of_default": bool(ratio and ratio.within_noise and trial is not default),
            "within_noise_of_best": bool(beside and beside.within_noise),
            "predicted_joules_per_unit": trial.proposal.predicted_joules_per_unit,
            "units_per_second": trial.units_per_second,
            "metrics": trial.metrics,
            "error": trial.error,
        }


def told(decision: Decision) -> bool:
    """Whether the next prompt should know of this decision."""
    return decision.action in ("remark", "reject", "forbid", "edit")


def untold(history: History) -> list[Decision]:
    """The decisions that a conversation has not heard of: those since the newest prompt that led to a trial.

    What turned a proposal down was told at once, in the prompt that asked for another one.
    """
    asked = max((t.number for t in history.current if t.proposal.exchanges), default=-1)
    return [
        d
        for d in history.decisions
        if told(d)
        and (d.before_trial == len(history) or (d.before_trial >= asked and d.action in ("remark", "forbid", "edit")))
    ]


def remark_view(space: SearchSpace, decision: Decision) -> dict[str, object]:
    """A person's decision as a template sees it."""
    proposed = decision.edited or decision.proposal
    return {
        "before_trial": decision.before_trial,
        "action": decision.action,
        "text": decision.remark,
        "parameter": decision.parameter,
        "value": None if decision.value is None else show(decision.value),
        "changes": summary.differences(space, proposed.config, space.default()) if proposed else None,
    }
