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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tuner.journal import Study
from tuner.space import Refused
from tuner.summary import clean
from tuner.trial import Energy, Measurement, Trial

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]  # its stubs are a package of their own

Cell = str | float | int | bool | None

FORMULA_STARTS = ("=", "+", "-", "@")
"""A spreadsheet runs a cell that begins so (OWASP, CSV Injection)."""


def rows(study: Study) -> Iterator[dict[str, Cell]]:
    """One mapping a measurement: the search in the order it happened, then the pairs that confirm it.

    A trial without any measurement gives one row. All rows have the same keys.
    """
    runs = [_Run("search", None, t) for t in study.history.trials]
    runs += [_Run("confirm", p.number, t) for p in study.pairs for t in (p.default, p.best)]
    parameters = _union(run.trial.config for run in runs)
    effective = _union(run.trial.effective for run in runs)
    domains = _union(m.energy for run in runs for m in run.trial.measurements)
    facts = {segment: _facts(study, segment) for segment in {run.trial.segment for run in runs}}
    fact_names = _union(facts[run.trial.segment] for run in runs)
    for stage, pair, trial in runs:
        windows: list[tuple[int | None, Measurement | None]] = [*enumerate(trial.measurements, start=1)]
        for number, window in windows or [(None, None)]:
            yield {
                "study": _text(study.header.name),
                "stage": stage,
                "pair": pair,
                "trial": trial.number,
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
                "trial_seconds": _number(trial.seconds),
                "load_seconds": _number(trial.load_seconds),
                "started_unix": _number(trial.started_unix or None),
                **_of_proposal(trial),
                "error": _text(trial.error),
                **{name: facts[trial.segment].get(name) for name in fact_names},
            }


class _Run(NamedTuple):
    stage: str
    pair: int | None
    trial: Trial


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
    _write(destination, _table(safe).to_csv(index=False, lineterminator="\n"))


def to_json(study: Study, destination: Path | str) -> None:
    """Write `{"study": NAME, "measurements": [ROW, ...]}` as strict JSON to a file, or to standard output for `-`.

    Raises:
        Refused: the file cannot be written; what was there before is untouched.
    """
    document = {"study": _text(study.header.name), "measurements": list(rows(study))}
    _write(destination, json.dumps(document, allow_nan=False, ensure_ascii=False, indent=1) + "\n")


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
    "joules_per_unit": lambda m: _number(m.joules_per_unit),
    "seconds": lambda m: _number(m.seconds),
    "units_per_second": lambda m: _number(m.work.units / m.seconds) if m.seconds > 0 else None,
    "cpu_seconds": lambda m: _number(m.cpu_seconds),
    "peak_memory_bytes": lambda m: m.peak_memory_bytes,
    "prompt_tokens": lambda m: m.work.prompt_tokens,
    "prefill_seconds": lambda m: _number(m.work.prefill_seconds),
    "decode_seconds": lambda m: _number(m.work.decode_seconds),
    "quality": lambda m: m.quality,
    "meter": lambda m: _text(m.meter),
}


def _joules(window: Measurement | None, domain: str) -> float | None:
    return _number(window.energy[domain].joules) if window and _counts(window) and domain in window.energy else None


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
    if kinds == {int}:
        return "Int64"  # nullable, so that a gap does not turn 3 into 3.0
    return "Float64" if kinds == {float} else "object"


# --- the file --------------------------------------------------------------------------------


def _write(destination: Path | str, text: str) -> None:
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
