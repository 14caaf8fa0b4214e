"""A small pre-norm transformer; any block may have a mixture of experts in place of its feed-forward layer.

Legend: B batch, S sequence, M memory (another sequence), T tokens (those of a batch that are not padding), D width, H
heads, F hidden width of a feed-forward layer, E experts.

    x = x + Attention(norm(x)) [+ Attention(norm(x), memory)];   x = x + FeedForward(norm(x))

with FeedForward(x) = gelu(x W_1 + b_1) W_2 + b_2, or sum_e g_e(x) FeedForward_e(x) in every ``moe_every``-th block (the
second, fourth, ... for 2, as in EvoMoE's scripts). Experts are as large as the layer they replace; dropout is inside
them.

Padding is not routed: it would take places at experts, count in losses, and distort every statistic. The residual
connection is outside the mixture, so a token that an expert of limited capacity drops is carried on unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from moe_lab.experts import MLPExperts, MoE
from moe_lab.routing import Routing

GateFactory = Callable[[int], nn.Module]
"""Index of the MoE layer -> its gate over D features."""


class Attention(nn.Module):
    """Multi-head attention, to itself or to a memory.

    Args:
        width: D, divisible by ``heads``.
        heads: H.
        dropout: of attention weights, in training.
        causal: position s sees positions up to s.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, causal: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """x (B, S, D), memory (B, M, D) or None (x itself), seen (B, M) bool: real positions -> (B, S, D)."""

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query = split(self.query(x))
        key, value = (split(y) for y in self.key_value(x if memory is None else memory).chunk(2, -1))
        mask = None if seen is None else seen[:, None, None, :]
        causal = self.causal
        if mask is not None and causal:
            length = x.shape[1]
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            causal = False
        dropout = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """One expert for everybody: gelu(x W_1 + b_1) W_2 + b_2 with dropout on the hidden layer."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.layers(x)


class MixtureFeedForward(nn.Module):
    """A mixture of feed-forward experts on the real tokens of a batch.

    Args:
        gate: over D features; called with what its ``gate_input`` asks for.
        width, hidden, dropout: of an expert.
        generator: for the experts' initial weights.
    """

    def __init__(
        self,
        gate: nn.Module,
        width: int,
        hidden: int,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        experts = MLPExperts(
            gate.n_experts,
            (width, hidden, width),
            activation="gelu",
            activate_last=False,
            dropout=dropout,
            generator=generator,
        )
        self.moe = MoE(gate, experts)

    def forward(self, x: Tensor, keys: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Run the mixture on the tokens that are real.

        Args:
            x: (B, S, D).
            keys: (B, S) token ids.
            seen: (B, S) bool, True at real tokens; None: all are.

        Returns:
            y (B, S, D), 0 at padding, and the Routing of the T real tokens.
        """
        real = None if seen is None else seen.flatten().nonzero().squeeze(1)
        tokens, ids = x.flatten(0, 1), keys.flatten()
        if real is not None:
            tokens, ids = tokens.index_select(0, real), ids.index_select(0, real)
        kind = getattr(self.moe.gate, "gate_input", "features")
        asked = {"features": tokens, "keys": ids, "features and keys": (tokens, ids)}[kind]
        y, routing = self.moe(tokens, asked)
        if real is not None:
            y = y.new_zeros(x.shape[0] * x.shape[1], y.shape[1]).index_copy(0, real, y)
        return y.view(x.shape), routing


class Block(nn.Module):
    """Self-attention, perhaps attention to a memory, then a feed-forward layer or a mixture, each with norm and
    residual.

    Args:
        width, heads, hidden, dropout: sizes; dropout also behind each sub-layer.
        causal: of the self-attention.
        cross: attend to a memory too.
        gate: None for a plain feed-forward layer.
        generator: for the experts' initial weights.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float = 0.0,
        *,
        causal: bool = False,
        cross: bool = False,
        gate: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.attention_norm, self.forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, causal)
        self.cross_norm = nn.LayerNorm(width) if cross else None
        self.cross_attention = Attention(width, heads, dropout) if cross else None
        self.mixture = None if gate is None else MixtureFeedForward(gate, width, hidden, dropout, generator)
        self.feed_forward = FeedForward(width, hidden, dropout) if gate is None else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        seen: Tensor | None = None,
        memory: Tensor | None = None,
        memory_seen: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x (B, S, D), keys (B, S), seen (B, S) bool, memory (B, M, D), memory_seen (B, M) -> x, Routing or None."""
        x = x + self.dropout(self.attention(self.attention_norm(x), seen=seen))
        if self.cross_attention is not None:
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), memory, memory_seen))
        inside, routing = self.forward_norm(x), None
        if self.mixture is not None:
            y, routing = self.mixture(inside, keys, seen)
        else:
            y = self.feed_forward(inside)
        return x + self.dropout(y.to(x.dtype)), routing


class Transformer(nn.Module):
    """A stack of blocks with a norm at the end.

    Args:
        layers: number of blocks.
        width, heads, hidden, dropout, causal, cross: see `Block`.
        moe_every: a mixture in every m-th block; 0: nowhere.
        make_gate: index of the mixture (0, 1, ...) -> gate; needed if ``moe_every``.
        generator: for the initial weights of experts.

    Raises:
        ValueError: ``moe_every`` without ``make_gate``, or more than there are layers.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        hidden: int,
        dropout: float = 0.0,
        *,
        causal: bool = False,
        cross: bool = False,
        moe_every: int = 0,
        make_gate: GateFactory | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if moe_every and make_gate is None:
            raise ValueError("moe_every needs make_gate, which makes the gate of each mixture")
        if moe_every > layers:
            raise ValueError(f"moe_every={moe_every} puts no mixture into {layers} layers; 0 says so on purpose")
        has_mixture = [bool(moe_every) and (index + 1) % moe_every == 0 for index in range(layers)]
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                hidden,
                dropout,
                causal=causal,
                cross=cross,
                gate=make_gate(sum(has_mixture[:index])) if has_mixture[index] else None,
                generator=generator,
            )
            for index in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    @property
    def mixtures(self) -> list[MixtureFeedForward]:
        """Those blocks' mixtures, from the bottom up."""
        return [block.mixture for block in self.blocks if block.mixture is not None]

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        seen: Tensor | None = None,
        memory: Tensor | None = None,
        memory_seen: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """As `Block`; the Routings of all mixtures from the bottom up."""
        routings = []
        for block in self.blocks:
            x, routing = block(x, keys, seen, memory, memory_seen)
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings
