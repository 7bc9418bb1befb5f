"""Request heads: parsed and checked once, then forwarded line by line without what is not the endpoint's
business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import httptools

from pointsman.errors import BadRequest

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade expect host content-length x-request-id x-forwarded-for "
    b"x-forwarded-proto".split()
)
"""Not forwarded as they came: they speak of this connection, or we write them anew."""

STEERING = frozenset(
    b"x-llm-d-inference-fairness-id x-gateway-inference-fairness-id x-llm-d-inference-objective "
    b"x-gateway-inference-objective x-llm-d-model-name-rewrite x-gateway-model-name-rewrite "
    b"x-llm-d-slo-ttft-ms x-slo-ttft-ms x-llm-d-slo-tpot-ms x-slo-tpot-ms x-llm-d-video-fps "
    b"x-llm-d-video-duration-seconds x-llm-d-video-resolution x-gateway-destination-endpoint "
    b"x-gateway-destination-endpoint-subset x-gateway-destination-endpoint-served "
    b"x-llm-d-request-dropped-reason epp-profile x-prefiller-host-port x-encoder-hosts-ports "
    b"x-data-parallel-host-port x-kv-cache-source-host-port".split()
)
"""llm-d's control headers (facts 1 and 9): for us, or for a sidecar that must not take them from a client."""

_DROPPED = HOP_BY_HOP | STEERING


class Headers(Mapping[str, str]):
    """Lower-cased request headers, decoded when somebody asks."""

    __slots__ = ("raw",)

    def __init__(self, raw: dict[bytes, bytes]) -> None:
        self.raw = raw

    def __getitem__(self, name: str) -> str:
        return self.raw[name.encode("latin-1", "replace")].decode("latin-1")

    def __iter__(self) -> Iterator[str]:
        return (name.decode("latin-1") for name in self.raw)

    def __len__(self) -> int:
        return len(self.raw)


class RequestHead:
    """One request's head. ``lines`` are the header lines to forward; the rest is what we need to know."""

    __slots__ = (
        "body_bytes",
        "chunked",
        "expects_continue",
        "headers",
        "http10",
        "keep_alive",
        "lines",
        "method",
        "path",
        "upgrade",
        "url",
    )

    method: bytes
    url: bytes
    """Path and query as they came."""
    path: str
    headers: Headers
    lines: list[bytes]
    body_bytes: int
    chunked: bool
    expects_continue: bool
    keep_alive: bool
    http10: bool
    upgrade: bytes


class HeadParser:
    """llhttp over complete heads. One for each client connection."""

    __slots__ = ("_names", "_url", "_values")

    def __init__(self) -> None:
        self._names: list[bytes] = []
        self._values: list[bytes] = []
        self._url = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._names.append(name.lower())
        self._values.append(value)

    def parse(self, head: bytes) -> RequestHead:
        """``head`` ends in the empty line. ``BadRequest`` when it is not HTTP/1.x or means different things
        to different servers.
        """
        names, values = self._names, self._values
        names.clear()
        values.clear()
        self._url = b""
        parser = httptools.HttpRequestParser(self)
        try:
            parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            pass
        except (httptools.HttpParserError, httptools.HttpParserCallbackError) as exc:
            raise BadRequest(f"Malformed HTTP request: {exc}.") from exc
        lines = head.split(b"\r\n")
        version = parser.get_http_version()
        if len(lines) != len(names) + 3 or not self._url or version not in ("1.1", "1.0"):
            raise BadRequest("Malformed HTTP request: the request head cannot be read.")
        raw = dict(zip(names, values, strict=True))
        dropped = _DROPPED
        connection = raw.get(b"connection")
        if connection is not None and connection.lower() != b"keep-alive":
            dropped = dropped.union(token.strip().lower() for token in connection.split(b","))
        result = RequestHead()
        result.method = parser.get_method()
        result.url = url = _origin_form(self._url)
        result.path = url.partition(b"?")[0].decode("latin-1")
        result.headers = Headers(raw)
        del lines[0], lines[-2:]
        result.lines = [line for name, line in zip(names, lines, strict=True) if name not in dropped]
        result.http10 = version == "1.0"
        result.keep_alive = parser.should_keep_alive()
        encoding = raw.get(b"transfer-encoding")
        result.chunked = encoding is not None
        if encoding is not None and encoding.strip().lower() != b"chunked":
            raise BadRequest("Malformed HTTP request: only the transfer encoding `chunked` is understood.")
        length = raw.get(b"content-length", b"0")
        if (
            not length.isdigit()
            or names.count(b"content-length") > 1
            or (encoding and b"content-length" in raw)
        ):
            raise BadRequest("Malformed HTTP request: Content-Length is not one plain number.")
        result.body_bytes = int(length)
        result.expects_continue = raw.get(b"expect", b"").lower() == b"100-continue"
        wants_upgrade = connection is not None and b"upgrade" in connection.lower()
        result.upgrade = raw.get(b"upgrade", b"") if wants_upgrade else b""
        return result


def _origin_form(url: bytes) -> bytes:
    """``/path?query``, also when the client sent an absolute URL as to a proxy."""
    if url.startswith(b"/") or url == b"*":
        return url
    _, marker, rest = url.partition(b"://")
    if not marker:
        raise BadRequest("Malformed HTTP request: the request target must be a path.")
    slash = rest.find(b"/")
    return rest[slash:] if slash >= 0 else b"/"
