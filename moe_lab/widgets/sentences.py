"""Views for notebook 11: a sentence and its translations by every gate, hidden words and what a model guesses.

They replay saved Results and compute nothing. Each view returns one closed figure in less than 0.2 s, so that it is
shown once: as the value of a cell, or by ``ipywidgets.interact``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lab.plots.sheet import INK, PALE, sheet
from moe_lab.results import Result

_WRONG, _HIDDEN = "#A63C00", "#0072B2"
_ADVANCE = 0.602  # of the monospaced font: width of a character in units of its size
_MOST = 78  # characters of a line
GAP = "___"


def compared(reference: Sequence[str], hypothesis: Sequence[str]) -> tuple[list[str], list[bool]]:
    """The words of the hypothesis, with a gap `GAP` where words of the reference are missing; and which to mark.

    Marked are gaps, and words that do not belong to the longest matching runs of words.
    """
    words: list[str] = []
    marked: list[bool] = []
    matcher = difflib.SequenceMatcher(None, reference, hypothesis, autojunk=False)
    for kind, _, _, first, last in matcher.get_opcodes():
        words += [GAP] if kind == "delete" else hypothesis[first:last]
        marked += [True] if kind == "delete" else [kind != "equal"] * (last - first)
    return words, marked


def wrapped(words: Sequence[str], columns: int) -> list[list[int]]:
    """Indices of the words of each line; a word longer than a line has one of its own."""
    lines: list[list[int]] = [[]]
    used = 0
    for index, word in enumerate(words):
        if lines[-1] and used + 1 + len(word) > columns:
            lines.append([])
            used = 0
        used += len(word) + bool(lines[-1])
        lines[-1].append(index)
    return lines


def _write(ax: Axes, x: float, y: float, words: Sequence[str], *, marked: Sequence[bool], size: float = 10) -> None:
    """Words in a fixed-width font from x on; marked ones are bold, coloured and underlined."""
    advance = size * _ADVANCE / 72
    for word, is_marked in zip(words, marked, strict=True):
        color, weight = (_WRONG, "bold") if is_marked else (INK, "normal")
        ax.text(x, y, word, color=color, fontweight=weight, family="DejaVu Sans Mono", fontsize=size, parse_math=False)
        if is_marked:
            ax.plot((x, x + advance * len(word)), (y - 0.05, y - 0.05), color=_WRONG, linewidth=1.4)
        x += advance * (len(word) + 1)


class TranslationReplay:
    """Saved translations of the same sentences, one Result per name.

    Args:
        results: name -> Result of `moe_lab.experiments.evomoe_translation`.
        describe: (reference, hypothesis) -> what to write behind a wrong translation.

    Raises:
        ValueError: a Result without translations, or of other sentences than the first.
    """

    def __init__(self, results: Mapping[str, Result], describe: Callable[[str, str], str] | None = None):
        self._rows: dict[str, list[dict[str, Any]]] = {}
        for name, result in results.items():
            rows = result.curves.get("translations", [])
            if not rows:
                raise ValueError(f"the Result of {name!r} has kept no translations; run it with kept_translations > 0")
            self._rows[name] = rows
        if not self._rows:
            raise ValueError("no Results to show")
        self.n_sentences = min(map(len, self._rows.values()))
        first = next(iter(self._rows.values()))
        for name, rows in self._rows.items():
            if any(a["source"] != b["source"] for a, b in zip(first, rows, strict=False)):
                raise ValueError(f"{name!r} translated other sentences than {next(iter(self._rows))!r}")
        self._describe = describe

    def hardest(self) -> int:
        """The first sentence with the most wrong translations, not all of them wrong if there is such a one."""
        wrong = [
            sum(rows[i]["hypothesis"] != rows[i]["reference"] for rows in self._rows.values())
            for i in range(self.n_sentences)
        ]
        some = [count if count < len(self._rows) else 0 for count in wrong]
        chosen = some if max(some) else wrong
        return chosen.index(max(chosen))

    def view(self, sentence: int = 0) -> Figure:
        """Source, reference, and what each gate makes of it; words that differ from the reference are marked.

        Args:
            sentence: its index; one that is too large is the last.
        """
        sentence = min(sentence, self.n_sentences - 1)
        rows = {name: found[sentence] for name, found in self._rows.items()}
        first = next(iter(rows.values()))
        reference = first["reference"].split()
        blocks: list[tuple[str, list[str], list[bool], str]] = [
            ("source", first["source"].split(), [False] * len(first["source"].split()), ""),
            ("reference", reference, [False] * len(reference), ""),
        ]
        for name, row in rows.items():
            words, marked = compared(reference, row["hypothesis"].split())
            note = "right" if row["hypothesis"] == row["reference"] else "wrong"
            if note == "wrong" and self._describe is not None:
                note = self._describe(row["reference"], row["hypothesis"])
            blocks.append((name, words, marked, note))
        n_lines = sum(len(wrapped(words, _MOST)) for _, words, _, _ in blocks)
        line, space = 0.24, 0.08
        height = n_lines * line + len(blocks) * space + 0.3
        figure, ax = sheet(10.6, height)
        y = height - 0.08
        for place, (name, words, marked, note) in enumerate(blocks):
            if place == 2:
                ax.plot((0.1, 10.5), (y - 0.1, y - 0.1), color=PALE, linewidth=1)
                y -= 0.08
            y -= space
            for number, indices in enumerate(wrapped(words, _MOST)):
                y -= line
                if number == 0:
                    ax.text(0.1, y, name, fontsize=10, fontweight="bold" if place < 2 else "normal", color=INK)
                    ax.text(10.5, y, note, fontsize=9, ha="right", color=INK)
                _write(ax, 1.65, y, [words[i] for i in indices], marked=[marked[i] for i in indices])
        return figure


class GuessReplay:
    """Hidden tokens of validation sentences and what models take them for.

    Args:
        results: name -> Result of `moe_lab.experiments.evomoe_masked`, pre-trained, of the same data.

    Raises:
        ValueError: a Result without guesses.
    """

    def __init__(self, results: Mapping[str, Result]):
        self._rows = {name: result.curves.get("guesses", []) for name, result in results.items()}
        for name, rows in self._rows.items():
            if not rows:
                raise ValueError(f"the Result of {name!r} has no guesses; was it pre-trained?")
        self.n_sentences = min(map(len, self._rows.values()))

    def view(self, gate: str, sentence: int = 0) -> Figure:
        """A sentence as the model sees it; below each hidden place the most probable tokens, the truth blue and bold.

        Args:
            gate: a name given to the constructor.
            sentence: its index; one that is too large is the last.
        """
        row = self._rows[gate][min(sentence, self.n_sentences - 1)]
        pieces, hidden = [piece or "·" for piece in row["pieces"]], row["hidden"][:6]
        places = {item["at"] for item in row["hidden"]}
        size = 12.0
        advance = size * _ADVANCE / 72
        figure, ax = sheet(9.6, 2.4)
        x, y = 0.15, 2.1
        for index, piece in enumerate(pieces):
            if x + advance * len(piece) > 9.4:
                x, y = 0.15, y - 0.26
            color, weight = (_HIDDEN, "bold") if index in places else (INK, "normal")
            style = {"family": "DejaVu Sans Mono", "fontsize": size, "parse_math": False}
            ax.text(x, y, piece, color=color, fontweight=weight, **style)
            if index in places:
                ax.plot((x, x + advance * len(piece)), (y - 0.06, y - 0.06), color=_HIDDEN, linewidth=1.6)
            x += advance * len(piece)
        for column, item in enumerate(hidden):
            self._draw_guesses(ax, 0.15 + column * 1.58, y - 0.42, item, pieces[item["at"]])
        return figure

    @staticmethod
    def _draw_guesses(ax: Axes, x: float, y: float, item: Mapping[str, Any], shown: str) -> None:
        seen = "hidden" if shown == "▢" else f"shown: {_visible(shown)}"
        ax.text(x, y, f"place {item['at']} ({seen})", fontsize=8, color=INK, parse_math=False)
        style = {"fontsize": 9, "parse_math": False}
        for token, probability in item["top"]:
            y -= 0.24
            is_truth = token == item["truth"]
            color, weight = (_HIDDEN, "bold") if is_truth else (INK, "normal")
            ax.text(x + 0.42, y + 0.04, _visible(token), ha="right", color=color, fontweight=weight, **style)
            end = x + 0.5 + 0.6 * probability
            ax.fill_between((x + 0.5, end), y, y + 0.17, color=_HIDDEN if is_truth else PALE, linewidth=0)
            ax.text(end + 0.04, y + 0.04, f"{probability:.0%}", color=color, fontweight=weight, **style)
        if all(token != item["truth"] for token, _ in item["top"]):
            ax.text(x, y - 0.22, f"truth: {_visible(item['truth'])}", color=_HIDDEN, fontweight="bold", **style)


def _visible(token: str) -> str:
    return "␣" if token == " " else token.replace(" ", "␣")
