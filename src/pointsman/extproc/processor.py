"""The endpoint picker protocol: ext_proc streams, each one HTTP request, decided by the router.

A request's headers are answered when its whole body is here and has been decided on; then the body goes back
piece by piece. What comes of the response, if anything, is passed on at once.
"""

from __future__ import annotations

import logging
import random
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from pointsman import api
from pointsman.errors import BodyTooLarge, NoEndpoints, PointsmanError
from pointsman.extproc import messages
from pointsman.extproc.completions import HandedOver, follow
from pointsman.extproc.destinations import Destinations
from pointsman.extproc.grpc import INVALID_ARGUMENT, Stream
from pointsman.extproc.grpc_status import is_grpc
from pointsman.extproc.headers import host_of, path_of, stripped
from pointsman.extproc.messages import (
    BUFFERED,
    BUFFERED_PARTIAL,
    FULL_DUPLEX,
    NONE,
    REQUEST_BODY,
    REQUEST_HEADERS,
    REQUEST_TRAILERS,
    RESPONSE_BODY,
    RESPONSE_HEADERS,
    RESPONSE_TRAILERS,
    Body,
    Chosen,
    Head,
    Malformed,
)
from pointsman.extproc.refusals import refusal
from pointsman.extproc.reply import ModelNames, Reply
from pointsman.proxy.exchange import NO_USAGE
from pointsman.proxy.gateway import rewritten
from pointsman.proxy.head import MODEL_REWRITE
from pointsman.proxy.opening import Opening
from pointsman.proxy.plane import Routing
from pointsman.router import Eligible, Flight
from pointsman.types import Clock, Decision, Ending, InferenceRequest, Outcome

log = logging.getLogger(__name__)

SEEN, UNSEEN, AUTO = "seen", "unseen", "auto"
FEW_BYTES: Final = 1024
"""What is written together and is no longer than this is read together, as good as always."""
AT_ONCE_S: Final = 0.05
"""A stream of tokens that the gateway closes so soon after the response's headers has not ended: the gateway
has been told to send us no more of it."""


class Processor:
    """What all streams share (``grpc.Service``)."""

    def __init__(
        self,
        router: Routing,
        opening: Opening,
        destinations: Destinations,
        completions: HandedOver,
        clock: Clock,
        rng: random.Random,
        *,
        responses: str = AUTO,
        max_body_bytes: int = 64 << 20,
        subsets: bool = True,
        emits_scores: bool = False,
    ) -> None:
        self.router = router
        self.opening = opening
        self.destinations = destinations
        self.completions = completions
        self.clock = clock
        self.rng = rng
        self.responses = responses
        self.max_body_bytes = max_body_bytes
        self.emits_scores = emits_scores
        self._subsets = subsets
        self._id_prefix = str(uuid.uuid4())[:-8]
        self._ids = 0

    def __call__(self, stream: Stream, metadata: Mapping[str, str]) -> Process:
        return Process(self, stream)

    def new_id(self) -> str:
        """For a request that has none."""
        self._ids += 1
        return f"{self._id_prefix}{self._ids:08x}"

    def eligible(self, head: Head) -> Eligible | None:
        """Which endpoints the gateway allows; None: all of them. Only the IP of an address counts."""
        if head.subset is None or not self._subsets:
            return None
        hosts = {host_of(address) for address in head.subset}
        return lambda endpoint: host_of(self.destinations.of(endpoint.name)) in hosts

    def address(self, decision: Decision) -> str:
        """The chosen endpoint and the fallbacks in their order, as the gateway names them."""
        chosen = self.destinations.of(decision.chosen.name)
        if not chosen:
            raise NoEndpoints(f"The address of {decision.chosen.name} is not known yet.")
        if not decision.fallbacks:
            return chosen
        others = [self.destinations.of(endpoint.name) for endpoint in decision.fallbacks]
        return ",".join((chosen, *filter(None, others)))

    def scores(self, decision: Decision) -> dict[str, float] | None:
        """The weighted sum of each endpoint's scores, by address, if that is wanted."""
        if not self.emits_scores or not decision.scores:
            return None
        totals = [0.0] * len(decision.scored)
        for name, row in decision.scores.items():
            weight = decision.weights.get(name, 1.0)
            totals = [total + weight * score for total, score in zip(totals, row, strict=True)]
        addresses = [self.destinations.of(endpoint.name) for endpoint in decision.scored]
        return dict(zip(addresses, totals, strict=True))

    def sees(self, flight: Flight, renamed: bool) -> bool:
        """Whether the response is to come through here."""
        if self.responses != AUTO:
            return self.responses == SEEN
        makes_state = api.makes_state(flight.request.path)
        return renamed or makes_state or bool(flight.decision.response_headers)


