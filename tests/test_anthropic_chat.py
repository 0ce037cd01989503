"""Anthropic's Messages over real HTTP: the contract of every provider, and what is this dialect's own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from contracts.chat_contract import HELLO, KEY, SCHEMA, ProviderContract
from fakes.providers import Provider, Step, answer

from tuner.chats.anthropic_chat import AnthropicChat
from tuner.trial import Chat, Message


class TestAnthropic(ProviderContract):
    name = "anthropic:m"
    path = "/v1/messages"
    variable = "ANTHROPIC_API_KEY"

    def open(self, url: str, *, key: str | None = KEY, **more: Any) -> Chat:
        return AnthropicChat("m", key=key, base_url=url, **more)


def test_system_messages_travel_apart_from_the_turns() -> None:
    with Provider([answer("a")]) as provider:
        chat = AnthropicChat("m", key=KEY, base_url=provider.url)
        chat.reply(
            [Message("system", "s"), Message("user", "u"), Message("assistant", "a"), Message("user", "v")], None
        )
    (request,) = provider.requests
    assert request.path == "/v1/messages"
    assert request.body == {
        "model": "m",
        "max_tokens": 16_000,
        "system": "s",
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "v"},
        ],
    }


def test_without_a_system_message_no_system_is_sent() -> None:
    with Provider([answer("a")]) as provider:
        AnthropicChat("m", key=KEY, base_url=provider.url).reply(HELLO, None)
    assert "system" not in provider.requests[0].body


def test_a_schema_is_sent_as_the_output_format() -> None:
    with Provider([answer("a")]) as provider:
        AnthropicChat("m", key=KEY, base_url=provider.url).reply(HELLO, SCHEMA)
    assert provider.requests[0].body["output_config"] == {"format": {"type": "json_schema", "schema": SCHEMA}}


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_an_address_leads_to_the_same_path_with_v1_and_without(ending: str) -> None:
    with Provider([answer("a")]) as provider:
        AnthropicChat("m", key=KEY, base_url=f"{provider.url.removesuffix('/v1')}{ending}").reply(HELLO, None)
    assert provider.requests[0].path == "/v1/messages"


def test_several_blocks_of_text_are_one_answer() -> None:
    blocks = [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}, 7]
    with Provider([Step(body=json.dumps({"content": blocks}))]) as provider:
        reply = AnthropicChat("m", key=KEY, base_url=provider.url).reply(HELLO, None)
    assert (reply.text, reply.model) == ("ab", "m")


def test_the_providers_own_address_is_named_in_errors() -> None:
    assert "api.anthropic.com" in AnthropicChat("m", key=KEY)._who
