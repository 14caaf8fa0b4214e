"""COMET-BERT end to end on tiny settings: every gate, every step, kill and resume, and what the Results say."""

import argparse
import dataclasses
import json

import pytest
import torch
from same_run import failing, without_time

from moe_lab.experiments import comet_bert_training
from moe_lab.experiments.comet_bert import (
    build_student,
    distil,
    distillation_terms,
    evaluate,
    finetune,
    importance,
    load_student,
    load_teacher,
    run,
)
from moe_lab.experiments.comet_bert_claims import bert_claims
from moe_lab.experiments.comet_bert_config import CLAIMED_GATES, GATES, PAPER_GATES, CometBertConfig, make_gate
from moe_lab.experiments.comet_bert_data import load_texts, weights_path
from moe_lab.experiments.record import record
from moe_lab.experiments.recordings import RECORDINGS
from moe_lab.experiments.thinning import thinned
from moe_lab.gates import HashGate, PermutationSearch
from moe_lab.results import Result

pytestmark = pytest.mark.filterwarnings("ignore:local search ended undecided")  # three steps are no search

SHOWN = ("teacher", "pruned", "all", "hash", "hash_balanced", "topk+", "dselect_k", "comet", "comet+")


def tiny(**changes) -> CometBertConfig:
    """6 steps of each training, two evaluations."""
    small = {
        "data_options": {"n_train": 60, "n_valid": 20, "n_test": 25},
        "tiny": {"layers": 2, "width": 16, "heads": 2, "hidden": 24, "dropout": 0.1},
        "length": 20,
        "teacher_steps": 6,
        "teacher_every": 3,
        "teacher_batch_size": 8,
        "importance_rows": 30,
        "steps": 6,
        "evaluate_every": 3,
        "batch_size": 8,
        "gamma": 1.0,
        "search_share": 0.5,
        "watched_sentences": 3,
        "latency_rounds": 1,
    }
    return CometBertConfig.profile("quick", **{**small, **changes})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def results(root):
    return {gate: run(tiny(gate=gate), root=root, progress=False) for gate in SHOWN}


def not_again(monkeypatch):
    monkeypatch.setattr(comet_bert_training, "fit", lambda *args, **options: pytest.fail("trained again"))


# ---- the steps


@pytest.mark.parametrize("gate", SHOWN)
def test_every_gate_goes_through_all_steps_and_its_numbers_are_possible(results, gate):
    result = results[gate]
    metrics = result.metrics
    assert result.finished and result.experiment == "comet_bert"
    for name in ("test_score", "test_accuracy", "valid_accuracy", "teacher_score", "teacher_agreement"):
        assert 0 <= metrics[name] <= 1
    assert metrics["test_score"] == metrics["test_accuracy"] and metrics["test_loss"] > 0
    for name in ("latency_ms_1", "latency_ms_64", "teacher_latency_ms_1", "speedup_64", "seconds"):
        assert metrics[name] > 0
    if gate == "teacher":
        assert metrics["teacher_agreement"] == 1 and metrics["test_score"] == metrics["teacher_score"]
        assert metrics["flops_per_token"] == metrics["teacher_flops_per_token"]
        assert metrics["experts_by_layer"] == [1, 1] and metrics["decided_by_word"] == 1
        assert "words" not in result.curves
        return
    assert [row["step"] for row in result.curves["epochs"]] == [3, 6]
    assert [row["step"] for row in result.curves["routing"]] == [0, 0, 3, 3, 6, 6]
    assert {row["layer"] for row in result.curves["words"]} == {0, 1}
    n_experts = 1 if gate == "pruned" else 4
    assert 1 <= metrics["experts_per_token"] <= n_experts
    if gate in ("pruned", "hash", "hash_balanced", "topk+"):
        assert metrics["experts_by_layer"] == [1, 1]
        assert metrics["flops_per_token"] < metrics["teacher_flops_per_token"]
        assert metrics["active_parameters"] < metrics["teacher_active_parameters"]


