"""Long strings cut out of a JSON body before it is decoded, and put back where they matter.

A decoder looks at every byte of a string, and a prompt is one long string: 19 us for 32 KB with line breaks
in it. Where it ends can be found by looking for quotes alone, at memory speed. What is inside a long string
is then not checked by us; the engine that reads it will.
"""

from __future__ import annotations

import os
import re

LONG_BYTES = 512
MOST_ESCAPED = 8
"""Quotes inside strings that are put up with: text full of them is read faster by the decoder."""
WORTH_BYTES = 4096
"""Smaller bodies are decoded faster than they are cut."""

MARK = b"@cut-" + os.urandom(8).hex().encode() + b"-"
"""With a number stands for what was cut. Nobody outside knows it, so nobody can write it into a body."""

_MARKED = re.compile(MARK + rb"(\d+)@")
_QUOTE, _BACKSLASH = b'"', 0x5C


def cut(body: bytes) -> tuple[bytes, list[bytes]] | None:
    """The body with a mark for the inside of each long string, and the insides in order.

    None where that is not worth it: few long strings, or so many quotes that looking for them takes longer.
    """
    if len(body) < WORTH_BYTES:
        return None
    find = body.find
    left, escaped = len(body) // LONG_BYTES, MOST_ESCAPED
    kept: list[bytes] = []
    insides: list[bytes] = []
    last = at = 0
    while (start := find(_QUOTE, at)) >= 0:
        end = find(_QUOTE, start + 1)
        while end > 0 and body[end - 1] == _BACKSLASH and _is_escaped(body, end):
            end = find(_QUOTE, end + 1)
            escaped -= 1
            if escaped < 0:
                return None
        left -= 1
        if end < 0 or left < 0:
            return None
        if end - start > LONG_BYTES:
            kept.append(body[last : start + 1])
            kept.append(b"%b%d@" % (MARK, len(insides)))
            insides.append(body[start + 1 : end])
            last = end
        at = end + 1
    if not insides:
        return None
    kept.append(body[last:])
    return b"".join(kept), insides


def _is_escaped(body: bytes, quote: int) -> bool:
    """Whether an odd number of backslashes stands before the quote."""
    before = quote - 1
    while before >= 0 and body[before] == _BACKSLASH:
        before -= 1
    return (quote - before) % 2 == 0


def restored(part: bytes, insides: list[bytes]) -> bytes:
    """A part of the cut body as it was."""
    return _MARKED.sub(lambda mark: insides[int(mark[1])], part)
