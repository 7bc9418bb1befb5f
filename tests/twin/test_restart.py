"""A router that is replaced in mid-run by one that was told what the first had learned."""

from __future__ import annotations

from statistics import mean

from pointsman.bench.run import Load
from pointsman.predictor import state as states
from pointsman.prefix import snapshot as prefixes
from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.follow import block_tokens_for, follow
from pointsman.prefix.snapshot import Holder, Snapshot
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.presets import build_scheduler
from pointsman.scheduling.scheduler import Scheduler
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Scenario

WARM_UP, LOAD = Load(rate=20, duration_s=50), Load(rate=85, duration_s=5)
AWAY_S = 5.0
MANY = 1 << 30


def first_tokens(seed: int, router: str) -> float:
    """Output tokens of the case study's pool in the first 5 s of 85 requests/s, after a warm-up by a router
    that ``stays``, or is replaced: by one with ``both files``, or that has the ``learned`` or the
    ``prefixes`` file alone.
    """
    simulation = Simulation(Scenario(stages=(WARM_UP, LOAD)), policy("least-cost"), seed=seed)
    simulation.stage(WARM_UP)
    if router != "stays":
        simulation.router._scheduler = replaced(simulation, router)
    begin, seen = generated(simulation), list[int]()
    end_s = simulation.events.now_s + LOAD.duration_s
    simulation.events.at(end_s, lambda: seen.append(generated(simulation) - begin))
    simulation.stage(LOAD)
    (tokens,) = seen
    return tokens


def replaced(simulation: Simulation, router: str) -> Scheduler:
    """What another process builds, and takes up of the old one's files."""
    old, pool = simulation.router._scheduler, simulation.pool
    endpoints = [member.endpoint for member in pool.members.values()]
    index, before = PrefixIndex(), old.services.prefix
    follow(index, pool)
    for endpoint in endpoints:
        index.add(endpoint.slot, endpoint.metrics.block_tokens * endpoint.metrics.kv_blocks)
    index.learn_block_tokens(block_tokens_for({endpoint.metrics.block_tokens for endpoint in endpoints}))
    new = build_scheduler(policy("least-cost").load(), Services(index, old.services.clock, old.services.rng))
    if router != "prefixes":
        state = old.state(endpoints, 1e9)
        assert state is not None
        new.restore(states.decode(states.encode(state)), AWAY_S)
    if router != "learned":
        holders = [Holder.of(before, endpoint, MANY) for endpoint in endpoints]
        data = b"".join(prefixes.encode(Snapshot(1e9, before.block_tokens, holders)))
        assert len(prefixes.decode(data).load(index, endpoints, AWAY_S)) == len(endpoints)
    return new


def generated(simulation: Simulation) -> int:
    engines = [server.engine for server in simulation.servers.values()]
    for engine in engines:
        engine.observe(simulation.events.now_s)
    return sum(engine.generated_tokens for engine in engines)


def test_a_router_with_both_files_is_as_good_as_one_that_stayed() -> None:
    seeds = range(3)
    stays, both, learned, known = (
        [first_tokens(seed, router) for seed in seeds]
        for router in ("stays", "both files", "learned", "prefixes")
    )
    ratios = [r / s for r, s in zip(both, stays, strict=True)]
    assert min(ratios) > 0.9
    assert mean(ratios) >= 0.97
    assert mean(both) > 1.02 * mean(known), "speeds are worth something"
    assert mean(both) > 5 * mean(learned), "and what caches hold is worth far more"
