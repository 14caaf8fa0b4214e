"""A step on a GPU (or a CPU, for a dry run): its time, its peak memory, the step as one CUDA graph; and which GPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from moe_lab.bench.timing import Timing, take_turns
from moe_lab.cuda_graphs import capturing
from moe_lab.experts import kernels
from moe_lab.runtime import environment

T = TypeVar("T")


def device_turns(
    cases: Mapping[str, Callable[[], object]], device: torch.device | str, rounds: int, n_steps: int
) -> dict[str, Timing]:
    """`take_turns`; on CUDA with events between steps, so that the host runs ahead as it does in training.

    Args:
        cases: name -> function of no arguments: one step. Compile and capture before: nothing is warmed up here but
            by one call, not timed, at the beginning of each turn.
        device: where the steps run.
        rounds: turns of each case, in an order that changes every round.
        n_steps: timed steps per turn; at least two in all, or there are no quartiles.

    Returns:
        name -> timing. On CUDA ``wall`` is what lies between two events; ``cpu`` is empty, so `Timing.row` needs a CPU.
    """
    if torch.device(device).type != "cuda":
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
            timings[name].wall.extend(1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return timings


def part_rows(
    column: str,
    parts: Mapping[str, tuple[Callable[[], object], float, float]],
    device: torch.device | str,
    rounds: int,
    n_steps: int,
) -> list[dict[str, Any]]:
    """One row per part of a step: its name under ``column``, ms, and tflops or gb_per_s (None without such a number).

    Args:
        column: "stage", say.
        parts: name -> (function, floating-point operations, bytes that must move).
        device, rounds, n_steps: of `device_turns`.
    """
    timings = device_turns({name: step for name, (step, *_) in parts.items()}, device, rounds, n_steps)
    return [
        {
            column: name,
            "ms": 1e3 * timings[name].median,
            "tflops": flops / timings[name].median / 1e12 if flops else None,
            "gb_per_s": size / timings[name].median / 1e9 if size else None,
        }
        for name, (_, flops, size) in parts.items()
    ]


def peak(step: Callable[[], object], device: torch.device | str) -> float | None:
    """MiB that a step allocates beyond what was allocated before, at most; None without CUDA.

    A step that replays a graph allocates nothing: measure before capturing.
    """
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def captured(step: Callable[[], T]) -> Callable[[], T]:
    """The step as one CUDA graph: a function that replays it and returns the tensors that the graph writes to.

    Raises:
        RuntimeError: something in the step waits for the device (PyTorch's error names the operation), or no CUDA.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA graph needs CUDA; run the step itself on this machine")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        result = step()

    def replay() -> T:
        graph.replay()
        return result

    return replay


def circumstances(device: torch.device | str) -> dict[str, Any]:
    """`runtime.environment` of the device, and the versions of CUDA and Triton (None where there is none)."""
    triton = kernels.triton.__version__ if kernels.triton else None
    return environment(device) | {"cuda": torch.version.cuda, "triton": triton}
