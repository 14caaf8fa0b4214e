"""Runs a notebook with parameters through papermill, in the interpreter that runs this code.

A notebook names its kernel "python3", and a machine may have a kernel of that name that belongs to another Python
without moe_lab. So the kernel is started with `sys.executable`, whatever is registered on the machine.

The first Ctrl-C interrupts the running cell, as in JupyterLab: the cell can save (`fit` and `Result` do), and the
notebook is kept up to there. nbclient alone would kill the kernel. A second Ctrl-C does kill it.

A cell with `interact` makes nbclient *send* on the channel on which it awaits the cell's reply, past the event loop.
If the reply arrives just then, the wake-up is lost and nbclient waits for ever (seen in one of twenty runs on a busy
machine, nbclient 0.11, pyzmq 27). So we look again once a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import papermill
import zmq
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets import Type, default

from moe_lab.notebook_catalogue import Notebook
from moe_lab.paths import runs_dir

_ENGINE = "moe_lab"


@dataclass(frozen=True)
class Outcome:
    """What became of one run. `status`: finished | failed | interrupted; `error` is text for a terminal."""

    notebook: Notebook
    path: Path
    status: str
    seconds: float
    error: str = ""


class _LooksAgain(AsyncZMQSocketChannel):
    """Waits in steps of a second; each step asks the socket anew whether a message is there."""

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        while timeout is None and not await self.socket.poll(1000):
            pass
        return await super().get_msg(timeout)


class _Client(AsyncKernelClient):
    shell_channel_class = Type(_LooksAgain)
    iopub_channel_class = Type(_LooksAgain)


class _OwnInterpreter(AsyncKernelManager):
    """Starts the kernel with the interpreter of this process."""

    @default("client_factory")
    def _client(self) -> type:
        return _Client

    @default("transport_encryption")  # jupyter_client >= 8.9: encrypts what passes between us and the kernel
    def _encrypt_if_possible(self) -> str:
        return "auto" if zmq.has("curve") else "disabled"

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())  # ipykernel's own description, with sys.executable in it


class _InterruptibleClient(PapermillNotebookClient):
    """On Ctrl-C interrupts the cell instead of killing the kernel."""

    interrupted = False

    def papermill_execute_cells(self) -> None:
        # Refused outside the main thread; and on Windows, which keeps nbclient's way.
        with contextlib.suppress(RuntimeError, NotImplementedError):
            asyncio.get_event_loop().add_signal_handler(signal.SIGINT, self._on_interrupt)
        super().papermill_execute_cells()

    def _on_interrupt(self) -> None:
        stop = self._async_cleanup_kernel if self.interrupted else self.km.interrupt_kernel
        self.interrupted = True
        self._pending = asyncio.ensure_future(stop())  # kept: the loop holds only weak references to tasks


class _Engine(NBClientEngine):
    """papermill's own engine, with the client above."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, start_timeout=60, **kwargs):
        for unused in ("input_path", "log_output", "stdout_file", "stderr_file"):
            kwargs.pop(unused, None)
        client = _InterruptibleClient(
            nb_man,
            kernel_name=kernel_name,
            kernel_manager_class=_OwnInterpreter,
            startup_timeout=start_timeout,
            timeout=None,
            **kwargs,
        )
        return client.execute()


papermill_engines.register(_ENGINE, _Engine)


def executed_path(notebook: Notebook, values: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Where the executed copy goes: `runs/notebooks/03_comet_recommender-gate-topk-seed-1.ipynb`.

    Values that a file name cannot hold are simplified, and then a short hash keeps different runs apart.
    """
    folder = folder or runs_dir() / "notebooks"
    exact = "".join(f"-{name}-{value}" for name, value in sorted(values.items()))
    simple = re.sub(r"[^\w.+-]+", "_", exact)[:100]
    if simple != exact:
        simple += "-" + hashlib.sha1(exact.encode()).hexdigest()[:8]
    return folder / f"{notebook.name}{simple}.ipynb"


def run_notebook(notebook: Notebook, values: Mapping[str, Any], folder: Path | None = None) -> Outcome:
    """Execute a copy of the notebook with some parameters changed; shows a progress bar on stderr.

    The copy is written after every cell, so that whatever happens the finished cells are kept. The working directory is
    the notebook's own folder. Names and types must have been checked (`notebook_parameters.check_parameters`).

    Args:
        notebook: what to run.
        values: parameters that differ from the defaults.
        folder: of the executed copy; default `runs/notebooks`.

    Returns:
        The outcome; a failing cell is one, not an exception.
    """
    path = executed_path(notebook, values, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    status, error = "finished", ""
    try:
        papermill.execute_notebook(
            str(notebook.path),
            str(path),
            parameters=dict(values),
            engine_name=_ENGINE,
            kernel_name="python3",
            language="python",
            cwd=str(notebook.path.parent),
            progress_bar={"desc": f"{notebook.number} {notebook.title}", "dynamic_ncols": True},
        )
    except PapermillExecutionError as problem:
        status = "interrupted" if problem.ename == "KeyboardInterrupt" else "failed"
        error = _cell_report(problem)
    except DeadKernelError:
        status = "failed"
        error = "The kernel died: killed from outside, or out of memory. The last cell that finished is in the copy."
    return Outcome(notebook, path, status, time.perf_counter() - start, error)


def _cell_report(problem: PapermillExecutionError) -> str:
    source = "\n".join("    " + line for line in problem.source.splitlines())
    traceback = "\n".join(problem.traceback) or f"{problem.ename}: {problem.evalue}"
    if not sys.stderr.isatty():
        traceback = papermill.exceptions.strip_color(traceback)
    return f"Cell In [{problem.exec_count}]:\n\n{source}\n\n{traceback}"
