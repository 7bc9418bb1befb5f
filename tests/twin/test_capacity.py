"""The rate found is one that is held, the other one is not, and breaking off loses nothing."""

from __future__ import annotations

import math

import msgspec
import pytest

from pointsman.bench.report import Slo
from pointsman.bench.run import Load
from pointsman.bench.workloads import Conversations, SharedPrefix
from pointsman.errors import SettingsError
from pointsman.sim.profiles import EngineParameters
from pointsman.sim.spec import FleetItem
from pointsman.twin.capacity import Held, Search, capacity
from pointsman.twin.policies import policy
from pointsman.twin.report import figures
from pointsman.twin.run import Simulation, StageRun
from pointsman.twin.scenario import Scenario

SLO = Slo(ttft_s=0.3, tpot_s=0.02)
HELD_S = 12.0


def scenario(slo: Slo = SLO, **engine: object) -> Scenario:
    return Scenario(
        engines=(FleetItem(count=2, **engine),),
        workload=SharedPrefix(
            groups=6, prompts_per_group=2, system_prompt_len=512, question_len=64, output_len=40
        ),
        stages=(Load(rate=10, duration_s=5), Load(rate=50, duration_s=5)),
        slo=slo,
    )


def search(scene: Scenario, *seeds: int) -> list[Held]:
    return capacity(
        Search(scenario=scene, policy=policy("round-robin"), seeds=seeds or (0,), duration_s=HELD_S)
    )


def whole_stage(scene: Scenario, rate: float) -> StageRun:
    simulation = Simulation(scene, policy("round-robin"))
    simulation.stage(scene.stages[0])
    return simulation.stage(Load(rate=rate, duration_s=HELD_S))


@pytest.mark.parametrize("slo", [SLO, Slo(ttft_s=0.1), Slo(tpot_s=0.015)], ids=["both", "ttft", "tpot"])
def test_whole_stages_at_the_two_rates_keep_and_miss_the_limits(slo: Slo) -> None:
    scene = scenario(slo)
    (found,) = search(scene)
    assert found.rate < found.failed_rate <= found.rate * 1.04
    kept = figures(whole_stage(scene, found.rate), scene.slo_of)
    missed = figures(whole_stage(scene, found.failed_rate), scene.slo_of)
    assert kept == found.at_rate
    for times, limit_s in (("ttft", slo.ttft_s), ("tpot", slo.tpot_s)):
        assert getattr(kept, times).p99 <= (limit_s or math.inf)
    assert getattr(missed, found.limit).p99 > getattr(slo, f"{found.limit}_s")
    assert kept.requests == round(found.rate * HELD_S)


def test_one_server_of_constant_steps_holds_what_queueing_lets_it() -> None:
    """One request at a time, 0.1 s each, is an M/D/1 queue, whose waits Erlang knew."""
    one = EngineParameters(
        base_s=0.1,
        sequence_s=0.0,
        context_token_s=0.0,
        prefill_tokens_per_s=1e9,
        prefill_step_s=0.0,
        kv_tokens=100_000,
        max_sequences=1,
        block_tokens=16,
    )
    scene = Scenario(
        engines=(FleetItem(measured=one),),
        workload=SharedPrefix(
            groups=1, prompts_per_group=1, system_prompt_len=64, question_len=16, output_len=1
        ),
        stages=(Load(rate=1, duration_s=1), Load(rate=1, duration_s=1)),
        slo=Slo(ttft_s=0.5),
    )
    (found,) = capacity(
        Search(scenario=scene, policy=policy("random"), seeds=(0,), duration_s=1500.0, tolerance=0.01)
    )
    assert found.limit == "ttft"
    assert waits_longer(found.rate, 0.1, 0.4) == pytest.approx(0.01, rel=0.15)
    assert found.rate == pytest.approx(5.61, rel=0.03)


def waits_longer(rate: float, service_s: float, wait_s: float) -> float:
    """Share of the requests of an M/D/1 queue that wait longer (Erlang 1909)."""
    terms = [
        (-rate * (left := wait_s - k * service_s)) ** k / math.factorial(k) * math.exp(rate * left)
        for k in range(round(wait_s / service_s) + 1)
    ]
    return 1 - (1 - rate * service_s) * sum(terms)


def test_later_seeds_begin_where_the_first_one_ended() -> None:
    first, second = search(scenario(), 0, 1)
    assert second.runs <= first.runs
    assert (first.seed, second.seed) == (0, 1)
    assert second.rate == pytest.approx(first.rate, rel=0.2)


def test_requests_that_follow_others_count() -> None:
    """Chats of several turns each: the stage has far more requests than calls, and 1% of all may miss."""
    scene = msgspec.structs.replace(scenario(), workload=Conversations(think_s=1.0))
    (found,) = search(scene)
    assert found.at_rate.requests > 1.5 * found.rate * HELD_S
    assert found.at_rate.ttft is not None
    assert found.at_rate.ttft.p99 <= 0.3
    missed = figures(whole_stage(scene, found.failed_rate), scene.slo_of)
    assert getattr(missed, found.limit).p99 > getattr(SLO, f"{found.limit}_s")


def test_a_limit_that_no_rate_keeps_is_the_users_mistake() -> None:
    with pytest.raises(SettingsError, match=r"--capacity: round-robin does not hold even .* tpot is missed"):
        search(scenario(Slo(tpot_s=0.001)))
