"""T2T-ViT-7 and T2T-ViT-14, the bodies of JEI-DNN's experiments (Yuan et al., ICCV 2021; sizes: JEI-DNN, section 5).

Legend: N images, C channels, S tokens (without the class token), e = 64 width of the token module, m = 32 random
features, D width of the blocks, K classes.

Tokens to tokens. A soft split cuts overlapping windows out of the image and lays each out as one long token
(`unfold`); between two splits, attention with a small width lets tokens exchange what they know, and they are put back
on their grid:

    u = unfold(x), (N, S, k k C);     k, q, v = linear(norm(u)), (N, S, e) each
    t = v + out(attention(q, k, v));  x = t + mlp(norm(t)), back on the grid;      last split: linear to D

S is in the thousands, so the attention is a performer (Choromanski et al., ICLR 2021), linear in S. With random rows
w_1 .. w_m and

    phi(x)_r = exp(w_r . x - |x|^2 / 2) / sqrt(m),         E[phi(q) . phi(k)] = exp(q . k)   for w ~ N(0, I)

    y_i = sum_r phi(q_i)_r  sum_j phi(k_j)_r v_j  /  sum_r phi(q_i)_r  sum_j phi(k_j)_r

instead of y_i = sum_j softmax_j(q_i . k_j) v_j. Orthogonal rows have the same mean and less variance. We compute the
same y_i as two softmaxes, which can neither overflow nor divide by zero:

    a_rj = w_r . k_j - |k_j|^2 / 2;          slot_r = sum_j softmax_j(a_rj) v_j
    b_ir = w_r . q_i + logsumexp_j a_rj;     y_i = sum_r softmax_r(b_ir) slot_r

Read: m slots, each a mean of values; every token then reads a mean of slots. The authors add 1e-8 to the denominator
D_i, which is their guard; as a factor D_i / (D_i + 1e-8) it is more than that: a token far from all keys reads nothing.
Kept.

The authors scale m orthonormal rows by sqrt(m). Unbiased rows have lengths about sqrt(e), twice the square for their
m = e / 2. What theirs estimate is about exp(-|q - k|^2 / 4): half the logits, less for long keys, and far less noise
than 32 features of exp(q . k) would have. We keep it (their weights need it); `random_features` draws both.

Then: class token, fixed sinusoidal positions, pre-norm blocks without biases of queries, keys and values.

Where we differ: no stochastic depth (0.1 in the authors' ImageNet training): for early exits the body is frozen in eval
mode, where it does nothing. The paper path to ImageNet weights: `load_official`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from moe_lab.models.body import ExitBody, check_images
from moe_lab.models.vit import ClassToken, EncoderBlock

Split = tuple[int, int, int]
"""Window, stride, padding of a soft split."""

SPLITS: tuple[Split, ...] = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
"""The paper's, for 224 px: 3136, 784, 196 tokens."""

SMALL_SPLITS: tuple[Split, ...] = ((3, 2, 1), (3, 2, 1), (3, 1, 1))
"""Ours, for 32 px: 256, 64, 64 tokens (the paper's would leave 4)."""


