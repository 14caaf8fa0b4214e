"""Lazy and dense embedding updates: what each means, against torch's own optimisers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_lab.models.optim import LazyAdam, recommender_adam


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(6, 3, dtype=torch.float64)
        self.layer = nn.Linear(3, 1, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(generator=generator)


def train(model, optimizer, batches):
    for rows in batches:
        optimizer.zero_grad()
        model.layer(model.table(torch.tensor(rows))).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


EVERY_ROW = [[0, 1, 2, 3, 4, 5, 2], [5, 4, 3, 2, 1, 0, 0]] * 4  # repeated rows: gradients add up
SOME_ROWS = [[0, 1, 1], [2], [0, 2, 2], [5, 0]]


def test_dense_updates_are_torch_s_adam():
    expected, got = Tiny(), Tiny()
    first = train(expected, torch.optim.Adam(expected.parameters(), lr=0.1, eps=1e-7), SOME_ROWS)
    assert_equal(first, train(got, recommender_adam(got, 0.1), SOME_ROWS))


def test_lazy_updates_equal_dense_ones_when_every_row_is_in_every_batch():
    dense, lazy = Tiny(), Tiny()
    first = train(dense, recommender_adam(dense, 0.1), EVERY_ROW)
    assert_equal(first, train(lazy, recommender_adam(lazy, 0.1, embedding_updates="lazy"), EVERY_ROW))


def test_lazy_updates_are_torch_s_sparse_adam_on_the_table_and_adam_elsewhere():
    expected, got = Tiny(), Tiny()
    expected.table.sparse = True
    eps = 1e-14  # SparseAdam adds it before the correction for bias, Adam behind
    tables = torch.optim.SparseAdam([expected.table.weight], lr=0.1, eps=eps)
    rest = torch.optim.Adam(expected.layer.parameters(), lr=0.1, eps=eps)
    for rows in SOME_ROWS:
        tables.zero_grad()
        rest.zero_grad()
        expected.layer(expected.table(torch.tensor(rows))).square().mean().backward()
        tables.step()
        rest.step()
    optimizer = recommender_adam(got, 0.1, embedding_updates="lazy", eps=eps)
    assert_equal([p.detach() for p in expected.parameters()], train(got, optimizer, SOME_ROWS))


def test_a_row_that_is_absent_moves_with_dense_updates_and_rests_with_lazy_ones():
    for updates, rests in (("dense", False), ("lazy", True)):
        model = Tiny()
        optimizer = recommender_adam(model, 0.1, embedding_updates=updates)
        train(model, optimizer, [[3, 0]])
        before = model.table.weight[3].clone()
        train(model, optimizer, [[0, 1]])
        assert torch.equal(model.table.weight[3], before) == rests
        assert torch.equal(model.table.weight[5], Tiny().table.weight[5])  # never seen: no momentum either


def test_lazy_optimiser_goes_on_where_its_state_was_saved():
    straight, broken = Tiny(), Tiny()
    expected = train(straight, recommender_adam(straight, 0.1, embedding_updates="lazy"), SOME_ROWS * 2)
    first = recommender_adam(broken, 0.1, embedding_updates="lazy")
    train(broken, first, SOME_ROWS)
    second = recommender_adam(broken, 0.5, embedding_updates="lazy")
    second.load_state_dict(first.state_dict())
    for a, b in zip(expected, train(broken, second, SOME_ROWS), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_left_for_others_to_look_at():
    model = Tiny()
    optimizer = recommender_adam(model, 0.1, embedding_updates="lazy")
    assert isinstance(optimizer, LazyAdam)
    model.layer(model.table(torch.tensor([1, 1]))).sum().backward()
    optimizer.step()
    assert model.table.weight.grad.is_sparse
    optimizer.zero_grad()
    assert model.table.weight.grad is None


def test_unknown_updates_are_refused():
    with pytest.raises(ValueError, match="'dense' or 'lazy'"):
        recommender_adam(Tiny(), 0.1, embedding_updates="sparse")
