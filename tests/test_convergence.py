"""What runs show: each statistic against scipy or a figure worked by hand, and methods that were planted."""

import itertools
import json
import math
import random
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tuner import convergence
from tuner.convergence import (
    ASSUMPTIONS,
    LEAST_VALUES,
    SHOWN,
    TARGETS,
    Target,
    a12,
    analyse,
    check_targets,
    converged_at,
    expanded_tail,
    holm,
    incumbent_energies,
    incumbents,
    kaplan_meier,
    log_rank,
    mean_interval,
    regret,
    restricted_mean,
    share_band,
    signed_rank,
)
from tuner.runs import Problem, Run, Step
from tuner.space import Refused

FIVE, TEN = TARGETS


def problem(name="p", best=1.0, **more):
    return Problem(**{"name": name, "best_joules_per_unit": best, "default_joules_per_unit": 2.0} | more)


def run(energies, *, seed=0, method="m", budget=None, on="p", infeasible=(), seen=None, **more):
    """One step an energy, which is what the table holds; None: it failed."""
    seen = energies if seen is None else seen
    steps = tuple(
        Step(
            number=n,
            config={"row": n},
            joules_per_unit=None if n in infeasible else s,
            true_joules_per_unit=e,
            feasible=e is not None and n not in infeasible,
            error="over the limit" if n in infeasible else None,
        )
        for n, (e, s) in enumerate(zip(energies, seen, strict=True))
    )
    budget = len(energies) - 1 if budget is None else budget
    return Run(problem=on, method=method, seed=seed, steps=steps, budget=budget, **more)


def runs_at(times, *, budget=10, **more):
    """For each time a run that gets to the best then; None: never. Each differs from the others a little."""
    return [
        run([2.0 - 0.001 * k if t is None or n < t else 1.0 for n in range(budget + 1)], seed=k, **more)
        for k, t in enumerate(times)
    ]


# --- one run ---------------------------------------------------------------------------------


def test_the_incumbent_is_chosen_by_what_was_seen_and_judged_by_what_is_true():
    lucky = run([2.0, 1.5, 1.0], seen=[2.0, 0.9, 1.1])
    assert incumbents(lucky) == (0, 1, 1)
    assert incumbent_energies(lucky) == (2.0, 1.5, 1.5)
    assert converged_at(lucky, problem(), FIVE) is None


def test_the_incumbent_is_the_first_of_equals():
    assert incumbents(run([2.0, 2.0, 2.0])) == (0, 0, 0)


def test_a_step_that_breaks_a_limit_is_no_incumbent():
    assert incumbents(run([2.0, 0.5, 1.5], infeasible=[0, 1])) == (None, None, 2)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -1.0, 0.0])
def test_a_step_without_a_sound_figure_is_no_incumbent(bad):
    steps = (Step(number=0, config={}, joules_per_unit=bad, feasible=True),)
    assert incumbents(Run(problem="p", method="m", seed=0, steps=steps)) == (None,)


def test_convergence_is_counted_in_proposals_and_the_default_is_proposal_0():
    assert converged_at(run([1.04, 1.0]), problem(), FIVE) == 0
    assert converged_at(run([2.0, 1.5, 1.04]), problem(), FIVE) == 2


def test_a_row_at_the_threshold_converges():
    assert converged_at(run([2.0, 1.05]), problem(), FIVE) == 1
    assert converged_at(run([2.0, 1.0500001]), problem(), FIVE) is None


@pytest.mark.parametrize(
    ("target", "at"),
    [
        (Target("within", 0.5), 1),
        (Target("within", 0.0), 3),
        (Target("ratio", 0.6), 2),
        (Target("absolute", 1.4), 2),
        (Target("absolute", 0.9), None),
    ],
)
def test_each_kind_of_target_has_its_threshold(target, at):
    assert converged_at(run([2.0, 1.5, 1.2, 1.0]), problem(), target) == at


def test_a_ratio_is_one_of_the_runs_own_default_where_the_problem_states_none():
    live = problem(best=None, default_joules_per_unit=None, kind="workload")
    assert converged_at(run([4.0, 3.0, 2.0]), live, Target("ratio", 0.5)) == 2
    assert converged_at(run([4.0, 3.0], infeasible=[0]), live, Target("ratio", 0.8)) is None


def test_regret_is_the_true_energy_of_the_incumbent_over_the_best_minus_1():
    one = run([2.0, 0.5, 1.5, 1.0], infeasible=[0, 1])
    assert [regret(one, problem(), n) for n in range(5)] == [None, None, 0.5, 0.0, None]
    assert regret(one, problem(best=None), 2) is None


def test_a_run_that_has_tried_everything_is_known_up_to_its_budget():
    done = run([2.0, 1.5], budget=5, exhausted=True)
    assert regret(done, problem(), 5) == 0.5
    assert analyse([problem()], [done]).cells[0].horizon == 5


def test_a_run_that_failed_is_known_up_to_its_last_step_only():
    broken = run([2.0, 1.5], budget=5, error="the provider answers 503")
    assert regret(broken, problem(), 1) == 0.5
    assert regret(broken, problem(), 2) is None


