import itertools
import os
import re
import threading
import time

import pytest
from contracts.meter_contract import HandleContract
from hypothesis import given
from hypothesis import strategies as st

from tuner import machine
from tuner.meters import Unavailable
from tuner.meters.rapl import Counter, RaplMeter, Zone, discover, probe
from tuner.trial import MeterError

RANGE = 262_143_328_850  # max_energy_range_uj of a Xeon: (2^32 - 1) steps of 61 uJ


class Tree:
    """A powercap tree as the kernel lays it out: nested devices, and one flat folder of links to them."""

    def __init__(self, folder):
        self.devices = folder / "devices/virtual/powercap"
        self.root = folder / "class/powercap"
        self.devices.mkdir(parents=True)
        self.root.mkdir(parents=True)
        self.zones = {}

    def add(self, zone, name, microjoules=1_000_000_000, limit=RANGE, **files):
        control, *numbers = zone.split(":")
        folder = self.devices / control
        for depth in range(len(numbers)):
            folder /= ":".join([control, *numbers[: depth + 1]])
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{limit}\n")
        for file, text in files.items():
            (folder / file).write_text(f"{text}\n")
        (folder / "device").symlink_to("..")  # the kernel's own loop
        for link, target in ((control, self.devices / control), (zone, folder)):
            if not (self.root / link).exists():
                (self.root / link).symlink_to(os.path.relpath(target, self.root))
        self.zones[zone] = folder
        self.set(zone, microjoules)
        return self

    def set(self, zone, microjoules):
        energy = self.zones[zone] / "energy_uj"
        part = energy.with_suffix(".part")
        part.write_text(f"{microjoules}\n")
        part.replace(energy)

    def use(self, joules):
        for zone, folder in self.zones.items():
            self.set(zone, (int((folder / "energy_uj").read_text()) + round(1e6 * joules)) % (RANGE + 1))


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.fixture
def laptop(tree):
    """One package with its parts, memory, and the whole board beside it."""
    tree.add("intel-rapl:0", "package-0", constraint_0_max_power_uw=15_000_000)
    tree.add("intel-rapl:0:0", "core")
    tree.add("intel-rapl:0:1", "uncore")
    tree.add("intel-rapl:0:2", "dram")
    return tree.add("intel-rapl:1", "psys")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def open_rapl(clock):
    """Meters that poll only when asked to, and end with the test."""
    opened = []

    def open_rapl(tree, poll_seconds=3600.0):
        opened.append(RaplMeter(tree.root, seconds=clock, poll_seconds=poll_seconds))
        return opened[-1]

    yield open_rapl
    for meter in opened:
        meter.close()


class TestRaplKeepsTheMeterContract(HandleContract):
    @pytest.fixture
    def meter(self, laptop, open_rapl):
        self.tree = laptop
        return open_rapl(laptop)

    def use(self, joules):
        self.tree.use(joules)


def domains(tree):
    return [zone.domain for zone in discover(tree.root)]


# --- finding the counters --------------------------------------------------------------------


def test_packages_and_memory_are_read_and_their_parts_are_not(laptop):
    assert domains(laptop) == ["cpu0", "dram0"]


def test_zones_are_known_by_name_and_not_by_number(tree):
    tree.add("intel-rapl:0", "psys").add("intel-rapl:1", "package-1").add("intel-rapl:2", "package-0")
    tree.add("intel-rapl:2:0", "dram", 7)
    assert domains(tree) == ["cpu0", "cpu1", "dram0"]
    assert [zone.folder.name for zone in discover(tree.root)] == ["intel-rapl:2", "intel-rapl:1", "intel-rapl:2:0"]


def test_ten_sockets_come_in_the_order_of_their_numbers(tree):
    for socket in reversed(range(12)):
        tree.add(f"intel-rapl:{socket}", f"package-{socket}")
    assert domains(tree) == [f"cpu{socket}" for socket in range(12)]


def test_the_memory_mapped_twin_of_a_package_is_left_out(tree):
    tree.add("intel-rapl-mmio:0", "package-0", 5).add("intel-rapl:0", "package-0", 7)
    assert domains(tree) == ["cpu0"]
    assert discover(tree.root)[0].folder.name == "intel-rapl:0"


def test_a_package_that_is_only_memory_mapped_is_read_there(tree):
    tree.add("intel-rapl-mmio:0", "package-0")
    assert domains(tree) == ["cpu0"]


