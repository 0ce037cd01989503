import sys
from pathlib import Path

import pytest

from tuner.assemble import choose_proposer, free_name, llm_proposer, prepare, results_folder, thorough, view_of
from tuner.journal import Header, Plan
from tuner.meters import MeterChoice, MeterOptions
from tuner.meters.wall import WallSource
from tuner.space import Refused
from tuner.trial import History, Target

RUNNER = """
from tuner.space import Choice, Int, SearchSpace
def space(target):
    return SearchSpace((
        Int(name="layers", meaning="Layers on the GPU.", default=0, low=0, high=9, lever="offload"),
        Int(name="batch", meaning="Requests together.", default=4, low=1, high=8),
    ))
def identity(target): return {"engine": "e", "engine_version": "1", "model": "m"}
def launch(config, target): ...
def command(config, target): return "e"
"""


@pytest.fixture
def runner(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(RUNNER)
    return path


said: list[str] = []


def ready(runner, **more):
    header = Header(name="s", workload=str(runner), target=Target(), proposer="rules", **more)
    return prepare(header, meter="estimate", options=MeterOptions(), say=said.append)


def test_what_the_meter_is_blind_to_stays_at_its_default_and_is_said(runner):
    header, bench = ready(runner)
    assert [p.name for p in bench.space.free] == ["batch"]
    assert header.blind == ("layers",)
    assert any("layers" in note for note in bench.notes)


def test_what_the_meter_is_blind_to_is_refused_when_it_is_asked_for_by_name(runner):
    with pytest.raises(Refused, match=r"--range layers: the estimate meter cannot see .*tune doctor"):
        ready(runner, ranges=("layers=0..4",))


@pytest.fixture
def gpu(monkeypatch):
    """A machine on which only the GPU's counter can be read: RAPL is for root, as Linux has it."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "fakes")
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield
    sys.modules.pop("pynvml", None)


def with_meter(runner, meter, **more):
    header = Header(name="s", workload=str(runner), target=Target(), proposer="rules", **more)
    return prepare(header, meter=meter, options=MeterOptions(), say=said.append)


def test_an_engine_on_the_cpu_is_not_measured_by_the_counter_of_an_idle_gpu(runner, gpu):
    header, _ = with_meter(runner, "auto")
    assert header.meters == ("estimate",)
    assert any(line.startswith("not used: nvml, because this engine computes on the CPU") for line in said)
    with pytest.raises(Refused, match="--meter nvml: this engine computes on the CPU"):
        with_meter(runner, "nvml")
    with pytest.raises(Refused, match="--require-measured"):
        with_meter(runner, "auto", require_measured=True)


def test_an_engine_on_the_gpu_is_measured_by_its_counter_in_windows_of_a_hundred_updates(runner, gpu):
    runner.write_text(RUNNER.replace("default=0", "default=9"))
    header, bench = with_meter(runner, "auto")
    assert header.meters == ("nvml",)
    assert header.plan.window_seconds == 10.0
    assert "GPU-" in bench.machine["gpu0"]


def test_a_window_that_was_asked_for_is_kept(runner):
    header, _ = ready(runner, plan=Plan(window_seconds=0.5))
    assert header.plan.window_seconds == 0.5
    assert ready(runner)[0].plan.window_seconds == 2.0


def test_work_on_a_gpu_that_no_meter_counts_is_refused_with_the_way_to_keep_it_on_the_cpu(runner):
    runner.write_text(RUNNER.replace("default=0", "default=9"))
    with pytest.raises(Refused, match=r"layers=9 computes on a GPU, whose energy .* --pin layers=0"):
        ready(runner)
    assert ready(runner, pins=("layers=0",))[1].space.default()["layers"] == 0


def test_a_default_outside_the_range_that_was_asked_for_moves_and_is_said(runner):
    _, bench = ready(runner, ranges=("batch=6..8",))
    assert bench.space.default()["batch"] == 6
    assert "batch starts at 6: its default 4 is outside 6..8" in bench.notes


def test_code_that_did_not_come_with_tune_is_named_before_it_runs(runner):
    said.clear()
    runner.write_text("raise SystemError('at once')")
    with pytest.raises(Refused, match="at once"):
        ready(runner)
    assert said == [f"running the code of {runner}"]


@pytest.mark.parametrize("question", ["space", "identity"])
def test_what_a_runner_did_not_mean_to_raise_is_a_sentence_that_names_it(runner, question):
    runner.write_text(f"{RUNNER}\ndef {question}(target): return 1 / 0\n")
    with pytest.raises(Refused, match=rf"mine.py: its {question}\(\) failed .ZeroDivisionError"):
        ready(runner)


def test_the_header_holds_what_was_found_out(runner):
    header, bench = ready(runner)
    assert header.meters == ("estimate",)
    assert header.identity == {"engine": "e", "engine_version": "1", "model": "m"}
    assert list(header.space) == bench.space.record()
    assert header.machine["cores_logical"]


def test_no_chat_is_told_the_hosts_name(runner):
    header, bench = ready(runner)
    assert "host" in bench.machine
    assert "host" not in view_of(header, bench).of(bench.space, History())["machine"]


@pytest.fixture
def no_keys(monkeypatch):
    for key in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "TUNE_LLM"):
        monkeypatch.delenv(key, raising=False)


def test_a_key_in_the_environment_picks_its_provider(no_keys, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "k" * 20)
    choice = choose_proposer(proposer=None, llm=None, template=None, offer=None)
    assert choice.llm.startswith("anthropic:")
    assert choice.template == "enhanced"


def test_without_a_key_a_person_is_asked_and_otherwise_rules_take_over_with_a_warning(no_keys):
    assert choose_proposer(proposer=None, llm=None, template=None, offer=lambda: "paste").llm == "paste"
    assert choose_proposer(proposer=None, llm=None, template=None, offer=lambda: "rules").proposer == "rules"
    alone = choose_proposer(proposer=None, llm=None, template=None, offer=None)
    assert alone.proposer == "rules"
    assert "NO LLM IS IN USE" in alone.warning


def test_asking_for_an_llm_without_a_key_is_not_answered_with_rules(no_keys):
    with pytest.raises(Refused, match="--proposer llm: which one"):
        choose_proposer(proposer="llm", llm=None, template=None, offer=None)


def test_a_server_without_a_model_is_refused(no_keys):
    with pytest.raises(Refused, match="--base-url: name the model"):
        choose_proposer(proposer="rules", llm=None, template=None, base_url="http://localhost:1/v1", offer=None)


def test_a_name_that_is_taken_gets_a_number_and_no_character_that_a_folder_cannot_have(tmp_path):
    assert free_name(tmp_path, "my engine-rules") == "my-engine-rules"
    (tmp_path / "s").mkdir()
    (tmp_path / "s-2").mkdir()
    assert free_name(tmp_path, "s") == "s-3"


def test_a_folder_that_a_crash_left_without_a_journal_is_free(tmp_path):
    (tmp_path / "s").mkdir()
    assert results_folder(tmp_path, "s") == tmp_path / "s"
    (tmp_path / "s" / "journal.jsonl").touch()
    with pytest.raises(Refused, match="--resume"):
        results_folder(tmp_path, "s")


def test_a_template_that_fails_only_once_there_is_a_history_is_refused_at_the_start(runner, tmp_path):
    template = tmp_path / "own.md.j2"
    template.write_text("{% if history.best %}{{ history.best.nonsense }}{% endif %}")
    header, bench = ready(runner, template=str(template))
    with pytest.raises(Refused, match="nonsense"):
        llm_proposer(header, bench, None)


def test_naming_a_classical_proposer_asks_for_no_key(no_keys):
    choice = choose_proposer(proposer="sobol", llm=None, template=None, offer=None)
    assert (choice.proposer, choice.llm, choice.warning) == ("sobol", None, None)


def on_gpu(tmp_path, **plan):
    path = tmp_path / "gpu.py"
    path.write_text(RUNNER.replace("default=0, low=0, high=9", "default=9, low=9, high=9"))
    header = Header(name="s", workload=str(path), target=Target(), proposer="rules", plan=Plan(**plan))
    return prepare(header, meter="nvml", options=MeterOptions(), say=said.append)[0].plan


@pytest.mark.usefixtures("gpu")
def test_a_window_holds_a_hundred_updates_of_the_counter_and_it_is_said_when_less_was_asked_for(tmp_path):
    said.clear()
    assert on_gpu(tmp_path, window_seconds=2.0).window_seconds == 10.0
    assert any("windows last 10 s and not 2 s" in note for note in said)
    assert on_gpu(tmp_path, window_seconds=30.0).window_seconds == 30.0


@pytest.mark.usefixtures("gpu")
def test_fast_mode_keeps_to_the_window_that_was_asked_for(tmp_path):
    assert on_gpu(tmp_path, window_seconds=2.0, fast=True).window_seconds == 2.0


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_warmed_up_and_cooled_down_longer_than_a_cpu(tmp_path, runner):
    gpu_plan, cpu_plan = on_gpu(tmp_path), ready(runner)[0].plan
    assert (gpu_plan.warm_up_seconds, gpu_plan.cool_down_seconds) == ((10.0, 120.0), 60.0)
    assert (cpu_plan.warm_up_seconds, cpu_plan.cool_down_seconds) == ((1.0, 10.0), 0.0)


def meters(*names, quality="measured", domains=()):
    return MeterChoice(names=names, quality=quality, blind_to=frozenset(), domains=domains, sentence="")


ESTIMATE = meters("estimate", quality="estimated", domains=("cpu",))
NVML = meters("nvml", domains=("gpu0",))
WALL = meters("wall", quality="sampled", domains=("wall0",))


def test_a_claim_is_measured_with_longer_windows_than_a_fast_search():
    plan = thorough(Plan(fast=True, windows=3, window_seconds=1.0), ESTIMATE)
    assert (plan.fast, plan.windows, plan.window_seconds) == (False, 5, 2.0)


@pytest.mark.parametrize("chosen", [ESTIMATE, NVML, WALL])
def test_a_claim_of_a_study_that_was_not_fast_is_measured_as_its_trials_were(chosen):
    plan = Plan(windows=3, window_seconds=1.0)
    assert thorough(plan, chosen) == plan


@pytest.mark.parametrize(("chosen", "seconds"), [(NVML, 10.0), (WALL, 30.0)])
def test_no_window_of_a_claim_is_shorter_than_the_least_of_the_meter(chosen, seconds):
    assert thorough(Plan(fast=True, window_seconds=1.0), chosen).window_seconds == seconds


def at_the_wall(runner, **plan):
    options = MeterOptions(wall=WallSource(command="echo 50 W", interval_seconds=0.1))
    header = Header(name="s", workload=str(runner), target=Target(), proposer="rules", plan=Plan(**plan))
    return prepare(header, meter="wall", options=options, say=said.append)[0].plan.window_seconds


def test_windows_at_the_wall_last_thirty_seconds_at_least(runner):
    assert at_the_wall(runner, window_seconds=5.0) == 30.0
    assert at_the_wall(runner, window_seconds=45.0) == 45.0


def test_fast_mode_keeps_to_a_shorter_window_at_the_wall(runner):
    assert at_the_wall(runner, window_seconds=5.0, fast=True) == 5.0
