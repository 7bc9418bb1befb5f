"""Where a chunked message ends, found without touching its bytes (RFC 9112, 7.1)."""

from __future__ import annotations

import re

MAX_LINE_BYTES = 4096
MAX_TRAILER_BYTES = 16 * 1024
_STRICT_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}(?:[ \t]*;[^\r\n]*)?\r\n")


class FramingError(ValueError):
    """Not a chunked message."""


class ChunkFraming:
    """Walks the size lines of a chunked message, however its bytes are split.

    ``strict`` is for requests: bare line feeds and anything but hex digits as a size are refused, since a
    server behind us might read them differently. With ``pieces`` the payload is collected there.
    """

    __slots__ = ("_line", "_need", "_strict", "_trailer", "pieces")

    def __init__(self, *, strict: bool = False, pieces: list[bytes] | None = None) -> None:
        self._need = 0
        self._line = b""
        self._trailer = 0
        self._strict = strict
        self.pieces = pieces

    @property
    def between_chunks(self) -> bool:
        """What came so far ends exactly behind a chunk."""
        return not self._need and not self._line and not self._trailer

    def feed(self, data: bytes) -> int:
        """Take the next bytes; the index just behind the message's end, or -1 while it goes on."""
        size = len(data)
        at = self._need
        if at:
            if self.pieces is not None:
                self.pieces.append(data[: max(0, min(size, at - 2))])
            if self._strict:
                self._check_end(data, at)
            if at >= size:
                self._need = at - size
                return -1
            self._need = 0
        while at < size:
            end = data.find(b"\n", at)
            if end < 0:
                self._line += data[at:]
                if len(self._line) > MAX_LINE_BYTES:
                    raise FramingError("a chunk's size line is too long")
                return -1
            line = data[at : end + 1]
            if self._line:
                line = self._line + line
                self._line = b""
            at = end + 1
            if self._trailer:
                if self._strict and not line.endswith(b"\r\n"):
                    raise FramingError("a trailer line ends in a bare line feed")
                if line in (b"\r\n", b"\n"):
                    return at
                self._trailer += len(line)
                if self._trailer > MAX_TRAILER_BYTES:
                    raise FramingError("the trailer section is too large")
                continue
            length = self._size(line)
            if length == 0:
                self._trailer = 1
                continue
            if self.pieces is not None:
                self.pieces.append(data[at : at + length])
            if self._strict:
                self._check_end(data, at + length + 2)
            at += length + 2
            if at > size:
                self._need = at - size
                return -1
        return -1

    def _size(self, line: bytes) -> int:
        if self._strict and not _STRICT_SIZE.fullmatch(line):
            raise FramingError("a chunk's size is not a hexadecimal number")
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError as exc:
            raise FramingError("a chunk's size is not a hexadecimal number") from exc
        if size < 0:
            raise FramingError("a chunk's size is negative")
        return size

    def _check_end(self, data: bytes, end: int) -> None:
        """As far as they have come, the two bytes before ``end`` must be the chunk's CRLF."""
        tail = data[max(0, end - 2) : end]
        start = max(0, end - 2) - (end - 2)
        if not b"\r\n"[start:].startswith(tail):
            raise FramingError("a chunk is longer than its size says")
