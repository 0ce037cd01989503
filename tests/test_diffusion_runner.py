"""The diffusion runner: the contract on a real pipeline, energy per image, and what is particular to it."""

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from contracts.runner_contract import RunnerContract

from tuner.space import Refused
from tuner.trial import Changeable, Judged, Target, Work

ROOT = Path(__file__).parents[1]
RUNNER = ROOT / "runners" / "diffusion.py"

missing = [n for n in ("torch", "diffusers", "transformers", "skimage") if importlib.util.find_spec(n) is None]
if missing:
    pytest.skip(f"{' and '.join(missing)} not installed: the diffusion runner is NOT tested", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own


def load_runner():
    spec = importlib.util.spec_from_file_location("diffusion_under_test", RUNNER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


diffusion = load_runner()
TARGET = Target(size="tiny", prompts=2, pixels=64)
LOSSY = Target(size="tiny", prompts=2, pixels=64, allow_lossy=True, quality=True)


class TestDiffusion(RunnerContract):
    unloadable: ClassVar = {"threads": -1}
    one_clock: ClassVar = "an image has no prompt phase: every step is alike"
    unit: ClassVar = "image"

    @pytest.fixture
    def runner(self):
        return diffusion

    @pytest.fixture
    def target(self):
        return TARGET


def default(target=TARGET):
    return diffusion.space(target).default()


def test_a_pass_makes_every_image_and_calls_them_images():
    with diffusion.launch(default(), TARGET) as engine:
        work = engine.run_pass()
    assert isinstance(work, Work)
    assert (work.units, work.unit, len(work.request_seconds)) == (2, "image", 2)
    assert diffusion.unit(TARGET) == "image"


def test_the_batch_changes_on_the_running_pipeline():
    with diffusion.launch(default(), TARGET) as engine:
        assert isinstance(engine, Changeable)
        for batch in (1, 2):
            engine.change({**default(), "batch_size": batch})
            assert engine.run_pass().units == 2
            assert engine.effective["batch_size"] == batch


def test_what_changes_the_image_is_offered_with_consent_only():
    lossy = {p.name for p in diffusion.space(LOSSY).parameters if p.effect == "lossy"}
    assert {"steps", "scheduler", "dtype"} <= lossy
    assert not lossy & {p.name for p in diffusion.space(TARGET).parameters if p.size > 1}


def test_quality_is_the_likeness_to_the_defaults_images(tmp_path):
    reference = tmp_path / "reference"
    with diffusion.launch(default(LOSSY), LOSSY) as engine:
        assert isinstance(engine, Judged)
        engine.run_pass()
        first = engine.quality(reference)
    assert first["quality_loss"] == pytest.approx(0, abs=1e-6)
    assert reference.exists()
    with diffusion.launch({**default(LOSSY), "steps": 1}, LOSSY) as engine:
        engine.run_pass()
        worse = engine.quality(reference)
    assert worse["quality_loss"] == pytest.approx(1 - worse["ssim"])
    assert worse["quality_loss"] > 0.01
    assert worse["psnr_db"] < 50


def test_fewer_steps_use_less_time():
    def seconds(steps):
        with diffusion.launch({**default(LOSSY), "steps": steps}, LOSSY) as engine:
            return sum(engine.run_pass().request_seconds)

    assert seconds(1) < seconds(default(LOSSY)["steps"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": "huge"}, "--size huge: expected one of"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"model": str(ROOT / "docs")}, "model_index.json"),
        ({"size": "tiny", "pixels": 63}, "--pixels 63"),
    ],
)
def test_a_pipeline_that_cannot_be_had_is_one_sentence(changes, words):
    with pytest.raises(Refused) as refused:
        diffusion.space(Target(**changes))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_script_for_good_compiles():
    compile(diffusion.service(default(), TARGET).python, "images.py", "exec")
    compile(shlex.split(diffusion.command(default(), TARGET))[2], "command", "exec")


HUGE = Target(size="14m", prompts=8, pixels=16384)


def test_images_whose_activations_do_not_fit_are_answered_without_a_launch(monkeypatch):
    monkeypatch.setattr(diffusion, "memory_bytes", lambda: 64 * 10**9)
    space = diffusion.space(HUGE)
    with pytest.raises(Refused, match=r"at 16384 pixels at least 206\.2 GB in float32"):
        space.check(space.default())


@pytest.mark.parametrize(
    ("changes", "fits"),
    [({}, True), ({"batch_size": 8}, False), ({"batch_size": 8, "vae_slicing": True}, True)],
)
def test_a_batch_that_does_not_fit_is_answered_without_a_launch(monkeypatch, changes, fits):
    # 58 MB of weights; decoding one image takes 201 MB at least, denoising eight of them 386 MB.
    monkeypatch.setattr(diffusion, "memory_bytes", lambda: 600 * 10**6)
    space = diffusion.space(Target(size="14m", prompts=8, pixels=512))
    assert (space.broken({**space.default(), **changes}) == []) is fits


def test_attention_slicing_is_refused_where_its_scores_do_not_fit(monkeypatch):
    monkeypatch.setattr(diffusion, "memory_bytes", lambda: 16 * 10**9)
    space = diffusion.space(Target(size="14m", prompts=1, pixels=2048))
    assert space.broken(space.default()) == []
    with pytest.raises(Refused, match=r"68\.7 GB with attention_slicing"):
        space.complete({"attention_slicing": True})


def test_half_precision_and_no_guidance_halve_what_is_needed(monkeypatch):
    target = Target(size="14m", prompts=8, pixels=512, allow_lossy=True)
    known = diffusion._pipeline(target)

    def need(**changes):
        width = 2 if changes.get("dtype") == "bfloat16" else 4
        return diffusion._working_bytes(known, target, {"batch_size": 8, "vae_slicing": True, **changes}, width)

    assert need(dtype="bfloat16") == need() / 2
    assert need(guidance=False) == max(need() / 2, 201_326_592)
