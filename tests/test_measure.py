import itertools
import math
from dataclasses import replace

import pytest
from fakes.meters import Burner, Script, Stepper
from hypothesis import given
from hypothesis import strategies as st

from tuner.journal import Plan
from tuner.measure import (
    Clocks,
    agree,
    crowded,
    difference,
    expected_units,
    idle_watts,
    implausible,
    measure,
    settling_seconds,
    together,
    unfinished,
    warm_up,
)
from tuner.telemetry import Begun, Sampler
from tuner.trial import Energy, MeterError, Reading, Span, Target, Telemetry, Work


class Clock:
    """Advances only when a pass runs or something waits."""

    def __init__(self, now=0.0):
        self.now = now
        self.asleep = 0.0
        self.waits = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


class Engine:
    effective = {}

    def __init__(self, clock, pass_seconds=1.0, on_pass=lambda n: None, **work):
        self.clock, self.pass_seconds, self.passes, self.on_pass = clock, pass_seconds, 0, on_pass
        self.work = {"units": 10, "prompt_tokens": 5, "prefill_seconds": 0.25, "decode_seconds": 0.75, **work}

    def run_pass(self):
        self.clock.now += self.pass_seconds
        self.passes += 1
        self.on_pass(self.passes)
        return Work(**self.work)


class Watched(Sampler):
    """A sampler of which a test says what it has seen."""

    def __init__(self, *, slope=(), slow=(), strangers=(), limits=None):
        self.slopes, self.slow, self.there, self.limits = iter(slope), list(slow), list(strangers), limits or {}
        self.seen = []

    def begin(self):
        return Begun({}, {})

    def end(self, begun, start, end):
        self.seen.append((start, end))
        return Telemetry(samples=1, spans={"gpu0_celsius": Span(40, 41, 42)}), self.slow, self.there

    def celsius(self):
        return {"gpu0_celsius": 40.0}

    def celsius_per_second(self, since):
        self.since = since
        return next(self.slopes, None)

    def limit_watts(self):
        return self.limits


def clocks_of(clock):
    return Clocks(
        seconds=clock,
        boot_seconds=lambda: clock.now + clock.asleep,
        unix_seconds=lambda: 1e9 + clock.now,
        sleep=clock.sleep,
        cpu_seconds=lambda: clock.now / 2,
        logical_cpus=4,
    )


def run(meter, plan, *, clock=None, engine=None, report=lambda phase: None, **more):
    clock = clock or Clock()
    return tuple(measure(engine or Engine(clock), meter, plan, clocks_of(clock), report, **more))


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
    plan = Plan(windows=1, window_seconds=2, most_others=1.0)
    (window,) = measure(Engine(clock), Burner(clock), plan, clocks, lambda phase: None)
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
    split = Work(
        units=1, prompt_tokens=2, prefill_seconds=1.0, decode_seconds=2.0, request_seconds=(1.0,), failed_requests=2
    )
    lacking = Work(units=3, prompt_tokens=4, decode_seconds=5.0, request_seconds=(2.0, 3.0))
    assert together([split, lacking]) == Work(
        units=4,
        prompt_tokens=6,
        prefill_seconds=None,
        decode_seconds=7.0,
        request_seconds=(1.0, 2.0, 3.0),
        failed_requests=2,
    )


def test_a_window_says_when_it_began_how_many_passes_it_holds_and_what_the_counter_read():
    clock = Clock(5.0)
    (window,) = run(Burner(clock, watts=2), Plan(windows=1, window_seconds=2), clock=clock)
    assert (window.passes, window.started_unix) == (2, 1e9 + 5)
    assert window.readings == {"cpu0": (10_000_000, 14_000_000)}


def test_an_invalid_window_keeps_what_was_read():
    window, *_ = run(Script(50, 20, *[1, 2_000_000] * 3), Plan(windows=1, window_seconds=1))
    assert window.readings == {"cpu0": (50, 20)}
    assert not window.valid


# --- edges -----------------------------------------------------------------------------------


@given(
    phase=st.floats(0, 1),
    pass_seconds=st.floats(0.013, 3.7),
    least=st.floats(0, 20),
    period=st.sampled_from([0.005, 0.1, 1.0]),
)
def test_a_window_between_ticks_has_the_power_that_was_drawn(phase, pass_seconds, least, period):
    clock = Clock(phase)
    plan = Plan(windows=1, window_seconds=least)
    meter = Stepper(clock, watts=70, gpu0=period)
    (window,) = run(meter, plan, clock=clock, engine=Engine(clock, pass_seconds))
    assert window.aligned
    # Each end is noticed a twentieth of a period late at most.
    late = period / 20 / window.seconds
    assert window.joules / window.seconds == pytest.approx(70, rel=1.01 * late + 1e-6)


