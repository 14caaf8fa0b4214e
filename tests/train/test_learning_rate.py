"""The learning rate as a function of the step, and that `fit` follows it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_weight import Scalar, train

from moe_lab.results import Result
from moe_lab.train import LearningRate


@given(
    warmup=st.integers(0, 20),
    steps=st.integers(1, 60),
    floor=st.floats(0, 1),
    kind=st.sampled_from(["cosine", "inverse_sqrt", "constant"]),
)
def test_it_rises_to_one_and_never_after(warmup, steps, floor, kind):
    rate = LearningRate(warmup, steps, floor, kind)
    values = [rate(n) for n in range(1, 100)]
    assert all(0 < value <= 1 for value in values) or floor == 0
    rising, falling = values[:warmup], values[max(0, warmup - 1) :]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    if warmup:
        assert rate(warmup) == 1.0


def test_values_by_hand():
    cosine = LearningRate(warmup=2, steps=6, floor=0.1)
    assert [cosine(1), cosine(2)] == [0.5, 1.0]
    assert cosine(4) == pytest.approx(0.1 + 0.9 / 2)  # half way
    assert cosine(6) == cosine(60) == pytest.approx(0.1)
    assert LearningRate(4, kind="inverse_sqrt")(16) == 0.5
    assert LearningRate(0, kind="inverse_sqrt")(4) == 0.5
    assert LearningRate(3, kind="constant")(50) == 1.0
    assert LearningRate(0, 4, 0.0)(1) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "linear"}, "cosine, inverse_sqrt"),
        ({"warmup": -1}, "warmup >= 0"),
        ({"floor": 2.0}, r"floor in \[0, 1\]"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearningRate(**arguments)


def test_fit_steps_by_the_scheduled_rate():
    rate = LearningRate(warmup=2, steps=4, floor=0.0)
    model = Scalar()
    train(model, x=(1.0,) * 4, rate=0.1, config={"learning_rate": rate})
    assert model.w.item() == pytest.approx(-0.1 * sum(rate(n) for n in (1, 2, 3, 4)))


def test_a_resumed_run_goes_on_with_the_rate_of_its_step(tmp_path):
    def run(path, resume=False, fail_at=None):
        model, calls = Scalar(), []

        def loss(model, batch):
            calls.append(1)
            if len(calls) == fail_at:
                raise RuntimeError("power cut")
            return {"pull": (model.w * batch["x"]).mean()}

        result = Result.open("schedule", {"seed": 0}, root=path)
        config = {"learning_rate": LearningRate(2, 6), "checkpoint_every": 1}
        train(model, x=(1.0,) * 6, loss=loss, config=config, result=result, resume=resume)
        return model.w.item()

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", fail_at=4)
    assert run(tmp_path / "cut", resume=True) == whole


def test_parameter_groups_keep_their_proportions():
    model = torch.nn.Linear(1, 1)
    groups = [{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    before = [parameter.detach().clone() for parameter in (model.weight, model.bias)]
    train(
        model,
        optimizer=optimizer,
        loss=lambda model, batch: {"pull": (model.weight + model.bias).sum()},
        config={"learning_rate": LearningRate(2, 4)},
    )
    moved = [(old - new).item() for old, new in zip(before, (model.weight, model.bias), strict=True)]
    assert moved == pytest.approx([0.5, 0.05])
