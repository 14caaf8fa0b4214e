"""Calibration errors with known answers; conformal sets that cover what they promise."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from moe_lab.metrics.calibration import (
    best_temperature,
    double_softmax,
    exit_temperatures,
    expected_calibration_error,
    reliability,
)
from moe_lab.metrics.conformal import (
    STRATEGIES,
    conformal_quantile,
    coverage_and_size,
    exit_quantiles,
    prediction_sets,
    too_few,
)


def calibrated(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.5 + 0.5 * torch.rand(n, generator=generator)
    return confidence, torch.rand(n, generator=generator) < confidence


def test_perfectly_calibrated_predictions_have_almost_no_error_in_large_samples_and_much_in_small_batches():
    confidence, right = calibrated(100_000)
    assert expected_calibration_error(confidence, right) < 0.008
    assert expected_calibration_error(confidence, right, equal_mass=False) < 0.008
    assert expected_calibration_error(confidence, right, per_batch=64) > 0.1  # the artefact


@given(st.floats(0.0, 1.0), st.integers(0, 50), st.booleans())
def test_a_constant_confidence_has_the_distance_to_the_accuracy(c, hits, equal_mass):
    right = torch.arange(50) < hits
    error = expected_calibration_error(torch.full((50,), c), right, equal_mass=equal_mass)
    assert error == pytest.approx(abs(c - hits / 50), abs=1e-6)


@given(st.integers(1, 200), st.integers(0, 99), st.booleans())
def test_bins_hold_every_sample_once_also_with_ties_and_order_does_not_matter(n, seed, equal_mass):
    generator = torch.Generator().manual_seed(seed)
    confidence = (torch.rand(n, generator=generator) * 5).round() / 5
    right = torch.rand(n, generator=generator) < 0.5
    table = reliability(confidence, right, equal_mass=equal_mass)
    assert table["share"].sum() == pytest.approx(1)
    assert (table["share"] * table["accuracy"]).sum() == pytest.approx(right.double().mean().item())
    order = torch.randperm(n, generator=generator)
    other = expected_calibration_error(confidence[order], right[order], equal_mass=equal_mass)
    assert other == pytest.approx(expected_calibration_error(confidence, right, equal_mass=equal_mass))


def test_softmax_twice_cannot_be_confident():
    probabilities = torch.eye(10)
    twice = double_softmax(probabilities)
    assert twice.max().item() == pytest.approx(math.e / (math.e + 9))
    assert expected_calibration_error(twice.max(-1).values, torch.ones(10, dtype=torch.bool)) > 0.7


def test_a_temperature_undoes_a_scale():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits)
    torch.manual_seed(0)
    y = labels.sample()
    assert best_temperature(3 * logits, y) == pytest.approx(3, rel=0.1)


def test_calibration_refuses_nonsense():
    with pytest.raises(ValueError, match="at least one sample"):
        reliability(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    with pytest.raises(ValueError, match="were these logits"):
        reliability(torch.tensor([3.0]), torch.tensor([True]))


def test_conformal_quantile_by_hand():
    scores = torch.tensor([0.4, 0.1, 0.3, 0.2])
    assert conformal_quantile(scores, 0.2) == pytest.approx(0.4)  # rank ceil(5 x 0.8) = 4
    assert conformal_quantile(scores, 0.4) == pytest.approx(0.3)
    assert conformal_quantile(scores, 0.1) == math.inf  # rank 5 of 4
    assert conformal_quantile(torch.zeros(0), 0.1) == math.inf
    with pytest.raises(ValueError, match="between 0 and 1"):
        conformal_quantile(scores, 1.0)


def test_coverage_is_what_was_promised():
    generator = torch.Generator().manual_seed(0)
    covered = []
    for _ in range(400):
        scores = torch.rand(1000, generator=generator)
        covered.append((scores[500:] <= conformal_quantile(scores[:500], 0.1)).double().mean())
    assert 0.895 <= torch.stack(covered).mean() <= 0.91


def exits_and_probabilities(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(n, 3, 4, generator=generator).mul(2).softmax(-1)
    labels = probabilities[:, 1].multinomial(1, generator=generator).squeeze(1)
    return probabilities, labels, torch.randint(3, (n,), generator=generator)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sets_cover_and_grow_as_alpha_falls(strategy):
    probabilities, labels, exits = exits_and_probabilities(4000)
    fit, test = slice(0, 2000), slice(2000, 4000)
    last = None
    for alpha in (0.3, 0.1, 0.05):
        q = exit_quantiles(probabilities[fit], labels[fit], exits[fit], alpha, strategy=strategy)
        chosen = probabilities[test][torch.arange(2000), exits[test]]
        sets = prediction_sets(chosen, exits[test], q)
        coverage, size = coverage_and_size(sets, labels[test])
        assert abs(coverage - (1 - alpha)) < 0.035 and 0 < size <= 4
        assert last is None or bool((sets | ~last).all())  # nested
        last = sets


def test_too_few_samples_at_an_exit_fall_back_to_all_scored_there():
    probabilities, labels, _ = exits_and_probabilities(200)
    for at_first, own in ((20, False), (21, True)):
        exits = torch.ones(200, dtype=torch.int64)
        exits[:at_first] = 0
        q = exit_quantiles(probabilities, labels, exits, 0.2)
        scores = 1 - probabilities[torch.arange(200), 0, labels].double()
        expected = conformal_quantile(scores[:at_first] if own else scores, 0.2)
        assert q[0].item() == pytest.approx(expected)
        assert q[2].item() == exit_quantiles(probabilities, labels, exits, 0.2, strategy="gated_all")[2].item()
    with pytest.raises(ValueError, match="did you mean 'gated'"):
        exit_quantiles(probabilities, labels, exits, 0.2, strategy="gate")


def test_strict_sets_use_their_own_exit_only_and_say_when_that_is_too_few():
    probabilities, labels, _ = exits_and_probabilities(200)
    exits = torch.ones(200, dtype=torch.int64)
    exits[:30] = 0
    with pytest.warns(UserWarning, match="alpha = 0.02, which needs 49: exit 1: 30, exit 3: 0"):
        q = exit_quantiles(probabilities, labels, exits, 0.02, strategy="gated_strict")
    assert q[0] == math.inf and q[2] == math.inf and q[1] < 1
    scores = 1 - probabilities[torch.arange(200), 1, labels].double()
    assert q[1].item() == conformal_quantile(scores[30:], 0.02)


@given(st.integers(1, 400), st.floats(0.005, 0.9))
def test_a_quantile_exists_from_one_over_alpha_minus_one_samples_on(n, alpha):
    assert too_few(n, alpha) == (conformal_quantile(torch.arange(n).float(), alpha) == math.inf)
    if abs(1 / alpha - round(1 / alpha)) > 1e-6:  # at whole numbers the tolerance of the rank decides
        assert too_few(n, alpha) == (n < math.ceil(1 / alpha) - 1)


@pytest.mark.parametrize("equal_mass", [True, False])
def test_bins_are_those_of_scikit_learn(equal_mass):
    confidence, right = calibrated(5000)
    table = reliability(confidence, right, n_bins=10, equal_mass=equal_mass)
    strategy = "quantile" if equal_mass else "uniform"
    accuracy, mean = calibration_curve(right.numpy(), confidence.double().numpy(), n_bins=10, strategy=strategy)
    assert table["accuracy"].to_numpy() == pytest.approx(accuracy)
    assert table["confidence"].to_numpy() == pytest.approx(mean)


def test_every_exit_has_its_own_temperature():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3000, 2, 4, generator=generator, dtype=torch.float64)
    labels = logits[:, 0].softmax(-1).multinomial(1, generator=generator).squeeze(1)
    found = exit_temperatures(torch.stack((2 * logits[:, 0], 0.5 * logits[:, 0]), 1), labels)
    assert found.tolist() == pytest.approx([2.0, 0.5], rel=0.1)


def test_a_set_that_cannot_be_bounded_is_full():
    sets = prediction_sets(torch.rand(3, 5), torch.zeros(3, dtype=torch.int64), torch.tensor([math.inf]))
    assert bool(sets.all())