def test_separate_dies_are_both_read(tree):
    tree.add("intel-rapl:0", "package-0-die-0", 10_000_000_000).add("intel-rapl:1", "package-0-die-1", 20_000_000_000)
    tree.add("intel-rapl:1:0", "dram", 30_000_000_000)
    assert domains(tree) == ["cpu0_die0", "cpu0_die1", "dram0_die1"]


def test_dies_that_show_one_counter_are_read_once(tree):
    tree.add("intel-rapl:0", "package-0-die-0", 10_000_000_000).add("intel-rapl:1", "package-0-die-1", 10_000_300_000)
    assert domains(tree) == ["cpu0_die0"]


def test_two_sockets_with_equal_counters_are_still_two(tree):
    tree.add("intel-rapl:0", "package-0", 7_000_000).add("intel-rapl:1", "package-1", 7_000_000)
    assert domains(tree) == ["cpu0", "cpu1"]


def test_a_memory_counter_that_never_left_zero_is_none(tree):
    tree.add("intel-rapl:0", "package-0").add("intel-rapl:0:0", "dram", 0)
    assert domains(tree) == ["cpu0"]


def test_a_tree_mounted_elsewhere_needs_no_links(laptop):
    assert [zone.domain for zone in discover(laptop.devices)] == ["cpu0", "dram0"]


def test_an_environment_variable_names_the_tree(laptop, monkeypatch):
    monkeypatch.setenv("TUNE_POWERCAP_ROOT", str(laptop.root))
    found = probe()
    assert (found.ok, found.domains, found.remedy) == (True, ("cpu0", "dram0"), "")


def test_a_machine_without_a_memory_counter_says_so(tree):
    tree.add("intel-rapl:0", "package-0")
    assert "no counter for memory" in probe(tree.root).reason


# --- what stands in the way ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "virtual", "container", "reason", "remedy"),
    [
        ("Linux", "", "", "is absent", "sudo modprobe intel_rapl_msr"),
        ("Linux", "KVM", "Docker", r"a virtual machine \(KVM\) has no energy counters", "--cpu-watts"),
        ("Linux", "", "Docker", "Docker hides it", "-e TUNE_POWERCAP_ROOT=/powercap"),
        ("Darwin", "", "", "this is Darwin", "--meter estimate"),
    ],
)
def test_a_missing_tree_is_explained_by_where_we_are(tmp_path, monkeypatch, system, virtual, container, reason, remedy):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr(machine, "virtual_machine", lambda: virtual)
    monkeypatch.setattr(machine, "container", lambda: container)
    found = probe(tmp_path / "nothing")
    assert not found.ok
    assert not found.domains
    assert re.search(reason, found.reason)
    assert remedy in found.remedy


def test_an_empty_tree_holds_no_package(tree):
    assert "holds no CPU package" in probe(tree.root).reason


def test_a_link_that_leads_nowhere_but_to_itself_is_no_zone(laptop):
    (laptop.root / "intel-rapl:7").symlink_to("intel-rapl:7")
    (laptop.zones["intel-rapl:0"] / "intel-rapl").symlink_to(laptop.devices / "intel-rapl")
    assert domains(laptop) == ["cpu0", "dram0"]


def test_links_into_a_masked_folder_are_no_zones(tree):
    (tree.root / "intel-rapl:0").symlink_to("../../devices/virtual/powercap/intel-rapl/intel-rapl:0")
    assert "holds no CPU package" in probe(tree.root).reason


def test_a_zone_without_a_name_is_none(laptop):
    (laptop.zones["intel-rapl:0:2"] / "name").unlink()
    assert domains(laptop) == ["cpu0"]


def deny(monkeypatch, *names):
    """Tests may run as root, whom no permission stops; so the refusal comes from the edge itself."""
    from pathlib import Path

    really = Path.read_bytes

    def read_bytes(path):
        if path.name in names:
            raise PermissionError(13, "Permission denied", str(path))
        return really(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)


def test_a_counter_for_root_only_comes_with_both_commands_and_their_price(laptop, monkeypatch):
    deny(monkeypatch, "energy_uj")
    found = probe(laptop.root)
    assert "readable by root only" in found.reason
    until_boot, for_good = found.remedy.splitlines()
    assert until_boot.startswith(f"sudo chmod a+r {laptop.root}/*/energy_uj")
    assert "PLATYPUS" in until_boot
    assert "/etc/tmpfiles.d/" in for_good
    assert "0440 root $(id -gn)" in for_good


