"""Token ids that a client sends, and those that an engine's render answers with."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta, Raw

from pointsman.api.prompts import ABSENT
from pointsman.types import Tokenized

Id = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]

_one = msgspec.json.Decoder(list[Id]).decode
_batch = msgspec.json.Decoder(list[list[Id]]).decode


class _Placeholder(msgspec.Struct, gc=False):
    offset: Annotated[int, Meta(ge=0)]
    length: Annotated[int, Meta(ge=0)]


class _Features(msgspec.Struct, gc=False):
    """Of each modality the items' hashes, and where their placeholders are."""

    mm_hashes: dict[str, list[str]] = {}
    mm_placeholders: dict[str, list[_Placeholder]] = {}


class Rendered(msgspec.Struct, gc=False):
    """llm-d's ``tokens`` field, vLLM's ``/inference/v1/generate``, and what vLLM's render answers."""

    token_ids: list[Id]
    features: _Features | None = None

    def tokenized(self) -> Tokenized | None:
        """None where it has media and does not tell of each what and where it is."""
        features = self.features or _Features()
        placed: list[tuple[str, int, int]] = []
        for modality, hashes in features.mm_hashes.items():
            places = features.mm_placeholders.get(modality, ())
            if len(places) != len(hashes):
                return None
            placed += ((name, p.offset, p.length) for name, p in zip(hashes, places, strict=True))
        return Tokenized(pack(self.token_ids), tuple(sorted(placed, key=lambda item: item[1])))


_rendered = msgspec.json.Decoder(Rendered).decode


def pack(ids: Iterable[int]) -> bytes:
    """The ids as ``Tokenized`` has them."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def prompt_ids(raw: Raw) -> tuple[Tokenized, ...]:
    """Prompts of token ids, one or a batch; empty for anything else."""
    if bytes(memoryview(raw)[:1]) != b"[":
        return ()
    try:
        ids = _one(raw)
        return (Tokenized(pack(ids)),) if ids else ()
    except msgspec.DecodeError:
        pass
    try:
        return tuple(Tokenized(pack(ids)) for ids in _batch(raw))
    except msgspec.DecodeError:
        return ()


def rendered(raw: Raw | bytes) -> tuple[Tokenized, ...]:
    """The prompt in an object of ``token_ids`` and ``features``; empty where it is none."""
    if raw is ABSENT:
        return ()
    try:
        found = _rendered(raw).tokenized()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ()
    return (found,) if found is not None else ()
