"""What a two-task recommender is judged by: watched or not (AUC, cross entropy), ratings where there are any (MSE).

Legend: N rows, I items.

    AUC   P(score of a watched row > score of an unwatched row) + P(equal)/2        exact rank statistic
    BCE   mean of log(1 + exp(-s)) over watched, log(1 + exp(s)) over unwatched     s = logit
    MSE   sum over rated rows of (prediction - rating)^2 / number of rated rows     0 if no row is rated

Where we differ from the COMET authors' code: its AUC is Keras's 200-threshold approximation, and its loss of a data set
is the row-weighted mean of per-batch losses, which weights a batch by its rows and not by its *rated* rows
(`batchwise_masked_mse` reproduces that artefact). Ours are means over the data set.

Baselines belong in every table: popularity alone reaches an AUC of about 0.85 on MovieLens, because negatives are
uniform. Taught in notebook 03.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def auc(score: Tensor, label: Tensor) -> float:
    """Exact area under the ROC curve; ties count half.

    Args:
        score: (N,) any real numbers; only their order matters.
        label: (N,) 0 or 1.

    Raises:
        ValueError: a score that is not finite, or labels of one kind only (the AUC is then undefined).
    """
    from sklearn.metrics import roc_auc_score

    if not torch.isfinite(score).all():
        raise ValueError("a score is NaN or infinite: the model diverged, lower the learning rate")
    if label.min() == label.max():
        raise ValueError(f"all {len(label)} labels are {float(label[0]):g}: an AUC needs both kinds")
    return float(roc_auc_score(label.numpy(force=True), score.double().numpy(force=True)))


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the rows where ``mask`` is True; all (N,). A scalar.

    0 with zero gradient if nothing is rated; what stands in masked rows, NaN included, changes neither value nor
    gradient.
    """
    error = torch.where(mask, prediction - torch.where(mask, target, 0), 0)
    return error.square().sum() / mask.sum().clamp(min=1)


def batchwise_masked_mse(prediction: Tensor, target: Tensor, mask: Tensor, batch_size: int) -> float:
    """The authors' estimate: MSE per batch of consecutive rows, averaged with the number of rows as weight."""
    total = 0.0
    for rows in torch.arange(len(mask)).split(batch_size):
        total += float(masked_mse(prediction[rows], target[rows], mask[rows])) * len(rows)
    return total / len(mask)


def popularity(train: Mapping[str, Tensor], n_items: int) -> Tensor:
    """(I,) float32: how often each item was watched in the training rows."""
    watched_items = train["item"][train["watched"] > 0]
    return torch.bincount(watched_items, minlength=n_items).float()


def user_item_bias(
    train: Mapping[str, Tensor], n_users: int, n_items: int, *, shrinkage: float = 5.0, sweeps: int = 5
) -> tuple[float, Tensor, Tensor]:
    """Rating = mean + user bias + item bias, fitted to the rated training rows by alternating ridge regressions.

    Args:
        train: needs ``user``, ``item``, ``rating``, ``has_rating``.
        shrinkage: counts as that many rated rows with residual 0 for every user and item; 0 would let a single
            rating decide a bias.
        sweeps: alternations; the values have settled after a few.

    Returns:
        mean, (n_users,), (n_items,): the least-squares solution with a ridge penalty ``shrinkage`` on both biases.
    """
    rated = train["has_rating"]
    user, item, rating = train["user"][rated], train["item"][rated], train["rating"][rated].double()
    mean = float(rating.mean())
    residual = rating - mean
    of_user, of_item = torch.zeros(n_users, dtype=torch.float64), torch.zeros(n_items, dtype=torch.float64)

    def ridge(index: Tensor, value: Tensor, size: int) -> Tensor:
        count = torch.bincount(index, minlength=size)
        return torch.zeros(size, dtype=torch.float64).index_add(0, index, value) / (count + shrinkage)

    for _ in range(sweeps):
        of_item = ridge(item, residual - of_user[user], n_items)
        of_user = ridge(user, residual - of_item[item], n_users)
    return mean, of_user.float(), of_item.float()


def baselines(train: Mapping[str, Tensor], test: Mapping[str, Tensor], n_users: int, n_items: int) -> dict[str, float]:
    """What needs no network, fitted to ``train``, measured on ``test``.

    Returns:
        constant_bce: always the training share of watched rows. constant_mse: always the training mean rating.
        popularity_auc: items ranked by `popularity`. bias_mse: `user_item_bias`.
    """
    label, rated = test["watched"].double(), test["has_rating"]
    share = train["watched"].double().mean().clamp(1e-6, 1 - 1e-6)
    logit = torch.logit(share).expand(len(label))
    mean, of_user, of_item = user_item_bias(train, n_users, n_items)
    bias = mean + of_user[test["user"]] + of_item[test["item"]]
    return {
        "constant_bce": float(torch.nn.functional.binary_cross_entropy_with_logits(logit, label)),
        "constant_mse": float(masked_mse(torch.full_like(label, mean), test["rating"], rated)),
        "popularity_auc": auc(popularity(train, n_items)[test["item"]], label),
        "bias_mse": float(masked_mse(bias, test["rating"], rated)),
    }
