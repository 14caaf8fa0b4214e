"""A network whose images say where they leave, for `gpu_exits`: real work, known answers, any distribution of exits.

Nothing is trained. Each image carries the exit where it shall leave: the stem makes it the first feature of the class
token (the next two are 1 and 0), which no block changes, and the gate behind block l opens for images whose number is
at most l. What is planted is far from every threshold, so that the exits are the same in bfloat16 and
whatever the order of sums. Blocks, tokens and the other nine classes are random. Exits are drawn from shares
proportional to rho^k, with the rho that gives the wanted ratio of multiply-adds, and the images that are timed are not
those that `FastPredictor` learns from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lab.exits import ExitGates, MultiExitNetwork, exit_costs
from moe_lab.exits.policies import geometric_shares
from moe_lab.models.vit import PatchStem, VisionTransformer

_SURE = 64.0  # class 0's logit per exit that an image has still to go, before the norm


@dataclass(frozen=True)
class Size:
    """Of a vision transformer with an exit behind every block, see `VisionTransformer`."""

    layers: int = 8
    width: int = 256
    side: int = 32
    patch: int = 4
    heads: int = 4
    n_classes: int = 10

    def __post_init__(self) -> None:
        if self.layers < 2 or self.n_classes < 3 or self.width < 16:
            raise ValueError(f"planted exits need at least 2 layers, 3 classes and width 16, got {self}")


TINY = Size(layers=4, width=32, side=8)  # for a dry run


class PlantedStem(nn.Module):
    """The stem; the class token's first three features are the image's first pixel, 1 and 0.

    The first pixel is made a patch of its own, the class token's, and the first pixel of any patch goes to the first
    feature, and only there: what is planted passes through the product of all patches and costs nothing more.

    Args:
        stem: is changed.
    """

    def __init__(self, stem: PatchStem):
        super().__init__()
        self.stem = stem
        with torch.no_grad():
            weight = stem.project.weight.flatten(1)  # a view
            weight[:, 0], weight[0] = 0, 0
            weight[0, 0] = 1
            stem.position[0, 0, :3] = 0
            stem.token[0, 0, :3] = torch.tensor([0.0, 1.0, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, S, D)."""
        patches = self.stem.patches(x)
        patches[:, 0, 0] = x[:, 0, 0, 0]  # zero until now
        return self.stem.embed(patches)


def rho_of(ratio: float, costs: Tensor) -> float:
    """rho for which shares of `geometric_shares` cost 1 / ratio of the whole network; by bisection.

    Raises:
        ValueError: a ratio that no rho gives.
    """
    low, high = 1e-6, 1e6  # all at the first exit, all at the last
    for _ in range(200):
        middle = (low * high) ** 0.5
        spent = float((geometric_shares(middle, len(costs)) * costs).sum())
        low, high = (middle, high) if spent < 1 / ratio else (low, middle)
    if abs(spent * ratio - 1) > 1e-3:
        raise ValueError(f"no distribution of exits gives the ratio {ratio}: it is between 1 and {1 / costs[0]:.3g}")
    return middle


class PlantedNetwork:
    """See the module's text.

    Args:
        size: of the network.
        ratio: wanted multiply-adds of the whole network / mean spent.
        device, dtype: of blocks and heads; gates and costs stay as exact as they are.
        seed: of weights.

    Attributes:
        network: a `MultiExitNetwork`, exit model "direct".
        full: stem, blocks and last head.
        shares: (L,) of the exits.
    """

    def __init__(self, size: Size, ratio: float, device: torch.device | str, dtype: torch.dtype, seed: int = 0):
        torch.manual_seed(seed)
        sizes = {"side": size.side, "patch": size.patch, "width": size.width, "heads": size.heads}
        body = VisionTransformer(channels=1, n_classes=size.n_classes, layers=size.layers, **sizes).eval()
        heads = body.exit_heads([nn.Linear(size.width, size.n_classes) for _ in range(size.layers - 1)])
        stem, gates = PlantedStem(body.stem), ExitGates(size.layers - 1)
        with torch.no_grad():
            for block in body.blocks:
                for linear in (block.attention.out, block.feed_forward.layers[-1]):
                    linear.weight[:3], linear.bias[:3] = 0, 0  # the planted features pass unchanged
            for index, head in enumerate(heads):
                head[-1].weight[:, :3] = 0
                head[-1].weight[0] = 0
                # Sure of class 0 as long as the image has to go further, torn between the others from then on. The
                # weights add up to 0: what the norm subtracts from all features does not count.
                head[-1].weight[0, :3] = _SURE * torch.tensor([1.0, -index - 0.5, index - 0.5])
            gates.weight.copy_(torch.tensor([-100.0, 0, 0, 0]).expand_as(gates.weight))
            gates.bias.fill_(80.0)
        example = torch.zeros(1, 1, size.side, size.side)
        costs = exit_costs(body.blocks, heads, example, size.n_classes, stem=stem)
        self.shares = geometric_shares(rho_of(ratio, costs / costs[-1]), size.layers)
        pieces = nn.ModuleList([stem, *body.blocks, *heads]).to(device, dtype)
        network = MultiExitNetwork(list(pieces[1 : size.layers + 1]), list(pieces[size.layers + 1 :]), gates, stem=stem)
        network.register_buffer("costs", costs / costs[-1])
        self.network = network.eval()
        network.gates.to(device)
        network.costs = network.costs.to(device)
        self.full = nn.Sequential(stem, *body.blocks, heads[-1]).eval()
        self.side, self.device, self.dtype = size.side, device, dtype

    def images(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """(n, 1, side, side) images with exits drawn from the shares, and these, (n,) int64 on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        exits = torch.multinomial(self.shares, n, replacement=True, generator=generator)
        x = torch.randn(n, 1, self.side, self.side, generator=generator)
        x[:, 0, 0, 0] = exits.float()
        return x.to(self.device, self.dtype), exits
