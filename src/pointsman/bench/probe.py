"""How late another process' event loop runs, seen from outside."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from pointsman.bench.connection import Broken, Connections
from pointsman.config import split_url
from pointsman.types import Clock

_EVERY_S = 0.025


class Probe:
    """``async with Probe(url, path, clock) as probe`` times the round trip of a small request every 25 ms.
    What the quickest one took is the way there and back; the rest is waiting for that process' event loop
    and ours.
    """

    def __init__(self, url: str, path: str, clock: Clock) -> None:
        address = split_url(url, "probe")
        self._connections = Connections(address, None)
        self._request = f"GET {path} HTTP/1.1\r\nHost: {address.authority}\r\n\r\n".encode()
        self._clock = clock
        self.round_trips_s: list[float] = []

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._probe())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, where: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._connections.close()

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            start_s = self._clock()
            with contextlib.suppress(Broken):  # a process that is gone fails the run elsewhere
                await self._connections.exchange(self._request, lambda _: None)
                self.round_trips_s.append(self._clock() - start_s)

    def waits_s(self) -> list[float]:
        """What each request waited [seconds of our time]."""
        way_s = min(self.round_trips_s, default=0.0)
        return [round_trip_s - way_s for round_trip_s in self.round_trips_s]


def mean_wait_s(waits_s: Sequence[float]) -> float:
    """What a request that comes at any moment waits, where one after the other was sent, ``_EVERY_S`` after
    the last had its answer; 0.0 when none was. Whoever comes during a long wait shares it, half of it on
    average, though only one was measured.
    """
    covered_s = sum(_EVERY_S + wait_s for wait_s in waits_s)
    return sum((_EVERY_S + wait_s / 2) * wait_s for wait_s in waits_s) / covered_s if covered_s else 0.0
