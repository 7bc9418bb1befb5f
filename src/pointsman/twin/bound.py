"""The fluid bound: what a pool could give at best, whatever the policy.

Each endpoint is simulated alone with its share of the requests, evenly spaced over the stage, every prompt
token a cache hit. The shares are such that all endpoints end together. The drain is included: throughput is
all output tokens by the time from the start to the last completion, the makespan metric of inference-perf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import msgspec
from msgspec import structs

from pointsman.sim.engine import Engine, EngineRequest
from pointsman.sim.profiles import EngineParameters

_ENDLESS_KV = 1 << 40
_AT_ONCE_TOK_S = 1e12
_ROUNDS = 18


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """A stage of requests, all alike: ``rate`` a second for ``duration_s``."""

    rate: float
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_tokens: int = 0
    """Leading tokens of a prompt that its group shares."""
    groups: int = 1
    """Equally popular."""

    @property
    def requests(self) -> float:
        return self.rate * self.duration_s


class Bound(msgspec.Struct, frozen=True):
    """The best a pool can do."""

    output_tok_s: float
    makespan_s: float
    shares: tuple[float, ...]
    """Of all requests, for one endpoint of each kind."""


def fluid_bound(pool: Sequence[tuple[EngineParameters, int]], demand: Demand, *, kv: bool) -> Bound:
    """The bound of ``pool``, its kinds of engine with the number of endpoints of each.

    Without ``kv`` every endpoint holds what it is sent. With ``kv`` the prefixes that live on an endpoint
    and the private tokens (question and output) of its running requests must fit its KV cache; requests
    wait, and are preempted, where they do not. As more copies only take room, each group lives on one
    endpoint: one that serves a share of the requests holds that share of the groups, at least one.
    """
    kinds = [_Kind(parameters, demand, kv) for parameters, _ in pool]
    counts = [count for _, count in pool]

    def served(makespan_s: float) -> float:
        return sum(
            count * kind.requests_within(makespan_s) for kind, count in zip(kinds, counts, strict=True)
        )

    makespan_s = _least(lambda t: served(t) >= demand.requests)
    shares = tuple(kind.requests_within(makespan_s) / demand.requests for kind in kinds)
    return Bound(demand.requests * demand.output_tokens / makespan_s, makespan_s, shares)


def fluid_rate(pool: Sequence[tuple[EngineParameters, int]], demand: Demand, makespan_s: float) -> float:
    """The rate at which the bound of ``pool``, KV left out, has a makespan of ``makespan_s``: pools sent
    that much are loaded alike. ``demand``'s own rate does not matter.
    """
    endless = structs.replace(demand, rate=math.inf)
    served = sum(
        count * _Kind(parameters, endless, False).requests_within(makespan_s) for parameters, count in pool
    )
    return served / demand.duration_s


class _Kind:
    """One endpoint alone, as a function of how many requests it gets."""

    def __init__(self, parameters: EngineParameters, demand: Demand, kv: bool) -> None:
        self._parameters = parameters
        self._demand = demand
        self._kv = kv
        self._ends: dict[int, float] = {0: 0.0}

    def requests_within(self, makespan_s: float) -> float:
        """How many requests it has answered by then if it gets as many as that; between two whole numbers
        by proportion.
        """
        low, high = 0, 1
        while self._end_s(high) <= makespan_s:
            if high >= self._demand.requests:
                return high
            low, high = high, high + max(1, high // 2)
        while high - low > 1:
            middle = (low + high) // 2
            if self._end_s(middle) <= makespan_s:
                low = middle
            else:
                high = middle
        if not low:
            return 0.0
        before_s, after_s = self._end_s(low), self._end_s(high)
        return low + (makespan_s - before_s) / (after_s - before_s)

    def _end_s(self, requests: int) -> float:
        found = self._ends.get(requests)
        if found is None:
            found = self._ends[requests] = _end_s(self._engine_for(requests), self._demand, requests)
        return found

    def _engine_for(self, requests: int) -> EngineParameters:
        demand, parameters = self._demand, self._parameters
        kv_tokens = _ENDLESS_KV
        if self._kv:
            others = max(0.0, requests / demand.requests * demand.groups - 1)
            kv_tokens = parameters.kv_tokens - round(others * demand.prefix_tokens)
        return structs.replace(parameters, kv_tokens=kv_tokens, prefill_tokens_per_s=_AT_ONCE_TOK_S)


@lru_cache(maxsize=4096)
def _end_s(parameters: EngineParameters, demand: Demand, requests: int) -> float:
    """When an engine has answered so many requests; infinite when one of them cannot fit.

    All of them share one prefix, which stands for those the engine holds; what is not shared is computed at
    once, but a step that does so still takes ``prefill_step_s``.
    """
    if parameters.kv_tokens < parameters.block_tokens:
        return math.inf
    engine = Engine(parameters)
    if not engine.fits(demand.prompt_tokens, demand.output_tokens):
        return math.inf
    prefix = range(demand.prefix_tokens // parameters.block_tokens)
    every_s = demand.duration_s / requests
    sent, ended_s = 0, 0.0
    while sent < requests or not engine.idle:
        due_s = (sent + 0.5) * every_s if sent < requests else math.inf
        if due_s < engine.due_s:
            engine.submit(EngineRequest(prefix, demand.prompt_tokens, demand.output_tokens), due_s)
            sent += 1
            if engine.idle:
                engine.start(due_s)
        else:
            ended_s = engine.due_s
            engine.finish()
            engine.start(ended_s)
    return ended_s


def _least(enough: Callable[[float], bool]) -> float:
    """The least number for which a function that is false, then true, is true; within 1e-5 of itself."""
    high = 1.0
    while not enough(high):
        high *= 2
    low = high / 2
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
