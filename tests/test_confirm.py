import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import LOSSY, SPACE, lossy, trial, window

from tuner.cli import DEFAULT_PAIRS
from tuner.confirm import (
    LEAST_PAIRS,
    MOST_PRUNE_TESTS,
    Failures,
    Shortened,
    concluded,
    confirm,
    here,
    pair_order,
    pairs_of,
    prune,
    prune_pairs,
    saving,
    shortened,
    shown_by,
    verdict,
)
from tuner.evaluate import NO_VALID_WINDOW, Launcher
from tuner.intervals import sign_flip_interval
from tuner.journal import Header, Journal, Pair, Plan, Prune, Segment, read
from tuner.space import Int, SearchSpace
from tuner.trial import Energy, Target

HEADER = Header(name="s", workload="w", target=Target(), proposer="p", machine={"cores_logical": "2"})


def pair(number, default, best, quality=None):
    best_trial = trial(1, {"parallel": 8}, (best,)) if best else trial(1, {"parallel": 8}, error="crash")
    return Pair(
        number=number, default=trial(0, joules=(default,)), best=best_trial, default_first=True, config={}, planned=4
    )


def test_the_saving_is_one_minus_the_geometric_mean_of_the_pairs_ratios():
    found = saving([pair(0, 1.0, 0.5), pair(1, 1.0, 0.8)], HEADER)
    assert math.isclose(found.ratio, math.sqrt(0.5 * 0.8))


EIGHT = (0.70, 0.80, 0.75, 0.72, 0.78, 0.74, 0.76, 0.71)


def pairs_at(ratios):
    return [pair(n, 1.0, ratio) for n, ratio in enumerate(ratios)]


def test_the_interval_of_eight_pairs_is_students_t():
    """t(0.975, 7) = 2.364624251592785 (scipy.stats.t.ppf)."""
    found = saving(pairs_at(EIGHT), HEADER)
    logs = [math.log(v) for v in EIGHT]
    mean = sum(logs) / 8
    half = 2.364624251592785 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 7) / math.sqrt(8)
    assert (found.low, found.high) == pytest.approx((math.exp(mean - half), math.exp(mean + half)))


def test_the_interval_of_six_pairs_is_that_of_the_sign_flips():
    """Of six values the only centres left out are those beyond all of them."""
    found = saving(pairs_at(EIGHT[:6]), HEADER)
    assert (found.low, found.high) == pytest.approx((0.70, 0.80))
    found = saving(pairs_at(EIGHT[:7]), HEADER)
    low, high = sign_flip_interval([math.log(v) for v in EIGHT[:7]])
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)))


def test_a_saving_is_shown_only_when_the_whole_interval_is_below_the_default():
    assert saving(pairs_at([0.7] * 5 + [0.99]), HEADER).shown
    assert not saving(pairs_at([0.7] * 5 + [1.01]), HEADER).shown


@pytest.mark.parametrize("count", range(1, LEAST_PAIRS))
def test_fewer_than_six_pairs_have_a_ratio_and_show_nothing(count):
    found = saving(pairs_at([0.5] * count), HEADER)
    assert (found.ratio, found.low, found.high, found.shown) == (pytest.approx(0.5), None, None, False)


def test_no_pair_is_no_saving():
    assert saving([], HEADER) is None
    assert saving([pair(0, 1.0, None)], HEADER) is None


@given(st.lists(st.floats(0.2, 5), min_size=6, max_size=12), st.floats(0.1, 10))
def test_the_saving_does_not_depend_on_the_scale_of_the_energies(ratios, scale):
    found = saving(pairs_at(ratios), HEADER)
    scaled = saving([pair(n, scale, scale * ratio) for n, ratio in enumerate(ratios)], HEADER)
    assert (found.low, found.ratio, found.high) == pytest.approx((scaled.low, scaled.ratio, scaled.high))
    assert found.low <= found.ratio * (1 + 1e-12)
    assert found.high >= found.ratio * (1 - 1e-12)


def test_a_pair_with_a_failed_side_does_not_count():
    assert saving([pair(0, 1.0, 0.5), pair(1, 1.0, None), pair(2, 1.0, 0.5)], HEADER).pairs == 2


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(("count", "level"), [(6, 1 / 64), (7, 3 / 128), (8, 0.025)])
def test_equal_configurations_are_called_a_saving_as_rarely_as_the_interval_says(count, level):
    """Half of what a two-sided 95 % interval leaves out. 1500 studies with 3 % spread; 3 sd above."""
    rng = random.Random(7)
    claims = 0
    for _ in range(1500):
        pairs = [pair(n, math.exp(rng.gauss(0, 0.03)), math.exp(rng.gauss(0, 0.03))) for n in range(count)]
        claims += saving(pairs, HEADER).shown
    assert claims / 1500 < level + 3 * math.sqrt(level * (1 - level) / 1500)


