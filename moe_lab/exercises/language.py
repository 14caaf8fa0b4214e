"""Checks for the exercises of notebook 10. Solutions: notebooks/solutions/10_evomoe_language_solutions.ipynb.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from moe_lab.exercises.verdict import verdict
from moe_lab.experiments.evomoe_claims import speedups
from moe_lab.experiments.evomoe_language import LanguageConfig
from moe_lab.gates.capacity import admit, capacity
from moe_lab.metrics.flops import language_flops, speedup
from moe_lab.models.language import TransformerSize
from moe_lab.results import Result


def never_arriving(results: Sequence[Result], base: str = "switch") -> dict[str, set[int | None]]:
    """Gate -> seeds in which it never comes down to ``base``'s final validation loss; gates that always do: left out.

    ``base`` itself always does. A gate without a seed in common with ``base`` is left out, too.
    """
    seeds = {result.seed for result in results if result.config["gate"] == base}
    gates = dict.fromkeys(r.config["gate"] for r in results if r.config["gate"] != base and r.seed in seeds)
    never = {gate: {s for s, ratio in speedups(results, gate, base).items() if ratio == 0} for gate in gates}
    return {gate: seeds for gate, seeds in never.items() if seeds}


def check_never(never: Mapping[str, Collection[int | None]] | None, results: Sequence[Result]) -> bool:
    """Exercise 1: gate -> the seeds in which it never reaches Switch's final validation loss of the same seed."""
    problem = ""
    right = never_arriving(results)
    given = {gate: set(seeds) for gate, seeds in (never or {}).items() if seeds}
    for gate in dict.fromkeys((*right, *given)):
        wanted, said = right.get(gate, set()), given.get(gate, set())
        if wanted != said and never is not None:
            problem = f"{gate}: you name seeds {sorted(said)}, {len(wanted)} of its seeds never arrive"
            same = {result.seed for result in results if result.config["gate"] == gate}
            if said - same:
                problem = f"{gate} was not run with seeds {sorted(said - same)}"
            break
    return verdict(never, problem, "A mean over the seeds that do arrive would have hidden these.")


SHAPES = {
    "24 layers of 1024, 16 experts": (TransformerSize(50_000, 1024, 24, 1024, 16), 16),
    "a model that is nearly all experts": (TransformerSize(2, 2, 2, 64, 1, hidden=4096, moe_every=1), 4),
    "the shape of profile standard": (TransformerSize(65, 64, 4, 64, 4), 16),
}


def implied_mean(size: TransformerSize, n_experts: int, steps: float = 2.0, flops: float = 1.42) -> float:
    """Mean experts per token at which ``steps`` times fewer steps are ``flops`` times fewer FLOPs than top-1's."""
    one = language_flops(size, n_experts=n_experts, experts_per_token=1)
    more = language_flops(size, n_experts=n_experts, experts_per_token=2) - one
    return 1 + (steps / flops - 1) * one / more


def check_implied(function: Callable[[TransformerSize, int], float] | None) -> bool:
    """Exercise 2: ``function(size, n_experts)``: mean experts per token up to the crossing that 2.0 and 1.42 imply."""
    problem = ""
    for what, (size, n_experts) in SHAPES.items() if function is not None else ():
        given, right = float(function(size, n_experts)), implied_mean(size, n_experts)
        if abs(given - right) > 0.02 * right:
            problem = f"{what}: you say {given:.2f} experts per token"
            if abs(given - 2.0 / 1.42) < 0.02:
                problem += "; that is the cost of a step in Switch steps. Which share of a Switch step is one expert?"
            elif abs(given - implied_mean(size, n_experts, 1.42, 2.0)) < 0.02 * abs(right) + 0.02:
                problem += "; fewer steps with less gain in FLOPs: does a step of DTS cost more or less than Switch's?"
            else:
                problem += ". Solve F(k) / F(1) = 2.0 / 1.42 for k; F is affine in k"
            break
    return verdict(function, problem, "So the dense phase must have been a small part of the paper's run.")


