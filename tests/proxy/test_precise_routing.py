"""The gateway in front of engines that tell what they hold, each in blocks of its own size, and one that does
not.
"""

from __future__ import annotations

import json
from typing import Any

from pointsman.proxy.application import Application
from pointsman.sim.fleet import running_fleet
from pointsman.sim.spec import EngineSpec, KvEvents
from pointsman.testing.client import RawClient, message
from pointsman.testing.serving import admin, serving, until

SPEED = 50
TELLS = {"kv_events": {"mode": "auto"}, "tokens": {"budget_s": 5}, "scheduling": {"preset": "least-cost"}}
EVENTS = KvEvents(endpoint="tcp://*:0", replay_endpoint="tcp://*:0", delay_s=0)
SYSTEM = " ".join(f"rule {i}: be brief and say {i * 7}." for i in range(120))


async def ask(app: Application, path: str, **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of its decision, and the answer's usage."""
    async with RawClient(app.port) as client:
        whole = {"model": app.pool.models()[0], "max_tokens": 2, **body}
        answer = await client.ask(message("POST", path, whole, "connection: close"))
    assert answer.status == 200, answer.body
    [record] = json.loads((await admin(app, "/decisions?limit=1")).body)["decisions"]
    return record, json.loads(answer.body)["usage"]


async def settled(app: Application, blocks: int = 1) -> None:
    """Every engine's events so far have arrived: all have told of blocks, and no more come."""

    async def quiet() -> bool:
        before = [source.blocks for source in app.core.kv_events.sources()]
        for _ in range(20):
            await admin(app, "/healthz")
        after = [source.blocks for source in app.core.kv_events.sources()]
        return before == after and sum(after) >= blocks

    await until(quiet)


async def test_predicted_is_what_engines_report_whatever_their_block_size() -> None:
    specs = [
        EngineSpec(kv_events=EVENTS, block_tokens=16),
        EngineSpec(kv_events=EVENTS, block_tokens=128),
    ]
    async with (
        running_fleet(specs, speed=SPEED) as engines,
        serving(*(e.url for e in engines), **TELLS) as app,
    ):
        # Blocks are known from the first event on: make each engine tell of some.
        for i, engine in enumerate(engines):
            others = [other for other in engines if other is not engine]
            for other in others:
                app.pool.drain(other.url.removeprefix("http://"), True)
            await ask(app, "/v1/completions", prompt=f"first {i} " * 100)
            for other in others:
                app.pool.drain(other.url.removeprefix("http://"), False)
        await settled(app)
        seen = 0
        history: list[dict[str, str]] = [{"role": "system", "content": SYSTEM}]
        for turn in range(6):
            history.append({"role": "user", "content": f"question {turn}: " + "why? " * 40})
            record, usage = await ask(app, "/v1/chat/completions", messages=history)
            assert "untokenized" not in record
            assert record["prompt_tokens"] == usage["prompt_tokens"]
            if record["matched_by"] == "events":
                seen += 1
                assert record["matched_tokens"] == usage["prompt_tokens_details"]["cached_tokens"], turn
            history.append({"role": "assistant", "content": "because."})
            await settled(app)
        assert seen >= 5
        assert record["matched_tokens"] > 500


async def test_the_engine_that_does_not_tell_is_known_by_what_was_sent() -> None:
    specs = [EngineSpec(kv_events=EVENTS), EngineSpec()]
    async with (
        running_fleet(specs, speed=SPEED) as engines,
        serving(*(e.url for e in engines), **TELLS) as app,
    ):
        teller, silent = (engine.url.removeprefix("http://") for engine in engines)
        app.pool.drain(silent, True)
        await ask(app, "/v1/completions", prompt="warm " * 100)
        await settled(app)
        app.pool.drain(silent, False)
        app.pool.drain(teller, True)
        await ask(app, "/v1/completions", prompt=SYSTEM)
        app.pool.drain(teller, False)
        record, usage = await ask(app, "/v1/completions", prompt=SYSTEM)
        assert (record["chosen"], record["matched_by"]) == (silent, "sent")
        assert record["matched_tokens"] > 0.9 * usage["prompt_tokens"]


async def test_who_waits_for_token_ids_longer_than_the_budget_goes_without() -> None:
    async with (
        running_fleet([EngineSpec(kv_events=EVENTS)], speed=SPEED) as (engine,),
        serving(engine.url, **(TELLS | {"tokens": {"budget_s": 1e-6}})) as app,
    ):
        await ask(app, "/v1/completions", prompt="warm " * 100)
        await settled(app)
        record, _ = await ask(app, "/v1/completions", prompt=SYSTEM)
        assert (record["matched_by"], record["untokenized"]) == ("sent", "late")
        page = (await admin(app, "/metrics")).body.decode()
        assert 'pointsman_token_ids_missing_total{reason="late"} 1.0' in page
