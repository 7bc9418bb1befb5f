"""Independent runs on several cores."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def each(
    call: Callable[[T], R], tasks: Sequence[T], jobs: int = 1, on_done: Callable[[int], None] = lambda _: None
) -> list[R]:
    """``call`` of each task, in the order of the tasks, ``jobs`` of them at once in processes of their own.

    ``on_done`` hears how many are done. With one job, or one task, all happens in this process. When one
    fails, or on Ctrl-C, the others are ended.
    """
    if jobs == 1 or len(tasks) == 1:
        results = []
        for done, task in enumerate(tasks, 1):
            results.append(call(task))
            on_done(done)
        return results
    with ProcessPoolExecutor(
        min(jobs, len(tasks)),
        multiprocessing.get_context("spawn"),  # a fork of a process with threads may hang
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    ) as processes:
        futures = [processes.submit(call, task) for task in tasks]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                on_done(done)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # nobody waits for their results any more
            raise
        return [future.result() for future in futures]
