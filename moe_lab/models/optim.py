"""Adam for a recommender: embeddings updated row by row, or all of them at every step.

A batch of 512 touches at most 1,024 of MovieLens-1M's 9,992 embedding rows, yet Adam as Keras and PyTorch have it
updates all of them: a row that is absent still moves, by its decaying momentum, and its moments decay.

* ``"dense"``: exactly `torch.optim.Adam`. What the COMET authors trained with (Keras decays and applies the moments of
  absent rows, too).
* ``"lazy"``: a row that is absent is left alone, moments and all; the correction for bias counts *steps*, not the row's
  own updates: the semantics of `torch.optim.SparseAdam`. Rare rows keep their momentum between visits, so they follow
  another trajectory than under "dense"; rows that occur in every batch follow the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LazyAdam(torch.optim.Adam):
    """`torch.optim.Adam` (fused) in which parameters with *sparse* gradients are updated in the gradient's rows only.

    One optimizer with the usual ``step``, ``zero_grad``, ``param_groups``, ``state_dict``; no weight decay.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure=None):
        """One step. Returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_rows = [
            (p, p.grad, group)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and p.grad.is_sparse
        ]
        for p, grad, group in by_rows:
            self._step_rows(p, grad.coalesce(), group)
            p.grad = None
        super().step()
        for p, grad, _ in by_rows:
            p.grad = grad
        return loss

    def _step_rows(self, p: Tensor, grad: Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        rows, g = grad.indices()[0], grad.values()
        m = state["exp_avg"].index_select(0, rows).lerp_(g, 1 - beta1)
        v = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        state["exp_avg"].index_copy_(0, rows, m)
        state["exp_avg_sq"].index_copy_(0, rows, v)
        denominator = v.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        p.index_add_(0, rows, m.div_(denominator), alpha=-group["lr"] / (1 - beta1**step))


def recommender_adam(model: nn.Module, lr: float, *, embedding_updates: str = "dense", eps: float = 1e-7):
    """Adam for all parameters of ``model``.

    Args:
        model: a recommender.
        lr: learning rate.
        embedding_updates: "dense" or "lazy", see the module. Switches the embeddings' gradients to dense or sparse.
        eps: Keras's 1e-7 by default (PyTorch's own default is 1e-8).
    """
    if embedding_updates not in ("dense", "lazy"):
        raise ValueError(f"embedding_updates must be 'dense' or 'lazy', got {embedding_updates!r}")
    lazy = embedding_updates == "lazy"
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = lazy
    kind = LazyAdam if lazy else torch.optim.Adam
    return kind(model.parameters(), lr=lr, eps=eps, **({} if lazy else {"fused": True}))
