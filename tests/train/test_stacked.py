"""Many models in one stack: each follows the trajectory that it would have alone, and none disturbs another."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from moe_lab.batches import Batches
from moe_lab.train import FitConfig, LearningRate, fit
from moe_lab.train.counted_dropout import _mix, keep_masks, random_words, survivor_scale
from moe_lab.train.stack import TrialStack
from moe_lab.train.stacked import fit_stacked
from moe_lab.train.stacked_adam import StackedAdam

RATES, SIZES, SEEDS = (0.01, 0.03, 0.05), (0.0, 0.1, 1.0), (4, 5, 9)
X = torch.linspace(-1, 1, 23 * 3).view(23, 3).sin()
DATA = {"x": X, "y": X.sum(1).cos()}
QUIET = FitConfig(epochs=3, progress=False)


class Counted(nn.Module):
    """Two layers and a counter of steps in a buffer, on which nothing else depends."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.b = nn.Parameter(torch.randn(4, generator=generator))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def advance(self) -> None:
        self.steps += 1

    def forward(self, x, keep=None):
        h = (x @ self.a).tanh()
        return (h if keep is None else torch.where(keep, h * survivor_scale(0.5), 0)) @ self.b


def error(model, batch):
    answer = model(batch["x"], batch.get("keep"))
    return {"error": (answer - batch["y"]).square().mean(), "size": model.a.square().mean()}


def masks(stack, step, batch):
    seeds = torch.tensor([SEEDS[trial.index] for trial in stack.trials])
    return {"keep": keep_masks(seeds, step, (batch["x"].shape[1], 4), 0.5)}


def batches(seeds=SEEDS, size=5, data=DATA):
    return [Batches(data, size, shuffle=True, seed=seed) for seed in seeds]


def answers(model):
    return (model(DATA["x"]) - DATA["y"]).square().mean()


def by_models(stack):
    """The evaluation that reads each trial's own model."""
    return [{"valid_loss": float(answers(trial.model))} for trial in stack.trials]


def stacked(which=(0, 1, 2), config=QUIET, **options):
    options.setdefault("evaluate", by_models)
    return fit_stacked(
        [Counted(SEEDS[i]) for i in which],
        options.pop("train", None) or batches([SEEDS[i] for i in which]),
        options.pop("loss", error),
        learning_rates=options.pop("learning_rates", [RATES[i] for i in which]),
        coefficients=options.pop("coefficients", [{"error": 1.0, "size": SIZES[i]} for i in which]),
        config=config,
        **options,
    )


def alone(i, config=QUIET):
    model = Counted(SEEDS[i])
    history = fit(
        model,
        batches()[i],
        error,
        optimizer=torch.optim.Adam(model.parameters(), RATES[i], eps=1e-7, fused=True),
        coefficients={"error": 1.0, "size": SIZES[i]},
        evaluate=lambda model: {"valid_loss": float(answers(model))},
        config=config,
    )
    return model, history


def same(trial, model, history, **tolerance):
    """Rows, choice of the epoch and final weights agree."""
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-6}
    assert (trial.history.best_epoch, trial.history.stopped) == (history.best_epoch, history.stopped)
    assert trial.history.steps == history.steps
    for row, other in zip(trial.history.rows, history.rows, strict=True):
        assert list(row) == list(other)
        for name in row.keys() - {"seconds"}:
            np.testing.assert_allclose(row[name], other[name], **tolerance, err_msg=name)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trial.model.state_dict()[name], value, **tolerance)


def outcome(trials):
    """Everything but the clock, to be compared bit for bit."""
    rows = [
        [{name: value for name, value in row.items() if name != "seconds"} for row in trial.history.rows]
        for trial in trials
    ]
    weights = [{n: v.tolist() for n, v in trial.model.state_dict().items()} for trial in trials]
    ends = [(t.history.best_epoch, t.history.stopped, t.history.steps, t.failed, t.curves) for t in trials]
    return rows, weights, ends


@pytest.mark.parametrize(
    "config",
    [
        QUIET,
        dataclasses.replace(QUIET, epochs=6, patience=1),
        dataclasses.replace(QUIET, clip_norm=0.5, learning_rate=LearningRate(warmup=4, steps=12)),
        dataclasses.replace(QUIET, epochs=None, max_steps=7),  # ends within the second epoch
    ],
    ids=["plain", "patience", "clip and schedule", "max_steps"],
)
def test_each_trial_of_a_stack_follows_the_trajectory_that_fit_gives_it(config):
    trials = stacked(config=config)
    for i, trial in enumerate(trials):
        same(trial, *alone(i, config))
    if config.patience:
        assert len({len(trial.history.rows) for trial in trials}) > 1  # they left the stack at different epochs


