"""The comparison as JSON: an object for each policy, seed and stage, then one that summarises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from pointsman.twin.compare import Run, Summary


def lines(runs: Sequence[Run], summaries: Sequence[Summary]) -> Iterator[str]:
    """A line an object."""
    for run in runs:
        for i, stage in enumerate(run.stages):
            head = {"policy": run.policy, "seed": run.seed, "stage": i}
            yield _line(head | msgspec.to_builtins(stage))
    yield _line({"summary": msgspec.to_builtins(summaries)})


def _line(content: object) -> str:
    return msgspec.json.encode(content).decode()
