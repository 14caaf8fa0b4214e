"""A permutation that is learned like a weight, then frozen: the parameter of COMET's local search (KDD 2023).

Legend: Q permutations (1, or one per tree), E outputs of the gate (rows) = experts (columns), s step, S last step.

    L (Q, E, E) ~ U(-0.05, 0.05)                              (``logits``)
    P(s) = Sinkhorn((L + sigma G) / tau(s)), s < S            (``soft_matrix``), G Gumbel noise, training only
    Pi   = permutation maximising sum_i L[i, Pi(i)], s >= S   (``assignment``), constant from then on

tau falls geometrically from ``tau_start`` to ``tau_end`` over the S steps. In eval mode the permutation is always the
hard one, also during the search.

Where we differ from the authors' code, and why:

* Their temperature runs from 1e-3 to 1e-7 while L keeps the size of its start: L / tau is +-50 at the first step and
  +-500,000 at the last. P is saturated, L gets next to no gradient, and 150 iterations are far too few: at E = 16 the
  median row error is 1. ``schedule="official"`` does all that. Ours ("default") starts at tau = 0.1, where an entry
  of P still feels its neighbours, ends at 0.003, and iterates until rows sum to 1 within 0.005. Adam moves L by about
  its learning rate a step: give the search S * lr of 0.3 or more (measured: 0.1 finds 3/4 of 32 planted places, 0.3
  all of them).
* They harden the last soft P, we harden L (the limit tau -> 0). If the two disagree a warning says so.
* Their counter is not saved and their tau keeps shrinking after the search. Here step and permutation are buffers.

Taught in notebook 05.
"""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lab.gates.sinkhorn import (
    best_assignment,
    permutation_matrix,
    row_error,
    sinkhorn,
    soft_hard_distance,
)


@dataclass(frozen=True)
class Schedule:
    """How the search cools down.

    Attributes:
        tau_start: temperature at the first step, in units of the logits.
        tau_end: temperature it approaches at the last step.
        iterations_start: Sinkhorn iterations at the first step ...
        iterations_end: ... and at the last, linear between.
        tolerance: stop iterating when the row error is below this (0: always do all iterations).
        harden_on: "logits": Hungarian assignment of L. "soft": of the last soft P, as in the authors' code.
    """

    tau_start: float
    tau_end: float
    iterations_start: int
    iterations_end: int
    tolerance: float
    harden_on: str

    def __post_init__(self) -> None:
        if not 0 < self.tau_end <= self.tau_start:
            raise ValueError(f"temperatures must fall and stay positive, got {self.tau_start} -> {self.tau_end}")
        if min(self.iterations_start, self.iterations_end) < 1:
            raise ValueError("Sinkhorn needs at least 1 iteration at either end of the schedule")
        if self.harden_on not in ("logits", "soft"):
            raise ValueError(f"harden_on must be 'logits' or 'soft', got {self.harden_on!r}")

    def temperature(self, progress: Tensor | float):
        """tau at progress s/S in [0, 1]."""
        return self.tau_start * (self.tau_end / self.tau_start) ** progress

    def iterations(self, progress: Tensor) -> Tensor:
        """Largest number of Sinkhorn iterations at that progress, int64."""
        span = self.iterations_end - self.iterations_start
        return (self.iterations_start + span * progress).floor().long()


SCHEDULES = {
    "default": Schedule(0.1, 3e-3, 1000, 1000, 0.005, "logits"),
    "official": Schedule(1e-3, 1e-7, 20, 150, 0.0, "soft"),
}


