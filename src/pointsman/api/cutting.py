"""Long strings cut out of a JSON body before it is decoded, and found again where they matter.

A decoder looks at every byte of a string, and a prompt is one long string: 19 us for 32 KB with line breaks
in it. Where it ends can be found by looking for quotes alone, at memory speed. What is inside a long string
is then not checked by us; the engine that reads it will.
"""

from __future__ import annotations

import os

LONG_BYTES = 512
MOST_ESCAPED = 8
"""Quotes inside strings that are put up with: text full of them is read faster by the decoder."""
WORTH_BYTES = 4096
"""Smaller bodies are decoded faster than they are cut."""

MARK = b"@cut-" + os.urandom(8).hex().encode() + b"-"
"""With a number stands for what was cut. Nobody outside knows it, so nobody can write it into a body."""

_QUOTE, _BACKSLASH = b'"', 0x5C


def cut(body: bytes) -> tuple[bytes, list[int]] | None:
    """The body with a mark for the inside of each long string, and by how many bytes what stands before the
    first mark, behind it, behind the second ... has moved.

    None where that is not worth it: few long strings, or so many quotes that looking for them takes longer.
    """
    size = len(body)
    if size < WORTH_BYTES:
        return None
    find = body.find
    escaped = MOST_ESCAPED
    kept: list[bytes] = []
    shifts = [0]
    last = at = 0
    for _ in range(size // LONG_BYTES):
        start = find(_QUOTE, at) + 1
        if not start:
            break
        end = find(_QUOTE, start)
        while body[end - 1] == _BACKSLASH and end > 0 and _is_escaped(body, end):
            end = find(_QUOTE, end + 1)
            escaped -= 1
            if escaped < 0:
                return None
        if end - start > LONG_BYTES:
            mark = b"%b%d@" % (MARK, len(shifts) - 1)
            kept += body[last:start], mark
            shifts.append(shifts[-1] + end - start - len(mark))
            last = end
        elif end < 0:
            return None
        at = end + 1
    else:
        return None
    if not kept:
        return None
    kept.append(body[last:])
    return b"".join(kept), shifts


def _is_escaped(body: bytes, quote: int) -> bool:
    """Whether an odd number of backslashes stands before the quote."""
    before = quote - 1
    while before >= 0 and body[before] == _BACKSLASH:
        before -= 1
    return (quote - before) % 2 == 0


def uncut(part: bytes, skeleton: bytes, shifts: list[int], body: bytes) -> bytes:
    """A part of the cut body as it was; there is a mark in it."""
    at = skeleton.index(part)  # no other part has the same mark
    first = part.index(MARK)
    last = part.rindex(MARK)
    return body[at + shifts[_number(part, first)] : at + len(part) + shifts[_number(part, last) + 1]]


def _number(part: bytes, mark: int) -> int:
    start = mark + len(MARK)
    return int(part[start : part.index(b"@", start)])
