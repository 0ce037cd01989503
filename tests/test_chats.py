"""Chats by name: what a person types, and what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from contracts.chat_contract import HELLO, KEY
from fakes import providers
from fakes.providers import Provider, answer

from tuner.chats import DEFAULT_MODELS, from_environment, open_chat
from tuner.space import Refused


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith(("OPENAI_", "ANTHROPIC_", "TUNE_")) or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("spec", "refusal"),
    [
        ("", "expected openai:MODEL, anthropic:MODEL or paste"),
        ("gemini:pro", "no such chat; expected openai:MODEL"),
        ("opanai:gpt", "did you mean openai?"),
        ("past", "did you mean paste?"),
        ("paste:now", "expected openai:MODEL"),
        ("openai", f"expected openai:MODEL, for example openai:{DEFAULT_MODELS['openai']}"),
        ("openai:", "expected openai:MODEL"),
        ("anthropic: ", "expected anthropic:MODEL"),
        ("openai:two words", "expected openai:MODEL"),
        ("openai:a\x1b[2J", "expected openai:MODEL"),
        ("paste", "needs a person"),
        ("openai:m", "set OPENAI_API_KEY, or name a server that needs none with --base-url"),
        ("anthropic:m", "set ANTHROPIC_API_KEY"),
    ],
)
def test_what_names_no_chat_is_refused_with_the_choices(spec: str, refusal: str) -> None:
    with pytest.raises(Refused) as caught:
        open_chat(spec)
    assert refusal in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "url", ["localhost:11434", "ftp://host", "http://", "http://host:port", "http://a b", "http://[", ""]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(Refused, match=r"--base-url .*: expected an address like http://localhost:11434/v1"):
        open_chat("openai:m", base_url=url)


def test_an_address_in_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost")
    with pytest.raises(Refused, match="OPENAI_BASE_URL"):
        open_chat("openai:m")


@pytest.mark.parametrize("key", ["sk-secret\nsecond-line", "sk secret", "sk-secrét"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(Refused, match="OPENAI_API_KEY holds a character") as caught:
        open_chat("openai:m")
    assert "secr" not in str(caught.value)


@pytest.mark.parametrize(("provider", "variable"), [("openai", "OPENAI"), ("anthropic", "ANTHROPIC")])
def test_key_and_address_come_from_the_environment(
    provider: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{variable}_API_KEY", f" {KEY}\n")
    with Provider([answer("a")]) as server:
        monkeypatch.setenv(f"{variable}_BASE_URL", server.url)
        assert open_chat(f"{provider}:llama3:8b").reply(HELLO, None).text == "a"
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert server.requests[0].body["model"] == "llama3:8b"


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_local_server_needs_no_key(provider: str) -> None:
    with Provider([answer("a")]) as server:
        assert open_chat(f"{provider}:m", base_url=server.url).reply(HELLO, None).text == "a"


def test_a_person_can_be_the_chat() -> None:
    assert open_chat(" paste ", ask_person=lambda prompt: f"re: {prompt}").reply(HELLO, None).text == "re: hello"


@pytest.mark.parametrize(
    ("environment", "spec"),
    [
        ({}, None),
        ({"OPENAI_API_KEY": ""}, None),
        ({"OPENAI_API_KEY": "k"}, f"openai:{DEFAULT_MODELS['openai']}"),
        ({"ANTHROPIC_API_KEY": "k"}, f"anthropic:{DEFAULT_MODELS['anthropic']}"),
        ({"ANTHROPIC_API_KEY": "k", "OPENAI_API_KEY": "k"}, f"openai:{DEFAULT_MODELS['openai']}"),
        ({"TUNE_LLM": "anthropic:x", "OPENAI_API_KEY": "k"}, "anthropic:x"),
        ({"TUNE_LLM": " "}, None),
    ],
)
def test_a_key_in_the_environment_picks_its_provider(
    environment: dict[str, str], spec: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert from_environment() == spec


def test_default_models_are_among_those_that_the_sdks_name() -> None:
    import typing

    from anthropic.types.model_param import ModelParam
    from openai.types.shared.chat_model import ChatModel

    assert DEFAULT_MODELS["openai"] in typing.get_args(ChatModel)
    assert DEFAULT_MODELS["anthropic"] in typing.get_args(typing.get_args(ModelParam)[0])


def test_naming_a_chat_imports_no_sdk() -> None:
    code = "import sys, tuner.chats; tuner.chats.from_environment(); print({'openai', 'anthropic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_the_fake_provider_serves_other_processes(tmp_path: Path) -> None:
    script, port_file = tmp_path / "replies.json", tmp_path / "port"
    script.write_text(json.dumps([{"text": "from afar"}]))
    server = subprocess.Popen([sys.executable, providers.__file__, "--port-file", port_file, "--script", script])
    try:
        while not port_file.exists():
            assert server.poll() is None
            time.sleep(0.01)
        root = f"http://127.0.0.1:{port_file.read_text()}"
        assert open_chat("openai:m", base_url=f"{root}/v1").reply(HELLO, None).text == "from afar"
        with urllib.request.urlopen(f"{root}/requests") as answer:  # noqa: S310 the address is ours
            (request,) = json.load(answer)
        assert request["body"]["messages"] == [{"role": "user", "content": "hello"}]
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("url", ["http://me:secret@127.0.0.1:1/v1", "http://127.0.0.1:1/v1?key=secret"])
def test_an_address_that_holds_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(Refused, match="without a user, password or query") as refused:
        open_chat("openai:m", base_url=url)
    assert "secret" not in str(refused.value)
