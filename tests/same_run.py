"""Not a test: what two runs of one config must have in common, and a power cut in the middle of one."""

from __future__ import annotations

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
