"""The dense-to-sparse gate: limits, thresholds, phases, noise, gradients, each from the specification or by hand."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.experts import MLPExperts, MoE
from moe_lab.gates import DenseToSparseGate, TemperatureSchedule
from moe_lab.gates.dense_to_sparse import gumbel_like

D, E = 6, 8


def make(n_experts=E, seed=0, scale=1.0, tau=1.0, steps=0, **options):
    schedule = options.pop("schedule", TemperatureSchedule(tau, tau, 1, "constant"))
    gate = DenseToSparseGate(D, n_experts, schedule, **options)
    with torch.no_grad():
        gate.logits.weight.normal_(0, scale, generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        gate.advance()
    return gate


def tokens(n=64, seed=1, dtype=torch.float32):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_at_a_high_temperature_everybody_runs_and_q_weights_are_uniform():
    routing = make(tau=1e6, weights_from="gumbel")(tokens())
    assert (routing.experts_per_token == E).all()
    assert torch.allclose(routing.weights, torch.full((64, E), 1 / E), atol=1e-4)
    by_p = make(tau=1e6)(tokens())
    assert torch.allclose(by_p.weights, make().logits(tokens()).softmax(-1))


def test_at_a_low_temperature_one_runs_that_of_the_largest_noisy_logit():
    gate, x = make(tau=1e-4), tokens()
    routing = gate(x, generator=generator(3))
    noisy = gate.logits(x) + gumbel_like(gate.logits(x), generator(3))
    assert (routing.experts_per_token == 1).all()
    assert torch.equal(routing.weights.argmax(1), noisy.argmax(1))


@given(seed=st.integers(0, 500), c=st.floats(0, 1 / E - 1e-3), tau=st.floats(0.2, 5), up=st.floats(1.01, 4))
def test_experts_per_token_fall_with_the_threshold_and_rise_with_the_temperature(seed, c, tau, up):
    x = tokens(16, seed)

    def count(threshold, temperature):
        gate = make(seed=seed, tau=temperature, threshold=threshold)
        return gate(x, generator=generator(seed)).experts_per_token

    assert (count(c, tau) >= 1).all() and (count(c, tau) <= E).all()
    assert (count(min(c * up, 0.99), tau) <= count(c, tau)).all()
    assert (count(c, tau * up) >= count(c, tau)).all()  # for c < 1/E only (specification, 9.3.5)


def test_threshold_zero_keeps_everybody_and_the_best_expert_always_stays():
    assert (make(threshold=0.0)(tokens()).experts_per_token == E).all()
    strict = make(threshold=0.99, tau=5.0)(tokens())  # nobody passes on merit
    assert (strict.experts_per_token == 1).all()


@given(seed=st.integers(0, 300), tau=st.floats(0.3, 3))
def test_the_mask_is_monotone_in_q_and_ignores_a_constant_added_to_all_logits(seed, tau):
    gate, x = make(seed=seed, tau=tau, threshold=0.05, weights_from="gumbel"), tokens(16, seed)
    routing = gate(x, generator=generator(seed))
    q, active = routing.details["scores"], routing.active
    least_kept = torch.where(active, q, torch.inf).amin(1, keepdim=True)
    assert (active == (q >= least_kept)).all()
    with torch.no_grad():
        gate.logits.bias.add_(7.0)
    assert torch.allclose(gate(x, generator=generator(seed)).weights, routing.weights, atol=1e-5)


def test_permuting_experts_permutes_columns():
    order, x = torch.tensor([3, 0, 2, 1, 7, 6, 5, 4]), tokens()
    gate = make(noise="never", threshold=0.05)
    other = copy.deepcopy(gate)
    with torch.no_grad():
        other.logits.weight.copy_(gate.logits.weight[order])
    assert torch.allclose(other(x).weights, gate(x).weights[:, order])


def test_in_hard_mode_always_noise_samples_from_p_and_soft_only_does_not():
    """Gumbel-max: argmax of logits + noise is a draw from softmax(logits). Chi-square, 3 degrees of freedom."""
    n, x = 40_000, torch.ones(1, D)
    gate = make(4, scale=0.5, noise="always", hard_after=0)
    p = gate.logits(x).softmax(-1)[0].detach()
    counts = gate(x.expand(n, D), generator=generator()).active.sum(0)
    assert float(((counts - n * p) ** 2 / (n * p)).sum()) < 16.3  # p-value 0.001
    quiet = make(4, scale=0.5, noise="soft_only", hard_after=0)
    assert (quiet(x.expand(n, D)).active.sum(0) == n).sum() == 1


def test_the_hard_mask_does_not_depend_on_the_temperature():
    masks = [make(tau=tau, hard_after=0, noise="always")(tokens(), generator=generator(5)).active for tau in (0.1, 3.0)]
    assert torch.equal(*masks)


def test_phases_follow_one_another_and_survive_a_state_dict():
    options = {"shared_steps": 3, "hard_after": 2, "schedule": TemperatureSchedule(2.0, 1.0, 4)}
    gate, seen = make(**options), []
    for _ in range(7):
        seen.append((gate.phase, round(gate.temperature, 2)))
        gate.advance()
    assert seen == [("shared", 2.0)] * 3 + [("soft", 2.0), ("soft", 1.75), ("hard", 1.5), ("hard", 1.25)]
    other = make(**options)
    other.load_state_dict(gate.state_dict())
    assert (other.phase, other.temperature) == (gate.phase, gate.temperature) == ("hard", 1.0)


def test_the_shared_phase_uses_expert_0_alone_with_weight_one():
    gate = make(shared_steps=2)
    for mode in (True, False):
        routing = gate.train(mode)(tokens())
        assert torch.equal(routing.weights, torch.eye(E)[0].expand(64, E))
        assert not routing.weights.requires_grad
    assert set(gate.train()(tokens()).losses) == {"load_balance", "z"}


def test_evaluation_is_top_k_of_p_without_noise_or_the_matched_rule():
    x = tokens()
    gate = make(k=2, noise="always").eval()
    first, second = gate(x), gate(x)
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.active.nonzero()[:, 1].view(-1, 2), gate.logits(x).topk(2).indices.sort(1).values)
    matched = make(inference="matched", threshold=0.05, tau=0.7).eval()
    q = (matched.logits(x) / 0.7).softmax(-1)
    assert torch.equal(matched(x).active, q > 0.05)


@pytest.mark.parametrize("weights_from", ["softmax", "gumbel"])
def test_gradients_of_the_weights_are_those_of_the_specification(weights_from):
    """d w_i / d l_j = m_i s_i (delta_ij - s_j) [/ tau for q], the mask constant (specification, 3.6)."""
    tau, gate = 0.8, make(tau=0.8, weights_from=weights_from, noise="never", threshold=0.1).double()
    x = tokens(1, dtype=torch.float64)
    logits = gate.logits(x)[0].detach()
    scores = logits.softmax(0) if weights_from == "softmax" else (logits / tau).softmax(0)
    mask = gate(x).active[0].double()
    expected = (mask * scores)[:, None] * (torch.eye(E, dtype=torch.float64) - scores)
    expected = expected if weights_from == "softmax" else expected / tau

    def weights_of(bias):
        return torch.func.functional_call(gate, {"logits.bias": bias}, (x,)).weights[0]

    found = torch.autograd.functional.jacobian(weights_of, gate.logits.bias.detach())
    assert torch.allclose(found, expected, atol=1e-10)
    assert found[mask == 0].abs().sum() == 0  # an expert that does not run has no weight to learn
    assert found[:, mask == 0].abs().sum() > 0  # its logit is felt through the denominator


@pytest.mark.parametrize("renormalise", [False, True])
def test_renormalising_at_top_one_stops_the_router(renormalise):
    gate = make(hard_after=0, noise="never", renormalise=renormalise)
    y, routing = MoE(gate, MLPExperts(E, (D, 3), generator=generator()))(tokens())
    y.square().sum().backward()
    learned = gate.logits.weight.grad.abs().max().item()
    assert (learned < 1e-6) if renormalise else (learned > 1e-3)
    assert torch.allclose(routing.weights.sum(1), torch.ones(64)) == renormalise


def test_balance_term_is_one_at_perfect_balance_for_any_k_and_the_official_one_is_not():
    dense = make(scale=0.0, tau=10.0, threshold=0.0)
    assert dense(tokens()).losses["load_balance"].item() == pytest.approx(1.0)
    official = make(scale=0.0, tau=10.0, threshold=0.0, balance="official")
    # by hand: weights are p = 1/E everywhere, the mask is 1 everywhere: E * sum_i (1/E * 1) = E
    assert official(tokens()).losses["load_balance"].item() == pytest.approx(E, rel=1e-5)


def test_untrained_experts_per_token_are_those_of_the_specifications_table():
    """16 experts, c = 0.001, logits N(0, 0.1^2): 16, 15.7, 10.0, 5.2, 1.9 at tau = 2, 1, 0.5, 0.3, 0.1."""
    x = torch.eye(4000)
    for tau, expected in ((2.0, 16.0), (1.0, 15.7), (0.5, 10.0), (0.3, 5.2), (0.1, 1.9)):
        gate = DenseToSparseGate(4000, 16, TemperatureSchedule(tau, tau, 1))
        with torch.no_grad():
            gate.logits.weight.normal_(0, 0.1, generator=generator())
        found = gate(x, generator=generator(1)).experts_per_token.float().mean().item()
        assert found == pytest.approx(expected, abs=0.25), tau


def test_gumbel_noise_has_its_mean_and_variance_and_is_finite():
    noise = gumbel_like(torch.empty(400_000), generator())
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_noise_is_drawn_in_training_only_and_by_its_generator():
    gate, x = make(threshold=0.05), tokens()
    draws = [gate(x, generator=generator(seed)).active for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    never = make(threshold=0.05, noise="never")
    assert torch.equal(never(x).active, never(x).active)


def test_a_compiled_gate_follows_its_schedule():
    eager = make(noise="never", threshold=0.05, shared_steps=1, hard_after=2, schedule=TemperatureSchedule(2.0, 0.3, 2))
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    for _ in range(5):
        assert torch.allclose(compiled(tokens()).weights, eager(tokens()).weights, atol=1e-6), eager.phase
        eager.advance()
        compiled.advance()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_experts": 1}, "at least 2 experts"),
        ({"threshold": 1.0}, "nobody would pass"),
        ({"threshold": -0.1}, "threshold"),
        ({"k": 9}, "k must be"),
        ({"shared_steps": -1}, "negative"),
        ({"noise": "sometimes"}, "soft_only"),
        ({"weights_from": "q"}, "gumbel"),
        ({"inference": "top1"}, "matched"),
        ({"balance": "theirs"}, "official"),
    ],
)
def test_mistakes_are_explained(options, says):
    with pytest.raises(ValueError, match=says):
        make(**options)
