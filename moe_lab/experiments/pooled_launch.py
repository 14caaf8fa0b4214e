"""Filters in the order of the kernels, their grids, and gradients in the order of the caller: between
`pooled_convolution` and `pooled_kernels`, whose legend holds here, too. N inputs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_lab.experiments.pooled_kernels import forward_kernel, image_kernel, weights_kernel
from moe_lab.experts.kernels.common import power_of_2
from moe_lab.triton_support import capability, cdiv, usable

MOST_CHANNELS = 32  # with more, accumulators do not fit into registers
PROGRAMS = 2048  # of ``weights``, about: its cells are dealt to so many, whatever the device, and their sums added up


@dataclass(frozen=True)
class Tiles:
    """What a program handles at a time: ``rows`` cells (or 2 x 2 pixels), ``depth`` numbers of a window (powers of 2).

    ``stages`` of its loads are in flight. None of it changes a result beyond the order of sums. Chosen by counting
    instructions and registers of what the compiler makes of them for an H200, not by measuring.
    """

    rows: int
    depth: int = 64
    warps: int = 4
    stages: int = 2


TILES = {"forward": Tiles(128, stages=3), "weights": Tiles(64, stages=3), "image": Tiles(128)}


@dataclass(frozen=True)
class Sizes:
    """Of one convolution, and what follows from them."""

    inputs: int
    groups: int
    images: int
    height: int
    width: int
    c_in: int
    c_out: int
    kernel: int

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, kernel: int) -> Sizes:
        """From x (N, B, H, W, C) and weight (G, k k C, OUT)."""
        return cls(len(x), len(weight), *x.shape[1:], weight.shape[2], kernel)

    @property
    def side(self) -> int:
        return self.kernel + 1

    @property
    def even_side(self) -> int:
        """S: a window in whole pairs of pixels."""
        return 2 * (self.kernel // 2 + 1)

    @property
    def pooled(self) -> tuple[int, int]:
        return (self.height - self.kernel + 1) // 2, (self.width - self.kernel + 1) // 2

    @property
    def row(self) -> int:
        """RP: one number at least is free, for the gradient of the bias."""
        return power_of_2(self.even_side * self.c_in + 1)

    @property
    def columns(self) -> int:
        """OP."""
        return power_of_2(self.c_out, 16)

    def steps(self, depth: int) -> int:
        """How many times ``depth`` numbers a window has."""
        return -(-self.even_side * self.row // depth)

    def constants(self) -> dict[str, int]:
        """What every kernel is compiled for."""
        names = {"H": self.height, "W": self.width, "C": self.c_in, "OUT": self.c_out}
        return names | {"SIDE": self.side, "OP": self.columns}


def kernels_run(x: Tensor, weight: Tensor, kernel: int) -> bool:
    """The kernels can compute it: Triton is there, few channels, fewer than 2^31 numbers per group; on CUDA 16 bits."""
    if not usable(x):
        return False
    if x.device.type == "cpu":
        fits = x.dtype != torch.bfloat16  # which the interpreter cannot multiply
    else:  # tiles of wider numbers, or on an older card, may not fit into shared memory
        fits = x.dtype.itemsize == 2 and capability(x.device)[0] >= 8
    sizes = Sizes.of(x, weight, kernel)
    most = max(sizes.c_in, sizes.c_out)
    few = most <= MOST_CHANNELS and sizes.images * sizes.height * sizes.width * most < 2**31
    return fits and few and min(sizes.pooled) > 0


def _four(sizes: Sizes, rows: Tensor) -> list[Tensor]:
    """Views of the four filters (G, k, k C, OUT) in (G, D, 4 OP): filters, or their gradient."""
    k, c = sizes.kernel, sizes.c_in
    window = rows[:, : sizes.even_side * sizes.row].view(sizes.groups, sizes.even_side, sizes.row, 4, sizes.columns)
    return [
        window[:, dy : dy + k, dx * c : (dx + k) * c, 2 * dy + dx, : sizes.c_out] for dy in range(2) for dx in range(2)
    ]


def _filters(sizes: Sizes, weight: Tensor, dtype: torch.dtype, depth: int) -> Tensor:
    """(G, D, 4 OP), D a multiple of ``depth``."""
    rows = weight.new_zeros(sizes.groups, sizes.steps(depth) * depth, 4 * sizes.columns, dtype=dtype)
    for view in _four(sizes, rows):
        view.copy_(weight.view(sizes.groups, sizes.kernel, -1, sizes.c_out))
    return rows


def _transposed(sizes: Sizes, filters: Tensor, padded: int) -> Tensor:
    """(G, S / 2, S / 2, 4 OP, 2 SP): what a cell's window adds to the pixels of each of its 2 x 2 squares."""
    s, c, half = sizes.even_side, sizes.c_in, sizes.even_side // 2
    rows = filters[:, : s * sizes.row].view(sizes.groups, half, 2, sizes.row, -1)[:, :, :, : s * c]
    return pad(rows.unflatten(3, (half, 2 * c)).permute(0, 1, 3, 5, 2, 4), (0, padded - 2 * c)).contiguous()


