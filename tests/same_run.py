"""Not a test: what two runs of one config must have in common, and a power cut in the middle of one."""

from __future__ import annotations

import numpy as np

_TIMES = ("seconds", "steps_per_second")


def without_time(result) -> dict:
    """Curves and metrics of a Result but for what the clock said."""
    curves = {
        name: [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]
        for name, rows in result.curves.items()
    }
    return {"curves": curves, "metrics": {key: value for key, value in result.metrics.items() if key not in _TIMES}}


def failing(real, n_calls: int):
    """``real``, but the power goes off in call ``n_calls`` + 1."""
    calls = []

    def function(*args, **options):
        calls.append(1)
        if len(calls) > n_calls:
            raise RuntimeError("power cut")
        return real(*args, **options)

    return function


def numbers(value):
    """All numbers inside, in order; times left out."""
    if isinstance(value, dict):
        inner = [item for key, item in value.items() if key not in ("seconds", "steps_per_second")]
        return [number for item in inner for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [] if isinstance(value, str) else [float(value)]


def same_results(result, other, **tolerance):
    """Curves and metrics agree, name by name and number by number."""
    assert result.config == other.config
    assert result.metrics.keys() == other.metrics.keys()
    assert result.curves.keys() == other.curves.keys()
    for name, rows in result.curves.items():
        for row, other_row in zip(rows, other.curves[name], strict=True):
            assert list(row) == list(other_row)
            np.testing.assert_allclose(numbers(row), numbers(other_row), **tolerance, err_msg=f"{name} {row}")
    for name, value in result.metrics.items():
        np.testing.assert_allclose(numbers({name: value}), numbers({name: other.metrics[name]}), **tolerance)