def test_each_step_leaves_a_result_and_the_trained_ones_their_weights(results, root):
    config = tiny(gate="comet")
    steps = [step(config, root=root, progress=False) for step in (finetune, importance, distil, evaluate)]
    assert [result.experiment for result in steps] == [
        *("comet_bert_teacher", "comet_bert_importance", "comet_bert_student", "comet_bert")
    ]
    assert all(result.finished and result.path.is_file() for result in steps)
    assert [weights_path(result).is_file() for result in steps] == [True, False, True, False]
    assert not list(root.rglob("*.ckpt*")) and not list(root.rglob("*.tmp"))


def test_one_teacher_and_one_importance_serve_all_gates_and_seeds(results, root):
    assert len(list((root / "comet_bert_teacher").glob("*.json"))) == 1
    assert len(list((root / "comet_bert_importance").glob("*.json"))) == 1
    assert tiny(gate="hash", seed=5).importance == tiny(gate="comet").importance
    assert tiny(teacher_seed=1).teacher != tiny().teacher
    assert len({result.metrics["teacher_score"] for result in results.values()}) == 1


def test_finished_steps_are_read_back_and_not_computed_again(results, root, monkeypatch):
    not_again(monkeypatch)
    for gate in SHOWN:
        again = run(tiny(gate=gate), root=root, progress=False)
        assert json.dumps(without_time(again)) == json.dumps(without_time(results[gate]))


def test_recompute_trains_the_student_again_to_the_same_numbers_but_not_the_teacher(results, root, monkeypatch):
    calls = []
    real = comet_bert_training.fit
    monkeypatch.setattr(comet_bert_training, "fit", lambda *args, **options: calls.append(1) or real(*args, **options))
    again = run(tiny(gate="hash"), root=root, recompute=True, progress=False)
    assert len(calls) == 1
    assert without_time(again)["curves"] == without_time(results["hash"])["curves"]


@pytest.mark.parametrize(
    ("function", "n_calls"),
    [
        ("teacher_loss", 4),
        ("neuron_importance", 0),
        ("distillation_terms", 0),
        ("distillation_terms", 4),
        ("save_weights", 1),
    ],
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(results, root, tmp_path, monkeypatch, function, n_calls):
    config = tiny(gate="comet")
    with monkeypatch.context() as patch:
        patch.setattr(comet_bert_training, function, failing(getattr(comet_bert_training, function), n_calls))
        with pytest.raises(RuntimeError, match="power cut"):
            run(config, root=tmp_path, progress=False)
    resumed = run(config, root=tmp_path, progress=False)
    whole, again = distil(config, root=root), distil(config, root=tmp_path)
    assert without_time(again) == without_time(whole)
    assert weights_path(again).read_bytes() == weights_path(whole).read_bytes()
    assert without_time(resumed)["curves"] == without_time(results["comet"])["curves"]
    assert not list(tmp_path.rglob("*.ckpt*"))


@pytest.mark.parametrize("mix", ["after_norm", "before_norm"])
def test_bfloat16_goes_through_all_steps_and_gates_stay_exact(results, tmp_path, mix):
    config = tiny(gate="comet", precision="bfloat16", mix=mix, steps=2, evaluate_every=2)
    assert run(config, root=tmp_path, progress=False).metrics["experts_per_token"] >= 1
    student, _, texts = load_student(config, root=tmp_path)
    test = texts.arrays["test"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = student(test["tokens"], test["seen"])
    for routing in answer.trace.routings:
        assert routing.weights.dtype == torch.float32
        torch.testing.assert_close(routing.weights.sum(1), torch.ones(len(routing.weights)), rtol=0, atol=1e-6)


def test_weights_that_are_gone_say_how_to_get_them(results, root, tmp_path):
    alone = finetune(tiny(), root=root)
    copy = tmp_path / "comet_bert_teacher" / alone.path.name
    copy.parent.mkdir()
    copy.write_text(alone.path.read_text())
    with pytest.raises(FileNotFoundError, match="recompute=True"):
        load_teacher(tiny(), root=tmp_path)


def test_the_saved_student_is_the_one_that_was_scored(results, root):
    student, teacher, texts = load_student(tiny(gate="comet+"), root=root)
    assert not student.training and not teacher.training
    test = texts.arrays["test"]
    with torch.no_grad():
        right = student(test["tokens"], test["seen"]).logits.argmax(1) == test["label"]
    assert float(right.double().mean()) == results["comet+"].metrics["test_accuracy"]


# ---- what is computed


def student_at_start(config, root):
    teacher, texts = load_teacher(config, root=root)
    rows = importance(config, root=root).curves["importance"]
    values = [torch.tensor(row["values"]) for row in rows]
    return build_student(config, teacher, texts, values), teacher, texts


def test_all_experts_together_are_the_teacher_before_distillation(results, root):
    config = tiny(gate="all", mix="before_norm", expert_width=6, shared=0)
    student, teacher, texts = student_at_start(config, root)
    test = texts.arrays["test"]
    with torch.no_grad():
        ours, theirs = (model(test["tokens"], test["seen"]).logits for model in (student, teacher))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    result = distil(config, root=root, progress=False)
    assert result.metrics["start_accuracy"] == finetune(config, root=root).metrics["valid_accuracy"]


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "teacher"])
@pytest.mark.parametrize("n_experts", [4, 3])
def test_every_term_has_a_coefficient_and_the_terms_of_the_gate_move_it(results, root, gate, n_experts):
    config = tiny(gate=gate, n_experts=n_experts)
    student, teacher, texts = student_at_start(config, root)
    student.train()
    batch = {name: values[:8] for name, values in texts.arrays["train"].items()}
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    terms = distillation_terms(config, teacher, student, batch)
    assert set(terms) == set(config.coefficients())
    moving = [name for name in ("entropy", "load_balance", "code_mass") if config.coefficients().get(name)]
    gates = [layer.mixture.moe.gate for layer in student.encoder.encoder.layer]
    for name in moving:
        student.zero_grad()
        terms[name].backward(retain_graph=True)
        assert all(any(p.grad is not None and p.grad.abs().max() > 0 for p in g.parameters()) for g in gates)
    sum(value for name, value in terms.items() if config.coefficients()[name]).backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    own = {id(parameter) for parameter in student.parameters()}
    assert not any(id(parameter) in own for parameter in teacher.parameters())


