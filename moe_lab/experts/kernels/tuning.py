"""What there is to tune: block shapes. None of it changes a result beyond the order of sums.

``python -m moe_lab.bench.gpu_cases --tune`` tries others. Read them here, as ``tuning.TILE``: then a change is seen by
every kernel.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """What a program handles at a time, ``rows`` x ``columns`` numbers (powers of 2), and its warps of 32 threads.

    Where it handles several blocks in turn, ``stages`` of them are in flight; 1: no more than the compiler finds.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 1


@dataclass(frozen=True, kw_only=True)
class Product(Blocks):
    """The tile of a product: ``depth`` of its inner dimension at a time.

    It is stored in ``pieces`` (a power of 2, at least 2: half a tile, in a last round, is stored in half as many).
    ``programs`` run side by side on a multiprocessor: two fit with ``registers`` = 128 a thread and 8 warps; None: no
    limit.

    Raises:
        ValueError: other ``pieces``.
    """

    depth: int
    registers: int | None = None
    pieces: int = 2
    programs: int = 1

    def __post_init__(self) -> None:
        if self.pieces < 2 or self.pieces & (self.pieces - 1):
            raise ValueError(f"pieces must be a power of 2, at least 2, got {self.pieces}")


# Measured on an H100, those with stages on an H200 (loads in flight: some 10 % less time for `activate_backward`), with
# the shapes of `bench.gpu_problem`; between neighbours lie a few per cent.
BLOCKS = {
    "scatter_rows": Blocks(4, 512, 4),
    "sum_rows": Blocks(4, 512, 4),
    "activate": Blocks(16, 256, 4, stages=2),
    "activate_backward": Blocks(16, 256, 4, stages=3),
}
TILE = 128  # rows of one expert that a program of the activation kernels walks over, BLOCKS rows at a time
PRODUCTS = {
    "product": Product(128, 256, 8, depth=64, stages=4),
    "outer": Product(128, 256, 8, depth=64, stages=4),
}
