"""Where does a sample leave? From gates to a distribution over exits, and to a decision (JEI-DNN, section 4).

Legend: G gates, L = G + 1 exits (the last one has no gate), g_l in (0, 1) the gate after exit l, S_l = g_1 + ... + g_l.

    "direct" (the paper)      p_l = max(0, min(g_l, 1 - S_{l-1})),   p_L = max(0, 1 - S_G)
    "stick_breaking"          p_l = g_l (1 - g_1) ... (1 - g_{l-1})
    "cumulative"              p_l = increase of max(g_1 .. g_l)

All sum to 1. For "direct", p_1 + ... + p_l = min(1, S_l): once the gates have given away everything, later exits get
nothing.

    decision: leave at the first exit at which the probability of still being inside at least halves;
    for "direct" that is 2 g_l + S_{l-1} >= 1; for "stick_breaking" g_l >= 1/2

"cumulative" leaves at the first g_l >= 1/2. It is ours: the gates' targets say "the best exit is here or earlier", so
what they learn is a cumulative probability, which "direct" reads as a single one (and so leaves earlier than asked).

The authors' code computes conditional probabilities by dividing by what is left, which is 0/0 after S reached 1; the
closed form decides the same without dividing. It also never forms p_L.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.names import check_name

MODELS = ("direct", "stick_breaking", "cumulative")


def check_model(model: str) -> None:
    """ValueError with the nearest name for an unknown exit model."""
    check_name("exit model", model, MODELS)


def exit_probabilities(gates: Tensor, model: str = "direct") -> Tensor:
    """Distribution over exits.

    Args:
        gates: (..., G), in [0, 1]; sigmoids of gate logits.
        model: see the module's text.

    Returns:
        (..., G + 1), non-negative, sums to 1, differentiable. At least float32.
    """
    check_model(model)
    gates = gates if gates.dtype == torch.float64 else gates.float()
    if model == "direct":
        inside = gates.cumsum(-1).clamp(max=1.0)  # P(left by l)
    elif model == "cumulative":
        inside = gates.cummax(-1).values
    else:
        inside = 1 - (1 - gates).cumprod(-1)
    edges = torch.cat((torch.zeros_like(gates[..., :1]), inside, torch.ones_like(gates[..., :1])), -1)
    return edges.diff(dim=-1).clamp(min=0.0)


def leaves_here(gate: Tensor, given_away: Tensor, model: str = "direct") -> Tensor:
    """One step of the decision, for samples that are still inside.

    Args:
        gate: (...) g_l.
        given_away: (...) S_{l-1}, sum of the gates before (only "direct" looks at it).
        model: see the module's text.

    Returns:
        (...) bool.
    """
    return 2 * gate + given_away >= 1 if model == "direct" else gate >= 0.5


def exits_taken(gates: Tensor, model: str = "direct") -> Tensor:
    """(...) int64, 0 .. G: the exit at which each sample leaves, by the rule of the module's text.

    Args:
        gates: (..., G), in [0, 1].
        model: "direct", "stick_breaking" or "cumulative".
    """
    check_model(model)
    gates = gates if gates.dtype == torch.float64 else gates.float()
    before = gates.cumsum(-1) - gates
    leaves = leaves_here(gates, before, model)
    last = torch.ones_like(leaves[..., :1])
    return torch.cat((leaves, last), -1).to(torch.uint8).argmax(-1)
