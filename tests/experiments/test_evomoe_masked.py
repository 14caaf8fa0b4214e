"""Masked language model and fine-tuning, end to end on tiny settings: all gates, kill and resume in both stages."""

import json
from functools import partial

import pytest
import torch
from same_run import failing, without_time

from moe_lab.datasets.masking import IGNORE
from moe_lab.datasets.tokens import MASK, PAD
from moe_lab.experiments import evomoe_masked, mixture_training
from moe_lab.experiments.evomoe_masked import MaskedConfig, hidden_valid, load_sentences, run
from moe_lab.experiments.mixture_config import PAPER_GATES
from moe_lab.experiments.mixture_training import mixtures_of
from moe_lab.gates import DenseToSparseGate, StableGate
from moe_lab.train import fit

DATA = {"n_train": 60, "n_valid": 24, "n_test": 32, "length": 34}


def tiny(**changes) -> MaskedConfig:
    """12 + 8 steps; a dense-to-sparse gate is hard, StableMoE's frozen, before the first evaluation."""
    small = {
        "data_options": DATA,
        "n_experts": 3,
        "width": 16,
        "steps": 12,
        "evaluate_every": 4,
        "batch_size": 6,
        "tune_steps": 8,
        "tune_every": 4,
        "shared_share": 0.1,
        "soft_share": 0.1,
        "hard_share": 0.15,
        "stage_one_share": 0.2,
        "watched_tokens": 5,
        "dropout": 0.1,
    }
    return MaskedConfig.profile("quick", **{**small, **changes})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {gate: run(tiny(gate=gate), root=root, progress=False) for gate in PAPER_GATES}


@pytest.mark.parametrize("gate", PAPER_GATES)
def test_every_gate_goes_through_both_stages_and_its_numbers_are_possible(results, gate):
    result = results[gate]
    metrics = result.metrics
    assert result.finished
    assert [row["step"] for row in result.curves["pretraining"]] == [4, 8, 12]
    assert [row["step"] for row in result.curves["epochs"]] == [4, 8]
    for name in ("test_accuracy", "valid_accuracy", "masked_accuracy", "constant_accuracy"):
        assert 0 <= metrics[name] <= 1
    assert metrics["test_loss"] > 0 and metrics["masked_loss"] > 0 and metrics["seconds"] > 0
    assert metrics["masked_loss"] == min(row["valid_loss"] for row in result.curves["pretraining"])
    assert 0 < metrics["experts_per_token"] <= 3
    assert "main_expert" not in result.curves
    assert ("routing" in result.curves) == (gate != "dense")
    if gate != "dense":
        assert [row["step"] for row in result.curves["routing"]] == [0, 4, 8, 12]
        assert [len(row["weights"]) for row in result.curves["watched"]] == [5] * 4


def test_accuracies_of_the_domains_average_to_the_accuracy(results):
    test = load_sentences(tiny()).test
    for result in results.values():
        by_domain = result.metrics["accuracy_by_domain"]
        assert list(by_domain) == ["sums", "sentences", "brackets", "echoes"]
        counts = torch.bincount(test["domain"], minlength=4).tolist()
        right = sum(accuracy * n for accuracy, n in zip(by_domain.values(), counts, strict=True))
        assert right / sum(counts) == pytest.approx(result.metrics["test_accuracy"])


def test_the_constant_baseline_is_the_most_frequent_training_label(results):
    data = load_sentences(tiny())
    ones = data.train["label"].float().mean()
    share = data.test["label"].float().mean()
    assert results["dense"].metrics["constant_accuracy"] == pytest.approx(float(share if ones > 0.5 else 1 - share))


def test_guesses_show_what_was_hidden(results):
    data, config = load_sentences(tiny()), tiny()
    inputs, targets = hidden_valid(config, data)
    decode = data.info["tokenizer"].decode
    for gate in ("dense", "evomoe"):
        rows = results[gate].curves["guesses"]
        assert len(rows) == 24
        for row, seen, hidden in zip(rows, inputs, targets, strict=True):
            places = (hidden != IGNORE).nonzero().flatten().tolist()
            assert [item["at"] for item in row["hidden"]] == places
            assert [item["truth"] for item in row["hidden"]] == [decode([hidden[at]]) for at in places]
            assert len(row["pieces"]) == int((seen != PAD).sum())
            assert [piece == "▢" for piece in row["pieces"]] == (seen[seen != PAD] == MASK).tolist()
            for item in row["hidden"]:
                values = [value for _, value in item["top"]]
                assert values == sorted(values, reverse=True) and 0 < sum(values) <= 1.001


