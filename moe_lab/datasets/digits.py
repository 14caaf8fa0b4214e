"""Embedded images: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, no download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (CC BY 4.0), test part, as shipped
with scikit-learn.

`multidigits` is MultiMNIST made of them: digits enlarged to 16 x 16, canvas 21 x 21, offset 5 (28, 36 and 8 in
proportion). `digits_mixture` stands in for MNIST + SVHN: the same digits in two visual domains, and which domain an
image is from is known.
"""

from __future__ import annotations

import numpy as np
import torch

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.multi_image import Images, multi_image
from moe_lab.datasets.splits import generators, stratified_split, thin


def enlarged_digits(size: int) -> Images:
    """The digits scaled (bilinear) to (1797, size, size) uint8 and their labels (1797,) int64."""
    from sklearn.datasets import load_digits

    if size < 8:
        raise ValueError(f"digit_size={size}: must be 8 or more, the digits have 8 x 8 pixels")
    digits = load_digits()
    pixels = torch.from_numpy(digits.images / 16 * 255).unsqueeze(1)
    scaled = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    return scaled.squeeze(1).round().to(torch.uint8).numpy(), digits.target.astype(np.int64)


def multidigits(
    seed: int = 0,
    *,
    digit_size: int = 16,
    partners: int = 6,
    n_train: int | None = None,
    n_valid: int | None = None,
    n_test: int | None = None,
) -> Dataset:
    """MultiMNIST's construction on the embedded digits, one task per position.

    1,283 / 257 / 257 source digits (the paper's 5 : 1 : 1), stratified, disjoint. Six partners each instead of two,
    because there are few sources: 7,698 / 1,542 / 1,542 examples.

    Returns:
        kind "vision": image (N, 1, 21, 21) int16 in 0..510, labels (N, 2).
    """
    images, labels = enlarged_digits(digit_size)
    sources, split_seed = generators(seed, 2)
    seventh = round(len(labels) / 7)
    rest, _, test = stratified_split(labels, 0, seventh, sources)
    return multi_image(
        "multidigits",
        (images[rest], labels[rest]),
        (images[test], labels[test]),
        seventh,
        seed=int(split_seed.integers(2**31)),
        partners=partners,
        n_train=n_train,
        n_valid=n_valid,
        n_test=n_test,
    )


def street_view(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same digits as a second visual domain: low contrast, either polarity, on a slanted, noisy background.

    Ink and paper levels are drawn per image 60..120 grey levels apart, a brightness ramp and pixel noise are added,
    as house numbers in photographs differ from ink on paper.

    Args:
        images: (N, S, S) uint8, bright ink on black.

    Returns:
        (N, S, S) uint8.
    """
    n, size, _ = images.shape
    ink = images / 255.0
    contrast = rng.uniform(60, 120, n) * rng.choice((-1, 1), n)
    paper = rng.uniform(60, 195, n)
    slope = rng.uniform(-40, 40, (2, n))
    line = np.linspace(-1, 1, size)
    ramp = slope[0][:, None, None] * line[None, :, None] + slope[1][:, None, None] * line[None, None, :]
    noise = rng.normal(0, 12, images.shape)
    scene = paper[:, None, None] + contrast[:, None, None] * ink + ramp + noise
    return np.clip(np.round(scene), 0, 255).astype(np.uint8)


def digits_mixture(
    seed: int = 0,
    *,
    digit_size: int = 16,
    n_train: int | None = None,
    n_valid: int | None = None,
    n_test: int | None = None,
) -> Dataset:
    """Digits from two visual domains, one 10-way task; stands in for the paper's Digits (MNIST + SVHN).

    Planted: domain 0 is ink on paper, domain 1 the same digits through `street_view`; ``expert`` = domain. Both
    domains hold every class in the same proportion, so the domain says nothing about the label. Sources are disjoint
    across splits; within a split every source digit appears once in each domain.

    Returns:
        kind "vision": image (N, 1, 16, 16) uint8, labels (N, 1), domain (N,), expert (N,); 2,566 / 514 / 514 examples.
    """
    images, labels = enlarged_digits(digit_size)
    split, scenes, order = generators(seed, 3)
    seventh = round(len(labels) / 7)
    parts = []
    for what, size, index in zip(
        ("n_train", "n_valid", "n_test"),
        (n_train, n_valid, n_test),
        stratified_split(labels, seventh, seventh, split),
        strict=True,
    ):
        both = np.concatenate((images[index], street_view(images[index], scenes)))
        domain = np.repeat((0, 1), len(index))
        chosen = thin(what, order.permutation(len(both)), size)
        parts.append(
            {
                "image": torch.from_numpy(both[chosen]).unsqueeze(1),
                "labels": torch.from_numpy(np.tile(labels[index], 2)[chosen]).unsqueeze(1),
                "domain": torch.from_numpy(domain[chosen]),
                "expert": torch.from_numpy(domain[chosen]),
            }
        )
    info = {"n_tasks": 1, "n_classes": 10, "scale": 255, "n_experts": 2, "planted": "expert = visual domain"}
    return Dataset("digits-mixture", "vision", *parts, info=info)
