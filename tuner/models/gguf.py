"""A model in a GGUF file, as llama.cpp loads it: what its header says, and the generated one.

Without a model file one is made: a Llama of 160 million random weights. It costs what a trained model of that shape
costs and says nothing (docs/design/generated-model.md).
"""

from __future__ import annotations

import functools
import hashlib
import math
import mmap
import os
import re
import shlex
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.installed import cache_folder, library
from tuner.space import Constraint, Refused, Value
from tuner.trial import Target

INSTALL = "pip install xllamacpp gguf"

GIB = 2**30


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
    cache_values_per_token: int
    """Numbers that one token leaves in the cache, over all layers; 0 where the file does not say."""
    tokens: tuple[int, ...]
    """Ids of ordinary tokens: no control tokens, no bytes."""
    repacked_bytes: int = 0
    """Of weights that are surely copied where they are repacked for this CPU."""


def read(target: Target, weights: str = DEFAULT_WEIGHTS) -> Model:
    """The model to load, made first where it is a generated one and not there yet.

    Raises:
        Refused: there is no such file, it is no GGUF model, or the generated one cannot be written.
    """
    if target.model is None:
        return _header(generated(target, weights))
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


NEWEST = 3
"""The newest version of the format that is read here, and of llama.cpp since 2023."""


class NewerVersion(Exception):
    """The file has a version of the format that nobody knew when this was written; it is the argument."""


@dataclass(frozen=True)
class Tensor:
    """An entry of a GGUF file's list of tensors."""

    name: str
    shape: tuple[int, ...]
    """Columns first."""
    kind: int
    """Its number in ggml's list of types."""


def metadata(data: mmap.mmap) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """The key-value pairs of a GGUF file, and its list of tensors; that is empty where the file ends before.

    Of an array of strings only its indices are given: nobody needs the texts.

    `gguf.GGUFReader` reads the same, but takes seconds for a vocabulary of 100,000 pieces.

    Raises:
        NewerVersion: of the format.
        ValueError, LookupError, OverflowError, struct.error: the bytes are no GGUF of version 2 or 3.
    """
    magic, version, tensors, pairs = struct.unpack_from("<4sIQQ", data)
    # A file of the other byte order has a version of millions.
    if magic == b"GGUF" and NEWEST < version < 1000:
        raise NewerVersion(version)
    if magic != b"GGUF" or version not in (2, NEWEST):
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

    found = {string(): value(number("I")) for _ in range(pairs)}

    def tensor() -> Tensor:
        name, dimensions = string(), number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError("dimensions")
        shape = tuple(number("Q") for _ in range(dimensions))
        kind, _ = number("I"), number("Q")
        return Tensor(name, shape, kind)

    # What is wrong with them the engine says itself, and better.
    with suppress(ValueError, OverflowError, struct.error):
        return found, tuple(tensor() for _ in range(tensors))
    return found, ()


_MOST_DIMENSIONS = 4


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
            pairs, tensors = metadata(data)
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
            cache_values_per_token=cache_values_per_token(own),
            tokens=tuple(ordinary) or tuple(vocabulary),
            repacked_bytes=repacked_bytes(tensors, _cpu_features()),
        )
    except NewerVersion as error:
        raise Refused(
            f"--model {path}: expected GGUF of version 2 or {NEWEST}, got version {error}; take a file of version "
            f"{NEWEST}, or a newer tune"
        ) from error
    # The messages of these are about bytes and keys; the person's question is only: is it a model?
    except (ValueError, LookupError, TypeError, OverflowError, struct.error) as error:
        raise Refused(
            f"--model {path}: expected a GGUF language model, got something else or a damaged file; "
            "convert a model with llama.cpp's convert_hf_to_gguf.py or leave --model out to tune with a generated one"
        ) from error


