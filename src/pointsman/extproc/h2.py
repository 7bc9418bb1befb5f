"""The server's side of HTTP/2 (RFC 9113) on an asyncio protocol: frames, streams and flow control.

No task or queue for a stream: frames are taken from one buffer, what is answered in one turn of the event
loop is written together. Whatever a peer does, what is kept for it stays bounded: by the limits below, by
flow control, and by not reading from a peer that does not read.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Final, Protocol, cast

import msgspec

from pointsman.extproc.hpack import BadBlock, Decoder, ListTooLong
from pointsman.extproc.http_fields import Head, Malformed, check_trailers, read_head

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_WINDOW: Final = (1 << 31) - 1
FRAME_BYTES: Final = 16_384
"""The largest frame we take: the protocol's default. Peers may allow us more; we do not use it."""
DEFAULT_WINDOW: Final = 65_535
STREAM_WINDOW: Final = 4 << 20
"""What a peer may send ahead of our updates; on a connection, ``CONNECTION_WINDOW``.

Data is handled as it arrives and the windows are opened again at half, so a peer finds them closed only
while we are behind; what is kept of it is bounded by those who keep it.
"""
CONNECTION_WINDOW: Final = 64 << 20

_HEADER = struct.Struct(">HBBBI")
"""Length in 24 bits as two fields, type, flags, stream."""
_U32 = struct.Struct(">I")
_SETTING = struct.Struct(">HI")

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITISED = 0x1, 0x1, 0x4, 0x8, 0x20
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _MAX_STREAMS, _INITIAL_WINDOW, _MAX_FRAME, _MAX_LIST = range(1, 7)

_WRITE_BYTES = 256 * 1024
"""Written at once at most; and what may wait for a peer that does not read before we stop reading from it."""
_TURN_BYTES = 64 * 1024
"""What one stream sends before it is the next one's turn."""
_REMEMBERED = 2048
"""Ended streams remembered at least, to tell late frames from wrong ones."""
_LINGER_S = 1.0
"""Read on after a fatal GOAWAY, so that a reset does not overtake it."""
_DRAIN_PING = b"draining"
_ALIVE_PING = b"are-you?"


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


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a connection may take up."""

    streams: int = 16_384
    """Open at once. High: Envoy keeps one for each request under way, and opens another connection beyond."""
    list_bytes: int = 32 * 1024
    """Of the fields of one request."""
    block_bytes: int = 64 * 1024
    """Of one header block before it is decoded."""
    block_frames: int = 32
    """Over which one header block may be spread."""
    resets_per_s: int = 2000
    """Streams that a peer opens and takes back before any answer."""
    idle_frames_per_s: int = 1000
    """That bring nothing: PING, SETTINGS, PRIORITY, empty DATA, frames on ended streams, unknown ones."""
    unsent_bytes: int = 64 << 20
    """Answers of one connection that wait for its windows; beyond, the streams that add more are reset."""
    preface_s: float = 10.0
    """A connection must have said that it speaks HTTP/2 by then."""
    keepalive_s: float = 0.0
    """A peer that is silent this long is sent a PING, and cut when it stays silent as long; 0: never."""


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


class Receiver(Protocol):
    """Who hears of one stream. After ``lost``, and once we have finished and the peer has ended, no more."""

    def data(self, data: bytes, begin: int, end: int) -> None:
        """``data[begin:end]`` has arrived; the rest of the buffer is others'."""

    def ended(self) -> None:
        """The peer sends no more."""

    def lost(self) -> None:
        """The stream was reset, or the connection is gone."""

    def drained(self) -> None:
        """Everything written has left for the transport."""


class Host(Protocol):
    """Who serves the connections."""

    limits: Limits
    connections: set[Connection]
    heads: dict[bytes, Head]
    """Of blocks that do not depend on a connection's state, by their bytes."""

    def request(self, stream: Stream, head: Head) -> Receiver | None:
        """Take a new stream; None when it has been answered already."""

    def refuse(self, stream: Stream, why: str) -> None:
        """Answer a request whose fields are too many."""


