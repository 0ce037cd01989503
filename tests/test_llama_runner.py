"""The llama.cpp runner: a real engine on a real, very small model."""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from contracts.runner_contract import RunnerContract
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuner.models import gguf as gguf_file
from tuner.space import Int, Refused
from tuner.trial import Target

# OpenMP's threads spin while they wait, which is what a user's engine does and what tests that share
# two CPUs with other tests must not do: a pass would take ten times as long. Read when libgomp loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

RUNNER = Path(__file__).parents[1] / "runners" / "llama.py"
TINY = Target(size="tiny", prompts=4, prompt_tokens=16, output_tokens=4)
LOSSY = Target(size="tiny", prompts=4, prompt_tokens=16, output_tokens=4, allow_lossy=True)


def load_runner():
    spec = importlib.util.spec_from_file_location("runner_under_test", RUNNER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def llama():
    return load_runner()


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def in_a_process(code, **environment):
    """Run `code` with the runner loaded as `llama`, in a process of its own."""
    opening = (
        "import sys\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(RUNNER.parents[1])]!r}\n"
        "from test_llama_runner import LOSSY, TINY, gguf_file, load_runner\n"
        "llama = load_runner()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", opening + code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class TestLlama(RunnerContract):
    unloadable: ClassVar = {"flash_attention": "off", "cache_type_v": "q8_0"}
    unreadable: ClassVar = frozenset({"continuous_batching"})

    @pytest.fixture
    def runner(self, llama):
        return llama

    @pytest.fixture
    def target(self):
        return TINY


# --- the generated model


def test_the_same_seed_gives_the_same_bytes_whatever_numpy_or_gguf_is_installed(llama):
    # Written with numpy 2.4.6 and gguf 0.19.0. A new digest means new bytes: raise RECIPE with it.
    digests = {w: gguf_file.sha256(gguf_file.generated(LOSSY, w)) for w in gguf_file.BYTES_PER_WEIGHT}
    assert digests == {
        "F16": "f3e1c92898f7dff95510175b717d2c657c23e87d2c3b100a5be5fcdbc7f3966e",
        "Q8_0": "9bed777c025af4aaf836bac0afe1a9092f57fcd50993fa8038c568b8d7195e13",
        "Q4_0": "b0cddd6b904ccf969c9168068e3b66b6c9b66f6b0b77c2c0d6da2311dc8b9ff2",
    }


def test_another_seed_gives_another_model(llama):
    other = Target(size="tiny", seed=1)
    assert llama.identity(other)["model_sha256"] != llama.identity(TINY)["model_sha256"]


def test_the_weights_have_the_spread_of_a_fresh_llama(llama):
    gguf = pytest.importorskip("gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(gguf_file.generated(LOSSY, "F16")).tensors}
    assert float(tensors["token_embd.weight"].data.std()) == pytest.approx(0.02, rel=0.02)
    assert float(tensors["blk.0.ffn_up.weight"].data.std()) == pytest.approx(64**-0.5, rel=0.02)
    assert float(tensors["blk.1.ffn_down.weight"].data.std()) == pytest.approx(192**-0.5, rel=0.02)
    assert abs(float(tensors["blk.0.attn_q.weight"].data.mean())) < 0.02 * 64**-0.5 * 3
    assert set(tensors["output_norm.weight"].data) == {1.0}


def test_the_default_model_has_160_million_parameters_in_four_bits(llama):
    shape = gguf_file.SIZES["160m"]
    assert shape.parameters == pytest.approx(160e6, rel=0.02)
    model = gguf_file.read(Target())
    assert model.bytes == pytest.approx(shape.parameters * 4.5 / 8, rel=0.02)
    assert (model.architecture, model.layers, model.head_width) == ("llama", 12, 64)


@pytest.mark.parametrize("damage", [b"", b"GGUF and then nothing", None])
def test_a_damaged_generated_model_is_made_again(llama, damage):
    path = gguf_file.generated(TINY, "Q4_0")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    path.write_bytes(flipped if damage is None else damage)
    assert gguf_file.generated(TINY, "Q4_0").read_bytes() == whole


def test_a_whole_generated_model_is_not_written_again(llama):
    before = gguf_file.generated(TINY, "Q4_0").stat()
    after = gguf_file.generated(TINY, "Q4_0").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_digest_beside_the_model_is_one_that_sha256sum_reads(llama):
    path = gguf_file.generated(TINY, "Q4_0")
    line = path.with_name(f"{path.name}.sha256").read_text()
    assert line == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"


def test_only_the_weights_that_are_asked_for_are_written(llama, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    llama.space(LOSSY)
    assert [p.name for p in tmp_path.rglob("*.gguf")] == [gguf_file.generated(LOSSY, "Q4_0").name]


def test_processes_that_generate_at_once_all_get_a_whole_model(llama, tmp_path):
    code = "print(gguf_file.sha256(gguf_file.generated(TINY, 'Q4_0')))"
    processes = [in_a_process(code, XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]
    digests = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert digests == {llama.identity(TINY)["model_sha256"]}
    assert sorted(p.suffix for p in (tmp_path / "tune" / "models").iterdir()) == [".gguf", ".sha256"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n    llama.space(TINY)\nexcept llama.Refused as refused:\n    print(refused)\n"
    )
    said, _ = in_a_process(code, XDG_CACHE_HOME=str(tmp_path)).communicate(timeout=60)
    assert said == (
        f"the generated model needs 1 MB in {tmp_path}/tune/models, which cannot be written "
        "(a write stopped short, as on a full disk); make room there or set XDG_CACHE_HOME to another folder\n"
    )
    assert list((tmp_path / "tune" / "models").iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_one_sentence(llama, monkeypatch, tmp_path):
    (tmp_path / "tune").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Refused, match=f"in {tmp_path}/tune/models, which cannot be written .*XDG_CACHE_HOME"):
        llama.space(TINY)


@pytest.mark.parametrize("value", ["", "relative/folder"])
def test_a_relative_cache_home_is_ignored(llama, monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert gguf_file.cache_folder() / "models" == tmp_path / ".cache" / "tune" / "models"


# --- a model that somebody brings


def gguf_string(text):
    return struct.pack("<Q", len(text)) + text


def gguf(*pairs, version=3, count=None):
    return struct.pack("<4sIQQ", b"GGUF", version, 0, len(pairs) if count is None else count) + b"".join(pairs)


def test_a_newer_version_of_the_format_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(ARCHITECTURE, version=4))
    with pytest.raises(Refused, match=r"expected GGUF of version 2 or 3, got version 4; take a file of version 3"):
        gguf_file.read(Target(model=str(path)))


def other_architecture(whole):
    named = gguf_string(b"general.architecture") + struct.pack("<I", 8)
    renamed = whole.replace(named + gguf_string(b"llama"), named + gguf_string(b"lmaxx"))
    return renamed.replace(b"llama.", b"lmaxx.")


TURNED_DOWN = {
    "cut short": (lambda whole: whole[: len(whole) * 3 // 4], "data is not within the file bounds", "get it again"),
    "another architecture": (other_architecture, "unknown model architecture", "pip install --upgrade xllamacpp"),
    "a tensor of another name": (
        lambda whole: whole.replace(b"blk.1.ffn_down.weight", b"blk.1.ffn_none.weight"),
        "tensor 'blk.1.ffn_down.weight' not found",
        "get it again",
    ),
}


@pytest.mark.parametrize("change", TURNED_DOWN)
def test_a_file_that_the_engine_turns_down_is_told_with_a_way_on(llama, tmp_path, log, change):
    spoil, cause, step = TURNED_DOWN[change]
    path = tmp_path / "model.gguf"
    path.write_bytes(spoil(gguf_file.generated(TINY, "Q4_0").read_bytes()))
    target = replace(TINY, size=None, model=str(path))
    with pytest.raises(RuntimeError) as failed, llama.launch(llama.space(target).default(), target):
        pytest.fail("an engine was yielded")
    assert cause in str(failed.value)
    assert step in str(failed.value)


def test_other_causes_of_the_engine_get_no_advice_about_the_file():
    assert gguf_file.next_step("unable to allocate CUDA0 buffer", "update") == ""


@pytest.mark.parametrize(("mib", "fits"), [(2, True), (1, False)])
def test_weights_and_cache_fit_main_memory(llama, monkeypatch, mib, fits):
    # 0.16 MB of weights, and 2048 tokens of 2 x 2 x 64 half-precision numbers: 1.05 MB.
    monkeypatch.setattr(llama, "memory_bytes", lambda: mib * 2**20)
    told = llama.space(TINY).broken(llama.space(TINY).default())
    assert (told == []) is fits
    assert fits or "(0.00015 GiB with mmap off, else 9e-05 GiB with repack on) fit into the 0.000977 GiB" in told[0]


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"repack": False}, True),
        ({"repack": True}, False),
        ({"mmap": False, "repack": False}, False),
        ({"mmap": False, "repack": True}, False),
    ],
    ids=str,
)
def test_a_file_that_is_larger_than_memory_may_be_mapped_where_nothing_copies_it(llama, monkeypatch, changes, fits):
    # 1.05 MB are the cache, 0.16 MB the file, 0.1 MB of it in blocks that are repacked.
    monkeypatch.setattr(llama, "memory_bytes", lambda: 2048 * 256 * 2 + 10_000)
    space = llama.space(TINY)
    assert (space.broken({**space.default(), **changes}) == []) is fits


@pytest.mark.parametrize("weights", ["Q4_0", "Q8_0", "F16"])
def test_no_more_is_counted_as_copied_than_the_engine_copies(llama, log, weights):
    target = replace(TINY, allow_lossy=True)
    with llama.launch(llama.space(target).complete({"weights": weights}), target):
        pass
    told = Path("/proc/self/fd/2").read_text()
    copied = sum(map(float, re.findall(r"(?:CPU_REPACK|AMX) model buffer size = +([\d.]+) MiB", told)))
    counted = gguf_file.read(target, weights).repacked_bytes / 2**20
    # The engine rounds to hundredths. Blocks of Q4_0 are repacked by every CPU that these wheels are made for.
    assert counted <= copied + 0.005
    assert (counted > 0) is (weights == "Q4_0")


def test_tensors_are_repacked_by_type_shape_and_cpu():
    tensors = [gguf_file.Tensor(name, shape, kind) for name, shape, kind in (
        ("blk.0.ffn_up.weight", (256, 64), 12), ("token_embd.weight", (256, 64), 12), ("odd", (256, 63), 12),
        ("blk.0.ffn_up_exps.weight", (256, 64, 8), 2), ("norm", (256,), 2), ("half", (256, 64), 1),
    )]  # fmt: skip
    q4_k, q4_0 = 256 * 64 // 256 * 144, 256 * 64 * 8 // 32 * 18
    assert gguf_file.repacked_bytes(tensors, frozenset({"avx2"})) == q4_k + q4_0
    assert gguf_file.repacked_bytes(tensors, frozenset({"asimddp"})) == q4_0
    assert gguf_file.repacked_bytes(tensors, frozenset({"sse4_2"})) == 0


def test_a_list_of_tensors_that_is_cut_short_is_for_the_engine_to_refuse(tmp_path):
    whole = gguf_file.read(TINY).path.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: whole.rindex(b"blk.1.") + 3])
    read = gguf_file.read(replace(TINY, size=None, model=str(path)))
    assert (read.layers, read.repacked_bytes) == (2, 0)


ARCHITECTURE = gguf_string(b"general.architecture") + struct.pack("<I", 8) + gguf_string(b"llama")

NOT_A_MODEL = {
    "an empty file": b"",
    "a text": b"# my notes about models\n" * 10,
    "only the magic": b"GGUF",
    "an old version": gguf(ARCHITECTURE, version=1),
    "big-endian": gguf(ARCHITECTURE, version=3 << 24),
    "more pairs than bytes": gguf(ARCHITECTURE, count=2**63),
    "a string longer than the file": gguf(struct.pack("<Q", 2**40) + b"general"),
    "an array longer than the file": gguf(gguf_string(b"a") + struct.pack("<IIQ", 9, 5, 2**62)),
    "strings longer than the file": gguf(gguf_string(b"a") + struct.pack("<IIQQ", 9, 8, 2**62, 2**63)),
    "an unknown type": gguf(gguf_string(b"a") + struct.pack("<II", 99, 0)),
    "a name that is no text": gguf(gguf_string(b"\xff\xfe") + struct.pack("<II", 4, 0)),
    "no architecture": gguf(gguf_string(b"a") + struct.pack("<II", 4, 0)),
    "an architecture that is a number": gguf(gguf_string(b"general.architecture") + struct.pack("<II", 4, 0)),
    "a vocabulary that is a number": gguf(
        ARCHITECTURE,
        gguf_string(b"llama.block_count") + struct.pack("<II", 4, 2),
        gguf_string(b"llama.embedding_length") + struct.pack("<II", 4, 2),
        gguf_string(b"tokenizer.ggml.tokens") + struct.pack("<IQ", 10, 2**60),
    ),
    "no vocabulary": gguf(ARCHITECTURE, gguf_string(b"llama.block_count") + struct.pack("<II", 4, 2)),
}


@pytest.mark.parametrize("content", NOT_A_MODEL.values(), ids=NOT_A_MODEL)
def test_what_is_no_language_model_is_refused_with_a_way_on(llama, tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(Refused, match=r"expected a GGUF language model.*leave --model out") as refused:
        llama.space(Target(model=str(path)))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 4000), value=st.integers(0, 255), end=st.integers(0, 5000))
