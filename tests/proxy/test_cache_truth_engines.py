"""Cache truth of the gateway in front of simulated engines: what the admin API and the metrics say of caches
that are as they are told, and of such that are not.
"""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any

import pytest

from pointsman.proxy.application import Application
from pointsman.proxy.cache_truth.counts import RECENT
from pointsman.sim.fleet import running_fleet
from pointsman.sim.server import SimulatedEngine
from pointsman.sim.spec import EngineSpec, KvEvents
from pointsman.testing.client import RawClient, message
from pointsman.testing.serving import admin, endpoints, serving, until
from pointsman.testing.upstream import FakeUpstream, Received, Step, reply

SPEED = 50
BLOCK = 16
EVENTS = KvEvents(endpoint="tcp://*:0", replay_endpoint="tcp://*:0", delay_s=0)
NO_REPLAY = KvEvents(endpoint="tcp://*:0", delay_s=0)
TELLS = {"kv_events": {"mode": "auto"}, "tokens": {"budget_s": 5}}


class Skipping:
    """A clock that a test can put forward."""

    def __init__(self) -> None:
        self.skipped_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.skipped_s


def prompt(i: int, blocks: int = 20) -> list[int]:
    """Token ids that no other number's prompt begins with."""
    return [1000 + i, *range(5000, 5000 + blocks * BLOCK)]


async def ask(app: Application, tokens: list[int] | str, port: int = 0, **body: Any) -> dict[str, Any]:
    """The answer's usage."""
    whole = {"model": app.pool.models()[0], "prompt": tokens, "max_tokens": 1, **body}
    async with RawClient(port or app.port) as client:
        answer = await client.ask(message("POST", "/v1/completions", whole, "connection: close"))
    assert answer.status == 200, answer.body
    usage: dict[str, Any] = {} if body.get("stream") else json.loads(answer.body)["usage"]
    return usage


async def cache(app: Application) -> dict[str, Any]:
    """What GET /cache says of the only endpoint."""
    [found] = json.loads((await admin(app, "/cache")).body)["endpoints"]
    assert isinstance(found, dict)
    return found


async def causes(app: Application) -> set[str]:
    return {warning["cause"] for warning in (await cache(app))["warnings"]}


async def told(app: Application, blocks: int = 1) -> None:
    """Events of so many blocks have come, and no more are on their way."""

    async def quiet() -> bool:
        before = [source.blocks for source in app.core.kv_events.sources()]
        for _ in range(10):
            await admin(app, "/healthz")
        return before == [source.blocks for source in app.core.kv_events.sources()] and sum(before) >= blocks

    await until(quiet)


async def reset(engine: SimulatedEngine) -> None:
    """Empty the engine's cache."""
    async with RawClient(engine.port) as client:
        answer = await client.ask(message("POST", "/reset_prefix_cache", {}, "connection: close"))
    assert answer.status == 200


async def metric(app: Application, name: str) -> dict[str, float]:
    """A family of the metrics page by its labels but the endpoint's."""
    page = (await admin(app, "/metrics")).body.decode()
    rows = re.findall(rf"^{name}\{{(.*)\}} (\S+)$", page, re.MULTILINE)
    return {re.sub(r',?endpoint="[^"]*"', "", labels).strip(","): float(value) for labels, value in rows}


