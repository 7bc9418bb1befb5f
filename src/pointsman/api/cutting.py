"""Long strings cut out of a JSON body before it is decoded, and found again where they matter.

A decoder looks at every byte of a string, and a prompt is one long string: 19 us for 32 KB with line breaks
in it. Where it ends can be found by looking for quotes alone, at memory speed. What is inside a long string
is then not checked by us; the engine that reads it will.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence

LONG_BYTES = 512
MOST_ESCAPED = 8
"""Quotes inside strings that are put up with: text full of them is read faster by the decoder."""
WORTH_BYTES = 4096
"""Smaller bodies are decoded faster than they are cut."""
MISS_BYTES = 2048
"""A look that finds no long string is put up with for so many bytes of the body."""

MARK = b"@cut-" + os.urandom(8).hex().encode() + b"-"
"""With a number stands for what was cut. Nobody outside knows it, so nobody can write it into a body."""
_MARKS = tuple(MARK + b"%d@" % i for i in range(256))

_QUOTE, _BACKSLASH = b'"\\'

Cut = tuple[bytes, Sequence[int], Sequence[int]]
"""The body with a mark for the inside of each long string; where in it the marks are; and by how many bytes
what stands before the first mark, behind it, behind the second ... has moved.
"""


def cut(body: bytes) -> Cut | None:
    """The body without its long strings; None where that is not worth it: few of them, or too many quotes.

    We look at every 512th byte only, and take what is between the quotes around it for a string. It may be
    what is between two strings; then what is left is no JSON.
    """
    size = len(body)
    if size < WORTH_BYTES:
        return None
    find, rfind = body.find, body.rfind
    escaped, misses = MOST_ESCAPED, size // MISS_BYTES
    kept: list[bytes] = []
    offsets: list[int] = []
    shifts = [0]
    done = behind = 0
    at = LONG_BYTES
    while at < size and misses:
        end = find(_QUOTE, at)
        start = rfind(_QUOTE, behind, at)
        while body[end - 1] == _BACKSLASH and escaped and end > 0 and _is_escaped(body, end):
            end = find(_QUOTE, end + 1)
            escaped -= 1
        while body[start - 1] == _BACKSLASH and escaped and start > 0 and _is_escaped(body, start):
            start = rfind(_QUOTE, behind, start)
            escaped -= 1
        if not escaped:
            return None
        if end < 0:
            break
        start += 1
        if start and end - start > LONG_BYTES:
            number = len(offsets)
            if number == len(_MARKS):
                break
            mark = _MARKS[number]
            kept += body[done:start], mark
            shift = shifts[-1]
            offsets.append(start - shift)
            shifts.append(shift + end - start - len(mark))
            done, behind = end, end + 1
            at = behind + LONG_BYTES
        else:
            misses -= 1
            at += LONG_BYTES
    if not kept:
        return None
    kept.append(body[done:])
    return b"".join(kept), offsets, shifts


def _is_escaped(body: bytes, quote: int) -> bool:
    """Whether an odd number of backslashes stands before the quote."""
    before = quote - 1
    while before >= 0 and body[before] == _BACKSLASH:
        before -= 1
    return (quote - before) % 2 == 0


def uncut(part: bytes, found: Cut, body: bytes) -> bytes:
    """A part of the cut body as it was; there is a mark in it."""
    skeleton, offsets, shifts = found
    at = skeleton.index(part)  # no other part has the same mark
    end = at + len(part)
    return body[at + shifts[bisect_left(offsets, at)] : end + shifts[bisect_left(offsets, end)]]
