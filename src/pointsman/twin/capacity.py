"""SLO capacity: the highest Poisson rate that a fleet holds under a policy for so long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import islice

import msgspec

from pointsman.bench.report import NO_SLO, tpot_s
from pointsman.bench.run import Load
from pointsman.errors import SettingsError
from pointsman.twin.gateway import Served
from pointsman.twin.policies import Policy
from pointsman.twin.report import Figures, figures
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Scenario

MISSES = 0.01
"""Share of the requests that may miss a limit: the 99th percentile keeps it."""
TRIAL_SHARE = 0.2
"""Of the time: short trials find about where the answer is. They are not believed."""
TRIAL_TOLERANCE = 0.2
LONGER_HOLDS_LESS = 1.1
"""About the factor between what a trial and the whole time hold, on the case study's pool."""
STEP = 0.06
"""Relative distance of the first two rates tried over the whole time."""
LOWEST_RATE = 0.01
SAMPLE = 100


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """The answer for one policy and seed: ``rate`` was held, ``failed_rate`` was not; the truth is between
    them.
    """

    policy: str
    seed: int
    rate: float
    failed_rate: float
    limit: str
    """What was missed at ``failed_rate``: ``ttft`` or ``tpot``."""
    runs: int
    """How many it took."""
    at_rate: Figures
    """The figures at ``rate``."""


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """What is looked for. The warm-up stages of the scenario come first, then ``duration_s`` at a rate;
    the limits are those of each request's SLO class, and failed requests miss them.
    """

    scenario: Scenario
    policy: Policy
    seeds: tuple[int, ...]
    duration_s: float = 1200.0
    tolerance: float = 0.04
    """Of the rate: how far apart what was held and what was not may be."""


def capacity(search: Search) -> list[Held]:
    """For each seed. The first is looked for from afar, the others near what the one before found."""
    scenario = search.scenario
    if all(slo == NO_SLO for slo in (scenario.slo, *scenario.slos().values())):
        raise SettingsError("slo: without a limit any rate is held; give ttft_s or tpot_s")
    found: list[Held] = []
    rate = scenario.stages[-1].rate or 10.0
    requests_a_call = _requests_a_call(scenario)
    for seed in search.seeds:
        if not found:
            trials = _Trials(search, seed, search.duration_s * TRIAL_SHARE, requests_a_call)
            rate = math.sqrt(math.prod(trials.bracket(rate, 1.0, TRIAL_TOLERANCE))) / LONGER_HOLDS_LESS
        trials = _Trials(search, seed, search.duration_s, requests_a_call)
        held, failed = trials.bracket(rate, search.tolerance if found else STEP, search.tolerance)
        rate = held
        found.append(
            Held(
                policy=search.policy.name,
                seed=seed,
                rate=held,
                failed_rate=failed,
                limit=trials.limits[failed],
                runs=trials.runs,
                at_rate=trials.figures[held],
            )
        )
    return found


class _Trials:
    """Runs of one seed at several rates."""

    def __init__(self, search: Search, seed: int, duration_s: float, requests_a_call: float) -> None:
        self._search = search
        self._seed = seed
        self._duration_s = duration_s
        self._requests_a_call = requests_a_call
        self.figures: dict[float, Figures] = {}
        """Of the rates that were held."""
        self.limits: dict[float, str] = {}
        """What was missed at the others."""
        self.runs = 0

    def bracket(self, rate: float, step: float, tolerance: float) -> tuple[float, float]:
        """A rate that was held and one that was not, the latter within ``tolerance`` above the former; begins
        at ``rate`` and goes on by steps that double.
        """
        held = failed = 0.0
        while not (held and failed):
            if self.holds(rate):
                held, rate = rate, rate * (1 + step)
            else:
                failed, rate = rate, rate / (1 + step)
            step *= 2
            if rate < LOWEST_RATE:
                raise SettingsError(
                    f"--capacity: {self._search.policy.name} does not hold even {LOWEST_RATE:g} requests/s: "
                    f"{self.limits[failed]} is missed; check slo"
                )
        while failed > held * (1 + tolerance):
            middle = math.sqrt(held * failed)
            held, failed = (middle, failed) if self.holds(middle) else (held, middle)
        return held, failed

    def holds(self, rate: float) -> bool:
        """Whether both limits are kept at this rate."""
        scenario = self._search.scenario
        simulation = Simulation(scenario, self._search.policy, seed=self._seed)
        for load in scenario.stages[: scenario.warm_up_stages]:
            simulation.stage(load)
        load = Load(rate=rate, duration_s=self._duration_s)
        misses = _Misses(scenario, round(rate * self._duration_s * self._requests_a_call))
        stage = simulation.stage(load, misses)
        self.runs += 1
        limit = misses.limit or misses.missed(stage.records)
        if limit:
            self.limits[rate] = limit
            return False
        self.figures[rate] = figures(stage, scenario.slo_of)
        return True


def _requests_a_call(scenario: Scenario) -> float:
    """How many requests a call of the workload becomes with those that follow it: the mean of a sample, and
    a tenth more, so that no stage is broken off too early.
    """
    calls = list(islice(scenario.workload.calls(0), SAMPLE))
    left, found = list(calls), 0
    while left:
        call = left.pop()
        found += 1
        left += [following for _, following in call.then()] if call.then else []
    return 1.0 if found == len(calls) else 1.1 * found / len(calls)


class _Misses:
    """Counts the requests of a stage that miss a limit."""

    def __init__(self, scenario: Scenario, expected: int) -> None:
        self._slo_of = cache(scenario.slo_of)
        self._expected = expected
        self._seen = self._ttft = self._tpot = 0
        self.limit = ""
        """``ttft`` or ``tpot`` once too many of the expected requests have missed it."""

    def __call__(self, records: Sequence[Served], under_way: Sequence[Served], now_s: float) -> bool:
        """Are there too many already, those included that are under way and late with their first token?"""
        self._count(records)
        late = sum(self._late(record, record.first_s or now_s) for record in under_way)
        self.limit = self._too_many(self._expected, late)
        return bool(self.limit)

    def missed(self, records: Sequence[Served]) -> str:
        """The limit that too many of these, which are all, have missed; empty if both were kept."""
        self._count(records)
        return self._too_many(len(records), 0)

    def _too_many(self, requests: int, late: int) -> str:
        ttft, tpot = self._ttft + late, self._tpot
        if max(ttft, tpot) <= int(requests * MISSES):
            return ""
        return "ttft" if ttft >= tpot else "tpot"

    def _count(self, records: Sequence[Served]) -> None:
        """Take in what has ended since the last time."""
        for record in records[self._seen :]:
            slo = self._slo_of(record.slo_class)
            failed, tpot = bool(record.error), tpot_s(record) or 0.0
            self._ttft += failed or self._late(record, record.first_s)
            self._tpot += failed or (slo.tpot_s is not None and tpot > slo.tpot_s)
        self._seen = len(records)

    def _late(self, record: Served, first_s: float) -> bool:
        limit_s = self._slo_of(record.slo_class).ttft_s
        return limit_s is not None and first_s - record.due_s > limit_s
