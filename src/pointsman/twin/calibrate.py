"""Engine constants from measured runs: those with which the twin comes closest to them.

Only runs of one kind of server are fitted. A mixed pool mixes what is to be found apart, so it is what the
constants are tested on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import msgspec
from msgspec import structs

from pointsman.sim.profiles import EngineParameters
from pointsman.twin.compare import Task, simulate
from pointsman.twin.fidelity import POLICIES
from pointsman.twin.policies import policy
from pointsman.twin.replay import as_sent, odd_servers, output_tok_s, scenario_of
from pointsman.twin.study import Row, Run

FIELDS = (
    "base_s",
    "sequence_s",
    "context_token_s",
    "prefill_tokens_per_s",
    "prefill_step_s",
    "kv_tokens",
)
"""What is fitted. Block size, step budget and sequences at once are settings of the server, so known."""
TRADED = (
    ("kv_tokens", "prefill_tokens_per_s"),
    ("prefill_tokens_per_s", "prefill_step_s"),
    ("kv_tokens", "prefill_step_s"),
)
"""Pairs of which one can make up for the other."""

TPOT_WEIGHT = 0.5
TTFT_WEIGHT = 0.3
TTFT_AT_MOST = 1.5
"""|ln| beyond which a TTFT is just wrong: a queue that builds up or not makes factors of ten."""
FAILED_AT_MOST = 0.02
"""Share of failed requests beyond which a stage is not fitted: which requests were refused is not known."""
TOLERANCE = 0.01
"""A constant is known as far as it can change before the error grows by so much, 1% of a stage's figure."""

_METRICS_S = {"llmd": 0.25, "k8s": 30.0}
"""Reading metrics is half of a replay's work: here seldom, and hardly where nobody looks at them."""
_MOVES = (1.1, 1.25, 1.5, 2.0, 3.0)
_LEAST_STEP = 0.02


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """What was found for one kind of server."""

    accelerator: str
    model: str
    start: EngineParameters
    found: EngineParameters
    start_error: float
    error: float
    """Mean over stages of |ln tok/s| + 0.5 |ln TPOT| + 0.3 |ln TTFT| between twin and measurement; TTFT
    only of runs without llm-d's router, which delays it.
    """
    other_seed_error: tuple[float, float]
    """The two errors with arrivals and routing that the fit has not seen."""
    stages: int
    evaluations: int


class Range(msgspec.Struct, frozen=True):
    """By how much a constant can be divided and multiplied, the others as found, before the error grows by
    ``TOLERANCE``; None: by more than three.
    """

    field: str
    down: float | None
    up: float | None


class Trade(msgspec.Struct, frozen=True):
    """One constant moved on purpose, and what another does about it."""

    field: str
    by: float
    other: str
    other_by: float
    """With which the error is least."""
    growth: float
    """Of the error when only ``field`` is moved."""
    growth_made_up: float
    """When ``other`` follows."""


