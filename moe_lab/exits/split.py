"""A network of one's own as stem, blocks and tail, cut by the names of its children.

Legend: N samples, L blocks = exits, C channels, S tokens, D width, K classes.

    model(x) = tail(block_L( ... block_1(stem(x))))

Each name is the end of a block. Block l > 1 begins after the name before; block 1 is the first name alone, and what
comes before it is the stem (it runs for every sample anyway, so answers and costs are the same as if it were in block
1). Behind the last name comes the tail: pooling and classifier. The tail can be the last inference module as it is.

Only children that run one after another can be cut, and a module does not say what its ``forward`` does besides. With
an ``example`` the pieces are run and compared with the model; give one unless the model is an `nn.Sequential`.

A ResNet of torchvision (whose forward flattens between pooling and classifier; that one step is found and added)::

    model = torchvision.models.resnet18(weights="DEFAULT").eval()
    x = torch.randn(1, 3, 224, 224)
    pieces = split_by_name(model, ["layer1", "layer2", "layer3", "layer4"], example=x)
    heads = linear_heads(pieces.blocks[:-1], pieces.stem, x, 1000)      # pooling and a linear layer each
    heads.append(pieces.tail)                                           # the last exit: the model's own classifier
    costs = exit_costs(pieces.blocks, heads, x, 1000, stem=pieces.stem)
    network = MultiExitNetwork(pieces.blocks, heads, stem=pieces.stem, costs=costs, freeze_backbone=True)

A vision transformer of timm adds class token and positions in its forward, where no child does it: it is cut by hand,
with a stem that does those steps, and compared with the model all the same::

    class Stem(nn.Module):
        def __init__(self, vit):
            super().__init__()
            self.patch_embed, self.cls_token, self.pos_embed = vit.patch_embed, vit.cls_token, vit.pos_embed

        def forward(self, x):
            patches = self.patch_embed(x)
            return torch.cat((self.cls_token.expand(len(x), -1, -1), patches), 1) + self.pos_embed

    vit = timm.create_model("vit_tiny_patch16_224", pretrained=True).eval()
    tail = nn.Sequential(vit.norm, Token("class"), vit.head)
    pieces = check_pieces(Pieces(Stem(vit), list(vit.blocks), tail), vit, x)
    heads = [*linear_heads(pieces.blocks[:-1], pieces.stem, x, 1000), pieces.tail]
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from moe_lab.exits.checks import check_exits, describe
from moe_lab.modes import evaluating
from moe_lab.names import check_name, unknown_name

_BY_HAND = (
    "The model's forward does more than run its children one after another (a flatten, a class token, positions, a "
    "second branch, ...): give stem, blocks and tail by hand as modules that do those steps, see moe_lab.exits.split"
)


@dataclass(frozen=True)
class Pieces:
    """A model in pieces, which share its parameters.

    Attributes:
        stem: before the first block.
        blocks: L modules.
        tail: after the last block, to the model's own answer.
    """

    stem: nn.Module
    blocks: list[nn.Module]
    tail: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """What the model returns for x."""
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.tail(h)


def _leaves(model: nn.Module, names: Sequence[str], path: str = "") -> list[tuple[str, nn.Module]]:
    """Children in order; those that a name looks into are replaced by their own children."""
    # Not named_children(): that leaves out a module's second place, and a shared ReLU runs in both.
    children = [(f"{path}{name}", child) for name, child in model._modules.items() if child is not None]
    known = [child_path for child_path, _ in children]
    for name in names:
        check_name("child", path + name.removeprefix(path).split(".")[0], known)
    found = []
    for child_path, child in children:
        deeper = [name for name in names if name.startswith(f"{child_path}.")]
        if not deeper:
            found.append((child_path, child))
        elif not list(child.children()):
            raise unknown_name("child", deeper[0], known)
        elif not isinstance(child, nn.Sequential | nn.ModuleList):
            raise ValueError(
                f"{deeper[0]!r} lies inside {child_path!r}, a {type(child).__name__}, which may do more than run its "
                "children one after another: only nn.Sequential and nn.ModuleList are cut inside. Cut at "
                f"{child_path!r}"
            )
        else:
            found += _leaves(child, deeper, f"{child_path}.")
    return found


def _piece(leaves: Sequence[tuple[str, nn.Module]]) -> nn.Module:
    """The one module, or all in a Sequential; none: identity."""
    if len(leaves) == 1:
        return leaves[0][1]
    return nn.Sequential(*(module for _, module in leaves))


def _with_flatten(leaves: list[tuple[str, nn.Module]]) -> nn.Module | None:
    """The tail with a flatten before its first child that holds a linear layer; None: there is no such child."""
    for index, (_, module) in enumerate(leaves):
        if any(isinstance(m, nn.Linear) for m in module.modules()):
            return _piece([*leaves[:index], ("", nn.Flatten(1)), *leaves[index:]])
    return None


def split_by_name(
    model: nn.Module, names: Sequence[str], example: Tensor | None = None, *, tail: nn.Module | None = None
) -> Pieces:
    """Cut a model whose children run one after another.

    Args:
        model: an `nn.Sequential`, or any module of that kind (torchvision's ResNet, VGG, ...).
        names: ends of the blocks, in order, at least two; dots look into nested Sequentials: "features.3".
        example: (n, ...) an input; the pieces must then answer as the model does (eval mode).
        tail: instead of the children behind the last name, for a model that pools by a function, say
            ``nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.classifier)``.

    Returns:
        Pieces that share the model's modules. If the children alone do not give the model's answer on ``example``, a
        flatten before the tail's first linear layer is tried too: models of torchvision have one in their forward.

    Raises:
        ValueError: an unknown name (with the nearest), names twice or out of order, fewer than two; pieces that do not
            answer as the model does.
    """
    if isinstance(names, str) or len(names) < 2:
        raise ValueError(f"at least two names are needed, one exit is no choice; got {names!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"a name appears twice in {list(names)}: each block has one")
    leaves = _leaves(model, names)
    spans = []
    for name in names:
        at = [i for i, (path, _) in enumerate(leaves) if path == name or path.startswith(f"{name}.")]
        spans.append((at[0], at[-1] + 1))
    start, ends = spans[0][0], [end for _, end in spans]
    for (before, end_before), (after, end) in itertools.pairwise(zip(names, ends, strict=True)):
        if end == end_before:
            raise ValueError(f"{after!r} ends where {before!r} ends: nothing would be left for its block")
        if end < end_before:
            raise ValueError(f"{after!r} runs before {before!r}: names go from the input to the output")
    cuts = [start, *ends]
    blocks = [_piece(leaves[a:b]) for a, b in itertools.pairwise(cuts)]
    rest = leaves[ends[-1] :]
    pieces = Pieces(_piece(leaves[:start]), blocks, _piece(rest) if tail is None else tail)
    if example is None:
        return pieces
    problem = _difference(pieces, model, example)
    if problem and tail is None and (flat := _with_flatten(rest)) is not None:
        flattened = Pieces(pieces.stem, blocks, flat)
        if not _difference(flattened, model, example):
            return flattened
    if problem:
        raise ValueError(f"the pieces do not answer as the model does: {problem}. {_BY_HAND}")
    return pieces


def check_pieces(pieces: Pieces, model: nn.Module, example: Tensor) -> Pieces:
    """The pieces, if they answer as the model does on ``example`` (eval mode); else a ValueError."""
    if problem := _difference(pieces, model, example):
        raise ValueError(f"the pieces do not answer as the model does: {problem}. {_BY_HAND}")
    return pieces


def _difference(pieces: Pieces, model: nn.Module, example: Tensor) -> str:
    """What is different; empty: nothing."""
    owned = nn.ModuleList([pieces.stem, *pieces.blocks, pieces.tail])
    with evaluating(model), evaluating(owned):
        expected = model(example)
        if not isinstance(expected, Tensor):
            return f"the model returns {describe(expected)}, not a tensor of logits"
        try:
            found = pieces(example)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
            return f"they stop with {type(error).__name__}: {error}"
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return f"they return {describe(found)}, the model {describe(expected)}"
    tolerance = 1e-4 * max(1e-3, float(expected.abs().max())) if expected.numel() else 0.0
    distance = float((found - expected).abs().max()) if expected.numel() else 0.0
    return "" if distance <= tolerance else f"answers differ by up to {distance:.3g}"


def merge_blocks(blocks: Sequence[nn.Module], exits: Sequence[int]) -> list[nn.Module]:
    """Fewer exits: blocks between two of them become one.

    Args:
        blocks: in order.
        exits: indices of the blocks that keep an exit, rising, the last block's included.

    Returns:
        One module per exit.
    """
    check_exits(exits, len(blocks))
    starts = [0, *(index + 1 for index in exits[:-1])]
    groups = [blocks[a : b + 1] for a, b in zip(starts, exits, strict=True)]
    return [group[0] if len(group) == 1 else nn.Sequential(*group) for group in groups]
