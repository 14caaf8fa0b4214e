"""Adam for a stack of trials: the formula of `torch.optim.Adam`, elementwise, a learning rate per trial.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   p <- p - lr_k / (1 - b1^n) m / (sqrt(v / (1 - b2^n)) + eps)

Legend: K trials, n the number of the step, counted from 1.

`torch.optim` has learning rates per parameter group, not per row of a tensor; K groups of row views would launch K
times as many kernels, which is what stacking avoids. n is the step of training, so a parameter that gets its first
gradient later than others would start with another correction than in `torch.optim.Adam`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_BETAS = (0.9, 0.999)


class StackedAdam:
    """The moments of K trials, in the shapes of the parameters.

    Args:
        parameters: name -> (K, ...).
        eps: Keras's 1e-7, as `recommender_adam` has it.
    """

    def __init__(self, parameters: Mapping[str, Tensor], eps: float = 1e-7):
        self.eps = eps
        self.first = {name: torch.zeros_like(value, requires_grad=False) for name, value in parameters.items()}
        self.second = {name: torch.zeros_like(value, requires_grad=False) for name, value in parameters.items()}

    @torch.no_grad()
    def step(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        learning_rates: Tensor | Sequence[float],
        n: int,
        learning: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Update in place.

        Args:
            parameters: name -> (K, ...).
            gradients: of those that have one; the others are left alone, moments and all.
            learning_rates: one per trial; (K,) float64 on the device of the parameters makes no copy.
            n: number of the step.
            learning: name -> the rows that are updated, for parameters that some trials have ceased to train.
        """
        device = next(iter(parameters.values())).device
        given = torch.as_tensor(learning_rates, dtype=torch.float64, device=device)
        rates = (given / (1 - _BETAS[0] ** n)).float()
        for name, gradient in gradients.items():
            tensors = parameters[name], self.first[name], self.second[name]
            rows = (learning or {}).get(name)
            if rows is None or len(rows) == len(gradient):
                self._update(*tensors, gradient, rates, n)
            elif rows:
                index = torch.tensor(rows).to(gradient.device, non_blocking=True)
                parts = [tensor.index_select(0, index) for tensor in (*tensors, gradient, rates)]
                self._update(*parts, n)
                for tensor, part in zip(tensors, parts, strict=False):
                    tensor.index_copy_(0, index, part)

    def _update(self, p: Tensor, m: Tensor, v: Tensor, g: Tensor, rates: Tensor, n: int) -> None:
        m.lerp_(g, 1 - _BETAS[0])
        v.mul_(_BETAS[1]).addcmul_(g, g, value=1 - _BETAS[1])
        denominator = v.sqrt().div_((1 - _BETAS[1] ** n) ** 0.5).add_(self.eps)
        p.sub_((m / denominator).mul_(rates.view(-1, *[1] * (p.dim() - 1))))

    def keep(self, rows: Sequence[int]) -> None:
        """Remove all rows but these."""
        for moments in (self.first, self.second):
            for name, value in moments.items():
                moments[name] = value.index_select(0, torch.tensor(rows, dtype=torch.int64, device=value.device))
