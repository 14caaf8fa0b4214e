"""What `moe_lab.bench.cpu` times of the training of exits: on cached features, and on whole networks.

A frozen backbone gives the same features in every epoch. One pass computes them; then a step reads rows of a table and
a whole grid of prices trains side by side. The oracle, `exits.end_to_end.NetworkExits`, runs the backbone in every step
and trains one price. The two train the same weights (tested); here is what that costs.

A timed step is one gate step and one module step on the same batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lab.bench.timing import take_turns
from moe_lab.exits import ExitGates, MultiExitNetwork, exit_costs
from moe_lab.exits.end_to_end import NetworkExits
from moe_lab.exits.joint import JointExits
from moe_lab.exits.phases import Phases
from moe_lab.models.vit import VisionTransformer

_CLASSES = 10


@dataclass(frozen=True)
class ExitTrainingBench:
    """What to time.

    Attributes:
        layers, width, side, patch, heads: of a vision transformer with an exit behind every block.
        prices: of the grid.
        batch: images per step.
        images: in an epoch, for the column "epoch".
        rounds, steps: turns of each case, timed steps per turn.
    """

    layers: int = 6
    width: int = 48
    side: int = 16
    patch: int = 4
    heads: int = 4
    prices: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.5, 5.0)
    batch: int = 64
    images: int = 8000
    rounds: int = 6
    steps: int = 4

    def __post_init__(self) -> None:
        if self.layers < 2 or self.batch < 1 or self.images < self.batch or not self.prices:
            raise ValueError("need at least 2 layers, a price, and an epoch of at least one batch of one image")
        if self.rounds * self.steps < 2:
            raise ValueError("quartiles need at least two timed steps: raise rounds or steps")

    def __str__(self) -> str:
        tokens = (self.side // self.patch) ** 2 + 1
        return (
            f"{self.layers} blocks, {tokens} tokens, width {self.width}, batch {self.batch}, epoch of {self.images} "
            f"images, {self.rounds} x {self.steps} steps"
        )


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One gate step and one module step."""
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)
    phases = model.phases

    def step() -> None:
        for position in (phases.warmup, phases.warmup + phases.gate_steps):  # the first of each phase
            model.step.fill_(position)
            sgd.zero_grad()
            sum(model.terms(batch).values()).backward()
            sgd.step()

    return step


def training_rows(config: ExitTrainingBench, seed: int = 0) -> list[dict]:
    """Rows of the table: one price on a whole network, one and all prices on cached features.

    Returns:
        ``case``, ``prices``, ``ms``: of a timed step, median; ``cache_s``: of the one pass that fills the table;
        ``epoch_s``: seconds per epoch and all prices, a grid on whole networks being so many runs; ``faster``: whole
        network's epoch over this one, the same prices, without the one pass.
    """
    torch.manual_seed(seed)
    body = VisionTransformer(
        side=config.side,
        channels=1,
        n_classes=_CLASSES,
        patch=config.patch,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
    ).eval()
    blocks, heads = list(body.blocks), body.exit_heads([nn.Linear(w, _CLASSES) for w in body.widths[:-1]])
    image, label = torch.randn(config.batch, 1, config.side, config.side), torch.arange(config.batch) % _CLASSES
    costs = exit_costs(blocks, heads, image[:1], _CLASSES, stem=body.stem)
    network = MultiExitNetwork(
        blocks, heads, ExitGates(config.layers - 1), stem=body.stem, costs=costs, freeze_backbone=True
    )
    phases = Phases(warmup=1, gate_steps=1, module_steps=1, final_gate_steps=1, steps=10)
    features = body.features(image)
    with torch.no_grad():
        table = {"features": features, "last": body.head(features[:, -1]), "label": label}
    whole = NetworkExits(network, config.prices[0], phases=phases, mode="detached").train()
    sizes = (config.layers, config.width, _CLASSES)
    grids = [config.prices[:1]] + [config.prices] * (len(config.prices) > 1)
    cases: dict[tuple[str, int], Callable] = {("whole network", 1): _step(whole, {"image": image, "label": label})}
    for prices in grids:
        joint = JointExits(*sizes, prices, costs, phases=phases, mode="detached")
        cases["cached features", len(prices)] = _step(joint, table)
    cases["the one pass", 0] = lambda: body.features(image)
    timings = take_turns(cases, rounds=config.rounds, steps=config.steps, warm_up=1)
    batches = config.images / config.batch
    seconds = {case: timing.median for case, timing in timings.items()}
    rows = []
    for case, n_prices in list(cases)[:-1]:
        ms = seconds[case, n_prices]
        cached = case != "whole network"
        rows.append(
            {
                "case": case,
                "prices": n_prices,
                "ms": 1e3 * ms,
                "cache_s": batches * seconds["the one pass", 0] if cached else 0.0,
                "epoch_s": batches * ms / 2,
                "faster": n_prices * seconds["whole network", 1] / ms,
            }
        )
    return rows
