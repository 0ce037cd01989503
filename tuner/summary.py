"""What the trials so far say, computed once and said the same way everywhere.

Prompts, tables and exports read the same few functions, so that a person and a language model are
told the same thing. All of them are pure functions of records; none of them invents: where the
data do not determine a number there is no number.

Energies are compared as logarithms: a ratio is what people ask for, spread grows with the mean, and
the logarithm of a ratio has a symmetric interval.

Glossary
    unit      what the engine puts out and energy is divided by: a token or an image
    window    one measured stretch of a launch; the windows of one launch share one process
    launch    one start of the engine with one configuration; a trial has one, or several where it mattered
    spread    standard deviation between the windows of one launch over their mean
    noise     standard deviation of ln(J/unit) between launches of one configuration
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tuner.intervals import CONFIDENCE, student_t, t_interval
from tuner.limits import QUALITY_LOSS, columns_of
from tuner.space import SearchSpace, Value, show
from tuner.trial import Exchange, History, Idle, Noise, Target, Trial, Unit

ASSUMED = Noise(sigma=0.02, degrees=0, source="assumed")
"""What stands in until launches have been repeated or calibrated.

The windows of one launch share one memory layout, one clock, one set of neighbours. They understate how far
two launches of one configuration differ: by 2 % (standard deviation) on a quiet machine."""

WIDE_INTERVAL = 0.1
"""Half-width (in ln) from which both ends of an interval are shown."""

OWN_SCATTER = 3.0
"""A launch whose windows alone say this many times more than the known noise is not like the others."""

SPARK_SPAN = 0.1
"""A sparkline shows differences of ln(J/unit) below this at less than full height."""

QUALITY_ROUNDING = 1e-6
"""A loss of quality up to this is none: neighbouring float32 numbers near 10 nats are as far apart."""

FIT_FREEDOM = 3
"""Residual degrees of freedom from which a fit's own scatter is believed (Student's t is 3.2 there, 12.7 at 1)."""


# --- noise -----------------------------------------------------------------------------------


def noise(history: History) -> Noise:
    """How far two launches of one configuration lie apart, from all that is known by now.

    The pooled variance of the launches that were repeated in this study and of the calibration behind it,
    each weighted by its degrees of freedom: noise is taken to be the same share for every configuration.
    Below `FIT_FREEDOM` degrees the assumption stands, or what was seen where that is more.
    """
    return pooled((launch_logs(trial) for trial in history.measured), history.noise)


def pooled(groups: Iterable[Sequence[float]], calibrated: Noise | None) -> Noise:
    """`noise` from ln(J/unit) of launches that belong together, each group around a mean of its own."""
    scatter, degrees = 0.0, 0
    for logs in groups:
        if len(logs) > 1:
            scatter += statistics.variance(logs) * (len(logs) - 1)
            degrees += len(logs) - 1
    sources = ["the repeats of this study"] if degrees else []
    if calibrated is not None and calibrated.degrees > 0:
        scatter += calibrated.sigma**2 * calibrated.degrees
        degrees += calibrated.degrees
        sources.insert(0, calibrated.source)
    if degrees < FIT_FREEDOM:
        seen = math.sqrt(scatter / degrees) if degrees else 0.0
        return ASSUMED if seen <= ASSUMED.sigma else Noise(seen, 0, sources[0])
    return Noise(math.sqrt(scatter / degrees), degrees, " and ".join(sources))


def launch_logs(trial: Trial) -> list[float]:
    """ln(joules per unit) of each launch. An estimate may read 0 J; that has no logarithm."""
    return [math.log(v) for t in trial.launches if (v := t.launch_joules_per_unit) is not None and v > 0]


def noise_quantile(known: Noise, probability: float = (1 + CONFIDENCE) / 2) -> float:
    """Of Student's t with the degrees of freedom behind the noise; of the normal distribution where it is assumed."""
    return student_t(probability, known.degrees) if known.degrees else statistics.NormalDist().inv_cdf(probability)


def told_apart(known: Noise) -> float:
    """Two single launches that differ by less than this (in ln) cannot be told apart with 95 % confidence."""
    return noise_quantile(known) * known.sigma * math.sqrt(2)