def test_pairs_are_in_abba_order_so_that_steady_drift_cancels():
    assert [pair_order(n) for n in range(4)] == [True, False, True, False]
    drift = [1.00, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07]
    pairs = []
    for n in range(4):
        first, second = drift[2 * n], drift[2 * n + 1]
        pairs.append(pair(n, first, second) if pair_order(n) else pair(n, second, first))
    assert saving(pairs, HEADER).ratio == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("pairs", "planned", "sentence"),
    [
        ([], 0, "Not confirmed, so no saving is claimed."),
        ([], 4, "No saving is claimed: 0 of 4 fresh pairs are done."),
        ([pair(0, 1, 0.5)] * 3, 4, "No saving is claimed: 3 of 4 fresh pairs are done."),
        ([pair(n, 1, None) for n in range(4)], 4, "No saving shown: the confirmation could not be measured."),
        (
            [pair(n, 1, 0.7) for n in range(5)],
            5,
            "No saving shown: 5 pairs are too few for an interval of 95 %.",
        ),
        (
            [pair(n, 1, 1 + 0.01 * (-1) ** n) for n in range(8)],
            8,
            "No saving shown: that of the best setting has the 95 % CI -0.9 to 0.9 %, 8 pairs.",
        ),
        (
            pairs_at(EIGHT),
            8,
            "The best setting saves 26 % (95 % CI 23 to 28 %, 8 pairs).",
        ),
        (
            [*pairs_at(EIGHT[:7]), pair(7, 1, None)],
            8,
            "The best setting saves 25 % (95 % CI 22 to 28 %, 7 of 8 pairs, the others unmeasured).",
        ),
        (
            [pair(n, 1, 0.5 if n % 2 else 20) for n in range(6)],
            6,
            "No saving shown: that of the best setting has the 95 % CI below -1000 to 50 %, 6 pairs.",
        ),
        (
            [pair(n, 1, 0.7 + 0.001 * (-1) ** n) for n in range(8)],
            8,
            "The best setting saves 30 % (95 % CI 29.9 to 30.1 %, 8 pairs).",
        ),
        (
            [pair(n, 1, 30 + n) for n in range(6)],
            6,
            "No saving shown: that of the best setting has the 95 % CI below -1000 %, 6 pairs.",
        ),
    ],
)
def test_the_last_sentence_follows_from_the_pairs_alone(pairs, planned, sentence):
    assert verdict(saving(pairs, HEADER), len(pairs), planned).startswith(sentence)


def test_an_estimated_saving_is_called_estimated():
    measured = [pair(n, 1, 0.7 + 0.001 * n) for n in range(6)]
    assert "estimated" not in verdict(saving(measured, HEADER), 6, 6)
    sentence = verdict(saving(estimated_pairs(), HEADER), 6, 6)
    assert sentence.startswith("The best setting saves an estimated 30 %")
    assert "not measured" in sentence


def estimated_pairs():
    """Six, in which less time brings the same share of wall and of CPU seconds."""
    return [
        Pair(
            number=n,
            default=estimated_side(0, 10.0, 20.0),
            best=estimated_side(1, 7.0 + n / 100, 14.0),
            default_first=True,
            config={},
            planned=6,
        )
        for n in range(6)
    ]


# --- a counter with coarse steps ---


def stepped(launch, share):
    """The launch as a counter shows it whose steps may hide this share of each window's energy."""
    coarse = tuple(
        replace(
            m, energy={d: Energy(e.joules, e.joules * (1 - share), e.joules * (1 + share)) for d, e in m.energy.items()}
        )
        for m in launch.measurements
    )
    return replace(launch, measurements=coarse)


def coarse(pairs, share):
    return [replace(p, default=stepped(p.default, share), best=stepped(p.best, share)) for p in pairs]


@given(st.lists(st.floats(0.2, 5), min_size=6, max_size=12), st.floats(0.001, 0.2))
def test_the_interval_is_widened_by_what_the_steps_of_both_sides_may_hide(ratios, share):
    """Independent on both sides: sqrt(2) times that of one, in ln, at either end."""
    fine, found = (saving(pairs, HEADER) for pairs in (pairs_at(ratios), coarse(pairs_at(ratios), share)))
    widened = math.exp(2 * share)
    assert (found.low, found.ratio, found.high) == pytest.approx((fine.low / widened, fine.ratio, fine.high * widened))


def test_more_pairs_do_not_average_the_steps_out():
    few, many = (saving(coarse(pairs_at([0.8] * count), 0.03), HEADER) for count in (8, 64))
    assert few.steps == many.steps == pytest.approx(0.03 * 2)


def test_a_saving_that_the_steps_may_hide_is_not_shown():
    assert saving(pairs_at([0.97] * 8), HEADER).shown
    assert not saving(coarse(pairs_at([0.97] * 8), 0.03), HEADER).shown


def test_a_counter_whose_ends_are_its_value_has_no_steps():
    assert saving(pairs_at(EIGHT), HEADER).steps is None


def test_steps_of_a_pair_that_was_not_measured_do_not_count():
    pairs = [*coarse(pairs_at([0.8] * 6), 0.01), *coarse([pair(6, 1.0, None)], 0.5)]
    assert saving(pairs, HEADER).steps == pytest.approx(0.01 * 2)


def test_the_range_of_an_estimate_is_not_taken_for_steps():
    assert saving(estimated_pairs(), HEADER).steps is None


