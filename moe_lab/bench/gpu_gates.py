"""COMET's gate on one GPU beside the top-k softmax gate: forward and backward.

    python -m moe_lab.bench.gpu_gates --json report.json                   # both rows of `SHAPES`, bfloat16
    python -m moe_lab.bench.gpu_gates --tune --parts                       # block shapes first; where the time goes
    python -m moe_lab.bench.gpu_gates --sharpness 1 100                    # also splits that are nearly all decided
    python -m moe_lab.bench.gpu_gates --tokens 64 --width 16 --experts 8 --k 2 --device cpu --no-compile

Legend: T tokens, D width, E experts, K chosen experts or trees, C = (2E - 1) K logits of COMET.

A step goes from x to weights and loss terms in training mode, and back to x and all parameters of the gate, with a
random gradient of the weights and 0.01 of each loss term. Cases take turns; a step is timed by device events and the
median is shown. ``of_topk``: its time over that of "top-k", both eager. Peak memory is what one step allocates.

    top-k                 `TopKGate`, whose product is in float32 as that of every gate here
    top-k, x's dtype      the same with the product in x's dtype: what a fast COMET must be compared with, too
    COMET                 `CometGate`, backend "reference"
    COMET, kernels        backend "fast"
    ..., compiled         through `torch.compile`
    ..., graph            one CUDA graph: no time between kernels

``error``: the largest ||a - b|| / ||b|| over weights, loss terms and gradients, b from the reference in float32, before
anything is timed. bfloat16 lands between 1e-3 and 1e-2 for gradients alone. ``sharpness`` multiplies the parameters of
the splits: 1 is the start of training, where no weight is 0; at 100 most trees are decided, and the kernels leave
out the subtrees that no token of a block reaches.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_lab.bench.device import captured, circumstances, device_turns, peak
from moe_lab.bench.tables import render_all
from moe_lab.gates import CometGate, TopKGate, comet_kernels
from moe_lab.gates.base import Affine
from moe_lab.names import check_name
from moe_lab.routing import Routing
from moe_lab.runtime import pick_device

Step = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Shape:
    """Sizes of one row: T, D, E, K."""

    tokens: int
    width: int
    experts: int
    k: int

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1 or not 2 <= self.k <= self.experts:
            raise ValueError(f"sizes must be positive and k from 2 (top-1 has no gradient) to experts, got {self}")

    @property
    def logits(self) -> int:
        """C."""
        return (2 * self.experts - 1) * self.k


SHAPES = (Shape(32768, 1024, 16, 2), Shape(32768, 1024, 256, 4))


class InXsDtype(nn.Module):
    """An `Affine` map with its product in x's dtype, rounded to it."""

    def __init__(self, affine: Affine):
        super().__init__()
        self.affine = affine

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E) float32."""
        return functional.linear(x, self.affine.weight.to(x.dtype), self.affine.bias.to(x.dtype)).float()


class Problem:
    """Tokens, gates and incoming gradients, drawn from a seed.

    Args:
        shape: sizes.
        device: of everything.
        dtype: of x.
        parameters: dtype of the gates' parameters (default: that of x).
        sharpness: factor on the parameters of the splits.
        seed: of everything.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device | str,
        dtype: torch.dtype = torch.bfloat16,
        parameters: torch.dtype | None = None,
        *,
        sharpness: float = 1.0,
        seed: int = 0,
    ):
        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        generator = torch.Generator(device).manual_seed(seed)
        self.shape, self.device, self.sharpness = shape, torch.device(device), sharpness
        self.x = draw(shape.tokens, shape.width).to(dtype).requires_grad_()
        self.grad = draw(shape.tokens, shape.experts)
        sizes = shape.width, shape.experts, shape.k
        weights = torch.Generator().manual_seed(seed)
        self.gates: dict[str, nn.Module] = {
            "top-k": TopKGate(*sizes, generator=weights),
            "top-k, x's dtype": TopKGate(*sizes, generator=weights),
            "COMET": CometGate(*sizes, backend="reference", generator=weights),
        }
        self.gates["top-k, x's dtype"].logits = InXsDtype(self.gates["top-k, x's dtype"].logits)
        with torch.no_grad():
            for parameter in self.gates["COMET"].split.parameters():
                parameter.mul_(sharpness)
        for gate in self.gates.values():
            gate.to(device, parameters or dtype).train()
        kernels = self.gates["COMET, kernels"] = copy.deepcopy(self.gates["COMET"])
        kernels.backend = "fast"

    def step(self, gate: nn.Module, run: Callable[[Tensor], Routing] | None = None, x: Tensor | None = None) -> Step:
        """Forward and backward: weights, loss terms, gradients of x and the parameters. ``run``: the gate, compiled."""
        run, x = gate if run is None else run, self.x if x is None else x
        leaves = [x, *gate.parameters()]

        def step() -> list[Tensor]:
            routing = run(x)
            results = [routing.weights, *routing.losses.values()]
            grads = [self.grad, *(torch.full_like(loss, 0.01) for loss in results[1:])]
            return [*(result.detach() for result in results), *torch.autograd.grad(results, leaves, grads)]

        return step

    def expected(self) -> list[Tensor]:
        """What a step of COMET gives, by the reference in float32."""
        exact = copy.deepcopy(self.gates["COMET"]).float()
        return self.step(exact, x=self.x.detach().float().requires_grad_())()


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


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest ||a - b|| / ||b||; where b is 0, ||a||."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        size = float(b.float().norm())
        difference = float((a.float() - b.float()).norm())
        worst = max(worst, difference / size if size else difference)
    return worst


