"""Header blocks: what the ``hpack`` library writes, ours reads, and the other way round."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.extproc.hpack import BadBlock, Decoder, Field, ListTooLong, encode

names = st.sampled_from([b":path", b"content-type", b"x-a", b"x-b", b"cookie"])
fields = st.lists(st.tuples(names, st.binary(max_size=300)), max_size=8)


@given(st.lists(st.tuples(fields, st.booleans(), st.sampled_from([None, 0, 100, 4096])), max_size=5))
def test_reads_what_the_library_writes(blocks: list[tuple[list[Field], bool, int | None]]) -> None:
    """Tables that are filled, evicted from and resized, strings by the Huffman code and plain."""
    encoder, decoder = hpack.Encoder(), Decoder(1 << 20)
    for wanted, huffman, table_bytes in blocks:
        if table_bytes is not None:
            encoder.header_table_size = table_bytes
        assert decoder.decode(encoder.encode(wanted, huffman=huffman)) == wanted


@given(fields)
def test_the_library_reads_what_ours_writes(wanted: list[Field]) -> None:
    assert [tuple(field) for field in hpack.Decoder().decode(encode(wanted), raw=True)] == wanted


def read(block: bytes) -> list[Field] | str:
    """The block's fields, or what is wrong with it."""
    try:
        return Decoder(1 << 16).decode(block)
    except BadBlock as exc:
        return str(exc)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_block_or_none_as_the_library_says(block: bytes) -> None:
    try:
        wanted = [tuple(field) for field in hpack.Decoder().decode(block, raw=True)]
    except Exception:  # the library's own kinds, and those it lets through
        assert isinstance(read(block), str)
    else:
        assert read(block) in (wanted, "an integer is too long")


def test_a_list_that_is_too_long_leaves_the_table_as_it_should_be() -> None:
    encoder, decoder = hpack.Encoder(), Decoder(200)
    with pytest.raises(ListTooLong):
        decoder.decode(encoder.encode([(b"x-a", b"1"), (b"x-long", b"v" * 300)]))
    assert decoder.decode(encoder.encode([(b"x-a", b"1")])) == [(b"x-a", b"1")]


def test_without_a_table_equal_blocks_are_equal_fields() -> None:
    decoder = Decoder(1 << 16)
    assert not decoder.stateless
    decoder.allowed_table_bytes = 0
    assert not decoder.stateless  # the peer has not said so yet
    assert decoder.decode(b"\x20" + encode([(b"x", b"1")])) == [(b"x", b"1")]
    assert decoder.stateless
    assert decoder.decode(b"\x40\x01x\x011") == [(b"x", b"1")]  # added to a table that holds nothing
    with pytest.raises(BadBlock):
        decoder.decode(b"\xbe")
