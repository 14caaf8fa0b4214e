"""Checks for the exercises of notebook 15. Solutions: notebooks/solutions/15_speed_solutions.ipynb.

Legend: T tokens, D width, H hidden width, E experts, K experts per token, C capacity, s bytes per number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from moe_lab.bench.roofline import Ceiling, product_work
from moe_lab.exercises.verdict import verdict
from moe_lab.gates.capacity import admit


def _near(given: float, right: float) -> bool:
    return abs(given - right) <= 1e-6 * max(abs(right), 1e-12)


def check_bound(function: Callable[[int, int, int, int, int, float, float], float] | None) -> bool:
    """Exercise 1: ``function(rows, d, h, groups, size, flops, bandwidth)``: least seconds of a grouped product."""
    problem = ""
    for rows, d, h, groups, size, flops, bandwidth in (
        (4096, 256, 512, 8, 2, 1e12, 1e11), (64, 256, 512, 64, 4, 1e12, 1e10), (1, 8, 8, 1, 4, 1e9, 1e9)
    ) if function is not None else ():  # fmt: skip
        given = float(function(rows, d, h, groups, size, flops, bandwidth))
        work, ceiling = product_work(rows, d, h, groups, size), Ceiling(flops, bandwidth)
        right = ceiling.seconds(work)
        if _near(given, right):
            continue
        compute, move = work.operations / flops, work.bytes / bandwidth
        problem = f"{rows} rows, {d} x {h}, {groups} experts: you say {given:.3g} s, the bound is {right:.3g} s"
        once = size * (rows * (d + h) + d * h) / bandwidth
        if _near(given, compute + move):
            problem += "; operations and transfers can overlap: the longer of the two decides, not their sum"
        elif _near(given, move):
            problem += "; that is the shorter of the two: both must be done"
        elif _near(given, max(compute / 2, move)):
            problem += "; a multiply-add is two operations"
        elif _near(given, max(compute, once)):
            problem += "; every expert has a matrix of its own to read"
        elif _near(given, compute):
            problem += "; here bytes take longer than operations"
        break
    return verdict(function, problem, "The longer of operations / P and bytes / B; nothing can be faster.")


def check_memory(function: Callable[[int, int, int, int, int], tuple[float, float]] | None) -> bool:
    """Exercise 2: ``function(t, e, k, h, size)`` -> bytes of (hidden numbers of all experts, of routed pairs only)."""
    problem = ""
    for t, e, k, h, size in ((32768, 16, 2, 4096, 2), (100, 7, 3, 10, 4)) if function is not None else ():
        everything, routed = (float(value) for value in function(t, e, k, h, size))
        right = float(t * e * h * size), float(t * k * h * size)
        if _near(everything, right[0]) and _near(routed, right[1]):
            continue
        problem = f"T {t}, E {e}, K {k}, H {h}, {size} bytes: you say {everything:,.0f} and {routed:,.0f}"
        if _near(everything, right[1]) and _near(routed, right[0]):
            problem += "; the other way round"
        elif _near(everything * size, right[0]):
            problem += "; these are numbers, not bytes"
        elif not _near(everything, right[0]):
            problem += f"; every token has H numbers at every expert: {right[0]:,.0f}"
        else:
            problem += "; a token has H numbers at each of its K experts, and at no other"
        break
    return verdict(function, problem, "E / K times less: what must never be allocated is the (T, E, H) buffer.")


def check_padding(function: Callable[[Sequence[int], int], tuple[float, float]] | None) -> bool:
    """Exercise 3: ``function(loads, c)`` -> (share of pairs dropped, share of the E C rows without a pair)."""
    problem = ""
    for loads, limit in (((4, 4, 4, 4), 4), ((10, 2, 2, 2), 5), ((1, 0, 0, 7), 8)) if function is not None else ():
        dropped, idle = (float(value) for value in function(loads, limit))
        chosen = torch.zeros(max(loads), len(loads), dtype=torch.bool)
        for expert, load in enumerate(loads):
            chosen[:load, expert] = True
        kept = int(admit(chosen, limit).sum())
        right = 1 - kept / sum(loads), 1 - kept / (len(loads) * limit)
        if abs(dropped - right[0]) < 1e-6 and abs(idle - right[1]) < 1e-6:
            continue
        problem = f"loads {tuple(loads)}, C = {limit}: you say {dropped:.3f} dropped, {idle:.3f} idle; "
        problem += f"{kept} pairs find one of {len(loads) * limit} places"
        if abs(dropped - max(0.0, 1 - len(loads) * limit / sum(loads))) < 1e-6 < abs(dropped - right[0]):
            problem += "; a place at one expert is of no use to a pair of another"
        break
    return verdict(function, problem, "Uneven loads cost twice: pairs without places, and places without pairs.")


_BINS = ((1024, 16), (4096, 64), (65536, 16))


def largest_load(n_tokens: int, n_experts: int, repeats: int = 200, seed: int = 0) -> float:
    """Mean over draws of the largest load of a router that sends each token to a uniformly random expert."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(n_experts, (repeats, n_tokens), generator=generator)
    counts = torch.zeros(repeats, n_experts).scatter_add_(1, experts, torch.ones(repeats, n_tokens))
    return float(counts.amax(1).mean())


def check_largest_load(function: Callable[[int, int], float] | None) -> bool:
    """Exercise 4: ``function(t, e)``: expected largest load of T uniformly random tokens, to 8 %; simulated here."""
    problem = ""
    for n_tokens, n_experts in _BINS if function is not None else ():
        given, right = float(function(n_tokens, n_experts)), largest_load(n_tokens, n_experts)
        if abs(given - right) <= 0.08 * right:
            continue
        fair = n_tokens / n_experts
        problem = f"{n_tokens} tokens, {n_experts} experts: you say {given:.0f}, drawing gives {right:.0f} on average"
        if abs(given - fair) < 1e-6:
            problem += "; that is the mean load. The largest of several random loads is larger"
        elif abs(given - fair - math.sqrt(fair)) < 1e-6:
            problem += "; one standard deviation is not enough for the largest of many"
        break
    return verdict(function, problem, "Chance alone: a relative excess of about sqrt(2 E ln(E) / T).")


def check_break_even(function: Callable[[Sequence[float], float, float, float], float] | None) -> bool:
    """Exercise 5: ``function(shares, a, b, c)``: batch at which early exits cost exactly what they save.

    A block on n rows takes a + b n seconds, each of the L exits c seconds per call; ``shares`` (L,) of the batch reach
    each block, and every block is still called.
    """
    problem = ""
    for shares, a, b, c in (
        ((1.0, 0.5, 0.25, 0.25), 30.0, 1.0, 20.0), ((1.0, 0.5), 0.0, 2.0, 7.0), ((1.0, 0.9, 0.8), 5.0, 0.1, 1.0)
    ) if function is not None else ():  # fmt: skip
        given, saved = float(function(shares, a, b, c)), sum(1 - share for share in shares)
        right = c * len(shares) / (b * saved)
        if _near(given, right):
            continue
        problem = f"shares {tuple(shares)}, a = {a:g}, b = {b:g}, c = {c:g}: you say {given:.1f}, it is {right:.1f}"
        if _near(given, (a + c) * len(shares) / (b * saved)):
            problem += "; the plain network calls every block too: a cancels"
        elif _near(given, c / (b * saved)):
            problem += "; there are as many exits as blocks"
        elif _near(given, c * len(shares) / b / sum(shares)):
            problem += "; rows that are gone are what is saved, not rows that stay"
        break
    return verdict(function, problem, "What an exit costs per call is paid by rows that are not computed.")
