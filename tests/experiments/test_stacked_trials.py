"""Trials of the recommender in a stack: the Results that they would leave one by one, for every gate."""

from __future__ import annotations

import dataclasses
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from same_run import same_results

from moe_lab.experiments import comet_recommender, comet_tuning, stacked_trials
from moe_lab.experiments.comet_recommender import build_model, load_data, two_task_loss
from moe_lab.experiments.comet_tuning import TuningConfig
from moe_lab.experiments.recommender_config import RecommenderConfig
from moe_lab.experiments.stacked_measures import StackedTally, auc_each, batchwise_mse_each
from moe_lab.experiments.stacked_recommender import StackedRecommender, dense_forward, make_template
from moe_lab.experiments.stacked_trials import check_stackable, run_stack
from moe_lab.gates import GATE_NAMES
from moe_lab.gates.sinkhorn import sinkhorn, sinkhorn_each
from moe_lab.metrics.ranking import auc, batchwise_masked_mse
from moe_lab.metrics.routing import RoutingTally
from moe_lab.results import find_results
from moe_lab.routing import Routing

SMALL = {"n_users": 40, "n_items": 30, "items_per_user": 8}
TINY = RecommenderConfig.profile(
    "quick",
    gate="comet+",
    data_options=SMALL,
    n_experts=5,  # no power of two: DSelect-k has its third term, COMET leaves of two depths
    embedding=4,
    hidden=8,
    head=8,
    batch_size=100,  # 498 rows: the last batch is shorter
    epochs=3,
    dropout=0.0,
)
GATES = tuple(f"{name}{plus}" for name in GATE_NAMES for plus in ("", "+"))


def trials(gate="comet+", **changes):
    """Three that differ in everything that may differ; the searches end in epoch 1, in epoch 3, and never."""
    own = [
        {"seed": 3, "learning_rate": 0.02, "gamma": 1.0, "entropy_weight": 0.1, "permutation_epochs": 0.5},
        {"seed": 8, "learning_rate": 0.005, "gamma": 0.1, "entropy_weight": 1.0, "permutation_epochs": 2.5},
        {"seed": 1, "learning_rate": 0.04, "gamma": 5.0, "entropy_weight": 0.0, "permutation_epochs": 9.0},
    ]
    own[1] |= {"watch_weight": 0.5, "permutation_weight": 0.1, "load_balance_weight": 0.3}
    return [dataclasses.replace(TINY, gate=gate, **{**values, **changes}) for values in own]


@pytest.mark.parametrize("gate", GATES)
def test_a_stack_leaves_the_results_of_one_trial_at_a_time(gate, tmp_path):
    configs = trials(gate)
    for config, result in zip(configs, run_stack(configs, root=tmp_path / "stack", progress=False), strict=True):
        same_results(
            result, comet_recommender.run(config, root=tmp_path / "alone", progress=False), rtol=5e-4, atol=5e-5
        )
        assert result.environment["trials_side_by_side"] == 3


