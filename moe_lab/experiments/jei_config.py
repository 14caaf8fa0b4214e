"""What a JEI-DNN run is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_lab.exits.joint import Phases
from moe_lab.exits.losses import check_balance, check_mode
from moe_lab.exits.probability import check_model
from moe_lab.experiments.settings import profile_settings

_PROFILES: dict[str, dict[str, Any]] = {
    # Embedded digits, a small transformer: half a minute.
    "quick": {},
    # The same data with the specification's sizes: a few minutes on one core.
    "standard": {
        "data_options": {},
        "backbone_epochs": 10,
        "warmup": 600,
        "steps": 2200,
        "prices": (0.0, 0.05, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0),
    },
    "paper": {
        "data_options": {},
        "backbone_epochs": 30,
        "warmup": 1200,
        "steps": 6000,
        "phase_steps": 200,
        "prices": (0.01, 0.1, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 5.0),
    },
}


@dataclass(frozen=True)
class JeiConfig:
    """One backbone and, on it, JEI-DNN at every price beside all baselines.

    Attributes:
        seed: of weights and batches.
        dataset: of kind "images".
        data_seed: of the data.
        data_options: passed on to `datasets.load`.
        patch, width, layers, heads: of the vision transformer; an exit behind every layer.
        backbone_epochs, backbone_rate, backbone_decay: its training (AdamW, warm-up and cosine).
        prices: lambdas, trained side by side.
        warmup, phase_steps, final_gate_steps, steps: see `Phases`; ``phase_steps`` is both kinds' length.
        gate_rate: learning rate of gates (SGD); the modules' is ``module_rate``.
        module_rate: see ``gate_rate``.
        mode: how inference modules are trained, see `exits.losses`; "released" is plain cross entropy.
        balance: of the gates' targets.
        model: exit model.
        rhos: of the geometric baseline.
        alpha: accepted miscoverage of prediction sets.
        batch_size: images per step.
        device: "cpu", "cuda" or "auto".

    Raises:
        ValueError: a value that cannot be meant.
    """

    seed: int = 0
    dataset: str = "moved-digits"
    data_seed: int = 0
    data_options: Mapping[str, Any] = field(default_factory=lambda: {"n_train": 4000, "n_valid": 3000, "n_test": 4000})
    patch: int = 4
    width: int = 48
    layers: int = 6
    heads: int = 4
    backbone_epochs: int = 8
    backbone_rate: float = 2e-3
    backbone_decay: float = 0.05
    prices: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6, 1.0, 2.0)
    warmup: int = 300
    phase_steps: int = 100
    final_gate_steps: int = 200
    steps: int = 1100
    gate_rate: float = 0.1
    module_rate: float = 0.05
    mode: str = "released"
    balance: str = "cumulative"
    model: str = "direct"
    rhos: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0, 3.0)
    alpha: float = 0.05
    batch_size: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_mode(self.mode)
        check_balance(self.balance)
        check_model(self.model)
        if not self.prices or min(self.prices) < 0:
            raise ValueError(f"prices must be lambdas that are not negative, at least one; got {self.prices}")
        if self.layers < 2:
            raise ValueError(f"layers must be at least 2: one exit is no choice; got {self.layers}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha}")
        for name in ("backbone_epochs", "batch_size", "phase_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.phases  # noqa: B018 - impossible phases are refused here, not after the backbone was trained

    @classmethod
    def profile(cls, name: str, **changes: Any) -> JeiConfig:
        """The settings of a profile, some of them changed.

        Raises:
            ValueError: unknown profile or field, with the nearest valid name.
        """
        return cls(**profile_settings(cls, _PROFILES, name, changes))

    @property
    def phases(self) -> Phases:
        """Warm-up, then gates and modules in turn, gates last."""
        return Phases(self.warmup, self.phase_steps, self.phase_steps, self.final_gate_steps, self.steps)
