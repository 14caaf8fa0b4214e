"""Checks of notebook 04 accept a right answer and say what is wrong with others."""

from types import SimpleNamespace

import pytest
import torch

from moe_lab.exercises import vision
from moe_lab.experiments.vision_config import VisionConfig

HASH = VisionConfig(gate="hash")
FEW = {**HASH.data_options, "n_train": 375}


def twin(**changes):
    return VisionConfig(**{"gate": "one_expert", "data_options": FEW, "batch_size": 16, **changes})


def routed(seed, top_left, bottom_right):
    """A Result as far as the check reads it: mean weight of each expert per task."""
    routing = {"top_left": {"importance": top_left}, "bottom_right": {"importance": bottom_right}}
    return SimpleNamespace(seed=seed, metrics={"routing": routing})


RUNS = [routed(0, [0.6, 0.39, 0.01, 0.0], [0.0, 0.0, 0.001, 0.999]), routed(4, [0, 0, 1, 0], [0, 0, 0.5, 0.5])]
EXPERTS = {0: [{0, 1, 2}, {3}], 4: [{2}, {2, 3}]}


def hard(*shares):
    """Instead of a training run: the share of hard paths after 0, 1, 2, ... epochs, the same for both tasks."""
    rows = [{"epoch": epoch, "saturation": share} for epoch, share in enumerate(shares) for _ in range(2)]
    return lambda gamma: SimpleNamespace(curves={"routing": rows})


def separation(rows):
    return (torch.tensor(rows[0]) - torch.tensor(rows[1])).abs().sum() / 2


def root_undecided(gate):
    w, b = gate.split.weight[0], gate.split.bias[0]
    return -b * w / (w @ w)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (vision.check_experts, (EXPERTS, RUNS)),
        (vision.check_twin, (twin(), HASH)),
        (vision.check_width, (28.0, hard(0, 0, 0.02, 0.4))),
        (vision.check_separation, (separation,)),
        (vision.check_soft_input, (root_undecided,)),
    ],
)
def test_right_answers_are_accepted(check, answer, capsys):
    assert check(*answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize(
    ("check", "answer", "says"),
    [
        (vision.check_experts, (None, RUNS), "Not answered yet"),
        (vision.check_experts, ({0: EXPERTS[0]}, RUNS), "seeds [0, 4], you name [0]"),
        (vision.check_experts, ({**EXPERTS, 4: [{2}]}, RUNS), "seed 4: give a set for each of 2 tasks"),
        (vision.check_experts, ({**EXPERTS, 0: [{0, 1}, {3}]}, RUNS), "seed 0, top_left: 3 experts are in use"),
        (vision.check_twin, (None, HASH), "Not answered yet"),
        (vision.check_twin, (HASH, HASH), "gate='one_expert', not 'hash'"),
        (vision.check_twin, (twin(learning_rate=1e-3), HASH), "learning_rate must be that of the hash run"),
        (vision.check_twin, (twin(data_options={"n_train": 375}), HASH), "keep the other data_options"),
        (vision.check_twin, (twin(data_options=HASH.data_options), HASH), "about 375 images, your twin 3000"),
        (vision.check_twin, (twin(batch_size=128), HASH), "about 16 images of a step"),
        (vision.check_twin, (twin(epochs=64), HASH), "for 192 steps, your twin for 1536"),
        (vision.check_width, (None, hard(0)), "Not answered yet"),
        (vision.check_width, (10.0, hard(0, 0.3, 1, 1)), "after two epochs 100% of the paths are hard already"),
        (vision.check_width, (60.0, hard(0, 0, 0, 0.02)), "only 2% of the paths are hard"),
        (vision.check_separation, (lambda rows: 2 * separation(rows),), "did you take half of the sum?"),
        (vision.check_separation, (lambda rows: 0.25,), "two domains with the same mean weights are 0 apart"),
        (vision.check_soft_input, (None,), "Not answered yet"),
        (vision.check_soft_input, (lambda gate: torch.zeros(4),), "16 pixels, you give 4"),
        (vision.check_soft_input, (lambda gate: torch.full((16,), 0.5),), "an image without ink"),
        (vision.check_soft_input, (lambda gate: torch.zeros(16),), "here they are large"),
    ],
)
def test_wrong_answers_are_explained(check, answer, says, capsys):
    assert not check(*answer)
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("far", [False, True])
def test_the_frozen_gate_is_hard_on_images_and_uses_its_biases_only_if_asked(far):
    gate = vision.frozen_gate(0, far)
    images = torch.rand(200, 16, generator=torch.Generator().manual_seed(1))
    assert int(vision.reached(gate, images).max()) == 1
    assert (int(vision.reached(gate, torch.zeros(1, 16))) == 1) == far
