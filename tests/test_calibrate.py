import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import SPACE, trial, window
from scipy.stats import chi2

from tuner import calibrate
from tuner.assemble import Bench, prepare
from tuner.calibrate import (
    Agreement,
    Calibration,
    CalibrationError,
    Counter,
    aa_check,
    calibrations_folder,
    chi_square,
    compare,
    drift,
    find,
    least_saving,
    pairs_needed,
    periods,
    read,
    run_calibration,
    sentences,
    sigma_interval,
    store,
)
from tuner.evaluate import Launcher
from tuner.intervals import paired_interval
from tuner.journal import Header, Plan
from tuner.meters import MeterChoice, MeterOptions
from tuner.meters.wall import WallSource
from tuner.space import Refused
from tuner.trial import Idle, Reading, Target, Trial, WarmUp

ENGINE = Path(__file__).parent / "fakes" / "engine.py"
NOON = time.mktime((2026, 11, 22, 12, 0, 0, 0, 0, -1))
"""Of 22 November 2026, wherever the test runs."""

MACHINE = {"host": "h", "os": "Linux", "cpu": "EPYC", "governor": "performance"}
IDENTITY = {"engine": "fake", "engine_version": "1", "model": "m"}
PLAN = Plan(windows=3, window_seconds=2.0)
HEADER = Header(
    name="",
    workload="llama",
    target=Target(),
    proposer="rules",
    plan=PLAN,
    meters=("rapl",),
    meter_options=MeterOptions().record(),
    machine=MACHINE,
    identity=IDENTITY,
    space=tuple(SPACE.record()),
)
BENCH = Bench(
    runner_path=ENGINE,
    runner=None,
    space=SPACE,
    meters=MeterChoice(names=(), quality="estimated", blind_to=frozenset(), domains=(), sentence=""),
    machine=MACHINE,
    identity=IDENTITY,
)


def launches(*values, quality="measured"):
    """One launch of one window for each value in joules per unit; text is the cause of a failure."""
    return tuple(
        trial(n, error=v) if isinstance(v, str) else replace(trial(n), measurements=(window(v, quality=quality),))
        for n, v in enumerate(values)
    )


def noisy(seed, count=8, sigma=0.02):
    rng = random.Random(seed)
    return launches(*(math.exp(rng.gauss(0, sigma)) for _ in range(count)))


def calibration(trials=None, **changes):
    parts = {
        "started_unix": NOON,
        "workload": "llama",
        "machine": MACHINE,
        "identity": IDENTITY,
        "meters": HEADER.meters,
        "meter_options": HEADER.meter_options,
        "target": HEADER.target,
        "windows": PLAN.windows,
        "window_seconds": PLAN.window_seconds,
        "config": SPACE.default(),
        "trials": noisy(1) if trials is None else trials,
        "planned": 8,
    }
    return Calibration(**{**parts, **changes})


def rows(found):
    return dict(sentences(found))


# --- sigma -----------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 8, 19, 120, 4001])
@pytest.mark.parametrize("probability", [1e-6, 0.025, 0.5, 0.8, 0.975, 0.999999])
def test_the_chi_square_quantile_is_that_of_scipy(degrees, probability):
    assert math.isclose(chi_square(probability, degrees), chi2.ppf(probability, degrees), rel_tol=1e-7)


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 3), (1.0, 3), (0.5, 0)])
def test_a_quantile_that_does_not_exist_is_an_error(probability, degrees):
    with pytest.raises(ValueError, match=r"expected probability in \(0, 1\) and degrees >= 1"):
        chi_square(probability, degrees)


def test_sigma_is_the_standard_deviation_of_the_logarithms_with_one_degree_less_than_launches():
    found = calibration(launches(1.0, 1.02, 0.97, 1.01, "crash"))
    assert math.isclose(found.sigma, statistics.stdev(map(math.log, (1.0, 1.02, 0.97, 1.01))))
    assert found.degrees == 3
    assert found.noise.source == "calibration 2026-11-22"
    assert (found.noise.sigma, found.noise.degrees) == (found.sigma, 3)


def test_the_interval_of_sigma_comes_from_the_quantiles_of_chi_square():
    low, high = sigma_interval(0.02, 7)
    assert math.isclose(low, 0.02 * math.sqrt(7 / chi2.ppf(0.975, 7)), rel_tol=1e-7)
    assert math.isclose(high, 0.02 * math.sqrt(7 / chi2.ppf(0.025, 7)), rel_tol=1e-7)


@pytest.mark.parametrize("count", [3, 8])
def test_the_interval_of_sigma_covers_the_true_sigma_in_95_of_100_calibrations(count):
    """4000 calibrations with 2 % noise; within 3 standard deviations of 95 %."""
    rng = random.Random(5)
    covered = 0
    for _ in range(4000):
        sigma = statistics.stdev(rng.gauss(0, 0.02) for _ in range(count))
        low, high = sigma_interval(sigma, count - 1)
        covered += low <= 0.02 <= high
    assert abs(covered / 4000 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 4000)


def test_an_estimate_of_0_joules_is_no_launch():
    assert len(calibration(launches(1.0, 1.1, 0.0, 0.9)).launches) == 3


def test_the_spread_between_windows_is_pooled_over_the_launches_and_stands_beside_sigma():
    two = [replace(trial(n), measurements=(window(1.0), window(w))) for n, w in enumerate((1.1, 1.2, 1.3))]
    found = calibration(tuple(two))
    assert math.isclose(found.window_sigma, math.sqrt(statistics.fmean(math.log(w) ** 2 / 2 for w in (1.1, 1.2, 1.3))))
    assert "between windows of one launch" in rows(found)["noise"]


