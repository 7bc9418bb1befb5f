"""A client that shows what is on the wire; simulated engines run on uvloop, so their tests do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvloop

TIMEOUT_S = 10


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], uvloop.Loop]]:
    return {"uvloop": uvloop.new_event_loop}


class Answer:
    """A response read to its end, however it ended."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1])
        pairs = (line.partition(": ") for line in lines[1:])
        self.headers = {name.lower(): value for name, _, value in pairs}

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def chunks(self) -> list[bytes]:
        """Payloads of the complete chunks of a chunked body."""
        found, rest = [], self.body
        while b"\r\n" in rest:
            size, _, rest = rest.partition(b"\r\n")
            if int(size, 16) == 0 or len(rest) < int(size, 16) + 2:
                break
            found.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        return found

    @property
    def complete(self) -> bool:
        """A chunked body that was ended as it should."""
        return self.body.endswith(b"\r\n0\r\n\r\n")

    @property
    def events(self) -> list[Any]:
        """The data of each server-sent event."""
        return [
            line[6:] if line == b"data: [DONE]" else json.loads(line[6:])
            for chunk in self.chunks
            for line in chunk.split(b"\n")
            if line.startswith(b"data: ")
        ]


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, path: str, body: object = None, *, method: str = "POST", head: str = "") -> None:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        self.writer.write(
            f"{method} {path} HTTP/1.1\r\nhost: x\r\n{head}content-length: {len(data)}\r\n\r\n".encode()
            + data
        )

    async def until(self, end: bytes) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.reader.readuntil(end)

    async def rest(self) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.reader.read()

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        self.writer.transport.abort()


Connect = Callable[[str], Awaitable[Wire]]
Ask = Callable[..., Awaitable[Answer]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    opened: list[Wire] = []

    async def to(url: str) -> Wire:
        address = urlsplit(url)
        wire = Wire(*await asyncio.open_connection(address.hostname, address.port))
        opened.append(wire)
        return wire

    yield to
    for wire in opened:
        wire.close()


@pytest.fixture
def ask(connect: Connect) -> Ask:
    """One request on a connection of its own: ``await ask(url, path, body)``."""

    async def request(url: str, path: str, body: object = None, **more: str) -> Answer:
        method = "GET" if body is None else "POST"
        wire = await connect(url)
        wire.send(
            path, body, **{"method": method, **more, "head": "connection: close\r\n" + more.get("head", "")}
        )
        return Answer(await wire.rest())

    return request
