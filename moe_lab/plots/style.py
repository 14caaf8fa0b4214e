"""One figure style for every notebook: readable for colour-blind people, in grey, and small when stored.

Expert i has the same colour in every figure, whatever the number of experts; so has every gate. Colour alone never
carries a message: `gate_style` adds a line style and a marker, and neighbouring experts differ in lightness.
"""

from __future__ import annotations

import difflib

import matplotlib as mpl

# The first eight are the Okabe-Ito palette, ordered so that neighbours differ in lightness (CIE L* by 13 or more).
# The others were found by farthest-point search: each is far (CIELAB) from all before it in normal, deuteranope and
# protanope vision at once, and differs from its neighbour in lightness. More than about 12 at once need labels.
# fmt: off
_EXPERTS = [
    "#0072B2", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#56B4E9", "#222222", "#CC79A7",
    "#87F096", "#692D00", "#F0D2D2", "#780069", "#0096FF", "#5A4B3C", "#87A55A", "#96E1FF",
    "#78693C", "#C3E169", "#695A69", "#003C96", "#5AD296", "#964B0F", "#A5B44B", "#785A87",
    "#F0A5D2", "#5A2D4B", "#4B69D2", "#4B96E1", "#4B4B87", "#69C3A5", "#E16978", "#780F1E",
]
# fmt: on

GATE_COLORS = {
    "softmax": "#7A7A7A",
    "hash": "#CC79A7",
    "hash_balanced": "#8C3A66",
    "topk": "#E69F00",
    "dselect_k": "#009E73",
    "comet": "#0072B2",
}
"""Colour of each gate (names of `moe_lab.gates.build_gate`); the "+" variant shares it and is drawn dashed."""

_GATE_MARKERS = {"softmax": "s", "hash": "x", "hash_balanced": "P", "topk": "^", "dselect_k": "D", "comet": "o"}


def use_style() -> None:
    """Set matplotlib's defaults for all figures of the project. Call it once at the top of a notebook."""
    mpl.rcParams.update(
        {
            "figure.dpi": 80,  # 6 x 3.5 inches make 480 x 280 pixels: a notebook with ten figures stays under 1 MB
            "savefig.dpi": 80,
            "figure.figsize": (6.0, 3.5),
            "figure.constrained_layout.use": True,
            "font.size": 10.0,
            "axes.titlesize": 11.0,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "image.cmap": "cividis",  # perceptually uniform, the same for colour-blind readers, monotone in grey
            "axes.prop_cycle": mpl.cycler(color=_EXPERTS[:8]),
        }
    )


def expert_colors(n_experts: int) -> list[str]:
    """Colours of experts 0 .. n_experts - 1 as hex strings; expert i has the same one for any n_experts <= 32.

    Raises:
        ValueError: n_experts is not in 1 .. 32.
    """
    if not 1 <= n_experts <= len(_EXPERTS):
        raise ValueError(
            f"n_experts={n_experts}: there are colours for 1 to {len(_EXPERTS)} experts, more cannot be told apart; "
            "draw a heat map instead."
        )
    return list(_EXPERTS[:n_experts])


def _base_name(gate: str) -> str:
    base = gate.removesuffix("+")
    if base not in GATE_COLORS:
        near = difflib.get_close_matches(base, GATE_COLORS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"No colour for gate {gate!r}; known: {', '.join(GATE_COLORS)} (each also with '+').{hint}")
    return base


def gate_color(gate: str) -> str:
    """Colour of a gate by its `build_gate` name; "comet+" has the colour of "comet"."""
    return GATE_COLORS[_base_name(gate)]


def gate_style(gate: str) -> dict[str, str]:
    """Keyword arguments of `Axes.plot` for a gate: colour, marker, and a dashed line for the "+" variants."""
    base = _base_name(gate)
    linestyle = "--" if gate.endswith("+") else "-"
    return {"color": GATE_COLORS[base], "marker": _GATE_MARKERS[base], "linestyle": linestyle, "label": gate}
