"""No test may leave anything behind: tasks, sockets, child processes, or an exception nobody saw."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

SETTLE_ROUNDS = 100
"""Turns of the event loop, of 5 ms each, that closing transports get to finish."""


def sockets() -> int:
    """Open sockets of this process, without the pairs by which event loops wake themselves."""
    unix = {line.split()[6] for line in Path("/proc/self/net/unix").read_text().splitlines()[1:]}
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue  # the directory's own
        count += link.startswith("socket:") and link[8:-1] not in unix
    return count


def children() -> set[str]:
    """Child processes, those that wait to be collected included."""
    pids = set[str]()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            pids.update(path.read_text().split())
    return {pid for pid in pids if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()}


@pytest.fixture(scope="session", autouse=True)
def loop_of_the_main_thread() -> Iterator[None]:
    """looptime asks for it before each synchronous test; one that asyncio makes then, nobody closes."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    loop.close()


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves sockets, processes or, on its event loop, tasks and lost exceptions."""
    if inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        request.getfixturevalue("loop_left_clean")
    before = children(), sockets()
    yield
    assert children() <= before[0], "child processes left behind"
    if "loop_left_clean" not in request.fixturenames:
        assert sockets() <= before[1], "sockets left open"


@pytest.fixture
async def loop_left_clean() -> AsyncIterator[None]:
    """The event loop's part of ``nothing_left_behind``."""
    loop = asyncio.get_running_loop()
    unseen: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unseen.append(context))
    tasks, open_sockets = asyncio.all_tasks(), sockets()
    yield
    left = set[asyncio.Task[Any]]()
    for _ in range(SETTLE_ROUNDS):
        left = asyncio.all_tasks() - tasks - {asyncio.current_task()}
        if not left and sockets() <= open_sockets:
            break
        await asyncio.sleep(0.005)
    assert not left, f"tasks left behind: {left}"
    assert sockets() <= open_sockets, f"{sockets() - open_sockets} sockets left open"
    assert not unseen, f"exceptions nobody handled: {unseen}"
