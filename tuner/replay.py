"""Recorded tables: real measurements that somebody made, looked up in place of running an engine.

A table is a CSV, one row a measurement, and a metadata file of the same name, `.json`: docs/tables.md. A row
is a fact: its figures are never interpolated, and a configuration that was never measured has none. Whatever
is proposed is answered with a measured row, by one rule that is the same for every method (`Replay`).

Limits belong to the problem. A row that breaks one was measured, and its energy is known to whoever analyses
the run; to the method it is a failed trial that says which limit it broke by how much.

Glossary
    row         one configuration, with all repeats of it
    feasible    measured, and within every limit
    ordered     a parameter whose values are numbers, so that a step up or down has a meaning
    twin        the same table under other names (`anonymise`)
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import random
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import msgspec

from tuner.files import find, names
from tuner.limits import Limit, broken
from tuner.runs import Problem, Step
from tuner.space import Choice, Config, Effect, Refused, SearchSpace, Value, closest, excerpt, show
from tuner.trial import Energy, Measurement, Proposal, Trial, Unit, Work

# Version 1: one CSV and one metadata file a table.
FORMAT = 1

FAILED, REPEAT, ERROR = "failed", "repeat", "error"
"""Columns that every table may have: 1 where nothing was measured, the number of the repeat, and why it failed."""

MOST_SIGMA = 1.0
"""Of the replayed ln(joules per unit): beyond it two measurements of one row differ by a factor of 4 as a rule."""

# --- what a table says of itself ---------------------------------------------------------------


class Tunable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One parameter of a table."""

    type: Literal["integer", "number", "category", "boolean"]
    values: tuple[Value, ...]
    """Numbers in ascending order."""
    meaning: str
    effect: Effect = "exact"

    @property
    def ordered(self) -> bool:
        return self.type in ("integer", "number")


class Metadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The metadata file of a table."""

    format: int
    name: str
    parameters: dict[str, Tunable]
    default: dict[str, Value]
    """Step 0 of every method: a measured row."""
    default_note: str
    """Who chose it, and how."""
    objective: str
    """The column that is minimised: joules per unit."""
    unit: Unit
    throughput: str | None = None
    """The column of units per second."""
    seconds_per_unit: str | None = None
    """The column of its inverse, where the source has no throughput."""
    latency: str | None = None
    """The column that a person waits for."""
    metrics: dict[str, str]
    """Every other column of numbers, the three above included: what it is, in which unit."""
    others: dict[str, str] = msgspec.field(default_factory=dict)
    """Columns that are neither tuned nor measured: what follows from the parameters, or never changes."""
    limits: tuple[str, ...]
    """`column<=number` or `column>=number`; all must hold."""
    batch: str | None = None
    """The parameter that says how many requests or items are handled together, where there is one."""
    hardware: str
    model: str
    engine: str
    task: str
    kind: str
    """inference or training."""
    source: str
    revision: str
    licence: str
    trust: str
    """A: energy counters over a steady state; B: average power x time; C: a landscape, not joules."""
    notes: str


_FACTS = ("hardware", "model", "engine", "task", "kind", "source", "revision", "licence", "trust", "notes")
_REQUIRED = tuple(f.encode_name for f in msgspec.structs.fields(Metadata) if f.required)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One configuration that somebody ran."""

    number: int
    """In the order of the file, from 0."""
    config: Config
    joules: tuple[float, ...]
    """Joules per unit of each repeat; empty when all failed."""
    metrics: Mapping[str, float]
    """Mean over the repeats; what the source left out is absent."""
    seconds: float | None
    """Per unit; None when it failed."""
    fault: str | None
    """Why it failed, or which limit it breaks; None for a feasible row."""

    @property
    def joules_per_unit(self) -> float | None:
        """Geometric mean over the repeats; None when all failed."""
        if len(self.joules) < 2:
            return self.joules[0] if self.joules else None
        return math.exp(statistics.fmean(map(math.log, self.joules)))

    @property
    def feasible(self) -> bool:
        return self.fault is None


