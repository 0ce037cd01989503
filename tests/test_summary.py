import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import LOSSY, SPACE, lossy, trial, window

from tuner import summary
from tuner.summary import (
    ASSUMED,
    against,
    best_at_equal_quality,
    clean,
    effects,
    half_width,
    interval,
    loss_text,
    noise,
)
from tuner.trial import Decision, Energy, Exchange, History, Noise, Proposal, Reply, Work


def history(*trials):
    return History(trials=trials)


# --- what it costs in quality ---


def of_images(launch):
    return replace(
        launch, measurements=tuple(replace(m, work=Work(units=4, unit="image")) for m in launch.measurements)
    )


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (lossy(1, "q8", 0.7, 0.01234), "quality_loss 0.01234 nats/token"),
        (of_images(lossy(1, "q8", 0.7, 0.25)), "quality_loss 0.25 (1 - SSIM)"),
        (lossy(1, "q8", 0.7), "quality not measured"),
        (lossy(1, "f16", 0.7, 0.01, parallel=8), ""),
        (trial(1, {"parallel": 8}), ""),
    ],
)
def test_what_a_lossy_setting_costs_is_said_with_its_unit(launch, said):
    assert loss_text(LOSSY.record(), [launch]) == said


def test_the_loss_is_the_mean_of_the_launches_that_measured_it():
    launches = [lossy(1, "q8", 0.7, 0.01), lossy(1, "q8", 0.7), lossy(1, "q8", 0.7, 0.03)]
    assert loss_text(LOSSY.record(), launches) == "quality_loss 0.02 nats/token"


DEFAULT = lossy(0, "f16", 1.0, 0.0)
WORSE = lossy(1, "q4", 0.5, 0.4)


@pytest.mark.parametrize(
    ("others", "number"),
    [
        ([], 0),
        ([lossy(2, "f16", 0.9, 0.3, parallel=8), lossy(3, "f16", 0.8, 0.3, parallel=2)], 3),
        ([lossy(2, "q8", 0.7, 1e-7)], 2),
        ([lossy(2, "q8", 0.7, -0.01)], 2),
        ([lossy(2, "q8", 0.7, 1e-5)], 0),
        ([lossy(2, "q8", 0.7)], 0),
        ([lossy(2, "q8", 0.4, 0.0)], None),
        ([lossy(2, "f16", 0.4, 0.2, parallel=8)], None),
    ],
)
def test_beside_a_best_that_loses_quality_stands_the_best_of_those_that_lose_none(others, number):
    found = best_at_equal_quality(history(DEFAULT, WORSE, *others), LOSSY.record(), ["ttft_p95_s<=1"])
    assert (found.number if found else None) == number


def test_a_loss_that_the_defaults_own_launches_show_is_none():
    judged_again = replace(DEFAULT, repeats=(lossy(0, "f16", 1.0, 0.002),))
    trials = (judged_again, WORSE, lossy(2, "q8", 0.7, 0.002), lossy(3, "q8", 0.6, 0.003, parallel=8))
    assert best_at_equal_quality(history(*trials), LOSSY.record(), []).number == 2


def test_a_limit_on_the_loss_says_itself_how_much_is_none():
    assert best_at_equal_quality(history(DEFAULT, WORSE), LOSSY.record(), ["quality_loss<=0.5"]) is None


# --- one trial against another ---


def launched(number, *energies, **changes):
    """A trial with one launch for each energy."""
    first, *others = (trial(number, changes, joules=(joules,)) for joules in energies)
    return replace(first, repeats=tuple(others))


CALIBRATED = Noise(sigma=0.01, degrees=7, source="calibration X")


def test_the_interval_of_a_trial_is_students_with_the_noise_of_launches():
    # t(0.975, 7) = 2.364624, over 4 launches of the geometric mean 1.
    low, high = interval(launched(0, 1.0, 1.02, 1 / 1.02, 1.0), CALIBRATED)
    assert (math.log(low), math.log(high)) == pytest.approx((-0.01182312, 0.01182312), abs=1e-8)


def test_the_noise_pools_the_scatter_of_repeats_with_the_calibration():
    # Two launches at ln 0 and ln 0.04: variance 0.0008 with 1 degree, beside 0.0001 with 7.
    lived = History(trials=(launched(0, 1.0, math.exp(0.04)),), noise=CALIBRATED)
    assert noise(lived).sigma == pytest.approx(math.sqrt((0.0008 + 7 * 0.0001) / 8))
    assert noise(lived).degrees == 8
    assert noise(lived).source == "calibration X and the repeats of this study"