def test_a_missing_step_number_keeps_the_incumbent():
    one = run([2.0, 1.5, 1.2])
    gap = replace(one, steps=(one.steps[0], one.steps[2]))
    assert incumbent_energies(gap) == (2.0, 2.0, 1.2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_a_target_that_is_no_positive_number_is_refused(value):
    with pytest.raises(Refused, match="positive"):
        Target("within", value)


def test_a_target_nobody_reaches_is_refused_before_anything_runs():
    with pytest.raises(Refused, match=r"p: nobody can get to 0\.9 J/token .* its best feasible .* 1 J/token"):
        check_targets([problem()], [Target("absolute", 0.9)])
    with pytest.raises(Refused, match="the default breaks a limit"):
        check_targets([problem(default_joules_per_unit=None)], [Target("ratio", 0.9)])
    check_targets([problem()], [*TARGETS, Target("ratio", 0.5)])


# --- survival --------------------------------------------------------------------------------

# Weeks of remission of 42 children with leukaemia: E. J. Freireich et al., Blood 21 (1963), 699-716; in every textbook
# (Kleinbaum and Klein, Survival Analysis, table 1.1). True: relapsed.
DRUG = (
    [6, 6, 6, 7, 10, 13, 16, 22, 23, 6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35],
    [True] * 9 + [False] * 12,
)
PLACEBO = ([1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23], [True] * 21)


def test_kaplan_meier_gives_the_textbooks_curve():
    survival = [1 - share for share in kaplan_meier(*DRUG, horizon=35)]
    expected = {5: 1.0, 6: 0.8571, 7: 0.8067, 10: 0.7529, 13: 0.6902, 16: 0.6275, 22: 0.5378, 23: 0.4482, 35: 0.4482}
    assert {week: round(survival[week], 4) for week in expected} == expected


def censored_samples(least=1, most=30):
    return st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=least, max_size=most).map(
        lambda pairs: ([t for t, _ in pairs], [e for _, e in pairs])
    )


def as_scipy(sample):
    times, events = (np.array(x) for x in sample)
    return stats.CensoredData(uncensored=times[events], right=times[~events])


@given(censored_samples())
def test_kaplan_meier_agrees_with_scipy(sample):
    ours = kaplan_meier(*sample, horizon=12)
    theirs = stats.ecdf(as_scipy(sample)).cdf.evaluate(np.arange(13))
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_the_restricted_mean_is_the_area_under_the_curve():
    # S: 1 until 1, then 3/4; the run censored at 2 leaves two at risk, one converges at 3: 3/8.
    assert restricted_mean([1, 2, 3, 5], [True, False, True, False], 5) == pytest.approx(1 + 0.75 * 2 + 0.375 * 2)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=30))
def test_without_early_ends_the_restricted_mean_is_the_mean_of_the_restricted(times):
    found = restricted_mean([min(t, 10) for t in times], [t <= 10 for t in times], 10)
    assert found == pytest.approx(statistics.fmean(min(t, 10) for t in times))


@given(censored_samples(), st.integers(0, 12))
def test_a_censored_run_never_makes_a_method_look_faster(sample, last):
    times, events = sample
    with_it = restricted_mean([*times, last], [*events, False], 12)
    assert with_it >= restricted_mean(times, events, 12) - 1e-9


@given(st.lists(st.integers(0, 15), min_size=1, max_size=40), st.integers(0, 10))
def test_without_early_ends_the_band_is_wilsons(times, n):
    low, high = share_band([min(t, 10) for t in times], [t <= 10 for t in times], 10)
    wilson = stats.binomtest(sum(t <= n for t in times), len(times)).proportion_ci(0.95, method="wilson")
    assert (low[n], high[n]) == pytest.approx((wilson.low, wilson.high), abs=1e-6)


@given(censored_samples())
def test_the_band_holds_the_curve(sample):
    low, high = share_band(*sample, 12)
    for below, share, above in zip(low, kaplan_meier(*sample, 12), high, strict=True):
        assert 0 <= below <= share + 1e-9
        assert share - 1e-9 <= above <= 1


def test_early_ends_widen_the_band():
    times, events = [2] * 10 + [8] * 10, [True] * 10 + [False] * 10
    early = [2] * 10 + [2] * 5 + [8] * 5
    widths = [high[8] - low[8] for low, high in (share_band(t, events, 8) for t in (times, early))]
    assert widths[0] == pytest.approx(widths[1])  # censored after the last event: nothing is lost
    late = [2] * 5 + [6] * 5
    full = share_band([*late, *[8] * 10], events, 8)
    less = share_band([*late, *[4] * 5, *[8] * 5], events, 8)
    assert less[1][8] - less[0][8] > full[1][8] - full[0][8]


def test_the_log_rank_test_gives_the_textbooks_result():
    # Kleinbaum and Klein, table 2.2: 9 relapses where 19.25 were expected, chi-squared 16.793.
    assert log_rank([(DRUG, PLACEBO)]) == pytest.approx(stats.chi2.sf(16.793, 1), rel=1e-3)


