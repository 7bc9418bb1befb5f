"""What the fields of an HTTP/2 request may be (RFC 9113, 8)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import msgspec

from pointsman.extproc.hpack import Field

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+").fullmatch
_BAD_VALUE = re.compile(rb"[\0\r\n]").search
_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
_CONNECTION = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))


class Malformed(Exception):
    """The request is not one: its stream is reset."""


class Head(msgspec.Struct, frozen=True):
    """A request's fields."""

    method: str
    path: str
    headers: Mapping[str, str]
    """By lower-case name; the values of one name joined by commas; without ``:method``, ``:scheme``,
    ``:path``.
    """
    length: int | None
    """As content-length says."""


def read_head(fields: Iterable[Field]) -> Head:
    """The request that these fields are."""
    pseudo: dict[bytes, bytes] = {}
    headers: dict[str, str] = {}
    for name, value in fields:
        if name[:1] == b":":
            if headers or name in pseudo or name not in _PSEUDO:
                raise Malformed(f"{name!r} does not belong there")
            pseudo[name] = value
            continue
        _check(name, value)
        text, key = value.decode("latin-1"), name.decode()
        headers[key] = f"{headers[key]},{text}" if key in headers else text
    method, path = pseudo.get(b":method"), pseudo.get(b":path")
    if not method or not path or not pseudo.get(b":scheme"):
        raise Malformed("a pseudo header is missing")
    if b":authority" in pseudo:
        headers[":authority"] = pseudo[b":authority"].decode("latin-1")
    length = headers.get("content-length")
    if length is not None and not (length.isascii() and length.isdigit() and len(length) < 19):
        raise Malformed("content-length is not a number")
    return Head(
        method.decode("latin-1"), path.decode("latin-1"), headers, None if length is None else int(length)
    )


def check_trailers(fields: Iterable[Field]) -> None:
    """Raise unless these may end a request."""
    for name, value in fields:
        _check(name, value)


def _check(name: bytes, value: bytes) -> None:
    if not _NAME(name):
        raise Malformed(f"{name!r} is no field name")
    if _BAD_VALUE(value):
        raise Malformed(f"{name!r} has a value of two lines")
    if name in _CONNECTION or (name == b"te" and value != b"trailers"):
        raise Malformed(f"{name!r} has no place in HTTP/2")
