"""The gateway in front of engines that publish KV events: its precise index knows what they hold."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from pointsman.prefix.kv_source import KvEventSource
from pointsman.proxy.application import Application
from pointsman.sim.fleet import running_fleet
from pointsman.sim.kv_layouts import Layout
from pointsman.sim.spec import EngineSpec, KvEvents
from pointsman.testing.client import RawClient, message
from pointsman.testing.serving import admin, serving, until

SPEED = 50
TOKENS = list(range(1000, 1064))
BLOCK = 16


def publishing(layout: Layout = "map", **fields: object) -> EngineSpec:
    events = KvEvents(endpoint="tcp://*:0", replay_endpoint="tcp://*:0", delay_s=0, layout=layout, **fields)  # type: ignore[arg-type]
    return EngineSpec(kv_events=events)


async def complete(app: Application, tokens: list[int]) -> None:
    body = {"model": app.pool.models()[0], "prompt": tokens, "max_tokens": 1}
    async with RawClient(app.port) as client:
        answer = await client.ask(message("POST", "/v1/completions", body, "connection: close"))
    assert answer.status == 200, json.loads(answer.body)


def source(app: Application) -> KvEventSource:
    [found] = app.core.kv_events.sources()
    return found


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("int_block_hashes", [True, False])
async def test_the_index_learns_the_blocks_that_an_engine_stores(
    layout: Layout, int_block_hashes: bool
) -> None:
    async with (
        running_fleet([publishing(layout, int_block_hashes=int_block_hashes)], speed=SPEED) as (engine,),
        serving(engine.url, kv_events={"mode": "auto"}) as app,
    ):

        async def knows() -> bool:
            await admin(app, "/endpoints")  # a round trip
            return app.core.precise.blocks(0) == len(TOKENS) // BLOCK

        await complete(app, TOKENS)
        await until(knows)
        assert app.core.precise.block_tokens(0) == BLOCK
        now = source(app)
        assert (now.malformed, now.skipped, now.gaps, now.cleared, now.live) == (0, 0, 0, 0, True)


async def test_an_engine_that_crashes_is_forgotten_and_heard_again() -> None:
    async with (
        running_fleet([publishing()], speed=SPEED) as (engine,),
        serving(engine.url, kv_events={"mode": "auto"}) as app,
    ):

        async def blocks_are(count: int) -> bool:
            await admin(app, "/endpoints")
            return app.core.precise.blocks(0) == count and source(app).live

        await complete(app, TOKENS)
        await until(lambda: blocks_are(4))
        engine.fault("crash", for_s=0.05)
        await until(lambda: blocks_are(0), tries=5000)
        await complete(app, TOKENS[:32])
        await until(lambda: blocks_are(2), tries=5000)
        assert source(app).malformed == 0


async def test_without_settings_for_it_nothing_is_heard() -> None:
    async with running_fleet([publishing()], speed=SPEED) as (engine,), serving(engine.url) as app:
        await complete(app, TOKENS)
        assert app.core.kv_events.sources() == []
        assert app.core.precise.blocks(0) == 0
