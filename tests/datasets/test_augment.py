"""Shifts and mirror images of a batch: exact copies of pixels, every one equally likely."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.datasets.augment import crop_and_flip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(image: torch.Tensor, down: int, right: int, mirrored: bool) -> torch.Tensor:
    """The slow version, pixel by pixel: what is `down` and `right` of each place, 0 outside; then mirrored."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            if 0 <= i + down < height and 0 <= j + right < width:
                out[:, i, j] = image[:, i + down, j + right]
    return out.flip(2) if mirrored else out


def variants(image: torch.Tensor, pad: int, flip: bool) -> dict[tuple[int, int, bool], torch.Tensor]:
    steps = range(-pad, pad + 1)
    return {
        (i, j, m): moved(image, i, j, m) for i in steps for j in steps for m in ((False, True) if flip else (False,))
    }


@pytest.mark.parametrize(("shape", "pad", "flip"), [((2, 5, 4), 2, True), ((1, 3, 6), 1, False), ((3, 2, 2), 0, True)])
def test_every_output_is_a_shifted_or_mirrored_copy_of_its_own_input(shape, pad, flip):
    images = 1 + torch.arange(20 * shape[0] * shape[1] * shape[2]).reshape(20, *shape).float()  # no pixel twice
    out = crop_and_flip(images, generator(), pad=pad, flip=flip)
    assert out.shape == images.shape
    for image, result in zip(images, out, strict=True):
        assert sum(torch.equal(result, variant) for variant in variants(image, pad, flip).values()) == 1


@pytest.mark.parametrize(("pad", "flip", "n_variants"), [(1, True, 18), (2, False, 25)])
def test_all_shifts_and_mirror_images_occur_about_equally_often(pad, flip, n_variants):
    image = 1 + torch.arange(25.0).reshape(1, 5, 5)
    out = crop_and_flip(image.expand(9000, 1, 5, 5), generator(), pad=pad, flip=flip)
    kinds = torch.stack(list(variants(image, pad, flip).values()))
    counts = (out[:, None] == kinds).flatten(2).all(2).sum(0)
    assert len(counts) == n_variants and counts.sum() == 9000
    expected = 9000 / n_variants
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_shifts_of_rows_columns_and_mirror_images_are_independent():
    image = 1 + torch.arange(9.0).reshape(1, 3, 3)
    out = crop_and_flip(image.expand(8000, 1, 3, 3), generator(), pad=1)
    kinds = variants(image, 1, True)
    which = (out[:, None] == torch.stack(list(kinds.values()))).flatten(2).all(2).float().argmax(1)
    factors = torch.tensor([[float(part) for part in key] for key in kinds])[which]
    correlation = torch.corrcoef(factors.T)
    assert (correlation - torch.eye(3)).abs().max() < 5 / 8000**0.5


@given(n=st.integers(0, 3), channels=st.integers(1, 2), height=st.integers(1, 5), width=st.integers(1, 5))
def test_without_pad_and_flip_nothing_changes_and_the_result_is_a_copy(n, channels, height, width):
    images = torch.randn(n, channels, height, width)
    out = crop_and_flip(images, generator(), pad=0, flip=False)
    assert torch.equal(out, images)
    out.zero_()
    assert n == 0 or not torch.equal(out, images)


def test_the_generator_decides_and_no_other_state_is_used():
    images = torch.randn(50, 3, 8, 8)
    state = torch.get_rng_state()
    first = crop_and_flip(images, generator(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(first, crop_and_flip(images, generator(3)))
    assert not torch.equal(first, crop_and_flip(images, generator(4)))
    one = generator(3)
    assert not torch.equal(crop_and_flip(images, one), crop_and_flip(images, one))  # it goes on


def test_whole_numbers_stay_whole_numbers():
    images = torch.randint(256, (4, 3, 6, 6), dtype=torch.uint8)
    out = crop_and_flip(images, generator(), pad=2)
    assert out.dtype == torch.uint8
    assert torch.equal(out.float(), crop_and_flip(images.float(), generator(), pad=2))


@pytest.mark.parametrize(
    ("shape", "pad", "says"),
    [((3, 8, 8), 4, r"\(N, C, H, W\)"), ((1, 1, 8, 4), 4, "between 0 and 3"), ((1, 1, 8, 8), -1, "between 0 and 7")],
)
def test_what_is_no_batch_or_no_pad_is_refused(shape, pad, says):
    with pytest.raises(ValueError, match=says):
        crop_and_flip(torch.zeros(shape), generator(), pad=pad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_generator_of_the_processor_gives_the_same_crops_on_another_device():
    images = torch.randn(64, 3, 32, 32)
    out = crop_and_flip(images.cuda(), generator())
    assert out.is_cuda and torch.equal(out.cpu(), crop_and_flip(images, generator()))
    own = torch.Generator(device="cuda").manual_seed(0)
    assert crop_and_flip(images.cuda(), own).is_cuda
