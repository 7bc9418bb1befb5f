"""The endpoint picker's side of a gateway, without sockets: what Envoy would say, and what it is told."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from pointsman.config import Endpoint as EndpointSettings
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import targets_of
from pointsman.errors import PointsmanError
from pointsman.extproc.completions import Completions
from pointsman.extproc.destinations import Destinations
from pointsman.extproc.headers import DESTINATION
from pointsman.extproc.processor import SEEN, Process, Processor
from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.follow import follow
from pointsman.proxy.opening import Told
from pointsman.router import Eligible, Flight, Observer, Router
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.presets import build_scheduler, load_policy
from pointsman.types import Decision, InferenceRequest, Load, Metrics, Outcome

CHAT = "/v1/chat/completions"
HOSTS = ("10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000")


class Ended(list[Outcome]):
    """An observer that keeps what became of requests."""

    def __call__(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        self.append(outcome)


class Direct:
    """Decisions at once, or as soon as somebody calls what is ``waiting`` (``opening.Opening``)."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self.waiting: list[Callable[[], None]] | None = None
        """Decisions to be made; None: they are made at once."""

    def open(self, request: InferenceRequest, told: Told, eligible: Eligible | None = None) -> None:
        def decide() -> None:
            try:
                found: Flight | PointsmanError = self._router.open(request, eligible)
            except PointsmanError as error:
                found = error
            told(found)

        if self.waiting is None:
            decide()
        else:
            self.waiting.append(decide)

    def reopen(self, flight: Flight, told: Callable[[bool], None]) -> None:
        told(self._router.reopen(flight))


class Stage:
    """A processor over a pool that no network is behind; ``now_s`` is its clock."""

    def __init__(
        self,
        hosts: Sequence[str] = HOSTS,
        *,
        policy: str = "llm-d-blend",
        picker_config: str | None = None,
        responses: str = SEEN,
        timeout_s: float = 600.0,
        more_observers: Sequence[Observer] = (),
        max_body_bytes: int = 64 << 20,
        subsets: bool = True,
        emits_scores: bool = False,
    ) -> None:
        self.now_s = 100.0
        clock: Callable[[], float] = lambda: self.now_s  # noqa: E731
        self.pool, index = Pool(clock), PrefixIndex()
        follow(index, self.pool)
        targets = [target for host in hosts for target in targets_of(EndpointSettings(url=f"http://{host}"))]
        self.pool.apply("test", targets)
        self.ended = Ended()
        services = Services(index, clock, random.Random(0))
        self.router = Router(
            self.pool,
            build_scheduler(load_policy(policy, picker_config=picker_config), services),
            (self.ended, *more_observers),
            sees_responses=responses == SEEN,
            knows_models=False,
        )
        destinations = Destinations(self.pool)
        self.completions = Completions(self.router, destinations, clock, timeout_s)
        self.opening = Direct(self.router)
        self.processor = Processor(
            self.router,
            self.opening,
            destinations,
            self.completions,
            clock,
            random.Random(0),
            responses=responses,
            max_body_bytes=max_body_bytes,
            subsets=subsets,
            emits_scores=emits_scores,
        )

    def load(self, host: str) -> Load:
        return self.pool.members[host].endpoint.load

    def in_flight(self) -> int:
        """Requests and uncached tokens in flight, over all endpoints."""
        loads = [member.endpoint.load for member in self.pool.members.values()]
        assert all(load.requests >= 0 and load.tokens >= 0 for load in loads)
        return sum(load.requests + load.tokens for load in loads)

    def page(self, host: str, **said: float) -> None:
        """The engine's metrics page says this now."""
        self.pool.learn_metrics(host, "vllm", Metrics(at_s=self.now_s, **said), False)  # type: ignore[arg-type]

    def call(self) -> Gateway:
        """A new request's stream."""
        return Gateway(self.processor)


