"""Eight tiles of a square, each with an affine function of its own: a gate's task that fits on a page.

What is planted:

    x      ~ uniform on [-1, 1]^2                                        ``features``
    expert = tile of x: 4 columns, 2 rows, counted column by column       ``expert`` (= ``cluster``)
    y      = w_expert . x + b_expert + noise * N(0, 1)                    ``target``

Two inputs, so the routing of any gate can be drawn as a map. A tree of splits can cut the square into these tiles: one
vertical line, one more on each side, then a horizontal one in each column. Learning to is another matter: notebook 02.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.splits import generators

N_TILES = 8


def tile(features: np.ndarray) -> np.ndarray:
    """(N,) number of the tile, 0 .. 7, of points (N, 2) in [-1, 1]^2."""
    column = np.clip(np.floor((features[:, 0] + 1) * 2), 0, 3)
    return (2 * column + (features[:, 1] > 0)).astype(int)


def planted_tiles(
    seed: int = 0, *, n_train: int = 2048, n_valid: int = 1024, n_test: int = 1024, noise: float = 0.1
) -> Dataset:
    """Build the tiles; see the module's text for the symbols.

    Args:
        noise: standard deviation of the target around the tile's function (whose slopes and offsets are of order 1).

    Returns:
        kind "planted": features (N, 2), target (N,), cluster and expert (N,); info: n_experts, n_features, noise,
        ``expert_weight`` (8, 2), ``expert_bias`` (8,).
    """
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    plan, draw = generators(seed, 2)
    weight, bias = 1.5 * plan.standard_normal((N_TILES, 2)), plan.standard_normal(N_TILES)

    def split(rows: int) -> dict[str, torch.Tensor]:
        features = draw.uniform(-1, 1, (rows, 2))
        expert = tile(features)
        answer = (features * weight[expert]).sum(1) + bias[expert]
        return {
            "features": torch.from_numpy(features).float(),
            "target": torch.from_numpy(answer + noise * draw.standard_normal(rows)).float(),
            "cluster": torch.from_numpy(expert),
            "expert": torch.from_numpy(expert),
        }

    info = {
        "n_experts": N_TILES,
        "n_features": 2,
        "noise": noise,
        "expert_weight": torch.from_numpy(weight).float(),
        "expert_bias": torch.from_numpy(bias).float(),
        "planted": "expert = tile of the square; each expert is affine",
    }
    return Dataset("planted-tiles", "planted", split(n_train), split(n_valid), split(n_test), info=info)
