"""Batches: every row once per epoch, in an order that depends on (seed, epoch) only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.batches import Batches, StepBatches


@given(n=st.integers(1, 40), size=st.integers(1, 50), shuffle=st.booleans(), seed=st.integers(0, 2**40))
def test_an_epoch_holds_each_row_once_and_the_arrays_stay_together(n, size, shuffle, seed):
    rows = torch.arange(n)
    batches = Batches({"row": rows, "twice": torch.stack([rows, rows * 2], 1)}, size, shuffle, seed)
    got = list(batches.epoch(3))
    assert len(got) == len(batches)
    assert all(len(batch["row"]) == size for batch in got[:-1]) and 1 <= len(got[-1]["row"]) <= size
    assert torch.equal(torch.cat([batch["row"] for batch in got]).sort().values, rows)
    for batch in got:
        assert torch.equal(batch["twice"], torch.stack([batch["row"], batch["row"] * 2], 1))


@given(n=st.integers(1, 40), size=st.integers(1, 9), start=st.integers(0, 50), shuffle=st.booleans())
def test_starting_in_the_middle_gives_the_rest_of_the_same_epoch(n, size, start, shuffle):
    arrays = {"row": torch.arange(n)}
    whole = [batch["row"].tolist() for batch in Batches(arrays, size, shuffle, seed=4).epoch(2)]
    fresh = Batches(arrays, size, shuffle, seed=4)  # it never saw epochs 0 and 1
    assert [batch["row"].tolist() for batch in fresh.epoch(2, start=start)] == whole[start:]


def test_epochs_and_seeds_have_orders_of_their_own_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    arrays = {"row": torch.arange(100)}
    orders = {(s, e): tuple(Batches(arrays, 10, True, s).order(e).tolist()) for s in range(4) for e in range(4)}
    assert len(set(orders.values())) == 16  # in particular (0, 1) and (1, 0) differ
    assert torch.equal(torch.get_rng_state(), before)
    assert Batches(arrays, 10, shuffle=False).order(5).tolist() == list(range(100))


@pytest.mark.parametrize(
    ("arrays", "size", "seed", "message"),
    [
        ({}, 1, 0, "at least one array"),
        ({"a": torch.zeros(3), "b": torch.zeros(4)}, 1, 0, r"'a': 3, 'b': 4"),
        ({"a": torch.zeros(0)}, 1, 0, "no rows"),
        ({"a": torch.zeros(3)}, 0, 0, "batch_size must be at least 1, got 0"),
        ({"a": torch.zeros(3)}, 1, -1, "seed"),
    ],
)
def test_arrays_that_make_no_batches_are_refused(arrays, size, seed, message):
    with pytest.raises(ValueError, match=message):
        Batches(arrays, size, seed=seed)


@given(n=st.integers(1, 30), size=st.integers(1, 9), steps=st.integers(1, 12), seed=st.integers(0, 99))
def test_step_batches_are_the_stream_of_passes_cut_elsewhere(n, size, steps, seed):
    arrays = {"row": torch.arange(n)}
    passes, cut = Batches(arrays, size, True, seed), StepBatches(arrays, size, steps=steps, shuffle=True, seed=seed)
    stream = [batch["row"].tolist() for index in range(3 * steps) for batch in passes.epoch(index)]
    got = [batch["row"].tolist() for index in range(3) for batch in cut.epoch(index)]
    assert len(cut) == steps and got == stream[: 3 * steps]
    assert [batch["row"].tolist() for batch in cut.epoch(1, start=steps // 2)] == got[steps + steps // 2 : 2 * steps]


def test_other_data_of_the_same_shape_are_described_differently():
    describe = [Batches({"x": torch.tensor(values)}, 2).describe() for values in ([1.0, 2.0], [1.0, 2.5], [1.0, 2.0])]
    assert describe[0] != describe[1] and describe[0] == describe[2]
    for dtype in (torch.bool, torch.int16, torch.bfloat16):
        assert Batches({"x": torch.zeros(3, 2, dtype=dtype)}, 2).describe()["content"]["x"] >= 0
    assert StepBatches({"x": torch.zeros(3)}, 2, steps=4).describe()["steps"] == 4
    with pytest.raises(ValueError, match="steps must be at least 1"):
        StepBatches({"x": torch.zeros(3)}, 2, steps=0)
