"""Routing statistics gathered in pieces equal those of the whole."""

import pytest
import torch

from moe_lab.gates import CometGate
from moe_lab.metrics.routing import RoutingTally
from moe_lab.routing import Routing


def _tally(routings, k=2):
    tally = RoutingTally(k)
    for routing in routings:
        tally.add(routing)
    return tally.summary()


def test_three_rows_by_hand():
    weights = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0]])
    summary = _tally([Routing(weights)])
    assert summary["experts_mean"] == pytest.approx(2)  # (1 + 2 + 3) / 3
    assert summary["experts_max"] == 3
    assert summary["within_k"] == pytest.approx(2 / 3)
    assert summary["histogram"] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])
    assert summary["load"] == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])
    assert summary["importance"] == pytest.approx([1.7 / 3, 0.8 / 3, 0.5 / 3, 0])
    assert summary["used"] == 3
    assert summary["mass_error"] == pytest.approx(0, abs=1e-6)
    assert "saturation" not in summary


def test_batches_add_up_to_the_whole():
    gate = CometGate(5, 6, 2, 0.5, generator=torch.Generator().manual_seed(0)).eval()
    x = 20 * torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, parts = _tally([gate(x)]), _tally([gate(x[:7]), gate(x[7:8]), gate(x[8:])])
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, abs=1e-6), name


def test_saturation_is_the_share_of_single_path_trees():
    leaves = torch.zeros(2, 3, 2)  # two tokens, three leaves, two trees
    leaves[0, 0, 0] = leaves[0, 1, 1] = leaves[1, 2, 0] = 1
    leaves[1, :2, 1] = 0.5  # the only undecided tree
    routing = Routing(leaves.mean(-1), details={"tree_probabilities": leaves})
    assert _tally([routing])["saturation"] == 3 / 4


def test_an_expert_with_less_than_a_tenth_of_its_share_is_not_used():
    weights = torch.tensor([[0.96, 0.04], [0.98, 0.02]])  # importance of expert 1: 0.03 < 0.1 / 2
    assert _tally([Routing(weights)])["used"] == 1


def test_an_empty_tally_says_that_nothing_was_added():
    with pytest.raises(ValueError, match="empty"):
        RoutingTally(2).summary()