def check_dropped(function: Callable[[Sequence[int], int, float], float] | None) -> bool:
    """Exercise 3: ``function(experts, n_experts, factor)``: share of tokens that find no place, (T,) chosen experts."""
    cases = {
        "eight tokens, two for each of four experts": ([0, 1, 2, 3] * 2, 4, 1.0),
        "eight tokens, all to expert 0 of four": ([0] * 8, 4, 1.0),
        "loads 4, 2, 1, 1 at factor 1": ([0, 0, 0, 0, 1, 1, 2, 3], 4, 1.0),
        "loads 4, 2, 1, 1 at factor 2": ([0, 0, 0, 0, 1, 1, 2, 3], 4, 2.0),
        "loads 4, 2, 1, 1 at factor 1.4": ([0, 0, 0, 0, 1, 1, 2, 3], 4, 1.4),
        "nine tokens, loads 5, 4, 0, 0": ([0] * 5 + [1] * 4, 4, 1.0),
    }
    problem = ""
    for what, (experts, n_experts, factor) in cases.items() if function is not None else ():
        given = float(function(experts, n_experts, factor))
        chosen = torch.nn.functional.one_hot(torch.tensor(experts), n_experts).bool()
        limit = capacity(factor, len(experts), n_experts)
        right = 1 - int(admit(chosen, limit).sum()) / len(experts)
        if abs(given - right) > 1e-6:
            problem = f"{what}: an expert has {limit} places, so {right:.3f} are dropped, you say {given:.3f}"
            if factor == 1.4:
                problem += ". The number of places is rounded down"
            elif len(experts) % n_experts:
                problem += ". T / E is rounded up first"
            break
    return verdict(function, problem, "Perfect balance drops nobody; a balancing loss is there to get near it.")


def check_short_phase(config: LanguageConfig | None, usual: LanguageConfig, run: Callable[..., Result]) -> bool:
    """Exercise 4: a "dts" run of at most 3 % more FLOPs than Switch, by ``soft_share`` and ``hard_share`` alone.

    Args:
        config: the reader's.
        usual: the notebook's "dts" run.
        run: config -> Result.
    """
    if config is None:
        return verdict(None, "", "")
    free = ("soft_share", "hard_share")
    fields = [f.name for f in dataclasses.fields(usual) if f.name not in free]
    others = [name for name in fields if getattr(config, name) != getattr(usual, name)]
    problem = ""
    if others:
        problem = f"only soft_share and hard_share may change, you changed {', '.join(others)}"
    elif config.hard_share == 1 or config.steps_of("hard_share") < 2:
        problem = "keep a soft phase of two steps and a hard switch after it: else it is another gate"
    else:
        flops = {name: run(c).metrics["training_flops"] for name, c in (("dts", config), ("switch", _switch(usual)))}
        more = flops["dts"] / flops["switch"] - 1
        if more > 0.03:
            problem = f"{100 * more:.1f} % more FLOPs than Switch. How many steps of all experts does (2) allow?"
    return verdict(config, problem, "Cheap enough. Now look at what it does to the loss, over several seeds.")


def _switch(config: LanguageConfig) -> LanguageConfig:
    return dataclasses.replace(config, gate="switch")


def check_counterexample(base: Sequence[float] | None, run: Sequence[float] | None) -> bool:
    """Exercise 5: losses of two runs at the same steps 1, 2, ...: ``run`` ends below ``base``, yet needs more steps."""
    if base is None or run is None:
        return verdict(None, "", "")
    problem = ""
    if len(base) != len(run) or len(base) < 2:
        problem = f"two runs of at least 2 steps, equally long; yours have {len(base)} and {len(run)}"
    elif not run[-1] < base[-1]:
        problem = f"the run must end below the base: it ends at {run[-1]:g}, the base at {base[-1]:g}"
    else:
        steps = range(1, len(base) + 1)
        ratio = speedup(steps, base, steps, run)
        if ratio >= 1:
            problem = f"the run needs {ratio:.2f} times fewer steps. When does the base reach its *last* loss first?"
    return verdict(base, problem, "n_base is a first crossing: a loss that goes up again was reached before the end.")
