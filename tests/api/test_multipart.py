"""Audio and image forms: the model's name is found, whatever stands around it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman import api
from pointsman.errors import BadRequest

PATH = "/v1/audio/transcriptions"


def form(*fields, boundary=b"xYzZY"):
    parts = []
    for name, value in fields:
        file = b'; filename="a.wav"\r\nContent-Type: audio/wav' if name == b"file" else b""
        parts.append(
            b'--%b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
            % (boundary, name, file, value)
        )
    return b"".join(parts) + b"--%b--\r\n" % boundary


def parse(body, content_type="multipart/form-data; boundary=xYzZY"):
    return api.find(PATH).parse("r1", PATH, {"content-type": content_type}, body)


@pytest.mark.parametrize("order", [1, -1])
def test_model_and_stream_before_or_after_the_file(order):
    fields = [(b"model", b"whisper"), (b"file", b"RIFF\r\n\r\n\x00\xff--xYz"), (b"stream", b"true")]
    request = parse(form(*fields[::order]))
    assert (request.model, request.stream, request.format) == ("whisper", True, "openai")
    assert (request.prompts, request.prompt_tokens) == ((), 0)


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/form-data; boundary="xYzZY"',
        "Multipart/Form-Data;boundary=xYzZY",
        "multipart/form-data; charset=utf-8; boundary=xYzZY",
        "multipart/form-data; boundary=xYzZY; charset=utf-8",
    ],
)
def test_spellings_of_the_content_type(content_type):
    assert parse(form((b"model", b"whisper")), content_type).model == "whisper"


def test_a_file_that_looks_like_a_form_is_not_read():
    inner = form((b"model", b"wrong"), boundary=b"other")
    assert parse(form((b"file", inner), (b"model", b"right"))).model == "right"


def test_field_name_without_quotes_and_with_other_headers():
    head = b"Content-Type: text/plain\r\ncontent-disposition: form-data; name=model"
    body = b"--xYzZY\r\n" + head + b"\r\n\r\nwhisper\r\n--xYzZY--\r\n"
    assert parse(body).model == "whisper"


def test_a_field_called_otherwise_is_not_the_model():
    with pytest.raises(BadRequest):
        parse(form((b"xmodel", b"whisper"), (b"filename", b"model")))


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=x"]
)
def test_no_form_is_a_bad_request(content_type):
    with pytest.raises(BadRequest, match="multipart/form-data") as caught:
        parse(b'{"model": "whisper"}', content_type)
    assert caught.value.param == "content-type"


@pytest.mark.parametrize("body", [b"", form(), form((b"file", b"x")), form((b"model", b""))])
def test_no_model_is_a_bad_request(body):
    with pytest.raises(BadRequest, match="`model` is missing") as caught:
        parse(body)
    assert caught.value.param == "model"


def test_a_form_that_breaks_off_after_the_model_still_routes():
    whole = form((b"model", b"whisper"), (b"file", b"x" * 100))
    assert parse(whole[:150]).model == "whisper"


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_any_file_around_the_model(before, after):
    if b"xYzZY" not in before + after:
        assert parse(form((b"file", before), (b"model", b"whisper"), (b"file", after))).model == "whisper"
