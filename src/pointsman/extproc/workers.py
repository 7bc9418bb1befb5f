"""``picker`` with workers: connections are accepted here and passed on, each to the worker that has the
fewest.

A gateway opens few connections (Envoy: one for each of its threads) and keeps them. The kernel, which
shares connections out by a hash where several processes listen, would give most of them to one.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from msgspec.structs import replace

from pointsman.errors import SettingsError
from pointsman.extproc.access_log import Completion
from pointsman.extproc.completions import Completions
from pointsman.extproc.destinations import Destinations
from pointsman.extproc.grpc import GrpcServer
from pointsman.extproc.health import Health
from pointsman.extproc.port import HEALTH_NAMES, tell_health
from pointsman.extproc.tls import write_self_signed
from pointsman.proxy.core import Core
from pointsman.proxy.workers.fleet import Fleet
from pointsman.router import Flight

MODULE = "pointsman.extproc.worker"
SWEEP_S = 0.25
BACKLOG = 4096
MAX_ACCEPTED = 64
"""Connections taken in one turn."""


class Line(Completion, frozen=True, kw_only=True, gc=False, array_like=True):
    """A ``Completion`` on its way."""


class Following:
    """Requests that workers see no more of (``desk.Unseen``)."""

    def __init__(self, completions: Completions) -> None:
        self._completions = completions

    def add(self, name: str, flight: Flight, started_s: float) -> None:
        self._completions.add(name, flight, started_s)

    def line(self, fields: Sequence[Any]) -> None:
        self._completions.completed(msgspec.convert(fields, Line))


class PickerWorkers:
    """Answers gateways by processes of its own (``core.Front``)."""

    def __init__(self, core: Core) -> None:
        self.settings = core.settings.picker
        self._core = core
        self._destinations = Destinations(core.pool)
        self.completions = Completions(
            core.router, self._destinations, core.clock, core.settings.upstream.first_byte_timeout_s
        )
        self._fleet = Fleet(core, MODULE, Following(self.completions))
        self._health = Health(HEALTH_NAMES)
        self._probes = GrpcServer(self._health.services())
        self._listening: list[socket.socket] = []
        self._directory: TemporaryDirectory[str] | None = None
        """Where our self-signed certificate is for as long as we live."""
        self.health_port = 0

    @property
    def draining(self) -> bool:
        """Nothing new is taken: it ends, or no worker serves."""
        return self._fleet.draining or not self._fleet.serves

    async def start(self) -> int:
        try:
            return await self._start()
        except SettingsError:
            self.close()
            raise

    async def _start(self) -> int:
        settings = self.settings
        await self._destinations.resolve()
        self._tell_health()
        if settings.health_port is not None:
            self.health_port = await self._probes.start(
                settings.host, settings.health_port, setting="picker.health_port"
            )
        if settings.tls and not settings.socket and not settings.tls_directory:
            self._share_certificate()
        port = self._open_socket() if settings.socket else await self._open_port()
        await self._fleet.begin()
        for sock in self._listening:
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)
        return port

    def _share_certificate(self) -> None:
        """All workers show the same one."""
        self._directory = TemporaryDirectory(prefix="picker-")
        directory = Path(self._directory.name)
        write_self_signed(directory / "tls.crt", directory / "tls.key")
        picker = replace(self.settings, tls_directory=str(directory))
        self._fleet.settings = replace(self._fleet.settings, picker=picker)

    def _open_socket(self) -> int:
        path = self.settings.socket
        if os.path.exists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise SettingsError(f"picker.socket: {path} exists and is no socket; choose another")
            os.unlink(path)
        try:
            self._listen(socket.AF_UNIX, path)
        except OSError as exc:
            raise SettingsError(f"picker.socket: {path} cannot be opened: {exc.strerror}") from exc
        return 0

    async def _open_port(self) -> int:
        settings = self.settings
        port = settings.port
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                settings.host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            for family, _, _, _, address in found:
                port = self._listen(family, (address[0], port, *address[2:]))
        except OSError as exc:
            why = "is in use" if exc.errno == errno.EADDRINUSE else f"cannot be opened: {exc.strerror}"
            raise SettingsError(f"picker.port: {settings.host}:{port} {why}; choose another") from exc
        return port

    def _listen(self, family: int, address: Any) -> int:
        sock = socket.socket(family, socket.SOCK_STREAM)
        self._listening.append(sock)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        return 0 if family == socket.AF_UNIX else int(sock.getsockname()[1])

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(MAX_ACCEPTED):
            try:
                connection, _ = listening.accept()
            except OSError:  # nobody is left, or this one is gone again
                return
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._fleet.take(connection)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._fleet.run())
            tasks.create_task(self._destinations.run())
            while True:
                await asyncio.sleep(SWEEP_S)
                self.completions.sweep()
                self._tell_health()

    def _tell_health(self) -> None:
        tell_health(self._health, ready=self._core.pool.ready, draining=self.draining)

    async def drain(self) -> None:
        self._fleet.draining = True
        self._tell_health()
        self._stop_listening()
        await self._fleet.drain()

    def settle(self) -> Awaitable[None] | None:
        return self._fleet.settle()

    def close(self) -> None:
        self._stop_listening()
        self._fleet.close()
        self._probes.close()
        self.completions.close()
        if self._directory:
            self._directory.cleanup()

    def _stop_listening(self) -> None:
        for sock in self._listening:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        if self._listening and self.settings.socket:
            os.unlink(self.settings.socket)
        self._listening.clear()
