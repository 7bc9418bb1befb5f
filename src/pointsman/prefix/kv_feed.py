"""The sources of one endpoint, one for each data-parallel rank, and the index that hears of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from pointsman.prefix.kv_addresses import SourceAddress
from pointsman.prefix.kv_source import KvEventSource, Source, Timing
from pointsman.prefix.kv_wire import Event
from pointsman.types import Clock

log = logging.getLogger(__name__)

WARN_EVERY_S = 60.0
Take = Callable[[list[bytes]], None]


class Sink(Protocol):
    """Who is told what endpoints hold; each endpoint by its slot."""

    def add(self, slot: int) -> None:
        """Events of this endpoint come from now on."""

    def remove(self, slot: int) -> None:
        """It has left."""

    def clear(self, slot: int) -> None:
        """It holds nothing any more."""

    def missed(self, slot: int) -> None:
        """Some of its events are not known: it may hold more than those that follow say."""

    def apply(self, slot: int, events: Sequence[Event], now_s: float) -> None:
        """This happened there, in this order."""


class Closable(Protocol):
    def close(self) -> None: ...


class Sockets(Protocol):
    """``kv_socket.ZmqSockets``, without its library."""

    def subscribe(
        self, address: str, topic: str, take: Take, connected: Callable[[bool], None]
    ) -> Closable: ...

    def ask(self, address: str, start: int, take: Take) -> Closable: ...


class _Wired:
    """A source and what is open for it."""

    __slots__ = ("answers", "at", "source", "subscription")

    def __init__(self, at: SourceAddress, source: Source) -> None:
        self.at = at
        self.source = source
        self.subscription: Closable | None = None
        self.answers: Closable | None = None

    def close(self) -> None:
        for each in (self.subscription, self.answers):
            if each:
                each.close()


class Feed:
    """What one endpoint publishes (``kv_source.Owner`` of its sources)."""

    def __init__(
        self, name: str, slot: int, sink: Sink, sockets: Sockets, clock: Clock, timing: Timing
    ) -> None:
        self.name = name
        self._slot = slot
        self._sink = sink
        self._sockets = sockets
        self._clock = clock
        self._timing = timing
        self._warn_at_s = float("-inf")
        self._fed = False
        """The sink knows of this endpoint."""
        self._addresses: Sequence[SourceAddress] = ()
        self._wired: dict[int, _Wired] = {}

    # -- its life

    def publishes_at(self, addresses: Sequence[SourceAddress]) -> None:
        """From now on its events come from there, or the engine sends them to us: then it is asked at once
        for what it has told already.
        """
        if addresses == self._addresses:
            return
        self._close()
        self._addresses = addresses
        for at in addresses:
            wired = self._wire(at)
            if at.address:
                wired.subscription = self._sockets.subscribe(
                    at.address, at.topic, wired.source.take, wired.source.connection
                )
            else:
                wired.source.begin()

    def arrived(self, rank: int, parts: list[bytes]) -> None:
        """A message that the engine of this rank has sent to us."""
        wired = self._wired.get(rank)
        if wired is None:
            replay = next((at.replay for at in self._addresses if at.rank == rank), "")
            wired = self._wire(SourceAddress(rank, "", replay, ""))
        wired.source.take(parts)

    def restart(self) -> None:
        """The endpoint's engine has started anew, or was away."""
        self._clear()
        for wired in list(self._wired.values()):
            wired.source.begin_again()

    def tick(self) -> None:
        for wired in list(self._wired.values()):
            wired.source.tick()

    def leave(self) -> None:
        self._close()
        if self._fed:
            self._sink.remove(self._slot)

    def sources(self) -> Iterator[KvEventSource]:
        for wired in self._wired.values():
            yield wired.source.snapshot(self.name, wired.at.address, wired.at.replay)

    # -- what its sources say

    def apply(self, events: Sequence[Event]) -> None:
        self._feed()
        self._sink.apply(self._slot, events, self._clock())

    def begun_late(self) -> None:
        self._feed()
        self._sink.missed(self._slot)

    def lost(self, source: Source) -> None:
        if self._clock() >= self._warn_at_s:
            self._warn_at_s = self._clock() + WARN_EVERY_S
            log.warning(
                "KV events of %s (rank %d) were missed for good: what it holds is known in part from now on",
                self.name,
                source.rank,
            )
        self._feed()
        self._sink.missed(self._slot)
        for wired in list(self._wired.values()):
            if wired.source is not source:
                wired.source.refill()

    def restarted(self, source: Source) -> None:
        log.info("the engine of %s (rank %d) has started anew", self.name, source.rank)
        self.restart()

    def replay(self, source: Source, start: int) -> None:
        wired = self._wired[source.rank]
        if wired.answers:
            wired.answers.close()
        wired.answers = self._sockets.ask(wired.at.replay, start, source.replayed)

    def replay_ended(self, source: Source) -> None:
        wired = self._wired[source.rank]
        if wired.answers:
            wired.answers.close()
            wired.answers = None

    # --

    def _wire(self, at: SourceAddress) -> _Wired:
        source = Source(at.rank, self, self._clock, self._timing, can_replay=bool(at.replay))
        wired = self._wired[at.rank] = _Wired(at, source)
        return wired

    def _feed(self) -> None:
        if not self._fed:
            self._fed = True
            self._sink.add(self._slot)

    def _clear(self) -> None:
        if self._fed:
            self._sink.clear(self._slot)

    def _close(self) -> None:
        for wired in self._wired.values():
            wired.close()
        self._wired = {}