def test_a_plus_is_hard_after_its_share_of_the_steps(results, root):
    student, _, _ = load_student(tiny(gate="comet+"), root=root)
    gates = [layer.mixture.moe.gate for layer in student.encoder.encoder.layer]
    assert all(isinstance(gate, PermutationSearch) and gate.permutation.steps == 3 for gate in gates)
    assert gates[0].permutation is not gates[1].permutation


def test_hash_goes_by_token_id_with_a_table_for_each_layer(results, root):
    assert results["hash"].metrics["decided_by_word"] == 1
    assert all(word[2] == 1 for row in results["hash"].curves["words"] for word in row["words"])
    counts = load_texts(tiny()).counts
    tables = [make_gate(tiny(gate="hash", seed=s), layer, 16, counts).table for s, layer in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    balanced = make_gate(tiny(gate="hash_balanced"), 0, 16, counts)
    assert isinstance(balanced, HashGate)
    tokens = torch.zeros(4).index_add(0, balanced.table, counts.float())
    assert tokens.max() - tokens.min() <= counts.max()


@pytest.mark.parametrize("gate", ["hash", "comet"])
def test_words_are_all_tokens_of_the_test_set_once(results, gate):
    test = load_texts(tiny()).arrays["test"]
    for layer in range(2):
        rows = [row for row in results[gate].curves["words"] if row["layer"] == layer]
        assert [row["expert"] for row in rows] == [0, 1, 2, 3]
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        for row in rows:
            times = [times for _, times, _ in row["words"]]
            assert times == sorted(times, reverse=True)
            assert sum(times) <= round(row["share"] * int(test["seen"].sum()))
    begins = [
        w[1] for row in results[gate].curves["words"] if row["layer"] == 0 for w in row["words"] if w[0] == "[CLS]"
    ]
    assert sum(begins) == len(test["label"])


@pytest.mark.parametrize("gate", ["hash", "comet", "pruned"])
def test_watched_sentences_say_where_each_token_went_and_what_an_expert_is_worth(results, root, gate):
    student, _, texts = load_student(tiny(gate=gate), root=root)
    rows = results[gate].curves["sentences"]
    test = texts.arrays["test"]
    n_experts = 1 if gate == "pruned" else 4
    assert len(rows) == 3
    with torch.no_grad():
        answer = student(test["tokens"][:3], test["seen"][:3])
    probability = answer.logits.softmax(-1)
    for index, row in enumerate(rows):
        length = int(test["seen"][index].sum())
        assert len(row["pieces"]) == length and row["pieces"][0] == "[CLS]" and row["pieces"][-1] == "[SEP]"
        assert [len(layer) for layer in row["expert"]] == [length] * 2 == [len(layer) for layer in row["weight"]]
        assert row["probability"] == pytest.approx(probability[index].tolist(), abs=1e-3)
        assert [len(layer) for layer in row["without"]] == [n_experts] * 2
    first = [int(test["seen"][:index].sum()) for index in range(3)]
    experts = answer.trace.routings[0].weights.argmax(1).tolist()
    assert [row["expert"][0][0] for row in rows] == [experts[place] for place in first]


def test_importance_is_measured_on_training_rows_unless_told_otherwise(results, root, tmp_path, monkeypatch):
    seen = []
    real = comet_bert_training.Batches

    def watched(arrays, *args, **options):
        seen.append(arrays["tokens"])
        return real(arrays, *args, **options)

    monkeypatch.setattr(comet_bert_training, "Batches", watched)
    texts = load_texts(tiny())
    for split, rows in (("train", 30), ("valid", 20)):
        result = importance(tiny(importance_split=split), root=root, recompute=True)
        assert torch.equal(seen[-1], texts.arrays[split]["tokens"][:30]) and result.metrics["rows"] == rows
        assert [len(row["values"]) for row in result.curves["importance"]] == [24, 24]
        assert all(0.5 < share <= 1 for share in result.metrics["top_half"])


def test_padding_is_routed_and_counted_only_if_asked_for(results, root):
    terms = {}
    for padding in (False, True):
        config = tiny(gate="hash", padding=padding)
        student, teacher, texts = student_at_start(config, root)
        batch = {name: values[:8] for name, values in texts.arrays["train"].items()}
        answer = student(batch["tokens"], batch["seen"])
        wanted = batch["seen"].numel() if padding else int(batch["seen"].sum())
        assert len(answer.trace.routings[0].weights) == wanted
        terms[padding] = distillation_terms(config, teacher, student, batch)
    terms = {padding: {name: value.detach() for name, value in each.items()} for padding, each in terms.items()}
    assert float(terms[True]["task"]) == pytest.approx(float(terms[False]["task"]), rel=1e-5)
    assert float(terms[True]["layers"]) != pytest.approx(float(terms[False]["layers"]), rel=1e-3)


def test_words_and_sentences_do_not_count_routed_padding(results, root):
    result = run(tiny(gate="comet", padding=True, steps=2, evaluate_every=2), root=root, progress=False)
    test = load_texts(tiny()).arrays["test"]
    begins = [w[1] for row in result.curves["words"] if row["layer"] == 1 for w in row["words"] if w[0] == "[CLS]"]
    assert sum(begins) == len(test["label"])
    assert not any(word[0] == "[PAD]" for row in result.curves["words"] for word in row["words"])
    assert all(len(row["expert"][0]) == len(row["pieces"]) for row in result.curves["sentences"])


def test_a_pruned_student_is_as_wide_as_one_expert_and_keeps_the_most_important(results, root):
    student, teacher, _ = student_at_start(tiny(gate="pruned"), root)
    rows = importance(tiny(), root=root).curves["importance"]
    for layer, old, row in zip(student.encoder.encoder.layer, teacher.encoder.encoder.layer, rows, strict=True):
        best = torch.tensor(row["values"]).argsort(descending=True, stable=True)[:6]
        assert torch.equal(layer.mixture.moe.experts.w1[0].T, old.intermediate.dense.weight[best])


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "commet"}, "did you mean 'comet'"),
        ({"gate": "softmax"}, "unknown gate 'softmax'"),
        ({"task": "sst"}, "did you mean 'sst2'"),
        ({"mix": "after"}, "did you mean 'after_norm'"),
        ({"pool": "clas"}, "did you mean 'cls'"),
        ({"importance_split": "test"}, "unknown importance_split 'test'"),
        ({"importance_rows": 0}, "importance_rows must be positive"),
        ({"n_experts": 1}, "one expert is gate 'pruned'"),
        ({"gate": "comet+", "search_share": 0.0}, "leave out the '\\+'"),
        ({"search_share": 1.5}, r"search_share is a share, in \[0, 1\]"),
        ({"entropy_weight": -1.0}, "entropy_weight must not be negative"),
        ({"teacher_steps": 0}, "teacher_steps must be positive"),
        ({"model": "minilm"}, "are sizes of model='tiny', not of 'minilm'"),
        ({"stepps": 3}, "did you mean 'steps'"),
    ],
)
def test_bad_settings_are_refused_with_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_a_length_above_the_encoders_limit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="length=65 is above the encoder's limit of 64 tokens"):
        finetune(tiny(length=65), root=tmp_path)


