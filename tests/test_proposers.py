import io
import logging
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import replace

import pytest
from contracts.proposer_contract import (
    SMALL,
    SPACE,
    START,
    ProposerContract,
    energy,
    ran,
    run,
    study,
)

from tuner.proposers import CLASSICAL, open_classical
from tuner.proposers.first import DefaultFirst
from tuner.proposers.rules import ADVICE, effects, seen_trials
from tuner.proposers.untried import Untried, generator
from tuner.space import Choice, Constraint, Float, Int, Refused, SearchSpace, Value
from tuner.trial import Decision, History, Proposal


class TestRandom(ProposerContract):
    def open(self, seed):
        return open_classical("random", seed)


class TestSobol(ProposerContract):
    def open(self, seed):
        return open_classical("sobol", seed)


class TestRules(ProposerContract):
    def open(self, seed):
        return open_classical("rules", seed)


class TestTpe(ProposerContract):
    def open(self, seed):
        return open_classical("tpe", seed)


class TestCmaes(ProposerContract):
    def open(self, seed):
        return open_classical("cmaes", seed)


@pytest.mark.slow
class TestGp(ProposerContract):
    trials = 10

    def open(self, seed):
        pytest.importorskip("torch", reason="Optuna's Gaussian process needs torch: pip install torch")
        return open_classical("gp", seed)


class TestDefaultFirst(ProposerContract):
    def open(self, seed):
        return DefaultFirst(open_classical("random", seed))

    # The default comes first here: its source is `default`, not that of the wrapped proposer.
    def test_it_goes_on_while_every_trial_fails(self):
        history = study(self.open(0), SPACE, lambda _: None, 12, History())
        assert [t.proposal.source for t in history.trials] == ["default"] * 2 + ["random"] * 10


# --- opening ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in CLASSICAL if n != "gp"])
def test_each_classical_proposer_opens_under_its_own_name(name):
    assert open_classical(name, 0).name == name


@pytest.mark.parametrize(
    ("name", "seed", "words"),
    [
        ("sobel", 0, ['no proposer called "sobel"', "did you mean sobol?", "rules, sobol, random, tpe, gp, cmaes"]),
        ("", 0, ["rules, sobol"]),
        ("random", -1, ["--seed -1", "expected 0 or more"]),
    ],
)
def test_what_cannot_be_opened_is_refused_with_the_choices(name, seed, words):
    with pytest.raises(Refused) as refusal:
        open_classical(name, seed)
    assert all(word in str(refusal.value) for word in words)


def test_gp_without_torch_is_refused_with_the_install_command(monkeypatch):
    monkeypatch.setattr("tuner.proposers.find_spec", lambda _name: None)
    with pytest.raises(Refused, match="`pip install torch`"):
        open_classical("gp", 0)


