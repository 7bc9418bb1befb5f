"""The heads we write: the request's for the endpoint, the response's for the client."""

from __future__ import annotations

from pointsman.proxy.head import RequestHead
from pointsman.proxy.server import ClientConnection
from pointsman.proxy.upstream import Connections, ResponseHead
from pointsman.types import Decision, InferenceRequest

_DROPPED = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"x-request-id"))
_DROPPED_FOR_HTTP10 = _DROPPED | {b"transfer-encoding"}


def forwarded_head(
    head: RequestHead, request: InferenceRequest, client: ClientConnection, connections: Connections
) -> bytes:
    """The request head for the endpoint: the client's lines, under our own host, id and length."""
    lines = head.lines
    if connections.overrides:
        lines = [line for line in lines if _name(line) not in connections.overrides]
    given = head.headers.raw.get(b"x-forwarded-for")
    proto = head.headers.raw.get(b"x-forwarded-proto", client.scheme)
    parts = [
        b"%b %b%b HTTP/1.1\r\n%b" % (head.method, connections.prefix, head.url, connections.head_lines),
        *lines,
        b"x-request-id: %b\r\nx-forwarded-for: %b\r\nx-forwarded-proto: %b"
        % (
            request.id.encode("latin-1"),
            given + b", " + client.address if given else client.address,
            proto,
        ),
    ]
    if head.upgrade:
        parts.append(b"connection: upgrade\r\nupgrade: " + head.upgrade)
    if request.body or head.method in (b"POST", b"PUT", b"PATCH"):
        parts.append(b"content-length: %d" % len(request.body))
    parts.append(b"\r\n")
    return b"\r\n".join(parts)


def relayed_head(
    head: ResponseHead,
    request_id: str,
    decision: Decision,
    *,
    http10: bool,
    closes: bool,
    names_endpoint: bool,
) -> bytes:
    """The response head for the client: the endpoint's, without what speaks of its own connection."""
    raw, lower = head.raw, head.lower
    if http10:
        raw = _without(raw, _DROPPED_FOR_HTTP10)
    elif b"\r\nconnection:" in lower or b"\r\nx-request-id:" in lower or b"\r\nkeep-alive:" in lower:
        raw = _without(raw, _DROPPED)
    if raw.startswith(b"HTTP/1.0"):
        raw = b"HTTP/1.1" + raw[8:]
    extra = f"\r\nx-request-id: {request_id}"
    for name, value in decision.response_headers:
        extra += f"\r\n{name}: {value}"
    if names_endpoint:
        extra += f"\r\nx-pointsman-endpoint: {decision.chosen.name}"
    if head.status == 101:
        extra += "\r\nconnection: upgrade"
    elif closes:
        extra += "\r\nconnection: close"
    return b"%b%b\r\n\r\n" % (raw, extra.encode("latin-1"))


def early_head(request_id: str) -> bytes:
    """The head of a stream that we begin before the endpoint does."""
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
        b"transfer-encoding: chunked\r\nx-request-id: %b\r\n\r\n" % request_id.encode("latin-1")
    )


def _name(line: bytes) -> bytes:
    return line.partition(b":")[0].strip().lower()


def _without(raw: bytes, names: frozenset[bytes]) -> bytes:
    first, *lines = raw.split(b"\r\n")
    return b"\r\n".join([first, *(line for line in lines if _name(line) not in names)])
