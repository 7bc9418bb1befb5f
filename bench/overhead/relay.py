"""Moving bytes and nothing else: a TCP relay on uvloop that never looks at them.

``python relay.py PORT ENDPOINT_PORT...`` is the floor for a Python router: what one costs above this is
everything but moving bytes. It is no router itself: a client's connection stays with one endpoint.
"""

import asyncio
import itertools
import sys
from collections.abc import Iterator

import uvloop


class Upstream(asyncio.Protocol):
    """The connection to an endpoint; its bytes go to the client's transport."""

    def __init__(self, client: asyncio.Transport) -> None:
        self.client = client

    def data_received(self, data: bytes) -> None:
        self.client.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.client.close()


class Client(asyncio.Protocol):
    """A client's connection; what it sends before the endpoint is connected waits."""

    def __init__(self, ports: Iterator[int]) -> None:
        self.ports = ports
        self.early: list[bytes] = []

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.upstream: asyncio.Transport | None = None
        self.connecting = asyncio.ensure_future(self.connect())

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        upstream, _ = await loop.create_connection(
            lambda: Upstream(self.transport), "127.0.0.1", next(self.ports)
        )
        self.upstream = upstream
        upstream.writelines(self.early)

    def data_received(self, data: bytes) -> None:
        if self.upstream:
            self.upstream.write(data)
        else:
            self.early.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.upstream:
            self.upstream.close()


async def main() -> None:
    port, *endpoint_ports = map(int, sys.argv[1:])
    ports = itertools.cycle(endpoint_ports)
    server = await asyncio.get_running_loop().create_server(
        lambda: Client(ports), "127.0.0.1", port, backlog=1024
    )
    await server.serve_forever()


uvloop.run(main())
