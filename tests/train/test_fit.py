"""`fit`: what it optimises, when it stops, which weights it leaves, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from one_weight import Scalar, by_list, pull, train
from torch import nn

from moe_lab.train import FitConfig, evaluating


def test_steps_follow_the_gradient_of_the_weighted_total():
    # total = 2 (w x) + 3 w, gradient 2 x + 3; x = 1, 2, 4: w = -0.1 (5 + 7 + 11) = -2.3
    def loss(model, batch):
        return {"pull": (model.w * batch["x"]).mean(), "size": model.w.sum(), "noted": model.w.sum() * 100}

    model = Scalar()
    history = train(model, x=(1.0, 2.0, 4.0), loss=loss, coefficients={"pull": 2.0, "size": 3.0, "noted": 0.0})
    assert model.w.item() == pytest.approx(-2.3)
    row = history.rows[0]
    # w before the steps: 0, -0.5, -1.2; pull: 0, -1, -4.8; size: 0, -0.5, -1.2
    assert row["train_pull"] == pytest.approx(-5.8 / 3)
    assert row["train_size"] == pytest.approx(-1.7 / 3)
    assert row["train_noted"] == pytest.approx(-170 / 3)
    assert row["train_loss"] == pytest.approx((2 * -5.8 + 3 * -1.7) / 3)
    assert (row["epoch"], row["step"], row["lr"]) == (1, 3, 0.1)


def test_the_clipped_step_has_the_clip_norm():
    model = Scalar()
    train(model, x=(100.0,), config={"clip_norm": 0.5})
    assert model.w.item() == pytest.approx(-0.05, rel=1e-5)
    model = Scalar()
    train(model, x=(0.25,), config={"clip_norm": 0.5})
    assert model.w.item() == pytest.approx(-0.025, rel=1e-5)  # shorter than the clip norm: as it is


def test_sparse_and_dense_gradients_are_clipped_together_and_stepped_by_their_own_optimisers():
    class Both(Scalar):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding.from_pretrained(torch.zeros(5, 1), freeze=False, sparse=True)

    def loss(model, batch):  # rows 2, 2 and 4: gradients 2, 1 once the rows hit twice are added up; dense: 2
        return {"pull": model.table(torch.tensor([2, 2, 4])).sum() + 2 * model.w.sum()}

    model = Both()
    optimizers = [torch.optim.SGD([model.w], lr=1.0), torch.optim.SGD(model.table.parameters(), lr=1.0)]
    train(model, loss=loss, optimizer=optimizers, config={"clip_norm": 1.5})  # norm sqrt(4 + 1 + 4) = 3
    assert model.w.item() == pytest.approx(-1.0, rel=1e-5)
    assert model.table.weight.flatten().tolist() == pytest.approx([0, 0, -1.0, 0, -0.5], rel=1e-5)


@pytest.mark.parametrize(
    ("losses", "patience", "best", "epochs", "why"),
    [
        ((3.0, 1.0, 2.0, 2.0, 0.5), 2, 2, 4, "patience"),
        ((3.0, 1.0, 2.0, 0.5, 2.0), 2, 4, 5, "epochs"),
        ((1.0, 1.0, 1.0, 1.0, 1.0), None, 1, 5, "epochs"),  # a tie keeps the earlier one
    ],
)
def test_the_best_epochs_weights_are_in_the_model_however_it_stops(losses, patience, best, epochs, why):
    model = Scalar()
    history = train(model, evaluate=by_list(losses), config={"epochs": 5, "patience": patience})
    assert (history.best_epoch, history.best_value) == (best, losses[best - 1])
    assert (len(history.rows), history.stopped) == (epochs, why)
    assert model.w.item() == pytest.approx(-0.1 * best)  # one step of 0.1 per epoch


def test_max_steps_ends_in_the_middle_of_an_epoch_and_evaluates():
    history = train(Scalar(), x=(1.0,) * 4, evaluate=by_list((1.0, 2.0)), config={"epochs": None, "max_steps": 6})
    assert (history.steps, history.stopped, [row["step"] for row in history.rows]) == (6, "max_steps", [4, 6])


def test_each_scheduled_module_advances_once_per_step_even_if_it_is_used_twice():
    class Clock(nn.Module):
        ticks = 0

        def advance(self):
            self.ticks += 1

    model, clock = Scalar(), Clock()
    model.first, model.second = clock, nn.Sequential(clock)
    train(model, x=(1.0,) * 3, config={"epochs": 2})
    assert clock.ticks == 6


def test_parameters_without_gradient_rest_while_the_other_phase_is_on():
    class Phases(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))

        def advance(self):
            self.step += 1

    def loss(model, batch):  # one step for a, then one for b
        chosen, other = ("a", "b") if int(model.step) % 2 == 0 else ("b", "a")
        return {chosen: getattr(model, chosen).sum(), other: torch.zeros(())}

    model = Phases()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)  # momentum would move a resting one
    train(model, x=(1.0,) * 3, loss=loss, coefficients={"a": 1.0, "b": 1.0}, optimizer=optimizer)
    assert (model.a.item(), model.b.item()) == (pytest.approx(-1 - 1.9), -1.0)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ({"pul": 1.0}, "'pull' has no coefficient.*0.0 to only log"),
        ({"pull": 1.0, "pulll": 0.1}, "'pulll' has no loss term; did you mean 'pull'"),
        ({"pull": math.nan}, "finite"),
        ({"pull": 0.0}, "nothing to learn"),
        ({"loss": 1.0}, "name the term after what it measures"),
    ],
)
def test_terms_and_coefficients_that_do_not_fit_are_refused(coefficients, message):
    with pytest.raises(ValueError, match=message):
        train(Scalar(), coefficients=coefficients)


def test_a_metric_that_is_not_there_is_named_with_its_neighbour():
    with pytest.raises(ValueError, match=r"no 'valid_los'.*did you mean 'valid_loss'"):
        train(Scalar(), evaluate=by_list([1.0]), monitor="valid_los")
    with pytest.raises(ValueError, match="belong to fit"):
        train(Scalar(), evaluate=lambda model: {"valid_loss": 1.0, "epoch": 3})
    with pytest.raises(ValueError, match="patience needs evaluate"):
        train(Scalar(), config={"patience": 2})


@pytest.mark.parametrize("bad", [{"epochs": None}, {"epochs": 0}, {"patience": 0}, {"clip_norm": 0.0}])
def test_a_config_without_sense_is_refused(bad):
    with pytest.raises(ValueError):
        FitConfig(**{"epochs": 1, **bad})


def test_evaluating_restores_each_modules_own_mode():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, True, False] and torch.is_grad_enabled()


def test_fit_leaves_the_modes_as_it_found_them_and_trains_in_training_mode():
    model = Scalar().eval()
    seen = []

    def loss(model, batch):
        seen.append(model.training)
        return pull(model, batch)

    train(model, loss=loss, evaluate=by_list((1.0, 1.0)), config={"epochs": 2})
    assert seen == [True, True] and not model.training