def test_no_damage_to_a_header_crashes_its_reader(llama, tmp_path, position, value, end):
    content = bytearray(gguf_file.generated(TINY, "Q4_0").read_bytes()[: max(end, position + 1)])
    content[position] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    gguf_file._header_of.cache_clear()
    with contextlib.suppress(Refused):
        assert gguf_file._header(path).path == path


def test_a_missing_model_is_refused_with_a_way_on(llama):
    with pytest.raises(Refused, match=r"--model nowhere.gguf: no such file; leave --model out"):
        llama.space(Target(model="nowhere.gguf"))


def test_a_folder_is_refused_with_the_file_inside(llama, tmp_path):
    (tmp_path / "inside.gguf").touch()
    with pytest.raises(Refused, match=r"got a folder; try --model \S+/inside.gguf"):
        llama.space(Target(model=str(tmp_path)))


def test_a_folder_without_a_model_is_refused(llama, tmp_path):
    with pytest.raises(Refused, match="expected a GGUF file, got a folder"):
        llama.space(Target(model=str(tmp_path)))


def test_a_model_that_cannot_be_read_is_refused_with_the_reason(llama, tmp_path, monkeypatch):
    path = tmp_path / "secret.gguf"
    path.write_bytes(b"GGUF")

    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(llama, "_version", lambda: "0")  # its metadata is a file, too
    monkeypatch.setattr(Path, "open", denied)  # chmod does not stop root
    with pytest.raises(Refused, match=r"secret.gguf: cannot be read \(Permission denied\)"):
        llama.space(Target(model=str(path)))


