"""Checks for the exercises of notebook 11. Solutions: notebooks/solutions/11_masked_and_translation_solutions.ipynb.

Legend: V vocabulary, E experts, N sentences, K beam.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_lab.datasets.masking import HIDDEN, IGNORE, masked
from moe_lab.datasets.pairs import planted_pair
from moe_lab.datasets.tokens import END, SPECIAL
from moe_lab.exercises.verdict import verdict
from moe_lab.experiments.evomoe_masked import MaskedConfig
from moe_lab.models.generate import beam_search

STOP = "</s>"

Table = Mapping[tuple[str, ...], Mapping[str, float]]
"""Words so far -> probability of each next word; `STOP` ends a sentence."""


def _random_case(seed: int) -> tuple[Tensor, Tensor, float]:
    """A table of experts (V,), frequencies (V,) of the tokens, and a share of chosen ones."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens = 30 + 10 * seed
    table = torch.randint(4, (n_tokens,), generator=generator)
    frequency = torch.rand(n_tokens, generator=generator) ** 2
    frequency[: len(SPECIAL)] = 0
    return table, frequency / frequency.sum(), (0.15, 0.4)[seed % 2]


def counted_load(table: Tensor, frequency: Tensor, share: float, *, n_experts: int = 4) -> tuple[Tensor, float]:
    """Load (E,) of a hash gate on masked text drawn from ``frequency``, and the share of tokens that were chosen."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(frequency, 400_000, replacement=True, generator=generator).view(1000, 400)
    inputs, targets = masked(tokens, n_tokens=len(table), share=share, generator=generator)
    load = torch.bincount(table[inputs.flatten()], minlength=n_experts) / inputs.numel()
    return load, float((targets != IGNORE).float().mean())


def check_load(function: Callable[[Tensor, Tensor, float, int], Any] | None) -> bool:
    """Exercise 1: ``function(table, frequency, chosen, n_experts)`` is the expected load (E,) on masked tokens."""
    problem = ""
    for seed in (0, 1) if function is not None else ():
        table, frequency, share = _random_case(seed)
        counted, chosen = counted_load(table, frequency, share)
        given = torch.as_tensor(function(table, frequency, chosen, 4), dtype=torch.float32).flatten()
        if given.shape != (4,):
            problem = f"one number per expert, 4 here; you give {len(given)}"
        elif abs(float(given.sum()) - 1) > 1e-3:
            problem = f"every token has one expert, so loads sum to 1; yours to {float(given.sum()):.3f}"
        elif float((given - counted).abs().max()) > 0.005:
            worst = int((given - counted).abs().argmax())
            problem = (
                f"expert {worst} gets {float(counted[worst]):.3f} of 400,000 tokens, you say {given[worst]:.3f}. "
                f"Three things happen to a chosen token: <mask> ({HIDDEN:.0%}), a random one, nothing"
            )
        if problem:
            break
    return verdict(function, problem, "The mask alone may weigh more than a fair share.")


def check_control(control: MaskedConfig | None, pretrained: MaskedConfig) -> bool:
    """Exercise 2: the run without pre-training that takes as many optimiser steps in all as ``pretrained``."""
    if control is None:
        return verdict(None, "", "")
    free = {"pretrain", "tune_steps", "tune_every", "steps", "evaluate_every"}
    names = [f.name for f in dataclasses.fields(control) if f.name not in free]
    others = [name for name in names if getattr(control, name) != getattr(pretrained, name)]
    wanted = pretrained.steps + pretrained.tune_steps
    conditions = {
        "the control must not be pre-trained: pretrain=False": not control.pretrain,
        f"{', '.join(others)} must be that of the other run, or they differ for another reason": not others,
        f"the other run takes {wanted} steps in all, your control {control.tune_steps}": control.tune_steps == wanted,
    }
    problem = next((message for message, holds in conditions.items() if not holds), "")
    return verdict(control, problem, "As many steps, all of them with labels. Now run both, with several seeds.")


def check_translate(function: Callable[[str], str] | None, n_sentences: int = 300) -> bool:
    """Exercise 3: ``function(english)`` is the translation into the made-up language, by rule."""
    problem = ""
    for seed in range(n_sentences) if function is not None else ():
        english, right = planted_pair(np.random.default_rng(10_000 + seed))
        given = function(english)
        if given != right:
            problem = f"{english!r} is {right!r}, you say {given!r}"
            break
    return verdict(function, problem, f"{n_sentences} of {n_sentences}: BLEU 100 without a parameter.")


def check_interval(function: Callable[[Any, Any], tuple[float, float]] | None) -> bool:
    """Exercise 4: ``function(first, second)``, two (N,) lists of 0 and 1, is the 95 % interval of mean(second - first).

    By resampling *sentences*, the same ones for both.
    """
    problem = ""
    if function is not None:
        rng = np.random.default_rng(0)
        first = (rng.random(400) < 0.6).astype(int)
        second = np.where(rng.random(400) < 0.2, 1, first)
        gap = second - first
        mean, error = gap.mean(), gap.std() / math.sqrt(len(gap))
        same = [float(value) for value in function(first, first)]
        low, high = (float(value) for value in function(first, second))
        apart = math.hypot(first.std(), second.std()) / math.sqrt(len(gap))
        if any(abs(value) > 1e-12 for value in same):
            problem = (
                f"a gate and itself differ by exactly 0, your interval is [{same[0]:+.3f}, {same[1]:+.3f}]: draw the "
                "sentences once, for both gates"
            )
        elif not low < mean < high:
            problem = f"the mean difference {mean:+.3f} is not inside [{low:+.3f}, {high:+.3f}]; second minus first"
        elif abs((high - low) - 2 * 1.96 * error) > 0.25 * 2 * 1.96 * error:
            unpaired = " (you may have drawn other sentences for each gate)" if high - low > 3.2 * apart else ""
            problem = f"the interval is {high - low:.3f} wide, about {2 * 1.96 * error:.3f} would be right{unpaired}"
    return verdict(function, problem, "Errors that both gates make cancel: that is what pairing buys.")


class TableModel(nn.Module):
    """A translator whose next-word probabilities are written in a table, whatever the source.

    As much of `moe_lab.models.Translator` as `beam_search` asks for.

    Args:
        table: see `Table`; a prefix without an entry can only end.
    """

    def __init__(self, table: Table):
        super().__init__()
        words = dict.fromkeys(word for row in table.values() for word in row if word != STOP)
        self.words = tuple(words)
        self._id = {STOP: END, **{word: len(SPECIAL) + index for index, word in enumerate(words)}}
        self._table = dict(table)
        self.size = SimpleNamespace(length=2 + max((len(prefix) for prefix in table), default=0) + 1)
        self.embedding = _NoEmbedding()

    def encode(self, source: Tensor, seen: Tensor) -> tuple[Tensor, list]:
        """Nothing to remember."""
        return torch.zeros(*source.shape, 1), []

    def decoder(self, x: Tensor, prefix: Tensor, *_: Any) -> tuple[Tensor, list]:
        """prefix (N, S) -> (N, 1, V) logarithms of the probabilities behind the whole prefix."""
        rows = torch.full((len(prefix), 1, len(SPECIAL) + len(self.words)), -math.inf)
        for row, ids in enumerate(prefix.tolist()):
            for word, probability in self._table.get(self.text(ids[1:]), {STOP: 1.0}).items():
                rows[row, 0, self._id[word]] = math.log(probability) if probability > 0 else -math.inf
        return rows, []

    def text(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Ids without <s> and </s> as words."""
        return tuple(self.words[id_ - len(SPECIAL)] for id_ in ids if id_ >= len(SPECIAL))


