"""Every pool of the case study under every policy: simulated, measured where it was, and the fluid bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median

import msgspec

from pointsman.errors import SettingsError
from pointsman.scheduling.presets import PRESETS
from pointsman.twin.bound import fluid_bound
from pointsman.twin.compare import Run as SimulatedRun
from pointsman.twin.compare import Task, metric, simulate
from pointsman.twin.parallel import each
from pointsman.twin.policies import ALIASES, policy
from pointsman.twin.replay import (
    FITTED,
    Constants,
    as_planned,
    demand_of,
    fleet_of,
    odd_servers,
    output_tok_s,
    scenario_of,
)
from pointsman.twin.report import Figures
from pointsman.twin.scenario import Scenario
from pointsman.twin.seeds import Mean, mean_of
from pointsman.twin.study import Row, Run

LLM_D, KUBERNETES = "llm-d-blend", "k8s-random"
ROUTERS = {LLM_D: "llmd", KUBERNETES: "k8s"}
"""The policies that were measured, by what the study calls their router."""


COMPARED = ("default", LLM_D, KUBERNETES, "round-robin", "least-request", "cache-aware")
"""When nobody says which: what is asked about most. All of them take three times as long."""


class CaseRow(msgspec.Struct, frozen=True, kw_only=True):
    """One stage simulated with one seed. Tokens a second are output tokens by makespan."""

    pool: str
    model: str
    policy: str
    rate: float
    seed: int
    output_tok_s: float
    bound_tok_s: float
    """Fluid bound, KV left out."""
    bound_kv_tok_s: float
    """Fluid bound where prefixes and private tokens must fit the KV caches."""
    ttft_mean_s: float | None
    """This and the others: None where no request was answered."""
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    tpot_mean_s: float | None
    requests: int
    failed: int
    prefix_hit_rate: float
    shares: Mapping[str, float]
    """Of the requests, by accelerator."""
    measured_output_tok_s: float | None
    """Of the real pool under this policy, the median of its runs; None where nobody ran it."""
    measured_ttft_mean_s: float | None
    measured_tpot_mean_s: float | None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One stage under one policy, all seeds together."""

    pool: str
    model: str
    policy: str
    rate: float
    output_tok_s: Mean
    of_bound: float
    of_bound_kv: float
    to_llm_d: float | None
    """Tokens a second as a multiple of those of llm-d's blend, simulated alike."""
    to_kubernetes: float | None
    """And of those of a Kubernetes service."""
    ttft_mean_s: Mean | None
    ttft_p50_s: Mean | None
    ttft_p99_s: Mean | None
    tpot_mean_s: Mean | None
    failed: float
    """Share of the requests."""
    prefix_hit_rate: float
    measured_output_tok_s: float | None
    measured_ttft_mean_s: float | None
    bound_tok_s: float
    bound_kv_tok_s: float


class Case(msgspec.Struct, frozen=True):
    """A pool, its model and prompts, and all stages that some run of it had: the warm-up, then by rate."""

    run: Run
    """One of its runs: for fleet and prompts."""
    rows: tuple[Row, ...]
    measured: tuple[Run, ...]


def cases_of(runs: Sequence[Run]) -> list[Case]:
    """The runs, put together where fleet, model and prompts are the same."""
    alike: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        row = run.rows[0]
        prompts = (row.num_groups, row.prompts_per_group, row.system_prompt_len, row.question_len)
        alike.setdefault((run.fleet, run.model, *prompts, row.output_len), []).append(run)
    return [_case(group) for group in alike.values()]


def at_rates(case: Case, rates: Sequence[float]) -> Case:
    """The case with its warm-up and of its stages only those; ``SettingsError`` when it has none of them."""
    warm_up, *rows = case.rows
    chosen = tuple(row for row in rows if row.target_rate in rates)
    if not chosen:
        known = ", ".join(f"{row.target_rate:g}" for row in rows)
        raise SettingsError(f"--rate: {case.run.pool} {case.run.model} was measured at {known}")
    return msgspec.structs.replace(case, rows=(warm_up, *chosen))


def every_policy() -> tuple[str, ...]:
    """Every policy that has a name, each once."""
    return (*ALIASES, *(name for name in PRESETS if name not in ALIASES.values()))


