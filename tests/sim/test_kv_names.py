"""Names of blocks, against another implementation of CBOR and against what a real vLLM published."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import cbor2
from hypothesis import given
from hypothesis import strategies as st

from pointsman.sim import tokens
from pointsman.sim.kv_names import sha256_cbor, wire
from pointsman.sim.text import Text

BLOCK = 16
NONE_HASH = "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0"
"""What vLLM 0.32.0's chain begins with (vLLM's own source and a running server agree)."""
token_ids = st.integers(0, 30) | st.integers(0, 70_000) | st.integers(0, 2**32 - 1)
prompts = st.integers(1, 5).flatmap(
    lambda blocks: st.lists(token_ids, min_size=blocks * BLOCK, max_size=blocks * BLOCK)
)


def canonical(value: object) -> bytes:
    return hashlib.sha256(cbor2.dumps(value, canonical=True)).digest()


def names(ids: Sequence[int], lora: str = "", salt: str = "", first: int = 0) -> list[bytes]:
    """Of the blocks from ``first`` on, when those before are known."""
    data = tokens.from_ids(ids)
    text = Text(data, lambda _: b"", BLOCK, lora, salt)
    blocks = len(ids) // BLOCK
    parent = names(ids[: first * BLOCK], lora, salt)[-1] if first else None
    return sha256_cbor(text, first, parent, text.token_ids(first, blocks - first), range(first, blocks))


@given(prompts, st.sampled_from(["", "adapter-ä", "a" * 30]), st.sampled_from(["", "tenant-one"]))
def test_names_are_the_chain_that_vllm_documents(ids: list[int], lora: str, salt: str) -> None:
    digest = canonical("vllm-none-hash")
    assert digest.hex() == NONE_HASH
    expected = []
    for at in range(0, len(ids), BLOCK):
        extra = [("lora", lora, f"/loras/{lora}")] if lora else []
        if salt and not at:
            extra.append(("cache_salt", salt))
        digest = canonical((digest, tuple(ids[at : at + BLOCK]), tuple(extra) or None))
        expected.append(digest)
    assert names(ids, lora, salt) == expected
    assert [wire(name) for name in expected] == [int(name.hex()[-16:], 16) for name in expected]


@given(prompts, st.sampled_from(["", "tenant-one"]))
def test_a_chain_can_be_named_in_parts(ids: list[int], salt: str) -> None:
    whole = names(ids, salt=salt)
    for first in range(1, len(whole)):
        assert names(ids, salt=salt, first=first) == whole[first:]


def test_a_block_of_a_real_server_gets_its_hash() -> None:
    """The first block of message 1 of the capture that ``tests/prefix/capture`` has."""
    ids = [
        *(1247, 1254, 1261, 1268, 1275, 1282, 1289, 1296, 1303, 1310, 1317, 1324, 1331, 1338, 1345, 1352),
        *(1359, 1366, 1373, 1380, 1387, 1394, 1401, 1408, 1415, 1422, 1429, 1436, 1443, 1450, 1457, 1032),
    ]
    text = Text(tokens.from_ids(ids), lambda _: b"", 32, "", "")
    (name,) = sha256_cbor(text, 0, None, text.token_ids(0, 1), [0])
    assert wire(name) == 1769223474557097620