def measure(
    p: Problem, *, rounds: int = 5, n_steps: int = 10, compiled: bool = True, only: Sequence[str] = ()
) -> list[dict]:
    """One row per case: ms (median and quartiles), of_topk, peak MiB, error (of COMET)."""
    prepared, ready, rows = cases(p, compiled), {}, {}
    for name in only:
        check_name("case", name, tuple(prepared))
    expected = p.expected()
    for name, prepare in prepared.items():
        if only and name not in only:
            continue
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


def parts(p: Problem) -> dict[str, tuple[Step, float, float]]:
    """Parts of "COMET, kernels": name -> (step, floating-point operations, bytes that must move)."""
    gate, x, k = p.gates["COMET"], p.x.detach(), p.shape.k
    with torch.no_grad():
        weight = torch.cat((gate.split.weight, gate.leaf.weight)).to(x.dtype)
        bias = torch.cat((gate.split.bias, gate.leaf.bias)).float()
        logits = comet_kernels.product(weight, x.T)
        weights, log_mass, _ = comet_kernels.trees(logits, bias, k, gate.gamma, True)
        one, grad_weights = torch.ones((), device=x.device), p.grad.T.contiguous()

    def backward() -> list[Tensor]:
        given = (logits, bias, weights, log_mass, k, gate.gamma, grad_weights, one)
        return [comet_kernels.trees_backward(*given, x.dtype)]

    (grad,) = backward()
    size, numbers, out = x.element_size(), logits.numel(), 4 * weights.numel()
    flops = 2.0 * numbers * p.shape.width
    return {
        "Z = W X^T": (lambda: [comet_kernels.product(weight, x.T)], flops, 0),
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
    found = parts(p)
    timings = device_turns({name: step for name, (step, *_) in found.items()}, p.device, rounds, n_steps)
    return [
        {
            "part": name,
            "ms": 1e3 * timings[name].median,
            "tflops": flops / timings[name].median / 1e12 if flops else None,
            "gb_per_s": size / timings[name].median / 1e9 if size else None,
        }
        for name, (_, flops, size) in found.items()
    ]


def block_choices(n_experts: int) -> Iterator[comet_kernels.TreeBlocks]:
    """What to try: subtrees of 8 or 16 leaves (if a tree is not one subtree), 8, 12 or 16 warps on a multiprocessor."""
    for warps in (1, 4):
        for levels in (3, 4) if n_experts > 2**comet_kernels.WHOLE else (4,):
            for registers in (None, 168, 128):
                yield comet_kernels.TreeBlocks(warps, levels, registers)


def tune(p: Problem, n_steps: int = 20) -> dict[str, dict]:
    """Try block shapes for both kernels; the fastest stays in `comet_kernels`. Nothing to try without Triton.

    Returns:
        kernel -> its choice and ms; "failed" -> choice -> why. A kernel that no choice can run keeps what it had.
    """
    if not comet_kernels.usable(p.x, p.shape.experts, p.shape.k):
        return {}
    found, best = parts(p), {}
    for name, before in list(comet_kernels.BLOCKS.items()):
        times = {}
        for blocks in block_choices(p.shape.experts):
            comet_kernels.BLOCKS[name] = blocks
            try:
                found[name][0]()
                times[blocks] = device_turns({name: found[name][0]}, p.device, 1, n_steps)[name].median
            except Exception as problem:  # then it is not the fastest
                best.setdefault("failed", {})[f"{name} {blocks}"] = f"{type(problem).__name__}: {problem}"[:200]
        comet_kernels.BLOCKS[name] = min(times, key=times.__getitem__, default=before)
        if times:
            chosen = comet_kernels.BLOCKS[name]
            best[name] = dataclasses.asdict(chosen) | {"ms": 1e3 * times[chosen]}
    return best


def main(arguments: Sequence[str] | None = None) -> dict:
    """Parse, measure, print, write; returns what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_lab.bench.gpu_gates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, help="with the three other sizes: this one row only")
    parser.add_argument("--rows", type=int, nargs="+", choices=range(len(SHAPES)), help="of the two (default: both)")
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="only these (default: all that can run)")
    parser.add_argument("--sharpness", type=float, nargs="+", default=[1.0], help="a table for each (default: 1)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of x")
    parser.add_argument("--parameters", choices=("bfloat16", "float32"), help="their dtype (default: that of x)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each case (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per turn (default %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--parts", action="store_true", help="also time the parts of the kernels' path")
    parser.add_argument("--tune", action="store_true", help="choose the kernels' block shapes first, per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write everything")
    given = parser.parse_args(arguments)
    sizes = [getattr(given, field.name) for field in dataclasses.fields(Shape)]
    if any(sizes) and not all(sizes):
        parser.error("give all of --tokens --width --experts --k, or none")
    try:
        shapes = [Shape(*sizes)] if all(sizes) else [SHAPES[i] for i in given.rows or range(len(SHAPES))]
    except ValueError as problem:
        parser.error(str(problem))
    device = pick_device(given.device)
    dtypes = [getattr(torch, name) if name else None for name in (given.dtype, given.parameters)]
    command = shlex.join(
        ["python", "-m", "moe_lab.bench.gpu_gates", *(sys.argv[1:] if arguments is None else arguments)]
    )
    report = {"command": command, "environment": circumstances(device), "tables": []}
    print(command, report["environment"], sep="\n")
    for shape in shapes:
        for sharpness in given.sharpness:
            problem = Problem(shape, device, *dtypes, sharpness=sharpness, seed=given.seed)
            table: dict = {"shape": dataclasses.asdict(shape), "sharpness": sharpness}
            if given.tune:
                table["tuned"] = tune(problem)
                print("\n".join(f"{name}: {choice}" for name, choice in table["tuned"].items()))
            options = {"rounds": given.rounds, "n_steps": given.steps}
            table["cases"] = measure(problem, compiled=not given.no_compile, only=given.cases, **options)
            print(render_all(table["cases"]), flush=True)
            if given.parts:
                table["parts"] = measure_parts(problem, **options)
                print(render_all(table["parts"]) if table["parts"] else "no parts: Triton cannot run here", flush=True)
            report["tables"].append(table)
            if given.json:  # after each table: what was measured survives a time limit
                given.json.parent.mkdir(parents=True, exist_ok=True)
                given.json.write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
