import contextlib
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import trial, window

from tuner.confirm import Saving, concluded, saving
from tuner.cost import (
    NOT_COUNTED,
    Amount,
    CostOptions,
    Interval,
    assess,
    digits_text,
    record,
    rows,
    saving_record,
)
from tuner.intervals import paired_interval
from tuner.journal import Header, Pair, Prune, Segment, Study
from tuner.space import Refused
from tuner.summary import interval, noise
from tuner.trial import (
    Decision,
    Energy,
    Exchange,
    History,
    Lost,
    Noise,
    Proposal,
    Repeat,
    Reply,
    Target,
    Trial,
)

NOTHING = CostOptions()
ALL = CostOptions(
    price_per_kwh=0.25,
    currency="EUR",
    grams_per_kwh=400.0,
    pue=1.2,
    units_per_day=50e6,
    llm_prices=(2.5, 10.0),
)
BEST = {"parallel": 8}


def launch(number, joules, *, quality="measured", spent=1000.0, meter="rapl", domain="cpu0", units=100):
    """One launch with one window; `spent` joules in all, None for not known."""
    made = window(joules, quality=quality, units=units)
    made = replace(made, meter=meter, energy={domain: made.energy["cpu0"]})
    whole = {} if spent is None else {domain: Energy(spent, spent, spent)}
    return replace(trial(number, BEST if number else None, joules=()), measurements=(made,), spent=whole)


def pair(number, default=1.0, best=0.7, planned=6, **more):
    return Pair(
        number=number,
        default=launch(0, default, **more),
        best=launch(1, best, **more),
        default_first=number % 2 == 0,
        config=launch(1, best).config,
        planned=planned,
    )


# Ratios that lie around 0.7 and differ a little.
PAIRS = tuple(pair(n, 1.0 + 0.01 * (n % 3), 0.7 + 0.005 * (n % 2)) for n in range(6))


def study(trials=None, pairs=PAIRS, **more):
    header = Header(
        name="s", workload="w", target=Target(), proposer="p", machine={"cores_logical": "2"}, confirm_pairs=6
    )
    history = more.pop("history", None) or History(
        trials=tuple([launch(0, 1.1), launch(1, 0.6)] if trials is None else trials)
    )
    return Study(folder=Path("results/s"), header=header, history=history, pairs=tuple(pairs), **more)


def assessed(found=None, options=ALL, **more):
    found = found or study(**more)
    return assess(found, saving(found.pairs, found.header), options)


def said(assessment):
    """Rows as a mapping: no name comes twice."""
    lines = rows(assessment)
    assert len(dict(lines)) == len(lines)
    return dict(lines)


# --- what a person says ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount", "currency"),
    [
        ("0.25/kWh", 0.25, ""),
        ("0.25EUR/kWh", 0.25, "EUR"),
        ("EUR 0.25 / kWh", 0.25, "EUR"),
        ("$0.25/kWh", 0.25, "$"),
        ("0.25€/kwh", 0.25, "€"),
        ("250/MWh", 0.25, ""),
        (".3/kWh", 0.3, ""),
        ("0/kWh", 0.0, ""),
    ],
)
def test_a_price_is_an_amount_with_or_without_a_currency_per_kwh_or_mwh(text, amount, currency):
    options = CostOptions.parse(price=text)
    assert (options.price_per_kwh, options.currency) == (amount, currency)


@pytest.mark.parametrize(
    "text",
    ["", "0.25", "25ct/kWh", "0,25/kWh", "-1/kWh", "$0.25EUR/kWh", "1e9/kWh", "250/mWh", "nan/kWh", "٣/kWh", "9" * 400],
)
def test_another_price_is_refused_with_the_forms_that_are_known(text):
    with pytest.raises(
        Refused, match=r"^--price .{2,70}: expected an amount per kWh or MWh in whole units .* 250/MWh$"
    ):
        CostOptions.parse(price=text)


@pytest.mark.parametrize(
    ("text", "grams"), [("380g/kWh", 380.0), ("0.38kg/kWh", 380.0), ("380 kg / MWh", 380.0), ("0g/kWh", 0.0)]
)
def test_carbon_is_a_mass_per_energy(text, grams):
    assert CostOptions.parse(carbon=text).grams_per_kwh == pytest.approx(grams)


@pytest.mark.parametrize("text", ["380", "380/kWh", "380mg/kWh", "-3g/kWh", "infg/kWh"])
def test_another_carbon_intensity_is_refused_with_the_forms_that_are_known(text):
    with pytest.raises(Refused, match=r"^--carbon .*: expected grams of CO2e per kWh, such as 380g/kWh or 0.38kg/kWh$"):
        CostOptions.parse(carbon=text)


def test_grams_typed_as_kilograms_are_refused():
    with pytest.raises(Refused, match=r'--carbon "380kg/kWh": expected at most 5000 g/kWh'):
        CostOptions.parse(carbon="380kg/kWh")


