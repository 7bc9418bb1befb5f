"""A scripted model server over loopback: each request is answered by the steps its script returns."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

Step = bytes | asyncio.Event
"""Bytes to write, or an event to wait for. Afterwards the connection stays open unless CLOSE ends it."""
CLOSE = b"close this connection"
Script = Callable[[int, dict[str, Any]], Sequence[Step]]


def sse(*events: object, head: bytes = b"") -> bytes:
    """A whole streamed answer: chunked, one chunk an event, ending in [DONE]."""
    return start_sse(head) + b"".join(map(event, (*events, "[DONE]"))) + b"0\r\n\r\n"


def start_sse(head: bytes = b"") -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        + head
        + b"transfer-encoding: chunked\r\n\r\n"
    )


def event(payload: object) -> bytes:
    data = b"data: " + (payload if isinstance(payload, str) else json.dumps(payload)).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


def token(text: str = " a") -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text}]}


def usage(prompt: int, output: int, cached: int | None = None) -> dict[str, Any]:
    details = None if cached is None else {"cached_tokens": cached}
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": details}
    return {"choices": [], "usage": counts}


def plain(status: int, body: object, head: bytes = b"") -> bytes:
    data = json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n%s\r\n%s" % (status, len(data), head, data)


class Server:
    """``script(n, body)`` answers the n-th POST; ``heads`` and ``bodies`` are what came."""

    def __init__(self) -> None:
        self.script: Script = lambda n, body: [
            sse(*[token()] * body["max_tokens"], usage(10, body["max_tokens"]))
        ]
        self.heads: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.connections = 0
        self.arrived = asyncio.Event()
        """The first POST has come."""
        self.models: bytes = plain(200, {"data": [{"id": "tiny"}]})
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            if head.startswith("GET"):
                writer.write(self.models)
                continue
            length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            self.heads.append(head)
            self.bodies.append(body)
            self.arrived.set()
            for step in self.script(len(self.bodies), body):
                if isinstance(step, asyncio.Event):
                    await writer.drain()
                    await step.wait()
                elif step is CLOSE:
                    return
                else:
                    writer.write(step)


@pytest.fixture
def say() -> Any:
    """The builders of answers above: ``say.sse``, ``say.token`` and so on."""
    names = ("CLOSE", "event", "plain", "sse", "start_sse", "token", "usage")
    return SimpleNamespace(**{name: globals()[name] for name in names})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    await made.start()
    yield made
    await made.stop()