def forward(x: Tensor, weight: Tensor, bias: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """The pooled convolution and who won: (G, B, h, w, OUT) in x's dtype, and the same in uint8, 4 where ReLU cut."""
    sizes, tiles = Sizes.of(x, weight, kernel), TILES["forward"]
    y = x.new_empty(sizes.groups, sizes.images, *sizes.pooled, sizes.c_out)
    index = torch.empty_like(y, dtype=torch.uint8)
    if y.numel():
        filters = _filters(sizes, weight, x.dtype, tiles.depth)
        grid = (cdiv(sizes.images * sizes.pooled[0] * sizes.pooled[1], tiles.rows), sizes.groups)
        forward_kernel[grid](
            x, filters, bias, y, index, sizes.images, sizes.groups // sizes.inputs, **sizes.constants(), RP=sizes.row,
            DEPTH=filters.shape[1], M=tiles.rows, STEP=tiles.depth, STAGES=tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip
    return y, index


def weight_gradient(x: Tensor, weight: Tensor, index: Tensor, grad: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """With respect to weight and bias, in float32."""
    sizes, tiles = Sizes.of(x, weight, kernel), TILES["weights"]
    n_cells = sizes.images * sizes.pooled[0] * sizes.pooled[1]
    if not n_cells:
        zeros = torch.zeros_like(weight, dtype=torch.float32)
        return zeros, zeros[:, 0].clone()
    n_tiles, steps = cdiv(n_cells, tiles.rows), sizes.steps(tiles.depth)
    part = cdiv(n_tiles, min(max(PROGRAMS // (steps * sizes.groups), 1), n_tiles)) * tiles.rows
    sums = x.new_empty(cdiv(n_cells, part), sizes.groups, steps * tiles.depth, 4 * sizes.columns, dtype=torch.float32)
    weights_kernel[(steps, sizes.groups, len(sums))](
        x, grad, index, sums, sizes.images, sizes.groups // sizes.inputs, part, **sizes.constants(), RP=sizes.row,
        DEPTH=sums.shape[2], M=tiles.rows, STEP=tiles.depth, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    total = sums.sum(0)
    of_bias = total[:, sizes.side * sizes.c_in].unflatten(1, (4, sizes.columns)).sum(1)[:, : sizes.c_out]
    return sum(_four(sizes, total)).flatten(1, 2), of_bias


def image_gradient(x: Tensor, weight: Tensor, index: Tensor, grad: Tensor, kernel: int) -> Tensor:
    """With respect to x, in x's dtype."""
    sizes, tiles = Sizes.of(x, weight, kernel), TILES["image"]
    shared = sizes.groups > sizes.inputs  # then the groups' gradients are added up, in float32
    out = x.new_empty(sizes.groups, *x.shape[1:], dtype=torch.float32 if shared else x.dtype)
    if out.numel():
        padded = power_of_2(2 * sizes.c_in, 8)
        filters = _transposed(sizes, _filters(sizes, weight, x.dtype, 1), padded)
        squares = sizes.images * ((sizes.height + 1) // 2) * ((sizes.width + 1) // 2)
        image_kernel[(cdiv(squares, tiles.rows), sizes.groups)](
            grad, index, filters, out, sizes.images, **sizes.constants(), SP=padded, M=tiles.rows,
            STAGES=tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip
    return out.unflatten(0, (sizes.inputs, -1)).sum(1).to(x.dtype) if shared else out
