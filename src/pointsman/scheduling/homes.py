"""Where several routers that do not talk to each other send a prompt so that they mostly agree."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from xxhash import xxh3_64_intdigest

from pointsman.prefix.hashing import Chain
from pointsman.types import Endpoint

SHARE = 0.6
"""Of a prompt, the part that others are taken to have in common with it; to the power of two below."""


def key_of(chain: Chain) -> int:
    """The same for prompts that begin alike, for every router; a chat that grows keeps it for long."""
    blocks = max(1, int(SHARE * chain.length))
    return chain.hash((1 << (blocks.bit_length() - 1)) - 1)


def homes(key: int, endpoints: Sequence[Endpoint], capacities: Sequence[float], n: int) -> list[int]:
    """The ``n`` endpoints, the first one first, that the prompt belongs to (indices).

    Weighted rendezvous hashing: an endpoint is first as often as its share of the capacity says, and when a
    capacity changes a little, few prompts move.
    """
    order = [
        -log((xxh3_64_intdigest(endpoint.name.encode(), key) + 1) / 2**64) / capacity
        for endpoint, capacity in zip(endpoints, capacities, strict=True)
    ]
    return sorted(range(len(order)), key=order.__getitem__)[:n]
