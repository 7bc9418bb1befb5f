"""A worker's process: the gRPC port of ``picker`` on a scheduler that is elsewhere.

``python -m pointsman.extproc.worker FD DOORWAY``, started by ``proxy.workers.fleet``. It listens nowhere:
connections come through the doorway, already accepted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import ssl
import time

from msgspec.structs import astuple

from pointsman.config import Settings
from pointsman.extproc.access_log import AccessLogIntake
from pointsman.extproc.destinations import Destinations
from pointsman.extproc.grpc import GrpcServer
from pointsman.extproc.h2 import Connection
from pointsman.extproc.health import Health
from pointsman.extproc.port import HEALTH_NAMES, PROCESS, tell_health, tls_of
from pointsman.extproc.processor import Processor
from pointsman.extproc.xds import EndpointLists
from pointsman.proxy.workers.link import Link
from pointsman.proxy.workers.worker import run
from pointsman.router import Flight

log = logging.getLogger(__name__)

SWEEP_S = 0.25
MAX_PASSED = 64
"""Connections taken in one turn."""


class Handing:
    """Requests whose responses nobody sees: the scheduler follows them (``completions.HandedOver``)."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._count = 0
        self._process = f"{os.getpid():x}"

    def name(self) -> str:
        """A new name, which no other worker gives."""
        self._count += 1
        return f"{self._process}.{self._count:x}"

    def add(self, name: str, flight: Flight, started_s: float) -> None:
        self._link.hand_over(flight, name, started_s)


class PickerWorker:
    """What a worker answers with (``worker.Serving``)."""

    def __init__(self, settings: Settings, link: Link, doorway: socket.socket) -> None:
        self._settings = settings
        self._link = link
        self._doorway = doorway
        picker = settings.picker
        self._destinations = Destinations(link.pool)
        processor = Processor(
            link,
            link,
            self._destinations,
            Handing(link),
            time.monotonic,
            random.Random(settings.scheduling.seed),
            responses=picker.responses,
            max_body_bytes=settings.server.body_bytes,
            subsets=picker.subsets,
            emits_scores=picker.scores,
        )
        self._log = AccessLogIntake(lambda told: link.line(astuple(told)))
        self._lists = EndpointLists(link.pool, self._destinations)
        self._health = Health(HEALTH_NAMES)
        self._server = GrpcServer(
            {
                PROCESS: processor,
                **self._health.services(),
                **self._log.services,
                **self._lists.services,
            },
            max_message_bytes=picker.message_bytes,
        )
        self._tls: ssl.SSLContext | None = None
        self._draining = False
        self._taking: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Take connections; ``SettingsError`` when that cannot be."""
        await self._destinations.resolve()
        self._lists.renew()
        self._tell_health()
        self._tls, self._certificate = tls_of(self._settings.picker)
        if self._tls:
            self._tls.set_alpn_protocols(["h2"])
        self._link.connections = lambda: len(self._server.connections) + len(self._taking)
        self._doorway.setblocking(False)
        asyncio.get_running_loop().add_reader(self._doorway, self._take)

    def _take(self) -> None:
        for _ in range(MAX_PASSED):
            try:
                _, fds, _, _ = socket.recv_fds(self._doorway, 1, 1)
            except BlockingIOError:
                return
            if not fds:  # the scheduler is gone
                asyncio.get_running_loop().remove_reader(self._doorway)
                return
            task = asyncio.get_running_loop().create_task(self._serve(socket.socket(fileno=fds[0])))
            self._taking.add(task)
            task.add_done_callback(self._taking.discard)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: Connection(self._server), sock, ssl=self._tls
            )
        except OSError as exc:  # TLS failed, or the peer has left
            log.debug("a connection was not taken: %s", exc)
            sock.close()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._lists.run())
            tasks.create_task(self._destinations.run())
            if self._certificate and self._settings.picker.tls_reload:
                tasks.create_task(self._certificate.run())
            while True:
                await asyncio.sleep(SWEEP_S)
                self._tell_health()
                self._link.later()  # how many connections there are

    def _tell_health(self) -> None:
        tell_health(self._health, ready=self._link.pool.ready, draining=self._draining)

    async def drain(self) -> None:
        """Let RPCs under way end."""
        self._draining = True
        self._tell_health()
        asyncio.get_running_loop().remove_reader(self._doorway)
        self._lists.drain()
        self._log.drain()
        await self._server.drain(self._settings.server.drain_s)

    def settle(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        for task in self._taking:
            task.cancel()
        self._server.close()


if __name__ == "__main__":
    run(PickerWorker)