async def test_what_is_predicted_is_compared_with_what_is_reported() -> None:
    async with (
        running_fleet([EngineSpec(kv_events=EVENTS)], speed=SPEED) as (engine,),
        serving(engine.url, **TELLS) as app,
    ):
        await ask(app, prompt(0))
        await told(app)
        for i in (1, 2, 1, 2):
            await ask(app, prompt(i))
            await told(app)
        found = await cache(app)
        assert (found["view"], found["warnings"]) == ("events", [])
        assert found["compared"]["events"]["answers"] == {
            "requests": 4,
            "exact": 4,
            "prompt_tokens": 4 * 321,
            "predicted_tokens": 640,
            "reported_tokens": 640,
            "error_tokens": 0,
            "error": 0.0,
        }
        assert found["compared"]["sent"]["answers"]["requests"] == 1
        assert found["verdict"] == "untested"
        assert found["index"]["events"] == {"blocks": 60, "block_tokens": BLOCK}
        assert found["engine"]["prefix_caching"] is True
        [source] = found["events"]
        assert source["live"]
        assert source["blocks"] == 60
        assert 0 <= source["last_event_s"] < 60
        for _ in range(RECENT // 2):
            await ask(app, prompt(1))
        line = (await endpoints(app))[found["name"]]["cache"]
        assert (line["view"], line["verdict"], line["warnings"]) == ("events", "agrees", [])
        total = json.loads((await admin(app, "/cache")).body)["total"]["events"]["answers"]
        assert total["exact"] == total["requests"] == 4 + RECENT // 2
        labels = 'by="answers",view="events"'
        requests = await metric(app, "pointsman_cache_compared_requests_total")
        assert requests[labels] == await exact(app) == 4 + RECENT // 2
        reported = await metric(app, "pointsman_cache_compared_reported_tokens_total")
        assert reported[labels] == 640 + RECENT // 2 * 320


async def exact(app: Application) -> float:
    [count] = (await metric(app, "pointsman_cache_exact_requests_total")).values()
    return count


async def test_an_endpoint_without_events_is_compared_by_what_was_sent() -> None:
    async with running_fleet(1, speed=SPEED) as (engine,), serving(engine.url, **TELLS) as app:
        for _ in range(RECENT):
            await ask(app, prompt(0))
        found = await cache(app)
        assert (found["view"], found["verdict"]) == ("sent", "agrees")
        assert found["compared"]["sent"]["answers"]["reported_tokens"] == 320 * (RECENT - 1)
        assert found["events"] == []


async def test_events_that_stop_are_missed(caplog: pytest.LogCaptureFixture) -> None:
    clock = Skipping()
    async with (
        running_fleet([EngineSpec(kv_events=EVENTS)], speed=SPEED) as (engine,),
        serving(engine.url, clock=clock, **TELLS) as app,
    ):
        await ask(app, prompt(0))
        await told(app)
        assert await causes(app) == set()
        engine.fault("stop-events")
        await ask(app, prompt(1))
        assert await causes(app) == set()
        clock.skipped_s += 6
        assert await causes(app) == {"no-events"}
        assert await metric(app, "pointsman_cache_warning") == {'cause="no-events"': 1}
        assert caplog.text.count("no KV events come any more") == 1
        engine.clear_faults()
        await ask(app, prompt(2))
        await told(app)
        assert await causes(app) == set()
        assert await metric(app, "pointsman_cache_warning") == {}


async def test_a_publisher_that_cannot_be_reached_is_named() -> None:
    clock = Skipping()
    usage = {"prompt_tokens": 1000, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 0}}
    answer = reply(json.dumps({"choices": [], "usage": usage}).encode())
    async with (
        FakeUpstream([answer]) as engine,
        serving(engine, clock=clock, kv_events={"mode": "all", "port": 1}) as app,
    ):
        await until(lambda: knows_source(app))
        assert await causes(app) == set()
        await ask(app, "What is a siding?")
        assert await causes(app) == set()
        clock.skipped_s += 6
        [warning] = (await cache(app))["warnings"]
        assert warning["cause"] == "no-events"
        assert "nobody answers at tcp://127.0.0.1:1;" in warning["says"]


async def knows_source(app: Application) -> bool:
    await admin(app, "/healthz")
    return bool(app.core.kv_events.sources())


