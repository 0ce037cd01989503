import base64
import contextlib
import itertools
import json
import os
import shlex
import socket
import sys
import threading
import time
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from contracts.meter_contract import HandleContract
from hypothesis import given
from hypothesis import strategies as st

from tuner.meters import MeterOptions, Unavailable, wall
from tuner.meters.wall import UNITS, Asker, Counter, Figure, Power, WallMeter, WallSource, figure, probe
from tuner.space import Refused
from tuner.trial import MeterError, Reading

SHELLY = (
    '{"id": 0, "output": true, "apower": 23.4, "voltage": 230.1, "aenergy": {"total": 1234.5, "by_minute": [1, 2]}}'
)
TASMOTA = '{"StatusSNS":{"Time":"2026-07-01T12:00:00","ENERGY":{"Total":3.185,"Power":67}}}'
IPMITOOL = """
    Instantaneous power reading:                   220 Watts
    Minimum during sampling period:                214 Watts
    Average power reading over sample period:      221 Watts
    Power reading state is:                        activated
"""


def reads(text, **options):
    return figure(text, WallSource(command="meter", **options))


def command(*words):
    return shlex.join(map(str, words))


def python(code, *words):
    """A command that runs `code` in a real process."""
    return command(sys.executable, "-c", code, *words)


def eventually(condition, seconds=30.0):
    """Wait for what a thread does next; the test fails if it never does."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


# --- units -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "micro"),
    [
        ("123.4 W", "power", 123_400_000),
        ("123.4W\n", "power", 123_400_000),
        ("1.2 kW", "power", 1_200_000_000),
        ("1200 mW", "power", 1_200_000),
        ("220 Watts.", "power", 220_000_000),
        ("4 J", "energy", 4_000_000),
        ("4 joules", "energy", 4_000_000),
        ("4 kJ", "energy", 4_000_000_000),
        ("4 MJ", "energy", 4_000_000_000_000),
        ("4 mJ", "energy", 4_000),
        ("1 Wh", "energy", 3_600_000_000),
        ("1 kWh", "energy", 3_600_000_000_000),
        ("1 KWH", "energy", 3_600_000_000_000),
        ("1 mWh", "energy", 3_600_000),
        ("1 MWh", "energy", 3_600_000_000_000_000),
        ("1.5e3 W", "power", 1_500_000_000),
        (".5 W", "power", 500_000),
        ("+5. W", "power", 5_000_000),
        ("\ufeff12 W (average of 1 s)", "power", 12_000_000),
    ],
)
def test_a_number_with_a_unit_is_read_as_printed(text, kind, micro):
    assert (reads(text).kind, reads(text).micro) == (kind, micro)


@given(
    number=st.decimals(min_value=Decimal("0.001"), max_value=10**9, places=3, allow_nan=False, allow_infinity=False),
    unit=st.sampled_from(sorted(UNITS)),
    space=st.sampled_from(["", " ", "  \t"]),
)
def test_every_unit_survives_the_way_through_a_text(number, unit, space):
    kind, factor = UNITS[unit]
    found = reads(f"{number}{space}{unit}")
    assert found.kind == kind
    assert found.micro == int(number * factor)
    assert Decimal(found.micro) / factor == pytest.approx(number, abs=Decimal(1) / factor)


@given(joules=st.integers(1, 10**9))
def test_the_same_energy_is_the_same_in_every_unit(joules):
    millionths = 1_000_000 * joules
    said = {
        "J": Decimal(joules),
        "kJ": Decimal(joules) / 1000,
        "mJ": Decimal(joules) * 1000,
        "MJ": Decimal(joules) / 10**6,
    }
    assert {reads(f"{number:f} {unit}").micro for unit, number in said.items() if number < 10**12} == {millionths}
    hours = {"Wh": 1, "mWh": 1000, "kWh": Decimal("0.001"), "MWh": Decimal("0.000001")}
    assert {reads(f"{joules * n:f} {unit}").micro for unit, n in hours.items() if joules * n < 10**12} == {
        3600 * millionths
    }


@given(kilowatts=st.decimals(min_value=Decimal("0.001"), max_value=100, places=3), seconds=st.integers(1, 10_000))
def test_kilowatts_times_seconds_are_kilojoules(kilowatts, seconds):
    sample = reads(f"{kilowatts} kW")
    power = Power(sample, at=0.0, longest_gap=1e9)
    power.watch(sample, at=float(seconds))
    used = power.reading(float(seconds)).microjoules
    assert used == pytest.approx(reads(f"{kilowatts * seconds} kJ").micro, abs=1 + 1e-9 * used)


@pytest.mark.parametrize(
    ("text", "step"),
    [("1234 Wh", 3600), ("1234.5 Wh", 360), ("1234.567 Wh", 3.6), ("1.234 kWh", 3600), ("5 J", 1), ("1.2e3 J", 100)],
)
def test_the_last_place_that_is_printed_is_the_step(text, step):
    assert reads(text).step == 1e6 * step


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("", {}, "expected a number with a unit"),
        ("W", {}, "expected a number with a unit"),
        ("nan W", {}, "expected a number with a unit"),
        ("inf W", {}, "expected a number with a unit"),
        ("123,4 W", {}, "expected a number with a unit"),
        ("1 234 W", {}, "expected a number with a unit"),
        ("1.2.3 W", {}, "expected a number with a unit"),
        ("12 W 13 W", {}, "expected a number with a unit"),
        ("power: 12 W", {}, "expected a number with a unit"),
        ("0x10 W", {}, "expected a number with a unit"),
        ("12", {}, "the number 12 has no unit; say which one with --wall-unit"),
        ("12 A", {}, 'the unit "A" is none of W, mW'),
        ("12 MW", {}, 'the unit "MW" is none of'),
        ("12 mwh", {}, "none of"),
        ("12 kW", {"unit": "W"}, "the unit is kW, and --wall-unit says W"),
        ("-3 W", {}, "expected 0 or more"),
        ("1e20 W", {}, "12 digits at most"),
        ("1" * 31 + " W", {}, "expected a number"),
        ("0 W", {}, "a machine that runs draws more"),
        (SHELLY, {}, r"say which number with --wall-field \(id, apower, voltage, aenergy.total, aenergy.by_minute.0"),
        ("[]", {}, "it has none"),
        (SHELLY, {"field": "apower"}, "no unit"),
        (SHELLY, {"field": "output", "unit": "W"}, r'no number at "output"; there is id, apower'),
        (SHELLY, {"field": "aenergy", "unit": "W"}, "no number at"),
        (SHELLY, {"field": "aenergy.by_minute.7", "unit": "W"}, "no number at"),
        (SHELLY, {"field": "aenergy.by_minute.x", "unit": "W"}, "no number at"),
        (SHELLY, {"field": "apower.deeper", "unit": "W"}, "no number at"),
        ('{"a": NaN}', {"field": "a", "unit": "W"}, "expected a number"),
        ('{"a": -Infinity}', {"field": "a", "unit": "W"}, "expected a number"),
        ('{"a": 1e999999}', {"field": "a", "unit": "W"}, "12 digits at most"),
        ('{"a": 1e9999999999999999999}', {"field": "b", "unit": "W"}, "expected one line"),
        ('{"a": ' + "9" * 5000 + "}", {"field": "a", "unit": "W"}, "12 digits at most"),
        ('{"a": 5', {"field": "b", "unit": "W"}, "expected one line"),
        ("[" * 16_000, {"unit": "W"}, "expected a number"),
        (IPMITOOL, {}, "expected a number"),
        (IPMITOOL, {"field": "Instant coffee"}, 'expected one line with "Instant coffee", got 0'),
        (IPMITOOL, {"field": "power reading"}, "got 2"),
        (IPMITOOL, {"field": "Power reading state is"}, "expected a number"),
    ],
)
def test_what_is_no_reading_is_an_error_that_says_why(text, options, sentence):
    with pytest.raises(MeterError, match=f"^wall0: .*({sentence})") as caught:
        reads(text, **options)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "options", "micro"),
    [
        ("12", {"unit": "W"}, 12_000_000),
        ("12", {"unit": "watts"}, 12_000_000),
        ("12 W", {"unit": "w"}, 12_000_000),
        (SHELLY, {"field": "apower", "unit": "W"}, 23_400_000),
        (SHELLY, {"field": "aenergy.total", "unit": "Wh"}, 4_444_200_000_000),
        (SHELLY, {"field": "aenergy.by_minute.1", "unit": "J"}, 2_000_000),
        (TASMOTA, {"field": "StatusSNS.ENERGY.Power", "unit": "W"}, 67_000_000),
        (TASMOTA, {"field": "StatusSNS.ENERGY.Total", "unit": "kWh"}, 11_466_000_000_000),
        ('{"state": "71.5", "unit": "W"}', {"field": "state", "unit": "W"}, 71_500_000),
        ('{"state": "71.5 W"}', {"field": "state"}, 71_500_000),
        (IPMITOOL, {"field": "Instantaneous power reading"}, 220_000_000),
        (IPMITOOL, {"field": "Average power reading over sample period:"}, 221_000_000),
        ("power1:       45.00 W  (avg =  44.00 W)", {"field": "power1"}, 45_000_000),
        ("[plug] 5 W", {"field": "[plug]"}, 5_000_000),
    ],
)
def test_a_field_or_a_unit_says_which_number_is_meant(text, options, micro):
    assert reads(text, **options).micro == micro


@given(
    text=st.text(max_size=300) | st.text("0123456789.eE+- \nWkh,", max_size=300),
    field=st.none() | st.text("aW1. ", min_size=1).filter(str.strip),
    unit=st.none() | st.sampled_from(sorted(UNITS)),
)
def test_no_text_brings_anything_but_a_figure_or_a_sentence(text, field, unit):
    with contextlib.suppress(MeterError):
        found = reads(text, field=field, unit=unit)
        assert found.micro >= 0
        assert found.step >= 1


@pytest.mark.parametrize("text", ["1" * 16_000, "1 " * 8_000, "." * 16_000, "1e" * 8_000, " " * 16_000 + "x"])
def test_no_text_takes_long(text):
    """A pattern that tried again and again would take minutes; the suite's own time limit would notice."""
    with pytest.raises(MeterError):
        reads(text, unit="W")


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "expected one of --wall-command CMD and --wall-url URL"),
        ({"command": "a", "url": "http://plug"}, "expected one of"),
        ({"command": "echo 'open"}, "--wall-command .*No closing quotation"),
        ({"command": "  "}, "expected a program and its arguments"),
        ({"command": "''"}, "expected a program"),
        ({"command": "a\0b"}, "expected a program"),
        ({"command": "a", "unit": "A"}, '--wall-unit "A": expected W, mW, kW'),
        ({"command": "a", "unit": "Whh"}, "did you mean Wh"),
        ({"command": "a", "unit": "mwh"}, "--wall-unit"),
        ({"command": "a", "field": " "}, "--wall-field"),
        ({"command": "a", "interval_seconds": 0.05}, "--wall-interval 0.05: expected 0.1 to 60"),
        ({"command": "a", "interval_seconds": 61}, "--wall-interval"),
        ({"command": "a", "interval_seconds": float("nan")}, "--wall-interval"),
        ({"url": "plug"}, '--wall-url "plug": expected an address such as http'),
        ({"url": "file:///etc/passwd"}, "expected an address"),
        ({"url": "ftp://plug/x"}, "expected an address"),
        ({"url": "http://"}, "expected an address"),
        ({"url": "http://:80/x"}, "expected an address"),
        ({"url": "http://plug:0/x"}, "expected an address"),
        ({"url": "http://plug:99999/x"}, "expected an address"),
        ({"url": "http://plug:abc/x"}, "expected an address"),
        ({"url": "http://[::1/x"}, "expected an address"),
        ({"url": "http://plug/a b"}, "expected an address"),
        ({"url": "http://plug/\r\nHost: x"}, "expected an address"),
        ({"url": "http://plug/" + "x" * 2000}, "expected an address"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused(options, sentence):
    with pytest.raises(Refused, match=sentence):
        WallSource(**options)


@pytest.mark.parametrize(
    "url",
    [
        "http://admin:hunter2@plug/status",
        "http://:hunter2@plug/status",
        "https://admin:hunter2${X}@plug/status",
        "http://plug/status?auth_key=hunter2",
        "http://plug/status?id=1&Token=hunter2",
        "http://admin:hunter2@plug:abc/status",
    ],
)
def test_a_password_in_an_address_is_refused_and_never_repeated(url):
    with pytest.raises(Refused) as caught:
        WallSource(url=url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://admin:${PLUG_PASSWORD}@plug/status", "http://admin@plug/", "http://plug?auth_key=${PLUG_KEY}&id=1"],
)
def test_the_name_of_a_variable_may_stand_for_a_password(url):
    assert WallSource(url=url).url == url


sources = st.builds(
    WallSource,
    command=st.text("abc -_/.$", min_size=1).filter(str.strip),
    unit=st.none() | st.sampled_from(sorted(UNITS)),
    field=st.none() | st.text(min_size=1).filter(str.strip),
    interval_seconds=st.floats(0.1, 60),
) | st.builds(WallSource, url=st.sampled_from(["http://plug/status", "https://[::1]:8080/x?y=1"]))


@given(source=sources)
def test_a_source_survives_a_journal(source):
    options = MeterOptions(wall=source)
    assert MeterOptions.from_record(json.loads(json.dumps(options.record()))) == options


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"command": "a", "pattern": "x"}, "expected command, url, unit, field, interval_seconds"),
        ({"command": 5}, "expected command"),
        ({"command": "a", "interval_seconds": True}, "expected command"),
        ("a", "expected command"),
        ({}, "one of --wall-command"),
    ],
)
def test_a_record_of_a_source_that_is_not_understood_is_refused(record, sentence):
    with pytest.raises(Refused, match=sentence):
        WallSource.from_record(record)


