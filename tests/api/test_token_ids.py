"""Token ids and salts that come with a request, and what of it goes on to the engine."""

from __future__ import annotations

import json
import struct

import pytest

from pointsman import api
from pointsman.api.token_ids import pack, prompt_ids, rendered
from pointsman.errors import BadRequest
from pointsman.types import Tokenized

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
FEATURES = {
    "mm_hashes": {"image": ["late", "early"], "audio": ["between"]},
    "mm_placeholders": {
        "image": [{"offset": 9, "length": 4}, {"offset": 1, "length": 3}],
        "audio": [{"offset": 5, "length": 2}],
    },
}


def parse(path, fields):
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return api.find(path).parse("r1", path, {}, body)


def ids(*values):
    return struct.pack(f"<{len(values)}I", *values)


def test_ids_are_packed_little_endian():
    assert pack([1, 70000, 0xFFFFFFFF]) == ids(1, 70000, 0xFFFFFFFF)


def test_one_prompt_of_ids_and_a_batch():
    assert prompt_ids(b"[1, 2, 3]") == (Tokenized(ids(1, 2, 3)),)
    assert prompt_ids(b"[[1, 2], [3]]") == (Tokenized(ids(1, 2)), Tokenized(ids(3)))


@pytest.mark.parametrize("raw", [b"", b'"text"', b'["a"]', b"[-1]", b"[4294967296]", b"[1, [2]]", b"[1.5]"])
def test_what_is_no_prompt_of_ids_gives_none(raw):
    assert prompt_ids(raw) == ()


def test_media_are_placed_in_the_order_of_their_tokens():
    (found,) = rendered(json.dumps({"token_ids": list(range(20)), "features": FEATURES}).encode())
    assert found.ids == ids(*range(20))
    assert found.media == (("early", 1, 3), ("between", 5, 2), ("late", 9, 4))


def test_a_hash_without_a_place_makes_the_ids_useless():
    features = {"mm_hashes": {"image": ["a"]}, "mm_placeholders": {}}
    assert rendered(json.dumps({"token_ids": [1], "features": features}).encode()) == ()


@pytest.mark.parametrize("size", [1, 2000])
def test_a_chats_tokens_field_is_read_and_not_forwarded(size):
    fields = {"model": "m", "messages": [{"role": "user", "content": 'é "x" ' * size}], "temperature": 0.25}
    request = parse(CHAT, fields | {"tokens": {"token_ids": [5, 6, 7]}})
    assert request.tokenized == (Tokenized(ids(5, 6, 7)),)
    assert request.prompt_tokens == 3
    assert json.loads(request.body) == fields
    assert bytes(request.prompts[0].data) == json.dumps(fields["messages"]).encode()[:-1]


@pytest.mark.parametrize("tokens", [None, 7, [1, 2], {}, {"token_ids": "x"}, {"token_ids": [-1]}])
def test_a_tokens_field_of_another_shape_is_left_out_as_well(tokens):
    fields = {"model": "m", "messages": MESSAGES}
    request = parse(CHAT, fields | {"tokens": tokens})
    assert request.tokenized == ()
    assert json.loads(request.body) == fields


def test_a_body_without_the_field_is_forwarded_as_it_came():
    body = json.dumps({"model": "m", "messages": MESSAGES}).encode()
    assert parse(CHAT, body).body is body


def test_broken_text_that_was_not_looked_at_is_refused_where_the_body_must_be_written_anew():
    long = b"x" * 5000 + rb"\q"
    body = b'{"model": "m", "tokens": 1, "messages": [{"role": "user", "content": "%b"}]}' % long
    with pytest.raises(BadRequest):
        parse(CHAT, body)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"model": "m", "prompt": "a"}),
        (CHAT, {"model": "m", "messages": MESSAGES}),
        ("/v1/embeddings", {"model": "m", "input": "a"}),
        ("/v1/responses", {"model": "m", "input": "a"}),
        ("/v1/messages", {"model": "m", "messages": MESSAGES}),
        ("/inference/v1/generate", {"model": "m", "token_ids": [1]}),
    ],
)
def test_the_salt_is_known_as_text(path, fields):
    assert parse(path, fields | {"cache_salt": 'tenant "é"'}).cache_salt == 'tenant "é"'
    assert parse(path, fields | {"cache_salt": None}).cache_salt == ""
    assert parse(path, fields).cache_salt == ""
