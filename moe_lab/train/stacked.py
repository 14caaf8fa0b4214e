"""`fit_stacked`: what `fit` does, for many small models of one shape at once.

Legend: K living trials.

    all trials:  theta_k <- Adam(theta_k, grad_k, lr_k),   grad of sum_k total_k: total_k depends on theta_k alone

Why `fit` cannot do it, though there is one training loop otherwise. `fit` asks one model for one loss, and its rules
are about one run: one history, one best epoch, one reason to stop, an exception when something is not a number. Here
each of these has a value per trial, rows leave the stack at different epochs, and one trial that diverges must not
stop the others; a `fit` with all that would be hard to read for everybody who trains one model. What can be shared is:
`FitConfig`, `History` with the same rows, `why_stop`, the checks of names and metrics, the checkpoint files, the
handling of Ctrl-C. A trial follows the trajectory that `fit` would give it, up to rounding (tested).

Randomness. Nothing is drawn from a global generator: the order of rows is `Batches`' own function of (seed, epoch), and
random inputs such as dropout masks are functions of (seed, step), see `counted_dropout`. So a trial does not depend on
its neighbours, and a resumed stack on a CPU goes on bit for bit. How many trials share the arithmetic may change the
last bit of a float, because matrix products may be added up in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from moe_lab.batches import Batches
from moe_lab.runtime import configure_threads
from moe_lab.train.checkpoint import load_checkpoint, remove_checkpoint
from moe_lab.train.config import FitConfig
from moe_lab.train.stack import Trial, TrialStack
from moe_lab.train.stack_trainer import StackTrainer


def fit_stacked(
    models: Sequence[nn.Module],
    train: Sequence[Batches],
    loss: Callable[[nn.Module, dict[str, Tensor]], Mapping[str, Tensor]],
    *,
    learning_rates: Sequence[float],
    coefficients: Sequence[Mapping[str, float]],
    config: FitConfig,
    template: nn.Module | None = None,
    evaluate: Callable[[TrialStack], Sequence[Mapping[str, float]]] | None = None,
    monitor: str = "valid_loss",
    inputs: Callable[[TrialStack, int, dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
    learning: Callable[[TrialStack], Mapping[str, Sequence[int]]] | None = None,
    look_first: bool = False,
    eps: float = 1e-7,
    checkpoint: Path | str | None = None,
    checkpoint_epochs: int = 1,
    resume: bool = False,
) -> list[Trial]:
    """Train all models; each ends with the weights of its own best epoch, on the CPU.

    Args:
        models: one per trial, of one shape, on the CPU; changed in place. Modules with ``advance()`` are told after
            each step.
        train: one per trial: equally many rows, one batch size, the same arrays; only their seeds differ. Their device
            is where everything runs.
        loss: (model, inputs) -> named terms of *one* trial, unweighted scalars. It runs on ``template`` under
            `torch.func.vmap`, so nothing in it may depend on a value, draw, or change anything.
        learning_rates: of Adam, one per trial.
        coefficients: term -> weight in the total, one mapping per trial, all with the same terms.
        config: shared. A trial stops by its own patience. ``checkpoint_every`` and ``learning_rate`` as in `fit`.
        template: see `TrialStack`; default: a copy of the first model.
        evaluate: stack -> metrics of each living trial, in order, once per epoch, without gradients. It may `log`.
        monitor: the metric that chooses the best epoch; smaller is better, a tie keeps the earlier epoch.
        inputs: (stack, step, batch) -> more inputs of the loss, name -> (K, ...): masks, widths, matrices. May carry
            gradients to ``stack.parameters``. Steps count from 0.
        learning: stack -> name -> rows that still learn; parameters that are not named always do.
        look_first: evaluate once before the first step, for what that logs.
        eps: of Adam.
        checkpoint: file, written at the start, every ``checkpoint_epochs`` epochs, on Ctrl-C and at the end.
        checkpoint_epochs: a stack is large: a checkpoint holds weights, two moments and best weights of all trials.
        resume: go on from the checkpoint if there is one.

    Returns:
        One `Trial` per model, in order. A trial that diverged has ``failed`` and the history up to then.

    Raises:
        ValueError: lists of different lengths, models or batches that cannot stack, checkpoint of another stack.
        DamagedCheckpoint, KeyboardInterrupt: as in `fit`.
    """
    configure_threads()
    path = Path(checkpoint) if checkpoint is not None else None
    if resume and path is None:
        raise ValueError("resume=True needs a checkpoint file")
    if checkpoint_epochs < 1:
        raise ValueError(f"checkpoint_epochs must be at least 1, got {checkpoint_epochs}")
    _check(models, train, learning_rates, coefficients)
    trainer = StackTrainer(
        TrialStack(models, template, train[0].device),
        list(train),
        loss,
        learning_rates=list(learning_rates),
        coefficients=[dict(weights) for weights in coefficients],
        config=config,
        evaluate=evaluate,
        monitor=monitor,
        inputs=inputs,
        learning=learning,
        look_first=look_first,
        eps=eps,
        checkpoint=path,
        checkpoint_epochs=checkpoint_epochs,
    )
    if path is not None and resume:
        content = load_checkpoint(path)
        if content is not None:
            trainer.restore(content)
    elif path is not None:
        remove_checkpoint(path)
    trainer.run()
    return trainer.all_trials


def _check(
    models: Sequence[nn.Module],
    train: Sequence[Batches],
    learning_rates: Sequence[float],
    coefficients: Sequence[Mapping[str, float]],
) -> None:
    counts = {
        "models": len(models),
        "train": len(train),
        "learning_rates": len(learning_rates),
        "coefficients": len(coefficients),
    }
    if len(set(counts.values())) > 1:
        raise ValueError(f"each trial needs a model, batches, a learning rate and coefficients; got {counts}")
    if not models:
        raise ValueError("a stack needs at least one model")
    if any(not rate > 0 for rate in learning_rates):
        raise ValueError(f"learning rates must be positive, got {list(learning_rates)}")
    if any(weights.keys() != coefficients[0].keys() for weights in coefficients):
        raise ValueError("all trials of a stack need the same loss terms; use 0.0 where a trial does without one")
    first = train[0]
    for index, batches in enumerate(train):
        same_rows = batches.n_rows == first.n_rows and batches.arrays.keys() == first.arrays.keys()
        if not same_rows or any(batches.arrays[name] is not array for name, array in first.arrays.items()):
            raise ValueError(f"train[{index}] has other arrays than train[0]: the trials of a stack share their data")
        if batches.batch_size != first.batch_size:
            raise ValueError(
                f"train[{index}] has batches of {batches.batch_size} rows, train[0] of {first.batch_size}: "
                "trials with different batch sizes belong to different stacks"
            )
