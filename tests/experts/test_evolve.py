"""One expert becomes many: masks, noise, optimiser state, and the spawn during training."""

import copy
import itertools

import pytest
import torch
from torch import nn

from moe_lab.experts import ConvExperts, MLPExperts, MoE, combine_experts
from moe_lab.experts.evolve import Evolution, carry_state, diversify_, expert_distances, spawn_experts
from moe_lab.gates import DenseToSparseGate, TemperatureSchedule


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bank(n=1, sizes=(6, 32, 5), seed=0):
    experts = MLPExperts(n, sizes, activation="gelu", activate_last=False, generator=generator(seed))
    with torch.no_grad():
        for bias in experts.biases:
            bias.normal_(generator=generator(seed + 1))
    return experts


def test_without_mask_and_noise_the_mixture_is_the_original_expert():
    expert, x = bank(), torch.randn(9, 6)
    many = spawn_experts(expert, 4)
    weights = torch.rand(9, 4)
    (mixture,) = combine_experts(many, x, [weights / weights.sum(1, keepdim=True)])
    assert torch.allclose(mixture, expert.single(0, x), atol=1e-5)


def test_masks_have_their_density_differ_between_experts_and_spare_biases():
    expert = bank(sizes=(200, 300, 5))
    before = copy.deepcopy(expert.state_dict())
    many = spawn_experts(expert, 3, mask_ratio=0.3, generator=generator(1))
    kept = many.weights[0] != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.01)  # 180,000 draws: standard deviation 0.001
    assert torch.equal(many.weights[0][kept], expert.weights[0].expand(3, -1, -1)[kept])
    assert (kept[0] != kept[1]).float().mean().item() == pytest.approx(2 * 0.7 * 0.3, abs=0.01)  # independent
    assert all(torch.equal(new, old.expand_as(new)) for new, old in zip(many.biases, expert.biases, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in expert.state_dict().items())


def test_a_mask_of_everything_leaves_biases_only_and_rescaling_keeps_the_mean():
    expert, x = bank(), torch.randn(4, 6)
    nothing = spawn_experts(expert, 2, mask_ratio=1.0)
    assert torch.allclose(nothing.single(0, x), nothing.single(0, torch.zeros(4, 6)))
    wide = bank(sizes=(50, 4))
    many = spawn_experts(wide, 4000, mask_ratio=0.5, rescale=True, generator=generator())
    assert torch.allclose(many.weights[0].mean(0), wide.weights[0][0], atol=0.03)


def test_noise_is_in_units_of_the_weights_own_spread():
    expert = bank(sizes=(100, 100, 5))
    many = spawn_experts(expert, 2, noise=0.5, generator=generator())
    difference = many.weights[0] - expert.weights[0]
    assert difference.std().item() == pytest.approx(0.5 * expert.weights[0].std().item(), rel=0.02)


def test_restarted_neurons_change_their_row_and_their_column_together():
    expert = bank(sizes=(6, 400, 5))
    many = spawn_experts(expert, 2, neurons=0.25, generator=generator())
    fresh_in = (many.weights[0] != expert.weights[0]).all(1)  # (E, hidden)
    fresh_out = (many.weights[1] != expert.weights[1]).all(2)
    assert torch.equal(fresh_in, fresh_out)
    assert fresh_in.float().mean().item() == pytest.approx(0.25, abs=0.05)
    with pytest.raises(ValueError, match="hidden layer"):
        spawn_experts(bank(sizes=(6, 5)), 2, neurons=0.5)


def test_convolutional_experts_spawn_too_and_any_expert_may_be_the_source():
    experts = ConvExperts(2, 1, 8, channels=(3,), kernel=3, dense=(4,), generator=generator())
    many = spawn_experts(experts, 3, source=1, mask_ratio=0.1, generator=generator())
    x = torch.randn(5, 1, 8, 8)
    assert many.single(2, x).shape == experts.single(1, x).shape
    copies = spawn_experts(experts, 3, source=1)
    assert torch.equal(copies.single(2, x), experts.single(1, x))
    assert copies(x).shape == (3 * 5, 4)


def test_the_same_generator_spawns_the_same_experts():
    first, second, third = (spawn_experts(bank(), 3, mask_ratio=0.5, generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(first.weights[0], second.weights[0]) and not torch.equal(first.weights[0], third.weights[0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mask_ratio": 1.5}, "share"),
        ({"noise": -1.0}, "negative"),
        ({"neurons": -0.1}, "share"),
        ({"source": 1}, "0 .. 0"),
    ],
)
def test_mistakes_are_explained(options, says):
    with pytest.raises(ValueError, match=says):
        spawn_experts(bank(), 2, **options)
    with pytest.raises(ValueError, match="at least 1"):
        spawn_experts(bank(), 0)


def trained(state_of=torch.optim.Adam):
    experts, x = bank(3), torch.randn(20, 6)
    optimizer = state_of(experts.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        experts.single(0, x).square().sum().backward()
        optimizer.step()
    return experts, optimizer


def test_reset_forgets_the_state_of_experts_only():
    experts, optimizer = trained()
    other = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [other]})
    other.grad = torch.ones(2)
    optimizer.step()
    carry_state(optimizer, diversify_(experts, mask_ratio=0.5), "reset")
    assert set(optimizer.state) == {other}


def test_copy_masks_the_first_moment_and_copies_the_second():
    experts, optimizer = trained()
    weight = experts.weights[0]
    first, second = (optimizer.state[weight][name][0].clone() for name in ("exp_avg", "exp_avg_sq"))
    masks = diversify_(experts, mask_ratio=0.5, generator=generator())
    carry_state(optimizer, masks, "copy")
    state = optimizer.state[weight]
    assert torch.equal(state["exp_avg"], masks[weight] * first)
    assert torch.equal(state["exp_avg_sq"], second.expand(3, -1, -1))
    assert state["step"] == 3


def test_copy_v_keeps_the_scale_and_forgets_the_direction():
    experts, optimizer = trained()
    weight = experts.weights[0]
    second = optimizer.state[weight]["exp_avg_sq"][0].clone()
    carry_state(optimizer, diversify_(experts), "copy_v")
    assert optimizer.state[weight]["exp_avg"].abs().sum() == 0
    assert torch.equal(optimizer.state[weight]["exp_avg_sq"][2], second)


def test_momentum_of_sgd_is_carried_and_a_fresh_optimiser_is_left_alone():
    experts, optimizer = trained(lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9))
    momentum = optimizer.state[experts.biases[0]]["momentum_buffer"][0].clone()
    carry_state(optimizer, diversify_(experts, mask_ratio=0.5), "copy")
    assert torch.equal(optimizer.state[experts.biases[0]]["momentum_buffer"][1], momentum)
    carry_state(torch.optim.Adam(experts.parameters()), diversify_(experts), "copy")
    with pytest.raises(ValueError, match="copy_v"):
        carry_state(optimizer, {}, "keep")


class Layer(nn.Module):
    """MoE whose experts are spawned after four steps."""

    def __init__(self, state="reset", seed=0):
        super().__init__()
        gate = DenseToSparseGate(6, 4, TemperatureSchedule(1.0, 0.5, 4), shared_steps=4, generator=generator(seed))
        self.moe = MoE(gate, bank(4, seed=seed))
        self.evolution = Evolution(self.moe.experts, 4, mask_ratio=0.2, state=state, seed=7)

    def advance_all(self):
        for module in self.modules():
            if callable(getattr(module, "advance", None)):
                module.advance()


def steps(layer, optimizer, first, last):
    torch.manual_seed(first)
    for step in range(first, last):
        x = torch.randn(16, 6, generator=generator(100 + step))
        torch.manual_seed(step)  # of the gate's noise
        optimizer.zero_grad()
        layer.moe(x)[0].square().mean().backward()
        optimizer.step()
        layer.advance_all()


@pytest.mark.parametrize("state", ["reset", "copy", "copy_v"])
def test_a_run_stopped_anywhere_around_the_spawn_goes_on_bit_for_bit(state):
    def start():
        layer = Layer(state)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
        layer.evolution.attach(optimizer)
        return layer, optimizer

    whole, optimizer = start()
    steps(whole, optimizer, 0, 8)
    for stop in (3, 4, 5):
        first, of_first = start()
        steps(first, of_first, 0, stop)
        second, of_second = start()
        second.load_state_dict(first.state_dict())
        of_second.load_state_dict(copy.deepcopy(of_first.state_dict()))
        steps(second, of_second, stop, 8)
        for name, value in whole.state_dict().items():
            assert torch.equal(second.state_dict()[name], value), (stop, name)


def test_before_the_spawn_only_one_expert_runs_and_afterwards_all_come_from_it():
    layer = Layer()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    layer.evolution.attach(optimizer)
    rows = []
    layer.moe.experts.register_forward_pre_hook(lambda module, inputs: rows.append(list(inputs[1])))
    untouched = layer.moe.experts.weights[0][1:].detach().clone()
    steps(layer, optimizer, 0, 3)
    assert rows == [[16, 0, 0, 0]] * 3 and not layer.evolution.spawned
    assert torch.equal(layer.moe.experts.weights[0][1:], untouched)
    steps(layer, optimizer, 3, 4)
    assert layer.evolution.spawned
    weights = layer.moe.experts.weights[0].detach()
    for first, second in itertools.pairwise(weights):
        both = (first != 0) & (second != 0)
        assert both.any() and torch.equal(first[both], second[both])
        assert not torch.equal(first, second)
    assert layer.moe.gate.phase == "soft"


def test_nothing_is_spawned_when_no_shared_phase_is_wanted():
    evolution = Evolution(bank(2), 0)
    evolution.advance()
    assert not evolution.spawned
    with pytest.raises(ValueError, match="negative"):
        Evolution(bank(2), -1)
    with pytest.raises(ValueError, match="reset"):
        Evolution(bank(2), 1, state="keep")


def test_the_bank_is_not_registered_twice():
    layer = Layer()
    names = [name for name, _ in layer.named_parameters(remove_duplicate=False)]
    assert not any(name.startswith("evolution") for name in names)


def test_distances_are_zero_for_copies_and_grow_with_the_mask():
    x, expert = torch.randn(50, 6), bank()
    copies = expert_distances(spawn_experts(expert, 3), x)
    assert all(value.abs().max() < 1e-6 for value in copies.values())
    apart = [expert_distances(spawn_experts(expert, 3, mask_ratio=r, generator=generator()), x) for r in (0.1, 0.5)]
    for name in ("parameter", "function"):
        small, large = (distances[name][0, 1] for distances in apart)
        assert 0 < small < large
    # by hand: a mask of share r leaves |W_e|^2 = (1 - r)|W|^2 and W_e . W_f = (1 - r)^2 |W|^2 (weights only)
    wide = spawn_experts(MLPExperts(1, (300, 300), generator=generator()), 2, mask_ratio=0.5, generator=generator())
    assert expert_distances(wide, torch.randn(3, 300))["parameter"][0, 1].item() == pytest.approx(0.5, abs=0.01)