# --- power -----------------------------------------------------------------------------------


def watts(value):
    return Figure("power", round(1e6 * value), 1)


def test_a_constant_power_is_power_times_time():
    power = Power(watts(100), at=5.0, longest_gap=3.0)
    for second in range(1, 11):
        power.watch(watts(100), at=5.0 + second)
    assert power.reading(15.0) == Reading.exact(1_000_000_000)


def test_a_ramp_is_its_mean_times_time():
    """0 to 100 W in 10 s, sampled every second: 50 W x 10 s, to the microjoule, because the rule is exact on lines."""
    power = Power(watts(0), at=0.0, longest_gap=3.0)
    for second in range(1, 11):
        power.watch(watts(10 * second), at=float(second))
    assert power.reading(10.0) == Reading.exact(500_000_000)


def test_after_the_last_sample_its_power_counts_on():
    power = Power(watts(100), at=0.0, longest_gap=3.0)
    power.watch(watts(50), at=1.0)
    assert power.reading(1.5).microjoules == 75_000_000 + 25_000_000


def test_a_reading_between_two_samples_is_never_taken_back():
    power = Power(watts(100), at=0.0, longest_gap=3.0)
    assert power.reading(0.5).microjoules == 50_000_000
    power.watch(watts(0), at=1.0)
    assert power.reading(1.0).microjoules == 50_000_000 + 25_000_000


