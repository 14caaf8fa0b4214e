"""From published train and test images to three splits: who goes where, and how pixels become numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.datasets.labelled_images import (
    Pictures,
    channel_statistics,
    even_parts,
    labelled_images,
    standardised,
)

N_CLASSES = 5


def numbered(n: int, first: int = 0) -> Pictures:
    """n images (3, 2, 2); the red plane is the image's own number in base 200, green and blue are noise and grey."""
    number = first + np.arange(n)
    pixels = np.random.default_rng(first).integers(0, 256, (n, 3, 2, 2), dtype=np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 1, 1] = number // 200, number % 200
    return Pictures(number % N_CLASSES, pixels.__getitem__)


def numbers(data, split: str) -> list[int]:
    """The images' numbers, read back from the standardised pixels by the mean and std that the data set states."""
    red = (data.splits[split]["image"][:, 0].double() * data.info["std"][0] + data.info["mean"][0]) * 255
    whole = red.round().long()
    assert (red - whole).abs().max() < 1e-3
    return (200 * whole[:, 0, 0] + whole[:, 1, 1]).tolist()


def build(seed: int = 0, sizes=(None, 60, None), **options):
    return labelled_images(
        "x", numbered(500), numbered(100, first=500), seed=seed, sizes=sizes, n_classes=N_CLASSES, **options
    )


def counts(data, split: str) -> list[int]:
    return data.splits[split]["label"].bincount(minlength=N_CLASSES).tolist()


def test_splits_are_disjoint_stratified_and_complete_and_test_keeps_its_order():
    data = build(title="X", flip=False)
    assert data.sizes == {"train": 440, "valid": 60, "test": 100}
    train, valid = numbers(data, "train"), numbers(data, "valid")
    assert sorted(train + valid) == list(range(500))
    assert train != sorted(train)
    assert numbers(data, "test") == list(range(500, 600))
    assert counts(data, "valid") == [12] * 5 and counts(data, "train") == [88] * 5
    for split in data.splits:  # labels stay with their images
        assert data.splits[split]["label"].tolist() == [number % N_CLASSES for number in numbers(data, split)]
    assert (data.kind, data.info["title"], data.info["flip"]) == ("images", "X", False)
    assert (data.info["side"], data.info["channels"], data.info["n_classes"], data.info["scale"]) == (2, 3, 5, 1.0)


@given(st.lists(st.integers(0, 6), min_size=0, max_size=60), st.integers(0, 5))
def test_parts_are_even_in_all_and_in_every_class(labels, seed):
    labels = np.array(labels, dtype=np.int64)
    part = even_parts(labels, np.random.default_rng(seed))
    for chosen in (part, *(part[labels == c] for c in np.unique(labels))):
        sizes = np.bincount(chosen, minlength=3)
        assert len(sizes) == 3 and sizes.max() - sizes.min() <= 1


def test_every_row_can_be_in_every_part():
    labels = np.array([0, 0, 0, 1, 1, 2])
    drawn = np.stack([even_parts(labels, np.random.default_rng(seed)) for seed in range(100)])
    assert [set(column) for column in drawn.T.tolist()[:3]] == [{0, 1, 2}] * 3


def test_validation_has_three_parts_with_every_class_in_each():
    data = build()
    table = torch.bincount(data.valid["part"] * N_CLASSES + data.valid["label"], minlength=15)
    assert table.tolist() == [4] * 15


def test_the_training_images_have_mean_0_and_standard_deviation_1_per_channel():
    data = build(sizes=(100, 60, None))
    image = data.train["image"].double()
    assert image.mean((0, 2, 3)).abs().max() < 1e-6
    assert (image.square().mean((0, 2, 3)).sqrt() - 1).abs().max() < 1e-6
    assert numbers(data, "test") == list(range(500, 600))  # by the same mean and std, not by its own
    assert all(arrays["image"].dtype == torch.float32 for arrays in data.splits.values())


