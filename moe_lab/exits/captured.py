"""One batch through a network with exits in steps that nothing waits in, and these steps as CUDA graphs.

Legend: N samples, L exits, K classes. `fast_predict` chooses the steps, this file runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lab.cuda_graphs import capturing
from moe_lab.exits.checks import check_classes, read_logits
from moe_lab.exits.inside import Inside, Record
from moe_lab.exits.network import MultiExitNetwork
from moe_lab.exits.token_heads import TokenHead


@dataclass(frozen=True)
class Parts:
    """What runs: the network's modules, perhaps compiled."""

    network: MultiExitNetwork
    stem: nn.Module
    blocks: list[nn.Module]
    heads: list[nn.Module]
    token_heads: list[TokenHead | None]  # those of `heads` that can be computed with their exit
    n_classes: int
    fused: bool
    kept: frozenset[int]  # addresses of parameters and buffers: not to be written over


class Piece(nn.Module):
    """Modules one behind the other, for `torch.compile`, always in eval mode.

    Kinds have a ``forward`` each: `torch.compile` shares code among modules that share a ``forward``, and keeps few
    versions of each. So blocks of one kind are compiled once, and heads do not use up the blocks' places.
    """

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.pieces, self.training = nn.ModuleList(modules), False

    def _through(self, h: Tensor) -> Tensor:
        for piece in self.pieces:
            h = piece(h)
        return h


class First(Piece):
    def forward(self, x: Tensor) -> Tensor:
        return self._through(x)


class Block(Piece):
    def forward(self, x: Tensor) -> Tensor:
        return self._through(x)


class Last(Piece):
    def forward(self, x: Tensor) -> Tensor:
        return self._through(x)


class Head(Piece):
    def forward(self, x: Tensor) -> Tensor:
        return self._through(x)


def compiled_pieces(
    stem: nn.Module, blocks: list[nn.Module], heads: list[nn.Module]
) -> tuple[nn.Module, list[nn.Module], list[nn.Module]]:
    """Stem, blocks and heads through `torch.compile`.

    Where no exit lies between two of them they are one piece, so that the end of the one and the beginning of the other
    may be one kernel: the first block holds the stem, the last block the last head.
    """
    first, middle, last = First(stem, blocks[0]), map(Block, blocks[1:-1]), Last(blocks[-1], heads[-1])
    joined = [torch.compile(piece) for piece in (first, *middle, last)]
    return nn.Identity(), joined, [*(torch.compile(Head(head)) for head in heads[:-1]), nn.Identity()]


