"""Run experts where they are needed, and combine: the obvious way, and the fast one that must agree with it.

Legend: S gates (tasks), T tokens, E experts, F output width, N routed (token, expert) pairs, M non-zero
weights (M <= S N).

    y_s(t) = sum_e g_s,e(t) f_e(x_t)          for each task s (COMET paper §1; the same experts for all tasks)

`run_everything` is the oracle: every expert on every token, multiply, add. `combine_experts` runs expert e
on token t only if some task gives it a weight that is not exactly 0, once for all tasks, in training and
inference (paper §2.6; the authors' code never does). Outputs and gradients of x and of every parameter are
equal, because the skipped terms have the factor g = 0 in the output and in each gradient that flows into x
or an expert.

The one difference: for a weight that is 0, the oracle reports d loss / d g = <f_e(x), d loss / d y>; the
dispatch did not run f_e and reports 0. No gate notices: a COMET leaf with g = 0 has p = 0 and dp = 0 (the
smooth-step is flat there), an expert outside the top k is masked, a hash table does not learn. Gradients of
gate *parameters* are equal, and are tested.

Another difference, wanted: an expert that returned inf on a token it is not needed for makes the oracle NaN
(0 * inf), and the dispatch never asks it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lab.experts.base import ExpertBank
from moe_lab.experts.mlp import MLPExperts
from moe_lab.names import check_name

BACKENDS = ("auto", "fast", "reference")


def run_everything(bank: ExpertBank, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The oracle: every expert on every token. x (T, ...), S weights (T, E) -> S outputs (T, F)."""
    outputs = [bank.single(expert, x) for expert in range(bank.n_experts)]
    return [sum(w[:, e, None].to(out.dtype) * out for e, out in enumerate(outputs)) for w in weights]


class _WeightedSum(torch.autograd.Function):
    """y[b] = sum of weight[m] * h[pair[m]] over the entries m of bag b, entries sorted by bag.

    ``embedding_bag`` is this sum in one pass without the (M, F) product: 0.10 ms forward and 0.11 ms
    backward, against 0.38 / 0.33 ms with index_add and 0.26 ms (forward) with a CSR matrix (M = 2,048, F =
    256, one core). Its own backward with respect to h insists on gradients per vocabulary row; here it is
    the same kernel on the transposed lists.
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, pair: Tensor, bag: Tensor, n_bags: int) -> Tensor:
        ctx.save_for_backward(h, weight, pair, bag)
        return _sum_bags(h, weight, pair, bag, n_bags)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, weight, pair, bag = ctx.saved_tensors
        grad_h = grad_weight = None
        if ctx.needs_input_grad[0]:
            by_pair = pair.argsort(stable=True)
            grad_h = _sum_bags(grad, weight[by_pair], bag[by_pair], pair[by_pair], h.shape[0])
        if ctx.needs_input_grad[1]:
            grad_weight = (h.index_select(0, pair) * grad.index_select(0, bag)).sum(-1)
        return grad_h, grad_weight, None, None, None


def _sum_bags(rows: Tensor, weight: Tensor, row: Tensor, bag: Tensor, n_bags: int) -> Tensor:
    """(n_bags, F): weight[m] * rows[row[m]] added up per bag; ``bag`` is sorted, bags may be empty."""
    sizes = torch.bincount(bag, minlength=n_bags)
    starts = sizes.cumsum(0) - sizes
    return torch.nn.functional.embedding_bag(row, rows, starts, mode="sum", per_sample_weights=weight)


def _combine_dense(h: Tensor, weights: Tensor) -> Tensor:
    """All experts ran on all tokens: h (E * T, F), weights (S, T, E) -> (S, T, F)."""
    return torch.einsum("ste,etf->stf", weights, h.view(weights.shape[2], weights.shape[1], h.shape[1]))


def _combine_sparse(h: Tensor, weights: Tensor, needed: Tensor) -> Tensor:
    """h (N, F) in the order of ``needed`` (T, E) read expert by expert, weights (S, T, E) -> (S, T, F)."""
    n_tasks, n_tokens, n_experts = weights.shape
    place = needed.T.flatten().cumsum(0) - 1  # of (expert, token) among the rows of h
    flat = weights.detach().flatten().nonzero().squeeze(1)
    bag, expert = flat // n_experts, flat % n_experts
    pair = place.index_select(0, expert * n_tokens + bag % n_tokens)
    weight = weights.flatten().index_select(0, flat)
    return _WeightedSum.apply(h, weight, pair, bag, n_tasks * n_tokens).view(n_tasks, n_tokens, -1)


def combine_experts(bank: ExpertBank, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Run each expert on the tokens that any task routes to it, once, and combine per task.

    Args:
        bank: the experts.
        x: (T, ...) tokens.
        weights: S tensors (T, E); exact zeros are not run. NaN is not zero: it reaches the output.

    Returns:
        S tensors (T, F) in the dtype of the expert outputs; sums are in float32 at least.

    Raises:
        ValueError: a weight tensor is not (T, E).
    """
    expected = (x.shape[0], bank.n_experts)
    for w in weights:
        if tuple(w.shape) != expected:
            raise ValueError(
                f"weights must have shape (tokens, n_experts) = {expected}, got {tuple(w.shape)}: "
                "gate and bank differ in experts, or gate input and x in tokens"
            )
    stacked = torch.stack(list(weights))
    active = stacked.detach() != 0
    if bool(active.all()):
        h, combine = bank(x), _combine_dense
    else:
        needed = active.any(0)
        tokens = needed.T.nonzero()[:, 1]
        h = bank(x.index_select(0, tokens), needed.sum(0).tolist())

        def combine(h, w):
            return _combine_sparse(h, w, needed)

    dtype = h.dtype
    precise = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        return list(combine(h.to(precise), stacked.to(precise)).to(dtype).unbind(0))