def half_width(trial: Trial, known: Noise) -> float | None:
    """Half of the 95 % interval of ln(joules per unit); None where nothing was measured.

    Student's t with the degrees of freedom behind the noise. Where the noise is only assumed, the windows
    of the launch may show that it is larger, never that it is smaller.
    """
    logs = launch_logs(trial)
    if not logs:
        return None
    half = noise_quantile(known) * known.sigma / math.sqrt(len(logs))
    own = _window_half_width(trial)
    return half if known.degrees and own <= OWN_SCATTER * half else max(half, own)


def interval(trial: Trial, known: Noise) -> tuple[float, float] | None:
    """95 % interval of the joules per unit that launches of this configuration use on average.

    Of a configuration named beforehand. The best of fifteen equal ones was chosen for being low, and its interval
    holds the truth in 79 to 83 % of studies (`python tests/referee.py coverage`): it is never a claim.
    For an estimate it holds nothing of the estimate's own range (`Trial.joules_per_unit_bounds`).
    """
    half = half_width(trial, known)
    if half is None or not trial.joules_per_unit:
        return None
    return trial.joules_per_unit * math.exp(-half), trial.joules_per_unit * math.exp(half)


def _window_logs(trial: Trial) -> list[float]:
    return [math.log(v) for m in trial.valid if (v := m.joules_per_unit) is not None and v > 0]


def _window_half_width(trial: Trial) -> float:
    logs = _window_logs(trial)
    if len(logs) < 2:
        return 0.0
    low, high = t_interval(logs)
    return (high - low) / 2


# --- one trial against another ---------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """Joules per unit of one trial over those of another, with the ends of its 95 % interval."""

    ratio: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether the two cannot be told apart."""
        return self.low <= 1 <= self.high


def against(trial: Trial, reference: Trial, known: Noise = ASSUMED) -> Ratio | None:
    """How many times the energy of `reference` one unit costs in `trial`.

    The interval is that of a difference of two means on logarithms, by Student's t with the noise `known`.
    Where that is only assumed, or says far less than the windows do, Welch's interval over the windows counts
    when it is wider (B. L. Welch, Biometrika 34, 1947, 28-35). None where either was not measured, and across segments.
    """
    ours, theirs = trial.joules_per_unit, reference.joules_per_unit
    if not ours or not theirs or trial.segment != reference.segment:
        return None
    half = noise_quantile(known) * known.sigma * math.sqrt(1 / len(trial.launches) + 1 / len(reference.launches))
    own = _welch_half_width(_window_logs(trial), _window_logs(reference))
    if not known.degrees or own > OWN_SCATTER * half:
        half = max(half, own)
    difference = math.log(ours / theirs)
    return Ratio(ours / theirs, math.exp(difference - half), math.exp(difference + half))


def _welch_half_width(a: Sequence[float], b: Sequence[float]) -> float:
    """0 where one of the two has fewer than two values."""
    if len(a) < 2 or len(b) < 2:
        return 0.0
    of_a, of_b = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if of_a + of_b == 0:
        return 0.0
    degrees = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    return student_t((1 + CONFIDENCE) / 2, max(math.floor(degrees), 1)) * math.sqrt(of_a + of_b)


def indistinguishable(history: History) -> frozenset[int]:
    """Numbers of the trials that cannot be told from the best one, itself not among them."""
    best, known = history.best, noise(history)
    ratios = {t.number: against(t, best, known) for t in history.measured if best and t is not best}
    return frozenset(number for number, ratio in ratios.items() if ratio and ratio.within_noise)


# --- what it costs in quality ----------------------------------------------------------------


def lossy_changes(space: Iterable[Mapping[str, object]], config: Mapping[str, Value]) -> tuple[str, ...]:
    """The parameters that can cost quality and are not at their defaults. `space` is as the journal keeps it."""
    lossy = {str(p["name"]): p["default"] for p in space if p.get("effect") == "lossy"}
    return tuple(name for name, default in lossy.items() if config.get(name, default) != default)


def quality_loss(launches: Iterable[Trial]) -> float | None:
    """The mean over those that measured it, in nats per token or as 1 - SSIM; None where none did."""
    known = [loss for t in launches if (loss := t.metrics.get(QUALITY_LOSS)) is not None]
    return statistics.fmean(known) if known else None


def loss_text(space: Iterable[Mapping[str, object]], launches: Sequence[Trial]) -> str:
    """What launches of one configuration lost in quality: `quality_loss 0.0123 nats/token`, or `quality not measured`.

    Nothing where no parameter that can cost quality was changed.
    """
    if not launches or not lossy_changes(space, launches[0].config):
        return ""
    loss = quality_loss(launches)
    if loss is None:
        return "quality not measured"
    return f"{QUALITY_LOSS} {loss:.4g}{' (1 - SSIM)' if unit(launches[0]) == 'image' else ' nats/token'}"


def best_at_equal_quality(
    history: History, space: Sequence[Mapping[str, object]], limits: Iterable[str]
) -> Trial | None:
    """The least energy among the trials that lose no quality, where the best is none of them.

    They change no parameter that can cost quality, or their loss is at most what the default's own launches show.
    None also where a limit on the loss says how much of it counts as none.
    """
    if QUALITY_LOSS in columns_of(limits):
        return None
    own = [t.figures.get(QUALITY_LOSS, 0.0) for t in (history.default.launches if history.default else ())]
    most = max([0.0, *own]) + QUALITY_ROUNDING

    def equal(trial: Trial) -> bool:
        loss = quality_loss([trial])
        return not lossy_changes(space, trial.config) or (loss is not None and loss <= most)

    found = replace(history, trials=tuple(filter(equal, history.trials))).best
    return None if found is history.best else found


# --- what each parameter does ----------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """What one value of one parameter does to joules per unit, all else equal."""

    parameter: str
    base: Value
    """The parameter's default, which `value` is held against."""
    value: Value
    ratio: float
    """Joules per unit with `value` over those with `base`."""
    low: float
    high: float
    """Ends of the ratio's 95 % interval."""
    trials: int
    """Measured trials that ran with `value`."""
    within_noise: bool

    @property
    def sentence(self) -> str:
        """`parallel 4 -> 8: 0.62x the energy (3 trials)`."""
        count = f"{self.trials} trial" if self.trials == 1 else f"{self.trials} trials"
        change = f"{self.parameter} {show(self.base)} -> {show(self.value)}"
        figures = f"{ratio_text(self.ratio)}, 95 % CI {ratio_text(self.low)} to {ratio_text(self.high)}, {count}"
        if self.within_noise:
            return f"{change}: no effect beyond noise ({figures})"
        return f"{change}: {ratio_text(self.ratio)} the energy ({figures.partition(', ')[2]})"