def test_a_pue_is_at_least_one():
    assert CostOptions.parse(pue="1.2").pue == 1.2
    assert CostOptions.parse(pue="1").pue == CostOptions.parse().pue == 1.0
    for text in ("0.99", "120%", "-2", "", "inf"):
        with pytest.raises(Refused, match=r"--pue .*: expected a number of at least 1, such as 1.2"):
            CostOptions.parse(pue=text)


@pytest.mark.parametrize(
    ("text", "units"),
    [("1000", 1e3), ("5k", 5e3), ("5K", 5e3), ("50M", 50e6), ("1.5 B", 1.5e9), ("2G", 2e9), ("3T", 3e12)],
)
def test_a_load_is_a_number_with_a_suffix(text, units):
    assert CostOptions.parse(tokens_per_day=text).units_per_day == pytest.approx(units)


@pytest.mark.parametrize("text", ["0", "0M", "50m", "M", "-1M", "1e6", "50M/day"])
def test_another_load_is_refused(text):
    with pytest.raises(Refused, match=r"^--tokens-per-day .*: expected a number above 0, such as 50M"):
        CostOptions.parse(tokens_per_day=text)


def test_an_llm_has_a_price_for_input_and_one_for_output():
    assert CostOptions.parse(llm_price="2.5, 10/M").llm_prices == (2.5, 10.0)
    for text in ("2.5/M", "2.5,10", "2.5,10/k", "2.5;10/M", "$2,$3/M"):
        with pytest.raises(Refused, match=r"^--llm-price .*: expected the prices of a million input and a million"):
            CostOptions.parse(llm_price=text)


@given(st.text(max_size=40) | st.text(alphabet="0123456789.,/ kKMWhgEUR$%ctBGT", max_size=12))
def test_any_text_is_parsed_or_refused(text):
    for option in ("price", "carbon", "pue", "tokens_per_day", "llm_price"):
        with contextlib.suppress(Refused):
            assert isinstance(CostOptions.parse(**{option: text}), CostOptions)


@given(st.decimals(min_value=0, max_value=10**9, places=6, allow_nan=False))
def test_a_price_is_read_as_it_was_typed(amount):
    assert CostOptions.parse(price=f"{amount:f}CHF/kWh").price_per_kwh == float(amount)


# --- what it comes to ------------------------------------------------------------------------

positive = st.floats(min_value=1e-6, max_value=1e6)


def test_half_a_joule_a_token_is_what_the_formulas_say():
    """0.5 J x 1e6 / 3.6e6 = 0.1389 kWh; at 400 g/kWh 55.6 g; at 150 EUR/MWh 0.0208 EUR."""
    options = CostOptions.parse(price="150EUR/MWh", carbon="400g/kWh")
    found = Amount.of(Interval(0.5e6, 0.5e6, 0.5e6), options)
    assert found.kwh.value == pytest.approx(0.13889, rel=1e-4)
    assert found.grams.value == pytest.approx(55.556, rel=1e-4)
    assert found.cost.value == pytest.approx(0.020833, rel=1e-4)


@given(joules=positive, pue=st.floats(min_value=1, max_value=5), price=positive, grams=positive)
def test_pue_multiplies_energy_cost_and_carbon_alike(joules, pue, price, grams):
    options = CostOptions(price_per_kwh=price, grams_per_kwh=grams, pue=pue)
    plain = Amount.of(Interval(joules, joules, joules), replace(options, pue=1.0))
    more = Amount.of(Interval(joules, joules, joules), options)
    for name in ("kwh", "cost", "grams"):
        assert getattr(more, name).value == pytest.approx(pue * getattr(plain, name).value)


def test_joules_per_unit_are_as_measured_whatever_the_pue():
    assert assessed().default.joules_per_unit == assessed(options=NOTHING).default.joules_per_unit


def test_energies_come_from_the_fresh_pairs_and_not_from_the_search():
    found = assessed()
    assert found.default.joules_per_unit.value == pytest.approx((1.0 * 1.01 * 1.02) ** (1 / 3))
    assert found.best.joules_per_unit.value == pytest.approx(math.sqrt(0.7 * 0.705))
    assert (found.default.fresh_pairs, found.best.fresh_pairs) == (6, 6)
    assert said(found)["best"] == "trial 1: 702 mJ/token (95 % CI 700 mJ to 705 mJ), from 6 fresh pairs"


def test_without_pairs_the_searchs_figures_are_named_as_such_and_as_not_confirmed():
    lines = said(assessed(pairs=()))
    own = "the search's own figure, with the noise assumed"
    assert lines["default"] == f"1.10 J/token (95 % CI 1.06 J to 1.14 J), {own}"
    assert lines["best"] == f"trial 1: 600 mJ/token (95 % CI 577 mJ to 624 mJ), {own}, not confirmed"
    assert lines["saving"] == "none shown: nothing was confirmed; `tune confirm results/s` measures fresh pairs"


def test_a_year_is_365_days_of_the_load():
    found = assessed()
    assert found.best.per_year.kwh.value == pytest.approx(found.best.per_million.kwh.value * 50 * 365)


