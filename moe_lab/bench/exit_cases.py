"""What `moe_lab.bench.cpu` times of early exits: `MultiExitNetwork.predict` on vision transformers with planted exits.

Nothing is trained. Blocks and heads are random, and the gates are set on the images that are timed: gate l opens at a
probability of the answer that sends the wanted share of those still inside out at exit l. So the code that runs is the
real one, and how many multiply-adds can be saved is known and does not depend on luck in training.

Four cases per network and batch size, on the same images, taking turns:

    plain      the backbone with one head and no gate
    full       every block, every head, every gate, then the decision (`predict_masked`)
    predict    stops
    nobody     `predict` with gates that let nobody go: what the possibility of leaving costs
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lab.bench.timing import Timing, take_turns
from moe_lab.exits import ExitGates, MultiExitNetwork, exit_costs, uncertainty_features
from moe_lab.exits.policies import geometric_shares, geometric_thresholds
from moe_lab.models.vit import VisionTransformer

_STEEP = 1e5  # logit of a gate per unit of probability: open or shut, hardly anything between


@dataclass(frozen=True)
class ExitNetwork:
    """Sizes of a vision transformer (see there) with an exit behind every block.

    Attributes:
        rho: of `policies.geometric_shares`; the smaller, the earlier images leave.
        rounds: turns of each case; the smaller the network, the more, or the table takes minutes.
    """

    layers: int
    width: int
    side: int
    rho: float
    rounds: int = 2
    patch: int = 4
    heads: int = 4
    ratio: int = 2
    n_classes: int = 10

    def __post_init__(self) -> None:
        geometric_shares(self.rho, self.layers)
        if self.layers < 2:
            raise ValueError(f"layers must be at least 2: one exit is no choice; got {self.layers}")

    def __str__(self) -> str:
        return f"{self.layers} blocks, {(self.side // self.patch) ** 2 + 1} tokens, width {self.width}"


@dataclass(frozen=True)
class ExitBench:
    """What to time of early exits.

    Attributes:
        networks: by default that of the early-exit experiments, and a larger one; multiply-add ratios near 2.
        batches: images per call.
        images: per timed step, at least: a step makes as many calls as that takes, so that also in batches of one the
            time is that of a mixture of exits.
        steps: timed steps per turn of a case.
    """

    networks: tuple[ExitNetwork, ...] = (ExitNetwork(6, 48, 16, rho=0.85, rounds=6), ExitNetwork(8, 128, 32, rho=0.9))
    batches: tuple[int, ...] = (1, 32, 256)
    images: int = 32
    steps: int = 2

    def __post_init__(self) -> None:
        if not self.networks or not self.batches or min(self.batches) < 1 or self.images < 1:
            raise ValueError("need a network, batches of at least 1 and at least 1 image per step")
        if min(size.rounds for size in self.networks) * self.steps < 2:
            raise ValueError("quartiles need at least two timed steps: raise rounds or steps")

    def calls(self, batch: int) -> int:
        """Of each step with batches of that size."""
        return -(-self.images // batch)

    def __str__(self) -> str:
        turns = [f"{size.rounds} x {self.steps}" for size in self.networks]
        return f"at least {self.images} images per step, {' and '.join(turns)} steps"


class PlantedExits:
    """A vision transformer, gates that send planted shares of these images out, and gates that send out nobody.

    Args:
        size: of the network.
        n_images: N.
        seed: of weights and images.

    Attributes:
        backbone: the plain network.
        network: with exits; of the exit model "direct".
        closed: the same blocks and heads with gates that are shut.
        images: (N, 1, side, side), in random order.
        exits: (N,) int64, where they leave.
    """

    def __init__(self, size: ExitNetwork, n_images: int, seed: int = 0):
        torch.manual_seed(seed)
        self.backbone = VisionTransformer(
            side=size.side,
            channels=1,
            n_classes=size.n_classes,
            patch=size.patch,
            width=size.width,
            layers=size.layers,
            heads=size.heads,
            ratio=size.ratio,
        ).eval()
        pool = self.backbone.pool
        heads = [nn.Sequential(pool, nn.Linear(size.width, size.n_classes)) for _ in range(size.layers - 1)]
        heads.append(nn.Sequential(pool, self.backbone.head))
        blocks, stem = list(self.backbone.blocks), self.backbone.stem
        self.images = torch.randn(n_images, 1, size.side, size.side)
        costs = exit_costs(blocks, heads, self.images[:1], size.n_classes, stem=stem)
        opened, shut = ExitGates(size.layers - 1), ExitGates(size.layers - 1)
        self.network = MultiExitNetwork(blocks, heads, opened, stem=stem, costs=costs).eval()
        self.closed = MultiExitNetwork(blocks, heads, shut, stem=stem, costs=costs).eval()
        with torch.no_grad():
            probability = uncertainty_features(self.network(self.images)[0])[..., 0]
            thresholds = geometric_thresholds(probability, size.rho)[:-1].clamp(max=2.0)  # inf times 0 is no bias
            for gates, lowest in ((opened, thresholds), (shut, torch.full_like(thresholds, 2.0))):
                gates.weight.copy_(_STEEP * torch.eye(4)[0].expand_as(gates.weight))
                gates.bias.copy_(-_STEEP * (lowest - 1e-6))  # below the last one that shall leave
        self.exits = self.network.predict_masked(self.images).exits

    def mixture(self, n: int) -> Tensor:
        """(n, ...) of the images, n <= N, with exits in the proportions of all of them."""
        by_exit = self.exits.argsort(stable=True)
        places = by_exit[torch.arange(n) * len(by_exit) // n]
        return self.images[places.sort().values]

    def cases(self, images: Tensor, batch: int) -> dict[str, Callable[[], list]]:
        """The four cases of the module's text: functions that answer all images in batches."""
        batches = images.split(batch)
        ways = {
            "plain": torch.no_grad()(lambda x: self.backbone(x)),
            "full": self.network.predict_masked,
            "predict": self.network.predict,
            "nobody": self.closed.predict,
        }
        return {name: lambda answer=answer: [answer(x) for x in batches] for name, answer in ways.items()}


