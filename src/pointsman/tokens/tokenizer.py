"""A model's own tokenizer, from its tokenizer.json: texts to ids, of which pieces seen before are
remembered.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from pointsman.tokens.cuts import Cuts
from pointsman.tokens.memory import Memory

Encode = Callable[[Sequence[str], bool], list[bytes]]
"""Texts, and whether special tokens are put around each, to ids as ``types.Tokenized`` has them."""

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
    """Gives what ``whole`` gives for a whole text, which takes longer."""

    def __init__(
        self,
        whole: Encode,
        cuts: Cuts,
        memory: Memory,
        piece_chars: int = PIECE_CHARS,
        words_chars: int = WORDS_CHARS,
    ) -> None:
        self._whole = whole
        self._cuts = cuts
        self._memory = memory
        self._least = piece_chars, words_chars
        self._number = next(_numbers)
        self._around = self._learn_around()

    def plan(self, text: str) -> Plan:
        """What has to be done for ``finish``; takes microseconds."""
        pieces = self._cuts.pieces(text, *self._least)
        return Plan(pieces, self._memory.get(self._number, pieces))

    def finish(self, plan: Plan, *, add_special: bool) -> bytes:
        """The ids. Other threads go on meanwhile; in one call, since whoever takes the interpreter back
        from a busy thread waits for it up to 5 ms each time.
        """
        unknown = [piece for piece, known in zip(plan.pieces, plan.ids, strict=True) if known is None]
        computed = self._whole(unknown, False) if unknown else []
        for piece, ids in zip(unknown, computed, strict=True):
            self._memory.put(self._number, piece, ids)
        found = iter(computed)
        parts = [next(found) if known is None else known for known in plan.ids]
        if not add_special:
            return b"".join(parts)
        if self._around is None:
            return self._whole(["".join(plan.pieces)], True)[0]
        return b"".join((self._around[0], *parts, self._around[1]))

    def encode(self, text: str, *, add_special: bool) -> bytes:
        return self.finish(self.plan(text), add_special=add_special)

    def _learn_around(self) -> tuple[bytes, bytes] | None:
        """The special tokens before and after any text; None where they depend on it."""
        ways = set()
        for bare, full in zip(self._whole(_PROBES, False), self._whole(_PROBES, True), strict=True):
            at = next((i for i in range(0, len(full), 4) if bare and full.startswith(bare, i)), None)
            if at is None:
                return None
            ways.add((full[:at], full[at + len(bare) :]))
        return ways.pop() if len(ways) == 1 else None
