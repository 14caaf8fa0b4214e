"""The two-task recommender for `fit_stacked`: the words of one trial that `torch.func.vmap` reads for all.

Legend: K trials, B rows, E experts, F width of an expert, N rows of a split.

    h_e    = keep_e relu(x W_e + b_e)                  every expert on every row
    y_s(t) = sum_e g_s,e(t) h_e(t)                     the weights' zeros are exact: what is not routed adds 0

Why not the sparse dispatch: which rows an expert gets depends on values, and vmap has one shape for all trials. The
dense sum is its oracle (`experts.dispatch.run_everything`), equal up to rounding.

Gates: see `stacked_gates`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from moe_lab import datasets
from moe_lab.batches import Batches
from moe_lab.experiments.comet_recommender import (
    build_model,
    gathered_metrics,
    known_baselines,
    permutation_health,
    rounded,
    two_task_loss,
)
from moe_lab.experiments.recommender_config import TASKS, RecommenderConfig
from moe_lab.experiments.stacked_gates import StackedGates, open_gates, run_gate
from moe_lab.experiments.stacked_measures import StackedTally, auc_each, batchwise_mse_each
from moe_lab.models import TwoTaskRecommender
from moe_lab.models.recommender import RecommenderOutput
from moe_lab.train.counted_dropout import keep_masks, survivor_scale
from moe_lab.train.stack import TrialStack

_EVALUATION_ROWS = 2048  # of each trial at a time; a matter of memory only


def make_template(config: RecommenderConfig, n_users: int, n_items: int) -> TwoTaskRecommender:
    """A model whose gates have gamma = 1 and take their permutation from outside."""
    model = build_model(config, n_users, n_items, 1)
    open_gates(model, config.n_experts)
    return model


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


class _Split:
    """Rows to evaluate and their answers, on the device."""

    def __init__(self, rows: Mapping[str, Tensor], device: torch.device):
        asked = {name: rows[name] for name in ("user", "item")}
        self.batches = Batches(asked, _EVALUATION_ROWS, device=device, keep_on_device=True)
        self.watched, self.rating, self.has_rating = (
            rows[name].to(device) for name in ("watched", "rating", "has_rating")
        )


class StackedRecommender(StackedGates):
    """What `fit_stacked` asks about K trials of one data set: loss, inputs, evaluation; and the test rows at the end.

    Args:
        configs: one per trial, see `stacked_trials.check_stackable`.
        data: their data.
        device: where the stack lives.
        learns: see `StackedGates`.
    """

    def __init__(
        self,
        configs: Sequence[RecommenderConfig],
        data: datasets.Dataset,
        device: torch.device,
        learns: bool = True,
    ):
        super().__init__(configs, device, learns)
        self.data, self.dropout = data, configs[0].dropout
        self.valid = _Split(data.valid, device)

    def loss(self, model: TwoTaskRecommender, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`two_task_loss` of one trial."""
        scale = survivor_scale(self.dropout) if self.dropout else 1.0
        terms = two_task_loss(lambda user, item: dense_forward(model, inputs, scale), inputs)
        if "permutation" in terms:
            terms["permutation"] = terms["permutation"] * inputs["soft"]  # 0 after the search, as `fit` has it
        return terms

    def inputs(self, stack: TrialStack, step: int, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gamma, dropout masks and permutation matrices of a training step."""
        config = self.configs[0]
        more = self.widths(stack) | self.search(stack)
        if self.dropout:
            shape = (batch["user"].shape[1], config.n_experts, config.hidden)
            more["keep"] = keep_masks(self.own(stack, "seed", torch.int64), step, shape, self.dropout)
        return more

    def _predict(self, model: TwoTaskRecommender, inputs: dict[str, Tensor]) -> tuple:
        out = dense_forward(model, inputs)
        trees = [routing.details.get("tree_probabilities") for routing in out.routings]
        return (
            out.watch_logit,
            out.rating,
            [routing.weights for routing in out.routings],
            [tree for tree in trees if tree is not None],
        )

    def predict(self, stack: TrialStack, split: _Split) -> tuple[Tensor, Tensor, list[dict[str, dict[str, Any]]]]:
        """Logits and ratings (K, N) of a split, on the device; per trial and task the `RoutingTally` summary."""
        own = self.for_evaluation(stack)
        tallies = [StackedTally(self.configs[0].k) for _ in TASKS]
        logits, ratings = [], []
        for batch in split.batches.epoch(0):
            logit, rating, weights, trees = stack.call(self._predict, own, batch)
            logits.append(logit)
            ratings.append(rating)
            for place, tally in enumerate(tallies):
                tally.add(weights[place], trees[place] if trees else None)
        by_task = [tally.summaries() for tally in tallies]
        routing = [dict(zip(TASKS, of_trial, strict=True)) for of_trial in zip(*by_task, strict=True)]
        return torch.cat(logits, 1), torch.cat(ratings, 1), routing

    def evaluate(self, stack: TrialStack) -> list[dict[str, float]]:
        """Validation metrics of each trial; logs its ``routing`` and ``permutation`` rows as the ordinary run does."""
        logit, rating, routing = self.predict(stack, self.valid)
        for row, trial in enumerate(stack.trials):
            epoch = len(trial.curves.get("routing", [])) // len(TASKS)
            for task, summary in routing[row].items():
                trial.log("routing", epoch=epoch, task=task, **rounded(summary))
        if self.searches:
            with self.permutations_on_host(stack) as permutations:
                for trial, permutation in zip(stack.trials, permutations, strict=True):
                    epoch = len(trial.curves.get("permutation", []))
                    trial.log("permutation", epoch=epoch, **permutation_health(permutation))
        scores = self._scores(stack, self.valid, logit, rating)
        return [{f"valid_{name}": value for name, value in row.items()} for row in scores]

    @torch.no_grad()
    def test(self, stack: TrialStack) -> list[dict[str, Any]]:
        """`final_metrics` of each trial."""
        split = _Split(self.data.test, self.device)
        stack.template.eval()
        logit, rating, routing = self.predict(stack, split)
        scores = self._scores(stack, split, logit, rating)
        configs = [self.configs[trial.index] for trial in stack.trials]
        official = torch.empty(len(stack), dtype=torch.float64)
        for size in {config.official_batch for config in configs}:
            rows = [row for row, config in enumerate(configs) if config.official_batch == size]
            official[rows] = batchwise_mse_each(rating[rows], split.rating, split.has_rating, size).cpu()
        known = known_baselines(self.data)
        parts = zip(configs, scores, official.tolist(), routing, strict=True)
        return [gathered_metrics(config, row, mse, gates, known) for config, row, mse, gates in parts]

    def _scores(self, stack: TrialStack, split: _Split, logit: Tensor, rating: Tensor) -> list[dict[str, float]]:
        """`task_metrics` of each trial from logits and ratings (K, N), on the device."""
        watched, mask = split.watched.double(), split.has_rating
        each = binary_cross_entropy_with_logits(logit.double(), watched.expand(logit.shape), reduction="none")
        error = torch.where(mask, rating.double() - torch.where(mask, split.rating.double(), 0), 0)
        bce, mse = each.mean(1), error.square().sum(1) / mask.sum().clamp(min=1)
        area = auc_each(logit, watched)
        rows = []
        for trial, b, m, a in zip(stack.trials, bce.tolist(), mse.tolist(), area.tolist(), strict=True):
            weights = self.configs[trial.index].task_weights
            rows.append({"loss": weights["watch"] * b + weights["rating"] * m, "bce": b, "mse": m, "auc": a})
        return rows
