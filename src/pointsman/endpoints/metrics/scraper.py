"""Reads the engines' metrics pages and model lists and tells the pool.

Endpoints with requests of ours are read every ``interval_s``, idle ones every ``idle_interval_s``, those that
nobody answers at every second. One timer serves all, and neighbours are read at different moments, so that a
hundred pages do not arrive in one burst.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import msgspec

from pointsman.config import MetricsSettings, split_url
from pointsman.endpoints.fetch import Fetcher, fetch
from pointsman.endpoints.metrics.mapping import PageReader
from pointsman.endpoints.metrics.power import PowerReader
from pointsman.endpoints.metrics.source import PageSource
from pointsman.endpoints.pool import Member, Pool
from pointsman.endpoints.target import Target
from pointsman.endpoints.unseen import Asked, asked
from pointsman.types import Clock, Endpoint

log = logging.getLogger(__name__)

TICK_S = 0.01
IDLE_TICK_S = 0.1
DOWN_INTERVAL_S = 1.0
MIN_MODELS_GAP_S = 1.0
WATTS_INTERVAL_S = 5.0
"""How often a page of power draw is read; exporters look at the cards seldom (dcgm-exporter: every 30 s)."""
WATTS = "watts"
"""The attribute under which llm-d's ``customMetrics`` may publish the draw."""
PHASES = 16


class _Watched:
    """What the scraper keeps of one endpoint."""

    __slots__ = (
        "asked",
        "fetcher",
        "has_page",
        "models_at",
        "page_at",
        "power",
        "power_at",
        "power_fetcher",
        "reader",
        "up",
    )

    def __init__(self, fetcher: Fetcher | None, page_at: float) -> None:
        self.fetcher = fetcher
        """None where no pages are read."""
        self.page_at = page_at
        """When the page was last asked for."""
        self.asked: Asked | None = None
        """And what was in flight there."""
        self.models_at = float("-inf")
        """The same for the model list."""
        self.reader: PageReader | None = None
        self.power: PowerReader | None = None
        """Of the draw, where an endpoint tells it."""
        self.power_fetcher: Fetcher | None = None
        """None where the draw is on the engine's own page, or nowhere."""
        self.power_at = float("-inf")
        self.has_page = True
        self.up = False
        """It was reached when last looked at."""

    def close(self) -> None:
        for fetcher in (self.fetcher, self.power_fetcher):
            if fetcher:
                fetcher.close()


