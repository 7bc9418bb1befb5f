"""Keys: what stands for a KV block and everything before it, computed from tokens.

Engines have hashes of their own, which we cannot compute in general. So both sides, the blocks that an engine
tells of with their tokens and the prompts that come in, are given keys of ours; equal keys mean equal
tokens, adapter, salt and images from the beginning to the end of the block. Only whole blocks have one.

A key depends on the block size: the 32 tokens of one block and of two make different keys, so that
engines with different block sizes share one table and never mistake each other's blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Protocol, TypeAlias

from xxhash import xxh3_64_intdigest

from pointsman.prefix.kv_wire import ExtraKey, Stored
from pointsman.types import Tokenized

TOKEN_BYTES = 4
MASK = (1 << 60) - 1
"""Of a hash we keep 60 bits: Python's int takes 32 bytes for it, with four bits more it takes 48."""

Extras: TypeAlias = Mapping[int, tuple[str, ...]]
"""Number of a block to what its key depends on besides tokens; blocks without any are not in it."""

NO_EXTRAS: Extras = {}


class Scheme(Protocol):
    """A way to make keys."""

    chained: bool
    """Keys of an event's blocks can only be had when the key of the block before them is known."""

    def of_event(self, event: Stored, parent: int | None, model: str) -> Sequence[int]:
        """Keys of the event's blocks; ``parent`` is the key of the block before, None at the beginning."""
        ...

    def of_prompt(self, prompt: Tokenized, model: str, salt: str, block_tokens: int) -> Sequence[int]:
        """Keys of the prompt's whole blocks, or of as many leading ones as can be told."""
        ...


class Xxh3:
    """Our own: xxh3-64 of the block's tokens, seeded with the key of the block before it. ``model`` is the
    name of the adapter, empty for the base model.
    """

    chained = True

    def of_event(self, event: Stored, parent: int | None, model: str) -> list[int]:
        key = root(model) if parent is None else parent
        return _chain(event.token_ids, event.block_size, key, extras_in(event))

    def of_prompt(self, prompt: Tokenized, model: str, salt: str, block_tokens: int) -> list[int]:
        return _chain(prompt.ids, block_tokens, root(model), extras_of(prompt, salt, block_tokens))


@lru_cache(maxsize=1024)
def root(model: str) -> int:
    """What the first block's key is seeded with."""
    return xxh3_64_intdigest(model.encode()) & MASK


def _chain(ids: bytes, block_tokens: int, key: int, extras: Extras) -> list[int]:
    size = block_tokens * TOKEN_BYTES
    keys = []
    for at in range(0, len(ids) - size + 1, size):
        block = ids[at : at + size]
        if extras and (extra := extras.get(at // size)):
            block += b"".join(_sized(e.encode(errors="surrogatepass")) for e in extra)
        key = xxh3_64_intdigest(block, key) & MASK
        keys.append(key)
    return keys


def _sized(data: bytes) -> bytes:
    """So that "ab", "c" is not "a", "bc"."""
    return len(data).to_bytes(4, "little") + data


def extras_of(prompt: Tokenized, salt: str, block_tokens: int) -> Extras:
    """For each block that a placeholder of media overlaps its hashes, in their order in the prompt; the salt
    in the first block (llm-d facts 5.2, and what vLLM does).
    """
    if not salt and not prompt.media:
        return NO_EXTRAS
    extras: dict[int, tuple[str, ...]] = {}
    whole = len(prompt.ids) // (block_tokens * TOKEN_BYTES)
    for name, first, tokens in sorted(prompt.media, key=_first):
        for block in range(first // block_tokens, min(whole, -(-(first + tokens) // block_tokens))):
            extras[block] = (*extras.get(block, ()), name)
    if salt:
        extras[0] = (*extras.get(0, ()), salt)
    return extras


def _first(media: tuple[str, int, int]) -> int:
    return media[1]


def extras_in(event: Stored) -> Extras:
    """The same as an engine tells it. vLLM names the adapter first in each block; ours is in the root."""
    if not event.extra_keys:
        return NO_EXTRAS
    extras = {}
    for block, keys in enumerate(event.extra_keys):
        if keys:
            own = islice(keys, 1, None) if event.lora and keys[0] == event.lora else iter(keys)
            if names := tuple(_names(own)):
                extras[block] = names
    return extras


def _names(keys: Iterator[ExtraKey]) -> Iterator[str]:
    """Of media older engines tell hash and offset; the offset is told by the tokens already."""
    for key in keys:
        key = key[0] if isinstance(key, tuple) and key else key
        yield key if isinstance(key, str) else repr(key)
