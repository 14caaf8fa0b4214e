"""NaN and infinity: the alarm names the culprit and saves nothing spoiled."""

from __future__ import annotations

import math

import pytest
import torch
from one_weight import Scalar, by_list, pull, train

from moe_lab.batches import Batches
from moe_lab.train import FitConfig, NonFiniteLoss, fit
from moe_lab.train.checkpoint import load_checkpoint
from moe_lab.train.meter import Meter


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
        train(
            model,
            x=(1.0, 1.0),
            optimizer=Spoiler(model.parameters(), lr=0.1),
            checkpoint=tmp_path / "c",
            config={"checkpoint_every": 1},
        )
    assert torch.load(tmp_path / "c", weights_only=True)["model"]["w"].item() == 0.0


def test_a_monitored_metric_that_is_no_number_is_an_error():
    with pytest.raises(NonFiniteLoss, match="valid_loss is nan after epoch 1"):
        train(Scalar(), evaluate=by_list([math.nan]))


def test_a_late_check_still_names_the_first_bad_step_and_means_do_not_depend_on_when_numbers_are_fetched():
    def record(meter, values):
        for step, value in enumerate(values, start=1):
            total = torch.tensor(value)
            meter.record(step, {"pull": total}, total, torch.ones(()))
        meter.flush()
        return meter

    good = [1.1, 2.7, -0.3] * 11
    late, at_once = record(Meter(Scalar(), on_gpu=True), good), record(Meter(Scalar(), on_gpu=False), good)
    assert late.sums == at_once.sums and late.counts["train_pull"] == 33
    with pytest.raises(NonFiniteLoss, match="step 21: loss term pull = inf"):
        record(Meter(Scalar(), on_gpu=True), [*good[:20], math.inf, math.nan, 1.0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_alarm_comes_before_any_checkpoint_and_a_resumed_run_goes_on(tmp_path):
    def loss(model, batch):
        keep = torch.nn.functional.dropout(batch["x"], 0.5)
        return {"pull": (model.w * keep).mean()}

    def run(model, x, **options):
        model = model.cuda()
        return fit(
            model,
            Batches({"x": torch.tensor(x)}, 1, device="cuda", keep_on_device=True),
            loss,
            optimizer=torch.optim.Adam(model.parameters(), lr=0.1),
            coefficients={"pull": 1.0},
            config=FitConfig(epochs=1, checkpoint_every=10, progress=False),
            checkpoint=tmp_path / "c",
            **options,
        )

    torch.manual_seed(0)
    whole, half, resumed = Scalar(), Scalar(), Scalar()
    run(whole, [1.0] * 25)
    torch.manual_seed(0)
    with pytest.raises(NonFiniteLoss, match="step 14: "):
        run(half, [1.0] * 13 + [math.inf] + [1.0] * 11)
    assert load_checkpoint(tmp_path / "c")["history"]["steps"] == 10
    torch.manual_seed(9)
    assert run(resumed, [1.0] * 25, resume=True).steps == 25
    assert torch.equal(resumed.w, whole.w)
