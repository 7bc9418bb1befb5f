"""A case-study run in the twin: its fleet, its prompts and its stages, one after the other on warm caches."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources

import msgspec
import yaml

from pointsman.bench.pace import ARRIVALS
from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix
from pointsman.sim.profiles import EngineParameters
from pointsman.sim.spec import FleetItem
from pointsman.twin.bound import Demand
from pointsman.twin.gateway import RouterCost
from pointsman.twin.report import Figures
from pointsman.twin.scenario import Scenario
from pointsman.twin.study import Row, Run

Constants = Mapping[tuple[str, str], EngineParameters]
"""By accelerator and model, in place of those in ``sim.profiles``."""

FITTED: Constants = {}
"""None replaced."""
TIMEOUT_S = 300.0
"""After which the study's clients gave up."""
NO_COST = RouterCost()
"""A router that takes no time."""


class Servers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a run's servers differ from the others of their kind."""

    why: str
    max_num_seqs: int | None = None
    measured: EngineParameters | None = None


@cache
def odd_servers() -> Mapping[str, Servers]:
    """By run id: the runs whose servers were set up otherwise, from ``data/servers.yaml``."""
    text = resources.files("pointsman.twin").joinpath("data/servers.yaml").read_text(encoding="utf-8")
    return msgspec.convert(yaml.safe_load(text), dict[str, Servers])


def prompts_of(row: Row) -> SharedPrefix:
    """The run's prompts. Their servers counted more tokens in them than were asked for, prefix and question
    alike.
    """
    longer = row.prompt_len_mean / (row.system_prompt_len + row.question_len)
    return SharedPrefix(
        groups=row.num_groups,
        prompts_per_group=row.prompts_per_group,
        system_prompt_len=round(row.system_prompt_len * longer),
        question_len=round(row.question_len * longer),
        output_len=row.output_len,
    )


def demand_of(row: Row) -> Demand:
    """The stage as the fluid bound wants it."""
    prompts = prompts_of(row)
    return Demand(
        rate=row.target_rate,
        duration_s=row.stage_duration_s,
        prompt_tokens=prompts.system_prompt_len + prompts.question_len,
        output_tokens=prompts.output_len,
        prefix_tokens=prompts.system_prompt_len,
        groups=prompts.groups,
    )


def fleet_of(run: Run, constants: Constants) -> tuple[FleetItem, ...]:
    """The run's servers."""
    odd = odd_servers().get(run.run_id, Servers(""))
    return tuple(
        FleetItem(
            accelerator=accelerator,
            model=run.model,
            count=count,
            measured=odd.measured or constants.get((accelerator, run.model)),
            max_num_seqs=odd.max_num_seqs,
        )
        for accelerator, count in run.fleet
    )


def as_planned(rows: Sequence[Row]) -> tuple[Load, ...]:
    """Stages at the rates that were wanted."""
    return tuple(Load(rate=row.target_rate, duration_s=row.stage_duration_s) for row in rows)


def as_sent(rows: Sequence[Row], seed: int) -> tuple[Load, ...]:
    """Stages in which the last request is sent when it was in the run: at 3 requests a second, one draw of
    60 Poisson gaps is a third longer than another.
    """
    rng = random.Random(f"arrivals {seed}")  # the simulation's own: it draws these very gaps
    loads = []
    for row in rows:
        *_, last = ARRIVALS["poisson"](rng, 1.0, row.n_requests)
        loads.append(
            Load(rate=last / row.send_duration_s, duration_s=row.stage_duration_s, requests=row.n_requests)
        )
    return tuple(loads)


def scenario_of(
    run: Run,
    stages: Sequence[Load],
    *,
    warm_up_stages: int = 0,
    constants: Constants = FITTED,
    router: RouterCost = NO_COST,
) -> Scenario:
    """The run's servers and prompts, with these stages one after the other."""
    return Scenario(
        engines=fleet_of(run, constants),
        workload=prompts_of(run.rows[0]),
        stages=tuple(stages),
        warm_up_stages=warm_up_stages,
        router=router,
        timeout_s=TIMEOUT_S,
    )


def output_tok_s(stage: Figures) -> float:
    """Output tokens a second as inference-perf counts them: until the last request has ended, answered or
    not. Of many requests sent in turn, the last ones are those that wait in vain.
    """
    makespan_s = stage.makespan_s
    if stage.timeouts:
        makespan_s = max(makespan_s, stage.send_s + TIMEOUT_S)
    return stage.output_tokens / makespan_s