def test_a_number_of_experts_that_does_not_divide_the_layer_says_what_to_give(results, root):
    with pytest.raises(ValueError, match="5 experts do not divide the 24 neurons of a layer: give expert_width"):
        distil(tiny(n_experts=5), root=root, progress=False)
    student, _, _ = student_at_start(tiny(n_experts=5, expert_width=6), root)
    assert student.encoder.encoder.layer[0].mixture.moe.experts.w1.shape == (5, 16, 6)


def test_a_teacher_has_no_student(root):
    with pytest.raises(ValueError, match="has no student to distil"):
        distil(tiny(gate="teacher"), root=root)


# ---- profiles, recording, claims


def test_profiles():
    assert CometBertConfig.profile("quick") == CometBertConfig()
    standard, paper = CometBertConfig.profile("standard"), CometBertConfig.profile("paper")
    assert (standard.task, standard.model, standard.pool) == ("sst2", "minilm", "mean")
    assert (paper.task, paper.model, paper.pool, paper.length) == ("sst2", "bert-base-uncased", "cls", 128)
    assert standard.data_options == paper.data_options == {}  # all of SST-2
    assert (paper.n_experts, paper.expert_width, paper.shared, paper.k) == (4, None, None, 1)
    with pytest.raises(ValueError, match="did you mean 'standard'"):
        CometBertConfig.profile("standart")


