"""How the router reads the servers' metrics in virtual time: as late as ``endpoints.metrics.scraper`` is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pointsman.config import MetricsSettings
from pointsman.endpoints.metrics.scraper import DOWN_INTERVAL_S, PHASES
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.unseen import Asked, asked
from pointsman.twin.events import Events
from pointsman.twin.server import ModelServer
from pointsman.types import Metrics

IDLE_INTERVAL_S = MetricsSettings().idle_interval_s
SLACK = 10
"""How many times less often pages are read while a stage drains and nothing is decided."""


class Scraping:
    """Neighbours are read at different moments, busy endpoints every ``interval_s``, idle ones seldom.

    All ``pools`` are told of one reading, ``view_s`` later: routers that read for themselves would see as
    much.
    """

    def __init__(
        self,
        events: Events,
        pools: Sequence[Pool],
        servers: Mapping[str, ModelServer],
        interval_s: float,
        view_s: float = 0.0,
    ) -> None:
        self._events = events
        self._pools = pools
        self._view_s = view_s
        self._servers = servers
        self._interval_s = interval_s
        self._stages = 0
        self._slack = 1
        self._usage: dict[str, tuple[int, float, float]] = {}
        names = list(servers)
        self._phases = [phase for i in range(PHASES) if (phase := names[i::PHASES])]

    def begin(self) -> None:
        """A stage begins: read from now on."""
        self._stages += 1
        self._slack = 1
        self._usage.clear()
        for i, names in enumerate(self._phases):
            first_s = self._events.now_s + i / len(self._phases) * self._interval_s
            self._events.at(first_s, self._tick, names, self._stages)

    def slacken(self) -> None:
        """Until the next stage nothing will be decided: what is read is for the figures alone."""
        self._slack = SLACK

    def end(self) -> None:
        """Nobody asks for anything until the next stage."""
        self._stages += 1

    def kv_usage(self, name: str) -> tuple[float, float]:
        """Mean and highest KV usage of a server in this stage, as read while it had requests."""
        reads, total, most = self._usage.get(name, (1, 0.0, 0.0))
        return total / reads, most

    def read(self, name: str) -> None:
        """Read this server's page, if it answers."""
        server = self._servers[name]
        server.scraped_s = self._events.now_s
        if not server.up:
            for pool in self._pools:
                pool.unreachable(name)
            return
        metrics = server.metrics()
        restarted, server.restarted = server.restarted, False
        in_flight = [asked(pool.members[name].endpoint.load) for pool in self._pools]
        if self._view_s:
            self._events.at(
                self._events.now_s + self._view_s, self._tell, name, metrics, restarted, in_flight
            )
        else:
            self._tell(name, metrics, restarted, in_flight)
        if metrics.running:
            reads, total, most = self._usage.get(name, (0, 0.0, 0.0))
            usage = metrics.kv_usage
            self._usage[name] = (reads + self._slack, total + usage * self._slack, max(most, usage))

    def _tell(self, name: str, metrics: Metrics, restarted: bool, in_flight: Sequence[Asked]) -> None:
        for pool, each in zip(self._pools, in_flight, strict=True):
            pool.learn_metrics(name, "vllm", metrics, restarted, each)

    def _tick(self, names: list[str], stage: int) -> None:
        if stage != self._stages:
            return
        now_s = self._events.now_s
        for name in names:
            members = [pool.members[name] for pool in self._pools if name in pool.members]
            if not members:
                continue
            if not any(member.reached for member in members):
                interval_s = DOWN_INTERVAL_S
            elif any(member.endpoint.load.requests for member in members):
                interval_s = self._interval_s
            else:
                interval_s = max(self._interval_s, IDLE_INTERVAL_S)
            if now_s >= self._servers[name].scraped_s + interval_s * 0.999:
                self.read(name)
        self._events.at(now_s + self._interval_s * self._slack, self._tick, names, stage)