def test_the_saving_spans_the_intervals_of_the_share_and_of_the_defaults_level():
    found = assessed()
    shown = saving(PAIRS, study().header)
    default = found.default.joules_per_unit
    assert found.saved.joules_per_unit == Interval(
        default.value * (1 - shown.ratio), default.low * (1 - shown.high), default.high * (1 - shown.low)
    )
    year = found.saved.per_year
    assert year.cost.value == pytest.approx(default.value * (1 - shown.ratio) * 50e6 * 365 * 1.2 / 3.6e6 * 0.25)
    assert year.grams.low == pytest.approx(default.low * (1 - shown.high) * 50e6 * 365 * 1.2 / 3.6e6 * 400)


levels = st.floats(min_value=0.5, max_value=2.0)


@given(st.lists(st.tuples(levels, levels), min_size=6, max_size=9))
def test_each_side_of_fresh_pairs_has_the_interval_of_its_own_launches(energies):
    found = assessed(pairs=[pair(n, *each) for n, each in enumerate(energies)])
    for figure, side in zip((found.default, found.best), zip(*energies, strict=True), strict=True):
        low, high = paired_interval([math.log(value) for value in side])
        expected = (statistics.geometric_mean(side), math.exp(low), math.exp(high))
        joules = figure.joules_per_unit
        assert (joules.value, joules.low, joules.high) == pytest.approx(expected, rel=1e-12)
        assert joules.low <= joules.value <= joules.high
        assert (figure.ends, figure.sampling) == ("95 % CI", joules)


def test_the_interval_goes_into_kwh_money_and_carbon_of_a_million_and_of_a_year():
    for figure in (assessed().default, assessed(pairs=()).best):
        each = figure.joules_per_unit
        assert each.low < each.value < each.high
        for amount, units in ((figure.per_million, 1e6), (figure.per_year, 50e6 * 365)):
            for name, rate in (("kwh", 1.0), ("cost", 0.25), ("grams", 400.0)):
                for end in ("low", "value", "high"):
                    expected = getattr(each, end) * units * 1.2 / 3.6e6 * rate
                    assert getattr(getattr(amount, name), end) == pytest.approx(expected)


def test_below_six_pairs_there_is_no_interval_and_it_is_said():
    for count, launches in ((5, "5 fresh pairs (5 launches"), (1, "1 fresh pair (1 launch")):
        found = assessed(pairs=PAIRS[:count])
        assert found.default.joules_per_unit.low == found.default.joules_per_unit.high
        assert (found.default.ends, found.default.sampling) == (None, None)
        assert said(found)["default"].endswith(f"J/token, from {launches}, too few for an interval)")


def test_the_searchs_own_figure_has_the_interval_that_the_search_gives_it():
    history = History(trials=(launch(0, 1.1), launch(1, 0.6)), noise=Noise(0.01, 7, "calibration c"))
    found = assessed(history=history, pairs=())
    joules = found.best.joules_per_unit
    assert (joules.low, joules.high) == interval(history.trials[1], noise(history))
    line = said(found)["best"]
    assert line == "trial 1: 600 mJ/token (95 % CI 586 mJ to 614 mJ), the search's own figure, not confirmed"


@given(st.lists(st.tuples(positive, positive), min_size=6, max_size=6), positive)
def test_a_saving_has_a_number_exactly_when_the_pairs_show_one(energies, spent):
    pairs = [pair(n, default, best, spent=spent) for n, (default, best) in enumerate(energies)]
    found = study(pairs=pairs)
    shown = saving(pairs, found.header)
    result = assess(found, shown, ALL)
    assert (result.saved is not None) == (result.payback is not None) == shown.shown
    if result.saved:
        kept, after = result.saved.joules_per_unit, result.payback.units
        assert 0 < kept.low <= kept.value <= kept.high
        assert 0 < after.low <= after.value <= after.high
    else:
        lines = said(result)
        assert lines["saved a year"] == "none shown"
        assert lines["pays back"] == "never shown to pay back"
        assert not any(name.startswith("saved, ") for name in lines)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (study(pairs=PAIRS[:2]), "2 of 6 fresh pairs are done"),
        (study(pairs=[pair(n, 1.0, 0.9 + 0.1 * n) for n in range(6)]), "95 % CI -40 to 10 %, 6 fresh pairs"),
        (study(trials=[launch(0, 1.0)], pairs=()), "no setting used less energy than the default in the search"),
        (
            study(trials=[trial(0, error="x"), launch(1, 1.0)], pairs=()),
            "the default was not measured, so there is nothing to compare with",
        ),
        (
            study(pairs=[replace(p, best=trial(1, BEST, error="crash")) for p in PAIRS]),
            "the confirmation could not be measured",
        ),
        (study(pairs=[pair(0, planned=1)]), "no interval from 1 fresh pair"),
    ],
)
def test_where_no_saving_is_shown_the_reason_stands_in_its_place(found, reason):
    assert said(assessed(found, NOTHING))["saving"] == f"none shown: {reason}"