# --- the table -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Table:
    """A recorded problem. Immutable, and shared by all runs on it."""

    about: Metadata
    rows: tuple[Row, ...]
    limits: tuple[Limit, ...]
    origin: str
    """The name of the table that this one is a twin of, or its own."""
    path: Path | None = None

    @classmethod
    def load(cls, path: Path) -> Table:
        """The table in the CSV at `path`, with the metadata beside it.

        Raises:
            Refused: whatever does not fit: a table is right or it is not used.
        """
        about = _metadata(path)
        try:
            limits = tuple(Limit.parse(text, about.metrics) for text in about.limits)
            rows = _rows(path.read_text(encoding="utf-8"), about, limits)
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"{path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
        except Refused as fault:
            raise Refused(f"{path}: {fault}") from None
        table = cls(about=about, rows=rows, limits=limits, origin=about.name, path=path)
        table._check_rows(path)
        return table

    @classmethod
    def named(cls, name: str) -> Table:
        """The table called `name`, or the one in a CSV file."""
        return cls.load(find("recorded", name))

    @property
    def name(self) -> str:
        return self.about.name

    @property
    def anonymised(self) -> bool:
        return self.origin != self.name

    @cached_property
    def space(self) -> SearchSpace:
        return SearchSpace(
            tuple(
                Choice(
                    name=name,
                    meaning=p.meaning,
                    default=self.about.default[name],
                    effect=p.effect,
                    values=p.values,
                    ordered=p.ordered,
                )
                for name, p in self.about.parameters.items()
            )
        )

    @cached_property
    def feasible(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.feasible)

    @cached_property
    def best(self) -> Row:
        """The feasible row with the least energy; the first of two equals. No method may see it."""
        return min(self.feasible, key=lambda row: row.joules_per_unit or math.inf)

    @property
    def default(self) -> Row:
        row = self.row(self.about.default)
        assert row is not None, "load refuses a default that was not measured"
        return row

    def row(self, config: Mapping[str, Value]) -> Row | None:
        """The row of this very configuration; None when it was never run."""
        return self._by_values.get(tuple(config.get(name) for name in self.about.parameters))

    @cached_property
    def _by_values(self) -> dict[tuple[Value | None, ...], Row]:
        return {tuple(row.config.values()): row for row in self.rows}

    @cached_property
    def _costs(self) -> dict[str, dict[Value, list[int]]]:
        """For each value of each parameter, how far each row is from it.

        In whole numbers, so that equal distances are equal: 1 is `unit`, a multiple of every step.
        """
        steps = {n: max(len(p.values) - 1, 1) for n, p in self.about.parameters.items() if p.ordered}
        unit = math.lcm(*steps.values())
        costs: dict[str, dict[Value, list[int]]] = {}
        for name, p in self.about.parameters.items():
            ranks = [p.values.index(row.config[name]) for row in self.rows]
            if p.ordered:
                step = unit // steps[name]
                costs[name] = {v: [abs(rank - own) * step for rank in ranks] for own, v in enumerate(p.values)}
            else:
                costs[name] = {v: [unit * (rank != own) for rank in ranks] for own, v in enumerate(p.values)}
        return costs

    def nearest(self, config: Mapping[str, Value], among: Iterable[int]) -> Row:
        """The row nearest to `config` among those with the numbers `among`; the lower one of two that are as near.

        The distance is the sum over the parameters: 1 for a category that differs; for an ordered parameter the
        difference of ranks in its list of values, divided by the largest one, so 0 to 1.
        """
        config = self.space.check(config)
        distances = list(map(sum, zip(*(self._costs[name][value] for name, value in config.items()), strict=True)))
        return self.rows[min(among, key=lambda number: (distances[number], number))]

    @cached_property
    def relative_sd(self) -> float | None:
        """Standard deviation of ln(joules per unit) between repeats, pooled over the rows; None without repeats."""
        logs = [[math.log(j) for j in row.joules] for row in self.rows if len(row.joules) > 1]
        squares = sum(statistics.variance(values) * (len(values) - 1) for values in logs)
        degrees = sum(len(values) - 1 for values in logs)
        return math.sqrt(squares / degrees) if degrees else None

    def _check_rows(self, path: Path) -> None:
        try:
            default = self.row(self.space.check(self.about.default))
        except Refused as fault:
            raise Refused(
                f"{path.with_suffix('.json')}: the default is no configuration of the table: {fault}"
            ) from None
        if default is None or not default.joules:
            raise Refused(
                f"{path}: the default ({_told(self.about.default)}) was not measured; choose a measured row in"
                f" {path.with_suffix('.json').name}"
            )
        if not self.feasible:
            raise Refused(f"{path}: no row is within the limits ({', '.join(self.about.limits) or 'all failed'})")


