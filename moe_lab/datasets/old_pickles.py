"""Dictionaries that Python 2 pickled with an old NumPy (CIFAR's official files), read without trusting them.

A pickle is a program: ``pickle.load`` calls whatever the file names. Here a file may name three things, those that an
array of bytes needs, and gets a small stand-in of ours for each. So no function of NumPy, or of any other module, is
called with what a file says, and NumPy's warnings about its own old signatures do not come up.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


class _Dtype:
    """Stands for `numpy.dtype`."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment: nothing that a single byte has."""


class _Array:
    """Stands for `numpy.ndarray` and for the function that makes an empty one; filled by its state."""

    values: np.ndarray | None = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, _Dtype) or dtype.code not in (b"u1", "u1") or not isinstance(content, bytes):
            raise pickle.UnpicklingError("it holds an array of something else than bytes")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _Reader(pickle.Unpickler):
    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused, it asks for {module}.{name}, which no data file needs")
        return self.ALLOWED[module, name]


def read_old_pickle(path: Path) -> dict[str, Any]:
    """A pickled dictionary of plain values and arrays of bytes; strings of Python 2 stay `bytes`, keys become `str`.

    Raises:
        ValueError: not such a file, cut short, or one that wants to run something.
    """
    with path.open("rb") as file:
        try:
            content = _Reader(file, encoding="bytes").load()
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path}: not a whole pickle of plain data ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not a dictionary")
    return {
        key.decode("ascii", "replace") if isinstance(key, bytes) else str(key): (
            value.values if isinstance(value, _Array) else value
        )
        for key, value in content.items()
    }