@given(
    course=st.lists(st.tuples(st.floats(0.01, 2.9), st.integers(1, 5000), st.booleans()), max_size=40),
)
def test_energy_stays_between_the_least_and_the_most_power(course):
    power, now, last = Power(watts(200), at=0.0, longest_gap=3.0), 0.0, 0
    sampled = 0.0
    for elapsed, value, read in course:
        now += elapsed
        if read and now - sampled <= 3.0:
            reading = power.reading(now).microjoules
            assert reading >= last
            last = reading
        elif now - sampled <= 3.0:
            power.watch(watts(value), at=now)
            sampled = now
        else:
            now -= elapsed
    most = max([200, *(value for _, value, _ in course)])
    assert last <= 1e6 * most * now + 1


def test_a_late_sample_is_a_fault_and_the_next_one_starts_anew():
    power = Power(watts(100), at=0.0, longest_gap=3.0)
    with pytest.raises(MeterError, match=r"wall0: 3\.1 s passed between two samples"):
        power.watch(watts(100), at=3.1)
    power.watch(watts(100), at=4.1)
    assert power.reading(4.1).microjoules == pytest.approx(100_000_000, abs=1)


def test_a_reading_between_does_not_hide_that_a_sample_is_late():
    power = Power(watts(100), at=0.0, longest_gap=3.0)
    power.reading(2.9)
    with pytest.raises(MeterError, match="passed between two samples"):
        power.watch(watts(100), at=3.1)