def test_a_locked_tree_without_links_is_unlocked_where_the_host_has_them(laptop, monkeypatch):
    deny(monkeypatch, "energy_uj")
    assert "chmod a+r /sys/class/powercap/*/energy_uj" in probe(laptop.devices).remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_the_permission_bits_of_the_file_are_what_counts(laptop):
    (laptop.zones["intel-rapl:0"] / "energy_uj").chmod(0)
    assert "readable by root only" in probe(laptop.root).reason


def test_a_tree_that_cannot_be_listed_is_no_crash(laptop, monkeypatch):
    from pathlib import Path

    def iterdir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert "cannot be listed: Permission denied" in probe(laptop.root).reason


@pytest.mark.parametrize("limit", ["0", "", "-1", "unlimited"])
def test_without_a_range_a_wrap_could_not_be_told(tree, limit):
    tree.add("intel-rapl:0", "package-0", limit=limit)
    found = probe(tree.root)
    assert not found.ok
    assert "without it a wrap of the counter cannot be told" in found.reason


def test_a_missing_range_is_refused_too(tree):
    tree.add("intel-rapl:0", "package-0")
    (tree.zones["intel-rapl:0"] / "max_energy_range_uj").unlink()
    with pytest.raises(Unavailable, match="No such file"):
        discover(tree.root)


@pytest.mark.parametrize(
    "content", ["", "12", "\n", "-5\n", "1e9\n", "0x10\n", "12 13\n", "nan\n", "1\n2\n", "9" * 30 + "\n"]
)
def test_a_counter_that_is_no_number_is_no_counter(tree, content):
    tree.add("intel-rapl:0", "package-0")
    (tree.zones["intel-rapl:0"] / "energy_uj").write_text(content)
    assert "expected a number and a line end" in probe(tree.root).reason


# --- wraps -----------------------------------------------------------------------------------


def zone(limit=RANGE, watts=1000.0):
    return Zone("cpu0", None, limit, watts)


def test_a_wrap_adds_what_lay_on_both_sides_of_it(tree, open_rapl, clock):
    tree.add("intel-rapl:0", "package-0", RANGE - 4_000_000)
    meter = open_rapl(tree)
    clock.now += 1
    tree.set("intel-rapl:0", 5_999_999)
    assert meter.read()["cpu0"].microjoules == 10_000_000
    assert meter.wraps == {"cpu0": 1}


SMALL = 99_999_999  # 100 J: at 1000 W it wraps in 0.1 s


@pytest.mark.parametrize(
    ("start", "end", "added"), [(SMALL, 0, 1), (0, SMALL, SMALL), (SMALL, SMALL, 0), (SMALL - 1, SMALL, 1)]
)
def test_the_edge_of_the_range_is_counted_exactly(start, end, added):
    counter = Counter(zone(SMALL), start, 0.0)
    counter.advance(end, 0.09)
    assert counter.total == added


@given(steps=st.lists(st.integers(0, 9_000_000_000), max_size=60), start=st.integers(0, RANGE))
def test_any_course_of_a_wrapping_counter_is_summed_exactly(steps, start):
    counter, raw = Counter(zone(), start, 0.0), start
    for number, step in enumerate(steps, start=1):
        raw += step
        counter.advance(raw % (RANGE + 1), 10.0 * number)
    assert counter.total == sum(steps)
    assert counter.wraps == raw // (RANGE + 1)


@given(readings=st.lists(st.tuples(st.integers(0, 2 * RANGE), st.floats(0, 500)), max_size=30))
def test_no_course_of_a_counter_makes_the_total_decrease(readings):
    counter, at, last = Counter(zone(), 0, 0.0), 0.0, 0
    for microjoules, later in readings:
        at += later
        try:
            counter.advance(microjoules, at)
        except MeterError:
            assert counter.total == last
        assert counter.total >= last
        last = counter.total


def test_many_wraps_between_two_reads_are_all_counted_by_the_thread(tree):
    tree.add("intel-rapl:0", "package-0", 0, limit=999_999_999)  # wraps after 1 kJ
    seconds = itertools.count(step=0.9)  # every look at the clock is 0.9 s after the last
    meter = RaplMeter(tree.root, seconds=seconds.__next__, poll_seconds=0.001)
    try:
        for step in range(1, 31):
            tree.set("intel-rapl:0", step * 400_000_000 % 1_000_000_000)
            deadline = time.monotonic() + 1
            while meter._counters[0].total < step * 400_000_000 and time.monotonic() < deadline:
                time.sleep(0.0005)
        assert meter.read()["cpu0"].microjoules == 12_000_000_000
        assert meter.wraps == {"cpu0": 12}
    finally:
        meter.close()


