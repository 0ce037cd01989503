import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from contracts.meter_contract import HandleContract
from hypothesis import given
from hypothesis import strategies as st

from tuner import meters
from tuner.meters import Availability, MeterOptions, blind_to, choose, counts, open_meter, probe
from tuner.meters.wall import WallSource
from tuner.space import Refused
from tuner.trial import MeterError, Reading

NVML = Availability("nvml", True, ("gpu0", "gpu1"), "measured", "gpu0 is NVIDIA H100 (GPU-a)", "")
RAPL = Availability("rapl", True, ("cpu0", "dram0"), "measured", "cpu0, dram0 readable", "")
NO_NVML = Availability("nvml", False, (), "measured", "no NVIDIA driver", "nvidia-smi")
NO_RAPL = Availability("rapl", False, (), "measured", "the counter is locked", "sudo chmod this\nsudo for good")


NOTHING = (
    "--require-measured: nothing can be measured here "
    "(no NVML: no NVIDIA driver; no RAPL: the counter is locked); `tune doctor` says how to mend it"
)


@pytest.fixture
def here(monkeypatch):
    """A machine with these counters; the estimate is the real one."""
    really = meters.probe

    def here(*counters):
        found = {a.name: a for a in counters}
        monkeypatch.setattr(meters, "probe", lambda name, options: found.get(name) or really(name, options))

    return here


def chosen(spec="auto", *, require_measured=False):
    return choose(spec, MeterOptions(), require_measured=require_measured)


# --- choosing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counters", "spec", "names", "blind", "sentence"),
    [
        ((NVML, RAPL), "auto", ("nvml", "rapl"), set(), "meter: nvml+rapl (gpu0, gpu1, cpu0, dram0), measured."),
        (
            (NVML, NO_RAPL),
            "auto",
            ("nvml",),
            {"offload"},
            "meter: nvml (gpu0, gpu1), measured; no RAPL: the counter is locked.",
        ),
        (
            (NO_NVML, RAPL),
            "auto",
            ("rapl",),
            {"offload"},
            "meter: rapl (cpu0, dram0), measured; no NVML: no NVIDIA driver.",
        ),
        (
            (NVML, RAPL),
            "nvml",
            ("nvml",),
            {"offload"},
            "meter: nvml (gpu0, gpu1), measured; CPU energy is not counted.",
        ),
        (
            (NVML, RAPL),
            "rapl",
            ("rapl",),
            {"offload"},
            "meter: rapl (cpu0, dram0), measured; GPU energy is not counted.",
        ),
        ((NVML, RAPL), "rapl+nvml", ("nvml", "rapl"), set(), "meter: nvml+rapl (gpu0, gpu1, cpu0, dram0), measured."),
    ],
)
def test_counters_are_taken_as_they_are_found_or_asked_for(here, counters, spec, names, blind, sentence):
    here(*counters)
    choice = chosen(spec, require_measured=True)
    assert (choice.names, choice.blind_to, choice.sentence) == (names, blind, sentence)
    assert choice.quality == "measured"
    assert choice.domains == tuple(d for a in counters if a.name in names for d in a.domains)


def test_without_any_counter_auto_estimates_and_says_why(here):
    here(NO_NVML, NO_RAPL)
    choice = chosen()
    assert (choice.names, choice.quality, choice.domains) == (("estimate",), "estimated", ("cpu",))
    assert choice.blind_to == {"offload", "clock", "power"}
    assert choice.sentence.startswith("meter: estimate (CPU time x power range ")
    assert choice.sentence.endswith(
        "; no NVML: no NVIDIA driver; no RAPL: the counter is locked). Numbers are estimated, see `tune doctor`."
    )


def test_an_estimate_that_is_asked_for_is_taken_beside_counters(here):
    here(NVML, RAPL)
    choice = chosen("estimate")
    assert choice.names == ("estimate",)
    assert "Numbers are estimated" in choice.sentence
    assert "no RAPL" not in choice.sentence


