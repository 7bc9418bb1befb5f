"""KV events in virtual time: the servers' messages, as late and as complete as the scenario has them, into
the shipped intake and index.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from pointsman.endpoints.pool import Pool
from pointsman.prefix.kv_addresses import SourceAddress
from pointsman.prefix.kv_events import TICK_S
from pointsman.prefix.kv_feed import Feed, Take
from pointsman.prefix.kv_source import Timing
from pointsman.prefix.precise import PreciseIndex
from pointsman.sim.kv_journal import Journal
from pointsman.sim.kv_layouts import Writer
from pointsman.sim.kv_messages import Messages, Parts
from pointsman.sim.kv_names import opaque
from pointsman.sim.spec import EngineSpec
from pointsman.twin.events import Events
from pointsman.types import Endpoint

KEPT_MESSAGES = 10_000
"""vLLM's ``buffer_steps``."""


class KvEvents(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Servers publish KV events, and the router knows the tokens of prompts: it routes by the precise
    index.
    """

    delay_s: Annotated[float, Meta(ge=0)] = 0.014
    """From the end of a step to the moment the router has its message."""
    loss: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Share of the messages that do not arrive."""
    replay: bool = True
    """Whether lost messages can be had again, once the next one has shown the gap. Else the server
    is known in part from then on.
    """


class Publishing:
    """What one server publishes."""

    def __init__(self, spec: EngineSpec, settings: KvEvents, events: Events, dice: random.Random) -> None:
        self.name = spec.name
        block_tokens = spec.parameters().block_tokens
        self._messages = Messages(
            Writer("map", block_tokens, dict.fromkeys(spec.loras), 0, int_hashes=True), KEPT_MESSAGES
        )
        self._settings = settings
        self._events = events
        self._dice = dice
        self._subscribers: dict[_Line, None] = {}
        self.up = True
        self.journal = Journal(opaque)

    def publish(self) -> None:
        """A step is over: tell what it changed, if anything."""
        told = self.journal.take()
        if not told:
            return
        message = self._messages.add(told, self._events.now_s)
        for line in self._subscribers:
            if self._dice.random() >= self._settings.loss:
                self._later(line, [message])

    def crash(self) -> None:
        """Its process is gone, and what it would have said."""
        self.up = False
        self._messages.renumber()
        self.journal = Journal(opaque)
        for line in self._subscribers:
            line.connected(False)

    def come_back(self) -> None:
        self.up = True
        for line in self._subscribers:
            line.connected(True)

    def subscribe(self, line: _Line) -> None:
        self._subscribers[line] = None
        if self.up:
            line.connected(True)

    def answer(self, line: _Line, start: int) -> None:
        """Send again what ``line`` asks for."""
        if self.up:
            self._later(line, [(b"", *parts) for parts in self._messages.since(start)])

    def _later(self, line: _Line, messages: list[Parts]) -> None:
        self._events.at(self._events.now_s + self._settings.delay_s, line.deliver, messages)


class _Line:
    """A connection to a server."""

    __slots__ = ("_open", "_take", "connected")

    def __init__(self, take: Take, connected: Callable[[bool], None] = lambda up: None) -> None:
        self._take = take
        self._open = True
        self.connected = connected

    def deliver(self, messages: list[Parts]) -> None:
        for parts in messages:
            if self._open:
                self._take(list(parts))

    def close(self) -> None:
        self._open = False
        self.connected = lambda up: None


class Wires:
    """From servers to routers (``kv_feed.Sockets``); a server's address is its name."""

    def __init__(self, publishing: Mapping[str, Publishing], settings: KvEvents, events: Events) -> None:
        self._publishing = publishing
        self._settings = settings
        self._events = events

    def subscribe(self, address: str, topic: str, take: Take, connected: Callable[[bool], None]) -> _Line:
        line = _Line(take, connected)
        self._publishing[address].subscribe(line)
        return line

    def ask(self, address: str, start: int, take: Take) -> _Line:
        line = _Line(take)
        self._publishing[address].answer(line, start)
        return line

    def follow(self, pool: Pool, index: PreciseIndex) -> None:
        """Keep ``index`` informed of the servers in ``pool``, as ``prefix.kv_events`` does."""
        feeds: dict[str, Feed] = {}

        def on_pool(event: str, endpoint: Endpoint) -> None:
            name = endpoint.name
            if event == "joined":
                feed = feeds[name] = Feed(name, endpoint.slot, index, self, self._events.clock, Timing())
                replay = name if self._settings.replay else ""
                feed.publishes_at([SourceAddress(0, name, replay, "")])
            elif event == "left" and name in feeds:
                feeds.pop(name).leave()
            elif event == "restarted" and name in feeds:
                feeds[name].restart()

        def tick() -> None:
            for feed in feeds.values():
                feed.tick()
            self._events.at(self._events.now_s + TICK_S, tick)

        pool.listen(on_pool)
        tick()
