"""What every body with early exits is: a stem, blocks, a pooling per exit, one head (JEI-DNN, section 3).

Legend: N images, L blocks = exits, D_l features at exit l, D the widest of them, K classes.

    h_0 = stem(x);    h_l = blocks_l(h_{l-1});    features_l = pools_l(h_l), (N, D_l);    logits = head(features_L)

An inference module at exit l < L is a linear layer on features_l; the last one is the body's own head. A vision
transformer shares one norm over all exits (as the authors do), a convolutional network pools each exit by itself.

Widths may grow from exit to exit. `ExitBody.features` pads the narrow ones with zeros: one tensor (N, L, D) is what
trains the inference modules of all exits and all prices in one batched product (`exits.joint`). Padding changes
nothing: a column of zeros adds 0 to every logit and gets no gradient. `ExitBody.linears` cuts it off again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import skip_init

from moe_lab.modes import evaluating


def check_images(x: Tensor, channels: int, side: int) -> None:
    """ValueError unless x is (N, channels, side, side)."""
    if tuple(x.shape[1:]) != (channels, side, side):
        raise ValueError(
            f"this body takes images (N, {channels}, {side}, {side}), got {tuple(x.shape)}: resize them, or build it "
            "with other `channels` and `side`"
        )


class ExitBody(nn.Module):
    """Stem, blocks, poolings, head.

    Args:
        stem: images -> what the first block takes.
        blocks: L modules; an exit can be put behind each.
        pool: output of a block -> (N, D_l). One module for all exits, or L of them.
        head: linear layer on the last exit's features.
        widths: D_l per exit; default: that of the head everywhere.

    Raises:
        ValueError: numbers of poolings or widths that do not fit, a head of another width.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Iterable[nn.Module],
        pool: nn.Module | Sequence[nn.Module],
        head: nn.Linear,
        widths: Sequence[int] | None = None,
    ):
        super().__init__()
        self.stem, self.blocks = stem, nn.ModuleList(blocks)
        self.pool = pool if isinstance(pool, nn.Module) else nn.ModuleList(pool)
        self.head = head
        n_exits = len(self.blocks)
        self.widths = (head.in_features,) * n_exits if widths is None else tuple(widths)
        if len(self.pools) != n_exits or len(self.widths) != n_exits or not n_exits:
            raise ValueError(
                f"{n_exits} blocks (at least 1) need as many poolings and widths, got {len(self.pools)} and "
                f"{len(self.widths)}"
            )
        if head.in_features != self.widths[-1]:
            raise ValueError(f"the head reads {head.in_features} features, the last exit has {self.widths[-1]}")

    @property
    def pools(self) -> list[nn.Module]:
        """L modules, output of block l -> (N, D_l); L times the same one where it is shared."""
        return list(self.pool) if isinstance(self.pool, nn.ModuleList) else [self.pool] * len(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.pools[-1](h))

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, L, D): pooled features behind every block, zeros from D_l on; eval mode, no gradient.

        Raises:
            ValueError: a pooling that does not give (N, D_l).
        """
        widest, found = max(self.widths), []
        with evaluating(self):
            h = self.stem(x)
            for index, (block, pool, width) in enumerate(zip(self.blocks, self.pools, self.widths, strict=True)):
                h = block(h)
                pooled = pool(h)
                if pooled.shape != (len(x), width):
                    raise ValueError(f"pools[{index}] gives {tuple(pooled.shape)} instead of {(len(x), width)}")
                found.append(pooled if width == widest else pad(pooled, (0, widest - width)))
        return torch.stack(found, 1)

    def linears(self, weight: Tensor, bias: Tensor) -> list[nn.Linear]:
        """The linear layers that were trained on padded features, without the padding.

        Args:
            weight: (L - 1, D, K), of one run of `exits.joint.JointExits`.
            bias: (L - 1, K).

        Returns:
            L - 1 layers D_l -> K, for `exit_heads`; copies.
        """
        expected = (len(self.blocks) - 1, max(self.widths), bias.shape[-1])
        if tuple(weight.shape) != expected or tuple(bias.shape) != expected[::2]:
            raise ValueError(
                f"weight must be (L - 1, D, K) = {expected} and bias (L - 1, K), got {tuple(weight.shape)} and "
                f"{tuple(bias.shape)}"
            )
        layers = []
        for w, b, width in zip(weight.detach(), bias.detach(), self.widths[:-1], strict=True):
            layer = skip_init(nn.Linear, width, len(b), device=w.device, dtype=w.dtype)
            layer.load_state_dict({"weight": w[:width].T, "bias": b})
            layers.append(layer)
        return layers

    def exit_heads(self, linears: Sequence[nn.Module]) -> list[nn.Module]:
        """L inference modules for `exits.MultiExitNetwork`: pooling and linear layer, the last the body's own head.

        Args:
            linears: L - 1 modules, features (N, D_l) -> logits (N, K).

        Raises:
            ValueError: another number of them, or a linear layer of another width.
        """
        if len(linears) != len(self.blocks) - 1:
            raise ValueError(
                f"{len(self.blocks)} exits need {len(self.blocks) - 1} linear layers (the last has the body's head), "
                f"got {len(linears)}"
            )
        for index, (linear, width) in enumerate(zip(linears, self.widths, strict=False)):
            if isinstance(linear, nn.Linear) and linear.in_features != width:
                raise ValueError(f"linears[{index}] reads {linear.in_features} features, exit {index} has {width}")
        return [nn.Sequential(*pair) for pair in zip(self.pools, (*linears, self.head), strict=True)]
