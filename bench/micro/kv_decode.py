"""How fast messages of KV events are read, on one core: blocks a second, and the CPU time one message takes.

python bench/micro/kv_decode.py

The messages are vLLM's: blocks stored, and for each one evicted. "arrays" is how older vLLM and SGLang write
them, "event by event" the tolerant way, taken when a message has something in it that is not known.
"""

from __future__ import annotations

import random
import statistics
import time

import msgspec

from pointsman.prefix.kv_wire import decode

MESSAGES = 50
ROUNDS = 40


def message(rng: random.Random, blocks: int, size: int, layout: str) -> bytes:
    hashes = [rng.getrandbits(64) for _ in range(blocks)]
    tokens = [rng.randrange(128_000) for _ in range(blocks * size)]
    stored = {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": rng.getrandbits(64),
        "token_ids": tokens,
        "block_size": size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * blocks,
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    removed = [
        {"type": "BlockRemoved", "block_hashes": [rng.getrandbits(64)], "medium": "GPU", "group_idx": 0}
        for _ in range(blocks)
    ]
    events: list[object] = [*removed, stored]
    if layout == "arrays":
        events = [list(event.values()) for event in (*removed, stored)]
    if layout == "event by event":
        events.append({"type": "Unheard"})
    return msgspec.msgpack.encode([time.time(), events, 0])


def measure(payloads: list[bytes]) -> list[float]:
    """CPU seconds for one message, each round's mean: what else the machine does does not count."""
    found = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for payload in payloads:
            decode(payload)
        found.append((time.process_time() - began) / len(payloads))
    return sorted(found)


def main() -> None:
    rng = random.Random(1)
    print("| layout | block | stored + removed | message | median | p99 | block events/s |")
    print("|---|---|---|---|---|---|---|")
    for layout in ("maps", "arrays", "event by event"):
        for size, blocks in ((16, 1), (16, 8), (16, 64), (32, 8), (128, 8)):
            payloads = [message(rng, blocks, size, layout) for _ in range(MESSAGES)]
            times = measure(payloads)
            median, p99 = statistics.median(times), times[int(len(times) * 0.99)]
            print(
                f"| {layout} | {size} | {blocks} + {blocks} | {len(payloads[0]):,} B | {median * 1e6:.1f} us "
                f"| {p99 * 1e6:.1f} us | {2 * blocks / median:,.0f} |"
            )


if __name__ == "__main__":
    main()
