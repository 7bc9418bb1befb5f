"""The comparison as JSON: an object for each policy, seed and stage, then one that summarises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from pointsman.twin.capacity import Held
from pointsman.twin.compare import Run, Summary
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


def _line(content: object) -> str:
    return msgspec.json.encode(content).decode()