def _told(config: Mapping[str, Value]) -> str:
    return ", ".join(f"{name}={show(value)}" for name, value in config.items())


# --- reading ---------------------------------------------------------------------------------


def _metadata(path: Path) -> Metadata:
    """What the file beside the CSV says, checked for everything that needs no rows."""
    beside = path.with_suffix(".json")
    if path.suffix != ".csv":
        raise Refused(f"{path}: expected a table's CSV file")
    try:
        raw = msgspec.json.decode(beside.read_bytes())
    except FileNotFoundError:
        raise Refused(f"{path}: the metadata is missing: expected {beside.name} beside it (docs/tables.md)") from None
    except OSError as error:
        raise Refused(f"{beside}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise Refused(f"{beside}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise Refused(f"{beside}: expected an object with the table's metadata")
    version = raw.get("format", FORMAT)
    if isinstance(version, int) and version > FORMAT:
        raise Refused(f"{beside}: written in format {version}, this tune reads up to format {FORMAT}; use a newer tune")
    if missing := [name for name in _REQUIRED if name not in raw]:
        raise Refused(f"{beside}: missing: {', '.join(missing)} (docs/tables.md)")
    if raw["unit"] not in UNITS:
        raise Refused(f"{beside}: unit {excerpt(raw['unit'])}: expected {', '.join(UNITS)}")
    try:
        about = msgspec.convert(raw, type=Metadata)
    except msgspec.MsgspecError as error:
        raise Refused(f"{beside}: {error} (docs/tables.md)") from error
    if fault := _fault(about):
        raise Refused(f"{beside}: {fault}")
    return about


UNITS: tuple[Unit, ...] = ("token", "image", "epoch")

_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "category": (str,),
    "boolean": (bool,),
}


def _fault(about: Metadata) -> str | None:
    """The first thing that the metadata says and cannot mean."""
    if not about.parameters:
        return "expected at least one parameter"
    for name, p in about.parameters.items():
        if not p.values or len(set(p.values)) != len(p.values):
            return f"{name}: expected values, each one once"
        # A bool is an int to Python; JSON knows better.
        if not all(isinstance(v, _TYPES[p.type]) and isinstance(v, bool) == (p.type == "boolean") for v in p.values):
            return f"{name}: expected values of type {p.type}, got {excerpt(p.values)}"
        if p.ordered and list(p.values) != sorted(p.values, key=float):
            return f"{name}: expected numbers in ascending order, got {excerpt(p.values)}"
    columns = [*about.parameters, about.objective, *about.metrics, *about.others]
    if twice := sorted({c for c in columns if columns.count(c) > 1}):
        return f"{', '.join(twice)}: described twice; a column is a parameter, the objective, a metric or another"
    if reserved := sorted({FAILED, REPEAT, ERROR} & set(columns)):
        return f"{', '.join(reserved)}: a column of that name has a meaning of its own (docs/tables.md)"
    for role in ("throughput", "seconds_per_unit", "latency"):
        column = getattr(about, role)
        if column is not None and column not in about.metrics:
            return f"{role}={excerpt(column)}: expected one of the metrics"
    if about.throughput is None and about.seconds_per_unit is None:
        return "expected `throughput` or `seconds_per_unit`: the column that says how fast a configuration is"
    if missing := [name for name in about.parameters if name not in about.default]:
        return f"the default has no value for {', '.join(missing)}"
    if about.batch is not None and about.batch not in about.parameters:
        return f"batch={excerpt(about.batch)}: expected one of the parameters"
    return None


