"""One request through the gateway: sent to an endpoint, to another when that fails, and its answer relayed.

The client sees nothing of a response until its first body byte is here; until then the request can move.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial

from pointsman import api
from pointsman.errors import PointsmanError, UpstreamFailed, UpstreamTimeout
from pointsman.proxy.framing import ChunkFraming
from pointsman.proxy.head import RequestHead
from pointsman.proxy.plane import Plane
from pointsman.proxy.rewrite import early_head, forwarded_head, relayed_head
from pointsman.proxy.server import ClientConnection
from pointsman.proxy.upstream import ResponseHead, UpstreamConnection
from pointsman.proxy.usage_filter import UsageFilter, asking
from pointsman.router import Flight
from pointsman.types import Ending, Outcome, Usage

log = logging.getLogger(__name__)

TAIL_READS = 4
"""Reads kept of a response's end: its usage is in the last event, which may come in a read before
``[DONE]``.
"""
TAIL_BYTES = 16 * 1024
MAX_ID_AT = 4096
"""The id of what an answer made is looked for in this many of its first bytes."""
MAX_HELD_BYTES = 1024 * 1024
"""An answer that is held back, because another endpoint may do better, is at most this large."""

Write = Callable[[bytes], None]


class Exchange:
    """Receives from upstream (``Receiver``), writes to the client, and ends in exactly one ``Outcome``."""

    tunnel = False
    reads = 0
    _plain = True
    """Bytes go to the client as they come."""
    _upstream: UpstreamConnection | None = None
    _connecting: asyncio.Task[None] | None = None
    _retried_stale = False
    _sends = 0
    _response: ResponseHead | None = None
    _raw_head = b""
    _head: bytes | None = None
    """Head to be written with the first body byte."""
    _holding = False
    """The response is a refusal (429, 503 ...): held back, since another endpoint may do better."""
    _held: list[bytes]
    _tail: deque[bytes]
    """The last reads of the response's body."""
    _whole = b""
    """The body of a response that came in one piece, behind four bytes of its head."""
    _refusal: tuple[ResponseHead, bytes, bytes] | None = None
    """The last refusal (head and body), for the client when nobody does better."""
    _asked = False
    """The endpoint is asked for usage and the client did not."""
    _usage_filter: UsageFilter | None = None
    _early = False
    """We have begun a response ourselves, to keep a waiting stream alive."""
    _started = False
    """The client has seen bytes of the endpoint's response."""
    _status = 0
    _bytes = 0
    _counted = 0
    _ttft_s: float | None = None
    _progress = 0
    _ended: Ending | None = None
    _reason = ""
    _duration_s = 0.0

    def __init__(
        self, plane: Plane, client: ClientConnection, head: RequestHead, flight: Flight, started_at: float
    ) -> None:
        self._plane = plane
        self._client = client
        self.request_head = head
        self.request = flight.request
        self.flight = flight
        self._started_at = self._sent_at = self._progress_at = started_at
        self._write: Write = client.write

    # -- sending

    def send(self) -> None:
        """Send the request to the endpoint that was decided on."""
        connections = self._plane.connections(self.flight.decision.chosen.name)
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
        request, head = self.request, self.request_head
        if self._plane.settings.upstream.ask_usage and not head.http10:
            request = asking(request)
            self._asked = request is not self.request
        connection.send(
            self,
            forwarded_head(
                head,
                request,
                self._client,
                connection.connections,
                self.flight.decision,
                uncompressed=self._asked,
            ),
            request.body,
            without_body=head.method == b"HEAD",
        )

    # -- receiving

    def response_head(self, head: ResponseHead, raw: bytes) -> None:
        status = self._status = head.status
        self._response = head
        self._tail = deque(maxlen=TAIL_READS)
        if status >= 500 or self._plane.pool.troubled:
            self._account(status)
        if status >= 400 and self._try_elsewhere(status):
            self._raw_head = raw
            self._holding = True
            self._held = []
            self._head = None
            self._write = self._hold
            return
        self._begin(head, raw)
        if self._asked and status == 200 and head.streams:
            self._filter_usage(head, raw)

    def _filter_usage(self, head: ResponseHead, raw: bytes) -> None:
        """Take the usage that we asked for out again; not where the endpoint compresses all the same."""
        if not head.has_length and b"\r\ncontent-encoding:" not in raw.lower():
            self._usage_filter = UsageFilter(self._write, chunked=head.chunked)
            self._write = self._usage_filter.write

    def _begin(self, head: ResponseHead, raw: bytes) -> None:
        """This is the response the client gets."""
        client, asked = self._client, self.request_head
        if head.simple and self._relays_simply():  # nearly always: nothing is to be changed
            self._head = b"%b\r\nx-request-id: %b\r\n\r\n" % (raw, self.request.id.encode("latin-1"))
            return
        self._holding = False
        if self._early:
            self._head = b""
            self._held = []
            self._plain = head.status == 200 and head.chunked
            self._write = client.write if self._plain else self._held.append
            return
        has_end = head.chunked or head.has_length or head.status in (204, 304) or asked.method == b"HEAD"
        self._head = relayed_head(
            head,
            raw,
            self.request.id,
            self.flight.decision,
            http10=asked.http10,
            closes=client.closes_with(open_ended=not has_end or asked.http10),
            names_endpoint=self._plane.settings.server.endpoint_header,
        )
        self._plain = not (head.chunked and asked.http10)
        self._write = client.write if self._plain else _Unchunked(client.write).write
        if head.status == 101:
            self._first_bytes(b"")
            self.tunnel = True
            client.tunnel()

    def _relays_simply(self) -> bool:
        return not (
            self._early
            or self.request_head.http10
            or self._client.closing
            or self.flight.decision.response_headers
            or self._plane.settings.server.endpoint_header
        )

    def response_body(self, data: bytes) -> None:
        self.reads += 1
        self._bytes += len(data)
        self._tail.append(data)
        if self._head is None:
            self._write(data)
        else:
            self._first_bytes(data)

    def _first_bytes(self, data: bytes) -> None:
        """The first byte of the response the client gets: from here on there is no other endpoint."""
        head, self._head = self._head, None
        assert head is not None
        self._started = True
        now = self._plane.clock()
        self._ttft_s = now - self._started_at
        self.flight.first_output(now)
        if self._plain and not self._asked:
            self._write(head + data)
        else:
            if head:
                self._client.write(head)
            self._write(data)
        if self.request_head.makes_state:
            self._find_id(data)

    def response_whole(self, head: ResponseHead, data: bytes, end: int) -> None:
        self._upstream = None
        plane = self._plane
        if plane.pool.troubled or not self._relays_simply():
            self.response_head(head, data[:end])
            self.response_body(data[end + 4 :])
            self.response_done()
            return
        whole = self._whole = data[end:]
        self._status = head.status
        self._started = True
        self.reads = 1
        self._bytes = len(whole) - 4
        now = plane.clock()
        self._ttft_s = now - self._started_at
        self.flight.first_output(now)
        self._write(data[:end] + f"\r\nx-request-id: {self.request.id}".encode("latin-1") + whole)
        if self.request_head.makes_state:
            self._find_id(whole)
        self._end(Ending.OK, "")

    def _find_id(self, seen: bytes) -> None:
        """The first bytes of the answer name what it made, in whatever pieces they come: remember who holds
        it."""
        state_id = api.created_id(self.request_head.path, seen)
        if state_id:
            self._plane.router.remember(self.flight, state_id)
        elif len(seen) < MAX_ID_AT:
            write = self._write

            def look_on(data: bytes) -> None:
                self._write = write
                write(data)
                self._find_id(seen + data)

            self._write = look_on

    def response_done(self) -> None:
        self._upstream = None
        if self._ended:
            return
        if self._holding:
            assert self._response
            self._refusal = (self._response, self._raw_head, b"".join(self._held))
            self._plane.opening.reopen(self.flight, self._reopened_after_refusal)
            return
        self._complete()

    def _complete(self) -> None:
        if self._head is not None:
            self._first_bytes(b"")
        if self._usage_filter:
            self._usage_filter.flush()
        if self._early and not self._plain:  # an error that comes when the stream has been begun
            ours = api.find(self.request_head.path).stream_error(UpstreamFailed(""))
            name, _, _ = ours.partition(b"data: ")  # where the API names its error events
            error = b" ".join(b"".join(self._held).split(b"\n"))
            self._client.write(chunk(name + b"data: " + error + b"\n\n") + LAST_CHUNK)
        if self._status < 400:
            self._end(Ending.OK, "")
        else:
            self._end(Ending.ERROR, f"status_{self._status}")

    def response_broken(self, why: str) -> None:
        upstream, self._upstream = self._upstream, None
        self._connecting = None
        if self._ended:
            return
        plane, chosen = self._plane, self.flight.decision.chosen
        if why == "stale" and not self._retried_stale:
            # The endpoint closed a kept connection just then: no fault of its own, and nothing was computed.
            self._retried_stale = True
            connections = plane.connections(chosen.name)
            if connections:
                self._sends -= 1
                self._connecting = connections.connect(self)
                return
        if why == "connect":
            plane.pool.unreachable(chosen.name)
        else:
            plane.pool.failed(chosen)
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
        pool, chosen = self._plane.pool, self.flight.decision.chosen
        if status < 500:
            pool.answered(chosen)
        elif status == 503:
            pool.abandoned(chosen)
        else:
            pool.failed(chosen)

    def _try_elsewhere(self, status: int) -> bool:
        upstream = self._plane.settings.upstream
        if status == 404 and self.flight.guess:
            return True
        return status in upstream.retry_statuses and self._sends < upstream.tries

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        if self._bytes > MAX_HELD_BYTES:
            assert self._response
            self._give(self._response, self._raw_head, b"".join(self._held))

    def _give(self, head: ResponseHead, raw: bytes, held: bytes) -> None:
        self._response = head
        self._status = head.status
        self._begin(head, raw)
        self._first_bytes(held)

    def _reopened_after_refusal(self, elsewhere: bool) -> None:
        if self._ended:
            return
        if elsewhere:
            self._resend()
        else:
            self._pass_refusal_on()

    def _pass_refusal_on(self) -> None:
        """Everybody refused: the client gets the last answer, with its Retry-After."""
        assert self._refusal
        self._give(*self._refusal)
        self._complete()

    def _resend(self) -> None:
        self._retried_stale = self._holding = False
        self._write = self._client.write
        self._head = None
        self._bytes = self._counted = 0
        self._sent_at = self._plane.clock()
        self.send()

    def _next(self, why: str) -> None:
        """No byte has reached the client: another endpoint may answer, within bounds."""
        if self._sends < self._plane.settings.upstream.tries:
            self._plane.opening.reopen(self.flight, partial(self._reopened, why))
        else:
            self._give_up(why)

    def _reopened(self, why: str, elsewhere: bool) -> None:
        if self._ended:
            return
        if elsewhere:
            log.debug("request %s: %s at %s, trying another", self.request.id, why, self.flight.tried[-2])
            self._resend()
        else:
            self._give_up(why)

    def _give_up(self, why: str) -> None:
        if self._refusal:
            self._pass_refusal_on()
            return
        chosen = self.flight.tried[-1]
        if why == "timeout":
            self._fail(UpstreamTimeout(f"The endpoint {chosen} did not answer in time."))
        else:
            what = "could not be reached" if why == "connect" else f"broke off ({why}) before answering"
            self._fail(UpstreamFailed(f"The endpoint {chosen} {what}."))

    def _fail(self, error: PointsmanError) -> None:
        if self._early:
            self._client.write(chunk(api.find(self.request_head.path).stream_error(error)) + LAST_CHUNK)
        else:
            self._client.respond_error(error, self.request_head, self.request.id)
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
        if between_chunks and self._plain and head.streams:
            lead = b"" if self._tail[-1].endswith(b"\n\n\r\n") else b"\n\n"
            event = api.find(self.request_head.path).stream_error(error)
            self._client.write(chunk(lead + event) + LAST_CHUNK)
        else:
            self._client.cut()
        self._end(Ending.FAILED, error.reason)

    # -- time

    def check(self, now: float) -> None:
        """Called a few times a second: are the deadlines kept?"""
        limits = self._plane.settings.upstream
        self._count()
        if self.tunnel or self._upstream is None:
            self._progress_at = now
            return
        if not self._started:
            if now - self._sent_at > limits.first_byte_timeout_s:
                self._timeout()
            elif limits.sse_comment_s and now - self._progress_at >= limits.sse_comment_s:
                self._progress_at = now
                if self.request.stream and not self.request_head.http10:
                    self._comment()
        elif self.reads != self._progress:
            self._progress = self.reads
            self._progress_at = now
        elif self._client.paused:
            if now - self._progress_at > self._plane.settings.server.idle_timeout_s:
                self._client.abort()  # it has not read for minutes; an engine must not wait for it
        elif now - self._progress_at > limits.between_bytes_timeout_s:
            self._timeout()

    def _count(self) -> None:
        """Tell the router how much has come since it was last told."""
        if self._bytes != self._counted:
            self.flight.received(self._bytes - self._counted)
            self._counted = self._bytes

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
                self._progress_at = self._plane.clock()  # until now the silence was the client's
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
        if self._plane.pool.troubled:
            self._plane.pool.abandoned(self.flight.decision.chosen)
        if self.tunnel:
            self._end(Ending.OK, "")
        else:
            self._end(Ending.CANCELLED, "client_left")

    # -- the end

    def _end(self, ending: Ending, reason: str) -> None:
        plane = self._plane
        self._ended = ending
        self._reason = reason
        self._duration_s = plane.clock() - self._started_at
        self._count()
        self.flight.release()
        plane.finished(self)
        self._client.exchange_done()

    def settle(self) -> None:
        """Tell the router what became of the request (``plane.Finished``)."""
        flight, ending = self.flight, self._ended
        assert ending
        usage = NO_USAGE
        if self._status == 200 and self._started and not self.tunnel:
            usage = api.find(self.request_head.path).usage(self._last_bytes())
        self._plane.router.close(
            flight,
            Outcome(
                ending=ending,
                status=self._status,
                endpoint=flight.tried[-1],
                tries=len(flight.tried),
                decided_s=flight.decision.at_s - self._started_at,
                ttft_s=self._ttft_s,
                duration_s=self._duration_s,
                chunks=self.reads,
                request_bytes=len(self.request.body),
                response_bytes=self._bytes,
                usage=usage,
                reason=self._reason,
            ),
        )

    def _last_bytes(self) -> bytes:
        if self._whole:
            return self._whole[-TAIL_BYTES:]
        tail = b""
        for data in reversed(self._tail):
            tail = data[-TAIL_BYTES:] + tail
            if len(tail) >= TAIL_BYTES:
                break
        return tail


NO_USAGE = Usage()
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
