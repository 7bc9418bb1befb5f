"""Envoy's ext_proc messages, in and out (envoy/service/ext_proc/v3/external_processor.proto).

Headers come in through the protobuf classes. Bodies do not where they are all of their message: what stands
before the bytes is known from the message's length. What we say ourselves is written field by field; what
stands before a text or body is cached by its length.
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

REQUEST_HEADERS, RESPONSE_HEADERS, REQUEST_BODY, RESPONSE_BODY, REQUEST_TRAILERS, RESPONSE_TRAILERS = range(
    2, 8
)
"""What a message holds, by the number of its field."""


class Malformed(ValueError):
    """Not a ProcessingRequest."""


class Head(NamedTuple):
    """Request or response headers, and what comes with them; or a response's trailers."""

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

    data: bytes
    end: bool


def read(data: bytes) -> tuple[int, Head | Body | None]:
    """What the message holds, and that, unless it is a request's trailers; raises ``Malformed`` and nothing
    else.
    """
    first = data[0] if data else 0
    if first in (_REQUEST_BODY, _RESPONSE_BODY):
        last = len(data) - len(_NO_METADATA) if data.endswith(_NO_METADATA) else len(data)
        end = data.startswith(_END, last - len(_END))
        prefix = _body_prefix(first, last, end)
        if data.startswith(prefix):
            return first >> 3, Body(data[len(prefix) : last - len(_END) if end else last], end)
    try:
        message = pb.ProcessingRequest.FromString(data)
    except DecodeError as exc:
        raise Malformed(str(exc)) from exc
    kind = message.WhichOneof("request")
    match kind:
        case "request_headers":
            return REQUEST_HEADERS, _head(message, message.request_headers)
        case "response_headers":
            return RESPONSE_HEADERS, _head(message, message.response_headers)
        case "request_body" | "response_body":
            http = getattr(message, kind)
            body = Body(http.body, http.end_of_stream)
            return REQUEST_BODY if kind == "request_body" else RESPONSE_BODY, body
        case "request_trailers":
            return REQUEST_TRAILERS, None
        case "response_trailers":
            fields = message.response_trailers.trailers.headers
            return RESPONSE_TRAILERS, Head(_headers(fields), True, None, "", None, None)
    raise Malformed("it holds neither headers, body nor trailers")


_REQUEST_BODY, _RESPONSE_BODY = REQUEST_BODY << 3 | 2, RESPONSE_BODY << 3 | 2
"""First bytes of a message that begins with a body."""
_END = b"\x10\x01"
"""``end_of_stream`` of an ``HttpBody``, after its body."""
_NO_METADATA = b"\x42\x00"
"""Envoy ends its messages with a ``metadata_context`` even if there is none."""


@lru_cache(maxsize=4096)
def _body_prefix(tag: int, size: int, end: bool) -> bytes:
    """What stands before the body in a message of ``size`` bytes that holds nothing else."""
    message = _within(size)
    left = message - len(_END) if end else message
    if left == 0:
        return _prefix(tag, message)
    body = _within(left)
    return _prefix(tag, message) + _prefix(0x0A, body) if body > 0 else b"not a body"


def _within(size: int) -> int:
    """The length of what a field of ``size`` bytes holds; below 0 where no field is that long."""
    lengths = (size - 1 - digits for digits in range(1, 6))
    return next((n for n in lengths if n >= 0 and len(_prefix(0, n)) + n == size), -1)


def _head(message: pb.ProcessingRequest, http: pb.HttpHeaders) -> Head:
    headers = _headers(http.headers.headers)
    request_mode = response_mode = None
    if message.HasField("protocol_config"):
        modes = message.protocol_config
        request_mode, response_mode = modes.request_body_mode, modes.response_body_mode
    subset, served = _metadata(message) if message.HasField("metadata_context") else (None, "")
    return Head(headers, http.end_of_stream, subset, served, request_mode, response_mode)


def _headers(fields: Sequence[HeaderValue]) -> dict[str, str]:
    headers = {field.key.lower(): field.raw_value.decode("latin-1") or field.value for field in fields}
    return headers if len(headers) == len(fields) else _joined(fields)


def _joined(fields: Iterable[HeaderValue]) -> dict[str, str]:
    """Headers of which some come more than once."""
    headers: dict[str, str] = {}
    for field in fields:
        name, value = field.key.lower(), field.raw_value.decode("latin-1") or field.value
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


def _prefix(tag: int, length: int) -> bytes:
    if length < 0x80:
        return bytes((tag, length))
    if length < 0x4000:
        return bytes((tag, length & 0x7F | 0x80, length >> 7))
    prefix = bytearray((tag,))
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix)


def _set(name: str, value: str) -> bytes:
    """A header to set, whatever it was before: HeaderMutation.set_headers, OVERWRITE_IF_EXISTS_OR_ADD."""
    data = value.encode("latin-1")
    return _set_prefix(name, len(data)) + data + b"\x18\x02"


@lru_cache(maxsize=4096)
def _set_prefix(name: str, length: int) -> bytes:
    header = _field(0x0A, name.encode("latin-1")) + _prefix(0x1A, length)
    header = _prefix(0x0A, len(header) + length) + header
    return _prefix(0x0A, len(header) + length + 2) + header


