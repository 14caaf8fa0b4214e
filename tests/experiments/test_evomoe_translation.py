"""Translation, end to end on tiny settings: all gates, kill and resume in training and in the search, scores."""

import json
from dataclasses import replace

import pytest
import torch
from same_run import failing, without_time

from moe_lab.batches import Batches
from moe_lab.datasets.tokens import PAD
from moe_lab.experiments import evomoe_translation, mixture_training
from moe_lab.experiments.evomoe_translation import TranslationConfig, load_pairs, run, score_tokens, translate
from moe_lab.experiments.mixture_config import PAPER_GATES
from moe_lab.experiments.mixture_training import gate_factory, mixtures_of
from moe_lab.metrics.translation import corpus_bleu
from moe_lab.models.language import Translator
from moe_lab.train import evaluating

DATA = {"n_train": 60, "n_valid": 20, "n_test": 12, "length": 34}


def tiny(**changes) -> TranslationConfig:
    small = {
        "data_options": DATA,
        "n_experts": 3,
        "width": 16,
        "steps": 12,
        "evaluate_every": 4,
        "batch_size": 6,
        "shared_share": 0.25,
        "soft_share": 0.1,
        "hard_share": 0.2,
        "stage_one_share": 0.2,
        "watched_tokens": 5,
        "dropout": 0.1,
        "beam": 2,
        "translated": 10,
        "kept_translations": 4,
    }
    return TranslationConfig.profile("quick", **{**small, **changes})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {gate: run(tiny(gate=gate), root=root, progress=False) for gate in PAPER_GATES}


@pytest.mark.parametrize("gate", PAPER_GATES)
def test_every_gate_trains_translates_and_its_numbers_are_possible(results, gate):
    result = results[gate]
    metrics = result.metrics
    assert result.finished and [row["step"] for row in result.curves["epochs"]] == [4, 8, 12]
    assert 0 <= metrics["bleu"] <= 100 and 0 <= metrics["exact"] <= 1 and 0 <= metrics["test_accuracy"] <= 1
    assert metrics["test_loss"] > 0 and 0 < metrics["experts_per_token"] <= 3
    assert metrics["best_loss"] == min(row["valid_loss"] for row in result.curves["epochs"])
    assert "tok:13a" in metrics["bleu_signature"] and "version:" in metrics["bleu_signature"]
    assert len(result.curves["translations"]) == 4 and "main_expert" not in result.curves
    if gate == "dense":
        assert "routing" not in result.curves
    else:  # a mixture in the encoder, one in the decoder
        assert [(row["step"], row["layer"]) for row in result.curves["routing"]] == [
            (step, layer) for step in (0, 4, 8, 12) for layer in (0, 1)
        ]


def test_translations_are_kept_beside_source_and_reference(results):
    data = load_pairs(tiny())
    rows = results["evomoe"].curves["translations"]
    assert [row["source"] for row in rows] == data.info["sources"]["test"][:4]
    assert [row["reference"] for row in rows] == data.info["references"]["test"][:4]


def test_bleu_and_exact_are_those_of_the_kept_translations(tmp_path):
    result = run(tiny(gate="switch", kept_translations=99, steps=4), root=tmp_path, progress=False)
    rows = result.curves["translations"]
    assert len(rows) == 10  # as many as were translated
    hypotheses, references = ([row[name] for row in rows] for name in ("hypothesis", "reference"))
    assert corpus_bleu(hypotheses, references) == (result.metrics["bleu"], result.metrics["bleu_signature"])
    assert result.metrics["exact"] == sum(h == r for h, r in zip(hypotheses, references, strict=True)) / 10


def test_a_model_that_copies_its_reference_has_bleu_100_and_all_sentences_exact(tmp_path, monkeypatch):
    data = load_pairs(tiny())
    monkeypatch.setattr(evomoe_translation, "translate", lambda *a: data.info["references"]["test"][:10])
    metrics = run(tiny(gate="dense", steps=2), root=tmp_path, progress=False).metrics
    assert (metrics["bleu"], metrics["exact"]) == (100.0, 1.0)