def test_without_ticks_the_same_window_would_be_off():
    clock = Clock(0.05)
    meter = Stepper(clock, watts=70, gpu0=0.1)
    meter.update_seconds = 0.0
    (window,) = run(meter, Plan(windows=1, window_seconds=1), clock=clock, engine=Engine(clock, 1.06))
    assert not window.aligned
    assert window.joules / window.seconds > 1.03 * 70


def test_a_window_ends_within_one_period_of_its_last_pass():
    clock = Clock(0.05)
    (window,) = run(Stepper(clock, gpu0=0.1), Plan(windows=1, window_seconds=2), clock=clock)
    assert 2.0 <= window.seconds <= 2.105


def test_all_counters_are_waited_for_so_the_slowest_one_has_moved():
    clock = Clock(0.05)
    meter = Stepper(clock, gpu0=0.1, cpu0=0.001, gpu1=0.07)
    (window,) = run(meter, Plan(windows=1, window_seconds=1), clock=clock)
    assert window.aligned
    assert window.energy["gpu0"].joules / window.seconds == pytest.approx(100, rel=0.006)


def test_a_counter_that_stands_still_is_waited_for_three_periods_and_is_no_failure_of_the_edge():
    clock = Clock()
    meter = Stepper(clock, gpu0=0.1, gpu1=0.0)
    window, *_ = run(meter, Plan(windows=1, window_seconds=1, retries=0), clock=clock)
    assert not window.aligned
    assert window.invalid == (f"gpu1: the counter did not move in {window.seconds:.2f} s",)
    assert sum(clock.waits) == pytest.approx(2 * 0.3, abs=0.011)


def test_a_fast_counter_is_read_as_it_is():
    clock = Clock()
    meter = Stepper(clock, cpu0=0.001)
    (window,) = run(meter, Plan(windows=1, window_seconds=1), clock=clock)
    assert (window.aligned, clock.waits) == (False, [])
    assert window.valid


@pytest.mark.parametrize("quality", ["sampled", "replayed", "simulated", "estimated"])
def test_what_grows_without_steps_is_not_waited_for_and_not_called_aligned(quality):
    clock = Clock()
    meter = Burner(clock)
    meter.quality, meter.update_seconds = quality, 1.0
    (window,) = run(meter, Plan(windows=1, window_seconds=1), clock=clock)
    assert (window.valid, window.aligned, window.seconds, clock.waits) == (True, False, 1.0, [])


def test_an_edge_that_cannot_be_read_is_a_cause():
    clock = Clock()
    meter = Stepper(clock, gpu0=0.1)
    good, calls = meter.read, itertools.count()

    def read():
        if next(calls) == 1:
            raise MeterError("gpu0: fell off the bus")
        return good()

    meter.read = read
    window, again = run(meter, Plan(windows=1, window_seconds=1), clock=clock)
    assert window.invalid == ("gpu0: fell off the bus",)
    assert again.valid


def test_a_counter_that_wrapped_is_told():
    clock = Clock()
    meter = Burner(clock)
    meter.wraps = {"cpu0": 3, "cpu1": 1}

    def wrap(_):
        meter.wraps = {"cpu0": 5, "cpu1": 1}

    (window,) = run(meter, Plan(windows=1, window_seconds=1), clock=clock, engine=Engine(clock, on_pass=wrap))
    assert window.wraps == {"cpu0": 2}


# --- causes ----------------------------------------------------------------------------------


def test_a_failed_request_makes_the_window_invalid_and_ends_it():
    clock = Clock()
    engine = Engine(clock, units=0, failed_requests=2, request_seconds=(0.1, 0.1))
    windows = run(Burner(clock), Plan(windows=1, window_seconds=50, retries=2), clock=clock, engine=engine)
    assert [w.invalid for w in windows] == [("2 of 2 requests brought no answer; the engine's log says why",)] * 3
    assert [w.passes for w in windows] == [1, 1, 1]
    assert windows[0].work.failed_requests == 2


def test_the_cause_of_a_failed_request_is_told_and_kept_in_the_windows_faults_only():
    clock = Clock()
    engine = Engine(clock, units=0, failed_requests=1, request_seconds=(0.1, 0.1), failure="it answered HTTP 500")
    (window,) = run(Burner(clock), Plan(windows=1, window_seconds=50, retries=0), clock=clock, engine=engine)
    assert window.invalid == ("1 of 2 requests brought no answer: it answered HTTP 500",)
    assert window.work.failure is None


