"""Training and eval mode, put back module by module: a part that was frozen in eval mode stays there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Whatever the block does, afterwards each module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module has the mode it had (frozen parts may differ)."""
    with keeping_modes(model), torch.no_grad():
        model.eval()
        yield
