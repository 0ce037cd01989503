import math
import random

import pytest
from records import trial

from tuner.confirm import concluded, confirm, pair_order, pairs_of, saving, verdict
from tuner.evaluate import Launcher
from tuner.journal import Header, Journal, Pair, Plan
from tuner.trial import Target


def pair(number, default, best, quality=None):
    best_trial = trial(1, {"parallel": 8}, (best,)) if best else trial(1, {"parallel": 8}, error="crash")
    return Pair(
        number=number, default=trial(0, joules=(default,)), best=best_trial, default_first=True, config={}, planned=4
    )


def test_the_saving_is_one_minus_the_geometric_mean_of_the_pairs_ratios():
    found = saving([pair(0, 1.0, 0.5), pair(1, 1.0, 0.8)])
    assert math.isclose(found.ratio, math.sqrt(0.5 * 0.8))


def test_the_interval_is_students_t_over_the_pairs():
    """Log ratios ln 0.7, ln 0.8, ln 0.75: mean -0.2891807, s 0.0668, t(0.975, 2) 4.3027 (scipy.stats.t.ppf)."""
    found = saving([pair(0, 1.0, 0.7), pair(1, 1.0, 0.8), pair(2, 1.0, 0.75)])
    logs = [math.log(v) for v in (0.7, 0.8, 0.75)]
    mean = sum(logs) / 3
    half = 4.302652729911275 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2) / math.sqrt(3)
    assert math.isclose(found.low, math.exp(mean - half), rel_tol=1e-9)
    assert math.isclose(found.high, math.exp(mean + half), rel_tol=1e-9)


def test_a_saving_is_shown_only_when_the_whole_interval_is_below_the_default():
    assert saving([pair(0, 1, 0.7), pair(1, 1, 0.71), pair(2, 1, 0.69)]).shown
    assert not saving([pair(0, 1, 0.7), pair(1, 1, 1.3), pair(2, 1, 0.69)]).shown


def test_one_pair_shows_nothing():
    assert saving([pair(0, 1.0, 0.5)]) is None


def test_a_pair_with_a_failed_side_does_not_count():
    assert saving([pair(0, 1.0, 0.5), pair(1, 1.0, None), pair(2, 1.0, 0.5)]).pairs == 2


def test_equal_configurations_are_called_a_saving_in_at_most_four_percent_of_studies():
    """Two-sided 95 %: 2.5 % of studies err towards a saving. 2000 studies, 4 pairs, 3 % spread; 3 sd above."""
    rng = random.Random(7)
    claims = 0
    for _ in range(2000):
        pairs = [pair(n, math.exp(rng.gauss(0, 0.03)), math.exp(rng.gauss(0, 0.03))) for n in range(4)]
        claims += saving(pairs).shown
    assert claims / 2000 < 0.025 + 3 * math.sqrt(0.025 * 0.975 / 2000)


def test_pairs_are_in_abba_order_so_that_steady_drift_cancels():
    assert [pair_order(n) for n in range(4)] == [True, False, True, False]
    drift = [1.00, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07]
    pairs = []
    for n in range(4):
        first, second = drift[2 * n], drift[2 * n + 1]
        pairs.append(pair(n, first, second) if pair_order(n) else pair(n, second, first))
    assert saving(pairs).ratio == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("pairs", "planned", "sentence"),
    [
        ([], 0, "Not confirmed, so no saving is claimed."),
        ([], 4, "No saving is claimed: 0 of 4 fresh pairs are done."),
        ([pair(0, 1, 0.5)] * 3, 4, "No saving is claimed: 3 of 4 fresh pairs are done."),
        ([pair(n, 1, None) for n in range(4)], 4, "No saving shown: the confirmation could not be measured."),
        ([pair(n, 1, 1 + 0.01 * (-1) ** n) for n in range(4)], 4, "No saving shown (95 % CI"),
        ([pair(n, 1, 0.7 + 0.001 * n) for n in range(4)], 4, "Saves 30 % (95 % CI 30 % to 30 %, 4 fresh pairs)."),
    ],
)
def test_the_last_sentence_follows_from_the_pairs_alone(pairs, planned, sentence):
    assert verdict(saving(pairs), len(pairs), planned).startswith(sentence)


def test_an_estimated_saving_is_called_estimated():
    measured = [pair(n, 1, 0.7 + 0.001 * n) for n in range(3)]
    assert "estimated" not in verdict(saving(measured), 3, 3)
    from records import window

    from tuner.trial import Trial

    def estimated(t: Trial) -> Trial:
        value = t.joules_per_unit
        return Trial(
            number=t.number, config=t.config, proposal=t.proposal, measurements=(window(value, quality="estimated"),)
        )

    pairs = [
        Pair(
            number=p.number,
            default=estimated(p.default),
            best=estimated(p.best),
            default_first=True,
            config={},
            planned=4,
        )
        for p in measured
    ]
    assert verdict(saving(pairs), 3, 3).startswith("Saves an estimated")
    assert "not measured" in verdict(saving(pairs), 3, 3)


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

    with Journal.create(tmp_path, Header(name="s", workload="w", target=Target(), proposer="p")) as journal:
        with pytest.raises(KeyboardInterrupt):
            confirm(journal, launcher, default, best, 3, cut_short)
        assert concluded(journal.study) == "No saving is claimed: 1 of 3 fresh pairs are done."
        began = []
        found = confirm(journal, launcher, default, best, 3, began.append)
        assert began == [1, 2]
        assert found.pairs == 3
        assert len(pairs_of(journal.study, best.config, 3)) == 3
        assert pairs_of(journal.study, default.config, 3) == []
        assert concluded(journal.study) == verdict(found, 3, 3)
    assert [n for n, _ in launcher.meter_options["order"]] == [0, 3, 3, 0, 0, 3]
    assert launcher.meter_options["order"][-1] == (3, "confirm-3.log")


def test_asking_for_more_pairs_after_a_look_is_another_plan_that_starts_anew(tmp_path):
    launcher = Recorder(
        folder=tmp_path, runner=tmp_path, target=Target(), meters=(), meter_options={}, plan=Plan(), segment=0
    )
    default, best = trial(0), trial(3, {"parallel": 8}, (0.7,))
    with Journal.create(tmp_path, Header(name="s", workload="w", target=Target(), proposer="p")) as journal:
        confirm(journal, launcher, default, best, 2, lambda n: None)
        began = []
        confirm(journal, launcher, default, best, 3, began.append)
    assert began == [0, 1, 2]


def test_a_study_without_pairs_concludes_nothing(tmp_path):
    with Journal.create(tmp_path, Header(name="s", workload="w", target=Target(), proposer="p")) as journal:
        assert concluded(journal.study) is None
