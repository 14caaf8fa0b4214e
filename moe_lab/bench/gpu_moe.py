"""The MoE layer on one GPU beside a dense layer of equal multiply-adds: the cases, and a row for each.

Cases take turns within a round; each step is timed by device events and the median is shown. Peak memory is what one
step allocates beyond its inputs. Before anything is timed, every case's output and gradients are compared with a loop
over experts in float32, by ||a - b|| / ||b||; bfloat16 lands between 1e-3 and 1e-2. See `gpu_problem` for the legend.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_lab.bench import gpu_scattermoe
from moe_lab.bench.device import captured, device_turns, peak
from moe_lab.bench.gpu_problem import Problem, Step, error, expected
from moe_lab.experts import MLPExperts, combine_experts
from moe_lab.experts.fast import grouped_mlp
from moe_lab.names import check_name


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        prepare: makes the step; compiling or capturing may fail: only that case is lost.
        variable: it computes the variable routing, not the fixed one.
    """

    prepare: Callable[[], Step]
    variable: bool = False


def dense_layer(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str) -> Tensor:
    """The layer to compare with: hidden width K H."""
    act = getattr(functional, activation)
    return functional.linear(act(functional.linear(x, weights[0], biases[0])), weights[1], biases[1])


def plain_layer(p: Problem) -> Tensor:
    """Sort, two grouped products, index_add: what one writes first, with PyTorch's own backward."""
    by_expert, order = p.experts.flatten().sort(stable=True)
    ends = torch.searchsorted(by_expert, torch.arange(p.shape.experts, device=p.x.device), right=True).int()
    tokens = order // p.shape.k
    h = functional.grouped_mm(p.x.index_select(0, tokens), p.w1, offs=ends)
    h = h if p.b1 is None else h + p.b1.index_select(0, by_expert)
    out = functional.grouped_mm(getattr(functional, p.activation)(h), p.w2, offs=ends)
    out = out if p.b2 is None else out + p.b2.index_select(0, by_expert)
    out = out * p.values.flatten().index_select(0, order)[:, None].to(out.dtype)
    return torch.zeros_like(p.x).index_add(0, tokens, out)


def _reference(p: Problem) -> Step:
    bank = MLPExperts(p.shape.experts, (p.shape.width, p.shape.hidden, p.shape.width), p.activation, False)
    for own, given in zip(bank.parameters(), (p.w1, p.w2, p.b1, p.b2), strict=True):
        own.data = given.detach()
    leaves = [p.x, p.weights, bank.weights[0], bank.biases[0], bank.weights[1], bank.biases[1]]
    return p.step(lambda: combine_experts(bank, p.x, [p.weights])[0], leaves)


def moe_cases(p: Problem, compiled: bool = True) -> dict[str, Case]:
    """Name -> case; those of CUDA, with biases, or of ScatterMoE only where they can run."""
    dense = [v for v in (*p.dense, *p.dense_bias) if v is not None]
    layer = (p.w1, p.b1, p.w2, p.b2, p.activation)

    def ours(
        routing: Tensor | tuple[Tensor, Tensor] = (p.experts, p.values),
        function: Callable[..., Tensor] = grouped_mlp,
        **options,
    ) -> Step:
        weights = routing if isinstance(routing, Tensor) else routing[1]
        return p.step(lambda: function(p.x, routing, *layer, **options), [p.x, weights, *p.parameters])

    def dense_step(function: Callable[..., Tensor] = dense_layer) -> Step:
        return p.step(lambda: function(p.x, p.dense, p.dense_bias, p.activation), [p.x, *dense])

    cases = {
        "dense": Case(dense_step),
        "plain": Case(lambda: p.step(lambda: plain_layer(p), [p.x, p.values, *p.parameters])),
        "ours": Case(ours),
        "ours, any pattern": Case(lambda: ours(p.weights)),
        "ours, variable k": Case(lambda: ours(p.variable), variable=True),
        "ours, variable k, bounded": Case(lambda: ours(p.variable, most=p.most), variable=True),
        "ours, recompute": Case(lambda: ours(recompute=True)),
        "ours, grouped_mm": Case(lambda: ours(own=False)),
    }
    if p.x.device.type == "cuda":
        cases["ours, CUDA graph"] = Case(lambda: captured(ours()))
        graph = "ours, variable k, bounded, CUDA graph"
        cases[graph] = Case(lambda: captured(ours(p.variable, most=p.most)), variable=True)
    if compiled:
        compile_ = functools.partial(torch.compile, dynamic=False)
        cases["dense, compiled"] = Case(lambda: dense_step(compile_(dense_layer)))
        cases["ours, compiled"] = Case(lambda: ours(function=compile_(grouped_mlp, fullgraph=True)))
    if p.b1 is not None:
        cases["reference"] = Case(lambda: _reference(p))
    elif gpu_scattermoe.runs_on(p.x):
        cases["ScatterMoE"] = Case(lambda: gpu_scattermoe.scattermoe_step(p))
    return cases


def choose(p: Problem, compiled: bool = True, only: Sequence[str] = ()) -> dict[str, Case]:
    """The cases to run: those named, or all that can.

    Raises:
        ValueError: a name of no case that can run here.
    """
    cases = moe_cases(p, compiled)
    for name in only:
        check_name("case", name, cases)
    return {name: case for name, case in cases.items() if not only or name in only}


def measure(p: Problem, cases: Mapping[str, Case], *, rounds: int = 5, n_steps: int = 5) -> list[dict]:
    """One row per case.

    Args:
        p: the problem.
        cases: of `choose`.
        rounds, n_steps: of `device_turns`.

    Returns:
        Rows with case, T, D, H, E, K; pairs (routed, per token); error; peak_mib; ms, ms_q1, ms_q3; tflops (of active
        operations); and tflops as a multiple of the dense layer's, ScatterMoE's and, for variable K, that of "ours"
        with fixed K (of_dense, of_scattermoe, of_fixed; None without such a case). Where a case could not run
        ``failed`` says why, and the figures are missing.
    """
    device, ready, rows = p.x.device, {}, {}
    right = {variable: expected(p, variable) for variable in {case.variable for case in cases.values()}}
    flops = {False: p.shape.flops, True: p.variable_flops}
    for name, case in cases.items():
        pairs = p.shape.k * flops[case.variable] / p.shape.flops
        rows[name] = {"case": name, **dataclasses.asdict(p.shape), "pairs": pairs}
        try:
            step = case.prepare()
            found = step()
            rows[name]["error"] = None if name.startswith("dense") else error(p, found, right[case.variable])
            rows[name]["peak_mib"] = None if "graph" in name else peak(step, device)
            ready[name] = step
        except Exception as problem:  # a case that cannot run must not cost the others their turn on a lent GPU
            rows[name]["failed"] = f"{type(problem).__name__}: {problem}"[:500]
    del right
    for name, timing in device_turns(ready, device, rounds, n_steps).items():
        first, third = timing.quartiles
        rows[name] |= {"ms": 1e3 * timing.median, "ms_q1": 1e3 * first, "ms_q3": 1e3 * third}
        rows[name]["tflops"] = flops[cases[name].variable] / timing.median / 1e12
    for name, row in rows.items():
        row["of_dense"] = _share(row, rows.get("dense"))
        row["of_scattermoe"] = _share(row, rows.get("ScatterMoE"))
        row["of_fixed"] = _share(row, rows.get("ours")) if cases[name].variable else None
    return list(rows.values())


def _share(row: dict, of: dict | None) -> float | None:
    return row["tflops"] / of["tflops"] if of and "tflops" in row and "tflops" in of else None
