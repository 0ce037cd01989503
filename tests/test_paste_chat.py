"""The chat of a person who carries prompt and answer."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from contracts.chat_contract import HELLO, ChatContract
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.chats.paste import PasteChat, osc52, pasted
from tuner.trial import Chat, Message


class Person:
    """A queue of answers and a history of the prompts that were shown."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.shown: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.shown.append(prompt)
        return self.answers.pop(0)


class TestPaste(ChatContract):
    name = "paste"

    @contextmanager
    def answering(self, *texts: str) -> Iterator[Chat]:
        yield PasteChat(Person(*texts))


def test_a_person_is_shown_the_prompt_and_no_more() -> None:
    person = Person("a")
    PasteChat(person).reply(HELLO, {"type": "object"})
    assert person.shown == ["hello"]


def test_a_person_counts_no_tokens() -> None:
    reply = PasteChat(Person("a")).reply(HELLO, None)
    assert (reply.model, reply.input_tokens, reply.output_tokens) == ("paste", None, None)


def test_the_system_message_is_carried_with_the_first_prompt() -> None:
    person = Person("a")
    PasteChat(person).reply([Message("system", "rules"), Message("user", "ask")], None)
    assert person.shown == ["rules\n\nask"]


def test_a_conversation_that_goes_on_shows_its_new_turns_only() -> None:
    person = Person(" one \n", "two")
    chat = PasteChat(person)
    first = [Message("system", "rules"), Message("user", "ask")]
    reply = chat.reply(first, None)
    chat.reply([*first, Message("assistant", reply.text), Message("user", "not like this")], None)
    assert person.shown == ["rules\n\nask", "not like this"]


def test_a_conversation_that_this_chat_has_not_seen_is_shown_whole() -> None:
    person = Person("two")
    PasteChat(person).reply([Message("user", "ask"), Message("assistant", "one"), Message("user", "again")], None)
    assert person.shown == ["ask\n\nYou answered:\none\n\nagain"]


def test_a_new_prompt_is_shown_whole_after_another() -> None:
    person = Person("one", "two")
    chat = PasteChat(person)
    chat.reply([Message("user", "first")], None)
    chat.reply([Message("user", "second")], None)
    assert person.shown == ["first", "second"]


def test_another_conversation_is_shown_whole_however_long_it_is() -> None:
    person = Person("one", "two")
    chat = PasteChat(person)
    chat.reply([Message("user", "first")], None)
    chat.reply([Message("user", "other"), Message("assistant", "old"), Message("user", "next")], None)
    assert person.shown[1] == "other\n\nYou answered:\nold\n\nnext"


def test_ctrl_c_passes_through() -> None:
    def ask(prompt: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PasteChat(ask).reply(HELLO, None)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ('{"a":\n1}\n.\nrest', '{"a":\n1}'),
        ("one\r\n.\r\n", "one"),
        ("one\n . \nrest", "one"),
        ("no end", "no end"),
        ("a . b\n..\n.\n", "a . b\n.."),
        (".\n", ""),
        ("", ""),
    ],
    ids=["dot", "crlf", "spaces", "end of input", "other dots", "dot at once", "nothing"],
)
def test_an_answer_ends_at_a_single_dot_or_with_the_input(typed: str, answer: str) -> None:
    assert pasted(io.StringIO(typed, newline="")) == answer


def test_what_follows_the_dot_is_left_to_the_next_reader() -> None:
    terminal = io.StringIO("answer\n.\nnext\n")
    pasted(terminal)
    assert terminal.read() == "next\n"


@settings(deadline=None)
@given(st.text(max_size=200))
def test_the_copied_text_comes_back_out_of_the_sequence(text: str) -> None:
    sequence = osc52(text, {})
    data = sequence.removeprefix("\x1b]52;c;").removesuffix("\x07")
    assert base64.b64decode(data, validate=True).decode() == text.encode("utf-8", "replace").decode()


def test_no_text_can_end_the_sequence_early() -> None:
    sequence = osc52("\x07\x1b\\\x1b]52;c;evil\x07", {})
    assert sequence.count("\x07") == 1
    assert sequence.count("\x1b") == 1


def test_tmux_gets_the_sequence_wrapped_with_escapes_doubled() -> None:
    assert osc52("hi", {"TMUX": "/tmp/tmux"}) == "\x1bPtmux;\x1b\x1b]52;c;aGk=\x07\x1b\\"  # noqa: S108 never opened


def test_a_text_too_long_for_a_clipboard_is_not_half_copied() -> None:
    assert len(osc52("x" * 74_994, {})) <= 100_000
    assert osc52("x" * 74_995, {}) == ""
