import io
import os
import re
import shlex
import signal
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pexpect
import pytest
from records import LOSSY, SPACE, lossy, trial, window
from rich.console import Console

from tuner.display import Screen
from tuner.journal import End, Header, Pair, Segment, Study
from tuner.space import Choice, Int, Refused, SearchSpace
from tuner.summary import Usage
from tuner.trial import Decision, History, Message, Proposal, Repeat, Target

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
EVIL = "\x1b[31mred\x1b]52;c;c3Rv\x07 [bold]markup[/bold] \u202eend"
PROPOSAL = Proposal(
    config=SPACE.complete({"parallel": 8, "threads": 1}),
    source="llm",
    reason="More slots share one read of the weights.",
    predicted_joules_per_unit=0.7,
)
HISTORY = History(trials=(trial(0),))


class Limit:
    def joules_per_unit(self, history):
        return 0.8


class Desk:
    """A screen on two strings, 80 columns wide, and a keyboard that holds `typed`."""

    def __init__(self, typed="", *, live=False, width=80, encoding="utf-8"):
        self.files = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in "oe"]
        self.now = 100.0
        consoles = [
            Console(file=f, width=width, force_terminal=live, highlight=False, color_system=None) for f in self.files
        ]
        self.screen = Screen(*consoles, live=live, stdin=io.StringIO(typed), clock=lambda: self.now)

    def _read(self, index):
        self.files[index].flush()
        return self.files[index].buffer.getvalue().decode(self.files[index].encoding)

    @property
    def out(self):
        return self._read(0)

    @property
    def err(self):
        return self._read(1)

    def decide(self, proposal=PROPOSAL, space=SPACE, history=HISTORY, trial_seconds=75.0):
        return self.screen.decide(space, history, proposal, trial_seconds)


def one_line(text):
    return " ".join(ESCAPE.sub("", text).split())


# --- plain lines ---


def test_without_a_terminal_each_event_is_one_plain_line_on_standard_error():
    desk = Desk()
    desk.screen.study_started("s", 15, None)
    fallback = Proposal(config=SPACE.complete({"threads": 1}), source="rules", in_place_of="llm")
    history = HISTORY
    for ran in (
        HISTORY.trials[0],
        trial(1, {"parallel": 8, "threads": 1}, joules=(0.7, 0.71, 0.69), source="llm"),
        trial(2, {"threads": 1}, proposal=fallback),
        trial(3, {"parallel": 32}, source="llm", error="out of memory"),
    ):
        desk.screen.phase(ran.number, "loading and warming up")
        desk.screen.phase(ran.number, "loading and warming up")
        desk.screen.phase(ran.number, "measuring 1/3")
        desk.screen.phase(ran.number, "measuring 2/3")
        history = HISTORY if ran.number == 0 else history.add(ran)
        desk.screen.trial_ended(ran, history, ["the windows differ"] if ran.number == 1 else [])
    desk.screen.confirming(1, 4)
    desk.screen.close()
    assert desk.out == ""
    assert desk.err.splitlines() == [
        "trial 0: loading and warming up",
        "trial 0: measuring 1/3",
        "trial 0 (default): the default: 1.00 J/token ± 4.0 %",
        "trial 1: loading and warming up",
        "trial 1: measuring 1/3",
        "trial 1 (llm): parallel 4 -> 8, threads 2 -> 1: 700 mJ/token ± 4.0 %, 0.70x the default",
        "trial 1: ! the windows differ",
        "trial 2: loading and warming up",
        "trial 2: measuring 1/3",
        "trial 2 (rules for llm): threads 2 -> 1: 1.00 J/token ± 4.0 %, 1.00x the default (within noise)",
        "trial 3: loading and warming up",
        "trial 3: measuring 1/3",
        "trial 3 (llm): parallel 4 -> 32: failed: out of memory",
        "confirming: pair 1 of 4 (default and best, measured again)",
    ]


