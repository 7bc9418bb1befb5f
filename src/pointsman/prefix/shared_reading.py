"""Reads a request's blocks from the shared index, in the time that the request has for it, or not.

Nothing here fails a request or holds up others: reading that is late goes on, and while it does nobody else
waits; nor does anybody for a second after the server was away.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial

from pointsman.prefix.blocks_match import Keys
from pointsman.prefix.shared import RETRY_S, SharedIndex
from pointsman.types import Clock

MOST_AT_ONCE = 64
"""Requests whose blocks are being read: each has a connection."""

OK, LATE, AWAY = "", "index_late", "index_away"
"""What became of it; the reasons are stable words of the decision's record."""


class Reading:
    """Of one index."""

    def __init__(self, index: SharedIndex, clock: Clock) -> None:
        self.results: Counter[str] = Counter()
        """Requests by what became of their reading."""
        self._index = index
        self._clock = clock
        self._tasks: set[asyncio.Task[bool]] = set()
        self._late: set[asyncio.Task[bool]] = set()
        self._rest_until_s = float("-inf")

    def read(self, keys: Keys, left_s: float) -> asyncio.Future[str] | str:
        """What became of it: at once, or in ``left_s`` seconds at the latest."""
        if self._clock() < self._rest_until_s:
            return self._count(AWAY)
        if self._late or len(self._tasks) >= MOST_AT_ONCE or left_s <= 0:
            return self._count(LATE)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()
        task = loop.create_task(self._index.fetch(keys, self._clock()))
        timer = loop.call_later(left_s, self._give_up, task, answer)
        self._tasks.add(task)
        task.add_done_callback(partial(self._done, answer, timer))
        return answer

    def _give_up(self, task: asyncio.Task[bool], answer: asyncio.Future[str]) -> None:
        self._late.add(task)
        if not answer.done():
            answer.set_result(self._count(LATE))

    def _done(
        self, answer: asyncio.Future[str], timer: asyncio.TimerHandle, task: asyncio.Task[bool]
    ) -> None:
        timer.cancel()
        self._tasks.discard(task)
        self._late.discard(task)
        read = not task.cancelled() and task.result()
        if not read:
            self._rest_until_s = self._clock() + RETRY_S
        if not answer.done():
            answer.set_result(self._count(OK if read else AWAY))

    def _count(self, result: str) -> str:
        self.results[result] += 1
        return result

    def close(self) -> None:
        """Stop; who waits is told that the index is away."""
        for task in self._tasks:
            task.cancel()
