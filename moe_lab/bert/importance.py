"""How much each hidden neuron of a feed-forward layer matters (MoEBERT, Zuo et al. 2022; used by COMET-BERT).

Legend: N examples, S sequence, D width, F hidden width, L layers.

    I_h = mean over examples of | <W_1[h, :], dl/dW_1[h, :]> + <W_2[:, h], dl/dW_2[:, h]> |

l is the loss of *one* example, so gradients of a batch are of no use: they are added up before the absolute value is
taken. It is the first-order change of l when neuron h is deleted (its weights set to 0; biases are ignored).
Per-example gradients of weights would be N times as large as the model, and are not needed. With u = W_1 a (before the
bias) and v = act(u + b_1), both linear layers act on each token alone:

    <W_1[h, :], dl/dW_1[h, :]> = sum over tokens of u_h dl/du_h
    <W_2[:, h], dl/dW_2[:, h]> = sum over tokens of v_h dl/dv_h

exactly, and both factors are there after one backward pass of the summed loss, since an example's tokens influence no
other example's loss. A test compares this with autograd on the weights, one example at a time.

Where we differ: the authors sum over examples, we take the mean (the order, which is all that is used, is the same).
Their script runs on the *validation* set with its labels, the one that scores the result: a leak. Which rows are used
is up to the caller here; the experiment takes training rows unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from moe_lab.modes import keeping_modes


def neuron_importance(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    losses: Callable[[nn.Module, dict[str, Tensor]], Tensor],
) -> list[Tensor]:
    """I of every hidden neuron of every layer; dropout is off.

    Args:
        model: with an ``encoder`` in `check_layout`'s shape, without mixtures.
        batches: the examples.
        losses: (model, batch) -> (B,) loss of each example, not averaged. In classification that of the true label.

    Returns:
        L tensors (F,), float64, not negative, on the CPU.

    Raises:
        ValueError: no batches; losses that are not one number per example.
    """
    layers = list(model.encoder.encoder.layer)
    totals: list[Tensor | float] = [0.0] * len(layers)
    count = 0
    hidden: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(index: int, layer: nn.Module) -> list:
        def before(module: nn.Linear, _, out: Tensor) -> None:
            out.retain_grad()
            hidden[index] = (out, module.bias.detach())

        def after(_, args: tuple) -> None:
            args[0].retain_grad()
            hidden[index] = (*hidden[index], args[0])

        return [
            layer.intermediate.dense.register_forward_hook(before),
            layer.output.dense.register_forward_pre_hook(after),
        ]

    handles = [handle for index, layer in enumerate(layers) for handle in watch(index, layer)]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with keeping_modes(model), torch.enable_grad():
            model.eval()
            for parameter, _ in parameters:
                parameter.requires_grad_(False)  # no gradient of any weight is computed
            _start_graph_at_embeddings(model, handles)
            for batch in batches:
                each = losses(model, batch)
                if each.dim() != 1:
                    raise ValueError(f"losses must give one number per example, got shape {tuple(each.shape)}")
                each.sum().backward()
                count += len(each)
                for index, (u, bias, v) in hidden.items():
                    terms = (u.detach() - bias) * u.grad + v.detach() * v.grad  # (B, S, F)
                    totals[index] = totals[index] + terms.double().sum(1).abs().sum(0)
                hidden.clear()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, needed in parameters:
            parameter.requires_grad_(needed)
    if count == 0:
        raise ValueError("importance needs at least one batch")
    return [(total / count).cpu() for total in totals]


def _start_graph_at_embeddings(model: nn.Module, handles: list) -> None:
    """Activations need gradients although no weight does."""

    def start(_, __, out: Tensor) -> Tensor:
        return out.detach().requires_grad_()

    handles.append(model.encoder.embeddings.register_forward_hook(start))
