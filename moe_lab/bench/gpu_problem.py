"""What the benchmark of the MoE layer computes: sizes, inputs and parameters from a seed, and the loop that is right.

Legend: T tokens, D width, H hidden width of an expert, E experts, K experts per token, N routed (token, expert) pairs.

Forward and backward, for x, the gate's weights and all parameters: 12 N D H floating-point operations (a multiply-add
is two), whatever else a case computes. Two routings of the same tokens: "fixed", K experts each, N = T K; "variable",
where the number of experts per token is uniform from 1 to 2K - 1 (for K = 1 from 0 to 2), K on average.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_lab.experts.fast import groupable

Step = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Shape:
    """Sizes of one row: T, D, H, E, K."""

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1 or self.k > self.experts:
            raise ValueError(f"sizes must be at least 1 and k at most the number of experts, got {self}")

    @property
    def flops(self) -> int:
        """Floating-point operations of K experts per token, forward and backward."""
        return 12 * self.tokens * self.k * self.width * self.hidden


SHAPES = (
    Shape(32768, 1024, 4096, 16, 2),
    Shape(32768, 2048, 1024, 64, 8),
    Shape(32768, 1024, 4096, 16, 1),
)


def _variable(logits: Tensor, k: int, most: int, generator: torch.Generator) -> Tensor:
    """(T, E) weights, as a threshold of each token's own leaves them: softmax over its n largest, n drawn around k, at
    most ``most``."""
    count = torch.randint(2 * k - most, most + 1, (len(logits), 1), generator=generator, device=logits.device)
    largest, experts = logits.topk(most, dim=1)
    keep = torch.arange(most, device=logits.device) < count
    # where: a token without experts gets zeros, not the NaN of an empty softmax.
    weights = largest.masked_fill(~keep, -torch.inf).softmax(1).where(keep, 0)
    return torch.zeros_like(logits).scatter(1, experts, weights)


class Problem:
    """Inputs, parameters and an incoming gradient, drawn from a seed; the routing is uniform, or uneven by ``skew``.

    Args:
        shape: sizes.
        activation: "gelu" or "relu".
        bias: with biases, as `MLPExperts` has them, or without.
        skew: standard deviation of each expert's advantage in the routing, in standard deviations of the logits.

    Attributes:
        experts, values: (T, K), the fixed routing.
        weights: (T, E), the same spread out.
        variable: (T, E), the variable routing; no token has more than ``most``.

    Raises:
        ValueError: rows that `grouped_mm` does not take.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device | str,
        dtype: torch.dtype = torch.bfloat16,
        *,
        activation: str = "gelu",
        bias: bool = False,
        skew: float = 0.0,
        seed: int = 0,
    ):
        if not groupable(dtype, shape.experts, shape.width, shape.hidden):
            raise ValueError(f"{dtype} rows of width and hidden must be whole multiples of 16 bytes, got {shape}")
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
            return (torch.randn(size, generator=generator, device=device) * scale).to(kind).requires_grad_()

        t, d, h, e, k = dataclasses.astuple(shape)
        self.shape, self.activation = shape, activation
        self.x, self.grad = draw(t, d), draw(t, d).detach()
        logits = draw(t, e, kind=torch.float32).detach() + skew * draw(1, e, kind=torch.float32).detach()
        kept, self.experts = logits.topk(k, dim=1)
        self.values = kept.softmax(1).requires_grad_() if k > 1 else logits.softmax(1).amax(1, True).requires_grad_()
        self.weights = self.spread().detach().requires_grad_()
        self.w1, self.w2 = draw(e, d, h, scale=d**-0.5), draw(e, h, d, scale=h**-0.5)
        self.b1, self.b2 = (draw(e, h), draw(e, d)) if bias else (None, None)
        self.dense = [draw(k * h, d, scale=d**-0.5), draw(d, k * h, scale=h**-0.5)]
        self.dense_bias = [draw(k * h), draw(d)] if bias else [None, None]
        self.most = min(k + max(k - 1, 1), e)
        self.variable = _variable(logits, k, self.most, generator).requires_grad_()
        self.variable_flops = 12 * d * h * int((self.variable != 0).sum())

    @property
    def parameters(self) -> list[Tensor]:
        """Of the experts."""
        return [p for p in (self.w1, self.b1, self.w2, self.b2) if p is not None]

    def spread(self) -> Tensor:
        """``values`` as (T, E) weights, differentiable."""
        zeros = self.values.new_zeros(self.shape.tokens, self.shape.experts)
        return zeros.scatter(1, self.experts, self.values)

    def in_float32(self) -> Problem:
        """The same numbers in float32."""
        twin = object.__new__(Problem)
        vars(twin).update(vars(self))
        for name in ("x", "grad", "w1", "b1", "w2", "b2"):
            value = getattr(self, name)
            setattr(twin, name, None if value is None else value.detach().float().requires_grad_(name != "grad"))
        return twin

    def step(self, forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Step:
        """Forward and backward: the output and the gradients of ``leaves``."""

        def run() -> list[Tensor]:
            y = forward()
            return [y.detach(), *torch.autograd.grad(y, leaves, self.grad)]

        return run


def loop_layer(p: Problem, weights: Tensor) -> Tensor:
    """Expert by expert, in plain products, for (T, E) weights: the oracle."""
    y, act = torch.zeros_like(p.x), getattr(functional, p.activation)
    biases = [b.unbind() if b is not None else [0.0] * p.shape.experts for b in (p.b1, p.b2)]
    for e, (w1, b1, w2, b2) in enumerate(zip(p.w1.unbind(), biases[0], p.w2.unbind(), biases[1], strict=True)):
        token = weights[:, e].nonzero().squeeze(1)
        out = act(p.x.index_select(0, token) @ w1 + b1) @ w2 + b2
        y = y.index_add(0, token, out * weights[token, e, None])
    return y


def expected(p: Problem, variable: bool = False) -> list[Tensor]:
    """Output and gradients (of x, the weights, the parameters) of the loop, in float32."""
    exact = p.in_float32()
    if variable:
        forward, weights = (lambda: loop_layer(exact, exact.variable)), exact.variable
    else:
        forward, weights = (lambda: loop_layer(exact, exact.spread())), exact.values
    return exact.step(forward, [exact.x, weights, *exact.parameters])()


def error(p: Problem, found: list[Tensor], right: list[Tensor]) -> float:
    """The largest ||a - b|| / ||b|| over output and gradients."""
    worst = 0.0
    for a, b in zip(found, right, strict=True):
        if a.shape != b.shape:  # the gradient of (T, E) weights, where only the routed ones are known
            a = a.gather(1, p.experts)
        worst = max(worst, float((a.float() - b.float()).norm() / b.float().norm()))
    return worst