def _rows(text: str, about: Metadata, limits: Sequence[Limit]) -> tuple[Row, ...]:
    """The rows of the CSV, repeats brought together."""
    lines = csv.reader(io.StringIO(text.removeprefix("\ufeff")), strict=True)
    try:
        header = next(lines, [])
        _check_header(header, about)
        grouped: dict[tuple[Value, ...], list[_Line]] = {}
        for cells in lines:
            if not cells:
                continue
            line = _line(lines.line_num, header, cells, about, limits)
            others = grouped.setdefault(tuple(line.config.values()), [])
            if same := next((o for o in others if o.repeat == line.repeat), None):
                repeat = f", repeat {line.repeat}" if REPEAT in header else ""
                raise Refused(f"line {line.number}: the same row as line {same.number} ({_told(line.config)}{repeat})")
            others.append(line)
    except csv.Error as error:
        raise Refused(f"line {lines.line_num}: not CSV ({error})") from error
    if not grouped:
        raise Refused("it has no rows")
    return tuple(_row(number, lines_, about, limits) for number, lines_ in enumerate(grouped.values()))


def _check_header(header: Sequence[str], about: Metadata) -> None:
    if twice := sorted({c for c in header if header.count(c) > 1}):
        raise Refused(f"it has two columns called {', '.join(twice)}")
    described = [*about.parameters, about.objective, *about.metrics, *about.others]
    if unknown := [c for c in header if c not in (*described, FAILED, REPEAT, ERROR)]:
        raise Refused(
            f"unknown columns: {', '.join(map(excerpt, unknown))}{closest(unknown[0], described)}"
            " (the metadata describes every column)"
        )
    if missing := [c for c in described if c not in header]:
        raise Refused(f"missing columns: {', '.join(missing)}, which the metadata describes")


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One line of the CSV."""

    number: int
    config: Config
    joules: float | None
    metrics: dict[str, float]
    repeat: int
    error: str | None


def _line(number: int, header: Sequence[str], cells: Sequence[str], about: Metadata, limits: Sequence[Limit]) -> _Line:
    if len(cells) != len(header):
        raise Refused(f"line {number}: expected {len(header)} cells, got {len(cells)}")
    cell = dict(zip(header, cells, strict=True))
    if cell.get(FAILED, "0") not in ("0", "1"):
        raise Refused(f"line {number}: failed={excerpt(cell[FAILED])}: expected 0 or 1")
    if not re.fullmatch(r"[0-9]{1,9}", repeat := cell.get(REPEAT, "0")):
        raise Refused(f"line {number}: repeat={excerpt(repeat)}: expected a whole number from 0")
    failed = cell.get(FAILED) == "1"
    config = {name: _value(number, name, p, cell[name]) for name, p in about.parameters.items()}
    metrics = {name: _number(number, name, cell[name]) for name in about.metrics if cell[name].strip()}
    joules = None
    if not failed:
        joules = _number(number, about.objective, cell[about.objective])
        speeds = [c for c in (about.throughput, about.seconds_per_unit) if c]
        if missing := [c for c in dict.fromkeys([*speeds, *(li.column for li in limits)]) if c not in metrics]:
            raise Refused(f"line {number}: {', '.join(missing)}: empty, in a row that did not fail")
        positive = {about.objective: joules, **{c: metrics[c] for c in speeds}}
        if wrong := next((c for c, figure in positive.items() if figure <= 0), None):
            raise Refused(f"line {number}: {wrong}={show(positive[wrong])}: expected a number above 0")
    return _Line(
        number=number,
        config=config,
        joules=joules,
        metrics=metrics,
        repeat=int(repeat),
        error=(cell.get(ERROR) or "it failed when the table was recorded") if failed else None,
    )


def _value(line: int, name: str, parameter: Tunable, text: str) -> Value:
    """The value of a cell; one of the parameter's list."""
    by_text = {show(v) if isinstance(v, bool) else v: v for v in parameter.values}
    try:
        key: Value = float(text) if parameter.ordered else text
        return by_text[key]
    except (ValueError, KeyError):
        listed = ", ".join(map(show, parameter.values))
        raise Refused(f"line {line}: {name}={excerpt(text)}: expected one of {listed}") from None


