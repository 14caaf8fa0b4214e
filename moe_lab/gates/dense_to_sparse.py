"""DTS-Gate, dense to sparse (Nie et al., EvoMoE, arXiv 2112.14397): all experts at first, few in the end.

Legend: T tokens, E experts; n completed steps, tau temperature, c threshold, zeta Gumbel noise, one draw per (t, e).

    l = x W                               p = softmax(l)                q = softmax((l + zeta) / tau(n))
    shared, n < n_s:                      expert 0 only, weight 1: one expert for everybody, before it is spawned
    soft, n < n_h:                        m_e = [q_e > c] or [e = argmax q]
    hard, n >= n_h:                       m_e = [e = argmax (l + zeta)]
    g = m q (``weights_from="gumbel"``)   or   g = m p (``"softmax"``)

High tau: q is nearly uniform, everybody runs. As tau falls and the logits grow, fewer pass the threshold: k(x), the
number of experts, is the token's own. A threshold of 0.001 alone does not reach 1 (16 experts, tau = 0.5, untrained: 10
of 16 run): the hard switch does.

Three knobs decide more than the schedule:

* ``noise``. "always" is the authors' code: hard mode then *samples* from p for ever (Gumbel-max), and routing in
  evaluation disagrees with that in training. "soft_only" stops at the hard switch, "never" has none.
* ``weights_from``. Their repository has launch scripts for both; the paper's equation is "gumbel".
* ``renormalise``. Off, as theirs: with it, the kept weight of a hard choice is the constant 1 and the router stops
  learning.

Where we differ: the best expert always runs (for c >= 1/E a token could lose all of them); the balancing term is 1 at
perfect balance whatever k(x) is (theirs, ``balance="official"``, is k(x) there: it falls because k does); step and
phase are in the state dict (theirs: global variables, lost on resume).

Taught in notebook 09.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lab.gates.base import Affine, Gate
from moe_lab.gates.losses import load_balancing_loss, mean_over_tokens, router_z_loss
from moe_lab.gates.schedules import TemperatureSchedule
from moe_lab.routing import Routing

NOISE = ("soft_only", "never", "always")
WEIGHTS_FROM = ("softmax", "gumbel")
INFERENCE = ("topk", "matched")
BALANCE = ("share", "official")


def gumbel_like(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise, -log E with E exponential, in the shape of ``logits``; finite in float32."""
    exponential = torch.empty_like(logits).exponential_(generator=generator)
    return -exponential.clamp(min=torch.finfo(logits.dtype).tiny).log()


def one_hot_of_largest(values: Tensor) -> Tensor:
    """(T, E) bool, True at the largest value of each row, once."""
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, values.argmax(-1, keepdim=True), True)


