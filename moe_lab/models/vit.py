"""A small vision transformer as a sequence of blocks, so that exits can be put behind each.

Legend: N images, C channels, P patch side, S tokens (patches and one class token), D width, K classes.

    stem: patches -> tokens, class token in front, + learned positions;   blocks: pre-norm attention and feed-forward
    head of exit l: linear(norm(class token)), the norm shared by all exits
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from moe_lab.models.body import ExitBody, check_images
from moe_lab.models.transformer import Attention, FeedForward


class PatchStem(nn.Module):
    """Images (N, C, H, W) -> tokens (N, S, D).

    On CUDA all patches are rows of one matrix product: a convolution with stride P converts layouts before and after
    its kernel, and bias, class token and positions each pass over everything again. On a CPU it stays the convolution:
    the product rounds differently, and results were recorded there. The product multiplies the class token's row too
    (1/S more operations), and hooks on ``project`` see nothing of it.

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
        self.side, self.channels = side, channels
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.empty(1, 1, width).normal_(0.0, 0.02))
        self.position = nn.Parameter(torch.empty(1, (side // patch) ** 2 + 1, width).normal_(0.0, 0.02))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, S, D)."""
        check_images(x, self.channels, self.side)
        if x.is_cuda:
            return self.embed(self.patches(x))
        patches = self.project(x).flatten(2).transpose(1, 2)
        return torch.cat((self.token.expand(len(x), -1, -1), patches), 1) + self.position

    def patches(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, S, C P P): zeros for the class token, then pixels, channel by channel, row by row."""
        n, patch = len(x), self.project.kernel_size[0]
        rows = self.side // patch
        x = x.reshape(n, self.channels, rows, patch, rows, patch).permute(0, 2, 4, 1, 3, 5)
        return pad(x.reshape(n, rows * rows, self.channels * patch * patch), (0, 0, 1, 0))

    def embed(self, patches: Tensor) -> Tensor:
        """(N, S, C P P) -> (N, S, D). The class token is a row like the others: nothing as large as h is joined."""
        bias = self.project.bias.expand(1, patches.shape[1] - 1, -1)
        return linear(patches, self.project.weight.flatten(1)) + (torch.cat((self.token, bias), 1) + self.position)


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); (N, S, D) -> (N, S, D).

    Args:
        width, heads: D, and heads of the attention.
        ratio: hidden width of the feed-forward layer, in units of D.
        dropout: on the hidden layer.
        qkv_bias: biases of queries, keys and values; T2T-ViT has none.
    """

    def __init__(self, width: int, heads: int, ratio: int = 2, dropout: float = 0.0, qkv_bias: bool = True):
        super().__init__()
        self.attention_norm, self.forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width, ratio * width, dropout)
        if not qkv_bias:
            for linear in (self.attention.query, self.attention.key_value):
                linear.register_parameter("bias", None)

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


class VisionTransformer(ExitBody):
    """See `ExitBody`; the norm (`pool`) is shared by all exits.

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
        super().__init__(  # arguments are made in this order, so that a seed gives the same weights for ever
            PatchStem(side, channels, patch, width),
            [EncoderBlock(width, heads, ratio, dropout) for _ in range(layers)],
            ClassToken(nn.LayerNorm(width)),
            nn.Linear(width, n_classes),
        )
