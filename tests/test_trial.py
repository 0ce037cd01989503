import dataclasses
import math
import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.space import SearchSpace
from tuner.trial import QUALITIES, Decision, Energy, History, Measurement, Proposal, Reading, Service, Trial, Work


def window(joules, units=100, *, seconds=1.0, quality="measured", invalid=(), **domains) -> Measurement:
    energy = {"cpu0": Energy(joules, joules, joules), **domains}
    return Measurement(
        work=Work(units=units),
        seconds=seconds,
        energy={} if invalid else energy,
        quality=quality,
        meter="rapl",
        invalid=tuple(invalid),
    )


def trial(number, *windows, config=None, source="random", error=None, segment=0) -> Trial:
    config = config or {"n": number}
    return Trial(
        number=number,
        config=config,
        proposal=Proposal(config=config, source=source),
        measurements=windows,
        error=error,
        segment=segment,
    )


def history(*trials) -> History:
    past = History()
    for one in trials:
        past = past.add(one)
    return past


# --- a window --------------------------------------------------------------------------------


def test_a_windows_energy_is_the_sum_of_its_domains():
    assert window(50.0, gpu0=Energy(150.0, 150.0, 150.0)).joules_per_unit == 2.0


@pytest.mark.parametrize(
    "nothing",
    [
        window(50.0, invalid=["the counter went back"]),
        window(50.0, units=0),
        dataclasses.replace(window(50.0), energy={}),
        dataclasses.replace(window(50.0), invalid=("a domain was absurd",)),
    ],
)
def test_a_window_that_does_not_count_has_no_energy_per_unit(nothing):
    assert nothing.joules_per_unit is None


def test_an_exact_reading_has_no_width():
    assert Reading.exact(7) == Reading(microjoules=7, low=7, high=7)


# --- a trial ---------------------------------------------------------------------------------


def test_the_energy_of_a_trial_is_a_ratio_of_sums_not_a_mean_of_ratios():
    measured = trial(0, window(100.0, units=100), window(10.0, units=1))
    assert measured.joules_per_unit == 110.0 / 101


@given(st.lists(st.tuples(st.floats(0.01, 1e6), st.integers(1, 10**6)), min_size=1, max_size=9))
def test_the_energy_of_a_trial_lies_between_those_of_its_windows(windows):
    measured = trial(0, *(window(joules, units=units) for joules, units in windows))
    ratios = [joules / units for joules, units in windows]
    assert min(ratios) * (1 - 1e-12) <= measured.joules_per_unit <= max(ratios) * (1 + 1e-12)


def test_an_invalid_window_never_counts():
    mixed = trial(0, window(100.0), window(9e9, invalid=["absurd"]), window(100.0))
    assert mixed.joules_per_unit == 1.0
    assert mixed.units_per_second == 100.0
    assert mixed.relative_sd == 0.0
    assert len(mixed.valid) == 2


@pytest.mark.parametrize(
    "failed",
    [
        trial(0, error="out of memory"),
        trial(0, window(100.0), error="killed in the second window"),
        trial(0, window(100.0, invalid=["unreadable"])),
        trial(0),
    ],
)
def test_a_failed_trial_has_no_energy_at_all(failed):
    assert failed.joules_per_unit is None
    assert failed.joules_per_unit_bounds is None
    assert failed.units_per_second is None


def test_the_bounds_of_a_counter_are_its_value():
    assert trial(0, window(100.0), window(300.0)).joules_per_unit_bounds == (2.0, 2.0)


def test_the_bounds_of_an_estimate_are_ratios_of_sums_too():
    wide = Measurement(
        work=Work(units=10),
        seconds=1.0,
        energy={"cpu0": Energy(20.0, 10.0, 40.0)},
        quality="estimated",
        meter="estimate",
    )
    assert trial(0, wide, window(80.0, units=10)).joules_per_unit_bounds == (4.5, 6.0)


def test_the_spread_is_that_between_windows_over_their_mean():
    # Standard deviation of 0.9, 1.0, 1.1 with n - 1 in the denominator: 0.1.
    assert trial(0, window(90.0), window(100.0), window(110.0)).relative_sd == pytest.approx(0.1)


def test_one_window_has_no_spread():
    assert trial(0, window(100.0)).relative_sd is None


def test_a_trial_without_any_energy_has_no_relative_spread():
    assert trial(0, window(0.0), window(0.0)).relative_sd is None


