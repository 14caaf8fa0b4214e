"""Images for networks with exits, embedded: one where difficulty is known, one that is simply harder than it looks.

``moved-digits``: scikit-learn's digits as 16 x 16 images, turned (up to 0.5 rad), scaled (up to 30 %), shifted (up to
0.3 of half the picture) and noisy. Splits are by *source* digit (half, a quarter, a quarter), each source is drawn
several times.

``planted-difficulty``: the same source digits, upright, of four difficulties d = 0 .. 3: how much noise, how little
contrast. ``difficulty`` says which: "easy leaves early" can be verified.

The validation split is cut into three parts by ``part`` (N,) = 0, 1, 2: thresholds; choice of a model; calibration. No
source digit is in two of them, and no network is trained on any.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.digits import enlarged_digits
from moe_lab.datasets.splits import generators, stratified_split

SIDE = 16
NOISE = (0.05, 0.2, 0.35, 0.55)
CONTRAST = (1.0, 0.9, 0.8, 0.7)


def _moved(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """(N, 1, S, S) turned, scaled and shifted at random; bilinear, black outside."""
    n = len(images)
    angle, shift = rng.uniform(-0.5, 0.5, n), rng.uniform(-0.3, 0.3, (n, 2))
    scale = rng.uniform(0.7, 1.3, n)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    theta = np.stack((np.stack((cos, -sin, shift[:, 0]), 1), np.stack((sin, cos, shift[:, 1]), 1)), 1)
    grid = torch.nn.functional.affine_grid(
        torch.from_numpy(theta).float(), [n, 1, images.shape[2], images.shape[3]], align_corners=False
    )
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)


def _from_digits(name: str, seed: int, sizes: tuple[int, int, int], planted: bool) -> Dataset:
    if min(sizes) < 3:
        raise ValueError(f"{name}: every split needs at least 3 images, got {sizes}")
    images, labels = enlarged_digits(SIDE)
    split, draw = generators(seed, 2)
    quarter = len(labels) // 4
    splits = []
    for size, sources in zip(sizes, stratified_split(labels, quarter, quarter, split), strict=True):
        chosen = np.resize(draw.permutation(sources), size)
        pixels = torch.from_numpy(images[chosen]).float().unsqueeze(1) / 255
        arrays = {"label": torch.from_numpy(labels[chosen]), "part": torch.arange(size) % len(sources) % 3}
        if planted:
            difficulty = draw.permutation(np.arange(size) % len(NOISE))
            noise, contrast = (
                torch.tensor(values)[difficulty][:, None, None, None].float() for values in (NOISE, CONTRAST)
            )
            arrays["difficulty"] = torch.from_numpy(difficulty)
        else:
            pixels, noise, contrast = _moved(pixels, draw), torch.tensor(0.25), torch.tensor(1.0)
        grain = torch.from_numpy(draw.standard_normal(pixels.shape)).float()
        splits.append({"image": contrast * pixels + noise * grain, **arrays})
    mean, deviation = splits[0]["image"].mean(), splits[0]["image"].std()
    for arrays in splits:
        arrays["image"] = (arrays["image"] - mean) / deviation
    info = {"n_classes": 10, "scale": 1.0, "side": SIDE, "channels": 1, "flip": False, "title": name.replace("-", " ")}
    info |= {"mean": (mean.item(),), "std": (deviation.item(),)}
    return Dataset(name, "images", *splits, info=info)


def moved_digits(seed: int = 0, *, n_train: int = 8000, n_valid: int = 4000, n_test: int = 8000) -> Dataset:
    """Kind "images": image (N, 1, 16, 16) float32, standardised by the training images; label, part (N,)."""
    return _from_digits("moved-digits", seed, (n_train, n_valid, n_test), planted=False)


def planted_difficulty(seed: int = 0, *, n_train: int = 8000, n_valid: int = 4000, n_test: int = 8000) -> Dataset:
    """Kind "images", with ``difficulty`` (N,) 0 .. 3."""
    return _from_digits("planted-difficulty", seed, (n_train, n_valid, n_test), planted=True)
