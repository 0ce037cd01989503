"""What energy means in money and carbon, what the tuning itself cost, and when it pays back.

Pure functions of a study and of what a person said: there is no default price and no default carbon
intensity, and without them there is energy only. A saving comes from the fresh pairs of a confirmation
alone; without one there is none, and then no sum a year either. What is not known is None and said. Every
energy has the 95 % interval of its launches, and so has all that is computed from it.

    kWh = joules x PUE / 3.6e6    cost = kWh x price    gCO2e = kWh x intensity

so that one joule a token is 0.278 kWh per million tokens at a PUE of 1.

Glossary
    PUE         energy of the whole facility over energy of its computers (ISO/IEC 30134-2)
    intensity   grams of CO2 equivalent emitted for each kWh; the E x I of the Software Carbon Intensity
                (ISO/IEC 21031). Its M, what making the hardware emitted, is not in any figure here
    load        units a day, all served with the setting and under the load that was measured
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Self

from tuner.confirm import Saving, interval_text, pairs_of, verdict
from tuner.intervals import paired_interval
from tuner.journal import Study
from tuner.space import Refused, excerpt
from tuner.summary import exchanges, interval, joules_text, noise, percent_text, unit, usage
from tuner.trial import QUALITIES, Energy, History, Quality, Trial, Unit

JOULES_PER_KWH = 3.6e6
MILLION = 1e6
DAYS_PER_YEAR = 365

MOST_GRAMS_PER_KWH = 5000.0
"""Several times what burning lignite or diesel emits (about 1000 g/kWh): beyond it, g and kg were mixed up."""

NOT_COUNTED = (
    "making the hardware (embodied emissions); the LLM provider's energy; this machine between launches: cooling down,"
    " starting workers, waiting for the LLM or for a person; calibration; launches that a crash cut short"
)


# --- what a person says ----------------------------------------------------------------------

_NUMBER = r"(?P<number>[0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})"
_PER_KWH = r"\s*/\s*(?P<per>[kK][wW][hH]|MWh)"


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """Prices and rates, as a person gave them; None where nothing was said."""

    price_per_kwh: float | None = None
    currency: str = ""
    """Three letters or a sign; empty where none was named."""
    grams_per_kwh: float | None = None
    """Carbon intensity of the electricity, gCO2e."""
    pue: float = 1.0
    units_per_day: float | None = None
    """Output tokens (or images) a day."""
    llm_prices: tuple[float, float] | None = None
    """Of a million input and of a million output tokens of the proposing LLM, in `currency`."""

    @classmethod
    def parse(
        cls,
        *,
        price: str | None = None,
        carbon: str | None = None,
        pue: str | None = None,
        tokens_per_day: str | None = None,
        llm_price: str | None = None,
    ) -> Self:
        """From the command line.

        Args:
            price: `0.25/kWh`, `0.25EUR/kWh`, `$250/MWh`. Parts of a currency (ct) are refused: which one is a guess.
            carbon: `380g/kWh` or `0.38kg/kWh`.
            pue: at least 1.
            tokens_per_day: `50M`, also k, B (or G) and T; images for a workload that makes images.
            llm_price: `2.5,10/M`, input and output.

        Raises:
            Refused: naming the option, what was typed and what was expected.
        """
        amount, currency = _price(price) if price is not None else (None, "")
        return cls(
            price_per_kwh=amount,
            currency=currency,
            grams_per_kwh=_carbon(carbon) if carbon is not None else None,
            pue=_pue(pue) if pue is not None else 1.0,
            units_per_day=_load(tokens_per_day) if tokens_per_day is not None else None,
            llm_prices=_llm_price(llm_price) if llm_price is not None else None,
        )


def _price(text: str) -> tuple[float, str]:
    sign, letters = r"[$€£¥]", r"[A-Z]{3}"
    found = re.fullmatch(
        rf"\s*(?P<before>{sign}|{letters})?\s*{_NUMBER}\s*(?P<after>{sign}|{letters})?{_PER_KWH}\s*", text
    )
    if not found or (found["before"] and found["after"]):
        raise Refused(
            f"--price {excerpt(text)}: expected an amount per kWh or MWh in whole units of a currency,"
            " such as 0.25/kWh, 0.25EUR/kWh, $0.25/kWh or 250/MWh"
        )
    scale = 1000.0 if found["per"] == "MWh" else 1.0
    return float(found["number"]) / scale, found["before"] or found["after"] or ""


def _carbon(text: str) -> float:
    found = re.fullmatch(rf"\s*{_NUMBER}\s*(?P<mass>g|kg){_PER_KWH}\s*", text)
    if not found:
        raise Refused(f"--carbon {excerpt(text)}: expected grams of CO2e per kWh, such as 380g/kWh or 0.38kg/kWh")
    grams = float(found["number"]) * (1000.0 if found["mass"] == "kg" else 1.0)
    grams /= 1000.0 if found["per"] == "MWh" else 1.0
    if grams > MOST_GRAMS_PER_KWH:
        raise Refused(
            f"--carbon {excerpt(text)}: expected at most {MOST_GRAMS_PER_KWH:.0f} g/kWh, no power station emits more;"
            " grams are written 380g/kWh"
        )
    return grams


def _pue(text: str) -> float:
    found = re.fullmatch(rf"\s*{_NUMBER}\s*", text)
    if not found or float(found["number"]) < 1:
        raise Refused(
            f"--pue {excerpt(text)}: expected a number of at least 1, such as 1.2;"
            " it is the facility's energy over its computers'"
        )
    return float(found["number"])


def _load(text: str) -> float:
    scale = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
    found = re.fullmatch(rf"\s*{_NUMBER}\s*(?P<times>[kKMBGT]?)\s*", text)
    units = float(found["number"]) * scale[found["times"]] if found else 0.0
    if units <= 0:
        raise Refused(
            f"--tokens-per-day {excerpt(text)}: expected a number above 0, such as 50M;"
            " k, M, B (or G) and T are thousands, millions and so on"
        )
    return units


def _llm_price(text: str) -> tuple[float, float]:
    output = _NUMBER.replace("number", "output")
    found = re.fullmatch(rf"\s*{_NUMBER}\s*,\s*{output}\s*/\s*M\s*", text)
    if not found:
        raise Refused(
            f"--llm-price {excerpt(text)}: expected the prices of a million input and a million output tokens,"
            " in the currency of --price, such as 2.5,10/M"
        )
    return float(found["number"]), float(found["output"])


# --- what it comes to ------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A figure and how far it may be off; all three are equal where that is not known."""

    value: float
    low: float
    high: float

    def __mul__(self, factor: float) -> Interval:
        return Interval(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Amount:
    """Energy at the facility, PUE included, with what it costs and emits."""

    kwh: Interval
    cost: Interval | None
    """In the currency of the price; None without a price."""
    grams: Interval | None
    """gCO2e; None without an intensity."""

    @classmethod
    def of(cls, joules: Interval, options: CostOptions) -> Amount:
        """What `joules` at the meter come to."""
        kwh = joules * (options.pue / JOULES_PER_KWH)
        price, grams = options.price_per_kwh, options.grams_per_kwh
        return cls(kwh, None if price is None else kwh * price, None if grams is None else kwh * grams)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What one configuration uses."""

    trial: int
    joules_per_unit: Interval
    """As measured: without PUE. `ends` says what its ends are."""
    ends: str | None
    """`95 % CI`, with or without what the meter adds to it; None where it has no range."""
    sampling: Interval | None
    """The 95 % interval of the launches' geometric mean alone; None where they are too few for one."""
    noise_assumed: bool
    """Whether `sampling` rests on noise that nobody measured."""
    quality: Quality
    launches: int
    fresh_pairs: int
    """The pairs whose runs it is the geometric mean of; 0 where it is the search's own figure."""
    per_million: Amount
    per_year: Amount | None
    """None where the load is not known."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The energy that a confirmed saving keeps: the default's times the share saved, from end to end of both.

    Half-widths add up so, which two errors never exceed whatever their correlation: to first order the ends
    hold at least 95 %. Where the energy is an estimate, they span the default's power range too.
    """

    joules_per_unit: Interval
    quality: Quality
    per_million: Amount
    per_year: Amount | None


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The energy of all launches of a study: search, repeats, confirmation, pruning; also of those that failed."""

    launches: int
    counted: int
    """Launches whose energy is known: the others are missing from `joules`."""
    joules: Interval | None
    """None where no launch's energy is known."""
    amount: Amount | None
    quality: Quality | None
    """The worst among all windows; None where no launch had one."""


@dataclass(frozen=True, kw_only=True)
class LlmUse:
    """What the proposing LLM was asked for. Its provider's energy is not known and nowhere counted."""

    prompts: int
    uncounted: int
    """Prompts whose answer came without a count of tokens: they are missing from the counts and the cost."""
    input_tokens: int | None
    output_tokens: int | None
    cost: float | None
    """None without prices, and where no prompt was counted; 0 where no LLM took part."""


@dataclass(frozen=True)
class Payback:
    """How much must be served with the best setting until it has saved what finding it cost."""

    units: Interval
    days: Interval | None
    """None where the load is not known."""


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """Money and carbon of a study; None stands for what is not known or not shown."""

    study: str
    unit: Unit
    options: CostOptions
    default: Figure | None
    best: Figure | None
    """Of the configuration that was confirmed; the search's best where nothing was; None where that is the default."""
    pairs: int
    """Fresh pairs that are done, of `planned`."""
    planned: int
    saving: Saving | None
    """What all the planned pairs showed; None before they are done."""
    saved: Saved | None
    """None where no saving is shown."""
    tuning: Tuning
    llm: LlmUse
    payback: Payback | None
    """In energy; None where no saving is shown or the tuning's energy is not known."""
    payback_money: Payback | None
    """With the LLM's price on top; None where that price or that of energy is not known, or nothing."""
    domains: tuple[str, ...]
    """The counters that the energy was read from."""
    wall: bool
    """Whether a wall meter is among them."""

    @property
    def confirmed(self) -> bool:
        """Whether the planned pairs are all done."""
        return 0 < self.planned <= self.pairs


def assess(study: Study, saving: Saving | None, options: CostOptions) -> Assessment:
    """What the study's energies come to.

    `saving` is what its newest plan of fresh pairs shows, by `tuner.confirm`. It counts only when all
    pairs of that plan are done, and only where its whole interval is below the default.
    """
    history = study.history
    plan = study.pairs[-1] if study.pairs else None
    done = pairs_of(study, plan.config, plan.planned) if plan else []
    planned = plan.planned if plan else 0
    sides = [(p.default, p.best) for p in done if p.default.joules_per_unit and p.best.joules_per_unit]
    default = _fresh([d for d, _ in sides], options) or _searched(history.default, history, options)
    best = _fresh([b for _, b in sides], options)
    if best is None and history.best and not (history.default and history.best.config == history.default.config):
        best = _searched(history.best, history, options)
    found = saving if sides and len(done) >= planned else None
    launches = _launches(study)
    tuning, llm = _tuning(launches, options), _llm_use(study, options)
    saved = after = after_money = None
    if found and default and (share := _share(found)):
        saved = _saved(default, share, found.quality, options)
        if tuning.joules is not None:
            after = _units_until(tuning.joules.value, default, share)
            after_money = _money_payback(after, llm, saved, options)
    windows = [m for t in launches if t.segment == study.segment for m in t.measurements]
    return Assessment(
        study=str(study.folder),
        unit=next((unit(t) for t in launches if t.measurements), study.header.unit),
        options=options,
        default=default,
        best=best,
        pairs=len(done),
        planned=planned,
        saving=found,
        saved=saved,
        tuning=tuning,
        llm=llm,
        payback=_payback(after, options),
        payback_money=_payback(after_money, options),
        domains=tuple(dict.fromkeys(name for m in windows for name in m.energy)),
        wall=any("wall" in m.meter.split("+") for m in windows),
    )


def _fresh(runs: Sequence[Trial], options: CostOptions) -> Figure | None:
    """Geometric means over fresh runs of one configuration; None where there is none.

    The interval is that of the centre of the runs' logarithms (`tuner.intervals.paired_interval`), taken as
    independent: of one side alone it holds the drift that pairs cancel, and is wider than the saving's.
    """
    if not runs:
        return None
    bounds = [t.joules_per_unit_bounds or (0.0, 0.0) for t in runs]
    joules = Interval(
        _mean(t.joules_per_unit or 0.0 for t in runs),
        _mean(low for low, _ in bounds),
        _mean(high for _, high in bounds),
    )
    ends = paired_interval([math.log(value) for t in runs if (value := t.joules_per_unit)])
    return _figure(
        runs[0].number,
        joules,
        ends and (math.exp(ends[0]), math.exp(ends[1])),
        max((q for t in runs if (q := t.quality)), key=QUALITIES.index),
        options,
        launches=len(runs),
        fresh_pairs=len(runs),
    )


def _searched(trial: Trial | None, history: History, options: CostOptions) -> Figure | None:
    """The search's own figure of a trial, with the interval that the search gives it (`tuner.summary.interval`)."""
    if trial is None or trial.joules_per_unit is None or trial.joules_per_unit_bounds is None or trial.quality is None:
        return None
    known = noise(history)
    return _figure(
        trial.number,
        Interval(trial.joules_per_unit, *trial.joules_per_unit_bounds),
        interval(trial, known),
        trial.quality,
        options,
        launches=len(trial.launches),
        noise_assumed=not known.degrees,
    )


def _figure(
    trial: int,
    own: Interval,
    ends: tuple[float, float] | None,
    quality: Quality,
    options: CostOptions,
    *,
    launches: int,
    fresh_pairs: int = 0,
    noise_assumed: bool = False,
) -> Figure:
    """`own` is the figure with the meter's own range, `ends` those of its 95 % interval."""
    # Rounding may put the mean of equal runs a bit outside their interval.
    sampling = ends and Interval(own.value, min(ends[0], own.value), max(ends[1], own.value))
    joules, meaning = _together(own, sampling, quality)
    return Figure(
        trial=trial,
        joules_per_unit=joules,
        ends=meaning,
        sampling=sampling,
        noise_assumed=noise_assumed and sampling is not None,
        quality=quality,
        launches=launches,
        fresh_pairs=fresh_pairs,
        per_million=Amount.of(joules * MILLION, options),
        per_year=_per_year(joules, options),
    )


def _together(own: Interval, sampling: Interval | None, quality: Quality) -> tuple[Interval, str | None]:
    """The figure with all that it may be off by, and what its ends then are.

    An estimate's power range is wide and the same for all its launches: the wider end counts. A counter's steps
    are met by each launch alike, so that they come on top of the interval, as in `tuner.confirm`.
    """
    name = "power range" if quality == "estimated" else "the counter's steps"
    ranged = own.low < own.high
    if sampling is None:
        return own, name if ranged else None
    if not ranged:
        return sampling, "95 % CI"
    if quality == "estimated":
        widest = Interval(own.value, min(own.low, sampling.low), max(own.high, sampling.high))
        return widest, f"the wider of 95 % CI and {name}"
    low = max(sampling.low - (own.value - own.low), 0.0)
    return Interval(own.value, low, sampling.high + (own.high - own.value)), f"95 % CI and {name}"


def _per_year(joules_per_unit: Interval, options: CostOptions) -> Amount | None:
    if options.units_per_day is None:
        return None
    return Amount.of(joules_per_unit * (options.units_per_day * DAYS_PER_YEAR), options)


def _share(found: Saving) -> Interval | None:
    """The share of the default's energy that is saved; None unless the whole interval lies below the default."""
    if not found.shown or found.low is None or found.high is None:
        return None
    return Interval(1 - found.ratio, 1 - found.high, 1 - found.low)


def _saved(default: Figure, share: Interval, quality: Quality, options: CostOptions) -> Saved:
    """The default's energy times the share, from end to end of both."""
    joules = default.joules_per_unit
    kept = Interval(joules.value * share.value, joules.low * share.low, joules.high * share.high)
    return Saved(
        joules_per_unit=kept,
        quality=quality,
        per_million=Amount.of(kept * MILLION, options),
        per_year=_per_year(kept, options),
    )


def _launches(study: Study) -> list[Trial]:
    """Every launch of the study once, in all segments."""
    history = study.history
    return [
        *history.trials,
        *(r.trial for r in history.repeats),
        *(t for p in study.pairs for t in (p.default, p.best)),
        *(t for p in study.prunes for t in (p.kept, p.shorter)),
    ]


def _tuning(launches: Sequence[Trial], options: CostOptions) -> Tuning:
    known = [t.spent for t in launches if t.spent]
    energies: list[Energy] = [e for spent in known for e in spent.values()]
    joules = Interval(sum(e.joules for e in energies), sum(e.low for e in energies), sum(e.high for e in energies))
    return Tuning(
        launches=len(launches),
        counted=len(known),
        joules=joules if known else None,
        amount=Amount.of(joules, options) if known else None,
        quality=_worst(launches),
    )


def _llm_use(study: Study, options: CostOptions) -> LlmUse:
    used = usage(study.history)
    replies = [e.reply for e in exchanges(study.history)]
    uncounted = sum(r.input_tokens is None or r.output_tokens is None for r in replies)
    cost = None
    if not replies:
        cost = 0.0
    elif options.llm_prices and (used.input_tokens is not None or used.output_tokens is not None):
        of_input, of_output = options.llm_prices
        cost = ((used.input_tokens or 0) * of_input + (used.output_tokens or 0) * of_output) / MILLION
    return LlmUse(
        prompts=used.prompts,
        uncounted=uncounted,
        input_tokens=used.input_tokens,
        output_tokens=used.output_tokens,
        cost=cost,
    )


def _units_until(joules: float, default: Figure, share: Interval) -> Interval:
    """Units served with the best setting until `joules` are saved, from end to end of both intervals.

    Both are energy at the meter, so PUE cancels. So does an estimate's power range, which puts both off by
    about the same factor: the intervals of the share and of the default's launches are left.
    """
    each = default.joules_per_unit
    if default.quality == "estimated":
        each = default.sampling or Interval(each.value, each.value, each.value)
    # Multiplied first: the product is what `_saved` keeps, and a default of which nothing may be left saves nothing.
    latest = joules / least if (least := each.low * share.low) else math.inf
    return Interval(joules / (each.value * share.value), joules / (each.high * share.high), latest)


def _money_payback(energy: Interval, llm: LlmUse, saved: Saved, options: CostOptions) -> Interval | None:
    """`energy`, and the LLM's price over the money saved a unit: there an estimate's range does not cancel."""
    if not options.price_per_kwh or not llm.cost:
        return None
    cost = saved.joules_per_unit * (options.pue / JOULES_PER_KWH * options.price_per_kwh)
    latest = llm.cost / cost.low if cost.low else math.inf
    return Interval(energy.value + llm.cost / cost.value, energy.low + llm.cost / cost.high, energy.high + latest)


def _payback(units: Interval | None, options: CostOptions) -> Payback | None:
    if units is None:
        return None
    return Payback(units, units * (1 / options.units_per_day) if options.units_per_day else None)


def _mean(values: Iterable[float]) -> float:
    """Geometric; 0 where an estimate is 0."""
    known = list(values)
    return statistics.geometric_mean(known) if all(v > 0 for v in known) else 0.0


def _worst(launches: Iterable[Trial]) -> Quality | None:
    return max((m.quality for t in launches for m in t.measurements), key=QUALITIES.index, default=None)


# --- saying it -------------------------------------------------------------------------------


def rows(assessment: Assessment) -> list[tuple[str, str]]:
    """The assessment as lines for the screen, name and value, in the order a reader wants them."""
    a = assessment
    return [
        *_figure_rows("default", a.default, a),
        *_figure_rows("best", a.best, a),
        *_saving_rows(a),
        ("tuning took", _tuning_text(a)),
        ("LLM", _llm_text(a)),
        *_payback_rows(a),
        ("counted", _counted_text(a)),
        ("boundary", _boundary_text(a)),
        ("not counted", NOT_COUNTED),
    ]


def record(assessment: Assessment) -> dict[str, object]:
    """The assessment as strict JSON holds it: the fields of `Assessment` by name, each figure with `low` and `high`.

    What its energies are stands beside them: `quality` and `ends` of each figure, `counted`, `boundary` and
    `not_counted` of all. None is what is not known, not shown, or unbounded. The saving is `saving_record`'s.
    """
    plain = {name: value for name, value in asdict(assessment).items() if name not in ("study", "saving")}
    plain |= {
        "confirmed": assessment.confirmed,
        "counted": _counted_text(assessment),
        "boundary": _boundary_text(assessment),
        "not_counted": NOT_COUNTED,
    }
    return {name: _strict(value) for name, value in plain.items()}


def saving_record(found: Saving | None, sentence: str | None) -> dict[str, object]:
    """What a confirmation showed as strict JSON holds it: the fields of `Saving` by name, whether a saving is shown,
    and the sentence that says so (`tuner.confirm.concluded`). Without a confirmation the fields are None.
    """
    plain = asdict(found) if found else dict.fromkeys(field.name for field in fields(Saving))
    plain |= {"shown": found is not None and found.shown, "sentence": sentence or verdict(None, 0, 0)}
    return {name: _strict(value) for name, value in plain.items()}


def _strict(value: object) -> object:
    """JSON has neither infinity nor tuples."""
    if isinstance(value, Mapping):
        return {name: _strict(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [_strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure_rows(name: str, figure: Figure | None, a: Assessment) -> list[tuple[str, str]]:
    if figure is None:
        return [(name, "not measured")] if name == "default" else []
    each = figure.joules_per_unit
    energy = f"{joules_text(each.value)}/{a.unit}"
    if each.low != each.high:
        energy += f" ({figure.ends} {joules_text(each.low)} to {joules_text(each.high)})"
    who = f"trial {figure.trial}: " if name == "best" else ""
    doubt = ", not confirmed" if name == "best" and not a.confirmed else ""
    found = [
        (name, f"{who}{energy}{_label(figure.quality)}, {_source_text(figure)}{doubt}"),
        (f"{name}, 1M {a.unit}s", _amount_text(figure.per_million, a.options) + _label(figure.quality)),
    ]
    if figure.per_year:
        year = _amount_text(figure.per_year, a.options, kilograms=True)
        found.append((f"{name}, a year", year + _label(figure.quality)))
    return found


def _source_text(figure: Figure) -> str:
    if not figure.fresh_pairs:
        return "the search's own figure" + (", with the noise assumed" if figure.noise_assumed else "")
    pairs = "pair" if figure.fresh_pairs == 1 else "pairs"
    said = f"from {figure.fresh_pairs} fresh {pairs}"
    if figure.sampling is None:
        said += f" ({figure.launches} {'launch' if figure.launches == 1 else 'launches'}, too few for an interval)"
    return said


def _saving_rows(a: Assessment) -> list[tuple[str, str]]:
    found, saved = a.saving, a.saved
    if found is None or saved is None:
        said = [("saving", f"none shown: {_why_none(a)}")]
        return [*said, ("saved a year", "none shown")] if a.options.units_per_day is not None else said
    label = _label(saved.quality)
    said = [
        (
            "saving",
            f"{percent_text(1 - found.ratio)} ({_interval_text(found)}){label}{found.loss and f'; {found.loss}'}",
        ),
        (f"saved, 1M {a.unit}s", _amount_text(saved.per_million, a.options) + label),
    ]
    if saved.per_year:
        said.append(("saved a year", _amount_text(saved.per_year, a.options, kilograms=True) + label))
    return said


def _why_none(a: Assessment) -> str:
    if a.saving is not None:
        return _interval_text(a.saving)
    if a.default is None:
        return "the default was not measured, so there is nothing to compare with"
    if a.best is None:
        return "no setting used less energy than the default in the search"
    if not a.planned:
        return f"nothing was confirmed; `tune confirm {a.study}` measures fresh pairs"
    if not a.confirmed:
        return f"{a.pairs} of {a.planned} fresh pairs are done"
    if a.best.fresh_pairs:
        return "the best setting failed in some of its fresh launches"
    return "the confirmation could not be measured"


def _interval_text(found: Saving) -> str:
    pairs = f"{found.pairs} fresh {'pair' if found.pairs == 1 else 'pairs'}"
    if found.low is None or found.high is None:
        return f"no interval from {pairs}"
    return f"{100 * found.confidence:.3g} % CI {interval_text(found.low, found.high)}, {pairs}"


def _tuning_text(a: Assessment) -> str:
    spent = a.tuning
    if spent.amount is None:
        return f"energy not known: none of its {spent.launches} launches recorded it"
    label = _label(spent.quality) if spent.quality else ", of unknown quality"
    missing = spent.launches - spent.counted
    launches = f"{spent.launches} {'launch' if spent.launches == 1 else 'launches'}"
    if missing:
        launches = f"{missing} of {launches} {'is' if missing == 1 else 'are'} not in it"
    return f"{'at least ' if missing else ''}{_amount_text(spent.amount, a.options)}{label}; {launches}"


def _llm_text(a: Assessment) -> str:
    used = a.llm
    if not used.prompts:
        return "none took part"
    prompts = f"{used.prompts} {'prompt' if used.prompts == 1 else 'prompts'}"
    if used.input_tokens is None and used.output_tokens is None:
        return f"{prompts}, tokens not counted by the provider"
    said = f"{prompts}, {_count(used.input_tokens)} tokens in and {_count(used.output_tokens)} out"
    if used.cost is not None:
        cost = Interval(used.cost, used.cost, used.cost)
        said += f": {'at least ' if used.uncounted else ''}{_money_text(cost, a.options.currency)}"
    if used.uncounted:
        said += f"; {used.uncounted} of {prompts} {'is' if used.uncounted == 1 else 'are'} not in it"
    return said


def _payback_rows(a: Assessment) -> list[tuple[str, str]]:
    if a.saved is None:
        return [("pays back", "never shown to pay back")]
    if a.payback is None:
        return [("pays back", "not known, as the energy of the tuning is not")]
    label = _label(a.saved.quality)
    at_least = a.tuning.counted < a.tuning.launches
    said = [("pays back", _payback_text(a.payback, a.unit, at_least=at_least) + label)]
    if a.payback_money:
        at_least = at_least or a.llm.uncounted > 0
        in_money = _payback_text(a.payback_money, a.unit, at_least=at_least)
        said.append(("pays back, LLM too", f"in money {in_money}{label}"))
    return said


def _payback_text(payback: Payback, name: Unit, *, at_least: bool) -> str:
    units, least = payback.units, "at least " if at_least else ""
    said = f"after {least}{_units_text(units.value)} {name}s ({_units_text(units.low)} to {_units_text(units.high)})"
    if payback.days:
        low, high = _days_text(payback.days.low), _days_text(payback.days.high)
        said += f", {_days_text(payback.days.value)} ({low} to {high}) of that load"
    return said


def _counted_text(a: Assessment) -> str:
    """What the figures rest on: nothing is assumed in silence."""
    given = a.options
    price, carbon = "no price (--price)", "no carbon intensity (--carbon)"
    if given.price_per_kwh is not None:
        price = f"{_money(f'{given.price_per_kwh:g}', given.currency)}/kWh"
    if given.grams_per_kwh is not None:
        carbon = f"{given.grams_per_kwh:g} gCO2e/kWh"
    pue = "PUE 1, so nothing is added for the building"
    if given.pue > 1:
        pue = f"PUE {given.pue:g} in every kWh and what follows from it, not in J/{a.unit}"
    said = [price, carbon, pue]
    if given.units_per_day is not None:
        said.append(f"{_load_text(given.units_per_day)} {a.unit}s a day, all under the load that was measured")
    return "; ".join(said)


def _boundary_text(a: Assessment) -> str:
    """Which part of the system the energy is of."""
    counters = ", ".join(a.domains)
    if a.wall:
        said = f"at the wall ({counters})"
        if a.options.pue > 1:
            said += (
                f"; PUE {a.options.pue:g} is right for a meter at the machine's own plug, but counts cooling twice"
                " for one that reads the room: then leave --pue out"
            )
        return said
    if not a.domains:
        return "nothing was measured"
    if all(name.startswith("gpu") for name in a.domains):
        return f"GPU only ({counters}), not the whole system"
    return f"{counters} only, not the whole system"


def _amount_text(amount: Amount, options: CostOptions, *, kilograms: bool = False) -> str:
    """Three digits for energy, which is measured; two for what is derived from it with a price or a rate."""
    parts = [_range_text(amount.kwh, 3, "kWh")]
    if amount.cost is not None:
        parts.append(_money_text(amount.cost, options.currency))
    if amount.grams is not None:
        parts.append(
            _range_text(amount.grams * 1e-3, 2, "kgCO2e") if kilograms else _range_text(amount.grams, 2, "gCO2e")
        )
    return ", ".join(parts)


def _range_text(figure: Interval, digits: int, name: str) -> str:
    """`0.39 kWh (0.34 to 0.44)`; the value alone where it has no range."""
    value, ends = _digits_of(figure, digits)
    return f"{value} {name}{ends}"


def _money_text(cost: Interval, currency: str) -> str:
    value, ends = _digits_of(cost, 2)
    said = _money(value, currency)
    return (said if currency else f"cost {said}") + ends


def _digits_of(figure: Interval, digits: int) -> tuple[str, str]:
    """The value and ` (LOW to HIGH)`, with one digit more where `digits` would show an end as the value itself."""
    low, value, high = (digits_text(one, digits) for one in (figure.low, figure.value, figure.high))
    if figure.low == figure.high:
        return value, ""
    if value in (low, high):
        low, value, high = (digits_text(one, digits + 1) for one in (figure.low, figure.value, figure.high))
    return value, f" ({low} to {high})"


def _money(amount: str, currency: str) -> str:
    """`0.25 EUR`, `$0.25`, or the amount alone."""
    return f"{amount} {currency}" if currency.isalpha() else f"{currency}{amount}"


def _label(quality: Quality) -> str:
    """What is not measured says so wherever its number goes."""
    return "" if quality == "measured" else f", {quality}"


def digits_text(value: float, digits: int) -> str:
    """`value` to so many significant digits, without an exponent: `0.0021`, `1 300`; `unbounded` for infinity."""
    if not math.isfinite(value):
        return "unbounded"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = int(f"{rounded:e}".partition("e")[2])
    return f"{rounded:,.{max(digits - 1 - exponent, 0)}f}".replace(",", " ")


def _units_text(units: float) -> str:
    """`9.7 million`, `8 500`: two digits."""
    units = float(f"{units:.1e}") if math.isfinite(units) else units
    size, name = _size(units)
    return digits_text(units / size, 2) + name


def _load_text(units: float) -> str:
    """A number that was given keeps its digits: `1.234 million`."""
    size, name = _size(units)
    return f"{units / size:.12g}{name}"


def _size(units: float) -> tuple[float, str]:
    sizes = ((1e12, " trillion"), (1e9, " billion"), (1e6, " million"))
    return next(((size, name) for size, name in sizes if size <= units < math.inf), (1.0, ""))


def _days_text(days: float) -> str:
    """`12 minutes`, `4.7 hours`, `16 days`, `2.1 years`."""
    for most, size, name in ((1 / 24, 1 / 1440, "minutes"), (1, 1 / 24, "hours"), (2 * DAYS_PER_YEAR, 1, "days")):
        if days < most:
            return f"{digits_text(days / size, 2)} {name}"
    return f"{digits_text(days / DAYS_PER_YEAR, 2)} years"


def _count(tokens: int | None) -> str:
    return "?" if tokens is None else f"{tokens:,}".replace(",", " ")