class Stream:
    """One request and its answer."""

    __slots__ = (
        "_connection",
        "answered",
        "credit",
        "finished",
        "half_closed",
        "id",
        "length_left",
        "open",
        "pending",
        "pending_bytes",
        "queued",
        "receiver",
        "trailers",
        "window",
    )

    def __init__(self, connection: Connection, stream_id: int, window: int) -> None:
        self._connection = connection
        self.id = stream_id
        self.receiver: Receiver | None = None
        self.window = window
        """Bytes we may send."""
        self.credit = STREAM_WINDOW
        """Bytes the peer may send."""
        self.length_left: int | None = None
        """Of the body that content-length has announced."""
        self.half_closed = False
        """By the peer."""
        self.open = True
        self.answered = False
        self.finished = False
        """By us, perhaps with data still to be sent before the trailers."""
        self.trailers = b""
        self.pending: deque[bytes | memoryview] = deque()
        self.pending_bytes = 0
        self.queued = False
        """Waits for the connection, not for the stream's own window."""

    def headers(self, block: bytes) -> None:
        """Begin the answer."""
        if self.open:
            self.answered = True
            self._connection.send(_frame(HEADERS, END_HEADERS, self.id, block))

    def write(self, prefix: bytes, payload: bytes) -> None:
        """Send ``prefix`` and ``payload``, now or as the peer's windows open."""
        if not self.open or self.finished:
            return
        size = len(prefix) + len(payload)
        connection = self._connection
        if (
            size <= FRAME_BYTES
            and size <= self.window
            and size <= connection.window
            and not self.pending
            and not connection.stopped
        ):
            self.window -= size
            connection.window -= size
            header = _HEADER.pack(size >> 8, size & 0xFF, DATA, 0, self.id)
            connection.put(9 + size, header, prefix, payload)
        else:
            connection.hold(self, prefix + payload)

    def finish(self, trailers: bytes) -> None:
        """End the answer with these trailers, after what is pending."""
        if self.open and not self.finished:
            self.finished = True
            self.trailers = trailers
            if not self.pending:
                self._connection.trail(self)

    def reset(self, code: Code) -> None:
        """Give the stream up; its receiver is not told."""
        if self.open:
            self._connection.reset(self, code)


