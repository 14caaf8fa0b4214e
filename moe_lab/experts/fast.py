"""Experts of two layers at the speed of the matrix unit: rows sorted by expert, grouped products, own backward.

Legend: T tokens, E experts, N routed (token, expert) pairs, K pairs per token, D input width, H hidden width, F output
width; e the expert of a row, g its weight.

    X = rows of x in expert order                                    (N, D)   kernels.scatter_rows
    Z = X W1_e                                                       (N, H)   grouped product
    A = g act(Z + b1_e)                                              (N, H)   kernels.activate
    y = rows of A W2_e, added up per token,  + g b2                  (T, F)   grouped product, kernels.sum_rows

and backwards, with G = rows of dy in expert order:

    dA = G W2_e^T,  dW2_e = A^T G,  (dZ, dg, db1) from Z and dA in one pass,  dX = dZ W1_e^T,  dW1_e = X^T dZ

The weight g multiplies the *hidden* row, where a pass over (N, H) happens anyway. Then dg = <act(Z + b1), dA> needs no
expert output, so (N, F) outputs are neither kept nor read again, and both combines are plain sums. (SonicMoE computes
dg from the same inner product; Guo et al. 2025.) The output bias does not need rows at all: sum_e g_e b2_e is the
product of the (T, E) weights with b2.

Products. On Hopper (compute capability 9) all six are our own (`kernels.products`). Elsewhere, and for what those do
not take, they are `torch.nn.functional.grouped_mm`: on Hopper and Blackwell, in bfloat16, one kernel without
synchronisation; for other devices and dtypes it loops over experts inside PyTorch, and asks for the counts. Which
operands it takes at all says `groupable`; for others (float64, rows that are not whole multiples of 16 bytes) a loop
here gives the same result.

Memory. Nothing has T x E rows. Between forward and backward X, Z and A are kept, N (D + 2 H) numbers; a dense layer of
equal multiply-adds keeps T D + 2 N H. With ``recompute`` only Z, N H; the backward then gathers X again and writes A
again in a pass that happens anyway. While it runs, the backward holds dA (which becomes dZ in place) and G besides.

Synchronisation, where products are our own or one kernel (above). With a fixed number of pairs per token every shape is
known beforehand and nothing waits for the device: the layer can be captured in a CUDA graph. With (T, E) weights of any
pattern, N must be known to allocate: one synchronisation, then the same kernels on lists of unequal lengths. With
``most`` an upper bound is allocated instead: the rows behind the last expert's end are memory that nobody touches, so
that nothing waits, and the layer can be captured again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moe_lab.experts.kernels import (
    ACTIVATIONS,
    Order,
    activate,
    activate_backward,
    expert_order,
    outer,
    outer_runs,
    pattern_order,
    product,
    product_runs,
    scatter_rows,
    sum_rows,
)
from moe_lab.names import check_name

MOST_GROUPS = 1023  # of grouped_mm on CUDA
Pairs = tuple[Tensor, Tensor]


def groupable(dtype: torch.dtype, n_experts: int, *widths: int) -> bool:
    """`grouped_mm` takes operands of these row widths: 2 or 4 bytes per number, rows of whole multiples of 16 bytes."""
    known = dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and n_experts <= MOST_GROUPS and all(width * dtype.itemsize % 16 == 0 for width in widths)


def _each(rows: Tensor, weight: Tensor, ends: Tensor, own: bool, transposed: bool = False) -> Tensor:
    """(N, A) rows in expert order times (E, A, B), or (E, B, A) transposed -> (N, B)."""
    if own and product_runs(rows, weight, transposed):
        return product(rows, weight, ends, transposed)
    weight = weight.transpose(1, 2) if transposed else weight
    if len(rows) and groupable(rows.dtype, *weight.shape):
        return functional.grouped_mm(rows, weight, offs=ends)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for e, (begin, end) in enumerate(_ranges(ends)):
        out[begin:end] = rows[begin:end] @ weight[e]
    return out


def _outer(left: Tensor, right: Tensor, ends: Tensor, own: bool) -> Tensor:
    """(N, A), (N, B) in expert order -> (E, A, B): left^T right over the rows of each expert; 0 without rows."""
    if own and outer_runs(left, right):
        return outer(left, right, ends)
    if len(left) and groupable(left.dtype, len(ends), left.shape[1], right.shape[1]):
        return functional.grouped_mm(left.T, right, offs=ends)
    return torch.stack([left[begin:end].T @ right[begin:end] for begin, end in _ranges(ends)])


def _ranges(ends: Tensor) -> list[tuple[int, int]]:
    stops = ends.tolist()
    return list(zip([0, *stops], stops, strict=False))


def _order(value: Tensor, experts: Tensor | None, most: int | None, n_experts: int) -> Order:
    """Of weights (T, E) where ``experts`` is None, else of pairs (T, K)."""
    if experts is None:
        return pattern_order(value, most)
    return expert_order(experts.flatten(), value.flatten(), n_experts)


class _GroupedMLP(torch.autograd.Function):
    """The sum over pairs without the output bias; see the module for the equations and what is kept."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        value: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        experts: Tensor | None,
        most: int | None,
        activation: str,
        recompute: bool,
        own: bool,
    ) -> Tensor:
        order = _order(value, experts, most, w1.shape[0])
        place, ends, g, starts, _ = order
        slots = value.shape[1] if starts is None else starts
        rows = scatter_rows(x, place, slots)
        h = _each(rows, w1, ends, own)
        a = activate(h, b1, g, ends, activation)
        y = sum_rows(_each(a, w2, ends, own), place, slots, x.shape[0])
        kept = (x, None) if recompute else (rows, a)
        ctx.save_for_backward(*kept, h, w1, b1, w2, *order)
        ctx.k, ctx.n_tokens = value.shape[1], x.shape[0]
        ctx.activation, ctx.recompute, ctx.own = activation, recompute, own
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, a, h, w1, b1, w2, place, ends, g, starts, row = ctx.saved_tensors
        slots = ctx.k if starts is None else starts
        needs_x, _, needs_w1, _, needs_w2 = ctx.needs_input_grad[:5]
        grad_rows = scatter_rows(grad, place, slots)
        grad_a = _each(grad_rows, w2, ends, ctx.own, transposed=True)
        grad_h, grad_g, grad_b1, again = activate_backward(h, b1, g, ends, ctx.activation, grad_a, ctx.recompute)
        a = again if ctx.recompute else a
        del again, grad_a
        grad_w2 = _outer(a, grad_rows, ends, ctx.own) if needs_w2 else None
        del a, grad_rows
        grad_w1 = grad_x = None
        if needs_x:
            grad_rows = _each(grad_h, w1, ends, ctx.own, transposed=True)
            grad_x = sum_rows(grad_rows, place, slots, ctx.n_tokens)
            del grad_rows
        if needs_w1:  # after dX: with recompute, X is not there while dX's rows are
            if ctx.recompute:
                rows = scatter_rows(rows, place, slots)
            grad_w1 = _outer(rows, grad_h, ends, ctx.own)
        if row is None:
            grad_value = grad_g.index_select(0, place).view(-1, ctx.k)
        else:  # a pair that was not computed gets no gradient
            at = row.clamp(min=0).view(-1)
            grad_value = grad_g.index_select(0, at).view_as(row) if len(grad_g) else grad_g.new_zeros(row.shape)
            grad_value = grad_value.masked_fill_(row < 0, 0)
        if grad_b1 is not None:
            grad_b1 = grad_b1.to(b1.dtype)
        return grad_x, grad_value, grad_w1, grad_b1, grad_w2, None, None, None, None, None


