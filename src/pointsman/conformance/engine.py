"""A fake endpoint: an HTTP server with the metrics page and model list of a vLLM server, set by a case.

It answers no completions: a picker only says where a request goes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec

MODELS = ("base", "adapter-a", "adapter-b")
"""Every endpoint lists all of them: which adapter is loaded is told by the metrics page alone."""
BLOCK_TOKENS = 16
KV_BLOCKS = 4096
READ_PATIENCE_S = 10.0
"""Pickers read pages every 50 ms (llm-d) to a second or so."""


class Load(msgspec.Struct, frozen=True):
    """What a metrics page says."""

    waiting: int = 0
    kv: float = 0.0
    """Share of KV blocks in use, 0 to 1."""
    loras: tuple[str, ...] = ()
    """Adapters that are loaded and running."""
    failing: bool = False
    """There is no page, but an error."""


class Engine:
    """One endpoint; ``address`` is its ``ip:port``."""

    def __init__(self, name: str, host: str, port: int) -> None:
        self.name = name
        self.host = host
        self.port = port
        self.load = Load()
        self._reads = 0
        """Of the present page."""
        self._read = asyncio.Condition()
        self._writers: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}

    @classmethod
    def of(cls, names: Sequence[str], first_port: int) -> dict[str, Engine]:
        """Engines on 127.0.0.2, .3 ...: subsets are matched by address without port."""
        return {
            name: cls(name, f"127.0.0.{i + 2}", first_port and first_port + i) for i, name in enumerate(names)
        }

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    async def show(self, load: Load) -> None:
        """From now on the page says this."""
        async with self._read:
            self.load = load
            self._reads = 0

    async def seen(self) -> bool:
        """Wait until the present page has been read twice: whoever asks again has taken in the first. False
        after ``READ_PATIENCE_S``.
        """
        try:
            async with asyncio.timeout(READ_PATIENCE_S), self._read:
                await self._read.wait_for(lambda: self._reads >= 2)
        except TimeoutError:
            return False
        return True

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests of one connection, one after the other."""
        task: asyncio.Task[None] | None = asyncio.current_task()
        assert task is not None
        self._writers[writer] = task
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode("latin-1").partition("?")[0]
                said = self.load
                status, kind, body = self._page(path)
                head_out = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
                writer.write(head_out.encode() + body)
                await writer.drain()
                if path == "/metrics":
                    async with self._read:
                        self._reads += self.load is said
                        self._read.notify_all()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the picker left
        finally:
            del self._writers[writer]
            writer.close()

    async def leave(self) -> None:
        """Close every connection."""
        tasks = list(self._writers.values())
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*tasks)

    def _page(self, path: str) -> tuple[str, str, bytes]:
        if path == "/metrics" and self.load.failing:
            return "500 Internal Server Error", "text/plain", b"no metrics today"
        if path == "/metrics":
            return "200 OK", "text/plain; version=0.0.4", metrics_page(self.load).encode()
        if path == "/v1/models":
            models = [{"id": name, "object": "model", "owned_by": "conformance"} for name in MODELS]
            return "200 OK", "application/json", json.dumps({"object": "list", "data": models}).encode()
        if path == "/health":
            return "200 OK", "text/plain", b""
        return "404 Not Found", "text/plain", b"a fake endpoint for conformance tests"


def metrics_page(load: Load) -> str:
    """vLLM's names (llm-d's mapping: facts 6)."""
    labels = f'engine="0",model_name="{MODELS[0]}"'
    cache = (
        f'block_size="{BLOCK_TOKENS}",num_gpu_blocks="{KV_BLOCKS}",enable_prefix_caching="True",engine="0"'
    )
    loras = f'max_lora="2",running_lora_adapters="{",".join(load.loras)}",waiting_lora_adapters=""'
    values = {
        f"vllm:num_requests_running{{{labels}}}": 0.0,
        f"vllm:num_requests_waiting{{{labels}}}": float(load.waiting),
        f"vllm:kv_cache_usage_perc{{{labels}}}": load.kv,
        f"vllm:cache_config_info{{{cache}}}": 1.0,
        f"vllm:lora_requests_info{{{loras}}}": 1.7e9,
    }
    lines = []
    for series, value in values.items():
        lines.append(f"# TYPE {series.partition('{')[0]} gauge")
        lines.append(f"{series} {value}")
    return "\n".join([*lines, ""])


@asynccontextmanager
async def running(names: Sequence[str], first_port: int) -> AsyncIterator[dict[str, Engine]]:
    """Engines that listen. ``first_port`` 0 takes free ports."""
    engines = Engine.of(names, first_port)
    servers: list[asyncio.Server] = []
    try:
        for engine in engines.values():
            server = await asyncio.start_server(engine.answer, engine.host, engine.port)
            engine.port = server.sockets[0].getsockname()[1]
            servers.append(server)
        yield engines
    finally:
        for server in servers:
            server.close()
        for engine in engines.values():
            await engine.leave()
