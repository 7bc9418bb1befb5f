"""Connections of clients: requests read whole, in order, one at a time; responses written as they come."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import struct
from http import HTTPStatus
from typing import Protocol, cast

from pointsman import api
from pointsman.config import Server
from pointsman.errors import (
    BadRequest,
    BodyTooLarge,
    HeadTooLarge,
    PointsmanError,
    RequestTimeout,
    SettingsError,
)
from pointsman.proxy.framing import ChunkFraming, FramingError
from pointsman.proxy.head import HeadParser, RequestHead
from pointsman.types import Clock


class Answering(Protocol):
    """A request being answered on a connection."""

    tunnel: bool
    """The connection carries another protocol now: bytes go through as they are."""

    def client_bytes(self, data: bytes) -> None: ...

    def client_paused(self, paused: bool) -> None: ...

    def cancel(self) -> None:
        """The client has left."""

    def check(self, now: float) -> None:
        """Called a few times a second: are the deadlines kept?"""


class Host(Protocol):
    """Who answers requests: the gateway on the data port, the admin API on its own."""

    settings: Server
    clock: Clock
    draining: bool
    clients: set[ClientConnection]

    def begin(self, client: ClientConnection, head: RequestHead, body: bytes) -> None:
        """Answer a complete request: at once, or later as ``client.exchange``."""

    def refuse(self, client: ClientConnection, head: RequestHead | None, error: PointsmanError) -> None:
        """Answer bytes that did not become a request."""


_HUNG_UP = (7, 8)
"""TCP_CLOSE and TCP_CLOSE_WAIT (linux/tcp.h)."""
_LINGER_RESET = struct.pack("ii", 1, 0)
MAX_PIPELINED_BYTES = 64 * 1024
"""Of requests sent ahead; more is left in the socket, so that the client has to wait."""


class ClientConnection(asyncio.Protocol):
    """One client connection. ``exchange`` is the request being answered, if any."""

    __slots__ = (
        "_ahead",
        "_body",
        "_framing",
        "_head",
        "_host",
        "_missing",
        "_parser",
        "_partial",
        "_since",
        "address",
        "closing",
        "exchange",
        "gone",
        "paused",
        "scheme",
        "transport",
        "waiting",
        "write",
    )

    transport: asyncio.Transport

    def __init__(self, host: Host) -> None:
        self._host = host
        self._parser = HeadParser()
        self.exchange: Answering | None = None
        self.waiting = False
        """A request is being looked at, though it has no exchange yet."""
        self.paused = False
        self.gone = False
        self._partial = b""
        self._head: RequestHead | None = None
        self._missing = 0
        self._body: list[bytes] = []
        self._framing: ChunkFraming | None = None
        self._ahead = b""
        self.closing = False
        self._since = host.clock()
        """When the state we are in began, or the last body bytes came."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        self.transport = transport
        self.write = transport.write
        peer = transport.get_extra_info("peername")
        self.address = peer[0].encode() if peer else b"unknown"
        self.scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        self._host.clients.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self._host.clients.discard(self)
        if self.exchange:
            exchange, self.exchange = self.exchange, None
            exchange.cancel()

    # -- reading

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None and not self.waiting and not self._ahead:
            if not self.closing:
                self._read(data)
        elif exchange is not None and exchange.tunnel:
            exchange.client_bytes(data)
        else:
            self._ahead += data
            if len(self._ahead) > MAX_PIPELINED_BYTES:
                self.transport.pause_reading()

    def _read(self, data: bytes) -> None:
        try:
            if self._head is None:
                if not self._partial:
                    again = self._parser.again(data)
                    if again is not None:
                        head, end, length = again
                        if end + length == len(data) and length <= self._host.settings.body_bytes:
                            self.closing = not head.keep_alive or self._host.draining
                            self._host.begin(self, head, data[end:])
                            return
                rest = self._read_head(data)
                if rest is None:
                    return
                data = rest
            self._read_body(data)
        except PointsmanError as error:
            self._reject(error)

    def _read_head(self, data: bytes) -> bytes | None:
        """Body bytes that follow the head, or None while the head is incomplete."""
        if self._partial:
            data = self._partial + data
        else:
            self._since = self._host.clock()
        if data[:1] in b"\r\n":  # an empty line before a request is to be ignored (RFC 9112, 2.2)
            data = data.lstrip(b"\r\n")
        end = data.find(b"\r\n\r\n")
        limit = self._host.settings.head_bytes
        if end > limit or (end < 0 and len(data) > limit + 3):
            raise HeadTooLarge(f"The request head is larger than {limit} bytes (server.head_bytes).")
        if end < 0:
            self._partial = data
            return None
        self._partial = b""
        head, self._missing = self._parser.parse(data[: end + 4])
        self._head = head
        limit = self._host.settings.body_bytes
        if self._missing > limit:
            raise self._too_large(limit)
        self._framing = ChunkFraming(strict=True, pieces=[]) if head.chunked else None
        rest = data[end + 4 :]
        if head.expects_continue and not rest and (head.chunked or self._missing) and not head.http10:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return rest

    def _read_body(self, data: bytes) -> None:
        head = self._head
        assert head
        framing = self._framing
        if framing is None:
            missing = self._missing
            if len(data) < missing:
                self._missing = missing - len(data)
                self._body.append(data)
                self._since = self._host.clock()
                return
            if len(data) > missing:
                self._ahead = data[missing:]
                data = data[:missing]
            if self._body:
                self._body.append(data)
                data = b"".join(self._body)
                self._body = []
        else:
            assert framing.pieces is not None
            try:
                end = framing.feed(data)
            except FramingError as exc:
                raise BadRequest(f"Malformed HTTP request body: {exc}.") from exc
            limit = self._host.settings.body_bytes
            self._missing += len(data)
            if self._missing > limit and sum(map(len, framing.pieces)) > limit:
                raise self._too_large(limit)
            if end < 0:
                self._since = self._host.clock()
                return
            self._ahead = data[end:]
            data = b"".join(framing.pieces)
        self._head = None
        self._framing = None
        self.closing = not head.keep_alive or self._host.draining
        self._host.begin(self, head, data)

    def _too_large(self, limit: int) -> BodyTooLarge:
        return BodyTooLarge(f"The request body is larger than {limit} bytes (server.body_bytes).")

    def _reject(self, error: PointsmanError) -> None:
        """The bytes that follow cannot be trusted or are not wanted: answer and close."""
        head, self._head = self._head, None
        self.closing = True
        self._host.refuse(self, head, error)

    def eof_received(self) -> bool:
        return False  # a client that sends no more has left, as other proxies see it, too

    # -- writing

    def pause_writing(self) -> None:
        self.paused = True
        if self.exchange:
            self.exchange.client_paused(True)
        else:
            self.transport.pause_reading()  # no further request before the answers have been read

    def resume_writing(self) -> None:
        self.paused = False
        if self.exchange:
            self.exchange.client_paused(False)
        elif not self.waiting:
            self._read_ahead()

    def pause_reading(self, paused: bool) -> None:
        if paused:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def respond(
        self,
        status: int,
        body: bytes,
        request_id: str,
        content_type: bytes = b"application/json",
        extra: bytes = b"",
    ) -> None:
        """Write a whole response of our own."""
        self.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b%b\r\n%b"
            % (
                status,
                HTTPStatus(status).phrase.encode(),
                content_type,
                len(body),
                request_id.encode("latin-1"),
                extra,
                b"connection: close\r\n" if self.closing else b"",
                body,
            )
        )

    def respond_error(self, error: PointsmanError, head: RequestHead | None, request_id: str) -> None:
        """Write an error in the shape that clients of this path expect."""
        extra = b"retry-after: 1\r\n" if error.status in (429, 503) else b""
        body = api.find(head.path if head else "").error_body(error)
        if head and head.method == b"HEAD":
            body = b""
        self.respond(error.status, body, request_id, extra=extra)

    def closes_with(self, *, open_ended: bool) -> bool:
        """Whether the connection ends with this response; it must when nothing else marks the end."""
        self.closing = self.closing or open_ended
        return self.closing

    def tunnel(self) -> None:
        """The connection is no longer HTTP: what was sent ahead goes through."""
        self.closing = True
        ahead, self._ahead = self._ahead, b""
        if ahead and self.exchange:
            self.exchange.client_bytes(ahead)

    def exchange_done(self) -> None:
        """The response is complete: read the next request, or close."""
        self.exchange = None
        if self.gone:
            return
        if self.closing:
            self.transport.close()
            return
        self._since = self._host.clock()
        if self.paused:
            self.transport.pause_reading()
        elif self._ahead:
            asyncio.get_running_loop().call_soon(self._read_ahead)

    def _read_ahead(self) -> None:
        if self.gone or self.exchange or self.waiting or self.paused or self.closing:
            return
        ahead, self._ahead = self._ahead, b""
        if not self.transport.is_reading():
            self.transport.resume_reading()
        if ahead:
            self._read(ahead)

    def abort(self) -> None:
        self.transport.abort()

    def cut(self) -> None:
        """End the connection in the middle of a response, with a reset: where only the connection's end marks
        that of the body, a client could not tell it from a good one.
        """
        if not self.transport.is_closing():
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            self.transport.abort()

    # -- time

    @property
    def busy(self) -> bool:
        """A request is being answered, or has been read in part."""
        return bool(self.exchange or self.waiting or self._head is not None or self._partial)

    def _hung_up(self) -> bool:
        """The client has closed its end; asked where nothing is read, and the end would be seen too late."""
        info = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return info[0] in _HUNG_UP

    def drain(self) -> None:
        """Close when idle, or after the response under way."""
        if not self.busy:
            self.transport.close()
        elif self.exchange or self.waiting:  # what has been read in part closes when it has been read
            self.closing = True

    def check(self, now: float) -> None:
        """Called a few times a second: is the client in time?"""
        if self.exchange:
            self.exchange.check(now)
            if not self.transport.is_reading() and not self.transport.is_closing() and self._hung_up():
                self.transport.abort()
            return
        if self.waiting or self.gone:
            return
        server = self._host.settings
        silent = now - self._since
        if self._head is not None:
            if silent > server.body_timeout_s:
                self._reject(
                    RequestTimeout(f"No body bytes for {server.body_timeout_s:g} s (server.body_timeout_s).")
                )
        elif self._partial:
            if silent > server.head_timeout_s:
                self._reject(RequestTimeout(f"The request head took more than {server.head_timeout_s:g} s."))
        elif silent > server.idle_timeout_s:
            self.transport.close()


async def listen(
    host: Host,
    address: str,
    port: int,
    setting: str,
    tls: ssl.SSLContext | None = None,
    *,
    reuse_port: bool = False,
) -> asyncio.Server:
    """Accept connections for ``host``; ``setting`` is the key to name when the port is taken.

    With ``reuse_port`` others listen there, too, and each gets some of the connections.
    """
    try:
        return await asyncio.get_running_loop().create_server(
            lambda: ClientConnection(host), address, port, ssl=tls, backlog=4096, reuse_port=reuse_port
        )
    except OSError as exc:
        why = "is in use" if exc.errno == errno.EADDRINUSE else f"cannot be opened: {exc.strerror}"
        raise SettingsError(f"{setting}: {address}:{port} {why}; choose another") from exc