def effects(space: SearchSpace, history: History) -> list[Effect]:
    """What the values of each parameter have done so far, the largest effect first.

    A least-squares fit of main effects: ln(J/unit) = constant + one number for each value other than
    the default. A value is reported only where the trials determine its number (it is estimable): two
    trials that differ in one parameter do; a trial that changes two parameters at once says nothing of
    either, until another trial separates them. With one change at a time the fit is the plain difference.
    Interactions between parameters are not in it: they show as scatter.
    """
    trials = [t for t in history.measured if t.joules_per_unit]
    columns = [
        (p, value)
        for p in space.parameters
        for value in dict.fromkeys(t.config[p.name] for t in trials if p.name in t.config)
        if value != p.default
    ]
    if not columns or len(trials) < 2:
        return []
    rows = [[1.0, *(float(t.config.get(p.name) == value) for p, value in columns)] for t in trials]
    fit = _least_squares(rows, [math.log(t.joules_per_unit or 1.0) for t in trials])
    known = noise(history)
    found = []
    for (parameter, value), number in zip(columns, fit.numbers[1:], strict=True):
        if number is None:
            continue
        coefficient, variance_factor = number
        # A difference of two single launches has the variance factor 2.
        margin = noise_quantile(known) * known.sigma * math.sqrt(variance_factor)
        if fit.freedom >= FIT_FREEDOM:
            quantile = student_t((1 + CONFIDENCE) / 2, fit.freedom)
            margin = max(margin, quantile * fit.residual_sd * math.sqrt(variance_factor))
        found.append(
            Effect(
                parameter=parameter.name,
                base=parameter.default,
                value=value,
                ratio=math.exp(coefficient),
                low=math.exp(coefficient - margin),
                high=math.exp(coefficient + margin),
                trials=sum(t.config.get(parameter.name) == value for t in trials),
                within_noise=abs(coefficient) <= margin,
            )
        )
    return sorted(found, key=lambda e: -abs(math.log(e.ratio)))


