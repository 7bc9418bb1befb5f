"""How well the twin reproduces what was measured: every run of the study, replayed as it was sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

import msgspec

from pointsman.twin.casestudy import KUBERNETES, LLM_D
from pointsman.twin.compare import Task, simulate
from pointsman.twin.gateway import RouterCost
from pointsman.twin.parallel import each
from pointsman.twin.policies import policy
from pointsman.twin.replay import FITTED, NO_COST, Constants, as_sent, output_tok_s, scenario_of
from pointsman.twin.report import Figures
from pointsman.twin.router_delay import LLM_D as LLM_D_COST
from pointsman.twin.study import Row, Run

POLICIES: Mapping[str, tuple[str, RouterCost]] = {
    "llmd": (LLM_D, LLM_D_COST),
    "k8s": (KUBERNETES, NO_COST),
}
"""Router of the study to the policy that stands for it, and what the router itself takes."""


NOTHING = 10.0


class FidelityRow(msgspec.Struct, frozen=True, kw_only=True):
    """A measured stage beside the simulated one, the mean over seeds."""

    experiment: str
    run_id: str
    pool: str
    endpoints: int
    single_vendor: bool
    model: str
    router: str
    stage: int
    rate: float
    failure: str
    """What most of the measured failures were; empty when there were none."""
    measured_failed: int
    failed: float
    measured_output_tok_s: float
    measured_answered_tok_s: float
    """The same without what the load generator counted too much, see ``study.Row``."""
    output_tok_s: float
    measured_tpot_mean_s: float
    tpot_mean_s: float | None
    """This and ``ttft_mean_s``: None where the twin answered no request."""
    measured_ttft_mean_s: float
    ttft_mean_s: float | None


class Factors(msgspec.Struct, frozen=True, kw_only=True):
    """Typical factors, exp of the mean |ln(simulated / measured)|, of a group of stages."""

    group: str
    stages: int
    output_tok_s: float
    answered_tok_s: float
    tpot_mean_s: float
    ttft_mean_s: float


def replay(
    runs: Sequence[Run],
    seeds: Iterable[int],
    *,
    constants: Constants = FITTED,
    jobs: int = 1,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[FidelityRow]:
    """Every stage of the runs, measured and simulated."""
    chosen = list(seeds)
    tasks = [_task(run, seed, constants) for run in runs for seed in chosen]
    done = each(simulate, tasks, jobs, on_done)
    found = []
    for i, run in enumerate(runs):
        of_run = [replayed.stages for replayed in done[i * len(chosen) : (i + 1) * len(chosen)]]
        found += [_row(run, row, stages) for row, *stages in zip(run.rows, *of_run, strict=True)]
    return found


def factors_of(rows: Sequence[FidelityRow]) -> list[Factors]:
    """By pool and router, stages with refusals or time-outs apart; groups without a stage are left out."""
    groups: dict[str, list[FidelityRow]] = {}
    for row in rows:
        pools = ["single vendor"] if row.single_vendor else [f"{row.pool}, {row.endpoints} endpoints"]
        for name in (f"{pools[0]}, both routers", f"{pools[0]}, {row.router}"):
            for part in ("all stages", "with failures" if row.failure else "without failures"):
                groups.setdefault(f"{name}, {part}", []).append(row)
    return [_factors(name, groups[name]) for name in sorted(groups)]


def _task(run: Run, seed: int, constants: Constants) -> Task:
    name, cost = POLICIES[run.router]
    scenario = scenario_of(run, as_sent(run.rows, seed), constants=constants, router=cost)
    return Task(scenario=scenario, policy=policy(name), seed=seed)


def _row(run: Run, row: Row, found: Sequence[Figures]) -> FidelityRow:
    return FidelityRow(
        experiment=run.experiment,
        run_id=run.run_id,
        pool=run.pool,
        endpoints=run.endpoints,
        single_vendor=run.single_vendor,
        model=run.model,
        router=run.router,
        stage=row.stage,
        rate=row.target_rate,
        failure=row.failure,
        measured_failed=row.n_failures,
        failed=fmean(f.requests - f.ok for f in found),
        measured_output_tok_s=row.output_tok_s,
        measured_answered_tok_s=row.answered_tok_s,
        output_tok_s=fmean(map(output_tok_s, found)),
        measured_tpot_mean_s=row.tpot_mean_s,
        tpot_mean_s=_mean(f.tpot.mean for f in found if f.tpot),
        measured_ttft_mean_s=row.ttft_mean_s,
        ttft_mean_s=_mean(f.ttft.mean for f in found if f.ttft),
    )


def _factors(name: str, rows: Sequence[FidelityRow]) -> Factors:
    return Factors(
        group=name,
        stages=len(rows),
        output_tok_s=typical_factor((r.output_tok_s, r.measured_output_tok_s) for r in rows),
        answered_tok_s=typical_factor((r.output_tok_s, r.measured_answered_tok_s) for r in rows),
        tpot_mean_s=typical_factor((r.tpot_mean_s, r.measured_tpot_mean_s) for r in rows),
        ttft_mean_s=typical_factor((r.ttft_mean_s, r.measured_ttft_mean_s) for r in rows),
    )


def typical_factor(pairs: Iterable[tuple[float | None, float]]) -> float:
    """exp of the mean |ln(one / other)|: 1.1 is typically 10% off, up or down. Nothing at all counts as a
    factor of ``NOTHING``.
    """
    return math.exp(fmean(abs(math.log(one / other)) if one else math.log(NOTHING) for one, other in pairs))


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None
