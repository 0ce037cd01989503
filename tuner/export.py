"""A study as a table: one row a measurement, one column a fact.

Tidy in Wickham's sense (Journal of Statistical Software 59, 2014): every row can be read alone, and
says from which study, machine and engine it comes. A failed trial is a row without energy and with
its cause. What is missing is empty: never 0, never NaN, never infinity. Floats are written so that
reading them gives the same bits.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tuner.journal import Study
from tuner.repeats import Stretch, drifts
from tuner.space import Refused
from tuner.summary import clean, indistinguishable, interval, noise
from tuner.trial import Energy, History, Idle, Measurement, Noise, Span, Trial

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]  # its stubs are a package of their own

Cell = str | float | int | bool | None

LARGEST_CELL = 2**63 - 1
"""The largest count that a column of pandas' Int64 holds."""

FORMULA_STARTS = ("=", "+", "-", "@")
"""A spreadsheet runs a cell that begins so (OWASP, CSV Injection)."""


def rows(study: Study) -> Iterator[dict[str, Cell]]:
    """One mapping a measurement: the search in the order it happened, then the pairs that confirm and prune.

    A launch without any measurement gives one row. All rows have the same keys. `stage` is `search`,
    `repeat`, `confirm` or `prune`; `role` says what the launch was for: `contender` or `sentinel` of a
    repeat, `default` or `best`, `kept` or `shorter` of a pair. `launch` counts the launches of one
    configuration in its segment, over all stages; `after_trial` is the trial that a repeat came after. `drifted`
    says of a launch of the search whether the machine was seen to change around it (`tuner.repeats.drifts`): False
    also where no configuration ran both before and after it.
    """
    runs = list(_runs(study))
    segments = {run.trial.segment for run in runs}
    windows = [m for run in runs for m in run.trial.measurements]
    parameters = _union(run.trial.config for run in runs)
    effective = _union(run.trial.effective for run in runs)
    domains = _union(m.energy for m in windows)
    counters = _union(m.readings for m in windows)
    spans = _union(m.telemetry.spans for m in windows if m.telemetry)
    metrics = _union([*(m.metrics for m in windows), *(run.trial.figures for run in runs)])
    facts = {segment: _facts(study, segment) for segment in segments}
    idle = {segment: _idle(study, segment) for segment in segments}
    fact_names = _union(facts[run.trial.segment] for run in runs)
    parts = _parts(study.history)
    known = _known(parts)
    stretches = {segment: drifts(part) for segment, part in parts.items()}
    launches: Counter[tuple[int, str]] = Counter()
    for run in runs:
        trial = run.trial
        configuration = (trial.segment, json.dumps(trial.config, sort_keys=True))
        launches[configuration] += 1
        measured: list[tuple[int | None, Measurement | None]] = [*enumerate(trial.measurements, start=1)]
        for number, window in measured or [(None, None)]:
            yield {
                "study": _text(study.header.name),
                "stage": run.stage,
                "role": run.role,
                "pair": run.pair,
                "trial": trial.number,
                "after_trial": run.after_trial,
                "launch": launches[configuration],
                "segment": trial.segment,
                "source": _text(trial.proposal.source),
                "in_place_of": _text(trial.proposal.in_place_of),
                "window": number,
                "valid": window.valid if window else None,
                "invalid_reasons": _text("; ".join(window.invalid)) if window else None,
                **{f"param_{name}": trial.config.get(name) for name in parameters},
                **{f"effective_{name}": trial.effective.get(name) for name in effective},
                **{f"joules_{domain}": _joules(window, domain) for domain in domains},
                **{name: read(window) if window else None for name, read in _OF_WINDOW.items()},
                "joules_dynamic_per_unit": _dynamic(window, idle[trial.segment]),
                **_of_search(known.get((trial.segment, trial.number)) if run.stage in ("search", "repeat") else None),
                "drifted": _drifted(run, stretches.get(trial.segment, ())),
                **_of_counters(window, counters),
                **{name: _metric(window, trial, name) for name in metrics},
                **_of_telemetry(window, spans),
                **_of_idle(idle[trial.segment]),
                **_of_launch(trial),
                **_of_proposal(trial),
                "over_limit": trial.over_limit,
                "reused": trial.reused,
                "load_joules": _number(sum(e.joules for e in trial.load_energy.values()))
                if trial.load_energy
                else None,
                "error": _text(trial.error),
                **{name: facts[trial.segment].get(name) for name in fact_names},
            }


