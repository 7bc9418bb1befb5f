"""Another model than the client asked for, by header; rewrite objects need Kubernetes."""

from __future__ import annotations

import json

from pointsman.conformance import wire
from pointsman.conformance.case import LLMD, LLMD_TESTS, case
from pointsman.conformance.checks import check, equal
from pointsman.conformance.engine import Load
from pointsman.conformance.exchange import Answer
from pointsman.conformance.subject import OK, SSE, Subject, completion, post

NEW, OLD = "x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"
CLIENT = "what-the-client-calls-it"


def _model(answer: Answer) -> object:
    answer.routed()
    return json.loads(answer.body).get("model")


@case("rewrite", f"With {NEW} the forwarded body names that model, and is otherwise the same.", LLMD_TESTS)
async def rewrite(subject: Subject) -> None:
    body = completion(model=CLIENT, prompt="model: what-the-client-calls-it")
    answer = await subject.ask(body, extra=[(NEW, "adapter-a")])
    equal("the forwarded model", _model(answer), "adapter-a")
    equal("the rest", json.loads(answer.body), json.loads(body) | {"model": "adapter-a"})


@case("rewrite-content-length", "The content-length of a rewritten body is that of what is forwarded.", LLMD)
async def rewrite_content_length(subject: Subject) -> None:
    answer = await subject.ask(model=CLIENT, extra=[(NEW, "base")])
    equal("the forwarded model", _model(answer), "base")
    check(
        answer.header("content-length") in ("", str(len(answer.body))),
        "content-length is that of another body",
    )


@case("rewrite-steers", "The endpoint is chosen for the rewritten model.", LLMD)
async def rewrite_steers(subject: Subject) -> None:
    full = Load(0, 0.1, ("adapter-b", "other"))
    await subject.show(a=full, b=Load(0, 0.5, ("adapter-a", "other")), c=full)
    check(subject.chosen(await subject.ask()) != "b", "the base model goes to the fullest KV cache")
    equal("the choice", subject.chosen(await subject.ask(extra=[(NEW, "adapter-a")])), "b")


@case("rewrite-old-name", f"{OLD}, the older name of the header, works too.", LLMD)
async def rewrite_old_name(subject: Subject) -> None:
    equal("the forwarded model", _model(await subject.ask(model=CLIENT, extra=[(OLD, "base")])), "base")


@case("rewrite-new-name-counts", "Where both names are given the newer one counts.", LLMD)
async def rewrite_new_name_counts(subject: Subject) -> None:
    for extra in ([(NEW, "base"), (OLD, "adapter-b")], [(OLD, "adapter-b"), (NEW, "base")]):
        equal("the forwarded model", _model(await subject.ask(model=CLIENT, extra=extra)), "base")


@case("rewrite-back", "In a buffered response the client finds the name it asked for.", LLMD_TESTS)
async def rewrite_back(subject: Subject) -> None:
    request = completion(model=CLIENT)
    for reply in (b'{"model":"base","choices":[]}', b'{"id": 1, "model": "base", "choices": []}'):
        async with subject.exchange() as stream:
            await stream.request(post(request, extra=[(NEW, "base")]), [request])
            await stream.response_headers(OK)
            body = await stream.response_body(reply[:12], reply[12:])
        equal("the response", json.loads(body), json.loads(reply) | {"model": CLIENT})


@case(
    "rewrite-back-streamed",
    "In every event of a streamed response the client finds the name it asked for.",
    LLMD,
)
async def rewrite_back_streamed(subject: Subject) -> None:
    request = completion(model=CLIENT, stream=True)
    event = b'data: {"model":"base","choices":[{"text":"x"}]}\n\n'
    async with subject.exchange() as stream:
        await stream.request(post(request, extra=[(NEW, "base")]), [request])
        await stream.response_headers(SSE)
        for end in (False, False, True):
            await stream.send(wire.body("response", event, end))
        body = b"".join([reply.body or b"" for reply in await stream.whole_body()])
    equal("the events", body, event.replace(b'"base"', f'"{CLIENT}"'.encode()) * 3)
