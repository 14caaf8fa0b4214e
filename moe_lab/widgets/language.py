"""Views for notebook 10: loss curves of chosen gates, text that the runs wrote, text that a model writes now.

Each view returns one closed figure in less than 0.2 s of drawing, so that it is shown once: as the value of a cell, or
by ``ipywidgets.interact``. `LiveText` also samples: about a millisecond per token of a small model.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from moe_lab.experiments.mixture_training import mixtures_of
from moe_lab.models.generate import sample
from moe_lab.models.language import LanguageModel
from moe_lab.plots.language import draw_loss
from moe_lab.plots.sheet import INK, sheet
from moe_lab.plots.style import expert_colors
from moe_lab.results import Result

_CELL = (0.105, 0.24)  # inches of one character and one line
_FONT = {"family": "DejaVu Sans Mono", "fontsize": 0.105 / 0.602 * 72}  # its characters are 0.602 of the size wide


class CurvePicker:
    """Validation loss of the gates one chooses, against what one chooses.

    Args:
        results: of `moe_lab.experiments.evomoe_language`, one setting, one per gate and seed.
    """

    def __init__(self, results: Sequence[Result]):
        self._results = list(results)
        self.gates = tuple(dict.fromkeys(result.config["gate"] for result in results))

    def view(self, gates: Iterable[str] = ("switch", "dts"), x: str = "step") -> Figure:
        """One pair of axes.

        Args:
            gates: which; unknown ones are left out.
            x: "step", "flops" or "seconds".
        """
        figure = plt.figure(figsize=(7.2, 3.6), layout="none")
        plt.close(figure)
        ax = figure.add_axes((0.1, 0.15, 0.64, 0.8))
        chosen = [result for result in self._results if result.config["gate"] in tuple(gates)]
        if not chosen:
            ax.set_title("choose a gate")
            return figure
        draw_loss(ax, chosen, x)
        ax.set_ylabel("validation loss (nats per token)")
        ax.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
        return figure


def _lines(text: str, columns: int) -> list[str]:
    """Cut into lines of at most so many characters; line breaks of the text are kept."""
    pieces = [textwrap.wrap(line, columns, drop_whitespace=False) or [""] for line in text.split("\n")]
    return [line for piece in pieces for line in piece]


class Samples:
    """Text that the models wrote at the end of their runs.

    Args:
        results: of `moe_lab.experiments.evomoe_language`.
        columns: characters per line.
        n_characters: of the sample, so that the figure keeps its size; line breaks of the text count as one.
    """

    def __init__(self, results: Sequence[Result], *, columns: int = 76, n_characters: int = 260):
        self._runs = {(result.config["gate"], result.seed): result for result in results}
        self.gates = tuple(dict.fromkeys(gate for gate, _ in self._runs))
        self.seeds = tuple(sorted({seed for _, seed in self._runs}))
        self.columns, self.n_characters = columns, n_characters

    def view(self, gate: str, seed: int = 0) -> Figure:
        """The prompt, what follows, and the test loss; or that there is no such run."""
        result = self._runs.get((gate, seed))
        if result is None:
            figure, ax = sheet(self.columns * _CELL[0] + 0.3, 1.0)
            ax.text(0.15, 0.5, f"no run of {gate} with seed {seed}", va="center", fontsize=11)
            return figure
        prompt = _lines(result.metrics["prompt"], self.columns)
        text = _lines(result.metrics["sample"][: self.n_characters], self.columns)
        ahead = "; it looks ahead when trained" if result.metrics["looks_ahead"] else ""
        loss = f"test loss {result.metrics['test_loss']:.3f} nats per token"
        head = f"{gate}, seed {seed}: {loss}{ahead}"
        figure, ax = sheet(self.columns * _CELL[0] + 0.3, (len(prompt) + len(text) + 2.6) * _CELL[1])
        y = figure.get_figheight() - 1.2 * _CELL[1]
        ax.text(0.15, y, head, fontsize=11, fontweight="bold")
        for place, line in enumerate((*prompt, *text), 1):
            color = "#777777" if place <= len(prompt) else INK
            ax.text(0.15, y - 0.2 * _CELL[1] - place * _CELL[1], line, color=color, parse_math=False, **_FONT)
        return figure


class LiveText:
    """Lets a trained model write, and colours each character by the expert that read it.

    Args:
        model: on the CPU; top-1 gates. Without a mixture nothing is coloured.
        tokenizer: of characters (``decode``).
        prompt: (P,) token ids.
        n_new: characters to write.
        columns: characters per line.
    """

    def __init__(self, model: LanguageModel, tokenizer: Any, prompt: Tensor, *, n_new: int = 84, columns: int = 50):
        self.model, self.tokenizer, self.prompt = model, tokenizer, prompt.reshape(1, -1)
        self.n_new, self.columns = n_new, columns

    @contextmanager
    def _listening(self, chosen: list[int]):
        """Write down the main expert of the last position whenever the upmost mixture runs."""
        mixtures = mixtures_of(self.model)
        if not mixtures:
            yield
            return
        handle = mixtures[-1].register_forward_hook(lambda *call: chosen.append(int(call[2][1].weights[-1].argmax())))
        try:
            yield
        finally:
            handle.remove()

    def write(self, temperature: float, seed: int) -> tuple[str, list[int | None]]:
        """The text with its prompt, and per character the expert of the upmost mixture (None: it was not asked).

        The expert of a character is the one that ran when the next character was chosen.
        """
        chosen: list[int] = []
        generator = torch.Generator().manual_seed(seed)
        with self._listening(chosen):
            row = sample(self.model, self.prompt, self.n_new, temperature=temperature, generator=generator)[0]
        experts: list[int | None] = [None] * len(row)
        experts[self.prompt.shape[1] - 1 : self.prompt.shape[1] - 1 + len(chosen)] = chosen
        return self.tokenizer.decode(row.tolist()), experts

    def view(self, temperature: float = 0.8, seed: int = 0) -> Figure:
        """What the model writes at this temperature; the prompt is grey.

        Args:
            temperature: divides the logits; 0: always the most probable character.
            seed: of the draws.
        """
        text, experts = self.write(temperature, seed)
        text = text.replace("\n", "⏎")
        columns = self.columns
        rows = -(-len(text) // columns)
        figure, ax = sheet(columns * _CELL[0] + 0.3, (rows + 2.9) * _CELL[1])
        bottom, top = 1.2 * _CELL[1], (1.2 + rows) * _CELL[1]
        used = sorted({expert for expert in experts if expert is not None})
        colors = expert_colors(min(32, max(used, default=0) + 1))
        paper = np.ones((rows * columns, 3))
        for place, expert in enumerate(experts[: rows * columns]):
            if expert is not None:
                paper[place] = 0.55 * np.ones(3) + 0.45 * np.asarray(to_rgb(colors[expert % len(colors)]))
        extent = (0.15, 0.15 + columns * _CELL[0], bottom, top)
        ax.imshow(paper.reshape(rows, columns, 3), extent=extent, aspect="auto", interpolation="nearest", zorder=1)
        ax.set(xlim=(0, figure.get_figwidth()), ylim=(0, figure.get_figheight()), autoscale_on=False)
        self._write_lines(ax, text, top)
        ax.text(0.15, top + 0.5 * _CELL[1], f"temperature {temperature:g}, seed {seed}", fontsize=11, fontweight="bold")
        _legend(ax, 0.15, 0.35 * _CELL[1], used, colors)
        return figure

    def _write_lines(self, ax: Axes, text: str, top: float) -> None:
        n_prompt = self.prompt.shape[1]
        for row, start in enumerate(range(0, len(text), self.columns)):
            y = top - (row + 0.75) * _CELL[1]
            line = text[start : start + self.columns]
            old = max(0, min(len(line), n_prompt - start))
            ax.text(0.15, y, line[:old], color="#777777", parse_math=False, **_FONT)
            ax.text(0.15 + old * _CELL[0], y, line[old:], color=INK, parse_math=False, **_FONT)


def _legend(ax: Axes, x: float, y: float, used: Sequence[int], colors: Sequence[str]) -> None:
    if not used:
        return
    ax.text(x, y, "expert", fontsize=9)
    for place, expert in enumerate(used):
        color = 0.55 * np.ones(3) + 0.45 * np.asarray(to_rgb(colors[expert % len(colors)]))
        box = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
        ax.text(x + 0.6 + 0.3 * place, y, f"{expert}", fontsize=9, bbox=box)


def choices(names: Iterable[str], first: Iterable[str]) -> Mapping[str, Any]:
    """Options and value of a `SelectMultiple`: those of ``first`` that exist are chosen."""
    names = tuple(names)
    return {"options": names, "value": tuple(name for name in first if name in names) or names[:1]}
