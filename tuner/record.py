"""Making a table of one's own machine: a sample of configurations, each one launched several times, written as
`tuner.replay` reads it.

A recording is a study whose proposals are decided beforehand, so it has a study's journal, and with it what a
study promises: every finished launch is on disk before the next one begins, a killed recording goes on where it
stopped, and a launch that failed is a row with a reason. The table is written when the last launch is done; the
journal beside it stays, with the windows that the table's figures are made of.

The order: one launch of every configuration, then the second one of every configuration, and so on; each round in
an order of its own, drawn from the seed. So drift of the machine becomes spread between the repeats of a row, and is
not taken for the effect of a parameter.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import msgspec

from tuner import __version__, machine
from tuner.assemble import PRIVATE, Bench
from tuner.control import PowerControl
from tuner.evaluate import Launcher
from tuner.journal import NAME as JOURNAL
from tuner.journal import Header, Journal, JournalError, Study, lock
from tuner.journal import read as read_journal
from tuner.proposers import open_classical
from tuner.replay import FORMAT, Metadata, Table, Tunable
from tuner.space import Choice, Config, Int, Parameter, Refused, SearchSpace, Value, excerpt, show
from tuner.study import resumed, run_study
from tuner.summary import load_text
from tuner.trial import Decision, History, Proposal, Quality, Trial, Unit

TABLES = Path("results/recorded")
"""Where a table is written, and found by its name."""

STATE = ".recording"
"""Ending of the folder beside a table that holds its journal and logs."""

MOST_CONFIGURATIONS = 10_000
"""In one recording: weeks of measuring, and a slip rather than a wish."""

MOST_REPEATS = 100

TRUST: Mapping[Quality, str] = {
    "measured": "A",
    "sampled": "B",
    "replayed": "C (replayed)",
    "simulated": "C (simulated)",
    "estimated": "C (estimated from CPU time: a landscape, not joules)",
}

UNPUBLISHED = "none given: it is yours; name one here before you pass the table on"


class RecordError(Exception):
    """Nothing can be recorded like this. The message is one sentence."""


# --- what is measured --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Which configurations are measured; the default is always one of them."""

    method: str
    """`grid`, `sobol` or `random`."""
    size: int | None = None
    """How many, the default among them; None for a grid."""

    @classmethod
    def parse(cls, text: str) -> Sample:
        """`grid`, `sobol:64` or `random:64`."""
        match = re.fullmatch(r"(grid)|(sobol|random):([0-9]{1,6})", text.strip())
        if match is None or (match[3] and not 1 <= int(match[3]) <= MOST_CONFIGURATIONS):
            raise Refused(
                f"--sample {excerpt(text)}: expected grid, sobol:N or random:N, with N from 1 to {MOST_CONFIGURATIONS}"
            )
        return cls("grid") if match[1] else cls(match[2], int(match[3]))

    def __str__(self) -> str:
        return self.method if self.size is None else f"{self.method}:{self.size}"

    def draw(self, space: SearchSpace, seed: int) -> list[Config]:
        """The legal configurations of the sample, the default first, each one once."""
        if self.size is None:
            return _grid(space)
        proposer = open_classical(self.method, seed)
        drawn = [space.default()]
        history = History().add(_planned(0, drawn[0]))
        while len(drawn) < self.size and (proposal := proposer.propose(space, history)) is not None:
            history = history.add(_planned(len(drawn), proposal.config))
            drawn.append(proposal.config)
        return drawn


def _planned(number: int, config: Config) -> Trial:
    return Trial(number=number, config=config, proposal=Proposal(config=config, source="sample"), error="planned")


def _grid(space: SearchSpace) -> list[Config]:
    if space.size > MOST_CONFIGURATIONS:
        size = "no end of" if math.isinf(space.size) else f"{space.size:.0f}"
        raise Refused(
            f"--sample grid: this space has {size} configurations, and {MOST_CONFIGURATIONS} are the most;"
            " keep parameters with --pin, narrow them with --range, or take --sample sobol:64"
        )
    every = (
        dict(zip(space.names, values, strict=True)) for values in itertools.product(*map(_values, space.parameters))
    )
    default = space.default()
    return [default, *(config for config in every if config != default and not space.broken(config))]


def _values(parameter: Parameter) -> Sequence[Value]:
    match parameter:
        case Choice():
            return parameter.values
        case Int():
            return range(parameter.low, parameter.high + 1)
        case _:
            return (parameter.default,)


