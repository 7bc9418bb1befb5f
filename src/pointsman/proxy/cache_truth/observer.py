"""The observer of requests that keeps score, and sets events aside that are wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from pointsman.endpoints.pool import Pool
from pointsman.prefix.kv_source import KvEventSource
from pointsman.prefix.precise import PreciseIndex
from pointsman.proxy.cache_truth.counts import Compared, Record, Tally
from pointsman.proxy.cache_truth.endpoint import CacheOf
from pointsman.types import Clock, Decision, Ending, Endpoint, InferenceRequest, Outcome

log = logging.getLogger(__name__)

HOLDS_MORE = "it holds more than it tells, or tells it more than 2 s late (or has so long a queue)"
HOLDS_LESS = "it holds less than it tells: what went was not told of, or not by this engine"
OTHER_TOKENS = "we take the prompts for other tokens than the engine"

CHECK_S = 5.0
"""How often is looked for what no request shows."""
AT_ONCE = 50
"""Endpoints that are looked at in one turn of the event loop: under a millisecond."""


class CacheTruth:
    """Told of every request's end (``router.Observer``); what it has found is in ``endpoints``."""

    def __init__(
        self,
        pool: Pool,
        precise: PreciseIndex,
        sources: Callable[[], Sequence[KvEventSource]],
        clock: Clock,
    ) -> None:
        self.endpoints: dict[str, CacheOf] = {}
        self._pool = pool
        self._precise = precise
        self._sources = sources
        self._clock = clock
        pool.listen(self._on_pool)

    def _on_pool(self, event: str, endpoint: Endpoint) -> None:
        if event == "joined":
            self.endpoints[endpoint.name] = CacheOf(endpoint)
        elif event == "left":
            del self.endpoints[endpoint.name]
            self._precise.resume(endpoint.slot)
        elif event == "restarted":
            self.endpoints[endpoint.name].forget()

    # -- requests

    def __call__(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        if decision is None or not decision.prompt_tokens:
            return
        cache = self.endpoints.get(decision.chosen.name)
        if cache is None or cache.slot != decision.chosen.slot:
            return
        now_s, usage = self._clock(), outcome.usage
        if outcome.ending is not Ending.OK or decision.tried or request.state_id:
            # It may have been computed or not, in several places, or be longer than we see.
            for name in {cache.name, *decision.tried} & self.endpoints.keys():
                self.endpoints[name].spans.unclear(decision.prompt_tokens, now_s)
            return
        prompt, reported = usage.prompt_tokens or decision.prompt_tokens, usage.cached_tokens
        cache.spans.add(decision, prompt, reported is None, now_s)
        if cache.sources:
            cached = max(decision.matched_tokens, decision.sent_tokens) if reported is None else reported
            cache.answered(decision, prompt - cached, self._precise.block_tokens(cache.slot), now_s)
        if reported is not None and len(request.prompts) == 1 and request.n == 1:
            self._compare(cache, decision, prompt, reported)

    def _compare(self, cache: CacheOf, decision: Decision, prompt: int, reported: int) -> None:
        record = cache.events if decision.by_events else cache.sent
        ours = decision.prompt_tokens
        sent = (
            decision.sent_tokens * prompt // ours
        )  # it goes by shares; only the total may be counted wrongly
        record.add(Compared(decision.matched_tokens, sent, reported, prompt, prompt == ours))
        if decision.by_events and record.worse:
            self._set_aside(
                cache,
                f"they were off by {record.error:.0%} of the prompt tokens over {record.requests} requests, "
                f"what was sent there by {record.sent_error:.0%}; {_why(record)}",
            )

    # -- trust

    def _set_aside(self, cache: CacheOf, reason: str) -> None:
        """The index of what was sent answers for this endpoint until its events are tried again."""
        trust, now_s = cache.trust, self._clock()
        if trust.since_s is not None:  # requests that were decided before
            return
        self._gather()
        trust.set_aside(now_s, self._mark(cache), reason)
        self._precise.suspend(cache.slot)
        self._look(cache, now_s)

    def _try_again(self, cache: CacheOf, now_s: float) -> None:
        why = cache.trust.due(now_s, self._mark(cache))
        if why:
            cache.trust.resume(now_s)
            cache.events.forget()
            self._precise.resume(cache.slot)
            log.info("KV events of %s are gone by again: %s", cache.name, why)

    def _mark(self, cache: CacheOf) -> tuple[int, ...]:
        return self._precise.emptied(cache.slot), *cache.mark

    # -- what no request shows

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(CHECK_S)
            self._gather()
            for i, cache in enumerate(list(self.endpoints.values()), 1):
                if self.endpoints.get(cache.name) is cache:
                    self._check(cache)
                if not i % AT_ONCE:
                    await asyncio.sleep(0)

    def check(self) -> None:
        """Bring everything up to date: warnings, the engines' counters, and who is to be tried again."""
        self._gather()
        for cache in self.endpoints.values():
            self._check(cache)

    def _check(self, cache: CacheOf) -> None:
        now_s = self._clock()
        self._read_counters(cache)
        self._try_again(cache, now_s)
        self._look(cache, now_s)

    def _gather(self) -> None:
        by_name: dict[str, list[KvEventSource]] = {}
        for source in self._sources():
            by_name.setdefault(source.endpoint, []).append(source)
        for cache in self.endpoints.values():
            cache.sources = by_name.get(cache.name, ())

    def _read_counters(self, cache: CacheOf) -> None:
        endpoint = self._pool.members[cache.name].endpoint
        span = cache.spans.read(endpoint.metrics, endpoint.load)
        if span is None:
            return
        cache.last_span = span
        cache.by_counters.setdefault(span.view, Tally()).add(span.tally)
        if span.worse and not self._precise.offloads:
            self._set_aside(
                cache,
                f"{span.predicted:,} tokens were predicted to be cached and its counters tell of "
                f"{span.reported:,}, which what was sent there puts at {span.sent:,}",
            )

    def _look(self, cache: CacheOf, now_s: float) -> None:
        endpoint = self._pool.members[cache.name].endpoint
        evidence = cache.evidence(endpoint, self._precise.block_tokens(cache.slot), now_s)
        new, over = cache.warn(evidence, now_s)
        for name, says in new.items():
            log.warning("cache of %s: %s (%s)", cache.name, says, name)
        for name in over:
            log.info("cache of %s: %s is over", cache.name, name)


def _why(record: Record) -> str:
    """What the differences point to."""
    if 2 * record.unlike > record.requests:
        return OTHER_TOKENS
    return HOLDS_MORE if record.reported_tokens > record.predicted_tokens else HOLDS_LESS
