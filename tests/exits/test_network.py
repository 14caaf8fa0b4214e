"""Stopping early gives the answers of the full computation, and blocks really see fewer rows."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lab.exits import ExitGates, MultiExitNetwork, exit_costs, multiply_adds, uncertainty_features
from moe_lab.exits.cost import gate_multiply_adds, one_token_costs
from moe_lab.models.transformer import Block


class Counting(nn.Module):
    """A block that notes how many rows it sees."""

    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout))
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return x + self.layers(x)


def network(n_exits=5, width=8, n_classes=3, bias=None, seed=0, model="direct", **options):
    torch.manual_seed(seed)
    blocks = [Counting(width) for _ in range(n_exits)]
    heads = [nn.Linear(width, n_classes) for _ in range(n_exits)]
    gates = ExitGates(n_exits - 1, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        gates.weight.copy_(torch.tensor([4.0, -1.0, 2.0, -1.0]))  # surer samples leave earlier
        for head in heads:
            head.weight.mul_(3)
        gates.bias.fill_(-3.0 if bias is None else bias)
    return MultiExitNetwork(blocks, heads, gates, costs=torch.arange(1.0, n_exits + 1), model=model, **options)


@pytest.mark.parametrize("model", ["direct", "stick_breaking", "cumulative"])
@pytest.mark.parametrize("n", [0, 1, 2, 37, 256])
@pytest.mark.parametrize("compact_from", [0.0, 0.1, 1.0])
def test_stopping_early_answers_as_the_full_computation(model, n, compact_from):
    net = network(model=model)
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(n))
    masked, early = net.predict_masked(x), net.predict(x, compact_from=compact_from)
    assert torch.equal(early.exits, masked.exits)
    torch.testing.assert_close(early.probabilities, masked.probabilities, atol=1e-5, rtol=0)
    assert torch.equal(early.labels, masked.labels) and torch.equal(early.cost, masked.cost)


def test_blocks_run_on_the_samples_that_are_still_inside_and_on_no_other():
    net = network()
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(3))
    exits = net.predict_masked(x).exits
    for block in net.blocks:
        block.rows.clear()
    found = net.predict(x, compact_from=0.0)
    needed = [int((exits >= level).sum()) for level in range(5)]
    assert [sum(block.rows) for block in net.blocks] == needed == list(found.rows_run)
    assert sum(needed) == int((exits + 1).sum()) and len(set(exits.tolist())) > 2
    assert torch.equal(found.cost, (exits + 1).double() / 5)


def test_all_leave_at_once_and_nobody_leaves():
    x = torch.randn(20, 8)
    everybody, nobody = network(bias=50.0), network(bias=-50.0)
    assert everybody.predict(x).rows_run == (20, 0, 0, 0, 0) and everybody.predict(x).exits.max() == 0
    assert all(not block.rows[1:] for block in everybody.blocks[1:])
    assert nobody.predict(x).rows_run == (20,) * 5 and nobody.predict(x).exits.min() == 4
    few_leave = network().predict(x, compact_from=1.0)  # rows are carried along until all have left
    assert few_leave.rows_run[0] == 20


def test_training_mode_is_restored_and_a_frozen_backbone_stays_as_it_is():
    net = network(freeze_backbone=True)
    net.blocks[0].layers[2].p = 0.5
    net.train()
    assert net.training and not net.blocks[0].training and not net.heads[-1].training and net.heads[0].training
    net.predict(torch.randn(3, 8))
    assert net.training and net.heads[0].training
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert all(name.startswith(("blocks", "heads.4")) for name in frozen) and len(frozen) == 12
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    logits, gates = net(torch.randn(6, 8))
    (logits.square().mean() + gates.square().mean()).backward()
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    trained = ("gates", "heads.0", "heads.1", "heads.2", "heads.3")
    assert changed and all(name.startswith(trained) for name in changed)


def test_a_part_that_its_owner_keeps_in_eval_mode_stays_there():
    net = network().train()
    net.blocks[1].eval()
    net.heads[0].eval()
    before = {name: module.training for name, module in net.named_modules()}
    net.predict(torch.randn(3, 8))
    net.predict_masked(torch.randn(3, 8))
    multiply_adds(net, torch.randn(1, 8))
    assert {name: module.training for name, module in net.named_modules()} == before


def test_the_gate_s_loss_gives_no_gradient_to_what_it_judges():
    net = network()
    _, gate_logits = net(torch.randn(6, 8))
    gate_logits.sum().backward()
    assert all(parameter.grad is None for name, parameter in net.named_parameters() if "gates" not in name)
    assert net.gates.weight.grad.abs().sum() > 0


class Level(nn.Module):
    """Adds 1 to the first feature of every token, and stirs those behind the second."""

    def __init__(self, width):
        super().__init__()
        self.stir = nn.Linear(width - 2, width - 2)

    def forward(self, x):
        return torch.cat((x[..., :1] + 1, x[..., 1:2], x[..., 2:] + self.stir(x[..., 2:]).tanh()), -1)


class FirstToken(nn.Module):
    def forward(self, x):
        return x[:, 0]


def planted(exits, tokens, width, n_exits, model):
    """A network and samples (N, S, D) that leave at ``exits``: it counts levels, and is sure from the wanted one on."""
    x = torch.randn(len(exits), tokens, width)
    x[..., 0], x[..., 1] = -0.5, torch.tensor(exits, dtype=torch.float32).reshape(-1, 1)
    heads = [nn.Sequential(FirstToken(), nn.Linear(width, 3)) for _ in range(n_exits)]
    gates = ExitGates(n_exits - 1)
    with torch.no_grad():
        for head in heads:
            head[1].weight.clamp_(-0.1, 0.1)
            head[1].weight[:, :2] = torch.tensor([[30.0, -30.0], [0.0, 0.0], [0.0, 0.0]])  # sure, or torn between two
        gates.weight.copy_(torch.tensor([100.0, 0.0, 0.0, 0.0]))
        gates.bias.fill_(-90.0)
    blocks = [Level(width) for _ in range(n_exits)]
    return MultiExitNetwork(blocks, heads, gates, costs=torch.arange(1.0, n_exits + 1), model=model).eval(), x


@st.composite
def patterns(draw):
    n_exits = draw(st.integers(2, 6))
    exits = draw(st.lists(st.integers(0, n_exits - 1), max_size=30))
    return exits, n_exits, draw(st.integers(1, 4)), draw(st.integers(3, 7))


@given(patterns(), st.floats(0, 1), st.sampled_from(["direct", "stick_breaking", "cumulative"]))
@example(([0] * 9, 3, 1, 3), 0.02, "direct")
@example(([2] * 9, 3, 1, 3), 0.02, "direct")
@example(([1], 3, 2, 4), 0.02, "cumulative")
@example(([0, 1, 1, 2, 3, 3], 4, 2, 4), 1.0, "stick_breaking")
def test_any_pattern_of_exits_is_answered_as_by_the_full_network_on_the_rows_that_the_rule_leaves(
    pattern, compact_from, model
):
    exits, n_exits, tokens, width = pattern
    net, x = planted(exits, tokens, width, n_exits, model)
    early, masked = net.predict(x, compact_from=compact_from), net.predict_masked(x)
    assert early.exits.tolist() == masked.exits.tolist() == exits
    torch.testing.assert_close(early.probabilities, masked.probabilities, atol=1e-5, rtol=0)
    assert torch.equal(early.cost, masked.cost)
    rows, expected = len(exits), []
    for level in range(n_exits):
        expected.append(rows)
        inside = sum(exit_ > level for exit_ in exits)
        rows = inside if inside == 0 or inside <= (1 - compact_from) * rows else rows
    assert list(early.rows_run) == expected


class Operations(TorchDispatchMode):
    """Names of all operations, and of those that wait for the device."""

    def __init__(self):
        super().__init__()
        self.names, self.waits = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.append(name)
        picks_by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in (args[1] or [])
        )
        if name in ("nonzero", "_local_scalar_dense", "masked_select", "equal") or picks_by_mask:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compact_from", [0.0, 1.0])
@pytest.mark.parametrize("exits", [[3], [0, 1, 1, 2, 3, 3, 3], [3] * 4, [0] * 4])
def test_the_device_is_asked_once_per_exit_and_nothing_moves_where_nobody_leaves(exits, compact_from):
    net, x = planted(exits, tokens=2, width=4, n_exits=4, model="direct")
    with Operations() as operations:
        net.predict(x, compact_from=compact_from)
    assert len(operations.waits) == min(max(exits) + 1, 3) + 1  # the last: are the answers numbers?
    moves = [name for name in operations.names if name in ("index_select", "index_copy_", "index_fill_")]
    assert bool(moves) == (len(set(exits)) > 1)


class Prior(nn.Module):
    """The same logits for everybody, one row in memory."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.5, 0.0, -0.5]))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


