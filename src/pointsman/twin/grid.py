"""A policy's weights and parameters over a grid, so that it is compared at its best."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from statistics import fmean

import msgspec

from pointsman.errors import SettingsError
from pointsman.twin.compare import Run, Task, metric, simulate
from pointsman.twin.policies import Policy, parsed
from pointsman.twin.scenario import Scenario
from pointsman.twin.seeds import Mean, mean_of

OBJECTIVES: Mapping[str, tuple[str, bool]] = {
    "output-tok-s": ("output_tok_s", True),
    "goodput": ("goodput", True),
    "ttft-p99": ("ttft_p99_s", False),
}
"""What to rank by: a name of ``compare.METRICS``, and whether more of it is better."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One setting of the policy."""

    policy: Policy
    score: Mean
    """The objective as a share of the best point's, 1.0 being the best of every stage: mean over stages."""
    values: Mapping[str, Mean]
    """The objective itself, by scenario and stage."""


class Margin(msgspec.Struct, frozen=True, kw_only=True):
    """How much better the best point is than another, 0.1 being 10%."""

    over: Policy
    fresh: bool
    """Measured on seeds that had no part in choosing the best."""
    better: Mean
    """Seed by seed, so the noise that both have in common is not in it."""


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """All points, the best first."""

    objective: str
    points: tuple[Point, ...]
    margins: tuple[Margin, ...]
    """Of the best over the policy as it is, and over the second."""


class Axis(msgspec.Struct, frozen=True):
    """One parameter and its values."""

    key: str
    values: tuple[object, ...]


def axis(text: str) -> Axis:
    """``plugin.parameter=1,3,10`` read."""
    key, equals, values = text.partition("=")
    if not equals or not values or "." not in key:
        raise SettingsError(f"--grid {text}: write it as plugin.parameter=value,value,...")
    found = parsed(f"[{values}]", f"--grid {text}")
    assert isinstance(found, list)
    return Axis(key, tuple(found))


def points(policy: Policy, axes: Sequence[Axis]) -> list[Policy]:
    """The policy as it is, then with every combination of the values."""
    keys = [each.key for each in axes]
    return [
        policy,
        *(
            policy.having(dict(zip(keys, values, strict=True)))
            for values in product(*(a.values for a in axes))
        ),
    ]


def rank(
    scenarios: Mapping[str, Scenario],
    policies: Sequence[Policy],
    axes: Sequence[Axis],
    seeds: Sequence[int],
    objective: str,
    each: Callable[[Callable[[Task], Run], Sequence[Task]], list[Run]],
) -> Ranking:
    """Run all points; ``each`` is how tasks are run."""
    base = {point.name: policy for policy in policies for point in points(policy, axes)}
    candidates = [point for policy in policies for point in points(policy, axes)]
    found = _outcomes(scenarios, candidates, seeds, objective, each)
    best = {cell: max(fmean(o.benefits[cell]) for o in found) for cell in found[0].benefits}
    ranked = sorted(found, key=lambda outcome: -fmean(outcome.scores(best)))
    first, second = ranked[:2]
    as_is = base[first.policy.name]
    margins = []
    if first.policy is not as_is:
        fresh = range(max(seeds) + 1, max(seeds) + 1 + len(seeds))
        ours, theirs = _outcomes(scenarios, [first.policy, as_is], fresh, objective, each)
        margins.append(Margin(over=as_is, fresh=True, better=ours.over(theirs, best)))
    margins.append(Margin(over=second.policy, fresh=False, better=first.over(second, best)))
    return Ranking(
        objective=objective,
        points=tuple(
            Point(
                policy=outcome.policy,
                score=mean_of(outcome.scores(best)),
                values={cell: mean_of(values) for cell, values in outcome.values.items()},
            )
            for outcome in ranked
        ),
        margins=tuple(margins),
    )


class _Outcome:
    """One policy's objective by scenario and stage (a cell), a value a seed."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.values: defaultdict[str, list[float]] = defaultdict(list)
        self.benefits: defaultdict[str, list[float]] = defaultdict(list)
        """The values, or where less is better their inverse."""

    def scores(self, best: Mapping[str, float]) -> list[float]:
        """A seed's benefits as shares of the best ones: their mean over the cells."""
        shares = [[v / best[cell] if best[cell] else 1.0 for v in self.benefits[cell]] for cell in best]
        return [fmean(of_seed) for of_seed in zip(*shares, strict=True)]

    def over(self, other: _Outcome, best: Mapping[str, float]) -> Mean:
        """By how much it is better, seed by seed."""
        pairs = zip(self.scores(best), other.scores(best), strict=True)
        return mean_of([ours / theirs - 1 if theirs else math.inf for ours, theirs in pairs])


def _outcomes(
    scenarios: Mapping[str, Scenario],
    candidates: Sequence[Policy],
    seeds: Sequence[int],
    objective: str,
    each: Callable[[Callable[[Task], Run], Sequence[Task]], list[Run]],
) -> list[_Outcome]:
    name, more_is_better = OBJECTIVES[objective]
    found = [_Outcome(candidate) for candidate in candidates]
    places = [(outcome, place, seed) for outcome in found for place in scenarios for seed in seeds]
    tasks = [
        Task(scenario=scenarios[place], policy=outcome.policy, seed=seed) for outcome, place, seed in places
    ]
    for (outcome, place, _), run in zip(places, each(simulate, tasks), strict=True):
        for stage in run.stages:
            value = metric(stage, name)
            if value is None:
                value = 0.0 if more_is_better else math.inf
            cell = f"{place} {stage.load}".strip()
            outcome.values[cell].append(value)
            outcome.benefits[cell].append(value if more_is_better else 1 / value)
    return found
