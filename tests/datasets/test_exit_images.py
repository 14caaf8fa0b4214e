"""Images for early exits: sources stay in their split and part; difficulty is what it says."""

import pytest
import torch

from moe_lab.datasets import load


@pytest.mark.parametrize("name", ["moved-digits", "planted-difficulty"])
def test_images_are_standardised_by_the_training_images(name):
    data = load(name, n_train=900, n_valid=300, n_test=300)
    assert data.kind == "images" and data.sizes == {"train": 900, "valid": 300, "test": 300}
    assert data.train["image"].mean().abs() < 1e-5 and data.train["image"].std().item() == pytest.approx(1)
    assert set(data.valid["part"].tolist()) == {0, 1, 2}
    assert set(data.train["label"].tolist()) == set(range(10))
    assert (data.info["title"], data.info["flip"]) == (name.replace("-", " "), False)
    assert 0 < data.info["mean"][0] < 0.5 and data.info["std"][0] > 0


def test_parts_share_no_source_digit():
    # without noise and at one contrast, images of one source are equal: compare across parts
    data = load("planted-difficulty", n_train=30, n_valid=1200, n_test=30)
    easy = data.valid["difficulty"] == 0
    images, part = data.valid["image"][easy].flatten(1), data.valid["part"][easy]
    nearest_other = torch.cdist(images[part == 0], images[part != 0]).min(1).values
    nearest_own = torch.cdist(images[part == 0], images[part == 0]).fill_diagonal_(torch.inf).min(1).values
    assert nearest_other.median() > nearest_own.median()  # the same source again only within a part


def test_difficult_images_are_further_from_their_class():
    data = load("planted-difficulty", n_train=4000, n_valid=30, n_test=30)
    images, label, difficulty = (data.train[key] for key in ("image", "label", "difficulty"))
    means = torch.stack([images[label == k].mean(0) for k in range(10)])
    distance = (images - means[label]).flatten(1).norm(dim=1)
    by_level = [distance[difficulty == level].mean().item() for level in range(4)]
    assert by_level == sorted(by_level) and by_level[3] > 1.3 * by_level[0]
    nearest = torch.cdist(images.flatten(1), means.flatten(1)).argmin(1)
    right = [(nearest == label)[difficulty == level].double().mean().item() for level in range(4)]
    assert right == sorted(right, reverse=True) and right[0] > 0.85 > right[3]


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="at least 3 images"):
        load("moved-digits", n_train=30, n_valid=2, n_test=30)
