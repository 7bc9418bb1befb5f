"""HTTP/1.1 connections of the load generator: raw protocols, one request at a time on each, reused."""

from __future__ import annotations

import asyncio
import os
import resource
import ssl
from collections.abc import Callable

import httptools

from pointsman.config import Url
from pointsman.errors import SettingsError

REUSE_S = 4.0
"""An idle connection is reused this long [s of our time]: below the engines' keep-alive (vLLM: 5 s)."""
_SPARE_FILES = 32
_KEPT_BODY_BYTES = 64 * 1024


class Broken(Exception):
    """An exchange that got no complete answer; ``kind`` is a stable word."""

    def __init__(self, kind: str, message: str, *, stale: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.stale = stale
        """The server had closed the idle connection: nothing was answered, so it can be sent again."""


class Answer:
    """What came back for one request. ``on_body`` gets the body of a 2xx; of others, ``body`` keeps it."""

    __slots__ = ("body", "done", "headers", "on_body", "sized", "status")

    def __init__(self, on_body: Callable[[bytes], None], done: asyncio.Future[None]) -> None:
        self.on_body = on_body
        self.done = done
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.sized = False
        """The head tells where the body ends; else it ends with the connection."""


class Connection(asyncio.Protocol):
    """One connection; ``exchange`` sends a request and returns when its answer is complete."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_lost: Callable[[Connection], None]) -> None:
        self._loop = loop
        self._on_lost = on_lost
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._headers: dict[bytes, bytes] = {}
        self.used = 0
        self.idle_since_s = 0.0
        self.reusable = False

    async def exchange(self, request: bytes, on_body: Callable[[bytes], None]) -> Answer:
        """Send and wait for the whole answer; ``Broken`` when it does not come."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise Broken("reset", "the connection was closed", stale=self.used > 0)
        answer = self._answer = Answer(on_body, self._loop.create_future())
        self.reusable = False
        self.used += 1
        transport.write(request)
        try:
            await answer.done
        finally:
            self._answer = None
            if not self.reusable:
                self.close()
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def peer(self) -> str | None:
        """The server's address; None when the connection is closed."""
        return None if self._transport is None else str(self._transport.get_extra_info("peername")[0])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's transports are not asyncio.Transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost(self)
        answer = self._answer
        if answer is None or answer.done.done():
            return
        if answer.status and not answer.sized and exc is None:
            answer.done.set_result(None)
            return
        stale = self.used > 1 and not answer.status
        where = "before the answer was complete" if answer.status else "before any answer"
        answer.done.set_exception(Broken("reset", f"the server closed the connection {where}", stale=stale))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._fail(Broken("protocol", f"not an HTTP answer: {exc}"))

    def _fail(self, exc: Exception) -> None:
        if self._answer is not None and not self._answer.done.done():
            self._answer.done.set_exception(exc)
        self.close()

    def on_message_begin(self) -> None:
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        answer = self._answer
        status = self._parser.get_status_code()
        if answer is None or status < 200:
            return
        answer.status = status
        answer.headers = self._headers
        answer.sized = b"content-length" in self._headers or b"transfer-encoding" in self._headers

    def on_body(self, body: bytes) -> None:
        answer = self._answer
        if answer is None:
            return
        if answer.status == 200:
            answer.on_body(body)
        elif len(answer.body) < _KEPT_BODY_BYTES:
            answer.body += body

    def on_message_complete(self) -> None:
        answer = self._answer
        if answer is None or not answer.status or answer.done.done():
            return
        self.reusable = self._parser.should_keep_alive()
        answer.done.set_result(None)


class Connections:
    """Keep-alive connections to one server, as many as there are requests at once. Nothing waits in here.

    The host name is looked up for the first connection; the others go to the address that answered.
    """

    def __init__(self, url: Url, tls: ssl.SSLContext | None) -> None:
        self._url = url
        self._tls = tls
        self._host = url.host
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._all_lost: asyncio.Future[None] | None = None

    async def exchange(self, request: bytes, on_body: Callable[[bytes], None]) -> Answer:
        """Send on an idle connection or a new one. One the server has closed meanwhile does not count."""
        while True:
            connection = self._reuse() or await self._connect()
            try:
                answer = await connection.exchange(request, on_body)
            except Broken as exc:
                if exc.stale:
                    continue
                raise
            if connection.reusable:
                connection.idle_since_s = asyncio.get_running_loop().time()
                self._idle.append(connection)
            return answer

    async def close(self) -> None:
        """Close them all and return when they are gone."""
        if self._open:
            self._all_lost = asyncio.get_running_loop().create_future()
            for connection in list(self._open):
                connection.close()
            await self._all_lost

    def _reuse(self) -> Connection | None:
        oldest_s = asyncio.get_running_loop().time() - REUSE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since_s >= oldest_s:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        name = self._url.host if self._tls else None
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(loop, self._lost),
                self._host,
                self._url.port,
                ssl=self._tls,
                server_hostname=name,
            )
        except OSError as exc:
            if exc.errno in (23, 24):
                raise Broken("open files", "this process may not open more files; raise `ulimit -n`") from exc
            raise Broken(
                "connect", f"cannot connect to {self._url.authority}: {exc.strerror or exc}"
            ) from exc
        if connection.peer is not None:
            self._open.add(connection)
            self._host = connection.peer
        return connection

    def _lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._all_lost is not None and not self._open and not self._all_lost.done():
            self._all_lost.set_result(None)


def room_for(connections: int, option: str) -> None:
    """Raise this process' limit of open files as far as it goes; say so when it is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd")) + _SPARE_FILES
    if soft < connections + in_use:
        wanted = max(soft, connections + in_use)
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < connections + in_use:
        raise SettingsError(
            f"{option}: {connections} connections need {connections + in_use} open files and this process "
            f"may have {soft}; raise it with `ulimit -n`"
        )