def test_without_repeats_and_calibration_the_noise_is_assumed():
    assert noise(history(trial(0), trial(1))) is ASSUMED


def test_few_repeats_can_raise_the_assumed_noise_and_never_lower_it():
    assert noise(history(launched(0, 1.0, 1.001))) is ASSUMED
    raised = noise(history(launched(0, 1.0, 1.2)))
    assert raised.sigma == pytest.approx(math.log(1.2) / math.sqrt(2))
    assert raised.degrees == 0


def test_windows_widen_an_assumed_noise_but_not_a_known_one():
    # ln(0.98, 1, 1.02) has sd 0.020003, half width 4.30265 * 0.020003 / sqrt(3) = 0.049690; assumed: 1.96 * 0.02.
    scattered = trial(0, joules=(0.98, 1.0, 1.02))
    assert half_width(scattered, ASSUMED) == pytest.approx(0.049690, abs=1e-6)
    assert half_width(scattered, CALIBRATED) == pytest.approx(0.02364624)


def test_windows_that_scatter_three_times_more_than_the_known_noise_says_are_believed():
    # ln(0.9, 1, 1.1) has sd 0.100377, half width 4.30265 * 0.100377 / sqrt(3) = 0.249351.
    assert half_width(trial(0, joules=(0.9, 1.0, 1.1)), CALIBRATED) == pytest.approx(0.249351, abs=1e-6)


@pytest.mark.parametrize("unknown", [trial(0, error="killed"), trial(0, joules=(0.0,))])
def test_there_is_no_interval_where_there_is_no_logarithm(unknown):
    assert interval(unknown, ASSUMED) is None


def test_a_ratio_agrees_with_welch_by_scipy_where_the_windows_say_more_than_the_assumption():
    from scipy import stats

    a, b = (0.50, 0.52, 0.51, 0.49), (1.0, 1.1, 0.95)
    found = against(trial(1, joules=a), trial(0, joules=b))
    welch = stats.ttest_ind([math.log(x) for x in a], [math.log(x) for x in b], equal_var=False)
    degrees = math.floor(welch.df)
    half = stats.t.ppf(0.975, degrees) * welch._standard_error
    assert math.log(found.high / found.low) == pytest.approx(2 * half)
    assert found.ratio == pytest.approx((sum(a) / 4) / (sum(b) / 3))


@pytest.mark.parametrize(
    ("ours", "theirs", "within_noise"),
    [
        ((0.70, 0.71, 0.69), (1.00, 1.01, 0.99), False),
        ((0.98, 0.98, 0.98), (1.00, 1.00, 1.00), True),  # below the assumption, however well the windows agree
        ((0.70, 1.20, 0.90), (1.00, 1.40, 0.80), True),  # the interval holds 1
        ((0.70,), (1.00,), False),  # the assumption alone decides
        ((1.01,), (1.00,), True),
    ],
)
def test_within_noise_is_what_windows_and_assumption_cannot_tell_apart(ours, theirs, within_noise):
    assert against(trial(1, joules=ours), trial(0, joules=theirs)).within_noise is within_noise


def test_more_launches_tell_smaller_differences_apart():
    once = against(launched(1, 0.98), launched(0, 1.0), CALIBRATED)
    often = against(launched(1, *[0.98] * 4), launched(0, *[1.0] * 4), CALIBRATED)
    assert (once.within_noise, often.within_noise) == (True, False)


def test_trials_that_cannot_be_told_from_the_best_are_named():
    lived = history(trial(0), trial(1, joules=(0.70,)), trial(2, joules=(0.71,)), trial(3, error="killed"))
    assert summary.indistinguishable(lived) == {2}


@pytest.mark.parametrize(
    ("known", "sentence"),
    [
        (ASSUMED, "launches of one configuration are assumed to differ by 2.0 %; `tune calibrate` measures it"),
        (
            CALIBRATED,
            "launches of one configuration differ by 1.0 % (standard deviation, from calibration X)",
        ),
        (
            Noise(0.1, 0, "the repeats of this study"),
            "launches of one configuration seem to differ by 10 %; `tune calibrate` measures it",
        ),
    ],
)
def test_where_the_intervals_come_from_is_said(known, sentence):
    assert summary.noise_text(known) == sentence


