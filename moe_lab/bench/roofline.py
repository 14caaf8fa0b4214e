"""The roofline: no stage is faster than its operations or its bytes allow (Williams et al. 2009).

Legend: T tokens, D width, H hidden width of an expert, E experts, K experts per token, N = T K routed pairs, s bytes
per number; P operations per second and B bytes per second of a machine.

    seconds >= max(operations / P, bytes / B)          intensity I = operations / bytes;  I* = P / B, the ridge

Left of the ridge (I < I*) bytes decide, right of it operations. A grouped product of N rows, (N, D) x (E, D, H), has
2 N D H operations and moves s (N D + E D H + N H) bytes if each number moves once: with n = N / E rows per expert

    I = 2 n D H / (s (n D + D H + n H)) = (2 / s) / (1 / n + 1 / D + 1 / H),     about 2 n / s while n << D, H

P and B are not taken from a data sheet. On this CPU they are measured, by one product and one copy; on a recorded GPU
they are the best of all stages of that card: a ceiling that was reached, which the hardware's own may exceed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch

from moe_lab.bench.gpu_problem import Shape
from moe_lab.bench.timing import Timing, take_turns

TWICE = ", twice a step"
"""How the benchmark marks a stage that a step has twice; its row shows one of them."""

OWN = ", for "
"""How it marks a product of our own, which takes the place of a grouped_mm in the layer: ``product, for Z``."""


def processor_seconds(timing: Timing) -> float:
    """Median processor time of a step: with one thread that of an idle machine, on a busy one without the waiting."""
    return statistics.median(timing.cpu)


class Work(NamedTuple):
    """What a stage cannot avoid: floating-point ``operations`` and ``bytes`` to and from memory."""

    operations: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.bytes


class Ceiling(NamedTuple):
    """A machine: ``operations`` and ``bytes`` per second."""

    operations: float
    bytes: float

    @property
    def ridge(self) -> float:
        """Operations per byte at which both limits meet."""
        return self.operations / self.bytes

    def seconds(self, work: Work) -> float:
        """The least time that the work takes."""
        return max(work.operations / self.operations, work.bytes / self.bytes)

    def attainable(self, intensity: float) -> float:
        """Operations per second at most, at that many operations per byte."""
        return min(self.operations, intensity * self.bytes)


def product_work(rows: float, inner: float, outer: float, groups: int, size: int) -> Work:
    """Rows (N, inner) in ``groups`` times one matrix (inner, outer) each; every number moves once."""
    return Work(2.0 * rows * inner * outer, size * (rows * inner + groups * inner * outer + rows * outer))


def rows_to_compute(ceiling: Ceiling, inner: float, outer: float, size: int) -> float:
    """Rows per group from which operations decide in `product_work`; infinite if they never do."""
    left = 2 / (size * ceiling.ridge) - 1 / inner - 1 / outer
    return 1 / left if left > 0 else math.inf


def layer_work(shape: Shape, size: int) -> dict[str, Work]:
    """Stage of `gpu_stages` -> work of one call, both kernels and plain operations.

    Args:
        shape: T, D, H, E, K.
        size: s, bytes per number.

    Returns:
        Stages that only move numbers have 0 operations. Bytes are those of `gpu_stages`, and for products those of the
        docstring above.
    """
    t, d, h, e, k = dataclasses.astuple(shape)
    n = t * k
    product, move, hidden = product_work(n, d, h, e, size), Work(0.0, (1 + k) * t * d * size), n * h * size
    return {
        "expert_order": Work(0.0, 20.0 * n),
        f"scatter_rows{TWICE}": move,
        "Z = X W1": product,
        "activate": Work(0.0, 2 * hidden),
        "A W2": product,
        f"sum_rows{TWICE}": move,
        "dA = G W2^T": product,
        "activate_backward": Work(0.0, 3 * hidden),
        "dW2 = A^T G": product,
        "dX = dZ W1^T": product,
        "dW1 = X^T dZ": product,
    }


def is_product(stage: str) -> bool:
    """It is one of the six grouped products; the others move numbers."""
    return "W" in stage


def grouped_stage(own: str) -> str:
    """The product whose place a stage `OWN` takes: ``product, for dA`` -> ``dA = G W2^T``.

    Raises:
        ValueError: it takes the place of none.
    """
    name = own.partition(OWN)[2]
    for stage in layer_work(Shape(1, 1, 1, 1, 1), 1):
        if stage == name or stage.startswith(f"{name} = "):
            return stage
    raise ValueError(f"{own!r} takes the place of no product of the layer")


def measured_ceiling(n: int = 1024, numbers: int = 2**24, rounds: int = 3) -> Ceiling:
    """This CPU in float32, one thread: an (n, n) product, and a copy of so many numbers, which are read and written.

    Args:
        n: of the product; large enough that operations decide.
        numbers: of the copy; far more than the caches hold.
        rounds: turns of both.
    """
    left, right = torch.randn(n, n), torch.randn(n, n)
    source, target = torch.randn(numbers), torch.empty(numbers)
    cases = {"product": lambda: torch.mm(left, right), "copy": lambda: target.copy_(source)}
    timings = take_turns(cases, rounds=rounds, steps=3, warm_up=1)
    best = {name: min(timing.cpu) for name, timing in timings.items()}  # a ceiling: disturbances only lower it
    return Ceiling(2.0 * n**3 / best["product"], 2.0 * source.element_size() * numbers / best["copy"])


def recorded_ceiling(rows: Iterable[Mapping[str, Any]]) -> Ceiling:
    """The highest operations and bytes per second among rows with ``tflops`` and ``gb_per_s``.

    Raises:
        ValueError: no row has the one or the other.
    """
    rows = list(rows)
    operations = [row["tflops"] for row in rows if row.get("tflops")]
    moved = [row["gb_per_s"] for row in rows if row.get("gb_per_s")]
    if not operations or not moved:
        raise ValueError("a ceiling needs rows with tflops and rows with gb_per_s: record with --parts")
    return Ceiling(1e12 * max(operations), 1e9 * max(moved))


def against_ceiling(rows: Sequence[Mapping[str, Any]], size: int, ceiling: Ceiling) -> pd.DataFrame:
    """The layer as it runs, from rows of the curve ``stages`` of one shape, beside the bounds of its stages.

    Args:
        rows: with the sizes, stage and ms. Where a product of our own was measured, its time is that of the stage.
        size: bytes per number.
        ceiling: of the machine that measured them.

    Returns:
        Index stage (without "twice a step"); columns calls (in a step), ms (of all calls), bound_ms (likewise),
        reached (bound / measured), intensity, limit ("operations" or "bytes"), product (bool), own (bool: it is a
        product of our own).
    """
    table, own = [], {grouped_stage(row["stage"]): row["ms"] for row in rows if OWN in row["stage"]}
    for row in rows:
        shape = Shape(*(row[field.name] for field in dataclasses.fields(Shape)))
        work = layer_work(shape, size).get(row["stage"])
        if work is None:
            continue
        calls, bound = 1 + row["stage"].endswith(TWICE), 1e3 * ceiling.seconds(work)
        ms = own.get(row["stage"], row["ms"])
        table.append(
            {
                "stage": row["stage"].removesuffix(TWICE),
                "calls": calls,
                "ms": calls * ms,
                "bound_ms": calls * bound,
                "reached": bound / ms,
                "intensity": work.intensity,
                "limit": "operations" if work.intensity >= ceiling.ridge else "bytes",
                "product": is_product(row["stage"]),
                "own": row["stage"] in own,
            }
        )
    return pd.DataFrame(table).set_index("stage")


def product_curve(
    rows_per_expert: Sequence[int], width: int, hidden: int, n_experts: int, *, rounds: int = 3, seed: int = 0
) -> pd.DataFrame:
    """Products (n, D) x (D, H) of E experts in turn on this CPU, float32, for each n: what few rows per expert cost.

    Returns:
        Index n; columns ms (all E products), intensity (operations per byte), operations_per_s.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n_experts, width, hidden, generator=generator)
    inputs = {n: torch.randn(n, width, generator=generator) for n in rows_per_expert}

    def step(x: torch.Tensor) -> None:
        for weight in weights:
            torch.mm(x, weight)

    cases = {str(n): lambda x=x: step(x) for n, x in inputs.items()}
    timings = take_turns(cases, rounds=rounds, steps=2, warm_up=1)
    table = {}
    for n in rows_per_expert:
        work = product_work(n * n_experts, width, hidden, n_experts, weights.element_size())
        seconds = processor_seconds(timings[str(n)])
        table[n] = {"ms": 1e3 * seconds, "intensity": work.intensity, "operations_per_s": work.operations / seconds}
    return pd.DataFrame(table).T.rename_axis("rows per expert")
