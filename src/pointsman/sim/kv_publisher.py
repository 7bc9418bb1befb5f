"""Publishes a simulated engine's KV events over ZMQ as vLLM 0.32.0 does: a moment after each step."""

from __future__ import annotations

import asyncio
from collections import deque

from pointsman.errors import SettingsError
from pointsman.sim.faults import Faults
from pointsman.sim.kv_journal import Event
from pointsman.sim.kv_layouts import Writer
from pointsman.sim.kv_messages import Messages
from pointsman.sim.kv_sockets import HWM, Sockets, beside, is_bound
from pointsman.sim.spec import KvEvents
from pointsman.types import Clock

REBIND_S = 0.01
MAX_QUEUE_SIZE = 100_000
"""What ``/kv_event_sources`` says of vLLM's queue; ours has no bound."""


class Publisher:
    """What one engine publishes, from ``open`` to ``close``; after a crash it is opened again. Of endpoints,
    ``*`` is ``host``.
    """

    def __init__(
        self, settings: KvEvents, writer: Writer, faults: Faults, host: str, clock: Clock, unix_s: Clock
    ) -> None:
        self._settings = settings
        self._rank = writer.rank
        self._messages = Messages(writer, settings.buffer_steps)
        self._faults = faults
        self._clock = clock
        self._unix_s = unix_s
        self._bound = is_bound(settings.endpoint)
        self._endpoint = _here(beside(settings.endpoint, self._rank), host)
        self._replay_endpoint = _here(beside(settings.replay_endpoint, self._rank), host)
        self._sockets: Sockets | None = None
        self._waiting: deque[tuple[float, list[Event]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    # life

    def open(self, topic: str) -> None:
        """Begin; ``topic`` is for settings without one. ``SettingsError`` when an endpoint cannot be had."""
        self._messages.topic = (self._settings.topic or topic).encode()
        self._connect()

    def reopen(self) -> None:
        """Begin again after ``close``, on the same ports, as soon as they can be had; else do nothing."""
        if self._sockets is not None or not self._messages.topic:
            return
        try:
            self._connect()
        except SettingsError:
            self._timer = asyncio.get_running_loop().call_later(REBIND_S, self.reopen)
        else:
            self._send_due()

    def close(self) -> None:
        """What has not been published is lost; the numbers begin anew."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._sockets is not None:
            self._sockets.close()
            self._sockets = None
        self._waiting.clear()
        self._messages.renumber()

    def renumber(self) -> None:
        """Begin at 0 again, with nothing to be had again."""
        self._messages.renumber()

    def _connect(self) -> None:
        self._sockets = Sockets(self._endpoint, self._bound, self._replay_endpoint, self._messages.since)
        self._endpoint, self._replay_endpoint = self._sockets.endpoint, self._sockets.replay_endpoint

    # events

    def publish(self, events: list[Event]) -> None:
        """Publish what a step brought, if anything, a moment later."""
        if not events or self._faults.events_stopped():
            return
        due_s = self._clock() + self._settings.delay_s + self._faults.events_delay_s()
        if self._waiting:
            due_s = max(due_s, self._waiting[-1][0])  # they stay in order
        self._waiting.append((due_s, events))
        if self._timer is None:
            self._send_due()

    def _send_due(self) -> None:
        self._timer = None
        while self._waiting and self._waiting[0][0] <= self._clock():
            self._send(self._waiting.popleft()[1])
        if self._waiting:
            wait_s = self._waiting[0][0] - self._clock()
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._send_due)

    def _send(self, events: list[Event]) -> None:
        assert self._sockets is not None
        message = self._messages.add(events, self._unix_s())
        if not self._faults.loses_events():
            self._sockets.send(message)

    # for everybody

    def __str__(self) -> str:
        """Where they are to be had."""
        verb = "at" if self._bound else "to"
        replay = f", again at {self._replay_endpoint}" if self._replay_endpoint else ""
        return f"{verb} {self._endpoint}{replay}, topic {self._messages.topic.decode()}"

    def sources(self) -> dict[str, object]:
        """What ``/kv_event_sources`` says. A bound port is told as vLLM has it, for all addresses."""
        return {
            str(self._rank): {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": _anywhere(self._endpoint) if self._bound else self._endpoint,
                "replay_endpoint": self._replay_endpoint or None,
                "buffer_steps": self._settings.buffer_steps,
                "hwm": HWM,
                "max_queue_size": MAX_QUEUE_SIZE,
                "topic": self._messages.topic.decode(),
            }
        }


def _here(endpoint: str, host: str) -> str:
    return endpoint.replace("*", f"[{host}]" if ":" in host else host, 1)


def _anywhere(endpoint: str) -> str:
    return f"tcp://*:{endpoint.rpartition(':')[2]}" if endpoint.startswith("tcp://") else endpoint