@pytest.fixture
def own_model(llama, tmp_path):
    path = tmp_path / "my model.gguf"
    path.write_bytes(gguf_file.generated(TINY, "Q4_0").read_bytes())
    return Target(model=str(path), prompts=2, prompt_tokens=8, output_tokens=2, allow_lossy=True)


def test_a_models_own_file_is_measured(llama, own_model, log):
    with llama.launch(llama.space(own_model).default(), own_model) as engine:
        assert engine.run_pass().units == 4


def test_a_models_own_file_has_no_weights_to_choose_from(llama, own_model):
    assert "weights" not in llama.space(own_model).names


def test_a_models_own_file_is_described_by_what_it_is(llama, own_model):
    assert llama.describe(own_model) == "model: my model.gguf (llama, 2 layers, 1 MB)"


def test_a_generated_model_is_described_as_meaningless(llama):
    assert llama.describe(Target()) == (
        "model: generated Llama 160M with random weights (Q4_0, 93 MB): "
        "speed and energy are those of a real 160M model, its text is meaningless"
    )


def test_a_large_model_is_known_by_its_size_and_ends(llama, own_model, monkeypatch, tmp_path):
    monkeypatch.setattr(gguf_file, "WHOLE_HASH_BYTES", 0)
    large = tmp_path / "large.gguf"
    seen = set()
    for middle, last in ((b"a", b"a"), (b"b", b"a"), (b"b", b"b")):
        large.write_bytes(Path(own_model.model).read_bytes() + b"\0" * 2**20 + middle + b"\0" * 2**20 + last)
        gguf_file._header_of.cache_clear()
        seen.add(llama.identity(Target(model=str(large)))["model_sha256"])
    assert len(seen) == 2
    assert all(fingerprint.startswith("ends:") for fingerprint in seen)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size": "70b"}, "--size 70b: expected one of 160m, tiny"),
        ({"model": "a.gguf", "size": "tiny"}, "--size tiny makes a model and --model a.gguf names one"),
        ({"size": "tiny", "prompts": 0}, "--prompts 0: expected at least 1"),
        ({"size": "tiny", "prompt_tokens": 0}, "--prompt-tokens 0: expected at least 1"),
        ({"size": "tiny", "output_tokens": -3}, "--output-tokens -3: expected at least 1"),
        ({"size": "tiny", "prompt_tokens": 4000}, "expected at most 4096 tokens together"),
    ],
)
def test_a_load_that_cannot_be_run_is_refused(llama, changes, sentence):
    with pytest.raises(Refused, match=sentence):
        llama.space(Target(**{"output_tokens": 100, **changes}))