def plan(space: SearchSpace, sample: Sample, repeats: int, seed: int) -> list[tuple[int, Config]]:
    """Every launch in order: the number of its repeat, from 0, and its configuration. The default comes first."""
    if not 1 <= repeats <= MOST_REPEATS:
        raise Refused(f"--repeats {repeats}: expected 1 to {MOST_REPEATS}")
    configs = sample.draw(space, seed)
    launches: list[tuple[int, Config]] = []
    for repeat in range(repeats):
        order = configs[1:] if repeat == 0 else configs[:]
        random.Random(f"{seed}/{repeat}").shuffle(order)  # noqa: S311  an order keeps no secrets
        launches += [(repeat, config) for config in (configs[:1] if repeat == 0 else []) + order]
    return launches


class _Planned:
    """Proposes what was decided beforehand: launch after launch."""

    name = "record"

    def __init__(self, launches: Sequence[tuple[int, Config]]) -> None:
        self.launches = launches

    def propose(self, space: SearchSpace, history: History) -> Proposal | None:
        number = len(history)
        if number >= len(self.launches):
            return None
        repeat, config = self.launches[number]
        source = "default" if number == 0 else self.name
        return Proposal(config=config, source=source, reason=f"repeat {repeat}")


# --- recording ---------------------------------------------------------------------------------


def default_name(workload: str, sample: Sample) -> str:
    """What a table is called when nobody says: `llama-sobol-64`."""
    return f"{Path(workload).stem}-{str(sample).replace(':', '-')}"


