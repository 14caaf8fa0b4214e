"""JEI-DNN on a whole network, images in: for a backbone that trains along, and as the oracle of cached features.

With a frozen backbone this is `joint.JointExits` for one price, step by step, and every step runs the backbone: the
slow, obvious version (`python -m moe_lab.bench cpu` says how much slower). With a backbone that is not frozen all exits
train, also the last, and so does everything below them in warm-up and module phases.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.exits.features import uncertainty_features
from moe_lab.exits.network import MultiExitNetwork
from moe_lab.exits.phases import Phases
from moe_lab.exits.training import ExitTraining


class NetworkExits(ExitTraining):
    """A network with exits and the price it trains for.

    Args:
        network: frozen backbone or not (its ``freeze_backbone``).
        price: lambda.
        costs: (L,) costs of the exits; default: the network's own.
        phases: see `Phases`.
        mode: of `inference_loss`.
        balance: of `positive_weights`.
        warmup_loss: see `ExitTraining`.

    The exit model is the network's.

    Raises:
        ValueError: neither the network nor the caller says what exits cost; see also `ExitTraining`.

    ::

        training = NetworkExits(network, price=0.3, phases=Phases(warmup=600, steps=1600))
        fit(training, batches, NetworkExits.terms, coefficients={"gates": 1.0, "modules": 1.0}, ...)
        network.predict(images)
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        price: float,
        costs: Tensor | None = None,
        *,
        phases: Phases,
        mode: str = "released",
        balance: str = "cumulative",
        warmup_loss: str = "mean",
    ):
        costs = network.costs if costs is None else costs
        if costs is None:
            raise ValueError("the network does not know its costs: build it with costs=exit_costs(...), or give costs")
        n_exits = len(network.blocks)
        if tuple(costs.shape) != (n_exits,):
            raise ValueError(f"costs must be one number per exit ({n_exits}), got {tuple(costs.shape)}")
        n_trained = n_exits - 1 if network.freeze_backbone else n_exits
        terms = {"mode": mode, "balance": balance, "model": network.model, "warmup_loss": warmup_loss}
        super().__init__([price], costs, phases=phases, n_trained=n_trained, **terms)
        self.network = network

    def batch_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(1, B, L, K) of ``image``."""
        return self.network(batch["image"])[0].unsqueeze(0)

    def batch_gates(self, batch: dict[str, Tensor], logits: Tensor) -> Tensor:
        """(1, B, G) of the logits; the network need not run again."""
        return self.network.gates(uncertainty_features(logits[0, :, :-1])).unsqueeze(0)

    @torch.no_grad()
    def weights_from(self, images: Tensor, labels: Tensor, batch_size: int = 512) -> None:
        """Set the weights of positive targets from validation images (N, ...), with the modules as they are.

        Call it in eval mode (`fit` evaluates so): dropout would change what is counted.
        """
        parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        losses = [self.cross_entropies(self.batch_logits({"image": x}), y) for x, y in parts]
        self.set_weights(torch.cat(losses, 1))
