"""What is planted is what leaves, where it was asked for."""

import pytest
import torch

from moe_lab.bench.gpu_exits_planted import TINY, PlantedNetwork, Size, rho_of
from moe_lab.exits.policies import geometric_shares


@pytest.fixture(scope="module")
def tiny():
    return PlantedNetwork(TINY, 2.05, "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_leave_where_it_is_written_also_in_bfloat16(dtype):
    planted = PlantedNetwork(Size(layers=8, width=256, side=16), 2.05, "cpu", dtype)
    images, exits = planted.images(64, seed=3)
    assert len(exits.unique()) == 8 and images.dtype == dtype
    masked, early = planted.network.predict_masked(images), planted.network.predict(images)
    assert torch.equal(masked.exits, exits) and torch.equal(early.exits, exits)
    _, gate_logits = planted.network(images)
    assert gate_logits.abs().min() > 10  # far from every threshold
    assert len(masked.labels.unique()) > 3  # answers depend on the image


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_class_token_begins_with_the_exit_1_and_0_and_no_other_token_has_the_planted_pixel(dtype):
    planted = PlantedNetwork(TINY, 2.05, "cpu", dtype)
    images, exits = planted.images(30, seed=2)
    h = planted.network.stem(images)
    assert torch.equal(h[:, 0, 0], exits.to(dtype)) and (h[:, 0, 1] == 1).all() and not h[:, 0, 2].any()
    assert (h[0, 0, 3:] == h[:, 0, 3:]).all() and h[:, 0, 3:].any()
    images[:, 0, 0, 0] += 1
    changed = planted.network.stem(images)
    assert torch.equal(changed[:, 0, 0], h[:, 0, 0] + 1)
    assert torch.equal(changed[..., 1:], h[..., 1:])


def test_exits_cost_what_was_asked_for(tiny):
    _, exits = tiny.images(20000, seed=0)
    assert float((tiny.shares * tiny.network.costs).sum()) == pytest.approx(1 / 2.05, rel=1e-3)
    assert float(tiny.network.costs[exits].mean()) == pytest.approx(1 / 2.05, rel=0.02)
    assert tiny.network.costs.dtype == torch.float64  # in bfloat16 a ratio would have two digits


def test_rho_is_found_and_an_impossible_ratio_is_refused():
    costs = torch.tensor([0.25, 0.5, 1.0])
    assert rho_of(1 / float((geometric_shares(0.7, 3) * costs).sum()), costs) == pytest.approx(0.7, rel=1e-3)
    for ratio in (0.9, 4.5):
        with pytest.raises(ValueError, match="between 1 and 4"):
            rho_of(ratio, costs)


def test_the_full_network_has_the_last_exit_s_answers(tiny):
    images, _ = tiny.images(9, seed=1)
    torch.testing.assert_close(tiny.full(images), tiny.network(images)[0][:, -1])
