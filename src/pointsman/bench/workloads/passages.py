"""Pieces of prompts: text and how many tokens it is."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import NamedTuple

from pointsman.bench.text import text
from pointsman.types import BYTES_PER_TOKEN

KEPT_BYTES = 256 << 20
"""Of shared text, by each workload that runs; what does not fit is made again when it is needed."""


class Passage(NamedTuple):
    """A piece of a prompt."""

    text: str
    tokens: int


def passage(name: str, tokens: int) -> Passage:
    """The piece of that name: equal names make equal text."""
    return Passage(text(random.Random(name), tokens), tokens)


def joined(*passages: Passage) -> Passage:
    """One after the other."""
    return Passage("".join([p.text for p in passages]), sum(p.tokens for p in passages))


class Shared:
    """Pieces that come again, all of one length, by number or name."""

    def __init__(self, name: str, tokens: int) -> None:
        def make(key: int | str) -> Passage:
            return passage(f"{name} {key}", tokens)

        kept = max(1, KEPT_BYTES // max(1, tokens * BYTES_PER_TOKEN))
        self.get = lru_cache(maxsize=kept)(make)
        """The piece with that number."""
