"""Clusters arranged as a tree, each with a target function of its own: a gate's task in its purest form.

What is planted (E experts, D features, a binary tree over E leaves l, nodes in heap order, leaves from left to right):

    centre_l = separation * sum over the splits v above l of  side_lv * direction_v
               (side +1 left, -1 right; directions orthonormal)
    x        = centre_l + spread * N(0, I)                 ``features``, ``cluster`` = l
    expert   = assignment[l]                               ``expert``: identity, or a random permutation
    y        = w_expert . (x - centre_l) + noise * N(0, 1)  ``target``

so the split w_v = direction_v of a tree of E - 1 hyperplanes routes every clear case to its leaf (a tree gate *can*
represent the routing). An expert is affine in x, y = weight_e . x + bias_e, and the true ones are in ``info``.

    functions="linear"   the w_e are independent directions
    functions="signs"    w_e = +-w, siblings of opposite sign: two functions, and the mean of siblings is 0
    siblings="tree"      leaf l belongs to expert l: clusters close in the tree belong to neighbouring experts
    siblings="scrambled" a random permutation stands between leaves and experts. With *given* experts (the true ones,
                         frozen) a tree gate whose leaf l feeds expert l has to put clusters from far-apart branches
                         under one split; relabelling its leaves (permutation search) solves it. With experts that
                         still learn nothing changes: they are exchangeable.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.splits import generators, stratified_split
from moe_lab.names import unknown_name

FUNCTIONS = ("linear", "signs")
SIBLINGS = ("tree", "scrambled")


def leaf_sides(n_leaves: int) -> np.ndarray:
    """Which side of every split each leaf lies on.

    Splits are numbered in heap order (children of v are 2v + 1 and 2v + 2), leaves from left to right.

    Returns:
        (n_leaves, n_leaves - 1): +1 left of the split, -1 right, 0 not below it.
    """
    sides = np.zeros((n_leaves, n_leaves - 1))
    leaf = 0

    def visit(node: int, path: dict[int, int]) -> None:
        nonlocal leaf
        if node >= n_leaves - 1:
            sides[leaf, list(path)] = list(path.values())
            leaf += 1
            return
        visit(2 * node + 1, {**path, node: 1})
        visit(2 * node + 2, {**path, node: -1})

    visit(0, {})
    return sides


def planted_clusters(
    seed: int = 0,
    *,
    n_experts: int = 8,
    n_features: int = 16,
    n_train: int = 4000,
    n_valid: int = 1000,
    n_test: int = 1000,
    separation: float = 1.0,
    spread: float = 0.25,
    noise: float = 0.1,
    functions: str = "linear",
    siblings: str = "tree",
) -> Dataset:
    """Build the planted clusters; see the module's text for the symbols.

    Args:
        n_features: at least n_experts - 1, one direction per split.
        separation, spread: a split is decided with a margin of separation / spread standard deviations (4 by default).
        noise: standard deviation of the target around the right expert's answer; the answers themselves have variance
        1.

    Returns:
        kind "planted": features (N, D), target (N,), cluster (N,), expert (N,); clusters are equally frequent. info:
        n_experts, n_features, noise, ``expert_weight`` (E, D) and ``expert_bias`` (E,), ``split_weight`` (E - 1, D)
        in heap order (x on the left where split_weight . x > 0), ``assignment`` (E,) leaf -> expert; all float32 /
        int64 tensors.
    """
    if functions not in FUNCTIONS:
        raise unknown_name("functions", functions, FUNCTIONS)
    if siblings not in SIBLINGS:
        raise unknown_name("siblings", siblings, SIBLINGS)
    if n_experts < 1 or n_features < max(n_experts - 1, 1):
        raise ValueError(f"n_experts={n_experts}: need 1 or more, and n_features >= n_experts - 1 (got {n_features})")
    if not (separation > 0 and spread > 0 and noise >= 0):
        raise ValueError(f"need separation > 0, spread > 0, noise >= 0; got {separation}, {spread}, {noise}")
    plan, draw, split = generators(seed, 3)
    basis = np.linalg.qr(plan.standard_normal((n_features, n_features)))[0]
    direction = basis[: n_experts - 1]
    sides = leaf_sides(n_experts)
    centre = separation * sides @ direction
    assignment = plan.permutation(n_experts) if siblings == "scrambled" else np.arange(n_experts)
    if functions == "linear":
        weight_of_leaf = plan.standard_normal((n_experts, n_features))
    else:
        sign = np.where(np.arange(n_experts) % 2 == 0, 1.0, -1.0)  # neighbours from left to right alternate
        weight_of_leaf = sign[:, None] * plan.standard_normal(n_features)
    weight_of_leaf /= spread * np.linalg.norm(weight_of_leaf, axis=1, keepdims=True)
    leaf_of_expert = np.argsort(assignment)
    expert_weight = weight_of_leaf[leaf_of_expert]
    expert_bias = -(expert_weight * centre[leaf_of_expert]).sum(axis=1)

    n = n_train + n_valid + n_test
    cluster = draw.permutation(np.arange(n) % n_experts)
    offset = spread * draw.standard_normal((n, n_features))
    answer = (offset * weight_of_leaf[cluster]).sum(axis=1)
    rows = {
        "features": torch.from_numpy(centre[cluster] + offset).float(),
        "target": torch.from_numpy(answer + noise * draw.standard_normal(n)).float(),
        "cluster": torch.from_numpy(cluster),
        "expert": torch.from_numpy(assignment[cluster]),
    }
    parts = [
        {key: array[torch.from_numpy(index)] for key, array in rows.items()}
        for index in stratified_split(cluster, n_valid, n_test, split)
    ]
    info = {
        "n_experts": n_experts,
        "n_features": n_features,
        "noise": noise,
        "expert_weight": torch.from_numpy(expert_weight).float(),
        "expert_bias": torch.from_numpy(expert_bias).float(),
        "split_weight": torch.from_numpy(direction).float(),
        "assignment": torch.from_numpy(assignment),
        "planted": "expert = assignment[cluster]; each expert is affine, every split of the tree is a hyperplane "
        "through 0",
    }
    return Dataset("planted-clusters", "planted", *parts, info=info)
