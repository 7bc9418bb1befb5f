"""The clock of a run, in the seconds that are reported, and when calls are due on it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping
from random import Random
from types import MappingProxyType
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from pointsman.bench.workloads.family import Checked, Positive, says
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


Process: TypeAlias = Callable[[Random, float, int], Iterator[float]]
"""Due times [s] from the start of a stage, ascending: so many requests, at so many a second on average."""


def poisson(rng: Random, rate: float, requests: int) -> Iterator[float]:
    """Exponential gaps: many users who do not know of each other."""
    at_s = 0.0
    for _ in range(requests):
        at_s += rng.expovariate(rate)
        yield at_s


def constant(_: Random, rate: float, requests: int) -> Iterator[float]:
    """Equal gaps."""
    return (i / rate for i in range(requests))


class Bursts(Checked, frozen=True, tag_field="kind", tag="bursts"):
    """Gaps from a gamma distribution, which describes arrivals at LLM services better than Poisson does
    (BurstGPT, arXiv 2401.17644, on Azure's OpenAI services; ServeGen, arXiv 2505.09999, on Alibaba's).
    BurstGPT's own generator has shape 0.5 where nothing is said, a ``cv`` of 1.41; Poisson is 1.
    """

    cv: Annotated[Positive, says("standard deviation / mean of the gaps")] = 1.41

    def __call__(self, rng: Random, rate: float, requests: int) -> Iterator[float]:
        shape, at_s = 1 / self.cv**2, 0.0
        for _ in range(requests):
            at_s += rng.gammavariate(shape, 1 / (shape * rate))
            yield at_s


class Day(Checked, frozen=True, tag_field="kind", tag="day"):
    """Poisson arrivals whose rate follows a sine, rising from the mean at the start."""

    period_s: Annotated[Positive, says("of the sine; a real day is 86400")] = 600.0
    low: Annotated[
        float, Meta(ge=0, le=1), says("least rate as a share of the mean; the highest is 2 - it")
    ] = 0.3

    def __call__(self, rng: Random, rate: float, requests: int) -> Iterator[float]:
        swing, at_s, made = 1 - self.low, 0.0, 0
        while made < requests:
            at_s += rng.expovariate(rate * (1 + swing))
            now = 1 + swing * math.sin(math.tau * at_s / self.period_s)
            if rng.random() * (1 + swing) < now:
                made += 1
                yield at_s


ARRIVALS: Mapping[str, Process] = MappingProxyType(
    {"poisson": poisson, "constant": constant, "bursts": Bursts(), "day": Day()}
)
Arrivals: TypeAlias = Literal["poisson", "constant", "bursts", "day"] | Bursts | Day
"""A process by its name, or with parameters of one's own."""


def due_times(arrivals: Arrivals, rng: Random, rate: float, requests: int) -> Iterator[float]:
    """When ``requests`` are due at ``rate`` a second [s from the start of a stage]."""
    process = ARRIVALS[arrivals] if isinstance(arrivals, str) else arrivals
    return process(rng, rate, requests)
