"""`Result`: one JSON file per run, saved as it grows, found again when it is finished.

papermill cannot resume a notebook. Ours resume all the same, because a notebook only asks for Results: those that are
finished are read back, the one that was interrupted goes on from its checkpoint.

What an unfinished run keeps. `Result.open` gives back the rows in the file, so that a study which logs one row per
trial can skip the trials it has. A run inside `fit` needs more care: the file may be ahead of or behind the checkpoint
when the process dies. So the checkpoint carries the curves, and a resumed `fit` puts them back: no row twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_lab.atomic import atomic_file
from moe_lab.paths import runs_dir
from moe_lab.results.plain import dumps, fingerprint, loads, slug, to_plain
from moe_lab.runtime import configure_threads, environment, seed_everything

SCHEMA = "moe_lab.result/1"


@dataclass
class Result:
    """What a run was asked, where it ran, and what came out.

    Attributes:
        experiment: name of the experiment (a folder under the root).
        config: the config as plain values (tuples are lists).
        seed: ``config["seed"]`` or None.
        status: ``running`` | ``finished`` | ``interrupted`` | ``failed``.
        environment: see `runtime.environment`; of the process that worked on it last.
        started: UTC, ISO 8601.
        wall_seconds: time spent, over all processes that worked on it, up to the last save.
        metrics: final numbers (``finish``).
        curves: name -> rows (``log``).
        error: why it failed.
        path: the JSON file.
        schema: version of this format; part of the fingerprint in the file name.
    """

    experiment: str
    config: dict[str, Any]
    path: Path
    seed: int | None = None
    status: str = "running"
    environment: dict[str, Any] = field(default_factory=environment)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    wall_seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    error: str = ""
    schema: str = SCHEMA
    _clock: float | None = field(default=None, repr=False, compare=False)  # None: nobody works on it, time stands still

    @classmethod
    def open(cls, experiment: str, config: Any, root: Path | str | None = None, recompute: bool = False) -> Result:
        """The Result of this experiment and config: finished, unfinished (to go on with), or new.

        Args:
            experiment: lower case letters, digits, underscores.
            config: dataclass or mapping of plain values; any difference in it is a different run.
            root: folder that holds ``<experiment>/<slug>-<fingerprint>.json``; default `paths.runs_dir`.
            recompute: forget what is there (file and checkpoints) and start anew.

        Raises:
            ValueError: bad name or config, or the file there is no Result.
        """
        if not re.fullmatch(r"[a-z0-9_]+", experiment):
            raise ValueError(f"experiment must be lower case letters, digits and underscores, got {experiment!r}")
        plain = to_plain(config, "config")
        name = f"{slug(plain)}-{fingerprint([SCHEMA, experiment, plain])}.json"
        path = Path(root if root is not None else runs_dir()) / experiment / name
        result = cls(experiment, plain, path, seed=plain.get("seed"))
        if recompute:
            result._remove_checkpoints()
        elif path.exists():
            result = cls.load(path)
            if result.finished:
                return result
            result.status, result.error, result.environment = "running", "", environment()
        result._clock = time.monotonic()
        result.save()
        return result

    @classmethod
    def load(cls, path: Path | str) -> Result:
        """Read one file.

        Raises:
            ValueError: the file is damaged or of another format.
        """
        path = Path(path)
        try:
            content = loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema is {content['schema']!r}, expected {SCHEMA!r}")
            return cls(path=path, **content)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a readable Result ({error}); delete the file or run with recompute=True."
            ) from error

    @property
    def finished(self) -> bool:
        """Nothing is left to compute."""
        return self.status == "finished"

    @property
    def checkpoint_path(self) -> Path:
        """Where `fit` puts its checkpoint; gone once the run is finished."""
        return self.checkpoint_of("epochs")

    def checkpoint_of(self, curve: str) -> Path:
        """The same for a `fit` that writes another curve: each has its own checkpoint."""
        return self.path.with_suffix(".ckpt" if curve == "epochs" else f".{curve}.ckpt")

    def log(self, curve: str, **row: Any) -> None:
        """Append a row to ``curves[curve]`` (in memory: call `save`, or let `fit` do it)."""
        self.curves.setdefault(curve, []).append(to_plain(row, f"curve {curve!r}"))

    def save(self) -> None:
        """Write the file atomically."""
        if self._clock is not None:
            now = time.monotonic()
            self.wall_seconds += now - self._clock
            self._clock = now
        content = {name: value for name, value in vars(self).items() if name not in ("path", "_clock")}
        text = dumps(to_plain(content, "result"))
        with atomic_file(self.path) as file:
            file.write(text.encode())

    def finish(self, metrics: Mapping[str, Any]) -> Result:
        """Set the final numbers, save, and remove the checkpoints."""
        self.metrics = to_plain(metrics, "metrics")
        self.status = "finished"
        self.save()
        self._clock = None
        self._remove_checkpoints()
        return self

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Whatever stops the block is written down: Ctrl-C as ``interrupted``, an error as ``failed``; both go on."""
        try:
            yield
        except KeyboardInterrupt:
            self.status = "interrupted"
            self.save()
            raise
        except Exception as error:
            self.status, self.error = "failed", f"{type(error).__name__}: {error}"
            self.save()
            raise

    def _remove_checkpoints(self) -> None:
        for file in self.path.parent.glob(f"{self.path.stem}*.ckpt*"):
            file.unlink(missing_ok=True)


def run_cached(
    experiment: str,
    config: Any,
    compute: Callable[[Result], Mapping[str, Any]],
    *,
    root: Path | str | None = None,
    recompute: bool = False,
) -> Result:
    """The frame of every experiment: read the finished Result back, or compute it (going on from a checkpoint).

    Sets the threads, seeds everything with ``config.seed`` (if it has one), calls ``compute(result)``, which returns
    the metrics, and finishes the Result. Inside, call ``fit(..., result=result, resume=True)``.
    """
    result = Result.open(experiment, config, root=root, recompute=recompute)
    if result.finished:
        return result
    with result.recording():
        configure_threads()
        if result.seed is not None:
            seed_everything(result.seed)
        return result.finish(compute(result))
