"""Publishes a simulated engine's KV events as vLLM 0.32.0 does: numbered messages that can be had again.

A message has three parts: topic, number (8 bytes, big-endian, from 0 at each start) and payload. Who missed
some asks for all from a number on, and gets what is kept and an end marker.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator

from pointsman.errors import SettingsError
from pointsman.sim.faults import Faults
from pointsman.sim.kv_journal import Event
from pointsman.sim.kv_layouts import Writer
from pointsman.sim.kv_sockets import HWM, Parts, Sockets, beside, is_bound
from pointsman.sim.spec import KvEvents
from pointsman.types import Clock

END = b"\xff" * 8
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
        self._writer = writer
        self._faults = faults
        self._clock = clock
        self._unix_s = unix_s
        self._bound = is_bound(settings.endpoint)
        self._endpoint = _here(beside(settings.endpoint, writer.rank), host)
        self._replay_endpoint = _here(beside(settings.replay_endpoint, writer.rank), host)
        self._topic = b""
        self._sockets: Sockets | None = None
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=settings.buffer_steps)
        self._waiting: deque[tuple[float, list[Event]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._number = 0

    # life

    def open(self, topic: str) -> None:
        """Begin; ``topic`` is for settings without one. ``SettingsError`` when an endpoint cannot be had."""
        self._topic = (self._settings.topic or topic).encode()
        self._connect()

    def reopen(self) -> None:
        """Begin again after ``close``, on the same ports, as soon as they can be had; else do nothing."""
        if self._sockets is not None or not self._topic:
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
        self.renumber()

    def renumber(self) -> None:
        """Begin at 0 again, with nothing to be had again."""
        self._number = 0
        self._kept.clear()

    def _connect(self) -> None:
        self._sockets = Sockets(self._endpoint, self._bound, self._replay_endpoint, self._replay)
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
        payload = self._writer.payload(self._unix_s(), events)
        number = self._number.to_bytes(8, "big")
        self._number += 1
        self._kept.append((number, payload))
        if not self._faults.loses_events():
            self._sockets.send((self._topic, number, payload))

    def _replay(self, start: int) -> Iterator[Parts]:
        topic = () if self._settings.layout == "batch-map" else (self._topic,)
        for number, payload in tuple(self._kept):
            if int.from_bytes(number, "big") >= start:
                yield (*topic, number, payload)
        yield (*(b"" for _ in topic), END, b"")

    # for everybody

    def __str__(self) -> str:
        """Where they are to be had."""
        verb = "at" if self._bound else "to"
        replay = f", again at {self._replay_endpoint}" if self._replay_endpoint else ""
        return f"{verb} {self._endpoint}{replay}, topic {self._topic.decode()}"

    def sources(self) -> dict[str, object]:
        """What ``/kv_event_sources`` says. A bound port is told as vLLM has it, for all addresses."""
        return {
            str(self._writer.rank): {
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": _anywhere(self._endpoint) if self._bound else self._endpoint,
                "replay_endpoint": self._replay_endpoint or None,
                "buffer_steps": self._settings.buffer_steps,
                "hwm": HWM,
                "max_queue_size": MAX_QUEUE_SIZE,
                "topic": self._topic.decode(),
            }
        }


def _here(endpoint: str, host: str) -> str:
    return endpoint.replace("*", f"[{host}]" if ":" in host else host, 1)


def _anywhere(endpoint: str) -> str:
    return f"tcp://*:{endpoint.rpartition(':')[2]}" if endpoint.startswith("tcp://") else endpoint
