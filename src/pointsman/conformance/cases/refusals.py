"""Requests that the picker answers itself."""

from __future__ import annotations

from pointsman.conformance import wire
from pointsman.conformance.case import ENVOY, LLMD, LLMD_TESTS, PROTOCOL, case
from pointsman.conformance.checks import check, equal
from pointsman.conformance.engine import Load
from pointsman.conformance.subject import Subject, completion, get, post
from pointsman.conformance.wire import Reply

REASON = "x-llm-d-request-dropped-reason"


def _text(refused: Reply) -> str:
    return (refused.body or b"").decode(errors="replace")


def _reason(refused: Reply, reason: str) -> None:
    equal(REASON, (refused.header(REASON) or b"").decode(), reason)


@case("invalid-json", "A body that is no JSON is refused with 400 and a message that says so.", LLMD_TESTS)
async def invalid_json(subject: Subject) -> None:
    for body in (b"no json", b'{"model": "base", ', b'{"model": "base"} {"more": 1}'):
        text = _text((await subject.ask(body)).refusal(400)).lower()
        words = ("json", "pars", "invalid", "unmarshal", "decod")
        check(
            any(word in text for word in words),
            f"the message does not tell that it is no JSON: {text[:100]!r}",
        )


@case("no-model", "A body without `model` is refused with 400, saying what is missing.", LLMD_TESTS)
async def no_model(subject: Subject) -> None:
    text = _text((await subject.ask(b'{"prompt": "To be"}')).refusal(400))
    check("model not found in request body" in text, f"the message is {text[:100]!r}")


@case(
    "error-text",
    "The body of a refusal is `inference error: <Code> - <message>`.",
    LLMD,
)
async def error_text(subject: Subject) -> None:
    text = _text((await subject.ask(b"no json")).refusal(400))
    check(text.startswith("inference error: BadRequest - "), f"the body is {text[:100]!r}")


@case(
    "no-parser",
    "With parsers named, a path that none of them reads is refused with 400.",
    LLMD,
    group="openai-only",
)
async def no_parser(subject: Subject) -> None:
    body = completion()
    subject.chosen(await subject.ask(body))
    (await subject.ask(body, headers=post(body, "/v1/nobody-reads-this"))).refusal(400)


@case(
    "no-endpoints",
    "While the pool is empty a request is refused with 503, the reason being rejected-no-endpoints.",
    f"{PROTOCOL}; {LLMD}",
    group="empty",
    level="protocol",
)
async def no_endpoints(subject: Subject) -> None:
    refused = (await subject.ask()).refusal(503)
    _reason(refused, "rejected-no-endpoints")


@case(
    "no-endpoints-headers-only",
    "While the pool is empty a request without a body is refused with 500 and llm-d's words.",
    LLMD_TESTS,
    group="empty",
)
async def no_endpoints_headers_only(subject: Subject) -> None:
    async with subject.exchange() as stream:
        refused = (await stream.request(get(), [])).refusal(500)
    check("no pods available in datastore" in _text(refused), f"the message is {_text(refused)[:100]!r}")


@case(
    "all-filtered-out",
    "When the filters leave no endpoint a request is refused with 429, the reason being rejected-saturated.",
    LLMD,
    group="capped",
)
async def all_filtered_out(subject: Subject) -> None:
    await subject.show(a=Load(6), b=Load(5), c=Load(7))
    equal("the choice with one left", subject.chosen(await subject.ask()), "b")
    await subject.show(a=Load(6), b=Load(9), c=Load(7))
    _reason((await subject.ask()).refusal(429), "rejected-saturated")


@case(
    "refused-alone",
    "A request that is refused takes no other one with it: those on other streams are answered.",
    f"{ENVOY}: one stream a request",
    level="protocol",
)
async def refused_alone(subject: Subject) -> None:
    body = completion()
    headers = post(body)
    async with subject.exchange() as stream:
        await stream.send(wire.headers("request", headers, end=False))
        await stream.send(wire.body("request", body[:9], end=False))
        (await subject.ask(b"no json")).refusal(400)
        await stream.send(wire.body("request", body[9:], end=True))
        subject.chosen(await stream.answer(headers))