def test_steps_are_named_in_the_sentence_with_their_size():
    sentence = verdict(saving(coarse(pairs_at(EIGHT), 0.03), HEADER), 8, 8)
    assert sentence == (
        "The best setting saves 26 % (95 % CI 18 to 33 %, 8 pairs, of which the counter's own steps are ± 6.2 %)."
    )


def test_steps_below_a_tenth_of_a_percent_are_not_worth_a_word():
    assert "steps" not in verdict(saving(coarse(pairs_at(EIGHT), 0.0005), HEADER), 8, 8)


# --- measuring pairs ---


class Recorder(Launcher):
    def __call__(self, number, proposal):
        self.meter_options.setdefault("order", []).append((number, self.log_name))
        return trial(number, proposal.config, (1.0 if number == 0 else 0.8,), proposal=proposal)


def test_confirming_runs_both_sides_afresh_in_abba_order_and_goes_on_where_it_was_cut_short(tmp_path):
    launcher = Recorder(
        folder=tmp_path, runner=tmp_path, target=Target(), meters=(), meter_options={}, plan=Plan(), segment=0
    )
    default, best = trial(0), trial(3, {"parallel": 8}, (0.7,))

    def cut_short(number):
        if number == 1:
            raise KeyboardInterrupt

    with Journal.create(tmp_path, HEADER) as journal:
        with pytest.raises(KeyboardInterrupt):
            confirm(journal, launcher, default, best, 3, cut_short)
        assert concluded(journal.study) == "No saving is claimed: 1 of 3 fresh pairs are done."
        began = []
        found = confirm(journal, launcher, default, best, 3, began.append)
        assert began == [1, 2]
        assert found.pairs == 3
        assert len(pairs_of(journal.study, best.config, 3)) == 3
        assert pairs_of(journal.study, default.config, 3) == []
        assert concluded(journal.study) == verdict(found, 3, 3, 3)
    assert [n for n, _ in launcher.meter_options["order"]] == [0, 3, 3, 0, 0, 3]
    assert launcher.meter_options["order"][-1] == (3, "confirm-3.log")


def test_asking_for_more_pairs_after_a_look_is_another_plan_that_starts_anew(tmp_path):
    launcher = Recorder(
        folder=tmp_path, runner=tmp_path, target=Target(), meters=(), meter_options={}, plan=Plan(), segment=0
    )
    default, best = trial(0), trial(3, {"parallel": 8}, (0.7,))
    with Journal.create(tmp_path, HEADER) as journal:
        confirm(journal, launcher, default, best, 2, lambda n: None)
        began = []
        confirm(journal, launcher, default, best, 3, began.append)
        assert "This is confirmation 2 of this study" in concluded(journal.study)
    assert began == [0, 1, 2]


def test_a_verdict_names_its_trial_and_says_when_another_one_is_better_by_now(tmp_path):
    launcher = Recorder(
        folder=tmp_path, runner=tmp_path, target=Target(), meters=(), meter_options={}, plan=Plan(), segment=0
    )
    with Journal.create(tmp_path, HEADER) as journal:
        default = journal.append(trial(0)).history.trials[0]
        best = journal.append(trial(1, {"parallel": 8}, (0.7,))).history.trials[1]
        confirm(journal, launcher, default, best, 6, lambda n: None)
        assert concluded(journal.study).startswith("Trial 1 saves")
        journal.append(trial(2, {"parallel": 9}, (0.6,)))
        assert concluded(journal.study).endswith("Trial 2 is better in the search and was not confirmed.")


def estimated_side(number, seconds, cpu_seconds):
    """100 tokens on two CPUs: 1.4 W at rest and 7.8 W at full load, in the middle of the range."""
    joules = 1.4 * seconds + 6.4 * cpu_seconds / 2
    measurement = replace(window(joules / 100, quality="estimated"), seconds=seconds, cpu_seconds=cpu_seconds)
    return replace(trial(number), measurements=(measurement,))


def test_an_estimated_saving_that_turns_into_a_loss_within_the_power_range_is_not_shown():
    """More wall time for less CPU time: it pays only where resting costs little."""
    pairs = [
        Pair(
            number=n,
            default=estimated_side(0, 10.0 + n / 100, 20.0),
            best=estimated_side(1, 12.0, 12.0),
            default_first=True,
            config={},
            planned=6,
        )
        for n in range(6)
    ]
    found = saving(pairs, HEADER)
    assert found.ratio < 0.75
    assert found.high > 1
    assert not found.shown


def test_an_estimated_saving_that_holds_over_the_whole_power_range_is_shown():
    pairs = [
        Pair(
            number=n,
            default=estimated_side(0, 10.0 + n / 100, 20.0),
            best=estimated_side(1, 7.0, 14.0),
            default_first=True,
            config={},
            planned=6,
        )
        for n in range(6)
    ]
    assert saving(pairs, HEADER).shown


