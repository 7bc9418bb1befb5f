"""A case in the twin, and how far apart the twin's own runs are when things happen a little later."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import msgspec
from msgspec import structs

from pointsman.bench.pace import due_times
from pointsman.bench.report import Stage, summarise
from pointsman.bench.run import Load
from pointsman.bench.stream import Gaps
from pointsman.bench.workloads import Call, Workload
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Scenario

from .cases import Case

DELAY_S = 0.002
"""Mean of the exponential delays: a request's way to its engine over HTTP, in our seconds."""
SELDOM = 1.25
"""Metrics are read up to so much less often than ``serve`` means to: its timer ticks every 10 ms."""
DELAYED_RUNS = 6


class Range(msgspec.Struct, frozen=True):
    """Least and highest value."""

    least: float
    most: float

    @property
    def width(self) -> float:
        """Share of the middle."""
        return 2 * (self.most - self.least) / (self.most + self.least)


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the figures in several runs of one case."""

    output_tok_s: Range
    ttft_p50_s: Range

    @property
    def width(self) -> float:
        return max(self.output_tok_s.width, self.ttft_p50_s.width)


def run(scenario: Scenario, policy_name: str, seed: int) -> Stage:
    """The last stage. The policy throws the dice of ``pointsman serve`` with that ``scheduling.seed``."""
    simulation = Simulation(scenario, policy(policy_name), seed=seed, dice=random.Random(seed))
    last = simulation.run()[-1]
    return summarise(last.load.name, last.records, Gaps(), rate=last.load.rate, mergeable=False)


def spread(case: Case, policy_name: str, seed: int) -> Spread:
    """Of runs in which each request is due, and metrics are read, a little later than they should be, in
    each run by other times.

    A policy that sends a request elsewhere because of a millisecond takes another way from there on; no
    two runs over HTTP agree better than these do.
    """
    stages = [
        run(_delayed(case.scenario, seed, DELAY_S * case.speed, i), policy_name, seed)
        for i in range(DELAYED_RUNS)
    ]
    return Spread(
        output_tok_s=_range([stage.output_tok_s for stage in stages]),
        ttft_p50_s=_range([ttft_p50_s(stage) for stage in stages]),
    )


def ttft_p50_s(stage: Stage) -> float:
    assert stage.ttft is not None, "no request was answered"
    return stage.ttft.p50


def _range(values: Sequence[float]) -> Range:
    return Range(min(values), max(values))


def _delayed(scenario: Scenario, seed: int, delay_s: float, i: int) -> Scenario:
    rng = random.Random(f"delays {seed} {i}")
    timed = _Timed(scenario.workload, scenario.stages, rng, delay_s)
    loads = tuple(Load(requests=_count(load)) for load in scenario.stages)
    return structs.replace(
        scenario,
        workload=timed,  # type: ignore[arg-type]  # no file names it
        stages=loads,
        metrics_interval_s=scenario.metrics_interval_s * rng.uniform(1.0, SELDOM),
    )


def _count(load: Load) -> int:
    assert load.rate is not None, "a case is an open loop"
    return load.requests or max(1, round(load.rate * load.duration_s))


class _Timed:
    """The calls of all stages, each due when ``Simulation`` would have it due and a little later."""

    def __init__(
        self, workload: Workload, stages: Sequence[Load], rng: random.Random, delay_s: float
    ) -> None:
        self._workload = workload
        self._stages = stages
        self._rng = rng
        self._delay_s = delay_s

    def calls(self, seed: int) -> Iterator[Call]:
        calls, arrivals = self._workload.calls(seed), random.Random(f"arrivals {seed}")
        for load in self._stages:
            assert load.rate is not None
            due = list(due_times(load.arrivals, arrivals, load.rate, _count(load)))
            timed = [
                structs.replace(call, at_s=at_s + self._rng.expovariate(1 / self._delay_s))
                for at_s, call in zip(due, calls, strict=False)
            ]
            yield from sorted(timed, key=lambda call: call.at_s or 0.0)
