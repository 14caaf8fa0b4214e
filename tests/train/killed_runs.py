"""Not a test: the process that is killed. ``python killed_runs.py FOLDER`` writes ``FOLDER/report.json``.

PyTorch is imported once; each run is a child made by fork before anything was computed, which is a real process with a
real SIGKILL at the price of milliseconds instead of the seconds an import takes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import moe_lab.atomic
import moe_lab.train.checkpoint
from moe_lab.batches import Batches
from moe_lab.results import Result, run_cached
from moe_lab.train import FitConfig, fit
from moe_lab.train.config import History

CONFIG = {"gate": "comet", "seed": 3, "rate": 0.01}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Schedule(nn.Module):
    """Like a permutation search: a step counter in a buffer, noise from its own generator."""

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.generator = torch.Generator().manual_seed(7)

    def advance(self) -> None:
        POINTS.reach("between the optimiser step and advance", int(self.step))
        self.step += 1

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator) if self.training else torch.zeros(())
        return x * (1 + 0.1 * torch.sin(self.step.float())) + 0.01 * noise


class Points:
    """Kills the process when a named place is reached for the n-th time."""

    def __init__(self) -> None:
        self.name, self.when = "", 0

    def arm(self, name: str, when: int) -> None:
        self.name, self.when, self.seen = name, when, 0

    def reach(self, name: str, _position: int = 0) -> None:
        if name == self.name:
            self.seen += 1
            if self.seen == self.when:
                die()


POINTS = Points()
SCENARIOS = {
    "before the first checkpoint is complete": ("half of a checkpoint", 1),
    "in the loss of the first step": ("loss", 1),
    "in the loss of a step in the second epoch": ("loss", 12),
    "after the weights changed": ("between the optimiser step and advance", 14),
    "with half of a checkpoint written": ("half of a checkpoint", 5),
    "with half of an epoch's checkpoint written": ("half of a checkpoint", 4),
    "before the old checkpoint is renamed": ("rename .previous", 6),
    "between the two renamings": ("rename .ckpt", 7),
    "after a checkpoint and before the Result": ("rename .json", 6),
    "right after the Result": ("renamed .json", 7),
    "in the first evaluation": ("evaluate", 1),
    "in the second evaluation": ("evaluate", 2),
    "in the last evaluation": ("evaluate", 3),
    "after training and before finish": ("trained", 1),
}


def watch_files() -> None:
    replace, save = os.replace, torch.save

    def watched_replace(source: str | Path, target: str | Path) -> None:
        suffix = Path(target).suffix
        POINTS.reach(f"rename {suffix}")
        replace(source, target)
        POINTS.reach(f"renamed {suffix}")

    def watched_save(content: object, file: io.BufferedWriter) -> None:
        buffer = io.BytesIO()
        save(content, buffer)
        half = len(buffer.getvalue()) // 2
        file.write(buffer.getvalue()[:half])
        file.flush()
        POINTS.reach("half of a checkpoint")
        file.write(buffer.getvalue()[half:])

    moe_lab.atomic.os.replace = watched_replace
    moe_lab.train.checkpoint.torch.save = watched_save


def train(result: Result, pause: float) -> dict[str, float]:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.4), Schedule(), nn.Linear(12, 1))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=generator)
    y = torch.sin(x.sum(1))
    valid = torch.randn(40, 6, generator=generator)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        POINTS.reach("loss")
        time.sleep(pause)
        jitter = 1 + 0.01 * np.random.rand() + 0.01 * random.random()
        error = (model(batch["x"]).squeeze(-1) - batch["y"] * jitter).square().mean()
        return {"error": error, "size": model[0].weight.square().mean()}

    def evaluate(model: nn.Module) -> dict[str, float]:
        result.log("probe", draw=torch.rand(()).item())
        result.save()
        POINTS.reach("evaluate")
        return {"valid_loss": float((model(valid).squeeze(-1) - torch.sin(valid.sum(1))).square().mean())}

    history: History = fit(
        model,
        Batches({"x": x, "y": y}, batch_size=8, shuffle=True, seed=5),
        loss,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.05),
        coefficients={"error": 1.0, "size": 0.1},
        evaluate=evaluate,
        config=FitConfig(epochs=3, clip_norm=1.0, checkpoint_every=3, progress=False),
        result=result,
        resume=True,
    )
    POINTS.reach("trained")
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return {
        "weights": digest.hexdigest(),
        "draws": [torch.rand(()).item(), np.random.rand(), random.random()],
        "steps": history.steps,
        "best_epoch": history.best_epoch,
        "best_value": history.best_value,
        "rows": [{name: value for name, value in row.items() if name != "seconds"} for row in history.rows],
    }


def child(root: Path, kill: tuple[str, int] | None, pause: float = 0.0) -> int:
    """Fork a process that runs the experiment; its process id."""
    process = os.fork()
    if process == 0:
        try:
            if kill is not None:
                POINTS.arm(*kill)
                watch_files()
            run_cached("killed", CONFIG, lambda result: train(result, pause), root=root)
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    return process


def outcome(root: Path) -> dict[str, object]:
    (path,) = (root / "killed").glob("*.json")
    content = json.loads(path.read_text())
    for name in ("started", "wall_seconds", "environment"):  # somebody may commit while the tests run
        content.pop(name)
    for row in content["curves"]["epochs"]:
        row.pop("seconds")
    return {"result": content, "files": sorted(file.name for file in path.parent.iterdir())}


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder: Path) -> None:
    torch.optim.Adam([torch.zeros(1)])  # the first one imports half of PyTorch: once here, not once per child
    report: dict[str, object] = {}
    assert ended(child(folder / "reference", None)) == 0
    report["reference"] = outcome(folder / "reference")
    for number, (name, kill) in enumerate(SCENARIOS.items()):
        root = folder / str(number)
        exits = [ended(child(root, kill)), ended(child(root, None))]
        report[name] = {"exits": exits, **(outcome(root) if exits[1] == 0 else {})}
    root, exits = folder / "random", []
    moments = random.Random(0)
    while not exits or exits[-1] == -signal.SIGKILL:
        process = child(root, None, pause=0.01)
        if len(exits) < 6:
            time.sleep(moments.uniform(0.02, 0.25))
            os.kill(process, signal.SIGKILL)
        exits.append(ended(process))
    report["at six random moments, from outside"] = {"exits": exits, **outcome(root)}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
