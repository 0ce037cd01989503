"""The options that say what is run: each shipped runner heeds one, or says at once that it has no use for it."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from commands import settle_in
from commands import typed as tune

from tuner.files import load_runner
from tuner.space import Refused
from tuner.trial import OPTIONS, Target, refuse_unused

RUNNERS = Path(__file__).parents[1] / "runners"
WORKLOADS = sorted(path.stem.replace("_", "-") for path in RUNNERS.glob("*.py"))

GIVEN = {
    "size": "tiny",
    "url": "http://127.0.0.1:9/v1",
    "spec": "bench.toml",
    "dummy_weights": True,
    "engine_args": ("--flag",),
    "request_rate": 2.5,
    "prompt_tokens": 13,
    "output_tokens": 11,
    "pixels": 128,
}
"""A value for each option, other than its default."""

HEEDED_BY_ALL = {"model", "prompts", "seed"}
NO_OPTIONS = {"allow_lossy", "quality"}
"""What `tune run` sets by itself, or says what may change rather than what is run."""


def test_every_field_of_a_target_is_an_option_that_is_judged():
    assert {f.name for f in fields(Target)} == {*OPTIONS, *HEEDED_BY_ALL, *NO_OPTIONS}
    assert set(GIVEN) == set(OPTIONS)


def test_every_workload_that_is_named_is_shipped():
    assert {name for option in OPTIONS.values() for name in option.taken_by} <= set(WORKLOADS)


def source(workload):
    return (RUNNERS / f"{workload.replace('-', '_')}.py").read_text()


UNUSED = [(w, name) for w in WORKLOADS for name in OPTIONS if w not in OPTIONS[name].taken_by]
USED = [(w, name) for w in WORKLOADS for name in OPTIONS if w in OPTIONS[name].taken_by]


@pytest.mark.parametrize(("workload", "name"), UNUSED)
def test_an_option_that_a_runner_has_no_use_for_is_refused_before_anything_starts(workload, name, monkeypatch):
    # Nothing is installed, nobody listens: the refusal comes first.
    monkeypatch.setenv("PATH", "/nowhere")
    runner = load_runner(RUNNERS / f"{workload.replace('-', '_')}.py")
    with pytest.raises(Refused) as refused:
        runner.space(replace(Target(), **{name: GIVEN[name]}))
    told = str(refused.value)
    assert told.startswith(f"{OPTIONS[name].flag}")
    assert f"the {workload} workload has no use for it" in told
    assert all(taker in told for taker in OPTIONS[name].taken_by)
    value = GIVEN[name]
    assert value is True or str(value[0] if isinstance(value, tuple) else value) in told
    assert "\n" not in told


SHARED = {
    "request_rate": ("Load.of(", "concurrency("),
    "prompt_tokens": ("Load.of(", "LOAD"),
    "output_tokens": ("Load.of(", "LOAD"),
    "size": ("gguf.read(", "hugging_face.read("),
    "dummy_weights": ("hugging_face.is_dummy(",),
}
"""Where the parts that runners share read an option for them."""


@pytest.mark.parametrize(("workload", "name"), USED)
def test_an_option_that_is_not_refused_is_read(workload, name):
    text = source(workload)
    assert f"target.{name}" in text or any(call in text for call in SHARED.get(name, ()))


@pytest.mark.parametrize(("workload", "name"), USED)
def test_an_option_that_a_runner_heeds_passes(workload, name):
    refuse_unused(replace(Target(), **{name: GIVEN[name]}), workload)


def test_all_useless_options_are_told_at_once():
    with pytest.raises(Refused, match=r"--url .*--dummy-weights: .*--pixels 128: "):
        refuse_unused(Target(url="http://x/v1", dummy_weights=True, pixels=128), "llama")


def test_an_option_at_its_default_counts_as_left_out():
    refuse_unused(Target(pixels=256, prompt_tokens=96, engine_args=()), "llama")


def test_a_model_whose_default_does_not_fit_ends_in_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    settle_in(tmp_path, monkeypatch)
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 16384}
    shape |= {"num_hidden_layers": 1000, "num_attention_heads": 128, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    words = ["--model", tmp_path, "--dummy-weights", "--trials", 3, "--batch", "--proposer", "rules"]
    done = tune("run", "--workload", "transformers", *words)
    assert (done.returncode, done.stdout) == (2, "")
    told = done.stderr.strip()
    assert "weights and cache fit into" in told
    assert "take a smaller model or load" in told
    assert "\n" not in told
    assert not Path("results").exists()
