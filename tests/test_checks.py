from dataclasses import replace

import pytest
from records import trial, window

from tuner.checks import doubts
from tuner.trial import Energy, History, Repeat, WarmUp

FINE = trial(0, joules=(1.0, 1.01, 0.99))


def of(doubted, *earlier):
    return doubts(doubted, History(trials=earlier))


def windows(*made):
    return replace(FINE, measurements=made)


def on_gpu(seconds):
    return replace(window(1.0, seconds=seconds), energy={"gpu0": Energy(100, 100, 100), "cpu0": Energy(9, 9, 9)})


def test_a_sound_measurement_raises_no_doubt():
    assert of(FINE) == []


CASES = {
    "short window": (windows(*[window(1.0, seconds=0.5)] * 3), ["windows of 0.5 s are short", "--window 2s"]),
    "few counter periods": (
        windows(*[on_gpu(4.0)] * 3),
        ["40 updates of the gpu0 counter", "off by 2.5 %", "--window 10s"],
    ),
    "few samples": (
        windows(*[window(1.0, quality="sampled", seconds=29.0)] * 3),
        ["windows of 29 s hold few samples of power", "--window 30s"],
    ),
    "few windows": (windows(*[window(1.0)] * 2), ["2 windows say little", "--windows 5"]),
    "one window": (windows(window(1.0)), ["1 window says little", "--windows 5"]),
    "spread": (windows(window(1.0), window(1.3), window(0.9)), ["differ by 20 %", "--windows 6"]),
    "repeated": (
        windows(*[window(1.0)] * 3, window(1.0, invalid=["cpu0: the counter went back by 3 J"])),
        ["1 of 4 windows did not count", "went back by 3 J", "tune doctor"],
    ),
    "estimate": (
        windows(*[window(1.0, quality="estimated")] * 3),
        ["estimated from CPU time, not measured", "500 mJ to 1.50 J", "tune doctor"],
    ),
    "not as asked": (
        replace(FINE, effective={"threads": 4, "parallel": 4}),
        ["threads is 4, asked for was 2", "--pin threads=4"],
    ),
    "others": (
        windows(*[replace(window(1.0), other_cpu_seconds=3.0)] * 3),
        ["other processes kept 1.50 CPUs busy", "top"],
    ),
    "idle": (windows(*[replace(window(1.0), cpu_seconds=0.01)] * 3), ["kept 0.00500 CPUs busy", "--meter"]),
    "failed again": (
        replace(FINE, repeats=(trial(0), trial(0, error="killed by SIGSEGV"))),
        ["1 of 3 launches failed (killed by SIGSEGV)", "--range"],
    ),
    "not steady": (
        replace(FINE, warm_up=WarmUp(seconds=10.0, units_per_second=(1.0, 2.0, 3.0), steady=False)),
        ["not steady after 10 s", "--warm-up 10s..30s"],
    ),
    "hardly any warm-up": (
        replace(FINE, warm_up=WarmUp(seconds=0.1, units_per_second=(1.0,), steady=False)),
        ["--warm-up 1s..3s"],
    ),
    "coarse counter": (
        windows(*[replace(window(1.0), energy={"wall0": Energy(100, 95, 105)})] * 3),
        ["moves in steps", "off by 5.0 %", "--window"],
    ),
    "long load": (replace(FINE, load_seconds=200.0), ["loading took 3 min 20 s for 6.0 s measured", "--window 20s"]),
}


@pytest.mark.parametrize(("doubted", "parts"), CASES.values(), ids=CASES)
def test_a_doubt_says_what_was_seen_and_what_to_type(doubted, parts):
    (said,) = of(doubted)
    assert all(part in said for part in parts), said


def test_a_little_of_what_others_do_is_no_doubt():
    assert of(windows(*[replace(window(1.0), other_cpu_seconds=0.4)] * 3)) == []


def test_what_the_engine_made_of_auto_is_no_doubt():
    assert of(replace(FINE, effective={"flash": "on"})) == []


def test_a_long_enough_window_of_a_slow_counter_is_not_doubted():
    assert of(windows(*[on_gpu(10.0)] * 3)) == []


def test_thirty_seconds_of_sampled_power_are_not_doubted():
    assert of(windows(*[window(1.0, quality="sampled", seconds=30.0)] * 3)) == []


def test_what_is_the_same_for_all_trials_is_said_once():
    first = windows(*[window(1.0, quality="estimated", seconds=0.5)] * 2)
    again = replace(first, number=1)
    assert len(of(first)) == 3
    assert of(again, first) == []
    assert len(of(replace(again, segment=1), first)) == 3, "another segment is another machine"


def test_what_belongs_to_one_trial_is_said_each_time():
    spread = windows(window(1.0), window(1.3), window(0.9))
    assert len(of(replace(spread, number=1), spread)) == 1


def test_a_gpu_engine_that_leaves_the_cpu_idle_is_not_doubted():
    assert of(windows(*[replace(on_gpu(20.0), cpu_seconds=0.0)] * 3)) == []


def test_replayed_windows_are_not_asked_to_be_longer():
    assert of(windows(window(1.0, quality="replayed", seconds=0.1))) == []


def test_a_failed_trial_raises_no_doubt():
    assert of(trial(1, error="killed")) == []


def test_unknown_cpu_time_is_not_taken_for_idle():
    assert of(windows(*[replace(window(1.0), cpu_seconds=None)] * 3)) == []


def test_a_steady_engine_is_not_doubted():
    assert of(replace(FINE, warm_up=WarmUp(seconds=1.0, units_per_second=(1.0, 1.0, 1.0), steady=True))) == []


def test_trials_are_doubted_that_ran_while_the_machine_drifted():
    history = History()
    for number in range(4):
        history = history.add(trial(number, joules=(1.0,) * 3))
    later = replace(trial(0, joules=(1.1,) * 3), repeats=())
    history = history.add(Repeat(trial=later, purpose="sentinel", after=4))
    (said,) = [d for d in doubts(history.trials[2], history) if "drifted" in d]
    assert "trial 0 used 10 % more when it ran again, so trials 1 to 3" in said
    assert not [d for d in doubts(history.trials[0], history) if "drifted" in d]
