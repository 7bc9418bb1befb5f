"""KV events of all endpoints of the pool: who publishes where, and what comes from there.

Each endpoint is asked once, and again after a restart, where it publishes (GET /kv_event_sources); of those
that do not know the question the settings tell. Engines may also connect to us; whose message is whose is
then told by its topic, ``kv@<endpoint>@<model>``.

One that sends nonsense is counted and otherwise like one that is silent: it costs its own entries.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from pointsman.config import KvEvents as Settings
from pointsman.endpoints.fetch import fetch
from pointsman.endpoints.pool import Member, Pool
from pointsman.errors import SettingsError
from pointsman.prefix.kv_addresses import MAX_RANKS, SourceAddress, configured, told
from pointsman.prefix.kv_feed import Closable, Feed, Sink, Sockets, Take
from pointsman.prefix.kv_source import KvEventSource, Timing
from pointsman.prefix.kv_wire import MalformedFrame, rank_of
from pointsman.types import Clock, Endpoint

log = logging.getLogger(__name__)

TICK_S = 0.25
ASK_AGAIN_S = 5.0
ASK_TIMEOUT_S = 5.0
EXTRA = "KV events need `pip install 'pointsman[kv-events]'`"


class _AllSockets(Sockets, Protocol):
    def listen(self, addresses: Sequence[str], topic: str, take: Take) -> Closable: ...

    def close(self) -> None: ...


class _Followed:
    """An endpoint of the pool and what is done about its events."""

    __slots__ = ("ask_at_s", "asking", "feed", "member")

    def __init__(self, member: Member, feed: Feed) -> None:
        self.member = member
        self.feed = feed
        self.ask_at_s = float("-inf")
        self.asking: asyncio.Task[None] | None = None


class KvEvents:
    """Keeps ``sink`` informed of what the pool's endpoints hold, while ``run`` runs.

    ``SettingsError`` where the settings want events and pyzmq is missing or the address to bind is taken.
    """

    def __init__(
        self, pool: Pool, settings: Settings, sink: Sink, clock: Clock, timing: Timing | None = None
    ) -> None:
        self.unknown = 0
        """Messages sent to us by engines that are not in the pool, or not as they should be."""
        self._pool = pool
        self._settings = settings
        self._sink = sink
        self._clock = clock
        self._timing = timing or Timing()
        self._sockets = _sockets(settings)
        self._inbox: Closable | None = None
        self._followed: dict[str, _Followed] = {}
        self._by_topic: dict[str, _Followed] = {}
        """By what topics may call them."""
        pool.listen(self._on_pool)

    def sources(self) -> Sequence[KvEventSource]:
        """Every source that is known now, whether anything has come from it or not."""
        return [source for followed in self._followed.values() for source in followed.feed.sources()]

    # -- life

    def start(self) -> None:
        """Listen, where engines are to connect to us."""
        settings = self._settings
        if settings.bind and self._sockets:
            base, _, port = settings.bind.rpartition(":")
            if not port.isdecimal() or not base.startswith("tcp://"):
                raise SettingsError(
                    f"kv_events.bind: {settings.bind}: write it as tcp://*:5557 or tcp://10.0.0.7:5557"
                )
            addresses = [f"{base}:{int(port) + rank}" for rank in range(settings.ranks)]
            try:
                self._inbox = self._sockets.listen(addresses, settings.topic, self._arrived)
            except SettingsError:
                self.close()
                raise

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self.tick()
                await asyncio.sleep(TICK_S)
        finally:
            self.close()

    def tick(self) -> None:
        """See to what is due."""
        now = self._clock()
        for name, followed in self._followed.items():
            followed.feed.tick()
            if followed.asking is None and now >= followed.ask_at_s:
                followed.asking = asyncio.get_running_loop().create_task(self._ask(name, followed))

    def close(self) -> None:
        for followed in self._followed.values():
            if followed.asking:
                followed.asking.cancel()
            followed.feed.leave()
        self._followed = {}
        if self._inbox:
            self._inbox.close()
        if self._sockets:
            self._sockets.close()

    # -- the pool

    def _on_pool(self, event: str, endpoint: Endpoint) -> None:
        name = endpoint.name
        if event == "joined" and self._sockets:
            member = self._pool.members[name]
            feed = Feed(name, endpoint.slot, self._sink, self._sockets, self._clock, self._timing)
            self._followed[name] = _Followed(member, feed)
            self._by_topic = self._topics()
        elif event == "left" and name in self._followed:
            followed = self._followed.pop(name)
            if followed.asking:
                followed.asking.cancel()
            followed.feed.leave()
            self._by_topic = self._topics()
        elif event == "restarted" and name in self._followed:
            followed = self._followed[name]
            followed.feed.restart()
            followed.ask_at_s = float("-inf")

    # -- where they publish

    async def _ask(self, name: str, followed: _Followed) -> None:
        target = followed.member.target
        path = target.url.prefix + "/kv_event_sources"
        followed.ask_at_s = float("inf")
        status, page = await fetch(target, target.url, path, ASK_TIMEOUT_S)
        followed.asking = None
        if self._followed.get(name) is not followed:
            return
        if not status or status >= 500:
            followed.ask_at_s = min(followed.ask_at_s, self._clock() + ASK_AGAIN_S)
            return
        known = told(page, target.connect_host) if status == 200 else None
        if known is None and (self._settings.mode == "all" or self._settings.bind):
            known = configured(self._settings, target.connect_host)
        followed.feed.publishes_at(known or ())
        self._complain(name, known)

    def _complain(self, name: str, known: Sequence[SourceAddress] | None) -> None:
        if not known and self._settings.mode == "all":
            log.warning("%s says that it publishes no KV events", name)
        if known and not self._settings.bind and not all(at.address for at in known):
            log.warning("the engine of %s connects to its subscriber: kv_events.bind must say where", name)

    # -- engines that connect to us

    def _arrived(self, parts: list[bytes]) -> None:
        followed = self._by_topic.get(_endpoint_in(parts[0]))
        try:
            rank = rank_of(parts[-1])
        except MalformedFrame:
            rank = 0
        if followed is None or not 0 <= rank < MAX_RANKS:
            self.unknown += 1
            return
        followed.feed.arrived(rank, parts)

    def _topics(self) -> dict[str, _Followed]:
        """Whom a topic may mean by its name, its address, or its host if there is only one endpoint."""
        found: dict[str, _Followed] = {}
        hosts = Counter(followed.member.target.connect_host for followed in self._followed.values())
        for name, followed in self._followed.items():
            target = followed.member.target
            host = target.connect_host
            address = f"[{host}]:{target.url.port}" if ":" in host else f"{host}:{target.url.port}"
            found |= dict.fromkeys((name, address, *((host,) if hosts[host] == 1 else ())), followed)
        return found


def _endpoint_in(topic: bytes) -> str:
    """Who sends it, of kv@<endpoint>@<model>; the model may have an @ in it."""
    return topic.decode(errors="replace").partition("@")[2].partition("@")[0]


def _sockets(settings: Settings) -> _AllSockets | None:
    """None where there are to be no events, or none are needed and pyzmq is missing."""
    if settings.mode == "none":
        return None
    try:
        from pointsman.prefix.kv_socket import ZmqSockets
    except ImportError as exc:
        if settings.mode == "all" or settings.bind:
            raise SettingsError(f"kv_events: {EXTRA}") from exc
        log.info("no KV events: %s", EXTRA)
        return None
    return ZmqSockets()
