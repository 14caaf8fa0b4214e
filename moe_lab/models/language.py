"""The transformer's three trades: next token (GPT), hidden tokens (masked LM, then classes), another language.

Legend: B batch, S sequence, V vocabulary, D width, Y classes.

Token and position embeddings start from N(0, 0.02^2) (PyTorch's N(0, 1) for positions stalls training); the output
layer of language models is the token embedding again (weight tying).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lab.models.transformer import GateFactory, Transformer
from moe_lab.routing import Routing


@dataclass(frozen=True)
class TransformerSize:
    """Sizes of a body.

    Attributes:
        vocabulary: V.
        length: longest sequence, in tokens.
        layers, width, heads, hidden: of the stack; ``hidden`` is 4 x width as usual if None.
        dropout: everywhere.
        moe_every: a mixture in every m-th block, 0: none.
    """

    vocabulary: int
    length: int
    layers: int = 4
    width: int = 64
    heads: int = 4
    hidden: int | None = None
    dropout: float = 0.0
    moe_every: int = 2

    def __post_init__(self) -> None:
        for name in ("vocabulary", "length", "layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout}")

    @property
    def feed_forward(self) -> int:
        """F."""
        return 4 * self.width if self.hidden is None else self.hidden

    def stack(self, make_gate: GateFactory | None, generator: torch.Generator | None, **options) -> Transformer:
        """The blocks."""
        sizes = (self.layers, self.width, self.heads, self.feed_forward, self.dropout)
        return Transformer(*sizes, moe_every=self.moe_every, make_gate=make_gate, generator=generator, **options)


class Embedding(nn.Module):
    """Token plus position.

    Raises:
        ValueError (when called): a sequence longer than the model; a token id outside the vocabulary.
    """

    def __init__(self, size: TransformerSize):
        super().__init__()
        self.token = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.length, size.width)
        self.dropout = nn.Dropout(size.dropout)
        nn.init.normal_(self.token.weight, 0.0, 0.02)
        nn.init.normal_(self.position.weight, 0.0, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, S) int64 -> (B, S, D)."""
        length = tokens.shape[1]
        if length > self.position.num_embeddings:
            raise ValueError(
                f"a sequence of {length} tokens is longer than this model ({self.position.num_embeddings}): cut it, or "
                "build the model with a larger length"
            )
        return self.dropout(self.token(tokens) + self.position.weight[:length])

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), with the token embedding as output layer."""
        return hidden @ self.token.weight.T


class LanguageModel(nn.Module):
    """GPT (``causal``) or a bidirectional encoder for masked language modelling.

    Args:
        size: see `TransformerSize`.
        causal: predict from the left only.
        make_gate: index of the mixture -> gate; None needs ``size.moe_every`` 0.
        generator: for the initial weights of experts; others come from the global generator.
    """

    def __init__(
        self,
        size: TransformerSize,
        *,
        causal: bool,
        make_gate: GateFactory | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.size, self.causal = size, causal
        self.embedding = Embedding(size)
        self.body = size.stack(make_gate, generator, causal=causal)

    def forward(self, tokens: Tensor, seen: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """tokens (B, S), seen (B, S) bool (None: all real) -> logits (B, S, V), Routings."""
        hidden, routings = self.body(self.embedding(tokens), tokens, seen)
        return self.embedding.logits(hidden), routings


class Classifier(nn.Module):
    """A (pre-trained) encoder with a head on the mean of its real tokens.

    Args:
        encoder: a `LanguageModel`, bidirectional; shared, not copied.
        n_classes: Y.
    """

    def __init__(self, encoder: LanguageModel, n_classes: int):
        super().__init__()
        width = encoder.size.width
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(encoder.size.dropout))
        self.out = nn.Linear(width, n_classes)

    def forward(self, tokens: Tensor, seen: Tensor) -> tuple[Tensor, list[Routing]]:
        """tokens (B, S), seen (B, S) bool -> logits (B, Y), Routings."""
        hidden, routings = self.encoder.body(self.encoder.embedding(tokens), tokens, seen)
        mask = seen.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.out(self.head(pooled)), routings


class Translator(nn.Module):
    """Encoder and decoder with one shared vocabulary; both sides may have mixtures.

    Args:
        size: of either side.
        make_gate: index of the mixture -> gate; the encoder's come first.
        generator: for the initial weights of experts.
    """

    def __init__(
        self,
        size: TransformerSize,
        *,
        make_gate: GateFactory | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.size = size
        self.embedding = Embedding(size)
        self.encoder = size.stack(make_gate, generator)
        offset = len(self.encoder.mixtures)
        later = None if make_gate is None else lambda index: make_gate(offset + index)
        self.decoder = size.stack(later, generator, causal=True, cross=True)

    def encode(self, source: Tensor, seen: Tensor) -> tuple[Tensor, list[Routing]]:
        """source (B, M), seen (B, M) bool -> memory (B, M, D), Routings."""
        return self.encoder(self.embedding(source), source, seen)

    def decode(
        self, target: Tensor, seen: Tensor | None, memory: Tensor, memory_seen: Tensor
    ) -> tuple[Tensor, list[Routing]]:
        """target (B, S) so far, memory (B, M, D), memory_seen (B, M) -> logits (B, S, V), Routings."""
        hidden, routings = self.decoder(self.embedding(target), target, seen, memory, memory_seen)
        return self.embedding.logits(hidden), routings

    def forward(
        self, source: Tensor, source_seen: Tensor, target: Tensor, target_seen: Tensor
    ) -> tuple[Tensor, list[Routing]]:
        """Teacher forcing: logits (B, S, V) of the token after each target position, Routings of both sides."""
        memory, first = self.encode(source, source_seen)
        logits, second = self.decode(target, target_seen, memory, source_seen)
        return logits, first + second
