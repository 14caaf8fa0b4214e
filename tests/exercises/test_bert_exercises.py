"""Checks of notebook 07 accept a right answer and say what is wrong with others."""

import math

import pytest
import torch

from moe_lab.exercises import bert
from moe_lab.experiments.comet_bert_config import CometBertConfig

FULL = CometBertConfig(gate="comet")


def split(importance, n_experts, width, shared):
    order = sorted(range(len(importance)), key=lambda neuron: -importance[neuron])
    rest = order[shared:]
    return [order[:shared] + rest[expert::n_experts][: width - shared] for expert in range(n_experts)]


def in_blocks(importance, n_experts, width, shared):
    order = importance.argsort(descending=True).tolist()
    own = width - shared
    return [order[:shared] + order[shared + e * own : shared + (e + 1) * own] for e in range(n_experts)]


def saving(d, hidden, width, length, n_experts):
    attention, gate = 8 * d * d + 4 * length * d, 2 * d * (2 * n_experts - 1)
    return (attention + gate + 4 * d * width) / (attention + 4 * d * hidden)


def bits(counts):
    joint = counts.double() / counts.sum()
    entropies = [-sum(p * math.log2(p) for p in values.tolist() if p > 0) for values in (joint.sum(1), joint.sum(0))]
    return sum(entropies) + sum(p * math.log2(p) for p in joint.flatten().tolist() if p > 0)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (bert.check_split, (split,)),
        (bert.check_free, ((1.0, 0.0, 1.0, 1.0),)),  # the target is met
        (bert.check_free, ((2.0, 1.0, 1.0, 3.0),)),
        (bert.check_saving, (saving,)),
        (bert.check_ablation, (CometBertConfig(gate="comet", layer_weight=0, prediction_weight=0), FULL)),
        (bert.check_information, (bits,)),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(*answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (bert.check_split, (None,), "Not answered yet"),
        (bert.check_split, (lambda *a: split(*a)[:1],), "you give 1 lists"),
        (bert.check_split, (lambda *a: [row[:-1] for row in split(*a)],), "4 different neurons are wanted"),
        (bert.check_split, (lambda i, e, w, s: split(-i, e, w, s),), "must be in every expert"),
        (bert.check_split, (in_blocks,), "dealt like cards"),
        (bert.check_free, (None,), "Not answered yet"),
        (bert.check_free, ((1.0, 2.0),), "you give 2"),
        (bert.check_free, ((1.0, 0.0, 1.0, 0.0),), "its importance is 2, not 0"),
        (bert.check_free, ((-1.0, 0.0, 1.0, 1.0),), "so nearly is what it does"),  # a dead neuron
        (bert.check_saving, (None,), "Not answered yet"),
        (bert.check_saving, (lambda *a: 2 * saving(*a),), "of the FLOPs are left, you say"),
        (bert.check_saving, (lambda d, f, w, s, e: saving(d, f, w, s, 0.5),), "is the gate in it?"),
        (bert.check_ablation, (None, FULL), "Not answered yet"),
        (bert.check_ablation, (FULL, FULL), "layer_weight, prediction_weight must be 0"),
        (bert.check_ablation, (CometBertConfig(gate="comet", layer_weight=0), FULL), "prediction_weight must be 0"),
        (
            bert.check_ablation,
            (CometBertConfig(gate="hash", layer_weight=0, prediction_weight=0), FULL),
            "gate must be that of the other run",
        ),
        (bert.check_information, (None,), "Not answered yet"),
        (bert.check_information, (lambda counts: bits(counts) * math.log(2),), "is the logarithm to base 2?"),
        (bert.check_information, (lambda counts: 1.0,), "a gate that does not look"),
        (bert.check_information, (lambda counts: math.nan,), "bits, not nan"),
    ],
)
def test_wrong_answers_are_explained(check, answer, says, capsys):
    assert not check(*answer)
    assert says in capsys.readouterr().out


def test_importance_and_effect_of_one_neuron_by_hand():
    # y = 3 relu(2 + 1) = 9, loss (9 - 1)^2 / 2 = 32; dl/dy = 8: w1 dl/dw1 = 2 * 24, w2 dl/dw2 = 3 * 24; without: 1 / 2
    assert bert.importance_and_effect(2.0, 1.0, 3.0, 1.0) == pytest.approx((120.0, 31.5))


def test_information_at_its_limits():
    assert bert.information(torch.eye(4)) == pytest.approx(2.0)
    assert bert.information(torch.ones(5, 3)) == pytest.approx(0.0, abs=1e-12)


def test_the_counted_share_of_experts_as_wide_as_the_layer_is_above_one():
    assert bert.counted_share(8, 32, 32, 16, 4) > 1  # the gate comes on top
