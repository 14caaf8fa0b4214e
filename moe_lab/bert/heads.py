"""What stands on an encoder: a label for a sentence (GLUE), or the place of an answer (SQuAD).

Legend: B batch, S sequence, D width, Y classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_lab.bert.trace import Trace, trace
from moe_lab.names import check_name

POOLS = ("cls", "mean")
_FAR_BELOW = -1e4  # a logit of probability 0 that is finite in float16


class Answer(NamedTuple):
    """logits (B, Y), or (B, 2, S) for start and end; and how it came about."""

    logits: Tensor
    trace: Trace


def _linear(encoder: nn.Module, n_out: int, generator: torch.Generator | None) -> nn.Linear:
    layer = nn.Linear(encoder.config.hidden_size, n_out)
    with torch.no_grad():  # as BERT starts its own heads
        layer.weight.normal_(0, encoder.config.initializer_range, generator=generator)
        layer.bias.zero_()
    return layer


class SentenceClassifier(nn.Module):
    """Pooled hidden states, dropout, a linear layer.

    Args:
        encoder: of `load_encoder`, `tiny_encoder` or `become_mixture`.
        n_classes: Y; 1 for a regression.
        pool: "cls": BERT's pooler, tanh(W h_0 + b) of the first token; "mean": mean over real tokens (MiniLM).
        dropout: of the pooled state; None: the encoder's.
        generator: for the head's initial weights.

    Raises:
        ValueError: "cls" with an encoder that has no pooler.
    """

    def __init__(
        self,
        encoder: nn.Module,
        n_classes: int,
        pool: str = "cls",
        dropout: float | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        check_name("pool", pool, POOLS)
        if pool == "cls" and getattr(encoder, "pooler", None) is None:
            raise ValueError("this encoder has no pooler: use pool='mean'")
        self.encoder, self.pool, self.n_classes = encoder, pool, n_classes
        self.dropout = nn.Dropout(encoder.config.hidden_dropout_prob if dropout is None else dropout)
        self.head = _linear(encoder, n_classes, generator)

    def forward(self, tokens: Tensor, seen: Tensor, segments: Tensor | None = None) -> Answer:
        """Arguments as in `trace` -> logits (B, Y)."""
        found = trace(self.encoder, tokens, seen, segments)
        last = found.hidden[-1]
        if self.pool == "cls":
            pooled = self.encoder.pooler(last)
        else:
            share = (seen / seen.sum(1, keepdim=True).clamp(min=1)).to(last.dtype)
            pooled = (share.unsqueeze(1) @ last).squeeze(1)
        return Answer(self.head(self.dropout(pooled)), found)


class SpanFinder(nn.Module):
    """Start and end of the answer in a text: two logits per token (SQuAD).

    Args:
        encoder: see `SentenceClassifier`.
        generator: for the head's initial weights.
    """

    def __init__(self, encoder: nn.Module, generator: torch.Generator | None = None):
        super().__init__()
        self.encoder = encoder
        self.head = _linear(encoder, 2, generator)

    def forward(self, tokens: Tensor, seen: Tensor, segments: Tensor | None = None) -> Answer:
        """Arguments as in `trace` -> logits (B, 2, S); padding has probability 0."""
        found = trace(self.encoder, tokens, seen, segments)
        logits = self.head(found.hidden[-1]).transpose(1, 2)
        return Answer(logits.masked_fill(~seen.unsqueeze(1), _FAR_BELOW), found)
