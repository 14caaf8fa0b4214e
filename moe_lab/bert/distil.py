"""Terms that draw a student towards its teacher (COMET-BERT, supplement; as MoEBERT).

Legend: B batch, S sequence, D width, L layers, Y classes.

    layers        sum over l = 0 .. L of MSE(H_l of the student, H_l of the teacher)      embeddings are layer 0
    predictions   mean over examples of 1/2 sum_y (p - q)(log p - log q)                   symmetric KL, nats
                  regression: MSE of the outputs; answers in a text: mean of start and end

H: mean over real tokens. ``padding=True`` averages over all positions, as the authors' code does: the value then
depends on how much padding a batch happens to have. Terms are unweighted; the coefficients are the experiment's.

Where we differ: the authors' teacher is a part of the student, so that ``train()`` switches its dropout on. Keep it
outside, in eval mode, under ``no_grad``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], seen: Tensor, *, padding: bool = False) -> Tensor:
    """Sum over layers of mean squared errors, a scalar.

    Args:
        student, teacher: L + 1 tensors (B, S, D) each, embeddings first.
        seen: (B, S) bool, real tokens.
        padding: average over padding too.

    Raises:
        ValueError: other numbers of layers.
    """
    if len(student) != len(teacher):
        raise ValueError(f"the student has {len(student)} hidden states, the teacher {len(teacher)}")
    counted = torch.ones_like(seen) if padding else seen
    squares = [(s.float() - t.float()).square().mean(-1) for s, t in zip(student, teacher, strict=True)]
    return (torch.stack(squares).sum(0) * counted).sum() / counted.sum().clamp(min=1)


def prediction_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """How far apart two predictions are, a scalar, 0 if equal.

    Args:
        student, teacher: logits (B, Y), or (B, 2, S) for start and end; (B, 1): outputs of a regression.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"predictions of shapes {tuple(student.shape)} and {tuple(teacher.shape)}")
    student, teacher = student.float(), teacher.float()
    if student.dim() == 2 and student.shape[1] == 1:
        return (student - teacher).square().mean()
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    return (0.5 * (log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()
