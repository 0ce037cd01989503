"""The diffusion runner: the contract on a real pipeline, energy per image, and what is particular to it."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
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


# --- a pipeline that somebody brings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline, whose decoder can tile from 40 pixels on."""
    path = tmp_path_factory.mktemp("pipelines") / "saved"
    pipe = diffusion.generated("tiny", 0)
    pipe.vae.register_to_config(sample_size=32)
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """One that may be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def of(model, *more, **changes):
    return Target(model=str(model), prompts=2, pixels=64, engine_args=("steps=2", *more), **changes)


def test_a_saved_pipeline_makes_the_images_that_were_asked_for(folder):
    with diffusion.launch(default(of(folder)), of(folder)) as engine:
        assert engine.run_pass().units == 2


def test_the_weights_of_a_saved_pipeline_are_counted_from_its_files(folder):
    assert diffusion._pipeline(of(folder)).weights == diffusion.SIZES["tiny"].weights


def test_other_weights_are_another_pipeline(folder, copy):
    same = diffusion.identity(of(copy))["model_sha256"]
    assert same == diffusion.identity(of(folder))["model_sha256"]
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert diffusion.identity(of(copy))["model_sha256"] != same


def test_a_hub_id_is_taken_from_the_librarys_own_cache(folder, hub):
    hub(folder)
    assert diffusion._pipeline(of("me/small")).weights == diffusion.SIZES["tiny"].weights


def test_a_hub_id_that_is_not_on_this_machine_is_one_sentence_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Refused, match=r"--model me/small: no such folder, .*fetch it first: hf download me/small$"):
        diffusion.space(of("me/small"))


def test_weights_of_a_variant_are_loaded_where_it_is_named(folder, tmp_path):
    diffusion.generated("tiny", 0).save_pretrained(tmp_path, variant="fp16")
    target = of(tmp_path, "variant=fp16")
    with diffusion.launch(default(target), target) as engine:
        assert engine.run_pass().units == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), r"weights in unet/.* missing in .*--engine-arg variant=NAME$"),
        (("variant=bf16",), "of variant bf16 missing"),
    ],
)
def test_weights_of_a_variant_that_is_not_named_are_missing(tmp_path, given, words):
    diffusion.generated("tiny", 0).save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(Refused, match=words):
        diffusion.space(of(tmp_path, *given))


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
@pytest.mark.parametrize(
    "damage", [lambda b: b[:-100], lambda b: b"damaged", lambda b: b""], ids=["cut", "text", "empty"]
)
def test_damaged_weights_are_refused_before_a_launch_by_their_file(copy, part, damage):
    weights = copy / f"{part}.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(Refused, match=rf"{part}\.safetensors is damaged or no safetensors file .*; fetch it anew"):
        diffusion.space(of(copy))


def test_weights_that_the_library_cannot_read_are_one_sentence(copy):
    weights = copy / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"F99"', 1))
    with (
        pytest.raises(RuntimeError, match="diffusers cannot load this pipeline: ") as raised,
        diffusion.launch(default(of(copy)), of(copy)),
    ):
        pytest.fail("an engine was yielded")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "StableVideoDiffusionPipeline"}, 'a "StableVideoDiffusionPipeline" is not known here'),
        ({"vae": None}, "vae missing in"),
    ],
)
def test_a_pipeline_of_another_kind_is_one_sentence(copy, change, words):
    index = copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(Refused, match=words):
        diffusion.space(of(copy))


def test_a_file_instead_of_a_folder_is_one_sentence_with_the_way_to_convert_it(folder):
    with pytest.raises(Refused, match=r"expected a folder with model_index\.json, got a file; .*from_single_file"):
        diffusion.space(of(folder / "unet" / "diffusion_pytorch_model.safetensors"))


# --- what was asked for


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"steps": 3},
        {"scheduler": "heun"},
        {"scheduler": "dpmsolver++"},
        {"guidance": False},
        {"vae_tiling": True},
        {"vae_slicing": True},
        {"attention_slicing": True},
        {"channels_last": True},
        {"threads": 1},
        {"batch_size": 2},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_was_asked_for_is_what_the_loaded_pipeline_says(folder, changes):
    target = of(folder, allow_lossy=True)
    space = diffusion.space(target)
    if not changes.keys() <= {*space.names}:
        pytest.skip(f"{changes} is not offered on this machine")
    config = space.complete(changes)
    with diffusion.launch(config, target) as engine:
        said = engine.effective
        assert {name: said[name] for name in config} == config


def test_what_changes_while_it_runs_can_be_taken_back(folder):
    target = of(folder, allow_lossy=True)
    usual = default(target)
    live = {"scheduler": "euler", "guidance": False, "vae_tiling": True, "vae_slicing": True, "attention_slicing": True}
    with diffusion.launch(diffusion.space(target).complete(live), target) as engine:
        engine.change(usual)
        said = engine.effective
        assert {name: said[name] for name in usual} == usual


@pytest.mark.parametrize("raised", ["OutOfMemoryError", "RuntimeError", "MemoryError"])
def test_lack_of_memory_is_named(folder, monkeypatch, raised):
    import torch

    errors = {
        "OutOfMemoryError": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee"),
        "RuntimeError": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        "MemoryError": MemoryError(),
    }

    def full(*_, **__):
        raise errors[raised]

    with diffusion.launch(default(of(folder)), of(folder)) as engine:
        monkeypatch.setattr(engine._pipe.unet, "forward", full)
        with pytest.raises(RuntimeError, match=r"^out of memory: .+") as told:
            engine.run_pass()
    assert "\n" not in str(told.value)


def test_what_is_no_lack_of_memory_is_not_called_so(folder, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not match")

    with diffusion.launch(default(of(folder)), of(folder)) as engine:
        monkeypatch.setattr(engine._pipe.unet, "forward", broken)
        with pytest.raises(RuntimeError, match=r"^diffusers failed in a pass: shapes do not match$"):
            engine.run_pass()


# --- what is said of a GPU, without one


@pytest.fixture
def on_gpu(monkeypatch):
    """What is said of a machine with a GPU; nothing can be loaded on it."""
    gpu = diffusion._Gpu("a GPU", 24 * 10**9, bfloat16=True)
    monkeypatch.setattr(diffusion, "_machine", lambda: diffusion._Machine(threads=8, gpu=gpu))
    return diffusion


def test_on_a_gpu_threads_are_not_tuned(on_gpu):
    assert "threads" not in on_gpu.space(TARGET).names


def test_on_a_gpu_half_precision_is_offered_and_refused_on_the_cpu_beside_it(on_gpu):
    space = on_gpu.space(LOSSY)
    assert space.complete({"dtype": "float16"})["device"] == "cuda"
    with pytest.raises(Refused, match="dtype=float16 needs device=cuda"):
        space.complete({"dtype": "float16", "device": "cpu"})


# --- the same without tuner


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "bfloat16"}, "dtype=torch.bfloat16"),
        ({"steps": 3}, "num_inference_steps=3"),
        ({"scheduler": "heun"}, "pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)"),
        ({"guidance": False}, "guidance_scale=1.0"),
        ({"vae_tiling": True}, "pipe.vae.enable_tiling()"),
        ({"vae_slicing": True}, "pipe.vae.enable_slicing()"),
        ({"attention_slicing": True}, "pipe.enable_attention_slicing()"),
        ({"channels_last": True}, "pipe.vae.to(memory_format=torch.channels_last)"),
        ({"compile": True}, "pipe.unet.compile()"),
        ({"device": "cuda"}, "pipe.to('cuda')"),
    ],
    ids=str,
)
def test_the_program_says_what_the_configuration_says(on_gpu, folder, monkeypatch, changes, said):
    monkeypatch.setattr(on_gpu, "_can_compile", lambda *, gpu: True)
    target = of(folder, allow_lossy=True)
    service = on_gpu.service(on_gpu.space(target).complete(changes), target)
    assert said in service.python
    assert said in service.argv[2]
    compile(service.python, "script", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["command", "python"])
@pytest.mark.parametrize("model", ["saved", "generated"])
def test_what_is_printed_makes_an_image_for_each_line_and_keeps_those_that_are_there(folder, tmp_path, form, model):
    target = of(folder) if model == "saved" else TARGET
    config = diffusion.space(target).complete({"batch_size": 2})
    words = ["-c", diffusion.service(config, target).python]
    if form == "command":
        _, *words = shlex.split(diffusion.command(config, target))
    (tmp_path / "image000000.png").write_bytes(b"an earlier one")
    done = subprocess.run(
        [sys.executable, *words],
        input="a red house\n\na blue lamp\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert {p.name: p.read_bytes()[:4] for p in tmp_path.iterdir()} == {
        "image000000.png": b"an e",
        "image000001.png": b"\x89PNG",
        "image000002.png": b"\x89PNG",
    }
