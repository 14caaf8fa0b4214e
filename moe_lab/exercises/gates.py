"""Checks for the exercises of notebook 01. Solutions: notebooks/solutions/01_gates_from_scratch_solutions.ipynb."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_lab.exercises.verdict import verdict
from moe_lab.gates.losses import load_balancing_loss


def topk_by_marking(logits: Tensor, k: int) -> Tensor:
    """Top-k with the artefact of the COMET authors' code: "not chosen" is recognised by the value 0 after scattering.

    So a chosen logit of exactly 0 counts as not chosen, and a row whose chosen logits are all 0 becomes NaN.
    """
    kept, experts = logits.topk(k, dim=-1)
    scattered = torch.zeros_like(logits).scatter(-1, experts, kept)
    return scattered.masked_fill(scattered == 0, -torch.inf).softmax(-1)


def check_pull(answer: Sequence[float] | None) -> bool:
    """Exercise 1: gradient of y at the logits: weights (1/2, 1/4, 1/4, 0), answers (4, 2, -2, 9)."""
    weights, answers = [0.5, 0.25, 0.25, 0.0], [4.0, 2.0, -2.0, 9.0]
    y = sum(g * a for g, a in zip(weights, answers, strict=True))
    right = [g * (a - y) for g, a in zip(weights, answers, strict=True)]
    problem = ""
    if answer is not None:
        wrong = [e for e, (mine, it) in enumerate(zip(answer, right, strict=False)) if abs(mine - it) > 1e-6]
        if len(answer) != 4:
            problem = f"four numbers, one per expert; you give {len(answer)}"
        elif 3 in wrong:
            problem = "expert 3 has weight 0: however good its answer, equation (2) multiplies it by 0"
        elif wrong:
            problem = f"expert {wrong[0]}: g (a - y) with y = {y:g}"
    return verdict(
        answer, problem, "They sum to 0: what one expert gains the others lose. Expert 3, the best, is not seen."
    )


def check_lost_choice(logits: Sequence[float] | None, k: int = 2) -> bool:
    """Exercise 2: four logits, not all zero, from which marking by value drops a chosen expert."""
    problem = ""
    if logits is not None:
        row = torch.tensor([logits], dtype=torch.float32)
        ours = torch.zeros_like(row).scatter(-1, row.topk(k).indices, 1).bool()
        theirs = topk_by_marking(row, k)
        if row.shape != (1, 4):
            problem = f"four logits, not {row.shape[-1]}"
        elif not row.any():
            problem = "all logits are 0: that row becomes NaN, which one would notice; find a row that passes unseen"
        elif torch.equal(ours, theirs > 0):
            chosen = ours[0].nonzero().flatten().tolist()
            problem = f"both choose experts {chosen}: which value do they take for 'not chosen'?"
    return verdict(logits, problem, "The row still sums to 1, so no test of row sums would have noticed.")


def check_noisy_logits(function: Callable[[Tensor, Tensor, Tensor], Tensor] | None) -> bool:
    """Exercise 3: ``function(logits, noise_logits, draw)`` -> logits + draw * softplus(noise_logits)."""
    problem = ""
    if function is not None:
        generator = torch.Generator().manual_seed(0)
        logits, scale, draw = (torch.randn(4, 6, generator=generator) for _ in range(3))
        given, right = function(logits, scale, draw), logits + draw * torch.nn.functional.softplus(scale)
        if given.shape != right.shape:
            problem = f"expected shape {tuple(right.shape)}, got {tuple(given.shape)}"
        elif torch.allclose(given, logits + draw * scale, atol=1e-5):
            problem = "a negative scale flips the noise: make it positive, smoothly"
        elif torch.allclose(given, logits + draw, atol=1e-5):
            problem = "the size of the noise is not learned: where is noise_logits?"
        elif not torch.allclose(given, right, atol=1e-5):
            problem = f"off by up to {float((given - right).abs().max()):.3g}; softplus(s) = log(1 + exp(s))"
    return verdict(function, problem, "At noise_logits = 0 the standard deviation is log 2 = 0.69, not 0 and not 1.")


def check_blind_spot(scores: Sequence[Sequence[float]] | None, chosen: Sequence[int] | None) -> bool:
    """Exercise 4: softmax scores (tokens x 4) and top-1 choices with a balancing term of 1 and an unfair load."""
    if scores is None or chosen is None:
        return verdict(None, "", "")
    table = torch.tensor(scores, dtype=torch.float64)
    problem = ""
    if table.dim() != 2 or table.shape[1] != 4 or len(table) != len(chosen):
        problem = f"scores need shape (tokens, 4) and one choice per token, got {tuple(table.shape)} and {len(chosen)}"
    elif not torch.allclose(table.sum(1), torch.ones(len(table), dtype=table.dtype)) or table.min() < 0:
        problem = f"scores are softmax values; your rows sum to {[round(v, 3) for v in table.sum(1).tolist()]}"
    elif any(table[t, e] < table[t].max() - 1e-12 for t, e in enumerate(chosen)):
        problem = "each token must choose (one of) its largest scores"
    else:
        active = torch.nn.functional.one_hot(torch.tensor(chosen), 4).bool()
        term, load = float(load_balancing_loss(table, active)), active.double().mean(0)
        if load.max() <= 0.5:
            problem = f"the largest load is {float(load.max()):.2f}; let one expert get more than half"
        elif abs(term - 1) > 1e-3:
            problem = (
                f"the term is {term:.3f}: with f far from uniform, what must the mean scores P be for sum f P = 1/E?"
            )
    return verdict(scores, problem, "1 is necessary for balance, not sufficient: watch the load, not only the term.")


def check_empty_experts(answer: float | None) -> bool:
    """Exercise 5: probability that 8 keys, hashed at random, leave at least one of 8 experts without a key."""
    right = 1 - math.factorial(8) / 8**8
    problem = ""
    if answer is not None and abs(answer - right) > 5e-5:
        if abs(answer - (1 - right)) < 5e-5:
            problem = "that is the probability that nobody is left out"
        elif abs(answer - (7 / 8) ** 8) < 5e-5:
            problem = "that is the probability that one given expert stays empty"
        else:
            problem = "of 8^8 tables, how many give every expert exactly one key?"
    return verdict(
        answer, problem, "The balanced table never does. With thousands of keys the difference is a few per cent."
    )
