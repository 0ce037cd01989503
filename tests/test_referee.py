import math
import random
import re
import statistics
from dataclasses import replace

import pytest
import referee
from fakes.noise import Conditions, Machine, measured, still

from tuner.proposers.answer import read_answer
from tuner.space import Refused
from tuner.trial import Message

QUIET = still(0.001)


def case(method, seed=0, conditions=QUIET, **more):
    return referee.Case(method=method, seed=seed, conditions=conditions, **more)


# --- the noise ---


def test_the_machine_says_the_same_again_from_the_same_seed():
    def launches():
        machine = Machine(Conditions(), 3)
        return [machine.launch({}) for _ in range(5)]

    assert launches() == launches()


def logs(machine, count):
    return [math.log(sum(windows) / len(windows)) for windows in (machine.launch({}) for _ in range(count))]


def test_launches_differ_by_what_the_conditions_say():
    """The standard deviation of 4000 values is within 3.4 % of its own (3 sd)."""
    assert statistics.stdev(logs(Machine(still(0.05), 1), 4000)) == pytest.approx(0.05, rel=0.034)


def test_the_machine_warms_up_by_what_the_conditions_say_and_slowly():
    machine = Machine(Conditions(sigma=0.0, warm_up=0.03, wander=0.0, disturbed=0.0, warm_up_seconds=900), 1)
    seen = logs(machine, 300)
    assert seen == sorted(seen)
    assert seen[0] == pytest.approx(0.0)
    assert seen[30] == pytest.approx(0.03 * 0.632, rel=0.01)
    assert seen[-1] == pytest.approx(0.03, rel=0.01)


@pytest.mark.usefixtures("untraced")
def test_the_wander_keeps_its_size_and_forgets_where_it_was():
    here = Conditions(sigma=0.0, warm_up=0.0, wander=0.01, wander_seconds=300, launch_seconds=30, disturbed=0.0)
    seen = logs(Machine(here, 2), 20_000)
    assert statistics.stdev(seen) == pytest.approx(0.01, rel=0.1)
    assert statistics.correlation(seen[:-1], seen[1:]) == pytest.approx(0.905, abs=0.02)
    assert abs(statistics.correlation(seen[:-100], seen[100:])) < 0.1


def test_disturbances_are_rare_large_and_never_downwards():
    here = Conditions(sigma=0.0, warm_up=0.0, wander=0.0, disturbed=0.1, disturbance=0.05)
    seen = [v for v in logs(Machine(here, 2), 4000) if abs(v) > 1e-9]
    assert len(seen) / 4000 == pytest.approx(0.1, abs=0.015)
    assert min(seen) > 0
    assert sum(seen) / len(seen) == pytest.approx(0.05, rel=0.15)


def test_a_window_is_called_simulated():
    window = measured(0.5)
    assert (window.quality, window.joules_per_unit) == ("simulated", pytest.approx(0.5))


# --- the scripted chat ---


def test_the_scripted_chat_gives_answers_that_can_be_read_and_some_that_cannot():
    chat = referee.Scripted(1)
    usable = 0
    for _ in range(200):
        text = chat.reply(
            [Message("user", "- trial 3: parallel 4 -> 8, mmap true -> false: 0.5 J per token")], None
        ).text
        try:
            referee.SPACE.complete(read_answer(text).changes)
        except Refused:
            continue
        usable += 1
    assert 120 < usable < 190


def test_the_scripted_chat_reads_the_best_result_from_its_prompt():
    prompt = "## Results\n- trial 3: parallel 4 -> 8, mmap true -> false: 500 mJ per token, 95 % CI\n- trial 1: x"
    assert referee.Scripted(1)._best(prompt) == {"parallel": 8, "mmap": False}


# --- whole studies ---


@pytest.mark.parametrize("method", referee.METHODS)
def test_a_study_runs_to_its_last_sentence_and_is_judged_by_it(method):
    found = referee.study(case(method, effect=0.3))
    assert found["trials"] == 15
    assert found["claims"] is found["shown"] is True
    assert re.match(r"Trial \d+ saves 30 % \(95 % CI [\d.]+ to [\d.]+ %, 8 pairs, simulated\)\.", found["sentence"])
    assert (found["found"], found["held"] is not None) == (True, True)


def test_a_study_is_the_same_again_from_the_same_seed():
    assert referee.study(case("rules", 5, Conditions())) == referee.study(case("rules", 5, Conditions()))


def test_the_chats_bad_answers_reach_the_real_refusals():
    refused = sum(referee.study(case("llm", seed, trials=8, pairs=0))["prompts_refused"] for seed in range(3))
    assert refused > 0


def test_a_search_of_single_launches_launches_each_trial_once():
    assert referee.study(case("rules", conditions=still(0.02), plan=referee.SINGLE, pairs=0))["launches"] == 15


