"""A view for notebook 07: each token's expert per layer, and what becomes of the prediction without an expert.

It replays saved Results (their curve ``sentences``) and computes nothing: one closed figure in less than 0.2 s, shown
once, as the value of a cell or by ``ipywidgets.interact``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from moe_lab.plots.sheet import INK, PALE, sheet
from moe_lab.plots.style import expert_colors
from moe_lab.results import Result

_WIDTH, _LEFT, _ROW = 9.6, 0.75, 0.25
_LETTER = 10.0 * 0.602 / 72  # inches: width of a character of the monospaced font


def wrapped(pieces: Sequence[str], space: float) -> list[list[tuple[int, float, float]]]:
    """Lines of (index, x, width) in inches, none wider than ``space`` unless a single piece is."""
    lines: list[list[tuple[int, float, float]]] = [[]]
    x = 0.0
    for index, piece in enumerate(pieces):
        width = _LETTER * max(len(piece), 2) + 0.12
        if lines[-1] and x + width > space:
            lines.append([])
            x = 0.0
        lines[-1].append((index, x, width))
        x += width
    return lines


def _is_light(color: str) -> bool:
    return sum(int(color[i : i + 2], 16) for i in (1, 3, 5)) > 330


class SentenceReplay:
    """Test sentences token by token, one Result per name.

    Args:
        results: name -> Result of `moe_lab.experiments.comet_bert` of a student, all of the same task.
        classes: names of the labels.

    Raises:
        ValueError: no Results, or one without sentences.
    """

    def __init__(self, results: Mapping[str, Result], classes: Sequence[str] = ("0", "1")):
        self._rows: dict[str, list[dict[str, Any]]] = {}
        for name, result in results.items():
            rows = result.curves.get("sentences", [])
            if not rows:
                raise ValueError(
                    f"the Result of {name!r} has kept no sentences; run a student with watched_sentences > 0"
                )
            self._rows[name] = rows
        if not self._rows:
            raise ValueError("no Results to show")
        self._classes = classes
        first = next(iter(self._rows.values()))
        self.n_sentences = min(map(len, self._rows.values()))
        self.n_layers = max(len(rows[0]["expert"]) for rows in self._rows.values())
        self.n_experts = max(len(rows[0]["without"][0]) for rows in self._rows.values())
        self.texts = [" ".join(row["pieces"][1:-1]).replace(" ##", "") for row in first[: self.n_sentences]]

    def most_hurt(self, name: str) -> tuple[int, int, int]:
        """(sentence, layer, expert) whose loss moves the probability of the sentence's first class the most."""
        changes = {
            (sentence, layer, expert): abs(probability[0] - row["probability"][0])
            for sentence, row in enumerate(self._rows[name][: self.n_sentences])
            for layer, experts in enumerate(row["without"])
            for expert, probability in enumerate(experts)
        }
        return max(changes, key=changes.get)

    def view(self, name: str, sentence: int = 0, layer: int = 0, expert: int = 0) -> Figure:
        """The expert of each token in each layer (lowest layer on top), and the prediction with and without one expert.

        Args:
            name: given to the constructor.
            sentence, layer, expert: counted from 0; what is too large is the last.
        """
        row = self._rows[name][min(sentence, self.n_sentences - 1)]
        layer = min(layer, len(row["expert"]) - 1)
        expert = min(expert, len(row["without"][layer]) - 1)
        lines = wrapped(row["pieces"], _WIDTH - _LEFT - 0.1)
        n_layers = len(row["expert"])
        block = (n_layers + 1) * _ROW + 0.18
        height = len(lines) * block + 0.98
        figure, ax = sheet(_WIDTH, height)
        colors = expert_colors(len(row["without"][layer]))
        y = height - 0.05
        for line in lines:
            self._draw_line(ax, y, line, row, colors, (layer, expert))
            y -= block
        n_gone = sum(chosen == expert for chosen in row["expert"][layer])
        ax.text(0.1, y - 0.12, f"true: {self._classes[row['label']]}", fontsize=9, color=INK)
        self._draw_bar(ax, y - 0.42, "all experts", row["probability"])
        gone = f"layer {layer} without expert {expert} ({n_gone} of {len(row['pieces'])} tokens)"
        self._draw_bar(ax, y - 0.74, gone, row["without"][layer][expert])
        return figure

    @staticmethod
    def _draw_line(ax: Axes, y: float, line: Sequence, row: Mapping, colors: list[str], off: tuple[int, int]) -> None:
        boxes, faces, edges, widths = [], [], [], []
        for index, x, width in line:
            x += _LEFT
            style = {"ha": "center", "va": "center", "fontsize": 9, "parse_math": False}
            ax.text(x + width / 2, y - 0.1, row["pieces"][index], family="DejaVu Sans Mono", color=INK, **style)
            for layer, experts in enumerate(row["expert"]):
                chosen = experts[index]
                low = y - (layer + 2) * _ROW + 0.05
                gone = (layer, chosen) == off
                boxes.append(((x, low), (x + width, low), (x + width, low + _ROW), (x, low + _ROW)))
                faces.append("white" if gone else colors[chosen])
                edges.append("white")
                widths.append(1.0)
                color = INK if gone or _is_light(colors[chosen]) else "white"
                ax.text(x + width / 2, low + _ROW / 2, f"({chosen})" if gone else str(chosen), color=color, **style)
        ax.add_collection(PolyCollection(boxes, facecolors=faces, edgecolors=edges, linewidths=widths))
        for layer in range(len(row["expert"])):
            low = y - (layer + 2) * _ROW + 0.05
            ax.text(_LEFT - 0.1, low + _ROW / 2, f"layer {layer}", ha="right", va="center", fontsize=9, color=INK)

    def _draw_bar(self, ax: Axes, y: float, text: str, probability: Sequence[float]) -> None:
        """A bar as long as the predicted class is probable."""
        best = max(range(len(probability)), key=probability.__getitem__)
        left, full = 3.6, 4.2
        ax.text(left - 0.1, y + 0.1, text, ha="right", va="center", fontsize=9, color=INK)
        ax.fill_between((left, left + full), y, y + 0.2, color=PALE, alpha=0.5, linewidth=0)
        ax.fill_between((left, left + full * probability[best]), y, y + 0.2, color=INK, alpha=0.75, linewidth=0)
        label = f"{self._classes[best]}  {probability[best]:.1%}"
        ax.text(left + full + 0.1, y + 0.1, label, va="center", fontsize=9, fontweight="bold", color=INK)
