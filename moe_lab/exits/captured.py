"""One batch through a network with exits in steps that nothing waits in, and these steps as CUDA graphs.

Legend: N samples, L exits, K classes. `fast_predict` chooses the steps, this file runs them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lab.cuda_graphs import capturing
from moe_lab.exits.checks import check_classes, read_logits
from moe_lab.exits.inside import Inside, Judged, Record
from moe_lab.exits.network import MultiExitNetwork
from moe_lab.exits.token_heads import TokenHead


def _outputs(modules: Iterable[nn.Module], n_silent: int, h: Tensor, source: Tensor | None) -> list[Tensor]:
    """What each module makes of what the one before returned; not of the first ``n_silent``. h[source], if any."""
    found = []
    if source is not None:
        h = h.index_select(0, source)
    for index, module in enumerate(modules):
        h = module(h)
        if index >= n_silent:
            found.append(h)
    return found


class _Stretch(nn.Module):
    """Modules one behind the other, always in eval mode; see `_outputs`."""

    def __init__(self, modules: Iterable[nn.Module], n_silent: int):
        super().__init__()
        self.stretch, self.n_silent, self.training = nn.ModuleList(modules), n_silent, False

    def forward(self, h: Tensor, source: Tensor | None) -> list[Tensor]:
        return _outputs(self.stretch, self.n_silent, h, source)


def _kind(name: str) -> type[_Stretch]:
    """A `_Stretch` whose ``forward`` is code of its own: `torch.compile` keeps few versions of each code."""
    code = _Stretch.forward.__code__.replace(co_name=name)
    return type(name, (_Stretch,), {"forward": types.FunctionType(code, globals(), name)})


class Stretches:
    """Stem and blocks of a network, some in a row at a time, and its heads; perhaps through `torch.compile`.

    Compiled blocks in a row are one piece: the end of one and the beginning of the next may be one kernel. Stretches of
    equally many blocks with equal parameters share their code.

    Args:
        network: whose modules run.
        compiled: through `torch.compile`.
        static: each number of rows is compiled for itself, for CUDA graphs, whose sizes never change.
    """

    def __init__(self, network: MultiExitNetwork, compiled: bool, static: bool):
        self.network, self.compiled, self.static = network, compiled, static
        self._kinds: dict[tuple, type[_Stretch]] = {}
        self._made: dict[tuple, nn.Module] = {}

    def blocks(self, h: Tensor, start: int, stop: int, source: Tensor | None = None) -> list[Tensor]:
        """What each of these blocks returns, (C, ...); they get h[source], the first what the stem makes of it."""
        stem = [self.network.stem] if start == 0 else []
        return self._through("blocks", start, [*stem, *self.network.blocks[start:stop]], len(stem), h, source)

    def head(self, h: Tensor, index: int) -> Tensor:
        """(C, ...) -> (C, K)."""
        return self._through("head", index, [self.network.heads[index]], 0, h)[0]

    def _through(
        self, of: str, start: int, modules: list[nn.Module], n_silent: int, h: Tensor, source: Tensor | None = None
    ) -> list[Tensor]:
        if not self.compiled:
            return _outputs(modules, n_silent, h, source)
        sizes = (len(h), None if source is None else len(source)) if self.static else source is None
        key = (of, start, len(modules), sizes)
        if key not in self._made:
            kind = (of, len(modules), n_silent, sizes, *(tuple(p.shape) for m in modules for p in m.parameters()))
            if kind not in self._kinds:
                self._kinds[kind] = _kind(f"{of}_{len(self._kinds)}")
            stretch = self._kinds[kind](modules, n_silent)
            self._made[key] = torch.compile(stretch, dynamic=False if self.static else None)
        return self._made[key](h, source)


@dataclass(frozen=True)
class Parts:
    """What runs.

    Attributes:
        network: whose.
        stretches: its modules, perhaps compiled.
        token_heads: heads that can be computed with their exit.
        n_classes: K.
        fused: use kernels.
        kept: addresses of parameters and buffers, not to be written over.
    """

    network: MultiExitNetwork
    stretches: Stretches
    token_heads: list[TokenHead | None]
    n_classes: int
    fused: bool
    kept: frozenset[int]


@torch.no_grad()
def can_be_joined(network: MultiExitNetwork, x: Tensor) -> bool:
    """All heads may read what the blocks returned after the last of these: no module changes what it gets.

    Args:
        network: in eval mode.
        x: a sample or more, to try it with.
    """
    with torch.inference_mode(False):  # else nobody counts changes
        h = network.stem(x.clone())
        for block, head in zip(network.blocks, network.heads, strict=True):
            for module in (block, head):
                if not isinstance(h, Tensor):
                    return False
                given, version = h, h._version
                found = module(given)
                if given._version != version:
                    return False
                h = found if module is block else h
    return True


class Run:
    """One batch in steps that can be captured: nothing in them waits for the device.

    Args:
        parts: what runs.
        rows: L numbers, of `plan.plan_rows`.
        joined: blocks between which no row is taken out are one step, their exits behind the last of them; else each
            block is a step.

    Attributes:
        steps: (first block, first that is none of it) of each step.
        told: see `Inside.leave`, at the last exit; None until somebody wants to be told.
    """

    def __init__(self, parts: Parts, rows: tuple[int, ...], joined: bool = False):
        self.parts, self.rows, self.joined = parts, rows, joined
        self.told: Tensor | None = None
        self.n_inside: list[Tensor] = []
        starts = [i for i in range(len(rows)) if i == 0 or not joined or rows[i] < rows[i - 1]]
        self.steps = list(zip(starts, [*starts[1:], len(rows)], strict=True))

    def record(self, x: Tensor) -> Record:
        """Of x, of which no row is padding."""
        return Record(len(x), self.parts.n_classes, self.parts.network.costs, device=x.device).begin(len(x))

    def begin(self, x: Tensor, record: Record) -> None:
        """Nothing of ``record`` may be needed later: it is changed."""
        parts, network = self.parts, self.parts.network
        self.state = Inside(record, network.gates, network.model, parts.fused, network.costs)
        self.kept = parts.kept | {x.untyped_storage().data_ptr()}
        self.n_inside.clear()
        self.h, self.source = x, None

    def step(self, start: int, stop: int) -> None:
        """Blocks from ``start``, before ``stop``; their exits; rows are taken out where the next block has fewer."""
        hs, n_blocks = self.parts.stretches.blocks(self.h, start, stop, self.source), len(self.rows)
        self.source = None
        judged, self.h = self._judge(hs, start, stop == n_blocks), hs[-1]
        if stop == n_blocks or self.rows[stop] == self.rows[start]:
            self.state.leave(judged, self.told if stop == n_blocks else None)
            return
        source = self.state.leave_and_choose(judged, self.rows[stop])
        if self.joined and self.parts.stretches.compiled:
            self.source = source  # what reads these rows finds them, so none is moved; for many, reading is slower then
        else:
            may_write = self.h.untyped_storage().data_ptr() not in self.kept
            self.h = self.state.move(self.h, source, may_write)

    def _judge(self, hs: list[Tensor], start: int, at_end: bool) -> Judged:
        heads = self.parts.token_heads[start : start + len(hs)]
        judged = self.state.judge_tokens(hs, heads, start, at_end)
        return self.state.judge(self._logits(hs, start), start, len(hs), at_end) if judged is None else judged

    def _logits(self, hs: list[Tensor], start: int) -> Iterator[Tensor]:
        for index, h in enumerate(hs, start):
            logits = read_logits(functools.partial(self.parts.stretches.head, index=index), h, index)
            check_classes(logits, self.parts.n_classes, index)
            yield logits

    def look(self) -> None:
        self.n_inside.append((self.state.samples >= 0).sum())

    def everything(self, x: Tensor, stops: bool) -> int:
        """All steps, every row a sample; the number of blocks that ran."""
        self.begin(x, self.record(x))
        for start, stop in self.steps:
            self.step(start, stop)
            if stops and stop < len(self.rows):
                self.look()
                if not self.n_inside[-1].item():
                    break
        return stop


class Graphs:
    """A `Run` as CUDA graphs: one, or with ``stops`` one per step."""

    def __init__(self, run: Run, x: Tensor, stops: bool):
        n_steps = len(run.steps)
        self.run, self.stops, self.x, self.size = run, stops, x.clone(), len(x)
        self.filled = self.size  # rows that are samples now
        self.fresh = run.record(x)  # each batch begins as a copy of it
        self.inside = torch.zeros(n_steps, dtype=torch.int64, pin_memory=x.is_cuda)
        self.heard = run.told = torch.zeros(2, pin_memory=x.is_cuda)
        self._heard = memoryview(self.heard.numpy())  # to read it takes less time than of a tensor
        self.events = [torch.cuda.Event() for _ in range(n_steps)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made on first use (handles, compiled kernels) is made now
            for _ in range(3):
                run.everything(self.x, False)
                run.look()
        torch.cuda.current_stream().wait_stream(stream)
        pool, self.graphs = torch.cuda.graph_pool_handle(), []
        for group in [[step] for step in run.steps] if stops else [run.steps]:
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, pool):
                if group[0][0] == 0:
                    run.begin(self.x, self.fresh.copy())
                for start, stop in group:
                    run.step(start, stop)
                if stops:
                    run.look()
            self.graphs.append(graph)

    def __call__(self, x: Tensor) -> int:
        """Answers are then in the run's tensors, until the next call; the number of blocks that ran."""
        n = len(x)
        (self.x if n == self.size else self.x[:n]).copy_(x.detach() if x.requires_grad else x)
        if n != self.filled:
            self.fresh.begin(n)
            self.filled = n
        if not self.stops:
            self.graphs[0].replay()
            return len(self.run.rows)
        for index, graph in enumerate(self.graphs):
            graph.replay()
            self.inside[index].copy_(self.run.n_inside[index], non_blocking=True)
            self.events[index].record()
            if index:  # the device is at this step already, while the host hears of the one before
                self.events[index - 1].synchronize()
                if not self.inside[index - 1]:
                    break
        return self.run.steps[index][1]

    def ask(self) -> None:
        """Order a copy of `Record.checks`, unless the last exit has made one: that takes some 10 microseconds."""
        if self.stops or not self.run.state.told:  # not every block may have run
            self.heard.copy_(self.run.state.record.checks, non_blocking=True)

    def hear(self) -> tuple[float, float]:
        """`Record.checks`, after a wait for the device."""
        torch.cuda.current_stream().synchronize()
        return self._heard[0], self._heard[1]