def test_launches_of_one_window_tell_nothing_between_windows():
    found = calibration()
    assert found.window_sigma is None
    assert "between windows" not in rows(found)["noise"]


# --- drift -----------------------------------------------------------------------------------


def test_drift_is_the_last_half_against_the_first_by_students_t():
    """Means 0 and 0.1, pooled s 0.01414, t(0.975, 2) = 4.3027."""
    found = drift([-0.01, 0.01, 9.0, 0.09, 0.11])
    assert math.isclose(found.change, 0.1)
    assert math.isclose(found.half_width, 4.302652729911275 * math.sqrt(2) * 0.01, rel_tol=1e-9)


def test_a_machine_that_drifts_beyond_3_percent_and_beyond_noise_is_said_to():
    found = calibration(launches(1.0, 1.01, 1.0, 1.01, 1.05, 1.06, 1.05, 1.06))
    assert found.drift.shown
    assert rows(found)["drift"].startswith("THIS MACHINE DRIFTS: the last half of the launches took 5.0 % more")


def test_drift_stays_in_sigma():
    values = (1.0, 1.01, 1.0, 1.01, 1.05, 1.06, 1.05, 1.06)
    assert math.isclose(calibration(launches(*values)).sigma, statistics.stdev(map(math.log, values)))


def test_a_small_change_beyond_noise_is_said_and_is_no_drift():
    found = calibration(launches(1.0, 1.001, 1.0, 0.99, 0.991, 0.99))
    assert found.drift.beyond_noise
    assert not found.drift.shown
    assert rows(found)["drift"].endswith("more than noise, but little")
    assert "less than the first" in rows(found)["drift"]


def test_a_large_change_within_noise_is_no_drift():
    found = calibration(launches(1.0, 1.4, 1.1, 1.5))
    assert abs(found.drift.change) > 0.03
    assert rows(found)["drift"].endswith("no drift shown")


def test_three_launches_cannot_tell_drift():
    assert drift([0.0, 0.1, 0.2]) is None
    assert "4 are needed" in rows(calibration(launches(1, 1.1, 1.2)))["drift"]


# --- A/A -------------------------------------------------------------------------------------


def test_the_sides_of_the_pairs_change_places_so_that_steady_drift_cancels():
    check = aa_check(launches(*(math.exp(0.01 * n) for n in range(16))))
    assert check.pairs == 8
    assert check.low < 1 < check.high
    assert math.isclose(check.low * check.high, 1, rel_tol=1e-9)
    assert check.passed


def test_a_difference_between_the_sides_fails_the_check():
    def side(n):
        return n % 4 in (1, 2)

    rng = random.Random(3)
    values = [math.exp(rng.gauss(0, 0.002) + 0.1 * side(n)) for n in range(16)]
    found = calibration(launches(*values), planned=16)
    assert found.aa_check.passed is False
    assert found.aa_check.low > 1
    assert rows(found)["A/A check"].startswith("FAILED: one configuration against itself shows a difference")


def test_too_few_pairs_are_said_to_be_too_few_with_the_option_that_makes_enough():
    found = calibration()
    assert found.aa_check.passed is None
    assert rows(found)["A/A check"] == "4 pairs are too few to check; --launches 12 makes 6"


def test_a_check_that_passed_says_so():
    assert rows(calibration(noisy(2, 16), planned=16))["A/A check"].startswith("passed: ")


def test_a_pair_with_a_failed_launch_does_not_count():
    values = ["crash" if n == 3 else 1.0 + 0.001 * n for n in range(14)]
    assert aa_check(calibration(launches(*values)).launches).pairs == 6


def test_no_launch_is_no_pair():
    assert aa_check(()).pairs == 0


# --- what it means ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sd", "saving", "pairs"),
    [(0.01, 0.01, 10), (0.02, 0.02, 10), (0.02, 0.01, 34), (0.02, 0.03, 8), (0.01, 0.02, 6), (0.02, 0.05, 6)],
)
def test_the_pairs_that_a_saving_needs_are_those_of_the_simulated_table(sd, saving, pairs):
    """Simulated for Student's t: 10, 10, 34, 6, 5 and 4 pairs. Below 8 all signs must agree; pairs are even."""
    assert pairs_needed(-math.expm1(-saving), sd / math.sqrt(2)) == pairs


@pytest.mark.parametrize("pairs", [6, 8, 12])
def test_the_least_saving_is_shown_in_four_of_five_confirmations(pairs):
    """2000 simulated confirmations; within 3 standard deviations, and 1 % for the approximation by Student's t."""
    rng, sigma = random.Random(11), 0.02
    effect = math.log1p(-least_saving(pairs, sigma))
    shown = 0
    for _ in range(2000):
        differences = [effect + rng.gauss(0, sigma) - rng.gauss(0, sigma) for _ in range(pairs)]
        shown += paired_interval(differences)[1] < 0
    assert abs(shown / 2000 - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 2000) + 0.01


@given(sigma=st.floats(1e-6, 0.1), saving=st.floats(0.01, 0.5))
def test_the_pairs_needed_show_the_saving_and_two_fewer_do_not(sigma, saving):
    pairs = pairs_needed(saving, sigma)
    assert pairs % 2 == 0
    assert least_saving(pairs, sigma) <= saving * (1 + 1e-9)
    assert pairs == 6 or least_saving(pairs - 2, sigma) > saving


