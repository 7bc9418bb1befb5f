"""One client connection of a simulated engine: HTTP/1.1 in, answers out, in the order of the requests."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from http import HTTPStatus
from typing import Protocol, cast

import httptools
import msgspec

READ_HEADERS = frozenset((b"x-request-id", b"x-sim-output-tokens", b"expect"))
GARBAGE = b"\x16\x03\x01 this is not HTTP \xff\xfe\r\n"
_STATUS = {status.value: f"{status.value} {status.phrase}".encode() for status in HTTPStatus}
_LINGER_RESET = struct.pack("ii", 1, 0)


class Request(msgspec.Struct, frozen=True):
    """One request, complete."""

    method: str
    path: str
    headers: dict[bytes, str]
    """Those of ``READ_HEADERS``."""
    body: bytes
    keep_alive: bool
    http10: bool


class App(Protocol):
    """What answers."""

    def handle(self, connection: Connection, request: Request) -> None: ...

    def opened(self, connection: Connection) -> None: ...

    def lost(self, connection: Connection) -> None: ...

    def date(self) -> bytes:
        """Now, as the Date header has it."""
        ...

    def now_wall_s(self) -> float: ...


class Connection(asyncio.Protocol):
    """Reads on while it answers, so that it notices at once when the client leaves."""

    transport: asyncio.Transport

    def __init__(self, app: App) -> None:
        self._app = app
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: dict[bytes, str] = {}
        self._body: list[bytes] = []
        self._pending: deque[Request] = deque()
        self._request: Request | None = None
        self.idle_since_s = app.now_wall_s()
        self.work: object = None
        """Whatever the app wants to find here again when the client leaves."""

    @property
    def idle(self) -> bool:
        """No request is being answered or read."""
        return self._request is None and not self._url

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance
        self._app.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pending.clear()
        self._app.lost(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserUpgrade, httptools.HttpParserError):
            self._refuse()
        else:
            self._next()

    # httptools

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in READ_HEADERS:
            self._headers[name] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._headers.get(b"expect", "").lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        request = Request(
            self._parser.get_method().decode(),
            self._url.partition(b"?")[0].decode("latin-1"),
            self._headers,
            b"".join(self._body),
            self._parser.should_keep_alive(),
            self._parser.get_http_version() == "1.0",
        )
        self._url = b""
        self._headers = {}
        self._body = []
        self._pending.append(request)

    # answers

    def answer(
        self, status: int, body: bytes, content_type: str = "application/json", more: bytes = b""
    ) -> None:
        """Write a whole answer. ``more`` is header lines, each with its line end."""
        self.write(self.head(status, b"content-length: %d" % len(body), content_type, more) + body)
        self.done()

    def head(self, status: int, framing: bytes, content_type: str, more: bytes = b"") -> bytes:
        assert self._request is not None
        keep = b"" if self._request.keep_alive else b"connection: close\r\n"
        return b"HTTP/1.1 %b\r\ndate: %b\r\nserver: uvicorn\r\n%b%b%b\r\ncontent-type: %b\r\n\r\n" % (
            _STATUS[status],
            self._app.date(),
            keep,
            more,
            framing,
            content_type.encode(),
        )

    def open_stream(self) -> None:
        """Write the head of a stream of events."""
        assert self._request is not None
        framing = b"connection: close" if self._request.http10 else b"transfer-encoding: chunked"
        self.write(self.head(200, framing, "text/event-stream; charset=utf-8"))

    def frame(self, event: bytes) -> bytes:
        """``event`` as one chunk."""
        assert self._request is not None
        if self._request.http10:
            return event
        return b"%x\r\n%b\r\n" % (len(event), event)

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def last_frame(self) -> bytes:
        """What ends a stream."""
        assert self._request is not None
        return b"" if self._request.http10 else b"0\r\n\r\n"

    def done(self) -> None:
        """The answer is complete, or the connection closing: nothing more is written for this request."""
        request, self._request, self.work = self._request, None, None
        assert request is not None
        self.idle_since_s = self._app.now_wall_s()
        if not request.keep_alive or request.http10:
            self.transport.close()
        elif self._pending:
            asyncio.get_running_loop().call_soon(self._next)

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        if not self.transport.is_closing():
            raw: socket.socket = self.transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        self.transport.abort()

    def _next(self) -> None:
        if self._request is None and self._pending and not self.transport.is_closing():
            self._request = self._pending.popleft()
            self._app.handle(self, self._request)

    def _refuse(self) -> None:
        body = b"Invalid HTTP request received."
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
        self.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        self.transport.close()