# --- the engine, asked from outside


def test_no_engine_installed_is_answered_with_the_install_command(llama, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(Refused, match="pip install xllamacpp gguf"):
        llama.space(TINY)


def test_no_gguf_installed_is_answered_with_the_install_command(llama, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(Refused, match=r"cannot import gguf .*pip install xllamacpp gguf"):
        llama.space(TINY)


@pytest.mark.parametrize(
    ("probe", "cause", "remedy"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL", "pip install --force-reinstall"),
        ("import no_such_cuda", "No module named 'no_such_cuda'", "pip install --force-reinstall"),
        ("raise ImportError('libgomp.so.1: cannot open shared object file')", "libgomp", "apt-get install libgomp1"),
        ("pass", "", "pip install --force-reinstall"),
    ],
)
def test_an_engine_that_does_not_run_here_is_refused_with_cause_and_remedy(llama, monkeypatch, probe, cause, remedy):
    monkeypatch.setattr(llama, "_PROBE", probe)
    llama._build.cache_clear()
    with pytest.raises(Refused, match=rf"does not run on this machine \(.*{cause}.*\); try: {remedy}"):
        llama.space(TINY)


def test_the_tuners_own_process_never_loads_the_engine():
    code = (
        "space = llama.space(TINY)\n"
        "llama.identity(TINY), llama.describe(TINY), llama.command(space.default(), TINY)\n"
        "print('xllamacpp' in sys.modules)"
    )
    assert in_a_process(code).communicate(timeout=60)[0] == "False\n"


# --- the space


def test_lossy_parameters_appear_when_they_are_allowed(llama):
    space = llama.space(LOSSY)
    assert [p.name for p in space.parameters if p.effect == "lossy"] == ["weights", "cache_type_k", "cache_type_v"]


def test_a_head_that_quantised_caches_cannot_hold_gets_no_cache_types(llama, monkeypatch):
    monkeypatch.setitem(gguf_file.SIZES, "odd", gguf_file.Shape("odd", 96, 1, 2, 96, 512, 1024))
    assert "cache_type_v" not in llama.space(Target(size="odd", allow_lossy=True)).names


def test_layers_can_be_moved_where_the_build_can_offload(llama, monkeypatch):
    monkeypatch.setattr(llama, "_build", lambda: llama._Build(threads=2, offload_devices=("CUDA0",)))
    layers = llama.space(TINY)["gpu_layers"]
    assert isinstance(layers, Int)
    assert (layers.low, layers.high, layers.default, layers.lever) == (0, 3, 3, "offload")
    assert "CUDA0" in layers.meaning


def test_layers_stay_where_the_build_cannot_offload(llama, monkeypatch):
    monkeypatch.setattr(llama, "_build", lambda: llama._Build(threads=2, offload_devices=()))
    assert "gpu_layers" not in llama.space(TINY).names


@pytest.mark.parametrize(
    ("load", "parallel", "n_ubatch", "n_batch"),
    [
        ({"prompts": 8, "prompt_tokens": 96}, "1..8", 1024, 2048),
        ({"prompts": 1, "prompt_tokens": 16}, "1..4", 512, 2048),
        ({"prompts": 64, "prompt_tokens": 100}, "1..64", 8192, 8192),
        ({"prompts": 1000, "prompt_tokens": 1}, "1..256", 1024, 2048),
    ],
)
def test_ranges_reach_as_far_as_the_load_can_use(llama, load, parallel, n_ubatch, n_batch):
    space = llama.space(Target(size="tiny", **load))
    assert space["parallel"].range == parallel
    assert space["n_ubatch"].values[-1] == n_ubatch
    assert space["n_batch"].values[-1] == n_batch


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_batch": 128}, "n_ubatch <= n_batch"),
        ({"parallel": 40, "n_batch": 32, "n_ubatch": 32}, "parallel <= n_batch"),
        ({"cache_type_v": "q8_0"}, "a quantised cache_type_v needs flash_attention on"),
        ({"cache_type_v": "q4_0", "flash_attention": "off"}, "a quantised cache_type_v needs flash_attention on"),
    ],
)
def test_rules_of_the_engine_are_constraints_of_the_space(llama, changes, sentence):
    space = llama.space(Target(size="tiny", prompts=64, allow_lossy=True))
    with pytest.raises(Refused, match=f"broken constraint: {sentence}"):
        space.complete(changes)
    assert len(space.broken({**space.default(), **changes})) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_type_k": "q4_0"},
        {"cache_type_v": "q8_0", "flash_attention": "on"},
        {"n_batch": 128, "n_ubatch": 128},
        {"parallel": 32, "n_batch": 32, "n_ubatch": 32},
    ],
)
def test_configurations_on_the_edge_of_a_rule_load(llama, log, changes):
    target = Target(size="tiny", prompts=32, prompt_tokens=4, output_tokens=2, allow_lossy=True)
    with llama.launch(llama.space(target).complete(changes), target) as engine:
        assert engine.run_pass().units == 64


