"""GPT language models with every gate (EvoMoE, arXiv 2112.14397: GPT with mixtures, against Switch and others).

    loss = mean over tokens of CE(next token) + sum over mixtures of coefficient x regulariser

One small pre-norm GPT, a mixture in every second block. The paper's question is how many steps, and how many FLOPs, a
gate needs to reach Switch's final validation loss; so each run writes down loss, experts per token and seconds as it
goes. The test text is looked at once, at the end, with the weights of the best validation loss.

Two validation losses for gates that go from dense to sparse: ``valid_loss`` as the model will be used (top-1, no
noise), ``valid_matched`` with the rule of the current phase. Expert choice and capacity in a batch look at later
tokens: their losses are not those of a model that can generate text (``looks_ahead``).

Where we differ from the authors' runs (24 layers, OpenWebText, 8 GPUs): everything is small; Switch comes with and
without capacity, because much of the gap between gates is dropping.

Taught in notebook 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_lab.batches import Batches
from moe_lab.datasets import Dataset
from moe_lab.experiments.mixture_config import MixtureConfig
from moe_lab.experiments.mixture_training import (
    GateWatch,
    evolve,
    gate_factory,
    inference,
    mean_experts,
    precision,
    routing_terms,
    rules_differ,
    token_counts,
    train_mixture,
)
from moe_lab.experiments.settings import load_of_kind, profile_settings
from moe_lab.metrics.flops import language_flops, training_flops
from moe_lab.models.generate import sample
from moe_lab.models.language import LanguageModel
from moe_lab.results import Result, run_cached
from moe_lab.runtime import pick_device
from moe_lab.train import evaluating

EXPERIMENT = "evomoe_language"
LOOKS_AHEAD = ("expert_choice",)
"""Gates for which a token's expert depends on later tokens, also in evaluation."""

ABLATIONS: tuple[dict[str, Any], ...] = (
    # noise and combine weights: the authors' two arms, and without noise
    {"gate": "dts", "noise": "never"},
    {"gate": "dts", "noise": "always"},
    {"gate": "dts", "noise": "always", "weights_from": "gumbel"},
    # threshold and temperature
    {"gate": "dts", "threshold": 0.02},
    {"gate": "dts", "threshold": 0.05},
    {"gate": "dts", "tau_end": 0.1},
    {"gate": "dts", "tau_end": 1.0},
    {"gate": "dts", "soft_share": 0.15, "hard_share": 0.2},
    # the shared phase and the spawn
    {"gate": "evomoe", "shared_share": 0.04},
    {"gate": "evomoe", "shared_share": 0.3},
    {"gate": "evomoe", "mask_ratio": 0.0},
    {"gate": "evomoe", "mask_ratio": 0.5},
    {"gate": "evomoe", "optimizer_state": "copy"},
    # number of experts
    *({"gate": gate, "n_experts": n} for n in (4, 8, 32) for gate in ("switch", "dts", "evomoe")),
)
"""What is changed, one thing at a time, beside the comparison of gates."""

_SHAKESPEARE = {
    "dataset": "tiny-shakespeare",
    "data_options": {"length": 64},
    "n_experts": 16,
    "layers": 4,
    "width": 64,
    "heads": 4,
    "steps": 1500,
    "evaluate_every": 75,
    "learning_rate": 2e-3,
    "warmup": 1 / 30,
    "valid_rows": 384,
}
_PROFILES: dict[str, dict[str, Any]] = {
    # Generated text of four little languages: seconds per gate.
    "quick": {"data_options": {"n_characters": 120_000, "length": 48}},
    # Characters of Shakespeare, 1.2 million parameters of which 0.2 are active: a minute or two per gate on one core.
    "standard": _SHAKESPEARE,
    # As near to the paper as minutes of one GPU allow: byte pairs of Python code, some two passes; 153 million
    # parameters of which 27 are active.
    "paper": {
        "dataset": "python-code",
        "data_options": {"length": 256, "tokenizer": "bpe", "n_tokens": 4096},
        "n_experts": 16,
        "layers": 8,
        "width": 512,
        "heads": 8,
        "steps": 1500,
        "batch_size": 64,
        "evaluate_every": 75,
        "learning_rate": 6e-4,
        "warmup": 1 / 15,
        "valid_rows": 512,
        "precision": "bfloat16",
        "device": "auto",
    },
}