def test_an_estimate_is_labelled_on_its_line():
    desk = Desk()
    estimated = replace(trial(0), measurements=(window(1.0, quality="estimated"),) * 2)
    desk.screen.trial_ended(estimated, History(trials=(estimated,)), [])
    assert "1.00 J/token ± 4.0 % estimated" in desk.err


def test_a_resumed_study_shows_what_it_already_has():
    desk = Desk()
    desk.screen.study_started("s", None, None, HISTORY)
    assert desk.err.startswith("trial 0 (default)")


def test_warnings_and_headers_go_to_standard_error():
    desk = Desk()
    desk.screen.header([("meter", "rapl"), ("model", "")])
    desk.screen.warn("no LLM is in use")
    desk.screen.say("hello")
    assert one_line(desk.err) == "meter rapl warning: no LLM is in use hello"
    assert desk.out == ""


# --- text from outside ---


def test_no_text_from_outside_acts_on_the_terminal():
    desk = Desk("a\n", live=True)
    evil = replace(PROPOSAL, reason=EVIL)
    failed = trial(1, proposal=evil, error=EVIL)
    desk.screen.header([("model", EVIL)])
    desk.screen.study_started(EVIL, 3, None)
    desk.screen.phase(1, EVIL)
    desk.screen.say(EVIL)
    desk.screen.warn(EVIL)
    desk.decide(evil)
    desk.screen.trial_ended(failed, HISTORY.add(failed), [EVIL])
    desk.screen.summary(
        end=End(kind="failures", reason=EVIL), history=HISTORY.add(failed), space=SPACE, used=Usage(0, None, None),
        command=EVIL, verdict=EVIL, folder=Path("x"),
    )  # fmt: skip
    desk.screen.report(Study(folder=Path("x"), header=header(), history=HISTORY.add(failed)))
    desk.screen.doctor([Line("rapl", "missing", EVIL, EVIL)])
    desk.screen.messages([Message("user", EVIL)])
    desk.screen.close()
    shown = desk.err + desk.out
    assert shown.count("[bold]markup[/bold]") >= 10, "markup is text"
    assert "\x1b]52" not in shown
    assert "\u202e" not in shown
    assert "\x1b[31m" not in shown, "these consoles have no colours of their own"


@pytest.mark.parametrize("live", [False, True])
def test_a_terminal_that_is_not_utf_8_gets_ascii(live):
    desk = Desk(encoding="ascii", live=live)
    desk.screen.study_started("s", 3, Limit(), HISTORY)
    failed = trial(1, error="späte µ")
    desk.screen.trial_ended(failed, HISTORY.add(failed), [])
    desk.screen.close()
    assert "+/- 4.0 %" in desk.err
    assert "sp?te u" in desk.err


# --- the live view ---


def test_the_live_view_says_where_the_study_is():
    desk = Desk(live=True)
    desk.screen.study_started("llama-7", 15, Limit(), HISTORY)
    desk.now += 300
    failed, best = trial(1, error="killed"), trial(2, {"parallel": 8}, joules=(0.9, 0.9, 0.9), source="llm")
    desk.screen.trial_ended(failed, HISTORY.add(failed), [])
    desk.screen.trial_ended(best, HISTORY.add(failed).add(best), [])
    desk.screen.phase(3, "measuring 2/5")
    desk.now += 12
    seen = Console(file=io.StringIO(), width=80)
    seen.print(desk.screen._status())
    desk.screen.close()
    assert seen.file.getvalue().splitlines()[1:] == [
        "llama-7  trial 3 of 15  measuring 2/5 12 s  total 5 min 12 s",
        "best  900 mJ/token (trial 2, 0.90x)  threshold 800 mJ, 12 % to go",
        "energy so far  570 J  trials  █×▁",
    ]


