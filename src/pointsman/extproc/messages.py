"""Envoy's ext_proc messages, in and out (envoy/service/ext_proc/v3/external_processor.proto).

Headers come in through the protobuf classes. Bodies do not: a body is the first field of its message, its
``HttpBody`` has the same field numbers as the ``StreamedBodyResponse`` of an answer, so that what came in
goes out behind other length prefixes. What we say ourselves is written field by field; most of it is cached.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from envoy.config.core.v3.base_pb2 import HeaderValue
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf.message import DecodeError

from pointsman.extproc.headers import DESTINATION, FLIGHT, SERVED, SUBSET

MAX_CHUNK_BYTES = 62_000
"""Of a body, in one message: Envoy takes 64 KiB; as llm-d cuts them."""

NONE, STREAMED, BUFFERED, BUFFERED_PARTIAL, FULL_DUPLEX = range(5)
"""How Envoy sends bodies (ProcessingMode.BodySendMode)."""

Buffer = bytes | memoryview


class Malformed(ValueError):
    """Not a ProcessingRequest."""


class Head(NamedTuple):
    """Request or response headers, and what comes with them."""

    headers: dict[str, str]
    """Names lower-cased; Envoy's pseudo headers (``:path``, ``:status``) among them."""
    end: bool
    """There is no body."""
    subset: frozenset[str] | None
    """Addresses that may be chosen; None: all."""
    served: str
    """Address that answered, in the response phase; "" where the gateway does not say."""
    request_mode: int | None
    """How the bodies come; None from an Envoy that does not say (it tells with the first headers only)."""
    response_mode: int | None


class Body(NamedTuple):
    """A piece of a body."""

    raw: Buffer
    """The ``HttpBody`` as it came."""
    data: bytes
    end: bool


class Trailers(NamedTuple):
    """The last of a request or response."""

    fields: Mapping[str, str] = {}
    """Of a response."""


class Message(NamedTuple):
    """What has come: one of them, of the request or of the response."""

    of_request: bool
    head: Head | None = None
    body: Body | None = None
    trailers: Trailers | None = None


_REQUEST_BODY, _RESPONSE_BODY = 0x22, 0x2A
"""First bytes of a message that begins with field 4 or 5."""


def read(data: bytes) -> Message:
    """The message; raises ``Malformed`` and nothing else."""
    first = data[0] if data else 0
    if first in (_REQUEST_BODY, _RESPONSE_BODY):
        body = _body(data)
        if body is not None:
            return Message(first == _REQUEST_BODY, body=body)
    try:
        message = pb.ProcessingRequest.FromString(data)
    except DecodeError as exc:
        raise Malformed(str(exc)) from exc
    kind = message.WhichOneof("request")
    match kind:
        case "request_headers" | "response_headers":
            return Message(kind == "request_headers", head=_head(message, getattr(message, kind)))
        case "request_body" | "response_body":
            http = getattr(message, kind)
            body = Body(http.SerializeToString(), http.body, http.end_of_stream)
            return Message(kind == "request_body", body=body)
        case "request_trailers":
            return Message(True, trailers=Trailers())
        case "response_trailers":
            fields = _headers(message.response_trailers.trailers.headers)
            return Message(False, trailers=Trailers(fields))
    raise Malformed("it holds neither headers, body nor trailers")


