"""The backbone of a JEI-DNN run: built, trained once for all runs that share it, perhaps trained once more with all
exits, frozen, and its features cached.

Legend: N images, L exits, D widest features, K classes.

"Fine-tuned" (``finetune_epochs``): the whole network trains on sum_l v_l CE_l / sum_l v_l, the warm-up loss of the
exits, with linear modules that are thrown away. Early blocks then learn features that early exits can read. What comes
after is the same as for a frozen backbone, so that this is the only difference.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_lab.atomic import atomic_file
from moe_lab.batches import Batches
from moe_lab.datasets import Dataset
from moe_lab.datasets.augment import crop_and_flip
from moe_lab.exits import exit_costs
from moe_lab.experiments.jei_config import BackboneConfig, JeiConfig
from moe_lab.experiments.settings import load_of_kind
from moe_lab.models.body import ExitBody
from moe_lab.models.cnn import ConvNet
from moe_lab.models.t2t_vit import SMALL_SPLITS, SPLITS, t2t_vit_7, t2t_vit_14
from moe_lab.models.t2t_weights import load_official
from moe_lab.models.vit import VisionTransformer
from moe_lab.modes import evaluating
from moe_lab.results import Result, run_cached
from moe_lab.runtime import seed_everything
from moe_lab.train import FitConfig, LearningRate, fit

BACKBONE = "jei_backbone"
_CHUNK = 512  # images through the body at a time, when features are cached


def load_images(config: BackboneConfig) -> Dataset:
    """The images. ValueError for a data set of another kind."""
    return load_of_kind(config, "images", "an experiment with early exits")


def build_backbone(config: BackboneConfig, data: Dataset) -> ExitBody:
    """The body, untrained but for ``pretrained`` weights. Draws from the global generator: seed it first."""
    side = config.resize or data.info["side"]
    shape = {"side": side, "channels": data.info["channels"], "n_classes": data.info["n_classes"]}
    if config.body == "cnn":
        body: ExitBody = ConvNet(blocks_per_stage=config.blocks_per_stage, **shape)
    elif config.body == "vit":
        body = VisionTransformer(
            patch=config.patch, width=config.width, layers=config.layers, heads=config.heads, **shape
        )
    else:
        make = t2t_vit_7 if config.body == "t2t_7" else t2t_vit_14
        body = make(**shape, splits=SPLITS if side >= 128 else SMALL_SPLITS)
    if config.pretrained is not None:
        checkpoint = torch.load(config.pretrained, map_location="cpu", weights_only=True)
        load_official(body, checkpoint.get("state_dict_ema", checkpoint), head=False)
    if config.resize is not None:
        body.stem = nn.Sequential(nn.Upsample(size=side, mode="bilinear"), body.stem)
    return body


def normalised_costs(body: ExitBody, data: Dataset) -> tuple[Tensor, float]:
    """(L,) relative multiply-adds until each exit, and the whole network's in millions."""
    x = data.test["image"][:1].to(next(body.parameters()).device)
    linears = [nn.Linear(width, data.info["n_classes"], device=x.device) for width in body.widths[:-1]]
    costs = exit_costs(list(body.blocks), body.exit_heads(linears), x, data.info["n_classes"], stem=body.stem)
    return costs / costs[-1], float(costs[-1]) / 1e6


