"""Connections to endpoints: kept, reused, and read without looking into the bytes they bring."""

from __future__ import annotations

import asyncio
import ssl
from typing import Protocol, cast

from pointsman.endpoints.target import Target, request_headers, ssl_context
from pointsman.proxy.framing import ChunkFraming, FramingError

_HEAD, _LENGTH, _CHUNKED, _UNTIL_CLOSE, _TUNNEL = range(5)
MAX_HEAD_BYTES = 256 * 1024
LARGE_BYTES = 8192
"""From here on, copying a body to send it in one piece costs more than sending two."""
_CONNECTION_HEADERS = (b"\r\nconnection:", b"\r\nkeep-alive:", b"\r\nproxy-connection:", b"\r\nx-request-id:")


class ResponseHead:
    """What the relay needs to know of a response head, but for its length, so that it can serve again."""

    __slots__ = ("chunked", "clean", "has_length", "keeps_alive", "simple", "status", "streams")

    def __init__(self, raw: bytes) -> None:
        """``raw`` ends before the empty line; ``ValueError`` when there is no status in it."""
        lower = raw.lower()
        if not raw.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")):
            raise ValueError("not an HTTP/1.x response")
        self.status = int(raw[9:12])
        self.has_length = b"\r\ncontent-length:" in lower
        self.chunked = _value(lower, b"\r\ntransfer-encoding:").endswith(b"chunked")
        self.keeps_alive = raw.startswith(b"HTTP/1.1") and b"close" not in _value(lower, b"\r\nconnection:")
        self.streams = b"text/event-stream" in _value(lower, b"\r\ncontent-type:")
        self.clean = raw.startswith(b"HTTP/1.1") and not any(name in lower for name in _CONNECTION_HEADERS)
        """It can be relayed as it is: nothing in it speaks of the endpoint's own connection."""
        self.simple = self.clean and self.status == 200 and (self.chunked or self.has_length)


def _value(lower: bytes, name: bytes) -> bytes:
    """The value of the header that begins with ``name``, or nothing."""
    at = lower.find(name)
    if at < 0:
        return b""
    end = lower.find(b"\r\n", at + 2)
    return lower[at + len(name) : end if end >= 0 else len(lower)].strip()


class Receiver(Protocol):
    """Whoever waits for a response: told in this order, ``response_done`` or ``response_broken`` last."""

    def connected(self, connection: UpstreamConnection) -> None:
        """A connection is there: send the request on it."""

    def response_head(self, head: ResponseHead, raw: bytes) -> None:
        """``raw`` ends before the empty line."""

    def response_body(self, data: bytes) -> None:
        """Body bytes with their chunk framing, as they came."""

    def response_done(self) -> None: ...

    def response_whole(self, head: ResponseHead, data: bytes, end: int) -> None:
        """Instead of the three before: all of a simple response, its head up to ``end``, its body four bytes
        later. The connection serves others from here on.
        """

    def response_broken(self, why: str) -> None:
        """``connect`` (nobody there), ``stale`` (a kept connection was closed under us), ``reset``,
        ``timeout`` or ``malformed``."""

    def upstream_paused(self, paused: bool) -> None:
        """The endpoint takes no more (or takes more again) of what we send."""