@given(censored_samples(least=2), censored_samples(least=2))
def test_the_log_rank_test_agrees_with_scipy(a, b):
    with np.errstate(invalid="ignore", divide="ignore"):
        theirs = stats.logrank(as_scipy(a), as_scipy(b)).pvalue if any(a[1]) or any(b[1]) else math.nan
    assert log_rank([(a, b)]) == pytest.approx(1.0 if math.isnan(theirs) else theirs, abs=1e-9)


def test_the_log_rank_test_adds_strata():
    # Twice the same stratum: twice the excess, twice the variance, so z grows by the square root of 2.
    z = stats.norm.isf(log_rank([(DRUG, PLACEBO)]) / 2)
    assert stats.norm.isf(log_rank([(DRUG, PLACEBO)] * 2) / 2) == pytest.approx(z * math.sqrt(2))


# --- intervals and tests ---------------------------------------------------------------------


def test_the_percentiles_are_expanded_as_hesterberg_says():
    assert expanded_tail(5) == pytest.approx(stats.norm.cdf(-math.sqrt(5 / 4) * stats.t.ppf(0.975, 4)), rel=1e-6)
    # By tables: t is 2.093, so Phi(-2.147).
    assert expanded_tail(20) == pytest.approx(0.0159, abs=1e-4)
    assert expanded_tail(10_000) == pytest.approx(0.025, abs=1e-4)


def test_fewer_than_six_values_have_no_interval():
    assert mean_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert mean_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) is not None


@pytest.mark.parametrize(
    ("values", "least"),
    # In 4000 samples it holds the mean in 91.7, 94.1, 95.1 and 94.4 % of them.
    [(6, 0.88), (10, 0.91), (20, 0.92), (50, 0.92)],
)
def test_the_interval_of_a_mean_holds_it_nearly_as_often_as_it_says(values, least):
    # Proposals of random search that hits with 1 in 10, restricted at 20: skewed, and 12 % are censored.
    rng = np.random.default_rng(1)
    truth = sum(0.9**n for n in range(20))
    samples = np.minimum(rng.geometric(0.1, size=(600, values)), 20)
    inside = sum(low <= truth <= high for low, high in map(mean_interval, samples))
    assert inside / 600 >= least


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9))
def test_the_signed_rank_test_of_few_values_is_that_of_all_sign_flips(values):
    ranks = stats.rankdata(np.abs(values))
    plus = sum(r for r, v in zip(ranks, values, strict=True) if v > 0)
    free = [r for r, v in zip(ranks, values, strict=True) if v]
    sums = [sum(c) for c in itertools.product(*((0, r) for r in free))]
    centre = sum(free) / 2
    extreme = statistics.fmean(abs(s - centre) >= abs(plus - centre) - 1e-9 for s in sums)
    assert signed_rank(values) == pytest.approx(extreme, abs=1e-9)


def test_the_signed_rank_test_agrees_with_scipy():
    rng = random.Random(3)
    values = [size * rng.choice((-1, 1, 1)) for size in range(1, 41)]
    assert signed_rank(values) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)
    ties = random.Random(3).choices(range(-5, 7), k=150)
    # scipy goes by the normal approximation here, with the correction for ties.
    assert signed_rank(ties) == pytest.approx(stats.wilcoxon(ties, zero_method="pratt").pvalue, rel=0.02)
    many = random.Random(4).choices(range(-5, 7), k=300)
    assert signed_rank(many) == stats.wilcoxon(many, zero_method="pratt").pvalue
    assert signed_rank([0.0] * 20) == 1.0


def test_rounding_errors_do_not_break_ties():
    assert signed_rank([0.1 + 0.2, -0.3, 0.3, 1e-15]) == signed_rank([0.3, -0.3, 0.3, 0.0])


def test_holms_correction_gives_the_worked_example():
    # Sorted: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holms_correction_keeps_the_order_and_lies_between_p_and_bonferronis(ps):
    adjusted = holm(ps)
    for p, q in zip(ps, adjusted, strict=True):
        assert p <= q <= min(1.0, p * len(ps))
    assert [q for _, q in sorted(zip(ps, adjusted, strict=True))] == sorted(adjusted)


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9), min_size=1))
def test_the_effect_size_is_mann_and_whitneys_u_as_a_share(mine, other):
    u = stats.mannwhitneyu(other, mine).statistic
    assert a12(mine, other) == pytest.approx(u / (len(mine) * len(other)))


# --- cells -----------------------------------------------------------------------------------


def test_a_cell_says_what_its_runs_did():
    runs = runs_at([1, 2, 2, 3, 4, 7, None, None])
    cell = analyse([problem()], runs).cell("p", "m", FIVE)
    assert (cell.runs, cell.converged, cell.incomplete, cell.horizon) == (8, 6, 0, 10)
    assert cell.share == pytest.approx(6 / 8)
    assert cell.mean == pytest.approx((1 + 2 + 2 + 3 + 4 + 7 + 10 + 10) / 8)
    assert cell.median == 3
    assert cell.curve[:4] == pytest.approx((0, 1 / 8, 3 / 8, 4 / 8))
    assert cell.mean_low < cell.mean < cell.mean_high
    assert cell.share_low < cell.share < cell.share_high
    assert cell.final == pytest.approx(1.0)
    assert cell.regret_at(99) is None


