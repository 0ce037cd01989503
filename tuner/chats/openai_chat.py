"""Chat Completions, the dialect that OpenAI and every compatible server speak.

The request holds the model, the messages and, where a schema is wanted, `response_format`; nothing
else. Each further field is one that some server or some model refuses: `temperature` (reasoning
models), `max_tokens` (renamed to `max_completion_tokens`), `seed`, `n`.

Source: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import openai

from tuner.chats import KEYS, TIMEOUT_SECONDS
from tuner.chats.remote import PLACEHOLDER_KEY, RemoteChat, Sdk, connect_seconds, count
from tuner.trial import Message, Reply

_ADDRESS = "https://api.openai.com/v1"


class OpenAIChat(RemoteChat):
    """`openai:MODEL`, at OpenAI or at `base_url` (Ollama, vLLM, llama.cpp, LM Studio, OpenRouter)."""

    def __init__(
        self,
        model: str,
        *,
        key: str | None,
        base_url: str | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        notify: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """No key: a placeholder is sent, for a local server."""
        address = base_url or _ADDRESS

        def connect() -> openai.OpenAI:
            return openai.OpenAI(
                api_key=key or PLACEHOLDER_KEY,
                base_url=address,
                max_retries=0,
                # A redirect would carry the key to an address that nobody named.
                http_client=openai.DefaultHttpxClient(follow_redirects=False),
            )

        self._model = model
        self._connect = connect
        super().__init__(
            f"openai:{model}",
            sdk=cast("Sdk", openai),
            address=address,
            variable=KEYS["openai"],
            key=key,
            timeout_seconds=timeout_seconds,
            notify=notify,
            clock=clock,
            sleep=sleep,
        )

    def _send(self, messages: Sequence[Message], schema: Mapping[str, object] | None, seconds: float) -> bytes:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        form = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": schema},
        }
        # A client for each request: a trial lies between two of them, and the server would have hung up.
        with self._connect() as client:
            answer = client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=cast("list[openai.types.chat.ChatCompletionMessageParam]", turns),
                response_format=cast("openai.types.chat.completion_create_params.ResponseFormat", form)
                if schema is not None
                else openai.omit,
                timeout=openai.Timeout(seconds, connect=connect_seconds(seconds)),
            )
            return answer.http_response.content

    def _read(self, body: Mapping[str, object]) -> Reply | None:
        match body:
            case {"choices": [{"message": {"content": str(text)}}, *_]}:
                pass
            case {"choices": [{"message": {"content": [*parts]}}, *_]}:
                text = "".join(p["text"] for p in parts if isinstance(p, Mapping) and isinstance(p.get("text"), str))
            case {"choices": [{"message": {"refusal": str(text)}}, *_]}:
                pass
            case {"choices": [{"message": {}}, *_]}:
                text = ""
            case _:
                return None
        model = body.get("model")
        usage = body.get("usage")
        tokens = usage if isinstance(usage, Mapping) else {}
        return Reply(
            text=text,
            model=model if isinstance(model, str) and model else self._model,
            input_tokens=count(tokens.get("prompt_tokens")),
            output_tokens=count(tokens.get("completion_tokens")),
        )