def test_without_a_recent_sample_there_is_no_reading():
    with pytest.raises(MeterError, match=r"no sample of power for 3\.5 s"):
        Power(watts(100), at=0.0, longest_gap=3.0).reading(3.5)


# --- counters --------------------------------------------------------------------------------


def joules(value, step=1.0):
    return Figure("energy", round(1e6 * value), round(1e6 * step))


def test_a_counter_counts_from_where_it_was_found():
    counter = Counter(joules(5000))
    assert counter.reading(joules(5000)) == Reading.exact(0)
    assert counter.reading(joules(5003)) == Reading(3_000_000, 2_000_000, 4_000_000)


def test_one_watt_hour_of_step_is_3600_joules_either_way():
    counter = Counter(joules(0, step=3600))
    before = counter.reading(joules(3600, step=3600))
    after = counter.reading(joules(36_000, step=3600))
    assert (after.low - before.low, after.high - before.high) == (28_800_000_000, 36_000_000_000)


def test_a_number_that_is_printed_finer_later_makes_the_step_finer():
    counter = Counter(joules(100, step=1))
    counter.reading(joules(200.5, step=0.1))
    assert counter.step == 100_000


@given(
    watts=st.floats(5, 2000),
    kind=st.tuples(st.just(0.0), st.sampled_from([1.0, 360.0, 3600.0]))
    | st.tuples(st.floats(0.01, 60), st.just(0.001)),
    phase=st.floats(0, 1),
    start=st.floats(0, 50),
    length=st.floats(1, 300),
)
def test_the_bounds_hold_what_was_used_whether_a_counter_is_coarse_or_slow(watts, kind, phase, start, length):
    """A counter that is brought up to date every `period` s and printed to `place` J, at a constant power.

    Before the first reading it is polled until it has moved, as it is while an engine warms up.
    """
    period, place = kind

    def shown(at):
        updated = ((at / period + phase) // 1 - phase) * period if period else at
        return joules(max(0.0, watts * updated) // place * place, step=place)

    begin = start + 2 * max(period, place / watts) + 3
    counter, polled = Counter(shown(0.0)), 0.0

    def reading(at):
        nonlocal polled
        while polled + 1 <= at:
            polled += 1
            counter.watch(shown(polled), polled)
        return counter.reading(shown(at))

    before, after = reading(begin), reading(begin + length)
    if after == before:
        return  # a window in which a counter did not move is invalid by itself
    assert (after.low - before.low) / 1e6 <= watts * length + 0.01
    assert (after.high - before.high) / 1e6 >= watts * length - 0.01


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ((0, 0, 300, 300, 550, 550), 300),
        ((30, 60, 90, 120), 30),
        ((0.01, 0.01, 0.02), 0.01),
    ],
    ids=["slow", "every poll", "coarse"],
)
def test_the_largest_move_between_two_polls_is_the_step(values, step):
    counter = Counter(joules(0, step=0.01))
    for second, value in enumerate(values, start=1):
        counter.watch(joules(value, step=0.01), float(second))
    assert counter.step == round(1e6 * step)