class Run:
    """One batch in steps that can be captured: nothing in them waits for the device.

    Args:
        parts: what runs.
        rows: L numbers, of `plan.plan_rows`.
        side: a stream for what the blocks need not wait for; None: everything in one row.
        late: take rows out one block after they have left. The exit before is then done already, beside the block,
            instead of between two blocks.

    With a side stream: what one stream made and the other reads must live until they have met, or its memory is used
    again too early (the allocator knows one stream per tensor). ``beside`` keeps what blocks returned; `Inside` changes
    its state in place.
    """

    def __init__(self, parts: Parts, rows: tuple[int, ...], side: torch.cuda.Stream | None = None, late: bool = False):
        self.parts, self.rows, self.side, self.late = parts, rows, side, late
        self.n_inside: list[Tensor] = []
        self.writes = False  # a block writes over what it gets
        self.beside: list[Tensor] = []  # what the other stream still reads
        self.apart = False  # the side stream has work that the main one has not waited for

    def record(self, x: Tensor) -> Record:
        """Of x, of which no row is padding."""
        return Record(len(x), self.parts.n_classes, self.parts.network.costs, device=x.device).begin(len(x))

    def begin(self, x: Tensor, record: Record) -> None:
        """Nothing of ``record`` may be needed later: it is changed."""
        parts, network = self.parts, self.parts.network
        self.state = Inside(record, network.gates, network.model, parts.fused, network.costs)
        self.kept = parts.kept | {x.untyped_storage().data_ptr()}
        self.n_inside.clear()
        self.h = parts.stem(x)

    def layer(self, index: int) -> None:
        last = index == len(self.rows) - 1
        given, version = self.h, self.h._version
        self.h = self.parts.blocks[index](given)
        self.writes |= given._version != version
        shrinks = self._shrinks(index)
        if shrinks and self.late:
            self._close_up(index)
        if last or (shrinks and not self.late):
            self._join()
            self._exit(index, last)
        else:
            self.beside += [] if self.side is None else [self.h]
            with self._aside():
                self._exit(index, last)
                if self.late and self._shrinks(index + 1):
                    self.state.prepare(self.rows[index + 2])
        if shrinks and not self.late:
            self._close_up(index)

    def _shrinks(self, index: int) -> bool:
        return index < len(self.rows) - 1 and self.rows[index + 1] < self.rows[index]

    def _exit(self, index: int, last: bool) -> None:
        head = self.parts.token_heads[index]
        if head is not None and self.state.leave_from(self.h, head, index, last):
            return
        logits = read_logits(self.parts.heads[index], self.h, index)
        check_classes(logits, self.parts.n_classes, index)
        self.state.leave(logits, index, last)

    def _close_up(self, index: int) -> None:
        self._join()
        may_write = self.h.untyped_storage().data_ptr() not in self.kept
        self.h = self.state.close_up(self.h, self.rows[index + 1], may_write)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        if self.side is None:
            yield
            return
        self.side.wait_stream(torch.cuda.current_stream())
        self.apart = True
        with torch.cuda.stream(self.side):
            yield

    def _join(self) -> None:
        if self.apart:
            torch.cuda.current_stream().wait_stream(self.side)
            self.apart = False
        self.beside.clear()

    def look(self) -> None:
        self.n_inside.append((self.state.samples >= 0).sum())

    def everything(self, x: Tensor, stops: bool) -> int:
        """All steps, every row a sample; the number of blocks that ran."""
        self.begin(x, self.record(x))
        for index in range(len(self.rows)):
            self.layer(index)
            if stops and index < len(self.rows) - 1:
                self.look()
                if not self.n_inside[-1].item():
                    break
        return index + 1


class Graphs:
    """A `Run` as CUDA graphs: one, or with ``stops`` one per block."""

    def __init__(self, run: Run, x: Tensor, stops: bool):
        n_blocks = len(run.rows)
        self.run, self.stops, self.x, self.filled = run, stops, x.clone(), len(x)
        self.fresh = run.record(x)  # each batch begins as a copy of it
        self.inside = torch.zeros(n_blocks, dtype=torch.int64, pin_memory=x.is_cuda)
        self.heard = torch.zeros(2, pin_memory=x.is_cuda)
        self.events = [torch.cuda.Event() for _ in range(n_blocks)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made on first use (handles, compiled kernels) is made now
            for _ in range(3):
                run.everything(self.x, False)
                run.look()
        torch.cuda.current_stream().wait_stream(stream)
        pool, self.graphs = torch.cuda.graph_pool_handle(), []
        for group in [[index] for index in range(n_blocks)] if stops else [range(n_blocks)]:
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, pool):
                if group[0] == 0:
                    run.begin(self.x, self.fresh.copy())
                for index in group:
                    run.layer(index)
                if stops:
                    run.look()
            self.graphs.append(graph)

    def __call__(self, x: Tensor) -> int:
        """Answers are then in the run's tensors, until the next call; the number of blocks that ran."""
        (self.x if len(x) == len(self.x) else self.x[: len(x)]).copy_(x)
        if len(x) != self.filled:
            self.fresh.begin(len(x))
            self.filled = len(x)
        if not self.stops:
            self.graphs[0].replay()
            return len(self.run.rows)
        for index, graph in enumerate(self.graphs):
            graph.replay()
            self.inside[index].copy_(self.run.n_inside[index], non_blocking=True)
            self.events[index].record()
            if index:  # the device is at this block already, while the host hears of the one before
                self.events[index - 1].synchronize()
                if not self.inside[index - 1]:
                    break
        return index + 1

    def checks(self) -> list[float]:
        """`Record.checks`, after a wait for the device; through memory that it can write to by itself."""
        self.heard.copy_(self.run.state.record.checks, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return self.heard.tolist()
