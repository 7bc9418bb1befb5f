"""What leaves an HTTP/2 connection: streams' answers through the peer's windows, written turn by turn."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from pointsman.extproc.h2_frames import (
    DATA,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES,
    HEADER,
    HEADERS,
    Code,
    frame,
    rst_stream,
)

STREAM_WINDOW: Final = 4 << 20
"""What a peer may send ahead of our updates; on a connection, ``CONNECTION_WINDOW``.

Data is handled as it arrives and the windows are opened again at half, so a peer finds them closed only
while we are behind; what is kept of it is bounded by those who keep it.
"""
CONNECTION_WINDOW: Final = 64 << 20
_WRITE_BYTES = 104_000
"""Written at once at most, by and large: Linux takes a little more into a unix socket as one piece (half its
default buffer), so a peer that has read some of it has it all. It ends where a stream's turn ends, so the end
of a request that we give back is not read without the end of the stream that follows.
"""
_UNREAD_BYTES = 256 * 1024
"""What may wait for a peer that does not read before we stop reading from it."""
_TURN_BYTES = 64 * 1024
"""What one stream sends before it is the next one's turn."""
_JOINED_BYTES = 1024
"""What is no longer is cheaper to join with its prefix than to carry in two pieces."""


class Receiver(Protocol):
    """Who hears of one stream. After ``lost``, and once we have finished and the peer has ended, no more."""

    def data(self, data: bytes, begin: int, end: int) -> None:
        """``data[begin:end]`` has arrived; the rest of the buffer is others'."""

    def ended(self) -> None:
        """The peer sends no more."""

    def lost(self) -> None:
        """The stream was reset, or the connection is gone."""

    def drained(self) -> None:
        """Everything written has left for the transport, in a later turn of the event loop."""


