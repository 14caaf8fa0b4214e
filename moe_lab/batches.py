"""Mini-batches from tensors in memory, in an order that can be found again.

Everything here fits in memory, so a batch is one ``index_select`` per array: no worker processes and no collation of
single examples. The order of an epoch is a function of (seed, epoch) alone, never of what was drawn before: a resumed
run starts in the middle of an epoch and sees the rows that the uninterrupted one would have seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _checksum(array: Tensor, most_rows: int = 4096) -> int:
    """CRC-32 of evenly spaced rows: tells data sets of one shape apart, without reading gigabytes."""
    rows = array[:: max(1, len(array) // most_rows)].detach().cpu().contiguous()
    return zlib.crc32(rows.view(torch.uint8).numpy() if rows.dim() else b"")


class Batches:
    """Named arrays of equal length, cut into batches.

    Args:
        arrays: name -> tensor, first dimension = rows; all of one length.
        batch_size: rows per batch; the last batch of an epoch may be shorter (it is kept).
        shuffle: new order each epoch; otherwise rows come as they lie (batches are then views, not copies).
        seed: of the order.
        device: where the batches are wanted.
        keep_on_device: move the arrays there once and for all; without it each batch travels alone, and the arrays may
            be larger than the device's memory.

    Raises:
        ValueError: no arrays, unequal lengths, no rows, or a batch size below 1.
    """

    def __init__(
        self,
        arrays: Mapping[str, Tensor],
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        keep_on_device: bool = False,
    ) -> None:
        lengths = {name: len(array) for name, array in arrays.items()}
        if not lengths:
            raise ValueError("Batches needs at least one array")
        if len(set(lengths.values())) > 1:
            raise ValueError(f"arrays must have equally many rows, got {lengths}")
        self.n_rows = next(iter(lengths.values()))
        if self.n_rows == 0:
            raise ValueError(f"arrays {list(lengths)} have no rows")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.device = torch.device(device)
        self.arrays = {name: array.to(self.device) if keep_on_device else array for name, array in arrays.items()}

    def __len__(self) -> int:
        """Steps per epoch."""
        return -(-self.n_rows // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """(rows,) int64: the row that comes first, second, ... in epoch ``epoch`` (counted from 0)."""
        if not self.shuffle:
            return torch.arange(self.n_rows)
        # SeedSequence mixes the pair, so that (seed 0, epoch 1) and (seed 1, epoch 0) have nothing in common.
        mixed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.randperm(self.n_rows, generator=torch.Generator().manual_seed(mixed))

    def epoch(self, index: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of epoch ``index``, from batch ``start`` on."""
        order = self.order(index) if self.shuffle else None
        for first in range(start * self.batch_size, self.n_rows, self.batch_size):
            last = min(first + self.batch_size, self.n_rows)
            batch = {}
            for name, array in self.arrays.items():
                rows = array[first:last] if order is None else array.index_select(0, order[first:last].to(array.device))
                batch[name] = rows.to(self.device)
            yield batch

    def describe(self) -> dict[str, Any]:
        """What must be equal in a run that resumes another one."""
        return {
            "rows": self.n_rows,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "content": {name: _checksum(array) for name, array in self.arrays.items()},
        }


class StepBatches(Batches):
    """Batches of an endless stream of passes, an "epoch" being so many steps: for data of which one pass is long.

    The stream is that of `Batches`, pass after pass; epoch i is its batches i * steps .. (i + 1) * steps - 1.

    Args:
        steps: batches per epoch.
        others: see `Batches`.
    """

    def __init__(self, arrays: Mapping[str, Tensor], batch_size: int, *, steps: int, **options: Any) -> None:
        super().__init__(arrays, batch_size, **options)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.steps

    def epoch(self, index: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of epoch ``index``, from batch ``start`` on."""
        done, left = index * self.steps + start, self.steps - start
        per_pass = super().__len__()
        while left > 0:
            a_pass, first = divmod(done, per_pass)
            taken = min(left, per_pass - first)
            yield from islice(super().epoch(a_pass, start=first), taken)
            done, left = done + taken, left - taken

    def describe(self) -> dict[str, Any]:
        """What must be equal in a run that resumes another one."""
        return super().describe() | {"steps": self.steps}
