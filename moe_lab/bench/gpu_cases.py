"""The MoE layer on one GPU beside a dense layer of equal multiply-adds.

    python -m moe_lab.bench.gpu_cases --json report.json                  # the three rows below
    python -m moe_lab.bench.gpu_cases --parts                             # where the time of our layer goes
    python -m moe_lab.bench.gpu_cases --tune --rows 0                     # tries block shapes for each kernel first
    python -m moe_lab.bench.gpu_cases --tokens 64 --width 16 --hidden 32 --experts 4 --k 2 --device cpu

Legend: T tokens, D width, H hidden width of an expert, E experts, K experts per token.

Forward and backward, for x, the gate's weights and all parameters: 12 T K D H floating-point operations (a multiply-add
is two), whatever else a case computes. Cases take turns within a round; each step is timed by device events and the
median is shown. Peak memory is what one step allocates beyond its inputs. Before anything is timed, every case's output
and gradients are compared with a loop over experts in float32, by ||a - b|| / ||b||; bfloat16 lands between 1e-3 and
1e-2. With ``--bias`` the package's reference path (`combine_experts`) runs as well.

ScatterMoE (Tan et al. 2024) is another package: timed where it can be imported, left out where not.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import random
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from moe_lab.bench.timing import Timing, take_turns
from moe_lab.experts import MLPExperts, combine_experts, kernels
from moe_lab.experts.fast import groupable, grouped_mlp
from moe_lab.runtime import environment, pick_device

Step = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Shape:
    """Sizes of one row: T, D, H, E, K."""

    tokens: int
    width: int
    hidden: int
    experts: int
    k: int

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1 or self.k > self.experts:
            raise ValueError(f"sizes must be at least 1 and k at most the number of experts, got {self}")

    @property
    def flops(self) -> int:
        """Floating-point operations of the active experts, forward and backward."""
        return 12 * self.tokens * self.k * self.width * self.hidden


SHAPES = (
    Shape(32768, 1024, 4096, 16, 2),
    Shape(32768, 2048, 1024, 64, 8),
    Shape(32768, 1024, 4096, 16, 1),
)


TILES = (  # to try for our own products; compiled for sm_90, the 256-wide ones spill a few registers at the end
    kernels.Product(128, 128, 8, depth=64, stages=3, registers=128),
    kernels.Product(128, 128, 8, depth=64, stages=4, registers=None),
    kernels.Product(128, 256, 8, depth=64, stages=3, registers=None),
    kernels.Product(128, 256, 8, depth=64, stages=4, registers=None),
    kernels.Product(64, 256, 8, depth=64, stages=2, registers=128),
    kernels.Product(256, 128, 8, depth=64, stages=3, registers=None),
)


class Problem:
    """Inputs, parameters and an incoming gradient, drawn from a seed; the routing is uniform, or uneven by ``skew``.

    Args:
        shape: sizes.
        activation: "gelu" or "relu".
        bias: with biases, as `MLPExperts` has them, or without.
        skew: standard deviation of each expert's advantage in the routing, in standard deviations of the logits.

    Raises:
        ValueError: rows that `grouped_mm` does not take.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device | str,
        dtype: torch.dtype = torch.bfloat16,
        *,
        activation: str = "gelu",
        bias: bool = False,
        skew: float = 0.0,
        seed: int = 0,
    ):
        if not groupable(dtype, shape.experts, shape.width, shape.hidden):
            raise ValueError(f"{dtype} rows of width and hidden must be whole multiples of 16 bytes, got {shape}")
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
            return (torch.randn(size, generator=generator, device=device) * scale).to(kind).requires_grad_()

        t, d, h, e, k = dataclasses.astuple(shape)
        self.shape, self.activation = shape, activation
        self.x, self.grad = draw(t, d), draw(t, d).detach()
        logits = draw(t, e, kind=torch.float32).detach() + skew * draw(1, e, kind=torch.float32).detach()
        kept, self.experts = logits.topk(k, dim=1)
        self.values = kept.softmax(1).requires_grad_() if k > 1 else logits.softmax(1).amax(1, True).requires_grad_()
        self.weights = torch.zeros_like(logits).scatter(1, self.experts, self.values.detach()).requires_grad_()
        self.w1, self.w2 = draw(e, d, h, scale=d**-0.5), draw(e, h, d, scale=h**-0.5)
        self.b1, self.b2 = (draw(e, h), draw(e, d)) if bias else (None, None)
        self.dense = [draw(k * h, d, scale=d**-0.5), draw(d, k * h, scale=h**-0.5)]
        self.dense_bias = [draw(k * h), draw(d)] if bias else [None, None]

    @property
    def parameters(self) -> list[Tensor]:
        """Of the experts."""
        return [p for p in (self.w1, self.b1, self.w2, self.b2) if p is not None]

    def in_float32(self) -> Problem:
        """The same numbers in float32."""
        twin = object.__new__(Problem)
        vars(twin).update(vars(self))
        for name in ("x", "grad", "w1", "b1", "w2", "b2"):
            value = getattr(self, name)
            setattr(twin, name, None if value is None else value.detach().float().requires_grad_(name != "grad"))
        return twin

    def step(self, forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Step:
        """Forward and backward: the output and the gradients of ``leaves``."""

        def run() -> list[Tensor]:
            y = forward()
            return [y.detach(), *torch.autograd.grad(y, leaves, self.grad)]

        return run


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


def loop_layer(p: Problem) -> Tensor:
    """Expert by expert, in plain products: the oracle."""
    y, act = torch.zeros_like(p.x), getattr(functional, p.activation)
    biases = [b.unbind() if b is not None else [0.0] * p.shape.experts for b in (p.b1, p.b2)]
    for e, (w1, b1, w2, b2) in enumerate(zip(p.w1.unbind(), biases[0], p.w2.unbind(), biases[1], strict=True)):
        token, slot = (p.experts == e).nonzero(as_tuple=True)
        out = act(p.x.index_select(0, token) @ w1 + b1) @ w2 + b2
        y = y.index_add(0, token, out * p.values[token, slot, None])
    return y


def _captured(step: Step) -> Step:
    """The step as one CUDA graph. Raises if anything in it waits for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> list[Tensor]:
        graph.replay()
        return result

    return replay


def _scattermoe(p: Problem) -> Step:
    from scattermoe.mlp import MLP

    act = getattr(functional, p.activation)
    mlp = MLP(p.shape.width, p.shape.hidden, p.shape.experts, p.shape.k, activation=act).to(p.x.device, p.x.dtype)
    with torch.no_grad():  # its weights are (E, out, in)
        mlp.experts.weight.copy_(p.w1.transpose(1, 2))
        mlp.output_experts.weight.copy_(p.w2.transpose(1, 2))
    leaves = [p.x, p.values, mlp.experts.weight, mlp.output_experts.weight]
    step = p.step(lambda: mlp(p.x, p.values.to(p.x.dtype), p.experts), leaves)

    def run() -> list[Tensor]:
        y, grad_x, grad_values, grad_w1, grad_w2 = step()
        return [y, grad_x, grad_values, grad_w1.transpose(1, 2), grad_w2.transpose(1, 2)]

    return run


def _reference(p: Problem) -> Step:
    bank = MLPExperts(p.shape.experts, (p.shape.width, p.shape.hidden, p.shape.width), p.activation, False)
    for own, given in zip(bank.parameters(), (p.w1, p.w2, p.b1, p.b2), strict=True):
        own.data = given.detach()
    leaves = [p.x, p.weights, bank.weights[0], bank.biases[0], bank.weights[1], bank.biases[1]]
    return p.step(lambda: combine_experts(bank, p.x, [p.weights])[0], leaves)


def steps(p: Problem, compiled: bool = True) -> dict[str, Callable[[], Step]]:
    """Name -> function that prepares one step (compiling or capturing may fail: only that case is lost)."""
    parameters, dense = p.parameters, [v for v in (*p.dense, *p.dense_bias) if v is not None]
    pairs, layer = (p.experts, p.values), (p.w1, p.b1, p.w2, p.b2, p.activation)
    leaves = [p.x, p.values, *parameters]

    def ours(function: Callable[..., Tensor] = grouped_mlp, **options) -> Step:
        return p.step(lambda: function(p.x, pairs, *layer, **options), leaves)

    def any_pattern() -> Step:
        return p.step(lambda: grouped_mlp(p.x, p.weights, *layer), [p.x, p.weights, *parameters])

    def compiled_dense() -> Step:
        function = torch.compile(dense_layer, dynamic=False)
        return p.step(lambda: function(p.x, p.dense, p.dense_bias, p.activation), [p.x, *dense])

    cases: dict[str, Callable[[], Step]] = {
        "dense": lambda: p.step(lambda: dense_layer(p.x, p.dense, p.dense_bias, p.activation), [p.x, *dense]),
        "plain": lambda: p.step(lambda: plain_layer(p), leaves),
        "ours": ours,
        "ours, any pattern": any_pattern,
        "ours, recompute": lambda: ours(recompute=True),
        "ours, fused backward": lambda: ours(fused=("backward",)),
        "ours, both fused": lambda: ours(fused=("forward", "backward")),
    }
    if p.x.device.type == "cuda":
        cases["ours, CUDA graph"] = lambda: _captured(ours())
    if compiled:
        cases["dense, compiled"] = compiled_dense
        cases["ours, compiled"] = lambda: ours(torch.compile(grouped_mlp, fullgraph=True, dynamic=False))
    if p.b1 is not None:
        cases["reference"] = lambda: _reference(p)
    if importlib.util.find_spec("scattermoe") and p.b1 is None:
        cases["ScatterMoE"] = lambda: _scattermoe(p)
    return cases


def error(p: Problem, found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest ||a - b|| / ||b|| over output and gradients."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:  # the gradient of (T, E) weights, where only the routed ones are known
            a = a.gather(1, p.experts)
        worst = max(worst, float((a.float() - b.float()).norm() / b.float().norm()))
    return worst


def _peak(step: Step, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def device_turns(cases: dict[str, Step], device: torch.device, rounds: int, n_steps: int) -> dict[str, Timing]:
    """`take_turns`; on CUDA with events between steps, so that the host runs ahead as it does in training."""
    if device.type != "cuda":
        return take_turns(cases, rounds=rounds, steps=n_steps, warm_up=1)
    timings, order = {name: Timing() for name in cases}, random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(cases), len(cases)):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(n_steps + 1)]
            cases[name]()
            for event in events[:-1]:
                event.record()
                cases[name]()
            events[-1].record()
            torch.cuda.synchronize()
            seconds = [1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]
            timings[name].wall.extend(seconds)
    return timings


def measure(
    p: Problem, *, rounds: int = 5, n_steps: int = 5, compiled: bool = True, only: Sequence[str] = ()
) -> list[dict]:
    """One row per case: ms (median and quartiles), TFLOP/s, their ratio to "dense", peak MiB, error."""
    device, ready, rows = p.x.device, {}, {}
    exact = p.in_float32()
    leaves = [exact.x, exact.values, *exact.parameters]
    expected = exact.step(functools.partial(loop_layer, exact), leaves)()
    for name, prepare in steps(p, compiled).items():
        if only and name not in only:
            continue
        rows[name] = {"case": name, **dataclasses.asdict(p.shape)}
        try:
            step = prepare()
            found = step()
            rows[name]["error"] = None if name.startswith("dense") else error(p, found, expected)
            rows[name]["peak_mib"] = None if "graph" in name else _peak(step, device)
            ready[name] = step
        except Exception as problem:  # a case that cannot run must not cost the others their turn on a lent GPU
            rows[name]["failed"] = f"{type(problem).__name__}: {problem}"[:500]
    del expected, exact, leaves
    for name, timing in device_turns(ready, device, rounds, n_steps).items():
        first, third = timing.quartiles
        rows[name] |= {"ms": 1e3 * timing.median, "ms_q1": 1e3 * first, "ms_q3": 1e3 * third}
        rows[name]["tflops"] = p.shape.flops / timing.median / 1e12
    dense = rows.get("dense", {}).get("tflops")
    for row in rows.values():
        row["of_dense"] = row["tflops"] / dense if dense and "tflops" in row else None
    return list(rows.values())


def stages(p: Problem) -> dict[str, tuple[Step, float, float]]:
    """The stages of our layer: name -> (step, floating-point operations, bytes that must move)."""
    t, d, h, _, k = dataclasses.astuple(p.shape)
    with torch.no_grad():
        flat, value = p.experts.flatten(), p.values.detach().flatten()
        w1, w2, b1 = (w if w is None else w.detach() for w in (p.w1, p.w2, p.b1))
        place, ends, g = kernels.expert_order(flat, value, p.shape.experts)
        rows = kernels.scatter_rows(p.x.detach(), place, k)
        z = functional.grouped_mm(rows, w1, offs=ends)
        a = kernels.activate(z, b1, g, ends, p.activation)
        grad, dz = torch.randn_like(z), torch.randn_like(z)  # two: activate_backward writes over its own
    size, product = z.element_size(), 2.0 * t * k * d * h
    move, pass_h = (1 + k) * t * d * size, t * k * h * size
    w1_t, w2_t = w1.transpose(1, 2), w2.transpose(1, 2)

    def mm(left: Tensor, right: Tensor) -> Step:
        return lambda: [functional.grouped_mm(left, right, offs=ends)]

    parts: dict[str, tuple[Step, float, float]] = {
        "expert_order": (lambda: [kernels.expert_order(flat, value, p.shape.experts)[0]], 0, 20.0 * t * k),
        "scatter_rows, twice a step": (lambda: [kernels.scatter_rows(p.x.detach(), place, k)], 0, move),
        "Z = X W1": (mm(rows, w1), product, 0),
        "activate": (lambda: [kernels.activate(z, b1, g, ends, p.activation)], 0, 2 * pass_h),
        "A W2": (mm(a, w2), product, 0),
        "sum_rows, twice a step": (lambda: [kernels.sum_rows(rows, place, k, t)], 0, move),
        "dA = G W2^T": (mm(rows, w2_t), product, 0),
        "activate_backward": (
            lambda: [kernels.activate_backward(z, b1, g, ends, p.activation, grad, False)[0]], 0, 3 * pass_h
        ),
        "dW2 = A^T G": (mm(a.T, rows), product, 0),
        "dX = dZ W1^T": (mm(dz, w1_t), product, 0),
        "dW1 = X^T dZ": (mm(rows.T, dz), product, 0),
    }  # fmt: skip
    if kernels.fusable(z, h, d):

        def fused() -> list[Tensor]:
            return [kernels.hidden_gradient(rows, w2, z, b1, g, ends, p.activation)[0]]

        def fused_forward() -> list[Tensor]:
            return [kernels.hidden(rows, w1, b1, g, ends, p.activation)[0]]

        parts["hidden_gradient, for dA and activate_backward"] = fused, product, 0
        if kernels.fusable(z, inner=d):
            parts["hidden, for Z and activate"] = fused_forward, product, 0
    return parts


def measure_stages(p: Problem, rounds: int = 5, n_steps: int = 5) -> list[dict]:
    """One row per stage: ms, and TFLOP/s or GB/s."""
    parts = stages(p)
    timings = device_turns({name: step for name, (step, *_) in parts.items()}, p.x.device, rounds, n_steps)
    return [
        {
            "stage": name,
            "ms": 1e3 * timings[name].median,
            "tflops": flops / timings[name].median / 1e12 if flops else None,
            "gb_per_s": size / timings[name].median / 1e9 if size else None,
        }
        for name, (_, flops, size) in parts.items()
    ]


def block_choices() -> Iterator[kernels.Blocks]:
    """What to try for the kernels that wait for memory: rows of 512 bytes to 2 KB, 16 or 32 numbers per thread."""
    for columns in (256, 512, 1024):
        for warps in (4, 8):
            for per_thread in (16, 32):
                yield kernels.Blocks(32 * warps * per_thread // columns, columns, warps)


def tune(p: Problem, n_steps: int = 10) -> dict[str, dict]:
    """Try block shapes kernel by kernel; the fastest stays in `kernels`. Nothing to try without Triton."""
    if not kernels.usable(p.x):
        return {}
    parts = {label.split(",")[0]: part[0] for label, part in stages(p).items()}
    best: dict[str, dict] = {}

    def fastest(name: str, choices: Iterable[kernels.Blocks], use: Callable[[kernels.Blocks], None]) -> None:
        times: dict[kernels.Blocks, float] = {}
        for blocks in choices:
            use(blocks)
            try:
                parts[name]()
                times[blocks] = device_turns({name: parts[name]}, p.x.device, 1, n_steps)[name].median
            except Exception as problem:  # too much shared memory, say: then it is not the fastest
                best.setdefault("failed", {})[f"{name} {blocks}"] = f"{type(problem).__name__}: {problem}"[:200]
        use(min(times, key=times.__getitem__))
        best[name] = dataclasses.asdict(min(times, key=times.__getitem__)) | {"ms": 1e3 * min(times.values())}

    for name in kernels.BLOCKS:
        fastest(name, block_choices(), functools.partial(kernels.BLOCKS.__setitem__, name))
    for name in kernels.PRODUCTS.keys() & parts.keys():
        fastest(name, TILES, functools.partial(kernels.PRODUCTS.__setitem__, name))
    return best


def render(rows: list[dict]) -> str:
    """A table of the columns that the first row or any other has; None is shown as "-"."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("failed", "ms_q1", "ms_q3")))

    def show(value: object) -> str:
        if value is None:
            return "-"
        return value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 10 else f"{value:.0f}"

    lines = [names, *([show(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(text + [f"{row['case']} failed: {row['failed']}" for row in rows if "failed" in row])


def main(arguments: Sequence[str] | None = None) -> dict:
    """Parse, measure, print, write; returns what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_lab.bench.gpu_cases",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, help="with the four other sizes: this one row only")
    parser.add_argument("--rows", type=int, nargs="+", choices=range(len(SHAPES)), help="of the three (default: all)")
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="only these (default: all that can run)")
    parser.add_argument("--activation", choices=("gelu", "relu"), default="gelu")
    parser.add_argument("--bias", action="store_true", help="layers with biases, as MLPExperts has them")
    parser.add_argument("--skew", type=float, default=0.0, help="uneven routing (default 0: uniform)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each case (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per turn (default %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--parts", action="store_true", help="also time the stages of our layer")
    parser.add_argument("--tune", action="store_true", help="choose the kernels' block shapes first, per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write everything")
    given = parser.parse_args(arguments)
    sizes = [getattr(given, field.name) for field in dataclasses.fields(Shape)]
    if any(sizes) and not all(sizes):
        parser.error("give all of --tokens --width --hidden --experts --k, or none")
    shapes = [Shape(*sizes)] if all(sizes) else [SHAPES[i] for i in given.rows or range(len(SHAPES))]
    device = pick_device(given.device)
    triton_version = kernels.triton.__version__ if kernels.triton else None
    command = shlex.join(
        ["python", "-m", "moe_lab.bench.gpu_cases", *(sys.argv[1:] if arguments is None else arguments)]
    )
    report = {"command": command, "environment": environment(device) | {"triton": triton_version}, "tables": []}
    print(command, report["environment"], sep="\n")
    for shape in shapes:
        problem = Problem(
            shape, device, getattr(torch, given.dtype), activation=given.activation, bias=given.bias, skew=given.skew,
            seed=given.seed,
        )  # fmt: skip
        table: dict = {"shape": dataclasses.asdict(shape)}
        if given.tune:
            table["tuned"] = tune(problem)
            print("\n".join(f"{name}: {choice}" for name, choice in table["tuned"].items()))
        options = {"rounds": given.rounds, "n_steps": given.steps}
        table["cases"] = measure(problem, compiled=not given.no_compile, only=given.cases, **options)
        print(render(table["cases"]), flush=True)
        if given.parts:
            table["stages"] = measure_stages(problem, **options)
            print(render(table["stages"]), flush=True)
        report["tables"].append(table)
        if given.json:  # after each row: what was measured survives a time limit
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
