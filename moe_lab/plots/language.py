"""Figures of the language models: loss against steps, FLOPs and seconds, gates from dense to sparse, balance, dropping.

Draws Results of `moe_lab.experiments.evomoe_language`, computes nothing. Taught in notebook 10.
Legend: S steps, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lab.experiments.evomoe_language import LOOKS_AHEAD, LanguageConfig, training_curve
from moe_lab.experiments.mixture_config import GATES
from moe_lab.experiments.mixture_training import phase_curve
from moe_lab.plots.sheet import INK
from moe_lab.plots.style import GATE_COLORS
from moe_lab.results import Result

_STYLES: dict[str, tuple[str, str, str]] = {  # colour, marker, line
    "dense": (INK, "*", ":"),
    "softmax": (GATE_COLORS["softmax"], "s", ":"),
    "switch": ("#009E73", "^", "-"),
    "switch_capacity": ("#56B4E9", "v", "--"),
    "gshard": ("#780069", "<", "-"),
    "topk": (GATE_COLORS["topk"], ">", "-"),
    "base": ("#87A55A", "h", "-."),
    "hash": (GATE_COLORS["hash"], "x", "-"),
    "hash_balanced": (GATE_COLORS["hash_balanced"], "P", "-"),
    "stable": ("#692D00", "d", "-."),
    "expert_choice": ("#B5A000", "p", ":"),
    "dts": ("#D55E00", "s", "--"),
    "evomoe": ("#0072B2", "o", "-"),
}
AXES = {"step": "step", "flops": "FLOPs of training", "seconds": "seconds (with evaluations)"}
"""Column of `training_curve` -> label of an axis."""
_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP"))


def language_style(gate: str) -> dict[str, str]:
    """Keyword arguments of `Axes.plot`; gates that look ahead have a star behind their name."""
    color, marker, line = _STYLES[gate]
    label = f"{gate} *" if gate in LOOKS_AHEAD else gate
    return {"color": color, "marker": marker, "linestyle": line, "label": label}


def by_gate(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Gate -> its Results, gates in the order of `GATES`, Results by seed."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: (GATES.index(result.config["gate"]), result.seed or 0)):
        groups.setdefault(result.config["gate"], []).append(result)
    return groups


def flop_unit(largest: float) -> tuple[float, str]:
    """(1e12, "TFLOP") for numbers up to a few of them: what to divide by, and what to write."""
    return next((unit, name) for unit, name in _UNITS if largest >= unit or unit == 1.0)


def draw_loss(ax: Axes, results: Iterable[Result], x: str = "step", *, target: float | None = None) -> None:
    """Validation loss (one expert, no noise) against a column of `training_curve`; range over seeds shaded.

    Args:
        ax: where; gets no legend.
        results: of any gates, evaluated at the same steps.
        x: "step", "flops" or "seconds". Of several seeds the mean is the place of a point.
        target: a loss to mark by a line.
    """
    curves = {gate: [training_curve(run) for run in runs] for gate, runs in by_gate(results).items()}
    unit, name = 1.0, AXES[x]
    if x == "flops":
        unit, name = flop_unit(max(curve["flops"].iloc[-1] for group in curves.values() for curve in group))
        name = f"training ({name})"
    for gate, group in curves.items():
        places = np.mean([curve[x] for curve in group], axis=0) / unit
        losses = np.array([curve["valid_loss"] for curve in group])
        ax.plot(places, losses.mean(0), markersize=3.5, linewidth=1.5, **language_style(gate))
        if len(losses) > 1:
            color = language_style(gate)["color"]
            ax.fill_between(places, losses.min(0), losses.max(0), color=color, alpha=0.15, linewidth=0)
    if target is not None:
        ax.axhline(target, color=INK, linewidth=0.7)
    ax.set(xlabel=name, xlim=(0, None))


def loss_panels(
    results: Sequence[Result],
    *,
    target: float | None = None,
    around: tuple[float, float] | None = None,
    against: Sequence[str] = tuple(AXES),
) -> Figure:
    """`draw_loss` in panels side by side, one legend.

    Args:
        results: see `draw_loss`.
        target: a loss to mark, as "Switch's last".
        around: how far below and above the target the axis reaches, in nats: gates differ at the end of training. A
            curve may leave it below. Default: everything is shown.
        against: panels, of `AXES`; runs that shared a machine have seconds that say little.
    """
    figure, axes = plt.subplots(1, len(against), figsize=(1.8 + 2.6 * len(against), 3.3), sharey=True, squeeze=False)
    axes = axes[0]
    for ax, x in zip(axes, against, strict=True):
        draw_loss(ax, results, x, target=target)
    axes[0].set(ylabel="validation loss (nats per token)")
    if target is not None and around is not None:
        axes[0].set(ylim=(target - around[0], target + around[1]))
    handles, labels = axes[0].get_legend_handles_labels()
    note = "* looks ahead" if any(label.endswith("*") for label in labels) else None
    figure.legend(handles, labels, fontsize=8, loc="outside right center", title=note, title_fontsize=8)
    plt.close(figure)
    return figure


def draw_final_losses(
    ax: Axes, results: Sequence[Result], *, lines: Mapping[str, float] | None = None, title: str = ""
) -> None:
    """Last validation loss, a dot per seed and a bar at the mean; hollow: the gate looks ahead. Dotted: ``lines``."""
    groups = by_gate(results)
    order = sorted(groups, key=lambda gate: np.mean([run.metrics["final_loss"] for run in groups[gate]]))
    for place, gate in enumerate(order):
        values = [run.metrics["final_loss"] for run in groups[gate]]
        color = language_style(gate)["color"]
        face = "white" if gate in LOOKS_AHEAD else color
        ax.plot([place] * len(values), values, "o", markersize=5.5, color=color, markerfacecolor=face)
        ax.hlines(np.mean(values), place - 0.3, place + 0.3, color=color, linewidth=2)
    for label, value in (lines or {}).items():
        ax.axhline(value, color=INK, linestyle=":", linewidth=1)
        ax.text(-0.45, value, label, va="bottom", fontsize=8)
    names = [language_style(gate)["label"] for gate in order]
    ax.set_xticks(range(len(order)), names, rotation=40, ha="right", rotation_mode="anchor")
    ax.set(ylabel="final validation loss (nats)", xlim=(-0.5, len(order) - 0.5), title=title)
    ax.grid(axis="x", visible=False)


def phase_panels(experts: Mapping[str, Sequence[float]], config: LanguageConfig, *, until: int | None = None) -> Figure:
    """Experts per token in every training step, above the temperature of the same steps; phases are named.

    Args:
        experts: name -> (S,) one number per step: of single mixtures, or of their mean.
        config: of the run. Without a dense-to-sparse gate there is no temperature, and no second panel.
        until: last step shown.
    """
    goes_sparse = config.gate in ("dts", "evomoe")
    size = {"figsize": (7.2, 4.0 if goes_sparse else 2.6), "height_ratios": (3, 2) if goes_sparse else (1,)}
    figure, axes = plt.subplots(1 + goes_sparse, 1, sharex=True, squeeze=False, **size)
    top = axes[0, 0]
    for place, (name, values) in enumerate(experts.items()):
        steps = np.arange(1, len(values) + 1)
        top.plot(steps, values, marker=".", markersize=4, linestyle=("-", "--", ":")[place % 3], label=name)
    top.set(ylabel="experts per token", ylim=(0, config.n_experts * 1.2))
    if len(experts) > 1:
        top.legend(fontsize=9, loc="center right")
    last = until or config.steps
    if goes_sparse:
        curve = phase_curve(config, points=config.steps)
        below = axes[1, 0]
        routed = [place for place, phase in enumerate(curve["phase"]) if phase == "soft"]
        below.plot([curve["step"][i] for i in routed], [curve["temperature"][i] for i in routed], color=INK)
        below.set(ylabel="temperature τ", ylim=(0, config.tau_start * 1.1))
        for phase in dict.fromkeys(curve["phase"]):
            inside = [step for step, name in zip(curve["step"], curve["phase"], strict=True) if name == phase]
            middle = (inside[0] + min(inside[-1], last)) / 2
            if inside[0] < last:
                top.text(middle, config.n_experts * 1.09, phase, ha="center", fontsize=9)
            for ax in (top, below):
                ax.axvline(inside[0], color=INK, linewidth=0.7)
    axes[-1, 0].set(xlabel="step", xlim=(0, last))
    plt.close(figure)
    return figure


def _over_steps(runs: Sequence[Result], field: str) -> tuple[list[int], np.ndarray]:
    """Steps at which ``field`` of the curve "routing" was measured, and (seeds, steps), mean over mixtures.

    Without the shared phase, in which one expert has everything, and without the comparison of its last evaluation.
    """
    curves = []
    for run in runs:
        shared = round(run.config["shared_share"] * run.config["steps"]) if run.config["gate"] == "evomoe" else 0
        rows = run.curves.get("routing", [])
        steps = sorted({row["step"] for row in rows if row["step"] >= shared})
        steps = steps[1:] if field == "changed" else steps
        at = {step: [row[field] for row in rows if row["step"] == step] for step in steps}
        curves.append({step: float(np.mean(values)) for step, values in at.items()})
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, np.array([[curve[step] for step in steps] for curve in curves])


def routing_panels(results: Sequence[Result]) -> Figure:
    """Largest over mean load, and the share of tokens whose main expert has changed, at every evaluation.

    Means over mixtures and seeds, range over seeds shaded. On validation tokens, by the rule of the phase.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.3))
    for gate, runs in by_gate(results).items():
        style = language_style(gate)
        for ax, field in zip(axes, ("max_over_mean", "changed"), strict=True):
            steps, values = _over_steps(runs, field)
            if not steps:
                continue
            ax.plot(steps, values.mean(0), markersize=3.5, linewidth=1.5, **style)
            if len(values) > 1:
                ax.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)
    axes[0].set_yscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32]
    axes[0].set_yticks(ticks, [str(tick) for tick in ticks])
    largest = max((row["max_over_mean"] for run in results for row in run.curves.get("routing", [])), default=2)
    axes[0].set(xlabel="step", ylabel="largest / mean load", ylim=(0.9, 1.1 * largest))
    axes[0].set_title("balance (1: equal loads)")
    axes[1].set(xlabel="step", ylabel="share of tokens", ylim=(-0.03, 1.03))
    axes[1].set_title("main expert is another one than before")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right center")
    plt.close(figure)
    return figure


def draw_leads(ax: Axes, leads: Mapping[str, Mapping[int, Any]], *, base: str, title: str = "") -> None:
    """Paired differences of final loss (gate minus ``base``) over the number of experts, with their intervals.

    Args:
        ax: where.
        leads: gate -> number of experts -> `compare.Difference`.
        base: what is subtracted.
        title: of the axes.
    """
    numbers = sorted({number for found in leads.values() for number in found})
    for place, (gate, found) in enumerate(leads.items()):
        style = language_style(gate)
        at = [numbers.index(number) + 0.12 * (place - (len(leads) - 1) / 2) for number in sorted(found)]
        gaps = [found[number] for number in sorted(found)]
        errors = [[gap.mean - gap.low for gap in gaps], [gap.high - gap.mean for gap in gaps]]
        ax.errorbar(at, [gap.mean for gap in gaps], yerr=errors, capsize=3, **style)
    ax.axhline(0, color=INK, linewidth=0.7)
    ax.set_xticks(range(len(numbers)), [str(number) for number in numbers])
    ax.set(xlabel="number of experts", ylabel=f"final loss − {base}'s (nats)", title=title)
    ax.legend(fontsize=9)
