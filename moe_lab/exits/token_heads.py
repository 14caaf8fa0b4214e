"""Heads of one form, linear(norm(class token)), recognised, so that a kernel can compute them and their exit at once.

Such a head is two or three small operations, behind which the exit waits (`kernels.judge_tokens`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from moe_lab.exits.heads import Token
from moe_lab.models.vit import ClassToken


class TokenHead(NamedTuple):
    """The two modules of linear(norm(class token)); their parameters are read anew each time."""

    norm: nn.LayerNorm
    linear: nn.Linear


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential:
        for child in module:
            yield from _parts(child)
    elif type(module) is ClassToken:
        yield from (Token("class"), module.norm)
    else:
        yield module


def token_head(head: nn.Module, n_classes: int) -> TokenHead | None:
    """The head as a `TokenHead`, or None if it is anything else, has hooks that would not run, or runs under autocast.

    Args:
        head: inference module, eval mode.
        n_classes: K that it must have.
    """
    parts = list(_parts(head))
    if [type(part) for part in parts] != [Token, nn.LayerNorm, nn.Linear] or parts[0].kind != "class":
        return None
    norm, linear = parts[1:]
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in head.modules())
    parameters = [norm.weight, norm.bias, linear.weight, linear.bias]
    if hooked or any(parameter is None for parameter in parameters) or len(norm.normalized_shape) != 1:
        return None
    if not all(parameter.is_contiguous() for parameter in parameters):
        return None
    alike = len({parameter.dtype for parameter in parameters}) == 1 and linear.in_features == norm.normalized_shape[0]
    if not alike or linear.out_features != n_classes or torch.is_autocast_enabled(linear.weight.device.type):
        return None
    return TokenHead(norm, linear)
