"""Where several routers that do not talk to each other send a prompt so that they mostly agree."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from heapq import nsmallest
from math import log

from xxhash import xxh3_64_intdigest

from pointsman.prefix.hashing import Chain

SHARE = 0.6
"""Of a prompt, the part that others are taken to have in common with it; to the power of two below."""
HOMES = 2
"""Of each prompt: with more there are more copies, with one the load is uneven."""
FEW = 16
"""Endpoints that are remembered of a prompt: when capacities change, its homes are still among them."""
RENEW_S = 30.0
"""After which they are looked for again among all."""
MOST_KEYS = 4096

Draw = tuple[int, float]
"""A place in the list of endpoints, and how early it comes for the prompt; divided by the capacity."""


def key_of(chain: Chain) -> int:
    """The same for prompts that begin alike, for every router; a chat that grows keeps it for long."""
    blocks = max(1, int(SHARE * chain.length))
    return chain.hash((1 << (blocks.bit_length() - 1)) - 1)


class Homes:
    """Weighted rendezvous hashing: an endpoint is first as often as its share of the capacity says, and
    when a capacity changes a little, few prompts move.

    Of each prompt a few endpoints are remembered, so that in a large pool few are hashed for a decision.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[int, tuple[Sequence[str], float, list[Draw]]] = OrderedDict()
        """By key: of which names and when; the few that come first."""

    def of(
        self, key: int, names: Sequence[str], capacities: Sequence[float], closed: set[int], now_s: float
    ) -> list[int]:
        """The two endpoints, the first one first, that the prompt belongs to: places in ``names``, none of
        them ``closed``. One, or none, when the others are.
        """
        found = self._known.get(key)
        if found is None or now_s - found[1] >= RENEW_S or (found[0] is not names and found[0] != names):
            found = names, now_s, _first(key, names, capacities, FEW)
            self._known[key] = found
            if len(self._known) > MOST_KEYS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        order = sorted([(early / capacities[i], i) for i, early in found[2] if i not in closed])
        if len(order) >= HOMES or len(names) <= FEW:
            return [i for _, i in order[:HOMES]]
        return [i for i, _ in _first(key, names, capacities, HOMES + len(closed)) if i not in closed][:HOMES]


def _first(key: int, names: Sequence[str], capacities: Sequence[float], n: int) -> list[Draw]:
    """The ``n`` that come first of all."""
    early = [-log((xxh3_64_intdigest(name.encode(), key) + 1) / (2**64 + 1)) for name in names]
    order = [e / capacity for e, capacity in zip(early, capacities, strict=True)]
    return [(i, early[i]) for i in nsmallest(n, range(len(order)), key=order.__getitem__)]