def test_statistics_agree_with_the_plain_formula_across_blocks(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 3, 4, 4), dtype=np.uint8)
    monkeypatch.setattr("moe_lab.datasets.labelled_images._BLOCK", 5)
    mean, std = channel_statistics(pixels)
    assert np.allclose(mean, (pixels / 255).mean(axis=(0, 2, 3)), rtol=1e-13)
    assert np.allclose(std, (pixels / 255).std(axis=(0, 2, 3)), rtol=1e-12)
    shuffled = channel_statistics(np.random.default_rng(1).permutation(pixels))
    assert (mean.tolist(), std.tolist()) == tuple(values.tolist() for values in shuffled)  # to the last bit


def test_a_channel_that_never_changes_becomes_0():
    pixels = np.full((4, 2, 2, 2), 9, dtype=np.uint8)
    pixels[:2, 1] = 200
    image = standardised(pixels, *channel_statistics(pixels))
    assert (image[:, 0] == 0).all()
    assert torch.allclose(image[:, 1].abs(), torch.ones(4, 2, 2))


def test_the_same_seed_gives_the_same_tensors_and_another_one_another_split():
    first, again, other = build(seed=1), build(seed=1), build(seed=2)
    for split, arrays in first.splits.items():
        assert all(torch.equal(array, again.splits[split][key]) for key, array in arrays.items())
    assert numbers(first, "valid") != numbers(other, "valid")
    assert torch.equal(first.test["label"], other.test["label"])


def test_smaller_sizes_are_stratified_subsets_and_leave_the_validation_as_it_is():
    whole, part = build(), build(sizes=(50, 60, 20))
    assert part.sizes == {"train": 50, "valid": 60, "test": 20}
    assert set(numbers(part, "train")) < set(numbers(whole, "train"))
    assert numbers(part, "valid") == numbers(whole, "valid")
    assert counts(part, "train") == [10] * 5 and counts(part, "test") == [4] * 5
    assert numbers(part, "test") == sorted(numbers(part, "test"))


def test_only_the_pixels_that_are_needed_are_read():
    read = []
    train = numbered(500)
    watched = Pictures(train.labels, lambda rows: (read.append(len(rows)), train.pixels(rows))[1])
    labelled_images("x", watched, numbered(100), seed=0, sizes=(40, 30, 5), n_classes=N_CLASSES)
    assert read == [40, 30]


def test_a_long_tail_thins_train_before_the_split_and_the_test_only_when_asked():
    data = build(imbalance=0.1)
    assert [a + b for a, b in zip(counts(data, "train"), counts(data, "valid"), strict=True)] == [100, 56, 31, 17, 10]
    shares = [
        valid / (valid + train) for valid, train in zip(counts(data, "valid"), counts(data, "train"), strict=True)
    ]
    assert max(shares) - min(shares) < 0.1  # 60 of 214, each class within one image of its share
    assert numbers(data, "test") == list(range(500, 600))
    same = build(imbalance=0.1, imbalanced_test=True)
    assert counts(same, "test") == [20, 11, 6, 3, 2]
    assert numbers(same, "test") == sorted(numbers(same, "test"))
    assert numbers(same, "train") == numbers(data, "train")


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((None, 2, None), "n_valid=2: must be at least 3"),
        ((None, 500, None), "leave some of 500"),
        ((0, 60, None), "n_train=0: must be between 1 and the 440"),
        ((441, 60, None), "n_train=441: must be between 1 and the 440"),
        ((None, 60, 101), "n_test=101: must be between 1 and the 100"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes, says):
    with pytest.raises(ValueError, match=says):
        build(sizes=sizes)


def test_labels_of_another_data_set_are_refused():
    with pytest.raises(ValueError, match=r"outside 0 \.\. 3"):
        labelled_images("x", numbered(50), numbered(10), seed=0, sizes=(None, 5, None), n_classes=4)
