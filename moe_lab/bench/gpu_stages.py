"""Where the time of our MoE layer goes: each of its stages alone, with the operations or bytes it cannot avoid."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from moe_lab.bench.device import part_rows
from moe_lab.bench.gpu_problem import Problem, Step
from moe_lab.bench.roofline import OWN
from moe_lab.experts import kernels


def stages(p: Problem) -> dict[str, tuple[Step, float, float]]:
    """The stages of our layer: name -> (step, floating-point operations, bytes that must move)."""
    t, d, h, _, k = dataclasses.astuple(p.shape)
    with torch.no_grad():
        flat, value = p.experts.flatten(), p.values.detach().flatten()
        w1, w2, b1 = (w if w is None else w.detach() for w in (p.w1, p.w2, p.b1))
        place, ends, g, *_ = kernels.expert_order(flat, value, p.shape.experts)
        rows = kernels.scatter_rows(p.x.detach(), place, k)
        z = functional.grouped_mm(rows, w1, offs=ends)
        a = kernels.activate(z, b1, g, ends, p.activation)
        grad, dz = torch.randn_like(z), torch.randn_like(z)  # two: activate_backward writes over its own
    size, flops = z.element_size(), 2.0 * t * k * d * h
    move, pass_h = (1 + k) * t * d * size, t * k * h * size
    w1_t, w2_t = w1.transpose(1, 2), w2.transpose(1, 2)

    def mm(left: Tensor, right: Tensor) -> Step:
        return lambda: [functional.grouped_mm(left, right, offs=ends)]

    parts: dict[str, tuple[Step, float, float]] = {
        "expert_order": (lambda: [kernels.expert_order(flat, value, p.shape.experts)[0]], 0, 20.0 * t * k),
        "scatter_rows, twice a step": (lambda: [kernels.scatter_rows(p.x.detach(), place, k)], 0, move),
        "Z = X W1": (mm(rows, w1), flops, 0),
        "activate": (lambda: [kernels.activate(z, b1, g, ends, p.activation)], 0, 2 * pass_h),
        "A W2": (mm(a, w2), flops, 0),
        "sum_rows, twice a step": (lambda: [kernels.sum_rows(rows, place, k, t)], 0, move),
        "dA = G W2^T": (mm(rows, w2_t), flops, 0),
        "activate_backward": (
            lambda: [kernels.activate_backward(z, b1, g, ends, p.activation, grad, False)[0]], 0, 3 * pass_h
        ),
        "dW2 = A^T G": (mm(a.T, rows), flops, 0),
        "dX = dZ W1^T": (mm(dz, w1_t), flops, 0),
        "dW1 = X^T dZ": (mm(rows.T, dz), flops, 0),
    }  # fmt: skip

    def product(left: Tensor, right: Tensor, transposed: bool) -> Step:
        return lambda: [kernels.product(left, right, ends, transposed)]

    def outer(left: Tensor, right: Tensor) -> Step:
        return lambda: [kernels.outer(left, right, ends)]

    # What takes the place of grouped_mm where it can run.
    products = {"Z": (rows, w1, False), "A W2": (a, w2, False), "dA": (rows, w2, True), "dX": (dz, w1, True)}
    for name, operands in products.items():
        if kernels.product_runs(*operands):
            parts[f"product{OWN}{name}"] = product(*operands), flops, 0
    for name, operands in {"dW2": (a, rows), "dW1": (rows, dz)}.items():
        if kernels.outer_runs(*operands):
            parts[f"outer{OWN}{name}"] = outer(*operands), flops, 0
    return parts


def measure_stages(p: Problem, rounds: int = 5, n_steps: int = 5) -> list[dict]:
    """One row per stage: the sizes, ms, and TFLOP/s or GB/s."""
    sizes = dataclasses.asdict(p.shape)
    return [sizes | row for row in part_rows("stage", stages(p), p.x.device, rounds, n_steps)]