def cache_values_per_token(own: Mapping[str, Any]) -> int:
    """Numbers that one token leaves in the cache, over all layers; 0 where the shape is not said.

    Args:
        own: the header's values for this architecture, its name taken off the keys. Head counts may be one number, or
            one for each layer.
    """

    def number(key: str, otherwise: int = 0) -> int:
        value = own.get(key)
        if isinstance(value, tuple | list):
            value = max(value, default=0)
        return int(value) if isinstance(value, int | float) else otherwise

    heads, layers = number("attention.head_count"), number("block_count")
    if not heads:
        return 0
    kv_heads = own.get("attention.head_count_kv")
    all_heads = (
        sum(kv_heads) if isinstance(kv_heads, tuple | list) else number("attention.head_count_kv", heads) * layers
    )
    width = number("embedding_length") // heads
    return (number("attention.key_length", width) + number("attention.value_length", width)) * all_heads


REPACKED: Mapping[int, tuple[int, int, frozenset[str]]] = {
    2: (32, 18, frozenset({"avx2", "asimddp"})),  # Q4_0
    12: (256, 144, frozenset({"avx2"})),  # Q4_K
    20: (32, 18, frozenset({"avx2", "asimddp"})),  # IQ4_NL
}
"""By type: weights and bytes of a block, and the CPU features any one of which repacks it. Those that have been since
2025; later builds know more (`ggml_repack_get_optimal_repack_type` in ggml/src/ggml-cpu/repack.cpp)."""


def repacked_bytes(tensors: Iterable[Tensor], features: frozenset[str]) -> int:
    """Bytes of the weights that repacking copies on a CPU with these features; what is only looked up stays mapped."""
    found = 0
    for tensor in tensors:
        weights, size, needs = REPACKED.get(tensor.kind, (1, 0, frozenset()))
        looked_up = "embd" in tensor.name
        if needs & features and not looked_up and len(tensor.shape) > 1 and tensor.shape[1] % 8 == 0:
            found += math.prod(tensor.shape) // weights * size
    return found


def _cpu_features() -> frozenset[str]:
    with suppress(OSError):
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    return frozenset()


