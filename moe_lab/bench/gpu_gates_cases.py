"""COMET's gate on one GPU beside the top-k softmax gate: the cases, and a row for each.

Cases take turns; a step is timed by device events and the median is shown. ``of_topk``: its time over that of "top-k",
both eager. Peak memory is what one step allocates.

    top-k                 `TopKGate`, whose product is in float32 as that of every gate here
    top-k, x's dtype      the same with the product in x's dtype: what a fast COMET must be compared with, too
    COMET                 `CometGate`, backend "reference"
    COMET, kernels        backend "fast"
    ..., compiled         through `torch.compile` (the reference: kernels are not traced)
    ..., graph            one CUDA graph: no time between kernels

``error``: the largest ||a - b|| / ||b|| over weights, loss terms and gradients, b from the reference in float32, before
anything is timed. bfloat16 lands between 1e-3 and 1e-2 for gradients alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from moe_lab.bench.device import captured, device_turns, peak
from moe_lab.bench.gpu_gates_problem import Problem, Step, error
from moe_lab.gates import comet_kernels
from moe_lab.names import check_name


def cases(p: Problem, compiled: bool = True) -> dict[str, Callable[[], Step]]:
    """Name -> function that prepares one step (compiling or capturing may fail: only that case is lost)."""

    def compile_(gate: nn.Module) -> Step:
        torch.compiler.reset()  # it keeps few versions of a function, and goes on uncompiled after that
        return p.step(gate, torch.compile(gate, fullgraph=True, dynamic=False))

    found: dict[str, Callable[[], Step]] = {}
    for name, gate in p.gates.items():
        found[name] = lambda gate=gate: p.step(gate)
        if compiled and name != "COMET, kernels":
            found[f"{name}, compiled"] = lambda gate=gate: compile_(gate)
        if p.device.type == "cuda" and name != "COMET":
            found[f"{name}, graph"] = lambda gate=gate: captured(p.step(gate))
    return found


def choose(p: Problem, compiled: bool = True, only: Sequence[str] = ()) -> dict[str, Callable[[], Step]]:
    """The cases to run: those named, or all that can.

    Raises:
        ValueError: a name of no case that can run here.
    """
    found = cases(p, compiled)
    for name in only:
        check_name("case", name, tuple(found))
    return {name: prepare for name, prepare in found.items() if not only or name in only}


def measure(
    p: Problem, prepared: Mapping[str, Callable[[], Step]], *, rounds: int = 5, n_steps: int = 10
) -> list[dict]:
    """One row per case of `choose`: ms (median and quartiles), of_topk, peak MiB, error (of COMET)."""
    ready, rows, expected = {}, {}, p.expected()
    for name, prepare in prepared.items():
        row = rows[name] = {"case": name, **dataclasses.asdict(p.shape), "sharpness": p.sharpness}
        try:
            if name.startswith("COMET, kernels") and not comet_kernels.usable(p.x, p.shape.experts, p.shape.k):
                raise RuntimeError("Triton cannot run here: it would be the reference")
            step = prepare()
            row["error"] = error(step(), expected) if name.startswith("COMET") else None
            row["peak_mib"] = None if name.endswith("graph") else peak(step, p.device)
            ready[name] = step
        except Exception as problem:  # a case that cannot run must not cost the others their turn on a lent GPU
            row["failed"] = f"{type(problem).__name__}: {problem}"[:500]
    del expected
    for name, timing in device_turns(ready, p.device, rounds, n_steps).items():
        first, third = timing.quartiles
        rows[name] |= {"ms": 1e3 * timing.median, "ms_q1": 1e3 * first, "ms_q3": 1e3 * third}
    topk = rows.get("top-k", {}).get("ms")
    for row in rows.values():
        row["of_topk"] = row["ms"] / topk if topk and "ms" in row else None
    return list(rows.values())
