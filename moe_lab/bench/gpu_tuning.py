"""Trying block shapes for the kernels of the MoE layer, kernel by kernel, on the problem that will be measured."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from moe_lab.bench.device import device_turns
from moe_lab.bench.gpu_problem import Problem, Step
from moe_lab.bench.gpu_stages import stages
from moe_lab.experts import kernels

Blocks = TypeVar("Blocks")
TILES = (  # to try for our own products; compiled for sm_90, none of them spills registers
    kernels.Product(128, 256, 8, depth=64, stages=3),
    kernels.Product(128, 256, 8, depth=64, stages=4),
    kernels.Product(128, 256, 8, depth=64, stages=4, pieces=4),
    kernels.Product(256, 128, 8, depth=64, stages=4),
    kernels.Product(128, 128, 8, depth=64, stages=3, registers=128, programs=2),
)


def block_choices(name: str) -> Iterator[kernels.Blocks]:
    """What to try for a kernel that waits for memory: rows of 512 bytes to 2 KB, 16 or 32 numbers per thread; and for
    those that handle several blocks in turn, how many are in flight."""
    in_flight = (1, 2, 3) if name.startswith("activate") else (1,)
    for columns, warps, per_thread, depth in itertools.product((256, 512, 1024), (4, 8), (16, 32), in_flight):
        yield kernels.Blocks(32 * warps * per_thread // columns, columns, warps, depth)


def keep_fastest(
    name: str,
    step: Callable[[], object],
    choices: Iterable[Blocks],
    table: dict[str, Blocks],
    device: torch.device | str,
    n_steps: int,
    best: dict[str, dict],
) -> None:
    """Time a kernel's step with each choice of blocks; the fastest stays in ``table[name]``.

    ``best`` is told: kernel -> its choice and ms; "failed" -> choice -> why. If no choice can run, the table keeps what
    it had.
    """
    before, steps = table[name], {}

    def run(blocks: Blocks) -> None:
        table[name] = blocks
        step()

    for blocks in choices:
        try:
            run(blocks)
            steps[blocks] = functools.partial(run, blocks)
        except Exception as problem:  # too much shared memory, say: then it is not the fastest
            best.setdefault("failed", {})[f"{name} {blocks}"] = f"{type(problem).__name__}: {problem}"[:200]
    # In turns: a choice that is tried first would meet a cool chip at a higher clock.
    times = {blocks: t.median for blocks, t in device_turns(steps, device, 3, n_steps).items()}
    table[name] = min(times, key=times.__getitem__, default=before)
    if times:
        best[name] = dataclasses.asdict(table[name]) | {"ms": 1e3 * times[table[name]]}


def tune(p: Problem, n_steps: int = 10) -> dict[str, dict]:
    """Try block shapes kernel by kernel; the fastest stays in `kernels`.

    Returns:
        As `keep_fastest`, for all kernels. Nothing without Triton.
    """
    if not kernels.usable(p.x):
        return {}
    uses: dict[str, list[Step]] = {}  # of each kernel: one may do for several stages
    for label, (step, *_) in stages(p).items():
        uses.setdefault(label.split(",")[0], []).append(step)
    best: dict[str, dict] = {}
    for table in (kernels.BLOCKS, kernels.PRODUCTS):
        for name in table:
            if name in uses:
                choices = TILES if table is kernels.PRODUCTS else tuple(block_choices(name))
                step = functools.partial(_each_of, uses[name])
                keep_fastest(name, step, choices, table, p.x.device, n_steps, best)
    return best


def _each_of(steps: Iterable[Step]) -> None:
    for step in steps:
        step()


def tuned_rows(tuned: dict[str, dict]) -> list[dict]:
    """What `tune` gives, as rows: kernel and its choice, then what could not run and why."""
    rows = [{"kernel": name, **choice} for name, choice in tuned.items() if name != "failed"]
    return rows + [{"kernel": name, "failed": why} for name, why in tuned.get("failed", {}).items()]
