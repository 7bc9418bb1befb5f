"""When calls are made. Virtual time: no sockets, no waiting."""

import asyncio
from itertools import count

import pytest

from pointsman.bench.client import Record
from pointsman.bench.load import closed_loop, open_loop
from pointsman.bench.pace import Pace
from pointsman.bench.workloads import Call

CALL = Call("x", 1, 1)


class Server:
    """Takes ``took_s`` (engine seconds) for each call, and knows how many it had at once."""

    def __init__(self, pace, took_s):
        self.pace, self.took_s = pace, took_s
        self.records, self.at_once, self.most = [], 0, 0

    async def send(self, call, due_s):
        sent_s = self.pace.now()
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await self.pace.until(sent_s + self.took_s)
        self.at_once -= 1
        return Record(due_s=due_s, sent_s=sent_s, end_s=self.pace.now())


def calls():
    return (CALL for _ in count())


def pace(speed=1.0):
    return Pace(asyncio.get_running_loop().time, speed)


@pytest.mark.looptime
async def test_open_loop_sends_when_due_however_slow_the_server_is():
    server = Server(pace(), 100.0)
    start_s = server.pace.now()
    await open_loop(server.send, calls(), [0.5, 1.0, 7.25], server.pace, server.records.append)
    assert [r.due_s - start_s for r in server.records] == pytest.approx([0.5, 1.0, 7.25])
    assert [r.sent_s - r.due_s for r in server.records] == pytest.approx([0, 0, 0], abs=0.002)
    assert server.most == 3
    assert server.pace.now() - start_s == pytest.approx(107.25, abs=0.01)


@pytest.mark.looptime
async def test_every_request_ends_once_and_counts_are_exact():
    server = Server(pace(), 3.0)
    await open_loop(server.send, calls(), [i / 50 for i in range(500)], server.pace, server.records.append)
    assert len(server.records) == 500
    assert server.at_once == 0


@pytest.mark.looptime
async def test_open_loop_ends_with_its_calls():
    server = Server(pace(), 1.0)
    await open_loop(server.send, iter([CALL, CALL]), [0.0, 0.0, 0.0, 5.0], server.pace, server.records.append)
    assert len(server.records) == 2


@pytest.mark.looptime
async def test_at_a_speed_all_times_are_engine_seconds():
    loop = asyncio.get_running_loop()
    began = loop.time()
    server = Server(pace(speed=20.0), 40.0)
    await open_loop(server.send, calls(), [0.0, 100.0], server.pace, server.records.append)
    assert loop.time() - began == pytest.approx(7.0, abs=0.01)
    assert [r.end_s - r.sent_s for r in server.records] == pytest.approx([40.0, 40.0], abs=0.1)


@pytest.mark.looptime
async def test_closed_loop_keeps_n_running_until_time_is_up():
    server = Server(pace(), 2.0)
    until_s = server.pace.now() + 10.0
    await closed_loop(server.send, calls(), 4, until_s, server.pace, server.records.append)
    assert server.most == 4
    assert len(server.records) == 4 * 5
    assert all(r.due_s == r.sent_s for r in server.records)


@pytest.mark.looptime
async def test_closed_loop_ends_with_its_calls():
    server = Server(pace(), 1.0)
    await closed_loop(server.send, iter([CALL] * 7), 3, float("inf"), server.pace, server.records.append)
    assert len(server.records) == 7