def test_five_pairs_show_nothing():
    assert least_saving(5, 0.02) is None


def test_no_noise_needs_the_fewest_pairs():
    assert pairs_needed(0.01, 0.0) == 6
    assert least_saving(8, 0.0) == 0


def test_more_pairs_than_anybody_waits_for_are_not_counted():
    wild = calibration(launches(1.0, 3.0, 0.3, 2.0))
    assert rows(wild)["pairs needed"].endswith("more than 1000 for a saving of 1 %")


def test_what_the_noise_means_is_said_for_eight_pairs_and_three_savings():
    said = rows(calibration())
    assert said["8 pairs show"].endswith("% or more, in 4 of 5 confirmations")
    assert [part.split(" for a saving of ")[1] for part in said["pairs needed"].split(", ")] == ["5 %", "2 %", "1 %"]


# --- counters --------------------------------------------------------------------------------


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def wait(self, seconds):
        self.now += seconds
        return False


class Board:
    """Domains that draw constant power by a clock, with counters that tick and, it may be, lie."""

    quality = "measured"
    blind_to = frozenset()

    def __init__(self, clock, *, update=0.1, watts=100.0, gain=1.0, periods=None, name="board"):
        self.clock, self.update_seconds, self.power, self.gain, self.name = clock, update, watts, gain, name
        self.periods = periods or {"gpu0": update}

    def domains(self):
        return tuple(self.periods)

    def read(self):
        return {
            domain: Reading.exact(int(math.floor(self.clock() / period + 1e-6) * period * self.power * self.gain * 1e6))
            for domain, period in self.periods.items()
        }

    def watts(self):
        return dict.fromkeys(self.periods, self.power)

    def close(self):
        pass


@pytest.mark.parametrize("period", [0.02, 0.1, 0.25])
def test_the_period_of_a_counter_is_the_median_time_between_its_changes(period):
    clock = Clock()
    (found,) = periods(Board(clock, update=0.1, periods={"gpu0": period}), seconds=clock, sleep=clock.sleep)
    assert math.isclose(found.period_seconds, period, abs_tol=0.006)
    assert found.declared_seconds == 0.1
    assert not found.bound


def test_a_counter_that_moved_at_every_look_has_an_upper_bound_for_a_period():
    clock = Clock()
    (found,) = periods(Board(clock, periods={"gpu0": 0.001}), seconds=clock, sleep=clock.sleep)
    assert found.bound
    assert rows(calibration(counters=(found,)))["counter gpu0"] == "updates every at most 5.00 ms (100 ms expected)"


def test_each_domain_has_a_period_of_its_own():
    clock = Clock()
    board = Board(clock, periods={"gpu0": 0.1, "gpu1": 0.02, "gpu2": 1e9})
    found = periods(board, seconds=clock, sleep=clock.sleep)
    assert [f.domain for f in found] == ["gpu0", "gpu1", "gpu2"]
    assert found[0].period_seconds > 4 * found[1].period_seconds
    assert found[2].period_seconds is None


def test_a_counter_that_hardly_moves_has_no_period():
    said = rows(calibration(counters=(Counter(domain="gpu0", declared_seconds=0.1, looks=400, changes=1),)))
    assert said["counter gpu0"] == "moved 1 times in 400 looks, too seldom to know its period"


def test_what_does_not_tick_has_no_period_and_is_not_polled():
    clock = Clock()
    (found,) = periods(Board(clock, update=0.0, periods={"cpu": 1.0}), seconds=clock, sleep=clock.sleep)
    assert found == Counter(domain="cpu", declared_seconds=0.0)
    assert clock.now == 100.0
    assert "counter cpu" not in rows(calibration(counters=(found,)))


def test_a_slow_counter_is_polled_for_five_of_its_updates():
    clock = Clock()
    (found,) = periods(Board(clock, update=1.0), seconds=clock, sleep=clock.sleep)
    assert math.isclose(found.period_seconds, 1.0, abs_tol=0.06)


def test_a_window_that_holds_too_few_updates_is_said_with_the_option_that_mends_it():
    slow = Counter(domain="gpu0", declared_seconds=0.1, period_seconds=0.25, looks=100, changes=8)
    assert rows(calibration(counters=(slow,)))["windows"] == (
        "one of 2.00 s holds 8 updates of the slowest counter; --window 25s holds 100"
    )
    fast = replace(slow, period_seconds=0.02)
    assert "windows" not in rows(calibration(counters=(fast,)))


@pytest.mark.parametrize(("gain", "suspect"), [(1.0, False), (0.93, False), (1.08, False), (0.85, True), (1.15, True)])
def test_a_counter_more_than_10_percent_off_its_power_is_suspect(gain, suspect):
    clock = Clock()
    (found,) = compare(Board(clock, gain=gain), "load", clock.wait, seconds=clock)
    assert math.isclose(found.power_joules, 1000, rel_tol=0.011)
    assert math.isclose(found.difference, gain - 1, abs_tol=0.011)
    assert found.suspect is suspect
    said = rows(calibration(agreements=(found,)))["gpu0 load"]
    assert ("SUSPECT" in said) is suspect
    assert ("they agree within 10 %" in said) is not suspect


