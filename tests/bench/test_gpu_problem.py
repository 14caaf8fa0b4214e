"""What the benchmark of the MoE layer computes, and the loop it is compared with."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.bench.gpu_problem import SHAPES, Problem, Shape, error, expected, loop_layer
from moe_lab.experts import MLPExperts, run_everything

TINY = Shape(tokens=24, width=8, hidden=16, experts=4, k=2)


def test_operations_are_two_products_forward_and_four_backward_two_for_each_multiply_add():
    assert Shape(3, 5, 7, 4, 2).flops == 6 * 2 * (3 * 2) * 5 * 7
    assert [shape.flops for shape in SHAPES] == [12 * 2**16 * 2**22, 12 * 2**18 * 2**21, 12 * 2**15 * 2**22]


@pytest.mark.parametrize("routing", ["weights", "variable"])
def test_the_loop_is_the_package_s_oracle(routing):
    problem = Problem(TINY, "cpu", torch.float32, bias=True)
    weights = getattr(problem, routing)
    bank = MLPExperts(4, (8, 16, 8), "gelu", activate_last=False)
    for own, given_ in zip(bank.parameters(), (problem.w1, problem.w2, problem.b1, problem.b2), strict=True):
        own.data = given_.detach()
    (right,) = run_everything(bank, problem.x, [weights])
    torch.testing.assert_close(loop_layer(problem, weights), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected(problem, routing == "variable")[0], right.detach(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(k=st.integers(1, 6), n_experts=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_variable_number_of_experts_is_within_bounds_and_its_operations_are_counted(k, n_experts, seed):
    k = min(k, n_experts)
    problem = Problem(Shape(40, 8, 16, n_experts, k), "cpu", seed=seed)
    count = (problem.variable != 0).sum(1)
    spread = min(1 if k == 1 else k - 1, n_experts - k)
    assert k - spread <= count.min() and count.max() <= k + spread
    assert problem.variable_flops == 12 * int(count.sum()) * 8 * 16
    torch.testing.assert_close(problem.variable.sum(1), (count > 0).float())  # a softmax; a token may have no expert
    largest = problem.variable.topk(k, dim=1).indices
    for row, fixed, n in zip(largest.tolist(), problem.experts.tolist(), count.tolist(), strict=True):
        assert set(row[:n]) <= set(fixed) or n > k  # the same order of experts as in the fixed routing


@pytest.mark.parametrize("shape", [Shape(4000, 8, 16, 8, 2), Shape(4000, 8, 16, 8, 1)])
def test_the_variable_number_is_k_on_average_and_does_vary(shape):
    count = (Problem(shape, "cpu").variable != 0).sum(1).float()
    assert count.mean() == pytest.approx(shape.k, abs=0.05) and count.std() > 0.7


def test_the_dense_layer_has_as_many_multiply_adds_as_the_active_experts():
    problem = Problem(TINY, "cpu")
    assert sum(w.numel() for w in problem.dense) * TINY.tokens * 6 == TINY.flops


def test_errors_are_relative_and_a_wrong_gradient_shows():
    problem = Problem(TINY, "cpu")
    right = [torch.ones(3), torch.full((2,), 2.0)]
    assert error(problem, right, right) == 0
    assert error(problem, [right[0], right[1] * 1.25], right) == pytest.approx(0.25)


def test_routing_is_distinct_per_token_and_skew_makes_it_uneven():
    shape = Shape(2000, 8, 16, 8, 2)
    loads = [torch.bincount(Problem(shape, "cpu", skew=skew).experts.flatten(), minlength=8) for skew in (0.0, 2.0)]
    assert all(load.sum() == 4000 for load in loads)
    assert loads[0].max() < 1.2 * 500 and loads[1].max() > 2 * 500
    experts = Problem(shape, "cpu").experts
    assert (experts[:, 0] != experts[:, 1]).all()
    assert Problem(dataclasses.replace(TINY, k=1), "cpu").values.max() < 1  # top-1: the probability, not the constant 1


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="k at most"):
        Shape(8, 8, 8, 2, 3)
    with pytest.raises(ValueError, match="16 bytes"):
        Problem(Shape(8, 12, 16, 2, 1), "cpu")
