"""CIFAR-10 and CIFAR-100, whole and long-tailed, for networks with exits (JEI-DNN, section 7: 5,000, 10,000 and 1,000
validation images).

    cifar-10       45,000 / 5,000 / 10,000       cifar-10-lt    11,406 / 1,000 / 10,000
    cifar-100      40,000 / 10,000 / 10,000      cifar-100-lt    9,847 / 1,000 / 10,000

Long-tailed: the *training* images are thinned by `moe_lab.datasets.long_tail`, then validation is taken from them,
stratified: a class of 5 images may have none there. ``test="balanced"`` (the usual one) keeps all test images;
``test="same_profile"`` thins them in the same way, as JEI-DNN does (100 down to 1 image per class of CIFAR-100, 2,131
in all). On the second, accuracy is mostly that on frequent classes and so higher: the two must not be compared, and
``info["title"]`` says which it is. Validation images are not exchangeable with a balanced test set: what is calibrated
on them (thresholds, prediction sets) keeps its promise on frequent classes only.

CIFAR-10 may come from a lossy copy, see `moe_lab.datasets.cifar_files`; the title says that too.
"""

from __future__ import annotations

from moe_lab.datasets.base import Dataset
from moe_lab.datasets.cifar_files import read_cifar
from moe_lab.datasets.labelled_images import labelled_images
from moe_lab.names import check_name

TESTS = ("balanced", "same_profile")
Sizes = tuple[int | None, int, int | None]  # train, validation, test


def _cifar(
    source: str, title: str, seed: int, sizes: Sizes, imbalance: float | None = None, test: str = "balanced"
) -> Dataset:
    check_name(f"test set of {source}-lt", test, TESTS)
    files = read_cifar(source)
    same_profile = test == "same_profile"
    notes = [files.lossy] * bool(files.lossy) + ["long-tailed test"] * same_profile
    return labelled_images(
        source if imbalance is None else f"{source}-lt",
        files.train,
        files.test,
        seed=seed,
        sizes=sizes,
        n_classes=len(files.class_names),
        imbalance=imbalance,
        imbalanced_test=same_profile,
        title=f"{title} ({', '.join(notes)})" if notes else title,
        flip=True,
        class_names=files.class_names,
    )


def cifar_10(seed: int = 0, *, n_train: int | None = None, n_valid: int = 5000, n_test: int | None = None) -> Dataset:
    """CIFAR-10: colour photographs (N, 3, 32, 32) of 10 classes, equally many of each."""
    return _cifar("cifar-10", "CIFAR-10", seed, (n_train, n_valid, n_test))


def cifar_100(
    seed: int = 0, *, n_train: int | None = None, n_valid: int = 10_000, n_test: int | None = None
) -> Dataset:
    """CIFAR-100: colour photographs (N, 3, 32, 32) of 100 classes (the fine labels), equally many of each."""
    return _cifar("cifar-100", "CIFAR-100", seed, (n_train, n_valid, n_test))


def cifar_10_lt(
    seed: int = 0,
    *,
    imbalance: float = 0.01,
    test: str = "balanced",
    n_train: int | None = None,
    n_valid: int = 1000,
    n_test: int | None = None,
) -> Dataset:
    """CIFAR-10 with 5,000 training images of the first class down to 50 of the last.

    Args:
        seed: of the images kept, and of all that `cifar_10` draws.
        imbalance: images of the last class per image of the first, in (0, 1].
        test: "balanced" or "same_profile".
        n_train, n_valid, n_test: images; None takes all that are left.
    """
    return _cifar("cifar-10", "CIFAR-10-LT", seed, (n_train, n_valid, n_test), imbalance, test)


def cifar_100_lt(
    seed: int = 0,
    *,
    imbalance: float = 0.01,
    test: str = "balanced",
    n_train: int | None = None,
    n_valid: int = 1000,
    n_test: int | None = None,
) -> Dataset:
    """CIFAR-100 with 500 training images of the first class down to 5 of the last; arguments of `cifar_10_lt`."""
    return _cifar("cifar-100", "CIFAR-100-LT", seed, (n_train, n_valid, n_test), imbalance, test)
