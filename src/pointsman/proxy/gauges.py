"""What the pool and the prefix index say of themselves at each scrape of our own metrics page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.metrics_core import Metric

from pointsman.endpoints.pool import Member, Pool
from pointsman.observability.telemetry import counter, gauge
from pointsman.prefix.approximate import PrefixIndex
from pointsman.types import Clock


class PoolGauges:
    """A source of further families (``telemetry.Gauges``)."""

    def __init__(self, pool: Pool, index: PrefixIndex, clock: Clock) -> None:
        self._pool = pool
        self._index = index
        self._clock = clock

    def __call__(self) -> Iterator[Metric]:
        members = list(self._pool.members.values())
        named = [((m.endpoint.name,), m) for m in members]
        yield gauge(
            "pointsman_endpoint_up",
            "1 when the endpoint takes requests, by breaker state.",
            ("endpoint", "breaker"),
            [((n, m.breaker.state.value), float(m.usable and m.reached)) for (n,), m in named],
        )
        yield gauge(
            "pointsman_inflight_requests",
            "Requests of ours at the endpoint.",
            ("endpoint",),
            [(n, m.endpoint.load.requests) for n, m in named],
        )
        yield gauge(
            "pointsman_inflight_uncached_tokens",
            "Their prompt tokens still to be computed.",
            ("endpoint",),
            [(n, m.endpoint.load.tokens) for n, m in named],
        )
        yield gauge(
            "pointsman_engine_waiting_requests",
            "Waiting at the engine, as it says.",
            ("endpoint",),
            [(n, m.endpoint.metrics.waiting) for n, m in named],
        )
        yield gauge(
            "pointsman_engine_kv_usage",
            "Share of KV blocks in use, as the engine says.",
            ("endpoint",),
            [(n, m.endpoint.metrics.kv_usage) for n, m in named],
        )
        yield from self._spending(members)
        yield gauge(
            "pointsman_prefix_index_bytes",
            "Memory charged to the prefix index.",
            (),
            [((), self._index.used_bytes)],
        )
        yield gauge(
            "pointsman_prefix_index_blocks",
            "Blocks indexed for the endpoint.",
            ("endpoint",),
            [(n, self._index.blocks(m.endpoint.slot)) for n, m in named],
        )

    def _spending(self, members: Sequence[Member]) -> Iterator[Metric]:
        """Of endpoints whose price or draw is known."""
        now_s = self._clock()
        for member in members:
            member.spending.advance(now_s)
        priced = [((m.endpoint.name,), m.spending) for m in members if m.spending.price_per_hour]
        drawing = [((m.endpoint.name,), m.spending) for m in members if m.spending.draw]
        yield gauge(
            "pointsman_endpoint_price_per_hour",
            "What the endpoint costs, in the currency of the settings.",
            ("endpoint",),
            [(n, spending.price_per_hour) for n, spending in priced],
        )
        yield gauge(
            "pointsman_endpoint_watts",
            "What the endpoint draws: as a page says, else as typed.",
            ("endpoint",),
            [(n, spending.draw) for n, spending in drawing],
        )
        yield counter(
            "pointsman_endpoint_cost",
            "Price of the time since the endpoint joined, in the currency of the settings.",
            ("endpoint",),
            {n: spending.spent for n, spending in priced},
        )
        yield counter(
            "pointsman_endpoint_energy_joules",
            "Drawn since the endpoint joined.",
            ("endpoint",),
            {n: spending.energy_j for n, spending in drawing},
        )
