"""The least-cost picker: where requests go, on fleets that are simulated and in single decisions."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from msgspec.structs import replace

from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix
from pointsman.predictor.costs import STARVED_S
from pointsman.predictor.speed import SAMPLE_S
from pointsman.prefix.approximate import PrefixIndex
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.pickers.least_cost import LeastCost
from pointsman.scheduling.presets import build_scheduler, load_policy
from pointsman.scheduling.scheduler import Scheduler
from pointsman.sim.spec import FleetItem
from pointsman.testing import fleet, request
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation, StageRun
from pointsman.twin.scenario import Scenario
from pointsman.types import Ending, Endpoint, Metrics, Outcome, Usage

PROMPT = "once upon a time there was a long prompt " * 100


class Place:
    """A scheduler of its own over a fleet, and a clock to turn."""

    def __init__(self, endpoints: list[Endpoint]) -> None:
        self.now_s = 100.0
        services = Services(PrefixIndex(), lambda: self.now_s, random.Random(0))
        for endpoint in endpoints:
            services.prefix.add(endpoint.slot)
        self.scheduler: Scheduler = build_scheduler(load_policy("least-cost"), services)
        self.endpoints = endpoints
        (self.picker,) = [p for p in self.scheduler.plugins if isinstance(p, LeastCost)]
        self.sent = 0

    def send(self, text: str = PROMPT, **fields: object) -> str:
        self.sent += 1
        made = request(text, id=str(self.sent), **fields)
        return self.scheduler.schedule(made, self.endpoints).chosen.name


def test_an_idle_fleet_is_used_evenly() -> None:
    place = Place(fleet(4))
    chosen = Counter(place.send(f"{i} {PROMPT}") for i in range(400))
    assert min(chosen.values()) > 60


def test_a_prompt_goes_where_it_is_cached() -> None:
    place = Place(fleet(4))
    assert len({place.send() for _ in range(50)}) == 1


def test_uncached_prompts_before_it_send_a_request_elsewhere() -> None:
    place = Place(fleet(tokens=[200_000, 0, 200_000]))
    assert {place.send(f"{i} {PROMPT}") for i in range(20)} == {"e1"}


def test_an_endpoint_without_room_for_the_kv_is_left_out_while_another_has_some() -> None:
    full = {"kv_blocks": [1000, 1000], "block_tokens": [16, 16], "kv_usage": [0.94, 0.2]}
    place = Place(fleet(requests=[1, 10], **full))
    assert {place.send(f"{i} {PROMPT}") for i in range(5)} == {"e1"}
    both = full | {"kv_usage": [0.94, 0.99]}
    assert Place(fleet(requests=[1, 10], **both)).send() == "e0"  # then load decides


def test_nothing_is_kept_of_requests_that_are_over() -> None:
    place = Place(fleet(2))
    for i in range(100):
        made = request(PROMPT, id=f"r{i}")
        decision = place.scheduler.schedule(made, place.endpoints)
        outcome = Outcome(ending=Ending.OK, status=200, usage=Usage(output_tokens=10))
        place.scheduler.finish(made, decision, outcome)
    assert place.picker._held == {}
    assert place.picker._places == {}


def test_a_promise_is_kept_where_it_can_be() -> None:
    place = Place(fleet(requests=[30, 1], tokens=[0, 40_000]))  # busy decoding, and busy with prompts
    quick_first = {"x-llm-d-slo-ttft-ms": "1000"}
    quick_tokens = {"x-slo-tpot-ms": "14"}  # llm-d's old name
    assert {place.send(f"{i} {PROMPT}", headers=quick_first) for i in range(5)} == {"e0"}
    place = Place(fleet(requests=[40, 1], tokens=[0, 0]))
    assert {place.send(f"{i} {PROMPT}", headers=quick_tokens) for i in range(5)} == {"e1"}


def test_where_no_promise_can_be_kept_the_request_goes_where_it_is_broken_least() -> None:
    place = Place(fleet(tokens=[90_000, 40_000, 60_000]))
    headers = {"x-llm-d-slo-ttft-ms": "10"}
    assert {place.send(f"{i} {PROMPT}", headers=headers) for i in range(5)} == {"e1"}


@pytest.mark.parametrize("nonsense", ["", "soon", "-3", "0", "nan"])
def test_a_promise_that_is_no_number_is_none(nonsense: str) -> None:
    place = Place(fleet(tokens=[200_000, 0]))
    assert place.send(headers={"x-llm-d-slo-ttft-ms": nonsense}) == "e1"


def test_what_is_learned_is_told_of_endpoints_that_could_have_been_chosen() -> None:
    place = Place(fleet(3, kv_blocks=[1000, 1000, 0], block_tokens=[16, 16, 16]))
    assert place.scheduler.learned(place.endpoints) == {}
    place.scheduler.schedule(request(PROMPT, id="r"), place.endpoints[::2])
    learned = place.scheduler.learned(place.endpoints)
    assert list(learned) == ["e0", "e2"]
    assert learned["e0"].kv_room_tokens == pytest.approx(0.95 * 16_000, abs=1)
    assert learned["e2"].kv_room_tokens is None
    for of_one in learned.values():
        assert of_one.step_s >= of_one.step_rest_s > 0
        assert of_one.step_at_s(1, 0) == pytest.approx(of_one.step_rest_s)
        assert of_one.prefill_tok_s > 1000


def test_what_is_learned_tells_kinds_apart_and_siblings_not() -> None:
    stages = (Load(rate=20, duration_s=60),)
    workload = SharedPrefix(24, 5, 3000, 300, 300)
    scenario = Scenario(engines=UNEQUAL, workload=workload, stages=stages, warm_up_stages=0)
    simulation = Simulation(scenario, policy("least-cost"))
    simulation.run()
    endpoints = [m.endpoint for m in simulation.pool.members.values()]
    learned = simulation.router._scheduler.learned(endpoints)
    step_s = {name: of_one.step_at_s(20, 80_000) for name, of_one in learned.items()}
    assert step_s["gaudi3-1"] > 1.5 * step_s["mi325x-1"]
    assert all(of_one.siblings == 1 and 0.8 < of_one.factor < 1.25 for of_one in learned.values())


def test_policies_that_learn_nothing_tell_nothing() -> None:
    services = Services(PrefixIndex(), lambda: 0.0, random.Random(0))
    scheduler = build_scheduler(load_policy("llm-d-blend"), services)
    endpoints = fleet(2)
    scheduler.schedule(request(PROMPT), endpoints)
    assert scheduler.learned(endpoints) == {}


def simulate(name: str, engines: tuple[FleetItem, ...], rate: float, seed: int = 0) -> list[StageRun]:
    workload = SharedPrefix(24, 5, 3000, 300, 300)
    stages = (Load(rate=rate / 2, duration_s=40), Load(rate=rate, duration_s=30))
    scenario = Scenario(engines=engines, workload=workload, stages=stages)
    return Simulation(scenario, policy(name), seed=seed).run()


def tokens_per_s(run: StageRun) -> float:
    return sum(r.usage.output_tokens or 0 for r in run.records) / (run.end_s - run.start_s)


UNEQUAL = (FleetItem(accelerator="mi325x", count=2), FleetItem(accelerator="gaudi3", count=2))


@pytest.mark.parametrize("other", ["round-robin", "llm-d-blend", "llm-d-affinity"])
def test_on_unequal_endpoints_it_gives_more_than_those_that_know_no_speed(other: str) -> None:
    _, ours = simulate("least-cost", UNEQUAL, 40)
    _, theirs = simulate(other, UNEQUAL, 40)
    assert tokens_per_s(ours) > 1.1 * tokens_per_s(theirs)


def test_a_request_seldom_leaves_the_homes_of_its_prefix() -> None:
    _, run = simulate("least-cost", UNEQUAL, 40)
    cold = sum((r.usage.cached_tokens or 0) < 2500 for r in run.records)
    assert cold <= 0.02 * len(run.records)


def test_equal_endpoints_get_equal_shares() -> None:
    _, run = simulate("least-cost", (FleetItem(accelerator="mi325x", count=4),), 40)
    shares = Counter(r.endpoint for r in run.records)
    assert max(shares.values()) < 1.5 * min(shares.values())


def among_others() -> Place:
    """A router that has seen for long that most requests come from others."""
    place = Place(fleet(20, requests=[1] * 20))
    for endpoint in place.endpoints:
        endpoint.load.others = 5.0
    for _ in range(40):
        place.now_s += SAMPLE_S
        place.picker.watch(place.endpoints, place.now_s)
    return place


def test_routers_that_share_a_fleet_send_a_prompt_to_the_same_endpoints() -> None:
    one, other = among_others(), among_others()
    prompts = [f"{i} {PROMPT}" for i in range(100)]
    chosen = {text: one.send(text) for text in prompts}
    random.Random(0).shuffle(prompts)
    assert sum(other.send(text) == chosen[text] for text in prompts) > 80
    assert len(set(chosen.values())) > 15


def test_a_router_that_is_alone_does_not_ask_where_others_send_a_prompt() -> None:
    place = Place(fleet(20))
    for i in range(20):
        place.send(f"{i} {PROMPT}")
    assert not place.picker._homes._known


def test_an_endpoint_out_of_room_is_nobodys_home() -> None:
    place = among_others()
    home = place.send()
    full = [
        replace(e, metrics=Metrics(kv_blocks=10_000, block_tokens=16, running=6.0, kv_usage=0.2))
        for e in place.endpoints
    ]
    place.endpoints = [
        replace(e, metrics=replace(e.metrics, kv_usage=1.0)) if e.name == home else e for e in full
    ]
    place.now_s += SAMPLE_S
    elsewhere = {place.send() for _ in range(5)}
    assert home not in elsewhere
    assert len(elsewhere) <= 2


def starving() -> Place:
    """e2 is slow to all appearances, and has got nothing for long."""
    place = Place(fleet(3, requests=[5, 5, 0], tokens=[0, 0, 100_000]))
    place.picker.watch(place.endpoints, place.now_s)
    place.now_s += STARVED_S
    return place


def test_one_of_a_hundred_requests_tries_an_endpoint_that_gets_nothing() -> None:
    place = starving()
    chosen = Counter(place.send(f"{i} {PROMPT}") for i in range(500))
    assert chosen["e2"] == 5


def test_who_was_promised_something_or_can_wait_does_not_try_one() -> None:
    place = starving()
    headers = {"x-llm-d-slo-ttft-ms": "60000"}
    assert place.send() != "e2"
    promised = Counter(place.send(f"{i} {PROMPT}", headers=headers) for i in range(300))
    assert promised["e2"] == 0
    waiting = Counter(place.send(f"{i} {PROMPT}", priority=-1) for i in range(300))
    assert waiting["e2"] == 0