@pytest.mark.parametrize("other", [trial(1, error="killed"), trial(1, segment=1), trial(1, joules=(0.0, 0.0))])
def test_what_cannot_be_compared_has_no_ratio(other):
    assert against(other, trial(0)) is None


# --- effects ---


def alone(number, joules, **changes):
    return trial(number, changes, joules=(joules,))


def found_in(*trials):
    return {(e.parameter, e.value): e for e in effects(SPACE, history(*trials))}


def test_two_trials_that_differ_in_one_parameter_give_its_effect():
    found = found_in(alone(0, 1.0), alone(1, 0.6, parallel=8))
    assert found["parallel", 8].ratio == pytest.approx(0.6)
    assert found["parallel", 8].sentence == "parallel 4 -> 8: 0.60x the energy (95 % CI 0.57x to 0.63x, 1 trial)"


def test_parameters_that_only_changed_together_have_no_effect_of_their_own():
    assert found_in(alone(0, 1.0), alone(1, 0.6, parallel=8, threads=1)) == {}


def test_a_third_trial_separates_what_changed_together():
    found = found_in(alone(0, 1.0), alone(1, 0.6, parallel=8, threads=1), alone(2, 1.2, threads=1))
    assert found["threads", 1].ratio == pytest.approx(1.2)
    assert found["parallel", 8].ratio == pytest.approx(0.5)


def test_effects_come_largest_first_whichever_way_they_point():
    trials = [alone(0, 1.0), alone(1, 0.9, parallel=8), alone(2, 2.0, threads=1), alone(3, 0.6, flash="on")]
    assert [e.parameter for e in effects(SPACE, history(*trials))] == ["threads", "flash", "parallel"]


def test_a_small_effect_is_said_to_be_none():
    found = found_in(alone(0, 1.0), alone(1, 1.01, threads=1))
    assert (
        found["threads", 1].sentence
        == "threads 2 -> 1: no effect beyond noise (1.01x, 95 % CI 0.96x to 1.07x, 1 trial)"
    )


def test_the_scatter_of_repeats_widens_the_noise():
    noisy = [alone(n, j) for n, j in enumerate((1.0, 1.5, 0.7, 1.3, 0.8))]
    assert found_in(*noisy, alone(5, 0.8, threads=1))["threads", 1].within_noise
    calm = [alone(n, j) for n, j in enumerate((1.0, 1.01, 0.99, 1.0, 1.0))]
    assert not found_in(*calm, alone(5, 0.8, threads=1))["threads", 1].within_noise


def test_failed_trials_and_other_segments_have_no_part_in_effects():
    old = replace(alone(1, 0.1, parallel=8), segment=0)
    new = [replace(alone(2, 1.0), segment=1), trial(3, {"threads": 1}, error="killed", segment=1)]
    assert effects(SPACE, history(old, *new)) == []


values = st.fixed_dictionaries(
    {
        "parallel": st.sampled_from([4, 8, 16]),
        "threads": st.sampled_from([1, 2, 3]),
        "flash": st.sampled_from(["auto", "on"]),
    }
)


@given(st.lists(values, max_size=9))
def test_on_data_without_noise_every_reported_effect_is_the_true_one(configs):
    truth = {
        ("parallel", 8): -0.4,
        ("parallel", 16): -0.3,
        ("threads", 1): 0.5,
        ("threads", 3): 0.1,
        ("flash", "on"): -0.07,
    }
    trials = [alone(n, math.exp(sum(truth.get(i, 0.0) for i in c.items())), **c) for n, c in enumerate(configs)]
    for effect in effects(SPACE, history(*trials)):
        assert math.log(effect.ratio) == pytest.approx(truth[effect.parameter, effect.value], abs=1e-9)


@given(st.lists(st.tuples(values, st.floats(0.1, 10)), min_size=2, max_size=9))
def test_an_effect_is_reported_exactly_where_the_rank_says_it_is_determined(runs):
    import numpy as np

    trials = [alone(n, joules, **config) for n, (config, joules) in enumerate(runs)]
    names = sorted({(k, v) for t in trials for k, v in t.config.items() if v != SPACE[k].default}, key=str)
    design = np.array([[1.0, *(float(t.config[k] == v) for k, v in names)] for t in trials])
    determined = {
        name
        for i, name in enumerate(names, start=1)
        # A coefficient is determined where its unit vector adds nothing to the row space.
        if np.linalg.matrix_rank(np.vstack([design, np.eye(len(names) + 1)[i]])) == np.linalg.matrix_rank(design)
    }
    assert set(found_in(*trials)) == determined


