"""Several digits in one image, one task per position (COMET paper §5.2: MultiMNIST, Digits).

Legend: T images, C channels, H = W side, E experts, Y classes.

    y_s(image)  = sum_e g_s,e(pixels) cnn_e(image)      the gates see the flattened raw image, not features
    logits_s    = dense_Y(relu(dense_50(relu(dense_50(y_s)))))      one head per task

Images arrive as integers and are divided by 255 here, so that a stored data set stays small and no caller can forget it
(MultiMNIST adds two images: values reach 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lab.experts import ConvExperts, MultiGateMoE
from moe_lab.models.layers import head as dense_head
from moe_lab.routing import Routing


class MultiDigitClassifier(nn.Module):
    """Convolutional experts shared by the tasks, a gate and a head per task.

    Args:
        gates: one per task; a gate on features takes ``in_features = in_channels * image_size ** 2``.
        image_size: H = W.
        in_channels: C.
        n_tasks: must equal the number of gates.
        n_classes: Y per task.
        n_experts: E; by default that of the first gate.
        channels, kernel, dense: of the experts, see `ConvExperts`. Digits: ``dense=(50,)``.
        head: hidden widths of each head; (50, 50) in the paper.
        scale: images are divided by it.
        gate_offset: (C * H * W,) subtracted from the scaled pixels that the gates see (the experts see the image as it
            is); None: nothing, as in the paper. The mean training image takes away what all images have in common.
        generator: for the initial weights of everything but the gates.
    """

    def __init__(
        self,
        gates: Sequence[nn.Module],
        image_size: int,
        in_channels: int = 1,
        n_tasks: int = 2,
        *,
        n_classes: int = 10,
        n_experts: int | None = None,
        channels: Sequence[int] = (10, 20),
        kernel: int = 5,
        dense: Sequence[int] = (50, 50),
        head: Sequence[int] = (50, 50),
        scale: float = 255.0,
        gate_offset: Tensor | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if len(gates) != n_tasks:
            raise ValueError(f"{n_tasks} tasks need as many gates, got {len(gates)}")
        self.scale = scale
        self.register_buffer("gate_offset", gate_offset)
        n_experts = gates[0].n_experts if n_experts is None else n_experts
        experts = ConvExperts(n_experts, in_channels, image_size, channels, kernel, dense, generator)
        self.moe = MultiGateMoE(gates, experts)
        sizes = (experts.out_features, *head, n_classes)
        self.heads = nn.ModuleList(dense_head(sizes, generator) for _ in gates)

    def forward(self, image: Tensor, keys: Tensor | None = None) -> tuple[list[Tensor], list[Routing]]:
        """Classify.

        Args:
            image: (T, C, H, W), any numeric dtype, 0 .. 255 (510 where two images are added).
            keys: (T,) integers for gates on keys (hash).

        Returns:
            logits, one (T, Y) per task, and the Routings.
        """
        x = image.to(self.heads[0][0].weight.dtype) / self.scale
        pixels = x.flatten(1) if self.gate_offset is None else x.flatten(1) - self.gate_offset
        wants_keys = [getattr(gate, "gate_input", "features") == "keys" for gate in self.moe.gates]
        if any(wants_keys) and keys is None:
            raise ValueError("a hash gate routes by key: call the model with keys=(T,) integers")
        mixtures, routings = self.moe(x, [keys if by_key else pixels for by_key in wants_keys])
        return [layer(y) for layer, y in zip(self.heads, mixtures, strict=True)], routings
