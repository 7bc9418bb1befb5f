"""Sends requests over loopback and tells what came back, however it ended."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field

import httptools
import msgspec

from .asks import Ask

READ_BYTES = 64 * 1024
SLOW_READ_BYTES = 16 * 1024
SLOW_BUFFER_BYTES = 4096
SLOW_PAUSE_S = 0.15
NAP_EVERY, NAP_S = 12, 2.5
"""Each so-manieth read of a slow client is this late: longer than the router waits for an engine."""
PATIENCE_S, SLOW_PATIENCE_S = 30.0, 90.0


@dataclass
class Reply:
    """What a client saw. Seconds are the harness's clock."""

    sent_s: float
    ended_s: float = 0.0
    status: int = 0
    body: bytes = b""
    end: str = "cut"
    """complete, cut (the bytes end where they must not), left (by us) or never (we gave up waiting)."""
    error: str = ""
    reusable: bool = False
    headers: dict[bytes, bytes] = field(default_factory=dict)


class _Parser:
    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._parts: list[bytes] = []
        self.chunks = 0
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def body(self) -> bytes:
        return b"".join(self._parts)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._reply.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._reply.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)
        self.chunks += data.count(b"\n\n")

    def on_message_complete(self) -> None:
        if self._reply.status >= 200:
            self._reply.end = "complete"
            self._reply.reusable = self._parser.should_keep_alive()


Pipe = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Client:
    """Connections to one port, kept and reused; ``hurry`` makes slow readers quick."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Pipe] = []
        self.hurry = asyncio.Event()

    async def send(self, ask: Ask, request_id: str) -> Reply:
        """Send, read to the end (or leave, as ``ask`` says), and tell."""
        reply = Reply(time.monotonic())
        parser = _Parser(reply)
        pipe = None if ask.new_connection else self._reuse()
        try:
            if pipe is None:
                pipe = await self._open(SLOW_BUFFER_BYTES if ask.slow else 0)
            async with asyncio.timeout(SLOW_PATIENCE_S if ask.slow else PATIENCE_S):
                pipe[1].write(ask.bytes(request_id))
                await self._left_after(ask, self._read(pipe[0], ask, parser, reply))
        except TimeoutError:
            reply.end = "never"
        except (OSError, httptools.HttpParserError) as exc:
            reply.end, reply.error = "cut", repr(exc)
        reply.body = parser.body()
        reply.ended_s = time.monotonic()
        if pipe is not None:
            self._put_back(pipe, keep=reply.end == "complete" and reply.reusable and not ask.slow)
        return reply

    async def _left_after(self, ask: Ask, reading: Awaitable[None]) -> None:
        if ask.leave_after_s is None:
            await reading
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ask.leave_after_s):
                await reading

    async def _read(self, reader: asyncio.StreamReader, ask: Ask, parser: _Parser, reply: Reply) -> None:
        reads = 0
        if ask.leaves:
            reply.end = "left"
        while reply.end != "complete":
            if ask.slow:
                reads += 1
                await self._dawdle(NAP_S if reads % NAP_EVERY == 0 else SLOW_PAUSE_S)
            data = await reader.read(SLOW_READ_BYTES if ask.slow else READ_BYTES)
            if not data:
                reply.end = "cut"
                return
            parser.feed(data)
            if ask.leave_after_chunks is not None and parser.chunks >= ask.leave_after_chunks:
                return

    async def _dawdle(self, for_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(for_s):
                await self.hurry.wait()

    def _reuse(self) -> Pipe | None:
        while self._idle:
            pipe = self._idle.pop()
            if not pipe[0].at_eof() and not pipe[1].is_closing():
                return pipe
            pipe[1].transport.abort()
        return None

    def _put_back(self, pipe: Pipe, *, keep: bool) -> None:
        if keep:
            self._idle.append(pipe)
        else:
            pipe[1].transport.abort()

    async def _open(self, receive_bytes: int) -> Pipe:
        sock = socket.socket()
        sock.setblocking(False)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        except BaseException:
            sock.close()
            raise
        return await asyncio.open_connection(sock=sock, limit=receive_bytes or READ_BYTES)

    def close(self) -> None:
        for _, writer in self._idle:
            writer.transport.abort()
        self._idle.clear()


async def call(port: int, method: str, path: str, body: object = None) -> bytes:
    """The body of the answer to one small request; ``OSError`` when it is not a 2xx."""
    payload = b"" if body is None else msgspec.json.encode(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"{method} {path} HTTP/1.1\r\nhost: soak\r\ncontent-length: {len(payload)}\r\n\r\n"
        writer.write(head.encode() + payload)
        reply = Reply(time.monotonic())
        parser = _Parser(reply)
        async with asyncio.timeout(PATIENCE_S):
            while reply.end != "complete":
                data = await reader.read(READ_BYTES)
                if not data:
                    break
                parser.feed(data)
        if reply.end != "complete" or not 200 <= reply.status < 300:
            raise OSError(f"{method} {path}: status {reply.status}, {reply.end}")
        return parser.body()
    finally:
        writer.transport.abort()
