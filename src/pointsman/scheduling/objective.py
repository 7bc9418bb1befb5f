"""The cheapest endpoint, in money or energy, among those that will do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Literal

from pointsman.predictor.costs import Costs
from pointsman.scheduling.cycle import Cycle
from pointsman.types import Endpoint

Objective = Literal["seconds", "price", "energy"]
NEAR = 1.1
"""Bills that differ by less are the same: then seconds decide."""
FULL = 4.0
"""An endpoint is full when a step takes so many times as long as at rest: three quarters of it then grow
with the requests, and one more makes the others hardly any cheaper.
"""

_RATES: Mapping[Objective, Callable[[Endpoint], float]] = {
    "price": lambda endpoint: endpoint.price_per_hour,
    "energy": lambda endpoint: endpoint.watts,
}


def cheapest(
    objective: Objective,
    cycle: Cycle,
    costs: Costs,
    total: Sequence[float],
    cached: Mapping[int, int],
    length: float,
) -> int | None:
    """Where the request takes the cheapest share of an endpoint's time, of those whose ``total`` is finite;
    None where one has no price, or all are full.

    An endpoint costs the same whatever it does, so a request costs its share of it: all of the endpoint
    while its prompt is computed, and of each decode step what comes to one of the requests in it. Endpoints
    that are in use are therefore filled, as far as promises allow, before idle ones are begun.
    """
    rate = _RATES[objective]
    endpoints, prompt = cycle.endpoints, cycle.request.prompt_tokens
    able = [i for i, t in enumerate(total) if t < inf and not endpoints[i].metrics.waiting]
    if not able or not all(rate(endpoints[i]) for i in able):
        return None
    bills: dict[int, float] = {}
    for i in able:
        endpoint = endpoints[i]
        slot = endpoint.slot
        step_s, running = costs.step_s[slot], endpoint.load.requests
        base_s, sequence_s, context_s = costs.speeds.by_slot[slot].step
        after_s = step_s + sequence_s + context_s * (prompt + length / 2)
        if after_s > FULL * (base_s + sequence_s):
            continue
        taken_s = (prompt - cached.get(i, 0)) * costs.token_s[slot] + length * after_s / (running + 1)
        bills[i] = rate(endpoint) * taken_s
    if not bills:
        return None
    limit = min(bills.values()) * NEAR
    return min((i for i, bill in bills.items() if bill <= limit), key=total.__getitem__)
