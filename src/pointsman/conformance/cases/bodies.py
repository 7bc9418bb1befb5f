"""Bodies of unusual size and content."""

from __future__ import annotations

from pointsman.conformance import wire
from pointsman.conformance.case import ENVOY, LLMD, LLMD_TESTS, OURS, case
from pointsman.conformance.checks import check, equal
from pointsman.conformance.exchange import Answer
from pointsman.conformance.subject import OK, SSE, Subject, completion, post
from pointsman.conformance.wire import Reply

CHUNK_BYTES = 62_000
"""Envoy takes messages of 64 KiB; llm-d's leave room for the rest of one."""
ENVOY_READ_BYTES = 16 * 1024


def _chunked(kind: str, replies: tuple[Reply, ...] | list[Reply], body: bytes) -> None:
    """Answers of ``kind`` are the body in chunks of at most ``CHUNK_BYTES``, the last with the end mark."""
    found = [reply for reply in replies if reply.kind == kind]
    largest = max(len(reply.body or b"") for reply in found)
    check(largest <= CHUNK_BYTES, f"a body answer has {largest} bytes")
    equal("the answers with the end mark", [i for i, r in enumerate(found) if r.end], [len(found) - 1])
    check(b"".join(r.body or b"" for r in found) == body, "the forwarded body is another one")


def _padded(size: int) -> bytes:
    """A completion request of exactly ``size`` bytes."""
    return completion(prompt="x" * (size - len(completion(prompt=""))))


async def _in_pieces(subject: Subject, body: bytes) -> Answer:
    """Sent as Envoy reads it from a socket."""
    pieces = [body[i : i + ENVOY_READ_BYTES] for i in range(0, len(body), ENVOY_READ_BYTES)]
    async with subject.exchange() as stream:
        return await stream.request(post(body), pieces)


@case("body-over-62000", "A body over 62,000 bytes is answered in chunks of at most 62,000.", LLMD_TESTS)
async def body_over_62000(subject: Subject) -> None:
    for size in (62_001, 130_000):
        body = _padded(size)
        answer = await _in_pieces(subject, body)
        subject.chosen(answer)
        _chunked("request_body", answer.replies, body)


@case(
    "body-of-62000",
    "A body of exactly 62,000 bytes, or twice that, ends with the end mark as any other.",
    LLMD,
)
async def body_of_62000(subject: Subject) -> None:
    for size in (62_000, 124_000):
        body = _padded(size)
        answer = await _in_pieces(subject, body)
        subject.chosen(answer)
        _chunked("request_body", answer.replies, body)


@case("body-of-8-mb", "A body of 8 MB is forwarded whole.", OURS, level="protocol")
async def body_of_8_mb(subject: Subject) -> None:
    body = _padded(8_000_000)
    answer = await _in_pieces(subject, body)
    subject.chosen(answer)
    check(answer.body == body, "the forwarded body is another one")


@case(
    "body-not-read",
    "With the passthrough parser a body that is no JSON, nor text, is routed and forwarded as it is.",
    LLMD_TESTS,
    group="passthrough",
)
async def body_not_read(subject: Subject) -> None:
    for body in (b"no json", b"\xff\xfe\x00\x80 binary", b'{"prompt": "no model"}'):
        answer = await subject.ask(body)
        subject.chosen(answer)
        equal("the forwarded body", answer.body, body)


@case(
    "body-of-nothing",
    "A body of no bytes is forwarded as an empty chunk with the end mark.",
    LLMD,
    group="passthrough",
)
async def body_of_nothing(subject: Subject) -> None:
    answer = await subject.ask(b"")
    subject.chosen(answer)
    bodies = [(reply.body, reply.end) for reply in answer.replies if reply.kind == "request_body"]
    equal("the body answers", bodies, [(b"", True)])


@case(
    "body-not-utf8",
    "A JSON body whose strings are not UTF-8 is refused with 400 or forwarded as it is; the picker lives on.",
    OURS,
    level="protocol",
)
async def body_not_utf8(subject: Subject) -> None:
    body = b'{"model": "base", "prompt": "\xff\xfe"}'
    answer = await subject.ask(body)
    if answer.immediate is None:
        equal("the forwarded body", answer.body, body)
    else:
        answer.refusal(400)
    subject.chosen(await subject.ask())


@case(
    "body-deeply-nested",
    "A body nested a hundred thousand deep does not harm the picker.",
    OURS,
    level="protocol",
)
async def body_deeply_nested(subject: Subject) -> None:
    depth = 100_000
    body = b'{"model": "base", "prompt": "x", "deep": ' + b"[" * depth + b"]" * depth + b"}"
    answer = await _in_pieces(subject, body)
    if answer.immediate is None:
        check(answer.body == body, "the forwarded body is another one")
    else:
        answer.refusal(400)
    subject.chosen(await subject.ask())


@case(
    "response-over-62000",
    "A buffered response over 62,000 bytes is answered in chunks of at most 62,000.",
    LLMD_TESTS,
)
async def response_over_62000(subject: Subject) -> None:
    request = completion()
    body = b'{"choices": [{"text": "' + b"y" * 150_000 + b'"}]}'
    async with subject.exchange() as stream:
        await stream.request(post(request), [request])
        await stream.response_headers(OK)
        for i in range(0, len(body), ENVOY_READ_BYTES):
            piece = body[i : i + ENVOY_READ_BYTES]
            await stream.send(_piece(piece, end=i + ENVOY_READ_BYTES >= len(body)))
        _chunked("response_body", await stream.whole_body(), body)


@case(
    "event-over-62000",
    "A chunk of a streamed response that has 64 KiB arrives whole, in order, and only the last ends it.",
    ENVOY,
    level="protocol",
)
async def event_over_62000(subject: Subject) -> None:
    request = completion(stream=True)
    event = b"data: " + b"z" * (64 * 1024 - 8) + b"\n\n"
    async with subject.exchange() as stream:
        await stream.request(post(request), [request])
        await stream.response_headers(SSE)
        await stream.send(_piece(event, end=False))
        await stream.send(_piece(b"data: [DONE]\n\n", end=True))
        replies = await stream.whole_body()
    check(
        b"".join(r.body or b"" for r in replies) == event + b"data: [DONE]\n\n", "the response is another one"
    )


def _piece(data: bytes, *, end: bool) -> bytes:
    return wire.body("response", data, end)
