"""ImageNet weights of the T2T-ViT authors for our bodies: their names, our modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_lab.models.t2t_vit import T2TViT


def _official_names(body: T2TViT, head: bool) -> dict[str, tuple[str, ...]]:
    """Name in the authors' state dict -> our tensors that it is cut into, in the order of its rows."""
    pairs = {
        "cls_token": ("stem.token",),
        "pos_embed": ("stem.position",),
        "tokens_to_token.project": ("stem.project",),
        "norm": ("pool.norm",),
    }
    if head:
        pairs["head"] = ("head",)
    inside = {
        "w": "rows",
        "norm1": "norm",
        "kqv": "key_query_value",
        "proj": "out",
        "norm2": "forward_norm",
        "mlp.0": "feed_forward.0",
        "mlp.2": "feed_forward.2",
    }
    for index in range(len(body.stem.performers)):
        theirs, ours = f"tokens_to_token.attention{index + 1}", f"stem.performers.{index}"
        pairs |= {f"{theirs}.{a}": (f"{ours}.{b}",) for a, b in inside.items()}
    inside = {
        "norm1": ("attention_norm",),
        "attn.qkv": ("attention.query", "attention.key_value"),
        "attn.proj": ("attention.out",),
        "norm2": ("forward_norm",),
        "mlp.fc1": ("feed_forward.layers.0",),
        "mlp.fc2": ("feed_forward.layers.3",),
    }
    for index in range(len(body.blocks)):
        pairs |= {f"blocks.{index}.{a}": tuple(f"blocks.{index}.{b}" for b in bs) for a, bs in inside.items()}
    known, names = body.state_dict(), {}
    for theirs, ours in pairs.items():
        if ours[0] in known:
            names[theirs] = ours
        else:
            kinds = [kind for kind in ("weight", "bias") if f"{ours[0]}.{kind}" in known]
            names |= {f"{theirs}.{kind}": tuple(f"{name}.{kind}" for name in ours) for kind in kinds}
    return names


@torch.no_grad()
def load_official(body: T2TViT, weights: Mapping[str, Tensor], *, head: bool = True) -> T2TViT:
    """Load weights that carry the names of the authors' code (github.com/yitu-opensource/T2T-ViT).

    The paper path: download a T2T-ViT-7 or -14 checkpoint by hand, then::

        body = t2t_vit_7(224, 3, 10)
        checkpoint = torch.load("71.7_T2T_ViT_7.pth.tar", map_location="cpu", weights_only=True)
        load_official(body, checkpoint["state_dict_ema"], head=False)

    Their loader takes ``state_dict_ema`` if it is there, else ``state_dict``, else the dictionary itself. They evaluate
    checkpoints with logits q . k / sqrt(D / heads), as here (only their flag ``pretrained=True`` switches to another
    scale). Random features and positions come with the weights. Compared with their code on random weights (logits
    equal to 1e-6, both sizes); not tried on a downloaded checkpoint.

    Args:
        body: of the same size, side and splits; changed in place.
        weights: name -> tensor; a prefix "module." is ignored.
        head: False: the body keeps its own head (another number of classes), theirs is left out.

    Returns:
        The body.

    Raises:
        ValueError: names that are missing or unexpected, another shape. The body is then unchanged.
    """
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    if not head:
        weights = {name: value for name, value in weights.items() if name not in ("head.weight", "head.bias")}
    names, own = _official_names(body, head), body.state_dict()
    missing, unexpected = sorted(names.keys() - weights.keys()), sorted(weights.keys() - names.keys())
    if missing or unexpected:
        raise ValueError(
            f"not the weights of a T2T-ViT with {len(body.blocks)} blocks: {len(missing)} names are missing "
            f"{missing[:3]}, {len(unexpected)} are unexpected {unexpected[:3]}"
        )
    for name, targets in names.items():
        shape = (sum(own[target].shape[0] for target in targets), *own[targets[0]].shape[1:])
        if tuple(weights[name].shape) != shape:
            hint = "; head=False keeps the body's own" if name.startswith("head") else ""
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, this body needs {shape}{hint}")
    for name, targets in names.items():
        parts = weights[name].split([own[target].shape[0] for target in targets])
        for target, part in zip(targets, parts, strict=True):
            own[target].copy_(part)  # a state dict shares its memory with the body
    return body
