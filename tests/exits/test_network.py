"""Stopping early gives the answers of the full computation, and blocks really see fewer rows."""

import pytest
import torch
from torch import nn

from moe_lab.exits import ExitGates, MultiExitNetwork, exit_costs, multiply_adds
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
