"""How a block index lies in Redis or Valkey, so that llm-d's routers and ours can share one.

As llm-d's redis.go has it at llm-d-router 36da54d (facts 5.2): the request key, in decimal, is a hash whose
fields are the holders, each a JSON object; ``engine:<hash>`` is a sorted set of the request keys that an
engine's block stands for, in their order. Of ours there is one key more for each endpoint: the set of
request keys we wrote for it, so that it can be cleared without going through everything. Its name begins
with ``engine:`` because llm-d passes over such keys when it goes through everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import msgspec


class Holder(msgspec.Struct, frozen=True, rename="pascal", kw_only=True):
    """A field: an endpoint that has the block in a tier."""

    pod_identifier: str
    """Its address, ``host:port``."""
    device_tier: str = "gpu"
    speculative: bool = False
    has_group: bool = False
    group_idx: int = 0


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Holder).decode


@lru_cache(maxsize=4096)
def field(address: str, tier: str, group: int) -> bytes:
    """Of ``address``, as llm-d writes it for an engine that tells its KV cache group."""
    return _encode(Holder(pod_identifier=address, device_tier=tier, has_group=True, group_idx=group))


@lru_cache(maxsize=4096)
def holder(field: bytes) -> Holder | None:
    """Who a field speaks of; None where it is none of llm-d's or ours."""
    try:
        return _decode(field)
    except msgspec.DecodeError:
        return None


def engine_key(engine_hash: int) -> str:
    return f"engine:{engine_hash}"


def written_key(address: str) -> str:
    """The set of what we wrote for an endpoint."""
    return f"engine:pointsman:{address}"


def written_suffix(tier: str, group: int) -> str:
    """What comes after a key in a member of that set."""
    return f" {group} {tier}"


def pairs(hashes: Sequence[int], keys: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Each engine hash with each key it stands for and that key's place among those: one to one, many to one
    or one to many, in proportion.
    """
    count, place, last = max(len(hashes), len(keys)), 0, -1
    for i in range(count if hashes and keys else 0):
        at = i * len(hashes) // count
        place = place + 1 if at == last else 0
        last = at
        yield hashes[at], keys[i * len(keys) // count], place
