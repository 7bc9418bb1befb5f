"""Envoy's ext_proc messages: those a proxy sends, built; those a picker answers, read into ``Reply``.

The protobuf classes stay in this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
from envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValue, HeaderValueOption, Metadata
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"

Headers = Sequence[tuple[str, bytes]]


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of the picker."""

    kind: str
    """``request_headers``, ``request_body`` ... or ``immediate_response``; "" when it is none of them."""
    set_headers: tuple[tuple[str, bytes, bool, str], ...] = ()
    """Name, value, whether it is appended to one that is there, and by which action."""
    removed: tuple[str, ...] = ()
    body: bytes | None = None
    """Of a streamed body answer or an immediate one; None where the answer has no body of its own."""
    end: bool = False
    clear_route_cache: bool = False
    status: int = 0
    """HTTP status of an immediate answer."""
    metadata: Mapping[str, Mapping[str, object]] = {}
    """Dynamic metadata by namespace."""

    def header(self, name: str) -> bytes | None:
        """The value it sets, None when it sets none."""
        return next((value for key, value, _, _ in self.set_headers if key.lower() == name), None)


def applied(headers: Headers, reply: Reply) -> dict[str, list[bytes]]:
    """The headers as the proxy forwards them: removals first, then what is set, as Envoy does it."""
    removed = {name.lower() for name in reply.removed}
    found: dict[str, list[bytes]] = {}
    for name, value in headers:
        if name not in removed:
            found.setdefault(name, []).append(value)
    for name, value, append, action in reply.set_headers:
        key = name.lower()
        if append:
            found.setdefault(key, []).append(value)
        elif action == "ADD_IF_ABSENT":
            found.setdefault(key, [value])
        elif action != "OVERWRITE_IF_EXISTS" or key in found:
            found[key] = [value]
    return found


# -- what a proxy sends


class Modes(msgspec.Struct, frozen=True):
    """Body modes, of which Envoy tells in the first message."""

    request: str = "FULL_DUPLEX_STREAMED"
    response: str = "FULL_DUPLEX_STREAMED"


def first(message: bytes, modes: Modes | None, hint: Mapping[str, object] | None) -> bytes:
    """``message`` as the first of a stream: with the modes, and the subset hint of the gateway."""
    request = ext_proc.ProcessingRequest.FromString(message)
    if modes is not None:
        modes_of = ProcessingMode.BodySendMode.Value
        request.protocol_config.request_body_mode = modes_of(modes.request)
        request.protocol_config.response_body_mode = modes_of(modes.response)
    if hint is not None:
        with_metadata(request.metadata_context, hint)
    return _bytes(request)


def with_metadata(metadata: Metadata, namespaces: Mapping[str, object]) -> None:
    for namespace, fields in namespaces.items():
        metadata.filter_metadata[namespace].update(fields)


def headers(side: str, pairs: Headers, end: bool, metadata: Mapping[str, object] | None = None) -> bytes:
    """``side`` is request or response."""
    message = ext_proc.HttpHeaders(headers=_map(pairs), end_of_stream=end)
    request = ext_proc.ProcessingRequest(**{f"{side}_headers": message})
    if metadata is not None:
        with_metadata(request.metadata_context, metadata)
    return _bytes(request)


def body(side: str, data: bytes, end: bool) -> bytes:
    message = ext_proc.HttpBody(body=data, end_of_stream=end)
    return _bytes(ext_proc.ProcessingRequest(**{f"{side}_body": message}))


def trailers(side: str, pairs: Headers) -> bytes:
    message = ext_proc.HttpTrailers(trailers=_map(pairs))
    return _bytes(ext_proc.ProcessingRequest(**{f"{side}_trailers": message}))


def _map(pairs: Headers) -> HeaderMap:
    """As Envoy fills it: values as bytes."""
    return HeaderMap(headers=[HeaderValue(key=name, raw_value=value) for name, value in pairs])


def _bytes(message: ext_proc.ProcessingRequest) -> bytes:
    data: bytes = message.SerializeToString()
    return data


# -- what a picker answers


def read(message: bytes) -> Reply:
    """``ValueError`` when it is no ProcessingResponse."""
    try:
        response = ext_proc.ProcessingResponse.FromString(message)
    except DecodeError as exc:
        raise ValueError(f"not a ProcessingResponse: {exc}") from exc
    metadata = MessageToDict(response.dynamic_metadata)
    kind = response.WhichOneof("response") or ""
    if kind == "immediate_response":
        answer = response.immediate_response
        return Reply(
            kind=kind,
            set_headers=_set(answer.headers.set_headers),
            body=answer.body if isinstance(answer.body, bytes) else answer.body.encode(),
            status=answer.status.code,
            metadata=metadata,
        )
    if kind.endswith("_trailers"):
        mutation = getattr(response, kind).header_mutation
        return Reply(
            kind=kind,
            set_headers=_set(mutation.set_headers),
            removed=tuple(mutation.remove_headers),
            metadata=metadata,
        )
    if not kind:
        return Reply(kind="", metadata=metadata)
    common = getattr(response, kind).response
    data, end = _body(common.body_mutation)
    return Reply(
        kind=kind,
        set_headers=_set(common.header_mutation.set_headers),
        removed=tuple(common.header_mutation.remove_headers),
        body=data,
        end=end,
        clear_route_cache=common.clear_route_cache,
        metadata=metadata,
    )


def _body(mutation: ext_proc.BodyMutation) -> tuple[bytes | None, bool]:
    kind = mutation.WhichOneof("mutation")
    if kind == "streamed_response":
        return mutation.streamed_response.body, mutation.streamed_response.end_of_stream
    if kind == "body":
        return mutation.body, False
    if kind == "clear_body":
        return b"", False
    return None, False


def _set(options: Iterable[HeaderValueOption]) -> tuple[tuple[str, bytes, bool, str], ...]:
    action = HeaderValueOption.HeaderAppendAction.Name
    return tuple(
        (
            option.header.key,
            option.header.raw_value or option.header.value.encode(),
            option.append.value,
            action(option.append_action),
        )
        for option in options
    )
