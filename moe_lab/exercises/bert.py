"""Checks for the exercises of notebook 07. Solutions: notebooks/solutions/07_comet_bert_solutions.ipynb.

Legend: F hidden neurons, E experts, W neurons of an expert, V vocabulary, d width, S tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.bert import become_mixture, split_neurons, tiny_encoder
from moe_lab.bert.cost import flops_per_token
from moe_lab.exercises.verdict import verdict
from moe_lab.experiments.comet_bert_config import CometBertConfig
from moe_lab.gates import CometGate

_SPLITS = ((6, 2, 4, 2), (12, 3, 4, 0), (20, 4, 5, 3), (24, 4, 6, 4), (9, 2, 3, 3))
_SIZES = ((8, 32, 8, 16, 4), (16, 40, 5, 7, 8), (12, 48, 48, 30, 2))


def check_split(function: Callable[[Tensor, int, int, int], Any] | None) -> bool:
    """Exercise 1: ``function(importance, n_experts, width, shared)`` is a list of neurons for each expert."""
    problem = ""
    for seed, (n_neurons, n_experts, width, shared) in enumerate(_SPLITS if function is not None else ()):
        importance = torch.rand(n_neurons, generator=torch.Generator().manual_seed(seed))
        right = [set(row) for row in split_neurons(importance, n_experts, width, shared).tolist()]
        given = [[int(neuron) for neuron in row] for row in function(importance, n_experts, width, shared)]
        case = f"{n_neurons} neurons, {n_experts} experts of {width}, {shared} shared"
        best = set(importance.argsort(descending=True)[:shared].tolist())
        short = [expert for expert, row in enumerate(given) if len(row) != width or len(set(row)) != width]
        if len(given) != n_experts:
            problem = f"{case}: you give {len(given)} lists, one per expert is wanted"
        elif short:
            problem = f"{case}: expert {short[0]} has {given[short[0]]}, {width} different neurons are wanted"
        elif not all(best <= set(row) for row in given):
            problem = f"{case}: the {shared} most important, {sorted(best)}, must be in every expert"
        elif [set(row) for row in given] != right:
            expert = next(e for e in range(n_experts) if set(given[e]) != right[e])
            problem = (
                f"{case}: expert {expert} should have {sorted(right[expert])}, you give {sorted(given[expert])}; the "
                "others are dealt like cards, the best first, and each hand is cut to its size"
            )
        if problem:
            break
    return verdict(function, problem, "Every expert gets the best, and its share of good and bad cards.")


def importance_and_effect(w1: float, b1: float, w2: float, target: float) -> tuple[float, float]:
    """Of the one neuron of y = w2 relu(w1 + b1) (input 1) with loss (y - target)^2 / 2: importance, and |change of the
    loss| when w1 and w2 are set to 0."""
    weights = torch.tensor([w1, w2], dtype=torch.float64, requires_grad=True)
    loss = (weights[1] * (weights[0] + b1).relu() - target) ** 2 / 2
    loss.backward()
    without = float(target) ** 2 / 2
    return abs(float((weights.detach() * weights.grad).sum())), abs(without - float(loss.detach()))


def check_free(answer: Sequence[float] | None) -> bool:
    """Exercise 2: (w1, b1, w2, target) of a neuron with importance 0 whose deletion moves the loss by 0.1 or more."""
    problem, praise = "", ""
    if answer is not None:
        if len(answer) != 4:
            problem = f"four numbers are wanted: w1, b1, w2, target; you give {len(answer)}"
        else:
            importance, effect = importance_and_effect(*answer)
            praise = f"Importance {importance:.1g}, and the loss changes by {effect:.2g}."
            if importance > 1e-9:
                problem = f"its importance is {importance:.3g}, not 0"
            elif effect < 0.1:
                problem = f"its importance is 0, but so nearly is what it does: the loss changes by {effect:.3g}"
    return verdict(answer, problem, praise)


def counted_share(width: int, hidden: int, expert_width: int, length: int, n_experts: int) -> float:
    """FLOPs per token of a layer with experts behind a COMET gate over those of the layer, from `flops_per_token`."""
    model = nn.Module()
    model.encoder, _ = tiny_encoder(["a"], layers=1, width=width, heads=1, hidden=hidden)
    generator = torch.Generator().manual_seed(0)

    def gate(index: int) -> CometGate:
        return CometGate(width, n_experts, 1, generator=generator)

    student = become_mixture(model, [torch.ones(hidden)], gate, expert_width=expert_width, shared=expert_width)
    return flops_per_token(student.encoder, length) / flops_per_token(model.encoder, length)


def check_saving(function: Callable[[int, int, int, int, int], float] | None) -> bool:
    """Exercise 3: ``function(d, F, W, S, E)``: share of a layer's FLOPs that is left; one COMET tree, one expert."""
    problem = ""
    for sizes in _SIZES if function is not None else ():
        right, given = counted_share(*sizes), float(function(*sizes))
        if abs(given - right) > 1e-6:
            hint = "" if given > right else "; is the gate in it?"
            problem = f"d, F, W, S, E = {sizes}: {right:.4f} of the FLOPs are left, you say {given:.4f}{hint}"
            break
    return verdict(function, problem, "Attention stays whole, so what can be saved has a limit.")


def check_ablation(ablation: CometBertConfig | None, full: CometBertConfig) -> bool:
    """Exercise 4: the student that learns from labels only, otherwise as ``full``."""
    if ablation is None:
        return verdict(None, "", "")
    free = {"layer_weight", "prediction_weight"}
    names = [f.name for f in dataclasses.fields(ablation) if f.name not in free]
    others = [name for name in names if getattr(ablation, name) != getattr(full, name)]
    left = [name for name in sorted(free) if getattr(ablation, name) != 0]
    problem = ""
    if left:
        problem = f"the teacher still has a say: {', '.join(left)} must be 0"
    elif others:
        problem = f"{', '.join(others)} must be that of the other run, or they differ for another reason"
    return verdict(ablation, problem, "Labels only. Now run both, with several seeds.")


def information(counts: Tensor) -> float:
    """Mutual information, in bits, of the row and the column of a table of counts."""
    joint = counts.double() / counts.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    there = joint > 0
    return float((joint[there] * (joint[there] / independent[there]).log2()).sum())


def check_information(function: Callable[[Tensor], float] | None) -> bool:
    """Exercise 5: ``function(counts)``, counts (V, E): bits that a token's id tells about its expert."""
    problem = ""
    if function is not None:
        generator = torch.Generator().manual_seed(0)
        cases = {
            "a hash table that uses two experts alike": torch.tensor([[4, 0], [0, 3], [0, 1]]),
            "a gate that does not look": torch.tensor([[2, 6], [1, 3], [3, 9]]),
            "a random table": torch.randint(0, 9, (20, 4), generator=generator),
            "an expert that is never used": torch.tensor([[1, 0, 2], [5, 0, 1]]),
        }
        for name, counts in cases.items():
            right, given = information(counts), float(function(counts))
            if not abs(given - right) < 1e-6:
                hint = "; is the logarithm to base 2?" if abs(given - right * 0.6931471805599453) < 1e-6 else ""
                problem = (
                    f"{name}, {counts.tolist() if len(counts) < 4 else '20 words'}: {right:.4f} bits, not {given:.4f}"
                )
                problem += hint
                break
    return verdict(function, problem, "0 for a gate that does not look at the word, log2 E at most.")
