"""What an engine's counters tell of requests whose responses we do not see, and of those that others sent."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from pointsman.types import Load, Metrics

WINDOW_S = 10.0
"""A request that was broken off before its first token is missing in the count of these; such an error is
forgotten after one to two of these windows."""


class Asked(NamedTuple):
    """What was in flight when a metrics page was asked for: later requests are not in it."""

    requests: int
    sent: int


def asked(load: Load) -> Asked:
    """A metrics page is asked for now."""
    return Asked(load.requests, load.sent)


class Unseen:
    """Keeps an endpoint's load in step with its metrics pages.

    Engines compute prompts in the order of arrival. So when no more than k of its requests are before their
    first token, of ours that can be the newest k only.
    """

    __slots__ = ("_decoding", "_error", "_error_before", "_metrics", "_window_s")

    def __init__(self) -> None:
        self._metrics = Metrics()
        self._decoding = 0.0
        self._error = self._error_before = inf
        """Least of what the counters say too much, in this window and the one before."""
        self._window_s = -inf

    def read(self, load: Load, metrics: Metrics, asked: Asked) -> None:
        """A page has come that was asked for when ``asked`` was in flight."""
        others = max(0.0, metrics.running + metrics.waiting - asked.requests)
        if others != load.others:
            load.others = others
            load.changes += 1
        before, self._metrics = self._metrics, metrics
        computing = self._computing(metrics)
        self._count_steps(load, metrics, before, metrics.running - computing)
        if metrics.first_tokens:
            self._start(load, metrics, before, asked, round(metrics.waiting + computing))

    def _computing(self, metrics: Metrics) -> float:
        """How many of the engine's requests have been begun and not had their first token."""
        if not metrics.first_tokens:
            return 0.0
        found = metrics.ended + metrics.running - metrics.first_tokens
        if metrics.at_s - self._window_s > WINDOW_S:
            self._window_s = metrics.at_s
            self._error_before, self._error = self._error, found
        self._error = min(self._error, found)
        return min(found - min(self._error, self._error_before), metrics.running)

    def _count_steps(self, load: Load, metrics: Metrics, before: Metrics, decoding: float) -> None:
        """Those that decoded since the page before have shared what came out."""
        came, mean = metrics.generation_tokens - before.generation_tokens, (decoding + self._decoding) / 2
        self._decoding = decoding
        if came > 0 and mean > 0 and before.at_s:
            load.steps += came / max(1.0, mean)

    def _start(self, load: Load, metrics: Metrics, before: Metrics, asked: Asked, waiting: int) -> None:
        """All of ours that are not among the newest ``waiting`` have had their first token."""
        old = [n for n, r in load.before_first.items() if n < asked.sent and not r.seen]
        started = old[: max(0, len(old) - waiting)]
        if not started:
            return
        firsts, waits_s = (
            metrics.first_tokens - before.first_tokens,
            metrics.first_wait_s - before.first_wait_s,
        )
        wait_s = waits_s / firsts if firsts > 0 and waits_s > 0 else None
        for number in started:
            load.first_output(number, wait_s)
