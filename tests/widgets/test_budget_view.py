"""The view of notebook 06 says what the pools say, follows its slider, and is quick."""

import math

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from slider_time import IN_TIME, plain_figures

from moe_lab.tuning import Pool, expected_best
from moe_lab.widgets.budget import BudgetReplay


def pool(best, n=20):
    losses = best + np.linspace(0, 0.1, n)
    return Pool.of(losses, losses)


POOLS = {"softmax": pool(0.5), "hash": pool(0.7), "hash+": pool(0.68), "topk": pool(0.6), "topk+": pool(0.75)}


def texts(figure):
    return "\n".join(text.get_text() for text in figure.axes[0].texts)


def trials(figure):
    return [scatter for scatter in figure.axes[0].collections if isinstance(scatter, PathCollection)]


def test_title_holds_the_exact_expectation_at_the_budget():
    shown = texts(BudgetReplay(POOLS).view("hash", 3))
    assert f"hash {expected_best(POOLS['hash'], [3])[0]:.4f}" in shown
    assert f"hash+ {expected_best(POOLS['hash+'], [3])[0]:.4f}" in shown


def test_the_ratio_at_that_loss_is_written_out():
    replay = BudgetReplay(POOLS)
    target = expected_best(POOLS["hash"], [4])[0]
    needed = next(b for b in range(1, 21) if expected_best(POOLS["hash+"], [b])[0] <= target)
    assert f"hash+ reaches hash's loss with {needed}: {4 / needed:.2g} times fewer" in texts(replay.view("hash", 4))
    assert "topk+ does not reach topk's loss with 20 trials" in texts(replay.view("topk", 4))
    assert "as many" in texts(BudgetReplay({"hash": pool(0.7), "hash+": pool(0.7)}).view("hash", 4))
    more = BudgetReplay({"hash": pool(0.7), "hash+": pool(0.705)}).view("hash", 4)
    assert "times more" in texts(more)


@pytest.mark.parametrize(("gate", "panels"), [("hash", 2), ("hash+", 2), ("softmax", 1)])
def test_a_gate_is_shown_beside_its_plus(gate, panels):
    assert len(trials(BudgetReplay(POOLS).view(gate, 5))) == panels


def test_with_a_larger_budget_fewer_trials_share_the_choice():
    replay = BudgetReplay(POOLS)
    one, many = (trials(replay.view("softmax", budget))[0].get_sizes() for budget in (1, 20))
    assert np.ptp(one) == pytest.approx(0)  # every trial is equally likely
    assert many.max() > 10 * np.median(many)


def test_budgets_outside_are_moved_to_the_nearest():
    replay = BudgetReplay(POOLS)
    assert "after 1 trial:" in texts(replay.view("hash", 0))
    assert "after 20 trials:" in texts(replay.view("hash", 999))


def test_diverged_trials_and_equal_losses_can_be_drawn():
    diverged = Pool.of([math.nan, 0.2, 0.1], [math.nan, 0.2, 0.1])
    equal = Pool.of([0.1] * 3, [0.1] * 3)
    replay = BudgetReplay({"hash": diverged, "topk": equal})
    replay.view("hash", 2)
    replay.view("topk", 2)


def test_it_is_quick_enough_for_a_slider():
    replay = BudgetReplay({gate: pool(0.5, 200) for gate in ("hash", "hash+", "topk", "topk+", "comet", "comet+")})
    assert plain_figures(lambda: replay.view("hash", 30)) < IN_TIME
