"""The relay to TLS ends when it is told to, whatever the other side does."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pointsman.conformance.relay import unverified_tls


async def test_a_peer_that_says_nothing_does_not_hold_it_up(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read(1)  # the handshake begins
        asked.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with asyncio.timeout(5), server:
        async with unverified_tls(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", tmp_path) as target:
            _, writer = await asyncio.open_unix_connection(target.removeprefix("unix:"))
            await asked.wait()
        writer.close()


async def test_where_nobody_listens_the_connection_is_closed(tmp_path: Path) -> None:
    async with unverified_tls("127.0.0.1:1", tmp_path) as target:
        reader, writer = await asyncio.open_unix_connection(target.removeprefix("unix:"))
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