def test_validation_hides_the_same_tokens_for_all_gates_and_seeds():
    data = load_sentences(tiny())
    first, other = hidden_valid(tiny(gate="hash", seed=0), data), hidden_valid(tiny(gate="dts", seed=5), data)
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_finished_run_is_read_back_and_not_computed_again(results, monkeypatch):
    root = results["hash"].path.parents[1]
    for module in (evomoe_masked, mixture_training):
        monkeypatch.setattr(module, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = run(tiny(gate="hash"), root=root, progress=False)
    assert json.dumps(without_time(again)) == json.dumps(without_time(results["hash"]))


def test_without_pretraining_there_is_one_stage(tmp_path):
    result = run(tiny(gate="dense", pretrain=False), root=tmp_path, progress=False)
    assert "pretraining" not in result.curves and "guesses" not in result.curves
    assert not {"masked_loss", "masked_accuracy", "experts_per_token"} & set(result.metrics)
    assert [row["step"] for row in result.curves["epochs"]] == [4, 8]


@pytest.mark.parametrize(
    ("stage", "n_calls"),
    [
        ("masked_loss", 2),
        ("masked_loss", 6),
        ("_guesses", 0),
        ("label_loss", 0),
        ("label_loss", 6),
        ("_answers", 1),
        ("_answers", 2),
    ],
)
@pytest.mark.parametrize("gate", ["evomoe", "stable"])
def test_a_run_stopped_in_either_stage_ends_like_one_that_was_not(results, tmp_path, monkeypatch, gate, stage, n_calls):
    with monkeypatch.context() as patch:
        patch.setattr(evomoe_masked, stage, failing(getattr(evomoe_masked, stage), n_calls))
        with pytest.raises(RuntimeError, match="power cut"):
            run(tiny(gate=gate), root=tmp_path, progress=False)
    assert list(tmp_path.rglob("*.ckpt"))
    resumed = run(tiny(gate=gate), root=tmp_path, progress=False)
    assert without_time(resumed) == without_time(results[gate])
    assert not list(tmp_path.rglob("*.ckpt*"))


def test_a_run_that_is_stopped_twice_once_in_each_stage(results, tmp_path, monkeypatch):
    for stage, n_calls in (("masked_loss", 6), ("label_loss", 6)):
        with monkeypatch.context() as patch:
            patch.setattr(evomoe_masked, stage, failing(getattr(evomoe_masked, stage), n_calls))
            with pytest.raises(RuntimeError, match="power cut"):
                run(tiny(gate="dts"), root=tmp_path, progress=False)
    assert without_time(run(tiny(gate="dts"), root=tmp_path, progress=False)) == without_time(results["dts"])


def test_a_stop_by_hand_says_so_and_goes_on(results, tmp_path, monkeypatch):
    def stopped(model, train, loss, **options):
        if options.get("curve") != "pretraining":
            raise KeyboardInterrupt
        return fit(model, train, loss, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evomoe_masked, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(gate="switch"), root=tmp_path, progress=False)
    (path,) = tmp_path.rglob("*.json")
    assert json.loads(path.read_text())["status"] == "interrupted"
    assert without_time(run(tiny(gate="switch"), root=tmp_path, progress=False)) == without_time(results["switch"])


def gates_in_tuning(config, root, monkeypatch):
    """(gate, routing weights) of every step of fine-tuning."""
    seen = []
    real = evomoe_masked.label_loss

    def watched(config, model, batch):
        with torch.no_grad():
            _, routings = model(batch["tokens"], batch["tokens"] != PAD)
        seen.append((mixtures_of(model)[0].moe.gate, routings[0].weights))
        return real(config, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(evomoe_masked, "label_loss", watched)
        run(config, root=root, progress=False)
    return seen


@pytest.mark.parametrize("gate", ["dts", "evomoe"])
def test_a_gate_that_became_hard_stays_hard_in_fine_tuning(gate, tmp_path, monkeypatch):
    seen = gates_in_tuning(tiny(gate=gate), tmp_path, monkeypatch)
    assert len(seen) == 8 and all(isinstance(gate, DenseToSparseGate) for gate, _ in seen)
    assert seen[0][0].phase == "hard" and int(seen[0][0].step) >= 12
    assert all(bool(((weights > 0).sum(1) == 1).all()) for _, weights in seen)


def test_stable_moe_stays_frozen_in_fine_tuning(tmp_path, monkeypatch):
    tables = []
    real = evomoe_masked.label_loss

    def watched(config, model, batch):
        gate = mixtures_of(model)[0].moe.gate
        assert isinstance(gate, StableGate) and gate.is_frozen
        assert not gate.key_embedding.requires_grad and gate.centroids.weight.requires_grad
        tables.append(gate.key_embedding.detach().clone())
        return real(config, model, batch)

    monkeypatch.setattr(evomoe_masked, "label_loss", watched)
    run(tiny(gate="stable"), root=tmp_path, progress=False)
    assert len(tables) == 8 and all(torch.equal(table, tables[0]) for table in tables)


def test_experts_that_are_spawned_in_fine_tuning_get_their_state(tmp_path, monkeypatch):
    """Without pre-training the shared phase is in fine-tuning, and so is the spawn."""
    states = []
    real = evomoe_masked.followed

    def watched(optimizer, model):
        attached = real(optimizer, model)
        (mixture,) = mixtures_of(model)
        bank = mixture.moe.experts
        advance = mixture.evolution.advance

        def look():
            advance()
            states.append((mixture.evolution.spawned, all(p in attached.state for p in bank.parameters())))

        mixture.evolution.advance = look
        return attached

    monkeypatch.setattr(evomoe_masked, "followed", watched)
    run(tiny(gate="evomoe", pretrain=False, shared_share=0.25), root=tmp_path, progress=False)
    assert states[:4] == [(False, True), (False, True), (True, False), (True, True)]  # reset at the spawn, after step 3


def test_hash_sends_all_masks_to_one_expert():
    data, config = load_sentences(tiny()), tiny(gate="hash")
    inputs, _ = hidden_valid(config, data)
    gate = evomoe_masked.gate_factory(config, data.info["n_tokens"])(0)
    weights = gate(inputs.flatten()).weights
    assert len(weights[inputs.flatten() == MASK].argmax(1).unique()) == 1
    assert len(weights.argmax(1).unique()) == 3


def test_data_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="kind 'sentences'; 'planted-pairs' has 'pairs'"):
        run(tiny(dataset="planted-pairs", data_options={}), root=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "swich"}, "did you mean 'switch'"),
        ({"mask_share": 0.0}, r"mask_share must be in \(0, 1\]"),
        ({"mask_share": 1.5}, "mask_share"),
        ({"tune_steps": 0}, "tune_steps, tune_every and tune_learning_rate must be positive"),
        ({"tune_every": 0}, "must be positive"),
        ({"tune_learning_rate": 0.0}, "must be positive"),
        ({"mask_shar": 0.2}, "did you mean 'mask_share'"),
        ({"gate": "evomoe", "shared_share": 0.0}, "gate 'dts'"),
    ],
)
def test_bad_settings_are_refused_with_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_profiles_are_what_they_were_recorded_with():
    standard = partial(MaskedConfig.profile, "standard")
    assert (standard().layers, standard().moe_every, standard().warmup, standard().watched_tokens) == (4, 2, 0.04, 8)
    assert standard().data_options == {"length": 40} and standard().dataset == "sst2"
    assert MaskedConfig.profile("paper").moe_every == 2
    quick = MaskedConfig.profile("quick")
    assert quick == MaskedConfig() and quick.dataset == "planted-judgements"
    longest = max(int((split["tokens"] != PAD).sum(1).max()) for split in load_sentences(quick).splits.values())
    assert longest == quick.data_options["length"]
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        MaskedConfig.profile("quik")