def options(**changes):
    base = {"what": "bert", "profile": "standard", "seeds": [0, 1, 2], "teacher_seeds": [0], "gates": None}
    how = {"plan_only": False, "shared_only": False, "extend": False, "timing": "after", "workers": 1, "commit": None}
    return argparse.Namespace(**{**base, **how, **changes})


def test_what_is_recorded_is_every_gate_and_seed_and_the_teacher_once():
    recording = RECORDINGS["bert"]
    configs = recording.configs(options())
    standard = CometBertConfig.profile("standard")
    as_script = [config for config in configs if config.gamma != standard.gamma]
    assert [(c.gate, c.seed, c.gamma, c.entropy_weight) for c in as_script] == [
        ("comet", s, 0.1, 0.1) for s in (0, 1, 2)
    ]
    assert configs[-3:] == as_script
    configs = configs[:-3]
    pairs = [(config.gate, config.seed) for config in configs]
    assert len(set(pairs)) == len(pairs) == 3 * (len(PAPER_GATES) - 1) + 1
    assert ("teacher", 0) in pairs and ("comet+", 2) in pairs
    assert len({json.dumps(config.importance.__dict__, default=str) for config in configs}) == 1
    for name in recording.columns:
        assert name in CometBertConfig.__dataclass_fields__ or name in _METRICS


def test_no_setting_is_recorded_twice():
    configs = RECORDINGS["bert"].configs(options(profile="quick", gates=["comet"]))  # quick is as the script
    assert [(config.gate, config.seed) for config in configs] == [("comet", seed) for seed in (0, 1, 2)]