def test_scores_of_tokens_leave_out_padding_and_smoothing():
    config, data = tiny(gate="switch"), load_pairs(tiny())
    torch.manual_seed(0)
    model = Translator(config.size(data.info["n_tokens"], 34), make_gate=gate_factory(config, data.info["n_tokens"]))
    rows = {key: data.valid[key] for key in ("source", "target")}
    with evaluating(model):
        together = score_tokens(config, model, Batches(rows, 20))
        one_by_one = score_tokens(config, model, Batches(rows, 1))
        source, target = rows["source"], rows["target"]
        logits, _ = model(source, source != PAD, target[:, :-1], target[:, :-1] != PAD)
    log_p = logits.log_softmax(-1).gather(-1, target[:, 1:, None]).squeeze(-1)
    real = target[:, 1:] != PAD
    assert together["loss"] == pytest.approx(-float(log_p[real].mean()), rel=1e-5)
    assert one_by_one == pytest.approx(together, rel=1e-5)


def test_a_wider_beam_is_used(monkeypatch):
    config, data = tiny(gate="dense"), load_pairs(tiny())
    model = Translator(config.size(data.info["n_tokens"], 34))
    asked = []
    real = evomoe_translation.beam_search
    monkeypatch.setattr(evomoe_translation, "beam_search", lambda *a, **k: asked.append(k) or real(*a, **k))
    texts = translate(replace(config, beam=3, length_penalty=0.5), model, data.test["source"], data)
    assert len(texts) == 12 and all(isinstance(text, str) for text in texts)
    assert [(k["beam"], k["length_penalty"], k["max_length"]) for k in asked] == [(3, 0.5, 33)]


def test_a_finished_run_is_read_back_and_not_computed_again(results, monkeypatch):
    root = results["hash"].path.parents[1]
    monkeypatch.setattr(mixture_training, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = run(tiny(gate="hash"), root=root, progress=False)
    assert json.dumps(without_time(again)) == json.dumps(without_time(results["hash"]))


@pytest.mark.parametrize(
    ("what", "n_calls"),
    [("translation_loss", 0), ("translation_loss", 2), ("translation_loss", 6), ("score_tokens", 2), ("translate", 0)],
)
@pytest.mark.parametrize("gate", ["evomoe", "stable"])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(results, tmp_path, monkeypatch, gate, what, n_calls):
    with monkeypatch.context() as patch:
        patch.setattr(evomoe_translation, what, failing(getattr(evomoe_translation, what), n_calls))
        with pytest.raises(RuntimeError, match="power cut"):
            run(tiny(gate=gate), root=tmp_path, progress=False)
    resumed = run(tiny(gate=gate), root=tmp_path, progress=False)
    assert without_time(resumed) == without_time(results[gate])
    assert not list(tmp_path.rglob("*.ckpt*"))


def test_encoder_and_decoder_have_gates_of_their_own():
    config = tiny(gate="hash", layers=2)
    model = Translator(config.size(40, 34), make_gate=gate_factory(config, 40))
    tables = [mixture.moe.gate.table for mixture in mixtures_of(model)]
    assert len(tables) == 4
    assert all(not torch.equal(tables[0], table) for table in tables[1:])


def test_data_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="kind 'pairs'; 'planted-judgements' has 'sentences'"):
        run(tiny(dataset="planted-judgements", data_options={}), root=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "denes"}, "did you mean 'dense'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"beam": 0}, "beam must be at least 1"),
        ({"beams": 2}, "did you mean 'beam'"),
        ({"valid_rows": 0}, "at least 1, or None"),
        ({"translated": 0}, "translated must be at least 1, or None"),
        ({"length_penalty": -1.0}, "must not be negative"),
        ({"kept_translations": -1}, "must not be negative"),
    ],
)
def test_bad_settings_are_refused_with_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_profiles_are_what_they_were_recorded_with():
    standard = TranslationConfig.profile("standard")
    assert (standard.dataset, standard.data_options, standard.layers, standard.heads) == ("multi30k", {}, 3, 4)
    assert (standard.valid_rows, standard.translated, standard.kept_translations) == (None, None, 20)
    assert (standard.beam, standard.length_penalty, standard.tau_end, standard.moe_every) == (5, 1.0, 0.5, 1)
    quick = TranslationConfig.profile("quick")
    assert quick == TranslationConfig() and quick.dataset == "planted-pairs"
    data = load_pairs(quick)
    longest = max(int((split[side] != PAD).sum(1).max()) for split in data.splits.values() for side in split)
    assert longest < quick.data_options["length"]  # nothing is cut off
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        TranslationConfig.profile("quik")
