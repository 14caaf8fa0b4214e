"""Timing that is fair on a machine that is never quite idle.

All cases take turns, a few steps each, in an order that changes every round: whatever disturbs the machine disturbs
them all. The median of all steps is what one gets; the quartiles say how far to believe it. CPU time (of all threads of
the process) hardly notices neighbours, so compare it when wall times are spread.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Timing:
    """Seconds of each step.

    Attributes:
        wall: elapsed.
        cpu: spent by all threads of the process.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median wall seconds per step."""
        return statistics.median(self.wall)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of wall seconds per step."""
        first, _, third = statistics.quantiles(self.wall, n=4)
        return first, third

    def row(self, examples: int | None = None) -> dict[str, float]:
        """For tables and Results: milliseconds, and examples/s if a step has that many ``examples``."""
        first, third = self.quartiles
        row = {
            "ms": 1e3 * self.median,
            "ms_q1": 1e3 * first,
            "ms_q3": 1e3 * third,
            "ms_best": 1e3 * min(self.wall),
            "cpu_ms": 1e3 * statistics.median(self.cpu),
        }
        if examples is not None:
            row |= {"steps_per_s": 1 / self.median, "examples_per_s": examples / self.median}
        return row


def take_turns(
    cases: Mapping[str, Callable[[], object]], *, rounds: int, steps: int, warm_up: int = 3, seed: int = 0
) -> dict[str, Timing]:
    """Time every case ``rounds`` times ``steps`` calls, interleaved.

    Args:
        cases: name -> function of no arguments: one step.
        rounds: how often each case gets its turn.
        steps: timed calls per turn (before each turn one call more, not timed, fills the caches).
        warm_up: calls of each case before anything is timed.
        seed: of the order within the rounds.
    """
    timings = {name: Timing() for name in cases}
    for step in cases.values():
        for _ in range(warm_up):
            step()
    order = random.Random(seed)
    gc.collect()
    for _ in range(rounds):
        for name in order.sample(list(cases), len(cases)):
            step, timing = cases[name], timings[name]
            step()
            for _ in range(steps):
                cpu, wall = time.process_time(), time.perf_counter()
                step()
                timing.wall.append(time.perf_counter() - wall)
                timing.cpu.append(time.process_time() - cpu)
    return timings