def test_requests_that_are_not_timed_are_not_counted_as_sent():
    assert unfinished([Work(units=1, failed_requests=2)], None) == [
        "2 requests brought no answer; the engine's log says why"
    ]


@pytest.mark.parametrize(
    ("units", "unit", "expected", "valid"),
    [
        (1000, "token", 1000, True),
        (996, "token", 1000, True),
        (994, "token", 1000, False),
        (1006, "token", 1000, False),
        (4, "image", 1000, True),
        (994, "token", None, True),
    ],
)
def test_a_pass_must_bring_the_tokens_that_were_asked_for(units, unit, expected, valid):
    clock = Clock()
    engine = Engine(clock, units=units, unit=unit)
    plan = Plan(windows=1, window_seconds=2, retries=0)
    (window,) = run(Burner(clock), plan, clock=clock, engine=engine, expected_units=expected)
    assert window.valid == valid
    if not valid:
        assert window.invalid == (f"a pass brought {units} tokens, 1000 were asked for (prompts x output tokens)",)


@pytest.mark.parametrize(("made", "valid"), [(4, True), (3, False), (5, False)])
def test_a_pass_must_make_the_images_that_were_asked_for(made, valid):
    clock = Clock()
    plan = Plan(windows=1, window_seconds=2, retries=0)
    engine = Engine(clock, units=made, unit="image")
    (window,) = run(Burner(clock), plan, clock=clock, engine=engine, expected_units=4, unit="image")
    assert window.invalid == (() if valid else (f"a pass brought {made} images, 4 were asked for",))


@pytest.mark.parametrize(("unit", "expected"), [("token", 6), ("image", 3), ("epoch", None)])
def test_a_pass_is_asked_for_output_tokens_of_each_prompt_or_for_one_image_of_each(unit, expected):
    assert expected_units(Target(prompts=3, output_tokens=2), unit) == expected


@pytest.mark.parametrize(("most", "valid"), [(0.5, False), (0.74, False), (0.76, True), (1.0, True)])
def test_too_much_load_from_others_makes_a_window_invalid(most, valid):
    clock = Clock()
    clocks = replace(clocks_of(clock), busy_cpu_seconds=lambda: 3.5 * clock.now)  # 3 of 4 CPUs are others'
    plan = Plan(windows=1, window_seconds=10, retries=0, most_others=most)
    (window,) = measure(Engine(clock), Burner(clock), plan, clocks, lambda phase: None)
    assert window.valid == valid


def test_load_from_others_is_told_with_the_limit_and_the_way_to_raise_it():
    (said,) = crowded(15.0, 10.0, 4, 0.25)
    assert said.startswith("other processes kept 1.5 of 4 CPUs busy, at most 1 are allowed (--most-others 0.25);")
    assert said.endswith("stop them (`top` shows which), or raise it")


@given(others=st.floats(0, 0.05), seconds=st.floats(0.001, 1e4), most=st.floats(0, 1))
def test_load_below_the_tick_of_the_clock_that_counts_it_is_none(others, seconds, most):
    assert crowded(others, seconds, 4, most) == []


@pytest.mark.parametrize(("quality", "valid"), [("replayed", True), ("simulated", True), ("estimated", False)])
def test_what_happens_on_this_machine_is_no_cause_against_a_recorded_one(quality, valid):
    clock = Clock()
    clocks = replace(clocks_of(clock), busy_cpu_seconds=lambda: 4 * clock.now)
    meter = Burner(clock)
    meter.quality = quality
    sampler = Watched(slow=["cpu: hot"], strangers=["gpu0: process 1"])
    plan = Plan(windows=1, window_seconds=10, retries=0)
    (window,) = measure(Engine(clock), meter, plan, clocks, lambda phase: None, sampler=sampler)
    assert window.valid == valid


def test_slowdowns_and_strangers_are_causes_and_the_telemetry_stays_with_the_window():
    clock = Clock()
    sampler = Watched(slow=["gpu0: ran slower"], strangers=["gpu0: process 7"])
    plan = Plan(windows=1, window_seconds=1, retries=0)
    (window,) = run(Burner(clock), plan, clock=clock, sampler=sampler)
    assert window.invalid == ("gpu0: ran slower", "gpu0: process 7")
    assert window.telemetry.spans == {"gpu0_celsius": Span(40, 41, 42)}
    assert sampler.seen == [(0.0, 1.0)]


