"""What a COMET-BERT run is told: a teacher, what its importance is measured on, and a student.

Three configs, each with the fields of the one before it and more: `TeacherConfig`, `ImportanceConfig`,
`CometBertConfig`. A user writes the last one; the steps look at their own part (`teacher`, `importance`), so that all
gates and seeds share one teacher and one measurement of importance.

Gates by name (`GATES`; "+" behind one of `SEARCHED` adds local search):

    teacher            no student: the fine-tuned encoder itself
    pruned             one expert with the most important neurons: as many active FLOPs, nothing to route
    all                all experts, mixed by one learned vector per layer
    hash               a random table of token ids, one per layer: MoEBERT's baseline
    hash_balanced      the same, balanced by how often tokens occur
    topk               the best k, weighted; for k = 1 by the probability before the choice (MoEBERT's token gate)
    dselect_k, comet   k selectors, k trees; entropy regularised
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_lab.bert.heads import POOLS
from moe_lab.bert.mixture import MIXES
from moe_lab.datasets.glue import task_names
from moe_lab.experiments.mixture_config import PRECISIONS
from moe_lab.experiments.settings import part_of, profile_settings
from moe_lab.gates import Gate, HashGate, PermutationSearch, SoftmaxGate, TopKGate, build_gate
from moe_lab.names import check_name
from moe_lab.train import LearningRate

SEARCHED = ("hash", "hash_balanced", "topk", "dselect_k", "comet")
GATES = ("teacher", "pruned", "all", *SEARCHED, *(f"{gate}+" for gate in SEARCHED))
PAPER_GATES = ("teacher", "pruned", "hash", "hash+", "topk", "topk+", "dselect_k", "comet", "comet+")
"""What is recorded: the paper compares "hash" with "comet" and "comet+"."""
CLAIMED_GATES = ("teacher", "pruned", "hash", "comet", "comet+")
"""Those of its claims, and the control: recorded for further teachers too."""
AUTHORS_SCRIPT = {"gamma": 0.1, "entropy_weight": 0.1}
"""What their example script gives COMET."""
SPLITS = ("train", "valid")

_REAL = {
    "task": "sst2",
    "data_options": {},
    "length": 64,
    "warmup": 0.06,
    "tiny": {},
    "precision": "bfloat16",
    "device": "auto",
    "importance_rows": 8192,
    "latency_rounds": 5,
}
_PROFILES: dict[str, dict[str, Any]] = {
    # Embedded sentences, a BERT of two layers that starts from nothing: under a minute.
    "quick": {},
    # SST-2 and a real encoder of six layers: 2.4 passes for the teacher, 3.9 for a student. With the authors' gamma and
    # entropy weight nearly all tokens of five of six layers went to one expert within 80 steps and stayed there (3,000
    # sentences, batches of 32; `AUTHORS_SCRIPT` is recorded beside it). Gamma and weight were chosen on training and
    # validation rows, by the experts' shares and the layer term.
    "standard": {
        **_REAL,
        "model": "minilm",
        "pool": "mean",
        "teacher_steps": 2500,
        "teacher_every": 500,
        "teacher_rate": 5e-5,
        "teacher_batch_size": 64,
        "steps": 2000,
        "evaluate_every": 400,
        "batch_size": 128,
        "learning_rate": 1e-4,
        "gamma": 1.0,
        "entropy_weight": 0.02,
    },
    # The paper's sizes; its own search is 100 trials per gate and task, 25 or 50 epochs each.
    "paper": {
        **_REAL,
        "model": "bert-base-uncased",
        "length": 128,
        "teacher_steps": 20000,
        "teacher_every": 2000,
        "teacher_rate": 2e-5,
        "teacher_batch_size": 32,
        "steps": 50000,
        "evaluate_every": 2000,
        "batch_size": 32,
        "learning_rate": 2e-5,
        "importance_rows": None,
    },
}


@dataclass(frozen=True)
class TeacherConfig:
    """A fine-tuned encoder.

    Attributes:
        task: name for `datasets.glue.load_task`.
        data_seed: of generated sentences and of the validation rows.
        data_options: passed on to `load_task`.
        model: "minilm" (a package), "tiny" (random weights), a folder, or a name on the Hugging Face hub.
        tiny: sizes of "tiny", arguments of `tiny_encoder`.
        pool: "cls" or "mean", see `SentenceClassifier`.
        length: of the sequences in tokens; longer ones are cut.
        dropout: of the pooled state; None: the encoder's.
        teacher_seed: of the head, dropout and order of batches. One teacher for all gates and seeds, as in the paper.
        teacher_steps, teacher_every, teacher_batch_size: optimiser steps, steps between evaluations, rows per step.
        teacher_rate: highest learning rate of AdamW.
        warmup: share of the steps with rising rate; then a cosine down to 0. Of both trainings.
        weight_decay, clip_norm: of both trainings; decay on matrices only.
        precision: "float32", or "bfloat16" for autocast (gates and norms stay in float32).
        device: "cpu", "cuda" or "auto".
    """

    task: str = "planted-sentences"
    data_seed: int = 0
    data_options: Mapping[str, Any] = field(default_factory=lambda: {"n_valid": 300, "n_test": 500})
    model: str = "tiny"
    tiny: Mapping[str, Any] = field(default_factory=lambda: {"dropout": 0.0})
    pool: str = "cls"
    length: int = 24
    dropout: float | None = None
    teacher_seed: int = 0
    teacher_steps: int = 900
    teacher_every: int = 150
    teacher_batch_size: int = 32
    teacher_rate: float = 4e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    precision: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_name("task", self.task, task_names())
        check_name("pool", self.pool, POOLS)
        check_name("precision", self.precision, PRECISIONS)
        _positive(self, "length", "teacher_steps", "teacher_every", "teacher_batch_size", "teacher_rate", "clip_norm")
        _shares(self, "warmup")
        _not_negative(self, "weight_decay")
        if self.tiny and self.model != "tiny":
            raise ValueError(f"tiny={dict(self.tiny)} are sizes of model='tiny', not of {self.model!r}")

    @property
    def teacher(self) -> TeacherConfig:
        """The part that fine-tuning looks at."""
        return self.part(TeacherConfig)

    def part(self, kind: type) -> Any:
        """The fields of ``kind``, one of the configs that this one is made of."""
        return part_of(self, kind)


@dataclass(frozen=True)
class ImportanceConfig(TeacherConfig):
    """What the importance of neurons is measured on.

    Attributes:
        importance_split: "train", or "valid" as in the authors' script, which then scores on the same rows: a leak.
        importance_rows: the first so many rows; None: all.
    """

    importance_split: str = "train"
    importance_rows: int | None = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("importance_split", self.importance_split, SPLITS)
        if self.importance_rows is not None:
            _positive(self, "importance_rows")


@dataclass(frozen=True)
class CometBertConfig(ImportanceConfig):
    """One student: how it is built and distilled.

    Attributes:
        gate: one of `GATES`.
        seed: of gates, dropout and order of batches. Students of one seed see the same batches.
        n_experts: E.
        expert_width, shared: neurons per expert, and of them in every expert; None: the paper's ratios, F/E and F/6.
        mix: "after_norm" (paper) or "before_norm", see `moe_lab.bert.mixture`.
        k: trees, selectors or chosen experts.
        gamma: width of the smooth-step.
        padding: padding tokens are routed and counted in the losses, as in the authors' code.
        steps, evaluate_every, batch_size, learning_rate: of distillation, as the teacher's.
        layer_weight, prediction_weight: lambda_d of the two distillation terms; the paper has one for both, 1 to 5.
        entropy_weight: of "comet" and "dselect_k", summed over layers; the authors' script: 1 times 0.1.
        balance_weight: load balancing of "topk".
        permutation_weight: of the search's regulariser.
        search_share: "+": share of ``steps`` until the permutation is hard.
        watched_sentences: test sentences whose routing is written down token by token.
        latency_rounds: turns of the timing.
    """

    gate: str = "comet"
    seed: int = 0
    n_experts: int = 4
    expert_width: int | None = None
    shared: int | None = None
    mix: str = "after_norm"
    k: int = 1
    gamma: float = 0.1
    padding: bool = False
    steps: int = 400
    evaluate_every: int = 100
    batch_size: int = 32
    learning_rate: float = 1e-3
    layer_weight: float = 1.0
    prediction_weight: float = 1.0
    entropy_weight: float = 0.1
    balance_weight: float = 0.1
    permutation_weight: float = 1e-4
    search_share: float = 0.1
    watched_sentences: int = 12
    latency_rounds: int = 3

    watched_tokens = 0  # for `GateWatch`: sentences are written down at the end instead

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("gate", self.gate, GATES)
        check_name("mix", self.mix, MIXES)
        _positive(self, "steps", "evaluate_every", "batch_size", "learning_rate", "gamma", "latency_rounds", "k")
        _not_negative(self, "layer_weight", "prediction_weight", "entropy_weight", "balance_weight")
        _not_negative(self, "permutation_weight", "watched_sentences")
        _shares(self, "search_share")
        if self.n_experts < 2:
            raise ValueError(f"n_experts must be at least 2, got {self.n_experts}; one expert is gate 'pruned'")
        if self.gate.endswith("+") and self.search_steps < 1:
            raise ValueError(f"search_share = {self.search_share} of {self.steps} steps is no step: leave out the '+'")

    @classmethod
    def profile(cls, name: str, **changes: Any) -> CometBertConfig:
        """The settings of a profile, some of them changed.

        Raises:
            ValueError: unknown profile or field, with the nearest valid name.
        """
        return cls(**profile_settings(cls, _PROFILES, name, changes))

    @property
    def importance(self) -> ImportanceConfig:
        """The part that the measurement of importance looks at."""
        return self.part(ImportanceConfig)

    @property
    def search_steps(self) -> int:
        """Steps until the permutation of a "+" is hard."""
        return round(self.search_share * self.steps)

    def coefficients(self) -> dict[str, float]:
        """Coefficient of every term of the loss."""
        terms = {"task": 1.0, "layers": self.layer_weight, "predictions": self.prediction_weight, "experts": 0.0}
        base = self.gate.removesuffix("+")
        if base in ("comet", "dselect_k"):
            terms["entropy"] = self.entropy_weight
        if base == "dselect_k" and self.n_experts & (self.n_experts - 1):
            terms["code_mass"] = 1.0  # as in the other experiments
        if base in ("topk", "all", "pruned"):
            terms |= {"load_balance": self.balance_weight if base == "topk" else 0.0, "z": 0.0}
        if self.gate.endswith("+"):
            terms["permutation"] = self.permutation_weight
        return terms


def learning_rates(warmup: float, steps: int) -> LearningRate:
    """Warm-up, then a cosine down to 0."""
    return LearningRate(round(warmup * steps), steps, floor=0.0)


def make_gate(config: CometBertConfig, index: int, width: int, counts: Tensor) -> Gate:
    """The gate of layer ``index``.

    Args:
        config: what it should be.
        index: 0 is the lowest; each has weights, table and permutation of its own.
        width: D.
        counts: (vocabulary,) how often each token id occurs in training.
    """
    base, seed = config.gate.removesuffix("+"), 1000 * config.seed + index
    generator = torch.Generator().manual_seed(seed)
    if base in ("all", "pruned"):
        gate: Gate = SoftmaxGate(None, config.n_experts if base == "all" else 1)
        torch.nn.init.zeros_(gate.logits.bias)  # equal weights
    elif base == "hash_balanced":
        gate = HashGate.by_frequency(counts, config.n_experts)
    elif base == "topk":
        gate = TopKGate(width, config.n_experts, config.k, renormalise=config.k > 1, generator=generator)
    else:
        sizes = {"in_features": width, "n_experts": config.n_experts, "k": config.k, "n_keys": len(counts)}
        gate = build_gate(base, **sizes, gamma=config.gamma, seed=seed)
    if config.gate.endswith("+"):
        gate = PermutationSearch(gate, config.search_steps, generator=generator)
    return gate


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}; 0 switches it off")


def _shares(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is a share, in [0, 1]; got {getattr(config, name)}")
