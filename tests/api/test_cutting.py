"""Cutting long strings out of a body before it is decoded changes nothing that is read from it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.api.body import Body, reader
from pointsman.api.cutting import LONG_BYTES, MARK, WORTH_BYTES, cut, uncut
from pointsman.errors import BadRequest


class Shape(Body):
    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    note: msgspec.Raw = msgspec.Raw(b"")


read = reader(Shape)
plain = msgspec.json.Decoder(Shape).decode

LONG = st.builds(
    lambda unit, n, tail: unit * n + tail,
    st.sampled_from(["word ", "line\n", "tab\t", "ü€😀", "back\\slash ", 'quo"te ', "\\\\", "{[]},:"]),
    st.integers(0, 900),
    st.text(max_size=20),
)
VALUE = st.recursive(
    LONG | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


@given(
    st.lists(LONG, max_size=3),
    VALUE,
    VALUE,
    st.booleans(),
    st.sampled_from([None, 2]),
    st.sampled_from(["m", "n" * 600]),
)
def test_reads_the_same_fields(
    texts: list[str], prompt: Any, note: Any, ascii_only: bool, indent: int | None, model: str
) -> None:
    tree = {"note": note, "model": model, "messages": [{"content": t} for t in texts], "prompt": prompt}
    body = json.dumps(tree, ensure_ascii=ascii_only, indent=indent).encode()
    got, expected = read(body), plain(body)
    assert got.model == expected.model
    for name in ("messages", "prompt", "note"):
        assert bytes(getattr(got, name)) == bytes(getattr(expected, name))


def test_a_long_prompt_is_cut_and_comes_back_as_it_was() -> None:
    text = b"a line of a prompt\\n" * 500
    body = b'{"prompt":"' + text + b'","model":"m"}'
    found = cut(body)
    assert found is not None
    skeleton = found[0]
    assert len(skeleton) < 100
    assert text not in skeleton
    assert uncut(skeleton, found, body) == body


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":"short"}',
        b'{"prompt":"' + b'say \\"so\\" ' * 1000 + b'"}',
        b'{"prompt":"' + b"never ends " * 1000,
    ],
    ids=["small", "full of quotes", "cut off"],
)
def test_not_worth_or_not_possible(body: bytes) -> None:
    assert cut(body) is None


def test_broken_json_around_a_long_string_names_the_place_in_the_whole_body() -> None:
    body = b'{"model":"m","prompt":"' + b"x" * WORTH_BYTES + b'",}'
    with pytest.raises(BadRequest, match=f"byte {len(body) - 1}"):
        read(body)


def test_a_body_cannot_smuggle_a_mark() -> None:
    assert len(MARK) > 16
    body = json.dumps({"model": "m", "note": "@cut-0@", "prompt": "y" * (WORTH_BYTES + LONG_BYTES)}).encode()
    assert bytes(read(body).note) == b'"@cut-0@"'


@pytest.mark.parametrize(
    "gap", [b"[" + b"17, " * 2000 + b"5]", b" " * 8000 + b"3"], ids=["token ids", "spaces"]
)
def test_what_is_long_and_no_string_is_read_as_it_is(gap: bytes) -> None:
    long = b'"' + b"z" * 2000 + b'"'
    body = b'{"messages":[' + long + b'],"note":"n","prompt":' + gap + b',"model":"m"}'
    got = read(body)
    assert got.model == "m"
    assert bytes(got.messages) == b"[" + long + b"]"
    assert bytes(got.prompt).strip() == gap.strip()