def compare(
    cases: Sequence[Case],
    policies: Sequence[str],
    seeds: Iterable[int],
    *,
    constants: Constants = FITTED,
    jobs: int = 1,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[CaseRow]:
    """All cases under all policies with all seeds, in that order whatever ``jobs``, the processes used."""
    chosen, named = list(seeds), [policy(name) for name in policies]
    tasks = [
        Task(scenario=_scenario(case, constants), policy=one, seed=seed)
        for case in cases
        for one in named
        for seed in chosen
    ]
    done = iter(each(simulate, tasks, jobs, on_done))
    rows = []
    for case in cases:
        bounds = _bounds(case, constants)
        for _ in range(len(named) * len(chosen)):
            run = next(done)
            for row, bound, found in zip(case.rows[1:], bounds, run.stages, strict=True):
                rows.append(_row(case, row, bound, run, found))
    return rows


def summarise(rows: Sequence[CaseRow]) -> list[Summary]:
    """Means over seeds, in the order of the rows."""
    alike: dict[tuple[str, str, float, str], list[CaseRow]] = {}
    for row in rows:
        alike.setdefault((row.pool, row.model, row.rate, row.policy), []).append(row)
    tok_s = {key: fmean(row.output_tok_s for row in group) for key, group in alike.items()}
    return [
        _summary(group, tok_s.get((*key[:3], LLM_D)), tok_s.get((*key[:3], KUBERNETES)))
        for key, group in alike.items()
    ]


def _case(runs: list[Run]) -> Case:
    usual = [run for run in runs if run.run_id not in odd_servers()] or runs
    longest = max(usual, key=lambda run: len(run.rows))
    stages = {row.target_rate: row for run in (*runs, longest) for row in run.rows[1:]}
    ladder = sorted(stages.values(), key=lambda row: row.target_rate)
    return Case(longest, (longest.rows[0], *ladder), tuple(runs))


def _scenario(case: Case, constants: Constants) -> Scenario:
    return scenario_of(case.run, as_planned(case.rows), warm_up_stages=1, constants=constants)


def _bounds(case: Case, constants: Constants) -> list[tuple[float, float]]:
    """The fluid bound of each stage, without and with KV."""
    pool = [(item.parameters(), item.count or 1) for item in fleet_of(case.run, constants)]
    demands = [demand_of(row) for row in case.rows[1:]]
    return [
        (
            fluid_bound(pool, demand, kv=False).output_tok_s,
            fluid_bound(pool, demand, kv=True).output_tok_s,
        )
        for demand in demands
    ]


def _row(case: Case, row: Row, bounds: tuple[float, float], run: SimulatedRun, found: Figures) -> CaseRow:
    measured = [
        stage
        for other in case.measured
        for stage in other.rows[1:]
        if other.router == ROUTERS.get(run.policy) and stage.target_rate == row.target_rate
    ]
    return CaseRow(
        pool=case.run.pool,
        model=case.run.model,
        policy=run.policy,
        rate=row.target_rate,
        seed=run.seed,
        output_tok_s=output_tok_s(found),
        bound_tok_s=bounds[0],
        bound_kv_tok_s=bounds[1],
        ttft_mean_s=metric(found, "ttft_mean_s"),
        ttft_p50_s=metric(found, "ttft_p50_s"),
        ttft_p90_s=metric(found, "ttft_p90_s"),
        ttft_p99_s=metric(found, "ttft_p99_s"),
        tpot_mean_s=metric(found, "tpot_mean_s"),
        requests=found.requests,
        failed=found.requests - found.ok,
        prefix_hit_rate=found.prefix_hit_rate or 0.0,
        shares={name: part.request_share for name, part in found.accelerators.items()},
        measured_output_tok_s=_median(stage.output_tok_s for stage in measured),
        measured_ttft_mean_s=_median(stage.ttft_mean_s for stage in measured),
        measured_tpot_mean_s=_median(stage.tpot_mean_s for stage in measured),
    )


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def _mean(values: Iterable[float | None]) -> Mean | None:
    found = [value for value in values if value is not None]
    return mean_of(found) if found else None


def _summary(rows: Sequence[CaseRow], llm_d: float | None, kubernetes: float | None) -> Summary:
    first = rows[0]
    tok_s = mean_of([row.output_tok_s for row in rows])
    return Summary(
        pool=first.pool,
        model=first.model,
        policy=first.policy,
        rate=first.rate,
        output_tok_s=tok_s,
        of_bound=tok_s.mean / first.bound_tok_s,
        of_bound_kv=tok_s.mean / first.bound_kv_tok_s,
        to_llm_d=tok_s.mean / llm_d if llm_d else None,
        to_kubernetes=tok_s.mean / kubernetes if kubernetes else None,
        ttft_mean_s=_mean(row.ttft_mean_s for row in rows),
        ttft_p50_s=_mean(row.ttft_p50_s for row in rows),
        ttft_p99_s=_mean(row.ttft_p99_s for row in rows),
        tpot_mean_s=_mean(row.tpot_mean_s for row in rows),
        failed=sum(row.failed for row in rows) / sum(row.requests for row in rows),
        prefix_hit_rate=fmean(row.prefix_hit_rate for row in rows),
        measured_output_tok_s=first.measured_output_tok_s,
        measured_ttft_mean_s=first.measured_ttft_mean_s,
        bound_tok_s=first.bound_tok_s,
        bound_kv_tok_s=first.bound_kv_tok_s,
    )
