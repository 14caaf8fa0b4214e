"""What a vision run is told (COMET paper, section 5; architectures in 5.2, training in 5.3 of our specification)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_lab.experiments.settings import profile_settings
from moe_lab.gates.build import check_gate_name
from moe_lab.names import unknown_name

BASELINES = ("one_expert", "expert_per_task")
"""Names that take the place of a gate where nothing is routed by image."""

_PROFILES: dict[str, dict[str, Any]] = {
    # Embedded 10 x 10 images and experts of one convolution: seconds per gate on one core.
    "quick": {},
    # MultiMNIST in full size with the paper's architecture; a minute or two per run on a GPU.
    "standard": {
        "dataset": "multimnist",
        "data_options": {},
        "n_experts": 16,
        "k": 4,
        "entropy_weight": 0.1,
        "channels": (10, 20),
        "kernel": 5,
        "dense": (50, 50),
        "head": (50, 50),
        "learning_rate": 1e-3,
        "batch_size": 512,
        "epochs": 15,
        "patience": 4,
        "watched_images": 4,
        "device": "auto",
    },
    # The paper's epochs and patience (learning rate: the middle of its range 1e-4 .. 1e-3).
    "paper": {
        "dataset": "multimnist",
        "data_options": {},
        "n_experts": 16,
        "k": 4,
        "entropy_weight": 0.1,
        "channels": (10, 20),
        "kernel": 5,
        "dense": (50, 50),
        "head": (50, 50),
        "learning_rate": 3e-4,
        "batch_size": 512,
        "epochs": 200,
        "patience": 25,
        "watched_images": 4,
        "device": "auto",
    },
}

# What a data set changes in a profile: the mixtures are one task with 8 smaller experts, MultiFashion has 5.
_MIXTURE = {"n_experts": 8, "k": 2, "dense": (50,)}
_DATASET_CHANGES: dict[str, dict[str, Any]] = {
    "multidigits": {},
    "digits-mixture": {"data_options": {"digit_size": 8}},  # all 2,566 examples
    "multimnist": {},
    "multifashion": {"n_experts": 5, "k": 2},
    "mnist-svhn": _MIXTURE,
}


@dataclass(frozen=True)
class VisionConfig:
    """One run. Every field takes part in the run's fingerprint: change one, and it is another run.

    The defaults are those of profile "quick" (see `profile`).

    Attributes:
        gate: softmax, topk, hash, hash_balanced, dselect_k or comet, with a trailing "+" for local search; or a
            baseline of networks of an expert's size: "one_expert", one for all images and tasks, "expert_per_task", one
            for each task. A gate that sends all images of a task to one expert is no more than the latter.
        seed: of initial weights, order of batches, hash table. Not of the data.
        dataset: "multidigits" (embedded), "multimnist", "multifashion": two digits, two tasks, two gates;
            "digits-mixture" (embedded), "mnist-svhn": two visual domains, one task, one gate.
        data_seed: of pairs and splits; apart from ``seed``, so that all seeds and gates see the same images.
        data_options: passed on to `datasets.load`. Quick: digits of 8 x 8 pixels, fewer examples.
        n_experts: E; 16 for MultiMNIST, 5 for MultiFashion, 8 for the mixtures in the paper.
        k: trees, selectors or experts chosen; 4, 2, 2 in the paper, 2 here, because quick has 8 experts.
        gamma: width of the smooth-step (COMET, DSelect-k). 10, the widest of the paper's grid .001 .. 10: it divides
            the learning rate of the splits, and raw pixels are large gate inputs; at 1 or below trees are hard
            before the experts have learned anything (measured in notebook 04).
        entropy_weight: lambda, coefficient of the gates' entropy; the paper's grid is 1e-4 .. 10. 1 makes the trees of
            quick hard within its few epochs; 0.1 elsewhere.
        load_balance_weight: coefficient of top-k's balancing loss; 0 as in the paper.
        permutation_weight: coefficient of the search's regulariser (the paper's zeta).
        permutation_epochs: length of the local search ("+"); the paper's MultiMNIST has 1 to 5 % of the epochs.
        permutation_schedule: temperatures of the search, "default" or "official" (too cold for 16 experts).
        center_pixels: subtract the mean training image from what the gates see. Off, as in the paper. Pixels are never
            negative: without this all images push a split the same way (notebook 04).
        n_keys: size of the hash table; an image's key is computed from its pixels (`vision_data.image_keys`). Only
            has to be much larger than E.
        channels, kernel, dense: of an expert, see `ConvExperts`; (10, 20), 5, (50, 50) in the paper.
        head: hidden widths of each task's head; (50, 50) in the paper.
        learning_rate: of Adam, constant.
        batch_size: images per step.
        epochs: most passes over the training images.
        patience: epochs without a better validation loss before stopping; None never stops early. The best weights
            are restored in either case.
        watched_images: validation images whose routing is written down as training goes on, to be replayed.
        device: "cpu", "cuda" or "auto".

    Raises:
        ValueError: a value that cannot be meant; the message says what would be.
    """

    gate: str = "comet"
    seed: int = 0
    dataset: str = "multidigits"
    data_seed: int = 0
    data_options: Mapping[str, Any] = field(
        default_factory=lambda: {"digit_size": 8, "n_train": 3000, "n_valid": 600, "n_test": 1500}
    )
    n_experts: int = 8
    k: int = 2
    gamma: float = 10.0
    entropy_weight: float = 1.0
    load_balance_weight: float = 0.0
    permutation_weight: float = 1e-4
    permutation_epochs: float = 1.0
    permutation_schedule: str = "default"
    center_pixels: bool = False
    n_keys: int = 65536
    channels: tuple[int, ...] = (8,)
    kernel: int = 3
    dense: tuple[int, ...] = (16,)
    head: tuple[int, ...] = (16,)
    learning_rate: float = 5e-3
    batch_size: int = 128
    epochs: int = 8
    patience: int | None = None
    watched_images: int = 8
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.gate not in BASELINES:
            check_gate_name(self.gate)
        if self.dataset not in _DATASET_CHANGES:
            raise unknown_name("vision data set", self.dataset, _DATASET_CHANGES)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        for name in ("entropy_weight", "load_balance_weight", "permutation_weight", "watched_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}; 0 switches it off")
        for name in ("n_experts", "k", "batch_size", "epochs", "n_keys"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.searches and not self.permutation_epochs > 0:
            raise ValueError(f"{self.gate!r} needs permutation_epochs > 0; without a search it is {self.gate[:-1]!r}")

    @classmethod
    def profile(cls, name: str, **changes: Any) -> VisionConfig:
        """The settings of a profile, fitted to the data set, some of them changed.

        Raises:
            ValueError: unknown profile or field, with the nearest valid name.
        """
        settings = profile_settings(cls, _PROFILES, name, changes)
        of_dataset = _DATASET_CHANGES.get(settings.get("dataset", cls.dataset), {})
        return cls(**{**_PROFILES[name], **of_dataset, **changes})

    @property
    def searches(self) -> bool:
        """Local search is on."""
        return self.gate.endswith("+")

    def coefficients(self, tasks: tuple[str, ...]) -> dict[str, float]:
        """Coefficient of every term that this gate's loss has; tasks weigh the same, 0 only logs a term."""
        base = self.gate.removesuffix("+")
        terms = {task: 1.0 / len(tasks) for task in tasks}
        if base in ("comet", "dselect_k"):
            terms["entropy"] = self.entropy_weight
        if base == "dselect_k" and self.n_experts & (self.n_experts - 1):
            terms["code_mass"] = 1.0  # per row; the authors' weight, which they apply to the sum over a batch
        if base in ("topk", "softmax"):
            terms |= {"load_balance": self.load_balance_weight, "z": 0.0}
        if self.searches:
            terms["permutation"] = self.permutation_weight
        return terms