def test_further_teachers_are_recorded_with_what_the_claims_are_about():
    *configs, _, _, last = RECORDINGS["bert"].configs(options(teacher_seeds=[4, 0, 7]))
    assert (last.teacher_seed, last.gamma, last.seed) == (4, 0.1, 2)
    by_teacher = {seed: [c for c in configs if c.teacher_seed == seed] for seed in (4, 0, 7)}
    assert [c.teacher_seed for c in configs] == sorted((c.teacher_seed for c in configs), key=[4, 0, 7].index)
    assert {c.gate for c in by_teacher[4]} == set(PAPER_GATES)
    for seed in (0, 7):
        pairs = [(c.gate, c.seed) for c in by_teacher[seed]]
        assert {gate for gate, _ in pairs} == set(CLAIMED_GATES) and len(set(pairs)) == len(pairs) == 13
    named = RECORDINGS["bert"].configs(options(teacher_seeds=[0, 1], gates=["hash"]))
    assert [(c.teacher_seed, c.seed, c.gate) for c in named] == [(t, s, "hash") for t in (0, 1) for s in (0, 1, 2)]


_METRICS = (
    *("test_score", "teacher_score", "teacher_agreement", "experts_per_token", "decided_by_word", "flops_per_token"),
    *("speedup_1", "speedup_64", "seconds"),
)


def test_the_recording_prepares_what_its_runs_share(results, root, monkeypatch):
    not_again(monkeypatch)
    assert set(_METRICS) <= set(results["comet"].metrics)
    recording = RECORDINGS["bert"]
    assert recording.shared(tiny(), root).experiment == "comet_bert_importance"
    assert recording.part(tiny(gate="hash", seed=3)) == recording.part(tiny())
    assert recording.part(tiny(teacher_seed=3)) != recording.part(tiny())


def test_runs_side_by_side_are_not_timed_and_are_timed_afterwards_one_by_one(root, tmp_path, monkeypatch):
    configs = [tiny(gate=gate, steps=2, evaluate_every=2) for gate in ("teacher", "hash")]
    monkeypatch.setitem(RECORDINGS, "bert", dataclasses.replace(RECORDINGS["bert"], configs=lambda _: configs))
    out = tmp_path / "out"
    untimed = record(options(scratch=tmp_path, out=out, timing="no"))
    assert len(untimed) == 2 and not any("speedup_1" in copy.metrics for copy in untimed)
    not_again(monkeypatch)
    configs.append(tiny(gate="comet", steps=2, evaluate_every=2))  # not done: timing trains nothing
    timed = record(options(scratch=tmp_path, out=out, timing="only"))
    assert [copy.config["gate"] for copy in timed] == ["teacher", "hash"]
    for before, after in zip(untimed, timed, strict=True):
        assert after.metrics["timed_alone"] is True and after.metrics["latency_ms_64"] > 0
        assert {name: after.metrics[name] for name in before.metrics} == before.metrics
        assert after.curves == before.curves and after.path == before.path
        assert Result.load(after.path).metrics == after.metrics
    configs.pop()
    assert all(copy.metrics["timed_alone"] for copy in record(options(scratch=tmp_path, out=out)))


def test_what_has_no_clock_cannot_be_timed(tmp_path):
    with pytest.raises(SystemExit, match="vision has nothing to time"):
        record(options(what="vision", scratch=tmp_path, out=tmp_path, timing="only"))


def test_a_run_on_its_own_is_timed_at_once(results):
    assert all(result.metrics["timed_alone"] is False for result in results.values())


def test_thinned_results_keep_sentences_of_seed_0_only(results, tmp_path):
    first = results["hash"]
    other = Result("comet_bert", {"seed": 1}, first.path, seed=1, curves=first.curves, metrics=first.metrics)
    assert "sentences" in thinned(first, tmp_path).curves
    copy = thinned(other, tmp_path)
    assert "sentences" not in copy.curves and "words" in copy.curves


def made_up(gate, seed, score, teacher=0):
    config = {**json.loads(json.dumps({"task": "sst2", "model": "minilm", "n_experts": 4, "steps": 9})), "gate": gate}
    config["teacher_seed"] = teacher
    metrics = {"test_score": score, "teacher_score": 0.9, "flops_per_token": 1.0, "teacher_flops_per_token": 2.0}
    metrics |= {"speedup_1": 0.5, "speedup_64": 1.5}
    return Result("comet_bert", {**config, "seed": seed}, None, seed=seed, status="finished", metrics=metrics)


