"""How long something lasts, learned also from what was broken off before its end: a life table.

Sizes are tokens, in bins whose edges grow by half. Of each bin the table knows how many answers came so far,
and how many of them ended in it: their ratio is the bin's hazard, and the product of what the hazards leave
is the share that gets longer. An answer that was broken off counts as far as it came, and no further; so it
neither shortens nor lengthens what is learned (Kaplan and Meier 1958; half bins as in actuaries' tables).
"""

from __future__ import annotations

from bisect import bisect_right
from math import exp, sqrt

import msgspec

BINS = 24
FIRST_TOKENS = 8.0
"""End of the first bin."""
LAST_TOKENS = 131_072.0
"""Begin of the last one, which has no end."""
_GROWTH = (LAST_TOKENS / FIRST_TOKENS) ** (1 / (BINS - 2))
EDGES = (0.0, *(FIRST_TOKENS * _GROWTH**i for i in range(BINS - 1)), 4 * LAST_TOKENS)
REFRESH = 0.05
"""The curve is drawn anew when it stands on so much more than it did."""
NOBODY = 1e-6
LEAST_LEFT = 0.1
"""Who is older than anything known may go on for so much of its age."""


class Curve:
    """The share of answers that get longer than so many tokens: straight lines between a few points."""

    __slots__ = ("_alive", "_area", "_tokens", "hazards", "mean", "means", "of_a_token", "variances")

    def __init__(
        self, hazards: list[float], means: list[float], variances: list[float], limit: float
    ) -> None:
        """By bin: the share of those who came there that end there, where they do on average, and how far
        from each other. Nobody gets longer than ``limit``.
        """
        self.hazards, self.means, self.variances = hazards, means, variances
        tokens, alive = [0.0], [1.0]
        left = 1.0
        for k in range(BINS):
            if left < NOBODY or tokens[-1] >= limit:
                break
            mean = means[k]
            spread = min(sqrt(3 * variances[k]), mean - EDGES[k], EDGES[k + 1] - mean)
            tokens += (mean - spread, mean + spread)
            alive += (left, left := left * (1 - hazards[k]))
        while len(tokens) > 1 and tokens[-2] >= limit:
            tokens.pop()
            alive.pop()
        if tokens[-1] > limit:
            passed = (limit - tokens[-2]) / (tokens[-1] - tokens[-2])
            alive[-1], tokens[-1] = alive[-2] + (alive[-1] - alive[-2]) * passed, limit
        self._tokens, self._alive = tokens, alive
        area = squares = 0.0
        areas = [0.0]
        for i in reversed(range(len(tokens) - 1)):
            x, y, s, t = tokens[i], tokens[i + 1], alive[i], alive[i + 1]
            area += (y - x) * (s + t) / 2
            squares += (y - x) * (x * (2 * s + t) + y * (s + 2 * t)) / 3
            areas.append(area)
        areas.reverse()
        self._area = areas
        """Tokens still to come after each point, by all who began."""
        self.mean = area
        self.of_a_token = squares / area

    def survival(self, tokens: float) -> float:
        """The share that gets longer."""
        i = bisect_right(self._tokens, tokens)
        if i == len(self._tokens):
            return 0.0
        x, y, s, t = self._tokens[i - 1], self._tokens[i], self._alive[i - 1], self._alive[i]
        return s + (t - s) * (tokens - x) / (y - x)

    def remaining(self, age_tokens: float) -> float:
        """Mean of the tokens that an answer still gets which has so many."""
        i = bisect_right(self._tokens, age_tokens)
        alive = self.survival(age_tokens)
        if alive < NOBODY:
            return LEAST_LEFT * age_tokens
        area = self._area[i] + (self._tokens[i] - age_tokens) * (alive + self._alive[i]) / 2
        return area / alive

    def quantile(self, q: float) -> float:
        """The length that a share ``q`` of the answers does not exceed."""
        wanted = 1 - q
        for i in range(1, len(self._tokens)):
            s, t = self._alive[i - 1], self._alive[i]
            if t <= wanted:
                x, y = self._tokens[i - 1], self._tokens[i]
                return x + (y - x) * (s - wanted) / (s - t) if s > t else x
        return self._tokens[-1]


def exponential(mean: float) -> Curve:
    """What is believed before anything is known: as many as end in a token end in any other."""
    hazards, means, variances = [], [], []
    for k in range(BINS):
        width = EDGES[k + 1] - EDGES[k]
        over = width / mean
        hazards.append(1 - exp(-over))
        means.append(EDGES[k] + (mean - width / (exp(over) - 1) if over < 50 else mean))
        variances.append(min(width * width / 12, mean * mean))
    return Curve(hazards, means, variances, EDGES[-1])