@pytest.mark.parametrize("i", range(3))
def test_a_trial_with_dropout_is_the_same_alone_and_among_others(i):
    def own(stack, step, batch):
        assert [trial.index for trial in stack.trials] == [0]
        return {"keep": keep_masks(torch.tensor([SEEDS[i]]), step, (batch["x"].shape[1], 4), 0.5)}

    (single,) = stacked((i,), inputs=own)
    among = stacked(inputs=masks)[i]
    same(among, single.model, single.history)
    assert among.history.rows[0]["train_error"] != stacked()[i].history.rows[0]["train_error"]


def scripted(script, seen):
    """An evaluation by hand: metric of trial i in epoch e is script[i][e]; notes who is there and their weights."""

    def evaluate(stack):
        epoch = len(stack.trials[0].history.rows)
        seen.append({t.index: t.model.a.detach().clone() for t in stack.trials})
        return [{"valid_loss": script[trial.index][epoch]} for trial in stack.trials]

    return evaluate


def test_early_stopping_by_hand_freezes_the_best_weights_and_removes_the_row():
    """Patience 2. Trial 0 is best in epoch 1 and leaves after 3; trial 1 improves always; trial 2: a tie keeps 2."""
    script = {0: [1, 2, 3], 1: [9, 8, 7, 6, 5], 2: [5, 3, 3, 4]}
    seen = []
    config = FitConfig(epochs=5, patience=2, progress=False)
    trials = stacked(config=config, evaluate=scripted(script, seen))
    assert [sorted(there) for there in seen] == [[0, 1, 2]] * 3 + [[1, 2], [1]]
    assert [trial.history.stopped for trial in trials] == ["patience", "epochs", "patience"]
    assert [trial.history.best_epoch for trial in trials] == [1, 5, 2]
    assert [len(trial.history.rows) for trial in trials] == [3, 5, 4]
    for i, trial in enumerate(trials):
        best = trial.history.best_epoch
        assert torch.equal(trial.model.a, seen[best - 1][i])
        assert int(trial.model.steps) == 5 * best  # five steps an epoch: buffers are the best epoch's, too
        assert trial.model.a.untyped_storage().nbytes() == 4 * 12  # its own storage, not the stack's


def test_removed_rows_cost_nothing():
    shapes = []

    def count(stack, step, batch):
        shapes.append((len(batch["x"]), len(stack.parameters["a"])))
        return {}

    script = {0: [1, 2], 1: [3, 2, 1], 2: [1, 2]}
    stacked(config=FitConfig(epochs=3, patience=1, progress=False), evaluate=scripted(script, []), inputs=count)
    assert shapes == [(3, 3)] * 10 + [(1, 1)] * 5


class PowerCut(Exception):
    """In place of a killed process: nothing that runs later may have helped."""


def cut(function, n):
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > n:
            raise PowerCut
        return function(*arguments)

    return interrupted


def test_a_killed_stack_goes_on_bit_for_bit(tmp_path):
    config = FitConfig(epochs=6, patience=1, progress=False, checkpoint_every=3)

    def logging(stack):
        for trial in stack.trials:
            trial.log("probe", epoch=len(trial.history.rows))
        return by_models(stack)

    options = {"config": config, "inputs": masks, "evaluate": logging, "look_first": True}
    whole = outcome(stacked(**options))
    assert len({len(rows) for rows in whole[0]}) > 1  # at some kill points a trial had already left
    for number, (place, n) in enumerate(
        [
            ("inputs", 0),
            ("inputs", 4),
            ("inputs", 13),
            ("inputs", 16),
            ("evaluate", 0),
            ("evaluate", 1),
            ("evaluate", 3),
        ]
    ):
        path = tmp_path / f"{number}.ckpt"
        with pytest.raises(PowerCut):
            stacked(**{**options, place: cut(options[place], n)}, checkpoint=path)
        assert outcome(stacked(**options, checkpoint=path, resume=True)) == whole, (place, n)


def test_rarer_checkpoints_cost_more_repetition_and_change_nothing(tmp_path):
    path, steps = tmp_path / "stack.ckpt", []

    def counting(stack, step, batch):
        steps.append(step)
        return masks(stack, step, batch)

    with pytest.raises(PowerCut):
        stacked(inputs=cut(masks, 14), checkpoint=path, checkpoint_epochs=2)
    resumed = stacked(inputs=counting, checkpoint=path, checkpoint_epochs=2, resume=True)
    assert steps == list(range(10, 15))
    assert outcome(resumed) == outcome(stacked(inputs=masks))


def test_ctrl_c_in_an_evaluation_saves_and_goes_on_bit_for_bit(tmp_path):
    def stop(stack):
        stack.trials[0].log("probe", half=True)
        if len(stack.trials[0].history.rows) == 1:
            raise KeyboardInterrupt
        return by_models(stack)

    path = tmp_path / "stack.ckpt"
    with pytest.raises(KeyboardInterrupt, match=r"in epoch 2, after step 10.*resume=True"):
        stacked(evaluate=stop, checkpoint=path)
    resumed = stacked(checkpoint=path, resume=True)
    assert [trial.curves for trial in resumed] == [{"probe": [{"half": True}]}, {}, {}]  # of the first epoch only
    assert outcome(resumed)[:2] == outcome(stacked())[:2]