def test_no_median_where_half_never_get_there():
    assert analyse([problem()], runs_at([1, None, None])).cell("p", "m", FIVE).median is None


def test_runs_with_nothing_feasible_rank_worst_and_have_no_mean():
    runs = [run([2.0, e], seed=k, infeasible=[0] if e < 9 else [0, 1]) for k, e in enumerate([1.0, 1.5, 9.0, 9.0])]
    found = analyse([problem()], runs).cells[0].regret_at(1)
    assert (found.low, found.median, found.high) == (pytest.approx(0.375), None, None)
    assert (found.mean, found.share_without, found.runs) == (pytest.approx(0.25), 0.5, 4)
    before = analyse([problem()], runs).cells[0].regret_at(0)
    assert (before.median, before.mean, before.share_without) == (None, None, 1.0)


def test_failed_and_infeasible_proposals_are_counted_apart_and_the_default_is_no_proposal():
    cell = analyse([problem()], [run([2.0, None, 1.5, 1.2], infeasible=[0, 2])]).cells[0]
    assert (cell.failed_per_run, cell.infeasible_per_run) == (1.0, 1.0)


def test_prompts_and_tokens_are_means_over_the_runs_that_report_them():
    runs = [
        run([2.0, 1.0], seed=0, prompts=2, input_tokens=100, llm="a"),
        run([2.0, 1.1], seed=1, prompts=4, llm="b"),
    ]
    cell = analyse([problem()], runs).cells[0]
    assert (cell.prompts_per_run, cell.input_tokens_per_run, cell.output_tokens_per_run) == (3, 100, None)
    assert cell.llm == "a, b"


def test_over_all_problems_each_counts_the_same():
    runs = [*runs_at([2, 2, 4, 4], on="p"), *runs_at([8], on="q")]
    cell = analyse([problem("p"), problem("q")], runs).cell(None, "m", FIVE)
    assert (cell.problems, cell.runs, cell.mean, cell.final) == (2, 5, pytest.approx((3 + 8) / 2), None)


def test_where_nobody_knows_the_best_the_best_of_all_methods_stands_in_and_this_is_said():
    runs = [run([2.0, 1.5], method="a"), run([2.0, 1.0], method="b")]
    found = analyse([problem(best=None, kind="workload")], runs)
    assert [found.cell("p", m, FIVE).converged for m in "ab"] == [0, 1]
    assert any("nobody knows the best" in note for note in found.notes)


def test_the_same_run_for_every_seed_is_one_result_without_an_interval():
    cell = analyse([problem()], [run([2.0, 1.5, 1.0], seed=k) for k in range(50)]).cells[0]
    assert cell.same_for_every_seed
    assert (cell.mean_low, cell.share_low, cell.curve_low) == (None, None, None)


# --- two methods -----------------------------------------------------------------------------


def two(mine, other, **more):
    runs = [*runs_at(mine, method="a", **more), *runs_at(other, method="b", **more)]
    return next(c for c in analyse([problem()], runs, [FIVE]).comparisons)


def test_a_clear_difference_is_said_as_a_person_would():
    found = two([1, 2, 3, 2, 1, 2, 3, 2, 1, 2], [5, 5, 6, 6, 4, 5, 6, 5, 4, 5])
    assert found.test == "signed-rank"
    assert found.distinct
    assert found.sentence == (
        "a needs 3.2 proposals fewer than b (95 % CI 3.0 to 3.6, p = 0.002 after Holm, better in 10 of 10 pairs)"
    )


def test_the_better_method_is_named_first():
    found = two([5, 5, 6, 6, 4, 5, 6, 5, 4, 5], [1, 2, 3, 2, 1, 2, 3, 2, 1, 2])
    assert found.difference > 0
    assert found.sentence.startswith("b needs 3.2 proposals fewer than a (95 % CI 3.0 to 3.6,")


def test_no_difference_is_said_with_its_interval():
    found = two([1, 2, 3, 4, 5, 6, 7, 8], [2, 1, 4, 3, 6, 5, 8, 7])
    assert (found.wins, found.ties, found.losses) == (4, 0, 4)
    assert found.sentence.startswith("a and b cannot be told apart (difference 0.0 proposals, 95 % CI ")
    assert "p = 1.00 after Holm, better in 4, worse in 4 of 8 pairs" in found.sentence


def test_more_than_a_fifth_censored_takes_the_log_rank_test():
    few = two([1, 2, 3, 4, 5, 6, 7, 8, 9, None], [1, 2, 3, 4, 5, 6, 7, 8, None, None])
    many = two([1, 2, 3, 4, 5, 6, 7, 8, 9, None], [1, 2, 3, 4, 5, 6, None, None, None, None])
    assert (few.censored, few.test) == (pytest.approx(0.15), "signed-rank")
    assert (many.censored, many.test) == (pytest.approx(0.25), "log-rank")
    assert many.p == pytest.approx(
        stats.logrank(
            stats.CensoredData(uncensored=[1, 2, 3, 4, 5, 6, 7, 8, 9], right=[10]),
            stats.CensoredData(uncensored=[1, 2, 3, 4, 5, 6], right=[10] * 4),
        ).pvalue
    )


