"""NaN and infinity: the alarm names the culprit and saves nothing spoiled."""

from __future__ import annotations

import math

import pytest
import torch
from one_weight import Scalar, by_list, pull, train

from moe_lab.train import NonFiniteLoss


def test_the_alarm_names_term_and_step_and_leaves_the_weights_alone():
    def loss(model, batch):
        return {"pull": (model.w * batch["x"]).mean(), "entropy": (model.w.sum() * 0 / (batch["x"].sum() - 2))}

    model = Scalar()
    with pytest.raises(NonFiniteLoss, match=r"step 2: loss term entropy = nan.*pull = .*learning rate"):
        train(model, x=(1.0, 2.0, 3.0), loss=loss, coefficients={"pull": 1.0, "entropy": 0.1})
    assert model.w.item() == pytest.approx(-0.1)


def test_the_alarm_names_the_parameter_whose_gradient_is_spoiled():
    def loss(model, batch):  # sqrt has an infinite gradient at 0, its value is fine
        return {"pull": model.w.sum().sqrt()}

    with pytest.raises(NonFiniteLoss, match="step 1: the gradients are non-finite: of w"):
        train(Scalar(0.0), loss=loss)


def test_a_spoiled_log_only_term_does_no_harm():
    model = Scalar()
    train(
        model,
        loss=lambda m, b: {**pull(m, b), "odd": m.w.sum() * math.nan},
        coefficients={"pull": 1.0, "odd": 0.0},
    )
    assert model.w.item() == pytest.approx(-0.1)


def test_an_optimiser_that_spoils_weights_writes_no_checkpoint(tmp_path):
    class Spoiler(torch.optim.SGD):
        def step(self):
            self.param_groups[0]["params"][0].data.fill_(math.inf)

    model = Scalar()
    with pytest.raises(NonFiniteLoss, match="after step 1 parameters are non-finite: w"):
        train(model, optimizer=Spoiler(model.parameters(), lr=0.1), checkpoint=tmp_path / "c")
    assert torch.load(tmp_path / "c", weights_only=True)["model"]["w"].item() == 0.0


def test_a_monitored_metric_that_is_no_number_is_an_error():
    with pytest.raises(NonFiniteLoss, match="valid_loss is nan after epoch 1"):
        train(Scalar(), evaluate=by_list([math.nan]))
