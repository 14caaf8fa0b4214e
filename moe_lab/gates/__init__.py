"""Gates: who goes where. One gate a file; each returns a `moe_lab.routing.Routing`."""

from moe_lab.gates.base import Gate
from moe_lab.gates.comet import CometGate
from moe_lab.gates.dselect_k import DSelectKGate
from moe_lab.gates.hashed import HashGate
from moe_lab.gates.smooth_step import smooth_step
from moe_lab.gates.softmax import SoftmaxGate
from moe_lab.gates.topk import TopKGate

__all__ = ["CometGate", "DSelectKGate", "Gate", "HashGate", "SoftmaxGate", "TopKGate", "smooth_step"]