def test_the_live_view_before_the_first_result_says_that_there_is_none():
    desk = Desk(live=True)
    desk.screen.study_started("s", None, None)
    desk.screen.close()
    assert "best  -" in ESCAPE.sub("", desk.err)


def test_the_live_view_says_when_the_threshold_is_reached_and_what_is_estimated():
    desk = Desk(live=True)
    estimated = replace(trial(0), measurements=(window(0.5, quality="estimated"),) * 2)
    desk.screen.study_started("s", None, Limit(), History(trials=(estimated,)))
    desk.screen.close()
    shown = ESCAPE.sub("", desk.err)
    assert "threshold 800 mJ reached" in shown
    assert "100 J estimated" in shown
    assert "J/token," in shown, "the heading of the column carries the label too"


def test_the_live_view_hides_the_cursor_and_gives_it_back():
    desk = Desk(live=True)
    desk.screen.study_started("s", None, None)
    assert desk.err.endswith("\x1b[?25l") or "\x1b[?25l" in desk.err
    with desk.screen.paused():
        assert desk.err.rindex("\x1b[?25h") > desk.err.rindex("\x1b[?25l"), "a dialogue has a cursor"
    assert desk.err.rindex("\x1b[?25l") > desk.err.rindex("\x1b[?25h")
    desk.screen.close()
    desk.screen.close()
    assert desk.err.rindex("\x1b[?25h") > desk.err.rindex("\x1b[?25l")


PROGRAM = textwrap.dedent(
    """
    import sys, time
    from tuner.display import Screen
    screen = Screen()
    try:
        screen.study_started("study", 5, None)
        screen.phase(1, "measuring 1/5")
        print("READY", flush=True)
        time.sleep(20)
    finally:
        screen.close()
        used = time.process_time()
    """
)


def test_ctrl_c_leaves_the_terminal_as_it_was():
    child = pexpect.spawn(sys.executable, ["-c", PROGRAM], encoding="utf-8", dimensions=(24, 80), timeout=10)
    child.expect("READY")
    child.expect("measuring")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) in ((1, None), (130, None), (None, signal.SIGINT))
    assert child.before.rindex("\x1b[?25h") > child.before.find("\x1b[?25l")


