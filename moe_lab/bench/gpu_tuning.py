"""Trying block shapes for the kernels of the MoE layer, kernel by kernel, on the problem that will be measured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator

from moe_lab.bench.device import device_turns
from moe_lab.bench.gpu_problem import Problem
from moe_lab.bench.gpu_stages import stages
from moe_lab.experts import kernels

TILES = (  # to try for our own products; compiled for sm_90, the 256-wide ones spill a few registers at the end
    kernels.Product(128, 128, 8, depth=64, stages=3, registers=128),
    kernels.Product(128, 128, 8, depth=64, stages=4, registers=None),
    kernels.Product(128, 256, 8, depth=64, stages=3, registers=None),
    kernels.Product(128, 256, 8, depth=64, stages=4, registers=None),
    kernels.Product(64, 256, 8, depth=64, stages=2, registers=128),
    kernels.Product(256, 128, 8, depth=64, stages=3, registers=None),
)


def block_choices() -> Iterator[kernels.Blocks]:
    """What to try for the kernels that wait for memory: rows of 512 bytes to 2 KB, 16 or 32 numbers per thread."""
    for columns in (256, 512, 1024):
        for warps in (4, 8):
            for per_thread in (16, 32):
                yield kernels.Blocks(32 * warps * per_thread // columns, columns, warps)


def tune(p: Problem, n_steps: int = 10) -> dict[str, dict]:
    """Try block shapes kernel by kernel; the fastest stays in `kernels`. Nothing to try without Triton.

    Returns:
        kernel -> its choice and ms; "failed" -> choice -> why. A kernel that no choice can run keeps what it had.
    """
    if not kernels.usable(p.x):
        return {}
    parts = {label.split(",")[0]: part[0] for label, part in stages(p).items()}
    best: dict[str, dict] = {}

    def fastest(name: str, choices: Iterable[kernels.Blocks], table: dict[str, kernels.Blocks]) -> None:
        before, steps = table[name], {}

        def run(blocks: kernels.Blocks) -> None:
            table[name] = blocks
            parts[name]()

        for blocks in choices:
            try:
                run(blocks)
                steps[blocks] = functools.partial(run, blocks)
            except Exception as problem:  # too much shared memory, say: then it is not the fastest
                best.setdefault("failed", {})[f"{name} {blocks}"] = f"{type(problem).__name__}: {problem}"[:200]
        # In turns: a choice that is tried first would meet a cool chip at a higher clock.
        times = {blocks: t.median for blocks, t in device_turns(steps, p.x.device, 3, n_steps).items()}
        table[name] = min(times, key=times.__getitem__, default=before)
        if times:
            best[name] = dataclasses.asdict(table[name]) | {"ms": 1e3 * times[table[name]]}

    for name in kernels.BLOCKS:
        fastest(name, block_choices(), kernels.BLOCKS)
    for name in kernels.PRODUCTS.keys() & parts.keys():
        fastest(name, TILES, kernels.PRODUCTS)
    return best
