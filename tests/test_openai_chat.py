"""Chat Completions over real HTTP: the contract of every provider, and what is this dialect's own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from contracts.chat_contract import HELLO, KEY, SCHEMA, ProviderContract
from fakes.providers import Provider, Step, answer, failure

from tuner.chats.openai_chat import OpenAIChat
from tuner.trial import Chat, ChatError, Message


class TestOpenAI(ProviderContract):
    name = "openai:m"
    path = "/v1/chat/completions"
    variable = "OPENAI_API_KEY"

    def open(self, url: str, *, key: str | None = KEY, **more: Any) -> Chat:
        return OpenAIChat("m", key=key, base_url=url, **more)


def completion(message: dict[str, object], **more: object) -> Step:
    return Step(body=json.dumps({"choices": [{"index": 0, "message": message}], **more}))


def read(step: Step) -> Any:
    with Provider([step]) as provider:
        return OpenAIChat("m", key=KEY, base_url=provider.url).reply(HELLO, None)


def test_a_request_holds_nothing_that_a_compatible_server_could_refuse() -> None:
    with Provider([answer("a")]) as provider:
        chat = OpenAIChat("m", key=KEY, base_url=provider.url)
        chat.reply([Message("system", "s"), Message("user", "u")], None)
    (request,) = provider.requests
    assert request.path == "/v1/chat/completions"
    assert request.body == {
        "model": "m",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
    }


def test_a_schema_is_asked_for_in_strict_mode() -> None:
    with Provider([answer("a")]) as provider:
        OpenAIChat("m", key=KEY, base_url=provider.url).reply(HELLO, SCHEMA)
    assert provider.requests[0].body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
    }


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"role": "assistant", "content": None, "refusal": "I would rather not"}, "I would rather not"),
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant", "content": "a", "reasoning_content": "hm"}, "a"),
    ],
    ids=["parts", "refusal", "nothing", "reasoning"],
)
def test_a_message_of_any_kind_is_read(message: dict[str, object], text: str) -> None:
    assert read(completion(message)).text == text


def test_a_server_that_does_not_name_its_model_means_the_one_that_was_asked() -> None:
    assert read(completion({"content": "a"})).model == "m"


@pytest.mark.parametrize(
    "usage",
    [None, [], {"prompt_tokens": None}, {"prompt_tokens": "many"}, {"prompt_tokens": -1}, {"prompt_tokens": True}],
)
def test_a_token_count_that_is_no_count_is_missing(usage: object) -> None:
    reply = read(completion({"content": "a"}, usage=usage))
    assert (reply.input_tokens, reply.output_tokens) == (None, None)


def test_an_address_without_v1_is_pointed_out_where_nothing_is_found() -> None:
    with Provider([failure(404, "not found")]) as provider:
        chat = OpenAIChat("m", key=KEY, base_url=provider.url.removesuffix("/v1"))
        with pytest.raises(ChatError, match="most servers want /v1 at its end"):
            chat.reply(HELLO, None)


def test_an_address_with_v1_is_not_doubted() -> None:
    with Provider([failure(404, "not found")]) as provider, pytest.raises(ChatError) as caught:
        OpenAIChat("m", key=KEY, base_url=provider.url).reply(HELLO, None)
    assert "/v1" not in str(caught.value)


def test_the_providers_own_address_is_named_in_errors() -> None:
    assert "api.openai.com" in OpenAIChat("m", key=KEY)._who
