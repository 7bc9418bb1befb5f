"""The port of a simulated engine: open, or refusing connections while it stays ours."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

BACKLOG = 1024
REBIND_S = 0.01


class Port:
    """Listens on ``host`` and ``number``; 0 picks a free one when it opens. ``changed`` is called when it has
    opened.
    """

    def __init__(
        self,
        host: str,
        number: int,
        connection: Callable[[], asyncio.Protocol],
        changed: Callable[[], None],
    ) -> None:
        self.host = host
        self.number = number
        self._connection = connection
        self._changed = changed
        self._server: asyncio.Server | None = None
        self._closed: asyncio.Task[None] | None = None
        self._reopen = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return self._server is not None

    async def open(self) -> None:
        """``OSError`` when it is taken."""
        await self._listen(self._bind())

    def close(self) -> None:
        """Refuse connections until ``reopen``. Those that are open stay."""
        self._reopen.clear()
        self._stop_listening()
        if self._closed is None or self._closed.done():
            self._closed = asyncio.get_running_loop().create_task(self._stay_closed())

    def reopen(self) -> None:
        self._reopen.set()

    async def give_up(self) -> None:
        """Close it for good."""
        self._stop_listening()
        if self._closed is not None:
            self._closed.cancel()
            await asyncio.gather(self._closed, return_exceptions=True)

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _stay_closed(self) -> None:
        while not self._reopen.is_set():
            sock = await self._reserve()
            try:
                while not self._reopen.is_set():
                    await self._reopen.wait()
            except asyncio.CancelledError:
                sock.close()
                raise
            await self._listen(sock)
            if not self._reopen.is_set():  # closed again meanwhile
                self._stop_listening()

    async def _reserve(self) -> socket.socket:
        """A socket bound and not listening: the port is ours and connections are refused."""
        while True:
            try:
                return self._bind()
            except OSError:  # the loop has not closed the old socket yet
                await asyncio.sleep(REBIND_S)

    def _bind(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((self.host, self.number))
        except OSError:
            sock.close()
            raise
        self.number = sock.getsockname()[1]
        return sock

    async def _listen(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connection, sock=sock, backlog=BACKLOG)
        self._changed()