def test_opening_rules_imports_neither_numpy_nor_scipy_nor_optuna():
    code = (
        "import sys; from tuner.proposers import open_classical; open_classical('rules', 0);"
        "print({'numpy', 'scipy', 'optuna'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


# --- the default comes first -----------------------------------------------------------------


def test_the_default_is_the_first_trial():
    proposal = DefaultFirst(open_classical("random", 0)).propose(SPACE, History())
    assert proposal.config == SPACE.default()
    assert proposal.source == "default"


def test_a_default_that_failed_is_tried_once_more_because_everything_is_held_against_it():
    proposal = DefaultFirst(open_classical("random", 0)).propose(SPACE, ran(SPACE, ({}, None)))
    assert (proposal.source, proposal.config) == ("default", SPACE.default())


def test_a_default_that_failed_twice_is_not_tried_again():
    history = ran(SPACE, ({}, None), ({}, None))
    inner = open_classical("random", 0)
    assert DefaultFirst(inner).propose(SPACE, history) == inner.propose(SPACE, history)


def test_a_forbidden_default_is_passed_over_and_the_reason_says_so():
    space = SPACE.forbid("flash_attention", "auto")
    proposal = DefaultFirst(open_classical("random", 0)).propose(space, History())
    assert proposal.source == "random"
    assert "the default is not legal here" in proposal.reason
    assert "flash_attention is not auto" in proposal.reason
    assert space.check(proposal.config)


def test_a_default_that_the_person_turned_down_is_passed_over():
    default = Proposal(config=SPACE.default(), source="default")
    history = History().add(Decision(action="reject", before_trial=0, proposal=default))
    proposal = DefaultFirst(open_classical("random", 0)).propose(SPACE, history)
    assert proposal.config != SPACE.default()
    assert "not legal" not in proposal.reason


def test_nothing_legal_at_all_means_no_proposal():
    space = replace(SMALL, constraints=(Constraint("never", lambda _: False),))
    assert DefaultFirst(open_classical("random", 0)).propose(space, History()) is None


def test_a_first_trial_that_the_person_edited_is_not_followed_by_the_default():
    edited = Proposal(config={**SPACE.default(), "threads": 1}, source="human", in_place_of="default")
    history = History().add(run(0, edited, 1.0))
    inner = open_classical("random", 0)
    assert DefaultFirst(inner).propose(SPACE, history) == inner.propose(SPACE, history)


def test_a_new_segment_starts_with_the_default_again():
    resumed = replace(ran(SPACE, ({}, 1.0), ({"threads": 1}, 0.5)), segment=1)
    proposal = DefaultFirst(open_classical("random", 0)).propose(SPACE, resumed)
    assert (proposal.config, proposal.source) == (SPACE.default(), "default")


# --- what is untried -------------------------------------------------------------------------


def test_random_proposals_are_uniform_over_the_legal_configurations():
    counts: dict[str, int] = {}
    for seed in range(1800):
        proposal = open_classical("random", seed).propose(SMALL, History())
        counts[SMALL.key(proposal.config)] = counts.get(SMALL.key(proposal.config), 0) + 1
    # 18 legal configurations, 100 expected of each; 5 standard deviations are 49.
    assert len(counts) == 18
    assert all(51 < n < 149 for n in counts.values())


def test_random_proposals_depend_on_the_number_of_trials():
    two = ran(SPACE, ({}, 1.0), ({"threads": 1}, 1.0))
    random_search = open_classical("random", 0)
    assert random_search.propose(SPACE, START).config != random_search.propose(SPACE, two).config


def test_a_walk_finds_what_two_changes_together_make_legal():
    # Legal only on a diagonal that no single change stays on, in a space that is too large to list.
    parameters = tuple(Int(name=n, meaning="A digit.", default=0, low=0, high=19) for n in "abcde")
    diagonal = Constraint("a = b and nothing else", lambda c: c["a"] == c["b"] and c["c"] + c["d"] + c["e"] == 0)
    space = SearchSpace(parameters, (diagonal,))
    history = ran(space, ({}, 1.0))
    found = Untried.of(space, history).draw(generator(0, history))
    assert found is not None
    assert found["a"] == found["b"] > 0


def test_a_walk_finds_a_single_change_of_any_trial():
    parameters = tuple(Int(name=n, meaning="A number.", default=0, low=0, high=10**6) for n in ("step", "other"))
    space = SearchSpace(parameters, (Constraint("a chain", lambda c: c["step"] <= 2 and c["other"] == 0),))
    history = ran(space, ({}, 1.0), ({"step": 1}, None))
    assert Untried.of(space, history).draw(generator(0, history)) == {"step": 2, "other": 0}


def test_random_proposals_reach_far_from_what_was_tried():
    parameters = tuple(Int(name=n, meaning="A digit.", default=0, low=0, high=9) for n in "abcdefgh")
    space = SearchSpace(parameters)
    history = study(open_classical("random", 0), space, lambda _: 1.0, 20, ran(space, ({}, 1.0)))
    # Of 8 digits, 7.2 differ from the default on average.
    assert statistics.mean(len(space.changes(t.config)) for t in history.trials[1:]) > 6


def test_the_last_configuration_of_a_finite_space_is_found_even_when_luck_never_finds_it():
    fixed = Float(name="fixed", meaning="One value.", default=0.5, low=0.5, high=0.5)
    space = SearchSpace((Int(name="n", meaning="A number.", default=0, low=0, high=9_999), fixed))
    history = ran(space, *(({"n": n}, 1.0) for n in range(9_999)))
    assert Untried.of(space, history).draw(generator(0, history)) == {"n": 9_999, "fixed": 0.5}


# --- Sobol -----------------------------------------------------------------------------------


def test_sobol_proposes_the_points_of_scipys_sequence_in_order():
    from scipy.stats import qmc

    space = SearchSpace(tuple(Float(name=n, meaning="A number.", default=0.5, low=0, high=1) for n in "xy"))
    history = study(open_classical("sobol", 11), space, lambda _: 1.0, 130, History())
    expected = qmc.Sobol(2, scramble=True, seed=11).random_base2(8)[:130].tolist()
    assert [list(t.config.values()) for t in history.trials] == expected


def test_sobol_passes_over_illegal_points_and_repeated_cells():
    from scipy.stats import qmc

    history = study(open_classical("sobol", 0), SMALL, lambda _: 1.0, 10, History())
    expected = []
    for point in qmc.Sobol(3, scramble=True, seed=0).random_base2(7).tolist():
        config = SMALL.at(point)
        if not SMALL.broken(config) and config not in expected:
            expected.append(config)
    assert [t.config for t in history.trials] == expected[:10]


def test_when_the_sequence_is_used_up_the_random_stand_in_is_visible():
    parameters = tuple(Int(name=n, meaning="A digit.", default=0, low=0, high=99) for n in "abc")
    space = SearchSpace(parameters, (Constraint("b = c = 0", lambda c: c["b"] == c["c"] == 0),))
    history = ran(space, *(({"a": a}, 1.0) for a in range(99)))
    proposal = open_classical("sobol", 0).propose(space, history)
    assert proposal.config == {"a": 99, "b": 0, "c": 0}
    assert (proposal.source, proposal.in_place_of) == ("random", "sobol")
    assert "drawn at random instead" in proposal.reason


# --- Optuna ----------------------------------------------------------------------------------

LINE = SearchSpace(tuple(Float(name=n, meaning="A number.", default=0.5, low=0, high=1) for n in ("x", "y")))


def bowl(config: Mapping[str, Value]) -> float:
    """Least at x = 0.2, y = 0.7."""
    return math.exp(4 * (config["x"] - 0.2) ** 2 + 4 * (config["y"] - 0.7) ** 2)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_a_sampler_learns_where_energy_is_low(name):
    def typical(proposer: str, seed: int) -> float:
        history = study(open_classical(proposer, seed), LINE, bowl, 50, ran(LINE, ({}, bowl(LINE.default()))))
        return statistics.median(math.log(t.joules_per_unit) for t in history.trials[30:])

    learned = statistics.median(typical(name, seed) for seed in range(3))
    drawn = statistics.median(typical("random", seed) for seed in range(3))
    assert learned < 0.5 * drawn


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_a_sampler_keeps_away_from_where_trials_fail(name):
    def failing(config: Mapping[str, Value]) -> float | None:
        return None if config["x"] > 0.4 else 1.0 + 0.1 * config["y"]

    start = ran(LINE, ({"x": 0.1}, 1.05))
    failed = [
        sum(t.error is not None for t in study(open_classical(name, seed), LINE, failing, 40, start).trials[21:])
        for seed in range(3)
    ]
    # Drawn at random, 12 of the 20 would fail.
    assert statistics.median(failed) <= 6


def test_the_stand_in_for_a_sampler_is_visible():
    parameters = tuple(Int(name=n, meaning="A digit.", default=0, low=0, high=9) for n in "abcdef")
    space = SearchSpace(parameters, (Constraint("all but a are 0", lambda c: sum(c.values()) == c["a"]),))
    proposal = open_classical("tpe", 0).propose(space, ran(space, ({}, 1.0)))
    assert (proposal.source, proposal.in_place_of) == ("random", "tpe")
    assert "illegal or spent" in proposal.reason
    assert proposal.config["a"] > 0


@pytest.mark.parametrize(("name", "start"), [("tpe", 5), ("cmaes", 1)])
def test_a_random_start_is_told_apart_from_a_suggestion(name, start):
    history = study(open_classical(name, 0), SPACE, energy, 8, START)
    reasons = [t.proposal.reason for t in history.trials[1:]]
    assert ["random start" in r for r in reasons] == [n < start for n in range(1, 9)]


def test_optuna_says_nothing(caplog):
    stderr = io.StringIO()
    with redirect_stderr(stderr), caplog.at_level(logging.DEBUG):
        for name in ("tpe", "cmaes"):
            study(open_classical(name, 0), SPACE, energy, 8, START)
    assert stderr.getvalue() == ""
    assert caplog.records == []


# --- rules -----------------------------------------------------------------------------------


def slots(default: int = 4) -> Int:
    return Int(name="parallel", meaning="Sequences.", default=default, low=1, high=32, log=True)


def flag(name: str, default: bool) -> Choice:
    return Choice(name=name, meaning="A switch.", default=default, values=(False, True))


def test_rules_make_the_usual_moves_together_first():
    space = SearchSpace(
        (
            slots(),
            flag("repack", False),
            flag("mmap", True),
            Int(name="threads", meaning="Threads.", default=8, low=1, high=16),
        )
    )
    proposal = open_classical("rules", 0).propose(space, ran(space, ({}, 1.0)))
    assert space.changes(proposal.config) == {"parallel": 8, "repack": True}
    assert "parallel 4 -> 8, repack false -> true" in proposal.reason
    assert "share each read of the weights" in proposal.reason


def test_rules_follow_a_direction_that_paid_off_and_say_so():
    space = SearchSpace((slots(), flag("unknown", False)))
    history = ran(space, ({}, 1.0), ({"parallel": 8}, 0.7))
    proposal = open_classical("rules", 0).propose(space, history)
    assert proposal.config["parallel"] > 8
    assert "4 -> 8 used 30 % less" in proposal.reason
    assert "from trial 1" in proposal.reason


def test_rules_leave_a_direction_that_cost_energy_for_an_untested_parameter():
    space = SearchSpace((slots(), flag("unknown", False)))
    history = ran(space, ({}, 1.0), ({"parallel": 8}, 1.01))
    proposal = open_classical("rules", 0).propose(space, history)
    assert space.changes(proposal.config) == {"unknown": True}


def test_rules_put_off_what_cost_energy_from_another_configuration():
    space = SearchSpace((slots(), flag("unknown", False), flag("other", False), flag("third", False)))
    history = ran(space, ({}, 1.0), ({"parallel": 8}, 1.1), ({"unknown": True}, 0.8))
    following = study(open_classical("rules", 0), space, lambda _: 2.0, 2, history)
    assert [space.changes(t.config) for t in following.trials[3:]] == [
        {"unknown": True, "other": True},
        {"unknown": True, "third": True},
    ]


def test_rules_look_between_two_tried_values():
    space = SearchSpace((Int(name="level", meaning="Level.", default=50, low=0, high=100),))
    history = ran(space, ({}, 1.0), ({"level": 100}, 2.0), ({"level": 25}, 2.0))
    proposal = open_classical("rules", 0).propose(space, history)
    assert proposal.config == {"level": 75}
    assert "the best may lie between" in proposal.reason


def test_rules_go_on_from_the_best_trial_not_from_the_last_one():
    space = SearchSpace((slots(), flag("unknown", False), flag("other", False)))
    history = ran(space, ({}, 1.0), ({"parallel": 8, "unknown": True}, 0.5), ({"parallel": 32}, 2.0))
    proposal = open_classical("rules", 0).propose(space, history)
    base = {**space.default(), "parallel": 8, "unknown": True}
    assert sum(proposal.config[n] != base[n] for n in base) == 1


def test_rules_change_what_a_constraint_couples_together():
    sizes = (128, 256, 512, 1024)
    space = SearchSpace(
        (
            Choice(name="n_ubatch", meaning="Piece.", default=256, values=sizes, ordered=True),
            Choice(name="n_batch", meaning="Batch.", default=256, values=sizes, ordered=True),
        ),
        (Constraint("n_ubatch <= n_batch", lambda c: c["n_ubatch"] <= c["n_batch"]),),
    )
    proposal = open_classical("rules", 0).propose(space, ran(space, ({}, 1.0)))
    assert proposal.config == {"n_ubatch": 512, "n_batch": 512}
    assert "n_batch changes with it" in proposal.reason


def test_rules_jump_two_parameters_when_single_changes_are_used_up():
    space = SearchSpace((flag("a", False), flag("b", False)))
    history = ran(space, ({}, 1.0), ({"a": True}, 1.5), ({"b": True}, 1.5))
    proposal = open_classical("rules", 0).propose(space, history)
    assert proposal.config == {"a": True, "b": True}
    assert "every single change from here was tried" in proposal.reason


def test_rules_ask_for_less_memory_while_nothing_runs():
    space = SearchSpace((slots(16), flag("repack", True)))
    history = ran(space, ({}, None))
    tried = []
    for _ in range(3):
        proposal = open_classical("rules", 0).propose(space, history)
        assert "less memory" in proposal.reason
        tried.append(proposal.config["parallel"])
        history = history.add(run(len(history), proposal, None))
    assert tried == [8, 4, 2]


def test_rules_do_not_go_further_where_a_trial_failed():
    space = SearchSpace((slots(8), flag("unknown", False), flag("other", False)))
    history = ran(space, ({}, 1.0), ({"parallel": 16}, None))
    following = study(open_classical("rules", 0), space, lambda c: 1.0 + c["unknown"] + c["other"], 3, history)
    assert all(t.config["parallel"] < 16 for t in following.trials[2:])


@pytest.mark.parametrize(("joules", "words"), [(None, "4 -> 8 failed"), (5.0, "4 -> 8 used 400 % more")])
def test_a_dear_trial_is_not_called_a_failed_one(joules, words):
    space = SearchSpace((slots(),))
    known = effects(space, seen_trials(space, ran(space, ({}, 1.0), ({"parallel": 8}, joules))), 0.05)
    assert [str(e) for e in known["parallel"]] == [words]


def test_a_loss_of_several_changes_blames_none_of_them():
    space = SearchSpace((flag("a", False), flag("b", False)))
    known = effects(space, seen_trials(space, ran(space, ({}, 1.0), ({"a": True, "b": True}, 2.0))), 0.05)
    assert known == {"a": [], "b": []}


def test_a_saving_of_several_changes_is_shared_among_them():
    space = SearchSpace((flag("a", False), flag("b", False)))
    known = effects(space, seen_trials(space, ran(space, ({}, 1.0), ({"a": True, "b": True}, 0.25))), 0.05)
    assert [e.saving for e in known["a"] + known["b"]] == pytest.approx([math.log(2), math.log(2)])


@pytest.mark.parametrize("name", sorted(ADVICE))
@pytest.mark.parametrize(
    "make",
    [
        lambda n: Int(name=n, meaning="m", default=3, low=2, high=100),
        lambda n: Int(name=n, meaning="m", default=3, low=2, high=100, log=True),
        lambda n: Float(name=n, meaning="m", default=0.5, low=0.1, high=0.9),
        lambda n: Choice(name=n, meaning="m", default=64, values=(16, 64, 256), ordered=True),
        lambda n: Choice(name=n, meaning="m", default=False, values=(False, True)),
        lambda n: Choice(name=n, meaning="m", default="auto", values=("auto", "on", 7, True), ordered=True),
    ],
)
def test_advice_fits_a_parameter_of_any_kind(name, make: Callable[[str], Int | Float | Choice]):
    parameter = make(name)
    target = ADVICE[name].target(parameter)
    assert target is None or parameter.check(target) == target
    space = SearchSpace((parameter, flag("other", False)))
    history = study(open_classical("rules", 0), space, lambda c: 1.0 + c["other"], 5, ran(space, ({}, 1.0)))
    assert len(history) == min(6, space.size)


# --- rules against chance --------------------------------------------------------------------


def powers(low: int, high: int) -> tuple[int, ...]:
    return tuple(2**n for n in range(low, high + 1))


def octaves(value: Value, best: float) -> float:
    return abs(math.log2(value / best))


Landscape = tuple[SearchSpace, Callable[[random.Random], tuple[Callable[[Mapping[str, Value]], float], float]]]
"""A space and a maker of energies: joules per token of a configuration, and the least there is.

All are products of effects with interactions, as measured on llama.cpp on a CPU: best to worst 4 to 1
and more, sequences, threads and repacking lead. The optima differ from seed to seed.
"""


def llama_cpu() -> Landscape:
    space = SearchSpace(
        (
            slots(),
            Int(name="threads", meaning="m", default=8, low=1, high=16),
            Int(name="threads_batch", meaning="m", default=8, low=1, high=16),
            Choice(name="n_batch", meaning="m", default=2048, values=powers(5, 11), ordered=True),
            Choice(name="n_ubatch", meaning="m", default=512, values=powers(5, 11), ordered=True),
            Choice(name="flash_attention", meaning="m", default="auto", values=("off", "on", "auto")),
            flag("kv_unified", False),
            flag("repack", True),
            flag("mmap", True),
        ),
        (Constraint("n_ubatch <= n_batch", lambda c: c["n_ubatch"] <= c["n_batch"]),),
    )

    def make(rng: random.Random):
        parallel, threads, unified = rng.choice([8, 16, 32]), rng.choice([4, 6, 8]), rng.choice([-0.04, 0.04])
        slope, repack, flash = rng.uniform(0.1, 0.3), rng.uniform(0.2, 0.5), rng.uniform(0.05, 0.2)

        def log_energy(c: Mapping[str, Value]) -> float:
            return (
                slope * octaves(c["parallel"], parallel)
                + 0.15 * octaves(c["threads"], threads)
                + 0.05 * octaves(c["threads_batch"], 16)
                + 0.05 * octaves(c["n_ubatch"], 512)
                + flash * (c["flash_attention"] == "off")
                + repack * (not c["repack"])
                + unified * c["kv_unified"]
                + 0.1 * (c["parallel"] > 16 and c["n_ubatch"] < 256)
            )

        return lambda c: math.exp(log_energy(c)), math.exp(min(0.0, unified))

    return space, make


def gpu_server() -> Landscape:
    space = SearchSpace(
        (
            Int(name="max_num_seqs", meaning="m", default=64, low=1, high=1024, log=True),
            Choice(name="max_num_batched_tokens", meaning="m", default=2048, values=powers(8, 14), ordered=True),
            Choice(name="sm_clock_mhz", meaning="m", default=1980, values=tuple(range(660, 1981, 165)), ordered=True),
            flag("enforce_eager", False),
            flag("async_scheduling", False),
            Choice(name="attention_backend", meaning="m", default="a", values=("a", "b", "c")),
            Choice(name="block_size", meaning="m", default=16, values=(8, 16, 32, 64), ordered=True),
        ),
        (Constraint("tokens >= sequences", lambda c: c["max_num_batched_tokens"] >= c["max_num_seqs"]),),
    )

    def make(rng: random.Random):
        seqs, tokens, clock = rng.choice([128, 256, 512]), rng.choice([4096, 8192]), rng.choice([1155, 1320, 1485])
        backend, eager = rng.choice("abc"), rng.uniform(0.1, 0.4)

        def energy_of(c: Mapping[str, Value]) -> float:
            return math.exp(
                0.15 * octaves(c["max_num_seqs"], seqs)
                + 0.05 * octaves(c["max_num_batched_tokens"], tokens)
                + ((c["sm_clock_mhz"] - clock) / 1000) ** 2 * (1.5 if c["max_num_seqs"] >= seqs else 1.0)
                + eager * c["enforce_eager"]
                + 0.05 * (not c["async_scheduling"])
                + 0.06 * (c["attention_backend"] != backend)
                + 0.01 * octaves(c["block_size"], 32)
            )

        return energy_of, 1.0

    return space, make


def nameless() -> Landscape:
    """Names that no table knows: only the search from the best trial is at work."""
    space = SearchSpace(
        (
            Int(name="p", meaning="m", default=8, low=1, high=16),
            Int(name="q", meaning="m", default=4, low=1, high=64, log=True),
            Int(name="r", meaning="m", default=16, low=1, high=64, log=True),
            Choice(name="s", meaning="m", default="x", values=("x", "y", "z")),
            Choice(name="t", meaning="m", default="x", values=("x", "y", "z")),
            flag("u", False),
            flag("v", False),
        )
    )

    def make(rng: random.Random):
        p, q, r = rng.choice([4, 8, 12]), rng.choice(powers(0, 6)), rng.choice(powers(0, 6))
        s, t, u, v = rng.choice("xyz"), rng.choice("xyz"), rng.random() < 0.5, rng.random() < 0.5

        def energy_of(c: Mapping[str, Value]) -> float:
            return math.exp(
                0.1 * octaves(c["p"], p)
                + 0.15 * octaves(c["q"], q)
                + 0.1 * octaves(c["r"], r)
                + 0.2 * (c["s"] != s)
                + 0.1 * (c["t"] != t)
                + 0.3 * (c["u"] != u)
                + 0.05 * (c["v"] != v)
                + 0.1 * (c["u"] != u and c["s"] == s)
            )

        return energy_of, 1.0

    return space, make


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("landscape", [llama_cpu, gpu_server, nameless])
def test_rules_come_within_five_percent_of_the_best_sooner_than_chance(landscape):
    space, make = landscape()
    cap = 60

    def proposals(name: str, seed: int) -> int:
        energies, least = make(random.Random(seed))
        history = ran(space, ({}, energies(space.default())))
        proposer = open_classical(name, seed)
        while len(history) <= cap and history.best.joules_per_unit > 1.05 * least:
            proposal = proposer.propose(space, history)
            history = history.add(run(len(history), proposal, energies(proposal.config)))
        return len(history)

    rules = statistics.median(proposals("rules", seed) for seed in range(20))
    chance = statistics.median(proposals("random", seed) for seed in range(20))
    assert rules < chance / 2
