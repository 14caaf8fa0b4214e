"""Joint training on cached features: phases, runs side by side, and what the price does."""

import pytest
import torch

from moe_lab.batches import StepBatches
from moe_lab.exits import uncertainty_features
from moe_lab.exits.joint import JointExits
from moe_lab.exits.phases import Phases
from moe_lab.train import FitConfig, fit

EXITS, WIDTH, CLASSES = 4, 6, 3


def planted(n=600, seed=0):
    """Difficulty is planted: sample i is readable from exit d_i on (d = 0, 1, 2, 3), before that features are noise."""
    generator = torch.Generator().manual_seed(seed)
    label, difficulty = torch.arange(n) % CLASSES, torch.arange(n) // CLASSES % EXITS
    noise = torch.randn(n, EXITS, WIDTH, generator=generator)
    signal = 6 * torch.nn.functional.one_hot(label, WIDTH).unsqueeze(1)
    readable = torch.arange(EXITS) >= difficulty.unsqueeze(1)
    return {
        "features": torch.where(readable.unsqueeze(-1), signal + 0.5 * noise, noise),
        "last": 10.0 * torch.nn.functional.one_hot(label, CLASSES).float(),
        "label": label,
        "difficulty": difficulty,
    }


def joint(prices=(0.0, 0.3, 30.0), phases=None, **options):
    phases = phases or Phases(warmup=60, gate_steps=20, module_steps=20, final_gate_steps=40, steps=300)
    costs = torch.tensor([0.25, 0.5, 0.75, 1.0])
    generator = torch.Generator().manual_seed(0)
    return JointExits(EXITS, WIDTH, CLASSES, prices, costs, phases=phases, generator=generator, **options)


def trained(model, data, steps=None, momentum=0.9):
    columns = {name: data[name] for name in ("features", "last", "label")}
    fit(
        model,
        StepBatches(columns, 64, steps=20, shuffle=True, seed=0),
        lambda model, batch: model.terms(batch),
        optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=momentum),
        coefficients={"gates": 1.0, "modules": 1.0},
        config=FitConfig(epochs=None, max_steps=steps or model.phases.steps, progress=False),
    )
    return model


def test_phases_follow_each_other():
    phases = Phases(warmup=2, gate_steps=3, module_steps=1, final_gate_steps=2, steps=12)
    short = {"warmup": "w", "gates": "g", "modules": "m"}
    assert "".join(short[phases.at(step)] for step in range(12)) == "wwgggmgggmgg"
    assert phases.at(11) == "gates"
    with pytest.raises(ValueError, match="at least 5"):
        Phases(warmup=2, gate_steps=3, steps=4)
    with pytest.raises(ValueError, match="gate_steps must be at least 1"):
        Phases(gate_steps=0)


@pytest.mark.parametrize(("steps", "phase"), [(0, "warmup"), (60, "gates"), (80, "modules")])
def test_only_the_part_whose_phase_it_is_gets_a_gradient(steps, phase):
    model = joint()
    model.step.fill_(steps)
    assert model.phase == phase
    terms = model.terms(planted())
    (terms["gates"] + terms["modules"]).backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns == ({"gates.weight", "gates.bias"} if phase == "gates" else {"weight", "bias"})


def test_easy_samples_leave_early_and_a_higher_price_makes_everything_earlier():
    data = planted()
    model = trained(joint(), data)
    _, exits = model.decide(data["features"], data["last"])
    mean = exits.double().mean(1)
    assert mean[0] > mean[1] > mean[2] and (exits[2] == 0).double().mean() > 0.99
    logits, _ = model.decide(data["features"], data["last"])
    rows = torch.arange(len(data["label"]))
    right = logits[1][rows, exits[1]].argmax(-1) == data["label"]
    by_difficulty = torch.stack([exits[1][data["difficulty"] == d].double().mean() for d in range(EXITS)])
    assert bool((by_difficulty.diff() > 0).all()), by_difficulty
    assert right.double().mean() > 0.9


def test_the_warmup_is_a_weighted_mean_or_as_the_authors_sum_it():
    data, grads = planted(), {}
    for kind in ("mean", "sum"):
        model = joint(warmup_loss=kind)
        loss = model.terms(data)["modules"]
        loss.backward()
        grads[kind] = loss.detach(), model.weight.grad
    for mean, total in zip(grads["mean"], grads["sum"], strict=True):
        torch.testing.assert_close(9 * mean, total)  # v = 4, 3, 2
    each = model.cross_entropies(model.logits(data["features"], data["last"]), data["label"]).mean(1)
    torch.testing.assert_close(grads["sum"][0], (each[:, :3] * torch.tensor([4.0, 3, 2])).sum())


