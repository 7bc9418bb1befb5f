"""What has happened to an engine's KV blocks since somebody asked: the content of vLLM's KV events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from pointsman.sim.kv_names import Namer
from pointsman.sim.sequence import Content

GPU, CPU = "GPU", "CPU"
"""Media as vLLM spells them."""
ExtraKeys: TypeAlias = tuple[str, ...] | None


class Stored(msgspec.Struct, frozen=True, gc=False):
    """Blocks that can be found from now on, each behind the one before it."""

    names: Sequence[bytes]
    parent: bytes | None
    """The block before the first; None where a prompt begins."""
    token_ids: bytes
    """Of all of them, four bytes each, little-endian. Empty: known blocks are now in this medium, too."""
    lora: str = ""
    extra_keys: Sequence[ExtraKeys] = ()
    """By block; what their hashes depend on besides tokens."""
    medium: str = GPU


class Removed(msgspec.Struct, frozen=True, gc=False):
    """Blocks that are not in this medium any more."""

    names: Sequence[bytes]
    medium: str = GPU


class Cleared(msgspec.Struct, frozen=True, gc=False):
    """Nothing is cached any more."""


Event: TypeAlias = Stored | Removed | Cleared


class Journal:
    """Knows the name of every cached block, and keeps what happened until it is taken."""

    def __init__(self, namer: Namer) -> None:
        self._namer = namer
        self._gpu: dict[int, bytes] = {}
        self._cpu: dict[int, bytes] = {}
        self._events: list[Event] = []

    def take(self) -> list[Event]:
        """All since the last call, in order."""
        events, self._events = self._events, []
        return events

    def stored(self, content: Content, first: int, hashes: Sequence[int], parent: int | None) -> None:
        """Blocks of ``content``, from block ``first`` on, can be found; ``parent`` is the one before them."""
        before = None if parent is None else self._gpu[parent]
        ids = content.token_ids(first, len(hashes))
        names = self._namer(content, first, before, ids, hashes)
        self._gpu.update(zip(hashes, names, strict=True))
        self._events.append(Stored(names, before, ids, content.lora, _extra_keys(content, first, len(names))))

    def evicted(self, hashes: Sequence[int]) -> None:
        """The GPU's memory has been given to others: the end of a chain first."""
        self._events += [Removed((self._gpu.pop(h),)) for h in hashes]

    def offloaded(self, hash: int) -> None:
        """A block of the GPU's is in the CPU's memory, too."""
        name = self._cpu[hash] = self._gpu[hash]
        self._events.append(Stored((name,), None, b"", medium=CPU))

    def dropped(self, hash: int) -> None:
        """A block has left the CPU's memory."""
        self._events.append(Removed((self._cpu.pop(hash),), CPU))

    def cleared(self) -> None:
        """Nothing is left."""
        self._gpu.clear()
        self._cpu.clear()
        self._events.append(Cleared())


def _extra_keys(content: Content, first: int, blocks: int) -> Sequence[ExtraKeys]:
    every = (content.lora,) if content.lora else None
    if first or not content.salt:
        return (every,) * blocks
    return ((*(every or ()), content.salt), *(every,) * (blocks - 1))