@pytest.mark.parametrize("how", ["watch", "reading"])
def test_a_counter_that_goes_back_is_a_fault_and_the_next_reading_starts_there(how):
    counter = Counter(joules(1000))
    with pytest.raises(MeterError, match="wall0: the energy counter went back by 990 J"):
        counter.watch(joules(10), 1.0) if how == "watch" else counter.reading(joules(10))
    assert counter.reading(joules(15)).microjoules == 5_000_000


def test_readings_and_polls_do_not_disturb_each_other():
    counter = Counter(joules(0))
    counter.watch(joules(10), 1.0)
    assert counter.reading(joules(15)).microjoules == 15_000_000
    counter.watch(joules(20), 2.0)
    assert counter.reading(joules(25)).microjoules == 25_000_000
    assert counter.step == 10_000_000


# --- commands, as real processes -------------------------------------------------------------


def ask(command, environment=os.environ):
    return Asker(WallSource(command=command), environment)()


def test_a_command_is_run_without_a_shell():
    assert ask(python("import sys; print(sys.argv[1:])", "$HOME", "a;b", "|")).strip() == "['$HOME', 'a;b', '|']"


def test_a_variable_is_filled_in_from_the_environment():
    assert ask(python("import sys; print(sys.argv[1])", "x${PLUG}y"), {"PLUG": "a b"}).strip() == "xa by"


@pytest.mark.parametrize("environment", [{}, {"PLUG": ""}])
def test_a_variable_that_is_not_set_is_named(environment):
    with pytest.raises(Unavailable, match="--wall-command names PLUG, which is not set") as caught:
        ask("meter ${PLUG}", environment)
    assert caught.value.remedy == "export PLUG=..."


def test_what_was_filled_in_is_in_no_error():
    code = "import sys; sys.exit('no plug at ' + sys.argv[1])"
    with pytest.raises(MeterError) as caught:
        ask(python(code, "${PLUG}"), {"PLUG": "hunter2"})
    assert "hunter2" not in str(caught.value)
    assert "no plug at ${PLUG}" in str(caught.value)


def test_a_command_that_prints_its_password_does_not_put_it_into_an_error():
    asker = Asker(WallSource(command=python("import sys; print(sys.argv[1])", "${PLUG}")), {"PLUG": "hunter2"})
    with pytest.raises(MeterError, match=r"got \"\$\{PLUG\}\""):
        figure(asker(), asker.source, asker.shown)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("/nonexistent/meter", "cannot be started: No such file"),
        ("/", "cannot be started"),
        (python("import sys; sys.exit(3)"), "ended with exit status 3$"),
        (python(r"import sys; print('5 W'); sys.exit('a\nno \x1b[2J plug')"), r'exit status 1: "no \\u001b\[2J plug"$'),
        (python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), "was ended by signal 9"),
        (python("while True: print('5 W')"), "printed more than 16 KiB"),
    ],
    ids=["absent", "a folder", "fails", "explains", "dies", "talks on"],
)
def test_a_command_that_gives_no_number_says_why(command, sentence):
    with pytest.raises(MeterError, match=f"^wall0: .*{sentence}") as caught:
        ask(command)
    assert "\x1b" not in str(caught.value)


