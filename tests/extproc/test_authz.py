"""The fast lane without Envoy: questions on a unix socket, answers by the byte."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytest.importorskip("envoy.service.discovery.v3.discovery_pb2")

from pointsman.extproc.access_log import Completion
from pointsman.extproc.authz import FastLane
from pointsman.proxy.core import Core
from pointsman.sim.fleet import running_fleet
from pointsman.sim.profiles import GRANITE
from pointsman.sim.spec import EngineSpec, KvEvents
from pointsman.testing.client import RawClient, message
from pointsman.testing.serving import settings, until
from pointsman.testing.upstream import FakeUpstream


class Lane:
    """A running fast lane, and a connection as Envoy would open one."""

    def __init__(self, core: Core, front: FastLane, path: Path) -> None:
        self.core = core
        self.front = front
        self.path = path

    async def ask(self, path: str, body: bytes = b"", *lines: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        reader, writer = await asyncio.open_unix_connection(self.path)
        try:
            head = [f"POST {path} HTTP/1.1", "host: picker", f"content-length: {len(body)}", *lines]
            writer.write("\r\n".join([*head, "", ""]).encode() + body)
            async with asyncio.timeout(10):
                first, *found = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
                headers = dict(line.split(": ", 1) for line in found)
                answer = await reader.readexactly(int(headers["content-length"]))
        finally:
            writer.close()
            await writer.wait_closed()
        return int(first.split(" ")[1]), headers, answer

    @property
    def in_flight(self) -> int:
        return sum(m.endpoint.load.requests for m in self.core.pool.members.values())


@asynccontextmanager
async def lane(*urls: str, **sections: dict[str, object]) -> AsyncIterator[Lane]:
    log = {"requests": False}
    with TemporaryDirectory(prefix="pointsman-") as folder:
        core = Core(settings(*urls, log=log, **sections), sees_responses=False, knows_models=False)
        front = FastLane(core, Path(folder) / "requests", Path(folder) / "control")
        async with core.running(front):
            yield Lane(core, front, Path(folder) / "requests")


BODY = json.dumps({"model": "m", "prompt": "Hello"}).encode()
DESTINATION = "x-gateway-destination-endpoint"


async def test_an_answer_names_the_endpoint_and_the_flight() -> None:
    async with FakeUpstream() as a, FakeUpstream() as b, lane(a.url, b.url) as found:
        answers = [await found.ask("/decide/v1/completions", BODY, "x-request-id: r") for _ in range(4)]
        assert {status for status, _, _ in answers} == {200}
        assert [headers[DESTINATION] for _, headers, _ in answers] == [a.name, b.name] * 2
        flights = [headers["x-pointsman-flight"] for _, headers, _ in answers]
        assert len(set(flights)) == 4
        assert found.in_flight == 4
        for flight in flights:
            found.front.completions.completed(
                Completion(request_id="r", flight=flight, status=200, upstream=a.name)
            )
        assert found.in_flight == 0
        assert len(found.core.decisions.recent(10)) == 4


async def test_an_end_that_nobody_tells_is_believed_after_a_while() -> None:
    async with (
        FakeUpstream() as a,
        lane(a.url, upstream={"first_byte_timeout_s": 0.3}) as found,
    ):
        await found.ask("/decide/v1/completions", BODY, "x-request-id: lost")
        assert found.in_flight == 1
        async with asyncio.timeout(10):
            while found.in_flight:  # noqa: ASYNC110 - the sweep comes by the clock
                await asyncio.sleep(0.01)
        (decision,) = found.core.decisions.recent(10)
        assert decision["request_id"] == "lost"
        assert decision["outcome"]["reason"] == "unseen_timeout"


async def test_a_refusal_is_never_a_5xx_which_envoy_would_take_for_a_fault() -> None:
    async with FakeUpstream() as a, lane(a.url) as found:
        found.core.pool.drain(a.name)
        status, headers, body = await found.ask("/decide/v1/completions", BODY)
        assert status == 429
        assert headers["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
        assert headers["retry-after"] == "1"
        assert json.loads(body)["error"]["code"] == "no_endpoints"
        status, _, body = await found.ask("/decide/v1/completions", b"{")
        assert status == 400
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        status, _, body = await found.ask("/decide/v1/messages", b"{")
        assert json.loads(body)["type"] == "error"  # as clients of that path expect it
        assert found.in_flight == 0


async def test_health_is_told_beside_the_decisions() -> None:
    async with FakeUpstream() as a, lane(a.url) as found:
        assert (await found.ask("/healthz"))[0] == 200
        assert (await found.ask("/v1/completions", BODY))[0] == 503
        found.front.draining = True
        assert (await found.ask("/healthz"))[0] == 503
        assert found.in_flight == 0


async def test_any_bytes_for_a_body_get_an_answer_and_leave_nothing_in_flight() -> None:
    rng = random.Random(1)
    async with FakeUpstream() as a, lane(a.url) as found:
        for size in range(0, 400, 10):
            status, headers, _ = await found.ask("/decide/v1/completions", rng.randbytes(size))
            assert status in (200, 400)
            assert (DESTINATION in headers) == (status == 200)
        assert found.in_flight == 0


async def test_a_decision_waits_for_token_ids_where_an_engine_tells_what_it_holds() -> None:
    events = KvEvents(endpoint="tcp://*:0", replay_endpoint="tcp://*:0", delay_s=0)
    told = {"kv_events": {"mode": "auto"}, "tokens": {"budget_s": 5}}
    async with (
        running_fleet([EngineSpec(kv_events=events)], speed=50) as (engine,),
        lane(engine.url, **told) as found,
    ):
        body = json.dumps({"model": GRANITE, "prompt": "why? " * 100, "max_tokens": 1}).encode()
        async with RawClient(int(engine.url.rpartition(":")[2])) as direct:

            async def tells() -> bool:
                await direct.ask(message("POST", "/v1/completions", json.loads(body)))
                return bool(found.core.precise.slots)

            await until(tells)
        status, _, _ = await found.ask("/decide/v1/completions", body, "x-request-id: r")
        assert status == 200
        found.front.completions.completed(Completion(request_id="r", status=200, duration_s=0.1))
        [record] = found.core.decisions.recent(1)
        assert record["matched_by"] == "events"
        assert record["matched_tokens"] > 0.8 * record["prompt_tokens"]
