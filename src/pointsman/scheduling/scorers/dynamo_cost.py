"""dynamo-cost-scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.costs import scores_of
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.underway import UnderWay
from pointsman.types import Decision, InferenceRequest, Outcome


@register("dynamo-cost-scorer")
class DynamoCost(Plugin):
    """NVIDIA Dynamo's KV router: least ``overlapScoreWeight`` * (uncached prompt tokens in flight there +
    this request's) + (all prompt tokens in flight there + this request's).

    The first part is still to be prefilled, the second is held in the KV cache; as in Dynamo by default
    there are no output tokens in it. A prefix that several of the requests share counts for each of them.
    """

    overlap_score_weight: Annotated[float, Meta(ge=0)] = 1.0

    def __post_init__(self) -> None:
        self._tokens: dict[str, int] = {}
        """Prompt tokens in flight by endpoint name; no entry where there are none."""
        self._sent: UnderWay[tuple[str, int]] = UnderWay()

    def score(self, cycle: Cycle) -> Sequence[float]:
        weight, own = self.overlap_score_weight, cycle.request.prompt_tokens
        decoding = self._tokens.get
        match = cycle.match
        held, total = match.held_by_slot.get, match.total or 1
        # Own tokens in the second part are the same everywhere.
        return scores_of(
            [
                weight * (e.load.tokens - own * held(e.slot, 0) // total) + decoding(e.name, 0)
                for e in cycle.endpoints
            ]
        )

    def on_dispatch(self, cycle: Cycle, decision: Decision) -> None:
        self._leave(cycle.request)
        name, tokens = decision.chosen.name, decision.prompt_tokens
        self._sent.note(cycle.request, (name, tokens))
        self._tokens[name] = self._tokens.get(name, 0) + tokens

    def on_outcome(self, request: InferenceRequest, decision: Decision, outcome: Outcome) -> None:
        self._leave(request)

    def _leave(self, request: InferenceRequest) -> None:
        sent = self._sent.take(request)
        if sent is None:
            return
        name, tokens = sent
        left = self._tokens.get(name, 0) - tokens
        if left:
            self._tokens[name] = left
        else:
            self._tokens.pop(name, None)