# --- where the energy goes ---


def test_where_energy_goes_says_shares_power_and_speed():
    said = summary.where_energy_goes(trial(0, joules=(1.0, 1.0)))
    assert said == {
        "prefill": "25 % of the requests' time",
        "decode": "75 % of the requests' time",
        "speed": "50.0 tokens/s",
        "mean power": "50.0 W",
        "CPU use": "1.50 CPUs busy on average",
    }


def test_where_energy_goes_leaves_out_what_is_not_known():
    bare = replace(window(1.0), cpu_seconds=None, work=replace(window(1.0).work, prefill_seconds=None))
    assert set(summary.where_energy_goes(replace(trial(0), measurements=(bare, window(1.0))))) == {
        "speed",
        "mean power",
    }
    assert summary.where_energy_goes(trial(1, error="killed")) == {}


def test_where_energy_goes_splits_domains_and_labels_what_is_not_measured():
    two = replace(window(1.0, quality="estimated"), energy={"cpu0": Energy(75, 1, 99), "dram0": Energy(25, 1, 99)})
    two = replace(two, peak_memory_bytes=1_234_000_000)
    said = summary.where_energy_goes(replace(trial(0), measurements=(two,)))
    assert said["energy of dram0"] == "25 % of the total (estimated)"
    assert said["mean power"] == "50.0 W (estimated)"
    assert said["peak memory"] == "1.23 GB"


# --- usage ---


def exchange(text, tokens=(10, 3)):
    return Exchange(prompt=text, reply=Reply(text="", model="m", input_tokens=tokens[0], output_tokens=tokens[1]))


def test_usage_counts_prompts_of_proposals_that_were_turned_down_once():
    first = Proposal(config=SPACE.default(), source="llm", exchanges=(exchange("a"), exchange("b")))
    second = replace(first, exchanges=(exchange("c"),))
    lived = History(
        trials=(trial(0), trial(1, proposal=second)),
        decisions=(
            Decision(action="reject", before_trial=1, proposal=first),
            Decision(action="remark", before_trial=1, proposal=second, remark="x"),
            Decision(action="accept", before_trial=1, proposal=second),
        ),
    )
    assert [e.prompt for e in summary.exchanges(lived)] == ["a", "b", "c"]
    assert summary.usage(lived) == summary.Usage(prompts=3, input_tokens=30, output_tokens=9)


def test_usage_without_any_count_is_unknown_and_not_zero():
    pasted = Proposal(config=SPACE.default(), source="llm", exchanges=(exchange("a", (None, None)),))
    assert summary.usage(history(trial(0, proposal=pasted))) == summary.Usage(1, None, None)


def test_a_trial_typically_takes_the_median_of_those_measured():
    lived = history(trial(0), replace(trial(1), seconds=30.0), replace(trial(2), seconds=12.0), trial(3, error="x"))
    assert summary.typical_trial_seconds(lived) == 12.0
    assert summary.typical_trial_seconds(History()) is None


# --- saying it ---


def test_differences_come_in_the_order_of_the_space_and_only_where_there_are_any():
    config = {"flash": "on", "threads": 1, "parallel": 4}
    assert summary.differences(SPACE, config, SPACE.default()) == "threads 2 -> 1, flash auto -> on"
    assert summary.differences(SPACE, SPACE.default(), SPACE.default()) == ""


@pytest.mark.parametrize(
    ("joules", "text"),
    [
        (None, "-"),
        (0.0, "0 J"),
        (0.4123, "412 mJ"),
        (1.2, "1.20 J"),
        (0.9997, "1.00 J"),  # not 1000 mJ
        (12.345, "12.3 J"),
        (1234.5, "1.23 kJ"),
        (2.5e-7, "250 nJ"),
        (4.2e-5, "42.0 µJ"),
        (3e6, "3.00 MJ"),
        (-0.5, "-500 mJ"),
    ],
)
def test_joules_are_said_with_three_digits_and_a_prefix(joules, text):
    assert summary.joules_text(joules) == text