def exit_rows(config: ExitBench) -> list[dict]:
    """Rows of the table, one per network and batch size.

    Returns:
        ``network``, ``batch``; ``plain_ms``, ``full_ms``, ``predict_ms``, ``nobody_ms``: milliseconds per call,
        medians; ``ratio``: the full network's multiply-adds / the mean spent; ``speed_up``: full / predict;
        ``over_plain``: plain / predict; ``reached``: speed-up / ratio; ``reached_cpu``: the same in CPU time.
    """
    rows = []
    for size in config.networks:
        planted = PlantedExits(size, max(*config.batches, config.images))
        for batch in config.batches:
            calls = config.calls(batch)
            images = planted.mixture(calls * batch)
            ratio = 1 / planted.network.predict(images).cost.mean().item()
            timings = take_turns(planted.cases(images, batch), rounds=size.rounds, steps=config.steps, warm_up=1)
            rows.append({"network": str(size), "batch": batch, **_row(timings, calls, ratio)})
    return rows


def _row(timings: dict[str, Timing], calls: int, ratio: float) -> dict[str, float]:
    wall = {name: timing.median for name, timing in timings.items()}
    cpu = {name: statistics.median(timing.cpu) for name, timing in timings.items()}
    return {
        **{f"{name}_ms": 1e3 * seconds / calls for name, seconds in wall.items()},
        "ratio": ratio,
        "speed_up": wall["full"] / wall["predict"],
        "over_plain": wall["plain"] / wall["predict"],
        "reached": wall["full"] / wall["predict"] / ratio,
        "reached_cpu": cpu["full"] / cpu["predict"] / ratio,
    }
