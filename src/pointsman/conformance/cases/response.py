"""The response phase."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.conformance import wire
from pointsman.conformance.case import ENVOY, LLMD, LLMD_TESTS, PROTOCOL, case
from pointsman.conformance.checks import check, equal
from pointsman.conformance.exchange import Exchange
from pointsman.conformance.subject import OK, SSE, Subject, completion, post
from pointsman.conformance.wire import Headers, Modes

REPLY = b'{"id": "1", "model": "base", "choices": [{"text": "42"}], "usage": {"prompt_tokens": 7}}'
EVENT = b'data: {"choices": [{"text": "4"}]}\n\n'


async def _asked(stream: Exchange, headers: Headers = OK, *, streamed: bool = False) -> None:
    """A request, and the headers of its response, answered."""
    body = completion(stream=True) if streamed else completion()
    answer = await stream.request(post(body), [body])
    answer.routed()
    await stream.response_headers(headers)


async def _buffered(subject: Subject, chunks: Sequence[bytes]) -> None:
    """Nothing is answered until the body is whole; then it is, unchanged."""
    async with subject.exchange() as stream:
        await _asked(stream)
        for chunk in chunks[:-1]:
            await stream.send(wire.body("response", chunk, end=False))
        await subject.ask()  # time in which an early answer would have come
        equal("what is answered before the end", stream.come(), [])
        await stream.send(wire.body("response", chunks[-1], end=True))
        replies = await stream.whole_body()
    equal("the answers with the end mark", [i for i, r in enumerate(replies) if r.end], [len(replies) - 1])
    equal("the response", b"".join(r.body or b"" for r in replies), b"".join(chunks))


@case(
    "response-headers-at-once",
    "Response headers are answered at once, before any body.",
    LLMD_TESTS,
    level="protocol",
)
async def response_headers_at_once(subject: Subject) -> None:
    async with subject.exchange() as stream:
        await _asked(stream)


@case(
    "response-in-one-chunk",
    "A JSON response is answered by its body, with the end mark.",
    LLMD_TESTS,
    level="protocol",
)
async def response_in_one_chunk(subject: Subject) -> None:
    async with subject.exchange() as stream:
        await _asked(stream)
        equal("the response", await stream.response_body(REPLY), REPLY)


@case("response-in-chunks", "A JSON response in several chunks is held until it is whole.", LLMD_TESTS)
async def response_in_chunks(subject: Subject) -> None:
    await _buffered(subject, [REPLY[:10], REPLY[10:11], REPLY[11:]])


@case(
    "response-ends-empty",
    "A response whose end comes in an empty chunk of its own is whole with it.",
    LLMD_TESTS,
    level="protocol",
)
async def response_ends_empty(subject: Subject) -> None:
    async with subject.exchange() as stream:
        await _asked(stream)
        equal("the response", await stream.response_body(REPLY, b""), REPLY)


@case("response-not-json", "A response that is no JSON passes unchanged.", LLMD_TESTS, level="protocol")
async def response_not_json(subject: Subject) -> None:
    for body in (b"no json", b'{"usage": ', b"\xff\xfe\x00", b'{"usage": {"prompt_tokens": "many"}}'):
        async with subject.exchange() as stream:
            await _asked(stream)
            equal("the response", await stream.response_body(body), body)


@case(
    "response-empty",
    "A response of no bytes passes: one empty answer with the end mark.",
    ENVOY,
    level="protocol",
)
async def response_empty(subject: Subject) -> None:
    async with subject.exchange() as stream:
        await _asked(stream)
        equal("the response", await stream.response_body(b""), b"")


@case(
    "response-headers-only",
    "A response that ends with its headers gets an answer to them, and nothing else.",
    ENVOY,
    level="protocol",
)
async def response_headers_only(subject: Subject) -> None:
    body = completion()
    async with subject.exchange() as stream:
        await stream.request(post(body), [body])
        await stream.response_headers(((":status", b"204"),), end=True)
        await stream.half_close()
        code, details = await stream.ended()
        equal("the end of the stream", f"{code} {details}".strip(), "OK")
        equal("what follows the answer", stream.come(), ["the end of the stream"])


@case("response-of-an-error", "A response with an error status passes unchanged.", LLMD, level="protocol")
async def response_of_an_error(subject: Subject) -> None:
    body = b'{"error": {"message": "out of memory", "code": 500}}'
    for status in (b"500", b"404", b"429"):
        async with subject.exchange() as stream:
            await _asked(stream, ((":status", status), ("content-type", b"application/json")))
            equal("the response", await stream.response_body(body), body)


@case(
    "events-one-to-one",
    "Each chunk of an event stream is answered at once and once, with its bytes; the last ends it.",
    LLMD_TESTS,
    level="protocol",
)
async def events_one_to_one(subject: Subject) -> None:
    async with subject.exchange() as stream:
        await _asked(stream, SSE, streamed=True)
        await _one_to_one(stream, [EVENT, EVENT[:9], EVENT[9:], b"data: [DONE]\n\n"])


@case(
    "events-end-empty",
    "The end of an event stream in an empty chunk of its own is answered by an empty one.",
    ENVOY,
    level="protocol",
)
async def events_end_empty(subject: Subject) -> None:
    async with subject.exchange() as stream:
        await _asked(stream, SSE, streamed=True)
        await _one_to_one(stream, [EVENT, b"data: [DONE]\n\n", b""])


@case(
    "events-by-content-type",
    "An event stream is told by its content type, whatever the request said.",
    LLMD,
)
async def events_by_content_type(subject: Subject) -> None:
    async with subject.exchange() as stream:
        await _asked(stream, ((":status", b"200"), ("content-type", b"text/event-stream; charset=utf-8")))
        await _one_to_one(stream, [EVENT, EVENT])


@case(
    "events-by-request",
    "A response to a request with `stream: true` is answered chunk by chunk, whatever its content type.",
    LLMD,
)
async def events_by_request(subject: Subject) -> None:
    async with subject.exchange() as stream:
        await _asked(stream, OK, streamed=True)
        await _one_to_one(stream, [EVENT, EVENT])


async def _one_to_one(stream: Exchange, chunks: Sequence[bytes]) -> None:
    for i, chunk in enumerate(chunks):
        end = i == len(chunks) - 1
        await stream.send(wire.body("response", chunk, end))
        reply = await stream.expect("response_body")
        equal("the answer to a chunk", (reply.body, reply.end), (chunk, end))


@case(
    "response-trailers",
    "Trailers end a response: the body before them is answered without the end mark, then they are.",
    f"{ENVOY}, FULL_DUPLEX_STREAMED; {LLMD_TESTS}",
    level="protocol",
)
async def response_trailers(subject: Subject) -> None:
    for headers, streamed in ((OK, False), (SSE, True)):
        async with subject.exchange() as stream:
            await _asked(stream, headers, streamed=streamed)
            await stream.send(wire.body("response", REPLY, end=False))
            await stream.send(wire.trailers("response", [("x-took", b"3")]))
            replies = [await stream.expect("response_body")]
            while replies[-1].kind == "response_body":
                replies.append(await stream.receive())
        equal("the last answer", replies[-1].kind, "response_trailers")
        equal("the response", b"".join(r.body or b"" for r in replies), REPLY)
        check(not any(r.end for r in replies), "a body answer has the end mark, though trailers follow")


@case(
    "response-body-not-sent",
    "In response body mode NONE the answer to the headers is the last one, and the stream ends well.",
    ENVOY,
    level="protocol",
)
async def response_body_not_sent(subject: Subject) -> None:
    body = completion()
    async with subject.exchange(Modes(response="NONE")) as stream:
        subject.chosen(await stream.request(post(body), [body]))
        await stream.response_headers(SSE)
        await stream.half_close()
        code, details = await stream.ended()
        equal("the end of the stream", f"{code} {details}".strip(), "OK")
        equal("what follows the answer", stream.come(), ["the end of the stream"])


@case(
    "served-endpoint-told",
    "The endpoint that was served, in the response's metadata, may be another than the chosen one.",
    f"{PROTOCOL} 1.0",
    level="protocol",
)
async def served_endpoint_told(subject: Subject) -> None:
    for served in (*(engine.address for engine in subject.engines.values()), "10.9.8.7:80", "nowhere"):
        body = completion()
        async with subject.exchange() as stream:
            subject.chosen(await stream.request(post(body), [body]))
            await stream.response_headers(OK, served=served)
            equal("the response", await stream.response_body(REPLY), REPLY)