def test_more_slots_than_the_batch_holds_abort_the_engine():
    """The constraint is a rule of the engine: this fails when llama.cpp learns better."""
    code = (
        "target = llama.Target(size='tiny', prompts=40)\n"
        "config = {**llama.space(target).default(), 'parallel': 40, 'n_batch': 32, 'n_ubatch': 32}\n"
        "with llama.launch(config, target):\n    print('loaded')\n"
    )
    process = in_a_process(code)
    said, log = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGABRT
    assert "GGML_ASSERT" in log
    assert said == ""


def test_the_defaults_are_the_engines_own(llama, log):
    xllamacpp = pytest.importorskip("xllamacpp")
    default = llama.space(LOSSY).default()
    own = xllamacpp.CommonParams()
    assert (default["n_batch"], default["n_ubatch"]) == (own.n_batch, own.n_ubatch)
    assert default["continuous_batching"] == own.cont_batching
    assert default["repack"] == (not own.no_extra_bufts)
    assert own.flash_attn_type.name == f"LLAMA_FLASH_ATTN_TYPE_{default['flash_attention'].upper()}"
    assert own.cache_type_k.name == f"GGML_TYPE_{default['cache_type_k'].upper()}"
    assert own.cache_type_v.name == f"GGML_TYPE_{default['cache_type_v'].upper()}"

    # What the server decides by itself: -np -1, -t -1.
    own.model.path = str(gguf_file.generated(TINY, "Q4_0"))
    own.n_parallel = -1
    own.n_ctx = 1024
    own.verbosity = 4
    own.ui = own.fit_params = False
    said = llama._Log()
    server = xllamacpp.Server(own)
    server.handle_completions({"prompt": [300], "n_predict": 1})
    del server
    decided = said.read_back()
    automatic = ("parallel", "kv_unified", "threads", "threads_batch", "mmap")
    assert {name: decided[name] for name in automatic} == {name: default[name] for name in automatic}


