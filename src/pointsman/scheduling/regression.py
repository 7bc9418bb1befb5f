"""A linear law of how long something takes, learned one sample at a time."""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul

RIDGE = 0.1
"""Samples' worth of belief that a coefficient is 0, for features of about 1."""
LEAST_S = 1e-4
"""Times shorter than this are noise of the clock and count as this long."""


class Regression:
    """Predicts seconds as a sum of coefficients, none below 0, times features: least squares of the
    relative errors over recent samples, so that a few slow answers do not outweigh the usual ones.

    The normal equations, in which older samples fade (about ``memory`` of them count), are solved by
    coordinate descent, one round a sample and on from the last solution. That takes a few dozen
    multiplications, inverts nothing, and keeps the law sane where features go together: more load or more
    tokens make nothing faster.
    """

    __slots__ = ("_keep", "_products", "_squares", "coefficients", "samples")

    def __init__(self, features: int, memory: float) -> None:
        self.coefficients = [0.0] * features
        self.samples = 0
        self._keep = 1.0 - 1.0 / memory
        self._squares = [[0.0] * features for _ in range(features)]
        self._products = [0.0] * features

    def learn(self, features: Sequence[float], value_s: float) -> None:
        """``value_s`` is what it took with these features."""
        self.samples += 1
        keep, squares, products = self._keep, self._squares, self._products
        scale = 1.0 / max(value_s, LEAST_S)
        scaled = [x * scale for x in features]
        for i, x in enumerate(scaled):
            squares[i] = [keep * s + x * other for s, other in zip(squares[i], scaled, strict=True)]
            products[i] = keep * products[i] + x * value_s * scale
        coefficients = self.coefficients
        for i, row in enumerate(squares):
            others = sum(map(mul, row, coefficients)) - row[i] * coefficients[i]
            coefficients[i] = max(0.0, (products[i] - others) / (row[i] + RIDGE))

    def predict(self, features: Sequence[float]) -> float:
        total: float = sum(map(mul, self.coefficients, features))
        return total
