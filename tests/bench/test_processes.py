"""Processes started for a measurement: they get ready, tell why not, and are gone afterwards."""

import asyncio
import os
import signal
import time

import pytest

from pointsman.bench.probe import Probe, mean_wait_s
from pointsman.bench.processes import ProcessFailed, running


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_process_gets_ready_and_is_gone_after_the_block(server):
    args = ("serve", server.url, "--host", "127.0.0.1", "--port", "0", "--admin-port", "0")
    async with running("router", args) as process:
        url = (await process.says(r"^base URL: (\S+)/v1$", 20.0))[1]
        assert url.startswith("http://127.0.0.1:")
        assert _alive(process.pid)
        assert process.cpu_s() > 0
    assert not _alive(process.pid)


async def test_a_process_that_ends_has_its_last_words_told():
    async with running("router", ("serve",)) as process:
        with pytest.raises(ProcessFailed, match=r"router ended: .*endpoints: name at least one"):
            await process.says("base URL", 20.0)


async def test_a_process_that_died_in_the_middle_has_its_last_words_told(server):
    args = ("serve", server.url, "--host", "127.0.0.1", "--port", "0", "--admin-port", "0")
    async with running("router", args) as process:
        await process.says("^base URL", 20.0)
        os.kill(process.pid, signal.SIGKILL)
        await process._process.wait()
        with pytest.raises(ProcessFailed, match=r"router ended: .*base URL"):
            process.cpu_s()


async def test_a_process_that_does_not_get_ready_is_told(server):
    args = ("serve", server.url, "--host", "127.0.0.1", "--port", "0", "--admin-port", "0")
    async with running("router", args) as process:
        with pytest.raises(ProcessFailed, match=r"router was not ready in 0\.1 s"):
            await process.says("never said", 0.1)
    assert not _alive(process.pid)


async def test_a_probe_times_round_trips(server):
    async with Probe(server.url, "/health", time.perf_counter) as probe:
        await asyncio.sleep(0.3)
        assert len(probe.round_trips_s) >= 2
    waits_s = probe.waits_s()
    assert min(waits_s) == 0
    assert 0 <= mean_wait_s(waits_s) < max(probe.round_trips_s)


def test_a_long_wait_counts_for_all_who_would_have_come_meanwhile():
    assert mean_wait_s([]) == 0.0
    assert mean_wait_s([0.001] * 400) == pytest.approx(0.001, rel=0.02)
    minute = [0.0] * 2360 + [1.0]  # a request every 25 ms, and a second in which the process stood still
    assert mean_wait_s(minute) == pytest.approx(0.5 / 60, rel=0.1)
