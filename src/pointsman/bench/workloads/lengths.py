"""How lengths vary about their mean. ``draw`` gives at least 1."""

from __future__ import annotations

import math
import random
from typing import Annotated, TypeAlias

from msgspec import Meta

from pointsman.bench.workloads.family import Checked, Positive, says


class Fixed(Checked, frozen=True, tag_field="shape", tag="fixed"):
    """Always the mean."""

    def draw(self, rng: random.Random, mean: int) -> int:
        return mean


class Uniform(Checked, frozen=True, tag_field="shape", tag="uniform"):
    """Anything within a share of the mean."""

    spread: Annotated[float, Meta(ge=0, le=1), says("0.2 is +-20%")] = 0.2

    def draw(self, rng: random.Random, mean: int) -> int:
        return max(1, round(mean * rng.uniform(1 - self.spread, 1 + self.spread)))


class Exponential(Checked, frozen=True, tag_field="shape", tag="exponential"):
    """Many short, few long: how outputs of production services are distributed (ServeGen, arXiv
    2505.09999).
    """

    most: Annotated[int, Meta(ge=0), says("longer ones are cut to this; 0: none is")] = 0

    def draw(self, rng: random.Random, mean: int) -> int:
        return _cut(rng.expovariate(1 / mean), self.most)


class LogNormal(Checked, frozen=True, tag_field="shape", tag="lognormal"):
    """A long tail: how inputs of production services are distributed (ServeGen, arXiv 2505.09999)."""

    cv: Annotated[Positive, says("standard deviation / mean")] = 1.0
    most: Annotated[int, Meta(ge=0), says("longer ones are cut to this; 0: none is")] = 0

    def draw(self, rng: random.Random, mean: int) -> int:
        variance = math.log1p(self.cv**2)
        return _cut(rng.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance)), self.most)


class Bimodal(Checked, frozen=True, tag_field="shape", tag="bimodal"):
    """Short ones and long ones, each within 20% of their own length, which together keep the mean."""

    short_share: Annotated[float, Meta(gt=0, lt=1), says("of all that are short")] = 0.5
    short: Annotated[float, Meta(gt=0, lt=1), says("length of a short one as a share of the mean")] = 0.1

    def draw(self, rng: random.Random, mean: int) -> int:
        long = (1 - self.short_share * self.short) / (1 - self.short_share)
        mode = self.short if rng.random() < self.short_share else long
        return max(1, round(mean * mode * rng.uniform(0.8, 1.2)))


Lengths: TypeAlias = Fixed | Uniform | Exponential | LogNormal | Bimodal


def _cut(length: float, most: int) -> int:
    drawn = max(1, round(length))
    return min(drawn, most) if most else drawn