class Gateway:
    """One request's stream as Envoy holds it (``grpc.Stream``)."""

    def __init__(self, processor: Processor) -> None:
        self.sent: list[pb.ProcessingResponse] = []
        self.finished: int | None = None
        """The status the picker ended the stream with."""
        self.paused = False
        self.process: Process = processor(self, {})

    # -- what the picker says

    def send(self, message: bytes) -> None:
        assert self.finished is None, "said after the end"
        self.sent.append(pb.ProcessingResponse.FromString(message))

    def finish(self, status: int = 0, message: str = "") -> None:
        if self.finished is None:
            self.finished = status

    def taken(self) -> list[pb.ProcessingResponse]:
        """What the picker has said since this was asked last."""
        sent, self.sent = self.sent, []
        return sent

    # -- what Envoy says; each returns the answers

    def tell(self, message: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        self.process.message(message.SerializeToString())
        return self.taken()

    def head(
        self,
        path: str = CHAT,
        *,
        method: str = "POST",
        end: bool = False,
        modes: tuple[int, int] | None = (4, 4),
        subset: object = None,
        **headers: str,
    ) -> list[pb.ProcessingResponse]:
        """Request headers; ``modes`` are the body modes (request, response), as newer Envoys declare them."""
        message = pb.ProcessingRequest()
        given = {":method": method, ":path": path, ":authority": "x", "content-type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        _headers(message.request_headers, given, end)
        if modes:
            message.protocol_config.request_body_mode, message.protocol_config.response_body_mode = modes
        if subset is not None:
            spaces = message.metadata_context.filter_metadata
            spaces["envoy.lb.subset_hint"].update({f"{DESTINATION}-subset": subset})
        return self.tell(message)

    def body(self, data: bytes, end: bool = True) -> list[pb.ProcessingResponse]:
        message = pb.ProcessingRequest()
        message.request_body.body, message.request_body.end_of_stream = data, end
        return self.tell(message)

    def trailers(self) -> list[pb.ProcessingResponse]:
        message = pb.ProcessingRequest()
        message.request_trailers.SetInParent()
        return self.tell(message)

    def response(
        self, status: int = 200, *, end: bool = False, served: str = "", **headers: str
    ) -> list[pb.ProcessingResponse]:
        """Response headers."""
        message = pb.ProcessingRequest()
        given = {":status": str(status), "content-type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        _headers(message.response_headers, given, end)
        if served:
            message.metadata_context.filter_metadata["envoy.lb"].update({f"{DESTINATION}-served": served})
        return self.tell(message)

    def reply(self, data: bytes, end: bool = True) -> list[pb.ProcessingResponse]:
        """A piece of the response's body."""
        message = pb.ProcessingRequest()
        message.response_body.body, message.response_body.end_of_stream = data, end
        return self.tell(message)

    def response_trailers(self, **trailers: str) -> list[pb.ProcessingResponse]:
        message = pb.ProcessingRequest()
        message.response_trailers.SetInParent()
        for name, value in trailers.items():
            field = message.response_trailers.trailers.headers.add()
            field.key, field.raw_value = name.replace("_", "-"), value.encode("latin-1")
        return self.tell(message)


def _headers(into: pb.HttpHeaders, headers: Mapping[str, str], end: bool) -> None:
    for name, value in headers.items():
        header = into.headers.headers.add()
        header.key, header.raw_value = name, value.encode("latin-1")
    into.end_of_stream = end


def headers_set(answer: pb.ProcessingResponse) -> dict[str, str]:
    """Headers that an answer sets."""
    which = answer.WhichOneof("response")
    if which == "immediate_response":
        mutation = answer.immediate_response.headers
    else:
        mutation = getattr(answer, which).response.header_mutation
    return {h.header.key: h.header.raw_value.decode("latin-1") for h in mutation.set_headers}


def destination(answer: pb.ProcessingResponse) -> str:
    """Where the request goes, which header and metadata must agree on."""
    header = headers_set(answer)[DESTINATION]
    assert answer.dynamic_metadata["envoy.lb"][DESTINATION] == header
    return header


def bodies(answers: Sequence[pb.ProcessingResponse], kind: str = "request_body") -> list[tuple[bytes, bool]]:
    """The pieces of a body that goes on, and whether each is the last."""
    found = []
    for answer in answers:
        if answer.WhichOneof("response") == kind:
            piece = getattr(answer, kind).response.body_mutation.streamed_response
            found.append((piece.body, piece.end_of_stream))
    return found