class DenseToSparseGate(Gate):
    """The dense-to-sparse gate.

    Args:
        in_features: D, or None for a static gate.
        n_experts: E, at least 2: with one expert there is nothing to sparsify.
        schedule: tau as a function of the steps since the end of the shared phase.
        threshold: c in [0, 1). 0 keeps everybody in the soft phase.
        shared_steps: n_s; 0: no shared phase.
        hard_after: steps after the shared phase until the gate is hard; None: never.
        weights_from: "softmax" (p) or "gumbel" (q).
        noise: "soft_only", "never", "always".
        renormalise: divide the kept weights by their sum.
        k: experts of hard mode and of top-k inference; the paper has 1.
        inference: "topk": the k largest p. "matched": the rule of the current phase, without noise.
        balance: "share" (1 at perfect balance) or "official".
        generator: for the initial weights, N(0, 0.02^2), no bias: the first mixture is nearly the average.

    ``advance()`` after each optimiser step moves the schedule; `fit` does it. ``phase`` is "shared", "soft" or "hard".
    Losses in training: ``load_balance``, ``z`` (zero in the shared phase). Details: ``scores`` q (T, E).

    Raises:
        ValueError: values that cannot be meant; the message says why.
    """

    def __init__(
        self,
        in_features: int | None,
        n_experts: int,
        schedule: TemperatureSchedule,
        *,
        threshold: float = 1e-3,
        shared_steps: int = 0,
        hard_after: int | None = None,
        weights_from: str = "softmax",
        noise: str = "soft_only",
        renormalise: bool = False,
        k: int = 1,
        inference: str = "topk",
        balance: str = "share",
        generator: torch.Generator | None = None,
    ):
        super().__init__(n_experts, k, in_features)
        if n_experts < 2:
            raise ValueError("a dense-to-sparse gate needs at least 2 experts; one expert needs no gate")
        if not 1 <= k <= n_experts:
            raise ValueError(f"k must be 1 .. {n_experts}, got {k}")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), got {threshold}: weights are below 1, nobody would pass")
        if shared_steps < 0 or (hard_after is not None and hard_after < 0):
            raise ValueError(f"steps must not be negative, got shared_steps={shared_steps}, hard_after={hard_after}")
        for name, value, known in (
            ("weights_from", weights_from, WEIGHTS_FROM),
            ("noise", noise, NOISE),
            ("inference", inference, INFERENCE),
            ("balance", balance, BALANCE),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        self.schedule, self.threshold = schedule, float(threshold)
        self.shared_steps, self.hard_after = shared_steps, hard_after
        self.weights_from, self.noise, self.renormalise = weights_from, noise, renormalise
        self.inference, self.balance = inference, balance

        def normal(tensor: Tensor) -> Tensor:
            return tensor.normal_(0.0, 0.02, generator=generator)

        bias = normal if in_features is None else torch.Tensor.zero_
        self.logits = Affine(in_features, (n_experts,), weight_init=normal, bias_init=bias)
        if in_features is not None:
            self.logits.bias.requires_grad_(False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(DenseToSparseGate._after_load)
        self._update_phase(0)

    @torch.no_grad()
    def advance(self) -> None:
        """One optimiser step is done."""
        self.step += 1
        self._update_phase(self._n_steps + 1)

    def _after_load(self, _) -> None:
        self._update_phase(int(self.step))

    def _update_phase(self, n_steps: int) -> None:
        # Python copies of what ``step`` says: branching on them costs no synchronisation, and a compiled gate is
        # recompiled when the phase changes, not at every step.
        self._n_steps = n_steps
        self.phase = self.phase_after(n_steps)

    def phase_after(self, n_steps: int) -> str:
        """ "shared", "soft" or "hard" after so many steps."""
        if n_steps < self.shared_steps:
            return "shared"
        is_hard = self.hard_after is not None and n_steps >= self.shared_steps + self.hard_after
        return "hard" if is_hard else "soft"

    @property
    def temperature(self) -> float:
        """tau of the next forward pass."""
        return float(self.schedule(max(0, self._n_steps - self.shared_steps)))

    def forward(self, x: Tensor | None = None, *, generator: torch.Generator | None = None) -> Routing:
        """x (T, D) -> Routing: 1 to E experts per row. ``generator`` draws the noise (default: torch's global one)."""
        logits = self.logits(x)
        if self.phase == "shared":
            return self._shared(logits)
        noisy = logits
        if self.training and (self.noise == "always" or (self.noise == "soft_only" and self.phase == "soft")):
            noisy = logits + gumbel_like(logits, generator)
        q = (noisy / self.schedule(self.step - self.shared_steps)).softmax(-1)
        mask = self._mask(noisy, q)
        weights = (logits.softmax(-1) if self.weights_from == "softmax" else q) * mask
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        most = self.k if self._takes_k else None
        return Routing(weights, self._losses(logits, weights, mask), {"scores": q}, most)

    @property
    def _takes_k(self) -> bool:
        """k experts, not all above the threshold."""
        return self.phase == "hard" or (not self.training and self.inference == "topk")

    def _mask(self, noisy: Tensor, q: Tensor) -> Tensor:
        if not self._takes_k:
            return (q > self.threshold) | one_hot_of_largest(q)
        return torch.zeros_like(q, dtype=torch.bool).scatter(-1, noisy.topk(self.k, dim=-1).indices, True)

    def _shared(self, logits: Tensor) -> Routing:
        first = torch.zeros_like(logits).index_fill(-1, torch.tensor([0], device=logits.device), 1.0)
        zero = logits.new_zeros(())
        losses = {"load_balance": zero, "z": zero} if self.training else {}
        return Routing(first.detach(), losses, {"scores": first.detach()}, most=1)

    def _losses(self, logits: Tensor, weights: Tensor, mask: Tensor) -> dict[str, Tensor]:
        if not self.training:
            return {}
        if self.balance == "official":
            balance = self.n_experts * (mean_over_tokens(weights) * mean_over_tokens(mask.to(weights.dtype))).sum()
        else:
            balance = load_balancing_loss(logits.softmax(-1), mask)
        return {"load_balance": balance, "z": router_z_loss(logits)}
