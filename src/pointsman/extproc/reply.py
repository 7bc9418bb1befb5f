"""A response on its way through the picker: passed on, with the client's model name, and counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import msgspec

from pointsman import api
from pointsman.extproc import messages
from pointsman.extproc.grpc_status import http_status, is_grpc
from pointsman.extproc.headers import SEEN
from pointsman.extproc.messages import FULL_DUPLEX, Body, Head
from pointsman.proxy.exchange import MAX_ID_AT, NO_USAGE, TAIL_BYTES, TAIL_READS
from pointsman.types import Decision, InferenceRequest, Usage

MAX_HELD_BYTES = 1024 * 1024
"""A response that is no stream is passed on whole, as llm-d does, unless it is larger than this."""


class ModelNames:
    """The name the endpoint was asked for, to be turned back into the client's in what it answers."""

    def __init__(self, asked: str, told: str) -> None:
        self._pairs = tuple(
            (b'"model":' + gap + msgspec.json.encode(asked), b'"model":' + gap + msgspec.json.encode(told))
            for gap in (b"", b" ")
        )

    def back(self, data: bytes) -> bytes:
        """With the client's name; ``data`` itself where it names no model."""
        for asked, told in self._pairs:
            data = data.replace(asked, told)
        return data


class Reply:
    """From the response's headers to its end. ``request`` is None for one that had no body."""

    __slots__ = (
        "_counting",
        "_held",
        "_mode",
        "_names",
        "_seen",
        "_tail",
        "body_bytes",
        "chunks",
        "request",
        "status",
        "tells_later",
    )

    def __init__(
        self, request: InferenceRequest | None, head: Head, mode: int, names: ModelNames | None
    ) -> None:
        self.request = request
        status = head.headers.get(":status", "")
        self.status = http_status(int(status) if status.isdecimal() else 0, head.headers)
        """Of a gRPC answer, what its trailers say in HTTP's words."""
        self.tells_later = not head.end and is_grpc(head.headers)
        """How it went is in its trailers."""
        self.body_bytes = 0
        self.chunks = 0
        self._mode = mode
        self._names = names
        self._tail: deque[bytes] = deque(maxlen=TAIL_READS)
        counting = api.find(request.path).counting if request is not None else None
        self._counting = counting() if counting is not None else None
        streams = request is None or request.stream
        streams = streams or "text/event-stream" in head.headers.get("content-type", "")
        self._held: list[bytes] | None = None if streams or mode != FULL_DUPLEX else []
        self._seen: bytes | None = b""
        """The first bytes, until the id of what the answer made has been found in them."""
        if request is None or not api.makes_state(request.path):
            self._seen = None

    def head(self, decision: Decision | None) -> bytes:
        """The answer to the response's headers."""
        more = decision.response_headers if decision else ()
        resized = self._names is not None and self._mode != FULL_DUPLEX
        return messages.response_headers((SEEN, *more), ("content-length",) if resized else ())

    def piece(self, body: Body) -> Iterable[bytes]:
        """The answers to a piece of the response's body."""
        data = body.data
        if data:
            self.body_bytes += len(data)
            self.chunks += 1
            if self._counting is None:
                self._tail.append(data)
            else:
                self._counting.feed(data)
        if self._held is None:
            return self._passed(body)
        self._held.append(data)
        if not body.end and self.body_bytes <= MAX_HELD_BYTES:
            return ()
        held = self._names_back(b"".join(self._held))
        self._held = None
        return messages.chunks(False, held, body.end)

    def _passed(self, body: Body) -> Iterable[bytes]:
        data = self._names_back(body.data)
        if self._mode != FULL_DUPLEX:
            return (messages.RESPONSE_BODY_SEEN if data == body.data else messages.response_body(data),)
        return messages.chunks(False, data, body.end)

    def _names_back(self, data: bytes) -> bytes:
        return data if self._names is None else self._names.back(data)

    def trailers(self, fields: Mapping[str, str]) -> None:
        """These end the response."""
        self.status = http_status(self.status, fields)

    def rest(self) -> Iterable[bytes]:
        """What is still held, when trailers end the response."""
        held, self._held = self._held, None
        return messages.chunks(False, self._names_back(b"".join(held)), False) if held else ()

    def made(self, data: bytes) -> str:
        """The id of what the answer made, which later calls may name; "" when it is not (or no more) found
        in this piece.
        """
        if self._seen is None or self.request is None:
            return ""
        self._seen += data
        found = api.created_id(self.request.path, self._seen)
        if found or len(self._seen) > MAX_ID_AT:
            self._seen = None
        return found or ""

    def usage(self) -> Usage:
        """Token counts as the engine reported them."""
        if self.request is None or self.status != 200:
            return NO_USAGE
        if self._counting is not None:
            return self._counting.usage()
        return api.find(self.request.path).usage(b"".join(self._tail)[-TAIL_BYTES:])
