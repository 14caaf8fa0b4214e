"""What a card's power limit does to the figures of the MoE layer: clock and power while a step is repeated.

Products at full clock may draw more power than a card is allowed to. Then it lowers its clock until they do not, and
what decides is no longer how long the units need but how many joules. So each step is timed twice: after a rest, alone,
and when it has been repeated for some seconds. Beside the layers stands one product whose operand holds zeros: nobody
skips them, but what does not change draws less power.

On CUDA a step is a graph, but for `EAGER`: how fast a host starts kernels is another question.

Sensors are read by `torch.cuda.clock_rate` and `power_draw`, which need the package nvidia-ml-py (extra ``gpu``).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from moe_lab.bench.device import captured, device_turns
from moe_lab.bench.gpu_moe import moe_cases
from moe_lab.bench.gpu_problem import Problem

CASES = ("dense", "ours", "plain", "ScatterMoE")
"""Of `gpu_moe.moe_cases`, where they can run."""
EAGER = ("plain", "ScatterMoE")
"""Of these, those that are not captured as a graph: nobody promises that they do not wait for the device."""
ZEROS = {"product": 0.0, "product, 7/8 zeros": 7 / 8, "product, all zeros": 1.0}
"""Case -> share of zeros in X of X W, both dense: (T, D) times (D, K H), the first product of the dense layer."""


class Reading(NamedTuple):
    """Of a card's sensors: the clock of its multiprocessors in MHz, the power it draws in watts."""

    mhz: float
    watts: float


def sensors(device: torch.device) -> Callable[[], Reading] | None:
    """How to read them; None on a CPU.

    Raises:
        ModuleNotFoundError: nvidia-ml-py is missing; it says so.
    """
    if device.type != "cuda":
        return None

    def read() -> Reading:
        return Reading(torch.cuda.clock_rate(device), torch.cuda.power_draw(device) / 1000)

    read()
    return read


def under_load(
    step: Callable[[], object],
    device: torch.device,
    read: Callable[[], Reading] | None = None,
    *,
    seconds: float = 4.0,
    every: float = 0.1,
    ahead: int = 8,
) -> dict[str, float | None]:
    """Repeat a step; of the second half of the time: ms of a step, and what the sensors say (medians).

    Args:
        step: its kernels are started here, ``ahead`` steps before the device is done with them. It does not wait,
            unless the sensors take longer than so many steps.
        device: where they run.
        read: the sensors, see `sensors`; None: mhz, watts and joules are None.
        seconds: in all. Sensors report the mean of up to a second.
        every: seconds between two readings.
        ahead: at least 1.

    Returns:
        ms, mhz, watts, joules (per step: watts times seconds).
    """
    begun: deque[torch.cuda.Event] = deque()
    readings: list[Reading] = []
    start, n_steps, from_step, from_time, read_at = time.perf_counter(), 0, 0, None, 0.0
    while True:
        step()
        n_steps += 1
        if device.type == "cuda":
            begun.append(torch.cuda.Event())
            begun[-1].record()
            if len(begun) > ahead:
                begun.popleft().synchronize()
        now = time.perf_counter()
        if from_time is None:
            if now - start >= seconds / 2:
                from_time, from_step = now, n_steps
            continue
        if read and now >= read_at:
            readings.append(read())
            read_at = now + every
        if now - start >= seconds:
            break
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = (now - from_time) / (n_steps - from_step)  # as many were under way at both ends
    mhz, watts = (statistics.median(column) for column in zip(*readings, strict=True)) if readings else (None, None)
    return {"ms": 1e3 * taken, "mhz": mhz, "watts": watts, "joules": None if watts is None else watts * taken}


def rested_ms(step: Callable[[], object], device: torch.device, *, rest: float = 0.3, times: int = 5) -> float:
    """Median ms of one step, timed after a pause of ``rest`` seconds and one step that is not timed."""
    found = []
    for _ in range(times):
        time.sleep(rest)
        found += device_turns({"": step}, device, 1, 1)[""].wall
    return 1e3 * statistics.median(found)


def _steps(p: Problem, zeros: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    cases = moe_cases(p, compiled=False)
    for name in CASES:
        if name in cases:
            yield name, cases[name].prepare()
    if zeros:
        generator = torch.Generator(p.x.device).manual_seed(0)
        w = p.dense[0].detach().T.contiguous()
        for name, share in ZEROS.items():
            x = p.x.detach()
            x = x.masked_fill(torch.rand(x.shape, generator=generator, device=x.device) < share, 0)
            yield name, lambda x=x: torch.mm(x, w)


def measure_power(
    p: Problem, zeros: bool = False, *, seconds: float = 4.0, read: Callable[[], Reading] | None = None
) -> list[dict]:
    """A row per case: the sizes, graph, ms (under load), rested_ms, mhz, watts, joules.

    Args:
        p: the problem.
        zeros: also the products of `ZEROS`.
        seconds: of load for each case.
        read: of `sensors`.
    """
    rows = []
    for name, step in _steps(p, zeros):
        step()  # compiles
        graph = p.x.device.type == "cuda" and name not in EAGER
        step = captured(step) if graph else step
        rested = rested_ms(step, p.x.device, rest=min(0.3, seconds / 10))
        loaded = under_load(step, p.x.device, read, seconds=seconds)
        rows.append({"case": name, **dataclasses.asdict(p.shape), "graph": graph, **loaded, "rested_ms": rested})
    return rows