def test_an_estimate_whose_cpu_seconds_are_not_known_stays_what_it_is_at_both_ends_of_the_power_range():
    def unknown(launch):
        return replace(launch, measurements=tuple(replace(m, cpu_seconds=None) for m in launch.measurements))

    pairs = [replace(p, default=unknown(p.default), best=unknown(p.best)) for p in estimated_pairs()]
    measured = [pair(p.number, p.default.joules_per_unit, p.best.joules_per_unit) for p in pairs]
    found, same = saving(pairs, HEADER), saving(measured, HEADER)
    assert (found.low, found.high) == pytest.approx((same.low, same.high))


def test_a_study_without_pairs_concludes_nothing(tmp_path):
    with Journal.create(tmp_path, HEADER) as journal:
        assert concluded(journal.study) is None


def test_pairs_of_a_forced_segment_are_judged_by_the_machine_they_ran_on(tmp_path):
    with Journal.create(tmp_path, HEADER) as journal:
        journal.append(Segment(number=1, differences=("host",), machine={"cores_logical": "64"}, identity={}))
        assert here(journal.study).machine == {"cores_logical": "64"}
        assert here(journal.study).meter_options == HEADER.meter_options


# --- launches that fail ---


@dataclass(frozen=True, kw_only=True)
class Engine(Launcher):
    """Its energy is `worth` of the configuration, give or take half a per mille; a text is why it failed."""

    worth: Callable[[Mapping], float | str]
    steps: float = 0.0
    """Share of a window's energy that the steps of its counter may hide."""
    launched: list = field(default_factory=list)

    def __call__(self, number, proposal):
        self.launched.append((proposal.config, self.log_name))
        joules = self.worth(proposal.config)
        if isinstance(joules, str):
            return trial(number, proposal.config, error=joules, proposal=proposal, segment=self.segment)
        wobble = 1 + 0.0005 * math.sin(7 * len(self.launched))
        launch = trial(number, proposal.config, (joules * wobble,), proposal=proposal, segment=self.segment)
        return stepped(launch, self.steps) if self.steps else launch


def engine(folder, worth, **more):
    return Engine(
        folder=folder, runner=folder, target=Target(), meters=(), meter_options={}, plan=Plan(), worth=worth, **more
    )


def nobody(*_):
    pass


def outcomes(default=(), best=()):
    """An engine whose first launches of either side go like this; all further ones are measured."""
    of_default, of_best = iter(default), iter(best)
    return lambda config: next(of_default, 1.0) if config == SPACE.default() else next(of_best, 0.7)


UNMEASURED = f"{NO_VALID_WINDOW} in 5: other processes used the CPU"


def concluded_of(folder, worth, pairs=DEFAULT_PAIRS):
    """The last sentence after a confirmation of trial 1 on this engine, and its study."""
    with Journal.create(folder, HEADER) as journal:
        confirm(journal, engine(folder, worth), trial(0), trial(1, {"parallel": 8}, (0.7,)), pairs, nobody)
        return concluded(journal.study), journal.study


def test_a_best_that_crashes_once_in_its_fresh_launches_is_no_saving(tmp_path):
    sentence, study = concluded_of(tmp_path, outcomes(best=[0.7, "killed for lack of memory"]))
    assert sentence == (
        "No saving is claimed: trial 1 failed in 1 of 8 fresh launches (killed for lack of memory)."
        " A setting that fails now and then is none to run."
    )
    assert shown_by(study) == (None, 8)


def test_each_crash_of_the_best_is_counted_and_the_last_cause_named(tmp_path):
    sentence, _ = concluded_of(tmp_path, outcomes(best=["first", 0.7, "second"]))
    assert "trial 1 failed in 2 of 8 fresh launches (second)" in sentence


def test_a_best_that_crashes_is_not_shortened(tmp_path):
    _, study = concluded_of(tmp_path, outcomes(best=["crash"]))
    assert shortened(study) == (None, ())


def test_windows_of_the_best_that_did_not_count_are_no_crash(tmp_path):
    sentence, _ = concluded_of(tmp_path, outcomes(best=[UNMEASURED]))
    assert sentence.startswith("Trial 1 saves 30 % (95 % CI ")
    assert "7 of 8 pairs, the others unmeasured" in sentence


def test_a_crash_of_the_default_does_not_speak_against_the_best(tmp_path):
    sentence, _ = concluded_of(tmp_path, outcomes(default=["crash"]))
    assert sentence.startswith("Trial 1 saves 30 % (95 % CI ")


def test_where_both_sides_of_a_pair_crash_something_else_is_wrong(tmp_path):
    sentence, _ = concluded_of(tmp_path, outcomes(default=["crash"], best=["crash"]))
    assert sentence.startswith("Trial 1 saves 30 % (95 % CI ")


def test_a_crash_of_the_best_beside_a_default_without_valid_windows_counts(tmp_path):
    sentence, _ = concluded_of(tmp_path, outcomes(default=[UNMEASURED], best=["crash"]))
    assert "trial 1 failed in 1 of 8 fresh launches (crash)" in sentence


def test_pairs_without_a_failure_count_none():
    assert Failures.among(pairs_at(EIGHT)) == Failures(of_best=0, last_of_best="", last="")


@pytest.mark.parametrize("side", ["default", "best"])
def test_a_confirmation_ends_after_three_pairs_in_a_row_with_a_failed_side(tmp_path, side):
    _, study = concluded_of(tmp_path, outcomes(**{side: [1.0, *["crash"] * 8]}))
    assert len(study.pairs) == 4