class SomeLeave(ExitGates):
    """Whoever is in an even place leaves, whatever the features say."""

    def one(self, index, features):
        return torch.where(torch.arange(len(features)) % 2 == 0, 9.0, -9.0)


@pytest.mark.parametrize("compact_from", [0.0, 1.0])
def test_answers_are_kept_apart_from_what_a_head_returns(compact_from):
    heads = [Prior(), nn.Linear(4, 3), nn.Linear(4, 3)]
    net = MultiExitNetwork([nn.Linear(4, 4) for _ in range(3)], heads, SomeLeave(2)).eval()
    found = net.predict(torch.randn(7, 4), compact_from=compact_from)
    assert found.exits.tolist() == [0, 1, 0, 2, 0, 1, 0]
    torch.testing.assert_close(found.probabilities[::2], heads[0].logits.detach().softmax(-1).expand(4, -1))
    assert heads[0].logits.tolist() == [0.5, 0.0, -0.5]


def test_a_sample_alone_leaves_where_it_leaves_in_a_batch():
    x = torch.randn(40, 8)
    exits = {}
    for model in ("direct", "stick_breaking", "cumulative"):
        net = network(model=model).eval()
        exits[model] = net.predict(x).exits
        alone = [net.predict(row) for row in x.split(1)]
        assert torch.equal(torch.cat([found.exits for found in alone]), exits[model])
        torch.testing.assert_close(torch.cat([found.probabilities for found in alone]), net.predict(x).probabilities)
        assert all(found.rows_run == (1,) * (int(found.exits) + 1) + (0,) * (4 - int(found.exits)) for found in alone)
    assert not torch.equal(exits["direct"], exits["stick_breaking"])  # S decides for some


