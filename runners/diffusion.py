"""diffusers: a text-to-image pipeline inside the trial's process; energy is divided by images.

One pass makes `Target.prompts` images of `Target.pixels` x `Target.pixels`. Each image has a prompt and a seed of its
own, and its noise is drawn on the CPU from that seed: it begins as the same noise in every trial, whatever the batch
and the device. A pass that brings other images than were asked for, or images that are not numbers, is an error and
never a measurement.

Without a model the runner builds one in memory: a pipeline in Stable Diffusion's shape, with random weights. It costs
what a trained pipeline of that shape costs, and its images are noise.

Everything that loads torch stays out of the tuner's own process: `space` reads the pipeline's files itself, and asks
torch for its devices and defaults in a short-lived child.

Glossary
    denoiser    the network that runs at every step: a U-Net or a transformer
    guidance    classifier-free guidance: a second evaluation of each step, without the prompt, that strengthens it
    VAE         the network that turns what the last step leaves, the latents, into the image
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import re
import shlex
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.installed import library, memory_bytes, passing_files, torch_threads
from tuner.models.images import Shapes, Transformer, Unet, Vae
from tuner.space import Choice, Config, Constraint, Int, Parameter, Refused, SearchSpace, Value, closest, excerpt
from tuner.trial import Service, Target, Unit, Work, python_forms, refuse_unused

INSTALL = "pip install diffusers transformers torch scikit-image"

_library = functools.partial(library, workload="diffusion", install=INSTALL)


def unit(target: Target) -> Unit:
    """What energy is divided by."""
    return "image"


# --- pipelines -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What all pipelines of one class have in common: the defaults of its `__call__`, and what it can do."""

    denoiser: str
    """The name of its component that runs at every step."""
    steps: int
    guidance: float
    guided: bool = True
    """Whether a scale of 1 leaves the second evaluation out; where guidance was distilled into it there is none."""
    multiple: int = 8
    """Width and height must be multiples of it."""
    more: Mapping[str, Value] = field(default_factory=dict)
    """Further arguments of each call, so that it makes the size that it was asked for."""


_PIXART = {"use_resolution_binning": False, "clean_caption": False}

FAMILIES: Mapping[str, Family] = {
    # Defaults of `__call__` in diffusers 0.42.
    "StableDiffusionPipeline": Family("unet", steps=50, guidance=7.5),
    "StableDiffusionXLPipeline": Family("unet", steps=50, guidance=5.0),
    "StableDiffusion3Pipeline": Family("transformer", steps=28, guidance=7.0, multiple=16),
    "FluxPipeline": Family("transformer", steps=28, guidance=3.5, guided=False, multiple=16),
    "PixArtAlphaPipeline": Family("transformer", steps=20, guidance=4.5, more=_PIXART),
    "PixArtSigmaPipeline": Family("transformer", steps=20, guidance=4.5, more=_PIXART),
}
"""The classes that `--model` may be of."""

SCHEDULERS: Mapping[str, str] = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""They read each other's configuration (`_compatibles` in diffusers). Those that match flows are another kind, whose
pipelines hand over arguments that only their own scheduler takes: there none is offered."""

DTYPES = ("float32", "bfloat16", "float16")
BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED: Mapping[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Names of safetensors for them."""


@dataclass(frozen=True)
class Shape:
    """The shape of a generated pipeline."""

    label: str
    unet: tuple[int, ...]
    """Channels of the U-Net's levels; all but the last attend to the prompt."""
    unet_heads: int
    vae: tuple[int, ...]
    """Channels of the VAE's levels; each but the first halves the side, as in Stable Diffusion."""
    text_width: int
    text_layers: int
    text_heads: int
    groups: int
    """Groups of the normalisation: they divide every number of channels."""
    steps: int
    weights: int
    """Numbers in all of its networks."""


SIZES: Mapping[str, Shape] = {
    "14m": Shape("14M", (64, 128, 256), 4, (32, 64, 64, 64), 128, 2, 4, groups=32, steps=8, weights=14_422_731),
    "tiny": Shape("tiny", (16, 32), 2, (8, 8, 16, 16), 32, 1, 2, groups=8, steps=2, weights=318_435),
}
"""The pipelines that `--size` can name. Their steps are few: the images mean nothing, and each step costs the same."""

DEFAULT_SIZE = "14m"
GENERATED = "StableDiffusionPipeline"
PROMPT_LIMIT = 77
"""Tokens that a CLIP text encoder reads; shorter prompts are filled up to it."""


@dataclass(frozen=True)
class Pipeline:
    """What is known of a pipeline before it is loaded."""

    cls: str
    folder: Path | None
    """None for a generated one."""
    name: str
    family: Family
    steps: int
    guidance: float
    scheduler: str | None
    """The name in `SCHEDULERS` of its own; None where it may not be exchanged."""
    tile_pixels: int | None
    """Side of an image from which on tiling the VAE does something; None where it cannot."""
    weights: int | None
    """Numbers in the networks that are loaded; None where the files do not say."""
    stored: str
    """The type in which the denoiser's weights are kept."""
    variant: str | None = None
    shapes: Shapes = field(default_factory=Shapes)
    """Of the networks that memory is worked in."""


