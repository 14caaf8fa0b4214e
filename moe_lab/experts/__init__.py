"""Experts: banks with stacked weights, and the two ways (obvious, fast) to run and combine them."""

from moe_lab.experts.conv import ConvExperts
from moe_lab.experts.dispatch import combine_experts, run_everything
from moe_lab.experts.mlp import MLPExperts
from moe_lab.experts.moe import MoE, MultiGateMoE

__all__ = ["ConvExperts", "MLPExperts", "MoE", "MultiGateMoE", "combine_experts", "run_everything"]
