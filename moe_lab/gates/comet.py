"""COMET: a sparse, differentiable gate made of trees (Ibrahim et al., KDD 2023, arXiv 2306.02824).

Symbols (code name): E experts = leaves, K trees (``k``), S smooth-step of width gamma, v a split, l a leaf, j a tree.

    z_vj(x) = w_vj . x + b_vj                             (``split``)  probability of going left: S(z_vj)
    p_lj(x) = prod_{left turns} S(z_vj) prod_{right turns} S(-z_vj)    (``tree_probabilities``), sums to 1 over l
    a_lj(x) = alpha_lj . x + beta_lj                      (``leaf``)
    g_lj    = p_lj exp(a_lj) / sum over all (l', j')      (``tree_weights``)
    g_l     = sum_j g_lj                                  (``weights``)

Every tree has E - 1 splits and E leaves for *any* E: nodes in heap order (root 0, children 2v+1 and 2v+2), splits are
0 .. E-2. Leaves are numbered from left to right, which for E = 5 is heap order 7, 8, 4, 5, 6: experts 0 and 1 lie one
level deeper and start with half the weight.

A leaf that a tree cannot reach has p = 0 exactly, so a converged gate uses at most K experts per token. Before that up
to E are active: the bound is a property of the trained gate, not a constraint. Count it (`Routing.experts_per_token`).

Where we differ from the authors' code: they take log(p + 1e-8) and a softmax; we take the ratio itself, which is the
same mathematics without an epsilon (their tiny p is inflated to 1e-8). Levels, not nodes, are computed one by one.

On a GPU the same trees run in two kernels (`comet_fast`). With 32,768 tokens of width 1024 on an H200, forward and
backward take 0.72 and 0.52 of the time of the top-k softmax gate (E = 16, K = 2 and E = 256, K = 4), level by level
1.75 and 7.4: `python -m moe_lab.bench gpu --tables gates`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.experts.dispatch import BACKENDS
from moe_lab.gates.base import Affine, Gate, uniform_
from moe_lab.gates.losses import selection_entropy
from moe_lab.gates.trees import combine_trees, split_balance_loss, walk_levels
from moe_lab.names import check_name
from moe_lab.routing import Routing


class CometGate(Gate):
    """The COMET gate.

    Args:
        in_features: D, or None for a static gate (free node and leaf logits, one mixture for all tokens).
        n_experts: E, any number; 1 gives weight 1.
        k: trees. Trees may agree, so a converged row has *at most* k non-zeros.
        gamma: width of the smooth-step. Splits start in U(-gamma/100, gamma/100): gamma is nothing but a learning-rate
            multiplier of the splits (notebook 02 derives it).
        split_balance: also return the ``split_balance`` term.
        backend: "reference": level by level in PyTorch. "auto": kernels (`comet_fast`) where they can run, see below,
            the reference elsewhere. "fast": the same, but an error for a gate that the kernels cannot run anywhere, and
            kernels also where "auto" says no. An attribute: it may be changed at any time.
        generator: for the initial weights.

    Raises:
        ValueError: a gamma that is not positive, an unknown backend; when called, "fast" for a gate that it cannot run.

    The kernels run on NVIDIA GPUs from Ampere on, with Triton, for x and parameters in float32 or bfloat16, on at least
    one token. They have no static gates, no ``split_balance`` (which is of training) and no more than 1024 experts.
    Under `torch.compile`, which fuses the reference, and `torch.func` (stacked trials) the reference runs. "auto" takes
    it also where details are read at every step (`PermutationSearch`: the kernels would come on top of it), and never
    runs in Triton's interpreter. Results and gradients differ by rounding, in the dtype of x: see `comet_fast`.

    Losses in training mode: ``entropy``: sum over trees of the entropy of p, mean over tokens, nats (paper's Omega).
    Details: ``tree_probabilities`` p and ``tree_weights`` g_lj, both (T, E, K).
    """

    def __init__(
        self,
        in_features: int | None,
        n_experts: int,
        k: int,
        gamma: float = 1.0,
        *,
        split_balance: bool = False,
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_experts, k, in_features)
        if not gamma > 0:
            raise ValueError(f"gamma, the width of the smooth-step, must be positive; got {gamma}")
        self.gamma = float(gamma)
        self.split_balance = split_balance
        check_name("backend", backend, BACKENDS)
        self.backend = backend
        split, leaf = uniform_(gamma / 100, generator), uniform_(0.05, generator)
        self.split = Affine(in_features, (n_experts - 1, k), weight_init=split, bias_init=split)
        self.leaf = Affine(in_features, (n_experts, k), weight_init=leaf, bias_init=leaf)

    def forward(self, x: Tensor | None = None) -> Routing:
        """x (T, D) -> Routing with weights (T, E), rows summing to 1."""
        check_name("backend", self.backend, BACKENDS)
        if self._runs_fast(x):
            return self._fast(x)
        split_logits = self.split.tokens_last(x)
        reach, p = walk_levels(split_logits, self.gamma)
        g = combine_trees(p, self.leaf.tokens_last(x))
        losses = {}
        if self.training:
            losses["entropy"] = selection_entropy(p)
            if self.split_balance:
                losses["split_balance"] = split_balance_loss(split_logits, reach, self.gamma)
        details = {"tree_probabilities": p.movedim(-1, 0), "tree_weights": g.movedim(-1, 0)}
        return Routing(g.sum(1).T, losses, details)

    def _runs_fast(self, x: Tensor | None) -> bool:
        """The kernels do this call. Raises ValueError for "fast" and a gate that they cannot run anywhere."""
        if self.backend == "reference":
            return False
        is_tensor, automatic = isinstance(x, Tensor), self.backend == "auto"
        # vmap and compile would hand Triton tensors without memory. Asked first: torch.compile reads on from here.
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if automatic and (traced or self.reads_details or not is_tensor or x.device.type != "cuda"):
            return False
        from moe_lab.gates.comet_kernels import MOST_EXPERTS, usable  # only here: Triton takes a while to import

        lacks = {
            "static gates": self.in_features is None,
            "split_balance": self.split_balance and self.training,
            f"more than {MOST_EXPERTS} experts": self.n_experts > MOST_EXPERTS,
        }
        if any(lacks.values()):
            if automatic:
                return False
            missing = " and no ".join(name for name, lacking in lacks.items() if lacking)
            raise ValueError(f"backend 'fast' cannot run this: it has no {missing}; use 'reference' or 'auto'")
        fits = is_tensor and x.dim() == 2 and x.shape[1] == self.in_features  # if not, Affine explains
        parameters = (self.split.weight, self.split.bias, self.leaf.weight, self.leaf.bias)
        return fits and not traced and usable(x, self.n_experts, self.k, *parameters)

    def _fast(self, x: Tensor) -> Routing:
        from moe_lab.gates.comet_fast import fast_trees

        weight = torch.cat((self.split.weight, self.leaf.weight))
        bias = torch.cat((self.split.bias, self.leaf.bias))
        weights, entropy, details = fast_trees(x, weight, bias, self.k, self.gamma, self.training)
        return Routing(weights, {} if entropy is None else {"entropy": entropy}, details)

    @classmethod
    def from_arrays(cls, node_weight, node_bias, leaf_weight, leaf_bias, *, gamma: float) -> CometGate:
        """Bring in a gate trained elsewhere.

        Args:
            node_weight: (E-1, D, K), splits in heap order; None for a static gate.
            node_bias: (E-1, K).
            leaf_weight: (E, D, K), leaves from left to right; None for a static gate.
            leaf_bias: (E, K).
            gamma: width it was trained with.

        Raises:
            ValueError: shapes do not fit each other.
        """
        leaf_bias = torch.as_tensor(leaf_bias)
        if leaf_bias.dim() != 2:
            raise ValueError(f"leaf_bias must have shape (n_experts, k), got {tuple(leaf_bias.shape)}")
        n_experts, k = leaf_bias.shape
        in_features = None if leaf_weight is None else torch.as_tensor(leaf_weight).shape[1]
        gate = cls(in_features, n_experts, k, gamma).to(leaf_bias.dtype)
        gate.split.load_arrays(node_weight, node_bias)
        gate.leaf.load_arrays(leaf_weight, leaf_bias)
        return gate

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma}"
