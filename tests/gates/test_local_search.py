"""The "+" of any gate: what it changes while soft, that it only relabels when hard, and when it can learn at all."""

import copy
import io
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from moe_lab.gates import CometGate, DSelectKGate, HashGate, SoftmaxGate, TopKGate
from moe_lab.gates.local_search import Permutation, PermutationSearch, Schedule, permute_hard, permute_soft
from moe_lab.gates.sinkhorn import best_assignment, permutation_matrix
from moe_lab.routing import sum_losses

D, T = 6, 12
SIZES = st.sampled_from((1, 2, 3, 5, 9, 16, 17))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def build(name, n, k, seed=0):
    generator = seeded(seed)
    if name == "hash":
        return HashGate(50, n, seed=seed)
    if name == "softmax":
        return SoftmaxGate(D, n, generator=generator)
    if name == "topk":
        return TopKGate(D, n, max(k, 2), generator=generator)
    gate = {"comet": CometGate, "dselect_k": DSelectKGate}[name](D, n, k, generator=generator)
    with torch.no_grad():  # past the start: some splits hard, some soft
        for name_, parameter in gate.named_parameters():
            if name_.startswith(("split", "code")):
                parameter.mul_(60)
    return gate


def tokens(gate, seed=0):
    if gate.gate_input == "keys":
        return torch.randint(50, (T,), generator=seeded(seed))
    return torch.randn(T, D, generator=seeded(seed))


def hardened(search, seed=0):
    """End the search now, on logits far from the identity."""
    with torch.no_grad():
        search.permutation.logits.uniform_(-1, 1, generator=seeded(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(search.permutation.steps):
            search.permutation.advance()
    return search


NAMES = ("comet", "topk", "hash", "dselect_k", "softmax")
names = pytest.mark.parametrize("name", NAMES)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), SIZES, st.sampled_from((1, 2, 4)), st.integers(0, 1000), st.booleans())
def test_rows_keep_the_mass_the_gate_gave_them_soft_and_hard(name, n, k, seed, hard):
    gate = build(name, n, k, seed)
    search = PermutationSearch(gate, 3, generator=seeded(seed))
    if hard:
        hardened(search, seed)
    x = tokens(gate, seed)
    bare, routing = gate(x), search(x)
    assert (routing.weights >= 0).all()
    torch.testing.assert_close(routing.weights.sum(-1), bare.weights.sum(-1), atol=1e-6, rtol=0)
    if name != "dselect_k" or n & (n - 1) == 0:
        assert (routing.weights.sum(-1) - 1).abs().max() <= 2e-6


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), SIZES, st.sampled_from((1, 2, 4)), st.integers(0, 1000))
def test_hard_search_is_the_bare_gate_with_its_columns_moved_bit_for_bit(name, n, k, seed):
    gate = build(name, n, k, seed)
    search = hardened(PermutationSearch(gate, 3), seed)
    assignment = search.permutation.frozen[0]
    x = tokens(gate, seed)
    bare, routing = gate(x), search(x)
    assert torch.equal(routing.weights[:, assignment], bare.weights)
    assert torch.equal(routing.experts_per_token, bare.experts_per_token)  # exact zeros stay exact
    for term, value in bare.losses.items():
        assert torch.equal(routing.losses[term], value)
    assert routing.losses["permutation"].item() == 0


@names
def test_relabelling_equals_reordering_the_expert_bank_by_the_inverse(name):
    gate = build(name, 9, 2)
    search = hardened(PermutationSearch(gate, 1))
    assignment = search.permutation.frozen[0]
    bank = torch.randn(9, T, 4, generator=seeded(1))  # each expert's outputs
    x = tokens(gate)
    searched = torch.einsum("te,etf->tf", search(x).weights, bank)
    reordered = torch.einsum("te,etf->tf", gate(x).weights, bank[assignment])
    torch.testing.assert_close(searched, reordered)


@names
def test_identity_is_no_wrapper_and_a_permutation_followed_by_its_inverse_restores(name):
    gate = build(name, 9, 2)
    weights = gate(tokens(gate)).weights.unsqueeze(-1)
    identity = torch.arange(9).unsqueeze(0)
    assert torch.equal(permute_hard(weights, identity), weights)
    order = torch.randperm(9, generator=seeded(2)).unsqueeze(0)
    assert torch.equal(permute_hard(permute_hard(weights, order), order.argsort(-1)), weights)


