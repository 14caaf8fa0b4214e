"""How sure is each row at an exit? Probabilities and gate from logits, or from the class token through the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lab.triton_support import cdiv, jit, tl, triton, usable

MOST_CLASSES = 4096  # a row of logits is held in registers
MOST_OF_A_HEAD = 2**13  # numbers of a linear layer that one program holds
_FEW, _SMALL = 1024, 2**12  # rows, and numbers of a head, up to which a warp judges one row; else four warps judge 16


@jit
def _entropy(p):
    return -tl.sum(p * tl.log(tl.where(p > 0, p, 1.0)), 1)


@jit
def _judge(z, weight, bias, n_classes, COLUMNS: tl.constexpr):
    """Probabilities and gate of logits z (ROWS, COLUMNS); and 0, or NaN where these are."""
    real = (tl.arange(0, COLUMNS) < n_classes)[None, :]
    shifted = tl.where(real, z, float("-inf"))
    e = tl.exp(shifted - tl.max(shifted, 1)[:, None])
    total = tl.sum(e, 1)
    p = e / total[:, None]
    first = tl.max(p, 1)
    second = tl.max(tl.where(tl.arange(0, COLUMNS)[None, :] == tl.argmax(p, 1)[:, None], -1.0, p), 1)
    squares = p * p
    r = squares / tl.sum(squares, 1)[:, None]
    w0, w1 = tl.load(weight).to(tl.float32), tl.load(weight + 1).to(tl.float32)
    w2, w3 = tl.load(weight + 2).to(tl.float32), tl.load(weight + 3).to(tl.float32)
    gate = w0 * first + w1 * _entropy(p) + w2 * (first - second) + w3 * _entropy(r) + tl.load(bias).to(tl.float32)
    gate = tl.where(total == total, gate, float("nan"))  # a maximum forgets NaN; the caller must hear of it
    return p, 1 / (1 + tl.exp(-gate)), tl.where(total == total, 0.0, float("nan"))


@jit
def _judge_kernel(
    logits, weight, bias, probabilities, gates, n_rows, n_classes,
    AT_END: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    here = (row < n_rows)[:, None] & (c < n_classes)[None, :]
    at = row[:, None].to(tl.int64) * n_classes + c[None, :]
    z = tl.load(logits + at, mask=here, other=0.0).to(tl.float32)
    p, gate, nothing = _judge(z, weight, bias, n_classes, COLUMNS)
    tl.store(probabilities + at, p, mask=here)
    tl.store(gates + row, nothing if AT_END else gate, mask=row < n_rows)


@jit
def _pick(some, i, COUNT: tl.constexpr):
    """some[i]: a tuple has no places that are known only when it runs."""
    found = some[0]
    for j in tl.static_range(1, COUNT):
        found = tl.where(i == j, some[j], found)
    return found


@jit
def _normed(x, norm_weight, norm_bias, width, epsilon, WIDTH: tl.constexpr):
    """Rows x (ROWS, WIDTH) float32 through the norm; numbers behind width are 0."""
    d = tl.arange(0, WIDTH)
    known = d < width
    centred = tl.where(known[None, :], x - (tl.sum(x, 1) / width)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / width + epsilon)
    w = tl.load(norm_weight + d, mask=known, other=0.0).to(tl.float32)
    b = tl.load(norm_bias + d, mask=known, other=0.0).to(tl.float32)
    return centred * scale[:, None] * w[None, :] + b[None, :]


@jit
def _judge_tokens_kernel(
    hs, norm_weights, norm_biases, head_weights, head_biases, epsilons, weights, biases, probabilities, gates,
    n_rows, n_classes, stride, width,
    COUNT: tl.constexpr, AT_END: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows at one of COUNT exits."""
    i = tl.program_id(1)
    h, head_weight = _pick(hs, i, COUNT), _pick(head_weights, i, COUNT)
    row, c, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    here, named, known = row < n_rows, c < n_classes, d < width
    x = tl.load(h + row[:, None].to(tl.int64) * stride + d[None, :], mask=here[:, None] & known[None, :], other=0.0).to(
        tl.float32
    )
    matrix = tl.load(head_weight + c[:, None] * width + d[None, :], mask=named[:, None] & known[None, :], other=0.0)
    normed = _normed(
        x, _pick(norm_weights, i, COUNT), _pick(norm_biases, i, COUNT), width, _pick(epsilons, i, COUNT), WIDTH
    ).to(matrix.dtype)  # rounded as by the norm itself
    if ROWS == 1:  # one warp, which need not wait for another
        z = tl.sum(matrix.to(tl.float32) * normed.to(tl.float32), 1)[None, :]
    else:
        z = tl.dot(normed, matrix.T, input_precision="ieee")
    z += tl.load(_pick(head_biases, i, COUNT) + c, mask=named, other=0.0).to(tl.float32)[None, :]
    z = z.to(matrix.dtype).to(tl.float32)
    p, gate, nothing = _judge(z, _pick(weights, i, COUNT), _pick(biases, i, COUNT), n_classes, COLUMNS)
    if AT_END:
        gate = tl.where(i == COUNT - 1, nothing, gate)
    place = i.to(tl.int64) * n_rows + row
    tl.store(probabilities + place[:, None] * n_classes + c[None, :], p, mask=here[:, None] & named[None, :])
    tl.store(gates + place, gate, mask=here)