def _number(line: int, name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise Refused(f"line {line}: {name}={excerpt(text)}: expected a finite number")
    return number


def _row(number: int, lines: Sequence[_Line], about: Metadata, limits: Sequence[Limit]) -> Row:
    measured = [line for line in lines if line.joules is not None]
    metrics = {
        name: statistics.fmean(known)
        for name in about.metrics
        if (known := [line.metrics[name] for line in measured if name in line.metrics])
    }
    return Row(
        number=number,
        config=lines[0].config,
        joules=tuple(line.joules for line in measured if line.joules is not None),
        metrics=metrics,
        seconds=_seconds(metrics, about) if measured else None,
        fault=broken(limits, metrics) if measured else lines[0].error,
    )


def _seconds(metrics: Mapping[str, float], about: Metadata) -> float:
    if about.throughput is not None:
        return 1 / metrics[about.throughput]
    assert about.seconds_per_unit is not None, "the metadata names one of the two"
    return metrics[about.seconds_per_unit]


# --- replay ----------------------------------------------------------------------------------

QUALITY: Literal["replayed"] = "replayed"
METER = "recorded table"
DOMAIN = "recorded"


def space(table: Table) -> SearchSpace:
    """What may be proposed: every combination of the listed values, measured or not."""
    return table.space


class Replay:
    """Evaluates proposals of one run by looking them up.

    The rule: a proposal is answered with the nearest row (`Table.nearest`) that this run has not had yet; with the
    nearest of all once it has had every row. So a proposal that was measured is answered with its own row. The trial's
    `config` is what was measured; its `proposal` keeps what was asked for. A number that was evaluated before is
    another launch of the same row.

    Noise is a function of the seed, the table, the row and how often the row was measured: methods that are compared
    with one seed meet the same noise in the same row. Limits are judged by the recorded figures, without noise.
    """

    def __init__(self, table: Table, *, noise_sigma: float = 0.0, seed: int = 0, resample: bool = False) -> None:
        """Start a run.

        Args:
            table: the problem.
            noise_sigma: standard deviation of the log-normal factor on every energy; its median is 1.
            seed: of the noise.
            resample: answer with one of the recorded repeats in place of their mean.
        """
        if not 0 <= noise_sigma <= MOST_SIGMA:
            raise Refused(f"noise {noise_sigma:g}: expected a standard deviation from 0 to {MOST_SIGMA:g}")
        if resample and table.relative_sd is None:
            raise Refused(f"{table.name}: it has no repeats to resample; leave it out, or give the noise as a number")
        self.table = table
        self.noise_sigma = noise_sigma
        self.seed = seed
        self.resample = resample
        self._left = dict.fromkeys(range(len(table.rows)))
        self._measured: dict[int, Row] = {}
        self._times: dict[int, int] = {}

    @property
    def left(self) -> int:
        """How many rows this run has not had yet."""
        return len(self._left)

    def __call__(self, number: int, proposal: Proposal) -> Trial:
        row = self._measured.get(number) or self._choose(proposal.config)
        self._measured[number] = row
        self._left.pop(row.number, None)
        times = self._times[row.number] = self._times.get(row.number, 0) + 1
        return Trial(
            number=number,
            config=row.config,
            proposal=proposal,
            measurements=(self._window(row, times),) if row.feasible else (),
            error=row.fault,
        )

    def _choose(self, config: Mapping[str, Value]) -> Row:
        row = self.table.row(config)
        if row is not None and row.number in self._left:
            return row
        return self.table.nearest(config, self._left or range(len(self.table.rows)))

    def _window(self, row: Row, times: int) -> Measurement:
        joules, seconds = row.joules_per_unit, row.seconds
        assert joules is not None
        assert seconds is not None
        if self.noise_sigma or self.resample:
            # A text as seed is hashed by SHA-512: neighbouring seeds give unrelated noise.
            rng = random.Random(f"{self.seed}/{self.table.origin}/{row.number}/{times}")  # noqa: S311  no secret
            base = rng.choice(row.joules) if self.resample else joules
            joules = base * math.exp(rng.gauss(0.0, self.noise_sigma))
        return Measurement(
            work=Work(units=1, unit=self.table.about.unit),
            seconds=seconds,
            energy={DOMAIN: Energy(joules, joules, joules)},
            quality=QUALITY,
            meter=METER,
            metrics={name: row.metrics[name] for name in self._told if name in row.metrics},
        )

    @property
    def _told(self) -> tuple[str, ...]:
        """The metrics that a method hears of beside the energy: those of limits, and what a person waits for."""
        columns = [*(limit.column for limit in self.table.limits), self.table.about.latency]
        return tuple(dict.fromkeys(c for c in columns if c))


def step_of(trial: Trial, table: Table) -> Step:
    """What a run keeps of a replayed trial."""
    row = table.row(trial.config)
    assert row is not None, "a replayed trial has the configuration of a row"
    return Step(
        number=trial.number,
        config=trial.config,
        proposed=None if trial.proposal.config == trial.config else trial.proposal.config,
        joules_per_unit=trial.joules_per_unit,
        true_joules_per_unit=row.joules_per_unit,
        feasible=row.feasible,
        error=trial.error,
        units_per_second=1 / row.seconds if row.seconds else None,
    )


def problem(table: Table, *, noise_sigma: float = 0.0, resample: bool = False) -> Problem:
    """What a comparison says of the table. Its best value is for the analysis; no method may see it."""
    return Problem(
        name=table.name,
        unit=table.about.unit,
        objective=table.about.objective,
        parameters=tuple(table.about.parameters),
        configurations=len(table.rows),
        feasible=len(table.feasible),
        best_joules_per_unit=table.best.joules_per_unit,
        default_joules_per_unit=table.default.joules_per_unit if table.default.feasible else None,
        limits=tuple(map(str, table.limits)),
        noise_sigma=math.hypot(noise_sigma, (table.relative_sd or 0.0) if resample else 0.0),
        anonymised=table.anonymised,
        twin_of=table.origin if table.anonymised else None,
        facts={name: getattr(table.about, name) for name in _FACTS},
    )


# --- the twin --------------------------------------------------------------------------------

UNTOLD = "not told"


def anonymise(table: Table, seed: int) -> Table:
    """The same landscape under names that nothing can be recalled by.

    Table, hardware, model, engine, parameters, columns and categories get neutral labels, categories in a new order;
    numbers of ordered parameters become their ranks, 1 the smallest; the objective and each metric are multiplied by
    a power of two of its own, which is exact. What stays: the order of parameters and rows, ratios of energies,
    which rows are feasible. So a method that looks at positions only does the same on both.
    """
    about = table.about
    # Of the name too: labels of one table must not give away those of another.
    rng = random.Random(f"{seed}/{table.origin}")  # noqa: S311  a twin keeps no secrets
    labels = {name: f"p{n}" for n, name in enumerate(about.parameters, start=1)}
    columns = {name: f"m{n}" for n, name in enumerate(about.metrics, start=1)}
    scales = {name: 2.0 ** rng.choice((-3, -2, -1, 1, 2, 3)) for name in (about.objective, *about.metrics)}
    values: dict[str, dict[Value, Value]] = {}
    for name, p in about.parameters.items():
        order = list(range(len(p.values)))
        if not p.ordered:
            rng.shuffle(order)
        values[name] = {v: rank + 1 if p.ordered else _letters(rank) for v, rank in zip(p.values, order, strict=True)}

    def config(of: Mapping[str, Value]) -> Config:
        return {labels[name]: values[name][value] for name, value in of.items()}

    limits = tuple(
        Limit(column=columns[li.column], most=li.most, bound=li.bound * scales[li.column]) for li in table.limits
    )
    twin = Metadata(
        format=about.format,
        name=f"table-{hashlib.sha256(f'{seed}/{table.origin}'.encode()).hexdigest()[:8]}",
        parameters={
            labels[name]: Tunable(
                type="integer" if p.ordered else "category",
                values=tuple(range(1, len(p.values) + 1)) if p.ordered else tuple(map(_letters, range(len(p.values)))),
                meaning="a quantity with levels in ascending order" if p.ordered else "a choice among kinds",
            )
            for name, p in about.parameters.items()
        },
        default=config(about.default),
        default_note="of the table that this one is a twin of",
        objective="energy",
        unit=about.unit,
        throughput=columns.get(about.throughput or ""),
        seconds_per_unit=columns.get(about.seconds_per_unit or ""),
        latency=columns.get(about.latency or ""),
        metrics=dict.fromkeys(columns.values(), "a metric in a unit of its own"),
        limits=tuple(map(str, limits)),
        batch=labels.get(about.batch or ""),
        hardware=UNTOLD,
        model=UNTOLD,
        engine=UNTOLD,
        task=UNTOLD,
        kind=UNTOLD,
        source=UNTOLD,
        revision=UNTOLD,
        licence=UNTOLD,
        trust=UNTOLD,
        notes=UNTOLD,
    )
    rows = []
    for row in table.rows:
        metrics = {columns[name]: value * scales[name] for name, value in row.metrics.items()}
        rows.append(
            replace(
                row,
                config=config(row.config),
                joules=tuple(j * scales[about.objective] for j in row.joules),
                metrics=metrics,
                seconds=_seconds(metrics, twin) if row.joules else None,
                fault=broken(limits, metrics) if row.joules else "it failed when the table was recorded",
            )
        )
    return Table(about=twin, rows=tuple(rows), limits=limits, origin=table.origin)


def _letters(number: int) -> str:
    """`a` to `z`, then `aa`, `ab`, as columns of a spreadsheet are called."""
    head, tail = divmod(number, 26)
    return (_letters(head - 1) if head else "") + "abcdefghijklmnopqrstuvwxyz"[tail]


# --- what there is ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One line of `tune tables`."""

    name: str
    path: Path
    hardware: str
    model: str
    engine: str
    task: str
    kind: str
    unit: Unit
    parameters: tuple[str, ...]
    configurations: int
    combinations: int
    """Of the listed values; more than `configurations` where the table is not a full grid."""
    feasible: int
    failed: int
    limits: tuple[str, ...]
    relative_sd: float | None
    """Between recorded repeats; None where there are none."""
    trust: str
    source: str
    licence: str


def catalogue() -> list[Summary]:
    """The tables that can be named: those below the current folder, and those that came with tune."""
    return [summary(Table.named(name)) for name in names("recorded")]


def summary(table: Table) -> Summary:
    """What there is to know of a table before it is used."""
    about = table.about
    return Summary(
        name=table.name,
        path=table.path or Path(),
        hardware=about.hardware,
        model=about.model,
        engine=about.engine,
        task=about.task,
        kind=about.kind,
        unit=about.unit,
        parameters=tuple(about.parameters),
        configurations=len(table.rows),
        combinations=int(table.space.size),
        feasible=len(table.feasible),
        failed=sum(not row.joules for row in table.rows),
        limits=tuple(map(str, table.limits)),
        relative_sd=table.relative_sd,
        trust=about.trust,
        source=about.source,
        licence=about.licence,
    )
