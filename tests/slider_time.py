"""Not a test: whether a view answers a slider in time, on whatever machine.

A notebook should answer within a fifth of a second. Seconds differ between machines, and on one machine from hour to
hour (three times, on a shared host), so the time of a view is given in drawings of a plain figure.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

IN_TIME = 2.0  # plain figures, of some 0.1 s on a laptop


def plain_figure() -> Figure:
    """Four lines, a title, labels and a legend."""
    figure, ax = plt.subplots(figsize=(6.0, 3.2))
    for slope in range(4):
        ax.plot([0, 1, 2, 3], [0, slope, 2 * slope, slope], label=f"line {slope}")
    ax.set(title="a plain figure", xlabel="x", ylabel="y")
    ax.legend()
    plt.close(figure)
    return figure


def _seconds(view: Callable[[], Figure]) -> float:
    """Processor time of view and drawing, as a notebook draws it; other processes do not count."""
    start = time.process_time()
    view().savefig(io.BytesIO(), format="png", bbox_inches="tight")
    return time.process_time() - start


def plain_figures(view: Callable[[], Figure], pairs: int = 5) -> float:
    """How many plain figures could be drawn while ``view()`` is made and drawn: medians, taken in turns."""
    _seconds(plain_figure), _seconds(view)  # fonts and caches
    times = [(_seconds(view), _seconds(plain_figure)) for _ in range(pairs)]
    own, plain = (statistics.median(column) for column in zip(*times, strict=True))
    return own / plain