@pytest.mark.parametrize(
    ("counters", "spec", "require_measured", "sentence"),
    [
        ((NVML, NO_RAPL), "rapl", False, "--meter rapl: the counter is locked; sudo chmod this"),
        ((NVML, NO_RAPL), "nvml+rapl", False, "--meter rapl: the counter is locked; sudo chmod this"),
        ((NO_NVML, RAPL), "nvml", False, "--meter nvml: no NVIDIA driver; nvidia-smi"),
        (
            (NO_NVML, NO_RAPL),
            "auto",
            True,
            NOTHING,
        ),
        (
            (NVML, RAPL),
            "estimate",
            True,
            "--meter estimate: an estimate is no measurement; leave out --require-measured or name a counter",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_next_command(here, counters, spec, require_measured, sentence):
    here(*counters)
    with pytest.raises(Refused) as caught:
        chosen(spec, require_measured=require_measured)
    assert str(caught.value) == sentence


def test_an_estimate_that_cannot_be_made_is_refused_too(here):
    here(NO_NVML, NO_RAPL, Availability("estimate", False, (), "estimated", "no CPUs", ""))
    for spec in ("auto", "estimate"):
        with pytest.raises(Refused, match="--meter estimate: no CPUs"):
            chosen(spec)


@pytest.mark.parametrize(
    "spec", ["", "nvm", "nvml+", "nvml+estimate", "auto+nvml", "nvml+nvml", "NVML", "nvml+zeus", "\x1b[2J"]
)
def test_an_unknown_meter_is_refused_with_the_choices(spec):
    with pytest.raises(
        Refused, match=r"expected auto, nvml, rapl, nvml\+rapl, zeus, rapl\+zeus, wall, estimate"
    ) as caught:
        chosen(spec)
    assert "\x1b" not in str(caught.value)


def test_a_misspelt_meter_is_recognised():
    with pytest.raises(Refused, match="did you mean nvml"):
        chosen("nvlm")


@pytest.mark.parametrize(
    ("names", "domains", "blind"),
    [
        (["nvml"], ["gpu0", "gpu1"], {"offload"}),
        (["rapl"], ["cpu0", "dram0"], {"offload"}),
        (["nvml", "rapl"], ["gpu0", "cpu0"], set()),
        (["zeus"], ["gpu0"], {"offload"}),
        (["zeus"], ["soc0"], set()),
        (["zeus"], ["cpu0", "gpu0", "dram0", "ane0"], set()),
        (["rapl", "zeus"], ["cpu0", "gpu0"], set()),
        (["wall"], ["wall0"], set()),
        (["estimate"], ["cpu"], {"offload", "clock", "power"}),
        (["nvml", "estimate"], ["gpu0", "cpu"], {"offload", "clock", "power"}),
    ],
)
def test_only_who_counts_both_sides_sees_what_offloading_does(names, domains, blind):
    assert blind_to(names, domains) == blind
    assert counts(domains, "cpu") == any(d.startswith(("cpu", "soc", "wall")) for d in domains)
    assert counts(domains, "gpu") == any(d.startswith(("gpu", "soc", "wall")) for d in domains)


def test_probing_an_unknown_meter_is_refused():
    with pytest.raises(Refused, match="expected nvml, rapl, zeus, wall, estimate"):
        probe("mains", MeterOptions())


# --- the wall, and what zeus reads -----------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "quality", "sentence"),
    [
        ("123.4 W", "sampled", "meter: wall (wall0), sampled every 1 s."),
        ("12.5 Wh", "measured", "meter: wall (wall0), measured in steps of 360 J."),
    ],
)
def test_the_wall_sees_everything_and_says_how(shown, quality, sentence):
    options = MeterOptions.parse(wall_command=f"echo {shown}")
    choice = choose("wall", options, require_measured=True)
    assert (choice.names, choice.quality, choice.blind_to, choice.domains) == (("wall",), quality, set(), ("wall0",))
    assert choice.sentence == sentence


@pytest.mark.parametrize(
    ("quality", "domains", "how", "sentence"),
    [
        ("measured", ("gpu0",), "", "meter: zeus (gpu0), measured; CPU energy is not counted."),
        ("sampled", ("soc0",), "every 0.1 s", "meter: zeus (soc0), sampled every 0.1 s."),
        (
            "sampled",
            ("cpu0", "gpu0"),
            "by Apple's own model",
            "meter: zeus (cpu0, gpu0), sampled by Apple's own model.",
        ),
    ],
)
def test_what_zeus_reads_is_said_with_its_quality(here, quality, domains, how, sentence):
    here(NVML, RAPL, Availability("zeus", True, domains, quality, "found", "", how))
    assert chosen("zeus").sentence == sentence


def test_an_amd_gpu_goes_with_the_cpu_beside_it(here):
    here(RAPL, Availability("zeus", True, ("gpu0",), "measured", "found", ""))
    choice = chosen("zeus+rapl")
    assert (choice.names, choice.blind_to) == (("rapl", "zeus"), set())
    assert choice.sentence == "meter: rapl+zeus (cpu0, dram0, gpu0), measured."


def test_auto_takes_neither_the_wall_nor_zeus(here):
    here(NO_NVML, NO_RAPL, Availability("zeus", True, ("gpu0",), "measured", "found", ""))
    assert chosen("auto").names == ("estimate",)


@pytest.mark.parametrize("spec", ["nvml+wall", "wall+rapl", "auto+wall", "wall+wall"])
def test_the_wall_is_never_added_to_what_it_contains(spec):
    with pytest.raises(Refused, match="the wall holds what the others count; name it alone: --meter wall"):
        choose(spec, MeterOptions.parse(wall_command="echo 5 W"), require_measured=False)


@pytest.mark.parametrize(
    ("option", "value"), [("wall_command", "echo 5 W"), ("wall_url", "http://127.0.0.1:9/")], ids=["command", "url"]
)
@pytest.mark.parametrize("spec", ["auto", "nvml", "estimate"])
def test_wall_options_beside_another_meter_are_refused(option, value, spec):
    with pytest.raises(Refused) as caught:
        choose(spec, MeterOptions.parse(**{option: value}), require_measured=False)
    assert str(caught.value) == f"--{option.replace('_', '-')}: it goes with --meter wall, not with --meter {spec}"


def test_the_wall_without_a_source_names_both_ways():
    with pytest.raises(Refused, match=r"--meter wall: neither --wall-command CMD nor --wall-url URL .*; tune run"):
        chosen("wall")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"wall_unit": "W"}, "--wall-unit: it goes with --wall-command CMD or --wall-url URL"),
        ({"wall_field": "a.b"}, "--wall-field: it goes with"),
        ({"wall_interval": 1.0}, "--wall-interval: it goes with"),
        ({"wall_command": "a", "wall_url": "http://plug"}, "expected one of"),
        ({"wall_command": "a", "wall_interval": 1000.0}, r"--wall-interval 1000: expected 0\.1 to 60"),
    ],
)
def test_wall_options_that_do_not_go_together_are_refused(options, sentence):
    with pytest.raises(Refused, match=sentence):
        MeterOptions.parse(**options)