def test_a_setting_that_failed_in_fresh_launches_is_why_nothing_is_shown():
    pairs = [*PAIRS[:5], replace(PAIRS[5], best=trial(1, BEST, error="crash"))]
    lines = said(assess(study(pairs=pairs), None, NOTHING))
    assert lines["saving"] == "none shown: the best setting failed in some of its fresh launches"


def test_an_interval_of_more_than_95_percent_says_so():
    shown = replace(saving(PAIRS, study().header), confidence=0.975)
    assert said(assess(study(), shown, NOTHING))["saving"] == "30 % (97.5 % CI 30 to 31 %, 6 fresh pairs)"


def test_what_the_saving_costs_in_quality_stands_beside_it():
    found = study()
    shown = replace(saving(found.pairs, found.header), loss="quality_loss 0.25 nats/token")
    line = said(assess(found, shown, NOTHING))["saving"]
    assert line == "30 % (95 % CI 30 to 31 %, 6 fresh pairs); quality_loss 0.25 nats/token"


def test_pairs_that_are_not_complete_claim_nothing_whatever_they_show():
    found = study(pairs=PAIRS[:4])
    shown = Saving(ratio=0.7, low=0.69, high=0.71, pairs=4, quality="measured", best_joules_per_unit=0.7)
    assert assess(found, shown, ALL).saved is None


def test_a_saving_without_pairs_in_the_study_claims_nothing():
    shown = Saving(ratio=0.7, low=0.69, high=0.71, pairs=8, quality="measured", best_joules_per_unit=0.7)
    assert assess(study(pairs=()), shown, ALL).saved is None


def test_pairs_of_another_machine_do_not_count():
    later = Segment(number=1, differences=("cpu",), machine={"cpu": "EPYC"}, identity={})
    here = [replace(launch(n, j), segment=1) for n, j in ((0, 1.3), (1, 1.2))]
    found = study(history=History(trials=tuple(here), segment=1), segments=(later,))
    result = assess(found, saving(PAIRS, found.header), ALL)
    assert (result.default.joules_per_unit.value, result.default.fresh_pairs) == (1.3, 0)
    assert result.saved is None


# --- what is not measured --------------------------------------------------------------------


@pytest.mark.parametrize("quality", ["sampled", "replayed", "simulated", "estimated"])
def test_what_is_not_measured_says_so_wherever_its_number_goes(quality):
    pairs = [pair(n, 1.0, 0.5 + 0.001 * n, quality=quality) for n in range(8)]
    found = study(trials=[launch(0, 1.0, quality=quality), launch(1, 0.5, quality=quality)], pairs=pairs)
    shown = Saving(ratio=0.5, low=0.4, high=0.6, pairs=8, quality=quality, best_joules_per_unit=0.5)
    lines = said(assess(found, shown, ALL))
    numbers = [name for name in lines if name.split(",")[0] in ("default", "best", "saving", "saved", "saved a year")]
    assert len(numbers) == 9
    for name in (*numbers, "tuning took", "pays back"):
        assert f", {quality}" in lines[name], name


def test_a_measured_energy_has_no_label():
    assert not any(q in line for line in said(assessed()).values() for q in ("estimated", "sampled", "measured,"))


def test_an_estimates_sums_span_its_power_range():
    pairs = [pair(n, quality="estimated") for n in range(6)]
    shown = Saving(ratio=0.7, low=0.6, high=0.8, pairs=6, quality="estimated", best_joules_per_unit=0.7)
    found = assess(study(pairs=pairs), shown, ALL)
    for figure, value in ((found.default, 1.0), (found.best, 0.7)):
        assert figure.joules_per_unit.low == pytest.approx(value * 0.5)
        assert figure.joules_per_unit.high == pytest.approx(value * 1.5)
    assert found.saved.joules_per_unit.low == pytest.approx(0.5 * (1 - 0.8))
    assert found.saved.joules_per_unit.high == pytest.approx(1.5 * (1 - 0.6))
    assert said(found)["default"] == (
        "1.00 J/token (the wider of 95 % CI and power range 500 mJ to 1.50 J), estimated, from 6 fresh pairs"
    )


def test_an_estimate_that_scatters_beyond_its_power_range_has_the_wider_end():
    pairs = [pair(n, 0.1 if n % 2 else 10.0, quality="estimated") for n in range(6)]
    joules = assessed(pairs=pairs).default.joules_per_unit
    assert (joules.low, joules.high) == pytest.approx((0.1, 10.0))


def test_an_estimates_payback_has_the_intervals_and_not_the_power_range():
    pairs = [replace(p, default=launch(0, v, quality="estimated")) for p, v in zip(PAIRS, (1, 1.1) * 3, strict=True)]
    shown = Saving(ratio=0.7, low=0.6, high=0.8, pairs=6, quality="estimated", best_joules_per_unit=0.7)
    found = assess(study(pairs=pairs), shown, ALL)
    assert found.payback.units.low == pytest.approx(14_000 / (1.1 * 0.4))
    assert found.payback.units.high == pytest.approx(14_000 / (1.0 * 0.2))