class AllExits(nn.Module):
    """A body with a linear module at every exit but the last; images -> logits (N, L, K)."""

    def __init__(self, body: ExitBody, n_classes: int):
        super().__init__()
        self.body = body
        self.linears = nn.ModuleList(nn.Linear(width, n_classes) for width in body.widths[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, L, K)."""
        h, found = self.body.stem(x), []
        for block, head in zip(self.body.blocks, self.body.exit_heads(list(self.linears)), strict=True):
            h = block(h)
            found.append(head(h))
        return torch.stack(found, 1)


class Augment(nn.Module):
    """`crop_and_flip` in training, nothing in evaluation. Its generator is an attribute: `fit` keeps its state."""

    def __init__(self, seed: int, flip: bool, device: torch.device):
        super().__init__()
        self.flip = flip
        self.generator = torch.Generator(device).manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape; shifts by up to an eighth of the side."""
        return crop_and_flip(x, self.generator, pad=x.shape[-1] // 8, flip=self.flip) if self.training else x


class Trained(nn.Module):
    """What `fit` trains: augmentation, then the network, in the wanted precision. Logits (N, L', K) in float32."""

    def __init__(self, network: nn.Module, augment: nn.Module, precision: str):
        super().__init__()
        self.network, self.augment, self.precision = network, augment, precision

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, L', K); L' = 1 for a body without exits."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits = self.network(self.augment(x))
        return (logits.unsqueeze(1) if logits.dim() == 2 else logits).float()


def _losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(batch["image"])
    labels = batch["label"].unsqueeze(1).expand(logits.shape[:2])
    return logits, cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """sum_l v_l CE_l / sum_l v_l, v = L, ..., 1; the cross entropy of the last head if there is no other."""
    _, losses = _losses(model, batch)
    weights = torch.arange(losses.shape[1], 0, -1, device=losses.device, dtype=losses.dtype)
    return {"label": (losses.mean(0) * weights).sum() / weights.sum()}


def _valid_loss(valid: Batches, model: nn.Module) -> dict[str, float]:
    total, right, n = 0.0, 0, 0
    for batch in valid.epoch(0):
        logits, losses = _losses(model, batch)
        total += float(losses.mean(1).sum())
        right += int((logits[:, -1].argmax(-1) == batch["label"]).sum())
        n += len(logits)
    return {"valid_loss": total / n, "valid_accuracy": right / n}


def augmentation(config: BackboneConfig, data: Dataset, device: torch.device) -> nn.Module:
    """What the training images go through, from its beginning."""
    flip = bool(data.info.get("flip", False))
    return Augment(config.seed, flip, device) if config.augment else nn.Identity()


def _fit(
    config: BackboneConfig,
    data: Dataset,
    network: nn.Module,
    result: Result,
    curve: str,
    progress: bool,
    *,
    epochs: int,
    rate: float,
) -> None:
    device = next(network.parameters()).device
    columns = {name: {key: split[key] for key in ("image", "label")} for name, split in data.splits.items()}
    options = {"device": device, "keep_on_device": True}
    train = Batches(columns["train"], config.backbone_batch, shuffle=True, seed=config.seed, **options)
    valid = Batches({key: values[data.valid["part"] == 1] for key, values in columns["valid"].items()}, 512, **options)
    model = Trained(network, augmentation(config, data, device), config.precision)
    steps = epochs * len(train)
    fit(
        model,
        train,
        _loss,
        optimizer=torch.optim.AdamW(model.parameters(), rate, weight_decay=config.backbone_decay),
        coefficients={"label": 1.0},
        evaluate=partial(_valid_loss, valid),
        config=FitConfig(
            epochs=epochs,
            learning_rate=LearningRate(max(1, steps // 10), steps, floor=0.01),
            clip_norm=1.0,
            progress=progress,
        ),
        result=result,
        curve=curve,
        resume=True,
    )


def train_backbone(
    config: BackboneConfig, data: Dataset, result: Result, device: torch.device, progress: bool
) -> ExitBody:
    """The frozen body in eval mode; curve ``backbone``. Draws from the global generator: seed it first."""
    body = build_backbone(config, data).to(device)
    about = {"epochs": config.backbone_epochs, "rate": config.backbone_rate}
    _fit(config, data, body, result, "backbone", progress, **about)
    return body.requires_grad_(False).eval()


def finetune(config: JeiConfig, data: Dataset, body: ExitBody, result: Result, progress: bool) -> ExitBody:
    """The body trained further, for all exits at once, and frozen again; curve ``finetune``."""
    seed_everything(config.seed)  # the same linear modules whether the body was trained or found
    network = AllExits(body.train().requires_grad_(True), data.info["n_classes"]).to(next(body.parameters()).device)
    about = {"epochs": config.finetune_epochs, "rate": config.backbone_rate / 2}
    _fit(config, data, network, result, "finetune", progress, **about)
    return body.requires_grad_(False).eval()


def shared_backbone(
    config: BackboneConfig, data: Dataset, device: torch.device, *, root: Path | str | None = None, progress: bool
) -> tuple[ExitBody, Result]:
    """The frozen body and the Result of its training, which all runs with the same backbone share.

    The weights lie beside the Result. Where they do not (recorded Results come without), the body is trained again.
    """
    kept: list[ExitBody] = []

    def compute(result: Result) -> dict[str, Any]:
        kept.append(train_backbone(config, data, result, device, progress))
        with atomic_file(_weights_path(result)) as file:
            torch.save(kept[0].state_dict(), file)
        return {"valid_accuracy": result.curves["backbone"][-1]["valid_accuracy"]}

    result = run_cached(BACKBONE, config, compute, root=root)
    if not _weights_path(result).is_file():
        result = run_cached(BACKBONE, config, compute, root=root, recompute=True)
    if not kept:
        body = build_backbone(config, data)
        body.load_state_dict(torch.load(_weights_path(result), map_location="cpu", weights_only=True))
        kept.append(body.to(device).requires_grad_(False).eval())
    return kept[0], result


def _weights_path(result: Result) -> Path:
    return result.path.with_suffix(".pt")


def cached_features(
    body: ExitBody,
    split: dict[str, Tensor],
    device: torch.device,
    *,
    augment: nn.Module | None = None,
    copies: int = 1,
) -> dict[str, Tensor]:
    """features (N, L, D), last (N, K) logits of the frozen head, label (N,), part (N,).

    Args:
        body: frozen.
        split: of the data set.
        device: of the answer.
        augment: what makes the copies after the first.
        copies: rows of one follow those of the other: N is that many times as large.
    """
    found = []
    with evaluating(body), torch.no_grad():
        for copy in range(copies):
            for images in split["image"].split(_CHUNK):
                images = images.to(device)
                if copy and augment is not None:
                    images = augment.train()(images)
                found.append(body.features(images))
        features = torch.cat(found)
        last = body.head(features[:, -1, : body.widths[-1]])
    about = {key: split[key].to(device).repeat(copies) for key in ("label", "part")}
    return {"features": features, "last": last} | about
