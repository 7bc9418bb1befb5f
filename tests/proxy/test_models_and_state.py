"""Which endpoints a request may go to: by the model it names, the state it builds on, its session."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable

import pytest

from pointsman.testing.client import RawClient, Response, message
from pointsman.testing.serving import admin, endings, serving
from pointsman.testing.upstream import FakeUpstream, Received, Step, chunk, head, reply


def ask(model: str) -> bytes:
    return message(body={"model": model, "prompt": "x"})


# -- models


async def test_the_list_of_models_is_the_union() -> None:
    async with (
        FakeUpstream(models=["m", "lora-a"]) as a,
        FakeUpstream(models=["m", "n"]) as b,
        serving(a, b) as app,
        RawClient(app.port) as client,
    ):
        listed = json.loads((await client.ask(message("GET", "/v1/models"))).body)
        assert (listed["object"], [m["id"] for m in listed["data"]]) == ("list", ["m", "lora-a", "n"])
        one = await client.ask(message("GET", "/v1/models/n"))
        assert json.loads(one.body) == {"id": "n", "object": "model"}
        none = await client.ask(message("GET", "/v1/models/other"))
        assert (none.status, none.error()["code"]) == (404, "model_not_found")


async def test_a_request_goes_only_to_endpoints_that_serve_its_model() -> None:
    async with (
        FakeUpstream(models=["m", "lora-a"]) as a,
        FakeUpstream(models=["m", "n"]) as b,
        serving(a, b) as app,
        RawClient(app.port) as client,
    ):
        for model, where in (("lora-a", a), ("n", b)):
            for _ in range(3):
                before = len(where.requests)
                assert (await client.ask(ask(model))).status == 200
                assert len(where.requests) == before + 1
        for _ in range(4):
            assert (await client.ask(ask("m"))).status == 200
        assert (len(a.requests), len(b.requests)) == (5, 5)


async def test_a_request_without_a_model_goes_to_any_endpoint() -> None:
    async with FakeUpstream(models=["m"]) as a, FakeUpstream(models=["n"]) as b, serving(a, b) as app:
        async with RawClient(app.port) as client:
            for _ in range(4):
                assert (await client.ask(message("POST", "/v1/some/future/call", {"x": 1}))).status == 200
        assert (len(a.requests), len(b.requests)) == (2, 2)


async def test_an_unknown_model_is_a_404_in_the_shape_of_the_api() -> None:
    async with FakeUpstream(models=["m"]) as engine, serving(engine) as app, RawClient(app.port) as client:
        answer = await client.ask(ask("gpt-9"))
        error = answer.error()
        assert (answer.status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert error["type"] == "invalid_request_error"
        assert "gpt-9" in str(error["message"])
        assert " m." in str(error["message"])
        answer = await client.ask(message("POST", "/v1/messages", {"model": "gpt-9", "messages": []}))
        assert (answer.status, answer.error()["type"]) == (404, "not_found_error")
        assert not engine.requests
        assert await endings(app) == {"refused": 2}


async def test_a_model_that_appears_later_is_found() -> None:
    async with FakeUpstream(models=["m"]) as engine, serving(engine) as app, RawClient(app.port) as client:
        engine.models = ["m", "fresh"]
        assert (await client.ask(ask("fresh"))).status == 200
        listed = json.loads((await client.ask(message("GET", "/v1/models"))).body)
        assert [m["id"] for m in listed["data"]] == ["m", "fresh"]


async def test_clients_that_ask_together_for_a_model_that_has_appeared_are_all_served() -> None:
    async with FakeUpstream(models=["m"]) as engine, serving(engine) as app:
        engine.models = ["m", "fresh"]
        engine.probe_gate.clear()
        seen = len(engine.probes)
        async with RawClient(app.port) as one, RawClient(app.port) as two:
            one.send(ask("fresh"))
            while len(engine.probes) == seen:  # noqa: ASYNC110 - the first one's look-up is under way
                await asyncio.sleep(0)
            two.send(ask("fresh"))
            await admin(app, "/healthz")
            engine.probe_gate.set()
            assert [(await client.response()).status for client in (one, two)] == [200, 200]
        assert await endings(app) == {"ok": 2}


async def test_endpoints_are_not_asked_for_their_models_at_every_unknown_one() -> None:
    async with FakeUpstream(models=["m"]) as engine, serving(engine) as app, RawClient(app.port) as client:
        before = len(engine.probes)
        for n in range(30):
            assert (await client.ask(ask(f"unknown-{n}"))).status == 404
        assert len(engine.probes) - before <= 4


async def test_health_on_the_data_port_means_an_endpoint_can_answer() -> None:
    async with FakeUpstream() as engine, serving(engine) as app, RawClient(app.port) as client:
        assert (await client.ask(message("GET", "/health"))).status == 200
        await admin(app, f"/endpoints/{engine.name}/drain", "POST")
        assert (await client.ask(message("GET", "/health"))).status == 503
        assert not engine.requests


# -- earlier state


class Holder:
    """Answers as a server of the Responses API that knows only what it has made itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.made: set[str] = set()
        self.streamed = False

    def __call__(self, request: Received) -> Iterable[Step]:
        path = request.target.partition("?")[0]
        if request.method == "POST" and path in ("/v1/responses", "/v1/conversations"):
            earlier = json.loads(request.body).get("previous_response_id")
            if earlier and earlier not in self.made:
                return [reply(b'{"error": {"message": "no such response"}}', 404)]
            made = f"resp_{self.name}_{len(self.made)}"
            self.made.add(made)
            return self.answer(made)
        if path.split("/")[3] in self.made:
            return [reply(json.dumps({"id": path.split("/")[3], "by": self.name}).encode())]
        return [reply(b'{"error": {"message": "no such response"}}', 404)]

    def answer(self, made: str) -> Iterable[Step]:
        data = json.dumps({"type": "response.created", "response": {"id": made, "object": "response"}})
        if not self.streamed:
            return [reply(json.dumps({"id": made, "object": "response"}).encode())]
        created = chunk(f"event: response.created\ndata: {data}\n\n".encode())
        return [
            head("content-type: text/event-stream"),
            created[:20],
            created[20:75],
            created[75:] + b"0\r\n\r\n",
        ]