class Bin(msgspec.Struct, array_like=True):
    """What is known of one bin; weights, the older the less."""

    ended: float = 0.0
    tokens: float = 0.0
    squares: float = 0.0
    """Of those that ended: sums of their lengths, and of the squares of these."""
    left: float = 0.0
    """Broken off here,"""
    passed: float = 0.0
    """after so much of the bin in all."""


class Table:
    """Lengths of one sort of answers, over those of a more general sort: where it knows little itself, it
    is as ``parent``.
    """

    __slots__ = ("_curve", "_memory", "_new", "_prior", "bins", "limit", "parent", "weight")

    def __init__(
        self, parent: Table | Curve, *, prior: float, memory: float, limit: float = EDGES[-1]
    ) -> None:
        """What the parent says weighs as much as ``prior`` answers; after ``memory`` answers each counts for
        half. Nobody is expected to get longer than ``limit``, unless somebody does.
        """
        self.bins: dict[int, Bin] = {}
        self.weight = 0.0
        """Answers it stands on."""
        self.parent = parent
        self._prior = prior
        self._memory = memory
        self.limit = limit
        self._new = 0.0
        self._curve: Curve | None = None

    @property
    def curve(self) -> Curve:
        """Drawn when somebody asks: most tables of single prompts are never asked."""
        if self._curve is None or self._new > REFRESH * self.weight:
            return self.draw()
        return self._curve

    @property
    def mean(self) -> float:
        return self.curve.mean

    @property
    def of_a_token(self) -> float:
        """Mean length of the answer that a token belongs to: what is running is more often long."""
        return self.curve.of_a_token

    def ended(self, tokens: float) -> None:
        """An answer ended after so many."""
        found = self._bin(tokens)
        if tokens > self.limit:
            self.limit = tokens
        found.ended += 1.0
        found.tokens += tokens
        found.squares += tokens * tokens
        self._added()

    def left(self, tokens: float) -> None:
        """An answer was broken off after so many; it would have got longer."""
        k = bin_of(tokens)
        found = self._bin(tokens)
        found.left += 1.0
        found.passed += min(1.0, (tokens - EDGES[k]) / (EDGES[k + 1] - EDGES[k]))
        self._added()

    def recall(self, bins: dict[int, Bin], kept: float) -> None:
        """So it was; ``kept`` is the share of confidence that is left."""
        self.bins = bins
        self.weight = sum(found.ended + found.left for found in bins.values())
        self.scale(kept)
        self._curve = None

    def survival(self, tokens: float) -> float:
        return self.curve.survival(tokens)

    def remaining(self, age_tokens: float) -> float:
        return self.curve.remaining(age_tokens)

    def quantile(self, q: float) -> float:
        return self.curve.quantile(q)

    def scale(self, kept: float) -> None:
        """Let what was seen before count for less."""
        self.weight *= kept
        for found in self.bins.values():
            found.ended *= kept
            found.tokens *= kept
            found.squares *= kept
            found.left *= kept
            found.passed *= kept

    def _bin(self, tokens: float) -> Bin:
        k = bin_of(tokens)
        found = self.bins.get(k)
        if found is None:
            found = self.bins[k] = Bin()
        return found

    def _added(self) -> None:
        self.weight += 1.0
        self._new += 1.0
        if self.weight > self._memory:
            self.scale(0.5)

    def draw(self) -> Curve:
        """Bring the curve up to date."""
        parent = self.parent if isinstance(self.parent, Curve) else self.parent.curve
        prior, bins = self._prior, self.bins
        hazards, means, variances = parent.hazards[:], parent.means[:], parent.variances[:]
        came = 0.0  # to the end of bin k
        for k in reversed(range(BINS)):
            found = bins.get(k)
            if found is None:
                hazards[k] *= prior / (prior + came)
                continue
            before = prior * hazards[k]
            ends = found.ended + before
            hazards[k] = min(1.0, ends / (came + found.ended + found.passed + prior))
            came += found.ended + found.left
            if found.ended:
                square = found.squares + before * (variances[k] + means[k] * means[k])
                means[k] = (found.tokens + before * means[k]) / ends
                variances[k] = max(0.0, square / ends - means[k] * means[k])
        self._new = 0.0
        self._curve = Curve(hazards, means, variances, self.limit)
        return self._curve


def bin_of(tokens: float) -> int:
    """Which of the bins so many tokens are in."""
    return bisect_right(EDGES, tokens, 0, BINS) - 1