@pytest.mark.parametrize("gate", GATES)
def test_a_trial_with_dropout_is_the_same_alone_and_among_others(gate, tmp_path):
    configs = trials(gate, dropout=0.5, epochs=2)
    among = run_stack(configs, root=tmp_path / "three", progress=False)
    (alone,) = run_stack(configs[1:2], root=tmp_path / "one", progress=False)
    same_results(among[1], alone, rtol=5e-4, atol=5e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gate", ["topk", "dselect_k", "hash+", "comet+"])
def test_a_gpu_leaves_the_results_of_a_cpu_dropout_included(gate, tmp_path):
    """Masks are hashed, not drawn: they are the same on every device."""
    configs = trials(gate, dropout=0.5, epochs=9, patience=2)
    on_cpu = run_stack(configs, root=tmp_path, progress=False)
    on_gpu = run_stack([dataclasses.replace(c, device="cuda") for c in configs], root=tmp_path, progress=False)
    for result, other in zip(on_gpu, on_cpu, strict=True):
        losses = [[row["valid_loss"] for row in each.curves["epochs"]] for each in (result, other)]
        np.testing.assert_allclose(losses[0][:3], losses[1][:3], rtol=5e-3)


def test_trials_stop_by_their_own_patience_as_they_do_alone(tmp_path):
    configs = [dataclasses.replace(c, epochs=9, patience=1, learning_rate=5 * c.learning_rate) for c in trials("topk")]
    results = run_stack(configs, root=tmp_path / "stack", progress=False)
    assert len({result.metrics["epochs"] for result in results}) > 1
    for config, result in zip(configs, results, strict=True):
        same_results(
            result, comet_recommender.run(config, root=tmp_path / "alone", progress=False), rtol=5e-4, atol=5e-5
        )


def test_the_first_step_has_the_losses_and_gradients_of_the_ordinary_model():
    """With gamma 0.1 and scaled-up splits, so that weights have exact zeros and the sparse dispatch really skips."""
    config = trials("comet")[1]
    data = load_data(config)
    ordinary, template = build_model(config, 40, 30, 5), make_template(config, 40, 30)
    with torch.no_grad():
        for gate in ordinary.moe.gates:
            gate.split.weight.mul_(3000)
    template.load_state_dict(ordinary.state_dict())
    rows = {name: data.train[name][:50] for name in ("user", "item", "watched", "rating", "has_rating")}
    inputs = {**rows, "gamma": torch.tensor(config.gamma)}
    weights = ordinary(rows["user"], rows["item"]).routings[0].weights
    assert 0.1 < (weights == 0).float().mean() < 0.9
    assert torch.equal(dense_forward(template, inputs).routings[0].weights == 0, weights == 0)
    terms = two_task_loss(ordinary, rows)
    dense = StackedRecommender([config], data, torch.device("cpu")).loss(template, inputs)
    assert terms.keys() == dense.keys()
    for name, term in terms.items():
        torch.testing.assert_close(dense[name], term)
    sum(terms.values()).backward()
    sum(dense.values()).backward()
    for (name, p), (_, q) in zip(ordinary.named_parameters(), template.named_parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("place", ["inputs", "evaluate", "_finish"])
def test_a_killed_stack_goes_on_to_the_same_results_bit_for_bit(place, tmp_path, monkeypatch):
    configs = trials(dropout=0.5)
    whole = run_stack(configs, root=tmp_path / "whole", progress=False)
    owner = stacked_trials if place == "_finish" else StackedRecommender
    real, calls = getattr(owner, place), []

    def cut(*arguments):
        calls.append(1)
        if len(calls) > {"inputs": 9, "evaluate": 2, "_finish": 1}[place]:
            raise RuntimeError("power cut")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run_stack(configs, root=tmp_path / "parts", progress=False)
    assert len(find_results("comet_recommender", root=tmp_path / "parts")) == (1 if place == "_finish" else 0)
    for result, other in zip(run_stack(configs, root=tmp_path / "parts", progress=False), whole, strict=True):
        same_results(result, other, rtol=0, atol=0)
    assert not list(tmp_path.rglob("*.ckpt*"))


def test_finished_trials_are_found_again_by_a_stack_and_by_a_single_run(tmp_path, monkeypatch):
    configs = trials("hash")
    first = run_stack(configs, root=tmp_path, progress=False)
    monkeypatch.setattr(stacked_trials, "fit_stacked", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(comet_recommender, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = run_stack(configs, root=tmp_path, progress=False)
    assert [result.metrics for result in again] == [result.metrics for result in first]
    assert comet_recommender.run(configs[2], root=tmp_path).metrics == first[2].metrics


def test_a_stack_with_a_missing_trial_trains_whole_and_keeps_what_was_finished(tmp_path):
    configs = trials("hash")
    before = comet_recommender.run(configs[1], root=tmp_path, progress=False)
    results = run_stack(configs, root=tmp_path, progress=False)
    assert all(result.finished for result in results)
    assert (results[1].started, results[1].metrics) == (before.started, before.metrics)
    assert results[1].environment.get("trials_side_by_side") is None
    anew = run_stack(configs, root=tmp_path, progress=False, recompute=True)
    assert anew[1].environment["trials_side_by_side"] == 3


@pytest.mark.parametrize("gate", ["topk", "comet+"])
def test_a_trial_that_diverges_is_marked_and_the_others_do_not_notice(gate, tmp_path):
    configs = trials(gate)
    configs[1] = dataclasses.replace(configs[1], learning_rate=1e30)
    results = run_stack(configs, root=tmp_path, progress=False)
    assert [result.status for result in results] == ["finished", "failed", "finished"]
    assert results[1].error.startswith("NonFiniteLoss: ")
    assert "step" in results[1].error
    assert not results[1].curves
    for i in (0, 2):
        same_results(
            results[i], comet_recommender.run(configs[i], root=tmp_path / "x", progress=False), rtol=5e-4, atol=5e-5
        )


def test_times_are_the_trials_share_of_the_stacks_time(tmp_path):
    results = run_stack(trials("hash"), root=tmp_path, progress=False)
    for result in results:
        seconds = [row["seconds"] for row in result.curves["epochs"]]
        assert result.wall_seconds == pytest.approx(sum(seconds), abs=0.5)
        steps = result.curves["epochs"][-1]["step"]
        assert result.metrics["steps_per_second"] == pytest.approx(steps / sum(seconds))
    assert len({row["seconds"] for result in results for row in result.curves["epochs"]}) == 3  # one per epoch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 16}, "must agree in hidden, got 8 and others"),
        ({"batch_size": 64}, "must agree in batch_size"),
        ({"gate": "topk"}, "must agree in gate"),
        ({"data_seed": 1}, "must agree in data_seed"),
        ({"epochs": 4}, "must agree in epochs"),
    ],
)
def test_trials_that_cannot_stack_are_refused_with_the_field(change, message):
    configs = trials()
    with pytest.raises(ValueError, match=message):
        check_stackable([*configs[:2], dataclasses.replace(configs[2], **change)])


def test_an_empty_stack_and_one_trial_twice_are_refused():
    with pytest.raises(ValueError, match="at least one trial"):
        run_stack([])
    with pytest.raises(ValueError, match="different seeds"):
        run_stack([TINY, TINY])


def test_a_gate_that_nobody_has_checked_trains_one_by_one(monkeypatch):
    """All of today's gates stack; the next one has to be added on purpose."""
    assert set(GATE_NAMES) == set(stacked_trials.GATES)
    monkeypatch.setattr(stacked_trials, "GATES", ("softmax", "topk"))
    with pytest.raises(ValueError, match=r"'comet\+' train one by one. These stack, also with '\+': softmax, topk"):
        check_stackable([TINY])


@pytest.mark.parametrize("tolerance", [0.0, 0.01])
def test_sinkhorn_of_each_matrix_is_sinkhorn_of_it_alone(tolerance):
    """Cold matrices need many iterations, warm ones few, and one is cut off after 2."""
    logits = torch.randn(5, 6, 6) * torch.tensor([0.1, 1.0, 3.0, 8.0, 8.0])[:, None, None]
    logits.requires_grad_()
    iterations = torch.tensor([30, 30, 30, 30, 2])
    direction = torch.randn(5, 6, 6)
    each = sinkhorn_each(logits, iterations, tolerance)
    (gradient,) = torch.autograd.grad((each * direction).sum(), logits)
    for k in range(5):
        one = logits[k : k + 1].detach().requires_grad_()
        alone = sinkhorn(one, iterations[k], tolerance)
        torch.testing.assert_close(each[k : k + 1], alone)
        (expected,) = torch.autograd.grad((alone * direction[k]).sum(), one)
        torch.testing.assert_close(gradient[k : k + 1], expected, rtol=1e-4, atol=1e-6)


def test_sinkhorn_of_each_leaves_nan_to_its_matrix_and_refuses_other_shapes():
    logits = torch.randn(3, 4, 4)
    clean = sinkhorn_each(logits, torch.full((3,), 9), 0.01)
    logits[1, 0, 0] = torch.nan
    spoiled = sinkhorn_each(logits, torch.full((3,), 9), 0.01)
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])
    assert spoiled[1].isnan().any()
    with pytest.raises(ValueError, match="K square matrices"):
        sinkhorn_each(torch.zeros(3, 4), torch.ones(3))
    with pytest.raises(ValueError, match="one number of iterations per matrix"):
        sinkhorn_each(torch.zeros(3, 4, 4), torch.ones(2, dtype=torch.int64))


