import math
from dataclasses import replace

import pytest
from fakes.meters import Burner, Script
from hypothesis import given
from hypothesis import strategies as st

from tuner.journal import Plan
from tuner.measure import Clocks, difference, implausible, measure, together
from tuner.trial import Energy, MeterError, Reading, Work


class Clock:
    """Advances only when a pass runs."""

    def __init__(self):
        self.now = 0.0
        self.asleep = 0.0

    def __call__(self):
        return self.now


class Engine:
    effective = {}

    def __init__(self, clock, pass_seconds=1.0, on_pass=lambda n: None):
        self.clock, self.pass_seconds, self.passes, self.on_pass = clock, pass_seconds, 0, on_pass

    def run_pass(self):
        self.clock.now += self.pass_seconds
        self.passes += 1
        self.on_pass(self.passes)
        return Work(units=10, prompt_tokens=5, prefill_seconds=0.25, decode_seconds=0.75)


def clocks_of(clock):
    return Clocks(seconds=clock, boot_seconds=lambda: clock.now + clock.asleep, cpu_seconds=lambda: clock.now / 2)


def run(meter, plan, *, clock=None, engine=None, report=lambda phase: None):
    clock = clock or Clock()
    return tuple(measure(engine or Engine(clock), meter, plan, clocks_of(clock), report))


def test_a_window_holds_whole_passes_and_lasts_at_least_as_long_as_asked():
    clock = Clock()
    (window,) = run(Burner(clock), Plan(windows=1, window_seconds=2.5), clock=clock)
    assert (window.seconds, window.work.units) == (3.0, 30)


def test_energy_is_the_counters_difference_over_the_window():
    clock = Clock()
    (window,) = run(Burner(clock, watts=40), Plan(windows=1, window_seconds=2), clock=clock)
    assert window.joules == pytest.approx(80.0)
    assert window.joules_per_unit == pytest.approx(4.0)


def test_one_slow_pass_is_a_window_even_when_none_was_asked_to_be_long():
    clock = Clock()
    (window,) = run(Burner(clock), Plan(windows=1, window_seconds=0.0), clock=clock)
    assert window.work.units == 10


def test_cpu_seconds_are_those_inside_the_window():
    clock = Clock()
    windows = run(Burner(clock), Plan(windows=3, window_seconds=1), clock=clock)
    assert [w.cpu_seconds for w in windows] == [0.5, 0.5, 0.5]


def test_each_window_is_announced_before_it_begins():
    clock, told = Clock(), []
    run(Burner(clock), Plan(windows=2, window_seconds=1), clock=clock, report=told.append)
    assert told == ["measuring 1/2", "measuring 2/2"]


INVALID = [
    pytest.param(("cpu0: permission denied",), "permission denied", id="unreadable before"),
    pytest.param((0, "cpu0: vanished"), "vanished", id="unreadable after"),
    pytest.param((5_000_000, 1_000_000), "went back by 4 J", id="counter went back"),
    pytest.param((7, 7), "did not move", id="stuck counter"),
    pytest.param((0, 10**15), "more than any device draws", id="absurd power"),
]


@pytest.mark.parametrize(("readings", "cause"), INVALID)
def test_a_bad_reading_makes_the_window_invalid_with_its_cause_and_no_energy(readings, cause):
    # The reader gives up on a window after its first fault, so a fault before is followed by a good reading after.
    script = Script(*readings, *([50] if len(readings) == 1 else []), *[1, 2_000_000] * 3)
    windows = run(script, Plan(windows=1, window_seconds=1))
    assert cause in windows[0].invalid[0]
    assert windows[0].energy == {}
    assert windows[0].joules_per_unit is None
    assert windows[1].valid


def test_an_invalid_window_is_measured_again_three_times_at_most():
    windows = run(Script(*[10, 5] * 10), Plan(windows=5, window_seconds=1, retries=3))
    assert len(windows) == 4
    assert not any(w.valid for w in windows)


