"""Sinkhorn of many matrices in one kernel: the loop's numbers and gradients, each matrix stopped by itself.

On a GPU, or (slowly) with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch

from moe_lab.gates.sinkhorn import _SinkhornEach, row_error, sinkhorn_each
from moe_lab.gates.sinkhorn_kernels import MOST_EXPERTS, SinkhornKernels, usable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.skipif(
    not usable(torch.zeros(1, 2, 2, device=DEVICE)), reason="needs Triton, and CUDA or TRITON_INTERPRET=1"
)


def case(n_experts, sizes=(0.1, 1.0, 3.0, 8.0, 8.0)):
    generator = torch.Generator().manual_seed(n_experts)
    logits = torch.randn(len(sizes), n_experts, n_experts, generator=generator)
    logits = (logits * torch.tensor(sizes)[:, None, None]).to(DEVICE).requires_grad_()
    iterations = torch.tensor([30, 30, 30, 30, 2], device=DEVICE)
    direction = torch.randn(logits.shape, generator=generator).to(DEVICE)
    return logits, iterations, direction


@runs
@pytest.mark.parametrize("n_experts", [1, 2, 5, 8, 16, 17])
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
def test_values_and_gradients_are_those_of_the_loop(n_experts, tolerance):
    logits, iterations, direction = case(n_experts)
    ours = SinkhornKernels.apply(logits, iterations, tolerance, 30)
    loop = _SinkhornEach.apply(logits, iterations, tolerance)
    torch.testing.assert_close(ours, loop, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad((ours * direction).sum(), logits)
    (expected,) = torch.autograd.grad((loop * direction).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


@runs
def test_a_matrix_stops_when_it_has_converged_and_not_before():
    logits, iterations, _ = case(6)
    soft = SinkhornKernels.apply(logits.detach(), torch.full_like(iterations, 1000), 0.005, 1000)
    assert bool((row_error(soft) < 0.005).all())
    torch.testing.assert_close(soft.sum(1), torch.ones_like(soft.sum(1)))


@runs
def test_nan_stays_in_its_matrix():
    logits, iterations, _ = case(4)
    clean = sinkhorn_each(logits.detach(), iterations, 0.01)
    spoiled = logits.detach().clone()
    spoiled[1, 0, 0] = torch.nan
    found = sinkhorn_each(spoiled, iterations, 0.01)
    others = [0, 2, 3, 4]
    assert torch.equal(found[others], clean[others])
    assert bool(found[1].isnan().any())


@pytest.mark.parametrize(
    "logits", [torch.zeros(2, 3, 3, dtype=torch.float64), torch.zeros(0, 3, 3), torch.zeros(1, 80, 80)]
)
def test_what_the_kernels_cannot_run_goes_through_the_loop(logits):
    assert MOST_EXPERTS < 80
    assert not usable(logits.to(DEVICE))
    if len(logits):
        soft = sinkhorn_each(logits, torch.ones(len(logits), dtype=torch.int64))
        torch.testing.assert_close(soft, torch.full_like(soft, 1 / soft.shape[-1]))