def test_the_three_pairs_may_fail_on_different_sides(tmp_path):
    _, study = concluded_of(tmp_path, outcomes(default=["crash", 1.0, "crash"], best=[0.7, UNMEASURED, 0.7]))
    assert len(study.pairs) == 3


def test_failures_that_are_not_in_a_row_do_not_end_a_confirmation(tmp_path):
    _, study = concluded_of(tmp_path, outcomes(default=["crash", "crash", 1.0, "crash", "crash"]))
    assert len(study.pairs) == 8


def test_a_confirmation_that_ended_early_says_the_last_cause(tmp_path):
    sentence, _ = concluded_of(tmp_path, outcomes(default=["crash", "crash", UNMEASURED]))
    assert sentence == (
        f"No saving is claimed: 3 of 8 fresh pairs are done. The last launch that failed: {UNMEASURED}."
    )


def test_a_confirmation_in_which_nothing_could_be_measured_says_the_last_cause(tmp_path):
    sentence, _ = concluded_of(tmp_path, outcomes(best=[UNMEASURED] * 3), pairs=3)
    assert sentence == (
        f"No saving shown: the confirmation could not be measured. The last launch that failed: {UNMEASURED}."
    )


def test_a_confirmation_that_ended_early_goes_on_and_has_three_more_pairs_to_fail(tmp_path):
    worth = outcomes(default=["crash"] * 8)
    default, best = trial(0), trial(1, {"parallel": 8}, (0.7,))
    began = []
    with Journal.create(tmp_path, HEADER) as journal:
        for _ in range(2):
            confirm(journal, engine(tmp_path, worth), default, best, 8, began.append)
    assert began == [0, 1, 2, 3, 4, 5]


# --- one confirmation after another ---


def looked(folder, *plans):
    """A study whose best was confirmed with so many pairs, one plan after the other."""
    with Journal.create(folder, HEADER) as journal:
        for pairs in plans:
            confirm(journal, engine(folder, outcomes()), trial(0), trial(1, {"parallel": 8}, (0.7,)), pairs, nobody)
        return journal.study


@pytest.mark.parametrize("plans", [(8,), (8, 9), (8, 9, 10)])
def test_the_kth_confirmation_of_a_study_may_err_a_kth_as_often(tmp_path, plans):
    found, _ = shown_by(looked(tmp_path, *plans))
    assert found.confidence == pytest.approx(1 - 0.05 / 2 ** (len(plans) - 1))


def test_a_second_confirmation_has_the_wider_interval_of_its_confidence(tmp_path):
    study = looked(tmp_path, 8, 9)
    found, _ = shown_by(study)
    of_one = saving(pairs_of(study, study.pairs[-1].config, 9), HEADER)
    assert found.low < of_one.low < of_one.high < found.high


def test_a_second_confirmation_says_so_and_names_its_confidence(tmp_path):
    sentence = concluded(looked(tmp_path, 8, 9))
    assert re.match(r"Trial 1 saves 30 % \(97\.5 % CI [\d.]+ to [\d.]+ %, 9 pairs\)\. ", sentence)
    assert sentence.endswith(
        "This is confirmation 2 of this study; its interval is wider, because each is one more chance."
    )


def test_a_first_confirmation_does_not_speak_of_others(tmp_path):
    assert "confirmation" not in concluded(looked(tmp_path, 8))


def test_a_confirmation_that_goes_on_is_still_the_first(tmp_path):
    assert shown_by(looked(tmp_path, 8, 8))[0].confidence == 0.95


def test_six_pairs_are_too_few_for_a_second_confirmation(tmp_path):
    assert concluded(looked(tmp_path, 8, 6)).startswith(
        "No saving shown: 6 pairs are too few for an interval of 97.5 %."
    )


# --- the shortest setting that keeps the gain ---


ALL = {"parallel": 8, "threads": 1, "flash": "on"}


def confirmed(journal, launcher, changes, tried=(), pairs=6):
    """A study that has found `changes`, after some single changes, and has confirmed them."""
    segment = launcher.segment
    default = trial(len(journal.study.history), joules=(1.0,), segment=segment)
    default = replace(default, proposal=replace(default.proposal, source="default"))
    journal.append(default)
    for change, joules in tried:
        journal.append(trial(len(journal.study.history), change, (joules,), segment=segment))
    best = trial(len(journal.study.history), changes, (0.5,), segment=segment)
    journal.append(best)
    confirm(journal, launcher, default, best, pairs, nobody)


def pruned(folder, worth, changes=ALL, tried=(), pairs=6, **more):
    """(what still differs from the default, the attempts) after pruning `changes`."""
    launcher = engine(folder, worth, **more)
    with Journal.create(folder, HEADER) as journal:
        confirmed(journal, launcher, changes, tried)
        prune(journal, launcher, SPACE, pairs, nobody)
        config, attempts = shortened(read(folder))
    return {name: value for name, value in config.items() if value != SPACE[name].default}, attempts


