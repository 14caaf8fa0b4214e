"""An encoder run layer by layer: every hidden state, every Routing.

Legend: B batch, S sequence, D width, L layers.

    H_0 = embeddings;    A_l = attention block of H_(l-1);    H_l = feed-forward block, or mixture, of A_l

The same walk for teacher and student, so that distillation compares like with like. It says in one place what a mixture
needs and `transformers`' own ``forward`` would not hand down: token ids (hash gates) and which tokens are real. For an
encoder without mixtures it gives what ``encoder(..., output_hidden_states=True)`` gives; a test compares them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from moe_lab.bert.encoder import longest_sequence
from moe_lab.routing import Routing


class Trace(NamedTuple):
    """What happened on the way: hidden (L + 1 tensors (B, S, D), embeddings first), routings (of mixtures, upwards)."""

    hidden: list[Tensor]
    routings: list[Routing]


def trace(encoder: nn.Module, tokens: Tensor, seen: Tensor, segments: Tensor | None = None) -> Trace:
    """Run an encoder of `check_layout`'s shape; a layer with a ``mixture`` runs that.

    Args:
        encoder: with or without mixtures.
        tokens: (B, S) ids.
        seen: (B, S) bool, True at real tokens.
        segments: (B, S) 0 or 1: first or second text; None: one text.

    Raises:
        ValueError: S is above the encoder's limit.
    """
    if tokens.shape[1] > (limit := longest_sequence(encoder)):
        raise ValueError(f"{tokens.shape[1]} tokens, but the encoder has {limit} positions: cut the texts")
    if encoder.config._attn_implementation != "sdpa":  # an eager one would *add* the boolean mask
        encoder.set_attn_implementation("sdpa")
    if encoder.config.type_vocab_size < 2:  # RoBERTa was not told which text a token belongs to
        segments = None
    x = encoder.embeddings(input_ids=tokens, token_type_ids=segments)
    mask = seen[:, None, None, :]
    hidden, routings = [x], []
    for layer in encoder.encoder.layer:
        attended = layer.attention(x, mask)[0]
        if hasattr(layer, "mixture"):
            x, routing = layer.mixture(attended, tokens, seen)
            routings.append(routing)
        else:
            x = layer.output(layer.intermediate(attended), attended)
        hidden.append(x)
    return Trace(hidden, routings)
