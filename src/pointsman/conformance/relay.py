"""TLS without verification: gRPC's Python client always verifies, pickers sign their certificates themselves.

So the client speaks plaintext to a Unix socket, and what it sends goes through TLS from there.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

READ_BYTES = 64 * 1024


def unverified() -> ssl.SSLContext:
    """A client's, which takes any certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


@asynccontextmanager
async def unverified_tls(address: str, folder: Path) -> AsyncIterator[str]:
    """A gRPC target (``unix:...``) that stands for ``address`` (``host:port``, TLS with ALPN ``h2``)."""
    host, _, port = address.rpartition(":")
    context = unverified()
    tasks: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: asyncio.Task[None] | None = asyncio.current_task()
        assert task is not None
        tasks[writer] = task
        try:
            with suppress(OSError):
                await _relay(
                    reader, writer, *await asyncio.open_connection(host.strip("[]"), port, ssl=context)
                )
        finally:
            del tasks[writer]
            writer.close()

    path = folder / "tls.sock"
    server = await asyncio.start_unix_server(connect, path)
    try:
        yield f"unix:{path}"
    finally:
        server.close()
        left = list(tasks.values())
        for writer in tasks:
            writer.transport.abort()
        await asyncio.gather(*left)
        path.unlink()


async def _relay(
    near_reader: asyncio.StreamReader,
    near_writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
) -> None:
    """Both ways, until either side ends."""
    ways = [
        asyncio.create_task(_copy(near_reader, far_writer)),
        asyncio.create_task(_copy(far_reader, near_writer)),
    ]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        near_writer.close()
        far_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(READ_BYTES):
        writer.write(data)
        await writer.drain()
