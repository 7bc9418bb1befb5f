"""The size of a KV cache whose engine does not tell it, against simulated ones that do."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix
from pointsman.predictor.fit import HALF_LIFE_S
from pointsman.predictor.kv import KvSizes
from pointsman.sim.spec import FleetItem
from pointsman.testing import fleet
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Scenario
from pointsman.types import Endpoint, Metrics

SIZE = 400_000.0


def at(endpoint: Endpoint, at_s: float, usage: float, **more: float) -> Endpoint:
    return replace(
        endpoint, metrics=Metrics(at_s=at_s, kv_usage=usage, running=endpoint.load.requests, **more)
    )


def test_what_is_published_is_believed() -> None:
    (endpoint,) = fleet(kv_blocks=[1000], block_tokens=[16])
    assert KvSizes().tokens(endpoint) == 16_000


def test_nothing_is_believed_before_there_is_some_evidence() -> None:
    sizes = KvSizes()
    (endpoint,) = fleet(requests=[10])
    assert sizes.tokens(endpoint) is None
    for tick in range(1, 10):
        sizes.look(at(endpoint, tick, 0.2), 0.2 * SIZE)
    assert sizes.tokens(endpoint) is None


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_it_is_learned_from_the_share_in_use(noise: float) -> None:
    rng, sizes = random.Random(0), KvSizes()
    (endpoint,) = fleet(requests=[10])
    for tick in range(1, 1000):
        tokens = rng.uniform(0.05, 0.9) * SIZE
        sizes.look(at(endpoint, tick, tokens / SIZE * rng.lognormvariate(0, noise)), tokens)
    assert sizes.tokens(at(endpoint, 1000, 0.5)) == pytest.approx(SIZE, rel=0.02 + 1.5 * noise)


def test_prefixes_that_are_shared_now_and_then_do_not_make_it_larger() -> None:
    rng, sizes = random.Random(0), KvSizes()
    (endpoint,) = fleet(requests=[10])
    for tick in range(1, 1000):
        held = rng.uniform(0.05, 0.4) * SIZE
        sizes.look(at(endpoint, tick, held / SIZE), held * rng.choice((1.0, 1.0, 1.5, 2.5)))
    assert SIZE * 0.99 < (sizes.tokens(endpoint) or 0) < 1.2 * SIZE


def test_other_peoples_requests_and_pages_read_before_say_nothing() -> None:
    sizes = KvSizes()
    (endpoint,) = fleet(requests=[10])
    for tick in range(1, 100):
        seen = at(endpoint, tick, 0.5)
        sizes.look(replace(seen, metrics=replace(seen.metrics, running=12.0)), 1000.0)
    assert sizes.tokens(endpoint) is None
    for _ in range(100):
        sizes.look(at(endpoint, 100.0, 0.5), 1000.0)
    assert sizes.tokens(endpoint) is None


def test_a_share_that_counts_what_is_cached_is_not_used() -> None:
    sizes = KvSizes()
    (busy,), (idle,) = fleet(requests=[10]), fleet(requests=[0])
    for tick in range(1, 100):
        sizes.look(at(busy, 2 * tick, 0.9), 1000.0)
        sizes.look(at(idle, 2 * tick + 1, 0.9), 0.0)
    assert sizes.tokens(busy) is None


def test_a_preemption_shrinks_the_belief_at_once_and_for_a_while() -> None:
    sizes = KvSizes()
    (endpoint,) = fleet(requests=[10])
    for tick in range(1, 100):
        sizes.look(at(endpoint, tick, 0.1), 0.1 * SIZE)
    full = at(endpoint, 100.0, 0.1, preemptions=1.0)
    sizes.look(full, 0.5 * SIZE)
    assert sizes.tokens(full) == pytest.approx(0.5 * SIZE)
    assert sizes.tokens(at(endpoint, 100.0 + HALF_LIFE_S / 2, 0.1)) == pytest.approx(0.707 * SIZE, rel=0.01)
    assert sizes.tokens(at(endpoint, 100.0 + 3 * HALF_LIFE_S, 0.1)) == pytest.approx(SIZE, rel=0.15)


def test_an_endpoint_that_takes_over_a_slot_begins_anew() -> None:
    sizes = KvSizes()
    (endpoint,) = fleet(requests=[10])
    for tick in range(1, 100):
        sizes.look(at(endpoint, tick, 0.1), 0.1 * SIZE)
    assert sizes.tokens(endpoint) is not None
    assert sizes.tokens(replace(endpoint, name="another")) is None


def test_simulated_engines_that_keep_it_to_themselves_are_found_out() -> None:
    engines = (FleetItem(accelerator="mi325x"), FleetItem(accelerator="h100-nvl"))
    workload = SharedPrefix(60, 1, 3000, 1000, 400)
    stages = (Load(rate=10, duration_s=60),)
    simulation = Simulation(
        Scenario(engines=engines, workload=workload, stages=stages, warm_up_stages=0), policy("least-cost")
    )
    sizes, now = KvSizes(), list[Endpoint]()

    def look() -> None:
        for member in simulation.pool.members.values():
            now.append(
                hidden := replace(member.endpoint, metrics=replace(member.endpoint.metrics, kv_blocks=0))
            )
            generated = simulation.servers[hidden.name].engine.context_tokens
            sizes.look(hidden, generated)
        if simulation.events.now_s < 59:
            simulation.events.at(simulation.events.now_s + 0.25, look)

    simulation.events.at(0.25, look)
    simulation.run()
    for hidden in now[-2:]:
        published = simulation.pool.members[hidden.name].endpoint.metrics
        true = published.kv_blocks * published.block_tokens
        assert true * 0.8 < (sizes.tokens(hidden) or 0) < true * 1.4, hidden.name
