"""What a person sees: tables, the live view while a study runs, and the dialogue about a proposal.

Receives records and says them; what is computed comes from `tuner.summary` and `tuner.checks`. Results
go to standard output, progress, questions and warnings to standard error, so that `tune run > FILE`
leaves the result in the file and the conversation on the terminal. Where standard error is no
terminal there is one plain line for each event.

All text passes through `Screen._text`: it never contains markup, an escape sequence or a control
character, whoever wrote it. Colour only repeats what words or marks already say.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from tuner.chats.paste import END, osc52, pasted
from tuner.checks import doubts as doubts_of
from tuner.journal import End, Pair, Study
from tuner.limits import columns_of
from tuner.repeats import drifts
from tuner.space import Config, Refused, SearchSpace, Value, show
from tuner.summary import (
    Usage,
    above_idle,
    against,
    best_at_equal_quality,
    changes_text,
    clean,
    differences,
    energy_text,
    failed_cell,
    failure_text,
    failures_text,
    figures_text,
    grouped,
    idle_text,
    indistinguishable,
    interval_text,
    joules_text,
    launched,
    loading_text,
    loss_text,
    noise,
    noise_text,
    percent_text,
    quality_text,
    ratio_text,
    seconds_text,
    source_text,
    sparkline,
    unit,
    where_energy_goes,
)
from tuner.trial import Action, Decision, History, Message, Proposal, Repeat, Trial, Unit

if TYPE_CHECKING:
    from tuner.convergence import Analysis, Cell, Target
    from tuner.replay import Table as Recorded
    from tuner.runs import Problem

MOST_COMMAND_LINES = 10
"""A launch of more lines is a script, which `tune apply` prints."""

REFRESHES_PER_SECOND = 2
"""The view runs beside the measurement: each drawing costs 2 to 3 ms of the same CPU, 0.5 % of it in all."""

LOG_LINES_SHOWN = 4
"""Of a failed trial's engine log; all of it is in `trials/`."""

WIDE = 110
"""Columns from which a trial's label and noise mark stand on its own line."""


class Limit(Protocol):
    """A threshold, as far as it is shown."""

    def joules_per_unit(self, history: History) -> float | None:
        """Joules per unit to get down to; None while it waits for the default."""


