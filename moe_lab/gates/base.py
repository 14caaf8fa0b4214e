"""What gates share: an affine map that may also be a constant, and the precision rule.

Legend: T tokens, D gate-input width.

Every gate comes in two forms. *Per example*: logits are affine in the token. *Static* (``in_features=None``):
logits are free parameters, the same for every token: one mixture per task, the easiest object to look at.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_lab.routing import Routing

Init = Callable[[Tensor], Tensor]


def uniform_(bound: float, generator: torch.Generator | None = None) -> Init:
    """An initialiser: U(-bound, bound) in place."""
    return lambda tensor: tensor.uniform_(-bound, bound, generator=generator)


def check_sizes(n_experts: int, k: int, in_features: int | None) -> None:
    """Raise ValueError for a gate that cannot exist."""
    if n_experts < 1:
        raise ValueError(f"n_experts must be at least 1, got {n_experts}")
    if not k >= 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if in_features is not None and in_features < 1:
        raise ValueError(f"in_features must be at least 1, or None for a static gate; got {in_features}")


class Affine(nn.Module):
    """Logits of any shape: x W + b, or only b when ``in_features`` is None.

    Computed in float32 (float64 where input or parameters are float64) also under autocast: smooth-steps and softmaxes
    in bfloat16 lose everything below 4e-3, and rows of weights then sum to 0.995 instead of 1.
    """

    def __init__(self, in_features: int | None, shape: tuple[int, ...], *, weight_init: Init, bias_init: Init):
        super().__init__()
        self.in_features = in_features
        self.shape = tuple(shape)
        size = math.prod(shape)
        with torch.no_grad():
            self.weight = None
            if in_features is not None:
                self.weight = nn.Parameter(weight_init(torch.empty(size, in_features)))
            self.bias = nn.Parameter(bias_init(torch.empty(size)))

    def forward(self, x: Tensor | None = None) -> Tensor:
        """(T, *shape) logits of x (T, D); a static map gives (1, *shape) without x, else the same row T times."""
        return self.tokens_last(x).movedim(-1, 0)

    def tokens_last(self, x: Tensor | None = None) -> Tensor:
        """The same logits as (*shape, T).

        Trees multiply many thin slices, one per node: with the tokens last each slice is contiguous, which is several
        times faster than (T, nodes, K) with its innermost dimension of K = 2.
        """
        if self.weight is None:
            bias = self.bias if self.bias.dtype == torch.float64 else self.bias.float()
            return bias.unsqueeze(-1).expand(-1, 1 if x is None else x.shape[0]).unflatten(0, self.shape)
        if x is None:
            raise ValueError("this gate is per example: call it with x of shape (tokens, in_features)")
        if x.dim() != 2 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"gate input must have shape (tokens, {self.in_features}), got {tuple(x.shape)}; "
                "flatten leading dimensions, or build the gate with another in_features"
            )
        dtype = torch.float64 if torch.float64 in (x.dtype, self.weight.dtype) else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            logits = torch.addmm(self.bias.to(dtype).unsqueeze(-1), self.weight.to(dtype), x.to(dtype).T)
        return logits.unflatten(0, self.shape)

    @torch.no_grad()
    def load_arrays(self, weight: Tensor | None, bias: Tensor) -> None:
        """Fill from arrays laid out as ``shape``, input dimension second: weight (shape[0], D, ...), bias shape.

        Raises ValueError when a shape does not fit.
        """
        bias = torch.as_tensor(bias)
        if tuple(bias.shape) != self.shape:
            raise ValueError(f"bias must have shape {self.shape}, got {tuple(bias.shape)}")
        self.bias.copy_(bias.reshape(-1))
        if (weight is None) != (self.weight is None):
            raise ValueError("a static gate has no weights, a per-example gate needs them")
        if self.weight is None:
            return
        weight = torch.as_tensor(weight)
        expected = (self.shape[0], self.in_features, *self.shape[1:])
        if tuple(weight.shape) != expected:
            raise ValueError(f"weight must have shape {expected}, got {tuple(weight.shape)}")
        self.weight.copy_(weight.movedim(1, -1).reshape(self.weight.shape))


class Gate(nn.Module):
    """A map from tokens to a `Routing`. It never sees an expert.

    Attributes:
        n_experts: E.
        k: trees, selectors or chosen experts.
        gate_input: what it wants to be called with: "features", float (T, D), or "keys", integer (T,).
        reads_details: somebody reads ``details`` at every step; a gate that could leave them for later need not.
    """

    gate_input = "features"
    reads_details = False

    def __init__(self, n_experts: int, k: int, in_features: int | None = None):
        super().__init__()
        check_sizes(n_experts, k, in_features)
        self.n_experts = n_experts
        self.k = k
        self.in_features = in_features

    def forward(self, x: Tensor | None = None) -> Routing:  # pragma: no cover - interface
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, k={self.k}, in_features={self.in_features}"
