"""Noise on the duration of steps, summed over any number of them at once."""

from __future__ import annotations

import math
import random
from array import array
from functools import lru_cache
from itertools import accumulate

_BITS = 14
_STEPS = 1 << _BITS
"""After so many steps the noise repeats: some minutes of decoding."""
_MASK = _STEPS - 1


class Jitter:
    """A factor for each step of an engine: lognormal, independent, mean 1, standard deviation ``deviation``.

    All engines read one table, each from a place of its own. Its running sums make a run of steps as cheap
    as one step, and equal to its steps one by one.
    """

    def __init__(self, deviation: float, seed: int) -> None:
        self._place = random.Random(seed).randrange(_STEPS)
        self._factors, self._sums, self._moments = _table(deviation)

    def factor(self, step: int) -> float:
        """Of one step."""
        return self._factors[(self._place + step) & _MASK]

    def sums(self, step: int, steps: int) -> tuple[float, float]:
        """The sum of the factors of ``steps`` steps from ``step`` on, and the same with each factor times its
        place among them, from 0.
        """
        first = (self._place + step) & _MASK
        rounds, last = divmod(first + steps, _STEPS)
        total = self._sums[last] - self._sums[first]
        moment = self._moments[last] - self._moments[first]
        if rounds:
            total += rounds * self._sums[-1]
            moment += rounds * (
                self._moments[-1] + _STEPS * self._sums[last] + _STEPS * self._sums[-1] * (rounds - 1) / 2
            )
        return total, moment - first * total


@lru_cache(maxsize=16)
def _table(deviation: float) -> tuple[array[float], array[float], array[float]]:
    """The factors; the sums of the first 0, 1, 2 ... of them; and these with each factor times its index."""
    rng = random.Random(0)
    sigma = math.sqrt(math.log1p(deviation * deviation))
    drawn = [rng.lognormvariate(0.0, sigma) for _ in range(_STEPS)]
    mean = math.fsum(drawn) / _STEPS
    factors = [factor / mean for factor in drawn]
    return (
        array("d", factors),
        array("d", accumulate(factors, initial=0.0)),
        array("d", accumulate((i * factor for i, factor in enumerate(factors)), initial=0.0)),
    )
