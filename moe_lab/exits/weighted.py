"""Inference modules on weighted samples, the weights learned: the baseline L2W-DEN (Han et al., ECCV 2022).

Legend: A and M halves of a batch, n samples each, L exits, G = L - 1 trained modules theta, E exits that are weighted
(L or G), D feature width, K classes, C_il the cross entropy of sample i at exit l.

A small network sees the losses of a sample at all exits and answers with weights, whose mean stays 1:

    w = tanh MLP(C_i1 .. C_iE),   W_il = 1 + epsilon (w_il - mean of w)
    modules:   L_A(theta, W) = sum_l mean over i in A of W_il C_il,   W constant

It learns what makes modules good *where they will be used*: one step of the modules' optimiser is foreseen, with W a
function of the network, and judged on the other half.

    theta' = theta - rate (momentum v + dL_A/dtheta + decay theta)
    weights:   sum_l mean of C_jl(theta') over those j in M that leave at l

Exit l gets the floor(n pi_l) surest samples that are left, by confidence under theta', pi_l ~ q^l; the last exit gets
the rest. Linear modules need no second backward pass: dL_A/dtheta_l = mean_i W_il x_il (softmax(z_il) - onehot(y_i))^T
is linear in W. A weight grows if the gradient of its sample points where the other half wants to go.

Where we differ.
* The last head is frozen. With ``last_head`` it is an exit like others, only that its weight has no effect (its loss, a
  constant, is left out of ``modules``); without, the last trained exit takes the rest, as in JEI-DNN's comparison.
* `fit` makes one step per batch: it trains on one half and judges on the other, and the next step, on the next batch,
  has the roles swapped. The authors do both on one batch: twice the steps per epoch.
* Both gradients are taken at once: modules are weighted by the network *before* its step (authors: after it), and the
  foreseen step has the learning rate of the step before (`fit` sets rates after the loss). It knows no clipping: leave
  ``clip_norm`` None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.utils import skip_init

from moe_lab.exits.linear import LinearExits
from moe_lab.exits.losses import cross_entropies
from moe_lab.exits.policies import confidence, geometric_exits, geometric_shares
from moe_lab.names import check_name

_MEAN_OVER = {"mat": (0, 1), "col": (1,), "row": (0,)}  # of (samples, exits)


@dataclass(frozen=True)
class Weighting:
    """How samples are weighted.

    Attributes:
        epsilon: how far weights may be from 1, not negative: |W - 1| < 2 epsilon. 0: plain cross entropy.
        mean: over what weights average 1: "mat", "col" (each sample) or "row" (each exit).
        every: the network learns in every so many steps; it weighs in all of them.
        ratio: q, of the shares of neighbouring exits in the network's loss.
        last_head: the frozen last head counts among the exits.
    """

    epsilon: float = 0.8
    mean: str = "col"
    every: int = 1
    ratio: float = 0.75
    last_head: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon must be a number that is not negative, got {self.epsilon}")
        check_name("mean", self.mean, _MEAN_OVER)
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio must be positive, got {self.ratio}")


CIFAR = Weighting()  # the authors' for CIFAR
IMAGENET = Weighting(0.3, "mat", 100, 0.75, last_head=False)  # in JEI-DNN's comparison, also on CIFAR: a weak baseline


def _linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    layer = skip_init(nn.Linear, inputs, outputs)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


class WeightedExits(LinearExits):
    """L2W-DEN on cached features. Train it with the two optimisers of `optimizers`.

    Args:
        n_exits, width, n_classes: see `LinearExits`.
        weighting: `CIFAR`, `IMAGENET` or another.
        hidden: units of the network.
        generator: for initial weights, first of the modules, then of the network.
    """

    def __init__(
        self,
        n_exits: int,
        width: int,
        n_classes: int,
        weighting: Weighting = CIFAR,
        *,
        hidden: int = 500,
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_exits, width, n_classes, generator=generator)
        if hidden < 1:
            raise ValueError(f"the network needs at least 1 hidden unit, got {hidden}")
        self.weighting = weighting
        self.n_weighted = n_exits if weighting.last_head else n_exits - 1
        first, second = (_linear(*sizes, generator) for sizes in ((self.n_weighted, hidden), (hidden, self.n_weighted)))
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.Tanh())
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._sgd: torch.optim.SGD | None = None

    def optimizers(
        self,
        rate: float,
        *,
        momentum: float = 0.9,
        decay: float = 5e-4,
        net_rate: float = 1e-4,
        net_decay: float = 1e-4,
    ) -> list[torch.optim.Optimizer]:
        """SGD for the modules and Adam for the network, for `fit`.

        The model remembers the first: the foreseen step has its rate, momentum and decay. Its state (v) is in
        checkpoints as that of every optimiser. Call this after moving the model to its device, once per training.
        """
        self._sgd = torch.optim.SGD([self.weight, self.bias], rate, momentum=momentum, weight_decay=decay)
        return [self._sgd, torch.optim.Adam(self.net.parameters(), net_rate, weight_decay=net_decay)]

    @torch.no_grad()
    def advance(self) -> None:
        """One optimiser step is done: the halves swap roles."""
        self.step += 1

    def sample_weights(self, losses: Tensor) -> Tensor:
        """W (n, E) of losses (n, E); differentiable in the network, not in the losses."""
        answer = self.net(losses.detach())
        return 1 + self.weighting.epsilon * (answer - answer.mean(_MEAN_OVER[self.weighting.mean], keepdim=True))

    def foreseen(self, features: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """theta': weight (G, D, K) and bias (G, K) after the next step of SGD; a function of ``weights`` alone.

        Args:
            features: (n, L, D) of half A.
            labels: (n,).
            weights: (n, E) W.

        Raises:
            ValueError: the optimiser is not known yet.
        """
        if self._sgd is None:
            raise ValueError("the modules' optimiser is unknown: take it and the network's from optimizers(rate)")
        with torch.no_grad():
            probabilities = self.modules_at(features, self.weight, self.bias).softmax(-1)
            error = probabilities - one_hot(labels, self.n_classes).unsqueeze(1)
        error = error * weights[:, : self.n_exits - 1].unsqueeze(-1) / len(labels)
        by_weight, by_bias = torch.einsum("bgd,bgk->gdk", features[:, :-1], error), error.sum(0)
        return self._after_step(self.weight, by_weight), self._after_step(self.bias, by_bias)

    def _after_step(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        group, now = self._sgd.param_groups[0], parameter.detach()
        change = gradient + group["weight_decay"] * now
        velocity = self._sgd.state.get(parameter, {}).get("momentum_buffer")
        if velocity is not None:
            change = change + group["momentum"] * velocity
        return now - group["lr"] * change

    def meta_loss(self, features: Tensor, last: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Sum over exits of the mean cross entropy of those that leave there, with modules ``weight``, ``bias``.

        Args:
            features, last, labels: of half M, (n, L, D), (n, K) and (n,).
            weight, bias: (G, D, K) and (G, K), perhaps from `foreseen`.
        """
        own = self.modules_at(features, weight, bias)
        logits = torch.cat((own, last.unsqueeze(1).to(own.dtype)), 1)[:, : self.n_weighted]
        # As in the comparison: without the last head its share goes to the last trained exit.
        exits = geometric_exits(confidence(logits), geometric_shares(self.weighting.ratio, self.n_exits))
        leaves = one_hot(exits, self.n_weighted).to(logits.dtype)
        return ((leaves * cross_entropies(logits, labels)).sum(0) / leaves.sum(0).clamp(min=1)).sum()

    def halves(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(A, M): the first half (of odd batches the larger) is A in even steps, the second in odd ones.

        Of a single sample nothing can be kept back: it is A, and M is empty.
        """
        cut = (len(batch["label"]) + 1) // 2
        first, second = (
            {name: values[rows] for name, values in batch.items()} for rows in (slice(cut), slice(cut, None))
        )
        return (second, first) if int(self.step) % 2 and len(second["label"]) else (first, second)

    def terms(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss terms for `fit`: ``modules`` (gradient to modules only), ``weights`` (to the network only).

        ``weights`` is 0 in steps in which the network does not learn, and for a batch of a single sample.

        Args:
            batch: ``features`` (B, L, D), ``last`` (B, K), ``label`` (B,).
        """
        a, m = self.halves(batch)
        logits = self.logits(a["features"], a["last"])[:, : self.n_weighted]
        losses = cross_entropies(logits, a["label"])
        weights = self.sample_weights(losses)
        modules = (weights.detach() * losses)[:, : self.n_exits - 1].mean(0).sum()
        if int(self.step) % self.weighting.every or not len(m["label"]):
            return {"modules": modules, "weights": modules.new_zeros(())}
        foreseen = self.foreseen(a["features"], a["label"], weights)
        return {"modules": modules, "weights": self.meta_loss(m["features"], m["last"], m["label"], *foreseen)}