def test_power_is_integrated_by_trapezoids():
    """Watts rise from 0 by 20 a second: 1000 J in 10 s."""
    clock = Clock()
    board = Board(clock)
    board.watts = lambda: {"gpu0": 20 * (clock() - 100.0)}
    (found,) = compare(board, "idle", clock.wait, seconds=clock)
    assert math.isclose(found.power_joules, 10 * found.seconds**2, rel_tol=1e-9)


def test_no_power_and_no_energy_agree_and_energy_without_power_does_not():
    nothing = Agreement(domain="gpu0", state="idle", seconds=10, counter_joules=0, power_joules=0)
    assert not nothing.suspect
    assert replace(nothing, counter_joules=5).suspect


def test_a_domain_whose_power_went_silent_is_not_compared():
    clock = Clock()
    board = Board(clock, periods={"gpu0": 0.1, "gpu1": 0.1})
    board.watts = lambda: {"gpu0": 1.0} | ({"gpu1": 1.0} if clock() < 105 else {})
    assert [a.domain for a in compare(board, "load", clock.wait, seconds=clock)] == ["gpu0"]


def test_a_comparison_ends_when_the_load_is_over():
    clock, calls = Clock(), []

    def wait(seconds):
        clock.sleep(seconds)
        calls.append(seconds)
        return len(calls) == 7

    (found,) = compare(Board(clock), "load", wait, seconds=clock)
    assert math.isclose(found.seconds, 0.7)


# --- running it ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scripted(Launcher):
    """Takes what each launch measured from a function of its number, and tells the phases of a real one."""

    script: Callable[[int], Trial]
    asked: list[object]

    def __call__(self, number, proposal):
        self.asked.append((number, proposal.config, self.idle_seconds_for(number)))
        for phase in ("loading", "measuring 1/2", "stopping"):
            self.report(number, phase)
        return self.script(number)


def scripted(folder, *values, **more):
    trials = launches(*values)

    def script(number):
        if isinstance(values[number], BaseException):
            raise values[number]
        return trials[number]

    parts = {
        "folder": folder,
        "runner": ENGINE,
        "target": Target(),
        "meters": (),
        "meter_options": {},
        "plan": PLAN,
        "script": script,
        "asked": [],
    }
    return Scripted(**{**parts, **more})


def launches_of(*values):
    return tuple(1.0 if isinstance(v, BaseException) else v for v in values)


ESTIMATED = replace(HEADER, meters=("estimate",))


def test_every_launch_runs_the_default_configuration_and_is_kept_in_order(tmp_path):
    launcher, said, kept = scripted(tmp_path, 1.0, 1.1, 0.9, 1.05), [], []
    found = run_calibration(BENCH, ESTIMATED, launcher, 4, say=said.append, keep=kept.append)
    assert [(number, config) for number, config, _ in launcher.asked] == [(n, SPACE.default()) for n in range(4)]
    assert [t.number for t in found.trials] == [0, 1, 2, 3]
    assert kept == [found]
    assert said[0] == "launch 1 of 4: 1.00 J/token"
    assert said[1] == "the others take about 30 s together"
    assert found.notes == ("estimate: computed from CPU time; there is no counter to check",)


def test_the_idle_windows_of_the_first_launch_are_not_expected_of_the_others(tmp_path):
    """A launch of 40 s that watched idle power twice for 10 s and warmed up once more for 5 s takes 15 s again."""
    idle = Idle(machine_watts=45.0, loaded_watts=60.5, seconds=10, quality="estimated")
    launcher, said = scripted(tmp_path, 1.0, 1.1, 0.9, 1.05), []
    first = replace(
        launcher.script(0),
        seconds=40.0,
        idle=idle,
        warm_up=WarmUp(seconds=5.0, units_per_second=(1.0, 1.0), steady=True),
    )
    launcher = replace(launcher, script=lambda n: launches(1.0, 1.1, 0.9, 1.05)[n] if n else first)
    run_calibration(BENCH, ESTIMATED, launcher, 4, say=said.append)
    assert said[1] == "the others take about 45 s together"


def test_failed_launches_are_counted_and_named_and_never_imputed(tmp_path):
    found = run_calibration(BENCH, ESTIMATED, scripted(tmp_path, 1.0, "out of memory", 0.9, 1.05, 1.0), 5)
    assert found.degrees == 3
    assert rows(found)["launches"] == "4 of 5 measured; launch 2 failed: out of memory"


def test_too_few_measured_launches_are_refused_with_every_cause(tmp_path):
    kept = []
    with pytest.raises(CalibrationError, match=r"2 of 4 launches were measured, and 4 .*: launch 2 .*no; launch 4"):
        run_calibration(BENCH, ESTIMATED, scripted(tmp_path, 1.0, "no", 0.9, "never"), 4, keep=kept.append)
    assert kept == []


def test_three_failures_in_a_row_end_it(tmp_path):
    launcher, said = scripted(tmp_path, "a", "b", "c", 1.0, 1.0, 1.0), []
    with pytest.raises(CalibrationError, match="0 of 3 launches were measured"):
        run_calibration(BENCH, ESTIMATED, launcher, 6, say=said.append)
    assert len(launcher.asked) == 3
    assert said[-1] == "3 launches failed in a row: no more are started"


def test_fewer_launches_than_a_study_would_believe_are_refused_before_anything_runs(tmp_path):
    launcher = scripted(tmp_path)
    with pytest.raises(Refused, match=r"--launches 3: expected 4 or more"):
        run_calibration(BENCH, ESTIMATED, launcher, 3)
    assert launcher.asked == []


