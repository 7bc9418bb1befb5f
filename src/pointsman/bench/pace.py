"""The clock of a run, in the seconds that are reported."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random

from pointsman.types import Clock

_TICK_S = 0.001
"""The event loop's timers count whole milliseconds: sleeping for less may not sleep at all."""


class Pace:
    """Engine seconds. Real servers live in our time, ``speed`` 1; in a simulated fleet that runs at ``speed``
    20, twenty of its seconds pass in one of ours, and all figures of a run are in the fleet's.
    """

    def __init__(self, clock: Clock, speed: float = 1.0) -> None:
        self._clock = clock
        self.speed = speed

    def now(self) -> float:
        """Engine seconds, monotonic."""
        return self._clock() * self.speed

    def wall_s(self, engine_s: float) -> float:
        """How long ``engine_s`` takes here."""
        return engine_s / self.speed

    async def until(self, at_s: float) -> None:
        """Return at ``at_s`` or just after, never before."""
        while (left_s := at_s - self.now()) > 0:  # noqa: ASYNC110  # a clock has no event to await
            await asyncio.sleep(max(_TICK_S, left_s / self.speed))


def poisson(rng: Random, rate: float, requests: int) -> Iterator[float]:
    """Due times from the start of a stage [s]: ``requests`` of them, exponential gaps of mean 1/rate."""
    at_s = 0.0
    for _ in range(requests):
        at_s += rng.expovariate(rate)
        yield at_s


def constant(_: Random, rate: float, requests: int) -> Iterator[float]:
    """Due times from the start of a stage [s], evenly spaced."""
    return (i / rate for i in range(requests))


ARRIVALS = {"poisson": poisson, "constant": constant}
