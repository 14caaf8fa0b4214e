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
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lab.batches import Batches, StepBatches
from moe_lab.datasets import Dataset, load
from moe_lab.datasets.masking import IGNORE, masked
from moe_lab.datasets.tokens import MASK, PAD
from moe_lab.experiments.mixture_config import MixtureConfig
from moe_lab.experiments.mixture_training import (
    GateWatch,
    Probes,
    evolve,
    fit_config,
    gate_factory,
    make_optimizer,
    precision,
    routing_terms,
    token_counts,
)
from moe_lab.experts.evolve import Evolution
from moe_lab.models.language import Classifier, LanguageModel
from moe_lab.results import Result, run_cached
from moe_lab.runtime import pick_device
from moe_lab.train import FitConfig, LearningRate, evaluating, fit

EXPERIMENT = "evomoe_masked"

_GUESSED, _GUESSES = 24, 5  # validation sentences, tokens per hidden place

_PROFILES: dict[str, dict[str, Any]] = {
    # Right or wrong sentences of four little languages: seconds per gate.
    "quick": {},
    # SST-2 from scratch: about a minute and a half per gate on a GPU.
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
        return cls._from_profile(_PROFILES, name, changes)


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


@lru_cache(maxsize=1)
def _load(name: str, seed: int, options: tuple[tuple[str, Any], ...]) -> Dataset:
    return load(name, seed=seed, **dict(options))


def load_sentences(config: MaskedConfig) -> Dataset:
    """The sentences; runs of one process share them. ValueError for a data set of another kind."""
    data = _load(config.dataset, config.data_seed, tuple(sorted(config.data_options.items())))
    if data.kind != "sentences":
        raise ValueError(f"fine-tuning needs a data set of kind 'sentences'; {config.dataset!r} has {data.kind!r}")
    return data


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


class _MaskedRecorder:
    def __init__(self, config: MaskedConfig, data: Dataset, result: Result, device: torch.device):
        self.config, self.result, self.watch = config, result, GateWatch(config, result)
        inputs, targets = hidden_valid(config, data)
        self.valid = Batches({"inputs": inputs, "targets": targets}, 256, device=device, keep_on_device=True)

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        step = min(self.config.evaluate_every * (len(self.result.curves.get("pretraining", [])) + 1), self.config.steps)
        return self.look(model, step)

    def look(self, model: LanguageModel, step: int) -> dict[str, float]:
        self.watch.start()
        total = right = count = 0
        with Probes(model) as probes:
            for batch in self.valid.epoch(0):
                logits, hidden, routings = _predict_hidden(self.config, model, batch["inputs"], batch["targets"])
                total += float(cross_entropy(logits, hidden, reduction="sum"))
                right += int((logits.argmax(-1) == hidden).sum())
                count += len(hidden)
                self.watch.add(routings)
        scores = {"valid_loss": total / count, "valid_accuracy": right / count}
        return scores | self.watch.write(model, probes.in_order(), step=step)


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


def _attach_evolution(model: Classifier, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Experts that have not been spawned yet (without pre-training) are in fine-tuning; their state has to follow."""
    for module in model.modules():
        if isinstance(module, Evolution):
            module.attach(optimizer)
    return optimizer


def _train_and_test(config: MaskedConfig, progress: bool, result: Result) -> dict[str, Any]:
    device = pick_device(config.device)
    data = load_sentences(config)
    n_tokens = data.info["n_tokens"]
    options = {"shuffle": True, "seed": config.seed, "device": device, "keep_on_device": True}
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
        recorder = _MaskedRecorder(config, data, result, device)
        if not result.curves.get("pretraining") and not list(result.path.parent.glob(f"{result.path.stem}*.ckpt")):
            result.curves.clear()  # of a process that was killed before its first checkpoint
            with evaluating(encoder):
                recorder.look(encoder, 0)
        sentences = StepBatches(
            {"tokens": data.train["tokens"]}, config.batch_size, steps=config.evaluate_every, **options
        )
        history = fit(
            encoder,
            sentences,
            partial(masked_loss, config, n_tokens),
            optimizer=make_optimizer(encoder, config),
            coefficients=config.coefficients(hidden=1.0),
            evaluate=recorder,
            config=fit_config(config, progress=progress),
            result=result,
            curve="pretraining",
            resume=True,
        )
        best = history.rows[history.best_epoch - 1]
        trained = [row.get("train_experts", 1.0) for row in history.rows]
        metrics |= {"masked_loss": best["valid_loss"], "masked_accuracy": best["valid_accuracy"]}
        metrics["experts_per_token"] = sum(trained) / len(trained)
        with evaluating(encoder):
            result.curves["guesses"] = _guesses(config, encoder, data, device)
    columns = {name: {key: split[key] for key in ("tokens", "label")} for name, split in data.splits.items()}
    train = StepBatches(columns["train"], config.batch_size, steps=config.tune_every, **options)
    valid = Batches(columns["valid"], 256, device=device, keep_on_device=True)
    history = fit(
        model,
        train,
        partial(label_loss, config),
        optimizer=_attach_evolution(
            model,
            torch.optim.AdamW(
                model.parameters(), lr=config.tune_learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
            ),
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
    result.curves.pop("main_expert", None)
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
