"""least-cost-picker: seconds, not scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from pointsman.predictor.costs import Costs
from pointsman.predictor.lengths import Lengths
from pointsman.predictor.speed import Speeds
from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.signals import prefix_match
from pointsman.types import Decision, Endpoint, InferenceRequest, Outcome

NEAR = 1.005
"""Costs that differ by less are the same: the choice between them is spread."""
HOME_SHARE = 0.5
"""Who holds so much of what the best holder has is a home of the prefix."""
PRICE_STEP = 0.2
MOVES_SHARE = 0.005
"""Of the requests that leave all homes of their prefix in the long run."""
EARLY_MOVES_SHARE = 0.1
"""The same while the speeds are still being learned: what was placed in ignorance has to move."""
MOVES_AT_ONCE = 6.0


@register("least-cost-picker")
class LeastCost(Plugin):
    """The endpoint where the request costs least, see ``predictor.costs``; scores do not matter.

    A request leaves the homes of its prefix only for a saving that has lasted and is larger than what the
    prompt takes to be computed again, times a price. The price rises with each request that leaves and falls
    with each other one, and there is a limit to how many leave at once.
    """

    def __post_init__(self) -> None:
        self._costs = Costs(Speeds(), Lengths())
        self._price = 0.0
        self._allowance = MOVES_AT_ONCE
        self._held: dict[tuple[int, int], int] = {}
        self._holding: dict[str, tuple[int, int]] = {}

    def pick(self, cycle: Cycle, scores: Sequence[float]) -> Sequence[Endpoint]:
        costs, endpoints, request = self._costs, cycle.endpoints, cycle.request
        costs.update(cycle.candidates, cycle.services.clock())
        prompt = request.prompt_tokens
        length = costs.lengths.of(request).of_a_token
        wait, token, output, context = costs.wait, costs.token, costs.output, costs.context
        slots = [e.slot for e in endpoints]
        total = [
            wait[s] + prompt * token[s] + length * (output[s] + prompt * context[s]) for s in slots
        ]
        match = cycle.get(prefix_match)
        cached = {}
        if match.blocks_by_slot:
            for i, slot in enumerate(slots):
                if slot in match.blocks_by_slot:
                    cached[i] = match.tokens(slot)
                    total[i] -= cached[i] * token[slot]
        key = match.chains[0].hash(0) if match.chains else 0
        if costs.tight:
            self._turn_away(slots, total, cached, prompt, length, key)
        chosen = self._choose(cycle, slots, total, cached)
        slot, place = slots[chosen], (slots[chosen], key)
        held = self._held.get(place, 0)
        costs.sent(prompt, prompt - cached.get(chosen, 0) if held else prompt)
        self._held[place] = held + 1
        self._holding[request.id] = place
        return (endpoints[chosen],)

    def _choose(self, cycle: Cycle, slots: list[int], total: list[float], cached: Mapping[int, int]) -> int:
        settled = self._costs.speeds.settled
        share = MOVES_SHARE if settled else EARLY_MOVES_SHARE
        self._allowance = min(MOVES_AT_ONCE, self._allowance + share)
        self._price = max(0.0, self._price - PRICE_STEP * MOVES_SHARE)
        best = self._least(cycle, total)
        most = max(cached.values(), default=0)
        if not most or cached.get(best, 0) >= HOME_SHARE * most:
            return best
        homes = [i for i, tokens in cached.items() if tokens >= HOME_SHARE * most]
        home = min(homes, key=total.__getitem__)
        level = self._costs.level
        saved_s = min(total[home] - total[best], level[slots[home]] - level[slots[best]])
        again = cycle.request.prompt_tokens - cached.get(best, 0)
        again_s = again * self._costs.speeds.token_s(slots[best])
        if total[home] == inf or (self._allowance >= 1 and saved_s > self._price * again_s):
            self._allowance = max(0.0, self._allowance - 1)
            self._price += PRICE_STEP
            return best
        return home

    def _least(self, cycle: Cycle, total: list[float]) -> int:
        least = min(total)
        near = [i for i, t in enumerate(total) if t <= least * NEAR]
        if len(near) > 1:
            return near[int(cycle.services.rng.random() * len(near))]
        return total.index(least)

    def _turn_away(
        self,
        slots: list[int],
        total: list[float],
        cached: dict[int, int],
        prompt: int,
        length: float,
        key: int,
    ) -> None:
        """Leave out who has no room for the request's KV, as long as somebody has."""
        room = self._costs.room
        full = [i for i, slot in enumerate(slots) if room[slot] < prompt + length]
        full = [
            i for i in full if room[slots[i]] < prompt - self._shared(slots[i], key, cached.get(i, 0)) + length
        ]
        if len(full) < len(slots):
            for i in full:
                total[i] = inf

    def _shared(self, slot: int, key: int, cached: int) -> int:
        """Prompt tokens that are in use there anyhow."""
        return cached if self._held.get((slot, key)) else 0

    def on_outcome(self, request: InferenceRequest, decision: Decision, outcome: Outcome) -> None:
        if outcome.usage.output_tokens:
            self._costs.lengths.add(request, outcome.usage.output_tokens)
        place = self._holding.pop(request.id, None)
        if place is not None:
            self._held[place] -= 1
            if not self._held[place]:
                del self._held[place]
