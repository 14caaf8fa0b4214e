"""What every data set is: three splits of named arrays, and what is known about them.

A data set holds plain tensors, not files or loaders: an experiment turns a split into batches with
`moe_lab.batches.Batches`. Nothing here reads a global random state; a data set depends on its name, its options and
its seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moe_lab.names import unknown_name

KINDS = ("recommender", "vision", "planted", "text", "sentences", "pairs", "images")


class DatasetNotFound(FileNotFoundError):
    """Real data that is not in the cache. The message says how to get it."""


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Train, validation and test rows of one data set.

    Attributes:
        name: as given to `load`.
        kind: one of `KINDS`.
        train, valid, test: tensors by name, all with the same number of rows N within a split.

            recommender: ``user``, ``item`` (N,) int64 counted from 0; ``watched`` (N,) float32, 0 or 1; ``rating`` (N,)
            float32, 0 where there is none; ``has_rating`` (N,) bool, the only thing that says whether there is one.
            vision: ``image`` (N, C, H, W) uint8 or int16; ``labels`` (N, n_tasks) int64.
            planted: ``features`` (N, D) float32, ``target`` (N,) float32, ``cluster`` (N,) int64.
            text: ``tokens`` (N, S + 1) int64. sentences: ``tokens`` (N, S) int64, padded; ``label`` (N,) int64.
            pairs: ``source`` and ``target`` (N, S) int64, padded.
            images: ``image`` (N, C, H, W) float32, standardised by the training images; ``label`` (N,) int64; ``part``
            (N,) int64, 0 .. 2, cuts the validation split into three.
            Where the right expert is known by construction there is also ``expert`` (N,) int64.
        info: facts about the whole set: n_users, n_items, rating_range | n_tasks, n_classes, scale, side, channels |
            n_tokens, tokenizer, length | what was planted. images also: mean and std per channel, taken out of the
            pixels (1 is white); flip, whether a mirror image keeps its label; title, what to call it in results.

    Raises:
        ValueError: an unknown kind; splits with different names; arrays of unequal length in a split.
    """

    name: str
    kind: str
    train: dict[str, Tensor]
    valid: dict[str, Tensor]
    test: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("kind of data set", self.kind, KINDS)
        for split, arrays in self.splits.items():
            if arrays.keys() != self.train.keys():
                raise ValueError(f"{self.name}: split {split!r} has {sorted(arrays)}, train has {sorted(self.train)}")
            lengths = {name: len(array) for name, array in arrays.items()}
            if len(set(lengths.values())) != 1:
                raise ValueError(f"{self.name}: arrays of split {split!r} differ in length: {lengths}")

    @property
    def splits(self) -> dict[str, dict[str, Tensor]]:
        """The three splits by name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}

    @property
    def sizes(self) -> dict[str, int]:
        """Rows per split."""
        return {split: len(next(iter(arrays.values()))) for split, arrays in self.splits.items()}

    def __repr__(self) -> str:
        arrays = ", ".join(
            f"{name} {str(array.dtype).removeprefix('torch.')}{list(array.shape[1:]) or ''}"
            for name, array in self.train.items()
        )
        rows = " / ".join(f"{n:,}" for n in self.sizes.values())
        return f"Dataset({self.name!r}, {self.kind}, train / valid / test = {rows} rows of {arrays})"
