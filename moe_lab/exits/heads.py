"""Inference modules made from the shapes of blocks' outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from moe_lab.exits.checks import describe
from moe_lab.modes import evaluating
from moe_lab.names import check_name


class Token(nn.Module):
    """(N, S, D) -> (N, D): the "class" token (the first), or the "mean" of all."""

    def __init__(self, kind: str = "class"):
        super().__init__()
        check_name("token", kind, ("class", "mean"))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, D) -> (N, D)."""
        return x[:, 0] if self.kind == "class" else x.mean(1)

    def extra_repr(self) -> str:
        """The kind."""
        return self.kind


def _pooling(h: object, index: int, token: str) -> list[nn.Module]:
    """From a block's output to features (N, D)."""
    if isinstance(h, Tensor) and h.is_floating_point():
        if h.ndim == 2:
            return []
        if h.ndim == 3:
            return [Token(token), nn.LayerNorm(h.shape[2], device=h.device, dtype=h.dtype)]
        if h.ndim == 4:
            return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    raise ValueError(
        f"no inference module is known for the output of blocks[{index}], {describe(h)}: it must be a float tensor "
        "(N, C, H, W), (N, S, D) or (N, D). Wrap the block so that it returns one, or make its head by hand"
    )


@torch.no_grad()
def linear_heads(
    blocks: Sequence[nn.Module],
    stem: nn.Module | None,
    example: Tensor,
    n_classes: int,
    *,
    token: str = "class",
    generator: torch.Generator | None = None,
) -> list[nn.Module]:
    """An inference module behind each block: pooling by the shape of its output, then a linear layer.

    Args:
        blocks: those that need a head; leave the last block out if the model's own classifier serves there.
        stem: before them; None: nothing.
        example: (n, ...) an input.
        n_classes: K.
        token: what is read of (N, S, D): the "class" token (the first), or the "mean".
        generator: for the weights, U(-1/sqrt(D), 1/sqrt(D)); biases 0.

    Returns:
        One module per block: (N, C, H, W) -> mean over positions, linear; (N, S, D) -> token, LayerNorm (a pre-norm
        transformer's blocks return sums of any size), linear; (N, D) -> linear. Channels must come second: a block that
        returns (N, H, W, C) needs its head by hand.

    Raises:
        ValueError: a block that returns something else, by its number.
    """
    check_name("token", token, ("class", "mean"))
    heads, owned = [], nn.ModuleList([*blocks] if stem is None else [stem, *blocks])
    with evaluating(owned):
        h = example if stem is None else stem(example)
        for index, block in enumerate(blocks):
            h = block(h)
            pooling = _pooling(h, index, token)
            width = h.shape[1] if h.ndim != 3 else h.shape[2]
            linear = skip_init(nn.Linear, width, n_classes, device=h.device, dtype=h.dtype)
            start = torch.empty(linear.weight.shape, device="cpu" if generator is None else generator.device)
            linear.weight.copy_(start.uniform_(-(width**-0.5), width**-0.5, generator=generator))
            linear.bias.zero_()
            heads.append(nn.Sequential(*pooling, linear))
    return heads
