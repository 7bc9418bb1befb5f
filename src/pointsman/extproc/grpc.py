"""gRPC calls on HTTP/2: a small server whose handlers are plain synchronous objects.

A service is a function that makes one ``Call`` for each RPC; the call is told of messages as they arrive
and answers through its ``Stream``, at once or later from the same event loop. Each call ends exactly once:
by its own ``finish``, or by ``cancelled`` when the transport ended it (reset, connection lost, deadline, an
exception in the call itself, a message that is not allowed).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import ssl
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import Final, Protocol
from urllib.parse import quote

from pointsman.errors import SettingsError
from pointsman.extproc.h2 import Connection
from pointsman.extproc.h2_frames import Code
from pointsman.extproc.h2_limits import Limits
from pointsman.extproc.h2_sending import Receiver
from pointsman.extproc.h2_sending import Stream as Http2Stream
from pointsman.extproc.hpack import encode
from pointsman.extproc.http_fields import Head

log = logging.getLogger(__name__)

OK: Final = 0
INVALID_ARGUMENT: Final = 3
DEADLINE_EXCEEDED: Final = 4
NOT_FOUND: Final = 5
RESOURCE_EXHAUSTED: Final = 8
UNIMPLEMENTED: Final = 12
INTERNAL: Final = 13
UNAVAILABLE: Final = 14

PAUSED_BYTES: Final = 64 * 1024
"""A stream is paused while more than this waits for the peer's windows."""


class Stream(Protocol):
    """One RPC, as a handler sees it. Once the RPC has ended, both methods do nothing."""

    def send(self, message: bytes) -> None:
        """Send one message; several in one turn of the event loop are written together."""

    def finish(self, status: int = OK, message: str = "") -> None:
        """End the RPC, after what has been sent. The call is told nothing more."""

    @property
    def paused(self) -> bool:
        """The peer takes no more at present: send what can wait after ``Call.resumed``."""


class Call(Protocol):
    """What a service makes for one RPC."""

    def message(self, data: bytes) -> None:
        """A whole message has arrived."""

    def half_closed(self) -> None:
        """The peer sends no more."""

    def cancelled(self) -> None:
        """The RPC has ended without ``finish``; the last thing a call is told."""

    def resumed(self) -> None:
        """After ``Stream.paused``: everything sent has left."""


Service = Callable[[Stream, Mapping[str, str]], Call]
"""Makes the call of an RPC, given its metadata: names in lower case, values of one name joined by commas."""


