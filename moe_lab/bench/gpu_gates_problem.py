"""What the benchmark of gates computes: sizes, tokens and gates from a seed, and the error of a step.

Legend: T tokens, D width, E experts, K chosen experts or trees, C = (2E - 1) K logits of COMET.

A step goes from x to weights and loss terms in training mode, and back to x and all parameters of the gate, with a
random gradient of the weights and 0.01 of each loss term.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_lab.gates import CometGate, TopKGate
from moe_lab.gates.base import Affine
from moe_lab.routing import Routing

Step = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Shape:
    """Sizes of one row: T, D, E, K."""

    tokens: int
    width: int
    experts: int
    k: int

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1 or not 2 <= self.k <= self.experts:
            raise ValueError(f"sizes must be positive and k from 2 (top-1 has no gradient) to experts, got {self}")

    @property
    def logits(self) -> int:
        """C."""
        return (2 * self.experts - 1) * self.k


SHAPES = (Shape(32768, 1024, 16, 2), Shape(32768, 1024, 256, 4))


class InXsDtype(nn.Module):
    """An `Affine` map with its product in x's dtype, rounded to it."""

    def __init__(self, affine: Affine):
        super().__init__()
        self.affine = affine

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E) float32."""
        return functional.linear(x, self.affine.weight.to(x.dtype), self.affine.bias.to(x.dtype)).float()


class Problem:
    """Tokens, gates and incoming gradients, drawn from a seed.

    Args:
        shape: sizes.
        device: of everything.
        dtype: of x.
        parameters: dtype of the gates' parameters (default: that of x).
        sharpness: factor on the parameters of the splits.
        seed: of everything.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device | str,
        dtype: torch.dtype = torch.bfloat16,
        parameters: torch.dtype | None = None,
        *,
        sharpness: float = 1.0,
        seed: int = 0,
    ):
        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        generator = torch.Generator(device).manual_seed(seed)
        self.shape, self.device, self.sharpness = shape, torch.device(device), sharpness
        self.x = draw(shape.tokens, shape.width).to(dtype).requires_grad_()
        self.grad = draw(shape.tokens, shape.experts)
        sizes = shape.width, shape.experts, shape.k
        weights = torch.Generator().manual_seed(seed)
        self.gates: dict[str, nn.Module] = {
            "top-k": TopKGate(*sizes, generator=weights),
            "top-k, x's dtype": TopKGate(*sizes, generator=weights),
            "COMET": CometGate(*sizes, backend="reference", generator=weights),
        }
        self.gates["top-k, x's dtype"].logits = InXsDtype(self.gates["top-k, x's dtype"].logits)
        with torch.no_grad():
            for parameter in self.gates["COMET"].split.parameters():
                parameter.mul_(sharpness)
        for gate in self.gates.values():
            gate.to(device, parameters or dtype).train()
        kernels = self.gates["COMET, kernels"] = copy.deepcopy(self.gates["COMET"])
        kernels.backend = "fast"

    def step(self, gate: nn.Module, run: Callable[[Tensor], Routing] | None = None, x: Tensor | None = None) -> Step:
        """Forward and backward: weights, loss terms, gradients of x and the parameters. ``run``: the gate, compiled."""
        run, x = gate if run is None else run, self.x if x is None else x
        leaves = [x, *gate.parameters()]

        def step() -> list[Tensor]:
            routing = run(x)
            results = [routing.weights, *routing.losses.values()]
            grads = [self.grad, *(torch.full_like(loss, 0.01) for loss in results[1:])]
            return [*(result.detach() for result in results), *torch.autograd.grad(results, leaves, grads)]

        return step

    def expected(self) -> list[Tensor]:
        """What a step of COMET gives, by the reference in float32."""
        exact = copy.deepcopy(self.gates["COMET"]).float()
        return self.step(exact, x=self.x.detach().float().requires_grad_())()


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest ||a - b|| / ||b||; where b is 0, ||a||."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        size = float(b.float().norm())
        difference = float((a.float() - b.float()).norm())
        worst = max(worst, difference / size if size else difference)
    return worst
