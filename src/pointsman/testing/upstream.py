"""A scripted model server on loopback: says what a test tells it to, byte for byte, and keeps what it
heard.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from types import TracebackType
from typing import cast

PATIENCE_S = 10.0
"""A test that waits longer has failed."""
PROBES = ("/v1/models", "/metrics", "/kv_event_sources")
LINGER_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends a reset."""


class End(Enum):
    """How a script ends a connection."""

    CLOSE = "close"
    RESET = "reset"


Step = bytes | asyncio.Event | End
"""Bytes to send (waiting while the other side takes no more), an event to wait for, or an end."""


class Received:
    """A request as it came."""

    def __init__(self, raw_head: bytes, connection: int) -> None:
        self.raw_head = raw_head
        first, *self.lines = raw_head.decode("latin-1").rstrip("\r\n").split("\r\n")
        self.method, self.target, self.version = first.split(" ")
        pairs = [line.partition(":") for line in self.lines]
        self.names = [name.lower() for name, _, _ in pairs]
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}
        self.body = b""
        self.connection = connection
        """Number of the connection it came on, from 1."""
        self.sent_bytes = 0
        """Of the answer, as far as the other side took them."""
        self.tunnelled = asyncio.Queue[bytes]()
        """What came after the request on an upgraded connection."""
        self.gone = asyncio.Event()
        """The connection is closed, by whichever side."""


Script = Callable[[Received], Iterable[Step]]


def reply(body: bytes = b"{}", status: int = 200, *lines: str, length: bool = True) -> bytes:
    """A whole response, by its length unless told otherwise (then the connection's end ends it)."""
    head = [f"HTTP/1.1 {status} Said", *lines, *([f"content-length: {len(body)}"] if length else [])]
    return "\r\n".join([*head, "", ""]).encode() + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def head(*lines: str, status: int = 200) -> bytes:
    """The head of a chunked response."""
    return "\r\n".join([f"HTTP/1.1 {status} Said", *lines, "transfer-encoding: chunked", "", ""]).encode()


SSE_HEAD = head("content-type: text/event-stream; charset=utf-8")
LAST_CHUNK = b"0\r\n\r\n"


def event(payload: object) -> bytes:
    """A server-sent event as one chunk; a string is its data as it stands."""
    text = payload if isinstance(payload, str) else json.dumps(payload)
    return chunk(f"data: {text}\n\n".encode())


def completion(request: Received) -> list[Step]:
    """The default script: a short completion, with usage."""
    usage = {"prompt_tokens": 8, "completion_tokens": 1, "total_tokens": 9}
    body = {"id": "cmpl-1", "object": "text_completion", "choices": [{"text": " a"}], "usage": usage}
    return [reply(json.dumps(body).encode(), 200, "content-type: application/json")]


