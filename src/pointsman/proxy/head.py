"""Request heads: parsed and checked once, then forwarded line by line without what is not the endpoint's
business.
"""

from __future__ import annotations

import httptools

from pointsman.api import Format, makes_state
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

MODEL_REWRITE = ("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite")
MAX_LENGTH_DIGITS = 15
MAX_ID_BYTES = 128


class RequestHead:
    """A request's head; what repeats of it is parsed once for a connection, so nothing here is the
    request's own.

    ``lines`` are the header lines to forward.
    """

    __slots__ = (
        "chunked",
        "expects_continue",
        "format",
        "forwarded",
        "headers",
        "http10",
        "keep_alive",
        "lines",
        "makes_state",
        "method",
        "path",
        "request_id",
        "rewrites",
        "upgrade",
        "url",
    )

    method: bytes
    url: bytes
    """Path and query as they came."""
    path: str
    headers: dict[str, str]
    """Lower-cased names; decoded at once, since heads repeat and plugins look at them for every request."""
    lines: list[bytes]
    chunked: bool
    expects_continue: bool
    keep_alive: bool
    http10: bool
    upgrade: bytes
    request_id: str
    """The client's own, if it is a sane one."""
    format: Format | None
    """How the body is read; set when the path has been found to be served."""
    makes_state: bool
    """What it makes is named by later calls, as far as the path tells."""
    rewrites: bool
    """It asks for another model name."""
    forwarded: dict[str, bytes]
    """The head for each endpoint, as far as it repeats."""


class HeadParser:
    """llhttp over complete heads. One for each client connection.

    Most clients repeat their head to the letter, but for the length of the body. Then the parse before serves
    again: the bytes around the digits are the same, and digits are digits.
    """

    __slots__ = ("_after", "_before", "_last", "_names", "_url", "_values")

    def __init__(self) -> None:
        self._names: list[bytes] = []
        self._values: list[bytes] = []
        self._url = b""
        self._last: RequestHead | None = None
        self._before = b""
        self._after = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._names.append(name.lower())
        self._values.append(value)

    def again(self, data: bytes) -> tuple[RequestHead, int, int] | None:
        """When ``data`` begins with the head before: that, its length in bytes, and the body's."""
        before = self._before
        if self._last is None or not data.startswith(before):
            return None
        at = len(before)
        end = data.find(b"\r", at, at + MAX_LENGTH_DIGITS + 1)
        if end < 0 or not data.startswith(self._after, end):
            return None
        digits = data[at:end]
        if not digits.isdigit():
            return None
        return self._last, end + len(self._after), int(digits)

    def parse(self, head: bytes) -> tuple[RequestHead, int]:
        """The head and the length of the body in bytes; ``head`` ends in the empty line.

        ``BadRequest`` when it is not HTTP/1.x or means different things to different servers.
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
        del lines[0], lines[-2:]
        encoding = raw.get(b"transfer-encoding")
        if encoding is not None and (
            encoding.strip().lower() != b"chunked"
            or names.count(b"transfer-encoding") > 1
            or version == "1.0"
        ):
            raise BadRequest("Malformed HTTP request: only the transfer encoding `chunked` is understood.")
        length = raw.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > MAX_LENGTH_DIGITS or names.count(b"content-length") > 1:
            raise BadRequest("Malformed HTTP request: Content-Length is not one plain number.")
        result = RequestHead()
        result.method = parser.get_method()
        result.url = _origin_form(self._url)
        result.path = result.url.partition(b"?")[0].decode("latin-1")
        result.headers = {n.decode("latin-1"): v.decode("latin-1") for n, v in raw.items()}
        result.http10 = version == "1.0"
        result.keep_alive = parser.should_keep_alive()
        result.chunked = encoding is not None
        result.expects_continue = raw.get(b"expect", b"").lower() == b"100-continue"
        connection = raw.get(b"connection", b"").lower()
        result.upgrade = raw.get(b"upgrade", b"") if b"upgrade" in connection else b""
        dropped = _DROPPED
        if connection and connection != b"keep-alive":
            dropped = dropped.union(token.strip() for token in connection.split(b","))
        result.lines = [line for name, line in zip(names, lines, strict=True) if name not in dropped]
        result.request_id = _sane_id(raw.get(b"x-request-id", b""))
        result.rewrites = any(name.encode() in raw for name in MODEL_REWRITE)
        result.format = None
        result.makes_state = result.method == b"POST" and makes_state(result.path)
        result.forwarded = {}
        self._remember(head, length, result)
        return result, int(length)

    def _remember(self, head: bytes, length: bytes, result: RequestHead) -> None:
        at = head.lower().find(b"\r\ncontent-length:")
        self._last = None
        if at >= 0 and not result.request_id and not result.expects_continue:
            at = head.find(length, at + 17)
            self._before, self._after = head[:at], head[at + len(length) :]
            self._last = result


def _sane_id(given: bytes) -> str:
    sane = 0 < len(given) <= MAX_ID_BYTES and given.isascii() and given.decode().isprintable()
    return given.decode() if sane else ""


def _origin_form(url: bytes) -> bytes:
    """``/path?query``, also when the client sent an absolute URL as to a proxy."""
    if url.startswith(b"/") or url == b"*":
        return url
    _, marker, rest = url.partition(b"://")
    if not marker:
        raise BadRequest("Malformed HTTP request: the request target must be a path.")
    slash = rest.find(b"/")
    return rest[slash:] if slash >= 0 else b"/"