def test_claims_are_judged_by_pairs_of_one_seed():
    scores = {"hash": (0.80, 0.82, 0.84), "comet": (0.81, 0.83, 0.86), "pruned": (0.82, 0.82, 0.81)}
    table = bert_claims([made_up(gate, s, score) for gate, row in scores.items() for s, score in enumerate(row)])
    by_claim = dict(zip(table["paper claims"], table["does it hold?"], strict=True))
    assert by_claim["comet beats MoEBERT's hash gate on 5 of 7 GLUE tasks (abstract)"] == "yes, in sign"
    assert by_claim["(not in the paper) comet beats one expert for all of the same width"] == "inconclusive"
    assert "sst2, minilm, 4 experts, 9 steps, 3 seeds" in set(table["on what"])
    costs = table[table["does it hold?"] == "(measured)"]["we measured"].tolist()
    assert costs[0] == "score -0.0800, 50% of the FLOPs, 0.50 times as fast at batch 1, 1.50 at 64"


def test_claims_of_several_teachers_have_a_row_for_each_and_one_whose_interval_is_over_teachers():
    gains = {0: (0.01, 0.02, 0.03), 1: (0.02, 0.02, 0.02), 2: (-0.04, -0.03, -0.02)}
    runs = [made_up("hash", seed, 0.8, t) for t in gains for seed in range(3)]
    runs += [made_up("comet", seed, 0.8 + gain, t) for t, row in gains.items() for seed, gain in enumerate(row)]
    runs.append(made_up("comet+", 0, 0.9))  # of one teacher and one seed
    table = bert_claims(runs)
    claim = "comet beats MoEBERT's hash gate on 5 of 7 GLUE tasks (abstract)"
    rows = table[table["paper claims"] == claim]
    assert rows["does it hold?"].tolist()[:3] == ["yes, in sign", "yes, in sign", "no: the other way round"]
    what = rows["on what"].tolist()
    assert [text.partition("9 steps, ")[2] for text in what] == [
        "teacher 0, 3 seeds",
        "teacher 1, 3 seeds",
        "teacher 2, 3 seeds",
        "3 teachers: Student's interval over teachers",
    ]
    found = rows["we measured"].tolist()[3]
    assert found.startswith("comet − hash +0.0033 [-0.0684, +0.0750]")  # the mean ± 4.303 standard errors
    assert rows["does it hold?"].tolist()[3] == "inconclusive"
    plus = table[table["paper claims"].str.startswith("comet+ beats MoEBERT")]
    assert plus["on what"].tolist() == ["sst2, minilm, 4 experts, 9 steps, teacher 0, 1 seed"]
    short = bert_claims(runs, each_teacher=False)
    assert short[short["paper claims"] == claim]["on what"].tolist() == what[3:]
    assert short["paper claims"].is_unique
    two = bert_claims([run for run in runs if run.config["teacher_seed"] < 2])
    assert two[two["paper claims"] == claim]["does it hold?"].tolist()[-1] == "inconclusive (2 teachers)"


def test_costs_come_without_times_where_nothing_was_timed():
    runs = [made_up("hash", 0, 0.8), made_up("hash", 1, 0.8)]
    del runs[0].metrics["speedup_1"], runs[0].metrics["speedup_64"]
    assert bert_claims(runs)["we measured"].tolist() == [
        "score -0.1000, 50% of the FLOPs, 0.50 times as fast at batch 1, 1.50 at 64"
    ]
    assert bert_claims(runs[:1])["we measured"].tolist() == ["score -0.1000, 50% of the FLOPs"]


def test_claims_want_one_setting():
    with pytest.raises(ValueError, match="no Results"):
        bert_claims([])
    other = made_up("comet", 0, 0.8)
    other.config["steps"] = 10
    with pytest.raises(ValueError, match="these differ in steps"):
        bert_claims([made_up("hash", 0, 0.8), other])
    with pytest.raises(ValueError, match="several Results per seed"):
        bert_claims([made_up("hash", 0, 0.8), made_up("hash", 0, 0.9)])


def test_one_seed_is_inconclusive():
    table = bert_claims([made_up("hash", 0, 0.8), made_up("comet", 0, 0.9)])
    assert table["does it hold?"][0] == "inconclusive (1 seed)"
