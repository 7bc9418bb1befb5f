"""The comparison as JSON: an object for each policy, seed and stage, then one that summarises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from pointsman.twin.capacity import Held
from pointsman.twin.compare import Run, Summary
from pointsman.twin.grid import Ranking
from pointsman.twin.seeds import mean_of


def lines(runs: Sequence[Run], summaries: Sequence[Summary]) -> Iterator[str]:
    """A line an object."""
    for run in runs:
        for i, stage in enumerate(run.stages):
            head = {"policy": run.policy, "seed": run.seed, "stage": i}
            yield _line(head | msgspec.to_builtins(stage))
    yield _line({"summary": msgspec.to_builtins(summaries)})


def capacity_lines(held: Sequence[Held]) -> Iterator[str]:
    """A line for each policy and seed, then a summary of each policy's rate."""
    for each in held:
        yield _line(msgspec.to_builtins(each))
    rates = {
        policy: mean_of([each.rate for each in held if each.policy == policy])
        for policy in dict.fromkeys(each.policy for each in held)
    }
    yield _line({"summary": msgspec.to_builtins(rates)})


def grid_lines(ranked: Ranking) -> Iterator[str]:
    """A line for each point, the best first, then its margins."""
    for point in ranked.points:
        yield _line(
            {"policy": point.policy.name}
            | msgspec.to_builtins({"score": point.score, "values": point.values})
        )
    margins = [{"over": m.over.name, "fresh_seeds": m.fresh, "better": m.better} for m in ranked.margins]
    best = ranked.points[0].policy.name
    yield _line({"summary": {"objective": ranked.objective, "best": best, "margins": margins}})


def _line(content: object) -> str:
    return msgspec.json.encode(content).decode()
