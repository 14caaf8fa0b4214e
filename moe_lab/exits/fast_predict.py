"""`MultiExitNetwork.predict` for a GPU, where starting operations and waiting for answers cost more than most blocks.

Legend: N samples, L exits, K classes.

`predict` asks the device at every exit who leaves. Until the host has heard, no operation is queued; a gate is some
twenty operations of a few microseconds; and for few samples starting a block takes longer than running it. Here

* nobody waits: how many rows each block gets is planned from the shares of samples that stayed inside before (`plan`).
  For the few batches in which more stay than there is room, those samples are answered again by `predict`;
* an exit is two kernels (`kernels`): one judges, together with the head if that is of the usual kind (`token_heads`);
  one decides, writes down the answers and chooses who takes whose place. A third moves only rows that fill a gap, or
  none does, and a compiled step finds them where they are;
* blocks between which no row is taken out are one step: `torch.compile` sees them at once, and their exits follow
  behind the last of them, all at once (`captured.Run`);
* so a whole batch is one CUDA graph per batch size;
* a few samples may all leave early: then each block is a graph of its own, and the host, one block behind the device,
  stops when nobody is left.

Tried and not kept: halves of a large batch side by side, so that a block of one runs while rows of the other are moved
(it took as long as the whole batch: 4,096 images, H200: 0.865 of the saved multiply-adds, and 0.872; one run, not
recorded); exits on a stream of their own beside the next block, and rows taken out one block late, for which each block
must be compiled by itself (64 images, H200: 0.91 of the fastest full network's speed in one run; in a later one, with
other kernels, blocks by themselves reached 0.97 and steps of several blocks 1.01).

Which of these is fastest depends on the network and the batch size: with ``compact_from="auto"`` it is measured once.

With ``graphs=False``, or where a block cannot be captured (it waits for the device itself), the same steps run one by
one. Without CUDA `predict` answers: on a CPU nothing waits, and a gate costs little. Predictions are those of it as far
as products of other shapes round alike. A block must not return memory that it keeps for itself, other than
parameters and buffers: rows are moved in place.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab.exits.captured import Graphs, Parts, Run, Stretches, can_be_joined
from moe_lab.exits.checks import check_answers, check_device
from moe_lab.exits.network import MultiExitNetwork, Prediction
from moe_lab.exits.plan import plan_rows, shares_inside
from moe_lab.exits.token_heads import token_head
from moe_lab.modes import evaluating

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # of compact_from, tried by "auto"
FEW = 16  # samples that may all have left long before the last block: it pays to look
_MOVED = "the network's weights were moved after this FastPredictor was made: make a new one"
MANY = 1024  # samples for which a block takes so long that an exit between two blocks does not count, but memory does


@dataclass(frozen=True)
class Plan:
    """How batches of one size are answered.

    Attributes:
        rows: L numbers: rows of each block.
        compact_from: from which ``rows`` was made.
        stops: look whether anybody is left, after each step.
        joined: blocks between which no row is taken out are one step.
        graph: CUDA graphs are replayed; else operations are started one by one.
        ms: median wall time when it was chosen; None: not measured.
    """

    rows: tuple[int, ...]
    compact_from: float
    stops: bool
    graph: bool
    ms: float | None = None
    joined: bool = False


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


class FastPredictor:
    """Answers batches as ``network.predict`` does, sooner.

    Args:
        network: used in eval mode. It is not copied: weights that change in place (a step of an optimizer,
            `load_state_dict`) count at once, but the shares of ``example`` then may be wrong, which costs time. Weights
            that move (``network.to(...)``) are noticed; modules or parameters that are replaced are not: make a new
            predictor.
        example: (M, ...) samples of the kind that will come, of the dtype and device that will come: how many stay
            inside how long is learned from them. Some thousands are good, one is enough to run.
        batch_sizes: N for which CUDA graphs are made. A smaller batch is padded to the next size if it fills half of
            it, a larger one is cut; what is far below goes to `predict`.
        compact_from: least share of rows to be taken out at once, see `plan.plan_rows`; "auto": the fastest of
            `THRESHOLDS` on batches of ``example`` (with CUDA graphs; else 0.02).
        joined: let blocks between which no row is taken out be one step, in batches of more than `FEW` and at most
            `MANY` samples (what all blocks of a step return is kept until its end). A network with a block or a head
            that writes over what it gets is never joined.
        spread: standard deviations of room, see `plan`.
        compiled: stem, blocks and heads through `torch.compile`; with CUDA graphs for each number of rows by itself,
            which takes minutes where many plans are tried.
        graphs: False: no CUDA graphs, which also keep memory for each batch size; also on a CPU.
        fused: False: no Triton kernels. With them a head linear(norm(class token)) is not called: hooks that are put on
            it later see nothing.

    Attributes:
        plans: N -> `Plan` of each batch size.
        tried: N -> all plans that were measured.
        answered_again: samples for which there was no room, in all calls.

    Raises:
        ValueError: no example; sizes that are not whole numbers of at least 1; ``compact_from`` that is no share.

    Not for several threads at once: batches of one size share memory. Under autocast, make it and call it under the
    same autocast. `Prediction.rows_run` counts the rows that blocks really ran on, with those that had left, those of
    padding, and those that `predict` answered again.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        example: Tensor,
        *,
        batch_sizes: Iterable[int] = (),
        compact_from: float | str = "auto",
        joined: bool = True,
        spread: float = 3.0,
        compiled: bool = False,
        graphs: bool = True,
        fused: bool = True,
    ):
        sizes = tuple(sorted(set(batch_sizes)))
        if any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"batch sizes are whole numbers of at least 1, got {sizes}")
        if not len(example):
            raise ValueError("the example holds no sample: how many stay inside how long is learned from it")
        if isinstance(compact_from, str) and compact_from != "auto":
            raise ValueError(f"compact_from is a share, in [0, 1], or 'auto'; got {compact_from!r}")
        check_device(example, network)
        found = [network.predict(part) for part in example.split(max(sizes, default=256))]
        self.network, self.spread = network, spread
        self._kind = example.shape[1:], example.dtype, example.device
        self.shares = shares_inside(torch.cat([part.exits for part in found]), len(network.blocks))
        self._on_cpu, self._wants_graphs = not _can_capture(example.device), graphs
        self._auto = compact_from == "auto"
        self._threshold = 0.02 if self._auto else float(compact_from)
        plan_rows(self.shares, 1, self._threshold, spread)  # is everything in its range?
        owned = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.numel()]
        self._addresses = [(tensor, tensor.data_ptr()) for tensor in owned]
        self._first = self._addresses[:1]
        kept = frozenset(tensor.untyped_storage().data_ptr() for tensor in owned)
        n_classes = found[0].probabilities.shape[1]
        token_heads = [token_head(head, n_classes) if fused else None for head in network.heads]
        stretches = Stretches(network, compiled, static=graphs and not self._on_cpu and bool(sizes))
        self._parts = Parts(network, stretches, token_heads, n_classes, fused, kept)
        with evaluating(network):
            self._can_join = joined and can_be_joined(network, example[:1])
        self._graphs: dict[int, Graphs] = {}
        self.plans: dict[int, Plan] = {}
        self.tried: dict[int, list[Plan]] = {}
        self.answered_again = 0
        for size in sizes if not (self._on_cpu and graphs) else ():
            self._prepare(size, example, graphs)

    def _prepare(self, n: int, example: Tensor, graph: bool) -> None:
        """Choose the plan of one batch size; capture it."""
        generator = torch.Generator().manual_seed(n)
        places = torch.rand(5, max(n, len(example)), generator=generator).argsort(1)[:, :n] % len(example)
        batches = [example.index_select(0, some.to(example.device)) for some in places]
        measures = graph and self._auto
        self.tried[n] = []
        for plan in self._candidates(n, measures, graph):
            graphs = self._capture(plan, batches[0]) if graph else None
            if graph and graphs is None:
                if n in self._graphs:  # another plan could be captured
                    continue
                self.plans[n] = dataclasses.replace(plan, stops=False, graph=False)
                return
            if measures:
                plan = dataclasses.replace(plan, ms=self._milliseconds(graphs, batches))
                self.tried[n].append(plan)
            best = self.plans.get(n)
            if best is None or (plan.ms is not None and plan.ms < best.ms):
                self.plans[n] = plan
                if graphs is not None:
                    self._graphs[n] = graphs
        self.answered_again = 0

    def _candidates(self, n: int, measures: bool, graph: bool) -> list[Plan]:
        """Plans that differ in rows or in `stops`, to be measured; one if nothing is."""
        found: dict[tuple, Plan] = {}
        joined = self._can_join and FEW < n <= MANY
        for threshold in THRESHOLDS if measures else (self._threshold,):
            rows = plan_rows(self.shares, n, threshold, self.spread)
            for stops in (False, True) if measures and n <= FEW else (n <= FEW or self._on_cpu,):
                found.setdefault((rows, stops), Plan(rows, threshold, stops, graph, joined=joined))
        return list(found.values())

    def _capture(self, plan: Plan, x: Tensor) -> Graphs | None:
        with torch.inference_mode(False), evaluating(self.network):
            x, run = x.clone(), Run(self._parts, plan.rows, plan.joined)
            run.everything(x, False)  # a block's own errors are raised here
            try:
                return Graphs(run, x, plan.stops)
            except Exception as problem:  # whatever a block does that a graph cannot: operations one by one still can
                if x.is_cuda:
                    torch.cuda.synchronize()  # raises where the device is lost: then nothing can run
                reason = f"{type(problem).__name__}: {problem}"[:300]
                warnings.warn(
                    f"no CUDA graph for batches of {len(x)}, operations start one by one: {reason}", stacklevel=2
                )
                return None

    def _milliseconds(self, graphs: Graphs, batches: list[Tensor]) -> float:
        times = []
        for x in batches * (5 if len(batches[0]) > MANY else 40):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self._read(graphs.run, x, graphs(x), graphs)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[len(batches) :])

    def __call__(self, x: Tensor) -> Prediction:
        """Answer x (N, ...), N may be 0; see `MultiExitNetwork.predict`.

        Raises:
            ValueError: as `predict`; a sample of another shape, dtype or device than the example's; weights that were
                moved.
        """
        graphs = self._graphs.get(len(x)) if x.dim() else None
        if graphs is None:
            self._check_kind(x)
            return self._of_another_size(x)
        return self._replay(graphs, x)

    @torch.no_grad()
    def _of_another_size(self, x: Tensor) -> Prediction:
        n, sizes, plan = len(x), self._graphs, self.plans.get(len(x))
        if n == 0 or (self._on_cpu and self._wants_graphs):
            return self.network.predict(x, compact_from=self._threshold)
        if not sizes or plan is not None:  # a plan without graphs
            return self._one_by_one(x, plan)
        if n > max(sizes):
            return _joined([self(part) for part in x.split(max(sizes))])
        size = min(size for size in sizes if size >= n)
        return self.network.predict(x) if 2 * n < size else self._replay(sizes[size], x)

    def _replay(self, graphs: Graphs, x: Tensor) -> Prediction:
        for tensor, address in self._first:  # whoever moves one, moves all; the others are looked at later
            if tensor.data_ptr() != address:
                raise ValueError(_MOVED)
        try:
            ran = graphs(x)  # the device waits: whatever else can be wrong, is looked at while it is busy
        except RuntimeError:
            self._check_kind(x)
            raise
        self._check_kind(x)
        return self._read(graphs.run, x, ran, graphs)

    def _check_kind(self, x: Tensor) -> None:
        if x.dim() and (x.shape[1:], x.dtype, x.device) == self._kind:
            return
        check_device(x, self.network)
        shape, dtype, device = self._kind
        raise ValueError(
            f"made for samples {tuple(shape)} of {dtype} on {device}, got {tuple(x.shape[1:])} of {x.dtype} on "
            f"{x.device}: make another FastPredictor for these"
        )

    def _one_by_one(self, x: Tensor, plan: Plan | None) -> Prediction:
        check_device(x, self.network)
        if plan is None:
            (plan,) = self._candidates(len(x), False, False)
        run = Run(self._parts, plan.rows, plan.joined)
        with evaluating(self.network):
            ran = run.everything(x, plan.stops)
        return self._read(run, x, ran)

    def _read(self, run: Run, x: Tensor, ran: int, graphs: Graphs | None = None) -> Prediction:
        """Copies of a run's answers, complete and checked. The one wait for the device."""
        n = len(x)
        if graphs:
            graphs.ask()
        probabilities, exits, cost = run.state.record.answers(n)
        rows_run = run.rows[:ran] + (0,) * (len(run.rows) - ran)
        answer = Prediction(probabilities, exits, cost, rows_run)
        if graphs and any(tensor.data_ptr() != address for tensor, address in self._addresses):  # the device is busy
            raise ValueError(_MOVED)
        total, answered = graphs.hear() if graphs else run.state.record.checks.tolist()
        if answered == n and total == total:
            return answer
        if answered < n:
            places = (exits < 0).nonzero().squeeze(1)
            again = self.network.predict(x.index_select(0, places))
            probabilities.index_copy_(0, places, again.probabilities)
            exits.index_copy_(0, places, again.exits)
            rows_run = tuple(a + b for a, b in zip(rows_run, again.rows_run, strict=True))
            answer = Prediction(probabilities, exits, self.network._cost(exits), rows_run)
            self.answered_again += len(places)
        if total != total:
            check_answers(probabilities, exits, run.state.record.checks[0])
        return answer


def _joined(parts: list[Prediction]) -> Prediction:
    cost = None if parts[0].cost is None else torch.cat([part.cost for part in parts])
    probabilities, exits = (torch.cat([getattr(part, name) for part in parts]) for name in ("probabilities", "exits"))
    rows = tuple(sum(counts) for counts in zip(*(part.rows_run for part in parts), strict=True))
    return Prediction(probabilities, exits, cost, rows)
