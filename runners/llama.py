"""llama.cpp: its own server, inside the trial's process, through `xllamacpp`.

One engine, one load: `Target.prompts` requests of random tokens are sent at once, each waits for a
free slot, and slots that are busy at the same time share one decoding step. The engine counts the
tokens; an answer of another length, or one that came out of a prompt cache, is an error and never
a measurement. What the engine runs with is read back from its own log after loading: it clamps
batches to the context, resolves `auto`, and repacks only weights that it can repack.

Without a model file the runner makes one: a Llama of 160 million random weights. It costs what a
trained model of that shape costs and says nothing (docs/design/generated-model.md).

Everything that loads the engine stays out of the tuner's own process: `space` asks it for devices
and defaults in a short-lived child, so that no GPU context is open between trials.

Glossary
    slot      a sequence that the server decodes; requests wait until one is free
    batch     tokens handed to the engine in one call (`n_batch`), computed `n_ubatch` at a time
    repack    rearranging weights at load time for the CPU's matrix instructions
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import mmap
import os
import random
import re
import secrets
import shlex
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.quality import TEXT, TOKENS, Passage, drawn, judge, of_text
from tuner.serving import Endpoint, cut
from tuner.space import Choice, Config, Constraint, Int, Parameter, Refused, SearchSpace, Value
from tuner.trial import Service, Target, Work, refuse_empty_load

# --- the model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The shape of a generated Llama model."""

    label: str
    width: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    context: int

    @property
    def parameters(self) -> int:
        """Weights of the matrices; embedding and output are not tied."""
        layer = 4 * self.width * self.width + 3 * self.width * self.feed_forward
        return 2 * self.vocabulary * self.width + self.layers * layer


SIZES: Mapping[str, Shape] = {
    # JackFram/llama-160m's shape with a longer context.
    "160m": Shape("160M", width=768, layers=12, heads=12, feed_forward=3072, vocabulary=32000, context=32768),
    "tiny": Shape("tiny", width=64, layers=2, heads=2, feed_forward=192, vocabulary=1024, context=4096),
}
"""The models that `--size` can name."""

BYTES_PER_WEIGHT: Mapping[str, float] = {"F16": 2, "Q8_0": 34 / 32, "Q4_0": 18 / 32}
"""The weights a generated model comes in. A quantised block holds 32 weights and one 2-byte scale."""

DEFAULT_WEIGHTS = "Q4_0"

RECIPE = 1
"""Part of a generated file's name. Raise it when the same seed gives other bytes."""

TILE_ROWS = 64
"""Random rows made for a matrix; they repeat. Quantising them once is 20 times faster, and no kernel
can tell: every weight is still read and multiplied."""


@dataclass(frozen=True)
class Model:
    """What a GGUF file says about itself."""

    path: Path
    bytes: int
    architecture: str
    layers: int
    context: int
    """Tokens it was trained on; 0 where the file does not say."""
    head_width: int
    """Width of one attention head; 0 where the file does not say."""
    tokens: tuple[int, ...]
    """Ids of ordinary tokens: no control tokens, no bytes."""


def _model(target: Target, weights: str = DEFAULT_WEIGHTS) -> Model:
    """The model to load, made first where it is a generated one and not there yet."""
    if target.model is None:
        return _header(_generated(target, weights))
    if target.size is not None:
        raise Refused(f"--size {target.size} makes a model and --model {target.model} names one: leave one of them out")
    return _header(_named(target.model))


