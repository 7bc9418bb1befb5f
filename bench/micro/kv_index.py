"""The precise block index on one core: taking in events, finding prompts, and the memory of a large fleet.

``python bench/micro/kv_index.py`` prints a table; ``--pairs 10000000`` adds the fleet (a minute, 2 GB).
Medians and 99th percentiles. Blocks have 16 tokens, as in vLLM on GPUs, and engine hashes are random:
nothing is shared but what is said to be.
"""

from __future__ import annotations

import argparse
import random
import time
from array import array
from collections.abc import Callable, Iterator

import msgspec
from decision import machine

from pointsman.prefix.kv_wire import Stored, decode
from pointsman.prefix.precise import PreciseIndex
from pointsman.testing import request
from pointsman.types import InferenceRequest, Tokenized

BLOCK = 16
VOCABULARY = 128_000


def ids(rng: random.Random, tokens: int) -> list[int]:
    return rng.choices(range(VOCABULARY), k=tokens)


def message(rng: random.Random, blocks: int, parent: int | None = None) -> bytes:
    """As vLLM 0.32 sends it: blocks of one prompt that were stored in one step."""
    stored = {
        "type": "BlockStored",
        "block_hashes": [rng.getrandbits(64) for _ in range(blocks)],
        "parent_block_hash": parent,
        "token_ids": ids(rng, blocks * BLOCK),
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * blocks,
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    return msgspec.msgpack.encode([time.time(), [stored], 0])


def timed(run: Callable[[], object]) -> float:
    """Seconds of CPU."""
    began_s = time.process_time()
    run()
    return time.process_time() - began_s


def rate(name: str, blocks: int, took_s: float) -> None:
    print(f"{name:58} {blocks / took_s:11,.0f} blocks/s  {took_s / blocks * 1e6:5.2f} us")


def intake(blocks_a_message: int) -> None:
    """Decode, hash, map and store; then the engine takes the same blocks out again, one an event."""
    rng = random.Random(1)
    count = 200_000 // blocks_a_message
    payloads = [message(rng, blocks_a_message) for _ in range(count)]
    index = PreciseIndex()
    for slot in range(20):
        index.add(slot)
    names = [decode(payload).events[0].hashes for payload in payloads]  # type: ignore[union-attr]
    blocks = count * blocks_a_message
    decoding_s = timed(lambda: [decode(payload) for payload in payloads])

    def take_in() -> None:
        for number, payload in enumerate(payloads):
            index.apply(number % 20, decode(payload).events, 0.0)

    took_s = timed(take_in)
    rate(f"stored, {blocks_a_message} in a message", blocks, took_s)
    rate("  of which decoding", blocks, decoding_s)
    removals = [
        msgspec.msgpack.encode(
            [
                0.0,
                [{"type": "BlockRemoved", "block_hashes": [h], "medium": "GPU", "group_idx": 0} for h in run],
                0,
            ]
        )
        for run in names
    ]

    def take_out() -> None:
        for number, payload in enumerate(removals):
            index.apply(number % 20, decode(payload).events, 0.0)

    rate(f"removed, {blocks_a_message} in a message", blocks, timed(take_out))
    assert not sum(map(index.blocks, range(20))), "everything that was stored has been removed"


def spread(us: list[float]) -> str:
    us.sort()
    return f"median {us[len(us) // 2]:7.1f} us  p99 {us[len(us) * 99 // 100]:7.1f} us"


def conversations(
    index: PreciseIndex, rng: random.Random, endpoints: int, tokens: int, count: int
) -> Iterator[InferenceRequest]:
    """Prompts that some endpoints hold to some depth: all of them the first tenth, one all of it."""
    system = ids(rng, tokens // 10 // BLOCK * BLOCK)
    for number in range(count):
        prompt = system + ids(rng, tokens - len(system))
        data = array("I", prompt).tobytes()
        names = [rng.getrandbits(64) for _ in range(tokens // BLOCK)]
        for slot in range(endpoints):
            whole = slot == number % endpoints
            depth = (
                len(names)
                if whole
                else rng.randrange(len(system) // BLOCK, len(names))
                if slot % 4 == 0
                else len(system) // BLOCK
            )
            index.apply(slot, [Stored(names[:depth], None, data[: depth * BLOCK * 4], BLOCK)], 0.0)
        yield request(tokenized=(Tokenized(data),))


def lookup(index: PreciseIndex, tokens: int, endpoints: int, count: int) -> None:
    rng = random.Random(2)
    for slot in range(endpoints):
        index.add(slot)
    asked = list(conversations(index, rng, endpoints, tokens, count))
    hashing, matching, after = [], [], []
    for turn in range(max(1, 300 // count)):
        for one in asked:
            began = time.perf_counter()
            keys = index.keys(one)
            hashed = time.perf_counter()
            match = index.match(one, 0.0, keys)
            found = time.perf_counter()
            hashing.append((hashed - began) * 1e6)
            matching.append((found - hashed) * 1e6)
            if not turn:
                assert max(match.tokens_by_slot.values()) == (tokens - 1) // BLOCK * BLOCK
                assert len(match.tokens_by_slot) >= endpoints
    for one in asked[:50]:
        index.sent(0, one, 0.0)
    for one in asked:
        keys = index.keys(one)
        began = time.perf_counter()
        index.match(one, 0.0, keys)
        after.append((time.perf_counter() - began) * 1e6)
    name = f"{tokens:,} tokens over {endpoints} endpoints"
    print(f"match, {name:51} {spread(matching)}")
    print(f"  after 50 of them were sent to one endpoint {'':13} {spread(after)}")
    print(f"  its keys {'':47} {spread(hashing)}")


def rss_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def fleet(pairs: int, endpoints: int) -> PreciseIndex:
    """Every block at one endpoint only: what takes most."""
    rng = random.Random(3)
    index = PreciseIndex(max_bytes=1 << 40)
    for slot in range(endpoints):
        index.add(slot)
    before, longest_s, began_s = rss_bytes(), 0.0, time.process_time()
    run = 128
    for number in range(pairs // run):
        data = rng.randbytes(run * BLOCK * 4)
        names = [rng.getrandbits(64) for _ in range(run)]
        at_s = time.perf_counter()
        index.apply(number % endpoints, [Stored(names, None, data, BLOCK)], 0.0)
        longest_s = max(longest_s, time.perf_counter() - at_s)
    took_s = time.process_time() - began_s
    held = sum(map(index.blocks, range(endpoints)))
    grown = rss_bytes() - before
    print(
        f"{held:,} pairs at {endpoints} endpoints: RSS {grown / 1e9:.2f} GB, {grown / held:.0f} bytes each, "
        f"{index.used_bytes / held:.0f} charged; {took_s:.0f} s, the longest event {longest_s * 1e3:.0f} ms"
    )
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=0, help="(block, endpoint) pairs of the fleet")
    parser.add_argument("--endpoints", type=int, default=100)
    args = parser.parse_args()
    print(machine())
    for blocks in (1, 8, 128):
        intake(blocks)
    if args.pairs:
        index = fleet(args.pairs, args.endpoints)
        lookup(index, 7_200, 20, 100)
        lookup(index, 100_000, 100, 20)
        began_s = time.perf_counter()
        blocks = index.blocks(50)
        index.clear(50)
        print(f"{blocks:,} blocks cleared in {(time.perf_counter() - began_s) * 1e3:.0f} ms")
    else:
        lookup(PreciseIndex(max_bytes=1 << 40), 7_200, 20, 100)
        lookup(PreciseIndex(max_bytes=1 << 40), 100_000, 100, 20)


if __name__ == "__main__":
    main()