def stepped(number, joules):
    """A launch whose counter moves in steps of 2 J: 100 tokens, 1 J up or down."""
    ran = launch(number, joules)
    energy = Energy(100 * joules, 100 * joules - 1, 100 * joules + 1)
    return replace(ran, measurements=(replace(ran.measurements[0], energy={"cpu0": energy}),))


def test_the_steps_of_a_counter_come_on_top_of_the_interval():
    pairs = [replace(pair(n), default=stepped(0, 1.0 + 0.1 * (n % 2)), best=stepped(1, 0.7)) for n in range(6)]
    found = assessed(pairs=pairs)
    joules = found.default.joules_per_unit
    assert (joules.low, joules.high) == pytest.approx((0.99, 1.11), abs=1e-4)
    assert found.default.ends == "95 % CI and the counter's steps"
    alone = assessed(pairs=pairs[:1])
    assert (alone.default.joules_per_unit.low, alone.default.ends) == (pytest.approx(0.99), "the counter's steps")


def test_an_estimates_range_alone_is_named_as_such():
    lines = said(assessed(pairs=[pair(0, quality="estimated")]))
    source = "from 1 fresh pair (1 launch, too few for an interval)"
    assert lines["default"] == f"1.00 J/token (power range 500 mJ to 1.50 J), estimated, {source}"


def test_an_estimate_of_nothing_is_zero_and_not_an_error():
    found = assessed(trials=[launch(0, 0.0, quality="estimated"), launch(1, 1.0, quality="estimated")], pairs=())
    assert found.default.per_million.kwh.value == 0
    assert said(found)["default, 1M tokens"] == "0 kWh, 0 EUR, 0 gCO2e, estimated"


@pytest.mark.parametrize(
    ("meter", "domain", "sentence"),
    [
        ("nvml", "gpu0", "GPU only (gpu0), not the whole system"),
        ("rapl", "cpu0", "cpu0 only, not the whole system"),
        ("wall", "wall", "at the wall (wall)"),
    ],
)
def test_the_part_of_the_system_that_was_measured_is_named(meter, domain, sentence):
    trials = [launch(0, 1.0, meter=meter, domain=domain)]
    assert said(assessed(options=NOTHING, trials=trials, pairs=()))["boundary"] == sentence


def test_with_a_wall_meter_it_is_said_when_a_pue_counts_twice():
    trials = [launch(0, 1.0, meter="wall", domain="wall")]
    found = assessed(trials=trials, pairs=())
    assert found.default.per_million.kwh.value == pytest.approx(1.2e6 / 3.6e6)
    assert "counts cooling twice for one that reads the room: then leave --pue out" in said(found)["boundary"]


# --- what the tuning cost --------------------------------------------------------------------


def test_every_launch_counts_once():
    """2 trials, 1 repeat, 12 of the pairs, 2 of the pruning: a kilojoule each."""
    history = History(trials=(launch(0, 1.1), launch(1, 0.6))).add(
        Repeat(trial=launch(1, 0.62), purpose="contender", after=2)
    )
    prune = Prune(
        number=0, kept=launch(1, 0.7), shorter=launch(1, 0.7), kept_first=True, config={}, dropped=("x",), planned=2
    )
    found = assessed(history=history, prunes=(prune,)).tuning
    assert (found.launches, found.counted, found.joules.value) == (17, 17, 17_000.0)
    assert found.amount.kwh.value == pytest.approx(17_000 * 1.2 / 3.6e6)


def test_launches_of_unknown_energy_are_said_and_make_the_sum_a_least():
    trials = [launch(0, 1.1, spent=None), launch(1, 0.6), trial(2, error="x")]
    lines = said(assessed(trials=trials))
    assert lines["tuning took"].startswith("at least 0.00433 kWh, 0.0011 EUR, 1.7 gCO2e")
    assert lines["tuning took"].endswith("; 2 of 15 launches are not in it")
    assert lines["pays back"].startswith("after at least 42 000 tokens (")


def test_a_tuning_of_unknown_energy_has_no_number():
    pairs = [pair(n, 1.0, 0.7 + 0.001 * n, spent=None) for n in range(6)]
    found = assessed(trials=[launch(0, 1.1, spent=None)], pairs=pairs)
    assert (found.tuning.joules, found.tuning.amount, found.payback) == (None, None, None)
    assert said(found)["tuning took"] == "energy not known: none of its 13 launches recorded it"
    assert said(found)["pays back"] == "not known, as the energy of the tuning is not"


def test_energy_of_launches_that_measured_nothing_is_of_unknown_quality():
    lost = trial(0, error="x", spent={"cpu0": Energy(50.0, 40.0, 60.0)})
    lines = said(assessed(options=NOTHING, trials=[lost], pairs=()))
    assert lines["tuning took"] == "0.0000139 kWh (0.0000111 to 0.0000167), of unknown quality; 1 launch"
    assert lines["default"] == "not measured"
    assert lines["boundary"] == "nothing was measured"


