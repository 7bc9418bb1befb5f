"""The step time of one kind of endpoint: a line with few parameters, fitted as the samples come."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.predictor.state import FitState, rounded

Coefficients = tuple[float, float, float, float]
"""Seconds a step takes: in any case, for each sequence, for each token of context, for each token of
prefill.
"""

UNITS: Coefficients = (1.0, 1 / 32, 1 / 250_000, 1 / 1000)
"""The features are brought to about the same size, so that one ridge fits them all."""
PRIOR: Coefficients = (0.010, 30e-6, 80e-9, 1 / 12_000)
"""What is believed of an endpoint nothing is known of: some GPU of our days with some 8B model. Only its
order of magnitude matters, and only for the first few requests.
"""
HALF_LIFE_S = 300.0
DOUBT_HALF_LIFE_S = 3.0
"""In which samples come to count half: in general, and when all endpoints of a kind disagree with them."""
DOUBTED_S = 10.0
"""Doubt leaves the fit at least so many seconds of samples."""
TYPICAL_S = 0.02
"""A step that counts for what its sample took."""
MAX_TIMES = 3.0
"""A sample counts as so many times what was expected at most."""
_RIDGE_S = 0.3
"""The prior weighs as much as samples over so many seconds."""
_LEAST = tuple(0.02 * c / unit for c, unit in zip(PRIOR, UNITS, strict=True))
"""No coefficient falls below a small share of the first prior: time never goes backwards."""
_SIZE = range(len(UNITS))


class StepFit:
    """Least squares with forgetting, coefficients never negative, held near a prior where the samples say
    little.
    """

    __slots__ = ("_at_s", "_gram", "_moment", "coefficients", "weight_s")

    def __init__(self, now_s: float, prior: Coefficients = PRIOR) -> None:
        self._gram = [[0.0] * len(UNITS) for _ in _SIZE]
        self._moment = [0.0] * len(UNITS)
        self.coefficients = prior
        self._at_s = now_s
        self.weight_s = 0.0
        """Seconds of samples it stands on."""

    @classmethod
    def restored(cls, state: FitState, at_s: float) -> StepFit:
        """The fit as it was at ``at_s``, which may be before the clock began."""
        fit = cls(at_s)
        upper = iter(state.gram)
        for i in _SIZE:
            for j in _SIZE[i:]:
                fit._gram[i][j] = fit._gram[j][i] = next(upper)
        fit._moment = list(state.moment)
        fit.weight_s = state.weight_s
        return fit

    def state(self) -> FitState:
        return FitState(
            tuple(rounded(self._gram[i][j]) for i in _SIZE for j in _SIZE[i:]),
            tuple(map(rounded, self._moment)),
            rounded(self.weight_s),
        )

    def age(self, now_s: float, doubted: bool = False) -> None:
        """Let what was added before count for less; for much less when it is ``doubted``."""
        half_life_s = DOUBT_HALF_LIFE_S if doubted and self.weight_s > DOUBTED_S else HALF_LIFE_S
        kept = 0.5 ** ((now_s - self._at_s) / half_life_s)
        self._at_s = now_s
        self.weight_s *= kept
        for i in _SIZE:
            self._moment[i] *= kept
            row = self._gram[i]
            for j in _SIZE:
                row[j] *= kept

    def add(self, features: Sequence[float], step_s: float, weight_s: float) -> None:
        """A sample: ``step_s`` was the mean step at ``features`` (1, sequences, context tokens, prefill
        tokens a step) over ``weight_s`` seconds.
        """
        scaled = [f * unit for f, unit in zip(features, UNITS, strict=True)]
        # How far off a sample is matters in relation to what was expected, and no freak goes far.
        expected_s = self.step_s(features)
        step_s = min(MAX_TIMES * expected_s, step_s)
        relative = weight_s * (TYPICAL_S / expected_s) ** 2
        for i in _SIZE:
            weighted = relative * scaled[i]
            self._moment[i] += weighted * step_s
            row = self._gram[i]
            for j in _SIZE:
                row[j] += weighted * scaled[j]
        self.weight_s += weight_s

    def step_s(self, features: Sequence[float]) -> float:
        """What is expected at ``features``."""
        return sum([c * f for c, f in zip(self.coefficients, features, strict=True)])

    def solve(self, prior: Coefficients) -> None:
        """Bring ``coefficients`` up to date. Who would fall below its least value is held there and the
        others are solved for again: at most four times.
        """
        toward = _scaled(prior)
        free = list(_SIZE)
        solution = list(_LEAST)
        while free:
            rows = [[self._gram[i][j] + (_RIDGE_S if i == j else 0.0) for j in free] for i in free]
            held = [j for j in _SIZE if j not in free]
            right = [
                self._moment[i] + _RIDGE_S * toward[i] - sum(self._gram[i][j] * _LEAST[j] for j in held)
                for i in free
            ]
            found = dict(zip(free, _eliminated(rows, right), strict=True))
            below = [i for i in free if found[i] < _LEAST[i]]
            if not below:
                solution = [found.get(i, _LEAST[i]) for i in _SIZE]
                break
            free = [i for i in free if i not in below]
        a, b, c, d = (x * unit for x, unit in zip(solution, UNITS, strict=True))
        self.coefficients = a, b, c, d


def _eliminated(rows: list[list[float]], right: list[float]) -> list[float]:
    """The solution of a positive definite system, by Gauss."""
    size = len(rows)
    for i in range(size):
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            for k in range(i, size):
                rows[j][k] -= factor * rows[i][k]
            right[j] -= factor * right[i]
    for i in reversed(range(size)):
        right[i] = (right[i] - sum(rows[i][k] * right[k] for k in range(i + 1, size))) / rows[i][i]
    return right


def _scaled(coefficients: Coefficients) -> list[float]:
    return [c / unit for c, unit in zip(coefficients, UNITS, strict=True)]
