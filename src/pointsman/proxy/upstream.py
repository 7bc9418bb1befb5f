"""Connections to endpoints: kept, reused, and read without looking into the bytes they bring."""

from __future__ import annotations

import asyncio
import ssl
from typing import Protocol, cast

from pointsman.endpoints.target import Target, request_headers, ssl_context
from pointsman.proxy.framing import ChunkFraming, FramingError
from pointsman.types import Clock

_HEAD, _LENGTH, _CHUNKED, _UNTIL_CLOSE, _TUNNEL = range(5)
MAX_HEAD_BYTES = 256 * 1024


class ResponseHead:
    """What the relay needs to know of a response head. ``raw`` ends before the empty line."""

    __slots__ = ("chunked", "length", "lower", "raw", "status")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.lower = raw.lower()
        self.status = int(raw[9:12])
        at = self.lower.find(b"\r\ncontent-length:")
        end = self.lower.find(b"\r\n", at + 2)
        self.length = int(self.lower[at + 17 : end if end >= 0 else None]) if at >= 0 else -1
        at = self.lower.find(b"\r\ntransfer-encoding:")
        self.chunked = at >= 0 and b"chunked" in self.lower[at : self.lower.find(b"\r\n", at + 2) + 1 or None]

    @property
    def keeps_alive(self) -> bool:
        return self.raw.startswith(b"HTTP/1.1") and b"\r\nconnection: close" not in self.lower


class Receiver(Protocol):
    """Whoever waits for a response: told in this order, ``response_done`` or ``response_broken`` last."""

    def connected(self, connection: UpstreamConnection) -> None:
        """A connection is there: send the request on it."""

    def response_head(self, head: ResponseHead) -> None: ...

    def response_body(self, data: bytes) -> None:
        """Body bytes with their chunk framing, as they came."""

    def response_done(self) -> None: ...

    def response_broken(self, why: str) -> None:
        """``connect`` (nobody there), ``stale`` (a kept connection was closed under us), ``reset``,
        ``timeout`` or ``malformed``."""

    def upstream_paused(self, paused: bool) -> None:
        """The endpoint takes no more (or takes more again) of what we send."""


class Connections:
    """The connections to one target."""

    def __init__(self, target: Target, connect_timeout_s: float, idle_s: float, clock: Clock) -> None:
        self.target = target
        self._ssl: ssl.SSLContext | None = ssl_context(target.settings) if target.url.tls else None
        self._connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._clock = clock
        self._idle: list[tuple[float, UpstreamConnection]] = []
        self._connecting: set[asyncio.Task[None]] = set()
        headers = request_headers(target.settings)
        self.overrides = frozenset(headers)
        """Lower-cased names of headers we set ourselves; the client's are dropped."""
        lines = {b"host": target.url.authority.encode(), **headers}
        self.head_lines = b"\r\n".join(b"%s: %s" % line for line in lines.items())
        self.prefix = target.url.prefix.encode("latin-1")

    def take(self) -> UpstreamConnection | None:
        """A kept connection young enough to be still open at the other end."""
        oldest = self._clock() - self._idle_s
        while self._idle:
            since, connection = self._idle.pop()
            if since >= oldest and not connection.transport.is_closing():
                return connection
            connection.transport.abort()
        return None

    def connect(self, receiver: Receiver) -> asyncio.Task[None]:
        """Open a new connection for ``receiver``. Cancel the task when nobody wants it any more."""
        task = asyncio.get_running_loop().create_task(self._connect(receiver))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return task

    async def _connect(self, receiver: Receiver) -> None:
        target = self.target
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: UpstreamConnection(self),
                    target.connect_host,
                    target.url.port,
                    ssl=self._ssl,
                    server_hostname=target.url.host if self._ssl else None,
                )
        except (OSError, TimeoutError):
            receiver.response_broken("connect")
        else:
            receiver.connected(connection)

    def keep(self, connection: UpstreamConnection) -> None:
        """The connection is free for the next request."""
        self._idle.append((self._clock(), connection))

    def forget(self, connection: UpstreamConnection) -> None:
        self._idle = [kept for kept in self._idle if kept[1] is not connection]

    def close(self) -> None:
        """Close what is idle or being opened; connections with a request go on until it ends."""
        for task in self._connecting:
            task.cancel()
        for _, connection in self._idle:
            connection.transport.abort()
        self._idle.clear()
        self._idle_s = -1.0


