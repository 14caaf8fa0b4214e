"""Experts: banks with stacked weights, two ways (obvious, fast) to run and combine them, and how one becomes many."""

from moe_lab.experts.conv import ConvExperts
from moe_lab.experts.dispatch import combine_experts, run_everything
from moe_lab.experts.evolve import Evolution, spawn_experts
from moe_lab.experts.mlp import MLPExperts
from moe_lab.experts.moe import MoE, MultiGateMoE

__all__ = [
    "ConvExperts",
    "Evolution",
    "MLPExperts",
    "MoE",
    "MultiGateMoE",
    "combine_experts",
    "run_everything",
    "spawn_experts",
]
