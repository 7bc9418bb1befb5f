"""What a simulated engine costs: CPU time of its process for each request, chunk and metrics page.

``python bench/micro/engine_server.py`` starts ``pointsman engine``, sends each workload over keep-alive
connections, and divides the process' user and system time by what was done: median and range of
``--rounds``. Run it on a machine with nothing else to do. Steps take no time but for the paced stream, whose
64 streams are written to some 130 times a second each, every chunk a system call of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count, islice, repeat
from pathlib import Path
from typing import NamedTuple

TICKS_S = os.sysconf("SC_CLK_TCK")
COMPLETIONS = "/v1/completions"


def post(body: object) -> bytes:
    data = json.dumps(body).encode()
    return b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (
        COMPLETIONS.encode(),
        len(data),
        data,
    )


def prompts(size: int, *, groups: int = 8, **more: object) -> Iterator[bytes]:
    """Requests whose prompts share seven eighths with their group's."""
    shared = size * 7 // 8
    for i in count():
        text = f"group {i % groups:4} ".ljust(shared, "x") + f"{i:8}".ljust(size - shared, "y")
        yield post({"prompt": text, "max_tokens": 1} | more)


class Workload(NamedTuple):
    """``n`` requests from ``clients`` connections, each worth ``parts`` of what is counted."""

    requests: Iterator[bytes]
    n: int
    parts: int = 1
    clients: int = 16
    speed: int = 10_000


WORKLOADS = {
    "0.5 KB prompt": Workload(prompts(512), 4000),
    "32 KB prompt": Workload(prompts(32 << 10), 1000),
    "400 KB prompt": Workload(prompts(400 << 10), 100),
    "chunk, flat out": Workload(prompts(512, stream=True, max_tokens=200), 200, 200),
    "chunk, paced": Workload(prompts(512, stream=True, max_tokens=200), 128, 200, clients=64, speed=1),
    "metrics page": Workload(repeat(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"), 1000),
}


def cpu_s(pid: int) -> float:
    """User and system seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


@asynccontextmanager
async def engine(speed: int) -> AsyncIterator[tuple[int, int]]:
    """A simulated engine: its process and its port."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pointsman", "engine", "--port", "0", "--accelerator", "mi325x"),
        *("--speed", str(speed)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.readline()
    address = (await process.stdout.readline()).split()[1]
    try:
        yield process.pid, int(address.rpartition(b":")[2])
    finally:
        process.terminate()
        await process.communicate()


async def client(port: int, requests: Iterator[bytes]) -> None:
    """Send requests one after the other over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    for request in requests:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head:
            await reader.readuntil(b"\r\n0\r\n\r\n")
        else:
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            assert head.startswith(b"HTTP/1.1 200"), head
            await reader.readexactly(length)
    writer.close()


async def cost_us(pid: int, port: int, load: Workload) -> float:
    """Microseconds of CPU for one of what the workload counts."""
    work = islice(load.requests, load.n)
    before_s = cpu_s(pid)
    await asyncio.gather(*(client(port, work) for _ in range(load.clients)))
    return (cpu_s(pid) - before_s) / load.n / load.parts * 1e6


async def measure(rounds: int) -> None:
    for name, load in WORKLOADS.items():
        async with engine(load.speed) as (pid, port):
            await cost_us(pid, port, load)  # warm
            costs = [await cost_us(pid, port, load) for _ in range(rounds)]
        spread = f"[{min(costs):.1f} .. {max(costs):.1f}]"
        print(f"{name:<16} {statistics.median(costs):8.1f} us  {spread}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}")
    asyncio.run(measure(args.rounds))


if __name__ == "__main__":
    main()
