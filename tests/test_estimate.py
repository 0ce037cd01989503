import os
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest
from contracts.meter_contract import MeterContract
from hypothesis import given
from hypothesis import strategies as st

from tuner.meters import MeterOptions, estimate
from tuner.meters.estimate import EstimateMeter, PowerModel, TreeCpu, busy_cpu_seconds, probe
from tuner.meters.estimate import _Spent as Spent
from tuner.trial import MeterError

MODERATE = MeterOptions(cpu_watts=(20, 60))


class TestEstimateKeepsTheMeterContract(MeterContract):
    """Time stands still here but for `use`: at rest, 0.2 of 40 W passes as wall time."""

    tolerance = 1e-6

    @pytest.fixture
    def meter(self):
        self.seconds = 5.0
        return EstimateMeter(MODERATE, seconds=lambda: self.seconds, cpu_seconds=lambda: 0.0)

    def use(self, joules):
        self.seconds += joules / (0.2 * 40)


# --- the formula -----------------------------------------------------------------------------


def test_the_formula_at_rest_and_at_full_load():
    """2 s on 4 CPUs: base 0.2 x 40 W = 8 W alone, or all of 40 W."""
    model = PowerModel.of(MODERATE, logical_cpus=4)
    assert model.reading(wall_seconds=2, cpu_seconds=0).microjoules == 16_000_000
    assert model.reading(wall_seconds=2, cpu_seconds=8).microjoules == 80_000_000
    assert model.reading(wall_seconds=2, cpu_seconds=4).microjoules == 48_000_000


def test_the_interval_spans_both_unknown_powers():
    """1 s at half load: low 2 + (20-2)/2 = 11 J, high 18 + (60-18)/2 = 39 J."""
    reading = PowerModel.of(MODERATE, logical_cpus=2).reading(wall_seconds=1, cpu_seconds=1)
    assert (reading.low, reading.high) == (11_000_000, 39_000_000)


def test_without_a_stated_power_each_logical_cpu_counts_the_same():
    """Cloud Carbon Footprint: 0.7 W at rest, 3.9 W at full load."""
    model = PowerModel.of(MeterOptions(), logical_cpus=8)
    assert model.reading(1, 0).microjoules == pytest.approx(8 * 0.7e6, abs=1)
    assert model.reading(1, 8).microjoules == pytest.approx(8 * 3.9e6, abs=1)
    assert model.reading(1, 8).low == pytest.approx(8 * 2e6, abs=1)
    assert model.reading(1, 8).high == pytest.approx(8 * 8e6, abs=1)


@given(
    watts=st.none() | st.tuples(st.floats(0.5, 200), st.floats(200, 2000)),
    cpus=st.integers(1, 512),
    steps=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1)), max_size=20),
)
def test_no_course_of_time_makes_an_estimate_decrease_or_leave_its_interval(watts, cpus, steps):
    model, wall, cpu = PowerModel.of(MeterOptions(watts), cpus), 0.0, 0.0
    last = model.reading(0, 0)
    for seconds, busy in steps:
        wall, cpu = wall + seconds, cpu + busy * cpus * seconds
        now = model.reading(wall, cpu)
        assert last.microjoules <= now.microjoules
        assert now.low - last.low <= now.microjoules - last.microjoules + 2
        assert now.microjoules - last.microjoules <= now.high - last.high + 2
        last = now


def test_it_is_blind_to_what_cpu_time_does_not_show():
    assert EstimateMeter.blind_to == {"offload", "clock", "power"}


# --- CPU time of a tree ----------------------------------------------------------------------

BURN = """
import sys, time
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
"""


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.fixture
def child():
    """Start Python code that talks in lines; whatever is left of it ends with the test."""
    started = []

    def child(code):
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", BURN + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield child
    for process in started:
        process.kill()
        process.communicate()


def tell(process):
    process.stdin.write("\n")
    process.stdin.flush()


def waited_for():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_only_what_happens_from_now_on_counts():
    burn(0.05)
    assert TreeCpu().seconds() < 0.03


def test_the_calling_process_counts_to_the_millisecond():
    tree = TreeCpu()
    start = time.process_time()
    burn(0.1)
    assert tree.seconds() == pytest.approx(time.process_time() - start, abs=0.01)


def test_a_child_that_begins_and_ends_between_two_readings_counts():
    tree = TreeCpu()
    own, children = time.process_time(), waited_for()
    subprocess.run([sys.executable, "-c", BURN + "burn(0.15)"], check=True)
    children = waited_for() - children
    assert children > 0.15
    assert tree.seconds() == pytest.approx(children + time.process_time() - own, abs=0.01)


def test_a_child_that_is_read_while_it_lives_counts_once_when_it_has_ended(child):
    tree = TreeCpu()
    own, children = time.process_time(), waited_for()
    process = child("burn(0.15); print(flush=True); input(); burn(0.1)")
    process.stdout.readline()
    alive = tree.seconds()
    assert alive >= 0.14
    tell(process)
    process.wait()
    spent = waited_for() - children + time.process_time() - own
    assert spent > 0.25
    assert tree.seconds() == pytest.approx(spent, abs=0.02)


