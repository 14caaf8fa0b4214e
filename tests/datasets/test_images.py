"""Two images in one, and the embedded digits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.datasets import load
from moe_lab.datasets.digits import enlarged_digits, street_view
from moe_lab.datasets.multi_image import draw_partners, multi_image, offset_for, overlay


def test_each_pixel_is_the_sum_of_its_two_sources():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 5, 28, 28)).astype(np.uint8)
    canvas = overlay(first, second, 8)
    assert canvas.shape == (5, 36, 36)
    assert canvas.dtype == np.int16
    for row, column in [(0, 0), (7, 20), (8, 8), (20, 9), (27, 27), (28, 30), (35, 35), (3, 35)]:
        expected = np.zeros(5, dtype=int)
        if row < 28 and column < 28:
            expected += first[:, row, column]
        if row >= 8 and column >= 8:
            expected += second[:, row - 8, column - 8]
        assert canvas[:, row, column].tolist() == expected.tolist()


def test_bright_on_bright_is_not_clipped():
    white = np.full((1, 28, 28), 255, dtype=np.uint8)
    assert overlay(white, white, 8).max() == 510


def test_canvas_is_in_proportion_to_the_digits():
    assert [size + offset_for(size) for size in (28, 14, 16, 8)] == [36, 18, 21, 10]


@given(n=st.integers(2, 30), data=st.data())
def test_partners_are_distinct_others_of_the_same_split(n, data):
    partners = data.draw(st.integers(1, n - 1))
    first, second = draw_partners(n, partners, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert first.tolist() == np.repeat(np.arange(n), partners).tolist()
    assert not (first == second).any()
    assert len(set(zip(first, second, strict=True))) == n * partners
    assert second.min() >= 0 and second.max() < n


def test_every_other_image_is_an_equally_likely_partner_the_last_one_too():
    counts = np.zeros((4, 4), dtype=int)
    for seed in range(3000):
        np.add.at(counts, draw_partners(4, 2, np.random.default_rng(seed)), 1)
    off_diagonal = counts[~np.eye(4, dtype=bool)]
    assert np.diag(counts).tolist() == [0, 0, 0, 0]
    assert np.abs(off_diagonal - 2000).max() < 130  # 2 of 3 partners in 3,000 draws; standard deviation 26


def test_too_many_partners_are_refused():
    with pytest.raises(ValueError, match="between 1 and 3"):
        draw_partners(4, 4, np.random.default_rng(0))


def marked(start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n images, each of one grey level of its own; class = level mod 10."""
    level = np.arange(start, start + n)
    return np.broadcast_to(level[:, None, None], (n, 7, 7)).astype(np.uint8), level % 10


def test_no_source_image_is_in_two_splits_and_labels_belong_to_positions():
    data = multi_image(
        "x", marked(0, 60), marked(60, 20), 10, seed=0, partners=2, n_train=None, n_valid=None, n_test=None
    )
    assert data.sizes == {"train": 100, "valid": 20, "test": 40}
    sources = {}
    for name, split in data.splits.items():
        top_left, bottom_right = split["image"][:, 0, 0, 0], split["image"][:, 0, -1, -1]  # corners without overlap
        assert torch.equal(torch.stack((top_left, bottom_right), 1) % 10, split["labels"])
        sources[name] = set(top_left.tolist())
        assert set(bottom_right.tolist()) <= sources[name]
    assert sources["test"] == set(range(60, 80))
    assert not sources["train"] & sources["valid"]
    assert sources["train"] | sources["valid"] == set(range(60))
    classes = np.bincount(np.array(sorted(sources["valid"])) % 10)
    assert classes.tolist() == [1] * 10  # stratified


def test_multidigits_have_the_stated_sizes_and_no_shared_source():
    data = load("multidigits")
    assert data.sizes == {"train": 7698, "valid": 1542, "test": 1542}
    assert data.train["image"].shape[1:] == (1, 21, 21)
    assert data.train["image"].dtype == torch.int16
    assert 255 < data.train["image"].max() <= 510
    corner = [{image[0, :5, :].numpy().tobytes() for image in split["image"]} for split in data.splits.values()]
    assert len(corner[0] & corner[2]) <= 1  # rows above the offset show the first digit only; blank ones may coincide


def test_smaller_sizes_are_a_subset_of_the_whole():
    whole, part = load("multidigits", seed=2), load("multidigits", seed=2, n_train=100, n_test=50)
    assert part.sizes == {"train": 100, "valid": 1542, "test": 50}
    assert torch.equal(part.train["image"], whole.train["image"][:100])


def test_enlarged_digits_keep_range_and_mean():
    from sklearn.datasets import load_digits

    images, labels = enlarged_digits(16)
    original = load_digits()
    assert images.dtype == np.uint8 and images.max() == 255 and images.min() == 0
    assert labels.tolist() == original.target.tolist()
    assert images.mean() == pytest.approx(original.images.mean() / 16 * 255, rel=0.01)
    with pytest.raises(ValueError, match="8 or more"):
        enlarged_digits(7)


def test_the_domain_says_nothing_about_the_digit_and_is_the_expert():
    data = load("digits-mixture")
    assert data.sizes == {"train": 2566, "valid": 514, "test": 514}
    for split in data.splits.values():
        assert torch.equal(split["domain"], split["expert"])
        table = torch.bincount(split["labels"][:, 0] + 10 * split["domain"], minlength=20).reshape(2, 10)
        assert torch.equal(table[0], table[1])


def test_the_two_domains_can_be_told_apart_by_their_background():
    data = load("digits-mixture")
    border = data.test["image"][:, 0, :, 0].float().mean(dim=1)  # ink on paper leaves the left edge nearly black
    assert ((border > 30).long() == data.test["domain"]).float().mean() > 0.9


def test_street_view_uses_both_polarities_and_keeps_the_digit_visible():
    images, _ = enlarged_digits(16)
    scene = street_view(images[:300], np.random.default_rng(0)).astype(float)
    ink = images[:300] > 200
    contrast = np.array([s[i].mean() - s[~i].mean() for s, i in zip(scene, ink, strict=True)])
    assert (np.abs(contrast) > 20).mean() > 0.95
    assert 0.35 < (contrast > 0).mean() < 0.65
