"""Run independent jobs on several cores: one process each, one thread each.

Small models do not fill a core's vector units, let alone several cores: sixteen runs side by side finish about sixteen
times sooner, one run on sixteen threads does not. Nor does a small model fill a GPU: several share one, and where there
are several GPUs, processes are dealt to them in turn.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from tqdm.auto import tqdm

from moe_lab.runtime import configure_threads

_SECONDS_BETWEEN_LOOKS = 2.0


def visible_cards() -> list[str]:
    """The GPUs that this process may use, by the names that ``CUDA_VISIBLE_DEVICES`` takes; CUDA is not started."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]


def _begin_worker(cards: Sequence[str], begun: Any) -> None:
    """One thread for the work, and one that ends the process when its parent is gone: kill -9 tells nobody.

    Args:
        cards: GPUs, one for each worker in turn.
        begun: shared number of workers that have begun.
    """
    configure_threads(1)
    with begun.get_lock():
        mine, begun.value = begun.value, begun.value + 1
    if len(cards) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[mine % len(cards)]  # read when CUDA starts, with the first job
    parent = multiprocessing.parent_process()

    def watch() -> None:
        while parent.is_alive():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_parallel(
    function: Callable[[Any], Any], jobs: Sequence[Any], n_workers: int = 1, *, label: str = "", progress: bool = True
) -> Iterator[tuple[Any, Any]]:
    """Yield (job, function(job)) as jobs finish.

    Args:
        function: of a module (not a lambda, not defined in a notebook): workers import it.
        jobs: picklable.
        n_workers: processes; 1 runs the jobs here, one after another. A script that asks for more must start its work
            under ``if __name__ == "__main__"``, because workers import the script.
        label: of the progress bar.

    An exception of a job, or Ctrl-C, is raised here at once: what has not begun is cancelled, what runs is terminated
    (a run with checkpoints resumes).
    """
    if n_workers < 1:
        raise ValueError(f"n_workers must be at least 1, got {n_workers}")
    with tqdm(total=len(jobs), desc=label, disable=not progress, leave=False) as bar:
        if n_workers == 1 or len(jobs) < 2:
            for job in jobs:
                yield job, function(job)
                bar.update()
            return
        # "spawn": a forked child of a process that has used PyTorch's thread pool can hang.
        context = multiprocessing.get_context("spawn")
        workers = min(n_workers, len(jobs))
        begin = {"initializer": _begin_worker, "initargs": (visible_cards(), context.Value("i", 0))}
        with ProcessPoolExecutor(workers, mp_context=context, **begin) as pool:
            futures = {pool.submit(function, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
                    bar.update()
            except BaseException:
                workers = list((pool._processes or {}).values())  # public from Python 3.14 on: terminate_workers()
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in workers:  # else the interpreter waits at its end for jobs of minutes
                    worker.terminate()
                raise
