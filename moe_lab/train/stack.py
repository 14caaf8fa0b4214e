"""Several models of one shape as one stack of tensors: the K-th row of everything is trial K.

Legend: K living trials.

Each trial keeps an ordinary model. Its parameters are *views* of its row of the stack, so whatever reads a model
(``state_dict``, the health of a permutation search) sees what training does; its buffers stay its own, on the CPU, so
that counters are read without waiting for a GPU. The arithmetic happens on one *template*, into which `torch.func`
puts the rows: the code of one trial, run for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from moe_lab.results.plain import to_plain
from moe_lab.train.config import History


@dataclass
class Trial:
    """One of the models that train side by side.

    Attributes:
        index: its place among the models that were given.
        model: has the weights of the best epoch once the trial has ended.
        history: as `fit` returns it; ``seconds`` of an epoch are this trial's share, the stack's time / living trials.
        curves: what the evaluation logged.
        failed: empty, or which term, gradient, parameter or metric was not a number, and at which step.
    """

    index: int
    model: nn.Module
    history: History = field(default_factory=History)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: str = ""
    best_buffers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Nothing is left to train."""
        return bool(self.failed or self.history.stopped)

    def log(self, curve: str, **row: Any) -> None:
        """Append a row to ``curves[curve]``."""
        self.curves.setdefault(curve, []).append(to_plain(row, f"curve {curve!r}"))

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the model's buffers."""
        return {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def load(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Give the model storage of its own, with these values."""
        for name, parameter in self.model.named_parameters():
            parameter.data = parameters[name].detach().cpu().clone()
        self.load_buffers(buffers)

    def load_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Overwrite the buffers and let modules notice (a permutation derives a flag from its buffers)."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        self.model.load_state_dict(self.model.state_dict())


class _Bound(nn.Module):
    """A function of the template as a module, which is what `functional_call` wants."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable, inputs: dict[str, Tensor]) -> Any:
        return function(self.model, inputs)


class TrialStack:
    """The living trials.

    Args:
        models: one per trial, on the CPU, of one shape. They become the stack's.
        template: does the arithmetic. It has the models' parameters under the same names; what it lacks of them is left
            out. Default: a copy of the first model.
        device: where the stack lives.

    Attributes:
        trials: K of them, in the order of the rows.
        parameters: name -> (K, ...), leaves that require a gradient.
        buffers: name -> (K, ...) as they were at the start, for the template.
    """

    def __init__(self, models: Sequence[nn.Module], template: nn.Module | None, device: torch.device):
        if not models:
            raise ValueError("a stack needs at least one model")
        shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in models]
        for index, other in enumerate(shapes):
            if other != shapes[0]:
                differing = sorted(name for name in {*shapes[0], *other} if shapes[0].get(name) != other.get(name))
                raise ValueError(f"model {index} differs from model 0 in {', '.join(differing[:3])}: they cannot stack")
        self.device = device
        self.trials = [Trial(index, model) for index, model in enumerate(models)]
        self._bound = _Bound(copy.deepcopy(models[0]) if template is None else template).to(device)
        parameters, buffers = stack_module_state(list(models))
        self.parameters = {name: value.detach().to(device).requires_grad_() for name, value in parameters.items()}
        self.buffers = {name: value.to(device) for name, value in buffers.items()}
        of_template = [*self.template.named_parameters(), *self.template.named_buffers()]
        self._used = {name for name, _ in of_template}
        self._numbers: dict[str, Tensor] = {}
        self._show()

    @property
    def template(self) -> nn.Module:
        """Where functions of one trial run."""
        return self._bound.model

    def __len__(self) -> int:
        return len(self.trials)

    def _show(self) -> None:
        """Let the models see the stack."""
        for row, trial in enumerate(self.trials):
            for name, parameter in trial.model.named_parameters():
                parameter.data = self.parameters[name].detach()[row]

    def call(
        self,
        function: Callable[[nn.Module, dict[str, Tensor]], Any],
        own: Mapping[str, Tensor],
        shared: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """``function(model, inputs)`` for all trials at once; its tensors come back with K in front.

        Args:
            function: in the words of a single trial; no branch may depend on a value.
            own: name -> (K, ...), a row per trial.
            shared: the same for all trials.
        """

        def one(values: dict[str, Tensor], own: dict[str, Tensor]) -> Any:
            named = {f"model.{name}": value for name, value in values.items()}
            return functional_call(self._bound, named, (function, {**(shared or {}), **own}))

        values = {name: value for name, value in {**self.parameters, **self.buffers}.items() if name in self._used}
        return vmap(one)(values, dict(own))

    def numbers(self, name: str, of: Callable[[Trial], float], dtype: torch.dtype = torch.float32) -> Tensor:
        """(K,) a number of each living trial, on the device.

        Made once and kept until a trial leaves: a copy from host memory makes the host wait for the device, and a step
        needs a handful of such numbers (learning rates, coefficients, widths).

        Args:
            name: of the number; whoever asks again gets the same tensor.
            of: trial -> number.
            dtype: of the tensor.
        """
        if name not in self._numbers:
            self._numbers[name] = torch.tensor([of(trial) for trial in self.trials], dtype=dtype, device=self.device)
        return self._numbers[name]

    def keep(self, rows: Sequence[int]) -> None:
        """Remove all rows but these, which then cost nothing any more."""
        self._numbers.clear()
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.trials = [self.trials[row] for row in rows]
        self.parameters = {
            name: value.detach().index_select(0, index).requires_grad_() for name, value in self.parameters.items()
        }
        self.buffers = {name: value.index_select(0, index) for name, value in self.buffers.items()}
        self._show()
