"""Gates by name."""

import pytest
import torch

from moe_lab.gates import GATE_NAMES, PermutationSearch, build_gate, build_gates

OPTIONS = {"in_features": 6, "n_experts": 5, "k": 2, "n_keys": 40}


@pytest.mark.parametrize("name", GATE_NAMES)
@pytest.mark.parametrize("plus", ["", "+"])
def test_every_name_builds_gates_that_route(name, plus):
    gates = build_gates(name + plus, 2, permutation_steps=10, **OPTIONS)
    for gate in gates:
        x = torch.arange(9) if gate.gate_input == "keys" else torch.randn(9, 6)
        assert gate(x).weights.shape == (9, 5)
        assert isinstance(gate, PermutationSearch) == bool(plus)


def test_tasks_share_the_permutation_and_the_hash_table_but_not_the_weights():
    one, two = build_gates("comet+", 2, permutation_steps=10, **OPTIONS)
    assert one.permutation is two.permutation
    assert not torch.equal(one.gate.split.weight, two.gate.split.weight)
    one, two = build_gates("hash", 2, **OPTIONS)
    assert torch.equal(one.table, two.table)


def test_the_same_seed_builds_the_same_gate():
    for name in GATE_NAMES:
        first, second = (build_gate(name, seed=4, **OPTIONS).state_dict() for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_wrong_names_and_missing_arguments_say_what_to_type():
    with pytest.raises(ValueError, match="did you mean 'comet'"):
        build_gate("commet", **OPTIONS)
    with pytest.raises(ValueError, match="permutation_steps"):
        build_gate("topk+", **OPTIONS)
    with pytest.raises(ValueError, match="n_keys"):
        build_gate("hash", in_features=6, n_experts=5, k=2)
