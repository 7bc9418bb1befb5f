"""Streams: how they end, how many there are, and that a bad one harms no other."""

from __future__ import annotations

from pointsman.conformance import wire
from pointsman.conformance.case import ENVOY, OURS, case
from pointsman.conformance.checks import equal
from pointsman.conformance.subject import OK, Subject, completion, post

STREAMS = 200
"""Envoy has one for every request under way."""


@case(
    "ends-after-the-response",
    "When the response is answered and the proxy sends no more, the stream ends with OK.",
    ENVOY,
    level="protocol",
)
async def ends_after_the_response(subject: Subject) -> None:
    body = completion()
    async with subject.exchange() as stream:
        await stream.request(post(body), [body])
        await stream.response_headers(OK)
        await stream.response_body(b"{}")
        await stream.half_close()
        code, details = await stream.ended()
        equal("the end of the stream", f"{code} {details}".strip(), "OK")


@case(
    "ends-when-the-proxy-does",
    "A stream that the proxy ends in the middle of the request ends too; the picker lives on.",
    ENVOY,
    level="protocol",
)
async def ends_when_the_proxy_does(subject: Subject) -> None:
    body = completion()
    begun = [wire.headers("request", post(body), end=False), wire.body("request", body[:5], end=False)]
    for count in (1, 2):
        async with subject.exchange() as stream:
            for message in begun[:count]:
                await stream.send(message)
            await stream.half_close()
            await stream.ended()
    subject.chosen(await subject.ask())


@case(
    "streams-at-once",
    f"{STREAMS} streams are open at once on one connection, and each is answered with its own body.",
    OURS,
    level="protocol",
)
async def streams_at_once(subject: Subject) -> None:
    bodies = [completion(prompt=f"stream {i}") for i in range(STREAMS)]
    opened = [subject.exchange() for _ in bodies]
    streams = [await each.__aenter__() for each in opened]
    try:
        headers = [post(body) for body in bodies]
        for stream, body, pairs in zip(streams, bodies, headers, strict=True):
            await stream.send(wire.headers("request", pairs, end=False))
            await stream.send(wire.body("request", body[:20], end=False))
        for stream, body, pairs in reversed(list(zip(streams, bodies, headers, strict=True))):
            await stream.send(wire.body("request", body[20:], end=True))
            answer = await stream.answer(pairs)
            subject.chosen(answer)
            equal("the body of one of the streams", answer.body, body)
    finally:
        for each in opened:
            await each.__aexit__(None, None, None)


@case(
    "message-of-garbage",
    "A message that is no ProcessingRequest ends its stream at most; the picker lives on.",
    OURS,
    level="protocol",
)
async def message_of_garbage(subject: Subject) -> None:
    for garbage in (b"\xff\xff\xff\xff", b"\x12\xff\xff\xff\x7f", b""):
        await _harmless(subject, garbage)


@case(
    "message-out-of-place",
    "A response before any request, or a body before headers, ends its stream at most; the picker lives on.",
    OURS,
    level="protocol",
)
async def message_out_of_place(subject: Subject) -> None:
    await _harmless(subject, wire.headers("response", OK, end=False))
    await _harmless(subject, wire.body("request", completion(), end=True))
    await _harmless(subject, wire.body("response", b"{}", end=True))


async def _harmless(subject: Subject, message: bytes) -> None:
    """Sent alone on a stream, while another is in the middle of its request."""
    body = completion()
    headers = post(body)
    async with subject.exchange() as other, subject.exchange() as stream:
        await other.send(wire.headers("request", headers, end=False))
        await stream.raw(message)
        await stream.half_close()
        await stream.ended()
        await other.send(wire.body("request", body, end=True))
        subject.chosen(await other.answer(headers))
