"""COMET: the tree derived by hand, the limits, and what gamma really is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.gates import CometGate
from moe_lab.gates.smooth_step import smooth_step
from moe_lab.gates.trees import combine_trees, split_balance_loss, tree_probabilities, walk_levels

SIZES = [1, 2, 3, 5, 9, 16, 17]


def leaves_by_recursion(z, gamma, node=0):
    """The obvious version: one (n-1,) row of split logits, depth first; a list of leaf probabilities."""
    if node >= len(z):
        return [torch.ones((), dtype=z.dtype)]
    left = smooth_step(z[node], gamma)
    right = smooth_step(-z[node], gamma)
    return [left * p for p in leaves_by_recursion(z, gamma, 2 * node + 1)] + [
        right * p for p in leaves_by_recursion(z, gamma, 2 * node + 2)
    ]


@given(
    n=st.sampled_from(SIZES),
    k=st.sampled_from([1, 3]),
    gamma=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 10_000),
)
def test_levels_agree_with_plain_recursion(n, k, gamma, seed):
    z = torch.randn(4, n - 1, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p = tree_probabilities(z, gamma)
    assert p.shape == (4, n, k)
    for row in range(4):
        for tree in range(k):
            expected = torch.stack(leaves_by_recursion(z[row, :, tree], gamma))
            assert torch.allclose(p[row, :, tree], expected, atol=1e-15)
    assert torch.allclose(p.sum(1), torch.ones(4, k, dtype=torch.float64), atol=1e-12)


def test_five_leaves_are_ordered_from_left_to_right_with_depths_3_3_2_2_2():
    # All splits undecided: S = 1/2, a leaf at depth d has 2^-d. Heap order would give 1/4, 1/4, 1/4, 1/8, 1/8.
    assert tree_probabilities(torch.zeros(1, 4, 1), 1.0).flatten().tolist() == [1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 4]
    # Root left, node 1 left, node 3 right: heap path 0-1-3-8, the second leaf from the left.
    z = torch.tensor([9.0, 9.0, 0.0, -9.0]).reshape(1, 4, 1)
    assert tree_probabilities(z, 1.0).flatten().tolist() == [0, 1, 0, 0, 0]


@given(n=st.sampled_from(SIZES[1:]), seed=st.integers(0, 1000))
def test_reach_of_a_split_is_the_sum_over_the_leaves_below_it(n, seed):
    z = torch.randn(n - 1, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    reach, leaves = walk_levels(z, 1.0)
    reach = torch.cat(reach)
    assert reach.shape == (n - 1, 2, 3)
    assert torch.allclose(reach[0], leaves.sum(0))
    children = {v: (2 * v + 1, 2 * v + 2) for v in range(n - 1)}
    for v, (left, right) in children.items():
        if right < n - 1:
            assert torch.allclose(reach[v], reach[left] + reach[right])


def test_ratio_form_equals_softmax_over_all_leaves_of_all_trees():
    p = tree_probabilities(torch.randn(6, 8, 3, dtype=torch.float64) * 0.2, 1.0).movedim(0, -1)
    a = torch.randn(9, 3, 6, dtype=torch.float64)
    expected = (a + p.log()).flatten(0, 1).softmax(0).reshape(9, 3, 6)
    assert torch.allclose(combine_trees(p, a), expected, atol=1e-14)


@given(shift=st.floats(-300, 300), seed=st.integers(0, 100))
def test_adding_a_constant_to_all_leaf_logits_changes_nothing(shift, seed):
    generator = torch.Generator().manual_seed(seed)
    p = tree_probabilities(torch.randn(5, 4, 2, dtype=torch.float64, generator=generator), 1.0).movedim(0, -1)
    a = torch.randn(5, 2, 5, dtype=torch.float64, generator=generator)
    assert torch.allclose(combine_trees(p, a + shift), combine_trees(p, a), atol=1e-10)


def test_an_unreachable_leaf_gets_exactly_zero_however_large_its_logit():
    p = torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
    a = torch.tensor([1e30, 0.0]).reshape(2, 1, 1).requires_grad_()
    g = combine_trees(p, a)
    assert g.flatten().tolist() == [0.0, 1.0]
    g[1].sum().backward()
    assert a.grad.flatten().tolist() == [0.0, 0.0]


def saturate(gate):
    with torch.no_grad():
        for parameter in gate.split.parameters():
            parameter.mul_(1e6)
    return gate


def test_one_hard_tree_is_one_hot_and_does_not_feel_its_leaf_logits():
    gate = saturate(CometGate(4, 9, k=1))
    routing = gate(torch.randn(50, 4))
    assert set(routing.weights.unique().tolist()) == {0.0, 1.0}
    routing.weights[:, :3].sum().backward()
    assert gate.leaf.weight.grad.abs().max() == 0
    assert gate.split.weight.grad.abs().max() == 0


def test_two_equal_trees_use_one_expert():
    gate = CometGate(4, 8, k=2)
    with torch.no_grad():
        for parameter in (gate.split.weight, gate.split.bias):
            trees = parameter.unflatten(0, (7, 2))
            trees[:, 1] = trees[:, 0]
    assert (saturate(gate)(torch.randn(20, 4)).experts_per_token == 1).all()


def test_soft_weights_follow_p_times_exp_a_and_not_p():
    gate = CometGate(None, 2, k=1)
    with torch.no_grad():
        gate.split.bias.zero_()
        gate.leaf.bias.copy_(torch.tensor([0.0, math.log(3.0)]))
    assert torch.allclose(gate().weights, torch.tensor([[0.25, 0.75]]))


@given(c=st.sampled_from([0.1, 3.0, 10.0]), n=st.sampled_from([3, 8]))
def test_scaling_gamma_and_splits_together_changes_nothing(c, n):
    gate = CometGate(4, n, k=2, gamma=1.0).double()
    other = CometGate(4, n, k=2, gamma=c).double()
    other.load_state_dict(gate.state_dict())
    with torch.no_grad():
        for parameter in other.split.parameters():
            parameter.mul_(c)
    x = torch.randn(10, 4, dtype=torch.float64)
    assert torch.allclose(gate(x).weights, other(x).weights, atol=1e-12)


def test_gamma_is_a_learning_rate_multiplier_of_the_splits_under_adam():
    def train(gamma):
        generator = torch.Generator().manual_seed(0)
        gate = CometGate(4, 5, k=2, gamma=gamma, generator=generator).double()
        with torch.no_grad():  # the same start in units of gamma, exactly
            for parameter in gate.split.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * gamma / 50)
        optimizer = torch.optim.Adam(
            [
                {"params": gate.leaf.parameters(), "lr": 1e-2, "eps": 1e-8},
                {"params": gate.split.parameters(), "lr": 1e-2 * gamma, "eps": 1e-8 / gamma},
            ]
        )
        x = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        target = torch.nn.functional.one_hot((x[:, 0] > 0).long() * 3, 5).double()
        for _ in range(60):
            optimizer.zero_grad()
            (gate(x).weights - target).square().mean().backward()
            optimizer.step()
        return gate(x).weights.detach()

    reference = train(1.0)
    for gamma in (0.1, 10.0):
        assert torch.allclose(train(gamma), reference, atol=1e-7)


def test_entropy_is_k_log_n_for_undecided_trees_and_zero_for_hard_ones():
    gate = CometGate(4, 8, k=3)
    with torch.no_grad():
        for parameter in gate.split.parameters():
            parameter.zero_()
    x = torch.randn(16, 4)
    assert gate(x).losses["entropy"].item() == pytest.approx(3 * math.log(8), abs=1e-4)
    assert gate(torch.cat((x, x))).losses["entropy"].item() == pytest.approx(gate(x).losses["entropy"].item(), abs=1e-6)
    hard = saturate(CometGate(4, 8, k=3))(torch.randn(16, 4) + 0.1)
    assert abs(hard.losses["entropy"].item()) < 1e-5


def test_minimising_the_entropy_alone_makes_trees_hard():
    torch.manual_seed(0)
    gate = CometGate(4, 8, k=2, gamma=1.0)
    x = torch.randn(256, 4)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    before = gate(x).experts_per_token.float().mean().item()
    for _ in range(200):
        optimizer.zero_grad()
        gate(x).losses["entropy"].backward()
        optimizer.step()
    after = gate(x).experts_per_token.float().mean().item()
    assert before == 8 and after < 2.5


def test_split_balance_is_log_two_when_halved_and_large_when_one_sided():
    z = torch.tensor([9.0, -9.0]).reshape(1, 1, 2)  # one split, two tokens, one goes each way
    reach, _ = walk_levels(z, 1.0)
    assert split_balance_loss(z, reach, 1.0).item() == pytest.approx(math.log(2), abs=1e-5)
    z = torch.full((1, 1, 2), 9.0)
    reach, _ = walk_levels(z, 1.0)
    assert split_balance_loss(z, reach, 1.0).item() > 5
    assert "split_balance" in CometGate(4, 5, 2, split_balance=True)(torch.randn(3, 4)).losses


@pytest.mark.parametrize("n", SIZES[1:])
def test_from_arrays_reproduces_the_equations_written_out(n):
    k, d, gamma = 2, 3, 1.5
    generator = torch.Generator().manual_seed(n)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    node_weight, node_bias, leaf_weight, leaf_bias = draw(n - 1, d, k), draw(n - 1, k), draw(n, d, k), draw(n, k)
    gate = CometGate.from_arrays(
        node_weight.numpy(), node_bias.numpy(), leaf_weight.numpy(), leaf_bias.numpy(), gamma=gamma
    )
    x = draw(6, d)
    mass = torch.zeros(6, n, k, dtype=torch.float64)
    for row in range(6):
        for tree in range(k):
            z = torch.stack([x[row] @ node_weight[v, :, tree] + node_bias[v, tree] for v in range(n - 1)])
            for leaf, p in enumerate(leaves_by_recursion(z, gamma)):
                mass[row, leaf, tree] = p * (x[row] @ leaf_weight[leaf, :, tree] + leaf_bias[leaf, tree]).exp()
    expected = mass.sum(-1) / mass.sum((1, 2)).unsqueeze(-1)
    assert torch.allclose(gate(x).weights, expected, atol=1e-12)


def test_from_arrays_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"weight must have shape \(4, 3, 2\)"):
        CometGate.from_arrays(torch.zeros(5, 3, 2), torch.zeros(4, 2), torch.zeros(5, 3, 2), torch.zeros(5, 2), gamma=1)
    with pytest.raises(ValueError, match=r"bias must have shape \(4, 2\)"):
        CometGate.from_arrays(torch.zeros(4, 3, 2), torch.zeros(5, 2), torch.zeros(5, 3, 2), torch.zeros(5, 2), gamma=1)


def test_from_arrays_takes_static_gates():
    gate = CometGate.from_arrays(None, torch.zeros(2, 1), None, torch.zeros(3, 1), gamma=1.0)
    assert gate().weights.flatten().tolist() == [0.25, 0.25, 0.5]


def test_details_hold_the_share_of_every_tree():
    routing = CometGate(4, 5, k=3)(torch.randn(6, 4))
    assert torch.allclose(routing.details["tree_weights"].sum(-1), routing.weights)
    assert torch.allclose(routing.details["tree_probabilities"].sum(1), torch.ones(6, 3))