def only(name, saves=0.3):
    """An engine to which a single change matters."""
    return lambda config: 1 - saves if config[name] != SPACE[name].default else 1.0


FLASH_IS_CLEAR = [({"flash": "on"}, 0.9)]
"""The search saw it save something; of the other two it only knows what they do together."""


def test_changes_that_do_not_matter_go_back_to_their_default_together(tmp_path):
    left, (attempt,) = pruned(tmp_path, only("flash"), tried=FLASH_IS_CLEAR)
    assert left == {"flash": "on"}
    assert attempt.dropped == ("parallel", "threads")
    assert attempt.ratio == pytest.approx(1, abs=0.001)
    assert attempt.sentence.startswith("parallel, threads: back at default; without: 1.000x the energy, at most 1.00")


def test_when_the_gain_is_lost_the_changes_are_asked_about_one_by_one(tmp_path):
    left, attempts = pruned(tmp_path, only("parallel"), tried=FLASH_IS_CLEAR)
    assert left == {"parallel": 8, "flash": "on"}
    assert [(a.dropped, a.keeps_the_gain) for a in attempts] == [
        (("parallel", "threads"), False),
        (("parallel",), False),
        (("threads",), True),
    ]
    assert attempts[0].sentence.startswith("parallel, threads: kept; without: 1.4")


def test_a_change_is_dropped_only_when_it_is_surely_worth_less_than_one_percent(tmp_path):
    left, (attempt,) = pruned(
        tmp_path, lambda config: 0.7 if config["threads"] == 1 else 0.706, {"threads": 1, "flash": "on"}
    )
    assert attempt.keeps_the_gain
    assert 1.008 < attempt.bound < 1.01
    assert left == {"flash": "on"}


def test_a_change_that_may_be_worth_one_percent_stays(tmp_path):
    left, (attempt,) = pruned(
        tmp_path,
        lambda c: (0.7 if c["threads"] == 1 else 0.708) if c["flash"] == "on" else 1,
        {"threads": 1, "flash": "on"},
        tried=[({"flash": "on"}, 0.5)],
    )
    assert not attempt.keeps_the_gain
    assert left == {"threads": 1, "flash": "on"}


def test_a_change_with_a_clear_effect_in_the_search_is_left_alone(tmp_path):
    tried = [({"parallel": 8}, 0.6), ({"threads": 1}, 1.0), ({"flash": "on"}, 0.85)]
    left, attempts = pruned(tmp_path, only("parallel", saves=0.4), tried=tried)
    assert [a.dropped for a in attempts] == [("threads",)]
    assert left == {"parallel": 8, "flash": "on"}


def test_changes_that_are_all_in_doubt_are_asked_about_one_by_one(tmp_path):
    left, attempts = pruned(tmp_path, only("flash"))
    assert [(a.dropped, a.keeps_the_gain) for a in attempts] == [(("parallel",), True), (("threads",), True)]
    assert left == {"flash": "on"}


def test_the_last_change_is_not_asked_about(tmp_path):
    """Without it there would be no saving."""
    left, attempts = pruned(tmp_path, only("flash"), {"flash": "on", "threads": 1})
    assert [a.dropped for a in attempts] == [("threads",)]
    assert left == {"flash": "on"}


def test_a_single_change_in_doubt_is_asked_about_once(tmp_path):
    tried = [({"flash": "on"}, 0.85), ({"parallel": 8}, 0.6)]
    _, attempts = pruned(tmp_path, only("threads"), tried=[*tried, ({"threads": 1}, 1.0)])
    assert [(a.dropped, a.keeps_the_gain) for a in attempts] == [(("threads",), False)]


def test_what_the_steps_of_a_counter_may_hide_is_not_dropped(tmp_path):
    """It does nothing, and 0.8 % on either side could not be seen."""
    left, (attempt,) = pruned(
        tmp_path, only("flash"), {"threads": 1, "flash": "on"}, [({"flash": "on"}, 0.5)], steps=0.008
    )
    assert attempt.ratio == pytest.approx(1, abs=0.001)
    assert attempt.bound > 1.01
    assert left == {"threads": 1, "flash": "on"}


def test_what_crashes_once_without_a_change_keeps_it(tmp_path):
    crashes = iter(["crash"])

    def worth(config):
        return next(crashes, 0.7) if config["threads"] == 2 and config["flash"] == "on" else only("flash")(config)

    left, (attempt,) = pruned(tmp_path, worth, {"threads": 1, "flash": "on"}, [({"flash": "on"}, 0.5)])
    assert left == {"threads": 1, "flash": "on"}
    assert attempt.sentence == "threads: kept, because it could not be measured without"


def test_a_single_change_is_the_shortest_there_is(tmp_path):
    assert pruned(tmp_path, only("flash"), {"flash": "on"}) == ({"flash": "on"}, ())


def test_what_a_constraint_forbids_is_not_tried(tmp_path):
    left, attempts = pruned(tmp_path, only("parallel"), {"parallel": 1, "threads": 1, "flash": "on"}, FLASH_IS_CLEAR)
    assert [a.dropped for a in attempts] == [("parallel", "threads"), ("parallel",)]
    assert left == {"parallel": 1, "threads": 1, "flash": "on"}


