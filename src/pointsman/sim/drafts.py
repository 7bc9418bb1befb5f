"""Speculative decoding: how many tokens a sequence gets in each step, summed over any number of steps.

Each of the tokens drafted for a step is accepted with the request's acceptance rate, until one is not; that
one's correction, or the token behind them all, comes for free. So a step brings 1 to k + 1 tokens, on average
(1 - a^(k+1)) / (1 - a) for k drafted ones and the rate a (Leviathan et al., arXiv 2211.17192).
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from pointsman.sim.variants import Variants

BITS = 12
_STEPS = 1 << BITS
"""After so many steps a request's draws repeat. A power of two, so that mean rates are exact as floats."""
MASK = _STEPS - 1
_RATES = 32
"""Acceptance rates are rounded to this fraction of one, so that requests share tables."""


class Draft:
    """The draws of one request, by the engine's count of steps."""

    __slots__ = ("acceptance", "place", "sums", "tokens_per_step")

    def __init__(self, rate: int, drafted: int, place: int) -> None:
        self.acceptance = rate / _RATES
        self.sums = _table(rate, drafted)
        self.place = place
        self.tokens_per_step = self.sums[-1] / _STEPS
        """On average."""

    def tokens(self, step: int) -> int:
        """What ``step`` brings."""
        return self.before(step + 1) - self.before(step)

    def before(self, step: int) -> int:
        """The sum of what the steps before ``step`` would have brought, from a beginning before the first."""
        place = self.place + step
        return (place >> BITS) * self.sums[-1] + self.sums[place & MASK]

    def reached(self, step: int, tokens: int) -> int:
        """The first step count at which so many more tokens are out than at ``step``."""
        rounds, rest = divmod(self.before(step) + tokens, self.sums[-1])
        return (rounds << BITS) + bisect_left(self.sums, rest) - self.place


class Drafts:
    """Draws each request's acceptance rate."""

    def __init__(self, variants: Variants) -> None:
        self._rng = random.Random(variants.seed)
        self._acceptance = variants.draft_acceptance
        self._drafted = variants.num_speculative_tokens

    def draw(self) -> Draft:
        rate = round(self._rng.betavariate(*self._acceptance) * _RATES)
        return Draft(rate, self._drafted, self._rng.randrange(_STEPS))


@lru_cache(maxsize=512)
def _table(rate: int, drafted: int) -> Sequence[int]:
    """Tokens that the first 0, 1, 2 ... steps bring."""
    rng = random.Random(rate)
    acceptance = rate / _RATES

    def step() -> int:
        tokens = 1
        while tokens <= drafted and rng.random() < acceptance:
            tokens += 1
        return tokens

    return tuple(accumulate((step() for _ in range(_STEPS)), initial=0))