def test_soft_mixing_with_a_permutation_matrix_is_the_hard_relabelling():
    weights = torch.rand(T, 5, 3, generator=seeded(0))
    assignment = torch.stack([torch.randperm(5, generator=seeded(j)) for j in range(3)])
    for rows in (assignment, assignment[:1]):
        soft = permute_soft(weights, permutation_matrix(rows), renormalise=False)
        torch.testing.assert_close(soft, permute_hard(weights, rows), atol=0, rtol=0)


def test_soft_mixing_sends_output_i_to_expert_l_with_weight_p_il():
    # one token, all on output 0; by hand: row 0 of P, scaled from sum 0.8 to the token's mass 1
    weights = torch.tensor([[[1.0], [0.0], [0.0]]])
    matrix = torch.tensor([[[0.1, 0.2, 0.5], [0.4, 0.4, 0.2], [0.5, 0.4, 0.3]]])
    expected = torch.tensor([0.125, 0.25, 0.625])
    torch.testing.assert_close(permute_soft(weights, matrix)[0, :, 0], expected)
    raw = permute_soft(weights, matrix, renormalise=False)
    torch.testing.assert_close(raw[0, :, 0], torch.tensor([0.1, 0.2, 0.5]))


@pytest.mark.parametrize("name", ["comet", "dselect_k"])
def test_one_permutation_per_tree_moves_each_tree_by_its_own(name):
    gate = build(name, 8, 2)
    search = hardened(PermutationSearch(gate, 1, n_permutations=2))
    first, second = search.permutation.frozen
    assert not torch.equal(first, second)
    x = tokens(gate)
    trees, routing = gate(x).details["tree_weights"], search(x)
    expected = torch.zeros(T, 8)
    expected[:, first] += trees[..., 0]
    expected[:, second] += trees[..., 1]
    torch.testing.assert_close(routing.weights, expected, atol=0, rtol=0)
    torch.testing.assert_close(routing.details["tree_weights"].sum(-1), routing.weights, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["topk", "hash", "softmax"])
def test_several_permutations_need_a_gate_with_trees(name):
    gate = HashGate(50, 4) if name == "hash" else build(name, 4, 4)
    if name == "hash":
        with pytest.raises(ValueError, match="n_permutations must be 1 or the gate's k = 1, got 2"):
            PermutationSearch(gate, 5, n_permutations=2)
        return
    search = PermutationSearch(gate, 5, n_permutations=gate.k)
    with pytest.raises(ValueError, match="has no trees"):
        search(tokens(gate))


def test_entropy_of_comet_does_not_notice_the_permutation():
    gate = build("comet", 9, 2)
    search = PermutationSearch(gate, 5)
    x = tokens(gate)
    assert torch.equal(search(x).losses["entropy"], gate(x).losses["entropy"])


def test_eval_mode_uses_the_hard_permutation_of_the_current_logits_and_reports_no_losses():
    search = PermutationSearch(build("topk", 5, 2), 100).eval()
    x = tokens(search)
    for shift in (1, 2):  # no stale cache: the logits change, so does the answer
        with torch.no_grad():
            search.permutation.logits.copy_(torch.eye(5).roll(shift, 1))
        routing = search(x)
        assert torch.equal(routing.weights, search.gate(x).weights.roll(shift, 1))
        assert routing.losses == {}
    assert int(search.permutation.step) == 0


def test_search_ends_exactly_at_its_last_step_and_then_stays():
    permutation = Permutation(5, 4, generator=seeded(0))
    for _ in range(3):
        permutation.advance()
    assert permutation.is_soft
    assert permutation.matrix().requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        permutation.advance()
    hard = permutation.matrix()
    assert not permutation.is_soft
    assert not hard.requires_grad
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard.sum(-1), torch.ones(1, 5)) and torch.equal(hard.sum(-2), torch.ones(1, 5))
    with torch.no_grad():
        permutation.logits.neg_()
    for _ in range(50):  # the authors' temperature would go on shrinking until the matrix is NaN
        permutation.advance()
    assert torch.equal(permutation.matrix(), hard)


def test_no_gradient_reaches_the_logits_after_the_search_but_the_gate_still_learns():
    search = PermutationSearch(build("comet", 5, 2), 1)
    x = tokens(search)
    search(x).weights[:, 0].sum().backward()
    assert search.permutation.logits.grad.abs().max() > 0
    search.zero_grad()
    hardened(search)
    search(x).weights[:, 0].sum().backward()
    assert search.permutation.logits.grad is None
    assert search.gate.leaf.weight.grad.abs().max() > 0