class FakeUpstream:
    """``async with FakeUpstream(script) as upstream``. ``script`` may be replaced at any time.

    GET of /v1/models, of the metrics page and of /kv_event_sources are answered from ``models``, ``page``
    and ``kv_event_sources`` and kept in ``probes``; every other request is kept in ``requests`` and answered
    by the script.
    """

    def __init__(
        self,
        script: Script | Sequence[Step] = completion,
        *,
        models: Sequence[str] = ("m",),
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.script = script
        self.models = models
        self.page = b""
        """The metrics page; empty: 404."""
        self.kv_event_sources = b""
        """The same of what it says of its KV events."""
        self.probe_gate = asyncio.Event()
        self.probe_gate.set()
        """While it is clear, probes get no answer."""
        self.requests: list[Received] = []
        self.probes: list[Received] = []
        self.connections = 0
        self.reads = True
        """Whether connections opened from now on are read."""
        self.port = 0
        self._host = host
        self._tls = tls
        self._arrived = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._open: set[_Connection] = set()

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}"

    @property
    def name(self) -> str:
        """What the gateway calls it."""
        return self.url.partition("//")[2]

    async def start(self) -> None:
        """Listen; on the same port again after ``stop``."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), self._host, self.port, ssl=self._tls, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections and drop those that are open."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        await self.drop()

    async def drop(self) -> None:
        """Close every open connection."""
        connections = list(self._open)
        for connection in connections:
            connection.transport.abort()
        for connection in connections:
            await connection.lost.wait()

    async def request(self, number: int = 1) -> Received:
        """The n-th request, as soon as it is here."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.requests) < number:
                self._arrived.clear()
                await self._arrived.wait()
        return self.requests[number - 1]

    def steps(self, request: Received) -> Iterable[Step]:
        """What is said to ``request``."""
        if request.method == "GET" and request.target.endswith(PROBES):
            self.probes.append(request)
            return self._probe(request)
        self.requests.append(request)
        self._arrived.set()
        return self.script(request) if callable(self.script) else self.script

    def _probe(self, request: Received) -> Iterable[Step]:
        yield self.probe_gate
        if request.target.endswith("/metrics"):
            yield reply(self.page, 200 if self.page else 404)
        elif request.target.endswith("/kv_event_sources"):
            yield reply(self.kv_event_sources, 200 if self.kv_event_sources else 404)
        else:
            data = [{"id": model, "object": "model"} for model in self.models]
            yield reply(json.dumps({"object": "list", "data": data}).encode())

    async def __aenter__(self) -> FakeUpstream:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


class _Connection(asyncio.Protocol):
    """One connection to the fake: requests by length or in chunks, one at a time, in order."""

    transport: asyncio.Transport

    def __init__(self, upstream: FakeUpstream) -> None:
        self._upstream = upstream
        self._buffer = b""
        self._current: Received | None = None
        self._task: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._upstream.connections += 1
        self._number = self._upstream.connections
        self._upstream._open.add(self)
        if not self._upstream.reads:
            self.transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream._open.discard(self)
        if self._task:
            self._task.cancel()
        if self._current:
            self._current.gone.set()
        self.lost.set()

    def data_received(self, data: bytes) -> None:
        if self._current is not None and "upgrade" in self._current.headers:
            self._current.tunnelled.put_nowait(data)
            return
        self._buffer += data
        if self._current is None:
            self._take()

    def _take(self) -> None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        request = Received(self._buffer[: end + 4], self._number)
        if request.headers.get("transfer-encoding") == "chunked":
            body = _unchunked(self._buffer, end + 4)
            if body is None:
                return
            request.body, self._buffer = body, b""
        else:
            body_end = end + 4 + int(request.headers.get("content-length", "0"))
            if len(self._buffer) < body_end:
                return
            request.body, self._buffer = self._buffer[end + 4 : body_end], self._buffer[body_end:]
        self._current = request
        self._task = asyncio.get_running_loop().create_task(self._answer(request))

    async def _answer(self, request: Received) -> None:
        for step in self._upstream.steps(request):
            match step:
                case asyncio.Event():
                    await step.wait()
                case End.CLOSE:
                    self.transport.close()
                    return
                case End.RESET:
                    raw: socket.socket = self.transport.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
                    self.transport.abort()
                    return
                case bytes():
                    self.transport.write(step)
                    await self._writable.wait()
                    request.sent_bytes += len(step)
                    await asyncio.sleep(0)  # so that each step is a read of its own
        self._current = None
        self._take()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()


def _unchunked(data: bytes, at: int) -> bytes | None:
    """The body whose chunks begin at ``at`` and end with the data; None while it is not complete."""
    if not data.endswith(LAST_CHUNK):
        return None
    pieces: list[bytes] = []
    while True:
        line = data.find(b"\r\n", at)
        if line < 0:
            return None
        size = int(data[at:line], 16)
        at = line + 2 + size + 2
        if not size:
            return b"".join(pieces) if at == len(data) else None
        pieces.append(data[line + 2 : line + 2 + size])