def test_fewer_than_six_pairs_are_not_tested_and_the_sentence_says_so():
    found = two([1, 1, 1], [9, 9, 9])
    assert (found.p, found.low, found.distinct) == (None, None, False)
    assert found.sentence.startswith(
        "a needs 8.0 proposals fewer than b (not tested, better in 3, worse in 0 of 3 pairs;"
    )
    assert found.sentence.endswith("fewer than 6 pairs can show nothing at 5 %)")


def test_methods_that_need_as_many_are_not_said_to_need_fewer():
    found = two([1, 5, 9], [5, 1, 9])
    assert found.sentence.startswith("a and b need the same number of proposals (not tested, better in 1, worse in 1")


def test_pairs_share_a_seed():
    runs = [*runs_at([1, 2, 3], method="a"), *(replace(r, seed=r.seed + 1) for r in runs_at([4, 6], method="b"))]
    found = analyse([problem()], runs, [FIVE]).comparisons[0]
    assert (found.pairs, found.difference) == (2, statistics.fmean([2 - 4, 3 - 6]))


def test_without_a_common_seed_nothing_is_compared():
    runs = [*runs_at([1], method="a"), *(replace(r, seed=7) for r in runs_at([4], method="b"))]
    found = analyse([problem()], runs, [FIVE]).comparisons[0]
    assert found.sentence == "a and b cannot be compared: no pair of runs is complete"
    assert found.difference is None
    assert not found.distinct


def test_two_methods_that_never_vary_are_one_result_however_often_they_are_repeated():
    runs = [run([2.0] * t + [1.0] * (9 - t), method=m, seed=k) for m, t in (("a", 2), ("b", 7)) for k in range(50)]
    found = analyse([problem()], runs, [FIVE]).comparisons[0]
    assert (found.pairs, found.difference, found.p, found.low) == (1, -5, None, None)
    assert "both do the same for every seed" in found.sentence


def test_a_method_that_never_varies_is_a_constant_to_the_test():
    # 50 copies of a censored run are no sample of 50 survival times, so the log-rank test may not have them.
    runs = [run([2.0] * 11, method="a", seed=k) for k in range(20)]
    found = analyse([problem()], [*runs, *runs_at([5, 6, 7, 8] * 5, method="b")], [FIVE]).comparisons[0]
    assert found.censored == 0.5
    assert (found.test, found.pairs) == ("signed-rank", 20)


def many_problems(count, times):
    """`times(problem number)`: method -> times of its runs."""
    problems = [problem(f"p{k}") for k in range(count)]
    runs = [r for k in range(count) for m, found in times(k).items() for r in runs_at(found, method=m, on=f"p{k}")]
    return problems, runs


def test_over_six_problems_the_problem_is_the_unit():
    found = analyse(*many_problems(6, lambda k: {"a": [1, 2, k + 1], "b": [5, 6, 9]}), [FIVE]).comparisons[0]
    assert (found.problem, found.unit, found.pairs, found.wins) == (None, "problems", 6, 6)
    assert found.p == pytest.approx(2 / 2**6)
    assert "better in 6 of 6 problems" in found.sentence


def test_methods_that_never_vary_are_tested_over_problems():
    problems = [problem(f"p{k}") for k in range(8)]
    runs = [
        run([2.0] * t + [1.0] * (11 - t), method=m, seed=s, on=p.name)
        for k, p in enumerate(problems)
        for m, t in (("a", 1 + k % 3), ("b", 6 + k % 4))
        for s in range(5)
    ]
    found = analyse(problems, runs, [FIVE])
    assert (found.comparisons[0].pairs, found.comparisons[0].p) == (8, pytest.approx(2 / 2**8))
    assert any("a, b do the same for every seed" in note for note in found.notes)


def test_below_six_problems_seeds_are_the_unit_and_no_other_problems_are_spoken_of():
    found = analyse(*many_problems(2, lambda k: {"a": [1, 2, 3, 1, 2], "b": [5, 6, 9, 5, 7]}), [FIVE])
    assert (found.comparisons[0].unit, found.comparisons[0].pairs, found.comparisons[0].problems) == ("pairs", 10, 2)
    assert any("2 problems are too few to speak of others" in note for note in found.notes)
    assert found.cell(None, "a", FIVE).mean_low is not None


def test_few_problems_and_one_result_each_show_nothing():
    found = analyse(*many_problems(3, lambda k: {"a": [1], "b": [5]}), [FIVE])
    assert found.comparisons[0].p is None
    assert "one seed: one result a problem, and fewer than 6 problems" in found.comparisons[0].sentence
    assert found.cell(None, "a", FIVE).mean_low is None