def test_wall_options_are_taken_from_the_command_line():
    options = MeterOptions.parse(
        "15..65", wall_url="http://plug/rpc", wall_unit="wh", wall_field="aenergy.total", wall_interval=2.0
    )
    assert options.cpu_watts == (15, 65)
    assert options.wall == WallSource(url="http://plug/rpc", unit="Wh", field="aenergy.total", interval_seconds=2.0)
    assert MeterOptions.parse(wall_command="a").wall.interval_seconds == 1.0


def test_the_wall_is_opened_as_it_was_chosen():
    options = MeterOptions.from_record(MeterOptions.parse(wall_command="echo 5 W").record())
    with contextlib.closing(open_meter(("wall",), options)) as meter:
        assert (meter.name, meter.domains(), meter.quality) == ("wall", ("wall0",), "sampled")


def test_a_wall_meter_that_fell_silent_since_it_was_chosen_is_an_error():
    with pytest.raises(MeterError, match=r"wall: .*exit status 1"):
        open_meter(("wall",), MeterOptions.parse(wall_command="false"))


def test_zeus_is_opened_as_it_was_chosen(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parent / "fakes/zeus_package")
    monkeypatch.setenv("TUNE_FAKE_ZEUS", str(tmp_path / "zeus.json"))
    (tmp_path / "zeus.json").write_text('{"soc": "Jetson", "millijoules": {"total_energy_mj": 1.5}}')
    choice = chosen("zeus")
    assert choice.sentence == "meter: zeus (soc0), sampled every 0.1 s."
    with contextlib.closing(open_meter(choice.names, MeterOptions())) as meter:
        assert (meter.domains(), meter.quality, meter.blind_to) == (choice.domains, choice.quality, choice.blind_to)
    for module in [name for name in sys.modules if name.partition(".")[0] == "zeus"]:
        del sys.modules[module]


# --- opening ---------------------------------------------------------------------------------


