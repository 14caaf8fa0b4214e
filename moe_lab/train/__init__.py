"""Training: `fit` (the only training loop), its config and history, and `evaluating`."""

from moe_lab.modes import evaluating
from moe_lab.train.checkpoint import DamagedCheckpoint
from moe_lab.train.config import FitConfig, History, LearningRate
from moe_lab.train.loop import fit
from moe_lab.train.meter import NonFiniteLoss

__all__ = ["DamagedCheckpoint", "FitConfig", "History", "LearningRate", "NonFiniteLoss", "evaluating", "fit"]