def test_few_problems_with_many_censored_take_the_stratified_log_rank_test():
    found = analyse(*many_problems(2, lambda k: {"a": [1, 2, 3, 4, 5], "b": [9, None, None, None, 8]}), [FIVE])
    assert found.comparisons[0].test == "log-rank"


def test_too_few_problems_for_so_many_comparisons_are_named_as_the_reason():
    times = {"a": [1, 2], "b": [5, 6], "c": [8, 9]}
    all_pairs = analyse(*many_problems(6, lambda k: times), [FIVE])
    assert "6 problems are too few to tell apart in 3 comparisons" in all_pairs.sentences[0]
    one = analyse(*many_problems(6, lambda k: {m: times[m] for m in "ab"}), [FIVE])
    assert "too few" not in one.sentences[0]


def test_comparing_with_one_method_only_leaves_fewer_comparisons_to_correct_for():
    problems, runs = many_problems(7, lambda k: {"a": [1, 2], "b": [5, 6], "c": [8, 9]})
    every, one = analyse(problems, runs), analyse(problems, runs, against="c")
    assert {frozenset((c.method, c.other)) for c in one.comparisons} == {frozenset("ac"), frozenset("bc")}
    assert one.comparisons[0].p_holm == pytest.approx(4 * 2 / 2**7)
    assert every.comparisons[0].p_holm == pytest.approx(6 * 2 / 2**7)
    with pytest.raises(Refused, match="No run is of 'd', to compare with; the methods are a, b, c"):
        analyse(problems, runs, against="d")


def test_holm_takes_all_problems_and_each_problem_as_two_families_over_all_targets():
    rng = random.Random(0)
    times = [{m: [rng.randint(1, 10) for _ in range(8)] for m in "abc"} for _ in range(7)]
    found = analyse(*many_problems(7, lambda k: times[k])).comparisons
    over, each = [c for c in found if c.problem is None], [c for c in found if c.problem]
    for family, size in ((over, 3 * 2), (each, 3 * 2 * 7)):
        assert len(family) == size
        assert [c.p_holm for c in family] == pytest.approx(holm([c.p for c in family]))


# --- what is missing -------------------------------------------------------------------------


def test_a_run_that_failed_is_listed_censored_where_it_ended_and_left_out_of_pairs():
    broken = replace(run([2.0, 1.9, 1.8], seed=7, budget=10, method="a"), error="the provider answers 503.")
    others = [*runs_at([1, 2, 3, 4, 5, 6, 7], method="a"), *runs_at([2, 3, 4, 5, 6, 7, 8, 9], method="b")]
    found = analyse([problem()], [*others, broken], [FIVE])
    cell, comparison = found.cell("p", "a", FIVE), found.comparisons[0]
    assert (cell.runs, cell.incomplete, cell.converged, cell.horizon) == (8, 1, 7, 10)
    # After two of eight converged, one of the six left was lost; the others converge one by one.
    assert cell.curve[2:5] == pytest.approx((2 / 8, 1 - 6 / 8 * 4 / 5, 1 - 6 / 8 * 3 / 5))
    assert (comparison.pairs, comparison.missing) == (7, 1)
    assert found.incomplete[0].sentence == "a on p, seed 7: ended after 2 of 10 proposals: the provider answers 503."
    assert found.incomplete[0].sentence in found.sentences


def test_a_run_that_failed_after_it_got_there_counts():
    runs = [replace(run([2.0, 1.0], budget=10, method="a"), error="gone"), run([2.0] * 11, method="b")]
    found = analyse([problem()], runs, [FIVE])
    assert (found.cell("p", "a", FIVE).converged, found.cell("p", "a", FIVE).incomplete) == (1, 0)
    assert found.comparisons[0].difference == 1 - 10
    assert len(found.incomplete) == 1


def test_a_run_that_was_cut_short_is_listed():
    found = analyse([problem()], [run([2.0, 1.5], budget=10)])
    assert found.incomplete[0].sentence == "m on p, seed 0: ended after 1 of 10 proposals: cut short."


def test_a_method_without_any_run_on_a_problem_is_listed():
    runs = [run([2.0, 1.0], on="p", method="a"), run([2.0, 1.0], on="q", method="b")]
    found = analyse([problem("p"), problem("q")], runs, [FIVE])
    assert [i.sentence for i in found.incomplete] == ["b on p: no run.", "a on q: no run."]
    assert found.comparisons == ()


def test_a_run_without_steps_is_censored_at_once():
    cell = analyse([problem()], [run([], budget=10, error="no answer"), run([2.0, 1.0], seed=1)]).cells[0]
    assert (cell.runs, cell.incomplete, cell.final) == (2, 1, None)


def test_nothing_done_is_nothing_shown():
    found = analyse([problem()], [])
    assert (found.cells, found.overall, found.comparisons, found.sentences) == ((), (), (), ())


def test_two_runs_with_one_seed_are_refused():
    with pytest.raises(Refused, match="m on p: two runs with seed 0"):
        analyse([problem()], [run([2.0]), run([1.0])])


def test_a_run_on_an_unknown_problem_is_refused():
    with pytest.raises(Refused, match="'q', which is not among the problems"):
        analyse([problem()], [run([2.0], on="q")])


