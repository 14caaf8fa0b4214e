"""What gates and inference modules are trained on (JEI-DNN, sections 4.2 and 4.3).

Legend: N samples, L exits, G = L - 1 gates, E_l the cross entropy of exit l, c_l its cost (c_L = 1), lambda the price.

Gates, given the inference modules. The best exit of a sample is l* = argmin_l E_l + lambda c_l (first of equals), the
targets say "here or earlier":

    t_l = [l >= l*],   loss = mean over samples and gates of (w_l t_l + 1 - t_l) BCE(gate logit, t_l)

with w_l = min(5, (N - n_l) / max(n_l, 0.1)) against imbalance. n_l counts samples with l* <= l ("cumulative", what the
targets are), or with l* = l ("per_layer", as the authors' code, which pushes late gates towards leaving), or w = 1.

Inference modules, given the gates: P_l is the probability of leaving at l, l <= G (the last head is frozen).

    "released"   r = sum_l E_l / sum_l P_l E_l;  mean of P_l E_l r / G.  As released, r carries a gradient, so that
                 sum_l P_l E_l r = sum_l E_l: plain cross entropy, and the gates have no influence (but for samples
                 whose sum of P_l E_l is below the guard of 1e-12, which count less)
    "detached"   the same with r as a constant
    "expected"   mean over samples of sum_l P_l E_l: the objective as written
    "single"     mean over samples of E at the exit taken (0 for those that leave at L)
    "uniform"    mean of E_l: no gates at all
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from moe_lab.names import check_name

MODES = ("released", "detached", "expected", "single", "uniform")
BALANCES = ("cumulative", "per_layer", "none")
_MOST_WEIGHT = 5.0


def check_mode(mode: str) -> None:
    """ValueError with the nearest name for an unknown mode of `inference_loss`."""
    check_name("mode", mode, MODES)


def check_balance(balance: str) -> None:
    """ValueError with the nearest name for an unknown balance of `positive_weights`."""
    check_name("balance", balance, BALANCES)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """E of every exit, nats.

    Args:
        logits: (..., B, E, K), any number E of exits; leading dimensions are runs.
        labels: (B,) int64.

    Returns:
        (..., B, E).
    """
    index = labels[:, None, None].expand(*logits.shape[:-1], 1)
    return -logits.log_softmax(-1).gather(-1, index).squeeze(-1)


def best_exits(losses: Tensor, costs: Tensor, price: float | Tensor) -> Tensor:
    """l*: the exit with the least loss plus priced cost.

    Args:
        losses: (..., L) per sample and exit.
        costs: (L,), normalised: the last is 1.
        price: lambda, not negative; a number, or a tensor that broadcasts against the samples (one per run).

    Returns:
        (...) int64; the earliest of equals.
    """
    price = torch.as_tensor(price)
    if price.device.type == "cpu" and bool((price < 0).any()):  # elsewhere a look at the value would wait for it
        raise ValueError(f"lambda must not be negative, got {price.min().item()}: exits would be paid for being late")
    price = price.to(losses)
    return (losses + price.unsqueeze(-1) * costs).argmin(-1)


def gate_targets(best: Tensor, n_gates: int) -> Tensor:
    """(..., G) float32: 1 from the best exit on. All 0 where the last exit is the best."""
    return (torch.arange(n_gates, device=best.device) >= best.unsqueeze(-1)).float()


def positive_weights(best: Tensor, n_gates: int, balance: str = "cumulative") -> Tensor:
    """w_l from the best exits of a validation set.

    Args:
        best: (..., N); leading dimensions are runs.
        n_gates: G.
        balance: "cumulative", "per_layer" or "none".

    Returns:
        (..., G), in [0, 5].
    """
    check_balance(balance)
    if balance == "none":
        return torch.ones((*best.shape[:-1], n_gates), device=best.device)
    levels = torch.arange(n_gates, device=best.device)
    hits = best.unsqueeze(-1) <= levels if balance == "cumulative" else best.unsqueeze(-1) == levels
    counts = hits.sum(-2).float()
    return ((best.shape[-1] - counts) / counts.clamp(min=0.1)).clamp(max=_MOST_WEIGHT)


def gate_loss(gate_logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted binary cross entropy.

    Args:
        gate_logits, targets: (..., N, G).
        weights: (..., G) of positive targets.

    Returns:
        (...): one scalar per run (no dimension without runs).
    """
    each = binary_cross_entropy_with_logits(gate_logits, targets, reduction="none")
    return ((weights.unsqueeze(-2) * targets + 1 - targets) * each).mean((-2, -1))


def inference_loss(
    losses: Tensor, probabilities: Tensor | None = None, taken: Tensor | None = None, mode: str = "released"
) -> Tensor:
    """Loss of the inference modules, gates given.

    Args:
        losses: (..., N, G) cross entropies of all exits but the last.
        probabilities: (..., N, G) P_l of those exits, constants. Not needed by "single" and "uniform".
        taken: (..., N) int64 exits taken, for "single".
        mode: see the module's text.

    Returns:
        (...): one scalar per run.

    Raises:
        ValueError: unknown mode, or what it needs is missing.
    """
    check_mode(mode)
    n_gates = losses.shape[-1]
    if mode == "uniform":
        return losses.mean((-2, -1))
    if mode == "single":
        if taken is None:
            raise ValueError("mode 'single' needs taken, the exits taken")
        chosen = torch.arange(n_gates, device=losses.device) == taken.unsqueeze(-1)
        return (losses * chosen).sum(-1).mean(-1)
    if probabilities is None:
        raise ValueError(f"mode {mode!r} needs probabilities, those of the exits without the last")
    expected = (probabilities.detach() * losses).sum(-1)
    if mode == "expected":
        return expected.mean(-1)
    # A sample that certainly leaves at the last exit has nothing here to rescale.
    ratio = losses.sum(-1) / expected.clamp(min=1e-12)
    if mode == "detached":
        ratio = ratio.detach()
    return (expected * ratio).mean(-1) / n_gates
