"""A linear layer per expert on rows sorted by expert, without zeros and without copies.

Legend: N rows, D inputs, F outputs, E experts.

Indexing a stacked weight, ``W[e]``, is correct but slow to train: the backward of every index makes a zero
tensor of the size of the *whole* stack and adds it, E times (38 ms against 16 ms, 16 experts of 256 x 256,
1,900 rows). Here each expert reads a slice of the input and writes a slice of one preallocated output; the
backward does the same. An expert without rows costs nothing and its gradient is exactly 0.

What a GPU needs is another layer, both products and the activation at once: `moe_lab.experts.fast`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GroupedLinear(torch.autograd.Function):
    """out[rows of e] = x[rows of e] @ weight[e] + bias[e]; with counts None every expert sees all of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, counts: list[int] | None) -> Tensor:
        n_experts = weight.shape[0]
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out_counts = [x.shape[0]] * n_experts if counts is None else counts
        inputs = [x] * n_experts if counts is None else x.split(counts)
        out = x.new_empty(sum(out_counts), weight.shape[2])
        for x_e, w_e, b_e, out_e in zip(inputs, weight, bias, out.split(out_counts), strict=True):
            if x_e.shape[0]:
                torch.addmm(b_e, x_e, w_e, out=out_e)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        n_experts, shared = weight.shape[0], ctx.counts is None
        out_counts = [x.shape[0]] * n_experts if shared else ctx.counts
        inputs = [x] * n_experts if shared else x.split(ctx.counts)
        needs_x = ctx.needs_input_grad[0]
        grad_x = torch.zeros_like(x) if shared and needs_x else torch.empty_like(x) if needs_x else None
        grads_x = [grad_x] * n_experts if shared or not needs_x else grad_x.split(ctx.counts)
        grad_weight = torch.empty_like(weight)
        grad_bias = weight.new_empty(n_experts, weight.shape[2])
        rows = zip(inputs, grad.split(out_counts), grads_x, weight, grad_weight, grad_bias, strict=True)
        for x_e, g_e, gx_e, w_e, gw_e, gb_e in rows:
            torch.mm(x_e.T, g_e, out=gw_e)  # 0 when the expert has no rows
            torch.sum(g_e, 0, out=gb_e)
            if needs_x and x_e.shape[0]:
                torch.addmm(gx_e, g_e, w_e.T, beta=1 if shared else 0, out=gx_e)
        return grad_x, grad_weight, grad_bias, None


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, counts: Sequence[int] | None) -> Tensor:
    """Each expert's linear layer on its own rows.

    Args:
        x: (N, D) sorted by expert; or (T, D), read by every expert, with ``counts`` None.
        weight: (E, D, F).
        bias: (E, F).
        counts: rows of each expert, summing to N, or None.

    Returns:
        (N, F), or (E * T, F). In autocast's dtype under autocast, like `torch.nn.functional.linear`.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return _GroupedLinear.apply(x, weight, bias, None if counts is None else list(counts))