def test_runs_side_by_side_are_runs_one_by_one():
    data = planted(200)
    together = trained(joint(prices=(0.1, 1.0)), data, steps=120)
    for index, price in enumerate((0.1, 1.0)):
        alone = trained(joint(prices=(price,)), data, steps=120)
        torch.testing.assert_close(together.weight[index], alone.weight[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.gates.bias[index], alone.gates.bias[0], atol=1e-5, rtol=1e-4)


def test_as_released_all_prices_train_the_same_modules_and_detached_they_do_not():
    data = planted(200)
    released = trained(joint(prices=(0.01, 2.0), mode="released"), data, steps=160)
    torch.testing.assert_close(released.weight[0], released.weight[1], atol=1e-5, rtol=1e-4)
    detached = trained(joint(prices=(0.01, 2.0), mode="detached"), data, steps=160)
    assert (detached.weight[0] - detached.weight[1]).abs().max() > 0.01
    assert (released.gates.bias[0] - released.gates.bias[1]).abs().max() > 0.1  # the gates do differ


def test_weights_come_from_a_validation_set():
    model, data = joint(prices=(0.0, 100.0)), planted()
    assert model.positive.eq(1).all()
    model.weights_from(data["features"], data["last"], data["label"])
    assert model.positive[1].eq(0).all()  # everybody's best exit is the first: no negative target to balance
    assert model.positive[0].max() <= 5 and not model.positive[0].eq(1).all()


def test_logits_are_those_of_plain_linear_layers():
    model, data = joint(), planted(20)
    logits = model.logits(data["features"], data["last"])
    for run in range(3):
        for level in range(EXITS - 1):
            expected = data["features"][:, level] @ model.weight[run, level] + model.bias[run, level]
            torch.testing.assert_close(logits[run, :, level], expected)
        assert torch.equal(logits[run, :, -1], data["last"])
    losses = model.cross_entropies(logits, data["label"])
    expected = torch.nn.functional.cross_entropy(logits[1, :, 2], data["label"], reduction="none")
    torch.testing.assert_close(losses[1, :, 2], expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: joint(prices=()), "no lambda"),
        (lambda: joint(prices=(0.1, -1.0)), "must not be negative"),
        (lambda: joint(gate_inputs="margins"), "did you mean 'margin'"),
        (lambda: JointExits(3, 2, 2, [0.1], torch.ones(4), phases=Phases()), "one number per exit"),
        (lambda: joint(mode="jointly"), "unknown mode"),
        (lambda: joint(balance="cumulated"), "did you mean 'cumulative'"),
        (lambda: joint(model="indirect"), "unknown exit model"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_gate_that_sees_one_number_has_no_weight_for_the_others():
    data = planted(200)
    model = trained(joint(gate_inputs="margin"), data, steps=150)
    assert model.gates.weight[..., 2].ne(0).all() and model.gates.weight[..., [0, 1, 3]].eq(0).all()
    logits = model.logits(data["features"], data["last"])
    margin = uncertainty_features(logits[:, :, :-1])[..., 2]
    expected = margin * model.gates.weight[..., 2].unsqueeze(1) + model.gates.bias.unsqueeze(1)
    torch.testing.assert_close(model.gate_logits(logits), expected)


def test_a_gate_that_sees_features_uses_them():
    """Cross entropies of all samples are alike, so that statistics say nothing; the feature says who should stay."""
    model, data = joint(gate_inputs="features"), planted(200)
    model.step.fill_(60)
    model.terms(data)["gates"].backward()
    assert model.gates.weight.shape[-1] == 4 + WIDTH and model.gates.weight.grad[..., 4:].ne(0).any()
    assert model.weight.grad is None
    with pytest.raises(ValueError, match="see the features too"):
        model.gate_logits(model.logits(data["features"], data["last"]))


def test_each_run_keeps_its_own_best():
    model = joint(prices=(0.0, 1.0))
    with torch.no_grad():
        model.weight[0], model.weight[1] = 1.0, 10.0
        assert model.keep_best(torch.tensor([5.0, 5.0])) == 5.0
        model.weight[0], model.weight[1] = 2.0, 20.0
        model.step.fill_(7)
        assert model.keep_best(torch.tensor([4.0, 6.0])) == 4.5  # run 0 improves, run 1 does not
        model.weight[0], model.weight[1] = 3.0, 30.0
        assert model.keep_best(torch.tensor([4.0, 6.0])) == 4.5  # a tie keeps the earlier
        model.take_best()
    assert model.weight[0].eq(2).all() and model.weight[1].eq(10).all() and model.best_step.tolist() == [7, 0]


def test_nothing_is_kept_before_the_gates_have_learned():
    model = joint(prices=(0.0, 1.0))  # warm-up 60, gate phases of 20
    for step, ready in ((0, False), (60, False), (79, False), (80, True)):
        model.step.fill_(step)
        assert model.gates_ready == ready
    assert model.keep_best(torch.tensor([1.0, 1.0]), ready=False) > model.keep_best(torch.tensor([99.0, 99.0]))
    assert model.best_value.tolist() == [99.0, 99.0]
    dynamic = joint(warmup_patience=1)
    dynamic.step.fill_(200)
    assert not dynamic.gates_ready  # no evaluation has ended the warm-up
    dynamic.warmup.ended_at.fill_(100)
    assert dynamic.gates_ready


def warm_up(model, accuracies):
    """Evaluations after 10, 20, ... steps; weights are the number of the evaluation."""
    for number, accuracy in enumerate(accuracies, 1):
        model.step.fill_(10 * number - 1)
        with torch.no_grad():
            model.weight.fill_(float(number))
        model.advance()
        model.watch_warmup(torch.tensor(accuracy))
    return model


def test_a_module_waits_with_its_best_weights_until_all_are_done():
    accuracies = [(0.5, 0.1, 0.1), (0.4, 0.2, 0.2), (0.5, 0.3, 0.3), (0.9, 0.4, 0.3), (0.9, 0.3, 0.3), (0.9, 0.2, 0.9)]
    model = warm_up(joint(warmup_patience=2), accuracies[:4])
    assert model.phase == "warmup" and model.warmup.done.tolist() == [True, False, False]  # 0.9 came too late
    model.advance()
    assert model.weight[:, 0].eq(1).all() and model.weight[:, 1].eq(4).all()  # the first waits with evaluation 1's
    model = warm_up(joint(warmup_patience=2), accuracies[:5])
    assert model.warmup.done.tolist() == [True, False, True]  # 0.3 three times: two evaluations without a gain
    model = warm_up(joint(warmup_patience=2), accuracies)
    assert model.phase == "gates" and int(model.warmup.ended_at) == 60
    assert model.weight[0, :, 0, 0].tolist() == [1.0, 4.0, 3.0]


def test_a_dynamic_warmup_is_never_longer_than_planned():
    model = warm_up(joint(warmup_patience=2), [(0.1 * n,) * 3 for n in range(1, 7)])
    assert model.phase == "gates" and int(model.warmup.ended_at) == 60 and model.weight.eq(6).all()
    with pytest.raises(ValueError, match="at least 1 evaluation"):
        joint(warmup_patience=0)


def test_each_exit_model_reads_the_same_gates_in_its_own_way():
    data, left = planted(40), {}
    for name in ("direct", "cumulative", "stick_breaking"):
        model = joint(prices=(0.1,), model=name)
        with torch.no_grad():
            model.gates.weight.zero_()
            model.gates.bias.copy_(torch.tensor([[0.2, 0.3, 0.4]]).logit())  # direct: 2 x 0.4 + 0.5 >= 1 at the third
        left[name] = model.decide(data["features"], data["last"])[1].unique().tolist()
    assert left == {"direct": [2], "cumulative": [3], "stick_breaking": [3]}


def test_the_gates_loss_weighs_positive_targets():
    model, data = joint(prices=(100.0,)), planted(60)  # everybody's best exit is the first: all targets are positive
    model.step.fill_(60)
    plain = model.terms(data)["gates"]
    model.positive.fill_(3.0)
    torch.testing.assert_close(model.terms(data)["gates"], 3 * plain)


def test_a_dynamic_warmup_that_nobody_evaluates_leaves_gates_their_turn():
    phases = Phases(warmup=60, gate_steps=20, module_steps=20, final_gate_steps=10, steps=90)
    model = joint(phases=phases, warmup_patience=2)
    before = model.weight.detach().clone()
    for _ in range(75):
        model.advance()
    assert model.phase == "gates" and int(model.warmup.ended_at) == 70
    assert torch.equal(model.weight, before)  # never evaluated: nothing to go back to
