"""Small measurements of notebook 15 on a CPU: masked or dispatched, uneven loads, kinds of zeros, skipped subtrees.

Times are processor time of one thread (`roofline.processor_seconds`), in milliseconds.

Legend: T tokens, D width, H hidden width of an expert, E experts, K experts per token, C capacity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from moe_lab.bench.exit_cases import ExitNetwork, PlantedExits
from moe_lab.bench.gpu_gates_problem import Problem as GateProblem
from moe_lab.bench.gpu_gates_problem import Shape as GateShape
from moe_lab.bench.gpu_moe import choose
from moe_lab.bench.gpu_problem import Problem, Shape
from moe_lab.bench.gpu_stages import stages
from moe_lab.bench.roofline import processor_seconds
from moe_lab.bench.timing import take_turns
from moe_lab.experts import MLPExperts, combine_experts, run_everything
from moe_lab.gates.capacity import admit, capacity


class Layer:
    """A layer of experts in float32 on a CPU, its tokens, and weights (T, E) with K non-zeros in each row.

    Args:
        shape: T, D, H, E, K.
        popular: share of all pairs that one expert gets (the first), in [1/E, 1/K]; None: all alike.
        seed: of everything.

    Raises:
        ValueError: a share that K different experts per token cannot give.
    """

    def __init__(self, shape: Shape, popular: float | None = None, seed: int = 0):
        t, d, h, e, k = dataclasses.astuple(shape)
        if popular is not None and not 1 / e <= popular <= 1 / k:
            raise ValueError(f"an expert gets from 1/E = {1 / e:g} to 1/K = {1 / k:g} of all pairs, not {popular}")
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.bank = MLPExperts(e, (d, h, d), "gelu", False, generator=generator).requires_grad_(False)
        self.x = torch.randn(t, d, generator=generator)
        scores = torch.rand(t, e, generator=generator)
        if popular is not None:  # the first expert takes part in so many tokens; the others are equally likely
            takes_part = torch.rand(t, generator=generator) < popular * k
            scores[:, 0] = torch.where(takes_part, 2.0, -1.0)
        kept, experts = scores.topk(k, dim=1)
        self.weights = torch.zeros(t, e).scatter(1, experts, kept.softmax(1))
        self.dense = [torch.randn(d, k * h, generator=generator) / d**0.5, torch.randn(k * h, d, generator=generator)]

    @property
    def counts(self) -> Tensor:
        """(E,) rows of each expert."""
        return (self.weights != 0).sum(0)

    def cases(self) -> dict[str, Callable[[], Tensor]]:
        """Forward only: every expert with masked weights; dispatched; a dense layer of K H hidden numbers."""
        return {
            "all experts, masked": lambda: run_everything(self.bank, self.x, [self.weights])[0],
            "dispatched": lambda: combine_experts(self.bank, self.x, [self.weights])[0],
            "dense, equal multiply-adds": lambda: functional.gelu(self.x @ self.dense[0]) @ self.dense[1],
        }

    def each_expert(self) -> dict[int, Callable[[], Tensor]]:
        """Expert -> its products on its own rows, already gathered: what a device that holds it would compute."""
        rows = {e: self.x[self.weights[:, e] != 0] for e in range(self.shape.experts)}
        return {e: lambda e=e: self.bank.single(e, rows[e]) for e in rows}


@torch.no_grad()
def growth(
    experts: Sequence[int], tokens: int, width: int, hidden: int, k: int, *, rounds: int = 3, seed: int = 0
) -> pd.DataFrame:
    """Milliseconds of `Layer.cases` at a fixed K for several numbers of experts; index E."""
    cases = {}
    for e in experts:
        layer = Layer(Shape(tokens, width, hidden, e, k), seed=seed)
        cases |= {(e, name): function for name, function in layer.cases().items()}
    timings = take_turns(cases, rounds=rounds, steps=3, warm_up=1)
    names = list(dict.fromkeys(name for _, name in cases))
    table = {e: {name: 1e3 * processor_seconds(timings[e, name]) for name in names} for e in experts}
    return pd.DataFrame(table).T.rename_axis("experts")


def stage_rows(problem: Problem, *, rounds: int = 3) -> list[dict]:
    """`gpu_stages.measure_stages` on a CPU: rows with the sizes, stage and ms, in processor time."""
    steps = {name: step for name, (step, *_) in stages(problem).items()}
    timings = take_turns(steps, rounds=rounds, steps=3, warm_up=1)
    sizes = dataclasses.asdict(problem.shape)
    return [sizes | {"stage": name, "ms": 1e3 * processor_seconds(timing)} for name, timing in timings.items()]


def whole_steps(
    problem: Problem, names: Sequence[str] = ("dense", "plain", "ours"), *, rounds: int = 3
) -> pd.DataFrame:
    """Forward and backward of cases of `gpu_moe` on a CPU: index case; ms, and of_dense (throughput, dense is 1)."""
    steps = {name: case.prepare() for name, case in choose(problem, compiled=False, only=names).items()}
    timings = take_turns(steps, rounds=rounds, steps=3, warm_up=1)
    ms = pd.Series({name: 1e3 * processor_seconds(timing) for name, timing in timings.items()})
    return pd.DataFrame({"ms": ms, "of_dense": ms["dense"] / ms}).rename_axis("case")


@torch.no_grad()
def loads(layers: dict[str, Layer], *, rounds: int = 5) -> tuple[pd.DataFrame, dict[str, list[float]]]:
    """One device against one for each expert.

    Returns:
        Index name of the layer; columns whole_ms (dispatched, on this machine), mean_ms and slowest_ms of the experts
        alone, times (slowest / mean), largest (rows / mean rows). And name -> E milliseconds of the experts.
    """
    cases: dict[tuple, Callable[[], Tensor]] = {}
    for name, layer in layers.items():
        cases[name, "whole"] = layer.cases()["dispatched"]
        cases |= {(name, e): function for e, function in layer.each_expert().items()}
    timings = take_turns(cases, rounds=rounds, steps=2, warm_up=1)
    table, each = {}, {}
    for name, layer in layers.items():
        each[name] = [1e3 * processor_seconds(timings[name, e]) for e in range(layer.shape.experts)]
        mean = sum(each[name]) / len(each[name])
        table[name] = {
            "whole_ms": 1e3 * processor_seconds(timings[name, "whole"]),
            "mean_ms": mean,
            "slowest_ms": max(each[name]),
            "times": max(each[name]) / mean,
            "largest": float(layer.counts.max() / layer.counts.double().mean()),
        }
    return pd.DataFrame(table).T, each


def capacities(weights: Tensor, factors: Sequence[float | None]) -> pd.DataFrame:
    """What a capacity does to a routing; counted, not timed.

    Args:
        weights: (T, E).
        factors: of `capacity`; None: no limit.

    Returns:
        Index factor; columns capacity, dropped (share of pairs), padded (share of the E C rows without a pair), largest
        (rows of the largest expert / fair share).
    """
    chosen = weights != 0
    pairs, (n_tokens, n_experts) = int(chosen.sum()), chosen.shape
    k, table = -(-pairs // n_tokens), {}
    for factor in factors:
        limit = int(chosen.sum(0).max()) if factor is None else capacity(factor, n_tokens, n_experts, k)
        kept = admit(chosen, limit)
        table["none" if factor is None else f"{factor:g}"] = {
            "capacity": limit,
            "dropped": 1 - int(kept.sum()) / pairs,
            "padded": 1 - int(kept.sum()) / (n_experts * limit),
            "largest": int(kept.sum(0).max()) * n_experts / pairs,
        }
    return pd.DataFrame(table).T.rename_axis("capacity factor")


@torch.no_grad()
def kinds_of_zeros(n: int, share: float, *, block: int = 32, rounds: int = 3, seed: int = 0) -> pd.DataFrame:
    """An (n, n) product with a matrix of which a share is 0, by where the zeros are and who knows of them.

    Args:
        n: a multiple of ``block``.
        share: of the zeros, in (0, 1).
        block: side of the blocks that are 0 as a whole.

    Returns:
        Index way; columns ms, times (faster than without zeros), operations (share of the full product's).
    """
    generator = torch.Generator().manual_seed(seed)
    x, full = torch.randn(n, n, generator=generator), torch.randn(n, n, generator=generator)
    scattered = full * (torch.rand(n, n, generator=generator) >= share)
    listed = scattered.T.contiguous().to_sparse()
    columns = torch.randperm(n // block, generator=generator)[: max(1, round((1 - share) * n / block))]
    kept = (columns[:, None] * block + torch.arange(block)).flatten().sort().values
    narrow = full[:, kept].contiguous()
    cases = {
        "no zeros": lambda: x @ full,
        "zeros anywhere, dense product": lambda: x @ scattered,
        "zeros anywhere, list of non-zeros": lambda: torch.sparse.mm(listed, x.T),
        "whole columns are 0 and left out": lambda: x @ narrow,
    }
    timings = take_turns(cases, rounds=rounds, steps=3, warm_up=1)
    done = [1.0, 1.0, float((scattered != 0).double().mean()), len(kept) / n]
    ms = [1e3 * processor_seconds(timing) for timing in timings.values()]
    table = {"ms": ms, "times": [ms[0] / value for value in ms], "operations": done}
    return pd.DataFrame(table, index=list(cases))


def exit_times(
    size: ExitNetwork, batches: Sequence[int] = (1, 32, 256), *, images: int = 32, rounds: int = 5, seed: int = 0
) -> pd.DataFrame:
    """The cases of `exit_cases` for each batch size.

    Args:
        size: of the network.
        batches: images per call.
        images: per timed step, at least.
        rounds: turns of each case.
        seed: of weights and images.

    Returns:
        Index batch; columns plain, full, predict, nobody: ms per call; ratio of multiply-adds; over_plain, over_full:
        times faster.
    """
    planted, table = PlantedExits(size, max(*batches, images), seed), {}
    for batch in batches:
        calls = -(-images // batch)
        chosen = planted.mixture(calls * batch)
        timings = take_turns(planted.cases(chosen, batch), rounds=rounds, steps=2, warm_up=1)
        row = {name: 1e3 * processor_seconds(timing) / calls for name, timing in timings.items()}
        row["ratio"] = 1 / float(planted.network.predict(chosen).cost.mean())
        row |= {f"over_{name}": row[name] / row["predict"] for name in ("plain", "full")}
        table[batch] = row
    return pd.DataFrame(table).T.rename_axis("batch")


@torch.no_grad()
def skipped_subtrees(
    sharpness: Sequence[float], n_experts: int, k: int, *, tokens: int = 512, width: int = 64, levels: int = 4,
    block: int = 32, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Exact zeros of COMET's gate, and how much of them a kernel can use.

    Args:
        sharpness: factors on the parameters of the splits: small is the start of training.
        n_experts, k: E and K of the gate.
        tokens, width: T and D.
        levels: a subtree has 2^levels leaves, as in `comet_kernels`.
        block: tokens that a kernel handles together; it leaves out a subtree that none of them reaches.

    Returns:
        Index sharpness; columns zeros (share of the (T, E) weights), by_token (share of (token, subtree) that the token
        does not reach), by_block (share of (block, subtree) that nobody reaches).
    """
    table = {}
    for sharp in sharpness:
        p = GateProblem(GateShape(tokens, width, n_experts, k), "cpu", torch.float32, sharpness=sharp, seed=seed)
        gate = p.gates["COMET"]
        gate.reads_details = True
        routing = gate(p.x.detach())
        leaves = routing.details["tree_probabilities"] > 0  # (T, E, K)
        subtrees = leaves.unflatten(1, (-1, min(2**levels, n_experts))).any(2)
        blocks = subtrees[: tokens // block * block].unflatten(0, (-1, block)).any(1)
        table[sharp] = {
            "zeros": float((routing.weights == 0).double().mean()),
            "by_token": 1 - float(subtrees.double().mean()),
            "by_block": 1 - float(blocks.double().mean()),
        }
    return pd.DataFrame(table).T.rename_axis("sharpness")