def alive(pid):
    with contextlib.suppress(FileNotFoundError):
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.parametrize(
    "code",
    [
        "import time; time.sleep(600)",
        # Closes what it was given and goes on.
        "import os, time; os.close(1); os.close(2); time.sleep(600)",
        # Ends at once, and leaves a child that holds the pipe open.
        "pass",
        "import sys, time\nwhile True: time.sleep(0.01); print('no', file=sys.stderr, flush=True)",
    ],
    ids=["sleeps", "goes silent", "leaves a child", "complains"],
)
def test_a_command_that_does_not_end_is_killed_with_all_it_started(tmp_path, monkeypatch, code):
    # The time limit is reached as soon as the command has started its child, however long that takes.
    started = SimpleNamespace(monotonic=lambda: 1.0 if (tmp_path / "pids").exists() else 0.0)
    monkeypatch.setattr(wall, "LIMIT_SECONDS", 0.2)
    monkeypatch.setattr(wall, "time", started)
    start = (
        "import os, subprocess, sys, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"part = pathlib.Path({str(tmp_path / 'part')!r})\n"
        "part.write_text(f'{os.getpid()} {child.pid}')\n"
        f"part.rename({str(tmp_path / 'pids')!r})\n"
    )
    (tmp_path / "meter.py").write_text(start + code)
    with pytest.raises(MeterError, match=r"did not end within 0\.2 s"):
        ask(command(sys.executable, tmp_path / "meter.py"))
    for pid in (tmp_path / "pids").read_text().split():
        eventually(lambda pid=pid: not alive(pid))


# --- addresses, over real HTTP ---------------------------------------------------------------


