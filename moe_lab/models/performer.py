"""Attention in linear time: the performer of T2T-ViT's token module (Choromanski et al., ICLR 2021).

Legend: N images, S tokens, d width of a token that comes in, e width inside, m random features.

With random rows w_1 .. w_m and

    phi(x)_r = exp(w_r . x - |x|^2 / 2) / sqrt(m),         E[phi(q) . phi(k)] = exp(q . k)   for w ~ N(0, I)

    y_i = sum_r phi(q_i)_r  sum_j phi(k_j)_r v_j  /  sum_r phi(q_i)_r  sum_j phi(k_j)_r

instead of y_i = sum_j softmax_j(q_i . k_j) v_j. Orthogonal rows have the same mean and less variance. We compute the
same y_i as two softmaxes, which can neither overflow nor divide by zero:

    a_rj = w_r . k_j - |k_j|^2 / 2;          slot_r = sum_j softmax_j(a_rj) v_j
    b_ir = w_r . q_i + logsumexp_j a_rj;     y_i = sum_r softmax_r(b_ir) slot_r

Read: m slots, each a mean of values; every token then reads a mean of slots. The authors add 1e-8 to the denominator
D_i, which is their guard; as a factor D_i / (D_i + 1e-8) it is more than that: a token far from all keys reads nothing.
Kept.

The authors scale m orthonormal rows by sqrt(m). Unbiased rows have lengths about sqrt(e), twice the square for their
m = e / 2. What theirs estimate is about exp(-|q - k|^2 / 4): half the logits, less for long keys, and far less noise
than 32 features of exp(q . k) would have. We keep it (their weights need it); `random_features` draws both.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn


def random_features(
    n_features: int, width: int, *, length: float | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Rows w_1 .. w_m, orthogonal to each other within every ``width`` of them.

    Args:
        n_features: m.
        width: e.
        length: of every row; None: lengths of Gaussian vectors, each row is then exactly N(0, I) and phi unbiased.
        generator: for the draw.

    Returns:
        (m, e).
    """
    blocks = torch.randn(-(-n_features // width), width, width, generator=generator)
    frames, triangles = torch.linalg.qr(blocks)
    frames = frames * triangles.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # else not uniform over rotations
    directions = frames.flatten(0, 1)[:n_features]
    if length is not None:
        return directions * length
    return directions * torch.randn(n_features, width, generator=generator).norm(dim=1, keepdim=True)


def performer_attention(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, epsilon: float = 0.0) -> Tensor:
    """Attention through random features, see the module's text.

    Args:
        query, key, value: (N, S, e).
        rows: (m, e).
        epsilon: added to the denominator; positive: 1 becomes D / (D + epsilon).

    Returns:
        (N, S, e): every row a mean of values, with positive weights that sum to 1.
    """
    written = key @ rows.T - key.square().sum(-1, keepdim=True) / 2
    slots = written.softmax(1).transpose(1, 2) @ value
    read = query @ rows.T + written.logsumexp(1, keepdim=True)
    y = read.softmax(-1) @ slots
    if not epsilon:
        return y
    log_total = read.logsumexp(-1, keepdim=True) - query.square().sum(-1, keepdim=True) / 2 - math.log(len(rows))
    return y * (log_total - math.log(epsilon)).sigmoid()


class TokenPerformer(nn.Module):
    """One step of tokens to tokens: (N, S, d) -> (N, S, e).

    Args:
        d: width of the windows.
        width: e.
        n_features: m.
        dropout: behind the attention and the feed-forward layer.
    """

    def __init__(self, d: int, width: int, n_features: int, dropout: float):
        super().__init__()
        self.norm, self.key_query_value = nn.LayerNorm(d), nn.Linear(d, 3 * width)
        self.out, self.dropout = nn.Linear(width, width), nn.Dropout(dropout)
        self.forward_norm = nn.LayerNorm(width)
        layers = (nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(dropout))
        self.feed_forward = nn.Sequential(*layers)
        self.register_buffer("rows", torch.empty(n_features, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, d) -> (N, S, e)."""
        key, query, value = self.key_query_value(self.norm(x)).chunk(3, -1)
        # Exponents of a size of 30 lose whole percents in 16 bits.
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(value.dtype, torch.float32)
            mixed = performer_attention(*(y.to(exact) for y in (query, key, value, self.rows)), epsilon=1e-8)
        x = value + self.dropout(self.out(mixed.to(value.dtype)))  # x itself has another width
        return x + self.feed_forward(self.forward_norm(x))