def test_colour_is_left_out_where_no_color_is_set():
    child = pexpect.spawn(
        sys.executable,
        ["-c", "from tuner.display import Screen; Screen().warn('careful')"],
        encoding="utf-8",
        env={**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"},
        timeout=10,
    )
    child.expect(pexpect.EOF)
    child.close()
    assert not re.search(r"\x1b\[[0-9;]*3\d", child.before)
    assert "careful" in child.before


def test_drawing_costs_next_to_nothing_beside_a_measurement():
    desk = Desk(live=True)
    trials = tuple(replace(trial(n), number=n) for n in range(50))
    desk.screen.study_started("s", 60, Limit(), History(trials=trials))
    before = time.process_time()
    for _ in range(20):
        desk.screen._live.refresh()
    per_drawing = (time.process_time() - before) / 20
    desk.screen.close()
    assert per_drawing < 0.25, "two drawings a second take less than half of one CPU, on a slow and busy machine too"


# --- the dialogue ---


def test_the_proposal_is_shown_beside_default_and_best():
    desk = Desk("a\n")
    best = trial(1, {"flash": "on"}, joules=(0.8, 0.81))
    desk.decide(history=HISTORY.add(best))
    shown = one_line(desk.err)
    for part in (
        "trial 2, proposed by llm",
        "parameter default best so far (trial 1) proposed change",
        "parallel 4 4 8 * 4 -> 8",
        "flash auto on auto back to default",
        "reason More slots share one read of the weights.",
        "predicted 700 mJ/token (0.70x the default)",
        "best so far 805 mJ/token ± 8.2 %",
        "costs about 1 min 15 s",
    ):
        assert part in shown


def test_a_proposal_without_prediction_or_history_is_shown_too():
    desk = Desk("a\n")
    desk.decide(replace(PROPOSAL, predicted_joules_per_unit=None, reason=""), history=History(), trial_seconds=None)
    assert "predicted none was given" in one_line(desk.err)
    assert "costs not known yet" in one_line(desk.err)


def test_no_line_of_the_dialogue_is_wider_than_the_terminal():
    space = SearchSpace(
        tuple(
            Choice(name=f"a_very_long_parameter_name_{n}", meaning="", default="x" * 30, values=("x" * 30, "y" * 30))
            for n in range(3)
        )
    )
    desk = Desk("?\na\n", width=60)
    config = dict.fromkeys(space.names, "y" * 30)
    desk.decide(Proposal(config=config, source="llm", reason="z" * 300), space, History())
    assert max(map(len, desk.err.splitlines())) <= 65  # the line of keys is the question, it may run over


@dataclass
class Said:
    action: str
    remark: str = ""
    parameter: str | None = None
    value: object = None


CASES = {
    "a\n": Said("accept"),
    "accept\n": Said("accept"),
    "  A  \n": Said("accept"),
    "s\n": Said("stop"),
    "": Said("stop", "end of input"),
    "b\n": Said("batch"),
    "r too slow\n": Said("reject", "too slow"),
    "r\nbecause\n": Said("reject", "because"),
    "r\n\n": Said("reject"),
    "m try fewer\n": Said("remark", "try fewer"),
    "m\ntry fewer\n": Said("remark", "try fewer"),
    "m\n\na\n": Said("accept"),
    "m\n": Said("stop", "end of input"),
    "r\n".rstrip(): Said("stop", "end of input"),
    "f threads=3\n": Said("forbid", "", "threads", 3),
    "f threads\n": Said("forbid", "", "threads", 1),
    "f\nflash = off\n": Said("forbid", "", "flash", "off"),
    "f\n\na\n": Said("accept"),
    "f thread=3\na\n": Said("accept"),
    "f threads=99\na\n": Said("accept"),
    "?\na\n": Said("accept"),
    "x\n\n\na\n": Said("accept"),
}


@pytest.mark.parametrize(("typed", "said"), CASES.items(), ids=[repr(c) for c in CASES])
def test_each_key_is_its_decision_and_a_bad_one_asks_again(typed, said):
    decision = Desk(typed).decide()
    assert (decision.action, decision.remark, decision.parameter, decision.value) == (
        said.action,
        said.remark,
        said.parameter,
        said.value,
    )
    assert decision.before_trial == 1
    assert decision.proposal is PROPOSAL


def test_control_keys_in_a_remark_are_taken_out():
    assert Desk("m \x1b[Afewer\x1b[D threads\x07\n").decide().remark == "fewer threads"


def test_a_bad_key_says_where_help_is():
    desk = Desk("x\na\n")
    desk.decide()
    assert "x: no such key; ? shows what each one does" in desk.err


def test_help_names_every_key():
    desk = Desk("?\na\n")
    desk.decide()
    for word in ("accept:", "edit:", "reject:", "remark:", "forbid:", "batch:", "stop:"):
        assert word in desk.err


@pytest.mark.parametrize(
    "typed", ["e parallel=16\n", "e\nparallel=16\n\n", "e\nparallel=2\nparallel=16,\n\n", "edit parallel=16\n"]
)
def test_an_edit_becomes_a_proposal_of_the_persons(typed):
    decision = Desk(typed).decide()
    assert decision.action == "edit"
    assert decision.edited.config == {**PROPOSAL.config, "parallel": 16}
    assert (decision.edited.source, decision.edited.in_place_of) == ("human", "llm")
    assert decision.edited.reason == "edited by the person: parallel 8 -> 16"
    assert decision.edited.predicted_joules_per_unit is None, "the prediction was for another configuration"


def test_the_prompts_that_led_to_an_edited_proposal_stay_counted():
    exchanged = replace(PROPOSAL, exchanges=("one",))
    assert Desk("e parallel=16\n").decide(exchanged).proposal.exchanges == ("one",)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("paralel=3", "did you mean parallel?"),
        ("parallel", "parallel: expected NAME=VALUE"),
        ("parallel=many", "an integer from 1 to 32"),
        ("parallel=99 flash=maybe", "flash"),
        ("parallel=1 threads=3", "broken constraint: threads <= parallel"),
    ],
)
def test_an_edit_that_does_not_fit_is_explained_and_asked_again(line, fault):
    desk = Desk(f"e {line}\nparallel=16 threads=1\n\n")
    decision = desk.decide()
    assert fault in one_line(desk.err)
    assert (decision.action, decision.edited.config["parallel"]) == ("edit", 16)


