"""A small vision transformer as a sequence of blocks, so that exits can be put behind each.

Legend: N images, C channels, P patch side, S tokens (patches and one class token), D width, K classes.

    stem: patches -> tokens, class token in front, + learned positions;   blocks: pre-norm attention and feed-forward
    head of exit l: linear(norm(class token)), the norm shared by all exits
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lab.models.transformer import Attention, FeedForward
from moe_lab.modes import evaluating


class PatchStem(nn.Module):
    """Images (N, C, H, W) -> tokens (N, S, D).

    Args:
        side: H = W, divisible by ``patch``.
        channels: C.
        patch: P.
        width: D.
    """

    def __init__(self, side: int, channels: int, patch: int, width: int):
        super().__init__()
        if side % patch:
            raise ValueError(f"patches of {patch} do not tile a side of {side}")
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.empty(1, 1, width).normal_(0.0, 0.02))
        self.position = nn.Parameter(torch.empty(1, (side // patch) ** 2 + 1, width).normal_(0.0, 0.02))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, S, D)."""
        patches = self.project(x).flatten(2).transpose(1, 2)
        return torch.cat((self.token.expand(len(x), -1, -1), patches), 1) + self.position


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); (N, S, D) -> (N, S, D)."""

    def __init__(self, width: int, heads: int, ratio: int = 2, dropout: float = 0.0):
        super().__init__()
        self.attention_norm, self.forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width, ratio * width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, D) -> (N, S, D)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.forward_norm(x))


class ClassToken(nn.Module):
    """norm(class token): (N, S, D) -> (N, D); the features that every inference module sees."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, D) -> (N, D)."""
        return self.norm(x[:, 0])


class VisionTransformer(nn.Module):
    """Stem, blocks, head.

    Args:
        side, channels, patch, width: of the stem.
        layers: number of blocks.
        heads, ratio, dropout: of a block.
        n_classes: K.
    """

    def __init__(
        self,
        *,
        side: int,
        channels: int,
        n_classes: int,
        patch: int = 4,
        width: int = 48,
        layers: int = 6,
        heads: int = 4,
        ratio: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.stem = PatchStem(side, channels, patch, width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, ratio, dropout) for _ in range(layers))
        self.pool = ClassToken(nn.LayerNorm(width))
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.pool(h))

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, L, D): the normalised class token behind every block, in eval mode."""
        with evaluating(self):
            h, found = self.stem(x), []
            for block in self.blocks:
                h = block(h)
                found.append(self.pool(h))
        return torch.stack(found, 1)
