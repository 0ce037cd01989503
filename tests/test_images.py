"""What a pipeline's shapes say of the memory that it works in: by hand, and against the networks themselves."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.models.images import Shapes, Transformer, Unet, Vae

ROOT = Path(__file__).parents[1]

SD1_UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
}
SD1_VAE = {"block_out_channels": [128, 256, 512, 512]}


def test_a_decoder_works_at_the_full_side_with_the_channels_of_the_level_below():
    # Input, normalised and activated: three times 256 channels of 512 x 512 numbers.
    assert Shapes(vae=Vae.of(SD1_VAE)).decoding(512, 1) == 3 * 256 * 512**2


def test_tiles_need_one_tiles_memory_and_that_of_what_is_done():
    decoding = Shapes(vae=Vae.of(SD1_VAE)).decoding
    assert decoding(2048, 1, tile=512) == 3 * 256 * 512**2 + 3 * 2048**2
    assert decoding(256, 1, tile=512) == 3 * 256 * 256**2 + 3 * 256**2


def test_a_denoiser_holds_what_waits_for_the_way_up_and_its_widest_layer():
    # Level 0 of Stable Diffusion 1 at 64 x 64 cells: 2 + 1 skips of 320 channels, 640 channels that the caller holds,
    # and the gated feed-forward's 19 x 320.
    assert Unet.of(SD1_UNET).numbers(64, compiled=False) == (3 * 320 + 640 + 19 * 320) * 64**2


def test_a_level_without_attention_is_as_wide_as_its_residual_block():
    plain = {**SD1_UNET, "block_out_channels": [320, 640], "down_block_types": ["DownBlock2D", "DownBlock2D"]}
    # What is joined, normalised and activated: three times 320 + 640 channels.
    assert Unet.of(plain).numbers(64, compiled=False) == (3 * 320 + 640 + 3 * 960) * 64**2


def test_sliced_attention_stores_the_scores_of_half_the_heads():
    shapes = Shapes(unet=Unet.of(SD1_UNET), vae=Vae.of(SD1_VAE))
    # 4 of 8 heads, 4096 x 4096 scores and their softmax, whatever the batch.
    assert shapes.denoising(512, 2, sliced=True) == 2 * 4 * 4096**2


def test_fused_attention_stores_no_scores_so_memory_grows_with_the_area():
    shapes = Shapes(unet=Unet.of(SD1_UNET), vae=Vae.of(SD1_VAE))
    assert shapes.denoising(1024, 2) == 4 * shapes.denoising(512, 2)


def test_a_compiled_denoiser_is_certain_of_its_widest_layer_alone():
    # The gated feed-forward's projection and product.
    assert Unet.of(SD1_UNET).numbers(64, compiled=True) == 12 * 320 * 64**2
    assert Transformer(512).numbers(64, compiled=True) == 4 * 512 * 32**2


def test_images_evaluated_together_add_up():
    shapes = Shapes(unet=Unet.of(SD1_UNET), vae=Vae.of(SD1_VAE))
    assert shapes.denoising(512, 6) == 3 * shapes.denoising(512, 2)
    assert shapes.decoding(512, 3) == 3 * shapes.decoding(512, 1)


def test_a_transformers_token_is_two_by_two_cells():
    shapes = Shapes(transformer=Transformer.of({"num_attention_heads": 24, "attention_head_dim": 64}))
    assert shapes.denoising(1024, 1) == 10 * 24 * 64 * 64**2


@pytest.mark.parametrize("config", [{}, {"block_out_channels": "many"}, {"block_out_channels": [1.5]}])
def test_files_that_do_not_say_enough_count_nothing(config):
    assert (Unet.of(config), Vae.of(config), Transformer.of(config)) == (None, None, None)
    assert (Shapes().denoising(512, 2), Shapes().decoding(512, 1)) == (0, 0)


MEASURE = """
import gc, json, sys
import torch
from pathlib import Path
from tuner.files import load_runner

diffusion = load_runner(Path(sys.argv[1]))
torch.set_grad_enabled(False)
pipe = diffusion.generated("14m", 0)

def bytes_of(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

def peak(work, cells):
    work(8)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = bytes_of("VmRSS")
    work(cells)
    return bytes_of("VmHWM") - before

def denoise(cells):
    text = torch.randn(2, 77, pipe.unet.config.cross_attention_dim)
    pipe.unet(torch.randn(2, 4, cells, cells), torch.tensor(1), encoder_hidden_states=text)

found = {"denoising": peak(denoise, 96), "decoding": peak(lambda n: pipe.vae.decode(torch.randn(1, 4, n, n)), 96)}
pipe.enable_attention_slicing()
found["sliced"] = peak(denoise, 64)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def measured():
    """Peaks of resident memory, in bytes, of the generated pipeline's networks."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "diffusers", "transformers")):
        pytest.skip("diffusers is not installed")
    words = [sys.executable, "-c", MEASURE, str(ROOT / "runners" / "diffusion.py")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    if "clear_refs" in done.stderr:
        pytest.skip("this system does not reset a process's peak")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("network", ["denoising", "decoding", "sliced"])
def test_what_is_counted_is_a_lower_bound_near_what_the_networks_take(measured, network):
    shapes = Shapes(
        unet=Unet(channels=(64, 128, 256), layers=(1, 1, 1), heads=(4, 4, 0)), vae=Vae(channels=(32, 64, 64, 64))
    )
    counted = {
        "denoising": shapes.denoising(768, 2),
        "decoding": shapes.decoding(768, 1),
        "sliced": shapes.denoising(512, 2, sliced=True),
    }[network]
    assert 4 * counted <= measured[network] <= 2.5 * 4 * counted
