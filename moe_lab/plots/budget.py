"""What a tuning budget buys, what chance makes of it, and what choosing by a loss does to that loss."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moe_lab.plots.sheet import INK
from moe_lab.plots.style import gate_color, gate_style
from moe_lab.results import Result
from moe_lab.tuning import Pool, chance_of, expected_best

_SELECTION = (
    ("#E69F00", "--", "validation loss of the chosen trial"),
    ("#0072B2", "-", "test loss of the chosen trial"),
    (INK, ":", "least test loss (peeking)"),
)


def _trial_axis(ax: Axes, largest: float) -> None:
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500) if tick <= largest]
    if largest >= 1.4 * ticks[-1]:
        ticks.append(int(largest))
    ax.set_xscale("log")
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xticks([], minor=True)


def draw_budget(ax: Axes, pools: Mapping[str, Pool], *, title: str, controls: Mapping[str, Pool] | None = None) -> None:
    """Exact expected test loss of the chosen trial against the number of trials.

    Args:
        pools: gate -> its trials.
        title: of the panel.
        controls: gate+ -> its trials without learning the permutation; thin dotted lines.
    """
    for gate, pool in pools.items():
        budgets = np.arange(1, len(pool.test) + 1)
        ax.plot(budgets, expected_best(pool, budgets), **{**gate_style(gate), "marker": ""})
    for gate, pool in (controls or {}).items():
        budgets = np.arange(1, len(pool.test) + 1)
        style = {"color": gate_color(gate), "linestyle": ":", "linewidth": 2.4, "label": f"{gate}, nothing learned"}
        ax.plot(budgets, expected_best(pool, budgets), **style)
    ax.set(xlabel="trials of random search", ylabel="expected test loss", title=title)
    _trial_axis(ax, max(len(pool.test) for pool in pools.values()))


def draw_null(
    ax: Axes,
    nulls: Mapping[str, np.ndarray],
    largest: int,
    *,
    title: str,
    observed: Mapping[str, float] | None = None,
) -> None:
    """How often chance shows at least "r times fewer trials", against r; both axes logarithmic.

    Args:
        nulls: gate -> values of `null_ratios`.
        largest: trials per pool, the largest ratio that there can be.
        title: of the panel.
        observed: gate -> the ratio that was measured, a marker on its curve (at the edge if below 1).
    """
    ratios = np.geomspace(1, largest, 200)
    ax.plot(ratios, 1 / (1 + ratios), color=INK, linestyle=":", label="race for the best loss, 1/(1 + r)")
    for gate, null in nulls.items():
        seen = ratios[ratios <= null.max()]
        style = {**gate_style(gate), "marker": ""}
        ax.plot(seen, [chance_of(ratio, null) for ratio in seen], **style)
        if observed and gate in observed:
            ratio, chance = observed[gate], chance_of(observed[gate], null)
            face = "white" if gate.endswith("+") else gate_color(gate)
            style = {"marker": gate_style(gate)["marker"], "markersize": 9, "markerfacecolor": face, "clip_on": False}
            ax.plot(max(ratio, 1), chance, color=gate_color(gate), linestyle="", zorder=3, **style)
            on_the_left = ratio < largest**0.75
            ax.annotate(
                f"{gate}: {ratio:.2g}",
                (max(ratio, 1), chance),
                (9 if on_the_left else -9, 4 if ratio > 1 else 0),
                textcoords="offset points",
                ha="left" if on_the_left else "right",
                va="bottom" if ratio > 1 else "center",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
            )
    ax.set(
        yscale="log",
        xlabel="r times fewer trials",
        ylabel="chance of r or more",
        title=title,
        xlim=(1, max(largest, 2)),
    )
    least = min(1 / (1 + len(null)) for null in nulls.values())
    ax.set_ylim(0.8 * least, 1)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    _trial_axis(ax, largest)


def draw_soft_phase(ax: Axes, study: Result, control: Result, gate: str, *, title: str) -> None:
    """Mean test loss of ``gate``+ against the length of its soft phase, learned and not learned; bars: standard errors.

    At 0: the gate without "+". The trials differ in learning rate as well, the same ones for both lines. A study that
    searches for a fraction of the epochs it draws (``search_scale``) has that fraction on its axis.
    """
    scale = study.config.get("search_scale", 1.0)
    name = f"{gate}+"
    color, marker = gate_color(gate), gate_style(gate)["marker"]
    style = {"color": color, "marker": marker, "markersize": 7, "capsize": 3}

    def of(result: Result, which: str) -> pd.DataFrame:
        return pd.DataFrame([row | row["drawn"] for row in result.curves["trials"] if row["gate"] == which])

    alone = of(study, gate)["test_loss"]
    ax.errorbar([0], [alone.mean()], [alone.sem()], **style, label=f"{gate}")
    for result, shift, linestyle, label in (
        (study, -0.04 * scale, "--", name),
        (control, 0.04 * scale, ":", f"{name}, nothing learned"),
    ):
        losses = of(result, name).groupby("permutation_epochs")["test_loss"]
        ax.errorbar(
            losses.mean().index * scale + shift,
            losses.mean(),
            losses.sem(),
            **style,
            markerfacecolor="white",
            linestyle=linestyle,
            label=label,
        )
    ax.set(xlabel="epochs with a soft permutation", ylabel="mean test loss", title=title)
    ax.xaxis.set_major_locator(MaxNLocator(integer=scale == 1))


def draw_selection(ax: Axes, curves: tuple[np.ndarray, np.ndarray, np.ndarray], *, title: str) -> None:
    """Three losses of `selection_curves` against the budget, each minus what one trial gives."""
    for curve, (color, linestyle, label) in zip(curves, _SELECTION, strict=True):
        ax.plot(np.arange(1, len(curve) + 1), curve - curve[0], color=color, linestyle=linestyle, label=label)
    ax.set(xlabel="trials", ylabel="change against one trial", title=title)
    _trial_axis(ax, len(curves[0]))