# --- running it


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": 2, "n_batch": 64, "n_ubatch": 64}, {"parallel": 2, "n_ctx": 512}),
        ({"threads": 1}, {"threads": 1}),
        ({"threads_batch": 1}, {"threads_batch": 1}),
        ({"repack": False}, {"repack": False}),
        ({"weights": "F16"}, {"weights": "F16", "repack": False}),
        ({"weights": "Q8_0"}, {"weights": "Q8_0"}),
        ({"flash_attention": "off"}, {"flash_attention": "off"}),
        ({"flash_attention": "on"}, {"flash_attention": "on"}),
        ({"flash_attention": "auto"}, {"flash_attention": "on"}),
        ({"n_ubatch": 64}, {"n_ubatch": 64}),
        ({"n_batch": 512}, {"n_batch": 512}),
        ({"n_batch": 2048}, {"n_batch": 2048, "n_ctx": 2048}),
        ({"kv_unified": False}, {"kv_unified": False, "n_ctx": 2048}),
        ({"cache_type_k": "q8_0"}, {"cache_type_k": "q8_0", "cache_type_v": "f16"}),
        (
            {"cache_type_v": "q4_0", "flash_attention": "on"},
            {"cache_type_k": "f16", "cache_type_v": "q4_0", "flash_attention": "on"},
        ),
        ({"mmap": False}, {"mmap": False}),
    ],
    ids=str,
)
def test_what_the_engine_runs_with_is_read_back(llama, log, changes, said):
    config = llama.space(LOSSY).complete(changes)
    with llama.launch(config, LOSSY) as engine:
        effective = engine.effective
    assert {name: effective[name] for name in said} == said


def test_nothing_is_read_back_from_a_log_that_is_no_file(llama, own_model):
    code = (
        "with llama.launch(llama.space(TINY).default(), TINY) as engine:\n"
        "    print(dict(engine.effective), engine.run_pass().units)\n"
    )
    assert in_a_process(code).communicate(timeout=60)[0] == "{} 16\n"


def test_layers_on_a_gpu_are_read_back(llama):
    assert llama.read_back("load_tensors: offloaded 13/13 layers to GPU\n") == {"gpu_layers": 13}


def test_an_automatic_choice_that_the_device_does_not_support_is_read_back_as_off(llama):
    log = (
        "I llama_context: flash_attn            = auto\n"
        "W resolve_fused_ops: Flash Attention not supported, set to disabled\n"
    )
    assert llama.read_back(log) == {"flash_attention": "off"}


def test_passes_are_the_same_load(llama, log):
    with llama.launch(llama.space(TINY).default(), TINY) as engine:
        first = [engine._server.handle_completions(r)["choices"][0]["text"] for r in engine._requests]
        other = [{**r, "seed": 99} for r in engine._requests]  # greedy: no seed has a say
        second = [engine._server.handle_completions(r)["choices"][0]["text"] for r in other]
    assert first == second
    assert len(set(first)) > 1


def test_the_output_keeps_its_length_where_the_model_would_have_ended(llama, log):
    with llama.launch(llama.space(TINY).default(), TINY) as engine:
        eager = {**engine._requests[0], "logit_bias": [[2, 100.0]]}  # 2 is </s>
        ended, kept = (engine._server.handle_completions(r) for r in ({**eager, "ignore_eos": False}, eager))
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert (kept["choices"][0]["finish_reason"], kept["timings"]["predicted_n"]) == ("length", 4)


def test_the_engine_may_adjust_nothing_and_serves_no_pages(llama):
    xllamacpp = pytest.importorskip("xllamacpp")
    params = llama._parameters(xllamacpp, llama.space(TINY).default(), TINY, gguf_file.read(TINY))
    assert (params.fit_params, params.ui, params.cache_ram_mib) == (False, False, 0)
    assert len(params.api_keys) == 1


def test_prompts_are_fixed_by_the_seed_and_hold_ordinary_tokens_only(llama):
    tokens = gguf_file.read(TINY).tokens
    assert min(tokens) == 259  # after <unk>, <s>, </s> and 256 bytes
    first = llama._requests(TINY, tokens)
    assert first == llama._requests(TINY, tokens)
    assert first != llama._requests(Target(size="tiny", prompts=4, prompt_tokens=16, seed=1), tokens)
    assert all(set(request["prompt"]) <= set(tokens) for request in first)