def test_gradient_through_the_soft_phase_passes_gradcheck_in_float64():
    search = PermutationSearch(CometGate(3, 4, 2, generator=seeded(0)), 10).double()
    search.permutation.advance()
    x = torch.randn(3, 3, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    original = search.permutation.logits

    def weights(x, logits):
        return torch.func.functional_call(search, {"permutation.logits": logits}, (x,)).weights

    assert torch.autograd.gradcheck(weights, (x, original.detach().mul(4).requires_grad_()))


@pytest.mark.parametrize("n", [5, 9, 16, 32])
def test_default_hardening_is_the_optimum_of_the_logits_in_every_draw(n):
    for seed in range(25):
        permutation = Permutation(n, 1, generator=seeded(seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            permutation.advance()
        chosen = permutation.matrix().mul(permutation.logits).sum().item()
        best = permutation_matrix(best_assignment(permutation.logits)).mul(permutation.logits).sum().item()
        assert chosen == pytest.approx(best, abs=1e-6)


def test_hardening_undecided_warns_and_says_so_in_health():
    permutation = Permutation(16, 1, schedule="official", generator=seeded(0))
    with pytest.warns(UserWarning, match="undecided"):
        permutation.advance()
    assert permutation.health()["hungarian_agrees"] == 0
    assert not torch.equal(permutation.frozen, best_assignment(permutation.logits))  # the official artefact


def test_a_fixed_permutation_is_hard_from_the_start_and_must_be_one():
    search = PermutationSearch(build("comet", 5, 2), permutation=Permutation.fixed(torch.tensor([2, 0, 1, 4, 3])))
    x = tokens(search)
    assert torch.equal(search(x).weights[:, [2, 0, 1, 4, 3]], search.gate(x).weights)
    assert not any(parameter.requires_grad for parameter in search.permutation.parameters())
    with pytest.raises(ValueError, match=r"contain 0 \.\. 2 once"):
        Permutation.fixed(torch.tensor([0, 0, 2]))


def test_health_names_row_error_distance_agreement_and_temperature():
    permutation = Permutation(9, 10, generator=seeded(0))
    health = permutation.health()
    assert health["temperature"] == pytest.approx(0.1)
    assert 0 <= health["row_error"] < 0.01
    assert 0 < health["soft_hard_distance"] <= math.sqrt(18)
    assert health["hardened"] == 0
    with torch.no_grad():
        permutation.logits.copy_(5 * torch.eye(9))
    for _ in range(10):
        permutation.advance()
    health = permutation.health()
    assert (health["row_error"], health["soft_hard_distance"]) == (0, 0)
    assert (health["hungarian_agrees"], health["hardened"]) == (1, 1)


def test_a_shared_permutation_is_one_module_advances_once_and_is_regularised_once():
    shared = Permutation(8, 5)
    gates = nn.ModuleList(PermutationSearch(build("comet", 8, 2, s), permutation=shared) for s in (0, 1))
    scheduled = [module for module in gates.modules() if hasattr(module, "advance")]
    assert scheduled == [shared]
    routings = [gate(tokens(gate)) for gate in gates]
    assert ["permutation" in routing.losses for routing in routings] == [True, False]
    alone = PermutationSearch(build("comet", 8, 2), 5, generator=seeded(0))
    with torch.no_grad():
        alone.permutation.logits.copy_(shared.logits)
    total = sum_losses(routings)["permutation"]
    torch.testing.assert_close(total, alone(tokens(alone)).losses["permutation"])


@pytest.mark.parametrize("when", [2, 5, 9])
def test_state_dict_keeps_logits_counter_and_permutation_at_any_moment(when):
    search = PermutationSearch(build("comet", 5, 2), 5, generator=seeded(7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(when):
            search.permutation.advance()
    buffer = io.BytesIO()
    torch.save(search.state_dict(), buffer)
    buffer.seek(0)
    other = PermutationSearch(build("comet", 5, 2, seed=3), 5, generator=seeded(8))
    other.load_state_dict(torch.load(buffer))
    x = tokens(search)
    assert torch.equal(search(x).weights, other(x).weights)
    assert search.permutation.health() == other.permutation.health()
    assert other.permutation.is_soft == (when < 5)
    clone = copy.deepcopy(search)
    assert torch.equal(clone(x).weights, search(x).weights)


def test_loading_an_earlier_state_makes_a_hardened_search_soft_again():
    search = PermutationSearch(build("topk", 5, 2), 3)
    early = copy.deepcopy(search.state_dict())
    hardened(search)
    search.load_state_dict(early)
    assert search.permutation.is_soft


def test_noise_changes_training_and_not_evaluation_and_follows_the_seed():
    search = PermutationSearch(build("topk", 9, 2), 10, noise=0.1)
    x = tokens(search)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(search(x).weights)
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])
    search.eval()
    assert torch.equal(search(x).weights, search(x).weights)


def test_autocast_does_not_loosen_the_row_sums():
    search = PermutationSearch(build("comet", 16, 2), 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = search(tokens(search)).weights
    assert weights.dtype == torch.float32
    assert (weights.sum(-1) - 1).abs().max() <= 1e-6


def test_static_gate_gives_one_row_and_an_empty_batch_none():
    search = PermutationSearch(CometGate(None, 5, 2), 10)
    assert search().weights.shape == (1, 5)
    assert PermutationSearch(build("topk", 5, 2), 10)(torch.zeros(0, D)).weights.shape == (0, 5)


def test_compiled_search_has_no_graph_break_soft_hard_or_in_eval_and_does_not_recompile_as_it_cools():
    search = PermutationSearch(build("comet", 5, 2), 6)
    x = tokens(search)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(search, backend=counter, fullgraph=True)
    for _ in range(4):
        torch.testing.assert_close(compiled(x).weights, search(x).weights)
        search.permutation.advance()
    compiled(x).weights[:, 0].sum().backward()
    assert search.permutation.logits.grad.abs().max() > 0
    assert counter.frame_count == 1
    hardened(search)
    torch.testing.assert_close(compiled(x).weights, search(x).weights)
    torch.testing.assert_close(compiled.eval()(x).weights, search(x).weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either steps"),
        ({"steps": 3, "permutation": Permutation(5, 3)}, "either steps"),
        ({"permutation": Permutation(4, 3)}, "for 4 experts, the gate has 5"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 3, "n_permutations": 3}, "must be 1 or the gate's k = 2"),
        ({"steps": 3, "schedule": "oficial"}, "did you mean 'official'"),
        ({"steps": 3, "noise": -1.0}, "noise must not be negative"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PermutationSearch(CometGate(D, 5, 2), **arguments)


def test_a_schedule_that_heats_up_or_hardens_on_nonsense_is_refused():
    with pytest.raises(ValueError, match="must fall"):
        Schedule(1e-3, 1e-2, 10, 10, 0.0, "logits")
    with pytest.raises(ValueError, match="'logits' or 'soft'"):
        Schedule(1e-2, 1e-3, 10, 10, 0.0, "P")


def recover(schedule, n, steps, lr, seed):
    """n fixed linear experts, a frozen one-hot gate with a scrambled table, only L learns: (share right, L, health)."""
    generator = seeded(seed)
    experts = torch.randn(n, 8, generator=generator)
    truth = torch.randperm(n, generator=generator)
    permutation = Permutation(n, steps, schedule=schedule, generator=generator)
    start = permutation.logits.detach().clone()
    optimizer = torch.optim.Adam(permutation.parameters(), lr)
    for _ in range(steps):
        output = torch.randint(n, (256,), generator=generator)
        x = torch.randn(256, 8, generator=generator)
        weights = permute_soft(torch.nn.functional.one_hot(output, n).float().unsqueeze(-1), permutation.matrix())
        error = (weights[..., 0] * (x @ experts.T)).sum(-1) - (x * experts[truth[output]]).sum(-1)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        if int(permutation.step) == steps - 1:
            health = permutation.health()
        permutation.advance()
    moved = (permutation.logits - start).abs().mean().item()
    return (permutation.frozen[0] == truth).double().mean().item(), moved, health


@pytest.mark.parametrize("n", [5, 16])
def test_default_schedule_finds_a_planted_permutation_and_ends_decided(n):
    for seed in range(2):
        right, moved, health = recover("default", n, 120, 5e-3, seed)
        assert right == 1
        assert moved > 0.05  # more than the whole initial range on average: the logits really learn
        assert health["row_error"] < 0.01
        assert health["hungarian_agrees"] == 1
        assert health["soft_hard_distance"] < 0.1  # hardening changes nothing


@pytest.mark.filterwarnings("ignore:local search ended undecided")
def test_official_schedule_does_not_find_it_and_its_logits_hardly_move():
    results = [recover("official", 16, 120, 5e-3, seed) for seed in range(3)]
    assert max(right for right, _, _ in results) < 0.7
    assert max(moved for _, moved, _ in results) < 0.02
    assert max(health["row_error"] for _, _, health in results) > 0.9
