import pytest
from contracts.proposer_contract import ProposerContract, ran, study

from tuner.proposers import CLASSICAL, open_classical
from tuner.proposers.largest import BATCHES, batch_of
from tuner.space import Choice, Constraint, Int, SearchSpace
from tuner.trial import History


class TestLargest(ProposerContract):
    def open(self, seed):
        return open_classical("largest", seed)


SIZES = (8, 16, 32, 64, 128)
ENGINE = SearchSpace(
    (
        Choice(name="gpu", meaning="GPU.", default="small", values=("small", "large")),
        Choice(name="max_num_seqs", meaning="Batch.", default=16, values=SIZES, ordered=True),
        Choice(name="gpus", meaning="GPUs.", default=1, values=(1, 2, 4), ordered=True),
    )
)


def limited(config):
    """The batch that meets the limit: 32 on the small GPU, 64 on the large one; the larger, the cheaper."""
    return 1 / config["max_num_seqs"] if config["max_num_seqs"] <= {"small": 32, "large": 64}[config["gpu"]] else None


def proposed(space, energies, trials):
    start = ran(space, ({}, energies(space.default())))
    return [t.config for t in study(open_classical("largest", 0), space, energies, trials, start).trials[1:]]


def test_it_starts_from_the_largest_and_steps_down_until_the_limit_is_met():
    assert [c["max_num_seqs"] for c in proposed(ENGINE, limited, 3)] == [128, 64, 32]
    assert all(c["gpu"] == "small" and c["gpus"] == 1 for c in proposed(ENGINE, limited, 3))


def test_then_it_changes_the_others_one_at_a_time_and_keeps_the_batch():
    assert proposed(ENGINE, limited, 5)[3:] == [
        {"gpu": "large", "max_num_seqs": 32, "gpus": 1},
        {"gpu": "small", "max_num_seqs": 32, "gpus": 2},
    ]


def test_a_change_that_saved_may_have_made_room_for_a_larger_batch():
    better = lambda c: (e := limited(c)) and e * (0.5 if c["gpu"] == "large" else 1.0)  # noqa: E731
    assert proposed(ENGINE, better, 6)[3:] == [
        {"gpu": "large", "max_num_seqs": 32, "gpus": 1},
        {"gpu": "large", "max_num_seqs": 64, "gpus": 1},
        {"gpu": "large", "max_num_seqs": 128, "gpus": 1},
    ]


def test_a_default_that_is_the_largest_is_the_answer_at_once():
    space = ENGINE.narrow("max_num_seqs", "8..16")
    assert all(c["max_num_seqs"] == 16 for c in proposed(space, lambda c: 1 / c["max_num_seqs"], 2))


def test_sizes_that_are_not_legal_are_stepped_over():
    holds = Constraint("small GPUs hold 32", lambda c: c["gpu"] == "large" or c["max_num_seqs"] <= 32)
    space = SearchSpace(ENGINE.parameters, (holds,))
    assert proposed(space, limited, 1)[0]["max_num_seqs"] == 32


def test_a_long_range_is_stepped_down_by_halves():
    space = SearchSpace((Int(name="batch_size", meaning="Batch.", default=1, low=1, high=4096),))
    assert [c["batch_size"] for c in proposed(space, lambda c: 1.0 if c["batch_size"] < 600 else None, 4)] == [
        4096,
        2048,
        1024,
        512,
    ]


def test_without_a_batch_the_stand_in_says_so():
    space = SearchSpace((Int(name="cores", meaning="Cores.", default=1, low=1, high=8),))
    proposal = open_classical("largest", 0).propose(space, History())
    assert (proposal.in_place_of, proposal.reason.split(";")[0]) == ("largest", "no parameter is a batch")


@pytest.mark.parametrize("name", BATCHES)
def test_the_batch_is_found_by_name(name):
    space = SearchSpace(
        (
            Int(name="other", meaning="O.", default=1, low=1, high=8),
            Int(name=name, meaning="B.", default=1, low=1, high=8),
        )
    )
    assert batch_of(space).name == name


def test_a_batch_of_words_or_a_pinned_one_is_none():
    words = SearchSpace((Choice(name="batch_size", meaning="B.", default="s", values=("s", "m")),))
    assert batch_of(words) is None
    assert batch_of(ENGINE.pin("max_num_seqs", "64")) is None


def test_it_is_not_offered_where_there_are_no_limits():
    assert "largest" not in CLASSICAL