class Plug(ThreadingHTTPServer):
    """Answers by path, and remembers the requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.stopped = [], threading.Event()
        self.watts = 42.0
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def url(self, path, user=""):
        return f"http://{user}127.0.0.1:{self.server_port}{path}"

    def stop(self):
        self.stopped.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers))
        path = self.path.partition("?")[0]
        if path == "/moved":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        elif path == "/broken":
            self.send_error(500, "out\tof order")
        elif path in ("/slow", "/slower"):
            # A byte now and then: in the header, or in the body.
            head = "HTTP/1.1 200 OK\r\n" + ("" if path == "/slower" else "Content-Length: 1000000\r\n\r\n")
            with contextlib.suppress(OSError):
                self.wfile.write(head.encode())
                while not self.server.stopped.wait(0.02):
                    self.wfile.write(b"X")
        else:
            body = {
                "/json": json.dumps({"switch:0": {"apower": self.server.watts}}).encode(),
                "/text": f"{self.server.watts} W".encode(),
                "/huge": b"1" * 100_000,
                "/garbage": b"\xff\x00<html>",
                "/cut": b"12",
            }[path]
            self.send_response(200)
            self.send_header("Content-Length", "7" if path == "/cut" else str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def plug():
    plug = Plug()
    yield plug
    plug.stop()


def fetch(url, environment=os.environ):
    return Asker(WallSource(url=url), environment)()


def test_an_address_is_read_over_http(plug):
    source = WallSource(url=plug.url("/json"), field="switch:0.apower", unit="W")
    assert figure(Asker(source, {})(), source).micro == 42_000_000
    assert fetch(plug.url("/text?id=0")) == "42.0 W"
    assert plug.requests[-1][0] == "/text?id=0"


def test_an_address_without_a_path_is_its_root(plug):
    with pytest.raises(MeterError):
        fetch(plug.url(""))
    assert plug.requests[-1][0] == "/"


def test_a_password_comes_from_the_environment_and_goes_to_the_server_only(plug):
    url = plug.url("/text?token=${KEY}", user="admin:${PASSWORD}@")
    assert fetch(url, {"KEY": "a b&c", "PASSWORD": "p@ss:word/"}) == "42.0 W"
    path, headers = plug.requests[-1]
    assert path == "/text?token=a%20b%26c"
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == b"admin:p@ss:word/"


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/moved", r"leads to another address \(HTTP 302\)"),
        ("/broken", r'answered HTTP 500 "out\\tof order"'),
        ("/huge", "more than 16 KiB"),
        ("/cut", r"it does not answer in HTTP \(IncompleteRead\)"),
    ],
)
def test_an_answer_that_is_none_says_why(plug, path, sentence):
    with pytest.raises(MeterError, match=f"^wall0: .*{sentence}"):
        fetch(plug.url(path))


@pytest.mark.parametrize("path", ["/slow", "/slower"])
def test_a_server_that_sends_a_byte_now_and_then_is_not_listened_to_for_ever(plug, monkeypatch, path):
    monkeypatch.setattr(wall, "LIMIT_SECONDS", 0.3)
    with pytest.raises(MeterError, match=r"cannot be read: no answer within 0\.3 s"):
        fetch(plug.url(path))


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(wall, "LIMIT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(MeterError, match=r"no answer within 0\.2 s"):
        fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/")


@pytest.mark.parametrize("said", [b"", b"hello\r\n\r\n"])
def test_what_speaks_another_language_is_said_to(said):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(MeterError, match="it does not answer in HTTP"):
            fetch(f"http://127.0.0.1:{server.getsockname()[1]}/")
        thread.join()


@pytest.mark.parametrize(
    ("url", "environment"),
    [
        ("http://127.0.0.1:9/x", {}),
        ("http://no-such-host.invalid/", {}),
        ("http://${HOST}/", {"HOST": "127.0.0.1:hunter2"}),
        ("http://${HOST}/", {"HOST": "a" * 80 + "hunter2"}),
        ("http://${HOST}/", {"HOST": "[hunter2"}),
    ],
)
def test_an_address_that_cannot_be_reached_is_an_error_without_what_was_filled_in(url, environment):
    with pytest.raises(MeterError, match=r"^wall0: .*cannot be read: ") as caught:
        fetch(url, environment)
    assert "hunter2" not in str(caught.value)


def test_https_is_checked(plug):
    """The plug speaks no TLS, so the handshake fails: nothing is asked in the clear instead."""
    with pytest.raises(MeterError, match="cannot be read"):
        fetch(plug.url("/text").replace("http:", "https:"))
    assert plug.requests == []


# --- the meter -------------------------------------------------------------------------------

SELDOM = {"interval_seconds": 60.0}
"""Nothing is polled in a test that is over before."""


class TestPowerKeepsTheMeterContract(HandleContract):
    """100 W for ever; time passes only in `use`."""

    tolerance = 1e-6

    @pytest.fixture
    def meter(self):
        self.now = 7.0
        return WallMeter(WallSource(command="echo 100 W", **SELDOM), seconds=lambda: self.now)

    def use(self, joules):
        self.now += joules / 100


class TestACounterKeepsTheMeterContract(HandleContract):
    coarse = True

    @pytest.fixture
    def meter(self, tmp_path):
        self.file, self.total = tmp_path / "joules", 1000.0
        self.use(0)
        return WallMeter(WallSource(command=f"cat {self.file}", unit="J", **SELDOM))

    def use(self, joules):
        self.total += joules
        self.file.write_text(f"{self.total:.3f}\n")


@pytest.mark.parametrize(
    ("text", "quality", "update_seconds", "resolution_joules", "how"),
    [("12.5 W", "sampled", 60.0, 0.0, "every 60 s"), ("12.5 Wh", "measured", 0.0, 360.0, "in steps of 360 J")],
)
def test_the_unit_says_what_kind_of_meter_it_is(text, quality, update_seconds, resolution_joules, how):
    with contextlib.closing(WallMeter(WallSource(command=f"echo {text}", **SELDOM))) as meter:
        assert (meter.quality, meter.update_seconds, meter.resolution_joules) == (
            quality,
            update_seconds,
            resolution_joules,
        )
        assert meter.how == how
        assert meter.blind_to == set()


def test_a_wall_meter_that_answers_is_available(plug):
    source = WallSource(url=plug.url("/text"))
    found = probe(source)
    assert (found.ok, found.domains, found.quality, found.how) == (True, ("wall0",), "sampled", "every 1 s")
    assert found.reason == f'wall0 is 42 W by "{plug.url("/text")}"'


@pytest.mark.parametrize(
    ("source", "reason", "remedy"),
    [
        (None, "neither --wall-command CMD nor --wall-url URL says where", "tune run --meter wall --wall-command CMD"),
        (WallSource(command="echo hello"), "expected a number with a unit", "echo hello  # shows what it says"),
        (WallSource(command="x ${NO_PLUG}"), "names NO_PLUG, which is not set", "export NO_PLUG=..."),
        (WallSource(url="http://127.0.0.1:9/a?b"), "cannot be read", "curl 'http://127.0.0.1:9/a?b'"),
    ],
)
def test_a_wall_meter_that_does_not_answer_says_why_and_what_to_try(source, reason, remedy):
    found = probe(source)
    assert not found.ok
    assert reason in found.reason
    assert "wall0:" not in found.reason
    assert found.remedy.startswith(remedy)


class Scripted:
    """A source in this process: answers, and whether it is asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), 0

    def __call__(self):
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def scripted():
    """`scripted(answers)` opens a meter that polls often; the last answer repeats."""
    with contextlib.ExitStack() as stack:

        def scripted(*answers, seconds=None):
            source = Scripted(*answers)
            clock = itertools.count(0.0, 0.01).__next__ if seconds is None else seconds
            meter = WallMeter(WallSource(command="x", interval_seconds=0.1), seconds=clock, ask=source)
            stack.enter_context(contextlib.closing(meter))
            return meter, source

        yield scripted


