"""Inference modules that correct the exits before them: the baseline BoostedNet (Yu et al., AAAI 2023).

Legend: B batch, L exits, G = L - 1, D feature width, K classes, f_l the linear module of exit l, sg stop-gradient.

    F_1 = f_1,   F_l = f_l + omega sg[F_{l-1}],        exit l predicts F_l
    loss = sum_l mean over samples of CE(F_l, y);      the gradient of stage l reaches f_l alone

As in gradient boosting, each module is fitted to what the sum of those before leaves open. There is no gate: exits are
chosen by thresholds (`exits.policies`).

The frozen last head. Its stage cannot learn, so its loss is left out. What exit L predicts is a choice:

    "ensemble"   F_L = last + omega F_{L-1}: the additive model as written, and what the published comparison used; the
                 last exit is then *not* the backbone
    "frozen"     F_L = last: nobody does worse at the end than the backbone does

Where we differ. The original divides gradients at each exit so that a deep backbone gets equally much from all of them;
the factors act on the way from the modules back into the backbone. Features are frozen here, nothing flows there, and
rescaling is a no-op: left out. Learning rate and length of training are those of `fit`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lab.exits.linear import LinearExits
from moe_lab.exits.losses import cross_entropies
from moe_lab.names import check_name

LAST_EXITS = ("ensemble", "frozen")


class BoostedExits(LinearExits):
    """BoostedNet on cached features.

    Args:
        n_exits, width, n_classes, generator: see `LinearExits`.
        omega: share of the sum so far that a stage starts from, not negative. 0: separately trained modules.
        last: "ensemble" or "frozen", what the last exit predicts; see the module's text.
    """

    def __init__(
        self,
        n_exits: int,
        width: int,
        n_classes: int,
        omega: float = 0.5,
        *,
        last: str = "ensemble",
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_exits, width, n_classes, generator=generator)
        if not 0 <= omega < math.inf:
            raise ValueError(f"omega must be a number that is not negative, got {omega}")
        check_name("last exit", last, LAST_EXITS)
        self.omega, self.last = omega, last

    def logits(self, features: Tensor, last: Tensor) -> Tensor:
        """F_1 .. F_L, (B, L, K), in training and in use; a gradient of F_l goes into f_l only.

        Args:
            features: (B, L, D).
            last: (B, K) logits of the frozen last head.
        """
        stages = super().logits(features, last).unbind(1)
        sums = [stages[0]]
        for stage in stages[1:]:
            sums.append(stage + self.omega * sums[-1].detach())
        if self.last == "frozen":
            sums[-1] = stages[-1]
        return torch.stack(sums, 1)

    def terms(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss term for `fit`: ``modules``, the sum over stages l < L.

        Args:
            batch: ``features`` (B, L, D), ``last`` (B, K), ``label`` (B,).
        """
        losses = cross_entropies(self.logits(batch["features"], batch["last"])[:, :-1], batch["label"])
        return {"modules": losses.mean(0).sum()}