@pytest.mark.parametrize("typed", ["e\nq\na\n", "e\n\na\n", "e parallel=8\na\n"])
def test_an_edit_that_changes_nothing_goes_back_to_the_keys(typed):
    assert Desk(typed).decide().action == "accept"


def test_an_edit_that_was_measured_already_says_so():
    desk = Desk("e parallel=4 threads=2\n")
    desk.decide()
    assert "this is trial 0 again (1.00 J/token ± 4.0 %)" in one_line(desk.err)


def test_the_last_value_of_a_parameter_cannot_be_forbidden():
    space = SearchSpace((Int(name="n", meaning="", default=1, low=1, high=2),))
    history = HISTORY.add(Decision(action="forbid", before_trial=1, parameter="n", value=1))
    desk = Desk("f n=2\na\n")
    assert desk.decide(Proposal(config={"n": 2}, source="llm"), space, history).action == "accept"
    assert "nothing would be left of it" in desk.err


def test_a_line_that_is_no_utf_8_is_asked_for_again():
    desk = Desk()
    desk.screen._stdin = io.TextIOWrapper(io.BytesIO(b"m caf\xe9\n" + b"a\n" * 9000), encoding="utf-8")
    assert desk.decide().action == "accept"
    assert "not UTF-8" in desk.err


DIALOGUE = textwrap.dedent(
    """
    import sys, time
    sys.path.insert(0, {tests!r})
    from test_display import HISTORY, PROPOSAL, SPACE
    from tuner.display import Screen
    screen = Screen()
    screen.study_started("study", 5, None, HISTORY)
    print("RUNNING", flush=True)
    time.sleep(0.5)
    decision = screen.decide(SPACE, HISTORY, PROPOSAL, 10.0)
    screen.close()
    print("GOT", decision.action, decision.remark)
    """
).format(tests=str(Path(__file__).parent))


def test_keys_typed_before_the_question_are_no_answer_to_it():
    child = pexpect.spawn(sys.executable, ["-c", DIALOGUE], encoding="utf-8", dimensions=(50, 80), timeout=15)
    child.expect("RUNNING")
    child.sendline("a")
    child.expect_exact("[?] > ")
    child.sendline("r too slow")
    child.expect("GOT reject too slow")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


# --- without an LLM, and by hand ---


def test_nobody_is_offered_a_choice_where_nobody_can_answer():
    assert Desk().screen.offer_without_llm() is None


