"""Header blocks of HTTP/2 (RFC 7541): a decoder for untrusted input, and literals for what we send.

The tables and the Huffman code are those of the ``hpack`` library. Its own decoder copies the rest of a block
for every field and ends the connection on a long list; ours takes time in proportion to the block's bytes and
keeps its state, so that a list that is too long costs only its own stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from hpack.huffman_table import HUFFMAN_COMPLETE, HUFFMAN_EMIT_SYMBOL, HUFFMAN_FAIL, HUFFMAN_TABLE
from hpack.table import HeaderTable

Field = tuple[bytes, bytes]

_STATIC: tuple[Field, ...] = tuple(HeaderTable.STATIC_TABLE)
_OVERHEAD_BYTES = 32
"""What a field counts in a table or list besides its name and value (RFC 7541, 4.1)."""
_MAX_INTEGER_BYTES = 5
DEFAULT_TABLE_BYTES = 4096


class BadBlock(Exception):
    """The block cannot be decoded: the connection's header state is lost."""


class ListTooLong(Exception):
    """The fields are more than allowed; the decoder's state is good."""


class Decoder:
    """One connection's decoder. Once ``stateless``, equal blocks mean equal fields."""

    __slots__ = ("_limit", "_table", "_table_bytes", "_table_limit", "allowed_table_bytes")

    def __init__(self, max_list_bytes: int) -> None:
        self._limit = max_list_bytes
        self._table: deque[Field] = deque()
        self._table_bytes = 0
        self._table_limit = DEFAULT_TABLE_BYTES
        self.allowed_table_bytes = DEFAULT_TABLE_BYTES
        """What our settings allow, as soon as the peer has acknowledged them."""

    @property
    def stateless(self) -> bool:
        """The dynamic table is empty and stays so."""
        return not self._table_limit and not self.allowed_table_bytes

    def decode(self, block: bytes) -> list[Field]:
        """The fields of a whole block."""
        try:
            return self._decode(block)
        except IndexError as exc:
            raise BadBlock("ends within a field") from exc

    def _decode(self, block: bytes) -> list[Field]:
        fields: list[Field] = []
        list_bytes = at = 0
        end = len(block)
        while at < end and block[at] & 0xE0 == 0x20:  # table sizes stand before the first field
            size, at = _integer(block, at, 0x1F)
            if size > self.allowed_table_bytes:
                raise BadBlock("the table is larger than allowed")
            self._table_limit = size
            self._evict()
        if self._table_limit > self.allowed_table_bytes:
            raise BadBlock("the table has not shrunk to what is allowed")
        while at < end:
            first = block[at]
            if first & 0x80:
                index, at = _integer(block, at, 0x7F)
                field = self._entry(index)
            elif first & 0xE0 == 0x20:
                raise BadBlock("a table size stands after a field")
            else:
                index, at = _integer(block, at, 0x3F if first & 0x40 else 0x0F)
                if index:
                    name = self._entry(index)[0]
                else:
                    name, at = _string(block, at)
                value, at = _string(block, at)
                field = (name, value)
                if first & 0x40:
                    self._add(field)
            list_bytes += len(field[0]) + len(field[1]) + _OVERHEAD_BYTES
            if list_bytes <= self._limit:
                fields.append(field)
        if list_bytes > self._limit:
            raise ListTooLong(f"{list_bytes} bytes of headers; {self._limit} are allowed")
        return fields

    def _entry(self, index: int) -> Field:
        if not index:
            raise BadBlock("there is no field 0")
        if index <= len(_STATIC):
            return _STATIC[index - 1]
        if index - len(_STATIC) > len(self._table):
            raise BadBlock("there is no such field")
        return self._table[index - len(_STATIC) - 1]

    def _add(self, field: Field) -> None:
        self._table.appendleft(field)
        self._table_bytes += len(field[0]) + len(field[1]) + _OVERHEAD_BYTES
        self._evict()

    def _evict(self) -> None:
        while self._table_bytes > self._table_limit:
            name, value = self._table.pop()
            self._table_bytes -= len(name) + len(value) + _OVERHEAD_BYTES


def _integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """The integer whose prefix is the ``mask`` bits at ``at``, and where it ends."""
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    for shift in range(0, 7 * _MAX_INTEGER_BYTES, 7):
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise BadBlock("an integer is too long")


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    huffman = block[at] & 0x80
    length, at = _integer(block, at, 0x7F)
    end = at + length
    if end > len(block):
        raise BadBlock("ends within a string")
    text = block[at:end]
    return (_unpacked(text) if huffman else text), end


class _Steps(dict[int, tuple[int, bytes, bool]]):
    """What a byte does to the decoder of the Huffman code, by state (in bits 8 and up) and byte: the next
    state, the symbols that end, and whether a string may end there. Filled as needed from the library's
    table, which steps by four bits; 65,536 entries at most.
    """

    def __missing__(self, key: int) -> tuple[int, bytes, bool]:
        state, symbols, flags = key >> 8, b"", 0
        for nibble in (key >> 4 & 0xF, key & 0xF):
            state, flags, symbol = HUFFMAN_TABLE[state << 4 | nibble]
            if flags & HUFFMAN_FAIL:
                raise BadBlock("a string is not of the Huffman code")
            if flags & HUFFMAN_EMIT_SYMBOL:
                symbols += bytes((symbol,))
        step = self[key] = (state << 8, symbols, bool(flags & HUFFMAN_COMPLETE))
        return step


_STEPS = _Steps()
_SHORT_BYTES = 64
_unpacked_before: dict[bytes, bytes] = {}
"""Short strings, of which most come again and again."""


def _unpacked(text: bytes) -> bytes:
    """A string that is in the Huffman code."""
    known = _unpacked_before.get(text)
    if known is not None:
        return known
    state, complete, out = 0, True, []
    for byte in text:
        state, symbols, complete = _STEPS[state | byte]
        out.append(symbols)
    if not complete:
        raise BadBlock("a string is not of the Huffman code")
    plain = b"".join(out)
    if len(text) <= _SHORT_BYTES:
        if len(_unpacked_before) >= 1024:
            _unpacked_before.clear()
        _unpacked_before[text] = plain
    return plain


def encode(fields: Iterable[Field]) -> bytes:
    """A block of literals that no table remembers."""
    out = bytearray()
    for name, value in fields:
        out += b"\0"
        for text in (name, value):
            out += _length(len(text))
            out += text
    return bytes(out)


def _length(size: int) -> bytes:
    if size < 0x7F:
        return bytes((size,))
    out = bytearray((0x7F,))
    size -= 0x7F
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out)
