"""AUC, masked errors and baselines: hand-derived values and limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.metrics.ranking import auc, baselines, batchwise_masked_mse, masked_mse, popularity, user_item_bias


def test_auc_counts_ties_as_half():
    # Pairs (watched, unwatched): (3, 1) right, (3, 2) right, (2, 1) right, (2, 2) tie -> 3.5 of 4.
    score = torch.tensor([3.0, 2.0, 1.0, 2.0])
    label = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert auc(score, label) == 3.5 / 4


@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=40))
def test_auc_is_the_share_of_pairs_in_the_right_order(rows):
    score, label = torch.tensor([float(s) for s, _ in rows]), torch.tensor([float(y) for _, y in rows])
    if label.min() == label.max():
        with pytest.raises(ValueError, match="both kinds"):
            auc(score, label)
        return
    gap = score[label == 1].unsqueeze(1) - score[label == 0]
    expected = ((gap > 0).double() + 0.5 * (gap == 0).double()).mean()
    assert auc(score, label) == pytest.approx(float(expected))
    assert auc(3 * score + 7, label) == pytest.approx(float(expected))  # only the order matters
    assert auc(-score, label) == pytest.approx(1 - float(expected))


def test_auc_of_a_diverged_model_says_so():
    with pytest.raises(ValueError, match="diverged"):
        auc(torch.tensor([0.0, math.nan]), torch.tensor([0.0, 1.0]))


def test_masked_mse_is_the_mean_over_rated_rows_only():
    prediction = torch.tensor([1.0, 2.0, 9.0])
    target, mask = torch.tensor([2.0, 4.0, 0.0]), torch.tensor([True, True, False])
    assert float(masked_mse(prediction, target, mask)) == 2.5  # (1 + 4) / 2


def test_nothing_rated_gives_zero_loss_and_zero_gradient_even_beside_nan():
    prediction = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = masked_mse(prediction, torch.tensor([math.nan, 0.0]), torch.tensor([False, False]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert prediction.grad.tolist() == [0, 0]


def test_nan_in_a_masked_row_leaves_the_gradient_of_the_others_alone():
    prediction = torch.tensor([1.0, 2.0], requires_grad=True)
    masked_mse(prediction, torch.tensor([3.0, math.nan]), torch.tensor([True, False])).backward()
    assert prediction.grad.tolist() == [-4, 0]  # 2 (1 - 3) / 1


def test_the_official_estimate_weights_batches_by_rows_not_by_rated_rows():
    # Batch 1: one rated row of two, error 3; batch 2: two rated rows, error 1 each.
    # Exact: (9 + 1 + 1) / 3, theirs: (9 + 1) / 2.
    prediction, target = torch.tensor([3.0, 0.0, 1.0, 1.0]), torch.zeros(4)
    mask = torch.tensor([True, False, True, True])
    assert float(masked_mse(prediction, target, mask)) == pytest.approx(11 / 3)
    assert batchwise_masked_mse(prediction, target, mask, 2) == pytest.approx(5.0)
    assert batchwise_masked_mse(prediction, target, mask, 4) == pytest.approx(11 / 3)  # one batch: no artefact


def _rows(user, item, rating):
    rating = torch.tensor(rating, dtype=torch.float32)
    return {
        "user": torch.tensor(user),
        "item": torch.tensor(item),
        "watched": (rating > 0).float(),
        "rating": rating,
        "has_rating": rating > 0,
    }


def test_popularity_counts_watched_rows_only():
    train = _rows([0, 1, 2, 0], [2, 2, 0, 0], [4, 5, 0, 3])
    assert popularity(train, 4).tolist() == [1, 0, 2, 0]


def test_biases_without_shrinkage_reproduce_additive_ratings():
    of_user, of_item = [-1.0, 0.0, 1.0], [-0.5, 0.5]
    pairs = [(u, i) for u in range(3) for i in range(2)]
    train = _rows([u for u, _ in pairs], [i for _, i in pairs], [3 + of_user[u] + of_item[i] for u, i in pairs])
    mean, users, items = user_item_bias(train, 3, 2, shrinkage=0.0)
    assert mean == pytest.approx(3)
    assert users.tolist() == pytest.approx(of_user, abs=1e-6)
    assert items.tolist() == pytest.approx(of_item, abs=1e-6)


def test_shrinkage_pulls_a_single_rating_towards_the_mean_and_unseen_ids_are_zero():
    train = _rows([0, 1, 1, 1], [0, 1, 1, 1], [5, 3, 3, 3])
    mean, users, items = user_item_bias(train, 3, 3, shrinkage=5.0, sweeps=1)
    assert mean == 3.5
    assert float(items[0]) == pytest.approx(1.5 / 6)  # one rating, residual 1.5, five imagined ones with residual 0
    assert float(users[2]) == float(items[2]) == 0


def test_baselines_by_hand():
    train = _rows([0, 0, 1, 1], [0, 1, 0, 2], [4, 0, 2, 0])  # half watched, mean rating 3
    test = _rows([0, 1, 0, 1], [0, 0, 1, 2], [5, 3, 0, 0])
    known = baselines(train, test, 2, 3)
    assert known["constant_bce"] == pytest.approx(math.log(2))
    assert known["constant_mse"] == pytest.approx(2.0)  # (5 - 3)^2 / 2
    assert known["popularity_auc"] == 1.0  # item 0 was watched twice, 1 and 2 never
