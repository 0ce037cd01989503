"""Anthropic's Messages, and servers that speak the same.

System messages travel in `system`; a schema in `output_config.format`. The schema's limits there
(16 properties of a union type; no `minimum`, no `maximum`) are the provider's to enforce: a schema
that is refused is left out, and the answer is read tolerantly.

Source: https://platform.claude.com/docs/en/api/messages and
https://platform.claude.com/docs/en/build-with-claude/structured-outputs
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import anthropic

from tuner.chats import KEYS, TIMEOUT_SECONDS
from tuner.chats.remote import PLACEHOLDER_KEY, RemoteChat, Sdk, connect_seconds, count
from tuner.trial import Message, Reply

_ADDRESS = "https://api.anthropic.com"

_MAX_TOKENS = 16_000
"""The API wants a limit. The answer takes a few hundred tokens; the rest is room for thinking, which counts too."""


class AnthropicChat(RemoteChat):
    """`anthropic:MODEL`, at Anthropic or at `base_url`."""

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
        # This SDK adds /v1 by itself, and other providers' addresses end with it.
        address = (base_url or _ADDRESS).rstrip("/").removesuffix("/v1")

        def connect() -> anthropic.Anthropic:
            return anthropic.Anthropic(
                api_key=key or PLACEHOLDER_KEY,
                base_url=address,
                max_retries=0,
                # A redirect would carry the key to an address that nobody named.
                http_client=anthropic.DefaultHttpxClient(follow_redirects=False),
            )

        self._model = model
        self._connect = connect
        super().__init__(
            f"anthropic:{model}",
            sdk=cast("Sdk", anthropic),
            address=f"{address}/v1",
            variable=KEYS["anthropic"],
            key=key,
            timeout_seconds=timeout_seconds,
            notify=notify,
            clock=clock,
            sleep=sleep,
        )

    def _send(self, messages: Sequence[Message], schema: Mapping[str, object] | None, seconds: float) -> bytes:
        system = "\n\n".join(m.content for m in messages if m.role == "system")
        turns = [{"role": m.role, "content": m.content} for m in messages if m.role != "system"]
        # A client for each request: a trial lies between two of them, and the server would have hung up.
        with self._connect() as client:
            answer = client.messages.with_raw_response.create(
                model=self._model,
                max_tokens=_MAX_TOKENS,
                messages=cast("list[anthropic.types.MessageParam]", turns),
                system=system or anthropic.omit,
                output_config={"format": {"type": "json_schema", "schema": dict(schema)}}
                if schema is not None
                else anthropic.omit,
                timeout=anthropic.Timeout(seconds, connect=connect_seconds(seconds)),
            )
            return answer.http_response.content

    def _read(self, body: Mapping[str, object]) -> Reply | None:
        match body:
            case {"content": [*blocks]}:
                pass
            case _:
                return None
        model = body.get("model")
        usage = body.get("usage")
        tokens = usage if isinstance(usage, Mapping) else {}
        return Reply(
            # Thinking comes in blocks of another type.
            text="".join(
                b["text"]
                for b in blocks
                if isinstance(b, Mapping) and b.get("type") == "text" and isinstance(b.get("text"), str)
            ),
            model=model if isinstance(model, str) and model else self._model,
            input_tokens=count(tokens.get("input_tokens")),
            output_tokens=count(tokens.get("output_tokens")),
        )