@pytest.mark.parametrize("recovery", ["its time is over", "it has begun anew"])
async def test_an_index_that_tells_less_than_is_held_is_set_aside_and_tried_again(
    caplog: pytest.LogCaptureFixture, recovery: str
) -> None:
    caplog.set_level(logging.INFO)
    clock = Skipping()
    async with (
        running_fleet([EngineSpec(kv_events=EVENTS)], speed=SPEED) as (engine,),
        serving(engine.url, clock=clock, **TELLS) as app,
    ):
        await ask(app, prompt(999))
        await told(app)
        engine.fault("late-events", delay_s=600)
        for i in range(RECENT):
            await ask(app, prompt(i))
        clock.skipped_s += 3  # what was just sent no longer counts
        for i in range(RECENT):
            assert (await cache(app))["view"] == "events"
            await ask(app, prompt(i))
        found = await cache(app)
        assert (found["view"], found["verdict"], found["set_aside"]["times"]) == ("sent", "set aside", 1)
        assert "tried again in" in found["reason"]
        assert await metric(app, "pointsman_cache_events_set_aside") == {"": 1}
        assert caplog.text.count("are set aside") == caplog.text.count("tried again after 60 s") == 1
        assert "tells it more than 2 s late" in caplog.text
        # Meanwhile what was sent is right.
        await ask(app, prompt(5))
        [record] = json.loads((await admin(app, "/decisions?limit=1")).body)["decisions"]
        assert record["matched_by"] == "sent"
        assert record["matched_tokens"] >= 320

        assert await metric(app, "pointsman_cache_events_set_aside_times_total") == {"": 1}

        engine.clear_faults()
        if recovery == "its time is over":
            clock.skipped_s += 61
        else:
            engine.fault("restart")
        await until(lambda: by_events(app), 5000)
        assert f"are gone by again: {recovery}" in caplog.text
        assert await causes(app) == set()
        assert await metric(app, "pointsman_cache_events_set_aside") == {"": 0}


async def by_events(app: Application) -> bool:
    return bool((await cache(app))["view"] == "events")


async def test_an_index_that_tells_of_what_has_gone_is_set_aside() -> None:
    """Evictions that nobody tells of; by what was sent it is known that there is no room for so much."""
    spec = EngineSpec(kv_events=EVENTS, kv_tokens=60 * 20 * BLOCK)
    async with running_fleet([spec], speed=SPEED) as (engine,), serving(engine.url, **TELLS) as app:
        for i in range(50):
            await ask(app, prompt(i))
        await told(app, 1000)
        engine.fault("stop-events")
        for i in range(100, 150):
            await ask(app, prompt(i))
        for i in range(RECENT):
            await ask(app, prompt(i))
        found = await cache(app)
        assert (found["view"], found["set_aside"]["times"]) == ("sent", 1)
        assert "it holds less than it tells" in found["reason"]


async def test_a_tokenizer_that_is_not_the_engines_is_noticed_and_what_was_sent_answers() -> None:
    """A server that is asked for tokens, of another model than it should be."""

    def tokens(request: Received) -> list[Step]:
        if request.target.endswith("/render"):
            return [reply(status=404)]
        text = json.loads(request.body)["prompt"]
        ids = list(text.encode())  # a byte each; the engine's have four
        return [reply(json.dumps({"count": len(ids), "max_model_len": 9999, "tokens": ids}).encode())]

    async with (
        running_fleet([EngineSpec(kv_events=EVENTS)], speed=SPEED) as (engine,),
        FakeUpstream(tokens) as other,
        serving(engine.url, kv_events={"mode": "auto"}, tokens={"budget_s": 5, "url": other.url}) as app,
    ):
        await ask(app, prompt(0))
        await told(app)
        text = "Points are set before the train comes. " * 40
        for i in range(RECENT):
            assert (await cache(app))["view"] == "events", i
            await ask(app, text)
        found = await cache(app)
        assert found["view"] == "sent"
        assert [warning["cause"] for warning in found["warnings"]] == ["tokens-differ", "events-set-aside"]
        assert "tokens.url" in found["warnings"][0]["says"]
        assert "other tokens" in found["reason"]
        await ask(app, text)
        [record] = json.loads((await admin(app, "/decisions?limit=1")).body)["decisions"]
        assert record["matched_tokens"] > 0.9 * record["prompt_tokens"]


