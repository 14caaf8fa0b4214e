"""BoostedNet on cached features: the sum, whose gradient goes where, and that it learns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, one_hot

from moe_lab.batches import Batches
from moe_lab.exits.boosted import BoostedExits
from moe_lab.exits.joint import JointExits, Phases
from moe_lab.exits.linear import LinearExits
from moe_lab.exits.losses import cross_entropies
from moe_lab.train import FitConfig, fit


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def boosted(n_exits=4, width=5, n_classes=3, omega=0.5, **options):
    return BoostedExits(n_exits, width, n_classes, omega, generator=seeded(), **options)


def batch_of(n=30, n_exits=4, width=5, n_classes=3, seed=1):
    generator = seeded(seed)
    return {
        "features": torch.randn(n, n_exits, width, generator=generator),
        "last": torch.randn(n, n_classes, generator=generator),
        "label": torch.randint(n_classes, (n,), generator=generator),
    }


def stages_by_hand(model, batch):
    """f_1 .. f_L, one plain linear layer after the other."""
    layers = zip(batch["features"].unbind(1), model.weight, model.bias, strict=False)  # the last head is not a layer
    return [x @ weight + bias for x, weight, bias in layers] + [batch["last"]]


@given(st.integers(2, 6), st.integers(0, 9), st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.0]))
def test_an_exit_predicts_the_sum_of_all_stages_so_far_with_falling_shares(n_exits, n, omega):
    model, batch = boosted(n_exits, omega=omega).double(), batch_of(n, n_exits)
    batch = {name: values.double() if values.is_floating_point() else values for name, values in batch.items()}
    stages = stages_by_hand(model, batch)
    expected = [sum(omega ** (level - j) * stages[j] for j in range(level + 1)) for level in range(n_exits)]
    torch.testing.assert_close(model.logits(batch["features"], batch["last"]), torch.stack(expected, 1))


def test_training_and_use_see_the_same_sums():
    model, batch = boosted(), batch_of()
    logits = model.train().logits(batch["features"], batch["last"])
    expected = sum(cross_entropy(logits[:, level], batch["label"]) for level in range(3))
    torch.testing.assert_close(model.terms(batch)["modules"], expected)
    with torch.no_grad():
        assert torch.equal(logits, model.eval().logits(batch["features"], batch["last"]))


@pytest.mark.parametrize("stage", range(4))
def test_the_loss_of_a_stage_moves_its_own_module_only(stage):
    model, batch = boosted(), batch_of()
    losses = cross_entropies(model.logits(batch["features"], batch["last"]), batch["label"]).mean(0)
    grads = torch.autograd.grad(losses[stage], [model.weight, model.bias], allow_unused=True)
    for grad in grads:
        if stage == 3:  # the frozen head's
            assert grad is None or not grad.any()
            continue
        moved = [bool(grad[level].any()) for level in range(3)]
        assert moved == [level == stage for level in range(3)]


def test_a_stage_gets_the_gradient_of_a_module_that_starts_from_the_sum_before():
    model, batch = boosted(), batch_of()
    model.terms(batch)["modules"].backward()
    logits = model.logits(batch["features"], batch["last"]).detach()
    for level in range(3):  # (softmax(F) - onehot) x, by hand
        error = (logits[:, level].softmax(-1) - one_hot(batch["label"], 3)) / 30
        torch.testing.assert_close(model.weight.grad[level], batch["features"][:, level].T @ error)
        torch.testing.assert_close(model.bias.grad[level], error.sum(0))


def test_without_omega_modules_are_separate_and_the_last_exit_is_the_backbone():
    batch = batch_of()
    plain = LinearExits(4, 5, 3, generator=seeded()).logits(batch["features"], batch["last"])
    assert torch.equal(boosted(omega=0.0).logits(batch["features"], batch["last"]), plain)


def test_a_frozen_last_exit_answers_as_the_backbone_and_changes_nothing_else():
    batch = batch_of()
    ensemble, frozen = (boosted(last=last).logits(batch["features"], batch["last"]) for last in ("ensemble", "frozen"))
    assert torch.equal(frozen[:, -1], batch["last"]) and torch.equal(frozen[:, :-1], ensemble[:, :-1])
    assert not torch.equal(ensemble[:, -1], batch["last"])


def test_modules_start_as_those_of_joint_training():
    joint = JointExits(4, 5, 3, [0.1], torch.ones(4), phases=Phases(), generator=seeded())
    assert torch.equal(boosted().weight, joint.weight[0]) and torch.equal(boosted().bias, joint.bias[0])


def in_turn(n=1200):
    """Exit l sees only whether the label is l: stages have to be added up, one module alone knows one class."""
    label = torch.arange(n) % 4
    seen = one_hot(label, 4).float()
    features = torch.stack([seen[:, [level]] for level in range(3)] + [seen[:, [3]]], 1)
    noise = 0.05 * torch.randn(features.shape, generator=seeded(3))
    return {"features": features + noise, "last": 10.0 * seen, "label": label}


def accuracies(model, batch):
    return (model.logits(batch["features"], batch["last"]).argmax(-1) == batch["label"].unsqueeze(1)).double().mean(0)


def test_later_stages_build_on_earlier_ones_where_one_module_alone_cannot():
    data, found = in_turn(), {}
    for omega in (0.0, 0.9):
        model = boosted(4, 1, 4, omega)
        fit(
            model,
            Batches(data, 100, shuffle=True),
            lambda model, batch: model.terms(batch),
            optimizer=torch.optim.SGD(model.parameters(), 0.5, momentum=0.9),
            coefficients={"modules": 1.0},
            config=FitConfig(epochs=20, progress=False),
        )
        found[omega] = accuracies(model, data)
    # Alone, exit 3 tells one class from three that look alike: 1/4 + 1/4. Together they know all four.
    assert found[0.0][2] < 0.6 and found[0.9][2] > 0.95, found
    assert bool((found[0.9].diff() > -0.01).all())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: boosted(n_exits=1), "at least 2 exits"),
        (lambda: boosted(n_classes=1), "2 classes"),
        (lambda: boosted(omega=-0.1), "omega must be a number that is not negative"),
        (lambda: boosted(omega=float("nan")), "omega must be"),
        (lambda: boosted(last="ensembl"), "did you mean 'ensemble'"),
        (lambda: boosted().terms(batch_of(n_exits=3)), r"features must be \(batch, 4 exits, 5 numbers\), got \(30, 3"),
        (lambda: boosted().logits(torch.zeros(2, 4), torch.zeros(2, 3)), "features must be"),
    ],
)
def test_bad_input_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