def _pipeline(target: Target) -> Pipeline:
    """The pipeline that `target` names.

    Raises:
        Refused: there is none, it is of a class that this runner does not know, or an option is wrong.
    """
    options = _options(target)
    if target.model is None:
        shape = _shape(target)
        if "variant" in options:
            raise Refused("--engine-arg variant: a generated pipeline has one variant; leave it out")
        return Pipeline(
            cls=GENERATED,
            folder=None,
            name=f"generated Stable Diffusion {shape.label}, seed {target.seed}",
            family=FAMILIES[GENERATED],
            steps=int(options.get("steps", shape.steps)),
            guidance=float(options.get("guidance_scale", FAMILIES[GENERATED].guidance)),
            scheduler="pndm",
            tile_pixels=None,
            weights=shape.weights,
            stored="float32",
            shapes=Shapes(
                unet=Unet(
                    channels=shape.unet,
                    layers=(1,) * len(shape.unet),
                    heads=(*(shape.unet_heads,) * (len(shape.unet) - 1), 0),
                ),
                vae=Vae(shape.vae),
            ),
        )
    if target.size is not None:
        raise Refused(f"--size {target.size} makes a model and --model {target.model} names one: leave one of them out")
    folder = _folder(target.model)
    return _read(folder, target.model, options)


def _shape(target: Target) -> Shape:
    size = target.size or DEFAULT_SIZE
    if size not in SIZES:
        raise Refused(f"--size {size}: expected one of {', '.join(SIZES)}")
    return SIZES[size]


def _options(target: Target) -> dict[str, str]:
    """`steps=4`, `guidance_scale=0.0` and `variant=fp16`: what a model wants and its files do not say."""
    checks = {"steps": r"[1-9]\d{0,3}", "guidance_scale": r"\d{1,3}(\.\d+)?", "variant": r"\w{1,20}"}
    found: dict[str, str] = {}
    for argument in target.engine_args:
        name, _, text = argument.partition("=")
        if name not in checks or not re.fullmatch(checks[name], text, re.ASCII):
            raise Refused(
                f"--engine-arg {excerpt(argument)}: expected steps=NUMBER, guidance_scale=NUMBER or variant=NAME"
                f"{closest(name, tuple(checks))}"
            )
        found[name] = text
    return found


