"""Text, token ids and chats are the same tokens, and are hashed alike."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from pointsman.sim import tokens


@given(st.text())
def test_tokens_of_a_text_give_it_back(text: str) -> None:
    data = text.rstrip("\0").encode()
    ids = tokens.to_ids(data)
    assert len(ids) == tokens.count(data)
    assert tokens.text_of(tokens.from_ids(ids)).encode() == data


def test_an_id_is_four_bytes_as_a_little_endian_number() -> None:
    assert tokens.to_ids(b"\x01\0\0\0\x00\x02") == [1, 512]
    assert tokens.from_ids([1, 512]) == b"\x01\0\0\0\x00\x02\0\0"


@given(st.binary(max_size=400), st.integers(0, 400), st.sampled_from([1, 4, 16]))
def test_equal_beginnings_have_equal_hashes_and_nothing_else(data: bytes, at: int, block: int) -> None:
    at = min(at, max(0, len(data) - 1))
    other = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if data else b""
    ours, theirs = tokens.block_hashes(data, block, 0), tokens.block_hashes(other, block, 0)
    same = at // (4 * block)
    assert len(ours) == len(data) // (4 * block)
    assert ours[:same] == theirs[:same]
    assert not set(ours[same:]) & set(theirs[same:])
    assert not set(ours) & set(tokens.block_hashes(data, block, 1))


def test_remembered_hashes_are_the_same_hashes() -> None:
    rng = random.Random(5)
    hasher = tokens.BlockHasher()
    texts = [rng.randbytes(20_000) for _ in range(3)]
    for _ in range(60):
        data = b"".join(rng.choices(texts, k=rng.randint(0, 3)))[: rng.randint(0, 50_000)]
        block, seed = rng.choice([16, 32]), rng.choice([1, 2])
        assert hasher.hash(data, block, seed) == tokens.block_hashes(data, block, seed)


@given(st.binary(min_size=1, max_size=200), st.integers(0, 60), st.sampled_from([1, 4, 16]))
def test_an_output_is_hashed_as_if_it_had_been_part_of_the_prompt(
    prompt: bytes, output: int, block: int
) -> None:
    chain = tokens.block_hashes(prompt, block, 7)
    text = tokens.output(11, 0, output)
    continued = tokens.continued_hashes(prompt, chain, text, block, 7)
    assert chain + continued == tokens.block_hashes(tokens.filled(prompt) + text, block, 7)


def test_an_output_is_the_same_however_it_is_cut() -> None:
    whole = tokens.output(4000, 0, 9000)
    assert len(whole) == 36_000
    assert b"".join(tokens.output(4000, i, i + 750) for i in range(0, 9000, 750)) == whole
    assert whole.isascii()
    assert not set(whole) & set(b'"\\\n')
