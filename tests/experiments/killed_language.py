"""Not a test: a language model that is killed around the spawn. ``python killed_language.py FOLDER`` writes a report.

Each run is a child made by fork before anything was computed: a real process with a real SIGKILL, without the seconds
that an import takes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from moe_lab.experiments import evomoe_language
from moe_lab.experts import evolve
from moe_lab.train import trainer

CONFIG = evomoe_language.LanguageConfig(
    data_options={"n_characters": 6000, "length": 16},
    n_experts=4,
    width=16,
    layers=4,
    steps=20,
    evaluate_every=5,
    shared_share=0.35,  # the spawn is after step 7, in the middle of an evaluation interval
    soft_share=0.2,
    hard_share=0.3,
    batch_size=4,
    sample_tokens=5,
    watched_tokens=2,
    dropout=0.1,
    optimizer_state="copy",
)
SPAWN = 7
POINTS = (
    "before the spawn",
    "in the first mixture's spawn",
    "between the two mixtures' spawns",
    "after the spawn",
    "hard",
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str) -> None:
    """Make this process kill itself at a point."""
    calls = {"carry": 0}
    carry, step = evolve.carry_state, trainer.Trainer._step

    def counted(*args, **kwargs):
        calls["carry"] += 1
        if point == "in the first mixture's spawn":
            die()  # experts are diverse already, the optimiser's state is not
        carry(*args, **kwargs)
        if point == "between the two mixtures' spawns":
            die()

    def stepped(self, batch):
        step(self, batch)
        at = {"before the spawn": SPAWN - 1, "after the spawn": SPAWN + 1, "hard": 16}.get(point)
        if self.history.steps == at:
            self.save()  # as checkpoint_every would: between two steps
            die()

    evolve.carry_state, trainer.Trainer._step = counted, stepped


def child(folder: Path, point: str = "") -> int:
    """Run in a process of its own; minus the signal that ended it, or 0."""
    pid = os.fork()
    if pid == 0:
        try:
            if point:
                arm(point)
            evomoe_language.run(CONFIG, root=folder, progress=False)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def outcome(folder: Path) -> dict:
    """Metrics and curves of the only Result there, without times."""
    (path,) = folder.rglob("*.json")
    content = json.loads(path.read_text())
    for rows in content["curves"].values():
        for row in rows:
            row.pop("seconds", None)
    content["metrics"].pop("seconds")
    return {name: content[name] for name in ("status", "metrics", "curves")}


def main(folder: Path) -> None:
    report = {"reference": {"exits": [child(folder / "reference")], **outcome(folder / "reference")}}
    for index, point in enumerate(POINTS):
        root = folder / str(index)
        exits = [child(root, point), child(root)]
        left = sorted(path.suffix for path in root.rglob("*.ckpt*"))
        report[point] = {"exits": exits, "left": left, **outcome(root)}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
