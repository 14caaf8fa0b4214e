"""Gates and inference modules trained together on features of a frozen backbone (JEI-DNN, section 4).

Legend: N samples, L exits, G = L - 1, D feature width, K classes, R runs (one per lambda), B batch.

A frozen backbone gives the same features in every epoch: compute them once, (N, L, D), and a training run needs the
backbone no more (`end_to_end.NetworkExits` is the same training without that). All runs of a grid of prices train side
by side: they have a leading dimension R and never meet. Each run keeps the weights of its own best evaluation.

The last head is frozen: its logits come with the features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lab.exits.features import N_FEATURES, uncertainty_features
from moe_lab.exits.gate import ExitGates
from moe_lab.exits.phases import DynamicWarmup, Phases
from moe_lab.exits.probability import exits_taken
from moe_lab.exits.training import ExitTraining
from moe_lab.names import check_name

GATE_INPUTS = ("all", "probability", "entropy", "margin", "squared_entropy", "features")
"""What a gate sees: all four statistics (the paper), one of them, or all four and the pooled features."""

_NOT_READY = 1e6


class JointExits(ExitTraining):
    """R linear inference modules and gates per exit, on cached features.

    Args:
        n_exits, width: L and D (the same at all exits; narrower features are padded with zeros).
        n_classes: K.
        prices: lambdas, R of them.
        costs: (L,) normalised costs, the last is 1.
        phases: see `Phases`.
        mode: of `inference_loss`.
        balance: of `positive_weights`.
        model: of `exit_probabilities`.
        gate_inputs: one of `GATE_INPUTS`. Gates that see statistics only can be put into a `MultiExitNetwork`.
        warmup_patience: evaluations, see `DynamicWarmup`; None: the warm-up has a fixed length.
        warmup_loss: see `ExitTraining`.
        generator: for initial weights, equal in all runs.
    """

    def __init__(
        self,
        n_exits: int,
        width: int,
        n_classes: int,
        prices: Sequence[float],
        costs: Tensor,
        *,
        phases: Phases,
        mode: str = "released",
        balance: str = "cumulative",
        model: str = "direct",
        gate_inputs: str = "all",
        warmup_patience: int | None = None,
        warmup_loss: str = "mean",
        generator: torch.Generator | None = None,
    ):
        if tuple(costs.shape) != (n_exits,):
            raise ValueError(f"costs must be one number per exit ({n_exits}), got {tuple(costs.shape)}")
        check_name("gate inputs", gate_inputs, GATE_INPUTS)
        terms = {"mode": mode, "balance": balance, "model": model, "warmup_loss": warmup_loss}
        super().__init__(prices, costs, phases=phases, n_trained=n_exits - 1, **terms)
        n_gates, runs = n_exits - 1, len(prices)
        bound = width**-0.5
        weight = torch.empty(n_gates, width, n_classes).uniform_(-bound, bound, generator=generator)
        self.weight = nn.Parameter(weight.expand(runs, -1, -1, -1).clone())
        self.bias = nn.Parameter(torch.zeros(runs, n_gates, n_classes))
        self.gate_inputs = gate_inputs
        n_inputs = N_FEATURES + (width if gate_inputs == "features" else 0)
        self.gates = ExitGates(n_gates, runs=runs, n_features=n_inputs, generator=generator)
        seen = torch.ones(n_inputs)
        if gate_inputs not in ("all", "features"):
            seen = (torch.arange(N_FEATURES) == GATE_INPUTS.index(gate_inputs) - 1).float()
        self.register_buffer("seen", seen)
        with torch.no_grad():
            self.gates.weight.mul_(seen)  # an input that is always 0 has no gradient: these weights stay 0
        self.warmup = None
        if warmup_patience is not None:
            self.warmup = DynamicWarmup(self.weight[0], self.bias[0], warmup_patience)
        self.register_buffer("best_value", torch.full((runs,), torch.inf))
        self.register_buffer("best_step", torch.full((runs,), -1))
        for name, parameter in self._learned().items():
            self.register_buffer(f"best_{name}", parameter.detach().clone())

    def _learned(self) -> dict[str, nn.Parameter]:
        gates = {"gate_weight": self.gates.weight, "gate_bias": self.gates.bias}
        return {"weight": self.weight, "bias": self.bias, **gates}

    @property
    def phase(self) -> str:
        """Of the next step."""
        if self.warmup is None:
            return self.phases.at(int(self.step))
        ended = int(self.warmup.ended_at)
        return self.phases.at(int(self.step), ended) if ended >= 0 else "warmup"

    @torch.no_grad()
    def advance(self) -> None:
        """One optimiser step is done; modules that wait for the others keep their best weights."""
        super().advance()
        if self.warmup is not None and self.phase == "warmup":
            done = self.warmup.done  # momentum would carry them on
            self.weight[:, done], self.bias[:, done] = self.warmup.weight[done], self.warmup.bias[done]
            if int(self.step) >= self.phases.warmup + self.phases.gate_steps // 2:
                self._end_warmup()  # nobody evaluates: gates must have their turn

    def logits(self, features: Tensor, last: Tensor) -> Tensor:
        """features (B, L, D), last (B, K): logits of the frozen last head -> (R, B, L, K)."""
        own = torch.einsum("bgd,rgdk->rbgk", features[:, :-1], self.weight) + self.bias.unsqueeze(1)
        return torch.cat((own, last.expand(len(self.prices), -1, -1).unsqueeze(2).to(own.dtype)), 2)

    def gate_logits(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """(R, B, L, K) -> (R, B, G); features (B, L, D) are needed by gates that see them."""
        seen = uncertainty_features(logits[:, :, :-1])
        if self.gate_inputs == "features":
            if features is None:
                raise ValueError("these gates see the features too: give them")
            pooled = features[:, :-1].to(seen.dtype).expand(len(self.prices), -1, -1, -1)
            seen = torch.cat((seen, pooled), -1)
        return self.gates(seen * self.seen)

    def batch_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Of ``features`` (B, L, D) and ``last`` (B, K)."""
        return self.logits(batch["features"], batch["last"])

    def batch_gates(self, batch: dict[str, Tensor], logits: Tensor) -> Tensor:
        """Of ``features`` and the logits."""
        return self.gate_logits(logits, batch["features"])

    @torch.no_grad()
    def decide(self, features: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, B, L, K) and exits taken (R, B)."""
        logits = self.logits(features, last)
        return logits, exits_taken(self.gate_logits(logits, features).sigmoid(), self.model)

    def weights_from(self, features: Tensor, last: Tensor, labels: Tensor) -> None:
        """Set the weights of positive targets from a validation set, with the modules as they are."""
        with torch.no_grad():
            self.set_weights(self.cross_entropies(self.logits(features, last), labels))

    @torch.no_grad()
    def watch_warmup(self, accuracy: Tensor) -> None:
        """One evaluation of a dynamic warm-up: validation accuracy (G,) of the modules. Nothing happens without one.

        An evaluation ends the warm-up, at the latest the first one after its planned length; without one it ends half a
        gate phase later.
        """
        if self.warmup is None or int(self.warmup.ended_at) >= 0:
            return
        self.warmup.watch(accuracy, self.weight[0], self.bias[0])
        if bool(self.warmup.done.all()) or int(self.step) >= self.phases.warmup:
            self._end_warmup()

    def _end_warmup(self) -> None:
        """Modules that were ever evaluated get their best weights."""
        self.warmup.ended_at.fill_(int(self.step))
        seen = self.warmup.best >= 0
        self.weight[:, seen], self.bias[:, seen] = self.warmup.weight[seen], self.warmup.bias[seen]

    @property
    def gates_ready(self) -> bool:
        """The warm-up is over, and gates have learned for a whole phase."""
        warmup = self.phases.warmup if self.warmup is None else int(self.warmup.ended_at)
        return warmup >= 0 and int(self.step) >= warmup + self.phases.gate_steps

    @torch.no_grad()
    def keep_best(self, values: Tensor, *, ready: bool = True) -> float:
        """Each run keeps its weights if its value is the smallest so far.

        Args:
            values: (R,), e.g. loss plus priced cost on a validation set.
            ready: False: nothing is kept. Gates that have not learned yet may send everybody to the first exit, which
                for a high price looks good before any module is trained.

        Returns:
            The mean over runs of the smallest values: falls whenever a run improves, so that `fit`, which keeps the
            state of the smallest, keeps what all runs kept. Not ready: larger than any of these.
        """
        if not ready:
            return float(values.mean()) + _NOT_READY
        better = values.to(self.best_value) < self.best_value
        self.best_value[better] = values.to(self.best_value)[better]
        self.best_step[better] = self.step
        for name, parameter in self._learned().items():
            getattr(self, f"best_{name}")[better] = parameter[better]
        return float(self.best_value.mean())

    @torch.no_grad()
    def take_best(self) -> None:
        """Every run gets the weights that it kept; a run that kept none has those it has."""
        has = self.best_step >= 0
        for name, parameter in self._learned().items():
            parameter[has] = getattr(self, f"best_{name}")[has]
