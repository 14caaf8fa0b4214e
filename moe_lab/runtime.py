"""The machine underneath: threads, device, seeds, and what a Result must say about where it was computed."""

from __future__ import annotations

import difflib
import os
import platform
import random
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moe_lab
from moe_lab.allocator import keep_freed_memory
from moe_lab.paths import project_root

MOST_THREADS = 4
_chosen_threads: int | None = None


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):  # respects taskset and most container limits
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def configure_threads(n: int | None = None) -> int:
    """Set and return the number of threads PyTorch uses inside one operation.

    Without ``n``: what an earlier call was given, else ``$MOE_LAB_THREADS``, else ``$OMP_NUM_THREADS``, else half of
    the cores, at least 1 and at most 4. `fit` and the experiments call this; a notebook need not.

    Why so few: our operations are small (512 rows, 256 columns), so more threads gain little, and they lose much as
    soon as a core has something else to do, because each operation waits for its slowest thread. On a 2-core machine
    with one core busy a training step took 910 ms with two threads and 92 ms with one.

    Also tells the C library to keep freed memory (`allocator`), for the same reason: many small steps.

    Raises:
        ValueError: the number, or the environment variable, is not a positive integer.
    """
    global _chosen_threads
    source = "configure_threads"
    if n is None:
        n = _chosen_threads
        for variable in ("MOE_LAB_THREADS", "OMP_NUM_THREADS"):
            value = os.environ.get(variable, "").strip()
            if n is None and value:
                source = f"${variable}"
                n = int(value) if value.isdecimal() else 0
        n = max(1, min(MOST_THREADS, _cpu_count() // 2)) if n is None else n
    if n < 1:
        raise ValueError(f"{source}: the number of threads must be a whole number of at least 1")
    if n != torch.get_num_threads():
        torch.set_num_threads(n)
    _chosen_threads = n
    keep_freed_memory()
    return n


def pick_device(name: str = "auto") -> torch.device:
    """``"auto"`` (CUDA if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:1"`` -> device.

    Raises:
        ValueError: unknown name, or CUDA was asked for and PyTorch finds none.
    """
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        near = difflib.get_close_matches(name, ("auto", "cpu", "cuda"), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown device {name!r}{hint} Valid: 'auto', 'cpu', 'cuda', 'cuda:1'.")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto":
        return torch.device("cuda" if found else "cpu")
    if kind == "cuda" and int(index or 0) >= found:
        raise ValueError(
            f"device {name!r} was asked for, but PyTorch {torch.__version__} sees {found} CUDA devices; "
            "use 'auto' or 'cpu', or install a CUDA build of PyTorch and its driver."
        )
    return torch.device(name)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's (all devices) global generators.

    Call it *before* a model is built: initial weights are drawn from these generators. `fit` never seeds.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@lru_cache(maxsize=1)
def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device | str = "cpu") -> str:
    """Name of the chip, for example ``"NVIDIA H200"``."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


@lru_cache(maxsize=1)
def _commit() -> tuple[str | None, bool | None]:
    # Once per process: the code that runs is the code that was imported. "Dirty" asks about the package only, since
    # running a notebook changes the notebook.
    root = project_root()
    if not (root / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "moe_lab"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The circumstances of a number: versions, chip, cores, threads, commit.

    Args:
        device: where the computation runs; ``device`` in the answer is the name of that chip.

    Returns:
        ``python``, ``torch``, ``numpy``, ``moe_lab`` (versions), ``device``, ``cpu_count``, ``threads``, ``commit`` and
        ``dirty`` (uncommitted changes in the package); the last two are None outside a git checkout.
    """
    commit, dirty = _commit()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "moe_lab": moe_lab.__version__,
        "device": device_name(device),
        "cpu_count": _cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": dirty,
    }