class _Run(NamedTuple):
    stage: str
    trial: Trial
    role: str | None = None
    pair: int | None = None
    after_trial: int | None = None


def _runs(study: Study) -> Iterator[_Run]:
    """Every launch once: a repeat stands after the trial that it followed."""
    history = study.history
    searched = [(done, _Run("search", t)) for done, t in enumerate(history.trials, start=1)]
    again = [(r.after, _Run("repeat", r.trial, r.purpose, after_trial=r.after - 1)) for r in history.repeats]
    yield from (run for _, run in sorted([*searched, *again], key=lambda event: event[0]))  # stable: the trial first
    for pair in study.pairs:
        yield _Run("confirm", pair.default, "default", pair.number)
        yield _Run("confirm", pair.best, "best", pair.number)
    for prune in study.prunes:
        yield _Run("prune", prune.kept, "kept", prune.number)
        yield _Run("prune", prune.shorter, "shorter", prune.number)


def _drifted(run: _Run, stretches: Iterable[Stretch]) -> bool | None:
    """Whether the launch lies between the two that showed a drift; those two lie outside. None of a pair's launch."""
    if run.after_trial is not None:
        return any(s.first <= run.after_trial < s.last for s in stretches)
    return any(s.first <= run.trial.number <= s.last for s in stretches) if run.stage == "search" else None


def frame(study: Study) -> pd.DataFrame:
    """The table of `rows`, with nullable columns: what is missing is `pandas.NA`."""
    return _table(rows(study))


def to_csv(study: Study, destination: Path | str) -> None:
    """Write the table as CSV to a file, or to standard output for `-`.

    Text that came from outside never starts a formula: such a cell gets a `'` in front.

    Raises:
        Refused: the file cannot be written; what was there before is untouched.
    """
    safe = ({name: _no_formula(name, cell) for name, cell in row.items()} for row in rows(study))
    write(destination, _table(safe).to_csv(index=False, lineterminator="\n"))


def to_json(
    study: Study,
    destination: Path | str,
    *,
    saving: Mapping[str, object] | None = None,
    costs: Mapping[str, object] | None = None,
) -> None:
    """Write the table and how it was measured as strict JSON to a file, or to standard output for `-`.

    `{"study": NAME, "meter": SENTENCE, "plan": {...}, "noise": {...} or null, "segments": [...],
    "measurements": [ROW, ...]}`; a forced segment has a meter and a noise of its own. `saving` and `costs` stand
    before the measurements where they are given (`tuner.cost.saving_record` and `record` make them).

    Raises:
        Refused: the file cannot be written; what was there before is untouched.
    """
    header = study.header
    document = {
        "study": _text(header.name),
        "meter": _text(header.meter_sentence),
        "plan": {name: _plain(value) for name, value in asdict(header.plan).items()},
        "noise": _noise(header.noise),
        "segments": [
            {"segment": s.number, "meter": _text(s.meter_sentence), "noise": _noise(s.noise)} for s in study.segments
        ],
        **({} if saving is None else {"saving": saving}),
        **({} if costs is None else {"costs": costs}),
        "measurements": list(rows(study)),
    }
    write(destination, json.dumps(document, allow_nan=False, ensure_ascii=False, indent=1) + "\n")


# --- the cells -------------------------------------------------------------------------------


def _bound(end: Callable[[Energy], float]) -> Callable[[Measurement], Cell]:
    return lambda m: _number(sum(end(e) for e in m.energy.values())) if _counts(m) else None


def _counts(window: Measurement) -> bool:
    return window.valid and bool(window.energy)


_OF_WINDOW: Mapping[str, Callable[[Measurement], Cell]] = {
    "joules": _bound(lambda e: e.joules),
    "joules_low": _bound(lambda e: e.low),
    "joules_high": _bound(lambda e: e.high),
    "units": lambda m: m.work.units,
    "unit": lambda m: m.work.unit,
    "passes": lambda m: m.passes,
    "failed_requests": lambda m: m.work.failed_requests,
    "joules_per_unit": lambda m: _number(m.joules_per_unit),
    "seconds": lambda m: _number(m.seconds),
    "units_per_second": lambda m: _number(m.work.units / m.seconds) if m.seconds > 0 else None,
    "cpu_seconds": lambda m: _number(m.cpu_seconds),
    "other_cpu_seconds": lambda m: _number(m.other_cpu_seconds),
    "peak_memory_bytes": lambda m: m.peak_memory_bytes,
    "prompt_tokens": lambda m: m.work.prompt_tokens,
    "prefill_seconds": lambda m: _number(m.work.prefill_seconds),
    "decode_seconds": lambda m: _number(m.work.decode_seconds),
    "quality": lambda m: m.quality,
    "meter": lambda m: _text(m.meter),
    "window_started_unix": lambda m: _number(m.started_unix),
    "aligned": lambda m: m.aligned,
}


