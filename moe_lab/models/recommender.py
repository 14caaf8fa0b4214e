"""A recommender with two tasks: will the user watch it, and which rating would it get (COMET paper §5.2).

Legend: T rows (user, item), E experts, D = 2 x embedding, F hidden.

    x        = [user embedding, item embedding]                    (T, D)      what experts and gates see
    y_s      = sum_e g_s,e(x) dropout(relu(x W_e + b_e))           (T, F)      one gate per task s
    output_s = w_s . relu(y_s V_s + c_s) + d_s                     (T,)        one head per task

MovieLens: embeddings of 128, 16 experts of 256, heads of 256; Books: 64, 9 experts of 128; Jester: 64, 16 of 128.
Initialisation is Keras's: embeddings in U(-0.05, 0.05), dense layers Glorot uniform with zero bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_lab.experts import MLPExperts, MultiGateMoE
from moe_lab.models.layers import head as dense_head
from moe_lab.routing import Routing


class RecommenderOutput(NamedTuple):
    """What the model says about T rows.

    Attributes:
        watch_logit: (T,), before the sigmoid.
        rating: (T,), in the unit of the ratings it was trained on.
        routings: the gates' decisions, watch first.
    """

    watch_logit: Tensor
    rating: Tensor
    routings: list[Routing]


class TwoTaskRecommender(nn.Module):
    """Embeddings, a shared bank of experts, a gate and a head per task.

    Args:
        n_users, n_items: vocabulary sizes.
        embedding: width of each of the two embeddings.
        hidden: F, width of an expert.
        head: hidden width of each head.
        n_experts: E.
        gates: two gates over E experts, watch first. A gate on features takes ``in_features = 2 * embedding``; a gate
            on keys (hash) gets the user.
        dropout: behind the experts' ReLU.
        generator: for the initial weights of everything but the gates.
    """

    def __init__(
        self,
        n_users: int,
        n_items: int,
        *,
        embedding: int = 128,
        hidden: int = 256,
        head: int = 256,
        n_experts: int,
        gates: Sequence[nn.Module],
        dropout: float = 0.5,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if len(gates) != 2:
            raise ValueError(f"two tasks (watch, rating) need two gates, got {len(gates)}")
        self.user_embedding = nn.Embedding(n_users, embedding)
        self.item_embedding = nn.Embedding(n_items, embedding)
        for table in (self.user_embedding, self.item_embedding):
            nn.init.uniform_(table.weight, -0.05, 0.05, generator=generator)
        experts = MLPExperts(n_experts, (2 * embedding, hidden), dropout=dropout, generator=generator)
        self.moe = MultiGateMoE(gates, experts)
        self.heads = nn.ModuleList(dense_head((hidden, head, 1), generator) for _ in gates)

    def forward(self, user: Tensor, item: Tensor) -> RecommenderOutput:
        """user, item: integers (T,) below the vocabulary sizes -> RecommenderOutput."""
        x = torch.cat((self.user_embedding(user), self.item_embedding(item)), -1)
        seen = [user if getattr(gate, "gate_input", "features") == "keys" else x for gate in self.moe.gates]
        mixtures, routings = self.moe(x, seen)
        watch, rating = (layer(y).squeeze(-1) for layer, y in zip(self.heads, mixtures, strict=True))
        return RecommenderOutput(watch, rating, routings)
