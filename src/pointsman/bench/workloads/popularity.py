"""Who is asked for how often."""

from __future__ import annotations

import random
from bisect import bisect
from itertools import accumulate


class Zipf:
    """Draws 0 to ``count - 1``, n in proportion to 1 / (n + 1) ** ``exponent``; with 0, all alike."""

    def __init__(self, count: int, exponent: float) -> None:
        self._up_to = list(accumulate((n + 1) ** -exponent for n in range(count)))

    def draw(self, rng: random.Random) -> int:
        return bisect(self._up_to, rng.random() * self._up_to[-1], 0, len(self._up_to) - 1)