class Connections:
    """The connections to one target."""

    def __init__(self, target: Target, connect_timeout_s: float) -> None:
        self.target = target
        self._ssl: ssl.SSLContext | None = ssl_context(target.settings) if target.url.tls else None
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[UpstreamConnection] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self._closed = False
        headers = request_headers(target.settings)
        self.overrides = frozenset(headers)
        """Lower-cased names of headers we set ourselves; the client's are dropped."""
        lines = {b"host": target.url.authority.encode(), **headers}
        self.head_lines = b"\r\n".join(b"%s: %s" % line for line in lines.items())
        self.prefix = target.url.prefix.encode("latin-1")

    def take(self) -> UpstreamConnection | None:
        """The kept connection that was used last."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                return connection
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
        if self._closed:
            connection.transport.abort()
        else:
            connection.age = 0
            if not connection.transport.is_reading():  # a slow client's answer ended while it had to wait
                connection.transport.resume_reading()
            self._idle.append(connection)

    def sweep(self, max_age: int) -> None:
        """Called at regular times: close what has been idle for more than ``max_age`` of them.

        An engine closes its end after a while; a request sent at that moment would be lost.
        """
        for connection in self._idle:
            connection.age += 1
            if connection.age > max_age:
                connection.transport.abort()
        self._idle = [c for c in self._idle if c.age <= max_age and not c.transport.is_closing()]

    def close(self) -> None:
        """Close what is idle or being opened; connections with a request go on until it ends."""
        self._closed = True
        for task in self._connecting:
            task.cancel()
        for connection in self._idle:
            connection.transport.abort()
        self._idle.clear()


class UpstreamConnection(asyncio.Protocol):
    """One connection to an endpoint, one request at a time."""

    __slots__ = (
        "_after",
        "_before",
        "_framing",
        "_keep",
        "_known",
        "_left",
        "_partial",
        "_state",
        "_without_body",
        "age",
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
        self.age = 0
        self._state = _HEAD
        self._partial = b""
        self._left = 0
        self._keep = False
        self._without_body = False
        self._framing = ChunkFraming()
        self._known: ResponseHead | None = None
        self._before = self._after = b""
        """The head before, around the digits of its content-length: heads repeat."""

    @property
    def between_chunks(self) -> bool:
        """What came of the response ends behind a chunk, so that one of ours could follow."""
        return self._state == _CHUNKED and self._framing.between_chunks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so

    def send(self, receiver: Receiver, head: bytes, body: bytes, *, without_body: bool = False) -> None:
        """Send a request. ``without_body``: the response will have none, whatever its head says (HEAD)."""
        self.receiver = receiver
        self._state = _HEAD
        self._without_body = without_body
        if len(body) < LARGE_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))

    def data_received(self, data: bytes) -> None:
        receiver = self.receiver
        if receiver is None:  # nobody asked
            self.transport.abort()
            return
        if self._state == _HEAD:
            known = self._known
            end = -1 if self._partial or self._without_body else self._end_of_known(data)
            if known is not None and known.simple and end > 0 and 0 < self._left == len(data) - end - 4:
                self.receiver = None
                self.fresh = False
                self.connections.keep(self)
                receiver.response_whole(known, data, end)
                return
            rest = self._take_head(data, receiver)
            if rest is None:
                return
            data = rest
        state = self._state
        if state == _CHUNKED:
            try:
                end = self._framing.feed(data)
            except FramingError:
                self._broken("malformed")
                return
            if end < 0:
                receiver.response_body(data)
                return
        elif state == _LENGTH:
            left = self._left = self._left - len(data)
            if left > 0:
                receiver.response_body(data)
                return
            end = len(data) + left
        else:
            receiver.response_body(data)
            return
        if end == len(data):
            receiver.response_body(data)
            self._done(self._keep)
        else:
            receiver.response_body(data[:end])
            self._done(False)  # it sent more than the response: nothing it says next can be trusted

    def _end_of_known(self, data: bytes) -> int:
        """Where the head ends when it is the one before, but for its content-length, which is then in
        ``_left``; else -1.
        """
        before, after = self._before, self._after
        if self._known is None or not data.startswith(before):
            return -1
        at = len(before)
        digits_end = data.find(b"\r", at, at + 16)
        digits = data[at:digits_end]
        if digits_end < 0 or not data.startswith(after, digits_end) or not digits.isdigit():
            return -1
        self._left = int(digits)
        return digits_end + len(after) - 4

    def _is_whole(self, data: bytes, end: int) -> bool:
        """Whether this is all of a response that begins with the known head, and there is a body in it."""
        known = self._known
        assert known
        return known.simple and 0 < self._left == len(data) - end - 4 and not self._without_body

    def _take_head(self, data: bytes, receiver: Receiver) -> bytes | None:
        """Body bytes that came with the head, or None while there is no body to read (yet)."""
        if self._partial:
            data = self._partial + data
        head, end = self._known, self._end_of_known(data)
        if end < 0:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._partial = data
                if len(data) > MAX_HEAD_BYTES or not data.startswith(b"HTTP/1."[: len(data)]):
                    self._broken("malformed")
                return None
            try:
                head, self._left = self._parse(data[: end + 4])
            except ValueError:
                self._broken("malformed")
                return None
        assert head
        if self._partial:
            self._partial = b""
        if head.status < 200:
            if head.status != 101:  # an interim response
                rest = data[end + 4 :]
                return self._take_head(rest, receiver) if rest else None
            self._state = _TUNNEL
        elif head.chunked:
            self._state, self._framing = _CHUNKED, ChunkFraming()
        elif head.has_length:
            self._state = _LENGTH
        else:
            self._state = _UNTIL_CLOSE
        if self._without_body or head.status in (204, 304):
            self._state, self._left = _LENGTH, 0
        self.fresh = False
        self._keep = head.keeps_alive
        receiver.response_head(head, data[:end])
        if self._state == _LENGTH and not self._left:
            self._done(self._keep and len(data) == end + 4)
            return None
        return data[end + 4 :] or None

    def _parse(self, raw: bytes) -> tuple[ResponseHead, int]:
        head = ResponseHead(raw[:-4])
        self._known = None
        if not head.has_length or head.status < 200:
            return head, 0
        at = raw.lower().find(b"\r\ncontent-length:") + 17
        digits = raw[at : raw.find(b"\r\n", at)].strip()
        if not digits.isdigit():
            raise ValueError("content-length is not a number")
        at = raw.find(digits, at)
        self._before, self._after = raw[:at], raw[at + len(digits) :]
        self._known = head
        return head, int(digits)

    def _done(self, keep: bool) -> None:
        receiver = self.receiver
        if receiver is None:
            return
        self.receiver = None
        if keep:
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
            return  # the next sweep forgets it
        if (self._state == _UNTIL_CLOSE and exc is None) or self._state == _TUNNEL:
            receiver.response_done()
        else:
            stale = self._state == _HEAD and not self._partial and not self.fresh
            receiver.response_broken("stale" if stale else "reset")

    def pause_writing(self) -> None:
        if self.receiver:
            self.receiver.upstream_paused(True)

    def resume_writing(self) -> None:
        if self.receiver:
            self.receiver.upstream_paused(False)