def test_the_context_always_holds_every_slots_request(llama, log):
    # 250 + 6 fill a slot to its last cell.
    target = Target(size="tiny", prompts=3, prompt_tokens=250, output_tokens=6)
    for unified in (False, True):
        changes = {"parallel": 3, "kv_unified": unified, "n_batch": 32, "n_ubatch": 32}
        config = llama.space(target).complete(changes)
        with llama.launch(config, target) as engine:
            assert engine.effective["n_ctx"] == 768
            assert engine.run_pass().units == 18


def test_a_refused_request_is_an_error_with_the_engines_words(llama, log, monkeypatch):
    target = Target(size="tiny", prompts=2, prompt_tokens=300, output_tokens=2)
    config = llama.space(target).default()
    monkeypatch.setattr(llama, "context", lambda *_: 1024)
    with (
        pytest.raises(RuntimeError, match=r"refused a request: request \(300 tokens\) exceeds the available context"),
        llama.launch({**config, "kv_unified": False}, target),
    ):
        pytest.fail("an engine was yielded")


def test_what_cannot_be_loaded_is_an_error_with_the_first_line_of_the_log(llama, log):
    config = {**llama.space(LOSSY).default(), "flash_attention": "off", "cache_type_v": "q8_0"}
    with (
        pytest.raises(RuntimeError, match=r"cannot load this configuration: .*quantized V cache requires flash_attn"),
        llama.launch(config, LOSSY),
    ):
        pytest.fail("an engine was yielded")


# --- how good it is


JUDGED = replace(LOSSY, quality=True)


def judged(llama, target, reference, **changes):
    with llama.launch(llama.space(target).complete(changes), target) as engine:
        return engine.quality(reference)


def test_the_default_has_no_loss_and_the_likelihood_of_a_model_that_knows_nothing(llama, log, tmp_path):
    figures = judged(llama, JUDGED, tmp_path / "reference")
    assert figures["quality_loss"] == 0
    # A uniform guess among 1024 tokens costs ln 1024 nats; logits of variance 1 know half a nat more.
    assert figures["nll_nats_per_token"] == pytest.approx(math.log(1024) - 0.5, abs=0.3)


def test_the_same_configuration_again_loses_nothing_and_one_with_fewer_bits_something(llama, log, tmp_path):
    reference = tmp_path / "reference"
    first = judged(llama, JUDGED, reference)["nll_nats_per_token"]
    assert judged(llama, JUDGED, reference) == {"nll_nats_per_token": first, "quality_loss": 0.0}
    assert abs(judged(llama, JUDGED, reference, parallel=1)["quality_loss"]) < 2e-3
    few = judged(llama, JUDGED, reference, cache_type_k="q4_0", cache_type_v="q4_0", flash_attention="on")
    assert abs(few["quality_loss"]) > 1e-4
    assert abs(judged(llama, JUDGED, reference, weights="F16")["quality_loss"]) > 1e-3


def test_the_likelihood_of_a_token_that_was_forced_is_the_one_it_has_when_nothing_is_forced(llama, log, tmp_path):
    with llama.launch(llama.space(JUDGED).default(), JUDGED) as engine:
        engine.quality(tmp_path / "reference")
        kept = json.loads((tmp_path / "reference").read_text())
        row, context = kept["rows"][0], kept["context"]
        forced = engine._forced.generated(
            [row[:context]], [{"grammar": " ".join(["root ::=", *(f"<[{i}]>" for i in row[context:])])}], 72
        )
        for at in (0, 7, 71):
            asked = {"prompt": row[: context + at], "n_predict": 1, "logprobs": 1024, "cache_prompt": False}
            # A drawn end of sequence would bring no content, and no figures with it.
            asked |= {"ignore_eos": True, "temperature": 0}
            content = engine._answer(asked)["choices"][0]["logprobs"]["content"][0]
            free = {top["id"]: top["logprob"] for top in content["top_logprobs"]}
            token, logprob = forced[0][at]
            assert token == row[context + at]
            # Prompts are computed in batches and answers one by one, which rounds differently.
            assert logprob == pytest.approx(free[token], abs=0.02)


def test_a_model_file_is_judged_by_a_fixed_text(llama, log, tmp_path):
    target = Target(
        model=str(gguf_file.generated(TINY, "F16")), prompts=2, prompt_tokens=8, output_tokens=2, quality=True
    )
    assert judged(llama, target, tmp_path / "reference")["quality_loss"] == 0
    kept = json.loads((tmp_path / "reference").read_text())
    assert kept["source"] == "a fixed text"
    assert len({len(row) for row in kept["rows"]}) == 1


