"""``serve`` with workers: each listens on the port, and the kernel shares the connections out."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Sequence

from msgspec.structs import replace

from pointsman.config import Server
from pointsman.errors import SettingsError
from pointsman.proxy.core import Core
from pointsman.proxy.workers.fleet import Fleet

MODULE = "pointsman.proxy.workers.worker"


class Workers:
    """Takes requests in by processes of its own (``core.Front``)."""

    def __init__(self, core: Core) -> None:
        self._fleet = Fleet(core, MODULE)
        self._held: Sequence[socket.socket] = ()
        """Keep the port ours while no worker listens."""

    @property
    def draining(self) -> bool:
        """Nothing new is taken: it ends, or no worker serves."""
        return self._fleet.draining or not self._fleet.serves

    async def start(self) -> int:
        """Start the workers; returns their port."""
        fleet = self._fleet
        server = fleet.settings.server
        self._held, port = await _hold(server)
        fleet.settings = replace(fleet.settings, server=replace(server, port=port))
        try:
            await fleet.begin()
        except SettingsError:
            self._release()
            raise
        return port

    async def run(self) -> None:
        await self._fleet.run()

    async def drain(self) -> None:
        self._release()
        await self._fleet.drain()

    def settle(self) -> Awaitable[None] | None:
        return self._fleet.settle()

    def close(self) -> None:
        self._release()
        self._fleet.close()

    def _release(self) -> None:
        for sock in self._held:
            sock.close()


async def _hold(server: Server) -> tuple[list[socket.socket], int]:
    """Bound sockets that do not listen, and their port: nobody else can have it meanwhile."""
    port, held = server.port, list[socket.socket]()
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            server.host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:  # one that listens would share with us
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                _bind(probe, address, port)
            sock = socket.socket(family, kind, protocol)
            held.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _bind(sock, address, port)
            port = sock.getsockname()[1]
    except OSError as exc:
        for sock in held:
            sock.close()
        why = "is in use" if exc.errno == errno.EADDRINUSE else f"cannot be opened: {exc.strerror}"
        raise SettingsError(f"server.port: {server.host}:{server.port} {why}; choose another") from exc
    return held, port


def _bind(sock: socket.socket, address: tuple[object, ...], port: int) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((address[0], port, *address[2:]))