def test_it_pays_back_after_the_tunings_energy_over_the_saving_of_a_unit():
    found = assessed()
    assert found.payback.units.value == pytest.approx(14_000 / found.saved.joules_per_unit.value)
    assert found.payback.units.low == pytest.approx(14_000 / found.saved.joules_per_unit.high)
    assert found.payback.units.high == pytest.approx(14_000 / found.saved.joules_per_unit.low)
    assert found.payback.days.value == pytest.approx(found.payback.units.value / 50e6)


@given(st.floats(min_value=1, max_value=10))
def test_pue_and_price_do_not_change_the_payback_in_energy(pue):
    assert assessed(options=replace(ALL, pue=pue)).payback == assessed().payback


def chat(*counts):
    """A proposal whose answers used these tokens."""
    exchanges = tuple(
        Exchange(prompt="p", reply=Reply(text="", model="m", input_tokens=read, output_tokens=written))
        for read, written in counts
    )
    return Proposal(config={}, source="llm", exchanges=exchanges)


def with_chat(*counts, **more):
    return assessed(trials=[launch(0, 1.1), replace(launch(1, 0.6), proposal=chat(*counts))], **more)


def test_the_llm_costs_its_tokens():
    found = with_chat((40_000, 5_000), (300, 100))
    assert found.llm.cost == pytest.approx((40_300 * 2.5 + 5_100 * 10) / 1e6)
    assert said(found)["LLM"] == "2 prompts, 40 300 tokens in and 5 100 out: 0.15 EUR"


def test_a_prompt_without_a_count_is_said_and_makes_the_cost_a_least():
    lines = said(with_chat((40_000, 5_000), (None, None)))
    assert lines["LLM"] == "2 prompts, 40 000 tokens in and 5 000 out: at least 0.15 EUR; 1 of 2 prompts is not in it"
    assert "after at least" in lines["pays back, LLM too"]
    assert "at least" not in lines["pays back"]


def test_a_count_that_is_half_known_shows_the_other_half_as_unknown():
    assert said(with_chat((40_000, None), options=NOTHING))["LLM"] == (
        "1 prompt, 40 000 tokens in and ? out; 1 of 1 prompt is not in it"
    )


def test_tokens_that_nobody_counted_have_no_cost():
    found = with_chat((None, None))
    assert found.llm.cost is None
    assert said(found)["LLM"] == "1 prompt, tokens not counted by the provider"
    assert found.payback_money is None


def test_answers_that_led_to_no_trial_cost_too():
    asked = chat((1000, 0)).exchanges
    history = History(trials=(launch(0, 1.1), launch(1, 0.6)), lost=(Lost(before_trial=2, exchanges=asked),))
    history = history.add(Decision(action="reject", before_trial=2, proposal=chat((500, 0))))
    assert assessed(history=history).llm.input_tokens == 1500


def test_without_an_llm_nothing_was_paid_for_one():
    found = assessed()
    assert (found.llm.cost, found.payback_money) == (0.0, None)
    assert said(found)["LLM"] == "none took part"


def test_in_money_the_llm_has_to_be_earned_back_as_well():
    """Tuning energy and LLM, over the money that a unit saves: at the ends of the interval too."""
    found = with_chat((1_000_000, 0))
    for end in ("value", "low", "high"):
        other = {"value": "value", "low": "high", "high": "low"}[end]
        a_unit = getattr(found.saved.per_million.cost, other) / 1e6
        paid = found.tuning.amount.cost.value + 2.5
        assert getattr(found.payback_money.units, end) == pytest.approx(paid / a_unit)
    assert said(found)["pays back, LLM too"].startswith("in money after ")


@pytest.mark.parametrize("options", [replace(ALL, price_per_kwh=None), replace(ALL, price_per_kwh=0.0)])
def test_without_a_price_of_energy_there_is_no_payback_in_money(options):
    assert with_chat((1_000_000, 0), options=options).payback_money is None


def test_a_saving_that_may_be_worth_nothing_may_never_earn_the_llm_back():
    none = replace(window(1.0, quality="estimated"), energy={"cpu0": Energy(100.0, 0.0, 200.0)})
    pairs = [replace(pair(n), default=replace(launch(0, 1.0), measurements=(none,))) for n in range(6)]
    shown = Saving(ratio=0.7, low=0.6, high=0.8, pairs=6, quality="estimated", best_joules_per_unit=0.7)
    trials = [launch(0, 1.1), replace(launch(1, 0.6), proposal=chat((1_000_000, 0)))]
    found = assess(study(trials=trials, pairs=pairs), shown, ALL)
    assert found.payback_money.units.high == math.inf
    assert "unbounded" in said(found)["pays back, LLM too"]


# --- saying it -------------------------------------------------------------------------------