def test_whoever_allows_all_others_allows_strangers_on_the_gpu_too_but_no_slowdown():
    clock = Clock()
    sampler = Watched(slow=["gpu0: ran slower"], strangers=["gpu0: process 7"])
    plan = Plan(windows=1, window_seconds=1, retries=0, most_others=1.0)
    (window,) = run(Burner(clock), plan, clock=clock, sampler=sampler)
    assert window.invalid == ("gpu0: ran slower",)


def test_all_causes_of_a_window_are_kept():
    clock = Clock()
    engine = Engine(clock, units=5, failed_requests=1)
    sampler = Watched(slow=["gpu0: ran slower"])
    script = Script("cpu0: unreadable", 50)
    (window,) = run(script, Plan(windows=1, window_seconds=1, retries=0), clock=clock, engine=engine, sampler=sampler)
    assert [cause.split()[0] for cause in window.invalid] == ["cpu0:", "gpu0:", "1"]


@pytest.mark.parametrize(("watts", "fault"), [(389, None), (391, "gpu0: 391 W is far above its power limit of 300 W")])
def test_a_gpu_cannot_draw_much_more_than_its_limit(watts, fault):
    energy = {"gpu0": Energy(watts * 10.0, watts * 10.0, watts * 10.0)}
    assert implausible(energy, 10.0, measured=True, limits={"gpu0": 300.0}) == ([fault] if fault else [])


def test_the_limit_is_that_of_the_moment():
    clock = Clock()
    plan = Plan(windows=1, window_seconds=1, retries=0)
    (window,) = run(Burner(clock, watts=100), plan, clock=clock, sampler=Watched(limits={"cpu0": 70.0}))
    assert window.invalid == ("cpu0: 100 W is far above its power limit of 70 W",)


@pytest.mark.parametrize(("watts", "valid"), [(49, False), (51, True)])
def test_work_for_less_than_half_of_the_idle_power_is_no_reading(watts, valid):
    clock = Clock()
    plan = Plan(windows=1, window_seconds=1, retries=0)
    (window,) = run(Burner(clock, watts=watts), plan, clock=clock, least_watts=100.0)
    assert window.valid == valid
    if not valid:
        assert window.invalid == ("49.0 W under load is less than half of the 100.0 W of the idle machine",)


@given(st.floats(1, 1e4), st.floats(1, 1e4))
def test_no_value_above_half_the_idle_power_and_below_every_limit_is_a_cause(watts, idle):
    energy = {"cpu0": Energy(watts, watts, watts)}
    faults = implausible(energy, 1.0, measured=True, least_watts=idle)
    assert bool(faults) == (watts < idle / 2)


# --- warm-up ---------------------------------------------------------------------------------


class Curve(Engine):
    """Passes of one second, whose units follow a list; the last one goes on."""

    def __init__(self, clock, *units, pass_seconds=1.0):
        super().__init__(clock, pass_seconds)
        self.curve = list(units)

    def run_pass(self):
        super().run_pass()
        units = self.curve.pop(0) if len(self.curve) > 1 else self.curve[0]
        return Work(units=units, failed_requests=0 if units else 1)


def warmed(engine, clock, least, most, sampler=None, quality="measured"):
    told, meter = [], Burner(clock)
    meter.quality = quality
    done = warm_up(engine, meter, Plan(warm_up_seconds=(least, most)), clocks_of(clock), told.append, sampler)
    assert told == ["warming up"]
    return done


def test_a_plan_without_warm_up_runs_no_pass():
    clock = Clock()
    engine = Engine(clock)
    assert warm_up(engine, Burner(clock), Plan(), clocks_of(clock), lambda phase: None) is None
    assert engine.passes == 0


def test_an_engine_is_warm_when_three_slices_agree_within_two_per_cent():
    clock = Clock()
    done = warmed(Curve(clock, 50, 90, 100, 101, 102, 103), clock, 1, 60)
    assert (done.steady, done.units_per_second) == (True, (50, 90, 100, 101, 102))
    assert done.seconds == 5.0


def test_an_engine_that_is_steady_at_once_is_warmed_for_the_least_time():
    clock = Clock()
    done = warmed(Engine(clock, pass_seconds=0.1), clock, 10, 120)
    assert done.steady
    assert 10 <= done.seconds <= 12.6


