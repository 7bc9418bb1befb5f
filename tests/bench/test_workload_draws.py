"""How lengths, popularity and arrivals are distributed."""

import math
from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.bench.pace import ARRIVALS, Bursts, Day, due_times, poisson
from pointsman.bench.workloads.lengths import Bimodal, Exponential, Fixed, LogNormal, Uniform
from pointsman.bench.workloads.popularity import Zipf
from pointsman.errors import SettingsError

SHAPES = [
    Fixed(),
    Uniform(0.3),
    Exponential(),
    LogNormal(cv=0.5),
    LogNormal(cv=1.5),
    Bimodal(),
    Bimodal(0.3, 0.05),
]


def mean_and_cv(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) / mean


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_a_shape_keeps_the_mean(shape):
    rng = Random(5)
    mean, _ = mean_and_cv([shape.draw(rng, 1000) for _ in range(20_000)])
    assert mean == pytest.approx(1000, rel=0.05)


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
@given(mean=st.integers(1, 20), seed=st.integers(0, 1000))
def test_a_length_is_at_least_one(shape, mean, seed):
    assert shape.draw(Random(seed), mean) >= 1


def test_shapes_vary_as_they_say():
    def cv(shape):
        rng = Random(7)
        return mean_and_cv([shape.draw(rng, 1000) for _ in range(20_000)])[1]

    assert cv(Fixed()) == 0
    assert cv(Exponential()) == pytest.approx(1.0, rel=0.05)
    assert cv(LogNormal(cv=0.5)) == pytest.approx(0.5, rel=0.1)
    lengths = [Bimodal(0.4, 0.1).draw(Random(i), 1000) for i in range(2000)]
    assert sum(length <= 120 for length in lengths) / 2000 == pytest.approx(0.4, abs=0.05)
    assert not any(120 < length < 1200 for length in lengths)


@pytest.mark.parametrize("shape", [Exponential(most=1500), LogNormal(most=1500)])
def test_a_tail_can_be_cut(shape):
    lengths = [shape.draw(Random(i), 1000) for i in range(500)]
    assert max(lengths) == 1500


def test_popularity_falls_with_the_rank():
    rng, ranks = Random(1), Zipf(100, 1.0)
    counts = Counter(ranks.draw(rng) for _ in range(50_000))
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.25)
    assert set(counts) <= set(range(100))
    evenly = Counter(Zipf(4, 0.0).draw(rng) for _ in range(8000))
    assert sorted(evenly) == [0, 1, 2, 3]
    assert min(evenly.values()) > 1800


@pytest.mark.parametrize("arrivals", [*ARRIVALS, Bursts(cv=3.0), Day(period_s=50.0, low=0.1)], ids=str)
def test_arrivals_have_their_rate_and_come_in_order(arrivals):
    due = list(due_times(arrivals, Random(3), 20.0, 30_000))
    assert len(due) == 30_000
    assert due == sorted(due)
    assert due == list(due_times(arrivals, Random(3), 20.0, 30_000))
    assert due[-1] == pytest.approx(1500, rel=0.1)


@pytest.mark.parametrize(
    ("arrivals", "cv"), [("poisson", 1.0), ("bursts", 1.41), (Bursts(cv=3.0), 3.0)], ids=str
)
def test_gaps_vary_as_they_should(arrivals, cv):
    due = list(due_times(arrivals, Random(4), 20.0, 40_000))
    assert mean_and_cv([b - a for a, b in pairwise(due)])[1] == pytest.approx(cv, rel=0.1)


def test_poisson_gaps_are_exponential():
    gaps = [b - a for a, b in pairwise(poisson(Random(3), 20.0, 4000))]
    assert sum(gap > 0.05 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)
    assert list(ARRIVALS["constant"](Random(), 4.0, 3)) == [0.0, 0.25, 0.5]


def test_a_day_has_a_peak_and_a_trough():
    due = list(Day(period_s=400.0, low=0.2)(Random(1), 50.0, 20_000 * 2))
    by_quarter = Counter(int(at_s % 400 // 100) for at_s in due if at_s < 800)
    rising, falling, low, recovering = (by_quarter[i] / 200 for i in range(4))
    swing = 0.8 * 2 / math.pi  # mean of the sine over a quarter
    assert rising == pytest.approx(50 * (1 + swing), rel=0.05)
    assert falling == pytest.approx(50 * (1 + swing), rel=0.05)
    assert low == pytest.approx(50 * (1 - swing), rel=0.08)
    assert recovering == pytest.approx(50 * (1 - swing), rel=0.08)


@pytest.mark.parametrize(("make", "names"), [(lambda: Bursts(cv=0), "^cv"), (lambda: Day(low=2), "^low")])
def test_arrivals_that_cannot_be_name_their_parameter(make, names):
    with pytest.raises(SettingsError, match=names):
        make()
