"""COMET's trees in two Triton kernels (`comet` has the equations and the oracle): logits to weights, and back.

Legend: T tokens, D gate-input width, E experts = leaves, K trees, C = (2E - 1) K logits of a token.

    Z + b (C, T) -> weights g (E, T), log M (T,), entropy

Rows of Z and b: all splits, then all leaves, K each; the product that gives Z is in `comet_fast`. M is the mass that
`combine_trees` divides by. With D_l the gradient of p_l, V of a leaf is D_l and V of a split its mean over the leaves
below it, given that the token arrives there:

    dL/da_lj = g_lj (G_l - sum_i G_i g_i)                          G the gradient of g
    D_lj     = exp(a_lj - log M) (G_l - sum_i G_i g_i) - H (log(p_lj + eps) + p_lj / (p_lj + eps))    H of the entropy
    V_v      = S(z_v) V_left + S(-z_v) V_right                     from the leaves up
    dL/dz_v  = reach_v S'(z_v) (V_left - V_right)

A thread has one token and holds the logits of one subtree of at most 2^``levels`` leaves. Subtrees that none of the
block's tokens reaches are neither loaded nor computed, forward or backward: their weights and gradients are the exact
zeros that they are. (The product has computed their logits: it runs before anybody knows.)

Exactly 0 are weights where no tree arrives, gradients of leaves and splits where p or reach is 0, and those of splits
that are decided (S' = 0): they have a factor 0. A gradient that is 0 because terms cancel (one expert: its weight is 1
whatever its logit) is 0 to rounding; division on a GPU is within two units of the last place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lab.gates.losses import _EPSILON, selection_entropy
from moe_lab.gates.tree_kernels import backward_kernel, forward_kernel
from moe_lab.gates.trees import combine_trees, walk_levels
from moe_lab.triton_support import capability, cdiv
from moe_lab.triton_support import usable as triton_runs

MOST_EXPERTS = 1024


@dataclass(frozen=True)
class TreeBlocks:
    """What a program handles: 32 tokens a warp, subtrees of 2^``levels`` leaves at a time.

    ``registers`` a thread at most: 255 hold 8 warps on a multiprocessor, 168 hold 12. None: no limit.
    """

    warps: int
    levels: int
    registers: int | None = None

    @property
    def tokens(self) -> int:
        """One for each thread."""
        return 32 * self.warps

    @property
    def options(self) -> dict[str, int | None]:
        """Of a launch."""
        return {"TOKENS": self.tokens, "num_warps": self.warps, "maxnreg": self.registers}


WHOLE = 4  # trees of at most so many levels are one subtree
MOST_ABOVE = 5  # levels above the subtrees: a thread of the backward holds a number for each subtree
# What there is to tune: python -m moe_lab.bench.gpu_gates --tune. It changes nothing beyond the order of sums. Measured
# on an H100 with 32,768 tokens: trees that are one subtree at E = 16, K = 2 (0.07 and 0.04 ms), others at E = 256,
# K = 4 (0.21 and 0.34 ms). Compiled for sm_90 the latter spill 0 and 24 bytes; 4 levels in the backward: 250 to 750.
WHOLE_BLOCKS = {"forward": TreeBlocks(4, WHOLE, registers=128), "backward": TreeBlocks(4, WHOLE)}
BLOCKS = {"forward": TreeBlocks(1, 4), "backward": TreeBlocks(1, 3, registers=168)}


def depth(n_experts: int) -> int:
    """Levels of splits above the lowest leaf."""
    return (n_experts - 1).bit_length()


def blocks_table(n_experts: int) -> dict[str, TreeBlocks]:
    """Kernel ("forward", "backward") -> its blocks for trees of so many leaves; change it in place to tune."""
    return WHOLE_BLOCKS if depth(n_experts) <= WHOLE else BLOCKS


def usable(x: Tensor, n_experts: int, k: int, *parameters: Tensor) -> bool:
    """The kernels can run on x (T, D) for so many experts and trees: at least a token, and T K at most 2^26.

    They can also use these parameters: on the device of x, in a dtype that fits.
    """
    fits = n_experts <= MOST_EXPERTS and 0 < len(x) * k <= 2**26  # places within a subtree are 32-bit numbers
    return fits and _new_enough(x.device) and all(_readable(tensor) for tensor in (x, *parameters))


def _readable(x: Tensor) -> bool:
    plain = type(x) in (Tensor, nn.Parameter)  # a subclass (FakeTensor, DTensor) may have no memory to point to
    return plain and triton_runs(x) and x.dtype != torch.float16


def _new_enough(device: torch.device) -> bool:
    """Of NVIDIA, Ampere or later: products in bfloat16, and limits on registers."""
    if device.type != "cuda":
        return True
    return capability(device) >= (8, 0)


def trees_oracle(logits: Tensor, bias: Tensor, k: int, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernels compute, by `comet`'s own functions, differentiable by autograd.

    Args:
        logits: (C, T) without bias, splits before leaves.
        bias: (C,).
        k, gamma: K and the width of the smooth-step.

    Returns:
        weights (E, T); the mean entropy over tokens, a scalar; p and g per tree, both (E, K, T).
    """
    n_splits = (logits.shape[0] // k - 1) // 2
    split, leaf = (logits + bias[:, None]).unflatten(0, (-1, k)).split((n_splits, n_splits + 1))
    _, p = walk_levels(split, gamma)
    g = combine_trees(p, leaf)
    return g.sum(1), selection_entropy(p), p, g


def _sizes(which: str, n_experts: int, k: int) -> dict[str, int]:
    deep = depth(n_experts)
    levels = deep if deep <= WHOLE else max(BLOCKS[which].levels, deep - MOST_ABOVE)
    return {"E": n_experts, "K": k, "TOP": deep - levels, "LEVELS": levels}


def trees(logits: Tensor, bias: Tensor, k: int, gamma: float, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The forward kernel.

    Args:
        logits: (C, T) float32, contiguous, without bias.
        bias: (C,) float32.
        k, gamma: K and the width of the smooth-step.
        entropy: compute it.

    Returns:
        weights (E, T), log M (T,), and the mean entropy over tokens, a scalar, or None.
    """
    n_logits, n_tokens = logits.shape
    n_experts = (n_logits // k + 1) // 2
    sizes, blocks = _sizes("forward", n_experts, k), blocks_table(n_experts)["forward"]
    weights = logits.new_empty(sizes["E"], n_tokens)
    log_mass = logits.new_empty(n_tokens)
    shift = logits.new_empty(1 << sizes["TOP"], n_tokens) if sizes["TOP"] else log_mass
    uncertain = logits.new_empty(n_tokens) if entropy else log_mass
    forward_kernel[(cdiv(n_tokens, blocks.tokens),)](
        logits, bias, weights, log_mass, shift, uncertain, n_tokens, 1 / gamma, _EPSILON,
        **sizes, ENTROPY=entropy, **blocks.options,
    )  # fmt: skip
    return weights, log_mass, uncertain.mean() if entropy else None


def trees_backward(
    logits: Tensor,
    bias: Tensor,
    weights: Tensor,
    log_mass: Tensor,
    k: int,
    gamma: float,
    grad_weights: Tensor,
    grad_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The backward kernel.

    Args:
        logits, bias, weights, log_mass, k, gamma: of `trees`.
        grad_weights: (E, T) float32, contiguous.
        grad_entropy: a scalar, or None.
        dtype: of the result.

    Returns:
        The gradient of the logits, (C, T).
    """
    n_experts, n_tokens = weights.shape
    blocks = blocks_table(n_experts)["backward"]
    grad, has_entropy = torch.empty_like(logits, dtype=dtype), grad_entropy is not None
    backward_kernel[(cdiv(n_tokens, blocks.tokens) * k,)](
        logits, bias, weights, log_mass, grad_weights, grad_entropy if has_entropy else log_mass, grad, n_tokens,
        1 / gamma, _EPSILON, **_sizes("backward", n_experts, k), ENTROPY=has_entropy, **blocks.options,
    )  # fmt: skip
    return grad