@pytest.mark.parametrize("n", [1, 7])
def test_answers_may_be_constants_of_a_loss_and_inference_mode_around_the_call_is_allowed(n):
    net, x = network().eval(), torch.randn(n, 8)
    found = net.predict(x)
    scale = torch.ones((), requires_grad=True)
    (scale * found.probabilities * found.cost.unsqueeze(1)).sum().backward()
    assert scale.grad is not None and not found.probabilities.requires_grad
    with torch.inference_mode():
        same = net.predict(x)
    assert torch.equal(same.probabilities, found.probabilities) and torch.equal(same.exits, found.exits)


@pytest.mark.parametrize("n", [1, 30])
def test_a_part_in_training_mode_inside_a_network_in_eval_mode_does_not_drop_anything(n):
    net, x = network().eval(), torch.randn(n, 8)
    expected = net.predict(x).probabilities
    dropout = net.blocks[0].layers[2]
    dropout.p = 0.9
    dropout.train()
    assert torch.equal(net.predict(x).probabilities, expected)
    torch.testing.assert_close(net.predict_masked(x).probabilities, expected, atol=1e-5, rtol=0)
    assert dropout.training and not net.training


def features_by_hand(logits):
    powers = [math.exp(z - max(logits)) for z in logits]
    p = sorted((power / sum(powers) for power in powers), reverse=True)
    r = [q * q / sum(q * q for q in p) for q in p]
    entropies = [-sum(q * math.log(q) for q in some if q > 0) for some in (p, r)]
    return [p[0], entropies[0], p[0] - p[1], entropies[1]]


LOGITS = st.one_of(st.floats(-60, 60), st.sampled_from([-math.inf, -1e4, 0.0, 1.0]))  # impossible classes, ties


@given(st.lists(LOGITS, min_size=2, max_size=12).filter(lambda logits: max(logits) > -math.inf))
@example([0.0, -math.inf])
@example([5.0, 5.0, -math.inf, 5.0])
@example([700.0, -700.0])
def test_features_are_their_definition_also_for_impossible_classes_and_ties(logits):
    found = uncertainty_features(torch.tensor([logits], dtype=torch.float64))
    expected = torch.tensor([features_by_hand(logits)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    single = uncertainty_features(torch.tensor([logits], dtype=torch.float32))
    assert single.dtype == uncertainty_features(torch.tensor([logits], dtype=torch.bfloat16)).dtype == torch.float32
    rounded = torch.tensor(logits, dtype=torch.float32).tolist()
    torch.testing.assert_close(single, torch.tensor([features_by_hand(rounded)]), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda b, h: MultiExitNetwork(b[:1], h[:1]), "at least 2 blocks"),
        (lambda b, h: MultiExitNetwork(b, h[:2]), "as many heads"),
        (lambda b, h: MultiExitNetwork(b, h, ExitGates(3)), "need 2 gates"),
        (lambda b, h: MultiExitNetwork(b, h, ExitGates(2, runs=4)), "of one run"),
        (lambda b, h: MultiExitNetwork(b, h, costs=torch.ones(2)), "one number per exit"),
        (lambda b, h: MultiExitNetwork(b, h, model="directly"), "did you mean 'direct'"),
        (lambda b, h: MultiExitNetwork(b, h).predict(torch.randn(1, 4), compact_from=2.0), "a share"),
    ],
)
def test_parts_that_do_not_fit_are_refused(build, message):
    blocks, heads = [nn.Linear(4, 4) for _ in range(3)], [nn.Linear(4, 2) for _ in range(3)]
    with pytest.raises(ValueError, match=message):
        build(blocks, heads)