def record(
    header: Header,
    bench: Bench,
    *,
    sample: Sample,
    repeats: int,
    name: str,
    tables: Path = TABLES,
    control: PowerControl | None = None,
    say: Callable[[str], None] = lambda _sentence: None,
    report: Callable[[int, str], None] = lambda _number, _phase: None,
    ended: Callable[[Trial, int, int], None] = lambda _trial, _done, _planned: None,
) -> Path:
    """Measure a sample of configurations, or go on with a recording of that name, and write the table.

    Args:
        header: workload, target, pins, ranges and plan, as `tuner.assemble.prepare` returned it.
        bench: the engine and the meters, as `prepare` returned them.
        sample: which configurations.
        repeats: launches of each one.
        name: of the table; the same name goes on with a recording that was cut short.
        tables: the folder that the table is written to; the journal goes into `NAME.recording` there.
        control: held around this call, where power and clock are recorded too.
        say: told how many launches there are to be, and what is kept when it is cut short.
        report: told the number of a launch and its phase, again and again.
        ended: told each launch once it is on disk, with how many are done and planned.

    Returns:
        The table's CSV.

    Raises:
        Refused: the name is taken or illegal, or the recording of that name was made otherwise or elsewhere.
        RecordError: the default cannot be measured, so nothing could be held against it.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise Refused(f"--name {name!r}: expected letters, digits, dots, dashes and underscores, at most 100")
    path = tables / f"{name}.csv"
    if path.exists():
        raise Refused(f"{path}: there is a table of that name; choose another --name")
    launches = plan(bench.space, sample, repeats, header.seed)
    header = replace(
        header,
        name=name,
        proposer=str(sample),
        trials=len(launches),
        plan=replace(header.plan, launches=repeats, sentinel_every=0),
        tune_version=__version__,
        started_unix=time.time(),
    )
    folder = tables / f"{name}{STATE}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder}: {error.strerror}; choose another folder for the table") from error
    with lock(folder), _opened(folder, header) as journal:
        done = len(journal.study.history)
        say(
            f"{len(launches)} launches: {len(launches) // repeats} configurations, {repeats} each"
            + (f"; {done} are done" if done else "")
        )
        launcher = Launcher(
            folder=folder,
            runner=bench.runner_path,
            target=header.target,
            meters=bench.meters.names,
            meter_options=dict(header.meter_options),
            plan=journal.study.header.plan,
            report=report,
            control=control,
        )

        def launch(number: int, proposal: Proposal) -> Trial:
            trial = launcher(number, proposal)
            if number == 0 and trial.joules_per_unit is None:
                # Not written: nothing is lost, and the same command tries it again once its cause is mended.
                raise RecordError(f"the default cannot be measured, and a table starts from it: {trial.error}")
            return trial

        try:
            run_study(
                journal,
                bench.space,
                _Planned(launches),
                launch,
                {},
                lambda trial, history: ended(trial, len(history), len(launches)),
            )
        except JournalError as error:
            raise JournalError(str(error).split("; ")[0] + f"; {_kept(journal, launches)}") from error
        except BaseException as leaving:
            if not isinstance(leaving, Exception):
                # A stop that was asked for says nothing against the configuration that it cut short.
                done = len(journal.study.history)
                journal.append(Decision(action="stop", before_trial=done, remark="interrupted"))
                say(f"stopped; {done} of {len(launches)} launches are kept. Give the same command again to go on")
            raise
        return write(journal.study, bench.space, launches, tables)


def _kept(journal: Journal, launches: Sequence[object]) -> str:
    return (
        f"{len(journal.study.history)} of {len(launches)} launches are kept in {journal.folder}."
        " Mend that, then give the same command again"
    )


def _opened(folder: Path, header: Header) -> Journal:
    """The journal of this recording: a new one, or the one that was cut short."""
    if not (folder / JOURNAL).exists():
        return Journal.create(folder, header)
    before = read_journal(folder).header
    if unlike := differences(before, header):
        raise Refused(
            f"{folder}: a recording of that name was begun otherwise: {'; '.join(unlike)}. Go on as it was begun,"
            " or choose another --name"
        )
    journal = Journal.resume(folder)
    try:
        resumed(journal)
    except BaseException:
        journal.close()
        raise
    return journal


_OF_EACH_RUN = (
    "name",
    "trials",
    "machine",
    "identity",
    "space",
    "noise",
    "meter_sentence",
    "tune_version",
    "started_unix",
)
"""Fields of a header that are compared in their own way, or may differ."""


def differences(before: Header, now: Header) -> list[str]:
    """What keeps the launches of two recordings from standing in one table; empty when nothing does."""
    unlike = [
        f"{field.name}: then {_said(getattr(before, field.name))}, now {_said(getattr(now, field.name))}"
        for field in fields(Header)
        if field.name not in _OF_EACH_RUN and _plain(getattr(before, field.name)) != _plain(getattr(now, field.name))
    ]
    unlike += machine.differences(before.machine, now.machine)
    unlike += machine.differences(before.identity, now.identity, sorted({*before.identity, *now.identity}))
    if _plain(before.space) != _plain(now.space):
        unlike.append("search space: the runner offers other parameters or ranges than it did")
    return unlike


def _plain(value: object) -> object:
    """As the journal keeps it, where a tuple is a list."""
    return msgspec.to_builtins(value)


def _said(value: object) -> str:
    return excerpt(_plain(value), limit=200)


# --- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """What the columns are called: by unit, as the shipped tables call theirs."""

    unit: Unit

    @property
    def objective(self) -> str:
        return f"energy_per_{self.unit}_j"

    @property
    def throughput(self) -> str:
        return f"throughput_{self.unit}s_per_sec"

    def metrics(self) -> dict[str, str]:
        return {
            self.throughput: f"output {self.unit}s per second, over the windows of the launch",
            "window_relative_sd": "standard deviation between the windows of the launch over their mean",
            f"energy_per_{self.unit}_low_j": "least that an estimate's range allows, J; the objective for a counter",
            f"energy_per_{self.unit}_high_j": "most that an estimate's range allows, J; the objective for a counter",
            "median_request_s": "wall time of a request, median, s",
            "load_s": "time from the start of the engine until it is loaded, s",
            "peak_memory_bytes": "largest resident set of the engine",
        }


def write(study: Study, space: SearchSpace, launches: Sequence[tuple[int, Config]], tables: Path) -> Path:
    """The table of a finished recording. It appears whole or not at all, and is read back before it is called one."""
    trials = study.history.trials
    unit: Unit = next((m.work.unit for t in trials for m in t.valid), study.header.unit)
    columns = _Names(unit)
    tuned = [p for p in space.parameters if p.size > 1]
    names = [p.name for p in tuned]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*names, columns.objective, *columns.metrics(), "launch", "repeat", "failed", "error"])
    rows = sorted(zip(trials, launches, strict=True), key=lambda pair: (_first(launches, pair[1][1]), pair[1][0]))
    for trial, (repeat, config) in rows:
        figures = _figures(trial, columns)
        cells = [show(v) if isinstance(v := config[n], bool) else v for n in names]
        error = None if figures else trial.error or "the meter counted no energy"
        measured = [figures.get(c, "") for c in (columns.objective, *columns.metrics())]
        lines.writerow([*cells, *measured, trial.number, repeat, int(error is not None), error or ""])
    path = tables / f"{study.header.name}.csv"
    beside = path.with_suffix(".json")
    about = _about(study, space, launches, columns)
    try:
        _replace(beside, json.dumps(msgspec.to_builtins(about), indent=2, ensure_ascii=False) + "\n")
        _replace(path, text.getvalue())
    except OSError as error:
        raise RecordError(
            f"{path}: {error.strerror}; every launch is kept: mend that, then give the same command again"
        ) from error
    Table.load(path)
    return path


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _first(launches: Sequence[tuple[int, Config]], config: Config) -> int:
    return next(n for n, (_, other) in enumerate(launches) if other == config)


def _figures(trial: Trial, columns: _Names) -> dict[str, float | int]:
    """What one launch measured, by column; empty when it failed."""
    joules, bounds = trial.launch_joules_per_unit, trial.joules_per_unit_bounds
    if not joules or bounds is None:
        return {}
    requests = [s for m in trial.valid for s in m.work.request_seconds]
    memory = [m.peak_memory_bytes for m in trial.valid if m.peak_memory_bytes is not None]
    known = {
        columns.objective: joules,
        columns.throughput: trial.units_per_second,
        "window_relative_sd": trial.relative_sd,
        f"energy_per_{columns.unit}_low_j": bounds[0],
        f"energy_per_{columns.unit}_high_j": bounds[1],
        "median_request_s": statistics.median(requests) if requests else None,
        "load_s": trial.load_seconds,
        "peak_memory_bytes": max(memory, default=None),
    }
    return {name: value for name, value in known.items() if value is not None}


def _about(study: Study, space: SearchSpace, launches: Sequence[tuple[int, Config]], columns: _Names) -> Metadata:
    header = study.header
    facts = {key: value for key, value in header.machine.items() if key not in PRIVATE}
    boards = [value for key, value in facts.items() if re.fullmatch(r"gpu\d+|gpus", key)]
    load = header.target
    quality = max((q for t in study.history.trials if (q := t.quality)), key=list(TRUST).index)
    fixed = {p.name: p.default for p in space.parameters if p.size == 1}
    notes = [
        header.meter_sentence.rstrip("."),
        f"load: {load_text(load, columns.unit)}",
        f"{header.plan.launches} launches of each configuration, in fresh processes",
        *([f"fixed: {', '.join(f'{n}={show(v)}' for n, v in fixed.items())}"] if fixed else []),
        "machine: " + ", ".join(f"{key} {value}" for key, value in facts.items()),
    ]
    return Metadata(
        format=FORMAT,
        name=header.name,
        parameters={
            p.name: _tunable(p, [config[p.name] for _, config in launches]) for p in space.parameters if p.size > 1
        },
        default={p.name: _cell(p, p.default) for p in space.parameters if p.size > 1},
        default_note="the engine's own setting, with --pin and --range applied",
        objective=columns.objective,
        unit=columns.unit,
        throughput=columns.throughput,
        metrics=columns.metrics(),
        others={"launch": "the order in which it was measured, from 0"},
        limits=(),
        hardware=" + ".join([*boards, facts.get("cpu", "")]).strip(" +") or "unknown",
        model=header.identity.get("model", ""),
        engine=" ".join(filter(None, (header.identity.get("engine"), header.identity.get("engine_version")))),
        task=f"{load.prompt_tokens} prompt and {load.output_tokens} output tokens"
        if columns.unit == "token"
        else load_text(load, columns.unit),
        kind="inference",
        source=f"tune {__version__} record --sample {header.proposer}",
        revision=time.strftime("%Y-%m-%d", time.gmtime(header.started_unix)),
        licence=UNPUBLISHED,
        trust=TRUST[quality],
        notes="; ".join(notes),
    )


def _kind(parameter: Parameter) -> Literal["integer", "number", "category", "boolean"]:
    """How a table keeps it. Numbers among words, as in `auto, 4, 8`, are words."""
    if isinstance(parameter, Choice):
        kinds = {type(value) for value in parameter.values}
        if kinds == {bool}:
            return "boolean"
        if not kinds <= {int, float}:
            return "category"
        return "integer" if kinds == {int} else "number"
    return "integer" if isinstance(parameter, Int) else "number"


def _cell(parameter: Parameter, value: Value) -> Value:
    return show(value) if _kind(parameter) == "category" else value


def _tunable(parameter: Parameter, launched: Sequence[Value]) -> Tunable:
    """The parameter with the values that were launched, in their natural order."""
    kind = _kind(parameter)
    own = parameter.values if isinstance(parameter, Choice) else sorted(set(launched), key=float)
    values = [_cell(parameter, value) for value in own if value in launched]
    return Tunable(
        type=kind,
        values=tuple(sorted(values, key=float) if kind in ("integer", "number") else values),
        meaning=parameter.meaning,
        effect=parameter.effect,
    )