@dataclass(frozen=True)
class _Fit:
    numbers: tuple[tuple[float, float] | None, ...]
    """For each column its coefficient and the factor of its variance; None where the data do not determine it."""
    residual_sd: float
    freedom: int


def _least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> _Fit:
    """Ordinary least squares that knows which coefficients the rows determine.

    Sweeps the cross products on one column after another and leaves out those that depend on columns
    already swept. Afterwards the matrix holds the coefficients, the inverse of X'X, the residual sum of
    squares, and how each column left out depends on the others: a coefficient is estimable where none
    does. J. H. Goodnight, A Tutorial on the SWEEP Operator, The American Statistician 33 (1979), 149-158.
    """
    width = len(rows[0])
    full = [[*row, value] for row, value in zip(rows, values, strict=True)]
    matrix = [[sum(r[i] * r[j] for r in full) for j in range(width + 1)] for i in range(width + 1)]
    swept = []
    for k in range(width):
        # Entries count trials, so a pivot that depends on others is rounding away from 0 and no other is small.
        if matrix[k][k] > 1e-8:
            _sweep(matrix, k)
            swept.append(k)
    left_out = [k for k in range(width) if k not in swept]
    numbers: list[tuple[float, float] | None] = [None] * width
    for k in swept:
        if all(abs(matrix[k][other]) < 1e-8 for other in left_out):
            numbers[k] = (matrix[k][width], matrix[k][k])
    freedom = len(rows) - len(swept)
    residual_sd = math.sqrt(max(matrix[width][width], 0.0) / freedom) if freedom else 0.0
    return _Fit(tuple(numbers), residual_sd, freedom)


def _sweep(matrix: list[list[float]], k: int) -> None:
    pivot = matrix[k][k]
    matrix[k] = [entry / pivot for entry in matrix[k]]
    for i, row in enumerate(matrix):
        if i != k:
            factor = row[k]
            matrix[i] = [entry - factor * own for entry, own in zip(row, matrix[k], strict=True)]
            matrix[i][k] = -factor / pivot
    matrix[k][k] = 1 / pivot


# --- where the energy goes -------------------------------------------------------------------


def where_energy_goes(trial: Trial, quality: str | None = None) -> dict[str, str]:
    """What a specialist asks of one measured trial, each figure with its unit; only what is known is there.

    `quality` is what its energies are called; left out, what the trial says of them.
    """
    windows = trial.valid
    if not windows:
        return {}
    seconds = sum(m.seconds for m in windows)
    joules = sum(m.joules for m in windows)
    quality = quality or trial.quality
    label = "" if quality == "measured" else f" ({quality})"
    said: dict[str, str] = {}
    prefill = _sum(m.work.prefill_seconds for m in windows)
    decode = _sum(m.work.decode_seconds for m in windows)
    if prefill is not None and decode is not None and prefill + decode > 0:
        share = prefill / (prefill + decode)
        said["prefill"] = f"{percent_text(share)} of the requests' time"
        said["decode"] = f"{percent_text(1 - share)} of the requests' time"
    if trial.units_per_second is not None:
        said["speed"] = f"{number_text(trial.units_per_second)} {windows[0].work.unit}s/s"
    if seconds > 0:
        said["mean power"] = f"{number_text(joules / seconds)} W{label}"
        cpu_seconds = _sum(m.cpu_seconds for m in windows)
        if cpu_seconds is not None:
            said["CPU use"] = f"{number_text(cpu_seconds / seconds)} CPUs busy on average"
    peaks = [m.peak_memory_bytes for m in windows if m.peak_memory_bytes is not None]
    if peaks:
        said["peak memory"] = bytes_text(max(peaks))
    domains = list(dict.fromkeys(d for m in windows for d in m.energy))
    if len(domains) > 1 and joules > 0:
        for domain in domains:
            part = sum(m.energy[domain].joules for m in windows if domain in m.energy)
            said[f"energy of {domain}"] = f"{percent_text(part / joules)} of the total{label}"
    return said


def above_idle(trial: Trial, idle: Idle | None) -> float | None:
    """Joules per unit without what the idle machine would have used, over the windows of the first launch.

    A secondary figure, never the objective: subtracting idle power can turn the order of two settings round.
    None where idle power is not known, or not in the same way.
    """
    windows = trial.valid
    if idle is None or not windows or trial.quality != idle.quality:
        return None
    rest = sum(m.joules for m in windows) - idle.machine_watts * sum(m.seconds for m in windows)
    return rest / sum(m.work.units for m in windows)


