"""From an answer's characters to tokens, and from start and end logits back to text. Pure functions.

Legend: B rows, S tokens, position 0 the [CLS] token, which stands for "no answer".

Training targets. A window of tokens shows a part of the context. The target is the smallest run of context tokens that
covers the answer; (0, 0) if there is no answer or the window does not show all of it.

Decoding (Devlin et al., BERT, 2019, section 4.3). With start and end logits s, e:

    best = max s_i + e_j   over context tokens i <= j < i + max_length        null = s_0 + e_0
    no answer  <=>  null - best > threshold

The threshold is 0 by default; one that is chosen must be chosen on validation questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_ANSWER = (0, 0)
Offsets = Sequence[tuple[int, int]]
"""Per token: its first character and the place after its last one, in the text that it comes from."""


def token_span(offsets: Offsets, is_context: Sequence[bool], answer: tuple[int, int] | None) -> tuple[int, int]:
    """First and last token of an answer.

    A token that the answer enters or leaves half-way belongs to it as a whole. Tokens without characters do not count.

    Args:
        offsets: S of them, as a tokenizer gives them; only those of the context are looked at.
        is_context: S flags; False for special tokens, for the question, for padding.
        answer: first character and the place after the last one, in the context; None: no answer.

    Returns:
        positions, both included; (0, 0) for no answer, or one that the window cuts off, even in part.

    Raises:
        ValueError: lengths that differ; an answer without characters.
    """
    if len(offsets) != len(is_context):
        raise ValueError(f"{len(offsets)} offsets, but {len(is_context)} flags")
    if answer is None:
        return NO_ANSWER
    start, end = answer
    if not 0 <= start < end:
        raise ValueError(f"an answer's characters go from start to a later end, got {answer}")
    shown = [i for i, (low, high) in enumerate(offsets) if is_context[i] and low < high]
    if not shown or offsets[shown[0]][0] > start or offsets[shown[-1]][1] < end:
        return NO_ANSWER
    inside = [i for i in shown if offsets[i][0] < end and offsets[i][1] > start]
    return (inside[0], inside[-1]) if inside else NO_ANSWER


@dataclass(frozen=True, eq=False)
class Spans:
    """Decoded answers of B rows.

    Attributes:
        start, end: (B,) int64, both included; 0 and 0 for no answer.
        score: (B,) of the best span of context tokens, whether it was taken or not; -inf if there is none.
        null_gap: (B,) null - best: how much rather no answer; what a threshold is compared with.
    """

    start: Tensor
    end: Tensor
    score: Tensor
    null_gap: Tensor


def best_spans(
    start_logits: Tensor, end_logits: Tensor, is_context: Tensor, *, max_length: int = 30, threshold: float = 0.0
) -> Spans:
    """The best answer of each row, or none.

    Args:
        start_logits, end_logits: (B, S), finite.
        is_context: (B, S) bool, where an answer may be.
        max_length: of an answer, in tokens, at least 1.
        threshold: see above; -inf never finds an answer, inf always does where there is any context.

    Raises:
        ValueError: shapes that differ, ``max_length`` below 1.
    """
    if start_logits.shape != end_logits.shape or start_logits.shape != is_context.shape or start_logits.ndim != 2:
        shapes = [tuple(tensor.shape) for tensor in (start_logits, end_logits, is_context)]
        raise ValueError(f"start_logits, end_logits and is_context must have one shape (B, S), got {shapes}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    start_logits, end_logits = start_logits.detach().float(), end_logits.detach().float()
    s = start_logits.shape[1]
    band = torch.ones(s, s, dtype=torch.bool, device=start_logits.device).triu().tril(max_length - 1)
    allowed = band & is_context.unsqueeze(2) & is_context.unsqueeze(1)  # (B, S, S)
    scores = (start_logits.unsqueeze(2) + end_logits.unsqueeze(1)).masked_fill(~allowed, -torch.inf)
    score, place = scores.flatten(1).max(1)
    null_gap = start_logits[:, 0] + end_logits[:, 0] - score
    none = (null_gap > threshold) | score.isneginf()
    start, end = place // s, place % s
    return Spans(start.masked_fill(none, 0), end.masked_fill(none, 0), score, null_gap)


def span_text(context: str, offsets: Offsets, start: int, end: int) -> str:
    """The characters of a span, between its tokens too; "" for (0, 0)."""
    return "" if (start, end) == NO_ANSWER else context[offsets[start][0] : offsets[end][1]]
