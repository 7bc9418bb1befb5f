"""A fleet and a router as processes, and that one of them falling behind is seen."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from pointsman.bench.client import Client, Target
from pointsman.bench.pace import Pace
from pointsman.bench.site import site, watching
from pointsman.bench.workloads import Call
from pointsman.config import Server, Settings
from pointsman.sim.spec import FleetFile, FleetItem

CLOCKS = time.perf_counter, time.process_time
FLEET = FleetFile(engines=(FleetItem(accelerator="h100-nvl", count=2),), speed=50.0)
HELD_S = 0.3


async def test_the_router_knows_the_engines_by_their_names(tmp_path: Path) -> None:
    async with site(FLEET, Settings(server=Server(endpoint_header=True)), tmp_path) as at:
        assert list(at.engines) == ["h100-nvl-0", "h100-nvl-1"]
        client = Client(Target(url=at.url), Pace(CLOCKS[0]))
        try:
            assert await client.find_model() == "granite-4.1-8b"
            record = await client.send(Call("a prompt", 2, 5), 0.0)
        finally:
            await client.close()
    assert (record.error, record.usage.output_tokens) == ("", 5)
    assert record.endpoint in at.engines


@pytest.mark.parametrize("name", ["fleet", "router"])
async def test_a_process_that_stood_still_has_lagged(name: str, tmp_path: Path) -> None:
    async with site(FLEET, Settings(), tmp_path) as at:
        pid = {"fleet": at.fleet, "router": at.router}[name].pid
        async with watching(at, CLOCKS) as lags:
            await asyncio.sleep(HELD_S)  # time is what is measured
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(HELD_S)
            finally:
                os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(HELD_S)
    (other,) = {"fleet", "router"} - {name}
    assert lags[name].mean_s > HELD_S / 10  # a third of the time, half of it on average
    assert lags[name].max_s > HELD_S / 2
    assert lags[name].mean_s > 3 * lags[other].mean_s
    assert lags["load generator"].mean_s < lags[name].mean_s
    assert all(0 <= lag.cpu_share < 1.5 for lag in lags.values())
