"""KV events as engines write them: the msgpack payload of one message.

vLLM 0.32.0 writes a batch as an array and its events as maps (``map``). Older ones write events as arrays
(``array``); before adapters had names, and in SGLang, arrays end after the medium (``short-array``). A
newer vLLM (vllm-project/vllm@0181ea31) writes the batch as a map, too (``batch-map``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import msgspec

from pointsman.sim.kv_journal import Event, Removed, Stored
from pointsman.sim.kv_names import wire
from pointsman.sim.tokens import to_ids

Layout = Literal["map", "array", "short-array", "batch-map"]
Fields: TypeAlias = dict[str, object]
GROUP = 0
KIND = "full_attention"
_SHORT_FIELDS = 7

_encode = msgspec.msgpack.Encoder().encode


class Writer:
    """Writes the batches of one engine. ``adapters`` are names in the order of their ids, from 1 on."""

    def __init__(
        self, layout: Layout, block_tokens: int, adapters: Mapping[str, object], rank: int, int_hashes: bool
    ) -> None:
        """``int_hashes``: hashes are integers, not bytes."""
        self.rank = rank
        self.replays_topic = layout != "batch-map"
        """Whether messages that are had again have their topic."""
        self._layout = layout
        self._block_tokens = block_tokens
        self._adapters = adapters
        self._name: Callable[[bytes], bytes | int] = wire if int_hashes else bytes

    def payload(self, unix_s: float, events: Sequence[Event]) -> bytes:
        """The message of ``events``."""
        written = [self._written(event) for event in events]
        if self._layout == "batch-map":
            return _encode({"ts": unix_s, "events": written, "data_parallel_rank": self.rank})
        return _encode((unix_s, written, self.rank))

    def _written(self, event: Event) -> object:
        if isinstance(event, Stored):
            fields = self._stored(event)
        elif isinstance(event, Removed):
            fields = self._removed(event)
        else:
            fields = {"type": "AllBlocksCleared"}
        if self._layout in ("map", "batch-map"):
            return fields
        values = tuple(fields.values())
        return values[:_SHORT_FIELDS] if self._layout == "short-array" else values

    def _stored(self, event: Stored) -> Fields:
        """Blocks that came to another medium have no tokens, and little else: their hash says which they
        are.
        """
        told = bool(event.token_ids)
        fields: Fields = {
            "type": "BlockStored",
            "block_hashes": [self._name(name) for name in event.names],
            "parent_block_hash": None if event.parent is None else self._name(event.parent),
            "token_ids": to_ids(event.token_ids),
            "block_size": self._block_tokens if told else 0,
            "lora_id": list(self._adapters).index(event.lora) + 1 if event.lora in self._adapters else None,
            "medium": event.medium,
            "lora_name": event.lora or None,
        }
        if told:
            fields |= {"extra_keys": event.extra_keys, "group_idx": GROUP, "kv_cache_spec_kind": KIND}
        return fields

    def _removed(self, event: Removed) -> Fields:
        names = [self._name(name) for name in event.names]
        fields: Fields = {"type": "BlockRemoved", "block_hashes": names, "medium": event.medium}
        return fields if self._layout == "short-array" else fields | {"group_idx": GROUP}
