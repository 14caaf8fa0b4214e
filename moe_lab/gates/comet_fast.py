"""COMET's gate with its trees in Triton kernels (`comet_kernels`): the product before them, and what autograd needs.

Legend: T tokens, D gate-input width, E experts = leaves, K trees, C = (2E - 1) K logits of a token.

    X (T, D) -> Z = W X^T (C, T) -> weights g (E, T), entropy             dX = dZ^T W,  dW = dZ X,  db = dZ 1

W and b hold all splits, then all leaves, K rows each: x is read once and one product does it all.

Precision: the trees are computed in float32. A bfloat16 x meets W in bfloat16 with float32 sums, which is exact for a
bfloat16 W; a float32 W goes in two bfloat16 parts, together within 2^-17. Where we differ from the plain path: the
gradients of logits are rounded to x's dtype before their two products, as in any bfloat16 layer.

What the kernels do not compute comes from the plain path when it is asked for: per-tree details (`LazyDetails`), and
gradients that will be differentiated again (``create_graph=True``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from moe_lab.gates.comet_kernels import trees, trees_backward, trees_oracle


def product(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A B in ``dtype``, its sums in float32."""
    if a.device.type == "cuda" and a.dtype != dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype) if a.dtype in (dtype, torch.float32) else a.float() @ b.float()


class _FastTrees(torch.autograd.Function):
    """Product and trees: x (T, D), W (C, D), b (C,) float32 -> weights (E, T), entropy or None, logits (C, T)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, k: int, gamma: float, entropy: bool):
        ctx.set_materialize_grads(False)
        rounded = weight.to(x.dtype)
        logits = product(rounded, x.T)
        if x.dtype != torch.float32 and weight.dtype == torch.float32:
            logits += product((weight - rounded).to(x.dtype), x.T)
        weights, log_mass, uncertain = trees(logits, bias, k, gamma, entropy)
        ctx.save_for_backward(x, weight, bias, logits, weights, log_mass)
        ctx.k, ctx.gamma = k, gamma
        return weights, uncertain, logits

    @staticmethod
    def backward(ctx, grad_weights: Tensor | None, grad_entropy: Tensor | None, grad_logits: Tensor | None):
        if torch.is_grad_enabled():  # create_graph: the kernels' gradients would be constants
            return _plain_gradients(ctx, grad_weights, grad_entropy, grad_logits)
        x, weight, bias, logits, weights, log_mass = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad = grad_logits if grad_logits is None else grad_logits.to(x.dtype)
            grad_bias = None
            if grad_weights is not None or grad_entropy is not None:
                grad_weights = torch.zeros_like(weights) if grad_weights is None else grad_weights.contiguous()
                own = trees_backward(
                    logits, bias, weights, log_mass, ctx.k, ctx.gamma, grad_weights, grad_entropy, x.dtype
                )
                grad = own if grad is None else grad + own
                if ctx.needs_input_grad[2]:  # of these alone: whoever uses the logits adds the bias, too
                    grad_bias = own.sum(1, dtype=torch.float32)
            if grad is None:
                return (None,) * 6
            grad_x = grad.T @ weight.to(x.dtype) if ctx.needs_input_grad[0] else None
            grad_weight = product(grad, x, weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad_bias, None, None, None


def _plain_gradients(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """What `_FastTrees.backward` returns, by the plain path, so that it can be differentiated again."""
    with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
        # Views: if one input was computed from another, its gradient must not run on into the other's.
        x, weight, bias = inputs = [tensor.view_as(tensor) for tensor in ctx.saved_tensors[:3]]
        logits = weight.float() @ x.float().T
        weights, uncertain, _, _ = trees_oracle(logits, bias, ctx.k, ctx.gamma)
        used = [(out, grad) for out, grad in zip((weights, uncertain, logits), grads, strict=True) if grad is not None]
        wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
        if not used or not wanted:
            return (None,) * 6
        outputs, given = zip(*used, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


class LazyDetails(Mapping[str, Tensor]):
    """`CometGate`'s details, computed by the plain path when somebody asks: K times more numbers than the weights."""

    names = ("tree_probabilities", "tree_weights")

    def __init__(self, logits: Tensor, bias: Tensor, k: int, gamma: float):
        self.given = logits, bias, k, gamma

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Both, (T, E, K)."""
        _, _, p, g = trees_oracle(*self.given)
        return {"tree_probabilities": p.movedim(-1, 0), "tree_weights": g.movedim(-1, 0)}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def fast_trees(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, gamma: float, entropy: bool
) -> tuple[Tensor, Tensor | None, LazyDetails]:
    """A whole gate on tokens for which `comet_kernels.usable` is true; nothing in it waits for the device.

    Args:
        x: (T, D), float32 or bfloat16, T at least 1.
        weight: (C, D), rows of all splits in heap order, then of all leaves, K each.
        bias: (C,).
        k, gamma: K and the width of the smooth-step.
        entropy: compute the entropy term.

    Returns:
        weights (T, E) float32, a transposed view; the entropy (scalar) or None; the details. Not for `torch.func`, nor
        for forward-mode derivatives.
    """
    with torch.autocast(x.device.type, enabled=False):
        bias = bias.float()
        weights, uncertain, logits = _FastTrees.apply(x, weight, bias, k, gamma, entropy)
    return weights.T, uncertain, LazyDetails(logits, bias, k, gamma)
