"""State kept per endpoint name must not outlive the endpoints: names come and go for as long as we run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from pointsman.types import Endpoint

T = TypeVar("T")

SPARE = 64
"""Names kept beyond twice the candidates, so that small pools and subsets are not swept each time."""


def forget_departed(state: dict[str, T], candidates: Sequence[Endpoint]) -> None:
    """Drop what belongs to none of ``candidates`` once ``state`` has grown to more than twice as many."""
    if len(state) > 2 * len(candidates) + SPARE:
        present = {e.name for e in candidates}
        for name in [name for name in state if name not in present]:
            del state[name]