def test_a_ratio_of_a_default_that_gave_no_figure_is_refused():
    with pytest.raises(Refused, match="p: its default gave no figure within the limits"):
        analyse([problem(default_joules_per_unit=None)], [run([2.0, 1.5], infeasible=[0])], [Target("ratio", 0.5)])


def test_different_budgets_are_compared_up_to_the_least_and_this_is_said():
    runs = [*runs_at([9], budget=10, on="p"), *runs_at([3], budget=4, on="q")]
    found = analyse([problem("p"), problem("q")], runs, [FIVE])
    assert [found.cell(n, "m", FIVE).horizon for n in ("p", "q", None)] == [10, 4, 4]
    assert found.cell(None, "m", FIVE).mean == pytest.approx((4 + 3) / 2)
    assert any(note.startswith("Budgets differ") for note in found.notes)


def on_twins(with_names, without, problems=7, **more):
    """A method on so many tables and on the twin of each, two seeds: times with names and without."""
    names = [f"p{k}" for k in range(problems)]
    runs = [r for n in names for r in runs_at(with_names, on=n, **more)]
    runs += [r for n in names for r in runs_at(without, on=f"twin-{n}", **more)]
    twins = [problem(f"twin-{n}", anonymised=True, twin_of=n) for n in names]
    return [*map(problem, names), *twins], runs


def test_a_model_that_does_worse_without_names_is_told_from_one_that_does_not():
    recalls = analyse(*on_twins([1, 2], [8, 9], prompts=10), [FIVE]).recall
    assert [(c.method, c.other, c.problems, c.distinct) for c in recalls] == [("m", "m without names", 7, True)]
    assert recalls[0].difference == pytest.approx(1.5 - 8.5)
    assert "m needs 7.0 proposals fewer than m without names" in recalls[0].sentence
    (searches,) = analyse(*on_twins([3, 4], [4, 3], prompts=10), [FIVE]).recall
    assert not searches.distinct


def test_tables_are_compared_with_their_twins_only_for_methods_that_ask_a_model():
    assert analyse(*on_twins([1, 2], [8, 9]), [FIVE]).recall == ()


def test_what_twins_show_is_said_and_is_a_row_of_the_comparisons():
    found = analyse(*on_twins([1, 2], [8, 9], prompts=10), [FIVE])
    assert any("fewer than m without names" in sentence for sentence in found.sentences)
    assert [row["other"] for row in found.comparison_rows()] == ["m without names"]


def test_an_anonymised_twin_is_no_further_problem():
    problems = [problem("p"), problem("q"), problem("twin", anonymised=True)]
    found = analyse(problems, [run([2.0, 1.0], on=p.name) for p in problems], [FIVE])
    assert found.cell(None, "m", FIVE).problems == 2
    assert found.cell("twin", "m", FIVE) is not None
    assert any("twins stand by themselves" in note for note in found.notes)


# --- planted ---------------------------------------------------------------------------------


def landscape(rng, rows=60):
    """A table like the recorded ones: energies spread log-normally, a third over the limit; row 0 is the default."""
    return [(rng.lognormvariate(0, 0.5), row == 0 or rng.random() < 2 / 3) for row in range(rows)]


def searched(rows, order, **names):
    steps = tuple(
        Step(
            number=n,
            config={"row": row},
            joules_per_unit=rows[row][0] if rows[row][1] else None,
            true_joules_per_unit=rows[row][0],
            feasible=rows[row][1],
        )
        for n, row in enumerate(order)
    )
    return Run(budget=len(order) - 1, steps=steps, **names)


def simulated(rng, problems, seeds, methods, budget=20):
    """Runs of `methods`, name -> how many of the best rows it looks at first (0: honest random search)."""
    tables = [landscape(rng) for _ in range(problems)]
    best = [sorted((j, row) for row, (j, ok) in enumerate(rows) if ok) for rows in tables]
    described = [problem(f"p{k}", best[k][0][0], default_joules_per_unit=rows[0][0]) for k, rows in enumerate(tables)]
    runs = []
    for (k, rows), (method, peeks), seed in itertools.product(enumerate(tables), methods.items(), range(seeds)):
        order = rng.sample(range(1, len(rows)), budget)
        if peeks:
            order[rng.randrange(peeks)] = best[k][0][1]
        runs.append(searched(rows, [0, *order], problem=f"p{k}", method=method, seed=seed))
    return described, runs


@pytest.mark.usefixtures("untraced")
def test_a_method_that_reads_the_optimum_is_told_apart_from_honest_ones():
    problems, runs = simulated(random.Random(1), 12, 20, {"random": 0, "other": 0, "cheat": 8})
    found = analyse(problems, runs, bootstrap=500)
    over = [c for c in found.comparisons if c.problem is None]
    assert {c.distinct for c in over if "cheat" in (c.method, c.other)} == {True}
    assert not any(c.distinct for c in over if "cheat" not in (c.method, c.other))
    each = [c for c in found.comparisons if c.problem and "cheat" in (c.method, c.other)]
    assert statistics.fmean(c.distinct for c in each) > 0.9
    assert all(c.sentence.startswith("cheat needs") for c in over if "cheat" in (c.method, c.other))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("problems", "seeds"),
    [(1, 30), (3, 10), (12, 10)],
    ids=["one problem", "few problems", "over problems"],
)
def test_random_search_under_another_name_cannot_be_told_apart(problems, seeds):
    rng = random.Random(2)
    apart = 0
    for _ in range(200):
        found = analyse(*simulated(rng, problems, seeds, {"random": 0, "renamed": 0}), [TEN], bootstrap=300)
        apart += found.comparisons[0].distinct
    assert apart / 200 <= 0.05


