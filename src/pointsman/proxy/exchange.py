"""One request through the gateway: sent to an endpoint, to another when that fails, and its answer relayed.

The client sees nothing of a response until its first body byte is here; until then the request can move.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from pointsman import api
from pointsman.errors import PointsmanError, UpstreamFailed, UpstreamTimeout
from pointsman.proxy.framing import ChunkFraming
from pointsman.proxy.head import RequestHead
from pointsman.proxy.plane import Plane
from pointsman.proxy.rewrite import early_head, forwarded_head, relayed_head
from pointsman.proxy.server import ClientConnection
from pointsman.proxy.upstream import ResponseHead, UpstreamConnection
from pointsman.router import Flight
from pointsman.types import Ending, Outcome, Usage

log = logging.getLogger(__name__)

TAIL_READS = 4
"""Reads kept of a response's end: its usage is in the last event, which may come in a read before
``[DONE]``.
"""
TAIL_BYTES = 16 * 1024
MAX_HELD_BYTES = 1024 * 1024
"""An answer that is held back, because another endpoint may do better, is at most this large."""

Write = Callable[[bytes], None]


class Exchange:
    """Receives from upstream (``Receiver``), writes to the client, and ends in exactly one ``Outcome``."""

    __slots__ = (
        "_bytes",
        "_client",
        "_comments",
        "_connecting",
        "_content_type",
        "_early",
        "_ended",
        "_first",
        "_format",
        "_head",
        "_held",
        "_holding",
        "_on_end",
        "_plain",
        "_plane",
        "_progress",
        "_progress_at",
        "_refusal",
        "_response",
        "_retried_stale",
        "_sends",
        "_sent_at",
        "_started",
        "_status",
        "_tail",
        "_ttft_s",
        "_upstream",
        "_write",
        "flight",
        "reads",
        "request",
        "request_head",
        "started_at",
        "tunnel",
    )

    def __init__(
        self,
        plane: Plane,
        client: ClientConnection,
        head: RequestHead,
        flight: Flight,
        started_at: float,
        on_end: Callable[[Exchange], None],
    ) -> None:
        self._plane = plane
        self._client = client
        self.request_head = head
        self.request = request = flight.request
        self.flight = flight
        self.started_at = started_at
        self._on_end = on_end
        self.tunnel = False
        self.reads = 0
        self._write: Write = client.write
        self._plain = True
        """Bytes go to the client as they come."""
        self._upstream: UpstreamConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._retried_stale = False
        self._sends = 0
        self._sent_at = 0.0
        self._response: ResponseHead | None = None
        self._head: bytes | None = None
        """Head to be written with the first body byte."""
        self._holding = False
        """The response is a refusal (429, 503 ...): held back, since another endpoint may do better."""
        self._held: list[bytes] = []
        self._refusal: tuple[ResponseHead, bytes] | None = None
        """The last refusal, for the client when nobody does better."""
        self._comments = plane.settings.upstream.sse_comment_s > 0 and request.stream and not head.http10
        self._format = api.find(head.path) or api.PASSTHROUGH
        self._early = False
        """We have begun a response ourselves, to keep a waiting stream alive."""
        self._started = False
        """The client has seen bytes of the endpoint's response."""
        self._status = 0
        self._first = b""
        self._tail: deque[bytes] = deque(maxlen=TAIL_READS)
        self._bytes = 0
        self._ttft_s: float | None = None
        self._progress = 0
        self._progress_at = started_at
        self._ended = False

    # -- sending

    def send(self) -> None:
        """Send the request to the endpoint that was decided on."""
        decision = self.flight.decision
        assert decision
        self._sent_at = self._plane.clock()
        connections = self._plane.connections(decision.chosen.name)
        if connections is None:  # it left the pool in this very moment
            self._next("reset")
            return
        upstream = None if self.request_head.upgrade else connections.take()
        if upstream is not None:
            self.connected(upstream)
        else:
            self._connecting = connections.connect(self)

    def connected(self, connection: UpstreamConnection) -> None:
        self._connecting = None
        if self._ended:
            connection.abandon()
            return
        self._upstream = connection
        self._sends += 1
        head = forwarded_head(self.request_head, self.request, self._client, connection.connections)
        body = self.request.body
        connection.send(self, head, body, without_body=self.request_head.method == b"HEAD")

    # -- receiving

    def response_head(self, head: ResponseHead) -> None:
        self._response = head
        self._status = status = head.status
        self._account(status)
        if status != 200 and self._try_elsewhere(status):
            self._holding = True
            self._held = []
            self._head = None
            self._write = self._hold
            return
        self._begin(head)

    def _begin(self, head: ResponseHead) -> None:
        """This is the response the client gets."""
        client = self._client
        self._holding = False
        if self._early:
            self._head = b""
            self._plain = head.status == 200 and head.chunked
            self._write = client.write if self._plain else self._held.append
            return
        self._head = self._relayed_head(head)
        self._plain = not (head.chunked and self.request_head.http10)
        self._write = client.write if self._plain else _Unchunked(client.write).write
        if head.status == 101:
            self._first_bytes(b"")
            self.tunnel = True
            client.tunnel()

    def _relayed_head(self, head: ResponseHead) -> bytes:
        asked, decision = self.request_head, self.flight.decision
        assert decision
        has_end = head.chunked or head.length >= 0 or head.status in (204, 304) or asked.method == b"HEAD"
        return relayed_head(
            head,
            self.request.id,
            decision,
            http10=asked.http10,
            closes=self._client.closes_with(open_ended=not has_end or asked.http10),
            names_endpoint=self._plane.settings.server.endpoint_header,
        )

    def response_body(self, data: bytes) -> None:
        self.reads += 1
        self._bytes += len(data)
        self._tail.append(data)
        if self._head is not None:
            self._first_bytes(data)
        else:
            self._write(data)

    def _first_bytes(self, data: bytes) -> None:
        """The first byte of the response the client gets: from here on there is no other endpoint."""
        head, self._head = self._head, None
        assert head is not None
        self._started = True
        self._first = data
        self._ttft_s = self._plane.clock() - self.started_at
        self.flight.first_output()
        if self._plain:
            self._write(head + data)
            return
        if head:
            self._client.write(head)
        self._write(data)

    def response_done(self) -> None:
        self._upstream = None
        if self._ended:
            return
        if self._holding:
            assert self._response
            self._refusal = (self._response, b"".join(self._held))
            if self._plane.router.reopen(self.flight):
                self._resend()
            else:
                self._pass_refusal_on()
            return
        self._complete()

    def _complete(self) -> None:
        if self._head is not None:
            self._first_bytes(b"")
        if self._early and not self._plain:  # an error that comes when the stream has been begun
            error = b" ".join(b"".join(self._held).split(b"\n"))
            self._client.write(chunk(b"data: " + error + b"\n\n") + LAST_CHUNK)
        status = self._status
        self._end(Ending.OK if status < 400 else Ending.ERROR, f"status_{status}" if status >= 400 else "")

    def response_broken(self, why: str) -> None:
        upstream, self._upstream = self._upstream, None
        self._connecting = None
        if self._ended:
            return
        decision = self.flight.decision
        assert decision
        if why == "stale" and not self._retried_stale:
            # The endpoint closed a kept connection just then: no fault of its own, and nothing was computed.
            self._retried_stale = True
            connections = self._plane.connections(decision.chosen.name)
            if connections:
                self._connecting = connections.connect(self)
                return
        if why == "connect":
            self._plane.pool.unreachable(decision.chosen.name)
        else:
            self._plane.pool.failed(decision.chosen)
        if self._started:
            self._break_off(why, upstream is not None and upstream.between_chunks)
        else:
            self._next(why)

    def upstream_paused(self, paused: bool) -> None:
        if self.tunnel:
            self._client.pause_reading(paused)

    # -- moving on

    def _account(self, status: int) -> None:
        """What the answer says of the endpoint's health: 5xx is a fault, but for 503, which says busy."""
        decision = self.flight.decision
        assert decision
        pool = self._plane.pool
        if status < 500:
            pool.answered(decision.chosen)
        elif status == 503:
            pool.abandoned(decision.chosen)
        else:
            pool.failed(decision.chosen)

    def _try_elsewhere(self, status: int) -> bool:
        upstream = self._plane.settings.upstream
        if status == 404 and self.flight.guess:
            return True
        return status in upstream.retry_statuses and self._sends < upstream.tries

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        if self._bytes > MAX_HELD_BYTES:
            assert self._response
            self._give(self._response, b"".join(self._held))

    def _give(self, head: ResponseHead, held: bytes) -> None:
        self._response = head
        self._status = head.status
        self._held = []
        self._begin(head)
        self._first_bytes(held)

    def _pass_refusal_on(self) -> None:
        """Everybody refused: the client gets the last answer, with its Retry-After."""
        assert self._refusal
        self._give(*self._refusal)
        self._complete()

    def _resend(self) -> None:
        self._retried_stale = self._holding = False
        self._head = None
        self._bytes = 0
        self._tail.clear()
        self.send()

    def _next(self, why: str) -> None:
        """No byte has reached the client: another endpoint may answer, within bounds."""
        plane, flight = self._plane, self.flight
        if self._sends < plane.settings.upstream.tries and plane.router.reopen(flight):
            log.debug("request %s: %s at %s, trying another", self.request.id, why, flight.tried[-2])
            self._resend()
            return
        if self._refusal:
            self._pass_refusal_on()
            return
        chosen = flight.tried[-1]
        if why == "timeout":
            self._fail(UpstreamTimeout(f"The endpoint {chosen} did not answer in time."))
        else:
            what = "could not be reached" if why == "connect" else f"broke off ({why}) before answering"
            self._fail(UpstreamFailed(f"The endpoint {chosen} {what}."))

    def _fail(self, error: PointsmanError) -> None:
        if self._early:
            self._client.write(chunk(self._format.stream_error(error)) + LAST_CHUNK)
        else:
            self._client.respond_error(error, self.request.path, self.request.id)
            self._status = error.status
        self._end(Ending.FAILED, error.reason)

    def _break_off(self, why: str, between_chunks: bool) -> None:
        """The stream ends here, in a way the client can tell from a good end."""
        error: PointsmanError = (
            UpstreamTimeout("The endpoint fell silent in the middle of its answer.")
            if why == "timeout"
            else UpstreamFailed("The endpoint broke off in the middle of its answer.")
        )
        head = self._response
        assert head
        if between_chunks and self._plain and b"text/event-stream" in head.lower:
            lead = b"" if self._tail[-1].endswith(b"\n\n\r\n") else b"\n\n"
            event = self._format.stream_error(error)
            self._client.write(chunk(lead + event) + LAST_CHUNK)
        else:
            self._client.abort()
        self._end(Ending.FAILED, error.reason)

    # -- time

    def check(self, now: float) -> None:
        """Called a few times a second: are the deadlines kept?"""
        limits = self._plane.settings.upstream
        if self.tunnel or self._upstream is None:
            self._progress_at = now
            return
        if not self._started:
            if now - self._sent_at > limits.first_byte_timeout_s:
                self._timeout()
            elif self._comments and now - self._progress_at >= limits.sse_comment_s:
                self._progress_at = now
                self._comment()
        elif self.reads != self._progress:
            self._progress = self.reads
            self._progress_at = now
        elif self._client.paused:
            if now - self._progress_at > self._plane.settings.server.idle_timeout_s:
                self._client.abort()  # it has not read for minutes; an engine must not wait for it
        elif now - self._progress_at > limits.between_bytes_timeout_s:
            self._timeout()

    def _timeout(self) -> None:
        if self._upstream:
            self._upstream.abandon()
        self.response_broken("timeout")

    def _comment(self) -> None:
        if not self._early:
            self._early = True
            self._status = 200
            self._client.write(early_head(self.request.id))
        self._client.write(chunk(b": waiting\n\n"))

    # -- the client's side

    def client_bytes(self, data: bytes) -> None:
        """Bytes of an upgraded connection, for the endpoint."""
        if self._upstream:
            self._upstream.transport.write(data)

    def client_paused(self, paused: bool) -> None:
        """The client reads slower than the endpoint writes: let the endpoint wait."""
        if self._upstream and not self._upstream.transport.is_closing():
            if paused:
                self._upstream.transport.pause_reading()
            else:
                self._upstream.transport.resume_reading()

    def cancel(self) -> None:
        """The client has left: the endpoint must hear of it at once."""
        if self._ended:
            return
        if self._connecting:
            self._connecting.cancel()
        if self._upstream:
            self._upstream.abandon()
            self._upstream = None
        if self.flight.decision:
            self._plane.pool.abandoned(self.flight.decision.chosen)
        self._end(Ending.OK if self.tunnel else Ending.CANCELLED, "" if self.tunnel else "client_left")

    def _last_bytes(self) -> bytes:
        tail = b""
        for data in reversed(self._tail):
            tail = data[-TAIL_BYTES:] + tail
            if len(tail) >= TAIL_BYTES:
                break
        return tail

    def _end(self, ending: Ending, reason: str) -> None:
        self._ended = True
        plane, request = self._plane, self.request
        usage = Usage()
        if self._started and self._status == 200 and not self.tunnel:
            usage = self._format.usage(self._last_bytes())
            if self.request_head.method == b"POST":
                plane.router.remember(self.flight, api.created_id(request.path, self._first))
        outcome = Outcome(
            ending=ending,
            status=self._status,
            endpoint=self.flight.tried[-1],
            tries=len(self.flight.tried),
            ttft_s=self._ttft_s,
            duration_s=plane.clock() - self.started_at,
            chunks=self.reads,
            request_bytes=len(request.body),
            response_bytes=self._bytes,
            usage=usage,
            reason=reason,
        )
        plane.router.close(self.flight, outcome)
        self._on_end(self)
        if ending is not Ending.CANCELLED:
            self._client.exchange_done()


LAST_CHUNK = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """``data`` as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class _Unchunked:
    """Takes the chunk framing off, for HTTP/1.0 clients: their response ends with the connection."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._framing = ChunkFraming(pieces=[])

    def write(self, data: bytes) -> None:
        self._framing.feed(data)
        pieces = self._framing.pieces
        assert pieces is not None
        payload = b"".join(pieces)
        pieces.clear()
        if payload:
            self._write(payload)