def _folder(name: str) -> Path:
    """The folder of a pipeline that lies on this machine. Nothing is downloaded: a trial is no place for that."""
    path = Path(name).expanduser()
    if path.is_file():
        raise Refused(
            f"--model {name}: expected a folder with model_index.json, got a file; diffusers converts a single-file"
            " checkpoint: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if path.is_dir():
        return path.absolute()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise Refused(f"--model {name}: no such folder; leave --model out to tune with a generated pipeline")
    hub = _library("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise Refused(
            f"--model {name}: no such folder, and the model is not on this machine; fetch it first: hf download {name}"
        ) from error


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        cause = "no JSON object"
    except OSError as error:
        cause = error.strerror or str(error)
    except ValueError:
        cause = "no JSON"
    raise Refused(
        f"--model {name}: {path.name} of a diffusers pipeline cannot be read ({cause}); expected a folder that"
        " save_pretrained or `hf download` wrote"
    )


def _read(folder: Path, name: str, options: Mapping[str, str]) -> Pipeline:
    index = _json(folder / "model_index.json", name)
    cls = index.get("_class_name")
    family = FAMILIES.get(cls) if isinstance(cls, str) else None
    if not isinstance(cls, str) or family is None:
        raise Refused(f"--model {name}: a {excerpt(cls)} is not known here; expected one of {', '.join(FAMILIES)}")
    kinds = {part: kind for part, kind in index.items() if isinstance(kind, list) and len(kind) == 2 and kind[1]}
    missing = [part for part in (family.denoiser, "vae", "scheduler") if part not in kinds]
    variant = options.get("variant")
    networks = [part for part in kinds if part in (family.denoiser, "vae") or part.startswith("text_encoder")]
    files = {part: _weight_files(folder / part, variant) for part in networks}
    missing += [f"the weights in {part}/" for part in networks if not files[part]]
    if missing:
        kept = f" of variant {variant}" if variant else ""
        hint = "" if variant else "; files that have a variant in their names need --engine-arg variant=NAME"
        raise Refused(f"--model {name}: {', '.join(missing)}{kept} missing in {folder}{hint}")
    tensors = [_tensors(path) for part in networks for path in files[part]]
    known = [t for t in tensors if t is not None]
    of_denoiser = [t for path in files[family.denoiser] if (t := _tensors(path)) is not None]
    own = str(kinds["scheduler"][1])
    vae = _json(folder / "vae" / "config.json", name)
    side = vae.get("sample_size")
    shape = folder / family.denoiser / "config.json"
    denoiser = _json(shape, name) if shape.exists() else {}
    unet = family.denoiser == "unet"
    return Pipeline(
        cls=cls,
        folder=folder,
        name=name,
        family=family,
        steps=int(options.get("steps", family.steps)),
        guidance=float(options.get("guidance_scale", family.guidance)),
        scheduler=next((short for short, long in SCHEDULERS.items() if long == own), None),
        tile_pixels=side if isinstance(side, int) and kinds["vae"][1] == "AutoencoderKL" else None,
        weights=sum(count for count, _ in known) if len(known) == len(tensors) else None,
        stored=of_denoiser[0][1] if of_denoiser else "float32",
        variant=variant,
        shapes=Shapes(
            unet=Unet.of(denoiser) if unet else None,
            transformer=None if unet else Transformer.of(denoiser),
            vae=Vae.of(vae),
        ),
    )


_WEIGHTS = re.compile(
    r"(?:model|diffusion_pytorch_model|pytorch_model)"
    r"(?P<before>\.\w+)??(?:-\d{5}-of-\d{5})?(?P<after>\.\w+)??\.(?P<kind>safetensors|bin)"
)


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files that `from_pretrained` would load: safetensors before pickles, one variant, in all its shards."""
    wanted = f".{variant}" if variant else None
    found: dict[str, list[Path]] = {"safetensors": [], "bin": []}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _WEIGHTS.fullmatch(path.name)
        if match and (match["before"] or match["after"]) == wanted and path.exists():
            found[match["kind"]].append(path)
    return found["safetensors"] or found["bin"]


def _tensors(path: Path) -> tuple[int, str] | None:
    """How many numbers a safetensors file holds, and the type of most of them; None for another file.

    Its header: eight bytes of length, then JSON. https://github.com/huggingface/safetensors#format
    """
    if path.suffix != ".safetensors":
        return None
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
        counts: dict[str, int] = {}
        end = 0
        for tensor in (t for name, t in header.items() if name != "__metadata__"):
            counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
            end = max(end, tensor["data_offsets"][1])
        if (size := path.stat().st_size) != (whole := 8 + length + end):
            raise ValueError(f"{size} bytes instead of {whole}")
        return sum(counts.values()), _STORED.get(max(counts, key=lambda d: counts[d]), "float32")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise Refused(f"--model: {path} is damaged or no safetensors file ({error}); fetch it anew") from error


def describe(target: Target) -> str:
    """One line that says what is being run, shown before a study starts."""
    known = _pipeline(target)
    size = "" if known.weights is None else f", {_gb(known.weights * BYTES[known.stored])} in {known.stored}"
    if known.folder is not None:
        return f"model: {known.name} ({known.cls}{size})"
    label = _shape(target).label
    return (
        f"model: generated Stable Diffusion pipeline {label} with random weights ({size.removeprefix(', ')}): speed"
        f" and energy are those of a trained pipeline of this shape, its images are noise"
    )


def _gb(size: float) -> str:
    if size >= 1e12:
        return f"{size / 1e12:.1f} TB"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{math.ceil(size / 1e6)} MB"


def identity(target: Target) -> dict[str, str]:
    """Engine, versions and model: what must agree before results may meet."""
    known = _pipeline(target)
    hashed = {} if known.folder is None else {"model_sha256": _fingerprint(known.folder)}
    return {
        "engine": "diffusers",
        "engine_version": _versions()["diffusers"],
        "torch_version": _versions()["torch"],
        "transformers_version": _versions()["transformers"],
        "model": known.name if target.model is None else Path(known.name).name,
        **hashed,
        "device": "gpu" if _machine().gpu else "cpu",
    }


WHOLE_HASH_BYTES = 64 * 2**20
"""Up to here a file is hashed whole; of a larger one its size, first and last MiB are."""


def _fingerprint(folder: Path) -> str:
    """The SHA-256 of all configurations and weights; another checkpoint or precision differs in their ends too."""
    paths = sorted(p for p in folder.glob("**/*") if p.suffix in (".json", ".txt", ".safetensors", ".bin"))
    stats = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.is_file())
    return _fingerprint_of(folder, stats)


@functools.lru_cache(maxsize=8)
def _fingerprint_of(folder: Path, stats: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, size, _ in stats:
        path = Path(name)
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            if size <= WHOLE_HASH_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(2**20))
                file.seek(-(2**20), os.SEEK_END)
                digest.update(file.read(2**20))
    return f"ends:{digest.hexdigest()}"


# --- the machine, asked from outside ---------------------------------------------------------


@functools.cache
def _versions() -> dict[str, str]:
    try:
        return {name: importlib.metadata.version(name) for name in ("diffusers", "transformers", "torch")}
    except importlib.metadata.PackageNotFoundError as error:
        raise Refused(f"the diffusion workload needs the package {error.name}; install it with: {INSTALL}") from error


@dataclass(frozen=True)
class _Gpu:
    name: str
    bytes: int
    bfloat16: bool


@dataclass(frozen=True)
class _Machine:
    """What torch says about itself on this machine."""

    threads: int
    """The thread count it chooses by itself."""
    gpu: _Gpu | None
    """The first one that it can compute on."""


_PROBE = """
import json, torch
gpu = None
if torch.cuda.is_available():
    about = torch.cuda.get_device_properties(0)
    gpu = {"name": about.name, "bytes": about.total_memory, "bfloat16": torch.cuda.is_bf16_supported()}
print(json.dumps({"threads": torch.get_num_threads(), "gpu": gpu}))
"""


@functools.cache
def _machine() -> _Machine:
    """Ask torch in a child process: there, a GPU context ends with it and a crash is a sentence."""
    _versions()
    words = [sys.executable, "-c", _PROBE]
    with passing_files() as environment:
        child = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
    try:
        said = json.loads(child.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise Refused(
            f"torch does not run on this machine ({last}); try: pip install --force-reinstall torch"
        ) from None
    return _Machine(threads=said["threads"], gpu=_Gpu(**said["gpu"]) if said["gpu"] else None)


def _can_compile(*, gpu: bool) -> bool:
    """Whether `torch.compile` finds what it needs: a C++ compiler, and Triton for a GPU."""
    names = (os.environ.get("CXX") or "g++", "g++", "clang++")
    return any(map(shutil.which, names)) and (not gpu or importlib.util.find_spec("triton") is not None)


# --- what may be tuned -----------------------------------------------------------------------

MOST_TOGETHER = 64
"""Images in one batch."""


def space(target: Target) -> SearchSpace:
    """What may be tuned of this pipeline on this machine, most influential first.

    Left out on purpose: offloading weights to the CPU (it costs energy, and only saves memory) and step caches
    (their settings belong to one checkpoint each).

    Raises:
        Refused: the pipeline cannot be used, the load does not fit it, or a package is missing.
    """
    refuse_unused(target, "diffusion")
    known = _pipeline(target)
    _check_load(target, known)
    machine = _machine()
    gpu = machine.gpu
    unet = known.family.denoiser == "unet"
    parameters: list[Parameter] = [
        Int(
            name="batch_size",
            meaning="images made together: each step reads all weights once for all of them, so more images share that"
            " cost, until computing rather than reading becomes the limit; memory grows with it",
            default=1,
            low=1,
            high=min(MOST_TOGETHER, target.prompts),
            scope="request",
        )
    ]
    if gpu is not None:
        parameters.append(
            Choice(
                name="device",
                meaning=f"where the networks are computed: cuda is {gpu.name}",
                default="cuda",
                values=("cpu", "cuda"),
                effect="numerics",
                lever="offload",
            )
        )
    if target.allow_lossy:
        parameters += _lossy(known, target, gpu)
    if _can_compile(gpu=gpu is not None):
        parameters.append(
            Choice(
                name="compile",
                meaning="compile the denoiser into fused kernels with torch.compile: fewer passes over memory at every"
                " step, after minutes of compiling that no window holds",
                default=False,
                values=(False, True),
                effect="numerics",
            )
        )
    if gpu is None:
        parameters.append(
            torch_threads(
                machine.threads,
                "CPU threads of torch: more finish sooner, and each one draws power whether it computes or"
                " waits for memory",
            )
        )
    if unet:
        parameters += [
            _switch(
                "channels_last",
                "keep images in the order that convolution kernels read fastest, the channels of a pixel together",
                scope_launch=True,
            ),
            _switch(
                "attention_slicing",
                "compute attention a few heads at a time and store their scores, where the fused kernel stores none:"
                " more memory at large sizes, and usually more time",
            ),
        ]
    if target.prompts > 1:
        parameters.append(
            _switch(
                "vae_slicing",
                "turn the latents of a batch into images one at a time instead of together: less memory, and smaller"
                " pieces may stay in the cache; no effect with one image a batch",
            )
        )
    return SearchSpace(tuple(parameters), _constraints(known, target, gpu))


def _switch(name: str, meaning: str, *, scope_launch: bool = False) -> Choice:
    scope: Any = "launch" if scope_launch else "live"
    return Choice(name=name, meaning=meaning, default=False, values=(False, True), scope=scope, effect="numerics")


def _lossy(known: Pipeline, target: Target, gpu: _Gpu | None) -> list[Parameter]:
    found: list[Parameter] = [
        Int(
            name="steps",
            meaning="denoising steps: each costs the same energy, and fewer of them leave an image less finished",
            default=known.steps,
            low=1,
            high=2 * known.steps,
            scope="request",
            effect="lossy",
        )
    ]
    if known.family.guided and known.guidance > 1:
        found.append(
            Choice(
                name="guidance",
                meaning=f"classifier-free guidance at the scale {known.guidance:g}: off, each step is evaluated once"
                " instead of twice, and the image follows its prompt less",
                default=True,
                values=(False, True),
                scope="request",
                effect="lossy",
            )
        )
    if known.scheduler is not None:
        found.append(
            Choice(
                name="scheduler",
                meaning="how a step goes from one noise level to the next: some need fewer steps for the same quality,"
                " heun evaluates the denoiser twice a step",
                default=known.scheduler,
                values=tuple(SCHEDULERS),
                scope="request",
                effect="lossy",
            )
        )
    found.append(
        Choice(
            name="dtype",
            meaning="type of weights and activations: two bytes instead of four halve what is read from memory, and"
            " save energy where the hardware computes in them; elsewhere they cost conversions",
            default=_default_dtype(known, gpu),
            values=_dtypes(gpu),
            effect="lossy",
        )
    )
    if known.tile_pixels is not None and target.pixels > known.tile_pixels:
        found.append(
            Choice(
                name="vae_tiling",
                meaning=f"turn the latents into the image in overlapping tiles of {known.tile_pixels} pixels: less"
                " memory for work done twice where they overlap, and seams may show",
                default=False,
                values=(False, True),
                scope="live",
                effect="lossy",
            )
        )
    return found


def _dtypes(gpu: _Gpu | None) -> tuple[str, ...]:
    return DTYPES if gpu is not None else tuple(d for d in DTYPES if d != "float16")


def _default_dtype(known: Pipeline, gpu: _Gpu | None) -> str:
    """As the weights are stored where a GPU computes in it; single precision on the CPU."""
    if gpu is None or (known.stored == "bfloat16" and not gpu.bfloat16):
        return "float32"
    return known.stored


def _constraints(known: Pipeline, target: Target, gpu: _Gpu | None) -> tuple[Constraint, ...]:
    rules = []
    usual = _default_dtype(known, gpu)

    def on_gpu(config: Mapping[str, Value]) -> bool:
        return config.get("device", "cpu") == "cuda"

    if gpu is not None and target.allow_lossy:
        rules.append(
            Constraint(
                "dtype=float16 needs device=cuda (the CPU has no kernels for it)",
                lambda c: c["dtype"] != "float16" or on_gpu(c),
            )
        )
        if not gpu.bfloat16:
            rules.append(
                Constraint(
                    f"dtype=bfloat16 on device=cuda needs a newer GPU than {gpu.name}",
                    lambda c: c["dtype"] != "bfloat16" or not on_gpu(c),
                )
            )
    memory = {"cpu": memory_bytes(), **({"cuda": gpu.bytes} if gpu else {})}
    weights = known.weights or 0

    def fits(config: Mapping[str, Value]) -> bool:
        width = BYTES[str(config.get("dtype", usual))]
        need = weights * width + _working_bytes(known, target, config, width)
        return need <= memory["cuda" if on_gpu(config) else "cpu"]

    def worked(**changes: Value) -> str:
        return _gb(_working_bytes(known, target, changes, BYTES[usual]))

    sizes = {d: _gb(weights * BYTES[d]) for d in (_dtypes(gpu) if target.allow_lossy else (usual,))}
    have = ", ".join(f"{device} has {_gb(size)}" for device, size in memory.items())
    need = ", ".join(f"{size} in {dtype}" for dtype, size in sizes.items()) if known.weights else "of unknown size"
    slicing = f", {worked(attention_slicing=True)} with attention_slicing" if known.shapes.unet else ""
    tiling = f", {worked(vae_tiling=True)} with vae_tiling" if known.tile_pixels is not None else ""
    rules.append(
        Constraint(
            f"weights ({need}) and activations (for batch_size 1 at {target.pixels} pixels at least {worked()} in "
            f"{usual}{slicing}{tiling}; more images need more) fit into memory ({have})",
            fits,
        )
    )
    return tuple(rules)


def _working_bytes(known: Pipeline, target: Target, config: Mapping[str, Value], width: int) -> float:
    """The least that activations of `config` take: a step's of the denoiser or the decoder's, whichever is more."""
    together = int(config.get("batch_size", 1))
    guided = known.family.guided and known.guidance > 1 and config.get("guidance", True)
    denoising = known.shapes.denoising(
        target.pixels,
        together * (2 if guided else 1),
        sliced=bool(config.get("attention_slicing")),
        compiled=bool(config.get("compile")),
    )
    decoding = known.shapes.decoding(
        target.pixels,
        1 if config.get("vae_slicing") else together,
        tile=known.tile_pixels if config.get("vae_tiling") else None,
    )
    return max(denoising, decoding) * width


def _check_load(target: Target, known: Pipeline) -> None:
    if target.prompts < 1:
        raise Refused(f"--prompts {target.prompts}: expected at least 1 image")
    multiple, least = known.family.multiple, LEAST_PIXELS
    if target.pixels < least or target.pixels % multiple:
        raise Refused(
            f"--pixels {target.pixels}: expected {least} or more and a multiple of {multiple}, which {known.cls} makes"
        )


LEAST_PIXELS = 16
"""The window of the structural similarity is 11 pixels wide."""


def metrics(target: Target) -> tuple[str, ...]:
    """Figures of this runner that limits may be set on, beside those of every engine."""
    return ("ssim", "psnr_db") if target.quality else ()


# --- running it ------------------------------------------------------------------------------

_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, ImportError, MemoryError)
"""What diffusers, transformers and torch raise for what they cannot do."""


def cause_of(error: BaseException, doing: str) -> str:
    """An engine's error in one line: lack of memory, of the CPU or a GPU, by its name, else what it failed at."""
    told = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    told = told if len(told) <= 300 else f"{told[:297]}..."
    lack = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    # DefaultCPUAllocator of torch; CUDA and HIP.
    lack = lack or "can't allocate memory" in told or "out of memory" in told.lower()
    return f"out of memory: {told}" if lack else f"diffusers {doing}: {told}"


@contextmanager
def launch(config: Config, target: Target) -> Iterator[DiffusionEngine]:
    """Load the pipeline, make the images once to warm up, yield; give everything back afterwards.

    Raises:
        Refused: the pipeline cannot be used or a package is missing.
        RuntimeError: it cannot be loaded or run with this configuration.
    """
    known = _pipeline(target)
    _check_load(target, known)
    torch = _library("torch")
    # Everything is on this machine by now; nothing may be asked of another one while energy is measured.
    os.environ["HF_HUB_OFFLINE"] = "1"
    _library("diffusers").utils.logging.disable_progress_bar()
    with _own_compiler(torch, wanted=bool(config.get("compile"))):
        engine = DiffusionEngine(known, target, torch)
        try:
            engine.load(config)
            yield engine
        finally:
            engine.close()


@contextmanager
def _own_compiler(torch: Any, *, wanted: bool) -> Iterator[None]:
    """A compiler that works in this process and in a folder that is gone afterwards: each launch compiles anew."""
    if not wanted:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="tune-compile-") as folder:
        names = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(names)
        # Helper processes would outlive the compiling and stand beside the measurement.
        inductor: Any = importlib.import_module("torch._inductor.config")
        inductor.compile_threads = 1
        try:
            yield
        finally:
            torch._dynamo.reset()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