def find_schedule(schedule: str | Schedule) -> Schedule:
    """A schedule by name, or itself. Raises ValueError with the nearest name."""
    if isinstance(schedule, Schedule):
        return schedule
    if schedule in SCHEDULES:
        return SCHEDULES[schedule]
    near = difflib.get_close_matches(str(schedule), SCHEDULES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no schedule {schedule!r}{hint} Valid: {sorted(SCHEDULES)}, or a Schedule")


class Permutation(nn.Module):
    """The learned relabelling; several gates may share one (the paper: one for all tasks).

    Args:
        n_experts: E.
        steps: S, optimiser steps until it becomes hard; at least 1.
        schedule: "default", "official", or a `Schedule`.
        n_permutations: Q; 1, or the gate's k for one per tree.
        noise: sigma, size of the Gumbel noise on L in training (0 in all published configurations).
        generator: for the initial logits.

    ``fit`` calls ``advance()`` once after every optimiser step.
    """

    def __init__(
        self,
        n_experts: int,
        steps: int,
        *,
        schedule: str | Schedule = "default",
        n_permutations: int = 1,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if n_experts < 1 or n_permutations < 1:
            raise ValueError(f"need at least 1 expert and 1 permutation, got {n_experts}, {n_permutations}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}; for no search leave PermutationSearch away")
        if noise < 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        self.steps, self.noise = int(steps), float(noise)
        self.schedule = find_schedule(schedule)
        start = torch.empty(n_permutations, n_experts, n_experts).uniform_(-0.05, 0.05, generator=generator)
        self.logits = nn.Parameter(start)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("hardened", torch.tensor(False))
        self.register_buffer("agreed", torch.tensor(True))
        self.register_buffer("frozen", torch.arange(n_experts).repeat(n_permutations, 1))
        self._is_hard = False  # `hardened` as a Python value: branching on it costs no synchronisation, no graph break
        self.has_reporter = False  # set by the first wrapper: a shared permutation is regularised once
        self.register_load_state_dict_post_hook(Permutation._after_load)

    @classmethod
    def fixed(cls, assignment: Tensor) -> Permutation:
        """A permutation that is known, (E,) or (Q, E) int64: nothing to search, hard from the start."""
        assignment = torch.atleast_2d(torch.as_tensor(assignment))
        q, n_experts = assignment.shape
        if not torch.equal(assignment.sort(-1).values, torch.arange(n_experts).expand(q, -1)):
            raise ValueError(f"each row must contain 0 .. {n_experts - 1} once, got {assignment.tolist()}")
        permutation = cls(n_experts, 1, n_permutations=q)
        permutation.logits.requires_grad_(False).copy_(permutation_matrix(assignment))
        permutation.advance()
        return permutation

    def _after_load(self, _) -> None:
        self._is_hard = bool(self.hardened)

    @property
    def is_soft(self) -> bool:
        """True in training before the search has ended."""
        return self.training and not self._is_hard

    @property
    def progress(self) -> Tensor:
        """s/S, below 1 for the last soft matrix too; a scalar tensor."""
        return self.step.clamp(max=self.steps - 1) / self.steps

    @property
    def temperature(self) -> float:
        """tau of the current step."""
        return float(self.schedule.temperature(float(self.progress)))

    def soft_matrix(self, noise: float = 0.0) -> Tensor:
        """P (Q, E, E) at the current temperature; carries the gradient to the logits."""
        logits = self.logits if self.logits.dtype == torch.float64 else self.logits.float()
        if noise:
            uniform = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny, max=1 - 1e-7)
            logits = logits - noise * (-uniform.log()).log()
        scaled = logits / self.schedule.temperature(self.progress)
        return sinkhorn(scaled, self.schedule.iterations(self.progress), self.schedule.tolerance)

    @torch.no_grad()
    def assignment(self) -> Tensor:
        """(Q, E) int64: the expert of each output if the search ended now; constant once it has."""
        if self._is_hard:
            return self.frozen
        return best_assignment(self.logits if self.schedule.harden_on == "logits" else self.soft_matrix())

    def matrix(self) -> Tensor:
        """(Q, E, E): soft in training until the search ends (with noise, if any), else hard."""
        if self.is_soft:
            return self.soft_matrix(self.noise)
        return permutation_matrix(self.assignment())

    @torch.no_grad()
    def advance(self) -> None:
        """One optimiser step is done; at the S-th the permutation is rounded and frozen.

        Warns (UserWarning) if the assignments of L and of the last soft P differ: the gate that was trained is then not
        the gate that remains.
        """
        if self._is_hard:
            return
        if int(self.step) + 1 >= self.steps:
            by_logits, by_soft = best_assignment(self.logits), best_assignment(self.soft_matrix())
            self.agreed.fill_(torch.equal(by_logits, by_soft))
            self.frozen.copy_(by_logits if self.schedule.harden_on == "logits" else by_soft)
            self.hardened.fill_(True)
            self._is_hard = True
            if not self.agreed:
                warnings.warn(
                    "local search ended undecided: the best assignments of the logits and of the soft matrix differ "
                    f"(hardened on {self.schedule.harden_on!r}); search longer, or with another schedule",
                    stacklevel=3,
                )
        self.step += 1

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        """Numbers to log, worst of the Q matrices, without noise.

        row_error (0 is good), soft_hard_distance (Frobenius), hungarian_agrees (1.0 or 0.0: the best assignments of L
        and of P are the same), temperature, hardened (1.0 or 0.0; then row error and distance are 0 and
        ``hungarian_agrees`` is that of the moment of hardening).
        """
        if self._is_hard:
            error, distance, agrees = 0.0, 0.0, bool(self.agreed)
        else:
            soft = self.soft_matrix()
            by_logits, by_soft = best_assignment(self.logits), best_assignment(soft)
            chosen = by_logits if self.schedule.harden_on == "logits" else by_soft
            distance = float(soft_hard_distance(soft, permutation_matrix(chosen, soft.dtype)).amax())
            error, agrees = float(row_error(soft).amax()), torch.equal(by_logits, by_soft)
        return {
            "row_error": error,
            "soft_hard_distance": distance,
            "hungarian_agrees": float(agrees),
            "temperature": self.temperature,
            "hardened": float(self._is_hard),
        }

    def extra_repr(self) -> str:
        q, n, _ = self.logits.shape
        return f"n_experts={n}, n_permutations={q}, steps={self.steps}, noise={self.noise}"
