"""least-cost-picker: seconds, not scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from pointsman.predictor.costs import Costs, Look
from pointsman.predictor.fit import HALF_LIFE_S
from pointsman.predictor.learned import Learned
from pointsman.predictor.lengths import Lengths
from pointsman.predictor.speed import Speeds
from pointsman.predictor.state import Kept
from pointsman.registry import Plugin, register
from pointsman.scheduling.classes import Aim, Aims, RequestClass
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.homes import Homes, key_of
from pointsman.scheduling.objective import Objective, cheapest
from pointsman.scheduling.promises import Promises
from pointsman.scheduling.slo import promises
from pointsman.types import Decision, Endpoint, InferenceRequest, Outcome, Prediction

NEAR = 1.005
"""Costs that differ by less are the same: the choice between them is spread."""
SAME_LENGTH = 0.03
"""Answers whose expected lengths differ by less are as long as is usual."""
HOME_SHARE = 0.5
"""Who holds so much of what the best holder has is a home of the prefix."""
PRICE = "price"
"""Its name in what is kept over a restart."""
PRICE_STEP = 4.0
"""By which the price rises with each request that leaves, divided by the number of endpoints."""
MOVES_SHARE = 0.01
"""Of the requests that leave all homes of their prefix in the long run, as long as none saves a lot by it."""
LEAST_PRICE, MOST_PRICE = 4.0, 16.0
"""Below the one leaving is not worth it, above the other it always is. Nothing is too little as long as
speeds are still being learned: what was placed in ignorance has to move.
"""
PROBES_SHARE = 0.01
"""Of the requests that nobody promised anything, at most so many try an endpoint that gets nothing."""
LEAVING = 0.3
"""Of the requests at an endpoint that leave before the others have grown as much as they will."""
MOST_QUEUE_S = 0.1
"""Nobody leaves for where more than this is still to be computed: they would wait for each other."""

Place = tuple[int, int]
"""An endpoint's slot and the first block of a prompt."""