JUDGED_IMAGES = 16
"""Images whose quality is measured: the first ones of a pass."""

MOST_PSNR_DB = 10 * math.log10(255**2 * 12)
"""Of images that are equal in 8 bits: what rounding leaves unknown has a variance of 1/12, so 58.9 dB."""


class DiffusionEngine:
    """A loaded pipeline and the images that one pass makes."""

    def __init__(self, known: Pipeline, target: Target, torch: Any) -> None:
        self._known = known
        self._target = target
        self._torch = torch
        self._pipe: Any = None
        self._own_scheduler: Any = None
        self._config: Config = {}
        self._threads = torch.get_num_threads()
        self._batches: tuple[int, ...] = ()
        self._images: list[Any] = []
        self._compile_seconds: float | None = None
        self._prompts = prompts(target)

    # --- loading and changing ---

    def load(self, config: Config) -> None:
        """Load the pipeline as `config` says and make the images once."""
        dtype = getattr(self._torch, self._dtype(config))
        try:
            self._pipe = _load(self._known, self._target, dtype)
            self._pipe.to(config.get("device", "cpu"))
            if self._denoiser.dtype != dtype:
                self._pipe.to(dtype)
            self._pipe.set_progress_bar_config(disable=True)
            self._own_scheduler = self._pipe.scheduler
            if config.get("channels_last"):
                for network in (self._denoiser, self._pipe.vae):
                    network.to(memory_format=self._torch.channels_last)
            if config.get("compile"):
                self._denoiser.compile()
        except (*_FAILURES, _library("safetensors").SafetensorError) as error:
            raise RuntimeError(cause_of(error, "cannot load this pipeline")) from error
        self.change(config)

    def change(self, config: Config) -> None:
        """Go on with `config`; parameters that need a restart are taken to be the same.

        Compiled kernels may be compiled anew for it, before the next window.
        """
        pipe = self._pipe
        try:
            if "threads" in config:
                self._torch.set_num_threads(int(config["threads"]))
            name = config.get("scheduler", self._known.scheduler)
            own = self._own_scheduler
            wanted = SCHEDULERS[str(name)] if name is not None else type(own).__name__
            # From its own configuration each time: what one scheduler leaves out, the next would not find.
            kind = getattr(_library("diffusers"), wanted)
            pipe.scheduler = kind.from_config(own.config)
            if "attention_slicing" in config and config["attention_slicing"] != self._sliced():
                pipe.set_attention_slice("auto" if config["attention_slicing"] else None)
            pipe.vae.use_slicing = bool(config.get("vae_slicing", False))
            if self._known.tile_pixels is not None:
                pipe.vae.use_tiling = bool(config.get("vae_tiling", False))
        except _FAILURES as error:
            raise RuntimeError(cause_of(error, "cannot set this configuration")) from error
        self._config = config
        first = self._timed_pass()
        if config.get("compile"):
            # The first pass compiles, the second does not: what lies between them is compiling.
            self._compile_seconds = max(first - self._timed_pass(), 0.0)

    def _timed_pass(self) -> float:
        started = time.perf_counter()
        self.run_pass()
        return time.perf_counter() - started

    def _dtype(self, config: Config) -> str:
        usual = _default_dtype(self._known, _machine().gpu)
        if config.get("device", "cpu") == "cpu" and usual == "float16":
            usual = "float32"
        return str(config.get("dtype", usual))

    @property
    def _denoiser(self) -> Any:
        return getattr(self._pipe, self._known.family.denoiser)

    # --- the load ---

    def run_pass(self) -> Work:
        """Make all images, a batch after the other.

        Raises:
            RuntimeError: the engine failed, or did other work than was asked for.
        """
        together, side = int(self._config["batch_size"]), self._target.pixels
        if together < 1:
            raise RuntimeError(f"batch_size {together}: expected at least one image in a batch")
        steps = int(self._config.get("steps", self._known.steps))
        guided = self._config.get("guidance", True)
        self._images, sizes, seconds = [], [], []
        for first in range(0, len(self._prompts), together):
            texts = self._prompts[first : first + together]
            started = time.perf_counter()
            try:
                images = self._pipe(
                    prompt=texts,
                    height=side,
                    width=side,
                    num_inference_steps=steps,
                    guidance_scale=self._known.guidance if guided else 1.0,
                    generator=[self._noise(first + n) for n in range(len(texts))],
                    output_type="np",
                    **self._known.family.more,
                ).images
            except _FAILURES as error:
                raise RuntimeError(cause_of(error, "failed in a pass")) from error
            if images.shape != (len(texts), side, side, 3):
                made = " x ".join(map(str, images.shape))
                raise RuntimeError(
                    f"diffusers did other work than was asked for: {made} instead of {len(texts)} x {side} x {side} x 3"
                )
            # Half precision can overflow, and black images would be the cheapest of all.
            if not math.isfinite(float(images.sum())):
                raise RuntimeError(f"the images hold values that are no numbers (dtype {self.effective['dtype']})")
            sizes.append(len(images))
            seconds += [time.perf_counter() - started] * len(images)
            self._keep(images)
        self._batches = tuple(sizes)
        return Work(units=sum(sizes), unit="image", request_seconds=tuple(seconds))

    def _noise(self, number: int) -> Any:
        """The source of the noise that image `number` begins as."""
        return self._torch.Generator("cpu").manual_seed(self._target.seed * 1_000_003 + number)

    def _keep(self, images: Any) -> None:
        for image in images[: max(JUDGED_IMAGES - len(self._images), 0)]:
            self._images.append((image * 255).round().astype("uint8"))

    # --- what it says of itself ---

    @property
    def effective(self) -> dict[str, Value]:
        """Read from the loaded pipeline and from its last pass."""
        pipe, denoiser = self._pipe, self._denoiser
        found: dict[str, Value] = {
            "batch_size": max(self._batches, default=0),
            "device": denoiser.device.type,
            "steps": int(pipe.scheduler.num_inference_steps),
            "dtype": str(denoiser.dtype).removeprefix("torch."),
            # `nn.Module.compile` keeps what it compiles there.
            "compile": denoiser._compiled_call_impl is not None,
            "threads": self._torch.get_num_threads(),
            "channels_last": self._is_channels_last(),
            "attention_slicing": self._sliced(),
            "vae_slicing": bool(pipe.vae.use_slicing),
            "vae_tiling": bool(pipe.vae.use_tiling),
        }
        kind = type(pipe.scheduler).__name__
        found["scheduler"] = next((short for short, long in SCHEDULERS.items() if long == kind), kind)
        # Some pipelines hold it in a local variable only.
        if self._known.family.guided and hasattr(pipe, "do_classifier_free_guidance"):
            found["guidance"] = bool(pipe.do_classifier_free_guidance)
        return found

    def _sliced(self) -> bool:
        processors = getattr(self._denoiser, "attn_processors", {})
        return any(type(processor).__name__.startswith("Sliced") for processor in processors.values())

    def _is_channels_last(self) -> bool:
        """Whether the first convolution that is wider than a pixel has its weights in that order."""
        for weights in self._denoiser.parameters():
            if weights.dim() == 4 and weights.shape[-1] > 1:
                ordered = weights.is_contiguous(memory_format=self._torch.channels_last)
                return bool(ordered and not weights.is_contiguous())
        return False

    @property
    def figures(self) -> Mapping[str, float]:
        """`compile_seconds`: how much longer the pass took in which the denoiser was compiled."""
        return {} if self._compile_seconds is None else {"compile_seconds": self._compile_seconds}

    def quality(self, reference: Path) -> Mapping[str, float]:
        """Structural similarity and signal-to-noise ratio of the last pass's images to those of the default.

        SSIM as in Z. Wang et al., Image quality assessment, IEEE Transactions on Image Processing 13 (2004), 600-612:
        a Gaussian window of 11 pixels with a deviation of 1.5; mean over the images. PSNR: mean over the images.

        Raises:
            RuntimeError: the reference cannot be read or written, or is of another load.
        """
        numpy = _library("numpy")
        ours = numpy.stack(self._images)
        load = {"seed": self._target.seed, "images": len(ours), "pixels": self._target.pixels}
        if not reference.exists():
            _write(numpy, reference, ours, load)
        theirs = _known_images(numpy, reference, load)
        judge = _library("skimage.metrics")
        gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        similar, signal = [], []
        for own, other in zip(ours, theirs, strict=True):
            similar.append(float(judge.structural_similarity(own, other, channel_axis=-1, data_range=255, **gaussian)))
            equal = (own == other).all()
            decibels = MOST_PSNR_DB if equal else judge.peak_signal_noise_ratio(other, own, data_range=255)
            signal.append(min(float(decibels), MOST_PSNR_DB))
        ssim = statistics.fmean(similar)
        return {"quality_loss": 1 - ssim, "ssim": ssim, "psnr_db": statistics.fmean(signal)}

    def close(self) -> None:
        """Give memory and threads back; may be called twice."""
        self._pipe = self._own_scheduler = None
        self._images = []
        gc.collect()
        self._torch.set_num_threads(self._threads)
        if self._torch.cuda.is_initialized():
            self._torch.cuda.empty_cache()


