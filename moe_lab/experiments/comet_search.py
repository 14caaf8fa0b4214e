"""When does permutation search rescue a bad start, and when can it not? (COMET, KDD 2023, "local search", the "+".)

Planted clusters: E clusters, E experts that are affine functions, one right expert per cluster (`datasets`,
"planted-clusters", scrambled). So the right answer is known, and so is the best that *any* relabelling of the gate's
outputs could reach with the experts as they are:

    C_il = sum_t g_i(x_t) (f_l(x_t) - y_t)^2,    best relabelling = min over permutations of sum_i C_i,pi(i) / T

(exact where each row has one expert). A search cannot beat that number unless gate or experts also learn.

Taught in notebook 05.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab import datasets
from moe_lab.batches import Batches
from moe_lab.datasets.planted_clusters import leaf_sides
from moe_lab.experiments.search_config import SearchConfig
from moe_lab.experts import MLPExperts, MoE
from moe_lab.gates import CometGate, Gate, HashGate, TopKGate
from moe_lab.gates.local_search import Permutation, PermutationSearch
from moe_lab.gates.sinkhorn import best_assignment, permutation_matrix
from moe_lab.results import Result, run_cached
from moe_lab.train import FitConfig, evaluating, fit

EXPERIMENT = "comet_search"
_KEYS_PER_CLUSTER = 16


def run(
    config: SearchConfig, *, root: Path | str | None = None, recompute: bool = False, progress: bool = False
) -> Result:
    """Train and test one setting, or read the finished Result back.

    Returns:
        A Result with curves ``epochs`` (made by `fit`; ``valid_loss`` is the mean squared error) and ``search`` (one
        row before training and one per epoch until it is hard: step, health, the permutation, the soft matrix with
        three decimals). Metrics, on the test rows: test_loss; start_loss of the bare gate; best_relabelling (see above,
        of the start); floor (noise variance: what the true functions reach); right_expert (mean weight on the right
        expert); last_valid_loss (without choosing an epoch); permutation_agreed (see `Permutation`); found (share of
        places where the permutation is the best relabelling of the start; nan without search).
    """
    return run_cached(EXPERIMENT, config, partial(_train_and_test, config, progress), root=root, recompute=recompute)


def load_data(config: SearchConfig) -> datasets.Dataset:
    """The planted clusters of this run, with ``key`` (N,) int64 for hash gates."""
    data = datasets.load(
        "planted-clusters",
        seed=config.seed,
        n_experts=config.n_experts,
        n_features=config.n_features,
        n_train=config.n_train,
        siblings="scrambled",
    )
    generator = torch.Generator().manual_seed(config.seed)
    for rows in data.splits.values():
        cluster = rows["cluster"]
        rows["key"] = cluster
        if config.start == "misplaced":
            part = torch.randint(_KEYS_PER_CLUSTER, cluster.shape, generator=generator)
            rows["key"] = cluster * _KEYS_PER_CLUSTER + part
    return data


def build_bank(config: SearchConfig, info: dict[str, Any]) -> MLPExperts:
    """E affine experts: identity x the true functions + (1 - identity) x random ones."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    bank = MLPExperts(config.n_experts, (config.n_features, 1), activate_last=False, generator=generator)
    with torch.no_grad():
        for parameter, true in ((bank.weights[0], info["expert_weight"]), (bank.biases[0], info["expert_bias"])):
            true = true.unsqueeze(-1)
            random = config.random_size * true.std() * torch.randn(true.shape, generator=generator)
            parameter.copy_(config.identity * true + (1 - config.identity) * random)
    return bank.requires_grad_(config.experts_train)


def build_gate(config: SearchConfig, info: dict[str, Any]) -> Gate:
    """The gate as ``config.start`` says."""
    generator = torch.Generator().manual_seed(config.seed + 2)
    n, d = config.n_experts, config.n_features
    if config.gate == "hash":
        n_keys = n * (_KEYS_PER_CLUSTER if config.start == "misplaced" else 1)
        return HashGate(n_keys, n, balanced=True, seed=config.seed)
    gate = CometGate(d, n, 1, generator=generator) if config.gate == "comet" else TopKGate(d, n, 2, generator=generator)
    if config.start == "fresh":
        return gate
    splits = info["split_weight"]
    if config.start == "misplaced":
        splits = torch.nn.functional.normalize(torch.randn(splits.shape, generator=generator), dim=-1)
    with torch.no_grad():
        if config.gate == "comet":  # width of the smooth-step: a thousandth of the separation, so every split is hard
            gate.split.load_arrays(1000 * splits.unsqueeze(-1), torch.zeros(n - 1, 1))
        else:  # the largest logit belongs to the nearest centre; the second choice has next to no weight
            centres = torch.from_numpy(leaf_sides(n)).float() @ splits
            gate.logits.load_arrays(10 * centres, -5 * centres.square().sum(-1))
    return gate.requires_grad_(config.gate_trains)