def test_an_interrupted_calibration_keeps_four_launches_and_says_so(tmp_path):
    said, kept = [], []
    with pytest.raises(KeyboardInterrupt):
        run_calibration(
            BENCH,
            ESTIMATED,
            interrupted_at(4, scripted(tmp_path, 1.0, 1.1, 0.9, 1.0, 1.05)),
            8,
            say=said.append,
            keep=kept.append,
        )
    assert [len(c.trials) for c in kept] == [4]
    assert kept[0].interrupted
    assert said[-1] == "stopped; 4 of 8 launches are kept as a calibration of 3 degrees of freedom"
    assert rows(kept[0])["launches"] == "4 of 8 measured, interrupted after 4"


def test_an_interrupted_calibration_of_three_launches_is_not_kept_and_says_so(tmp_path):
    said, kept = [], []
    launcher = interrupted_at(3, scripted(tmp_path, 1.0, 1.1, 0.9, 1.0))
    with pytest.raises(KeyboardInterrupt):
        run_calibration(BENCH, ESTIMATED, launcher, 8, say=said.append, keep=kept.append)
    assert kept == []
    assert said[-1] == "stopped; 3 measured launches are too few to keep (4 are needed)"


def interrupted_at(number, launcher):
    before = launcher.script

    def script(n):
        if n == number:
            raise KeyboardInterrupt
        return before(n)

    return replace(launcher, script=script)


def test_idle_power_is_asked_for_until_it_is_known(tmp_path):
    idle = Idle(machine_watts=45.0, loaded_watts=60.5, seconds=10, quality="estimated")
    launcher = scripted(tmp_path, "crash", 1.0, 1.1, 0.9, 1.0, idle_seconds_for=lambda _number: 10.0)
    before = launcher.script
    launcher = replace(launcher, script=lambda n: replace(before(n), idle=idle) if n == 1 else before(n))
    found = run_calibration(BENCH, ESTIMATED, launcher, 5)
    assert [seconds for _, _, seconds in launcher.asked] == [10.0, 10.0, 0.0, 0.0, 0.0]
    assert found.idle == idle
    assert rows(found)["idle power"] == ("45.0 W without an engine, 60.5 W with one loaded and waiting, estimated")


def test_the_energy_carries_its_label():
    found = calibration(launches(0.4, 0.41, 0.42, quality="estimated"))
    assert rows(found)["energy"] == "410 mJ/token estimated, geometric mean"


# --- with a real engine and a fake driver -----------------------------------------------------


QUICK = Plan(windows=2, window_seconds=0.02, timeout_seconds=60, most_others=1.0, warm_up_seconds=(0.01, 0.05))


def real(folder, meter="estimate", pins=("cost=2",)):
    """Header, bench and launcher as the command line makes them."""
    header = Header(
        name="",
        workload=str(ENGINE),
        target=Target(prompts=2, output_tokens=3),
        proposer="rules",
        pins=pins,
        plan=QUICK,
    )
    header, bench = prepare(header, meter=meter, options=MeterOptions(), say=lambda _text: None)
    header = replace(header, plan=replace(QUICK, window_seconds=QUICK.window_seconds))
    launcher = Launcher(
        folder=folder,
        runner=bench.runner_path,
        target=header.target,
        meters=header.meters,
        meter_options=dict(header.meter_options),
        plan=header.plan,
    )
    return bench, header, launcher


def test_a_real_engine_is_calibrated_in_fresh_workers_and_the_next_study_finds_its_noise(tmp_path):
    phases = []
    bench, header, launcher = real(tmp_path)
    found = run_calibration(bench, header, launcher, 4, report=lambda number, phase: phases.append((number, phase)))
    assert len(found.launches) == 4
    assert found.config["cost"] == 2
    assert {number for number, phase in phases if phase.startswith("measuring")} <= {0, 1, 2, 3}
    path = store(found, tmp_path / "state")
    assert read(path) == found
    noise, sentence = find(header, tmp_path / "state")
    assert noise == found.noise
    assert noise.sigma > 0
    # The machine of a test may drift, and is then said to.
    assert sentence is None or "the machine drifted" in sentence


