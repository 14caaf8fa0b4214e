"""The state of one `fit_stacked` and how it moves: step, epoch, who leaves. The counterpart of `trainer`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from moe_lab.batches import Batches
from moe_lab.modes import evaluating
from moe_lab.results.plain import to_plain
from moe_lab.train.checkpoint import check_agreement, save_checkpoint
from moe_lab.train.config import FitConfig, why_stop
from moe_lab.train.interrupts import InterruptLater
from moe_lab.train.meter import NonFiniteLoss, check_metrics, check_parameters
from moe_lab.train.stack import Trial, TrialStack
from moe_lab.train.stack_checkpoint import restore_stack, stack_content, stack_settings
from moe_lab.train.stack_meter import StackMeter
from moe_lab.train.stacked_adam import StackedAdam
from moe_lab.train.terms import check_coefficients, check_names


@dataclass
class StackTrainer:
    """One stack in training; the arguments are those of `fit_stacked`."""

    stack: TrialStack
    train: list[Batches]
    loss: Callable[[nn.Module, dict[str, Tensor]], Mapping[str, Tensor]]
    learning_rates: list[float]
    coefficients: list[dict[str, float]]
    config: FitConfig
    evaluate: Callable[[TrialStack], Sequence[Mapping[str, float]]] | None
    monitor: str
    inputs: Callable[[TrialStack, int, dict[str, Tensor]], Mapping[str, Tensor]] | None
    learning: Callable[[TrialStack], Mapping[str, Sequence[int]]] | None
    look_first: bool
    eps: float
    checkpoint: Path | None
    checkpoint_epochs: int

    def __post_init__(self) -> None:
        if self.config.patience is not None and self.evaluate is None:
            raise ValueError("patience needs evaluate: without it there is no metric to wait for")
        for weights in self.coefficients:
            check_coefficients(weights)
        self.all_trials = list(self.stack.trials)
        self.arrays = {name: array.to(self.stack.device) for name, array in self.train[0].arrays.items()}
        self.adam = StackedAdam(self.stack.parameters, self.eps)
        self.meter = StackMeter()
        self.best: dict[str, Tensor] | None = None
        self.steps, self.epoch, self.step_in_epoch, self.seconds = 0, 0, 0, 0.0
        self._between_steps, self._restored = True, False
        self._scheduled = {
            trial.index: [m for m in trial.model.modules() if callable(getattr(m, "advance", None))]
            for trial in self.all_trials
        }

    def run(self) -> None:
        """Train until every trial has ended."""
        per_epoch = len(self.train[0])
        most = min((self.config.epochs or math.inf) * per_epoch, self.config.max_steps or math.inf)
        bar = tqdm(total=most, initial=self.steps, disable=not self.config.progress, leave=False)
        try:
            with InterruptLater() as interrupts, bar:
                if self.look_first and not self._restored:
                    self._evaluate(interrupts)
                if not self._restored:
                    self.save()
                while self.stack.trials:
                    bar.set_description(f"epoch {self.epoch + 1}, {len(self.stack)} trials", refresh=False)
                    self._train_epoch(interrupts, bar)
                    self._close_epoch(interrupts)
                interrupts.check()
        except KeyboardInterrupt:
            if self._between_steps and self.steps:
                self.save()
            where = f"stopped by Ctrl-C in epoch {self.epoch + 1}, after step {self.steps}"
            how = f"the same call with resume=True goes on from {self.checkpoint}" if self.checkpoint else "not saved"
            raise KeyboardInterrupt(f"{where}; {how}") from None

    def _train_epoch(self, interrupts: InterruptLater, bar: tqdm) -> None:
        self.stack.template.train()
        began = time.perf_counter() - self.seconds
        order = torch.stack([self.train[trial.index].order(self.epoch) for trial in self.stack.trials])
        order = order.to(self.stack.device)
        every, size = self.config.checkpoint_every, self.train[0].batch_size
        for first in range(self.step_in_epoch * size, order.shape[1], size):
            if self.steps == self.config.max_steps:
                break
            rows = order[:, first : first + size]
            self._step({name: array[rows] for name, array in self.arrays.items()})
            self.seconds = time.perf_counter() - began
            bar.update()
            interrupts.check()
            if every and self.steps % every == 0:
                self.save()

    def _step(self, batch: dict[str, Tensor]) -> None:
        self._between_steps = False
        stack = self.stack
        more = self.inputs(stack, self.steps, batch) if self.inputs is not None else {}
        terms = stack.call(self.loss, {**batch, **more})
        if self.steps == 0:
            check_names({name: term[0] for name, term in terms.items()}, self.coefficients[0], first_step=True)
        total = self._total(terms)
        found = torch.autograd.grad(total.sum(), list(stack.parameters.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(stack.parameters, found, strict=True) if g is not None}
        norm = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        self.meter.record(self.steps + 1, terms, total, norm)
        if self.config.clip_norm is not None:
            scale = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = {name: g * scale.view(-1, *[1] * (g.dim() - 1)) for name, g in gradients.items()}
        learning = self.learning(stack) if self.learning is not None else None
        self.adam.step(stack.parameters, gradients, self._rate_tensor(self.steps + 1), self.steps + 1, learning)
        for trial in stack.trials:
            self._advance(trial)
        self.steps += 1
        self.step_in_epoch += 1
        self._between_steps = True

    def _total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """(K,) weighted sums. A term that no trial weighs is left out, as in `weighted_total`."""
        parts = []
        for name, term in terms.items():
            if any(self.coefficients[trial.index][name] for trial in self.stack.trials):
                parts.append(self._column(name) * term)
        if not parts:
            raise ValueError(f"all coefficients of the terms {list(terms)} are 0: nothing to learn from")
        return torch.stack(parts).sum(0)

    def _column(self, name: str) -> Tensor:
        """(K,) the trials' coefficients of this term."""
        return self.stack.numbers(f"coefficient of {name}", lambda trial: self.coefficients[trial.index][name])

    def _share(self, step: int) -> float:
        return 1.0 if self.config.learning_rate is None else self.config.learning_rate(step)

    def _rates(self, step: int) -> list[float]:
        return [self._share(step) * self.learning_rates[trial.index] for trial in self.stack.trials]

    def _rate_tensor(self, step: int) -> Tensor:
        rates = self.stack.numbers("learning rate", lambda trial: self.learning_rates[trial.index], torch.float64)
        return self._share(step) * rates

    def _advance(self, trial: Trial) -> None:
        for module in self._scheduled[trial.index]:
            try:
                module.advance()
            except ValueError:
                # No permutation can be read off NaN. The meter knows the step; the epoch's end removes the trial.
                if all(bool(p.isfinite().all()) for p in module.parameters()):
                    raise

    def _close_epoch(self, interrupts: InterruptLater) -> None:
        began = time.perf_counter()
        n_living = len(self.stack)
        self._remove_spoiled()
        rows = [
            {"epoch": self.epoch + 1, "step": self.steps, **self.meter.means(row), "lr": rate}
            for row, rate in enumerate(self._rates(self.steps))
        ]
        metrics = self._evaluate(interrupts)
        self.epoch += 1
        seconds = (self.seconds + time.perf_counter() - began) / n_living
        improved = []
        for place, (trial, row, measured) in enumerate(zip(self.stack.trials, rows, metrics, strict=True)):
            if self._note(trial, row, measured, seconds):
                improved.append(place)
        self._keep_best(improved)
        self.step_in_epoch, self.seconds = 0, 0.0
        self.meter.reset()
        self._remove([place for place, trial in enumerate(self.stack.trials) if trial.ended])
        if self.epoch % self.checkpoint_epochs == 0 or not self.stack.trials:
            self.save()

    def _note(self, trial: Trial, row: dict[str, Any], measured: dict[str, Any], seconds: float) -> bool:
        """Finish the epoch of one trial; whether it is its best so far."""
        if taken := set(measured) & {*row, "seconds"}:
            raise ValueError(f"evaluate must not use the names {sorted(taken)}: they belong to fit_stacked")
        history = trial.history
        history.steps = self.steps
        try:
            if self.evaluate is not None:
                check_metrics(measured, self.monitor, self.epoch)
        except NonFiniteLoss as error:
            trial.failed = str(error)
            return False
        history.rows.append({**row, **measured, "seconds": seconds})
        better = bool(measured) and (history.best_value is None or measured[self.monitor] < history.best_value)
        if better:
            history.best_value, history.best_epoch = measured[self.monitor], self.epoch
            trial.best_buffers = trial.buffers()
        history.stopped = why_stop(self.config, history)
        return better

    def _keep_best(self, places: list[int]) -> None:
        if not places:
            return
        if self.best is None:
            self.best = {name: value.detach().clone() for name, value in self.stack.parameters.items()}
        index = torch.tensor(places, device=self.stack.device)
        for name, value in self.best.items():
            value.index_copy_(0, index, self.stack.parameters[name].detach().index_select(0, index))

    def _remove_spoiled(self) -> None:
        """Trials in which something was not a number leave, so that nobody evaluates them."""
        self.meter.flush()
        finite = torch.stack([p.detach().flatten(1).isfinite().all(1) for p in self.stack.parameters.values()]).all(0)
        for place, (trial, fine) in enumerate(zip(self.stack.trials, finite.tolist(), strict=True)):
            trial.failed = self.meter.bad.get(place, "")
            if not trial.failed and not fine:
                try:
                    check_parameters(trial.model, self.steps)
                except NonFiniteLoss as error:
                    trial.failed = str(error)
        gone = [place for place, trial in enumerate(self.stack.trials) if trial.failed]
        self.meter.keep([place for place in range(len(self.stack)) if place not in gone])
        self._remove(gone)

    def _remove(self, places: list[int]) -> None:
        """Give these trials their best weights and take their rows out of the stack."""
        if not places:
            return
        for place in places:
            trial = self.stack.trials[place]
            chosen = trial.history.best_epoch is not None
            source = self.best if chosen else self.stack.parameters
            buffers = trial.best_buffers if chosen else trial.buffers()
            trial.load({name: value[place] for name, value in source.items()}, buffers)
            trial.best_buffers = {}
        rows = [place for place in range(len(self.stack)) if place not in set(places)]
        self.stack.keep(rows)
        self.adam.keep(rows)
        if self.best is not None:
            index = torch.tensor(rows, dtype=torch.int64, device=self.stack.device)
            self.best = {name: value.index_select(0, index) for name, value in self.best.items()}

    def _evaluate(self, interrupts: InterruptLater) -> list[dict[str, Any]]:
        if self.evaluate is None or not self.stack.trials:
            return [{} for _ in self.stack.trials]
        curves = [{name: list(rows) for name, rows in trial.curves.items()} for trial in self.stack.trials]
        try:
            with interrupts.at_once(), evaluating(self.stack.template):
                metrics = [to_plain(row, "evaluate(stack)") for row in self.evaluate(self.stack)]
        except KeyboardInterrupt:  # as if it had not begun: the checkpoint then says "epoch trained, not evaluated"
            for trial, before in zip(self.stack.trials, curves, strict=True):
                trial.curves = before
            raise
        if len(metrics) != len(self.stack):
            raise ValueError(f"evaluate must answer for each of the {len(self.stack)} trials, got {len(metrics)}")
        return metrics

    def save(self) -> None:
        """Write the checkpoint."""
        self.meter.flush()
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, stack_content(self))

    def restore(self, content: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state."""
        assert self.checkpoint is not None
        check_agreement(self.checkpoint, content["settings"], stack_settings(self))
        restore_stack(self, content)
        self._restored = True