def test_a_convolutional_network_split_by_name():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2), nn.ReLU())
    blocks = [body[:2], body[2:]]
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10)) for c in (4, 8)]
    x = torch.randn(9, 1, 9, 9)
    costs = exit_costs(blocks, heads, x[:1], 10)
    first, second = 81 * 9 * 4 + 40, 16 * 36 * 8 + 80  # by hand: positions x kernel x channels, then the head
    assert costs.tolist() == [first + gate_multiply_adds(10), first + gate_multiply_adds(10) + second]
    net = MultiExitNetwork(blocks, heads, costs=costs)
    assert torch.equal(net.predict(x).exits, net.predict_masked(x).exits)
    assert net.costs[-1] == 1


class Tokens(nn.Module):
    """A transformer block on (N, S, D)."""

    def __init__(self, width):
        super().__init__()
        self.block = Block(width, 2, 2 * width)

    def forward(self, x):
        return self.block(x, torch.zeros(x.shape[:2], dtype=torch.int64))[0]


def test_multiply_adds_of_a_transformer_block_by_hand_and_what_one_token_counting_misses():
    width, tokens = 8, 6
    by_hand = tokens * (4 * width**2 + 2 * width * 2 * width) + 2 * tokens**2 * width  # projections, FFN; attention
    assert multiply_adds(Tokens(width), torch.randn(1, tokens, width)) == by_hand
    assert multiply_adds(Tokens(width), torch.randn(3, tokens, width)) == by_hand  # per row
    blocks, heads = [Tokens(width), Tokens(width)], [nn.Identity(), nn.Identity()]
    assert one_token_costs(blocks, heads, torch.randn(1, tokens, width)).tolist() == [
        4 * width**2 + 4 * width**2,
        2 * (4 * width**2 + 4 * width**2),
    ]
    longer = multiply_adds(Tokens(width), torch.randn(1, 2 * tokens, width))
    assert longer > 2 * by_hand


def small(heads=None, gates=None):
    torch.manual_seed(0)
    blocks = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    heads = heads or [torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)]
    return MultiExitNetwork(blocks, heads, gates).eval()


def answers_of(network):
    """Every way to ask."""
    return (network.forward, network.predict, network.predict_masked, lambda x: network.predict(x[:1]))


def test_heads_that_cannot_read_their_block_are_named():
    for ask in answers_of(small([torch.nn.Linear(5, 3), torch.nn.Linear(4, 3)])):
        with pytest.raises(ValueError, match=r"heads\[0\] cannot read what blocks\[0\] returns"):
            ask(torch.ones(2, 4))


def test_heads_with_different_classes_are_refused():
    network = small([torch.nn.Linear(4, 3), torch.nn.Linear(4, 5)])
    torch.nn.init.zeros_(network.gates.weight)
    network.gates.bias.data.fill_(-0.1)  # unsure: the rule needs both gates, so that somebody reaches the last head
    with pytest.raises(ValueError, match=r"heads\[1\] tells 5 classes apart"):
        network(torch.ones(2, 4))


def test_nan_is_an_error_not_an_answer():
    network = small()
    for ask in answers_of(network)[1:]:
        with pytest.raises(ValueError, match="NaN"):
            ask(torch.full((2, 4), torch.nan))
    network.heads[0].weight.data[0, 0] = torch.nan  # confidences at the first exit: they could never leave there
    for ask in answers_of(network)[1:]:
        with pytest.raises(ValueError, match="NaN"):
            ask(torch.ones(2, 4))


def test_an_input_on_another_device_is_refused():
    for ask in answers_of(small()):
        with pytest.raises(ValueError, match="the input is on meta and the network on cpu"):
            ask(torch.ones(2, 4, device="meta"))


def test_counting_costs_changes_nothing():
    from moe_lab.exits import exit_costs

    blocks = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)) for _ in range(2)]
    heads = [torch.nn.Linear(4, 3) for _ in blocks]
    exit_costs(blocks, heads, torch.randn(1, 4), 3)  # in training mode one image would be an error, or move statistics
    assert all(block.training and block[1].num_batches_tracked == 0 for block in blocks)


def test_one_gate_is_as_exact_as_all_of_them_under_autocast():
    gates, features = ExitGates(2), torch.rand(5, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        one = torch.stack([gates.one(index, features[:, index]) for index in range(2)], 1)
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, gates(features))