@dataclass(frozen=True)
class LanguageConfig(MixtureConfig):
    """One language model; fields as in `MixtureConfig`, defaults of profile "quick".

    Attributes:
        sample_tokens: tokens of generated text that the Result keeps.
    """

    dataset: str = "planted-text"
    sample_tokens: int = 200

    @classmethod
    def profile(cls, name: str, **changes: Any) -> LanguageConfig:
        """The settings of a profile, some of them changed.

        Raises:
            ValueError: unknown profile or field, with the nearest valid name.
        """
        return cls(**profile_settings(cls, _PROFILES, name, changes))


def run(
    config: LanguageConfig, *, root: Path | str | None = None, recompute: bool = False, progress: bool = True
) -> Result:
    """Train and test one language model, or read the finished Result back.

    Returns:
        A Result with the curves ``epochs`` (one row per evaluation, made by `fit`: training terms, among them
        ``train_experts``, mean experts per token since the last row; ``valid_loss``, ``valid_matched``), ``routing``,
        ``distances``, ``watched`` (see `GateWatch`; step 0 is before training). Metrics: see `_train_and_test`.

    Raises:
        DatasetNotFound: the real text is not in the cache; the message says how to fetch it.
    """
    return run_cached(EXPERIMENT, config, partial(_train_and_test, config, progress), root=root, recompute=recompute)


def load_text(config: LanguageConfig) -> Dataset:
    """The corpus. ValueError for a data set that is no running text."""
    return load_of_kind(config, "text", "a language model")


def build_model(config: LanguageConfig, data: Dataset) -> LanguageModel:
    """The untrained model. Draws from the global generator: seed it first."""
    n_tokens = data.info["n_tokens"]
    counts = token_counts(data.train["tokens"], n_tokens)
    model = LanguageModel(
        config.size(n_tokens, data.info["length"]),
        causal=True,
        make_gate=gate_factory(config, n_tokens, counts),
        generator=torch.Generator().manual_seed(config.seed),
    )
    evolve(model, config)
    return model