def _named(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.gguf"))
        example = str(path / inside[0]) if inside else f"{path}/FILE.gguf"
        raise Refused(f"--model {name}: expected a GGUF file, got a folder; try --model {shlex.quote(example)}")
    if not path.exists():
        raise Refused(f"--model {name}: no such file; leave --model out to tune with a generated model")
    return path.absolute()


# GGUF, version 3: magic, version, tensor count, then key-value pairs; all little-endian.
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ORDINARY_TOKEN = 1


def _metadata(data: mmap.mmap) -> dict[str, Any]:
    """The key-value pairs of a GGUF file. Of an array of strings only its indices are given: nobody needs the texts.

    `gguf.GGUFReader` reads the same, but takes seconds for a vocabulary of 100,000 pieces.

    Raises:
        ValueError, LookupError, OverflowError, struct.error: the bytes are no GGUF of version 2 or 3.
    """
    magic, version, _, pairs = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("magic or version")
    offset = struct.calcsize("<4sIQQ")

    def number(code: str) -> Any:
        nonlocal offset
        (value,) = struct.unpack_from(f"<{code}", data, offset)
        offset += struct.calcsize(f"<{code}")
        return value

    def string() -> str:
        nonlocal offset
        length = number("Q")
        text = data[offset : offset + length]
        if len(text) != length:
            raise ValueError("string beyond the end of the file")
        offset += length
        return text.decode()

    def value(kind: int) -> Any:
        nonlocal offset
        if kind == _STRING:
            return string()
        if kind != _ARRAY:
            return number(_NUMBERS[kind])
        of, count = number("I"), number("Q")
        if of == _STRING:
            for _ in range(count):
                length = number("Q")
                offset += length
            return range(count)
        layout = f"<{count}{_NUMBERS[of]}"
        values = struct.unpack_from(layout, data, offset)
        offset += struct.calcsize(layout)
        return values

    return {string(): value(number("I")) for _ in range(pairs)}


def _header(path: Path) -> Model:
    try:
        status = path.stat()
        return _header_of(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise Refused(f"--model {path}: cannot be read ({error.strerror}); check the file's permissions") from error


@functools.lru_cache(maxsize=8)
def _header_of(path: Path, size: int, _mtime_ns: int) -> Model:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            pairs = _metadata(data)
        architecture = pairs["general.architecture"]
        own = {key.removeprefix(f"{architecture}."): v for key, v in pairs.items()}
        heads = own.get("attention.head_count", 0)
        heads = max(heads) if isinstance(heads, tuple) else heads
        head_width = own.get("attention.key_length") or (own["embedding_length"] // heads if heads else 0)
        kinds = pairs.get("tokenizer.ggml.token_type")
        vocabulary = pairs["tokenizer.ggml.tokens"]
        ordinary = vocabulary if kinds is None else (i for i in vocabulary if kinds[i] == _ORDINARY_TOKEN)
        return Model(
            path=path,
            bytes=size,
            architecture=architecture,
            layers=own["block_count"],
            context=own.get("context_length", 0),
            head_width=head_width,
            tokens=tuple(ordinary) or tuple(vocabulary),
        )
    # The messages of these are about bytes and keys; the person's question is only: is it a model?
    except (ValueError, LookupError, TypeError, OverflowError, struct.error) as error:
        raise Refused(
            f"--model {path}: expected a GGUF language model, got something else or a damaged file; "
            "convert a model with llama.cpp's convert_hf_to_gguf.py or leave --model out to tune with a generated one"
        ) from error


def _cache_folder() -> Path:
    """Where generated models are kept. A relative XDG_CACHE_HOME is ignored, as its specification asks."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "tune" / "models"


def _shape(target: Target) -> Shape:
    size = target.size or "160m"
    if size not in SIZES:
        raise Refused(f"--size {size}: expected one of {', '.join(SIZES)}")
    return SIZES[size]


def _generated(target: Target, weights: str) -> Path:
    """The generated model's file, written first unless it is there and whole.

    A digest lies beside it (`sha256sum -c` reads it) rather than in this source: the bytes depend on
    the installed `gguf`, and a constant would turn its next release into an error. Results still
    never mix, because `identity` carries the digest.
    """
    shape = _shape(target)
    folder = _cache_folder()
    path = folder / f"llama-{shape.label.lower()}-{weights.lower()}-seed{target.seed}-r{RECIPE}.gguf"
    digest = path.with_name(f"{path.name}.sha256")
    try:
        if path.exists() and digest.exists() and digest.read_text().split()[:1] == [_sha256(path)]:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        # Each writer has a file of its own, and both end with the same bytes: the last one to rename
        # changes nothing for a reader of the first.
        with _replacing(path) as partial:
            _write_model(partial, shape, weights, target.seed)
        with _replacing(digest) as partial:
            partial.write_text(f"{_sha256(path)}  {path.name}\n")
    except OSError as error:
        need = shape.parameters * BYTES_PER_WEIGHT[weights] / 1e6
        # numpy reports a short write without the system's reason.
        cause = error.strerror or "a write stopped short, as on a full disk"
        raise Refused(
            f"the generated model needs {math.ceil(need)} MB in {folder}, which cannot be written "
            f"({cause}); make room there or set XDG_CACHE_HOME to another folder"
        ) from error
    return path


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new file that takes the place of `path` when the block ends, whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
    partial = Path(name)
    try:
        yield partial
        os.fsync(descriptor)
        partial.replace(path)
    finally:
        os.close(descriptor)
        partial.unlink(missing_ok=True)


def _write_model(path: Path, shape: Shape, weights: str, seed: int) -> None:
    """Write a Llama with random weights: norms 1, embeddings N(0, 0.02^2), matrices N(0, 1/inputs).

    The same seed gives the same bytes with every numpy and on every CPU: PCG64's raw stream is
    frozen (NEP 19), unlike `standard_normal`, and what follows is integer and exact float arithmetic.
    """
    gguf = _library("gguf")
    np = _library("numpy")
    kind = gguf.GGMLQuantizationType[weights]
    bits = np.random.PCG64(seed)

    def matrix(rows: int, columns: int, sigma: float) -> Any:
        # Irwin-Hall: the sum of four uniform 16-bit integers has mean 4 * 65535 / 2 and variance
        # 4 * (65536^2 - 1) / 12, and is normal enough to be multiplied.
        fresh = min(TILE_ROWS, rows)
        words = np.frombuffer(bits.random_raw(fresh * columns).tobytes(), np.uint16).reshape(fresh, columns, 4)
        centred = words.sum(axis=-1, dtype=np.int64) - 131070
        scale = np.float32(sigma / math.sqrt((65536**2 - 1) / 3))
        tile = gguf.quants.quantize(centred.astype(np.float32) * scale, kind)
        return np.resize(tile, (rows, tile.shape[1]))

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"generated llama {shape.label}")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{weights}"])
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.vocabulary)

    # A SentencePiece vocabulary that can spell anything: specials, 256 bytes, ASCII, then filler.
    types = gguf.TokenType
    vocabulary = [("<unk>", types.UNKNOWN), ("<s>", types.CONTROL), ("</s>", types.CONTROL)]
    vocabulary += [(f"<0x{byte:02X}>", types.BYTE) for byte in range(256)]
    vocabulary += [(chr(code), types.NORMAL) for code in range(33, 127)]
    vocabulary += [("\u2581", types.NORMAL)]
    vocabulary += [(f"\u2581w{i}", types.NORMAL) for i in range(shape.vocabulary - len(vocabulary))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in vocabulary])
    writer.add_token_types([kind for _, kind in vocabulary])
    writer.add_token_scores([-float(index) for index in range(len(vocabulary))])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, rows: int, columns: int, sigma: float | None = None) -> None:
        sigma = columns**-0.5 if sigma is None else sigma
        writer.add_tensor(f"{name}.weight", matrix(rows, columns, sigma), raw_dtype=kind)

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.width, np.float32))

    add("token_embd", shape.vocabulary, shape.width, sigma=0.02)
    add("output", shape.vocabulary, shape.width)
    add_norm("output_norm")
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        add_norm(f"{block}.attn_norm")
        add_norm(f"{block}.ffn_norm")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}.{name}", shape.width, shape.width)
        for name in ("ffn_gate", "ffn_up"):
            add(f"{block}.{name}", shape.feed_forward, shape.width)
        add(f"{block}.ffn_down", shape.width, shape.feed_forward)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _sha256_of(path: Path, _size: int, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


WHOLE_HASH_BYTES = 512 * 2**20
"""Up to here a model is hashed whole (half a second); above, by its size and its two ends."""


def _fingerprint(model: Model) -> str:
    """The model's SHA-256; of a large file `ends:` and that of its size, first and last MiB.

    The first MiB holds the metadata, the last one weights: another model or another quantisation
    differs there, and 40 GB are not read before each study.
    """
    if model.bytes <= WHOLE_HASH_BYTES:
        return _sha256(model.path)
    digest = hashlib.sha256(str(model.bytes).encode())
    with model.path.open("rb") as file:
        digest.update(file.read(2**20))
        file.seek(-(2**20), os.SEEK_END)
        digest.update(file.read(2**20))
    return f"ends:{digest.hexdigest()}"


def describe(target: Target) -> str:
    """One line that says what is being run, shown before a study starts."""
    model = _model(target)
    size = f"{model.bytes / 1e9:.1f} GB" if model.bytes >= 1e9 else f"{math.ceil(model.bytes / 1e6)} MB"
    if target.model is not None:
        return f"model: {model.path.name} ({model.architecture}, {model.layers} layers, {size})"
    label = _shape(target).label
    return (
        f"model: generated Llama {label} with random weights ({DEFAULT_WEIGHTS}, {size}): "
        f"speed and energy are those of a real {label} model, its text is meaningless"
    )


# --- the engine, asked from outside ----------------------------------------------------------


def _library(name: str) -> Any:
    """An optional package, imported now; `Refused` says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(
            f"the llama workload cannot import {name} ({error}); install it with: pip install xllamacpp gguf"
        ) from error


def _version() -> str:
    try:
        return importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError as error:
        raise Refused(
            "the llama workload needs the packages xllamacpp and gguf; install them with: pip install xllamacpp gguf"
        ) from error


@dataclass(frozen=True)
class _Build:
    """What the installed engine says about itself on this machine."""

    threads: int
    """The thread count it chooses by itself: physical cores, without the efficiency cores of a hybrid CPU."""
    offload_devices: tuple[str, ...]
    """GPUs that it can move layers to."""


# A server without a model fails, but not before it has logged the threads that it would have used.
_PROBE = """
import json, xllamacpp
print(json.dumps([d["name"] for d in xllamacpp.get_device_info() if "GPU" in d["type"].name]), flush=True)
params = xllamacpp.CommonParams()
params.model.path = "/dev/null"
params.fit_params = params.ui = False
params.verbosity = 4
try:
    xllamacpp.Server(params)
except RuntimeError:
    pass
"""


@functools.cache
def _build() -> _Build:
    """Ask the engine in a child process: there, a GPU context ends with it and a crash is a sentence."""
    if importlib.util.find_spec("xllamacpp") is None:
        _version()
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    child = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    threads = _LOG["threads"].search(child.stderr)
    if child.returncode != 0 or threads is None:
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        cause = signal.Signals(-child.returncode).name if child.returncode < 0 else last
        # The wheels take OpenMP from the system, and slim containers come without it.
        remedy = "apt-get install libgomp1" if "libgomp" in cause else "pip install --force-reinstall xllamacpp"
        raise Refused(f"xllamacpp does not run on this machine ({cause}); try: {remedy}")
    return _Build(threads=int(threads[1]), offload_devices=tuple(json.loads(child.stdout)))


# --- what may be tuned -----------------------------------------------------------------------

MOST_SLOTS = 256
"""LLAMA_MAX_SEQ: the engine refuses more sequences."""

CONTEXT_STEP = 256
"""The engine rounds the context of a slot up to a multiple of this."""


def space(target: Target) -> SearchSpace:
    """Launch parameters of llama.cpp's server for this machine, model and load, most influential first.

    Left out on purpose: `poll` (the published wheels are built with OpenMP, whose threads ignore it)
    and the number of HTTP threads (the load does not use HTTP).

    Raises:
        Refused: the model cannot be used, the load does not fit it, or the engine is not installed.
    """
    refuse_empty_load(target)
    _version()
    model = _model(target)
    if 0 < model.context < target.prompt_tokens + target.output_tokens:
        raise Refused(
            f"--prompt-tokens {target.prompt_tokens} and --output-tokens {target.output_tokens}: expected at most "
            f"{model.context} tokens together, the context {model.path.name} was trained on"
        )
    build = _build()
    cpus = max(len(os.sched_getaffinity(0)), build.threads)
    prompt_batch = 2 ** math.ceil(math.log2(target.prompts * target.prompt_tokens))
    parameters: list[Parameter] = [
        # llama-server's own `-np -1` is 4 slots with a unified cache.
        Int(
            name="parallel",
            meaning="slots decoded together: each decoding step reads all weights once for all busy slots, so more "
            "slots share that cost, until computing rather than reading becomes the limit; requests beyond it wait",
            default=4,
            low=1,
            high=min(MOST_SLOTS, max(4, target.prompts)),
        )
    ]
    if target.allow_lossy and target.model is None:
        parameters.append(
            Choice(
                name="weights",
                meaning="precision of the weights: fewer bits are fewer bytes read for each token and can cost quality",
                default=DEFAULT_WEIGHTS,
                effect="lossy",
                values=tuple(BYTES_PER_WEIGHT),
                ordered=True,
            )
        )
    if build.offload_devices:
        parameters.append(
            Int(
                name="gpu_layers",
                meaning=f"layers computed on {', '.join(build.offload_devices)} instead of the CPU; "
                f"{model.layers + 1} is all of them and the output layer",
                default=model.layers + 1,
                low=0,
                high=model.layers + 1,
                effect="numerics",
                lever="offload",
            )
        )
    parameters += [
        # llama_context::graph_compute takes threads_batch as soon as a step carries two tokens, so with
        # several busy slots generation runs on it too.
        Int(
            name="threads_batch",
            meaning="CPU threads while prompts are processed and while several slots generate together, that is, "
            "whenever one step computes more than one token; prompts are limited by arithmetic and usually want every "
            "core",
            default=build.threads,
            low=1,
            high=cpus,
        ),
        Int(
            name="threads",
            meaning="CPU threads while a single slot generates alone, a phase that waits for memory: beyond what "
            "saturates the memory bus, threads burn power without speed; no effect while several slots are busy",
            default=build.threads,
            low=1,
            high=cpus,
        ),
        Choice(
            name="repack",
            meaning="rearrange the weights at load time for the CPU's matrix instructions: faster multiplication for a "
            "longer start; it has no effect on weights that have no such layout",
            default=True,
            effect="numerics",
            values=(False, True),
        ),
        Choice(
            name="flash_attention",
            meaning="fused attention that never stores the score matrix: fewer bytes moved, more so with long context; "
            "auto turns it on where the device supports it",
            default="auto",
            effect="numerics",
            values=("off", "on", "auto"),
        ),
        Choice(
            name="n_ubatch",
            meaning="prompt tokens computed at a time: small values read the weights again and again, large ones need "
            "larger buffers that may fall out of the cache",
            default=512,
            effect="numerics",
            values=_powers_of_two(8, max(512, prompt_batch)),
            ordered=True,
        ),
        Choice(
            name="n_batch",
            meaning="tokens accepted in one engine call, split into n_ubatch pieces: with several slots it bounds how "
            "long new prompts hold up the slots that are generating",
            default=2048,
            values=_powers_of_two(32, max(2048, prompt_batch)),
            ordered=True,
        ),
        Choice(
            name="continuous_batching",
            meaning="let a new prompt join while other slots are generating; off, it waits until all of them are done "
            "and then starts together with the others that wait",
            default=True,
            values=(False, True),
        ),
        Choice(
            name="kv_unified",
            meaning="one cache shared by all slots instead of one for each: attention then passes over the cells of "
            "the other slots too",
            default=True,
            effect="numerics",
            values=(False, True),
        ),
    ]
    if target.allow_lossy and model.head_width % _CACHE_BLOCK == 0:
        parameters += [
            Choice(
                name=f"cache_type_{side}",
                meaning=f"precision of the cached {what}: fewer bits are fewer bytes read at long context, but cost "
                "time to convert at short context, and can cost quality",
                default="f16",
                effect="lossy",
                values=CACHE_TYPES,
                ordered=True,
            )
            for side, what in (("k", "keys"), ("v", "values"))
        ]
    parameters.append(
        Choice(
            name="mmap",
            meaning="map the model file into memory instead of reading it into a buffer: a faster start and, for "
            "weights that are not repacked, pages shared with the file cache",
            default=True,
            values=(False, True),
        )
    )
    return SearchSpace(tuple(parameters), _constraints([p.name for p in parameters]))


CACHE_TYPES = ("f16", "q8_0", "q4_0")

_CACHE_BLOCK = 32
"""Quantised cache types hold 32 values a block: a head of another width cannot use them."""


def _powers_of_two(low: int, high: int) -> tuple[int, ...]:
    return tuple(2**n for n in range(int(math.log2(low)), int(math.log2(high)) + 1))


def _constraints(names: list[str]) -> tuple[Constraint, ...]:
    """That the context holds every slot's tokens is no constraint: `_context` sees to it."""
    rules = [
        # The engine clamps silently: the configuration would be another one than it says.
        Constraint("n_ubatch <= n_batch", lambda c: int(c["n_ubatch"]) <= int(c["n_batch"])),
        # With fewer, llama.cpp b11549 aborts: GGML_ASSERT(n_outputs_max <= cparams.n_outputs_max).
        Constraint(
            "parallel <= n_batch (each slot adds a token to a decoding step)",
            lambda c: int(c["parallel"]) <= int(c["n_batch"]),
        ),
    ]
    if "cache_type_v" in names:
        rules.append(
            Constraint(
                "a quantised cache_type_v needs flash_attention on",
                lambda c: c["cache_type_v"] == "f16" or c["flash_attention"] == "on",
            )
        )
    return tuple(rules)


def _context(config: Mapping[str, Value], target: Target) -> int:
    """Tokens of context to allocate, for all slots together.

    llama-server's own `-c 0` takes the whole context the model was trained on, gigabytes for a
    recent model, and then lets `--fit` shrink it to what is free. Here each slot gets what one
    request needs. Without a unified cache the engine divides the context by the slots and rounds
    each part up to a multiple of 256; with one, all slots draw from the same pool: the same total
    serves both. It is no smaller than `n_batch`, which the engine would cut down to it.
    """
    one_slot = math.ceil((target.prompt_tokens + target.output_tokens) / CONTEXT_STEP) * CONTEXT_STEP
    return max(int(config["parallel"]) * one_slot, int(config["n_batch"]))


def identity(target: Target) -> dict[str, str]:
    """Engine, version and model: what must agree before results may meet. Cheap when asked again."""
    model = _model(target)
    return {
        "engine": "llama.cpp (xllamacpp)",
        "engine_version": _version(),
        "model": model.path.name if target.model is not None else f"generated llama {_shape(target).label}",
        "model_sha256": _fingerprint(model),
        "device": "gpu" if _build().offload_devices else "cpu",
    }


def metrics(target: Target) -> tuple[str, ...]:
    """Figures of its own that limits may be set on."""
    return ("nll_nats_per_token",) if target.quality else ()


# --- running it ------------------------------------------------------------------------------


@contextmanager
def launch(config: Config, target: Target) -> Iterator[LlamaServer]:
    """Load, send the load once to warm up, yield; shut down afterwards.

    Raises:
        Refused: the model cannot be used or the engine is not installed.
        RuntimeError: the engine cannot load this configuration, or the warm-up failed; the message is
            the first error in the engine's log, which goes to standard error.
    """
    xllamacpp = _library("xllamacpp")
    model = _model(target, str(config.get("weights", DEFAULT_WEIGHTS)))
    # On a failed assertion ggml starts a debugger on this very process and prints to standard output.
    os.environ["GGML_NO_BACKTRACE"] = "1"
    requests = _requests(target, model.tokens)
    parameters = _parameters(xllamacpp, config, target, model)
    log = _Log()
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        raise RuntimeError(f"llama.cpp cannot load this configuration: {log.first_error() or error}") from error
    engine = LlamaServer(server, target, requests, model, parameters.api_keys[0])
    del server
    try:
        # Buffers and threads come with the first work. It also makes closing safe: a server that is
        # destroyed before its loop has started waits forever (xllamacpp 2026.10), so nothing that can
        # fail stands between loading and this.
        engine.run_pass()
        engine.effective = log.read_back()
        yield engine
    finally:
        engine.close()


def _parameters(xllamacpp: Any, config: Config, target: Target, model: Model) -> Any:
    """The server's parameters: each tuned one set, and nothing left for the engine to adjust."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model.path)
    params.fit_params = False
    params.ui = False
    # The engine logs what it runs with at level 4; during a pass that is a dozen lines a request.
    params.verbosity = 4
    # It listens on a free port of 127.0.0.1 whether asked to or not; nobody else may add work to the window.
    params.port = 0
    params.api_keys = [secrets.token_hex(16)]
    # Nothing may be carried from one pass to the next; the requests, too, ask for no cached prompt.
    params.cache_ram_mib = 0

    params.n_ctx = _context(config, target)
    params.n_parallel = config["parallel"]
    params.kv_unified = config["kv_unified"]
    params.cont_batching = config["continuous_batching"]
    params.n_batch = config["n_batch"]
    params.n_ubatch = config["n_ubatch"]
    params.cpuparams.n_threads = config["threads"]
    params.cpuparams_batch.n_threads = config["threads_batch"]
    params.no_extra_bufts = not config["repack"]
    flash = {"off": "DISABLED", "on": "ENABLED", "auto": "AUTO"}[str(config["flash_attention"])]
    params.flash_attn_type = xllamacpp.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{flash}"]
    # AUTO maps the file except on devices that cannot.
    params.load_mode = xllamacpp.llama_load_mode[f"LLAMA_LOAD_MODE_{'AUTO' if config['mmap'] else 'NONE'}"]
    params.cache_type_k = _cache_type(xllamacpp, config.get("cache_type_k", "f16"))
    params.cache_type_v = _cache_type(xllamacpp, config.get("cache_type_v", "f16"))
    params.n_gpu_layers = config.get("gpu_layers", 0)
    return params


def _cache_type(xllamacpp: Any, name: Value) -> Any:
    return xllamacpp.ggml_type[f"GGML_TYPE_{str(name).upper()}"]


class LlamaServer:
    """A loaded server and the requests of one pass; `key` opens its port."""

    def __init__(self, server: Any, target: Target, requests: list[dict[str, object]], model: Model, key: str) -> None:
        self._server = server
        self._target = target
        self._requests = requests
        self._model = model
        self._key = key
        self._forced = Forced(self._answer, "llama.cpp", model.tokens, target.seed)
        self.effective: Mapping[str, Value] = {}

    def run_pass(self) -> Work:
        """Send every request at once, each from a thread of its own, and wait for the last answer.

        Raises:
            RuntimeError: the engine refused a request, or did other work than was asked for.
        """
        with ThreadPoolExecutor(max_workers=len(self._requests)) as clients:
            answers = list(clients.map(self._complete, self._requests))
        timings = [timing for timing, _ in answers]
        return Work(
            units=sum(t["predicted_n"] for t in timings),
            prompt_tokens=sum(t["prompt_n"] for t in timings),
            prefill_seconds=sum(t["prompt_ms"] for t in timings) / 1e3,
            decode_seconds=sum(t["predicted_ms"] for t in timings) / 1e3,
            request_seconds=tuple(seconds for _, seconds in answers),
        )

    def close(self) -> None:
        """Stop the server, its threads and its port; may be called twice."""
        self._server = None
        # The server ends with its last reference, and a failed request's traceback may hold one in a cycle.
        gc.collect()

    def quality(self, reference: Path) -> Mapping[str, float]:
        """Mean negative log-likelihood of fixed tokens, decoded along them through this cache and attention.

        Raises:
            RuntimeError: the engine refused, `reference` is damaged, or the likelihood is no number.
        """
        return judge(reference, self._passage, self._forced.nats)

    def _passage(self) -> Passage:
        most = self._model.context or TOKENS
        endpoint = Endpoint.parse(self._server.listening_address, self._key)
        text = None if self._target.model is None else of_text(text_ids(endpoint), most)
        return text or drawn(self._model.tokens, self._target.seed, self._forced.go_on, most)

    def _answer(self, request: Mapping[str, object]) -> dict[str, Any]:
        answer: dict[str, Any] = self._server.handle_completions(request)
        if "error" in answer:
            raise RuntimeError(f"llama.cpp refused a request: {answer['error'].get('message', answer['error'])}")
        return answer

    def _complete(self, request: Mapping[str, object]) -> tuple[dict[str, Any], float]:
        """The engine's counts for one request, checked, and the wall seconds it took."""
        started = time.perf_counter()
        answer = self._answer(request)
        seconds = time.perf_counter() - started
        timings: dict[str, Any] = answer["timings"]
        usage = answer["usage"]
        did = {
            "prompt tokens": (timings["prompt_n"], self._target.prompt_tokens),
            "output tokens": (timings["predicted_n"], self._target.output_tokens),
            "completion tokens": (usage["completion_tokens"], self._target.output_tokens),
            "tokens taken from a prompt cache": (usage["prompt_tokens_details"]["cached_tokens"], 0),
        }
        wrong = [f"{got} {what} instead of {asked}" for what, (got, asked) in did.items() if got != asked]
        if wrong:
            raise RuntimeError(f"llama.cpp did other work than was asked for: {', '.join(wrong)}")
        return timings, seconds


def text_ids(endpoint: Endpoint) -> list[int]:
    """The fixed text in the tokens of the model that a llama.cpp server has loaded.

    Raises:
        RuntimeError: the server does not answer, or with something else.
    """
    ids = endpoint.ask(f"{endpoint.root}/tokenize", {"content": TEXT, "add_special": False}).get("tokens")
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise RuntimeError(f"POST /tokenize brought no list of tokens: {cut(str(ids), 80)}")
    return ids


@dataclass(frozen=True)
class Forced:
    """The likelihood of given tokens, from a llama.cpp server, whichever way its completions are reached.

    It tells nothing of a prompt's likelihood (ggml-org/llama.cpp#15189), but of every token that it generates, whatever
    rules it was chosen by: a softmax over all logits as the model gave them. So each row is generated under a grammar
    that allows one token at a time, the wanted one.
    """

    ask: Callable[[Mapping[str, object]], Mapping[str, Any]]
    """The answer to the body of an OpenAI-compatible completion."""
    name: str
    """The engine's, for error messages."""
    tokens: Sequence[int]
    """Ordinary ones."""
    seed: int

    def go_on(self, openings: list[list[int]], count: int) -> list[list[int]]:
        """What it says after each opening."""
        # A grammar cannot ask for tokens without a text, such as the byte 0: only ordinary ones are drawn.
        ordinary = set(self.tokens)
        never = [[i, False] for i in range(max(ordinary)) if i not in ordinary]
        drawing = {"temperature": 1, "samplers": ["temperature"], "ignore_eos": True, "logit_bias": never}
        return [[i for i, _ in row] for row in self.generated(openings, [drawing] * len(openings), count)]

    def nats(self, passage: Passage) -> list[float]:
        """Of each judged token."""
        wanted = passage.judged
        forced = [{"grammar": f"root ::= {' '.join(f'<[{i}]>' for i in row)}"} for row in wanted]
        found = self.generated(passage.openings, forced, len(wanted[0]))
        if [[i for i, _ in row] for row in found] != wanted:
            raise RuntimeError(f"{self.name} did not follow the reference, so its output cannot be judged")
        return [-logprob for row in found for _, logprob in row]

    def generated(
        self, prompts: Sequence[Sequence[int]], fields: Sequence[Mapping[str, object]], count: int
    ) -> list[list[tuple[int, float]]]:
        """`count` tokens after each prompt, each with its log-probability before any rule of sampling."""
        requests = [
            {"prompt": prompt, "n_predict": count, "seed": self.seed, "cache_prompt": False, "logprobs": 1}
            | {"temperature": 0, **own}
            for prompt, own in zip(prompts, fields, strict=True)
        ]
        # One at a time: which of them share a step would be chance, and rounds differently each time.
        answers = [self.ask(request) for request in requests]
        try:
            tokens = [
                [(int(t["id"]), float(t["logprob"])) for t in answer["choices"][0]["logprobs"]["content"]]
                for answer in answers
            ]
        except (LookupError, TypeError, ValueError) as error:
            raise RuntimeError(f"{self.name} gave log-probabilities that cannot be read ({error})") from error
        if any(len(row) != count for row in tokens):
            raise RuntimeError(f"{self.name} generated {min(map(len, tokens))} tokens to be judged instead of {count}")
        return tokens


def _requests(target: Target, tokens: tuple[int, ...]) -> list[dict[str, object]]:
    """The fixed load: prompts of ordinary tokens drawn uniformly, greedy output of fixed length."""
    draw = random.Random(target.seed)  # noqa: S311 - a reproducible load, no secret
    return [
        {
            "prompt": draw.choices(tokens, k=target.prompt_tokens),
            "n_predict": target.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "seed": target.seed,
            "cache_prompt": False,
        }
        for _ in range(target.prompts)
    ]


# --- what the engine says --------------------------------------------------------------------

# Lines of llama.cpp's log at level 4. Two things are not in it: whether continuous batching is on
# (nothing exposes it, so `effective` does not name it), and, on a build without GPU, any layer count.
_LOG: Mapping[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "parallel": r"initializing, n_slots = (\d+)",
        "weights": r"print_info: file type\s+= (\w+)",
        "gpu_layers": r"offloaded (\d+)/\d+ layers",
        "threads": r"system_info: n_threads = (\d+)",
        "threads_batch": r"system_info: .*\(n_threads_batch = (\d+)\)",
        "repack": r"_REPACK model buffer size =\s+([\d.]+)",
        "flash_attention": r"llama_context: flash_attn\s+= (\w+)",
        "n_ubatch": r"llama_context: n_ubatch\s+= (\d+)",
        "n_batch": r"llama_context: n_batch\s+= (\d+)",
        "kv_unified": r"llama_context: kv_unified\s+= (\w+)",
        "cache_type_k": r"llama_kv_cache: size = .*K \((\w+)\)",
        "cache_type_v": r"llama_kv_cache: size = .*V \((\w+)\)",
        "mmap": r"\(load_mode = ([\w+]+)\)",
        "n_ctx": r"llama_context: n_ctx\s+= (\d+)",
    }.items()
}
_COUNTS = frozenset({"parallel", "gpu_layers", "threads", "threads_batch", "n_ubatch", "n_batch", "n_ctx"})
_LOADED = re.compile(r"init: model loaded$", re.MULTILINE)
_FLASH_RESOLVED = re.compile(r"Flash Attention (?:not supported, set to )?(enabled|disabled)")
_ERROR = re.compile(r"^[\d.]+ E (?:\w+ +)?(.+)$", re.MULTILINE)


def read_back(log: str) -> dict[str, Value]:
    """The parameters named in a log of llama.cpp, in this runner's names and types; what is not said is absent."""
    said = {name: match[1] for name, pattern in _LOG.items() if (match := pattern.search(log))}
    values: dict[str, Value] = {name: int(said[name]) for name in said if name in _COUNTS}
    values |= {name: said[name] for name in ("weights", "cache_type_k", "cache_type_v") if name in said}
    if "kv_unified" in said:
        values["kv_unified"] = said["kv_unified"] == "true"
    if "mmap" in said:
        values["mmap"] = "mmap" in said["mmap"]
        # The engine speaks of repacking only where it did: an F16 model with repacking on has none.
        values["repack"] = "repack" in said
    if flash := said.get("flash_attention"):
        if flash == "auto" and (resolved := _FLASH_RESOLVED.search(log)):
            flash = resolved[1]
        values["flash_attention"] = {"enabled": "on", "disabled": "off"}.get(flash, flash)
    return values


class _Log:
    """What the engine writes to standard error from now on.

    A worker's standard error is a file, and the file is read where it lies: a copy made on the way
    would lose the last lines of a crash. On a terminal or a pipe nothing is read back.
    """

    def __init__(self) -> None:
        status = os.fstat(2)
        self._start = status.st_size if stat.S_ISREG(status.st_mode) else None

    def read_back(self) -> dict[str, Value]:
        """What the engine says it runs with."""
        return read_back(self._once(_LOADED))

    def first_error(self) -> str | None:
        """The first line of level E; those that follow it say that loading failed."""
        found = _ERROR.search(self._once(_ERROR))
        return " ".join(found[1].split()) if found else None

    def _once(self, line: re.Pattern[str]) -> str:
        """The log once it holds `line`: a thread of the engine's own writes it, a little later than it happens."""
        deadline = time.monotonic() + 2
        while not line.search(text := self._text()) and self._start is not None and time.monotonic() < deadline:
            time.sleep(0.005)
        return text

    def _text(self) -> str:
        if self._start is None:
            return ""
        with Path("/proc/self/fd/2").open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")


# --- the same without tuner ------------------------------------------------------------------


def command(config: Config, target: Target) -> str:
    """The `llama-server` command that runs `config`, naming what differs from the engine's defaults.

    Flags: tools/server/README.md of ggml-org/llama.cpp at 00dc8057ab. The conditions of the
    measurement (no prompt cache, fixed output length) are not part of it.
    """
    model = _model(target, str(config.get("weights", DEFAULT_WEIGHTS)))
    default = space(target).default()
    words = ["llama-server", "-m", str(model.path), "-c", str(_context(config, target)), "--fit", "off"]

    def changed(name: str) -> bool:
        return name in config and config[name] != default.get(name)

    # Naming a number of slots, even the automatic one, turns the automatic unified cache off.
    if changed("parallel") or changed("kv_unified"):
        words += ["-np", str(config["parallel"]), "--kv-unified" if config["kv_unified"] else "--no-kv-unified"]
    if changed("gpu_layers"):
        words += ["-ngl", str(config["gpu_layers"])]
    if changed("threads"):
        words += ["-t", str(config["threads"])]
    # Left out, the batch phase takes the threads of generation, whatever their default.
    if config["threads_batch"] != config["threads"]:
        words += ["-tb", str(config["threads_batch"])]
    if changed("repack"):
        words += ["--no-repack"]
    if changed("flash_attention"):
        words += ["-fa", str(config["flash_attention"])]
    if changed("n_ubatch"):
        words += ["-ub", str(config["n_ubatch"])]
    if changed("n_batch"):
        words += ["-b", str(config["n_batch"])]
    if changed("continuous_batching"):
        words += ["--no-cont-batching"]
    if changed("cache_type_k"):
        words += ["-ctk", str(config["cache_type_k"])]
    if changed("cache_type_v"):
        words += ["-ctv", str(config["cache_type_v"])]
    if changed("mmap"):
        words += ["--load-mode", "none"]
    return shlex.join(words)


SERVICE_PORT = 8080
"""llama-server's own default."""

IMAGES = {False: "ghcr.io/ggml-org/llama.cpp:server", True: "ghcr.io/ggml-org/llama.cpp:server-cuda"}
"""Without and with GPU layers: docs/docker.md of ggml-org/llama.cpp. Their entry point is llama-server."""


def service(config: Config, target: Target) -> Service:
    """`llama-server` with `config`: alone it listens to this machine only, in a container to its network.

    The Python form is the engine that was measured, `xllamacpp`; the others are the same server built by its project.
    """
    model = _model(target, str(config.get("weights", DEFAULT_WEIGHTS)))
    words = shlex.split(command(config, target))
    gpus = bool(config.get("gpu_layers", 0))
    listen = ("--port", str(SERVICE_PORT), "--host")
    return Service(
        argv=(*words, *listen, "127.0.0.1"),
        port=SERVICE_PORT,
        image=IMAGES[gpus],
        image_argv=(*words[1:], *listen, "0.0.0.0"),  # noqa: S104 - the container's own network
        paths=(str(model.path),),
        gpus=gpus,
        python=_script(config, target, model),
    )


def _script(config: Config, target: Target, model: Model) -> str:
    """`_parameters` as a script: the tuned ones, without the conditions of the measurement."""
    flash = {"off": "DISABLED", "on": "ENABLED", "auto": "AUTO"}[str(config["flash_attention"])]
    load_mode = "AUTO" if config["mmap"] else "NONE"
    cache = {side: str(config.get(f"cache_type_{side}", "f16")).upper() for side in ("k", "v")}
    settings = {
        "model.path": repr(str(model.path)),
        "port": repr(SERVICE_PORT),
        "fit_params": "False",
        "n_ctx": repr(_context(config, target)),
        "n_parallel": repr(config["parallel"]),
        "kv_unified": repr(config["kv_unified"]),
        "cont_batching": repr(config["continuous_batching"]),
        "n_batch": repr(config["n_batch"]),
        "n_ubatch": repr(config["n_ubatch"]),
        "cpuparams.n_threads": repr(config["threads"]),
        "cpuparams_batch.n_threads": repr(config["threads_batch"]),
        "no_extra_bufts": repr(not config["repack"]),
        "flash_attn_type": f'xllamacpp.llama_flash_attn_type["LLAMA_FLASH_ATTN_TYPE_{flash}"]',
        "load_mode": f'xllamacpp.llama_load_mode["LLAMA_LOAD_MODE_{load_mode}"]',
        "cache_type_k": f'xllamacpp.ggml_type["GGML_TYPE_{cache["k"]}"]',
        "cache_type_v": f'xllamacpp.ggml_type["GGML_TYPE_{cache["v"]}"]',
        "n_gpu_layers": repr(config.get("gpu_layers", 0)),
    }
    lines = "\n".join(f"params.{name} = {value}" for name, value in settings.items())
    return f"""\
import signal
import threading

import xllamacpp

params = xllamacpp.CommonParams()
{lines}

asked_to_end = threading.Event()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: asked_to_end.set())

server = xllamacpp.Server(params)
print(f"serving on {{server.listening_address}}", flush=True)
asked_to_end.wait()
"""
