"""Chat models by name; each file is one provider.

`open_chat` turns what a person typed (`openai:MODEL`) into a chat, and says what is missing before
anything heavy is imported. A key is read from the environment here, handed to its provider's file,
and kept nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from urllib.parse import urlsplit

from tuner.space import Refused, closest, excerpt
from tuner.trial import Chat

TIMEOUT_SECONDS = 600.0
"""For one answer, retries included. A local model on a CPU may need minutes for a long prompt."""

DEFAULT_MODELS = {"openai": "gpt-5.5", "anthropic": "claude-sonnet-5-5"}
"""The models that the providers' own documentation uses in its examples, neither of them announced to end."""

KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
"""The environment variable that holds each provider's key."""

_BASE_URLS = {"openai": "OPENAI_BASE_URL", "anthropic": "ANTHROPIC_BASE_URL"}

_CHOICES = "openai:MODEL, anthropic:MODEL or paste"


def open_chat(
    spec: str,
    *,
    base_url: str | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    ask_person: Callable[[str], str] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Chat:
    """The chat that `spec` names.

    Args:
        spec: `openai:MODEL`, `anthropic:MODEL` or `paste`.
        base_url: a compatible server; left out, `OPENAI_BASE_URL` or `ANTHROPIC_BASE_URL`, then the provider's own.
        timeout_seconds: the limit for one answer, retries included.
        ask_person: shows a prompt to the person and returns what they pasted; `paste` needs it.
        notify: receives a sentence each time the chat waits before it tries again.

    Raises:
        Refused: no such chat, no key, no address, or `paste` where nobody can paste.
    """
    provider, colon, model = spec.strip().partition(":")
    if spec.strip() == "paste":
        if ask_person is None:
            raise Refused("--llm paste needs a person at a terminal: leave out --batch, or choose openai or anthropic")
        from tuner.chats.paste import PasteChat

        return PasteChat(ask_person)
    if provider not in KEYS:
        near = closest(provider, [*KEYS, "paste"])
        raise Refused(f"--llm {excerpt(spec)}: no such chat{near}; expected {_CHOICES}")
    if not colon or not model.isprintable() or len(model.split()) != 1:
        raise Refused(
            f"--llm {excerpt(spec)}: expected {provider}:MODEL, for example {provider}:{DEFAULT_MODELS[provider]}"
        )

    base_url = _address(provider, base_url)
    key = _key(provider)
    if key is None and base_url is None:
        raise Refused(
            f"--llm {spec.strip()} needs a key: set {KEYS[provider]}, or name a server that needs none with --base-url"
        )
    # Imported here: the SDKs take seconds to import, and only the chosen one is needed.
    if provider == "openai":
        from tuner.chats.openai_chat import OpenAIChat

        return OpenAIChat(model, key=key, base_url=base_url, timeout_seconds=timeout_seconds, notify=notify)
    from tuner.chats.anthropic_chat import AnthropicChat

    return AnthropicChat(model, key=key, base_url=base_url, timeout_seconds=timeout_seconds, notify=notify)


def from_environment() -> str | None:
    """The chat that the environment asks for: `TUNE_LLM`, else the first provider whose key is set; else None."""
    if chosen := os.environ.get("TUNE_LLM", "").strip():
        return chosen
    return next(
        (f"{p}:{DEFAULT_MODELS[p]}" for p, variable in KEYS.items() if os.environ.get(variable, "").strip()), None
    )


def _key(provider: str) -> str | None:
    """The provider's key, or None. What no HTTP header can carry is refused here: the error of an
    HTTP library would quote the whole key.
    """
    variable = KEYS[provider]
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise Refused(f"{variable} holds a character that no key has (a space, a line break or a letter beyond ASCII)")
    return key or None


def _address(provider: str, base_url: str | None) -> str | None:
    """The address of a compatible server, checked; None for the provider's own."""
    source = "--base-url" if base_url is not None else _BASE_URLS[provider]
    url = (base_url if base_url is not None else os.environ.get(_BASE_URLS[provider], "")).strip()
    if not url and base_url is None:
        return None
    try:
        parts = urlsplit(url)
        legal = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        legal = False
    if legal and (parts.username or parts.password or parts.query):
        # The address is written into the study's journal.
        raise Refused(
            f"{source}: expected an address without a user, password or query; keys belong into {KEYS[provider]}"
        )
    if not legal or not url.isprintable() or " " in url:
        raise Refused(f"{source} {excerpt(url)}: expected an address like http://localhost:11434/v1")
    return url
