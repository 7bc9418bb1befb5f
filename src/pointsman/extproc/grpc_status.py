"""gRPC's status of a response as the HTTP status that means the same, and the other way.

A gRPC answer is HTTP 200; how it went stands in its trailers, or in its headers where there is nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

FIELD: Final = "grpc-status"

_HTTP: Final = {
    1: 499,
    2: 500,
    3: 400,
    4: 408,
    5: 404,
    6: 409,
    7: 403,
    8: 429,
    9: 400,
    10: 409,
    11: 400,
    12: 404,
    13: 500,
    14: 503,
    15: 500,
    16: 401,
}
"""As google.rpc.Code maps them, but for DEADLINE_EXCEEDED (4), which is the client's, and UNIMPLEMENTED (12):
they are no fault of an endpoint, as 504 and 501 would be.
"""
_CODES: Final = {400: 3, 401: 16, 403: 7, 404: 5, 412: 9, 413: 8, 429: 8, 503: 14}
_INTERNAL: Final = 13


def is_grpc(headers: Mapping[str, str]) -> bool:
    """Whether a request or response with these headers is gRPC."""
    return headers.get("content-type", "").startswith("application/grpc")


def http_status(status: int, fields: Mapping[str, str]) -> int:
    """``status``, unless these headers or trailers tell of another one."""
    told = fields.get(FIELD, "0")
    code = int(told) if told.isdecimal() else 2
    return _HTTP.get(code, 500) if code and status == 200 else status


def code_of(status: int) -> int:
    """The gRPC code for an error that HTTP tells by ``status``."""
    return _CODES.get(status, _INTERNAL)
