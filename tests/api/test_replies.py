"""Errors in each API's own shape; the real SDKs read them."""

from __future__ import annotations

import importlib
import json

import anthropic
import openai
import pytest

from pointsman import api, errors

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


@pytest.mark.parametrize("path", [CHAT, RESPONSES, "/v1/embeddings", "/rerank", "/generate", "/v1/models"])
def test_openai_shape(path):
    body = api.find(path).error_body(errors.ModelNotFound("nope", ["m"]))
    assert json.loads(body) == {
        "error": {
            "message": "The model `nope` does not exist. Models served here: m.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.BadRequest("x"), "invalid_request_error"),
        (errors.PreconditionFailed("x"), "invalid_request_error"),
        (errors.PathNotFound("x"), "not_found_error"),
        (errors.BodyTooLarge("x"), "request_too_large"),
        (errors.Saturated("x"), "rate_limit_error"),
        (errors.NoEndpoints("x"), "overloaded_error"),
        (errors.UpstreamFailed("x"), "api_error"),
        (errors.UpstreamTimeout("x"), "timeout_error"),
    ],
)
def test_anthropic_shape(error, kind):
    expected = {"type": "error", "error": {"type": kind, "message": "x"}}
    assert json.loads(api.find(MESSAGES).error_body(error)) == expected


def test_every_error_has_a_body_in_every_format():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and "message" not in vars(kind)]
    kinds = [kind for kind in kinds if issubclass(kind, errors.PointsmanError)]
    assert len(kinds) > 10
    for kind in kinds:
        error = kind("nope", []) if kind is errors.ModelNotFound else kind("said \u201cno\u201d")
        for known in (*api.formats(), api.PASSTHROUGH):
            assert error.message in str(json.loads(known.error_body(error)))
            event = known.stream_error(error)
            assert event.endswith(b"\n\n")
            assert b"\n\n" not in event[:-2]


BROKEN = errors.UpstreamFailed("the endpoint broke off")


def event(path):
    return api.find(path).stream_error(BROKEN)


def client_of(sdk, stream):
    """The SDK's own HTTP client, answered with ``stream``. It may be httpx or httpx2."""
    httpx = importlib.import_module(sdk.DefaultHttpxClient.__base__.__module__.partition(".")[0])
    reply = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=stream)
    return sdk.DefaultHttpxClient(transport=httpx.MockTransport(lambda request: reply))


def test_openai_sdk_raises_on_a_broken_chat_stream():
    first = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
    http = client_of(openai, first + event(CHAT))
    client = openai.OpenAI(api_key="k", base_url="http://router/v1", http_client=http)
    stream = client.chat.completions.create(model="m", messages=[], stream=True)
    assert next(stream).choices[0].delta.content == "hi"
    with pytest.raises(openai.APIError, match="the endpoint broke off") as caught:
        next(stream)
    assert caught.value.code == "upstream_failed"


def test_openai_sdk_sees_the_error_event_of_a_broken_response():
    http = client_of(openai, event(RESPONSES))
    client = openai.OpenAI(api_key="k", base_url="http://router/v1", http_client=http)
    (seen,) = client.responses.create(model="m", input="x", stream=True)
    assert (seen.type, seen.code, seen.message) == ("error", "upstream_failed", "the endpoint broke off")


def test_anthropic_sdk_raises_on_a_broken_stream():
    http = client_of(anthropic, event(MESSAGES))
    client = anthropic.Anthropic(api_key="k", base_url="http://router", http_client=http)
    stream = client.messages.create(model="m", max_tokens=5, messages=[], stream=True)
    with pytest.raises(anthropic.APIError, match="the endpoint broke off"):
        list(stream)
