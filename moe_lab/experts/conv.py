"""A bank of small convolutional networks (COMET paper §5.2, Digits and MultiMNIST).

Legend: N rows, E experts, C channels, H = W image side, F outputs.

    f_e(image) = dense(pool(relu(conv2(pool(relu(conv1(image)))))))     'valid' convolutions, 2 x 2 max-pools,
                                                                        dense: one or two layers with ReLU

Where we differ: the paper's table does not name the activation behind these convolutions; we take ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lab.experts.base import ExpertBank, check_counts, glorot_uniform_
from moe_lab.experts.mlp import MLPExperts


class ConvExperts(ExpertBank):
    """E networks: for each entry of ``channels`` conv-ReLU-pool, flatten, then dense layers with ReLU.

    Args:
        n_experts: E.
        in_channels: C of the images.
        image_size: H = W of the images.
        channels: filters of each convolution; (10, 20) in the paper.
        kernel: their side; 5 in the paper, smaller for small images.
        dense: widths of the dense layers; (50, 50) for MultiMNIST, (50,) for Digits.
        generator: for the initial weights (Glorot uniform, biases 0).

    Raises:
        ValueError: nothing is left of the image behind the last pool.
    """

    def __init__(
        self,
        n_experts: int,
        in_channels: int = 1,
        image_size: int = 36,
        channels: Sequence[int] = (10, 20),
        kernel: int = 5,
        dense: Sequence[int] = (50, 50),
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        side = image_size
        for _ in channels:
            side = (side - kernel + 1) // 2
            if side < 1:
                raise ValueError(
                    f"an image of side {image_size} is too small for {len(channels)} convolutions of side {kernel}, "
                    "each with a 2 x 2 pool; take a smaller kernel or fewer channels"
                )
        self.n_experts, self.image_size, self.in_channels = n_experts, image_size, in_channels
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for c_in, c_out in zip((in_channels, *channels[:-1]), channels, strict=True):
            weight = torch.empty(n_experts, c_out, c_in, kernel, kernel)
            area = kernel * kernel
            self.weights.append(nn.Parameter(glorot_uniform_(weight, c_in * area, c_out * area, generator)))
            self.biases.append(nn.Parameter(torch.zeros(n_experts, c_out)))
        self.head = MLPExperts(n_experts, (channels[-1] * side * side, *dense), generator=generator)
        self.out_features = self.head.out_features

    @staticmethod
    def _features(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        """One expert's convolutions: x (n, C, H, W) -> (n, features). ReLU behind the pool: same values, less work."""
        for weight, bias in zip(weights, biases, strict=True):
            x = nn.functional.max_pool2d(nn.functional.conv2d(x, weight, bias), 2).relu()
        return x.flatten(1)

    def _all_features(self, x: Tensor) -> Tensor:
        """Every expert's convolutions of the same x (T, C, H, W) as one grouped convolution each -> (E * T, features).

        For GPUs, where 16 small kernels cost 16 launches. On a CPU the loop is faster at the paper's sizes (2.4 s
        against 3.1 s, forward and backward, 16 experts, 128 images of 36 x 36, one busy core).
        """
        n_images = x.shape[0]
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            groups = self.n_experts if layer else 1  # the first layer's input is the same for all: one wide layer
            x = nn.functional.conv2d(x, weight.flatten(0, 1), bias.flatten(), groups=groups)
            x = nn.functional.max_pool2d(x, 2).relu()
        return x.view(n_images, self.n_experts, -1).transpose(0, 1).flatten(0, 1)

    def forward(self, x: Tensor, counts: Sequence[int] | Tensor | None = None) -> Tensor:
        """x (N, C, H, W) sorted by expert, counts (E,) -> (N, F); None: every expert on all x -> (E * T, F)."""
        counts = check_counts(counts, x.shape[0], self.n_experts)
        if counts is None and x.is_cuda:
            return self.head(self._all_features(x), [x.shape[0]] * self.n_experts)
        rows = [x] * self.n_experts if counts is None else x.split(counts)
        # unbind: its backward stacks the experts' gradients once (zeros where an expert did not run)
        layers = [zip(*(p.unbind(0) for p in stack), strict=True) for stack in (self.weights, self.biases)]
        experts = zip(rows, *layers, strict=True)
        features = [self._features(x_e, w, b) for x_e, w, b in experts if x_e.shape[0]]
        if not features:
            features = [x.new_empty(0, self.head.sizes[0])]
        return self.head(torch.cat(features), [x_e.shape[0] for x_e in rows])

    def single(self, expert: int, x: Tensor) -> Tensor:
        """Expert ``expert`` on every image of x (T, C, H, W) -> (T, F), in plain layers."""
        features = self._features(x, [w[expert] for w in self.weights], [b[expert] for b in self.biases])
        return self.head.single(expert, features)

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, in_channels={self.in_channels}, image_size={self.image_size}"
