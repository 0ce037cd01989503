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
