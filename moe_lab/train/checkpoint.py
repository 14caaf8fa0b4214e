"""Checkpoints: everything a run needs to go on as if it had never stopped, in one file that is never half written.

The version before the last is kept as ``<name>.previous``, so that a damaged file costs one interval, not the run.
Files hold tensors and plain values only and are read with ``torch.load(weights_only=True)``: opening one runs no code.
"""

from __future__ import annotations

import random
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_lab.atomic import atomic_file

FORMAT = "moe_lab.checkpoint/1"


class DamagedCheckpoint(ValueError):
    """Neither the checkpoint nor its predecessor can be read."""


def previous_path(path: Path) -> Path:
    """Where the version before the last is."""
    return path.with_name(path.name + ".previous")


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write atomically; the file that was there becomes the previous one."""
    with atomic_file(path, previous=previous_path(path)) as file:
        torch.save({"format": FORMAT, **content}, file)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The newest readable version (tensors on the CPU), or None if there is none.

    Raises:
        DamagedCheckpoint: there are files, but none can be read.
    """
    problems = []
    for candidate in (path, previous_path(path)):
        if not candidate.exists():
            continue
        try:
            with zipfile.ZipFile(candidate) as archive:  # torch.load itself does not look at the checksums
                if (part := archive.testzip()) is not None:
                    raise ValueError(f"wrong checksum of {part}")
            content = torch.load(candidate, map_location="cpu", weights_only=True)
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"not in the format {FORMAT!r}")
        except Exception as error:  # a damaged archive raises almost anything
            problems.append(f"{candidate} ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
            continue
        if problems:
            warnings.warn(f"damaged: {problems[0]}; going on from {candidate.name}, an earlier one.", stacklevel=2)
        return content
    if problems:
        raise DamagedCheckpoint(
            f"cannot read {' nor '.join(problems)}. Delete it, or start anew with resume=False (recompute=True)."
        )
    return None


def remove_checkpoint(path: Path) -> None:
    """Delete the checkpoint and its predecessor."""
    path.unlink(missing_ok=True)
    previous_path(path).unlink(missing_ok=True)


def _own_generators(model: nn.Module) -> Iterator[tuple[str, torch.Generator]]:
    for module_name, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Generator):
                yield f"{module_name}.{name}", value


def rng_state(model: nn.Module) -> dict[str, Any]:
    """State of all global generators, and of the `torch.Generator` objects that modules of the model hold."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
        "python": [version, list(numbers), gauss],
        "modules": {name: generator.get_state() for name, generator in _own_generators(model)},
    }


def set_rng_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Inverse of `rng_state`. CUDA states are restored as far as this machine has devices."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    for name, generator in _own_generators(model):
        if name in state["modules"]:
            generator.set_state(state["modules"][name])


def check_agreement(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another run.

    Raises:
        ValueError: names each differing field with both values.
    """
    missing = "(absent)"
    differing = [
        f"{name} was {saved.get(name, missing)}, is {now.get(name, missing)}"
        for name in sorted({*saved, *now})
        if saved.get(name, missing) != now.get(name, missing)
    ]
    if differing:
        raise ValueError(
            f"checkpoint {path.name} belongs to a run with other settings: {'; '.join(differing[:5])}. "
            "Set them back, use another checkpoint file, or start anew with resume=False (recompute=True)."
        )
