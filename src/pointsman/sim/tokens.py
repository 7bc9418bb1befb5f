"""The simulator's tokenizer: four bytes of UTF-8 are one token, and its id is those bytes as a little-endian
number.

So a text, the ids that ``/tokenize`` gives for it and a chat that renders to it are the same tokens and find
the same KV blocks, and a prompt is hashed a block at a time, never a token at a time. Ids go up to 2**32 - 1;
the last token of a text is filled up with zero bytes.
"""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Iterable, Sequence

from xxhash import xxh64_intdigest

TOKEN_BYTES = 4
SPAN_BLOCKS = 64
SPANS = 8192
_CORPUS_TOKENS = 4096
_WORDS = (
    b"the and for not you but all can her was one our out day get has him his how man new now old see two "
    b"way who boy did its let put say she too use red sun sea sky air ice oak elm fox owl bee ant hen cow "
)


def _corpus() -> bytes:
    rng = random.Random(4)
    places = rng.choices(range(0, len(_WORDS), TOKEN_BYTES), k=_CORPUS_TOKENS)
    return b"".join(_WORDS[at : at + TOKEN_BYTES] for at in places)


_CORPUS = _corpus()
_CORPUS_TWICE = _CORPUS * 2


def count(text: bytes) -> int:
    """Tokens in ``text``."""
    return -(-len(text) // TOKEN_BYTES)


def filled(text: bytes, filler: bytes = b"\0") -> bytes:
    """``text`` made a whole number of tokens."""
    return text + filler * (-len(text) % TOKEN_BYTES)


def to_ids(text: bytes) -> list[int]:
    """The token ids of ``text``."""
    ids = array("I", filled(text))
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


def from_ids(ids: Iterable[int]) -> bytes:
    """The bytes these tokens stand for. ``OverflowError`` when one is not a number of 32 bits."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def text_of(data: bytes) -> str:
    """What ``/detokenize`` says: the filler goes, and bytes that are no UTF-8 become U+FFFD."""
    return data.rstrip(b"\0").decode(errors="replace")


def block_hashes(data: bytes, block_tokens: int, seed: int) -> list[int]:
    """Chained hashes of the full blocks of ``data``; ``seed`` is what must be equal before it."""
    size = block_tokens * TOKEN_BYTES
    previous = seed
    chain: list[int] = []
    add = chain.append
    for end in range(size, len(data) + 1, size):
        previous = xxh64_intdigest(data[end - size : end], previous)
        add(previous)
    return chain


class BlockHasher:
    """``block_hashes``, remembering what it hashed: of a long prompt seen before only every ``SPAN_BLOCKS``
    blocks are hashed as one. Holds at most ``SPANS`` spans, some 20 MB; the oldest go.
    """

    def __init__(self) -> None:
        self._known: dict[int, list[int]] = {}

    def hash(self, data: bytes, block_tokens: int, seed: int) -> list[int]:
        size = SPAN_BLOCKS * block_tokens * TOKEN_BYTES
        span = seed ^ block_tokens
        chain: list[int] = []
        last = seed
        for end in range(size, len(data) + 1, size):
            text = data[end - size : end]
            span = xxh64_intdigest(text, span)
            hashes = self._known.get(span)
            if hashes is None:
                hashes = self._known[span] = block_hashes(text, block_tokens, last)
                if len(self._known) > SPANS:
                    del self._known[next(iter(self._known))]
            chain += hashes
            last = hashes[-1]
        return chain + block_hashes(data[len(data) // size * size :], block_tokens, last)


def continued_hashes(
    prompt: bytes, chain: Sequence[int], output: bytes, block_tokens: int, seed: int
) -> list[int]:
    """Hashes of the full blocks behind ``chain``, the prompt's, once ``output`` follows the prompt."""
    rest = filled(prompt)[len(chain) * block_tokens * TOKEN_BYTES :]
    return block_hashes(rest + output, block_tokens, chain[-1] if chain else seed)


def output(place: int, first: int, last: int) -> bytes:
    """Tokens ``first`` to ``last`` (exclusive) of the answer that starts at ``place`` in the corpus: plain
    ASCII that needs no escaping in JSON.
    """
    at = (place + first) % _CORPUS_TOKENS
    tokens = last - first
    if tokens <= _CORPUS_TOKENS:
        return _CORPUS_TWICE[at * TOKEN_BYTES : (at + tokens) * TOKEN_BYTES]
    return (_CORPUS * (tokens // _CORPUS_TOKENS + 2))[at * TOKEN_BYTES : (at + tokens) * TOKEN_BYTES]