class Connection(asyncio.Protocol):
    """One connection. Its frames are handled in order, each whole."""

    transport: asyncio.Transport

    def __init__(self, host: Host) -> None:
        self._host = host
        self._limits = limits = host.limits
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(limits.list_bytes)
        self.streams: dict[int, Stream] = {}
        self.window = DEFAULT_WINDOW
        self.stopped = False
        """The transport's buffer is full."""
        self._rest = b""
        self._begun = self._settled = False
        self._block: bytearray | None = None
        self._block_of = (0, 0, 0)
        self._last_id = 0
        self._initial_window = DEFAULT_WINDOW
        self._credit = CONNECTION_WINDOW
        self._ended: dict[int, bool] = {}
        """Streams of late; True while frames that the peer sent before it knew may still come."""
        self._ended_before: dict[int, bool] = {}
        self._waiting: deque[Stream] = deque()
        self._unsent_bytes = 0
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0
        self._reading = self._flushing = False
        self._resets = Rate(limits.resets_per_s, self._loop.time)
        self._idle_frames = Rate(limits.idle_frames_per_s, self._loop.time)
        self._draining = self._refusing = False
        self._peer_leaves = False
        self._failed = False
        self._closed = False
        self._heard = True
        self._asked = False
        self._timer: asyncio.TimerHandle | None = None

    # -- life

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        self._host.connections.add(self)
        limits = self._limits
        ours = (
            (_HEADER_TABLE_SIZE, 0),  # so that equal blocks mean equal fields
            (_MAX_STREAMS, limits.streams),
            (_INITIAL_WINDOW, STREAM_WINDOW),
            (_MAX_LIST, limits.list_bytes),
        )
        self.send(_frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*each) for each in ours)))
        more = CONNECTION_WINDOW - DEFAULT_WINDOW
        self.send(_frame(WINDOW_UPDATE, 0, 0, _U32.pack(more)))
        self._timer = self._loop.call_later(limits.preface_s, self._preface_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._host.connections.discard(self)
        if self._timer:
            self._timer.cancel()
        self._lose_streams()
        self._out.clear()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.stopped = True

    def resume_writing(self) -> None:
        self.stopped = False
        self.flush()
        if not self.stopped and not self.transport.is_reading():
            self.transport.resume_reading()

    def drain(self) -> None:
        """Take no new streams, let those under way end, then close."""
        if self._draining or self._closed:
            return
        self._draining = True
        if not self._begun:
            self.transport.close()
            return
        # a last id that refuses nothing yet; the real one follows when the peer has seen this (RFC 9113, 6.8)
        self.send(_goaway(MAX_WINDOW, Code.NO_ERROR, b""))
        self.send(_frame(PING, 0, 0, _DRAIN_PING))
        self._rearm(_LINGER_S, self._refuse_new)

    def abort(self) -> None:
        """Cut the connection."""
        self.transport.abort()

    def _refuse_new(self) -> None:
        if not self._refusing and not self._closed:
            self._refusing = True
            self.send(_goaway(self._last_id, Code.NO_ERROR, b""))
            self._close_if_done()

    def _close_if_done(self) -> None:
        if (self._refusing or self._peer_leaves) and not self.streams and not self._failed:
            self.flush()
            self.transport.close()

    def _preface_late(self) -> None:
        if not self._begun:
            self.transport.abort()
        elif self._limits.keepalive_s:
            self._keep_alive()

    def _keep_alive(self) -> None:
        if not self._heard:
            if self._asked:
                self.transport.abort()
                return
            self._asked = True
            self.send(_frame(PING, 0, 0, _ALIVE_PING))
        self._heard = False
        self._rearm(self._limits.keepalive_s, self._keep_alive)

    def _rearm(self, delay_s: float, then: Callable[[], None]) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, then)

    def _fail(self, code: Code, why: str) -> None:
        """Say why and close, once the peer can have read it."""
        self._failed = True
        self.send(_goaway(self._last_id, code, why.encode()))
        self._lose_streams()
        self.stopped = False  # what waits is little, and the last
        self.flush()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._rearm(_LINGER_S, self.transport.abort)

    def _lose_streams(self) -> None:
        streams, self.streams = list(self.streams.values()), {}
        self._waiting.clear()
        for stream in streams:
            stream.open = False
            if stream.receiver:
                stream.receiver.lost()

    # -- reading

    def data_received(self, data: bytes) -> None:
        if self._failed:
            return
        self._heard, self._asked = True, False
        self._reading = True
        try:
            self._rest = self._frames(self._rest + data if self._rest else data)
        except Failure as exc:
            self._rest = b""
            self._fail(exc.code, str(exc))
        finally:
            self._reading = False
        self.flush()

    def _frames(self, data: bytes) -> bytes:
        """Handle the whole frames in ``data``; returns what is left."""
        at, end = 0, len(data)
        if not self._begun:
            if data[:24] != PREFACE[:end]:
                raise Failure(Code.PROTOCOL_ERROR, "not HTTP/2")
            if end < len(PREFACE):
                return data
            at, self._begun = len(PREFACE), True
            if self._limits.keepalive_s:
                self._rearm(self._limits.keepalive_s, self._keep_alive)
        unpack = _HEADER.unpack_from
        while end - at >= 9:
            high, low, kind, flags, stream_id = unpack(data, at)
            size = high << 8 | low
            if size > FRAME_BYTES:
                raise Failure(Code.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            begin = at + 9
            at = begin + size
            if at > end:
                return data[begin - 9 :]
            stream_id &= MAX_WINDOW
            if not self._settled:
                if kind != SETTINGS or flags & ACK:
                    raise Failure(Code.PROTOCOL_ERROR, "the first frame is not SETTINGS")
                self._settled = True
            if self._block is not None and (kind != CONTINUATION or stream_id != self._block_of[0]):
                raise Failure(Code.PROTOCOL_ERROR, "a frame inside a header block")
            try:
                if kind == DATA:
                    self._on_data(stream_id, flags, data, begin, at)
                elif kind in _HANDLERS:
                    _HANDLERS[kind](self, stream_id, flags, data[begin:at])
                else:
                    self._bring_nothing()
            except StreamFailure as failure:
                self._fail_stream(failure)
        return data[at:]

    def _fail_stream(self, failure: StreamFailure) -> None:
        stream = self.streams.get(failure.stream_id)
        if stream is None:
            self._bring_nothing()
            self.send(_frame(RST_STREAM, 0, failure.stream_id, _U32.pack(failure.code)))
            if failure.stream_id <= self._last_id and self._known(failure.stream_id) is None:
                self._forget(failure.stream_id, late=True)
            return
        receiver = stream.receiver
        self.reset(stream, failure.code)
        if receiver:
            receiver.lost()

    def _bring_nothing(self) -> None:
        if self._idle_frames.exceeded():
            raise Failure(Code.ENHANCE_YOUR_CALM, "too many frames that bring nothing")

    def _on_data(self, stream_id: int, flags: int, data: bytes, begin: int, end: int) -> None:
        size = end - begin
        self._credit -= size
        if self._credit < CONNECTION_WINDOW >> 1:
            more, self._credit = CONNECTION_WINDOW - self._credit, CONNECTION_WINDOW
            self.send(_frame(WINDOW_UPDATE, 0, 0, _U32.pack(more)))
        if flags & PADDED:
            begin, end = _unpadded(data, begin, end)
        stream = self.streams.get(stream_id)
        if stream is None:
            self._late(stream_id, "DATA")
            return
        if stream.half_closed:
            raise StreamFailure(stream_id, Code.STREAM_CLOSED)
        stream.credit -= size
        if stream.length_left is not None:
            stream.length_left -= end - begin
            if stream.length_left < 0 or (flags & END_STREAM and stream.length_left):
                raise StreamFailure(stream_id, Code.PROTOCOL_ERROR)
        if flags & END_STREAM:
            stream.half_closed = True
        elif begin == end:
            self._bring_nothing()
        if stream.receiver and begin < end:
            stream.receiver.data(data, begin, end)
        if flags & END_STREAM:
            self._half_close(stream)
        elif stream.open and stream.credit < STREAM_WINDOW >> 1:
            more, stream.credit = STREAM_WINDOW - stream.credit, STREAM_WINDOW
            self.send(_frame(WINDOW_UPDATE, 0, stream_id, _U32.pack(more)))

    def _half_close(self, stream: Stream) -> None:
        if stream.open and stream.receiver:
            stream.receiver.ended()

    def _late(self, stream_id: int, what: str) -> None:
        """A frame came on a stream that is not open: wrong, unless it crossed our own end of the stream."""
        if not stream_id:
            raise Failure(Code.PROTOCOL_ERROR, f"{what} on stream 0")
        if stream_id > self._last_id or not stream_id & 1:
            raise Failure(Code.PROTOCOL_ERROR, f"{what} on idle stream {stream_id}")
        if not self._known(stream_id):
            raise StreamFailure(stream_id, Code.STREAM_CLOSED)

    def _on_headers(self, stream_id: int, flags: int, payload: bytes) -> None:
        begin, end = _unpadded(payload, 0, len(payload)) if flags & PADDED else (0, len(payload))
        if not stream_id & 1:
            raise Failure(Code.PROTOCOL_ERROR, f"HEADERS on stream {stream_id}")
        if flags & PRIORITISED:
            if end - begin < 5:
                raise Failure(Code.FRAME_SIZE_ERROR, "HEADERS without its priority")
            if _U32.unpack_from(payload, begin)[0] & MAX_WINDOW == stream_id:
                raise Failure(Code.PROTOCOL_ERROR, "a stream depends on itself")
            begin += 5
        block = payload[begin:end]
        if flags & END_HEADERS:
            self._on_block(stream_id, flags, block)
        else:
            self._block = bytearray(block)
            self._block_of = (stream_id, flags, 1)

    def _on_continuation(self, stream_id: int, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise Failure(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        self._block += payload
        stream_id, first_flags, frames = self._block_of
        frames += 1
        if frames > self._limits.block_frames or len(self._block) > self._limits.block_bytes:
            raise Failure(Code.ENHANCE_YOUR_CALM, "a header block is too long")
        self._block_of = (stream_id, first_flags, frames)
        if flags & END_HEADERS:
            block, self._block = bytes(self._block), None
            self._on_block(stream_id, first_flags, block)

    def _on_block(self, stream_id: int, flags: int, block: bytes) -> None:
        stream = self.streams.get(stream_id)
        if stream is None and stream_id > self._last_id:
            self._open(stream_id, bool(flags & END_STREAM), block)
            return
        try:
            trailers = self._decoder.decode(block)
        except BadBlock as exc:
            raise Failure(Code.COMPRESSION_ERROR, str(exc)) from exc
        except ListTooLong:
            trailers = []
        if stream is None:
            known = self._known(stream_id)
            if known is None:
                raise Failure(Code.PROTOCOL_ERROR, f"stream {stream_id} after {self._last_id}")
            if not known:
                raise Failure(Code.STREAM_CLOSED, f"HEADERS on ended stream {stream_id}")
            return
        if stream.half_closed:
            raise StreamFailure(stream_id, Code.STREAM_CLOSED)
        if not flags & END_STREAM or stream.length_left:
            raise StreamFailure(stream_id, Code.PROTOCOL_ERROR)
        try:
            check_trailers(trailers)
        except Malformed as exc:
            raise StreamFailure(stream_id, Code.PROTOCOL_ERROR) from exc
        stream.half_closed = True
        self._half_close(stream)

    def _open(self, stream_id: int, ended: bool, block: bytes) -> None:
        self._last_id = stream_id
        head = self._host.heads.get(block) if self._decoder.stateless else None
        too_long = ""
        if head is None:
            try:
                head = self._read_head(block)
            except Malformed as exc:
                raise StreamFailure(stream_id, Code.PROTOCOL_ERROR) from exc
            except ListTooLong as exc:
                too_long = str(exc)
        if self._refusing or len(self.streams) >= self._limits.streams:
            raise StreamFailure(stream_id, Code.REFUSED_STREAM)
        stream = Stream(self, stream_id, self._initial_window)
        self.streams[stream_id] = stream
        stream.half_closed = ended
        if head is None:
            self._host.refuse(stream, too_long)
            return
        if head.length is not None:
            stream.length_left = head.length
            if ended and head.length:
                raise StreamFailure(stream_id, Code.PROTOCOL_ERROR)
        stream.receiver = self._host.request(stream, head)
        if ended:
            self._half_close(stream)

    def _read_head(self, block: bytes) -> Head:
        stateless = self._decoder.stateless
        try:
            head = read_head(self._decoder.decode(block))
        except BadBlock as exc:
            raise Failure(Code.COMPRESSION_ERROR, str(exc)) from exc
        if stateless and len(block) <= 1024:
            heads = self._host.heads
            if len(heads) >= 1024:
                heads.clear()
            heads[block] = head
        return head

    def _on_priority(self, stream_id: int, flags: int, payload: bytes) -> None:
        if not stream_id:
            raise Failure(Code.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(payload) != 5:
            raise StreamFailure(stream_id, Code.FRAME_SIZE_ERROR)
        if _U32.unpack_from(payload)[0] & MAX_WINDOW == stream_id:
            raise StreamFailure(stream_id, Code.PROTOCOL_ERROR)
        self._bring_nothing()

    def _on_reset(self, stream_id: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Failure(Code.FRAME_SIZE_ERROR, "RST_STREAM is not 4 bytes")
        stream = self.streams.get(stream_id)
        if stream is None:
            if not stream_id or stream_id > self._last_id or not stream_id & 1:
                raise Failure(Code.PROTOCOL_ERROR, f"RST_STREAM on idle stream {stream_id}")
            if not self._known(stream_id):
                self._bring_nothing()
            self._forget(stream_id, late=False)
            return
        self._end(stream, late=False)
        if stream.receiver:
            stream.receiver.lost()
        if not stream.answered and self._resets.exceeded():
            raise Failure(Code.ENHANCE_YOUR_CALM, "too many streams are opened only to be reset")

    def _on_settings(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id:
            raise Failure(Code.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & ACK:
            if payload:
                raise Failure(Code.FRAME_SIZE_ERROR, "an acknowledgement with settings")
            self._decoder.allowed_table_bytes = 0
            return
        if len(payload) % 6:
            raise Failure(Code.FRAME_SIZE_ERROR, "SETTINGS is not of 6-byte entries")
        initial = self._initial_window
        for name, value in _SETTING.iter_unpack(payload):
            if name == _INITIAL_WINDOW:
                initial = value
                if initial > MAX_WINDOW:
                    raise Failure(Code.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is too large")
            elif name == _ENABLE_PUSH and value > 1:
                raise Failure(Code.PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
            elif name == _MAX_FRAME and not FRAME_BYTES <= value < 1 << 24:
                raise Failure(Code.PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of range")
        self.send(_frame(SETTINGS, ACK, 0, b""))
        self._bring_nothing()
        if initial != self._initial_window:
            self._change_windows(initial)

    def _change_windows(self, initial: int) -> None:
        change, self._initial_window = initial - self._initial_window, initial
        for stream in self.streams.values():
            stream.window += change
            if stream.window > MAX_WINDOW:
                raise Failure(Code.FLOW_CONTROL_ERROR, "a window is too large")
            self._queue(stream)
        if self._idle_frames.exceeded(len(self.streams) // 100):
            raise Failure(Code.ENHANCE_YOUR_CALM, "too many changes of the windows")

    def _on_push_promise(self, stream_id: int, flags: int, payload: bytes) -> None:
        raise Failure(Code.PROTOCOL_ERROR, "a client cannot push")

    def _on_ping(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id:
            raise Failure(Code.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise Failure(Code.FRAME_SIZE_ERROR, "PING is not 8 bytes")
        if not flags & ACK:
            self.send(_frame(PING, ACK, 0, payload))
        elif payload == _DRAIN_PING and self._draining:
            self._refuse_new()
            return
        self._bring_nothing()

    def _on_goaway(self, stream_id: int, flags: int, payload: bytes) -> None:
        if stream_id:
            raise Failure(Code.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            raise Failure(Code.FRAME_SIZE_ERROR, "GOAWAY is too short")
        self._peer_leaves = True
        self._close_if_done()

    def _on_window_update(self, stream_id: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Failure(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE is not 4 bytes")
        more = _U32.unpack(payload)[0] & MAX_WINDOW
        if not stream_id:
            self.window += more
            if not more or self.window > MAX_WINDOW:
                raise Failure(
                    Code.FLOW_CONTROL_ERROR if more else Code.PROTOCOL_ERROR, f"the window grows by {more}"
                )
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            if stream_id > self._last_id or not stream_id & 1:
                raise Failure(Code.PROTOCOL_ERROR, f"WINDOW_UPDATE on idle stream {stream_id}")
            return  # may have been on its way when the stream ended
        stream.window += more
        if not more or stream.window > MAX_WINDOW:
            raise StreamFailure(stream_id, Code.FLOW_CONTROL_ERROR if more else Code.PROTOCOL_ERROR)
        self._queue(stream)

    # -- writing

    def send(self, frame: bytes) -> None:
        """Write a frame with all others of this turn of the event loop."""
        self.put(len(frame), frame)

    def put(self, size: int, *parts: bytes | memoryview) -> None:
        """Write a frame in parts, of ``size`` bytes together."""
        self._out += parts
        self._out_bytes += size
        if self._out_bytes > _WRITE_BYTES:
            self._write()
            if self._out_bytes > _WRITE_BYTES and not self._failed and self.transport.is_reading():
                self.transport.pause_reading()  # a peer that does not read its answers gets no further ones
        else:
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._reading and not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Hand the transport all that it and the windows take now."""
        self._flushing = False
        if self._waiting:
            self._pump()
        self._write()

    def _write(self) -> None:
        if self._out and not self.stopped and not self._closed:
            out, self._out, self._out_bytes = self._out, [], 0
            self.transport.write(b"".join(out))

    def hold(self, stream: Stream, data: bytes) -> None:
        """Send ``data`` as the windows allow."""
        if self._unsent_bytes and self._unsent_bytes + len(data) > self._limits.unsent_bytes:
            receiver = stream.receiver
            self.reset(stream, Code.ENHANCE_YOUR_CALM)
            if receiver:
                self._loop.call_soon(receiver.lost)  # not from within what it does just now
            return
        stream.pending.append(data)
        stream.pending_bytes += len(data)
        self._unsent_bytes += len(data)
        self._queue(stream)
        self._flush_soon()

    def _queue(self, stream: Stream) -> None:
        if stream.pending and stream.window > 0 and not stream.queued:
            stream.queued = True
            self._waiting.append(stream)

    def _pump(self) -> None:
        """Send what waits, each stream in turn."""
        waiting = self._waiting
        while waiting and self.window > 0 and not self.stopped:
            stream = waiting.popleft()
            stream.queued = False
            if not stream.open:
                continue
            self._send_pending(stream)
            self._queue(stream)
            if not stream.pending:
                if stream.finished:
                    self.trail(stream)
                elif stream.receiver:
                    stream.receiver.drained()

    def _send_pending(self, stream: Stream) -> None:
        left = min(_TURN_BYTES, stream.window, self.window)
        pending = stream.pending
        while pending and left > 0:
            piece = pending.popleft()
            size = min(len(piece), left, FRAME_BYTES)
            if size < len(piece):
                view = memoryview(piece)
                pending.appendleft(view[size:])
                piece = view[:size]
            left -= size
            stream.window -= size
            stream.pending_bytes -= size
            self.window -= size
            self._unsent_bytes -= size
            self.put(9 + size, _HEADER.pack(size >> 8, size & 0xFF, DATA, 0, stream.id), piece)

    def trail(self, stream: Stream) -> None:
        """Send a finished stream's trailers."""
        self.send(_frame(HEADERS, END_HEADERS | END_STREAM, stream.id, stream.trailers))
        if not stream.half_closed:  # the peer need not send the rest (RFC 9113, 8.1)
            self.send(_frame(RST_STREAM, 0, stream.id, _U32.pack(Code.NO_ERROR)))
        self._end(stream, late=not stream.half_closed)

    def reset(self, stream: Stream, code: Code) -> None:
        """End a stream with an error."""
        self.send(_frame(RST_STREAM, 0, stream.id, _U32.pack(code)))
        self._end(stream, late=True)

    def _end(self, stream: Stream, *, late: bool) -> None:
        stream.open = False
        self._unsent_bytes -= stream.pending_bytes
        stream.pending.clear()
        stream.pending_bytes = 0
        self.streams.pop(stream.id, None)
        self._forget(stream.id, late=late)
        if self._refusing or self._peer_leaves:
            self._loop.call_soon(self._close_if_done)

    def _known(self, stream_id: int) -> bool | None:
        """Of an ended stream: whether frames may come late; None when it is not remembered."""
        return self._ended.get(stream_id, self._ended_before.get(stream_id))

    def _forget(self, stream_id: int, *, late: bool) -> None:
        self._ended[stream_id] = late
        if len(self._ended) >= _REMEMBERED:
            self._ended, self._ended_before = {}, self._ended


class Rate:
    """Counts to a limit within about a second; asks the time only when the limit is reached."""

    __slots__ = ("_clock", "_count", "_limit", "_since")

    def __init__(self, limit_per_s: int, clock: Callable[[], float]) -> None:
        self._limit = limit_per_s
        self._clock = clock
        self._count = 0
        self._since = clock()

    def exceeded(self, more: int = 1) -> bool:
        """Count so many more."""
        self._count += more
        if self._count <= self._limit:
            return False
        now = self._clock()
        too_fast = now - self._since < 1.0
        self._since, self._count = now, 0
        return too_fast


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    size = len(payload)
    return _HEADER.pack(size >> 8, size & 0xFF, kind, flags, stream_id) + payload


def _goaway(last_id: int, code: Code, why: bytes) -> bytes:
    return _frame(GOAWAY, 0, 0, _U32.pack(last_id) + _U32.pack(code) + why)


def _unpadded(data: bytes, begin: int, end: int) -> tuple[int, int]:
    """Where the content of a padded frame begins and ends."""
    if begin == end:
        raise Failure(Code.FRAME_SIZE_ERROR, "a padded frame without its padding's length")
    inner_end = end - data[begin]
    if inner_end < begin + 1:
        raise Failure(Code.PROTOCOL_ERROR, "more padding than frame")
    return begin + 1, inner_end


_HANDLERS: Mapping[int, Callable[[Connection, int, int, bytes], None]] = {
    HEADERS: Connection._on_headers,
    PRIORITY: Connection._on_priority,
    RST_STREAM: Connection._on_reset,
    SETTINGS: Connection._on_settings,
    PUSH_PROMISE: Connection._on_push_promise,
    PING: Connection._on_ping,
    GOAWAY: Connection._on_goaway,
    WINDOW_UPDATE: Connection._on_window_update,
    CONTINUATION: Connection._on_continuation,
}
