"""The state of one `fit` and how it moves: step, epoch, checkpoint.

What makes resuming exact: a checkpoint is only written between two steps (`_between_steps`); it holds everything that
the next step depends on; and it holds the Result's curves, so that a Result that was saved earlier or later than the
checkpoint does not matter.

How often: after each epoch, as long as writing one takes less than `_LONG` seconds. Checkpoints of a large model
(weights, two moments and the best weights: gigabytes) are written after an epoch if since the last one 20 times as long
has passed, and after the last epoch: a process that is killed loses up to that, and an epoch.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from moe_lab.batches import Batches
from moe_lab.modes import evaluating
from moe_lab.results import Result
from moe_lab.results.plain import to_plain
from moe_lab.train.checkpoint import check_agreement, rng_state, save_checkpoint, set_rng_state
from moe_lab.train.config import FitConfig, History, why_stop
from moe_lab.train.interrupts import InterruptLater
from moe_lab.train.meter import Meter, check_metrics, check_parameters
from moe_lab.train.settings import settings_of
from moe_lab.train.terms import check_coefficients, check_names, clip, gradients, weighted_total

_LONG, _SHARE = 1.0, 0.05


@dataclass
class Trainer:
    """One training run; the arguments are those of `fit`."""

    model: nn.Module
    train: Batches
    loss: Callable[[Any, dict[str, Tensor]], Mapping[str, Tensor]]
    optimizers: list[Optimizer]
    coefficients: dict[str, float]
    config: FitConfig
    evaluate: Callable[[Any], Mapping[str, float]] | None
    monitor: str
    result: Result | None
    curve: str
    checkpoint: Path | None

    def __post_init__(self) -> None:
        if self.config.patience is not None and self.evaluate is None:
            raise ValueError("patience needs evaluate: without it there is no metric to wait for")
        check_coefficients(self.coefficients)
        self.history = History()
        self.epoch, self.step_in_epoch, self.seconds = 0, 0, 0.0
        self.meter = Meter(self.model, on_gpu=self.train.device.type == "cuda")
        self.best: dict[str, Any] | None = None
        self._scheduled = [module for module in self.model.modules() if callable(getattr(module, "advance", None))]
        self._between_steps = True
        self._written, self._writing = 0.0, 0.0  # when the last checkpoint was, and how long it took
        monitor = self.monitor if self.evaluate else None
        self._settings = settings_of(self.model, self.train, self.optimizers, self.coefficients, self.config, monitor)

    def run(self) -> None:
        """Train until the config says stop."""
        steps = min((self.config.epochs or math.inf) * len(self.train), self.config.max_steps or math.inf)
        bar = tqdm(total=steps, initial=self.history.steps, disable=not self.config.progress, leave=False)
        try:
            with InterruptLater() as interrupts, bar:
                if self.history.steps == 0:
                    self.save()
                while not self.history.stopped:
                    bar.set_description(f"epoch {self.epoch + 1}", refresh=False)
                    self._train_epoch(interrupts, bar)
                    self._close_epoch(interrupts)
                interrupts.check()
        except KeyboardInterrupt:
            if self._between_steps:
                self.save()
            where = f"stopped by Ctrl-C in epoch {self.epoch + 1}, after step {self.history.steps}"
            how = f"the same call with resume=True goes on from {self.checkpoint}" if self.checkpoint else "not saved"
            raise KeyboardInterrupt(f"{where}; {how}") from None

    def _train_epoch(self, interrupts: InterruptLater, bar: tqdm) -> None:
        self.model.train()
        began = time.perf_counter() - self.seconds
        every = self.config.checkpoint_every
        for batch in self.train.epoch(self.epoch, start=self.step_in_epoch):
            if self.history.steps == self.config.max_steps:
                break
            self._step(batch)
            self.seconds = time.perf_counter() - began
            bar.update()
            if "train_loss" in self.meter.sums:
                bar.set_postfix_str(f"loss {self.meter.means()['train_loss']:.4f}", refresh=False)
            interrupts.check()
            if every and self.history.steps % every == 0:
                self.save()

    def _step(self, batch: dict[str, Tensor]) -> None:
        self._between_steps = False
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        terms = self.loss(self.model, batch)
        check_names(terms, self.coefficients, first_step=self.history.steps == 0)
        total = weighted_total(terms, self.coefficients)
        total.backward()
        found = gradients(self.model)
        norm = torch.nn.utils.get_total_norm(found).to(total.device)
        self.meter.record(self.history.steps + 1, terms, total, norm)
        if self.config.clip_norm is not None:
            clip(found, norm, self.config.clip_norm)
        self._set_learning_rates()
        for optimizer in self.optimizers:
            optimizer.step()
        for module in self._scheduled:
            module.advance()
        self.history.steps += 1
        self.step_in_epoch += 1
        self._between_steps = True

    def _set_learning_rates(self) -> None:
        if self.config.learning_rate is None:
            return
        share = self.config.learning_rate(self.history.steps + 1)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])  # as PyTorch's schedulers name it

    def _close_epoch(self, interrupts: InterruptLater) -> None:
        began = time.perf_counter()
        self.meter.flush()
        check_parameters(self.model, self.history.steps)
        row: dict[str, Any] = {"epoch": self.epoch + 1, "step": self.history.steps, **self.meter.means()}
        row["lr"] = float(self.optimizers[0].param_groups[0]["lr"])
        metrics = self._evaluate(interrupts)
        if taken := set(metrics) & {*row, "seconds"}:
            raise ValueError(f"evaluate must not use the names {sorted(taken)}: they belong to fit")
        row |= metrics
        self.epoch += 1
        if metrics and (self.history.best_value is None or row[self.monitor] < self.history.best_value):
            self.history.best_value, self.history.best_epoch = row[self.monitor], self.epoch
            self.best = copy.deepcopy(self.model.state_dict())
        row["seconds"] = self.seconds + time.perf_counter() - began
        self.step_in_epoch, self.seconds = 0, 0.0
        self.meter.reset()
        self.history.rows.append(row)
        self.history.stopped = why_stop(self.config, self.history)
        if self.history.stopped and self.best is not None:
            self.model.load_state_dict(self.best)
        if self.result is not None:
            self.result.log(self.curve, **row)
        since = time.perf_counter() - self._written
        if self.history.stopped or self._writing <= max(_LONG, _SHARE * since):
            self.save()
        elif self.result is not None:
            self.result.save()

    def _evaluate(self, interrupts: InterruptLater) -> dict[str, Any]:
        if self.evaluate is None:
            return {}
        rng = rng_state(self.model)
        curves = self._curves()
        try:
            with interrupts.at_once(), evaluating(self.model):
                metrics = to_plain(self.evaluate(self.model), "evaluate(model)")
        except KeyboardInterrupt:  # as if it had not begun: the checkpoint then says "epoch trained, not evaluated"
            set_rng_state(self.model, rng)
            if self.result is not None:
                self.result.curves = curves
            raise
        check_metrics(metrics, self.monitor, self.epoch + 1)
        return metrics

    def _curves(self) -> dict[str, list[dict[str, Any]]]:
        return {name: list(rows) for name, rows in self.result.curves.items()} if self.result is not None else {}

    def save(self) -> None:
        """Write the checkpoint, then the Result."""
        self.meter.flush()
        began = time.perf_counter()
        if self.checkpoint is not None:
            check_parameters(self.model, self.history.steps)
            content = {
                "settings": self._settings,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "best": self.best,
                "rng": rng_state(self.model),
                "history": asdict(self.history),
                "position": {"epoch": self.epoch, "step_in_epoch": self.step_in_epoch, "seconds": self.seconds},
                "meter": {"sums": self.meter.sums, "counts": self.meter.counts},
                "curves": self._curves(),
            }
            save_checkpoint(self.checkpoint, content)
            self._written = time.perf_counter()
            self._writing = self._written - began
        if self.result is not None:
            self.result.save()

    def restore(self, content: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state."""
        assert self.checkpoint is not None
        check_agreement(self.checkpoint, content["settings"], self._settings)
        self.model.load_state_dict(content["model"])
        for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.best = content["best"]
        set_rng_state(self.model, content["rng"])
        self.history = History(**content["history"])
        self.epoch, self.step_in_epoch = content["position"]["epoch"], content["position"]["step_in_epoch"]
        self.seconds = content["position"]["seconds"]
        self.meter.sums, self.meter.counts = content["meter"]["sums"], content["meter"]["counts"]
        if self.result is not None:
            self.result.curves = content["curves"]
