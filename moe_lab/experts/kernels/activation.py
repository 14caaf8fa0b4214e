"""Activation: bias, act and the gate's weight in one pass, and all their gradients in another.

    activate            a = g * act(h + b_e)
    activate_backward   dh = g * act'(h + b_e) * da,  dg = <act(h + b_e), da>,  db_e = sum of dh over the rows of e

N routed pairs in expert order, H hidden width, E experts; e the expert of a row, g its weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moe_lab.experts.kernels import tuning
from moe_lab.experts.kernels.common import power_of_2, precise
from moe_lab.experts.kernels.tiles import expert_tiles, experts_of_rows, sum_tiles, tile_rows
from moe_lab.triton_support import cdiv, exp2, jit, reciprocal, tl, usable


@jit
def act_and_slope(z, ACT: tl.constexpr):
    """act(z) and act'(z); the compiler drops the one that is not used."""
    if ACT == "relu":
        a = tl.where(z <= 0, 0.0, z)  # NaN stays NaN
        slope = tl.where(z <= 0, 0.0, 1.0)
    elif ACT == "gelu":
        # Abramowitz and Stegun 7.1.26 for the normal tail: within 1e-7, one exponential for value and slope together,
        # and half of erf's instructions, with which this kernel would wait for arithmetic instead of memory.
        bell = exp2(-0.7213475204444817 * z * z)
        t = reciprocal(1 + 0.23164189 * tl.abs(z))
        tail = t * (0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702715)))) * bell
        phi = tl.where(z < 0, tail, 1 - tail)
        a = z * phi
        slope = phi + z * bell * 0.3989422804014327
    else:
        a = 2 * tl.sigmoid(2 * z) - 1
        slope = 1 - a * a
    return a, slope


