"""An HTTP client that sends any bytes, well-formed or not, and shows the answer as it came."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from types import TracebackType

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


class RawClient:
    """``async with RawClient(port) as client: client.send(...); await client.response()``."""

    def __init__(
        self, port: int, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None, receive_bytes: int = 0
    ) -> None:
        self._port = port
        self._host = host
        self._tls = tls
        self._receive_bytes = receive_bytes
        """Size of the socket's receive buffer; 0 leaves it to the system."""

    async def __aenter__(self) -> RawClient:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        sock = socket.socket(family)
        sock.setblocking(False)
        if self._receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_bytes)
        await asyncio.get_running_loop().sock_connect(sock, (self._host, self._port))
        self.reader, self.writer = await asyncio.open_connection(
            sock=sock, ssl=self._tls, server_hostname="localhost" if self._tls else None
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def send_pieces(self, *pieces: bytes) -> None:
        """Send so that each piece is a read of its own on the other side."""
        for piece in pieces:
            self.writer.write(piece)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def leave(self) -> None:
        """Close, whatever is under way."""
        self.writer.transport.abort()

    def reset(self) -> None:
        """Close with a TCP reset."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        self.leave()

    async def head(self) -> Response:
        """The next response's head; interim ones count."""
        async with asyncio.timeout(PATIENCE_S):
            return Response(await self.reader.readuntil(b"\r\n\r\n"))

    async def response(self, *, bodyless: bool = False) -> Response:
        """The next response, whole or as far as it comes."""
        found = await self.head()
        try:
            if not bodyless and found.status not in (204, 304):
                async with asyncio.timeout(PATIENCE_S):
                    await self._body(found)
        except (asyncio.IncompleteReadError, ConnectionError) as cut:
            if isinstance(cut, asyncio.IncompleteReadError):
                found.raw += cut.partial
            return found
        found.complete = True
        return found

    async def _body(self, found: Response) -> None:
        if "chunked" in found.headers.get("transfer-encoding", ""):
            while True:
                line = await self.reader.readuntil(b"\r\n")
                found.raw += line
                size = int(line.partition(b";")[0], 16)
                data = await self.reader.readexactly(size + 2)
                found.raw += data
                found.body += data[:-2]
                if not size:
                    return
        elif "content-length" in found.headers:
            found.raw = found.body = await self.reader.readexactly(int(found.headers["content-length"]))
        else:
            found.raw = found.body = await self.reader.read(-1)

    async def ask(self, data: bytes = ASK) -> Response:
        self.send(data)
        return await self.response()

    async def closed(self) -> bytes:
        """What still comes until the other side closes."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self.reader.read(-1)
        except ConnectionError:
            return b""
