"""Many small Sinkhorn loops in one Triton kernel each way (`sinkhorn` has the equations and the oracle).

Legend: K matrices, E rows and columns, L = scaled logits, P = E rounded up to a power of two, n iterations.

    u_i <- log sum_j exp(L_ij - v_j),   v_j <- log sum_i exp(L_ij - u_i),   exp(L_ij - u_i - v_j) after n such pairs

The same numbers as normalising rows and columns in turn, with two vectors to keep instead of a matrix: all u and v are
stored, and the backward reads them from the last to the first. A program has one matrix in registers and stops when
*its* matrix has converged: no launch per iteration, no host that asks whether to go on. A hundred matrices that need
200 iterations are 2 launches instead of 4,000.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lab.triton_support import jit, tl, triton
from moe_lab.triton_support import usable as triton_runs

MOST_EXPERTS = 64


def usable(scaled_logits: Tensor) -> bool:
    """The kernels can run on (K, E, E): float32, at least one matrix, none too large for a program."""
    fits = scaled_logits.dtype == torch.float32 and len(scaled_logits) > 0 and scaled_logits.shape[-1] <= MOST_EXPERTS
    return fits and triton_runs(scaled_logits)


@jit
def _matrix(base, E: tl.constexpr, P: tl.constexpr):
    """This program's matrix (P, P), 0 beyond E."""
    i, j = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    return tl.load(base + tl.program_id(0).to(tl.int64) * E * E + i * E + j, mask=(i < E) & (j < E), other=0.0)


@jit
def _forward(logits, iterations, tolerance, out, used, kept, most, E: tl.constexpr, P: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, P)
    fine = (n[:, None] < E) & (n[None, :] < E)
    matrix = _matrix(logits, E, P)
    limit = tl.load(iterations + place).to(tl.int32)
    u, v = tl.zeros((P,), tl.float32), tl.zeros((P,), tl.float32)
    done = 0
    going = limit > -1
    while going:
        rows = tl.where(fine, matrix - v[None, :], float("-inf"))
        largest = tl.where(n < E, tl.max(rows, 1), 0.0)
        u = tl.where(n < E, largest + tl.log(tl.sum(tl.exp(rows - largest[:, None]), 1)), 0.0)
        columns = tl.where(fine, matrix - u[:, None], float("-inf"))
        largest = tl.where(n < E, tl.max(columns, 0), 0.0)
        v = tl.where(n < E, largest + tl.log(tl.sum(tl.exp(columns - largest[None, :]), 0)), 0.0)
        tl.store(kept + (place * most + done) * 2 * P + n, u)
        tl.store(kept + (place * most + done) * 2 * P + P + n, v)
        done += 1
        soft = tl.where(fine, tl.exp(matrix - u[:, None] - v[None, :]), 0.0)
        error = tl.max(tl.where(n < E, tl.abs(tl.sum(soft, 1) - 1), 0.0), 0)
        # without a tolerance even an error of 0 goes on; NaN is done, if there is one
        going = (done < limit) & ((tolerance <= 0) | (error >= tolerance))
    soft = tl.exp(matrix - u[:, None] - v[None, :])
    tl.store(out + place * E * E + n[:, None] * E + n[None, :], soft, mask=fine)
    tl.store(used + place, done)


@jit
def _backward(logits, gradient, used, kept, out, most, E: tl.constexpr, P: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, P)
    fine = (n[:, None] < E) & (n[None, :] < E)
    matrix = _matrix(logits, E, P)
    step = tl.load(used + place) - 1
    u = tl.load(kept + (place * most + step) * 2 * P + n)
    v = tl.load(kept + (place * most + step) * 2 * P + P + n)
    g = _matrix(gradient, E, P) * tl.where(fine, tl.exp(matrix - u[:, None] - v[None, :]), 0.0)
    while step >= 0:
        u = tl.load(kept + (place * most + step) * 2 * P + n)
        columns = tl.where(fine, tl.exp(matrix - u[:, None] - v[None, :]), 0.0)
        g -= columns * tl.sum(g, 0)[None, :]
        v = tl.load(kept + (place * most + step) * 2 * P - P + n, mask=(n < P) & (step > 0), other=0.0)
        rows = tl.where(fine, tl.exp(matrix - u[:, None] - v[None, :]), 0.0)
        g -= rows * tl.sum(g, 1)[:, None]
        step -= 1
    tl.store(out + place * E * E + n[:, None] * E + n[None, :], g, mask=fine)


class SinkhornKernels(torch.autograd.Function):
    """(K, E, E) scaled logits, (K,) iterations, tolerance, ``most`` iterations of any -> (K, E, E)."""

    @staticmethod
    def forward(ctx, scaled_logits: Tensor, iterations: Tensor, tolerance: float, most: int) -> Tensor:
        logits = scaled_logits.contiguous()
        k, e, _ = logits.shape
        p = triton.next_power_of_2(e)
        most = max(most, 1)
        kept = logits.new_empty(k, most, 2, p)
        out, used = torch.empty_like(logits), torch.empty(k, dtype=torch.int32, device=logits.device)
        warps = 1 if p <= 16 else 4
        _forward[(k,)](logits, iterations, tolerance, out, used, kept, most, E=e, P=p, num_warps=warps)
        ctx.save_for_backward(logits, used, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        logits, used, kept = ctx.saved_tensors
        k, most, _, p = kept.shape
        out, e = torch.empty_like(logits), logits.shape[1]
        warps = 1 if p <= 16 else 4
        _backward[(k,)](logits, gradient.contiguous(), used, kept, out, most, E=e, P=p, num_warps=warps)
        return out, None, None, None