async def test_a_cache_that_was_reset_unseen_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        running_fleet([EngineSpec(kv_events=EVENTS)], speed=SPEED) as (engine,),
        serving(engine.url, **TELLS) as app,
    ):
        await ask(app, prompt(999))
        await told(app)
        for i in range(10):
            await ask(app, prompt(i))
        await told(app, 210)
        engine.fault("stop-events")
        await reset(engine)
        for i in range(10):
            await ask(app, prompt(i))
        found = await cache(app)
        assert found["compared"]["events"]["answers"]["predicted_tokens"] == 3200
        assert found["compared"]["events"]["answers"]["reported_tokens"] == 0
        assert "nothing-cached" in {warning["cause"] for warning in found["warnings"]}
        assert "was its cache reset" in caplog.text


async def test_prefix_caching_that_is_off_is_said() -> None:
    spec = EngineSpec(kv_events=EVENTS, enable_prefix_caching=False)
    async with running_fleet([spec], speed=SPEED) as (engine,), serving(engine.url, **TELLS) as app:
        await ask(app, prompt(0))
        found = await cache(app)
        assert [warning["cause"] for warning in found["warnings"]] == ["prefix-caching-off"]
        assert found["engine"]["prefix_caching"] is False


async def test_gaps_that_cannot_be_filled_and_numbers_that_begin_again_are_told() -> None:
    clock = Skipping()
    async with (
        running_fleet([EngineSpec(kv_events=NO_REPLAY)], speed=SPEED) as (engine,),
        serving(engine.url, clock=clock, **TELLS) as app,
    ):
        await until(lambda: connected(app))
        await ask(app, prompt(0))
        await told(app)
        engine.fault("lose-events", count=1)
        await ask(app, prompt(1))
        await ask(app, prompt(2))
        await told(app, 40)
        assert await causes(app) == {"events-lost"}
        for i in range(3):
            engine.fault("renumber-events")
            await ask(app, prompt(10 + i))
            await told(app, 60 + 20 * i)
        assert await causes(app) == {"events-lost", "events-renumbered"}
        clock.skipped_s += 61
        assert await causes(app) == set()


async def test_a_page_with_another_block_size_is_told() -> None:
    """As when a publisher's address leads to another engine."""
    async with (
        running_fleet([EngineSpec(kv_events=EVENTS, block_tokens=32)], speed=SPEED) as (other,),
        FakeUpstream(models=["granite-4.1-8b"]) as engine,
    ):
        assert other.publisher is not None
        engine.page = b'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n' + PAGE
        engine.kv_event_sources = json.dumps(other.publisher.sources()).encode()
        async with serving(engine, **TELLS) as app:
            await until(lambda: connected(app))
            await ask(app, prompt(0), other.port)
            await told(app)
            found = await cache(app)
            assert found["index"]["events"]["block_tokens"] == 32
            assert [warning["cause"] for warning in found["warnings"]] == ["block-size"]


PAGE = b'vllm:num_requests_running{model_name="granite-4.1-8b"} 0.0\n'


async def connected(app: Application) -> bool:
    await admin(app, "/healthz")
    return any(source.live for source in app.core.kv_events.sources())


async def test_counters_stand_in_for_answers_that_do_not_tell() -> None:
    clock = Skipping()
    pages = {"idle_interval_s": 0.05, "interval_s": 0.05}
    async with (
        running_fleet([EngineSpec(kv_events=EVENTS)], speed=SPEED) as (engine,),
        serving(engine.url, clock=clock, metrics=pages, **TELLS) as app,
    ):
        await ask(app, prompt(0))
        await told(app)

        async def counted() -> bool:
            """A page has come after the last answer, and the span that it ends was long enough."""
            return "counters" in (await cache(app))["compared"].get("events", {})

        async def another_round() -> bool:
            for _ in range(RECENT):
                await ask(app, prompt(0), stream=True)
            await admin(app, "/healthz")  # all of it has been told
            clock.skipped_s += 1
            for _ in range(300):
                if await counted():
                    return True
            return False

        await until(another_round, 5)  # the first page with anything in it begins a span
        found = (await cache(app))["compared"]["events"]["counters"]
        assert found["requests"] >= RECENT
        assert found["error_tokens"] == 0
        assert found["reported_tokens"] == found["predicted_tokens"] == 320 * found["requests"]
        labels = 'by="counters",view="events"'
        assert (await metric(app, "pointsman_cache_compared_requests_total"))[labels] == found["requests"]
