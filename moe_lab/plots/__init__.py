"""Figures: draw gates and Results, compute nothing. `style` first, then one file per subject."""

from moe_lab.plots.style import GATE_COLORS, expert_colors, gate_color, gate_style, use_style

__all__ = ["GATE_COLORS", "expert_colors", "gate_color", "gate_style", "use_style"]
