"""Workloads over HTTP and in the twin: what arrives, and that what follows is sent."""

import json
import time
from collections import Counter

import pytest

from pointsman.bench.client import Client, Target
from pointsman.bench.pace import Bursts, Pace
from pointsman.bench.run import Bench, Load
from pointsman.bench.workloads import Adapters, Agents, Conversations, Part, SharedPrefix, SloClasses, Tenants
from pointsman.bench.workloads.lengths import Fixed
from pointsman.bench.workloads.reading import KINDS, read_workload
from pointsman.sim.spec import FleetItem
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Scenario

CHATS = Conversations(
    system_prompts=2,
    system_prompt_len=8,
    question_len=4,
    output_len=3,
    output_shape=Fixed(),
    turns=3,
    turns_shape=Fixed(),
    think_s=0.01,
)
TREES = Agents(system_prompt_len=8, task_len=4, step_len=2, output_len=2, branches=3, levels=1, tool_s=0.0)


async def send(server, workload, load, **target):
    pace = Pace(time.perf_counter)
    client = Client(Target(url=server.url, model="base", **target), pace)
    bench = Bench(client, workload, pace)
    try:
        await bench.stage(load)
    finally:
        await client.close()
    (stage,) = bench.stages
    return stage


LOADS = {
    "open": Load(rate=200, requests=10),
    "closed": Load(concurrency=2, requests=10),
    "bursts": Load(rate=200, requests=10, arrivals=Bursts(cv=2.0)),
}


@pytest.mark.parametrize("load", LOADS)
async def test_all_turns_of_a_conversation_are_sent(server, load):
    stage = await send(server, CHATS, LOADS[load])
    assert (stage.requests, stage.ok) == (30, 30)
    prompts = [body["prompt"] for body in server.bodies]
    assert Counter(map(len, prompts)) == {4 * 12: 10, 4 * 19: 10, 4 * 26: 10}
    for prompt in prompts:  # each later turn comes after the one that it goes on from
        before = [p for p in prompts[: prompts.index(prompt)] if prompt.startswith(p)]
        shorter = [p for p in prompts if p != prompt and prompt.startswith(p)]
        assert before == shorter
    assert Counter(sum(p != q and p.startswith(q) for q in prompts) for p in prompts) == {0: 10, 1: 10, 2: 10}


@pytest.mark.parametrize("load", ["open", "closed"])
async def test_a_tree_is_sent_from_its_root_to_the_call_that_joins_it(server, load):
    stage = await send(server, TREES, LOADS[load])
    assert (stage.requests, stage.ok) == (50, 50)


async def test_what_would_have_followed_a_failure_is_not_sent(server, say):
    server.script = lambda n, body: [say.plain(503, {"error": {"message": "full"}})]
    stage = await send(server, CHATS, LOADS["open"])
    assert (stage.requests, stage.ok) == (10, 0)


async def test_adapters_salts_and_headers_arrive(server):
    prompts = SharedPrefix(groups=2, system_prompt_len=8, question_len=4, output_len=2)
    workload = SloClasses(
        parts=(
            Part(name="a", ttft_s=0.5, of=Adapters(adapters=("sql",), of=CHATS)),
            Part(name="b", of=Tenants(tenants=1, of=prompts)),
        )
    )
    await send(server, workload, Load(concurrency=1, requests=20), api="chat", headers=(("x-mine", "1"),))
    seen = set()
    for head, body in zip(server.heads, server.bodies, strict=True):
        headers = dict(line.split(": ", 1) for line in head.strip().split("\r\n")[1:])
        assert headers["x-mine"] == "1"
        objective = headers["x-llm-d-inference-objective"]
        seen.add((objective, headers.get("x-llm-d-slo-ttft-ms"), body["model"], body.get("cache_salt")))
    assert seen == {("a", "500", "sql", None), ("b", None, "base", "tenant-0")}


SMALL = {
    "shared-prefix": {"system_prompt_len": 512, "output_len": 20},
    "random": {"output_len": 20},
    "conversations": {"think_s": 1.0, "output_len": 20},
    "agents": {"output_len": 20},
    "decode-heavy": {"long_least": 400, "long_most": 800},
    "mixed-lengths": {"long_len": 8000, "long_share": 0.3},
    "lora": {"adapters": 3},
    "tenants": {},
    "slo-classes": {"classes": 3},
}


@pytest.mark.parametrize("kind", [*SMALL, "trace"])
def test_every_kind_runs_in_the_twin(kind, tmp_path):
    if kind == "trace":
        rows = [
            {"timestamp": 200 * i, "input_length": 600, "output_length": 20, "hash_ids": [1, i]}
            for i in range(20)
        ]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        workload, load = read_workload("trace", (), {"path": str(tmp_path / "t.jsonl")}), Load()
    else:
        workload, load = read_workload(kind, (), SMALL[kind]), Load(rate=10, requests=20)
    assert kind in KINDS
    loras = ("lora-0", "lora-1", "lora-2") if kind == "lora" else ()
    engines = (FleetItem(accelerator="h100-nvl", count=2, loras=loras),)
    scenario = Scenario(engines=engines, workload=workload, stages=(load,), warm_up_stages=0)
    (stage,) = Simulation(scenario, policy("llm-d-affinity")).run()
    assert {record.error for record in stage.records} == {""}
    follows = kind in ("conversations", "agents", "slo-classes")
    assert len(stage.records) > 40 if follows else len(stage.records) == 20


def test_later_turns_find_what_was_said_in_the_cache_of_the_twins_engines():
    chats = Conversations(system_prompts=200, think_s=1.0, turns=6)
    scenario = Scenario(
        engines=(FleetItem(accelerator="h100-nvl", count=3),),
        workload=chats,
        stages=(Load(rate=3, requests=60),),
        warm_up_stages=0,
    )
    (stage,) = Simulation(scenario, policy("llm-d-affinity")).run()
    later = [record for record in stage.records if record.prompt_tokens > 1200]
    assert len(later) > 100
    cached = [record.usage.cached_tokens / record.prompt_tokens for record in later]
    assert sum(share > 0.7 for share in cached) / len(cached) > 0.9
