"""A router that begins with what was learned of other endpoints: each kind is believed to be as fast as
another one is.
"""

from __future__ import annotations

from statistics import mean

import msgspec

from pointsman.bench.run import Load
from pointsman.predictor.state import State
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Scenario

WARM_UP, LOAD = Load(rate=20, duration_s=50), Load(rate=85, duration_s=30)


def simulation(seed: int) -> Simulation:
    return Simulation(Scenario(stages=(WARM_UP, LOAD)), policy("least-cost"), seed=seed)


def learned(seed: int) -> State:
    run = simulation(seed)
    run.run()
    endpoints = [member.endpoint for member in run.pool.members.values()]
    state = run.router._scheduler.state(endpoints, 1e9)
    assert state is not None
    return state


def rotated(state: State) -> State:
    """The kinds' speeds, each given to the next kind."""
    kinds = state.kept.speeds.kinds
    assert len(kinds) == 3
    wrong = [
        msgspec.structs.replace(kind, fit=other.fit, prefill=other.prefill)
        for kind, other in zip(kinds, kinds[1:] + kinds[:1], strict=True)
    ]
    speeds = msgspec.structs.replace(state.kept.speeds, kinds=tuple(wrong))
    return msgspec.structs.replace(state, kept=msgspec.structs.replace(state.kept, speeds=speeds))


def tokens_a_second(seed: int, prior: State) -> float:
    run = simulation(seed)
    run.router._scheduler.restore(prior, 5.0)
    stage = run.run()[-1]
    return sum(server.output_tokens for server in stage.servers) / (stage.end_s - stage.start_s)


def test_wrong_beliefs_cost_under_three_percent_after_warm_up() -> None:
    right = learned(99)
    wrong = rotated(right)
    ratios = [tokens_a_second(seed, wrong) / tokens_a_second(seed, right) for seed in range(4)]
    assert mean(ratios) >= 0.97, ratios
