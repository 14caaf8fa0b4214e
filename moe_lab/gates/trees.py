"""COMET's trees level by level in plain torch: who arrives where, and how trees are combined (equations: `comet`).

Legend: T tokens, E experts = leaves, K trees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.gates.smooth_step import smooth_step


def walk_levels(split_logits: Tensor, gamma: float) -> tuple[list[Tensor], Tensor]:
    """Probability of arriving at every split, level by level, and at every leaf.

    Children of consecutive nodes are consecutive, so a whole level is one product. Only the last level can be partly
    filled; then its leaves lie to the left of the leaves that stayed one level higher.

    Args:
        split_logits: (E - 1, K, T) in heap order, tokens last.
        gamma: width of the smooth-step.

    Returns:
        reach of the splits, one (splits of the level, K, T) per level, together (E - 1, K, T) in heap order;
        p (E, K, T), leaves from left to right.
    """
    n_splits = split_logits.shape[0]
    steps = smooth_step(torch.stack((split_logits, -split_logits), 1), gamma)  # (E-1, 2, K, T): left, right
    level = split_logits.new_ones(1, *split_logits.shape[1:])
    higher_leaves = level[:0]
    reach = []
    first = 0
    while first < n_splits:
        here = min(level.shape[0], n_splits - first)
        higher_leaves = level[here:]
        reach.append(level[:here])
        level = (reach[-1].unsqueeze(1) * steps[first : first + here]).flatten(0, 1)
        first += here
    return reach, torch.cat((level, higher_leaves))


def tree_probabilities(split_logits: Tensor, gamma: float) -> Tensor:
    """p (T, E, K) from split logits (T, E - 1, K): each tree's probability of ending at each leaf."""
    return walk_levels(split_logits.movedim(0, -1), gamma)[1].movedim(-1, 0)


def combine_trees(probabilities: Tensor, leaf_logits: Tensor) -> Tensor:
    """g (E, K, T): p exp(a) normalised over all leaves of all trees; exact zeros where p = 0.

    The exponent is shifted by the largest *reachable* logit and masked before ``exp``: an unreachable leaf can neither
    overflow nor send a gradient.
    """
    reachable = probabilities > 0
    highest = leaf_logits.detach().masked_fill(~reachable, -torch.inf).amax((0, 1), keepdim=True)
    exponent = torch.where(reachable, leaf_logits - highest, 0)
    mass = probabilities * exponent.exp()
    return mass / mass.sum((0, 1), keepdim=True)


def split_balance_loss(split_logits: Tensor, reach: list[Tensor], gamma: float) -> Tensor:
    """Mean over splits and trees of -(log s + log(1 - s))/2, s the reach-weighted share of tokens that go left.

    The authors' first public code had it (off everywhere, later removed). log 2 when every split halves its tokens;
    large when a split sends all of them one way: the antidote to tree collapse. 0 for a tree without splits.
    """
    if not reach:
        return split_logits.new_zeros(())
    reach = torch.cat(reach)
    share = (reach * smooth_step(split_logits, gamma)).sum(-1) / reach.sum(-1).clamp(min=1e-6)
    return -0.5 * ((share + 1e-6).log() + (1 - share + 1e-6).log()).mean()