def test_a_whole_assessment_reads_from_the_figures_to_what_is_missing():
    assert rows(with_chat((40_000, 5_000))) == [
        ("default", "1.01 J/token (95 % CI 1.00 J to 1.02 J), from 6 fresh pairs"),
        ("default, 1M tokens", "0.337 kWh (0.333 to 0.340), 0.084 EUR (0.083 to 0.085), 135 gCO2e (133 to 136)"),
        (
            "default, a year",
            "6 140 kWh (6 080 to 6 200), 1 540 EUR (1 520 to 1 550), 2 460 kgCO2e (2 430 to 2 480)",
        ),
        ("best", "trial 1: 702 mJ/token (95 % CI 700 mJ to 705 mJ), from 6 fresh pairs"),
        (
            "best, 1M tokens",
            "0.234 kWh (0.233 to 0.235), 0.0585 EUR (0.0583 to 0.0587), 93.7 gCO2e (93.3 to 94.0)",
        ),
        ("best, a year", "4 270 kWh (4 260 to 4 290), 1 070 EUR (1 060 to 1 070), 1 710 kgCO2e (1 700 to 1 720)"),
        ("saving", "30 % (95 % CI 30 to 31 %, 6 fresh pairs)"),
        ("saved, 1M tokens", "0.102 kWh (0.0983 to 0.107), 0.026 EUR (0.025 to 0.027), 41 gCO2e (39 to 43)"),
        ("saved a year", "1 870 kWh (1 790 to 1 950), 470 EUR (450 to 490), 750 kgCO2e (720 to 780)"),
        ("tuning took", "0.00467 kWh, 0.0012 EUR, 1.9 gCO2e; 14 launches"),
        ("LLM", "1 prompt, 40 000 tokens in and 5 000 out: 0.15 EUR"),
        ("pays back", "after 46 000 tokens (44 000 to 47 000), 1.3 minutes (1.3 minutes to 1.4 minutes) of that load"),
        (
            "pays back, LLM too",
            (
                "in money after 5.9 million tokens (5.7 million to 6.1 million),"
                " 2.8 hours (2.7 hours to 3.0 hours) of that load"
            ),
        ),
        (
            "counted",
            (
                "0.25 EUR/kWh; 400 gCO2e/kWh; PUE 1.2 in every kWh and what follows from it, not in J/token;"
                " 50 million tokens a day, all under the load that was measured"
            ),
        ),
        ("boundary", "cpu0 only, not the whole system"),
        ("not counted", NOT_COUNTED),
    ]


def test_what_happens_between_launches_is_named_as_not_counted():
    for part in ("cooling down", "starting workers", "waiting for the LLM or for a person", "calibration"):
        assert part in said(assessed())["not counted"]


def test_without_a_price_and_an_intensity_there_is_energy_only_and_it_is_said():
    lines = said(assessed(options=NOTHING))
    assert lines["default, 1M tokens"] == "0.281 kWh (0.278 to 0.283)"
    assert lines["counted"] == (
        "no price (--price); no carbon intensity (--carbon); PUE 1, so nothing is added for the building"
    )
    assert not any("EUR" in line or "CO2" in line for name, line in lines.items() if name != "counted")


@pytest.mark.parametrize(("currency", "cost"), [("", "cost 0.083"), ("EUR", "0.083 EUR"), ("$", "$0.083")])
def test_money_is_written_in_its_currency(currency, cost):
    options = CostOptions(price_per_kwh=0.3, currency=currency)
    trials = [launch(0, 1.0)]
    line = said(assessed(options=options, trials=trials, pairs=()))["default, 1M tokens"]
    assert line == f"0.278 kWh (0.267 to 0.289), {cost} (0.080 to 0.087)"


def test_images_are_counted_as_images():
    made = window(3.0)
    made = replace(made, work=replace(made.work, unit="image"))
    found = assessed(trials=[replace(trial(0), measurements=(made,))], pairs=())
    assert found.unit == "image"
    assert {"default, 1M images", "default, a year"} <= set(said(found))
    assert "50 million images a day" in said(found)["counted"]


@given(st.floats(min_value=1e-12, max_value=1e15), st.sampled_from([2, 3]))
def test_a_number_is_said_to_so_many_digits_and_read_back_it_is_that_close(value, digits):
    text = digits_text(value, digits)
    assert "e" not in text
    assert float(text.replace(" ", "")) == float(f"{value:.{digits - 1}e}")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.00213, "0.0021"), (1.0, "1.0"), (9.96, "10"), (1289, "1 300"), (2e6, "2 000 000")]
)
def test_two_digits_look_like_this(value, text):
    assert digits_text(value, 2) == text