def next_token_loss(config: LanguageConfig, model: LanguageModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The unweighted terms: ``token``, nats per token, and what the gates ask for."""
    tokens = batch["tokens"]
    with precision(config, tokens.device):
        logits, routings = model(tokens[:, :-1])
    token = cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    return {"token": token} | routing_terms(config, routings)


def mean_loss(config: LanguageConfig, model: LanguageModel, batches: Batches, watch: GateWatch | None = None) -> float:
    """Nats per token of a split; Routings are handed to ``watch``."""
    total, count = 0.0, 0
    for batch in batches.epoch(0):
        tokens = batch["tokens"]
        with precision(config, tokens.device):
            logits, routings = model(tokens[:, :-1])
        total += float(cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum"))
        count += tokens[:, 1:].numel()
        if watch is not None:
            watch.add(routings)
    return total / count


def _measure(config: LanguageConfig, valid: Batches, model: LanguageModel, watch: GateWatch) -> dict[str, float]:
    """``valid_loss`` (top-1) and, for gates that go sparse, ``valid_matched``, which only differs in the soft phase."""
    goes_sparse = config.gate in ("dts", "evomoe")
    if not rules_differ(model):
        loss = mean_loss(config, model, valid, watch)
        return {"valid_loss": loss, "valid_matched": loss} if goes_sparse else {"valid_loss": loss}
    losses = {"valid_loss": mean_loss(config, model, valid)}
    with inference(model, "matched"):
        return losses | {"valid_matched": mean_loss(config, model, valid, watch)}


def _train_and_test(config: LanguageConfig, progress: bool, result: Result) -> dict[str, Any]:
    """Metrics: test_loss (nats per token), best_loss (validation), final_loss (at the last evaluation), steps, seconds
    of training, training_flops, parameters, experts_per_token (mean over training), ``sample`` (generated text) and
    ``prompt``, constant_loss (unigram frequencies: a model that does not look), looks_ahead."""
    device = pick_device(config.device)
    data = load_text(config)
    valid = Batches({"tokens": data.valid["tokens"][: config.valid_rows]}, 64, device=device, keep_on_device=True)
    model = build_model(config, data).to(device)
    history = train_mixture(
        config,
        model,
        {"tokens": data.train["tokens"]},
        partial(next_token_loss, config),
        partial(_measure, config, valid),
        result,
        task="token",
        progress=progress,
    )
    test = Batches({"tokens": data.test["tokens"]}, 64, device=device)
    with evaluating(model):
        test_loss = mean_loss(config, model, test)
    curve = training_curve(result, data.info["n_tokens"], data.info["length"])
    prompt = data.test["tokens"][:1, : min(16, data.info["length"])].to(device)
    generator = torch.Generator(device).manual_seed(config.seed)
    text = sample(model, prompt, config.sample_tokens, temperature=0.8, generator=generator)[0, prompt.shape[1] :]
    decode = data.info["tokenizer"].decode
    return {
        "test_loss": test_loss,
        "best_loss": history.best_value,
        "best_step": history.rows[history.best_epoch - 1]["step"],
        "final_loss": history.rows[-1]["valid_loss"],
        "steps": history.steps,
        "seconds": sum(row["seconds"] for row in history.rows),
        "training_flops": float(curve["flops"].iloc[-1]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "experts_per_token": mean_experts(history),
        "constant_loss": _unigram_loss(data),
        "looks_ahead": config.gate in LOOKS_AHEAD,
        "prompt": decode(prompt[0].tolist()),
        "sample": decode(text.tolist()),
        "n_tokens": data.info["n_tokens"],
        "length": data.info["length"],
    }


def _unigram_loss(data: Dataset) -> float:
    counts = token_counts(data.train["tokens"][:, 1:], data.info["n_tokens"]).double() + 1
    return float(-(counts / counts.sum()).log()[data.test["tokens"][:, 1:]].mean())


def training_curve(result: Result, n_tokens: int | None = None, length: int | None = None) -> pd.DataFrame:
    """Loss against steps, FLOPs and seconds of one run.

    FLOPs are those of useful work, 3 x forward, from the *measured* experts per token (for capacity: what was not
    dropped). Evaluation is not counted in FLOPs; it is in seconds.

    Returns:
        One row per evaluation: step, flops and seconds (cumulative; seconds include evaluation), experts (per token,
        mean since the last row), valid_loss, and valid_matched where it exists.
    """
    config = LanguageConfig(**result.config)
    n_tokens = n_tokens or result.metrics["n_tokens"]
    length = length or result.metrics["length"]
    size, n_experts = config.size(n_tokens, length), 0 if config.gate == "dense" else config.n_experts
    rows, flops, seconds, last = [], 0.0, 0.0, 0
    for row in result.curves["epochs"]:
        experts = row.get("train_experts", 1.0)
        routed = max(0, row["step"] - max(last, config.shared_steps)) / (row["step"] - last)
        if config.gate.startswith("hash"):
            routed = 0.0  # a table costs nothing
        without, with_router = (
            language_flops(size, n_experts=n_experts, experts_per_token=experts, router=router)
            for router in (False, True)
        )
        per_token = (1 - routed) * without + routed * with_router
        flops += training_flops(per_token) * (row["step"] - last) * config.batch_size * length
        seconds += row["seconds"]
        kept = {name: row[name] for name in ("valid_loss", "valid_matched", "train_token") if name in row}
        rows.append({"step": row["step"], "flops": flops, "seconds": seconds, "experts": experts, **kept})
        last = row["step"]
    return pd.DataFrame(rows)