def judge(
    logits: Tensor, gate: tuple[Tensor, Tensor], probabilities: Tensor, gates: Tensor, at_end: bool = False
) -> None:
    """Probabilities and gate of one exit.

    Args:
        logits: (C, K), K at most `MOST_CLASSES`.
        gate: weight (4,) and bias () of the gate.
        probabilities: (C, K) float32, contiguous; is filled.
        gates: (C,) float32; is filled. At the last exit (``at_end``) with 0, or NaN where the answer is.
    """
    n_rows, n_classes = logits.shape
    columns = triton.next_power_of_2(n_classes)
    rows = max(1, min(16, 2048 // columns))
    warps = 1 if rows * columns <= 512 else 4
    sizes = (n_rows, n_classes, at_end, rows, columns)
    _judge_kernel[(cdiv(n_rows, rows),)](logits.contiguous(), *gate, probabilities, gates, *sizes, num_warps=warps)


def _by_one_warp(h: Tensor, n_classes: int) -> bool:
    numbers = triton.next_power_of_2(h.shape[2]) * triton.next_power_of_2(n_classes)
    return len(h) <= _FEW and numbers <= _SMALL and h.dtype != torch.float32  # for which Triton 3.6 fails to compile it


def token_fits(h: Tensor, n_classes: int) -> bool:
    """`judge_tokens` can run on h: (C, S, D), contiguous, with a head that fits into one program."""
    if h.dim() != 3 or not h.is_contiguous() or not usable(h):
        return False
    if not h.is_cuda and h.dtype == torch.bfloat16 and not _by_one_warp(h, n_classes):
        return False  # the interpreter cannot multiply these
    return max(triton.next_power_of_2(n_classes), 16) * triton.next_power_of_2(h.shape[2]) <= MOST_OF_A_HEAD


def judge_tokens(
    hs: Sequence[Tensor],
    heads: Sequence[tuple[nn.LayerNorm, nn.Linear]],
    gates_of: Sequence[tuple[Tensor, Tensor]],
    probabilities: Tensor,
    gates: Tensor,
    at_end: bool = False,
) -> None:
    """`judge` of several exits, for the logits linear(norm(h[:, 0])), which are not written down.

    Args:
        hs: what each exit sees, of one shape and dtype; see `token_fits`.
        heads: norm and linear of each, of that dtype.
        gates_of: weight and bias of each gate.
        probabilities: (exits, C, K) float32, contiguous; is filled.
        gates: (exits, C) float32, contiguous; is filled.
        at_end: the last of them is the network's.
    """
    n_rows, n_tokens, width = hs[0].shape
    n_classes = heads[0][1].out_features
    parameters = [
        (norm.weight, norm.bias, linear.weight, linear.bias, norm.eps, *gate)
        for (norm, linear), gate in zip(heads, gates_of, strict=True)
    ]
    rows, least, warps = (1, 1, 1) if _by_one_warp(hs[0], n_classes) else (16, 16, 4)
    sizes = (n_rows, n_classes, n_tokens * width, width, len(hs), at_end, rows)
    blocks = (max(triton.next_power_of_2(size), least) for size in (n_classes, width))
    _judge_tokens_kernel[(cdiv(n_rows, rows), len(hs))](
        tuple(hs), *zip(*parameters, strict=True), probabilities, gates, *sizes, *blocks, num_warps=warps
    )