def test_a_thread_reads_often_enough_to_see_every_wrap():
    assert zone().poll_seconds == 10.0
    fast = zone(limit=65_532_610_987, watts=8000)
    assert fast.poll_seconds == pytest.approx(0.25 * 65_532.6 / 8000, rel=1e-4)


def test_limits_that_the_kernel_names_count_only_above_a_thousand_watts(tree):
    tree.add("intel-rapl:0", "package-0", constraint_0_max_power_uw=15_000_000, constraint_1_power_limit_uw=0)
    tree.add("intel-rapl:1", "package-1", constraint_0_power_limit_uw=4_095_875_000, constraint_0_time_window_us=9**12)
    tree.add("intel-rapl:2", "package-2", constraint_0_max_power_uw="")
    assert [zone.limit_watts for zone in discover(tree.root)] == [1000, pytest.approx(8191.75), 1000]


# --- windows that do not count ---------------------------------------------------------------


def break_file(content):
    return lambda tree: (tree.zones["intel-rapl:0"] / "energy_uj").write_text(content)


@pytest.mark.parametrize(
    ("fault", "unreadable", "seconds", "sentence"),
    [
        (lambda tree: (tree.zones["intel-rapl:0"] / "energy_uj").unlink(), True, 1, "No such file"),
        (break_file(""), True, 1, "expected a number"),
        (break_file("garbage\n"), True, 1, "expected a number"),
        (break_file("1000"), True, 1, "expected a number"),
        (
            lambda tree: tree.set("intel-rapl:0", 90_000_000_000),
            False,
            1,
            r"jumped, 89000 W is above the limit of 1000 W",
        ),
        (lambda tree: tree.set("intel-rapl:0", 0), False, 1, "jumped"),
        (lambda tree: tree.set("intel-rapl:0", RANGE + 5), True, 1, "above its range"),
        (lambda tree: tree.use(5), False, 300, "300 s passed between two reads, the counter may have wrapped twice"),
    ],
    ids=["vanished", "empty", "garbage", "short", "jump", "reset", "above range", "late"],
)
def test_a_sample_that_cannot_be_trusted_spoils_its_window_and_only_that(
    laptop, open_rapl, clock, fault, unreadable, seconds, sentence
):
    meter = open_rapl(laptop)
    before = meter.read()
    clock.now += seconds
    fault(laptop)
    with pytest.raises(MeterError, match=sentence):
        meter.read()
    if unreadable:
        laptop.set("intel-rapl:0", 1_000_000_000)
    after = meter.read()
    assert after["cpu0"] == before["cpu0"]
    laptop.use(2)
    clock.now += 1
    assert meter.read()["cpu0"].microjoules - after["cpu0"].microjoules == 2_000_000


def test_access_that_is_taken_away_in_the_middle_is_no_zero(laptop, open_rapl, monkeypatch):
    meter = open_rapl(laptop)
    deny(monkeypatch, "energy_uj")
    with pytest.raises(MeterError, match="Permission denied"):
        meter.read()


def test_a_fault_that_only_the_thread_saw_spoils_the_window_too(laptop, clock, open_rapl):
    meter = open_rapl(laptop, poll_seconds=0.001)
    meter.read()
    break_file("garbage\n")(laptop)
    deadline = time.monotonic() + 5
    while meter._fault is None and time.monotonic() < deadline:
        time.sleep(0.001)
    laptop.set("intel-rapl:0", 1_000_000_000)
    with pytest.raises(MeterError, match="garbage"):
        meter.read()


def test_a_counter_that_vanishes_while_opening_is_unavailable(laptop, monkeypatch):
    zones = discover(laptop.root)
    monkeypatch.setattr("tuner.meters.rapl.discover", lambda folder: zones)
    (laptop.zones["intel-rapl:0"] / "energy_uj").unlink()
    with pytest.raises(Unavailable, match="No such file"):
        RaplMeter(laptop.root)


def test_closing_ends_the_thread(laptop, open_rapl):
    before = threading.active_count()
    meter = open_rapl(laptop)
    assert threading.active_count() == before + 1
    meter.close()
    assert threading.active_count() == before
