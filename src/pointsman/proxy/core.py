"""What every shell stands on: pool, prefix index, policy, router, and all that keeps them up to date or tells
of them.

A shell brings a front, which takes requests in: the gateway's data port, the picker's gRPC port.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Protocol, TextIO

from pointsman.config import Settings, read_text
from pointsman.endpoints.discovery.watch import Discovery
from pointsman.endpoints.metrics.scraper import Scraper
from pointsman.endpoints.pool import Pool
from pointsman.errors import ModelNotFound, NoEndpoints, SettingsError
from pointsman.observability.access_log import AccessLog
from pointsman.observability.decisions import DecisionRing
from pointsman.observability.telemetry import Gauges, Telemetry
from pointsman.predictor.speed import SAMPLE_S
from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.follow import follow
from pointsman.prefix.kv_events import KvEvents
from pointsman.prefix.precise import PreciseIndex
from pointsman.prefix.shared_blocks import SharedBlocks
from pointsman.proxy.admin import Admin
from pointsman.proxy.cache_truth.observer import CacheTruth
from pointsman.proxy.cache_truth.report import CacheReport
from pointsman.proxy.data_layer import discovery_settings, metrics_settings, page_source
from pointsman.proxy.gauges import PoolGauges
from pointsman.proxy.learned_file import LearnedFile
from pointsman.proxy.opening import Deciding
from pointsman.proxy.precise_policy import precise_index, shared_index, with_policy
from pointsman.proxy.tracing import Tracing
from pointsman.router import Observer, Router
from pointsman.scheduling.classes import parameters
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.picker_config import LoadedConfig
from pointsman.scheduling.presets import build_scheduler, load_policy
from pointsman.tokens.tokens import Tokens
from pointsman.types import Clock, Endpoint


class Front(Protocol):
    """Takes requests in and has the router decide on them."""

    @property
    def draining(self) -> bool:
        """Nothing new is taken."""

    async def start(self) -> int:
        """Listen; returns the port."""

    async def run(self) -> None:
        """What is to be done besides answering, until cancelled."""

    async def drain(self) -> None:
        """Take nothing new and let what runs end, within its time."""

    def settle(self) -> Awaitable[None] | None:
        """Tell the router of everything that is over: at once (None), or when what is returned is done."""

    def close(self) -> None:
        """Cut whatever is left."""


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


class Core:
    """Every shared part, built once and handed to those who need it. ``running`` is its whole life."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock = time.monotonic,
        out: TextIO | None = None,
        wall: Clock = time.time,
        *,
        sees_responses: bool = True,
        knows_models: bool = True,
    ) -> None:
        """``sees_responses``, ``knows_models``: of the router."""
        policy = policy_of(settings)
        self.settings = settings = with_policy(settings, policy)
        self.clock = clock
        self.pool = Pool(clock, settings.breaker, settings.running_costs)
        self.index = PrefixIndex(
            max_bytes=settings.prefix.max_bytes, max_prefix_tokens=settings.prefix.max_prefix_tokens
        )
        self.precise = precise_index(settings.kv_events.index_bytes, policy)
        size = settings.prefix.block_tokens
        follow(self.index, self.pool, fixed_block_tokens=size, precise=self.precise)
        shared = shared_index(settings.shared_index, policy)
        self.shared = SharedBlocks(self.precise, shared, self.pool, clock) if shared else None
        self.blocks: SharedBlocks | PreciseIndex = self.shared or self.precise
        """All that is known of what engines tell: ``precise``, and what is shared."""
        self.kv_events = KvEvents(self.pool, settings.kv_events, self.blocks, clock)
        self.tokens = Tokens(settings.tokens, self.pool)
        services = Services(self.index, clock, random.Random(settings.scheduling.seed), self.blocks)
        self.scheduler = scheduler = build_scheduler(policy, services)
        learned = settings.learned
        self.learned_file = LearnedFile(learned, self.pool, scheduler, wall) if learned.path else None
        self.cache_truth = CacheTruth(self.pool, self.precise, self.kv_events.sources, clock)
        self.cache_report = CacheReport(
            self.cache_truth, self.pool, self.index, self.precise, self.tokens, clock
        )
        gauges = PoolGauges(self.pool, self.index, clock)
        sources: list[Gauges] = [gauges, self.tokens.metrics, self.cache_report.metrics]
        if self.shared:
            sources.append(self.shared.metrics)
        self.telemetry = Telemetry(lambda: chain.from_iterable(source() for source in sources))
        self.pool.listen(self._on_pool)
        self.decisions = DecisionRing(settings.decisions.keep)
        self.access_log = AccessLog(out or sys.stdout)
        observers: list[Observer] = [self.telemetry, self.decisions, self.cache_truth]
        if settings.log.requests:
            observers.append(self.access_log)
        self.tracing = Tracing(settings, self.pool, scheduler, clock) if settings.trace.path else None
        if self.tracing:
            observers.append(self.tracing.observer)
        self.router = Router(
            self.pool,
            scheduler,
            observers,
            policy.parsers,
            sees_responses=sees_responses,
            knows_models=knows_models,
        )
        self.opening = Deciding(self.router, self.blocks, self.tokens, self.shared, settings.tokens.budget_s)
        metrics = metrics_settings(policy, settings.metrics)
        self.scraper = Scraper(self.pool, metrics, clock, page_source(policy))
        discovery = discovery_settings(policy, settings.discovery)
        if not settings.endpoints and not discovery.file:
            raise SettingsError("endpoints: name at least one, as in `pointsman serve http://10.0.0.7:8000`")
        self.discovery = Discovery(self.pool, discovery, settings.endpoints)
        self.port = 0
        self.admin_port = 0

    @asynccontextmanager
    async def running(self, front: Front) -> AsyncIterator[None]:
        """Learn the endpoints, listen, serve until the block ends, then drain."""
        admin = Admin(
            self.settings,
            self.pool,
            self.clock,
            self.telemetry,
            self.decisions,
            front.settle,
            lambda: self.pool.ready and not front.draining,
            lambda member: self.scraper.learn([member]),
            self.scheduler.learned,
            self.cache_report,
        )
        await self.discovery.start()
        await self.scraper.learn(self.pool.members.values())
        if self.learned_file:
            await self.learned_file.load()
        if self.tracing:
            self.tracing.open()
        self.kv_events.start()
        self.port = await front.start()
        self.admin_port = await admin.start()
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(part)
                for part in (
                    self.scraper.run(),
                    self.discovery.run(),
                    self.kv_events.run(),
                    self.cache_truth.run(),
                    front.run(),
                    self.access_log.run(),
                    self._watch(),
                    *((self.tracing.run(),) if self.tracing else ()),
                    *((self.learned_file.run(),) if self.learned_file else ()),
                    *((self.shared.run(),) if self.shared else ()),
                )
            ]
            try:
                yield
                await front.drain()
                settling = front.settle()
                if settling is not None:
                    await settling
                if self.learned_file:
                    await self.learned_file.save()
            finally:
                front.close()
                self.tokens.close()
                for task in running:
                    task.cancel()
                admin.close()

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
