"""The ring of recent decisions, and the one form in which a decision is told: live, in logs and by the
simulator.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from pointsman.types import Decision, InferenceRequest, Outcome

MAX_SCORES = 50_000
"""Scores kept in all: a pool of 1,000 endpoints keeps fewer decisions than one of 20."""


class DecisionRing:
    """An observer that keeps the last decisions as they are and renders them when somebody asks."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._ring: deque[Decision] = deque(maxlen=keep)

    def __call__(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        if decision is not None:
            ring = self._ring
            ring.append(decision)
            if len(ring) * len(decision.candidates) > MAX_SCORES:
                self._shrink(len(decision.candidates))

    def _shrink(self, endpoints: int) -> None:
        """The pool is large: keep fewer, but a few at any rate."""
        limit = max(16, MAX_SCORES // endpoints)
        while len(self._ring) > limit:
            self._ring.popleft()

    def recent(self, limit: int, request_id: str = "") -> list[dict[str, Any]]:
        """The newest first; only that of ``request_id`` when given."""
        found = (d for d in reversed(self._ring) if not request_id or d.request_id == request_id)
        return [render(decision) for decision, _ in zip(found, range(limit), strict=False)]


def totals(decision: Decision) -> list[float]:
    """The weighted sum of each scored endpoint's scores."""
    found = [0.0] * len(decision.scored)
    for name, row in decision.scores.items():
        weight = decision.weights.get(name, 1.0)
        found = [total + weight * score for total, score in zip(found, row, strict=True)]
    return found


def render(decision: Decision) -> dict[str, Any]:
    """A decision as plain data: who could take it, what each scorer said, who got it, what became of it."""
    outcome = decision.outcome
    total = totals(decision)
    return {
        "request_id": decision.request_id,
        "model": decision.model,
        "at_s": decision.at_s,
        "profile": decision.profile,
        "candidates": [endpoint.name for endpoint in decision.candidates],
        "kept": {name: [e.name for e in kept] for name, kept in decision.kept.items()},
        "scores": {
            endpoint.name: {
                "total": total[i],
                **{name: row[i] for name, row in decision.scores.items()},
            }
            for i, endpoint in enumerate(decision.scored)
        },
        "weights": dict(decision.weights),
        "chosen": decision.chosen.name,
        "fallbacks": [endpoint.name for endpoint in decision.fallbacks],
        "tried_before": list(decision.tried),
        "prompt_tokens": decision.prompt_tokens,
        "matched_tokens": decision.matched_tokens,
        "matched_by": "events" if decision.by_events else "sent",
        **({"untokenized": decision.untokenized} if decision.untokenized else {}),
        **({"request_headers": dict(decision.request_headers)} if decision.request_headers else {}),
        "predicted": msgspec.to_builtins(decision.predicted) if decision.predicted else None,
        "outcome": msgspec.to_builtins(msgspec.structs.asdict(outcome)) if outcome else None,
    }
