"""What an engine calls a KV block in its events: a digest of its tokens and of all before them.

``sha256_cbor`` is vLLM's hash of that name (0.32.0): SHA-256 of the canonical CBOR of (the digest before,
the token ids, extra keys), the first one after the digest of a constant. In a message it is an integer, its
last 64 bits.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from pointsman.sim.sequence import Content
from pointsman.sim.tokens import TOKEN_BYTES, to_ids

SEED = "vllm-none-hash"
"""What the chain begins with where PYTHONHASHSEED is not set."""
_TEXT, _ARRAY, _BYTES_32, _NULL = 0x60, 0x80, b"\x58\x20", b"\xf6"
_SHORT, _ONE_BYTE, _TWO_BYTES = 24, 1 << 8, 1 << 16

Namer: TypeAlias = Callable[[Content, int, bytes | None, bytes, Sequence[int]], list[bytes]]
"""Names for blocks in a row: whose they are, which block is the first, the name of the one before it, their
token ids (four bytes each, little-endian), and the simulator's own hashes of them.
"""


def opaque(
    content: Content, first: int, parent: bytes | None, ids: bytes, hashes: Sequence[int]
) -> list[bytes]:
    """The simulator's own hashes: as quick as nothing, and nobody can compute them."""
    return [h.to_bytes(8, "big") for h in hashes]


def sha256_cbor(
    content: Content, first: int, parent: bytes | None, ids: bytes, hashes: Sequence[int]
) -> list[bytes]:
    """As vLLM makes them, of 32 bytes."""
    digest = _ROOT if parent is None else parent
    common = [("lora", content.lora, lora_path(content.lora))] if content.lora else []
    own = [*common, ("cache_salt", content.salt)] if content.salt and not first else common
    extras, rest = _extras(own), _extras(common)
    names = []
    for block in _cbor_blocks(ids, len(ids) // len(hashes)):
        digest = hashlib.sha256(b"\x83" + _BYTES_32 + digest + block + extras).digest()
        names.append(digest)
        extras = rest
    return names


def lora_path(name: str) -> str:
    """Where an adapter was loaded from, as ``/v1/models`` says; vLLM hashes it."""
    return f"/loras/{name}"


def wire(name: bytes) -> int:
    """A name as the integer that messages have."""
    return int.from_bytes(name[-8:], "big")


def _cbor_blocks(ids: bytes, block_bytes: int) -> list[bytes]:
    """Each block's token ids as a canonical CBOR array."""
    head = _head(_ARRAY, block_bytes // TOKEN_BYTES)
    if min(array("I", to_ids(ids))) < _TWO_BYTES:
        numbers = to_ids(ids)
        size = block_bytes // TOKEN_BYTES
        return [
            head + b"".join(_head(0, i) for i in numbers[at : at + size])
            for at in range(0, len(numbers), size)
        ]
    wide = bytearray(len(ids) // TOKEN_BYTES * 5)
    wide[0::5] = b"\x1a" * (len(ids) // TOKEN_BYTES)
    for i in range(TOKEN_BYTES):
        wide[1 + i :: 5] = ids[TOKEN_BYTES - 1 - i :: TOKEN_BYTES]
    size = block_bytes // TOKEN_BYTES * 5
    return [head + wide[at : at + size] for at in range(0, len(wide), size)]


def _head(major: int, number: int) -> bytes:
    """The shortest head of an item: of a number, itself."""
    if number < _SHORT:
        return bytes((major | number,))
    if number < _ONE_BYTE:
        return bytes((major | 24, number))
    if number < _TWO_BYTES:
        return bytes((major | 25,)) + number.to_bytes(2, "big")
    return bytes((major | 26,)) + number.to_bytes(4, "big")


def _extras(keys: Sequence[tuple[str, ...]]) -> bytes:
    return _items([_items([_text(part) for part in key]) for key in keys]) if keys else _NULL


def _items(parts: Sequence[bytes]) -> bytes:
    return _head(_ARRAY, len(parts)) + b"".join(parts)


def _text(text: str) -> bytes:
    data = text.encode()
    return _head(_TEXT, len(data)) + data


_ROOT = hashlib.sha256(_text(SEED)).digest()

NAMERS: Mapping[str, Namer] = {"sha256_cbor": sha256_cbor, "opaque": opaque}
"""By the name of the setting."""
