"""The same services on grpc.aio: a server that is not ours, to compare with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc

from pointsman.extproc.grpc import Service

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class AioStream:
    """One RPC of grpc.aio as a handler of ours sees it (``grpc.Stream``)."""

    paused = False

    def __init__(self) -> None:
        self.out: asyncio.Queue[bytes | tuple[int, str]] = asyncio.Queue()
        self.over = False

    def send(self, message: bytes) -> None:
        if not self.over:
            self.out.put_nowait(message)

    def finish(self, status: int = 0, message: str = "") -> None:
        if not self.over:
            self.over = True
            self.out.put_nowait((status, message))


def handler(service: Service) -> Any:
    """A stream-stream method that serves ``service``."""

    async def serve(messages: AsyncIterator[bytes], context: Any) -> None:
        stream = AioStream()
        metadata = {k.lower(): v for k, v in context.invocation_metadata() if isinstance(v, str)}
        call = service(stream, metadata)

        async def listen() -> None:
            async for message in messages:
                if stream.over:
                    return
                call.message(message)
            if not stream.over:
                call.half_closed()

        listening = asyncio.create_task(listen())
        ended = False
        try:
            while True:
                said = await stream.out.get()
                if isinstance(said, bytes):
                    await context.write(said)
                    continue
                ended = True
                status, message = said
                if status:
                    context.set_code(next(c for c in grpc.StatusCode if c.value[0] == status))
                    context.set_details(message)
                return
        finally:
            listening.cancel()
            if not ended and not stream.over:
                stream.over = True
                call.cancelled()

    return grpc.stream_stream_rpc_method_handler(serve)


@asynccontextmanager
async def serving(services: Mapping[str, Service], address: str = "127.0.0.1:0") -> AsyncIterator[int]:
    """Serve by full path until the block ends; gives the port."""
    server = grpc.aio.server(options=OPTIONS)
    by_service: dict[str, dict[str, Any]] = {}
    for path, service in services.items():
        _, name, method = path.split("/")
        by_service.setdefault(name, {})[method] = handler(service)
    for name, methods in by_service.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0.1)
