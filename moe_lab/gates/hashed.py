"""Hash routing: a fixed table decides; nothing is learned (Roller et al. 2021; "Hash-r" in the COMET paper).

    g(key) = one-hot(table[key])

The COMET authors draw each user's expert once, uniformly, from an unseeded generator, so that every trial of a study
shares one arbitrary table and no run can be repeated. Here ``seed`` makes the table; it is stored with the weights.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from moe_lab.gates.base import Gate
from moe_lab.routing import Routing


class HashGate(Gate):
    """One fixed expert per key (user, token id).

    Args:
        n_keys: keys are 0 .. n_keys - 1.
        n_experts: E.
        balanced: False: each key's expert is one uniform draw, loads differ by chance. True: a shuffled round robin,
            the number of keys per expert differs by at most one.
        seed: of the table.

    There is no static form: one row for everybody would be one expert for everybody.
    """

    gate_input = "keys"

    def __init__(self, n_keys: int, n_experts: int, *, balanced: bool = False, seed: int = 0):
        super().__init__(n_experts, 1)
        if n_keys < 1:
            raise ValueError(f"n_keys must be at least 1, got {n_keys}")
        generator = torch.Generator().manual_seed(seed)
        if balanced:
            table = torch.arange(n_keys).remainder(n_experts)[torch.randperm(n_keys, generator=generator)]
        else:
            table = torch.randint(n_experts, (n_keys,), generator=generator)
        self.register_buffer("table", table)

    @classmethod
    def by_frequency(cls, counts: Tensor, n_experts: int) -> HashGate:
        """Balanced in *tokens*, not in keys: the most frequent key first, each to the expert with the least so far.

        Args:
            counts: (keys,) how often each key occurs in training, not negative. One key that is more frequent than 1/E
                still overloads its expert: a hash cannot divide a key.
            n_experts: E.
        """
        counts = torch.as_tensor(counts)
        if counts.dim() != 1 or bool((counts < 0).any()):
            raise ValueError(f"counts must be one number per key, not negative; got shape {tuple(counts.shape)}")
        gate = cls(len(counts), n_experts)
        load = [(0, 0, expert) for expert in range(n_experts)]  # tokens, keys (for those that never occur), expert
        for key in counts.argsort(descending=True, stable=True).tolist():
            tokens, keys, expert = heapq.heappop(load)
            gate.table[key] = expert
            heapq.heappush(load, (tokens + counts[key].item(), keys + 1, expert))
        return gate

    def forward(self, keys: Tensor) -> Routing:
        """keys: integer (T,) -> Routing with weights one-hot (T, E). Raises IndexError for a key outside the table."""
        if keys.is_floating_point() or keys.dtype == torch.bool or keys.dim() != 1:
            raise ValueError(
                "HashGate is called with integer keys of shape (tokens,), "
                f"got {keys.dtype} of shape {tuple(keys.shape)}; with MoE pass them as gate_input"
            )
        expert = self.table.index_select(0, keys.long())
        return Routing(torch.nn.functional.one_hot(expert, self.n_experts).float(), most=1)
