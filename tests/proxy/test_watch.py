"""The gateway learns from its endpoints' metrics while it decides nothing."""

from __future__ import annotations

import asyncio

from pointsman.sim.fleet import running_fleet
from pointsman.sim.spec import FleetItem
from pointsman.testing.client import RawClient, message
from pointsman.testing.serving import endpoints, serving, until

LEAST_COST = {"preset": "least-cost"}


async def test_long_answers_teach_how_fast_an_endpoint_is_while_nothing_is_decided() -> None:
    body = {"prompt": "once upon a time " * 40, "max_tokens": 4000, "stream": True}
    async with (
        running_fleet((FleetItem(accelerator="mi325x"),)) as (engine,),
        serving(engine.url, scheduling=LEAST_COST) as app,
    ):
        body["model"] = app.pool.models()[0]
        clients = [RawClient(app.port) for _ in range(3)]
        async with clients[0], clients[1], clients[2]:
            asked = [
                asyncio.create_task(one.ask(message("POST", "/v1/completions", body))) for one in clients
            ]

            async def known() -> bool:
                await asyncio.sleep(0.05)  # samples take seconds, and the engine needs the time
                (told,) = (await endpoints(app)).values()
                learned = told["learned"]
                return learned is not None and learned["evidence_s"] > 0.5

            await until(known, tries=200)
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