class RpcError(Exception):
    """Raised by a call or service: ends its RPC with this status."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class GrpcServer:
    """Serves RPCs by their full paths, as in ``/grpc.health.v1.Health/Check``."""

    def __init__(
        self,
        services: Mapping[str, Service],
        limits: Limits | None = None,
        max_message_bytes: int = 64 << 20,
        max_partial_bytes: int = 256 << 20,
    ) -> None:
        self.services = services
        self.limits = limits or Limits()
        self.max_message_bytes = max_message_bytes
        self.max_partial_bytes = max_partial_bytes
        """Of all messages that have arrived in part; beyond, RPCs that add to them end."""
        self.partial_bytes = 0
        self.connections: set[Connection] = set()
        self.heads: dict[bytes, Head] = {}
        self._listeners: list[asyncio.Server] = []
        self._paths: list[str] = []

    # -- life

    async def start(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        path: str | None = None,
        tls: ssl.SSLContext | None = None,
        reuse_port: bool = False,
        setting: str = "picker.port",
    ) -> int:
        """Listen on an address, or on the unix socket ``path``; returns the port (0 for a socket).

        May be called several times. ``setting`` is the key to name when the address cannot be had.
        """
        loop = asyncio.get_running_loop()
        if tls:
            tls.set_alpn_protocols(["h2"])
        try:
            if path is not None:
                with suppress(FileNotFoundError):
                    if not stat.S_ISSOCK(os.stat(path).st_mode):
                        raise SettingsError(f"{setting}: {path} exists and is no socket; choose another")
                    os.unlink(path)
                listener = await loop.create_unix_server(self._connection, path, ssl=tls, backlog=4096)
                self._paths.append(path)
            else:
                listener = await loop.create_server(
                    self._connection, host, port, ssl=tls, backlog=4096, reuse_port=reuse_port or None
                )
        except OSError as exc:
            where = path if path is not None else f"{host}:{port}"
            why = "is in use" if exc.errno == errno.EADDRINUSE else f"cannot be opened: {exc.strerror}"
            raise SettingsError(f"{setting}: {where} {why}; choose another") from exc
        self._listeners.append(listener)
        return 0 if path is not None else int(listener.sockets[0].getsockname()[1])

    async def drain(self, timeout_s: float) -> None:
        """Take no new connections or RPCs and let those under way end for ``timeout_s``."""
        self._stop_listening()
        for connection in list(self.connections):
            connection.drain()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.connections and loop.time() < deadline:  # noqa: ASYNC110 - bounded by timeout_s
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """Cut whatever is left."""
        self._stop_listening()
        for connection in list(self.connections):
            connection.abort()

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.close()
        for path in self._paths:
            Path(path).unlink(missing_ok=True)
        self._listeners.clear()
        self._paths.clear()

    def _connection(self) -> Connection:
        return Connection(self)

    # -- RPCs (h2.Host)

    def request(self, stream: Http2Stream, head: Head) -> Receiver | None:
        headers = head.headers
        if not headers.get("content-type", "").startswith("application/grpc"):
            stream.finish(_NOT_GRPC)
            return None
        service = self.services.get(head.path)
        if service is None or head.method != "POST":
            _refuse(stream, UNIMPLEMENTED, f"there is no {head.method} {head.path}")
            return None
        rpc = Rpc(self, stream)
        rpc.begin(service, headers)
        return rpc

    def refuse(self, stream: Http2Stream, why: str) -> None:
        _refuse(stream, RESOURCE_EXHAUSTED, why)


class Rpc:
    """One RPC: a handler's ``Stream``, and the receiver of an HTTP/2 stream."""

    __slots__ = (
        "_begun",
        "_call",
        "_deadline",
        "_held",
        "_kept_bytes",
        "_missing",
        "_over",
        "_parts",
        "_prefix",
        "_server",
        "_stream",
    )

    def __init__(self, server: GrpcServer, stream: Http2Stream) -> None:
        self._server = server
        self._stream = stream
        self._call: Call | None = None
        self._over = False
        self._begun = False
        """Our headers have been sent."""
        self._held = False
        """``paused`` was told."""
        self._prefix = b""
        """The beginning of a message's prefix."""
        self._parts: list[bytes] = []
        """The beginning of a message."""
        self._kept_bytes = 0
        self._missing = 0
        """Bytes until that message is whole; 0: there is none."""
        self._deadline: asyncio.TimerHandle | None = None

    def begin(self, service: Service, headers: Mapping[str, str]) -> None:
        """Make the call."""
        timeout = headers.get("grpc-timeout")
        if timeout is not None:
            timeout_s = parse_timeout(timeout)
            if timeout_s is None:
                self.finish(INTERNAL, f"grpc-timeout {timeout!r} is malformed")
                return
            self._deadline = asyncio.get_running_loop().call_later(timeout_s, self._too_late)
        try:
            call = service(self, headers)
        except Exception as exc:
            self._raised(exc)
            return
        if not self._over:
            self._call = call

    # -- the handler's side

    def send(self, message: bytes) -> None:
        if self._over:
            return
        if not self._begun:
            self._begun = True
            self._stream.headers(_HEADERS)
        self._stream.write(_PREFIX.pack(0, len(message)), message)

    def finish(self, status: int = OK, message: str = "") -> None:
        if self._over:
            return
        self._end()
        if self._begun:
            self._stream.finish(_DONE if status == OK and not message else _trailers(status, message))
        else:
            _refuse(self._stream, status, message)

    @property
    def paused(self) -> bool:
        if self._stream.pending_bytes > PAUSED_BYTES:
            self._held = True
            return True
        return False

    # -- the stream's side (Receiver)

    def data(self, data: bytes, at: int, end: int) -> None:
        if self._missing:
            if end - at < self._missing:
                self._missing -= end - at
                self._keep(data[at:end])
                return
            begin, at = at, at + self._missing
            self._missing = 0
            message = b"".join((*self._parts, data[begin:at]))
            self._drop_parts()
            self._deliver(message)
        elif self._prefix:
            data, self._prefix = self._prefix + data[at:end], b""
            at, end = 0, len(data)
        while at < end and not self._over:
            if end - at < 5:
                self._prefix = data[at:end]
                return
            flag, length = _PREFIX.unpack_from(data, at)
            if flag or length > self._server.max_message_bytes:
                self._not_allowed(flag, length)
                return
            begin = at + 5
            at = begin + length
            if at > end:
                self._missing = at - end
                self._keep(data[begin:end])
                return
            self._deliver(data[begin:at])

    def ended(self) -> None:
        if self._missing or self._prefix:
            self._cut(INTERNAL, "the last message is not whole")
        elif self._call is not None:
            self._tell(self._call.half_closed)

    def lost(self) -> None:
        call = self._call
        self._end()
        if call is not None:
            _tell_end(call)

    def drained(self) -> None:
        if self._held and self._call is not None:
            self._held = False
            self._tell(self._call.resumed)

    # -- within

    def _deliver(self, message: bytes) -> None:
        assert self._call is not None
        try:
            self._call.message(message)
        except Exception as exc:
            self._raised(exc)

    def _tell(self, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as exc:
            self._raised(exc)

    def _raised(self, exc: Exception) -> None:
        """A bug in one call ends that call's RPC and no other."""
        if isinstance(exc, RpcError):
            self._cut(exc.status, exc.message)
            return
        log.error("a call failed", exc_info=exc)
        self._cut(INTERNAL, "internal error")

    def _not_allowed(self, flag: int, length: int) -> None:
        if flag == 1:
            self._cut(UNIMPLEMENTED, "compressed messages are not supported")
        elif flag:
            self._cut(INTERNAL, f"a message has the flag {flag}")
        else:
            self._cut(
                RESOURCE_EXHAUSTED,
                f"a message of {length} bytes; {self._server.max_message_bytes} are allowed",
            )

    def _too_late(self) -> None:
        self._cut(DEADLINE_EXCEEDED, "deadline exceeded")

    def _cut(self, status: int, message: str) -> None:
        """End the RPC without its call, which is told."""
        if self._over:
            return
        call = self._call
        if self._stream.stuck():  # the peer does not read: it will not read trailers, either
            self._end()
            self._stream.reset(Code.CANCEL)
        else:
            self.finish(status, message)
        if call is not None:
            _tell_end(call)

    def _end(self) -> None:
        self._over = True
        self._call = None
        self._prefix = b""
        self._missing = 0
        if self._parts:
            self._drop_parts()
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _keep(self, part: bytes) -> None:
        size = len(part) + _PART_BYTES
        self._parts.append(part)
        self._kept_bytes += size
        self._server.partial_bytes += size
        if self._server.partial_bytes > self._server.max_partial_bytes:
            self._cut(RESOURCE_EXHAUSTED, "too many messages have arrived only in part")

    def _drop_parts(self) -> None:
        self._server.partial_bytes -= self._kept_bytes
        self._kept_bytes = 0
        self._parts.clear()


def _tell_end(call: Call) -> None:
    try:
        call.cancelled()
    except Exception:
        log.exception("a call failed at its end")


def unary(answer: Callable[[bytes], bytes]) -> Service:
    """A service of one message and one answer; ``answer`` raises ``RpcError`` for another status."""
    return lambda stream, headers: _Unary(stream, answer)


class _Unary:
    __slots__ = ("_answer", "_message", "_stream")

    def __init__(self, stream: Stream, answer: Callable[[bytes], bytes]) -> None:
        self._stream = stream
        self._answer = answer
        self._message: bytes | None = None

    def message(self, data: bytes) -> None:
        if self._message is not None:
            raise RpcError(UNIMPLEMENTED, "one message is expected")
        self._message = data

    def half_closed(self) -> None:
        if self._message is None:
            raise RpcError(UNIMPLEMENTED, "a message is expected")
        self._stream.send(self._answer(self._message))
        self._stream.finish()

    def cancelled(self) -> None:
        """Nothing is under way between the calls above."""

    def resumed(self) -> None:
        """Never paused: there is one answer."""


def parse_timeout(text: str) -> float | None:
    """Seconds of a ``grpc-timeout``; None if malformed."""
    found = _TIMEOUT(text)
    return int(found[1]) * _UNITS[found[2]] if found else None


def _trailers(status: int, message: str) -> bytes:
    fields = [(b"grpc-status", b"%d" % status)]
    if message:
        fields.append((b"grpc-message", quote(message[:_MESSAGE_CHARS], safe=_PLAIN).encode()))
    if status == UNIMPLEMENTED:
        fields.append((b"grpc-accept-encoding", b"identity"))
    return encode(fields)


def _refuse(stream: Http2Stream, status: int, message: str) -> None:
    """Answer with trailers only."""
    stream.finish(_HEADERS + _trailers(status, message))


_PREFIX = Struct(">BI")
_PART_BYTES = 64
"""What a part costs besides its bytes."""
_HEADERS = b"\x88" + encode([(b"content-type", b"application/grpc")])  # :status 200
_NOT_GRPC = encode([(b":status", b"415")])
_DONE = encode([(b"grpc-status", b"0")])
_MESSAGE_CHARS = 1024
_PLAIN = "".join(chr(c) for c in range(0x20, 0x7F) if c != 0x25)
"""What a grpc-message need not encode."""
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])", re.ASCII).fullmatch
_UNITS: Mapping[str, float] = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