def idle_text(idle: Idle) -> str:
    """`12.3 W without an engine, 45.6 W with one loaded and waiting`."""
    label = "" if idle.quality == "measured" else f" ({idle.quality})"
    return (
        f"{number_text(idle.machine_watts)} W without an engine,"
        f" {number_text(idle.loaded_watts)} W with one loaded and waiting{label}"
    )


def _sum(parts: Iterable[float | None]) -> float | None:
    """The sum, or None where a part is missing: a missing reading is not 0."""
    known = list(parts)
    return sum(p for p in known if p is not None) if None not in known else None


def grouped(causes: Iterable[str]) -> Counter[str]:
    """How often each cause was given, in its first wording: those that differ in their numbers only are one.

    `1.52 of 2 CPUs` and `1.48 of 2 CPUs` are one cause; `gpu0` and `gpu1` are two.
    """
    wording: dict[str, str] = {}
    return Counter(wording.setdefault(re.sub(r"(?<!\w)[\d.]+", "", cause), cause) for cause in causes)


# --- what it cost to get here ----------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What the chat was asked for."""

    prompts: int
    input_tokens: int | None
    """None where the provider (or the person) gave no count for any of them."""
    output_tokens: int | None


def exchanges(history: History) -> list[Exchange]:
    """Every prompt and answer once, in order, also those that led to no trial."""
    turned_down = [
        (d.before_trial, 0, d.proposal.exchanges)
        for d in history.decisions
        if d.action in ("reject", "forbid", "stop") and d.proposal
    ]
    lost = [(one.before_trial, 0, one.exchanges) for one in history.lost]
    led_on = [(t.number, 1, t.proposal.exchanges) for t in history.trials]
    return [one for _, _, some in sorted([*turned_down, *lost, *led_on], key=lambda e: e[:2]) for one in some]


def usage(history: History) -> Usage:
    """Prompts sent and tokens used so far."""
    replies = [e.reply for e in exchanges(history)]
    read = [r.input_tokens for r in replies if r.input_tokens is not None]
    written = [r.output_tokens for r in replies if r.output_tokens is not None]
    return Usage(len(replies), sum(read) if read else None, sum(written) if written else None)


def typical_trial_seconds(history: History) -> float | None:
    """What a trial takes: the median of those that were measured; None before the first."""
    return statistics.median([t.seconds for t in history.measured]) if history.measured else None


def seconds_of_next(trial: Trial) -> float:
    """How long a trial like this one takes: without its idle power, and the second warm-up that goes with it."""
    if trial.idle is None:
        return trial.seconds
    return trial.seconds - 2 * trial.idle.seconds - (trial.warm_up.seconds if trial.warm_up else 0.0)


# --- saying it -------------------------------------------------------------------------------


def differences(space: SearchSpace, config: Mapping[str, Value], base: Mapping[str, Value]) -> str:
    """`parallel 4 -> 8, threads 2 -> 1`, in the order of the space; empty where nothing differs."""
    return changes_text(config, base, space.names)


def changes_text(config: Mapping[str, Value], base: Mapping[str, Value], names: Iterable[str]) -> str:
    """As `differences`, for a journal that is read without its engine."""
    return ", ".join(
        f"{name} {show(base.get(name))} -> {show(config.get(name))}"
        for name in names
        if config.get(name) != base.get(name)
    )


_PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G"}