def _metric(window: Measurement | None, trial: Trial, name: str) -> float | None:
    """A figure of the window, or one of its whole launch."""
    return _number((window.metrics if window else {}).get(name, trial.figures.get(name)))


def _joules(window: Measurement | None, domain: str) -> float | None:
    return _number(window.energy[domain].joules) if window and _counts(window) and domain in window.energy else None


def _dynamic(window: Measurement | None, idle: Idle | None) -> float | None:
    """Joules per unit above the idle machine's, a secondary figure: subtracting can turn a ranking round.

    Its label is that of the window (`quality`): None where idle was not measured, or not in the same way. Below 0
    idle drew more than the loaded window did, for instance because something else ran then; it is not cut off at 0.
    """
    if window is None or idle is None or window.joules_per_unit is None or window.quality != idle.quality:
        return None
    return _number((window.joules - idle.machine_watts * window.seconds) / window.work.units)


class _Known(NamedTuple):
    """What the search knew of a configuration at its end."""

    trial: Trial
    interval: tuple[float, float] | None
    near_best: bool


def _parts(history: History) -> dict[int, History]:
    """The history as it stands in each segment: they are not compared."""
    # A calibration holds for the newest segment; earlier ones go by their own repeats.
    return {
        segment: replace(history, segment=segment, noise=history.noise if segment == history.segment else None)
        for segment in {t.segment for t in history.trials}
    }


def _known(parts: Mapping[int, History]) -> dict[tuple[int, int], _Known]:
    """By segment and trial."""
    found: dict[tuple[int, int], _Known] = {}
    for segment, part in parts.items():
        scatter, near = noise(part), indistinguishable(part)
        for trial in part.current:
            found[segment, trial.number] = _Known(trial, interval(trial, scatter), trial.number in near)
    return found


def _of_search(known: _Known | None) -> dict[str, Cell]:
    """The configuration's mean over its launches, the same in all their rows."""
    measured = known is not None and known.trial.joules_per_unit is not None
    return {
        "mean_joules_per_unit": _number(known.trial.joules_per_unit) if known else None,
        "mean_low": _number(known.interval[0]) if known and known.interval else None,
        "mean_high": _number(known.interval[1]) if known and known.interval else None,
        "mean_launches": len(known.trial.launches) if known and measured else None,
        "indistinguishable_from_best": known.near_best if known and measured else None,
    }


def _idle(study: Study, segment: int) -> Idle | None:
    """Idle power on the machine of `segment`; it is measured once, with one of its first trials."""
    launches = [*study.history.trials, *(r.trial for r in study.history.repeats)]
    return next((t.idle for t in launches if t.segment == segment and t.idle), None)


def _of_counters(window: Measurement | None, domains: Iterable[str]) -> dict[str, Cell]:
    """As they were read, also of a window that does not count: its evidence."""
    cells: dict[str, Cell] = {}
    for domain in domains:
        start, end = window.readings.get(domain, (None, None)) if window else (None, None)
        wraps = window.wraps.get(domain, 0) if window and domain in window.readings else None
        cells |= {
            f"counter_start_uj_{domain}": start,
            f"counter_end_uj_{domain}": end,
            f"counter_wraps_{domain}": wraps,
        }
    return cells


def _of_telemetry(window: Measurement | None, spans: Iterable[str]) -> dict[str, Cell]:
    """`throttled` is empty where nothing was reported; then `telemetry_samples` says how often it was asked."""
    known = window.telemetry if window else None
    cells: dict[str, Cell] = {
        "telemetry_samples": known.samples if known else None,
        "throttled": _text("; ".join(known.throttled)) if known else None,
    }
    for name in spans:
        span = known.spans.get(name) if known else None
        cells |= {f"{name}_{end}": _number(read(span)) if span else None for end, read in _OF_SPAN.items()}
    return cells


