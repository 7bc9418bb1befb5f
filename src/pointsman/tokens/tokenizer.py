"""A model's own tokenizer, from its tokenizer.json: texts to ids, of which pieces seen before are
remembered.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from pointsman.api.token_ids import pack
from pointsman.tokens.cuts import Cuts
from pointsman.tokens.memory import Memory

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

PIECE_CHARS = 64
"""Of pieces that end before a special token, at least."""
WORDS_CHARS = 512
"""Of those that end between words. Smaller ones leave less to tokenise again when a text goes on, and cost
more to find."""
_numbers = itertools.count()
_PROBES = ("a", "Two words", "\n.")


class Plan:
    """A text taken apart, and what is known of it."""

    __slots__ = ("ids", "missing_chars", "pieces")

    def __init__(self, pieces: list[str], ids: list[bytes | None]) -> None:
        self.pieces = pieces
        self.ids = ids
        self.missing_chars = sum(
            len(piece) for piece, known in zip(pieces, ids, strict=True) if known is None
        )


class Tokenizer:
    """Gives what the library gives for the whole text, without padding or truncation."""

    def __init__(
        self,
        library: Library,
        memory: Memory,
        piece_chars: int = PIECE_CHARS,
        words_chars: int = WORDS_CHARS,
    ) -> None:
        library.no_padding()
        library.no_truncation()
        self._library = library
        self._memory = memory
        self._least = piece_chars, words_chars
        self._number = next(_numbers)
        self._cuts = Cuts(library.to_str())
        self._around = self._learn_around()

    def plan(self, text: str) -> Plan:
        """What has to be done for ``finish``; takes microseconds."""
        pieces = self._cuts.pieces(text, *self._least)
        return Plan(pieces, self._memory.get(self._number, pieces))

    def finish(self, plan: Plan, *, add_special: bool) -> bytes:
        """The ids. Other threads go on meanwhile."""
        parts: list[bytes] = []
        for piece, known in zip(plan.pieces, plan.ids, strict=True):
            if known is None:
                known = self.whole(piece, add_special=False)
                self._memory.put(self._number, piece, known)
            parts.append(known)
        if not add_special:
            return b"".join(parts)
        if self._around is None:
            return self.whole("".join(plan.pieces), add_special=True)
        return b"".join((self._around[0], *parts, self._around[1]))

    def encode(self, text: str, *, add_special: bool) -> bytes:
        return self.finish(self.plan(text), add_special=add_special)

    def whole(self, text: str, *, add_special: bool) -> bytes:
        """The same without cutting or remembering.

        A batch of one: of the library's calls only those for batches let other threads go on, and with more
        than one they wait for threads of the library's own, now and then for milliseconds.
        """
        (found,) = self._library.encode_batch_fast([text], add_special_tokens=add_special)
        return pack(found.ids)

    def _learn_around(self) -> tuple[bytes, bytes] | None:
        """The special tokens before and after any text; None where they depend on it."""
        ways = set()
        for probe in _PROBES:
            bare, full = self.whole(probe, add_special=False), self.whole(probe, add_special=True)
            at = next((i for i in range(0, len(full), 4) if bare and full.startswith(bare, i)), None)
            if at is None:
                return None
            ways.add((full[:at], full[at + len(bare) :]))
        return ways.pop() if len(ways) == 1 else None
