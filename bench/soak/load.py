"""A steady open-loop load, each request judged as it ends."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from .asks import Ask, asks
from .chaos import Record
from .client import Client
from .gateway import Gateway, Trace
from .verdict import Judged, Verdict, ending, judge

KEPT = 200
"""Requests that went wrong and are told one by one."""


@dataclass
class Tally:
    """What was sent and what became of it."""

    sent: int = 0
    """Those that the gateway counts."""
    by_kind: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    """Under which ending the gateway must have counted them; "" where several are possible."""
    stories: list[dict[str, object]] = field(default_factory=list)
    """Violations, and requests that met bad engines only."""

    def add(self, ask: Ask, request_id: str, judged: Judged, counted_as: str) -> None:
        self.verdicts[judged.verdict] += 1
        self.by_kind[ask.kind] += 1
        if ask.counted:
            self.sent += 1
            self.endings[counted_as] += 1
        told = not judged.verdict.fine or judged.verdict is Verdict.UNLUCKY
        if told and len(self.stories) < KEPT:
            self.stories.append(
                {"id": request_id, "kind": ask.kind, "verdict": judged.verdict.value, "why": judged.why}
            )

    @property
    def violations(self) -> int:
        return sum(count for verdict, count in self.verdicts.items() if not verdict.fine)


class Load:
    """Sends ``rate`` requests a second at random times, whether or not earlier ones have been answered."""

    def __init__(self, gateway: Gateway, record: Record, rng: random.Random, rate: float) -> None:
        self._gateway = gateway
        self._record = record
        self._rng = rng
        self._rate = rate
        self._asks = asks(rng)
        self._client = Client(gateway.port)
        self._number = 0
        self._under_way: set[asyncio.Task[None]] = set()
        self.tally = Tally()

    async def run_for(self, seconds: float) -> None:
        """Send for so long; what has been sent may still be under way."""
        due_s = time.monotonic()
        until_s = due_s + seconds
        while True:
            due_s += self._rng.expovariate(self._rate)
            if due_s > until_s:
                break
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            self._number += 1
            task = asyncio.create_task(self._one(next(self._asks), f"soak-{self._number}"))
            self._under_way.add(task)
        await asyncio.sleep(max(0.0, until_s - time.monotonic()))
        self._forget_done()

    async def pause(self) -> None:
        """Return when every request has ended and no connection of ours is open."""
        self._client.hurry.set()
        if self._under_way:
            await asyncio.wait(self._under_way)
        self._forget_done()
        self._client.hurry.clear()
        self._client.close()

    async def stop(self) -> None:
        """Give up what is under way."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        self._client.close()

    def _forget_done(self) -> None:
        """A bug in the harness is raised here."""
        for task in [task for task in self._under_way if task.done()]:
            self._under_way.remove(task)
            task.result()

    async def _one(self, ask: Ask, request_id: str) -> None:
        reply = await self._client.send(ask, request_id)
        judged = judge(ask, reply, Trace(), self._record)
        if judged.verdict not in (Verdict.OK, Verdict.LEFT):
            trace = Trace()
            with contextlib.suppress(OSError):
                trace = await self._gateway.trace(request_id)
            judged = judge(ask, reply, trace, self._record)
        self.tally.add(ask, request_id, judged, ending(ask, reply))
