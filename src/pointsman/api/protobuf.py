"""Protobuf messages as they lie: fields by number, everything else stepped over.

Formats that read a few fields of large messages need no message classes, and a prompt is not copied.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import Final

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES: Final = {_FIXED64: 8, _FIXED32: 4}
_LAST: Final = bytes(range(0x80, 0x100))
"""Bytes that do not end a number."""
_MAX_BITS: Final = 64


class Malformed(ValueError):
    """Not a protobuf message."""


def fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Of each field its number, its value if it is an integer (else 0), and its bytes (of an integer, as
    they are written). ``Malformed`` where that breaks off.
    """
    at, end = 0, len(data)
    while at < end:
        tag, at = _number(data, at)
        kind, value, start = tag & 7, 0, at
        if kind == _VARINT:
            value, at = _number(data, at)
        elif kind == _BYTES:
            length, start = _number(data, at)
            at = start + length
        elif kind in _SIZES:
            at += _SIZES[kind]
        else:
            raise Malformed(f"a field of kind {kind} at byte {start}")
        if at > end:
            raise Malformed(f"a field ends {at - end} bytes behind its message")
        yield tag >> 3, value, data[start:at]


def _number(data: memoryview, at: int) -> tuple[int, int]:
    """The number at ``at``, and where it ends."""
    if at < len(data) and data[at] < 0x80:
        return data[at], at + 1
    value = shift = 0
    for byte in data[at : at + _MAX_BITS // 7 + 1]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise Malformed(f"a number without end at byte {at}")


def count(packed: bytes) -> int:
    """How many numbers these are, one after the other."""
    return len(packed.translate(None, _LAST))


def unpacked(packed: bytes) -> bytes:
    """The same numbers, four bytes each, little-endian; what does not fit in four is cut."""
    numbers, value, shift = array("I"), 0, 0
    for byte in packed:
        if byte < 0x80:
            numbers.append((value | byte << shift) & 0xFFFFFFFF)
            value = shift = 0
        elif shift < _MAX_BITS:
            value |= (byte & 0x7F) << shift
            shift += 7
        else:
            raise Malformed("a number without end in a list")
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
