"""Keeps the prefix index in step with the pool: slots, KV sizes, block size, restarts."""

from __future__ import annotations

from math import lcm

from pointsman.endpoints.pool import Pool
from pointsman.prefix.approximate import DEFAULT_BLOCK_TOKENS, PrefixIndex
from pointsman.prefix.precise import PreciseIndex
from pointsman.types import Endpoint

MAX_BLOCK_TOKENS = 1024


def follow(
    index: PrefixIndex, pool: Pool, *, fixed_block_tokens: int = 0, precise: PreciseIndex | None = None
) -> None:
    """From now on ``index`` hears of everything in ``pool``, and ``precise`` of how much each endpoint can
    hold and of its adapters. ``fixed_block_tokens`` overrides the engines' sizes.
    """

    def on_pool(event: str, endpoint: Endpoint) -> None:
        if precise is not None:
            precise.set_capacity(endpoint.slot, 0 if event == "left" else endpoint.metrics.kv_blocks)
            if event == "models":
                cards = pool.members[endpoint.name].models_detail
                precise.name_adapters(
                    str(card["id"]) for card in cards if card.get("parent") and "id" in card
                )
        if event == "left":
            index.remove(endpoint.slot)
        elif event == "restarted":
            index.clear(endpoint.slot)
        else:
            metrics = endpoint.metrics
            index.add(endpoint.slot, metrics.block_tokens * metrics.kv_blocks or None)
            if event == "cache" and not fixed_block_tokens:
                sizes = {m.endpoint.metrics.block_tokens for m in pool.members.values()} - {0}
                index.learn_block_tokens(block_tokens_for(sizes))

    if fixed_block_tokens:
        index.set_block_tokens(fixed_block_tokens)
    pool.listen(on_pool)


def block_tokens_for(engine_block_tokens: set[int]) -> int:
    """One block size for the pool: the least multiple of every engine's that is not below the default."""
    common = lcm(*engine_block_tokens)
    if common > MAX_BLOCK_TOKENS:
        common = max(engine_block_tokens)
    return -(-DEFAULT_BLOCK_TOKENS // common) * common
