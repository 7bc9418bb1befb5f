"""Reads the engines' metrics pages and model lists and tells the pool.

Endpoints with requests of ours are read every ``interval_s``, idle ones every ``idle_interval_s``, those that
nobody answers at every second. One timer serves all, and neighbours are read at different moments, so that a
hundred pages do not arrive in one burst.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import pkgutil
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import msgspec

from pointsman.config import MetricsSettings
from pointsman.endpoints.fetch import Fetcher, fetch
from pointsman.endpoints.metrics.mapping import EngineMetrics, PageReader, recognise
from pointsman.endpoints.pool import Member, Pool
from pointsman.types import Clock, Endpoint

log = logging.getLogger(__name__)

TICK_S = 0.01
IDLE_TICK_S = 0.1
DOWN_INTERVAL_S = 1.0
MIN_MODELS_GAP_S = 1.0


def engines() -> list[EngineMetrics]:
    """Every mapping in this folder."""
    package = importlib.import_module("pointsman.endpoints.metrics")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return [
        found for module in modules for found in vars(module).values() if isinstance(found, EngineMetrics)
    ]


class _Watched:
    """What the scraper keeps of one endpoint."""

    __slots__ = ("fetcher", "has_page", "models_at", "next_at", "reader")

    def __init__(self, fetcher: Fetcher, next_at: float) -> None:
        self.fetcher = fetcher
        self.next_at = next_at
        self.models_at = 0.0
        self.reader: PageReader | None = None
        self.has_page = True


class Scraper:
    """Keeps the pool's knowledge of its endpoints fresh while ``run`` runs."""

    def __init__(
        self, pool: Pool, settings: MetricsSettings, clock: Clock, engines: Sequence[EngineMetrics]
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._clock = clock
        self._engines = engines
        self._watched: dict[str, _Watched] = {}
        self._lookups: dict[str, asyncio.Task[None]] = {}
        self._models_asked_at = 0.0
        pool.listen(self._on_pool)

    def _on_pool(self, event: str, endpoint: Endpoint) -> None:
        if event == "left" and endpoint.name in self._watched:
            self._watched.pop(endpoint.name).fetcher.close()
            if endpoint.name in self._lookups:
                self._lookups.pop(endpoint.name).cancel()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:  # noqa: ASYNC110 - a clock tick, not a wait for somebody
                await asyncio.sleep(TICK_S if self.tick() else IDLE_TICK_S)
        finally:
            for watched in self._watched.values():
                watched.fetcher.close()
            for task in self._lookups.values():
                task.cancel()

    def tick(self) -> bool:
        """Start what is due. Returns whether any endpoint is busy."""
        now = self._clock()
        busy = False
        interval = self._settings.interval_s
        for i, (name, member) in enumerate(self._pool.members.items()):
            watched = self._watched.get(name) or self._watch(member, now, i)
            loaded = member.endpoint.load.requests > 0
            busy |= loaded
            due = watched.next_at
            if loaded and member.reached and due - now > interval:
                due = (
                    now + interval * (i % 16) / 16
                )  # it was idle until now: do not wait for the idle interval
                watched.next_at = due
            if now >= due and not watched.fetcher.busy:
                watched.next_at = now + (
                    DOWN_INTERVAL_S
                    if not member.reached
                    else interval
                    if loaded and watched.has_page
                    else self._settings.idle_interval_s
                )
                watched.fetcher.get()
            if member.reached and now >= watched.models_at and name not in self._lookups:
                self._look_up(member, watched)
        return busy

    def _watch(self, member: Member, now: float, i: int) -> _Watched:
        target = member.target
        answer = partial(self._on_page, target.name)
        path = target.metrics.prefix or "/"
        fetcher = Fetcher(target, target.metrics, path, self._settings.timeout_s, answer)
        watched = self._watched[target.name] = _Watched(fetcher, now + (i % 100) * TICK_S)
        return watched

    def _on_page(self, name: str, status: int, body: bytes) -> None:
        watched, member = self._watched.get(name), self._pool.members.get(name)
        if watched is None or member is None:
            return
        if status == 0:
            if body == b"connect":
                watched.models_at = 0.0
                self._pool.unreachable(name)
            return
        if status != 200:
            self._no_page(watched, member, f"answers {status}")
            return
        if watched.reader is None:
            engine = recognise(body, self._engines)
            if engine is None:
                self._no_page(watched, member, "has none of the metrics we know")
                return
            watched.reader = PageReader(engine)
        watched.has_page = True
        metrics, restarted = watched.reader.read(body, self._clock())
        if restarted:
            watched.models_at = 0.0
        self._pool.learn_metrics(name, watched.reader.engine.engine, metrics, restarted)

    def _no_page(self, watched: _Watched, member: Member, why: str) -> None:
        """It answers, so it is up; we do without its metrics and ask seldom."""
        if watched.has_page:
            log.warning(
                "no metrics from %s: its metrics page %s; routing by our own counters",
                member.target.name,
                why,
            )
        watched.has_page = False
        self._pool.reached(member.target.name)

    # -- models

    def _look_up(self, member: Member, watched: _Watched) -> None:
        name = member.target.name
        watched.models_at = self._clock() + self._settings.models_interval_s
        task = self._lookups[name] = asyncio.get_running_loop().create_task(self._models(member))
        task.add_done_callback(lambda _task: self._lookups.pop(name, None))

    async def _models(self, member: Member) -> None:
        target = member.target
        status, body = await fetch(
            target, target.url, target.url.prefix + "/v1/models", self._settings.timeout_s
        )
        if status == 200:
            self._pool.learn_models(member.target.name, _entries(body))

    async def refresh_models(self) -> None:
        """Read every reachable endpoint's model list again, unless that was done within the last second."""
        now = self._clock()
        if now - self._models_asked_at < MIN_MODELS_GAP_S:
            return
        self._models_asked_at = now
        await self.learn(m for m in self._pool.members.values() if m.reached)

    async def learn(self, members: Iterable[Member]) -> None:
        """Read models and metrics of these endpoints now."""
        await asyncio.gather(*(self._learn(member) for member in list(members)))

    async def _learn(self, member: Member) -> None:
        self._watched.get(member.target.name) or self._watch(member, self._clock(), 0)
        target = member.target
        timeout_s = self._settings.timeout_s
        page = await fetch(target, target.metrics, target.metrics.prefix or "/", timeout_s)
        self._on_page(target.name, *page)
        await self._models(member)


def _entries(body: bytes) -> list[dict[str, Any]]:
    try:
        tree = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return []
    data = tree.get("data") if isinstance(tree, dict) else None
    return [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