def test_throughput_is_a_ratio_of_sums():
    assert trial(0, window(1.0, units=100, seconds=1.0), window(1.0, units=100, seconds=3.0)).units_per_second == 50.0


@pytest.mark.parametrize("worst", range(len(QUALITIES)))
def test_the_quality_of_a_trial_is_that_of_its_worst_window(worst):
    windows = [window(1.0, quality=QUALITIES[i]) for i in (worst, 0)]
    assert trial(0, *windows).quality == QUALITIES[worst]


def test_an_invalid_window_does_not_spoil_the_quality():
    assert trial(0, window(1.0), window(1.0, quality="estimated", invalid=["absurd"])).quality == "measured"


def test_a_trial_without_windows_has_no_quality():
    assert trial(0, error="crashed").quality is None


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_every_shell_reads_the_words_of_a_command_alike(shell, tmp_path):
    words = ["a\nb", "\n\n", "$x `y` \\n", "it's", "tab\there", "two  blanks", "!v", ""]
    service = Service(argv=("/bin/sh", "-c", 'printf "%s@" "$A" "$@"; pwd', "x", *words), env={"A": "1\n2"})
    command = dataclasses.replace(service, folder=str(tmp_path)).command()
    done = subprocess.run([shell, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "@".join(["1\n2", *words, f"{tmp_path}\n"])
    assert shlex.split(command)[-len(words) :] == words


def test_records_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        trial(0).error = "changed"


# --- a history -------------------------------------------------------------------------------


def test_an_event_makes_a_new_history_and_leaves_the_old_one():
    empty = History()
    one = empty.add(trial(0, window(1.0)))
    two = one.add(Decision(action="remark", before_trial=1, remark="try fewer threads"))
    assert (len(empty), len(one), len(two)) == (0, 1, 1)
    assert [d.remark for d in two.decisions] == ["try fewer threads"]
    assert one.decisions == ()


def test_the_best_trial_is_the_cheapest_one_that_was_measured():
    past = history(
        trial(0, window(100.0), source="default"),
        trial(1, error="crashed"),
        trial(2, window(50.0)),
        trial(3, window(1.0, invalid=["absurd"])),
        trial(4, window(70.0)),
    )
    assert past.best.number == 2
    assert [t.number for t in past.measured] == [0, 2, 4]
    assert [t.number for t in past.failed] == [1, 3]


def test_of_two_equal_trials_the_earlier_one_is_best():
    assert history(trial(0, window(2.0)), trial(1, window(1.0)), trial(2, window(1.0))).best.number == 1


def test_a_history_without_measured_trials_has_no_best_and_no_default():
    past = history(trial(0, error="crashed", source="default"))
    assert (past.best, past.default) == (None, None)


def test_the_default_is_the_trial_that_was_proposed_as_such():
    past = history(trial(0, window(1.0), source="human"), trial(1, window(1.0), source="default"))
    assert past.default.number == 1


def test_only_the_newest_segment_is_compared():
    past = history(
        trial(0, window(1.0), source="default"),
        trial(1, window(0.1)),
        trial(2, window(5.0), source="default", segment=1),
        trial(3, window(4.0), segment=1),
        trial(4, error="crashed", segment=1),
    )
    assert [t.number for t in past.current] == [2, 3, 4]
    assert past.best.number == 3
    assert past.default.number == 2
    assert [t.number for t in past.failed] == [4]
    assert past.find({"n": 1}) is None
    assert len(past) == 5


def test_a_new_segment_starts_with_nothing_to_compare():
    past = dataclasses.replace(history(trial(0, window(1.0), source="default")), segment=1)
    assert (past.current, past.best, past.default) == ((), None, None)
    assert past.add(trial(1, window(2.0), segment=1)).best.number == 1


def test_a_configuration_is_found_by_its_newest_trial():
    past = history(trial(0, window(1.0), config={"n": 4}), trial(1, error="crashed", config={"n": 4}))
    assert past.find({"n": 4}).number == 1
    assert past.find({"n": 5}) is None


def test_an_empty_history_has_nothing():
    empty = History()
    assert (empty.current, empty.measured, empty.failed, empty.best, empty.default) == ((), (), (), None, None)
    assert empty.find(SearchSpace(()).default()) is None


def test_no_number_of_a_failed_trial_is_nan_or_infinite():
    failed = trial(0, window(math.inf, invalid=["absurd"]), error="crashed")
    numbers = [failed.joules_per_unit, failed.relative_sd, failed.units_per_second]
    assert numbers == [None, None, None]