def test_a_child_that_has_ended_but_was_not_waited_for_counts(child):
    tree = TreeCpu()
    process = child("burn(0.15)")
    process.stdout.read()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
    assert tree.seconds() >= 0.14
    before = tree.seconds()
    process.wait()
    assert tree.seconds() - before < 0.03


def test_grandchildren_count():
    tree = TreeCpu()
    inner = [sys.executable, "-c", BURN + "burn(0.15)"]
    subprocess.run([sys.executable, "-c", f"import subprocess; subprocess.run({inner!r}, check=True)"], check=True)
    assert tree.seconds() >= 0.15


ORPHAN = """
import os
if os.fork():
    input(); os._exit(0)
print(os.getpid(), flush=True)
parent = os.getppid()
while os.getppid() == parent: time.sleep(0.001)
burn(0.2); print(flush=True); time.sleep(60)
"""


def test_an_orphan_goes_on_counting_and_takes_nothing_with_it(child):
    tree = TreeCpu()
    process = child(ORPHAN)
    orphan = int(process.stdout.readline())
    tree.seconds()
    try:
        tell(process)
        process.wait()
        before = tree.seconds()
        process.stdout.readline()
        after = tree.seconds()
        assert after - before >= 0.15
    finally:
        os.kill(orphan, signal.SIGKILL)
    while psutil.pid_exists(orphan) and psutil.Process(orphan).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
    children = waited_for()
    subprocess.run([sys.executable, "-c", BURN + "burn(0.1)"], check=True)
    assert tree.seconds() - after >= (waited_for() - children) - 0.02


@pytest.mark.parametrize(("bequeaths", "inherited"), [(True, 5.5), (False, 0.5)])
def test_only_what_a_parent_inherits_is_taken_off_what_it_inherited(monkeypatch, bequeaths, inherited):
    """One process ends after 5 s that were counted; another one, never seen, leaves 0.5 s to the root."""
    tree = TreeCpu()
    snapshots = iter(
        [
            {"root": Spent(0, 0, True), "ends": Spent(5, 0, bequeaths)},
            {"root": Spent(0, inherited, True)},
        ]
    )
    monkeypatch.setattr(tree, "_snapshot", lambda: next(snapshots))
    assert tree.seconds() == 5
    assert tree.seconds() == 5.5


def test_time_never_runs_backwards_while_processes_come_and_go(child):
    tree, last = TreeCpu(), 0.0
    for _ in range(5):
        processes = [child("burn(0.01)") for _ in range(3)]
        for process in processes:
            now = tree.seconds()
            assert now >= last
            last = now
            process.wait()


def test_a_tree_that_never_holds_still_is_no_reading(monkeypatch):
    tree = TreeCpu()
    flicker = iter([{tree._root: True}, {}] * estimate.ATTEMPTS)
    monkeypatch.setattr(tree, "_members", lambda: next(flicker))
    with pytest.raises(MeterError, match="come and go too fast"):
        tree.seconds()


def test_a_process_that_ends_while_it_is_read_is_read_again(monkeypatch):
    tree = TreeCpu()
    really, gone = tree._spent, iter([True, False])

    def spent(process, bequeaths):
        if next(gone, False):
            raise psutil.NoSuchProcess(process.pid)
        return really(process, bequeaths)

    monkeypatch.setattr(tree, "_spent", spent)
    assert tree.seconds() >= 0


def test_a_process_that_may_not_be_looked_at_is_no_reading(monkeypatch):
    tree = TreeCpu()

    def denied():
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(tree, "_members", denied)
    with pytest.raises(MeterError, match="cannot be read"):
        tree.seconds()


# --- the meter -------------------------------------------------------------------------------


def test_the_meter_counts_this_process_and_its_children():
    meter = EstimateMeter(MeterOptions())
    before = meter.read()["cpu"]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", BURN + "burn(0.2)"], check=True)
    seconds, used = time.perf_counter() - start, meter.read()["cpu"].microjoules - before.microjoules
    at_rest = 1e6 * 0.7 * os.cpu_count() * seconds
    assert used - at_rest > 0.9e6 * 3.2 * 0.2


def test_it_is_always_there_and_says_what_it_assumes(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    found = probe(MODERATE)
    assert (found.ok, found.domains, found.quality, found.remedy) == (True, ("cpu",), "estimated", "")
    assert found.reason == "CPU time x power range 2..60 W on 16 logical CPUs"


def test_without_a_number_of_cpus_there_is_no_estimate(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    found = probe(MeterOptions())
    assert (found.ok, found.reason) == (False, "the number of CPUs is unknown")
    assert found.remedy


def test_the_machines_cpu_time_holds_at_least_what_this_process_burns():
    before, burned = busy_cpu_seconds(), time.process_time()
    while time.process_time() - burned < 0.3:
        pass
    assert busy_cpu_seconds() - before > 0.2
