"""Configs and rows as plain JSON: exact floats, explicit NaN, and a fingerprint that does not change by accident."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_NON_FINITE = "__float__"  # JSON has no NaN: {"__float__": "nan"}


def to_plain(value: Any, where: str = "value") -> Any:
    """Dataclasses, mappings, tuples, paths, NumPy and PyTorch values -> dict, list, str, int, float, bool, None.

    Raises:
        ValueError: something else is inside; the message says where.
    """
    if isinstance(value, np.generic | np.ndarray):  # before float: numpy.float64 is one, and writes itself differently
        return to_plain(value.tolist(), where)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_plain(getattr(value, field.name), f"{where}.{field.name}") for field in fields}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, torch.Tensor):
        return to_plain(value.detach().cpu().tolist(), where)
    raise ValueError(
        f"{where} is a {type(value).__name__}, which cannot be saved; use numbers, strings, lists or dicts of them."
    )


def _mark(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_NON_FINITE: repr(value)}
    if isinstance(value, dict):
        return {key: _mark(item) for key, item in value.items()}
    return [_mark(item) for item in value] if isinstance(value, list) else value


def _unmark(item: dict[str, Any]) -> Any:
    return float(item[_NON_FINITE]) if set(item) == {_NON_FINITE} else item


def dumps(value: Any) -> str:
    """Plain value -> valid JSON text; floats come back bit for bit, NaN and infinities too."""
    return json.dumps(_mark(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def loads(text: str) -> Any:
    """Inverse of `dumps`."""
    return json.loads(text, object_hook=_unmark)


def _whole_floats_as_integers(value: Any) -> Any:
    # gamma = 1 typed in a notebook and gamma = 1.0 in a script are one setting, so they must share one fingerprint.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole_floats_as_integers(item) for key, item in value.items()}
    return [_whole_floats_as_integers(item) for item in value] if isinstance(value, list) else value


def fingerprint(value: Any) -> str:
    """12 hexadecimal digits; equal for equal plain values, whatever the order of keys."""
    text = json.dumps(_mark(_whole_floats_as_integers(to_plain(value))), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def slug(config: Mapping[str, Any], longest: int = 60) -> str:
    """A file name's readable part: the config's strings in order, then the seed (``quick-comet-ml-100k-seed0``)."""
    words = [value for value in config.values() if isinstance(value, str) and value]
    seed = f"-seed{config['seed']}" if "seed" in config else ""  # kept whole where the rest has to be cut
    name = re.sub(r"[^a-z0-9_+]+", "-", "-".join(words).lower()).strip("-")
    return (name[: longest - len(seed)].strip("-") + seed).strip("-") or "run"