def joules_text(joules: float | None) -> str:
    """Three significant digits with an SI prefix: `412 mJ`, `1.20 J`; `-` where there is none."""
    if joules is None:
        return "-"
    if joules == 0 or not math.isfinite(joules):
        return f"{joules:g} J"
    # Rounded before the prefix is chosen: 999.7 mJ is 1.00 J, not 1000 mJ.
    exponent = int(f"{joules:.2e}".partition("e")[2])
    power = min(max(3 * (exponent // 3), min(_PREFIXES)), max(_PREFIXES))
    decimals = max(2 - (exponent - power), 0)
    return f"{joules / 10.0**power:.{decimals}f} {_PREFIXES[power]}J"


def number_text(value: float | None) -> str:
    """About three significant digits without an exponent: `0.123`, `45.6`, `1234`."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{value:.{min(max(2 - exponent, 0), 6)}f}"


def percent_text(share: float) -> str:
    """`0.123` as `12 %`; one decimal below 10 %."""
    return f"{100 * share:.0f} %" if abs(share) >= 0.0995 else f"{100 * share:.1f} %"


def ratio_text(ratio: float, decimals: int = 2) -> str:
    """`0.71x`."""
    return f"{ratio:.{decimals}f}x"


def interval_text(trial: Trial, known: Noise) -> str:
    """`± 2.1 % (3x)`: half of the 95 % interval, and how many launches it is from where they are several.

    An interval wider than 10 % is not the same on both sides: then `(374 mJ to 453 mJ)`.
    """
    half, ends = half_width(trial, known), interval(trial, known)
    count = f" ({len(trial.launches)}x)" if len(trial.launches) > 1 else ""
    if half is None or ends is None:
        return ""
    if half > WIDE_INTERVAL:
        return f"({joules_text(ends[0])} to {joules_text(ends[1])}){count}"
    return f"± {percent_text(math.expm1(half))}{count}"


def noise_text(known: Noise) -> str:
    """Where the intervals come from, as a sentence without its full stop."""
    sigma = percent_text(known.sigma)
    if known.degrees:
        return f"launches of one configuration differ by {sigma} (standard deviation, from {known.source})"
    if known is ASSUMED:
        return f"launches of one configuration are assumed to differ by {sigma}; `tune calibrate` measures it"
    return f"launches of one configuration seem to differ by {sigma}; `tune calibrate` measures it"


def quality_text(trial: Trial) -> str:
    """The label of an energy that was not measured (`estimated`, `replayed`, `simulated`), or nothing."""
    return "" if trial.quality in (None, "measured") else str(trial.quality)


def energy_text(trial: Trial, known: Noise, label: str | None = None) -> str:
    """`412 mJ/token ± 2.1 % (3x) estimated`, or `failed`; the trial's own label where none is given."""
    if trial.joules_per_unit is None:
        return "failed"
    return " ".join(
        part
        for part in (
            f"{joules_text(trial.joules_per_unit)}/{unit(trial)}",
            interval_text(trial, known),
            quality_text(trial) if label is None else label,
        )
        if part
    )


def failed_cell(trial: Trial) -> str:
    """A trial without energy, in a table: `failed`, or in brackets what a configuration over a limit used."""
    return f"({joules_text(trial.shown_joules_per_unit)}) over a limit" if trial.over_limit else "failed"


def launched(history: History) -> list[Trial]:
    """Every launch of the newest segment, those that failed too."""
    return [launch for t in history.current for launch in (t, *t.repeats)]


def _loads(history: History) -> list[Trial]:
    """The launches that loaded an engine."""
    return [launch for launch in launched(history) if launch.load_seconds is not None]


def restart_seconds(history: History) -> float | None:
    """What a launch of the engine takes until it is loaded, the median; None where nothing was launched."""
    known = [t.load_seconds for t in _loads(history) if t.load_seconds is not None]
    return statistics.median(known) if known else None


def restart_joules(history: History) -> float | None:
    """The energy of that, the median; None where it is not known. It is labelled as the trials' energies are."""
    known = [sum(e.joules for e in t.load_energy.values()) for t in _loads(history) if t.load_energy]
    return statistics.median(known) if known else None


def loading_text(history: History) -> str:
    """`6 launches, 50 s and 3.2 kJ each to load, not in the figures above; 4 trials on an engine that ran already`."""
    loads = _loads(history)
    if not loads:
        return ""
    cost = seconds_text(restart_seconds(history))
    if (joules := restart_joules(history)) is not None:
        cost += " ".join(filter(None, (f" and {joules_text(joules)}", quality_text(loads[0]))))
    reused = sum(launch.reused for launch in launched(history))
    more = f"; {reused} {'trial' if reused == 1 else 'trials'} on an engine that ran already" if reused else ""
    counted = "1 launch" if len(loads) == 1 else f"{len(loads)} launches"
    return f"{counted}, {cost} each to load, before the windows{more}"


def failures_text(history: History) -> str:
    """`, 2 of them failed, 1 over a limit`; nothing where every trial was measured and within its limits."""
    over = sum(t.over_limit for t in history.failed)
    failed = len(history.failed) - over
    said = [f"{failed} of them failed"] if failed else []
    said += [f"{over} of them broke a limit" if not said else f"{over} broke a limit"] if over else []
    return "".join(f", {part}" for part in said)


def figures_text(trial: Trial, columns: Iterable[str]) -> str:
    """`ttft_p95_s 0.31, quality_loss 0.002`: the metrics named in `columns`, and the quality where it was measured."""
    metrics = trial.metrics
    shown = [name for name in dict.fromkeys([*columns, QUALITY_LOSS]) if name in metrics]
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in shown)


def failure_text(trial: Trial) -> str:
    """Why a trial has no energy, and what it used where it broke a limit."""
    if trial.over_limit:
        return f"{trial.error} (it used {joules_text(trial.shown_joules_per_unit)}/{unit(trial)})"
    return f"failed: {trial.error or 'no window counted'}"


def launch_text(trial: Trial) -> str:
    """What one launch measured, alone and so without an interval: `412 mJ/token estimated`, or `failed: CAUSE`."""
    if not trial.launch_joules_per_unit:
        return f"failed: {trial.error or 'the meter read 0 J'}"
    figure = f"{joules_text(trial.launch_joules_per_unit)}/{unit(trial)}"
    return " ".join(filter(None, (figure, quality_text(trial))))


def unit(trial: Trial) -> Unit:
    """What the trial's energy is divided by."""
    return trial.measurements[0].work.unit if trial.measurements else "token"


def load_text(target: Target, unit: Unit) -> str:
    """What one pass of the load is: `8 requests x (96 prompt + 32 output) tokens`, `4 images of 512 x 512 pixels`."""
    if unit == "image":
        images = "1 image" if target.prompts == 1 else f"{target.prompts} images"
        return f"{images} of {target.pixels} x {target.pixels} pixels"
    if unit == "token":
        return f"{target.prompts} requests x ({target.prompt_tokens} prompt + {target.output_tokens} output) tokens"
    return f"{unit}s, as many as the workload says"


def seconds_text(seconds: float | None) -> str:
    """`4.2 s`, `42 s`, `3 min 05 s`, `2 h 10 min`; `-` where there is none."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def bytes_text(size: float) -> str:
    """`1.23 GB`, in powers of 1000."""
    for power, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= power:
            return f"{number_text(size / power)} {name}"
    return f"{size:.0f} B"


def source_text(trial: Trial) -> str:
    """Who proposed it, and in whose place: `rules for llm`. A fallback is never silent."""
    source, replaced = trial.proposal.source, trial.proposal.in_place_of
    return source if replaced is None else f"{source} for {replaced}"


_SPARKS = "▁▂▃▄▅▆▇█"
FAILED_MARK = "×"


def sparkline(trials: Sequence[Trial]) -> str:
    """One character for each trial, high for much energy (logarithmic); `FAILED_MARK` for a failure."""
    logs = [math.log(t.joules_per_unit) for t in trials if t.joules_per_unit]
    low, span = (min(logs), max(logs) - min(logs)) if logs else (0.0, 0.0)
    # Differences within noise are not blown up to the full height.
    span = max(span, SPARK_SPAN)

    def mark(trial: Trial) -> str:
        if not trial.joules_per_unit:
            return FAILED_MARK
        return _SPARKS[min(int((math.log(trial.joules_per_unit) - low) / span * len(_SPARKS)), len(_SPARKS) - 1)]

    return "".join(map(mark, trials))


_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f]).*?(?:\x07|\x1b\\|\x9c|$)"  # OSC, DCS, SOS, PM, APC with what they carry
    r"|\x9b[0-?]*[ -/]*[@-~]"  # CSI as one character
    r"|\x1b[ -/]*[0-~]",  # the other escapes
    re.DOTALL,
)
# C0 and C1 controls, lone surrogates, and the marks that turn the direction of a line round (CVE-2021-42574).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str, *, lines: bool = False) -> str:
    """Text from outside (a model's reason, a log, a remark) without anything that acts on a terminal.

    Escape sequences are taken out whole, other control characters one by one. Line breaks become
    blanks unless `lines`.
    """
    text = text.replace("\r\n", "\n")
    text = _UNPRINTABLE.sub("", _ESCAPES.sub("", text)).replace("\t", " ")
    return text if lines else " ".join(text.split())
