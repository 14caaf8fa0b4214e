"""Training and eval mode, put back module by module: a part that was frozen in eval mode stays there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

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
    """Eval mode without gradients; afterwards each module has the mode it had (frozen parts may differ).

    Where all are in eval mode already there is nothing to note, set and put back, which for one small image would take
    as long as a good part of its forward pass.
    """
    done = in_eval_mode(model)
    with nullcontext() if done else keeping_modes(model), torch.no_grad():
        if not done:
            model.eval()
        yield


def in_eval_mode(model: nn.Module) -> bool:
    """Every module of it is."""
    inside: list[nn.Module | None] = [model]
    while inside:
        part = inside.pop()
        if part is not None:
            if part.training:
                return False
            inside.extend(part._modules.values())  # `modules()` keeps a set of what it has seen: slower
    return True
