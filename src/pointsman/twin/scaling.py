"""Whether the advantage of a policy grows with the pool, and with how many kinds of endpoint it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec
from msgspec import structs

from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix
from pointsman.sim.profiles import GRANITE, PARAMETERS
from pointsman.sim.spec import FleetItem
from pointsman.twin.bound import Demand, fluid_bound, fluid_rate
from pointsman.twin.compare import Run, Task, metric, simulate
from pointsman.twin.parallel import each
from pointsman.twin.policies import policy
from pointsman.twin.replay import output_tok_s
from pointsman.twin.scenario import CASE_STUDY, Scenario

SIZES = (4, 8, 20, 40, 100)
KINDS = 4
GROUPS_PER_ENDPOINT = 7.5
"""As in the study, 150 for 20: a larger pool serves more tenants."""
STAGE_S = 30.0
DRAINED_S = 90.0
"""The bound's makespan for every pool, so that all are loaded alike; the study's is 97 s at 85 a second."""
WARM_UP = 0.35
"""Rate of the warm-up as a share of the stage's, for ``WARM_UP_S``, as in the study."""
WARM_UP_S = 50.0

_H100 = PARAMETERS["h100-nvl", GRANITE]
_OLD_CARD = structs.replace(
    _H100,
    base_s=2 * _H100.base_s,
    sequence_s=2 * _H100.sequence_s,
    context_token_s=2 * _H100.context_token_s,
    prefill_tokens_per_s=_H100.prefill_tokens_per_s / 2,
    kv_tokens=_H100.kv_tokens // 2,
)
_FLEET = (
    FleetItem(accelerator="mi325x"),
    FleetItem(accelerator="h100-nvl"),
    FleetItem(accelerator="gaudi3"),
    FleetItem(accelerator="old-card", measured=_OLD_CARD),
)
"""The kinds in the order in which they join; the fourth is made up: half an H100."""


class ScalingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One pool under one policy with one seed."""

    kinds: int
    endpoints: int
    groups: int
    rate: float
    policy: str
    seed: int
    output_tok_s: float
    bound_tok_s: float
    ttft_mean_s: float | None
    ttft_p99_s: float | None
    tpot_mean_s: float | None
    failed: int


class Pool(msgspec.Struct, frozen=True):
    """A pool to be loaded."""

    kinds: int
    endpoints: int
    groups: int

    def fleet(self) -> tuple[FleetItem, ...]:
        """As many of each kind as of the others, or one more."""
        counts = [(self.endpoints + i) // self.kinds for i in range(self.kinds)]
        return tuple(
            structs.replace(item, count=count) for item, count in zip(_FLEET, counts, strict=False) if count
        )


def pools(sizes: Sequence[int] = SIZES, kinds: int = KINDS, groups: int | None = None) -> list[Pool]:
    """All sizes with all numbers of kinds; ``groups`` of prompts, or ``GROUPS_PER_ENDPOINT``."""
    return [
        Pool(kind, size, groups or round(size * GROUPS_PER_ENDPOINT))
        for kind in range(1, kinds + 1)
        for size in sizes
        if size >= kind
    ]


def scale(
    tried: Sequence[Pool],
    policies: Sequence[str],
    seeds: Iterable[int],
    *,
    jobs: int = 1,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[ScalingRow]:
    """All pools under all policies with all seeds, in that order."""
    chosen, named = list(seeds), [policy(name) for name in policies]
    loaded = [(pool, *_loaded(pool)) for pool in tried]
    tasks = [
        Task(scenario=scenario, policy=one, seed=seed)
        for _, scenario, _ in loaded
        for one in named
        for seed in chosen
    ]
    done = iter(each(simulate, tasks, jobs, on_done))
    return [
        _row(pool, scenario, bound_tok_s, next(done))
        for pool, scenario, bound_tok_s in loaded
        for _ in range(len(named) * len(chosen))
    ]


def _loaded(pool: Pool) -> tuple[Scenario, float]:
    """The pool with what it is sent, and its bound in tokens a second."""
    fleet = pool.fleet()
    engines = [(item.parameters(), item.count or 1) for item in fleet]
    prompts = structs.replace(CASE_STUDY, groups=pool.groups)
    demand = _demand(prompts)
    rate = fluid_rate(engines, demand, DRAINED_S)
    bound = fluid_bound(engines, structs.replace(demand, rate=rate), kv=True)
    scenario = Scenario(
        engines=fleet,
        workload=prompts,
        stages=(Load(rate=rate * WARM_UP, duration_s=WARM_UP_S), Load(rate=rate, duration_s=STAGE_S)),
        warm_up_stages=1,
    )
    return scenario, bound.output_tok_s


def _row(pool: Pool, scenario: Scenario, bound_tok_s: float, run: Run) -> ScalingRow:
    (found,) = run.stages
    return ScalingRow(
        kinds=pool.kinds,
        endpoints=pool.endpoints,
        groups=pool.groups,
        rate=scenario.stages[-1].rate or 0.0,
        policy=run.policy,
        seed=run.seed,
        output_tok_s=output_tok_s(found),
        bound_tok_s=bound_tok_s,
        ttft_mean_s=metric(found, "ttft_mean_s"),
        ttft_p99_s=metric(found, "ttft_p99_s"),
        tpot_mean_s=metric(found, "tpot_mean_s"),
        failed=found.requests - found.ok,
    )


def _demand(prompts: SharedPrefix) -> Demand:
    return Demand(
        rate=0.0,
        duration_s=STAGE_S,
        prompt_tokens=prompts.system_prompt_len + prompts.question_len,
        output_tokens=prompts.output_len,
        prefix_tokens=prompts.system_prompt_len,
        groups=prompts.groups,
    )
