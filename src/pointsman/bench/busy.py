"""Whether the load generator itself was the bottleneck: how late its event loop ran and how much CPU it
took.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

import msgspec

from pointsman.types import Clock

_TICK_S = 0.02
LATE_S = 0.02
"""Event-loop lag (99th percentile, seconds of our time) above which the figures are the client's, too."""
BUSY_SHARE = 0.85
"""Share of one core above which one process has little left."""


class Busy(msgspec.Struct, frozen=True):
    """How busy a process was. Lag in seconds of our time, whatever the pace of the run."""

    lag_p50_s: float
    lag_p99_s: float
    lag_max_s: float
    cpu_share: float

    def warnings(self) -> list[str]:
        """What the reader must know before believing the figures."""
        found = []
        if self.lag_p99_s > LATE_S:
            found.append(
                f"this client's event loop ran up to {self.lag_p99_s * 1000:.0f} ms late (p99): it is a "
                "bottleneck, latencies include it; lower the rate or use more machines"
            )
        if self.cpu_share > BUSY_SHARE:
            found.append(f"this client used {self.cpu_share:.0%} of a core: it is a bottleneck")
        return found


class Watch:
    """``async with Watch(clock, cpu_clock) as watch`` measures until ``watch.busy()`` is asked. Owns one
    task.
    """

    def __init__(self, clock: Clock, cpu_clock: Clock) -> None:
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._lags_s: list[float] = []

    async def __aenter__(self) -> Self:
        self._start_s, self._start_cpu_s = self._clock(), self._cpu_clock()
        self._task = asyncio.create_task(self._tick())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, where: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _tick(self) -> None:
        while True:
            due_s = self._clock() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self._lags_s.append(max(0.0, self._clock() - due_s))

    def busy(self) -> Busy:
        """How busy this process has been since the start."""
        lags = sorted(self._lags_s) or [0.0]
        elapsed_s = max(1e-9, self._clock() - self._start_s)
        return Busy(
            lag_p50_s=lags[len(lags) // 2],
            lag_p99_s=lags[len(lags) * 99 // 100],
            lag_max_s=lags[-1],
            cpu_share=(self._cpu_clock() - self._start_cpu_s) / elapsed_s,
        )
