"""The fast way answers as `predict` does, whatever leaves where; its count of rows is what blocks saw.

CUDA graphs are imitated where there is no CUDA: what runs during a capture is written down, operation by operation with
its tensors, and a replay does the same to the same memory, as a graph does.
"""

import functools
import weakref
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from moe_lab.exits import ExitGates, MultiExitNetwork, fast_predict, kernels
from moe_lab.exits.captured import Graphs, Run, Stretches, can_be_joined
from moe_lab.exits.fast_predict import FastPredictor
from moe_lab.exits.plan import plan_rows
from moe_lab.models.vit import ClassToken

N_EXITS, WIDTH = 4, 6


class Level(nn.Module):
    """Adds 1 to the first feature of each token and stirs the others behind the second; notes the rows it saw."""

    def __init__(self, in_place=False):
        super().__init__()
        self.stir, self.in_place, self.rows = nn.Linear(WIDTH - 2, WIDTH - 2), in_place, []

    def forward(self, x):
        self.rows.append(len(x))
        y = torch.cat((x[..., :1] + 1, x[..., 1:2], x[..., 2:] + self.stir(x[..., 2:]).tanh()), -1)
        return x.copy_(y) if self.in_place else y


class Token(nn.Module):
    def forward(self, x):
        return x[:, 0]


class Copy(nn.Module):
    def forward(self, x):
        return x.clone()


def network(model="direct", in_place=False, norm=False):
    """Samples (S, D) leave at the exit that their second feature names: heads are sure from there on."""
    torch.manual_seed(0)
    pool = [ClassToken(nn.LayerNorm(WIDTH))] if norm else [Token()]
    heads = [nn.Sequential(*pool, nn.Linear(WIDTH, 3)) for _ in range(N_EXITS)]
    gates = ExitGates(N_EXITS - 1)
    with torch.no_grad():
        for head in heads:
            head[1].weight.clamp_(-0.1, 0.1)
            head[1].weight[:, :2] = torch.tensor([[30.0, -30.0], [0.0, 0.0], [0.0, 0.0]])
        gates.weight.copy_(torch.tensor([100.0, 0.0, 0.0, 0.0]))
        gates.bias.fill_(-90.0)
    blocks = [Level(in_place) for _ in range(N_EXITS)]
    costs = torch.arange(1.0, N_EXITS + 1)
    stem = Copy() if in_place else None
    return MultiExitNetwork(blocks, heads, gates, stem=stem, costs=costs, model=model).eval()