_OF_SPAN: Mapping[str, Callable[[Span], float]] = {
    "low": lambda s: s.low,
    "mean": lambda s: s.mean,
    "high": lambda s: s.high,
}


def _of_idle(idle: Idle | None) -> dict[str, Cell]:
    return {
        "idle_machine_watts": _number(idle.machine_watts) if idle else None,
        "idle_loaded_watts": _number(idle.loaded_watts) if idle else None,
        "idle_quality": idle.quality if idle else None,
    }


def _of_launch(trial: Trial) -> dict[str, Cell]:
    """What is said once for a launch and repeated in each of its rows: not to be added up over them."""
    spent = trial.spent.values()
    return {
        "trial_seconds": _number(trial.seconds),
        "trial_joules": _number(sum(e.joules for e in spent)) if spent else None,
        "trial_joules_low": _number(sum(e.low for e in spent)) if spent else None,
        "trial_joules_high": _number(sum(e.high for e in spent)) if spent else None,
        "load_seconds": _number(trial.load_seconds),
        "warm_up_seconds": _number(trial.warm_up.seconds) if trial.warm_up else None,
        "warm_up_steady": trial.warm_up.steady if trial.warm_up else None,
        "started_unix": _number(trial.started_unix or None),
    }


def _of_proposal(trial: Trial) -> dict[str, Cell]:
    replies = [e.reply for e in trial.proposal.exchanges]
    read = [r.input_tokens for r in replies if r.input_tokens is not None]
    written = [r.output_tokens for r in replies if r.output_tokens is not None]
    return {
        "predicted_joules_per_unit": _number(trial.proposal.predicted_joules_per_unit),
        "prompts": len(replies),
        "llm_model": _text(replies[-1].model) if replies else None,
        "llm_input_tokens": sum(read) if read else None,
        "llm_output_tokens": sum(written) if written else None,
    }


def _facts(study: Study, segment: int) -> dict[str, Cell]:
    """Machine and engine that the trials of `segment` ran on."""
    place = next((s for s in study.segments if s.number == segment), study.header)
    return {
        f"{kind}_{name}": _text(fact)
        for kind, facts in (("machine", place.machine), ("identity", place.identity))
        for name, fact in facts.items()
    }


def _noise(noise: Noise | None) -> dict[str, object] | None:
    return {name: _plain(value) for name, value in asdict(noise).items()} if noise else None


def _plain(value: object) -> object:
    """A record's value as strict JSON holds it."""
    if isinstance(value, float):
        return _number(value)
    return _text(value) if isinstance(value, str) else value


def _union(parts: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in part))


def _text(value: object) -> str | None:
    """Text on one line that does nothing to a terminal; None where there is none."""
    return None if value is None else clean(str(value)) or None


def _number(value: float | None) -> float | None:
    """A finite number or None: NaN and infinity are not measurements."""
    return value if value is not None and math.isfinite(value) else None


def _no_formula(name: str, cell: Cell) -> Cell:
    """Values of parameters come from the search space, not from outside, and stay what they are."""
    outside = isinstance(cell, str) and not name.startswith(("param_", "effective_"))
    return f"'{cell}" if outside and str(cell).startswith(FORMULA_STARTS) else cell


def _table(records: Iterable[Mapping[str, Cell]]) -> pd.DataFrame:
    import pandas as pd

    table = list(records)
    columns = {name: [row[name] for row in table] for name in (table[0] if table else ())}
    return pd.DataFrame({name: pd.array(cells, dtype=_dtype(cells)) for name, cells in columns.items()})


def _dtype(cells: Sequence[Cell]) -> str:
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds == {bool}:
        return "boolean"
    if kinds == {int} and all(-LARGEST_CELL <= cell <= LARGEST_CELL for cell in cells if isinstance(cell, int)):
        return "Int64"  # nullable, so that a gap does not turn 3 into 3.0
    return "Float64" if kinds == {float} else "object"


# --- the file --------------------------------------------------------------------------------


def write(destination: Path | str, text: str) -> None:
    """The whole text or nothing: a reader never sees half a file."""
    if str(destination) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    path = Path(destination).expanduser()
    try:
        if path.exists() and not path.is_file():
            # A pipe or /dev/stdout: replacing it would put a file in its place.
            path.write_text(text, encoding="utf-8", newline="")
            return
        path = path.resolve()
        draft = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with draft.open("x", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise Refused(
            f"{destination}: cannot be written ({error.strerror}); name another file, or - for standard output"
        ) from error
