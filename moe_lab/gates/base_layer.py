"""BASE layer: tokens are *assigned*, so that every expert gets the same number (Lewis et al., ICML 2021).

Legend: T tokens, E experts, D width.

    s_te = x_t . c_e,  c_e centroids (orthogonal start)
    training:    a = argmax of sum_t s_{t, a_t} over assignments with ceil or floor of T/E tokens per expert
    evaluation:  a_t = argmax_e s_te                                     (greedy: no token depends on another)
    g_{t, a_t} = sigmoid(s_{t, a_t}),  0 elsewhere

No balancing loss: balance is a constraint. The assignment has no gradient; centroids learn through the sigmoid.

Where we differ: the EvoMoE authors' BASE experts are deep residual stacks with a residual of their own. Here a gate is
a gate: the same experts and the same single residual connection as for every other gate, so that gates are compared.
The assignment is exact (shortest augmenting paths between experts, on the CPU), theirs an auction.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from moe_lab.gates.base import Gate
from moe_lab.routing import Routing

_SWEEPS = 4
"""Each leaves about a tenth of the tokens that are still too many at some expert."""


def _prices(scores: Tensor, fair: int) -> Tensor:
    """(E,) prices p at which argmax_e s_te - p_e is nearly balanced: each expert in turn asks as much as leaves it
    ``fair`` tokens at the others' prices (coordinate descent on the dual of the assignment)."""
    n_experts = scores.shape[1]
    prices = scores.new_zeros(n_experts)
    if n_experts < 2 or fair < 1:
        return prices
    for _ in range(_SWEEPS):
        for expert in range(n_experts):
            net = scores - prices
            net[:, expert] = -torch.inf
            top = (scores[:, expert] - net.max(1).values).topk(fair + 1).values
            prices[expert] = (top[-2] + top[-1]) / 2
    return prices


@torch.no_grad()
def balanced_assignment(scores: Tensor) -> Tensor:
    """The assignment with the largest total score among those that are balanced.

    Two steps. Prices of experts, found where the scores are, make the greedy choice nearly balanced. Whoever is still
    too many moves along the chain of experts that costs least (shortest augmenting paths between *experts*, on the
    CPU): O(moved tokens x (E^3 + T)), where the Hungarian method on T x T takes O(T^3). The answer is exact whatever
    the prices are: the greedy choice at any prices is the best one with its own numbers of tokens per expert.

    Args:
        scores: (T, E).

    Returns:
        (T,) int64; every expert gets floor(T/E) or ceil(T/E) tokens.

    Raises:
        ValueError: a score is not finite: no assignment is best then.
    """
    n_tokens, n_experts = scores.shape
    if not scores.isfinite().all():
        raise ValueError("BASE: scores must be finite; the tokens, or the centroids, hold NaN or infinity")
    fair, free = divmod(n_tokens, n_experts)  # ``free`` experts take one token more
    prices = _prices(scores.detach(), fair).cpu().double().numpy()
    s = scores.detach().cpu().double().numpy()
    chosen = (s - prices).argmax(1)
    has_extra = np.zeros(n_experts, dtype=bool)
    has_extra[np.argsort(-prices, kind="stable")[:free]] = True  # the dearest: most wanted
    surplus = np.bincount(chosen, minlength=n_experts) - fair - has_extra
    # cost[a, b]: least loss of score by moving one token from a to b; node E stands for the places beyond the fair
    # share.
    cost = np.full((n_experts + 1, n_experts + 1), np.inf)
    mover = np.zeros((n_experts, n_experts), dtype=np.int64)

    def refresh(expert: int) -> None:
        members = np.flatnonzero(chosen == expert)
        cost[expert, :n_experts] = np.inf
        if len(members):
            loss = s[members, expert, None] - s[members]
            best = loss.argmin(0)
            mover[expert], cost[expert, :n_experts] = members[best], loss[best, np.arange(n_experts)]
            cost[expert, expert] = np.inf

    for expert in range(n_experts):
        refresh(expert)
    while (surplus > 0).any():
        cost[:n_experts, -1] = np.where(has_extra, np.inf, 0.0)
        cost[-1, :n_experts] = np.where(has_extra, 0.0, np.inf)
        distance = np.append(np.where(surplus > 0, 0.0, np.inf), np.inf)
        before = np.full(n_experts + 1, -1)
        for _ in range(n_experts + 1):  # Bellman and Ford: costs of moving back are negative
            through = distance[:, None] + cost
            via = through.argmin(0)
            shortest = through[via, np.arange(n_experts + 1)]
            shorter = shortest < distance - 1e-12
            if not shorter.any():
                break
            distance, before = np.where(shorter, shortest, distance), np.where(shorter, via, before)
        node = int(np.where(surplus < 0, distance[:-1], np.inf).argmin())
        surplus[node] += 1
        moves = []
        while before[node] >= 0:
            source = int(before[node])
            if node == n_experts:
                has_extra[source] = True
            elif source == n_experts:
                has_extra[node] = False
            else:
                moves.append((mover[source, node], source, node))
            node = source
        surplus[node] -= 1
        for token, _, target in moves:
            chosen[token] = target
        for expert in {expert for move in moves for expert in move[1:]}:
            refresh(expert)
    return torch.from_numpy(chosen).to(scores.device)


class Centroids(nn.Module):
    """Scores s = x C^T of tokens against one vector per expert; computed in float32 at least, also under autocast."""

    def __init__(
        self, in_features: int, n_experts: int, *, gain: float = 0.1, generator: torch.Generator | None = None
    ):
        super().__init__()
        start = torch.empty(n_experts, in_features)
        nn.init.orthogonal_(start, gain=gain, generator=generator)
        self.weight = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, D) -> (T, E)."""
        dtype = torch.float64 if torch.float64 in (x.dtype, self.weight.dtype) else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return x.to(dtype) @ self.weight.to(dtype).T


def one_expert_weights(scores: Tensor, expert: Tensor) -> Tensor:
    """(T, E) weights: sigmoid of the chosen score at the chosen expert (T,), 0 elsewhere."""
    index = expert.unsqueeze(-1)
    return torch.zeros_like(scores).scatter(-1, index, scores.gather(-1, index).sigmoid())


class BaseLayerGate(Gate):
    """Balanced assignment in training, greedy in evaluation.

    Args:
        in_features: D. There is no static form: tokens that are all alike cannot be assigned.
        n_experts: E.
        generator: for the initial centroids.

    Details: ``scores`` s (T, E).
    """

    def __init__(
        self,
        in_features: int,
        n_experts: int,
        *,
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_experts, 1, in_features)
        if in_features is None:
            raise ValueError("a BASE layer is per example: it needs in_features")
        self.centroids = Centroids(in_features, n_experts, generator=generator)

    def forward(self, x: Tensor) -> Routing:
        """x (T, D) -> Routing with exactly one expert per row."""
        scores = self.centroids(x)
        expert = balanced_assignment(scores) if self.training and len(scores) else scores.argmax(-1)
        return Routing(one_expert_weights(scores, expert), {}, {"scores": scores}, most=1)
