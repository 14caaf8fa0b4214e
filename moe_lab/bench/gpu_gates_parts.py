"""Where the time of COMET's kernels goes, and trying block shapes for them on the problem that will be measured."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_lab.bench.device import part_rows
from moe_lab.bench.gpu_gates_problem import Problem, Step
from moe_lab.bench.gpu_tuning import keep_fastest
from moe_lab.gates import comet_kernels
from moe_lab.gates.comet_fast import product


def parts(p: Problem) -> dict[str, tuple[Step, float, float]]:
    """Parts of "COMET, kernels": name -> (step, floating-point operations, bytes that must move)."""
    gate, x, k = p.gates["COMET"], p.x.detach(), p.shape.k
    with torch.no_grad():
        weight = torch.cat((gate.split.weight, gate.leaf.weight)).to(x.dtype)
        bias = torch.cat((gate.split.bias, gate.leaf.bias)).float()
        logits = product(weight, x.T)
        weights, log_mass, _ = comet_kernels.trees(logits, bias, k, gate.gamma, True)
        one, grad_weights = torch.ones((), device=x.device), p.grad.T.contiguous()

    def backward() -> list[Tensor]:
        given = (logits, bias, weights, log_mass, k, gate.gamma, grad_weights, one)
        return [comet_kernels.trees_backward(*given, x.dtype)]

    (grad,) = backward()
    size, numbers, out = x.element_size(), logits.numel(), 4 * weights.numel()
    flops = 2.0 * numbers * p.shape.width
    return {
        "Z = W X^T": (lambda: [product(weight, x.T)], flops, 0),
        "forward": (lambda: [comet_kernels.trees(logits, bias, k, gate.gamma, True)[0]], 0, 4 * numbers + out),
        "backward": (backward, 0, (4 + size) * numbers + 2 * out),
        "dX = dZ^T W": (lambda: [grad.T @ weight], flops, 0),
        "dW = dZ X": (lambda: [grad @ x], flops, 0),
        "db": (lambda: [grad.sum(1, dtype=torch.float32)], 0, size * numbers),
        "transpose the weights' gradient": (lambda: [p.grad.T.contiguous()], 0, 2 * out),
    }


def measure_parts(p: Problem, rounds: int = 5, n_steps: int = 10) -> list[dict]:
    """One row per part: ms, and TFLOP/s or GB/s; none where Triton cannot run."""
    if not comet_kernels.usable(p.x, p.shape.experts, p.shape.k):
        return []
    return part_rows("part", parts(p), p.device, rounds, n_steps)


def block_choices(n_experts: int) -> Iterator[comet_kernels.TreeBlocks]:
    """What to try: subtrees of 8 or 16 leaves (if a tree is not one subtree), 8, 12 or 16 warps on a multiprocessor."""
    for warps in (1, 4):
        for levels in (3, 4) if n_experts > 2**comet_kernels.WHOLE else (4,):
            for registers in (None, 168, 128):
                yield comet_kernels.TreeBlocks(warps, levels, registers)


def tune(p: Problem, n_steps: int = 20) -> dict[str, dict]:
    """Try block shapes for both kernels; the fastest stays in `comet_kernels`, for trees of this depth.

    Returns:
        As `gpu_tuning.keep_fastest`, for both kernels. Nothing without Triton.
    """
    if not comet_kernels.usable(p.x, p.shape.experts, p.shape.k):
        return {}
    found, table, best = parts(p), comet_kernels.blocks_table(p.shape.experts), {}
    for name in list(table):
        keep_fastest(name, found[name][0], block_choices(p.shape.experts), table, p.device, n_steps, best)
    return best
