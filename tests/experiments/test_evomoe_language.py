"""The language-model experiment end to end on a tiny configuration; killed around the spawn; bad input."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from same_run import failing

from moe_lab.batches import Batches
from moe_lab.experiments import evomoe_language, mixture_training
from moe_lab.experiments.evomoe_language import (
    ABLATIONS,
    LanguageConfig,
    build_model,
    load_text,
    mean_loss,
    run,
    training_curve,
)
from moe_lab.experiments.mixture_config import GATES, PAPER_GATES, MixtureConfig, make_gate
from moe_lab.experiments.mixture_training import inference, make_optimizer, mixtures_of, phase_curve, rules_differ
from moe_lab.metrics.flops import language_flops
from moe_lab.modes import evaluating

sys.path.insert(0, str(Path(__file__).parent))
import killed_language


def tiny(**changes) -> LanguageConfig:
    small = {
        "data_options": {"n_characters": 6000, "length": 16},
        "n_experts": 4,
        "width": 16,
        "steps": 12,
        "evaluate_every": 4,
        "batch_size": 4,
        "shared_share": 0.25,
        "soft_share": 0.25,
        "hard_share": 0.4,
        "sample_tokens": 6,
        "watched_tokens": 3,
    }
    return LanguageConfig.profile("quick", **{**small, **changes})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {gate: run(tiny(gate=gate), root=root, progress=False) for gate in GATES}


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_trains_and_says_what_it_did(results, gate):
    result = results[gate]
    metrics, rows = result.metrics, result.curves["epochs"]
    assert result.finished and [row["step"] for row in rows] == [4, 8, 12] and metrics["steps"] == 12
    assert metrics["test_loss"] < metrics["constant_loss"] + 1 and metrics["final_loss"] == rows[-1]["valid_loss"]
    assert metrics["looks_ahead"] == (gate == "expert_choice")
    assert len(metrics["sample"]) > 0
    if gate == "dense":
        assert "routing" not in result.curves and metrics["experts_per_token"] == 1
        return
    routing = result.curves["routing"]
    assert [row["step"] for row in routing] == [0, 4, 8, 12]
    assert routing[0]["changed"] is None and all(0 <= row["changed"] <= 1 for row in routing[1:])
    assert all(sum(row["load"]) == pytest.approx(1) for row in routing)
    assert [len(row["weights"]) for row in result.curves["watched"]] == [3] * 4
    assert "main_expert" not in result.curves  # only needed while it runs


def test_experts_per_token_are_those_of_the_gate(results):
    mean = {gate: result.metrics["experts_per_token"] for gate, result in results.items()}
    for gate in ("dense", "switch", "base", "hash", "hash_balanced", "stable", "expert_choice"):
        assert mean[gate] == pytest.approx(1, abs=1e-6)
    assert mean["softmax"] == 4 and mean["gshard"] == mean["topk"] == 2
    assert 0.3 < mean["switch_capacity"] < 1
    # dts: 5 of 12 steps are soft (round(0.4 x 12)), tau is high at first: all four run; evomoe: 3 shared, then 5 soft
    for gate in ("dts", "evomoe"):
        assert (1 * 7 + 5 * 2) / 12 < mean[gate] <= (1 * 7 + 5 * 4) / 12


def test_phases_of_evomoe_show_in_experts_per_token_and_in_the_distance_of_experts(results):
    result = results["evomoe"]
    after = {row["step"]: row for row in result.curves["distances"]}
    assert after[0]["parameter"] > 0.5  # the untouched start: random
    assert 0 < after[4]["parameter"] < 0.5  # spawned after step 3 from one expert
    hard = results["evomoe"].curves["epochs"][-1]
    assert hard["train_experts"] == 1.0
    phases = phase_curve(tiny(gate="evomoe"))
    assert [phases["phase"][step] for step in (0, 2, 3, 7, 8)] == ["shared", "shared", "soft", "soft", "hard"]


@pytest.mark.parametrize("steps", [0, 3, 5, 20])
def test_the_rule_of_the_phase_is_another_one_only_in_the_soft_phase(steps):
    """What saves the second evaluation everywhere else."""
    config, data = tiny(gate="evomoe", shared_share=0.34), load_text(tiny())
    torch.manual_seed(0)
    model = build_model(config, data)
    for _ in range(steps):
        for mixture in mixtures_of(model):
            mixture.moe.gate.advance()
    valid = Batches({"tokens": data.valid["tokens"]}, 16)
    losses = {}
    with evaluating(model):
        for rule in ("topk", "matched"):
            with inference(model, rule):
                losses[rule] = mean_loss(config, model, valid)
        assert all(gate.inference == "topk" for gate in (mixture.moe.gate for mixture in mixtures_of(model)))
    assert rules_differ(model) == (steps == 5)  # 4 shared steps, then 5 soft ones
    assert (losses["topk"] == losses["matched"]) == (steps != 5)


def test_stable_and_hash_never_move_a_token_once_they_are_frozen(results):
    assert all(row["changed"] == 0 for row in results["hash"].curves["routing"][1:])
    assert results["stable"].curves["routing"][-1]["changed"] == 0


def test_flops_add_up_from_measured_experts_per_token(results):
    config = tiny(gate="evomoe")
    result = results["evomoe"]
    size = config.size(result.metrics["n_tokens"], result.metrics["length"])
    total, last = 0.0, 0
    for row in result.curves["epochs"]:
        for step in range(last + 1, row["step"] + 1):
            per_token = language_flops(
                size, n_experts=4, experts_per_token=row["train_experts"], router=step > config.shared_steps
            )
            total += 3 * per_token * config.batch_size * 16
        last = row["step"]
    assert training_curve(result)["flops"].iloc[-1] == pytest.approx(total)
    hashed, switch = (training_curve(results[gate])["flops"].iloc[-1] for gate in ("hash", "switch"))
    assert switch - hashed == pytest.approx(3 * 2 * 16 * 4 * 12 * 4 * 16)  # a router: 3 x 2 D E per token of 12 steps
    dense = training_curve(results["dense"])
    assert (dense["experts"] == 1).all() and dense["flops"].iloc[-1] < total


def test_gates_of_one_seed_start_from_the_same_weights_and_see_the_same_batches():
    data = load_text(tiny())
    models = {}
    for gate in ("switch", "hash", "dts"):
        torch.manual_seed(0)
        models[gate] = build_model(tiny(gate=gate), data)
    shared = [name for name, _ in models["switch"].named_parameters() if ".gates." not in name]
    assert any("experts" in name for name in shared)
    for name in shared:
        values = [dict(model.named_parameters())[name] for model in models.values()]
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2]), name


def test_weight_decay_is_for_matrices():
    model = build_model(tiny(gate="stable", weight_decay=0.5), load_text(tiny()))
    decayed, others = make_optimizer(model, tiny(weight_decay=0.5)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen = {names[id(parameter)] for parameter in decayed["params"]}
    assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0.0
    assert all("bias" not in name and "norm" not in name and "embedding" not in name for name in chosen)
    assert any("experts" in name for name in chosen) and any("attention" in name for name in chosen)
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_each_mixture_has_a_gate_of_its_own():
    config = tiny(gate="hash")
    tables = [make_gate(config, index, 60).table for index in (0, 1)]
    assert not torch.equal(*tables)
    assert len(mixtures_of(build_model(tiny(gate="dts", layers=4), load_text(tiny())))) == 2


def test_a_finished_run_is_read_back(tmp_path, monkeypatch):
    first = run(tiny(gate="dts"), root=tmp_path, progress=False)
    monkeypatch.setattr(mixture_training, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert run(tiny(gate="dts"), root=tmp_path, progress=False).metrics == first.metrics


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, killed_language.__file__, str(folder)],
        env={**os.environ, "MOE_LAB_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", killed_language.POINTS)
def test_a_run_killed_around_the_spawn_resumes_to_the_same_bits(killed, point):
    got, reference = killed[point], killed["reference"]
    assert got["exits"] == [-signal.SIGKILL, 0] and got["left"] == []
    assert {name: got[name] for name in ("status", "metrics", "curves")} == {
        name: reference[name] for name in ("status", "metrics", "curves")
    }


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path, monkeypatch):
    config = tiny(gate="switch")
    with monkeypatch.context() as patch:
        patch.setattr(evomoe_language, "next_token_loss", failing(evomoe_language.next_token_loss, 6))
        with pytest.raises(RuntimeError, match="power cut"):
            run(config, root=tmp_path, progress=False)
    data = load_text(config)
    other = dataclasses.replace(data, info={**data.info, "n_tokens": data.info["n_tokens"] + 1})  # another tokenizer's
    monkeypatch.setattr(evomoe_language, "load_text", lambda config: other)
    with pytest.raises(ValueError, match=r"embedding\.token\.weight was .*, is "):
        run(config, root=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "swich"}, "did you mean 'switch'"),
        ({"gate": "dts", "n_experts": 1}, "one expert for all is gate 'dense'"),
        ({"gate": "dts", "tau_end": 0.0}, "temperatures must be positive"),
        ({"gate": "dts", "tau_start": 0.1}, "must not rise"),
        ({"gate": "dts", "soft_share": 0.5, "hard_share": 0.1}, "hard before"),
        ({"gate": "evomoe", "shared_share": 0.0}, "gate 'dts'"),
        ({"gate": "switch", "learning_rate": 0.0}, "learning_rate must be positive"),
        ({"gate": "switch", "steps": 0}, "steps must be at least 1"),
        ({"gate": "switch", "warmup": 2.0}, r"a share, in \[0, 1\]"),
        ({"gate": "switch", "precision": "float16"}, "bfloat16"),
        ({"gate": "switch", "balance_weight": -1.0}, "must not be negative"),
        ({"gate": "switch", "valid_rows": 0}, "at least 1, or None"),
    ],
)
def test_bad_settings_are_refused_with_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "dts", "threshold": 1.0}, "nobody would pass"),
        ({"gate": "switch_capacity", "capacity_factor": 0.0}, "capacity_factor must be positive"),
        ({"dataset": "planted-pairs", "data_options": {}}, "kind 'text'; 'planted-pairs' has 'pairs'"),
        ({"gate": "switch", "heads": 3}, "not divisible by 3 heads"),
        ({"data_options": {"n_characters": 100, "length": 64}}, "do not fill one window"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_when_the_run_begins(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tiny(**changes), root=tmp_path, progress=False)


def test_a_capacity_that_drops_more_than_half_warns(tmp_path):
    with pytest.warns(UserWarning, match="drops at least 75%"):
        result = run(tiny(gate="switch_capacity", capacity_factor=0.25), root=tmp_path, progress=False)
    assert result.metrics["experts_per_token"] <= 0.26


def test_a_sequence_longer_than_the_model_is_refused():
    model = build_model(tiny(gate="switch"), load_text(tiny()))
    with pytest.raises(ValueError, match="17 tokens is longer than this model"):
        model(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize("profile", ["quick", "standard", "paper"])
def test_profiles_ablations_and_unknown_names(profile):
    for change in ABLATIONS:
        config = LanguageConfig.profile(profile, **change)
        base = LanguageConfig.profile(profile, gate=config.gate)
        assert config != base or (profile == "quick" and change.get("n_experts") == base.n_experts), change
    assert set(PAPER_GATES) <= set(GATES)
    with pytest.raises(ValueError, match="did you mean 'threshold'"):
        LanguageConfig.profile(profile, treshold=0.1)
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        LanguageConfig.profile("quik")


def test_shares_scale_with_the_run():
    short, long = (MixtureConfig(gate="evomoe", steps=steps) for steps in (300, 3000))
    assert (short.shared_steps, short.temperature.steps, short.hard_after) == (30, 12, 18)
    assert (long.shared_steps, long.temperature.steps, long.hard_after) == (300, 120, 180)
    assert dataclasses.replace(short, hard_share=1.0).hard_after is None
    assert MixtureConfig(gate="dts").shared_steps == 0


def test_only_the_noise_differs_between_two_seeds_of_the_same_data():
    first, second = load_text(tiny(seed=0)), load_text(tiny(seed=1))
    assert np.array_equal(first.train["tokens"], second.train["tokens"])