@pytest.mark.parametrize(
    ("sentence", "claims"),
    [
        ("Trial 3 saves 31 % (95 % CI 27 to 35 %, 8 pairs).", True),
        ("Trial 3 saves 5.1 % (95 % CI 2.2 to 8.0 %, 8 pairs, simulated).", True),
        ("Trial 3 saves an estimated 12 % (95 % CI 9.6 to 14 %, 8 pairs, estimated from CPU time over ...", True),
        ("Trial 3 saves 31 % (97.5 % CI 26 to 36 %, 8 pairs). This is confirmation 2 of this study; ...", True),
        ("No saving shown: that of trial 3 has the 95 % CI -1.0 to 3.0 %, 8 pairs.", False),
        ("No saving shown: 6 pairs are too few for an interval of 97.5 %.", False),
        ("No saving is claimed: trial 3 failed in 1 of 8 fresh launches (crash). A setting that fails ...", False),
        ("No saving shown: no setting used less energy than the default.", False),
        ("Not confirmed, so no saving is claimed.", False),
        ("No saving is claimed: 3 of 8 fresh pairs are done.", False),
    ],
)
def test_a_claim_is_told_from_what_claims_nothing(sentence, claims):
    assert bool(referee.CLAIM.search(sentence)) is claims


@pytest.mark.usefixtures("untraced")
def test_without_an_effect_savings_are_claimed_rarely():
    """12 studies of `rules`; with 5 % claims, 4 or more of them would come up once in 440 times."""
    found = [referee.study(case("rules", seed, Conditions())) for seed in range(12)]
    assert sum(f["claims"] for f in found) < 4
    assert all(f["claims"] == f["shown"] for f in found)


@pytest.mark.usefixtures("untraced")
def test_a_planted_effect_is_mostly_confirmed():
    found = [referee.study(case("rules", seed, Conditions(), effect=0.05)) for seed in range(8)]
    assert sum(f["claims"] for f in found) >= 5


@pytest.mark.usefixtures("untraced")
@pytest.mark.slow
@pytest.mark.parametrize("method", referee.METHODS)
def test_without_an_effect_at_most_one_study_of_twenty_claims_a_saving(method):
    """30 studies; where 5 % claim one, 6 or more do once in 300 times. `python tests/referee.py` makes 200 of each."""
    with referee.Workers(2) as workers:
        found = workers.of_each(referee.study, [case(method, seed, Conditions()) for seed in range(30)])
    assert sum(f["claims"] for f in found) < 6


# --- intervals and order ---


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("cv", [0.01, 0.05])
@pytest.mark.parametrize("pairs", [6, 8])
def test_the_interval_of_a_confirmation_holds_the_truth_in_93_to_97_percent(cv, pairs):
    """800 studies; 2.5 standard deviations of the share are 1.9 %."""
    held = sum(referee.confirmation_holds(cv, pairs, seed) for seed in range(800)) / 800
    assert 0.93 - 0.019 < held < 0.97 + 0.019


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("cv", [0.01, 0.05])
def test_the_interval_of_a_trial_named_beforehand_holds_the_truth_in_93_to_97_percent(cv, calibrated):
    """120 studies, the default and one more of each; 2.5 standard deviations of the share are 3.5 %."""
    found = [referee.search_holds(cv, calibrated, 0.0, seed) for seed in range(120)]
    held = sum(f["default"] + f["named"] for f in found) / 240
    assert 0.93 - 0.035 < held < 0.97 + 0.035


@pytest.mark.usefixtures("untraced")
def test_abba_is_fooled_by_a_warm_machine_less_often_than_blocks_are():
    warm = replace(still(0.01), warm_up=0.03, warm_up_seconds=160.0)
    fooled = {order: sum(referee.differs(warm, order, seed) for seed in range(150)) for order in ("A..AB..B", "ABBA")}
    assert fooled["ABBA"] < 15
    assert fooled["A..AB..B"] > 75


def test_the_heavy_tails_are_symmetric():
    draw = random.Random(1)
    assert sum(referee.heavy(draw) > 0 for _ in range(4000)) / 4000 == pytest.approx(0.5, abs=0.025)


# --- the command ---


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["aa", "--studies", "1", "--methods", "rules", "--sigma", "0.001"],
            "| rules | 0 of 1 | 0.0 % (0.0 to 97.5 %)",
        ),
        (["aa", "--studies", "1", "--methods", "rules,llm"], "| all | "),
        (["planted", "--studies", "1", "--methods", "rules", "--effect", "0.3"], "| rules | 100.0 % (2.5 to 100.0 %)"),
        (["coverage", "--studies", "2", "--searches", "1"], "| differ | none | 5 % |"),
        (["abba", "--studies", "3"], "| 2 % | "),
    ],
)
def test_each_command_prints_its_tables(capsys, arguments, says):
    referee.main([*arguments, "--jobs", "1"])
    out = capsys.readouterr().out
    assert says in out
    assert re.search(r"Run time \d+ s on 1 processes", out)


def test_two_processes_find_what_one_finds():
    cases = [case("rules", seed, trials=3, pairs=0) for seed in range(4)]
    with referee.Workers(1) as alone, referee.Workers(2) as two:
        assert two.of_each(referee.study, cases) == alone.of_each(referee.study, cases)


def test_a_share_of_nothing_is_no_share():
    assert referee.share(0, 0) == "-"
    assert referee.share(10, 200) == "5.0 % (2.4 to 9.0 %)"
