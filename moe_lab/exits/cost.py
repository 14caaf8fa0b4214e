"""What does an answer cost? Multiply-adds of everything that runs until a sample leaves.

    cost of exit l = stem + blocks 1 .. l + heads and gates 1 .. l        (the last exit has no gate)

Matrix products, convolutions and attention products are counted as they run, by PyTorch's own FLOP counter (2 FLOPs are
a multiply-add); norms and activations are not. A gate costs 9 K + 6 by hand (K classes): largest probability K, margin
K + 1, entropy 2 K, entropy of squares 5 K, the linear layer 5.

The authors' counter charges a linear layer for the *batch*, not for its tokens, and attention products not at all:
`one_token_costs` is that mistake by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_lab.modes import evaluating


def gate_multiply_adds(n_classes: int) -> int:
    """9 K + 6."""
    return 9 * n_classes + 6


def multiply_adds(module: nn.Module, x: Tensor) -> int:
    """Multiply-adds of ``module(x)`` in eval mode, per row of x (its first dimension)."""
    # The counter does not see the CPU's fused attention; the plain one does the same products.
    with evaluating(module), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() // 2 // max(1, x.shape[0])


@torch.no_grad()
def exit_costs(
    blocks: Sequence[nn.Module],
    heads: Sequence[nn.Module],
    x: Tensor,
    n_classes: int,
    *,
    stem: nn.Module | None = None,
) -> Tensor:
    """Multiply-adds per sample until each exit.

    Args:
        blocks: L of them, each takes what the one before returns.
        heads: L inference modules on the blocks' outputs.
        x: (1, ...) an input of the right size.
        n_classes: K.
        stem: before the first block.

    Returns:
        (L,) float64, strictly increasing if every block costs something. Divide by the last for the normalised c_l.
    """
    if len(blocks) != len(heads):
        raise ValueError(f"{len(blocks)} blocks need as many heads, got {len(heads)}")
    total, costs = 0, []
    with evaluating(nn.ModuleList([*blocks, *heads, *([] if stem is None else [stem])])):
        if stem is not None:
            total += multiply_adds(stem, x)
            x = stem(x)
        for index, (block, head) in enumerate(zip(blocks, heads, strict=True)):
            total += multiply_adds(block, x)
            x = block(x)
            total += multiply_adds(head, x)
            if index < len(blocks) - 1:
                total += gate_multiply_adds(n_classes)
            costs.append(total)
    return torch.tensor(costs, dtype=torch.float64)


@torch.no_grad()
def one_token_costs(
    blocks: Sequence[nn.Module], heads: Sequence[nn.Module], x: Tensor, *, stem: nn.Module | None = None
) -> Tensor:
    """(L,) float64: what is left of the costs if a linear layer is charged once per sample and nothing else is.

    The authors' counter adds 5/2 per element of a norm and 4 per element of a GELU, of *all* tokens, and for
    T2T-ViT-7 these dominate: its first exit costs .21 of the whole here, .41 in their files, .36 in truth. Only for
    token models.
    """

    def linear(module: nn.Module) -> int:
        return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))

    total, costs = linear(stem) if stem is not None else 0, []
    for block, head in zip(blocks, heads, strict=True):
        total += linear(block) + linear(head)
        costs.append(total)
    return torch.tensor(costs, dtype=torch.float64)