def samples(exits, seed=0):
    x = torch.randn(len(exits), 2, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[..., 0], x[..., 1] = -0.5, torch.tensor(exits, dtype=torch.float32).reshape(-1, 1)
    return x


def same(found, expected):
    assert torch.equal(found.exits, expected.exits) and torch.equal(found.cost, expected.cost)
    torch.testing.assert_close(found.probabilities, expected.probabilities, atol=1e-5, rtol=0)
    assert not found.probabilities.requires_grad


EXITS = st.lists(st.integers(0, N_EXITS - 1), max_size=30)


@given(EXITS, EXITS.filter(len), st.sampled_from([0.0, 0.3, 1.0, "auto"]), st.sampled_from([0.0, 3.0]), st.booleans())
@example([0] * 9, [0, 3], 0.0, 3.0, False)
@example([3] * 9, [0, 3], 0.3, 3.0, False)
@example([3] * 9, [0], 0.0, 0.0, False)  # nobody was expected to stay
@example([3] * 20, [0], 0.3, 0.0, True)
@example([1], [0, 1, 2, 3], 1.0, 3.0, False)
@example([], [0], 0.0, 3.0, False)
@example([0, 1, 1, 2, 3, 3], [0, 0, 1, 3], 0.0, 0.0, False)
@example([0, 1, 1, 2, 3, 3] * 4, [0, 0, 1, 3], 0.3, 0.0, True)
@settings(deadline=None, max_examples=20 if kernels.INTERPRETED else 100)
def test_any_pattern_of_exits_is_answered_as_by_predict_whatever_was_expected(
    exits, seen, compact_from, spread, joined
):
    net, x = network(), samples(exits)
    fast = FastPredictor(net, samples(seen, 1), compact_from=compact_from, joined=joined, spread=spread, graphs=False)
    for block in net.blocks:
        block.rows.clear()
    before = x.clone()
    found = fast(x)
    assert [sum(block.rows) for block in net.blocks] == list(found.rows_run)
    assert found.exits.tolist() == exits and torch.equal(x, before)
    same(found, net.predict(x))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("model", ["direct", "stick_breaking", "cumulative"])
def test_soft_gates_too(model, norm):
    net = network(model, norm=norm)
    torch.nn.init.normal_(net.gates.weight)
    net.gates.bias.data.fill_(-0.5)
    for head in net.heads:
        head[1].weight.data[:, :2].mul_(0.02)
    x = samples([0, 1, 2, 3] * 30)
    same(FastPredictor(net, x, compact_from=0.0, graphs=False)(x), net.predict_masked(x))


@pytest.mark.parametrize(("compact_from", "joined", "steps"), [(0.3, True, 3), (1.0, True, 1), (1.0, False, 4)])
def test_heads_that_read_the_normed_class_token_are_computed_with_their_exits(compact_from, joined, steps, monkeypatch):
    net, x = network(norm=True), samples([0, 1, 2, 3, 3, 0, 2] * 4)
    fast = FastPredictor(net, x, compact_from=compact_from, joined=joined, spread=0.0, graphs=False)
    called, kernel = [], kernels.judge_tokens
    monkeypatch.setattr("moe_lab.exits.captured.read_logits", lambda head, h, index: called.append(index) or head(h))
    monkeypatch.setattr(kernels, "judge_tokens", lambda *given: called.append("kernel") or kernel(*given))
    same(fast(x), net.predict(x))
    assert called == (["kernel"] * steps if kernels.INTERPRETED or x.is_cuda else [0, 1, 2, 3])


def test_one_head_may_be_of_another_kind():
    net, x = network(norm=True), samples([0, 1, 2, 3, 3, 0, 2] * 4)
    net.heads[2] = nn.Sequential(Token(), net.heads[2][0].norm, nn.Linear(WIDTH, 3), nn.Identity())
    net.heads[2][2].load_state_dict(net.heads[1][1].state_dict())
    same(FastPredictor(net, x, compact_from=1.0, graphs=False)(x), net.predict(x))


def test_blocks_between_which_no_row_is_taken_out_are_one_step():
    parts = FastPredictor(network(), samples([0]), graphs=False)._parts
    rows = (9, 9, 5, 5, 5, 2, 1, 1)
    assert Run(parts, rows, joined=True).steps == [(0, 2), (2, 5), (5, 6), (6, 8)]
    assert Run(parts, rows).steps == [(i, i + 1) for i in range(8)]
    assert Run(parts, (3,) * 4, joined=True).steps == [(0, 4)]


class Doubled(nn.Module):
    def forward(self, x):
        return x.mul_(2.0)


@pytest.mark.usefixtures("graphs")
def test_heads_that_write_over_what_they_get_are_asked_before_the_next_block():
    net, x = network(), samples([0, 1, 2, 3] * 5)
    net.heads[1] = nn.Sequential(Doubled(), *net.heads[1])
    for options in ({"graphs": False}, {"batch_sizes": (20,)}):
        fast = FastPredictor(net, x, compact_from=1.0, **options)
        assert not fast._can_join
        same(fast(x), net.predict(x))


class Pair(nn.Module):
    def forward(self, x):
        return x if x.dim() < 3 else (x, x)


def test_what_cannot_be_asked_whether_it_changes_is_not_joined():
    net, x = network(), samples([0, 1, 2, 3] * 5)
    assert can_be_joined(net, x[:1])
    with torch.inference_mode():
        fast = FastPredictor(net, x, graphs=False)
        assert fast._can_join
        assert fast(x).exits.tolist() == [0, 1, 2, 3] * 5
    net.blocks[1] = Pair()
    assert not can_be_joined(net, x[:1])


def test_few_and_many_samples_and_blocks_that_write_over_what_they_get_are_not_joined(monkeypatch):
    monkeypatch.setattr(fast_predict, "MANY", 30)
    x = samples([0, 1, 2, 3])
    for net, joined in ((network(), True), (network(in_place=True), False)):
        fast = FastPredictor(net, x, graphs=False)
        found = {n: [plan.joined for plan in fast._candidates(n, False, False)] for n in (16, 17, 30, 31)}
        assert found == {16: [False], 17: [joined], 30: [joined], 31: [False]}
        assert not FastPredictor(net, x, graphs=False, joined=False)._candidates(20, False, False)[0].joined


def test_rows_are_those_of_the_plan_until_nobody_is_left():
    net, x = network(), samples([0, 0, 0, 0, 1, 1, 2, 3])
    fast = FastPredictor(net, x, compact_from=0.0, spread=0.0, graphs=False)
    rows = plan_rows(fast.shares, 8, 0.0, 0.0)
    assert rows == (8, 5, 3, 2)  # (m + 1) / 9 of 8, upwards
    assert fast(x).rows_run == rows and fast.answered_again == 0
    assert fast(samples([0] * 8)).rows_run == (8, 0, 0, 0)
    assert FastPredictor(net, x, compact_from=1.0, graphs=False)(x).rows_run == (8,) * 4


def test_samples_without_room_are_answered_again_and_counted():
    net = network()
    fast = FastPredictor(net, samples([0] * 99), compact_from=0.0, spread=0.0, graphs=False)
    x = samples([3, 0, 0, 3, 2, 0])
    found = fast(x)
    assert found.exits.tolist() == [3, 0, 0, 3, 2, 0]
    same(found, net.predict(x))
    assert fast.answered_again == 2 and found.rows_run == (6 + 2, 1 + 2, 1 + 2, 1 + 1)


@pytest.mark.parametrize("where", ["input", "gate"])
def test_nan_is_an_error_not_an_answer(where):
    net, x = network(), samples([0, 1, 2, 3])
    fast = FastPredictor(net, x, graphs=False)
    if where == "input":
        x[1] = torch.nan
    else:
        net.gates.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fast(x)


def test_modes_come_back_and_a_network_in_training_mode_drops_nothing():
    net, x = network(), samples([0, 1, 2, 3])
    expected = net.predict(x)
    net.heads[1].append(nn.Dropout(0.9))
    net.train()
    net.blocks[2].eval()
    modes = [module.training for module in net.modules()]
    same(FastPredictor(net, x, graphs=False)(x), expected)
    assert [module.training for module in net.modules()] == modes


WAYS = [(0.0, True), (0.3, True), (1.0, True), (1.0, False)]  # compact_from, joined


def test_compiled_parts_answer_alike(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for in_place in (False, True):
        net, x = network(in_place=in_place), samples([0, 1, 2, 3, 3, 0] * 3)
        before = x.clone()
        for compact_from, joined in WAYS:
            fast = FastPredictor(net, x, compiled=True, graphs=False, compact_from=compact_from, joined=joined)
            same(fast(x), net.predict(x))
        assert torch.equal(x, before)


def test_every_stretch_is_compiled_once_however_many_there_are():
    """`torch.compile` keeps eight versions of each code, and runs others uncompiled after a warning."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    blocks = [nn.Linear(WIDTH, WIDTH) for _ in range(12)]
    net = MultiExitNetwork(blocks, [nn.Sequential(Token(), nn.Linear(WIDTH, 2)) for _ in blocks], ExitGates(11))
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        stretches = Stretches(net, compiled=True, static=True)
        x = torch.randn(4, 2, WIDTH)
        for _ in range(2):
            for stop in range(1, 13):
                found = stretches.blocks(x, 0, stop)
                torch.testing.assert_close(found[-1], nn.Sequential(*blocks[:stop])(x))
                assert len(found) == stop
            for rows in range(2, 14):
                for start in (3, 7):
                    stretches.blocks(torch.randn(rows, 2, WIDTH), start, start + 2)
                    stretches.head(torch.randn(rows, 2, WIDTH), start)
        assert len(compiled) == 12 + 12 + 12
        blocks = [nn.Linear(WIDTH + i, WIDTH + i + 1) for i in range(12)]
        net = MultiExitNetwork(blocks, [nn.Linear(WIDTH + i + 1, 2) for i in range(12)], ExitGates(11))
        stretches = Stretches(net, compiled=True, static=True)
        for i in range(12):
            stretches.blocks(torch.randn(4, WIDTH + i), i, i + 1)
            stretches.head(torch.randn(4, WIDTH + i + 1), i)
    assert len(compiled) == 36 + 12 + 12
    torch.compiler.reset()


@pytest.mark.usefixtures("graphs")
def test_without_sizes_no_number_of_rows_is_compiled_for_itself(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda stretch, dynamic: compiled.append(dynamic) or stretch)
    net, x = network(), samples([0, 1, 2, 3] * 5)
    fast = FastPredictor(net, x, compiled=True, compact_from=0.0)
    for n in range(17, 21):
        same(fast(x[:n]), net.predict(x[:n]))
    assert len(compiled) <= 3 * N_EXITS and set(compiled) == {None}
    FastPredictor(net, x, compiled=True, compact_from=0.0, batch_sizes=(20,))
    assert False in compiled


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("in_place", [False, True])
def test_stretches_that_are_compiled_are_captured_too(monkeypatch, in_place):
    monkeypatch.setattr(torch, "compile", lambda stretch, dynamic: stretch)
    net, x = network(in_place=in_place), samples([0, 1, 2, 3] * 5)
    for compact_from, joined in WAYS:
        fast = FastPredictor(net, x, batch_sizes=(20,), compiled=True, compact_from=compact_from, joined=joined)
        assert fast.plans[20].graph
        for part in (x, x[:11], x[:1]):
            same(fast(part), net.predict(part))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net, x: FastPredictor(net, x[:0]), "no sample"),
        (lambda net, x: FastPredictor(net, x, batch_sizes=(0,)), "at least 1"),
        (lambda net, x: FastPredictor(net, x, batch_sizes=(2.5,)), "whole numbers"),
        (lambda net, x: FastPredictor(net, x, compact_from=1.5), "1.5"),
        (lambda net, x: FastPredictor(net, x, compact_from="automatic"), "'auto'"),
        (lambda net, x: FastPredictor(net, x, spread=-1), "-1"),
        (lambda net, x: FastPredictor(net, x)(x[:, :1]), "another FastPredictor"),
        (lambda net, x: FastPredictor(net, x)(x.double()), "float64"),
        (lambda net, x: FastPredictor(net, x)(x.to("meta")), "on meta and the network on cpu"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(network(), samples([0, 1, 2]))


def test_heads_of_other_classes_are_refused_before_anything_is_read():
    net = network()
    net.heads[3] = nn.Sequential(Token(), nn.Linear(WIDTH, 5))
    fast = FastPredictor(net, samples([0]), graphs=False)
    with pytest.raises(ValueError, match=r"heads\[3\] tells 5 classes apart"):
        fast(samples([3, 3]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA there are graphs")
def test_without_cuda_predict_answers():
    net, x = network(), samples([0, 1, 3, 3])
    fast = FastPredictor(net, x, batch_sizes=(4,), compact_from=0.0)
    assert fast.plans == {} and fast(x).rows_run == net.predict(x, compact_from=0.0).rows_run == (4, 3, 2, 2)


# Imitated graphs


class Recorder(TorchDispatchMode):
    """Writes a capture down. Memory that is new, or that nobody holds any more, is filled with garbage."""

    active: ClassVar[list] = []

    def __init__(self, graph):
        super().__init__()
        self.graph, self.holders, self.free = graph, {}, []  # how many tensors hold memory, by address; memory

    def add(self, *operation):
        self.graph.operations += [(garbage, (memory,), {}, None) for memory in self.free]
        self.free.clear()
        self.graph.operations.append(operation)

    def held(self, out, new):
        for tensor in out:
            if tensor.untyped_storage().nbytes():
                memory = tensor.untyped_storage().data_ptr()
                if new or memory in self.holders:
                    self.holders[memory] = self.holders.get(memory, 0) + 1
                    alias = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                    weakref.finalize(tensor, self.dropped, memory, alias)

    def dropped(self, memory, alias):
        self.holders[memory] -= 1
        if not self.holders[memory] and self in Recorder.active:
            self.free.append(alias)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero"):
            raise RuntimeError(f"{func} waits for the device: not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.add(func, *tree_map_only(torch.Tensor, alias_of, (args, kwargs or {}, out)))
        if func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            garbage(out)
            self.add(garbage, (alias_of(out),), {}, None)
        known = [t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.held(outs, not any(t.untyped_storage().data_ptr() in known for t in outs))
        return out


def alias_of(tensor):
    with torch._C._DisableTorchDispatch():
        return tensor.detach()


@torch.no_grad()
def garbage(tensor):
    tensor.untyped_storage().fill_(0x5A)


class Graph:
    made = 0

    def __init__(self):
        self.operations, self.replays = [], 0
        Graph.made += 1

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            outs, agains = (value if isinstance(value, (list, tuple)) else (value,) for value in (out, again))
            for old, new in zip(outs, agains, strict=True):
                if old is not None and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # neither a view nor in place: into the memory of the capture


class Stream:
    """Operations run at once, whatever the stream."""

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


class Event:
    def record(self):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def graphs(monkeypatch):
    if kernels.INTERPRETED:
        pytest.skip("a recorder of torch's operations does not see the interpreter's")

    @contextmanager
    def record(graph, pool=None):
        with Recorder(graph) as recorder:
            Recorder.active.append(recorder)
            try:
                yield
            finally:
                Recorder.active.clear()

    for name, value in {
        "graph": record, "CUDAGraph": Graph, "Stream": Stream, "Event": Event, "stream": lambda stream: nullcontext(),
        "current_stream": Stream, "graph_pool_handle": lambda: None, "synchronize": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(fast_predict, "_can_capture", lambda device: True)
    monkeypatch.setattr(Graph, "made", 0)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("size", [1, 16, 24])
@pytest.mark.parametrize(("compact_from", "joined"), [*WAYS, ("auto", True)])
def test_replayed_graphs_answer_as_predict_does_also_padded_and_cut_and_overfull(size, compact_from, joined):
    net = network()
    seen = samples([0, 0, 1, 2, 3] * 5)
    fast = FastPredictor(net, seen, batch_sizes=(size,), compact_from=compact_from, joined=joined)
    assert fast.plans[size].graph and bool(fast.tried[size]) == (compact_from == "auto")
    generator = torch.Generator().manual_seed(1)
    for n in (size, size, -(-size // 2), size, 0, 3 * size + 1, max(size // 5, 1)):
        for shape in ("mixed", 0, 3):
            exits = torch.randint(4, (n,), generator=generator).tolist() if shape == "mixed" else [shape] * n
            x = samples(exits, seed=n)
            found = fast(x)
            assert found.exits.tolist() == exits
            same(found, net.predict(x))


@pytest.mark.usefixtures("graphs")
def test_answers_are_not_written_over_by_the_next_call():
    net = network()
    fast = FastPredictor(net, samples([0, 1, 2, 3]), batch_sizes=(20,))
    first = fast(samples([0] * 20))
    kept = first.probabilities.clone(), first.exits.clone()
    fast(samples([3] * 20, seed=5))
    assert torch.equal(first.probabilities, kept[0]) and torch.equal(first.exits, kept[1])


@pytest.mark.usefixtures("graphs")
def test_what_an_earlier_batch_left_in_the_padding_neither_counts_nor_takes_room():
    net = network()
    fast = FastPredictor(net, samples([0] * 30 + [3] * 30), batch_sizes=(20,), compact_from=0.0)
    bad = samples([3] * 20)
    bad[15] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fast(bad)
    fast.answered_again = 0
    assert fast(samples([3] * 10)).exits.tolist() == [3] * 10 and fast.answered_again == 0
    assert fast(samples([0] * 20)).exits.tolist() == [0] * 20  # and all are real again


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, None])
def test_costs_keep_their_dtype_and_may_be_unknown(dtype):
    net = network()
    net.costs = None if dtype is None else net.costs.to(dtype)
    fast = FastPredictor(net, samples([0] * 9 + [3]), batch_sizes=(20,), compact_from=0.0, spread=0.0)
    for exits in ([0, 1, 2, 3] * 5, [0, 1, 2, 3] * 3):  # more stay than there is room: some are answered again
        x = samples(exits)
        found, expected = fast(x), net.predict(x)
        assert found.exits.tolist() == exits and fast.answered_again
        assert found.cost is None if dtype is None else torch.equal(found.cost, expected.cost)
        assert dtype is None or found.cost.dtype == dtype


@pytest.mark.usefixtures("graphs")
def test_few_samples_stop_one_block_after_the_last_has_left():
    net = network()
    fast = FastPredictor(net, samples([0, 1, 2, 3]), batch_sizes=(1,), compact_from=0.0)
    assert fast.plans[1].stops and Graph.made == N_EXITS
    assert [fast(samples([exit_])).rows_run for exit_ in range(4)] == [
        (1, 1, 0, 0), (1, 1, 1, 0), (1, 1, 1, 1), (1, 1, 1, 1)
    ]  # fmt: skip


@pytest.mark.usefixtures("graphs")
def test_weights_that_change_in_place_count_at_once_and_weights_that_move_are_noticed(monkeypatch):
    net, x = network(), samples([0, 1, 2, 3] * 5)
    fast = FastPredictor(net, x, batch_sizes=(20,))
    fast(x)
    with torch.no_grad():
        net.heads[0][1].bias.add_(1)
        net.gates.bias[1] = -1000.0  # nobody leaves at exit 1
    found = fast(x)
    same(found, net.predict(x))
    assert 1 not in found.exits.tolist()
    before = [tensor.data for tensor in (*net.parameters(), *net.buffers())]  # so that no address is used again
    net.to(torch.float64).to(torch.float32)
    monkeypatch.setattr(Graphs, "__call__", lambda graphs, x: pytest.fail("replayed on memory that was given back"))
    with pytest.raises(ValueError, match="moved"):
        fast(x)
    del before


@pytest.mark.usefixtures("graphs")
def test_samples_of_another_kind_are_refused_also_where_a_graph_would_take_them():
    net, x = network(), samples([0, 1, 2, 3] * 5)
    fast = FastPredictor(net, x, batch_sizes=(20,))
    for other in (x[:, :1], x.double(), x[:, :, :5], x[0, 0, 0], x[:20, 0]):
        with pytest.raises(ValueError, match="another FastPredictor"):
            fast(other)
    same(fast(x), net.predict(x))
    same(fast(x.clone().requires_grad_()), net.predict(x))
    same(fast(x), net.predict(x))


class Waits(nn.Module):
    def forward(self, x):
        return x * 1 if x.sum().item() < 1e9 else x


@pytest.mark.usefixtures("graphs")
def test_where_a_block_cannot_be_captured_operations_run_one_by_one_after_a_warning():
    net, x = network(), samples([0, 1, 2, 3] * 5)
    net.blocks[1] = nn.Sequential(net.blocks[1], Waits())
    with pytest.warns(UserWarning, match="no CUDA graph for batches of 20.*waits for the device"):
        fast = FastPredictor(net, x, batch_sizes=(20,))
    assert not fast.plans[20].graph
    same(fast(x), net.predict(x))
    same(fast(x[:7]), net.predict(x[:7]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("fused", "norm"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("compact_from", "joined"), [*WAYS, ("auto", True)])
def test_real_graphs_answer_as_predict_does(fused, norm, compact_from, joined):
    net = network(norm=norm).cuda()
    example = samples([0, 0, 1, 2, 3] * 40).cuda()
    sizes = (1, 16, 64)
    fast = FastPredictor(net, example, batch_sizes=sizes, fused=fused, compact_from=compact_from, joined=joined)
    assert all(plan.graph for plan in fast.plans.values())
    for n in (1, 2, 16, 40, 64, 150):
        for shift in range(4):
            exits = [(place * 7 + shift) % 4 if place % 3 else 0 for place in range(n)]
            found = fast(samples(exits, seed=n).cuda())
            assert found.exits.tolist() == exits
            same(found, net.predict(samples(exits, seed=n).cuda()))
