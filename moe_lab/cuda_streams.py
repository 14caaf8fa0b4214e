"""Two kinds of work on one GPU at a time."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Beside:
    """Work that needs nothing of what the current stream is given from now on, and so may run beside it.

    ::

        beside = Beside(x.device, wanted)
        first = large(x)  # has its place on the device already when the other begins
        with beside:
            second = small(y)
        beside.join(second)

    On one stream (not ``wanted``, or another device than CUDA) all this runs in the order in which it stands there.

    Args:
        device: where.
        wanted: else nothing is done.

    This work may use what the current stream was given before, and what it makes may be used after `join`. What it uses
    must not be dropped before `join`, for the current stream would use its memory again.
    """

    def __init__(self, device: torch.device, wanted: bool):
        self._side = _side(device) if wanted and device.type == "cuda" else None
        if self._side is not None:
            self._main = torch.cuda.current_stream(device)
            self._begun = self._main.record_event()

    def __enter__(self) -> None:
        if self._side is not None:
            self._side.wait_event(self._begun)
            self._context = torch.cuda.stream(self._side)
            self._context.__enter__()

    def __exit__(self, *raised: object) -> None:
        if self._side is not None:
            self._context.__exit__(*raised)

    def join(self, *made: Tensor | None) -> None:
        """The current stream waits; ``made`` is what it will use of the work beside it."""
        if self._side is None:
            return
        self._main.wait_stream(self._side)
        for tensor in made:
            if tensor is not None:  # their memory is the other stream's: not to be used again before this one is done
                tensor.record_stream(self._main)
