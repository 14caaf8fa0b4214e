"""Budget curves: the exact expectation against enumeration and resampling; draws; ratios."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.search_spaces import STUDIES, Choice, LogUniform, describe, search_space, size
from moe_lab.tuning import (
    Pool,
    bootstrap_best,
    budget_ratio,
    chance_of,
    difference_interval,
    draw_trials,
    expected_best,
    loss_behind,
    null_ratios,
    race_chance,
    rank_probabilities,
    selection_curves,
    times_fewer_trials,
    top_share,
    trials_needed,
)

losses = st.lists(st.tuples(st.integers(0, 5), st.floats(0, 10)), min_size=1, max_size=4)


def _by_enumeration(pool, budget, replacement):
    n = len(pool.valid)
    draws = itertools.product(range(n), repeat=budget) if replacement else itertools.permutations(range(n), budget)
    return np.mean([pool.test[min(draw, key=lambda i: (pool.valid[i], i))] for draw in draws])


@given(losses, st.integers(1, 4), st.booleans())
@settings(max_examples=60)
def test_expectation_equals_the_mean_over_all_possible_draws(rows, budget, replacement):
    pool = Pool.of(*zip(*rows, strict=True))
    if not replacement and budget > len(rows):
        with pytest.raises(ValueError, match="without replacement"):
            expected_best(pool, [budget], replacement)
        return
    assert expected_best(pool, [budget], replacement)[0] == pytest.approx(_by_enumeration(pool, budget, replacement))


def test_two_trials_by_hand():
    pool = Pool.of([0.2, 0.1], [5.0, 3.0])
    # One draw: either, with equal chance. Two draws: the worse only if both draws hit it, 1/4.
    assert expected_best(pool, [1, 2]).tolist() == pytest.approx([4.0, 0.75 * 3 + 0.25 * 5])
    assert expected_best(pool, [1, 2], replacement=False).tolist() == pytest.approx([4.0, 3.0])


@given(st.integers(1, 60), st.integers(1, 200), st.booleans())
def test_rank_probabilities_sum_to_one_and_favour_better_ranks(n, budget, replacement):
    if not replacement:
        budget = min(budget, n)
    probability = rank_probabilities(n, budget, replacement)
    assert probability.sum() == pytest.approx(1)
    assert (probability >= -1e-12).all()
    assert (np.diff(probability) <= 1e-12).all()


def test_resampling_estimates_the_same_curve():
    rng = np.random.default_rng(0)
    valid = rng.normal(size=40)
    pool = Pool.of(valid, valid + 0.3 * rng.normal(size=40))
    budgets = [1, 3, 10, 40]
    resampled = bootstrap_best(pool, budgets, n_resamples=4000, seed=1)
    error = resampled.std(0, ddof=1) / math.sqrt(len(resampled))
    assert (np.abs(resampled.mean(0) - expected_best(pool, budgets)) < 4 * error + 1e-9).all()


def test_with_an_endless_budget_the_best_trial_is_certain():
    pool = Pool.of([3, 1, 2], [30, 10, 20])
    assert expected_best(pool, [10_000])[0] == pytest.approx(10)


def test_selection_uses_validation_and_reports_test():
    pool = Pool.of([0.1, 0.2], [9.0, 1.0])  # the trial that looks best is worse
    assert top_share(pool, 0.5).mean == 9.0
    assert expected_best(pool, [50])[0] == pytest.approx(9.0)


def test_top_five_percent_of_five_hundred_are_twenty_five():
    pool = Pool.of(np.arange(500.0), np.arange(500.0))
    top = top_share(pool)
    assert top.n == 25
    assert top.mean == 12  # mean of 0 .. 24
    assert top.standard_error == pytest.approx(np.std(np.arange(25), ddof=1) / 5)
    assert math.isnan(top_share(Pool.of([1.0], [2.0])).standard_error)


def test_a_diverged_trial_ranks_last_and_does_not_spoil_the_top():
    pool = Pool.of([math.nan, 0.2, 0.1], [math.nan, 2.0, 1.0])
    assert pool.ranked_test[:2].tolist() == [1.0, 2.0]
    assert top_share(pool, 0.34).mean == 1.0


def test_a_diverged_trial_costs_as_much_as_the_worst_that_finished():
    pool = Pool.of([math.nan, 0.2, 0.1, 0.15], [math.nan, 2.0, 1.0, 5.0])
    assert expected_best(pool, [1])[0] == pytest.approx((5 + 2 + 1 + 5) / 4)
    assert times_fewer_trials(pool, pool) == 1
    assert np.isfinite(selection_curves(pool, 4)).all()
    with pytest.raises(ValueError, match="all trials diverged"):
        Pool.of([math.nan], [math.nan])


def test_a_pool_needs_as_many_test_as_validation_losses():
    with pytest.raises(ValueError, match="equally long"):
        Pool.of([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no test loss"):
        Pool.of([1.0], [math.nan])


def test_ratio_is_one_between_equal_pools_and_inverts_when_swapped():
    good = Pool.of(np.arange(20.0), np.arange(20.0))
    worse = Pool.of(np.arange(20.0) + 3, np.arange(20.0) + 3)
    assert times_fewer_trials(good, good) == 1
    assert times_fewer_trials(worse, good) > 1
    assert times_fewer_trials(worse, good) == pytest.approx(1 / times_fewer_trials(good, worse))


def test_trials_needed_is_the_first_budget_on_the_exact_curve():
    pool = Pool.of([0.0, 1.0], [0.0, 1.0])  # expectation 1/2, 1/4, 1/8, ...
    assert trials_needed(pool, 0.25, 10) == 2
    assert trials_needed(pool, 0.24, 10) == 3
    assert trials_needed(pool, -1.0, 10) is None


def test_a_ratio_is_the_difference_that_moves_the_curve_so_far():
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=40)
    gate = Pool.of(losses, losses)
    for ratio in (2, 5, 10):
        shift = loss_behind(gate, ratio) * (1 + 1e-9)
        plus = Pool.of(losses - shift, losses - shift)
        assert times_fewer_trials(gate, plus) == pytest.approx(ratio)
    assert loss_behind(gate, 1) == 0
    with pytest.raises(ValueError, match="from 1 to 40"):
        loss_behind(gate, 41)


@pytest.mark.parametrize(("ratio", "n"), [(1, 7), (3, 20), (10, 40), (40, 40), (80, 40)])
def test_race_chance_counts_whose_trial_is_the_best_of_all(ratio, n):
    rng = np.random.default_rng(0)
    m = n // ratio
    gate, plus = rng.random((20_000, n)), rng.random((20_000, n))
    won = (plus[:, :m].min(1, initial=2.0) <= gate.min(1)).mean()
    assert race_chance(ratio, n) == pytest.approx(m / (n + m))
    assert abs(won - race_chance(ratio, n)) < 4 * math.sqrt(0.25 / 20_000)


def test_race_chance_survives_ratios_that_are_no_exact_floats():
    assert race_chance(40 / 3, 40) == pytest.approx(3 / 43)
    with pytest.raises(ValueError, match="positive"):
        race_chance(0, 40)


def test_two_curves_in_a_heap_show_no_ratio_on_average_and_one_way_as_often_as_the_other():
    rng = np.random.default_rng(0)
    losses = rng.normal(size=60)
    pool = Pool.of(losses, losses)
    null = null_ratios(pool, n_resamples=2000)
    assert null.shape == (2000,)
    assert 1 / 30 <= null.min() < 1 < null.max() <= 30
    assert abs((null > 1).mean() - (null < 1).mean()) < 4 / math.sqrt(2000)
    assert null_ratios(pool, n_resamples=5).tolist() == null_ratios(pool, n_resamples=5).tolist() == null[:5].tolist()


def test_shuffling_rejects_a_true_difference_and_rarely_anything_else():
    rng = np.random.default_rng(1)
    better, chances = rng.normal(size=30) - 3, []
    gate = rng.normal(size=30)
    real = Pool.of(gate, gate), Pool.of(better, better)
    assert chance_of(times_fewer_trials(*real), null_ratios(*real, n_resamples=500)) < 0.01
    for _ in range(100):  # nothing differs: a p-value is at most 5 % in about 5 % of studies
        pools = [Pool.of(losses, losses) for losses in rng.normal(size=(2, 20))]
        chances.append(chance_of(times_fewer_trials(*pools), null_ratios(*pools, n_resamples=100)))
    assert np.mean(np.array(chances) <= 0.05) < 0.13


def test_pools_keep_their_sizes_when_dealt_again():
    small, large = Pool.of([0.0, 1.0], [0.0, 1.0]), Pool.of(np.arange(9.0), np.arange(9.0))
    assert null_ratios(small, large, n_resamples=200).max() <= 2  # at most as many trials as the smaller pool
    with pytest.raises(ValueError, match="one pool"):
        null_ratios(small, small, small)
    with pytest.raises(ValueError, match="one trial"):
        null_ratios(Pool.of([0.0], [0.0]))


def test_chance_of_counts_the_observation_itself():
    assert chance_of(5.0, np.array([1.0, 2.0, 5.0])) == 2 / 4
    assert chance_of(9.0, np.array([1.0, 2.0, 5.0])) == 1 / 4


def test_only_the_test_loss_of_the_chosen_trial_is_honest():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 4000))  # no trial is better than another
    validation, chosen, least = selection_curves(Pool.of(*noise), 40)
    assert validation[-1] < -1.9 and least[-1] < -1.9  # the minimum of 40 normals is -2.16 on average
    assert abs(chosen[-1]) < 0.3
    assert chosen[0] == pytest.approx(noise[1].mean())


def test_intervals_hold_the_value_and_see_a_clear_difference():
    rng = np.random.default_rng(0)
    loss = rng.normal(1, 0.05, 30)
    gate, plus = Pool.of(loss + 1, loss + 1), Pool.of(loss, loss)
    difference = difference_interval(gate, plus, 10, n_resamples=100)
    assert difference.low <= difference.value <= difference.high < 0
    same = difference_interval(gate, gate, 10, n_resamples=100)
    assert same.low < 0 < same.high
    ratio = budget_ratio(gate, plus, n_resamples=30)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value > 1


def test_draws_stay_in_the_space_are_repeatable_and_extend():
    space = {"lr": LogUniform(1e-4, 1e-2), "gamma": Choice((0.1, 1, 10))}
    drawn = draw_trials(space, 200, seed=3)
    assert drawn[:20] == draw_trials(space, 20, seed=3) != draw_trials(space, 20, seed=4)
    lr = np.array([row["lr"] for row in drawn])
    assert ((lr >= 1e-4) & (lr <= 1e-2)).all()
    assert 0.35 < (lr < 1e-3).mean() < 0.65  # half of the *logarithms* lie below the geometric middle
    counts = [sum(row["gamma"] == value for row in drawn) for value in (0.1, 1, 10)]
    assert sum(counts) == 200
    assert min(counts) > 40


def test_spaces_differ_in_size_by_gate():
    assert size(search_space("ml-1m", "topk")) == (1, 1)
    assert size(search_space("ml-1m", "comet")) == (30, 1)  # 5 gammas x 6 lambdas
    assert size(search_space("ml-1m", "comet+")) == (60, 1)  # gamma fixed, 6 lambdas, 10 lengths of the search
    assert describe(search_space("ml-1m", "hash")) == "1 x a range"


@pytest.mark.parametrize("dataset", STUDIES)
@pytest.mark.parametrize("gate", ["softmax", "hash+", "topk", "dselect_k", "comet+"])
def test_every_space_is_made_of_config_fields(dataset, gate):
    from moe_lab.experiments.recommender_config import RecommenderConfig

    assert set(search_space(dataset, gate)) <= set(RecommenderConfig.__dataclass_fields__)


def test_misspelt_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="ml-100k"):
        search_space("ml100k", "comet")
    with pytest.raises(ValueError, match="comet"):
        search_space("ml-1m", "commet")
