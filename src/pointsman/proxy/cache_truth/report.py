"""What cache truth says: GET /cache, the lines in GET /endpoints, and the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from prometheus_client.metrics_core import Metric

from pointsman.endpoints.pool import Pool
from pointsman.observability.telemetry import counter, gauge
from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.precise import PreciseIndex
from pointsman.proxy.cache_truth.causes import CAUSES
from pointsman.proxy.cache_truth.counts import BOUND, RECENT, Record, Tally
from pointsman.proxy.cache_truth.endpoint import CacheOf
from pointsman.proxy.cache_truth.observer import CacheTruth
from pointsman.tokens.tokens import Tokens
from pointsman.types import Clock, Metrics

EVENTS, SENT = "events", "sent"
ANSWERS, COUNTERS = "answers", "counters"


class CacheReport:
    """Reads what the others keep; brings it up to date first."""

    def __init__(
        self,
        truth: CacheTruth,
        pool: Pool,
        index: PrefixIndex,
        precise: PreciseIndex,
        tokens: Tokens,
        clock: Clock,
    ) -> None:
        self._truth = truth
        self._pool = pool
        self._index = index
        self._precise = precise
        self._tokens = tokens
        self._clock = clock

    # -- the admin API

    def page(self) -> dict[str, Any]:
        """GET /cache."""
        self._truth.check()
        totals: dict[str, dict[str, Tally]] = {}
        for cache in self._truth.endpoints.values():
            for view, by, tally in _tallies(cache):
                totals.setdefault(view, {}).setdefault(by, Tally()).add(tally)
        precise, index = self._precise, self._index
        return {
            "total": {
                view: {by: _compared(tally) for by, tally in found.items()} for view, found in totals.items()
            },
            "index": {
                EVENTS: {
                    "bytes": precise.used_bytes,
                    "max_bytes": precise.max_bytes,
                    "evicted": precise.evicted,
                    "unknown_parents": precise.unknown,
                    "skipped": precise.skipped,
                },
                SENT: {"bytes": index.used_bytes, "max_bytes": index.max_bytes},
            },
            "tokens_compared": dict(self._tokens.compared),
            "endpoints": [self._endpoint(cache) for cache in self._truth.endpoints.values()],
        }

    def line(self, name: str) -> dict[str, Any] | None:
        """What GET /endpoints says of one."""
        cache = self._truth.endpoints.get(name)
        if cache is None:
            return None
        verdict, reason = self._verdict(cache)
        return {
            "view": self._view(cache),
            "verdict": verdict,
            "reason": reason,
            "warnings": sorted(cache.warnings),
        }

    def _endpoint(self, cache: CacheOf) -> dict[str, Any]:
        now_s, trust = self._clock(), cache.trust
        verdict, reason = self._verdict(cache)
        compared: dict[str, dict[str, Any]] = {}
        for view, by, tally in _tallies(cache):
            compared.setdefault(view, {})[by] = _compared(tally)
        return {
            "name": cache.name,
            "view": self._view(cache),
            "verdict": verdict,
            "reason": reason,
            "warnings": [
                {"cause": cause, "for_s": round(now_s - since_s, 1), "says": says}
                for cause, (since_s, says) in cache.warnings.items()
            ],
            "compared": compared,
            "recent": {EVENTS: _recent(cache.events), SENT: _recent(cache.sent)},
            "set_aside": {
                "times": trust.times,
                "last_reason": trust.reason or None,
                "again_in_s": None if trust.since_s is None else round(trust.again_s - now_s, 1),
            },
            "engine": _engine(self._pool.members[cache.name].endpoint.metrics),
            "index": {
                EVENTS: {
                    "blocks": self._precise.blocks(cache.slot),
                    "block_tokens": self._precise.block_tokens(cache.slot) or None,
                },
                SENT: {"blocks": self._index.blocks(cache.slot), "block_tokens": self._index.block_tokens},
            },
            "events": [
                {
                    **msgspec.to_builtins(source),
                    "last_event_s": None
                    if source.last_event_s is None
                    else round(now_s - source.last_event_s, 3),
                }
                for source in cache.sources
            ],
        }

    def _view(self, cache: CacheOf) -> str:
        return EVENTS if cache.slot in self._precise.slots else SENT

    def _verdict(self, cache: CacheOf) -> tuple[str, str]:
        if cache.trust.since_s is not None:
            again_s = cache.trust.again_s - self._clock()
            return "set aside", f"{cache.trust.reason}; tried again in {max(0.0, again_s):.0f} s"
        record = cache.events if self._view(cache) == EVENTS else cache.sent
        if record.requests < RECENT // 2:
            return "untested", f"{record.requests} answers so far that say what was cached"
        says = f"off by {record.error:.1%} of the prompt tokens over the last {record.requests} requests"
        if not record.off:
            return "agrees", says
        known = next((text for _, text in cache.warnings.values()), "")
        return "differs", f"{says}, more than {BOUND:.0%}" + (f"; {known}" if known else "")

    # -- metrics

    def metrics(self) -> Iterator[Metric]:
        """For the metrics page."""
        self._truth.check()
        caches = self._truth.endpoints.values()
        rows = [((c.name, view, by), tally) for c in caches for view, by, tally in _tallies(c)]
        for name, field, text in (
            (
                "requests",
                "requests",
                "Requests whose cached tokens, predicted and reported, were compared",
            ),
            ("prompt_tokens", "prompt_tokens", "Their prompt tokens"),
            ("predicted_tokens", "predicted_tokens", "Prompt tokens predicted to be cached"),
            ("reported_tokens", "reported_tokens", "Prompt tokens that were cached, as the engine says"),
            ("error_tokens", "error_tokens", "Differences of the two, without their sign"),
        ):
            yield counter(
                f"pointsman_cache_compared_{name}",
                f"{text}. Predicted by events or what was sent; told by answers or counters.",
                ("endpoint", "view", "by"),
                {labels: getattr(tally, field) for labels, tally in rows},
            )
        yield counter(
            "pointsman_cache_exact_requests",
            "Requests whose cached tokens were predicted to the token from KV events.",
            ("endpoint",),
            {(c.name,): c.events.total.exact for c in caches if c.events.total.requests},
        )
        yield gauge(
            "pointsman_cache_warning",
            "1 where predictions and the engine's cache do not fit, by likely cause.",
            ("endpoint", "cause"),
            [((c.name, cause), 1.0) for c in caches for cause in CAUSES if cause in c.warnings],
        )
        yield gauge(
            "pointsman_cache_events_set_aside",
            "1 while the endpoint's KV events are not gone by because they were wrong.",
            ("endpoint",),
            [((c.name,), float(c.trust.since_s is not None)) for c in caches if c.sources],
        )
        yield counter(
            "pointsman_cache_events_set_aside_times",
            "How often they were.",
            ("endpoint",),
            {(c.name,): c.trust.times for c in caches if c.sources},
        )
        yield from self._sources(caches)

    def _sources(self, caches: Iterable[CacheOf]) -> Iterator[Metric]:
        told = [((c.name,), c) for c in caches if c.sources]
        for name, fields, text in (
            ("taken", ("events",), "KV events taken in."),
            ("gaps", ("gaps",), "Times that messages of KV events were missing."),
            ("lost", ("cleared", "replays_failed"), "Times that they could not be had again."),
            ("restarts", ("restarts",), "Times that the numbers of KV events began anew."),
            ("unreadable", ("malformed", "skipped"), "Messages and events that could not be read."),
        ):
            yield counter(
                f"pointsman_kv_events_{name}",
                text,
                ("endpoint",),
                {labels: sum(getattr(s, f) for s in c.sources for f in fields) for labels, c in told},
            )
        yield gauge(
            "pointsman_kv_events_live",
            "Sources of KV events that are connected and up to date.",
            ("endpoint",),
            [(labels, sum(s.live for s in c.sources)) for labels, c in told],
        )
        yield gauge(
            "pointsman_block_index_blocks",
            "Blocks that the endpoint's engine has told of.",
            ("endpoint",),
            [(labels, self._precise.blocks(c.slot)) for labels, c in told],
        )
        yield gauge(
            "pointsman_block_index_bytes",
            "Memory charged to the index of blocks that engines tell of.",
            (),
            [((), self._precise.used_bytes)],
        )


def _tallies(cache: CacheOf) -> Iterator[tuple[str, str, Tally]]:
    """By view, and by what reported."""
    for view, record in ((EVENTS, cache.events), (SENT, cache.sent)):
        if record.total.requests:
            yield view, ANSWERS, record.total
    for view, tally in cache.by_counters.items():
        yield view, COUNTERS, tally


def _compared(tally: Tally) -> dict[str, Any]:
    share = tally.error_tokens / tally.prompt_tokens if tally.prompt_tokens else 0.0
    return {**msgspec.to_builtins(tally), "error": round(share, 4)}


def _recent(record: Record) -> dict[str, Any] | None:
    if not record.requests:
        return None
    return {
        "requests": record.requests,
        "error": round(record.error, 4),
        "error_by_sent": round(record.sent_error, 4),
        "other_prompt_tokens": record.unlike,
    }


def _engine(metrics: Metrics) -> dict[str, Any]:
    """What its metrics page says of its cache."""
    queries = metrics.prefix_queries
    return {
        "prefix_caching": metrics.prefix_caching,
        "block_tokens": metrics.block_tokens or None,
        "hit_rate": round(metrics.prefix_hits / queries, 4) if queries else None,
    }