def _body(data: bytes) -> Body | None:
    """The body at the beginning of ``data``; None where only the protobuf classes can tell."""
    length, start = _varint(data, 1)
    end = start + length
    if length < 0 or end > len(data):
        return None
    at, piece, last = start, b"", False
    while at < end:
        tag = data[at]
        number, at = _varint(data, at + 1)
        if number < 0:
            return None
        if tag == 0x0A:  # body
            piece = data[at : at + number]
            at += number
        elif tag == 0x10:  # end_of_stream
            last = number != 0
        else:
            return None
    return Body(memoryview(data)[start:end], piece, last) if at == end else None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at ``at`` and where it ends; -1 where there is none."""
    value = shift = 0
    for byte in data[at : at + 5]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    return -1, at


def _head(message: pb.ProcessingRequest, http: pb.HttpHeaders) -> Head:
    headers = _headers(http.headers.headers)
    request_mode = response_mode = None
    if message.HasField("protocol_config"):
        request_mode = message.protocol_config.request_body_mode
        response_mode = message.protocol_config.response_body_mode
    subset, served = _metadata(message) if message.HasField("metadata_context") else (None, "")
    return Head(headers, http.end_of_stream, subset, served, request_mode, response_mode)


def _headers(fields: Iterable[HeaderValue]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for field in fields:
        name = field.key.lower()
        value = field.raw_value.decode("latin-1") or field.value
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _metadata(message: pb.ProcessingRequest) -> tuple[frozenset[str] | None, str]:
    """The subset and the endpoint that served, where filters before us say so."""
    spaces = message.metadata_context.filter_metadata
    subset, served = None, ""
    if "envoy.lb.subset_hint" in spaces:
        hint = spaces["envoy.lb.subset_hint"].fields.get(SUBSET)
        if hint is not None and hint.HasField("list_value"):
            values = hint.list_value.values
            subset = frozenset(value.string_value for value in values if value.HasField("string_value"))
    if "envoy.lb" in spaces:
        value = spaces["envoy.lb"].fields.get(SERVED)
        served = value.string_value if value is not None else ""
    return subset, served


# -- what we say


def _field(tag: int, *parts: bytes) -> bytes:
    """A length-delimited field."""
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    return _prefix(tag, len(data)) + data


@lru_cache(maxsize=4096)
def _prefix(tag: int, length: int) -> bytes:
    prefix = bytearray((tag,))
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix)


def _set(name: str, value: str) -> bytes:
    """A header to set, whatever it was before: HeaderMutation.set_headers, OVERWRITE_IF_EXISTS_OR_ADD."""
    header = _field(0x0A, _field(0x0A, name.encode("latin-1")), _field(0x1A, value.encode("latin-1")))
    return _field(0x0A, header, b"\x18\x02")


@lru_cache(maxsize=4096)
def _set_destination(addresses: str) -> bytes:
    return _set(DESTINATION, addresses)


@lru_cache(maxsize=4096)
def _remove(names: tuple[str, ...]) -> bytes:
    """HeaderMutation.remove_headers."""
    return b"".join(_field(0x12, name.encode("latin-1")) for name in names)


def _text(key: str, value: str) -> bytes:
    """An entry of a Struct whose value is a string."""
    return _field(0x0A, _field(0x0A, key.encode()), _field(0x12, _field(0x1A, value.encode())))


@lru_cache(maxsize=4096)
def _destination_entry(addresses: str) -> bytes:
    return _text(DESTINATION, addresses)


def _scores_entry(scores: Mapping[str, float]) -> bytes:
    """An entry of a Struct whose value is a Struct of numbers."""
    numbers = [
        _field(0x0A, _field(0x0A, name.encode()), _field(0x12, b"\x11" + _double(score)))
        for name, score in scores.items()
    ]
    key = _field(0x0A, DESTINATION.encode() + b"-scores")
    return _field(0x0A, key, _field(0x12, _field(0x2A, *numbers)))


_double = struct.Struct("<d").pack
_END = b"\x10\x01"
"""``end_of_stream`` of an ``HttpBody``, after its body."""


class Chosen(NamedTuple):
    """Where a request goes, and what of its headers changes."""

    addresses: str
    """``ip:port``, with fallbacks behind commas."""
    set_headers: Sequence[tuple[str, str]] = ()
    remove: tuple[str, ...] = ()
    flight: str = ""
    """Our own name for the request, for Envoy's access log."""
    scores: Mapping[str, float] | None = None

    def _mutation(self) -> bytes:
        more = [_set(name, value) for name, value in self.set_headers]
        return _field(0x12, _set_destination(self.addresses), *more, _remove(self.remove))

    def _metadata(self) -> bytes:
        """ProcessingResponse.dynamic_metadata: the namespace envoy.lb."""
        entries = [_destination_entry(self.addresses)]
        if self.flight:
            entries.append(_text(FLIGHT, self.flight))
        if self.scores is not None:
            entries.append(_scores_entry(self.scores))
        space = _field(0x12, _field(0x2A, *entries))
        return _field(0x42, _field(0x0A, _field(0x0A, b"envoy.lb"), space))

    def with_headers(self) -> bytes:
        """The answer to request headers: CommonResponse{header_mutation, clear_route_cache}."""
        return _field(0x0A, _field(0x0A, self._mutation(), b"\x28\x01")) + self._metadata()

    def with_body(self, body: bytes | None) -> bytes:
        """The answer to a buffered request body, replaced by ``body`` unless that is None."""
        mutation = () if body is None else (_field(0x1A, _field(0x0A, body)),)
        return _field(0x1A, _field(0x0A, self._mutation(), *mutation, b"\x28\x01")) + self._metadata()


