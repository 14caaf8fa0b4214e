"""Softmax, top-k, hash and DSelect-k: values by hand and the artefacts of the code they come from."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.gates import DSelectKGate, HashGate, SoftmaxGate, TopKGate
from moe_lab.gates.losses import load_balancing_loss, router_z_loss
from moe_lab.routing import Routing, sum_losses


def with_logits(gate, logits):
    """A static gate whose logits are these."""
    with torch.no_grad():
        gate.logits.bias.copy_(torch.tensor(logits))
    return gate


def test_top_two_by_hand():
    gate = with_logits(TopKGate(None, 4, 2), [0.0, math.log(3.0), -5.0, 0.0 - 1.0])
    assert torch.allclose(gate().weights, torch.tensor([[0.25, 0.75, 0.0, 0.0]]))


def test_a_chosen_logit_of_exactly_zero_stays_chosen_and_zero_rows_are_not_nan():
    gate = TopKGate(4, 6, 2)
    weights = gate(torch.zeros(3, 4)).weights  # zero input, zero bias: every logit is 0
    assert (weights.count_nonzero(-1) == 2).all()
    assert torch.allclose(weights.sum(-1), torch.ones(3))


def test_top_one_is_refused_unless_it_can_learn():
    with pytest.raises(ValueError, match="no gradient"):
        TopKGate(4, 6, 1)
    gate = TopKGate(4, 6, 1, renormalise=False)
    x = torch.randn(5, 4)
    weights = gate(x).weights
    assert torch.allclose(weights.amax(-1), gate.logits(x).softmax(-1).amax(-1))
    weights.sum().backward()
    assert gate.logits.weight.grad.abs().sum() > 0


def test_noise_only_in_training_and_only_with_its_generator():
    gate, x = TopKGate(4, 6, 2, noise=True), torch.randn(5, 4)
    draw = lambda seed: gate(x, generator=torch.Generator().manual_seed(seed)).weights  # noqa: E731
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    gate.eval()
    assert torch.equal(draw(0), draw(1))


def test_noise_starts_with_standard_deviation_log_two():
    gate = with_logits(TopKGate(None, 2, 2, noise=True), [0.0, 0.0])
    weights = gate(torch.zeros(20_000, 1), generator=torch.Generator().manual_seed(0)).weights
    difference = (weights[:, 0] / weights[:, 1]).log()  # noise_0 - noise_1
    assert difference.std().item() == pytest.approx(math.sqrt(2) * math.log(2), rel=0.03)


@given(n=st.integers(2, 9))
def test_balance_loss_is_one_at_balance_and_n_at_collapse(n):
    uniform = torch.full((n, n), 1 / n)
    assert load_balancing_loss(uniform, torch.eye(n, dtype=torch.bool)).item() == pytest.approx(1)
    collapsed = torch.zeros(n, n)
    collapsed[:, 0] = 1
    assert load_balancing_loss(collapsed, collapsed.bool()).item() == pytest.approx(n)


def test_minimising_the_balance_loss_balances_the_load():
    torch.manual_seed(0)
    gate = TopKGate(8, 6, 2)
    x = torch.randn(512, 8)
    with torch.no_grad():
        gate.logits.bias.copy_(torch.tensor([3.0, 2.0, 0.0, 0.0, -1.0, -2.0]))
    before = gate(x)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        gate(x).losses["load_balance"].backward()
        optimizer.step()
    after = gate(x)
    assert after.losses["load_balance"] < before.losses["load_balance"]
    assert after.load.max() < 0.25 < before.load.max()


def test_z_loss_by_hand():
    assert router_z_loss(torch.zeros(3, 4)).item() == pytest.approx(math.log(4) ** 2)


def test_softmax_gate_balance_loss_is_always_one():
    assert SoftmaxGate(4, 6)(torch.randn(30, 4)).losses["load_balance"].item() == pytest.approx(1)


@given(n_keys=st.integers(1, 200), n_experts=st.integers(1, 20), seed=st.integers(0, 50))
def test_a_balanced_hash_differs_by_at_most_one_key(n_keys, n_experts, seed):
    counts = HashGate(n_keys, n_experts, balanced=True, seed=seed)(torch.arange(n_keys)).active.sum(0)
    assert counts.max() - counts.min() <= 1


def test_hash_table_is_seeded_saved_and_sends_equal_keys_to_equal_experts():
    first, again, other = HashGate(100, 8, seed=1), HashGate(100, 8, seed=1), HashGate(100, 8, seed=2)
    keys = torch.tensor([3, 3, 7, 3])
    assert torch.equal(first.table, again.table) and not torch.equal(first.table, other.table)
    assert "table" in first.state_dict()
    weights = first(keys).weights
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[3])
    with pytest.raises(ValueError, match="integer keys"):
        first(torch.randn(4, 3))
    with pytest.raises(IndexError):
        first(torch.tensor([100]))


def test_dselect_codes_read_the_most_significant_bit_first():
    # bits (1, 0) of 4 experts: expert 2
    gate = DSelectKGate.from_arrays(None, torch.tensor([[9.0], [-9.0]]), None, torch.zeros(1), n_experts=4, gamma=1.0)
    assert gate().weights.tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize("n", [2, 3, 5, 8, 9])
def test_dselect_equals_its_equations_written_out(n):
    m, d, k, gamma = (n - 1).bit_length(), 3, 2, 1.3
    generator = torch.Generator().manual_seed(n)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    code_w, code_b, mix_w, mix_b = draw(m, d, k), draw(m, k), draw(d, k), draw(k)
    gate = DSelectKGate.from_arrays(code_w, code_b, mix_w, mix_b, n_experts=n, gamma=gamma)

    def step(t):
        u = min(max(t / gamma + 0.5, 0.0), 1.0)
        return u * u * (3 - 2 * u)

    for x in draw(5, d):
        mixing = (x @ mix_w + mix_b).softmax(0)
        expected = []
        for i in range(n):
            total = 0.0
            for j in range(k):
                r = 1.0
                for t in range(m):
                    z = float(x @ code_w[t, :, j] + code_b[t, j])
                    r *= step(z) if (i >> (m - 1 - t)) & 1 else step(-z)
                total += float(mixing[j]) * r
            expected.append(total)
        assert torch.allclose(gate(x.unsqueeze(0)).weights[0], torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_dselect_loses_weight_on_codes_that_belong_to_nobody_and_the_penalty_finds_it():
    torch.manual_seed(0)
    lost = DSelectKGate.from_arrays(None, torch.tensor([[9.0], [9.0]]), None, torch.zeros(1), n_experts=3, gamma=1.0)
    assert lost().weights.sum() == 0  # code 11 has no expert
    gate, x = DSelectKGate(4, 5, 2), torch.randn(64, 4)
    assert gate(x).weights.sum(-1).mean() < 0.7
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        gate(x).losses["code_mass"].backward()
        optimizer.step()
    assert gate(x).weights.sum(-1).mean() > 0.98
    assert gate(x).losses["code_mass"].item() == pytest.approx(2, rel=0.05)  # its best value: k
    assert "code_mass" not in DSelectKGate(4, 8, 2)(x).losses


def test_losses_of_several_gates_add_by_name():
    one = Routing(torch.eye(2), {"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    two = Routing(torch.eye(2), {"a": torch.tensor(10.0)})
    assert {name: value.item() for name, value in sum_losses([one, two]).items()} == {"a": 11.0, "b": 2.0}


def test_routing_statistics_by_hand():
    routing = Routing(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    assert routing.experts_per_token.tolist() == [2, 1]
    assert torch.allclose(routing.load, torch.tensor([2 / 3, 1 / 3, 0]))
    assert torch.allclose(routing.importance, torch.tensor([0.75, 0.25, 0]))
    assert torch.allclose(routing.entropy, torch.tensor([math.log(2), 0.0]))