def _check(
    x: Tensor,
    routing: Tensor | Pairs,
    w1: Tensor,
    w2: Tensor,
    activation: str,
    most: int | None,
) -> None:
    check_name("activation", activation, ACTIVATIONS)
    if most is not None and (most < 1 or not isinstance(routing, Tensor)):
        raise ValueError(f"most must be at least 1 and belongs to weights (T, E), not to pairs; got {most}")
    n_experts, width, hidden = w1.shape
    if x.dim() != 2 or x.shape[1] != width or tuple(w2.shape[:2]) != (n_experts, hidden):
        raise ValueError(
            "shapes must be x (T, D), w1 (E, D, H), w2 (E, H, F); "
            f"got {tuple(x.shape)}, {tuple(w1.shape)}, {tuple(w2.shape)}"
        )
    if isinstance(routing, Tensor):
        if tuple(routing.shape) != (x.shape[0], n_experts):
            raise ValueError(f"weights must have shape {(x.shape[0], n_experts)}, got {tuple(routing.shape)}")
    elif routing[0].dim() != 2 or routing[0].shape != routing[1].shape or routing[0].shape[0] != x.shape[0]:
        shapes = tuple(tuple(part.shape) for part in routing)
        raise ValueError(f"experts and values must both have shape (T = {x.shape[0]}, K), got {shapes}")


def grouped_mlp(
    x: Tensor,
    routing: Tensor | Pairs,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
    *,
    most: int | None = None,
    recompute: bool = False,
    own: bool = True,
) -> Tensor:
    """y(t) = sum_e g_e(t) (act(x_t W1_e + b1_e) W2_e + b2_e), computing only routed pairs.

    Args:
        x: (T, D).
        routing: (experts, values), both (T, K): experts integers in 0 .. E - 1, different within a row (neither is
            checked: that would wait for the device); a pair with value 0 is computed like any other. Or weights
            (T, E): exact zeros are not computed, and their gradient is 0.
        w1, b1: (E, D, H), (E, H) or None.
        w2, b2: (E, H, F), (E, F) or None.
        activation: "relu", "gelu" (exact) or "tanh".
        most: with weights (T, E): no token has more non-zeros than this, at least 1. Then N is not asked for (in
            bfloat16 on Hopper and Blackwell nothing waits for the device at all), memory is allocated for T ``most``
            pairs, and a token with more gives NaN. None: N is asked for.
        recompute: keep less for the backward; see the module.
        own: products of our own where they can run (`kernels.product_runs`, `outer_runs`); False: the library's, for
            comparison.

    Returns:
        (T, F), in x's dtype (autocast's under autocast). Sums over pairs are in float32 at least. Not differentiable
        twice.

    Raises:
        ValueError: shapes do not fit, an unknown activation, or ``most`` below 1 or for pairs.
    """
    _check(x, routing, w1, w2, activation, most)
    device, (n_tokens, n_experts) = x.device.type, (x.shape[0], w1.shape[0])
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x, w1, w2 = x.to(dtype), w1.to(dtype).contiguous(), w2.to(dtype).contiguous()
    b1 = None if b1 is None else b1.to(dtype).contiguous()
    if isinstance(routing, Tensor):
        value, experts = routing, None
        # A pair that is not computed gets no gradient here either.
        weights = routing.where(routing.detach() != 0, 0) if b2 is not None else None
    else:
        experts, value = routing
        weights = value.new_zeros(n_tokens, n_experts).scatter(1, experts, value) if b2 is not None else None
    with torch.autocast(device, enabled=False):
        value = value.to(torch.promote_types(dtype, torch.float32))
        y = _GroupedMLP.apply(x, value, w1, b1, w2, experts, most, activation, recompute, own)
        return y if b2 is None else torch.addmm(y, weights.to(dtype), b2.to(dtype))
