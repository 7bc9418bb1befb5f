"""What is forwarded of a request's headers."""

from __future__ import annotations

from pointsman.conformance.case import ENVOY, LLMD, MEASURED, OURS, PROTOCOL, case
from pointsman.conformance.checks import check, equal
from pointsman.conformance.engine import Load
from pointsman.conformance.exchange import DESTINATION
from pointsman.conformance.subject import SSE, Subject, completion, get, post

STEERING = {
    "x-llm-d-inference-fairness-id": "tenant",
    "x-llm-d-inference-objective": "none-of-this-name",
    "x-llm-d-model-name-rewrite": "base",
    "x-llm-d-slo-ttft-ms": "900",
    "x-llm-d-slo-tpot-ms": "90",
    "x-llm-d-video-fps": "2",
    "x-llm-d-video-duration-seconds": "9",
    "x-llm-d-video-resolution": "640x360",
    "x-gateway-destination-endpoint-subset": "10.9.8.7:8000",
    "x-gateway-destination-endpoint-served": "10.9.8.7:8000",
    "x-llm-d-request-dropped-reason": "evicted",
}
OLD = {
    "x-gateway-inference-fairness-id": "tenant",
    "x-gateway-inference-objective": "none-of-this-name",
    "x-gateway-model-name-rewrite": "base",
    "x-slo-ttft-ms": "900",
    "x-slo-tpot-ms": "90",
}


@case("client-headers-kept", "The client's own headers are forwarded with their values.", f"{ENVOY}; {LLMD}")
async def client_headers_kept(subject: Subject) -> None:
    mine = {"authorization": "Bearer secret", "x-tenant": "blue", "accept": "text/event-stream, */*"}
    body = completion()
    headers = post(body, extra=tuple(mine.items()))
    answer = await subject.ask(body, headers=headers)
    answer.routed()
    for name, value in mine.items():
        equal(f"the forwarded {name}", answer.header(name), value)
    for name, raw in headers:
        if name.startswith(":") or name == "content-type":
            equal(f"the forwarded {name}", answer.header(name), raw.decode())


@case("header-of-60-kb", "A header of 60 KB is forwarded whole.", OURS, level="protocol")
async def header_of_60_kb(subject: Subject) -> None:
    answer = await subject.ask(extra=[("cookie", "c" * 60_000)])
    subject.chosen(answer)
    check(answer.header("cookie") == "c" * 60_000, "the forwarded header is another one")


@case(
    "header-not-utf8",
    "A header whose value is not UTF-8 is forwarded byte for byte.",
    f"{ENVOY}, HeaderValue.raw_value",
    level="protocol",
)
async def header_not_utf8(subject: Subject) -> None:
    body, value = completion(), b"caf\xe9 \xff\x80"
    answer = await subject.ask(body, headers=[*post(body), ("x-name", value)])
    subject.chosen(answer)
    equal("the forwarded header", answer.headers.get("x-name"), [value])


@case("steering-stripped", "Headers that steer the picker do not reach the endpoint.", LLMD)
async def steering_stripped(subject: Subject) -> None:
    await _stripped(subject, STEERING)


@case("old-steering-stripped", "Their older names do not reach the endpoint either.", LLMD)
async def old_steering_stripped(subject: Subject) -> None:
    await _stripped(subject, OLD)


async def _stripped(subject: Subject, steering: dict[str, str]) -> None:
    answer = await subject.ask(extra=tuple(steering.items()))
    answer.routed()
    equal("what is forwarded of them", [name for name in steering if name in answer.headers], [])


@case(
    "destination-replaced",
    "A destination header that the client sent is replaced.",
    f"{PROTOCOL}; {MEASURED}",
    level="protocol",
)
async def destination_replaced(subject: Subject) -> None:
    await subject.show(a=Load(5, 0.5), c=Load(5, 0.5))
    answer = await subject.ask(extra=[(DESTINATION, subject.address("c"))])
    equal("the choice", subject.chosen(answer), "b")
    answer = await subject.ask(extra=[(DESTINATION, "10.9.8.7:80")])
    equal("the choice", subject.chosen(answer), "b")


@case(
    "destination-replaced-headers-only",
    "A destination header that the client sent is replaced in a request without a body too.",
    f"{PROTOCOL}; {MEASURED}",
    level="protocol",
)
async def destination_replaced_headers_only(subject: Subject) -> None:
    async with subject.exchange() as stream:
        answer = await stream.request(get(extra=[(DESTINATION, "10.9.8.7:80")]), [])
    subject.chosen(answer)


@case("request-id-made", "A request without x-request-id is given one; no two are equal.", LLMD)
async def request_id_made(subject: Subject) -> None:
    body = completion()
    bare = [(name, value) for name, value in post(body) if name != "x-request-id"]
    answers = [await subject.ask(body, headers=bare) for _ in range(3)]
    for answer in answers:
        answer.routed()
    ids = {answer.header("x-request-id") for answer in answers}
    check("" not in ids, "no x-request-id is forwarded")
    equal("the number of different ones", len(ids), 3)


@case("request-id-kept", "The x-request-id of a request is kept.", LLMD)
async def request_id_kept(subject: Subject) -> None:
    answer = await subject.ask(extra=[("x-tenant", "blue")])
    answer.routed()
    check(answer.header("x-request-id").startswith("conformance-"), "x-request-id is replaced")


@case("debug-header", "Response headers are answered with x-went-into-resp-headers: true.", LLMD)
async def debug_header(subject: Subject) -> None:
    body = completion(stream=True)
    async with subject.exchange() as stream:
        await stream.request(post(body), [body])
        answer = await stream.response_headers(SSE)
    equal("x-went-into-resp-headers", answer.header("x-went-into-resp-headers"), b"true")
