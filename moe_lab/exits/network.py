"""A network with exits, and inference that really stops.

Legend: N samples, L exits, G = L - 1 gates, K classes.

`forward` runs everything: for training, and as the oracle. `predict` takes samples that leave out of the batch between
two blocks ("compaction"): later blocks see fewer rows. The two agree on every decision except where the rule is decided
by the last bits (products of other shapes round differently).

What `predict` must not waste, least of all for one sample, where an operation costs the same microseconds as for a
hundred: one wait for the device per exit (`nonzero`, whose length decides all else); nothing is written or moved at an
exit where nobody leaves; one sample is decided on Python's numbers; no module is touched that is in eval mode.
Times: ``python -m moe_lab.bench cpu --tables exits``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lab.exits.checks import check_answers, check_classes, check_device, read_logits
from moe_lab.exits.features import uncertainty_features
from moe_lab.exits.gate import ExitGates
from moe_lab.exits.probability import check_model, exits_taken, leaves_here
from moe_lab.modes import evaluating


@dataclass(frozen=True)
class Prediction:
    """What `MultiExitNetwork.predict` answers.

    Attributes:
        probabilities: (N, K) softmax at the exit taken.
        exits: (N,) int64, 0 .. L - 1.
        cost: (N,) multiply-adds relative to the whole network, if the network knows its costs; else None.
        rows_run: L numbers: rows that each block really ran.
    """

    probabilities: Tensor
    exits: Tensor
    cost: Tensor | None
    rows_run: tuple[int, ...]

    @property
    def labels(self) -> Tensor:
        """(N,) int64, the most probable class."""
        return self.probabilities.argmax(-1)


class MultiExitNetwork(nn.Module):
    """Blocks, an inference module after each, and a gate after each but the last.

    Args:
        blocks: L modules; block l takes what block l - 1 returns (rows first).
        heads: L inference modules: output of block l -> logits (N, K). Often a norm, a pooling and a linear layer.
        gates: see `ExitGates`; default: fresh ones.
        stem: what comes before the first block.
        costs: (L,) multiply-adds until each exit (`exit_costs`), to be normalised; None: unknown.
        model: exit model: "direct" (the paper), "stick_breaking", "cumulative".
        freeze_backbone: stem, blocks and last head are not trained, and stay in eval mode (dropout off) in training.

    Raises:
        ValueError: fewer than two exits; numbers of blocks, heads, gates or costs that do not fit.

    Any network that is a sequence can be split::

        blocks = [model.features[:3], model.features[3:6], model.features[6:]]
        heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10)) for c in (16, 32, 64)]
        network = MultiExitNetwork(blocks, heads)
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        gates: ExitGates | None = None,
        *,
        stem: nn.Module | None = None,
        costs: Tensor | None = None,
        model: str = "direct",
        freeze_backbone: bool = False,
    ):
        super().__init__()
        check_model(model)
        if len(blocks) < 2:
            raise ValueError(f"a network with exits has at least 2 blocks, got {len(blocks)}")
        if len(heads) != len(blocks):
            raise ValueError(f"{len(blocks)} blocks need as many heads (inference modules), got {len(heads)}")
        if gates is None:
            gates = ExitGates(len(blocks) - 1)
            parameter = next((p for block in blocks for p in block.parameters()), None)
            gates = gates if parameter is None else gates.to(parameter.device)
        if gates.n_gates != len(blocks) - 1 or gates.runs is not None:
            raise ValueError(f"{len(blocks)} blocks need {len(blocks) - 1} gates (none after the last), of one run")
        self.stem = nn.Identity() if stem is None else stem
        self.blocks, self.heads, self.gates = nn.ModuleList(blocks), nn.ModuleList(heads), gates
        self.model, self.freeze_backbone = model, freeze_backbone
        if costs is not None and tuple(costs.shape) != (len(blocks),):
            raise ValueError(f"costs must be one number per exit ({len(blocks)}), got {tuple(costs.shape)}")
        self.register_buffer("costs", None if costs is None else costs.double() / costs.double()[-1])
        if freeze_backbone:
            for module in self._frozen():
                module.requires_grad_(False)
            self.train(self.training)

    def _frozen(self) -> list[nn.Module]:
        return [self.stem, *self.blocks, self.heads[-1]]

    def train(self, mode: bool = True) -> MultiExitNetwork:
        """Training mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.freeze_backbone:
            for module in self._frozen():
                module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run everything: x (N, ...) -> logits (N, L, K) of all exits, gate logits (N, G).

        Raises:
            ValueError: x on another device; a head that cannot read what its block returns, or with other classes.
        """
        check_device(x, self)
        h, logits, gates = self.stem(x), [], []
        for index, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            h = block(h)
            logits.append(read_logits(head, h, index))
            check_classes(logits[-1], logits[0].shape[1], index)
            if index < len(self.blocks) - 1:
                gates.append(self.gates.one(index, uncertainty_features(logits[-1])))
        return torch.stack(logits, 1), torch.stack(gates, 1)

    def predict_masked(self, x: Tensor) -> Prediction:
        """The oracle: everything runs, then it is decided. Same answers as `predict`, no time saved."""
        with evaluating(self):
            logits, gate_logits = self.forward(x)
        exits = exits_taken(gate_logits.sigmoid(), self.model)
        chosen = logits.gather(1, exits[:, None, None].expand(-1, 1, logits.shape[-1])).squeeze(1)
        rows, probabilities = (x.shape[0],) * len(self.blocks), chosen.float().softmax(-1)
        check_answers(probabilities, exits, gate_logits[exits == len(self.blocks) - 1])
        return Prediction(probabilities, exits, self._cost(exits), rows)

    def predict(self, x: Tensor, *, compact_from: float = 0.02) -> Prediction:
        """Answer, running each block only on samples that are still inside.

        Args:
            x: (N, ...), N may be 0.
            compact_from: rows are taken out only when at least this share of a batch's rows has left: moving the others
                costs something too. Rows that have left and are still carried along do not change their answer.
                Small shares are best where a block costs more than moving its rows; with 1 all are carried to the end:
                a batch is then as slow as its slowest member.

        Returns:
            See `Prediction`. Eval mode is used; each module then has its own mode again. The tensors carry no gradient,
            but are ordinary ones that a loss may use as constants. ``with torch.inference_mode():`` around the call
            works too; here it would be a trap for modules that cache tensors.

        Raises:
            ValueError: as `forward`; answers or confidences that are NaN (a sample without a confidence never leaves).
        """
        check_device(x, self)
        if not 0 <= compact_from <= 1:
            raise ValueError(f"compact_from is a share, in [0, 1]; got {compact_from}")
        with evaluating(self):
            return self._predict_one(x) if len(x) == 1 else self._predict(x, compact_from)

    def _predict(self, x: Tensor, compact_from: float) -> Prediction:
        last = len(self.blocks) - 1
        h, rows_run = self.stem(x), [0] * (last + 1)
        rows: Tensor | None = None  # the rows of h that are still inside; None: all of them
        samples: Tensor | None = None  # whose they are; None: everybody's, in order, because nobody has left
        given_away = torch.zeros((), device=x.device)  # S, of those inside
        exits = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        answers: Tensor | None = None
        for layer, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            rows_run[layer] = len(h)
            h = block(h)
            logits = read_logits(head, h, layer).float()
            if answers is not None:
                check_classes(logits, answers.shape[1], layer)
            if rows is not None:
                logits = logits.index_select(0, rows)
            stay = None
            if layer < last:
                gate = self.gates.one(layer, uncertainty_features(logits)).float().sigmoid()
                stay = (~leaves_here(gate, given_away, self.model)).nonzero().squeeze(1)  # the one wait for the device
                given_away = given_away + gate
                if 0 < len(stay) == len(logits):
                    continue
            # Somebody leaves. Everybody inside is answered: who goes on will be answered again.
            if answers is None or samples is None:
                answers = logits.clone()  # a head may return its input, or what it keeps
                exits.fill_(layer)
            else:
                answers.index_copy_(0, samples, logits)
                exits.index_fill_(0, samples, layer)
            if stay is None or len(stay) == 0:
                break
            given_away = given_away.index_select(0, stay)
            samples = stay if samples is None else samples.index_select(0, stay)
            rows = stay if rows is None else rows.index_select(0, stay)
            if len(rows) <= (1 - compact_from) * len(h):
                h, rows = h.index_select(0, rows), None
        assert answers is not None
        probabilities = answers.softmax(-1)
        check_answers(probabilities, exits, given_away)
        return Prediction(probabilities, exits, self._cost(exits), tuple(rows_run))

    def _predict_one(self, x: Tensor) -> Prediction:
        """`_predict` of one sample: nothing to index, and the rule on Python's numbers."""
        last = len(self.blocks) - 1
        h, rows_run, given_away = self.stem(x), [0] * (last + 1), 0.0
        for layer, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            rows_run[layer] = 1
            h = block(h)
            logits = read_logits(head, h, layer).float()
            if layer < last:
                gate = self.gates.one(layer, uncertainty_features(logits)).float().sigmoid().item()  # the one wait
                if leaves_here(gate, given_away, self.model):
                    break
                given_away += gate
        exits, probabilities = torch.full((1,), layer, device=x.device), logits.softmax(-1)
        check_answers(probabilities, exits, given_away)
        return Prediction(probabilities, exits, self._cost(exits), tuple(rows_run))

    def _cost(self, exits: Tensor) -> Tensor | None:
        return None if self.costs is None else self.costs[exits]
