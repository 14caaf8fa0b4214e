"""The "+" of any gate: learn, while everything trains, which expert sits at which output (COMET, KDD 2023).

Legend: T tokens, E experts, K trees or selectors, Q permutations (1 or K).

    g~_l  ~  sum_j sum_i g_ij P^(j)_il        output i is sent to expert l with weight P_il; P from `Permutation`

While P is soft a token reaches all experts: until the search ends a sparse gate costs as much as a dense one. Then P is
a permutation, the wrapper only relabels, and exact zeros are exact zeros again: the wrapped gate followed by an expert
bank is, number for number, the bare gate followed by the bank in the order ``bank[assignment]``.

Regulariser ``permutation`` in training (the paper's weight is 1e-4): entropy of P plus entropy of P with its rows
normalised; 0 after the search. A `Permutation` shared by several gates is reported by the first of them only.

Where we differ: the authors renormalise rows for COMET, Top-k and Hash, but not for DSelect-k and Softmax, whose rows
then drift from 1 together with the rows of P. Here every row keeps the mass that the gate gave it
(``renormalise=False`` switches to theirs). Q = K needs a gate that has trees: averaging K permutations of one output
would be no permutation.

Taught in notebook 05.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.gates.base import Gate
from moe_lab.gates.permutation import SCHEDULES, Permutation, Schedule
from moe_lab.gates.sinkhorn import permutation_entropy
from moe_lab.routing import Routing

__all__ = ["SCHEDULES", "Permutation", "PermutationSearch", "Schedule", "permute_hard", "permute_soft"]


def permute_soft(weights: Tensor, matrix: Tensor, *, renormalise: bool = True) -> Tensor:
    """g~ (T, E, K) of per-tree weights g (T, E, K) and P (Q, E, E), Q = 1 or K.

    ``renormalise``: scale each token's E x K weights to the sum they had.
    """
    matrix = matrix.to(weights.dtype).expand(weights.shape[-1], -1, -1)
    with torch.autocast(weights.device.type, enabled=False):
        mixed = torch.einsum("tik,kil->tlk", weights, matrix)
    if not renormalise:
        return mixed
    tiny = torch.finfo(weights.dtype).tiny
    return mixed * (weights.sum((1, 2), keepdim=True) / mixed.sum((1, 2), keepdim=True).clamp(min=tiny))


def permute_hard(weights: Tensor, assignment: Tensor) -> Tensor:
    """Relabel: g~[:, assignment[j, i], j] = g[:, i, j]; the same numbers in other columns. assignment (Q, E)."""
    source = assignment.argsort(-1).T.expand(-1, weights.shape[-1])
    return weights.gather(1, source.expand(weights.shape[0], -1, -1))


class PermutationSearch(Gate):
    """A gate with local search around it; itself a gate.

    Args:
        gate: any gate.
        steps: optimiser steps until the permutation is hard (the paper: 1 to 10 epochs, 9 at most in its code).
        schedule, n_permutations, noise, generator: see `Permutation`; n_permutations is 1 or the gate's ``k``.
        permutation: share this one instead of making one (then give none of the above).
        renormalise: keep each row's mass while P is soft.

    ``gate.permutation.advance()`` moves the search by a step; ``fit`` does it. Details: those of the gate, with
    ``tree_weights`` relabelled, so that their sum over K is again ``weights``.

    Raises:
        ValueError: arguments that contradict each other, or (when called) Q > 1 with a gate without trees.
    """

    def __init__(
        self,
        gate: Gate,
        steps: int | None = None,
        schedule: str | Schedule = "default",
        n_permutations: int = 1,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        permutation: Permutation | None = None,
        renormalise: bool = True,
    ):
        super().__init__(gate.n_experts, gate.k, gate.in_features)
        if (steps is None) == (permutation is None):
            raise ValueError("give either steps (a search of its own) or permutation (a shared one)")
        if permutation is None:
            permutation = Permutation(
                gate.n_experts,
                steps,
                schedule=schedule,
                n_permutations=n_permutations,
                noise=noise,
                generator=generator,
            )
        q, n_experts, _ = permutation.logits.shape
        if n_experts != gate.n_experts:
            raise ValueError(f"the permutation is for {n_experts} experts, the gate has {gate.n_experts}")
        if q not in (1, gate.k):
            raise ValueError(f"n_permutations must be 1 or the gate's k = {gate.k}, got {q}")
        self.gate = gate
        self.gate.reads_details = True  # the weights of each tree
        self.permutation = permutation
        self.renormalise = renormalise
        self.gate_input = gate.gate_input
        self.reports_loss = not permutation.has_reporter
        permutation.has_reporter = True

    def forward(self, x: Tensor | None = None, **options) -> Routing:
        """What the gate says about x, sent to other experts. ``options`` are passed on to the gate."""
        routing = self.gate(x, **options)
        per_tree = routing.details.get("tree_weights")
        if per_tree is None and self.permutation.logits.shape[0] > 1:
            raise ValueError(
                f"{type(self.gate).__name__} has no trees (no details['tree_weights']): use n_permutations=1"
            )
        weights = routing.weights.unsqueeze(-1) if per_tree is None else per_tree
        losses = dict(routing.losses)
        if self.permutation.is_soft:
            matrix = self.permutation.matrix()
            weights = permute_soft(weights, matrix, renormalise=self.renormalise)
            regulariser = permutation_entropy(matrix)
        else:
            weights = permute_hard(weights, self.permutation.assignment())
            regulariser = weights.new_zeros(())
        if self.training and self.reports_loss:
            losses["permutation"] = regulariser
        details = dict(routing.details)
        if per_tree is not None:
            details["tree_weights"] = weights
        most = None if self.permutation.is_soft else routing.most
        return Routing(weights.sum(-1), losses, details, most)
