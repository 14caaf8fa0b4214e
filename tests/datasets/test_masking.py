"""Hidden tokens: what is chosen, what stands there instead, and in the long run how often."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.datasets.masking import HIDDEN, IGNORE, REPLACED, masked
from moe_lab.datasets.tokens import MASK, SPECIAL

N_SPECIAL, V = len(SPECIAL), 45
BATCHES = st.tuples(
    st.integers(1, 6), st.integers(1, 12), st.sampled_from([1, 3, N_SPECIAL + 1, 20]), st.integers(0, 99)
)
"""Rows, length, how many ids there are at most (few: special ones only), seed."""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(rows, length, ids, seed):
    return torch.randint(ids, (rows, length), generator=seeded(seed))


@given(BATCHES, st.floats(0.01, 1.0), st.integers(0, 99))
def test_only_chosen_tokens_change_and_every_row_has_a_target_if_it_can(shape, share, seed):
    tokens = batch(*shape)
    before = tokens.clone()
    inputs, targets = masked(tokens, n_tokens=V, share=share, generator=seeded(seed))
    assert torch.equal(tokens, before) and inputs.dtype == targets.dtype == torch.int64
    chosen, real = targets != IGNORE, tokens >= N_SPECIAL
    assert torch.equal(targets[chosen], tokens[chosen]) and torch.equal(inputs[~chosen], tokens[~chosen])
    assert not (chosen & ~real).any()
    assert torch.equal(chosen.any(1), real.any(1))
    assert ((inputs[chosen] == MASK) | (inputs[chosen] >= N_SPECIAL)).all() and (inputs < V).all()
    again = masked(tokens, n_tokens=V, share=share, generator=seeded(seed))
    assert torch.equal(again[0], inputs) and torch.equal(again[1], targets)


@given(BATCHES, st.integers(0, 99))
def test_a_share_of_one_makes_every_real_token_a_target(shape, seed):
    tokens = batch(*shape)
    _, targets = masked(tokens, n_tokens=V, share=1.0, generator=seeded(seed))
    assert torch.equal(targets, torch.where(tokens >= N_SPECIAL, tokens, IGNORE))


@given(BATCHES, st.integers(0, 99))
def test_a_larger_share_keeps_the_targets_of_a_smaller_one(shape, seed):
    tokens = batch(*shape)
    few, many = (masked(tokens, n_tokens=V, share=s, generator=seeded(seed))[1] for s in (0.1, 0.5))
    assert torch.equal(many[few != IGNORE], few[few != IGNORE])


def test_a_tiny_share_leaves_one_target_per_row_anywhere_in_it():
    tokens = torch.full((8000, 4), 7)
    tokens[:, 3] = 0
    _, targets = masked(tokens, n_tokens=V, share=1e-9, generator=seeded())
    chosen = targets != IGNORE
    assert (chosen.sum(1) == 1).all()
    assert within(chosen[:, :3].float().mean(0), 1 / 3, 8000) and not chosen[:, 3].any()


def within(share, p, n):
    """Five standard deviations of a binomial share: a false alarm in two million."""
    return bool(((torch.as_tensor(share) - p).abs() <= 5 * (p * (1 - p) / n) ** 0.5).all())


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_shares_are_those_of_the_paper(share):
    tokens = batch(1000, 200, V, 1)
    inputs, targets = masked(tokens, n_tokens=V, share=share, generator=seeded(2))
    chosen, real = targets != IGNORE, tokens >= N_SPECIAL
    n, n_real = int(chosen.sum()), int(real.sum())
    assert within(n / n_real, share, n_real)
    hidden, same = inputs[chosen] == MASK, inputs[chosen] == targets[chosen]
    equal_by_chance = REPLACED / (V - N_SPECIAL)
    assert within(hidden.float().mean(), HIDDEN, n)
    assert within(same.float().mean(), 1 - HIDDEN - REPLACED + equal_by_chance, n)
    others = inputs[chosen][~hidden & ~same]
    assert within(len(others) / n, REPLACED - equal_by_chance, n)
    frequency = torch.bincount(others, minlength=V) / len(others)
    assert (frequency[:N_SPECIAL] == 0).all()
    assert within(frequency[N_SPECIAL:], 1 / (V - N_SPECIAL), len(others))
    assert within(chosen.sum(0) / real.sum(0), share, int(real.sum(0).min()))  # no position is preferred


def test_short_rows_have_more_hidden_by_the_formula_of_the_docstring():
    n, rows, share = 3, 20_000, 0.15
    _, targets = masked(torch.full((rows, n), 9), n_tokens=V, share=share, generator=seeded())
    p = share + (1 - share) ** n / n
    assert within((targets != IGNORE).float().mean(), p, rows)  # of rows, not tokens: those of one row are dependent


def test_the_generator_advances_by_the_shape_alone():
    generators = seeded(), seeded()
    masked(batch(4, 6, V, 0), n_tokens=V, share=0.15, generator=generators[0])
    masked(torch.zeros(4, 6, dtype=torch.int64), n_tokens=9, share=0.9, generator=generators[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    state = torch.random.get_rng_state()
    first = masked(batch(4, 6, V, 0), n_tokens=V, generator=generators[0])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(first[1], masked(batch(4, 6, V, 0), n_tokens=V, generator=generators[0])[1])


def test_no_rows_stay_no_rows():
    inputs, targets = masked(torch.zeros(0, 4, dtype=torch.int64), n_tokens=V, generator=seeded())
    assert inputs.shape == targets.shape == (0, 4)


def test_mistakes_are_explained():
    tokens = batch(2, 3, V, 0)
    for share in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="share"):
            masked(tokens, n_tokens=V, share=share, generator=seeded())
    with pytest.raises(ValueError, match="special"):
        masked(tokens, n_tokens=N_SPECIAL, generator=seeded())
    for wrong in (tokens[0], tokens[:, :0]):
        with pytest.raises(ValueError, match="one token or more"):
            masked(wrong, n_tokens=V, generator=seeded())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_generator_gives_the_same_masks_on_both_devices():
    tokens = batch(20, 30, V, 0)
    for device in ("cpu", "cuda"):
        here, there = (
            masked(t, n_tokens=V, generator=torch.Generator(device).manual_seed(4)) for t in (tokens, tokens.cuda())
        )
        assert there[0].is_cuda and not here[0].is_cuda
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
