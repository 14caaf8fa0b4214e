"""What a JEI-DNN run is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_lab.exits.joint import GATE_INPUTS
from moe_lab.exits.losses import check_balance, check_mode
from moe_lab.exits.phases import Phases
from moe_lab.exits.probability import check_model
from moe_lab.exits.training import WARMUP_LOSSES
from moe_lab.exits.weighted import CIFAR, IMAGENET
from moe_lab.experiments.settings import part_of, profile_settings
from moe_lab.names import check_name

BODIES = ("vit", "cnn", "t2t_7", "t2t_14")
WEIGHTINGS = {"cifar": CIFAR, "imagenet": IMAGENET}
"""Settings of the baseline L2W-DEN: its authors' for CIFAR, and the one that JEI-DNN's comparison used."""

RHOS = tuple(p / 20 for p in range(1, 40))
"""Of the usual geometric schedule (MSDNet's budgeted batches): p / 20, p = 1 .. 39."""

_PROFILES: dict[str, dict[str, Any]] = {
    # Embedded digits, a small transformer: half a minute.
    "quick": {},
    # The specification's sizes: on digits or MNIST a few minutes on one core, on CIFAR a few minutes on a GPU.
    "standard": {
        "data_options": {},
        "backbone_epochs": 10,
        "warmup": 600,
        "steps": 2200,
        "prices": (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0),
        "rhos": RHOS,
        "n_thresholds": 40,
    },
    # The authors' backbone at their image size; `pretrained` names the file of its ImageNet weights, which they train
    # further. Without it the backbone starts from nothing.
    "paper": {
        "dataset": "cifar-10",
        "data_options": {},
        "body": "t2t_7",
        "resize": 224,
        "augment": True,
        "backbone_epochs": 60,
        "backbone_batch": 128,
        "backbone_rate": 5e-4,
        "precision": "bfloat16",
        "device": "auto",
        "warmup": 2100,
        "steps": 10_500,
        "phase_steps": 200,
        "gate_rate": 0.01,
        "module_rate": 0.01,
        "warmup_loss": "sum",
        "rhos": RHOS,
        "n_thresholds": 40,
        "prices": (0.01, 0.1, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 5.0),
    },
}

_CIFAR: dict[str, Any] = {
    "body": "t2t_7",
    "augment": True,
    "feature_copies": 4,
    "backbone_epochs": 50,
    "backbone_batch": 512,
    "backbone_rate": 1e-3,
    "precision": "bfloat16",
    "device": "auto",
    "batch_size": 256,
    "prices": (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.5, 5.0),
}
_STANDARD_OF_DATA: dict[str, dict[str, Any]] = {
    "mnist": {
        "data_options": {"n_train": 20_000, "n_valid": 9_999},
        "patch": 7,
        "width": 64,
        "backbone_epochs": 5,
    },
    **{name: _CIFAR for name in ("cifar-10", "cifar-100", "svhn", "cifar-10-lt", "cifar-100-lt")},
}
"""What profile "standard" changes for a data set."""

ABLATIONS: tuple[dict[str, Any], ...] = (
    *({"mode": mode} for mode in ("detached", "expected", "single")),
    *({"balance": balance} for balance in ("per_layer", "none")),
    *({"model": model} for model in ("cumulative", "stick_breaking")),
    *({"gate_inputs": name} for name in ("probability", "entropy", "margin", "features")),
    *({"phase_steps": steps} for steps in (25, 400)),
    *({"warmup": 100}, {"warmup": 1200, "warmup_patience": 2}),
    {"warmup_loss": "sum", "module_rate": 0.05},
    {"finetune_epochs": 5},
)
"""One thing at a time that differs from profile "standard"."""


@dataclass(frozen=True)
class BackboneConfig:
    """A body, trained once for all runs that differ in its exits only.

    Attributes:
        seed: of weights and batches.
        dataset: of kind "images".
        data_seed: of the data.
        data_options: passed on to `datasets.load`.
        body: one of `BODIES`; an exit behind every block.
        patch, width, layers, heads: of the vision transformer ("vit").
        blocks_per_stage: of the CNN, residual blocks.
        resize: side of the images that the body sees, enlarged on the device; None: as they are.
        pretrained: file with the official ImageNet weights of a T2T body; None: from nothing.
        backbone_epochs, backbone_batch, backbone_rate, backbone_decay: its training (AdamW, warm-up and cosine).
        augment: shifted and, where the label allows it, mirrored images in the training of the backbone.
        precision: of the backbone: "float32", or "bfloat16" for autocast. Exits train in float32.
        device: "cpu", "cuda" or "auto".

    Raises:
        ValueError: a value that cannot be meant.
    """

    seed: int = 0
    dataset: str = "moved-digits"
    data_seed: int = 0
    data_options: Mapping[str, Any] = field(default_factory=lambda: {"n_train": 4000, "n_valid": 3000, "n_test": 4000})
    body: str = "vit"
    patch: int = 4
    width: int = 48
    layers: int = 6
    heads: int = 4
    blocks_per_stage: int = 2
    resize: int | None = None
    pretrained: str | None = None
    backbone_epochs: int = 8
    backbone_batch: int = 64
    backbone_rate: float = 2e-3
    backbone_decay: float = 0.05
    augment: bool = False
    precision: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_name("body", self.body, BODIES)
        check_name("precision", self.precision, ("float32", "bfloat16"))
        if self.body == "vit" and self.layers < 2:
            raise ValueError(f"layers must be at least 2: one exit is no choice; got {self.layers}")
        if self.pretrained is not None and not self.body.startswith("t2t"):
            raise ValueError(f"pretrained weights are those of a T2T body ('t2t_7', 't2t_14'), not of {self.body!r}")
        self._at_least_1("backbone_epochs", "backbone_batch", "blocks_per_stage")

    def _at_least_1(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class JeiConfig(BackboneConfig):
    """One backbone and, on it, JEI-DNN at every price beside all baselines.

    Attributes:
        finetune_epochs: then so many epochs of backbone and linear modules together, all exits at once; 0: frozen
            backbone, as in the paper.
        feature_copies: training images whose features are cached: as they are, and so many - 1 augmented copies.
        prices: lambdas, trained side by side.
        warmup, phase_steps, final_gate_steps, steps: see `Phases`; ``phase_steps`` is both kinds' length.
        warmup_patience: see `DynamicWarmup` (in evaluations, 100 steps apart); None: a warm-up of fixed length.
        warmup_loss: see `ExitTraining`; "sum" wants a smaller ``module_rate``.
        gate_rate: learning rate of gates (SGD).
        module_rate: learning rate of inference modules (SGD), whose loss is a mean over exits. Where the loss is a sum
            over exits (BoostedNet, L2W-DEN) the rate is divided by their number: all modules step alike.
        mode: how inference modules are trained, see `exits.losses`; "released" is plain cross entropy.
        balance: of the gates' targets.
        model: exit model.
        gate_inputs: what gates see, see `exits.joint`.
        omega: of the baseline BoostedNet.
        weighted: setting of the baseline L2W-DEN, see `WEIGHTINGS`.
        rhos: of the geometric baseline.
        n_thresholds: of the baseline with one threshold for all exits, from low to high.
        alpha: accepted miscoverage of prediction sets.
        alphas: more of them, for the curve "conformal".
        batch_size: images per step of exits.

    Raises:
        ValueError: a value that cannot be meant.
    """

    finetune_epochs: int = 0
    feature_copies: int = 1
    prices: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6, 1.0, 2.0)
    warmup: int = 300
    phase_steps: int = 100
    final_gate_steps: int = 200
    steps: int = 1100
    warmup_patience: int | None = None
    warmup_loss: str = "mean"
    gate_rate: float = 0.1
    module_rate: float = 0.2
    mode: str = "released"
    balance: str = "cumulative"
    model: str = "direct"
    gate_inputs: str = "all"
    omega: float = 0.5
    weighted: str = "cifar"
    rhos: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0, 3.0)
    n_thresholds: int = 13
    alpha: float = 0.05
    alphas: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode(self.mode)
        check_balance(self.balance)
        check_model(self.model)
        check_name("gate inputs", self.gate_inputs, GATE_INPUTS)
        check_name("warm-up loss", self.warmup_loss, WARMUP_LOSSES)
        check_name("setting of L2W-DEN", self.weighted, WEIGHTINGS)
        if not self.prices or min(self.prices) < 0:
            raise ValueError(f"prices must be lambdas that are not negative, at least one; got {self.prices}")
        if not all(0 < alpha < 1 for alpha in (self.alpha, *self.alphas)):
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha} and {self.alphas}")
        self._at_least_1("batch_size", "phase_steps", "feature_copies", "n_thresholds")
        if self.finetune_epochs < 0:
            raise ValueError(f"finetune_epochs must not be negative, got {self.finetune_epochs}")
        if self.feature_copies > 1 and not self.augment:
            raise ValueError("feature_copies are augmented copies: set augment=True, or feature_copies=1")
        self.phases  # noqa: B018 - impossible phases are refused here, not after the backbone was trained

    @classmethod
    def profile(cls, name: str, **changes: Any) -> JeiConfig:
        """The settings of a profile, some of them changed. "standard" has settings for each real data set.

        Raises:
            ValueError: unknown profile or field, with the nearest valid name.
        """
        of_data = _STANDARD_OF_DATA.get(changes.get("dataset", ""), {}) if name == "standard" else {}
        return cls(**profile_settings(cls, _PROFILES, name, {**of_data, **changes}))

    @property
    def phases(self) -> Phases:
        """Warm-up, then gates and modules in turn, gates last."""
        return Phases(self.warmup, self.phase_steps, self.phase_steps, self.final_gate_steps, self.steps)

    @property
    def backbone(self) -> BackboneConfig:
        """The part that the training of the backbone looks at."""
        return part_of(self, BackboneConfig)
