"""What every chat keeps, and what every chat behind HTTP keeps besides.

A test file inherits a suite and says how its chat is opened. The provider's side is a real HTTP
server on loopback; time is real where the claim is about time that passes in a request, and counted
by `Clock` where it is about waiting between requests.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from fakes.providers import Provider, Step, answer, failure

from tuner.trial import Chat, ChatError, Message, Reply

KEY = "sk-test-0123456789abcdef"
SCHEMA = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
HELLO = [Message("user", "hello")]


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class ChatContract(ABC):
    """Every chat: a provider, or a person who pastes."""

    name: str

    @abstractmethod
    def answering(self, *texts: str) -> AbstractContextManager[Chat]:
        """A chat that gives these answers, one after the other."""

    @pytest.mark.parametrize(
        "text",
        ['{"changes": {}}', "several\nlines", "größer ≥ 四 🔋", 'a\\nb "quoted" {braces}', "x" * 2_000_000],
        ids=["json", "lines", "unicode", "quotes", "two megabytes"],
    )
    def test_the_reply_is_the_answer_as_it_came(self, text: str) -> None:
        with self.answering(text) as chat:
            assert chat.reply(HELLO, None).text == text

    def test_an_empty_answer_is_an_empty_reply(self) -> None:
        with self.answering("") as chat:
            assert chat.reply(HELLO, None).text == ""

    def test_it_is_named_as_a_person_types_it(self) -> None:
        with self.answering("a") as chat:
            assert chat.name == self.name

    def test_a_reply_names_its_model_and_counts_no_tokens_it_was_not_told(self) -> None:
        with self.answering("a") as chat:
            reply = chat.reply(HELLO, None)
        assert isinstance(reply, Reply)
        assert reply.model
        assert reply.seconds >= 0
        assert all(tokens is None or tokens >= 0 for tokens in (reply.input_tokens, reply.output_tokens))

    def test_a_schema_does_not_change_the_text_of_the_answer(self) -> None:
        with self.answering('{"changes": {}}') as chat:
            assert chat.reply(HELLO, SCHEMA).text == '{"changes": {}}'

    def test_a_conversation_goes_on_over_several_calls(self) -> None:
        with self.answering("one", "two") as chat:
            first = chat.reply([Message("system", "s"), Message("user", "a")], None)
            turns = [
                Message("system", "s"),
                Message("user", "a"),
                Message("assistant", first.text),
                Message("user", "b"),
            ]
            assert chat.reply(turns, None).text == "two"

    def test_text_that_is_no_unicode_reaches_no_one(self) -> None:
        with self.answering("half \ud83d a pair") as chat:
            reply = chat.reply([Message("user", "a broken remark \udcff")], None)
        reply.text.encode("utf-8")


class ProviderContract(ChatContract):
    """Every chat behind HTTP."""

    path: str
    variable: str
    """The environment variable of the key."""

    @abstractmethod
    def open(self, url: str, *, key: str | None = KEY, **more: Any) -> Chat:
        """A chat for the model `m` at this address."""

    @pytest.fixture(autouse=True)
    def _no_settings_of_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in list(os.environ):
            if name.upper().startswith(("OPENAI_", "ANTHROPIC_")) or name.upper().endswith("_PROXY"):
                monkeypatch.delenv(name)

    @contextmanager
    def answering(self, *texts: str) -> Iterator[Chat]:
        with Provider([answer(text) for text in texts]) as provider:
            yield self.open(provider.url)

    def ask(
        self, *script: Step, clock: Clock | None = None, schema: dict[str, object] | None = None, **more: Any
    ) -> tuple[Provider, str | ChatError]:
        """The server after one question, and the answer's text or the error."""
        clock = clock or Clock()
        with Provider(script) as provider:
            chat = self.open(provider.url, clock=clock, sleep=clock.sleep, **more)
            try:
                return provider, chat.reply(HELLO, schema).text
            except ChatError as error:
                return provider, error

    # --- retries

    @pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
    def test_a_passing_failure_is_tried_again(self, status: int) -> None:
        provider, text = self.ask(failure(status), failure(status), answer("at last"))
        assert text == "at last"
        assert len(provider.requests) == 3

    def test_a_dropped_connection_is_tried_again(self) -> None:
        provider, text = self.ask(Step(drop=True), answer("at last"))
        assert text == "at last"
        assert len(provider.requests) == 2

    @pytest.mark.parametrize(
        "body",
        [
            "",
            "<html>sign in</html>",
            '{"half": ',
            "[]",
            "null",
            "{}",
            '{"choices": []}',
            '{"content": 7}',
            "[" * 100_000,
        ],
        ids=["empty", "html", "cut off", "list", "null", "empty object", "no choice", "no content", "deep"],
    )
    def test_a_malformed_body_is_tried_again(self, body: str) -> None:
        _, text = self.ask(Step(body=body), answer("at last"))
        assert text == "at last"

    def test_an_error_wrapped_into_a_success_is_tried_again(self) -> None:
        _, text = self.ask(Step(body='{"error": {"code": 429, "message": "busy"}}'), answer("at last"))
        assert text == "at last"

    @pytest.mark.parametrize(
        ("retry_after", "seconds"), [(7, 7.0), ("1.5", 1.5)], ids=["whole seconds", "parts of a second"]
    )
    def test_it_waits_as_long_as_the_server_asks(self, retry_after: float | str, seconds: float) -> None:
        clock = Clock()
        self.ask(failure(429, retry_after=retry_after), answer("a"), clock=clock)
        assert clock.slept == [seconds]

    def test_a_date_to_come_back_at_is_understood(self) -> None:
        clock = Clock()
        then = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 40))
        self.ask(failure(503, retry_after=then), answer("a"), clock=clock)
        assert clock.slept == [pytest.approx(40, abs=2)]

    @pytest.mark.parametrize("nonsense", ["soon", "-3", "nan", "inf"])
    def test_a_senseless_wait_is_replaced_by_our_own(self, nonsense: str) -> None:
        clock = Clock()
        self.ask(failure(429, retry_after=nonsense), answer("a"), clock=clock)
        assert 0.5 <= clock.slept[0] <= 1.0

    def test_waits_double_up_to_half_a_minute_with_at_most_half_of_it_jitter(self) -> None:
        clock = Clock()
        self.ask(failure(500), clock=clock)
        assert len(clock.slept) == 7
        for slept, full in zip(clock.slept, [1, 2, 4, 8, 16, 30, 30], strict=True):
            assert full / 2 <= slept <= full

    def test_waits_are_the_same_in_each_run(self) -> None:
        first, second = Clock(), Clock()
        self.ask(failure(500), clock=first)
        self.ask(failure(500), clock=second)
        assert first.slept == second.slept

    def test_each_wait_is_announced(self) -> None:
        said: list[str] = []
        self.ask(failure(429, "slow down", retry_after=3), answer("a"), notify=said.append)
        (sentence,) = said
        assert self.name in sentence
        assert 'HTTP 429 "slow down"; trying again in 3 s' in sentence

    # --- giving up

    def test_a_provider_that_stays_away_ends_in_one_sentence(self) -> None:
        provider, error = self.ask(failure(503, "overloaded"), clock=(clock := Clock()))
        assert isinstance(error, ChatError)
        assert f"{self.name} at 127.0.0.1:{provider.port} gave no answer" in str(error)
        assert f'HTTP 503 "overloaded", tried 8 times in {sum(clock.slept):.0f} s' in str(error)
        assert "`tune run --resume`" in str(error)
        assert "\n" not in str(error)

    def test_no_wait_leads_past_the_time_limit(self) -> None:
        clock = Clock()
        provider, error = self.ask(failure(500), clock=clock, timeout_seconds=10)
        assert isinstance(error, ChatError)
        assert clock.now < 10
        assert len(provider.requests) < 8

    def test_a_server_that_asks_for_more_than_the_time_limit_is_not_waited_for(self) -> None:
        clock = Clock()
        provider, error = self.ask(failure(429, retry_after=3600), clock=clock, timeout_seconds=60)
        assert clock.slept == []
        assert len(provider.requests) == 1
        assert "tried once" in str(error)
        assert "it asks to wait 3600 s" in str(error)

    @pytest.mark.parametrize(
        ("status", "check"),
        [
            (400, "the request itself is at fault"),
            (401, "check the key in {variable}"),
            (402, "check the account's balance"),
            (403, "check that the key in {variable} may use this model"),
            (404, "check the model's name"),
            (413, "the prompt is too long"),
            (418, "it will not take this request"),
            (501, "it will not take this request"),
        ],
    )
    def test_a_refusal_is_not_tried_again_and_says_what_to_check(self, status: int, check: str) -> None:
        provider, error = self.ask(failure(status, "no"))
        assert isinstance(error, ChatError)
        assert len(provider.requests) == 1
        assert f'HTTP {status} "no"' in str(error)
        assert check.format(variable=self.variable) in str(error)

    def test_a_spent_quota_is_no_rate_limit(self) -> None:
        body = '{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}'
        provider, error = self.ask(Step(status=429, body=body))
        assert len(provider.requests) == 1
        assert "quota is used up" in str(error)

    @pytest.mark.parametrize(
        ("body", "quoted"),
        [
            ('{"error": "model not found"}', '"model not found"'),
            ('{"message": "plain"}', '"plain"'),
            ('{"detail": [{"loc": "model"}]}', "loc"),
            ("<html>\n gone \x1b[2J</html>", '"<html> gone \\u001b[2J</html>"'),
            ('{"error": {"message": "' + "long " * 1000 + '"}}', 'long l..."'),
            ("", "404"),
        ],
        ids=["text", "message", "detail", "html", "long", "empty"],
    )
    def test_an_error_of_any_shape_is_quoted_on_one_line(self, body: str, quoted: str) -> None:
        _, error = self.ask(Step(status=404, body=body))
        assert quoted.rstrip('"') in str(error)
        assert str(error).isprintable()
        assert len(str(error)) < 600

    def test_a_server_that_is_not_there_is_named_with_the_reason(self) -> None:
        with Provider([answer("a")]) as gone:
            pass
        clock = Clock()
        with pytest.raises(ChatError, match=rf"127\.0\.0\.1:{gone.port} gave no answer: no connection \(.*refused"):
            self.open(gone.url, clock=clock, sleep=clock.sleep).reply(HELLO, None)

    def test_a_slow_answer_ends_at_the_time_limit(self) -> None:
        with Provider([answer("late", delay=3)]) as provider:
            chat = self.open(provider.url, timeout_seconds=0.3)
            started = time.monotonic()
            with pytest.raises(ChatError, match="no answer within"):
                chat.reply(HELLO, None)
            assert time.monotonic() - started < 1.5

    def test_an_answer_that_trickles_ends_at_the_time_limit(self) -> None:
        with Provider([answer("drop by drop", trickle=0.05)]) as provider:
            chat = self.open(provider.url, timeout_seconds=0.4)
            started = time.monotonic()
            with pytest.raises(ChatError, match="no answer within"):
                chat.reply(HELLO, None)
            assert time.monotonic() - started < 1.5

    @pytest.mark.parametrize(
        "script", [[answer("late", delay=3)], [failure(429, retry_after=30)]], ids=["asking", "waiting"]
    )
    def test_ctrl_c_passes_through_at_once(self, script: list[Step]) -> None:
        with Provider(script) as provider:
            chat = self.open(provider.url)
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            started = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                chat.reply(HELLO, None)
            assert time.monotonic() - started < 1.5
            timer.join()

    # --- schema

    def test_a_schema_is_sent_where_it_is_wanted_only(self) -> None:
        with Provider([answer("a")]) as provider:
            chat = self.open(provider.url)
            chat.reply(HELLO, SCHEMA)
            chat.reply(HELLO, None)
        assert [r.has_schema for r in provider.requests] == [True, False]

    @pytest.mark.parametrize(
        "refusal",
        [
            failure(400, "unknown field"),
            failure(422, "extra inputs"),
            failure(404, "no endpoint supports response_format"),
            failure(500, "failed to parse the json_schema"),
            failure(501, "structured output is not implemented"),
        ],
        ids=lambda step: str(step.status),
    )
    def test_a_refused_schema_is_left_out_at_once(self, refusal: Step) -> None:
        clock = Clock()
        provider, text = self.ask(refusal, answer("without"), schema=SCHEMA, clock=clock)
        assert text == "without"
        assert [r.has_schema for r in provider.requests] == [True, False]
        assert clock.slept == []

    def test_a_refused_schema_is_not_tried_again_by_the_same_chat(self) -> None:
        with Provider([answer("a", refuses_schema=True)]) as provider:
            chat = self.open(provider.url)
            for _ in range(3):
                chat.reply(HELLO, SCHEMA)
        assert [r.has_schema for r in provider.requests] == [True, False, False, False]

    def test_after_a_schema_was_taken_a_bad_request_is_a_bad_request(self) -> None:
        with Provider([answer("a"), failure(400, "the prompt is too long"), answer("b")]) as provider:
            chat = self.open(provider.url)
            chat.reply(HELLO, SCHEMA)
            with pytest.raises(ChatError, match="too long"):
                chat.reply(HELLO, SCHEMA)
        assert len(provider.requests) == 2

    @pytest.mark.parametrize(
        ("status", "message"),
        [(401, "no key, no schema"), (403, "no structured output for this key"), (404, "no model")],
    )
    def test_a_refusal_of_key_or_model_is_none_of_the_schema(self, status: int, message: str) -> None:
        provider, error = self.ask(failure(status, message), schema=SCHEMA)
        assert isinstance(error, ChatError)
        assert len(provider.requests) == 1

    def test_an_overloaded_server_does_not_cost_the_schema(self) -> None:
        provider, _ = self.ask(failure(429, "too many structured requests"), failure(503), answer("a"), schema=SCHEMA)
        assert [r.has_schema for r in provider.requests] == [True, True, True]

    # --- the key

    @pytest.mark.parametrize(
        "script",
        [
            [failure(401, "the key {authorization} is wrong")],
            [failure(400, "x" * 170 + " {authorization}")],
            [Step(status=403, body=f"<p>{KEY}</p>")],
            [Step(status=500, body=f'{{"detail": ["{KEY}"]}}')],
            [Step(body=f"hello {KEY}")],
            [Step(body=f'{{"hello": "{KEY}"}}')],
        ],
        ids=["sentence", "cut in the middle", "html", "detail", "no json", "unknown form"],
    )
    def test_a_key_that_the_server_echoes_is_in_no_error_and_no_log(
        self, script: list[Step], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        said: list[str] = []
        _, error = self.ask(*script, notify=said.append)
        assert isinstance(error, ChatError)
        everything = f"{error!s} {error!r} {said} {caplog.text}"
        # No part of it either: a cut in the middle would leave one.
        for start in range(len(KEY) - 11):
            assert KEY[start : start + 12] not in everything
        assert error.__context__ is None
        assert error.__cause__ is None

    def test_a_key_that_the_model_repeats_is_in_no_reply(self) -> None:
        with Provider([answer(f"your key is {KEY}")]) as provider:
            assert self.open(provider.url).reply(HELLO, None).text == "your key is [key]"

    def test_a_chat_shows_its_name_and_not_its_key(self) -> None:
        chat = self.open("http://127.0.0.1:9/v1")
        assert self.name in repr(chat)
        assert KEY not in f"{chat!r} {chat!s} {vars(chat)!r}"

    def test_a_placeholder_for_a_key_garbles_no_answer(self) -> None:
        with Provider([answer('{"x": "max"}')]) as provider:
            assert self.open(provider.url, key="x").reply(HELLO, None).text == '{"x": "max"}'

    def test_a_password_in_the_address_is_not_shown(self) -> None:
        clock = Clock()
        with Provider([failure(404)]) as provider:
            url = provider.url.replace("http://", "http://user:s3cret-word@")
            with pytest.raises(ChatError) as caught:
                self.open(url, clock=clock, sleep=clock.sleep).reply(HELLO, None)
        assert "s3cret" not in str(caught.value)

    def test_a_redirect_takes_the_key_nowhere(self) -> None:
        with Provider([answer("stolen")]) as thief:
            _, error = self.ask(Step(status=307, location=f"{thief.url}{self.path.removeprefix('/v1')}"))
        assert thief.requests == []
        assert "HTTP 307" in str(error)
        assert "the server lives elsewhere" in str(error)

    def test_a_local_server_needs_no_key(self) -> None:
        with Provider([answer("a")]) as provider:
            assert self.open(provider.url, key=None).reply(HELLO, None).text == "a"
        assert "no-key" in provider.requests[0].headers["authorization"]

    def test_the_key_goes_to_the_server(self) -> None:
        with Provider([answer("a")]) as provider:
            self.open(provider.url).reply(HELLO, None)
        assert KEY in provider.requests[0].headers["authorization"]

    # --- what is counted

    def test_tokens_and_model_are_the_providers(self) -> None:
        with Provider([answer("a")]) as provider:
            reply = self.open(provider.url).reply(HELLO, None)
        assert (reply.input_tokens, reply.output_tokens, reply.model) == (11, 7, "m-2026")

    def test_tokens_that_are_not_told_are_missing_and_not_zero(self) -> None:
        with Provider([answer("a", usage=False)]) as provider:
            reply = self.open(provider.url).reply(HELLO, None)
        assert (reply.input_tokens, reply.output_tokens) == (None, None)

    def test_the_seconds_of_a_reply_hold_its_retries(self) -> None:
        clock = Clock()
        with Provider([failure(429, retry_after=5), answer("a")]) as provider:
            reply = self.open(provider.url, clock=clock, sleep=clock.sleep).reply(HELLO, None)
        assert reply.seconds == 5.0
