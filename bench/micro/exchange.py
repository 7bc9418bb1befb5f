"""What the gateway's own code costs for one request, without the kernel: both sockets are objects that take
bytes.

    python bench/micro/exchange.py            microseconds, median and p99, per request
    python bench/micro/exchange.py --profile  where they go
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import io
import json
import platform
import pstats
import random
import time
from typing import Any, cast

from pointsman.config import load
from pointsman.endpoints.target import targets_of
from pointsman.proxy.application import Application
from pointsman.proxy.server import ClientConnection
from pointsman.proxy.upstream import UpstreamConnection

RESPONSE = (
    b"HTTP/1.1 200 OK\r\ndate: Tue, 24 Nov 2026 06:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: %d\r\n"
    b"content-type: application/json\r\n\r\n%b"
)
ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Hello there, a short answer."}}
        ],
        "usage": {"prompt_tokens": 7, "total_tokens": 23, "completion_tokens": 16},
    },
    separators=(",", ":"),  # as vLLM's server writes it
).encode()


class FakeTransport:
    """Takes what is written."""

    def __init__(self) -> None:
        self.written = 0

    def write(self, data: bytes) -> None:
        self.written += len(data)

    def writelines(self, pieces: list[bytes]) -> None:
        self.written += sum(map(len, pieces))

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else None

    def is_closing(self) -> bool:
        return False

    def is_reading(self) -> bool:
        return True

    def abort(self) -> None: ...


def words(rng: random.Random, size: int) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=size))


def requests(rng: random.Random, shared: int, own: int, count: int) -> list[bytes]:
    groups = [words(rng, shared) for _ in range(8)]
    out = []
    for _ in range(count):
        messages = [
            {"role": "system", "content": rng.choice(groups)},
            {"role": "user", "content": words(rng, own)},
        ]
        body = json.dumps({"model": "m", "messages": messages, "max_tokens": 16, "stream": False}).encode()
        out.append(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer sk-0123456789abcdef\r\nUser-Agent: bench\r\nAccept: */*\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
    return out


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--endpoints", type=int, default=8)
    args = parser.parse_args()
    settings = load(
        overrides=["log.requests=true"],
        endpoints=[f"http://127.0.0.1:{9000 + i}" for i in range(args.endpoints)],
    )
    application = Application(settings, out=io.StringIO())
    application.pool.apply("bench", [t for e in settings.endpoints for t in targets_of(e)])
    for name in application.pool.members:
        application.pool.learn_models(name, [{"id": "m"}])
        connections = application.front.plane.connections(name)
        assert connections
        upstream = UpstreamConnection(connections)
        upstream.connection_made(cast(Any, FakeTransport()))
        connections.keep(upstream)
    client = ClientConnection(application.front)
    client.connection_made(cast(Any, FakeTransport()))
    response = RESPONSE % (len(ANSWER), ANSWER)
    rng = random.Random(1)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    print(f"{platform.machine()} python {platform.python_version()}, {args.endpoints} endpoints")
    for name, shared, own in (("0.5 KB", 100, 200), ("32 KB", 26 * 1024, 6100)):
        batch = requests(rng, shared, own, 400)
        times = []

        def one(data: bytes, client: ClientConnection = client) -> None:
            client.data_received(data)
            application.front.answer_arrived()
            cast(Any, client.exchange)._upstream.data_received(response)

        for _ in range(3):
            for data in batch:
                one(data)
        if args.profile:
            profile = cProfile.Profile()
            profile.enable()
            for data in batch:
                one(data)
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(45)
        for _ in range(10):
            for data in batch:
                start = time.perf_counter()
                one(data)
                times.append((time.perf_counter() - start) * 1e6)
        times.sort()
        mean, middle, late = sum(times) / len(times), times[len(times) // 2], times[-len(times) // 100]
        print(f"{name}: mean {mean:.1f} us, median {middle:.1f} us, p99 {late:.1f} us")


asyncio.run(main())
