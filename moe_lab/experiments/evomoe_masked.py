"""Masked language model, then fine-tuning on sentences (EvoMoE's RoBERTa experiment in small: GLUE by way of SST-2).

    pre-training    loss = mean over hidden tokens of CE(token) + regularisers of the gates   (no labels)
    fine-tuning     loss = CE(label) + the same regularisers; everything is trained, the head is new

Both stages see the same sentences, the first without labels: a corpus from the same source, so that one vocabulary
serves both, and no download more. The gates go on where pre-training left them: one that has become hard stays hard,
StableMoE's stays frozen. A hash gate looks at the *input* id: all hidden tokens look like <mask> and go to one expert.

15 % of the tokens are hidden: 80 % of them by <mask>, 10 % by a random token, 10 % not at all; anew in each step, the
same in each validation. The test sentences are looked at once.

Taught in notebook 11.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lab.batches import Batches
from moe_lab.datasets import Dataset
from moe_lab.datasets.masking import IGNORE, masked
from moe_lab.datasets.tokens import MASK, PAD
from moe_lab.experiments.mixture_config import MixtureConfig
from moe_lab.experiments.mixture_training import (
    GateWatch,
    evolve,
    followed,
    gate_factory,
    mean_experts,
    precision,
    routing_terms,
    step_batches,
    token_counts,
    train_mixture,
)
from moe_lab.experiments.settings import load_of_kind, profile_settings
from moe_lab.models.language import Classifier, LanguageModel
from moe_lab.results import Result, run_cached
from moe_lab.runtime import pick_device
from moe_lab.train import FitConfig, LearningRate, evaluating, fit

EXPERIMENT = "evomoe_masked"

_GUESSED, _GUESSES = 24, 5  # validation sentences, tokens per hidden place

_PROFILES: dict[str, dict[str, Any]] = {
    # Right or wrong sentences of four little languages: seconds per gate.
    "quick": {},
    # SST-2 from scratch: one to three minutes per gate where seven runs share a GPU.
    "standard": {
        "dataset": "sst2",
        "data_options": {"length": 40},
        "n_experts": 16,
        "layers": 4,
        "moe_every": 2,
        "width": 128,
        "heads": 4,
        "dropout": 0.1,
        "steps": 800,
        "batch_size": 512,
        "evaluate_every": 80,
        "learning_rate": 2e-3,
        "warmup": 0.04,
        "tune_steps": 300,
        "tune_every": 50,
        "tune_learning_rate": 5e-4,
        "watched_tokens": 8,
        "device": "auto",
    },
    "paper": {
        "dataset": "sst2",
        "data_options": {"length": 64},
        "n_experts": 16,
        "layers": 8,
        "moe_every": 2,
        "width": 512,
        "heads": 8,
        "dropout": 0.1,
        "steps": 20000,
        "batch_size": 256,
        "evaluate_every": 1000,
        "learning_rate": 5e-4,
        "warmup": 0.04,
        "tune_steps": 5000,
        "tune_every": 250,
        "tune_learning_rate": 1e-4,
        "watched_tokens": 8,
        "precision": "bfloat16",
        "device": "auto",
    },
}


@dataclass(frozen=True)
class MaskedConfig(MixtureConfig):
    """One masked language model and its fine-tuning; fields as in `MixtureConfig`, defaults of profile "quick".

    Attributes:
        mask_share: share of tokens that are hidden.
        pretrain: False: skip the first stage: what does it bring?
        tune_steps, tune_every, tune_learning_rate: fine-tuning: steps, steps between evaluations, highest rate.
    """

    dataset: str = "planted-judgements"
    data_options: Mapping[str, Any] = field(default_factory=lambda: {"length": 34})  # the longest has 34 tokens
    layers: int = 1
    moe_every: int = 1
    steps: int = 300
    batch_size: int = 32
    evaluate_every: int = 100
    warmup: float = 0.1
    watched_tokens: int = 400  # enough of them are hidden to see where hidden ones go
    mask_share: float = 0.15
    pretrain: bool = True
    tune_steps: int = 400
    tune_every: int = 100
    tune_learning_rate: float = 1.5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_share <= 1:
            raise ValueError(f"mask_share must be in (0, 1], got {self.mask_share}")
        if self.tune_steps < 1 or self.tune_every < 1 or not self.tune_learning_rate > 0:
            raise ValueError("tune_steps, tune_every and tune_learning_rate must be positive")

    @classmethod
    def profile(cls, name: str, **changes: Any) -> MaskedConfig:
        """The settings of a profile, some of them changed.

        Raises:
            ValueError: unknown profile or field, with the nearest valid name.
        """
        return cls(**profile_settings(cls, _PROFILES, name, changes))


def run(
    config: MaskedConfig, *, root: Path | str | None = None, recompute: bool = False, progress: bool = True
) -> Result:
    """Pre-train, fine-tune and test, or read the finished Result back.

    Returns:
        A Result with the curves ``pretraining`` and ``epochs`` (fine-tuning), and ``routing``, ``distances``,
        ``watched``, ``guesses`` of pre-training (of the first validation sentences: ``pieces`` with the hidden ones as
        the model saw them, and for each hidden place ``at``, ``truth`` and ``top``, the most probable tokens). Metrics:
        test_accuracy, test_loss, valid_accuracy, masked_loss (nats per hidden token), masked_accuracy,
        constant_accuracy, parameters, experts_per_token, seconds; accuracy_by_domain where the data have domains.
    """
    return run_cached(EXPERIMENT, config, partial(_train_and_test, config, progress), root=root, recompute=recompute)


def load_sentences(config: MaskedConfig) -> Dataset:
    """The sentences. ValueError for a data set of another kind."""
    return load_of_kind(config, "sentences", "fine-tuning")


def _predict_hidden(
    config: MaskedConfig, model: LanguageModel, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, list]:
    """Logits (N, V) and targets (N,) of the hidden tokens, Routings. The output layer runs on hidden tokens only."""
    with precision(config, inputs.device):
        hidden, routings = model.body(model.embedding(inputs), inputs, inputs != PAD)
        where = targets != IGNORE
        logits = model.embedding.logits(hidden[where])
    return logits.float(), targets[where], routings


def masked_loss(
    config: MaskedConfig, n_tokens: int, model: LanguageModel, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Terms of pre-training; hides other tokens each time."""
    inputs, targets = masked(
        batch["tokens"], n_tokens=n_tokens, share=config.mask_share, generator=model.mask_generator
    )
    logits, hidden, routings = _predict_hidden(config, model, inputs, targets)
    return {"hidden": cross_entropy(logits, hidden)} | routing_terms(config, routings)


