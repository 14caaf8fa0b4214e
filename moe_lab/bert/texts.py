"""Texts become tensors with the teacher's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lab.names import check_name


class Tokenised(NamedTuple):
    """arrays: ``tokens``, ``segments`` int64 and ``seen`` bool, each (N, length); n_cut: texts that were too long."""

    arrays: dict[str, Tensor]
    n_cut: int


def tokenised(
    tokenizer: Any,
    first: Sequence[str],
    second: Sequence[str] | None = None,
    *,
    length: int,
    limit: int | None = None,
    too_long: str = "cut",
) -> Tokenised:
    """Ids of N texts, or pairs of texts, padded to ``length``.

    Args:
        tokenizer: a fast one.
        first: N texts.
        second: N texts that belong to them.
        length: columns.
        limit: of the encoder, `longest_sequence`.
        too_long: "cut": take tokens off the end (of the longer text of a pair), as BERT's scripts do; "error".

    Raises:
        ValueError: ``length`` is above the limit; a text is too long and ``too_long`` is "error"; no texts.
    """
    check_name("too_long", too_long, ("cut", "error"))
    if limit is not None and length > limit:
        raise ValueError(f"length={length} is above the encoder's limit of {limit} tokens; choose at most {limit}")
    if len(first) == 0:
        raise ValueError("no texts to tokenise")
    pairs = () if second is None else (list(second),)
    # not padded by the tokenizer: it would hand over Python lists that are mostly padding, which takes most of the time
    found = tokenizer(list(first), *pairs, truncation=True, max_length=length)
    cut = [index for index, one in enumerate(found.encodings) if one.overflowing]
    if cut and too_long == "error":
        text = first[cut[0]]
        raise ValueError(
            f"{len(cut)} of {len(first)} texts have more than {length} tokens, the first is number {cut[0]}: "
            f"{text[:60]!r}; choose a larger length{f' (at most {limit})' if limit else ''} or too_long='cut'"
        )
    seen = torch.arange(length) < torch.tensor([len(ids) for ids in found["input_ids"]]).unsqueeze(1)

    def padded(name: str, filling: int) -> Tensor:
        rows = torch.full(seen.shape, filling)
        rows[seen] = torch.tensor(list(chain.from_iterable(found[name])), dtype=torch.int64)
        return rows

    tokens = padded("input_ids", tokenizer.pad_token_id)
    segments = padded("token_type_ids", 0) if "token_type_ids" in found else torch.zeros_like(tokens)
    arrays = {"tokens": tokens, "segments": segments, "seen": seen}
    return Tokenised(arrays, len(cut))


def trimmed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without the columns that are padding in all of its rows."""
    longest = int(batch["seen"].sum(1).max())
    return {name: values[:, :longest] if values.dim() == 2 else values for name, values in batch.items()}