@register("least-cost-picker")
class LeastCost(Plugin):
    """The endpoint where the request costs least in seconds, its own and those of the requests there;
    scores do not matter. It learns how fast each endpoint is from the traffic itself, and needs no
    settings.

    A request leaves the homes of its prefix only for a saving that has lasted and is larger than what the
    prompt takes to be computed again, times a price. The price rises with each request that leaves and
    falls with each other one. Nobody leaves for where prompts wait.

    ``classes``, by the objective that a request names, say what it is promised (``ttftMs``, ``tpotMs``) or
    that it can wait (``background``). With the ``objective`` price or energy, requests that are promised
    something or can wait go to the cheapest endpoint that keeps all promises.
    """

    classes: Mapping[str, RequestClass] = {}
    objective: Objective = "seconds"

    def __post_init__(self) -> None:
        self._costs = Costs(Speeds(), Lengths())
        self._aims = Aims(self.classes)
        self._promises = Promises(self._costs, fills=self.objective != "seconds")
        self._aim: Aim | None = None
        """Of the request that was picked for last."""
        self._price = 0.0
        self._probes = 0.0
        """That may be made now; grows while there is anyone to try."""
        self._held: dict[Place, int] = {}
        """Requests in flight by where they hold which prompt in KV; kept while room is short."""
        self._places: dict[str, Place] = {}
        self._homes = Homes()

    def pick(self, cycle: Cycle, scores: Sequence[float]) -> Sequence[Endpoint]:
        costs, endpoints, request = self._costs, cycle.endpoints, cycle.request
        look = costs.update(cycle.candidates, cycle.services.clock())
        if endpoints is cycle.candidates:
            slots, place = look.slots, look.place
        else:
            slots = [e.slot for e in endpoints]
            place = {slot: i for i, slot in enumerate(slots)}
        rows, prompt = costs.rows, request.prompt_tokens
        length = costs.lengths.of(request).curve.of_a_token
        if abs(length - costs.usual) < SAME_LENGTH * length:
            usual = costs.usual_rows
            total = [fixed + prompt * token for fixed, token in [usual[s] for s in slots]]
        else:
            total = [
                wait + prompt * token + length * (output + prompt * context)
                for wait, token, output, context in [rows[s] for s in slots]
            ]
        match = cycle.match
        cached: dict[int, int] = {}
        for slot in match.held_by_slot:
            i = place.get(slot)
            if i is not None:
                cached[i] = tokens = match.tokens(slot)
                total[i] -= tokens * rows[slot][1]
        if costs.tight:
            self._turn_away(cycle, slots, total, cached, length)
        aim = None
        if self.classes or request.priority < 0 or promises(request.headers):
            aim = self._aims.of(request)
        self._aim = aim
        if aim is not None:
            now_s = cycle.services.clock()
            holds = self._promises.leave_out(aim, endpoints, total, cached, (prompt, length), now_s)
            if holds and self.objective != "seconds":
                found = cheapest(self.objective, cycle, costs, total, cached, length)
                if found is not None:
                    return (endpoints[found],)
        elif look.starved is not None and self._may_probe(place.get(look.starved), total):
            return (endpoints[place[look.starved]],)
        return (endpoints[self._choose(cycle, look, slots, total, cached)],)

    def _may_probe(self, starved: int | None, total: list[float]) -> bool:
        """What is believed of an endpoint that gets nothing does not change by itself: one of a hundred tries
        it.
        """
        self._probes = min(1.0, self._probes + PROBES_SHARE)
        if starved is None or self._probes < 1.0 or total[starved] == inf:
            return False
        self._probes = 0.0
        return True

    def _choose(
        self, cycle: Cycle, look: Look, slots: list[int], total: list[float], cached: Mapping[int, int]
    ) -> int:
        """The least, unless that is to leave a prefix for too little."""
        costs = self._costs
        step = PRICE_STEP / len(slots)
        self._price = price = max(LEAST_PRICE if costs.settled else 0.0, self._price - step * MOVES_SHARE)
        if costs.shared and cycle.match.chains:
            return self._agreed(cycle, look, slots, total)
        least = min(total)
        if not cached:
            return _spread(cycle, total, least)
        enough = HOME_SHARE * max(cached.values())
        homes = [i for i, tokens in cached.items() if tokens >= enough]
        home = homes[0] if len(homes) == 1 else min(homes, key=total.__getitem__)
        home_s = total[home]
        if home_s <= least * NEAR:
            return home
        best = total.index(least)
        if cached.get(best, 0) >= enough:
            return best
        there, queue_s = slots[best], costs.queue_s
        if home_s == inf:  # it may not stay, so it is none of those that leave for a saving
            free = [i for i, slot in enumerate(slots) if queue_s[slot] <= MOST_QUEUE_S and total[i] < inf]
            return min(free, key=total.__getitem__, default=best)
        saved_s = min(home_s - least, costs.level[slots[home]] - costs.level[there])
        again_s = (cycle.request.prompt_tokens - cached.get(best, 0)) * costs.token_s[there]
        if saved_s <= price * again_s or queue_s[there] > MOST_QUEUE_S:
            return home
        self._price = min(MOST_PRICE, price + step)
        return best

    def _agreed(self, cycle: Cycle, look: Look, slots: list[int], total: list[float]) -> int:
        """One of the two homes that other routers find, too. Both have the prefix soon, so that is not
        counted: the choice between them levels the load.
        """
        capacity = self._costs.capacity
        place = {slot: i for i, slot in enumerate(slots) if total[i] < inf}
        closed = {i for i, slot in enumerate(look.slots) if slot not in place}
        found = self._homes.of(
            key_of(cycle.match.chains[0]),
            look.names,
            [capacity[slot] for slot in look.slots],
            closed,
            cycle.services.clock(),
        )
        prompt, rows, match = cycle.request.prompt_tokens, self._costs.rows, cycle.match

        def if_cached(i: int) -> float:
            slot = slots[i]
            return total[i] - (prompt - match.tokens(slot)) * rows[slot][1]

        return min([place[look.slots[i]] for i in found], key=if_cached)

    def _turn_away(
        self, cycle: Cycle, slots: list[int], total: list[float], cached: Mapping[int, int], length: float
    ) -> None:
        """Leave out who has no room for the request's KV, as long as somebody has."""
        room, first, held = self._costs.room, _first_block(cycle), self._held
        prompt, endpoints, full = cycle.request.prompt_tokens, cycle.endpoints, []
        for i, slot in enumerate(slots):
            need = prompt + length
            if room[slot] >= need:
                continue
            own = need - cached.get(i, 0)
            if (slot, first) in held:
                need = own  # what requests in flight hold of the same prompt needs no room a second time
            if room[slot] + LEAVING * endpoints[i].load.requests * own < need:
                full.append(i)
        if len(full) < len(slots):
            for i in full:
                total[i] = inf

    def watch(self, endpoints: Sequence[Endpoint], now: float) -> None:
        """Learn from what the endpoints' metrics say, though nothing is decided."""
        self._costs.update(endpoints, now)

    def on_dispatch(self, cycle: Cycle, decision: Decision) -> None:
        costs, slot = self._costs, decision.chosen.slot
        costs.lengths.sent(cycle.request, decision.at_s)
        prompt, uncached = decision.prompt_tokens, decision.prompt_tokens - decision.matched_tokens
        token_s, step_s = costs.token_s[slot], costs.step_s[slot]
        queue_s = decision.chosen.load.tokens * token_s
        decision.predicted = Prediction(queue_s, step_s + uncached * token_s, step_s)
        if self._aim is not None:
            self._promises.sent(
                cycle.request, self._aim, decision, costs.lengths.of(cycle.request).of_a_token
            )
        if not costs.tight:
            costs.sent(decision.chosen, prompt, prompt)
            return
        self._leave(decision.request_id)
        place = slot, _first_block(cycle)
        sharing = self._held.get(place, 0)
        self._held[place] = sharing + 1
        self._places[decision.request_id] = place
        costs.sent(decision.chosen, prompt, uncached if sharing else prompt)

    def on_outcome(self, request: InferenceRequest, decision: Decision, outcome: Outcome) -> None:
        self._costs.lengths.observe(request, outcome, decision.predicted)
        if self._places:
            self._leave(decision.request_id)
        if self._promises.under_way:
            self._promises.ended(request, outcome)

    def keep(self, endpoints: Sequence[Endpoint], now: float) -> Kept | None:
        speeds = self._costs.speeds.state(endpoints, now)
        return Kept(speeds, self._costs.lengths.state(), {PRICE: self._price}) if speeds else None

    def recall(self, kept: Kept, at: float, now: float) -> None:
        self._costs.speeds.restore(kept.speeds, at, now)
        self._costs.lengths.restore(kept.lengths, now - at)
        self._price = kept.numbers.get(PRICE, 0.0) * 0.5 ** ((now - at) / HALF_LIFE_S)

    def learned(self, endpoints: Sequence[Endpoint], now: float) -> Mapping[str, Learned]:
        known = ((e.name, self._costs.learned(e, now)) for e in endpoints)
        return {name: learned for name, learned in known if learned}

    def _leave(self, request_id: str) -> None:
        place = self._places.pop(request_id, None)
        if place is not None:
            left = self._held[place] - 1
            if left:
                self._held[place] = left
            else:
                del self._held[place]


def _spread(cycle: Cycle, total: list[float], least: float) -> int:
    """Any of those that are as good as the least."""
    limit, best = least * NEAR, total.index(least)
    total[best] = inf
    alone = min(total) > limit
    total[best] = least
    if alone:
        return best
    near = [i for i, t in enumerate(total) if t <= limit]
    return near[int(cycle.services.rng.random() * len(near))]


def _first_block(cycle: Cycle) -> int:
    chains = cycle.match.chains
    return chains[0].hash(0) if chains else 0
