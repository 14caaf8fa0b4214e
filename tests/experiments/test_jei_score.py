"""What is scored is what it says: costs, calibration with and without artefacts, sets from calibration samples."""

import pytest
import torch

from moe_lab.experiments.jei_score import (
    Answers,
    Contender,
    conformal_rows,
    exit_rows,
    nearest,
    reliability_rows,
    score,
)

COSTS = torch.tensor([0.25, 1.0], dtype=torch.float64)


def answers(n, seed, sharpness=1.0):
    """Labels drawn from the softmax of the logits at either exit; the logits shown are ``sharpness`` times as large."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 1, 5, generator=generator, dtype=torch.float64).expand(-1, 2, -1)
    labels = logits[:, 0].softmax(-1).multinomial(1, generator=generator).squeeze(1)
    return Answers(sharpness * logits, labels, torch.arange(n) % 4 // 3)  # every fourth goes to the end


def contender(sharpness=1.0, temperature=1.0, n=8000):
    temperatures = torch.full((2,), temperature, dtype=torch.float64)
    return Contender("jei_dnn", 0.1, answers(n, 0, sharpness), answers(n, 1, sharpness), temperatures)


def test_cost_and_shares_follow_from_the_exits():
    row = score(contender(n=400), COSTS, 0.1)
    assert row["exits"] == [0.75, 0.25] and row["cost"] == pytest.approx(0.75 * 0.25 + 0.25)
    assert row["coverage"] == pytest.approx(0.9, abs=0.05)


def test_a_temperature_per_exit_undoes_overconfidence_and_the_artefacts_do_not_care():
    calibrated, sharp = (score(contender(s), COSTS, 0.1) for s in (1.0, 3.0))
    cured = score(contender(3.0, temperature=3.0), COSTS, 0.1)
    assert calibrated["ece"] < 0.02 < 0.1 < sharp["ece"]
    assert cured["ece"] == sharp["ece"] and cured["ece_temperature"] == pytest.approx(calibrated["ece"], abs=1e-6)
    assert calibrated["ece_per_batch"] > 3 * calibrated["ece"] and calibrated["ece_double_softmax"] > 0.2
    assert calibrated["accuracy"] == sharp["accuracy"]


def test_sets_come_from_the_calibration_samples_alone():
    """Labels of the test set are another's: its coverage falls, its sets stay as they were."""
    right, wrong = contender(), contender()
    wrong.test.labels.copy_((wrong.test.labels + 1) % 5)
    a, b = (score(one, COSTS, 0.1) for one in (right, wrong))
    assert a["set_size"] == b["set_size"] and b["coverage"] < a["coverage"] - 0.2


def test_rows_per_exit_and_per_bin_hold_everybody_once():
    one = contender(n=600)
    rows = list(exit_rows(one))
    assert [row["exit"] for row in rows] == [0, 1] and sum(row["share"] for row in rows) == pytest.approx(1)
    bins = list(reliability_rows(one))
    assert sum(row["share"] for row in bins) == pytest.approx(1)
    total = score(one, COSTS, 0.1)["accuracy"]
    for parts in (rows, bins):
        assert sum(row["share"] * row["accuracy"] for row in parts) == pytest.approx(total)


def test_too_few_calibration_samples_are_counted_not_warned_of(recwarn):
    one = Contender("jei_dnn", 0.1, answers(40, 0), answers(40, 1), torch.ones(2))
    rows = list(conformal_rows(one, (0.01, 0.3), ("gated_strict",)))
    assert [row["full"] for row in rows] == [2, 0] and rows[0]["set_size"] == 5 and not recwarn.list


def test_the_nearest_contender_is_chosen_on_calibration_samples():
    cheap, dear = contender(n=40), contender(n=40)
    cheap.calibration.exits.zero_()
    cheap.test.exits.fill_(1)  # on the test set it would be the dear one
    dear.calibration.exits.fill_(1)
    assert nearest([dear, cheap], COSTS, 0.3) is cheap
