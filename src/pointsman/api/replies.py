"""Errors as each API's clients expect them: a JSON body, or an event in a stream that has already begun."""

from __future__ import annotations

import msgspec

from pointsman.errors import PointsmanError

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Error types by status (Anthropic's API reference); other 4xx are ``invalid_request_error``, 5xx
``api_error``.
"""


def openai_error(err: PointsmanError) -> bytes:
    """``code`` is our stable reason, which is OpenAI's own word where there is one (model_not_found)."""
    error = {"message": err.message, "type": err.kind, "param": err.param, "code": err.reason}
    return msgspec.json.encode({"error": error})


def openai_stream_error(err: PointsmanError) -> bytes:
    return b"data: " + openai_error(err) + b"\n\n"


def responses_stream_error(err: PointsmanError) -> bytes:
    """The Responses API's ``error`` event. Its sequence number is unknown to a relay that does not parse."""
    event = {
        "type": "error",
        "code": err.reason,
        "message": err.message,
        "param": err.param,
        "sequence_number": 0,
    }
    return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"


def anthropic_error(err: PointsmanError) -> bytes:
    kind = _ANTHROPIC_TYPES.get(err.status) or ("api_error" if err.status >= 500 else "invalid_request_error")
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": err.message}})


def anthropic_stream_error(err: PointsmanError) -> bytes:
    return b"event: error\ndata: " + anthropic_error(err) + b"\n\n"
