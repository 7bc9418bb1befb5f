"""The server's side of HTTP/2 (RFC 9113) on an asyncio protocol: frames, streams and flow control.

No task or queue for a stream: frames are taken from one buffer, what is answered in one turn of the event
loop is written together. Whatever a peer does, what is kept for it stays bounded: by the limits below, by
flow control, and by not reading from a peer that does not read.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Protocol, cast

from pointsman.extproc.h2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_WINDOW,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES,
    GOAWAY,
    HEADER,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW,
    MAX_FRAME,
    MAX_LIST,
    MAX_STREAMS,
    MAX_WINDOW,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTING,
    SETTINGS,
    U32,
    WINDOW_UPDATE,
    Code,
    Failure,
    StreamFailure,
    frame,
    goaway,
    rst_stream,
    unpadded,
    window_update,
)
from pointsman.extproc.h2_limits import Ended, Limits, Rate
from pointsman.extproc.h2_sending import CONNECTION_WINDOW, STREAM_WINDOW, Outgoing, Receiver, Stream
from pointsman.extproc.hpack import BadBlock, Decoder, ListTooLong
from pointsman.extproc.http_fields import Head, Malformed, check_trailers, read_head

_LINGER_S = 1.0
"""Read on after a fatal GOAWAY, so that a reset does not overtake it."""
_DRAIN_PING = b"draining"
_ALIVE_PING = b"are-you?"


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


class Connection(asyncio.Protocol):
    """One connection. Its frames are handled in order, each whole."""

    transport: asyncio.Transport
    out: Outgoing

    def __init__(self, host: Host) -> None:
        self._host = host
        self._limits = limits = host.limits
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(limits.list_bytes)
        self.streams: dict[int, Stream] = {}
        self._rest = b""
        self._begun = self._settled = False
        self._block: bytearray | None = None
        self._block_of = (0, 0, 0)
        self._last_id = 0
        self._initial_window = DEFAULT_WINDOW
        self._credit = CONNECTION_WINDOW
        self._ended = Ended()
        self._resets = Rate(limits.resets_per_s, self._loop.time)
        self._idle_frames = Rate(limits.idle_frames_per_s, self._loop.time)
        self._draining = self._refusing = False
        self._peer_leaves = False
        self._failed = False
        self._heard = True
        self._asked = False
        self._timer: asyncio.TimerHandle | None = None

    # -- life

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        wire = transport.get_extra_info("socket")
        if wire is not None and wire.family == socket.AF_UNIX:
            self.transport.set_write_buffer_limits(
                high=0
            )  # what it does not take at once stays here, in pieces
        self.out = Outgoing(self.transport, self._limits.unsent_bytes, self._end)
        self._host.connections.add(self)
        limits = self._limits
        ours = (
            (HEADER_TABLE_SIZE, 0),  # so that equal blocks mean equal fields
            (MAX_STREAMS, limits.streams),
            (INITIAL_WINDOW, STREAM_WINDOW),
            (MAX_LIST, limits.list_bytes),
        )
        self.out.send(frame(SETTINGS, 0, 0, b"".join(SETTING.pack(*each) for each in ours)))
        more = CONNECTION_WINDOW - DEFAULT_WINDOW
        self.out.send(window_update(0, more))
        self._timer = self._loop.call_later(limits.preface_s, self._preface_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self.out.close()
        self._host.connections.discard(self)
        if self._timer:
            self._timer.cancel()
        self._lose_streams()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.out.stopped = True

    def resume_writing(self) -> None:
        self.out.stopped = False
        self.out.flush()
        if not self.out.stopped and not self.transport.is_reading():
            self.transport.resume_reading()

    def drain(self) -> None:
        """Take no new streams, let those under way end, then close."""
        if self._draining or self.out.closed:
            return
        self._draining = True
        if not self._begun:
            self.transport.close()
            return
        # a last id that refuses nothing yet; the real one follows when the peer has seen this (RFC 9113, 6.8)
        self.out.send(goaway(MAX_WINDOW, Code.NO_ERROR))
        self.out.send(frame(PING, 0, 0, _DRAIN_PING))
        self._rearm(_LINGER_S, self._refuse_new)

    def abort(self) -> None:
        """Cut the connection."""
        self.transport.abort()

    def _refuse_new(self) -> None:
        if not self._refusing and not self.out.closed:
            self._refusing = True
            self.out.send(goaway(self._last_id, Code.NO_ERROR))
            self._close_if_done()

    def _close_if_done(self) -> None:
        if (self._refusing or self._peer_leaves) and not self.streams and not self._failed:
            self.out.flush()
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
            self.out.send(frame(PING, 0, 0, _ALIVE_PING))
        self._heard = False
        self._rearm(self._limits.keepalive_s, self._keep_alive)

    def _rearm(self, delay_s: float, then: Callable[[], None]) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, then)

    def _fail(self, code: Code, why: str) -> None:
        """Say why and close, once the peer can have read it."""
        self._failed = True
        self.out.send(goaway(self._last_id, code, why.encode()))
        self._lose_streams()
        self.out.stopped = False  # what waits is little, and the last
        self.out.flush()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._rearm(_LINGER_S, self.transport.abort)

    def _lose_streams(self) -> None:
        streams, self.streams = list(self.streams.values()), {}
        for stream in streams:
            stream.open = False
            if stream.receiver:
                stream.receiver.lost()

    # -- reading

    def data_received(self, data: bytes) -> None:
        if self._failed:
            return
        self._heard, self._asked = True, False
        self.out.held = True
        try:
            self._rest = self._take(data)
        except Failure as exc:
            self._rest = b""
            self._fail(exc.code, str(exc))
        finally:
            self.out.held = False
        self.out.flush()

    def _take(self, data: bytes) -> bytes:
        """Handle the whole frames in what was left and ``data``; returns what is left."""
        rest = self._rest
        if len(rest) < 9 or not self._begun:
            return self._frames(rest + data)
        high, low, *_ = HEADER.unpack_from(rest)
        begin = 9 + (high << 8 | low) - len(rest)
        if begin > len(data):
            return rest + data
        self._frames(rest + data[:begin])  # that frame alone: what follows is not copied
        return self._frames(data, begin)

    def _frames(self, data: bytes, at: int = 0) -> bytes:
        """Handle the whole frames in ``data``, of which ``at`` bytes are done; returns what is left."""
        end = len(data)
        if not self._begun:
            if data[:24] != PREFACE[:end]:
                raise Failure(Code.PROTOCOL_ERROR, "not HTTP/2")
            if end < len(PREFACE):
                return data
            at, self._begun = len(PREFACE), True
            if self._limits.keepalive_s:
                self._rearm(self._limits.keepalive_s, self._keep_alive)
        unpack = HEADER.unpack_from
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
            self.out.send(rst_stream(failure.stream_id, failure.code))
            if failure.stream_id <= self._last_id and self._ended.late(failure.stream_id) is None:
                self._ended.add(failure.stream_id, late=True)
            return
        receiver = stream.receiver
        self.out.reset(stream, failure.code)
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
            self.out.send(window_update(0, more))
        if flags & PADDED:
            begin, end = unpadded(data, begin, end)
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
            self.out.send(window_update(stream_id, more))

    def _half_close(self, stream: Stream) -> None:
        if stream.open and stream.receiver:
            stream.receiver.ended()

    def _late(self, stream_id: int, what: str) -> None:
        """A frame came on a stream that is not open: wrong, unless it crossed our own end of the stream."""
        if not stream_id:
            raise Failure(Code.PROTOCOL_ERROR, f"{what} on stream 0")
        if stream_id > self._last_id or not stream_id & 1:
            raise Failure(Code.PROTOCOL_ERROR, f"{what} on idle stream {stream_id}")
        if not self._ended.late(stream_id):
            raise StreamFailure(stream_id, Code.STREAM_CLOSED)

    def _on_headers(self, stream_id: int, flags: int, payload: bytes) -> None:
        begin, end = unpadded(payload, 0, len(payload)) if flags & PADDED else (0, len(payload))
        if not stream_id & 1:
            raise Failure(Code.PROTOCOL_ERROR, f"HEADERS on stream {stream_id}")
        if flags & PRIORITISED:
            if end - begin < 5:
                raise Failure(Code.FRAME_SIZE_ERROR, "HEADERS without its priority")
            if U32.unpack_from(payload, begin)[0] & MAX_WINDOW == stream_id:
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
            known = self._ended.late(stream_id)
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
        stream = Stream(self.out, stream_id, self._initial_window)
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
        if U32.unpack_from(payload)[0] & MAX_WINDOW == stream_id:
            raise StreamFailure(stream_id, Code.PROTOCOL_ERROR)
        self._bring_nothing()

    def _on_reset(self, stream_id: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Failure(Code.FRAME_SIZE_ERROR, "RST_STREAM is not 4 bytes")
        stream = self.streams.get(stream_id)
        if stream is None:
            if not stream_id or stream_id > self._last_id or not stream_id & 1:
                raise Failure(Code.PROTOCOL_ERROR, f"RST_STREAM on idle stream {stream_id}")
            if not self._ended.late(stream_id):
                self._bring_nothing()
            self._ended.add(stream_id, late=False)
            return
        self._end(stream, False)
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
        for name, value in SETTING.iter_unpack(payload):
            if name == INITIAL_WINDOW:
                initial = value
                if initial > MAX_WINDOW:
                    raise Failure(Code.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is too large")
            elif name == ENABLE_PUSH and value > 1:
                raise Failure(Code.PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
            elif name == MAX_FRAME and not FRAME_BYTES <= value < 1 << 24:
                raise Failure(Code.PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of range")
        self.out.send(frame(SETTINGS, ACK, 0))
        self._bring_nothing()
        if initial != self._initial_window:
            self._change_windows(initial)

    def _change_windows(self, initial: int) -> None:
        change, self._initial_window = initial - self._initial_window, initial
        for stream in self.streams.values():
            stream.window += change
            if stream.window > MAX_WINDOW:
                raise Failure(Code.FLOW_CONTROL_ERROR, "a window is too large")
            self.out.queue(stream)
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
            self.out.send(frame(PING, ACK, 0, payload))
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
        more = U32.unpack(payload)[0] & MAX_WINDOW
        if not stream_id:
            self.out.window += more
            if not more or self.out.window > MAX_WINDOW:
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
        self.out.queue(stream)

    # -- the end of streams

    def _end(self, stream: Stream, late: bool) -> None:
        stream.open = False
        self.out.forget(stream)
        self.streams.pop(stream.id, None)
        self._ended.add(stream.id, late=late)
        if self._refusing or self._peer_leaves:
            self._loop.call_soon(self._close_if_done)


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
