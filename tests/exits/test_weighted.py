"""L2W-DEN on cached features: the weights, the step that is foreseen, and the network's gradient through it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, one_hot

from moe_lab.batches import StepBatches
from moe_lab.exits.losses import cross_entropies
from moe_lab.exits.weighted import CIFAR, IMAGENET, WeightedExits, Weighting
from moe_lab.train import FitConfig, LearningRate, fit

EXITS, WIDTH, CLASSES = 4, 6, 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weighted(weighting=CIFAR, hidden=7, **options):
    return WeightedExits(EXITS, WIDTH, CLASSES, weighting, hidden=hidden, generator=seeded(), **options)


def batch_of(n=24, seed=1, dtype=torch.float32):
    generator = seeded(seed)
    return {
        "features": torch.randn(n, EXITS, WIDTH, generator=generator).to(dtype),
        "last": torch.randn(n, CLASSES, generator=generator).to(dtype),
        "label": torch.randint(CLASSES, (n,), generator=generator),
    }


def planted(n=600):
    """Sample i is readable from exit d_i on (d = 0 .. 3), before that features are noise."""
    label, difficulty = torch.arange(n) % CLASSES, torch.arange(n) // CLASSES % EXITS
    noise = torch.randn(n, EXITS, WIDTH, generator=seeded())
    readable = torch.arange(EXITS) >= difficulty.unsqueeze(1)
    signal = 3 * one_hot(label, WIDTH).unsqueeze(1) + 0.5 * noise
    features = torch.where(readable.unsqueeze(-1), signal, noise)
    return {"features": features, "last": 10.0 * one_hot(label, CLASSES).float(), "label": label}, difficulty


def trained(model, data, steps=200, rate=0.05, net_rate=1e-4, loss=None, **options):
    batches = StepBatches(data, 61, steps=20, shuffle=True)  # the last batch of a pass is odd and short
    config = FitConfig(
        epochs=None, max_steps=steps, checkpoint_every=3, learning_rate=LearningRate(5, steps), progress=False
    )
    return fit(
        model,
        batches,
        loss or (lambda model, batch: model.terms(batch)),
        optimizer=model.optimizers(rate, net_rate=net_rate),
        coefficients={"modules": 1.0, "weights": 1.0},
        config=config,
        **options,
    )


def losses_of(model, half):
    return cross_entropies(model.logits(half["features"], half["last"])[:, : model.n_weighted], half["label"])


@given(
    st.sampled_from(["mat", "col", "row"]),
    st.booleans(),
    st.integers(1, 40),
    st.floats(0, 3),
    st.integers(0, 99),
)
def test_weights_average_one_over_what_was_chosen(mean, last_head, n, epsilon, seed):
    model = weighted(Weighting(epsilon, mean, last_head=last_head)).double()
    losses = 5 * torch.rand(n, model.n_weighted, generator=seeded(seed)).double()
    weights = model.sample_weights(losses)
    assert weights.shape == losses.shape and (weights - 1).abs().max() <= 2 * epsilon
    found = {"mat": weights.mean(), "col": weights.mean(1), "row": weights.mean(0)}[mean]
    torch.testing.assert_close(found, torch.ones_like(found))


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("setting", [CIFAR, IMAGENET])
def test_without_epsilon_modules_learn_from_plain_cross_entropy(step, setting):
    model, batch = weighted(replace(setting, epsilon=0.0)), batch_of()
    model.optimizers(0.1)
    model.step.fill_(step)
    half = slice(12) if step == 0 else slice(12, 24)
    logits = model.logits(batch["features"], batch["last"])
    expected = sum(cross_entropy(logits[half, level], batch["label"][half]) for level in range(EXITS - 1))
    terms = model.terms(batch)
    torch.testing.assert_close(terms["modules"], expected)
    wanted = torch.autograd.grad(expected, [model.weight, model.bias])
    (terms["modules"] + terms["weights"]).backward()
    torch.testing.assert_close([model.weight.grad, model.bias.grad], list(wanted))
    assert all(p.grad is None or not p.grad.any() for p in model.net.parameters())


def test_each_term_reaches_its_own_part_only():
    model, batch = weighted(), batch_of()
    model.optimizers(0.1)
    parts = {"modules": [model.weight, model.bias], "weights": list(model.net.parameters())}
    for term, own in parts.items():
        for name, parameters in parts.items():
            grads = torch.autograd.grad(model.terms(batch)[term], parameters, allow_unused=True)
            moved = [grad is not None and bool(grad.any()) for grad in grads]
            assert moved == [parameters == own] * len(parameters), (term, name)


def test_modules_minimise_the_weighted_cross_entropy():
    model, batch = weighted(), batch_of()
    model.optimizers(0.1)
    half, _ = model.halves(batch)
    losses = losses_of(model, half)
    weights = model.sample_weights(losses).detach()
    assert weights.std() > 0.01
    expected = sum((weights[:, level] * losses[:, level]).mean() for level in range(EXITS - 1))
    torch.testing.assert_close(model.terms(batch)["modules"], expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_foreseen_step_is_the_one_that_the_optimiser_makes(momentum):
    model = weighted().double()
    sgd, _ = model.optimizers(0.3, momentum=momentum, decay=0.1)
    for seed in range(4):  # the first step has no momentum yet
        batch = batch_of(seed=seed, dtype=torch.float64)
        half, _ = model.halves(batch)
        weight, bias = model.foreseen(half["features"], half["label"], model.sample_weights(losses_of(model, half)))
        sgd.zero_grad()
        model.terms(batch)["modules"].backward()
        sgd.step()
        model.advance()
        torch.testing.assert_close([weight, bias], [model.weight.data, model.bias.data])
        sgd.param_groups[0]["lr"] /= 2  # as a schedule does


def through_a_real_update(model, batch, velocity):
    """The definition, slowly: autograd through the weighted loss, step by hand, samples sorted in a loop."""
    half, other = model.halves(batch)
    rate, momentum, decay = (model._sgd.param_groups[0][name] for name in ("lr", "momentum", "weight_decay"))
    weight, bias = model.weight.detach().requires_grad_(), model.bias.detach().requires_grad_()

    def logits_at(rows, weight, bias):
        stages = [rows["features"][:, level] @ weight[level] + bias[level] for level in range(EXITS - 1)]
        return [*stages, rows["last"]][: model.n_weighted]

    losses = torch.stack([cross_entropy(z, half["label"], reduction="none") for z in logits_at(half, weight, bias)], 1)
    weights = model.sample_weights(losses)
    total = (weights * losses)[:, : EXITS - 1].mean(0).sum()
    grads = torch.autograd.grad(total, [weight, bias], create_graph=True)
    new = [p - rate * (momentum * v + g + decay * p) for p, g, v in zip((weight, bias), grads, velocity, strict=True)]
    n = len(other["label"])
    shares = [model.weighting.ratio**j for j in range(1, EXITS + 1)]
    unused, meta = list(range(n)), 0 * sum(p.sum() for p in new)  # all may be at the frozen head
    for level, z in enumerate(logits_at(other, *new)):
        surest = sorted(unused, key=lambda row: -z[row].softmax(-1).max().item())
        if level < model.n_weighted - 1:
            surest = surest[: int(n * shares[level] / sum(shares))]
        if surest:
            meta = meta + cross_entropy(z[surest], other["label"][surest])
        unused = [row for row in unused if row not in surest]
    assert not unused
    return meta


SETTINGS = [CIFAR, replace(CIFAR, mean="row", ratio=1.4), replace(IMAGENET, epsilon=1.0), replace(IMAGENET, ratio=0.01)]


def warm(weighting, n=24):
    """A model in the middle of training, in float64: momentum is there."""
    model = weighted(weighting, hidden=5).double()
    sgd, _ = model.optimizers(0.5, decay=0.01)
    for seed in range(2):
        sgd.zero_grad()
        model.terms(batch_of(seed=seed, dtype=torch.float64))["modules"].backward()
        sgd.step()
    return model, batch_of(n, seed=5, dtype=torch.float64)


@pytest.mark.parametrize("weighting", SETTINGS)
@pytest.mark.parametrize("n", [24, 7, 2])
def test_the_networks_loss_and_gradient_are_those_of_autograd_through_the_update(weighting, n):
    model, batch = warm(weighting, n)
    velocity = [model._sgd.state[p]["momentum_buffer"] for p in (model.weight, model.bias)]
    expected = through_a_real_update(model, batch, velocity)
    found = model.terms(batch)["weights"]
    torch.testing.assert_close(found, expected)
    parameters = list(model.net.parameters())
    torch.testing.assert_close(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("weighting", SETTINGS[:3])
def test_the_networks_gradient_is_that_of_finite_differences(weighting):
    model, batch = warm(weighting)
    model.terms(batch)["weights"].backward()
    step, checked = 1e-5, 0
    for parameter in model.net.parameters():
        flat = parameter.data.view(-1)
        for index in range(0, len(flat), 3):
            old, ends = flat[index].item(), []
            for shift in (step, -step):
                flat[index] = old + shift
                ends.append(model.terms(batch)["weights"].item())
            flat[index] = old
            slope = (ends[0] - ends[1]) / (2 * step)
            assert parameter.grad.view(-1)[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)
            checked += abs(slope) > 1e-6
    assert checked > 5


def test_samples_are_judged_where_they_leave_by_hand():
    # Ratio 1/2 and three exits: shares 4/7, 2/7, 1/7; of 7 samples 4, 2 and the rest.
    model = WeightedExits(3, 1, 2, replace(CIFAR, ratio=0.5), hidden=1)
    features = torch.tensor([[9, 0], [8, 0], [7, 3], [6, 1], [0, 5], [1, 2], [2, 4]]).float()
    features = torch.cat((features, torch.zeros(7, 1)), 1).unsqueeze(-1)
    weight, bias = torch.tensor([[[1.0, 0.0]]]).expand(2, -1, -1), torch.zeros(2, 2)  # feature = logit of class 0
    last, label = torch.tensor([[0.0, 3.0]]).expand(7, 2), torch.tensor([0, 0, 1, 0, 0, 1, 1])

    def loss(logit, is_right):
        return torch.tensor(float(-logit if is_right else logit)).exp().log1p()

    first = (loss(9, True) + loss(8, True) + loss(7, False) + loss(6, True)) / 4
    second = (loss(5, True) + loss(4, False)) / 2  # of what is left, features 5, 2, 4 at exit 2
    third = loss(3, True)  # one left; the frozen head says class 1, and it is
    torch.testing.assert_close(model.meta_loss(features, last, label, weight, bias), first + second + third)
    without = WeightedExits(3, 1, 2, replace(CIFAR, ratio=0.5, last_head=False), hidden=1)
    second = (loss(5, True) + loss(2, False) + loss(4, False)) / 3
    torch.testing.assert_close(without.meta_loss(features, last, label, weight, bias), first + second)


def test_halves_swap_roles_and_a_single_sample_trains():
    model, batch = weighted(), batch_of(5)
    model.optimizers(0.1)
    rows = batch | {"label": torch.arange(5)}
    assert [half["label"].tolist() for half in model.halves(rows)] == [[0, 1, 2], [3, 4]]
    model.advance()
    assert [half["label"].tolist() for half in model.halves(rows)] == [[3, 4], [0, 1, 2]]
    single = {name: values[:1] for name, values in batch.items()}
    for _ in range(2):
        terms = model.terms(single)
        assert terms["modules"] > 0 and terms["weights"] == 0
        model.advance()


def test_the_network_learns_every_so_many_steps_and_is_left_alone_between_them():
    model, (data, _) = weighted(replace(CIFAR, every=3)), planted()
    seen = []

    def loss(model, batch):
        seen.append(torch.cat([p.detach().flatten() for p in model.net.parameters()]))
        return model.terms(batch)

    trained(model, data, steps=8, loss=loss)
    changed = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert changed == [True, False, False] * 2 + [True]  # decay and Adam's memory move nothing either


@pytest.mark.parametrize("weighting", [CIFAR, IMAGENET])
def test_it_learns_a_planted_task(weighting):
    model, (data, difficulty) = weighted(weighting), planted()
    trained(model, data)
    right = model.logits(data["features"], data["last"]).argmax(-1) == data["label"].unsqueeze(1)
    for level in range(EXITS):
        assert right[difficulty <= level, level].double().mean() > 0.95


def test_the_network_finds_that_early_exits_should_learn_from_samples_that_leave_early():
    model, (data, difficulty) = weighted(hidden=50), planted()
    trained(model, data, steps=600, net_rate=0.01)
    weights = model.sample_weights(losses_of(model, data)).detach()
    easy, hard = weights[difficulty == 0, 0].mean(), weights[difficulty == 3, 0].mean()
    assert easy > hard + 0.1, (easy, hard)


def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path):
    data, _ = planted()
    whole, broken, resumed = (weighted(replace(CIFAR, every=2)) for _ in range(3))
    expected = trained(whole, data, steps=23, checkpoint=tmp_path / "whole")
    left = iter(range(17))

    def loss(model, batch):
        if next(left, None) is None:
            raise OSError("power is gone")
        return model.terms(batch)

    with pytest.raises(OSError, match="power"):
        trained(broken, data, steps=23, loss=loss, checkpoint=tmp_path / "c")
    history = trained(resumed, data, steps=23, checkpoint=tmp_path / "c", resume=True)
    assert history.steps == expected.steps == 23
    state, other = whole.state_dict(), resumed.state_dict()
    assert state["step"] == 23 and state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert torch.equal(
        whole._sgd.state[whole.weight]["momentum_buffer"], resumed._sgd.state[resumed.weight]["momentum_buffer"]
    )


def test_initial_weights_come_from_the_generator_alone():
    before = torch.get_rng_state()
    first, second = weighted().state_dict(), weighted().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_published_comparison_had_weaker_settings_than_the_authors():
    assert Weighting(epsilon=0.8, mean="col", every=1, ratio=0.75, last_head=True) == CIFAR
    assert Weighting(epsilon=0.3, mean="mat", every=100, ratio=0.75, last_head=False) == IMAGENET
    assert (weighted(CIFAR).net[0].in_features, weighted(IMAGENET).net[0].in_features) == (4, 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Weighting(epsilon=-0.1), "epsilon must be"),
        (lambda: Weighting(mean="cols"), "did you mean 'col'"),
        (lambda: Weighting(every=0), "every must be at least 1"),
        (lambda: Weighting(ratio=0.0), "ratio must be positive"),
        (lambda: weighted(hidden=0), "at least 1 hidden unit"),
        (lambda: WeightedExits(1, 2, 2), "at least 2 exits"),
        (lambda: weighted().terms(batch_of()), r"optimizers\(rate\)"),
    ],
)
def test_bad_input_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
