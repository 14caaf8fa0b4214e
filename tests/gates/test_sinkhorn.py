"""Sinkhorn: doubly stochastic matrices, their gradient, their limits; the official schedule's failure, measured."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.gates.permutation import SCHEDULES
from moe_lab.gates.sinkhorn import (
    best_assignment,
    permutation_entropy,
    permutation_matrix,
    row_error,
    sinkhorn,
    soft_hard_distance,
)

SIZES = (1, 2, 3, 5, 9, 16, 17)


def logits(n, seed=0, draws=1, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * (2 * torch.rand(draws, n, n, generator=generator, dtype=dtype) - 1)


def obvious_sinkhorn(scaled, iterations):
    """The oracle: the definition, differentiated by autograd."""
    for _ in range(iterations):
        scaled = scaled - torch.logsumexp(scaled, -1, keepdim=True)
        scaled = scaled - torch.logsumexp(scaled, -2, keepdim=True)
    return scaled.exp()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SIZES), st.integers(0, 10_000), st.floats(0.01, 300), st.integers(1, 30))
def test_entries_are_non_negative_and_columns_sum_to_one_after_any_number_of_iterations(n, seed, scale, count):
    for dtype, tolerance in ((torch.float32, 1e-6 * max(n, 10)), (torch.float64, 1e-12)):
        matrix = sinkhorn(logits(n, seed, 2, scale, dtype), count)
        assert (matrix >= 0).all()
        assert (matrix.sum(-2) - 1).abs().max() <= tolerance


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SIZES), st.integers(0, 10_000), st.floats(0.1, 20), st.integers(1, 12))
def test_operator_equals_the_obvious_loop_in_values_and_gradients(n, seed, scale, count):
    direction = logits(n, seed + 1)
    results = []
    for function in (obvious_sinkhorn, sinkhorn):
        x = logits(n, seed, 1, scale).requires_grad_()
        matrix = function(x, count)
        (matrix * direction).sum().backward()
        results.append((matrix.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


def test_gradient_passes_gradcheck_in_float64_with_several_matrices_at_once():
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 15), logits(4, 3, 2).requires_grad_())


def test_stopping_early_returns_the_same_as_asking_for_that_many_iterations_gradient_too():
    x = logits(9, 1, 1, 8.0)
    count = next(i for i in range(1, 500) if row_error(sinkhorn(x, i)).max() < 1e-3)
    assert 3 < count < 499
    gradients = []
    for arguments in ((count, 0.0), (1000, 1e-3)):
        y = x.clone().requires_grad_()
        matrix = sinkhorn(y, *arguments)
        matrix[0, 0, 0].backward()
        gradients.append((matrix.detach(), y.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_two_by_two_matrix_has_the_value_derived_by_hand():
    # [[p, 1-p], [1-p, p]] with p^2 / (1-p)^2 = exp(a + d - b - c), so p = sigmoid((a + d - b - c) / 2)
    a, b, c, d = 0.3, -1.0, 0.7, 0.2
    matrix = sinkhorn(torch.tensor([[a, b], [c, d]], dtype=torch.float64), 200)
    p = 1 / (1 + math.exp(-(a + d - b - c) / 2))
    torch.testing.assert_close(matrix, torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64))


def test_constants_added_to_rows_and_columns_change_nothing_once_converged():
    x = logits(5)
    shifted = x + torch.arange(5.0).unsqueeze(-1) - 3 * torch.arange(5.0)
    torch.testing.assert_close(sinkhorn(shifted, 300), sinkhorn(x, 300))


def test_hot_limit_is_uniform_and_cold_limit_is_the_best_assignment():
    x = logits(5)
    torch.testing.assert_close(sinkhorn(x / 1e6, 5), torch.full_like(x, 0.2), atol=1e-6, rtol=0)
    cold = sinkhorn(x / 0.01, 20_000, 1e-6)
    assert soft_hard_distance(cold, permutation_matrix(best_assignment(x), cold.dtype)).item() < 1e-2


def test_best_assignment_is_the_best_of_all_120_permutations():
    for seed in range(20):
        x = logits(5, seed)[0]
        best = max(itertools.permutations(range(5)), key=lambda p: sum(x[i, j].item() for i, j in enumerate(p)))
        assert best_assignment(x).tolist() == list(best)


def test_permutation_matrix_has_row_error_entropy_and_distance_exactly_zero():
    matrix = permutation_matrix(torch.tensor([[2, 0, 1]]), torch.float64)
    assert row_error(matrix).item() == 0
    assert soft_hard_distance(matrix, matrix).item() == 0
    assert abs(permutation_entropy(matrix).item()) < 1e-5  # -log(1 + 1e-6) per entry
    # all rows move: every row contributes two entries of 1
    assert soft_hard_distance(matrix, matrix.roll(1, -1)).item() == pytest.approx(math.sqrt(6))


def test_entropy_of_the_uniform_matrix_is_2_n_log_n_whatever_the_number_of_matrices():
    for copies in (1, 3):
        matrix = torch.full((copies, 8, 8), 1 / 8, dtype=torch.float64)
        assert permutation_entropy(matrix).item() == pytest.approx(2 * 8 * math.log(8), abs=1e-3)


@pytest.mark.parametrize("size", [1e4, 1e6])
def test_enormous_logits_give_finite_values_and_gradients(size):
    x = logits(9, dtype=torch.float32).mul(size).requires_grad_()
    matrix = sinkhorn(x, 50)
    (matrix * torch.arange(9.0)).sum().backward()
    assert torch.isfinite(matrix).all()
    assert torch.isfinite(x.grad).all()


def test_a_saturated_matrix_sends_no_gradient_so_learning_would_stop_silently():
    x = (50 * torch.eye(5).unsqueeze(0)).requires_grad_()
    (sinkhorn(x, 20) * logits(5, dtype=torch.float32)).sum().backward()
    assert x.grad.abs().max() < 1e-12


def test_bfloat16_is_computed_in_float32():
    matrix = sinkhorn(logits(9, dtype=torch.float32).bfloat16(), 20)
    assert matrix.dtype == torch.float32
    assert (matrix.sum(-2) - 1).abs().max() < 1e-5


def test_wrong_arguments_are_refused_with_what_is_wrong():
    with pytest.raises(ValueError, match=r"square.*\(2, 3\)"):
        sinkhorn(torch.zeros(2, 3), 5)
    with pytest.raises(ValueError, match="at least 1 iteration, got 0"):
        sinkhorn(torch.zeros(3, 3), 0)


def soft(schedule, progress, x):
    progress = torch.tensor(progress)
    return sinkhorn(x / schedule.temperature(progress), schedule.iterations(progress), schedule.tolerance)


def share_with_the_best_assignment(matrix, x):
    return (best_assignment(matrix) == best_assignment(x)).all(-1).double().mean().item()


# (n, median worst row error, share whose Hungarian assignment is that of the logits), 200 draws at initial scale
@pytest.mark.parametrize(("n", "low", "high"), [(16, 0.0, 0.06), (9, 0.06, 0.22), (5, 0.4, 0.6)])
def test_official_schedule_ends_with_rows_that_own_two_experts_or_none(n, low, high):
    x = logits(n, 0, 200, 0.05, torch.float32)
    matrix = soft(SCHEDULES["official"], 1.0, x)
    assert (matrix.sum(-2) - 1).abs().max() < 1e-4  # columns are fine
    assert row_error(matrix).median().item() > 0.7
    assert low <= share_with_the_best_assignment(matrix, x) <= high


def test_official_schedule_at_its_first_step_is_only_roughly_doubly_stochastic():
    x = logits(16, 0, 200, 0.05, torch.float32)
    matrix = soft(SCHEDULES["official"], 0.0, x)
    assert 0.1 < row_error(matrix).median().item() < 0.2
    assert 0.55 < share_with_the_best_assignment(matrix, x) < 0.8


@pytest.mark.parametrize("n", [5, 9, 16, 32])
@pytest.mark.parametrize("progress", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_default_schedule_keeps_every_row_error_below_one_percent(n, progress):
    for seed in range(20):
        for scale in (0.05, 0.15):  # as it starts, and as large as training makes it
            matrix = soft(SCHEDULES["default"], progress, logits(n, seed, 1, scale, torch.float32))
            assert row_error(matrix).item() < 0.01
