"""``pointsman serve`` as an object: every part built once and handed to those who need it."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TextIO

from prometheus_client.metrics_core import Metric

from pointsman.config import Settings, read_text
from pointsman.endpoints.discovery.watch import Discovery
from pointsman.endpoints.metrics.scraper import Scraper
from pointsman.endpoints.pool import Member, Pool
from pointsman.errors import ModelNotFound, NoEndpoints, SettingsError
from pointsman.observability.access_log import AccessLog
from pointsman.observability.decisions import DecisionRing
from pointsman.observability.telemetry import Telemetry, counter, gauge
from pointsman.predictor.speed import SAMPLE_S
from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.follow import follow
from pointsman.proxy.admin import Admin
from pointsman.proxy.data_layer import discovery_settings, metrics_settings, page_source
from pointsman.proxy.gateway import Gateway
from pointsman.proxy.learned_file import LearnedFile
from pointsman.proxy.plane import Plane
from pointsman.proxy.tracing import Tracing
from pointsman.router import Observer, Router
from pointsman.scheduling.classes import parameters
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.picker_config import LoadedConfig
from pointsman.scheduling.presets import build_scheduler, load_policy
from pointsman.types import Clock, Endpoint


def policy_of(settings: Settings) -> LoadedConfig:
    """The preset, or the picker configuration, that the settings name."""
    scheduling = settings.scheduling
    where = scheduling.picker_config
    return load_policy(
        scheduling.preset,
        picker_config=read_text(Path(where)) if where else None,
        parameters=parameters(scheduling),
        session_headers=scheduling.session_headers,
        session_cookies=scheduling.session_cookies,
    )


class Application:
    """The gateway with everything it stands on. ``running`` is its whole life."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock = time.monotonic,
        out: TextIO | None = None,
        wall: Clock = time.time,
    ) -> None:
        self.settings = settings
        self.pool = Pool(clock, settings.breaker, settings.running_costs)
        self.index = PrefixIndex(
            max_bytes=settings.prefix.max_bytes, max_prefix_tokens=settings.prefix.max_prefix_tokens
        )
        follow(self.index, self.pool, fixed_block_tokens=settings.prefix.block_tokens)
        services = Services(self.index, clock, random.Random(settings.scheduling.seed))
        policy = policy_of(settings)
        self.scheduler = scheduler = build_scheduler(policy, services)
        learned = settings.learned
        self.learned_file = LearnedFile(learned, self.pool, scheduler, wall) if learned.path else None
        self.telemetry = Telemetry(self._gauges)
        self.pool.listen(self._on_pool)
        self.decisions = DecisionRing(settings.decisions.keep)
        self.access_log = AccessLog(out or sys.stdout)
        observers: list[Observer] = [self.telemetry, self.decisions]
        if settings.log.requests:
            observers.append(self.access_log)
        self.tracing = Tracing(settings, self.pool, scheduler, clock) if settings.trace.path else None
        if self.tracing:
            observers.append(self.tracing.observer)
        self.router = Router(self.pool, scheduler, observers, policy.parsers)
        metrics = metrics_settings(policy, settings.metrics)
        self.scraper = Scraper(self.pool, metrics, clock, page_source(policy))
        discovery = discovery_settings(policy, settings.discovery)
        if not settings.endpoints and not discovery.file:
            raise SettingsError("endpoints: name at least one, as in `pointsman serve http://10.0.0.7:8000`")
        self.discovery = Discovery(self.pool, discovery, settings.endpoints)
        self.plane = Plane(settings, self.pool, self.router, clock)
        self.gateway = Gateway(self.plane, self.scraper.refresh_models)
        self.admin = Admin(
            settings,
            self.pool,
            clock,
            self.telemetry,
            self.decisions,
            self.plane.settle,
            lambda: self.pool.ready and not self.gateway.draining,
            lambda member: self.scraper.learn([member]),
            scheduler.learned,
        )
        self.port = 0
        self.admin_port = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Application]:
        """Learn the endpoints, listen, serve until the block ends, then drain."""
        await self.discovery.start()
        await self.scraper.learn(self.pool.members.values())
        if self.learned_file:
            await self.learned_file.load()
        if self.tracing:
            self.tracing.open()
        self.port = await self.gateway.start()
        self.admin_port = await self.admin.start()
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(part)
                for part in (
                    self.scraper.run(),
                    self.discovery.run(),
                    self.gateway.run(),
                    self.access_log.run(),
                    self._watch(),
                    *((self.tracing.run(),) if self.tracing else ()),
                    *((self.learned_file.run(),) if self.learned_file else ()),
                )
            ]
            try:
                yield self
                await self.gateway.drain()
                self.plane.settle()
                if self.learned_file:
                    await self.learned_file.save()
            finally:
                self.gateway.close()
                for task in running:
                    task.cancel()
                self.admin.close()

    async def _watch(self) -> None:
        """Let the policy learn from metrics while it decides little, until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            models = {min(m.endpoint.models or ("",)) for m in self.pool.members.values()}
            for model in models:
                with suppress(ModelNotFound, NoEndpoints):
                    endpoints = self.pool.candidates(model)
                    if any(e.load.requests or e.metrics.running for e in endpoints):
                        self.scheduler.watch(endpoints)

    def _on_pool(self, event: str, endpoint: Endpoint) -> None:
        if event == "left":
            self.telemetry.forget(endpoint.name)

    def _gauges(self) -> Iterator[Metric]:
        members = list(self.pool.members.values())
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
            [((), self.index.used_bytes)],
        )
        yield gauge(
            "pointsman_prefix_index_blocks",
            "Blocks indexed for the endpoint.",
            ("endpoint",),
            [(n, self.index.blocks(m.endpoint.slot)) for n, m in named],
        )

    def _spending(self, members: Sequence[Member]) -> Iterator[Metric]:
        """Of endpoints whose price or draw is known."""
        now_s = self.plane.clock()
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