def test_power_is_sampled_in_between(scripted):
    meter, source = scripted("100 W")
    eventually(lambda: source.asked > 3)
    assert meter.read()["wall0"].microjoules > 0


@pytest.mark.parametrize("rubbish", ["nan W", "-5 W", "12", "", "0 W", "5 Wh", MeterError("wall0: the plug is gone")])
def test_a_bad_sample_makes_its_window_invalid_and_the_next_one_counts(scripted, rubbish):
    meter, source = scripted("100 W", rubbish, "100 W", "100 W", "100 W")
    eventually(lambda: source.asked > 3)
    with pytest.raises(MeterError, match="wall0: "):
        meter.read()
    before = meter.read()["wall0"].microjoules
    assert meter.read()["wall0"].microjoules > before


def test_of_several_faults_the_first_is_told(scripted):
    meter, source = scripted("100 W", MeterError("wall0: the first"), MeterError("wall0: the second"), "100 W")
    eventually(lambda: source.asked > 4)
    with pytest.raises(MeterError, match="the first"):
        meter.read()


def test_a_source_that_went_away_gives_no_reading_ever_after(scripted):
    now = [0.0]
    meter, source = scripted("100 W", MeterError("wall0: the plug is gone"), seconds=lambda: now[0])
    eventually(lambda: source.asked > 1)
    with pytest.raises(MeterError, match="the plug is gone"):
        meter.read()
    now[0] += 100
    with pytest.raises(MeterError, match=r"the plug is gone|no sample of power for 100"):
        meter.read()


def test_a_machine_that_slept_has_no_reading_for_that_window(scripted):
    """The boot clock goes on while the machine sleeps, so the sample after it is late."""
    now = [0.0]
    meter, source = scripted("100 W", seconds=lambda: now[0])
    now[0] += 3600
    asked = source.asked
    eventually(lambda: source.asked > asked + 1)
    with pytest.raises(MeterError, match=r"3600\.0 s passed between two samples"):
        meter.read()
    now[0] += 0.1
    assert meter.read()["wall0"].microjoules == pytest.approx(10_000_000, abs=1)


def test_a_counter_that_is_reset_between_two_readings_is_found_out_by_the_polls(scripted):
    meter, source = scripted("1000 J", "0 J", "2000 J")
    eventually(lambda: source.asked > 2)
    with pytest.raises(MeterError, match="went back by 1000 J"):
        meter.read()


def test_a_counter_is_asked_at_each_reading(scripted):
    meter, _ = scripted("1000.0 J", "1003.5 J")
    assert meter.read()["wall0"] == Reading(3_500_000, 3_400_000, 3_600_000)
    assert meter.read()["wall0"] == Reading(3_500_000, 3_400_000, 3_600_000)


def test_a_counter_that_cannot_be_read_is_an_error_at_once(tmp_path):
    (tmp_path / "joules").write_text("5 J")
    with contextlib.closing(WallMeter(WallSource(command=f"cat {tmp_path / 'joules'}", **SELDOM))) as meter:
        (tmp_path / "joules").unlink()
        with pytest.raises(MeterError, match='exit status 1: "cat: '):
            meter.read()


def test_a_real_command_is_polled_as_often_as_asked(tmp_path):
    """A process that counts its calls, and a reading that follows its numbers."""
    (tmp_path / "calls").write_text("")
    code = (
        f"import pathlib; file = pathlib.Path({str(tmp_path / 'calls')!r}); file.write_text(file.read_text() + 'x');"
        "print(100 * len(file.read_text()), 'W')"
    )
    source = WallSource(command=python(code), interval_seconds=0.1)
    now = [0.0]
    with contextlib.closing(WallMeter(source, seconds=lambda: now[0])) as meter:
        eventually(lambda: len((tmp_path / "calls").read_text()) >= 4)
        now[0] += 0.05
        assert meter.read()["wall0"].microjoules > 0
    calls = len((tmp_path / "calls").read_text())
    assert not [thread for thread in threading.enumerate() if thread.name == "wall"]
    assert len((tmp_path / "calls").read_text()) == calls
