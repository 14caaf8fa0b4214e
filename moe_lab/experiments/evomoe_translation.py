"""Translation with every gate (EvoMoE's machine translation in small: Multi30k English to German).

    loss = mean over target tokens of CE(token), labels smoothed by 0.1, + regularisers of the gates of both sides

An encoder-decoder with one shared vocabulary and mixtures on both sides. Translations are found by beam search and
scored by sacreBLEU, whose signature is in the Result. The validation loss (not smoothed) chooses the weights; the test
sentences are translated once.

Where we differ: 29,000 sentence pairs in place of WMT's millions; exact signatures; no capacity for any gate except
"switch_capacity".

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
from moe_lab.datasets.tokens import PAD
from moe_lab.experiments.mixture_config import MixtureConfig
from moe_lab.experiments.mixture_training import (
    GateWatch,
    evolve,
    gate_factory,
    mean_experts,
    precision,
    routing_terms,
    token_counts,
    train_mixture,
)
from moe_lab.experiments.settings import load_of_kind, profile_settings
from moe_lab.metrics.translation import corpus_bleu, detokenised
from moe_lab.models.generate import beam_search
from moe_lab.models.language import Translator
from moe_lab.results import Result, run_cached
from moe_lab.runtime import pick_device
from moe_lab.train import evaluating

EXPERIMENT = "evomoe_translation"

_MULTI30K = {
    "dataset": "multi30k",
    "data_options": {},
    "n_experts": 4,
    "layers": 3,
    "width": 256,
    "heads": 4,
    "moe_every": 1,  # six mixtures, as many as the paper's 6 + 6 layers with one in every second
    "dropout": 0.3,
    "steps": 800,
    "batch_size": 512,
    "evaluate_every": 100,
    "learning_rate": 1.5e-3,
    "warmup": 0.25,
    "tau_end": 0.5,  # temperatures of the authors' translation scripts
    "valid_rows": None,
    "translated": None,
    "kept_translations": 20,
    "device": "auto",
}
_PROFILES: dict[str, dict[str, Any]] = {
    "quick": {},
    "standard": _MULTI30K,
    "paper": {**_MULTI30K, "steps": 20000, "evaluate_every": 1000, "learning_rate": 5e-4, "warmup": 0.2},
}


@dataclass(frozen=True)
class TranslationConfig(MixtureConfig):
    """One translator; fields as in `MixtureConfig`, defaults of profile "quick".

    Attributes:
        label_smoothing: share of probability spread over the vocabulary in training.
        beam: hypotheses kept by the search.
        length_penalty: exponent of the length that scores are divided by.
        translated: test sentences that are translated; None: all.
        kept_translations: how many the Result keeps as text.
    """

    dataset: str = "planted-pairs"
    data_options: Mapping[str, Any] = field(default_factory=lambda: {"length": 34})  # the longest has 33 tokens
    n_experts: int = 4
    layers: int = 1
    moe_every: int = 1
    steps: int = 350
    batch_size: int = 16
    evaluate_every: int = 70
    learning_rate: float = 5e-3
    warmup: float = 0.25
    tau_end: float = 0.5
    valid_rows: int | None = 100
    label_smoothing: float = 0.1
    beam: int = 5
    length_penalty: float = 1.0
    translated: int | None = 200
    kept_translations: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.beam < 1:
            raise ValueError(f"beam must be at least 1, got {self.beam}")
        if self.length_penalty < 0 or self.kept_translations < 0:
            raise ValueError(
                f"length_penalty and kept_translations must not be negative, got {self.length_penalty} and "
                f"{self.kept_translations}"
            )
        if self.translated is not None and self.translated < 1:
            raise ValueError(f"translated must be at least 1, or None for all; got {self.translated}")

    @classmethod
    def profile(cls, name: str, **changes: Any) -> TranslationConfig:
        """The settings of a profile, some of them changed.

        Raises:
            ValueError: unknown profile or field, with the nearest valid name.
        """
        return cls(**profile_settings(cls, _PROFILES, name, changes))


def run(
    config: TranslationConfig, *, root: Path | str | None = None, recompute: bool = False, progress: bool = True
) -> Result:
    """Train a translator and score it, or read the finished Result back.

    Returns:
        A Result with the curves ``epochs``, ``routing``, ``distances``, ``watched``, and ``translations`` (source,
        reference, hypothesis). Metrics: bleu and bleu_signature, test_loss (nats per token), test_accuracy (of the next
        token, the ones before it given), exact (share of sentences translated word for word), parameters,
        experts_per_token, seconds.
    """
    return run_cached(EXPERIMENT, config, partial(_train_and_test, config, progress), root=root, recompute=recompute)


def load_pairs(config: TranslationConfig) -> Dataset:
    """The sentence pairs. ValueError for a data set of another kind."""
    return load_of_kind(config, "pairs", "translation")


def _forward(config: TranslationConfig, model: Translator, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list]:
    """Logits (N, V) and targets (N,) of the real target tokens, Routings."""
    source, target = batch["source"], batch["target"]
    inputs, targets = target[:, :-1], target[:, 1:]
    with precision(config, source.device):
        logits, routings = model(source, source != PAD, inputs, inputs != PAD)
    real = targets != PAD
    return logits[real].float(), targets[real], routings


def translation_loss(config: TranslationConfig, model: Translator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The unweighted terms."""
    logits, targets, routings = _forward(config, model, batch)
    token = cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
    return {"token": token} | routing_terms(config, routings)


