"""A bare HTTP/2 client that sends whatever bytes it is told to, and a gRPC service that sends back what it
gets.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import NamedTuple, cast

from pointsman.extproc.grpc import Stream
from pointsman.extproc.h2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    GOAWAY,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Code,
)
from pointsman.extproc.hpack import Field, encode

WAIT_S = 10.0
"""Longest wait for a frame."""
ECHO = "/test.Echo/Echo"


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def code(self) -> Code:
        """Of a RST_STREAM or GOAWAY."""
        return Code(
            int.from_bytes(self.payload[-4:] if self.kind == RST_STREAM else self.payload[4:8], "big")
        )


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame's bytes."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def request(path: str = ECHO, *more: Field) -> list[Field]:
    """The fields of a gRPC request."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"test"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *more,
    ]


def headers(stream: int, fields: Iterable[Field] | None = None, flags: int = 0) -> bytes:
    """A HEADERS frame with all of the fields; default: those of an echo."""
    return frame(HEADERS, END_HEADERS | flags, stream, encode(request() if fields is None else fields))


def message(data: bytes) -> bytes:
    """A gRPC message's bytes."""
    return b"\0" + struct.pack(">I", len(data)) + data


def data(stream: int, payload: bytes, flags: int = 0) -> bytes:
    """A DATA frame."""
    return frame(DATA, flags, stream, payload)


def settings(**values: int) -> bytes:
    """A SETTINGS frame, by names such as ``initial_window``."""
    names = ("", "table", "push", "streams", "initial_window", "max_frame", "max_list")
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", names.index(n), v) for n, v in values.items()))


def window(stream: int, more: int) -> bytes:
    """A WINDOW_UPDATE frame."""
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", more))


def resized(block: bytes) -> bytes:
    """The block with the table size before it that a server's settings ask for."""
    return b"\x20" + block


class Peer:
    """A client's end of a connection: ``async with Peer(port) as peer``."""

    def __init__(self, port: int, *, opening: bytes | None = None) -> None:
        self._port = port
        self._opening = PREFACE + settings() if opening is None else opening

    async def __aenter__(self) -> Peer:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self.send(self._opening)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.transport.abort()

    def send(self, *parts: bytes) -> None:
        """Send bytes, as they are."""
        self._writer.write(b"".join(parts))

    async def flush(self) -> None:
        """Wait until most of what was sent is on its way."""
        await self._writer.drain()

    def reads(self, on: bool) -> None:
        """Take what the server sends from the socket, or leave it there."""
        transport = cast(asyncio.Transport, self._writer.transport)
        if on:
            transport.resume_reading()
        else:
            transport.pause_reading()

    async def take(self, size: int) -> bytes:
        """The next bytes, whatever frames they are."""
        async with asyncio.timeout(WAIT_S):
            return await self._reader.readexactly(size)

    async def read(self) -> Frame | None:
        """The next frame; None when the connection has ended."""
        try:
            async with asyncio.timeout(WAIT_S):
                head = await self._reader.readexactly(9)
                size = int.from_bytes(head[:3], "big")
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                return Frame(kind, flags, stream, await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def until(self, kind: int, stream: int | None = None, flags: int = 0) -> Frame:
        """The next frame of this kind, on this stream, with at least these flags; others are skipped."""
        while found := await self.read():
            if found.kind == kind and stream in (None, found.stream) and found.flags & flags == flags:
                return found
        raise EOFError(f"the connection ended before frame {kind} on stream {stream}")

    async def failure(self) -> Code:
        """Of the whole connection: the GOAWAY's code, once the server has closed."""
        found = await self.until(GOAWAY)
        while await self.read():
            pass
        return found.code

    async def reset(self, stream: int) -> Code:
        """Of one stream."""
        return (await self.until(RST_STREAM, stream)).code

    async def acknowledge(self) -> None:
        """Take the server's settings."""
        await self.until(SETTINGS)
        self.send(frame(SETTINGS, ACK, 0))

    async def body(self, stream: int, size: int) -> bytes:
        """The next ``size`` bytes of a stream's DATA."""
        found = b""
        while len(found) < size:
            found += (await self.until(DATA, stream)).payload
        return found


def pieces(stream: int, block: bytes, size: int, flags: int = 0) -> bytes:
    """A header block over HEADERS and CONTINUATION frames of ``size`` bytes."""
    parts = [block[i : i + size] for i in range(0, len(block), size)]
    last = len(parts) - 1
    return b"".join(
        frame(
            CONTINUATION if i else HEADERS,
            (0 if i else flags) | (END_HEADERS if i == last else 0),
            stream,
            part,
        )
        for i, part in enumerate(parts)
    )


class Echo:
    """Sends back what it gets, and keeps what it was told."""

    def __init__(self, stream: Stream, fields: Mapping[str, str]) -> None:
        self.stream = stream
        self.headers = fields
        self.got: list[bytes] = []
        self.told: list[str] = []
        self.over = asyncio.Event()

    def message(self, data: bytes) -> None:
        self.got.append(data)
        self.stream.send(data)

    def half_closed(self) -> None:
        self.told.append("half closed")
        self.stream.finish()

    def cancelled(self) -> None:
        self.told.append("cancelled")
        self.over.set()

    def resumed(self) -> None:
        self.told.append("resumed")


class Calls(list[Echo]):
    """A service of echoes, which it keeps."""

    def __init__(self, kind: type[Echo] = Echo) -> None:
        super().__init__()
        self.kind = kind
        self.begun = asyncio.Event()

    def __call__(self, stream: Stream, fields: Mapping[str, str]) -> Echo:
        self.append(self.kind(stream, fields))
        self.begun.set()
        return self[-1]