class OtherTokens:
    """Answers with tokens that nobody asked for, or with none."""

    def __init__(self, content):
        self.content = content

    def handle_completions(self, request):
        return {"choices": [{"logprobs": self.content}]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "gave log-probabilities that cannot be read"),
        ({"content": []}, "generated 0 tokens to be judged instead of 72"),
        ({"content": [{"id": -1, "logprob": -1.0}] * 72}, "did not follow the reference"),
    ],
)
def test_output_that_cannot_be_judged_is_one_sentence(llama, tmp_path, content, sentence):
    (tmp_path / "reference").write_text(
        json.dumps({"rows": [list(range(300, 396))], "context": 24, "nll_nats_per_token": 1.0})
    )
    engine = llama.LlamaServer(OtherTokens(content), JUDGED, [], gguf_file.read(TINY), "")
    with pytest.raises(RuntimeError, match=sentence):
        engine.quality(tmp_path / "reference")


class MiscountingServer:
    """The engine's answer to a request of `TINY`, with one count changed."""

    def __init__(self, **changes):
        self.count = {"prompt_n": 16, "predicted_n": 4, "completion_tokens": 4, "cached_tokens": 0, **changes}

    def handle_completions(self, request):
        count = self.count
        return {
            "timings": {**count, "prompt_ms": 1.0, "predicted_ms": 1.0},
            "usage": {
                "completion_tokens": count["completion_tokens"],
                "prompt_tokens_details": {"cached_tokens": count["cached_tokens"]},
            },
        }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"predicted_n": 3}, "3 output tokens instead of 4"),
        ({"completion_tokens": 5}, "5 completion tokens instead of 4"),
        ({"prompt_n": 17}, "17 prompt tokens instead of 16"),
        ({"cached_tokens": 12, "prompt_n": 4}, "12 tokens taken from a prompt cache instead of 0"),
    ],
)
def test_other_work_than_was_asked_for_is_an_error(llama, changes, sentence):
    engine = llama.LlamaServer(
        MiscountingServer(**changes), TINY, llama._requests(TINY, (300,)), gguf_file.read(TINY), ""
    )
    with pytest.raises(RuntimeError, match=sentence):
        engine.run_pass()


def test_the_right_work_is_no_error(llama):
    engine = llama.LlamaServer(MiscountingServer(), TINY, llama._requests(TINY, (300,)), gguf_file.read(TINY), "")
    assert engine.run_pass().units == 16


# --- the command


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"parallel": 8}, ["-np", "8", "--kv-unified"]),
        ({"kv_unified": False}, ["-np", "4", "--no-kv-unified"]),
        ({"flash_attention": "off"}, ["-fa", "off"]),
        ({"n_ubatch": 64}, ["-ub", "64"]),
        ({"n_batch": 512}, ["-b", "512"]),
        ({"repack": False}, ["--no-repack"]),
        ({"continuous_batching": False}, ["--no-cont-batching"]),
        ({"mmap": False}, ["--load-mode", "none"]),
        ({"cache_type_k": "q8_0"}, ["-ctk", "q8_0"]),
        ({"flash_attention": "on", "cache_type_v": "q4_0"}, ["-fa", "on", "-ctv", "q4_0"]),
        # The engine's own batch threads follow its threads: both are named or the command means something else.
        ({"threads": 1}, ["-t", "1", "-tb", "2"]),
        ({"threads_batch": 1}, ["-tb", "1"]),
        ({"threads": 1, "threads_batch": 1}, ["-t", "1"]),
        ({"gpu_layers": 1}, []),
    ],
    ids=str,
)
def test_the_command_names_what_differs_from_the_default(llama, monkeypatch, changes, words):
    target = Target(size="tiny", allow_lossy=True)
    monkeypatch.setattr(llama, "_build", lambda: llama._Build(threads=2, offload_devices=("CUDA0",)))
    config = llama.space(target).complete(changes)
    slots = config["parallel"]
    model = str(gguf_file.generated(target, "Q4_0"))
    # Where there is a GPU the layers on it are always named.
    at = words.index("--kv-unified" if config["kv_unified"] else "--no-kv-unified") + 1 if "-np" in words else 0
    words = [*words[:at], "-ngl", str(config["gpu_layers"]), *words[at:]]
    expected = ["-m", model, "-c", str(max(256 * slots, config["n_batch"])), "--fit", "off", *words]
    expected += ["--port", "8080", "--host", "127.0.0.1"]
    assert shlex.split(llama.command(config, target))[1:] == expected


def test_the_command_names_the_file_of_the_weights(llama):
    config = llama.space(LOSSY).complete({"weights": "Q8_0"})
    assert "-q8_0-" in llama.command(config, LOSSY)


def test_a_path_with_a_space_is_quoted(llama, own_model):
    command = llama.command(llama.space(own_model).default(), own_model)
    assert f"'{own_model.model}'" in command
    assert json.dumps(own_model.model)[1:-1] in shlex.split(command)
