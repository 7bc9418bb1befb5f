"""Streams whose client did not ask for usage: the endpoint is asked for it, and its answer to that taken out.

OpenAI's streams tell their token counts, cached ones among them, in one more event at their end, with no
choices, and only to those who set ``stream_options.include_usage``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from pointsman.proxy.framing import ChunkFraming
from pointsman.types import InferenceRequest

ASKING = b',"stream_options":{"include_usage":true}}'
_OPTIONS = b'"stream_options"'
"""In a JSON text these bytes are a key or a whole value, never part of a prompt: there quotes are escaped."""
_END = re.compile(rb"\n\r?\n|\r\r")
"""Of an event: an empty line."""
_ENDS = (b"\n\n", b"\n\r\n", b"\r\r")
MAX_EVENT_BYTES = 64 * 1024
"""What is longer is no usage, and need not be held until its end."""
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')

Write = Callable[[bytes], None]


def asking(request: InferenceRequest) -> InferenceRequest:
    """The request as it asks for usage; the same one where it says anything of that itself, or is no stream
    of completions.
    """
    body = request.body
    if not (request.stream and request.format == "openai" and request.path.endswith("/completions")):
        return request
    end = body.rfind(b"}")
    if _OPTIONS in body or end < 0:
        return request
    return replace(request, body=body[:end] + ASKING)


class _Event(msgspec.Struct, gc=False):
    choices: list[Raw] | None = None
    usage: dict[str, Raw] | None = None


_decode = msgspec.json.Decoder(_Event).decode


def tells_usage(event: bytes) -> bool:
    """Whether this is an event that has usage and nothing else; it ends with an empty line."""
    if not event.startswith(b"data:") or _NO_CHOICES.search(event) is None:
        return False
    try:
        found = _decode(event[5:])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return found.choices == [] and found.usage is not None


class UsageFilter:
    """Writes a stream on without the events that tell usage, however its bytes are split.

    Reads that are whole chunks of whole events, and that is nearly all of them, go on as they are. Of others
    the payload is written in chunks of our own, an event as soon as it is complete.
    """

    __slots__ = ("_between", "_framing", "_held", "_write")

    def __init__(self, write: Write, *, chunked: bool) -> None:
        """``chunked``: so is the stream, and what is written; else it ends with its connection."""
        self._write = write
        self._framing = ChunkFraming(pieces=[]) if chunked else None
        self._between = True
        """What came so far ended behind a chunk."""
        self._held = b""
        """The beginning of an event whose end is still to come."""

    def write(self, data: bytes) -> None:
        framing = self._framing
        if framing is None:
            payload, ended, whole = data, False, True
        else:
            before = self._between
            ended = framing.feed(data) >= 0
            self._between = ended or framing.between_chunks
            pieces = framing.pieces
            assert pieces is not None
            payload = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            whole = before and self._between
        if whole and not self._held and _passes(payload):
            self._write(data)
            return
        kept = self._without(payload)
        if ended:
            kept, self._held = kept + self._held, b""
        self._send(kept, b"0\r\n\r\n" if ended else b"")

    def flush(self) -> None:
        """The stream has ended well: so has the event that was begun."""
        held, self._held = self._held, b""
        self._send(held, b"")

    def _without(self, payload: bytes) -> bytes:
        """The complete events that go on; what is not complete is held."""
        text = self._held + payload
        kept, at = [], 0
        for end in _END.finditer(text, max(0, len(self._held) - 2)):  # it may have been cut in two
            event = text[at : end.end()]
            at = end.end()
            if not tells_usage(event):
                kept.append(event)
        self._held = text[at:]
        if len(self._held) > MAX_EVENT_BYTES:
            kept.append(self._held)
            self._held = b""
        return b"".join(kept)

    def _send(self, payload: bytes, last: bytes) -> None:
        if payload and self._framing is not None:
            payload = b"%x\r\n%b\r\n" % (len(payload), payload)
        if payload or last:
            self._write(payload + last)


def _passes(payload: bytes) -> bool:
    """Whole events, none of which tells usage."""
    return (not payload or payload.endswith(_ENDS)) and _NO_CHOICES.search(payload) is None
