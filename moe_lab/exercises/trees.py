"""Checks for the exercises of notebook 02, COMET trees (solutions: notebooks/solutions/02_comet_trees_solutions)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_lab.exercises.verdict import verdict
from moe_lab.experiments.split_rate import trajectory
from moe_lab.gates import CometGate
from moe_lab.plots.trees import left_to_right_leaves, plane


def check_leaves(n_experts: int, leaves: Sequence[int] | None, prior: Sequence[float] | None) -> bool:
    """Exercise 1: heap numbers of the leaves from left to right, and their weights when every split is undecided."""
    if leaves is None or prior is None:
        return verdict(None, "", "")
    right = left_to_right_leaves(n_experts)
    leaves, problem = list(leaves), ""
    if len(leaves) != n_experts:
        problem = f"a tree for {n_experts} experts has {n_experts} leaves, you name {len(leaves)}"
    elif sorted(leaves) != sorted(right):
        wrong = sorted(set(leaves) - set(right))
        problem = (
            f"{wrong} are not leaves: splits are 0 .. {n_experts - 2}, leaves {n_experts - 1} .. {2 * n_experts - 2}"
        )
    elif leaves != right:
        place = next(i for i, (a, b) in enumerate(zip(leaves, right, strict=True)) if a != b)
        problem = (
            f"expert {place}: not leaf {leaves[place]}. Go down from the root, always the left child (2v + 1) first"
        )
    else:
        expected = CometGate.from_arrays(
            None, torch.zeros(n_experts - 1, 1), None, torch.zeros(n_experts, 1), gamma=1.0
        )().weights[0]
        if len(prior) != n_experts:
            problem = f"the prior needs {n_experts} numbers, you give {len(prior)}"
        elif abs(sum(prior) - 1) > 1e-6:
            problem = f"the weights sum to {sum(prior):g}, not to 1"
        elif not torch.allclose(torch.tensor(prior), expected, atol=1e-6):
            place = int((torch.tensor(prior) - expected).abs().argmax())
            problem = f"expert {place} does not start with {prior[place]:g}: each level above a leaf halves its weight"
    return verdict(leaves, problem, "Deeper leaves start with half the weight.")


def check_split_rate(rate: Callable[[float, float, str], float] | None) -> bool:
    """Exercise 2: ``rate(rate_at_one, gamma, optimizer)`` makes a gate of width gamma follow the one of width 1."""
    problem = ""
    for optimizer, at_one in (("adam", 0.02), ("sgd", 0.5)) if rate is not None else ():
        reference = trajectory(1.0, at_one, optimizer=optimizer, leaf_rate=at_one)
        for gamma in (0.1, 3.0):
            given = rate(at_one, gamma, optimizer)
            distance = float((trajectory(gamma, given, optimizer=optimizer, leaf_rate=at_one) - reference).abs().max())
            if distance > 1e-8:
                problem = (
                    f"with {optimizer}, gamma = {gamma:g} and split rate {given:g} the weights differ by up to "
                    f"{distance:.2g} within 60 steps. A step of size s on w = gamma u moves u by s / gamma; how does "
                    f"the size of {optimizer}'s step depend on the gradient, and the gradient on gamma?"
                )
                return verdict(rate, problem, "")
    return verdict(rate, problem, "The trajectories coincide in float64, for Adam and for SGD.")


def offset_borders(x: Tensor) -> Tensor:
    """(T,) region 0 .. 3 of points (T, 2): right half cut at x2 = -0.5 (0 above, 1 below), left half at 0.5 (2, 3)."""
    right = (x[:, 1] < -0.5).long()
    return torch.where(x[:, 0] > 0, right, 2 + (x[:, 1] < 0.5).long())


def check_partition(gate: CometGate | None) -> bool:
    """Exercise 3: a gate built by hand that sends each point of the square to its region of `offset_borders`."""
    problem = ""
    if gate is not None:
        x = plane(50)
        weights = gate(x).weights
        region = offset_borders(x)
        hits = weights.argmax(-1) == region
        if weights.shape[1] != 4:
            problem = f"four regions need four experts, the gate has {weights.shape[1]}"
        elif hits.float().mean() < 0.98:
            worst = int(torch.bincount(region[~hits], minlength=4).argmax())
            share = float(hits[region == worst].float().mean())
            problem = (
                f"only {100 * float(hits.float().mean()):.0f} % of the square goes to its expert; in region {worst} it "
                f"is {100 * share:.0f} %. Positive split logit = left = the lower expert numbers"
            )
        elif float((weights.amax(-1) == 1).float().mean()) < 0.9:
            problem = "the borders are right, but too soft: make the split weights larger (or gamma smaller)"
    return verdict(gate, problem, "Three splits, no two of them on one line: DSelect-k cannot do this with two.")


def check_fewer_than_k(gate: CometGate | None) -> bool:
    """Exercise 4: a converged gate with k >= 3 trees, one expert per token, and not the same one everywhere."""
    problem = ""
    if gate is not None:
        routing = gate(plane(50) if gate.in_features else None)
        counts = routing.experts_per_token
        if gate.k < 3:
            problem = f"the gate has {gate.k} trees; show it for 3 or more"
        elif int((routing.active.sum(0) > 0).sum()) < 2:
            problem = "all tokens go to one expert: let the gate use at least two, in different places"
        elif float((counts == 1).float().mean()) < 0.9:
            mean = float(counts.float().mean())
            problem = f"{mean:.2f} experts per token on average: make trees agree, and their splits steep"
    return verdict(gate, problem, "k trees bound the number of experts from above; agreeing trees use fewer.")


def check_inflation(threshold: float | None) -> bool:
    """Exercise 5: the probability below which log(p + 1e-8) makes a leaf's weight more than 1 % too large."""
    problem = ""
    if threshold is not None:
        excess = (threshold + 1e-8) / threshold - 1 if threshold > 0 else float("inf")
        if not 0.009 < excess < 0.011:
            problem = f"at p = {threshold:g} the leaf's weight is {100 * excess:.3g} % too large, not 1 %"
    return verdict(threshold, problem, "Rare, but the mass comes from leaves that should fade away.")
