"""Early exits: models that stop at the block after which they are sure enough (JEI-DNN, ICLR 2024)."""

from moe_lab.exits.cost import exit_costs, multiply_adds
from moe_lab.exits.features import uncertainty_features
from moe_lab.exits.gate import ExitGates
from moe_lab.exits.heads import linear_heads
from moe_lab.exits.losses import best_exits, gate_loss, gate_targets, inference_loss, positive_weights
from moe_lab.exits.network import MultiExitNetwork, Prediction
from moe_lab.exits.probability import exit_probabilities, exits_taken
from moe_lab.exits.split import Pieces, check_pieces, merge_blocks, split_by_name

__all__ = [
    "ExitGates",
    "MultiExitNetwork",
    "Pieces",
    "Prediction",
    "best_exits",
    "check_pieces",
    "exit_costs",
    "exit_probabilities",
    "exits_taken",
    "gate_loss",
    "gate_targets",
    "inference_loss",
    "linear_heads",
    "merge_blocks",
    "multiply_adds",
    "positive_weights",
    "split_by_name",
    "uncertainty_features",
]
