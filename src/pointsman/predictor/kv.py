"""How many tokens an endpoint's KV cache holds, where its engine does not say.

Two things tell. An engine says which share of its cache is in use: with our own tokens in flight that makes
a size. Requests that share a prefix have it in the cache once but are counted twice, so the size comes out
too large whenever they do; it is the least sizes that are believed. And a preemption tells that the cache was
full: it does not hold more than what was in flight then.
"""

from __future__ import annotations

from math import exp, inf, log

from pointsman.predictor.fit import HALF_LIFE_S
from pointsman.types import Endpoint

LEAST_USAGE = 0.02
"""Of the cache: less says too little of its size."""
IDLE_USAGE = 0.02
"""Where so much is in use while nothing runs, what is cached counts as used, and the share tells nothing."""
DOWN, UP = 0.2, 0.02
"""How far the belief moves to a size that is less, or more: about a tenth of them are less in the end."""
ENOUGH = 20
"""Looks before there is a belief."""


class _Size:
    """Of one endpoint."""

    __slots__ = ("at_s", "bound", "bound_at_s", "counts_cached", "log_size", "looks", "name", "preemptions")

    def __init__(self, endpoint: Endpoint) -> None:
        self.name = endpoint.name
        self.at_s = 0.0
        self.preemptions = endpoint.metrics.preemptions
        self.log_size = 0.0
        self.looks = 0
        self.bound = inf
        self.bound_at_s = 0.0
        self.counts_cached = False


class KvSizes:
    """Learned sizes by slot."""

    def __init__(self) -> None:
        self._by_slot: dict[int, _Size] = {}

    def look(self, endpoint: Endpoint, tokens: float) -> None:
        """The endpoint has been read again; ``tokens`` of prompts and answers of ours are in flight there."""
        metrics, load = endpoint.metrics, endpoint.load
        if metrics.kv_blocks:  # it says so itself
            return
        size = self._by_slot.get(endpoint.slot)
        if size is None or size.name != endpoint.name:
            size = self._by_slot[endpoint.slot] = _Size(endpoint)
        if metrics.at_s <= size.at_s:
            return
        size.at_s = metrics.at_s
        preempted, size.preemptions = metrics.preemptions > size.preemptions, metrics.preemptions
        if not (load.requests or metrics.running):
            size.counts_cached = metrics.kv_usage > IDLE_USAGE
            return
        if metrics.running + metrics.waiting > load.requests:  # somebody else's requests are there, too
            return
        if preempted:
            size.bound, size.bound_at_s = min(tokens, self._bound(size, metrics.at_s)), metrics.at_s
        if metrics.kv_usage >= LEAST_USAGE and not metrics.waiting and tokens:
            seen = log(tokens / metrics.kv_usage)
            size.looks += 1
            if size.looks == 1:
                size.log_size = seen
            size.log_size += (seen - size.log_size) * (DOWN if seen < size.log_size else UP)

    def tokens(self, endpoint: Endpoint) -> float | None:
        """What the cache holds: as the engine says, else as learned; None where nothing is known."""
        metrics = endpoint.metrics
        if metrics.kv_blocks:
            return float(metrics.kv_blocks * metrics.block_tokens)
        size = self._by_slot.get(endpoint.slot)
        if size is None or size.name != endpoint.name:
            return None
        learned = exp(size.log_size) if size.looks >= ENOUGH and not size.counts_cached else inf
        least = min(learned, self._bound(size, metrics.at_s))
        return least if least < inf else None

    def _bound(self, size: _Size, now_s: float) -> float:
        """It may have been wrong, and holds the less the longer ago it was."""
        return size.bound * 2 ** ((now_s - size.bound_at_s) / HALF_LIFE_S)
