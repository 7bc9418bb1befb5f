"""What a policy is held to in a world. Each bar is a ratio, taken seed by seed: the same arrivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

import msgspec

from pointsman.twin.compare import Run, metric
from pointsman.twin.seeds import Mean, mean_of

from .catalogue import World

LLM_D = "llm-d-blend"
TTFT_FREE_S = 0.5
"""A TTFT p99 below this is never held against anyone."""
TTFT_OF_LLM_D = 1.2
AS_QUICK = 0.98
"""The TTFT to beat is the lowest among the policies with this share of the best's throughput."""

Outcome = Literal["holds", "open", "misses"]


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """One figure and its limit."""

    name: str
    found: Mean
    limit: float
    at_least: bool = True
    """Else at most."""

    @property
    def outcome(self) -> Outcome:
        """``holds`` when all of the confidence interval is within the limit, ``misses`` when the mean is not;
        ``open`` between them, and when one seed tells of no interval.
        """
        sign = 1.0 if self.at_least else -1.0
        margin = sign * (self.found.mean - self.limit)
        if margin < 0:
            return "misses"
        return "open" if self.found.ci95 is None or margin < self.found.ci95 else "holds"


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """A policy in a world against the others."""

    world: str
    kind: str
    policy: str
    best: str
    """Of the others, the one with the most output tokens a second."""
    best_ttft: str
    """Of the others about as quick as that, the one with the lowest TTFT p99."""
    to_best: Mean
    """Output tok/s as a share of ``best``'s."""
    ttft_to_best: Mean
    """TTFT p99 as a share of ``best_ttft``'s."""
    bars: tuple[Bar, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst of its bars."""
        outcomes = {bar.outcome for bar in self.bars}
        return "misses" if "misses" in outcomes else "open" if "open" in outcomes else "holds"


def judge(world: World, runs: Sequence[Run], policy: str) -> Judged:
    """``policy`` against the others; ``runs`` has all of them, each with the same seeds."""
    names = list(dict.fromkeys(run.policy for run in runs))
    tok_s = {name: _values(runs, name, "output_tok_s", 0.0) for name in names}
    ttft_s = {name: _values(runs, name, "ttft_p99_s", world.scenario.timeout_s) for name in names}
    others = [name for name in names if name != policy]
    best = max(others, key=lambda name: fmean(tok_s[name]))
    quick = [name for name in others if fmean(tok_s[name]) >= AS_QUICK * fmean(tok_s[best])]
    best_ttft = min(quick, key=lambda name: fmean(ttft_s[name]))
    to_best = _ratio(tok_s[policy], tok_s[best])
    ttft_to_best = _ratio(ttft_s[policy], ttft_s[best_ttft])
    if world.kind == "equal":
        bars = [
            Bar(name=f"tok/s of {best}", found=to_best, limit=0.98),
            Bar(name=f"TTFT p99 of {best_ttft}", found=ttft_to_best, limit=1.02, at_least=False),
        ]
    else:
        bars = _ahead(tok_s, ttft_s, policy)
    bars += _case_study(world, tok_s, policy)
    return Judged(
        world=world.name,
        kind=world.kind,
        policy=policy,
        best=best,
        best_ttft=best_ttft,
        to_best=to_best,
        ttft_to_best=ttft_to_best,
        bars=tuple(bars),
    )


def _case_study(world: World, tok_s: Mapping[str, Sequence[float]], policy: str) -> list[Bar]:
    """What only the case study's own load is held to."""
    bound = world.bound_tok_s()
    if bound is None:
        return []
    own = tok_s[policy]
    limit = 0.94 if world.rate >= 70 else 0.88
    bars = [Bar(name="tok/s of the bound", found=mean_of([value / bound for value in own]), limit=limit)]
    wanted = {LLM_D: 1.8, "round-robin": 2.3} if world.rate == 85 else {}
    bars += [
        Bar(name=f"tok/s of {other}", found=_ratio(own, tok_s[other]), limit=least)
        for other, least in wanted.items()
        if other in tok_s
    ]
    return bars


def to_other(runs: Sequence[Run], policy: str, other: str) -> Mean:
    """Output tok/s of one policy as a share of another's."""
    return _ratio(_values(runs, policy, "output_tok_s", 0.0), _values(runs, other, "output_tok_s", 0.0))


def _ahead(
    tok_s: Mapping[str, Sequence[float]], ttft_s: Mapping[str, Sequence[float]], policy: str
) -> list[Bar]:
    allowed_s = [max(TTFT_OF_LLM_D * found, TTFT_FREE_S) for found in ttft_s[LLM_D]]
    return [
        Bar(name=f"tok/s of {LLM_D}", found=_ratio(tok_s[policy], tok_s[LLM_D]), limit=1.0),
        Bar(
            name="TTFT p99 of what is allowed",
            found=_ratio(ttft_s[policy], allowed_s),
            limit=1.0,
            at_least=False,
        ),
    ]


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> Mean:
    return mean_of([a / b for a, b in zip(ours, theirs, strict=True)])


def _values(runs: Sequence[Run], policy: str, name: str, missing: float) -> list[float]:
    """Of the last stage, a number a seed, in the order of the runs."""
    found = (metric(run.stages[-1], name) for run in runs if run.policy == policy)
    return [missing if value is None else value for value in found]
