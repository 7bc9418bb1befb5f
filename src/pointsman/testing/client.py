"""An HTTP client that sends any bytes, well-formed or not, and shows the answer as it came."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Callable
from types import TracebackType
from typing import cast

from pointsman.testing.upstream import LINGER_RESET, PATIENCE_S, chunk


def message(
    method: str = "POST",
    target: str = "/v1/completions",
    body: bytes | object = None,
    *lines: str,
    version: str = "1.1",
    chunks: list[bytes] | None = None,
) -> bytes:
    """A request: ``body`` (bytes, or an object to be JSON) by its length, or ``chunks`` chunked."""
    head = [f"{method} {target} HTTP/{version}", "host: gateway.test", *lines]
    if chunks is not None:
        head.append("transfer-encoding: chunked")
        payload = b"".join(map(chunk, chunks)) + b"0\r\n\r\n"
    else:
        payload = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        if payload:
            head.append(f"content-length: {len(payload)}")
    return "\r\n".join([*head, "", ""]).encode() + payload


ASK = message(body={"model": "m", "prompt": "Hello"})
ASK_STREAM = message(body={"model": "m", "prompt": "Hello", "stream": True})


class Response:
    """``raw`` is the body as it came, ``body`` without chunk framing; ``complete`` unless it was cut."""

    def __init__(self, raw_head: bytes) -> None:
        self.raw_head = raw_head
        first, *lines = raw_head.decode("latin-1").rstrip("\r\n").split("\r\n")
        self.version, status, _ = first.split(" ", 2)
        self.status = int(status)
        pairs = [line.partition(":") for line in lines]
        self.names = [name.lower() for name, _, _ in pairs]
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}
        self.raw = b""
        self.body = b""
        self.complete = False

    def error(self) -> dict[str, object]:
        """The ``error`` object of the body."""
        found: dict[str, object] = json.loads(self.body)["error"]
        return found


class Cut(ConnectionError):
    """The connection ended inside what was being read; ``partial`` is what had come."""

    def __init__(self, partial: bytes) -> None:
        super().__init__("the connection ended too early")
        self.partial = partial


class RawClient(asyncio.Protocol):
    """``async with RawClient(port) as client: client.send(...); await client.response()``."""

    transport: asyncio.Transport

    def __init__(
        self, port: int, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None, receive_bytes: int = 0
    ) -> None:
        self._port = port
        self._host = host
        self._tls = tls
        self._receive_bytes = receive_bytes
        """Size of the socket's receive buffer; 0 leaves it to the system."""
        self._buffer = bytearray()
        self._news = asyncio.Event()
        self.ended = False
        self.was_reset = False
        """The other side ended the connection with a reset, not in good order."""
        self.writable = asyncio.Event()
        """The other side takes what we send."""
        self.writable.set()

    async def __aenter__(self) -> RawClient:
        sock = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        sock.setblocking(False)
        if self._receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_bytes)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, (self._host, self._port))
            await loop.create_connection(
                lambda: self, sock=sock, ssl=self._tls, server_hostname="localhost" if self._tls else None
            )
        except BaseException:
            sock.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    # -- what the event loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self.was_reset = isinstance(exc, ConnectionResetError)
        self._news.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    # -- sending

    def send(self, *data: bytes) -> None:
        """Send, or forget it when the other side has closed."""
        if not self.transport.is_closing():
            self.transport.write(b"".join(data))

    async def send_pieces(self, *pieces: bytes) -> None:
        """Send so that each piece is a read of its own on the other side."""
        for piece in pieces:
            self.send(piece)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def leave(self) -> None:
        """Close, whatever is under way."""
        self.transport.abort()

    def reset(self) -> None:
        """Close with a TCP reset."""
        if not self.transport.is_closing():
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            self.transport.abort()

    # -- reading

    async def _until(self, found: Callable[[], int]) -> bytes:
        """The bytes up to the index that ``found`` gives, as soon as it is not negative."""
        async with asyncio.timeout(PATIENCE_S):
            while (end := found()) < 0:
                if self.ended:
                    raise Cut(bytes(self._buffer))
                self._news.clear()
                await self._news.wait()
        data = bytes(self._buffer[:end])
        del self._buffer[:end]
        return data

    async def read(self, size: int) -> bytes:
        return await self._until(lambda: size if len(self._buffer) >= size else -1)

    async def line(self, mark: bytes = b"\r\n") -> bytes:
        """What comes up to ``mark``, included."""

        def end() -> int:
            at = self._buffer.find(mark)
            return at + len(mark) if at >= 0 else -1

        return await self._until(end)

    async def closed(self) -> bytes:
        """What still comes until the other side closes."""
        return await self._until(lambda: len(self._buffer) if self.ended else -1)

    async def head(self) -> Response:
        """The next response's head; interim ones count."""
        return Response(await self.line(b"\r\n\r\n"))

    async def response(self, *, bodyless: bool = False) -> Response:
        """The next response, whole or as far as it comes."""
        found = await self.head()
        try:
            if not bodyless and found.status not in (204, 304):
                await self._body(found)
        except Cut as cut:
            found.raw += cut.partial
        else:
            found.complete = not self.was_reset
        return found

    async def _body(self, found: Response) -> None:
        if "chunked" in found.headers.get("transfer-encoding", ""):
            while True:
                line = await self.line()
                found.raw += line
                size = int(line.partition(b";")[0], 16)
                if not size:
                    break
                data = await self.read(size + 2)
                found.raw += data
                found.body += data[:-2]
            while line != b"\r\n":  # the trailer section
                line = await self.line()
                found.raw += line
        elif "content-length" in found.headers:
            found.raw = found.body = await self.read(int(found.headers["content-length"]))
        else:
            found.raw = found.body = await self.closed()

    async def ask(self, data: bytes = ASK) -> Response:
        self.send(data)
        return await self.response()
