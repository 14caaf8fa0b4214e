"""Checks for the exercises of notebook 04. Solutions: notebooks/solutions/04_comet_vision_solutions.ipynb.

Legend: D pixels of an image, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lab.exercises.verdict import verdict
from moe_lab.experiments.vision_config import VisionConfig
from moe_lab.experiments.vision_data import load_data
from moe_lab.gates import CometGate
from moe_lab.results import Result


def check_experts(experts: Mapping[int, Sequence[set[int]]] | None, results: Sequence[Result]) -> bool:
    """Exercise 1: seed -> the experts of each task, those with a mean weight of 0.01 and more on the test images."""
    problem = ""
    if experts is not None and set(experts) != {result.seed for result in results}:
        problem = f"the runs have seeds {sorted(result.seed for result in results)}, you name {sorted(experts)}"
    for result in results if experts is not None and not problem else ():
        tasks, given = result.metrics["routing"], experts[result.seed]
        if len(given) != len(tasks):
            problem = f"seed {result.seed}: give a set for each of {len(tasks)} tasks"
            break
        for (task, row), named in zip(tasks.items(), given, strict=True):
            used = {expert for expert, weight in enumerate(row["importance"]) if weight >= 0.01}
            if set(named) != used:
                problem = f"seed {result.seed}, {task}: {len(used)} experts are in use, you name {sorted(named)}"
    return verdict(experts, problem, "Now count both tasks' experts together, and put the accuracies beside.")


def check_twin(twin: VisionConfig | None, hashed: VisionConfig) -> bool:
    """Exercise 2: the run of ``one_expert`` that sees as much as one of the experts behind the hash gate ``hashed``."""
    if twin is None:
        return verdict(None, "", "")
    free = {"gate", "n_experts", "data_options", "batch_size", "epochs"}
    names = [f.name for f in dataclasses.fields(twin) if f.name not in free]
    others = [name for name in names if getattr(twin, name) != getattr(hashed, name)]
    images, theirs = load_data(twin).train["image"], load_data(hashed).train["image"]
    steps, wanted = (c.epochs * math.ceil(len(x) / c.batch_size) for c, x in ((twin, images), (hashed, theirs)))
    share, batch = len(theirs) // hashed.n_experts, hashed.batch_size // hashed.n_experts
    side, right = images.shape[-1], theirs.shape[-1]
    conditions = {
        f"the twin is a single network, gate='one_expert', not {twin.gate!r}": twin.gate == "one_expert",
        f"{', '.join(others)} must be that of the hash run, or they differ for another reason": not others,
        f"its images have {side} x {side} pixels, not {right} x {right}: keep the other data_options": side == right,
        f"an expert behind the gate sees about {share} images, your twin {len(images)}": len(images) == share,
        f"about {batch} images of a step reach an expert, your twin takes {twin.batch_size}": twin.batch_size == batch,
        f"the experts behind the gate learn for {wanted} steps, your twin for {steps}": steps == wanted,
    }
    problem = next((message for message, holds in conditions.items() if not holds), "")
    return verdict(twin, problem, "As many images, steps, and images per step. Now run both, with several seeds.")


def check_width(gamma: float | None, run: Callable[[float], Result]) -> bool:
    """Exercise 3: the gamma with which trees on raw pixels freeze in the third epoch, neither before nor after.

    ``run(gamma)`` trains COMET with that width, everything else as in the notebook.
    """
    if gamma is None:
        return verdict(None, "", "")
    rows = run(gamma).curves["routing"]
    hard = [[row["saturation"] for row in rows if row["epoch"] == epoch] for epoch in (2, 3)]
    before, after = (sum(shares) / len(shares) for shares in hard)
    problem = ""
    if before > 0.05:
        problem = f"after two epochs {before:.0%} of the paths are hard already. How many steps are three epochs?"
    elif after < 0.1:
        problem = f"after three epochs only {after:.0%} of the paths are hard: this γ lasts longer"
    return verdict(gamma, problem, "γ counts steps: nothing is hard after two epochs, much after three.")


def check_separation(function: Callable[[Sequence[Sequence[float]]], float] | None) -> bool:
    """Exercise 4: half the sum of the absolute differences between the two domains' mean weights."""
    problem = ""
    cases = {
        "two domains with the same mean weights": ([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], 0.0),
        "two domains that share no expert": ([[0.4, 0.6, 0.0], [0.0, 0.0, 1.0]], 1.0),
        "weights (0.5, 0.5, 0) and (0.25, 0.5, 0.25)": ([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]], 0.25),
    }
    for what, (weights, right) in cases.items() if function is not None else ():
        given = float(function(weights))
        if abs(given - right) > 1e-6:
            half = "; did you take half of the sum?" if abs(given - 2 * right) < 1e-6 else ""
            problem = f"{what} are {right:g} apart, you say {given:g}{half}"
            break
    return verdict(function, problem, "0: the domain does not matter; 1: no expert ever sees both.")


def frozen_gate(seed: int, far: bool = False) -> CometGate:
    """A gate on 16 pixels that is hard on all of 200 random images (pixels in [0, 1]), trained on its entropy alone.

    ``far``: with biases so large that an image without ink is no way out.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(200, 16, generator=generator)
    gate = CometGate(16, 8, 2, gamma=1.0, generator=generator)
    adam = torch.optim.Adam(gate.parameters(), lr=0.02)
    while bool(reached(gate, images).max() > 1):
        adam.zero_grad()
        gate(images).losses["entropy"].backward()
        adam.step()
    if far:  # the same side for every image, only farther away
        with torch.no_grad():
            gate.split.bias += 2 * gate.gamma * gate.split(images).mean(0).sign().flatten()
    return gate.requires_grad_(False)


@torch.no_grad()
def reached(gate: CometGate, x: Tensor) -> Tensor:
    """(T,) the most leaves that one of the trees reaches for each input; 1 is hard."""
    return (gate(x).details["tree_probabilities"] > 0).sum(1).amax(1)


def check_soft_input(function: Callable[[CometGate], Any] | None) -> bool:
    """Exercise 5: ``function(gate)`` is an input (D,) for which a frozen gate is soft, whatever its biases."""
    problem = ""
    for seed, far in ((0, False), (4, False), (0, True), (4, True)) if function is not None else ():
        gate = frozen_gate(seed, far)
        x = torch.as_tensor(function(gate), dtype=torch.float32).detach().flatten()
        if len(x) != gate.in_features:
            problem = f"the gate looks at {gate.in_features} pixels, you give {len(x)}"
        elif reached(gate, x[None]) == 1 and far:
            problem = "fine where biases are small, but here they are large: at which x is the root's w·x + b zero?"
        elif reached(gate, x[None]) == 1:
            problem = "every tree still reaches a single leaf. What is w·x + b for an image without ink?"
        if problem:
            break
    return verdict(function, problem, "Frozen on the data is not frozen everywhere: z is 0 somewhere if w is not.")