def why_not_fast(bank: ExpertBank, n_tasks: int) -> str | None:
    """What `moe_lab.experts.fast` lacks for this bank as it is now (mode included); None if it can run it."""
    if n_tasks != 1:
        return f"it combines for one task, not {n_tasks}"
    if type(bank) is not MLPExperts:
        return f"it knows MLPExperts, not {type(bank).__name__}"
    if len(bank.weights) != 2 or bank.activate_last:
        return "it runs two layers with activate_last=False"
    if bank.dropout and bank.training:
        return "it has no dropout"
    return None


def _takes_fast(bank: ExpertBank, x: Tensor, n_tasks: int, most: int | None) -> bool:
    """Where "auto" takes the fast path: on CUDA of compute capability 9 or 10; in float32 only if ``most`` says that
    there are zeros.

    Measured on an H200 against `combine_experts` (one run, not recorded; T 512, D 64 to T 32768, D 512): with k = 1 or
    2 of 8 or 16 experts 1.05 to 2.3 times as fast; without zeros 1.0 to 1.8 times in 16 bits, 0.8 to 1.0 times in
    float32. Older cards, on which `grouped_mm` loops over experts, were not measured.
    """
    if not x.is_cuda or x.dim() != 2 or x.dtype == torch.float64 or why_not_fast(bank, n_tasks) is not None:
        return False
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if dtype.itemsize > 2 and (most is None or most >= bank.n_experts):
        return False
    from moe_lab.triton_support import capability, usable  # only here: it imports Triton, which takes a while

    return capability(x.device)[0] in (9, 10) and usable(x)


def run_experts(
    bank: ExpertBank, x: Tensor, weights: Sequence[Tensor], backend: str = "auto", most_per_token: int | None = None
) -> list[Tensor]:
    """`combine_experts`, or the same in grouped products and Triton kernels (`moe_lab.experts.fast`).

    Args:
        bank, x, weights: as in `combine_experts`.
        backend: "reference": `combine_experts`. "fast": `grouped_mlp`. "auto": the fast one on GPUs of compute
            capability 9 or 10, where it can run (with dropout only in evaluation) and is no slower, else the reference.
            They agree up to rounding.
        most_per_token: for the fast one: no row of weights has more non-zeros than this (``most`` of `grouped_mlp`).
            Then in bfloat16 nothing waits for the device, and rows with more give NaN.

    Returns:
        S tensors (T, F).

    Raises:
        ValueError: unknown backend, weights of a wrong shape, or "fast" for what it cannot run.
    """
    check_name("backend", backend, BACKENDS)
    if backend == "auto":
        backend = "fast" if _takes_fast(bank, x, len(weights), most_per_token) else "reference"
    if backend != "fast":
        return combine_experts(bank, x, weights)
    lacks = why_not_fast(bank, len(weights))
    if lacks is not None:
        raise ValueError(f"backend 'fast' cannot run this: {lacks}; use 'reference' or 'auto'")
    if most_per_token is not None and most_per_token < 1:
        raise ValueError(f"most_per_token must be at least 1, or None; got {most_per_token}")
    from moe_lab.experts.fast import grouped_mlp  # only here: it imports Triton, which takes a while

    (w,) = weights
    if tuple(w.shape) != (x.shape[0], bank.n_experts):
        raise ValueError(f"weights must have shape {(x.shape[0], bank.n_experts)}, got {tuple(w.shape)}")
    (w1, w2), (b1, b2) = bank.weights, bank.biases
    return [grouped_mlp(x, w, w1, b1, w2, b2, bank.activation, most=most_per_token)]