def test_where_a_constraint_forbids_the_group_its_changes_are_asked_about_one_by_one(tmp_path):
    """The default of `threads` needs more than `parallel` 1."""
    changes = {"parallel": 1, "threads": 1, "flash": "on"}
    left, attempts = pruned(tmp_path, only("parallel"), changes, [({"parallel": 1}, 0.6)])
    assert [a.dropped for a in attempts] == [("flash",)]
    assert left == {"parallel": 1, "threads": 1}


def test_a_change_that_a_constraint_forbids_to_drop_stays(tmp_path):
    """`threads` would go first, and its default needs more than `parallel` 1."""
    tried = [({"parallel": 1}, 0.6), ({"threads": 1}, 1.0)]
    changes = {"parallel": 1, "threads": 1}
    assert pruned(tmp_path, only("parallel"), changes, tried) == (changes, ())


def test_what_cannot_be_measured_without_is_kept(tmp_path):
    def worth(config):
        return (
            0.7 if config["flash"] == "on" and config["threads"] == 1 else 1.0 if config["flash"] == "auto" else "crash"
        )

    left, (attempt, *_) = pruned(tmp_path, worth, {"threads": 1, "flash": "on"})
    assert left == {"threads": 1, "flash": "on"}
    assert attempt.sentence == "threads: kept, because it could not be measured without"


def test_too_few_measured_pairs_drop_nothing():
    assert not Shortened(("threads",), 1.0, None, 5, SPACE.default()).keeps_the_gain


def test_a_pruning_that_was_cut_short_goes_on_and_asks_nothing_twice(tmp_path):
    launcher = engine(tmp_path, only("parallel"))

    def cut_short(names, number):
        if names == ("parallel",) and number == 2:
            raise KeyboardInterrupt

    with Journal.create(tmp_path, HEADER) as journal:
        confirmed(journal, launcher, ALL, FLASH_IS_CLEAR)
        with pytest.raises(KeyboardInterrupt):
            prune(journal, launcher, SPACE, 6, cut_short)
    began = []
    with Journal.resume(tmp_path) as journal:
        prune(journal, launcher, SPACE, 6, lambda names, number: began.append((names, number)))
        assert began == [(("parallel",), n) for n in range(2, 6)] + [(("threads",), n) for n in range(6)]
        assert len(shortened(journal.study)[1]) == 3
        prune(journal, launcher, SPACE, 6, lambda *_: pytest.fail("nothing is left to ask"))


def test_no_more_than_six_attempts_are_made_also_over_several_runs(tmp_path):
    names = [f"extra{n}" for n in range(MOST_PRUNE_TESTS + 2)]
    wide = SearchSpace(
        (*SPACE.parameters, *(Int(name=n, meaning="One of many.", default=0, low=0, high=1) for n in names))
    )
    launcher = engine(tmp_path, lambda config: 0.97 ** sum(config.get(n, 0) for n in names))
    asked = []
    with Journal.create(tmp_path, HEADER) as journal:
        confirmed(journal, launcher, dict.fromkeys(names, 1))
        for _ in range(2):
            prune(journal, launcher, wide, 6, lambda names, number: asked.append(names))
    assert list(dict.fromkeys(asked)) == [(n,) for n in names[:MOST_PRUNE_TESTS]]


def test_pruning_runs_in_abba_order_with_a_log_for_each_pair(tmp_path):
    launcher = engine(tmp_path, only("flash"))
    with Journal.create(tmp_path, HEADER) as journal:
        confirmed(journal, launcher, ALL, FLASH_IS_CLEAR)
        before = len(launcher.launched)
        prune(journal, launcher, SPACE, 6, nobody)
    runs = launcher.launched[before:]
    assert [config["threads"] for config, _ in runs] == [1, 2, 2, 1] * 3
    assert [log for _, log in runs[::2]] == [f"prune-1-{n}.log" for n in range(1, 7)]


def test_without_a_saving_there_is_nothing_to_shorten(tmp_path):
    launcher = engine(tmp_path, lambda config: 1.0)
    with Journal.create(tmp_path, HEADER) as journal:
        assert shortened(journal.study) == (None, ())
        confirmed(journal, launcher, ALL)
        prune(journal, launcher, SPACE, 6, lambda *_: pytest.fail("no saving was shown"))
        assert shortened(journal.study) == (None, ())


def test_pruning_in_a_new_segment_starts_anew(tmp_path):
    launcher = engine(tmp_path, only("flash"))
    with Journal.create(tmp_path, HEADER) as journal:
        confirmed(journal, launcher, ALL, FLASH_IS_CLEAR)
        prune(journal, launcher, SPACE, 6, nobody)
        journal.append(Segment(number=1, differences=("host",), machine={}, identity={}))
        elsewhere = replace(launcher, segment=1)
        confirmed(journal, elsewhere, ALL, FLASH_IS_CLEAR, pairs=8)
        assert shortened(journal.study)[1] == ()
        began = []
        prune(journal, elsewhere, SPACE, 6, lambda names, number: began.append(number))
        assert began == list(range(6))
        assert [a.dropped for a in shortened(journal.study)[1]] == [("parallel", "threads")]


