"""least-cost-scorer: seconds, not scores."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf

from pointsman.predictor.costs import Costs
from pointsman.predictor.lengths import Lengths
from pointsman.predictor.speed import Speeds
from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.signals import prefix_match
from pointsman.types import Decision, InferenceRequest, Outcome

NEAR = 1.005
"""Costs that differ by less than this are the same: the choice between them is spread."""
GAP_MEMORY_S = 10.0
PRICE_STEP = 0.2
MOVES_SHARE = .004
"""Of requests that may leave their prefix behind in the long run."""
EARLY_MOVES_SHARE = .05
MOVES_AT_ONCE = 6
HOME_SHARE = 0.5
"""An endpoint that holds so much of what the best one holds counts as home of the prefix."""


@register("least-cost-scorer")
class LeastCost(Plugin):
    """Prefer the endpoint where the request costs least, see ``predictor.costs``; 1 for the least.

    A request leaves the endpoints that hold its prefix only if that saves more than the prompt that has to
    be computed again, times a price. The price rises with each request that left and falls with each that
    stayed, so that in the long run a share of 0.003 leaves; and the saving has to have lasted.
    """

    def __post_init__(self) -> None:
        self._costs = Costs(Speeds(), Lengths())
        self._price = 0.0
        self._allowance = MOVES_AT_ONCE
        self._at_s = -inf
        self._usual: dict[int, float] = {}
        self._homes: frozenset[int] = frozenset()
        self._held: dict[tuple[int, int], int] = {}
        self._holding: dict[str, tuple[int, int]] = {}

    def score(self, cycle: Cycle) -> Sequence[float]:
        costs, endpoints, request = self._costs, cycle.endpoints, cycle.request
        now_s = cycle.services.clock()
        costs.update(cycle.candidates, now_s)
        prompt = request.prompt_tokens
        length = costs.lengths.of(request).of_a_token
        wait, token, output, context = costs.wait, costs.token, costs.output, costs.context
        slots = [e.slot for e in endpoints]
        rest = [output[s] + prompt * context[s] for s in slots]
        total = [wait[s] + prompt * token[s] + length * r for s, r in zip(slots, rest, strict=True)]
        self._smooth(slots, rest, length, now_s)
        match = cycle.get(prefix_match)
        key = match.chains[0].hash(0) if match.chains else 0
        cached = {s: match.tokens(s) for s in slots if s in match.blocks_by_slot} if match.blocks_by_slot else {}
        for i, slot in enumerate(slots):
            if slot in cached:
                total[i] -= cached[slot] * token[slot]
        self._check_room(slots, total, cached, prompt, length, key)
        self._stay(slots, total, cached, prompt)
        least = min(total)
        limit = least * NEAR
        return [1.0 if t <= limit else least / t for t in total]

    def _smooth(self, slots: list[int], rest: list[float], length: float, now_s: float) -> None:
        kept = exp(-min(1.0, now_s - self._at_s) / GAP_MEMORY_S)
        self._at_s = now_s
        usual = self._usual
        wait = self._costs.wait
        for slot, r in zip(slots, rest, strict=True):
            cost = wait[slot] + length * r
            usual[slot] = usual.get(slot, cost) * kept + cost * (1 - kept)

    def _check_room(
        self, slots: list[int], total: list[float], cached: dict[int, int], prompt: int, length: float, key: int
    ) -> None:
        """Whoever has no room for the request's KV comes last."""
        room = self._costs.room
        full = []
        for i, slot in enumerate(slots):
            if room[slot] < prompt + length:
                held = cached.get(slot, 0) if self._held.get((slot, key)) else 0
                if room[slot] < prompt - held + length:
                    full.append(i)
        if len(full) < len(slots):
            for i in full:
                total[i] = total[i] * 10 + 1000.0
                cached.pop(slots[i], None)
        self._key = key

    def _stay(self, slots: list[int], total: list[float], cached: dict[int, int], prompt: int) -> None:
        """Make leaving the prefix as dear as it is."""
        self._price = max(0.0, self._price - PRICE_STEP * MOVES_SHARE)
        share = MOVES_SHARE if self._costs.speeds.settled else EARLY_MOVES_SHARE
        self._allowance = min(MOVES_AT_ONCE, self._allowance + share)
        most = max(cached.values(), default=0)
        if not most:
            self._homes = frozenset()
            return
        homes = frozenset(slot for slot, tokens in cached.items() if tokens >= HOME_SHARE * most)
        self._homes = homes
        cost, home = min((t, s) for t, s in zip(total, slots, strict=True) if s in homes)
        usual, costs = self._usual, self._costs
        price = self._price if self._allowance >= 1 else inf
        for i, slot in enumerate(slots):
            if slot not in homes:
                lasting = cost - (usual[home] - usual[slot])
                again_s = (prompt - cached.get(slot, 0)) * costs.ttft[slot][1]
                total[i] = max(total[i], lasting) + price * again_s

    def on_dispatch(self, cycle: Cycle, decision: Decision) -> None:
        slot = decision.chosen.slot
        if self._homes and slot not in self._homes:
            self._price += PRICE_STEP
            self._allowance = max(0.0, self._allowance - 1)
        place = (slot, self._key)
        held = self._held.get(place, 0)
        self._costs.holds(decision.prompt_tokens - (decision.matched_tokens if held else 0))
        self._held[place] = held + 1
        self._holding[decision.request_id] = place

    def on_outcome(self, request: InferenceRequest, decision: Decision, outcome: Outcome) -> None:
        self._costs.ended(request, outcome)
        place = self._holding.pop(decision.request_id, None)
        if place is not None:
            self._held[place] -= 1
            if not self._held[place]:
                del self._held[place]
