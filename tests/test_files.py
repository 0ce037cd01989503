from pathlib import Path

import pytest

from tuner.files import find, load_runner, names, shipped
from tuner.space import Refused


def test_shipped_prompts_and_runners_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("prompts", "enhanced").name == "enhanced.md.j2"
    assert find("runners", "llama").name == "llama.py"
    assert {"baseline", "enhanced"} <= set(names("prompts"))


def test_a_file_in_the_current_folder_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    own = tmp_path / "prompts" / "enhanced.md.j2"
    own.write_text("mine")
    assert find("prompts", "enhanced") == own


@pytest.mark.parametrize("name", ["./own.md.j2", "own.md.j2", "{tmp}/own.md.j2"])
def test_a_path_is_taken_as_it_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.md.j2").write_text("mine")
    assert find("prompts", name.format(tmp=tmp_path)) == tmp_path / "own.md.j2"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("enhancd", r"unknown prompt \"enhancd\"; did you mean enhanced\? \(there is baseline, enhanced"),
        ("no/such.md.j2", "no such prompt file"),
        ("../../etc/passwd", "no such prompt file"),
    ],
)
def test_what_is_not_there_is_refused_with_what_there_is(tmp_path, monkeypatch, name, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=sentence):
        find("prompts", name)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("x = 1", "missing: space, identity, launch, command"),
        ("def space(t): ...\ndef identity(t): ...\ndef launch(c, t): ...", "missing: command"),
        ("import no_such_module_at_all", "does not load .ModuleNotFoundError"),
        ("syntax error", "does not load .SyntaxError"),
    ],
)
def test_a_file_that_is_no_runner_is_refused_in_one_sentence(tmp_path, code, sentence):
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(Refused, match=sentence):
        load_runner(path)


def test_a_runner_may_define_dataclasses(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int = 0\n"
        "def space(t): ...\ndef identity(t): ...\ndef launch(c, t): ...\ndef command(c, t): ...\n"
    )
    assert load_runner(path).A().x == 0


def test_a_runner_that_starts_no_engine_has_a_client_in_place_of_a_command(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def space(t): ...\ndef identity(t): ...\ndef launch(c, t): ...\ndef client(c, t, s): ...\n")
    assert not hasattr(load_runner(path), "command")


@pytest.mark.parametrize(("kind", "name"), [("prompts", "enhanced"), ("runners", "llama")])
def test_what_came_with_tune_is_known_as_such_in_a_checkout_too(kind, name):
    assert shipped(find(kind, name, local=False))
    assert not shipped(Path(__file__))


def test_the_engine_that_tests_use_is_a_runner():
    assert callable(load_runner(Path(__file__).parent / "fakes" / "engine.py").launch)
