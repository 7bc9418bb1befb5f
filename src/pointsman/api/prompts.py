"""Prompts as bytes whose prefix decides cache hits, taken from the body as they lie there.

One law holds for all of them: when a client extends a prompt (more text, another message, more token ids)
and writes the rest as before, the shorter prompt's bytes are a prefix of the longer one's. So quotes and
closing brackets go.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Raw

from pointsman.types import BYTES_PER_TOKEN, Prompt

ABSENT = Raw(b"")
"""A ``Raw`` field that was not given."""

_string = msgspec.json.Decoder(str).decode
_elements = msgspec.json.Decoder(list[Raw]).decode

_QUOTE, _OPEN, _CLOSE = b'"[]'
_SPACE = b" \t\r\n"
_NUMBER = b"-0123456789"


def prompt(data: bytes | memoryview) -> Prompt:
    """A prompt of text, its tokens estimated."""
    return Prompt(data, (len(data) + BYTES_PER_TOKEN - 1) // BYTES_PER_TOKEN)


_MOST = 2048
"""Prompts of a batch that are looked at: OpenAI takes no more inputs for embeddings in a call."""


def prompts(raw: Raw) -> tuple[Prompt, ...]:
    """One prompt (string, list of token ids) or a batch of them (list of strings, list of lists of ids)."""
    one = _one(raw)
    if one is not None:
        return (one,)
    if raw is ABSENT or memoryview(raw)[0] != _OPEN:
        return ()
    return tuple(one for element in _elements(raw)[:_MOST] if (one := _one(element)) is not None)


def _one(raw: Raw) -> Prompt | None:
    """A string or a list of token ids; None for anything else."""
    text = memoryview(raw)
    if not text or text[0] not in b'"[':
        return None
    if text[0] == _QUOTE:
        return prompt(text[1:-1])
    at = 1
    while text[at] in _SPACE:
        at += 1
    return Prompt(opened(text), bytes(raw).count(b",") + 1) if text[at] in _NUMBER else None


def opened(text: bytes | memoryview) -> memoryview:
    """A JSON array without what closes it: the array that has more elements goes on from here."""
    assert text[-1] == _CLOSE, "an array ends with a bracket"
    end = len(text) - 1
    while text[end - 1] in _SPACE:
        end -= 1
    return memoryview(text)[:end]


def tokens(batch: Sequence[Prompt]) -> int:
    """Prompt tokens of a batch in all."""
    return batch[0].tokens if len(batch) == 1 else sum(one.tokens for one in batch)


def text(raw: Raw) -> str:
    """What a string says; empty for anything else."""
    try:
        return _string(raw) if raw is not ABSENT else ""
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


def root(*parts: Raw) -> bytes:
    """What must be equal before any block can be; empty when none of it was given."""
    return b"" if parts.count(ABSENT) == len(parts) else b"\0".join(parts)