@lru_cache(maxsize=4096)
def _set_destination(addresses: str, remove: tuple[str, ...]) -> bytes:
    """The header, and HeaderMutation.remove_headers."""
    removed = b"".join([_field(0x12, name.encode("latin-1")) for name in remove])
    return _set(DESTINATION, addresses) + removed


def _text(key: str, value: str) -> bytes:
    """An entry of a Struct whose value is a string."""
    return _field(0x0A, _field(0x0A, key.encode()), _field(0x12, _field(0x1A, value.encode())))


def _scores_entry(scores: Mapping[str, float]) -> bytes:
    """An entry of a Struct whose value is a Struct of numbers."""
    numbers = [
        _field(0x0A, _field(0x0A, name.encode()), _field(0x12, b"\x11" + _double(score)))
        for name, score in scores.items()
    ]
    key = _field(0x0A, DESTINATION.encode() + b"-scores")
    return _field(0x0A, key, _field(0x12, _field(0x2A, *numbers)))


def _space(*entries: bytes) -> bytes:
    """ProcessingResponse.dynamic_metadata: the namespace envoy.lb."""
    space = _field(0x12, _field(0x2A, *entries))
    return _field(0x42, _field(0x0A, _field(0x0A, b"envoy.lb"), space))


@lru_cache(maxsize=4096)
def _space_prefix(addresses: str, length: int) -> bytes:
    """The namespace with the destination and a name of that length, which follows."""
    return _space(_text(DESTINATION, addresses), _text(FLIGHT, "?" * length))[:-length]


_double = struct.Struct("<d").pack


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
        sets = _set_destination(self.addresses, self.remove)
        for name, value in self.set_headers:
            sets += _set(name, value)
        return sets

    def _metadata(self) -> bytes:
        flight = self.flight
        if self.scores is None and flight:
            return _space_prefix(self.addresses, len(flight)) + flight.encode()
        entries = [_text(DESTINATION, self.addresses)]
        if flight:
            entries.append(_text(FLIGHT, flight))
        if self.scores is not None:
            entries.append(_scores_entry(self.scores))
        return _space(*entries)

    def with_headers(self) -> bytes:
        """The answer to request headers: CommonResponse{header_mutation, clear_route_cache}."""
        mutation = self._mutation()
        return _headers_prefix(len(mutation)) + mutation + b"\x28\x01" + self._metadata()

    def with_body(self, body: bytes | None) -> bytes:
        """The answer to a buffered request body, replaced by ``body`` unless that is None."""
        mutation = _field(0x12, self._mutation())
        replaced = b"" if body is None else _field(0x1A, _field(0x0A, body))
        return _field(0x1A, _field(0x0A, mutation, replaced, b"\x28\x01")) + self._metadata()


@lru_cache(maxsize=4096)
def _headers_prefix(length: int) -> bytes:
    prefix = _prefix(0x12, length)
    prefix = _prefix(0x0A, len(prefix) + length + 2) + prefix
    return _prefix(0x0A, len(prefix) + length + 2) + prefix


REQUEST_HEADERS_SEEN = _field(0x0A, b"")
REQUEST_BODY_SEEN = _field(0x1A, b"")
REQUEST_TRAILERS_SEEN = _field(0x2A, b"")
RESPONSE_BODY_SEEN = _field(0x22, b"")
RESPONSE_TRAILERS_SEEN = _field(0x32, b"")
"""Answers that change nothing."""


@lru_cache(maxsize=256)
def response_headers(set_headers: tuple[tuple[str, str], ...], remove: tuple[str, ...] = ()) -> bytes:
    """The answer to response headers."""
    mutation = [_set(name, value) for name, value in set_headers]
    removed = [_field(0x12, name.encode("latin-1")) for name in remove]
    return _field(0x12, _field(0x0A, _field(0x12, *mutation, *removed)))


def response_body(body: bytes) -> bytes:
    """The answer to a response body that is sent buffered, or piece by piece: ``body`` takes its place."""
    return _field(0x22, _field(0x0A, _field(0x1A, _field(0x0A, body) if body else b"\x10\x01")))


def chunks(of_request: bool, body: bytes, end: bool) -> Sequence[bytes]:
    """A body in pieces that Envoy takes; the last one says ``end``. One empty piece for an empty body."""
    if len(body) <= MAX_CHUNK_BYTES:
        return [_chunk(of_request, body, end)]
    starts = range(0, len(body), MAX_CHUNK_BYTES)
    return [_chunk(of_request, body[at : at + MAX_CHUNK_BYTES], end and at == starts[-1]) for at in starts]


def _chunk(of_request: bool, data: bytes, end: bool) -> bytes:
    prefix = _chunk_prefix(of_request, len(data), end)
    return b"".join((prefix, data, _END)) if end else prefix + data


@lru_cache(maxsize=4096)
def _chunk_prefix(of_request: bool, length: int, end: bool) -> bytes:
    """Up to the bytes of BodyResponse{CommonResponse{BodyMutation{streamed_response}}}."""
    prefix = _prefix(0x0A, length)
    length += len(_END) if end else 0
    for tag in (0x1A, 0x1A, 0x0A, 0x1A if of_request else 0x22):
        prefix = _prefix(tag, length + len(prefix)) + prefix
    return prefix


REQUEST_BODY_END = _chunk(True, b"", True)
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
