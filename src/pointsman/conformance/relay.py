"""TLS without verification: gRPC's Python client always verifies, pickers sign their certificates themselves.

So the client speaks plaintext to a Unix socket, and what it sends goes through TLS from there.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
    relays: set[asyncio.Task[None]] = set()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relay = asyncio.create_task(_relay(reader, writer, host.strip("[]"), port))
        relays.add(relay)
        await asyncio.wait([relay])
        relays.discard(relay)
        writer.close()

    path = folder / "tls.sock"
    server = await asyncio.start_unix_server(connect, path)
    try:
        yield f"unix:{path}"
    finally:
        server.close()
        for relay in relays:
            relay.cancel()
        if relays:
            await asyncio.wait(list(relays))
        path.unlink()


async def _relay(
    near_reader: asyncio.StreamReader, near_writer: asyncio.StreamWriter, host: str, port: str
) -> None:
    """Both ways, until either side ends."""
    try:
        far_reader, far_writer = await asyncio.open_connection(host, port, ssl=unverified())
    except OSError:
        return  # who is on the near side meets a closed connection
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
        far_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(READ_BYTES):
        writer.write(data)
        await writer.drain()
