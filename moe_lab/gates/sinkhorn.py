"""Sinkhorn: from a square matrix of logits to a doubly stochastic matrix, and from there to a permutation.

Sinkhorn and Knopp (1967); as a layer: Mena et al., ICLR 2018; in COMET (KDD 2023, supplement): the soft step of the
local search. Legend: Q matrices, E outputs of the gate (rows) and experts (columns).

    A_0 = L / tau                                        (``scaled_logits``, (Q, E, E))
    A   <- A - logsumexp over columns                    rows of exp(A) sum to 1
    A   <- A - logsumexp over rows                       columns of exp(A) sum to 1, rows no longer quite
    P   = exp(A) after N such iterations

    Pi  = the permutation that maximises sum_i L[i, Pi(i)]   (``best_assignment``: P for tau -> 0, N -> inf)

The colder the temperature, the more iterations are needed; stopped too early, P has columns that sum to 1 and rows that
do not: one output of the gate owns two experts, another none. ``row_error`` is the number to watch.

The loop runs as *one* opaque operator with its own backward, so that torch.compile neither unrolls 300 small kernels
nor compiles again when the number of iterations changes. Its backward is the loop read from the end: a
log-normalisation y = a - logsumexp(a) sends the gradient g back as g - exp(y) sum(g). Half-steps are recomputed, not
stored.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.autograd.function import once_differentiable


def _half_steps(scaled_logits: Tensor, iterations: int, tolerance: float) -> list[Tensor]:
    """Logarithms after every half-step, rows and columns in turn."""
    steps = []
    current = scaled_logits
    for _ in range(iterations):
        rows = current.log_softmax(-1)
        current = rows.log_softmax(-2)
        steps += [rows, current]
        if tolerance > 0 and row_error(current.exp()).amax() < tolerance:
            break
    return steps


@torch.library.custom_op("moe_lab::sinkhorn", mutates_args=())
def _sinkhorn(scaled_logits: Tensor, iterations: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    steps = _half_steps(scaled_logits, int(iterations), tolerance)
    return steps[-1].exp(), torch.tensor(len(steps) // 2)


@_sinkhorn.register_fake
def _(scaled_logits: Tensor, iterations: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scaled_logits), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("moe_lab::sinkhorn_backward", mutates_args=())
def _sinkhorn_backward(scaled_logits: Tensor, iterations: Tensor, gradient: Tensor) -> Tensor:
    steps = _half_steps(scaled_logits, int(iterations), 0.0)
    gradient = gradient * steps[-1].exp()
    while steps:
        gradient = gradient - steps.pop().exp() * gradient.sum(-2, keepdim=True)
        gradient = gradient - steps.pop().exp() * gradient.sum(-1, keepdim=True)
    return gradient


@_sinkhorn_backward.register_fake
def _(scaled_logits: Tensor, iterations: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(scaled_logits)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[1])


def _backward(ctx, gradient: Tensor, _: Tensor):
    scaled_logits, used = ctx.saved_tensors
    return _sinkhorn_backward(scaled_logits, used, gradient), None, None


_sinkhorn.register_autograd(_backward, setup_context=_save)


def sinkhorn(scaled_logits: Tensor, iterations: int | Tensor, tolerance: float = 0.0) -> Tensor:
    """P (..., E, E): non-negative, columns sum to 1, rows approximately (see ``row_error``).

    Args:
        scaled_logits: L / tau, (..., E, E), finite. float32 or float64; lower precision is computed in float32.
        iterations: at most this many (rows, then columns); an integer tensor avoids recompilation when it changes.
        tolerance: stop earlier when every row of every matrix sums to 1 within this; 0: never.

    Raises:
        ValueError: not square, or no iteration.
    """
    if scaled_logits.dim() < 2 or scaled_logits.shape[-1] != scaled_logits.shape[-2]:
        raise ValueError(f"Sinkhorn needs square matrices (..., E, E), got shape {tuple(scaled_logits.shape)}")
    if not isinstance(iterations, Tensor):
        if iterations < 1:
            raise ValueError(f"Sinkhorn needs at least 1 iteration, got {iterations}")
        iterations = torch.tensor(iterations)
    if scaled_logits.dtype != torch.float64:
        scaled_logits = scaled_logits.float()
    return _sinkhorn(scaled_logits, iterations, float(tolerance))[0]


class _SinkhornEach(torch.autograd.Function):
    """The loop of `_sinkhorn` and its backward; a matrix that is done keeps its values while the others go on."""

    @staticmethod
    def forward(ctx, scaled_logits: Tensor, iterations: Tensor, tolerance: float) -> Tensor:
        current, steps = scaled_logits, []
        used = torch.zeros_like(iterations)
        active = torch.ones_like(iterations, dtype=torch.bool)
        while bool(active.any()):
            rows = current.log_softmax(-1)
            columns = rows.log_softmax(-2)
            steps += [rows, columns]
            current = torch.where(active[:, None, None], columns, current)
            used += active
            active = active & (used < iterations)
            if tolerance > 0:
                active = active & (row_error(current.exp()) >= tolerance)  # NaN is done, too
        ctx.steps, ctx.used = steps, used
        ctx.save_for_backward(current)
        return current.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (current,) = ctx.saved_tensors
        gradient = gradient * current.exp()
        for step in range(len(ctx.steps) // 2 - 1, -1, -1):
            rows, columns = ctx.steps[2 * step : 2 * step + 2]
            back = gradient - columns.exp() * gradient.sum(-2, keepdim=True)
            back = back - rows.exp() * back.sum(-1, keepdim=True)
            gradient = torch.where((step < ctx.used)[:, None, None], back, gradient)
        return gradient, None, None


def sinkhorn_each(scaled_logits: Tensor, iterations: Tensor, tolerance: float = 0.0, most: int | None = None) -> Tensor:
    """`sinkhorn` of K matrices that have nothing to do with each other, each with its own number of iterations.

    `sinkhorn` stops all its matrices together, so the result of one depends on the others. Here each stops by itself:
    row k is what ``sinkhorn(scaled_logits[k], iterations[k], tolerance)`` gives.

    Args:
        scaled_logits: (K, E, E), float32 or float64, finite (a matrix with NaN stays NaN and disturbs nobody).
        iterations: (K,) int64, at least 1, on the same device.
        tolerance: as in `sinkhorn`.
        most: no matrix has more iterations. Saves a look at ``iterations``, which waits for the device.

    Returns:
        (K, E, E). In one kernel where Triton can run (`sinkhorn_kernels`).
    """
    if scaled_logits.dim() != 3 or scaled_logits.shape[-1] != scaled_logits.shape[-2]:
        raise ValueError(f"need K square matrices (K, E, E), got shape {tuple(scaled_logits.shape)}")
    if iterations.shape != scaled_logits.shape[:1]:
        raise ValueError(f"need one number of iterations per matrix, got {tuple(iterations.shape)}")
    from moe_lab.gates import sinkhorn_kernels  # only here: Triton takes a while to import

    if sinkhorn_kernels.usable(scaled_logits):
        most = int(iterations.max()) if most is None else most
        return sinkhorn_kernels.SinkhornKernels.apply(scaled_logits, iterations, float(tolerance), most)
    return _SinkhornEach.apply(scaled_logits, iterations, float(tolerance))


@torch.library.custom_op("moe_lab::best_assignment", mutates_args=())
def _best_assignment(scores: Tensor) -> Tensor:
    matrices = scores.double().cpu().reshape(-1, *scores.shape[-2:]).numpy()
    columns = [torch.as_tensor(linear_sum_assignment(matrix, maximize=True)[1]) for matrix in matrices]
    return torch.stack(columns).reshape(scores.shape[:-1]).to(scores.device)


@_best_assignment.register_fake
def _(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape[:-1], dtype=torch.int64)


def best_assignment(scores: Tensor) -> Tensor:
    """Hungarian method: pi (..., E) int64, the permutation with the largest sum_i scores[i, pi(i)].

    On logits this is the zero-temperature limit of Sinkhorn; on a soft P it is what the authors' code takes. The two
    differ when P is far from a permutation. Raises ValueError for non-finite scores (scipy).
    """
    return _best_assignment(scores.detach())


def permutation_matrix(assignment: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pi (..., E, E): 1 at (i, assignment[i]), exact zeros elsewhere."""
    return torch.nn.functional.one_hot(assignment, assignment.shape[-1]).to(dtype)


def row_error(matrix: Tensor) -> Tensor:
    """(...) how far the worst row of each matrix (..., E, E) is from summing to 1; 0 for a permutation."""
    return (matrix.sum(-1) - 1).abs().amax(-1)


def soft_hard_distance(soft: Tensor, hard: Tensor) -> Tensor:
    """(...) Frobenius norm of P - Pi: 0 when nothing jumps at hardening, sqrt(2 E) when every row moves."""
    return (soft - hard).square().sum((-2, -1)).sqrt()


def permutation_entropy(soft: Tensor) -> Tensor:
    """The local search's regulariser H(P) + H(P with rows normalised), nats, a scalar; unweighted.

    H is sum_{i,l} -p log(p + 1e-6), mean over the matrices. 0 for a permutation, 2 E log E for a uniform matrix.
    """
    by_rows = soft / soft.sum(-1, keepdim=True)
    entropies = [-(p * (p + 1e-6).log()).sum((-2, -1)).mean() for p in (soft, by_rows)]
    return entropies[0] + entropies[1]