class UpstreamConnection(asyncio.Protocol):
    """One connection to an endpoint, one request at a time."""

    __slots__ = (
        "_framing",
        "_head",
        "_keep",
        "_left",
        "_state",
        "_without_body",
        "connections",
        "fresh",
        "receiver",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        self.receiver: Receiver | None = None
        self.fresh = True
        """No request has been answered on it yet: when it breaks, that is not staleness."""
        self._state = _HEAD
        self._head = b""
        self._left = 0
        self._keep = False
        self._without_body = False
        self._framing = ChunkFraming()

    @property
    def between_chunks(self) -> bool:
        """What came of the response ends behind a chunk, so that one of ours could follow."""
        return self._state == _CHUNKED and self._framing.between_chunks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        self.transport = transport

    def send(self, receiver: Receiver, head: bytes, body: bytes, *, without_body: bool = False) -> None:
        """Send a request. ``without_body``: the response will have none, whatever its head says (HEAD)."""
        self.receiver = receiver
        self._state = _HEAD
        self._head = b""
        self._without_body = without_body
        if len(body) < 16384:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))

    def data_received(self, data: bytes) -> None:
        receiver = self.receiver
        if receiver is None:  # nobody asked
            self.transport.abort()
            return
        state = self._state
        if state == _HEAD:
            rest = self._take_head(data)
            if rest is None:
                return
            data = rest
            state = self._state
        try:
            if state == _CHUNKED:
                end = self._framing.feed(data)
            elif state == _LENGTH:
                self._left -= len(data)
                end = -1 if self._left > 0 else len(data) + self._left
            else:
                end = -1
        except FramingError:
            self._broken("malformed")
            return
        if end < 0:
            if data:
                receiver.response_body(data)
        elif end == len(data):
            if data:
                receiver.response_body(data)
            self._done(keep=True)
        else:
            receiver.response_body(data[:end])
            self._done(keep=False)  # it sent more than the response: nothing it says next can be trusted

    def _take_head(self, data: bytes) -> bytes | None:
        """Body bytes that came with the head, or None while there is no body to read (yet)."""
        if self._head:
            data = self._head + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._head = data
            if len(data) > MAX_HEAD_BYTES or not data.startswith(b"HTTP/1."[: len(data)]):
                self._broken("malformed")
            return None
        try:
            head = ResponseHead(data[:end])
        except ValueError:
            head = None
        if head is None or not data.startswith(b"HTTP/1."):
            self._broken("malformed")
            return None
        rest = data[end + 4 :]
        self._head = b""
        if head.status < 200 and head.status != 101:
            return self._take_head(rest) if rest else None
        receiver = self.receiver
        assert receiver
        if head.status == 101:
            self._state = _TUNNEL
        elif self._without_body or head.status in (204, 304):
            self._state, self._left = _LENGTH, 0
        elif head.chunked:
            self._state, self._framing = _CHUNKED, ChunkFraming()
        elif head.length >= 0:
            self._state, self._left = _LENGTH, head.length
        else:
            self._state = _UNTIL_CLOSE
        self.fresh = False
        self._keep = head.keeps_alive
        receiver.response_head(head)
        if self.receiver is not receiver:  # it was refused
            return None
        if self._state == _LENGTH and not self._left:
            self._done(keep=not rest)
            return None
        return rest or None

    def _done(self, *, keep: bool) -> None:
        receiver, self.receiver = self.receiver, None
        if receiver is None:
            return
        if keep and self._keep:
            self.connections.keep(self)
        else:
            self.transport.abort()
        receiver.response_done()

    def _broken(self, why: str) -> None:
        receiver, self.receiver = self.receiver, None
        self.transport.abort()
        if receiver:
            receiver.response_broken(why)

    def abandon(self) -> None:
        """The request is of no interest any more: the endpoint must hear of it at once."""
        self.receiver = None
        self.transport.abort()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        receiver, self.receiver = self.receiver, None
        if receiver is None:
            self.connections.forget(self)
        elif (self._state == _UNTIL_CLOSE and exc is None) or self._state == _TUNNEL:
            receiver.response_done()
        else:
            stale = self._state == _HEAD and not self._head and not self.fresh
            receiver.response_broken("stale" if stale else "reset")

    def pause_writing(self) -> None:
        if self.receiver:
            self.receiver.upstream_paused(True)

    def resume_writing(self) -> None:
        if self.receiver:
            self.receiver.upstream_paused(False)