def test_auc_of_each_is_the_exact_auc_with_ties_and_nan_where_a_score_is_none():
    score = torch.randn(4, 300)
    score[1] = score[1].round()  # many ties
    score[2] = 0.0  # nothing but ties
    score[3, 7] = torch.nan
    label = (torch.rand(300) < 0.3).float()
    each = auc_each(score, label)
    for k in range(3):
        assert float(each[k]) == pytest.approx(auc(score[k], label), abs=1e-12)
    assert each[2] == 0.5
    assert each[3].isnan()
    with pytest.raises(ValueError, match="both kinds"):
        auc_each(score, torch.ones(300))


@pytest.mark.parametrize("batch_size", [1, 7, 40, 100])
def test_the_authors_estimate_of_each_model_is_that_of_one(batch_size):
    prediction, target = torch.randn(3, 40), torch.randn(40)
    mask = torch.rand(40) < 0.4
    mask[:7] = False  # a batch without a rated row
    target[~mask] = torch.nan
    each = batchwise_mse_each(prediction, target, mask, batch_size)
    for row, found in zip(prediction, each.tolist(), strict=True):
        assert found == pytest.approx(batchwise_masked_mse(row, target, mask, batch_size), rel=1e-6)


@pytest.mark.parametrize("with_trees", [False, True])
def test_the_stacked_tally_counts_what_one_tally_per_model_counts(with_trees):
    stacked, single = StackedTally(2), [RoutingTally(2) for _ in range(3)]
    for n in (11, 4):
        weights = torch.rand(3, n, 5) * (torch.rand(3, n, 5) < 0.4)
        trees = torch.rand(3, n, 5, 2) * (torch.rand(3, n, 5, 2) < 0.3) if with_trees else None
        stacked.add(weights, trees)
        for k, tally in enumerate(single):
            details = {"tree_probabilities": trees[k]} if with_trees else {}
            tally.add(Routing(weights[k], details=details))
    assert stacked.summaries() == [tally.summary() for tally in single]


