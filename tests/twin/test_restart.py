"""A router that is replaced in mid-run by one that was told what the first had learned."""

from __future__ import annotations

from statistics import mean

from pointsman.bench.run import Load
from pointsman.predictor.state import decode, encode
from pointsman.scheduling.presets import build_scheduler
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Scenario

WARM_UP, LOAD = Load(rate=20, duration_s=50), Load(rate=85, duration_s=5)
AWAY_S = 5.0


def first_tokens(seed: int, router: str) -> float:
    """Output tokens of the case study's pool in the first 5 s of 85 requests/s, after a warm-up by a router
    that ``stays``, or is replaced by a ``restored`` or a ``cold`` one. What is where in the caches stays
    known.
    """
    simulation = Simulation(Scenario(stages=(WARM_UP, LOAD)), policy("least-cost"), seed=seed)
    simulation.stage(WARM_UP)
    old = simulation.router._scheduler
    if router != "stays":
        new = build_scheduler(policy("least-cost").load(), old.services)
        if router == "restored":
            state = old.state([m.endpoint for m in simulation.pool.members.values()], 1e9)
            assert state is not None
            new.restore(decode(encode(state)), AWAY_S)
        simulation.router._scheduler = new
    begin, seen = generated(simulation), list[int]()
    end_s = simulation.events.now_s + LOAD.duration_s
    simulation.events.at(end_s, lambda: seen.append(generated(simulation) - begin))
    simulation.stage(LOAD)
    (tokens,) = seen
    return tokens


def generated(simulation: Simulation) -> int:
    engines = [server.engine for server in simulation.servers.values()]
    for engine in engines:
        engine.observe(simulation.events.now_s)
    return sum(engine.generated_tokens for engine in engines)


def test_a_restored_router_is_as_good_as_a_warm_one_and_better_than_a_cold_one() -> None:
    seeds = range(3)
    stays, restored, cold = (
        [first_tokens(seed, router) for seed in seeds] for router in ("stays", "restored", "cold")
    )
    ratios = [r / s for r, s in zip(restored, stays, strict=True)]
    assert min(ratios) > 0.9
    assert mean(ratios) >= 0.97
    assert mean(restored) > 1.03 * mean(cold)