def respond(**fields: object) -> bytes:
    return message("POST", "/v1/responses", {"model": "m", "input": "x", **fields})


def made_id(answer: Response) -> str:
    found: str = json.loads(answer.body)["id"]
    return found


async def test_calls_on_a_response_go_to_the_endpoint_that_made_it() -> None:
    async with (
        FakeUpstream(Holder("a")) as a,
        FakeUpstream(Holder("b")) as b,
        serving(a, b) as app,
        RawClient(app.port) as client,
    ):
        for _ in range(4):
            made = made_id(await client.ask(respond()))
            asked = len(a.requests) + len(b.requests)
            assert (await client.ask(respond(previous_response_id=made))).status == 200
            calls = [
                message("GET", f"/v1/responses/{made}"),
                message("GET", f"/v1/responses/{made}/input_items?limit=1"),
                message("POST", f"/v1/responses/{made}/cancel"),
                message("DELETE", f"/v1/responses/{made}"),
            ]
            for call in calls:
                assert (await client.ask(call)).status == 200
            assert len(a.requests) + len(b.requests) == asked + 5  # nobody else was asked
        assert a.requests
        assert b.requests


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_holder_is_known_however_the_answer_was_split(streamed: bool) -> None:
    a_script, b_script = Holder("a"), Holder("b")
    a_script.streamed = b_script.streamed = streamed
    async with (
        FakeUpstream(a_script) as a,
        FakeUpstream(b_script) as b,
        serving(a, b) as app,
        RawClient(app.port) as client,
    ):
        for _ in range(4):
            assert (await client.ask(respond(stream=streamed))).status == 200
        made = sorted(a_script.made | b_script.made)
        asked = len(a.requests) + len(b.requests)
        for name in made:
            assert (await client.ask(message("GET", f"/v1/responses/{name}"))).status == 200
        assert len(a.requests) + len(b.requests) == asked + len(made)


async def test_after_a_restart_every_endpoint_is_asked_who_holds_it() -> None:
    engines = [FakeUpstream(Holder(str(n))) for n in range(5)]
    for engine in engines:
        await engine.start()
    try:
        made: list[str] = []
        async with serving(*engines) as app, RawClient(app.port) as client:
            made = [made_id(await client.ask(respond())) for _ in engines]
        async with serving(*engines) as app, RawClient(app.port) as client:
            for name in made:
                answer = await client.ask(message("GET", f"/v1/responses/{name}"))
                assert (answer.status, made_id(answer)) == (200, name)
                assert (await client.ask(respond(previous_response_id=name))).status == 200
            nobodys = await client.ask(message("GET", "/v1/responses/resp_nobodys"))
            assert (nobodys.status, nobodys.error()["message"]) == (404, "no such response")
            assert await endings(app) == {"ok": 10, "error": 1}
    finally:
        for engine in engines:
            await engine.stop()


# -- sessions


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"session_headers": ["x-user"]}, "X-User: {}"),
        ({"session_cookies": ["sid"]}, "cookie: a=b; sid={}; c=d"),
    ],
)
async def test_requests_of_a_session_stay_together(setting: dict[str, list[str]], line: str) -> None:
    engines = [FakeUpstream() for _ in range(3)]
    for engine in engines:
        await engine.start()
    try:
        scheduling = {"preset": "round-robin", **setting}
        async with serving(*engines, scheduling=scheduling) as app, RawClient(app.port) as client:
            for _ in range(3):
                for who in ("ann", "bob", "cyd"):
                    body = {"model": "m", "prompt": who}
                    assert (
                        await client.ask(message("POST", "/v1/completions", body, line.format(who)))
                    ).status == 200
        homes = [{json.loads(r.body)["prompt"] for r in engine.requests} for engine in engines]
        assert sum(map(len, homes)) == 3  # nobody has been at two
        assert all(
            line.partition(":")[0].lower() in engine.requests[0].names
            for engine in engines
            if engine.requests
        )
    finally:
        for engine in engines:
            await engine.stop()


async def test_a_session_moves_when_its_endpoint_is_gone() -> None:
    async with (
        FakeUpstream() as a,
        FakeUpstream() as b,
        serving(a, b, scheduling={"session_headers": ["x-user"]}) as app,
        RawClient(app.port) as client,
    ):
        request = message("POST", "/v1/completions", {"model": "m"}, "x-user: ann")
        assert (await client.ask(request)).status == 200
        home, other = (a, b) if a.requests else (b, a)
        await home.stop()
        for _ in range(3):
            assert (await client.ask(request)).status == 200
        assert len(other.requests) == 3