REQUEST_HEADERS_SEEN = _field(0x0A, b"")
REQUEST_BODY_SEEN = _field(0x1A, b"")
REQUEST_TRAILERS_SEEN = _field(0x2A, b"")
RESPONSE_BODY_SEEN = _field(0x22, b"")
RESPONSE_TRAILERS_SEEN = _field(0x32, b"")
"""Answers that change nothing."""


def response_headers(set_headers: Iterable[tuple[str, str]], remove: tuple[str, ...] = ()) -> bytes:
    """The answer to response headers."""
    mutation = [_set(name, value) for name, value in set_headers]
    return _field(0x12, _field(0x0A, _field(0x12, *mutation, _remove(remove))))


def response_body(body: bytes) -> bytes:
    """The answer to a response body that is sent buffered, or piece by piece: ``body`` takes its place."""
    return _field(0x22, _field(0x0A, _field(0x1A, _field(0x0A, body) if body else b"\x10\x01")))


def streamed(of_request: bool, body: Body) -> Iterable[bytes]:
    """A piece of a body on its way on, in FULL_DUPLEX_STREAMED."""
    if len(body.data) <= MAX_CHUNK_BYTES:
        return (_piece(of_request, body.raw),)
    return chunks(of_request, body.data, body.end)


def without_end(body: Body) -> Body:
    """The same piece, with more to come."""
    raw = body.raw[:-2] if bytes(body.raw[-2:]) == _END and body.data else _field(0x0A, body.data)
    return Body(raw, body.data, False)


def chunks(of_request: bool, body: bytes, end: bool) -> Iterable[bytes]:
    """A body in pieces that Envoy takes; the last one says ``end``. One empty piece for an empty body."""
    last = max(0, (len(body) - 1) // MAX_CHUNK_BYTES)
    for i in range(last + 1):
        piece = body[i * MAX_CHUNK_BYTES : (i + 1) * MAX_CHUNK_BYTES]
        yield _piece(of_request, _field(0x0A, piece) + (_END if end and i == last else b""))


def _piece(of_request: bool, raw: Buffer) -> bytes:
    """BodyResponse{CommonResponse{BodyMutation{streamed_response}}}."""
    return _piece_prefix(of_request, len(raw)) + raw


@lru_cache(maxsize=4096)
def _piece_prefix(of_request: bool, length: int) -> bytes:
    prefix = b""
    for tag in (0x1A, 0x1A, 0x0A, 0x1A if of_request else 0x22):
        prefix = _prefix(tag, length + len(prefix)) + prefix
    return prefix


REQUEST_BODY_END = _piece(True, _END)
"""An empty last piece."""


def immediate(
    status: int, body: str, set_headers: Iterable[tuple[str, str]] = (), grpc_code: int | None = None
) -> bytes:
    """The client gets this answer, and the request ends here; ``grpc_code``: a client of gRPC."""
    message = pb.ProcessingResponse()
    answer = message.immediate_response
    answer.status.code = status
    answer.body = body.encode()
    if grpc_code is not None:
        answer.grpc_status.status = grpc_code
    for name, value in set_headers:
        header = answer.headers.set_headers.add().header
        header.key, header.raw_value = name, value.encode("latin-1")
    encoded: bytes = message.SerializeToString()
    return encoded