def test_a_finished_stack_is_restored_without_a_step(tmp_path):
    path = tmp_path / "stack.ckpt"
    first = stacked(checkpoint=path)
    again = stacked(checkpoint=path, resume=True, inputs=lambda *_: pytest.fail("trained again"))
    assert outcome(again) == outcome(first)


def test_one_trial_that_meets_nan_fails_with_its_step_and_the_others_go_on():
    def poisoned(model, batch):
        terms = error(model, batch)
        return {**terms, "error": terms["error"] * batch["poison"]}

    def poison(at):
        def inputs(stack, step, batch):
            bad = [torch.nan if trial.index == 1 and step == at else 1.0 for trial in stack.trials]
            return {"poison": torch.tensor(bad)}

        return inputs

    clean = stacked(loss=poisoned, inputs=poison(-1))
    trials = stacked(loss=poisoned, inputs=poison(6))  # the second step of the second epoch
    assert trials[1].failed.startswith("step 7: the loss was nan")
    assert len(trials[1].history.rows) == 1
    assert torch.isfinite(trials[1].model.a).all()  # it has the weights of the only epoch it finished
    for i in (0, 2):
        assert not trials[i].failed
        same(trials[i], clean[i].model, clean[i].history)


def test_spoiled_parameters_and_metrics_are_failures_of_their_trial_only():
    huge = stacked(learning_rates=[0.01, 3e38, 0.05])
    assert "step" in huge[1].failed
    assert not huge[0].failed + huge[2].failed
    nan = stacked(evaluate=scripted({0: [1, 2, 3], 1: [1, torch.nan], 2: [3, 2, 1]}, []))
    assert nan[1].failed.startswith("valid_loss is nan after epoch 2")
    assert [len(trial.history.rows) for trial in nan] == [3, 1, 3]


def test_when_every_trial_fails_the_stack_ends(tmp_path):
    trials = stacked(loss=lambda model, batch: {"error": model.a.sum() * torch.nan, "size": model.b.sum()})
    assert all(trial.failed.startswith("step 1:") for trial in trials)
    assert all(not trial.history.rows for trial in trials)


def test_stacked_adam_is_torchs_adam_with_a_rate_per_row():
    start, rates = torch.randn(3, 2, 5), (0.1, 0.01, 0.002)
    parameters = {"p": start.clone()}
    ours = StackedAdam(parameters, eps=1e-7)
    theirs = [nn.Parameter(start[k].clone()) for k in range(3)]
    optimisers = [torch.optim.Adam([p], rate, eps=1e-7) for p, rate in zip(theirs, rates, strict=True)]
    for n in range(1, 8):
        gradient = torch.randn(3, 2, 5) * 10.0 ** (-n)
        ours.step(parameters, {"p": gradient}, rates, n)
        for p, g, optimiser in zip(theirs, gradient, optimisers, strict=True):
            p.grad = g.clone()
            optimiser.step()
    torch.testing.assert_close(parameters["p"], torch.stack(list(theirs)).detach(), rtol=1e-5, atol=1e-7)


def test_rows_that_have_ceased_to_learn_keep_value_and_moments():
    parameters = {"p": torch.zeros(3, 2)}
    adam = StackedAdam(parameters)
    adam.step(parameters, {"p": torch.ones(3, 2)}, (0.1, 0.1, 0.1), 1)
    before = parameters["p"].clone()
    adam.step(parameters, {"p": torch.ones(3, 2)}, (0.1, 0.1, 0.1), 2, {"p": [1]})
    assert torch.equal(parameters["p"][[0, 2]], before[[0, 2]])
    assert (parameters["p"][1] < before[1]).all()
    assert adam.first["p"][:, 0].tolist() == pytest.approx([0.1, 0.19, 0.1])
    adam.step(parameters, {"p": torch.ones(3, 2)}, (0.1, 0.1, 0.1), 3, {"p": []})
    assert adam.first["p"][:, 0].tolist() == pytest.approx([0.1, 0.19, 0.1])


def test_the_hash_is_splitmix64():
    """Its published first number for state 0 is 0xE220A8397B1DCDAF: the finaliser of the golden gamma."""
    golden = torch.tensor([0x9E3779B97F4A7C15 - 2**64])
    assert int(_mix(golden)) % 2**64 == 0xE220A8397B1DCDAF