CACHE_BYTES: Mapping[str, float] = {"f16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Bytes of a cached number by its type; a quantised block holds 32 and one 2-byte scale."""


LEAST_CACHE_BYTES = min(CACHE_BYTES.values())
"""Of a type that is not tuned but may be asked for with `--engine-arg`."""


def needed_bytes(model: Model, config: Mapping[str, Value], context: int) -> float:
    """Weights, and a cache of `context` tokens."""
    return model.bytes + _cache_bytes(model, config, context)


def _cache_bytes(model: Model, config: Mapping[str, Value], context: int) -> float:
    values = model.cache_values_per_token / 2
    types = (str(config.get(f"cache_type_{side}", "f16")) for side in ("k", "v"))
    return context * sum(values * CACHE_BYTES.get(kind, LEAST_CACHE_BYTES) for kind in types)


def memory_rule(
    model: Model,
    memory: int,
    context: Callable[[Mapping[str, Value]], int],
    offloaded: Callable[[Mapping[str, Value]], float],
    fixed: Mapping[str, Value] | None = None,
) -> Constraint:
    """That what llama.cpp copies into main memory fits there.

    Pages of a mapped file can be dropped and read again: a model that is larger than memory runs, slowly. All weights
    are copied where `mmap` is off, and those that have another layout where `repack` is on.

    Args:
        model: what is loaded.
        memory: bytes.
        context: tokens of all slots under a configuration.
        offloaded: the share of the layers that are on a GPU.
        fixed: what is not tuned and counts all the same.
    """

    def held(config: Mapping[str, Value]) -> float:
        copied = model.repacked_bytes if config.get("repack", False) else 0
        if not config.get("mmap", True):
            copied = model.bytes
        return (1 - offloaded(config)) * (copied + _cache_bytes(model, config, context(config)))

    return Constraint(
        f"the cache and the weights that are copied ({model.bytes / GIB:.2g} GiB with mmap off, else "
        f"{model.repacked_bytes / GIB:.2g} GiB with repack on) fit into the {memory / GIB:.3g} GiB of main memory, as "
        "far as they are not on a GPU",
        lambda c: held({**c, **(fixed or {})}) <= memory,
    )


_UNKNOWN = re.compile(
    r"unknown model architecture|unknown pre-tokenizer|invalid ggml type|only supports up to version|"
    r"unsupported (?:GGUF |file )?version|bad GGUF version",
    re.IGNORECASE,
)
_DAMAGED = re.compile(
    r"not within the file bounds|corrupted or incomplete|invalid magic|has invalid data|failed to read|"
    r"wrong number of tensors|tensor '[^']*' not found|missing tensor|wrong shape|key not found|"
    r"invalid offset|unexpectedly reached end of file",
    re.IGNORECASE,
)
"""What llama.cpp says of a file that it does not know, and of one that cannot be right (src/llama-model-loader.cpp,
ggml/src/gguf.cpp, at b11549)."""


def next_step(cause: str, update: str) -> str:
    """What to do about a model that llama.cpp turned down, as the end of the sentence; empty for other causes.

    Args:
        cause: the line of its log that says why.
        update: how this engine is brought up to date.
    """
    if _UNKNOWN.search(cause):
        return f"; this build does not know what the file holds: {update}, or take a model that is older than it"
    if _DAMAGED.search(cause):
        return (
            "; the file is damaged, cut short or of another version: compare its size with the source's and get it "
            "again, or convert it anew with this build's convert_hf_to_gguf.py"
        )
    return ""


def shape_of(target: Target) -> Shape:
    """The shape that `--size` names. Raises `Refused` where there is none of that name."""
    size = target.size or "160m"
    if size not in SIZES:
        raise Refused(f"--size {size}: expected one of {', '.join(SIZES)}")
    return SIZES[size]


def generated(target: Target, weights: str) -> Path:
    """The generated model's file, written first unless it is there and whole.

    A digest lies beside it (`sha256sum -c` reads it) rather than in this source: the bytes depend on
    the installed `gguf`, and a constant would turn its next release into an error. Results still
    never mix, because `identity` carries the digest.
    """
    shape = shape_of(target)
    folder = cache_folder() / "models"
    path = folder / f"llama-{shape.label.lower()}-{weights.lower()}-seed{target.seed}-r{RECIPE}.gguf"
    digest = path.with_name(f"{path.name}.sha256")
    try:
        if path.exists() and digest.exists() and digest.read_text().split()[:1] == [sha256(path)]:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        # Each writer has a file of its own, and both end with the same bytes: the last one to rename
        # changes nothing for a reader of the first.
        with _replacing(path) as partial:
            _write_model(partial, shape, weights, target.seed)
        with _replacing(digest) as partial:
            partial.write_text(f"{sha256(path)}  {path.name}\n")
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
    gguf = library("gguf", workload="llama", install=INSTALL)
    np = library("numpy", workload="llama", install=INSTALL)
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


def sha256(path: Path) -> str:
    """Of a file, read once as long as it does not change."""
    status = path.stat()
    return _sha256_of(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _sha256_of(path: Path, _size: int, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


WHOLE_HASH_BYTES = 512 * 2**20
"""Up to here a model is hashed whole (half a second); above, by its size and its two ends."""


def fingerprint(model: Model) -> str:
    """The model's SHA-256; of a large file `ends:` and that of its size, first and last MiB.

    The first MiB holds the metadata, the last one weights: another model or another quantisation
    differs there, and 40 GB are not read before each study.
    """
    if model.bytes <= WHOLE_HASH_BYTES:
        return sha256(model.path)
    digest = hashlib.sha256(str(model.bytes).encode())
    with model.path.open("rb") as file:
        digest.update(file.read(2**20))
        file.seek(-(2**20), os.SEEK_END)
        digest.update(file.read(2**20))
    return f"ends:{digest.hexdigest()}"
