"""Keys as others make them: llm-d's, for an index that is shared with it, and vLLM's own block hashes.

llm-d's two (facts 5.2) chain 64-bit hashes, seeded with a string and the model's or adapter's name, over
blocks of one size whatever the engines' is. vLLM's ``sha256_cbor`` chains whole digests and tells of the
low 64 bits; who knows the seed computes the engine's hashes and needs no map from them to keys.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from sys import byteorder

from xxhash import xxh64_intdigest

from pointsman.prefix.keys import MASK, TOKEN_BYTES, Extras, extras_in, extras_of
from pointsman.prefix.kv_wire import Stored
from pointsman.types import Tokenized

VLLM_SEED = "vllm-none-hash"
"""Of vLLM's sha256 hashes where PYTHONHASHSEED is not set (vllm-facts 3)."""

_UINT64 = (1 << 64) - 1
_NULL = b"\xf6"
_BYTES, _TEXT, _ARRAY, _MAP = 0x40, 0x60, 0x80, 0xA0

# -- canonical CBOR (RFC 8949, 4.2.1), as much of it as block hashes need


def _head(kind: int, number: int) -> bytes:
    """Type and number, the number in as few bytes as it fits."""
    if number < 24:
        return bytes((kind + number,))
    for more, size in ((24, 1), (25, 2), (26, 4)):
        if number < 1 << 8 * size:
            return bytes((kind + more,)) + number.to_bytes(size, "big")
    return bytes((kind + 27,)) + number.to_bytes(8, "big")


def _text(text: str) -> bytes:
    data = text.encode(errors="surrogatepass")
    return _head(_TEXT, len(data)) + data


def _array(items: Sequence[bytes]) -> bytes:
    return _head(_ARRAY, len(items)) + b"".join(items)


_SMALL = tuple(_head(0, number) for number in range(1 << 16))
"""Almost every token id, written already."""


def _tokens(ids: Iterable[int], count: int) -> bytes:
    return _head(_ARRAY, count) + b"".join([_SMALL[i] if i < 65536 else _head(0, i) for i in ids])


def _numbers(ids: bytes) -> array[int]:
    numbers = array("I", ids[: len(ids) // TOKEN_BYTES * TOKEN_BYTES])
    if byteorder == "big":
        numbers.byteswap()
    return numbers


# -- llm-d


def cbor_fnv(parent: int, ids: bytes, extras: Sequence[str]) -> int:
    """FNV-64a over [parent, tokens, extras]: llm-d's default. Byte by byte in Python, 8 us a block of 16."""
    tokens = _tokens(_numbers(ids), len(ids) // TOKEN_BYTES)
    return _fnv64a(_array((_head(0, parent), tokens, _features(extras))))


def _features(names: Sequence[str]) -> bytes:
    return _array([_HASH + _text(name) for name in names]) if names else _NULL


_HASH = _head(_MAP, 1) + _text("Hash")


def _fnv64a(data: bytes) -> int:
    found = 0xCBF29CE484222325
    for byte in data:
        found = (found ^ byte) * 0x100000001B3 & _UINT64
    return found


def xxh64(parent: int, ids: bytes, extras: Sequence[str]) -> int:
    """One XXH64 over parent, tokens and each extra with its length before it."""
    data = parent.to_bytes(8, "little") + ids
    for extra in extras:
        text = extra.encode(errors="surrogatepass")
        data += len(text).to_bytes(8, "little") + text
    return xxh64_intdigest(data)


class LlmD:
    """Blocks have ``block_tokens`` whatever the engines' size is, so an event may have more or fewer keys
    than blocks. ``algorithm`` is llm-d's ``hashAlgorithm``, ``seed`` its ``hashSeed``.
    """

    chained = True

    def __init__(self, algorithm: str = "cbor-fnv", block_tokens: int = 16, seed: str = "") -> None:
        self.block_tokens = block_tokens
        self._algorithm = algorithm
        self._hash = {"cbor-fnv": cbor_fnv, "xxh64": xxh64}[algorithm]
        self._seed = seed.encode()

    def of_event(self, event: Stored, parent: int | None, model: str) -> list[int]:
        extras = extras_in(event)
        if extras and event.block_size != self.block_tokens:
            extras = _recut(extras, event.block_size, self.block_tokens)
        return self._chain(event.token_ids, self._root(model) if parent is None else parent, extras)

    def of_prompt(self, prompt: Tokenized, model: str, salt: str, block_tokens: int) -> list[int]:
        size = self.block_tokens
        return self._chain(prompt.ids, self._root(model), extras_of(prompt, salt, size))

    def _root(self, model: str) -> int:
        if self._algorithm == "xxh64":
            return xxh64(xxh64_intdigest(self._seed), b"", (model,))
        return _fnv64a(_array((_head(0, _fnv64a(self._seed)), _NULL, _text(model))))

    def _chain(self, ids: bytes, key: int, extras: Extras) -> list[int]:
        size, hash_ = self.block_tokens * TOKEN_BYTES, self._hash
        keys = []
        for number, at in enumerate(range(0, len(ids) - size + 1, size)):
            key = hash_(key, ids[at : at + size], extras.get(number, ()))
            keys.append(key)
        return keys


def _recut(extras: Extras, size: int, wanted: int) -> Extras:
    """Of blocks with ``wanted`` tokens instead of ``size``. Where in a larger block an image begins is not
    told; it is said to be the first part.
    """
    found: dict[int, tuple[str, ...]] = {}
    for block, names in extras.items():
        at = block * size // wanted
        known = found.get(at, ())
        found[at] = (*known, *(name for name in names if name not in known))
    return found


# -- vLLM


class Sha256Cbor:
    """The engine's own hashes, for ``--prefix-caching-hash-algo sha256_cbor``. ``seed`` is its
    PYTHONHASHSEED.

    An adapter's path is in the hash: those whose path is not in ``adapter_paths`` have no keys. How images
    are written into it we have not seen, so keys end before the first.
    """

    chained = False

    def __init__(self, seed: str = VLLM_SEED, adapter_paths: Mapping[str, str] | None = None) -> None:
        self._none = sha256(_text(seed)).digest()
        self._paths = adapter_paths or {}

    def of_event(self, event: Stored, parent: int | None, model: str) -> list[int]:
        return [h & MASK for h in event.hashes]

    def of_prompt(self, prompt: Tokenized, model: str, salt: str, block_tokens: int) -> list[int]:
        if model and model not in self._paths:
            return []
        ids = prompt.ids
        if prompt.media:
            ids = ids[: min(first for _, first, _ in prompt.media) * TOKEN_BYTES]
        return [low64(digest) & MASK for digest in self.digests(ids, model, salt, block_tokens)]

    def digests(self, ids: bytes, model: str, salt: str, block_tokens: int) -> list[bytes]:
        """Of a text's whole blocks."""
        lora = [_array([_text("lora"), _text(model), _text(self._paths[model])])] if model else []
        later = _array(lora) if lora else _NULL
        extra = _array([*lora, _array([_text("cache_salt"), _text(salt)])]) if salt else later
        digest, size = self._none, block_tokens * TOKEN_BYTES
        numbers = _numbers(ids)
        head = _head(_ARRAY, 3) + _head(_BYTES, len(digest))
        found = []
        for at in range(0, len(ids) // size * block_tokens, block_tokens):
            tokens = _tokens(numbers[at : at + block_tokens], block_tokens)
            digest = sha256(head + digest + tokens + extra).digest()
            found.append(digest)
            extra = later
        return found


def low64(digest: bytes) -> int:
    """What events have of a digest."""
    return int.from_bytes(digest[-8:], "big")