def label_loss(config: MaskedConfig, model: Classifier, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Terms of fine-tuning."""
    with precision(config, batch["tokens"].device):
        logits, routings = model(batch["tokens"], batch["tokens"] != PAD)
    return {"label": cross_entropy(logits.float(), batch["label"])} | routing_terms(config, routings)


def hidden_valid(config: MaskedConfig, data: Dataset) -> tuple[Tensor, Tensor]:
    """Inputs and targets (N, S) of the validation sentences, the same at every evaluation and for all gates."""
    return masked(
        data.valid["tokens"][: config.valid_rows],
        n_tokens=data.info["n_tokens"],
        share=config.mask_share,
        generator=torch.Generator().manual_seed(config.data_seed),
    )


def _guesses(config: MaskedConfig, model: LanguageModel, data: Dataset, device: torch.device) -> list[dict[str, Any]]:
    """The rows of the curve "guesses"."""
    inputs, targets = (rows[:_GUESSED].to(device) for rows in hidden_valid(config, data))
    logits, truth, _ = _predict_hidden(config, model, inputs, targets)
    probability, token = logits.softmax(-1).topk(min(_GUESSES, logits.shape[1]))
    decode = data.info["tokenizer"].decode
    rows = [
        {"pieces": ["▢" if id_ == MASK else decode([id_]) for id_ in row if id_ != PAD], "hidden": []}
        for row in inputs.tolist()
    ]
    places = (targets != IGNORE).nonzero().tolist()
    found = (truth.tolist(), token.tolist(), probability.double().round(decimals=4).tolist())
    for (row, at), right, tokens, values in zip(places, *found, strict=True):
        top = [[decode([id_]), value] for id_, value in zip(tokens, values, strict=True)]
        rows[row]["hidden"].append({"at": at, "truth": decode([right]), "top": top})
    return rows


def _measure(config: MaskedConfig, valid: Batches, model: LanguageModel, watch: GateWatch) -> dict[str, float]:
    """Loss and accuracy on hidden tokens."""
    total = right = count = 0
    for batch in valid.epoch(0):
        logits, hidden, routings = _predict_hidden(config, model, batch["inputs"], batch["targets"])
        total += float(cross_entropy(logits, hidden, reduction="sum"))
        right += int((logits.argmax(-1) == hidden).sum())
        count += len(hidden)
        watch.add(routings)
    return {"valid_loss": total / count, "valid_accuracy": right / count}


def _answers(config: MaskedConfig, model: Classifier, batches: Batches) -> tuple[float, Tensor]:
    """Mean loss of a split, and which of its rows (N,) are right."""
    total, right = 0.0, []
    for batch in batches.epoch(0):
        with precision(config, batch["tokens"].device):
            logits, _ = model(batch["tokens"], batch["tokens"] != PAD)
        total += float(cross_entropy(logits.float(), batch["label"], reduction="sum"))
        right.append((logits.argmax(-1) == batch["label"]).cpu())
    return total / batches.n_rows, torch.cat(right)


def classify(config: MaskedConfig, model: Classifier, batches: Batches) -> dict[str, float]:
    """Loss and accuracy of a split."""
    loss, right = _answers(config, model, batches)
    return {"loss": loss, "accuracy": int(right.sum()) / len(right)}


def _train_and_test(config: MaskedConfig, progress: bool, result: Result) -> dict[str, Any]:
    device = pick_device(config.device)
    data = load_sentences(config)
    n_tokens = data.info["n_tokens"]
    encoder = LanguageModel(
        config.size(n_tokens, data.info["length"]),
        causal=False,
        make_gate=gate_factory(config, n_tokens, token_counts(data.train["tokens"], n_tokens)),
        generator=torch.Generator().manual_seed(config.seed),
    )
    encoder.mask_generator = torch.Generator().manual_seed(config.seed)  # in the model: checkpoints then hold its state
    evolve(encoder, config)
    model = Classifier(encoder, data.info["n_classes"]).to(device)
    metrics: dict[str, Any] = {}
    if config.pretrain:
        inputs, targets = hidden_valid(config, data)
        valid = Batches({"inputs": inputs, "targets": targets}, 256, device=device, keep_on_device=True)
        history = train_mixture(
            config,
            encoder,
            {"tokens": data.train["tokens"]},
            partial(masked_loss, config, n_tokens),
            partial(_measure, config, valid),
            result,
            task="hidden",
            curve="pretraining",
            progress=progress,
        )
        best = history.rows[history.best_epoch - 1]
        metrics |= {"masked_loss": best["valid_loss"], "masked_accuracy": best["valid_accuracy"]}
        metrics["experts_per_token"] = mean_experts(history)
        with evaluating(encoder):
            result.curves["guesses"] = _guesses(config, encoder, data, device)
    columns = {name: {key: split[key] for key in ("tokens", "label")} for name, split in data.splits.items()}
    train = step_batches(config, columns["train"], config.tune_every, device)
    valid = Batches(columns["valid"], 256, device=device, keep_on_device=True)
    history = fit(
        model,
        train,
        partial(label_loss, config),
        optimizer=followed(  # without pre-training the experts are spawned here
            torch.optim.AdamW(
                model.parameters(), lr=config.tune_learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
            ),
            model,
        ),
        coefficients=config.coefficients(label=1.0),
        evaluate=lambda model: {f"valid_{name}": value for name, value in classify(config, model, valid).items()},
        config=FitConfig(
            epochs=None,
            max_steps=config.tune_steps,
            clip_norm=config.clip_norm,
            learning_rate=LearningRate(max(1, config.tune_steps // 20), config.tune_steps, floor=0.0),
            progress=progress,
        ),
        result=result,
        resume=True,
    )
    with evaluating(model):
        test_loss, right = _answers(config, model, Batches(columns["test"], 256, device=device))
    if "domain" in data.test:
        metrics["accuracy_by_domain"] = {
            name: float(right[data.test["domain"] == index].double().mean())
            for index, name in enumerate(data.info["domains"])
        }
    label = data.test["label"]
    most = torch.bincount(data.train["label"]).argmax()
    rows = [*result.curves.get("pretraining", []), *history.rows]
    return metrics | {
        "test_loss": test_loss,
        "test_accuracy": int(right.sum()) / len(right),
        "valid_accuracy": history.rows[history.best_epoch - 1]["valid_accuracy"],
        "constant_accuracy": float((label == most).double().mean()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": sum(row["seconds"] for row in rows),
    }
