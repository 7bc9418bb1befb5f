"""Frames of HTTP/2 (RFC 9113, 4 and 6): their numbers, their bytes, and how they can be wrong."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_WINDOW: Final = (1 << 31) - 1
DEFAULT_WINDOW: Final = 65_535
FRAME_BYTES: Final = 16_384
"""The largest frame we take: the protocol's default. Peers may allow us more; we do not use it."""

HEADER: Final = Struct(">HBBBI")
"""Length in 24 bits as two fields, type, flags, stream."""
U32: Final = Struct(">I")
SETTING: Final = Struct(">HI")

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = range(5)
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(5, 10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITISED = 0x1, 0x1, 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_STREAMS, INITIAL_WINDOW, MAX_FRAME, MAX_LIST = range(1, 7)


class Code(IntEnum):
    """Why a stream or connection ended (RFC 9113, 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11


class Failure(Exception):
    """The connection cannot go on."""

    def __init__(self, code: Code, why: str) -> None:
        super().__init__(why)
        self.code = code


class StreamFailure(Exception):
    """One stream cannot go on; the connection can."""

    def __init__(self, stream_id: int, code: Code) -> None:
        super().__init__(code.name)
        self.stream_id = stream_id
        self.code = code


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A frame's bytes."""
    size = len(payload)
    return HEADER.pack(size >> 8, size & 0xFF, kind, flags, stream_id) + payload


def goaway(last_id: int, code: Code, why: bytes = b"") -> bytes:
    return frame(GOAWAY, 0, 0, U32.pack(last_id) + U32.pack(code) + why)


def rst_stream(stream_id: int, code: Code) -> bytes:
    return frame(RST_STREAM, 0, stream_id, U32.pack(code))


def window_update(stream_id: int, more: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream_id, U32.pack(more))


def unpadded(data: bytes, begin: int, end: int) -> tuple[int, int]:
    """Where the content of a padded frame begins and ends."""
    if begin == end:
        raise Failure(Code.FRAME_SIZE_ERROR, "a padded frame without its padding's length")
    inner_end = end - data[begin]
    if inner_end < begin + 1:
        raise Failure(Code.PROTOCOL_ERROR, "more padding than frame")
    return begin + 1, inner_end