def build_model(config: SearchConfig, data: datasets.Dataset, steps_per_epoch: int) -> MoE:
    """Gate (with its search, if any) and bank."""
    gate, bank = build_gate(config, data.info), build_bank(config, data.info)
    if config.search == "none":
        return MoE(gate, bank)
    generator = torch.Generator().manual_seed(config.seed + 3)
    if config.search == "one_shot":
        permutation = Permutation.fixed(best_assignment(-relabelling_costs(gate, bank, data.train)))
    elif config.search == "shuffle":
        permutation = Permutation.fixed(torch.randperm(config.n_experts, generator=generator))
    else:
        steps = config.search_epochs * steps_per_epoch
        permutation = Permutation(config.n_experts, steps, schedule=config.search, generator=generator)
    return MoE(PermutationSearch(gate, permutation=permutation), bank)


def predict(model: MoE, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Answers (N,) and combine weights (N, E) of all rows at once."""
    seen = rows["key"] if model.gate.gate_input == "keys" else None
    y, routing = model(rows["features"], seen)
    return y.squeeze(-1), routing


@torch.no_grad()
def relabelling_costs(gate: Gate, bank: MLPExperts, rows: dict[str, Tensor]) -> Tensor:
    """C (E, E): mean squared error, per row of the data, if the rows of output i went to expert l."""
    weights = gate(rows["key"] if gate.gate_input == "keys" else rows["features"]).weights
    answers = bank(rows["features"], None).reshape(bank.n_experts, -1)
    return weights.T @ (answers.T - rows["target"].unsqueeze(-1)).square() / len(weights)


def _mse(model: MoE, rows: dict[str, Tensor]) -> float:
    return float((predict(model, rows)[0] - rows["target"]).square().mean())


def _log_search(result: Result, permutation: Permutation, step: int) -> None:
    hardened = bool(permutation.hardened)
    matrix = permutation_matrix(permutation.frozen) if hardened else permutation.soft_matrix()
    result.log(
        "search",
        step=step,
        **permutation.health(),
        assignment=permutation.assignment()[0].tolist(),
        matrix=[[round(value, 3) for value in row] for row in matrix[0].detach().tolist()],
    )


def _train_and_test(config: SearchConfig, progress: bool, result: Result) -> dict[str, Any]:
    data = load_data(config)
    names = ("features", "target", "key")
    train = Batches({name: data.train[name] for name in names}, config.batch_size, shuffle=True, seed=config.seed)
    model = build_model(config, data, len(train))
    searched = model.gate
    permutation = searched.permutation if config.search != "none" else None
    bare = searched.gate if permutation is not None else searched
    with evaluating(model):
        start_loss = _mse(MoE(bare, model.experts), data.test)
        costs = relabelling_costs(bare, model.experts, data.test)
        best = best_assignment(-costs)
    metrics = {
        "start_loss": start_loss,
        "best_relabelling": float(costs.gather(-1, best.unsqueeze(-1)).sum()),
        "floor": float(data.info["noise"]) ** 2,
    }
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if learning:
        with warnings.catch_warnings():  # an undecided search is what is studied; it is in the metrics
            warnings.filterwarnings("ignore", "local search ended undecided")
            _train(config, model, train, data.valid, learning, permutation, result, progress)
    with evaluating(model):
        answer, routing = predict(model, data.test)
    right = routing.weights.gather(-1, data.test["expert"].unsqueeze(-1)).mean()
    rows = result.curves.get("epochs", [])
    metrics |= {
        "test_loss": float((answer - data.test["target"]).square().mean()),
        "right_expert": float(right),
        "last_valid_loss": rows[-1]["valid_loss"] if rows else start_loss,
        "permutation_agreed": bool(permutation.agreed) if permutation is not None else True,
        "found": float("nan"),
    }
    if permutation is not None:
        metrics["found"] = float((permutation.assignment()[0] == best).float().mean())
    return metrics


def _train(
    config: SearchConfig,
    model: MoE,
    train: Batches,
    valid: dict[str, Tensor],
    learning: list[nn.Parameter],
    permutation: Permutation | None,
    result: Result,
    progress: bool,
) -> None:
    def loss(model: MoE, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        answer, routing = predict(model, batch)
        return {"mse": (answer - batch["target"]).square().mean(), **routing.losses}

    def evaluate(model: MoE) -> dict[str, float]:
        if permutation is not None and not result.curves["search"][-1]["hardened"]:
            _log_search(result, permutation, int(permutation.step))
        return {"valid_loss": _mse(model, valid)}

    terms = loss(model, next(train.epoch(0)))
    weights = {"mse": 1.0, "permutation": config.permutation_weight}
    if permutation is not None and not result.curves.get("search"):
        _log_search(result, permutation, 0)
    fit(
        model,
        train,
        loss,
        optimizer=torch.optim.Adam(learning, config.learning_rate),
        coefficients={name: weights.get(name, 0.0) for name in terms},
        config=FitConfig(config.training_epochs, progress=progress),
        evaluate=evaluate,
        result=result,
        resume=True,
    )
