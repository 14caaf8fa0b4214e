"""The planted study of permutation search: what is planted is there, the bound is a bound, and the rescue happens."""

import itertools
import math

import pytest
import torch

from moe_lab.experiments import comet_search, search_study
from moe_lab.experiments.search_config import SCENARIOS, SearchConfig
from moe_lab.experiments.search_study import StudyConfig
from moe_lab.train import evaluating

SMALL = {"n_train": 512, "epochs": 12, "search_epochs": 10, "learning_rate": 3e-2, "batch_size": 64}


def parts(**changes):
    config = SearchConfig(**changes)
    data = comet_search.load_data(config)
    return config, data, comet_search.build_gate(config, data.info), comet_search.build_bank(config, data.info)


@pytest.mark.parametrize("gate", ["comet", "topk", "hash"])
def test_scrambled_start_gives_every_cluster_an_output_of_its_own_and_some_permutation_is_right(gate):
    _, data, built, bank = parts(gate=gate)
    rows = data.test
    weights = built(rows["key"] if gate == "hash" else rows["features"]).weights
    output = weights.argmax(-1)
    assert (weights.max(-1).values > 0.99).float().mean() > 0.99
    shares = torch.zeros(8, 8).index_put((rows["cluster"], output), torch.ones(()), accumulate=True)
    assert shares.max(-1).values.sum() > 0.99 * len(output)  # a few rows may lie behind a hyperplane
    assert shares.argmax(-1).unique().numel() == 8
    best = comet_search.best_assignment(-comet_search.relabelling_costs(built, bank, rows))
    assert (best[output] == rows["expert"]).float().mean() > 0.99


def test_saturated_splits_get_no_gradient_at_all():
    _, data, gate, _ = parts()
    gate.requires_grad_(True)
    active = gate(data.train["features"]).details["tree_probabilities"].frac() != 0  # rows inside a smooth-step
    assert active.any((1, 2)).float().mean() < 0.01
    inside = ~active.any((1, 2))
    gate.zero_grad()
    gate(data.train["features"][inside]).weights[:, 0].sum().backward()
    assert gate.split.weight.grad.abs().max() == 0


def test_best_relabelling_is_the_smallest_loss_over_all_permutations_of_the_bank():
    config, data, gate, bank = parts(n_experts=4, start="misplaced", seed=3)
    costs = comet_search.relabelling_costs(gate, bank, data.test)
    best = comet_search.best_assignment(-costs)
    losses = {}
    model = comet_search.build_model(config, data, 1)
    weight, bias = bank.weights[0].detach().clone(), bank.biases[0].detach().clone()
    for order in itertools.permutations(range(4)):
        with torch.no_grad(), evaluating(model):
            model.experts.weights[0].copy_(weight[list(order)])
            model.experts.biases[0].copy_(bias[list(order)])
            losses[order] = float((comet_search.predict(model, data.test)[0] - data.test["target"]).square().mean())
    bound = costs.gather(-1, best.unsqueeze(-1)).sum().item()
    assert min(losses, key=losses.get) == tuple(best.tolist())
    assert min(losses.values()) == pytest.approx(bound, rel=0.01)  # exact where a row has one expert


@pytest.mark.parametrize("gate", ["comet", "topk", "hash"])
def test_default_search_rescues_a_frozen_gate_with_the_wrong_experts(gate, tmp_path):
    bare = comet_search.run(SearchConfig(gate=gate, **SMALL), root=tmp_path).metrics
    searched = comet_search.run(SearchConfig(gate=gate, search="default", **SMALL), root=tmp_path)
    metrics = searched.metrics
    assert bare["test_loss"] == bare["start_loss"] == metrics["start_loss"]  # nothing learns: nothing changes
    assert metrics["found"] == 1
    assert metrics["test_loss"] == pytest.approx(metrics["best_relabelling"], rel=0.02)
    assert metrics["test_loss"] < 0.02 < 0.1 * bare["test_loss"]
    search = searched.curves["search"]
    assert [row["step"] for row in search] == list(range(0, 81, 8))
    assert [row["hardened"] for row in search] == [0.0] * 10 + [1.0]
    assert max(row["row_error"] for row in search) < 0.01


def test_no_search_can_beat_the_best_relabelling_when_only_the_permutation_learns(tmp_path):
    for gate, search in (("comet", "default"), ("comet", "official"), ("hash", "default")):
        config = SearchConfig(gate=gate, start="misplaced", search=search, **{**SMALL, "n_train": 256})
        metrics = comet_search.run(config, root=tmp_path).metrics
        assert metrics["best_relabelling"] > 20 * metrics["floor"]  # rows of several clusters share an output
        assert metrics["test_loss"] > 0.99 * metrics["best_relabelling"]


def test_one_shot_assignment_needs_no_training_to_find_what_the_search_finds(tmp_path):
    metrics = comet_search.run(SearchConfig(search="one_shot", **SMALL), root=tmp_path).metrics
    assert metrics["found"] == 1
    assert metrics["test_loss"] == pytest.approx(metrics["best_relabelling"], rel=1e-3)


def test_identity_zero_makes_experts_independent_of_the_true_functions_and_one_makes_them_equal():
    _, data, _, true = parts(identity=1.0)
    torch.testing.assert_close(true.weights[0].squeeze(-1), data.info["expert_weight"])
    _, _, _, random = parts(identity=0.0, random_size=0.1)
    ratio = random.weights[0].std() / data.info["expert_weight"].std()
    assert ratio.item() == pytest.approx(0.1, rel=0.3)


def test_study_logs_one_row_per_run_reads_finished_runs_back_and_pairs_by_seed(tmp_path):
    config = StudyConfig(scenarios=("hash, wrong table",), searches=("none", "default"), seeds=(0, 1))
    result = search_study.run(config, root=tmp_path, progress=False)
    assert result.metrics["n_runs"] == 4
    again = search_study.run(config, root=tmp_path, progress=False)
    assert again.started == result.started
    table = search_study.paired(result)
    row = table.loc["hash, wrong table"]
    frame = search_study.runs_frame(result)
    losses = frame.set_index(["search", "seed"])["test_loss"]
    differences = [losses["default", seed] - losses["none", seed] for seed in (0, 1)]
    assert row["difference"] == pytest.approx(sum(differences) / 2)
    assert row["standard_error"] == pytest.approx(abs(differences[0] - differences[1]) / 2)
    assert math.isclose(row["best_relabelling"], 0.01, rel_tol=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "top-k"}, "did you mean 'topk'"),
        ({"search": "offical"}, "did you mean 'official'"),
        ({"identity": 1.5}, "between 0"),
        ({"search_epochs": 50}, r"1 \.\. epochs = 12"),
        ({"gate": "hash", "start": "fresh"}, "no weights to begin with"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**changes)


def test_unknown_scenario_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'COMET learns'"):
        StudyConfig(scenarios=("COMET learn",))


def test_every_scenario_is_a_valid_config_in_every_profile():
    for profile in ("quick", "standard", "paper"):
        for settings in SCENARIOS.values():
            assert SearchConfig.profile(profile, **settings).training_epochs >= 1
