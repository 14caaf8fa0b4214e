"""An embedded recommender in which the right expert is known: user clusters with tastes of their own.

What is planted (c = cluster of user u, t = topic of item i):

    c ~ uniform over n_clusters                           kept as ``expert``: one expert per cluster is intended
    A (n_clusters, n_topics) ~ N(0, 1), columns centred   taste: averaged over clusters all topics are equal
    popularity_i = 1 / (10 + rank_i)^popularity_skew      the same for everybody
    watch        user u draws its items without replacement with odds  popularity_i * exp(taste * A[c, t])
    rating       round(3.5 + quality_i + 0.9 B[c, t] + noise * N(0, 1)) clipped to 1..5, B drawn like A
    negatives    1 : 1, uniform over unwatched items (`moe_lab.datasets.two_task`), so popularity is a strong baseline

So *one* table over items cannot know taste: it is popularity. A table for each cluster can; a table for each bucket
of a random hash of users cannot, because every bucket holds all clusters. `reference_scores` measures all of these by
counting, without a network.
"""

from __future__ import annotations

import numpy as np

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.splits import generators
from moe_lab.datasets.two_task import rated_and_not, sample_negatives, split_rows


def _centred_tastes(n_clusters: int, n_topics: int, rng: np.random.Generator) -> np.ndarray:
    taste = rng.standard_normal((n_clusters, n_topics))
    return taste - taste.mean(axis=0)


def planted_recommender(
    seed: int = 0,
    *,
    n_users: int = 800,
    n_items: int = 400,
    n_clusters: int = 8,
    n_topics: int = 8,
    items_per_user: int = 40,
    popularity_skew: float = 1.0,
    taste: float = 1.5,
    noise: float = 0.5,
) -> Dataset:
    """Build the planted recommender; see the module's text for the symbols.

    Args:
        items_per_user: mean number of positives per user (a skewed distribution, at least 5, at most n_items / 2).
        taste: how strongly taste decides what is watched; 0 leaves popularity alone.
        noise: standard deviation of a rating around its expectation, in stars.

    Returns:
        kind "recommender" with ``expert`` = cluster of the user, for every row; info has ``taste_log_odds`` (n_users,
        n_items) float32, the exact log odds (up to a constant per user) of watching.
    """
    if min(n_users, n_items, n_clusters, n_topics, items_per_user) < 1 or n_items < 10:
        raise ValueError("n_users, n_clusters, n_topics, items_per_user must be at least 1 and n_items at least 10")
    plan, watch, rate, negative, split = generators(seed, 5)
    cluster = plan.integers(n_clusters, size=n_users)
    topic = plan.integers(n_topics, size=n_items)
    watch_taste = _centred_tastes(n_clusters, n_topics, plan)
    rating_taste = _centred_tastes(n_clusters, n_topics, plan)
    quality = 0.4 * plan.standard_normal(n_items)
    log_popularity = -popularity_skew * np.log(10.0 + plan.permutation(n_items))

    log_odds = log_popularity + taste * watch_taste[cluster][:, topic]
    # The top entries of log odds + Gumbel noise are a draw without replacement with those odds.
    ranking = np.argsort(-(log_odds + watch.gumbel(size=log_odds.shape)), axis=1)
    lognormal = np.exp(0.5 * watch.standard_normal(n_users) - 0.125)  # mean 1
    n_watched = np.clip(np.round(items_per_user * lognormal), min(5, n_items // 2), n_items // 2).astype(int)
    user = np.repeat(np.arange(n_users), n_watched)
    item = np.concatenate([ranking[u, :n] for u, n in enumerate(n_watched)])
    expected = 3.5 + quality[item] + 0.9 * rating_taste[cluster[user], topic[item]]
    rating = np.clip(np.round(expected + noise * rate.standard_normal(len(item))), 1, 5)

    rows = rated_and_not(user, item, rating, *sample_negatives(user, item, n_users, n_items, negative))
    rows["expert"] = cluster[rows["user"]]
    info = {
        "n_users": n_users,
        "n_items": n_items,
        "rating_range": (1, 5),
        "n_experts": n_clusters,
        "taste_log_odds": log_odds.astype(np.float32),
        "planted": "expert = cluster of the user; tastes differ between clusters, popularity does not",
    }
    return split_rows("planted-recommender", rows, split, info)


def reference_scores(data: Dataset, n_buckets: int | None = None, seed: int = 0) -> dict[str, float]:
    """Test AUC of "watched" that simple tables reach on planted data, without any training.

    A table scores an item by the log of (watched + 1) / (unwatched + 1) among the training rows it is given.

    Returns:
        popularity: one table. planted: one table per planted cluster. hash: one table per bucket of a random hash of
        users (as many buckets as clusters unless said otherwise). oracle: the odds the watches were drawn from.
    """
    from sklearn.metrics import roc_auc_score

    n_items, n_experts = data.info["n_items"], data.info["n_experts"]
    bucket_of_user = np.random.default_rng(seed).integers(n_buckets or n_experts, size=data.info["n_users"])
    train, test = ({key: array.numpy() for key, array in split.items()} for split in (data.train, data.test))

    def table_auc(train_group: np.ndarray, test_group: np.ndarray) -> float:
        counts = np.ones((2, train_group.max() + 1, n_items))
        np.add.at(counts, (train["watched"].astype(int), train_group, train["item"]), 1)
        score = np.log(counts[1] / counts[0])
        return float(roc_auc_score(test["watched"], score[test_group, test["item"]]))

    return {
        "popularity": table_auc(np.zeros_like(train["item"]), np.zeros_like(test["item"])),
        "hash": table_auc(bucket_of_user[train["user"]], bucket_of_user[test["user"]]),
        "planted": table_auc(train["expert"], test["expert"]),
        "oracle": float(roc_auc_score(test["watched"], data.info["taste_log_odds"][test["user"], test["item"]])),
    }
