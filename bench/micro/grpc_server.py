"""What our gRPC server costs beside grpc.aio: CPU time of the server process for one stream, and one
message.

``python bench/micro/grpc_server.py`` starts each server on one core, with the same handler (it sends each
message back), sends both the same load from grpcio clients on another core, and divides the server's user
and system time by what was done: median and range of ``--rounds``, the servers taking turns. A stream is
what Envoy's ext_proc makes of a 32 KB request in FULL_DUPLEX mode: headers and two pieces of body, answered
one by one, then response headers and a body, five messages each way. With few streams at a time the cost is
that of waking a process for each message, which is the kernel's and nearly the same for all. Run it on a
machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc

TICKS_S = os.sysconf("SC_CLK_TCK")
PATH = "/bench.Echo/Echo"
REQUEST = (b"h" * 600, b"b" * 16_200, b"b" * 16_200)
RESPONSE = (b"h" * 300, b"b" * 400)
CHUNK = b"c" * 200
SERVER_CORE = 0


# -- servers


async def serve_ours(path: str) -> None:
    from pointsman.extproc.grpc import GrpcServer, Stream

    class Echo:
        def __init__(self, stream: Stream, headers: Mapping[str, str]) -> None:
            self.message = stream.send
            self.half_closed = stream.finish

        def cancelled(self) -> None: ...

        def resumed(self) -> None: ...

    await GrpcServer({PATH: Echo}).start(path=path)
    print("ready", flush=True)
    await asyncio.Event().wait()


async def serve_grpc_aio(path: str) -> None:
    async def echo(messages: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message

    server = grpc.aio.server()
    service, _, method = PATH[1:].partition("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


def serve(kind: str, path: str) -> None:
    os.sched_setaffinity(0, {SERVER_CORE})
    if kind == "ours":
        import uvloop

        uvloop.run(serve_ours(path))
    elif kind == "grpc.aio, uvloop":
        import uvloop

        uvloop.run(serve_grpc_aio(path))
    else:
        asyncio.run(serve_grpc_aio(path))


@asynccontextmanager
async def server(kind: str) -> AsyncIterator[tuple[int, grpc.aio.Channel]]:
    """A server's process id, and a channel to it."""
    with TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--serve", kind, path, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        await process.stdout.readline()
        try:
            async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                yield process.pid, channel
        finally:
            process.terminate()
            await process.communicate()


# -- load


async def stream_of_ten(channel: grpc.aio.Channel) -> None:
    call = channel.stream_stream(PATH)()
    for phase in (REQUEST, RESPONSE):
        for message in phase:
            await call.write(message)
        for message in phase:
            assert len(await call.read()) == len(message)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def streams(channel: grpc.aio.Channel, n: int, clients: int) -> None:
    """``n`` streams, ``clients`` at a time."""

    async def client() -> None:
        for _ in range(n // clients):
            await stream_of_ten(channel)

    await asyncio.gather(*(client() for _ in range(clients)))


async def messages(channel: grpc.aio.Channel, n: int, clients: int) -> None:
    """``n`` small messages, each answered, over ``clients`` long streams."""

    async def client() -> None:
        call = channel.stream_stream(PATH)()
        for _ in range(n // clients):
            await call.write(CHUNK)
            assert await call.read() == CHUNK
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF

    await asyncio.gather(*(client() for _ in range(clients)))


LOADS: Mapping[str, tuple[Callable[[grpc.aio.Channel, int, int], Awaitable[None]], int]] = {
    "stream of 10 messages, 32 KB each way": (streams, 3200),
    "message of 200 bytes and its answer": (messages, 16_000),
}
KINDS = ("ours", "grpc.aio", "grpc.aio, uvloop")


def cpu_s(pid: int) -> float:
    """User and system seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


async def cost_us(kind: str, load: str, clients: int) -> float:
    run, n = LOADS[load]
    async with server(kind) as (pid, channel):
        await run(channel, n // 10, clients)
        before_s = cpu_s(pid)
        await run(channel, n, clients)
        return (cpu_s(pid) - before_s) / n * 1e6


async def measure(rounds: int, clients: int) -> None:
    for load in LOADS:
        costs: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind in KINDS:
                costs[kind].append(await cost_us(kind, load, clients))
        print(f"  {load}")
        ours = statistics.median(costs["ours"])
        for kind in KINDS:
            median = statistics.median(costs[kind])
            spread = f"[{min(costs[kind]):.0f} .. {max(costs[kind]):.0f}]"
            print(f"    {kind:<18} {median:7.1f} us  {spread:<16} {median / ours:5.1f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64, 200], help="streams at a time")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return
    os.sched_setaffinity(0, os.sched_getaffinity(0) - {SERVER_CORE} or {SERVER_CORE})
    print(f"{platform.machine()}, Python {platform.python_version()}, grpcio {grpc.__version__}")
    for clients in args.clients:
        print(f"{clients} at a time")
        asyncio.run(measure(args.rounds, clients))


if __name__ == "__main__":
    main()