class Scraper:
    """Keeps the pool's knowledge of its endpoints fresh while ``run`` runs.

    Without a ``source`` no pages are read; then the model lists tell whether an endpoint is there.
    """

    def __init__(
        self, pool: Pool, settings: MetricsSettings, clock: Clock, source: PageSource | None
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._clock = clock
        self._source = source
        self._watched: dict[str, _Watched] = {}
        self._lookups: dict[str, asyncio.Task[None]] = {}
        self._models_asked_at = float("-inf")
        self._refresh: asyncio.Task[None] | None = None
        pool.listen(self._on_pool)

    def _on_pool(self, event: str, endpoint: Endpoint) -> None:
        if event == "left" and endpoint.name in self._watched:
            self._watched.pop(endpoint.name).close()
            if endpoint.name in self._lookups:
                self._lookups.pop(endpoint.name).cancel()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:  # noqa: ASYNC110 - a clock tick, not a wait for somebody
                await asyncio.sleep(TICK_S if self.tick() else IDLE_TICK_S)
        finally:
            for watched in self._watched.values():
                watched.close()
            for task in self._lookups.values():
                task.cancel()
            if self._refresh:
                self._refresh.cancel()

    def tick(self) -> bool:
        """Start what is due. Returns whether any endpoint is busy."""
        now = self._clock()
        busy = False
        for i, (name, member) in enumerate(self._pool.members.items()):
            watched = self._watched.get(name) or self._watch(member, now, i)
            busy |= member.endpoint.load.requests > 0
            fetcher = watched.fetcher
            if fetcher and not fetcher.busy and now >= self._page_due(member, watched, now, i):
                watched.page_at = now
                watched.asked = asked(member.endpoint.load)
                fetcher.get()
            power = watched.power_fetcher
            if power and not power.busy and now >= watched.power_at + WATTS_INTERVAL_S:
                watched.power_at = now
                power.get()
            if name not in self._lookups and now >= self._models_due(member, watched):
                watched.models_at = now
                self._look_up(member)
        return busy

    def _page_due(self, member: Member, watched: _Watched, now: float, i: int) -> float:
        interval = self._settings.interval_s
        if not member.reached:
            return watched.page_at + DOWN_INTERVAL_S
        if not (member.endpoint.load.requests and watched.has_page):
            return watched.page_at + max(interval, self._settings.idle_interval_s)
        if now - watched.page_at > 2 * interval:  # it was idle until now, perhaps together with others
            watched.page_at = now - interval * (1 - i % PHASES / PHASES)
        return watched.page_at + interval

    def _models_due(self, member: Member, watched: _Watched) -> float:
        came_up = member.reached and not watched.up
        watched.up = member.reached
        if came_up:
            return float("-inf")  # what it serves may have changed while it was away
        if member.reached:
            return watched.models_at + self._settings.models_interval_s
        return watched.models_at + DOWN_INTERVAL_S if watched.fetcher is None else float("inf")

    def _watch(self, member: Member, now: float, i: int) -> _Watched:
        target, source = member.target, self._source
        fetcher = None
        if source:
            url = source.url(target)
            answer = partial(self._on_page, target.name)
            timeout_s = self._settings.timeout_s
            fetcher = Fetcher(target, url, url.prefix or "/", timeout_s, answer, source.access(target))
        # The first is due in a moment, each of a hundred neighbours in another.
        watched = _Watched(fetcher, now - DOWN_INTERVAL_S + i % 100 * TICK_S)
        settings = target.settings
        if settings.watts_url or settings.watts_metrics:
            watched.power = PowerReader(settings.watts_metrics)
        if settings.watts_url:
            watched.power_fetcher = self._power_fetcher(target)
        self._watched[target.name] = watched
        return watched

    def _power_fetcher(self, target: Target) -> Fetcher:
        """The page is somebody else's: the endpoint's credentials are not for it."""
        url = split_url(target.settings.watts_url, "endpoints.watts_url")
        access = msgspec.structs.replace(target.settings, api_key="", api_key_env="", headers={})
        answer = partial(self._on_power, target.name)
        return Fetcher(target, url, url.prefix or "/", self._settings.timeout_s, answer, access)

    def _on_power(self, name: str, status: int, body: bytes) -> None:
        watched = self._watched.get(name)
        if status == 200 and watched is not None:
            self._read_power(name, watched, body)

    def _read_power(self, name: str, watched: _Watched, page: bytes) -> None:
        watts = watched.power.read(page) if watched.power else None
        if watts is not None:
            self._pool.learn_watts(name, watts)

    def _on_page(self, name: str, status: int, body: bytes) -> None:
        watched, member, source = self._watched.get(name), self._pool.members.get(name), self._source
        if watched is None or member is None or source is None:
            return
        if status == 0:
            if body == b"connect":
                watched.reader = None  # another engine may come back there
                self._pool.unreachable(name)
            return
        if status != 200:
            self._no_page(watched, member, f"answers {status}")
            return
        if watched.reader is None:
            engine = source.engine(member.endpoint, body)
            if engine is None:
                self._no_page(watched, member, "has none of the metrics we know")
                return
            watched.reader = PageReader(engine)
        watched.has_page = True
        metrics, restarted = watched.reader.read(body, self._clock())
        if restarted:
            watched.models_at = float("-inf")
        self._pool.learn_metrics(name, watched.reader.engine.engine, metrics, restarted, watched.asked)
        if WATTS in metrics.attributes:
            self._pool.learn_watts(name, metrics.attributes[WATTS])
        elif watched.power and not watched.power_fetcher:
            self._read_power(name, watched, body)

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

    def _look_up(self, member: Member) -> None:
        name = member.target.name
        task = self._lookups[name] = asyncio.get_running_loop().create_task(self._models(member))
        task.add_done_callback(partial(self._looked_up, name))

    def _looked_up(self, name: str, task: asyncio.Task[None]) -> None:
        if self._lookups.get(name) is task:
            del self._lookups[name]

    async def _models(self, member: Member) -> None:
        target = member.target
        path = target.url.prefix + "/v1/models"
        status, body = await fetch(target, target.url, path, self._settings.timeout_s)
        if self._pool.members.get(target.name) is not member:
            return
        if status == 200:
            self._pool.learn_models(target.name, _entries(body))
        elif status:
            self._pool.reached(target.name)
        elif body == b"connect":
            self._pool.unreachable(target.name)

    async def refresh_models(self) -> None:
        """Read every reachable endpoint's model list again, unless that was done within the last second;
        whoever asks while it is being done waits for it, too.
        """
        now = self._clock()
        if now - self._models_asked_at >= MIN_MODELS_GAP_S:
            self._models_asked_at = now
            reached = [m for m in self._pool.members.values() if m.reached]
            self._refresh = asyncio.get_running_loop().create_task(self.learn(reached))
        if self._refresh:
            await asyncio.shield(self._refresh)

    async def learn(self, members: Iterable[Member]) -> None:
        """Read models and metrics of these endpoints now."""
        await asyncio.gather(*(self._learn(member) for member in list(members)))

    async def _learn(self, member: Member) -> None:
        name, now = member.target.name, self._clock()
        watched = self._watched.get(name) or self._watch(member, now, 0)
        if self._source:
            watched.page_at = now
            watched.asked = asked(member.endpoint.load)
            url = self._source.url(member.target)
            access, timeout_s = self._source.access(member.target), self._settings.timeout_s
            self._on_page(name, *await fetch(member.target, url, url.prefix or "/", timeout_s, access))
        watched.models_at, watched.up = now, True
        await self._models(member)


def _entries(body: bytes) -> list[dict[str, Any]]:
    try:
        tree = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return []
    data = tree.get("data") if isinstance(tree, dict) else None
    return [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