def test_a_slice_is_whole_passes_and_a_quarter_of_the_least_time():
    clock = Clock()
    done = warmed(Engine(clock, pass_seconds=1.0), clock, 10, 120)
    assert len(done.units_per_second) == 4  # of 3 passes each: 2.5 s, rounded up to whole passes


def test_an_engine_that_never_settles_is_measured_when_the_time_is_over_and_said_not_to_be_steady():
    clock = Clock()
    done = warmed(Curve(clock, *range(10, 500, 10)), clock, 1, 20)
    assert (done.steady, done.seconds) == (False, 20.0)


def test_a_pass_that_is_longer_than_the_time_for_it_is_the_whole_warm_up():
    clock = Clock()
    done = warmed(Engine(clock, pass_seconds=300), clock, 1, 10)
    assert (done.steady, done.seconds, len(done.units_per_second)) == (False, 300.0, 1)


def test_a_device_that_still_warms_is_waited_for():
    clock = Clock()
    done = warmed(Engine(clock), clock, 1, 60, Watched(slope=[None, None, 0.5, 0.2, 0.11, 0.09]))
    assert (done.steady, done.seconds) == (True, 6.0)


@pytest.mark.parametrize("quality", ["measured", "sampled"])
def test_a_temperature_that_is_not_known_yet_is_not_called_steady(quality):
    clock = Clock()
    done = warmed(Engine(clock), clock, 1, 60, Watched(slope=[None] * 7 + [0.0]), quality)
    assert (done.steady, done.seconds) == (True, 8.0)


def test_a_temperature_that_never_gets_known_is_waited_for_until_the_time_is_over():
    clock = Clock()
    done = warmed(Engine(clock), clock, 1, 10, Watched())
    assert (done.steady, done.seconds) == (False, 10.0)


def test_without_a_thermometer_the_throughput_alone_decides():
    clock = Clock()
    sampler = Watched()
    sampler.celsius = dict
    done = warmed(Engine(clock), clock, 1, 60, sampler)
    assert (done.steady, done.seconds) == (True, 3.0)


@pytest.mark.parametrize("quality", ["estimated", "replayed", "simulated"])
def test_temperature_says_nothing_where_no_hardware_is_read(quality):
    clock = Clock()
    done = warmed(Engine(clock), clock, 1, 60, Watched(slope=[9.0] * 60), quality)
    assert (done.steady, done.seconds) == (True, 3.0)


def test_only_the_temperature_since_the_load_began_counts():
    clock = Clock(100.0)
    sampler = Watched(slope=[0.0] * 60)
    warmed(Engine(clock), clock, 1, 60, sampler)
    assert sampler.since == 100.0


def test_requests_that_fail_do_not_make_an_engine_steady():
    clock = Clock()
    assert not warmed(Curve(clock, 0), clock, 1, 10).steady


@given(st.lists(st.floats(0.1, 1e6), min_size=3, max_size=3))
def test_slices_agree_whatever_their_order(rates):
    assert len({agree([1.0, *order]) for order in itertools.permutations(rates)}) == 1
    assert agree(rates) == (max(rates) - min(rates) <= 0.02 * math.fsum(rates) / 3)


# --- idle power ------------------------------------------------------------------------------


def test_idle_power_is_the_energy_of_all_domains_while_nothing_is_asked():
    clock = Clock(0.03)
    meter = Stepper(clock, watts=30, gpu0=0.1, cpu0=0.001)
    assert idle_watts(meter, 10.0, Plan(), clocks_of(clock)) == pytest.approx(60, rel=0.001)
    assert max(clock.waits) == 10.0


@pytest.mark.parametrize(("idle", "settling"), [(0.0, 0.0), (2.0, 1.0), (10.0, 5.0), (60.0, 5.0)])
def test_clocks_may_fall_for_half_of_the_idle_window_and_five_seconds_at_most(idle, settling):
    assert settling_seconds(idle) == settling


def test_idle_power_is_not_known_where_others_were_busy():
    clock = Clock()
    clocks = replace(clocks_of(clock), busy_cpu_seconds=lambda: 4 * clock.now)
    with pytest.raises(MeterError, match=r"other processes kept 3\.5 of 4 CPUs busy"):
        idle_watts(Burner(clock), 10.0, Plan(), clocks)


def test_idle_power_is_not_known_where_the_counter_cannot_be_read():
    clock = Clock()
    with pytest.raises(MeterError, match=r"^cpu0: gone$"):
        idle_watts(Script(0, "cpu0: gone"), 10.0, Plan(), clocks_of(clock))
