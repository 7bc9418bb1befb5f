"""Odd and broken bodies: a 400 that names place or field, or a request; never anything else."""

from __future__ import annotations

import json

import pytest

from pointsman import api
from pointsman.errors import BadRequest

PATH = "/v1/chat/completions"


def parse(body, path=PATH):
    return api.find(path).parse("r1", path, {}, body)


def refusal(body, path=PATH):
    with pytest.raises(BadRequest) as caught:
        parse(body, path)
    return caught.value


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b"", "byte 0 (line 1, column 1): the body is empty"),
        (b"{", "byte 1 (line 1, column 2): the text ends too early"),
        (b'{"model":"m"', "byte 12 (line 1, column 13): the text ends too early"),
        (b'{"model": }', "byte 10 (line 1, column 11): invalid character"),
        (b'{\n  "model":"m",\n  "stream": @}', "byte 29 (line 3, column 13): invalid character"),
        (b'{"model":"m","messages":[1,]}', "byte 27 (line 1, column 28): trailing comma in array"),
        (b'{"model":"m"} {}', "byte 15 (line 1, column 16): trailing characters"),
        (b'{"model":"m","temperature":NaN}', "byte 27 (line 1, column 28): invalid character"),
        (b'{"model":"m","messages":"a\x00b"}', "byte 26 (line 1, column 27): invalid character"),
        (b'{"model":"m","max_tokens":"many","messages":[1 2]}', "byte 47 (line 1, column 48)"),
        (b'{"model":"\xff"}', "byte 10 (line 1, column 11): not valid UTF-8"),
        (b"\x1f\x8b\x08", "byte 0 (line 1, column 1): invalid character"),
        ('{"model":"m"}'.encode("utf-16"), "byte 0 (line 1, column 1): invalid character"),
        (b"\xef\xbb\xbf" * 100_000, "byte 0 (line 1, column 1): invalid character"),
    ],
)
def test_broken_json_names_the_place(body, place):
    assert place in refusal(body).message
    assert refusal(body).message.startswith("Invalid JSON at ")


@pytest.mark.parametrize("path", [PATH, "/v1/completions", "/v1/messages", "/generate"])
@pytest.mark.parametrize(
    "opening", [b'{"model":"m","messages":', b'{"model":"m","other":', b'{"model":"m","max_tokens":']
)
@pytest.mark.parametrize("bracket", [b"[", b'{"a":'])
def test_100000_brackets_are_refused(path, opening, bracket):
    assert refusal(opening + bracket * 100_000, path).message == "Invalid JSON: nested too deeply"


@pytest.mark.parametrize(
    "path", [PATH, "/v1/completions", "/v1/messages", "/v1/responses", "/generate", "/score"]
)
@pytest.mark.parametrize("depth", [10, 100, 400, 480, 490, 500, 900, 940, 960, 980, 1000])
@pytest.mark.parametrize("field", ["messages", "prompt", "input", "text", "image_data", "text_1"])
@pytest.mark.parametrize(
    "pair", [(b"[", b"]"), (b'[{"content":', b"}]"), (b'[{"image_url":"http://h/a_url","content":', b"}]")]
)
def test_nesting_of_any_depth_is_read_or_refused(path, field, depth, pair):
    body = b'{"model":"m","%b":%b1%b}' % (field.encode(), pair[0] * depth, pair[1] * depth)
    try:
        assert parse(body, path).model == "m"
    except BadRequest as refused:
        assert refused.message == "Invalid JSON: nested too deeply"  # noqa: PT017  (either will do)


@pytest.mark.parametrize("body", [b"[]", b"null", b'"model"', b"5", b"true"])
def test_a_body_must_be_an_object(body):
    assert "must be a JSON object" in refusal(body).message


@pytest.mark.parametrize("body", [b"{}", b'{"model":null}', b'{"model":""}', b'{"Model":"m"}'])
@pytest.mark.parametrize("path", [PATH, "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages"])
def test_a_missing_model_is_named(body, path):
    error = refusal(body, path)
    assert error.param == "model"
    assert "`model` is missing: expected the name of a model" in error.message


@pytest.mark.parametrize(
    ("value", "got"), [("5", "int"), ("[]", "array"), ("{}", "object"), ("true", "bool")]
)
@pytest.mark.parametrize("path", [PATH, "/generate", "/rerank"])
def test_a_model_of_the_wrong_type_is_named(value, got, path):
    error = refusal(b'{"model":%b}' % value.encode(), path)
    assert error.param == "model"
    assert error.message.startswith("`model` must be a string")
    assert got in error.message


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("16", 16),
        ('"16"', 16),
        ("16.0", 16),
        ("16.5", None),
        ("-1", None),
        ("null", None),
        ("[]", None),
        ('"many"', None),
        ("true", None),
        ("1e400", None),
        ("9" * 5000, None),
        ("18446744073709551616", None),
        ("4294967296", None),
    ],
)
def test_limits_of_the_wrong_type_are_left_to_the_engine(value, read):
    body = b'{"model":"m","messages":[],"n":2,"max_tokens":%b}' % value.encode()
    request = parse(body)
    assert (request.max_tokens, request.n, request.body) == (read, 2, body)


@pytest.mark.parametrize(
    ("value", "stream"),
    [("true", True), ('"true"', True), ("1", True), ("false", False), ("[]", False), ("null", False)],
)
def test_stream_is_understood_as_engines_do(value, stream):
    assert parse(b'{"model":"m","stream":%b}' % value.encode()).stream is stream


def test_of_duplicated_keys_the_last_wins():
    assert parse(b'{"model":5,"model":"a","model":"b"}').model == "b"
    assert refusal(b'{"model":"a","model":5}').param == "model"
    request = parse(b'{"model":"m","messages":[1],"messages":[1,2]}')
    assert bytes(request.prompts[0].data) == b"[1,2"


def test_a_key_may_be_written_in_escapes():
    assert parse(rb'{"mod\u0065l":"m"}').model == "m"


def test_a_byte_order_mark_is_stepped_over():
    body = b'\xef\xbb\xbf{"model":"m","messages":[1]}'
    request = parse(body)
    assert (request.model, bytes(request.prompts[0].data), request.body) == ("m", b"[1", body)


def test_invalid_utf8_in_what_we_do_not_read_is_left_to_the_engine():
    body = b'{"model":"m","\xff":1,"messages":[{"content":"\xff\xfe"}]}'
    assert bytes(parse(body).prompts[0].data) == b'[{"content":"\xff\xfe"}'


def test_a_model_may_have_any_name():
    name = 'org/Modell-\u00fc\u4e2d"\\\n' + "x" * 10_000
    assert parse(json.dumps({"model": name}).encode()).model == name
