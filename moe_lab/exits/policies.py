"""Who leaves where without learned gates: fixed exits, thresholds on confidence, and oracles that see the labels.

Legend: N samples, L exits, K classes, c_i confidence at an exit (larger = surer).

* `static_exits`: everybody leaves at the same exit.
* `geometric_thresholds`: the usual protocol (MSDNet's budgeted batches). Shares pi_k proportional to rho^k; one by one
  the threshold is the confidence of number floor(N pi_k) among those that are still inside. `geometric_exits` sends
  the samples themselves, without thresholds.
* `target_accuracy_thresholds`: each exit by itself keeps as many as it can with an accuracy above a target.
* `shared_threshold_exits`: one threshold for all exits. Simple, strong, and missing from the paper.
* `cheapest_exits`, `earliest_right_exits`: oracles, what perfect gates could do; upper bounds, no methods.

Thresholds are set on one set of samples and applied to another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.exits.checks import check_exit
from moe_lab.exits.features import uncertainty_features
from moe_lab.exits.losses import best_exits
from moe_lab.names import check_name

CONFIDENCES = ("probability", "entropy", "margin")


def confidence(logits: Tensor, kind: str = "probability") -> Tensor:
    """Larger = surer.

    Args:
        logits: (..., K).
        kind: "probability" (the largest), "entropy" (its negative), "margin".

    Returns:
        (...).
    """
    check_name("confidence", kind, CONFIDENCES)
    features = uncertainty_features(logits)
    return {"probability": features[..., 0], "entropy": -features[..., 1], "margin": features[..., 2]}[kind]


def static_exits(n: int, exit_index: int, n_exits: int) -> Tensor:
    """(N,) everybody leaves at ``exit_index``, 0 .. n_exits - 1. ValueError outside."""
    check_exit(exit_index, n_exits)
    return torch.full((n,), exit_index, dtype=torch.int64)


def apply_thresholds(confidences: Tensor, thresholds: Tensor) -> Tensor:
    """Exits of samples that leave at the first exit whose threshold they reach.

    Args:
        confidences: (N, L).
        thresholds: (L,); inf: nobody leaves there. The last is ignored, everybody leaves there at the latest.

    Returns:
        (N,) int64.
    """
    reached = confidences >= thresholds
    reached[:, -1] = True
    return reached.to(torch.uint8).argmax(-1)


def geometric_shares(rho: float, n_exits: int) -> Tensor:
    """(L,) pi_k proportional to rho^k, k = 1 .. L; sums to 1. rho -> 0: all at the first exit; large: at the last."""
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    log = torch.arange(1, n_exits + 1, dtype=torch.float64) * torch.log(torch.tensor(rho, dtype=torch.float64))
    return log.softmax(0)


def geometric_thresholds(confidences: Tensor, rho: float, *, to_last: bool = True) -> Tensor:
    """Thresholds that send shares pi_k of these samples to exit k.

    Args:
        confidences: (N, L) of the samples that thresholds are set on.
        rho: ratio of neighbouring shares.
        to_last: False: shares over the exits *before* the last, as in JEI-DNN's published comparison. Hardly anybody
            then uses the whole network, and the curve ends below its accuracy: a weaker baseline.

    Returns:
        (L,); inf where no one shall leave, -inf at the last exit. With distinct confidences exactly floor(N pi_k)
        samples leave at exit k < L.
    """
    n, n_exits = confidences.shape
    shares = geometric_shares(rho, n_exits if to_last else n_exits - 1).tolist()
    thresholds = confidences.new_full((n_exits,), torch.inf)
    thresholds[-1] = -torch.inf
    inside = torch.ones(n, dtype=torch.bool, device=confidences.device)
    for level, share in enumerate(shares[: n_exits - 1]):
        wanted = int(n * share + 1e-9)
        here = confidences[inside, level]
        if wanted == 0 or wanted > len(here):
            continue
        thresholds[level] = here.topk(wanted).values[-1]
        inside &= confidences[:, level] < thresholds[level]
    return thresholds


def geometric_exits(confidences: Tensor, shares: Tensor) -> Tensor:
    """Exits of these very samples: exit by exit the floor(N share) surest of those that are still inside.

    What `geometric_thresholds` does to its own samples, but also equal confidences are told apart (first come, first
    served), so that counts are exact.

    Args:
        confidences: (N, L).
        shares: (L,) or longer, as `geometric_shares` gives; the last exit takes whoever is left.

    Returns:
        (N,) int64.
    """
    n, n_exits = confidences.shape
    exits = torch.full((n,), n_exits - 1, dtype=torch.int64, device=confidences.device)
    inside = torch.arange(n, device=confidences.device)
    for level, share in enumerate(shares[: n_exits - 1].tolist()):
        inside = inside[confidences[inside, level].argsort(descending=True, stable=True)]
        wanted = int(n * share + 1e-9)
        exits[inside[:wanted]] = level
        inside = inside[wanted:].sort().values
    return exits


def target_accuracy_thresholds(confidences: Tensor, right: Tensor, target: float, least: int = 11) -> Tensor:
    """Thresholds above which an exit, by itself, is right more often than ``target``.

    At each exit *all* samples are sorted by confidence, whoever may have left before; the longest beginning whose
    accuracy exceeds the target is kept. Equal confidences are kept or left together: a threshold cannot part them.

    Args:
        confidences: (N, L) of the samples that thresholds are set on.
        right: (N, L) bool, is the exit right.
        target: accuracy to exceed, in [0, 1]; usually that of the whole network.
        least: shorter beginnings do not count: too few samples to know.

    Returns:
        (L,); inf where no beginning is good enough, -inf at the last exit.

    Raises:
        ValueError: shapes differ, ``right`` is not bool, a target or ``least`` out of range.
    """
    if confidences.dim() != 2 or confidences.shape != right.shape:
        raise ValueError(
            f"confidences and right must both be (samples, exits), got {tuple(confidences.shape)} and "
            f"{tuple(right.shape)}"
        )
    if right.dtype != torch.bool:
        raise ValueError(f"right must be bool (logits.argmax(-1) == labels.unsqueeze(1)), got {right.dtype}")
    if not 0 <= target <= 1:
        raise ValueError(f"target must be an accuracy in [0, 1], got {target}")
    if least < 1:
        raise ValueError(f"least must be at least 1 sample, got {least}")
    n, n_exits = confidences.shape
    thresholds = confidences.new_full((n_exits,), torch.inf)
    if n >= least:
        values, order = confidences.sort(0, descending=True)
        length = torch.arange(1, n + 1, device=values.device).unsqueeze(1)
        accuracy = right.gather(0, order).double().cumsum(0) / length
        ends = torch.ones_like(right)
        ends[:-1] = values[:-1] > values[1:]
        good = ends & (length >= least) & (accuracy > target)
        thresholds = torch.where(good, values, torch.inf).amin(0)  # the longest ends at the least confidence
    thresholds[-1] = -torch.inf
    return thresholds


def shared_threshold_exits(confidences: Tensor, threshold: float) -> Tensor:
    """(N,) exits with one threshold everywhere; confidences (N, L)."""
    return apply_thresholds(confidences, confidences.new_full((confidences.shape[1],), float(threshold)))


def cheapest_exits(losses: Tensor, costs: Tensor, price: float) -> Tensor:
    """Oracle: argmin_l E_l + lambda c_l, with the labels; losses (N, L). What the gates' targets are made of."""
    return best_exits(losses, costs, price)


def earliest_right_exits(logits: Tensor, labels: Tensor) -> Tensor:
    """Oracle: the first exit that is right, else the last; logits (N, L, K), labels (N,)."""
    right = logits.argmax(-1) == labels.unsqueeze(-1)
    right[:, -1] = True
    return right.to(torch.uint8).argmax(-1)


def at_exit(values: Tensor, exits: Tensor) -> Tensor:
    """What each sample has at its exit: values (N, L, ...), exits (N,) -> (N, ...)."""
    return values[torch.arange(len(exits), device=values.device), exits]