def test_ctrl_c_ends_the_worker_and_keeps_the_launches_that_are_done(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_calibrate import real, run_calibration, store
bench, header, launcher = real(Path({str(tmp_path)!r}))
keep = lambda c: store(c, Path({str(tmp_path / "state")!r}))
run_calibration(bench, header, launcher, 100, say=lambda text: print(text, flush=True), keep=keep)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    lines = []
    while not any(line.startswith("launch 4 of 100") for line in lines):
        line = process.stdout.readline()
        assert line, process.communicate()
        lines.append(line)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "are kept as a calibration of" in rest
    assert errors.rstrip().endswith("KeyboardInterrupt")
    (path,) = (tmp_path / "state").glob("*")
    kept = read(path)
    assert kept.interrupted
    assert 4 <= len(kept.launches) < 100
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU behind a fake driver, and comparisons of a fraction of a second; the driver's facts can be rewritten."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "fakes")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "fakes"))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    facts = tmp_path / "gpus.json"
    monkeypatch.setenv("TUNE_FAKE_NVML", str(facts))

    def tell(**gpu):
        part = facts.with_suffix(".part")
        part.write_text(json.dumps({"gpus": [{"uuid": "GPU-1", "watts": 100, **gpu}]}))
        part.replace(facts)

    tell()
    monkeypatch.setattr(calibrate, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(calibrate, "POLLED_UPDATES", 1)
    monkeypatch.setattr(calibrate, "CHECK_SECONDS", 0.3)
    monkeypatch.setattr(calibrate, "LEAST_CHECK_SECONDS", 0.1)
    monkeypatch.setattr(calibrate, "SAMPLE_SECONDS", 0.02)
    yield tell
    sys.modules.pop("pynvml", None)


GPU = replace(HEADER, meters=("nvml",))


def lasting(launcher, seconds=0.4):
    """A launch that takes its time, as a real one does."""
    before = launcher.script

    def script(number):
        return before(number)

    @dataclass(frozen=True, kw_only=True)
    class Lasting(Scripted):
        def __call__(self, number, proposal):
            for phase in ("measuring idle power", "loading", "warming up"):
                self.report(number, phase)
                assert not [t for t in threading.enumerate() if t.name == "calibrate"]
            for _ in range(3):
                self.report(number, "measuring 1/2")
                time.sleep(seconds / 3)
            self.report(number, "stopping")
            return self.script(number)

    return Lasting(**{**{name: getattr(launcher, name) for name in launcher.__dataclass_fields__}, "script": script})


def test_a_gpus_counter_is_held_against_its_power_idle_and_under_load(tmp_path, gpu):
    found = run_calibration(BENCH, GPU, lasting(scripted(tmp_path, 1.0, 1.1, 0.9, 1.0)), 4)
    assert [(a.domain, a.state) for a in found.agreements] == [("gpu0", "idle"), ("gpu0", "load")]
    assert not found.suspects
    assert found.notes == ()
    assert not [t for t in threading.enumerate() if t.name == "calibrate"]


def test_the_launch_beside_which_power_is_asked_for_counts_for_nothing_else(tmp_path, gpu):
    made, said, idle = [], [], []

    @dataclass(frozen=True, kw_only=True)
    class Watched(Scripted):
        def __call__(self, number, proposal):
            idle.append(self.idle_seconds_for(number))
            self.report(number, "measuring 1/2")
            time.sleep(0.05)
            made.append((number, any(t.name == "calibrate" for t in threading.enumerate())))
            self.report(number, "stopping")
            return replace(self.script(number), measurements=(window(50.0),)) if len(made) == 1 else self.script(number)

    launcher = scripted(tmp_path, 1.0, 1.1, 0.9, 1.0, idle_seconds_for=lambda _number: 10.0)
    watched = Watched(**{name: getattr(launcher, name) for name in launcher.__dataclass_fields__})
    found = run_calibration(BENCH, GPU, watched, 4, say=said.append)
    assert [number for number, _ in made] == [0, 0, 1, 2, 3]
    assert made[0][1], "power is asked for beside this one"
    assert idle[0] == 0.0
    assert found.trials == launches(1.0, 1.1, 0.9, 1.0)
    assert said[:2] == ["one launch more, to hold the counter against its power", "launch 1 of 4: 1.00 J/token"]


def test_power_is_asked_for_beside_no_launch_that_counts(tmp_path, gpu, monkeypatch):
    asked = []
    real_compare = calibrate.compare

    def watching(meter, state, wait):
        asked.append((state, len(launcher.asked)))
        return real_compare(meter, state, wait)

    launcher = scripted(tmp_path, 1.0, 1.1, 0.9, 1.0)
    monkeypatch.setattr(calibrate, "compare", watching)
    run_calibration(BENCH, GPU, launcher, 4)
    assert asked == [("idle", 0), ("load", 1)]


def test_a_launch_for_the_comparison_that_fails_before_it_measures_is_said(tmp_path, gpu):
    launcher = scripted(tmp_path, 1.0, 1.1, 0.9, 1.0)

    @dataclass(frozen=True, kw_only=True)
    class Crashing(Scripted):
        def __call__(self, number, proposal):
            if self.asked:
                return super().__call__(number, proposal)
            self.asked.append(number)
            return trial(number, error="out of memory")

    crashing = Crashing(**{name: getattr(launcher, name) for name in launcher.__dataclass_fields__})
    found = run_calibration(BENCH, GPU, crashing, 4)
    assert len(found.launches) == 4
    assert found.notes == ("nvml: not compared with power under load: the launch for it failed: out of memory",)


def test_a_launch_too_short_to_compare_is_said(tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(calibrate, "LEAST_CHECK_SECONDS", 5.0)
    found = run_calibration(BENCH, GPU, lasting(scripted(tmp_path, 1.0, 1.1, 0.9, 1.0)), 4)
    assert [a.state for a in found.agreements] == ["idle"]
    assert "not compared with its power under load" in rows(found)["not checked"]


def test_a_driver_that_tells_no_power_is_no_obstacle(tmp_path, gpu):
    gpu(errors={"nvmlDeviceGetPowerUsage": 3})
    found = run_calibration(BENCH, GPU, scripted(tmp_path, 1.0, 1.1, 0.9, 1.0), 4)
    assert found.agreements == ()
    assert found.notes[0].startswith("nvml: its counters could not be checked: GPU power: ")


def test_a_driver_that_fails_under_load_is_said_and_the_launches_count(tmp_path, gpu):
    launcher = scripted(tmp_path, 1.0, 1.1, 0.9, 1.0)

    @dataclass(frozen=True, kw_only=True)
    class Failing(Scripted):
        def __call__(self, number, proposal):
            gpu(errors={"nvmlDeviceGetPowerUsage": 15})
            self.report(number, "measuring 1/2")
            return self.script(number)

    failing = Failing(**{name: getattr(launcher, name) for name in launcher.__dataclass_fields__})
    found = run_calibration(BENCH, GPU, failing, 4)
    assert len(found.launches) == 4
    assert found.notes[0].startswith("nvml: its counters could not be checked under load: GPU power: the GPU fell off")


def test_a_meter_that_cannot_be_opened_is_said_and_the_launches_count(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE_POWERCAP_ROOT", str(tmp_path / "nothing"))
    found = run_calibration(BENCH, HEADER, scripted(tmp_path, 1.0, 1.1, 0.9, 1.0), 4)
    assert found.notes[0].startswith("rapl: its counters could not be checked: ")
    assert found.counters == ()


def test_power_that_is_sampled_has_no_counter_to_check(tmp_path):
    meter = {"wall": {**WallSource(command="echo 50 W").record(), "interval_seconds": 0.1}}
    header = replace(HEADER, meters=("wall",), meter_options={"cpu_watts": None, **meter})
    found = run_calibration(BENCH, header, scripted(tmp_path, 1.0, 1.1, 0.9, 1.0), 4)
    assert found.notes == ("wall: adds up power itself; there is no counter to hold against it",)
    assert [c.period_seconds for c in found.counters] == [None]


def test_rapl_has_no_power_to_compare_with(tmp_path, monkeypatch):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for name, text in {"name": "package-0", "energy_uj": "5000000\n", "max_energy_range_uj": "262143328850\n"}.items():
        (zone / name).write_text(text)
    monkeypatch.setenv("TUNE_POWERCAP_ROOT", str(tmp_path))
    monkeypatch.setattr(calibrate, "POLL_SECONDS", 0.05)
    found = run_calibration(BENCH, HEADER, scripted(tmp_path, 1.0, 1.1, 0.9, 1.0), 4)
    assert found.notes == ("rapl: has no reading of power to hold its counters against",)
    assert [(c.domain, c.period_seconds) for c in found.counters] == [("cpu0", None)]


def test_suspect_domains_are_named_once():
    off = Agreement(domain="gpu0", state="idle", seconds=10, counter_joules=187, power_joules=327)
    assert calibration(agreements=(off, replace(off, state="load"))).suspects == ("gpu0",)


# --- on disk ---------------------------------------------------------------------------------

texts = st.text(max_size=8)
values = st.one_of(st.floats(0.01, 100), st.just("crash"))


@given(
    values=st.lists(values, min_size=4, max_size=9).filter(lambda v: sum(not isinstance(x, str) for x in v) > 3),
    facts=st.dictionaries(texts, texts, max_size=3),
    seconds=st.floats(0.1, 100),
    watts=st.none() | st.just([15.0, 65.0]),
    interrupted=st.booleans(),
)
def test_what_is_stored_is_read_back_and_found(values, facts, seconds, watts, interrupted):
    made = calibration(
        launches(*values),
        identity=facts,
        machine={**MACHINE, **facts},
        window_seconds=seconds,
        meter_options={"cpu_watts": watts},
        interrupted=interrupted,
        counters=(Counter(domain="gpu0", declared_seconds=0.1, period_seconds=0.09, looks=9, changes=3),),
    )
    header = replace(
        HEADER,
        identity=facts,
        machine={**MACHINE, **facts},
        plan=replace(PLAN, window_seconds=seconds),
        meter_options={"cpu_watts": watts},
    )
    with tempfile.TemporaryDirectory() as folder:
        assert read(store(made, Path(folder))) == made
        assert find(header, Path(folder))[0] == made.noise


def test_a_stored_calibration_is_readable_for_people_and_says_its_format_and_sigma(tmp_path):
    path = store(calibration(), tmp_path)
    assert path.name == "llama-20261122-120000.json"
    found = json.loads(path.read_text())
    assert (found["format"], found["degrees"], found["sigma"]) == (1, 7, calibration().sigma)
    assert len(path.read_text().splitlines()) > 20
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_calibration_is_never_written_over_another(tmp_path):
    first, second = store(calibration(), tmp_path), store(calibration(noisy(2)), tmp_path)
    assert second.name == "llama-20261122-120000-2.json"
    assert read(first) != read(second)


def test_a_name_that_another_process_is_writing_is_left_to_it(tmp_path):
    (tmp_path / "llama-20261122-120000.json.part").write_text("half")
    assert store(calibration(), tmp_path).name == "llama-20261122-120000-2.json"
    assert (tmp_path / "llama-20261122-120000.json.part").read_text() == "half"


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CalibrationError, match=r"No space left on device; set TUNE_STATE to another folder"):
        store(calibration(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="the calibration cannot be written"):
        store(calibration(), tmp_path / "file" / "calibrations")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TUNE_STATE": "/a"}, "/a/calibrations"),
        ({"TUNE_STATE": "/a", "XDG_STATE_HOME": "/b"}, "/a/calibrations"),
        ({"XDG_STATE_HOME": "/b"}, "/b/tune/calibrations"),
        ({"XDG_STATE_HOME": "relative"}, "/home/me/.local/state/tune/calibrations"),
        ({}, "/home/me/.local/state/tune/calibrations"),
    ],
)
def test_where_calibrations_are_kept(monkeypatch, variables, expected):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("TUNE_STATE", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert calibrations_folder() == Path(expected)


def test_left_out_the_folder_is_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE_STATE", str(tmp_path))
    assert store(calibration()).parent == tmp_path / "calibrations"
    assert find(HEADER)[0] == calibration().noise


def test_the_newest_one_that_fits_wins_and_older_ones_stay(tmp_path):
    old = store(calibration(noisy(1)), tmp_path)
    newest = calibration(noisy(2), started_unix=NOON + 60)
    store(newest, tmp_path)
    store(calibration(noisy(3), started_unix=NOON + 120, windows=9), tmp_path)
    assert find(HEADER, tmp_path) == (newest.noise, None)
    assert old.exists()


def test_where_nothing_was_calibrated_nothing_is_said(tmp_path):
    assert find(HEADER, tmp_path / "absent") == (None, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window_seconds": 5.0}, "windows of 5 s, here 2 s"),
        ({"windows": 5}, "--windows 5, here 3"),
        ({"meters": ("nvml", "rapl")}, "--meter nvml+rapl, here rapl"),
        ({"meter_options": {"cpu_watts": [15.0, 65.0]}}, "--cpu-watts [15.0,65.0], here none"),
        ({"target": Target(prompts=16)}, "--prompts 16, here 8"),
        ({"target": Target(model="/a.gguf")}, "--model /a.gguf, here none"),
        ({"identity": {**IDENTITY, "engine_version": "2"}}, "engine version 2, here 1"),
        ({"machine": {**MACHINE, "governor": "powersave"}}, "governor powersave, here performance"),
        ({"machine": {**MACHINE, "gpu0": "H100 (GPU-1)"}}, "gpu0 H100 (GPU-1), here none"),
        ({"windows": 5, "target": Target(seed=1)}, "--seed 1, here 0 and --windows 5, here 3"),
        ({"config": {**SPACE.default(), "parallel": 8}}, "--pin parallel 8, here 4"),
    ],
)
def test_one_that_nearly_fits_is_named_with_what_differs(tmp_path, changes, words):
    store(calibration(**changes), tmp_path)
    noise, sentence = find(HEADER, tmp_path)
    assert noise is None
    assert sentence.startswith(f"a calibration of 2026-11-22 exists for {words}; `tune calibrate`")


def test_the_nearest_of_several_is_named(tmp_path):
    store(calibration(windows=9, target=Target(prompts=9)), tmp_path)
    store(calibration(windows=5, started_unix=NOON - 60), tmp_path)
    assert "exists for --windows 5, here 3;" in find(HEADER, tmp_path)[1]


def test_a_calibration_of_something_else_is_not_mentioned(tmp_path):
    store(calibration(windows=9, target=Target(prompts=9, output_tokens=9)), tmp_path)
    assert find(HEADER, tmp_path) == (None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"target": Target(allow_lossy=True)},
        {"machine": {**MACHINE, "kernel": "9.9", "tune": "0"}},
        {"config": {**SPACE.default(), "gpu_power_limit_w": 300}},
    ],
)
def test_what_leaves_the_load_as_it_is_need_not_agree(tmp_path, changes):
    store(calibration(**changes), tmp_path)
    assert find(HEADER, tmp_path)[0] == calibration().noise


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "no calibration"),
        (b"{}", "no calibration"),
        (b'{"format": 1, "calibration": {"started_unix": "x"}}', "no calibration"),
        (b'{"format": 2, "calibration": {}}', "written in format 2, this tune reads up to format 1"),
        (b"\xff\x00", "no calibration"),
        (None, "Is a directory"),
    ],
)
def test_a_damaged_file_is_skipped_with_a_sentence(tmp_path, content, cause):
    store(calibration(), tmp_path)
    bad = tmp_path / "bad.json"
    bad.mkdir() if content is None else bad.write_bytes(content)
    noise, sentence = find(HEADER, tmp_path)
    assert noise == calibration().noise
    assert sentence.startswith(f"{bad}: ")
    assert cause in sentence
    assert sentence.endswith("; it was skipped")


