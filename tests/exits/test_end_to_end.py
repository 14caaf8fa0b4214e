"""Whole networks: the same training as on cached features, and a backbone that trains along."""

import pytest
import torch
from torch import nn

from moe_lab.batches import StepBatches
from moe_lab.exits import ExitGates, MultiExitNetwork
from moe_lab.exits.end_to_end import NetworkExits
from moe_lab.exits.joint import JointExits
from moe_lab.exits.phases import Phases
from moe_lab.train import FitConfig, fit

EXITS, WIDTH, CLASSES = 3, 5, 4
COSTS = torch.tensor([0.3, 0.6, 1.0])
PHASES = Phases(warmup=20, gate_steps=10, module_steps=10, final_gate_steps=10, steps=60)


def network(freeze=True, dropout=0.0):
    torch.manual_seed(3)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(dropout)) for _ in range(EXITS)]
    heads = [nn.Linear(WIDTH, CLASSES) for _ in range(EXITS)]
    return MultiExitNetwork(blocks, heads, ExitGates(EXITS - 1), costs=COSTS, freeze_backbone=freeze)


def images(n=160):
    generator = torch.Generator().manual_seed(5)
    label = torch.arange(n) % CLASSES
    shift = nn.functional.one_hot(label, WIDTH)
    return {"image": shift + 0.5 * torch.randn(n, WIDTH, generator=generator), "label": label}


def train(model, data, parameters, steps=PHASES.steps):
    fit(
        model,
        StepBatches(data, 32, steps=20, shuffle=True, seed=0),
        lambda model, batch: model.terms(batch),
        optimizer=torch.optim.SGD(parameters, 0.1, momentum=0.9),
        coefficients={"gates": 1.0, "modules": 1.0},
        config=FitConfig(epochs=None, max_steps=steps, progress=False),
    )


@pytest.mark.parametrize("mode", ["released", "detached", "single"])
def test_cached_features_train_what_the_whole_network_trains(mode):
    net, data = network(dropout=0.5), images()  # the frozen backbone's dropout is off
    with torch.no_grad():
        h, found = data["image"], []
        for block in net.eval().blocks:
            h = block(h)
            found.append(h)
        features, last = torch.stack(found, 1), net.heads[-1](h)
    cached = JointExits(EXITS, WIDTH, CLASSES, [0.2], COSTS, phases=PHASES, mode=mode)
    with torch.no_grad():
        for level in range(EXITS - 1):
            cached.weight[0, level], cached.bias[0, level] = net.heads[level].weight.T, net.heads[level].bias
        cached.gates.weight[0], cached.gates.bias[0] = net.gates.weight, net.gates.bias
    whole = NetworkExits(net, 0.2, phases=PHASES, mode=mode)
    whole.weights_from(data["image"], data["label"], batch_size=50)
    cached.weights_from(features, last, data["label"])
    torch.testing.assert_close(whole.positive, cached.positive)
    train(cached, {"features": features, "last": last, "label": data["label"]}, cached.parameters())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train(whole, data, [p for p in net.parameters() if p.requires_grad])
    for level in range(EXITS - 1):
        torch.testing.assert_close(net.heads[level].weight.T, cached.weight[0, level], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net.gates.weight, cached.gates.weight[0], atol=1e-5, rtol=1e-4)
    frozen = [name for name in before if name.startswith(("blocks.", "heads.2."))]
    assert frozen and all(torch.equal(before[name], net.state_dict()[name]) for name in frozen)
    _, exits = cached.decide(features, last)
    assert torch.equal(net.predict(data["image"]).exits, exits[0])


def test_with_a_free_backbone_all_exits_and_blocks_train_but_not_in_gate_phases():
    whole, data = NetworkExits(network(freeze=False), 0.2, phases=PHASES), images()
    assert whole.warmup_weights().tolist() == [3, 2, 1]
    for step, learns in ((0, {"blocks", "heads"}), (20, {"gates"}), (30, {"blocks", "heads"})):
        whole.step.fill_(step)
        whole.zero_grad()
        sum(whole.terms(data).values()).backward()
        assert {n.split(".")[1] for n, p in whole.named_parameters() if p.grad is not None} == learns
    assert whole.network.heads[-1].weight.grad.abs().sum() > 0


def test_released_is_uniform_for_a_whole_network_too():
    net, data = network(freeze=False), images()
    grads = []
    for mode in ("released", "uniform"):
        whole = NetworkExits(net, 0.2, phases=PHASES, mode=mode)
        whole.step.fill_(30)
        net.zero_grad()
        whole.terms(data)["modules"].backward()
        grads.append(net.blocks[0][0].weight.grad.clone())
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


def test_costs_must_be_known():
    net = network()
    with pytest.raises(ValueError, match="one number per exit"):
        NetworkExits(net, 0.1, torch.ones(2), phases=PHASES)
    net.costs = None
    with pytest.raises(ValueError, match="does not know its costs"):
        NetworkExits(net, 0.1, phases=PHASES)
    with pytest.raises(ValueError, match="must not be negative"):
        NetworkExits(net, -0.1, COSTS, phases=PHASES)
