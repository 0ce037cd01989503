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
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from tuner.chats.paste import END, osc52, pasted
from tuner.checks import doubts as doubts_of
from tuner.journal import End, Study
from tuner.space import Config, Refused, SearchSpace, Value, show
from tuner.summary import (
    against,
    changes_text,
    clean,
    differences,
    effects,
    energy_text,
    joules_text,
    percent_text,
    quality_text,
    ratio_text,
    seconds_text,
    source_text,
    sparkline,
    spread_text,
    unit,
    where_energy_goes,
)
from tuner.trial import Decision, History, Message, Proposal, Trial

REFRESHES_PER_SECOND = 2
"""The view runs beside the measurement: each drawing costs about a millisecond of the same CPU."""

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
    def remedy(self) -> str | None:
        """The command that mends it."""


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


_PLAIN = str.maketrans({"±": "+/-", "×": "x", "µ": "u", "…": "...", "▁": "_", "▂": "_", "▃": ".", "▄": "-", "▅": "-"}) | (
    str.maketrans({"▆": "=", "▇": "=", "█": "#"})
)
"""For terminals and files that are not UTF-8."""


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
        self._live_wanted = (
            self._stderr.is_terminal and not self._stderr.is_dumb_terminal if live is None else live
        )
        self._stdin = stdin
        self._clock = clock
        self._live: Live | None = None
        self._running: _Running | None = None
        self._heading: str | None = None
        """The quality that the trial lines' heading names; None before the heading is printed."""

    # --- words ---

    def say(self, text: str) -> None:
        """A line of progress."""
        self._stderr.print(self._text(text), soft_wrap=not self._stderr.is_terminal)

    def warn(self, text: str) -> None:
        """A line that must not be missed."""
        line = Text("warning: ", style="bold yellow") + self._text(text, "default not bold")
        self._stderr.print(line, soft_wrap=not self._stderr.is_terminal)

    def header(self, rows: Sequence[tuple[str, str]]) -> None:
        """What was taken and from where, before anything runs."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            if value:
                grid.add_row(self._text(name), self._text(value))
        self._stderr.print(grid)

    def messages(self, messages: Sequence[Message]) -> None:
        """A prompt on standard output, exactly as it would be sent, each turn under its role where there are several."""
        for message in messages:
            if len(messages) > 1:
                self._stdout.file.write(f"--- {message.role} ---\n")
            self._stdout.file.write(clean(message.content, lines=True).rstrip("\n") + "\n")
        self._stdout.file.flush()

    def _text(self, text: str, style: str = "", *, lines: bool = False) -> Text:
        """The only way of text onto the screen."""
        safe = clean(text, lines=lines)
        if not self._stderr.encoding.lower().startswith("utf"):
            safe = safe.translate(_PLAIN).encode("ascii", "replace").decode()
        return Text(safe, style=style)

    # --- while it runs ---

    def study_started(
        self, name: str, trials_planned: int | None, threshold: Limit | None, history: History | None = None
    ) -> None:
        """Begin the live view. `history` holds what a resumed study already has."""
        past = history or History()
        self._running = _Running(name, trials_planned, threshold, past, self._clock(), len(past))
        self._running.phase_started = self._clock()
        for trial in past.trials if past.trials else ():
            self._trial_line(trial, past)
        self._start_live()

    def phase(self, trial_number: int, phase: str) -> None:
        """What is happening now. Called often; only a change is news."""
        running = self._running
        if running is None or (running.number, running.phase) == (trial_number, phase):
            return
        # Without a live view, `measuring 2/5` after `measuring 1/5` is no event.
        event = (running.number, running.phase.split()[:1]) != (trial_number, phase.split()[:1])
        running.number, running.phase, running.phase_started = trial_number, phase, self._clock()
        if event and not self._live_wanted:
            self.say(f"trial {trial_number}: {phase}")

    def trial_ended(self, trial: Trial, history: History, doubts: Sequence[str]) -> None:
        """One line for the trial; its failure or its doubts below."""
        if self._running is not None:
            self._running.history = history
            self._running.number, self._running.phase = len(history), "choosing"
            self._running.phase_started = self._clock()
        self._trial_line(trial, history)
        for doubt in doubts:
            self._below(f"trial {trial.number}: " if not self._live_wanted else "", f"! {doubt}", "yellow")

    def confirming(self, pair: int, pairs: int) -> None:
        """The search is over; default and best are measured again."""
        if self._running is not None:
            self._running.phase, self._running.phase_started = f"confirming, pair {pair} of {pairs}", self._clock()
        if not self._live_wanted:
            self.say(f"confirming: pair {pair} of {pairs} (default and best, measured again)")

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
        self._running = None

    def _start_live(self) -> None:
        if self._live_wanted and self._running is not None and self._live is None:
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
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(Rule(style="dim"), *lines)

    def _standing(self, running: _Running) -> Text:
        """Best so far against default and threshold."""
        history = running.history
        best, line = history.best, Text()
        if best is None or best.joules_per_unit is None:
            line.append("best so far  -", "dim")
        else:
            line.append("best so far  ", "dim")
            line.append_text(self._text(f"{joules_text(best.joules_per_unit)}/{unit(best)}", "bold"))
            ratio = against(best, history.default) if history.default else None
            if best is history.default:
                line.append(f" (trial {best.number}, the default)")
            elif ratio:
                noise = ", within noise" if ratio.within_noise else ""
                line.append(f" (trial {best.number}, {ratio_text(ratio.ratio)} the default{noise})")
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
            head = ("#", "proposed by", "changes from the default", f"J/{unit(trial)}{label}", "ratio")
            self._stderr.print(self._row([Text(h, "dim") for h in head]))
        default = history.default
        number, source = self._text(str(trial.number)), self._text(source_text(trial))
        changes = self._text(_changes(trial, history) or "(the default)")
        if trial.joules_per_unit is None:
            self._stderr.print(self._row([number, source, changes, Text("failed", "bold red"), Text()]))
            self._below("", trial.error or "no window counted", "red")
            return
        energy = self._text(f"{joules_text(trial.joules_per_unit)} {spread_text(trial)}", "bold" if trial is history.best else "")
        if quality_text(trial) != self._heading:
            energy.append(f" {quality_text(trial) or 'measured'}")
        self._stderr.print(self._row([number, source, changes, energy, self._ratio(trial, default)]))

    def _ratio(self, trial: Trial, default: Trial | None) -> Text:
        ratio = against(trial, default) if default and trial is not default else None
        if ratio is None:
            return Text()
        if ratio.within_noise:
            return Text(f"{ratio_text(ratio.ratio)} within noise")
        return Text(ratio_text(ratio.ratio), "green" if ratio.ratio < 1 else "")

    def _row(self, cells: Sequence[Text]) -> Table:
        """One line of a table whose columns keep their width from one print to the next."""
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(width=3, justify="right")
        grid.add_column(width=13)
        grid.add_column(ratio=1)
        grid.add_column(width=19)
        grid.add_column(width=18 if self._stderr.width >= WIDE else 6)
        grid.add_row(*cells)
        return grid

    def _below(self, plain_prefix: str, text: str, style: str) -> None:
        if self._live_wanted:
            self._stderr.print(Padding(self._text(text, style), (0, 0, 0, 5)))
        else:
            self.say(plain_prefix + text)