def _write(numpy: Any, reference: Path, images: Any, load: Mapping[str, int]) -> None:
    """Whole or not at all. numpy would add an ending to a name, not to a file."""
    part = reference.with_name(f"{reference.name}.part")
    try:
        with part.open("wb") as file:
            numpy.savez_compressed(file, images=images, load=numpy.array(json.dumps(load)))
        part.replace(reference)
    except OSError as error:
        raise RuntimeError(f"the reference images cannot be written to {reference}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def _known_images(numpy: Any, reference: Path, load: Mapping[str, int]) -> Any:
    remedy = "delete it and start the study anew"
    try:
        with numpy.load(reference, allow_pickle=False) as kept:
            images, of = kept["images"], json.loads(str(kept["load"]))
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
        raise RuntimeError(f"the reference images in {reference} cannot be read ({error}); {remedy}") from error
    if of != load:
        raise RuntimeError(f"the reference images in {reference} are of another load ({of}, here {load}); {remedy}")
    return images


# --- the load --------------------------------------------------------------------------------

_LOOKS = ("red", "blue", "green", "golden", "small", "large", "old", "new", "wooden", "stone", "glass", "paper")
_THINGS = ("house", "river", "forest", "bridge", "garden", "tower", "street", "boat", "train", "lamp", "chair", "cat")


def prompts(target: Target) -> list[str]:
    """One prompt for each image, drawn by the seed. Text encoders fill all prompts up to the same length."""
    draw = random.Random(target.seed)  # noqa: S311 - a reproducible load, no secret

    def thing() -> str:
        return f"a {draw.choice(_LOOKS)} {draw.choice(_THINGS)}"

    return [f"{thing()} beside {thing()}" for _ in range(target.prompts)]


# --- loading and making pipelines ------------------------------------------------------------


def _load(known: Pipeline, target: Target, dtype: Any) -> Any:
    if known.folder is None:
        return generated(target.size or DEFAULT_SIZE, target.seed)
    cls = getattr(_library("diffusers"), known.cls)
    more: dict[str, Any] = {}
    if known.cls == GENERATED:
        # A classifier that blacks images out: work that is none of the pipeline's.
        more = {"safety_checker": None, "requires_safety_checker": False}
    if known.variant:
        more["variant"] = known.variant
    # Here and not afterwards: text encoders keep the layers that need it in single precision. Older releases call it
    # `torch_dtype` and ignore this; what came in another type is converted by `load`.
    return cls.from_pretrained(known.folder, local_files_only=True, dtype=dtype, **more)


def generated(size: str, seed: int) -> Any:
    """A Stable Diffusion pipeline with random weights: the same for the same seed and torch.

    Shapes as in Stable Diffusion 1: a U-Net that attends to the prompt on all levels but the last, a VAE that makes
    the side eight times shorter, a CLIP text encoder. The tokenizer knows bytes and merges none.
    """
    diffusers, transformers, torch = _library("diffusers"), _library("transformers"), _library("torch")
    shape = SIZES[size]
    # The caller's random numbers go on as if nothing had been drawn.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        levels, vae_levels = len(shape.unet), len(shape.vae)
        unet = diffusers.UNet2DConditionModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=shape.unet,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            cross_attention_dim=shape.text_width,
            attention_head_dim=shape.unet_heads,
            norm_num_groups=shape.groups,
        )
        vae = diffusers.AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            sample_size=256,
            layers_per_block=1,
            block_out_channels=shape.vae,
            down_block_types=("DownEncoderBlock2D",) * vae_levels,
            up_block_types=("UpDecoderBlock2D",) * vae_levels,
            norm_num_groups=shape.groups,
        )
        words = _vocabulary()
        start, end = words["<|startoftext|>"], words["<|endoftext|>"]
        text_encoder = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=1024,
                hidden_size=shape.text_width,
                intermediate_size=4 * shape.text_width,
                num_hidden_layers=shape.text_layers,
                num_attention_heads=shape.text_heads,
                max_position_embeddings=PROMPT_LIMIT,
                bos_token_id=start,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=transformers.CLIPTokenizer(vocab=words, merges=[], model_max_length=PROMPT_LIMIT),
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _vocabulary() -> dict[str, int]:
    """CLIP's 256 byte characters (as in GPT-2's `bytes_to_unicode`), each also as the end of a word."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in visible] + [chr(256 + n) for n in range(256 - len(visible))]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return {piece: number for number, piece in enumerate(pieces)}


# --- the same without tuner ------------------------------------------------------------------


def _statements(config: Config, target: Target) -> tuple[list[str], list[str]]:
    """Imports and simple statements of a script that writes an image for each line that it reads.

    Every value is written by `repr`. No statement is compound: they also make one line.
    """
    known = _pipeline(target)
    gpu = _machine().gpu
    device = str(config.get("device", "cpu"))
    dtype = str(config.get("dtype", _default_dtype(known, gpu)))
    dtype = "float32" if device == "cpu" and dtype == "float16" else dtype
    imports, body = ["import itertools", "import os", "import sys", "import torch"], []
    if known.folder is None:
        # A generated pipeline lies in no folder: the runner's own file makes it again.
        imports += ["from pathlib import Path", "from tuner.files import load_runner"]
        made = f"generated({target.size or DEFAULT_SIZE!r}, {target.seed!r})"
        body.append(f"pipe = load_runner(Path({str(Path(__file__).absolute())!r})).{made}")
    else:
        imports.append(f"from diffusers import {known.cls}")
        more = ", safety_checker=None, requires_safety_checker=False" if known.cls == GENERATED else ""
        more += f", variant={known.variant!r}" if known.variant else ""
        body.append(f"pipe = {known.cls}.from_pretrained({str(known.folder)!r}, dtype=torch.{dtype}{more})")
    if device != "cpu":
        body.append(f"pipe.to({device!r})")
    if known.folder is None and dtype != "float32":
        body.append(f"pipe.to(torch.{dtype})")
    if "threads" in config and config["threads"] != _machine().threads:
        body.append(f"torch.set_num_threads({int(config['threads'])!r})")
    name = config.get("scheduler", known.scheduler)
    if name is not None and name != known.scheduler:
        kind = SCHEDULERS[str(name)]
        imports.append(f"from diffusers import {kind}")
        body.append(f"pipe.scheduler = {kind}.from_config(pipe.scheduler.config)")
    if config.get("channels_last"):
        body += [f"pipe.{part}.to(memory_format=torch.channels_last)" for part in (known.family.denoiser, "vae")]
    if config.get("attention_slicing"):
        body.append("pipe.enable_attention_slicing()")
    if config.get("vae_slicing"):
        body.append("pipe.vae.enable_slicing()")
    if config.get("vae_tiling"):
        body.append("pipe.vae.enable_tiling()")
    if config.get("compile"):
        body.append(f"pipe.{known.family.denoiser}.compile()")
    given: dict[str, Value] = {
        "height": target.pixels,
        "width": target.pixels,
        "num_inference_steps": int(config.get("steps", known.steps)),
        "guidance_scale": known.guidance if config.get("guidance", True) else 1.0,
        **known.family.more,
    }
    made = f"pipe(batch, {', '.join(f'{name}={value!r}' for name, value in given.items())}).images"
    body += [
        "prompts = filter(None, map(str.strip, sys.stdin))",
        f"batches = iter(lambda: list(itertools.islice(prompts, {int(config['batch_size'])!r})), [])",
        # What an earlier run wrote stays.
        "numbered = map('image{:06d}.png'.format, itertools.count())",
        "names = (name for name in numbered if not os.path.exists(name))",
        f"[image.save(next(names)) for batch in batches for image in {made}]",
    ]
    return imports, body


def command(config: Config, target: Target) -> str:
    """A `python -c` command that runs `config`: prompts come in as lines, images go into files."""
    return shlex.join(service(config, target).argv)


def service(config: Config, target: Target) -> Service:
    """A script for good, and the same as a command."""
    known = _pipeline(target)
    about = f"Makes an image for each prompt on standard input, one a line, with {known.cls}."
    line, python = python_forms(about, *_statements(config, target))
    return Service(
        argv=(sys.executable, "-c", line),
        paths=() if known.folder is None else (str(known.folder),),
        gpus=config.get("device", "cpu") == "cuda",
        python=python,
    )
