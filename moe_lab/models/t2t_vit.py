"""T2T-ViT-7 and T2T-ViT-14, the bodies of JEI-DNN's experiments (Yuan et al., ICCV 2021; sizes: JEI-DNN, section 5).

Legend: N images, C channels, S tokens (without the class token), e = 64 width of the token module, m = 32 random
features, D width of the blocks, K classes.

Tokens to tokens. A soft split cuts overlapping windows out of the image and lays each out as one long token
(`unfold`); between two splits, attention with a small width lets tokens exchange what they know, and they are put back
on their grid:

    u = unfold(x), (N, S, k k C);     k, q, v = linear(norm(u)), (N, S, e) each
    t = v + out(attention(q, k, v));  x = t + mlp(norm(t)), back on the grid;      last split: linear to D

S is in the thousands, so that attention is a performer, linear in S (`models.performer`).

Then: class token, fixed sinusoidal positions, pre-norm blocks without biases of queries, keys and values.

Where we differ: no stochastic depth (0.1 in the authors' ImageNet training): for early exits the body is frozen in eval
mode, where it does nothing. The paper path to ImageNet weights: `t2t_weights.load_official`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from moe_lab.models.body import ExitBody, check_images
from moe_lab.models.performer import TokenPerformer, random_features
from moe_lab.models.vit import ClassToken, EncoderBlock

Split = tuple[int, int, int]
"""Window, stride, padding of a soft split."""

SPLITS: tuple[Split, ...] = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
"""The paper's, for 224 px: 3136, 784, 196 tokens."""

SMALL_SPLITS: tuple[Split, ...] = ((3, 2, 1), (3, 2, 1), (3, 1, 1))
"""Ours, for 32 px: 256, 64, 64 tokens (the paper's would leave 4)."""


def sinusoids(n_positions: int, width: int) -> Tensor:
    """(1, S, D): sin at even columns, cos at odd ones, of position / 10000^(2 floor(column / 2) / D)."""
    column = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(n_positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (column // 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float().unsqueeze(0)


class TokensToTokens(nn.Module):
    """Images (N, C, H, W) -> tokens (N, S + 1, D), class token first, positions added.

    Args:
        side: H = W, divisible by the product of the strides.
        channels: C.
        width: D.
        token_width: e.
        n_features: m.
        splits: soft splits, see `Split`.
        dropout: see `TokenPerformer`.
    """

    def __init__(
        self,
        side: int,
        channels: int,
        width: int,
        token_width: int,
        n_features: int,
        splits: Sequence[Split],
        dropout: float,
    ):
        super().__init__()
        self.side, self.channels, self.splits = side, channels, tuple(splits)
        if not splits:
            raise ValueError("no soft split: at least one makes the tokens")
        stride = math.prod(stride for _, stride, _ in splits)
        if side % stride or side < stride:
            raise ValueError(
                f"soft splits {self.splits} divide the side by {stride}, which {side} is not a multiple of: resize, or "
                "give other splits (SMALL_SPLITS divide by 4)"
            )
        self.sides = []
        for window, step, padding in self.splits:
            expected, side = side // step, (side + 2 * padding - window) // step + 1
            if side != expected:
                raise ValueError(
                    f"a soft split of window {window}, stride {step}, padding {padding} gives a side of {side} instead "
                    f"of {expected}: take a padding of (window - stride) / 2, rounded up"
                )
            self.sides.append(side)
        inputs = [channels] + [token_width] * (len(self.splits) - 1)
        widths = [c * window**2 for c, (window, _, _) in zip(inputs, self.splits, strict=True)]
        self.performers = nn.ModuleList(TokenPerformer(d, token_width, n_features, dropout) for d in widths[:-1])
        self.project = nn.Linear(widths[-1], width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("position", sinusoids(self.sides[-1] ** 2 + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, S + 1, D)."""
        check_images(x, self.channels, self.side)
        for index, (window, stride, padding) in enumerate(self.splits):
            tokens = unfold(x, window, padding=padding, stride=stride).transpose(1, 2)
            if index < len(self.performers):
                grid = (self.sides[index], self.sides[index])
                x = self.performers[index](tokens).transpose(1, 2).unflatten(2, grid)
        tokens = self.project(tokens)
        return torch.cat((self.token.expand(len(x), -1, -1), tokens), 1) + self.position


class T2TViT(ExitBody):
    """See the module's text and `ExitBody`.

    Args:
        side, channels, n_classes: of the images.
        width, layers, heads, ratio: D, L, attention heads, hidden width of a block in units of D.
        token_width, n_features: e and m of the token module.
        splits: its soft splits, `SPLITS` or `SMALL_SPLITS` or others.
        dropout: in the token module, in training; 0.1 in the authors' code (whose blocks have none).
        generator: for the initial weights (truncated normal, 0.02, as theirs) and random features.

    Raises:
        ValueError: a side that the splits do not divide, splits that do not tile, a width the heads do not divide.
    """

    def __init__(
        self,
        *,
        side: int,
        channels: int,
        n_classes: int,
        width: int,
        layers: int,
        heads: int,
        ratio: int,
        token_width: int = 64,
        n_features: int = 32,
        splits: Sequence[Split] = SPLITS,
        dropout: float = 0.1,
        generator: torch.Generator | None = None,
    ):
        super().__init__(
            TokensToTokens(side, channels, width, token_width, n_features, splits, dropout),
            [EncoderBlock(width, heads, ratio, qkv_bias=False) for _ in range(layers)],
            ClassToken(nn.LayerNorm(width)),
            nn.Linear(width, n_classes),
        )
        nn.init.trunc_normal_(self.stem.token, std=0.02, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, TokenPerformer):
                length = math.sqrt(min(n_features, token_width))
                module.rows.copy_(random_features(n_features, token_width, length=length, generator=generator))


def t2t_vit_7(side: int, channels: int, n_classes: int, **options) -> T2TViT:
    """D = 256, 7 blocks, 4 heads, ratio 2; options as `T2TViT`."""
    return T2TViT(
        side=side, channels=channels, n_classes=n_classes, **{**dict(width=256, layers=7, heads=4, ratio=2), **options}
    )


def t2t_vit_14(side: int, channels: int, n_classes: int, **options) -> T2TViT:
    """D = 384, 14 blocks, 6 heads, ratio 3; options as `T2TViT`."""
    return T2TViT(
        side=side, channels=channels, n_classes=n_classes, **{**dict(width=384, layers=14, heads=6, ratio=3), **options}
    )