class Keyboard(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        raise OSError


@pytest.mark.parametrize(
    ("typed", "chosen"), [("p\n", "paste"), ("r\n", "rules"), ("x\n\nRules\n", "rules"), ("paste\n", "paste")]
)
def test_a_person_without_an_llm_chooses_between_paste_and_rules(typed, chosen):
    desk = Desk(live=True)
    desk.screen._stdin = Keyboard(typed)
    assert desk.screen.offer_without_llm()() == chosen


def test_an_unanswered_choice_is_refused_with_the_options():
    desk = Desk(live=True)
    desk.screen._stdin = Keyboard("")
    with pytest.raises(Refused, match="--llm paste or --proposer rules"):
        desk.screen.offer_without_llm()()


def test_pasting_shows_the_prompt_and_reads_to_a_single_dot():
    desk = Desk('{"a":\n 1}\n.\nnot this\n')
    assert desk.screen.ask_paste(f"What next? {EVIL}\nSecond line") == '{"a":\n 1}'
    assert "What next? red [bold]markup[/bold] end\nSecond line" in desk.err
    assert desk.out == ""


def test_pasting_copies_the_prompt_where_there_is_a_terminal():
    desk = Desk(live=True)
    assert desk.screen.ask_paste("hello") == ""
    assert "]52;c;aGVsbG8=" in desk.err


# --- results ---


def header():
    return Header(
        name="s",
        workload="llama",
        target=Target(),
        proposer="llm",
        llm="openai:m",
        template="enhanced",
        meter_sentence="rapl: cpu0",
        machine={"cpu": "Xeon"},
        identity={"engine": "llama.cpp"},
        space=tuple(SPACE.record()),
    )


def summed(history, **more):
    desk = Desk()
    given = {
        "end": End(kind="budget", reason="all 15 trials are done"),
        "used": Usage(7, 12345, None),
        "command": "run  --it",
    }
    desk.screen.summary(
        **{"history": history, "space": SPACE, "verdict": "Saves 30 %.", "folder": Path("results/s"), **given, **more}
    )
    assert desk.err == ""
    return desk.out


def test_the_summary_holds_best_against_default_and_what_it_took():
    best = trial(1, {"parallel": 8}, joules=(0.7, 0.71, 0.69), source="llm")
    out = summed(HISTORY.add(best).add(trial(2, error="x")))
    for part in (
        "stopped all 15 trials are done",
        "default 1.00 J/token ± 4.0 %",
        "best 700 mJ/token ± 4.0 %, 0.70x the default, trial 1 by llm",
        "changes parallel 4 -> 8",
        "trials 3, 1 of them failed",
        "prompts 7, 12 345 tokens in and ? out",
        "study results/s",
        "Saves 30 %.",
    ):
        assert part in one_line(out)
    assert "\nrun  --it\n" in out, "a command is never respaced"


@pytest.mark.parametrize(
    ("shown", "label"),
    [(True, "launch it with\n"), (False, "launch the best of the search with (not shown to save)\n")],
)
def test_a_command_whose_saving_is_not_confirmed_says_so(shown, label):
    better = HISTORY.add(trial(1, {"parallel": 8}, joules=(0.7,)))
    assert f"\n{label}run  --it\n" in summed(better, shown=shown)


def test_where_the_default_is_the_best_its_command_is_called_so():
    assert "\nlaunch the default with\nrun  --it\n" in summed(HISTORY, shown=False)


def test_a_summary_says_where_the_machine_drifted():
    lived = HISTORY
    for number in range(1, 4):
        lived = lived.add(trial(number))
    lived = lived.add(Repeat(trial=trial(0, joules=(1.2,) * 3), purpose="sentinel", after=4))
    assert "drift trial 0 used 20 % more when it ran again, so trials 1 to 3 compare badly" in one_line(summed(lived))


def test_windows_that_did_not_count_in_the_confirmation_are_counted_too():
    cut = replace(trial(0), measurements=(window(1.0), window(1.0, invalid=["cpu0: the counter went back by 3 J"])))
    pair = Pair(number=0, default=cut, best=trial(1), default_first=True, config={}, planned=6)
    said = one_line(summed(HISTORY, pairs=[pair]))
    assert "windows 8 measured, 1 of them did not count: cpu0: the counter went back by 3 J" in said


def test_a_summary_without_a_search_says_nothing_of_why_it_stopped():
    assert "stopped" not in summed(HISTORY, end=None)


def test_a_launch_command_stands_as_it_is_typed_however_long_it_is():
    assert f"\n{'word ' * 60}end\n" in summed(HISTORY, command="word " * 60 + "end")


def test_a_launch_command_keeps_the_line_breaks_in_its_words():
    command = shlex.join(["python3", "-c", "for n in range(2):\n    print(n)\n"])
    assert f"\n{command}\n" in summed(HISTORY, command=command)


@pytest.mark.parametrize(("shown", "option"), [(True, ""), (False, " --unconfirmed")])
def test_a_launch_command_that_is_a_script_is_left_to_apply(shown, option):
    command = shlex.join(["python3", "-c", "print()\n" * 12])
    better = HISTORY.add(trial(1, {"parallel": 8}, joules=(0.7,)))
    said = summed(better, shown=shown, command=command)
    assert f"\ntune apply results/s{option}  # prints the command of 13 lines\n" in said
    assert "print()" not in said


WITH_LOSS = History(
    trials=(lossy(0, "f16", 1.0, 0.0), lossy(1, "f16", 0.9, 0.0, parallel=8), lossy(2, "q4", 0.5, 0.25))
)


def test_a_best_that_costs_quality_says_how_much_and_which_one_costs_none():
    said = one_line(summed(WITH_LOSS, space=LOSSY))
    assert "best 500 mJ/token ± 4.0 %, 0.50x the default, quality_loss 0.25 nats/token, trial 2 by rules" in said
    assert "best at equal quality 900 mJ/token ± 4.0 %, 0.90x the default, trial 1 by rules" in said


def test_where_nothing_but_the_default_keeps_the_quality_it_is_named_so():
    only = History(trials=WITH_LOSS.trials[::2])
    assert "best at equal quality 1.00 J/token ± 4.0 %, the default" in one_line(summed(only, space=LOSSY))


def test_with_a_limit_on_quality_the_best_is_the_best():
    said = one_line(summed(WITH_LOSS, space=LOSSY, limits=["quality_loss<=0.3"]))
    assert "quality_loss 0.25 nats/token" in said
    assert "equal quality" not in said


def test_a_report_ends_with_a_best_that_costs_quality_and_the_one_that_costs_none():
    desk = Desk()
    known = replace(header(), space=tuple(LOSSY.record()))
    desk.screen.report(Study(folder=Path("x"), header=known, history=WITH_LOSS))
    said = one_line(desk.out)
    assert "best 500 mJ/token ± 4.0 %, 0.50x the default, quality_loss 0.25 nats/token, trial 2 by rules" in said
    assert "best at equal quality 900 mJ/token ± 4.0 %, 0.90x the default, trial 1 by rules" in said


def test_a_best_within_noise_says_so():
    assert "(within noise)" in one_line(summed(HISTORY.add(trial(1, {"parallel": 8}, joules=(0.99, 1.0, 0.98)))))


def test_a_summary_without_results_still_ends_with_its_sentence():
    out = summed(History(), command=None, used=Usage(0, None, None), verdict="No saving shown.")
    assert out.rstrip().endswith("No saving shown.")
    assert "none: no LLM took part" in one_line(out)


def test_a_report_lists_every_trial_with_its_failure_or_its_doubts():
    doubted = trial(1, {"parallel": 8}, joules=(0.5, 0.9, 0.7), source="llm")
    desk = Desk()
    lived = HISTORY.add(doubted).add(trial(2, {"threads": 1}, error="killed by SIGKILL"))
    desk.screen.report(
        Study(folder=Path("results/s"), header=header(), history=lived, ends=(End(kind="goal", reason="done"),))
    )
    out = one_line(desk.out)
    for part in (
        "0 default (the default) ~ 1.00 J ± 4.0 %",
        "~ cannot be told from the best",
        "launches of one configuration are assumed to differ by 2.0 %",
        "2 rules threads 2 -> 1 failed",
        "trial 1: the windows differ by 29 %",
        "trial 2: killed by SIGKILL",
        "mean power",
        "stopped done",
    ):
        assert part in out
    assert max(map(len, desk.out.splitlines())) <= 80
    assert desk.err == ""


def test_a_doubt_that_several_trials_share_is_said_once_with_their_numbers():
    desk = Desk()
    spread = [trial(n, {"parallel": 8}, joules=(0.5, 0.9 + 0.1 * n, 0.7)) for n in (1, 2)]
    desk.screen.report(Study(folder=Path("x"), header=header(), history=HISTORY.add(spread[0]).add(spread[1])))
    assert "trials 1, 2, in the words of trial 1: the windows differ by 34 %" in one_line(desk.out)
    assert one_line(desk.out).count("the windows differ") == 1


def test_a_report_keeps_segments_apart():
    later = Segment(number=1, differences=(), machine={"cpu": "EPYC"}, identity={}, space=tuple(SPACE.record()))
    desk = Desk()
    lived = HISTORY.add(replace(trial(1, {"parallel": 8}), segment=1))
    desk.screen.report(Study(folder=Path("x"), header=header(), history=lived, segments=(later,)))
    assert desk.out.count("not compared with the others") == 2
    assert "x the default" not in desk.out


def test_a_study_without_trials_has_a_report():
    desk = Desk()
    desk.screen.report(Study(folder=Path("x"), header=replace(header(), llm=None)))
    assert "proposer" in desk.out


@pytest.mark.parametrize("width", [80, 120])
def test_a_change_is_never_broken_in_its_middle(width):
    desk = Desk(width=width)
    many = trial(1, {"parallel": 16, "threads": 1, "flash": "off"}, source="llm")
    desk.screen.report(Study(folder=Path("x"), header=header(), history=HISTORY.add(many)))
    for change in ("parallel 4 -> 16", "threads 2 -> 1", "flash auto -> off"):
        assert change in desk.out


def test_a_mixed_table_labels_each_energy_that_differs_from_its_heading():
    desk = Desk(width=120)
    estimated = replace(trial(1), measurements=(window(1.0, quality="estimated"),) * 3)
    desk.screen.report(Study(folder=Path("x"), header=header(), history=HISTORY.add(estimated)))
    assert "1.00 J ± 4.0 % estimated" in desk.out


@dataclass
class Line:
    name: str
    state: str
    reason: str
    remedy: str


def test_the_doctor_gives_a_command_on_one_line_of_its_own():
    desk = Desk()
    command = "sudo chmod a+r " + " ".join(f"/sys/class/powercap/intel-rapl:{n}/energy_uj" for n in range(4))
    desk.screen.doctor(
        [Line("rapl", "missing", "only root can read it", f"{command}\nsecond"), Line("nvml", "ok", "1 GPU", "")]
    )
    assert [line.rstrip() for line in desk.out.splitlines()] == [
        "missing  rapl",
        "         only root can read it",
        f"         $ {command}",
        "         $ second",
        "ok       nvml",
        "         1 GPU",
    ]


def test_a_prompt_is_printed_exactly_and_its_turns_are_told_apart():
    desk = Desk()
    desk.screen.messages([Message("user", "a  b\n\n  c\n")])
    assert desk.out == "a  b\n\n  c\n"
    desk = Desk()
    desk.screen.messages([Message("user", "one"), Message("assistant", "two")])
    assert desk.out == "--- user ---\none\n--- assistant ---\ntwo\n"


def test_a_failed_trial_shows_its_cause_and_the_last_lines_of_its_log():
    desk = Desk(live=True)
    failed = replace(
        trial(1, {"parallel": 8}, error="the engine was killed"), log=("one", "two", "3", "4", "\x1b[2Jlast")
    )
    desk.screen.trial_ended(failed, HISTORY.add(failed), [])
    for part in ("the engine was killed", "| two", "| last"):
        assert part in desk.err
    assert "| one" not in desk.err
    assert "\x1b[2J" not in desk.err
