"""Masked language modelling: which tokens are hidden, and what stands in their place (Devlin et al. 2019, "BERT").

Legend: B batch, S sequence, u, v ~ U(0, 1) one draw of each per token.

    chosen     u < share, and in every row the token with the smallest u; never a special one (padding, <s>, </s>, ...)
    inputs     of chosen tokens: <mask> if v < 0.8; a random token if 0.8 <= v < 0.9; else the token itself
    targets    the token where chosen, `IGNORE` (what PyTorch's cross entropy leaves out) elsewhere

A random token is drawn from all that are not special, so now and then it is the one that was there. The smallest u
gives every row a target: short rows have more than ``share`` of theirs hidden, share + (1 - share)^n / n of n tokens.

The masks are drawn anew for each batch ("dynamic", Liu et al. 2019), not once per corpus.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.datasets.tokens import MASK, SPECIAL

IGNORE = -100
HIDDEN, REPLACED = 0.8, 0.1
"""Shares of the chosen tokens that become <mask> and a random token; the rest stays."""


def masked(tokens: Tensor, *, n_tokens: int, share: float = 0.15, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hide a share of the tokens.

    Args:
        tokens: (B, S) int64, S >= 1, on any device; left as it is.
        n_tokens: V, size of the vocabulary, special ids included.
        share: of each row's real tokens that become targets, in (0, 1]; at least one per row that has any.
        generator: of all draws, on whatever device: the same state gives the same masks wherever ``tokens`` are. Its
            advance depends on the shape only.

    Returns:
        inputs and targets, both (B, S) int64 on the device of ``tokens``.

    Raises:
        ValueError: share outside (0, 1], a vocabulary of special ids only, or tokens that are not (B, S) with S >= 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    if n_tokens <= len(SPECIAL):
        raise ValueError(f"n_tokens = {n_tokens}: the first {len(SPECIAL)} ids are special, nothing is left to mask")
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise ValueError(f"tokens must be (rows, tokens) with one token or more per row, got {tuple(tokens.shape)}")

    def uniform() -> Tensor:
        return torch.rand(tokens.shape, generator=generator, device=generator.device).to(tokens.device)

    u, v = uniform(), uniform()
    other = torch.randint(len(SPECIAL), n_tokens, tokens.shape, generator=generator, device=generator.device)

    maskable = tokens >= len(SPECIAL)
    u = u.masked_fill(~maskable, 1.0)
    chosen = maskable & ((u < share) | (u == u.amin(1, keepdim=True)))
    inputs = tokens.masked_fill(chosen & (v < HIDDEN), MASK)
    is_replaced = chosen & (v >= HIDDEN) & (v < HIDDEN + REPLACED)
    inputs = torch.where(is_replaced, other.to(tokens.device), inputs)
    return inputs, tokens.masked_fill(~chosen, IGNORE)