def single_kind(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """The runs that can be fitted, by accelerator and model. Those of servers that are known to have been
    set up otherwise are left out where there are others.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.single_vendor:
            groups.setdefault((run.fleet[0][0], run.model), []).append(run)
    odd = {run_id for run_id, servers in odd_servers().items() if servers.measured}
    return {kind: [r for r in group if r.run_id not in odd] or group for kind, group in groups.items()}


class Error:
    """How far the twin is from the runs, as a function of the constants. Counts and remembers its calls."""

    def __init__(self, runs: Sequence[Run], seed: int = 0) -> None:
        self._runs = runs
        self._seed = seed
        self._known: dict[EngineParameters, float] = {}

    @property
    def evaluations(self) -> int:
        return len(self._known)

    def __call__(self, parameters: EngineParameters) -> float:
        found = self._known.get(parameters)
        if found is None:
            found = self._known[parameters] = fmean(self._of_stages(parameters))
        return found

    def _of_stages(self, parameters: EngineParameters) -> list[float]:
        errors = []
        for run in self._runs:
            name, cost = POLICIES[run.router]
            scenario = scenario_of(run, as_sent(run.rows, self._seed), router=cost)
            engines = tuple(structs.replace(item, measured=parameters) for item in scenario.engines)
            scenario = structs.replace(scenario, engines=engines)
            scenario = structs.replace(scenario, metrics_interval_s=_METRICS_S[run.router])
            replayed = simulate(Task(scenario=scenario, policy=policy(name), seed=self._seed))
            for row, stage in zip(run.rows, replayed.stages, strict=True):
                if row.n_failures > FAILED_AT_MOST * row.n_requests:
                    continue
                if not (stage.output_tok_s and stage.tpot and stage.ttft):
                    errors.append(10.0)  # nothing answered: far off, and finite so that it can be compared
                    continue
                errors.append(_error(row, output_tok_s(stage), stage.tpot.mean, stage.ttft.mean))
        return errors


def fit(
    runs: Sequence[Run],
    start: EngineParameters,
    *,
    fields: Sequence[str] = FIELDS,
    evaluations: int = 80,
    step: float = 0.25,
    on_better: Callable[[int, float], None] = lambda _, __: None,
) -> tuple[Fit, Error]:
    """Constants by coordinate search from ``start``: each of ``fields`` is moved up or down by a factor of
    e^step, which shrinks where neither helps. Also the error function, for ``ranges`` and ``trades``.
    """
    error = Error(runs)
    best, least = start, error(start)
    start_error = least
    steps = dict.fromkeys(fields, step)
    while error.evaluations < evaluations and max(steps.values()) > _LEAST_STEP:
        for field in fields:
            for factor in (math.exp(steps[field]), math.exp(-steps[field])):
                tried = moved(best, field, factor)
                found = error(tried)
                if found < least:
                    best, least = tried, found
                    on_better(error.evaluations, least)
                    break
            else:
                steps[field] /= 2
    other = Error(runs, seed=1)
    accelerator, model = runs[0].fleet[0][0], runs[0].model
    found_fit = Fit(
        accelerator=accelerator,
        model=model,
        start=start,
        found=best,
        start_error=start_error,
        error=least,
        other_seed_error=(other(start), other(best)),
        stages=sum(len(run.rows) for run in runs),
        evaluations=error.evaluations,
    )
    return found_fit, error


def ranges(error: Error, found: EngineParameters, fields: Sequence[str] = FIELDS) -> list[Range]:
    """How well each constant is known."""
    least = error(found)

    def limit(field: str, up: bool) -> float | None:
        before, grown = 1.0, 0.0
        for move in _MOVES:
            growth = error(moved(found, field, move if up else 1 / move)) - least
            if growth > TOLERANCE:
                share = (TOLERANCE - grown) / (growth - grown)
                return before * math.exp(share * math.log(move / before))
            before, grown = move, max(0.0, growth)
        return None

    return [Range(field, limit(field, up=False), limit(field, up=True)) for field in fields]


def trades(error: Error, found: EngineParameters, pairs: Sequence[tuple[str, str]] = TRADED) -> list[Trade]:
    """How constants make up for one another: an error that hardly grows when the other follows means that
    the runs do not tell the two apart.
    """
    least = error(found)
    results = []
    for field, other in pairs:
        for by in (0.8, 1.25):
            alone = moved(found, field, by)
            tried = {
                factor: error(moved(alone, other, factor))
                for factor in (0.64, 0.8, 0.9, 1.0, 1.1, 1.25, 1.56)
            }
            factor = min(tried, key=lambda f: tried[f])
            results.append(Trade(field, by, other, factor, tried[1.0] - least, tried[factor] - least))
    return results


def moved(parameters: EngineParameters, field: str, factor: float) -> EngineParameters:
    """The same with one constant multiplied."""
    value = getattr(parameters, field) * factor
    changed: Mapping[str, object] = {field: round(value) if field == "kv_tokens" else value}
    return structs.replace(parameters, **changed)


def _error(row: Row, tok_s: float, tpot_s: float, ttft_s: float) -> float:
    error = abs(math.log(tok_s / row.answered_tok_s))
    error += TPOT_WEIGHT * abs(math.log(tpot_s / row.tpot_mean_s))
    if row.router == "k8s":
        error += TTFT_WEIGHT * min(TTFT_AT_MOST, abs(math.log(ttft_s / row.ttft_mean_s)))
    return error
