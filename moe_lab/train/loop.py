"""`fit`: the only training loop.

One step: loss terms by name, weighted total, gradients, alarm if anything is not finite, clipping, optimiser, and
``advance()`` on each module that has a schedule (temperature, permutation search, alternating phases). What is special
to a paper is in the loss function or in a module, not here.

Seeds. `fit` seeds nothing: the caller seeds (`runtime.seed_everything`) before the model is built, and `Batches` has
its own seed. Given both, a run on a CPU with a fixed number of threads is deterministic, and one that was killed and
resumed is bit-identical to one that was not, provided that random draws come from the global generators or from
`torch.Generator` attributes of modules, and that all state which steps change is in ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lab.batches import Batches
from moe_lab.modes import keeping_modes
from moe_lab.results import Result
from moe_lab.runtime import configure_threads, environment
from moe_lab.train.checkpoint import load_checkpoint, remove_checkpoint
from moe_lab.train.config import FitConfig, History
from moe_lab.train.trainer import Trainer


def fit(
    model: nn.Module,
    train: Batches,
    loss: Callable[[Any, dict[str, Tensor]], Mapping[str, Tensor]],
    *,
    optimizer: Optimizer | Sequence[Optimizer],
    coefficients: Mapping[str, float],
    config: FitConfig,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    monitor: str = "valid_loss",
    result: Result | None = None,
    curve: str = "epochs",
    checkpoint: Path | str | None = None,
    resume: bool = False,
) -> History:
    """Train ``model`` in place; at the end it has the weights of the best epoch, always.

    Args:
        model: on the device of ``train``. Set to training mode for each epoch; a frozen part that must stay in eval
            mode overrides ``train``. A module with a method ``advance()`` is told after each optimiser step.
        train: the batches.
        loss: (model, batch) -> named terms, unweighted scalars. A term that starts later is zero until then; a term may
            disappear.
        optimizer: one, or several that all step at each step (sparse embeddings beside dense weights). Parameters
            without a gradient are left alone: that is how phases alternate.
        coefficients: term -> weight in the total. 0.0: the term is only logged.
        config: see `FitConfig`.
        evaluate: model -> metrics, once per epoch, in `evaluating`; large sets in as many pieces as it likes. Should it
            log to ``result``, those rows survive kill and resume like the others.
        monitor: the metric that chooses the best epoch; smaller is better, a tie keeps the earlier epoch.
        result: gets a row per epoch in ``curves[curve]`` and is saved then; marked ``interrupted`` or ``failed``.
        curve: the name to use if one Result sees more than one `fit`; each has its own checkpoint.
        checkpoint: file; default: beside the Result. Without both nothing is saved. Written at the start, after each
            epoch (less often if that takes seconds, see `trainer`), every ``config.checkpoint_every`` steps, on Ctrl-C,
            and at the end.
        resume: go on from the checkpoint if there is one (a finished one: restore and return); otherwise start, and
            delete it.

    Returns:
        `History`, of the whole run, not only of this process.

    Raises:
        ValueError: terms, coefficients, or metrics do not fit together; checkpoint of a different run.
        NonFiniteLoss: says which term, gradient or parameter, at which step, and what to try. The checkpoint on disk
            is from before.
        DamagedCheckpoint: resume from files that cannot be read.
        KeyboardInterrupt: Ctrl-C; a checkpoint is saved first, the message says how to go on.
    """
    configure_threads()
    if checkpoint is None and result is not None:
        checkpoint = result.checkpoint_of(curve)
    path = Path(checkpoint) if checkpoint is not None else None
    if resume and path is None:
        raise ValueError("resume=True needs a checkpoint file: give result= or checkpoint=")
    trainer = Trainer(
        model,
        train,
        loss,
        optimizers=[optimizer] if isinstance(optimizer, Optimizer) else list(optimizer),
        coefficients=dict(coefficients),
        config=config,
        evaluate=evaluate,
        monitor=monitor,
        result=result,
        curve=curve,
        checkpoint=path,
    )
    if path is not None and resume:
        content = load_checkpoint(path)
        if content is not None:
            trainer.restore(content)
    elif path is not None:
        remove_checkpoint(path)
    if trainer.history.stopped:
        return trainer.history
    if result is not None:
        result.environment = environment(train.device)
    with keeping_modes(model), result.recording() if result is not None else nullcontext():
        trainer.run()
    return trainer.history
