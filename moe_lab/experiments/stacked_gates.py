"""Gates for `fit_stacked`: what differs between trials comes in as numbers.

Legend: K trials, E experts.

Gates run as they are: all of `GATE_NAMES` are free of branches on values. Gamma: S_gamma(z) = S_1(z / gamma), so the
template's gates have gamma = 1 and splits are divided by the trial's gamma. Local search: its Sinkhorn loop stops when
it has converged and its permutation is rounded at a step of its own, so all that happens outside of vmap, trial by
trial (`sinkhorn_each`); the template is given the matrix.

Used by `stacked_recommender` and `stacked_vision`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe_lab.gates.comet import CometGate
from moe_lab.gates.dselect_k import DSelectKGate
from moe_lab.gates.local_search import Permutation, PermutationSearch
from moe_lab.gates.sinkhorn import permutation_matrix, sinkhorn_each
from moe_lab.routing import Routing
from moe_lab.train.stack import TrialStack

_SEARCHED = "moe.gates.0.permutation.logits"
_WIDTHS = {CometGate: "split", DSelectKGate: "code"}  # the map whose logits go through the smooth-step


class GivenMatrix(nn.Module):
    """Stands in for a `Permutation`: `PermutationSearch` mixes its columns with the matrix it is given."""

    is_soft = True

    def __init__(self, n_experts: int):
        super().__init__()
        self.register_buffer("given", torch.eye(n_experts).unsqueeze(0))

    @property
    def logits(self) -> Tensor:
        """(1, E, E): there is one permutation."""
        return self.given

    def matrix(self) -> Tensor:
        """(1, E, E)."""
        return self.given


def open_gates(model: nn.Module, n_experts: int) -> None:
    """Make a template of a model with gates in ``moe.gates``: gamma = 1, permutations from outside."""
    given = GivenMatrix(n_experts)
    for gate in model.moe.gates:
        if isinstance(gate, PermutationSearch):
            gate.permutation = given
        bare = gate.gate if isinstance(gate, PermutationSearch) else gate
        if type(bare) in _WIDTHS:
            bare.gamma = 1.0


def run_gate(gate: nn.Module, seen: Tensor, inputs: Mapping[str, Tensor]) -> Routing:
    """The gate of a template with this trial's ``gamma`` () and ``matrix`` (1, E, E), if any -> Routing."""
    bare, prefix = (gate.gate, "gate.") if isinstance(gate, PermutationSearch) else (gate, "")
    values = {}
    if "gamma" in inputs:
        part = _WIDTHS[type(bare)]
        for name, value in getattr(bare, part).named_parameters():
            values[f"{prefix}{part}.{name}"] = value / inputs["gamma"]
    if "matrix" in inputs:
        values["permutation.given"] = inputs["matrix"]
    return functional_call(gate, values, (seen,))


class StackedGates:
    """The part of `fit_stacked`'s questions that is about gates: widths and permutations of K trials.

    Args:
        configs: one per trial, with ``gate`` (the same for all) and ``gamma``.
        device: where the stack lives.
        learns: the permutations learn; if not, they cool and harden as planned, but their logits stay where they are.
    """

    def __init__(self, configs: Sequence[Any], device: torch.device, learns: bool = True):
        self.configs, self.device, self.learns = list(configs), device, learns
        self.searches = configs[0].gate.endswith("+")
        self.has_width = configs[0].gate.removesuffix("+") in ("comet", "dselect_k")
        self._hard: tuple[Any, dict[str, Tensor]] = (None, {})

    def own(self, stack: TrialStack, field: str, dtype: torch.dtype) -> Tensor:
        """(K,) a field of the living trials' configs."""
        return stack.numbers(field, lambda trial: getattr(self.configs[trial.index], field), dtype)

    def widths(self, stack: TrialStack) -> dict[str, Tensor]:
        """``gamma`` (K,) where the gate has one."""
        return {"gamma": self.own(stack, "gamma", torch.float32)} if self.has_width else {}

    @staticmethod
    def permutations(stack: TrialStack) -> list[Permutation]:
        """Of each living trial."""
        return [trial.model.moe.gates[0].permutation for trial in stack.trials]

    @classmethod
    @contextmanager
    def permutations_on_host(cls, stack: TrialStack) -> Iterator[list[Permutation]]:
        """The same with logits copied to the host, all at once: to look at them one by one, which needs no device."""
        permutations, logits = cls.permutations(stack), stack.parameters[_SEARCHED].detach()
        try:
            for permutation, copy in zip(permutations, logits.cpu(), strict=True):
                permutation.logits.data = copy
            yield permutations
        finally:
            for permutation, row in zip(permutations, logits, strict=True):
                permutation.logits.data = row

    def _soft_rows(self, stack: TrialStack) -> list[int]:
        return [row for row, permutation in enumerate(self.permutations(stack)) if not permutation.hardened]

    def _hardened(self, stack: TrialStack, rows: list[int]) -> dict[str, Tensor]:
        """``matrix`` and ``soft`` of a stack in which nobody searched, ``index`` of those who do: kept while it lasts.

        Copies from host memory make the host wait for the device; who searches changes only now and then.
        """
        key = [trial.index for trial in stack.trials], rows
        if self._hard[0] != key:
            frozen = torch.cat([permutation.frozen for permutation in self.permutations(stack)]).to(self.device)
            index = torch.tensor(rows, dtype=torch.int64, device=self.device)
            soft = torch.zeros(len(stack), device=self.device).index_fill_(0, index, 1.0)
            self._hard = key, {"matrix": permutation_matrix(frozen), "soft": soft, "index": index}
        return self._hard[1]

    def search(self, stack: TrialStack) -> dict[str, Tensor]:
        """``matrix`` (K, 1, E, E), soft where the search goes on, and ``soft`` (K,), 1 there and 0 elsewhere."""
        if not self.searches:
            return {}
        permutations, rows = self.permutations(stack), self._soft_rows(stack)
        known = self._hardened(stack, rows)
        matrix = known["matrix"]
        if rows:
            searching = [permutations[row] for row in rows]
            schedule = searching[0].schedule
            progress = torch.stack([permutation.progress for permutation in searching])
            progress = progress.to(self.device, non_blocking=True)
            logits = stack.parameters[_SEARCHED].index_select(0, known["index"])[:, 0]
            scaled = logits / schedule.temperature(progress)[:, None, None]
            most = max(schedule.iterations_start, schedule.iterations_end)
            found = sinkhorn_each(scaled, schedule.iterations(progress), schedule.tolerance, most)
            matrix = matrix.index_copy(0, known["index"], found)
        return {"matrix": matrix.unsqueeze(1), "soft": known["soft"]}

    def learning(self, stack: TrialStack) -> dict[str, list[int]]:
        """The logits of a search that has ended stay where they are."""
        return {_SEARCHED: self._soft_rows(stack) if self.learns else []} if self.searches else {}

    def for_evaluation(self, stack: TrialStack) -> dict[str, Tensor]:
        """Widths, and the hard permutation of each trial."""
        own = self.widths(stack)
        if self.searches:
            with self.permutations_on_host(stack) as permutations:
                assignments = torch.stack([permutation.assignment() for permutation in permutations])
            own["matrix"] = permutation_matrix(assignments.to(self.device))
        return own