def _study(**changes):
    names = ("data_options", "n_experts", "embedding", "hidden", "head", "batch_size", "dropout")
    fixed = {name: getattr(TINY, name) for name in names}
    return TuningConfig(gates=("hash", "topk+"), n_trials=3, changes={**fixed, "epochs": 1, **changes})


def _losses(result):
    names = ("valid_loss", "test_loss", "test_auc", "test_mse", "experts_per_example", "used_experts", "best_epoch")
    return [[row["gate"], row["trial"], *(row[name] for name in names)] for row in result.curves["trials"]]


def test_a_study_in_stacks_has_the_rows_and_pools_of_a_study_of_single_trials(tmp_path):
    config = _study()
    single = comet_tuning.run(config, root=tmp_path / "single", progress=False)
    stacked = comet_tuning.run(config, root=tmp_path / "stacked", progress=False, stack_size=2)
    assert [row.keys() for row in stacked.curves["trials"]] == [row.keys() for row in single.curves["trials"]]
    for row, other in zip(_losses(stacked), _losses(single), strict=True):
        assert row[:2] == other[:2]
        np.testing.assert_allclose(row[2:], other[2:], rtol=1e-3)
    for gate, pool in comet_tuning.pools(stacked).items():
        np.testing.assert_allclose(pool.valid, comet_tuning.pools(single)[gate].valid, rtol=1e-3)
    assert stacked.metrics["trials"] == 6
    with pytest.raises(ValueError, match="stack_size must be at least 1"):
        comet_tuning.run(config, root=tmp_path, stack_size=0)


def test_a_study_in_stacks_goes_on_where_it_was_and_takes_over_single_trials(tmp_path, monkeypatch):
    config, original, seen = _study(dropout=0.5), comet_tuning._one_trial, []

    def stop_at_second(job):
        if seen:
            raise KeyboardInterrupt
        seen.append(job[0].gate)
        return original(job)

    monkeypatch.setattr(comet_tuning, "_one_trial", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        comet_tuning.run(config, root=tmp_path, progress=False)
    (kept,) = comet_tuning.plan(config, root=tmp_path).curves["trials"]
    stacks, run = [], stacked_trials.run_stack

    def stop_at_third(configs, **options):
        if len(stacks) == 2:
            raise KeyboardInterrupt
        stacks.append([(c.gate, c.seed) for c in configs])
        return run(configs, **options)

    monkeypatch.setattr(comet_tuning, "run_stack", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        comet_tuning.run(config, root=tmp_path, progress=False, stack_size=2)
    assert stacks == [[("hash", 0), ("hash", 1)], [("topk+", 0), ("topk+", 1)]]  # gates advance together
    monkeypatch.setattr(
        comet_tuning, "run_stack", lambda configs, **o: stacks.append(len(configs)) or run(configs, **o)
    )
    result = comet_tuning.run(config, root=tmp_path, progress=False, stack_size=2)
    assert stacks[2:] == [1, 1]
    assert [(row["gate"], row["trial"]) for row in result.curves["trials"]] == [
        (gate, trial) for gate in ("hash", "topk+") for trial in range(3)
    ]
    assert result.curves["trials"][0] == kept


def test_a_diverged_trial_of_a_stacked_study_is_kept_as_nan(tmp_path):
    config = _study()
    planned = comet_tuning.plan(config, root=tmp_path)
    planned.curves["plan"][0]["drawn"]["learning_rate"] = 1e30
    planned.save()
    result = comet_tuning.run(config, root=tmp_path, progress=False, stack_size=3)
    losses = [row["test_loss"] for row in result.curves["trials"]]
    assert math.isnan(losses[0])
    assert all(map(math.isfinite, losses[1:]))


def test_a_permutation_that_does_not_learn_hardens_to_the_one_it_was_drawn_with(tmp_path):
    configs = trials("topk+", permutation_epochs=2.0)
    data, device = load_data(configs[0]), torch.device("cpu")
    models = [build_model(config, 40, 30, 5) for config in configs]
    before = [model.moe.gates[0].permutation.assignment().tolist() for model in models]
    kind = dataclasses.replace(
        stacked_trials.recommender_kind(),
        build=lambda config, data, steps: models[configs.index(config)],
        questions=partial(StackedRecommender, learns=False),
    )
    stacked_trials._train(kind, configs, data, device, tmp_path / "stack.ckpt", False, 1)
    for model, assignment in zip(models, before, strict=True):
        permutation = model.moe.gates[0].permutation
        assert bool(permutation.hardened)
        assert permutation.assignment().tolist() == assignment


def test_an_undecided_search_does_not_fill_the_screen(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_stack(trials(permutation_schedule="official"), root=tmp_path, progress=False)
