"""How late another process' event loop runs, seen from outside."""

from __future__ import annotations

import asyncio
import contextlib
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

    def lag_s(self) -> float:
        """Mean wait [seconds of our time]; 0.0 when nothing was measured."""
        if not self.round_trips_s:
            return 0.0
        return sum(self.round_trips_s) / len(self.round_trips_s) - min(self.round_trips_s)