@pytest.mark.usefixtures("untraced")
def test_many_renamed_methods_are_all_alike():
    rng = random.Random(5)
    wrong = 0
    for _ in range(25):
        found = analyse(*simulated(rng, 7, 8, dict.fromkeys("abcd", 0)), bootstrap=300)
        wrong += any(c.distinct for c in found.comparisons if c.problem is None)
        wrong += any(c.distinct for c in found.comparisons if c.problem)
    assert wrong / 50 <= 0.1  # Holm: 5 % for each family, and the interval has to agree


# --- whatever comes --------------------------------------------------------------------------


def anything():
    joules = st.one_of(st.none(), st.floats(0.5, 4.0), st.sampled_from([math.nan, math.inf, 0.0, -1.0]))
    steps = st.lists(st.tuples(joules, joules, st.booleans()), max_size=6).map(
        lambda found: tuple(
            Step(number=n, config={"row": n}, joules_per_unit=seen, true_joules_per_unit=true, feasible=ok)
            for n, (seen, true, ok) in enumerate(found)
        )
    )
    details = st.tuples(steps, st.sampled_from([0, 5, 8]), st.booleans(), st.sampled_from([None, "gone"]))
    keys = st.tuples(st.sampled_from(["p", "q"]), st.sampled_from("abc"), st.integers(0, 7))
    return st.dictionaries(keys, details, max_size=16).map(
        lambda found: [
            Run(problem=p, method=m, seed=s, steps=steps, budget=budget, exhausted=done, error=error)
            for (p, m, s), (steps, budget, done, error) in found.items()
        ]
    )


def finite(value):
    return value is None or isinstance(value, (str, bool, int)) or math.isfinite(value)


@settings(deadline=None)
@given(anything(), st.one_of(st.none(), st.floats(0.5, 4.0)))
def test_whatever_the_runs_hold_every_figure_is_sound_or_absent(runs, best):
    found = analyse([problem("p", best), problem("q", best, anonymised=True)], runs, bootstrap=50)
    rows = [*found.to_rows(), *found.comparison_rows()]
    json.dumps(rows, allow_nan=False)
    assert all(finite(value) for row in rows for value in row.values())
    for cell in (*found.cells, *found.overall):
        assert 0 <= cell.share <= 1 + 1e-9
        assert -1e-9 <= cell.mean <= cell.horizon + 1e-9
        assert list(cell.curve) == sorted(cell.curve)
        assert len(cell.curve) == len(cell.regrets) == cell.horizon + 1
    assert sum(c.runs for c in found.cells if c.target == FIVE) == len(runs)
    assert all(isinstance(s, str) for s in found.sentences)


@settings(deadline=None, max_examples=30)
@given(anything(), st.randoms(use_true_random=False))
def test_the_order_of_the_runs_changes_nothing(runs, rng):
    problems = [problem("p"), problem("q")]
    shuffled = rng.sample(runs, len(runs))
    assert repr(analyse(problems, shuffled, bootstrap=50)) == repr(analyse(problems, runs, bootstrap=50))


def test_rows_say_what_they_are_of():
    problems, runs = many_problems(2, lambda k: {"a": [1, None], "b": [5, 6]})
    found = analyse(problems, runs)
    rows = found.to_rows()
    assert len(rows) == (2 + 1) * 2 * 2
    assert {r["problem"] for r in rows} == {"p0", "p1", "all"}
    assert {r["target"] for r in rows} == {"within 5 % of the best", "within 10 % of the best"}
    assert all(f"regret_{n}_median" in rows[0] for n in SHOWN)
    assert rows[0]["regret_20_median"] is None  # the budget is 10
    assert {tuple(r) for r in rows} == {tuple(rows[0])}
    assert found.comparison_rows()[0]["sentence"] == found.comparisons[0].sentence


def test_targets_have_names():
    names = [Target("within", 0.05).name, Target("ratio", 0.7).name, Target("absolute", 1.2).name]
    assert names == ["within 5 % of the best", "at most 0.7 times the default", "at most 1.2 J per unit"]


def test_what_is_assumed_is_part_of_the_result():
    found = analyse([problem()], [])
    assert found.assumptions == ASSUMPTIONS
    assert all(sentence.endswith(".") for sentence in ASSUMPTIONS)
    assert f"{convergence.MOST_CENSORED:.0%}".rstrip("%") in " ".join(ASSUMPTIONS)
    assert LEAST_VALUES == convergence.LEAST_PROBLEMS == 6
