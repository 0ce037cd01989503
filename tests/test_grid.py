import itertools

import pytest
from contracts.proposer_contract import SMALL, SPACE, ProposerContract, ran, study

from tuner.proposers import open_classical
from tuner.proposers.grid import LEVELS, _points
from tuner.space import Choice, Float, Int, SearchSpace
from tuner.trial import History


class TestGrid(ProposerContract):
    def open(self, seed):
        return open_classical("grid", seed)


PLANE = SearchSpace(
    (
        Int(name="a", meaning="A.", default=5, low=1, high=9),
        Float(name="b", meaning="B.", default=0.5, low=0.0, high=1.0),
    )
)


def proposed(space, seed, trials):
    grown = study(open_classical("grid", seed), space, lambda _: 1.0, trials, ran(space, ({}, 1.0)))
    return [t.config for t in grown.trials[1:]]


def test_the_corners_come_first():
    corners = {(1, 0.0), (9, 0.0), (1, 1.0), (9, 1.0)}
    assert {(c["a"], round(c["b"], 9)) for c in proposed(PLANE, 0, 4)} == corners


def test_then_the_middles_and_no_corner_twice():
    points = [(c["a"], round(c["b"], 9)) for c in proposed(PLANE, 3, 8)]
    # 3 x 3 levels, less the middle of both, which is the default and was run.
    assert set(points) == set(itertools.product((1, 5, 9), (0.0, 0.5, 1.0))) - {(5, 0.5)}


def test_seeds_draw_different_orders_of_the_same_grid():
    orders = [[PLANE.key(c) for c in proposed(PLANE, seed, 4)] for seed in range(8)]
    assert len({tuple(order) for order in orders}) > 1
    assert len({tuple(sorted(order)) for order in orders}) == 1


@pytest.mark.parametrize("levels", LEVELS)
def test_every_point_of_a_grid_is_visited_once(levels):
    points = [SMALL.key(c) for c in _points(SMALL, levels, 7)]
    assert len(points) == len(set(points))


def test_values_without_an_order_are_all_in_the_coarsest_grid():
    space = SearchSpace((Choice(name="kind", meaning="Kind.", default="a", values=tuple("abcdef")),))
    assert {c["kind"] for c in _points(space, 2, 0)} == set("abcdef")


def test_the_order_does_not_keep_the_first_parameter_still():
    first = proposed(SPACE, 1, 8)
    assert len({c["parallel"] for c in first}) > 1


def test_what_the_grids_do_not_hold_is_drawn_at_random_and_says_so():
    space = SearchSpace((Int(name="a", meaning="A.", default=0, low=0, high=99),))
    grown = study(open_classical("grid", 0), space, lambda _: 1.0, 200, History())
    assert len(grown) == 100
    assert {t.proposal.in_place_of for t in grown.trials[-50:]} == {"grid"}