@pytest.fixture
def measured_machine(tmp_path, monkeypatch):
    """A GPU and a CPU package, each with 3.5 J on its counter; gives a function that lets both use energy."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "fakes")
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    zone = tmp_path / "powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("65532610987\n")
    monkeypatch.setenv("TUNE_POWERCAP_ROOT", str(tmp_path / "powercap"))
    monkeypatch.setenv("TUNE_FAKE_NVML", str(tmp_path / "nvml.json"))
    total = 0.0

    def use(joules):
        nonlocal total
        total += joules
        (zone / "energy_uj").write_text(f"{round(1e6 * total)}\n")
        gpu = {"uuid": "GPU-a", "millijoules": round(1000 * total)}
        (tmp_path / "nvml.json").write_text(json.dumps({"gpus": [gpu]}))

    use(3.5)
    yield use
    sys.modules.pop("pynvml", None)


class TestTwoMetersTogetherKeepTheContract(HandleContract):
    @pytest.fixture
    def meter(self, measured_machine):
        self.use = measured_machine
        return open_meter(("rapl", "nvml"), MeterOptions())


def test_domains_of_two_meters_stay_apart(measured_machine):
    meter = open_meter(("rapl", "nvml"), MeterOptions())
    measured_machine(1)
    assert meter.read() == {"gpu0": Reading.exact(1_000_000), "cpu0": Reading.exact(1_000_000)}
    assert (meter.name, meter.quality, meter.blind_to) == ("nvml+rapl", "measured", set())
    meter.close()


def test_what_is_chosen_is_what_is_opened(measured_machine):
    choice = chosen()
    meter = open_meter(choice.names, MeterOptions())
    assert (meter.name, meter.domains()) == ("+".join(choice.names), choice.domains)
    assert (meter.quality, meter.blind_to) == (choice.quality, choice.blind_to)
    meter.close()


def test_one_estimated_domain_labels_the_whole(measured_machine):
    meter = open_meter(("nvml", "estimate"), MeterOptions())
    assert meter.quality == "estimated"
    assert meter.domains() == ("gpu0", "cpu")
    assert meter.blind_to == {"offload", "clock", "power"}
    meter.close()


def test_a_counter_that_went_away_since_it_was_chosen_is_an_error(measured_machine, monkeypatch, tmp_path):
    monkeypatch.setenv("TUNE_POWERCAP_ROOT", str(tmp_path / "gone"))
    with pytest.raises(MeterError, match=r"rapl: .*gone is absent"):
        open_meter(("nvml", "rapl"), MeterOptions())
    assert sys.modules["pynvml"]._users == 0, "the meter that did open was closed again"


@pytest.mark.parametrize("names", [(), ("auto",), ("nvml", "wall")])
def test_opening_an_unknown_meter_is_refused(names):
    with pytest.raises(Refused, match="expected nvml, rapl"):
        open_meter(names, MeterOptions())


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "watts"),
    [(None, None), ("15..65", (15, 65)), ("65", (65, 65)), (" 7.5..28 ", (7.5, 28)), ("9..9", (9, 9))],
)
def test_a_power_range_is_read_as_typed(text, watts):
    assert MeterOptions.parse(text).cpu_watts == watts


@pytest.mark.parametrize(
    "text",
    ["", "..", "15..", "..65", "65..15", "0..5", "-5..5", "a..b", "15-65", "1..2..3", "1.2.3", "nan", "1e3", "15,65"],
)
def test_a_power_range_that_is_none_is_refused(text):
    with pytest.raises(Refused, match=r"--cpu-watts .*such as 15\.\.65"):
        MeterOptions.parse(text)


@pytest.mark.parametrize("watts", [(float("nan"), 5.0), (5.0, float("inf")), (0.0, 5.0)])
def test_watts_are_finite_and_above_zero(watts):
    with pytest.raises(Refused, match="0 < low <= high"):
        MeterOptions(watts)


@given(watts=st.none() | st.tuples(st.floats(0.001, 1e3), st.floats(1e3, 1e6)))
def test_options_survive_a_journal(watts):
    options = MeterOptions(watts)
    assert MeterOptions.from_record(json.loads(json.dumps(options.record()))) == options


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"cpu_watts": "15..65"}, "expected two numbers"),
        ({"cpu_watts": [15]}, "expected two numbers"),
        ({"cpu_watts": [65, 15]}, "0 < low <= high"),
        ({"dram_watts": 3}, "newer tune"),
    ],
)
def test_a_record_that_is_not_understood_is_refused(record, sentence):
    with pytest.raises(Refused, match=sentence):
        MeterOptions.from_record(record)


def test_a_record_without_options_means_none():
    assert MeterOptions.from_record({}) == MeterOptions()


# --- cost ------------------------------------------------------------------------------------


def test_importing_the_package_imports_no_meter_and_no_library():
    code = "import sys, tuner.meters; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "tuner.meters" in modules
    libraries = {"psutil", "pynvml", "pyRAPL", "zeus", "http.client"}
    assert not (libraries | {"tuner.meters.rapl", "tuner.meters.wall", "tuner.machine"}) & set(modules)
