"""The request phase: what is answered when, and in which order."""

from __future__ import annotations

from pointsman.conformance import wire
from pointsman.conformance.case import ENVOY, LLMD, LLMD_TESTS, OURS, PROTOCOL, case
from pointsman.conformance.checks import check, equal
from pointsman.conformance.engine import Load
from pointsman.conformance.subject import OK, Subject, completion, post
from pointsman.conformance.wire import Modes


@case(
    "header-answer-first",
    "The answer to the headers comes first, then those to the body, the last one with the end mark.",
    f"{ENVOY}, FULL_DUPLEX_STREAMED; {LLMD_TESTS}",
    level="protocol",
)
async def header_answer_first(subject: Subject) -> None:
    answer = await subject.ask()
    answer.routed()
    kinds = [reply.kind for reply in answer.replies]
    equal("the first answer", kinds[0], "request_headers")
    equal("the answers after it", set(kinds[1:]), {"request_body"})
    check(not any(r.end for r in answer.replies[:-1]), "an answer before the last one has the end mark")


@case("clear-route-cache", "The answer to the headers clears the route cache.", LLMD_TESTS, level="protocol")
async def clear_route_cache(subject: Subject) -> None:
    answer = await subject.ask()
    answer.routed()
    headers = next(r for r in answer.replies if r.kind == "request_headers")
    check(headers.clear_route_cache, "clear_route_cache is not set")


@case("body-unchanged", "A body that needs no change is forwarded byte for byte.", LLMD, level="protocol")
async def body_unchanged(subject: Subject) -> None:
    body = b' {"prompt" : "na\\u00efve \xc3\xa9t\xc3\xa9",\n "model":"base", "x": 1.50, "x": 2e0 } '
    answer = await subject.ask(body)
    answer.routed()
    equal("the forwarded body", answer.body, body)


@case("content-length", "The forwarded content-length is the length of the forwarded body.", LLMD_TESTS)
async def content_length(subject: Subject) -> None:
    body = completion()
    wrong = [(name, b"7" if name == "content-length" else value) for name, value in post(body)]
    for headers in (post(body), wrong):
        answer = await subject.ask(body, headers=headers)
        answer.routed()
        check(
            answer.header("content-length") in ("", str(len(answer.body))),
            _length(answer.header("content-length")),
        )


def _length(found: str) -> str:
    return f"content-length is forwarded as {found}, which is not the body's length"


@case(
    "split-body",
    "A body in several messages, cut inside a JSON string, is treated like one in a single message.",
    LLMD_TESTS,
    level="protocol",
)
async def split_body(subject: Subject) -> None:
    await subject.show(a=Load(5, 0.5), c=Load(5, 0.5))
    body = completion(model="base")
    at = body.index(b"base") + 2
    async with subject.exchange() as stream:
        answer = await stream.request(post(body), [body[:at], body[at : at + 1], body[at + 1 :]])
    equal("the choice", subject.chosen(answer), "b")
    equal("the forwarded body", answer.body, body)


@case(
    "end-in-an-empty-message",
    "A body whose end comes in an empty message of its own is whole with it.",
    ENVOY,
    level="protocol",
)
async def end_in_an_empty_message(subject: Subject) -> None:
    body = completion()
    async with subject.exchange() as stream:
        answer = await stream.request(post(body), [body, b""])
    subject.chosen(answer)
    equal("the forwarded body", answer.body, body)


@case(
    "nothing-before-the-end",
    "Nothing is answered before the request's body is whole.",
    LLMD_TESTS,
)
async def nothing_before_the_end(subject: Subject) -> None:
    body = completion()
    headers = post(body)
    async with subject.exchange() as stream:
        await stream.send(wire.headers("request", headers, end=False))
        await stream.send(wire.body("request", body, end=False))
        # Whole requests on other streams: time in which an early answer would have come.
        for _ in range(2):
            await subject.ask()
        equal("what is answered before the end", stream.come(), [])
        await stream.send(wire.body("request", b"", end=True))
        subject.chosen(await stream.answer(headers))


@case(
    "request-trailers",
    "A request with trailers is whole with them: no body answer has the end mark, theirs is the last.",
    f"{ENVOY}, FULL_DUPLEX_STREAMED",
    level="protocol",
)
async def request_trailers(subject: Subject) -> None:
    body = completion()
    async with subject.exchange() as stream:
        answer = await stream.request(post(body), [body], trailers=[("x-checksum", b"1")])
    subject.chosen(answer)
    kinds = [reply.kind for reply in answer.replies]
    equal("the answers", [kinds[0], kinds[-1]], ["request_headers", "request_trailers"])
    equal("the forwarded body", answer.body, body)
    check(not any(r.end for r in answer.replies), "a body answer has the end mark, though trailers follow")


@case(
    "without-modes",
    "A proxy that does not tell its body modes, as older ones, is served as in FULL_DUPLEX_STREAMED.",
    PROTOCOL,
    level="protocol",
)
async def without_modes(subject: Subject) -> None:
    body = completion()
    async with subject.exchange(modes=None) as stream:
        answer = await stream.request(post(body), [body])
        subject.chosen(answer)
        equal("the forwarded body", answer.body, body)
        await stream.response_headers(OK)
        equal("the response", await stream.response_body(b"{}"), b"{}")


@case(
    "buffered-request",
    "In request body mode BUFFERED headers are answered at once, and the body's answer has the destination.",
    OURS,
    level="extension",
)
async def buffered_request(subject: Subject) -> None:
    body = completion()
    headers = post(body)
    async with subject.exchange(Modes(request="BUFFERED")) as stream:
        await stream.send(wire.headers("request", headers, end=False))
        await stream.expect("request_headers")
        await stream.send(wire.body("request", body, end=True))
        answer = await stream.expect("request_body")
        await stream.response_headers(OK)
        equal("the response", await stream.response_body(b"{}"), b"{}")
    forwarded = wire.applied(headers, answer)
    destination = b"".join(forwarded.get("x-gateway-destination-endpoint", [])).decode()
    subject.name(destination)
    check(answer.clear_route_cache, "clear_route_cache is not set in the body's answer")
    check(answer.body in (None, body), "the body is changed")


@case(
    "path-with-query",
    "The query of a path is not looked at to know what a request is.",
    LLMD,
    group="openai-only",
)
async def path_with_query(subject: Subject) -> None:
    body = completion()
    subject.chosen(await subject.ask(body, headers=post(body, "/v1/completions?user=1&x=/v1/other")))


@case(
    "path-of-a-rewriting-proxy",
    "Without :path the path is that of x-original-path, else of x-forwarded-path, else /v1/completions.",
    LLMD,
    group="openai-only",
)
async def path_of_a_rewriting_proxy(subject: Subject) -> None:
    body = completion()
    bare = [(name, value) for name, value in post(body) if name != ":path"]
    known, unknown = b"/v1/completions", b"/v1/nobody-reads-this"
    original, forwarded = "x-original-path", "x-forwarded-path"
    for more in ([], [(original, known)], [(forwarded, known)], [(original, known), (forwarded, unknown)]):
        subject.chosen(await subject.ask(body, headers=[*bare, *more]))
    for more in ([(original, unknown)], [(forwarded, unknown)], [(original, unknown), (forwarded, known)]):
        (await subject.ask(body, headers=[*bare, *more])).refusal(400)
