"""What the shared index costs a router: events written, and a request's blocks read; against a real server on
a unix socket, which is started for it.

``python bench/micro/shared_index.py [--hash cbor-fnv]``; needs redis-server or valkey-server on the path.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import tempfile
import time
from array import array
from pathlib import Path
from statistics import median

from pointsman.prefix.blocks_schemes import LlmD
from pointsman.prefix.kv_wire import Stored
from pointsman.prefix.shared import FRESH_S, SharedIndex, connect
from pointsman.types import InferenceRequest, Tokenized

BLOCK = 16
ENDPOINTS = 20
PROMPT = 7200
TIMES = 30
HOLDERS = 4
"""Endpoints that hold the prompt that is asked for."""


def asked(ids: bytes) -> InferenceRequest:
    return InferenceRequest(
        id="r", format="openai", path="/v1/completions", body=b"", model="m", tokenized=(Tokenized(ids),)
    )


def chain(rng: random.Random, blocks: int, per_event: int) -> list[Stored]:
    """A prompt that nobody else has, as an engine tells of it."""
    events, parent = [], None
    for _ in range(0, blocks, per_event):
        ids = array("I", [rng.randrange(100_000) for _ in range(per_event * BLOCK)]).tobytes()
        hashes = [rng.getrandbits(63) for _ in range(per_event)]
        events.append(Stored(hashes, parent, ids, BLOCK))
        parent = hashes[-1]
    return events


async def write(index: SharedIndex, events: list[Stored], slots: list[int]) -> tuple[float, float]:
    """Seconds, and those of our own CPU."""
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    for slot in slots:
        index.apply(slot, events, 0.0)
    await index.drain()
    return time.perf_counter() - began_s, time.process_time() - began_cpu_s


async def read(index: SharedIndex, request: InferenceRequest, now_s: float) -> dict[str, float]:
    """Medians in milliseconds."""
    rows = []
    for _ in range(TIMES):
        now_s += FRESH_S
        began_s, cpu_s = time.perf_counter(), time.process_time()
        keys = index.keys(request)
        keyed_s = time.perf_counter()
        assert await index.fetch(keys, now_s)
        fetched_s, fetched_cpu_s = time.perf_counter(), time.process_time()
        found = index.match(request, now_s, keys)
        rows.append(
            (keyed_s - began_s, fetched_s - keyed_s, time.perf_counter() - fetched_s, fetched_cpu_s - cpu_s)
        )
    most = max(found.tokens_by_slot.values(), default=0)
    print(f"  found at {len(found.tokens_by_slot)} endpoints: {most:,} tokens")
    names = "keys", "fetch", "match", "CPU of keys and fetch"
    return {name: 1000 * median(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


async def measure(socket: Path, algorithm: str) -> None:
    rng = random.Random(1)
    client = connect(f"unix://{socket}")
    index = SharedIndex(client, LlmD(algorithm))
    for slot in range(ENDPOINTS):
        index.add(slot, f"10.0.0.{slot}:8000", "m")
    running = asyncio.create_task(index.run())
    for per_event in (1, 8, 128):
        blocks = 20_000 if per_event > 1 else 5_000
        chains = [chain(rng, 1024, per_event) for _ in range(blocks // 1024)]
        events = [event for each in chains for event in each]
        wall_s, cpu_s = await write(index, events, [0])
        count = sum(len(event.hashes) for event in events)
        each_us = 1e6 * cpu_s / count
        print(f"written, {per_event} in an event: {count / wall_s:,.0f} blocks/s, {each_us:.1f} us CPU each")
    prompt = chain(rng, PROMPT // BLOCK, 50)
    await write(index, prompt, list(range(HOLDERS)))
    request = asked(b"".join(event.token_ids for event in prompt))
    others = asked(b"".join(event.token_ids for event in chain(rng, PROMPT // BLOCK, 50)))
    for now_s, (name, each) in enumerate((("held", request), ("not held", others))):
        print(f"read, {PROMPT:,} tokens, {name}:")
        print(
            "  "
            + ", ".join(
                f"{what} {ms:.3f} ms" for what, ms in (await read(index, each, 1000.0 * now_s)).items()
            )
        )
    assert not index.lost
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hash", choices=("xxh64", "cbor-fnv"), default="xxh64")
    arguments = parser.parse_args()
    server = shutil.which("redis-server") or shutil.which("valkey-server")
    if not server:
        parser.error("needs redis-server or valkey-server on the path")
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "s"
        process = await asyncio.create_subprocess_exec(
            *(server, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", folder),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout
        while b"accept connections" not in await process.stdout.readline():
            pass
        try:
            await measure(socket, arguments.hash)
        finally:
            process.terminate()
            await process.communicate()


if __name__ == "__main__":
    asyncio.run(main())
