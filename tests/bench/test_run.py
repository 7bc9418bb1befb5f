"""Stages of a run: what is sent, in which order, and what is left after an interruption."""

import asyncio
import time

import pytest

from pointsman.bench.client import Client, Target
from pointsman.bench.pace import Pace
from pointsman.bench.run import Bench, Load
from pointsman.bench.workloads import SharedPrefix, Trace

WORKLOAD = SharedPrefix(groups=3, prompts_per_group=2, system_prompt_len=8, question_len=4, output_len=3)


async def stages(server, *loads, workload=WORKLOAD, speed=1.0, seed=0):
    pace = Pace(time.perf_counter, speed)
    client = Client(Target(url=server.url, model="m"), pace)
    bench = Bench(client, workload, pace, seed=seed)
    try:
        for load in loads:
            await bench.stage(load)
    finally:
        await client.close()
    return bench.stages


async def test_a_ladder_sends_rate_times_duration_each_stage_and_goes_on_in_the_workload(server):
    found = await stages(server, Load(rate=100, duration_s=0.1), Load(rate=200, duration_s=0.1))
    assert [(s.load, s.requests, s.ok, s.rate) for s in found] == [
        ("rate 100", 10, 10, 100),
        ("rate 200", 20, 20, 200),
    ]
    expected = [call.prompt for call, _ in zip(WORKLOAD.calls(0), range(30), strict=False)]
    assert sorted(body["prompt"] for body in server.bodies) == sorted(expected)


async def test_the_seed_decides_what_is_sent(server):
    await stages(server, Load(concurrency=1, requests=5), seed=7)
    await stages(server, Load(concurrency=1, requests=5), seed=7)
    await stages(server, Load(concurrency=1, requests=5), seed=8)
    first, again, other = server.bodies[:5], server.bodies[5:10], server.bodies[10:]
    assert first == again
    assert first != other


async def test_a_closed_loop_stage_counts_requests_and_tokens(server):
    (found,) = await stages(server, Load(concurrency=4, requests=40))
    assert (found.requests, found.ok, found.output_tokens, found.rate) == (40, 40, 120, None)
    assert server.connections == 4


async def test_a_trace_keeps_its_own_times(server, tmp_path):
    rows = [f'{{"timestamp":{at},"input_length":8,"output_length":2}}' for at in (0, 50, 100, 9e9)]
    (tmp_path / "trace.jsonl").write_text("\n".join(rows))
    trace = Trace(str(tmp_path / "trace.jsonl"))
    (found,) = await stages(server, Load(requests=3), workload=trace)
    assert (found.load, found.requests) == ("trace", 3)
    assert 0.1 <= found.send_s < 1.0


async def test_at_a_speed_stages_take_less_of_our_time(server):
    began = time.perf_counter()
    (found,) = await stages(server, Load(rate=1, duration_s=10, arrivals="constant"), speed=50)
    assert time.perf_counter() - began < 5
    assert found.send_s == pytest.approx(9.0, abs=1.0)


async def test_an_interrupted_stage_reports_what_has_ended(server, say):
    stuck = asyncio.Event()
    fourth = asyncio.Event()
    answer = say.sse(say.token())
    server.script = lambda n, body: [answer] if n < 4 else [fourth.set() or b"", stuck]
    pace = Pace(time.perf_counter)
    client = Client(Target(url=server.url, model="m"), pace)
    bench = Bench(client, WORKLOAD, pace)
    run = asyncio.create_task(bench.stage(Load(concurrency=1, requests=10)))
    await fourth.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    await client.close()
    assert [s.requests for s in bench.stages] == [3]
