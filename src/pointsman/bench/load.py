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
    """One call at each of ``due`` (seconds from now, ascending), then wait until all have ended, and with
    them all that follow from them.
    """
    start_s = pace.now()
    async with asyncio.TaskGroup() as group:
        for after_s, call in zip(due, calls, strict=False):
            await pace.until(start_s + after_s)
            group.create_task(_make(call, start_s + after_s, send, pace, on_record, group))
            await asyncio.sleep(0)  # a late call goes out at once, not after all the other late ones


async def closed_loop(
    send: Send, calls: Iterator[Call], concurrency: int, until_s: float, pace: Pace, on_record: OnRecord
) -> None:
    """Keep ``concurrency`` requests running until the clock says ``until_s`` or the calls end.

    A request is due when its predecessor ended, so being due and being sent are the same. Where further
    calls follow from one, its place is free when the last of them has ended.
    """

    async def worker() -> None:
        while (now_s := pace.now()) < until_s:
            call = next(calls, None)
            if call is None:
                return
            async with asyncio.TaskGroup() as following:
                await _make(call, now_s, send, pace, on_record, following)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())


async def _make(
    call: Call, due_s: float, send: Send, pace: Pace, on_record: OnRecord, group: asyncio.TaskGroup
) -> None:
    """Make the call when it is due; what follows it becomes tasks of ``group``."""
    await pace.until(due_s)
    record = await send(call, due_s)
    on_record(record)
    if call.then is not None and not record.error:
        for think_s, following in call.then():
            group.create_task(_make(following, record.end_s + think_s, send, pace, on_record, group))