class Stream:
    """One request and its answer."""

    __slots__ = (
        "_out",
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

    def __init__(self, out: Outgoing, stream_id: int, window: int) -> None:
        self._out = out
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
            self._out.send(frame(HEADERS, END_HEADERS, self.id, block))

    def write(self, prefix: bytes, payload: bytes) -> None:
        """Send ``prefix`` and ``payload`` at the end of this turn, or as the peer's windows open."""
        if self.open and not self.finished:
            self._out.hold(self, prefix, payload)

    def finish(self, trailers: bytes) -> None:
        """End the answer with these trailers, after what is pending."""
        if self.open and not self.finished:
            self.finished = True
            self.trailers = trailers
            if not self.pending:
                self._out.trail(self)

    def stuck(self) -> bool:
        """Whether the peer does not take what has been written."""
        self._out.pump()
        return bool(self.pending)

    def reset(self, code: Code) -> None:
        """Give the stream up; its receiver is not told."""
        if self.open:
            self._out.reset(self, code)


class Outgoing:
    """A connection's way out. Frames of one turn of the event loop are written together."""

    __slots__ = (
        "_bytes",
        "_ends",
        "_loop",
        "_max_unsent_bytes",
        "_parts",
        "_soon",
        "_transport",
        "_unsent_bytes",
        "_waiting",
        "closed",
        "held",
        "stopped",
        "window",
    )

    def __init__(
        self, transport: asyncio.Transport, max_unsent_bytes: int, ends: Callable[[Stream, bool], None]
    ) -> None:
        self._transport = transport
        self._max_unsent_bytes = max_unsent_bytes
        self._ends = ends
        """Told of a stream that we have ended, and whether the peer may still send on it."""
        self._loop = asyncio.get_running_loop()
        self.window = DEFAULT_WINDOW
        """Bytes of data that the peer takes on all streams together."""
        self.stopped = False
        """The transport's buffer is full."""
        self.held = False
        """Somebody flushes soon."""
        self.closed = False
        self._soon = False
        self._parts: list[bytes | memoryview] = []
        self._bytes = 0
        self._waiting: deque[Stream] = deque()
        """Streams with data and an open window of their own."""
        self._unsent_bytes = 0

    def close(self) -> None:
        """The connection is gone."""
        self.closed = True
        self._parts.clear()
        self._waiting.clear()

    def send(self, data: bytes) -> None:
        """Write a frame with all others of this turn of the event loop."""
        self._parts.append(data)
        self._bytes += len(data)
        if self._bytes > _UNREAD_BYTES:
            self._write()
            if self._bytes and self._transport.is_reading():
                self._transport.pause_reading()  # a peer that does not read its answers gets no further ones
        elif not self.held:
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._soon and not self.held:
            self._soon = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Hand the transport all that it and the windows take now."""
        self._soon = True  # what is said meanwhile is written below
        self.pump()
        self._soon = False
        self._write()

    def _write(self) -> None:
        if self._parts and not self.stopped and not self.closed:
            out, self._parts, self._bytes = self._parts, [], 0
            self._transport.write(b"".join(out))

    def hold(self, stream: Stream, prefix: bytes, payload: bytes) -> None:
        """Send them as the windows allow."""
        size = len(prefix) + len(payload)
        if self._unsent_bytes and self._unsent_bytes + size > self._max_unsent_bytes:
            receiver = stream.receiver
            self.reset(stream, Code.ENHANCE_YOUR_CALM)
            if receiver:
                self._loop.call_soon(receiver.lost)  # not from within what it does just now
            return
        if size > _JOINED_BYTES:
            stream.pending += (prefix, payload)
        else:
            stream.pending.append(prefix + payload)
        stream.pending_bytes += size
        self._unsent_bytes += size
        if not stream.queued:
            self.queue(stream)
        if not self.held:
            self._flush_soon()

    def queue(self, stream: Stream) -> None:
        if stream.pending and stream.window > 0 and not stream.queued:
            stream.queued = True
            self._waiting.append(stream)

    def pump(self) -> None:
        """Make frames of what waits, each stream in turn."""
        waiting = self._waiting
        while waiting and self.window > 0 and not self.stopped and not self.closed:
            stream = waiting[0]
            size = max(0, min(_TURN_BYTES, stream.pending_bytes, stream.window, self.window))
            if self._bytes and self._bytes + size > _WRITE_BYTES:
                self._write()
                continue
            waiting.popleft()
            stream.queued = False
            if not stream.open:
                continue
            self._send_pending(stream, size)
            if stream.pending:
                self.queue(stream)
            elif stream.finished:
                self.trail(stream)
            elif stream.receiver:
                stream.receiver.drained()

    def _send_pending(self, stream: Stream, size: int) -> None:
        """Frames of so many bytes. What was written in pieces goes out in as few frames as it fits."""
        stream.window -= size
        stream.pending_bytes -= size
        self.window -= size
        self._unsent_bytes -= size
        parts, pending = self._parts, stream.pending
        while size:
            left = min(size, FRAME_BYTES)
            size -= left
            self._bytes += 9 + left
            parts.append(HEADER.pack(left >> 8, left & 0xFF, DATA, 0, stream.id))
            while left:
                piece = pending.popleft()
                if len(piece) > left:
                    view = memoryview(piece)
                    pending.appendleft(view[left:])
                    piece = view[:left]
                parts.append(piece)
                left -= len(piece)

    def trail(self, stream: Stream) -> None:
        """Send a finished stream's trailers."""
        end = frame(HEADERS, END_HEADERS | END_STREAM, stream.id, stream.trailers)
        if not stream.half_closed:  # the peer need not send the rest (RFC 9113, 8.1)
            end += rst_stream(stream.id, Code.NO_ERROR)
        self.send(end)
        self._ends(stream, not stream.half_closed)

    def reset(self, stream: Stream, code: Code) -> None:
        """End a stream with an error."""
        self.send(rst_stream(stream.id, code))
        self._ends(stream, True)

    def forget(self, stream: Stream) -> None:
        """Drop what a stream has not sent."""
        self._unsent_bytes -= stream.pending_bytes
        stream.pending.clear()
        stream.pending_bytes = 0
