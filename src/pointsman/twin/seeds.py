"""Several seeds together: means and their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import msgspec

_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t, two-sided 95%, for 1 to 30 degrees of freedom."""


class Mean(msgspec.Struct, frozen=True):
    """A figure over several seeds."""

    mean: float
    ci95: float | None
    """Half the width of the 95% confidence interval of the mean (Student's t): the true mean lies within
    ``mean`` +- ``ci95``. None with one seed.
    """
    seeds: int
    least: float
    most: float


def mean_of(values: Sequence[float]) -> Mean:
    """Of one value a seed, at least one."""
    ci95 = None
    if len(values) > 1:
        ci95 = student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Mean(fmean(values), ci95, len(values), min(values), max(values))


def student_t(freedom: int) -> float:
    """The two-sided 95% quantile; beyond the table its first-order expansion, right to three digits."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.960 + 2.4 / freedom
