"""Images ready for a vision run: splits with hash keys, names of the tasks, and what needs no network.

Hash routing needs a key per example. A recommender has users; an image has only its pixels. So the key is a checksum of
the pixels: one image always has the same key, on every machine and in every run, and equal pixels are the only thing
that makes keys alike. A test image's expert is therefore as arbitrary as any: this is the baseline that a gate which
looks at the image has to beat.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_lab import datasets
from moe_lab.datasets import Dataset
from moe_lab.experiments.vision_config import VisionConfig

_PRIME = 2**31 - 1
_ROWS = 4096


def image_keys(images: Tensor, n_keys: int) -> Tensor:
    """(N,) int64 in [0, n_keys): sum of pixel x fixed random multiplier, modulo 2^31 - 1, modulo ``n_keys``.

    Args:
        images: (N, ...) integers, below 2^15 pixels of at most 2^15: the sum then stays exact in 64 bits.
        n_keys: size of the table.
    """
    pixels = images.flatten(1)
    generator = torch.Generator().manual_seed(20_230_606)
    multiplier = torch.randint(1, _PRIME, (pixels.shape[1],), generator=generator)
    parts = [(part.long() * multiplier).sum(1) % _PRIME % n_keys for part in pixels.split(_ROWS)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def task_names(n_tasks: int) -> tuple[str, ...]:
    """What the tasks are called in losses, curves and metrics."""
    return ("digit",) if n_tasks == 1 else ("top_left", "bottom_right")


@lru_cache(maxsize=2)
def _load(name: str, seed: int, options: tuple[tuple[str, Any], ...], n_keys: int) -> Dataset:
    data = datasets.load(name, seed=seed, **dict(options))
    splits = [{**split, "key": image_keys(split["image"], n_keys)} for split in data.splits.values()]
    return Dataset(data.name, data.kind, *splits, info=data.info)


def load_data(config: VisionConfig) -> Dataset:
    """The data of a run, each split with its ``key`` (N,); runs of one process that differ in gate or seed share it."""
    return _load(config.dataset, config.data_seed, tuple(sorted(config.data_options.items())), config.n_keys)


def mean_image(data: Dataset) -> Tensor:
    """(C * H * W,) float32: the mean training image, scaled as models scale it."""
    images = data.train["image"]
    total = sum(part.double().sum(0) for part in images.split(_ROWS))
    return (total / len(images) / data.info["scale"]).float().flatten()


def constant_baseline(train: Mapping[str, Tensor], test: Mapping[str, Tensor], n_classes: int) -> dict[str, float]:
    """What needs no network, means over the tasks.

    Returns:
        constant_loss: cross entropy on test of always predicting the training frequencies, nats.
        constant_accuracy: of always answering the most frequent training class.
    """
    losses, hits = [], []
    for labels, truth in zip(train["labels"].T, test["labels"].T, strict=True):
        counts = torch.bincount(labels, minlength=n_classes).double()
        frequency = (counts / counts.sum()).clamp(min=1e-6)
        losses.append(-frequency.log()[truth].mean())
        hits.append((truth == counts.argmax()).double().mean())
    return {"constant_loss": float(sum(losses) / len(losses)), "constant_accuracy": float(sum(hits) / len(hits))}