@given(st.floats(1e-8, 1e11))
def test_joules_as_said_are_right_to_half_a_percent(joules):
    number, prefix = re.fullmatch(r"([\d.]+) ([nµmkMG]?)J", summary.joules_text(joules)).groups()
    scale = {"n": 1e-9, "µ": 1e-6, "m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9}[prefix]
    assert float(number) * scale == pytest.approx(joules, rel=0.0051)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_seconds_are_said_as_a_person_would(seconds, text):
    assert summary.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0, "0"), (0.12345, "0.123"), (45.67, "45.7"), (1234.5, "1234"), (99.96, "100")]
)
def test_numbers_are_said_with_three_digits_and_no_exponent(value, text):
    assert summary.number_text(value) == text


@pytest.mark.parametrize(("share", "text"), [(0.1234, "12 %"), (0.021, "2.1 %"), (0.0996, "10 %")])
def test_percentages_have_a_decimal_below_ten(share, text):
    assert summary.percent_text(share) == text


@pytest.mark.parametrize(("size", "text"), [(999, "999 B"), (2_500, "2.50 kB"), (812e6, "812 MB")])
def test_bytes_are_said_in_powers_of_a_thousand(size, text):
    assert summary.bytes_text(size) == text


@pytest.mark.parametrize(
    ("sigma", "text"),
    [(0.04, "1.00 J/token ± 8.2 %"), (0.06, "1.00 J/token (889 mJ to 1.12 J)")],
)
def test_an_interval_wider_than_10_percent_shows_both_its_ends(sigma, text):
    # 1.959964 * 0.06 = 0.117598, exp of it 1.1248 and its inverse 0.8891; 1.959964 * 0.04 = 0.0784.
    assumed = Noise(sigma, 0, "assumed")
    assert summary.energy_text(trial(0, joules=(1.0,)), assumed) == text


def test_a_wide_interval_says_from_how_many_launches_it_is():
    assert summary.interval_text(launched(0, 1.0, 1.0), Noise(0.1, 0, "assumed")) == "(871 mJ to 1.15 J) (2x)"


def test_causes_that_differ_in_their_numbers_only_are_one_in_its_first_wording():
    assert summary.grouped(["1.52 of 2 CPUs", "gpu0: reset", "1.48 of 2 CPUs", "gpu1: reset"]) == {
        "1.52 of 2 CPUs": 2,
        "gpu0: reset": 1,
        "gpu1: reset": 1,
    }


def test_an_energy_that_is_not_measured_says_so():
    estimated = replace(trial(0), measurements=tuple(window(j, quality="estimated") for j in (1.05, 1.05)))
    known = Noise(0.01, 7, "calibration")
    assert summary.energy_text(estimated, known) == "1.05 J/token ± 2.4 % estimated"
    assert summary.energy_text(launched(0, 1.0, 1.0), known) == "1.00 J/token ± 1.7 % (2x)"
    assert summary.energy_text(trial(0, error="killed"), known) == "failed"


def test_a_fallback_names_whose_place_it_takes():
    fallback = Proposal(config=SPACE.default(), source="rules", in_place_of="llm")
    assert summary.source_text(trial(1, proposal=fallback)) == "rules for llm"


def test_the_sparkline_is_high_for_much_energy_and_marks_failures():
    assert summary.sparkline([alone(0, 1.0), alone(1, 0.5), trial(2, error="x"), alone(3, 0.7)]) == "█▁×▄"
    assert summary.sparkline([trial(0, error="x")]) == "×"


def test_the_sparkline_does_not_blow_up_noise():
    assert summary.sparkline([alone(0, 1.0), alone(1, 1.005)]) == "▁▁"


# --- text from outside ---


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]52;c;c3RvbGVu\x07after", "after"),  # a write to the clipboard
        ("\x1b]0;title\x1b\\after", "after"),
        ("\x9b2Jgone", "gone"),
        ("a\r\nb\tc", "a b c"),
        ("back\x08space\x7f", "backspace"),
        ("\u202eabc\u2066", "abc"),
        ("\x1bPq#0\x1b\\sixel", "sixel"),
        ("cut \x1b[", "cut"),
        ("[bold]stays[/bold]", "[bold]stays[/bold]"),
        ("lone \ud800", "lone"),
    ],
)
def test_text_from_outside_cannot_act_on_a_terminal(text, cleaned):
    assert clean(text) == cleaned


@given(st.text())
def test_clean_text_has_no_control_characters_and_is_stable(text):
    cleaned = clean(text, lines=True)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", cleaned)
    assert clean(cleaned, lines=True) == cleaned
    assert "\n" not in clean(text)


def test_lines_are_kept_where_they_matter():
    assert clean("a\n  b", lines=True) == "a\n  b"
