"""SLO capacity: the highest Poisson rate that a fleet holds under a policy for so long."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pointsman.bench.report import tpot_s
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
"""Of the time: shorter trials find about where the answer is. They are not believed."""
TRIAL_STEP, STEP = 0.1, 0.04
"""Relative distance of the rates tried at first, in trials and over the whole time."""
LOWEST_RATE = 0.01


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
    tolerance: float = 0.03
    """Of the rate: how far apart what was held and what was not may be."""


def capacity(search: Search) -> list[Held]:
    """For each seed. The first is looked for from afar, the others near what the one before found."""
    found: list[Held] = []
    rate = search.scenario.stages[-1].rate or 10.0
    for seed in search.seeds:
        if not found:
            trials = _Trials(search, seed, search.duration_s * TRIAL_SHARE)
            rate = trials.bracket(rate, 1.0, TRIAL_STEP)[0]
        trials = _Trials(search, seed, search.duration_s)
        held, failed = trials.bracket(rate, search.tolerance if found else STEP, search.tolerance)
        rate = held
        found.append(
            Held(
                policy=search.policy.name,
                seed=seed,
                rate=held,
                failed_rate=failed,
                limit=trials.limit,
                runs=trials.runs,
                at_rate=trials.figures[held],
            )
        )
    return found


class _Trials:
    """Runs of one seed at several rates."""

    def __init__(self, search: Search, seed: int, duration_s: float) -> None:
        self._search = search
        self._seed = seed
        self._duration_s = duration_s
        self.figures: dict[float, Figures] = {}
        """Of the rates that were held."""
        self.limit = ""
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
                    f"{self.limit} is missed; check slo"
                )
        while failed > held * (1 + tolerance):
            middle = (held * failed) ** 0.5
            held, failed = (middle, failed) if self.holds(middle) else (held, middle)
        return held, failed

    def holds(self, rate: float) -> bool:
        """Whether both limits are kept at this rate."""
        scenario = self._search.scenario
        simulation = Simulation(scenario, self._search.policy, seed=self._seed)
        for load in scenario.stages[: scenario.warm_up_stages]:
            simulation.stage(load)
        misses = _Misses(scenario, round(rate * self._duration_s))
        stage = simulation.stage(Load(rate=rate, duration_s=self._duration_s), misses)
        self.runs += 1
        misses.count(stage.records)
        if misses.limit:
            self.limit = misses.limit
            return False
        self.figures[rate] = figures(stage, scenario.slo_of)
        return True


class _Misses:
    """Counts the requests of a stage that miss a limit."""

    def __init__(self, scenario: Scenario, requests: int) -> None:
        self._slo_of = scenario.slo_of
        self._allowed = int(requests * MISSES)
        self._seen = self._ttft = self._tpot = 0
        self.limit = ""
        """What too many of them miss, ``ttft`` or ``tpot``."""

    def __call__(self, records: Sequence[Served], under_way: Sequence[Served], now_s: float) -> bool:
        """Are there too many already, those included that are under way and late with their first token?"""
        self.count(records)
        late = self._ttft + sum(self._late(record, record.first_s or now_s) for record in under_way)
        if late > self._allowed:
            self.limit = "ttft"
        return bool(self.limit)

    def count(self, records: Sequence[Served]) -> None:
        """Take in what has ended since the last time."""
        for record in records[self._seen :]:
            slo = self._slo_of(record.slo_class)
            failed, tpot = bool(record.error), tpot_s(record) or 0.0
            self._ttft += failed or self._late(record, record.first_s)
            self._tpot += failed or (slo.tpot_s is not None and tpot > slo.tpot_s)
        self._seen = len(records)
        if max(self._ttft, self._tpot) > self._allowed:
            self.limit = "ttft" if self._ttft >= self._tpot else "tpot"

    def _late(self, record: Served, first_s: float) -> bool:
        limit_s = self._slo_of(record.slo_class).ttft_s
        return limit_s is not None and first_s - record.due_s > limit_s