def test_masks_are_a_function_of_seed_and_step_alone():
    seeds = torch.tensor([3, 1000, 7])
    masks = keep_masks(seeds, 12, (5, 9), 0.5)
    assert masks.shape == (3, 5, 9)
    assert torch.equal(keep_masks(seeds[1:2], 12, (5, 9), 0.5), masks[1:2])
    others = [keep_masks(seeds, 13, (5, 9), 0.5), keep_masks(seeds + 1, 12, (5, 9), 0.5)]
    assert all(0.3 < (masks == other).float().mean() < 0.7 for other in others)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_keep_the_mean_and_have_no_memory(p):
    """200,000 decisions: the standard error of a share is at most 0.0011."""
    keep = keep_masks(torch.arange(20), 3, (10_000,), p).float()
    share = 1 / survivor_scale(p)
    assert share == pytest.approx(1 - p, abs=1 / 512)
    assert float(keep.mean()) == pytest.approx(share, abs=0.005)
    centred = keep - share
    for other in (centred.roll(1, 1), centred.roll(8, 1), centred.roll(1, 0)):
        assert abs(float((centred * other).mean())) < 0.005
    bits = random_words(torch.arange(4), 0, 5000).view(torch.uint8)
    counts = torch.bincount(bits.flatten().int(), minlength=256).float()
    assert float(((counts - counts.mean()).square() / counts.mean()).sum()) < 340  # chi-square, 255 degrees: p > 3e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rates": [0.1]}, "a model, batches, a learning rate and coefficients; got .*'learning_rates': 1"),
        ({"learning_rates": [0.1, 0.0, 0.1]}, "must be positive"),
        ({"coefficients": [{"error": 1.0, "size": 0.0}] * 2 + [{"error": 1.0}]}, "same loss terms; use 0.0"),
        ({"coefficients": [{"error": 1.0, "siez": 0.0}] * 3}, "'size' has no coefficient"),
        ({"coefficients": [{"error": 0.0, "size": 0.0}] * 3}, "nothing to learn from"),
        ({"train": batches()[:2] + batches(size=6)[2:]}, "different batch sizes belong to different stacks"),
        ({"train": batches()[:2] + batches(data={**DATA, "y": X.sum(1)})[2:]}, r"train\[2\] has other arrays"),
        ({"config": FitConfig(epochs=2, patience=1), "evaluate": None}, "patience needs evaluate"),
        ({"resume": True}, "needs a checkpoint file"),
        ({"checkpoint_epochs": 0}, "at least 1"),
        ({"evaluate": lambda stack: [{"valid_loss": 1.0}]}, "each of the 3 trials, got 1"),
        ({"evaluate": lambda stack: [{"valid_los": 1.0}] * 3}, "no 'valid_loss' to monitor; did you mean 'valid_los'"),
        ({"evaluate": lambda stack: [{"valid_loss": 1.0, "lr": 2.0}] * 3}, r"must not use the names \['lr'\]"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stacked(**options)


def test_models_of_different_shapes_do_not_stack():
    wide = Counted(0)
    wide.b = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match="model 1 differs from model 0 in b"):
        TrialStack([Counted(0), wide], None, torch.device("cpu"))
    with pytest.raises(ValueError, match="at least one model"):
        stacked(())


def test_a_checkpoint_of_another_stack_is_refused(tmp_path):
    path = tmp_path / "stack.ckpt"
    stacked(checkpoint=path)
    with pytest.raises(ValueError, match=r"learning_rates was \[0.01, 0.03, 0.05\], is \[0.01, 0.03, 0.06\]"):
        stacked(learning_rates=[0.01, 0.03, 0.06], checkpoint=path, resume=True)


def test_masks_without_dropout_are_refused():
    with pytest.raises(ValueError, match="nothing to mask"):
        keep_masks(torch.tensor([0]), 0, (3,), 0.0)


def test_a_stack_keeps_numbers_of_its_trials_until_one_of_them_leaves():
    stack, asked = TrialStack([Counted(seed) for seed in SEEDS], None, torch.device("cpu")), []

    def rate(trial):
        asked.append(trial.index)
        return RATES[trial.index]

    first = stack.numbers("rate", rate, torch.float64)
    assert first.tolist() == list(RATES)
    assert stack.numbers("rate", rate, torch.float64) is first
    assert asked == [0, 1, 2]
    stack.keep([2, 0])
    assert stack.numbers("rate", rate).tolist() == pytest.approx([RATES[2], RATES[0]])


def test_adam_takes_rates_as_numbers_or_as_a_tensor():
    parameters = {"a": torch.ones(2, 3)}
    gradients = {"a": torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, 1.0]])}
    moved = []
    for rates in ([0.1, 0.2], torch.tensor([0.1, 0.2], dtype=torch.float64)):
        p = {"a": parameters["a"].clone()}
        StackedAdam(p).step(p, gradients, rates, 1)
        moved.append(p["a"])
    assert torch.equal(*moved)
