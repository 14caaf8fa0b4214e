"""Two COMET gates with different gamma on the same data: do they take the same path?

The claim (COMET specification, section 2.5; derived in notebook 02): with w = gamma u the gate depends on u alone, so
gamma is nothing but a learning-rate multiplier of the splits. Everything here is float64: the claim is exact, and
float32 would blur it.

Taught in notebook 02.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.gates import CometGate

OPTIMIZERS = ("adam", "sgd")


def trajectory(
    gamma: float, split_rate: float, *, optimizer: str = "adam", leaf_rate: float = 0.02, steps: int = 60, seed: int = 0
) -> Tensor:
    """Combine weights of 32 fixed inputs after every step of a small training, (steps, 32, 4), float64.

    The gate (4 experts, 2 trees, 3 inputs) fits random target weights by least squares. Whatever gamma, splits start at
    gamma times the same numbers, as the paper's initialisation does.

    Args:
        gamma: width of the smooth-step.
        split_rate: learning rate of split weights and biases.
        optimizer: "adam" or "sgd" (no momentum).
        leaf_rate: learning rate of leaf weights and biases.
        steps: of full-batch training.
        seed: of data and initial weights.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    target = torch.randn(32, 4, generator=generator, dtype=torch.float64).softmax(-1)
    gate = CometGate(3, n_experts=4, k=2, gamma=gamma, generator=generator).double()
    with torch.no_grad():
        for parameter in gate.split.parameters():
            start = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.5
            parameter.copy_(gamma * 0.2 * start)
    groups = [
        # Gradients of the splits are 1/gamma times as large, so Adam's epsilon has to be, too.
        {"params": gate.split.parameters(), "lr": split_rate, **({"eps": 1e-8 / gamma} if optimizer == "adam" else {})},
        {"params": gate.leaf.parameters(), "lr": leaf_rate},
    ]
    descent = (torch.optim.Adam if optimizer == "adam" else torch.optim.SGD)(groups, lr=leaf_rate)
    path = []
    for _ in range(steps):
        weights = gate(x).weights
        descent.zero_grad()
        (weights - target).square().sum(-1).mean().backward()
        descent.step()
        path.append(weights.detach())
    return torch.stack(path)
