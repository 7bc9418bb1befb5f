"""Keys that others make, too: computed once more from their description with an encoder that is not ours."""

from __future__ import annotations

import base64
import gzip
import json
from array import array
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh64_intdigest

from pointsman.prefix.blocks_schemes import LlmD, Sha256Cbor, low64
from pointsman.prefix.keys import MASK
from pointsman.prefix.kv_wire import Stored, decode
from pointsman.types import Tokenized

IDS = st.lists(
    st.one_of(
        st.integers(0, 300), st.integers(0, 2**32 - 1), st.sampled_from([23, 24, 255, 256, 65535, 65536])
    ),
    max_size=40,
)
TEXTS = st.text(max_size=300)
MEDIA = st.lists(
    st.tuples(st.text(min_size=1, max_size=30), st.integers(0, 30), st.integers(1, 12)), max_size=3
)


def pack(ids: list[int]) -> bytes:
    return array("I", ids).tobytes()


def names_in(first: int, end: int, media: list[tuple[str, int, int]], salt: str) -> list[str]:
    """Images whose placeholder overlaps these tokens, then the salt at the beginning."""
    found = [n for n, at, size in sorted(media, key=lambda m: m[1]) if at < end and at + size > first]
    return found + ([salt] if salt and not first else [])


def fnv64a(data: bytes) -> int:
    found = 14695981039346656037
    for byte in data:
        found = (found ^ byte) * 1099511628211 % 2**64
    return found


def by_cbor_fnv(parent: int, ids: list[int] | None, extra: list[str] | str | None) -> int:
    if isinstance(extra, list):
        return fnv64a(cbor2.dumps([parent, ids, [{"Hash": e} for e in extra] or None], canonical=True))
    return fnv64a(cbor2.dumps([parent, ids, extra], canonical=True))


def by_xxh64(parent: int, ids: list[int] | None, extra: list[str] | str | None) -> int:
    names = [extra] if isinstance(extra, str) else extra or []
    sized = b"".join(len(n.encode()).to_bytes(8, "little") + n.encode() for n in names)
    return xxh64_intdigest(parent.to_bytes(8, "little") + pack(ids or []) + sized)


LLM_D: dict[str, tuple[Callable[[bytes], int], Callable[..., int]]] = {
    "cbor-fnv": (fnv64a, by_cbor_fnv),
    "xxh64": (xxh64_intdigest, by_xxh64),
}


@pytest.mark.parametrize("algorithm", LLM_D)
@given(ids=IDS, model=TEXTS, salt=st.text(max_size=5), seed=st.text(max_size=5), media=MEDIA)
def test_llm_d_keys_are_as_described(
    algorithm: str, ids: list[int], model: str, salt: str, seed: str, media: list[tuple[str, int, int]]
) -> None:
    first, block = LLM_D[algorithm]
    expected, key = [], block(first(seed.encode()), None, model)
    for at in range(0, len(ids) - 3, 4):
        key = block(key, ids[at : at + 4], names_in(at, at + 4, media, salt))
        expected.append(key)
    scheme = LlmD(algorithm, 4, seed)
    assert scheme.of_prompt(Tokenized(pack(ids), tuple(media)), model, salt, 16) == expected
    assert len(expected) == len(ids) // 4


@pytest.mark.parametrize("algorithm", LLM_D)
@pytest.mark.parametrize("engine_block", [2, 4, 16])
def test_llm_d_keys_of_an_event_go_on_where_its_parent_ended(algorithm: str, engine_block: int) -> None:
    ids = list(range(100, 148))
    scheme = LlmD(algorithm, 4)
    whole = scheme.of_prompt(Tokenized(pack(ids)), "m", "", 0)
    parent: int | None = None
    found: list[int] = []
    for at in range(0, 48, 16):
        hashes = list(range(16 // engine_block))
        event = Stored(hashes, 1 if at else None, pack(ids[at : at + 16]), engine_block)
        found += scheme.of_event(event, parent, "m")
        parent = found[-1]
    assert found == whole
    assert len(whole) == 12


@given(ids=IDS, salt=st.text(max_size=40))
def test_vllm_digests_are_as_described(ids: list[int], salt: str) -> None:
    parent, expected = sha256(cbor2.dumps("7", canonical=True)).digest(), []
    for at in range(0, len(ids) - 3, 4):
        extra = (("cache_salt", salt),) if salt and not at else None
        parent = sha256(cbor2.dumps((parent, tuple(ids[at : at + 4]), extra), canonical=True)).digest()
        expected.append(parent)
    scheme = Sha256Cbor("7")
    assert scheme.digests(pack(ids), "", salt, 4) == expected
    assert scheme.of_prompt(Tokenized(pack(ids)), "", salt, 4) == [low64(d) & MASK for d in expected]


def test_vllm_hashes_end_where_they_cannot_be_told() -> None:
    scheme, ids = Sha256Cbor(), pack(list(range(12)))
    assert len(scheme.of_prompt(Tokenized(ids), "", "", 4)) == 3
    assert len(scheme.of_prompt(Tokenized(ids, (("cat.png", 5, 2),)), "", "", 4)) == 1
    assert scheme.of_prompt(Tokenized(ids), "adapter of unknown path", "", 4) == []


def test_computes_every_hash_that_a_real_engine_told() -> None:
    """vLLM 0.32, sha256_cbor: 1,544 blocks, adapters and salts among them."""
    folder = Path(__file__).parent / "capture"
    with gzip.open(folder / "frames.jsonl.gz", "rt") as file:
        payloads = [base64.b64decode(json.loads(line)["frames_b64"][2]) for line in file]
    with gzip.open(folder / "requests.jsonl.gz", "rt") as file:
        bodies = [json.loads(line)["body"] or {} for line in file]
    path = next(body["lora_path"] for body in bodies if "lora_path" in body)
    paths = {f"lora-{x}": path.removesuffix("lora-b") + f"lora-{x}" for x in "ab"}
    scheme = Sha256Cbor(adapter_paths=paths)
    texts: dict[int, tuple[bytes, str]] = {}  # by hash: all tokens up to its end, and the salt
    seen: Counter[str] = Counter()
    for event in (event for payload in payloads for event in decode(payload).events):
        if not isinstance(event, Stored):
            continue
        ids, salt = texts[event.parent] if event.parent is not None else (b"", "")
        for number, name in enumerate(event.hashes):
            extra = [
                k for k in (event.extra_keys[number] if event.extra_keys else None) or () if k != event.lora
            ]
            salt = str(extra[0]) if extra else salt
            ids += event.token_ids[number * 128 : number * 128 + 128]
            texts[name] = ids, salt
            same = low64(scheme.digests(ids, event.lora, salt, 32)[-1]) == name
            seen["equal" if same else "other"] += 1
            seen["adapter"] += bool(event.lora)
            seen["salt"] += bool(salt)
    assert seen.pop("adapter") > 5
    assert seen.pop("salt") > 5
    assert seen == {"equal": 1544}
