"""Which gate finds the experts that were planted? One gate, affine experts, data in which the answer is known.

    loss = MSE(sum_e g_e(x) (A_e x + b_e), y) + sum over the gate's loss terms of coefficient x term

The experts are as strong as the planted ones, so whatever is missing in the end is the gate's doing. Snapshots of the
gate are kept each epoch: figures and widgets replay them.

Taught in notebooks 01 (which gate finds the experts) and 02 (entropy weight, gamma and collapse on a 2-D input).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lab import datasets
from moe_lab.batches import Batches
from moe_lab.datasets.base import Dataset
from moe_lab.datasets.planted_tiles import planted_tiles
from moe_lab.experts.mlp import MLPExperts
from moe_lab.experts.moe import MoE
from moe_lab.gates import CometGate
from moe_lab.gates.base import Gate
from moe_lab.gates.build import build_gate, check_gate_name
from moe_lab.metrics.agreement import agreement, confusion
from moe_lab.metrics.routing import RoutingTally
from moe_lab.names import unknown_name
from moe_lab.results import Result, run_cached
from moe_lab.train import FitConfig, fit

EXPERIMENT = "planted_gates"
DATASETS = ("planted-clusters", "planted-tiles")
_PROFILES: dict[str, dict[str, Any]] = {
    "quick": {},
    "standard": {"epochs": 150},
    "paper": {"epochs": 500, "learning_rate": 5e-3},
}


@dataclass(frozen=True)
class PlantedGateConfig:
    """One run; the defaults are profile "quick" (2 to 4 seconds on one core).

    Attributes:
        gate: a name of `build_gate`; "+" is not for here (see the study of local search).
        dataset: "planted-clusters" (tree of clusters in 16 dimensions) or "planted-tiles" (8 tiles of a square).
        n_experts: E of the gate; 8 are planted.
        k: trees, selectors or experts chosen.
        gamma: width of the smooth-step (COMET, DSelect-k).
        coefficients: loss term of the gate -> weight; terms that are not named get 0 (only logged), except
            DSelect-k's ``code_mass``, 1 as in the paper. ``split_balance`` switches COMET's optional term on.
        learning_rate: of Adam, for gate and experts.
        epochs: passes over the 2,048 training rows (8 steps each).
        batch_size: rows per step.
        shift: added to what the gate sees (not to what the experts see). 0: inputs around 0; 2: inputs that are all
            positive on the tiles, as raw pixels are. The planted routing stays representable: the splits have biases.
        keep_gates: store the gate's parameters each epoch (curve ``gates``); off in sweeps.
        noise: top-k with learned Gaussian noise on its logits in training.
        seed: of weights, order of batches and hash table.
        data_seed: of the data; with 3 the functions of neighbouring tiles differ clearly.
    """

    gate: str = "comet"
    dataset: str = "planted-tiles"
    n_experts: int = 8
    k: int = 2
    gamma: float = 1.0
    coefficients: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 0.02
    epochs: int = 40
    batch_size: int = 256
    shift: float = 0.0
    keep_gates: bool = False
    noise: bool = False
    seed: int = 0
    data_seed: int = 3

    def __post_init__(self) -> None:
        check_gate_name(self.gate)
        if self.gate.endswith("+"):
            raise ValueError("PlantedGateConfig trains plain gates; local search has its own study")
        if self.dataset not in DATASETS:
            raise unknown_name("planted data set", self.dataset, DATASETS)

    @classmethod
    def profile(cls, name: str, **changes: Any) -> PlantedGateConfig:
        """quick: 320 steps; standard: 1,200; paper: 4,000 at a quarter of the learning rate (sizes are the same)."""
        if name not in _PROFILES:
            raise unknown_name("profile", name, _PROFILES)
        return replace(cls(**_PROFILES[name]), **changes)


def run(config: PlantedGateConfig, *, root: Path | str | None = None, recompute: bool = False) -> Result:
    """Train one gate with its experts, or read the finished Result back.

    Returns:
        A Result whose curve ``epochs`` has, from step 0 on: ``step``, ``valid_loss`` (MSE), ``experts_per_token``,
        ``within_k``, ``used`` (experts with at least a tenth of a fair share), ``saturation`` (share of hard paths),
        ``nmi``, ``purity``; curve ``confusion``: ``step``, ``table`` (see `agreement.confusion`). Metrics: ``test_mse``
        and the same statistics and confusion on the test rows, with the last weights of training, and the planted
        noise floor.
    """
    return run_cached(EXPERIMENT, config, partial(_train, config), root=root, recompute=recompute)


def load_data(config: PlantedGateConfig) -> Dataset:
    """The data of this run: 2,048 / 1,024 / 1,024 rows."""
    if config.dataset == "planted-tiles":
        return planted_tiles(config.data_seed)
    return datasets.load(config.dataset, seed=config.data_seed, n_train=2048, n_valid=1024, n_test=1024)


def build_model(config: PlantedGateConfig, n_features: int, n_keys: int) -> MoE:
    """Gate and affine experts, from ``config.seed``."""
    generator = torch.Generator().manual_seed(config.seed)
    if "split_balance" in config.coefficients:
        gate: Gate = CometGate(
            n_features, config.n_experts, config.k, config.gamma, split_balance=True, generator=generator
        )
    else:
        gate = build_gate(
            config.gate,
            in_features=n_features,
            n_experts=config.n_experts,
            k=config.k,
            gamma=config.gamma,
            n_keys=n_keys,
            noise=config.noise,
            seed=config.seed,
        )
    return MoE(gate, MLPExperts(config.n_experts, (n_features, 1), activate_last=False, generator=generator))


def _gate_input(model: MoE, batch: dict[str, Tensor]) -> Tensor:
    return batch["key" if model.gate.gate_input == "keys" else "seen"]


def _loss(model: MoE, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    y, routing = model(batch["features"], _gate_input(model, batch))
    return {"mse": (y[:, 0] - batch["target"]).square().mean(), **routing.losses}


def _all_coefficients(config: PlantedGateConfig, model: MoE, batch: dict[str, Tensor]) -> dict[str, float]:
    terms = model.train().gate(_gate_input(model, batch)).losses
    defaults = dict.fromkeys(terms, 0.0) | ({"code_mass": 1.0} if "code_mass" in terms else {})
    return {"mse": 1.0, **defaults, **config.coefficients}


@torch.no_grad()
def _evaluate(config: PlantedGateConfig, model: MoE, rows: dict[str, Tensor]) -> dict[str, Any]:
    y, routing = model.eval()(rows["features"], _gate_input(model, rows))
    tally = RoutingTally(config.k)
    tally.add(routing)
    summary = tally.summary()
    assigned = routing.weights.argmax(-1).numpy()
    return {
        "mse": float((y[:, 0] - rows["target"]).square().mean()),
        "experts_per_token": summary["experts_mean"],
        "within_k": summary["within_k"],
        "used": summary["used"],
        "saturation": summary.get("saturation", float("nan")),
        **agreement(rows["expert"].numpy(), assigned),
        "confusion": confusion(rows["expert"].numpy(), assigned, config.n_experts),
    }


def _train(config: PlantedGateConfig, result: Result) -> dict[str, Any]:
    data = load_data(config)
    sizes = list(data.sizes.values())
    # A hash gate needs keys. These rows have no user or token, so a key is a row's number: it knows nothing of x.
    keys = torch.arange(sum(sizes)).split(sizes)
    train, valid, test = (
        {**rows, "key": key, "seen": rows["features"] + config.shift}
        for rows, key in zip(data.splits.values(), keys, strict=True)
    )
    model = build_model(config, data.info["n_features"], sum(sizes))
    batches = Batches(train, config.batch_size, shuffle=True, seed=config.seed)
    result.curves = {}  # a run of seconds starts anew rather than going on from a checkpoint
    epoch = 0

    def evaluate(model: MoE) -> dict[str, float]:
        nonlocal epoch
        step = epoch * len(batches)
        row = _evaluate(config, model, valid)
        row["valid_loss"] = row.pop("mse")
        result.log("confusion", step=step, table=row.pop("confusion"))
        result.log("epochs", step=step, **row)
        if config.keep_gates:
            state = {name: value.tolist() for name, value in model.gate.state_dict().items()}
            result.log("gates", step=step, experts_per_token=row["experts_per_token"], gate=state)
        last.clear()
        last.update({name: value.clone() for name, value in model.state_dict().items()})
        epoch += 1
        return row

    last: dict[str, Tensor] = {}
    evaluate(model)
    fit(
        model,
        batches,
        _loss,
        optimizer=torch.optim.Adam(model.parameters(), lr=config.learning_rate),
        coefficients=_all_coefficients(config, model, next(batches.epoch(0))),
        config=FitConfig(epochs=config.epochs, progress=False),
        evaluate=evaluate,
    )
    model.load_state_dict(last)  # what the training made of the gate is the question here, not the best model
    scores = _evaluate(config, model, test)
    return {f"test_{name}" if name == "mse" else name: value for name, value in scores.items()} | {
        "noise_floor": data.info["noise"] ** 2
    }