def score_tokens(
    config: TranslationConfig, model: Translator, batches: Batches, watch: GateWatch | None = None
) -> dict[str, float]:
    """Loss and accuracy of the next token."""
    total = right = count = 0
    for batch in batches.epoch(0):
        logits, targets, routings = _forward(config, model, batch)
        total += float(cross_entropy(logits, targets, reduction="sum"))
        right += int((logits.argmax(-1) == targets).sum())
        count += len(targets)
        if watch is not None:
            watch.add(routings)
    return {"loss": total / count, "accuracy": right / count}


def _measure(config: TranslationConfig, valid: Batches, model: Translator, watch: GateWatch) -> dict[str, float]:
    return {f"valid_{name}": value for name, value in score_tokens(config, model, valid, watch).items()}


def _train_and_test(config: TranslationConfig, progress: bool, result: Result) -> dict[str, Any]:
    device = pick_device(config.device)
    data = load_pairs(config)
    n_tokens, length = data.info["n_tokens"], data.info["length"]
    columns = {name: {key: split[key] for key in ("source", "target")} for name, split in data.splits.items()}
    valid = Batches(
        {key: values[: config.valid_rows] for key, values in columns["valid"].items()},
        128,
        device=device,
        keep_on_device=True,
    )
    counts = token_counts(torch.cat((data.train["source"], data.train["target"])), n_tokens)
    model = Translator(
        config.size(n_tokens, length),
        make_gate=gate_factory(config, n_tokens, counts),
        generator=torch.Generator().manual_seed(config.seed),
    )
    evolve(model, config)
    model.to(device)
    history = train_mixture(
        config,
        model,
        columns["train"],
        partial(translation_loss, config),
        partial(_measure, config, valid),
        result,
        task="token",
        schedule="inverse_sqrt",
        progress=progress,
    )
    test = {key: values[: config.translated] for key, values in columns["test"].items()}
    with evaluating(model):
        found = score_tokens(config, model, Batches(test, 128, device=device))
        hypotheses = translate(config, model, test["source"], data)
    references = data.info["references"]["test"][: config.translated]
    sources = data.info["sources"]["test"][: config.translated]
    bleu, signature = corpus_bleu(hypotheses, references)
    result.curves["translations"] = [
        {"source": source, "reference": reference, "hypothesis": hypothesis}
        for source, reference, hypothesis in list(zip(sources, references, hypotheses, strict=True))[
            : config.kept_translations
        ]
    ]
    return {
        "bleu": bleu,
        "bleu_signature": signature,
        "test_loss": found["loss"],
        "test_accuracy": found["accuracy"],
        "exact": sum(h == r for h, r in zip(hypotheses, references, strict=True)) / len(references),
        "best_loss": history.best_value,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "experts_per_token": mean_experts(history),
        "seconds": sum(row["seconds"] for row in history.rows),
    }


def translate(config: TranslationConfig, model: Translator, source: Tensor, data: Dataset) -> list[str]:
    """Translations of token ids (N, M) as text, 64 sentences at a time."""
    device = next(model.parameters()).device
    found: list[str] = []
    for some in source.split(64):
        with precision(config, device):
            rows = beam_search(
                model,
                some.to(device),
                beam=config.beam,
                max_length=data.info["length"] - 1,
                length_penalty=config.length_penalty,
            )
        found += detokenised(rows.cpu(), data.info["tokenizer"])
    return found
