"""When calls are made: open loop (at due times, whatever the server does) or closed loop (N at once).

Both return when every request has ended, and hand each record to ``on_record`` as it comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator

from pointsman.bench.client import Record
from pointsman.bench.pace import Pace
from pointsman.bench.workloads import Call

Send = Callable[[Call, float], Awaitable[Record]]
OnRecord = Callable[[Record], None]


async def open_loop(
    send: Send, calls: Iterator[Call], due: Iterable[float], pace: Pace, on_record: OnRecord
) -> None:
    """One call at each of ``due`` (seconds from now, ascending), then wait until all have ended."""

    async def one(call: Call, due_s: float) -> None:
        on_record(await send(call, due_s))

    start_s = pace.now()
    async with asyncio.TaskGroup() as group:
        for after_s, call in zip(due, calls, strict=False):
            await pace.until(start_s + after_s)
            group.create_task(one(call, start_s + after_s))
            await asyncio.sleep(0)  # a late call goes out at once, not after all the other late ones


async def closed_loop(
    send: Send, calls: Iterator[Call], concurrency: int, until_s: float, pace: Pace, on_record: OnRecord
) -> None:
    """Keep ``concurrency`` requests running until the clock says ``until_s`` or the calls end.

    A request is due when its predecessor ended, so being due and being sent are the same.
    """

    async def worker() -> None:
        while (now_s := pace.now()) < until_s:
            call = next(calls, None)
            if call is None:
                return
            on_record(await send(call, now_s))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
