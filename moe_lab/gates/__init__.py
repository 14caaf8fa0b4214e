"""Gates: who goes where. One gate a file; each returns a `moe_lab.routing.Routing`."""

from moe_lab.gates.base import Gate
from moe_lab.gates.base_layer import BaseLayerGate
from moe_lab.gates.build import GATE_NAMES, build_gate, build_gates
from moe_lab.gates.comet import CometGate
from moe_lab.gates.dense_to_sparse import DenseToSparseGate
from moe_lab.gates.dselect_k import DSelectKGate
from moe_lab.gates.expert_choice import ExpertChoiceGate
from moe_lab.gates.gshard import GShardGate
from moe_lab.gates.hashed import HashGate
from moe_lab.gates.local_search import Permutation, PermutationSearch
from moe_lab.gates.schedules import TemperatureSchedule
from moe_lab.gates.smooth_step import smooth_step
from moe_lab.gates.softmax import SoftmaxGate
from moe_lab.gates.stable import StableGate
from moe_lab.gates.switch import SwitchGate
from moe_lab.gates.topk import TopKGate

__all__ = [
    "GATE_NAMES",
    "BaseLayerGate",
    "CometGate",
    "DSelectKGate",
    "DenseToSparseGate",
    "ExpertChoiceGate",
    "GShardGate",
    "Gate",
    "HashGate",
    "Permutation",
    "PermutationSearch",
    "SoftmaxGate",
    "StableGate",
    "SwitchGate",
    "TemperatureSchedule",
    "TopKGate",
    "build_gate",
    "build_gates",
    "smooth_step",
]
