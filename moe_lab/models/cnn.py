"""A small residual network as a sequence of blocks, so that exits can be put behind each.

Legend: N images, C channels of an image, c_s channels of stage s (halved sides between stages), K classes.

    stem: 3x3 convolution, norm, relu
    block: relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))           (He et al., CVPR 2016, figure 2)
    features of exit l: mean over positions, (N, c_s);   logits = linear(features of the last)

Norm: BatchNorm inside the blocks. The body is trained whole with batches of hundreds, then frozen; frozen and in eval
mode (`MultiExitNetwork(freeze_backbone=True)` keeps it there) a BatchNorm is a fixed scale and shift, so an image's
features do not depend on the images beside it, also where all others have left the batch.

Where we differ from later variants: norm and relu come *before* the exit, not after it (no pre-activation). An exit
behind a pre-activation block needs a norm of its own, whose running statistics nobody would train: the body's loss is
taken at its last exit only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lab.models.body import ExitBody, check_images


def _conv(d: int, f: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Convolution and norm (whose shift replaces the bias)."""
    return [nn.Conv2d(d, f, kernel, stride=stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(f)]


class ImageStem(nn.Module):
    """Images (N, C, S, S) -> (N, c_1, S, S)."""

    def __init__(self, side: int, channels: int, width: int):
        super().__init__()
        self.side, self.channels = side, channels
        self.layers = nn.Sequential(*_conv(channels, width, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, S, S) -> (N, c_1, S, S)."""
        check_images(x, self.channels, self.side)
        return self.layers(x)


class ResidualBlock(nn.Module):
    """(N, d, S, S) -> (N, f, S / stride, S / stride), not negative.

    The shortcut is x itself, or a 1x1 convolution with norm where the shape changes.
    """

    def __init__(self, d: int, f: int, stride: int = 1):
        super().__init__()
        self.layers = nn.Sequential(*_conv(d, f, 3, stride), nn.ReLU(), *_conv(f, f, 3))
        self.shortcut = nn.Identity() if d == f and stride == 1 else nn.Sequential(*_conv(d, f, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """(N, d, S, S) -> (N, f, S / stride, S / stride)."""
        return (self.shortcut(x) + self.layers(x)).relu()


class MeanOverPositions(nn.Module):
    """(N, c, S, S) -> (N, c)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, c, S, S) -> (N, c)."""
        return x.mean((2, 3))


class ConvNet(ExitBody):
    """Stem, stages of residual blocks (an exit behind every block), mean, head.

    Args:
        side: H = W, divisible by 2 once per stage after the first: every stage sees a quarter of the positions of the
            one before.
        channels: C.
        n_classes: K.
        stages: c_s, one per stage.
        blocks_per_stage: the same in all, or one number per stage; L is their sum.
        generator: for the initial weights.

    Raises:
        ValueError: a side that does not halve evenly, no stage, a stage without blocks.
    """

    def __init__(
        self,
        *,
        side: int,
        channels: int,
        n_classes: int,
        stages: Sequence[int] = (32, 64, 128),
        blocks_per_stage: int | Sequence[int] = 2,
        generator: torch.Generator | None = None,
    ):
        counts = (blocks_per_stage,) * len(stages) if isinstance(blocks_per_stage, int) else tuple(blocks_per_stage)
        if not stages or len(counts) != len(stages) or min(counts) < 1:
            raise ValueError(f"need stages and at least one block in each, got stages {stages} with {counts} blocks")
        halved = 2 ** (len(stages) - 1)
        if side % halved or side < halved:
            raise ValueError(
                f"a side of {side} does not halve evenly {len(stages) - 1} times: take a multiple of {halved}, or "
                "fewer stages"
            )
        steps = [(c, 1) for c, count in zip(stages, counts, strict=True) for _ in range(count)]
        first_of_stage = itertools.accumulate(counts[:-1])
        for index in first_of_stage:
            steps[index] = (steps[index][0], 2)
        inputs = (stages[0], *(c for c, _ in steps[:-1]))
        blocks = [ResidualBlock(d, f, stride) for d, (f, stride) in zip(inputs, steps, strict=True)]
        super().__init__(
            ImageStem(side, channels, stages[0]),
            blocks,
            [MeanOverPositions() for _ in blocks],
            nn.Linear(stages[-1], n_classes),
            [c for c, _ in steps],
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        bound = stages[-1] ** -0.5
        nn.init.uniform_(self.head.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.head.bias)
