"""Errors as an endpoint picker tells them: the status, llm-d's text, and why the request was dropped."""

from __future__ import annotations

from pointsman.errors import PointsmanError
from pointsman.extproc import messages
from pointsman.extproc.grpc_status import code_of
from pointsman.extproc.headers import DROPPED

CODES = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    412: "PreconditionFailed",
    413: "BadRequest",
    429: "ResourceExhausted",
    500: "Internal",
    503: "ServiceUnavailable",
}
"""llm-d's name of each status it answers with; 413 is ours."""

DROP_REASONS = {"saturated": "rejected-saturated", "no_endpoints": "rejected-no-endpoints"}
"""llm-d's, by our own."""


def refusal(error: PointsmanError, *, grpc: bool = False) -> bytes:
    """The ImmediateResponse for this error; ``grpc``: the request is gRPC."""
    message = error.message
    if error.status == 400 and error.param == "model":
        message = f"model not found in request body: {message}"
    text = f"inference error: {CODES.get(error.status, 'Internal')} - {message}"
    dropped = DROP_REASONS.get(error.reason) if error.status in (429, 503) else None
    code = code_of(error.status) if grpc else None
    return messages.immediate(error.status, text, ((DROPPED, dropped),) if dropped else (), code)