class _NoEmbedding(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def translate_by_table(table: Table, beam: int) -> tuple[tuple[str, ...], float]:
    """What `beam_search` with K = ``beam`` finds (probabilities compared, no length penalty), and its probability.

    Raises:
        ValueError: a row of the table that is no distribution.
    """
    for prefix, row in table.items():
        if min(row.values(), default=0) < 0 or abs(sum(row.values()) - 1) > 1e-6:
            raise ValueError(f"the probabilities behind {prefix} must not be negative and sum to 1, got {dict(row)}")
    model = TableModel(table)
    found = beam_search(model, torch.tensor([[END]]), beam=beam, max_length=model.size.length, length_penalty=0.0)
    words = model.text(found[0].tolist())
    probability = 1.0
    for place in range(len(words) + 1):
        row = table.get(words[:place], {STOP: 1.0})
        probability *= row.get(words[place] if place < len(words) else STOP, 0.0)
    return words, probability


def check_wider(table: Table | None) -> bool:
    """Exercise 5: a table for which beam 2 ends with a less probable sentence than beam 1."""
    problem, praise = "", ""
    if table is not None:
        try:
            (greedy, p_greedy), (wide, p_wide) = (translate_by_table(table, beam) for beam in (1, 2))
            if p_wide >= p_greedy:
                problem = f"beam 1 finds {' '.join(greedy)} ({p_greedy:.3g}), beam 2 {' '.join(wide)} ({p_wide:.3g})"
            praise = f"Beam 1: {p_greedy:.3g}. Beam 2: {p_wide:.3g}. What looks better halfway may end worse."
        except ValueError as error:
            problem = str(error)
    return verdict(table, problem, praise)
