"""For each case pickers with that one behaviour broken: the case must fail over each of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from reference_picker import (
    DESTINATION,
    STRIPPED,
    STRIPPED_OLD,
    Endpoint,
    Flow,
    Message,
    OutOfPlace,
    Picker,
    Refused,
    Response,
    body_answer,
)


def broken(**changed: Any) -> type[Picker]:
    """The reference picker with these attributes and methods instead of its own."""
    return type("Broken", (Picker,), changed)


def unweighted(*scorers: str) -> type[Picker]:
    """These scorers count for nothing."""

    def terms(
        self: Picker, flow: Flow, endpoint: Endpoint, endpoints: Sequence[Endpoint]
    ) -> dict[str, float]:
        found = Picker.terms(self, flow, endpoint, endpoints)
        return {name: 0.0 if name in scorers else term for name, term in found.items()}

    return broken(terms=terms)


def altered(kind: str, change: Any) -> type[Picker]:
    """Answers of this kind are changed: ``change(flow, response)`` gives those to send instead."""

    def answers(self: Picker, flow: Flow, message: Message) -> Iterator[Response]:
        for response in Picker.answers(self, flow, message):
            if response.WhichOneof("response") == kind:
                yield from change(flow, response)
            else:
                yield response

    return broken(answers=answers)


def common(response: Response) -> Any:
    return getattr(response, response.WhichOneof("response")).response


def streamed(response: Response) -> Any:
    return common(response).body_mutation.streamed_response


def without(kind: str, clear: Any) -> type[Picker]:
    """Answers of this kind lack what ``clear`` takes away."""

    def change(flow: Flow, response: Response) -> Iterator[Response]:
        clear(response)
        yield response

    return altered(kind, change)


# -- placement


def lost_the_weights(self: Picker, flow: Flow, endpoints: list[Endpoint]) -> list[Endpoint]:
    return list(reversed(Picker.ordered(self, flow, endpoints)))


def sheds(self: Picker, endpoints: list[Endpoint]) -> list[Endpoint]:
    return [e for e in endpoints if e.waiting <= 5]


def knows_models(self: Picker, flow: Flow) -> None:
    Picker.parse(self, flow)
    if flow.model not in ("base", "adapter-a", "adapter-b"):
        raise Refused(404, "no such model")


def says_more(self: Picker, flow: Flow) -> Iterator[Response]:
    yield from Picker.headers_only(self, flow)
    yield body_answer("request_body", b"", True)


def worst_last_first(self: Picker, flow: Flow) -> list[Endpoint]:
    found = Picker.schedule(self, flow)
    return [found[0], *reversed(found[1:])]


def no_metadata_headers_only(
    self: Picker, flow: Flow, destination: str, endpoints: Sequence[Endpoint]
) -> Any:
    return Picker.metadata(self, flow, destination, endpoints) if endpoints else {}


def one_score(self: Picker, flow: Flow, destination: str, endpoints: Sequence[Endpoint]) -> Any:
    fields = Picker.metadata(self, flow, destination, endpoints)
    scores = fields.get(f"{DESTINATION}-scores", {})
    return fields | ({f"{DESTINATION}-scores": {destination: scores[destination]}} if scores else {})


# -- request


def body_first(self: Picker, flow: Flow, trailers: bool) -> Iterator[Response]:
    answers = list(Picker.whole(self, flow, trailers))
    yield from (*answers[1:-1], answers[0], answers[-1]) if len(answers) > 2 else reversed(answers)


def rewritten(self: Picker, flow: Flow) -> None:
    Picker.parse(self, flow)
    flow.body = json.dumps(json.loads(flow.body)).encode()


def no_length(self: Picker, flow: Flow, destination: str, length: int | None) -> dict[str, bytes]:
    return Picker.set_headers(self, flow, destination, None)


def last_piece(self: Picker, flow: Flow, data: bytes, end: bool) -> Iterator[Response]:
    flow.body = data
    if end:
        yield from self.whole(flow, trailers=False)


def skips_empty(self: Picker, flow: Flow, data: bytes, end: bool) -> Iterator[Response]:
    if data:
        yield from Picker.request_body(self, flow, data, end)


def at_once(self: Picker, flow: Flow, message: Message) -> Iterator[Response]:
    for response in Picker.answers(self, flow, message):
        if not response.HasField("request_headers"):
            yield response
    if message.HasField("request_headers"):
        response = Response()
        self.mutate(flow, response.request_headers.response, self.endpoints[0].address, None)
        yield response


def ends_twice(self: Picker, flow: Flow, trailers: bool) -> Iterator[Response]:
    for response in Picker.whole(self, flow, trailers):
        if trailers and response.HasField("request_body"):
            streamed(response).end_of_stream = True
        yield response


def needs_modes(self: Picker, flow: Flow, message: Message) -> None:
    Picker.first(self, flow, message)
    if not message.HasField("protocol_config"):
        raise OutOfPlace("no modes")


def query_matters(self: Picker, flow: Flow) -> str:
    return flow.header(":path", "x-original-path", "x-forwarded-path") or "/v1/completions"


def original_path_alone(self: Picker, flow: Flow) -> str:
    return (flow.header(":path", "x-original-path") or "/v1/completions").partition("?")[0]


# -- refusals


def status(text: str, code: int) -> type[Picker]:
    """Refusals with this in their text have another status."""

    def refusal(self: Picker, refused: Refused) -> Response:
        if text in refused.text:
            refused.status = code
        return Picker.refusal(self, refused)

    return broken(refusal=refusal)


def reason(old: str, new: str) -> type[Picker]:
    def refusal(self: Picker, refused: Refused) -> Response:
        refused.reason = new if refused.reason == old else refused.reason
        return Picker.refusal(self, refused)

    return broken(refusal=refusal)


def reads_all(self: Picker, path: str) -> bool:
    try:
        return Picker.reads(self, path)
    except Refused:
        return True


def dies(self: Picker) -> None:
    """From now on every message is an error."""
    self.answers = lambda flow, message: iter(_raise())  # type: ignore[method-assign]


def _raise() -> list[Response]:
    raise OutOfPlace("the picker is dead")


async def dies_of_it(self: Picker, context: Any, error: Exception) -> None:
    dies(self)
    await Picker.wrong(self, context, error)


# -- subset


def first_listed(self: Picker, members: Sequence[str]) -> list[Endpoint]:
    hosts = [member.rpartition(":")[0] for member in members]
    return sorted(Picker.matching(self, members), key=lambda e: hosts.index(e.host))[:1]


def no_strangers(self: Picker, members: Sequence[str]) -> list[Endpoint]:
    found = Picker.matching(self, members)
    return found if len(found) == len(members) else []


def else_all(self: Picker, members: Sequence[str]) -> list[Endpoint]:
    return Picker.matching(self, members) or (self.endpoints if members else [])


def by_port_too(self: Picker, members: Sequence[str]) -> list[Endpoint]:
    return [e for e in self.endpoints if e.address in members]


def empty_is_none(self: Picker, hint: object) -> bool:
    return bool(hint) and Picker.is_hint(self, hint)


def one_is_a_list(self: Picker, flow: Flow) -> list[Endpoint]:
    hint = flow.metadata.get("envoy.lb.subset_hint", {}).get(f"{DESTINATION}-subset")
    return self.matching([hint]) if isinstance(hint, str) else Picker.candidates(self, flow)


def odd_is_none(self: Picker, hint: object) -> bool:
    return Picker.is_hint(self, hint) and all(isinstance(each, str) for each in hint)  # type: ignore[attr-defined]


# -- bodies


def loses_the_end(self: Picker, kind: str, body: bytes, size: int, end: bool) -> Iterator[Response]:
    for response in Picker.body_answers(self, kind, body, size, end):
        if kind == "request_body" and len(body) % size == 0:
            response = body_answer(kind, streamed(response).body, False)
        yield response


def reads_everything(self: Picker, path: str) -> bool:
    return True


def twice_nothing(self: Picker, kind: str, body: bytes, size: int, end: bool) -> Iterator[Response]:
    if not body:
        yield body_answer(kind, b"", False)
    yield from Picker.body_answers(self, kind, body, size, end)


def replaces(self: Picker, flow: Flow, trailers: bool) -> Iterator[Response]:
    flow.body = flow.body.decode(errors="replace").encode()
    yield from Picker.whole(self, flow, trailers)


def not_so_deep(self: Picker, body: bytes) -> object:
    if body.count(b"[") > 10_000:
        raise OutOfPlace("too deep")
    return json.loads(body)


def cut_event(self: Picker, flow: Flow, data: bytes) -> bytes:
    return data[:62_000]


# -- headers


def takes_authorization(self: Picker) -> Sequence[str]:
    return (*Picker.removed(self), "authorization")


def short_headers(self: Picker, value: bytes) -> bytes:
    return value[:8192]


def rebuilt(self: Picker, flow: Flow, destination: str, length: int | None) -> dict[str, bytes]:
    """Every header is set again, as text."""
    assert flow.headers is not None
    mine = {name: value.decode(errors="replace").encode() for name, value in flow.headers.items()}
    mine = {name: value for name, value in mine.items() if name not in (*STRIPPED, *STRIPPED_OLD)}
    return mine | Picker.set_headers(self, flow, destination, length)


def cut_headers(self: Picker, flow: Flow, destination: str, length: int | None) -> dict[str, bytes]:
    return {name: value[:8192] for name, value in rebuilt(self, flow, destination, length).items()}


def added_if_absent(self: Picker, flow: Flow, name: str) -> str:
    return "ADD_IF_ABSENT" if name == DESTINATION else Picker.append_action(self, flow, name)


def added_without_a_body(self: Picker, flow: Flow, name: str) -> str:
    return (
        added_if_absent(self, flow, name) if flow.header(":method") == "GET" else "OVERWRITE_IF_EXISTS_OR_ADD"
    )


def always_another_id(self: Picker, flow: Flow, destination: str, length: int | None) -> dict[str, bytes]:
    return Picker.set_headers(self, flow, destination, length) | {"x-request-id": self.new_id().encode()}


# -- rewrite


def replaces_all(self: Picker, flow: Flow, target: str) -> None:
    flow.model = target
    flow.body = flow.body.replace(flow.client_model.encode(), target.encode())


def length_of_the_old(self: Picker, flow: Flow, trailers: bool) -> Iterator[Response]:
    length = str(len(flow.body)).encode()
    for response in Picker.whole(self, flow, trailers):
        if response.HasField("request_headers"):
            for option in common(response).header_mutation.set_headers:
                if option.header.key == "content-length":
                    option.header.raw_value = length
        yield response


def for_the_clients_model(self: Picker, flow: Flow, endpoint: Endpoint) -> float:
    asked = Flow(model=flow.client_model)
    return Picker.lora(self, asked, endpoint)


def new_name(self: Picker, flow: Flow) -> str:
    return flow.header("x-llm-d-model-name-rewrite")


def old_name_first(self: Picker, flow: Flow) -> str:
    return flow.header("x-gateway-model-name-rewrite", "x-llm-d-model-name-rewrite")


def renames_one_event(self: Picker, flow: Flow, data: bytes) -> bytes:
    if flow.response:
        return data
    flow.response = data
    return self.renamed(flow, data)


# -- response


def held_until_the_body(self: Picker, flow: Flow, headers: dict[str, bytes], end: bool) -> Iterator[Response]:
    list(Picker.response_headers(self, flow, headers, end))
    return iter(())


def chunk_by_chunk(self: Picker, flow: Flow, content_type: bytes) -> bool:
    return True


def loses_what_was_before(self: Picker, flow: Flow, data: bytes, end: bool) -> Iterator[Response]:
    flow.response = b""
    yield from Picker.response_body(self, flow, data, end)


def strict(self: Picker, body: bytes) -> None:
    try:
        self.use(json.loads(body))
    except ValueError as exc:
        raise OutOfPlace("the response is no JSON") from exc


def says_more_of_it(self: Picker, flow: Flow, headers: dict[str, bytes], end: bool) -> Iterator[Response]:
    yield from Picker.response_headers(self, flow, headers, end)
    if end:
        yield body_answer("response_body", b"", True)


def ends_with_the_headers(
    self: Picker, flow: Flow, headers: dict[str, bytes], end: bool
) -> Iterator[Response]:
    yield from Picker.response_headers(self, flow, headers, end)
    if flow.bodyless:
        yield body_answer("response_body", b"", True)


def errors_are_ours(self: Picker, flow: Flow, headers: dict[str, bytes], end: bool) -> Iterator[Response]:
    if not headers[":status"].startswith(b"2"):
        raise Refused(502, "the endpoint failed")
    yield from Picker.response_headers(self, flow, headers, end)


def in_two(self: Picker, flow: Flow, data: bytes, end: bool) -> Iterator[Response]:
    yield body_answer("response_body", data[:5], False)
    yield body_answer("response_body", data[5:], end)


def never_empty(self: Picker, flow: Flow, data: bytes, end: bool) -> Iterator[Response]:
    yield body_answer("response_body", data or b"\n", end)


def exact_type(self: Picker, flow: Flow, content_type: bytes) -> bool:
    return content_type == b"text/event-stream" or flow.stream


def type_alone(self: Picker, flow: Flow, content_type: bytes) -> bool:
    return b"text/event-stream" in content_type


def trailers_ended(self: Picker, flow: Flow) -> Iterator[Response]:
    if not flow.sse:
        yield from self.response_whole(flow, end=True)
    yield Response(response_trailers=ext_proc.TrailersResponse())


def sse_trailers_unanswered(self: Picker, flow: Flow) -> Iterator[Response]:
    if not flow.sse:
        yield from Picker.response_trailers(self, flow)


def only_the_chosen(self: Picker, flow: Flow, metadata: dict[str, Any]) -> None:
    served = metadata.get("envoy.lb", {}).get(f"{DESTINATION}-served")
    if served and flow.chosen and served != flow.chosen.address:
        raise OutOfPlace("another endpoint was served")


# -- streams


async def ends_in_anger(self: Picker, context: Any) -> None:
    await context.abort(grpc.StatusCode.INTERNAL, "I was not done")


async def never_ends(self: Picker, context: Any) -> None:
    await asyncio.Event().wait()


class SharedBody(Picker):
    """All streams have one buffer."""

    buffer = b""

    def request_body(self, flow: Flow, data: bytes, end: bool) -> Iterator[Response]:
        self.buffer += data
        flow.body = self.buffer
        if end:
            self.buffer = b""
            yield from self.whole(flow, trailers=False)


class FewStreams(Picker):
    """A hundred streams, and no more."""

    streams = 0

    async def process(self, messages: Any, context: Any) -> Any:
        self.streams += 1
        try:
            if self.streams > 100:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many streams")
            async for answer in Picker.process(self, messages, context):
                yield answer
        finally:
            self.streams -= 1


# -- in flight


def never_counts(self: Picker, flow: Flow) -> None:
    """Requests under way are not counted."""


def keeps_its_place(self: Picker, flow: Flow) -> None:
    """Until the stream ends."""


def counts_early(self: Picker, flow: Flow, message: Message) -> None:
    Picker.first(self, flow, message)
    for endpoint in self.candidates(flow):
        endpoint.under_way += 1  # and nobody takes it back


def only_after_a_response(self: Picker, flow: Flow) -> None:
    if flow.answered:
        self.release(flow)


def only_before_a_response(self: Picker, flow: Flow) -> None:
    if not flow.answered:
        self.release(flow)


def twice(self: Picker, flow: Flow) -> None:
    if flow.counted is not None:
        flow.counted.under_way -= 1
    self.release(flow)


# -- affinity


def same_token(self: Picker, endpoint: Endpoint) -> str:
    return "bm9ib2R5"


def no_pin(self: Picker, flow: Flow, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
    return []


def always_holds(self: Picker, flow: Flow, endpoint: Endpoint) -> bool:
    return True


def never_holds(self: Picker, flow: Flow, endpoint: Endpoint) -> bool:
    return False


# -- pool


def reads_once(self: Picker) -> None:
    if not self.endpoints:
        Picker.read_endpoints(self)


def only_those_that_tell(self: Picker) -> list[Endpoint]:
    return [e for e in self.endpoints if e.told]


# -- service


def health_without(service: str) -> type[Picker]:
    return broken(health=lambda self, name: 2 if name == service else Picker.health(self, name))


def no_use(self: Picker, data: bytes) -> None:
    """Usage is not looked at."""


def target_alone(self: Picker, flow: Flow) -> str:
    destination = Picker.decide(self, flow)
    self.requests = type(self.requests)({(target, target): n for (_, target), n in self.requests.items()})
    return destination


BROKEN: dict[str, tuple[type[Picker], ...]] = {
    "lowest-load": (
        unweighted("queue-scorer", "kv-cache-utilization-scorer"),
        broken(ordered=lost_the_weights),
    ),
    "kv-cache-breaks-ties": (unweighted("kv-cache-utilization-scorer"),),
    "lora-at-equal-load": (unweighted("lora-affinity-scorer"),),
    "lora-over-kv-cache": (broken(lora=lambda self, flow, e: 0.1 * Picker.lora(self, flow, e)),),
    "no-shedding-by-default": (broken(filtered=sheds),),
    "unknown-model": (broken(parse=knows_models),),
    "headers-only": (broken(headers_only=says_more),),
    "fallback-list": (
        broken(schedule=worst_last_first),
        broken(schedule=lambda self, flow: Picker.schedule(self, flow)[:1]),
    ),
    "destination-in-metadata": (without("request_headers", lambda r: r.ClearField("dynamic_metadata")),),
    "headers-only-metadata": (broken(metadata=no_metadata_headers_only),),
    "scores-told": (broken(tells_scores=lambda self: False), broken(metadata=one_score)),
    "scores-not-told": (broken(tells_scores=lambda self: True),),
    "header-answer-first": (broken(whole=body_first),),
    "clear-route-cache": (broken(clear_route_cache=False),),
    "body-unchanged": (broken(parse=rewritten),),
    "content-length": (broken(set_headers=no_length),),
    "split-body": (broken(request_body=last_piece),),
    "end-in-an-empty-message": (broken(request_body=skips_empty), broken(request_body=last_piece)),
    "nothing-before-the-end": (broken(answers=at_once),),
    "request-trailers": (broken(whole=ends_twice),),
    "without-modes": (broken(first=needs_modes),),
    "buffered-request": (
        without("request_body", lambda r: common(r).ClearField("header_mutation")),
        without("request_body", lambda r: common(r).ClearField("clear_route_cache")),
    ),
    "path-with-query": (broken(path=query_matters),),
    "path-of-a-rewriting-proxy": (broken(path=original_path_alone),),
    "invalid-json": (status("invalid JSON", 500), broken(refusal_text=lambda self, refused: "no")),
    "no-model": (broken(no_model="something is missing"), status("model not found", 404)),
    "error-text": (broken(refusal_text=lambda self, refused: refused.text),),
    "no-parser": (broken(reads=reads_all),),
    "refused-alone": (broken(refused=dies),),
    "no-endpoints": (status("no endpoint", 500), reason("rejected-no-endpoints", "")),
    "no-endpoints-headers-only": (
        status("no pods", 503),
        broken(nothing_there=lambda self: Refused(500, "nothing there")),
    ),
    "all-filtered-out": (
        broken(filtered=lambda self, endpoints: Picker.filtered(self, endpoints) or endpoints),
        reason("rejected-saturated", "rejected-no-endpoints"),
        status("all endpoints are full", 503),
    ),
    "subset-best": (broken(matching=first_listed), broken(is_hint=lambda self, hint: False)),
    "subset-of-one": (broken(matching=no_strangers),),
    "subset-without-match": (broken(matching=else_all), status("no endpoint", 429)),
    "subset-empty": (broken(is_hint=empty_is_none), reason("rejected-no-endpoints", "")),
    "subset-ports": (broken(matching=by_port_too),),
    "subset-no-list": (broken(candidates=one_is_a_list),),
    "subset-odd-members": (broken(is_hint=odd_is_none),),
    "subset-switched-off": (broken(is_hint=lambda self, hint: isinstance(hint, list)),),
    "body-over-62000": (broken(chunk_bytes=64 * 1024), broken(chunk_bytes=62_001)),
    "body-of-62000": (broken(body_answers=loses_the_end), broken(chunk_bytes=62_001)),
    "body-of-8-mb": (broken(max_body_bytes=4_000_000),),
    "body-not-read": (broken(reads=reads_everything),),
    "body-of-nothing": (broken(body_answers=twice_nothing),),
    "body-not-utf8": (broken(whole=replaces),),
    "body-deeply-nested": (broken(loads=not_so_deep),),
    "response-over-62000": (broken(response_chunk_bytes=64 * 1024),),
    "event-over-62000": (broken(renamed_event=cut_event),),
    "client-headers-kept": (broken(removed=takes_authorization),),
    "header-of-60-kb": (broken(set_headers=cut_headers),),
    "header-not-utf8": (broken(set_headers=rebuilt),),
    "steering-stripped": (broken(removed=lambda self: (*STRIPPED[:-1], *STRIPPED_OLD)),),
    "old-steering-stripped": (broken(removed=lambda self: STRIPPED),),
    "destination-replaced": (broken(append_action=added_if_absent),),
    "destination-replaced-headers-only": (broken(append_action=added_without_a_body),),
    "request-id-made": (broken(new_id=lambda self: ""), broken(new_id=lambda self: "1")),
    "request-id-kept": (broken(set_headers=always_another_id),),
    "debug-header": (broken(response_set=lambda self, flow: {}),),
    "rewrite": (broken(rewrite=replaces_all), broken(target=lambda self, flow: "")),
    "rewrite-content-length": (broken(whole=length_of_the_old),),
    "rewrite-steers": (broken(lora=for_the_clients_model),),
    "rewrite-old-name": (broken(target=new_name),),
    "rewrite-new-name-counts": (broken(target=old_name_first),),
    "rewrite-back": (broken(renamed=lambda self, flow, data: data),),
    "rewrite-back-streamed": (broken(renamed_event=renames_one_event),),
    "response-headers-at-once": (broken(response_headers=held_until_the_body),),
    "response-in-one-chunk": (
        without("response_body", lambda r: streamed(r).ClearField("end_of_stream")),
        without("response_body", lambda r: streamed(r).ClearField("body")),
    ),
    "response-in-chunks": (broken(streams=chunk_by_chunk),),
    "response-ends-empty": (broken(response_body=loses_what_was_before),),
    "response-not-json": (broken(use_json=strict),),
    "response-empty": (broken(renamed=lambda self, flow, data: data or b"\n"),),
    "response-headers-only": (broken(response_headers=says_more_of_it),),
    "response-of-an-error": (broken(response_headers=errors_are_ours),),
    "events-one-to-one": (broken(event=in_two),),
    "events-end-empty": (broken(event=never_empty),),
    "events-by-content-type": (broken(streams=exact_type),),
    "events-by-request": (broken(streams=type_alone),),
    "response-trailers": (
        broken(response_trailers=trailers_ended),
        broken(response_trailers=sse_trailers_unanswered),
    ),
    "response-body-not-sent": (broken(response_headers=ends_with_the_headers),),
    "served-endpoint-told": (broken(served=only_the_chosen),),
    "ends-after-the-response": (broken(half_closed=ends_in_anger), broken(half_closed=never_ends)),
    "ends-when-the-proxy-does": (broken(half_closed=never_ends),),
    "streams-at-once": (SharedBody, FewStreams),
    "message-of-garbage": (broken(wrong=dies_of_it),),
    "message-out-of-place": (broken(wrong=dies_of_it),),
    "under-way-counts": (broken(count=never_counts),),
    "ended-counts-no-more": (broken(ended=keeps_its_place), broken(ended=twice)),
    "cut-before-the-end": (broken(first=counts_early),),
    "cut-after-scheduling": (broken(cut=only_after_a_response), broken(cut=twice)),
    "cut-in-the-response": (broken(cut=only_before_a_response), broken(cut=twice)),
    "session-token-given": (broken(token=same_token),),
    "session-token-followed": (broken(pinned=no_pin),),
    "prefix-followed": (unweighted("prefix-cache-scorer"),),
    "prefix-if-available": (broken(holds=always_holds), broken(holds=never_holds)),
    "prefix-by-model-and-salt": (
        broken(root=lambda self, flow: (flow.salt,)),
        broken(root=lambda self, flow: (flow.model,)),
    ),
    "endpoints-followed": (broken(read_endpoints=reads_once),),
    "no-metrics": (broken(usable=only_those_that_tell),),
    "tls": (broken(alpn=False),),
    "health": (health_without(""), health_without("liveness"), health_without("readiness")),
    "health-of-a-stranger": (broken(health=lambda self, name: 1),),
    "tokens-of-a-response": (broken(use_json=no_use),),
    "tokens-of-events": (broken(use_events=no_use),),
    "models-in-metrics": (broken(decide=target_alone),),
}