@given(cut=st.integers(0, 400))
def test_a_torn_file_is_never_fatal(cut):
    with tempfile.TemporaryDirectory() as folder:
        path = store(calibration(), Path(folder))
        path.write_bytes(path.read_bytes()[:-cut] if cut else path.read_bytes())
        noise, sentence = find(HEADER, Path(folder))
        assert (noise is None) == (sentence is not None)


def test_a_file_of_too_few_launches_is_skipped(tmp_path):
    path = store(calibration(), tmp_path)
    content = json.loads(path.read_text())
    content["calibration"]["trials"] = content["calibration"]["trials"][:3]
    path.write_bytes(msgspec.json.encode(content))
    noise, sentence = find(HEADER, tmp_path)
    assert noise is None
    assert "holds 3 measured launches, expected 4 or more" in sentence


def test_what_speaks_against_the_one_that_fits_is_said(tmp_path):
    off = Agreement(domain="gpu0", state="idle", seconds=10, counter_joules=187, power_joules=327)
    rng = random.Random(3)
    values = [math.exp(rng.gauss(0, 0.001) + 0.1 * (n % 4 in (1, 2)) + 0.2 * (n > 7)) for n in range(16)]
    store(calibration(launches(*values), agreements=(off,)), tmp_path)
    noise, sentence = find(HEADER, tmp_path)
    assert noise is not None
    assert sentence.startswith(
        "of the calibration of 2026-11-22: the counter of gpu0 is suspect, the machine drifted: 22 %"
    )
    assert sentence.endswith("its A/A check failed")