class Check(Protocol):
    """One line of `tune doctor`."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str:
        """`ok`, `missing` or `warning`."""

    @property
    def reason(self) -> str: ...
    @property
    def remedy(self) -> str:
        """The command that mends it, one a line; empty when nothing has to be mended."""


@dataclass
class _Running:
    """What the live view shows of the study under way."""

    name: str
    trials_planned: int | None
    threshold: Limit | None
    history: History
    started: float
    number: int
    phase: str = "choosing"
    phase_started: float = 0.0


_PASSING = ("starting", "loading", "stopping")
"""Phases that are over in a moment: shown where they can be overwritten, no line in a log."""

_PLAIN = str.maketrans(
    {
        "±": "+/-",
        "×": "x",
        "µ": "u",
        "…": "...",
        "€": "EUR ",
        "£": "GBP ",
        "▁": "_",
        "▂": "_",
        "▃": ".",
        "▄": "-",
        "▅": "-",
    }
) | (str.maketrans({"▆": "=", "▇": "=", "█": "#"}))
"""For terminals and files that are not UTF-8."""


@dataclass(frozen=True)
class _Changes:
    """`a 1 -> 2, b 3 -> 4`, wrapped between changes and never inside one."""

    changes: tuple[Text, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text()
        for i, change in enumerate(self.changes):
            item = change + Text("," if i + 1 < len(self.changes) else "")
            if line and line.cell_len + 1 + item.cell_len > options.max_width:
                yield line
                line = Text()
            line = Text(" ").join([line, item]) if line else item
        yield line

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widths = [change.cell_len + 1 for change in self.changes]
        return Measurement(max(widths, default=0), sum(widths) + len(widths)).with_maximum(options.max_width)


class Screen:
    """The terminal, as the rest of the program talks to it. `close` puts the terminal back as it was."""

    def __init__(
        self,
        stdout: Console | None = None,
        stderr: Console | None = None,
        *,
        live: bool | None = None,
        stdin: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`live` left out: where standard error is a terminal that can move its cursor."""
        self._stdout = stdout or Console(highlight=False)
        self._stderr = stderr or Console(stderr=True, highlight=False)
        self._live_wanted = self._stderr.is_terminal and not self._stderr.is_dumb_terminal if live is None else live
        self._stdin = stdin
        self._clock = clock
        self._live: Live | None = None
        self._running: _Running | None = None
        self._heading: str | None = None
        self._unit: Unit = "token"
        """The quality that the trial lines' heading names; None before the heading is printed."""
        self._counted: tuple[int, int, float | None] | None = None
        """Runs of a comparison that are done, of how many, and the seconds that are left."""

    def aside(self) -> Screen:
        """The same terminal, for something whose results are only progress here: standard output stays clean."""
        return Screen(self._stderr, self._stderr, live=self._live_wanted, stdin=self._stdin, clock=self._clock)

    # --- words ---

    def say(self, text: str) -> None:
        """A line of progress."""
        self._stderr.print(self._text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that must not be missed."""
        line = Text("warning: ", style="bold yellow") + self._text(text, "default not bold")
        # Left to the terminal to wrap: a command in it can then be copied whole.
        self._stderr.print(line, soft_wrap=True)

    def header(self, rows: Sequence[tuple[str, str]]) -> None:
        """What was taken and from where, before anything runs."""
        self._facts(rows, self._stderr)
        self._stderr.print()

    def messages(self, messages: Sequence[Message]) -> None:
        """A prompt on standard output, as it would be sent; each turn under its role where there are several."""
        for message in messages:
            if len(messages) > 1:
                self._stdout.file.write(f"--- {message.role} ---\n")
            self._stdout.file.write(clean(message.content, lines=True).rstrip("\n") + "\n")
        self._stdout.file.flush()

    def _text(self, text: str, style: str = "", *, lines: bool = False) -> Text:
        """The only way of text onto the screen."""
        safe = clean(text, lines=lines)
        if self._ascii:
            safe = safe.translate(_PLAIN).encode("ascii", "replace").decode()
        return Text(safe, style=style)

    @property
    def _ascii(self) -> bool:
        return self._stderr.options.ascii_only

    def _rule(self, title: str = "") -> Rule:
        # An untitled rule does not fall back to ASCII of itself (rich 15).
        characters = "-" if self._ascii else "─"
        return Rule(self._text(title, "bold"), characters=characters, style="dim", align="left")

    # --- while it runs ---

    def study_started(
        self,
        name: str,
        trials_planned: int | None,
        threshold: Limit | None,
        history: History | None = None,
        unit: Unit = "token",
    ) -> None:
        """Begin the live view. `history` holds what a resumed study already has; energy is divided by `unit`."""
        self._unit = unit
        past = history or History()
        self._running = _Running(name, trials_planned, threshold, past, self._clock(), len(past))
        self._running.phase_started = self._clock()
        for trial in past.trials:
            self._trial_line(trial, past)
        self._start_live()

    def working(self, name: str) -> None:
        """Begin the live view of something that is no study."""
        self.study_started(name, None, None)

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """What was found out, on standard output."""
        self._facts(rows)

    def phase(self, trial_number: int, phase: str) -> None:
        """What is happening now. Called often; only a change is news."""
        running = self._running
        if running is None or (running.number, running.phase) == (trial_number, phase):
            return
        # Without a live view, `measuring 2/5` after `measuring 1/5` is no event.
        event = (running.number, running.phase.split()[:1]) != (trial_number, phase.split()[:1])
        event = event and phase not in _PASSING
        running.number, running.phase, running.phase_started = trial_number, phase, self._clock()
        if event and not self._live_wanted:
            self.say(f"trial {trial_number}: {phase}")

    def trial_ended(self, trial: Trial, history: History, doubts: Sequence[str], columns: Sequence[str] = ()) -> None:
        """One line for the trial; its failure or its doubts below, and the metrics named in `columns`."""
        if self._running is not None:
            self._running.history = history
            self._running.number, self._running.phase = len(history), "choosing"
            self._running.phase_started = self._clock()
        self._trial_line(trial, history)
        if said := figures_text(trial, columns):
            self._below(trial, said)
        for doubt in doubts:
            self._below(trial, f"! {doubt}")
        if self._live is not None:
            self._live.refresh()

    def repeated(self, repeat: Repeat, history: History) -> None:
        """One more launch of a trial, and what is known of it now."""
        if self._running is not None:
            self._running.history = history
            self._running.phase_started = self._clock()
        trial = next(t for t in history.trials if t.number == repeat.trial.number)
        why = "to be sure" if repeat.purpose == "contender" else "to see drift"
        outcome = (
            f"failed: {repeat.trial.error}"
            if repeat.trial.launch_joules_per_unit is None
            else f"{joules_text(repeat.trial.launch_joules_per_unit)}, in all {energy_text(trial, noise(history))}"
        )
        self._below(trial, f"launched again {why}: {outcome}")
        if self._live is not None:
            self._live.refresh()

    def confirming(self, pair: int, pairs: int) -> None:
        """The search is over; default and best are measured again."""
        if self._running is not None:
            self._running.phase, self._running.phase_started = f"confirming, pair {pair} of {pairs}", self._clock()
        if not self._live_wanted:
            self.say(f"confirming: pair {pair} of {pairs} (default and best, measured again)")

    def pruning(self, dropped: Sequence[str], pair: int, pairs: int) -> None:
        """The saving is confirmed, and these changes may not be needed for it."""
        what = f"without {', '.join(dropped)}: pair {pair} of {pairs}"
        if self._running is not None:
            self._running.phase, self._running.phase_started = what, self._clock()
        if not self._live_wanted:
            self.say(f"measuring {what}")

    def counted(self, done: int, total: int, seconds_left: float | None) -> None:
        """How far a comparison is. Called often; without a live view, each tenth is news."""
        before, self._counted = self._counted, (done, total, seconds_left)
        if self._live_wanted:
            self._start_live()
        elif before is None or 10 * done // max(total, 1) > 10 * before[0] // max(total, 1):
            self.say(_counted_text(done, total, seconds_left))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The terminal without the live view, for a dialogue."""
        was_live = self._live is not None
        self._stop_live()
        try:
            yield
        finally:
            if was_live:
                self._start_live()

    def close(self) -> None:
        """End the live view and show the cursor again. May be called twice."""
        self._stop_live()
        self._running = self._counted = None

    def _start_live(self) -> None:
        shown = self._running is not None or self._counted is not None
        if self._live_wanted and shown and self._live is None:
            # Standard output and error stay as they are: what others print goes above the view by way of `say`.
            self._live = Live(
                console=self._stderr,
                get_renderable=self._status,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start(refresh=True)

    def _stop_live(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _status(self) -> RenderableType:
        """The live view: three lines below the trials."""
        running = self._running
        if self._counted is not None:
            return self._text(_counted_text(*self._counted), "bold")
        if running is None:
            return Text()
        history, now = running.history, self._clock()
        of = f" of {running.trials_planned}" if running.trials_planned else ""
        first = Text.assemble(
            self._text(running.name, "bold"),
            f"  trial {running.number}{of}  ",
            self._text(running.phase, "bold cyan"),
            f" {seconds_text(now - running.phase_started)}",
            (f"  total {seconds_text(now - running.started)}", "dim"),
        )
        lines = [first, self._standing(running), self._spent(history)]
        for line in lines:
            line.no_wrap, line.overflow = True, "crop" if self._ascii else "ellipsis"
        return Group(self._rule(), *lines)

    def _standing(self, running: _Running) -> Text:
        """Best so far against default and threshold."""
        history = running.history
        best, line = history.best, Text()
        if best is None or best.joules_per_unit is None:
            line.append("best  -", "dim")
        else:
            line.append("best  ", "dim")
            label = quality_text(best)
            figure = f"{joules_text(best.joules_per_unit)}/{unit(best)}{label and f' {label}'}"
            line.append_text(self._text(figure, "bold"))
            ratio = against(best, history.default, noise(history)) if history.default else None
            if best is history.default:
                line.append(f" (trial {best.number}, the default)")
            elif ratio:
                near = ", within noise" if ratio.within_noise else ""
                line.append(f" (trial {best.number}, {ratio_text(ratio.ratio)}{near})")
        limit = running.threshold.joules_per_unit(history) if running.threshold else None
        if limit is not None:
            line.append("  threshold ", "dim")
            line.append_text(self._text(joules_text(limit)))
            if best is not None and best.joules_per_unit is not None:
                gap = best.joules_per_unit / limit - 1
                line.append(" reached" if gap <= 0 else f", {percent_text(gap)} to go")
        return line

    def _spent(self, history: History) -> Text:
        """Energy measured so far, and one mark for each trial."""
        windows = [m for t in history.trials for m in t.valid]
        labels = {quality_text(t) for t in history.measured} - {""}
        line = Text("energy so far  ", "dim")
        energy = joules_text(sum(m.joules for m in windows)) if windows else "-"
        line.append_text(self._text(" ".join([energy, *sorted(labels)]), "not dim"))
        if history.current:
            room = max(self._stderr.width - len(line) - 12, 8)
            line.append("  trials  ", "dim")
            line.append_text(self._text(sparkline(history.current[-room:]), "not dim"))
        return line

    def _trial_line(self, trial: Trial, history: History) -> None:
        if not self._live_wanted:
            self.say(_sentence(trial, history))
            return
        if self._heading is None:
            self._heading = quality_text(trial)
            label = f", {self._heading}" if self._heading else ""
            head = ("#", "proposed by", "changes from the default", f"J/{self._unit_of(trial)}{label}", "ratio")
            self._stderr.print(self._row([Text(h, "dim") for h in head]))
        number, source = self._text(str(trial.number)), self._text(source_text(trial))
        changes = self._changes(_changes(trial, history))
        if trial.joules_per_unit is None:
            shown = Text("failed", "bold red")
            if trial.over_limit:
                shown = self._text(f"({joules_text(trial.shown_joules_per_unit)})", "red")
            self._stderr.print(self._row([number, source, changes, shown, Text()]))
            self._below(trial, trial.error or "no window counted")
            for line in trial.log[-LOG_LINES_SHOWN:]:
                self._below(trial, f"| {line}")
            return
        energy = self._energy(trial, history)
        if quality_text(trial) != self._heading:
            energy.append(f" {quality_text(trial) or 'measured'}")
        self._stderr.print(self._row([number, source, changes, energy, self._ratio(trial, history, self._stderr)]))

    def _unit_of(self, trial: Trial) -> Unit:
        """What its energy is divided by; of a trial that nothing was measured of, what the study says."""
        return unit(trial) if trial.measurements else self._unit

    def _changes(self, text: str) -> _Changes:
        return _Changes(tuple(self._text(change) for change in (text or "(the default)").split(", ")))

    def _energy(self, trial: Trial, history: History) -> Text:
        """`49.4 mJ ± 1.7 % (3x)`, after a `~` where it cannot be told from the best."""
        mark = "~ " if trial.number in indistinguishable(history) else ""
        figures = f"{mark}{joules_text(trial.joules_per_unit)} {interval_text(trial, noise(history))}"
        return self._text(figures, "bold" if trial is history.best else "")

    def _ratio(self, trial: Trial, history: History, console: Console) -> Text:
        default = history.default
        ratio = against(trial, default, noise(history)) if default and trial is not default else None
        if ratio is None:
            return Text()
        if ratio.within_noise:
            return Text(f"{ratio_text(ratio.ratio)}{' ' if console.width >= WIDE else chr(10)}within noise")
        return Text(ratio_text(ratio.ratio), "green" if ratio.ratio < 1 else "")

    def _row(self, cells: Sequence[RenderableType]) -> Table:
        """One line of a table whose columns keep their width from one print to the next."""
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for width, justify in _trial_columns(self._stderr):
            grid.add_column(width=width, ratio=None if width else 1, justify=justify)
        grid.add_row(*cells)
        return grid

    def _below(self, trial: Trial, text: str) -> None:
        """What belongs to a trial's line: indented under it, or a line of its own that names the trial."""
        if self._live_wanted:
            self._stderr.print(Padding(self._text(text), (0, 0, 0, 5)))
        else:
            self.say(f"trial {trial.number}: {text}")

    # --- the person ---

    def offer_without_llm(self) -> Callable[[], str] | None:
        """A question to ask where no LLM is configured: `paste` or `rules`. None where nobody can be asked."""
        if not (self._input.isatty() and self._stderr.is_terminal):
            return None
        return self._ask_without_llm

    def _ask_without_llm(self) -> str:
        self.say("No LLM is configured (no --llm, and no key in OPENAI_API_KEY or ANTHROPIC_API_KEY).")
        self.say("  p  paste: you carry each prompt to a chat of yours, and its answer back")
        self.say("  r  rules: the built-in adviser proposes; it is not an LLM")
        while True:
            answer = self._ask("[p]aste or [r]ules > ")
            if answer is None:
                raise Refused("nobody answered; choose with --llm paste or --proposer rules")
            if (chosen := answer.lower()) and ("paste".startswith(chosen) or "rules".startswith(chosen)):
                return "paste" if chosen[0] == "p" else "rules"
            self.say("p or r, please")

    def ask_paste(self, prompt: str) -> str:
        """Show a prompt for the person to carry to their chat, and read the answer; empty when there is none."""
        with self.paused():
            self._stderr.print(self._rule("prompt"))
            self._stderr.print(self._text(prompt, lines=True), soft_wrap=True)
            self._stderr.print(self._rule())
            copy = osc52(prompt) if self._stderr.is_terminal else ""
            if copy:
                self._stderr.file.write(copy)
                self._stderr.file.flush()
            copied = "It is on your clipboard, where your terminal allows that. " if copy else ""
            self.say(
                f"{copied}Give the prompt to your chat, paste its answer here, end with a line that holds only {END}"
            )
            self._forget_typed_ahead()
            return pasted(self._lines())

    def decide(self, space: SearchSpace, history: History, proposal: Proposal, trial_seconds: float | None) -> Decision:
        """Show a proposal and ask what to do with it. The end of the input means stop."""
        with self.paused():
            self._show_proposal(space, history, proposal, trial_seconds)
            while True:
                line = self._ask("[a]ccept [e]dit [r]eject re[m]ark [f]orbid [b]atch [s]top [?] > ")
                if line is None:
                    self.say("end of input: stopping")
                    return _decision("stop", history, proposal, remark="end of input")
                key, _, rest = line.partition(" ")
                answer = self._answer(key.lower(), rest.strip(), space, history, proposal)
                if answer is not None:
                    return answer

    def _answer(self, key: str, rest: str, space: SearchSpace, history: History, proposal: Proposal) -> Decision | None:
        """The decision that `key` stands for; None to ask again."""
        match key:
            case "a" | "accept":
                return _decision("accept", history, proposal)
            case "e" | "edit":
                return self._edit(rest, space, history, proposal)
            case "r" | "reject":
                remark = rest or self._ask("why? It goes into the next prompt (Enter for no reason) > ")
                return None if remark is None else _decision("reject", history, proposal, remark=remark)
            case "m" | "remark":
                remark = rest or self._ask("remark for the next prompt > ")
                if remark:
                    self.say("noted for the next prompt")
                    return _decision("remark", history, proposal, remark=remark)
                self.say("nothing noted")
            case "f" | "forbid":
                return self._forbid(rest, space, history, proposal)
            case "b" | "batch":
                self.say("from here on every proposal runs without asking; Ctrl-C stops")
                return _decision("batch", history, proposal)
            case "s" | "stop":
                return _decision("stop", history, proposal)
            case "?" | "help" | "h":
                self._help()
            case _:
                self.say(
                    f"{key}: no such key; ? shows what each one does"
                    if key
                    else "a key, please; ? shows what each one does"
                )
        return None

    def _help(self) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column()
        for key, meaning in _KEYS:
            grid.add_row(self._text(key), self._text(meaning))
        self._stderr.print(grid)

    def _edit(self, text: str, space: SearchSpace, history: History, proposal: Proposal) -> Decision | None:
        """Change values until they fit together."""
        config = dict(proposal.config)
        if not text:
            self.say("NAME=VALUE, several with blanks between them; Enter alone when done, q to leave it as it was")
        while True:
            line = text or self._ask("change > ")
            if line is None or line == "q":
                self.say("left as proposed")
                return None
            finished = bool(text) or not line
            text = ""
            try:
                config |= _assignments(space, line)
                config = space.check(config) if finished else config
            except Refused as fault:
                self.warn(str(fault))
                continue
            changed = differences(space, config, proposal.config)
            if not finished:
                self.say(f"now: {changed or 'as proposed'}")
                continue
            if not changed:
                self.say("nothing changed")
                return None
            if known := history.find(config):
                self.say(f"note: this is trial {known.number} again ({energy_text(known, noise(history))})")
            self.say(f"edited: {changed}")
            edited = replace(
                proposal,
                config=config,
                source="human",
                reason=f"edited by the person: {changed}",
                predicted_joules_per_unit=None,
                in_place_of=proposal.source,
            )
            return replace(_decision("edit", history, proposal), edited=edited)

    def _forbid(self, text: str, space: SearchSpace, history: History, proposal: Proposal) -> Decision | None:
        """A value that may not come again. A name alone means the value that is proposed."""
        line = text or self._ask("forbid NAME=VALUE (or NAME: its proposed value) > ")
        if not line:
            self.say("nothing forbidden")
            return None
        name, given, value_text = (part.strip() for part in line.partition("="))
        try:
            parameter = space[name]
            value = parameter.parse(value_text) if given else proposal.config[name]
            earlier = {d.value for d in history.decisions if d.action == "forbid" and d.parameter == name}
            if len(earlier | {value}) >= parameter.size:
                raise Refused(f"{name}={show(value)}: nothing would be left of it; keep at least one value")
        except Refused as fault:
            self.warn(str(fault))
            return None
        self.say(f"{name}={show(value)} is forbidden for the rest of this study")
        return replace(_decision("forbid", history, proposal), parameter=name, value=value)

    def _show_proposal(
        self, space: SearchSpace, history: History, proposal: Proposal, trial_seconds: float | None
    ) -> None:
        who = proposal.source if proposal.in_place_of is None else f"{proposal.source} for {proposal.in_place_of}"
        self._stderr.print()
        self._stderr.print(self._rule(f"trial {len(history)}, proposed by {who}"))
        best, default = history.best, space.default()
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
        table.add_column("parameter", overflow="fold")
        for heading in ("default", f"best so far (trial {best.number})" if best else "best so far", "proposed"):
            table.add_column(heading, overflow="fold")
        table.add_column("change", overflow="fold")
        for name in space.names:
            own, proposed = default[name], proposal.config[name]
            held = best.config.get(name) if best else None
            changed = proposed != own
            change = (
                f"* {show(own)} -> {show(proposed)}"
                if changed
                else "back to default"
                if held not in (None, own)
                else ""
            )
            style = "bold" if change else "dim"
            table.add_row(
                self._text(name, style),
                self._text(show(own), "dim"),
                self._text(show(held), "" if held not in (None, own) else "dim"),
                self._text(show(proposed), style),
                self._text(change, style),
            )
        self._stderr.print(table)
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(overflow="fold")
        if proposal.reason:
            facts.add_row("reason", self._text(proposal.reason))
        facts.add_row("predicted", self._text(_prediction(history, proposal, self._unit)))
        if best:
            facts.add_row("best so far", self._text(energy_text(best, noise(history))))
        facts.add_row("costs", self._text(f"about {seconds_text(trial_seconds)}" if trial_seconds else "not known yet"))
        self._stderr.print()
        self._stderr.print(facts)
        self._stderr.print()

    # --- input ---

    @property
    def _input(self) -> TextIO:
        return self._stdin or sys.stdin

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                line = self._input.readline()
            except UnicodeDecodeError:
                self.say("that was not UTF-8 text; once more, please")
                continue
            if not line:
                return
            yield line

    def _ask(self, question: str) -> str | None:
        """One line of a person's, without control characters; None at the end of the input."""
        self._forget_typed_ahead()
        self._stderr.print(self._text(question), end=" ", soft_wrap=True)
        self._stderr.file.flush()
        line = next(self._lines(), None)
        if line is None or not self._input.isatty():
            self._stderr.print()
        return None if line is None else clean(line)

    def _forget_typed_ahead(self) -> None:
        """Keys pressed while something else was on the screen are no answer to this question."""
        if self._input.isatty():
            import termios

            with contextlib.suppress(termios.error, OSError):
                termios.tcflush(self._input.fileno(), termios.TCIFLUSH)

    # --- results, on standard output ---

    def summary(
        self,
        *,
        end: End | None,
        history: History,
        space: SearchSpace,
        used: Usage,
        limits: Sequence[str] = (),
        pruned: Sequence[str] = (),
        shown: bool = True,
        pairs: Sequence[Pair] = (),
        command: str | None,
        verdict: str,
        folder: Path,
    ) -> None:
        """The end of a run: the best configuration against the default, what it took, and how to launch it.

        `shown`: the configuration of `command` is confirmed to save.
        """
        self._stop_live()
        best, default = history.best, history.default
        prompts, read, written = used.prompts, used.input_tokens, used.output_tokens
        rows = [("stopped", end.reason)] if end else []
        if default:
            rows.append(("default", energy_text(default, noise(history))))
        if best and best is not default:
            rows.append(("best", _best_text(best, history, space.record())))
            rows.append(("changes", differences(space, best.config, space.default()) or "none"))
            rows += _equal_quality(history, space.record(), limits)
            rows += [("pruned" if i == 0 else " ", sentence) for i, sentence in enumerate(pruned)]
        rows.append(("trials", f"{len(history.current)}{failures_text(history)}{_launches(history)}"))
        if said := loading_text(history):
            rows.append(("loading", said))
        for stretch in drifts(history):
            rows.append(("drift", stretch.sentence.partition(": ")[2]))
        if lost := _lost_windows(history, pairs):
            rows.append(("windows", lost))
        if prompts:
            tokens = (
                f", {_count(read)} tokens in and {_count(written)} out"
                if read is not None or written is not None
                else ""
            )
            rows.append(("prompts", f"{prompts}{tokens}"))
        else:
            rows.append(("prompts", "none: no LLM took part"))
        rows.append(("study", str(folder)))
        self._stdout.print()
        self._facts(rows)
        if command:
            self._stdout.print()
            label = "launch it with" if shown else "launch the best of the search with (not shown to save)"
            label = "launch the default with" if best is default else label
            self._stdout.print(Text(label, "dim"))
            if (lines := command.count("\n") + 1) > MOST_COMMAND_LINES:
                confirmed = "" if shown else " --unconfirmed"
                command = f"tune apply {shlex.quote(str(folder))}{confirmed}  # prints the command of {lines} lines"
            # Not indented: a line break may stand inside of a word, in quotes.
            self._stdout.print(self._text(command, lines=True), soft_wrap=True)
        self._stdout.print()
        self._stdout.print(self._text(verdict, "bold"), soft_wrap=not self._stdout.is_terminal)

    def report(self, study: Study, verdict: str | None = None, costs: Sequence[tuple[str, str]] = ()) -> None:
        """A whole study as a table, with what is to be doubted, and what its confirmation showed."""
        header, history = study.header, study.history
        self._unit = header.unit
        self._facts(
            [
                ("study", str(study.folder)),
                ("workload", header.workload),
                ("proposer", f"{header.llm}, template {header.template}" if header.llm else header.proposer),
                ("meter", (study.segments[-1] if study.segments else header).meter_sentence.removeprefix("meter: ")),
                ("machine", ", ".join(f"{k} {v}" for k, v in study.machine.items())),
                ("engine", ", ".join(f"{k} {v}" for k, v in study.identity.items())),
                *([("limits", ", ".join(header.limits))] if header.limits else []),
            ]
        )
        for segment in sorted({t.segment for t in history.trials}):
            part = replace(history, trials=tuple(t for t in history.trials if t.segment == segment))
            self._stdout.print()
            if study.segments:
                self._stdout.print(Text(f"segment {segment}: not compared with the others", "bold"))
            self._stdout.print(self.trials_table(part, study.space, header.limits))
            if indistinguishable(part):
                self._stdout.print(Text("~ cannot be told from the best", "dim"))
            if part.measured:
                self._stdout.print(
                    self._text(
                        f"{noise_text(noise(part))}; figures with their 95 % interval,"
                        " too narrow for the best, which was chosen for being low",
                        "dim",
                    )
                )
            for said in _said_of(part):
                self._stdout.print(Padding(self._text(said), (0, 0, 0, 2)))
        if history.best:
            self._stdout.print()
            self._stdout.print(Text("where time and energy go (best)", "bold"))
            idle = next((t.idle for t in history.current if t.idle), None)
            rows = list(where_energy_goes(history.best).items())
            if idle:
                rows.append(("idle power", idle_text(idle)))
            if (rest := above_idle(history.best, idle)) is not None:
                quality = quality_text(history.best)
                note = f"{quality and f'{quality}, '}first launch; not tuned for"
                rows.append(("energy above idle", f"{joules_text(rest)}/{unit(history.best)} ({note})"))
            self._facts(rows)
        rows = [("stopped", study.ends[-1].reason)] if study.ends else []
        if history.best and loss_text(study.space, [history.best]):
            rows.append(("best", _best_text(history.best, history, study.space)))
            rows += _equal_quality(history, study.space, header.limits)
        if rows:
            self._stdout.print()
            self._facts(rows)
        if costs:
            self._stdout.print()
            self._stdout.print(Text("energy, money and carbon", "bold"))
            self._facts(costs)
        if verdict:
            self._stdout.print()
            self._stdout.print(self._text(verdict, "bold"), soft_wrap=not self._stdout.is_terminal)

    def trials_table(
        self, history: History, space_record: Sequence[Mapping[str, object]], limits: Sequence[str] = ()
    ) -> Table:
        """Every trial in the order it ran. `space_record` is the space as the journal keeps it."""
        default: Config = {str(p["name"]): value for p in space_record if isinstance(value := p.get("default"), Value)}
        label = next((quality_text(t) for t in history.measured), "")
        measured_unit = next((unit(t) for t in history.measured), self._unit)
        headings = (
            "#",
            "proposed by",
            "changes from the default",
            f"J/{measured_unit}{label and f', {label}'}",
            "ratio",
        )
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim", expand=True)
        for heading, (width, justify) in zip(headings, _trial_columns(self._stdout), strict=True):
            table.add_column(heading, width=width, ratio=None if width else 1, justify=justify, overflow="fold")
        table.add_column("doubts", width=6, justify="right")
        for trial in history.trials:
            measured = trial.joules_per_unit is not None
            energy = self._energy(trial, history) if measured else self._text(failed_cell(trial), "red")
            if measured and quality_text(trial) != label:
                energy.append(f" {quality_text(trial) or 'measured'}")
            if said := figures_text(trial, columns_of(limits)):
                energy.append("\n").append_text(self._text(said.replace(", ", "\n"), "dim"))
            count = len(doubts_of(trial, history))
            table.add_row(
                str(trial.number),
                self._text(source_text(trial)),
                self._changes(changes_text(trial.config, default, trial.config)),
                energy,
                self._ratio(trial, history, self._stdout),
                str(count) if count else "",
            )
        return table

    # --- comparisons, on standard output ---

    def comparison(
        self,
        problems: Sequence[Problem],
        analysis: Analysis,
        methods: Sequence[str],
        chats: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """What the runs show: each problem, then over all of them, then in words.

        `methods`: the best first; `chats`: who answered and when, with the methods that it proposed for.
        """
        self._stop_live()
        for problem in problems:
            if problem.name not in analysis.problems:
                continue
            self._stdout.print(self._text(problem.name, "bold"), soft_wrap=True)
            self._stdout.print(self._text(_problem_text(problem), "dim"), soft_wrap=not self._stdout.is_terminal)
            self._methods(problem.name, analysis, methods)
        if analysis.overall:
            counted = max(cell.problems for cell in analysis.overall)
            self._stdout.print(self._text(f"over all {counted} problems, each counting the same", "bold"))
            self._methods(None, analysis, methods)
        self._stdout.print(
            self._text(
                "5 %: within 5 % of the best; share: converged within the budget; mean: proposals, restricted at the"
                " budget; median: proposals by which half had converged; regret: median energy above the best after so"
                " many proposals;"
                " failed: trials a run that failed or broke a limit",
                "dim",
            ),
            soft_wrap=not self._stdout.is_terminal,
        )
        for who, asked in (chats or {}).items():
            told = f"{' and '.join(asked)}: answered by {who}"
            self._stdout.print(self._text(told, "dim"), soft_wrap=not self._stdout.is_terminal)
        self._stdout.print()
        for sentence in analysis.sentences:
            self._stdout.print(self._text(sentence), soft_wrap=not self._stdout.is_terminal)

    def _methods(self, where: str | None, analysis: Analysis, methods: Sequence[str]) -> None:
        """One line a method; where the terminal is narrow, convergence and regret in two tables."""
        rows = [(m, [analysis.cell(where, m, t) for t in analysis.targets]) for m in methods]
        # `largest` has no run where there is no limit.
        cells = [(m, found) for m, found in rows if found[0] is not None]
        most = max((cell.problems for _, found in cells for cell in found if cell), default=0)
        talked = any(cell and cell.prompts_per_run for _, found in cells for cell in found)
        convergence = [heading for t in analysis.targets for heading in _target_headings(t)]
        shown = [n for n in SHOWN if any(c[0] and n <= c[0].horizon for _, c in cells)]
        regrets = [f"regret\nat {n}" if n == shown[0] else f"\n{n}" for n in shown]
        costs = ["failed\na run", *(["prompts\na run", "tokens\na run"] if talked else [])]
        parts = [(convergence, _converged), (regrets + costs, lambda of: _spent(of[:1], shown, talked=talked))]
        if self._stdout.width >= WIDE:
            parts = [(convergence + regrets + costs, lambda of: _converged(of) + _spent(of[:1], shown, talked=talked))]
        for headings, values in parts:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim", padding=(0, 1))
            table.add_column("\nmethod", no_wrap=True)
            for heading in headings:
                table.add_column(heading, justify="right", no_wrap=True)
            for method, found in cells:
                fewer = f" ({found[0].problems})" if found[0] and found[0].problems < most else ""
                table.add_row(self._text(method + fewer), *(self._text(value) for value in values(found)))
            self._stdout.print(table)
            self._stdout.print()
        if where is None and any(found[0] and found[0].problems < most for _, found in cells):
            self._stdout.print(
                self._text(
                    f"(n): over n of the {most} problems, those it could run on; not comparable line by line", "dim"
                )
            )
            self._stdout.print()

    def tables(self, tables: Sequence[Recorded]) -> None:
        """The recorded problems, a few lines each."""
        for table in tables:
            about = table.about
            self._stdout.print(self._text(table.name, "bold"), soft_wrap=True)
            parameters = ", ".join(f"{name} ({len(p.values)})" for name, p in about.parameters.items())
            self._facts(
                [
                    ("  what", f"{about.model}, {about.engine}, {about.hardware}"),
                    ("  parameters", parameters),
                    ("  size", _size_text(table)),
                    ("  limits", ", ".join(about.limits) or "none"),
                    ("  licence", f"{about.licence.partition(' (')[0]}; trust {about.trust.partition(' ')[0]}"),
                ]
            )

    def table(self, table: Recorded) -> None:
        """Everything about one recorded problem but its energies."""
        about = table.about
        self._facts(
            [
                ("table", table.name),
                ("task", f"{about.task} ({about.kind})"),
                ("model", about.model),
                ("engine", about.engine),
                ("hardware", about.hardware),
                ("objective", f"{about.objective}, joules per {about.unit}"),
                ("size", _size_text(table)),
                ("limits", ", ".join(about.limits) or "none"),
                ("repeats", "none" if table.relative_sd is None else f"spread {percent_text(table.relative_sd)} (sd)"),
                ("default", ", ".join(f"{name}={show(v)}" for name, v in about.default.items())),
                ("", about.default_note),
                ("trust", about.trust),
                ("source", f"{about.source}, revision {about.revision}"),
                ("licence", about.licence),
                ("notes", about.notes),
            ]
        )
        self._stdout.print()
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
        for heading in ("parameter", "values", "default", "meaning"):
            grid.add_column(heading, overflow="fold")
        for name, p in about.parameters.items():
            values = ", ".join(map(show, p.values))
            grid.add_row(*map(self._text, (name, values, show(about.default[name]), p.meaning)))
        self._stdout.print(grid)
        self._stdout.print()
        self._facts([("metrics", "")] + [(f"  {name}", meaning) for name, meaning in about.metrics.items()])
        self._stdout.print()
        self._stdout.print(self._text(f"compare methods on it: tune compare --table {table.name}"), soft_wrap=True)

    def doctor(self, checks: Sequence[Check]) -> None:
        """What can be measured here, and the command that mends what cannot."""
        styles = {"ok": "green", "missing": "red", "warning": "yellow"}
        for check in checks:
            mark = self._text(check.state, styles.get(check.state, ""))
            mark.pad_right(9 - len(mark))
            self._stdout.print(mark + self._text(check.name, "bold"))
            self._stdout.print(Padding(self._text(check.reason), (0, 0, 0, 9)))
            for command in clean(check.remedy, lines=True).splitlines():
                # Not wrapped, so that it can be copied whole.
                self._stdout.print(Text(" " * 9 + "$ ") + self._text(command, "bold"), soft_wrap=True)

    def _facts(self, rows: Sequence[tuple[str, str]], console: Console | None = None) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            if value:
                grid.add_row(self._text(name), self._text(value))
        (console or self._stdout).print(grid)


SHOWN = (1, 3, 5, 10, 20)
"""Proposals after which the regret is shown."""


def _counted_text(done: int, total: int, seconds_left: float | None) -> str:
    left = f", about {seconds_text(seconds_left)} left" if seconds_left and done < total else ""
    return f"{done} of {total} runs{left}"


def _problem_text(problem: Problem) -> str:
    size = f"{problem.configurations} configurations, " if problem.configurations else ""
    if problem.limits:
        inside = f", {problem.feasible} of them within" if problem.feasible is not None else ""
        size += f"limits {' and '.join(problem.limits)}{inside}, "
    known = problem.best_joules_per_unit
    best = f"best {joules_text(known)}/{problem.unit}" if known is not None else "nobody knows the best"
    default = problem.default_joules_per_unit
    start = f", default {ratio_text(default / known)} of it" if default and known else ""
    broken = ", the default breaks a limit" if problem.kind == "table" and default is None else ""
    noise = f", replayed noise {percent_text(problem.noise_sigma)}" if problem.noise_sigma else ""
    return f"{size}{best}{start}{broken}{noise}"


def _target_headings(target: Target) -> list[str]:
    name = {"within": f"{100 * target.value:g} %", "ratio": f"{target.value:g}x", "absolute": f"{target.value:g} J"}
    return [f"{name[target.kind]}\nshare", "\nmean", "\nmedian"]


def _converged(cells: Sequence[Cell | None]) -> list[str]:
    """Share, restricted mean and median for each target."""
    return [
        text
        for cell in cells
        for text in (
            ("-", "-", "-")
            if cell is None
            else (
                f"{100 * cell.share:.0f} %",
                f"{cell.mean:.1f}",
                f"> {cell.horizon}" if cell.median is None else str(cell.median),
            )
        )
    ]


def _spent(cells: Sequence[Cell | None], shown: Sequence[int], *, talked: bool) -> list[str]:
    """Regrets, failed trials and, where a chat took part, prompts and tokens, of the first target's cell."""
    (cell,) = cells
    assert cell is not None
    regrets = [at.median if (at := cell.regret_at(n)) else None for n in shown]
    tokens = None
    if cell.input_tokens_per_run is not None or cell.output_tokens_per_run is not None:
        tokens = (cell.input_tokens_per_run or 0) + (cell.output_tokens_per_run or 0)
    return [
        *("-" if r is None else percent_text(r) if r < 9.995 else ratio_text(1 + r, 0) for r in regrets),
        f"{cell.failed_per_run + cell.infeasible_per_run:.1f}",
        *([f"{cell.prompts_per_run:.1f}", "-" if tokens is None else f"{tokens:.0f}"] if talked else []),
    ]


def _size_text(table: Recorded) -> str:
    whole = int(table.space.size)
    rows = len(table.rows)
    grid = "a full grid" if rows == whole else f"of {whole} combinations; the others were not measured"
    failed = sum(not row.joules for row in table.rows)
    inside = f"; {len(table.feasible)} within the limits" if table.limits else ""
    return f"{rows} configurations, {grid}{inside}{f'; {failed} failed' if failed else ''}"


def _trial_columns(console: Console) -> list[tuple[int | None, JustifyMethod]]:
    """Widths of the columns that lines about trials share; None takes what is left."""
    wide = console.width >= WIDE
    return [
        (2, "right"),
        (13 if wide else 9, "left"),
        (None, "left"),
        (26 if wide else 16, "left"),
        (18 if wide else 12, "left"),
    ]


_KEYS = (
    ("a", "accept: run it as proposed"),
    ("e NAME=VALUE ...", "edit: change values, then run it"),
    ("r REASON", "reject: another proposal is asked for, and the reason goes into that prompt"),
    ("m TEXT", "remark: goes into the next prompt; this proposal stays"),
    ("f NAME=VALUE", "forbid: this value may not come again in this study"),
    ("b", "batch: run this one and all that follow without asking"),
    ("s", "stop: end the study here; `tune run --resume` goes on with it"),
)


def _decision(action: Action, history: History, proposal: Proposal, remark: str = "") -> Decision:
    return Decision(action=action, before_trial=len(history), proposal=proposal, remark=remark)


def _assignments(space: SearchSpace, line: str) -> Config:
    """`parallel=8 threads=2` (commas do too), each value checked for itself; `Refused` names every fault at once."""
    found: Config = {}
    faults = []
    for part in line.replace(",", " ").split():
        name, equals, value = part.partition("=")
        try:
            if not equals:
                raise Refused(f"{part}: expected NAME=VALUE")
            found[name] = space[name].parse(value)
        except Refused as fault:
            faults.append(str(fault))
    if faults:
        raise Refused("; ".join(faults))
    return found


def _prediction(history: History, proposal: Proposal, usual: Unit) -> str:
    predicted, default = proposal.predicted_joules_per_unit, history.default
    if predicted is None:
        return "none was given"
    beside = (
        f" ({ratio_text(predicted / default.joules_per_unit)} the default)"
        if default and default.joules_per_unit
        else ""
    )
    return f"{joules_text(predicted)}/{unit(default) if default else usual}{beside}"


def _changes(trial: Trial, history: History) -> str:
    first = next((t for t in history.trials if t.segment == trial.segment and t.proposal.source == "default"), None)
    return (
        changes_text(trial.config, first.config, trial.config)
        if first
        else changes_text(trial.config, {}, trial.config)
    )


def _sentence(trial: Trial, history: History) -> str:
    """A trial as one plain line."""
    what = _changes(trial, history) or "the default"
    if trial.joules_per_unit is None:
        return f"trial {trial.number} ({source_text(trial)}): {what}: {failure_text(trial)}"
    known, default = noise(history), history.default
    ratio = against(trial, default, known) if default and trial is not default else None
    beside = ""
    if ratio:
        beside = f", {ratio_text(ratio.ratio)} the default" + (" (within noise)" if ratio.within_noise else "")
    return f"trial {trial.number} ({source_text(trial)}): {what}: {energy_text(trial, known)}{beside}"


def _said_of(history: History) -> Iterator[str]:
    """Failures and doubts, each once with the trials that it is about, in its first wording."""
    trials: dict[str, tuple[str, list[int]]] = {}
    for trial in history.trials:
        for said in [trial.error] if trial.error else doubts_of(trial, history):
            key = re.sub(r"(?<!\w)[\d.]+", "", said)
            trials.setdefault(key, (said, []))[1].append(trial.number)
    for said, numbers in trials.values():
        if len(numbers) == 1:
            yield f"trial {numbers[0]}: {said}"
        else:
            yield f"trials {', '.join(map(str, numbers))}, in the words of trial {numbers[0]}: {said}"


def _best_text(trial: Trial, history: History, space: Sequence[Mapping[str, object]]) -> str:
    """`374 mJ/token ± 2.3 %, 0.69x the default, quality_loss 0.0123 nats/token, trial 3 by rules`."""
    known = noise(history)
    ratio = against(trial, history.default, known) if history.default and trial is not history.default else None
    near = " (within noise)" if ratio and ratio.within_noise else ""
    said = [
        energy_text(trial, known),
        f"{ratio_text(ratio.ratio)} the default{near}" if ratio else "",
        loss_text(space, [trial]),
        "the default" if trial is history.default else f"trial {trial.number} by {source_text(trial)}",
    ]
    return ", ".join(filter(None, said))


def _equal_quality(
    history: History, space: Sequence[Mapping[str, object]], limits: Sequence[str]
) -> list[tuple[str, str]]:
    found = best_at_equal_quality(history, space, limits)
    return [("best at equal quality", _best_text(found, history, space))] if found else []


def _launches(history: History) -> str:
    repeats = sum(len(t.repeats) for t in history.current)
    return f", and {repeats} launched again" if repeats else ""


def _lost_windows(history: History, pairs: Sequence[Pair]) -> str:
    """How many windows did not count, by cause, in the search and its confirmation; empty when all did."""
    launches = launched(history)
    launches += [launch for pair in pairs for launch in (pair.default, pair.best)]
    windows = [m for launch in launches for m in launch.measurements]
    causes = grouped(cause for m in windows for cause in m.invalid)
    said = "; ".join(f"{cause} ({count}x)" if count > 1 else cause for cause, count in causes.most_common(3))
    lost = sum(not m.valid for m in windows)
    return f"{len(windows)} measured, {lost} of them did not count: {said}" if lost else ""


def _count(tokens: int | None) -> str:
    return "?" if tokens is None else f"{tokens:,}".replace(",", " ")