@pytest.mark.parametrize(
    ("units_per_day", "spent", "text"),
    [
        (50e6, 1e3, "46 000 tokens (44 000 to 47 000), 1.3 minutes (1.3 minutes to 1.4 minutes)"),
        (1e9, 1e6, "46 million tokens (44 million to 47 million), 1.1 hours (1.0 hours to 1.1 hours)"),
        (1e9, 1e8, "4.6 billion tokens (4.4 billion to 4.7 billion), 4.6 days (4.4 days to 4.7 days)"),
        (1e6, 1e11, "4.6 trillion tokens (4.4 trillion to 4.7 trillion), 12 000 years (12 000 years to 13 000 years)"),
    ],
)
def test_a_payback_is_said_in_words_for_its_size(units_per_day, spent, text):
    pairs = [pair(n, 1.0 + 0.01 * (n % 3), 0.7 + 0.005 * (n % 2), spent=spent) for n in range(6)]
    trials = [launch(0, 1.1, spent=spent), launch(1, 0.6, spent=spent)]
    line = said(assessed(options=replace(ALL, units_per_day=units_per_day), trials=trials, pairs=pairs))["pays back"]
    assert text in line


def test_a_given_load_keeps_its_digits():
    assert "1.2345 million tokens a day" in said(assessed(options=replace(ALL, units_per_day=1_234_500.0)))["counted"]
    assert "800 tokens a day" in said(assessed(options=replace(ALL, units_per_day=800.0)))["counted"]


def test_an_empty_study_is_assessed_too():
    lines = said(assessed(trials=[], pairs=()))
    assert lines["default"] == "not measured"
    assert lines["tuning took"] == "energy not known: none of its 0 launches recorded it"


def test_a_trial_that_was_never_measured_makes_no_figure():
    assert isinstance(trial(0, error="x"), Trial)
    assert assessed(trials=[trial(0, error="x")], pairs=()).default is None


# --- as JSON ---------------------------------------------------------------------------------


def test_the_record_has_every_figure_with_its_ends_and_what_it_is():
    found = with_chat((40_000, 5_000))
    plain = json.loads(json.dumps(record(found), allow_nan=False))
    for name, figure in (("default", found.default), ("best", found.best)):
        each = figure.joules_per_unit
        assert plain[name]["joules_per_unit"] == {"value": each.value, "low": each.low, "high": each.high}
        assert (plain[name]["ends"], plain[name]["quality"]) == ("95 % CI", "measured")
        assert plain[name]["per_year"]["cost"]["low"] == figure.per_year.cost.low
    assert plain["options"]["price_per_kwh"] == 0.25
    assert plain["options"]["currency"] == "EUR"
    assert plain["saved"]["per_million"]["grams"]["high"] == found.saved.per_million.grams.high
    assert plain["payback"]["days"]["value"] == found.payback.days.value
    assert (plain["confirmed"], plain["pairs"], plain["planned"]) == (True, 6, 6)
    lines = said(found)
    for name in ("counted", "boundary", "not_counted"):
        assert plain[name] == lines[name.replace("_", " ")]


def test_the_record_names_no_folder():
    assert "results/s" not in json.dumps(record(assessed()))


@given(positive, st.sampled_from(["measured", "estimated"]))
def test_the_record_is_strict_json_and_comes_back_as_it_was(joules, quality):
    plain = record(assessed(trials=[launch(0, joules, quality=quality)], pairs=()))
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_what_is_unbounded_is_null():
    none = replace(window(1.0, quality="estimated"), energy={"cpu0": Energy(100.0, 0.0, 200.0)})
    pairs = [replace(pair(n), default=replace(launch(0, 1.0), measurements=(none,))) for n in range(6)]
    shown = Saving(ratio=0.7, low=0.6, high=0.8, pairs=6, quality="estimated", best_joules_per_unit=0.7)
    trials = [launch(0, 1.1), replace(launch(1, 0.6), proposal=chat((1_000_000, 0)))]
    assert record(assess(study(trials=trials, pairs=pairs), shown, ALL))["payback_money"]["units"]["high"] is None


def test_a_default_of_which_nothing_may_be_left_may_never_pay_back():
    """A counter whose steps are as large as what it read."""
    coarse = replace(window(1.0), energy={"cpu0": Energy(100.0, 0.0, 200.0)})
    pairs = [replace(pair(n), default=replace(launch(0, 1.0), measurements=(coarse,))) for n in range(6)]
    shown = Saving(ratio=0.7, low=0.6, high=0.8, pairs=6, quality="measured", best_joules_per_unit=0.7)
    assert assess(study(pairs=pairs), shown, ALL).payback.units.high == math.inf


def test_a_saving_is_recorded_with_its_interval_and_its_sentence():
    found = study()
    shown = saving(found.pairs, found.header)
    plain = json.loads(json.dumps(saving_record(shown, concluded(found)), allow_nan=False))
    assert (plain["ratio"], plain["low"], plain["high"]) == (shown.ratio, shown.low, shown.high)
    assert (plain["pairs"], plain["quality"], plain["shown"]) == (6, "measured", True)
    assert plain["sentence"].startswith("Trial 1 saves 30 % (95 % CI ")


def test_without_a_confirmation_the_record_says_so_and_has_no_number():
    plain = saving_record(None, None)
    assert plain.pop("sentence") == "Not confirmed, so no saving is claimed."
    assert plain.pop("shown") is False
    assert set(plain) >= {"ratio", "low", "high", "pairs", "quality"}
    assert set(plain.values()) == {None}