@jit
def _activate_kernel(
    h, bias, value, ends, out, n, width, n_experts,
    ACT: tl.constexpr, BIAS: tl.constexpr, TILE_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    begin, end, through = expert_tiles(ends, n, n_experts, TILE_ROWS, E_PAD)
    expert, row, stop = tile_rows(begin, end, through, tl.program_id(0), TILE_ROWS, E_PAD)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.load(bias + expert * width + c, mask=c < width, other=0.0).to(tl.float32) if BIAS else 0.0
    if row < stop:  # there are tiles without rows: where N is an upper bound, up to half of them and more
        for done in tl.range(0, TILE_ROWS, ROWS, num_stages=STAGES):
            r = row + done + tl.arange(0, ROWS)
            inside = (r < stop)[:, None] & (c < width)[None, :]
            at = r[:, None].to(tl.int64) * width + c[None, :]
            z = tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + b
            g = tl.load(value + r, mask=r < stop, other=0.0)
            a, _ = act_and_slope(z, ACT)
            tl.store(out + at, (g[:, None] * a).to(out.dtype.element_ty), mask=inside)


@jit
def _activate_backward_kernel(
    h, bias, value, ends, grad, again, grad_value, grad_bias, tile_expert, n, width, n_experts,
    ACT: tl.constexpr, BIAS: tl.constexpr, AGAIN: tl.constexpr, TILE_ROWS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    begin, end, through = expert_tiles(ends, n, n_experts, TILE_ROWS, E_PAD)
    expert, row, stop = tile_rows(begin, end, through, tile, TILE_ROWS, E_PAD)
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.load(bias + expert * width + c, mask=c < width, other=0.0).to(tl.float32) if BIAS else 0.0
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if row < stop:
        for done in tl.range(0, TILE_ROWS, ROWS, num_stages=STAGES):
            r = row + done + tl.arange(0, ROWS)
            inside = (r < stop)[:, None] & (c < width)[None, :]
            at = r[:, None].to(tl.int64) * width + c[None, :]
            z = tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + b
            g = tl.load(value + r, mask=r < stop, other=0.0)
            da = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            a, slope = act_and_slope(z, ACT)
            dh = g[:, None] * slope * da
            tl.store(grad + at, dh.to(grad.dtype.element_ty), mask=inside)
            tl.store(grad_value + r * tl.num_programs(1) + block, tl.sum(a * da, 1), mask=r < stop)
            if AGAIN:
                tl.store(again + at, (g[:, None] * a).to(again.dtype.element_ty), mask=inside)
            if BIAS:
                total += dh
    if BIAS:
        tl.store(grad_bias + tile * width + c, tl.sum(total, 0), mask=c < width)
        tl.store(tile_expert + tile, expert, mask=block == 0)


def _with_bias(h: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    z = h.to(precise(h.dtype))
    return z if bias is None else z + bias.index_select(0, experts_of_rows(ends, len(h))).to(z.dtype)


def _act_oracle(z: Tensor, activation: str) -> Tensor:
    return torch.tanh(z) if activation == "tanh" else getattr(functional, activation)(z)


def activate_oracle(h: Tensor, bias: Tensor | None, value: Tensor, ends: Tensor, activation: str) -> Tensor:
    """`activate` with torch's functions."""
    return (value[:, None] * _act_oracle(_with_bias(h, bias, ends), activation)).to(h.dtype)


def activate_backward_oracle(
    h: Tensor, bias: Tensor | None, value: Tensor, ends: Tensor, activation: str, grad: Tensor, again: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`activate_backward` with torch's own derivatives."""
    z = _with_bias(h, bias, ends)
    a, da = _act_oracle(z, activation), grad.to(z.dtype)
    da_g = value[:, None] * da
    if activation == "gelu":
        dz = torch.ops.aten.gelu_backward(da_g, z)
    else:
        dz = da_g * (1 - a * a) if activation == "tanh" else torch.ops.aten.threshold_backward(da_g, z, 0)
    grad_bias = None
    if bias is not None:
        grad_bias = torch.zeros_like(bias, dtype=z.dtype).index_add_(0, experts_of_rows(ends, len(h)), dz)
    return dz.to(h.dtype), (a * da).sum(1), grad_bias, (value[:, None] * a).to(h.dtype) if again else None


def _tiled(name: str, h: Tensor, ends: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the constants of an activation kernel: at most N / TILE full tiles and a partial one each."""
    blocks, (n, width), n_experts = tuning.BLOCKS[name], h.shape, ends.shape[0]
    columns = min(blocks.columns, power_of_2(width))
    constants = {"TILE_ROWS": tuning.TILE, "ROWS": blocks.rows, "COLUMNS": columns, "STAGES": blocks.stages}
    constants["E_PAD"] = power_of_2(n_experts, 2)
    grid = (n // tuning.TILE + n_experts, cdiv(width, columns))
    return grid, constants | {"num_warps": blocks.warps}


def activate(h: Tensor, bias: Tensor | None, value: Tensor, ends: Tensor, activation: str) -> Tensor:
    """g * act(h + b_e): bias, activation and the gate's weight in one pass.

    Args:
        h: (N, H) in expert order, contiguous.
        bias: (E, H), contiguous, or None.
        value: (N,) weights g in expert order, float32 (float64 if h is).
        ends: (E,) int32, see `expert_order`.
        activation: of `ACTIVATIONS`; gelu is the exact one.

    Returns:
        (N, H) in h's dtype; computed in float32.
    """
    if not h.numel() or not usable(h):
        return activate_oracle(h, bias, value, ends, activation)
    out = torch.empty_like(h)
    grid, constants = _tiled("activate", h, ends)
    sizes = (*h.shape, ends.shape[0])
    has_bias = bias is not None
    _activate_kernel[grid](
        h, bias if has_bias else h, value, ends, out, *sizes, ACT=activation, BIAS=has_bias, **constants
    )
    return out


def activate_backward(
    h: Tensor, bias: Tensor | None, value: Tensor, ends: Tensor, activation: str, grad: Tensor, again: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """All gradients of `activate` in one pass over h and grad.

    Args:
        h, bias, value, ends, activation: as in `activate`.
        grad: (N, H) with respect to its result, contiguous. It may be overwritten.
        again: also compute that result once more, for a caller who did not keep it.

    Returns:
        with respect to h (N, H), value (N,) and bias (E, H), the last two in float32 (None without a bias); and the
        result of `activate`, or None.
    """
    if not h.numel() or not usable(h):
        return activate_backward_oracle(h, bias, value, ends, activation, grad, again)
    grid, constants = _tiled("activate_backward", h, ends)
    n_experts, has_bias = ends.shape[0], bias is not None
    result = torch.empty_like(h) if again else h
    by_block = h.new_empty(h.shape[0], grid[1], dtype=torch.float32)
    by_tile = h.new_empty(grid[0], h.shape[1], dtype=torch.float32) if has_bias else by_block
    tile_expert = torch.empty(grid[0], dtype=torch.int32, device=h.device)
    _activate_backward_kernel[grid](
        h, bias if has_bias else h, value, ends, grad, result, by_block, by_tile, tile_expert, *h.shape, n_experts,
        ACT=activation, BIAS=has_bias, AGAIN=again, **constants,
    )  # fmt: skip
    grad_bias = sum_tiles(by_tile, tile_expert, n_experts) if has_bias else None
    return grad, by_block.sum(1), grad_bias, result if again else None
