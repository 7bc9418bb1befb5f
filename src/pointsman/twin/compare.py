"""A scenario under several policies with several seeds: the runs, and what they say together."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from pointsman.errors import SettingsError
from pointsman.router import Observer
from pointsman.twin.decision_log import DecisionLog
from pointsman.twin.policies import Policy
from pointsman.twin.report import Figures, SloClass, Spread, figures, spread
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Scenario
from pointsman.twin.seeds import Mean, mean_of
from pointsman.twin.trace_log import TraceLog

_NUMBERS = (
    *("output_tok_s", "steady_output_tok_s", "requests_s", "makespan_s", "requests", "ok"),
    *("within_slo", "goodput", "prefix_hit_rate", "prediction_error_tokens", "copies_per_prefix"),
    *("tokens_per_unit", "tokens_per_kwh", "working_tokens_per_unit", "working_tokens_per_kwh"),
    *("kv_usage_mean", "kv_usage_max", "preemptions", "refused", "timeouts", "retried"),
)
METRICS: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in _NUMBERS},
    **{
        f"{times}_{point}_s": (times, point)
        for times in ("ttft", "tpot", "e2e")
        for point in ("mean", "p50", "p90", "p99")
    },
}
"""The single numbers of a stage, and where they are in its ``Figures``."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One run to make."""

    scenario: Scenario
    policy: Policy
    seed: int
    decisions: str = ""
    """File for its decisions; empty: they are not kept."""
    trace: str = ""
    """File for the trace that ``serve`` would have written; empty: there is none."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One policy with one seed: its reported stages."""

    policy: str
    seed: int
    stages: tuple[Figures, ...]
    spreads: tuple[Spread, ...]
    """Of the same stages."""


class PartSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoints of one accelerator."""

    request_share: Mean
    output_share: Mean
    kv_usage_mean: Mean
    kv_usage_max: Mean
    working: Mean


class ClassSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of one SLO class; times are None where no seed answered any."""

    requests: Mean
    within_slo: Mean
    goodput: Mean
    output_tok_s: Mean
    request_shares: Mapping[str, Mean]
    """By accelerator."""
    ttft_p50_s: Mean | None
    ttft_p99_s: Mean | None
    tpot_p99_s: Mean | None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One stage under one policy, all seeds together."""

    policy: str
    stage: int
    """Index among the reported stages."""
    load: str
    rate: float | None
    figures: Mapping[str, Mean]
    """By the names of ``METRICS``; what no seed has is left out."""
    accelerators: Mapping[str, PartSummary]
    classes: Mapping[str, ClassSummary]
    errors: Mapping[str, int]
    """Requests by kind of failure, of all seeds."""


def metric(stage: Figures, name: str) -> float | None:
    """The number that ``METRICS`` knows by that name; None where nothing told."""
    value: Any = stage
    for part in METRICS[name]:
        value = None if value is None else getattr(value, part)
    found: float | None = value
    return found


def simulate(task: Task) -> Run:
    """Make one run."""
    scenario = task.scenario
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        observers: list[Observer] = []
        trace: TraceLog | None = None
        if task.decisions:
            observers.append(DecisionLog(stack.enter_context(_created(task.decisions, "--decisions"))))
        if task.trace:
            trace = TraceLog(stack.enter_context(_created(task.trace, "--trace")), task.policy)
            observers.append(trace.observer)
        simulation = Simulation(scenario, task.policy, seed=task.seed, observers=tuple(observers))
        if trace:
            trace.begin(simulation)
        stages = simulation.run()[scenario.warm_up_stages :]
        if trace:
            trace.end()
    return Run(
        policy=task.policy.name,
        seed=task.seed,
        stages=tuple(figures(stage, scenario.slo_of) for stage in stages),
        spreads=tuple(spread(stage) for stage in stages),
    )


def summarise_runs(runs: Sequence[Run]) -> list[Summary]:
    """Stage by stage, in each the policies in their order."""
    policies = list(dict.fromkeys(run.policy for run in runs))
    return [
        _summary(policy, i, [run.stages[i] for run in runs if run.policy == policy])
        for i in range(len(runs[0].stages))
        for policy in policies
    ]


def _summary(policy: str, stage: int, seeds: Sequence[Figures]) -> Summary:
    errors: Counter[str] = Counter()
    for each_seed in seeds:
        errors.update(each_seed.errors)
    values = {name: [v for s in seeds if (v := metric(s, name)) is not None] for name in METRICS}
    accelerators = seeds[0].accelerators
    classes = sorted({name for each_seed in seeds for name in each_seed.classes})
    return Summary(
        policy=policy,
        stage=stage,
        load=seeds[0].load,
        rate=seeds[0].rate,
        figures={name: mean_of(found) for name, found in values.items() if found},
        accelerators={
            name: PartSummary(
                **{
                    field: mean_of([getattr(s.accelerators[name], field) for s in seeds])
                    for field in PartSummary.__struct_fields__
                }
            )
            for name in accelerators
        },
        classes={name: _class([s.classes[name] for s in seeds if name in s.classes]) for name in classes},
        errors=dict(errors.most_common()),
    )


def _class(seeds: Sequence[SloClass]) -> ClassSummary:
    ttfts, tpots = [s.ttft for s in seeds if s.ttft], [s.tpot for s in seeds if s.tpot]
    return ClassSummary(
        requests=mean_of([s.requests for s in seeds]),
        within_slo=mean_of([s.within_slo for s in seeds]),
        goodput=mean_of([s.goodput for s in seeds]),
        output_tok_s=mean_of([s.output_tok_s for s in seeds]),
        request_shares={
            name: mean_of([s.request_shares[name] for s in seeds]) for name in seeds[0].request_shares
        },
        ttft_p50_s=mean_of([ttft.p50 for ttft in ttfts]) if ttfts else None,
        ttft_p99_s=mean_of([ttft.p99 for ttft in ttfts]) if ttfts else None,
        tpot_p99_s=mean_of([tpot.p99 for tpot in tpots]) if tpots else None,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """What simulated routers warn of is no news to whoever asked for it to go wrong."""
    logger = logging.getLogger("pointsman")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _created(path: str, option: str) -> BinaryIO:
    try:
        return Path(path).open("wb")
    except OSError as exc:
        raise SettingsError(f"{option}: {path}: {exc.strerror}") from exc
