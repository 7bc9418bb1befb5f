"""Whole runs: what the clients see, what the router remembers, what goes wrong on command."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from pointsman import api
from pointsman.bench.client import Client, Target
from pointsman.bench.pace import Pace
from pointsman.bench.run import Load
from pointsman.bench.text import text
from pointsman.bench.workloads import Call, SharedPrefix
from pointsman.endpoints.metrics.mapping import PageReader
from pointsman.endpoints.metrics.vllm import ENGINE
from pointsman.errors import SettingsError
from pointsman.sim.metrics import EngineMetrics
from pointsman.sim.spec import FleetItem
from pointsman.sim.tokens import BlockHasher
from pointsman.twin.gateway import RouterCost, Served
from pointsman.twin.policies import policy
from pointsman.twin.prompts import Prompts
from pointsman.twin.run import Simulation, StageRun
from pointsman.twin.scenario import Incident, Scenario
from pointsman.types import Decision, InferenceRequest, Outcome

SMALL = SharedPrefix(groups=6, prompts_per_group=2, system_prompt_len=1024, question_len=128, output_len=50)
THREE = (
    FleetItem(accelerator="h100-nvl", name="h"),
    FleetItem(accelerator="mi325x", name="m"),
    FleetItem(accelerator="gaudi3", name="g"),
)


def scenario(**changes: object) -> Scenario:
    fields: dict[str, object] = {
        "engines": THREE,
        "workload": SMALL,
        "stages": (Load(rate=20, duration_s=5),),
        "warm_up_stages": 0,
    }
    return Scenario(**fields | changes)


class Ended:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, Decision | None, Outcome]] = []

    def __call__(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        self.outcomes.append((request.id, decision, outcome))


def run(policy_name: str = "llm-d-affinity", *, seed: int = 0, **changes: object) -> list[Served]:
    (stage,) = stages(policy_name, seed=seed, **changes)
    return stage.records


def stages(policy_name: str = "llm-d-affinity", *, seed: int = 0, **changes: object) -> list[StageRun]:
    ended = Ended()
    simulation = Simulation(scenario(**changes), policy(policy_name), seed=seed, observers=(ended,))
    runs = simulation.run()
    numbers = [record.number for run in runs for record in run.records]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))  # each call ended once
    assert sorted(name for name, _, _ in ended.outcomes) == [f"{n:08x}" for n in sorted(numbers)]
    for member in simulation.pool.members.values():
        assert (member.endpoint.load.requests, member.endpoint.load.tokens) == (0, 0)
    for server in simulation.servers.values():
        assert not server.engine.running
        assert not server.engine.waiting
        assert server.engine.kv_usage == 0
    return runs


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    first, second, other = (msgspec.json.encode(run("random", seed=s)) for s in (3, 3, 4))
    assert first == second
    assert first != other


def test_every_call_is_answered_and_takes_its_time() -> None:
    records = run()
    assert len(records) == 100
    for record in records:
        assert record.error == ""
        assert record.sent_s < record.first_s < record.end_s
        assert record.usage.prompt_tokens == 1152
        assert record.usage.output_tokens == 50


def test_prefix_routing_finds_in_the_engines_what_it_predicted() -> None:
    records = run("llm-d-affinity", stages=(Load(rate=2, duration_s=20),))
    homes = {group: {r.endpoint for r in records if r.group == group} for group in range(6)}
    assert all(len(endpoints) == 1 for endpoints in homes.values())
    warm = [r for r in records if r.matched_tokens]
    assert len(warm) >= 30
    for record in warm:  # the engine holds all but its last, partial block of what the index believed in
        assert record.usage.cached_tokens == pytest.approx(record.matched_tokens, abs=128 + 72)


def test_the_router_sees_what_its_parser_would_make_of_the_same_call() -> None:
    call = Call(text(random.Random(1), 300), 300, 20, max_tokens=20, cache_salt="tenant")
    target = Target(url="http://127.0.0.1:1", model="granite-4.1-8b", extra={"cache_salt": "tenant"})
    client = Client(target, Pace(lambda: 0.0))
    body = msgspec.json.encode(client._fields(call))
    parsed = api.find("/v1/completions").parse("00000007", "/v1/completions", {}, body)
    prompts = Prompts("granite-4.1-8b")
    made = prompts.request(7, call, prompts.prepare(call))
    assert bytes(made.prompts[0].data) == bytes(parsed.prompts[0].data)
    for field in ("id", "path", "format", "model", "stream", "root", "prompt_tokens", "max_tokens", "n"):
        assert getattr(made, field) == getattr(parsed, field), field


def test_metrics_are_those_of_the_engines_own_page() -> None:
    simulation = Simulation(scenario(stages=(Load(rate=60, duration_s=2),)), policy("round-robin"))
    seen = 0

    def look() -> None:
        nonlocal seen
        for server in simulation.servers.values():
            engine = server.engine
            page = EngineMetrics(engine, "granite-4.1-8b", 131072, 0.0)
            told = server.metrics()
            read, _ = PageReader(ENGINE).read(page.page(), simulation.events.now_s)
            for field in ("waiting", "running", "kv_usage", "block_tokens", "kv_blocks", "prefix_caching"):
                assert getattr(read, field) == getattr(told, field), field
            assert (read.prefix_queries, read.prefix_hits) == (told.prefix_queries, told.prefix_hits)
            seen += told.running > 0
        simulation.events.at(simulation.events.now_s + 0.1, look)

    simulation.events.at(0.5, look)
    simulation.run()
    assert seen > 20


def test_a_router_that_is_slow_shows_in_the_time_to_the_first_token() -> None:
    plain = {r.number: r for r in run("round-robin", stages=(Load(rate=2, duration_s=10),))}
    slow = run("round-robin", stages=(Load(rate=2, duration_s=10),), router=RouterCost(delay_s=0.5))
    for record in slow:
        before = plain[record.number]
        late_s = (record.first_s - record.sent_s) - (before.first_s - before.sent_s)
        assert late_s == pytest.approx(0.5, abs=0.05)


def test_requests_queue_for_the_routers_processor() -> None:
    records = run(router=RouterCost(request_s=0.1), stages=(Load(rate=20, duration_s=5),))
    waits = [r.first_s - r.sent_s for r in sorted(records, key=lambda r: r.number)]
    assert waits[-1] > 4  # 100 requests of 0.1 s in 5 s: the last waits for about 5 s
    assert waits[0] < 1
    records = run(router=RouterCost(request_s=0.1, cores=4), stages=(Load(rate=20, duration_s=5),))
    assert max(r.first_s - r.sent_s for r in records) < 1


def test_streamed_chunks_take_the_routers_processor_too() -> None:
    busy = run(router=RouterCost(chunk_s=0.01), stages=(Load(rate=20, duration_s=5),))
    free = run(stages=(Load(rate=20, duration_s=5),))
    assert max(r.first_s - r.sent_s for r in busy) > 1 + max(r.first_s - r.sent_s for r in free)


def test_a_client_gives_up_after_its_time_out() -> None:
    records = run(timeout_s=0.2)
    late = [r for r in records if r.error]
    assert late
    for record in late:
        assert record.error == "timeout"
        assert record.end_s - record.sent_s == pytest.approx(0.2)
    assert all(r.end_s - r.sent_s <= 0.2 for r in records if not r.error)


def test_a_crash_costs_only_streams_that_had_begun() -> None:
    crash = Incident(at_s=2.5, kind="crash", endpoint="h", for_s=1.0)
    records = run("round-robin", stages=(Load(rate=150, duration_s=5),), incidents=(crash,))
    lost = [r for r in records if r.error]
    assert lost
    for record in lost:
        assert record.error == "error in stream"
        assert record.endpoint == "h"
        assert record.first_s <= 2.5 == record.end_s
    moved = [r for r in records if r.tries > 1]
    assert moved
    assert all(not r.error and r.endpoint != "h" for r in moved)
    again = [r for r in records if r.endpoint == "h" and r.sent_s > 3.5]
    assert again  # it is used again
    assert min(again, key=lambda r: r.sent_s).usage.cached_tokens == 0


def test_what_a_server_counted_before_a_crash_is_not_lost() -> None:
    crash = Incident(at_s=4.0, kind="crash", endpoint="h", for_s=0.1)
    load = (Load(rate=40, duration_s=5),)
    (whole,) = stages("round-robin", engines=THREE[:1], stages=load)
    (cut,) = stages("round-robin", engines=THREE[:1], stages=load, incidents=(crash,))
    (before,), (after,) = whole.servers, cut.servers
    assert after.prompt_tokens > 0.7 * before.prompt_tokens
    assert 0 < after.cached_tokens < after.prompt_tokens


def test_a_server_that_is_full_answers_503_and_another_takes_the_request() -> None:
    small = (FleetItem(accelerator="h100-nvl", name="h", max_num_queued_reqs=2), *THREE[1:])
    runs = stages("round-robin", engines=small, stages=(Load(rate=40, duration_s=5),))
    (stage,) = runs
    assert all(not r.error for r in stage.records)
    refused = next(s.refused for s in stage.servers if s.name == "h")
    assert refused == sum(r.tries > 1 for r in stage.records) > 0


def test_when_all_are_full_the_client_gets_the_last_refusal() -> None:
    engines = tuple(FleetItem(name=name, max_num_queued_reqs=1) for name in ("a", "b"))
    records = run("round-robin", engines=engines, stages=(Load(rate=40, duration_s=5),))
    failed = [r for r in records if r.error]
    assert {r.error for r in failed} == {"status 503"}
    assert {r.tries for r in failed} == {2}


def test_a_slow_server_is_slow_for_its_time() -> None:
    slow = Incident(at_s=0.0, kind="slow", endpoint="h", factor=3.0)
    one = {"engines": THREE[:1], "stages": (Load(rate=1, duration_s=20),)}
    usual = {r.number: r.end_s - r.first_s for r in run(**one)}
    for record in run(**one, incidents=(slow,)):
        assert record.end_s - record.first_s > 2 * usual[record.number]


def test_servers_join_and_leave() -> None:
    incidents = (
        Incident(at_s=2.0, kind="join", endpoint="h"),
        Incident(at_s=3.0, kind="leave", endpoint="m"),
    )
    records = run("round-robin", incidents=incidents)
    assert min(r.sent_s for r in records if r.endpoint == "h") >= 2.0
    assert max(r.sent_s for r in records if r.endpoint == "m") <= 3.0
    assert all(not r.error for r in records)


class Turns(msgspec.Struct, frozen=True):
    """Conversations of three turns each."""

    def calls(self, seed: int) -> Iterator[Call]:
        rng = random.Random(seed)
        while True:
            yield self._turn(text(rng, 640), 0)

    def _turn(self, prompt: str, turn: int) -> Call:
        answer = text(random.Random(prompt), 64)

        def then() -> Sequence[tuple[float, Call]]:
            return [(2.0, self._turn(prompt + answer + "?" * 256, turn + 1))]

        return Call(prompt, len(prompt) // 4, 64, group=turn, answer=answer, then=then if turn < 2 else None)


def test_a_turn_is_sent_when_the_one_before_has_ended_and_finds_its_answer_cached() -> None:
    scene = msgspec.structs.replace(scenario(stages=(Load(rate=1, duration_s=5),)), workload=Turns())
    (stage,) = Simulation(scene, policy("llm-d-affinity")).run()
    by_turn = [[r for r in stage.records if r.group == turn] for turn in range(3)]
    assert [len(records) for records in by_turn] == [5, 5, 5]
    ends = sorted(r.end_s for r in by_turn[0])
    assert sorted(r.sent_s - 2.0 for r in by_turn[1]) == pytest.approx(ends)
    for records, cached in zip(by_turn, (0, 640 + 63, 640 + 64 + 64 + 63), strict=True):
        for record in records:
            block = 128 if record.endpoint == "g" else 16
            assert record.usage.cached_tokens == cached // block * block


def test_a_closed_loop_keeps_so_many_requests_running() -> None:
    records = run(stages=(Load(concurrency=4, duration_s=5),))
    for moment in {r.end_s for r in records if r.end_s < 4}:
        assert sum(r.sent_s <= moment < r.end_s for r in records) == 4
    assert len(run(stages=(Load(concurrency=4, duration_s=50, requests=11),))) == 11


def test_a_closed_loop_counts_what_follows_from_a_call() -> None:
    scene = msgspec.structs.replace(scenario(stages=(Load(concurrency=3, duration_s=30),)), workload=Turns())
    (stage,) = Simulation(scene, policy("llm-d-affinity")).run()
    for moment in {r.end_s for r in stage.records if r.end_s < 25}:
        assert sum(r.sent_s <= moment < r.end_s for r in stage.records) <= 3
    assert sum(r.group == 2 for r in stage.records) > 3


def test_servers_have_the_weights_that_policies_go_by() -> None:
    heavy = (FleetItem(name="a", weight=9.0), FleetItem(name="b"))
    records = run("random", engines=heavy, stages=(Load(rate=100, duration_s=10),))
    share = sum(r.endpoint == "a" for r in records) / len(records)
    assert share == pytest.approx(0.9, abs=0.05)


def test_stages_follow_one_another_with_warm_caches() -> None:
    cold, warm = stages(stages=(Load(rate=10, duration_s=10), Load(rate=10, duration_s=10)))
    assert min(r.sent_s for r in warm.records) > max(r.end_s for r in cold.records)
    assert sum(s.cached_tokens for s in warm.servers) > sum(s.cached_tokens for s in cold.servers)
    for stage in (cold, warm):
        assert sum(s.output_tokens for s in stage.servers) == 50 * len(stage.records)


def test_a_scenario_that_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"incidents\[0\].endpoint: there is no 'x'"):
        scenario(incidents=(Incident(at_s=1, kind="crash", endpoint="x"),)).specs()
    with pytest.raises(SettingsError, match="warm_up_stages"):
        scenario(warm_up_stages=1).specs()
    with pytest.raises(SettingsError, match="'roundrobin' is not known; did you mean"):
        policy("roundrobin")


def test_prompts_that_come_again_are_made_once() -> None:
    prompts = Prompts("m")
    calls = SMALL.calls(0)
    seen = [prompts.prepare(next(calls)) for _ in range(24)]
    assert seen[:12] == seen[12:]
    assert seen[0].blocks(16) is seen[12].blocks(16)
    assert list(seen[0].blocks(16)) == BlockHasher().hash(seen[0].data, 16, seen[0]._seed)