class Process:
    """One HTTP request, as the gateway tells of it (``grpc.Call``)."""

    __slots__ = (
        "_begun",
        "_body_bytes",
        "_declared",
        "_flight",
        "_head",
        "_name",
        "_names",
        "_over",
        "_parts",
        "_processor",
        "_reply",
        "_reply_s",
        "_request_mode",
        "_response_mode",
        "_started_s",
        "_stream",
        "_ttft_s",
    )

    def __init__(self, processor: Processor, stream: Stream) -> None:
        self._processor = processor
        self._stream = stream
        self._head: Head | None = None
        """Of the request, until it is decided on."""
        self._parts: list[Body] = []
        self._body_bytes = 0
        self._begun = False
        self._started_s = 0.0
        self._declared = False
        """The gateway has said in which modes it sends bodies."""
        self._request_mode = self._response_mode = FULL_DUPLEX
        self._flight: Flight | None = None
        """Ours to close."""
        self._name = ""
        self._names: ModelNames | None = None
        self._reply: Reply | None = None
        self._reply_s = 0.0
        self._ttft_s: float | None = None
        self._over = False

    # -- what the stream tells

    def message(self, data: bytes) -> None:
        if self._over:
            return
        try:
            kind, content = messages.read(data)
        except Malformed as exc:
            self.cancelled()
            self._stream.finish(INVALID_ARGUMENT, f"not a ProcessingRequest: {exc}")
            return
        _TOLD[kind](self, content)

    def half_closed(self) -> None:
        """The gateway is done with this request, or with telling us of it."""
        self.cancelled()
        self._stream.finish()

    def cancelled(self) -> None:
        """The same; Envoy ends streams either way, whether the client has left or all went well."""
        self._over = True
        flight, reply = self._flight, self._reply
        if flight is None:
            return
        if self._sees_bodies(reply):  # and has not seen the end
            self._processor.router.pool.abandoned(flight.decision.chosen)
            self._close(Ending.CANCELLED, "client_left")
        elif reply is None or reply.tells_later or self._begins(flight):
            self._hand_over(flight)
        else:
            self._close_answered(reply)

    def _begins(self, flight: Flight) -> bool:
        """Whether it is a stream of tokens that was there a moment ago only."""
        return flight.request.stream and self._processor.clock() - self._reply_s < AT_ONCE_S

    def _sees_bodies(self, reply: Reply | None) -> bool:
        """Whether the bodies of responses come through here, as far as we know."""
        if self._declared:
            return self._response_mode != NONE
        return reply is not None and reply.chunks > 0

    def resumed(self) -> None:
        """What we say is what we were told; there is nothing to hold back."""

    # -- the request

    def _request_head(self, head: Head) -> None:
        if self._begun:
            self._stream.finish(INVALID_ARGUMENT, "a second request on one stream")
            self.cancelled()
            return
        self._begun = True
        self._started_s = self._processor.clock()
        self._head = head
        self._modes(head)
        if head.end:
            self._decide_without_body(head)
        elif self._request_mode in (BUFFERED, BUFFERED_PARTIAL):
            self._stream.send(messages.REQUEST_HEADERS_SEEN)  # the body comes after it only
        elif self._request_mode != FULL_DUPLEX:
            self._decide(head, b"", of_body=False)
            if self._request_mode == NONE:
                self._close_unless_seen()

    def _modes(self, head: Head) -> None:
        if head.request_mode is not None and head.response_mode is not None:
            self._declared = True
            self._request_mode, self._response_mode = head.request_mode, head.response_mode

    def _request_body(self, body: Body) -> None:
        head = self._head
        if head is None:  # decided on without it
            if self._request_mode == FULL_DUPLEX:
                for answer in messages.chunks(True, body.data, body.end):
                    self._stream.send(answer)
            else:
                self._stream.send(messages.REQUEST_BODY_SEEN)
            if body.end:
                self._close_unless_seen()
            return
        self._parts.append(body)
        self._body_bytes += len(body.data)
        if self._body_bytes > self._processor.max_body_bytes:
            limit = self._processor.max_body_bytes
            self._refuse(head, BodyTooLarge(f"The request body is larger than {limit} bytes."))
        elif body.end or self._request_mode != FULL_DUPLEX:
            self._decide(head, self._body())

    def _body(self) -> bytes:
        parts = self._parts
        return parts[0].data if len(parts) == 1 else b"".join([part.data for part in parts])

    def _request_trailers(self, nothing: None) -> None:
        if self._head is not None:
            self._decide(self._head, self._body(), trailers=True)
        else:
            self._stream.send(messages.REQUEST_TRAILERS_SEEN)
            self._close_unless_seen()

    # -- the decision

    def _decide_without_body(self, head: Head) -> None:
        """GET and the like: any endpoint will do."""
        processor = self._processor
        self._head = None
        eligible = processor.eligible(head)
        try:
            endpoints = processor.router.candidates("", eligible)
            addresses = [processor.destinations.of(endpoint.name) for endpoint in endpoints]
            address = processor.rng.choice([a for a in addresses if a] or [""])
            if not address:
                raise NoEndpoints("No endpoint has a known address.")
        except NoEndpoints as error:
            self._refuse(head, error if eligible else PointsmanError("no pods available in datastore"))
            return
        self._stream.send(Chosen(address, (), stripped(head.headers)).with_headers())
        if processor.responses != SEEN:
            self._over = True
            self._stream.finish()

    def _decide(self, head: Head, body: bytes, *, of_body: bool = True, trailers: bool = False) -> None:
        """Have it decided on; without ``of_body`` the gateway wants to know before it sends the body."""
        processor = self._processor
        ended = self._parts[-1].end if self._parts else None
        self._parts, self._head = [], None
        try:
            request = self._parse(head, body, of_body)
            told = partial(self._decided, head, request.body is not body, ended, of_body, trailers)
            processor.opening.open(request, told, processor.eligible(head))
        except PointsmanError as error:
            self._refuse(head, error)
        except Exception:  # a plugin's bug is not the client's
            if self._flight is not None:
                raise
            log.exception("request for %s could not be decided", path_of(head.headers))
            self._refuse(head, PointsmanError("internal error; see the log"))

    def _decided(
        self,
        head: Head,
        changed: bool,
        ended: bool | None,
        of_body: bool,
        trailers: bool,
        found: Flight | PointsmanError,
    ) -> None:
        """It has been decided on: now, or after its prompts' token ids were looked for."""
        if isinstance(found, Flight):
            self._flight = found
            if self._over:
                self._close(Ending.CANCELLED, "client_left")
                return
            try:
                address = self._processor.address(found.decision)
            except NoEndpoints as error:
                self._refuse(head, error)
                return
            self._answer(head, found, address, changed, ended)
            if trailers:
                self._stream.send(messages.REQUEST_TRAILERS_SEEN)
            if of_body:
                self._close_unless_seen()
        elif not self._over:
            self._refuse(head, found)

    def _parse(self, head: Head, body: bytes, of_body: bool) -> InferenceRequest:
        headers, path = head.headers, path_of(head.headers)
        request_id = headers.get("x-request-id") or self._processor.new_id()
        if not of_body:  # the gateway wants to know before it sends the body
            return api.PASSTHROUGH.parse(request_id, path, headers, body)
        request = self._processor.router.format_of(path).parse(request_id, path, headers, body)
        if _REWRITES.isdisjoint(headers):
            return request
        asked = next(filter(None, map(headers.get, MODEL_REWRITE)), "")
        if not asked or not request.model or asked == request.model:
            return request
        self._names = ModelNames(asked, request.model)
        return rewritten(request)

    def _answer(self, head: Head, flight: Flight, address: str, changed: bool, ended: bool | None) -> None:
        """Tell the gateway where the request goes, and give its body back.

        ``ended``: the last piece of the body has come; None: no piece has.
        """
        processor, send = self._processor, self._stream.send
        request = flight.request
        sets = list(flight.decision.request_headers)
        removed = tuple(name for name in stripped(head.headers) if name not in dict(sets))
        if "x-request-id" not in head.headers:
            sets.append(("x-request-id", request.id))
        if request.body and (changed or self._request_mode == FULL_DUPLEX):
            sets.append(("content-length", str(len(request.body))))
        self._name = processor.completions.name()
        chosen = Chosen(address, sets, removed, self._name, processor.scores(flight.decision))
        if self._request_mode in (BUFFERED, BUFFERED_PARTIAL):
            send(chosen.with_body(request.body if changed else None))
            return
        send(chosen.with_headers())
        if ended is None:
            return
        # What the endpoint answers before our end of the stream has reached the gateway comes to us and is
        # lost. So the endpoint gets the end of the request in the same few bytes as the gateway ours.
        large = len(request.body) > FEW_BYTES and self._response_mode == FULL_DUPLEX
        apart = ended and large and not self._sees(flight)
        for piece in messages.chunks(True, request.body, ended and not apart):
            send(piece)
        if apart:
            send(messages.REQUEST_BODY_END)

    def _sees(self, flight: Flight) -> bool:
        return self._processor.sees(flight, self._names is not None)

    def _close_unless_seen(self) -> None:
        """The request phase is over: without us the gateway passes the response on for nothing."""
        flight = self._flight
        if flight is not None and not self._sees(flight):
            self._hand_over(flight)
            self._over = True
            self._stream.finish()

    def _hand_over(self, flight: Flight) -> None:
        """We see no more of it."""
        self._flight = None
        self._processor.completions.add(self._name, flight, self._started_s)

    def _refuse(self, head: Head, error: PointsmanError) -> None:
        processor = self._processor
        self._over, self._parts, self._head = True, [], None
        self._stream.send(refusal(error, grpc=is_grpc(head.headers)))
        self._stream.finish()
        request_id, path = head.headers.get("x-request-id", ""), path_of(head.headers)
        outcome = Outcome(
            ending=Ending.REFUSED,
            status=error.status,
            tries=0,
            duration_s=processor.clock() - self._started_s,
            request_bytes=self._body_bytes,
            reason=error.reason,
        )
        flight, self._flight = self._flight, None
        if flight is None:
            processor.router.observe(InferenceRequest(id=request_id, path=path, format=""), None, outcome)
        else:
            processor.router.close(flight, outcome)

    # -- the response

    def _response_head(self, head: Head) -> None:
        flight = self._flight
        self._modes(head)
        reply = self._begin_reply(head)
        if flight is not None:
            follow(self._processor.router, self._processor.destinations, flight, head.served)
            if not reply.tells_later:
                self._account(flight, reply.status)
        self._stream.send(reply.head(flight.decision if flight else None))
        if head.end:
            self._close_answered(reply)

    def _begin_reply(self, head: Head) -> Reply:
        request = self._flight.request if self._flight else None
        self._reply_s = self._processor.clock()
        reply = self._reply = Reply(request, head, self._response_mode, self._names)
        return reply

    def _account(self, flight: Flight, status: int) -> None:
        """What the answer says of the endpoint's health: 5xx is a fault, but for 503, which says busy."""
        pool, chosen = self._processor.router.pool, flight.decision.chosen
        if status >= 500 and status != 503:
            pool.failed(chosen)
        elif pool.troubled:
            if status == 503:
                pool.abandoned(chosen)
            else:
                pool.answered(chosen)

    def _response_body(self, body: Body) -> None:
        reply = self._reply
        if reply is None:  # a gateway that keeps the response's headers to itself
            reply = self._begin_reply(Head({":status": "200"}, False, None, "", None, None))
        for answer in reply.piece(body):
            self._stream.send(answer)
        flight = self._flight
        if flight is None:
            return
        if body.data:
            flight.received(len(body.data))
            if reply.chunks == 1:
                now = self._processor.clock()
                flight.first_output(now)
                self._ttft_s = now - self._started_s
            made = reply.made(body.data)
            if made:
                self._processor.router.remember(flight, made)
        if body.end:
            self._close_answered(reply)

    def _response_trailers(self, trailers: Head) -> None:
        reply = self._reply
        if reply is not None:
            reply.trailers(trailers.headers)
            for answer in reply.rest():
                self._stream.send(answer)
            self._close_answered(reply)
        self._stream.send(messages.RESPONSE_TRAILERS_SEEN)

    # -- the end

    def _close_answered(self, reply: Reply) -> None:
        if reply.tells_later and self._flight is not None:
            self._account(self._flight, reply.status)
        if reply.status < 400:
            self._close(Ending.OK, "")
        else:
            self._close(Ending.ERROR, f"status_{reply.status}")

    def _close(self, ending: Ending, reason: str) -> None:
        flight, self._flight = self._flight, None
        if flight is None:
            return
        processor, reply = self._processor, self._reply
        processor.router.close(
            flight,
            Outcome(
                ending=ending,
                status=reply.status if reply else 0,
                endpoint=flight.decision.chosen.name,
                tries=len(flight.tried),
                decided_s=flight.decision.at_s - self._started_s,
                ttft_s=self._ttft_s,
                duration_s=processor.clock() - self._started_s,
                chunks=reply.chunks if reply else 0,
                request_bytes=len(flight.request.body),
                response_bytes=reply.body_bytes if reply else 0,
                usage=reply.usage() if reply else NO_USAGE,
                reason=reason,
            ),
        )


_REWRITES: Final = frozenset(MODEL_REWRITE)
_TOLD: Final[Mapping[int, Callable[[Process, Any], None]]] = {  # Any: each gets what messages.read says
    REQUEST_HEADERS: Process._request_head,
    RESPONSE_HEADERS: Process._response_head,
    REQUEST_BODY: Process._request_body,
    RESPONSE_BODY: Process._response_body,
    REQUEST_TRAILERS: Process._request_trailers,
    RESPONSE_TRAILERS: Process._response_trailers,
}