def random_features(
    n_features: int, width: int, *, length: float | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Rows w_1 .. w_m, orthogonal to each other within every ``width`` of them.

    Args:
        n_features: m.
        width: e.
        length: of every row; None: lengths of Gaussian vectors, each row is then exactly N(0, I) and phi unbiased.
        generator: for the draw.

    Returns:
        (m, e).
    """
    blocks = torch.randn(-(-n_features // width), width, width, generator=generator)
    frames, triangles = torch.linalg.qr(blocks)
    frames = frames * triangles.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # else not uniform over rotations
    directions = frames.flatten(0, 1)[:n_features]
    if length is not None:
        return directions * length
    return directions * torch.randn(n_features, width, generator=generator).norm(dim=1, keepdim=True)


def performer_attention(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, epsilon: float = 0.0) -> Tensor:
    """Attention through random features, see the module's text.

    Args:
        query, key, value: (N, S, e).
        rows: (m, e).
        epsilon: added to the denominator; positive: 1 becomes D / (D + epsilon).

    Returns:
        (N, S, e): every row a mean of values, with positive weights that sum to 1.
    """
    written = key @ rows.T - key.square().sum(-1, keepdim=True) / 2
    slots = written.softmax(1).transpose(1, 2) @ value
    read = query @ rows.T + written.logsumexp(1, keepdim=True)
    y = read.softmax(-1) @ slots
    if not epsilon:
        return y
    log_total = read.logsumexp(-1, keepdim=True) - query.square().sum(-1, keepdim=True) / 2 - math.log(len(rows))
    return y * (log_total - math.log(epsilon)).sigmoid()


class TokenPerformer(nn.Module):
    """One step of tokens to tokens: (N, S, d) -> (N, S, e).

    Args:
        d: width of the windows.
        width: e.
        n_features: m.
        dropout: behind the attention and the feed-forward layer.
    """

    def __init__(self, d: int, width: int, n_features: int, dropout: float):
        super().__init__()
        self.norm, self.key_query_value = nn.LayerNorm(d), nn.Linear(d, 3 * width)
        self.out, self.dropout = nn.Linear(width, width), nn.Dropout(dropout)
        self.forward_norm = nn.LayerNorm(width)
        layers = (nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(dropout))
        self.feed_forward = nn.Sequential(*layers)
        self.register_buffer("rows", torch.empty(n_features, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, d) -> (N, S, e)."""
        key, query, value = self.key_query_value(self.norm(x)).chunk(3, -1)
        # Exponents of a size of 30 lose whole percents in 16 bits.
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(value.dtype, torch.float32)
            mixed = performer_attention(*(y.to(exact) for y in (query, key, value, self.rows)), epsilon=1e-8)
        x = value + self.dropout(self.out(mixed.to(value.dtype)))  # x itself has another width
        return x + self.feed_forward(self.forward_norm(x))


def sinusoids(n_positions: int, width: int) -> Tensor:
    """(1, S, D): sin at even columns, cos at odd ones, of position / 10000^(2 floor(column / 2) / D)."""
    column = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(n_positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (column // 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float().unsqueeze(0)


class TokensToTokens(nn.Module):
    """Images (N, C, H, W) -> tokens (N, S + 1, D), class token first, positions added.

    Args:
        side: H = W, divisible by the product of the strides.
        channels: C.
        width: D.
        token_width: e.
        n_features: m.
        splits: soft splits, see `Split`.
        dropout: see `TokenPerformer`.
    """

    def __init__(
        self,
        side: int,
        channels: int,
        width: int,
        token_width: int,
        n_features: int,
        splits: Sequence[Split],
        dropout: float,
    ):
        super().__init__()
        self.side, self.channels, self.splits = side, channels, tuple(splits)
        if not splits:
            raise ValueError("no soft split: at least one makes the tokens")
        stride = math.prod(stride for _, stride, _ in splits)
        if side % stride or side < stride:
            raise ValueError(
                f"soft splits {self.splits} divide the side by {stride}, which {side} is not a multiple of: resize, or "
                "give other splits (SMALL_SPLITS divide by 4)"
            )
        self.sides = []
        for window, step, padding in self.splits:
            expected, side = side // step, (side + 2 * padding - window) // step + 1
            if side != expected:
                raise ValueError(
                    f"a soft split of window {window}, stride {step}, padding {padding} gives a side of {side} instead "
                    f"of {expected}: take a padding of (window - stride) / 2, rounded up"
                )
            self.sides.append(side)
        inputs = [channels] + [token_width] * (len(self.splits) - 1)
        widths = [c * window**2 for c, (window, _, _) in zip(inputs, self.splits, strict=True)]
        self.performers = nn.ModuleList(TokenPerformer(d, token_width, n_features, dropout) for d in widths[:-1])
        self.project = nn.Linear(widths[-1], width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("position", sinusoids(self.sides[-1] ** 2 + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, S + 1, D)."""
        check_images(x, self.channels, self.side)
        for index, (window, stride, padding) in enumerate(self.splits):
            tokens = unfold(x, window, padding=padding, stride=stride).transpose(1, 2)
            if index < len(self.performers):
                grid = (self.sides[index], self.sides[index])
                x = self.performers[index](tokens).transpose(1, 2).unflatten(2, grid)
        tokens = self.project(tokens)
        return torch.cat((self.token.expand(len(x), -1, -1), tokens), 1) + self.position


class T2TViT(ExitBody):
    """See the module's text and `ExitBody`.

    Args:
        side, channels, n_classes: of the images.
        width, layers, heads, ratio: D, L, attention heads, hidden width of a block in units of D.
        token_width, n_features: e and m of the token module.
        splits: its soft splits, `SPLITS` or `SMALL_SPLITS` or others.
        dropout: in the token module, in training; 0.1 in the authors' code (whose blocks have none).
        generator: for the initial weights (truncated normal, 0.02, as theirs) and random features.

    Raises:
        ValueError: a side that the splits do not divide, splits that do not tile, a width the heads do not divide.
    """

    def __init__(
        self,
        *,
        side: int,
        channels: int,
        n_classes: int,
        width: int,
        layers: int,
        heads: int,
        ratio: int,
        token_width: int = 64,
        n_features: int = 32,
        splits: Sequence[Split] = SPLITS,
        dropout: float = 0.1,
        generator: torch.Generator | None = None,
    ):
        super().__init__(
            TokensToTokens(side, channels, width, token_width, n_features, splits, dropout),
            [EncoderBlock(width, heads, ratio, qkv_bias=False) for _ in range(layers)],
            ClassToken(nn.LayerNorm(width)),
            nn.Linear(width, n_classes),
        )
        nn.init.trunc_normal_(self.stem.token, std=0.02, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, TokenPerformer):
                length = math.sqrt(min(n_features, token_width))
                module.rows.copy_(random_features(n_features, token_width, length=length, generator=generator))


def t2t_vit_7(side: int, channels: int, n_classes: int, **options) -> T2TViT:
    """D = 256, 7 blocks, 4 heads, ratio 2; options as `T2TViT`."""
    return T2TViT(
        side=side, channels=channels, n_classes=n_classes, **{**dict(width=256, layers=7, heads=4, ratio=2), **options}
    )


def t2t_vit_14(side: int, channels: int, n_classes: int, **options) -> T2TViT:
    """D = 384, 14 blocks, 6 heads, ratio 3; options as `T2TViT`."""
    return T2TViT(
        side=side, channels=channels, n_classes=n_classes, **{**dict(width=384, layers=14, heads=6, ratio=3), **options}
    )


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
