"""The two-task recommender for `fit_stacked`: the words of one trial that `torch.func.vmap` reads for all.

Legend: K trials, B rows, E experts, F width of an expert, N rows of a split.

    h_e    = keep_e relu(x W_e + b_e)                  every expert on every row
    y_s(t) = sum_e g_s,e(t) h_e(t)                     the weights' zeros are exact: what is not routed adds 0

Why not the sparse dispatch: which rows an expert gets depends on values, and vmap has one shape for all trials. The
dense sum is its oracle (`experts.dispatch.run_everything`), equal up to rounding.

Gates run as they are: all of `GATE_NAMES` are free of branches on values. What differs between trials comes in as
numbers. Gamma: S_gamma(z) = S_1(z / gamma), so the template's gates have gamma = 1 and splits are divided by the
trial's gamma. Local search: its Sinkhorn loop stops when it has converged and its permutation is rounded at a step of
its own, so all that happens outside of vmap, trial by trial (`sinkhorn_each`); the template is given the matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits

from moe_lab import datasets
from moe_lab.batches import Batches
from moe_lab.experiments.comet_recommender import build_model, permutation_health, rounded, two_task_loss
from moe_lab.experiments.recommender_config import TASKS, RecommenderConfig
from moe_lab.experiments.stacked_measures import StackedTally, auc_each
from moe_lab.gates.comet import CometGate
from moe_lab.gates.dselect_k import DSelectKGate
from moe_lab.gates.local_search import Permutation, PermutationSearch
from moe_lab.gates.sinkhorn import permutation_matrix, sinkhorn_each
from moe_lab.models import TwoTaskRecommender
from moe_lab.models.recommender import RecommenderOutput
from moe_lab.train.counted_dropout import keep_masks, survivor_scale
from moe_lab.train.stack import TrialStack

_SEARCHED = "moe.gates.0.permutation.logits"
_WIDTHS = {CometGate: "split", DSelectKGate: "code"}  # the map whose logits go through the smooth-step
_EVALUATION_ROWS = 2048  # of each trial at a time; a matter of memory only


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


def make_template(config: RecommenderConfig, n_users: int, n_items: int) -> TwoTaskRecommender:
    """A model whose gates have gamma = 1 and take their permutation from outside."""
    model = build_model(config, n_users, n_items, 1)
    given = GivenMatrix(config.n_experts)
    for gate in model.moe.gates:
        if isinstance(gate, PermutationSearch):
            gate.permutation = given
        bare = gate.gate if isinstance(gate, PermutationSearch) else gate
        if type(bare) in _WIDTHS:
            bare.gamma = 1.0
    return model


def run_gate(gate: nn.Module, seen: Tensor, inputs: Mapping[str, Tensor]):
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


def dense_forward(model: TwoTaskRecommender, inputs: Mapping[str, Tensor], survivors: float = 1.0) -> RecommenderOutput:
    """``model(user, item)`` without the sparse dispatch.

    Args:
        model: a template.
        inputs: ``user``, ``item`` (B,); ``gamma`` and ``matrix`` where the gate has them; ``keep`` (B, E, F) for
            dropout.
        survivors: factor of the numbers that ``keep`` keeps.
    """
    user, item = inputs["user"], inputs["item"]
    x = torch.cat((model.user_embedding(user), model.item_embedding(item)), -1)
    seen = [user if gate.gate_input == "keys" else x for gate in model.moe.gates]
    routings = [run_gate(gate, what, inputs) for gate, what in zip(model.moe.gates, seen, strict=True)]
    (weight,), (bias,) = model.moe.experts.weights, model.moe.experts.biases
    h = (torch.einsum("bd,edf->bef", x, weight) + bias).relu()
    if "keep" in inputs:
        h = torch.where(inputs["keep"], survivors * h, 0)
    mixtures = torch.einsum("sbe,bef->sbf", torch.stack([routing.weights for routing in routings]), h)
    watch, rating = (layer(y).squeeze(-1) for layer, y in zip(model.heads, mixtures, strict=True))
    return RecommenderOutput(watch, rating, routings)


class StackedRecommender:
    """What `fit_stacked` asks about K trials of one data set: loss, inputs, evaluation.

    Args:
        configs: one per trial, see `stacked_trials.check_stackable`.
        data: their data.
        device: where the stack lives.
    """

    def __init__(self, configs: Sequence[RecommenderConfig], data: datasets.Dataset, device: torch.device):
        self.configs, self.data, self.device = list(configs), data, device
        self.searches = configs[0].gate.endswith("+")
        self.has_width = configs[0].gate.removesuffix("+") in ("comet", "dselect_k")
        self.dropout = configs[0].dropout
        valid = {name: data.valid[name] for name in ("user", "item")}
        self.valid = Batches(valid, _EVALUATION_ROWS, device=device, keep_on_device=True)
        self.answers = {name: data.valid[name].to(device) for name in ("watched", "rating", "has_rating")}

    def loss(self, model: TwoTaskRecommender, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`two_task_loss` of one trial."""
        scale = survivor_scale(self.dropout) if self.dropout else 1.0
        terms = two_task_loss(lambda user, item: dense_forward(model, inputs, scale), inputs)
        if "permutation" in terms:
            terms["permutation"] = terms["permutation"] * inputs["soft"]  # 0 after the search, as `fit` has it
        return terms

    def _own(self, stack: TrialStack, field: str, dtype: torch.dtype) -> Tensor:
        values = [getattr(self.configs[trial.index], field) for trial in stack.trials]
        return torch.tensor(values, dtype=dtype, device=self.device)

    def _widths(self, stack: TrialStack) -> dict[str, Tensor]:
        return {"gamma": self._own(stack, "gamma", torch.float32)} if self.has_width else {}

    def inputs(self, stack: TrialStack, step: int, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gamma, dropout masks and permutation matrices of a training step."""
        config = self.configs[0]
        more = self._widths(stack)
        if self.dropout:
            shape = (batch["user"].shape[1], config.n_experts, config.hidden)
            more["keep"] = keep_masks(self._own(stack, "seed", torch.int64), step, shape, self.dropout)
        if self.searches:
            more |= self._search(stack)
        return more

    @staticmethod
    def _permutations(stack: TrialStack) -> list[Permutation]:
        return [trial.model.moe.gates[0].permutation for trial in stack.trials]

    def _soft_rows(self, stack: TrialStack) -> list[int]:
        return [row for row, permutation in enumerate(self._permutations(stack)) if not permutation.hardened]

    def _search(self, stack: TrialStack) -> dict[str, Tensor]:
        """``matrix`` (K, 1, E, E), soft where the search goes on, and ``soft`` (K,), 1 there and 0 elsewhere."""
        permutations, rows = self._permutations(stack), self._soft_rows(stack)
        frozen = torch.cat([permutation.frozen for permutation in permutations]).to(self.device)
        matrix, soft = permutation_matrix(frozen), torch.zeros(len(stack), device=self.device)
        if rows:
            schedule = permutations[0].schedule
            progress = torch.stack([permutations[row].progress for row in rows]).to(self.device)
            index = torch.tensor(rows, device=self.device)
            scaled = stack.parameters[_SEARCHED][index, 0] / schedule.temperature(progress)[:, None, None]
            found = sinkhorn_each(scaled, schedule.iterations(progress), schedule.tolerance)
            matrix, soft[index] = matrix.index_copy(0, index, found), 1.0
        return {"matrix": matrix.unsqueeze(1), "soft": soft}

    def learning(self, stack: TrialStack) -> dict[str, list[int]]:
        """The logits of a search that has ended stay where they are."""
        return {_SEARCHED: self._soft_rows(stack)} if self.searches else {}

    def _predict(self, model: TwoTaskRecommender, inputs: dict[str, Tensor]) -> tuple:
        out = dense_forward(model, inputs)
        trees = [routing.details.get("tree_probabilities") for routing in out.routings]
        return (
            out.watch_logit,
            out.rating,
            [routing.weights for routing in out.routings],
            [tree for tree in trees if tree is not None],
        )

    def evaluate(self, stack: TrialStack) -> list[dict[str, float]]:
        """Validation metrics of each trial; logs its ``routing`` and ``permutation`` rows as the ordinary run does."""
        own = self._widths(stack)
        if self.searches:
            assignments = [permutation.assignment().to(self.device) for permutation in self._permutations(stack)]
            own["matrix"] = permutation_matrix(torch.stack(assignments))
        tallies = [StackedTally(self.configs[0].k) for _ in TASKS]
        logits, ratings = [], []
        for batch in self.valid.epoch(0):
            logit, rating, weights, trees = stack.call(self._predict, own, batch)
            logits.append(logit)
            ratings.append(rating)
            for place, tally in enumerate(tallies):
                tally.add(weights[place], trees[place] if trees else None)
        summaries = [tally.summaries() for tally in tallies]
        for row, trial in enumerate(stack.trials):
            epoch = len(trial.curves.get("routing", [])) // len(TASKS)
            for task, summary in zip(TASKS, summaries, strict=True):
                trial.log("routing", epoch=epoch, task=task, **rounded(summary[row]))
            if self.searches:
                health = permutation_health(self._permutations(stack)[row])
                trial.log("permutation", epoch=epoch, **health)
        return self._metrics(stack, torch.cat(logits, 1), torch.cat(ratings, 1))

    def _metrics(self, stack: TrialStack, logit: Tensor, rating: Tensor) -> list[dict[str, float]]:
        """`task_metrics` of each trial from logits and ratings (K, N), on the device."""
        watched, mask = self.answers["watched"].double(), self.answers["has_rating"]
        each = binary_cross_entropy_with_logits(logit.double(), watched.expand(logit.shape), reduction="none")
        error = torch.where(mask, rating.double() - torch.where(mask, self.answers["rating"].double(), 0), 0)
        bce, mse = each.mean(1), error.square().sum(1) / mask.sum().clamp(min=1)
        area = auc_each(logit, watched)
        rows = []
        for trial, b, m, a in zip(stack.trials, bce.tolist(), mse.tolist(), area.tolist(), strict=True):
            weights = self.configs[trial.index].task_weights
            total = weights["watch"] * b + weights["rating"] * m
            rows.append({"valid_loss": total, "valid_bce": b, "valid_mse": m, "valid_auc": a})
        return rows