def test_an_attempt_on_another_setting_does_not_count(tmp_path):
    launcher = engine(tmp_path, only("flash"))
    with Journal.create(tmp_path, HEADER) as journal:
        confirmed(journal, launcher, ALL)
        kept, shorter = trial(1, {"parallel": 9}, (0.7,)), trial(1, {}, (0.7,))
        for number in range(6):
            journal.append(
                Prune(
                    number=number,
                    kept=kept,
                    shorter=shorter,
                    kept_first=True,
                    config=shorter.config,
                    dropped=("parallel",),
                    planned=6,
                )
            )
        assert shortened(journal.study) == ({**SPACE.default(), **ALL}, ())


def test_what_can_stay_at_its_default_is_said_behind_the_saving(tmp_path):
    launcher = engine(tmp_path, only("flash"))
    with Journal.create(tmp_path, HEADER) as journal:
        confirmed(journal, launcher, ALL, FLASH_IS_CLEAR)
        prune(journal, launcher, SPACE, 6, nobody)
        assert concluded(journal.study).endswith(" parallel, threads can stay at default: at most 0.0 % more.")


def test_dropping_what_costs_energy_is_not_said_to_cost_less_than_nothing(tmp_path):
    launcher = engine(tmp_path, lambda c: only("flash")(c) * (1.05 if c["threads"] == 1 else 1))
    with Journal.create(tmp_path, HEADER) as journal:
        confirmed(journal, launcher, ALL, FLASH_IS_CLEAR)
        prune(journal, launcher, SPACE, 6, nobody)
        assert concluded(journal.study).endswith(" parallel, threads can stay at default: at most 0.0 % more.")


def test_what_has_to_stay_changed_is_not_said_behind_the_saving(tmp_path):
    launcher = engine(tmp_path, only("parallel"))
    with Journal.create(tmp_path, HEADER) as journal:
        confirmed(journal, launcher, ALL, FLASH_IS_CLEAR)
        prune(journal, launcher, SPACE, 6, nobody)
        assert re.search(r"pairs\)\. threads can stay at default: at most 0\.\d % more\.$", concluded(journal.study))


LOSSY_HEADER = replace(HEADER, space=tuple(LOSSY.record()))
CHANGED = {**LOSSY.default(), "cache": "q8", "parallel": 8}


def lossy_pair(number, loss):
    best = lossy(1, "q8", EIGHT[number], loss, parallel=8)
    return Pair(
        number=number, default=lossy(0, "f16", 1.0, 0.0), best=best, default_first=True, config=CHANGED, planned=8
    )


@pytest.mark.parametrize(
    ("losses", "end"),
    [
        ([0.01 * n for n in range(8)], "8 pairs); quality_loss 0.035 nats/token."),
        ([None] * 8, "8 pairs); quality not measured."),
    ],
)
def test_what_a_saving_costs_in_quality_stands_beside_it(losses, end):
    found = saving([lossy_pair(n, loss) for n, loss in enumerate(losses)], LOSSY_HEADER)
    assert verdict(found, 8, 8).endswith(end)


@pytest.mark.parametrize(
    ("dropped", "shorter", "end"),
    [
        ("cache", lossy(1, "f16", 0.7, 0.0, parallel=8), "% more, and no quality lost."),
        ("parallel", lossy(1, "q8", 0.7, 0.02), "% more."),
    ],
)
def test_a_shorter_setting_that_loses_less_quality_says_so(tmp_path, dropped, shorter, end):
    with Journal.create(tmp_path, LOSSY_HEADER) as journal:
        for number in range(8):
            journal.append(lossy_pair(number, 0.02))
        for number in range(6):
            kept = lossy(1, "q8", 0.7, 0.02, parallel=8)
            journal.append(
                Prune(
                    number=number, kept=kept, shorter=shorter, kept_first=True, config=shorter.config,
                    dropped=(dropped,), planned=6,
                )
            )  # fmt: skip
        said = concluded(journal.study)
    assert "quality_loss 0.02 nats/token" in said
    assert said.endswith(end)


def study_with(folder, ratios):
    with Journal.create(folder, HEADER) as journal:
        for number, ratio in enumerate(ratios):
            journal.append(replace(pair(number, 1.0, ratio), planned=len(ratios)))
        return journal.study


def test_pairs_for_pruning_follow_from_the_noise_of_the_confirmation(tmp_path):
    """Pairs that differ by 2 % in ln: s = 0.02 sqrt(8 / 7), n = (2.487 s / 0.00995)^2 = 28.6, made even."""
    assert prune_pairs(study_with(tmp_path, [0.7 * math.exp(0.02 * (-1) ** n) for n in range(8)])) == 30


def test_even_a_silent_machine_prunes_with_the_least_number_of_pairs(tmp_path):
    assert prune_pairs(study_with(tmp_path, [0.7] * 8)) == LEAST_PAIRS


@pytest.mark.parametrize("ratios", [(), (0.7,), (0.7, None)])
def test_without_two_pairs_nothing_says_how_many_pruning_takes(tmp_path, ratios):
    assert prune_pairs(study_with(tmp_path, ratios)) is None
