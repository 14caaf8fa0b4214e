"""Dropout masks that are a function of (seed, step, position), for trials that train side by side.

    word_i = mix(key + (i + 1) c),   key = mix(mix(seed + c) + (step + 1) c'),   mix: SplitMix64's finaliser

Nothing is drawn from a generator, so there is no state to save, and a trial gets the same masks alone, among a hundred
others, and after a kill. As in `moe_lab.experts.dropout` eight decisions share one 64-bit word, and p is rounded to a
multiple of 1/256 (here on every device).

Legend: K trials, N numbers of one trial.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with these 64 bits."""
    return value - 2**64 if value >= 2**63 else value


_GOLDEN, _STEP = _signed(0x9E3779B97F4A7C15), 0xD1B54A32D192ED03
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _xor_shifted(z: Tensor, bits: int) -> Tensor:
    return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))  # int64 shifts copy the sign: cut it off


def _mix(z: Tensor) -> Tensor:
    z = _xor_shifted(z, 30) * _FIRST
    z = _xor_shifted(z, 27) * _SECOND
    return _xor_shifted(z, 31)


def random_words(seeds: Tensor, step: int, n: int) -> Tensor:
    """(K, n) int64, all 64 bits random: words 0 .. n-1 of each seed (K,) int64 at this step."""
    key = _mix(_mix(seeds + _GOLDEN) + _signed((step + 1) * _STEP % 2**64))
    places = torch.arange(1, n + 1, device=seeds.device)
    return _mix(key.unsqueeze(-1) + places * _GOLDEN)


def _kept_bytes(p: float) -> int:
    if not 0 < p < 1:
        raise ValueError(f"p must lie in (0, 1), got {p}; for p = 0 there is nothing to mask")
    return min(max(round((1 - p) * 256), 1), 255)


def keep_masks(seeds: Tensor, step: int, shape: tuple[int, ...], p: float) -> Tensor:
    """(K, *shape) bool: which numbers survive dropout.

    Args:
        seeds: (K,) int64, one per trial.
        step: the number of the training step.
        shape: of one trial's mask.
        p: probability of dropping a number, in (0, 1); rounded to 1/256.

    Raises:
        ValueError: p outside (0, 1).
    """
    n = math.prod(shape)
    random_bytes = random_words(seeds, step, -(-n // 8)).view(torch.uint8)[:, :n]
    return (random_bytes < _kept_bytes(p)).view(-1, *shape)


def survivor_scale(p: float) -> float:
    """1 / (probability of surviving, as rounded): survivors are multiplied by it, so that the mean is kept."""
    return 256 / _kept_bytes(p)
