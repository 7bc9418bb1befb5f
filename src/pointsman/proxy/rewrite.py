"""The heads we write: the request's for the endpoint, the response's for the client."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.proxy.head import RequestHead
from pointsman.proxy.server import ClientConnection
from pointsman.proxy.upstream import Connections, ResponseHead
from pointsman.types import Decision, InferenceRequest

_DROPPED = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"x-request-id"))
_WITH_BODY = (b"POST", b"PUT", b"PATCH")
_IDENTITY = b"accept-encoding: identity"
_DROPPED_FOR_HTTP10 = _DROPPED | {b"transfer-encoding"}


def forwarded_head(
    head: RequestHead,
    request: InferenceRequest,
    client: ClientConnection,
    connections: Connections,
    decision: Decision,
    *,
    uncompressed: bool = False,
) -> bytes:
    """The request head for the endpoint: the client's lines, under our own host, id and length, and what the
    decision adds.
    ``uncompressed``: so the answer shall be, since we are to read it.
    """
    name = connections.target.name + " identity" * uncompressed
    repeats = head.forwarded.get(name)
    if repeats is None:
        lines = head.lines
        if uncompressed:
            lines = [*(line for line in lines if _name(line) != b"accept-encoding"), _IDENTITY]
        repeats = head.forwarded[name] = _repeating(head, lines, client, connections)
    last = request.id
    if decision.request_headers:
        last += "".join(f"\r\n{name}: {value}" for name, value in decision.request_headers)
    request_id = last.encode("latin-1")
    if request.body or head.method in _WITH_BODY:
        return b"%b%b\r\ncontent-length: %d\r\n\r\n" % (repeats, request_id, len(request.body))
    return b"%b%b\r\n\r\n" % (repeats, request_id)


def _repeating(
    head: RequestHead, lines: Sequence[bytes], client: ClientConnection, connections: Connections
) -> bytes:
    """Everything up to the request id: the same for every request with this head."""
    if connections.overrides:
        lines = [line for line in lines if _name(line) not in connections.overrides]
    headers = head.headers
    before = f"{headers['x-forwarded-for']}, ".encode("latin-1") if "x-forwarded-for" in headers else b""
    scheme = headers.get("x-forwarded-proto", client.scheme).encode("latin-1")
    parts = [
        b"%b %b%b HTTP/1.1" % (head.method, connections.prefix, head.url),
        connections.head_lines,
        *lines,
        b"x-forwarded-for: " + before + client.address,
        b"x-forwarded-proto: " + scheme,
    ]
    if head.upgrade:
        parts.append(b"connection: upgrade\r\nupgrade: " + head.upgrade)
    parts.append(b"x-request-id: ")
    return b"\r\n".join(parts)


def relayed_head(
    head: ResponseHead,
    raw: bytes,
    request_id: str,
    decision: Decision,
    *,
    http10: bool,
    closes: bool,
    names_endpoint: bool,
) -> bytes:
    """The response head for the client: the endpoint's (``raw``), without what speaks of its own
    connection.
    """
    if not head.clean or http10:
        raw = b"HTTP/1.1" + _without(raw, _DROPPED_FOR_HTTP10 if http10 else _DROPPED)[8:]
    extra = request_id
    if decision.response_headers:
        extra += "".join(f"\r\n{name}: {value}" for name, value in decision.response_headers)
    if names_endpoint:
        extra += f"\r\nx-pointsman-endpoint: {decision.chosen.name}"
    if head.status == 101:
        extra += "\r\nconnection: upgrade"
    elif closes:
        extra += "\r\nconnection: close"
    return b"%b\r\nx-request-id: %b\r\n\r\n" % (raw, extra.encode("latin-1"))


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