def test_invalid_windows_do_not_count_towards_the_windows_asked_for():
    windows = run(Script(0, 1_000_000, 5, 4, 0, 1_000_000), Plan(windows=2, window_seconds=1))
    assert [w.valid for w in windows] == [True, False, True]


def test_a_machine_that_slept_makes_the_window_invalid():
    clock = Clock()

    def sleep(n):
        clock.asleep = 30.0 if n == 1 else clock.asleep

    engine = Engine(clock, on_pass=sleep)
    windows = run(Burner(clock), Plan(windows=1, window_seconds=1), clock=clock, engine=engine)
    assert "suspended for 30.0 s" in windows[0].invalid[0]
    assert windows[1].valid


def test_an_estimate_of_zero_joules_is_not_called_a_stuck_counter():
    assert implausible({"cpu0": Energy(0.0, 0.0, 0.0)}, 1.0, measured=False) == []


@pytest.mark.parametrize("units", [0, -3])
def test_a_pass_without_output_is_no_measurement(units):
    clock = Clock()
    engine = Engine(clock)
    engine.run_pass = lambda: Work(units=units)
    with pytest.raises(RuntimeError, match=f"reported {units} tokens for a pass"):
        run(Burner(clock), Plan(windows=1), clock=clock, engine=engine)


def test_what_others_used_is_the_machines_cpu_time_less_our_own():
    clock = Clock()
    clocks = replace(clocks_of(clock), busy_cpu_seconds=lambda: 2 * clock.now)
    (window,) = measure(Engine(clock), Burner(clock), Plan(windows=1, window_seconds=2), clocks, lambda phase: None)
    assert (window.cpu_seconds, window.other_cpu_seconds) == (1.0, 3.0)


def test_what_others_used_is_unknown_where_the_system_does_not_say():
    clock = Clock()
    (window,) = run(Burner(clock), Plan(windows=1, window_seconds=1), clock=clock)
    assert window.other_cpu_seconds is None


def test_cpu_time_that_cannot_be_read_makes_the_window_invalid_and_not_the_trial():
    clock, faults = Clock(), iter(["children come and go too fast"])

    def cpu_seconds():
        for fault in faults:
            raise MeterError(fault)
        return clock.now

    clocks = replace(clocks_of(clock), cpu_seconds=cpu_seconds)
    first, second = measure(Engine(clock), Burner(clock), Plan(windows=1, window_seconds=1), clocks, lambda phase: None)
    assert first.invalid == ("children come and go too fast",)
    assert first.cpu_seconds is None
    assert second.valid


def test_a_meter_without_a_domain_measures_nothing():
    assert implausible({}, 1.0, measured=True) == ["the meter has no domain"]


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)), min_size=1, max_size=5))
def test_joules_are_microjoules_over_a_million_in_every_domain(pairs):
    before = {f"gpu{i}": Reading.exact(a) for i, (a, _) in enumerate(pairs)}
    after = {f"gpu{i}": Reading.exact(a + b) for i, (a, b) in enumerate(pairs)}
    energies = difference(before, after)
    assert all(math.isclose(energies[f"gpu{i}"].joules, b / 1e6) for i, (_, b) in enumerate(pairs))


def test_an_interval_stays_an_interval():
    (energy,) = difference({"cpu0": Reading(0, 0, 0)}, {"cpu0": Reading(2_000_000, 1_000_000, 4_000_000)}).values()
    assert energy == Energy(joules=2.0, low=1.0, high=4.0)


def test_several_passes_add_up_and_a_split_that_one_lacks_is_lacking():
    split = Work(units=1, prompt_tokens=2, prefill_seconds=1.0, decode_seconds=2.0, request_seconds=(1.0,))
    lacking = Work(units=3, prompt_tokens=4, decode_seconds=5.0, request_seconds=(2.0, 3.0))
    assert together([split, lacking]) == Work(
        units=4, prompt_tokens=6, prefill_seconds=None, decode_seconds=7.0, request_seconds=(1.0, 2.0, 3.0)
    )
