import math
import random
from dataclasses import replace

import pytest
from records import trial, window

from tuner.confirm import concluded, confirm, here, pair_order, pairs_of, saving, verdict
from tuner.evaluate import Launcher
from tuner.journal import Header, Journal, Pair, Plan, Segment
from tuner.trial import Target

HEADER = Header(name="s", workload="w", target=Target(), proposer="p", machine={"cores_logical": "2"})


def pair(number, default, best, quality=None):
    best_trial = trial(1, {"parallel": 8}, (best,)) if best else trial(1, {"parallel": 8}, error="crash")
    return Pair(
        number=number, default=trial(0, joules=(default,)), best=best_trial, default_first=True, config={}, planned=4
    )


def test_the_saving_is_one_minus_the_geometric_mean_of_the_pairs_ratios():
    found = saving([pair(0, 1.0, 0.5), pair(1, 1.0, 0.8)], HEADER)
    assert math.isclose(found.ratio, math.sqrt(0.5 * 0.8))


def test_the_interval_is_students_t_over_the_pairs():
    """Log ratios ln 0.7, ln 0.8, ln 0.75: mean -0.2891807, s 0.0668, t(0.975, 2) 4.3027 (scipy.stats.t.ppf)."""
    found = saving([pair(0, 1.0, 0.7), pair(1, 1.0, 0.8), pair(2, 1.0, 0.75)], HEADER)
    logs = [math.log(v) for v in (0.7, 0.8, 0.75)]
    mean = sum(logs) / 3
    half = 4.302652729911275 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2) / math.sqrt(3)
    assert math.isclose(found.low, math.exp(mean - half), rel_tol=1e-9)
    assert math.isclose(found.high, math.exp(mean + half), rel_tol=1e-9)


def test_a_saving_is_shown_only_when_the_whole_interval_is_below_the_default():
    assert saving([pair(0, 1, 0.7), pair(1, 1, 0.71), pair(2, 1, 0.69)], HEADER).shown
    assert not saving([pair(0, 1, 0.7), pair(1, 1, 1.3), pair(2, 1, 0.69)], HEADER).shown


def test_one_pair_shows_nothing():
    assert saving([pair(0, 1.0, 0.5)], HEADER) is None


def test_a_pair_with_a_failed_side_does_not_count():
    assert saving([pair(0, 1.0, 0.5), pair(1, 1.0, None), pair(2, 1.0, 0.5)], HEADER).pairs == 2


def test_equal_configurations_are_called_a_saving_in_at_most_four_percent_of_studies():
    """Two-sided 95 %: 2.5 % of studies err towards a saving. 2000 studies, 4 pairs, 3 % spread; 3 sd above."""
    rng = random.Random(7)
    claims = 0
    for _ in range(2000):
        pairs = [pair(n, math.exp(rng.gauss(0, 0.03)), math.exp(rng.gauss(0, 0.03))) for n in range(4)]
        claims += saving(pairs, HEADER).shown
    assert claims / 2000 < 0.025 + 3 * math.sqrt(0.025 * 0.975 / 2000)


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
            [pair(n, 1, 1 + 0.01 * (-1) ** n) for n in range(4)],
            4,
            "No saving shown: the best setting against the default (95 % CI",
        ),
        (
            [pair(n, 1, 0.7 + 0.001 * n) for n in range(4)],
            4,
            "The best setting saves 30 % (95 % CI 30 % to 30 %, 4 fresh pairs).",
        ),
    ],
)
def test_the_last_sentence_follows_from_the_pairs_alone(pairs, planned, sentence):
    assert verdict(saving(pairs, HEADER), len(pairs), planned).startswith(sentence)


def test_an_estimated_saving_is_called_estimated():
    measured = [pair(n, 1, 0.7 + 0.001 * n) for n in range(4)]
    assert "estimated" not in verdict(saving(measured, HEADER), 4, 4)
    pairs = [
        Pair(
            number=n,
            default=estimated_side(0, 10.0, 20.0),
            best=estimated_side(1, 7.0 + n / 100, 14.0),
            default_first=True,
            config={},
            planned=4,
        )
        for n in range(4)
    ]
    sentence = verdict(saving(pairs, HEADER), 4, 4)
    assert sentence.startswith("The best setting saves an estimated 30 %")
    assert "not measured" in sentence


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
        confirm(journal, launcher, default, best, 2, lambda n: None)
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
            planned=2,
        )
        for n in range(2)
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
            planned=2,
        )
        for n in range(2)
    ]
    assert saving(pairs, HEADER).shown


def test_a_study_without_pairs_concludes_nothing(tmp_path):
    with Journal.create(tmp_path, HEADER) as journal:
        assert concluded(journal.study) is None


def test_pairs_of_a_forced_segment_are_judged_by_the_machine_they_ran_on(tmp_path):
    with Journal.create(tmp_path, HEADER) as journal:
        journal.append(Segment(number=1, differences=("host",), machine={"cores_logical": "64"}, identity={}))
        assert here(journal.study).machine == {"cores_logical": "64"}
        assert here(journal.study).meter_options == HEADER.meter_options
