"""Pieces of text that were tokenised lately, and their ids."""

from __future__ import annotations

from collections import OrderedDict
from sys import getsizeof
from threading import Lock

ENTRY_BYTES = 260
"""Of the table for each piece, its key and the order they were used in; tests/tokens measures it."""


class Memory:
    """At most ``max_bytes``; the least recently used goes first. May be used by several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._ids: OrderedDict[tuple[int, str], bytes] = OrderedDict()
        self._lock = Lock()
        self.used_bytes = 0

    def get(self, tokenizer: int, pieces: list[str]) -> list[bytes | None]:
        """The ids of each piece, None where they are not known."""
        found: list[bytes | None] = []
        with self._lock:
            get, use = self._ids.get, self._ids.move_to_end
            for piece in pieces:
                key = tokenizer, piece
                ids = get(key)
                if ids is not None:
                    use(key)
                found.append(ids)
        return found

    def put(self, tokenizer: int, piece: str, ids: bytes) -> None:
        with self._lock:
            key = tokenizer, piece
            if key in self._ids:
                return
            self._ids[key] = ids
            self.used_bytes += _size(piece, ids)
            while self.used_bytes > self._max_bytes:
                (_, old), old_ids = self._ids.popitem(last=False)
                self.used_bytes -= _size(old, old_ids)


def _size(piece: str, ids: bytes) -> int:
    return getsizeof(piece) + getsizeof(ids) + ENTRY_BYTES
